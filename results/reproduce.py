"""The tables and figures of the EQ-VAE paper at a small scale, from nothing to the Markdown in the README.

    bash results/reproduce.sh 7                # an environment, what Table 7 lacks, then the README's numbers
    bash results/reproduce.sh all              # or any of: 1 2 3 5 6 7 8 figures, and photos, the last rows of Table 1
    python results/reproduce.py report         # the README again from the records that are there
    SMALL_SCALE=0.003 bash results/reproduce.sh 1 2 7      # a try: 0.3 % of all steps, everything under out/small-try/

A number is evaluate.py's, of what a chain of commands made: pretraining, fine-tuning with or without EQ-VAE's loss, a
refit of the decoder, a generator, its samples. Each command is a cell of a small `make`: it runs in one thread, as many
side by side as there are cores ($SMALL_JOBS), once what it needs is there, and not again unless its text changes. What
is made stays in out/small/ ($SMALL_OUT); records go to results/small/, each with the chain of commands that led to it.
Stopped at any time, the same command goes on, as the scripts themselves go on from their checkpoints. What has its
record already, of the same commands, is not run: delete the record to run it anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from make import Cell, make

SETTINGS = dict(
    size=32,  # pixels
    batch=16,
    pretrain=3000,
    tune=1500,
    refit=800,  # autoencoders: images a step, steps; refit=0: none
    pretrain_lr=1e-3,
    tune_lr=5e-4,
    refit_lr=5e-4,
    generator_batch=64,
    generator_lr=1e-3,  # generators: images a step; after how many steps to draw
    counts=dict(dit=(1000, 2000), sit=(1000, 2000, 4000), repa=(1000, 2000), maskgit=(1000, 2000)),
    samples=1024,
    classifier=1500,
    base="kl16",  # base: the autoencoder of Tables 2 and 5 to 8, see KINDS
    seeds=range(int(os.environ.get("SMALL_SEEDS", 3))),
    crops=(224, 32),
)  # of each photograph: to train on, held out
SCALE = float(os.environ.get("SMALL_SCALE", 1))
OUT = Path(os.environ.get("SMALL_OUT", "out/small" if SCALE == 1 else "out/small-try"))
RECORDS, PAGE = (
    (Path("results/small"), Path("README.md"))
    if SCALE == 1
    else (OUT / "records", OUT / "README.md")
)
JOBS = int(os.environ.get("SMALL_JOBS", 0)) or len(
    getattr(os, "sched_getaffinity", lambda _: [1])(0)
)


def scaled(count, least=2):
    return max(least, round(count * SCALE))


STEPS = {
    name: scaled(SETTINGS[name])
    for name in ("pretrain", "tune", "refit", "classifier")
    if SETTINGS[name]
}
COUNTS = {
    network: [scaled(count, 2 + 2 * k) for k, count in enumerate(counts)]
    for network, counts in SETTINGS["counts"].items()
}
PAIR, BASE, FEATURES = ("standard", "eq"), SETTINGS["base"], ("random", "classifier")

# name -> script, preset, data, how the README calls it, how the paper's tables do
KINDS = {
    "kl4": ("vae.py", "tiny", "emoji", "KL, 4 channels", "SD-VAE"),
    "kl16": ("vae.py", "tiny-16", "emoji", "KL, 16 channels", "SD-VAE-16"),
    "vq": ("vqgan.py", "tiny", "emoji", "VQ-GAN", "VQ-GAN"),
    "photo": ("vae.py", "tiny-16", "photos", "KL, 16 channels, photographs", None),
}
# name -> flags of the fine-tune, the share of its steps, how the README calls it, how the paper's tables do
ARMS = {
    "pretrained": ("", 0, ", pretrained", ""),
    "standard": ("--p-alpha 1", 1, " + Eq. 1", ""),
    "eq": ("--p-alpha 0.5", 1, " + EQ", " + EQ"),
    "third": ("--p-alpha 0.5", 1 / 3, " + EQ, a third of the steps", None),
    "r": ("--tau r", 1, " + EQ, rotations", " + EQ (R)"),
    "s": ("--tau s", 1, " + EQ, scales", " + EQ (S)"),
    "aniso": ("--tau rs-aniso", 1, " + EQ, a scale a side", " + EQ (R, sx sy)"),
    "bicubic": ("--interpolation bicubic", 1, " + EQ, bicubic, no antialias", None),
    "bilinear": ("--interpolation bilinear", 1, " + EQ, bilinear", None),
    "explicit": ("--explicit-weight 0.1 --p-alpha 0", 1, " + explicit", " + explicit"),
    "stop": (
        "--explicit-weight 0.1 --p-alpha 0 --stop-gradient",
        1,
        " + explicit, stop-gradient",
        " + explicit (stop-gradient)",
    ),
    "p3": ("--p-alpha 0.3", 1, " + EQ, p_alpha .3", " + EQ (p_alpha 0.3)"),
    "p7": ("--p-alpha 0.7", 1, " + EQ, p_alpha .7", " + EQ (p_alpha 0.7)"),
}
# name -> network, its flags, its sampler's, the rows of the paper's tables it stands beside after the last step
NETWORKS = {
    "dit": ("DiT-Ti/2", "--ema-decay 0.995", "--sampler ddim --sampling-steps 25", "DiT-B/"),
    "sit": ("SiT-Ti/2", "--ema-decay 0.995", "--sampler heun --sampling-steps 25", "SiT-B/"),
    "repa": (
        "REPA-Ti/2",
        "--ema-decay 0.995",
        "--sampler heun --sampling-steps 25",
        "REPA-XL/2 400k",
    ),
    "maskgit": ("MaskGIT-Ti", "--warmup 100", "--cfg-scale 1", "MaskGIT-B 1.5M"),
}


def rows(arms, kind=BASE, network="dit", counts=slice(-1, None)):
    return [(kind, arm, network, count) for count in COUNTS[network][counts] for arm in arms]


ALL = slice(None)
# name -> title, number of seeds, columns, rows
TABLES = {
    "1": (
        "reconstruction, generation, equivariance",
        3,
        ("rFD", "gFD", "PSNR", "R", "S"),
        rows(PAIR, "kl16") + rows(PAIR, "kl4") + rows(PAIR, "vq", "maskgit") + rows(PAIR, "photo"),
    ),
    "2": (
        "generators",
        3,
        ("gFD",),
        [row for name in ("dit", "sit", "repa") for row in rows(PAIR, BASE, name, ALL)],
    ),
    "3": ("masked generation", 1, ("gFD",), rows(PAIR, "vq", "maskgit", ALL)),
    "5": (
        "kinds of tau",
        1,
        ("gFD", "rFD", "ID"),
        rows((*PAIR, "r", "s", "aniso", "bicubic", "bilinear")),
    ),
    "6": ("more training is not the cause", 1, ("gFD", "rFD"), rows(("pretrained", *PAIR))),
    "7": (
        "explicit and implicit loss",
        1,
        ("gFD", "rFD", "R", "S"),
        rows((*PAIR, "explicit", "stop")),
    ),
    "8": ("p_alpha", 1, ("gFD", "rFD"), rows(("p3", "eq", "p7"))),
}

# ======================================================================================================================
# The cells: what is run with which arguments

CELLS = {}


def cell(name, ending, command, *needs, start=None):
    """The cell, one for each name, that makes OUT/NAME/NAME.ending; @ stands for that in its command."""
    record = RECORDS / f"{name}.json" if ending == ".json" else None  # an evaluation's is committed
    return CELLS.setdefault(name, Cell(OUT, name, ending, command, needs, start, record))


def data(kind):
    """-> what makes it, images to train on, held-out ones."""
    if KINDS[kind][2] == "emoji":
        return [], "emoji", "emoji-val"
    photos = cell(
        "photos", "", f"results/reproduce.py crops @ {' '.join(map(str, SETTINGS['crops']))}"
    )
    return [photos], f"{photos.output}/train", f"{photos.output}/val"


def classifier(kind, seed=0):
    """The second extractor. With another seed REPA's encoder, in DINOv2's place: no distance is of features it saw."""
    needs, train, _ = data(kind)
    return cell(
        f"{KINDS[kind][2]}-classifier-s{seed}",
        ".pt",
        f"evaluate.py classifier --data {train} --image-size "
        f"{SETTINGS['size']} --steps {STEPS['classifier']} --seed {seed} --out @",
        *needs,
    )


def autoencoder(kind, arm, seed, whole=False):
    """Pretrained, fine-tuned and, but for `whole`, its decoder alone fitted to plain reconstruction: latents stay."""
    (script, model, *_), (flags, share, *_), (needs, train, _) = KINDS[kind], ARMS[arm], data(kind)
    last = "-whole" if SETTINGS["refit"] else ""
    common = (
        f"{script} --data {train} --image-size {SETTINGS['size']} --model {model} --batch-size "
        f"{SETTINGS['batch']} --ema-decay 0.995 --lpips-weight 0 --gan-weight 0 --sample-every 0 --save-every "
        "200 --out @ --init"
    )
    made = cell(
        f"{kind}-pretrained-s{seed}{last}",
        ".pt",
        f"{common} scratch --p-alpha 1 --lr "
        f"{SETTINGS['pretrain_lr']} --steps {STEPS['pretrain']} --seed {seed}",
        *needs,
    )
    if share:  # other seeds from stage to stage: not the same order again
        made = cell(
            f"{kind}-{arm}-s{seed}{last}",
            ".pt",
            f"{common} {made.output} {flags} --lr {SETTINGS['tune_lr']} "
            f"--steps {max(1, round(share * STEPS['tune']))} --seed {seed + 10}",
            made,
        )
    if last and not whole:
        made = cell(
            f"{kind}-{arm}-s{seed}",
            ".pt",
            f"{common} {made.output} --train decoder --p-alpha 1 --lr "
            f"{SETTINGS['refit_lr']} --steps {STEPS['refit']} --seed {seed + 20}",
            made,
        )
    return made


def evaluation(name, command, kind, features, *needs):
    needs = [*needs, classifier(kind)] if features == "classifier" else needs
    file = needs[-1].output if features == "classifier" else features
    return cell(
        f"{name}-{features}", ".json", f"evaluate.py {command} --features {file} --record @", *needs
    )


def reconstruction(kind, arm, seed, features):
    made = autoencoder(kind, arm, seed)
    return evaluation(
        made.name,
        f"recon {made.output} --data {data(kind)[2]} --image-size {SETTINGS['size']} --no-lpips",
        kind,
        features,
        made,
    )


def generation(kind, arm, network, count, seed, features):
    """A later count goes on from the checkpoint of the one before it."""
    made, (needs, train, _), (model, flags, sampler, _) = (
        autoencoder(kind, arm, seed),
        data(kind),
        NETWORKS[network],
    )
    of, stem, run = (
        f"--{'vqgan' if network == 'maskgit' else 'vae'} {made.output}",
        f"{made.name}-{network}",
        None,
    )
    if network == "repa":
        needs = [*needs, classifier(kind, seed=1)]
        flags += f" --encoder evaluate:tokens --encoder-weights {needs[-1].output}"
    counts = COUNTS[network]
    for each in counts[
        : counts.index(count) + 1
    ]:  # a cache each, as two processes might fill a common one
        run = cell(
            f"{stem}-{each}",
            ".pt",
            f"{network}.py {of} --data {train} --image-size {SETTINGS['size']} --model "
            f"{model} {flags} --batch-size {SETTINGS['generator_batch']} --lr {SETTINGS['generator_lr']} --seed "
            f"{seed} --cache {OUT}/{stem}-{counts[0]}/cache --sample-every 0 --save-every 200 --out @ --steps "
            f"{each}",
            made,
            *needs,
            start=run,
        )
    drawn = cell(
        f"{run.name}-samples",
        ".npz",
        f"{network}.py --sample-from {run.output} {of} --samples @ "
        f"--num-samples {scaled(SETTINGS['samples'], 16)} --labels balanced --seed {seed} {sampler}",
        run,
    )
    return evaluation(run.name, f"samples {drawn.output} {train}", kind, features, drawn)


def cells(row, column, features, seeds):
    """The records, one of each seed, of a column in a table's row (kind, arm, network, count)."""
    return [
        generation(*row, seed, features)
        if column == "gFD"
        else reconstruction(*row[:2], seed, features)
        for seed in SETTINGS["seeds"][:seeds]
    ]


