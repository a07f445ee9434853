"""Scores autoencoders and generators as the EQ-VAE paper does (https://arxiv.org/abs/2502.09509), draws its figures.

    python evaluate.py recon standard.pt eq.pt --data data/imagenet/val --record recon.json     # Tables 1, 5 to 8, 12
    python evaluate.py samples dit.npz VIRTUAL_imagenet256_labeled.npz --record dit-fid.json    # Tables 2 to 4, 9 to 11
    python evaluate.py figures standard.pt eq.pt --data data/imagenet/val --records *.json      # Fig. 1 to 6
    python evaluate.py report *.json --figures figures/               # report.md: the paper's numbers and ours
    torchrun --nproc_per_node=8 evaluate.py recon ...                 # recon and samples on 8 GPUs

FID needs FID-Inception's weights (--inception FILE, torch hub's cache or the network); --features random, or what
`classifier` has learned from images of yours, works anywhere. Networks, metrics and `samples` need no other file.
"""

import argparse
import hashlib
import itertools
import json
import math
import mmap
import os
import platform
import shutil
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm


class InputError(ValueError):
    """What the user gave wrong, in one line; main() ends with exit code 2."""


# ======================================================================================================================
# Feature extractors: FID's Inception-v3, and a classifier for where its weights cannot be had


class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU; fold() merges the first two, for speed."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    @torch.no_grad()
    def fold(self):
        gain = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        self.conv.weight *= gain[:, None, None, None]
        self.conv.bias = nn.Parameter(self.bn.bias - self.bn.running_mean * gain)
        self.bn = nn.Identity()


class Mixed(nn.Module):
    """An Inception block. `branches` are chains of (name, channels, kernel[, stride]); a list of two forks its end.
    pool: "average" and "max" keep the size, a `branch_pool` follows; "down" halves it, as all units with a stride do.
    FID's graph is not torchvision's: average pools do not count their padding, the last one is a max pool.
    """

    def __init__(self, c_in, branches, pool, pool_channels=0):
        super().__init__()
        self.chains, self.pool = [], pool
        for branch in branches:
            chain, width = [], c_in
            for group in branch:
                group = group if isinstance(group, list) else [group]
                for name, c_out, kernel, *stride in group:
                    padding = 0 if stride else "same"
                    self.add_module(name, Unit(width, c_out, kernel, *(stride or [1]), padding))
                width = group[-1][1]
                chain.append([name for name, *_ in group])
            self.chains.append(chain)
        if pool_channels:
            self.branch_pool = Unit(c_in, pool_channels, 1)

    def forward(self, x):
        def run(chain, h):
            for names in chain:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            return h

        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(
                x, 3, **(dict(stride=2) if self.pool == "down" else dict(stride=1, padding=1))
            )
        pooled = self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled
        return torch.cat([*(run(chain, x) for chain in self.chains), pooled], dim=1)


def mixed_5(c_in, pool_channels):  # 35 x 35
    return Mixed(
        c_in,
        [
            [("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ],
        "average",
        pool_channels,
    )


def mixed_6(c):  # 17 x 17
    return Mixed(
        768,
        [
            [("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [
                ("branch7x7dbl_1", c, 1),
                ("branch7x7dbl_2", c, (7, 1)),
                ("branch7x7dbl_3", c, (1, 7)),
                ("branch7x7dbl_4", c, (7, 1)),
                ("branch7x7dbl_5", 192, (1, 7)),
            ],
        ],
        "average",
        192,
    )


def mixed_7(c_in, pool):  # 8 x 8
    return Mixed(
        c_in,
        [
            [("branch1x1", 320, 1)],
            [
                ("branch3x3_1", 384, 1),
                [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))],
            ],
            [
                ("branch3x3dbl_1", 448, 1),
                ("branch3x3dbl_2", 384, 3),
                [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
            ],
        ],
        pool,
        192,
    )


class Inception(nn.Module):
    """FID's Inception-v3 (TensorFlow, 2015-12-05) in the names of its public PyTorch files.
    weights     pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or torch-fidelity's file of the same tag
    preprocess  "pytorch-fid": half-pixel bilinear to 299, then 2 x / 255 - 1; the paper's rFID
                "adm": TensorFlow 1's bilinear, then (x - 128) / 128; ADM's evaluator, the paper's gFID
    """

    URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

    def __init__(self, weights=None, preprocess="pytorch-fid"):
        super().__init__()
        self.preprocess = preprocess
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, 3, stride=2), Unit(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Unit(32, 64, 3, padding=1), Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            mixed_5(192, 32),
            mixed_5(256, 64),
            mixed_5(288, 64),
        )
        self.Mixed_6a = Mixed(
            288,
            [
                [("branch3x3", 384, 3, 2)],
                [
                    ("branch3x3dbl_1", 64, 1),
                    ("branch3x3dbl_2", 96, 3),
                    ("branch3x3dbl_3", 96, 3, 2),
                ],
            ],
            "down",
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            mixed_6(c) for c in (128, 160, 160, 192)
        )
        self.Mixed_7a = Mixed(
            768,
            [
                [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                [
                    ("branch7x7x3_1", 192, 1),
                    ("branch7x7x3_2", 192, (1, 7)),
                    ("branch7x7x3_3", 192, (7, 1)),
                    ("branch7x7x3_4", 192, 3, 2),
                ],
            ],
            "down",
        )
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "average"), mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            self.load_state_dict(
                {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
            )
        for module in self.modules():
            if isinstance(module, Unit):
                module.fold()
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pooled (B, 2048), spatial (B, 2023) for sFID, logits without bias (B, 1008)."""
        x = images.float()
        if self.preprocess == "adm":
            rows, columns = (tf1_bilinear(side, 299).to(x) for side in x.shape[-2:])
            x = (rows @ x @ columns.T - 128) / 128  # (B, 3, 299, 299)
        else:
            x = (
                F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2
                - 1
            )
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # H, W, C order: ADM's files have it so
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T


def tf1_bilinear(n_in, n_out):
    """The matrix (n_out, n_in) of TensorFlow 1's ResizeBilinear: source = i n_in / n_out, no half pixel, no blur."""
    source = torch.arange(n_out, dtype=torch.float64) * n_in / n_out
    low = source.floor().long()
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    matrix[torch.arange(n_out), low] += 1 - (source - low)
    matrix[torch.arange(n_out), (low + 1).clamp(max=n_in - 1)] += source - low
    return matrix


class Classifier(nn.Module):
    """A small convolutional network: uint8 (B, 3, H, W), from 16 px on -> features (B, 448), its levels' means.
    For where FID-Inception's weights cannot be had: trained by `classifier` on one's own labelled images its distance
    is FD-classifier, with random weights FD-random; neither is called FID.
    """

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1) for c in (32, 64, 128)
        )
        self.block = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))
            for c in (64, 128, 256)
        )
        self.head = nn.Linear(448, classes)

    def levels(self, images):
        h = self.stem(images.float() / 127.5 - 1)
        for down, block in zip(self.down, self.block):
            h = down(F.relu(h))  # (B, 64, H / 4, W / 4), ...
            h = h + block(h)
            yield F.relu(h)

    def forward(self, images):
        return (torch.cat([level.mean(dim=(2, 3)) for level in self.levels(images)], dim=1),)


