"""Diffusion transformers (DiT) on an autoencoder's latents: the paper's first generator.

DiT (https://arxiv.org/abs/2212.09748) cuts a latent into patches and denoises them with a
transformer. The timestep and the class control it through adaptive layer norms. EQ-VAE
(https://arxiv.org/abs/2502.09509) changes nothing here: only the latents differ, and training on
them is faster (Table 2).

    here             DiT's paper   time
    latents (data)   x0            none: t = 0 already has one step of noise
    noise            eps           t = 999
    x                x_t           t = 0 to 999

    python dit.py --vae tiny.pt --data data/emoji/train --model DiT-Ti/2 --batch-size 64 \\
        --steps 800 --lr 1e-3 --ema-decay 0.99 --out tiny-dit.pt    # minutes on a CPU
    python dit.py --vae eqvae.pt --model DiT-B/2                    # one GPU
    torchrun --nproc_per_node=8 dit.py --vae eqvae.pt               # eight GPUs: DiT-XL/2
    torchrun --nproc_per_node=8 dit.py --sample-from dit.pt --vae eqvae.pt --samples dit.npz

The first torchrun line caches the latents of data/imagenet/train in eqvae-latents/ (42 GB; give
--cache for a second data set), takes 400,000 steps of 256 images, and writes dit.pt, dit.jsonl
(losses) and dit/ (pictures). The same command again goes on where the run stopped. The last line
draws 50,000 pictures. EQ-VAE's paper has FID 14.5 on its latents after 400,000 steps, 19.5 on
SD-VAE's, without guidance (Tables 2 and 9).

--data is a folder of images, with a sub-folder for each class, or without, for no classes.

From Python:

    model, checkpoint = load_generator("dit.pt")    # checkpoint["classes"]: their names
    autoencoder = vae.load_autoencoder("eqvae.pt")
    pictures = generate(model, autoencoder, [207, 360], sampler="ddim", steps=50, cfg_scale=4)

From the top: network, diffusion and guidance, training, the cache of latents, sampling. sit.py and
repa.py import all but diffusion, training and samplers; maskgit.py imports what reads and writes
files: caches, checkpoints, samples. sit.py and repa.py have train() functions of their own, which
are copies of the one here. There, apart from names, lines that are marked "# SiT" and "# REPA"
replace those that are marked "# DiT"; repa.py adds some more.
"""

import argparse
import contextlib
import functools
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

VAE_ERROR = None
try:  # network, diffusion and guidance do without vae.py
    import vae
    from vae import InputError  # fails, as it should, if it is another module called vae
except ImportError as error:
    vae = None
    InputError = ValueError
    VAE_ERROR = error

# name -> (width, blocks, attention heads)
SIZES = {
    "XL": (1152, 28, 16),
    "L": (1024, 24, 16),
    "B": (768, 12, 12),
    "S": (384, 12, 6),
    "Ti": (128, 4, 4),  # ours, for a CPU
}
CONFIGS = {}  # name -> arguments of DiT; the first is the default
for size, (width, depth, heads) in SIZES.items():
    for patch in (2, 4, 8, 1):
        CONFIGS[f"DiT-{size}/{patch}"] = dict(
            patch_size=patch, hidden_size=width, depth=depth, num_heads=heads
        )
LABEL_DROP = 0.1  # share of the labels that training replaces by the null class


# ==================================================================================================
# The network. Module names are DiT's, so that its checkpoints load strictly.
#     B batch   C latent channels   h, w latent   p patch size   N = h w / p^2 tokens   D width


def layer_norm(x):
    """LayerNorm without weights of its own: adaLN's scale and shift take their place."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):  # (B, N, D)
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).flatten(2))  # (B, N, D)


def feed_forward(width, hidden, activation):
    layers = dict(fc1=nn.Linear(width, hidden), act=activation, fc2=nn.Linear(hidden, width))
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """A transformer block. A linear layer on SiLU(c), 0 at the start, gives its shifts, scales and
    gates."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = feed_forward(width, int(width * mlp_ratio), nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):  # (B, N, D), (B, D)
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)  # (B, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(layer_norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(layer_norm(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):  # (B, N, D), (B, D)
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(layer_norm(x) * (1 + scale) + shift)  # (B, N, outputs)


def sincos_positions(side, width):
    """(1, side^2, width): half of the channels encode the column, half the row; sines first."""
    exponents = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * 10000**-exponents
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns = line.repeat(side, 1)  # (side^2, D / 2)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)[None].float()


def timestep_features(t):
    """(B,) -> (B, 256): cosines, then sines, of t at 128 frequencies from 1 to nearly 1 / 10000."""
    exponents = torch.arange(128, device=t.device) * (-math.log(10000) / 128)
    angles = t[:, None].float() * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class DiT(nn.Module):
    """DiT of any size. CONFIGS has the published ones, and smaller ones of ours.

    input_size   side of the latents (B, in_channels, input_size, input_size)
    patch_size   p
    in_channels  C
    hidden_size, depth, num_heads, mlp_ratio   D, blocks, attention heads, the MLPs' width over D
    num_classes  labels are 0 .. num_classes - 1, and label num_classes is the null class; 0 means
                 unconditional
    learn_sigma  twice as many output channels: the noise, then the weights with which the variance
                 is interpolated between its bounds
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
        config = dict(locals())  # the arguments; Python adds __class__ where super() is used
        config.pop("self")
        config.pop("__class__")
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"latents of {input_size}x{input_size} cannot be cut into patches of {patch_size}"
            )
        self.config = config  # what a checkpoint keeps
        self.checkpoint = {}  # entries of the file that it comes from: load_generator() sets them
        self.patch_size = patch_size
        out_channels = 2 * in_channels if learn_sigma else in_channels
        width = hidden_size
        self.x_embedder = nn.Sequential(
            OrderedDict(proj=nn.Conv2d(in_channels, width, patch_size, patch_size))
        )
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.Sequential(OrderedDict(mlp=mlp))
        self.y_embedder = nn.Sequential(
            OrderedDict(embedding_table=nn.Embedding(num_classes + 1, width))
        )
        positions = sincos_positions(input_size // patch_size, width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * out_channels)
        self.initialize()

    def initialize(self):
        """Xavier for the linear layers, N(0, 0.02) for the embeddings, 0 for adaLN and the output:
        each block starts as the identity, the whole network as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer that is written as a convolution
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zeros = [block.adaLN_modulation[1] for block in self.blocks]
        zeros += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    ANCHOR = "x_embedder.proj.weight"  # vae.find_weights() knows its files by this weight

    @classmethod
    def config_of(cls, weights, **options):
        """The constructor's arguments, as far as the shapes in an official file tell them; the
        `options` are the others. KeyError, IndexError or ValueError for another file."""
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        heads = {(size[0], size[1]): size[2] for size in SIZES.values()}
        if (width, depth) not in heads:
            raise ValueError(f"{depth} blocks of width {width} match none of {', '.join(SIZES)}")
        out_channels = len(weights["final_layer.linear.bias"]) // patch**2
        return dict(
            input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch,
            patch_size=patch,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=heads[width, depth],
            num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1,
            learn_sigma=out_channels == 2 * channels,
            **options,
        )

    def embed(self, x, t, y):
        """The blocks' input: tokens (B, N, D), and the condition c (B, D) of timestep and class."""
        h = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        # In float32 also under autocast: bf16 cannot tell the cosines near 1 apart
        with torch.autocast(x.device.type, enabled=False):
            c = self.t_embedder(timestep_features(t))
        return h, c + self.y_embedder(y)

    def unpatchify(self, tokens):  # (B, N, p^2 out_channels)
        side = math.isqrt(tokens.shape[1])
        p = self.patch_size
        # (B, h / p, w / p, p, p, out_channels) -> (B, out_channels, h / p, p, w / p, p)
        patches = tokens.reshape(len(tokens), side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return patches.flatten(4, 5).flatten(2, 3).float()  # (B, out_channels, h, w)

    def forward(self, x, t, y):
        """Noised latents (B, C, h, w), timesteps (B,) of 0 .. 999, labels (B,)
        -> (B, 2C, h, w), or C channels without learn_sigma; float32 also under autocast."""
        h, c = self.embed(x, t, y)
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c))


