"""The KL autoencoder of latent diffusion (SD-VAE and its kin), and its fine-tuning with EQ-VAE.

EQ-VAE (https://arxiv.org/abs/2502.09509) fine-tunes a pretrained autoencoder until scaling or
rotating a latent does to the decoded image what scaling or rotating the image would have done.
Half of the steps train plain reconstruction (Eq. 1). The other half decode a transformed latent
and ask for the transformed image (Eq. 5). Generators learn faster on such latents. The transform,
tau, is drawn and applied by eqloss.py.

    python data/emoji/prepare.py                                    # pictures for a first try
    python vae.py --data data/emoji/train --model tiny --init scratch --image-size 32 \\
        --batch-size 32 --steps 500 --lr 1e-3 --lpips-weight 0 --gan-weight 0 --out tiny.pt
                                                                    # one minute on a CPU
    python vae.py --init kl-f8.ckpt --data photos/ --batch-size 16  # one GPU
    torchrun --nproc_per_node=8 vae.py                              # eight GPUs: the paper's recipe
    python vae.py --init eqvae.pt --export for-diffusers            # writes a folder

The torchrun line fine-tunes SD-VAE into EQ-VAE. It reads data/openimages/ and data/kl-f8.ckpt,
which is model.ckpt in https://ommer-lab.com/files/latent-diffusion/kl-f8.zip, and takes 50,000
steps of 160 images. It writes eqvae.pt, eqvae.jsonl (losses) and eqvae/ (pictures). The same
command again goes on where the run stopped. Expect on ImageNet's validation set (Tables 7 and 12):
rFID .90 -> .82; equivariance error under rotation, R, .93 -> .49, under scaling, S, .80 -> .15;
PSNR 25.8 -> 26.0 dB.

From the top: networks, losses, training (train() is the paper's method), the command line; then
what a first reading may leave out: files in and out (load_autoencoder(), LDM's and diffusers'
layouts, read_file()), and the run kit, helper functions that all scripts here share (flags,
processes, randomness, pictures in and out, averages, resuming, Log, saving).
"""

import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its all_reduce has gradients
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.benchmark
import torch.utils.checkpoint
import torch.utils.flop_counter
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

import eqloss
from eqloss import identity_transform, released_transform, sample_transform, scale_transform

# What most published autoencoders share (FULL), and the small ones of tests and results/ (SMALL)
FULL = dict(ch=128, num_res_blocks=2, attn_levels=(), use_quant_conv=True, norm_groups=32)
SMALL = dict(ch=16, num_res_blocks=1, attn_levels=(), use_quant_conv=True, norm_groups=8)
SD3 = dict(FULL, ch_mult=(1, 2, 4, 4), z_channels=16, use_quant_conv=False)

# name -> arguments of AutoencoderKL, which explains them. To add a preset, add a line: n numbers in
# ch_mult make latents that are 2^(n - 1) times smaller than the image. Scale and shift belong to
# published weights; leave them out where there are none, since a finished run measures its own.
CONFIGS = {
    # f8 c4: kl-f8, sd-vae-ft-*, eq-vae
    "sd": dict(FULL, ch_mult=(1, 2, 4, 4), z_channels=4, scaling_factor=0.18215),
    # f8 c4: the same networks as sd, with another scale
    "sdxl": dict(FULL, ch_mult=(1, 2, 4, 4), z_channels=4, scaling_factor=0.13025),
    # f8 c16
    "sd3": dict(SD3, scaling_factor=1.5305, shift_factor=0.0609),
    # f8 c16: the same networks as sd3, with another scale
    "flux": dict(SD3, scaling_factor=0.3611, shift_factor=0.1159),
    # f16 c16: LDM's kl-f16
    "sd-16": dict(FULL, ch_mult=(1, 1, 2, 2, 4), z_channels=16, attn_levels=(4,)),
    # f4 c4, f4 c16, f8 c4 and f8 c16
    "tiny": dict(SMALL, ch_mult=(1, 2, 4), z_channels=4),
    "tiny-16": dict(SMALL, ch_mult=(1, 2, 4), z_channels=16),
    "tiny-f8": dict(SMALL, ch_mult=(1, 2, 4, 4), z_channels=4),
    "tiny-f8-16": dict(SMALL, ch_mult=(1, 2, 4, 4), z_channels=16),
}


# ==================================================================================================
# The networks. Module names are LDM's, so that its checkpoints load strictly.
#     B batch (b: a micro-batch)   C channels   H, W image; inside a block, what that level has
#     c latent channels            h, w latent (H / f, W / f)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that keeps bf16 inputs in bf16; its sums are float32 all the same.

    Under a GPU's autocast nn.GroupNorm converts its input to float32. Those copies would be a third
    of all memory that is kept for the backward pass.
    """

    def forward(self, x):
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.to(x.dtype)
            bias = self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution where the width changes."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity()
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (B, C_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One head of self-attention over all positions. q, k and v are 1x1 convolutions, as in LDM."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):  # (B, C, H, W)
        h = self.norm(x)
        q = self.to_tokens(self.q(h))  # (B, 1, H W, C)
        k = self.to_tokens(self.k(h))
        v = self.to_tokens(self.v(h))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])  # (B, C, H, W)
        return x + self.proj_out(h)

    @staticmethod
    def to_tokens(h):
        return h.flatten(2).transpose(1, 2)[:, None]


def downsample(c):
    """Halves the sides. LDM pads a row and a column of zeros at the lower right only."""
    pad = nn.ZeroPad2d((0, 1, 0, 1))
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):
    """Doubles the sides."""
    nearest = nn.Upsample(scale_factor=2)
    return nn.Sequential(OrderedDict(nearest=nearest, conv=nn.Conv2d(c, c, 3, padding=1)))


def middle(c, groups):
    return nn.Sequential(
        OrderedDict(
            block_1=ResnetBlock(c, c, groups),
            attn_1=AttnBlock(c, groups),
            block_2=ResnetBlock(c, c, groups),
        )
    )


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it.

    With `recompute` the backward pass computes a block again instead of keeping what is in it.
    """

    recompute = False

    def __init__(self, c_in, c_out, blocks, attention, groups):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for j in range(blocks):
            self.block.append(ResnetBlock(c_in if j == 0 else c_out, c_out, groups))
            self.attn.append(AttnBlock(c_out, groups) if attention else nn.Identity())

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            if self.recompute and torch.is_grad_enabled():
                h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False)
            else:
                h = block(h)
            h = attn(h)
        return h


class Encoder(nn.Module):
    """Images -> features, from which quant_conv computes the posterior's mean and log variance.

    `down` has one entry per resolution; entry 0 works at the size of the image.
    """

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, out_channels, norm_groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, multiple in enumerate(ch_mult):
            level = Level(width, ch * multiple, num_res_blocks, i in attn_levels, norm_groups)
            width = ch * multiple
            is_last = i == len(ch_mult) - 1
            level.downsample = nn.Identity() if is_last else downsample(width)
            self.down.append(level)
        self.mid = middle(width, norm_groups)
        self.norm_out = GroupNorm(norm_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x):  # (B, 3, H, W)
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level.downsample(level(h))  # sides halved; the last level keeps its size
        h = self.mid(h)  # (B, ch_mult[-1] ch, h, w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, out_channels, h, w)


class Decoder(nn.Module):
    """The encoder in reverse, with one more residual block per level.

    `up` has one entry per resolution, as in LDM's files: entry 0 works at the size of the image, so
    forward() runs through it backwards.
    """

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, in_channels, norm_groups):
        super().__init__()
        widths = [ch * multiple for multiple in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], norm_groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            coarser_width = widths[min(i + 1, len(widths) - 1)]
            blocks = num_res_blocks + 1
            level = Level(coarser_width, width, blocks, i in attn_levels, norm_groups)
            level.upsample = nn.Identity() if i == 0 else upsample(width)
            self.up.append(level)
        self.norm_out = GroupNorm(norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):  # (B, in_channels, h, w)
        h = self.mid(self.conv_in(z))  # (B, ch_mult[-1] ch, h, w)
        for level in reversed(self.up):
            h = level.upsample(level(h))  # sides doubled, except by entry 0, which comes last
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, H, W)


class Posterior:
    """q(z | x) = N(mean, std^2), diagonal, from the encoder's moments (B, 2c, h, w)."""

    def __init__(self, moments):
        self.mean, logvar = moments.float().chunk(2, dim=1)  # (B, c, h, w) each
        self.logvar = logvar.clamp(-30, 20)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator=None):
        """mean + std * N(0, 1): (B, c, h, w). The noise is drawn on the generator's device; without
        a generator, on the CPU."""
        device = generator.device if generator else None
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self):
        """KL divergence from N(0, 1) in nats, summed over each latent: (B,)."""
        terms = self.mean.square() + self.std.square() - 1 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """LDM's KL autoencoder (https://arxiv.org/abs/2112.10752), f = 2^(len(ch_mult) - 1).

    ch              width of the first level
    ch_mult         each level's multiple of it
    num_res_blocks  residual blocks of a level; the decoder has one more
    attn_levels     levels with attention; the middle always has it
    z_channels      c of the latents
    use_quant_conv  1x1 convolutions between the latents and the two networks (SD3 has none)
    norm_groups     groups of every GroupNorm
    scaling_factor  what normalize() multiplies with; None while it is unknown
    shift_factor    what normalize() subtracts
    padding_mode    of all convolutions, "zeros" or "reflect". The row and the column that LDM pads
                    by hand before it halves the sides stay zeros
    """

    def __init__(
        self,
        ch=128,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attn_levels=(),
        z_channels=4,
        use_quant_conv=True,
        norm_groups=32,
        scaling_factor=None,
        shift_factor=0.0,
        padding_mode="zeros",
    ):
        config = constructor_arguments(locals())
        super().__init__()
        self.config = config  # what a checkpoint keeps
        self.factor = 2 ** (len(ch_mult) - 1)
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        shape = (ch, ch_mult, num_res_blocks, attn_levels)
        self.encoder = Encoder(*shape, 2 * z_channels, norm_groups)
        self.decoder = Decoder(*shape, z_channels, norm_groups)
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()
        if use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
            self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = padding_mode  # which it reads in forward()

    def grid(self, image_size):
        """(h, w) of the latents of images (H, W).

        InputError where f does not divide a side, or where padding by reflection would fail:
        reflection needs two cells a side, and scaling by .25 may leave only one, if a side has
        fewer than 8.
        """
        grid = latent_grid(image_size, self.factor)
        if self.config["padding_mode"] == "reflect" and min(grid) < 8:
            raise InputError(
                f"--image-size: give at least {8 * self.factor} pixels a side, since the "
                "convolutions pad by reflection"
            )
        return grid

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> Posterior (B, c, h, w), float32 under autocast too."""
        return Posterior(self.quant_conv(self.encoder(x)))

    def encode_mean(self, x):
        """The posterior's mean (B, c, h, w) for images x: what equivariance is measured on."""
        return self.encode(x).mean

    def decode(self, z):
        """Latents (B, c, h, w) of encode() -> images (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z)).float()

    def normalize(self, z):
        """Latents of encode() -> what generators train on, of about unit variance.

        ValueError while the scale is unknown.
        """
        self.check_scale()
        return (z - self.shift_factor) * self.scaling_factor

    def check_scale(self):
        if self.scaling_factor is None:
            raise ValueError(
                "this autoencoder's latent scale is unknown: measure it with vae.measure_latents()"
            )

    def denormalize(self, z):
        """What normalize() gave -> latents for decode(). ValueError while the scale is unknown."""
        self.check_scale()
        return z / self.scaling_factor + self.shift_factor


def constructor_arguments(names):
    """The locals() of a constructor -> its arguments, with which to build the same network again.

    (Python adds __class__ to the locals of a method that calls super().)
    """
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}


def latent_grid(image_size, factor):
    height, width = image_size
    if height % factor or width % factor or min(height, width) < factor:
        lower = "x".join(str(max(1, side // factor) * factor) for side in image_size)
        upper = "x".join(str(math.ceil(side / factor) * factor) for side in image_size)
        near = lower if lower == upper else f"{lower} and {upper}"
        raise InputError(
            f"--image-size {height}x{width}: not a multiple of {factor}; nearest: {near}"
        )
    return (height // factor, width // factor)


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d that takes its statistics over the micro-batches of all processes.

    nn.SyncBatchNorm does so on GPUs alone, and makes the host wait in every layer.
    """

    def forward(self, x):  # (b, C, H, W)
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        full = x.float()
        mean = self.over_processes(full.mean(dim=(0, 2, 3)))
        centred = full - mean[:, None, None]
        variance = self.over_processes(centred.square().mean(dim=(0, 2, 3)))
        with torch.no_grad():
            n = dist.get_world_size() * full.numel() // full.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @staticmethod
    def over_processes(values):
        """The mean over processes, with gradients."""
        return torch.distributed.nn.functional.all_reduce(values) / dist.get_world_size()


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (pix2pix) as taming-transformers has it.

    Images (B, 3, H, W) of at least 24 pixels -> logits (B, 1, H / 8 - 2, W / 8 - 2).
    """

    min_pixels = 24  # smaller images leave no logit

    def __init__(self):
        layers = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers.append(nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False))
            layers.append(BatchNorm(c_out))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(512, 1, 4, padding=1))
        super().__init__(OrderedDict(main=nn.Sequential(*layers)))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)


# ==================================================================================================
# Losses: the GAN's adaptive weight, the discriminator's own loss, LPIPS


def loss_gradient(rec_loss, g_loss, reconstruction, last_layer, gan_weight, gan_acts):
    """The gradient of L_rec + weight * L_gan at the reconstruction, and VQ-GAN's adaptive weight.

    The weight makes the GAN's gradient `gan_weight` times as long as that of the reconstruction
    loss at the decoder's last layer W (VQ-GAN's Eq. 7, https://arxiv.org/abs/2012.09841). In
    plain autograd this function and the caller's backward pass would be, once the GAN acts,

        rec_norm = torch.autograd.grad(rec_loss, W, retain_graph=True)[0].norm()
        gan_norm = torch.autograd.grad(g_loss, W, retain_graph=True)[0].norm()
        weight = gan_weight * (rec_norm / (gan_norm + 1e-4)).clamp(0, 1e4)
        (rec_loss + weight * g_loss + regularizer).backward()    # regularizer: the KL term

    Both losses depend on the autoencoder through the reconstruction alone. So this function cuts
    the graph there: it takes each loss's gradient at the reconstruction once, and carries the two
    on to W for their norms, which costs one convolution each. The caller sends the gradient of the
    sum through decoder and encoder. So there is one backward pass through LPIPS and one through the
    discriminator, instead of two. The discriminator gets no gradient here, because autograd.grad
    computes only what it is asked for.

    rec_loss, g_loss   scalars that depend on `reconstruction` (b, 3, H, W); g_loss None: no GAN
    last_layer         W, the weight of the convolution that made the reconstruction
    gan_acts           whether L_gan is in the sum; if not, its weight is computed for the log

    -> (gradient (b, 3, H, W), dict of scalars for the log). With several processes the norms are
       those of the gradients' mean over processes, so all of them get the same weight. (Each
       micro-batch has a weight of its own.)
    """
    (gradient,) = torch.autograd.grad(rec_loss, reconstruction)
    scalars = {}
    if g_loss is not None:
        (gan_gradient,) = torch.autograd.grad(g_loss, reconstruction)

        def norm_at_last_layer(output_gradient):
            (layer_gradient,) = torch.autograd.grad(
                reconstruction, last_layer, output_gradient, retain_graph=True
            )
            return mean_over_processes(layer_gradient).norm()

        ratio = norm_at_last_layer(gradient) / (norm_at_last_layer(gan_gradient) + 1e-4)
        weight = gan_weight * ratio.clamp(max=1e4)
        scalars = dict(d_weight=weight, clamped=(ratio >= 1e4).float())
        if gan_acts:
            gradient = gradient + weight * gan_gradient
    # L1's gradient is 0 where a value is NaN, which would hide it. With 0 * loss added the gradient
    # is NaN, too, and the step is skipped
    return gradient + 0 * rec_loss.detach(), scalars


def backward_from(reconstruction, gradient, regularizer, share):
    """The backward pass through the autoencoder, from the gradient at its reconstruction and from
    the regulariser, a scalar: the KL term, and Eq. 4 with --explicit-weight; in vqgan.py the
    codebook's loss. Gradient and regulariser are multiplied by `share`, this micro-batch's part
    of the batch."""
    ends = [reconstruction]
    gradients = [gradient * share]
    if regularizer.requires_grad:  # it does not with --train decoder
        ends.append(regularizer)
        gradients.append(torch.full_like(regularizer, share))
    torch.autograd.backward(ends, gradients)


def hinge_loss(real, fake):
    """The discriminator's loss from its logits on images and on reconstructions."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


