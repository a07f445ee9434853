"""Scores autoencoders as the EQ-VAE paper does (https://arxiv.org/abs/2502.09509), and draws its figures.

    python evaluate.py recon standard.pt eq.pt --data data/imagenet/val --record recon.json       # Tables 1 and 12
    python evaluate.py figures standard.pt eq.pt --data data/imagenet/val --out figures/          # Fig. 1 left, Fig. 2
    python evaluate.py report recon.json --figures figures/ --out report                          # report.md .json .png

`recon` passes over the images once, on a GPU where there is one, and writes no pictures to disk. FID needs
FID-Inception's weights (--inception FILE, torch hub's cache or the network); --features random works anywhere.
The networks and metrics of this file need nothing of the other files, so that it can be copied by itself.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sys
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
# Feature extractors: FID's Inception-v3, and a random network for where its weights cannot be had

class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU; fold() merges the first two, for speed."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))

    @torch.no_grad()
    def fold(self):
        gain = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        self.conv.weight *= gain[:, None, None, None]
        self.conv.bias = nn.Parameter(self.bn.bias - self.bn.running_mean * gain)
        self.bn = nn.Identity()

class Mixed(nn.Module):
    """An Inception block. `branches` are chains of (name, channels, kernel[, stride]); a list of two forks its end.

    pool: "average" and "max" keep the size and are followed by `branch_pool` of pool_channels; "down" halves it, as
    does every unit marked with stride 2. FID's graph differs from torchvision's: average pools do not count their
    padding, and the last block's pool is a max pool.
    """

    def __init__(self, c_in, branches, pool, pool_channels=0):
        super().__init__()
        self.chains, self.pool = [], pool
        for branch in branches:
            chain, width = [], c_in
            for group in branch:
                group = group if isinstance(group, list) else [group]
                for name, c_out, kernel, *stride in group:
                    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
                    padding = (0, 0) if stride else (kernel[0] // 2, kernel[1] // 2)
                    self.add_module(name, Unit(width, c_out, kernel, *(stride or [1]), padding))
                width = group[-1][1]
                chain.append([name for name, *_ in group])
            self.chains.append(chain)
        if pool_channels:
            self.branch_pool = Unit(c_in, pool_channels, 1)

    def forward(self, x):
        parts = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            parts.append(h)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, **(dict(stride=2) if self.pool == "down" else dict(stride=1, padding=1)))
        return torch.cat([*parts, self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled], dim=1)

def mixed_5(c_in, pool_channels):                                              # 35 x 35
    return Mixed(c_in, [[("branch1x1", 64, 1)],
                        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]],
                 "average", pool_channels)

def mixed_6(c):                                                                # 17 x 17
    return Mixed(768, [[("branch1x1", 192, 1)],
                       [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                       [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
                        ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))]], "average", 192)

def mixed_7(c_in, pool):                                                       # 8 x 8
    return Mixed(c_in, [[("branch1x1", 320, 1)],
                        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
                        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                         [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]]], pool, 192)

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
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3, 2)],
                                    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3),
                                     ("branch3x3dbl_3", 96, 3, 2)]], "down")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (mixed_6(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                                    [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                                     ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)]], "down")
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "average"), mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            try:
                self.load_state_dict({k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")})
            except RuntimeError as error:
                raise InputError(f"not FID-Inception's weights: {' '.join(str(error).split())[:200]}") from None
        for module in self.modules():
            if isinstance(module, Unit):
                module.fold()
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pooled (B, 2048), spatial (B, 2023) for sFID, logits without bias (B, 1008)."""
        x = images.float()
        if self.preprocess == "adm":
            rows, columns = (tf1_bilinear(side, 299).to(x) for side in x.shape[-2:])
            x = (rows @ x @ columns.T - 128) / 128                             # (B, 3, 299, 299)
        else:
            x = F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))      # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))      # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2)))) # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))      # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                      # H, W, C order: ADM's files have it so
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))      # (B, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T

def tf1_bilinear(n_in, n_out):
    """The matrix (n_out, n_in) of TensorFlow 1's ResizeBilinear: source = i n_in / n_out, no half pixel, no antialias.
    """
    source = torch.arange(n_out, dtype=torch.float64) * n_in / n_out
    low = source.floor().long()
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    matrix[torch.arange(n_out), low] += 1 - (source - low)
    matrix[torch.arange(n_out), (low + 1).clamp(max=n_in - 1)] += source - low
    return matrix

class RandomFeatures(nn.Module):
    """Three strided convolutions with weights drawn from a seed, at native size: uint8 (B, 3, H, W) -> (B, 224).

    It needs no weights and reacts to blur and colour; a distance on it is FD-random and never FID.
    """

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = (3, 32, 64, 128)
        for i in range(3):
            weight = torch.randn(widths[i + 1], widths[i], 3, 3, generator=generator) * (2 / (9 * widths[i])) ** 0.5
            self.register_buffer(f"weight{i}", weight)

    def forward(self, images):
        h, features = images.float() / 127.5 - 1, []
        for i in range(3):
            h = F.relu(F.conv2d(h, self.get_buffer(f"weight{i}"), stride=2, padding=1))
            features.append(h.mean(dim=(2, 3)))
        return torch.cat(features, dim=1)