# ==================================================================================================
# Gaussian diffusion: DDPM (https://arxiv.org/abs/2006.11239) with learned variances
# (https://arxiv.org/abs/2102.09672)
#     q(x_t | x0) = N(sqrt(alpha_bar_t) x0, 1 - alpha_bar_t)
#     p(x_{t-1} | x_t) = N(mean(x_t, eps), variance(x_t, v))


class GaussianDiffusion:
    """The linear schedule of 1,000 steps, or for sampling `steps` of them (at least 2), evenly
    spaced.

    i is an index into the steps that are kept. The network is always given the step of the 1,000,
    timesteps[i]. Tables are made in float64 and kept in float32 on the device, (steps, 1, 1, 1).
    """

    def __init__(self, steps=1000, device=None):
        # DiT adds the strides up one by one; the rounding of its sums decides which steps are kept
        strides = np.append(0, np.full(steps - 1, 999 / (steps - 1)))
        self.timesteps = strides.cumsum().round().astype(int)
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[self.timesteps]
        alpha_bar_prev = np.append(1.0, alpha_bar[:-1])  # of the step that sampling goes to
        beta = 1 - alpha_bar / alpha_bar_prev
        variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)  # of q(x_{t-1} | x_t, x0)
        variance[0] = variance[1]  # it is 0 there, and has no logarithm

        def table(values):
            return torch.from_numpy(values).float().to(device)[:, None, None, None]

        self.signal_scale = table(np.sqrt(alpha_bar))
        self.noise_scale = table(np.sqrt(1 - alpha_bar))
        self.x0_from_x = table(np.sqrt(1 / alpha_bar))
        self.x0_from_eps = table(np.sqrt(1 / alpha_bar - 1))
        self.prev_signal = table(np.sqrt(alpha_bar_prev))
        self.prev_noise = table(np.sqrt(1 - alpha_bar_prev))
        self.mean_from_x0 = table(beta * np.sqrt(alpha_bar_prev) / (1 - alpha_bar))
        self.mean_from_x = table((1 - alpha_bar_prev) * np.sqrt(1 - beta) / (1 - alpha_bar))
        self.log_variance_low = table(np.log(variance))
        self.log_variance_high = table(np.log(beta))

    def add_noise(self, x0, i, noise):
        """x_t for latents x0 (B, C, h, w), steps i (B,) and N(0, 1) noise like x0."""
        return self.signal_scale[i] * x0 + self.noise_scale[i] * noise

    def posterior_mean(self, x0, x, i):
        """The mean of q(x_{t-1} | x_t, x0)."""
        return self.mean_from_x0[i] * x0 + self.mean_from_x[i] * x

    @staticmethod
    def split(output, x):
        """The network's output (B, 2C, h, w) at x (B, C, h, w) -> its halves, eps and v."""
        if output.shape[1] != 2 * x.shape[1]:
            raise ValueError("GaussianDiffusion needs a network with learn_sigma=True")
        return output.chunk(2, dim=1)

    def interpret(self, eps, v, x, i):
        """What eps and v say of x: -> x0, and the mean and log variance of the next x."""
        x0 = self.x0_from_x[i] * x - self.x0_from_eps[i] * eps
        fraction = (v + 1) / 2  # of the way between the two bounds of the variance
        low = self.log_variance_low[i]
        log_variance = fraction * self.log_variance_high[i] + (1 - fraction) * low
        return x0, self.posterior_mean(x0, x, i), log_variance

    def losses(self, output, x0, x, i, noise):
        """The two terms of DiT's hybrid loss, mse and vb, each (B,).

        mse is the squared error of the noise. vb is the variational bound in bits per value, and
        trains the variance alone.
        """
        eps, v = self.split(output, x)
        _, mean, log_variance = self.interpret(eps.detach(), v, x, i)
        true_mean = self.posterior_mean(x0, x, i)
        true_log_variance = self.log_variance_low[i]
        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        at_data = -log_likelihood(x0, mean, 0.5 * log_variance)
        vb = torch.where(i[:, None, None, None] == 0, at_data, kl)
        mse = (noise - eps).square().mean(dim=(1, 2, 3))
        return mse, vb.mean(dim=(1, 2, 3)) / math.log(2)

    def step(self, output, x, i, noise):
        """x_t -> x_{t-1}. DDPM with N(0, 1) noise like x; DDIM (https://arxiv.org/abs/2010.02502,
        eta = 0) with None."""
        eps, v = self.split(output, x)
        x0, mean, log_variance = self.interpret(eps, v, x, i)
        if noise is None:
            return self.prev_signal[i] * x0 + self.prev_noise[i] * eps
        is_last = (i == 0)[:, None, None, None]  # no noise is added there
        return mean + torch.where(is_last, 0, (0.5 * log_variance).exp() * noise)

    @torch.no_grad()
    def sample(self, predict, noise, labels, sampler="ddpm", noise_like=torch.randn_like):
        """Noise (B, C, h, w), labels (B,) -> latents x0, by one call of the network a step.

        predict     (x, t, labels, level) -> output, as guided() makes it; level is the noise
                    level, 0 (data) to 1 (noise)
        sampler     "ddpm" or "ddim"
        noise_like  x -> N(0, 1) like x, for ddpm
        """
        if sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler {sampler!r}: ddpm or ddim")
        x = noise
        for k in reversed(range(len(self.timesteps))):
            i = torch.full((len(x),), k, device=x.device)
            t = torch.full((len(x),), int(self.timesteps[k]), device=x.device)
            output = predict(x, t, labels, self.timesteps[k] / 999)
            fresh = None if sampler == "ddim" else noise_like(x)
            x = self.step(output, x, i, fresh)
        return x


def log_likelihood(x, mean, log_std):
    """log N(x; mean, std) of the bin of width 2 / 255 around x: ADM's term for step 0.

    Latents are neither binned nor confined to [-1, 1]. DiT kept the term, so it stays.
    """

    def cdf(z):  # the normal distribution's, approximated
        return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))

    precision = torch.exp(-log_std)
    above = cdf((x - mean + 1 / 255) * precision)
    below = cdf((x - mean - 1 / 255) * precision)
    inner = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inner).clamp(min=1e-12).log()


