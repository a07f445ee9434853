"""The VQ-GAN of taming-transformers, and its fine-tuning with EQ-VAE: the paper's discrete half.

A VQ-GAN (https://arxiv.org/abs/2012.09841) replaces each vector of an encoder's features by the
nearest of a codebook's, and decodes those. EQ-VAE (https://arxiv.org/abs/2502.09509) transforms
the features before they are quantised. Half of the steps train plain reconstruction (Eq. 1). The
other half decode the codes of a transformed grid of features and ask for the transformed image
(Eq. 5). maskgit.py generates the codes. Encoder, decoder and discriminator are vae.py's, and so is
what starts, logs and saves a run.

    python vqgan.py --data data/emoji/train --model tiny --init scratch --image-size 32 \\
        --batch-size 32 --steps 800 --lr 1e-3 --lpips-weight 0 --gan-weight 0 --out tiny-vq.pt
                                                                    # one minute on a CPU
    python vqgan.py --init vqgan.ckpt --data photos/ --batch-size 16  # one GPU
    torchrun --nproc_per_node=8 vqgan.py                              # eight: the paper's recipe
    python vqgan.py --init eqvqgan.pt --export eq-vqgan               # a folder for taming's code

The torchrun line reads data/openimages/ and data/vqgan_imagenet_f16_1024.ckpt (ckpts/last.ckpt in
taming's https://heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/) and takes 50,000 steps of 160
images. It writes eqvqgan.pt, eqvqgan.jsonl (losses, the codebook's use) and eqvqgan/ (pictures).
The same command again goes on where the run stopped. Expect on ImageNet's validation set (Tables 1
and 12): rFID 7.94 -> 7.54, R 1.35 -> .64, S 1.22 -> .55.
"""

import argparse
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

import vae
from vae import Decoder, Encoder, InputError, constructor_arguments

# What taming's ImageNet VQ-GANs share (FULL), and the small ones of tests and results/ (SMALL)
FULL = dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_levels=(4,), norm_groups=32)
FULL |= dict(z_channels=256, embed_dim=256)
SMALL = dict(ch=16, num_res_blocks=1, attn_levels=(), norm_groups=8)
SMALL |= dict(z_channels=16, embed_dim=4, n_embed=256)

# name -> arguments of VQGAN
CONFIGS = {
    # vqgan_imagenet_f16_1024: the paper's, and Maskgit-pytorch v1.0's
    "f16-1024": dict(FULL, n_embed=1024),
    # vqgan_imagenet_f16_16384
    "f16-16384": dict(FULL, n_embed=16384),
    # f4, and f8: 8 x 8 tokens for the 64 px of results/reproduce.py
    "tiny": dict(SMALL, ch_mult=(1, 2, 4)),
    "tiny-f8": dict(SMALL, ch_mult=(1, 2, 4, 4)),
}


# ==================================================================================================
# The network. Module names are taming's, so that its checkpoints load strictly.
#     B batch   H, W image   h, w features (H / f, W / f)   N = h w tokens   e embed_dim   K codes


