"""The paper's tables at a small scale: what two cores can carry, on the pictures of data/emoji.

    bash results/reproduce.sh gain           # results/gain.py: a test of the paper's gain
    bash results/reproduce.sh 7              # an environment, the pictures, what Table 7 needs
    bash results/reproduce.sh all            # or any of 1 2 3 5 6 7 8
    python results/reproduce.py report       # only writes the tables of the records again
    SMALL_SCALE=0.003 bash results/reproduce.sh 2 3     # a try: .3 % of all steps

A score comes from a chain of commands: an autoencoder is pretrained, then fine-tuned with or
without EQ, then its decoder alone is trained on; a generator is trained on its latents; samples are
drawn and scored. The arms of one seed share the pretrained file. A command is not run again unless
it or one before it has changed, and a run that was stopped goes on. Commands run in one thread
each, as many side by side as there are cores, or $SMALL_JOBS.

Files are left in out/small/, each with its log. A score becomes a line of small/records.jsonl, with
the commands that led to it, and the tables are written into small/README.md. Distances are measured
on the features of EfficientNet-Lite0, since FID-Inception cannot be had everywhere: they are no
FID. A try leaves everything in out/small-try/. $SMALL_SEEDS sets the greatest number of seeds.
"""

import os
import sys
from pathlib import Path

from make import Cell, make, read_records

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS / "small"))
import tables  # noqa: E402

SCALE = float(os.environ.get("SMALL_SCALE", 1))
SEEDS = int(os.environ.get("SMALL_SEEDS", 3))
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

IMAGES = 1024  # samples that are scored
SIZE = 32  # pixels
TRAIN = f"--data data/emoji/train --image-size {SIZE} --sample-every 0 --save-every 200"
# A stage of an autoencoder's training: steps, learning rate
PRETRAINING = (3000, 1e-3)
FINE_TUNE = (1500, 5e-4)
REFIT = (800, 5e-4)
# Kind of autoencoder -> script, preset
AUTOENCODERS = {
    "kl16": ("vae.py", "tiny-16"),
    "kl4": ("vae.py", "tiny"),
    "vq": ("vqgan.py", "tiny"),
}
# Arm -> the flags of its fine-tune
FLAGS = {
    "standard": "--p-alpha 1",
    "eq": "--p-alpha 0.5",
    "r": "--tau r",
    "s": "--tau s",
    "aniso": "--tau rs-aniso",
    "explicit": "--explicit-weight 0.1 --p-alpha 0",
    "stop": "--explicit-weight 0.1 --p-alpha 0 --stop-gradient",
    "p3": "--p-alpha 0.3",
    "p7": "--p-alpha 0.7",
}
# Generator -> the flag for its autoencoder, flags of its training, flags of its sampler
GENERATORS = {
    "dit": ("--vae", "--ema-decay 0.995", "--sampler ddim --sampling-steps 25"),
    "sit": ("--vae", "--ema-decay 0.995", "--sampler heun --sampling-steps 25"),
    "repa": (
        "--vae",
        "--ema-decay 0.995 --encoder evaluate:efficientnet",
        "--sampler heun --sampling-steps 25",
    ),
    "maskgit": ("--vqgan", "--warmup 100", "--cfg-scale 1"),
}


def scaled(count, least=2):
    return max(least, round(count * SCALE))


def scaled_steps(counts):
    """The steps of a generator's scores. In a try they stay apart, too."""
    return tuple(scaled(count, least=2 + 2 * k) for k, count in enumerate(counts))


STEPS = {network: scaled_steps(counts) for network, counts in tables.STEPS.items()}
TABLES = tables.make_tables(STEPS)


# --------------------------------------------------------------------------------------------------
# The commands

CELLS = {}  # of every name one, however many tables ask for it


def cell(name, ending, command, *needs, start=None, records=None):
    if name not in CELLS:
        CELLS[name] = Cell(OUT, name, ending, command, needs, start, records)
    return CELLS[name]


def autoencoder(kind, arm, seed):
    """Pretraining, the arm's fine-tune, and a refit of the decoder alone, which keeps the latents.

    Each stage has a seed of its own, so that it does not see the pictures in the same order again.
    """
    script, preset = AUTOENCODERS[kind]
    command = f"{script} {TRAIN} --model {preset} --batch-size 16 --ema-decay 0.995"
    command += " --lpips-weight 0 --gan-weight 0 --out @"

    def stage(name, steps_and_lr, stage_seed, flags, *needs):
        steps, lr = steps_and_lr
        flags += f" --steps {scaled(steps)} --lr {lr} --seed {stage_seed}"
        return cell(name, ".pt", f"{command} {flags}", *needs)

    name = f"{kind}-pretrained-s{seed}-whole"
    made = stage(name, PRETRAINING, seed, "--init scratch --p-alpha 1")
    if arm != "pretrained":
        flags = f"--init {made.file} {FLAGS[arm]}"
        made = stage(f"{kind}-{arm}-s{seed}-whole", FINE_TUNE, seed + 10, flags, made)
    flags = f"--init {made.file} --train decoder --p-alpha 1"
    return stage(f"{kind}-{arm}-s{seed}", REFIT, seed + 20, flags, made)


