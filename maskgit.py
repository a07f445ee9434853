"""MaskGIT on a VQ-GAN's tokens, the paper's discrete generator.

MaskGIT (https://arxiv.org/abs/2202.04200) learns to fill in the masked tokens of an image, all at once, and draws a new
one from masks alone in a few steps, each of which keeps the tokens it is surest of. This is the network of its PyTorch
reproduction (https://arxiv.org/abs/2310.14400, Maskgit-pytorch v1.0), which the paper trains on the tokens of VQ-GANs
with and without EQ-VAE's fine-tuning (Table 3). This file holds network, masks, token cache, training and decoding.

    python maskgit.py --vqgan tiny-vq.pt --data emoji --image-size 32 --model MaskGIT-Ti --batch-size 64 --steps 800 \\
        --lr 1e-3 --warmup 100 --out tiny-maskgit.pt           # a CPU, minutes; `bash demo.sh --all` does it for both
    python maskgit.py --vqgan eqvqgan.pt --micro-batch 64                              # one GPU
    torchrun --nproc_per_node=8 maskgit.py --vqgan eqvqgan.pt                          # eight: the paper's recipe
    torchrun --nproc_per_node=8 maskgit.py --sample-from maskgit.pt --vqgan eqvqgan.pt --samples maskgit.npz

The third line caches the tokens of data/imagenet/train and of its mirror images in eqvqgan-tokens/ (1.3 GB), takes
1,500,000 steps of 256 (300 epochs) and writes maskgit.pt, with maskgit.jsonl (losses) and maskgit/ (pictures) beside
it. Run again, it goes on where it stopped. The fourth draws 50,000 pictures. To expect (Tables 3, 11): gFID 5.9, IS 229
on EQ-VAE's tokens, 6.8 and 214 on the VQ-GAN's own.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CONFIGS = {  # name -> arguments of MaskGIT
    "MaskGIT-B": dict(
        hidden_dim=768, depth=24, heads=16, mlp_dim=3072
    ),  # v1.0's "base": the paper's
    "MaskGIT-Ti": dict(hidden_dim=128, depth=4, heads=4, mlp_dim=512),
}
# Published sampling settings. v1.0's guidance weight w is cfg_scale - 1.
PRESETS = {
    "256": dict(
        sampling_steps=8,
        cfg_scale=4.0,
        choice_temperature=4.5,
        softmax_scale=1.0,
        decoding="arccos",
    ),
    "512": dict(
        sampling_steps=15,
        cfg_scale=3.8,
        choice_temperature=7.0,
        softmax_scale=1.0,
        decoding="arccos",
    ),
    "showcase": dict(
        sampling_steps=32,
        cfg_scale=10.0,
        choice_temperature=7.0,
        softmax_scale=1.3,
        decoding="arccos",
    ),
    "original": dict(
        sampling_steps=8,
        cfg_scale=1.0,
        choice_temperature=4.5,
        softmax_scale=1.0,
        decoding="cosine",
    ),
}
LABEL_DROP = 0.1  # share of labels trained as the null class
LABEL_SMOOTHING = 0.1

# ======================================================================================================================
# The network. Module names are Maskgit-pytorch's, so that its checkpoints load strictly.
#     B batch   N tokens of an image   K codes; token K is the mask   D width   V = K + 1 + classes + 1


class PreNorm(nn.Module):
    """x + fn(norm(x))."""

    def __init__(self, width, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x):  # (B, N + 1, D)
        return x + self.fn(self.norm(x))


class Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, dropout, batch_first=True)

    def forward(self, x):  # need_weights, v1.0's, would keep it from the fused attention
        return self.mha(x, x, x, need_weights=False)[0]


class FeedForward(nn.Module):
    def __init__(self, width, hidden, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    def __init__(self, width, depth, heads, hidden, dropout):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(width, Attention(width, heads, dropout)),
                    PreNorm(width, FeedForward(width, hidden, dropout)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x):
        for attention, mlp in self.layers:
            x = mlp(attention(x))
        return x


class MaskGIT(nn.Module):
    """A bidirectional transformer over an image's tokens and, after them, its class.

    input_size      tokens a side, h = w
    codebook_size   K; the mask is token K, in the embedding and in the logits
    num_classes     0: without classes. Class c is row K + 1 + c of the embedding, the null class the last
    hidden_dim, depth, heads, mlp_dim, dropout    D, blocks, attention heads, width between an MLP's layers, share
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
        config = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().__init__()
        self.config = config  # what a checkpoint keeps
        tokens, rows = input_size**2, codebook_size + 1 + num_classes + 1
        self.tok_emb = nn.Embedding(rows, hidden_dim)  # N(0, 1), and no scale to the logits
        self.pos_emb = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, tokens + 1, hidden_dim), std=0.02)
        )
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
        self.bias = nn.Parameter(torch.zeros(tokens + 1, rows))  # of each place and row

    def forward(self, tokens, labels):
        """Tokens (B, N), 0 .. K, labels (B,), 0 .. num_classes (null) -> logits (B, N, K + 1)."""
        known = self.config["codebook_size"] + 1
        sequence = torch.cat([tokens, known + labels[:, None]], dim=1)  # (B, N + 1), the class last
        h = self.first_layer(self.tok_emb(sequence) + self.pos_emb)  # (B, N + 1, D)
        h = self.last_layer(self.transformer(h))[:, :-1]  # (B, N, D)
        # Tied to the embedding. v1.0 computes the logits of the classes and of the last place too, and cuts them off
        return F.linear(h, self.tok_emb.weight[:known]) + self.bias[:-1, :known]


