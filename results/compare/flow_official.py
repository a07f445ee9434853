"""sit.py and repa.py beside the official SiT, REPA and DINOv2 code: the same weights give the same numbers; speed.

    pip install timm torchdiffeq "transformers>=5" && for name in willisma/SiT sihyun-yu/REPA facebookresearch/dinov2
    do git clone https://github.com/$name official/${name#*/}; done
    python results/compare/flow_official.py --official official --record results/flow_official.json

Parity redraws every parameter and compares, on the CPU, networks, guidance, paths, the final latents of trajectories on
the same noise, losses with gradients, and REPA's targets: always the largest difference, relative to the largest value.
`--golden` prints the official numbers that test_all.py holds. Speed takes SDE sampling and training steps (forward,
loss, backward, REPA's clip, AdamW, EMA) in turns, from the same weights, in fp32.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from copy import deepcopy
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from dit_official import formula, seconds  # also puts our files on the path

import dit
import repa
import sit
import vae

PATHS = dict(
    linear=("Linear", "linear", "sigma"), gvp=("GVP", "cosine", "linear")
)  # SiT's, REPA's; REPA's diffusion
FORMS = {form: form for form in sit.DIFFUSIONS} | {
    "sbdm": "SBDM",
    "increasing-decreasing": "inccreasing-decreasing",
}
SMALL = dict(input_size=8, hidden_size=48, depth=2, num_heads=4)
official = SimpleNamespace()


def load_official(root):
    def module(file):
        spec = importlib.util.spec_from_file_location(Path(file).stem, root / file)
        spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
        return made

    vae.load_lpips("random")  # mends torchvision beside a CPU torch, for timm
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path[:0] = [str(root / "SiT"), str(root / "dinov2")]
    unused = (
        "accelerate accelerate.logging accelerate.utils dataset diffusers diffusers.models loss models "
        "models.sit utils wandb"
    ).split()
    with patch.dict(sys.modules, {name: MagicMock() for name in unused}):
        official.preprocess = module("REPA/train.py").preprocess_raw_image
    official.SiT, official.REPA = module("SiT/models.py").SiT, module("REPA/models/sit.py").SiT
    official.loss, official.samplers = module("REPA/loss.py").SILoss, module("REPA/samplers.py")
    official.transport = importlib.import_module("transport")
    official.vits = importlib.import_module("dinov2.models.vision_transformer")


def pair(name, **config):
    """(ours, theirs) of name SiT or REPA, with the same redrawn weights."""
    one = formula(getattr(repa, name)(**config))
    if name == "REPA":
        config |= dict(decoder_hidden_size=config["hidden_size"], qk_norm=False, fused_attn=True)
    other = getattr(official, name)(**config)
    other.load_state_dict(one.state_dict())
    return one, other.eval()


def dino_pair(width, depth, heads, registers, positions=37, side=None):
    """DINOv2 (ours, theirs); with side, their positions are resampled as in REPA's utils.py."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    one = formula(repa.DINOv2(width, depth, heads, registers, positions))
    one.pos_embed.data *= (
        1 if positions < 37 else 100
    )  # formula() leaves little of a tensor as long as this
    other = official.vits.DinoVisionTransformer(
        14 * positions,
        14,
        3,
        width,
        depth,
        heads,
        init_values=1.0,
        block_chunks=0,
        num_register_tokens=registers,
    ).eval()
    other.load_state_dict(one.state_dict())
    if side:
        other.pos_embed.data = resample_abs_pos_embed(other.pos_embed.data, [side, side])
    return one, lambda x: other.forward_features(x)["x_norm_patchtokens"]


def to_transformers(weights):
    made = {}
    for name, p in weights.items():
        for old, new in (
            ("blocks.", "encoder.layer."),
            ("patch_embed.proj", "patch_embeddings.projection"),
            ("pos_embed", "position_embeddings"),
            ("attn.", "attention."),
            (".proj.", ".o_proj."),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
        ):
            name = name.replace(old, new)
        name = (
            name
            if "encoder." in name
            else f"layer{name}"
            if "norm." in name
            else f"embeddings.{name}"
        )
        parts = p.chunk(3) if "qkv" in name else [p]
        made |= {name.replace("qkv", f"{letter}_proj"): part for letter, part in zip("qkv", parts)}
    return made


def sampler(path="linear"):
    """SiT's. Its SBDM divides by 0 at the start that it has for velocities: here it has that of other predictions."""
    transport = official.transport.create_transport(PATHS[path][0])
    transport.sample_eps = 1e-3
    return official.transport.Sampler(transport)


