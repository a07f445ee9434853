"""The memory that a training step needs on a GPU, counted from the tensors that autograd keeps; and
the time that --checkpoint-activations costs.

    python results/compare/memory.py --record results/memory.json

Networks and batches are fake tensors, which have shapes and no numbers, so counting takes a minute
and no memory. For each trainer it counts what one image adds, all that is kept for the backward
pass under bf16 autocast, and what is fixed: weights, gradients, both Adam moments and the average
in float32, and autocast's bf16 copies of the weights. A tenth of the card is left free, for frozen
networks (LPIPS, a generator's autoencoder), the libraries' work space, and what lives only for a
moment.

The tensors are a CPU's, with which autograd keeps other things in three places. There they are made
as a GPU's (as_on_a_gpu()). With --checkpoint-activations a block is computed again after LPIPS and
the discriminator have given back what they kept, which is more than a block needs.
"""

import contextlib
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from beside import CPU, about, in_turns, make_parser, measure  # also puts our files on the path
from torch._subclasses.fake_tensor import FakeTensorMode

import dit
import maskgit
import repa
import vae
import vqgan

GIB = 2**30
CARDS = (12, 16, 24, 40, 80)  # GB, of 1e9 bytes


# ==================================================================================================
# Counting


@contextlib.contextmanager
def as_on_a_gpu():
    """Networks are built and called as fake tensors, for which autograd keeps what it keeps on a
    GPU: of dropout a mask of bytes, of layer norms an input in float32, and of attention neither
    its matrix nor the mask of its dropout, which fused kernels draw again."""
    attention = F.scaled_dot_product_attention
    layer_norm = F.layer_norm

    def fused_attention(q, k, v, *rest, dropout_p=0.0, **options):
        return attention(q, k, v)

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, training)[0]

    def layer_norm_in_float32(x, *rest, **options):
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), *rest, **options)

    with (
        patch.object(F, "scaled_dot_product_attention", fused_attention),
        patch.object(F, "dropout", dropout),
        patch.object(F, "layer_norm", layer_norm_in_float32),
        patch.object(nn.init, "trunc_normal_", lambda p, **_: p),  # needs numbers
        FakeTensorMode(),
    ):
        yield


