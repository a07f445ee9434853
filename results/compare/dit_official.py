"""dit.py beside the official DiT code: the same weights give the same numbers; speed.

    git clone https://github.com/facebookresearch/DiT official/DiT
    pip install timm
    python results/compare/dit_official.py --official official --record results/dit_official.json

Parity draws every parameter anew, since a new DiT is the zero function. It compares the forward
pass, guidance, the terms of the loss, steps of DDPM and DDIM, and all respacings. `--golden` prints
the official numbers that test_all.py holds. Training steps (forward, loss, backward, AdamW, average
of the weights) are taken in turns, on the same latents and in fp32. What the cache of latents gains
is told by dit.py's own --bench, with and without --no-cache.
"""

import sys
from types import SimpleNamespace

import torch
from beside import (  # also puts our files on the path
    CPU,
    Differences,
    about,
    best_device,
    compare_with_official,
    formula,  # noqa: F401  test_all.py takes it from here
    in_turns,
    make_parser,
    official_step,
    our_step,
    print_golden,
    same_weights,
    waves,
)

import dit
import vae

official = SimpleNamespace()


def load_official(root):
    """Imports the official code from the folder in `root`."""
    vae.import_lpips()  # mends torchvision beside a CPU torch, for timm
    sys.path.insert(0, str(root / "DiT"))
    import diffusion
    import models

    official.DiT = models.DiT
    official.DiT_models = models.DiT_models
    official.create_diffusion = diffusion.create_diffusion
    official.space_timesteps = diffusion.space_timesteps


def pair(**config):
    """(our DiT, the official one) with the same redrawn weights."""
    return same_weights(dit.DiT(**config), official.DiT(**config))


# ==================================================================================================
# Parity


@torch.no_grad()
def parity(args):
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
        about=about(CPU, ("torch", "timm")),
    )


def compare_network(found, ours, theirs, x, t, y):
    found.add("forward", ours(x, t, y), theirs(x, t, y))
    null = torch.full_like(y, 1000)
    doubled = theirs.forward_with_cfg(
        torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), cfg_scale=4
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
    x = waves(1, 3, 4, 8, 8)
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


def training_step(args):
    device = best_device()
    record = {}
    for name in ("DiT-S/2", "DiT-B/2"):
        x0 = torch.randn(args.batch_size, 4, 32, 32, device=device)
        t = torch.randint(1000, (args.batch_size,), device=device)
        y = torch.randint(1000, (args.batch_size,), device=device)
        steps = steps_of(name, x0, t, y)
        record[name] = in_turns(*steps, args.rounds, device)
        record[name] |= dict(batch=args.batch_size, precision="fp32")
    return record | dict(about=about(device, ("torch", "timm")))


def steps_of(name, x0, t, y):
    """-> two functions that take a step each, from the latents on: ours and the official one."""
    network = dit.DiT(**dit.CONFIGS[name]).to(x0.device)
    diffusion = dit.GaussianDiffusion(device=x0.device)
    their_network = official.DiT_models[name]().to(x0.device)
    their_diffusion = official.create_diffusion("")

    def loss():
        noise = torch.randn_like(x0)
        x = diffusion.add_noise(x0, t, noise)
        mse, vb = diffusion.losses(network(x, t, y), x0, x, t, noise)
        return mse.mean() + vb.mean()

    def their_loss():
        return their_diffusion.training_losses(their_network, x0, t, dict(y=y))["loss"].mean()

    options = dict(weight_decay=0)
    return our_step(network, loss, **options), official_step(their_network, their_loss, **options)


def main():
    parts = dict(parity=parity, training_step=training_step)
    parser = make_parser(__doc__, parts, rounds=9)
    parser.add_argument("--batch-size", type=int, default=4)
    compare_with_official(parser, load_official, parts, golden)


if __name__ == "__main__":
    main()