def curve(arm, network, counts, seeds, _):
    """The records, of each count and seed, of a generator on an arm's latents, with the arm's own: for figures."""
    return [
        *cells((BASE, arm, network, counts[0]), "rFD", "classifier", seeds),
        *(
            cell
            for count in counts
            for cell in cells((BASE, arm, network, count), "gFD", "classifier", seeds)
        ),
    ]


def goals(part):
    """The records that a part asks for."""
    if part == "figures":
        return [transforms(), *sum((curve(*line) for line in CURVES + TUNED), [])]
    _, seeds, columns, lines = TABLES["1" if part == "photos" else part]
    return [
        cell
        for row in lines
        if part != "photos" or row[0] == "photo"
        for features in FEATURES
        for column in columns
        for cell in cells(row, column, features, seeds)
    ]


# ======================================================================================================================
# Figures and the README

# Lines of Fig. 1 and 4, and of Fig. 5: arm, network, counts, number of seeds, steps of the fine-tune
CURVES = [(arm, "sit", COUNTS["sit"], 3, STEPS["tune"]) for arm in PAIR]
TUNED = [
    (arm, "dit", COUNTS["dit"][-1:], 1, round(ARMS[arm][1] * STEPS["tune"]))
    for arm in ("pretrained", "third", "eq")
]


