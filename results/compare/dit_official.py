"""dit.py beside the official DiT code: the same weights give the same numbers, and a training step's time.

    git clone https://github.com/facebookresearch/DiT && pip install timm
    python results/compare/dit_official.py --dit DiT --record results/dit_official.json

Parity redraws every parameter (DiT starts as the zero function) and compares the forward pass, guidance, loss terms,
DDPM and DDIM steps and all respacings; `--golden` prints the numbers that test_all.py holds. Speed takes one training
step (forward, loss, backward, AdamW, EMA) of each, in turns, both in fp32 and on the same latents; then cached training
beside training that encodes with the full-size SD-VAE, and the filling of the cache beside the bare encoder.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dit as ours  # noqa: E402
import vae  # noqa: E402


def formula(network):
    """Every parameter from sines, so that golden numbers need no file of weights."""
    state = network.state_dict()
    for k, name in enumerate(sorted(state)):
        p = state[name]
        wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) ** 1.1 + k).reshape(
            p.shape
        )
        p.copy_(wave * (1.4 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.2))
    return network.eval()


def pair(official, name, **options):
    config = dict(ours.CONFIGS[name], **options)
    one = formula(ours.DiT(**config))
    other = official.DiT(**{"input_size": 32, **{key: config[key] for key in config}})
    other.load_state_dict(one.state_dict())
    return one, other.eval()


@torch.no_grad()
def parity(official, create_diffusion, space_timesteps):
    worst = {}

    def compare(what, a, b):
        worst[what] = max(worst.get(what, 0.0), float((a - b).abs().max() / b.abs().max()))

    generator = torch.Generator().manual_seed(0)
    for name in ("DiT-S/2", "DiT-B/2", "DiT-B/1", "DiT-XL/2"):
        one, other = pair(official, name, depth=2, input_size=16)
        compare(
            "positions",
            ours.DiT(**one.config).pos_embed,
            official.DiT(
                input_size=16,
                patch_size=one.patch_size,
                hidden_size=one.config["hidden_size"],
                depth=1,
            ).pos_embed,
        )
        x, noise = torch.randn(2, 3, 4, 16, 16, generator=generator)
        t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 7, 1000])
        compare("forward", one(x, t, y), other(x, t, y))
        null = torch.cat([y, torch.full_like(y, 1000)])
        doubled = other.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), null, 4)
        compare(
            "three guided channels",
            ours.guided(one, 1000, 4.0, channels=3)(x, t, y, 0.5),
            doubled[:3],
        )
        theirs = create_diffusion("").training_losses(other, x, t, dict(y=y), noise=noise)
        diffusion = ours.GaussianDiffusion()
        noised = diffusion.add_noise(x, t, noise)
        mse, vb = diffusion.losses(one(noised, t, y), x, noised, t, noise)
        compare("mse", mse, theirs["mse"])
        compare("vb", vb, theirs["vb"])
        theirs, diffusion = create_diffusion("250"), ours.GaussianDiffusion(250)
        for k in (0, 1, 100, 249):
            i = torch.full((3,), k)
            output = one(x, torch.full((3,), int(diffusion.timesteps[k])), y)
            torch.manual_seed(k)
            drawn = torch.randn_like(x)
            torch.manual_seed(k)
            ddpm = theirs.p_sample(other, x, i, clip_denoised=False, model_kwargs=dict(y=y))[
                "sample"
            ]
            ddim = theirs.ddim_sample(other, x, i, clip_denoised=False, model_kwargs=dict(y=y))[
                "sample"
            ]
            compare("DDPM step", diffusion.step(output, x, i, drawn), ddpm)
            compare("DDIM step", diffusion.step(output, x, i, None), ddim)
    sizes = {}
    for name in ours.CONFIGS:
        if name in official.DiT_models:
            with torch.device("meta"):
                one = ours.DiT(**ours.CONFIGS[name])
                other = (
                    official.DiT(**dict(input_size=32, **ours.CONFIGS[name]))
                    if name != "DiT-XL/2"
                    else None
                )
            shapes = {key: tuple(p.shape) for key, p in one.state_dict().items()}
            sizes[name] = (len(shapes), sum(p.numel() for p in one.parameters()))
            assert other is None or shapes == {
                key: tuple(p.shape) for key, p in other.state_dict().items()
            }, name
    spaced = all(
        ours.GaussianDiffusion(n).timesteps.tolist() == sorted(space_timesteps(1000, [n]))
        for n in range(2, 1001)
    )
    return dict(
        largest_relative_difference=worst,
        keys_and_parameters=sizes,
        respacings_2_to_1000_equal=spaced,
    )


@torch.no_grad()
def golden(official, create_diffusion):
    """What the official code computes for a small network of formula()'s weights."""
    ours.CONFIGS["small"] = dict(
        hidden_size=48, depth=2, num_heads=4, patch_size=2, input_size=8, num_classes=10
    )
    _, other = pair(official, "small")
    x = torch.sin(torch.arange(3 * 4 * 8 * 8, dtype=torch.float64)).reshape(3, 4, 8, 8).float()
    noise, t, y = x.flip(0).roll(5, 3), torch.tensor([0, 500, 999]), torch.tensor([0, 7, 10])
    loss = create_diffusion("").training_losses(other, x, t, dict(y=y), noise=noise)
    short, i = create_diffusion("10"), torch.tensor([0, 4, 9])
    torch.randn_like = lambda x: noise
    wrapped = dict(clip_denoised=False, model_kwargs=dict(y=y))
    for what, values in dict(
        forward=other(x, t, y)[:, ::3, ::4, 1],
        mse=loss["mse"],
        vb=loss["vb"],
        ddpm=short.p_sample(other, x, i, **wrapped)["sample"][:, ::2, ::4, 1],
        ddim=short.ddim_sample(other, x, i, **wrapped)["sample"][:, ::2, ::4, 1],
    ).items():
        print(what, [round(value, 6) for value in values.flatten().tolist()])


