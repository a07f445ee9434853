"""A test of the paper's gain: DiT on latents that EQ makes much more equivariant, three seeds.

    bash results/reproduce.sh gain     # an environment, the pictures, all commands, the table
    python results/gain.py report      # only writes the table of the records again

The setting was found in small/search.md and then frozen. A small autoencoder with SD-VAE's tight
bottleneck (f8 c4) is trained on emoji of 64 px until its latents are as far from equivariant as the
paper's. From there it is fine-tuned in two arms of equal length, each in two stages: with a high
and with a low learning rate. The arm of EQ has p_alpha .1 and then .5, the standard arm has Eq. 1
alone. A DiT is trained on the latents of each arm, and its samples are compared with the training
pictures: FD-EfficientNet, the decoder's loss included.

Commands run in one thread each, as many side by side as there are cores, or $SMALL_JOBS. A run that
was stopped goes on when the same command is given again. Files are left in out/small/; each score
becomes a line of small/records.jsonl, and the table is written into small/README.md. A try:
SMALL_SCALE=0.003 bash results/reproduce.sh gain
"""

import os
import statistics
import sys

import reproduce  # also puts the folder small/ on the path
import tables
from make import make, read_records
from reproduce import OUT, RESULTS, cell, scaled

SEEDS = 3
ARMS = {  # name -> p_alpha of the two stages
    "standard": (1, 1),
    "eq": (0.1, 0.5),
}
PRETRAINING = (1500, 1e-3)  # steps, learning rate
STAGES = ((1250, 1e-3), (1250, 3e-4))
STEPS = tuple(scaled(count, least=2 + 2 * k) for k, count in enumerate((500, 1000, 1500)))  # DiT's
SAMPLES = scaled(2048, 16)

EMOJI = "--data data/emoji/train --sample-every 0 --save-every 250"
AUTOENCODER = (
    f"vae.py {EMOJI} --image-size 64 --model tiny-f8 --batch-size 16 --lpips-weight 1 "
    "--perceptual evaluate:efficientnet_distance --gan-weight 0 --out @"
)
DIT = f"dit.py {EMOJI} --model DiT-Ti/1 --batch-size 64 --lr 1e-3 --ema-decay 0.99 --out @"


# --------------------------------------------------------------------------------------------------
# The commands


def autoencoder(arm, seed):
    """The file of an arm's last stage. Each stage sees the pictures in an order of its own."""
    steps, lr = PRETRAINING
    flags = f"--init scratch --p-alpha 1 --steps {scaled(steps)} --lr {lr} --seed {seed}"
    made = cell(f"f8-pretrained-s{seed}", ".pt", f"{AUTOENCODER} {flags}")
    for number, (steps, lr) in enumerate(STAGES, start=1):
        flags = f"--init {made.file} --p-alpha {ARMS[arm][number - 1]} --steps {scaled(steps)}"
        flags += f" --lr {lr} --seed {seed + 10 * number}"
        made = cell(f"f8-{arm}-s{seed}-stage{number}", ".pt", f"{AUTOENCODER} {flags}", made)
    return made


def reconstruction(arm, seed):
    """The score of an arm's autoencoder, on held-out emoji."""
    made = autoencoder(arm, seed)
    command = f"evaluate.py recon {made.file} --data data/emoji/val --image-size 64"
    command += " --features efficientnet --no-lpips --record @"
    return cell(f"f8-{arm}-s{seed}", ".json", command, made, records=reproduce.RECORDS)


def generation(arm, seed):
    """The scores of an arm's DiT, one for each of STEPS. Training goes on from one to the next."""
    made = autoencoder(arm, seed)
    trained = None
    scores = []
    for steps in STEPS:
        name = f"f8-{arm}-s{seed}-dit-{steps}"
        command = f"{DIT} --vae {made.file} --cache {OUT}/f8-{arm}-s{seed}-dit-{STEPS[0]}/cache"
        command += f" --seed {seed} --steps {steps}"
        trained = cell(f"{name}-model", ".pt", command, made, start=trained)
        command = f"dit.py --sample-from {trained.file} --vae {made.file} --samples @"
        command += f" --num-samples {SAMPLES} --labels balanced --seed {seed}"
        command += " --sampler ddim --sampling-steps 25"
        samples = cell(f"{name}-samples", ".npz", command, trained)
        command = f"evaluate.py samples {samples.file} data/emoji/train"
        command += " --features efficientnet --record @"
        scores.append(cell(name, ".json", command, samples, records=reproduce.RECORDS))
    return scores


def goals():
    """All scores, seed by seed, so that a run that is stopped leaves whole pairs."""
    found = []
    for seed in range(SEEDS):
        for arm in ARMS:
            found += [reconstruction(arm, seed), *generation(arm, seed)]
    return found


# --------------------------------------------------------------------------------------------------
# The table


def report():
    """Writes the table of all records that were made by the commands of today."""
    keys = {goal.name: goal.key for goal in goals()}
    records = {}
    for record in read_records(reproduce.RECORDS):
        name = record["about"]["cell"]
        if record["about"]["key"] == keys.get(name):
            records[name] = record
    tables.write_between(reproduce.PAGE, "gain", page(records))
    print(f"{reproduce.PAGE}: the scores of {len(records)} of {len(keys)} cells")


def page(records):
    """The lines of the table, or one that says there is nothing to show."""
    if not records:
        return ["Not run yet."]
    rows = []
    for column in ("R", "S", "PSNR", "rFD-EfficientNet"):
        rows.append(row(records, column, "f8-{arm}-s{seed}", column))
    for steps in STEPS:
        name = f"f8-{{arm}}-s{{seed}}-dit-{steps}"
        rows.append(row(records, f"DiT-Ti/1, {steps:,} steps: FD", name, "FD-EfficientNet"))
    seconds = {}
    for record in records.values():
        seconds |= tables.command_times(record)
    return [
        *tables.markdown(["", "standard", "EQ", "change in each seed", "paired t-test"], rows),
        "",
        f"{sum(seconds.values()) / 3600:.1f} core hours; {SAMPLES:,} samples of each generator.",
    ]


def row(records, title, name, column):
    """A score of both arms: mean ± deviation (seeds), and what EQ changes in each seed."""
    scores = {arm: [] for arm in ARMS}
    for seed in range(SEEDS):
        found = [records.get(name.format(arm=arm, seed=seed)) for arm in ARMS]
        if None not in found:
            for arm, record in zip(ARMS, found):
                scores[arm].append(next(iter(record.values()))[column])
    standard, equivariant = scores.values()
    if not standard:
        return [title, *[tables.NOT_RUN] * 4]
    pairs = list(zip(standard, equivariant))
    changes = [100 * (b / a - 1) for a, b in pairs]
    unit = "%"
    if column == "PSNR":
        changes = [b - a for a, b in pairs]
        unit = "dB"
    each = ", ".join(f"{change:+.2g}" for change in changes)
    return [title, *[tables.show(values, SEEDS) for values in scores.values()],
            f"{each} {unit}", p_value(standard, equivariant)]  # fmt: skip


def p_value(standard, equivariant):
    """Of Student's paired t-test, two-sided. Two seeds or more are needed."""
    differences = [b - a for a, b in zip(standard, equivariant)]
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return "-"
    from scipy.stats import ttest_rel

    return f"p = {ttest_rel(equivariant, standard).pvalue:.2g}"


def main():
    os.chdir(RESULTS.parent)
    if sys.argv[1:] not in ([], ["report"]):
        raise SystemExit(__doc__)
    if not sys.argv[1:]:
        make(goals(), OUT, reproduce.JOBS)
    report()


if __name__ == "__main__":
    main()
