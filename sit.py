"""Flow transformers (SiT) on an autoencoder's latents: DiT's network, trained to predict the
velocity from noise to data.

SiT (https://arxiv.org/abs/2401.08740) joins noise and data by a path, alpha_t latents + sigma_t
noise. Time runs from noise to data, as in the official code; SiT's paper lets it run the other way,
and so does repa.py. The network learns the mean of dx / dt, the velocity. Two kinds of samplers
carry noise to data: an ODE whose right-hand side is the velocity, and an SDE, which also needs the
score. The score is computed from the velocity. EQ-VAE (https://arxiv.org/abs/2502.09509) gives
another autoencoder, and nothing here changes but the latents.

    here             SiT's code   time
    latents (data)   x1           t = 1
    noise            x0           t = 0
    x                x_t          in between

The network, the latent cache, guidance and the writing of samples are in dit.py. Logs, checkpoints
and processes are in vae.py. train() is a copy of dit.py's, but for the lines that are marked
"# SiT".

    python sit.py --vae tiny.pt --data data/emoji/train --model SiT-Ti/2 --batch-size 64 \\
        --steps 800 --lr 1e-3 --ema-decay 0.99 --out tiny-sit.pt    # minutes on a CPU
    python sit.py --vae eqvae.pt --model SiT-B/2                    # one GPU
    torchrun --nproc_per_node=8 sit.py --vae eqvae.pt               # eight GPUs: SiT-XL/2
    torchrun --nproc_per_node=8 sit.py --sample-from sit.pt --vae eqvae.pt --samples sit.npz

The first torchrun line takes 400,000 steps of 256 images. EQ-VAE's paper then reports, for 50,000
samples without guidance, an FID of 16.1 on EQ-VAE's latents and of 17.2 on SD-VAE's (Tables 2 and
9). SiT's own result, on SD-VAE's latents after 7M steps and with guidance, is 2.06 in its paper.

From Python:

    model, checkpoint = load_generator("sit.pt")    # checkpoint["classes"]: their names
    autoencoder = vae.load_autoencoder("eqvae.pt")
    pictures = generate(model, autoencoder, [207, 360], sampler="heun", steps=50, cfg_scale=4)
"""

import functools
import math
import os

import numpy as np
import torch
import torch.nn as nn

import dit
from dit import LABEL_DROP, DiT, vae

# name -> arguments of SiT: dit.py's presets under SiT's names
CONFIGS = {name.replace("DiT", "SiT"): config for name, config in dit.CONFIGS.items()}

# The score has sigma_t in its denominator, which is 0 at the data. So the SDE runs to
# 1 - LAST_STEP, and one last step without noise goes to 1.
LAST_STEP = 0.04


class SiT(DiT):
    """DiT's network with the same parameter names; its output is the velocity.

    The official checkpoints have learn_sigma: twice as many channels, whose second half was never
    trained. DiT's checkpoints have the same names and shapes, so loading one here gives no error,
    but bad samples. `path`, one of PATHS, is what the network was trained on.
    """

    def __init__(self, *args, path="linear", learn_sigma=False, **options):
        super().__init__(*args, learn_sigma=learn_sigma, **options)
        self.config["path"] = path

    def forward(self, x, t, y):
        """Latents x_t (B, C, h, w), times (B,) in [0, 1] (0: noise, 1: data), labels (B,)
        -> velocities (B, C, h, w).

        Times are not scaled to 0 .. 999 as DiT's, so most sines and cosines of their embedding
        hardly vary with t. The official code does the same, and its weights need it.
        """
        return super().forward(x, t, y)[:, : x.shape[1]]  # without the untrained channels


# ==================================================================================================
# Paths:  x = alpha_t latents + sigma_t noise
#         velocity = E[alpha'_t latents + sigma'_t noise | x]      score = -E[noise | x] / sigma_t


def linear_path(t):
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def variance_preserving_path(t):
    alpha = (0.5 * math.pi * t).sin()
    sigma = (0.5 * math.pi * t).cos()
    return alpha, sigma, 0.5 * math.pi * sigma, -0.5 * math.pi * alpha


# name -> function of t that gives alpha, sigma and their derivatives. Every path has alpha = 0 and
# sigma = 1 at time 0, and alpha = 1 and sigma = 0 at time 1.
PATHS = {"linear": linear_path, "gvp": variance_preserving_path}


def coefficients(t, path="linear"):
    """alpha, sigma, alpha', sigma' of a path at times t, a tensor of any shape."""
    return PATHS[path](t)


