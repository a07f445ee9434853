"""Writes photographs of solar cells as a folder of images: train/CLASS/cell0001.png and val/...

    pip install elpv-dataset==1.0.0.post1
    python data/elpv/prepare.py

The pictures are those of the PyPI package elpv-dataset: 2,624 grey photographs of glowing cells
by ZAE Bayern (licence CC BY-NC-SA 4.0; please cite Buerhop-Lutz et al. 2018). They are shrunk from
300 to 64 pixels. The eight classes are the cells' two types, monocrystalline and polycrystalline,
with their four grades of defect: mono-0, mono-33, mono-67, mono-100, poly-0, ... per cent. Every
eighth picture is held out in val. They take 8 MB and less than a minute.
"""

import csv
import importlib.util
import sys
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "emoji"))
from prepare import write_parts  # noqa: E402  of the emoji

SIDE = 64


def shrink_cells():
    """Yields (CLASS/cell0001.png, picture) of every cell."""
    package = importlib.util.find_spec("elpv_dataset")
    if package is None:
        raise ModuleNotFoundError(name="elpv_dataset")
    data = Path(package.origin).parent / "data"
    with open(data / "labels.csv") as file:
        rows = list(csv.reader(file, delimiter=" ", skipinitialspace=True))
    for name, defect, kind in rows:
        with Image.open(data / name) as picture:
            small = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield f"{kind}-{round(100 * float(defect))}/{Path(name).name}", small


if __name__ == "__main__":
    write_parts(__doc__, FOLDER, "elpv-dataset==1.0.0.post1", shrink_cells)
