"""SiT trained with representation alignment (REPA): an early block's tokens are drawn to a pretrained encoder's.

REPA (https://arxiv.org/abs/2410.06940) adds a term to SiT's loss: a small network projects the tokens after the eighth
block, and each is to point where DINOv2's token of the clean image at that place points. The generator then need not
find out by itself what is in a picture. This file holds the alignment, DINOv2 and the training; paths and samplers are
sit.py's, with time reversed: REPA's t is 0 at the data and 1 at the noise.

    python repa.py --vae out/eq.pt --data emoji --image-size 32 --model REPA-Ti/2 --batch-size 64 --steps 800 \\
        --lr 1e-3 --ema-decay 0.99 --encoder evaluate:tokens --encoder-weights classifier.pt --out tiny-repa.pt # a CPU
    python repa.py --vae eqvae.pt --model REPA-B/2                          # one GPU
    torchrun --nproc_per_node=8 repa.py --vae eqvae.pt                      # eight: the paper's SiT-XL/2 with REPA
    torchrun --nproc_per_node=8 repa.py --sample-from repa.pt --vae eqvae.pt --samples repa.npz   # 50,000 pictures

The third line takes 400,000 steps of 256, with DINOv2-B's weights from torch hub's cache or the network. To expect,
50,000 samples without guidance (Table 10): gFID 7.5 on EQ-VAE's latents, 7.9 on SD-VAE's.
"""

import importlib
import os
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
import sit
from sit import SiT


def aligned_depth(depth):  # REPA's for all its sizes; the demo's has only 4 blocks
    return 8 if depth > 8 else depth // 2


CONFIGS = {
    name.replace("SiT", "REPA"): dict(config, encoder_depth=aligned_depth(config["depth"]))
    for name, config in sit.CONFIGS.items()
}


class REPA(SiT):
    """SiT whose tokens after block `encoder_depth` (counted from 1) are projected to each encoder's width in z_dims."""

    def __init__(self, *args, encoder_depth=8, projector_dim=2048, z_dims=(768,), **options):
        super().__init__(*args, **options)
        self.config |= dict(
            encoder_depth=encoder_depth, projector_dim=projector_dim, z_dims=tuple(z_dims)
        )
        width = self.config["hidden_size"]
        self.encoder_depth = encoder_depth
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, z_dim),
            )
            for z_dim in z_dims
        )
        self.initialize()

    @classmethod
    def config_of(cls, weights):
        config = super().config_of(weights)
        last = sorted(
            name for name in weights if name.startswith("projectors.") and name.endswith(".4.bias")
        )
        return dict(
            config,
            encoder_depth=aligned_depth(config["depth"]),
            z_dims=tuple(len(weights[k]) for k in last),
            projector_dim=len(weights["projectors.0.0.bias"]),
        )

    def forward(self, x, t, y, return_projections=False):
        """Latents (B, C, h, w), times (B,) in [0, 1] (0: data, 1: noise), labels (B,) -> velocities towards the noise
        (B, C, h, w), or with them a list of projections (B, N, z_dim)."""
        h, c = self.embed(x, t, y)  # (B, N, D), (B, D)
        for i, block in enumerate(self.blocks):
            h = block(h, c)
            if i + 1 == self.encoder_depth and return_projections:
                projections = [projector(h) for projector in self.projectors]
        velocity = self.unpatchify(self.final_layer(h, c))[:, : x.shape[1]]
        return (velocity, projections) if return_projections else velocity


def alignment(projections, targets):
    """Mean cosine between tokens (B, N, z_dim), in float32; REPA's term is its negative."""
    return (
        (F.normalize(projections.float(), dim=-1) * F.normalize(targets.float(), dim=-1))
        .sum(dim=-1)
        .mean()
    )


# ======================================================================================================================
# DINOv2 (https://arxiv.org/abs/2304.07193), whose patch tokens are the targets. Module names are the official files'.