class Classifier(nn.Module):
    """A small residual network for images of any size from 16 px: uint8 (B, 3, H, W) -> features (B, 256), logits.

    Trained by `classifier` on anyone's labelled images, it is the second extractor where Inception's weights cannot be
    had; a distance on it is FD-classifier and never FID.
    """

    def __init__(self, classes, width=32):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.block = nn.ModuleList(nn.Sequential(nn.GroupNorm(8, c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))
                                   for c in widths[1:])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images):
        h = self.stem(images.float() / 127.5 - 1)
        for down, block in zip(self.down, self.block):
            h = down(F.relu(h))
            h = h + block(h)
        features = F.relu(h).mean(dim=(2, 3))
        return features, self.head(features)

def load_classifier(path):
    """-> (the network of `classifier`'s file, its accuracy on the images held out)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        network = Classifier(len(checkpoint["model"]["head.bias"]))
        network.load_state_dict(checkpoint["model"])
        return network.eval().requires_grad_(False), checkpoint["accuracy"]
    except Exception as error:  # torch raises a dozen kinds for a file that is no checkpoint
        raise InputError(f"--features {path}: inception, random, or a file of `classifier` ({type(error).__name__})"
                         ) from None

def classifier(args):
    """Trains Classifier on the labelled images of args.data, a tenth of them held out; half of a batch mirrored."""
    from vae import Images

    device, data = here(), Images(args.data, args.image_size)
    if len(data.classes) < 2:
        raise InputError(f"--data {args.data}: needs a folder for each of at least two classes")
    torch.manual_seed(args.seed)
    order = torch.randperm(len(data))
    held, train = order[:max(1, len(data) // 10)], order[max(1, len(data) // 10):]
    labels = torch.tensor(data.labels)
    network = Classifier(len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for _ in tqdm(range(args.steps), desc="classifier", unit="step", mininterval=1):
        index = train[torch.randint(len(train), (args.batch_size,))]
        images = torch.stack([data[int(i)][0] for i in index])
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
        loss = F.cross_entropy(network(images.to(device))[1], labels[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = [network(torch.stack([data[int(i)][0] for i in part]).to(device))[1].argmax(dim=1).cpu() == labels[part]
                 for part in held.split(args.batch_size)]
    accuracy = float(torch.cat(right).float().mean())
    make_folder(Path(args.out).parent)
    torch.save(dict(arch="Classifier", model=network.cpu().state_dict(), classes=data.classes, accuracy=accuracy,
                    step=args.steps, args={key: value for key, value in vars(args).items() if key != "run"}), args.out)
    print(f"{args.out}: accuracy {accuracy:.3f} on {len(held):,} images held out, {len(data.classes)} classes")

# ======================================================================================================================
# Metrics

def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64, from means (d,) and covariances (d, d): FID's formula.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2): no sqrtm, nothing
    imaginary, no epsilon.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    half = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(half.T @ cov2 @ half).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)

def moments(features, chunk=4096):
    """(N, d) -> mean (d,), covariance (d, d) with N - 1, in float64, without a copy of all features in float64."""
    mean = features.mean(dim=0, dtype=torch.float64)
    product = sum(centred.T @ centred for centred in (part.double() - mean for part in features.split(chunk)))
    return mean, product / (len(features) - 1)

def inception_score(logits, split=5000):
    """exp of the mean KL between p(y | x) and p(y), averaged over splits of 5,000 in the order given, as ADM has it.

    logits (N, 1008) of FID-Inception without bias. Samples sorted by class score far too low: shuffle them.
    """
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())

def precision_recall(real, fake, k=3, chunk=2048):
    """Improved precision and recall (Kynkaanniemi 2019) of features (N, d), (M, d), as ADM has them: the share of fakes
    inside some real's ball, and of reals inside some fake's, whose radius reaches the k-th nearest other of its kind.

    In fp32 throughout; ADM's float16 distances move the published values by up to .002.
    """
    def distances(a, b):                                       # squared; (chunk, d), (N, d) -> (chunk, N)
        return (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T).clamp(min=0)

    def radii(x):                                                              # the nearest is the point itself
        return torch.cat([distances(part, x).topk(k + 1, largest=False).values[:, -1] for part in x.split(chunk)])

    def covered(points, centres):
        radius = radii(centres)
        inside = [(distances(part, centres) <= radius).any(dim=1) for part in points.split(chunk)]
        return float(torch.cat(inside).double().mean())

    real, fake = real.float(), fake.float()
    return covered(fake, real), covered(real, fake)

def psnr(x, y):
    """Per image of uint8 (B, 3, H, W): dB over all pixels and channels, peak 255; identical images have infinity."""
    mse = (x.double() - y.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255 ** 2 / mse)

def ssim(x, y, data_range=None):
    """Per image of float (B, C, H, W): Gaussian window of 11 and sigma 1.5, reflected borders, mean over all pixels.

    data_range None takes each pair's own range, max of both images' max - min: torchmetrics' default on single images,
    which the paper's scoring script uses on unclamped [-1, 1]. The convention moves SSIM by up to .014: name it.
    """
    if data_range is None:
        spans = (a.amax(dim=(1, 2, 3), keepdim=True) - a.amin(dim=(1, 2, 3), keepdim=True) for a in (x, y))
        data_range = torch.maximum(*spans)
    window = torch.exp(-(torch.arange(11, device=x.device) - 5.0).square() / (2 * 1.5 ** 2))
    window = window / window.sum()
    channels = x.shape[1]
    stack = F.pad(torch.cat([x, y, x * x, y * y, x * y]).float(), (5, 5, 5, 5), mode="reflect")
    for shape in ((1, 1, 11, 1), (1, 1, 1, 11)):
        stack = F.conv2d(stack, window.reshape(shape).expand(channels, -1, -1, -1), groups=channels)
    mean_x, mean_y, xx, yy, xy = stack.chunk(5)
    var_x, var_y = (xx - mean_x.square()).clamp(min=0), (yy - mean_y.square()).clamp(min=0)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    return (similarity / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean(dim=(1, 2, 3))

def nearest_distances(x, k, chunk=1024):
    """Distances (N, k), ascending, float64, of rows of x (N, d) to their k nearest others, exact duplicates dropped.

    Neighbours are found with fp32 matrix products, the winners' distances are then computed in float64.
    """
    x = torch.as_tensor(np.unique(np.asarray(x.cpu()), axis=0), device=x.device)
    if len(x) <= k:
        raise InputError(f"the intrinsic dimension needs more than {k} different points, not {len(x)}")
    x = (x - x.mean(dim=0)).float()
    norms, result = x.square().sum(dim=1), []
    for start in range(0, len(x), chunk):
        part = x[start:start + chunk]
        distance = norms - 2 * part @ x.T                                      # (chunk, N), less its row's own norm
        distance[torch.arange(len(part)), torch.arange(start, start + len(part))] = math.inf
        index = distance.topk(k, largest=False).indices                        # (chunk, k)
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
    n = len(mu)
    keep = int(fraction * n)
    y = -torch.log1p(-torch.arange(1, keep + 1, dtype=torch.float64, device=mu.device) / n)
    return float((mu[:keep] * y).sum() / mu[:keep].square().sum())

def mle_dimension(x, k=20):
    """Levina and Bickel's maximum-likelihood dimension of points (N, d) from k neighbours, with MacKay and Ghahramani's
    mean of the inverse local estimates."""
    distances = nearest_distances(x, k)
    return float(1 / (distances[:, -1:] / distances[:, :-1]).log().mean())

# ======================================================================================================================
# Processes: under torchrun each scores its share of the images, the first one gathers and reports

RANK, WORLD, LOCAL = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))

def gather(columns):
    """{name: rows in parts} of each process, "index" among them -> {name: (N, ...)} of all in the order of "index", on
    the first process; None on the others."""
    columns = {name: torch.cat(parts) for name, parts in columns.items()}
    shares = [columns]
    if WORLD > 1:
        shares = [None] * WORLD if RANK == 0 else None
        torch.distributed.gather_object(columns, shares)
    if RANK:
        return None
    shares = [share for share in shares if share]
    order = torch.cat([share["index"] for share in shares]).argsort() if shares else []
    return {name: torch.cat([share[name] for share in shares])[order] for name in (shares[0] if shares else ())}

def here():
    """The device of this process."""
    return torch.device("cuda", LOCAL) if torch.cuda.is_available() else torch.device("cpu")

# ======================================================================================================================
# recon: one table row for every autoencoder                                                    (Tables 1, 5, 6, 7, 12)

CONVENTIONS = {
    "images": "ADM's centre crop, reconstructions rounded to uint8",
    "PSNR": "per image on uint8, then the mean",
    "SSIM": "Gaussian 11, reflected, float [-1, 1] not clamped, each pair's own range",
    "LPIPS": "VGG16 v0.1 on [-1, 1], not clamped",
    "R": "mean over 90, 180, 270 degrees of |tau E(x) - E(tau x)|^2 / |E(tau x)|^2 on posterior means",
    "S": "the same over the scales 0.25, 0.50, 0.75",
    "R_centred": "R with the channels' means taken off E(tau x) in the denominator",
    "ID": "TwoNN on posterior means, exact duplicates dropped",
    "ID_mle": "maximum likelihood with 20 neighbours on the same",
    "R_border": "the outer ceil(h / 8) cells of E(tau x) alone; R_interior: the others",
    "transforms": "distance between tau o x and D(tau o z), for each tau and the mean over rotations",
}

def load_features(args, device, preprocess="pytorch-fid"):
    """-> (function of uint8 images to a tuple of features, the distance's name, a description for the record)."""
    if args.features not in ("inception", "random"):
        network, accuracy = load_classifier(args.features)
        network.to(device)
        return (lambda images: (network(images)[0],), "FD-classifier",
                f"classifier {Path(args.features).name} {file_hash(args.features)}, held-out accuracy {accuracy:.3f}")
    if args.features == "random":
        network = RandomFeatures()
        digest = hashlib.sha256(b"".join(b.numpy().tobytes() for b in network.buffers())).hexdigest()[:12]
        network.to(device)
        return lambda images: (network(images),), "FD-random", f"RandomFeatures, weights {digest}"
    path = Path(args.inception or Path(torch.hub.get_dir(), "checkpoints", Path(Inception.URL).name))
    if not path.is_file():
        try:
            if args.inception:
                raise FileNotFoundError(path)
            torch.hub.load_state_dict_from_url(Inception.URL, map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: FID-Inception's weights are not there ({type(error).__name__}): put "
                             f"{Inception.URL} there, or take --features random, which is no FID") from None
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that is no checkpoint
        raise InputError(f"{path}: cannot be read as weights ({type(error).__name__})") from None
    network = Inception(weights, preprocess).to(device)
    return network, "FID", f"FID-Inception {path.name} {file_hash(path)}, {preprocess} preprocessing"

@torch.no_grad()
def recon(args):
    from eqloss import scale_transform
    from vae import Images, load_autoencoder, load_lpips, slot_noise, to_float, to_uint8
    from vae import InputError as NoWeights

    device = here()
    data = Images(args.data, args.image_size)
    if args.record:
        make_folder(Path(args.record).parent)
    features, distance, extractor = load_features(args, device)
    distance = distance.replace("FID", "rFID")
    if args.vgg == "random":
        raise InputError("--vgg random: that would be no LPIPS; give VGG16's weights or --no-lpips")
    try:
        perceptual = None if args.no_lpips else load_lpips(args.vgg).to(device)
    except NoWeights as error:
        if args.vgg:
            raise
        perceptual = None
        print(f"LPIPS is not run: {error}", file=sys.stderr)
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: at least 1")
    count = min(args.num_images or len(data), len(data))
    results, hashes = {}, {}
    for path in args.checkpoints:
        model = load_autoencoder(path, args.model).to(device)
        grid = model.grid(args.image_size)
        taus = {f"R{90 * k}": scale_transform(1, grid, k, args.interpolation) for k in (1, 2, 3)}
        taus |= {f"S{s:.2f}": scale_transform(s, grid, 0, args.interpolation) for s in (0.25, 0.5, 0.75)}

        def encode(x):
            return model.encode(x).mean

        columns = defaultdict(list)
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(RANK, count, WORLD)), args.batch_size,
                                             num_workers=args.workers, pin_memory=device.type == "cuda")
        bar = tqdm(total=count, desc=f"{Path(path).stem}: scoring", unit="image", mininterval=1, disable=RANK > 0)
        for images, _, index, passed in loader:
            bar.update(len(images) * WORLD)
            index = index[passed == 0]                                         # an unreadable file is left out
            if not len(index):
                continue
            x = to_float(images[passed == 0], device)                          # (b, 3, H, W)
            posterior = model.encode(x)
            z = mean = posterior.mean                                          # (b, c, h, w)
            if args.latent == "sample":
                z = mean + posterior.std * slot_noise(mean, args.seed, "recon", index)
            decoded = model.decode(z)
            if not decoded.isfinite().all():
                raise InputError(f"{path}: a reconstruction of the images {index.tolist()} is not finite")
            real, fake = to_uint8(x), to_uint8(decoded)
            row = dict(index=index, latents=mean.flatten(1), PSNR=psnr(real, fake), SSIM=ssim(x, decoded),
                       real=features(real)[0], fake=features(fake)[0])
            if perceptual:
                row["LPIPS"] = perceptual(x, decoded).flatten()
            for name, tau in taus.items():                                     # Appendix C.3; the parts of the centred
                target = encode(tau(x))                                        # error are put together at the end
                error, norm = (tau(mean) - target).square().sum(dim=1), target.square().sum(dim=1)     # (b, h2, w2)
                row[name + " error"], row[name + " norm"] = error.sum(dim=(1, 2)), norm.sum(dim=(1, 2))
                row[name + " mean"] = target.mean(dim=(2, 3))                  # (b, c)
                edge = -(-target.shape[2] // 8)
                inner = (slice(None), slice(edge, -edge), slice(edge, -edge))
                row[name + " inner"] = torch.stack([error[inner].sum(dim=(1, 2)), norm[inner].sum(dim=(1, 2))], dim=1)
                if args.transforms:                                            # Fig. 3
                    row[name + " real"] = features(to_uint8(tau(x)))[0]
                    row[name + " fake"] = features(to_uint8(model.decode(tau(z))))[0]
            for name, values in row.items():
                columns[name].append(values.cpu())
        bar.close()

        columns = gather(columns)
        if RANK:
            continue
        if len(columns.get("index", ())) < 4:
            raise InputError(f"--data {args.data}: fewer than 4 readable images, too few to score")

        def frechet(kind=""):
            return frechet_distance(*(part for side in ("real", "fake") for part in moments(columns[kind + side])))

        def mean_of(values):                       # what is infinite or undefined in one image would hide all others
            values = values.double()[values.isfinite()]
            return float(values.mean()) if len(values) else None

        latents = columns["latents"]                                           # (N, c h w)
        result = {"N": len(latents), "unreadable": count - len(latents), distance: frechet()}
        result.update((key, mean_of(columns[key]) if key in columns else None) for key in ("PSNR", "SSIM", "LPIPS"))
        for name, tau in taus.items():
            error, norm, mean = (columns[f"{name} {part}"].double() for part in ("error", "norm", "mean"))
            cells, centre = tau.size[0] * tau.size[1], mean.mean(dim=0)
            spread = norm - cells * (2 * mean @ centre - centre.square().sum())             # |E(tau x) - centre|^2
            inner_error, inner_norm = columns[name + " inner"].double().T
            result[name], result[name + "_centred"] = mean_of(error / norm), mean_of(error / spread)
            result[name + "_interior"] = mean_of(inner_error / inner_norm)
            result[name + "_border"] = mean_of((error - inner_error) / (norm - inner_norm))
            if args.transforms:
                result[f"{distance} {name}"] = frechet(name + " ")
        for kind in "RS":
            for form in ("{}", "{}_centred", "{}_interior", "{}_border", distance + " {}"):
                parts = [result.get(form.format(name)) for name in taus if name.startswith(kind)]
                parts = [part for part in parts if part is not None]
                result[form.format(kind)] = sum(parts) / len(parts) if parts else None
        result["ID"] = two_nn(latents.to(device))
        result["ID_mle"] = mle_dimension(latents.to(device)) if len(latents.unique(dim=0)) > 20 else None
        channels = latents.unflatten(1, (-1, grid[0] * grid[1])).double()
        result["latent_mean"] = channels.mean(dim=(0, 2)).tolist()
        result["latent_std"] = channels.transpose(0, 1).flatten(1).std(dim=1).tolist()
        name = Path(path).stem if Path(path).stem not in results else str(path)
        results[name] = {key: value for key, value in result.items() if value is not None}
        hashes[name] = file_hash(path)
        shown = (key for key in (distance, "PSNR", "SSIM", "LPIPS", "R", "S", "ID") if key in results[name])
        print(f"{name}: " + "  ".join(f"{key} {result[key]:.4g}" for key in shown) + f"  N {result['N']:,}")
    write_record(args, dict(results), checkpoints=hashes, extractor=extractor,
                 conventions=dict(CONVENTIONS, latent=args.latent, interpolation=args.interpolation))

def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]