def transforms():
    """Of both arms before the refit, which makes a decoder forget what EQ taught it: for Fig. 1 left, 2 and 3."""
    arms = [autoencoder(BASE, arm, 0, whole=True) for arm in PAIR]
    return evaluation(
        f"{BASE}-whole-s0-transforms",
        f"recon {arms[0].output} {arms[1].output} --transforms --no-lpips "
        f"--data {data(BASE)[2]} --image-size {SETTINGS['size']}",
        BASE,
        "classifier",
        *arms,
    )


def figures():
    def draw(lines, *arguments):
        for line in lines:
            for each in curve(*line):
                record = json.loads(each.record.read_text())
                for made in (
                    record["about"].get("autoencoders", {}).values()
                ):  # as its fine-tune, not its refit
                    made |= dict(step=line[-1], p_alpha=0.5 if line[0] in ("eq", "third") else 1.0)
                (OUT / f"figure-{each.record.name}").write_text(json.dumps(record))
                arguments += (OUT / f"figure-{each.record.name}",)
        subprocess.run(
            [sys.executable, "evaluate.py", "figures", "--out", RECORDS / "figures", *arguments],
            check=True,
        )

    arms = [autoencoder(BASE, arm, 0, whole=True).output for arm in PAIR]
    draw(
        [],
        *arms,
        "--data",
        data(BASE)[2],
        "--image-size",
        str(SETTINGS["size"]),
        "--records",
        transforms().output,
    )
    draw(TUNED, "--records")  # writes a Fig. 4, too, which the next one replaces
    draw(CURVES, "--records")


