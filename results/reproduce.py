"""A test of the paper's gain: does a DiT learn faster on latents that EQ has made equivariant?

    bash results/reproduce.sh               # an environment, the pictures, all commands, the table
    bash results/reproduce.sh sit explicit  # one seed of SiT, and of the explicit loss
    python results/reproduce.py report      # only writes the tables of the records again
    SMALL_SCALE=0.003 bash results/reproduce.sh     # a try: .3 % of all steps

The setting was found in small/search.md and then frozen. A small autoencoder with SD-VAE's tight
bottleneck (f8 c4) is trained on emoji of 64 px until its latents are nearly as far from equivariant
as the paper's. From there it is fine-tuned in two arms of equal length, each in two stages: with a
high and with a low learning rate. The arm of EQ has p_alpha .1 and then .5, the standard arm has
Eq. 1 alone. A DiT is trained on the latents of each arm, and its samples are compared with the
training pictures. The distance is measured on features of EfficientNet-Lite0, because
FID-Inception cannot be had everywhere: it is no FID.

A command is not run again unless it or one before it has changed, and a run that was stopped goes
on when the same command is given again. Commands run in one thread each, as many side by side as
there are cores, or $SMALL_JOBS. Files are left in out/small/, each with its log. A score becomes a
line of small/records.jsonl, with the commands that led to it, and the tables are written into
small/README.md. A try leaves everything in out/small-try/.
"""

import functools
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import figures
import numpy as np
import torch
from make import Cell, make, read_records
from scipy.stats import ttest_1samp

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS / "small"))
import tables  # noqa: E402

SCALE = float(os.environ.get("SMALL_SCALE", 1))
JOBS = int(os.environ.get("SMALL_JOBS", 0)) or os.cpu_count()
if "SMALL_JOBS" not in os.environ and hasattr(os, "sched_getaffinity"):
    JOBS = len(os.sched_getaffinity(0))  # the cores that this process may use
OUT = Path("out/small")
RECORDS = Path("results/small/records.jsonl")
PAGE = Path("results/small/README.md")
if SCALE != 1:
    OUT = Path("out/small-try")
    RECORDS = OUT / "records.jsonl"
    PAGE = OUT / "README.md"


def scaled(count, least=2):
    return max(least, round(count * SCALE))


# --------------------------------------------------------------------------------------------------
# The setting


class Comparison(NamedTuple):
    title: str
    arm: str  # a key of ARMS, set beside the standard arm
    network: str  # a key of GENERATORS
    seeds: int  # 0 to seeds - 1, each with autoencoders and generators of its own


COMPARISONS = {
    "gain": Comparison("EQ-VAE and DiT: the paper's gain", "eq", "dit", 3),
    "sit": Comparison("EQ-VAE and SiT", "eq", "sit", 1),
    "explicit": Comparison("The explicit loss and DiT", "explicit", "dit", 1),
}


class Arm(NamedTuple):
    title: str
    stages: tuple  # the flags of the two stages of its fine-tune


ARMS = {
    "standard": Arm("standard", ("--p-alpha 1", "--p-alpha 1")),
    "eq": Arm("EQ", ("--p-alpha 0.1", "--p-alpha 0.5")),
    "explicit": Arm("explicit", ("--p-alpha 0 --explicit-weight 0.1",) * 2),
}
PRETRAINING = (1500, 1e-3)  # steps, learning rate
STAGES = ((1250, 1e-3), (1250, 3e-4))
GENERATORS = {  # name -> model, flags of its sampler
    "dit": ("DiT-Ti/1", "--sampler ddim --sampling-steps 25"),
    "sit": ("SiT-Ti/1", "--sampler heun --sampling-steps 25"),
}
STEPS = tuple(scaled(count, least=2 + 2 * k) for k, count in enumerate((500, 1000, 1500)))
SAMPLES = scaled(2048, 16)

EMOJI = "--data data/emoji/train --sample-every 0 --save-every 250"
AUTOENCODER = (
    f"vae.py {EMOJI} --image-size 64 --model tiny-f8 --batch-size 16 --lpips-weight 1 "
    "--perceptual evaluate:efficientnet_distance --gan-weight 0 --out @"
)


# --------------------------------------------------------------------------------------------------
# The commands. Each is one cell, however many comparisons need it


