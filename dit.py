"""Diffusion transformers (DiT) on an autoencoder's latents, the paper's first generator.

DiT (https://arxiv.org/abs/2212.09748) cuts a latent into patches and denoises them with a transformer that timestep and
class steer through adaptive layer norms. EQ-VAE changes nothing here: only the latents are others, and training on them
is faster (Table 2). This file holds the network, Gaussian diffusion, the latent cache, training and sampling.

    python dit.py --vae out/eq.pt --data emoji --image-size 32 --model DiT-Ti/1 --batch-size 64 --steps 600 --lr 1e-3 \\
        --ema-decay 0.99 --out tiny-dit.pt                                  # a CPU, minutes; `bash demo.sh` goes before
    python dit.py --vae eqvae.pt --model DiT-B/2                            # one GPU
    torchrun --nproc_per_node=8 dit.py --vae eqvae.pt                       # eight: the paper's DiT-XL/2 on ImageNet
    torchrun --nproc_per_node=8 dit.py --sample-from dit.pt --vae eqvae.pt --samples dit.npz   # 50,000 pictures

The third line caches the latents of data/imagenet/train in eqvae-latents/, takes 400,000 steps of 256 and writes
dit.pt, with dit.jsonl (losses) and dit/ (pictures) beside it. Run again, it goes on where it stopped. To expect after
400,000 steps, 50,000 samples without guidance (Tables 2, 9): gFID 14.5 on EQ-VAE's latents, 19.5 on SD-VAE's.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "XL": (1152, 28, 16),
    "L": (1024, 24, 16),
    "B": (768, 12, 12),
    "S": (384, 12, 6),
    "Ti": (128, 4, 4),
}
CONFIGS = {
    f"DiT-{name}/{patch}": dict(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads)
    for name, (width, depth, heads) in SIZES.items()
    for patch in (2, 4, 8, 1)
}
LABEL_DROP = 0.1  # share of labels trained as the null class

# ======================================================================================================================
# The network. Module names are DiT's, so that its checkpoints load strictly.
#     B batch   C latent channels   h, w latent   p patch size   N = h w / p^2 tokens   D width


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)  # without weights: adaLN has them


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):  # (B, N, D)
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, heads, N, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block whose shifts, scales and gates are linear in c; all 0 at the start (adaLN-Zero)."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.attn = Attention(width, heads)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, hidden),
                act=nn.GELU(approximate="tanh"),
                fc2=nn.Linear(hidden, width),
            )
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):  # (B, N, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(
            6, dim=2
        )  # (B, 1, D)
        x = x + gate1 * self.attn(layer_norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(layer_norm(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(layer_norm(x) * (1 + scale) + shift)  # (B, N, p^2 outputs)


def sincos_positions(side, width):
    """(1, side^2, width): half of the channels encode the column, half the row, each as sines, then cosines."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1)[
        None
    ].float()


def timestep_features(t):
    """(B,) -> (B, 256): cosines, then sines, of t at 128 frequencies from 1 to 1 / 10000."""
    angles = t[:, None].float() * torch.exp(
        torch.arange(128, device=t.device) * (-math.log(10000) / 128)
    )
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class DiT(nn.Module):
    """DiT of any size; CONFIGS has the published ones (and Ti, the demo's).
    input_size, in_channels   of the latents: (B, in_channels, input_size, input_size)
    num_classes               labels are 0 .. num_classes - 1; label num_classes is the null class. 0: unconditional
    learn_sigma               twice as many output channels: the noise, then what its variance is interpolated with
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        num_classes=1000,
        learn_sigma=True,
    ):
        config = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"latents of {input_size}x{input_size} cannot be cut into patches of {patch_size}"
            )
        self.config = config  # what a checkpoint keeps
        self.patch_size = patch_size
        width, outputs = hidden_size, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = nn.Sequential(
            OrderedDict(proj=nn.Conv2d(in_channels, width, patch_size, patch_size))
        )
        self.t_embedder = nn.Sequential(
            OrderedDict(
                mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
            )
        )
        self.y_embedder = nn.Sequential(
            OrderedDict(embedding_table=nn.Embedding(num_classes + 1, width))
        )
        self.pos_embed = nn.Parameter(
            sincos_positions(input_size // patch_size, width), requires_grad=False
        )
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * outputs)
        self.initialize()

    def initialize(self):
        """Xavier for the linear layers, N(0, 0.02) for the embeddings, 0 for adaLN and the output: each block starts as
        the identity, the whole network as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(
            self.x_embedder.proj.weight.data.flatten(1)
        )  # the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (
            self.y_embedder.embedding_table,
            self.t_embedder.mlp[0],
            self.t_embedder.mlp[2],
        ):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (
            *(block.adaLN_modulation[1] for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def config_of(cls, weights):
        """The arguments that an official file's shapes tell."""
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        return dict(
            input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch,
            patch_size=patch,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=next(heads for *size, heads in SIZES.values() if size == [width, depth]),
            num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1,
            learn_sigma=len(weights["final_layer.linear.bias"]) == 2 * channels * patch**2,
        )

    def embed(self, x, t, y):
        h = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D)
        return h, self.t_embedder(timestep_features(t)) + self.y_embedder(y)  # and c (B, D)

    def unpatchify(self, h):  # (B, N, p^2 outputs)
        side, p = math.isqrt(h.shape[1]), self.patch_size
        h = h.reshape(len(h), side, side, p, p, -1)  # (B, h/p, w/p, p, p, outputs)
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).float()

    def forward(self, x, t, y):
        """Noised latents (B, C, h, w), timesteps (B,) of 0 .. 999, labels (B,) -> (B, 2C, h, w), or C (learn_sigma)."""
        h, c = self.embed(x, t, y)
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c))  # float32, also under autocast


