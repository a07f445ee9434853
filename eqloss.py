"""EQ-VAE's regulariser: decode a transformed latent, ask for the transformed image (https://arxiv.org/abs/2502.09509).

An autoencoder's latent space is equivariant when transforming an image and transforming its latent are the same thing,
E(tau o x) = tau o E(x) (Eq. 3). Common autoencoders are far from it; a short fine-tune with the loss below mends that.
The whole method, in any autoencoder's training loop, is one line before your own loss:

    >>> import torch
    >>> encode = torch.nn.Conv2d(3, 4, kernel_size=8, stride=8)              # a toy encoder of factor f = 8
    >>> decode = torch.nn.ConvTranspose2d(4, 3, kernel_size=8, stride=8)
    >>> x = torch.rand(2, 3, 64, 64) * 2 - 1                                 # images              (2, 3, 64, 64)
    >>> z = encode(x)                                                        # their latents       (2, 4, 8, 8)
    >>> tau = sample_transform(grid=z.shape[-2:], p_alpha=0.5)               # one draw a batch; identity half the time
    >>> x, z = tau(x), tau(z)                                                # <- EQ-VAE
    >>> loss = (x - decode(z)).abs().mean()                                  # your own loss, on x and decode(z)
    >>> loss.backward()

A batch drawn by several processes or in several parts must share its tau: give `sample_transform` a generator seeded
from (seed, step). This file needs torch alone. Used by vae.py and vqgan.py (training) and evaluate.py (the metric).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

KINDS = ("rs", "rs-aniso", "r", "s")  # Table 5: R.S(s,s), R.S(sx,sy), R, S(s,s)
RECIPES = ("paper", "release")  # the paper's draw, or the released code's
INTERPOLATIONS = (
    "bicubic-antialias",
    "bicubic",
    "bilinear",
)  # ours; Eq. 6 read literally; the released code


# ----------------------------------------------------------------------------------------------------------------------
# tau = S(sx, sy) . R(theta)                                                                               (Eq. 2 and 6)


@dataclass(frozen=True)
class Transform:
    """A scaling to whole latent cells, then counter-clockwise quarter turns, for a latent or for its image alike.

    The scale is kept as the integer `size` on the latent's grid, not as a float: so tau(x) and decode(tau(z)) agree in
    shape for every factor f and every image size. (The released code draws k/32 and fails at f = 16 for odd k.)

    grid           (h, w) of the latents
    size           (h2, w2) they are resampled to, before the turn
    quarter_turns  k of torch.rot90
    interpolation  "bicubic-antialias" (default), "bicubic" or "bilinear"; without antialias both alias when they shrink
    before         True: for the image alone, before it is encoded (the released code's low-resolution prior)
    """

    grid: tuple
    size: tuple
    quarter_turns: int = 0
    interpolation: str = "bicubic-antialias"
    before: bool = False

    def __call__(self, x):
        """(B, C, m h, m w) -> (B, C, m h2, m w2), its sides exchanged by an odd number of turns; m = 1 for a latent,
        f for its image. Differentiable. ValueError if x does not lie on the grid."""
        (h, w), (h2, w2), (height, width) = self.grid, self.size, x.shape[-2:]
        m = height // h
        if m < 1 or (height, width) != (m * h, m * w):
            raise ValueError(f"a tensor of {height}x{width} is no multiple of tau's grid {h}x{w}")
        if (h2, w2) != (h, w):
            mode, _, antialias = self.interpolation.partition("-")
            x = F.interpolate(
                x, size=(m * h2, m * w2), mode=mode, align_corners=False, antialias=bool(antialias)
            )
        return torch.rot90(x, self.quarter_turns, dims=(-2, -1)) if self.quarter_turns % 4 else x

    def split(self):
        """-> (what is done to the image before it is encoded, what is then done to image and latent alike)."""
        if self.before:
            return self, Transform(self.size, self.size)
        return Transform(self.grid, self.grid), self


def scale_transform(s, grid, quarter_turns=0, interpolation="bicubic-antialias"):
    """The fixed tau of the metrics: scale s in (0, 1], rounded to whole cells of the grid (h, w), and quarter turns."""
    return Transform(
        tuple(grid), tuple(max(1, round(s * side)) for side in grid), quarter_turns, interpolation
    )


# ----------------------------------------------------------------------------------------------------------------------
# The draw: identity with probability p_alpha, else a random tau                                                 (Eq. 7)


def sample_transform(
    grid,
    p_alpha=0.5,
    kind="rs",
    low=0.25,
    smallest=1,
    interpolation=None,
    generator=None,
    recipe="paper",
):
    """Draws one tau for a batch of latents on `grid` (h, w).

    p_alpha        probability of the identity, which turns Eq. 5 back into Eq. 1 (prior preservation; Table 8: 0.5)
    kind           "rs": a turn of 90, 180 or 270 degrees *and* an isotropic scale (the paper's default); "rs-aniso":
                   the same with each side's scale its own; "r", "s": the turn or the scale alone (Table 5)
    low            lowest scale; sizes are uniform over the integers ceil(low h) .. h - 1: a drawn scale is never 1
    smallest       lower bound on both sides of the result in latent cells, for networks in the loss that need room
    interpolation  of tau; None: the recipe's, "bicubic-antialias" or "bilinear"
    generator      a CPU torch.Generator; the draw is a function of its state
    recipe         "release" draws as the released code does: the scale is k/32, k uniform over 32 low .. 31 (sides are
                   rounded down where 32 does not divide the grid), and a quarter of the identities (p_prior_s) becomes
                   a scaling with `before` set: the trainer is to autoencode the smaller image

    ValueError if no size is left to draw from.
    """

    def draw(first, last):
        return int(torch.randint(first, last + 1, (), generator=generator))

    def smaller():
        parts = (32, 32) if release else grid  # scales are k / parts
        bounds = [
            (max(math.ceil(smallest * n / side), math.ceil(low * n)), n - 1)
            for n, side in zip(parts, grid)
        ]
        if any(first > last for first, last in bounds):
            raise ValueError(
                f"latents of {grid[0]}x{grid[1]} leave no smaller size of at least {smallest} cells"
            )
        if kind == "rs-aniso":
            return tuple(draw(*bound) * side // n for bound, n, side in zip(bounds, parts, grid))
        short = grid.index(min(grid))  # the shorter side is drawn, the other follows
        k = draw(*bounds[short])
        if release:
            return tuple(k * side // 32 for side in grid)
        return tuple(
            max(first, round(k * side / grid[short])) for side, (first, _) in zip(grid, bounds)
        )

    grid, release = (int(grid[0]), int(grid[1])), recipe == "release"
    if kind not in KINDS or recipe not in RECIPES:
        raise ValueError(
            f"unknown tau {kind!r}, {recipe!r}: of {', '.join(KINDS)} and {', '.join(RECIPES)}"
        )
    interpolation = interpolation or ("bilinear" if release else "bicubic-antialias")
    if float(torch.rand((), generator=generator)) < p_alpha:
        before = release and kind != "r" and float(torch.rand((), generator=generator)) < 0.25
        return Transform(grid, smaller() if before else grid, 0, interpolation, before)
    turns = draw(1, 3) if kind != "s" else 0
    return Transform(grid, smaller() if kind != "r" else grid, turns, interpolation)


# ----------------------------------------------------------------------------------------------------------------------
# Implicit loss, the method:  L_EQ(x, tau) = L(tau o x, D(tau o E(x)))                                           (Eq. 5)


def eq_loss(criterion, decode, x, z, tau):
    """Eq. 5 for images x (B, 3, H, W) and their latents z (B, c, h, w): -> (loss, target, reconstruction).

    `criterion(target, reconstruction)` is whatever the autoencoder was trained with (Eq. 1: pixels, LPIPS, GAN; the KL
    term does not see tau and stays outside). With tau the identity this is Eq. 1, to the bit.
    """
    target, reconstruction = tau(x), decode(tau(z))
    return criterion(target, reconstruction), target, reconstruction


# ----------------------------------------------------------------------------------------------------------------------
# Explicit loss:  ||tau o E(x) - E(tau o x)||^2, which shrinks the latents when it acts alone        (Eq. 4 and Table 7)


def explicit_loss(encode, x, tau, stop_gradient=False):
    """Eq. 4 for `encode`: (B, 3, H, W) -> (B, c, h, w), summed over the latent, averaged over the batch.

    stop_gradient=True takes E(tau o x) for a fixed target, Table 7's second variant. Constant latents make the loss 0:
    that is why it collapses, and why the paper prefers Eq. 5.
    """
    target = encode(tau(x))
    difference = tau(encode(x)) - (target.detach() if stop_gradient else target)
    return difference.square().sum(dim=(1, 2, 3)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Equivariance error:  ||tau o E(x) - E(tau o x)||^2 / ||E(tau o x)||^2                                   (Appendix C.3)


@torch.no_grad()
def equivariance_error(encode, x, tau):
    """The metric of Table 1 for each image of x (B, 3, H, W): -> (B,), 0 for an equivariant encoder.

    Unrelated latents have 2 under rotation, 1 + Var(tau z) / Var(z) under scaling; the latents' unit does not matter.
    Table 1's R is the mean over 90, 180, 270 degrees, its S over the scales 0.25, 0.50, 0.75.
    """
    target = encode(tau(x))
    difference = tau(encode(x)) - target
    return difference.square().sum(dim=(1, 2, 3)) / target.square().sum(dim=(1, 2, 3))


def rotation_and_scale_error(encode, x, grid):
    """Table 1's R and S, means over the images x (B, 3, H, W), whose latents lie on the grid: -> dict(R=, S=)."""
    taus = dict(
        R=[scale_transform(1, grid, turns) for turns in (1, 2, 3)],
        S=[scale_transform(s, grid) for s in (0.25, 0.5, 0.75)],
    )
    return {
        name: torch.stack([equivariance_error(encode, x, tau) for tau in three]).mean().item()
        for name, three in taus.items()
    }
