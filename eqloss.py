"""EQ-VAE's loss: decode a transformed latent, ask for the transformed image.

EQ-VAE (https://arxiv.org/abs/2502.09509) wants an autoencoder's latent space to be
equivariant: to transform an image and then encode it should give the same as to
encode it and then transform the latent, E(tau o x) = tau o E(x) (Eq. 3). Common
autoencoders are far from that. A short fine-tune with the loss below brings them
near it. In any autoencoder's training loop the whole method is two new lines before
your own loss, and tau(z) in the decoder's call:

    >>> import torch
    >>> encode = torch.nn.Conv2d(3, 4, kernel_size=8, stride=8)  # a toy encoder of factor f = 8
    >>> decode = torch.nn.ConvTranspose2d(4, 3, kernel_size=8, stride=8)
    >>> x = torch.rand(2, 3, 64, 64) * 2 - 1  # images (2, 3, 64, 64) in [-1, 1]
    >>> z = encode(x)  # latents (2, 4, 8, 8)
    >>> tau = sample_transform(grid=z.shape[-2:], p_alpha=0.5)  # new: half the time identity
    >>> target = tau(x)  # new: then your losses, with target wherever they had x
    >>> reconstruction = decode(tau(z))  # was decode(z)
    >>> loss = (target - reconstruction).abs().mean()  # your own loss
    >>> loss.backward()

Draw tau once for a whole batch. If several processes share the batch, they must
share its tau too: give `sample_transform` a generator with the same seed in all of
them, for instance seed + step. If a network in your loss needs images of a minimum
size (LPIPS: 16 pixels, PatchGAN: 24), pass it as `smallest`, divided by f and
rounded up.

This file needs torch alone. vae.py and vqgan.py train with it, evaluate.py measures
with it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Table 5's sets of transforms: name -> (whether it turns, what it scales). "both": both sides have
# one scale; "each": each side has its own; None: no scale. tau scales before it turns. "rs" is the
# paper's default.
KINDS = {
    "rs": (True, "both"),
    "rs-aniso": (True, "each"),
    "r": (True, None),
    "s": (False, "both"),
}

# In this order: our default (Eq. 6 says bicubic, and nothing of antialias), the same without
# antialias, and the released code's.
INTERPOLATIONS = ("bicubic-antialias", "bicubic", "bilinear")


# ----------------------------------------------------------------------------------
# tau: scales S(sx, sy), then turns R(theta)                           (Eq. 2 and 6)


@dataclass(frozen=True)
class Transform:
    """A scaling to whole latent cells, then counter-clockwise quarter turns.

    The same object transforms a latent and its image. The scale is kept as the
    integer `size` on the latent's grid, not as a float. Therefore tau(x) and
    decode(tau(z)) have equal shapes for every factor f and every image size.

    grid           (h, w), cells of the latents that it is made for
    size           (h2, w2), cells that they are resampled to, before the turn
    quarter_turns  k of torch.rot90
    interpolation  one of INTERPOLATIONS; the two without antialias show aliasing when they shrink
    """

    grid: tuple
    size: tuple
    quarter_turns: int = 0
    interpolation: str = "bicubic-antialias"

    @property
    def is_identity(self):
        return self.size == self.grid and self.quarter_turns % 4 == 0

    def __call__(self, x):
        """Transforms latents (m = 1) or their images (m = f); differentiable.

        (B, C, m h, m w) -> (B, C, m h2, m w2), sides exchanged where the number of
        turns is odd. Any floating type comes back as it came; the resampling is
        computed in float32 (float64 stays float64). ValueError if x does not lie on
        the grid.
        """
        height, width = x.shape[-2:]
        h, w = self.grid
        m = height // h
        if m < 1 or (height, width) != (m * h, m * w):
            raise ValueError(f"a tensor of {height}x{width} is no multiple of tau's grid {h}x{w}")
        if self.size != self.grid:
            x = self._resample(x, (m * self.size[0], m * self.size[1]))
        if self.quarter_turns % 4:
            x = torch.rot90(x, self.quarter_turns, dims=(-2, -1))
        return x

    def _resample(self, x, size):
        mode, _, antialias = self.interpolation.partition("-")
        # Half types have no antialiased bicubic on a CPU, and are too coarse for one on a GPU.
        full = x if x.dtype == torch.float64 else x.float()
        resized = F.interpolate(
            full, size=size, mode=mode, align_corners=False, antialias=antialias == "antialias"
        )
        return resized.to(x.dtype)


def identity_transform(grid):
    """The tau that changes nothing: it turns Eq. 5 back into Eq. 1."""
    grid = check_grid(grid)
    return Transform(grid, grid)


def scale_transform(s, grid, quarter_turns=0, interpolation="bicubic-antialias"):
    """The fixed tau of the metrics: scale s in (0, 1], rounded to whole cells, then the turns."""
    grid = check_grid(grid)
    size = tuple(max(1, round(s * side)) for side in grid)
    return Transform(grid, size, quarter_turns, interpolation)


# ----------------------------------------------------------------------------------
# The paper's draw: the identity with probability p_alpha, else a random tau  (Eq. 7)


def sample_transform(grid, p_alpha=0.5, kind="rs", low=0.25, smallest=1, generator=None):
    """Draws one tau for a batch of latents on `grid` (h, w).

    p_alpha    probability of the identity, which keeps the reconstruction good (Table 8: 0.5)
    kind       "rs": a turn of 90, 180 or 270 degrees *and* a scale, equal on both sides;
               "rs-aniso": each side has a scale of its own; "r": the turn alone;
               "s": the scale alone
    low        lowest scale. The new length of a side of n cells is drawn uniformly from the
               integers max(ceil(low n), smallest) to n - 1, so it is never n. (Where both sides
               have one scale, the shorter side is drawn, and the longer one follows)
    smallest   least cells of each side that is scaled, for networks in the loss that need room
    generator  a CPU torch.Generator; the draw is a function of its state

    ValueError if `kind` is unknown, `grid` is no pair, or no smaller size is left where a scale is
    to be drawn.
    """
    grid = check_grid(grid)
    turns, scaled_sides = check_kind(kind)
    if uniform(generator) < p_alpha:
        return identity_transform(grid)
    quarter_turns = draw_integer(1, 3, generator) if turns else 0
    size = draw_size(grid, scaled_sides, low, smallest, generator)
    return Transform(grid, size, quarter_turns)


def draw_size(grid, scaled_sides, low, smallest, generator):
    """A size (h2, w2) smaller than the grid, uniform over whole cells; the grid itself
    if scaled_sides is None."""
    if scaled_sides is None:
        return grid
    # low * side may be rounded up: .28 * 25 is 7.000000000000001
    least = [max(smallest, math.ceil(low * side - 1e-9)) for side in grid]
    has_room = all(fewest < side for fewest, side in zip(least, grid))
    check_room(has_room, grid, low, smallest)
    if scaled_sides == "each":
        h2 = draw_integer(least[0], grid[0] - 1, generator)
        w2 = draw_integer(least[1], grid[1] - 1, generator)
        return (h2, w2)
    # One scale for both sides: the shorter side is drawn, the longer one follows it.
    short = grid.index(min(grid))
    cells = draw_integer(least[short], grid[short] - 1, generator)
    scale = cells / grid[short]
    return tuple(max(fewest, round(scale * side)) for fewest, side in zip(least, grid))


def uniform(generator):
    return float(torch.rand((), generator=generator))


def draw_integer(first, last, generator):
    """An integer from first to last, both included."""
    return int(torch.randint(first, last + 1, (), generator=generator))


def check_grid(grid):
    if len(grid) != 2:
        raise ValueError(f"grid {tuple(grid)}: give (h, w), as z.shape[-2:]")
    return (int(grid[0]), int(grid[1]))


def check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f"unknown tau {kind!r}: one of {', '.join(KINDS)}")
    return KINDS[kind]


def check_room(has_room, grid, low, smallest):
    if not has_room:
        raise ValueError(
            f"latents of {grid[0]}x{grid[1]} leave no smaller size of at least {smallest} cells "
            f"and {low:g} of a side"
        )


# ----------------------------------------------------------------------------------
# The released code's draw (zelaki/eqvae), which differs from the paper's


def released_transform(grid, p_alpha=0.5, kind="rs", low=0.25, smallest=1, generator=None):
    """Draws as the released code does: -> (shrink, tau), two Transforms.

        probability       shrink          tau
        3/4 p_alpha       identity        identity
        1/4 p_alpha       a scaling       identity    (kind "r": identity, identity)
        1 - p_alpha       identity        a draw of the kind

    `shrink` is applied to the image before it is encoded. Where it scales, both
    sides have one scale, also for "rs-aniso"; the step is plain reconstruction
    (Eq. 1) of the shrunken image, and tau lies on the smaller grid. For every grid
    the scales are k/32, and sides are rounded down. k is uniform from its least value
    to 31; the least is 32 low, or more where a side would have fewer than `smallest`
    cells. Both interpolate bilinearly, without antialias.

    The arguments and errors are those of `sample_transform`.
    """
    grid = check_grid(grid)
    turns, scaled_sides = check_kind(kind)
    if uniform(generator) < p_alpha:
        if scaled_sides is None or uniform(generator) >= 0.25:
            return identity_transform(grid), identity_transform(grid)
        size = draw_released_size(grid, "both", low, smallest, generator)
        return Transform(grid, size, 0, "bilinear"), identity_transform(size)
    quarter_turns = draw_integer(1, 3, generator) if turns else 0
    size = draw_released_size(grid, scaled_sides, low, smallest, generator)
    return identity_transform(grid), Transform(grid, size, quarter_turns, "bilinear")


def draw_released_size(grid, scaled_sides, low, smallest, generator):
    """A size (h2, w2) of k/32 of the grid's sides, rounded down; the grid itself if
    scaled_sides is None."""
    if scaled_sides is None:
        return grid
    # The lowest k of each side, with which k * side // 32 is at least `smallest`
    least = [max(math.ceil(32 * smallest / side), math.ceil(32 * low)) for side in grid]
    check_room(max(least) <= 31, grid, low, smallest)
    if scaled_sides == "each":
        parts = [draw_integer(first, 31, generator) for first in least]
    else:
        k = draw_integer(max(least), 31, generator)
        parts = [k, k]
    return tuple(k * side // 32 for k, side in zip(parts, grid))


# ----------------------------------------------------------------------------------
# Implicit loss:  L_EQ(x, tau) = L(tau o x, D(tau o E(x)))                   (Eq. 5)


def eq_loss(criterion, decode, x, z, tau):
    """Eq. 5 for images x (B, 3, H, W) and their latents z (B, c, h, w), in one
    call, for a loop of your own. (vae.py's loop has the first two lines of this
    function; vqgan.py's quantises tau(z) before it is decoded.)

    `criterion(target, reconstruction)` is whatever the autoencoder was trained with
    (Eq. 1: pixels, LPIPS, GAN). The KL term does not see tau and stays outside.
    With tau the identity this is Eq. 1, to the bit.

    -> (loss, target, reconstruction)
    """
    target = tau(x)
    reconstruction = decode(tau(z))
    return criterion(target, reconstruction), target, reconstruction


# ----------------------------------------------------------------------------------
# Explicit loss:  ||tau o E(x) - E(tau o x)||^2                  (Eq. 4 and Table 7)


def explicit_loss(encode, x, tau, stop_gradient=False):
    """Eq. 4 for `encode`: (B, 3, H, W) -> (B, c, h, w); summed over the values of
    a latent, mean over the batch.

    Latents that are constant make this loss 0. Therefore it collapses when it acts
    alone, and the paper prefers Eq. 5. With stop_gradient=True E(tau o x) is a
    fixed target, as in the second variant of Table 7.
    """
    target = encode(tau(x))
    if stop_gradient:
        target = target.detach()
    difference = tau(encode(x)) - target
    return difference.square().sum(dim=(1, 2, 3)).mean()


# ----------------------------------------------------------------------------------
# Equivariance error:  ||tau o E(x) - E(tau o x)||^2 / ||E(tau o x)||^2  (Appendix C.3)


@torch.no_grad()
def equivariance_error(encode, x, tau, z=None):
    """The metric of Table 1 for each image of x (B, 3, H, W): -> (B,), in float32.

    It is 0 for an equivariant encoder. If E(tau o x) has nothing to do with tau o E(x), and
    both have mean 0, it is 1 + Var(tau o E(x)) / Var(E(tau o x)). Under rotation these
    variances are equal, which gives 2. The unit of the latents does not matter.
    Table 1's R is the mean over 90, 180 and 270 degrees, its S the mean over the
    scales 0.25, 0.50 and 0.75. Give z = encode(x) if it is there.
    """
    if z is None:
        z = encode(x)
    target = encode(tau(x)).float()
    difference = tau(z).float() - target
    return difference.square().sum(dim=(1, 2, 3)) / target.square().sum(dim=(1, 2, 3))


@torch.no_grad()
def rotation_and_scale_error(encode, x, grid):
    """Table 1's R and S for images x (B, 3, H, W) whose latents lie on `grid`: -> dict(R=, S=)."""
    rotations = [scale_transform(1, grid, turns) for turns in (1, 2, 3)]
    scales = [scale_transform(s, grid) for s in (0.25, 0.5, 0.75)]
    z = encode(x)

    def mean_error(taus):
        errors = [equivariance_error(encode, x, tau, z) for tau in taus]
        return torch.stack(errors).mean().item()

    return dict(R=mean_error(rotations), S=mean_error(scales))