def seconds(step, repeats, device):
    step()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def train_steps(official, create_diffusion, name, batch, device):
    """-> (our step, their step), closures of one training step each on the same latents."""
    x, t = (
        torch.randn(batch, 4, 32, 32, device=device),
        torch.randint(1000, (batch,), device=device),
    )
    y = torch.randint(1000, (batch,), device=device)

    def make(network, losses, move):
        ema = deepcopy(network).requires_grad_(False)
        optimizer = torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad],
            1e-4,
            weight_decay=0,
            **(dict(fused=True) if network.__module__ == "dit" else {}),
        )

        def step():
            losses(network).backward()
            optimizer.step()
            optimizer.zero_grad()
            move(ema, network)

        return step

    def our_losses(network):
        noise, diffusion = torch.randn_like(x), our_diffusion
        noised = diffusion.add_noise(x, t, noise)
        return sum(
            each.mean() for each in diffusion.losses(network(noised, t, y), x, noised, t, noise)
        )

    def our_ema(ema, network):
        with torch.no_grad():
            torch._foreach_lerp_(
                list(ema.state_dict().values()), list(network.state_dict().values()), 1e-4
            )

    def their_ema(ema, network):  # as train.py there: parameter by parameter
        with torch.no_grad():
            averages = OrderedDict(ema.named_parameters())
            for key, p in network.named_parameters():
                averages[key].mul_(0.9999).add_(p.data, alpha=1e-4)

    our_diffusion, their_diffusion = ours.GaussianDiffusion(device=device), create_diffusion("")
    one = ours.DiT(**ours.CONFIGS[name]).to(device)
    other = official.DiT_models[name]().to(device)
    return (
        make(one, our_losses, our_ema),
        make(
            other,
            lambda net: their_diffusion.training_losses(net, x, t, dict(y=y))["loss"].mean(),
            their_ema,
        ),
    )


