"""Diffusion transformers (DiT) on an autoencoder's latents: the paper's first generator.

DiT (https://arxiv.org/abs/2212.09748) cuts a latent into patches and denoises them with a
transformer. The timestep and the class control it through adaptive layer norms. EQ-VAE
(https://arxiv.org/abs/2502.09509) changes nothing here: only the latents differ, and training on
them is faster (Table 2).

In this file x0 is the data, a latent, and `noise` is what is added to it: x_t is x0 at t = 0 and
noise at t = 999. (sit.py calls the data x1 and the noise x0, as its paper does.)

    python dit.py --vae tiny.pt --data data/emoji/train --model DiT-Ti/2 --batch-size 64 \\
        --steps 800 --lr 1e-3 --ema-decay 0.99 --out tiny-dit.pt    # minutes on a CPU
    python dit.py --vae eqvae.pt --model DiT-B/2                    # one GPU
    torchrun --nproc_per_node=8 dit.py --vae eqvae.pt               # eight GPUs: DiT-XL/2
    torchrun --nproc_per_node=8 dit.py --sample-from dit.pt --vae eqvae.pt --samples dit.npz

The first torchrun line caches the latents of data/imagenet/train in eqvae-latents/ (42 GB; give
--cache for a second data set), takes 400,000 steps of 256 images, and writes dit.pt, dit.jsonl
(losses) and dit/ (pictures). The same command again goes on where the run stopped. The last line
draws 50,000 pictures. Expect after 400,000 steps, without guidance (Tables 2 and 9): gFID 14.5 on
EQ-VAE's latents, 19.5 on SD-VAE's.

--data is a folder of images, with a sub-folder for each class, or flat for one without classes.
vae.py is imported inside functions, so that the networks of this file can be copied without it.
"""

import math
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

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
    """Without weights of its own: adaLN's scale and shift take their place."""
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


