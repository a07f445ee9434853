"""Flow transformers (SiT) on an autoencoder's latents: DiT's network, trained to say where to go from noise to data.

SiT (https://arxiv.org/abs/2401.08740) joins noise x0 and data x1 by a path x_t = alpha_t x1 + sigma_t x0 and learns its
velocity, the mean of d x_t / dt. Following it carries noise to data (an ODE), and so does any diffusion with the score
that the velocity implies (an SDE). EQ-VAE changes nothing here but the latents. This file holds the paths, the samplers
and the training; the network, the latent cache and all that training shares are dit.py's.

    python sit.py --vae out/eq.pt --data emoji --image-size 32 --model SiT-Ti/2 --batch-size 64 --steps 800 --lr 1e-3 \\
        --ema-decay 0.99 --out tiny-sit.pt                                  # a CPU, minutes; `bash demo.sh` goes before
    python sit.py --vae eqvae.pt --model SiT-B/2                            # one GPU
    torchrun --nproc_per_node=8 sit.py --vae eqvae.pt                       # eight: the paper's SiT-XL/2 on ImageNet
    torchrun --nproc_per_node=8 sit.py --sample-from sit.pt --vae eqvae.pt --samples sit.npz   # 50,000 pictures

The third line takes 400,000 steps of 256. To expect then, 50,000 samples without guidance (Tables 2, 9): gFID 16.1 on
EQ-VAE's latents, 17.2 on SD-VAE's; after 7M steps with guidance 2.06 (Table 4).
"""

import math

import numpy as np
import torch

import dit
from dit import DiT

CONFIGS = {name.replace("DiT", "SiT"): config for name, config in dit.CONFIGS.items()}
LAST = 0.04  # of the time the SDE stops short of the data: there one step remains


class SiT(DiT):
    """DiT's network and names, the velocity as its output. Published files have learn_sigma: twice as many channels, of
    which the second half was never trained."""

    def __init__(self, *args, path="linear", learn_sigma=False, **options):
        super().__init__(*args, learn_sigma=learn_sigma, **options)
        self.config |= dict(path=path)  # what it was trained on

    def forward(self, x, t, y):
        """Latents x_t (B, C, h, w), times (B,) in [0, 1] (0: noise, 1: data), labels (B,) -> velocities (B, C, h, w).

        Times enter the embedding as they are, where DiT's run to 999: it sees them as nearly constant but for its
        highest frequencies. So was SiT trained.
        """
        return super().forward(x, t, y)[:, : x.shape[1]]


# ======================================================================================================================
# Paths:  x_t = alpha_t x1 + sigma_t x0      velocity = alpha'_t x1 + sigma'_t x0      score = -E[x0 | x_t] / sigma_t


def coefficients(t, path="linear"):
    """alpha, sigma and their derivatives at times t, a tensor of any shape. "linear": t, 1 - t; "gvp": sin, cos of
    pi t / 2, which keeps the variance."""
    if path == "linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    alpha, sigma = (0.5 * math.pi * t).sin(), (0.5 * math.pi * t).cos()
    return alpha, sigma, 0.5 * math.pi * sigma, -0.5 * math.pi * alpha