def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror})") from None

def write_record(args, results, **about):
    """The results with all that is needed to run them again, as JSON."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    about.update(command=["evaluate.py", *sys.argv[1:]], seed=args.seed, device=device, threads=torch.get_num_threads(),
                 versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
                 date=time.strftime("%Y-%m-%d"))
    if args.record and not RANK:
        Path(args.record).write_text(json.dumps(dict(results, about=about), indent=1) + "\n")

# ======================================================================================================================
# samples: a generator's pictures beside a reference, by ADM's protocol                     (Tables 2, 3, 4, 9, 10, 11)

def read_npz(path, keys):
    """{key: array} for those of `keys` that the npz has, memory-mapped inside the zip where they are not compressed."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for item in archive.infolist():
                key = item.filename.removesuffix(".npy")
                if key not in keys:
                    continue
                with archive.open(item) as member:
                    major, _ = np.lib.format.read_magic(member)
                    header = getattr(np.lib.format, f"read_array_header_{major}_0")
                    shape, fortran, dtype = header(member)
                    if item.compress_type == zipfile.ZIP_STORED and not fortran and not dtype.hasobject:
                        file.seek(item.header_offset + 26)     # the local header's own lengths of name and extra field
                        name, extra = np.frombuffer(file.read(4), "<u2")
                        start = item.header_offset + 30 + int(name) + int(extra) + member.tell()
                        arrays[key] = np.memmap(path, dtype, "r", start, shape) if math.prod(shape) else None
                if key not in arrays:
                    with archive.open(item) as member:
                        arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as npz ({type(error).__name__}: {error})") from None
    return arrays

