"""Whitens the latents of a KL autoencoder across their channels; its pictures stay the same: search.md's third part.

    python results/small/whiten.py SOURCE.pt DATA SIZE TARGET.pt

ZCA over all of DATA: a linear map and its inverse go into the two 1x1 convolutions. The posterior's std becomes a
constant of each channel, the mean one. Prints the principal channels' std as they were, and checks itself: it tells
how far the new covariance is from the identity, and pictures from what they were.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2]))
from vae import Images, InputError, evenly, load, load_autoencoder, measure_latents, save_checkpoint


@torch.no_grad()
def whiten(source, data, size, target):
    checkpoint, model, images = load(source), load_autoencoder(source), Images(data, (size, size))
    first = next(evenly(images, 16, "cpu"))
    before = model.decode(model.encode(first).mean)

    def channels():  # means, variances (c, N h w)
        posteriors = [model.encode(x) for x in evenly(images, len(images), "cpu")]
        both = [(posterior.mean, posterior.std.square()) for posterior in posteriors]
        return (torch.cat(part).double().transpose(0, 1).flatten(1) for part in zip(*both))

    z, variances = channels()
    values, vectors = torch.linalg.eigh(z.cov())
    whitening, inverse = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
    c, mean, moments, latents = len(z), z.mean(dim=1), model.quant_conv, model.post_quant_conv
    weight, bias = moments.weight[:c].squeeze().double(), moments.bias[:c].double()
    moments.weight[:c] = (whitening @ weight)[..., None, None]
    moments.bias[:c] = whitening @ (bias - mean)
    moments.weight[c:], moments.bias[c:] = 0, (whitening.square() @ variances.mean(dim=1)).log()
    latents.bias += latents.weight.squeeze().double() @ mean  # before the weight changes
    latents.weight.copy_((latents.weight.squeeze().double() @ inverse)[..., None, None])
    checkpoint |= dict(
        model=model.state_dict(), ema=None, opt=None, latent=measure_latents(model, images)
    )
    save_checkpoint(target, checkpoint)
    moved = (model.decode(model.encode(first).mean) - before).abs().max()
    off = (next(channels()).cov() - torch.eye(c)).abs().max()
    print("std", *(f"{value:.3g}" for value in values.flip(0).sqrt().tolist()))
    print(f"covariance within {off:.1g}, pictures within {moved:.1g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, kind in (("source", str), ("data", str), ("size", int), ("target", str)):
        parser.add_argument(name, type=kind)
    try:
        whiten(**vars(parser.parse_args()))
    except InputError as error:
        parser.error(str(error))
