"""The memory that a training step needs on a GPU, counted from the tensors that autograd keeps.

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
from beside import about, parser_of, write_record  # also puts our files on the path
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
    total = {}
    for batch in (1, 2):
        with as_on_a_gpu():
            forward, trained, frozen, average = case(batch)
            total[batch] = kept_bytes(forward, [*trained, *frozen])
    image = total[2] - total[1]
    copies = total[1] - image  # what does not grow with the batch
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


def kl_encode(model, x):
    posterior = model.encode(x)
    return model.decode(posterior.mean + posterior.std), posterior.kl().mean()


def vq_encode(model, x):
    quantised, _, codebook_loss = model.quantize(model.features(x))
    return model.decode(quantised), codebook_loss


def autoencoder(network, config, encode, pixels=256, checkpointed=False):
    """The forward passes of a training step of vae.py or vqgan.py, all of which are kept when the
    discriminator's backward pass begins."""

    def case(batch):
        model = network(**config)
        vae.checkpoint_activations(model, checkpointed)
        discriminator = vae.PatchDiscriminator()
        perceptual = vae.load_lpips("random")
        images = torch.zeros(batch, 3, pixels, pixels)
        autocast = torch.autocast("cpu", torch.bfloat16)

        def forward():
            with autocast:
                reconstruction, regularizer = encode(model, images)
            l1 = (images - reconstruction).abs().mean()
            rec_loss = l1 + perceptual(images, reconstruction).mean()
            with autocast:
                g_loss = -discriminator(reconstruction).float().mean()
                real = discriminator(images).float()
                fake = discriminator(reconstruction.detach()).float()
            return rec_loss, g_loss, vae.hinge_loss(real, fake), reconstruction, regularizer

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
VQ = (vqgan.VQGAN, vqgan.CONFIGS["f16-1024"], vq_encode)
CASES = {
    "vae.py sd, LPIPS, GAN": autoencoder(*SD),
    "vae.py sd, LPIPS, GAN, --checkpoint-activations": autoencoder(*SD, checkpointed=True),
    "vae.py sd, LPIPS, GAN, 512 px": autoencoder(*SD, 512),
    "vae.py sd, LPIPS, GAN, 512 px, --checkpoint-activations": autoencoder(*SD, 512, True),
    "vqgan.py f16-1024, LPIPS, GAN": autoencoder(*VQ),
    "dit.py DiT-B/2": flow_or_diffusion(dit.DiT, dit.CONFIGS["DiT-B/2"]),
    "dit.py DiT-XL/2": flow_or_diffusion(dit.DiT, dit.CONFIGS["DiT-XL/2"]),
    "repa.py REPA-XL/2": flow_or_diffusion(repa.REPA, repa.CONFIGS["REPA-XL/2"]),
    "maskgit.py MaskGIT-B": masked_tokens,
}


def main():
    args = parser_of(__doc__).parse_args()
    rows = {name: count(case) for name, case in CASES.items()}
    how = "256 px unless it says otherwise, bf16 autocast; 90 % of a card is counted as usable"
    write_record(args.record, memory=dict(rows, how=how, about=about()))


if __name__ == "__main__":
    main()