def guided(model, null, cfg_scale=1.0, low=0.0, high=1.0, channels=None):
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): u + cfg_scale (c - u), of the
    outputs c with the class and u without.

    null       the label that stands for no class
    low, high  noise levels (0: data, 1: noise) between which it acts, both included
               (https://arxiv.org/abs/2404.07724)
    channels   how many of the latents' channels are guided; None: all. (The official code of DiT
               and SiT guides 3 of 4.)

    -> predict(x, t, y, level). cfg_scale 1 is the plain model.
    """

    def predict(x, t, y, level):
        if cfg_scale == 1 or not low <= level <= high:
            return model(x, t, y)
        both = model(
            torch.cat([x, x]),
            torch.cat([t, t]),
            torch.cat([y, torch.full_like(y, null)]),
        )
        c, u = both.chunk(2)
        n = channels or x.shape[1]
        mixed = u[:, :n] + cfg_scale * (c[:, :n] - u[:, :n])
        return torch.cat([mixed, c[:, n:]], dim=1)  # what is not guided stays conditional

    return predict


# ==================================================================================================
# Training


def train(args, rank, world, device):
    # The run to go on with, if there is one. (args get its values for flags that were not given.)
    # Then the autoencoder, with its file and hash, and the images
    resumed = vae.load_run(args, "DiT", CONFIGS, required=ENTRIES)
    torch.manual_seed(args.seed)
    autoencoder, source = load_latent_space(args, resumed, device)
    images = open_images(args, autoencoder)
    null = len(images.classes)  # the label that stands for no class
    micro_batch = vae.images_per_pass(args, world)

    # The network, its optimiser and the average of its weights
    config = network_config(args, CONFIGS[args.model], autoencoder, images)  # DiT
    model = start_network(DiT, config, args, resumed, images).to(device)
    parameters = vae.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.999), weight_decay=0, fused=True)
    vae.restore_optimizers([optimizer], resumed)
    ema = vae.start_ema(model, args.ema_decay, resumed, device)
    compile_blocks(args, model.blocks)
    network = distribute(model, device, world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    diffusion = GaussianDiffusion(device=device)  # DiT: 1,000 steps of noise

    step = resumed["step"] if resumed else 0
    vae.check_same_start(step, model, images, source)  # compares processes
    # Scale and shift of the latents. If they are unknown, they are measured, and set
    latent = measure_scale(args, autoencoder, images)
    vae.say_duration(args, step, device, forward_pass_of(model))  # if it is a CPU
    data = latent_data(args, rank, world, device, autoencoder, source, images)
    batches = vae.endless_batches(data, args, step, rank, world)
    log = vae.Log(args, step, world, device)
    vae.say_start(args, model, data, world, micro_batch, device, images.classes)
    first_step = step
    if resumed is None:
        preview(args, step, log, model, ema, draw_ddim, autoencoder, autocast)
    resumed = None  # frees the loaded tensors
    log.begin(step)

    while step < args.steps and not vae.stop_signal():
        # ------------------------------------------------------------------------------------------
        # TRAINING STEP. All that is random in it is a function of (seed, step), drawn for the whole
        # batch; this process takes its share
        _, rng = vae.step_rngs(args.seed, step, device)  # (on the CPU, on the device)
        moments, labels, _, readable = next(batches)  # mean and std; uint8 images with --no-cache
        shape = (args.batch_size, config["in_channels"], *autoencoder.latent_size)
        vae_noise = vae.rank_slice(torch.randn(shape, generator=rng, device=device), rank, world)
        noise = vae.rank_slice(torch.randn(shape, generator=rng, device=device), rank, world)
        uniform = torch.rand((args.batch_size, 2), generator=rng, device=device)
        time_draw, drop_draw = vae.rank_slice(uniform, rank, world).unbind(dim=1)  # DiT
        t = (1000 * time_draw).long()  # DiT: 0 .. 999, of which 0 is next to the data
        y = torch.where(drop_draw < LABEL_DROP, null, labels.to(device, non_blocking=True))
        log.count(unreadable=(~readable).sum())  # files, for which others stand in

        passes = len(moments) // micro_batch
        for k in range(passes):
            rows = slice(k * micro_batch, (k + 1) * micro_batch)
            mean, std = mean_and_std(moments[rows], autoencoder, device)  # (b, C, h, w) each
            latents = autoencoder.normalize(mean + std * vae_noise[rows])
            x = diffusion.add_noise(latents, t[rows], noise[rows])  # DiT
            with sync_gradients(network, is_last=k == passes - 1):
                with autocast:
                    output = network(x, t[rows], y[rows])  # DiT: (b, 2C, h, w)
                mse, vb = diffusion.losses(output, latents, x, t[rows], noise[rows])  # DiT
                loss = mse.mean() + vb.mean()  # DiT
                (loss / passes).backward()
            log.add(mse=mse, vb=vb)  # DiT

        # The step. If the gradients' norm is not finite, the weights stay. The host need not wait
        # for the norm, since a fused optimiser does nothing where its attribute found_inf is 1
        # (made for GradScaler, which is not used here)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = (~grad_norm.isfinite()).float()
        optimizer.found_inf = skipped
        optimizer.step()
        optimizer.zero_grad()
        vae.update_ema(ema, model, args.ema_decay, step)  # its decay is warmed up, unlike DiT's
        step += 1
        # ------------------------------------------------------------------------------------------
        log.step(step, skipped, grad_norm, args.lr)
        if vae.is_due(step, args.sample_every, last=args.steps):
            preview(args, step, log, model, ema, draw_ddim, autoencoder, autocast)
        if vae.is_due(step, args.save_every) and step < args.steps:
            save(args, step, model, optimizer, images, ema=ema, vae=source, latent=latent)

    # A run that went no step is saved only if it has no file yet: a finished one is left as it is
    if step > first_step or not os.path.exists(args.out):
        save(args, step, model, optimizer, images, ema=ema, vae=source, latent=latent)
    log.end(step)


def draw_ddim(predict, noise, labels, noise_like):
    """The latents of the pictures that preview() shows: 50 steps of DDIM."""
    return GaussianDiffusion(50, noise.device).sample(predict, noise, labels, "ddim")


# --------------------------------------------------------------------------------------------------
# Shared with sit.py and repa.py, and some with maskgit.py: the latent space, the network, pictures,
# checkpoints

# What a checkpoint holds besides network and optimiser
ENTRIES = ("ema", "step", "args", "latent", "vae", "classes")


def load_latent_space(args, checkpoint, device):
    """The autoencoder in --vae, on the device, and its file and hash, for checkpoints and caches.

    checkpoint  the generator's entries, if there is one. The autoencoder must be the one that it
                was trained on, and the latents get the scale that they had then
    """
    if not args.vae:
        raise InputError(
            "--vae: name the autoencoder on whose latents to train, or on which the generator was "
            "trained (vae.py makes one: eqvae.pt)"
        )
    options = dict(padding_mode=args.padding_mode, flag="--vae-model")
    autoencoder = vae.load_autoencoder(args.vae, args.vae_model, **options)
    autoencoder.sha256 = vae.weights_hash(autoencoder)
    source = dict(file=str(args.vae), sha256=autoencoder.sha256)
    if checkpoint:
        check_source(f"--vae {args.vae}", autoencoder, checkpoint["vae"])
        set_scale(autoencoder, checkpoint["latent"])
    return autoencoder.to(device, memory_format=vae.convolution_layout(device)), source


def check_source(name, autoencoder, source):
    """InputError if the latents or tokens that a generator was trained on came from elsewhere.

    name    of the autoencoder, for the message
    source  file and hash of the right one, from the generator's checkpoint
    """
    if not hasattr(autoencoder, "sha256"):  # it takes a second, and generate() is called often
        autoencoder.sha256 = vae.weights_hash(autoencoder)
    if source["sha256"] != autoencoder.sha256:
        raise InputError(
            f"{name}: the generator was trained with another one ({source['file']}, SHA-256 "
            f"{source['sha256'][:16]}); give that one, or train anew with another --out"
        )


def set_scale(autoencoder, latent):
    autoencoder.scaling_factor = latent["scale"]
    autoencoder.shift_factor = latent["shift"]


def open_images(args, autoencoder):
    """Sets the sizes of images and latents, and opens --data. -> ImageFolder

    autoencoder.image_size becomes the (H, W) of the generator's training, a square: --image-size,
    or else the longer side that the autoencoder was itself trained at. autoencoder.latent_size
    becomes (h, w).
    """
    if args.image_size is None:
        args.image_size = max(autoencoder.image_size or (256, 256))
        vae.say(f"--image-size {args.image_size}: the autoencoder's longer side; 256 if unknown")
    autoencoder.image_size = (args.image_size, args.image_size)
    autoencoder.latent_size = autoencoder.grid(autoencoder.image_size)
    return vae.ImageFolder(args.data, autoencoder.image_size, "center", args.seed, args.mirror)


def forward_pass_of(model):
    """A function that passes one latent through the network, for vae.say_duration()."""
    side = model.config["input_size"]
    device = next(model.parameters()).device
    x = torch.zeros(1, model.config["in_channels"], side, side, device=device)
    label = torch.zeros(1, dtype=torch.long, device=device)
    t = label.float()  # SiT's and REPA's times are floats
    return lambda: model(x, t, label)


def network_config(args, preset, autoencoder, images):
    """The arguments of the network for these latents and classes."""
    side = autoencoder.latent_size[0]
    if side % preset["patch_size"]:
        raise InputError(
            f"--model {args.model}: its patches do not divide latents of {side} x {side}; "
            "choose another model, or another --image-size"
        )
    return dict(
        preset,
        input_size=side,
        in_channels=autoencoder.config["z_channels"],
        num_classes=len(images.classes),
    )


def start_network(network_class, config, args, resumed, images):
    """A new network, or that of the run to go on with. InputError if that has other settings, or
    other classes."""
    if resumed is None:
        return network_class(**config)
    changed = []
    for name, value in config.items():
        before = resumed["config"].get(name)
        if before != value:
            changed.append(f"{name} {before}, now {value}")
    if resumed["classes"] != images.classes:
        changed.append(f"other classes ({vae.shortened(resumed['classes'])})")
    if changed:
        raise InputError(f"{args.out}: was trained with {'; '.join(changed)}; give another --out")
    return vae.build(network_class, vae.Stored(args.out, config, resumed["model"]))


def compile_blocks(args, blocks):
    """torch.compile for each block: one graph, which all of them share, compiles in seconds."""
    if not args.compile:
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        raise InputError("--compile: needs a C++ compiler, and none is installed")
    for block in blocks:
        block.compile()


def distribute(model, device, world):
    """The model, or with several processes the wrapper that averages its gradients."""
    if world == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def sync_gradients(network, is_last):
    """A context for a forward and backward pass. Only in the last pass of a step do processes
    average their gradients."""
    if is_last or not isinstance(network, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return network.no_sync()


@torch.no_grad()
def preview(args, step, log, model, ema, draw, autoencoder, autocast):
    """Writes OUT/0001000.png: samples with the average of the weights, from the same noise and
    labels each time.

    draw  (predict, noise, labels, noise_like) -> normalised latents
    """
    if not vae.MAIN or not args.sample_every:
        return
    device = next(model.parameters()).device
    shape = (model.config["in_channels"], *autoencoder.latent_size)
    noise = vae.sample_noise(shape, args.seed, range(16), device)
    null = model.config["num_classes"]
    labels = torch.arange(16, device=device) % max(1, null)
    weights = ema or model.state_dict()

    def average(x, t, y):
        return torch.func.functional_call(model, weights, (x, t, y))

    predict = guided(average, null, **guidance(args))
    with autocast:
        z = draw(predict, noise, labels, torch.randn_like)
    pictures = autoencoder.decode(autoencoder.denormalize(z.float()))
    log.picture(step, vae.image_grid(pictures.split(8)))


def guidance(args):
    """The command line's guidance, as guided() takes it."""
    return dict(
        cfg_scale=args.cfg_scale,
        low=args.guidance_low,
        high=args.guidance_high,
        channels=3 if args.three_channels else None,
    )


