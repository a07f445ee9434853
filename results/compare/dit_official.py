"""dit.py beside the official DiT code: the same weights give the same numbers.

    git clone https://github.com/facebookresearch/DiT official/DiT
    pip install timm
    python results/compare/dit_official.py --official official --record results/dit_official.json

Every parameter is drawn anew, since a new DiT is the zero function. Compared are the forward pass,
guidance, the terms of the loss, steps of DDPM and DDIM, and all respacings. `--golden` prints the
official numbers that test_all.py holds.
"""

import sys
from types import SimpleNamespace

import torch
from beside import Differences, compare, same_weights, waves  # also puts our files on the path

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
        compare_network(found, "forward", *nets, x, t, y)
        compare_losses(found, *nets, x, noise, t, y)
        compare_steps(found, *nets, x, y)
    return found.record(
        keys_and_parameters=compare_shapes(), respacings_2_to_1000_equal=compare_respacings()
    )


def compare_network(found, what, ours, theirs, x, t, y):
    """Forward passes, guided or not. flow_official.py compares SiT with it, too."""
    found.add(what, ours(x, t, y), theirs(x, t, y))
    null = torch.full_like(y, 1000)
    doubled = theirs.forward_with_cfg(
        torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), cfg_scale=4
    )
    guided = dit.guided(ours, 1000, 4.0, channels=3)
    found.add(f"{what}, three channels guided", guided(x, t, y, 0.5), doubled[:3])


def compare_losses(found, ours, theirs, latents, noise, t, y):
    diffusion = dit.GaussianDiffusion()
    x = diffusion.add_noise(latents, t, noise)
    mse, vb = diffusion.losses(ours(x, t, y), latents, x, t, noise)
    their_diffusion = official.create_diffusion("")
    terms = their_diffusion.training_losses(theirs, latents, t, dict(y=y), noise=noise)
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
    for name in sorted(set(official.DiT_models).intersection(dit.CONFIGS)):
        with torch.device("meta"):
            ours = dit.DiT(**dit.CONFIGS[name]).state_dict()
            theirs = official.DiT_models[name]().state_dict()
        shapes = {key: tuple(p.shape) for key, p in ours.items()}
        assert shapes == {key: tuple(p.shape) for key, p in theirs.items()}, name
        sizes[name] = (len(ours), sum(p.numel() for p in ours.values()))
    return sizes


def compare_respacings():
    for n in range(2, 1001):
        timesteps = dit.GaussianDiffusion(n).timesteps.tolist()
        if timesteps != sorted(official.space_timesteps(1000, [n])):
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
    return dict(
        forward=network(x, t, y)[:, ::3, ::4, 1],
        mse=loss["mse"],
        vb=loss["vb"],
        ddpm=diffusion.p_sample(network, x, i, **options)["sample"][:, ::2, ::4, 1],
        ddim=diffusion.ddim_sample(network, x, i, **options)["sample"][:, ::2, ::4, 1],
    )


if __name__ == "__main__":
    compare(__doc__, load_official, parity, "dit", golden, packages=("torch", "timm"))