def kept_bytes(forward, networks):
    """Bytes of the storages that autograd keeps for the backward pass of what forward() returns,
    the networks' parameters aside."""
    known = set()
    for network in networks:
        known |= {p.untyped_storage()._cdata for p in network.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage  # kept, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del losses
    return total


def parameters_of(networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def count(case):
    """-> GiB that an image adds, GiB that are fixed, and how many images fit each of CARDS.

    case  batch -> (forward, networks that are trained, frozen networks, whether there is an average
          of the first one's weights)
    """
    kept = {}
    for batch in (1, 2):
        with as_on_a_gpu():
            forward, trained, frozen, average = case(batch)
            kept[batch] = kept_bytes(forward, [*trained, *frozen])
    image = kept[2] - kept[1]
    copies = kept[1] - image  # what does not grow with the batch
    fixed = 16 * parameters_of(trained) + copies
    if average:
        fixed += 4 * parameters_of(trained[:1])
    fits = {}
    for gigabytes in CARDS:
        fits[f"{gigabytes} GB"] = max(0, int((0.9e9 * gigabytes - fixed) / image))
    return dict(
        gib_an_image=round(image / GIB, 3),
        gib_fixed=round(fixed / GIB, 2),
        gib_of_bf16_copies=round(copies / GIB, 2),
        images=fits,
    )


# ==================================================================================================
# The trainers


def autoencoder_losses(encode, perceptual, discriminator, images, bf16=True):
    """The forward passes of a training step of vae.py or vqgan.py, all of which are kept when the
    discriminator's backward pass begins."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with autocast:
        reconstruction, regularizer = encode(images)
    rec_loss = (images - reconstruction).abs().mean() + perceptual(images, reconstruction).mean()
    with autocast:
        g_loss = -discriminator(reconstruction).float().mean()
        real = discriminator(images).float()
        fake = discriminator(reconstruction.detach()).float()
    return rec_loss, g_loss, vae.hinge_loss(real, fake), reconstruction, regularizer


def kl_encode(model):
    def encode(x):
        posterior = model.encode(x)
        return model.decode(posterior.mean + posterior.std), posterior.kl().mean()

    return encode


def vq_encode(model):
    def encode(x):
        quantised, _, loss = model.quantize(model.features(x))
        return model.decode(quantised), loss

    return encode


def autoencoder(network, config, make_encode, pixels, checkpointed=False):
    def case(batch):
        model = network(**config)
        vae.checkpoint_activations(model, checkpointed)
        discriminator = vae.PatchDiscriminator()
        perceptual = vae.load_lpips("random")
        images = torch.zeros(batch, 3, pixels, pixels)

        def forward():
            return autoencoder_losses(make_encode(model), perceptual, discriminator, images)

        return forward, [model, discriminator], [perceptual], False

    return case


def flow_or_diffusion(network, config):
    def case(batch):
        model = network(**config)
        x = torch.zeros(batch, 4, 32, 32)
        t = torch.zeros(batch)
        y = torch.zeros(batch, dtype=torch.long)

        def forward():
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x, t, y)
            return output.square().mean()

        return forward, [model], [], True

    return case


def masked_tokens(batch):
    model = maskgit.MaskGIT()
    tokens = torch.zeros(batch, 256, dtype=torch.long)
    labels = torch.zeros(batch, dtype=torch.long)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens, labels)
        return maskgit.token_losses(logits, tokens).mean()

    return forward, [model], [], False


SD = (vae.AutoencoderKL, vae.CONFIGS["sd"], kl_encode)
CASES = {
    "vae.py sd, LPIPS, GAN": autoencoder(*SD, 256),
    "vae.py sd, LPIPS, GAN, --checkpoint-activations": autoencoder(*SD, 256, True),
    "vae.py sd, LPIPS, GAN, 512 px": autoencoder(*SD, 512),
    "vae.py sd, LPIPS, GAN, 512 px, --checkpoint-activations": autoencoder(*SD, 512, True),
    "vqgan.py f16-1024, LPIPS, GAN": autoencoder(
        vqgan.VQGAN, vqgan.CONFIGS["f16-1024"], vq_encode, 256
    ),
    "dit.py DiT-B/2": flow_or_diffusion(dit.DiT, dit.CONFIGS["DiT-B/2"]),
    "dit.py DiT-XL/2": flow_or_diffusion(dit.DiT, dit.CONFIGS["DiT-XL/2"]),
    "repa.py REPA-XL/2": flow_or_diffusion(repa.REPA, repa.CONFIGS["REPA-XL/2"]),
    "maskgit.py MaskGIT-B": masked_tokens,
}


def memory(args):
    rows = {}
    print("| trainer | GiB an image | GiB fixed |", " | ".join(f"{n} GB" for n in CARDS), "|")
    print("|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        row = count(case)
        rows[name] = row
        images = " | ".join(str(n or "-") for n in row["images"].values())
        print(f"| {name} | {row['gib_an_image']:.2f} | {row['gib_fixed']:.1f} | {images} |")
    how = "256 px unless it says otherwise, bf16 autocast; 90 % of a card is counted as usable"
    return dict(rows, how=how, about=about(CPU))


# ==================================================================================================
# Time


def checkpointing_time(args, pixels=64, batch=2):
    """Seconds of forward and backward passes of sd on small pictures, with and without. (Of a small
    network most of the time would be LPIPS' and the discriminator's.)"""
    torch.manual_seed(0)
    images = torch.rand(batch, 3, pixels, pixels) * 2 - 1
    perceptual = vae.load_lpips("random")
    bf16 = vae.has_bf16_units(CPU)

    def step_of(checkpointed):
        model = vae.AutoencoderKL(**vae.CONFIGS["sd"])
        vae.checkpoint_activations(model, checkpointed)
        discriminator = vae.PatchDiscriminator()

        def step():
            rec_loss, g_loss, d_loss, reconstruction, regularizer = autoencoder_losses(
                kl_encode(model), perceptual, discriminator, images, bf16
            )
            d_loss.backward()
            gradient, _ = vae.loss_gradient(
                rec_loss, g_loss, reconstruction, model.decoder.conv_out.weight, 0.5, gan_acts=True
            )
            vae.backward_from(reconstruction, gradient, regularizer, 1)

        return step

    times = in_turns(step_of(True), step_of(False), args.rounds, CPU)
    return dict(
        seconds_with=times["seconds_ours"],
        seconds_without=times["seconds_official"],
        ratio=times["ratio"],
        rounds=args.rounds,
        model="sd, LPIPS, GAN",
        pixels=pixels,
        batch=batch,
        precision="bf16" if bf16 else "fp32",
        about=about(CPU),
    )


def main():
    parts = dict(memory=memory, checkpointing_time=checkpointing_time)
    measure(make_parser(__doc__, parts, rounds=9).parse_args(), parts)


if __name__ == "__main__":
    main()