def save(args, step, model, optimizer, images, **entries):
    """Writes args.out, a dictionary of plain data.

    arch, config   class and arguments of the network
    model, opt     its weights, and the optimiser's state
    step, args     steps taken, the command's arguments
    classes        names of the classes

    and as `entries`, in dit.py, sit.py and repa.py

    ema            the average of the weights, or None
    vae, latent    file and hash of the autoencoder, scale and shift of its latents in training

    or in maskgit.py

    vqgan          file and hash of the VQ-GAN
    """
    checkpoint = dict(
        arch=type(model).__name__,
        config=model.config,
        model=model.state_dict(),
        opt=optimizer.state_dict(),
        step=step,
        args=vae.saved_arguments(args),
        classes=images.classes,
        **entries,
    )
    vae.save_run(args, checkpoint)


# ==================================================================================================
# The latents: encoded once, images and mirror images, as means and standard deviations, of which
# every step draws a fresh sample


def measure_scale(args, autoencoder, images):
    """Scale and shift of the latents, for the checkpoint. Where the autoencoder's file has none, as
    that of LDM's kl-f16, they are measured and set. All processes measure the same images, and take
    the mean of their results, which may differ by rounding."""
    if autoencoder.scaling_factor is None:
        centred = images.centred()  # never mirrored
        at_once = vae.most_at_once(args)
        measured = vae.measure_latents(autoencoder, centred, batch_size=at_once)
        pair = torch.tensor([measured["scale"], measured["shift"]], dtype=torch.float64)
        scale, shift = vae.mean_over_processes(pair).tolist()
        set_scale(autoencoder, dict(scale=scale, shift=shift))
    return dict(scale=autoencoder.scaling_factor, shift=autoencoder.shift_factor)


def latent_data(args, rank, world, device, autoencoder, source, images):
    """What to train on: the images' cached moments, or with --no-cache the images themselves."""
    if args.no_cache:
        return images

    def encode(batch):
        return torch.cat(mean_and_std(batch, autoencoder, device), dim=1).half()

    shape = (2 * autoencoder.config["z_channels"], *autoencoder.latent_size)
    cache = cache_folder(args, args.vae, "latents")
    made_of = dict(autoencoder=source["sha256"])
    return cached(args, rank, world, cache, images, encode, shape, "float16", made_of)


@torch.no_grad()
def mean_and_std(batch, autoencoder, device):
    """Cached moments (B, 2C, h, w), mean and then std, or uint8 images (B, 3, H, W) -> mean and std
    of the latents (B, C, h, w), float32. Images are encoded without autocast, because they are the
    training data."""
    if batch.dtype == torch.uint8:
        posterior = autoencoder.encode(vae.to_float(batch, device))
        return posterior.mean, posterior.std
    return batch.to(device, non_blocking=True).float().chunk(2, dim=1)


# --------------------------------------------------------------------------------------------------
# Caches: of latents, of REPA's features, of MaskGIT's tokens


def cache_folder(args, autoencoder_file, what):
    """--cache, else NAME-latents or NAME-tokens beside the autoencoder NAME.pt or NAME/."""
    if args.cache:
        return args.cache
    stem = os.path.normpath(autoencoder_file)
    if os.path.isfile(autoencoder_file):
        stem = os.path.splitext(stem)[0]
    return f"{stem}-{what}"


