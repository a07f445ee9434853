"""dit.py beside the official DiT code: the same weights give the same numbers; speed.

    git clone https://github.com/facebookresearch/DiT
    pip install timm
    python results/compare/dit_official.py --dit DiT --record results/dit_official.json

Parity draws every parameter anew, since a new DiT is the zero function. It compares the forward
pass, guidance, the terms of the loss, steps of DDPM and DDIM, and all respacings. `--golden` prints
the official numbers that test_all.py holds. Training steps (forward, loss, backward, AdamW, average
of the weights) are taken in turns, on the same latents and in fp32. The cache is timed beside the
bare encoder that fills it, and training from it beside training that encodes with SD-VAE.
"""

import argparse
import itertools
import sys
import tempfile
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from beside import (  # also puts our files on the path
    Differences,
    about,
    best_device,
    formula,
    in_turns,
    measure,
    now,
    print_golden,
    seconds,
)
from PIL import Image

import dit
import vae

official = SimpleNamespace()


def load_official(root):
    """Imports the official code from a folder."""
    vae.import_lpips()  # mends torchvision beside a CPU torch, for timm
    sys.path.insert(0, str(root))
    import diffusion
    import models

    official.DiT = models.DiT
    official.DiT_models = models.DiT_models
    official.create_diffusion = diffusion.create_diffusion
    official.space_timesteps = diffusion.space_timesteps