@functools.cache
def pretrained(seed):
    steps, lr = PRETRAINING
    flags = f"--init scratch --p-alpha 1 --steps {scaled(steps)} --lr {lr} --seed {seed}"
    return Cell(OUT, f"f8-pretrained-s{seed}", ".pt", f"{AUTOENCODER} {flags}")


@functools.cache
def fine_tuned(arm, seed):
    """The file of an arm's last stage. Each stage sees the pictures in an order of its own."""
    made = pretrained(seed)
    for stage, ((steps, lr), flags) in enumerate(zip(STAGES, ARMS[arm].stages), start=1):
        command = f"{AUTOENCODER} --init {made.file} {flags} --steps {scaled(steps)} --lr {lr}"
        command += f" --seed {seed + 10 * stage}"
        made = Cell(OUT, f"f8-{arm}-s{seed}-stage{stage}", ".pt", command, [made])
    return made


@functools.cache
def reconstruction(arm, seed):
    """The score of an arm's autoencoder, on held-out emoji."""
    made = fine_tuned(arm, seed)
    command = f"evaluate.py recon {made.file} --data data/emoji/val --image-size 64"
    command += " --features efficientnet --no-lpips --record @"
    return Cell(OUT, f"f8-{arm}-s{seed}", ".json", command, [made], records=RECORDS)


@functools.cache
def generation(arm, network, seed):
    """The scores of an arm's generator, one for each of STEPS. Training goes on between them."""
    made = fine_tuned(arm, seed)
    model, sampler = GENERATORS[network]
    latents = f"--vae {made.file}"
    cache = f"{OUT}/f8-{arm}-s{seed}-{network}-{STEPS[0]}/cache"
    trained = None
    scores = []
    for steps in STEPS:
        name = f"f8-{arm}-s{seed}-{network}-{steps}"
        command = f"{network}.py {EMOJI} --model {model} --batch-size 64 --lr 1e-3"
        command += f" --ema-decay 0.99 --out @ {latents} --cache {cache}"
        command += f" --seed {seed} --steps {steps}"
        trained = Cell(OUT, f"{name}-model", ".pt", command, [made], start=trained)
        command = f"{network}.py --sample-from {trained.file} {latents} --samples @"
        command += f" --num-samples {SAMPLES} --labels balanced --seed {seed} {sampler}"
        samples = Cell(OUT, f"{name}-samples", ".npz", command, [trained])
        command = f"evaluate.py samples {samples.file} data/emoji/train"
        command += " --features efficientnet --record @"
        scores.append(Cell(OUT, name, ".json", command, [samples], records=RECORDS))
    return scores


def goals(comparison):
    """All scores, seed by seed, so that a run that is stopped leaves whole pairs."""
    found = []
    for seed in range(comparison.seeds):
        for arm in arms(comparison):
            found += [reconstruction(arm, seed), *generation(arm, comparison.network, seed)]
    return found


# --------------------------------------------------------------------------------------------------
# The report


def report():
    """Writes the tables of all records that were made by the commands of today, and the figures."""
    cells = [cell for comparison in COMPARISONS.values() for cell in goals(comparison)]
    keys = {cell.name: cell.key for cell in cells}
    records = {}
    for record in read_records(RECORDS):
        name = record["about"]["cell"]
        if record["about"]["key"] == keys.get(name):
            records[name] = record
    tables.write_between(PAGE, "records", page(records))
    for name, comparison in COMPARISONS.items():
        draw(name, comparison, records)
    print(f"{PAGE}: the scores of {len(records)} of {len(keys)} cells")


def page(records):
    """The lines of all tables, and the time that they took."""
    lines = []
    for comparison in COMPARISONS.values():
        rows = table_rows(comparison, records)
        if not rows:
            lines += [f"**{comparison.title}.** Not run.", ""]
            continue
        seeds = f"Seeds 0 to {comparison.seeds - 1}" if comparison.seeds > 1 else "One seed"
        about = f"{seeds}; {SAMPLES:,} samples of each generator."
        factor = speed_up(comparison, records)
        if factor is not None:
            about += f" Speed-up: {factor:.2g}."
        header = ["", "standard", ARMS[comparison.arm].title, "change in each seed", "t-test"]
        lines += [f"**{comparison.title}.** {about}", "", *tables.markdown(header, rows), ""]
    seconds = {}
    for record in records.values():
        seconds |= tables.command_times(record)
    hours = sum(seconds.values()) / 3600
    return [*lines, f"All tables: {hours:.1f} core hours. What they share counts once."]


