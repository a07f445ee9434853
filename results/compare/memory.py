"""The memory that a training step needs, counted from the tensors that autograd keeps.

    python results/compare/memory.py --record results/memory.json

Networks and batches are fake tensors, which have shapes and no numbers, so this takes seconds and
no memory. For each trainer it counts what one image adds, all that is kept for the backward pass
under bf16 autocast, and what stands still: weights, gradients, both Adam moments and the average,
in float32. A GPU needs somewhat more, for the libraries' work space and for what lives only for a
moment.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dit  # noqa: E402
import maskgit  # noqa: E402
import repa  # noqa: E402
import vae  # noqa: E402
import vqgan  # noqa: E402

GIB = 2**30


def kept_bytes(forward, parameters):
    """Bytes of the storages that autograd keeps for forward()'s backward pass, weights aside."""
    known = {p.untyped_storage()._cdata for p in parameters}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage  # kept, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del loss
    return total


def standing_bytes(networks, average):
    """Weights, gradients and Adam's two moments, and the average of the first network's weights."""
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    return 4 * (4 * sum(sizes) + (sizes[0] if average else 0))


def autoencoder_step(model, encode, perceptual, discriminator, images):
    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction, regularizer = encode(images)
        loss = (images - reconstruction).abs().mean() + regularizer
        loss = loss + perceptual(images, reconstruction).mean()
        with torch.autocast("cpu", torch.bfloat16):
            fake = discriminator(reconstruction)
        return loss - fake.float().mean()

    return forward


def measure_autoencoder(model, encode, batch):
    perceptual = vae.load_lpips("random")
    discriminator = vae.PatchDiscriminator()
    images = torch.zeros(batch, 3, 256, 256)
    parameters = [*model.parameters(), *discriminator.parameters(), *perceptual.parameters()]
    forward = autoencoder_step(model, encode, perceptual, discriminator, images)
    return kept_bytes(forward, parameters), standing_bytes([model, discriminator], False)


def measure_generator(model, inputs, average):
    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*inputs)
        return output.float().square().mean()

    return kept_bytes(forward, list(model.parameters())), standing_bytes([model], average)


def cases():
    """(name, batch -> (bytes kept, bytes standing)) of each trainer at 256 px."""

    def kl(batch):
        model = vae.AutoencoderKL(**vae.CONFIGS["sd"])

        def encode(x):
            posterior = model.encode(x)
            return model.decode(posterior.mean + posterior.std), posterior.kl().mean()

        return measure_autoencoder(model, encode, batch)

    def vq(batch):
        model = vqgan.VQGAN(**vqgan.CONFIGS["f16-1024"])

        def encode(x):
            quantised, _, loss = model.quantize(model.features(x))
            return model.decode(quantised), loss

        return measure_autoencoder(model, encode, batch)

    def latents(network, config):
        def measure(batch):
            model = network(**config)
            x = torch.zeros(batch, 4, 32, 32)
            t = torch.zeros(batch)
            y = torch.zeros(batch, dtype=torch.long)
            return measure_generator(model, (x, t, y), average=True)

        return measure

    transformer = maskgit.MaskGIT()  # its initialisation needs numbers

    def tokens(batch):
        inputs = torch.zeros(batch, 256, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        return measure_generator(transformer, inputs, average=False)

    yield "vae.py sd, LPIPS, GAN", kl
    yield "vqgan.py f16-1024, LPIPS, GAN", vq
    yield "dit.py DiT-B/2", latents(dit.DiT, dit.CONFIGS["DiT-B/2"])
    yield "dit.py DiT-XL/2", latents(dit.DiT, dit.CONFIGS["DiT-XL/2"])
    yield "repa.py REPA-XL/2", latents(repa.REPA, repa.CONFIGS["REPA-XL/2"])
    yield "maskgit.py MaskGIT-B", tokens


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", help="JSON file to write")
    args = parser.parse_args()
    rows = {}
    print("| trainer | GiB an image | GiB standing | images on 24 GB | 40 GB | 80 GB |")
    print("|---|---|---|---|---|---|")
    for name, measure in cases():
        with FakeTensorMode(allow_non_fake_inputs=True):
            one, standing = measure(1)
            two, _ = measure(2)
        image = (two - one) / GIB
        standing = standing / GIB
        fits = [int((0.9 * gigabytes * 1e9 / GIB - standing) / image) for gigabytes in (24, 40, 80)]
        rows[name] = dict(gib_an_image=round(image, 3), gib_standing=round(standing, 2), fits=fits)
        print(f"| {name} | {image:.2f} | {standing:.1f} | {fits[0]} | {fits[1]} | {fits[2]} |")
    if args.record:
        about = dict(
            command="python results/compare/memory.py",
            how="counted with fake tensors, bf16 autocast; 90 % of a card is counted as usable",
            torch=torch.__version__,
            date=time.strftime("%Y-%m-%d"),
        )
        text = json.dumps(dict(rows, about=about), indent=1) + "\n"
        Path(args.record).write_text(text)


if __name__ == "__main__":
    main()