def cached(args, rank, world, folder, images, encode, shape, dtype, made_of, mirror=True):
    """Encodes an ImageFolder once, and its mirror images. -> CachedViews

    encode   uint8 images (b, 3, H, W) -> tensor (b, *shape)
    made_of  what the rows depend on besides the images, for the folder's manifest
    mirror   whether the mirror images are needed

    A signal ends the run; what it has cached stays, and the same command caches the rest.
    """
    if os.path.realpath(folder) == os.path.realpath(Path(args.out).with_suffix("")):
        raise InputError(
            f"--cache {folder}: there --out {args.out} writes its pictures; give another folder"
        )
    views = 2 if mirror else 1
    shape = (len(images), views, *shape)

    @torch.no_grad()
    def encode_views(batch):
        mirrored = [batch, batch.flip(3)][:views]
        encoded = torch.stack([encode(view) for view in mirrored], dim=1)
        if not encoded.isfinite().all():
            raise InputError(
                f"--cache {folder}: some rows are NaN, infinite or too large for float16; delete "
                "the folder and do without this cache"
            )
        return encoded

    if not os.path.exists(folder):
        # Tries one image, so that an error comes before anything is written. images.centred() are
        # the same pictures, never mirrored
        image, _label, _index, _readable = images.centred()[0]
        encode_views(image[None])
    memo = Path(folder, "images.json")
    digest, remembered = images_hash(images, memo)
    made_of = dict(made_of, images=digest, image_size=images.size)
    rows = Rows(folder, shape, dtype, "--cache", **made_of)
    if vae.MAIN:
        with contextlib.suppress(InputError):  # a complete cache may lie where nobody may write
            vae.write_file(memo, lambda path: path.write_text(json.dumps(remembered)))

    # Batches of a fixed grid: rounding depends on the batch, and a cache should be the same however
    # often it was interrupted
    batches = rows.unfinished(min(32, args.micro_batch or 32), rank, world)
    batch_sampler = [batch.tolist() for batch in batches]
    loader = vae.data_loader(images.centred(), args.workers, batch_sampler=batch_sampler)
    progress = vae.Progress(sum(map(len, batches)), 0, f"{Path(folder).name}: caching", "image")
    if not batches:
        loader = ()  # so that no data loaders are started for a complete cache
    for batch, _, indices, readable in loader:
        # signal_heard() knows of a signal to any process and does not wait for the others, as
        # stop_signal() would: their numbers of batches may differ
        if vae.signal_heard():
            break
        if readable.any():
            rows.write(indices[readable].numpy(), encode_views(batch[readable]).cpu().numpy())
        rows.mark(indices[~readable].numpy(), UNREADABLE)
        progress.update(len(batch))
    progress.close()
    vae.leave_if_stopped(f"{folder}: stopped; the same command goes on")
    found = rows.wait_until_finished()  # indices
    labels = images.labels[found]
    return CachedViews(rows.path, found, labels, args.seed, mirror and args.mirror)


class CachedViews(torch.utils.data.Dataset):
    """The cached rows of pictures and of their mirror images.

    path     rows.npy of a cache: (N, views, ...), of each picture and perhaps its mirror image
    indices  of the rows whose picture could be read
    labels   of these rows

    Like vae.ImageFolder's, items are asked for as (epoch, index), and are (row, label, index,
    True). With `mirror` a random half of them are the mirror image's. The object holds paths and
    numbers alone, so it can be sent to data loaders; each opens the file itself.
    """

    def __init__(self, path, indices, labels, seed, mirror):
        self.path = path
        self.indices = indices
        self.labels = labels
        self.seed = seed
        self.mirror = mirror
        self.file = None
        self.process = None  # that opened the file: two must not share its position

    def __len__(self):
        return len(self.indices)

    def __getstate__(self):
        return dict(self.__dict__, file=None, process=None)

    def __getitem__(self, item):
        epoch, index = item
        view = int(self.mirror and vae.is_mirrored(self.seed, epoch, index))
        row = self.read(self.indices[index], view)
        return torch.from_numpy(row), int(self.labels[index]), index, True

    def read(self, row, view):
        """A copy of one row, read from where it lies. (A memory map reads 128 KB for each row that
        is not in memory. From a cache that is larger than memory, a batch would take many times as
        long.)"""
        if self.process != os.getpid():
            array = np.load(self.path, mmap_mode="r")  # reads the header alone
            self.shape = array.shape
            self.dtype = array.dtype
            self.offset = array.offset
            self.file = open(self.path, "rb", buffering=0)
            self.process = os.getpid()
        values = np.empty(self.shape[2:], self.dtype)
        number = int(np.ravel_multi_index((row, view), self.shape[:2]))
        self.file.seek(self.offset + number * values.nbytes)
        if self.file.readinto(values.reshape(-1).view(np.uint8)) != values.nbytes:
            raise InputError(f"{self.path}: was cut short; delete its folder")
        return values