ENCODERS = {
    f"dinov2_vit{letter}14{end}": dict(
        width=width, depth=depth, heads=heads, registers=4 * bool(end)
    )
    for letter, width, depth, heads in (("b", 768, 12, 12), ("s", 384, 12, 6), ("l", 1024, 24, 16))
    for end in ("", "_reg")
}


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = dit.Attention(width, heads)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)
            )
        )

    def forward(self, x):  # (B, N, D)
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """DINOv2's ViT, patch 14, as far as its patch tokens need it.

    positions    side of the grid of positions that the file holds (37: it was trained up to 518 px)
    registers    tokens without a place, 4 in the files whose names say _reg
    """

    def __init__(self, width=768, depth=12, heads=12, registers=0, positions=37):
        super().__init__()
        self.cls_token, self.mask_token = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, width)),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + positions**2, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, 14, stride=14)))
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.places = {}  # positions of the sides met so far

    def positions(self, side):
        """(1, 1 + side^2, D). REPA resamples them once, bicubic and antialiased (timm's way): not as DINOv2's own code
        does, which blurs nothing."""
        native = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if side == native:
            return self.pos_embed
        if side not in self.places:
            grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (native, native)).float()
            grid = F.interpolate(
                grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False
            )
            self.places[side] = torch.cat(
                [self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1
            )
        return self.places[side]

    def forward(self, x):
        """Normalised images (B, 3, 14 s, 14 s) -> patch tokens (B, s^2, D), row by row, after the last norm."""
        h = self.patch_embed(x)  # (B, D, s, s)
        side, h = h.shape[-1], h.flatten(2).transpose(1, 2)  # (B, s^2, D)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], dim=1) + self.positions(side)
        if hasattr(self, "register_tokens"):
            h = torch.cat([h[:, :1], self.register_tokens.expand(len(h), -1, -1), h[:, 1:]], dim=1)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)[:, -(side**2) :]

    @torch.no_grad()
    def encode(self, images, side):
        """uint8 (B, 3, H, W) -> (B, side^2, D), REPA's targets: normalised, then bicubic, without antialias."""
        mean, std = (
            images.new_tensor(v, dtype=torch.float32)[:, None, None]
            for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        x = (images.float() / 255 - mean) / std
        return self(
            F.interpolate(x, size=(14 * side, 14 * side), mode="bicubic", align_corners=False)
        )


def load_encoder(name, path, device):
    """-> (encode, its name for the record): encode(uint8 images (B, 3, H, W), side) -> (B, side^2, width) is all that
    training asks of an encoder, frozen and on the device.

    name    one of ENCODERS; or MODULE:FUNCTION, a function of (path, device) of yours that returns encode
    path    its weights; None: for DINOv2 those in torch hub's cache, else downloaded
    """
    import vae

    if ":" in name:
        try:
            module, function = name.split(":")
            encode = getattr(importlib.import_module(module), function)(path, device)
        except (ImportError, AttributeError, ValueError) as error:
            raise vae.InputError(f"--encoder {name}: cannot be had ({error})") from None
        return encode, f"{name} {dit.file_hash(path)[:16] if path else ''}"
    if name not in ENCODERS:
        raise vae.InputError(f"--encoder {name}: one of {', '.join(ENCODERS)}, or MODULE:FUNCTION")
    file = f"{name}{'4' * name.endswith('_reg')}_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{name.removesuffix('_reg')}/{file}"
    path = Path(path or Path(torch.hub.get_dir(), "checkpoints", Path(url).name))
    if not path.is_file():
        try:
            torch.hub.download_url_to_file(url, os.fspath(path))
        except OSError as error:
            raise vae.InputError(
                f"{path}: DINOv2's weights are not there ({type(error).__name__}): put {url} there, "
                "or take an encoder of yours (--encoder MODULE:FUNCTION)"
            ) from None
    model = (
        vae.load_weights(DINOv2(**ENCODERS[name]), vae.load(path), path)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    digest = dit.file_hash(path)
    vae.say(f"{path}: SHA-256 {digest}")  # its name carries no hash to check
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    return autocast(model.encode), f"{name} {digest[:16]}"


# ======================================================================================================================
# Training: SiT's loss - align_weight * alignment


class AlignedLatents(dit.Latents):
    """dit.Latents whose items bring the encoder's target too: ((moments, target), label, slot, files passed over), or
    in its place the image to encode, unless args.cache_features keeps targets on disk."""

    def __init__(self, args, device):
        import vae

        super().__init__(args, device)
        self.encode, self.encoder = load_encoder(args.encoder, args.encoder_weights, device)
        self.side, self.targets = self.grid[0] // CONFIGS[args.model]["patch_size"], None
        tokens = self.target([None, torch.zeros(1, 3, *self.images.size, dtype=torch.uint8)])
        if tokens.shape[1] != self.side**2:
            raise vae.InputError(
                f"--encoder {args.encoder}: gives {tokens.shape[1]} tokens, not {self.side**2}"
            )
        self.width = tokens.shape[2]

    def __getitem__(self, item):
        moments, *rest = super().__getitem__(item)
        if self.targets is not None:
            return (
                moments,
                torch.from_numpy(self.targets[item[0], int(self.mirrored(item))]),
            ), *rest
        if moments.dtype == torch.uint8:  # --no-cache: it is the image
            return (moments, moments), *rest
        image = self.images[item][0]
        return (moments, image.flip(2) if self.mirrored(item) else image), *rest

    def moments(self, batch):
        return super().moments(batch[0] if isinstance(batch, list) else batch)

    @torch.no_grad()
    def target(self, batch):
        """The first entry of a batch of items -> tokens (B, N, width) on the device."""
        target = batch[1].to(self.device, non_blocking=True)
        return self.encode(target, self.side) if target.dtype == torch.uint8 else target

    def cache(self, args, rank, world):
        super().cache(args, rank, world)
        if args.cache_features:
            self.targets = self.fill(
                args,
                rank,
                world,
                "features",
                1 + self.mirror,
                (self.side**2, self.width),
                lambda view: self.target([None, view]),
                encoder=self.encoder,
            )


def train(args, rank, world, device):
    data = AlignedLatents(args, device)
    run = dit.Run(
        args, rank, world, device, data, REPA, CONFIGS, path=args.path, z_dims=(data.width,)
    )

    def draw(predict, noise, labels):
        return sit.heun(reverse(predict), noise, labels, steps=26)

    while run.goes_on(draw):
        # --------------------------------------------------------------------------------------------------------------
        # TRAINING STEP
        for batch, sync in run.micro_batches():
            x1, x0, t, y = run.latents(batch)  # data, noise (b, c, h, w); (b,), (b,)
            target = data.target(batch[0])  # (b, N, width)
            alpha, sigma, d_alpha, d_sigma = sit.coefficients(1 - t[:, None, None, None], args.path)
            x, towards_noise = alpha * x1 + sigma * x0, -(d_alpha * x1 + d_sigma * x0)
            with sync:
                with run.autocast:
                    velocity, (projection,) = run.network(x, t, y, return_projections=True)
                loss, cosine = (
                    (velocity - towards_noise).square().mean(),
                    alignment(projection, target),
                )
                ((loss - args.align_weight * cosine) / run.accumulate).backward()
            run.meter.add(mse=loss, alignment=cosine)
        run.update(clip=1.0)
        # --------------------------------------------------------------------------------------------------------------


def reverse(predict):
    """A model of REPA's time and sign for sit.py's samplers."""
    return lambda x, t, y, level: -predict(x, 1 - t, y, level)


def main():
    import vae

    parser = sit.arguments(__doc__, CONFIGS)
    parser.add_argument(
        "--encoder", default="dinov2_vitb14", help="whose tokens to align with, see load_encoder()"
    )
    parser.add_argument("--encoder-weights", help="its file (default: torch hub's)")
    parser.add_argument("--align-weight", type=float, default=0.5)
    parser.add_argument(
        "--cache-features", action="store_true", help="on disk, beside the latents: large"
    )
    parser.set_defaults(mirror=False)  # REPA's recipe has none
    with vae.launch(
        parser,
        data="data/imagenet/train",
        out="repa.pt",
        steps=400_000,
        batch_size=256,
        lr=1e-4,
        save_every=10_000,
        sample_every=10_000,
    ) as (args, rank, world, device):
        if args.sample_from:
            sit.sample(args, rank, world, device, REPA, CONFIGS, reverse)
        else:
            train(args, rank, world, device)


if __name__ == "__main__":
    main()
