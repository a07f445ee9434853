"""sit.py and repa.py beside the official SiT, REPA and DINOv2 code: the same weights give the same
numbers.

    pip install timm torchdiffeq
    git clone https://github.com/willisma/SiT official/SiT
    git clone https://github.com/sihyun-yu/REPA official/REPA
    git clone https://github.com/facebookresearch/dinov2 official/dinov2
    python results/compare/flow_official.py --official official --record results/flow_official.json

Every parameter is drawn anew. Compared are networks, guidance, paths, the last latents of
trajectories on the same noise, losses with their gradients, and REPA's targets. `--golden` prints
the official numbers that test_all.py holds.
"""

import functools
import importlib
import importlib.util
import itertools
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from beside import Differences, compare, same_weights, waves  # also puts our files on the path
from dit_official import compare_network

import dit
import repa
import sit
import vae

# Our name of a path -> SiT's, REPA's, and the diffusion that REPA's sampler takes on it
PATHS = dict(linear=("Linear", "linear", "sigma"), gvp=("GVP", "cosine", "linear"))
# Our name of a diffusion -> SiT's
DIFFUSIONS = {name: name for name in sit.DIFFUSIONS}
DIFFUSIONS["sbdm"] = "SBDM"
DIFFUSIONS["increasing-decreasing"] = "inccreasing-decreasing"
SMALL = dict(input_size=8, hidden_size=48, depth=2, num_heads=4)
SMALL_REPA = dict(SMALL, encoder_depth=1, projector_dim=16, z_dims=(8,))
# What the official files import and none of this needs
UNUSED = (
    "accelerate", "accelerate.logging", "accelerate.utils", "dataset", "diffusers",
    "diffusers.models", "loss", "models", "models.sit", "utils", "wandb",
)  # fmt: skip

official = SimpleNamespace()


def load_official(root):
    """Imports the official code from the folders in `root`."""
    vae.import_lpips()  # mends torchvision beside a CPU torch, for timm
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path[:0] = [str(root / "SiT"), str(root / "dinov2")]
    with patch.dict(sys.modules, {name: MagicMock() for name in UNUSED}):
        official.preprocess = import_file(root / "REPA/train.py").preprocess_raw_image
    official.SiT = import_file(root / "SiT/models.py").SiT
    official.REPA = import_file(root / "REPA/models/sit.py").SiT
    official.loss = import_file(root / "REPA/loss.py").SILoss
    official.samplers = import_file(root / "REPA/samplers.py")
    official.transport = importlib.import_module("transport")
    official.vits = importlib.import_module("dinov2.models.vision_transformer")


def import_file(path):
    """Two repositories have a models.py, so their files are imported by path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sit_pair(**config):
    """(our SiT, the official one) with the same redrawn weights."""
    config.setdefault("learn_sigma", False)  # as trained today; its published files have it
    return same_weights(sit.SiT(**config), official.SiT(**config))


def repa_pair(**config):
    """(our REPA, the official one) with the same redrawn weights."""
    options = dict(decoder_hidden_size=config["hidden_size"], qk_norm=False, fused_attn=True)
    return same_weights(repa.REPA(**config), official.REPA(**config, **options))


def dino_pair(width, depth, heads, registers=0, positions=37, side=None):
    """DINOv2 (ours, theirs); with `side` their positions are resampled as in REPA's utils.py."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    options = dict(init_values=1.0, block_chunks=0, num_register_tokens=registers)
    sizes = (14 * positions, 14, 3, width, depth, heads)
    theirs = official.vits.DinoVisionTransformer(*sizes, **options)
    ours, theirs = same_weights(repa.DINOv2(width, depth, heads, registers, positions), theirs)
    if positions == 37:  # formula() leaves little of a tensor as long as this
        for network in (ours, theirs):
            network.pos_embed.data *= 100
    if side:
        theirs.pos_embed.data = resample_abs_pos_embed(theirs.pos_embed.data, [side, side])
    return ours, lambda x: theirs.forward_features(x)["x_norm_patchtokens"]


def sampler(path="linear"):
    """SiT's. Its SBDM divides by 0 at the start that it has for velocities; here it has the start
    that it has for other predictions."""
    transport = official.transport.create_transport(PATHS[path][0])
    transport.sample_eps = 1e-3
    return official.transport.Sampler(transport)


# ==================================================================================================
# Parity


@torch.no_grad()
def parity():
    found = Differences()
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator)
    compare_networks(found, randn)
    compare_paths(found, randn)
    noise = randn(4, 4, 8, 8)
    y = torch.tensor([0, 3, 999, 1000])
    nets = sit_pair(**SMALL)
    repa_nets = repa_pair(**SMALL_REPA)
    compare_sdes(found, *nets, noise, y)
    compare_odes(found, *nets, noise, y)
    compare_repa_trajectories(found, *repa_nets, noise, y)
    t = torch.rand(4, generator=generator)
    compare_losses(found, "SiT", nets, noise, t, y, None)
    compare_losses(found, "REPA", repa_nets, noise, t, y, randn(4, 16, 8))
    compare_encoders(found, randn)
    compare_preprocessing(found, generator)
    return found.record()


