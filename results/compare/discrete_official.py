"""vqgan.py and maskgit.py beside taming-transformers and Maskgit-pytorch v1.0: the same weights
give the same numbers.

    pip install einops omegaconf
    git clone https://github.com/CompVis/taming-transformers official/taming
    git clone https://github.com/valeoai/Maskgit-pytorch official/maskgit
    git -C official/maskgit checkout 674ef1d
    python results/compare/discrete_official.py --official official \\
        --record results/discrete_official.json

Every parameter is drawn anew. Compared are networks, codes, losses with their gradients, exported
files, masks, and whole decodings from the same uniform numbers; of codes and tokens it
counts how many differ. `--golden` prints the official numbers that test_all.py holds.
"""

import contextlib
import functools
import importlib
import sys
import tempfile
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import beside  # also puts our files on the path
import numpy as np
import torch
from beside import Differences, compare, formula

import maskgit
import vae
import vqgan

# Small networks for the tests: a VQ-GAN and a MaskGIT on its codes
SMALL = dict(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_levels=(2,))
SMALL |= dict(z_channels=8, embed_dim=8, n_embed=64)
TINY = dict(input_size=4, codebook_size=64, num_classes=10)
TINY |= dict(hidden_dim=48, depth=2, heads=4, mlp_dim=96)
BASE = dict(maskgit.CONFIGS["MaskGIT-B"], input_size=16, codebook_size=1024, num_classes=1000)
GAN_WEIGHT = 0.8  # of taming's imagenet_vqgan.yaml

official = SimpleNamespace()
waves = functools.partial(beside.waves, power=1.5)
cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.1)  # as in v1.0's trainer


class Squares(torch.nn.Module):
    """The squared error in LPIPS' place, whose weights are not needed here."""

    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


def load_official(root):
    """Imports the official code from the folders in `root`, without what it needs to train."""
    vae.import_lpips()  # mends torchvision beside a CPU torch
    sys.modules["pytorch_lightning"] = MagicMock(LightningModule=torch.nn.Module)
    sys.modules["webdataset"] = MagicMock()
    sys.modules["torch.utils.tensorboard"] = MagicMock()
    sys.modules["main"] = SimpleNamespace(instantiate_from_config=lambda make: make())
    sys.path[:0] = [str(root / "taming"), str(root / "maskgit")]
    official.vqgan = importlib.import_module("taming.models.vqgan")
    official.losses = importlib.import_module("taming.modules.losses.vqperceptual")
    official.losses.LPIPS = Squares
    trainer = importlib.import_module("Trainer.vit")
    trainer.tqdm = lambda counts, **_: counts
    official.MaskGIT = trainer.MaskGIT
    official.Transformer = trainer.MaskTransformer
    torch.cuda.amp.autocast = contextlib.nullcontext


# ==================================================================================================
# Pairs of networks


@torch.no_grad()
def redrawn(model):
    """formula()'s weights, scaled so that every part counts and a small network uses many codes or
    tokens."""
    formula(model)
    if isinstance(model, vqgan.VQGAN):
        model.encoder.norm_out.weight *= 20
        model.quant_conv.bias.zero_()
        model.quantize.embedding.weight *= 3
        return model
    for p in model.parameters():
        if p.dim() == 1:
            p *= 4
    model.pos_emb *= model.config["hidden_dim"] ** 0.5
    model.tok_emb.weight *= model.config["hidden_dim"] ** 0.5 / 4
    return model


def vq_pair(config, x=None):
    """(our VQ-GAN, taming's) with the same redrawn weights. Given images x, the codes lie near some
    of their features, so that many codes are used."""
    ours = redrawn(vqgan.VQGAN(**config))
    if x is not None:
        move_codes(ours, x)
    names = ("ch", "ch_mult", "num_res_blocks", "z_channels")
    network = {name: ours.config[name] for name in names}
    network |= dict(out_ch=3, double_z=False, resolution=256, in_channels=3, dropout=0.0)
    network["attn_resolutions"] = [256 // 2**level for level in ours.config["attn_levels"]]

    def make_loss():
        return official.losses.VQLPIPSWithDiscriminator(0, disc_weight=GAN_WEIGHT)

    size = (config["n_embed"], ours.config["embed_dim"])
    theirs = official.vqgan.VQModel(network, make_loss, *size).eval()
    left = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith("loss.") for name in left.missing_keys)
    formula(theirs.loss.discriminator).train()
    theirs.quantize.legacy = ours.config["legacy_beta"]
    theirs.global_step = 1
    theirs.log = theirs.log_dict = lambda *_, **__: None
    return ours, theirs


