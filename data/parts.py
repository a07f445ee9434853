"""What the prepare.py of each data set share: the parts train/ and val/, and the command line."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path


def write_parts(description, folder, package, pictures):
    """Writes pictures to train/ and val/ in `folder`, or in --out. Every eighth is held out in val.

    package   what to install where a module is missing
    pictures  () -> an iterable of (path inside of a part, picture)
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = "folder that gets train/ and val/ (default: this file's)"
    parser.add_argument("--out", type=Path, default=folder, help=words)
    out = parser.parse_args().out
    parts = ("train", "val")
    if all((out / part).exists() for part in parts):
        print(f"{out}: train and val are already there")
        return

    # A run that is stopped leaves no half-written part: both are made elsewhere, then renamed.
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        try:
            for name, picture in pictures():
                path = Path(temporary, "train" if count % 8 else "val", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
                count += 1
        except ModuleNotFoundError as error:
            print(f"prepare.py: no {error.name}: pip install {package}", file=sys.stderr)
            raise SystemExit(2) from None
        for part in parts:
            shutil.rmtree(out / part, ignore_errors=True)
            Path(temporary, part).rename(out / part)
    print(f"{out}: {count:,} pictures in train and val")