def load_lpips(vgg=None):
    """The frozen LPIPS network (VGG16, v0.1) of the lpips package.

    Two images (B, 3, H, W) in [-1, 1], of at least 16 pixels -> distances (B, 1, 1, 1).
    vgg  a file of torchvision's VGG16; None: from torch hub's cache, else downloaded; "random":
         untrained weights, for tests. InputError says which file to put where.
    """
    lpips = import_lpips()
    with warnings.catch_warnings():  # it uses names that torchvision has deprecated
        warnings.simplefilter("ignore")
        # pnet_rand: VGG16's weights are loaded below; the linear layers come with the package
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    network = network.eval().requires_grad_(False)
    if vgg == "random":
        return network
    hint = "or go on without: --lpips-weight 0 (evaluate.py: --no-lpips)"
    path = vgg or download(VGG16_URL, "LPIPS needs VGG16's weights", hint)
    weights = read_file(path)
    if "lin0.model.1.weight" in weights:
        raise InputError(f"{path}: holds LPIPS' linear layers, not VGG16, which is wanted")
    # lpips cuts VGG16 into five slices; the numbers in its names are torchvision's.
    renamed = {}
    for name in network.net.state_dict():
        theirs = "features." + name.partition(".")[2]
        if theirs in weights:
            renamed[name] = weights[theirs]
    load_weights(network.net, renamed, path)
    return network


def import_lpips():
    """The lpips package, which imports torchvision. PyPI's torchvision is built for CUDA: beside a
    CPU torch its import fails because two operators are missing. LPIPS needs neither, so empty ones
    are defined."""
    try:
        import lpips
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "() -> ()")
        import lpips
    return lpips


def load_perceptual(args, device):
    """The perceptual distance of the loss: images x, y (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1);
    None with --lpips-weight 0.

    --perceptual MODULE:FUNCTION names a function of (path, device) that returns such a distance;
    path is --vgg.
    """
    if not args.lpips_weight:
        return None
    if args.perceptual == "lpips":
        return load_lpips(args.vgg).to(device)
    return call_function(args.perceptual, "--perceptual", args.vgg, device)


def load_ssim(args):
    """evaluate.py's ssim(), differentiable, of images in [-1, 1] -> (B,); None with weight 0."""
    if not args.ssim_weight:
        return None
    return importlib.import_module("evaluate").ssim  # which imports this file


def weighted_losses(args, target, reconstruction, perceptual, ssim):
    """The losses besides L1, each a mean over images: -> (their weighted sum, dict for the log). A
    loss of weight 0 is not computed."""
    total = 0
    losses = {}
    if args.lpips_weight:
        losses["lpips"] = perceptual(target, reconstruction).mean()
        total = total + args.lpips_weight * losses["lpips"]
    if args.l2_weight:
        losses["l2"] = (target - reconstruction).square().mean()
        total = total + args.l2_weight * losses["l2"]
    if args.ssim_weight:
        losses["ssim"] = ssim(target, reconstruction, data_range=2.0).mean()
        total = total + args.ssim_weight * (1 - losses["ssim"])
    return total, losses


# ==================================================================================================
# Training, Eq. 7: Eq. 1 with probability p_alpha, else Eq. 5


