"""A training step of vae.py (autoencoder and discriminator) beside the released EQ-VAE code: speed.

    git clone https://github.com/zelaki/eqvae official/eqvae
    git clone https://github.com/CompVis/taming-transformers official/taming
    pip install einops
    python results/compare/eqvae_step.py --official official --record results/eqvae_step.json

Both train the full-size SD-VAE (84M) with L1, LPIPS on a VGG16 with random weights, KL and the
hinge GAN, under one and the same tau: "eq" is the scale 0.5 with a quarter turn, "standard" the
identity. The released procedure runs the autoencoder twice, once for each optimiser. Its Lightning
shell is replaced here by the lines that it amounts to, and it runs in fp32.

vae.py trains as its users run it, in the precision that it picks by itself and in fp32. Before each
of its steps the released procedure takes one, so both meet the same machine.
"""

import random
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from beside import (  # also puts our files on the path
    about,
    best_device,
    compare_with_official,
    compared_times,
    make_parser,
    now,
)
from PIL import Image

import vae
from eqloss import Transform, identity_transform

STEPS = 20
WARM_UP = 3  # steps before these, which are not counted


def compare(args, name):
    """-> {precision: times of both}."""
    device = best_device()
    grid = (args.image_size // 8, args.image_size // 8)
    tau = identity_transform(grid)
    scale = None
    if name == "eq":
        scale = 0.5
        tau = Transform(grid, (grid[0] // 2, grid[1] // 2), 1, "bilinear")
    chosen = "bf16" if vae.has_bf16_units(device) else "fp32"
    record = {}
    for precision in sorted({chosen, "fp32"}):
        released = released_step(args, scale, device)
        record[precision] = compared_times(times_in_turns(args, tau, precision, released, device))
    size = dict(image_size=args.image_size, batch=args.batch_size)
    return record | size | dict(about=about(device))


def times_in_turns(args, tau, precision, released, device):
    """-> seconds (STEPS, 2) of vae.py's steps and of the released procedure's."""
    moments = []  # when our step ends, the released one ends, our step ends, ...
    step_rngs = vae.step_rngs

    def released_step_first(seed, step, device):
        """In the place of vae.step_rngs(), with which each of our steps begins."""
        moments.append(now(device))
        released()
        moments.append(now(device))
        return step_rngs(seed, step, device)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(vae, "benchmark", short_run),
        patch.object(vae, "step_rngs", released_step_first),
        patch.object(vae, "draw_transforms", lambda *_: (identity_transform(tau.grid), tau, None)),
        patch.object(sys, "argv", command(args, folder, precision)),
    ):
        vae.main()
    ours = np.array(moments[2::2]) - np.array(moments[1:-1:2])
    theirs = np.array(moments[1::2]) - np.array(moments[0::2])
    return np.stack([ours, theirs[:-1]], axis=1)[WARM_UP:]


def short_run(args, rank, world, device, run):
    """In the place of vae.benchmark(), which counts FLOP, too: just the steps, writing nothing."""
    args.sample_every = 0
    args.save_every = 2**31
    args.log_every = 10
    args.steps = WARM_UP + STEPS + 1  # the last one's end is not seen
    run(args, rank, world, device)


def command(args, folder, precision):
    rng = np.random.default_rng(0)
    for k in range(8):
        pixels = rng.integers(0, 256, (args.image_size, args.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder, f"{k}.png"))
    words = ["vae.py", "--bench", "--data", folder, "--init", "scratch", "--vgg", "random"]
    words += ["--disc-start", "0", "--precision", precision]
    words += ["--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]
    return words


# ==================================================================================================
# The released procedure


def load_released(official):
    """Imports the released code and taming's, and gives its LPIPS random weights."""
    lightning = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = torch.nn.Module
    sys.modules.setdefault("pytorch_lightning", lightning)
    sys.path[:0] = [str(official / "eqvae/train_eqvae"), str(official / "taming")]
    vae.import_lpips()  # mends torchvision where it is built for another torch
    import taming.modules.losses.lpips as lpips
    import torchvision

    vgg16 = torchvision.models.vgg16
    lpips.LPIPS.load_from_pretrained = lambda self, name="vgg_lpips": None
    lpips.models.vgg16 = lambda **_: vgg16(weights=None)


def released_step(args, scale, device):
    """-> a function that takes a step of the released autoencoder.py, with the draws of its tau set
    to this scale and one quarter turn, or to the identity where the scale is None."""
    model = released_model(scale, device)
    optimizers, _ = model.configure_optimizers()
    autoencoder = [p for name, p in model.named_parameters() if not name.startswith("loss.")]
    parts = (autoencoder, list(model.loss.discriminator.parameters()))
    x = torch.randn(args.batch_size, args.image_size, args.image_size, 3).clamp(-1, 1)
    batch = dict(image=x.to(device))

    def choose(options):
        if len(options) == 3:
            return 1  # quarter turns
        return scale

    def step():
        for i, optimizer in enumerate(optimizers):  # Lightning's optimizer_idx
            for j, part in enumerate(parts):  # and its toggling of the other's parameters
                for p in part:
                    p.requires_grad_(i == j)
            optimizer.zero_grad()
            with patch.object(random, "choice", choose):
                loss = model.training_step(batch, 0, i)
            loss.backward()
            optimizer.step()

    return step


def released_model(scale, device):
    from ldm.models.autoencoder import AutoencoderKL

    network = dict(
        double_z=True,
        z_channels=4,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_resolutions=[],
        dropout=0.0,
    )
    loss = dict(
        target="ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
        params=dict(disc_start=0, kl_weight=1e-6, disc_weight=0.5),
    )
    p_transformed = 0.0 if scale is None else 1.0
    model = AutoencoderKL(network, loss, embed_dim=4, p_prior=p_transformed, p_prior_s=0.0)
    model.global_step = 1
    model.learning_rate = 4.5e-5
    model.log = model.log_dict = lambda *_, **__: None
    return model.to(device)


def main():
    parts = dict(
        eq=lambda args: compare(args, "eq"),
        standard=lambda args: compare(args, "standard"),
    )
    parser = make_parser(__doc__, parts)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    compare_with_official(parser, load_released, parts)


if __name__ == "__main__":
    main()