# ======================================================================================================================
# Masks and losses of training, and parallel decoding


def mask_ratio(r, schedule="arccos"):
    """Uniform r in [0, 1) -> the share of tokens to mask, 2 / pi in the mean: arccos (v1.0) or cosine (original)."""
    return torch.arccos(r) / (math.pi / 2) if schedule == "arccos" else torch.cos(r * math.pi / 2)


def token_losses(logits, tokens, mask=None):
    """Cross entropy (B,) in nats of logits (B, N, K + 1), with label smoothing, the mean over an image's tokens as
    v1.0 has it. With a mask, over the masked ones, as the original; divided by their expected number, so that images
    with few do not count for more, and processes and micro-batches need not know of each other's."""
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), tokens, label_smoothing=LABEL_SMOOTHING, reduction="none"
    )
    return losses.mean(dim=1) if mask is None else (losses * mask).mean(dim=1) * (math.pi / 2)


def decoding_schedule(steps, tokens, kind="arccos"):
    """-> (the number of tokens to decide in each step, together `tokens`, each step's ramp from 0 to 1).

    arccos    v1.0's: in proportion to arccos(1 - i / (steps - 1)), rounded, at least 1, the rest in the last step
    cosine    the original's: floor(tokens cos(pi / 2 (i + 1) / steps)) stay masked after step i; not v1.0's "cosine"
    """
    if kind == "cosine":
        ramps = [(i + 1) / steps for i in range(steps)]
        left = [tokens]
        for i, ramp in enumerate(ramps):  # at least one a step, and one for each step to come
            stay = math.floor(tokens * math.cos(math.pi / 2 * ramp) + 1e-9)
            left.append(min(left[-1] - 1, max(stay, steps - 1 - i)))
        return [before - after for before, after in zip(left, left[1:])], ramps
    shares = torch.arccos(torch.linspace(1, 0, steps)) if steps > 1 else torch.ones(1)
    counts = (shares / shares.sum() * tokens).round().clamp(min=1).int()
    while int(counts[:-1].sum()) >= tokens:  # many steps: those of one token would fill the grid
        counts[counts[:-1].argmax()] -= 1
    counts[-1] = tokens - counts[:-1].sum()
    return counts.tolist(), [i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]