def score(velocity, x, t, path="linear"):
    """The score, the gradient of the log density, at x (B, C, h, w) and a time t < 1 (a 0-d
    tensor), from the velocity there.

    Let m1 and m0 be the means of latents and noise that lead to x. Then x = alpha m1 + sigma m0 and
    velocity = alpha' m1 + sigma' m0. Solved for m0, these give score = -m0 / sigma.
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
    return (alpha * velocity - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def sbdm_diffusion(t, path):
    """The w(t) of DIFFUSIONS with which the SDE is the reverse of score-based diffusion (SBDM)
    along this path. w grows without limit as t approaches 0."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
    return d_alpha / alpha * sigma**2 - sigma * d_sigma


# name -> w(t), which says how much noise the SDE adds: sqrt(2 w) dW. With an exact score and small
# steps all of them lead to the same distribution; "sigma" is SiT's choice.
DIFFUSIONS = {
    "sigma": lambda t, path: coefficients(t, path)[1],
    "linear": lambda t, path: 1 - t,
    "constant": lambda t, path: torch.ones_like(t),
    "decreasing": lambda t, path: 0.25 * ((math.pi * t).cos() + 1) ** 2,
    "increasing-decreasing": lambda t, path: (math.pi * t).sin() ** 2,
    "sbdm": sbdm_diffusion,
}


# ==================================================================================================
# Samplers: (predict, noise (B, C, h, w), labels (B,), ...) -> normalised latents.
# predict(x, t, labels, level), which dit.guided() makes, is the velocity; it is guided where
# `level`, 1 at noise and 0 at data, lies in the guidance interval. `steps` counts points in time,
# as in the official code: for the ODE from 0 to 1, for the SDE from 0 to 1 - LAST_STEP, both
# included. sample() tells how often the network is called.


def velocity_at(predict, x, t, labels):
    """The velocity for the whole batch at one time t, a 0-d tensor.

    Guidance intervals are given in levels, 1 - t on every path. The level is rounded, so that a
    step at the end of an interval does not fall outside of it.
    """
    times = torch.full((len(x),), float(t), device=x.device, dtype=x.dtype)
    return predict(x, times, labels, round(1 - float(t), 6))


@torch.no_grad()
def euler_maruyama(
    predict,
    noise,
    labels,
    steps=250,
    path="linear",
    diffusion="sigma",
    last="mean",
    noise_like=torch.randn_like,
):
    """dx = (v + w s) dt + sqrt(2 w) dW with velocity v, score s and diffusion w, from t = 0 to
    1 - LAST_STEP, then one step to 1 without noise. ("sbdm" starts at .001, as in the official
    code; w is so large there that the first step overshoots.)

    It calls the network `steps` times. (The official code calls it twice a step, for the velocity
    and for the score, though the score is a function of the velocity.)

    last        the last step. "mean": by the drift v + w s; "euler": by v alone; "tweedie": to
                the mean of the latents given x
    noise_like  x -> normal noise of its shape; dit.py's gives each sample noise of its own
    """
    start = 1e-3 if diffusion == "sbdm" else 0.0
    times = torch.linspace(start, 1 - LAST_STEP, steps)
    dt = times[1] - times[0]
    x = noise

    def terms_at(t):
        v = velocity_at(predict, x, t, labels)
        return v, score(v, x, t, path), DIFFUSIONS[diffusion](t, path)

    for t in times[:-1]:
        v, s, w = terms_at(t)
        x = x + (v + w * s) * dt + (2 * w * dt).sqrt() * noise_like(x)
    v, s, w = terms_at(times[-1])
    if last == "tweedie":
        alpha, sigma, _, _ = coefficients(times[-1], path)
        return (x + sigma**2 * s) / alpha
    if last == "euler":
        return x + v * LAST_STEP
    return x + (v + w * s) * LAST_STEP


@torch.no_grad()
def euler(predict, noise, labels, steps=250):
    """The ODE dx = v dt in steps - 1 equal steps, each with one call of the network."""
    x = noise
    times = torch.linspace(0, 1, steps)
    for t, later in zip(times, times[1:]):
        x = x + velocity_at(predict, x, t, labels) * (later - t)
    return x


