"""vqgan.py and maskgit.py beside taming-transformers and Maskgit-pytorch v1.0: the same weights give the same numbers.

    pip install einops omegaconf && git clone https://github.com/CompVis/taming-transformers official/taming
    git clone https://github.com/valeoai/Maskgit-pytorch official/maskgit && git -C official/maskgit checkout 674ef1d
    python results/compare/discrete_official.py --official official --record results/discrete_official.json

Parity redraws every parameter and compares, on the CPU, networks, codes, losses with gradients, exported files, masks,
schedules and whole decodings from the same uniform numbers: the largest difference relative to the largest value, and
of codes and tokens how many differ. `--golden` prints the official numbers that test_all.py holds. Speed takes training
steps, tokenising and decoding in turns, from the same weights, in fp32.
"""

import argparse
import contextlib
import importlib
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from dit_official import formula, seconds  # also puts our files on the path

import maskgit
import vae
import vqgan

SMALL = dict(
    ch=32,
    ch_mult=(1, 2, 2),
    num_res_blocks=1,
    attn_levels=(2,),
    z_channels=8,
    embed_dim=8,
    n_embed=64,
)
TINY = dict(
    input_size=4, codebook_size=64, num_classes=10, hidden_dim=48, depth=2, heads=4, mlp_dim=96
)
BASE = dict(maskgit.CONFIGS["MaskGIT-B"], input_size=16, codebook_size=1024, num_classes=1000)
CRITERION = torch.nn.CrossEntropyLoss(label_smoothing=0.1)  # as in v1.0's __init__
official, worst, counted = SimpleNamespace(), {}, {}


def load_official(root):
    class Squares(torch.nn.Module):  # in LPIPS' place, whose weights are not needed here
        def forward(self, x, y):
            return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)

    vae.load_lpips("random")  # mends torchvision beside a CPU torch
    sys.modules.update(
        {
            "pytorch_lightning": MagicMock(LightningModule=torch.nn.Module),
            "webdataset": MagicMock(),
            "torch.utils.tensorboard": MagicMock(),
            "main": SimpleNamespace(instantiate_from_config=lambda make: make()),
        }
    )
    sys.path[:0] = [str(root / "taming"), str(root / "maskgit")]
    official.vqgan = importlib.import_module("taming.models.vqgan")
    official.losses = importlib.import_module("taming.modules.losses.vqperceptual")
    official.losses.LPIPS = official.Squares = Squares
    official.maskgit = importlib.import_module("Trainer.vit")
    official.maskgit.tqdm = lambda counts, **_: counts
    official.MaskGIT, official.Transformer = (
        official.maskgit.MaskGIT,
        official.maskgit.MaskTransformer,
    )
    torch.cuda.amp.autocast = contextlib.nullcontext


def waves(k, *shape):
    return (
        torch.sin(k * torch.arange(math.prod(shape), dtype=torch.float64) ** 1.5)
        .reshape(shape)
        .float()
    )


@torch.no_grad()
def redrawn(model):
    """formula()'s weights, scaled so that no part is without weight and a small network uses many codes or tokens."""
    formula(model)
    if isinstance(model, vqgan.VQGAN):
        model.encoder.norm_out.weight *= 20
        model.quant_conv.bias.zero_()
        model.quantize.embedding.weight *= 3
        return model
    for p in model.parameters():
        p *= 4 if p.dim() == 1 else 1
    model.pos_emb *= model.config["hidden_dim"] ** 0.5
    model.tok_emb.weight *= model.config["hidden_dim"] ** 0.5 / 4
    return model