def open_pictures(path, size=None):
    """-> (count, function of a slice to uint8 (B, 3, H, W), (H, W)) of ADM's npz, or of a folder or "emoji" under ADM's
    centre crop to `size` (None: the first picture's own)."""
    if str(path).endswith(".npz"):
        images = read_npz(path, ("arr_0",)).get("arr_0")
        if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise InputError(f"{path}: no pictures in it: arr_0, uint8 (N, H, W, 3)")
        return (len(images), lambda part: torch.from_numpy(np.array(images[part])).permute(0, 3, 1, 2),
                images.shape[1:3])
    from vae import Images

    lossy = (".jpg", ".jpeg", ".webp")
    data = Images(path, size or (8, 8))
    if any(str(file).lower().endswith(lossy) for file in data.files if isinstance(file, str)):
        if size is None:
            raise InputError(f"{path}: JPEG loses what the metrics see; score lossless samples, PNG or npz")
        print(f"{path}: JPEG pictures, whose artefacts count as the reference's", file=sys.stderr)
    if size is None:
        with Image.open(data.files[0]) as first:
            data.size = (first.height, first.width)
    return len(data), lambda part: torch.stack([data[i][0] for i in range(len(data))[part]]), data.size

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")                # ADM's names: pooled features, spatial features

@torch.no_grad()
def describe(path, args, network, distance, extractor, device, size=None):
    """One side of the comparison -> dict(mu, sigma[, mu_s, sigma_s][, features (N, d)][, logits], N, size), on
    the first process. Statistics stored in an npz win over its pictures', as in ADM: they are of the whole data set.
    """
    keys = (*STATISTICS, "features", "extractor", "N", "arr_0")
    side = read_npz(path, keys) if str(path).endswith(".npz") else dict(arr_0=None)
    if str(side.get("extractor", extractor)) != extractor:
        raise InputError(f"{path}: statistics of another extractor ({side['extractor']})")
    if "extractor" not in side and distance != "FID":          # ADM's statistics are FID-Inception's
        side = {key: side[key] for key in side if key not in STATISTICS}
    if "arr_0" in side:
        count, pictures, size = open_pictures(path, size)
        if count < 2:
            raise InputError(f"{path}: fewer than two pictures")
        columns, bar = defaultdict(list), tqdm(total=count, desc=Path(path).stem, unit="image", disable=RANK > 0)
        for start in range(RANK * args.batch_size, count, WORLD * args.batch_size):
            batch = pictures(slice(start, start + args.batch_size))
            columns["index"].append(torch.arange(start, start + len(batch)))
            for name, values in zip(("features", "spatial", "logits"), network(batch.to(device))):
                columns[name].append(values.cpu())
            bar.update(len(batch) * WORLD)
        bar.close()
        side["size"], columns = size, gather(columns)
        if RANK:
            return side
        if not columns["features"].isfinite().all():
            raise InputError(f"{path}: features that are not finite")
        for (mu, sigma), name in ((STATISTICS[:2], "features"), (STATISTICS[2:], "spatial")):
            if mu not in side and name in columns:
                side[mu], side[sigma] = (part.cpu().numpy() for part in moments(columns[name].to(device)))
        side.update(N=count, **{name: columns[name] for name in ("features", "logits") if name in columns})
    if "mu" not in side:
        raise InputError(f"{path}: neither pictures (arr_0) nor statistics (mu, sigma) of {extractor}")
    return side

