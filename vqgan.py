"""The VQ-GAN of taming-transformers, and its fine-tuning with EQ-VAE's loss: the discrete half of the paper.

A VQ-GAN (https://arxiv.org/abs/2012.09841) replaces each vector of an encoder's features by the nearest of a codebook's
and decodes those. EQ-VAE (https://arxiv.org/abs/2502.09509) transforms the features before they are quantised: half of
the steps autoencode (Eq. 1), the other half decode the codes of a transformed grid of features towards the transformed
image (Eq. 5). maskgit.py generates the codes. Encoder, decoder, discriminator and the run kit are vae.py's.

    python vqgan.py --data emoji --model tiny --init scratch --image-size 32 --batch-size 32 --steps 800 --lr 1e-3 \\
        --lpips-weight 0 --gan-weight 0 --out tiny-vq.pt                   # a CPU, a minute; `bash demo.sh --all`
    python vqgan.py --init vqgan.ckpt --data photos/ --batch-size 16       # one GPU
    python vqgan.py --init eqvqgan.pt --export eq-vqgan                    # for taming-transformers and Maskgit-pytorch
    torchrun --nproc_per_node=8 vqgan.py                                   # eight: the paper's recipe

The last line reads data/openimages/ and data/vqgan_imagenet_f16_1024.ckpt (ckpts/last.ckpt in taming's
https://heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/), takes 50,000 steps of 160 images, and writes eqvqgan.pt with
eqvqgan.jsonl (losses, the codebook's use) and eqvqgan/ (pictures) beside it. Run again, it goes on where it stopped. To
expect on ImageNet's validation set (Tables 1 and 12): rFID 7.94 -> 7.54, R 1.35 -> .64, S 1.22 -> .55.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import vae
from vae import AutoencoderKL, Decoder, Encoder, InputError

F16 = dict(ch_mult=(1, 1, 2, 2, 4), attn_levels=(4,))
CONFIGS = {  # name -> arguments of VQGAN
    "f16-1024": dict(F16, n_embed=1024),  # vqgan_imagenet_f16_1024: the paper's, MaskGIT v1's
    "f16-16384": dict(F16, n_embed=16384),  # vqgan_imagenet_f16_16384
    "tiny": dict(
        ch=16,
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        norm_groups=8,
        z_channels=16,
        embed_dim=4,
        n_embed=256,
    ),
}

# ======================================================================================================================
# The network. Module names are taming's, so that its checkpoints load strictly.
#     B batch   H, W image   h, w features (H / f, W / f)   N = h w tokens   e embed_dim   K = n_embed codes


class VectorQuantizer(nn.Module):
    """Each vector of the features -> the nearest of K codes, with gradients passed straight through."""

    def __init__(self, n_embed, embed_dim, beta, legacy_beta):
        super().__init__()
        self.beta, self.legacy_beta = beta, legacy_beta
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    @torch.no_grad()
    def nearest(self, h):
        """Features (B, e, h, w) -> indices (B, N), row by row. In fp32 throughout: TF32 or bf16 take other codes."""
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(h.device.type, enabled=False):
            vectors, codes = (
                h.float().permute(0, 2, 3, 1).flatten(0, 2),
                self.embedding.weight,
            )  # (B N, e)
            distances = (
                vectors.square().sum(1, keepdim=True)
                + codes.square().sum(1)
                - 2 * (vectors @ codes.T)
            )
        torch.set_float32_matmul_precision(precision)
        return distances.argmin(1).view(
            len(h), -1
        )  # |v - c|^2 with taming's order of sums, so its roundings

    def forward(self, h):
        """Features (B, e, h, w) -> (their codes, of equal shape, indices (B, N), the codebook's loss, a mean).

        Codebook term |q - sg(h)|^2 + beta * commitment |h - sg(q)|^2, van den Oord's (https://arxiv.org/abs/1711.00937)
        Eq. 3; with legacy_beta beta stands on the other of the two, as all released VQ-GANs were trained.
        """
        h, indices = h.float(), self.nearest(h)
        quantised = self.embedding(indices).transpose(1, 2).view_as(h)  # (B, e, h, w)
        codebook, commitment = F.mse_loss(quantised, h.detach()), F.mse_loss(h, quantised.detach())
        loss = (
            commitment + self.beta * codebook
            if self.legacy_beta
            else codebook + self.beta * commitment
        )
        return h + (quantised - h).detach(), indices, loss  # d quantised / d h = 1


class VQGAN(nn.Module):
    """taming's VQModel (https://arxiv.org/abs/2012.09841), f = 2^(len(ch_mult) - 1).

    ch, ch_mult, norm_groups, num_res_blocks, attn_levels    as in vae.AutoencoderKL
    z_channels, embed_dim    channels of the encoder's output and of the codes
    n_embed                  codes
    beta, legacy_beta        weight of a term of the codebook's loss, and which: see VectorQuantizer.forward()
    """

    grid = AutoencoderKL.grid  # (h, w) of images of (H, W)

    def __init__(
        self,
        ch=128,
        ch_mult=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        attn_levels=(),
        z_channels=256,
        embed_dim=256,
        n_embed=1024,
        beta=0.25,
        legacy_beta=True,
        norm_groups=32,
    ):
        config = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().__init__()
        self.config = config  # what a checkpoint keeps
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, attn_levels, z_channels, norm_groups)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, attn_levels, z_channels, norm_groups)
        self.quantize = VectorQuantizer(n_embed, embed_dim, beta, legacy_beta)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.factor = 2 ** (len(ch_mult) - 1)

    def features(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> features (B, e, h, w) before quantisation, float32: what tau acts on."""
        return self.quant_conv(self.encoder(x)).float()

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, N), row by row."""
        return self.quantize.nearest(self.features(x))

    def decode(self, z, grid=None):
        """Codes (B, e, h, w), or tokens (B, N) of a `grid` (h, w), a square if not given -> images (B, 3, H, W), about
        [-1, 1], not clamped. InputError for tokens that are no index of the codebook."""
        if not z.is_floating_point():
            if z.min() < 0 or z.max() >= self.config["n_embed"]:
                raise InputError(
                    f"tokens {z.min()} to {z.max()}: the codebook has 0 to {self.config['n_embed'] - 1}"
                )
            grid = grid or (round(z.shape[1] ** 0.5),) * 2
            z = self.quantize.embedding(z).transpose(1, 2).unflatten(2, grid)
        return self.decoder(self.post_quant_conv(z)).float()

    def normalize(self, z):
        """Nothing to do: generators take tokens, not latents."""
        return z

    denormalize = normalize


# ======================================================================================================================
# The codebook's use, loading, exporting


def use(counts):
    """How often each of K codes was taken (K,) -> usage, the share taken at all, and perplexity, the number of equally
    likely codes of the same entropy, as tensors."""
    return (counts > 0).float().mean(), torch.special.entr(counts / counts.sum()).sum().exp()


@torch.no_grad()
def codebook_use(model, images, n=1024):
    """Usage, perplexity and the number of dead codes over n of an Images, evenly spaced."""
    tokens = torch.cat(
        [model.encode(x) for x in vae.evenly(images, n, next(model.parameters()).device)]
    )
    counts = torch.bincount(tokens.flatten(), minlength=model.config["n_embed"])
    usage, perplexity = use(counts)
    return dict(
        usage=usage.item(),
        perplexity=perplexity.item(),
        dead=int((counts == 0).sum()),
        images=len(tokens),
    )


def read_vqgan(path, model=None):
    """-> (VQGAN's arguments, weights, discriminator's weights or None) of our checkpoints and of taming's, which their
    codebook tells apart; it must be that of the preset `model`, if given."""
    checkpoint = vae.load(path)
    if "arch" in checkpoint:
        if checkpoint["arch"] != "VQGAN":
            raise InputError(f"{path}: holds a {checkpoint['arch']}, not a VQ-GAN")
        config, weights, disc = (
            checkpoint["config"],
            checkpoint["ema"] or checkpoint["model"],
            checkpoint["disc"],
        )
    else:
        state, known = (
            checkpoint.get("state_dict", checkpoint),
            ("encoder.", "decoder.", "quant", "post_quant_"),
        )
        weights = {key: value for key, value in state.items() if str(key).startswith(known)}
        disc = {key[19:]: state[key] for key in state if str(key).startswith("loss.discriminator.")}
        if "quantize.embedding.weight" not in weights:
            raise InputError(f"{path}: no VQ-GAN in it, neither in our layout nor in taming's")
        codes = len(weights["quantize.embedding.weight"])
        config = CONFIGS.get(model or f"f16-{codes}", dict(F16, n_embed=codes))
    codes = len(weights["quantize.embedding.weight"])
    if config["n_embed"] != codes or model and model not in vae.presets(config, CONFIGS):
        raise InputError(
            f"{path}: its codebook of {codes} codes, or its network, is not that of --model {model}"
        )
    return config, weights, disc or None


def load_vqgan(path, model=None):
    """The VQ-GAN in a file that read_vqgan() knows, strictly, on the CPU, for inference."""
    config, weights, _ = read_vqgan(path, model)
    return vae.load_weights(VQGAN(**config), weights, path).eval().requires_grad_(False)


def load_model(path, model=None):
    """The VQ-GAN or the KL autoencoder in a file or folder, for what takes either."""
    held = {} if os.path.isdir(path) else vae.load(path)
    vq = "quantize.embedding.weight" in held.get("state_dict", held.get("model", held))
    return (load_vqgan if vq else vae.load_autoencoder)(path, model)


def encode(model, x):
    """Images (B, 3, H, W) -> means and standard deviations of the latents; of a VQ-GAN the features and 0."""
    if isinstance(model, VQGAN):
        return model.features(x), 0
    posterior = model.encode(x)
    return posterior.mean, posterior.std


def decode(model, z):
    """Latents, of a VQ-GAN features, which are quantised first -> images (B, 3, H, W)."""
    return model.decode(model.quantize(z)[0] if isinstance(model, VQGAN) else z)


def export(args):
    """Writes what --init holds to a new folder, as taming's logs and Maskgit-pytorch's --vqgan-folder have it; they
    take the networks from it and pass over the discriminator's weights, if there are any."""
    config, weights, disc = read_vqgan(args.init, args.model)
    config, folder, part = VQGAN(**config).config, Path(args.export), Path(f"{args.export}.tmp")
    if folder.exists():
        raise InputError(f"--export {folder}: already there; give a new folder")
    if config["norm_groups"] != 32:
        raise InputError(
            f"--export {args.init}: its norms have {config['norm_groups']} groups, taming's always 32"
        )
    network = dict(
        double_z=False,
        resolution=256,
        in_channels=3,
        out_ch=3,
        dropout=0.0,
        attn_resolutions=[256 >> level for level in config["attn_levels"]],
        **{name: config[name] for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")},
    )
    told = dict(
        target="taming.models.vqgan.VQModel",
        params=dict(
            embed_dim=config["embed_dim"],
            n_embed=config["n_embed"],
            ddconfig=network,
            lossconfig=dict(target="taming.modules.losses.DummyLoss"),
        ),
    )
    try:
        for name in ("ckpts", "configs"):
            (part / name).mkdir(parents=True)
        disc = {f"loss.discriminator.{name}": value for name, value in (disc or {}).items()}
        torch.save(dict(state_dict=weights | disc), part / "ckpts" / "last.ckpt")
        (part / "configs" / "model.yaml").write_text(
            json.dumps(dict(model=told), indent=2)
        )  # JSON is YAML
        os.replace(part, folder)
    except OSError as error:
        raise InputError(f"--export {folder}: cannot be written ({error})") from None
    vae.say(
        f"{folder}: taming's layout, {config['n_embed']:,} codes"
        + "; taming trains on with --legacy-beta, these weights were not"
        * (not config["legacy_beta"])
    )


# ======================================================================================================================
# Training: Eq. 1 with probability p_alpha, else Eq. 5                                                           (Eq. 7)


def train(args, rank, world, device):
    run = vae.Tuning(
        args, rank, world, device, VQGAN, CONFIGS, read_vqgan, "mean", legacy_beta=args.legacy_beta
    )
    model, features, reconstruct = (
        run.model,
        run.autocast(run.model.features),
        run.autocast(run.model.decode),
    )

    def measure():
        used = vae.load_weights(VQGAN(**model.config), run.ema or model.state_dict(), run.out).to(
            device
        )
        found = codebook_use(used, run.centred)
        vae.say(
            f"codebook: {found['dead']} of {model.config['n_embed']} codes unused by {found['images']} images"
        )
        return found

    def look():
        run.look(features, lambda h: reconstruct(model.quantize(h)[0]), **measure())

    while run.goes_on(look, measure):
        # --------------------------------------------------------------------------------------------------------------
        # TRAINING STEP
        for x, _, tau in run.micro_batches():
            h = features(x)  # (b, e, h, w)
            # tau on the features, before they are quantised. (taming's 1x1 quant_conv lies before it; they commute.)
            target, h = tau(x), tau(h)  # (b, 3, f h2, f w2), (b, e, h2, w2)
            quantised, indices, codebook_loss = model.quantize(h)
            reconstruction = reconstruct(quantised)  # (b, 3, f h2, f w2)
            nll, gan = run.criterion(target, reconstruction)
            run.backward(nll, gan, args.codebook_weight * codebook_loss, target, reconstruction)
            counts = torch.zeros(model.config["n_embed"], device=device)
            usage, perplexity = use(
                counts.index_add_(0, indices.flatten(), counts.new_ones(indices.numel()))
            )
            # Codebook and commitment terms differ in their gradients, not in value: each is codebook / (1 + beta)
            run.meter.add(codebook=codebook_loss, usage=usage, perplexity=perplexity)
        run.update()
        # --------------------------------------------------------------------------------------------------------------


def main():
    parser = vae.arguments(__doc__, CONFIGS, "data/vqgan_imagenet_f16_1024.ckpt")
    parser.add_argument("--codebook-weight", type=float, default=1.0)
    parser.add_argument(
        "--legacy-beta",
        action=argparse.BooleanOptionalAction,
        help="beta on the codebook term, as in "
        "all released VQ-GANs, or on the commitment (default: --init's; from scratch, legacy)",
    )
    parser.set_defaults(gan_weight=0.8)  # taming's imagenet_vqgan.yaml
    with vae.launch(
        parser,
        data="data/openimages",
        out="eqvqgan.pt",
        steps=50_000,
        batch_size=160,
        lr=4.5e-5,
        save_every=1000,
        sample_every=1000,
    ) as (args, rank, world, device):
        export(args) if args.export else train(args, rank, world, device)


if __name__ == "__main__":
    main()