def read_generator(path, network=DiT):
    """-> (arguments of a network like DiT, its weights, the EMA where there is one, the rest of the checkpoint or {}).
    Reads our own files and the official ones (bare, or {model, ema, opt, args}), whose shapes tell the configuration.
    InputError for anything else."""
    import vae

    checkpoint, arch = vae.load(path), network.__name__
    if "arch" in checkpoint:
        if checkpoint["arch"] != arch:
            raise vae.InputError(f"{path}: holds a {checkpoint['arch']}, not a {arch}")
        return checkpoint["config"], checkpoint["ema"] or checkpoint["model"], checkpoint
    weights = checkpoint.get("ema", checkpoint)
    try:
        return network.config_of(weights), weights, {}
    except (KeyError, AttributeError, StopIteration):
        raise vae.InputError(
            f"{path}: no {arch} in it, neither in our layout nor in the official one"
        ) from None


# ======================================================================================================================
# Gaussian diffusion: DDPM (https://arxiv.org/abs/2006.11239) with learned variances (https://arxiv.org/abs/2102.09672)
#     q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t)      p(x_{t-1} | x_t) = N(mean(x_t, eps), variance(x_t, v))


class GaussianDiffusion:
    """The linear schedule of 1,000 steps, or for sampling `steps` of them, evenly spaced; tables made in float64.

    i is an index into the steps kept; the network is always given the step of the 1,000, timesteps[i].
    """

    def __init__(self, steps=1000, device=None):
        strides = np.append(0, np.full(steps - 1, 999 / (steps - 1)))
        self.timesteps = (
            strides.cumsum().round().astype(int)
        )  # a running sum, to round as DiT's does
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[self.timesteps]
        previous = np.append(1.0, alpha_bar[:-1])  # alpha_bar of the step that comes next
        beta = 1 - alpha_bar / previous
        variance = beta * (1 - previous) / (1 - alpha_bar)  # of q(x_{t-1} | x_t, x_0); 0 at step 0
        variance[0] = variance[min(1, steps - 1)]

        def table(values):
            return (
                torch.from_numpy(values).float().to(device)[:, None, None, None]
            )  # (steps, 1, 1, 1)

        self.signal, self.noise = table(np.sqrt(alpha_bar)), table(np.sqrt(1 - alpha_bar))
        self.to_x0, self.to_x0_eps = (
            table(np.sqrt(1 / alpha_bar)),
            table(np.sqrt(1 / alpha_bar - 1)),
        )
        self.next_signal, self.next_noise = table(np.sqrt(previous)), table(np.sqrt(1 - previous))
        self.mean_x0 = table(beta * np.sqrt(previous) / (1 - alpha_bar))
        self.mean_x = table((1 - previous) * np.sqrt(1 - beta) / (1 - alpha_bar))
        self.log_least, self.log_most = table(np.log(variance)), table(np.log(beta))

    def add_noise(self, x0, i, noise):
        """x_t for latents x0 (B, C, h, w), steps i (B,) and N(0, 1) noise like x0."""
        return self.signal[i] * x0 + self.noise[i] * noise

    def read(self, output, x, i):
        """The network's output (B, 2C, h, w) at x (B, C, h, w) -> eps, x0, and mean and log variance of the next x."""
        eps, v = output.chunk(2, dim=1)
        x0 = self.to_x0[i] * x - self.to_x0_eps[i] * eps
        fraction = (v + 1) / 2  # learned range: between the two bounds
        log_variance = fraction * self.log_most[i] + (1 - fraction) * self.log_least[i]
        return eps, x0, self.mean_x0[i] * x0 + self.mean_x[i] * x, log_variance

    def losses(self, output, x0, x, i, noise):
        """-> (mse, vb), each (B,), whose sum is DiT's hybrid loss: the noise's squared error, and the variational bound
        in bits per value, which trains the variance alone. (The factor T / 1000 sometimes quoted is 1 here.)"""
        eps, v = output.chunk(2, dim=1)
        _, _, mean, log_variance = self.read(torch.cat([eps.detach(), v], dim=1), x, i)
        true_mean, true_log_variance = self.mean_x0[i] * x0 + self.mean_x[i] * x, self.log_least[i]
        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        vb = torch.where(
            i[:, None, None, None] == 0, -log_likelihood(x0, mean, 0.5 * log_variance), kl
        )
        return (noise - eps).square().mean(dim=(1, 2, 3)), vb.mean(dim=(1, 2, 3)) / math.log(2)

    def step(self, output, x, i, noise):
        """x_t -> x_{t-1}: DDPM with N(0, 1) noise like x, DDIM (https://arxiv.org/abs/2010.02502, eta = 0) without."""
        eps, x0, mean, log_variance = self.read(output, x, i)
        if noise is None:
            return self.next_signal[i] * x0 + self.next_noise[i] * eps
        return (
            mean + (0.5 * log_variance).exp() * noise * (i > 0)[:, None, None, None]
        )  # none at the last step

    @torch.no_grad()
    def sample(self, predict, noise, labels, sampler="ddpm", noise_like=torch.randn_like):
        """Noise (B, C, h, w), labels (B,) -> latents, with predict(x, t, labels, level) of guided(), once a step."""
        x = noise
        for k in reversed(range(len(self.timesteps))):
            i = torch.full((len(x),), k, device=x.device)
            t = torch.full_like(i, int(self.timesteps[k]))
            output = predict(x, t, labels, self.timesteps[k] / 999)
            x = self.step(output, x, i, None if sampler == "ddim" else noise_like(x))
        return x