@torch.no_grad()
def samples(args):
    device = here()
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: at least 1")
    for path in (args.record, args.save_stats):
        if path:
            make_folder(Path(path).parent)
    network, distance, extractor = load_features(args, device, "adm")
    fake = describe(args.samples, args, network, distance, extractor, device)
    real = describe(args.reference, args, network, distance, extractor, device, fake.get("size"))
    if RANK:
        return
    if args.save_stats:
        kept = {key: np.asarray(real[key]) for key in (*STATISTICS, "features") if key in real}
        np.savez(args.save_stats, N=real.get("N", 0), extractor=extractor, **kept)
    result = {"N": int(fake["N"]), "N reference": int(real["N"]) if "N" in real else None}
    for name, (mu, sigma) in zip((distance, "s" + distance), (STATISTICS[:2], STATISTICS[2:])):
        if mu in fake and mu in real:
            pair = (torch.as_tensor(np.array(side[key])).to(device) for side in (fake, real) for key in (mu, sigma))
            result[name] = frechet_distance(*pair)
    if distance == "FID" and "logits" in fake:
        logits = fake["logits"]
        runs = (logits[1:].argmax(dim=1) == logits[:-1].argmax(dim=1)).double().mean()
        if args.shuffle:
            logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(args.seed))]
        elif runs > 0.5:
            print(f"{args.samples}: sorted by class, as it seems; ADM's inception score, of each 5,000 in "
                  "the file's order, is too low; --shuffle mixes them", file=sys.stderr)
        result["IS"] = inception_score(logits)
    if distance == "FID" and "features" in fake and "features" in real:
        sides = (torch.as_tensor(np.array(side["features"])).to(device) for side in (real, fake))
        result["Precision"], result["Recall"] = precision_recall(*sides)
    if distance == "FID" and fake["N"] < 2048:
        print(f"{args.samples}: {fake['N']:,} pictures: below 2,048 FID says little", file=sys.stderr)
    count = f"{fake['N'] // 1000}k" if fake["N"] % 1000 == 0 else fake["N"]
    print(f"{args.samples}: " + "  ".join(f"{key}-{count} {result[key]:.4g}" for key in result if key[0] != "N"))
    settings = Path(args.samples).with_suffix(".json")         # how they were drawn, where our samplers wrote it
    write_record(args, {Path(args.samples).stem: result}, extractor=extractor, samples=str(args.samples),
                 hashes={str(path): file_hash(path) for path in (args.samples, args.reference) if os.path.isfile(path)},
                 drawn=json.loads(settings.read_text()) if settings.is_file() else None)