class VectorQuantizer(nn.Module):
    """Each vector of the features -> the nearest of K codes; gradients pass straight through."""

    def __init__(self, n_embed, embed_dim, beta, legacy_beta):
        super().__init__()
        self.beta = beta
        self.legacy_beta = legacy_beta
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    @torch.no_grad()
    def nearest(self, h):
        """Features (B, e, h, w) -> tokens (B, N), the indices of codes, row by row.

        In float32 throughout: TF32 or bf16 would take other codes. |v - c|^2 is added up in
        taming's order, so it is rounded as there.
        """
        # vae.full_precision() turns off TF32 alone
        with vae.full_precision(), torch.autocast(h.device.type, enabled=False):
            vectors = h.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B N, e)
            codes = self.embedding.weight  # (K, e)
            squares = vectors.square().sum(1, keepdim=True) + codes.square().sum(1)
            distances = squares - 2 * (vectors @ codes.T)  # (B N, K)
        return distances.argmin(1).view(len(h), -1)

    def forward(self, h):
        """Features (B, e, h, w) -> (their codes, of equal shape, tokens (B, N), the loss).

        The loss is a mean: codebook term |q - sg(h)|^2 + beta * commitment |h - sg(q)|^2, Eq. 3 of
        https://arxiv.org/abs/1711.00937. With legacy_beta, beta stands on the other of the two, as
        all released VQ-GANs were trained.
        """
        h = h.float()
        tokens = self.nearest(h)
        quantised = self.embedding(tokens).transpose(1, 2).view_as(h)  # (B, e, h, w)
        codebook = F.mse_loss(quantised, h.detach())
        commitment = F.mse_loss(h, quantised.detach())
        if self.legacy_beta:
            loss = commitment + self.beta * codebook
        else:
            loss = codebook + self.beta * commitment
        straight_through = h + (quantised - h).detach()  # d / d h = 1
        return straight_through, tokens, loss