def losses(network, x1, x0, t, y, z, path="linear"):
    """The terms of SiT's loss or, with targets z, of REPA's: as in train() of sit.py and repa.py, or the official."""
    if isinstance(network, sit.SiT):
        alpha, sigma, d_alpha, d_sigma = sit.coefficients(
            (t if z is None else 1 - t)[:, None, None, None], path
        )
        x, target = alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0
        if z is None:
            return [(network(x, t, y) - target).square().mean()]
        velocity, (projection,) = network(x, t, y, return_projections=True)
        return [(velocity + target).square().mean(), -0.5 * repa.alignment(projection, z)]
    with (
        patch("torch.rand", lambda size, **_: t.view(size)),
        patch("torch.randn_like", lambda _: x0),
    ):
        if z is None:
            return [sampler(path).transport.training_losses(network, x1, dict(y=y))["loss"].mean()]
        loss, projection = official.loss(path_type=PATHS[path][1])(network, x1, dict(y=y), [z])
        return [loss.mean(), 0.5 * projection]


@torch.no_grad()
def parity(seed):
    worst, generator = {}, torch.Generator().manual_seed(seed)

    def compare(what, a, b):
        worst[what] = max(worst.get(what, 0.0), float((a - b).abs().max() / b.abs().max()))

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    def drawn(dtype=torch.float32):  # a trajectory's noise, the same for both
        noises = torch.Generator().manual_seed(seed)
        return lambda _: torch.empty(4, 4, 8, 8).normal_(generator=noises).to(dtype)

    # Networks
    x, t, y = randn(3, 4, 16, 16), torch.tensor([0.0, 0.37, 1.0]), torch.tensor([0, 7, 1000])
    for name, learn_sigma in product(("S/2", "B/2", "XL/2"), (True, False)):
        config = dict(sit.CONFIGS[f"SiT-{name}"], depth=2, input_size=16)
        one, other = pair("SiT", learn_sigma=learn_sigma, **config)
        compare("SiT", one(x, t, y), other(x, t, y))
        both = other.forward_with_cfg(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, 0 * y + 1000]), 4
        )
        compare(
            "SiT, three channels guided",
            dit.guided(one, 1000, 4.0, channels=3)(x, t, y, 0.5),
            both[:3],
        )
        plain = dit.DiT(learn_sigma=learn_sigma, **config)
        plain.load_state_dict(other.state_dict())
        other.load_state_dict(plain.state_dict())
        compare("official SiT's weights in DiT, and back", plain(x, t, y)[:, :4], other(x, t, y))
        one, other = pair("REPA", encoder_depth=1, z_dims=(768, 1024), **config)
        (a, mine), (b, theirs) = one(x, t, y, return_projections=True), other(x, t, y)
        compare("REPA", a, b)
        compare("REPA's projections", torch.cat(mine, 2), torch.cat(theirs, 2))

    # Paths, SiT's trajectories
    x, v, t = *randn(2, 64, 1, 1, 1), torch.linspace(0.001, 0.99, 64)
    for path in PATHS:
        plan, s = sampler(path).transport.path_sampler, t[:, None, None, None]
        compare(
            "score from velocity", sit.score(v, x, s, path), plan.get_score_from_velocity(v, x, t)
        )
        theirs = *plan.compute_alpha_t(s), *plan.compute_sigma_t(s)
        for mine, k in zip(sit.coefficients(s, path), (0, 2, 1, 3)):
            compare("coefficients", mine, 0 * s + theirs[k])
    one, other = pair("SiT", num_classes=1000, learn_sigma=False, **SMALL)
    small, predict, noise, y = (
        (one, other),
        dit.guided(one, 1000),
        randn(4, 4, 8, 8),
        torch.tensor([0, 3, 999, 1000]),
    )
    for steps, path, form, last in product((25, 250), PATHS, FORMS, ("mean", "tweedie", "euler")):
        mine = sit.euler_maruyama(predict, noise, y, steps, path, form, last, drawn())
        options = dict(diffusion_form=FORMS[form], last_step=last.title(), num_steps=steps)
        with patch("torch.randn", drawn()):  # "constant" fails on its default norm, the number 1.0
            theirs = sampler(path).sample_sde(diffusion_norm=torch.tensor(1.0), **options)(
                noise, other, y=y
            )[-1]
        compare(f"SDE, {steps} steps, {form}", mine, theirs)
    for steps, (name, method) in product((25, 250), (("euler", "euler"), ("heun", "heun2"))):
        theirs = sampler().sample_ode(sampling_method=method, num_steps=steps)(noise, other, y=y)[
            -1
        ]
        compare(
            f"ODE, {steps} points, {name}", sit.SAMPLERS[name](predict, noise, y, steps), theirs
        )
    exact = sampler().sample_ode(sampling_method="rk4", num_steps=201)(
        noise.double(), lambda x, t, y: other(x.float(), t.float(), y).double(), y=y
    )[-1]
    mine, theirs = sit.dopri5(predict, noise, y), sampler().sample_ode()(noise, other, y=y)[-1]
    compare("dopri5, scipy to torchdiffeq", mine, theirs)
    compare("dopri5, scipy to the solution", mine, exact)
    compare("dopri5, torchdiffeq to the solution", theirs, exact)

    # REPA's trajectories: N Euler steps are N + 1 points; Heun's last step is Euler's there, so we look before it
    (one, other), seen = pair("REPA", encoder_depth=1, projector_dim=16, z_dims=(8,), **SMALL), []
    for steps, (scale, low, high) in product(
        (25, 250), ((1.0, 0.0, 1.0), (1.8, 0.0, 0.7), (4.0, 0.1, 0.6))
    ):
        predict, what = (
            repa.reverse(dit.guided(one, 1000, scale, low, high)),
            f"REPA, {steps} steps, cfg {scale:g}, ",
        )
        options = dict(num_steps=steps, cfg_scale=scale, guidance_low=low, guidance_high=high)
        theirs = official.samplers.euler_sampler(other, noise, y, **options)
        compare(what + "Euler", sit.euler(predict, noise, y, steps + 1), theirs)
        if scale == 1:
            sit.heun(lambda *at: seen.append(at[0]) or predict(*at), noise, y, steps + 1)
            mine = seen[-2]
            official.samplers.euler_sampler(
                lambda x, *at, y: seen.append(x) or other(x, *at, y), noise, y, steps, True
            )
            compare(what + "Heun", mine, seen[-1])
        for path, (_, name, form) in PATHS.items():
            mine = sit.euler_maruyama(predict, noise, y, steps, path, form, "mean", drawn())
            with patch("torch.randn_like", drawn(torch.float64)):
                theirs = official.samplers.euler_maruyama_sampler(
                    other, noise, y, path_type=name, **options
                )
            compare(what + f"SDE, {name}", mine, theirs)

    # Losses
    t = torch.rand(4, generator=generator)
    for path, (name, networks, z) in product(
        PATHS, (("SiT", small, None), ("REPA", (one, other), randn(4, 16, 8)))
    ):
        results = []
        for network in networks:
            parameters = dict(sorted(network.named_parameters()))
            del parameters["pos_embed"]
            with torch.enable_grad():
                terms = losses(network, noise, noise.flip(0), t, y, z, path)
                gradients = torch.autograd.grad(sum(terms), parameters.values())
            results.append((torch.stack(terms), torch.cat([g.flatten() for g in gradients])))
        for what, a, b in zip(("losses", "gradients"), *results):
            compare(f"{name}'s {what}", a, b)

    # REPA's targets
    for name, side in (("vits14", None), ("vits14", 32), ("vitb14_reg", 4), ("vitb14_reg", 16)):
        (one, other), pixels = (
            dino_pair(side=side, **repa.ENCODERS[f"dinov2_{name}"]),
            14 * (side or 37),
        )
        x = randn(1, 3, pixels, pixels)
        compare(f"DINOv2 {name}, {'resampled' if side else 'its own'} positions", one(x), other(x))
    for size in (512, 256):
        images = torch.randint(256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
        ready = official.preprocess(images, "dinov2")
        compare("preprocessing", repa.DINOv2.encode(lambda x: x, images, size // 16), ready)
    compare("REPA's targets of uint8 images", one.encode(images, 16), other(ready))
    import transformers

    for registers, kind in ((0, "Dinov2"), (4, "Dinov2WithRegisters")):
        one, x = formula(repa.DINOv2(48, 2, 4, registers, positions=4)), randn(2, 3, 56, 56)
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            num_register_tokens=registers,
        )
        other = getattr(transformers, f"{kind}Model")(config).eval()
        other.load_state_dict(to_transformers(one.state_dict()))
        compare(
            f"transformers' {kind}Model", one(x), other(x).last_hidden_state[:, 1 + registers :]
        )
    return worst


@torch.no_grad()
def golden():
    """Prints what the official code computes for small networks of formula()'s weights, and how far off ours is."""

    def waves(k, *shape):
        return (
            torch.sin(k * torch.arange(np.prod(shape), dtype=torch.float64)).reshape(shape).float()
        )

    def noises():  # of step 0, 1, ...: waves(2), waves(3), ...
        k = count(2)
        return lambda _: waves(next(k), 3, 4, 8, 8)

    x, t, y = waves(1, 3, 4, 8, 8), torch.tensor([0, 0.5, 1]), torch.tensor([0, 7, 10])
    one, other = pair("SiT", num_classes=10, learn_sigma=False, **SMALL)
    predict, part = dit.guided(one, 10), np.s_[:, ::2, ::4, 1]
    with patch("torch.randn", noises()):
        theirs = sampler().sample_sde(diffusion_form="sigma", num_steps=6)(x, other, y=y)[-1]
    found = dict(sde=(sit.euler_maruyama(predict, x, y, 6, noise_like=noises()), theirs, part))
    theirs = sampler().sample_ode(sampling_method="heun2", num_steps=5)(x, other, y=y)[-1]
    found |= dict(
        forward=(one(x, t, y), other(x, t, y), part),
        heun=(sit.heun(predict, x, y, 5), theirs, part),
    )
    one, other = pair(
        "REPA", num_classes=10, encoder_depth=1, projector_dim=16, z_dims=(8,), **SMALL
    )
    (a, (mine,)), (b, (theirs,)) = one(x, t, y, return_projections=True), other(x, t, y)
    found |= dict(repa=(a, b, part), projections=(mine, theirs, np.s_[:, ::5, ::4]))
    for registers in (0, 4):
        one, other = dino_pair(48, 2, 4, registers, positions=4, side=2)
        found[f"dinov2_{registers}"] = (
            *(net(waves(1, 2, 3, 28, 28)) for net in (one, other)),
            np.s_[:, :, ::16],
        )
    for what, (a, b, part) in found.items():
        print(
            f"{what}={[round(v, 6) for v in b[part].flatten().tolist()]},   # ours: {(a - b).abs().max():.1e} off"
        )


def trainer(network, x, y, z):
    """A training step: ours with dit.Run's update, theirs as in their train.py."""
    parameters = [p for name, p in network.train().named_parameters() if name != "pos_embed"]
    ours, clip, ema = (
        isinstance(network, sit.SiT),
        float("inf") if z is None else 1.0,
        deepcopy(network),
    )
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0, fused=ours or None)
    run = SimpleNamespace(
        trainable=parameters,
        optimizer=optimizer,
        model=network,
        ema=ema.state_dict(),
        step=0,
        args=SimpleNamespace(ema_decay=0.9999),
        meter=MagicMock(),
    )

    def step():
        sum(
            losses(network, x, torch.randn_like(x), torch.rand(len(x), device=x.device), y, z)
        ).backward()
        if ours:
            return dit.Run.update(run, clip)
        if z is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        for average, p in zip(ema.parameters(), network.parameters()):
            average.data.mul_(0.9999).add_(p.data, alpha=1e-4)

    return step


def speed(rounds, device, batch=4):
    x, y, steps = (
        torch.randn(batch, 4, 32, 32, device=device),
        torch.arange(batch, device=device),
        {},
    )
    config, z = repa.CONFIGS["REPA-S/2"], torch.randn(batch, 256, 768, device=device)
    steps["REPA-S/2, training step"] = [
        trainer(net.to(device), x, y, z) for net in pair("REPA", **config)
    ]
    networks = [net.to(device) for net in pair("SiT", learn_sigma=False, **sit.CONFIGS["SiT-S/2"])]
    (one, other), theirs = (
        deepcopy(networks),
        sampler().sample_sde(diffusion_form="sigma", num_steps=25),
    )
    steps["SiT-S/2, SDE of 25 steps"] = [
        lambda: sit.euler_maruyama(dit.guided(one, 1000), x, y, 25),
        torch.no_grad()(lambda: theirs(x, other, y=y)),
    ]
    steps["SiT-S/2, training step"] = [trainer(net, x, y, None) for net in networks]
    for what, pair_ in steps.items():
        times = torch.tensor([[seconds(step, 1, device) for step in pair_] for _ in range(rounds)])
        ours, official_ = times.median(dim=0).values.tolist()
        steps[what] = dict(
            seconds_ours=ours,
            seconds_official=official_,
            batch=batch,
            rounds=rounds,
            official_to_ours=float((times[:, 1] / times[:, 0]).median()),
        )
    return steps


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--official", required=True, type=Path, help="folder of the three official repositories"
    )
    parser.add_argument("--parts", default="parity,speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--record")
    args = parser.parse_args()
    load_official(args.official)
    if args.golden:
        return golden()
    device, record = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    versions = {
        name: importlib.metadata.version(name)
        for name in "torch timm torchdiffeq transformers scipy".split()
    }
    if "parity" in args.parts:
        worst = parity(args.seed)
        record["parity"] = dict(n=len(worst), device="cpu", largest_relative_difference=worst)
    if "speed" in args.parts:
        record["speed"] = speed(args.rounds, device)
    record["about"] = dict(
        command=sys.argv,
        seed=args.seed,
        versions=versions,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        date=time.strftime("%Y-%m-%d"),
    )
    print(json.dumps(record, indent=1))
    if args.record:
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