def table_rows(comparison, records):
    """A row for each score that some seed has of both arms."""
    scores = [(column, "f8-{arm}-s{seed}", column) for column in ("R", "S", "PSNR")]
    scores.append(("FD of reconstructions", "f8-{arm}-s{seed}", "rFD-EfficientNet"))
    model, _ = GENERATORS[comparison.network]
    for steps in STEPS:
        scores.append((f"FD of {model}, {steps:,} steps", *distance(comparison, steps)))
    rows = []
    for title, name, column in scores:
        found = pairs(comparison, records, name, column)
        if found:
            means = [tables.show(values, comparison.seeds) for values in zip(*found)]
            rows.append([title, *means, changes(found, column), p_value(found)])
    return rows


def distance(comparison, steps):
    """Where the distance of a generator's samples stands: the records' names, the score's."""
    return f"f8-{{arm}}-s{{seed}}-{comparison.network}-{steps}", "FD-EfficientNet"


def pairs(comparison, records, name, column):
    """[(score of the standard arm, score of the other one), ...] of the seeds that have both."""
    found = []
    for seed in range(comparison.seeds):
        both = [records.get(name.format(arm=arm, seed=seed)) for arm in arms(comparison)]
        if None not in both:
            found.append(tuple(next(iter(record.values()))[column] for record in both))
    return found


def arms(comparison):
    return ("standard", comparison.arm)


def changes(found, column):
    if column == "PSNR":
        return ", ".join(f"{other - base:+.2g}" for base, other in found) + " dB"
    return ", ".join(f"{100 * (other / base - 1):+.2g}" for base, other in found) + " %"


def p_value(found):
    """Of Student's paired t-test, two-sided. Two seeds or more are needed."""
    differences = [other - base for base, other in found]
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return "-"
    return f"p = {ttest_1samp(differences, 0).pvalue:.2g}"


def curves(comparison, records):
    """{arm: [(step, mean, deviation), ...]} of the distance; empty until all seeds have it."""
    drawn = {}
    for steps in STEPS:
        found = pairs(comparison, records, *distance(comparison, steps))
        if len(found) < comparison.seeds:
            return {}
        for arm, values in zip(arms(comparison), zip(*found)):
            points = drawn.setdefault(ARMS[arm].title, [])
            points.append(figures.summary(steps, list(values)))
    return drawn


def speed_up(comparison, records):
    """How many times as fast the other arm comes to the distance that both reach, or None."""
    drawn = curves(comparison, records)
    return figures.speed_up(*drawn.values()) if drawn else None


def draw(name, comparison, records):
    """Fig. 1, right: NAME-curves.png. Fig. 4: NAME-samples.png, where the samples are there."""
    folder = PAGE.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = curves(comparison, records)
    model, _ = GENERATORS[comparison.network]
    if drawn:
        title = f"Fig. 1: {comparison.title}"
        factor = speed_up(comparison, records)
        if factor is not None:
            title += f"\n{ARMS[comparison.arm].title}: {factor:.2g} times as fast"
        figure, axes = figures.new_plot(title, f"steps of {model}", "FD-EfficientNet")
        figures.draw_curves(axes, drawn)
        figures.save(figure.savefig, folder / f"{name}-curves.png")
    rows = []
    for arm in arms(comparison):
        file = generation(arm, comparison.network, 0)[-1].needs[0].file
        if file.exists():
            with np.load(file) as stored:
                images = torch.from_numpy(stored["arr_0"][:12]).permute(0, 3, 1, 2)
            rows.append((ARMS[arm].title, figures.pictures_of(images)))
    if len(rows) == 2:
        title = f"{model} after {STEPS[-1]:,} steps: samples of equal noise and labels (Fig. 4)"
        figures.save(figures.panel(title, rows).save, folder / f"{name}-samples.png")


def main():
    os.chdir(RESULTS.parent)
    wanted = sys.argv[1:] or ["gain"]
    if wanted != ["report"]:
        if not set(wanted) <= set(COMPARISONS):
            raise SystemExit(__doc__)
        make([goal for name in wanted for goal in goals(COMPARISONS[name])], OUT, JOBS)
    report()


if __name__ == "__main__":
    main()