def compare_networks(found, randn):
    x = randn(3, 4, 16, 16)
    t = torch.tensor([0.0, 0.37, 1.0])
    y = torch.tensor([0, 7, 1000])
    for size, learn_sigma in itertools.product(("S/2", "B/2", "XL/2"), (True, False)):
        config = dict(sit.CONFIGS[f"SiT-{size}"], depth=2, input_size=16)
        ours, theirs = sit_pair(**config, learn_sigma=learn_sigma)
        compare_network(found, "SiT", ours, theirs, x, t, y)
        ours, theirs = repa_pair(**config, encoder_depth=1, z_dims=(768, 1024))
        velocity, projections = ours(x, t, y, return_projections=True)
        their_velocity, their_projections = theirs(x, t, y)
        found.add("REPA", velocity, their_velocity)
        found.add("REPA's projections", projections, their_projections)


def compare_paths(found, randn):
    x = randn(64, 1, 1, 1)
    v = randn(64, 1, 1, 1)
    t = torch.linspace(0.001, 0.99, 64)
    times = t[:, None, None, None]
    for path in PATHS:
        plan = sampler(path).transport.path_sampler
        theirs = plan.get_score_from_velocity(v, x, t)
        found.add("score from velocity", sit.score(v, x, times, path), theirs)
        alpha, d_alpha = plan.compute_alpha_t(times)
        sigma, d_sigma = plan.compute_sigma_t(times)
        theirs = [torch.zeros_like(times) + each for each in (alpha, sigma, d_alpha, d_sigma)]
        found.add("coefficients", sit.coefficients(times, path), theirs)


def same_noise(dtype=torch.float32):
    """-> a function that stands for randn or randn_like: every trajectory gets the same noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(_):
        return torch.empty(4, 4, 8, 8).normal_(generator=generator).to(dtype)

    return draw


def compare_sdes(found, ours, theirs, noise, y):
    predict = dit.guided(ours, 1000)
    last_steps = ("mean", "tweedie", "euler")
    kinds = itertools.product((25, 250), PATHS, DIFFUSIONS, last_steps)
    for steps, path, diffusion, last in kinds:
        fresh = same_noise()
        mine = sit.euler_maruyama(predict, noise, y, steps, path, diffusion, last, fresh)
        draw = sampler(path).sample_sde(
            diffusion_form=DIFFUSIONS[diffusion],
            diffusion_norm=torch.tensor(1.0),  # "constant" fails on the default, the number 1.0
            last_step=last.title(),
            num_steps=steps,
        )
        with patch("torch.randn", same_noise()):
            trajectory = draw(noise, theirs, y=y)
        found.add(f"SDE, {steps} steps, {diffusion}", mine, trajectory[-1])


def compare_odes(found, ours, theirs, noise, y):
    predict = dit.guided(ours, 1000)
    methods = dict(euler="euler", heun="heun2")
    for steps, name in itertools.product((25, 250), methods):
        draw = sampler().sample_ode(sampling_method=methods[name], num_steps=steps)
        mine = sit.SAMPLERS[name](predict, noise, y, steps)
        found.add(f"ODE, {steps} points, {name}", mine, draw(noise, theirs, y=y)[-1])

    torchdiffeq = sampler().sample_ode()(noise, theirs, y=y)[-1]
    found.add("dopri5, scipy to torchdiffeq", sit.dopri5(predict, noise, y), torchdiffeq)


def compare_repa_trajectories(found, ours, theirs, noise, y):
    """REPA's N Euler steps are our N + 1 points in time."""
    guidances = ((1.0, 0.0, 1.0), (1.8, 0.0, 0.7), (4.0, 0.1, 0.6))
    for steps, (scale, low, high) in itertools.product((25, 250), guidances):
        predict = repa.reverse(dit.guided(ours, 1000, scale, low, high))
        what = f"REPA, {steps} steps, cfg {scale:g}"
        options = dict(num_steps=steps, cfg_scale=scale, guidance_low=low, guidance_high=high)
        end = official.samplers.euler_sampler(theirs, noise, y, **options)
        found.add(f"{what}, Euler", sit.euler(predict, noise, y, steps + 1), end)
        for path, (_, their_path, diffusion) in PATHS.items():
            fresh = same_noise()
            mine = sit.euler_maruyama(predict, noise, y, steps, path, diffusion, "mean", fresh)
            with patch("torch.randn_like", same_noise(torch.float64)):
                end = official.samplers.euler_maruyama_sampler(
                    theirs, noise, y, path_type=their_path, **options
                )
            found.add(f"{what}, SDE, {path}", mine, end)


