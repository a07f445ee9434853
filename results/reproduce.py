"""A test of the paper's gain: does a DiT learn faster on latents that EQ has made equivariant?

    bash results/reproduce.sh               # an environment, the pictures, all commands, the table
    bash results/reproduce.sh sit untuned   # one seed of SiT; and of no fine-tune beside standard
    bash results/reproduce.sh report        # only writes the tables of the records again
    SMALL_SCALE=0.003 bash results/reproduce.sh     # a try: a few steps of each, 15 minutes

The setting was found in small/search.md and then frozen. A small autoencoder with SD-VAE's tight
bottleneck (f8 c4: 8 x 8 x 4 numbers for a picture of 64 px) is trained on emoji. Then it is
fine-tuned in two arms of equal length, each in two stages: with a high and with a low learning
rate. In a share p_alpha of its steps EQ transforms nothing; this is .1 in the first stage, .5 in
the second. The standard arm never transforms: Eq. 1. A DiT is trained on the latents of each arm,
and its samples are compared with the training pictures. The distance is measured on features of
EfficientNet-Lite0, because FID-Inception cannot be had everywhere: it is no FID. The autoencoders
of both arms were trained with a perceptual loss on features of the same network.

Commands run in one thread each, as many side by side as there are cores, or $SMALL_JOBS. A command
is not run again unless its words, or those of one before it, have changed; a change of the code is
not noticed. A run that was stopped goes on when the same command is given again.

All is left in out/small/, and a try's in out/small-try/: each file with its log; records.jsonl,
with a line for each score and the commands that led to it; README.md, with the tables. `report
FOLDER` writes the tables of another folder's records.jsonl: results/small has those of our run.
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

SCALE = float(os.environ.get("SMALL_SCALE") or 1)
OUT = Path("out/small") if SCALE == 1 else Path("out/small-try")
RECORDS = OUT / "records.jsonl"


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
    "gain": Comparison("DiT on EQ-VAE's latents", "eq", "dit", 3),
    "sit": Comparison("SiT on EQ-VAE's latents", "eq", "sit", 3),
    # A control: does a DiT simply like the latents of a blurrier autoencoder?
    "untuned": Comparison("DiT on the pretrained autoencoder's latents", "untuned", "dit", 3),
}


class Arm(NamedTuple):
    title: str
    stages: tuple  # the flags of each stage of its fine-tune


ARMS = {
    "standard": Arm("standard", ("--p-alpha 1", "--p-alpha 1")),
    "eq": Arm("EQ", ("--p-alpha 0.1", "--p-alpha 0.5")),
    "untuned": Arm("pretrained", ()),
}
PRETRAINING = (1500, 1e-3)  # steps, learning rate
STAGES = ((1250, 1e-3), (1250, 3e-4))
GENERATORS = {  # name -> model, flags of its sampler
    "dit": ("DiT-Ti/1", "--sampler ddim --sampling-steps 25"),
    "sit": ("SiT-Ti/1", "--sampler heun --sampling-steps 25"),
}
# In a try the three stay different: 2, 4 and 6
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
    # With the model, so that a command which changes takes its cache with it
    cache = f"{OUT}/f8-{arm}-s{seed}-{network}-{STEPS[0]}-model/cache"
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
    """The cells of all scores, seed by seed."""
    found = []
    for seed in range(comparison.seeds):
        for arm in arms(comparison):
            found += [reconstruction(arm, seed), *generation(arm, comparison.network, seed)]
    return found


# --------------------------------------------------------------------------------------------------
# The report


def report(folder):
    """Writes the tables and figures of a folder's records, as far as today's commands made them."""
    cells = [cell for comparison in COMPARISONS.values() for cell in goals(comparison)]
    keys = {cell.name: cell.key for cell in cells}
    records = {}
    for record in read_records(folder / "records.jsonl"):
        name = record["about"]["cell"]
        if record["about"]["key"] == keys.get(name):
            records[name] = record
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    tables.write_between(folder / "README.md", "records", page(records))
    for name, comparison in COMPARISONS.items():
        draw_curves(comparison, records, folder / "figures" / f"{name}-curves.png")
        draw_samples(comparison, folder / "figures" / f"{name}-samples.png")
    print(f"{folder / 'README.md'}: the tables of {len(records)} scores")


def page(records):
    """The lines of all tables, and the time that they took."""
    lines = []
    for name, comparison in COMPARISONS.items():
        rows = table_rows(comparison, records)
        if not rows:
            lines += [f"**{comparison.title}.** Not run.", ""]
            continue
        seeds = f"Seeds 0 to {comparison.seeds - 1}" if comparison.seeds > 1 else "Seed 0"
        about = f"{seeds}; {SAMPLES:,} samples of each generator."
        speed = speed_up(comparison, records)
        about += f" [{speed}](figures/{name}-curves.png)." if speed else " Not complete."
        header = ["", "standard", ARMS[comparison.arm].title, "change of each seed", "t-test"]
        lines += [f"**{comparison.title}.** {about}", "", *tables.markdown(header, rows), ""]
    seconds = {}
    for record in records.values():
        seconds |= tables.command_times(record)
    hours = sum(seconds.values()) / 3600
    return [*lines, f"All tables: {hours:.1f} core hours. What they share counts once."]


def table_rows(comparison, records):
    """A row for each score that some seed has of both arms; none before a generator has one."""
    rows = []
    for column in ("R", "S", "PSNR", "rFD-EfficientNet"):
        found = pairs(comparison, records, "f8-{arm}-s{seed}", column)
        title = "FD of reconstructions" if column == "rFD-EfficientNet" else column
        rows += table_row(comparison, title, found, column == "PSNR")
    model, _ = GENERATORS[comparison.network]
    distances = []
    for steps in STEPS:
        found = distance_pairs(comparison, records, steps)
        distances += table_row(comparison, f"FD of {model}, {steps:,} steps", found)
    return rows + distances if distances else []


def table_row(comparison, title, found, decibels=False):
    if not found:
        return []
    means = [tables.show(values, comparison.seeds) for values in zip(*found)]
    if decibels:
        changes = ", ".join(f"{other - base:+.1f}" for base, other in found) + " dB"
    else:
        changes = ", ".join(f"{100 * (other / base - 1):+.1f}" for base, other in found) + " %"
    return [[title, *means, changes, p_value(found)]]


def arms(comparison):
    return ("standard", comparison.arm)


def pairs(comparison, records, name, column):
    """[(score of the standard arm, score of the other one), ...] of the seeds that have both.

    name  of the records, as "f8-{arm}-s{seed}"
    """
    found = []
    for seed in range(comparison.seeds):
        both = [records.get(name.format(arm=arm, seed=seed)) for arm in arms(comparison)]
        if None not in both:
            found.append(tuple(next(iter(record.values()))[column] for record in both))
    return found


def distance_pairs(comparison, records, steps):
    name = f"f8-{{arm}}-s{{seed}}-{comparison.network}-{steps}"
    return pairs(comparison, records, name, "FD-EfficientNet")


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
        found = distance_pairs(comparison, records, steps)
        if len(found) < comparison.seeds:
            return {}
        for arm, values in zip(arms(comparison), zip(*found)):
            points = drawn.setdefault(ARMS[arm].title, [])
            points.append(figures.summary(steps, list(values)))
    return drawn


def speed_up(comparison, records):
    """A text: of the means' curves, and of each seed's. "" until all seeds are there."""
    drawn = curves(comparison, records)
    if not drawn:
        return ""
    title = ARMS[comparison.arm].title
    text = f"{title[0].upper()}{title[1:]} is {ratio(*drawn.values())} times as fast"
    if comparison.seeds == 1:
        return text
    points = [distance_pairs(comparison, records, steps) for steps in STEPS]
    of_seeds = []
    for seed in range(comparison.seeds):
        base, other = zip(*[pairs_of_step[seed] for pairs_of_step in points])
        of_seeds.append(ratio(list(zip(STEPS, base)), list(zip(STEPS, other))))
    return f"{text} (by seed: {', '.join(of_seeds)})"


def ratio(base, other):
    """The steps that two curves need to the same distance: base's, divided by the other's.

    It is the distance that both reach, the greater one of their last ones.
    """
    factor = figures.speed_up(base, other)
    if factor is not None:
        return f"{factor:.2g}"
    if other[0][1] <= base[-1][1]:
        return f"more than {base[-1][0] / other[0][0]:.2g}"
    return f"less than {base[0][0] / other[-1][0]:.2g}"


def draw_curves(comparison, records, path):
    """Fig. 1, right."""
    drawn = curves(comparison, records)
    if not drawn:
        path.unlink(missing_ok=True)
        return
    seeds = f"mean ± deviation of {comparison.seeds} seeds" if comparison.seeds > 1 else "seed 0"
    title = f"{comparison.title}: {seeds}\n{speed_up(comparison, records)}"
    model, _ = GENERATORS[comparison.network]
    figure, axes = figures.new_plot(title, f"steps of {model}", "FD-EfficientNet of samples")
    figures.draw_curves(axes, drawn)
    figures.save(figure.savefig, path)


def draw_samples(comparison, path):
    """Fig. 4, where the samples of seed 0 are there."""
    rows = []
    for arm in arms(comparison):
        (samples,) = generation(arm, comparison.network, 0)[-1].needs
        if not samples.is_made():
            return
        with np.load(samples.file) as stored:
            images = torch.from_numpy(stored["arr_0"][:12]).permute(0, 3, 1, 2)
        rows.append((ARMS[arm].title, figures.pictures_of(images)))
    model, _ = GENERATORS[comparison.network]
    title = f"{model} after {STEPS[-1]:,} steps, seed 0: samples of equal noise and labels"
    figures.save(figures.panel(title, rows).save, path)


def cores():
    """How many commands run side by side: $SMALL_JOBS, or the cores that this process may use."""
    if os.environ.get("SMALL_JOBS"):
        return int(os.environ["SMALL_JOBS"])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def main():
    os.chdir(RESULTS.parent)
    wanted = sys.argv[1:] or ["gain"]
    if wanted[0] == "report" and len(wanted) <= 2:
        report(Path(wanted[1]) if len(wanted) == 2 else OUT)
        return
    if not set(wanted) <= set(COMPARISONS):
        raise SystemExit(__doc__)
    try:
        make([goal for name in wanted for goal in goals(COMPARISONS[name])], OUT, cores())
    finally:
        report(OUT)


if __name__ == "__main__":
    main()