def log_likelihood(x, mean, log_std):
    """log N(x; mean, std) of the bin of width 2 / 255 around x, ADM's term for step 0. (Latents are neither binned nor
    confined to [-1, 1]; DiT kept the term, so it stays.)"""

    def cdf(z):  # the normal's, approximated
        return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))

    above, below = (cdf((x - mean + side / 255) * torch.exp(-log_std)) for side in (1, -1))
    inner = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inner).clamp(min=1e-12).log()


def guided(model, null, cfg_scale=1.0, low=0.0, high=1.0, channels=None):
    """-> predict(x, t, y, level): classifier-free guidance (https://arxiv.org/abs/2207.12598), u + cfg_scale (c - u).

    It acts where low <= level <= high (0: data, 1: noise; https://arxiv.org/abs/2404.07724), on the first `channels` of
    the latents (None: all of them; the official code of DiT and SiT guides 3 of 4). cfg_scale 1 is the plain model.
    """

    def predict(x, t, y, level):
        if cfg_scale == 1 or not low <= level <= high:
            return model(x, t, y)
        c, u = model(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)])
        ).chunk(2)
        n = channels or x.shape[1]  # what is not guided stays conditional
        return torch.cat([u[:, :n] + cfg_scale * (c[:, :n] - u[:, :n]), c[:, n:]], dim=1)

    return predict


def file_hash(path):
    """SHA-256 of a file, or of all the files in a folder of diffusers'."""
    digest = hashlib.sha256()
    for part in sorted(p for p in Path(path).rglob("*") if p.is_file()) or [path]:
        digest.update(np.memmap(part, mode="r"))
    return digest.hexdigest()


# ======================================================================================================================
# The latents: encoded once, image and mirror image, as mean and std, of which every step draws a fresh sample