def train(args, rank, world, device):
    # The networks: of the run to go on with, of --init, or new ones. All processes begin with equal
    # weights because of the seed. For flags that were not given, load_run() sets args to what the
    # run was made with, starting_point() sets args.model, make_discriminator() args.disc_start.
    # `required` entries must be in the run's file, if only as None
    resumed = load_run(
        args, "AutoencoderKL", CONFIGS, required=("disc", "opt_disc", "ema", "latent")
    )
    check_needs(args)  # InputError for --vgg with --lpips-weight 0, and the like
    torch.manual_seed(args.seed)
    # A file without a configuration, as kl-f8.ckpt, is taken for "sd" if its weights fit
    read = functools.partial(read_autoencoder, default="sd")
    stored = starting_point(args, resumed, CONFIGS, read)  # configuration and weights: a Stored
    check_options(args, stored)
    set_padding_mode(args, resumed, stored)
    step = resumed["step"] if resumed else 0
    model = build(AutoencoderKL, stored)
    discriminator = make_discriminator(args, stored, step)
    perceptual = load_perceptual(args, device)
    ssim = load_ssim(args)

    # The images. All that can be wrong with the arguments is found before Log writes anything
    grid = model.grid(args.image_size)
    smallest = smallest_cells(args, grid, model.factor)  # no side is shrunk below it
    micro_batch = images_per_pass(args, world)
    data = ImageFolder(args.data, args.image_size, crop="random", seed=args.seed)
    # Shown in every preview: 8 images, one batch
    shown = next(evenly_spaced(data.centred(), n=8, device=device))

    # The optimisers, and the average of the weights. (What --train decoder freezes is in the
    # optimiser, too; it has no gradient, so Adam leaves it)
    networks = [network for network in (model, discriminator) if network is not None]
    for network in networks:
        network.to(device, memory_format=convolution_layout(device)).train()
    set_trained_part(model, args.train)
    checkpoint_activations(model, args.checkpoint_activations)
    optimizers = [
        torch.optim.Adam(network.parameters(), args.lr, betas=(0.5, 0.9), fused=True)
        for network in networks
    ]
    restore_optimizers(optimizers, resumed)
    parameters = trainable_parameters(*networks)
    buffers = list(discriminator.buffers()) if discriminator is not None else []  # BatchNorm's
    ema = start_ema(model, args.ema_decay, resumed, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    check_same_start(step, model, data)  # compares processes
    # On a CPU a forward pass is timed, to warn of a run that will take hours
    say_duration(args, step, device, lambda: model.decode(model.encode_mean(shown[:1])))
    batches = endless_batches(data, args, step, rank, world)
    log = Log(args, step, world, device)
    say_start(args, model, data, world, micro_batch, device)
    if resumed is None:
        preview(args, step, log, model.encode_mean, model.decode, shown, grid, autocast)
    first_step = step
    had_scale = resumed is not None and resumed["latent"] is not None
    resumed = stored = None  # frees the loaded tensors
    log.begin(step)

    while step < args.steps and not stop_signal():
        # ------------------------------------------------------------------------------------------
        # TRAINING STEP. tau is a function of (seed, step): with probability p_alpha the identity
        # (Eq. 1), else a transform of the kind --tau (Eq. 5). The batch has one, in all processes.
        # `shrink` is the identity, except with --recipe release, the authors' code: there some of
        # the steps of Eq. 1 train on smaller images. `explicit_tau` is None, except with
        # --explicit-weight (the paper's Table 7): in the steps of Eq. 5 it is what was drawn, and
        # tau is the identity. The noise, too, is a function of (seed, step). It is drawn for the
        # whole batch, and this process takes its rows
        host_rng, rng = step_rngs(args.seed, step, device)
        shrink, tau, explicit_tau = draw_transforms(args, grid, smallest, host_rng)
        images, _labels, _indices, readable = next(batches)  # images (B / world, 3, H, W) uint8
        shape = (args.batch_size, model.config["z_channels"], *shrink.size)  # h, w of the latents
        noise = rank_slice(torch.randn(shape, generator=rng, device=device), rank, world)
        log.count(unreadable=(~readable).sum())  # files, for which others stand in
        # The running means and variances of the discriminator, put back if the step is skipped
        buffers_before = [buffer.clone() for buffer in buffers]

        parts = list(zip(images.split(micro_batch), noise.split(micro_batch)))
        share = 1 / len(parts)  # the parts are equally large
        for images_part, noise_part in parts:
            x = shrink(to_float(images_part, device))  # (b, 3, H, W), or shrunk; in [-1, 1]
            with autocast:
                posterior = model.encode(x)
                z = posterior.mean + posterior.std * noise_part  # (b, c, h, w)
                target = tau(x)  # EQ-VAE (in LDM: x)
                reconstruction = model.decode(tau(z))  # EQ-VAE (in LDM: decode(z))

            # L_rec. LDM adds an image's LPIPS to each of its values' absolute error, and sums: that
            # is (mean error + LPIPS) times the number of values. The KL term is a sum over the
            # posterior, before tau. So where tau shrinks the image, L_rec weighs less beside KL.
            # `other_losses` is the weighted sum of LPIPS, L2 and 1 - SSIM
            num_values = target[0].numel()
            l1 = (target - reconstruction).abs().mean()
            other_losses, for_log = weighted_losses(args, target, reconstruction, perceptual, ssim)
            rec_loss = (l1 + other_losses) * num_values
            kl = posterior.kl().mean()
            regularizer = args.kl_weight * kl
            # Table 7's ablation: Eq. 4 in the place of Eq. 5
            if explicit_tau is not None:
                with autocast:
                    explicit = eqloss.explicit_loss(
                        model.encode_mean, x, explicit_tau, args.stop_gradient
                    )
                regularizer = regularizer + args.explicit_weight * explicit
                log.add(explicit=explicit)
            # rec_loss is logged per value, since the sum jumps with the size that tau leaves
            log.add(l1=l1, **for_log, rec_loss=rec_loss / num_values, kl=kl)

            # L_gan, here g_loss, acts from disc_start on. d_loss trains the discriminator from the
            # first step on, from a detached reconstruction, and loss_gradient() gives no gradient
            # of g_loss to the discriminator. (In LDM d_loss waits for disc_start as well, and comes
            # after the autoencoder's step, from a new reconstruction)
            g_loss = None
            if discriminator is not None:
                with autocast:
                    g_loss = -discriminator(reconstruction).float().mean()
                    real = discriminator(target).float()
                    fake = discriminator(reconstruction.detach()).float()
                d_loss = hinge_loss(real, fake)
                # The hinge's gradient can be finite although d_loss is not. With 0 * d_loss added
                # it is NaN then, and the step is skipped
                d_loss.backward(share + 0 * d_loss.detach())
                log.add(g_loss=g_loss, d_loss=d_loss, logits_real=real, logits_fake=fake)

            # (L_rec + w L_gan + regulariser).backward(), in two parts. loss_gradient() takes the
            # gradient of the two losses at the reconstruction, with VQ-GAN's adaptive weight w:
            # --gan-weight times |gradient of L_rec| / |gradient of L_gan| at the decoder's last
            # layer. backward_from() carries that gradient on through decoder and encoder, and the
            # regulariser's through the encoder
            gradient, scalars = loss_gradient(
                rec_loss,
                g_loss,
                reconstruction,
                model.decoder.conv_out.weight,
                args.gan_weight,
                gan_acts=discriminator is not None and step >= args.disc_start,
            )
            log.add(**scalars)
            backward_from(reconstruction, gradient, regularizer, share)

        # The step. If the gradients' norm is not finite, both networks keep their weights. The host
        # need not wait for the norm, since a fused optimiser does nothing where its attribute
        # found_inf is 1 (made for GradScaler, which is not used here)
        average_gradients(parameters)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = (~grad_norm.isfinite()).float()
        for optimizer in optimizers:
            optimizer.found_inf = skipped
            optimizer.step()
            optimizer.zero_grad()
        restore_where(skipped, buffers, buffers_before)
        update_ema(ema, model, args.ema_decay, step)
        step += 1
        # ------------------------------------------------------------------------------------------
        log.step(step, skipped, grad_norm, args.lr)
        if is_due(step, args.sample_every, last=args.steps):
            preview(args, step, log, model.encode_mean, model.decode, shown, grid, autocast)
        if is_due(step, args.save_every) and step < args.steps:
            save_autoencoder(args, step, networks, optimizers, ema)

    # Saves if a step was taken, if the file has no scale of the latents yet, or if --latent-scale
    # asks a finished run for it once more. A stopped run is saved without a scale
    asks_again = step >= args.steps and "latent_scale" in args.given
    if step > first_step or not had_scale or asks_again:
        latent = final_scale(args, step, model, ema, data, device)
        save_autoencoder(args, step, networks, optimizers, ema, latent)
    log.end(step)


def check_options(args, stored):
    """InputError for an option that conflicts with another one, or with the weights that training
    begins with."""
    if args.train == "decoder" and args.explicit_weight:
        raise InputError("--explicit-weight: trains the encoder, which --train decoder keeps")
    if args.latent_scale == "published" and stored.config.get("scaling_factor") is None:
        raise InputError(f"--latent-scale published: {stored.path} tells none; give measured")


def set_padding_mode(args, resumed, stored):
    """Applies --padding-mode to a new run. InputError if a resumed one was trained with another."""
    padding_mode = stored.config.get("padding_mode", "zeros")
    if args.padding_mode in (None, padding_mode):
        return
    if resumed is not None:
        raise InputError(
            f"{args.out}: was trained with --padding-mode {padding_mode}; give another --out"
        )
    if args.train == "decoder" and stored.weights is not None:
        raise InputError(
            f"--padding-mode {args.padding_mode}: changes the encoder that --train decoder keeps; "
            "leave one of the two out. If --init was trained with it, but its file does not say, "
            "write a file that does: --export NAME with --padding-mode"
        )
    stored.config = dict(stored.config, padding_mode=args.padding_mode)


def draw_transforms(args, grid, smallest, generator):
    """-> (shrink, tau, explicit_tau).

    shrink        of the images before they are encoded; the identity, except with --recipe release
    tau           of images and latents alike (Eq. 5)
    explicit_tau  None, except with --explicit-weight (Table 7's ablation) in steps that draw no
                  identity: then the drawn transform is for Eq. 4, and tau is the identity, so that
                  reconstructions are plain
    """
    options = dict(p_alpha=args.p_alpha, kind=args.tau, smallest=smallest, generator=generator)
    if args.recipe == "release":
        shrink, tau = released_transform(grid, **options)
    else:
        shrink, tau = identity_transform(grid), sample_transform(grid, **options)
    if tau.is_identity or not getattr(args, "explicit_weight", 0):  # vqgan.py has no such flag
        return shrink, tau, None
    return shrink, identity_transform(grid), tau


def smallest_cells(args, grid, factor):
    """The smallest side, in latent cells, to which images may be shrunk by tau, or by the released
    code's draw: SSIM needs images of 6 pixels (it reflects 5 at each border), LPIPS of 16, the
    discriminator of 24. InputError if images of this size leave nothing to draw from."""
    pixels = 1
    if args.ssim_weight:
        pixels = 6
    if args.lpips_weight:
        pixels = 16
    if args.gan_weight:
        pixels = PatchDiscriminator.min_pixels
    cells = math.ceil(pixels / factor)
    # The released code also shrinks images where tau is the identity
    are_shrunk = args.tau != "r" and (args.p_alpha < 1 or args.recipe == "release")
    needed = cells + 1 if are_shrunk else cells
    if min(grid) < needed:
        text = f"--image-size: give at least {needed * factor} pixels a side"
        if are_shrunk:
            text += ", since tau shrinks the images; or take --tau r, which only turns them"
        raise InputError(f"{text}. The losses need {pixels}")
    return cells


def make_discriminator(args, stored, step):
    """The discriminator, with the weights that came with the autoencoder, if any; None without GAN.

    Also sets args.disc_start where it was not given: a discriminator with weights enters the loss
    at once, a new one is trained for 1,000 steps first. A run that goes on has the value from its
    checkpoint, unless its discriminator is new, because it had none before.
    """
    if not args.gan_weight:
        return None
    discriminator = PatchDiscriminator()
    if stored.disc:
        load_weights(discriminator, stored.disc, stored.path)
    is_new = not stored.disc
    if args.disc_start is None or (is_new and "disc_start" not in args.given):
        args.disc_start = step + 1000 if is_new else 0
    return discriminator


def set_trained_part(model, part):
    """With part "decoder" the encoder, and a VQ-GAN's codebook, keep their weights. So the latents
    stay what they are."""
    for name, parameter in model.named_parameters():
        is_decoder = name.startswith(("decoder.", "post_quant_conv."))
        parameter.requires_grad = is_decoder or part == "all"


def checkpoint_activations(model, wanted):
    for module in model.modules():
        if isinstance(module, Level):
            module.recompute = wanted


@torch.no_grad()
def preview(args, step, log, encode, decode, images, grid, autocast):
    """Writes OUT/0001000.png (x, D(E(x)), tau o x and D(tau o E(x)) of the same images each time)
    and a line of the log with their equivariance errors and PSNR."""
    if not MAIN or not args.sample_every:
        return
    encode = in_passes(encode, most_at_once(args))
    decode = in_passes(decode, most_at_once(args))
    tau = scale_transform(0.5, grid, quarter_turns=1)
    with autocast:
        z = encode(images)
        decoded = decode(z).clamp(-1, 1)
        transformed = decode(tau(z))
        record = eqloss.rotation_and_scale_error(encode, images, grid)
    mse = ((images - decoded) / 2).square().mean(dim=(1, 2, 3))
    record["PSNR"] = -10 * mse.log10().mean().item()
    rows = [images, decoded, tau(images), transformed]
    log.picture(step, image_grid(rows, captions=("x", "D(E(x))", "tau x", "D(tau E(x))")))
    log.write(dict(step=step, **record))
    say(
        f"step {step}: equivariance errors R {record['R']:.3f}, S {record['S']:.3f} (0 is best), "
        f"PSNR {record['PSNR']:.2f} dB (more is better)"
    )


def most_at_once(args):
    """How many images previews and measurements take at a time: no more than a pass of a training
    step, so they fit into memory, too."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return min(16, args.micro_batch or args.batch_size // world)


def in_passes(function, size):
    """The same function of a batch, which computes `size` of its rows at a time."""
    return lambda batch: torch.cat([function(part) for part in batch.split(size)])


@torch.no_grad()
def final_scale(args, step, model, ema, data, device):
    """The latents' scale and shift for the checkpoint of a finished run; None if it was stopped.

    With --latent-scale published, or with --train decoder where they are known, they are those of
    the weights that training began from. Else the first process measures them; the other processes,
    and --bench, get None.
    """
    if step < args.steps:
        return None
    is_fixed = args.train == "decoder" and model.scaling_factor is not None
    if args.latent_scale == "published" or is_fixed:
        return dict(scale=model.scaling_factor, shift=model.shift_factor)
    if not MAIN or args.bench:
        return None
    averaged = averaged_model(model, ema, device)
    latent = measure_latents(averaged, data.centred(), batch_size=most_at_once(args))
    text = f"latents: scale {latent['scale']:.5f}, shift {latent['shift']:.4f}, measured"
    if model.scaling_factor is not None:
        text += (
            f"; generators that were trained with {model.scaling_factor} and {model.shift_factor} "
            "need those: give the same command with --latent-scale published"
        )
    say(text)
    return latent


def averaged_model(model, ema, device):
    """A copy of the network as load_autoencoder() would give it: with the average of the weights
    where there is one."""
    used = type(model)(**model.config).to(device)
    used.load_state_dict(ema or model.state_dict())
    return used


@torch.no_grad()
def measure_latents(model, data, n=1024, batch_size=16):
    """Scale and shift of an autoencoder's latents, over n evenly spaced images of an ImageFolder,
    of which batch_size are encoded at a time.

    -> dict of
    scale      1 / std of all values of posterior samples (LDM's scale_by_std)
    shift      their mean if the configuration has a shift (SD3), else 0
    mean, std  of each channel, lists
    images     how many were measured
    """
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    batches = evenly_spaced(data, n, device, batch_size)
    samples = [model.encode(x).sample(generator).cpu() for x in batches]
    z = torch.cat(samples).double()  # (N, c, h, w)
    channels = z.transpose(0, 1).flatten(1)  # (c, N h w)
    return dict(
        scale=1 / z.std().item(),
        shift=z.mean().item() if model.config["shift_factor"] else 0.0,
        mean=channels.mean(dim=1).tolist(),
        std=channels.std(dim=1).tolist(),
        images=len(z),
    )


def save_autoencoder(args, step, networks, optimizers, ema, latent=None):
    """Writes args.out, a dictionary of plain data.

    arch, config    class and arguments of the network
    model, ema      its weights, and their average or None
    disc            the discriminator's weights or None
    opt, opt_disc   the optimisers' states
    step, args      steps taken, the command's arguments
    latent          scale and shift of a KL autoencoder's latents; None until the end, and for a
                    VQ-GAN
    """
    model = networks[0]
    checkpoint = dict(
        arch=type(model).__name__,
        config=model.config,
        model=model.state_dict(),
        ema=ema,
        opt=optimizers[0].state_dict(),
        disc=None,
        opt_disc=None,
        step=step,
        args=saved_arguments(args),
        latent=latent,
    )
    if len(networks) == 2:
        checkpoint["disc"] = networks[1].state_dict()
        checkpoint["opt_disc"] = optimizers[1].state_dict()
    save_run(args, checkpoint)


# ==================================================================================================
# The command line


def arguments(description, configs, init, out):
    """-> the parser of a script that trains an autoencoder, and its groups of flags for the
    autoencoder and for the objective."""
    parser = make_parser(description)
    autoencoder = parser.add_argument_group("autoencoder")
    add = autoencoder.add_argument
    add("--image-size", type=image_size, default=(256, 256), help="256, or HxW")
    add("--init", default=init, help="file or folder to start from or export, or scratch")
    text = "preset, if --init is scratch or a file without a configuration"
    add("--model", choices=configs, help=text)
    text = "convert --init to this new folder (vae.py: or NAME.safetensors, one file); do not train"
    add("--export", metavar="NAME", help=text)
    add("--train", choices=("all", "decoder"), default="all", help="the part to train")
    text = "compute blocks again in the backward pass: less memory, more time"
    add("--checkpoint-activations", action="store_true", help=text)
    text = "keep an average of the weights; 0: none"
    add("--ema-decay", type=probability, default=0.0, help=text)
    objective = parser.add_argument_group("objective")
    add = objective.add_argument
    add("--p-alpha", type=probability, default=0.5, help="probability of tau = identity")
    add("--tau", choices=eqloss.KINDS, default="rs", help="r: rotation, s: scale (Table 5)")
    text = "draw tau as the paper says, or as the released code does"
    add("--recipe", choices=("paper", "release"), default="paper", help=text)
    add("--lpips-weight", type=non_negative, default=1.0, help="of LPIPS; L1 has weight 1")
    add("--l2-weight", type=non_negative, default=0.0, help="of the squared error")
    add("--ssim-weight", type=non_negative, default=0.0, help="of 1 - SSIM")
    text = "the distance of --lpips-weight: lpips, or MODULE:FUNCTION, see load_perceptual()"
    add("--perceptual", default="lpips", help=text)
    add("--vgg", help="VGG16's weights for LPIPS (default: torch hub's), or random")
    add("--gan-weight", type=non_negative, default=0.5, help="0: no GAN")
    text = "first step of the GAN term (default: 0 if --init has a discriminator, else 1000)"
    add("--disc-start", type=whole_number, help=text)
    add_run_arguments(
        parser,
        data="data/openimages",
        out=out,
        steps=50_000,
        batch_size=160,
        lr=4.5e-5,
        save_every=1000,
        sample_every=1000,
    )
    return parser, autoencoder, objective


def main():
    parser, autoencoder, objective = arguments(__doc__, CONFIGS, "data/kl-f8.ckpt", "eqvae.pt")
    text = "of the autoencoder's convolutions (default: as its file tells, else zeros)"
    autoencoder.add_argument("--padding-mode", choices=("zeros", "reflect"), help=text)
    add = objective.add_argument
    add("--kl-weight", type=non_negative, default=1e-6, help="of the KL term")
    text = "train Eq. 4 with this weight instead of Eq. 5 (Table 7: 0.1)"
    add("--explicit-weight", type=non_negative, default=0.0, help=text)
    text = "Eq. 4: take E(tau o x) as a fixed target"
    add("--stop-gradient", action="store_true", help=text)
    add = parser.add_argument_group("result").add_argument
    text = "--export in 16 bits"
    add("--half", choices=HALVES, help=text)
    scales = ("measured", "published")
    text = "what a finished run stores as the scale of its latents"
    add("--latent-scale", choices=scales, default="measured", help=text)
    layouts = ("diffusers", "ldm")
    text = "of --export's folder. (A NAME that ends in .safetensors is one file in LDM's names.)"
    add("--layout", choices=layouts, default="diffusers", help=text)
    launch_trainer(parser, train, export)


HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def check_needs(args):
    """InputError for a flag on the command line that belongs to a loss of weight 0."""
    needs = {
        "perceptual": "lpips_weight",
        "vgg": "lpips_weight",
        "disc_start": "gan_weight",
        "stop_gradient": "explicit_weight",
    }
    for name, weight in needs.items():
        if name in args.given and not getattr(args, weight):
            flag = f"--{name.replace('_', '-')}"
            other = f"--{weight.replace('_', '-')}"
            raise InputError(f"{flag}: is not read without {other}")


def launch_trainer(parser, train, export):
    """Runs the command line of vae.py or vqgan.py: train(), or with --export export()."""

    def run(args, rank, world, device):
        if args.export:
            # --export reads these flags alone
            also = ("export", "init", "model", "layout", "half", "padding_mode")
            check_flags(args, mode="with --export", groups=(), also=also)
            export(args)
        else:
            groups = ("autoencoder", "objective", "run")
            check_flags(args, mode="without --export", groups=groups, also=("latent_scale",))
            train(args, rank, world, device)

    launch(parser, run)


# ==================================================================================================
# Files in and out: our own checkpoints, LDM's (also inside Stable Diffusion's), diffusers'


@dataclass
class Stored:
    """What a file holds of a network."""

    path: str
    config: dict  # the arguments of its class
    weights: dict | None  # in our names, which are LDM's; None: new ones
    disc: dict | None = None  # the discriminator's weights
    image_size: tuple | None = None  # (H, W) that it was trained at, where the file tells


def starting_point(args, resumed, configs, read):
    """-> Stored: what training begins with. Where --model was not given, sets it, for the
    checkpoint's arguments and for --bench."""
    if resumed is not None:
        stored = Stored(args.out, resumed["config"], resumed["model"], resumed["disc"])
    elif args.init == "scratch":
        stored = Stored("scratch", configs[args.model or next(iter(configs))], None)
    else:
        stored = read(args.init, args.model)
    if args.model is None:
        args.model = next(iter(matching_presets(stored.config, configs)), None)
    return stored


def build(network_class, stored):
    """The network of a Stored. It is built on "meta" first, where weights take no
    memory, and compared with the file. InputError if its configuration describes no network, or one
    with other weights."""
    try:
        check_sizes(stored.config)
        with torch.device("meta"):
            planned = network_class(**stored.config)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        arch = network_class.__name__
        raise InputError(
            f"{stored.path}: its configuration does not describe a {arch} ({reason})"
        ) from None
    if stored.weights is None:
        return network_class(**stored.config)
    check_fit(planned, stored.weights, stored.path)
    model = network_class(**stored.config)
    model.load_state_dict(stored.weights)
    return model


def check_sizes(config):
    """ValueError for a value that no network of these scripts has. A configuration is somebody's
    text file, and torch builds a GroupNorm of -8 groups without a word, or a billion layers until
    memory is full."""
    choices = dict(padding_mode=("zeros", "reflect"), path=("linear", "gvp"))  # path: SiT's
    for name, value in config.items():
        if name in choices:
            is_right = value in choices[name]
        elif str(name).endswith(("_factor", "_ratio")) or name in ("beta", "dropout"):
            is_right = value is None or is_number(value)
        else:
            most = 200 if name in ("depth", "num_res_blocks", "encoder_depth") else 2**18
            sizes = value if isinstance(value, (tuple, list)) else [value]
            is_right = len(sizes) <= 100
            is_right = is_right and all(isinstance(n, int) and 0 <= n <= most for n in sizes)
        if not is_right:
            raise ValueError(f"{name} = {str(value)[:60]}")


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def load_autoencoder(path, model=None, padding_mode=None, flag="--model"):
    """The KL autoencoder in a file or folder, loaded strictly, on the CPU, for inference.

    path   our checkpoint (its average where it has one), an LDM .ckpt, a Stable Diffusion one, a
           file or folder of diffusers
    model  the preset of CONFIGS, for files that do not tell their configuration
    padding_mode  of all convolutions, in place of what the file tells: give "reflect" for an
           autoencoder that was trained so, if its file does not say it
    flag   what the command line calls `model`, for the message that asks for it
    """
    stored = read_autoencoder(path, model, padding_mode=padding_mode, flag=flag)
    network = build(AutoencoderKL, stored).eval().requires_grad_(False)
    network.image_size = stored.image_size
    return network


def read_autoencoder(path, model=None, default=None, padding_mode=None, flag="--model"):
    """-> Stored: the autoencoder in a file or folder that load_autoencoder() knows.

    Where the file does not tell the configuration, `model`, else `default`, names the preset.
    Where it does, it must be that of `model`, if one is given.
    """
    file = find_file(path)
    checkpoint = read_file(file)
    if is_ours(checkpoint):
        stored = read_ours(file, checkpoint, "AutoencoderKL")
    else:
        stored = read_foreign(file, checkpoint, model, default, flag)
    if padding_mode is not None:
        stored.config = dict(stored.config, padding_mode=padding_mode)
    fitting = matching_presets(stored.config)
    if model and model not in fitting:
        names = " or ".join(fitting) or "none of the presets"
        raise InputError(f"{path}: does not match {flag} {model}; it matches {names}")
    return stored


def find_file(path):
    """The file with the weights: path itself, or the one in a folder of diffusers' or of ours."""
    if not os.path.isdir(path):
        return Path(path)
    stem = "diffusion_pytorch_model"
    for folder in (Path(path), Path(path, "vae_ema"), Path(path, "vae")):
        for ending in ("safetensors", "bin"):
            # The plain name first, then variants, as diffusion_pytorch_model.fp16.safetensors
            variants = sorted(folder.glob(f"{stem}.*.{ending}"))
            shards = folder / f"{stem}.{ending}.index.json"
            for file in (folder / f"{stem}.{ending}", *variants, shards):
                if file.is_file():
                    return file
    for name in ("model.ckpt", "ckpts/last.ckpt"):  # what --export --layout ldm and vqgan.py write
        if Path(path, name).is_file():
            return Path(path, name)
    raise InputError(
        f"{path}: no weights in this folder ({stem}.safetensors or .bin, model.ckpt, last.ckpt)"
    )


def is_ours(checkpoint):
    """Whether one of our scripts wrote it."""
    archs = ("AutoencoderKL", "VQGAN", "DiT", "SiT", "REPA", "MaskGIT")
    return checkpoint.get("arch") in archs


def read_ours(path, checkpoint, arch):
    """-> Stored, from a checkpoint of vae.py or vqgan.py, the average where there is one."""
    if checkpoint["arch"] != arch:
        raise InputError(f"{path}: holds a {checkpoint['arch']}, not a {arch}")
    check_entries(path, checkpoint, ("model", "ema", "disc", "step", "args", "latent"))
    config = dict(checkpoint["config"])
    if arch == "AutoencoderKL":
        # Until a fine-tune has finished, the scale of its latents is unknown: the configuration has
        # that of the weights that it began from. The old shift stays, because measure_latents()
        # measures a new one only where the old one is not 0
        latent = checkpoint["latent"] or dict(scale=None, shift=config.get("shift_factor"))
        config["scaling_factor"] = latent.get("scale")
        config["shift_factor"] = latent.get("shift")
    weights = checkpoint["ema"] or checkpoint["model"]
    size = checkpoint["args"].get("image_size")
    return Stored(path, config, weights, checkpoint["disc"], size)


def read_foreign(path, checkpoint, preset, default, flag):
    """-> Stored, from a file of LDM's or of diffusers'. The names of its tensors tell which it is.

    Without a configuration beside it the `preset` is needed; `default` is taken where it fits.
    """
    weights = find_weights(checkpoint, "encoder.conv_in.weight")
    if weights is None:
        raise InputError(
            f"{path}: no autoencoder in it, neither in our layout nor in LDM's or diffusers'"
        )
    disc = weights_under(weights, "loss.discriminator.")
    config = config_beside(path)
    if config is None:
        if preset is None:
            fitting = [name for name in CONFIGS if fits(weights, CONFIGS[name])]
            if default not in fitting:
                names = "|".join(fitting or CONFIGS)
                raise InputError(
                    f"{path}: has no configuration; name the autoencoder with {flag} {names}"
                )
            preset = default
        if preset not in CONFIGS:
            raise InputError(f"{flag} {preset}: unknown; one of {', '.join(CONFIGS)}")
        config = CONFIGS[preset]
        scale = config.get("scaling_factor", "unknown")
        shift = config.get("shift_factor", 0.0)
        text = f"{preset} is assumed, with latents of scale {scale}, shift {shift}"
        say(f"{path}: has no configuration; {text}")
    return Stored(path, config, in_our_names(weights, config, path), disc or None)


def fits(weights, config):
    """Whether they are the weights of such a network."""
    with torch.device("meta"):
        wanted = AutoencoderKL(**config).state_dict()
    ours = in_our_names(weights, config)
    shapes = {name: value.shape for name, value in ours.items()}
    return shapes == {name: value.shape for name, value in wanted.items()}


def in_our_names(weights, config, path="these weights"):
    """The weights of LDM's or diffusers' file, renamed to LDM's names, which our modules have."""
    weights = {rename(name, OLD_DIFFUSERS): value for name, value in weights.items()}
    if any(name.startswith("encoder.mid_block.") for name in weights):  # diffusers'
        names = {theirs: name for name, theirs in diffusers_names(config, path).items()}
        weights = {names.get(name, name): value for name, value in weights.items()}
    else:
        known = ("encoder.", "decoder.", "quant_", "post_quant_")
        weights = {name: value for name, value in weights.items() if name.startswith(known)}
    for name, value in weights.items():
        if ".attn" in name and value.dim() == 2:  # a linear layer there, a 1x1 convolution here
            weights[name] = value[..., None, None]
    return weights


def find_weights(checkpoint, anchor):
    """The weights of a network, in its own names, from somebody's checkpoint; None if not there.

    They may stand in the checkpoint itself, in a dictionary of it, or in one of that. An average of
    the weights is preferred.

    anchor  a name that the network has, as "encoder.conv_in.weight". Whatever stands before it is
            a prefix (module., first_stage_model., ...), and only what has this prefix is kept.
            torch.compile's _orig_mod. may stand anywhere.
    """
    holders = [("", checkpoint)]  # (name, dictionary)
    for key, value in checkpoint.items():
        if isinstance(value, dict):
            holders.append((str(key), value))
            inner = [(f"{key}.{name}", item) for name, item in value.items()]
            holders += [(name, item) for name, item in inner if isinstance(item, dict)]
    networks = []  # (what the file calls it, tensors, prefix of its tensors)
    for name, holder in holders:
        tensors = {}
        for key, value in holder.items():
            if isinstance(key, str) and isinstance(value, torch.Tensor):
                tensors[key.replace("_orig_mod.", "")] = value
        prefixes = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor)]
        prefixes.sort(key=len)  # the outermost first
        networks += [(f"{name}.{prefix}".strip("."), tensors, prefix) for prefix in prefixes]
    if not networks:
        return None
    networks.sort(key=lambda network: not is_average(network[0]))
    taken, tensors, prefix = networks[0]
    say_averages(checkpoint, taken)
    # If an average is taken, the others are its plain weights, which need no message
    if len(networks) > 1 and not is_average(taken):
        others = shortened([other for other, _, _ in networks[1:]])
        say(f"several networks in one file: {taken or 'the first'} is taken, not {others}")
    return take_average(tensors, prefix)