@torch.no_grad()
def parallel_decoding(
    model, labels, uniform, counts, ramps, cfg_scale=1.0, choice_temperature=4.5, softmax_scale=1.0
):
    """Labels (B,) -> tokens (B, N). Each step draws all the unknown tokens and keeps the counts[i] most confident.

    model                logits (B, N, K + 1) = model(tokens, labels); the null class must be model.config's last
    uniform              (B, steps, 2, N) in [0, 1), all that is random
    counts, ramps        of decoding_schedule()
    cfg_scale            guidance, u + s (c - u) with s going from 1 to cfg_scale over the steps; 1: none
    choice_temperature   of the Gumbel noise on the confidence, going to 0 over the steps
    softmax_scale        multiplies the logits (v1.0 calls it a temperature)
    """
    mask, null = model.config["codebook_size"], model.config["num_classes"]
    tokens = torch.full((len(labels), uniform.shape[3]), mask, device=labels.device)
    for i, (count, ramp) in enumerate(zip(counts, ramps)):
        scale = 1 + (cfg_scale - 1) * ramp
        if scale == 1:
            logits = model(tokens, labels)
        else:
            both = torch.cat([tokens, tokens]), torch.cat([labels, torch.full_like(labels, null)])
            conditional, unconditional = model(*both).chunk(2)
            logits = unconditional + scale * (conditional - unconditional)
        # Without the mask's logit. v1.0 may draw the mask, leave it in the sequence, and take the code K - 1 at the end
        probabilities = (logits[..., :mask].float() * softmax_scale).softmax(dim=2)  # (B, N, K)
        draw, noise = (
            uniform[:, i, 0, :, None],
            uniform[:, i, 1].clamp(min=1e-20),
        )  # (B, N, 1), (B, N)
        drawn = (probabilities.cumsum(dim=2) <= draw).sum(dim=2).clamp(max=mask - 1)  # (B, N)
        confidence = probabilities.gather(2, drawn[..., None])[..., 0].log()
        confidence = confidence - choice_temperature * (1 - ramp) * torch.log(
            -torch.log(noise)
        )  # Gumbel's
        confidence = confidence.masked_fill(tokens != mask, -math.inf)
        surest = confidence.topk(count, dim=1).indices  # (B, count)
        tokens = tokens.scatter(1, surest, drawn.gather(1, surest))
    return tokens


def file_hash(path):
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    digest.update(np.memmap(path, mode="r"))
    return digest.hexdigest()


# ======================================================================================================================
# The tokens: encoded once, of each image and its mirror image