def measures(column):
    """A column with each extractor where it is a distance; with any where it is not."""
    return [(column, features) for features in FEATURES[: 2 if "FD" in column else 1]]


def named(column, features):
    return f"{column}-{features}" if "FD" in column else column


def spread(values):
    return f" ± {stdev(values):.2g}" if len(values) > 1 else ""


def markdown(header, body):
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body)]


def report():
    """The README with the tables and figures of what records there are between its two markers."""
    paper, spent, in_all = {}, {}, {}
    for line in Path("results/paper.md").read_text().splitlines():
        if line.startswith("## Table"):
            number, header = line[9:].partition(":")[0], None
        elif line.startswith("| "):
            entries = [entry.strip() for entry in line.strip("|").split("|")]
            header = header or entries
            paper[number, entries[0], entries[1]] = dict(zip(header, entries))

    def beside(number, row, column):  # "-" where the paper has no such row
        (kind, arm, network, count), column = row, column.replace("FD", "FID")
        family = (
            KINDS[kind][4] if number == "1" or kind == "vq" else "SD-VAE"
        )  # of the paper's other tables
        name = f"{family}{' + Eq. 1' if number == '6' and arm == 'standard' else ARMS[arm][3]}"
        found = [
            values[column]
            for (table, autoencoder, generator), values in paper.items()
            if (table, autoencoder) == ("10" if network == "repa" else number, name)
            and column in values
            and generator.startswith(NETWORKS[network][3])
        ]
        return found[0] if found and count == COUNTS[network][-1] else "-"

    def scores(row, column, features, seeds):
        """seed -> (value, record), as far as there are records of these settings."""
        found = {}
        for seed, each in zip(SETTINGS["seeds"], cells(row, column, features, seeds)):
            record = (
                json.loads(each.record.read_text())
                if each.record.exists()
                else dict(about=dict(key=None))
            )
            if record["about"]["key"] == each.key:
                spent.update(
                    (part["commands"][-1], part["seconds"]) for part in record["about"]["chain"]
                )
                value = next(iter(record.values()))[f"FD-{features}" if "FD" in column else column]
                found[seed] = value, os.path.relpath(each.record, PAGE.parent)
        return found

    def ours(*cell):
        found = scores(*cell)
        if cell[-1] == 1:
            return "".join(f"[{value:.3g}]({link})" for value, link in found.values()) or "not run"
        values = [value for value, _ in found.values()]
        links = ", ".join(f"[{seed}]({link})" for seed, (_, link) in found.items())
        return (
            f"{mean(values):.3g}{spread(values)} ({len(values)}: {links})" if found else "not run"
        )

    def effect(row, column, features, seeds):
        """EQ's arm against its twin of the same seed."""
        equal, standard = (
            scores((row[0], arm, *row[2:]), column, features, seeds) for arm in ("eq", "standard")
        )
        pairs = [
            (value, standard[seed][0]) for seed, (value, _) in equal.items() if seed in standard
        ]
        changes = [a - b if column == "PSNR" else 100 * (a / b - 1) for a, b in pairs]
        if not changes:
            return "not run"
        return f"{mean(changes):+.2g}{spread(changes)} {'dB' if column == 'PSNR' else '%'} ({len(changes)})"

    page = [
        f"Pictures of {SETTINGS['size']} px. Autoencoders: {STEPS['pretrain']:,} steps of {SETTINGS['batch']}, "
        f"then {STEPS['tune']:,} in each arm, then {STEPS.get('refit', 0):,} that fit each decoder alone to its "
        f"latents, by Eq. 1. Generators: steps of {SETTINGS['generator_batch']}; "
        f"{scaled(SETTINGS['samples'], 16):,} samples. rFD: Fréchet distance between held-out pictures and their "
        "reconstructions; gFD: between training pictures and samples; both on features of random convolutions and "
        "of a classifier trained on the data: neither is FID. The paper's numbers are of large networks on "
        "ImageNet at 256 px. Each of ours leads to its record.",
        "",
        "**What EQ changes** against the arm of Eq. 1 with the same seed: mean ± standard deviation over the seeds "
        "(their number), from the records that the tables below link; less is better, but for PSNR.",
        "",
    ]
    compared = dict.fromkeys(row for number in "231" for row in TABLES[number][3] if row[1] == "eq")
    for columns, rows_, header in (
        (("R", "S", "PSNR", "rFD"), {row[0]: row for row in compared}.values(), ["autoencoder"]),
        (("gFD",), compared, ["autoencoder", "generator"]),
    ):
        pairs = [pair for column in columns for pair in measures(column)]
        body = [
            [KINDS[row[0]][3], f"{NETWORKS[row[2]][0]}, {row[3]:,} steps"][: len(header)]
            + [effect(row, *pair, 3) for pair in pairs]
            for row in rows_
        ]
        page += [*markdown(header + [named(*pair) for pair in pairs], body), ""]
    for number, (title, seeds, columns, lines) in TABLES.items():
        header = ["autoencoder", "generator"]
        body = [
            [KINDS[kind][3] + ARMS[arm][2], f"{NETWORKS[network][0]}, {count:,} steps"]
            for kind, arm, network, count in lines
        ]
        spent.clear()
        for column in columns:
            for pair in measures(column):
                header.append(named(*pair))
                body = [[*line, ours(row, *pair, seeds)] for line, row in zip(body, lines)]
            if column != "PSNR":
                header.append(column.replace("FD", "FID") + ", paper")
                body = [[*line, beside(number, row, column)] for line, row in zip(body, lines)]
        in_all |= spent
        of = (
            "one seed"
            if seeds == 1
            else "mean ± standard deviation (number of seeds: their records)"
        )
        page += (
            [
                f"**Table {number}: {title}.** {of[0].upper() + of[1:]}; {sum(spent.values()) / 3600:.1f} core hours.",
                "",
                *markdown(header, body),
                "",
            ]
            if spent
            else [f"**Table {number}: {title}.** Not run.", ""]
        )
    page += [
        f"All tables: {sum(in_all.values()) / 3600:.1f} core hours, what they share counted once.",
        "",
    ]
    if drawn := sorted((RECORDS / "figures").glob("fig*.png")):
        page += [
            f"**Figures 1 to 5**, of {KINDS[BASE][3]}; SiT in Fig. 1 and 4, DiT in Fig. 5. Fig. 1 left, 2 and 3 "
            "show the arms before the refit. Fig. 1 right: bars are standard deviations over the seeds, and "
            "the title says how many times as fast EQ comes to the greater of the two last distances.",
            "",
        ]
    for path in drawn:
        page += [f"![Fig. {path.stem[3:]}]({os.path.relpath(path, PAGE.parent)})", ""]
    first, last = "<!-- small-scale -->", "<!-- /small-scale -->"
    text = PAGE.read_text() if PAGE.exists() else f"{first}\n{last}\n"
    before, after = text.partition(first)[0], text.partition(last)[2]
    return "\n".join([before + first, "", *page, last + after])