@torch.no_grad()
def heun(predict, noise, labels, steps=250):
    """Heun's method for dx = v dt in steps - 1 equal steps: each goes by the mean of the velocities
    at its two ends, which takes two calls of the network."""
    x = noise
    times = torch.linspace(0, 1, steps)
    for t, later in zip(times, times[1:]):
        dt = later - t
        v = velocity_at(predict, x, t, labels)
        v_later = velocity_at(predict, x + v * dt, later, labels)
        x = x + 0.5 * (v + v_later) * dt
    return x


@torch.no_grad()
def dopri5(predict, noise, labels, rtol=1e-3, atol=1e-6):
    """dx = v dt by scipy's adaptive Dormand-Prince 5(4).

    The solver chooses its steps for the whole batch, so samples depend a little on their
    neighbours. At the ends of a guidance interval the velocity jumps, and there it takes many small
    steps. RuntimeError if it gives up.
    """
    from scipy.integrate import solve_ivp  # only this sampler needs scipy

    def right_hand_side(t, x):
        x = torch.from_numpy(x).to(noise).view_as(noise)
        velocity = velocity_at(predict, x, torch.tensor(t), labels)
        return velocity.double().flatten().cpu().numpy()

    start = noise.double().flatten().cpu().numpy()
    solution = solve_ivp(right_hand_side, (0, 1), start, "RK45", rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(f"dopri5: {solution.message}")
    end = solution.y[:, -1].astype(np.float32)
    return torch.from_numpy(end).to(noise.device).view_as(noise)


LAST = ("mean", "euler", "tweedie")  # the SDE's last step
SAMPLERS = {"sde": euler_maruyama, "euler": euler, "heun": heun, "dopri5": dopri5}


# ==================================================================================================
# Training


def train(args, rank, world, device):
    # The run to go on with, if there is one. (args get its values for flags that were not given.)
    # Then the autoencoder, with its file and hash, and the images
    resumed = vae.load_run(args, "SiT", CONFIGS, required=dit.ENTRIES)
    torch.manual_seed(args.seed)
    autoencoder, source = dit.load_latent_space(args, resumed, device)
    images = dit.open_images(args, autoencoder)
    null = len(images.classes)  # the label that stands for no class
    micro_batch = vae.images_per_pass(args, world)

    # The network, its optimiser and the average of its weights
    preset = dict(CONFIGS[args.model], path=args.path)  # SiT: path
    config = dit.network_config(args, preset, autoencoder, images)
    model = dit.start_network(SiT, config, args, resumed, images).to(device)
    parameters = vae.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.999), weight_decay=0, fused=True)
    vae.restore_optimizers([optimizer], resumed)
    ema = vae.start_ema(model, args.ema_decay, resumed, device)
    dit.compile_blocks(args, model.blocks)
    network = dit.distribute(model, device, world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    step = resumed["step"] if resumed else 0
    vae.check_same_start(step, model, images, source)  # compares processes
    # Scale and shift of the latents. If they are unknown, they are measured, and set
    latent = dit.measure_scale(args, autoencoder, images)
    vae.say_duration(args, step, device, dit.forward_pass_of(model))  # if it is a CPU
    data = dit.latent_data(args, rank, world, device, autoencoder, source, images)
    batches = vae.endless_batches(data, args, step, rank, world)
    log = vae.Log(args, step, world, device)
    vae.say_start(args, model, data, world, micro_batch, device, images.classes)
    first_step = step
    if resumed is None:
        dit.preview(args, step, log, model, ema, draw_heun, autoencoder, autocast)
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
        t, drop_draw = vae.rank_slice(uniform, rank, world).unbind(dim=1)  # SiT: noise to data
        y = torch.where(drop_draw < LABEL_DROP, null, labels.to(device, non_blocking=True))
        log.count(unreadable=(~readable).sum())  # files, for which others stand in

        passes = len(moments) // micro_batch
        for k in range(passes):
            rows = slice(k * micro_batch, (k + 1) * micro_batch)
            mean, std = dit.mean_and_std(moments[rows], autoencoder, device)  # (b, C, h, w) each
            latents = autoencoder.normalize(mean + std * vae_noise[rows])
            times = t[rows, None, None, None]  # SiT
            alpha, sigma, d_alpha, d_sigma = coefficients(times, config["path"])  # SiT
            x = alpha * latents + sigma * noise[rows]  # SiT
            target = d_alpha * latents + d_sigma * noise[rows]  # SiT: the velocity
            with dit.sync_gradients(network, is_last=k == passes - 1):
                with autocast:
                    velocity = network(x, t[rows], y[rows])  # SiT: (b, C, h, w)
                loss = (velocity - target).square().mean()  # SiT
                (loss / passes).backward()
            log.add(mse=loss)  # SiT

        # The step. If the gradients' norm is not finite, the weights stay. The host need not wait
        # for the norm, since a fused optimiser does nothing where its attribute found_inf is 1
        # (made for GradScaler, which is not used here)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = (~grad_norm.isfinite()).float()
        optimizer.found_inf = skipped
        optimizer.step()
        optimizer.zero_grad()
        vae.update_ema(ema, model, args.ema_decay, step)  # its decay is warmed up, unlike SiT's
        step += 1
        # ------------------------------------------------------------------------------------------
        log.step(step, skipped, grad_norm, args.lr)
        if vae.is_due(step, args.sample_every, last=args.steps):
            dit.preview(args, step, log, model, ema, draw_heun, autoencoder, autocast)
        if vae.is_due(step, args.save_every) and step < args.steps:
            dit.save(args, step, model, optimizer, images, ema=ema, vae=source, latent=latent)

    # A run that went no step is saved only if it has no file yet: a finished one is left as it is
    if step > first_step or not os.path.exists(args.out):
        dit.save(args, step, model, optimizer, images, ema=ema, vae=source, latent=latent)
    log.end(step)


def draw_heun(predict, noise, labels, noise_like):
    """The latents of the pictures that preview() shows: 25 steps of two calls."""
    return heun(predict, noise, labels, steps=26)


# ==================================================================================================
# Sampling


def load_generator(file, path="linear"):
    """dit.load_generator() for SiT's files. `path`, one of PATHS, is for official ones, which do
    not tell it."""
    return dit.load_generator(file, SiT, path=path)


def generate(
    model,
    autoencoder,
    labels,
    seed=0,
    indices=None,
    sampler="sde",
    steps=250,
    diffusion="sigma",
    last="mean",
    convert=None,
    **options,
):
    """dit.generate() by one of SAMPLERS. `diffusion` and `last` are for the SDE alone; dopri5
    chooses its own steps. `convert` is for repa.py: it turns a predict() with REPA's time and sign
    into one with SiT's."""
    for name, value, known in (
        ("sampler", sampler, SAMPLERS),
        ("diffusion", diffusion, DIFFUSIONS),
        ("last", last, LAST),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r}: one of {', '.join(known)}")
    if steps < 2:
        raise ValueError(f"{steps} steps: give at least 2, which are the two ends")

    def draw(predict, noise, labels, noise_like):
        if convert is not None:
            predict = convert(predict)
        if sampler == "dopri5":
            return dopri5(predict, noise, labels)
        if sampler == "sde":
            path = model.config["path"]
            return euler_maruyama(predict, noise, labels, steps, path, diffusion, last, noise_like)
        return SAMPLERS[sampler](predict, noise, labels, steps)

    return dit.draw_pictures(draw, model, autoencoder, labels, seed, indices, **options)


def sample(args, rank, world, device, network_class=SiT, configs=CONFIGS, generate=generate):
    """Fills --samples. repa.py calls it, too."""
    load = functools.partial(dit.load_generator, network_class=network_class, path=args.path)
    settings = dict(sampler=args.sampler)
    if args.sampler == "sde":
        settings |= dict(diffusion=args.diffusion, last=args.last)
    steps = args.sampling_steps
    calls = dict(sde=steps, euler=steps - 1, heun=2 * (steps - 1), dopri5=100)  # 100: a guess
    calls = calls[args.sampler]
    dit.sample_latents(args, rank, world, device, load, configs, generate, settings, calls)


# ==================================================================================================
# The command line


def arguments(description, models, out):
    """The parser of sit.py and repa.py; `out` is the default of --out."""
    parser, generator, sampling = dit.latent_arguments(description, models, out)
    text = "how noise and data are mixed; our checkpoints record it, official ones do not"
    generator.add_argument("--path", choices=PATHS, default="linear", help=text)
    add = sampling.add_argument
    add("--sampler", choices=SAMPLERS, default="sde", help="sde, or a solver of the ODE")
    add("--diffusion", choices=DIFFUSIONS, default="sigma", help="how much noise the SDE adds")
    text = "the SDE's last step"
    add("--last", choices=LAST, default="mean", help=text)
    return parser


def main():
    dit.need_vae("sit.py")
    dit.launch(arguments(__doc__, CONFIGS, "sit.pt"), train, sample)


if __name__ == "__main__":
    main()
