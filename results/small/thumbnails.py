"""The samples of reproduce.py by a second measure, which no loss has seen: 8 x 8 thumbnails.

    python results/small/thumbnails.py      # after bash results/reproduce.sh, from its out/small/

A picture is shrunk to 8 x 8 by averaging. Its 192 numbers, in [-1, 1], are its features, and the
Frechet distance of the samples' features from those of the training pictures is the score. It sees
where which colours are, and nothing finer. Writes thumbnails.json, {name of the samples: score}.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]

import reproduce  # noqa: E402

import evaluate  # noqa: E402
import vae  # noqa: E402


def statistics(images):
    """uint8 (N, 3, H, W) -> mean (192,) and covariance (192, 192) of their thumbnails."""
    small = F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 8).flatten(1).double()
    return small.mean(dim=0), torch.cov(small.T)


def main():
    data = vae.ImageFolder("data/emoji/train", (64, 64))
    training = statistics(torch.stack([data[i][0] for i in range(len(data))]))
    scores = {}
    for goal in reproduce.goals(reproduce.COMPARISONS["gain"]):
        file = goal.needs[0].file
        if file.suffix == ".npz":
            with np.load(file) as stored:
                images = torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2)
            scores[goal.name] = round(evaluate.frechet_distance(*statistics(images), *training), 4)
            print(goal.name, scores[goal.name])
    (FOLDER / "thumbnails.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