@torch.no_grad()
def move_codes(model, x):
    generator = torch.Generator().manual_seed(0)
    vectors = model.features(x).permute(0, 2, 3, 1).flatten(0, 2)  # (N, e)
    codes = model.quantize.embedding.weight
    noise = torch.randn(codes.shape, generator=generator) * vectors.std(dim=0)
    picked = torch.randint(len(vectors), (len(codes),), generator=generator)
    codes.copy_(vectors[picked] + 0.3 * noise)


def git_pair(**config):
    """(our MaskGIT, v1.0's) with the same redrawn weights, in eval mode."""
    ours = redrawn(maskgit.MaskGIT(**config))
    renamed = dict(f_factor=config.pop("input_size"), nclass=config.pop("num_classes"))
    theirs = official.Transformer(**renamed, **config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def autoencoder_parameters(network):
    """The parameters, by name, that taming's first optimiser has."""
    named = sorted(network.named_parameters())
    return {name: p for name, p in named if not name.startswith("loss.")}


# ==================================================================================================
# Parity


def parity():
    found = Differences()
    generator = torch.Generator().manual_seed(0)
    in_use = compare_vqgans(found, generator)
    compare_maskgits(found, generator)
    return found.record(codes_in_use=in_use)


def compare_vqgans(found, generator):
    """-> how many codes the images of each comparison take."""

    def images(n, size):
        return torch.randn(n, 3, size, size, generator=generator).clamp(-1, 1)

    configs = dict(vqgan.CONFIGS, small=dict(SMALL, n_embed=512))
    in_use = {}
    for name, n, size in (("f16-1024", 1, 256), ("f16-16384", 1, 256), ("small", 64, 32)):
        x = images(n, size)
        nets = vq_pair(configs[name], x)
        in_use[name] = compare_reconstructions(found, name, *nets, x)
    for name, legacy, size in (("small", True, 32), ("small", False, 32), ("f16-1024", True, 64)):
        x = images(2, size)
        nets = vq_pair(dict(configs[name], legacy_beta=legacy), x)
        discriminator = compare_steps(found, name, *nets, x)
    compare_files(found, *nets, discriminator, x)
    return in_use


@torch.no_grad()
def compare_reconstructions(found, name, ours, theirs, x):
    """-> how many codes the images take."""
    features = theirs.quant_conv(theirs.encoder(x))
    h = ours.features(x)
    found.add(f"{name}: features", h, features)
    picture, _ = theirs(x)
    indices = theirs.quantize(features)[2][2]
    found.add(f"{name}: indices", ours.encode(x), indices)
    same = ours.quantize.nearest(features)
    found.add(f"{name}: indices of the same features", same, indices)
    found.add(f"{name}: reconstructions", ours.decode(ours.quantize(h)[0]), picture)
    found.add(f"{name}: decoded tokens", ours.decode(ours.encode(x)), picture)
    return len(indices.unique())


def compare_steps(found, name, ours, theirs, x):
    """A step's gradients -> our discriminator, whose statistics the step has moved."""
    what = f"{name}: step"
    if not ours.config["legacy_beta"]:
        what += ", beta on the commitment"
    discriminator = formula(vae.PatchDiscriminator()).train()
    our_backward(ours, discriminator, x)
    mine = autoencoder_parameters(ours)

    batch = dict(image=x.permute(0, 2, 3, 1))
    parameters = autoencoder_parameters(theirs)
    loss = theirs.training_step(batch, 0, 0)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    loss = theirs.training_step(batch, 0, 1)
    at_discriminator = torch.autograd.grad(loss, list(theirs.loss.discriminator.parameters()))

    found.add(f"{what}, gradients", [p.grad for p in mine.values()], gradients)
    codebook = "quantize.embedding.weight"
    their_codebook = gradients[list(parameters).index(codebook)]
    found.add(f"{what}, codebook's gradients", mine[codebook].grad, their_codebook)
    our_gradients = [p.grad for p in discriminator.parameters()]
    found.add(f"{what}, discriminator's gradients", our_gradients, at_discriminator)
    statistics = [list(net.buffers()) for net in (discriminator, theirs.loss.discriminator)]
    found.add(f"{what}, running statistics", *statistics)
    return discriminator


def our_backward(model, discriminator, x):
    """A step as in vqgan.train(), with tau the identity, up to the gradients."""
    quantised, _, codebook_loss = model.quantize(model.features(x))
    reconstruction = model.decode(quantised)
    l1 = (x - reconstruction).abs().mean()
    rec_loss = l1 + Squares()(x, reconstruction).mean()
    g_loss = -discriminator(reconstruction).mean()
    d_loss = vae.hinge_loss(discriminator(x), discriminator(reconstruction.detach()))
    d_loss.backward()
    last_layer = model.decoder.conv_out.weight
    gradient, _ = vae.loss_gradient(
        rec_loss, g_loss, reconstruction, last_layer, GAN_WEIGHT, gan_acts=True
    )
    vae.backward_from(reconstruction, gradient, codebook_loss, share=1)


@torch.no_grad()
def compare_files(found, ours, theirs, discriminator, x):
    """From here to taming and to v1.0's folder, and back. Files load strictly there, but for
    taming's losses in v1.0, which has none."""
    code = theirs.encode(x)[2][2]
    picture, _ = theirs(x)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = dict(arch="VQGAN", config=ours.config, model=ours.state_dict(), ema=None)
        checkpoint |= dict(disc=discriminator.state_dict(), step=0, args={}, latent=None)
        torch.save(checkpoint, f"{folder}/ours.pt")
        exported = f"{folder}/exported"
        vqgan.export(SimpleNamespace(init=f"{folder}/ours.pt", model=None, export=exported))

        args = SimpleNamespace(vqgan_folder=exported, device="cpu")
        args.is_multi_gpus = args.is_master = False
        copy = official.MaskGIT.get_network(SimpleNamespace(args=args), "autoencoder")
        weights = torch.load(f"{exported}/ckpts/last.ckpt", weights_only=True)["state_dict"]
        network = {key: p for key, p in weights.items() if not key.startswith("loss.")}
        copy.load_state_dict(network)
        found.add("exported to v1.0", copy(x)[0], picture)
        decoded = copy.decode_code(code.view(len(x), 4, -1))
        found.add("exported to v1.0, from codes", decoded, picture)
        theirs.load_state_dict(weights)
        found.add("exported to taming", theirs(x)[0], picture)

        file = f"{folder}/taming.ckpt"
        weights["loss.perceptual_loss.lin0.model.1.weight"] = torch.ones(1)
        torch.save(dict(state_dict=weights, callbacks={}, epoch=3, global_step=7), file)
        back = vqgan.load_vqgan(file)
        vae.load_weights(vae.PatchDiscriminator(), vqgan.read_vqgan(file).disc, file)
        found.add("taming's file here, indices", back.encode(x), code)
        found.add("taming's file here", back.decode(back.encode(x)), picture)


# --------------------------------------------------------------------------------------------------
# MaskGIT


def compare_maskgits(found, generator):
    # Steps, w, scale of the softmax, temperature of the choice
    plain = (8, 3.0, 1.0, 4.5)
    several = (plain, (8, 0.0, 1.0, 4.5), (15, 2.8, 1.0, 7.0), (32, 9.0, 1.3, 7.0))
    cases = (
        ("tiny", 16, TINY, (plain, (6, 0.0, 1.0, 4.5))),
        ("base", 2, BASE, (plain,)),
        ("base of 2 blocks", 4, dict(BASE, depth=2), several),
    )
    for name, n, config, runs in cases:
        nets = git_pair(**config)
        places = config["input_size"] ** 2
        tokens = torch.randint(config["codebook_size"], (n, places), generator=generator)
        labels = torch.randint(config["num_classes"], (n,), generator=generator)
        r = torch.rand(n, 1 + places, generator=generator)
        masked = compare_masks(found, name, nets[0], tokens, r)
        compare_logits(found, name, *nets, tokens, masked, labels)
        for run in runs:
            uniform = torch.rand(n, run[0], 2, places, generator=generator)
            compare_decodings(found, name, *nets, labels, uniform, run)


def compare_masks(found, name, model, tokens, r):
    """-> the tokens, masked with arccos."""
    side = model.config["input_size"]
    k = model.config["codebook_size"]
    square = (len(tokens), side, side)
    for schedule in ("cosine", "arccos"):
        ratio, _ = maskgit.MASK_SCHEDULES[schedule]
        mask = r[:, 1:] < ratio(r[:, :1])
        masked = tokens.masked_fill(mask, k)
        draws = iter((r[:, 0], r[:, 1:].view(square)))
        with patch("torch.rand", lambda *_, draws=draws, **__: next(draws)):
            theirs, their_mask = official.MaskGIT.get_mask_code(tokens.view(square), schedule, k)
        found.add(f"{name}: {schedule} mask", mask, their_mask)
        found.add(f"{name}: masked tokens", masked, theirs)
    return masked


def compare_logits(found, name, ours, theirs, tokens, masked, labels):
    side = ours.config["input_size"]
    square = masked.view(len(masked), side, side)
    images = torch.arange(len(labels))
    for dropped in (images < 0, images >= 0, images % 2 == 0):  # no label, all, half
        given = labels.masked_fill(dropped, ours.config["num_classes"])
        with torch.no_grad():
            logits = ours(masked, given)
            found.add(f"{name}: logits", logits, theirs(square, labels, drop_label=dropped))
    logits = ours(masked, given)
    their_logits = theirs(square, labels, drop_label=dropped)
    loss = maskgit.token_losses(logits, tokens).mean()
    their_loss = cross_entropy(their_logits.flatten(0, 1), tokens.flatten())
    found.add(f"{name}: loss", loss, their_loss)
    gradients = [gradients_of(loss, ours), gradients_of(their_loss, theirs)]
    found.add(f"{name}: gradients", *gradients)


def gradients_of(loss, network):
    return torch.autograd.grad(loss, [p for _, p in sorted(network.named_parameters())])


def compare_decodings(found, name, ours, theirs, labels, uniform, run):
    steps, w, scale, temperature = run
    counts, ramps = maskgit.decoding_schedule(steps, uniform.shape[3])
    tokens = maskgit.parallel_decoding(
        ours,
        labels,
        uniform,
        counts,
        ramps,
        cfg_scale=1 + w,
        choice_temperature=temperature,
        softmax_scale=scale,
    )
    options = dict(sm_temp=scale, r_temp=temperature)
    their_tokens = official_decoding(theirs, labels, uniform, steps, w, **options)
    found.add(f"{name}: {steps} steps of decoding, w {w:g}", tokens, their_tokens)


def official_decoding(network, labels, uniform, steps, w, **options):
    """v1.0's sample() -> tokens (B, N), with two changes: its draws are made from `uniform` by the
    inverse of the distribution, and the mask's logit is taken away."""
    mask = network.codebook_size
    draws = iter(uniform[:, :, 0, :, None].unbind(1))
    noises = iter(uniform[:, :, 1].unbind(1))

    def categorical(probs):
        def draw():
            return (probs.cumsum(-1) <= next(draws)).sum(-1).clamp(max=mask - 1)

        return SimpleNamespace(sample=draw)

    def gumbel(size):
        return -np.log(-np.log(next(noises).double().clamp(min=1e-20).numpy()))

    trainer = SimpleNamespace(
        vit=network,
        args=SimpleNamespace(device="cpu", mask_value=mask),
        codebook_size=mask,
        patch_size=network.patch_size,
        ae=SimpleNamespace(decode_code=lambda code: code),
    )
    trainer.adap_sche = lambda step, mode: official.MaskGIT.adap_sche(trainer, step, mode)
    bias = network.bias.data.clone()
    network.bias.data[:, mask] = -1e9
    with (
        patch("torch.distributions.Categorical", categorical),
        patch("numpy.random.gumbel", gumbel),
    ):
        tokens, _, _ = official.MaskGIT.sample(
            trainer, None, len(labels), labels, w=w, step=steps, **options
        )
    network.bias.data.copy_(bias)
    network.eval()
    return tokens.flatten(1)


# ==================================================================================================
# Golden numbers


@torch.no_grad()
def golden():
    """What the official codes compute for small networks of redrawn()'s weights."""
    found = {}
    x = waves(1, 2, 3, 16, 16)
    _, network = vq_pair(SMALL)
    h = network.quant_conv(network.encoder(x))
    picture, _ = network(x)
    indices = network.quantize(h)[2][2].view(2, 16)
    for legacy in (True, False):  # the two losses differ by their gradients alone
        network.quantize.legacy = legacy
        with torch.enable_grad():
            loss = network.quantize(h)[1]
            (gradient,) = torch.autograd.grad(loss, network.quantize.embedding.weight)
        found[f"codebook_{legacy}"] = torch.stack([loss, gradient.norm()])
    found["features"] = h[:, ::2, ::2, 1]
    found["indices"] = indices
    found["reconstruction"] = picture[:, :, ::5, 3]
    for n in (8, 12):
        found[f"counts_{n}"] = official.MaskGIT.adap_sche(SimpleNamespace(patch_size=16), n)

    _, network = git_pair(**TINY)
    masked = indices.masked_fill(waves(2, 2, 16) < 0, 64)
    labels = torch.tensor([3, 0])
    is_dropped = torch.tensor([False, True])
    logits = network(masked.view(2, 4, 4), labels, drop_label=is_dropped)
    found["logits"] = logits[:, ::5, ::16]
    found["loss"] = cross_entropy(logits.flatten(0, 1), indices.flatten())
    uniform = waves(3, 2, 6, 2, 16) / 2 + 0.5
    found["tokens"] = official_decoding(network, labels, uniform, 6, 2.0)
    return found


if __name__ == "__main__":
    compare(__doc__, load_official, parity, "discrete", golden)