def take_average(tensors, prefix):
    """The weights under a prefix, or their average, if LDM's LitEma left a complete one. It has the
    names model_ema.NAME, where NAME has lost its dots."""
    weights = weights_under(tensors, prefix)
    weights = {key: value for key, value in weights.items() if not key.startswith("model_ema.")}
    averages = {}
    for name in weights:
        dotless = name.replace(".", "")
        dotless_whole = (prefix + name).replace(".", "")
        candidates = (
            f"{prefix}model_ema.{dotless}",  # LitEma is a part of this network
            f"model_ema.{dotless_whole}",  # LitEma is of a model that this network is a part of
            f"model_ema.{dotless}",  # LitEma is of this network, and stands beside it
        )
        for key in candidates:
            if key in tensors:
                averages[name] = tensors[key]
    if averages:
        missing = [key for key in weights if key not in averages and not key.startswith("loss.")]
        if missing:
            say(f"model_ema: an incomplete average, without {missing[0]}; the weights are taken")
            return weights
        say("model_ema: an average of the weights, which is taken")
    return weights | averages


def is_average(name):
    """Whether a file's name for some weights says that they are an average."""
    found = re.search(r"(?<![a-z])(ema|swa)(?![a-z])|shadow|average|polyak", name.lower())
    return found is not None


def say_averages(checkpoint, taken):
    """Says if a file holds an average of the weights in a form that is not read here. (One that can
    be read would have been taken.)"""
    for key, value in checkpoint.items():
        is_one = is_average(str(key)) and isinstance(value, (dict, list)) and len(value) > 0
        if is_one and not is_average(taken):
            say(f"{key}: an average of the weights of unknown form; the weights are taken instead")


def weights_under(weights, prefix):
    """The entries whose names begin with the prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def matching_presets(config, configs=CONFIGS):
    """Names in configs that describe this network; those of equal scale come first. Only what a
    preset lists is compared, without scale and shift."""

    def is_same(preset):
        names = [name for name in preset if not name.endswith("_factor")]
        return all(config.get(name) == preset[name] for name in names)

    def has_other_scale(name):
        return configs[name].get("scaling_factor") != config.get("scaling_factor")

    return sorted((name for name in configs if is_same(configs[name])), key=has_other_scale)


# --------------------------------------------------------------------------------------------------
# diffusers' names for LDM's, in weights and in arguments. In diffusers the decoder's levels count
# from the coarsest, in LDM from the finest

DIFFUSERS = {
    "encoder.down.": "encoder.down_blocks.",
    "mid.block_1.": "mid_block.resnets.0.",
    ".block.": ".resnets.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.": "mid_block.attentions.0.",
    ".attn.": ".attentions.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
    ".norm.": ".group_norm.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".proj_out.": ".to_out.0.",
}
OLD_DIFFUSERS = {  # names in diffusers' old files, and today's
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
DIFFUSERS_ARGUMENTS = {
    "num_res_blocks": "layers_per_block",
    "z_channels": "latent_channels",
    "norm_groups": "norm_num_groups",
    "use_quant_conv": "use_quant_conv",
    "scaling_factor": "scaling_factor",
    "shift_factor": "shift_factor",
}
# Keys of config.json that would change numbers, with the only value that our network has.
ONLY_VALUES = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
}
NO_EFFECT = {
    "sample_size", "force_upcast", "up_block_types",
    # Of an average that diffusers' EMAModel saved
    "decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step",
    "use_ema_warmup",
}  # fmt: skip


def rename(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def diffusers_names(config, path="these weights"):
    """Each tensor's name in LDM -> in diffusers. `path` is for messages."""
    levels = len(config["ch_mult"])
    table = dict(DIFFUSERS)
    for i in range(levels):
        table[f"decoder.up.{i}."] = f"decoder.up_blocks.{levels - 1 - i}."
    with torch.device("meta"):
        network = build(AutoencoderKL, Stored(path, config, None))
    return {name: rename(name, table) for name in network.state_dict()}


def config_beside(path):
    """AutoencoderKL's arguments, from what --export keeps in a .safetensors file, from config.json
    of diffusers beside any file, or from the config.yaml that --export writes beside model.ckpt;
    None if there are none."""
    if is_safetensors(path):
        with import_safetensors().safe_open(path, "pt") as file:
            config = (file.metadata() or {}).get("eqvae")
        if config is not None:
            # Another program's entry of this name is passed over
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                return our_config(json.loads(config))
    if Path(path).name == "model.ckpt" and Path(path).with_name("config.yaml").is_file():
        # --export writes JSON, which is YAML. What is no JSON is LDM's own, or another program's
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            return our_config(read_json(Path(path).with_name("config.yaml"))["eqvae"])
    beside = Path(path).with_name("config.json")
    if not beside.is_file():
        return None
    try:
        return diffusers_config(read_json(beside))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{beside}: cannot be used as an AutoencoderKL's ({reason})") from None


def our_config(given):
    """A configuration of ours that JSON kept: it has lists in the place of tuples."""
    config = {}
    for name, value in given.items():
        config[name] = tuple(value) if isinstance(value, list) else value
    return config