class Tokens(torch.utils.data.Dataset):
    """What MaskGIT trains on: the tokens of `images` (vae.Images) and of their mirror images under a VQ-GAN, on disk.

    Items are (tokens (N,), label, slot, 0), half of them mirrored, a function of (seed, step, slot). An earlier run's
    tokens are gone on with, if they belong to the same VQ-GAN and images.
    """

    def __init__(self, args, rank, world, device, vqgan, sha256, images):
        import vae

        self.seed, self.mirror, self.labels = args.seed, args.mirror, images.labels
        root, files = (
            os.path.normpath(args.data),
            images.files,
        )  # emoji are no files: [] stands for them
        names = [file[len(root) :] for file in files if isinstance(file, str)]
        sizes = [
            os.path.getsize(root + names[int(k)])
            for k in np.linspace(0, len(names) - 1, 256 * bool(names))
        ]
        same = hashlib.sha256(json.dumps([len(files), names, sizes]).encode()).hexdigest()
        shape = (len(files), 2, math.prod(vqgan.grid(images.size)))
        folder = args.cache or f"{os.path.splitext(os.path.normpath(args.vqgan))[0]}-tokens"
        cache = vae.Rows(folder, shape, "int16", images=same, image_size=images.size, vqgan=sha256)
        missing = cache.missing[rank::world]
        batches = torch.utils.data.DataLoader(
            torch.utils.data.Subset(images, missing.tolist()),
            min(32, args.micro_batch or 32),
            num_workers=args.workers,
            worker_init_fn=vae.leave_signals,
            pin_memory=device.type == "cuda",
        )
        bar = vae.progress(len(missing), 0, "caching tokens", "image")
        for batch, _, index, _ in batches if len(missing) else ():
            if vae.SIGNALS:
                break
            with torch.no_grad():  # in fp32: codes are what is learned from
                parts = [
                    vqgan.encode(vae.to_float(view, device)) for view in (batch, batch.flip(3))
                ]
            cache.write(index.numpy(), torch.stack(parts, dim=1).short().cpu().numpy())
            bar.update(len(batch))
        bar.close()
        if stopped := vae.stop_signal():  # for which each process waits until all are done
            vae.say(
                f"stopped: {int(cache.done.sum()):,} of {len(files):,} images are cached; the same command goes on"
            )
            raise SystemExit(128 + stopped)
        self.rows, codes = cache.rows, vqgan.config["n_embed"]
        if self.rows.min() < 0 or self.rows.max() >= codes:
            raise vae.InputError(
                f"{folder}: holds tokens {self.rows.min()} to {self.rows.max()}, but the codebook of "
                f"{args.vqgan} has {codes} codes; delete it"
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        import vae

        index, *key = item
        mirrored = self.mirror and bool(
            torch.randint(2, (), generator=vae.seeded(self.seed, "mirror", *key))
        )
        return (
            torch.from_numpy(self.rows[index, int(mirrored)]).long(),
            self.labels[index],
            key[1],
            0,
        )


# ======================================================================================================================
# Training


def train(args, rank, world, device):
    import vae
    import vqgan

    torch.manual_seed(args.seed)
    out = Path(args.out)
    if not args.vqgan:
        raise vae.InputError(
            "--vqgan: give the VQ-GAN on whose tokens to train (vqgan.py makes one: eqvqgan.pt)"
        )
    tokenizer = vqgan.load_vqgan(args.vqgan).to(device)
    about = dict(file=args.vqgan, sha256=file_hash(args.vqgan))
    images = vae.Images(args.data, (args.image_size, args.image_size))
    side, classes = tokenizer.grid(images.size)[0], images.classes
    resumed = vae.load(out) if out.exists() and not args.bench else None
    model = MaskGIT(
        side, tokenizer.config["n_embed"], len(classes), dropout=args.dropout, **CONFIGS[args.model]
    )
    if resumed:
        wrong = (
            "holds another model than --model " + args.model
            if resumed.get("arch") != "MaskGIT" or resumed["args"]["model"] != args.model
            else f"trained on the tokens of another VQ-GAN ({resumed['vqgan']['file']})"
            if resumed["vqgan"]["sha256"] != about["sha256"]
            else "trained on grids of another size, with other classes or dropout"
            if resumed["config"] != model.config
            else None
        )
        if wrong:
            raise vae.InputError(f"{out}: {wrong}; give another --out")
        vae.say_changes(resumed["args"], vars(args))
        vae.load_weights(model, resumed["model"], out)
    began = resumed["step"] if resumed else None
    step = began or 0
    micro, accumulate = vae.split_batch(args, world)
    meter = vae.Meter(args, resumed, world, device)
    data = Tokens(args, rank, world, device, tokenizer, about["sha256"], images)
    model.to(device).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, args.lr, betas=(0.9, 0.96), weight_decay=1e-5, fused=True
    )
    if resumed:
        optimizer.load_state_dict(resumed["opt"])
    resumed = None  # or it would stay in memory
    for layer in model.transformer.layers if args.compile else ():
        for block in layer:
            block.compile()
    network = (
        model
        if world == 1
        else nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    @torch.no_grad()
    def look():
        """Samples from the same noise and labels each time, in a grid."""
        counts, ramps = decoding_schedule(min(8, side**2), side**2)
        uniform = torch.rand(
            16, len(counts), 2, side**2, generator=vae.seeded(args.seed, "look")
        ).to(device)
        labels = torch.arange(16, device=device) % max(1, len(classes))
        with autocast:
            tokens = parallel_decoding(model.eval(), labels, uniform, counts, ramps)
        vae.image_grid(tokenizer.decode(tokens).split(8)).save(
            out.with_suffix("") / f"{step:07d}.png"
        )
        model.train()

    def save():
        vae.save_checkpoint(
            out,
            dict(
                arch="MaskGIT",
                config=model.config,
                model=model.state_dict(),
                step=step,
                opt=optimizer.state_dict(),
                args=vars(args),
                vqgan=about,
                classes=classes,
            ),
        )

    vae.say(
        f"{args.model}: {sum(p.numel() for p in parameters):,} parameters; {len(data):,} images, {len(classes)} "
        f"classes, {side} x {side} tokens of {tokenizer.config['n_embed']:,}; steps {step} to {args.steps} of "
        f"{args.batch_size} ({world} x {accumulate} x {micro}), lr {args.lr:g}; {device.type}, {args.precision}"
    )
    batches = vae.loader(data, args, micro, step, rank, world)
    meter.start(step)
    while True:
        stopped = vae.stop_signal()
        last = step >= args.steps or stopped
        if rank == 0 and not args.bench and step != began:  # a run that was over stays as it is
            if args.sample_every and (step % args.sample_every == 0 or step >= args.steps):
                look()
            if step % args.save_every == 0 or last:
                save()
        if last:
            break
        # --------------------------------------------------------------------------------------------------------------
        # TRAINING STEP
        optimizer.param_groups[0]["lr"] = lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
        for part in range(accumulate):
            tokens, labels, slots, _ = next(batches)  # (b, N), (b,), (b,)
            uniform = torch.stack(
                [
                    torch.rand(2 + side**2, generator=vae.seeded(args.seed, "mask", step, int(k)))
                    for k in slots
                ]
            )  # (b, 2 + N)
            mask = uniform[:, 2:] < mask_ratio(uniform[:, :1], args.mask_schedule)  # (b, N)
            labels = torch.where(uniform[:, 1] < LABEL_DROP, len(classes), labels)
            tokens, mask, labels = (
                each.to(device, non_blocking=True) for each in (tokens, mask, labels)
            )
            torch.manual_seed(
                vae.seeded(args.seed, "dropout", step, part, rank).initial_seed()
            )  # for a resume
            wait = world > 1 and part < accumulate - 1  # processes average gradients last
            with network.no_sync() if wait else contextlib.nullcontext():
                with autocast:
                    logits = network(tokens.masked_fill(mask, tokenizer.config["n_embed"]), labels)
                loss = token_losses(logits, tokens, mask if args.masked_only else None).mean()
                (loss / accumulate).backward()
            right = logits.argmax(dim=2) == tokens
            meter.add(
                loss=loss,
                accuracy=right,
                accuracy_masked=(right & mask).sum() / mask.sum().clamp(min=1),
                masked=mask,
            )
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, grad_norm)
        optimizer.found_inf = (
            ~grad_norm.isfinite()
        ).float()  # skips the step, as under AMP, without a host sync
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        # --------------------------------------------------------------------------------------------------------------
        meter.step(step, grad_norm, optimizer.found_inf, lr)
    meter.bar.close()
    vae.say(f"{out}: {'stopped' if stopped else 'finished'} at step {step} of {args.steps}")
    if stopped := vae.stop_signal():  # for which the other processes wait until all is saved
        raise SystemExit(128 + stopped)


