"""MaskGIT on a VQ-GAN's tokens: the discrete generator of EQ-VAE's paper.

MaskGIT (https://arxiv.org/abs/2202.04200) learns to fill in the masked tokens of an image, all at
once. It draws a new image from masks alone in a few steps, and each step keeps the tokens that it
is surest of. The network, the loss (over all tokens, masked or not) and the sampling are those of
Maskgit-pytorch v1.0 (https://arxiv.org/abs/2310.14400), called v1.0 below. EQ-VAE's paper
(https://arxiv.org/abs/2502.09509) trains it on the tokens of a VQ-GAN before and after fine-tuning
the VQ-GAN with EQ-VAE (Table 3).

    # minutes on a CPU. (vqgan.py makes tiny-vq.pt and eqvqgan.pt)
    python maskgit.py --vqgan tiny-vq.pt --data data/emoji/train --model MaskGIT-Ti \\
        --batch-size 64 --steps 800 --lr 1e-3 --warmup 100 --out tiny-maskgit.pt
    python maskgit.py --vqgan eqvqgan.pt --micro-batch 64           # one GPU
    torchrun --nproc_per_node=8 maskgit.py --vqgan eqvqgan.pt       # eight GPUs
    torchrun --nproc_per_node=8 maskgit.py --sample-from maskgit.pt --vqgan eqvqgan.pt

The first torchrun line caches the tokens of data/imagenet/train and of its mirror images in
eqvqgan-tokens/ (1.3 GB; for another data set name another folder with --cache), trains for
1,500,000 steps of 256 images (300 epochs), and writes maskgit.pt, maskgit.jsonl (losses) and
maskgit/ (pictures). The same command again goes on where it was stopped, in caching as in training.
The last line draws 50,000 pictures into maskgit.npz. EQ-VAE's paper reports an FID of 5.9 and an IS
of 229 on EQ-VAE's tokens, 6.8 and 214 on the VQ-GAN's own (Tables 3 and 11).

Lines of train() that are marked "# MaskGIT" are the method's own. A run does not depend on the
number of processes or on --micro-batch, except through dropout, which every forward pass of every
process draws for itself.

From Python:

    model, checkpoint = load_generator("maskgit.pt")    # checkpoint["classes"]: their names
    tokenizer = vqgan.load_vqgan("eqvqgan.pt")
    pictures = generate(model, tokenizer, [207, 360], **PRESETS["256"])
"""

import functools
import itertools
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

VAE_ERROR = None
try:  # training and sampling need the other files; network and decoding do without
    import dit
    import vae
    import vqgan
    from vae import InputError
except ImportError as error:
    dit = vae = vqgan = None
    InputError = ValueError
    VAE_ERROR = error

# name -> arguments of MaskGIT
CONFIGS = {
    # v1.0's "base", which EQ-VAE's paper uses
    "MaskGIT-B": dict(hidden_dim=768, depth=24, heads=16, mlp_dim=3072),
    # ours, for a CPU
    "MaskGIT-Ti": dict(hidden_dim=128, depth=4, heads=4, mlp_dim=512),
}
# name -> settings of sampling. decoding_schedule() explains sampling_steps and decoding,
# parallel_decoding() the others. v1.0's guidance weight w is cfg_scale - 1.
V1 = dict(sampling_steps=8, choice_temperature=4.5, softmax_scale=1.0, decoding="arccos")
PRESETS = {
    # v1.0's for images of 256 pixels, of 512 pixels, and for the pictures in its README
    "256": dict(V1, cfg_scale=4.0),
    "512": dict(V1, sampling_steps=15, cfg_scale=3.8, choice_temperature=7.0),
    "showcase": dict(
        V1, sampling_steps=32, cfg_scale=10.0, choice_temperature=7.0, softmax_scale=1.3
    ),
    # the original MaskGIT's
    "original": dict(V1, cfg_scale=1.0, decoding="cosine"),
}
LABEL_DROP = 0.1  # share of the labels that training replaces by the null class
LABEL_SMOOTHING = 0.1
# What a checkpoint holds besides network and optimiser
ENTRIES = ("step", "args", "vqgan", "classes")