def vq_pair(config, x=None):
    """(ours, taming's) with the same redrawn weights; given images, each code lies near one of their features."""
    one, generator = redrawn(vqgan.VQGAN(**config)), torch.Generator().manual_seed(0)
    if x is not None:
        with torch.no_grad():
            vectors, codes = (
                one.features(x).permute(0, 2, 3, 1).flatten(0, 2),
                one.quantize.embedding.weight,
            )
            noise = torch.randn(codes.shape, generator=generator) * vectors.std(dim=0)
            codes.copy_(
                vectors[torch.randint(len(vectors), (len(codes),), generator=generator)]
                + 0.3 * noise
            )
    network = dict(
        {name: one.config[name] for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")},
        out_ch=3,
        attn_resolutions=[256 // 2**i for i in one.config["attn_levels"]],
        double_z=False,
        resolution=256,
        in_channels=3,
        dropout=0.0,
    )
    other = official.vqgan.VQModel(
        network,
        lambda: official.losses.VQLPIPSWithDiscriminator(0, disc_weight=0.8),
        config["n_embed"],
        one.config["embed_dim"],
    ).eval()
    left = other.load_state_dict(one.state_dict(), strict=False)
    assert not left.unexpected_keys and all(key.startswith("loss.") for key in left.missing_keys)
    other.discriminator = [
        formula(other.loss.discriminator).train()
    ]  # in a list: no module of its own
    other.quantize.legacy, other.global_step = one.config["legacy_beta"], 1
    other.log = other.log_dict = lambda *_, **__: None
    return one, other


def git_pair(**config):
    """(ours, v1.0's) MaskGIT with the same redrawn weights, in eval mode."""
    one = redrawn(maskgit.MaskGIT(**config))
    other = official.Transformer(
        f_factor=config.pop("input_size"), nclass=config.pop("num_classes"), **config
    )
    other.load_state_dict(one.state_dict())
    return one, other.eval()


def flat(tensors):
    return torch.cat([t.flatten() for t in ([tensors] if torch.is_tensor(tensors) else tensors)])


def compare(what, a, b):
    a, b = flat(a), flat(b)
    if b.is_floating_point():
        worst[what] = max(worst.get(what, 0.0), float((a - b).abs().max() / b.abs().max()))
    else:
        before = counted.get(what, dict(differing=0, of=0))
        counted[what] = dict(
            differing=before["differing"] + int((a != b).sum()), of=before["of"] + len(b)
        )


def autoencoders(net):
    """The parameters, by name, that taming's first optimiser has."""
    return {name: p for name, p in sorted(net.named_parameters()) if not name.startswith("loss.")}


def our_backward(one, discriminator, x):
    """vqgan.py's training step, with tau the identity, up to the gradients."""
    run = SimpleNamespace(
        args=SimpleNamespace(lpips_weight=1.0, gan_weight=0.8, disc_start=0),
        step=1,
        model=one,
        perceptual=official.Squares(),
        discriminator=discriminator,
        discriminate=discriminator,
        accumulate=1,
        meter=MagicMock(),
        reduction="mean",
    )
    quantised, _, codebook = one.quantize(one.features(x))
    reconstruction = one.decode(quantised)
    vae.Tuning.backward(
        run, *vae.Tuning.criterion(run, x, reconstruction), codebook, x, reconstruction
    )


def vq_parity(generator):
    def images(n, size):
        return torch.randn(n, 3, size, size, generator=generator).clamp(-1, 1)

    configs, in_use = dict(vqgan.CONFIGS, small=dict(SMALL, n_embed=512)), {}
    for name, x in (
        ("f16-1024", images(1, 256)),
        ("f16-16384", images(1, 256)),
        ("small", images(64, 32)),
    ):
        one, other = vq_pair(configs[name], x)
        with torch.no_grad():
            h, theirs = one.features(x), other.quant_conv(other.encoder(x))
            compare(f"{name}: features", h, theirs)
            (picture, _), indices = other(x), other.quantize(theirs)[2][2]
            compare(f"{name}: indices", one.encode(x), indices)
            compare(f"{name}: indices of the same features", one.quantize.nearest(theirs), indices)
            compare(f"{name}: reconstructions", one.decode(one.quantize(h)[0]), picture)
            compare(f"{name}: decoded tokens", one.decode(one.encode(x)), picture)
        in_use[name] = len(indices.unique())
        for legacy in (True, False):
            one.quantize.legacy_beta = other.quantize.legacy = legacy
            results = []
            for net, k in ((one, 2), (other, 1)):
                leaf = theirs.clone().requires_grad_()
                output = net.quantize(leaf)
                results.append(
                    [
                        output[0],
                        *torch.autograd.grad((output[0] * theirs.cos()).sum(), leaf),
                        output[k],
                        *torch.autograd.grad(output[k], [leaf, net.quantize.embedding.weight]),
                    ]
                )
            whats = (
                "codes",
                "straight-through gradients",
                "loss",
                "gradients, features",
                "gradients, codebook",
            )
            for what, a, b in zip(whats, *results):
                compare(
                    f"{name}: quantiser's {what}{'' if legacy else ', beta on the commitment'}",
                    a,
                    b,
                )
    for name, legacy, size in (("small", True, 32), ("small", False, 32), ("f16-1024", True, 64)):
        x, what = images(2, size), f"{name}: step{'' if legacy else ', beta on the commitment'}"
        one, other = vq_pair(dict(configs[name], legacy_beta=legacy), x)
        our_backward(one, discriminator := formula(vae.PatchDiscriminator()).train(), x)
        (theirs,), batch, mine = (
            other.discriminator,
            dict(image=x.permute(0, 2, 3, 1)),
            autoencoders(one),
        )
        gradients = [
            torch.autograd.grad(other.training_step(batch, 0, i), list(p))
            for i, p in enumerate((autoencoders(other).values(), theirs.parameters()))
        ]
        compare(f"{what}, gradients", [p.grad for p in mine.values()], gradients[0])
        compare(
            f"{what}, codebook's gradients",
            mine["quantize.embedding.weight"].grad,
            gradients[0][list(mine).index("quantize.embedding.weight")],
        )
        compare(
            f"{what}, discriminator's gradients",
            [p.grad for p in discriminator.parameters()],
            gradients[1],
        )
        compare(f"{what}, running statistics", discriminator.buffers(), theirs.buffers())
    files(one, other, discriminator, x)
    return in_use


@torch.no_grad()
def files(one, other, discriminator, x):
    """From here to taming and to v1.0's folder, and back; strictly, but for taming's losses in v1.0, which has none."""
    code, (picture, _) = other.encode(x)[2][2], other(x)
    with tempfile.TemporaryDirectory() as folder:
        vae.save_checkpoint(
            ours := f"{folder}/ours.pt",
            dict(
                arch="VQGAN",
                config=one.config,
                model=one.state_dict(),
                disc=discriminator.state_dict(),
                ema=None,
            ),
        )
        vqgan.export(SimpleNamespace(init=ours, model=None, export=f"{folder}/exported"))
        args = SimpleNamespace(
            vqgan_folder=f"{folder}/exported", device="cpu", is_multi_gpus=False, is_master=False
        )
        copy = official.MaskGIT.get_network(SimpleNamespace(args=args), "autoencoder")
        state = torch.load(f"{folder}/exported/ckpts/last.ckpt", weights_only=True)["state_dict"]
        copy.load_state_dict(
            {key: value for key, value in state.items() if not key.startswith("loss.")}
        )
        compare("exported to v1.0", copy(x)[0], picture)
        compare("exported to v1.0, from codes", copy.decode_code(code.view(len(x), 4, -1)), picture)
        other.load_state_dict(state)
        compare("exported to taming", other(x)[0], picture)
        state["loss.perceptual_loss.lin0.model.1.weight"] = torch.ones(1)
        torch.save(
            dict(state_dict=state, callbacks={}, epoch=3, global_step=7),
            file := f"{folder}/taming.ckpt",
        )
        back = vqgan.load_vqgan(file)
        vae.load_weights(vae.PatchDiscriminator(), vqgan.read_vqgan(file)[2], file)
        compare("taming's file here, indices", back.encode(x), code)
        compare("taming's file here", back.decode(back.encode(x)), picture)


def their_decoding(other, labels, uniform, steps, w, **options):
    """v1.0's sample(), its draws made from `uniform` by the inverse CDF, without the mask's logit -> tokens (B, N)."""
    draws, noises = (iter(part.unbind(1)) for part in (uniform[:, :, 0, :, None], uniform[:, :, 1]))
    mask, kept = other.codebook_size, other.bias.data.clone()
    me = SimpleNamespace(
        vit=other,
        args=SimpleNamespace(device="cpu", mask_value=mask),
        codebook_size=mask,
        patch_size=other.patch_size,
        ae=SimpleNamespace(decode_code=lambda code: code),
    )
    me.adap_sche = lambda step, mode: official.MaskGIT.adap_sche(me, step, mode)
    categorical = lambda probs: SimpleNamespace(  # noqa: E731
        sample=lambda: (probs.cumsum(-1) <= next(draws)).sum(-1).clamp(max=mask - 1)
    )
    gumbel = lambda size: -np.log(-np.log(next(noises).double().clamp(min=1e-20).numpy()))  # noqa: E731
    other.bias.data[:, mask] = -1e9
    with (
        patch("torch.distributions.Categorical", categorical),
        patch("numpy.random.gumbel", gumbel),
    ):
        tokens = official.MaskGIT.sample(me, None, len(labels), labels, w=w, step=steps, **options)[
            0
        ]
    other.bias.data.copy_(kept)
    other.eval()
    return tokens.flatten(1)


def schedules(side):
    """Of all numbers of steps: where the official tokens per step are others than ours, and where they cannot be."""
    plan = SimpleNamespace(patch_size=side)
    plans = {n: official.MaskGIT.adap_sche(plan, n).tolist() for n in range(2, side**2 + 1)}
    ours = {n: maskgit.decoding_schedule(n, side**2)[0] for n in plans}
    assert all(
        min(plan) > 0 and sum(plan) == side**2 and len(plan) == n for n, plan in ours.items()
    )
    invalid = [n for n in plans if min(plans[n]) <= 0]
    return dict(
        tokens=side**2,
        first_official_invalid=invalid[:1],
        last_official_valid=max({*plans} - {*invalid}),
        differing_though_valid=[n for n in plans if plans[n] != ours[n] and n not in invalid],
    )


def git_parity(generator):
    plain = (8, 3.0, 1.0, 4.5)  # steps, w, softmax scale, temperature of the choice
    for name, n, config, runs in (
        ("tiny", 16, TINY, (plain, (6, 0.0, 1.0, 4.5))),
        ("base", 2, BASE, (plain,)),
        (
            "base of 2 blocks",
            4,
            dict(BASE, depth=2),
            (plain, (8, 0.0, 1.0, 4.5), (15, 2.8, 1.0, 7.0), (32, 9.0, 1.3, 7.0)),
        ),
    ):
        one, other = git_pair(**config)
        k, classes, side = (config[key] for key in ("codebook_size", "num_classes", "input_size"))
        tokens, labels = (
            torch.randint(high, (n, count), generator=generator)
            for high, count in ((k, side**2), (classes, 1))
        )
        labels, r = labels[:, 0], torch.rand(n, 1 + side**2, generator=generator)
        for schedule in ("cosine", "arccos"):
            mask = r[:, 1:] < maskgit.mask_ratio(r[:, :1], schedule)
            draws = iter((r[:, 0], r[:, 1:].view(n, side, side)))
            with patch("torch.rand", lambda *_, draws=draws, **__: next(draws)):
                masked, theirs = official.MaskGIT.get_mask_code(
                    tokens.view(n, side, side), schedule, k
                )
            compare(f"{name}: {schedule} mask", mask, theirs)
            compare(f"{name}: masked tokens", tokens.masked_fill(mask, k), masked)
        for drop in (
            torch.arange(n) < 0,
            torch.arange(n) >= 0,
            torch.arange(n) % 2 == 0,
        ):  # no label, all, half
            given = labels.masked_fill(drop, classes)
            with torch.no_grad():
                compare(
                    f"{name}: logits",
                    one(masked.flatten(1), given),
                    other(masked, labels, drop_label=drop),
                )
        terms = (
            maskgit.token_losses(one(masked.flatten(1), given), tokens).mean(),
            CRITERION(other(masked, labels, drop_label=drop).reshape(-1, k + 1), tokens.view(-1)),
        )
        gradients = [
            flat(torch.autograd.grad(term, [p for _, p in sorted(net.named_parameters())]))
            for term, net in zip(terms, (one, other))
        ]
        compare(f"{name}: loss", *terms)
        compare(f"{name}: gradients", *gradients)
        for steps, w, scale, temperature in runs:
            uniform, plan = torch.rand(n, steps, 2, side**2, generator=generator), (steps, side**2)
            mine = maskgit.parallel_decoding(
                one,
                labels,
                uniform,
                *maskgit.decoding_schedule(*plan),
                cfg_scale=1 + w,
                choice_temperature=temperature,
                softmax_scale=scale,
            )
            compare(
                f"{name}: {steps} steps of decoding, w {w:g}",
                mine,
                their_decoding(other, labels, uniform, steps, w, sm_temp=scale, r_temp=temperature),
            )


@torch.no_grad()
def golden():
    """Prints what the official code computes for small networks of redrawn()'s weights: golden.json's "discrete"."""
    (_, other), x, found = vq_pair(SMALL), waves(1, 2, 3, 16, 16), {}
    h, (picture, _) = other.quant_conv(other.encoder(x)), other(x)
    indices = other.quantize(h)[2][2].view(2, 16)
    for other.quantize.legacy in (True, False):  # the two losses differ by their gradients alone
        with torch.enable_grad():
            loss = other.quantize(h)[1]
            (gradient,) = torch.autograd.grad(loss, other.quantize.embedding.weight)
        found[f"codebook_{other.quantize.legacy}"] = torch.stack([loss, gradient.norm()])
    found |= dict(features=h[:, ::2, ::2, 1], indices=indices, reconstruction=picture[:, :, ::5, 3])
    (_, other), masked, labels = (
        git_pair(**TINY),
        indices.masked_fill(waves(2, 2, 16) < 0, 64),
        torch.tensor([3, 10]),
    )
    logits = other(masked.view(2, 4, 4), labels % 10, drop_label=labels == 10)
    found |= {
        f"counts_{n}": official.MaskGIT.adap_sche(SimpleNamespace(patch_size=16), n)
        for n in (8, 12)
    }
    found |= dict(
        logits=logits[:, ::5, ::16],
        loss=CRITERION(logits.flatten(0, 1), indices.flatten()),
        tokens=their_decoding(other, labels % 10, waves(3, 2, 6, 2, 16) / 2 + 0.5, 6, 2.0),
    )
    print(
        ",\n".join(
            f'  "{what}": {[round(v, 6) for v in found[what].flatten().tolist()]}' for what in found
        )
    )


def speed(rounds):
    x, large = torch.randn(4, 3, 64, 64).clamp(-1, 1), torch.randn(1, 3, 256, 256).clamp(-1, 1)
    (one, other), discriminator = (
        vq_pair(vqgan.CONFIGS["f16-1024"], x),
        formula(vae.PatchDiscriminator()).train(),
    )
    parts = [list(autoencoders(other).values()), list(other.loss.discriminator.parameters())]
    mine = [
        torch.optim.Adam(net.parameters(), 4.5e-5, betas=(0.5, 0.9), fused=True)
        for net in (one, discriminator)
    ]
    theirs = [torch.optim.Adam(part, 4.5e-5, betas=(0.5, 0.9)) for part in parts]
    nets, adam = (
        git_pair(**dict(BASE, depth=6)),
        dict(lr=1e-4, betas=(0.9, 0.96), weight_decay=1e-5),
    )
    adam = [
        torch.optim.AdamW(net.parameters(), fused=net is nets[0] or None, **adam) for net in nets
    ]
    tokens, labels, uniform = (
        torch.randint(1024, (4, 16, 16)),
        torch.arange(4),
        torch.rand(4, 8, 2, 256),
    )

    def update(loss, *optimizers, clip=None):
        if loss is not None:
            loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def ours_alone():
        quantised, _, codebook = one.quantize(one.features(x))
        update((x - one.decode(quantised)).abs().mean() + codebook, mine[0])

    def their_alone():
        reconstruction, codebook = other(x)
        update((x - reconstruction).abs().mean() + codebook, theirs[0])

    def their_gan():
        for i, optimizer in enumerate(theirs):
            for p, on in [(p, i == j) for j in (0, 1) for p in parts[j]]:  # as Lightning does
                p.requires_grad_(on)
            update(other.training_step(dict(image=x.permute(0, 2, 3, 1)), 0, i), optimizer)

    def our_git():
        r, code = torch.rand(4, 258), tokens.flatten(1)
        mask = r[:, 2:] < maskgit.mask_ratio(r[:, :1])
        logits = nets[0].train()(
            code.masked_fill(mask, 1024), torch.where(r[:, 1] < maskgit.LABEL_DROP, 1000, labels)
        )
        update(maskgit.token_losses(logits, code).mean(), adam[0], clip=nets[0])

    def their_git():
        masked, _ = official.MaskGIT.get_mask_code(tokens, value=1024, codebook_size=1024)
        logits = nets[1].train()(masked, labels, drop_label=torch.rand(4) < 0.1)
        update(CRITERION(logits.reshape(-1, 1025), tokens.view(-1)), adam[1], clip=nets[1])

    steps = {
        "f16-1024 at 64 px, step without discriminator": (ours_alone, their_alone),
        "f16-1024 at 64 px, step": (
            lambda: update(our_backward(one, discriminator, x), *mine),
            their_gan,
        ),
        "f16-1024, tokenising one image of 256 px": (
            lambda: one.encode(large),
            lambda: other.encode(large),
        ),
        "MaskGIT of 6 blocks, step": (our_git, their_git),
        "MaskGIT of 6 blocks, 8 steps of decoding, w 3": (
            lambda: maskgit.parallel_decoding(
                nets[0].eval(), labels, uniform, *maskgit.decoding_schedule(8, 256), 4.0
            ),
            lambda: their_decoding(nets[1], labels, uniform, 8, 3.0),
        ),
    }
    for what, both in steps.items():
        with torch.set_grad_enabled("step" in what and "decoding" not in what):
            times = torch.tensor(
                [[seconds(step, 1, torch.device("cpu")) for step in both] for _ in range(rounds)]
            )
        ours, official_ = times.median(dim=0).values.tolist()
        steps[what] = dict(
            seconds_ours=ours,
            seconds_official=official_,
            rounds=rounds,
            official_to_ours=float((times[:, 1] / times[:, 0]).median()),
        )
    return steps


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--official", required=True, type=Path, help="folder of the two official repositories"
    )
    parser.add_argument("--parts", default="parity,speed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--record", type=Path, help="a part of it that is not measured stays")
    args = parser.parse_args()
    load_official(args.official)
    if args.golden:
        return golden()
    record = json.loads(args.record.read_text()) if args.record and args.record.exists() else {}
    if "parity" in args.parts:
        generator = torch.Generator().manual_seed(0)
        in_use = vq_parity(generator)
        git_parity(generator)
        record["parity"] = dict(
            n=len(worst),
            device="cpu",
            largest_relative_difference=worst,
            differing=counted,
            codes_in_use=in_use,
            schedules=[schedules(16), schedules(8)],
        )
    if "speed" in args.parts:
        record["speed"] = speed(args.rounds)
    for part in args.parts.split(","):
        record[part]["about"] = dict(
            command=sys.argv,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            device=platform.machine(),
            date=time.strftime("%Y-%m-%d"),
        )
    print(json.dumps(record, indent=1))
    if args.record:
        args.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