# ======================================================================================================================
# Sampling


def read_maskgit(path, codes):
    """-> (MaskGIT's arguments, weights, our checkpoint or {}) of our files and of Maskgit-pytorch's, for a VQ-GAN of so
    many codes: theirs do not tell codes from classes."""
    import vae

    checkpoint = vae.load(path)
    if "arch" in checkpoint:
        if checkpoint["arch"] != "MaskGIT":
            raise vae.InputError(f"{path}: holds a {checkpoint['arch']}, not a MaskGIT")
        config, weights = checkpoint["config"], checkpoint["model"]
    else:
        weights = checkpoint.get("model_state_dict", checkpoint)
        weights = {str(key).removeprefix("module."): value for key, value in weights.items()}
        if "tok_emb.weight" not in weights or "bias" not in weights:
            raise vae.InputError(
                f"{path}: no MaskGIT in it, neither in our layout nor in Maskgit-pytorch's v1.0"
            )
        (places, rows), width = weights["bias"].shape, weights["tok_emb.weight"].shape[1]
        depth = len({key.split(".")[2] for key in weights if key.startswith("transformer.layers.")})
        network = next(
            (c for c in CONFIGS.values() if (c["hidden_dim"], c["depth"]) == (width, depth)), None
        )
        if not network or rows < codes + 2:
            raise vae.InputError(
                f"{path}: {depth} blocks of width {width} and {rows} rows: of no preset "
                f"({', '.join(CONFIGS)}), or for another codebook than one of {codes}"
            )
        config = dict(
            network,
            input_size=math.isqrt(places - 1),
            codebook_size=codes,
            num_classes=rows - codes - 2,
        )
        checkpoint = {}
    if config["codebook_size"] != codes:
        raise vae.InputError(
            f"{path}: made for a codebook of {config['codebook_size']} codes, not of {codes}"
        )
    return config, weights, checkpoint