class Block(nn.Module):
    """A transformer block whose shifts, scales and gates are linear in c, and 0 at the start."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, hidden),
                act=nn.GELU(approximate="tanh"),
                fc2=nn.Linear(hidden, width),
            )
        )
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
        return self.linear(layer_norm(x) * (1 + scale) + shift)  # (B, N, p^2 outputs)


def sincos_positions(side, width):
    """(1, side^2, width): half of the channels encode the column, half the row; sines first."""
    frequencies = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * 10000**-frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns = line.repeat(side, 1)  # (side^2, D / 2)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)[None].float()


def timestep_features(t):
    """(B,) -> (B, 256): cosines, then sines, of t at 128 frequencies from 1 to 1 / 10000."""
    exponents = torch.arange(128, device=t.device) * (-math.log(10000) / 128)
    angles = t[:, None].float() * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class DiT(nn.Module):
    """DiT of any size. CONFIGS has the published ones.

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
        self.patch_size = patch_size
        outputs = 2 * in_channels if learn_sigma else in_channels
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
        self.final_layer = FinalLayer(width, patch_size**2 * outputs)
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

    @classmethod
    def config_of(cls, weights):
        """The constructor's arguments, from the shapes of the weights in an official file."""
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        heads = {(size[0], size[1]): size[2] for size in SIZES.values()}
        if (width, depth) not in heads:
            raise ValueError(f"{depth} blocks of width {width} match none of {', '.join(SIZES)}")
        outputs = len(weights["final_layer.linear.bias"]) // patch**2
        return dict(
            input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch,
            patch_size=patch,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=heads[width, depth],
            num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1,
            learn_sigma=outputs == 2 * channels,
        )

    def embed(self, x, t, y):
        """-> tokens (B, N, D) and the condition c (B, D) of timestep and class."""
        h = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        # In float32 also under autocast: bf16 cannot tell the cosines near 1 apart
        with torch.autocast(x.device.type, enabled=False):
            c = self.t_embedder(timestep_features(t))
        return h, c + self.y_embedder(y)

    def unpatchify(self, h):  # (B, N, p^2 outputs)
        side = math.isqrt(h.shape[1])
        p = self.patch_size
        h = h.reshape(len(h), side, side, p, p, -1)  # (B, h / p, w / p, p, p, outputs)
        h = h.permute(0, 5, 1, 3, 2, 4)  # (B, outputs, h / p, p, w / p, p)
        return h.flatten(4, 5).flatten(2, 3).float()  # (B, outputs, h, w)

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
    """The linear schedule of 1,000 steps, or for sampling `steps` of them, evenly spaced.

    i is an index into the steps that are kept. The network is always given the step of the 1,000,
    timesteps[i]. Tables are made in float64 and kept in float32 on the device, (steps, 1, 1, 1).
    """

    def __init__(self, steps=1000, device=None):
        # DiT adds the strides up one by one; the rounding of its sums decides which steps are kept
        strides = np.append(0, np.full(steps - 1, 999 / (steps - 1)))
        self.timesteps = strides.cumsum().round().astype(int)
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[self.timesteps]
        alpha_bar_next = np.append(1.0, alpha_bar[:-1])  # of the step that comes next in sampling
        beta = 1 - alpha_bar / alpha_bar_next
        variance = beta * (1 - alpha_bar_next) / (1 - alpha_bar)  # of q(x_{t-1} | x_t, x0)
        variance[0] = variance[min(1, steps - 1)]  # it is 0 there, and has no logarithm

        def table(values):
            return torch.from_numpy(values).float().to(device)[:, None, None, None]

        self.signal = table(np.sqrt(alpha_bar))
        self.noise = table(np.sqrt(1 - alpha_bar))
        self.x0_from_x = table(np.sqrt(1 / alpha_bar))
        self.x0_from_eps = table(np.sqrt(1 / alpha_bar - 1))
        self.next_signal = table(np.sqrt(alpha_bar_next))
        self.next_noise = table(np.sqrt(1 - alpha_bar_next))
        self.mean_from_x0 = table(beta * np.sqrt(alpha_bar_next) / (1 - alpha_bar))
        self.mean_from_x = table((1 - alpha_bar_next) * np.sqrt(1 - beta) / (1 - alpha_bar))
        self.log_variance_low = table(np.log(variance))
        self.log_variance_high = table(np.log(beta))

    def add_noise(self, x0, i, noise):
        """x_t for latents x0 (B, C, h, w), steps i (B,) and N(0, 1) noise like x0."""
        return self.signal[i] * x0 + self.noise[i] * noise

    def posterior_mean(self, x0, x, i):
        """The mean of q(x_{t-1} | x_t, x0)."""
        return self.mean_from_x0[i] * x0 + self.mean_from_x[i] * x

    def predict(self, output, x, i):
        """The network's output (B, 2C, h, w) at x (B, C, h, w) -> eps, x0, and mean and log
        variance of the next x."""
        eps, v = output.chunk(2, dim=1)
        x0 = self.x0_from_x[i] * x - self.x0_from_eps[i] * eps
        fraction = (v + 1) / 2  # of the way between the two bounds of the variance
        low = self.log_variance_low[i]
        log_variance = fraction * self.log_variance_high[i] + (1 - fraction) * low
        return eps, x0, self.posterior_mean(x0, x, i), log_variance

    def losses(self, output, x0, x, i, noise):
        """-> (mse, vb), each (B,), whose sum is DiT's hybrid loss.

        mse is the squared error of the noise. vb is the variational bound in bits per value, and
        trains the variance alone.
        """
        eps, v = output.chunk(2, dim=1)
        frozen = torch.cat([eps.detach(), v], dim=1)
        _, _, mean, log_variance = self.predict(frozen, x, i)
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
        eps, x0, mean, log_variance = self.predict(output, x, i)
        if noise is None:
            return self.next_signal[i] * x0 + self.next_noise[i] * eps
        is_last = (i == 0)[:, None, None, None]  # no noise is added there
        return mean + torch.where(is_last, 0, (0.5 * log_variance).exp() * noise)

    @torch.no_grad()
    def sample(self, predict, noise, labels, sampler="ddpm", noise_like=torch.randn_like):
        """Noise (B, C, h, w), labels (B,) -> latents x0, by one call of the network a step.

        predict     (x, t, labels, level) -> output, as guided() makes it
        sampler     "ddpm" or "ddim"
        noise_like  x -> N(0, 1) like x, for ddpm
        """
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
    import vae  # here, so that networks and samplers can be copied without it

    # The latents, and the run to go on with, if there is one
    resumed = vae.load_run(args, "DiT", CONFIGS, required=("vae", "latent", "ema", "classes"))
    torch.manual_seed(args.seed)
    autoencoder, source = load_latent_space(args, resumed, device)
    images = vae.ImageFolder(args.data, autoencoder.image_size, "center", args.seed, args.mirror)
    null = len(images.classes)  # the label that stands for no class
    micro_batch = vae.images_per_pass(args, world)

    # The network, its optimiser and the average of its weights
    config = network_config(args, CONFIGS[args.model], autoencoder, images)
    model = start_network(DiT, config, args, resumed, images).to(device)
    parameters = vae.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.999), weight_decay=0, fused=True)
    vae.restore_optimizers([optimizer], resumed, args.lr)
    ema = vae.start_average(model, args.ema_decay, resumed, device)
    compile_blocks(args, model.blocks)
    network = vae.distribute(model, device, world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    diffusion = GaussianDiffusion(device=device)

    step = resumed["step"] if resumed else 0
    log = vae.Log(args, step, world, device)
    data = latent_data(args, rank, world, device, autoencoder, source, images)
    vae.say_start(args, model, data, world, micro_batch, device)
    batches = vae.endless_batches(data, args, step, rank, world)
    first_step = step
    if resumed is None:
        preview(args, step, log, model, ema, draw_ddim, autoencoder, null, autocast)
    resumed = None  # frees the loaded tensors

    while step < args.steps and not vae.stop_requested():
        # ------------------------------------------------------------------------------------------
        # TRAINING STEP. All that is random in it is a function of (seed, step), drawn for the whole
        # batch; this process takes its share
        _, rng = vae.generators(args.seed, step, device)  # the first, the host's, is not needed
        latents, labels, _, readable = next(batches)
        shape = (args.batch_size, config["in_channels"], *autoencoder.latent_size)
        posterior_noise = vae.rank_slice(
            torch.randn(shape, generator=rng, device=device), rank, world
        )
        noise = vae.rank_slice(torch.randn(shape, generator=rng, device=device), rank, world)
        uniform = torch.rand((args.batch_size, 2), generator=rng, device=device)
        uniform = vae.rank_slice(uniform, rank, world)
        t = (1000 * uniform[:, 0]).long()  # 0 .. 999
        y = labels.to(device, non_blocking=True)
        y = torch.where(uniform[:, 1] < LABEL_DROP, null, y)
        log.count(unreadable=(~readable).sum())  # other pictures took their places

        passes = len(latents) // micro_batch
        for k in range(passes):
            rows = slice(k * micro_batch, (k + 1) * micro_batch)
            mean, std = moments(latents[rows], autoencoder, device)  # (b, C, h, w) each
            x0 = autoencoder.normalize(mean + std * posterior_noise[rows])
            x = diffusion.add_noise(x0, t[rows], noise[rows])
            with vae.sync_gradients(network, is_last=k == passes - 1):
                with autocast:
                    output = network(x, t[rows], y[rows])  # (b, 2C, h, w)
                mse, vb = diffusion.losses(output, x0, x, t[rows], noise[rows])
                loss = mse.mean() + vb.mean()
                (loss / passes).backward()
            log.add(mse=mse, vb=vb)

        # The step. Where a gradient is not finite, all processes leave their weights as they are: a
        # fused optimiser does nothing if its found_inf, which AMP's GradScaler sets, is 1. So the
        # host need not wait for the gradient norm
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = (~grad_norm.isfinite()).float()
        optimizer.found_inf = skipped
        optimizer.step()
        optimizer.zero_grad()
        vae.update_average(ema, model, args.ema_decay, step)
        step += 1
        # ------------------------------------------------------------------------------------------
        log.step(step, skipped, grad_norm, args.lr)
        if vae.is_due(step, args.sample_every, args.steps):
            preview(args, step, log, model, ema, draw_ddim, autoencoder, null, autocast)
        if vae.is_due(step, args.save_every) and step < args.steps:
            save(args, step, model, ema, optimizer, autoencoder, source, images)

    # A finished run is not saved again, unless its file is gone
    if step > first_step or not os.path.exists(args.out):
        save(args, step, model, ema, optimizer, autoencoder, source, images)
    vae.end_run(args, step, log)


def draw_ddim(predict, noise, labels):
    """Draws the pictures that preview() shows: 50 steps of DDIM."""
    return GaussianDiffusion(50, noise.device).sample(predict, noise, labels, "ddim")


# --------------------------------------------------------------------------------------------------
# Shared with sit.py and repa.py: the latent space, the network, pictures, checkpoints


def load_latent_space(args, resumed, device):
    """-> (the autoencoder in --vae, on the device; its file and hash, for checkpoints and caches).

    The autoencoder gets two attributes: image_size (H, W), which is --image-size, else what it was
    trained at, and latent_size (h, w).
    """
    import vae

    if not args.vae:
        raise vae.InputError(
            "--vae: name the autoencoder whose latents to train on (vae.py makes one: eqvae.pt)"
        )
    autoencoder = vae.load_autoencoder(args.vae, args.vae_model, flag="--vae-model")
    source = dict(file=str(args.vae), sha256=vae.weights_hash(autoencoder))
    autoencoder.image_size = vae.training_size(args, autoencoder)
    autoencoder.latent_size = autoencoder.grid(autoencoder.image_size)
    if resumed is not None:
        if resumed["vae"]["sha256"] != source["sha256"]:
            raise vae.InputError(
                f"{args.out}: trained on the latents of another autoencoder "
                f"({resumed['vae']['file']}); give another --out"
            )
        autoencoder.scaling_factor = resumed["latent"]["scale"]
        autoencoder.shift_factor = resumed["latent"]["shift"]
    return autoencoder.to(device, memory_format=vae.convolution_layout(device)), source


def network_config(args, preset, autoencoder, images, **options):
    """The arguments of the network for these latents and classes."""
    import vae

    side = autoencoder.latent_size[0]
    if side % preset["patch_size"]:
        raise vae.InputError(
            f"--model {args.model}: its patches do not divide latents of {side} x {side}; "
            "choose another model, or another --image-size"
        )
    return dict(
        preset,
        input_size=side,
        in_channels=autoencoder.config["z_channels"],
        num_classes=len(images.classes),
        **options,
    )


def start_network(network, config, args, resumed, images):
    """A new network, or that of the run to go on with. InputError if its settings are others."""
    import vae

    model = network(**config)
    if resumed is None:
        return model
    vae.check_same_network(args, resumed, model.config, images)
    return vae.load_weights(model, resumed["model"], args.out)


def compile_blocks(args, blocks):
    """torch.compile for each block: one graph, which all of them share, compiles in seconds."""
    if args.compile:
        for block in blocks:
            block.compile()


@torch.no_grad()
def preview(args, step, log, model, ema, draw, autoencoder, null, autocast):
    """Writes OUT/0001000.png: samples with the average of the weights, from the same noise and
    labels each time.

    draw  (predict, noise, labels) -> latents
    """
    import vae

    if not vae.MAIN or args.bench or not args.sample_every:
        return
    device = next(model.parameters()).device
    shape = (model.config["in_channels"], *autoencoder.latent_size)
    noise = vae.sample_noise(shape, args.seed, range(16), device)
    labels = torch.arange(16, device=device) % max(1, null)
    weights = ema or model.state_dict()

    def average(x, t, y):
        return torch.func.functional_call(model, weights, (x, t, y))

    predict = guided(average, null, args.cfg_scale, *guidance_range(args))
    with autocast:
        z = draw(predict, noise, labels)
    pictures = autoencoder.decode(autoencoder.denormalize(z.float()))
    log.picture(step, vae.image_grid(pictures.split(8)))


def guidance_range(args):
    """The interval of noise levels and the number of channels that are guided."""
    return args.guidance_low, args.guidance_high, 3 if args.three_channels else None


def save(args, step, model, ema, optimizer, autoencoder, source, images):
    """Writes args.out, a dictionary of plain data.

    arch, config   class and arguments of the network
    model, ema     its weights, and their average
    opt            the optimiser's state
    step, args     steps taken, the command's arguments
    vae, latent    file and hash of the autoencoder, scale and shift of its latents in training
    classes        names of the classes
    """
    import vae

    latent = dict(scale=autoencoder.scaling_factor, shift=autoencoder.shift_factor)
    checkpoint = dict(
        arch=type(model).__name__,
        config=model.config,
        model=model.state_dict(),
        ema=ema,
        opt=optimizer.state_dict(),
        step=step,
        args=vae.saved_arguments(args),
        latent=latent,
        vae=source,
        classes=images.classes,
    )
    vae.save_run(args, checkpoint)


# ==================================================================================================
# The latents: encoded once, images and mirror images, as means and standard deviations, of which
# every step draws a fresh sample


class Latents(torch.utils.data.Dataset):
    """The cached moments of pictures.

    path    rows.npy of a cache: float16 (N, 2, 2C, h, w), of each picture and its mirror image
    places  numbers of the rows whose picture could be read
    labels  of these rows

    Items are (moments (2C, h, w), label, index, True), as those of vae.ImageFolder, and asked for
    in the same way, as (epoch, index). With `mirror` a random half of them are the mirror image's.
    The object holds paths and numbers alone, so it can be sent to data loaders; each opens the file
    itself.
    """

    def __init__(self, path, places, labels, seed, mirror):
        self.path = path
        self.places = places
        self.labels = labels
        self.seed = seed
        self.mirror = mirror
        self.rows = None

    def __len__(self):
        return len(self.places)

    def __getstate__(self):
        return dict(self.__dict__, rows=None)

    def __getitem__(self, item):
        import vae

        epoch, index = item
        if self.rows is None:
            self.rows = vae.RowReader(self.path)
        view = int(self.mirror and vae.is_mirrored(self.seed, epoch, index))
        row = torch.from_numpy(self.rows.read(self.places[index], view))
        return row, self.labels[index], index, True


def latent_data(args, rank, world, device, autoencoder, source, images):
    """What to train on: the cached Latents of the images, or with --no-cache the images themselves.
    Also measures the latents' scale where the autoencoder has none."""
    import vae

    measure_scale(autoencoder, images)
    if args.no_cache:
        return images
    shape = (len(images), 2, 2 * autoencoder.config["z_channels"], *autoencoder.latent_size)
    rows = open_cache(args, shape, images, "latents", autoencoder=source["sha256"])

    def compute(batch):
        views = []
        for view in (batch, batch.flip(3)):
            views.append(torch.cat(moments(view, autoencoder, device), dim=1))
        return torch.stack(views, dim=1).half()

    places = vae.fill_rows(rows, images.centred(), compute, args, rank, world, "caching latents")
    labels = np.array(images.labels)[places]
    return Latents(rows.path, places, labels, args.seed, args.mirror)


def open_cache(args, shape, images, what, **manifest):
    """The vae.Rows in NAME-latents/ beside the autoencoder, or in --cache. What is not latents goes
    to the same name with -what appended."""
    import vae

    folder = args.cache or f"{os.path.splitext(os.path.normpath(args.vae))[0]}-latents"
    if what != "latents":
        folder = f"{folder}-{what}"
    return vae.Rows(
        folder,
        shape,
        "float16",
        "--cache",
        images=vae.data_fingerprint(images),
        image_size=images.size,
        **manifest,
    )


@torch.no_grad()
def moments(batch, autoencoder, device):
    """Cached moments (B, 2C, h, w) or uint8 images (B, 3, H, W) -> mean and std of the latents
    (B, C, h, w), float32. Images are encoded in float32, because they are the training data."""
    import vae

    if batch.dtype == torch.uint8:
        posterior = autoencoder.encode(vae.to_float(batch, device))
        return posterior.mean, posterior.std
    return batch.to(device, non_blocking=True).float().chunk(2, dim=1)


def measure_scale(autoencoder, images):
    """Measures the latents' scale where the file has none, as in LDM's kl-f16."""
    import vae

    if autoencoder.scaling_factor is None:
        measured = vae.measure_latents(autoencoder, images.centred())
        pair = torch.tensor([measured["scale"], measured["shift"]], dtype=torch.float64)
        scale, shift = vae.average(pair).tolist()
        autoencoder.scaling_factor = scale
        autoencoder.shift_factor = shift


# ==================================================================================================
# Sampling


def sample(args, rank, world, device):
    check_sampling(args)
    model, kept = load_generator(args, DiT, device)
    diffusion = GaussianDiffusion(args.sampling_steps, device)
    settings = dict(sampler=args.sampler)

    def draw(predict, noise, labels, noise_like):
        return diffusion.sample(predict, noise, labels, args.sampler, noise_like)

    calls = args.sampling_steps
    sample_latents(args, rank, world, device, model, CONFIGS, kept, draw, calls, settings)


def check_sampling(args):
    import vae

    if not 2 <= args.sampling_steps <= 1000:
        raise vae.InputError(f"--sampling-steps {args.sampling_steps}: must be 2 to 1000")
    if args.guidance_low > args.guidance_high:
        raise vae.InputError("--guidance-low: must not exceed --guidance-high")


def load_generator(args, network, device):
    """--sample-from -> (model, our checkpoint's other entries or {}).

    Reads our own files and the official ones, bare or as {model, ema, opt, args}, and takes the
    average of the weights where there is one. The weights keep requires_grad, because autocast
    caches the bf16 copies of such weights alone. Others it would cast again at every call.
    """
    import vae

    path = args.sample_from
    checkpoint = vae.read_file(path)
    if vae.is_ours(checkpoint):
        if checkpoint["arch"] != network.__name__:
            raise vae.InputError(f"{path}: holds a {checkpoint['arch']}, not a {network.__name__}")
        keys = ("config", "model", "ema", "step", "args", "latent", "vae", "classes")
        vae.check_keys(path, checkpoint, keys)
        config = checkpoint["config"]
        weights = checkpoint["ema"] or checkpoint["model"]
        kept = {key: checkpoint[key] for key in keys if key not in ("model", "ema")}
    else:
        config, weights = read_official(path, checkpoint, network)
        kept = {}
    model = vae.build(network, vae.Stored(path, config, weights)).to(device).eval()
    compile_blocks(args, model.blocks)
    return model, kept


def read_official(path, checkpoint, network):
    """-> configuration and weights of an official file, whose shapes tell the configuration."""
    import vae

    weights = vae.find_weights(checkpoint, "x_embedder.proj.weight")
    if weights is None:
        raise vae.InputError(
            f"{path}: no {network.__name__} checkpoint, neither ours nor an official one"
        )
    try:
        return network.config_of(weights), weights
    except (KeyError, ValueError, IndexError) as error:
        raise vae.InputError(f"{path}: not a known {network.__name__} ({error})") from None


def load_sampling_autoencoder(args, config, kept, device):
    """--vae, which must be the one that the generator was trained on, on the device."""
    import vae

    if not args.vae:
        raise vae.InputError(
            "--vae: give the autoencoder on whose latents the generator was trained"
        )
    autoencoder = vae.load_autoencoder(args.vae, args.vae_model, flag="--vae-model").to(device)
    digest = vae.weights_hash(autoencoder)
    if kept and kept["vae"]["sha256"] != digest:
        raise vae.InputError(
            f"--vae {args.vae}: {args.sample_from} was trained on the latents of another "
            f"autoencoder ({kept['vae']['file']}, SHA-256 {kept['vae']['sha256'][:16]})"
        )
    if kept:
        autoencoder.scaling_factor = kept["latent"]["scale"]
        autoencoder.shift_factor = kept["latent"]["shift"]
    if autoencoder.scaling_factor is None:
        raise vae.InputError(f"--vae {args.vae}: the scale of its latents is unknown")
    if autoencoder.config["z_channels"] != config["in_channels"]:
        raise vae.InputError(
            f"--vae {args.vae}: its latents have {autoencoder.config['z_channels']} channels, "
            f"the generator's {config['in_channels']}"
        )
    return autoencoder, digest


@torch.no_grad()
def sample_latents(args, rank, world, device, model, configs, kept, draw, calls, settings):
    """Fills --samples with pictures of a generator on latents. Sample i depends on (seed, i)
    alone, to rounding.

    configs   the presets, for the model's name in the record FILE.json
    kept      the entries of our checkpoint, or {}
    draw      (predict, noise, labels, noise_like) -> normalised latents
    calls     how often draw calls predict, for the progress bar
    settings  what the draw depends on besides, for the record
    """
    import vae

    # All arguments are checked before anything is written
    config = model.config
    out = vae.samples_path(args, world)
    vae.check_guidance(args.cfg_scale, config["num_classes"])
    autoencoder, digest = load_sampling_autoencoder(args, config, kept, device)
    names = kept.get("classes", [])
    labels = vae.choose_labels(args, config["num_classes"], names)
    record = dict(
        model=preset_name(args, config, configs),
        generator=vae.weights_hash(model),
        autoencoder=digest,
        step=kept.get("step"),
        args=kept.get("args"),
        seed=args.seed,
        num_samples=args.num_samples,
        labels=args.labels,
        cfg_scale=args.cfg_scale,
        guidance=[args.guidance_low, args.guidance_high],
        three_channels=args.three_channels,
        sampling_steps=args.sampling_steps,
        precision=args.precision,
        **settings,
    )

    predict = guided(model, config["num_classes"], args.cfg_scale, *guidance_range(args))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    side = config["input_size"]
    shape = (config["in_channels"], side, side)

    def draw_pictures(indices, labels, tick):
        sources = [vae.seeded(args.seed, "sample", int(i)) for i in indices]

        def noise_like(x):
            rows = [torch.randn(shape, generator=source) for source in sources]
            return vae.to_device(torch.stack(rows), device)

        def predict_and_tell(x, t, y, level):
            tick()
            return predict(x, t, y, level)

        noise = noise_like(torch.empty(0, device=device))
        with autocast:
            z = draw(predict_and_tell, noise, torch.from_numpy(labels).to(device), noise_like)
        z = autoencoder.denormalize(z.float())
        return vae.decode_pictures(autoencoder.decode, z, args.sample_from)

    size = side * autoencoder.factor
    picture = (size, size, 3)
    vae.write_samples(args, rank, world, out, labels, picture, calls, draw_pictures, record)


def preset_name(args, config, configs):
    """The name of the preset that matches the network, or its checkpoint's file name."""
    for name, preset in configs.items():
        if all(config[key] == value for key, value in preset.items()):
            return name
    return Path(args.sample_from).stem


# ==================================================================================================
# The command line


def arguments(description, models, out):
    """-> the parser of a script that trains a generator on latents and samples from it, and its
    groups of flags for the generator and for sampling."""
    import vae

    parser = vae.make_parser(description)
    generator = parser.add_argument_group("generator")
    generator.add_argument(
        "--image-size", type=vae.pixels, help="pixels (default: the autoencoder's)"
    )
    generator.add_argument(
        "--model", choices=models, default=next(iter(models)), help="network's size / patch size"
    )
    generator.add_argument("--vae", help="the autoencoder: vae.py's, LDM's or diffusers'")
    generator.add_argument(
        "--vae-model", help="preset of --vae, if its file has no configuration: sd, sdxl, ..."
    )
    generator.add_argument(
        "--cache", help="folder of the latents (default: NAME-latents beside --vae)"
    )
    generator.add_argument(
        "--no-cache", action="store_true", help="encode every image in every step"
    )
    generator.add_argument(
        "--ema-decay", type=vae.probability, default=0.9999, help="of the weights' average"
    )
    generator.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    add_mirror(generator)
    sampling = vae.add_sampling_arguments(parser)
    sampling.add_argument(
        "--sampling-steps", type=vae.positive_int, default=250, help="of the sampler"
    )
    sampling.add_argument("--cfg-scale", type=vae.non_negative, default=1.0, help="1: no guidance")
    level = "noise level at which to guide, 0 (data) to 1 (noise)"
    sampling.add_argument(
        "--guidance-low", type=vae.probability, default=0.0, help=f"lowest {level}"
    )
    sampling.add_argument(
        "--guidance-high", type=vae.probability, default=1.0, help=f"highest {level}"
    )
    sampling.add_argument(
        "--three-channels",
        action="store_true",
        help="guide the first 3 channels alone, as DiT's code",
    )
    vae.add_run_arguments(
        parser,
        data="data/imagenet/train",
        out=out,
        steps=400_000,
        batch_size=256,
        lr=1e-4,
        save_every=10_000,
        sample_every=10_000,
    )
    return parser, generator, sampling


def add_mirror(group):
    import argparse

    group.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the images, at random",
    )


def main():
    import vae

    parser, _, sampling = arguments(__doc__, CONFIGS, "dit.pt")
    sampling.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm")
    vae.launch(parser, run)


def run(args, rank, world, device):
    if args.sample_from:
        sample(args, rank, world, device)
    else:
        train(args, rank, world, device)


if __name__ == "__main__":
    main()