class Latents(torch.utils.data.Dataset):
    """What generators train on: images under the autoencoder args.vae, encoded as they come, or beforehand by cache().

    Items are (moments (2c, h, w), label, slot, files passed over), with a uint8 image in the place of its moments where
    there is no cache; moments() makes them equal. Half of the items are mirrored, a function of (seed, step, slot).
    """

    def __init__(self, args, device):
        import vae

        if not args.vae:
            raise vae.InputError(
                "--vae: give the autoencoder on whose latents to train (vae.py makes one: eqvae.pt)"
            )
        self.seed, self.mirror, self.device, self.rows = args.seed, args.mirror, device, None
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.autoencoder = vae.load_autoencoder(args.vae, args.vae_model).to(
            device, memory_format=layout
        )
        self.vae = dict(file=args.vae, sha256=file_hash(args.vae))
        self.images = vae.Images(args.data, (args.image_size, args.image_size))
        self.grid = self.autoencoder.grid(self.images.size)
        if (
            self.autoencoder.scaling_factor is None
        ):  # LDM's kl-f16, for one, comes without its scale
            measured = vae.measure_latents(self.autoencoder, self.images)
            pair = vae.average(
                torch.tensor([measured["scale"], measured["shift"]], dtype=torch.float64)
            )
            self.autoencoder.scaling_factor, self.autoencoder.shift_factor = pair.tolist()

    def __len__(self):
        return len(self.images)

    def mirrored(self, item):
        import vae

        return self.mirror and bool(
            torch.randint(2, (), generator=vae.seeded(self.seed, "mirror", *item[1:]))
        )

    def __getitem__(self, item):
        index, _, slot = item
        if self.rows is not None:
            return (
                torch.from_numpy(self.rows[index, int(self.mirrored(item))]),
                self.images.labels[index],
                slot,
                0,
            )
        image, label, _, passed = self.images[item]
        return image.flip(2) if self.mirrored(item) else image, label, slot, passed

    @torch.no_grad()
    def moments(self, batch):
        """A batch of items' first entry -> means and standard deviations (B, 2c, h, w), float32, on the device."""
        import vae

        if batch.dtype != torch.uint8:
            return batch.to(self.device, non_blocking=True).float()
        posterior = self.autoencoder.encode(
            vae.to_float(batch, self.device)
        )  # in fp32: it is what is learned from
        return torch.cat([posterior.mean, posterior.std], dim=1)

    def cache(self, args, rank, world):
        """Keeps the moments of all images and mirror images on disk, unless args.no_cache."""
        if not args.no_cache:
            shape = (2 * self.autoencoder.config["z_channels"], *self.grid)
            self.rows = self.fill(
                args, rank, world, "latents", 2, shape, self.moments, autoencoder=self.vae["sha256"]
            )

    def fill(self, args, rank, world, what, views, shape, compute, **manifest):
        """-> rows (N, views, *shape), float16 mapped from disk: compute(uint8 images) of each image and, with 2 views,
        of its mirror image. An earlier run's are gone on with, if they belong to the same things."""
        import vae

        root, files = (
            os.path.normpath(args.data),
            self.images.files,
        )  # emoji are no files: [] stands for them
        names = [file[len(root) :] for file in files if isinstance(file, str)]
        sizes = [
            os.path.getsize(root + names[int(k)])
            for k in np.linspace(0, len(names) - 1, 256 * bool(names))
        ]
        images = hashlib.sha256(json.dumps([len(files), names, sizes]).encode()).hexdigest()
        folder = args.cache or f"{os.path.splitext(os.path.normpath(args.vae))[0]}-latents"
        cache = vae.Rows(
            folder if what == "latents" else f"{folder}-{what}",
            (len(files), views, *shape),
            "float16",
            images=images,
            image_size=self.images.size,
            **manifest,
        )
        missing = cache.missing[rank::world]
        batches = torch.utils.data.DataLoader(
            torch.utils.data.Subset(self.images, missing.tolist()),
            min(32, args.micro_batch or 32),
            num_workers=args.workers,
            worker_init_fn=vae.leave_signals,
            pin_memory=self.device.type == "cuda",
        )
        bar = vae.progress(len(missing), 0, f"caching {what}", "image")
        for batch, _, index, _ in batches if len(missing) else ():
            if vae.SIGNALS:
                break
            parts = [compute(view) for view in (batch, batch.flip(3))[:views]]
            cache.write(index.numpy(), torch.stack(parts, dim=1).half().cpu().numpy())
            bar.update(len(batch))
        bar.close()
        if stopped := vae.stop_signal():  # for which each process waits until all are done
            vae.say(
                f"stopped: {int(cache.done.sum()):,} of {len(self):,} images are cached; the same command goes on"
            )
            raise SystemExit(128 + stopped)
        return cache.rows


# ======================================================================================================================
# Training