def images_hash(images, memo):
    """SHA-256 of what an ImageFolder reads: the name and size of each file, and 4 KB out of its
    middle. The same pictures elsewhere have the same hash.

    memo  file of the last result. It holds as long as folder, names, sizes and times are the same

    -> (the hash, what the caller should write to `memo`)
    """
    root = os.path.normpath(images.root)
    about = hashlib.sha256(os.fsencode(os.path.abspath(root)))
    for file in images.files:
        status = os.stat(file)
        name = os.fsencode(os.path.relpath(file, root))
        about.update(b"%b %d %d\n" % (name, status.st_size, status.st_mtime_ns))
    about = about.hexdigest()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        last = vae.read_json(memo)
        if last.get("about") == about:
            return last["content"], last
    content = hashlib.sha256()
    for file in images.files:
        size = os.path.getsize(file)
        content.update(b"%b %d " % (os.fsencode(os.path.relpath(file, root)), size))
        with open(file, "rb") as opened:
            opened.seek(max(0, size // 2 - 2048))
            content.update(opened.read(4096))
    return content.hexdigest(), dict(about=about, content=content.hexdigest())


# --------------------------------------------------------------------------------------------------
# Rows on disk: caches, and samples

# What status.npy says of a row
MISSING = 0
THERE = 1
UNREADABLE = 2


class Rows:
    """An array (N, ...) on disk, which several processes fill, over several runs.

    FOLDER/rows.npy      the array
    FOLDER/status.npy    a byte for each row: MISSING, THERE or UNREADABLE
    FOLDER/manifest.json what the rows belong to; written last, so a folder without it is made anew

    Each process fills batches of its own, and writes by offset, so several machines can fill one
    folder on a network file system. With `exclusive` no other run may even read it. InputError if
    the folder belongs to something else, is not whole, or does not fit on the disk.
    """

    def __init__(self, folder, shape, dtype, flag, exclusive=False, **manifest):
        self.folder = Path(folder)
        self.flag = flag
        self.exclusive = exclusive
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)
        self.path = self.folder / "rows.npy"
        self.status_path = self.folder / "status.npy"
        if vae.MAIN:
            manifest = dict(manifest, shape=self.shape, dtype=self.dtype.name)
            try:
                self.prepare(json.loads(json.dumps(manifest)))
            except OSError as error:
                reason = error.strerror or error
                raise InputError(f"{flag} {folder}: cannot be used ({reason})") from None
        vae.barrier()
        # On machines that do not share this disk the file is another one, or none
        seen = self.status_path.read_bytes() if self.status_path.exists() else None
        vae.check_agreement(seen)
        self.status = self.read_status()
        vae.barrier()  # before one of them fills any

    def prepare(self, manifest):
        path = self.folder / "manifest.json"
        before = self.read_manifest(path)
        wrong = [name for name in manifest if before and before.get(name) != manifest[name]]
        if wrong:
            raise InputError(
                f"{self.flag} {self.folder}: belongs to other {', '.join(wrong)}; delete the "
                f"folder, or give another {self.flag}"
            )
        if before and not self.exclusive and (self.read_status() != MISSING).all():
            return  # no lock: any number of runs may read what is complete
        self.folder.mkdir(parents=True, exist_ok=True)
        vae.lock_folder(self.folder, f"{self.flag} {self.folder}")
        if before:
            return
        vae.say(f"{self.folder}: {math.prod(self.shape) * self.dtype.itemsize / 1e9:.3g} GB")
        reserve(self.path, self.shape, self.dtype)
        reserve(self.status_path, self.shape[:1], np.dtype("uint8"))
        vae.write_file(path, lambda part: part.write_text(json.dumps(manifest, indent=1)))

    def read_manifest(self, path):
        """{} where rows were never begun. InputError for a folder that holds something else."""
        names = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        names -= {"rows.npy", "status.npy", "manifest.json", "images.json"}
        if not all(name.endswith(".tmp") for name in names):
            raise InputError(f"{self.flag} {self.folder}: holds other files; give a new folder")
        try:
            return dict(vae.read_json(path)) if path.exists() else {}
        except (ValueError, TypeError):
            return dict(manifest="unreadable")  # so prepare() refuses the folder

    def read_status(self):
        """InputError if one of the two files is not what the manifest says, or was cut short."""
        try:
            rows = np.load(self.path, mmap_mode="r")
            status = np.array(np.load(self.status_path))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{self.folder}: not whole ({error}); delete it") from None
        if (rows.shape, rows.dtype, len(status)) != (self.shape, self.dtype, self.shape[0]):
            raise InputError(f"{self.folder}: its files do not fit together; delete it")
        return status

    def unfinished(self, size, rank, world):
        """This process's share of the batches of a fixed grid (rows 0 .. size - 1, and so on) in
        which a row is missing: a list of arrays of indices."""
        grid = np.split(np.arange(self.shape[0]), range(size, self.shape[0], size))
        missing = [batch for batch in grid if (self.status[batch] == MISSING).any()]
        return missing[len(missing) * rank // world : len(missing) * (rank + 1) // world]

    def write(self, indices, rows):
        """Rows (len(indices), ...) to their places, then their status."""
        write_rows(self.path, indices, np.asarray(rows, dtype=self.dtype))
        self.mark(indices, THERE)

    def mark(self, indices, status):
        write_rows(self.status_path, indices, np.full(len(indices), status, dtype=np.uint8))
        self.status[indices] = status

    def wait_until_finished(self):
        """Waits for all processes; -> indices of the rows that are there. InputError if some that
        should be are not."""
        vae.barrier()
        status = self.read_status()
        missing = int((status == MISSING).sum())
        if missing:
            raise InputError(
                f"{self.folder}: {missing:,} rows are missing; the same command goes on"
            )
        unreadable = int((status == UNREADABLE).sum())
        if unreadable:
            vae.say(f"{self.folder}: {unreadable:,} unreadable pictures are left out")
        return np.flatnonzero(status == THERE)


def reserve(path, shape, dtype):
    """An .npy file of zeros whose space on the disk is taken now. OSError if it does not fit."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            except OSError:
                os.unlink(path)
                raise


def write_rows(path, indices, rows):
    """Writes rows of an .npy file, each to where it lies."""
    offset = np.load(path, mmap_mode="r").offset
    with open(path, "r+b") as file:
        for index, row in zip(indices, rows):
            file.seek(offset + int(index) * row.nbytes)
            file.write(row.tobytes())


# ==================================================================================================
# Sampling, from Python: load_generator() and generate()


def load_generator(file, network_class=DiT, entries=ENTRIES, **options):
    """The generator in a file, for inference, on the CPU -> (model, entries of our checkpoint).

    entries  of our checkpoints, besides arch, config, model and opt
    options  arguments of the network that official files do not tell

    Reads our own files and the official ones, bare or as {model, ema, opt, args}, and takes the
    average of the weights where there is one. Of the entries "latent" is the scale and shift of
    the latents that it was trained on, "vae" file and hash of their autoencoder, and "classes" are
    the names of its classes. Official files tell none of them: then the entries are {}.

    The weights keep requires_grad, because autocast caches the bf16 copies of such weights alone.
    Others it would cast again at every call.
    """
    if vae is None:
        raise ImportError(f"load_generator() needs vae.py and eqloss.py ({VAE_ERROR})")
    path = find_generator(file)
    contents = vae.read_file(path)
    checkpoint = {}
    if vae.is_ours(contents):
        arch = network_class.__name__
        if contents["arch"] != arch:
            raise InputError(f"{path}: holds a {contents['arch']}, not a {arch}")
        vae.check_entries(path, contents, ("model", *entries))
        config = contents["config"]
        weights = contents.get("ema") or contents["model"]
        checkpoint = {key: contents[key] for key in entries if key != "ema"}
    else:
        config, weights = read_official(path, contents, network_class, options)
    model = vae.build(network_class, vae.Stored(path, config, weights)).eval()
    model.checkpoint = checkpoint
    return model, checkpoint


def find_generator(path):
    """path, or the checkpoint of the run whose folder it is: dit/ stands for dit.pt."""
    beside = Path(f"{os.path.normpath(path)}.pt")
    if os.path.isdir(path) and not beside.is_file():
        raise InputError(f"{path}: a folder; give a file, ours or official, not diffusers'")
    return beside if os.path.isdir(path) else path


def read_official(path, checkpoint, network_class, options):
    """Configuration and weights of an official file, whose shapes tell the configuration."""
    weights = vae.find_weights(checkpoint, network_class.ANCHOR)
    if weights is None:
        raise InputError(
            f"{path}: no {network_class.__name__} checkpoint, neither ours nor an official one "
            "(diffusers' layout is not read)"
        )
    try:
        return network_class.config_of(weights, **options), weights
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a known {network_class.__name__} ({error})") from None


def generate(
    model, autoencoder, labels, seed=0, indices=None, sampler="ddpm", steps=250, **options
):
    """Draws a picture for each of the labels, N numbers or names of classes: uint8 (N, H, W, 3).

    model        of load_generator(), on any device
    autoencoder  vae.load_autoencoder()'s, on the same device: the one of the generator's training.
                 Another is an InputError, a ValueError. (Official files do not tell theirs)
    indices      numbers of the pictures (default: 0 .. N - 1). A picture is a function of (seed,
                 its number, its label) and of the sampler
    sampler      "ddpm" or "ddim", in `steps` steps
    options      cfg_scale, low, high, channels of guided(); precision, "fp32" or "bf16"

    The autoencoder gets the scale and shift that its latents had in the generator's training.
    """
    if sampler not in ("ddpm", "ddim") or not 2 <= steps <= 1000:
        raise ValueError(f"sampler {sampler!r}, {steps} steps: ddpm or ddim, 2 to 1000 steps")
    diffusion = GaussianDiffusion(steps, next(model.parameters()).device)

    def draw(predict, noise, labels, noise_like):
        return diffusion.sample(predict, noise, labels, sampler, noise_like)

    return draw_pictures(draw, model, autoencoder, labels, seed, indices, **options)


@torch.no_grad()
def draw_pictures(
    draw, model, autoencoder, labels, seed=0, indices=None, precision="fp32", **options
):
    """What generate() of dit.py, sit.py and repa.py have in common.

    draw  (predict, noise, labels, noise_like) -> normalised latents; noise_like(x) is fresh noise,
          whatever x is
    """
    device = next(model.parameters()).device
    side = model.config["input_size"]
    shape = (model.config["in_channels"], side, side)
    labels = check_labels(labels, model, precision).to(device)
    if model.checkpoint:
        check_source("autoencoder", autoencoder, model.checkpoint["vae"])
        set_scale(autoencoder, model.checkpoint["latent"])
    if indices is None:
        indices = range(len(labels))
    rngs = [vae.seeded(seed, "sample", int(i)) for i in indices]

    def noise_like(x):
        rows = [torch.randn(shape, generator=rng) for rng in rngs]
        return vae.to_device(torch.stack(rows), device)

    predict = guided(model, model.config["num_classes"], **options)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        start = noise_like(None)  # it does not read its argument
        z = draw(predict, start, labels, noise_like)
    return decode_pictures(autoencoder.decode, autoencoder.denormalize(z.float()))


def check_labels(labels, model, precision):
    """The labels as a tensor (N,). ValueError for what generate() cannot draw."""
    null = model.config["num_classes"]  # the label that stands for no class; it may be given, too
    if isinstance(labels, str):
        labels = [labels]
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if isinstance(labels, (list, tuple)):
        labels = numbers_of("labels", labels, max(1, null), model.checkpoint.get("classes", []))
    labels = torch.as_tensor(labels)
    is_list = labels.dim() == 1 and len(labels) > 0 and not labels.is_floating_point()
    if not is_list or not 0 <= labels.min() <= labels.max() <= null:
        raise ValueError(f"labels: give a list of whole numbers from 0 to {null}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision {precision!r}: fp32 or bf16")
    return labels


@torch.no_grad()
def decode_pictures(decode, latents):
    """Latents or tokens (B, ...) -> uint8 pictures (B, H, W, 3), decoded 32 at a time."""
    pictures = []
    for part in latents.split(32):
        decoded = decode(part)
        if not decoded.isfinite().all():
            raise InputError("some of the generator's samples are not finite numbers")
        pictures.append(vae.to_uint8(decoded).permute(0, 2, 3, 1).cpu())
    return torch.cat(pictures).numpy()


# --------------------------------------------------------------------------------------------------
# Sampling, from the command line: ADM's npz, arr_0 uint8 (N, H, W, 3), arr_1 labels


def sample(args, rank, world, device):
    settings = dict(sampler=args.sampler)
    calls = args.sampling_steps
    sample_latents(args, rank, world, device, load_generator, CONFIGS, generate, settings, calls)


def sample_latents(args, rank, world, device, load, configs, generate, settings, calls):
    """Fills --samples with a generator's pictures: what dit.py, sit.py and repa.py have in common.

    load      a load_generator()
    configs   the presets, for the model's name in the record
    settings  arguments of generate() that are the script's own
    calls     how often generate() calls the network for a batch
    """
    # All arguments are checked before anything is written
    out = samples_path(args, world)
    if args.guidance_low > args.guidance_high:
        raise InputError("--guidance-low: must not exceed --guidance-high")
    if args.three_channels and args.cfg_scale == 1:
        raise InputError("--three-channels: is not read without --cfg-scale")
    if not 2 <= args.sampling_steps <= 1000:
        raise InputError(f"--sampling-steps {args.sampling_steps}: must be 2 to 1000")
    model, checkpoint = load(args.sample_from)
    config = model.config
    check_guidance(args.cfg_scale, config["num_classes"])
    autoencoder, source = load_latent_space(args, checkpoint, device)
    if autoencoder.scaling_factor is None:
        raise InputError(f"--vae {args.vae}: the scale of its latents is unknown")
    if autoencoder.config["z_channels"] != config["in_channels"]:
        raise InputError(
            f"--vae {args.vae}: its latents have {autoencoder.config['z_channels']} channels, "
            f"the generator's {config['in_channels']}"
        )
    record = sampling_record(args, model, source, configs)
    record |= dict(
        cfg_scale=args.cfg_scale,
        guidance=[args.guidance_low, args.guidance_high],
        three_channels=args.three_channels,
        sampling_steps=args.sampling_steps,
        **settings,
    )
    if "path" in config:  # SiT's and REPA's
        record["path"] = config["path"]
    settings = dict(settings, steps=args.sampling_steps, **guidance(args))
    make_pictures = functools.partial(generate, model.to(device), autoencoder, **settings)
    side = config["input_size"] * autoencoder.factor
    write_samples(args, rank, world, out, model, side, make_pictures, calls, record)


def sampling_record(args, model, source, configs):
    """What every generator's samples depend on: for the record beside them."""
    names = vae.matching_presets(model.config, configs)
    return dict(
        model=names[0] if names else Path(args.sample_from).stem,
        generator=vae.weights_hash(model),
        autoencoder=source["sha256"],
        step=model.checkpoint.get("step"),
        args=model.checkpoint.get("args"),
        seed=args.seed,
        num_samples=args.num_samples,
        labels=args.labels,
        precision=args.precision,
    )


def samples_path(args, world):
    """The npz to write. InputError if it cannot be."""
    out = Path(args.samples or Path(args.sample_from).with_suffix(".npz"))
    is_writable = out.suffix == ".npz" and out.parent.is_dir()
    if not is_writable or out.is_dir() or out.with_suffix(".json").is_dir():
        raise InputError(
            f"--samples {out}: give a name that ends in .npz, in a folder that is there"
        )
    if args.num_samples < world:
        raise InputError(
            f"--num-samples {args.num_samples}: fewer than the {world} processes; at least one each"
        )
    return out


def check_guidance(cfg_scale, num_classes):
    if cfg_scale != 1 and not num_classes:
        raise InputError(f"--cfg-scale {cfg_scale:g}: must be 1 for a generator without classes")


def choose_labels(args, num_classes, names):
    """--labels -> an array of args.num_samples labels. `names` are those of the classes, or []."""
    known = max(1, num_classes)
    if args.labels == "uniform":  # DiT's protocol; a function of (seed, index)
        labels = [
            torch.randint(known, (), generator=vae.seeded(args.seed, "label", i))
            for i in range(args.num_samples)
        ]
        return np.array([int(label) for label in labels])
    if args.labels == "balanced":
        return np.arange(args.num_samples) % known
    given = [args.labels]
    if args.labels not in names:  # "tench, Tinca tinca" is one name
        given = args.labels.split(",")
    chosen = np.array(numbers_of(f"--labels {args.labels}", given, known, names))
    return chosen[np.arange(args.num_samples) % len(given)]


def numbers_of(what, labels, num_classes, names):
    """Names of classes, or numbers as text ("207") -> numbers. Labels that are numbers already stay
    what they are. InputError, which begins with `what`, for names of no class."""
    numbers = {name: label for label, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):  # else a number would have two meanings
        numbers |= {str(label): label for label in range(num_classes)}
    unknown = [label for label in labels if isinstance(label, str) and label not in numbers]
    if unknown:
        raise InputError(
            f"{what}: no class {', '.join(unknown)}; give some of {vae.shortened(list(numbers))}"
        )
    return [numbers.get(label, label) for label in labels]


def write_samples(args, rank, world, out, model, side, make_pictures, calls, record):
    """Fills the npz `out` with samples, and shows the first of them in a PNG beside it.

    side           of the pictures
    make_pictures  the script's generate(), with all arguments that are the same for every batch
    calls          how often make_pictures() calls the model for a batch, for the progress bar
    record         all that the pictures depend on: kept beside them, and compared when an
                   interrupted command goes on
    """
    vae.check_agreement(record)
    if is_written(out, record):
        if vae.MAIN:
            shutil.rmtree(f"{out}.part", ignore_errors=True)  # of a run killed at its end
        vae.say(f"{out}: already there")
        return
    size = args.num_samples * side * side * 3
    needed = size if os.path.exists(f"{out}.part/rows.npy") else 2 * size  # rows, then the npz
    if needed > shutil.disk_usage(out.parent).free:
        raise InputError(
            f"--num-samples {args.num_samples}: needs {needed / 1e9:.3g} GB, and {out.parent} has "
            "less room"
        )
    classes = model.checkpoint.get("classes", [])
    labels = choose_labels(args, model.config["num_classes"], classes)
    compile_blocks(args, model.blocks)
    shape = (len(labels), side, side, 3)
    rows = Rows(f"{out}.part", shape, "uint8", "--samples", exclusive=True, **record)
    batches = rows.unfinished(min(args.batch_size // world or 1, len(labels)), rank, world)
    progress = vae.Progress(calls * len(batches), 0, f"{out.name}: sampling")

    def before_call(module, inputs):
        progress.update()
        if vae.SIGNALS:  # this process's; to ask the others before each call would take time
            raise Stopped  # nothing else leaves the sampler from inside a hook

    hook = model.register_forward_pre_hook(before_call)
    with contextlib.suppress(Stopped):
        for indices in batches:
            if vae.signal_heard():
                break
            options = dict(seed=args.seed, indices=indices, precision=args.precision)
            rows.write(indices, make_pictures(labels[indices], **options))
    hook.remove()
    progress.close()
    vae.leave_if_stopped(f"{rows.folder}: stopped; the same command goes on")
    rows.wait_until_finished()
    if vae.MAIN:
        finish_samples(out, rows, labels, record)
    vae.barrier()


class Stopped(Exception):
    """A signal came between two steps of a sampler."""


def is_written(out, record):
    """Whether the npz is there. InputError if it is another command's."""
    if not out.exists():
        return False
    try:
        before = vae.read_json(out.with_suffix(".json"))
    except (OSError, ValueError):
        before = None
    if before != json.loads(json.dumps(record)):
        raise InputError(
            f"--samples {out}: exists and was made with other settings; give another --samples"
        )
    return True


def finish_samples(out, rows, labels, record):
    # Nothing stays mapped: Windows would not let the folder go
    first = np.load(rows.path, mmap_mode="r")[:64] / 127.5 - 1
    shown = torch.from_numpy(first).permute(0, 3, 1, 2)
    grid = vae.image_grid(shown.split(8))
    vae.write_file(out.with_suffix(".png"), lambda path: grid.save(path, "PNG"))
    text = json.dumps(record, indent=1) + "\n"
    vae.write_file(out.with_suffix(".json"), lambda path: path.write_text(text))

    def write(path):
        with open(path, "wb") as file:
            np.savez(file, arr_0=np.load(rows.path, mmap_mode="r"), arr_1=labels)

    vae.write_file(out, write)
    shutil.rmtree(rows.folder)
    vae.say(f"{out}: {len(labels):,} samples, the first of them in {out.with_suffix('.png')}")


# ==================================================================================================
# The command line


def arguments(description, models, out, steps):
    """The flags that all generators share: -> the parser of a script that trains a generator and
    samples from it, and its groups of flags for the generator and for sampling."""
    parser = vae.make_parser(description)
    generator = parser.add_argument_group("generator")
    add = generator.add_argument
    add("--image-size", type=vae.side_length, help="pixels (default: the autoencoder's)")
    text = "network's size / patch size"
    add("--model", choices=models, default=next(iter(models)), help=text)
    text = "folder of the latents or tokens (default: NAME-latents, NAME-tokens beside NAME.pt)"
    add("--cache", help=text)
    mirror = argparse.BooleanOptionalAction
    add("--mirror", action=mirror, default=True, help="mirror half of the images, at random")
    add("--compile", action="store_true", help="torch.compile the blocks")
    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--sample-from", help="checkpoint, ours or official, to sample from")
    add("--samples", help="FILE.npz to write or go on with (default: beside the checkpoint)")
    add("--num-samples", type=vae.positive_int, default=50_000, help="pictures to draw")
    text = "uniform: at random; balanced: in turn; or numbers or names of classes, as 207,360"
    add("--labels", default="uniform", help=text)
    vae.add_run_arguments(
        parser,
        data="data/imagenet/train",
        out=out,
        steps=steps,
        batch_size=256,
        lr=1e-4,
        save_every=10_000,
        sample_every=10_000,
    )
    return parser, generator, sampling


def latent_arguments(description, models, out):
    """arguments(), and the flags that dit.py, sit.py and repa.py share besides."""
    parser, generator, sampling = arguments(description, models, out, steps=400_000)
    add = generator.add_argument
    add("--vae", help="the autoencoder: vae.py's, LDM's or diffusers'")
    add("--vae-model", help="preset of --vae, if its file has no configuration: sd, sdxl, ...")
    text = "of the autoencoder's convolutions (default: as its file tells, else zeros)"
    add("--padding-mode", choices=("zeros", "reflect"), help=text)
    add("--no-cache", action="store_true", help="encode every image in every step")
    text = "of the weights' average, after a warm-up"
    add("--ema-decay", type=vae.probability, default=0.9999, help=text)
    add = sampling.add_argument
    add("--sampling-steps", type=vae.positive_int, default=250, help="of the sampler")
    add("--cfg-scale", type=vae.non_negative, default=1.0, help="1: no guidance")
    level = "noise level at which to guide, 0 (data) to 1 (noise)"
    add("--guidance-low", type=vae.probability, default=0.0, help=f"lowest {level}")
    add("--guidance-high", type=vae.probability, default=1.0, help=f"highest {level}")
    text = "guide the first 3 channels alone, as DiT's code"
    add("--three-channels", action="store_true", help=text)
    return parser, generator, sampling


def main():
    need_vae("dit.py")
    parser, _, sampling = latent_arguments(__doc__, CONFIGS, "dit.pt")
    samplers = ("ddpm", "ddim")
    sampling.add_argument("--sampler", choices=samplers, default="ddpm", help="with noise, without")
    launch(parser, train, sample)


def need_vae(script):
    """Ends the process if vae.py, or a package that it imports, is missing: a script that was
    copied alone neither trains nor samples."""
    if vae is None:
        raise SystemExit(
            f"{script}: to train or sample, put vae.py and eqloss.py beside it ({VAE_ERROR})"
        )


def launch(parser, train, sample):
    """Runs the command line: train(), or with --sample-from sample()."""

    def run(args, rank, world, device):
        check_mode(args)
        if args.sample_from is not None:
            sample(args, rank, world, device)
        else:
            train(args, rank, world, device)

    vae.launch(parser, run)


def check_mode(args):
    """InputError for flags that sampling, or training, does not read."""
    if args.sample_from is not None:
        # Flags of other groups that sampling reads, too
        also = ("vae", "vae_model", "padding_mode", "vqgan", "path", "compile")
        also += ("seed", "precision", "batch_size")
        vae.check_flags(args, "with --sample-from", ("sampling",), also)
        return
    also = ()  # flags of sampling that training reads, too
    if hasattr(args, "guidance_low"):  # dit.py, sit.py, repa.py guide the pictures of a training
        also = ("cfg_scale", "guidance_low", "guidance_high", "three_channels")
    vae.check_flags(args, "without --sample-from", ("generator", "alignment", "run"), also)
    if args.cache and getattr(args, "no_cache", False):
        raise InputError("--cache: is not read with --no-cache; leave one out")


if __name__ == "__main__":
    main()