def score(velocity, x, t, path="linear"):
    """The score of p_t at x (B, C, h, w) from the velocity there, t a number's tensor: without x1, the two equations
    for x_t and its velocity leave the mean of x0, which is divided by -sigma_t."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
    return (alpha * velocity - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))


# How much noise the SDE adds, w(t): any w >= 0 leads to the same p_t. "sigma" is SiT's choice for its results.
DIFFUSIONS = {
    "sigma": lambda t, path: coefficients(t, path)[1],
    "linear": lambda t, path: 1 - t,
    "constant": lambda t, path: torch.ones_like(t),
    "decreasing": lambda t, path: 0.25 * ((math.pi * t).cos() + 1) ** 2,
    "increasing-decreasing": lambda t, path: (math.pi * t).sin() ** 2,
    "sbdm": lambda t, path: sbdm(*coefficients(t, path)),
}


def sbdm(alpha, sigma, d_alpha, d_sigma):
    """The diffusion whose reverse the path is, as in score-based models; without bound at t = 0."""
    return d_alpha / alpha * sigma**2 - sigma * d_sigma


# ======================================================================================================================
# Samplers: (predict, noise (B, C, h, w), labels (B,), ...) -> latents, predict(x, t, labels, level) is dit.guided()'s.
# `steps` counts points in time, as in the official code.


def velocity_at(predict, x, t, labels):
    """predict's velocity for all of x at the time t, a number's tensor; its noise level is 1 - t on every path."""
    return predict(
        x, t.to(x).expand(len(x)), labels, round(1 - float(t), 6)
    )  # on a bound of guidance is inside


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
    """dx = (v + w s) dt + sqrt(2 w) dW from noise to t = 0.96, then a step without noise: `steps` calls of the network.
    (The official code calls it twice a step, for the velocity and for the score, which is a function of the velocity.)

    last    the step from 0.96 on. "mean": the same drift; "euler": the velocity alone; "tweedie": the posterior's mean
    """
    x, times = noise, torch.linspace(1e-3 * (diffusion == "sbdm"), 1 - LAST, steps)
    dt = times[1] - times[0]

    def at(t):
        v = velocity_at(predict, x, t, labels)
        return v, score(v, x, t, path), DIFFUSIONS[diffusion](t, path)

    for t in times[:-1]:
        v, s, w = at(t)
        x = x + (v + w * s) * dt + (2 * w * dt).sqrt() * noise_like(x)
    v, s, w = at(times[-1])
    if last == "tweedie":
        alpha, sigma, *_ = coefficients(times[-1], path)
        return (x + sigma**2 * s) / alpha
    return x + (v if last == "euler" else v + w * s) * LAST


@torch.no_grad()
def euler(predict, noise, labels, steps=250):
    """The ODE dx = v dt in steps - 1 equal steps, one call of the network each."""
    x, times = noise, torch.linspace(0, 1, steps)
    for t, later in zip(times, times[1:]):
        x = x + velocity_at(predict, x, t, labels) * (later - t)
    return x


@torch.no_grad()
def heun(predict, noise, labels, steps=250):
    """The same with the mean of the velocities at both ends, two calls each."""
    x, times = noise, torch.linspace(0, 1, steps)
    for t, later in zip(times, times[1:]):
        v = velocity_at(predict, x, t, labels)
        x = x + 0.5 * (v + velocity_at(predict, x + v * (later - t), later, labels)) * (later - t)
    return x


@torch.no_grad()
def dopri5(predict, noise, labels, rtol=1e-3, atol=1e-6):
    """The same by scipy's adaptive Dormand-Prince 5(4). Its steps suit the whole batch, so samples depend a little on
    their neighbours, and the guidance interval makes it stumble."""
    from scipy.integrate import solve_ivp

    def right(t, x):
        x = torch.from_numpy(x).to(noise).view_as(noise)
        return velocity_at(predict, x, torch.tensor(t), labels).double().flatten().cpu().numpy()

    found = solve_ivp(
        right, (0, 1), noise.double().flatten().cpu().numpy(), "RK45", rtol=rtol, atol=atol
    )
    return torch.from_numpy(found.y[:, -1].astype(np.float32)).to(noise.device).view_as(noise)


SAMPLERS = {"sde": euler_maruyama, "euler": euler, "heun": heun, "dopri5": dopri5}

# ======================================================================================================================
# Training and sampling


def train(args, rank, world, device):
    run = dit.Run(
        args, rank, world, device, dit.Latents(args, device), SiT, CONFIGS, path=args.path
    )

    def draw(predict, noise, labels):
        return heun(predict, noise, labels, steps=26)

    while run.goes_on(draw):
        # --------------------------------------------------------------------------------------------------------------
        # TRAINING STEP
        for batch, sync in run.micro_batches():
            x1, x0, t, y = run.latents(batch)  # data, noise (b, c, h, w); (b,), (b,)
            alpha, sigma, d_alpha, d_sigma = coefficients(t[:, None, None, None], args.path)
            x, target = alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0
            with sync:
                with run.autocast:
                    velocity = run.network(x, t, y)
                loss = (velocity - target).square().mean()
                (loss / run.accumulate).backward()
            run.meter.add(mse=loss)
        run.update()
        # --------------------------------------------------------------------------------------------------------------


def sample(
    args, rank, world, device, network=SiT, configs=CONFIGS, reverse=lambda predict: predict
):
    """Also repa.py's, whose reverse() makes guided()'s predict one of SiT's times and sign."""
    import vae

    if args.sampling_steps < 2:
        raise vae.InputError(f"--sampling-steps {args.sampling_steps}: at least 2")
    config, weights, about = dit.read_generator(args.sample_from, network)
    path = config.setdefault("path", args.path)  # an official file does not say it
    model = (
        vae.load_weights(network(**config), weights, args.sample_from)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    predict = reverse(
        dit.guided(
            model,
            config["num_classes"],
            args.cfg_scale,
            args.guidance_low,
            args.guidance_high,
            3 if args.three_channels else None,
        )
    )
    options = dict(steps=args.sampling_steps) if args.sampler != "dopri5" else {}
    if args.sampler == "sde":
        options.update(path=path, diffusion=args.diffusion, last=args.last)

    def draw(noise, labels, noise_like):
        noises = dict(noise_like=noise_like) if args.sampler == "sde" else {}
        return SAMPLERS[args.sampler](predict, noise, labels, **options, **noises)

    own = {
        name: about["args"][name] for name in ("encoder",) if name in about.get("args", {})
    }  # REPA's
    dit.write_samples(
        args,
        rank,
        world,
        device,
        config,
        about,
        draw,
        sampler=args.sampler,
        **options,
        **own,
        three_channels=args.three_channels,
        model=next(name for name in configs if configs[name].items() <= config.items()),
    )


def arguments(description, models):
    """The parser of a flow model's script, but for launch()'s flags."""
    parser = dit.arguments(description, models)
    parser.add_argument(
        "--path", choices=("linear", "gvp"), default="linear", help="from noise to data"
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="sde",
        help="sde: Euler-Maruyama; the others: the ODE",
    )
    parser.add_argument("--diffusion", choices=DIFFUSIONS, default="sigma", help="of the SDE")
    parser.add_argument(
        "--last", choices=("mean", "euler", "tweedie"), default="mean", help="step of the SDE"
    )
    return parser


def main():
    import vae

    with vae.launch(
        arguments(__doc__, CONFIGS),
        data="data/imagenet/train",
        out="sit.pt",
        steps=400_000,
        lr=1e-4,
        batch_size=256,
        save_every=10_000,
        sample_every=10_000,
    ) as (args, rank, world, device):
        (sample if args.sample_from else train)(args, rank, world, device)


if __name__ == "__main__":
    main()