class Run:
    """What the training of DiT, SiT and REPA has in common, all but the step: see train(). `data` is a Latents,
    `network` a class like DiT, `options` are its arguments beside those of configs[args.model]."""

    def __init__(self, args, rank, world, device, data, network, configs, **options):
        import vae

        torch.manual_seed(args.seed)
        self.kit = vae
        self.args, self.rank, self.world, self.device, self.data = args, rank, world, device, data
        self.out, self.autoencoder, self.classes = (
            Path(args.out),
            data.autoencoder,
            data.images.classes,
        )
        self.micro, self.accumulate = vae.split_batch(args, world)
        resumed = vae.load(self.out) if self.out.exists() and not args.bench else None
        self.arch, self.began = network.__name__, resumed["step"] if resumed else None
        self.step = self.began or 0
        config = dict(
            configs[args.model],
            input_size=data.grid[0],
            num_classes=len(self.classes),
            in_channels=self.autoencoder.config["z_channels"],
            **options,
        )
        if config["input_size"] % config["patch_size"]:
            raise vae.InputError(
                f"--model {args.model}: its patches do not divide latents of {data.grid[0]} x "
                f"{data.grid[1]}; take another, or another --image-size"
            )
        self.model = network(**config)
        if resumed:
            wrong = (
                f"holds another model than --model {args.model}"
                if resumed.get("arch") != self.arch or resumed["args"]["model"] != args.model
                else f"trained on the latents of another autoencoder ({resumed['vae']['file']})"
                if resumed["vae"]["sha256"] != data.vae["sha256"]
                else "trained on latents of another size, with other classes or options"
                if resumed["config"] != self.model.config
                else None
            )
            if wrong:
                raise vae.InputError(f"{self.out}: {wrong}; give another --out")
            scale, shift = resumed["latent"]["scale"], resumed["latent"]["shift"]
            self.autoencoder.scaling_factor, self.autoencoder.shift_factor = scale, shift
            vae.say_changes(resumed["args"], vars(args))
            vae.load_weights(self.model, resumed["model"], self.out)
        self.model.to(device)
        weights = resumed["ema"] if resumed else self.model.state_dict()
        self.ema = {name: p.to(device, copy=True) for name, p in weights.items()}
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trainable, args.lr, betas=(0.9, 0.999), weight_decay=0, fused=True
        )
        if resumed:
            self.optimizer.load_state_dict(resumed["opt"])
            self.optimizer.param_groups[0]["lr"] = args.lr
        for block in self.model.blocks if args.compile else ():
            block.compile()  # one graph, which all blocks share: compiles in seconds
        self.network = (
            self.model
            if world == 1
            else nn.parallel.DistributedDataParallel(
                self.model, [device] if device.type == "cuda" else None
            )
        )
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=args.precision == "bf16"
        )
        self.meter = vae.Meter(args, resumed, world, device)
        data.cache(args, rank, world)
        vae.say(
            f"{args.model}: {sum(p.numel() for p in self.model.parameters()):,} parameters; {len(data):,} images, "
            f"{len(self.classes)} classes, latents {config['in_channels']}x{data.grid[0]}x{data.grid[1]} scaled by "
            f"{self.autoencoder.scaling_factor:.5f}; steps {self.step} to {args.steps} of {args.batch_size} "
            f"({world} x {self.accumulate} x {self.micro}), lr {args.lr:g}; {device.type}, {args.precision}"
        )
        self.batches = vae.loader(data, args, self.micro, self.step, rank, world)
        self.meter.start(self.step)

    def goes_on(self, draw):
        """Before each step: the pictures, by draw(predict, noise, labels) -> latents, and the checkpoint when they are
        due or a signal came; whether there is a step to take."""
        args, stopped, new = self.args, self.kit.stop_signal(), self.step != self.began
        last = self.step >= args.steps or stopped
        if self.rank == 0 and not args.bench:
            if (
                new
                and args.sample_every
                and (self.step % args.sample_every == 0 or self.step >= args.steps)
            ):
                self.look(draw)
            if new and (
                last or self.step % args.save_every == 0
            ):  # a run that was over stays as it is
                self.save()
        if last:
            self.meter.bar.close()
            self.kit.say(
                f"{self.out}: {'stopped' if stopped else 'finished'} at step {self.step} of {args.steps}"
            )
            if (
                stopped := self.kit.stop_signal()
            ):  # for which the other processes wait until all is saved
                raise SystemExit(128 + stopped)
        return not last

    @torch.no_grad()
    def look(self, draw):
        """Samples of the EMA from the same noise and labels each time, in a grid."""
        shape = (16, self.autoencoder.config["z_channels"], *self.data.grid)
        noise = torch.randn(shape, generator=self.kit.seeded(self.args.seed, "look")).to(
            self.device
        )
        labels = torch.arange(16, device=self.device) % max(1, len(self.classes))
        predict = guided(
            lambda *inputs: torch.func.functional_call(self.model, self.ema, inputs),
            len(self.classes),
            self.args.cfg_scale,
        )
        with self.autocast:
            z = draw(predict, noise, labels)
        pictures = self.autoencoder.decode(self.autoencoder.denormalize(z.float()))
        self.kit.image_grid(pictures.split(8)).save(
            self.out.with_suffix("") / f"{self.step:07d}.png"
        )

    def save(self):
        latent = dict(scale=self.autoencoder.scaling_factor, shift=self.autoencoder.shift_factor)
        self.kit.save_checkpoint(
            self.out,
            dict(
                arch=self.arch,
                config=self.model.config,
                model=self.model.state_dict(),
                ema=self.ema,
                step=self.step,
                opt=self.optimizer.state_dict(),
                args=vars(self.args),
                latent=latent,
                vae=self.data.vae,
                classes=self.classes,
            ),
        )

    def micro_batches(self):
        """A step's micro-batches, each with a context for its backward pass: processes average gradients last."""
        for part in range(self.accumulate):
            wait = self.world > 1 and part < self.accumulate - 1
            yield next(self.batches), self.network.no_sync() if wait else contextlib.nullcontext()

    def latents(self, batch):
        """A batch -> normalised latents x0 and N(0, 1) noise (b, c, h, w), a uniform number in [0, 1) (b,), labels
        (b,), a tenth of them null. All that is random is a function of (seed, step, slot in the global batch)."""
        batch, labels, slots, passed = batch
        moments, seed = self.data.moments(batch), self.args.seed  # (b, 2c, h, w)
        mean, std = moments.chunk(2, dim=1)
        fresh, noise = self.kit.slot_noise(moments, seed, self.step, slots).chunk(
            2, dim=1
        )  # (b, c, h, w) each
        uniform = torch.stack(
            [torch.rand(2, generator=self.kit.seeded(seed, "t", self.step, int(k))) for k in slots]
        )
        labels = torch.where(uniform[:, 1] < LABEL_DROP, len(self.classes), labels)
        self.meter.add(unreadable=passed.sum())
        uniform, labels = (
            each.to(self.device, non_blocking=True) for each in (uniform[:, 0], labels)
        )
        return self.autoencoder.normalize(mean + std * fresh), noise, uniform, labels

    def update(self, clip=math.inf):
        """The optimiser's step, the gradients' norm clipped, and the EMA's. A norm that is not finite skips the step in
        every process, without a host sync: the fused step then changes nothing, as under AMP."""
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.trainable])
        nn.utils.clip_grads_with_norm_(self.trainable, clip, grad_norm)
        self.optimizer.found_inf = (~grad_norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(
            list(self.ema.values()), list(self.model.state_dict().values()), 1 - self.args.ema_decay
        )
        self.step += 1
        self.meter.step(self.step, grad_norm, self.optimizer.found_inf)


def train(args, rank, world, device):
    run = Run(args, rank, world, device, Latents(args, device), DiT, CONFIGS)
    diffusion = GaussianDiffusion(device=device)

    def draw(predict, noise, labels):
        return GaussianDiffusion(50, device).sample(predict, noise, labels, "ddim")

    while run.goes_on(draw):
        # --------------------------------------------------------------------------------------------------------------
        # TRAINING STEP
        for batch, sync in run.micro_batches():
            x0, noise, uniform, y = run.latents(batch)  # (b, c, h, w) each, (b,), (b,)
            t = (1000 * uniform).long()  # 0 .. 999
            x = diffusion.add_noise(x0, t, noise)
            with sync:
                with run.autocast:
                    output = run.network(x, t, y)  # (b, 2c, h, w)
                mse, vb = (each.mean() for each in diffusion.losses(output, x0, x, t, noise))
                ((mse + vb) / run.accumulate).backward()
            run.meter.add(mse=mse, vb=vb)
        run.update()
        # --------------------------------------------------------------------------------------------------------------


# ======================================================================================================================
# Sampling


def sample(args, rank, world, device):
    import vae

    if not 2 <= args.sampling_steps <= 1000:
        raise vae.InputError(f"--sampling-steps {args.sampling_steps}: 2 to 1000")
    config, weights, about = read_generator(args.sample_from)
    model = (
        vae.load_weights(DiT(**config), weights, args.sample_from)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    diffusion = GaussianDiffusion(args.sampling_steps, device)
    predict = guided(
        model,
        config["num_classes"],
        args.cfg_scale,
        args.guidance_low,
        args.guidance_high,
        3 if args.three_channels else None,
    )
    write_samples(
        args,
        rank,
        world,
        device,
        config,
        about,
        lambda noise, labels, noise_like: diffusion.sample(
            predict, noise, labels, args.sampler, noise_like
        ),
        sampler=args.sampler,
        sampling_steps=args.sampling_steps,
        three_channels=args.three_channels,
        model=next(k for k in CONFIGS if CONFIGS[k].items() <= config.items()),
    )


@torch.no_grad()
def write_samples(args, rank, world, device, config, about, draw, **settings):
    """Fills args.samples, ADM's layout (arr_0: uint8 (N, H, W, 3); arr_1: labels), with what draw(noise, labels,
    noise_like) -> latents decodes to, and draws the first of it. Sample i depends on (seed, i) alone, to rounding.

    config, about    of read_generator()
    settings         what else the draw depends on, for the record FILE.json
    """
    import vae

    # What can be wrong with the arguments is found before anything is written
    classes, count = config["num_classes"], args.num_samples
    out = Path(args.samples or Path(args.sample_from).with_suffix(".npz"))
    if not args.vae:
        raise vae.InputError(
            "--vae: give the autoencoder on whose latents the generator was trained"
        )
    autoencoder = vae.load_autoencoder(args.vae, args.vae_model).to(device)
    sha256 = {file: file_hash(file) for file in (args.sample_from, args.vae)}
    if about and about["vae"]["sha256"] != sha256[args.vae]:
        raise vae.InputError(
            f"--vae {args.vae}: {args.sample_from} was trained on the latents of another autoencoder "
            f"({about['vae']['file']}, SHA-256 {about['vae']['sha256'][:16]})"
        )
    if about:
        autoencoder.scaling_factor, autoencoder.shift_factor = (
            about["latent"]["scale"],
            about["latent"]["shift"],
        )
    if (
        autoencoder.scaling_factor is None
        or autoencoder.config["z_channels"] != config["in_channels"]
    ):
        raise vae.InputError(
            f"--vae {args.vae}: its latents' scale is unknown, or they have other channels than the "
            f"generator's {config['in_channels']}"
        )
    if args.cfg_scale < 0 or args.cfg_scale != 1 and not classes:
        raise vae.InputError(
            f"--cfg-scale {args.cfg_scale:g}: at least 0, and 1 for a generator without classes"
        )
    if not 0 <= args.guidance_low <= args.guidance_high <= 1:
        raise vae.InputError("--guidance-low, --guidance-high: noise levels, 0 <= low <= high <= 1")
    if count < world:
        raise vae.InputError(
            f"--num-samples {count}: fewer than the {world} processes; at least one each"
        )
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise vae.InputError(
            f"--samples {out}: give a name that ends in .npz, in a folder that is there"
        )
    known = [str(label) for label in range(max(1, classes))]
    if args.labels == "uniform":  # DiT's protocol
        labels = [
            int(torch.randint(len(known), (), generator=vae.seeded(args.seed, "label", i)))
            for i in range(count)
        ]
    else:
        given = known if args.labels == "balanced" else args.labels.split(",")
        if not set(given) <= set(known):
            raise vae.InputError(
                f"--labels {args.labels}: uniform, balanced, or some of 0 to {known[-1]}, as 0,0,0"
            )
        labels = [int(given[i % len(given)]) for i in range(count)]
    record = dict(
        generator=sha256[args.sample_from],
        autoencoder=sha256[args.vae],
        seed=args.seed,
        num_samples=count,
        labels=args.labels,
        cfg_scale=args.cfg_scale,
        guidance=[args.guidance_low, args.guidance_high],
        precision=args.precision,
        step=about.get("step"),
        **settings,
    )
    if out.exists():
        kept = out.with_suffix(".json")
        if not kept.exists() or json.loads(kept.read_text()) != record:
            raise vae.InputError(
                f"--samples {out}: already there, with other settings; give another name"
            )
        return vae.say(f"{out}: already there")

    size = config["input_size"] * autoencoder.factor
    images = vae.Rows(f"{out}.part", (count, size, size, 3), "uint8", **record)
    missing, batch = images.missing[rank::world], max(1, args.batch_size // world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    bar = vae.progress(len(missing), 0, f"{out.name}: sampling", "image")
    for indices in np.split(missing, range(batch, len(missing), batch)):
        if vae.SIGNALS or not len(indices):
            break
        generators = [vae.seeded(args.seed, "sample", int(i)) for i in indices]

        def noise_like(x):
            noise = torch.stack(
                [torch.randn(x.shape[1:], generator=generator) for generator in generators]
            )
            return (noise.pin_memory() if x.is_cuda else noise).to(x, non_blocking=True)

        noise = noise_like(
            torch.empty(1, config["in_channels"], *[config["input_size"]] * 2, device=device)
        )
        with autocast:
            z = draw(noise, torch.tensor([labels[i] for i in indices], device=device), noise_like)
        pictures = [autoencoder.decode(part) for part in autoencoder.denormalize(z).split(32)]
        if not all(part.isfinite().all() for part in pictures):
            raise vae.InputError(
                f"{args.sample_from}: some of the samples {indices.tolist()} are not finite"
            )
        images.write(
            indices,
            torch.cat([vae.to_uint8(part) for part in pictures]).permute(0, 2, 3, 1).cpu().numpy(),
        )
        bar.update(len(indices))
    bar.close()
    stopped = vae.stop_signal()  # for which each process waits until all are done
    if rank == 0 and not stopped:
        with open(f"{out}.tmp", "wb") as file:
            np.savez(file, arr_0=images.rows, arr_1=np.array(labels))
        shown = torch.from_numpy(images.rows[:64] / 127.5 - 1).permute(0, 3, 1, 2)
        vae.image_grid(shown.split(8)).save(out.with_suffix(".png"))
        out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        os.replace(f"{out}.tmp", out)
        shutil.rmtree(f"{out}.part")
        vae.say(f"{out}: {count:,} samples, the first of them in {out.with_suffix('.png')}")
    elif stopped:
        vae.say(
            f"{out}: stopped, {int(images.done.sum()):,} of {count:,} are there; the same command goes on"
        )
    if stopped := vae.stop_signal():
        raise SystemExit(128 + stopped)


def arguments(description, models):
    """The parser of a script that trains a generator on latents and samples from it, but for launch()'s flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--model", choices=models, default=next(iter(models)))
    parser.add_argument("--vae", help="the autoencoder: vae.py's, or an LDM .ckpt with --vae-model")
    parser.add_argument(
        "--vae-model", help="preset of a file that does not say it: sd, sdxl, sd3, sd-16"
    )
    parser.add_argument(
        "--cache",
        help="folder of the cached latents (default: NAME-latents beside the autoencoder)",
    )
    parser.add_argument("--no-cache", action="store_true", help="encode on the fly")
    parser.add_argument(
        "--mirror", action=argparse.BooleanOptionalAction, default=True, help="half of the images"
    )
    parser.add_argument(
        "--ema-decay", type=float, default=0.9999, help="of the weights that samples are drawn with"
    )
    # sampling
    parser.add_argument(
        "--sample-from", help="checkpoint to sample from, ours or official: no training"
    )
    parser.add_argument(
        "--samples", help="FILE.npz to write, or to go on with (default: beside the checkpoint)"
    )
    parser.add_argument("--num-samples", type=int, default=50_000)
    parser.add_argument(
        "--labels", default="uniform", help="at random, or balanced, or classes, as in 207,360"
    )
    parser.add_argument("--sampling-steps", type=int, default=250)
    parser.add_argument(
        "--cfg-scale", type=float, default=1.0, help="of guidance, in the pictures of training too"
    )
    parser.add_argument(
        "--guidance-low",
        type=float,
        default=0.0,
        help="noise levels to guide at: 0 is data, 1 noise",
    )
    parser.add_argument("--guidance-high", type=float, default=1.0)
    parser.add_argument(
        "--three-channels",
        action="store_true",
        help="guide 3 channels alone, as DiT's and SiT's code",
    )
    return parser


def main():
    import vae

    parser = arguments(__doc__, CONFIGS)
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm")
    with vae.launch(
        parser,
        data="data/imagenet/train",
        out="dit.pt",
        steps=400_000,
        batch_size=256,
        lr=1e-4,
        save_every=10_000,
        sample_every=10_000,
    ) as (args, rank, world, device):
        (sample if args.sample_from else train)(args, rank, world, device)


if __name__ == "__main__":
    main()