# Scikit-image's pictures in colour that it calls free; the README's "Licences" says more
PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "ihc", "retina", "rocket")


def crops(folder, train, held_out):
    """Random crops of scikit-image's photographs, 64 px, a class each; the right quarter of a picture is held out."""
    import random
    from importlib.util import find_spec

    from PIL import Image

    package = find_spec("skimage") or sys.exit(
        "the photographs need a package: pip install scikit-image"
    )
    for name in PHOTOS:
        (file,) = Path(package.submodule_search_locations[0], "data").glob(f"{name}.*")
        picture, draw = Image.open(file).convert("RGB"), random.Random(name)
        width, height, edge = *picture.size, picture.width * 3 // 4
        for part, count, low, high in (("train", train, 0, edge), ("val", held_out, edge, width)):
            Path(folder, part, name).mkdir(parents=True, exist_ok=True)
            for k in range(int(count)):
                side = draw.randint(64, min(high - low, height, 256))
                left, top = draw.randint(low, high - side), draw.randint(0, height - side)
                picture.resize(
                    (64, 64), Image.Resampling.LANCZOS, (left, top, left + side, top + side)
                ).save(Path(folder, part, name, f"{k:03}.png"))


def main():
    parts, known = sys.argv[1:], [*TABLES, "figures", "photos"]
    if parts[:1] == ["crops"]:
        return crops(*parts[1:])
    parts = [*TABLES, "figures"] if parts == ["all"] else parts
    if not parts or parts != ["report"] and not {*parts} <= {*known}:
        raise SystemExit(__doc__)
    if parts != ["report"]:
        make([cell for part in parts for cell in goals(part)], OUT, JOBS)
    if "figures" in parts:
        figures()
    PAGE.write_text(report())
    print(PAGE)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    main()