def diffusers_config(given):
    """config.json of diffusers' AutoencoderKL -> AutoencoderKL's arguments.

    null counts as missing, but for the scale, which is then unknown. ValueError for a key that
    changes numbers in a way that is not implemented here.
    """
    scale = given.get("scaling_factor", 0.18215)  # diffusers' default
    given = {key: value for key, value in given.items() if value is not None}
    if given["_class_name"] != "AutoencoderKL":
        raise ValueError(f"it describes a {given['_class_name']}")
    widths = given["block_out_channels"]
    kinds = given["down_block_types"]
    # Our network has both 1x1 convolutions or neither
    only = ONLY_VALUES | dict(use_post_quant_conv=given.get("use_quant_conv", True))
    read = {*DIFFUSERS_ARGUMENTS.values(), "block_out_channels", "down_block_types", "padding_mode"}
    for key, value in given.items():
        if key in only and value != only[key]:
            raise ValueError(f"{key} = {str(value)[:60]}, where only {only[key]} is known here")
        if key not in {*only, *NO_EFFECT, *read} and not key.startswith("_"):
            raise ValueError(f"{key} is unknown here")
    config = {
        name: given[theirs] for name, theirs in DIFFUSERS_ARGUMENTS.items() if theirs in given
    }
    config["padding_mode"] = given.get("padding_mode", "zeros")
    config["scaling_factor"] = scale
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scaling_factor = {scale}")
    defaults = dict(num_res_blocks=1, z_channels=4, norm_groups=32, use_quant_conv=True)
    config = defaults | config  # diffusers' defaults
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels {widths} are no multiples of the first")
    config["ch"] = widths[0]
    config["ch_mult"] = tuple(width // widths[0] for width in widths)
    config["attn_levels"] = tuple(i for i, kind in enumerate(kinds) if kind.startswith("Attn"))
    return config


def export(args):
    """Writes what --init holds, its average where it has one: one file, or a folder."""
    check_export(args)
    if not MAIN:
        return
    stored = read_autoencoder(args.init, args.model, padding_mode=args.padding_mode)
    model = build(AutoencoderKL, stored)
    config = model.config
    if args.half:
        model.to(HALVES[args.half])
    if config["padding_mode"] != "zeros":
        say("its convolutions pad by reflection: other programs than ours have to be told")
    layout = args.layout
    if args.export.endswith(".safetensors"):
        layout = "ldm"
        write_file(args.export, lambda part: write_single(part, model))
    elif layout == "diffusers":
        write_file(args.export, lambda folder: write_diffusers(folder, model, stored))
    else:
        if config["norm_groups"] != 32:
            say(f"its norms have {config['norm_groups']} groups; LDM's own code builds 32")
        if not config["use_quant_conv"]:
            say("it has no quant_conv; LDM's own code builds one, with random weights")
        write_file(args.export, lambda folder: write_ldm(folder, model, stored))
    scale = config["scaling_factor"] or "unknown"
    say(f"{args.export}: {layout} layout, scale {scale}, shift {config['shift_factor']}")


def check_export(args):
    if args.init == "scratch":
        raise InputError("--export: give the file to export with --init")
    if os.path.exists(args.export):
        raise InputError(f"--export {args.export}: already there; give a new name")
    if args.export.endswith(".safetensors") and "layout" in args.given:
        raise InputError("--layout: is not read where --export is one file, in LDM's names")


def write_diffusers(folder, model, stored):
    folder.mkdir(parents=True)
    config = model.config
    safetensors = import_safetensors()
    names = diffusers_names(config)
    weights = {}
    for name, value in model.state_dict().items():
        if ".attn" in name and value.dim() == 4:
            value = value.flatten(1)  # a linear layer there
        weights[names[name]] = value.contiguous()
    data = safetensors.save(weights, dict(format="pt"))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(data)
    kinds = ["Attn" if i in config["attn_levels"] else "" for i in range(len(config["ch_mult"]))]
    description = dict(
        _class_name="AutoencoderKL",
        **ONLY_VALUES,
        block_out_channels=[config["ch"] * multiple for multiple in config["ch_mult"]],
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        force_upcast=True,
        use_post_quant_conv=config["use_quant_conv"],
        sample_size=max(stored.image_size or (256, 256)),  # diffusers tiles by it
    )
    for name, theirs in DIFFUSERS_ARGUMENTS.items():
        description[theirs] = config[name]
    description["shift_factor"] = config["shift_factor"] or None
    if config["padding_mode"] != "zeros":
        description["padding_mode"] = config["padding_mode"]  # for us: diffusers passes over it
    write_json(folder / "config.json", description)


def write_single(path, model):
    """One file in LDM's names, as ComfyUI, A1111 and kohya's trainers read it. Its metadata keep
    the configuration."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    about = dict(format="pt", eqvae=json.dumps(model.config))
    path.write_bytes(import_safetensors().save(weights, about))


def write_ldm(folder, model, stored):
    """model.ckpt and config.yaml, in LDM's words (JSON is YAML), with our own arguments beside."""
    folder.mkdir(parents=True)
    config = model.config
    autoencoder = dict(
        target="ldm.models.autoencoder.AutoencoderKL",
        params=dict(
            embed_dim=config["z_channels"],
            ddconfig=ldm_network(config, double_z=True),
            lossconfig=dict(target="torch.nn.Identity"),
        ),
    )
    description = dict(model=autoencoder, scale_factor=config["scaling_factor"], eqvae=config)
    torch.save(dict(state_dict=ldm_weights(model, stored)), folder / "model.ckpt")
    write_json(folder / "config.yaml", description)


def ldm_network(config, double_z):
    """Encoder and decoder in the words of LDM and taming, whose code builds them from this."""
    return dict(
        double_z=double_z,
        z_channels=config["z_channels"],
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=config["ch"],
        ch_mult=config["ch_mult"],
        num_res_blocks=config["num_res_blocks"],
        attn_resolutions=[256 >> level for level in config["attn_levels"]],
        dropout=0.0,
    )


def ldm_weights(model, stored):
    """The weights of the autoencoder and of its discriminator under LDM's and taming's names."""
    disc = {f"loss.discriminator.{name}": value for name, value in (stored.disc or {}).items()}
    return dict(model.state_dict()) | disc


def read_json(path):
    """The value in a file of JSON. ValueError, whatever is wrong with it."""
    try:
        return json.loads(Path(path).read_bytes())
    except RecursionError:
        raise ValueError("nested too deep") from None


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------
# The one reader of checkpoints. Nothing in a file is ever executed.


# Stand-ins for the classes and functions that a foreign pickle refers to and torch does not allow.
# A file does not say which of them are dictionaries, so unpickle() tries InertDict for all of them
# and, where torch's reader fails with it, Inert. For deque it is InertList


class Inert:
    """Does nothing and keeps nothing. The reader fails where the file puts items into it."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class InertDict:
    """Becomes an OrderedDict, the one kind of dictionary to which the reader gives both items and
    attributes. The reader fails where its state in the file is no dictionary."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


class InertList:
    """Becomes a list."""

    def __new__(cls, *args, **kwargs):
        return []


def read_file(path):
    """Loads any checkpoint as plain data, on the CPU, mapped from disk where torch can.

    InputError for what is no checkpoint, or is truncated; it says what the file looks like.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        hint = ""
        looks_like_file = path.endswith((".ckpt", ".pt", ".pth", ".bin", ".safetensors"))
        if looks_like_file:
            hint = "; make it, download it (--help says where from), or name another"
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.isdir(os.path.dirname(path)):
            hint = f"; if it is on the hub: hf download {path} --local-dir {os.path.basename(path)}"
        raise InputError(f"{path}: no such file{hint}")
    try:
        check_head(path)
        if path.endswith(".index.json"):  # of weights in several files
            return read_shards(path)
        if is_safetensors(path):
            return import_safetensors().load_file(path)
        checkpoint = unpickle(path)
    except InputError:
        raise
    except Exception as error:  # torch and safetensors raise a dozen kinds
        raise InputError(
            f"{path}: no checkpoint that can be read safely ({type(error).__name__}); "
            "it may be truncated: download it again"
        ) from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def read_shards(path):
    weights = {}
    for name in sorted(set(read_json(path)["weight_map"].values())):
        weights |= read_file(Path(path).with_name(name))
    return weights


def check_head(path):
    """InputError for the files that downloads leave in the place of weights."""
    with open(path, "rb") as file:
        head = file.read(200).lstrip().lower()
    if not head:
        raise InputError(f"{path}: an empty file; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the weights; run git lfs pull")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path}: a web page, not weights; the link needs a login or is gone")
    if head.isascii() and min(head) >= 9 and not path.endswith(".index.json"):
        raise InputError(f"{path}: text, not weights: {head[:60].decode()!r}")
    if zipfile.is_zipfile(path):  # as torch's files are
        with zipfile.ZipFile(path) as archive:
            is_torchs = any(name.endswith("data.pkl") for name in archive.namelist())
            if not is_torchs or any(member.compress_type for member in archive.infolist()):
                raise InputError(f"{path}: a zip archive; unpack it and give the file in it")


def is_safetensors(path):
    """Whether there is JSON after eight bytes, which are its length."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def unpickle(path):
    """The file's dictionaries, lists, tensors, numbers and texts. All else becomes None, or an
    empty dictionary."""
    names = []
    with contextlib.suppress(Exception):  # no zip file: torch.load alone decides
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    for stand_in in (InertDict, Inert):
        with contextlib.suppress(Exception):
            return plain(load_inert(path, names, stand_in))
    if names:
        some = ", ".join(names[:3])
        raise InputError(f"{path}: refused, because it holds more than weights ({some})")
    raise ValueError("cannot be unpickled")


def load_inert(path, names, stand_in):
    stand_ins = [(InertList if name == "collections.deque" else stand_in, name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, UnicodeError):
            # Files from before torch 1.6 cannot be mapped, nor those whose paths are no UTF-8
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)


def plain(value):
    """A copy without what stand-ins left. Tensors are not copied."""
    if isinstance(value, dict):
        # Not value.items(): a file may give an OrderedDict an attribute of this name
        return {key: plain(item) for key, item in dict.items(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str, bytes)):
        return value
    return None


def import_safetensors():
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise InputError("files of diffusers need a package: pip install safetensors") from None
    return safetensors.torch


def load_weights(module, weights, path):
    """load_state_dict, strictly. InputError tells in one line what does not fit. -> the module"""
    check_fit(module, weights, path)
    module.load_state_dict(weights)
    return module


def check_fit(module, weights, path):
    """InputError for the first tensor that the module lacks or that the file lacks, that is of
    another shape, or that holds a number that is not finite."""
    wanted = module.state_dict()
    counters = [name for name in wanted if name.endswith("num_batches_tracked")]
    for name in [*wanted, *weights]:
        if name in counters:  # BatchNorm's, which old files do not have
            continue
        if name not in weights:
            reason = f"{name} is missing"
        elif name not in wanted:
            reason = f"{name} is not part of it"
        elif getattr(weights[name], "shape", None) != wanted[name].shape:
            shape = list(getattr(weights[name], "shape", []))
            reason = f"{name} is {shape} in the file, {list(wanted[name].shape)} in the network"
        elif not weights[name].isfinite().all():
            raise InputError(f"{path}: {name} holds numbers that are not finite")
        else:
            continue
        raise InputError(f"{path}: does not fit the network: {reason}")


def download(url, why, hint):
    """The file of a URL in torch hub's cache. If it is not there, it is fetched, and compared with
    the hash in its name, where that has one.

    InputError if it cannot be had: it says which file to put where.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hashed = Path(url).stem.rpartition("-")[2] if "-" in Path(url).stem else None
        torch.hub.download_url_to_file(url, os.fspath(path), hashed)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{why} ({type(error).__name__} downloading them): put {url} at {path} yourself, {hint}"
        ) from None
    return path


def call_function(name, flag, *values):
    """Calls MODULE:FUNCTION of the command line, which is in a package or in the current folder.
    -> the function that it returns"""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module, function = name.split(":")
        called = getattr(importlib.import_module(module), function)
        inspect.signature(called).bind(*values)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"{flag} {name}: cannot be called as MODULE:FUNCTION of {len(values)} values ({error})"
        ) from None
    try:
        result = called(*values)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{flag} {name}: failed in {frame.filename}, line {frame.lineno} "
            f"({type(error).__name__}: {error})"
        ) from None
    if not callable(result):
        raise InputError(f"{flag} {name}: returned a {type(result).__name__}, not a function")
    return result


def file_hash(path):
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(functools.partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(module):
    """SHA-256 of a network's numbers in float32: the same for every file that holds them."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ==================================================================================================
# The run kit: what every script here needs besides its paper


class InputError(ValueError):
    """An error of the user's. The message is one line that names the wrong input and says what to
    do. launch() prints it and ends the process with exit code 2."""


# --------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """Tells errors in one line, without the usage; under torchrun one process tells it for all."""

    source = ""  # put before an error: where the arguments are from, if not the command line

    def error(self, message):
        self.exit(2, f"{self.prog}: {self.source}{message}\n" if MAIN else None)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows the default of every flag that has one."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


def make_parser(description):
    return Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def number_type(convert, is_valid, words):
    """An argparse type whose error says what is wanted."""

    def parse_number(text):
        try:
            value = convert(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from None
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    return parse_number


positive_int = number_type(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1")
whole_number = number_type(int, lambda n: 0 <= n < 2**31, "a whole number of at least 0")
seed_number = number_type(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
positive_number = number_type(float, lambda x: 0 < x < math.inf, "a positive number")
non_negative = number_type(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
probability = number_type(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
side_length = number_type(int, lambda n: 1 <= n <= 8192, "a size in pixels, 1 to 8192")


def image_size(text):
    """ "256" or "384x256" (height x width) -> (height, width)."""
    sides = [side_length(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text} is no size: 256, or 384x256 (height x width)")
    return (sides[0], sides[-1])


def add_run_arguments(parser, **defaults):
    """The flags that all trainers share."""
    add = parser.add_argument_group("run").add_argument
    add("--data", help="folder of images, flat or with a folder for each class")
    add("--out", help="checkpoint to write, or to go on with")
    text = "let --out go on with other --data, --image-size or --batch-size than it was made with"
    add("--change", action="store_true", help=text)
    add("--steps", type=whole_number, help="steps in all")
    add("--batch-size", type=positive_int, help="images a step, over all processes")
    text = "images per forward pass (default: all of a process's)"
    add("--micro-batch", type=positive_int, help=text)
    add("--lr", type=positive_number, help="not scaled by batch or processes")
    add("--seed", type=seed_number, default=0, help="of all that is random")
    precisions = ("auto", "bf16", "fp32")
    add(
        "--precision",
        choices=precisions,
        default="auto",
        help="auto: bf16 on a device that is fast with it; a run keeps what it began with",
    )
    workers = 8 if torch.cuda.is_available() else 0
    add("--workers", type=whole_number, default=workers, help="data loaders")
    add("--log-every", type=positive_int, default=100, help="steps")
    add("--sample-every", type=whole_number, help="steps between pictures; 0: none")
    add("--save-every", type=positive_int, help="steps between checkpoints")
    add("--bench", action="store_true", help="measure speed, write nothing")
    parser.set_defaults(**defaults)


def parse(parser):
    """The command line's arguments. args.given names the flags that stand on it, args.parser is the
    parser, with which restored_arguments() reads a checkpoint's."""
    if any(word.startswith(("--local-rank", "--local_rank")) for word in sys.argv[1:]):
        parser.error("--local-rank: start this with torchrun, which sets LOCAL_RANK")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"argument --{name.replace('_', '-')}: is empty")
        if isinstance(value, str) and value.startswith("~"):
            setattr(args, name, os.path.expanduser(value))
    words = {word.partition("=")[0] for word in sys.argv[1:]}
    args.given = [a.dest for a in parser._actions if words.intersection(a.option_strings)]
    args.parser = parser
    return args


def check_flags(args, mode, groups, also=()):
    """InputError for a flag on the command line that is not read.

    mode    when it is not read, for the message
    groups  titles of the groups whose flags are read
    also    other flags that are read
    """
    read = set(also)
    for group in args.parser._action_groups:
        if group.title in groups:
            read |= {action.dest for action in group._group_actions}
    for name in args.given:
        flag = f"--{name.replace('_', '-')}"
        if name not in read:
            raise InputError(f"{flag}: is not read {mode}; leave it out")


# --------------------------------------------------------------------------------------------------
# Processes: their start and their end. RANK and WORLD_SIZE are torchrun's

MAIN = os.environ.get("RANK", "0") == "0"  # the process that speaks and writes
PARENT = None  # the process id of torchrun, or of what else started this one
SIGNALS = []  # the signals that came, for stop_signal()
LOCKS = []  # files held open while this process must be the only one on its output
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # USR1: SLURM's warning
    if hasattr(signal, name)
]


def launch(parser, run):
    """Parses the command line and calls run(args, rank, world, device).

    An InputError, or a lack of memory, is told in one line, with exit code 2. Any other exception
    keeps its traceback. After either the process ends at once: it waits neither for its data
    loaders nor, under torchrun, for the other processes, which torchrun then stops.
    """
    world = 1
    code = 0
    with restored_process():
        args = parse(parser)
        try:
            rank, world, device = start_process(args)
            check_flags_of_all(args)
            if getattr(args, "bench", False):
                benchmark(args, rank, world, device, run)
            else:
                run(args, rank, world, device)
        except SystemExit as end:
            code = end.code
        except InputError as error:
            if is_first_to_tell():
                tell(f"{parser.prog}: {in_one_line(error)}")
            code = 2
        except BaseException as error:
            if is_out_of_memory(error):
                tell(f"{parser.prog}: {out_of_memory(args, world, error)}")
                code = 2
            elif world == 1:
                raise
            else:
                if is_first_to_tell():  # else another process's end is the cause
                    traceback.print_exc()
                code = 1
        if world > 1:
            leave_processes(code)
    if code:
        raise SystemExit(code)


@contextlib.contextmanager
def restored_process():
    """However a run ends, puts back streams and the handlers of STOP_SIGNALS, gives up locks, and
    ends data loaders. So a notebook can call main() twice."""
    streams = (sys.stdout, sys.stderr)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    others = multiprocessing.active_children()
    sys.stdout = GuardedStream(sys.stdout)
    sys.stderr = GuardedStream(sys.stderr)
    try:
        yield
    finally:
        end_loaders(others)
        BENCH.counting.close()  # does nothing, unless a run with --bench failed
        BENCH.counter = None
        while LOCKS:
            os.close(LOCKS.pop())
        SIGNALS.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams


def end_loaders(others=()):
    """Ends the data loaders, which would outlive an exception and keep this process waiting."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each child
    for child in multiprocessing.active_children():
        if child not in others:
            child.kill()


class GuardedStream:
    """stdout or stderr that never ends a run: what a closed, full or broken stream does not take is
    lost. If a signal comes during a write, which may be blocked for ever, remember_signal() ends
    the write with an error, and the stream is not written to any more."""

    def __init__(self, stream):
        self.stream = stream  # None, if it was closed when Python started
        self.is_writing = False
        self.is_broken = stream is None

    def write(self, text):
        self.call("write", text)
        return len(text)

    def flush(self):
        self.call("flush")

    def call(self, name, *values):
        if self.is_broken:
            return
        self.is_writing = True
        try:
            getattr(self.stream, name)(*values)
        except UnicodeEncodeError as error:  # a letter that the stream cannot show
            text = values[0].encode(error.encoding, "backslashreplace")
            self.call(name, text.decode(error.encoding))
        except (OSError, ValueError):
            pass
        finally:
            self.is_writing = False

    def isatty(self):
        return not self.is_broken and self.stream.isatty()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def tell(text):
    """Writes a line to stderr, above a progress bar, from any process. (A file's name may hold an
    end of line.)"""
    tqdm.write(text.replace("\n", "\\n"), file=sys.stderr)


def say(text):
    """tell(), from the first process alone."""
    if MAIN:
        tell(text)


def is_first_to_tell():
    """Whether no other process has told of an error: most errors are every process's."""
    with contextlib.suppress(RuntimeError):  # the others may have gone already
        if dist.is_initialized():
            return dist.distributed_c10d._get_default_store().add("told", 1) == 1
    return True


def in_one_line(error):
    """An error's message, without the traceback that a data loader's process puts before it."""
    return re.split(r"^[\w.]*InputError: ", str(error), flags=re.MULTILINE)[-1].strip()


def is_out_of_memory(error):
    on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)
    is_one = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return on_cpu or is_one or is_out_of_shared_memory(error)


def is_out_of_shared_memory(error):
    """Data loaders hand their batches over in /dev/shm. In a container that has 64 MB."""
    texts = ("unable to allocate shared memory(shm)", "workers are out of shared memory")
    return any(text in str(error) for text in texts)


def out_of_memory(args, world, error):
    """The flag to lower where memory was not enough: --micro-batch, or --batch-size for sampling
    and evaluate.py, which have no micro-batches; or --workers."""
    if is_out_of_shared_memory(error):
        return "/dev/shm is too small for --workers: give fewer, or 0 (or docker run --shm-size)"
    if getattr(args, "sample_from", None) or not hasattr(args, "micro_batch"):
        return f"out of memory: give --batch-size {max(1, args.batch_size // 2)}"
    micro_batch = args.micro_batch or args.batch_size // world
    if micro_batch == 1:
        return "out of memory with one image a pass: take a smaller --model or --image-size"
    smaller = micro_batch // 2
    while micro_batch % smaller:
        smaller -= 1
    return f"out of memory with {micro_batch} images a pass: give --micro-batch {smaller}"


def leave_processes(code):
    """Ends one of several processes. After an error it does not wait for the others."""
    if code == 0 or code in [128 + number for number in STOP_SIGNALS]:
        dist.destroy_process_group()  # waits for the others, which come here, too
    end_loaders()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo may abort an interpreter that is ending (pytorch pull 179291)


def start_process(args):
    """-> rank, world, device; sets up signals, the device and the group of processes."""
    global PARENT
    PARENT = os.getppid()
    rank = environment_number("RANK", 0)
    world = environment_number("WORLD_SIZE", 1)
    local_rank = environment_number("LOCAL_RANK", 0)
    finds_others = world == 1 or "MASTER_ADDR" in os.environ
    # How many tasks srun started: SLURM_STEP_NUM_TASKS. Where that is not set, there are at least
    # SLURM_PROCID + 1. (SLURM_NTASKS is also set in salloc's shell, which is a single task)
    tasks = environment_number("SLURM_STEP_NUM_TASKS", environment_number("SLURM_PROCID", 0) + 1)
    is_one_of_slurms = world == 1 and tasks > 1
    if is_one_of_slurms or not (0 <= rank < world and local_rank >= 0 and finds_others):
        tell("for several processes start this with torchrun, which sets RANK and WORLD_SIZE")
        raise SystemExit(2)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, remember_signal)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        # gloo beside nccl, for tensors of the host, as stop_signal()'s
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if getattr(args, "precision", None) == "auto":
        args.precision = "bf16" if has_bf16_units(device) else "fp32"
    return rank, world, device


def environment_number(name, default):
    """A whole number that torchrun or srun passes on; `default` if it is not set, -1 if it is no
    number."""
    value = os.environ.get(name, str(default))
    return int(value) if value.isdecimal() else -1


def has_bf16_units(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = torch.cpu.get_capabilities()
    return bool(units.get("avx512_bf16") or units.get("amx_bf16"))


@contextlib.contextmanager
def full_precision():
    """A context in which a GPU computes in full float32. A VQ-GAN's tokens would come out
    differently with TF32, which start_process() turns on for matrices, torch for convolutions."""
    matmul = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


def remember_signal(number, frame):
    """Remembers a signal, for stop_signal(). A second one of its kind ends the process at once. If
    a signal comes during a write to stdout or stderr, which may be blocked for ever, this ends the
    write with an error, and the stream is not written to any more."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "is_writing", False):
            stream.is_broken = True
            raise BlockingIOError  # which GuardedStream.call() passes over


def stop_signal():
    """The signal that some process received, or 0. All of them get the same answer here, so they
    stop after the same step. The end of torchrun counts as SIGTERM."""
    if dist.is_initialized() and os.getppid() != PARENT:
        SIGNALS.append(signal.SIGTERM)
    flag = torch.tensor(SIGNALS[0] if SIGNALS else 0)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def signal_heard():
    """Whether some process received a signal. Unlike stop_signal() this does not wait for the other
    processes: each may have another number of batches."""
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        if SIGNALS:
            store.set("signal", str(SIGNALS[0]))
        elif store.check(["signal"]):
            SIGNALS.append(int(store.get("signal")))
    return bool(SIGNALS)


def leave_if_stopped(text):
    """After a signal to any of the processes: says so, and ends all of them with its code."""
    signal_heard()  # ends the others' loops, where they ask it, as in dit.py's cache
    stopped = stop_signal()  # waits for them
    if stopped:
        say(text)
        raise SystemExit(128 + stopped)


def barrier():
    """Waits until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value):
    """The values of all processes, on the first one; [] on the others. Tensors should be on the
    CPU: others are restored on the GPU that they came from."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if MAIN else None
    dist.gather_object(value, values)
    return values or []


def check_same_start(step, model, data, *others):
    """InputError, on all processes, if they do not begin with the same step, weights, paths of
    pictures and `others`: on several machines each may see a disk of its own."""
    if dist.is_initialized():
        sums = [value.double().sum().item() for value in model.state_dict().values()]
        files = hashlib.sha256(data.files.joined.tobytes()).hexdigest()
        check_agreement(step, sums, files, *others)


def check_flags_of_all(args):
    """InputError, on all processes, if they were started with different flags."""
    if not dist.is_initialized():
        return
    exempt = ("workers", "run")  # machines may differ in workers; run is evaluate.py's, no flag
    flags = {name: value for name, value in saved_arguments(args).items() if name not in exempt}
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, flags)
    for name, value in everyones[0].items():
        for other in everyones:
            if other.get(name) != value:
                raise InputError(
                    f"--{name.replace('_', '-')}: the processes were started with {value} and "
                    f"{other.get(name)}; give all of them the same flags"
                )


def check_agreement(*values):
    """InputError, on all processes, if these values are not the same on each of them."""
    if not dist.is_initialized():
        return
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(repr(values).encode()).hexdigest())
    if len(set(digests)) > 1:
        raise InputError(
            "the processes begin with different files: what is read, --cache and --out must be on "
            "a disk that all machines see"
        )


# --------------------------------------------------------------------------------------------------
# Randomness: functions of (seed, step), or of (seed, index)


def seeded(*key):
    """A CPU generator that is a function of the key: numbers and words. 7 bytes of a hash are its
    seed, which so fits a signed number of 64 bits."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def step_rngs(seed, step, device):
    """-> (host, device generator) for all that is random in a training step.

    The host's is for what Python must know (tau's sizes), the other for tensors. Each process
    draws for the whole batch, in the same order, and keeps its rank_slice(). So what is drawn does
    not depend on the number of processes, and going on with a run needs no stored state.
    """
    host = seeded(seed, "host", step)
    on_device = torch.Generator(device).manual_seed(seeded(seed, "device", step).initial_seed())
    return host, on_device


def rank_slice(tensor, rank, world):
    """This process's rows of what was drawn for the whole batch."""
    return tensor.chunk(world)[rank]


def sample_noise(shape, seed, indices, device):
    """N(0, 1) (len(indices), *shape): row k is a function of (seed, indices[k]) alone."""
    rows = [torch.randn(shape, generator=seeded(seed, "noise", int(i))) for i in indices]
    return to_device(torch.stack(rows), device)


def to_device(tensor, device):
    """A host's tensor on the device; the host does not wait for the copy to a GPU."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# Pictures in


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
ENDINGS = {
    ".bmp", ".gif", ".jfif", ".jpg", ".jpeg", ".jpe", ".jp2", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # ComfyUI keeps whole workflows in a PNG


def open_image(path):
    """Opens a picture: -> PIL image, RGB. What is transparent is white, 16 bits are scaled to 8.
    Like ADM's and LDM's code it takes no notice of EXIF's rotation.

    OSError with an errno where the disk is at fault. Any other exception is the content's fault: it
    cannot be decoded, or not rightly, or is too large.
    """
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        if max(image.size) > 32 * min(image.size):
            raise ValueError(f"{image.width}x{image.height} is too long and thin")
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is too large")
        return to_rgb(image)


def to_rgb(image):
    is_16_bit_pgm = image.mode == "I" and image.format == "PPM"  # scaled to 16 bits by Pillow
    if image.mode.startswith("I;16") or is_16_bit_pgm:
        values = np.asarray(image).astype(np.uint16)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode}: pictures of 32 bits have no known range; make 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def find_images(root, flag="--data"):
    """-> (files, labels, classes).

    The folders in `root` are the classes, if there are images in them, at whatever depth. They are
    sorted by name as torchvision sorts them ("10" before "2"). Without any, all labels are 0 and
    classes is [].
    InputError if there are no images, or some beside the class folders.
    """
    if not os.path.isdir(root):
        raise InputError(
            f"{flag} {root}: no such folder; give a folder of images, or make one with "
            "python data/emoji/prepare.py"
        )
    root = os.path.normpath(root)
    others = collections.Counter()
    by_class = {}
    stray = []
    for folder, images in walk(root, others):
        if folder == root:
            stray = images
        elif images:
            name = os.path.relpath(folder, root).split(os.sep)[0]
            by_class.setdefault(name, []).extend(images)
    if others:
        endings = ", ".join(f"{number:,} {ending}" for ending, number in others.most_common(5))
        say(f"{flag} {root}: passed over what is no picture: {endings}")
    if by_class and stray:
        raise InputError(
            f"{flag} {root}: {len(stray)} images lie beside the class folders "
            f"({os.path.basename(stray[0])}, ...); move them into one"
        )
    if not by_class and not stray:
        raise InputError(f"{flag} {root}: no images in this folder")
    files = list(stray)
    labels = [0] * len(stray)
    for label, images in enumerate(by_class.values()):
        files += images
        labels += [label] * len(images)
    return files, labels, list(by_class)


def walk(root, others):
    """The one walk of folders: yields (folder, paths of the images in it), sorted, root first.

    Links are followed, each real folder once. Names that is_service_name() knows are passed over.
    others  a Counter of the endings of files that are no images
    """

    def say_unreadable(error):
        say(f"passed over, {error.strerror}: {error.filename}")

    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=say_unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()  # os.walk goes into those that are left in it
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_service_name(name))
        images = []
        for name in sorted(name for name in names if not is_service_name(name)):
            path = os.path.join(folder, name)
            ending = os.path.splitext(name)[1].lower()
            if ending not in ENDINGS:
                others[ending or "without an ending"] += 1
            elif os.path.isfile(path):
                images.append(path)
            else:
                say(f"passed over, no file: {path}")
        yield folder, images


def is_service_name(name):
    """Whether it is the name of something hidden, or of what systems and NAS put into folders."""
    others = ("__MACOSX", "lost+found", "System Volume Information")
    return name.startswith((".", "@", "#", "$")) or name in others


class Paths:
    """A list of paths as one array of bytes, which data loaders share with the main process. They
    would copy a list of strings page by page: to read a string changes its reference count."""

    def __init__(self, paths):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.joined = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]  # IndexError at the end, for loops
        return os.fsdecode(self.joined[self.ends[index] : self.ends[index + 1]].tobytes())


class ImageFolder(torch.utils.data.Dataset):
    """Pictures for training and scoring, in a flat folder or with a folder for each class.

    size    (H, W) of the items
    crop    "center": ADM's, for generators and for all scoring; "random": LDM's, for autoencoders
    mirror  half of the items are mirrored
    flag    what the command line calls `root`, for messages

    Items are (image, label, index, readable): uint8 (3, H, W), the number of its class, the index
    that was asked for, and whether the file at that index could be read. A file that cannot is
    reported once per process, and the next one takes its place. Training asks for an item as
    (epoch, index), all else as `index`: crop and mirror image are a function of (seed, epoch,
    index). The object holds paths and numbers alone, so it can be sent to data loaders however they
    are started.
    """

    def __init__(self, root, size, crop="center", seed=0, mirror=False, flag="--data"):
        self.root = os.fspath(root)
        self.size = tuple(size)
        self.crop = crop
        self.seed = seed
        self.mirror = mirror
        self.flag = flag
        files, labels, self.classes = find_images(root, flag)
        self.files = Paths(files)
        self.labels = np.array(labels)
        self.reported = set()  # indices of files that could not be read

    def centred(self):
        """The same pictures with the centre crop, none of them mirrored."""
        other = copy.copy(self)
        other.crop = "center"
        other.mirror = False
        return other

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        epoch, index = item if isinstance(item, tuple) else (0, item)
        image, source = self.open_next(index, is_training=isinstance(item, tuple))
        if self.crop == "random":
            rng = np.random.default_rng((self.seed, epoch, index))
            image = random_crop(image, self.size, rng)
        else:
            image = center_crop(image, self.size)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.mirror and is_mirrored(self.seed, epoch, index):
            values = values.flip(2)
        return values, int(self.labels[source]), index, source == index

    def open_next(self, index, is_training):
        """-> (the first picture from `index` on that can be read, its index). If the disk is at
        fault, all but training ends in an InputError: caches and scores would be without the
        picture for good."""
        for step in range(len(self)):
            at = (index + step) % len(self)
            try:
                return open_image(self.files[at]), at
            except Exception as error:  # Pillow's many readers raise many kinds
                if isinstance(error, OSError) and error.errno and not is_training:
                    raise InputError(f"{self.files[at]}: {error.strerror}") from None
                if at not in self.reported:
                    self.reported.add(at)
                    reason = f"{type(error).__name__}: {error}"
                    tell(f"passed over, cannot be read: {self.files[at]} ({reason})")
        raise InputError(f"{self.flag} {self.root}: none of the images in this folder can be read")


def is_mirrored(seed, epoch, index):
    """Whether the item is mirrored: half of them, a function of (seed, epoch, index)."""
    return bool(np.random.default_rng((seed, 1, epoch, index)).random() < 0.5)


def center_crop(image, size):
    """ADM's crop of a PIL image to (height, width): halved with a box filter while it is twice too
    large, then resized bicubically until the shorter side fits, then cut out of the centre."""
    height, width = size
    while min(image.width / width, image.height / height) >= 2:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    fitting = (round(image.width * scale), round(image.height * scale))
    image = image.resize(fitting, Image.Resampling.BICUBIC)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(image, size, rng):
    """LDM's crop: a box with sides of 0.5 to 1 times the largest that fits, anywhere, resized to
    (height, width).

    LDM shrinks with OpenCV's INTER_AREA. Of Pillow's filters HAMMING comes nearest to it: values
    differ by .3 to 1.2 of 255 in the mean, on three photographs at scales of .25 to .9.
    """
    height, width = size
    scale = min(image.width / width, image.height / height) * rng.uniform(0.5, 1)
    w = max(1, int(width * scale))
    h = max(1, int(height * scale))
    left = rng.integers(image.width - w + 1)
    top = rng.integers(image.height - h + 1)
    box = (left, top, left + w, top + h)
    return image.resize((width, height), Image.Resampling.HAMMING, box=box)


def endless_batches(data, args, step, rank, world):
    """Yields this process's share of the batch of each step, from `step` on, without end.

    Every epoch is a permutation of its own, a function of (seed, epoch). Where an epoch ends amid a
    batch, the next one fills it up. `data` is asked for items as (epoch, index).
    """

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return torch.randperm(len(data), generator=seeded(args.seed, "order", epoch))

    def items():
        size = args.batch_size // world
        for k in itertools.count(step):
            first = k * args.batch_size + rank * size
            places = [divmod(place, len(data)) for place in range(first, first + size)]
            yield [(epoch, int(order(epoch)[place])) for epoch, place in places]

    if args.workers:
        check_shared_memory(data, args, world)
    return iter(data_loader(data, args.workers, batch_sampler=items()))


def data_loader(data, workers, **options):
    """torch's DataLoader, whose processes leave signals to this one."""
    return torch.utils.data.DataLoader(
        data,
        num_workers=workers,
        worker_init_fn=leave_signals,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def check_shared_memory(data, args, world):
    """InputError if the batches that data loaders hold ready do not fit into /dev/shm. It comes
    before a training run writes anything; launch() tells of what it has not foreseen."""
    item = data[(0, 0)]
    size = sum(value.nbytes for value in item if isinstance(value, torch.Tensor))
    here = args.batch_size // world * environment_number("LOCAL_WORLD_SIZE", world)
    needed = 2 * args.workers * size * here  # a worker holds two batches ready (prefetch_factor)
    if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < needed:
        raise InputError(
            f"--workers {args.workers}: their batches need {needed / 1e9:.2g} GB of shared memory, "
            "and /dev/shm has less (docker run --shm-size); take fewer, or 0"
        )


def leave_signals(worker):
    """Data loaders leave signals to the main process, which needs the loaders until its step is
    done. They also close its locks, which would else outlast a killed main process by seconds."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    while LOCKS:
        os.close(LOCKS.pop())


def images_per_pass(args, world):
    """-> images in a forward pass of a process. InputError where the batch cannot be split so."""
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size}: not a multiple of the {world} processes")
    size = args.batch_size // world
    # A lower bound, 4 KB an image: it finds nothing but mistyped sizes
    needed = 4096 * size
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise InputError(
            f"--batch-size {args.batch_size}: more than {needed / 1e9:.3g} GB do not fit into the "
            "memory"
        )
    micro_batch = args.micro_batch or size
    if size % micro_batch:
        raise InputError(
            f"--batch-size {args.batch_size}: not a multiple of {world} processes x "
            f"--micro-batch {micro_batch}"
        )
    return micro_batch


def evenly_spaced(data, n, device, batch_size=16):
    """Yields n evenly spaced images of an ImageFolder, as batches (B, 3, H, W) in [-1, 1] on the
    device."""
    picked = np.linspace(0, len(data) - 1, min(n, len(data))).astype(int)
    for start in range(0, len(picked), batch_size):
        items = [data[int(i)] for i in picked[start : start + batch_size]]
        yield to_float(torch.stack([item[0] for item in items]), device)


def to_float(images, device):
    """uint8 (B, 3, H, W) -> float in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------
# Pictures out


def to_uint8(images):
    """Float in [-1, 1], clamped -> uint8, to the nearest: the one rounding of this repository."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(rows, captions=()):
    """Rows of images (N, 3, H, W) in [-1, 1] -> a PIL image with cells as large as the largest.

    captions  a text for each row; they stand to the right of the images
    """
    arrays = [to_uint8(row).permute(0, 2, 3, 1).cpu().numpy() for row in rows]
    columns = max(len(array) for array in arrays)
    height = max(array.shape[1] for array in arrays) + 2  # two pixels of margin
    width = max(array.shape[2] for array in arrays) + 2
    font = ImageFont.load_default()
    space = max([math.ceil(font.getlength(text)) + 8 for text in captions], default=0)
    canvas = Image.new("RGB", (width * columns + space, height * len(arrays)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(captions):
        draw.text((width * columns + 4, i * height + height // 2 - 8), text, "black", font)
    for i, array in enumerate(arrays):
        for j, picture in enumerate(array):
            canvas.paste(Image.fromarray(picture), (j * width, i * height))
    return canvas


# --------------------------------------------------------------------------------------------------
# Optimisers, and averages of weights


def convolution_layout(device):
    """channels_last is faster on a GPU; on a CPU the full-size networks are slower in it."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def trainable_parameters(*networks):
    parameters = itertools.chain(*[network.parameters() for network in networks])
    return [p for p in parameters if p.requires_grad]


def mean_over_processes(tensor):
    """The mean over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def average_gradients(parameters):
    """The mean of all gradients over processes: what DistributedDataParallel does, for a step with
    several networks and backward passes."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters]
    flat = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def restore_where(skipped, buffers, before):
    """In a skipped step buffers become again what they were, without a host sync."""
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(skipped > 0, old, buffer))


def restore_optimizers(optimizers, resumed):
    """Loads the states of a checkpoint (opt, opt_disc), where there is one that has them."""
    for optimizer, key in zip(optimizers, ("opt", "opt_disc")):
        if resumed is None or not resumed[key]:
            continue
        try:
            load_optimizer(optimizer, resumed[key])
        except Exception as error:  # whatever somebody's file makes of it
            raise InputError(f"--out: the optimiser's state in it does not fit ({error})") from None


def load_optimizer(optimizer, state):
    """Adam's averages and count of steps; its settings are the command's. A fused step wants the
    averages in the layout of their weights."""
    settings = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    for parameter, averages in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if averages[name].shape != parameter.shape:
                raise ValueError(f"{name} has the shape {list(averages[name].shape)}")
            averages[name] = torch.empty_like(parameter).copy_(averages[name])
        # A copy, since it is mapped to the file; reshape() fails if it is not one number
        averages["step"] = averages["step"].clone().reshape(())


def start_ema(model, decay, resumed, device):
    """The average of the weights: the checkpoint's, else a copy of the weights; None without."""
    if not decay:
        return None
    weights = model.state_dict()
    if resumed is not None and resumed["ema"]:
        check_fit(model, resumed["ema"], "--out's average of the weights")
        weights = resumed["ema"]
    # In the order of the weights, as update_ema() takes them
    return {name: weights[name].to(device, copy=True) for name in model.state_dict()}


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """average <- average + (1 - d) (weights - average), in place, with the decay warmed up:
    d = min(decay, (1 + step) / (10 + step)).

    LDM's LitEma has this warm-up, but counts from 1. The codes of DiT, SiT and REPA have none:
    their average holds much of the random start during the first 1 / (1 - decay) steps. After ten
    times as many it agrees with this one.
    """
    if ema is None:
        return
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)


# --------------------------------------------------------------------------------------------------
# Runs: going on, log, checkpoints


def load_run(args, arch, configs, required=()):
    """The checkpoint at args.out to go on with, or None. InputError if it holds another network or
    lacks one of the `required` entries, which may be None.

    Flags that were not given take the values that the checkpoint was made with. Those that were
    given win, and are reported where they differ. What the run began from (--init) stays.
    Other pictures or another batch make another run: InputError, unless --change is given.
    """
    if Path(args.out).suffix != ".pt":
        raise InputError(f"--out {args.out}: give a name that ends in .pt")
    check_writable(args.out)
    if args.bench or not os.path.exists(args.out):
        return None
    checkpoint = read_file(args.out)
    if checkpoint.get("arch") != arch:
        held = checkpoint.get("arch", "something else")
        raise InputError(f"{args.out}: holds {held}, not a {arch}; give another --out")
    check_entries(args.out, checkpoint, ("model", "opt", "step", "args", *required))
    if "model" in args.given and args.model not in matching_presets(checkpoint["config"], configs):
        raise InputError(
            f"{args.out}: holds another model than --model {args.model}; give another --out"
        )
    earlier = restored_arguments(args, checkpoint["args"])
    if not args.change:
        check_same_run(args, earlier)
    changes = []
    for name, value in earlier.items():
        wanted = getattr(args, name)
        if name not in args.given or name == "init":
            setattr(args, name, value)
        if name in args.given and wanted != value:
            note = f"was {value}"
            if name == "init":
                note = "is not read, since the run has begun"
            changes.append(f"--{name.replace('_', '-')} {wanted} {note}")
    say("; ".join([f"going on from {args.out}, step {checkpoint['step']}", *changes]))
    return checkpoint


def check_same_run(args, earlier):
    """InputError if the command line wants other pictures or another batch than the checkpoint at
    args.out was trained with."""
    for name in ("data", "image_size", "batch_size"):
        value = earlier.get(name)
        wanted = getattr(args, name, None)
        is_same = wanted == value
        if name == "data" and value is not None:
            is_same = os.path.realpath(wanted) == os.path.realpath(value)
        if name in args.given and not is_same:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{args.out}: was made with {flag} {in_words(value)}, not {in_words(wanted)}; give "
                "another --out, or --change to go on with it all the same"
            )


def in_words(value):
    """A flag's value as it is written on the command line."""
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else value


def check_writable(out):
    """InputError if the nearest folder of `out` that is there cannot be written to."""
    folder = Path(os.path.realpath(out)).parent
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"--out {out}: cannot write there")