# ======================================================================================================================
# figures: latents as pictures (Fig. 1 left), and what transformed latents decode to (Fig. 2 and 6)

@torch.no_grad()
def figures(args):
    from eqloss import scale_transform
    from vae import Images, load_autoencoder, to_float, to_uint8

    device = here()
    data = Images(args.data, args.image_size)
    out = Path(args.out)
    make_folder(out)
    count = min(args.num_images or 8, len(data))
    x = torch.stack([data[i * len(data) // count][0] for i in range(count)])   # the pictures shown
    fitted = min(256, len(data))
    many = torch.stack([data[i * len(data) // fitted][0] for i in range(fitted)])              # what PCA is fitted on
    shown, many = to_float(x, device), to_float(many, device)
    cell = max(args.image_size) * max(1, 96 // max(args.image_size))
    maps, decoded = [("images", pictures(x, cell))], {"scale 0.5": [], "rotation 180": []}
    for path in args.checkpoints:
        model = load_autoencoder(path, args.model).to(device)
        name, grid = Path(path).stem, model.grid(args.image_size)
        z = model.encode(shown).mean
        sample = torch.cat([model.encode(part).mean for part in many.split(32)])
        maps.append((f"{name}: latents", pictures(principal_colours(z, sample), cell)))
        for title, tau in (("scale 0.5", scale_transform(0.5, grid)), ("rotation 180", scale_transform(1, grid, 2))):
            rows = decoded[title]
            if not rows:
                rows.append(("tau o x", pictures(to_uint8(tau(shown)), cell)))
            encoded = model.encode(tau(shown)).mean
            rows.append((f"{name}: D(E(tau o x))", pictures(to_uint8(model.decode(encoded)), cell)))
            rows.append((f"{name}: D(tau o E(x))", pictures(to_uint8(model.decode(tau(z))), cell)))
    panel("The latents' three principal components as colours (Fig. 1)", maps).save(out / "fig1-latents.png")
    for title, rows in decoded.items():
        panel(f"Transformed before encoding, and transformed as a latent: {title} (Fig. 2)", rows).save(
            out / f"fig2-{title.split()[0]}.png")
    print(f"figures in {out}/: fig1-latents.png, fig2-scale.png, fig2-rotation.png")

def principal_colours(z, sample):
    """Latents z (N, c, h, w) -> uint8 (N, 3, h, w): projections on `sample`'s three principal axes, 1st to 99th
    percentile as 0..255. Fitted per autoencoder, so colours mean nothing across autoencoders."""
    points = sample.transpose(0, 1).flatten(1).double()                        # (c, N h w)
    centre = points.mean(dim=1, keepdim=True)
    axes = torch.linalg.eigh(torch.cov(points)).eigenvectors.flip(1)[:, :3].T  # (3, c), largest first
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()            # eigenvectors have no sign
    values = axes @ (points - centre)
    low, high = (torch.stack([v.kthvalue(max(1, int(q * v.numel()))).values for v in values]) for q in (0.01, 0.99))
    projected = torch.einsum("kc,nchw->nkhw", axes, z.double() - centre[:, 0, None, None])
    scaled = (projected - low[:, None, None]) / (high - low)[:, None, None]
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8)

def pictures(images, cell):
    """uint8 (N, 3, h, w) -> PIL images, magnified by whole pixels to at most `cell` on the longer side."""
    factor = max(1, cell // max(images.shape[-2:]))
    return [Image.fromarray(a).resize((a.shape[1] * factor, a.shape[0] * factor), Image.Resampling.NEAREST)
            for a in images.permute(0, 2, 3, 1).cpu().numpy()]

def font(size):
    return ImageFont.load_default(size=size)

def panel(title, rows, margin=4, label_width=190):
    """Rows of (label, PIL images) under a title, as one PIL image."""
    width = label_width + max(sum(p.width + margin for p in row) for _, row in rows)
    heights = [max(p.height for p in row) + margin for _, row in rows]
    canvas = Image.new("RGB", (width, 34 + sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), 34
    draw.text((8, 6), title, "black", font(17))
    for (label, row), height in zip(rows, heights):
        draw.multiline_text((8, top + height // 2 - 18), label.replace(": ", ":\n"), "black", font(15))
        left = label_width
        for picture in row:
            canvas.paste(picture, (left, top))
            left += picture.width + margin
        top += height
    return canvas

# ======================================================================================================================
# report: a page from records

EXPLAIN = {                                          # key -> what it is, which way is better
    "R": "equivariance error, rotations (lower: more equivariant)",
    "S": "equivariance error, scales (lower: more equivariant)",
    "R_centred": "the same, latents' mean removed",
    "S_centred": "the same, latents' mean removed",
    "rFID": "reconstruction FID (lower is better)",
    "FD-random": "reconstruction distance, random features (lower is better)",
    "PSNR": "reconstruction, dB (higher is better)",
    "SSIM": "reconstruction (higher is better)",
    "LPIPS": "reconstruction (lower is better)",
    "ID": "intrinsic dimension of the latents, TwoNN",
    "N": "images",
    "samples: FID": "generated samples, ADM's protocol (lower is better)",
    "samples: FD-random": "generated samples, random features (lower is better)",
    "samples: N": "samples",
}
PAPER = {"R": (0.93, 0.49), "S": (0.80, 0.15), "rFID": (0.90, 0.82), "PSNR": (25.82, 25.95), "SSIM": (0.71, 0.72),
         "LPIPS": (0.146, 0.141), "ID": (62.2, 39.4), "N": (50000, 50000)}     # SD-VAE -> + EQ: Tables 5, 7, 12

def read_record(path):
    try:
        record = json.loads(Path(path).read_text())
        return record, record.pop("about")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: no record of `recon` or `samples` ({type(error).__name__}: {error})") from None

def verdict(one, two, names):
    """What a second arm does beside the first, line by line: which of the paper's effects show, and which do not."""
    def line(what, ratio, text):
        shows = "shows" if ratio < 0.95 else "does not show"
        return f"{what}: {text}; the paper's gain {shows} here"

    lines = [line("Equivariance", max(two[key] / one[key] for key in "RS"),
                  ", ".join(f"{key} x {two[key] / one[key]:.2f}" for key in "RS"))]
    if "PSNR" in one and "PSNR" in two:                        # identical images have none
        lines += [f"Reconstruction: PSNR {two['PSNR'] - one['PSNR']:+.2f} dB"]
    for key in (key for key in one if key.startswith("samples: F") and key in two):
        ratio = two[key] / one[key]
        lines += [line("Generation", ratio, f"{key.removeprefix('samples: ')} of {one['samples: N']:,} samples "
                                            f"{one[key]:.3g} -> {two[key]:.3g}, x {ratio:.2f}") + " (one run each)"]
    return [f"{names[1]} beside {names[0]}", *lines]

def report(args):
    record, about = read_record(args.record_files[0])
    arms, drawn = list(record), []
    for path in args.record_files[1:]:                         # of `samples`: an arm is known by its file's name
        scores, origin = read_record(path)
        for arm, values in scores.items():
            if arm not in record:
                raise InputError(f"{path}: samples of {arm!r}, but {args.record_files[0]} knows {', '.join(arms)}")
            record[arm].update({f"samples: {key}": value for key, value in values.items()})
            drawn.append((arm, origin["samples"]))
    keys = [key for key in EXPLAIN if any(record[arm].get(key) is not None for arm in arms)]

    def show(value):
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 10 \
            else f"{value:.2f}"

    header = ["", *arms, "paper: SD-VAE", "paper: + EQ"]
    table = [[key, *(show(record[arm].get(key)) for arm in arms), *(show(v) for v in PAPER.get(key, (None, None)))]
             for key in keys]
    lines_of_verdict = verdict(*record.values(), arms) if len(arms) == 2 else []
    out = Path(args.out)
    make_folder(out.parent)
    if drawn and args.figures:
        shown = [(f"{arm}: samples", open_pictures(path)[1](slice(0, 24))) for arm, path in drawn]
        rows = [(label if k == 0 else "", pictures(part, max(96, *part.shape[2:])))
                for label, images in shown for k, part in enumerate(images.split(8))]
        panel("Samples of generators trained on each latent space, from the same noise and labels (Fig. 4)", rows).save(
            Path(args.figures, "fig4-samples.png"))
    panels = sorted(Path(args.figures).glob("fig*.png")) if args.figures else []

    lines = [f"# {args.title}", "", *(f"{'' if k == 0 else '- '}{text}" for k, text in enumerate(lines_of_verdict)), ""]
    lines += ["| " + " | ".join(header) + " | what |", "|---" * (len(header) + 1) + "|"]
    lines += ["| " + " | ".join(row) + f" | {EXPLAIN[row[0]]} |" for row in table]
    lines += ["", "The paper's columns are ImageNet at 256 px, an 84M autoencoder: compare directions, not values.", ""]
    lines += [args.text, ""] if args.text else []
    for path in panels:
        lines += [f"![{path.stem}]({os.path.relpath(path, out.parent)})", ""]
    lines += [f"Measured with `{' '.join(about['command'])}` on {about['device']}, {about['threads']} threads, torch "
              f"{about['versions']['torch']}, {about['date']}; extractor: {about['extractor']}.", ""]
    out.with_suffix(".md").write_text("\n".join(lines))
    out.with_suffix(".json").write_text(json.dumps(dict(record, about=about), indent=1) + "\n")

    figures = [Image.open(path) for path in panels]
    width, top = max([1000] + [figure.width + 20 for figure in figures]), 60 + 22 * len(lines_of_verdict)
    page = Image.new("RGB", (width, top + 60 + 24 * len(table) + sum(f.height + 16 for f in figures) + 20), "white")
    draw, columns = ImageDraw.Draw(page), [16, 220, 310, 400, 540]
    draw.text((16, 10), args.title, "black", font(24))
    for i, text in enumerate(lines_of_verdict):
        draw.text((16, 46 + 22 * i), text, "black", font(16))
    for x, text in zip(columns, header):
        draw.text((x, top), text, "#666666", font(15))
    top += 24
    for row in table:
        for x, text in zip(columns, row):
            draw.text((x, top), text, "black", font(15))
        draw.text((650, top), EXPLAIN[row[0]], "#666666", font(13))
        top += 24
    for figure in figures:
        page.paste(figure, (10, top + 12))
        top += figure.height + 16
    page.save(out.with_suffix(".png"))
    print(f"{out.with_suffix('.md')}  {out.with_suffix('.json')}  {out.with_suffix('.png')}")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def image_size(text):
        sides = [int(side) for side in text.split("x")]
        return sides[0], sides[-1]

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    shared.add_argument("--data", default="data/imagenet/val", help="folder of images, or emoji | emoji-val")
    shared.add_argument("--image-size", type=image_size, default=(256, 256), help="256, or 384x256 (height x width)")
    shared.add_argument("--model", help="preset of files that do not say it (LDM's): sd, sdxl, sd3, sd-16")
    shared.add_argument("--num-images", type=int, help="recon: score the first N; figures: show N (8)")

    command = commands.add_parser("recon", parents=[shared], help="reconstruction, equivariance, intrinsic dimension")
    command.add_argument("--latent", choices=("sample", "mean"), default="sample", help="what is decoded")
    command.add_argument("--interpolation", choices=("bicubic-antialias", "bicubic", "bilinear"),
                         default="bicubic-antialias", help="of tau in R and S, see eqloss.py")
    command.add_argument("--inception", help="FID-Inception's weights (default: torch hub's)")
    command.add_argument("--features", default="inception", help="inception, random, or a file of `classifier`")
    command.add_argument("--vgg", help="VGG16's weights for LPIPS (default: torch hub's)")
    command.add_argument("--no-lpips", action="store_true")
    command.add_argument("--transforms", action="store_true", help="also the distances of Fig. 3")
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--workers", type=int, default=0)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--record", help="JSON file to write")
    command.set_defaults(run=recon)

    command = commands.add_parser("samples", help="a generator's samples: FID, sFID, IS, precision, recall")
    command.add_argument("samples", metavar="SAMPLES", help="npz with arr_0, or a folder of PNG")
    command.add_argument("reference", metavar="REFERENCE", help="ADM's npz, --save-stats' npz, a folder, or emoji")
    command.add_argument("--inception", help="FID-Inception's weights (default: torch hub's)")
    command.add_argument("--features", default="inception", help="inception, random, or a file of `classifier`")
    command.add_argument("--shuffle", action="store_true", help="before the inception score's splits")
    command.add_argument("--save-stats", help="npz to write the reference's statistics and features to")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--record", help="JSON file to write")
    command.set_defaults(run=samples)

    command = commands.add_parser("classifier", help="trains a second extractor on labelled images")
    command.add_argument("--data", required=True, help="folder of class folders, or emoji")
    command.add_argument("--image-size", type=image_size, default=(64, 64))
    command.add_argument("--out", required=True, help="file to write")
    command.add_argument("--steps", type=int, default=1500)
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=classifier)

    command = commands.add_parser("figures", parents=[shared], help="Fig. 1 left, Fig. 2")
    command.add_argument("--out", default="figures", help="folder")
    command.set_defaults(run=figures)

    command = commands.add_parser("report", help="a page from a record of recon, and from those of its arms' samples")
    command.add_argument("record_files", nargs="+", metavar="RECORD")
    command.add_argument("--figures", help="folder of `figures`")
    command.add_argument("--out", default="report", help="report -> report.md, report.json, report.png")
    command.add_argument("--title", default="EQ-VAE")
    command.add_argument("--text", help="a paragraph under the table")
    command.set_defaults(run=report)

    for each in (parser, *commands.choices.values()):
        each.print_usage = lambda file=None: None                              # errors in one line
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False                                    # metrics are computed in fp32
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")           # what is gathered lies on the CPU
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    try:
        args.run(args)
    except ValueError as error:
        if type(error).__name__ != "InputError":                               # ours, or vae.py's where that is used
            raise
        print(f"evaluate.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if WORLD > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
