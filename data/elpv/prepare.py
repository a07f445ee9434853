"""Writes photographs of solar cells as a folder of images: train/CLASS/cell0001.png and val/...

    pip install elpv-dataset==1.0.0.post1
    python data/elpv/prepare.py

The pictures are those of the PyPI package elpv-dataset: 2,624 grey photographs of glowing cells
by ZAE Bayern (licence CC BY-NC-SA 4.0; please cite Buerhop-Lutz et al. 2018). They are shrunk from
300 to 64 pixels. The eight classes are the cells' two types, monocrystalline and polycrystalline,
with their four grades of defect: mono-0, mono-33, mono-67, mono-100, poly-0, ... per cent. Every
eighth picture is held out in val. They take 8 MB and less than a minute.
"""

import argparse
import csv
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

SIDE = 64


def write_cells(folder):
    """Writes both parts to an empty folder and returns the number of pictures."""
    package = importlib.util.find_spec("elpv_dataset")
    if package is None:
        raise ModuleNotFoundError(name="elpv_dataset")
    data = Path(package.origin).parent / "data"
    with open(data / "labels.csv") as file:
        rows = list(csv.reader(file, delimiter=" ", skipinitialspace=True))
    for count, (name, defect, kind) in enumerate(rows):
        part = "val" if count % 8 == 0 else "train"
        path = folder / part / f"{kind}-{round(100 * float(defect))}" / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(data / name) as picture:
            picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    return len(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder that gets train/ and val/ (default: this file's)",
    )
    out = parser.parse_args().out
    parts = [out / "train", out / "val"]
    if all(part.exists() for part in parts):
        print(f"{out}: train and val are already there")
        return

    # A run that is stopped leaves no half-written part: both are made elsewhere, then renamed.
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        try:
            count = write_cells(Path(temporary))
        except ModuleNotFoundError as error:
            command = "pip install elpv-dataset==1.0.0.post1"
            print(f"prepare.py: no {error.name}: {command}", file=sys.stderr)
            raise SystemExit(2) from None
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)
            Path(temporary, part.name).rename(part)
    print(f"{out}: {count:,} pictures in train and val")


if __name__ == "__main__":
    main()