def check_entries(path, checkpoint, names):
    """InputError if an entry of one of our checkpoints is missing, or is not what it should be."""
    may_be_none = ("ema", "disc", "opt_disc", "latent", "vae", "vqgan")
    for name in ("config", *names):
        if name not in checkpoint:
            raise InputError(f"{path}: an incomplete checkpoint: {name} is missing")
        value = checkpoint[name]
        is_missing = value is None and name in may_be_none
        if not is_missing and not is_plausible(name, value):
            raise InputError(f"{path}: not a checkpoint of ours: its {name} is {str(value)[:40]!r}")


def is_plausible(name, value):
    """Whether an entry of a checkpoint is what it should be: most are dictionaries."""
    if name == "step":
        return isinstance(value, int) and 0 <= value < 2**31
    if name == "classes":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not isinstance(value, dict):
        return False
    if name in ("vae", "vqgan"):
        return all(isinstance(value.get(key), str) for key in ("file", "sha256"))
    if name == "latent" and "scale" in value:  # older files of vqgan.py have something else there
        scale = value["scale"]  # None: unknown
        return is_number(value.get("shift")) and (scale is None or is_number(scale) and scale > 0)
    if name in ("args", "config"):
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            return False
    return True


# Arguments that a run never takes from its checkpoint
NOT_RESTORED = ("out", "workers", "bench", "change", "export", "sample_from", "samples")