def reconstruction(row, seed):
    """The score of a row's autoencoder."""
    made = autoencoder(row.kind, row.arm, seed)
    command = f"evaluate.py recon {made.file} --data data/emoji/val --image-size {SIZE}"
    command += " --no-lpips --features efficientnet --record @"
    return cell(f"{made.name}-efficientnet", ".json", command, made, records=RECORDS)


def generation(row, seed):
    """The score of a row's generator. One that trains longer goes on from the one before it."""
    made = autoencoder(row.kind, row.arm, seed)
    latents, flags, sampler = GENERATORS[row.network]
    latents += f" {made.file}"
    script = f"{row.network}.py"
    command = f"{script} {latents} {TRAIN} --model {tables.NETWORKS[row.network][0]} {flags}"
    command += f" --batch-size 64 --lr 1e-3 --seed {seed} --out @"
    command += f" --cache {OUT}/{made.name}-{row.network}-{STEPS[row.network][0]}/cache"
    trained = None
    for steps in STEPS[row.network]:
        if steps <= row.steps:
            name = f"{made.name}-{row.network}-{steps}"
            trained = cell(name, ".pt", f"{command} --steps {steps}", made, start=trained)
    command = f"{script} --sample-from {trained.file} {latents} --samples @ --labels balanced"
    command += f" --num-samples {scaled(IMAGES, 16)} --seed {seed} {sampler}"
    samples = cell(f"{trained.name}-samples", ".npz", command, trained)
    command = f"evaluate.py samples {samples.file} data/emoji/train"
    command += " --features efficientnet --record @"
    return cell(f"{trained.name}-efficientnet", ".json", command, samples, records=RECORDS)


def goals(table, seeds):
    """The scores that a table shows of its first `seeds` seeds."""
    found = []
    for row in table.rows:
        for seed in range(min(table.seeds, seeds)):
            found.append(generation(row, seed))
            if set(table.columns) != {"gFD"}:
                found.append(reconstruction(row, seed))
    return found


# --------------------------------------------------------------------------------------------------
# The report


def report():
    """Writes the tables of all records that were made by the commands of today."""
    keys = {}
    for table in TABLES.values():
        keys |= {goal.name: goal.key for goal in goals(table, table.seeds)}
    records = {}
    for record in read_records(RECORDS):
        name = record["about"]["cell"]
        if record["about"]["key"] == keys.get(name):
            records[name] = record
    tables.write_between(PAGE, "records", page(records))
    print(f"{PAGE}: the scores of {len(records)} of {len(keys)} cells")


def page(records):
    """The lines of the tables, or one that says there is nothing to show."""
    if not records:
        return ["Nothing was run yet."]
    stages = [f"{scaled(steps):,}" for steps, _ in (PRETRAINING, FINE_TUNE, REFIT)]
    about = [
        f"Pictures of {SIZE} px. Autoencoders: {stages[0]} steps of 16 images, then {stages[1]}",
        f"in each arm, then {stages[2]} of Eq. 1 for the decoder alone. Generators: steps of 64",
        f"images; {scaled(IMAGES, 16):,} samples are scored. rFD compares reconstructions with the",
        "held-out pictures, gFD compares samples with the training pictures, both on features of",
        "EfficientNet-Lite0: they are no FID. REPA is trained towards features of that network,",
        "too, so its gFD does not compare with another generator's. The paper's numbers are of",
        "large networks on ImageNet at 256 px.",
        "",
    ]
    return [*about, *tables.page(TABLES, tables.Scores(records, ("EfficientNet",)))]


def main():
    os.chdir(RESULTS.parent)
    wanted = sys.argv[1:]
    if wanted == ["all"]:
        wanted = list(TABLES)
    if wanted != ["report"]:
        if not wanted or not set(wanted) <= set(TABLES):
            raise SystemExit(__doc__)
        found = []
        for number in wanted:
            found += goals(TABLES[number], SEEDS)
        make(found, OUT, JOBS)
    report()


if __name__ == "__main__":
    main()