def load_classifier(path):
    checkpoint = read_weights(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("arch") != "Classifier":
        raise InputError(f"{path}: no file of `classifier` (--features: inception, random, or one)")
    network = Classifier(len(checkpoint["classes"]))
    network.load_state_dict(checkpoint["model"])
    return network, f"classifier of accuracy {checkpoint['accuracy']:.3f} on images held out"


def tokens(path, device):
    """A file of `classifier` as repa.py's --encoder evaluate:tokens, in DINOv2's place: (B, side^2, 448)."""
    network = load_classifier(path)[0].to(device).requires_grad_(False)
    return lambda images, side: torch.cat(
        [F.adaptive_avg_pool2d(level, side).flatten(2) for level in network.levels(images)], dim=1
    ).transpose(1, 2)


def classifier(args):
    """Trains Classifier on the labelled images of args.data, a tenth of them held out; half of a batch mirrored."""
    from vae import Images, save_checkpoint

    data = Images(args.data, args.image_size)
    if len(data.classes) < 2:
        raise InputError(f"--data {args.data}: needs a folder for each of at least two classes")
    make_folder(Path(args.out).parent)
    torch.manual_seed(args.seed)
    held, train = torch.randperm(len(data)).tensor_split([max(1, len(data) // 10)])
    network = Classifier(len(data.classes)).to(here())
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)

    def batch(index):
        images, labels, *_ = zip(*(data[int(i)] for i in index))
        return torch.stack(images), torch.tensor(labels, device=here())

    for _ in tqdm(range(args.steps), desc="classifier", unit="step", mininterval=1):
        images, labels = batch(train[torch.randint(len(train), (args.batch_size,))])
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
        F.cross_entropy(
            network.head(*network(images.to(here()))), labels, label_smoothing=0.1
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        right = sum(
            int((network.head(*network(images.to(here()))).argmax(dim=1) == labels).sum())
            for images, labels in map(batch, held.split(args.batch_size))
        )
    save_checkpoint(
        args.out,
        dict(
            arch="Classifier",
            model=network.cpu().state_dict(),
            classes=data.classes,
            accuracy=right / len(held),
            step=args.steps,
            data=str(args.data),
            seed=args.seed,
        ),
    )
    print(
        f"{args.out}: accuracy {right / len(held):.3f} on {len(held):,} images held out, {len(data.classes)} classes"
    )


def read_weights(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that is no checkpoint
        raise InputError(f"{path}: cannot be read as weights ({type(error).__name__})") from None


def load_features(args, preprocess="pytorch-fid"):
    """-> (network of uint8 images to a tuple of features, the distance's name, the extractor's for the record)."""
    if args.features == "inception":
        path = Path(
            args.inception or Path(torch.hub.get_dir(), "checkpoints", Path(Inception.URL).name)
        )
        try:
            if not path.is_file() and not args.inception:
                torch.hub.load_state_dict_from_url(
                    Inception.URL, map_location="cpu", check_hash=True
                )
            network = Inception(read_weights(path), preprocess)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{path}: not FID-Inception's weights ({' '.join(str(error).split())[:100]}); put "
                f"{Inception.URL} there, or take --features random, which is no FID"
            ) from None
        name = f"FID-Inception, {preprocess} preprocessing"
    elif args.features == "random":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, name = Classifier(1), "random convolutions"
    else:
        network, name = load_classifier(args.features)
    digest = hashlib.sha256()  # of the numbers: the same ones come in several files
    for _, values in sorted(network.state_dict().items()):
        digest.update(values.numpy().tobytes())
    distance = {"inception": "FID", "random": "FD-random"}.get(args.features, "FD-classifier")
    return (
        network.eval().requires_grad_(False).to(here()),
        distance,
        f"{name}, weights {digest.hexdigest()[:12]}",
    )


# ======================================================================================================================
# Metrics


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64, from means (d,) and covariances (d, d): FID's formula.
    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2): no sqrtm, nothing
    imaginary, no epsilon.
    """
    mean1, cov1, mean2, cov2 = (
        torch.as_tensor(a, dtype=torch.float64) for a in (mean1, cov1, mean2, cov2)
    )
    values, vectors = torch.linalg.eigh(cov1)
    half = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(half.T @ cov2 @ half).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


class Moments:
    """Mean and covariance of features (B, d) that come in batches: float64 sums, nothing else is kept of them."""

    def __init__(self):
        self.count, self.sum, self.outer = 0, 0, 0

    def add(self, features):
        x = features.double()
        self.count, self.sum, self.outer = (
            self.count + len(x),
            self.sum + x.sum(dim=0),
            self.outer + x.T @ x,
        )

    def result(self):
        """-> mean (d,), covariance (d, d) with N - 1, of all processes' features; () on all but the first."""
        shares = [share for share in collect((self.count, self.sum, self.outer)) if share[0]]
        if not shares:
            return ()
        count, total, outer = map(sum, zip(*shares))
        return total / count, (outer - torch.outer(total, total) / count) / (count - 1)


def inception_score(logits, split=5000):
    """exp of the mean KL between p(y | x) and p(y), averaged over splits of 5,000 in the order given, as ADM has it.
    logits (N, 1008) of FID-Inception without bias. Samples sorted by class score far too low: shuffle them.
    """
    scores = []
    for part in logits.split(split):
        log_p = part.double().log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k=3, chunk=2048):
    """Improved precision and recall (Kynkaanniemi 2019) of features (N, d), (M, d), as ADM has them: the share of fakes
    inside some real's ball, and of reals inside some fake's, whose radius reaches the k-th nearest other of its kind.
    In fp32 throughout, in blocks of `chunk` rows; ADM's float16 distances move the published values by up to .002.
    """

    def blocks(points, centres):  # squared distances (chunk, N)
        norms = centres.square().sum(dim=1)
        for part in points.split(chunk):
            yield (
                torch.addmm(norms, part, centres.T, alpha=-2)
                .add_(part.square().sum(dim=1)[:, None])
                .clamp_(min=0)
            )

    def covered(points, centres):  # in its own ball's k + 1 nearest the centre is the first
        radius = torch.cat(
            [block.topk(k + 1, largest=False).values[:, -1] for block in blocks(centres, centres)]
        )
        return float(
            torch.cat([(block <= radius).any(dim=1) for block in blocks(points, centres)])
            .double()
            .mean()
        )

    real, fake = real.float(), fake.float()
    return covered(fake, real), covered(real, fake)


def psnr(x, y):
    """Per image of uint8 (B, 3, H, W): dB over all pixels and channels, peak 255; identical images have infinity."""
    mse = (x.double() - y.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / mse)


def ssim(x, y, data_range=None):
    """Per image of float (B, C, H, W): Gaussian window of 11 and sigma 1.5, reflected borders, mean over all pixels.
    data_range None takes each pair's own range, max of both images' max - min: torchmetrics' default on single images,
    which the paper's scoring script uses on unclamped [-1, 1]. The convention moves SSIM by up to .014: name it.
    """
    if data_range is None:
        data_range = torch.maximum(
            *(a.amax((1, 2, 3), True) - a.amin((1, 2, 3), True) for a in (x, y))
        )
    window = torch.exp(-(torch.arange(11, device=x.device) - 5.0).square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(x.shape[1], 1, -1)
    stack = F.pad(torch.cat([x, y, x * x, y * y, x * y]).float(), (5, 5, 5, 5), mode="reflect")
    for kernel in (window[..., None], window[..., None, :]):
        stack = F.conv2d(stack, kernel, groups=x.shape[1])
    mean_x, mean_y, xx, yy, xy = stack.chunk(5)
    var_x, var_y = (xx - mean_x.square()).clamp(min=0), (yy - mean_y.square()).clamp(min=0)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    return (similarity / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean(
        dim=(1, 2, 3)
    )


def nearest_distances(x, k, chunk=1024):
    """Distances (N, k), ascending, float64, of rows of x (N, d) to their k nearest others, exact duplicates dropped.
    Neighbours are found with fp32 matrix products, the winners' distances are then computed in float64.
    """
    x = torch.as_tensor(np.unique(np.asarray(x.cpu()), axis=0), device=x.device)
    if len(x) <= k:
        raise InputError(
            f"the intrinsic dimension needs more than {k} different points, not {len(x)}"
        )
    x = (x - x.mean(dim=0)).float()
    norms, result = x.square().sum(dim=1), []
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        distance = norms - 2 * part @ x.T  # (chunk, N), less its row's own norm
        distance[torch.arange(len(part)), torch.arange(start, start + len(part))] = math.inf
        index = distance.topk(k, largest=False).indices  # (chunk, k)
        exact = (part.double()[:, None] - x[index].double()).square().sum(dim=2).sqrt()
        result.append(exact.sort(dim=1).values)
    return torch.cat(result)


def two_nn(x, fraction=0.9):
    """TwoNN intrinsic dimension (Facco 2017, DADApy's variant, the paper's Appendix B) of points (N, d).
    The slope through the origin of -log(1 - F(mu)) against log mu, mu = r2 / r1, over the lower `fraction`. It grows
    with N: compare at equal N only.
    """
    distances = nearest_distances(x, 2)
    mu = (distances[:, 1] / distances[:, 0]).log().sort().values
    keep = int(fraction * len(mu))
    y = -torch.log1p(-torch.arange(1, keep + 1, dtype=torch.float64, device=mu.device) / len(mu))
    return float((mu[:keep] * y).sum() / mu[:keep].square().sum())


def mle_dimension(x, k=20):
    """Levina and Bickel's maximum-likelihood dimension of points (N, d), k neighbours, MacKay and Ghahramani's mean."""
    distances = nearest_distances(x, k)
    return float(1 / (distances[:, -1:] / distances[:, :-1]).log().mean())


# -------------------------------------------------- under torchrun each process scores its share, the first one reports
RANK, WORLD, LOCAL = (
    int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
)


def here():  # the device of this process
    return torch.device("cuda", LOCAL) if torch.cuda.is_available() else torch.device("cpu")


def collect(value):
    """The values of all processes, on the first one; nothing on the others."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD if RANK == 0 else None
    torch.distributed.gather_object(value, values)
    return values or []


def gather(columns):
    """{name: rows in parts}, "index" among them, of each process -> {name: (N, ...)} of all in the order of "index"."""
    columns = {
        name: torch.cat(columns.pop(name)) for name in list(columns)
    }  # pop: two copies of one column at most
    shares = [share for share in collect(columns) if share]
    if len(shares) < 2:
        return shares[0] if shares else {}
    order = torch.cat([share["index"] for share in shares]).argsort()
    return {
        name: torch.cat([share.pop(name) for share in shares])[order] for name in list(shares[0])
    }


def batches(data, args, count, label):
    """This process's share of the first `count` items of a dataset in batches, with a progress bar."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: at least 1")
    share = torch.utils.data.Subset(data, range(RANK, count, WORLD))
    with tqdm(total=len(share), desc=label, unit="image", mininterval=1, disable=RANK > 0) as bar:
        for batch in torch.utils.data.DataLoader(
            share, args.batch_size, num_workers=args.workers, pin_memory=torch.cuda.is_available()
        ):
            yield batch
            bar.update(len(batch[0]))


# ======================================================================================================================
# recon: one table row for every autoencoder                                                    (Tables 1, 5, 6, 7, 12)

SCORES, FORMS = ("PSNR", "SSIM", "LPIPS"), ("", "_centred", "_interior", "_border")
CONVENTIONS = {
    "images": "ADM's centre crop, reconstructions rounded to uint8",
    "PSNR": "per image on uint8, then the mean",
    "SSIM": "Gaussian 11, reflected, float [-1, 1] not clamped, each pair's own range",
    "LPIPS": "VGG16 v0.1 on [-1, 1], not clamped",
    "R": "mean over 90, 180, 270 degrees of the squared norm of tau E(x) - E(tau x), posterior means, over E(tau x)'s",
    "S": "the same over the scales 0.25, 0.50, 0.75",
    "R_centred": "R with the channels' means taken off E(tau x) in the denominator; so S_centred",
    "R_border": "the outer ceil(h / 8) cells of E(tau x) alone; R_interior: the others",
    "ID": "TwoNN on posterior means, exact duplicates dropped: of N_ID points",
    "ID_mle": "maximum likelihood with 20 neighbours on the same",
    "usage": "share of a VQ-GAN's codes taken at least once; dead: number of the others; perplexity: of their counts",
    "transforms": "distance between tau o x and D(tau o z), for each tau and the mean over rotations",
}


@torch.no_grad()
def recon(args):
    from eqloss import scale_transform
    from vae import Images, load_lpips, slot_noise, to_float, to_uint8
    from vqgan import decode, encode, load_model, use

    device, data = here(), Images(args.data, args.image_size)
    make_folder(Path(args.record or ".").parent)
    features, distance, extractor = load_features(args)
    distance = distance.replace("FID", "rFID")
    if args.vgg == "random":
        raise InputError("--vgg random: that would be no LPIPS; give VGG16's weights or --no-lpips")
    perceptual = None if args.no_lpips else load_lpips(args.vgg).to(device)
    count = min(args.num_images or len(data), len(data))
    models, taus, made = {}, {}, {}
    for path in args.checkpoints:
        name = Path(path).stem if Path(path).stem not in models else str(path)
        models[name] = load_model(path, args.model).to(device)
        made[name] = how_made(path, args.model, models[name].config)
        grid = models[name].grid(args.image_size)
        taus[name] = {
            f"R{90 * k}": scale_transform(1, grid, k, args.interpolation) for k in (1, 2, 3)
        }
        taus[name] |= {
            f"S{s:.2f}": scale_transform(s, grid, 0, args.interpolation) for s in (0.25, 0.5, 0.75)
        }

    # One pass: every image is read and cropped once, for all autoencoders
    columns, sums = {name: defaultdict(list) for name in models}, defaultdict(Moments)
    for images, _, index, passed in batches(data, args, count, "scoring"):
        index = index[passed == 0]  # an unreadable file is left out
        if not len(index):
            continue
        x = to_float(images[passed == 0], device)  # (b, 3, H, W)
        real = to_uint8(x)
        sums["real"].add(features(real)[0])
        for name, model in models.items():
            mean, std = encode(model, x)  # (b, c, h, w) each
            z = (
                mean + std * slot_noise(mean, args.seed, "recon", index)
                if args.latent == "sample"
                else mean
            )
            decoded = decode(model, z)
            if not decoded.isfinite().all():
                raise InputError(
                    f"{name}: a reconstruction of the images {index.tolist()} is not finite"
                )
            fake = to_uint8(decoded)
            sums[name].add(features(fake)[0])
            row = dict(
                index=index, latents=mean.flatten(1), PSNR=psnr(real, fake), SSIM=ssim(x, decoded)
            )
            if perceptual:
                row["LPIPS"] = perceptual(x, decoded).flatten()
            if hasattr(model, "quantize"):
                row["tokens"] = model.quantize.nearest(mean)
            for kind, tau in taus[name].items():  # Appendix C.3; the parts of the centred
                target, _ = encode(model, tau(x))  # error are put together at the end
                error, norm = (
                    (tau(mean) - target).square().sum(dim=1),
                    target.square().sum(dim=1),
                )  # (b, h2, w2)
                edge = -(-target.shape[2] // 8)
                inner = [part[:, edge:-edge, edge:-edge].sum(dim=(1, 2)) for part in (error, norm)]
                row[kind] = torch.stack(
                    [error.sum(dim=(1, 2)), norm.sum(dim=(1, 2)), *inner], dim=1
                )  # (b, 4)
                row[kind + " mean"] = target.mean(dim=(2, 3))  # (b, c)
                if args.transforms:  # Fig. 3
                    sums[name, kind, "real"].add(features(to_uint8(tau(x)))[0])
                    sums[name, kind, "fake"].add(features(to_uint8(decode(model, tau(z))))[0])
            for key, values in row.items():
                columns[name][key].append(values.cpu())

    def mean_of(values):  # what is infinite or undefined in one image would hide all others
        return float(values.double()[values.isfinite()].mean())

    results = {}
    for name, model in models.items():
        pairs = {distance: ("real", name)} | {
            f"{distance} {kind}": ((name, kind, "real"), (name, kind, "fake"))
            for kind in taus[name]
            if args.transforms
        }
        sides = {
            key: [part for side in pair for part in sums[side].result()]
            for key, pair in pairs.items()
        }
        scores = gather(columns[name])
        if RANK:
            continue
        latents = scores.get("latents", ())  # (N, c h w)
        if len(latents) < 4:
            raise InputError(f"--data {args.data}: fewer than 4 readable images, too few to score")
        result = {"N": len(latents), "unreadable": count - len(latents)}
        result |= {key: frechet_distance(*parts) for key, parts in sides.items()}
        result |= {key: mean_of(scores[key]) for key in SCORES if key in scores}
        if "tokens" in scores:
            counts = torch.bincount(scores["tokens"].flatten(), minlength=model.config["n_embed"])
            result |= dict(
                zip(("usage", "perplexity"), map(float, use(counts))), dead=int((counts == 0).sum())
            )
        for kind, tau in taus[name].items():
            (error, norm, inner, inner_norm), mean = (
                scores[kind].double().T,
                scores[kind + " mean"].double(),
            )
            cells, centre = tau.size[0] * tau.size[1], mean.mean(dim=0)
            spread = norm - cells * (
                2 * mean @ centre - centre.square().sum()
            )  # |E(tau x) - centre|^2
            parts = (
                (error, norm),
                (error, spread),
                (inner, inner_norm),
                (error - inner, norm - inner_norm),
            )
            result |= {kind + form: mean_of(a / b) for form, (a, b) in zip(FORMS, parts)}
        for kind, form in itertools.product(
            "RS", (*("{}" + form for form in FORMS), distance + " {}")
        ):
            parts = [
                result.get(form.format(one), math.nan) for one in taus[name] if one.startswith(kind)
            ]
            result[form.format(kind)] = sum(parts) / len(parts)
        result |= {"ID": two_nn(latents.to(device)), "N_ID": len(latents.unique(dim=0))}
        result["ID_mle"] = mle_dimension(latents.to(device)) if result["N_ID"] > 20 else math.nan
        channels = (
            latents.unflatten(1, (-1, math.prod(model.grid(args.image_size))))
            .transpose(0, 1)
            .flatten(1)
        )
        result |= dict(
            latent_mean=channels.mean(dim=1).tolist(), latent_std=channels.std(dim=1).tolist()
        )
        results[name] = {
            key: value for key, value in result.items() if value == value
        }  # without NaN
    keys = [
        key
        for key in (distance, *SCORES, "R", "S", "ID", "usage")
        if any(key in r for r in results.values())
    ]
    rows = [[name, *(show(result.get(key)) for key in keys)] for name, result in results.items()]
    print(*table([f"N = {thousands(count)}", *keys], rows), sep="\n")
    write_record(
        args,
        results,
        autoencoders=made,
        extractor=extractor,
        conventions=dict(CONVENTIONS, latent=args.latent, interpolation=args.interpolation),
    )


def how_made(path, model, config):
    """What tells an autoencoder's row in the paper's tables: hash, preset, step, arguments of a training of ours."""
    import vae
    import vqgan

    checkpoint, configs = (
        read_weights(path) if str(path).endswith(".pt") else {},
        vqgan if "n_embed" in config else vae,
    )
    given = checkpoint.get("args", {}) if "arch" in checkpoint else {}
    while (
        given.get("train") == "decoder"
        and str(given["init"]).endswith(".pt")
        and os.path.isfile(given["init"])
    ):
        given = read_weights(given["init"]).get(
            "args", {}
        )  # a refit of the decoder: named as before
    kept = {
        key: given[key]
        for key in ("init", "tau", "p_alpha", "explicit_weight", "stop_gradient")
        if key in given
    }
    model = (
        given.get("model")
        or model
        or next(iter(vae.presets(config, configs.CONFIGS)), Path(path).stem)
    )
    return dict(
        kept,
        model=model,
        sha256=file_hash(path),
        file=str(path),
        step=checkpoint["step"] if given else None,
    )


def file_hash(path):
    """SHA-256 of a file, or of all the files in a folder of diffusers'."""
    digest = hashlib.sha256()
    for part in sorted(p for p in Path(path).rglob("*") if p.is_file()) or [path]:
        with open(part, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror})") from None


def write_record(args, results, **about):
    """The results with all that is needed to run them again, as JSON."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else ", ".join(
            (
                platform.processor() or platform.machine(),
                torch.backends.cpu.get_cpu_capability(),
                f"{os.cpu_count()} cores",
            )
        )
    )
    about.update(
        command=["evaluate.py", *sys.argv[1:]],
        seed=args.seed,
        device=device,
        threads=torch.get_num_threads(),
        versions=dict(
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__
        ),
        date=time.strftime("%Y-%m-%d"),
    )
    if args.record and not RANK:
        Path(args.record).write_text(json.dumps(dict(results, about=about), indent=1) + "\n")


# ======================================================================================================================
# samples: a generator's pictures beside a reference, by ADM's protocol                     (Tables 2, 3, 4, 9, 10, 11)


def read_npz(path, keys):
    """{key: array} for those of `keys` that the npz has; pictures (arr_0) are mapped from disk, never copied whole."""
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in keys if key in file and key != "arr_0"}
            if "arr_0" in file and "arr_0" in keys:
                arrays["arr_0"] = map_member(path, file.zip, file.zip.getinfo("arr_0.npy"))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read as npz ({type(error).__name__}: {error})"
        ) from None
    return arrays


def map_member(path, archive, item):
    """The array of a member of an npz, memory-mapped in its place; a compressed one is unpacked to a nameless file."""
    with archive.open(item) as member:
        major, _ = np.lib.format.read_magic(member)
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(member)
        if item.compress_type != zipfile.ZIP_STORED:
            unpacked = tempfile.TemporaryFile()
            shutil.copyfileobj(member, unpacked, 1 << 20)
            return np.memmap(unpacked, dtype, "r", 0, shape, "F" if fortran else "C")
        archive.fp.seek(
            item.header_offset + 26
        )  # the local header's own lengths of name and extra field
        name, extra = np.frombuffer(archive.fp.read(4), "<u2")
        start = item.header_offset + 30 + int(name) + int(extra) + member.tell()
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


class Pictures(torch.utils.data.Dataset):
    """What `samples` scores: ADM's npz (`rows`: its arr_0), a folder, or "emoji". Items: (uint8 (3, H, W), index).
    size None: samples, lossless and of one size. Or the size of the samples to be the reference of, to which other
    pictures come by ADM's centre crop; JPEG is taken with a warning."""

    def __init__(self, path, size=None, rows=None):
        self.exact, self.size = size is None, size
        if str(path).endswith(".npz"):
            self.files = (
                read_npz(path, ("arr_0",)).get("arr_0", np.empty(0)) if rows is None else rows
            )
            if self.files.dtype != np.uint8 or self.files.ndim != 4 or self.files.shape[3] != 3:
                raise InputError(
                    f"{path}: no pictures, arr_0, uint8 (N, H, W, 3); nor statistics of this extractor"
                )
        elif path in ("emoji", "emoji-val"):
            from vae import emoji

            self.files = emoji(held_out=path == "emoji-val")[0]
        else:
            endings = {
                ending
                for ending, kind in Image.registered_extensions().items()
                if kind in Image.OPEN
            }
            self.files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in endings)
            if not self.files:
                raise InputError(f"{path}: no such file, or no images in this folder")
            if any(p.suffix.lower() in (".jpg", ".jpeg", ".webp") for p in self.files):
                if self.exact:
                    raise InputError(
                        f"{path}: JPEG loses what the metrics see; score lossless samples, PNG or npz"
                    )
                print(
                    f"{path}: JPEG pictures, whose artefacts count as the reference's",
                    file=sys.stderr,
                )
        if self.exact:
            self.size = self.open(0).size

    def open(self, index):
        file = self.files[index]
        try:
            return (
                Image.fromarray(file)
                if isinstance(file, np.ndarray)
                else file
                if isinstance(file, Image.Image)
                else Image.open(file)
            ).convert("RGB")
        except Exception as error:  # whatever Pillow's many readers raise
            raise InputError(f"{file}: cannot be read ({type(error).__name__})") from None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = self.open(index)
        if isinstance(self.files, np.memmap) and hasattr(
            mmap, "MADV_DONTNEED"
        ):  # or it counts as memory of ours
            self.files._mmap.madvise(mmap.MADV_DONTNEED)
        if image.size != self.size:
            if self.exact or isinstance(self.files, np.ndarray):
                raise InputError(
                    f"mixed sizes: the first of the samples has {self.size} pixels, but "
                    f"{self.files[index] if self.exact else 'the reference'} {image.size}"
                )
            from vae import center_crop

            image = center_crop(image, self.size[::-1])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), index


STATISTICS = (
    "mu",
    "sigma",
    "mu_s",
    "sigma_s",
)  # ADM's names: of pooled features, of spatial features


def describe(path, args, network, distance, extractor, size=None):
    """One side of the comparison -> dict(mu, sigma[, mu_s, sigma_s][, features (N, d)][, logits][, N], size), on the
    first process. Statistics stored in an npz win over its pictures', as in ADM: they are of the whole data set."""
    keys = (*STATISTICS, "features", "extractor", "N", "arr_0")
    side = read_npz(path, keys) if str(path).endswith(".npz") else {}
    rows = side.pop("arr_0", None)
    if str(side.get("extractor", extractor)) != extractor:
        raise InputError(
            f"{path}: statistics of another extractor ({side['extractor']}), not of {extractor}"
        )
    if "extractor" not in side and distance != "FID":  # ADM's statistics are FID-Inception's
        side = {key: side[key] for key in side if key not in STATISTICS}
    if rows is None and "mu" in side:
        return side
    pictures = Pictures(path, size, rows)
    if len(pictures) < max(4, WORLD):
        raise InputError(f"{path}: fewer than four pictures, or than processes")
    columns, sums = defaultdict(list), defaultdict(Moments)
    for images, index in batches(pictures, args, len(pictures), Path(path).stem):
        outputs = dict(
            zip(("features", "spatial", "logits"), network(images.to(here()))), index=index
        )
        if not outputs["features"].isfinite().all():
            raise InputError(f"{path}: features that are not finite")
        for name, pair in (("features", STATISTICS[:2]), ("spatial", STATISTICS[2:])):
            if name in outputs and pair[0] not in side:
                sums[pair].add(outputs[name])
        for name in outputs.keys() - {"spatial"}:
            columns[name].append(outputs[name].cpu())
    for pair, total in sums.items():
        side.update(zip(pair, (part.cpu() for part in total.result())))
    return dict(side, N=len(pictures), size=pictures.size, **gather(columns))


@torch.no_grad()
def samples(args):
    for path in (args.record, args.save_stats):
        make_folder(Path(path or ".").parent)
    network, distance, extractor = load_features(args, "adm")
    fake = describe(args.samples, args, network, distance, extractor)
    real = describe(args.reference, args, network, distance, extractor, fake.get("size"))
    if RANK:
        return
    if args.save_stats:
        kept = {key: np.asarray(real[key]) for key in (*STATISTICS, "features") if key in real}
        np.savez(args.save_stats, N=real.get("N", 0), extractor=extractor, **kept)
    result = {"N": int(fake.get("N", 0)), "N reference": int(real.get("N", 0))}
    for name, keys in ((distance, STATISTICS[:2]), ("s" + distance, STATISTICS[2:])):
        if keys[0] in fake and keys[0] in real:
            result[name] = frechet_distance(
                *(torch.as_tensor(side[key]).to(here()) for side in (fake, real) for key in keys)
            )
    if "logits" in fake:
        logits = fake["logits"]
        runs = (logits[1:].argmax(dim=1) == logits[:-1].argmax(dim=1)).double().mean()
        if args.shuffle:
            logits = logits[
                torch.randperm(len(logits), generator=torch.Generator().manual_seed(args.seed))
            ]
        elif runs > 0.5:
            print(
                f"{args.samples}: sorted by class? Then IS (5,000 in a row) is too low: --shuffle",
                file=sys.stderr,
            )
        result["IS"] = inception_score(logits)
    if distance == "FID" and "features" in fake and "features" in real:
        sides = (torch.as_tensor(side["features"]).to(here()) for side in (real, fake))
        result["Precision"], result["Recall"] = precision_recall(*sides)
    if distance == "FID" and result["N"] < 2048:
        print(
            f"{args.samples}: {result['N']:,} pictures: below 2,048 FID says little",
            file=sys.stderr,
        )
    print(
        f"{args.samples}:",
        *(f"{key}-{thousands(result['N'])} {result[key]:.4g}" for key in result if key[0] != "N"),
    )
    settings = Path(args.samples).with_suffix(
        ".json"
    )  # how they were drawn, where our samplers wrote it
    write_record(
        args,
        {Path(args.samples).stem: result},
        extractor=extractor,
        samples=str(args.samples),
        hashes={
            str(path): file_hash(path)
            for path in (args.samples, args.reference)
            if os.path.isfile(path)
        },
        drawn=json.loads(settings.read_text()) if settings.is_file() else {},
    )


# ------------------------------------------------------------------------------ records, and the paper's names for them
FAMILIES = {
    "sd": "SD-VAE",
    "sdxl": "SDXL-VAE",
    "sd3": "SD3-VAE",
    "sd-16": "SD-VAE-16",
    "f16-1024": "VQ-GAN",
}


def paper_name(made):
    """The name of an autoencoder in results/paper.md, from how_made()."""
    name = FAMILIES.get(made["model"], made["model"]) + "-FT-EMA" * ("ft-ema" in made["file"])
    if "p_alpha" not in made or made["p_alpha"] == 1 and made["init"] == "scratch":
        return name
    if made.get("explicit_weight"):
        return name + " + explicit" + " (stop-gradient)" * made["stop_gradient"]
    kind = {"rs": "", "r": " (R)", "s": " (S)", "rs-aniso": " (R, sx sy)"}[made["tau"]]
    share = "" if made["p_alpha"] == 0.5 else f" (p_alpha {made['p_alpha']:g})"
    return name + (" + Eq. 1" if made["p_alpha"] == 1 else " + EQ" + kind + share)


def thousands(n):  # 50k, 1.5M: of exactly that many
    return (
        f"{n / 1e6:g}M"
        if n >= 1e6 and n % 1e5 == 0
        else f"{n // 1000}k"
        if n and n % 1000 == 0
        else str(n)
    )


def distance_of(scores):
    """-> (the Frechet distance's name, its value): FID, or another where other features were taken."""
    return next(
        (key, scores[key]) for key in ("rFID", "FID", "FD-classifier", "FD-random") if key in scores
    )


def read_records(paths):
    """Records -> (arms, runs): of each autoencoder its scores, its paper_name() and what made it; of each generator, by
    arm and step, its scores, its name and step ("*": guided), and its arm, known by hash, or by the samples' name."""
    arms, runs = [], []
    for path in paths:
        try:
            record = json.loads(Path(path).read_text())
            about = record.pop("about")
            for stem, scores in record.items():
                row = dict(stem=stem, scores=scores, about=about)
                if "autoencoders" in about:
                    arms.append(
                        about["autoencoders"][stem]
                        | row
                        | dict(name=paper_name(about["autoencoders"][stem]))
                    )
                else:
                    drawn = about["drawn"] or dict(
                        step=0, cfg_scale=1, model=stem, autoencoder=None
                    )
                    step = drawn["step"] or 0  # an official file does not say it
                    name = f"{drawn['model']} {thousands(step)}{'*' * (drawn['cfg_scale'] != 1)}"
                    runs.append(dict(row, step=step, generator=name, sha256=drawn["autoencoder"]))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path}: no record of `recon` or `samples` ({type(error).__name__}: {error})"
            ) from None
    for run in runs:
        same = "sha256" if run["sha256"] else "stem"
        run["arm"] = next((arm for arm in arms if arm[same] == run[same]), None)
        run["name"] = run["arm"]["name"] if run["arm"] else f"autoencoder {str(run['sha256'])[:8]}"
    return arms, sorted(
        runs, key=lambda run: (arms.index(run["arm"]) if run["arm"] else len(arms), run["step"])
    )