def pair(**config):
    """(our DiT, the official one) with the same redrawn weights."""
    ours = formula(dit.DiT(**config))
    theirs = official.DiT(**config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


# ==================================================================================================
# Parity


@torch.no_grad()
def parity():
    found = Differences()
    generator = torch.Generator().manual_seed(0)
    for name in ("DiT-S/2", "DiT-B/2", "DiT-B/1", "DiT-XL/2"):
        config = dict(dit.CONFIGS[name], depth=2, input_size=16)
        found.add("positions", dit.DiT(**config).pos_embed, official.DiT(**config).pos_embed)
        nets = pair(**config)
        x, noise = torch.randn(2, 3, 4, 16, 16, generator=generator)
        t = torch.tensor([0, 500, 999])
        y = torch.tensor([0, 7, 1000])
        compare_network(found, *nets, x, t, y)
        compare_losses(found, *nets, x, noise, t, y)
        compare_steps(found, *nets, x, y)
    return dict(
        largest_relative_difference=found.largest,
        keys_and_parameters=compare_shapes(),
        respacings_2_to_1000_equal=compare_respacings(),
        about=about(torch.device("cpu"), ("torch", "timm")),
    )


def compare_network(found, ours, theirs, x, t, y):
    found.add("forward", ours(x, t, y), theirs(x, t, y))
    doubled = theirs.forward_with_cfg(
        torch.cat([x, x]),
        torch.cat([t, t]),
        torch.cat([y, torch.full_like(y, 1000)]),
        4,
    )
    guided = dit.guided(ours, 1000, 4.0, channels=3)
    found.add("three guided channels", guided(x, t, y, 0.5), doubled[:3])


def compare_losses(found, ours, theirs, x0, noise, t, y):
    diffusion = dit.GaussianDiffusion()
    x = diffusion.add_noise(x0, t, noise)
    mse, vb = diffusion.losses(ours(x, t, y), x0, x, t, noise)
    terms = official.create_diffusion("").training_losses(theirs, x0, t, dict(y=y), noise=noise)
    found.add("mse", mse, terms["mse"])
    found.add("vb", vb, terms["vb"])


def compare_steps(found, ours, theirs, x, y):
    diffusion = dit.GaussianDiffusion(250)
    their_diffusion = official.create_diffusion("250")
    options = dict(clip_denoised=False, model_kwargs=dict(y=y))
    for k in (0, 1, 100, 249):
        i = torch.full((3,), k)
        t = torch.full((3,), int(diffusion.timesteps[k]))
        output = ours(x, t, y)
        torch.manual_seed(k)
        noise = torch.randn_like(x)
        torch.manual_seed(k)  # they draw the same
        ddpm = their_diffusion.p_sample(theirs, x, i, **options)["sample"]
        ddim = their_diffusion.ddim_sample(theirs, x, i, **options)["sample"]
        found.add("DDPM step", diffusion.step(output, x, i, noise), ddpm)
        found.add("DDIM step", diffusion.step(output, x, i, None), ddim)


def compare_shapes():
    """-> name: (keys, parameters) of all models, whose shapes are the official ones."""
    sizes = {}
    for name, config in dit.CONFIGS.items():
        if name not in official.DiT_models:
            continue
        with torch.device("meta"):
            ours = dit.DiT(**config)
            theirs = official.DiT_models[name]()
        shapes = shapes_of(ours)
        assert shapes == shapes_of(theirs), name
        sizes[name] = (len(shapes), sum(p.numel() for p in ours.parameters()))
    return sizes


def shapes_of(network):
    return {name: tuple(p.shape) for name, p in network.state_dict().items()}


def compare_respacings():
    for n in range(2, 1001):
        kept = dit.GaussianDiffusion(n).timesteps.tolist()
        if kept != sorted(official.space_timesteps(1000, [n])):
            return False
    return True


@torch.no_grad()
def golden():
    """What the official code computes for a small network of formula()'s weights."""
    size = dict(hidden_size=48, depth=2, num_heads=4, patch_size=2, input_size=8, num_classes=10)
    _, network = pair(**size)
    x = torch.sin(torch.arange(3 * 4 * 8 * 8, dtype=torch.float64)).reshape(3, 4, 8, 8).float()
    noise = x.flip(0).roll(5, 3)
    t = torch.tensor([0, 500, 999])
    y = torch.tensor([0, 7, 10])
    loss = official.create_diffusion("").training_losses(network, x, t, dict(y=y), noise=noise)
    diffusion = official.create_diffusion("10")
    i = torch.tensor([0, 4, 9])
    options = dict(clip_denoised=False, model_kwargs=dict(y=y))
    torch.randn_like = lambda x: noise
    found = dict(
        forward=network(x, t, y)[:, ::3, ::4, 1],
        mse=loss["mse"],
        vb=loss["vb"],
        ddpm=diffusion.p_sample(network, x, i, **options)["sample"][:, ::2, ::4, 1],
        ddim=diffusion.ddim_sample(network, x, i, **options)["sample"][:, ::2, ::4, 1],
    )
    print_golden("dit", found)


# ==================================================================================================
# A training step


def training_step(args, device):
    record = {}
    for name in ("DiT-S/2", "DiT-B/2"):
        x0 = torch.randn(args.batch_size, 4, 32, 32, device=device)
        t = torch.randint(1000, (args.batch_size,), device=device)
        y = torch.randint(1000, (args.batch_size,), device=device)
        steps = [make(name, x0, t, y) for make in (our_step, official_step)]
        record[name] = in_turns(*steps, args.rounds, device)
        record[name] |= dict(batch=args.batch_size, precision="fp32")
    record["about"] = about(device, ("torch", "timm"))
    return record


def our_step(name, x0, t, y):
    """-> a function that takes a step as dit.train() does, from the latents on."""
    network = dit.DiT(**dit.CONFIGS[name]).to(x0.device)
    parameters = vae.trainable_parameters(network)
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0, fused=True)
    ema = vae.start_average(network, 0.9999, None, x0.device)
    diffusion = dit.GaussianDiffusion(device=x0.device)
    numbers = itertools.count()

    def step():
        noise = torch.randn_like(x0)
        x = diffusion.add_noise(x0, t, noise)
        mse, vb = diffusion.losses(network(x, t, y), x0, x, t, noise)
        (mse.mean() + vb.mean()).backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad()
        vae.update_average(ema, network, 0.9999, next(numbers))

    return step


def official_step(name, x0, t, y):
    """-> a function that takes a step as the official train.py does, from the latents on."""
    network = official.DiT_models[name]().to(x0.device)
    ema = deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, weight_decay=0)
    diffusion = official.create_diffusion("")

    def step():
        loss = diffusion.training_losses(network, x0, t, dict(y=y))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_official_average(ema, network)

    return step


