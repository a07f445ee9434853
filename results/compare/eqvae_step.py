"""Times one training step (generator and discriminator) of vae.py beside the released EQ-VAE code, on one device.

    git clone https://github.com/zelaki/eqvae && git clone https://github.com/CompVis/taming-transformers
    pip install einops
    python results/compare/eqvae_step.py --eqvae eqvae --taming taming-transformers --record results/eqvae_step.json

Both train the full-size SD-VAE (84M) with L1, LPIPS on a VGG16 with random weights, KL and the hinge GAN, under
one and the same tau. The released procedure runs the autoencoder twice, once per optimiser; its Lightning shell is
replaced here by the two lines it amounts to, and it runs in fp32. vae.py is measured as users run it, `--bench`, in the
precision it picks by itself and in fp32.
"""

import argparse
import json
import platform
import random
import sys
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import vae  # noqa: E402
from eqloss import Transform  # noqa: E402


def ours(args, tau, precision):
    """-> mean seconds a step over the last twenty of vae.py --bench's thirty, and the precision it ran in."""
    records, precisions = [], []
    vae.sample_transform = lambda *_, **__: tau
    vae.Meter.write = lambda meter, record: (
        precisions.append(meter.args.precision) or records.append(record)
    )
    sys.argv = [
        "vae.py",
        "--bench",
        "--data",
        "emoji",
        "--init",
        "scratch",
        "--vgg",
        "random",
        "--disc-start",
        "0",
        "--precision",
        precision,
        "--image-size",
        str(args.image_size),
        "--batch-size",
        str(args.batch_size),
    ]
    vae.main()
    return sum(record["seconds"] for record in records[1:]) / 20, precisions[0]


def released(args, scale, turns):
    """Mean seconds over the last ten of thirteen steps of the released autoencoder.py, its draws set to this tau."""
    lightning = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = torch.nn.Module
    sys.modules.setdefault("pytorch_lightning", lightning)
    sys.path[:0] = [str(Path(args.eqvae, "train_eqvae")), str(Path(args.taming))]
    vae.load_lpips("random")  # mends torchvision where it is built for another torch
    import taming.modules.losses.lpips as lpips
    import torchvision

    lpips.LPIPS.load_from_pretrained = lambda self, name="vgg_lpips": None
    vgg16 = torchvision.models.vgg16
    lpips.models.vgg16 = lambda **_: vgg16(weights=None)
    from ldm.models.autoencoder import AutoencoderKL

    loss = dict(
        target="ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
        params=dict(disc_start=0, kl_weight=1e-6, disc_weight=0.5),
    )
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = AutoencoderKL(
        network, loss, embed_dim=4, p_prior=float(scale is not None), p_prior_s=0.0
    ).to(device)
    model.global_step, model.learning_rate = 1, 4.5e-5
    model.log = model.log_dict = lambda *_, **__: None
    optimizers, _ = model.configure_optimizers()
    answers = [scale, turns]
    random.choice = lambda options: answers[len(options) == 3]
    batch = {
        "image": torch.randn(args.batch_size, args.image_size, args.image_size, 3)
        .clamp(-1, 1)
        .to(device)
    }
    networks = [
        [p for name, p in model.named_parameters() if not name.startswith("loss.")],
        list(model.loss.discriminator.parameters()),
    ]
    seconds = []
    for _ in range(13):
        start = time.time()
        for i, optimizer in enumerate(
            optimizers
        ):  # Lightning's optimizer_idx, the other's parameters off
            for j in (0, 1):
                for p in networks[j]:
                    p.requires_grad_(i == j)
            optimizer.zero_grad()
            model.training_step(batch, 0, i).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.time() - start)
    return sum(seconds[3:]) / 10


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--eqvae", required=True, help="checkout of zelaki/eqvae")
    parser.add_argument("--taming", required=True, help="checkout of CompVis/taming-transformers")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--record")
    args = parser.parse_args()
    command = " ".join(["results/compare/eqvae_step.py", *sys.argv[1:]])
    grid = (args.image_size // 8,) * 2
    size = grid[0] // 2
    eq, identity = Transform(grid, (size, size), 1, "bilinear"), Transform(grid, grid)
    record = dict(eq_released=released(args, 0.5, 1), standard_released=released(args, None, None))
    for choice in ("auto", "fp32"):
        (seconds_eq, precision), (seconds_standard, _) = (
            ours(args, tau, choice) for tau in (eq, identity)
        )
        record |= {
            f"eq_{precision}": seconds_eq,
            f"standard_{precision}": seconds_standard,
            f"eq_{precision}_to_released": seconds_eq / record["eq_released"],
            f"standard_{precision}_to_released": seconds_standard / record["standard_released"],
            f"eq_to_standard_{precision}": seconds_eq / seconds_standard,
        }
    record["about"] = dict(
        command=command,
        unit="seconds a step",
        image_size=args.image_size,
        torch=torch.__version__,
        batch_size=args.batch_size,
        tau="scale 0.5, 90 degrees",
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        date=time.strftime("%Y-%m-%d"),
    )
    print(json.dumps(record, indent=1))
    if args.record:
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