def restored_arguments(args, stored):
    """A checkpoint's arguments, through the parser that reads the command line, because they are
    somebody's input as well. -> {name: value} of those that a run takes from its checkpoint.

    A function to call, and a folder to write to, are never taken from a file: InputError asks for
    them, if this run was made with one.
    """
    actions = {action.dest: action for action in args.parser._actions if action.option_strings}
    actions.pop("help")
    actions = {
        name: actions[name] for name in actions if name in stored and name not in NOT_RESTORED
    }
    words = []
    for name, action in actions.items():
        value = stored[name]
        flag = action.option_strings[0]
        # (Other scripts have the flags encoder, cache and no_cache)
        is_code = name in ("perceptual", "encoder") and ":" in str(value)
        is_folder = name == "cache" and not getattr(args, "no_cache", False)
        if (is_code or is_folder) and value is not None and name not in args.given:
            raise InputError(
                f"{args.out}: was made with {flag} {value}: give it again, since what to call and "
                "where to write is not taken from a file"
            )
        if action.nargs == 0 and value:
            words.append(flag)
        elif action.nargs == 0 and value is not None:
            words += action.option_strings[1:]  # its --no- form, where it has one
        elif value is not None:
            words.append(f"{flag}={in_words(value)}")
    args.parser.source = f"{args.out}: its stored arguments: "
    parsed = vars(args.parser.parse_args(words))
    args.parser.source = ""
    return {name: parsed[name] for name in actions}