def compare_losses(found, name, nets, noise, t, y, z):
    for path in PATHS:
        terms = []
        gradients = []
        for network, losses in zip(nets, (our_losses, official_losses)):
            parameters = dict(sorted(network.named_parameters()))
            del parameters["pos_embed"]
            with torch.enable_grad():
                found_terms = losses(network, noise, noise.flip(0), t, y, z, path)
                total = sum(found_terms)
                gradients.append(torch.autograd.grad(total, parameters.values()))
            terms.append(torch.stack(found_terms))
        found.add(f"{name}'s losses", *terms)
        found.add(f"{name}'s gradients", *gradients)


def our_losses(network, latents, noise, t, y, z, path="linear"):
    """As in train() of sit.py or, with the targets z, of repa.py, whose time runs backwards."""
    if z is None:
        alpha, sigma, d_alpha, d_sigma = sit.coefficients(t[:, None, None, None], path)
        velocity = network(alpha * latents + sigma * noise, t, y)
        return [(velocity - (d_alpha * latents + d_sigma * noise)).square().mean()]
    alpha, sigma, d_alpha, d_sigma = sit.coefficients(1 - t[:, None, None, None], path)
    x = alpha * latents + sigma * noise
    velocity, (projection,) = network(x, t, y, return_projections=True)
    target = -(d_alpha * latents + d_sigma * noise)
    return [(velocity - target).square().mean(), -0.5 * repa.alignment(projection, z)]


def official_losses(network, latents, noise, t, y, z, path="linear"):
    """What their code computes of the same times and noise."""
    with (
        patch("torch.rand", lambda size, **_: t.view(size)),
        patch("torch.randn_like", lambda _: noise),
    ):
        if z is None:
            transport = sampler(path).transport
            return [transport.training_losses(network, latents, dict(y=y))["loss"].mean()]
        criterion = official.loss(path_type=PATHS[path][1])
        loss, projection = criterion(network, latents, dict(y=y), [z])
        return [loss.mean(), 0.5 * projection]


# --------------------------------------------------------------------------------------------------
# REPA's targets


def compare_encoders(found, randn):
    cases = (("vits14", None), ("vits14", 32), ("vitb14_reg", 4), ("vitb14_reg", 16))
    for name, side in cases:
        ours, theirs = dino_pair(**repa.ENCODERS[f"dinov2_{name}"], side=side)
        pixels = 14 * (side or 37)
        x = randn(1, 3, pixels, pixels)
        kind = "resampled" if side else "its own"
        found.add(f"DINOv2 {name}, {kind} positions", ours(x), theirs(x))


def compare_preprocessing(found, generator):
    ours, theirs = dino_pair(**repa.ENCODERS["dinov2_vitb14_reg"], side=16)
    only_prepares = repa.DINOv2(width=12, depth=0)
    only_prepares.forward = lambda x: x
    for size in (512, 256):
        images = torch.randint(256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
        ready = official.preprocess(images, "dinov2")
        found.add("preprocessing", only_prepares.encode(images, size // 16), ready)
    found.add("REPA's targets of uint8 images", ours.encode(images, 16), theirs(ready))


# ==================================================================================================
# Golden numbers


@torch.no_grad()
def golden():
    """What the official code computes for small networks of formula()'s weights."""
    x = waves(1, 3, 4, 8, 8)
    t = torch.tensor([0, 0.5, 1])
    y = torch.tensor([0, 7, 10])
    _, network = sit_pair(**SMALL, num_classes=10)
    draw = sampler().sample_sde(diffusion_form="sigma", num_steps=6)
    with patch("torch.randn", waves_of_each_step()):
        sde = draw(x, network, y=y)[-1]
    heun = sampler().sample_ode(sampling_method="heun2", num_steps=5)(x, network, y=y)[-1]
    found = dict(sde=sde, forward=network(x, t, y), heun=heun)

    _, network = repa_pair(**SMALL_REPA, num_classes=10)
    found["repa"], (projections,) = network(x, t, y)
    found = {name: values[:, ::2, ::4, 1] for name, values in found.items()}
    found["projections"] = projections[:, ::5, ::4]
    for registers in (0, 4):
        _, network = dino_pair(48, 2, 4, registers, positions=4, side=2)
        found[f"dinov2_{registers}"] = network(waves(1, 2, 3, 28, 28))[:, :, ::16]
    return found


def waves_of_each_step():
    """The noise of step 0, 1, ...: waves(2), waves(3), ..."""
    numbers = itertools.count(2)
    return lambda _: waves(next(numbers), 3, 4, 8, 8)


if __name__ == "__main__":
    packages = ("torch", "timm", "torchdiffeq", "scipy")
    compare(__doc__, load_official, parity, "flow", golden, packages)