class VQGAN(nn.Module):
    """taming's VQModel (https://arxiv.org/abs/2012.09841), f = 2^(len(ch_mult) - 1).

    ch, ch_mult, num_res_blocks, attn_levels, norm_groups   as in vae.AutoencoderKL
    z_channels   channels of the encoder's output
    embed_dim    channels of the codes
    n_embed      K, their number
    beta         weight of one term of the codebook's loss
    legacy_beta  which one: see VectorQuantizer.forward()
    """

    def __init__(
        self,
        ch=128,
        ch_mult=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        attn_levels=(4,),
        z_channels=256,
        embed_dim=256,
        n_embed=1024,
        beta=0.25,
        legacy_beta=True,
        norm_groups=32,
    ):
        config = constructor_arguments(locals())
        super().__init__()
        self.config = config  # what a checkpoint keeps
        self.factor = 2 ** (len(ch_mult) - 1)
        shape = (ch, ch_mult, num_res_blocks, attn_levels)
        self.encoder = Encoder(*shape, z_channels, norm_groups)
        self.decoder = Decoder(*shape, z_channels, norm_groups)
        self.quantize = VectorQuantizer(n_embed, embed_dim, beta, legacy_beta)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def grid(self, image_size):
        """(h, w) of the features of images (H, W). InputError where f does not divide a side."""
        return vae.latent_grid(image_size, self.factor)

    def features(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> features (B, e, h, w) before they are quantised,
        float32: what tau acts on."""
        return self.quant_conv(self.encoder(x)).float()

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, N), row by row."""
        return self.quantize.nearest(self.features(x))

    def decode(self, z, grid=None):
        """Codes (B, e, h, w), or tokens (B, N) -> images (B, 3, H, W), about [-1, 1], not clamped.

        grid  (h, w) of tokens; None: a square. InputError for tokens that are no index of the
              codebook.
        """
        if not z.is_floating_point():
            z = self.codes(z, grid)
        return self.decoder(self.post_quant_conv(z)).float()

    def codes(self, tokens, grid=None):
        """Tokens (B, N) -> their codes (B, e, h, w)."""
        if tokens.min() < 0 or tokens.max() >= self.config["n_embed"]:
            raise InputError(
                f"tokens {tokens.min()} to {tokens.max()}: the codebook has "
                f"0 to {self.config['n_embed'] - 1}"
            )
        if grid is None:
            side = round(tokens.shape[1] ** 0.5)
            grid = (side, side)
        return self.quantize.embedding(tokens).transpose(1, 2).unflatten(2, grid)

    def decode_features(self, h):
        """Features (B, e, h, w) -> images, by way of the nearest codes."""
        return self.decode(self.quantize(h)[0])


# --------------------------------------------------------------------------------------------------
# A VQ-GAN or a KL autoencoder, for what takes either


def encode_with(model, x):
    """Images (B, 3, H, W) -> means and standard deviations of the latents (B, c, h, w); of a
    VQ-GAN the features and 0."""
    if isinstance(model, VQGAN):
        return model.features(x), 0
    posterior = model.encode(x)
    return posterior.mean, posterior.std


def decode_with(model, z):
    """Latents, or a VQ-GAN's features, which are quantised first -> images (B, 3, H, W)."""
    if isinstance(model, VQGAN):
        return model.decode_features(z)
    return model.decode(z)


# ==================================================================================================
# The codebook's use


def codebook_statistics(counts):
    """How often each of K codes was taken (K,) -> (usage, perplexity), as tensors.

    usage is the share of codes that were taken at all. perplexity is the number of equally likely
    codes of the same entropy.
    """
    usage = (counts > 0).float().mean()
    entropy = torch.special.entr(counts / counts.sum()).sum()
    return usage, entropy.exp()


@torch.no_grad()
def codebook_use(model, data, n=1024, batch_size=16):
    """The codebook's use over n evenly spaced images of a vae.ImageFolder, of which batch_size are
    encoded at a time: dict(usage, perplexity, dead, images). dead is the number of codes that none
    of the images takes."""
    device = next(model.parameters()).device
    batches = vae.evenly_spaced(data, n, device, batch_size)
    tokens = torch.cat([model.encode(x) for x in batches])
    counts = torch.bincount(tokens.flatten(), minlength=model.config["n_embed"])
    usage, perplexity = codebook_statistics(counts)
    return dict(
        usage=usage.item(),
        perplexity=perplexity.item(),
        dead=int((counts == 0).sum()),
        images=len(tokens),
    )


# ==================================================================================================
# Training, Eq. 7: Eq. 1 with probability p_alpha, else Eq. 5


def train(args, rank, world, device):
    # The networks: of the run to go on with, of --init, or new ones. For flags that were not given,
    # load_run() sets args to what the run was made with, starting_point() sets args.model,
    # make_discriminator() args.disc_start. `required` entries must be in its file, if only as None
    resumed = vae.load_run(args, "VQGAN", CONFIGS, required=("disc", "opt_disc", "ema"))
    vae.check_needs(args)  # InputError for --vgg with --lpips-weight 0, and the like
    torch.manual_seed(args.seed)
    stored = vae.starting_point(args, resumed, CONFIGS, read_vqgan)
    if args.legacy_beta is not None:  # which term of the codebook's loss beta multiplies
        stored.config = dict(stored.config, legacy_beta=args.legacy_beta)
    step = resumed["step"] if resumed else 0
    model = vae.build(VQGAN, stored)
    discriminator = vae.make_discriminator(args, stored, step)
    perceptual = vae.load_perceptual(args, device)
    ssim = vae.load_ssim(args)

    # The images. All that can be wrong with the arguments is found before Log writes anything
    grid = model.grid(args.image_size)
    smallest = vae.smallest_cells(args, grid, model.factor)  # no side is shrunk below it
    micro_batch = vae.images_per_pass(args, world)
    data = vae.ImageFolder(args.data, args.image_size, crop="random", seed=args.seed)
    # Shown in every preview: 8 images, one batch
    shown = next(vae.evenly_spaced(data.centred(), n=8, device=device))

    # The optimisers, and the average of the weights. (What --train decoder freezes is in the
    # optimiser, too; it has no gradient, so Adam leaves it)
    networks = [network for network in (model, discriminator) if network is not None]
    for network in networks:
        network.to(device, memory_format=vae.convolution_layout(device)).train()
    vae.set_trained_part(model, args.train)
    vae.checkpoint_activations(model, args.checkpoint_activations)
    optimizers = [
        torch.optim.Adam(network.parameters(), args.lr, betas=(0.5, 0.9), fused=True)
        for network in networks
    ]
    vae.restore_optimizers(optimizers, resumed)
    parameters = vae.trainable_parameters(*networks)
    buffers = list(discriminator.buffers()) if discriminator is not None else []  # BatchNorm's
    ema = vae.start_ema(model, args.ema_decay, resumed, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    vae.check_same_start(step, model, data)  # compares processes
    # On a CPU a forward pass is timed, to warn of a run that will take hours
    vae.say_duration(args, step, device, lambda: model.decode_features(model.features(shown[:1])))
    batches = vae.endless_batches(data, args, step, rank, world)
    log = vae.Log(args, step, world, device)
    vae.say_start(args, model, data, world, micro_batch, device)
    if resumed is None:
        preview(args, step, log, model, ema, data, shown, grid, autocast)
    first_step = step
    resumed = stored = None  # frees the loaded tensors
    log.begin(step)

    while step < args.steps and not vae.stop_signal():
        # ------------------------------------------------------------------------------------------
        # TRAINING STEP. tau is a function of (seed, step): with probability p_alpha the identity
        # (Eq. 1), else a transform of the kind --tau (Eq. 5). The batch has one, in all processes.
        # `shrink` is the identity, except with --recipe release, the authors' code: there some of
        # the steps of Eq. 1 train on smaller images. Nothing else is drawn here, and
        # `_explicit_tau` is None: --explicit-weight is vae.py's alone
        host_rng, _device_rng = vae.step_rngs(args.seed, step, device)
        shrink, tau, _explicit_tau = vae.draw_transforms(args, grid, smallest, host_rng)
        images, _labels, _indices, readable = next(batches)  # images (B / world, 3, H, W) uint8
        log.count(unreadable=(~readable).sum())  # files, for which others stand in
        # The running means and variances of the discriminator, put back if the step is skipped
        buffers_before = [buffer.clone() for buffer in buffers]

        parts = images.split(micro_batch)
        share = 1 / len(parts)  # the parts are equally large
        for images_part in parts:
            x = shrink(vae.to_float(images_part, device))  # (b, 3, H, W), or shrunk; in [-1, 1]
            # The paper transforms the features before they are quantised. h is the output of
            # taming's quant_conv; to transform its input would give the same, since a 1x1
            # convolution commutes with tau
            with autocast:
                h = model.features(x)  # (b, e, h, w)
                target = tau(x)  # EQ-VAE (in taming: x)
                quantised, tokens, codebook_loss = model.quantize(tau(h))  # EQ-VAE (taming: h)
                reconstruction = model.decode(quantised)  # of the target's shape

            # L_rec and the codebook's loss are means, as in taming, not sums as vae.py's.
            # `other_losses` is the weighted sum of LPIPS, L2 and 1 - SSIM
            l1 = (target - reconstruction).abs().mean()
            other_losses, for_log = vae.weighted_losses(
                args, target, reconstruction, perceptual, ssim
            )
            rec_loss = l1 + other_losses
            weighted_codebook_loss = args.codebook_weight * codebook_loss
            usage, perplexity = codebook_statistics(count_codes(tokens, model.config["n_embed"]))
            log.add(l1=l1, **for_log, rec_loss=rec_loss, codebook=codebook_loss)
            log.add(usage=usage, perplexity=perplexity)  # of this micro-batch

            # L_gan, here g_loss, acts from disc_start on. d_loss trains the discriminator from the
            # first step on, from a detached reconstruction, and vae.loss_gradient() gives no
            # gradient of g_loss to the discriminator. (In taming d_loss waits for disc_start as
            # well, and comes after the autoencoder's step, from a new reconstruction)
            g_loss = None
            if discriminator is not None:
                with autocast:
                    g_loss = -discriminator(reconstruction).float().mean()
                    real = discriminator(target).float()
                    fake = discriminator(reconstruction.detach()).float()
                d_loss = vae.hinge_loss(real, fake)
                # The hinge's gradient can be finite although d_loss is not. With 0 * d_loss added
                # it is NaN then, and the step is skipped
                d_loss.backward(share + 0 * d_loss.detach())
                log.add(g_loss=g_loss, d_loss=d_loss, logits_real=real, logits_fake=fake)

            # (L_rec + w L_gan + weighted codebook loss).backward(), in two parts.
            # vae.loss_gradient() takes the gradient of the first two at the reconstruction, with
            # VQ-GAN's adaptive weight w: --gan-weight times |gradient of L_rec| / |gradient of
            # L_gan| at the decoder's last layer. vae.backward_from() carries that gradient on
            # through decoder and encoder, and the codebook loss's to the encoder and the codes
            gradient, scalars = vae.loss_gradient(
                rec_loss,
                g_loss,
                reconstruction,
                model.decoder.conv_out.weight,
                args.gan_weight,
                gan_acts=discriminator is not None and step >= args.disc_start,
            )
            log.add(**scalars)
            vae.backward_from(reconstruction, gradient, weighted_codebook_loss, share)

        # The step. If the gradients' norm is not finite, both networks keep their weights. The host
        # need not wait for the norm, since a fused optimiser does nothing where its attribute
        # found_inf is 1 (made for GradScaler, which is not used here)
        vae.average_gradients(parameters)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = (~grad_norm.isfinite()).float()
        for optimizer in optimizers:
            optimizer.found_inf = skipped
            optimizer.step()
            optimizer.zero_grad()
        vae.restore_where(skipped, buffers, buffers_before)
        vae.update_ema(ema, model, args.ema_decay, step)
        step += 1
        # ------------------------------------------------------------------------------------------
        log.step(step, skipped, grad_norm, args.lr)
        if vae.is_due(step, args.sample_every, last=args.steps):
            preview(args, step, log, model, ema, data, shown, grid, autocast)
        if vae.is_due(step, args.save_every) and step < args.steps:
            vae.save_autoencoder(args, step, networks, optimizers, ema)

    # A run that went no step is saved only if it has no file yet: a finished one is left as it is
    if step > first_step or not os.path.exists(args.out):
        vae.save_autoencoder(args, step, networks, optimizers, ema)
    log.end(step)


def count_codes(tokens, n_embed):
    """How often each code was taken, (K,). (bincount would make the host wait for a GPU.)"""
    counts = torch.zeros(n_embed, device=tokens.device)
    ones = torch.ones(tokens.numel(), device=tokens.device)
    return counts.index_add_(0, tokens.flatten(), ones)


def preview(args, step, log, model, ema, data, shown, grid, autocast):
    """vae.preview(), whose pictures and errors are of the current weights; then the codebook's use
    over 1,024 images, with the weights that load_vqgan() would take: their average, if any."""
    vae.preview(args, step, log, model.features, model.decode_features, shown, grid, autocast)
    if not vae.MAIN or not args.sample_every:
        return
    averaged = vae.averaged_model(model, ema, shown.device)
    use = codebook_use(averaged, data.centred(), batch_size=vae.most_at_once(args))
    log.write(dict(step=step, **use))
    vae.say(
        f"codebook: {use['dead']} of {model.config['n_embed']} codes are used by none of "
        f"{use['images']} images"
    )


# ==================================================================================================
# Files in and out: our own checkpoints and taming's


def load_vqgan(path, model=None):
    """The VQ-GAN in a file or folder, loaded strictly, on the CPU, for inference.

    path   our checkpoint (its average where it has one), taming's .ckpt, what --export wrote
    model  the preset of CONFIGS that it must be of
    """
    stored = read_vqgan(path, model)
    network = vae.build(VQGAN, stored).eval().requires_grad_(False)
    network.image_size = stored.image_size
    return network


def read_vqgan(path, model=None):
    """The vae.Stored of the VQ-GAN in a file that load_vqgan() knows. The codebook tells taming's
    presets apart."""
    file = vae.find_file(path)
    checkpoint = vae.read_file(file)
    if vae.is_ours(checkpoint):
        stored = vae.read_ours(file, checkpoint, "VQGAN")
    else:
        stored = read_taming(file, checkpoint, model)
    if model and model not in vae.matching_presets(stored.config, CONFIGS):
        codes = stored.config.get("n_embed")
        raise InputError(
            f"{path}: its codebook of {codes} codes, or its network, is not that of --model {model}"
        )
    return stored


def read_taming(path, checkpoint, model):
    weights = vae.find_weights(checkpoint, "quantize.embedding.weight")
    if weights is None:
        raise InputError(f"{path}: no VQ-GAN in it, neither in our layout nor in taming's")
    disc = vae.weights_under(weights, "loss.discriminator.")
    known = ("encoder.", "decoder.", "quant", "post_quant_")
    weights = {name: value for name, value in weights.items() if name.startswith(known)}
    codes = len(weights["quantize.embedding.weight"])
    config = CONFIGS.get(model or f"f16-{codes}")
    if config is None:
        config = dict(CONFIGS["f16-1024"], n_embed=codes)
    return vae.Stored(path, config, weights, disc or None)


def load_model(path, model=None, padding_mode=None):
    """The VQ-GAN or the KL autoencoder in a file or folder. `padding_mode` is for the latter, as in
    vae.load_autoencoder()."""
    checkpoint = vae.read_file(vae.find_file(path))
    if vae.find_weights(checkpoint, "quantize.embedding.weight") is None:
        return vae.load_autoencoder(path, model, padding_mode)
    return load_vqgan(path, model)


def export(args):
    """Writes what --init holds to a new folder, as taming's logs have it and Maskgit-pytorch's
    --vqgan-folder wants it. Both read the network's weights alone, but the discriminator's are
    written, too."""
    vae.check_export(args)
    if not vae.MAIN:
        return
    stored = read_vqgan(args.init, args.model)
    model = vae.build(VQGAN, stored)
    config = model.config
    if config["norm_groups"] != 32:
        raise InputError(
            f"--export {args.init}: its norms have {config['norm_groups']} groups, taming's have 32"
        )
    vae.write_file(args.export, lambda folder: write_taming(folder, model, stored))
    vae.say(f"{args.export}: taming's layout, {config['n_embed']:,} codes")
    if not config["legacy_beta"]:
        vae.say("taming trains on with its legacy beta; these weights were trained without")


def write_taming(folder, model, stored):
    """ckpts/last.ckpt and configs/model.yaml, in taming's names (JSON is YAML)."""
    config = model.config
    layout = dict(
        target="taming.models.vqgan.VQModel",
        params=dict(
            embed_dim=config["embed_dim"],
            n_embed=config["n_embed"],
            ddconfig=vae.ldm_network(config, double_z=False),
            lossconfig=dict(target="taming.modules.losses.DummyLoss"),
        ),
    )
    (folder / "ckpts").mkdir(parents=True)
    (folder / "configs").mkdir()
    torch.save(dict(state_dict=vae.ldm_weights(model, stored)), folder / "ckpts" / "last.ckpt")
    vae.write_json(folder / "configs" / "model.yaml", dict(model=layout))


# ==================================================================================================
# The command line


def main():
    init = "data/vqgan_imagenet_f16_1024.ckpt"
    parser, _, objective = vae.arguments(__doc__, CONFIGS, init, "eqvqgan.pt")
    text = "of the codebook's loss"
    objective.add_argument("--codebook-weight", type=vae.non_negative, default=1.0, help=text)
    objective.add_argument(
        "--legacy-beta",
        action=argparse.BooleanOptionalAction,
        help="beta on the codebook's term, as in all released VQ-GANs, or on the commitment "
        "(default: as --init has it; from scratch, legacy)",
    )
    parser.set_defaults(gan_weight=0.8)  # of taming's imagenet_vqgan.yaml
    vae.launch_trainer(parser, train, export)


if __name__ == "__main__":
    main()