def cache_speed(batch, images, device):
    """Images a second: the bare encoder on image and mirror, the filling of the cache, training online and cached."""
    with tempfile.TemporaryDirectory() as folder:
        data, rng = Path(folder, "data"), np.random.default_rng(0)
        data.mkdir()
        for k in range(images):
            Image.fromarray(rng.integers(0, 256, (300, 280, 3), dtype=np.uint8)).save(
                data / f"{k}.png"
            )
        model = vae.AutoencoderKL(**vae.CONFIGS["sd"])
        vae.save_checkpoint(
            f"{folder}/sd.pt",
            dict(
                arch="AutoencoderKL",
                config=model.config,
                model=model.state_dict(),
                ema=None,
                disc=None,
                step=0,
                args=dict(model="sd"),
                latent=dict(scale=0.18215, shift=0.0),
            ),
        )
        args = argparse.Namespace(
            vae=f"{folder}/sd.pt",
            vae_model=None,
            data=str(data),
            image_size=256,
            seed=0,
            no_mirror=False,
            cache=None,
            micro_batch=batch,
            workers=0,
        )
        model.to(device)
        x = torch.randn(batch, 3, 256, 256, device=device)
        with torch.no_grad():
            bare = batch / seconds(
                lambda: (model.encode(x), model.encode(x.flip(3))), images // batch, device
            )
        online, cached = ours.Latents(args, device), ours.Latents(args, device)
        started = time.perf_counter()
        cached.cache(args, 0, 1)
        filling = images / (time.perf_counter() - started)
        diffusion, network = (
            ours.GaussianDiffusion(device=device),
            ours.DiT(**ours.CONFIGS["DiT-B/2"]).to(device),
        )

        def step(latents):
            items = [latents[k, 0, k] for k in range(batch)]
            mean, std = latents.moments(torch.stack([item[0] for item in items])).chunk(2, dim=1)
            x0 = latents.autoencoder.normalize(mean + std * torch.randn_like(mean))
            t, noise = torch.randint(1000, (batch,), device=device), torch.randn_like(x0)
            noised = diffusion.add_noise(x0, t, noise)
            output = network(noised, t, torch.zeros_like(t))
            sum(each.mean() for each in diffusion.losses(output, x0, noised, t, noise)).backward()

        rates = {
            what: batch / seconds(lambda: step(latents), 2, device)
            for what, latents in (("online", online), ("cached", cached))
        }
    return dict(
        model="DiT-B/2 on SD-VAE's latents of 256 px",
        batch=batch,
        images=images,
        encoder_images_per_second=bare,
        filling_images_per_second=filling,
        filling_to_encoder=filling / bare,
        training_images_per_second=rates,
        cached_to_online=rates["cached"] / rates["online"],
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dit", required=True, help="folder of the official repository")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--part", choices=("parity", "training_step", "cache"), help="measure this alone anew"
    )
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--record")
    args = parser.parse_args()
    vae.load_lpips("random")  # mends torchvision beside a CPU torch, for timm
    sys.path.insert(0, args.dit)
    import models as official
    from diffusion import create_diffusion
    from diffusion.respace import space_timesteps

    if args.golden:
        return golden(official, create_diffusion)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {}
    if args.record and args.part and Path(args.record).exists():
        record = json.loads(Path(args.record).read_text())
    if args.part in (None, "parity"):
        record["parity"] = parity(official, create_diffusion, space_timesteps)
    for name in ("DiT-S/2", "DiT-B/2") if args.part in (None, "training_step") else ():
        steps = train_steps(official, create_diffusion, name, args.batch_size, device)
        times = np.array([[seconds(step, 1, device) for step in steps] for _ in range(args.rounds)])
        one, other = np.median(times, axis=0).tolist()
        record.setdefault("training_step", {})[name] = dict(
            seconds_ours=one,
            seconds_official=other,
            ratio=float(np.median(times[:, 0] / times[:, 1])),
            batch=args.batch_size,
            rounds=args.rounds,
            precision="fp32",
        )
    if args.part in (None, "cache"):
        record["cache"] = cache_speed(args.batch_size, 16, device)
    record["about"] = dict(
        command=sys.argv,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        date=time.strftime("%Y-%m-%d"),
    )
    print(json.dumps(record, indent=1))
    if args.record:
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