# ==================================================================================================
# The network. Module names are Maskgit-pytorch's, so that its checkpoints load strictly.
#     B batch (b: of one pass)   N tokens of an image   K codes; token K is the mask   D width


class PreNorm(nn.Module):
    """The residual x + fn(norm(x)); the name is v1.0's."""

    def __init__(self, width, fn):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x):  # (B, N + 1, D)
        return x + self.fn(self.norm(x))


class Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, dropout, batch_first=True)

    def forward(self, x):
        # v1.0 also asks for the attention weights, which rules out the fused attention
        return self.mha(x, x, x, need_weights=False)[0]


class FeedForward(nn.Module):
    def __init__(self, width, mlp_dim, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, width),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    def __init__(self, width, depth, heads, mlp_dim, dropout):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = PreNorm(width, Attention(width, heads, dropout))
            mlp = PreNorm(width, FeedForward(width, mlp_dim, dropout))
            self.layers.append(nn.ModuleList([attention, mlp]))

    def forward(self, x):
        for attention, mlp in self.layers:
            x = mlp(attention(x))
        return x


class MaskGIT(nn.Module):
    """A bidirectional transformer over an image's tokens and, after them, its class.

    input_size     tokens a side, h = w
    codebook_size  K; the mask is token K, in the embedding and in the logits
    num_classes    class c is row K + 1 + c of the embedding, the null class its last row
    hidden_dim     D
    depth          layers of attention and MLP
    heads          attention heads
    mlp_dim        width inside the MLPs
    dropout        probability
    """

    def __init__(
        self,
        input_size=16,
        codebook_size=1024,
        num_classes=1000,
        hidden_dim=768,
        depth=24,
        heads=16,
        mlp_dim=3072,
        dropout=0.1,
    ):
        config = dict(locals())
        config.pop("self")
        config.pop("__class__")
        super().__init__()
        self.config = config  # what a checkpoint keeps
        self.checkpoint = {}  # entries of the file that it comes from: load_generator() sets them
        tokens = input_size**2
        rows = codebook_size + 1 + num_classes + 1
        self.tok_emb = nn.Embedding(rows, hidden_dim)  # drawn from N(0, 1), as in v1.0
        positions = torch.empty(1, tokens + 1, hidden_dim)
        self.pos_emb = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))
        self.first_layer = nn.Sequential(
            nn.LayerNorm(hidden_dim, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.LayerNorm(hidden_dim, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
        )
        self.transformer = Transformer(hidden_dim, depth, heads, mlp_dim, dropout)
        self.last_layer = nn.Sequential(
            nn.LayerNorm(hidden_dim, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.LayerNorm(hidden_dim, eps=1e-12),
        )
        self.bias = nn.Parameter(torch.zeros(tokens + 1, rows))  # forward() reads a part

    ANCHOR = "tok_emb.weight"  # vae.find_weights() knows its files by this weight

    @classmethod
    def config_of(cls, weights, codes):
        """The constructor's arguments, from the shapes in a file of Maskgit-pytorch v1.0's and the
        size of the codebook. KeyError or ValueError for another file."""
        if codes is None:
            raise ValueError("give `codes`, the size of the codebook: the file does not tell it")
        places, rows = weights["bias"].shape
        width = weights["tok_emb.weight"].shape[1]
        layers = {name.split(".")[2] for name in weights if name.startswith("transformer.layers.")}
        for size in CONFIGS.values():
            if (size["hidden_dim"], size["depth"]) == (width, len(layers)) and rows >= codes + 2:
                return dict(
                    size,
                    input_size=math.isqrt(places - 1),
                    codebook_size=codes,
                    num_classes=rows - codes - 2,
                )
        raise ValueError(
            f"{len(layers)} blocks of width {width} and {rows} rows: matches no --model "
            f"({', '.join(CONFIGS)}), or is for another codebook than one of {codes} codes"
        )

    @property
    def blocks(self):
        """What torch.compile gets: attention and MLP apart, so that all layers use two graphs."""
        return itertools.chain(*self.transformer.layers)

    def forward(self, tokens, labels):
        """Tokens (B, N) of 0 .. K, labels (B,) of 0 .. num_classes -> logits (B, N, K + 1)."""
        token_rows = self.config["codebook_size"] + 1  # of the embedding; the classes follow
        classes = token_rows + labels[:, None]
        sequence = torch.cat([tokens, classes], dim=1)  # (B, N + 1)
        h = self.first_layer(self.tok_emb(sequence) + self.pos_emb)  # (B, N + 1, D)
        h = self.last_layer(self.transformer(h))[:, :-1]  # (B, N, D)
        # The embedding is also the last linear layer. v1.0 computes the logits of the classes, and
        # those at the class's position, too, and then discards them
        return F.linear(h, self.tok_emb.weight[:token_rows]) + self.bias[:-1, :token_rows]


# ==================================================================================================
# Masks and losses of training


def arccos_ratio(r):
    return torch.arccos(r) / (math.pi / 2)


def cosine_ratio(r):
    return torch.cos(r * math.pi / 2)


# name -> (function of a uniform r in [0, 1) that gives the probability with which each token of an
# image is masked, its mean over r). arccos is v1.0's, cosine the original's.
MASK_SCHEDULES = {"arccos": (arccos_ratio, 2 / math.pi), "cosine": (cosine_ratio, 2 / math.pi)}


def token_losses(logits, tokens, mask=None, mean_ratio=2 / math.pi):
    """Cross entropy (B,) in nats of logits (B, N, K + 1), with label smoothing.

    Without a mask it is the mean over all tokens of an image, masked or not, as in v1.0. With a
    mask it is the sum over the masked tokens, as in the original's paper, divided by a constant,
    their mean number over all mask ratios. (The original's code takes the mean over the masked
    tokens of an image, so those of an image with few have more weight.)
    """
    losses = F.cross_entropy(
        logits.float().transpose(1, 2),
        tokens,
        label_smoothing=LABEL_SMOOTHING,
        reduction="none",
    )  # (B, N)
    if mask is None:
        return losses.mean(dim=1)
    return (losses * mask).mean(dim=1) / mean_ratio


# ==================================================================================================
# Parallel decoding


def decoding_schedule(steps, tokens, kind="arccos"):
    """-> counts, how many tokens each step decides, of `tokens` in all; and ramps, each step's
    progress, 1 in the last one. As it rises, guidance grows and noise fades. ValueError for more
    steps than tokens.

    arccos  v1.0's: step i decides a number in proportion to arccos(1 - i / (steps - 1)), rounded,
            but at least 1; the last step decides the rest
    cosine  the original's: floor(tokens cos(pi / 2 (i + 1) / steps)) stay masked after step i, but
            each step decides at least 1. (v1.0 calls another schedule cosine.)
    """
    if not 1 <= steps <= tokens:
        raise ValueError(f"{steps} steps: give 1 to {tokens}, the number of tokens")
    if kind == "cosine":
        ramps = [(i + 1) / steps for i in range(steps)]
        return cosine_counts(ramps, tokens), ramps
    if steps == 1:
        return [tokens], [1.0]
    shares = torch.arccos(torch.linspace(1, 0, steps))
    counts = (shares / shares.sum() * tokens).round().clamp(min=1).int()
    while int(counts[:-1].sum()) >= tokens:  # the minimum of 1 leaves the last step no token
        counts[counts[:-1].argmax()] -= 1
    counts[-1] = tokens - counts[:-1].sum()
    return counts.tolist(), [i / (steps - 1) for i in range(steps)]


def cosine_counts(ramps, tokens):
    """The counts of decoding_schedule()'s "cosine"."""
    counts = []
    masked = tokens
    for i, ramp in enumerate(ramps):
        # 1e-9, because a whole number may come out a little smaller, as with cos(pi / 3)
        stay = math.floor(tokens * math.cos(math.pi / 2 * ramp) + 1e-9)
        steps_to_come = len(ramps) - 1 - i
        stay = min(masked - 1, max(stay, steps_to_come))  # at least one token for each step
        counts.append(masked - stay)
        masked = stay
    return counts


@torch.no_grad()
def parallel_decoding(
    model,
    labels,
    uniform,
    counts,
    ramps,
    cfg_scale=1.0,
    choice_temperature=4.5,
    softmax_scale=1.0,
):
    """Labels (B,) -> tokens (B, N). Step i draws all unknown tokens and keeps counts[i] of them:
    those with the highest probability, after noise that fades from step to step.

    model               logits (B, N, K + 1) = model(tokens, labels); the null class is label
                        model.config["num_classes"]
    uniform             (B, steps, 2, N) in [0, 1), the only source of randomness: in each step [0]
                        draws the tokens, [1] the noise on their choice
    counts, ramps       of decoding_schedule()
    cfg_scale           guidance: the logits are u + s (c - u), where c is the output with the
                        class, u without, and s = 1 + (cfg_scale - 1) ramp. cfg_scale 1: none
    choice_temperature  the Gumbel noise on the log-probabilities is this times (1 - ramp)
    softmax_scale       multiplies the logits, so more is sharper (v1.0 calls it a temperature)
    """
    codes = model.config["codebook_size"]
    mask_token = codes  # comes after the codes 0 .. codes - 1
    tokens = torch.full((len(labels), uniform.shape[3]), mask_token, device=labels.device)
    for i, (count, ramp) in enumerate(zip(counts, ramps)):
        logits = guided_logits(model, tokens, labels, 1 + (cfg_scale - 1) * ramp)
        # The mask token cannot be drawn here. v1.0 allows it, and at the end turns the masks that
        # are left into code K - 1
        probabilities = (logits[..., :codes].float() * softmax_scale).softmax(dim=2)  # (B, N, K)
        draw = uniform[:, i, 0, :, None]  # (B, N, 1)
        sampled = (probabilities.cumsum(dim=2) <= draw).sum(dim=2)  # (B, N)
        sampled = sampled.clamp(max=codes - 1)  # the sum of all may round to less than `draw`
        confidence = probabilities.gather(2, sampled[..., None])[..., 0]
        confidence = confidence.clamp(min=1e-37).log()  # above -inf, which known tokens get
        gumbel = -torch.log(-torch.log(uniform[:, i, 1].clamp(min=1e-20)))
        confidence = confidence + choice_temperature * (1 - ramp) * gumbel
        confidence = confidence.masked_fill(tokens != mask_token, -math.inf)
        surest = confidence.topk(count, dim=1).indices  # (B, count)
        tokens = tokens.scatter(1, surest, sampled.gather(1, surest))
    return tokens


def guided_logits(model, tokens, labels, scale):
    """Classifier-free guidance of the logits, u + scale (c - u). Scale 1 skips the null class."""
    if scale == 1:
        return model(tokens, labels)
    null = torch.full_like(labels, model.config["num_classes"])
    both = model(torch.cat([tokens, tokens]), torch.cat([labels, null]))
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


# ==================================================================================================
# Training


def train(args, rank, world, device):
    # The run to go on with, if there is one. (args get its values for flags that were not given.)
    # Then the tokenizer, with its file and hash, and the images, which set its latent_size
    resumed = vae.load_run(args, "MaskGIT", CONFIGS, required=ENTRIES)
    torch.manual_seed(args.seed)
    tokenizer, source = load_tokenizer(args, resumed, device)
    images = dit.open_images(args, tokenizer)
    null = len(images.classes)  # the label that stands for no class
    codes = tokenizer.config["n_embed"]  # K
    mask_token = codes  # the first number that is no code
    micro_batch = vae.images_per_pass(args, world)

    # The network and its optimiser, with v1.0's settings. Unlike DiT, SiT and REPA, v1.0 keeps no
    # average of the weights
    side = tokenizer.latent_size[0]
    config = dict(CONFIGS[args.model], input_size=side, codebook_size=codes, num_classes=null)
    config["dropout"] = args.dropout
    model = dit.start_network(MaskGIT, config, args, resumed, images).to(device).train()
    parameters = vae.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.96), weight_decay=1e-5, fused=True)
    vae.restore_optimizers([optimizer], resumed)
    dit.compile_blocks(args, model.blocks)
    network = dit.distribute(model, device, world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    mask_ratio, mean_ratio = MASK_SCHEDULES[args.mask_schedule]  # MaskGIT

    step = resumed["step"] if resumed else 0
    vae.check_same_start(step, model, images, source)  # compares processes
    blank = torch.zeros(1, side**2, dtype=torch.long, device=device)
    vae.say_duration(args, step, device, lambda: model(blank, blank[:, 0]))
    data = token_data(args, rank, world, device, tokenizer, source, images)
    batches = vae.endless_batches(data, args, step, rank, world)
    log = vae.Log(args, step, world, device)
    vae.say_start(args, model, data, world, micro_batch, device, images.classes)
    first_step = step
    if resumed is None:
        preview(args, step, log, model, tokenizer, autocast)
    resumed = None  # frees the loaded tensors
    log.begin(step)

    while step < args.steps and not vae.stop_signal():
        # ------------------------------------------------------------------------------------------
        # TRAINING STEP. All that is random in it is a function of (seed, step), drawn for the whole
        # batch; this process takes its share. Dropout is a function of (seed, step, pass, process)
        _, rng = vae.step_rngs(args.seed, step, device)  # (on the CPU, on the device)
        tokens, labels, _, _ = next(batches)  # (B / world, N), (B / world,); cached, so readable
        shape = (args.batch_size, 2 + side**2)
        uniform = vae.rank_slice(torch.rand(shape, generator=rng, device=device), rank, world)
        ratio_draw, drop_draw, mask_draw = uniform.split([1, 1, side**2], dim=1)
        tokens = tokens.to(device, non_blocking=True).long()
        mask = mask_draw < mask_ratio(ratio_draw)  # MaskGIT: (B / world, N)
        y = torch.where(drop_draw[:, 0] < LABEL_DROP, null, labels.to(device, non_blocking=True))
        lr = args.lr * min(1, (step + 1) / max(1, args.warmup))  # v1.0's warm-up
        optimizer.param_groups[0]["lr"] = lr

        passes = len(tokens) // micro_batch
        for k in range(passes):
            rows = slice(k * micro_batch, (k + 1) * micro_batch)
            # nn.Dropout draws from torch's global generators; seeded() turns a key into their seed
            dropout_rng = vae.seeded(args.seed, "dropout", step, k, rank)
            torch.manual_seed(dropout_rng.initial_seed())
            visible = tokens[rows].masked_fill(mask[rows], mask_token)  # MaskGIT
            with dit.sync_gradients(network, is_last=k == passes - 1):
                with autocast:
                    logits = network(visible, y[rows])  # (b, N, K + 1)
                loss_mask = mask[rows] if args.masked_only else None
                loss = token_losses(logits, tokens[rows], loss_mask, mean_ratio).mean()  # MaskGIT
                (loss / passes).backward()
            log.add(loss=loss, **accuracies(logits, tokens[rows], mask[rows]))

        # The step. If the gradients' norm is not finite, the weights stay. The host need not wait
        # for the norm, since a fused optimiser does nothing where its attribute found_inf is 1
        # (made for GradScaler, which is not used here)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, grad_norm)  # v1.0 clips, too
        skipped = (~grad_norm.isfinite()).float()
        optimizer.found_inf = skipped
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        # ------------------------------------------------------------------------------------------
        log.step(step, skipped, grad_norm, lr)
        if vae.is_due(step, args.sample_every, last=args.steps):
            preview(args, step, log, model, tokenizer, autocast)
        if vae.is_due(step, args.save_every) and step < args.steps:
            dit.save(args, step, model, optimizer, images, vqgan=source)

    # A run that went no step is saved only if it has no file yet: a finished one is left as it is
    if step > first_step or not os.path.exists(args.out):
        dit.save(args, step, model, optimizer, images, vqgan=source)
    log.end(step)


def accuracies(logits, tokens, mask):
    """Logged values: the share of right tokens, among all and among an image's masked ones, and the
    share of masked tokens."""
    right = logits.argmax(dim=2) == tokens  # (b, N)
    right_masked = (right & mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return dict(accuracy=right, accuracy_masked=right_masked, masked=mask)


def load_tokenizer(args, checkpoint, device):
    """The VQ-GAN in --vqgan, on the device, and its file and hash, for checkpoints and caches.

    checkpoint  the generator's entries, if there is one: the VQ-GAN must be the one that it was
                trained on
    """
    if not args.vqgan:
        raise InputError(
            "--vqgan: name the VQ-GAN on whose tokens to train, or on which the generator was "
            "trained (vqgan.py makes one: eqvqgan.pt)"
        )
    tokenizer = vqgan.load_vqgan(args.vqgan)
    tokenizer.sha256 = vae.weights_hash(tokenizer)
    source = dict(file=str(args.vqgan), sha256=tokenizer.sha256)
    if checkpoint:
        dit.check_source(f"--vqgan {args.vqgan}", tokenizer, checkpoint["vqgan"])
    if tokenizer.config["n_embed"] > 2**15:
        raise InputError(f"--vqgan {args.vqgan}: has more than the 32,768 codes that fit 16 bits")
    return tokenizer.to(device), source


@torch.no_grad()
def preview(args, step, log, model, tokenizer, autocast):
    """Writes OUT/0001000.png: 16 samples without guidance, of the same random numbers and labels
    each time."""
    if not vae.MAIN or not args.sample_every:
        return
    device = next(model.parameters()).device
    n = model.config["input_size"] ** 2
    counts, ramps = decoding_schedule(min(8, n), n)
    shape = (16, len(counts), 2, n)
    uniform = torch.rand(shape, generator=vae.seeded(args.seed, "look")).to(device)
    labels = torch.arange(16, device=device) % max(1, model.config["num_classes"])
    model.eval()
    with autocast:
        tokens = parallel_decoding(model, labels, uniform, counts, ramps)
    model.train()
    log.picture(step, vae.image_grid(tokenizer.decode(tokens).split(8)))


# ==================================================================================================
# The tokens: encoded once, of each picture and its mirror image


def token_data(args, rank, world, device, tokenizer, source, images):
    """dit.CachedViews of the images' tokens, cached in --cache, or in NAME-tokens/ beside the
    VQ-GAN's NAME.pt."""

    def encode(batch):
        with vae.full_precision():  # TF32 would change some tokens
            return tokenizer.encode(vae.to_float(batch, device)).short()

    folder = dit.cache_folder(args, args.vqgan, "tokens")
    shape = (math.prod(tokenizer.grid(images.size)),)
    made_of = dict(vqgan=source["sha256"])
    return dit.cached(args, rank, world, folder, images, encode, shape, "int16", made_of)


# ==================================================================================================
# Sampling, from Python: load_generator() and generate()


def load_generator(file, codes=None):
    """dit.load_generator() for MaskGIT's files. The entry "vqgan" is file and hash of its VQ-GAN.

    codes  size of the VQ-GAN's codebook, for files of Maskgit-pytorch's, which do not say where the
           codes end and the classes begin
    """
    if dit is None:
        raise ImportError(
            f"load_generator() needs dit.py, vqgan.py, vae.py, eqloss.py ({VAE_ERROR})"
        )
    model, checkpoint = dit.load_generator(file, MaskGIT, ENTRIES, codes=codes)
    codebook_size = model.config["codebook_size"]
    if codes not in (None, codebook_size):
        raise InputError(f"{file}: made for a codebook of {codebook_size} codes, not of {codes}")
    return model, checkpoint


@torch.no_grad()
def generate(
    model,
    tokenizer,
    labels,
    seed=0,
    indices=None,
    sampling_steps=8,
    decoding="arccos",
    precision="fp32",
    **options,
):
    """Draws a picture for each of the labels, N numbers or names of classes: uint8 (N, H, W, 3).

    model      of load_generator(), on any device
    tokenizer  vqgan.load_vqgan()'s, on the same device: the one of the generator's training.
               Another raises InputError, which is a ValueError. (Official files do not tell
               theirs)
    indices    numbers of the pictures (default: 0 .. N - 1). Apart from rounding, a picture is a
               function of (seed, its number, its label) and of the settings
    options    cfg_scale, choice_temperature, softmax_scale of parallel_decoding()

    Pictures are clamped to [-1, 1]. (v1.0 stretches each by its own minimum and maximum.)
    """
    device = next(model.parameters()).device
    n = model.config["input_size"] ** 2
    counts, ramps = decoding_schedule(sampling_steps, n, decoding)
    labels = dit.check_labels(labels, model, precision).to(device)
    if model.checkpoint:
        dit.check_source("tokenizer", tokenizer, model.checkpoint["vqgan"])
    if indices is None:
        indices = range(len(labels))
    rngs = [vae.seeded(seed, "sample", int(i)) for i in indices]
    uniform = [torch.rand(len(counts), 2, n, generator=rng) for rng in rngs]
    uniform = vae.to_device(torch.stack(uniform), device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        tokens = parallel_decoding(model, labels, uniform, counts, ramps, **options)
    return dit.decode_pictures(tokenizer.decode, tokens)


# --------------------------------------------------------------------------------------------------
# Sampling, from the command line


def sample(args, rank, world, device):
    """Fills --samples. All arguments are checked before anything is written."""
    out = dit.samples_path(args, world)
    tokenizer, source = load_tokenizer(args, None, device)
    model, checkpoint = load_generator(args.sample_from, tokenizer.config["n_embed"])
    if checkpoint:
        dit.check_source(f"--vqgan {args.vqgan}", tokenizer, checkpoint["vqgan"])
    settings = sampling_settings(args, model.config)
    record = dit.sampling_record(args, model, source, CONFIGS)
    record |= dict(preset=args.preset, **settings)
    make_pictures = functools.partial(generate, model.to(device), tokenizer, **settings)
    side = model.config["input_size"] * tokenizer.factor
    calls = settings["sampling_steps"]
    dit.write_samples(args, rank, world, out, model, side, make_pictures, calls, record)


def sampling_settings(args, config):
    """The settings of --preset, overridden by the flags that were given."""
    settings = dict(PRESETS[args.preset])
    if not config["num_classes"]:
        settings["cfg_scale"] = 1.0  # without classes there is nothing to guide by
    for name in settings:
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    n = config["input_size"] ** 2
    if not 1 <= settings["sampling_steps"] <= n:
        raise InputError(
            f"--sampling-steps {settings['sampling_steps']}: must be 1 to {n}, the number of tokens"
        )
    dit.check_guidance(settings["cfg_scale"], config["num_classes"])
    return settings


# ==================================================================================================
# The command line


def main():
    if vae is None:
        raise SystemExit(
            "maskgit.py: to train or sample, put dit.py, vqgan.py, vae.py and eqloss.py beside it "
            f"({VAE_ERROR})"
        )
    parser, generator, sampling = dit.arguments(__doc__, CONFIGS, "maskgit.pt", steps=1_500_000)
    add = generator.add_argument
    add("--vqgan", help="file of the VQ-GAN, vqgan.py's or taming-transformers'")
    text = "steps in which the rate rises to --lr"
    add("--warmup", type=vae.whole_number, default=2500, help=text)
    add("--dropout", type=vae.probability, default=0.1, help="in training")
    text = "how mask ratios are drawn: v1.0's way, or the original's"
    add("--mask-schedule", choices=MASK_SCHEDULES, default="arccos", help=text)
    add("--masked-only", action="store_true", help="loss on masked tokens alone")
    add = sampling.add_argument
    add("--preset", choices=PRESETS, default="256", help="defaults of the five flags below")
    add("--sampling-steps", type=vae.positive_int, help="default: the preset's")
    text = "guidance at the last step; 1: none (default: the preset's)"
    add("--cfg-scale", type=vae.non_negative, help=text)
    add("--choice-temperature", type=vae.non_negative, help="default: the preset's")
    add("--softmax-scale", type=vae.positive_number, help="default: the preset's")
    add("--decoding", choices=("arccos", "cosine"), help="default: the preset's")
    dit.launch(parser, train, sample)


if __name__ == "__main__":
    main()