@torch.no_grad()
def update_official_average(ema, network):
    """As their update_ema(), parameter by parameter."""
    averages = OrderedDict(ema.named_parameters())
    for name, p in network.named_parameters():
        averages[name].mul_(0.9999).add_(p.data, alpha=1e-4)


# ==================================================================================================
# The cache of latents


def cache(args, device, images=16):
    """Images a second: the bare encoder on images and mirror images, the filling of the cache, and
    training with and without it."""
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder, "data"), images)
        write_autoencoder(Path(folder, "sd.pt"))
        parser, *_ = dit.arguments(__doc__, dit.CONFIGS, "dit.pt")
        words = ["--vae", f"{folder}/sd.pt", "--data", f"{folder}/data", "--workers", "0"]
        options = parser.parse_args([*words, "--micro-batch", str(args.batch_size)])
        autoencoder, where = dit.load_latent_space(options, None, device)
        pictures = vae.ImageFolder(options.data, autoencoder.image_size, mirror=True)

        encoder = encoder_speed(autoencoder, pictures, args.batch_size, device)
        started = now(device)
        latents = dit.latent_data(options, 0, 1, device, autoencoder, where, pictures)
        filling = images / (now(device) - started)
        online = training_speed(pictures, autoencoder, args.batch_size, device)
        cached = training_speed(latents, autoencoder, args.batch_size, device)
    return dict(
        model="DiT-B/2 on SD-VAE's latents of 256 px",
        batch=args.batch_size,
        images=images,
        encoder_images_per_second=encoder,
        filling_images_per_second=filling,
        filling_to_encoder=filling / encoder,
        training_images_per_second=dict(online=online, cached=cached),
        cached_to_online=cached / online,
        about=about(device),
    )


def write_pictures(folder, n):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(n):
        pixels = rng.integers(0, 256, (300, 280, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")


def write_autoencoder(path):
    """A checkpoint of SD-VAE with new weights."""
    model = vae.AutoencoderKL(**vae.CONFIGS["sd"])
    checkpoint = dict(arch="AutoencoderKL", config=model.config, model=model.state_dict())
    checkpoint |= dict(ema=None, disc=None, step=0, args={}, latent=dict(scale=0.18215, shift=0.0))
    vae.save_checkpoint(path, checkpoint)


@torch.no_grad()
def encoder_speed(autoencoder, pictures, batch, device):
    x = torch.stack([pictures[k][0] for k in range(batch)])
    x = vae.to_float(x, device)

    def encode():
        autoencoder.encode(x)
        autoencoder.encode(x.flip(3))

    times = [seconds(encode, device) for _ in range(1 + len(pictures) // batch)]
    return batch / np.mean(times[1:])  # the first warms up


def training_speed(data, autoencoder, batch, device):
    network = dit.DiT(**dit.CONFIGS["DiT-B/2"]).to(device)
    diffusion = dit.GaussianDiffusion(device=device)

    def step():
        latents = torch.stack([data[0, k][0] for k in range(batch)])
        mean, std = dit.moments(latents, autoencoder, device)
        x0 = autoencoder.normalize(mean + std * torch.randn_like(mean))
        t = torch.randint(1000, (batch,), device=device)
        noise = torch.randn_like(x0)
        x = diffusion.add_noise(x0, t, noise)
        mse, vb = diffusion.losses(network(x, t, torch.zeros_like(t)), x0, x, t, noise)
        (mse.mean() + vb.mean()).backward()

    times = [seconds(step, device) for _ in range(3)]
    return batch / np.mean(times[1:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dit", required=True, help="folder of the official repository")
    parser.add_argument("--parts", default="parity,training_step,cache")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--golden", action="store_true", help="print the official numbers")
    parser.add_argument("--record", help="parts of it that are not measured stay")
    args = parser.parse_args()
    load_official(args.dit)
    if args.golden:
        golden()
        return
    device = best_device()
    parts = dict(
        parity=parity,
        training_step=lambda: training_step(args, device),
        cache=lambda: cache(args, device),
    )
    measure(args, parts)


if __name__ == "__main__":
    main()