@torch.no_grad()
def sample(args, rank, world, device):
    """Fills args.samples, ADM's layout (arr_0: uint8 (N, H, W, 3); arr_1: labels). Sample i depends on (seed, i) alone,
    to rounding. What is decoded is clamped to [-1, 1], never stretched by its own minimum and maximum."""
    import vae
    import vqgan

    # What can be wrong with the arguments is found before anything is written
    out, count = Path(args.samples or Path(args.sample_from).with_suffix(".npz")), args.num_samples
    if not args.vqgan:
        raise vae.InputError("--vqgan: give the VQ-GAN on whose tokens the generator was trained")
    tokenizer = vqgan.load_vqgan(args.vqgan).to(device)
    config, weights, about = read_maskgit(args.sample_from, tokenizer.config["n_embed"])
    sha256 = {file: file_hash(file) for file in (args.sample_from, args.vqgan)}
    if about and about["vqgan"]["sha256"] != sha256[args.vqgan]:
        raise vae.InputError(
            f"--vqgan {args.vqgan}: {args.sample_from} was trained on the tokens of another VQ-GAN "
            f"({about['vqgan']['file']}, SHA-256 {about['vqgan']['sha256'][:16]})"
        )
    model = (
        vae.load_weights(MaskGIT(**config), weights, args.sample_from)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    given = dict(
        sampling_steps=args.sampling_steps,
        cfg_scale=args.cfg_scale,
        decoding=args.decoding,
        choice_temperature=args.choice_temperature,
        softmax_scale=args.softmax_scale,
    )
    settings = PRESETS[args.preset] | {
        name: value for name, value in given.items() if value is not None
    }
    classes, tokens, steps = (
        config["num_classes"],
        config["input_size"] ** 2,
        settings["sampling_steps"],
    )
    if not 1 <= steps <= tokens:
        raise vae.InputError(f"--sampling-steps {steps}: 1 to {tokens}, the tokens of a picture")
    if args.cfg_scale is None and not classes:  # the preset's is for generators with classes
        settings["cfg_scale"] = 1.0
    scale = settings["cfg_scale"]
    if scale < 0 or scale != 1 and not classes:
        raise vae.InputError(
            f"--cfg-scale {scale:g}: at least 0, and 1 for a generator without classes"
        )
    if count < world:
        raise vae.InputError(
            f"--num-samples {count}: fewer than the {world} processes; at least one each"
        )
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise vae.InputError(
            f"--samples {out}: give a name that ends in .npz, in a folder that is there"
        )
    known = [str(label) for label in range(max(1, classes))]
    if args.labels == "uniform":
        labels = [
            int(torch.randint(len(known), (), generator=vae.seeded(args.seed, "label", i)))
            for i in range(count)
        ]
    else:
        given = known if args.labels == "balanced" else args.labels.split(",")
        if not set(given) <= set(known):
            raise vae.InputError(
                f"--labels {args.labels}: uniform, balanced, or some of 0 to {known[-1]}, as 0,0,0"
            )
        labels = [int(given[i % len(given)]) for i in range(count)]
    record = dict(
        generator=sha256[args.sample_from],
        autoencoder=sha256[args.vqgan],
        seed=args.seed,
        num_samples=count,
        labels=args.labels,
        precision=args.precision,
        step=about.get("step"),
        preset=args.preset,
        **settings,
        model=next(k for k in CONFIGS if CONFIGS[k].items() <= config.items()),
    )
    if out.exists():
        kept = out.with_suffix(".json")
        if not kept.exists() or json.loads(kept.read_text()) != record:
            raise vae.InputError(
                f"--samples {out}: already there, with other settings; give another name"
            )
        return vae.say(f"{out}: already there")

    size, (counts, ramps) = (
        config["input_size"] * tokenizer.factor,
        decoding_schedule(steps, tokens, settings["decoding"]),
    )
    strength = {
        name: settings[name] for name in ("cfg_scale", "choice_temperature", "softmax_scale")
    }
    pictures = vae.Rows(f"{out}.part", (count, size, size, 3), "uint8", **record)
    missing, batch = pictures.missing[rank::world], max(1, args.batch_size // world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    bar = vae.progress(len(missing), 0, f"{out.name}: sampling", "image")
    for indices in np.split(missing, range(batch, len(missing), batch)):
        if vae.SIGNALS or not len(indices):
            break
        uniform = torch.stack(
            [
                torch.rand(steps, 2, tokens, generator=vae.seeded(args.seed, "sample", int(i)))
                for i in indices
            ]
        ).to(device)
        with autocast:
            drawn = parallel_decoding(
                model,
                torch.tensor([labels[i] for i in indices], device=device),
                uniform,
                counts,
                ramps,
                **strength,
            )
        decoded = torch.cat([vae.to_uint8(tokenizer.decode(part)) for part in drawn.split(32)])
        pictures.write(indices, decoded.permute(0, 2, 3, 1).cpu().numpy())
        bar.update(len(indices))
    bar.close()
    stopped = vae.stop_signal()  # for which each process waits until all are done
    if rank == 0 and not stopped:
        with open(f"{out}.tmp", "wb") as file:
            np.savez(file, arr_0=pictures.rows, arr_1=np.array(labels))
        shown = torch.from_numpy(pictures.rows[:64] / 127.5 - 1).permute(0, 3, 1, 2)
        vae.image_grid(shown.split(8)).save(out.with_suffix(".png"))
        out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        os.replace(f"{out}.tmp", out)
        shutil.rmtree(f"{out}.part")
        vae.say(f"{out}: {count:,} samples, the first of them in {out.with_suffix('.png')}")
    elif stopped:
        vae.say(
            f"{out}: stopped, {int(pictures.done.sum()):,} of {count:,} are there; the same command goes on"
        )
    if stopped := vae.stop_signal():
        raise SystemExit(128 + stopped)


def main():
    import vae

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--model", choices=CONFIGS, default="MaskGIT-B")
    parser.add_argument(
        "--vqgan", help="the VQ-GAN: vqgan.py's, or taming's f16 with 1,024 or 16,384 codes"
    )
    parser.add_argument(
        "--cache", help="folder of the cached tokens (default: NAME-tokens beside the VQ-GAN)"
    )
    parser.add_argument(
        "--mirror", action=argparse.BooleanOptionalAction, default=True, help="half of the images"
    )
    parser.add_argument(
        "--mask-schedule", choices=("arccos", "cosine"), default="arccos", help="cosine: original"
    )
    parser.add_argument(
        "--masked-only",
        action="store_true",
        help="loss on the masked tokens alone, as the original",
    )
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=2500, help="steps over which --lr is reached")
    # sampling
    parser.add_argument(
        "--sample-from", help="checkpoint to sample from, ours or Maskgit-pytorch's: no training"
    )
    parser.add_argument(
        "--samples", help="FILE.npz to write, or to go on with (default: beside the checkpoint)"
    )
    parser.add_argument("--num-samples", type=int, default=50_000)
    parser.add_argument(
        "--labels", default="uniform", help="at random, or balanced, or classes, as in 207,360"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="256", help="published settings; the next ones win"
    )
    parser.add_argument("--sampling-steps", type=int)
    parser.add_argument("--cfg-scale", type=float, help="of guidance in the last step; 1: none")
    parser.add_argument(
        "--choice-temperature", type=float, help="of the noise on the confidence, in the first step"
    )
    parser.add_argument("--softmax-scale", type=float, help="multiplies the logits")
    parser.add_argument(
        "--decoding", choices=("arccos", "cosine"), help="schedule; cosine: the original's"
    )
    with vae.launch(
        parser,
        data="data/imagenet/train",
        out="maskgit.pt",
        steps=1_500_000,
        batch_size=256,
        lr=1e-4,
        save_every=10_000,
        sample_every=10_000,
    ) as (args, rank, world, device):
        (sample if args.sample_from else train)(args, rank, world, device)


if __name__ == "__main__":
    main()