def saved_arguments(args):
    """The arguments that a checkpoint keeps."""
    left_out = ("change", "given", "parser")
    return {name: value for name, value in vars(args).items() if name not in left_out}


def say_start(args, model, data, world, micro_batch, device, classes=()):
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    passes = args.batch_size // (world * micro_batch)
    images = f"{len(data):,} images"
    if classes:
        images += f" of {len(classes):,} classes ({shortened(classes)})"
    place = device.type
    if place == "cpu" and torch.backends.mps.is_available():
        place = "cpu (this Mac's GPU is not used)"
    say(
        f"{type(model).__name__}, {count:,} parameters in training; {images}; training "
        f"to step {args.steps} with {args.batch_size} images a step ({world} processes x {passes} "
        f"passes x {micro_batch}), lr {args.lr:g}; {place}, {args.precision}"
    )


def say_duration(args, step, device, forward):
    """Says on a CPU about how long a run will take, before it starts, if that is over an hour.

    forward  a function that passes one image through the network. A step takes about three times as
             long for each of its images, since its backward pass costs two forward passes
    """
    images = (args.steps - step) * args.batch_size
    if device.type != "cpu" or images < 100 or not MAIN or args.bench:
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        passes = []
        while len(passes) < 3 and sum(passes) < 10:  # the first one also sets things up
            started = time.monotonic()
            forward()
            passes.append(time.monotonic() - started)
    hours = 3 * min(passes) * images / 3600
    if hours > 1:
        taken = f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
        say(
            f"on this CPU {images:,} images will take about {taken}; fewer --steps, a smaller "
            "--batch-size, --image-size or --model make it short (--help has commands for a CPU)"
        )


def shortened(names):
    """The first of some names, for messages."""
    more = ", ..." if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def is_due(step, every, last=None):
    """Whether something that happens every `every` steps (0: never) and at the last is due."""
    return bool(every) and (step % every == 0 or step == last)


class Log:
    """OUT.jsonl, a line of JSON every --log-every steps, ten steps after the start and at --steps;
    and what stderr shows of it: on a terminal a progress bar, else these lines as text.

    Values that are added are logged as means over the steps since the last line and over processes,
    those that are counted as sums. The host waits for a GPU only when a line is written.
    """

    def __init__(self, args, step, world, device):
        self.args = args
        self.world = world
        self.device = device
        self.first = step
        self.writes = MAIN and not args.bench
        if self.writes:
            open_run(args, step)
        self.skipped = torch.zeros((), device=device)  # steps skipped, in all
        self.in_a_row = torch.zeros((), device=device)  # steps skipped one after another, up to now
        self.most_in_a_row = torch.zeros((), device=device)
        self.bar = Progress(args.steps, step, Path(args.out).stem, lines=False)

    def begin(self, step):
        """Starts the clock and empties the averages: before the first step, and after each line."""
        if step == self.first:
            BENCH.begin(self.device)  # --bench counts floating-point operations until end()
        self.since = step
        self.started = time.monotonic()
        self.means = {}
        self.counts = {}

    def add(self, **values):
        """Tensors of a micro-batch; their means are logged."""
        for name, value in values.items():
            total, n = self.means.get(name, (0, 0))
            self.means[name] = (total + value.detach().float().mean(), n + 1)

    def count(self, **values):
        """Numbers of things, as tensors; their sums are logged."""
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + value.detach()

    def step(self, step, skipped, grad_norm, lr):
        """After every step. InputError, when the next line is due, after 20 steps in a row whose
        gradients were not finite."""
        self.skipped = self.skipped + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped  # 0 again after a good step
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        self.bar.update()
        if step % self.args.log_every and step not in (self.first + 10, self.args.steps):
            return
        record = self.averages()
        seconds = max(time.monotonic() - self.started, 1e-9)
        record["skipped"] = int(self.skipped)
        record["grad_norm"] = grad_norm.item()
        record["lr"] = lr
        record["seconds"] = seconds
        record["images_per_second"] = (step - self.since) * self.args.batch_size / seconds
        if self.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.write(dict(step=step, **record))
        self.show(step, record)
        if self.most_in_a_row >= 20:
            raise InputError(
                f"20 steps in a row without a finite gradient (step {step}): lower --lr and go on "
                f"from {self.args.out}, if it was saved"
            )
        self.begin(step)

    def averages(self):
        names = [*self.means, *self.counts]
        values = [total / n for total, n in self.means.values()]
        values += [value.to(self.device) for value in self.counts.values()]
        stacked = torch.stack([value.float() for value in values])
        record = dict(zip(names, mean_over_processes(stacked).tolist()))
        for name in self.counts:
            record[name] = round(record[name] * self.world)
        return record

    def write(self, record):
        """Appends a line. JSON has no NaN: it becomes null. A full disk costs the line alone."""
        if self.args.bench:
            BENCH.records.append(record)
        if self.writes:
            finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
            try:
                with open(Path(self.args.out).with_suffix(".jsonl"), "a") as file:
                    file.write(json.dumps(finite) + "\n")
            except OSError as error:
                say(f"a line of the log is lost ({error.strerror})")

    def show(self, step, record):
        hidden = ("skipped", "lr", "seconds", "images_per_second", "memory_gb", "unreadable")
        losses = ", ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in hidden)
        speed = record["images_per_second"]
        if sys.stderr.isatty():
            self.bar.set_postfix_str(f"{losses}, {speed:.3g} images/s")
            return
        left = tqdm.format_interval((self.args.steps - step) * self.args.batch_size / speed)
        say(f"step {step}/{self.args.steps}: {losses}, {speed:.3g} images/s, {left} left")

    def picture(self, step, image):
        """Writes OUT/0001000.png."""
        if self.writes:
            folder = Path(self.args.out).with_suffix("")
            write_file(folder / f"{step:07d}.png", lambda path: image.save(path, "PNG"))

    def end(self, step):
        """Says how the run ended and where its results are. One that a signal stopped leaves with
        the signal's code. The other processes wait here until all is saved."""
        self.bar.close()
        BENCH.counting.close()  # no more operations are counted
        barrier()
        is_complete = step >= self.args.steps
        if not self.args.bench:
            stem = Path(self.args.out).with_suffix("")
            say(
                f"{'finished' if is_complete else 'stopped'} at step {step} of {self.args.steps}: "
                f"{self.args.out}, losses in {stem}.jsonl, pictures in {stem}/"
            )
        if not is_complete:
            leave_if_stopped("run the same command to go on")


class Progress(tqdm):
    """A bar on a terminal; where stderr is a file, a line of text every minute.

    With lines=False a file gets nothing: the log has lines of its own.
    """

    def __init__(self, total, initial, label, unit="step", lines=True):
        on_terminal = sys.stderr.isatty()
        hidden = not (MAIN and total and on_terminal)
        options = dict(total=total, initial=initial, desc=label, unit=unit)
        super().__init__(**options, disable=hidden, dynamic_ncols=True)
        self.lines = lines and not on_terminal
        self.label = f"{label}, {unit}"
        self.done = initial
        self.last_line = time.monotonic()

    def update(self, n=1):
        super().update(n)
        self.done += n
        if self.lines and time.monotonic() - self.last_line > 60:
            say(f"{self.label} {self.done:,} of {self.total:,}")
            self.last_line = time.monotonic()


def open_run(args, step):
    """Makes OUT/ and OUT.jsonl, drops the log's lines after `step`, and keeps other runs off."""
    out = Path(args.out)
    log = out.with_suffix(".jsonl")
    try:
        out.with_suffix("").mkdir(parents=True, exist_ok=True)
        lock_folder(out.with_suffix(""), f"--out {out}")
        is_resumed = log.exists() and out.exists()  # without a checkpoint nothing of it is kept
        lines = log.read_bytes().splitlines() if is_resumed else []
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from None
    earlier = [line + b"\n" for line in lines if is_log_line(line, step)]
    write_file(log, lambda path: path.write_bytes(b"".join(earlier)))


def is_log_line(line, step=math.inf):
    """Whether it is a line of Log's, of a step up to `step`; a crash leaves half a line."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def lock_folder(folder, what):
    """Keeps a second run off the same output, until this process ends, however it ends."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{what}: another run is writing it; wait, or give another name") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return
    LOCKS.append(descriptor)


def save_run(args, checkpoint):
    """Writes args.out. Weights that are not finite are never saved over good ones."""
    if not MAIN or args.bench:
        return
    values = []
    for name in ("model", "ema", "disc"):
        values += (checkpoint.get(name) or {}).values()
    finite = torch.stack([value.isfinite().all() for value in values]).all()
    if not finite:
        say(f"step {checkpoint['step']}: not saved, its weights are not finite")
        return
    write_file(args.out, lambda part: torch.save(checkpoint, part))


def write_file(path, write):
    """Calls write(a temporary path), which makes a file or a folder there, then moves it to its
    place: a kill or a full disk leaves the old file whole. Through a link it writes where that
    leads. InputError if it cannot be written."""
    path = Path(os.path.realpath(path))
    part = Path(f"{path}.tmp")
    try:
        shutil.rmtree(part, ignore_errors=True)  # a folder that a killed run left
        write(part)
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        with contextlib.suppress(OSError):
            if shutil.disk_usage(path.parent).free < 2**20:
                reason = "the disk is full"
        raise InputError(f"{path}: cannot be written ({reason})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            part.unlink()


# --------------------------------------------------------------------------------------------------
# --bench


class Bench:
    """What --bench measures between a run's first step and its end."""

    def __init__(self):
        self.records = []  # what Log would have written
        self.counter = None  # of floating-point operations, in the run that counts them
        self.counting = contextlib.ExitStack()

    def begin(self, device):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if self.counter is not None:
            self.counting.enter_context(self.counter)


BENCH = Bench()


def benchmark(args, rank, world, device, run):
    """--bench: prints a line of JSON with the speed of twenty steps. Nothing else is written, apart
    from caches of latents or tokens.

    tflops is one process's speed at the networks' matrix products and convolutions. The ceiling is
    the speed of one large matrix product on the same device, in the same precision. mfu, the model
    FLOPs utilisation, is tflops / ceiling_tflops.
    """
    args.sample_every = 0
    args.save_every = 2**31
    args.log_every = 10
    args.steps = 20
    BENCH.counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    run(args, rank, world, device)  # counts, and warms up
    flops = BENCH.counter.get_total_flops()
    BENCH.counter = None
    BENCH.records.clear()
    run(args, rank, world, device)
    seconds = sum(record["seconds"] for record in BENCH.records) / args.steps
    rate = flops / args.steps / seconds
    ceiling = matmul_speed(device, args.precision)
    result = dict(
        script=Path(sys.argv[0]).name,
        model=args.model,
        device=device_name(device),
        processes=world,
        precision=args.precision,
        batch_size=args.batch_size,
        seconds_per_step=round(seconds, 5),
        images_per_second=round(args.batch_size / seconds, 2),
        tflops=round(rate / 1e12, 4),
        ceiling_tflops=round(ceiling / 1e12, 4),
        mfu=round(rate / ceiling, 3),
    )
    if device.type == "cuda":
        result["memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    if MAIN:
        print(json.dumps(dict(result, torch=torch.__version__)))


def matmul_speed(device, precision):
    """FLOP/s of a process's device at a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    threads = torch.get_num_threads()
    timer = torch.utils.benchmark.Timer("a @ a", globals=dict(a=a), num_threads=threads)
    return 2 * n**3 / timer.blocked_autorange(min_run_time=1).median


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    # The other files import this module, not a second copy of it: so there is one InputError
    sys.modules["vae"] = sys.modules["__main__"]
    main()