# ======================================================================================================================
# figures: of checkpoints the latents as pictures (Fig. 1 left) and what they decode to when transformed (Fig. 2, 6); of
# records the distances under transforms (Fig. 3), over the generator's steps (Fig. 1 right, 4) and the fine-tune's (5)


@torch.no_grad()
def figures(args):
    arms, runs = read_records(args.records)
    out = Path(args.out)
    make_folder(out)
    made = [
        *(latent_figures(args, out) if args.checkpoints else ()),
        *record_figures(arms, runs, out),
    ]
    if not made:
        raise InputError(
            "figures: nothing to draw: give checkpoints (Fig. 1 left, 2), --records (Fig. 1, 3 to 5)"
        )
    print(f"figures in {out}/: {', '.join(made)}")


def latent_figures(args, out):
    from eqloss import scale_transform
    from vae import Images, to_float, to_uint8
    from vqgan import decode, encode, load_model

    data = Images(args.data, args.image_size)
    x, many = (
        to_float(
            torch.stack([data[i * len(data) // n][0] for i in range(n)]), here()
        )  # shown; PCA's
        for n in (min(count, len(data)) for count in (args.num_images or 8, 256))
    )
    titles = {
        "fig1-latents": "The latents' three principal components as colours (Fig. 1)",
        "fig2-scale": "Transformed before encoding, and as a latent: half the size (Fig. 2)",
        "fig2-rotation": "Transformed before encoding, and as a latent: turned by 180 degrees (Fig. 2)",
    }
    rows = {name: [] for name in titles}

    def add(name, label, images):
        cell = max(args.image_size) * max(1, 96 // max(args.image_size))
        rows[name].append(
            (label, magnified(images if images.dtype == torch.uint8 else to_uint8(images), cell))
        )

    add("fig1-latents", "images", x)
    for k, path in enumerate(args.checkpoints):
        model, arm = load_model(path, args.model).to(here()), Path(path).stem
        grid, z = model.grid(args.image_size), encode(model, x)[0]
        sample = torch.cat([encode(model, part)[0] for part in many.split(32)])
        add("fig1-latents", f"{arm}: latents", principal_colours(z, sample))
        for name, tau in zip(
            list(rows)[1:], (scale_transform(0.5, grid), scale_transform(1, grid, 2))
        ):
            if k == 0:
                add(name, "tau o x", tau(x))
            add(name, f"{arm}: D(E(tau o x))", decode(model, encode(model, tau(x))[0]))
            add(name, f"{arm}: D(tau o E(x))", decode(model, tau(z)))
    for name in titles:
        panel(titles[name], rows[name]).save(out / f"{name}.png")
    return [f"{name}.png" for name in titles]


def principal_colours(z, sample):
    """Latents z (N, c, h, w) -> uint8 (N, 3, h, w): projections on `sample`'s three principal axes, 1st to 99th
    percentile as 0..255. Fitted per autoencoder, so colours mean nothing across autoencoders."""
    points = sample.transpose(0, 1).flatten(1).double()  # (c, N h w)
    centre = points.mean(dim=1, keepdim=True)
    axes = (
        torch.linalg.eigh(torch.cov(points)).eigenvectors.flip(1)[:, :3].T
    )  # (3, c), largest first
    axes = (
        axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    )  # eigenvectors have no sign
    low, high = np.percentile((axes @ (points - centre)).cpu(), (1, 99), axis=1)[..., None, None]
    projected = torch.einsum("kc,nchw->nkhw", axes, z.double() - centre[..., None]).cpu().numpy()
    return torch.from_numpy(
        ((projected - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)
    )


def over_seeds(points):
    """[(x, value), ...] -> [(x, mean, standard deviation or 0), ...]: values at one x are several seeds'."""
    values = {x: [value for at, value in points if at == x] for x, _ in sorted(points)}
    return [(x, np.mean(found), np.std(found, ddof=len(found) > 1)) for x, found in values.items()]


def speed_up(base, other):
    """How many times as fast `other` comes to a distance that both reach, the greater of their last; both are [(step,
    distance, ...), ...], straight between the points. A bound where one is there from its first point on."""
    goal = max(base[-1][1], other[-1][1])

    def steps(points):
        for (step, value, *_), (later, lower, *_) in zip(points, points[1:]):
            if value > goal >= lower:
                return step + (later - step) * (value - goal) / (value - lower)
        return points[0][0]

    return steps(base) / steps(other)


def record_figures(arms, runs, out):
    """Fig. 3, 1 right, 5 and 4, as far as the records go; -> the names of the files."""
    kinds = {"S0.75": "s = .75", "S0.50": "s = .50", "S0.25": "s = .25", "R": "rotations"}
    bars, over, tuned, made, rows = {}, defaultdict(list), defaultdict(list), [], []
    for arm in arms:
        distance, _ = distance_of(arm["scores"])
        if f"{distance} R" in arm["scores"]:
            bars[arm["stem"]] = [
                (i, arm["scores"][f"{distance} {kind}"]) for i, kind in enumerate(kinds)
            ]
    for run in runs:
        distance, value = distance_of(run["scores"])
        over[run["name"]].append((run["step"], value))
        if run["arm"] and run["arm"]["step"] is not None:
            tuned[run["generator"]].append((run["arm"]["step"], value))
    for name, x, lines in (
        ("fig3-transforms.png", "", bars),
        ("fig1-curves.png", "generator's step", over),
        ("fig5-fine-tuning.png", "autoencoder's step", tuned),
    ):
        lines = {
            label: over_seeds(points)
            for label, points in lines.items()
            if len({x for x, _ in points}) > 1
        }
        if not lines:
            continue
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise InputError(
                f"{name}: curves and bars need a package: pip install matplotlib"
            ) from None
        figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
        axes = figure.add_subplot(title=f"Fig. {name[3]}", xlabel=x, ylabel=distance)
        for k, (label, points) in enumerate(lines.items()):
            if x:
                axes.errorbar(*zip(*points), fmt="o-", capsize=4, label=label)
            else:
                at = [i + 0.8 * (k + 0.5) / len(lines) - 0.4 for i in range(len(kinds))]
                axes.bar(at, [value for _, value, _ in points], 0.8 / len(lines), label=label)
                axes.set_xticks(range(len(kinds)), kinds.values())
        if name == "fig1-curves.png" and len(lines) > 1:
            axes.set_title(
                f"{list(lines)[1]}: {speed_up(*[*lines.values()][:2]):.2g} times as fast (Fig. 1)"
            )
        axes.legend()
        figure.savefig(out / name)
        made.append(name)
    for run in runs:
        label = f"{run['name']}: {run['generator']}"
        if label not in dict(rows) and os.path.exists(
            run["about"]["samples"]
        ):  # of several seeds the first
            drawn = Pictures(run["about"]["samples"])
            first = torch.stack([drawn[i][0] for i in range(min(8, len(drawn)))])
            rows.append((label, magnified(first, max(96, *first.shape[2:]))))
    if rows:
        panel("Samples of each generator, from the same noise and labels (Fig. 4)", rows).save(
            out / "fig4-samples.png"
        )
        made.append("fig4-samples.png")
    return made


def magnified(images, cell):
    """uint8 (N, 3, h, w) -> PIL images, magnified by whole pixels to at most `cell` on the longer side."""
    factor = max(1, cell // max(images.shape[-2:]))
    return [
        Image.fromarray(a).resize(
            (a.shape[1] * factor, a.shape[0] * factor), Image.Resampling.NEAREST
        )
        for a in images.permute(0, 2, 3, 1).cpu().numpy()
    ]


def panel(title, rows, margin=4, left=190, top=34):
    """Rows of (label, PIL images) under a title, as one PIL image."""
    heights = [max(p.height for p in row) + margin for _, row in rows]
    width = left + max(sum(p.width + margin for p in row) for _, row in rows)
    canvas = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), title, "black", ImageFont.load_default(17))
    for (label, row), height in zip(rows, heights):
        draw.text(
            (8, top + height // 2 - 18),
            label.replace(": ", ":\n"),
            "black",
            ImageFont.load_default(15),
        )
        for k, picture in enumerate(row):
            canvas.paste(picture, (left + sum(p.width + margin for p in row[:k]), top))
        top += height
    return canvas


# ======================================================================================================================
# report: a page from records, the paper's tables beside


def table(header, rows):
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def show(value):
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def paper_tables(path, arms, runs):
    """The Markdown of results/paper.md with "ours" beside each figure; tables of which nothing was run are named in one
    line. Several records of one row are its seeds: mean, standard deviation and their number."""

    def ours(name, generator, column):
        generated = column in ("gFID", "sFID", "IS", "Precision", "Recall")
        found = [
            one["scores"]
            for one in (runs if generated else arms)
            if one["name"] == name and (not generated or one["generator"] == generator)
        ]
        key = distance_of(found[0])[0] if found and column in ("gFID", "rFID") else column
        values = [scores[key] for scores in found if key in scores]
        if not values:
            return "not run"
        spread = f" ± {np.std(values, ddof=1):.2g} ({len(values)} seeds)" if len(values) > 1 else ""
        return show(float(np.mean(values))) + spread + f" ({key})" * key.startswith("FD")

    lines, unused = [], []
    for part in (path.read_text() if path.exists() else "").split("\n## ")[1:]:
        title, _, header, _, *rows = part.strip().splitlines()
        header, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)
        )
        keys = 1 + ("generator" in header)  # the columns that say which row it is
        rows = [
            row[:keys]
            + [
                cell
                for column, value in zip(header[keys:], row[keys:])
                for cell in (value, ours(row[0], row[1], column))
            ]
            for row in rows
        ]
        if all(cell == "not run" for row in rows for cell in row[keys + 1 :: 2]):
            unused.append(title.partition(":")[0].removeprefix("Table "))
        else:
            header[keys:] = [
                cell for column in header[keys:] for cell in (f"{column}, paper", "ours")
            ]
            lines += [f"## {title}", "", *table(header, rows), ""]
    return [
        *lines,
        f"Of the paper's tables nothing was run for {', '.join(unused)}." if unused else "",
        "",
    ]


def report(args):
    arms, runs = read_records(args.records)
    if not arms:
        raise InputError("report: none of these is a record of `recon`")
    columns = [
        dict(
            arm["scores"],
            **{
                f"{run['generator']}: {key}": value
                for run in runs
                if run["arm"] is arm
                for key, value in run["scores"].items()
            },
        )
        for arm in arms
    ]
    first = {*CONVENTIONS, "S_centred", "N", distance_of(columns[0])[0]}
    rows = [
        [key, *(show(column.get(key)) for column in columns), CONVENTIONS.get(key, "")]
        for key in dict.fromkeys(key for column in columns for key in column)
        if ":" in key or key in first
    ]
    lines = [
        "# EQ-VAE",
        "",
        *table(["", *(arm["stem"] for arm in arms), "what"], rows),
        "",
        *paper_tables(Path(__file__).with_name("results") / "paper.md", arms, runs),
    ]
    for path in sorted(Path(args.figures).glob("fig*.png")) if args.figures else ():
        lines += [f"![{path.stem}]({os.path.relpath(path, Path(args.out).parent)})", ""]
    lines += [
        f"Commands, seeds, hashes, conventions, versions and devices: {', '.join(map(str, args.records))}.",
        "",
    ]
    make_folder(Path(args.out).parent)
    Path(args.out).write_text("\n".join(lines))
    print(args.out)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def image_size(text):
        return tuple(int(side) for side in f"{text}x{text}".split("x")[:2])

    def command(run, help, *parents):
        command = commands.add_parser(run.__name__, parents=parents, help=help)
        command.set_defaults(run=run)
        command.print_usage = lambda file=None: None  # errors in one line
        return command

    latents, scores = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    latents.add_argument(
        "--data", default="data/imagenet/val", help="folder of images, or emoji | emoji-val"
    )
    latents.add_argument(
        "--image-size", type=image_size, default=(256, 256), help="256, or 384x256 (height x width)"
    )
    latents.add_argument("--model", help="preset of files that do not say it: sd, sdxl, sd3, sd-16")
    latents.add_argument(
        "--num-images", type=int, help="recon: score the first N; figures: show N (8)"
    )
    scores.add_argument("--inception", help="FID-Inception's weights (default: torch hub's)")
    scores.add_argument(
        "--features", default="inception", help="inception, random, or a file of `classifier`"
    )
    scores.add_argument("--batch-size", type=int, default=64)
    scores.add_argument(
        "--workers", type=int, default=8 * torch.cuda.is_available(), help="of data loading"
    )
    scores.add_argument("--seed", type=int, default=0)
    scores.add_argument("--record", help="JSON file to write")
    of = command(recon, "reconstruction, equivariance, intrinsic dimension", latents, scores)
    of.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    of.add_argument(
        "--latent", choices=("sample", "mean"), default="sample", help="what is decoded"
    )
    of.add_argument(
        "--interpolation",
        choices=("bicubic-antialias", "bicubic", "bilinear"),
        default="bicubic-antialias",
        help="of tau in R and S, see eqloss.py",
    )
    of.add_argument("--vgg", help="VGG16's weights for LPIPS (default: torch hub's)")
    of.add_argument("--no-lpips", action="store_true")
    of.add_argument("--transforms", action="store_true", help="also the distances of Fig. 3")
    of = command(samples, "a generator's samples: FID, sFID, IS, precision, recall", scores)
    of.add_argument("samples", metavar="SAMPLES", help="npz with arr_0, or a folder of PNG")
    of.add_argument(
        "reference", metavar="REFERENCE", help="ADM's npz, --save-stats' npz, a folder, or emoji"
    )
    of.add_argument("--shuffle", action="store_true", help="before the inception score's splits")
    of.add_argument("--save-stats", help="npz to write the reference's statistics and features to")
    of = command(classifier, "trains a second extractor on labelled images")
    of.add_argument("--data", required=True, help="folder of class folders, or emoji")
    of.add_argument("--image-size", type=image_size, default=(64, 64))
    of.add_argument("--out", required=True, help="file to write")
    of.add_argument("--steps", type=int, default=1500)
    of.add_argument("--batch-size", type=int, default=64)
    of.add_argument("--seed", type=int, default=0)
    of = command(figures, "Fig. 1 to 6, as far as what is given goes", latents)
    of.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="for Fig. 1 left, 2 and 6")
    of.add_argument("--records", nargs="*", default=[], help="for Fig. 1 right, 3, 4 and 5")
    of.add_argument("--out", default="figures", help="folder")
    of = command(report, "a page from records, the paper's tables beside")
    of.add_argument("records", nargs="+", metavar="RECORD")
    of.add_argument("--figures", help="folder of `figures`")
    of.add_argument("--out", default="report.md", help="Markdown file to write")
    parser.print_usage = lambda file=None: None
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # metrics are computed in fp32
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")  # what is collected lies on the CPU
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    try:
        args.run(args)
    except ValueError as error:
        if type(error).__name__ != "InputError":  # ours, or vae.py's where that is used
            raise
        print(
            "evaluate.py:", str(error).rpartition("InputError: ")[2], file=sys.stderr
        )  # less a worker's traceback
        raise SystemExit(2) from None
    finally:
        if WORLD > 1:  # as in vae.py, without the interpreter's own ending
            torch.distributed.destroy_process_group()
            sys.stdout.flush()
            os._exit(0) if sys.exc_info()[0] is None else None


if __name__ == "__main__":
    main()
