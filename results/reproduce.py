"""The paper's tables at a small scale: do generators learn faster on latents that EQ-VAE's loss has
made equivariant, and which of the paper's other claims hold at this scale?

    bash results/reproduce.sh               # an environment, the pictures, all commands, the table
    bash results/reproduce.sh 2 6           # other tables, by their names: all of them are below
    bash results/reproduce.sh all
    bash results/reproduce.sh report        # only writes the tables of the records again
    SMALL_SCALE=0.003 bash results/reproduce.sh     # a try: a few steps of each

    gain         DiT on EQ's latents, at three lengths; this is made if no table is named
    1            other autoencoders: with 16 channels, and a VQ-GAN with MaskGIT (also Table 3)
    2            other generators: SiT and REPA
    5            kinds of tau: rotations, scales, a scale for each side
    6            is it more training? The pretrained autoencoder beside both arms
    7            the explicit loss, without and with stop-gradient
    8            p_alpha: .3, .5 and .7
    long         does the gap stay? Four times as many steps, one seed
    photographs  the test of the gain on photographs of solar cells, at other lengths
    blur         a search on another seed: the KL weight that lowers the standard arm's PSNR to EQ's
    why          is it the blur? A standard arm with this weight

The setting was found in small/search.md and then frozen; small/plan.md says what is compared and
what counts. A small autoencoder with SD-VAE's tight bottleneck (f8 c4: 8 x 8 x 4 numbers for a
picture of 64 px) is trained on emoji. Then it is fine-tuned in arms of equal length, each in two
stages: with a high and with a low learning rate. In a share p_alpha of its steps EQ transforms
nothing; this is .1 in the first stage, .5 in the second. The standard arm never transforms: Eq. 1.
A generator is trained on the latents of each arm, and its samples are compared with the training
pictures. The distance is measured on features of EfficientNet-Lite0, because FID-Inception cannot
be had everywhere: it is no FID. The autoencoders were trained with a perceptual loss on features of
the same network, so there is a second measure, of thumbnails of 8 x 8, which no loss has seen.

Commands run in one thread each, as many side by side as there are cores, or $SMALL_JOBS. A command
is not run again unless its words, or those of one before it, have changed; a change of the code is
not noticed. A command that tables share is run once. A run that was stopped goes on when the same
command is given again.

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
import report
from make import Cell, closure, make, read_records
from scipy.stats import ttest_1samp

RESULTS = Path(__file__).resolve().parent
SCALE = float(os.environ.get("SMALL_SCALE") or 1)
OUT = Path("out/small") if SCALE == 1 else Path("out/small-try")
RECORDS = OUT / "records.jsonl"


def scaled(count, least=2):
    return max(least, round(count * SCALE))


def points(*counts):
    """The steps after which a generator can be scored. In a try they are at least 2, 4, ..., and so
    never equal."""
    return tuple(scaled(count, least=2 + 2 * k) for k, count in enumerate(counts))


# --------------------------------------------------------------------------------------------------
# The setting


class Kind(NamedTuple):
    """A kind of autoencoder."""

    title: str
    script: str
    model: str
    data: str  # a folder of data/
    points: tuple  # generators go on from each of these steps to the next
    paper: str | None  # its name in paper.md


EMOJI_POINTS = points(500, 1000, 1500, 3000, 4500, 6000)
KINDS = {
    "f8": Kind("f8 c4", "vae.py", "tiny-f8", "emoji", EMOJI_POINTS, "SD-VAE"),
    "f8c16": Kind("f8 c16", "vae.py", "tiny-f8-16", "emoji", EMOJI_POINTS, "SD-VAE-16"),
    "vq": Kind("VQ-GAN", "vqgan.py", "tiny-f8", "emoji", EMOJI_POINTS, "VQ-GAN"),
    "elpv": Kind("f8 c4", "vae.py", "tiny-f8", "elpv", points(100, 200, 400, 800), None),
}


class Arm(NamedTuple):
    title: str
    stages: tuple  # the flags of each stage of its fine-tune
    paper: str | None  # what paper.md adds to the autoencoder's name


def like_eq(title, flags, paper):
    """An arm that is EQ's but for some flags."""
    return Arm(title, (f"--p-alpha 0.1{flags}", f"--p-alpha 0.5{flags}"), paper)


def same_stages(title, flags, paper=None):
    return Arm(title, (flags, flags), paper)


STOPPED = " --explicit-weight 0.1 --stop-gradient"
ARMS = {
    "standard": same_stages("standard", "--p-alpha 1", ""),
    "eq": like_eq("EQ", "", " + EQ"),
    "untuned": Arm("pretrained", (), ""),  # pretrained() names the file of all arms' start
    "r": like_eq("EQ, rotations", " --tau r", " + EQ (R)"),
    "s": like_eq("EQ, scales", " --tau s", " + EQ (S)"),
    "aniso": like_eq("EQ, a scale for each side", " --tau rs-aniso", " + EQ (R, sx sy)"),
    "explicit": like_eq("explicit", " --explicit-weight 0.1", " + explicit"),
    "stop": like_eq("explicit, stop-gradient", STOPPED, " + explicit (stop-gradient)"),
    "p3": same_stages("EQ, p_alpha .3", "--p-alpha 0.3", " + EQ (p_alpha 0.3)"),
    "p5": same_stages("EQ, p_alpha .5", "--p-alpha 0.5", " + EQ"),
    "p7": same_stages("EQ, p_alpha .7", "--p-alpha 0.7", " + EQ (p_alpha 0.7)"),
}
KL_WEIGHTS = ("1", "3", "10", "30")
for weight in KL_WEIGHTS:
    flags = f"--p-alpha 1 --kl-weight {weight}"
    ARMS[f"kl-{weight}"] = same_stages(f"standard, KL weight {weight}", flags)
# Which of them table `why` takes: the one whose PSNR in table `blur` is nearest to EQ's
BLURRED = "kl-10"

PRETRAINING = (1500, 1e-3)  # steps, learning rate
STAGES = ((1250, 1e-3), (1250, 3e-4))
SAMPLES = scaled(2048, 16)


class Generator(NamedTuple):
    model: str
    latents: str  # the flag that names the autoencoder
    training: str
    sampling: str
    paper: str  # how the name of the generator that it stands for begins in paper.md


AVERAGE = "--ema-decay 0.99"
ENCODER = f"{AVERAGE} --encoder evaluate:efficientnet --cache-features"
DDIM = "--sampler ddim --sampling-steps 25"
HEUN = "--sampler heun --sampling-steps 25"
GENERATORS = {
    "dit": Generator("DiT-Ti/1", "--vae", AVERAGE, DDIM, "DiT-B/"),
    "sit": Generator("SiT-Ti/1", "--vae", AVERAGE, HEUN, "SiT-B/"),
    "repa": Generator("REPA-Ti/1", "--vae", ENCODER, HEUN, "REPA-XL/2 400k"),
    "maskgit": Generator(
        "MaskGIT-Ti", "--vqgan", "--warmup 100", "--cfg-scale 1", "MaskGIT-B 1.5M"
    ),
}


# --------------------------------------------------------------------------------------------------
# The tables


class Line(NamedTuple):
    """One generator on the latents of several arms. The others are compared with the first arm."""

    kind: str
    network: str | None  # None: the autoencoders alone
    arms: tuple
    steps: tuple


class Claim(NamedTuple):
    """What the paper says of a line: on the latents of `other` samples are nearer to the training
    pictures than on those of `base`."""

    text: str
    line: Line
    base: str = "standard"  # an arm
    other: str = "eq"
    gains: bool = True  # False: that they are not nearer; see verdict()
    steps: int | None = None  # of the generator; None: the last ones of the line


COLUMNS = ("R", "S", "PSNR", "rFD-EfficientNet")


class Table(NamedTuple):
    title: str
    paper: str  # number of the paper's table
    claims: list
    seeds: tuple = (0, 1, 2)  # each has autoencoders and generators of its own
    columns: tuple = COLUMNS  # of the autoencoders
    unclaimed: tuple = ()  # lines of which nothing is said

    @property
    def lines(self):
        return list(dict.fromkeys([*[claim.line for claim in self.claims], *self.unclaimed]))

    @property
    def line_of_curves(self):
        """The line of several lengths, or None."""
        return next((line for line in self.lines if len(line.steps) > 1), None)


PAIR = ("standard", "eq")


def make_tables():
    """{name: table}, in the order in which `all` makes them."""
    first, second, third, *_ = EMOJI_POINTS
    dit = Line("f8", "dit", PAIR, (first, second, third))
    more_training = dit._replace(arms=("standard", "untuned", "eq"))
    sit = dit._replace(network="sit")
    repa = Line("f8", "repa", PAIR, (first,))
    long = dit._replace(steps=EMOJI_POINTS)
    panels = Line("elpv", "dit", PAIR, KINDS["elpv"].points)
    taus = Line("f8", "dit", (*PAIR, "r", "s", "aniso"), (first,))
    explicit = taus._replace(arms=(*PAIR, "explicit", "stop"))
    shares = taus._replace(arms=("standard", "p3", "p5", "p7"))
    wide = Line("f8c16", "dit", PAIR, (first,))
    masked = Line("vq", "maskgit", PAIR, (second,))
    blur = Line("f8", None, ("eq", *[f"kl-{weight}" for weight in KL_WEIGHTS]), ())
    why = dit._replace(arms=(*PAIR, BLURRED))
    one = [Claim("EQ makes DiT's samples nearer", dit)]
    cause = [
        Claim("EQ gains over Eq. 1 for as many steps", more_training),
        Claim("Eq. 1 for more steps gains nothing", more_training, "untuned", "standard", False),
    ]
    generators = [
        Claim("EQ makes SiT's samples nearer", sit),
        Claim("EQ makes REPA's samples nearer", repa),
    ]
    photographs = [Claim("EQ makes DiT's samples nearer on photographs, too", panels)]
    tau_claims = [
        Claim("rotations alone gain", taus, other="r"),
        Claim("scales alone gain", taus, other="s"),
        Claim("both together gain more than rotations alone", taus, base="r"),
        Claim("both together gain more than scales alone", taus, base="s"),
        Claim("a scale for each side gains more than one for both", taus, "eq", "aniso"),
    ]
    losses = [
        Claim("EQ is better than the explicit loss", explicit, base="explicit"),
        Claim("EQ is better than the explicit loss with stop-gradient", explicit, base="stop"),
    ]
    p_alphas = [
        Claim("p_alpha .5 is better than .3", shares, "p3", "p5"),
        Claim("p_alpha .5 is better than .7", shares, "p7", "p5"),
    ]
    autoencoders = [
        Claim("EQ makes DiT's samples nearer, with 16 channels", wide),
        Claim("EQ makes MaskGIT's samples nearer", masked),
    ]
    blurs = [
        Claim("blur alone gains nothing", why, other=BLURRED, gains=False, steps=first),
        Claim("EQ gains over an arm that is as blurred", why, base=BLURRED, steps=first),
        Claim("blur alone gains nothing, in the end", why, other=BLURRED, gains=False),
        Claim("EQ gains over an arm that is as blurred, in the end", why, base=BLURRED),
    ]
    return {
        "gain": Table("DiT on EQ-VAE's latents", "1", one),
        "6": Table("more training is not the cause", "6", cause),
        "2": Table("other generators", "2", generators),
        "long": Table(
            "DiT for four times as many steps", "2", [Claim("the gap stays", long)], seeds=(0,)
        ),
        "photographs": Table("photographs of solar cells", "1", photographs),
        "5": Table("kinds of tau", "5", tau_claims, columns=(*COLUMNS, "ID")),
        "7": Table("explicit and implicit loss", "7", losses),
        "8": Table("p_alpha", "8", p_alphas),
        "1": Table("other autoencoders; masked generation (Table 3)", "1", autoencoders),
        "blur": Table(
            "the KL weight that blurs as EQ does", "1", [], seeds=(100,), unclaimed=(blur,)
        ),
        "why": Table("how much of it is blur", "1", blurs),
    }


TABLES = make_tables()


# --------------------------------------------------------------------------------------------------
# The commands. Each is one cell, however many tables need it; @ stands for the file that it makes


def training_flags(kind):
    """The flags that all trainers get: a kind's pictures, and what is written."""
    return f"--data data/{KINDS[kind].data}/train --sample-every 0 --save-every 250"


def autoencoder_command(kind):
    """How every command that trains an autoencoder begins."""
    found = KINDS[kind]
    return (
        f"{found.script} {training_flags(kind)} --image-size 64 --model {found.model} "
        "--batch-size 16 --lpips-weight 1 --perceptual evaluate:efficientnet_distance "
        "--gan-weight 0 --out @"
    )


@functools.cache
def pretrained(kind, seed):
    steps, lr = PRETRAINING
    flags = f"--init scratch --p-alpha 1 --steps {scaled(steps)} --lr {lr} --seed {seed}"
    return Cell(OUT, f"{kind}-pretrained-s{seed}", ".pt", f"{autoencoder_command(kind)} {flags}")


@functools.cache
def fine_tuned(kind, arm, seed):
    """The file of an arm's last stage. Each stage sees the pictures in an order of its own."""
    made = pretrained(kind, seed)
    for stage, ((steps, lr), flags) in enumerate(zip(STAGES, ARMS[arm].stages), start=1):
        command = f"{autoencoder_command(kind)} --init {made.file} {flags} --steps {scaled(steps)}"
        command += f" --lr {lr} --seed {seed + 10 * stage}"
        made = Cell(OUT, f"{kind}-{arm}-s{seed}-stage{stage}", ".pt", command, [made])
    return made


@functools.cache
def reconstruction(kind, arm, seed):
    """The score of an arm's autoencoder, on held-out pictures."""
    made = fine_tuned(kind, arm, seed)
    command = f"evaluate.py recon {made.file} --data data/{KINDS[kind].data}/val --image-size 64"
    command += " --features efficientnet --no-lpips --record @"
    return Cell(OUT, f"{kind}-{arm}-s{seed}", ".json", command, [made], records=RECORDS)


@functools.cache
def trained(kind, arm, network, seed, steps):
    """A generator after some steps. It goes on from the point before."""
    made = fine_tuned(kind, arm, seed)
    name = f"{kind}-{arm}-s{seed}-{network}"
    generator = GENERATORS[network]
    lengths = KINDS[kind].points
    start = None
    if steps != lengths[0]:
        start = trained(kind, arm, network, seed, lengths[lengths.index(steps) - 1])
    # The cache lies in the folder of the first point's model. make() empties that folder when the
    # command has changed
    cache = f"{OUT}/{name}-{lengths[0]}-model/cache"
    command = (
        f"{network}.py {training_flags(kind)} --model {generator.model} --batch-size 64 --lr 1e-3"
    )
    command += f" {generator.training} --out @ {generator.latents} {made.file} --cache {cache}"
    command += f" --seed {seed} --steps {steps}"
    return Cell(OUT, f"{name}-{steps}-model", ".pt", command, [made], start=start)


@functools.cache
def sampled(kind, arm, network, seed, steps):
    made = fine_tuned(kind, arm, seed)
    model = trained(kind, arm, network, seed, steps)
    generator = GENERATORS[network]
    command = f"{network}.py --sample-from {model.file} {generator.latents} {made.file} --samples @"
    command += f" --num-samples {SAMPLES} --labels balanced --seed {seed} {generator.sampling}"
    name = f"{kind}-{arm}-s{seed}-{network}-{steps}-samples"
    return Cell(OUT, name, ".npz", command, [model])


@functools.cache
def generation(kind, arm, network, seed, steps):
    """The score of a generator's samples."""
    samples = sampled(kind, arm, network, seed, steps)
    data = KINDS[kind].data
    command = f"evaluate.py samples {samples.file} data/{data}/train --features efficientnet"
    command += f" --thumbnails --statistics {OUT}/{data}-statistics.npz --record @"
    name = f"{kind}-{arm}-s{seed}-{network}-{steps}"
    return Cell(OUT, name, ".json", command, [samples], records=RECORDS)


def goals(table):
    """The cells of all its scores, seed by seed."""
    found = {}
    for seed in table.seeds:
        for line in table.lines:
            for arm in line.arms:
                scores = [generation(line.kind, arm, line.network, seed, n) for n in line.steps]
                found |= dict.fromkeys([reconstruction(line.kind, arm, seed), *scores])
    return list(found)


# --------------------------------------------------------------------------------------------------
# The report


class Scores:
    """The scores in a folder's records. Those of commands that have changed since are left out."""

    def __init__(self, folder):
        cells = [cell for table in TABLES.values() for cell in goals(table)]
        keys = {cell.name: cell.key for cell in cells}
        self.records = {}
        for record in read_records(folder / "records.jsonl"):
            name = record["about"]["cell"]
            if record["about"]["key"] == keys.get(name):
                self.records[name] = record  # of two records the later one

    def of(self, table, line, arm, column, steps=None):
        """{seed: number}, of the seeds that have it. Without steps it is of the autoencoders, with
        them of the generator's samples."""
        found = {}
        for seed in table.seeds:
            cell = reconstruction(line.kind, arm, seed)
            if steps is not None:
                cell = generation(line.kind, arm, line.network, seed, steps)
            record = self.records.get(cell.name)
            if record:
                found[seed] = next(iter(record.values())).get(column)  # the result comes first
        return {seed: value for seed, value in found.items() if value is not None}

    def core_hours(self, tables):
        """The time of all commands behind some tables. A command that scores share counts once."""
        seconds = {}
        for table in tables:
            for cell in goals(table):
                record = self.records.get(cell.name)
                # The commands that led to the score. Of one cell's the last is the one that counts
                for part in record["about"]["chain"] if record else []:
                    seconds[part["commands"][-1]] = part["seconds"]
        return sum(seconds.values()) / 3600


def write_report(folder):
    """Writes the tables and figures of a folder's records."""
    scores = Scores(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_between(folder / "README.md", page(scores))
    for name, table in TABLES.items():
        line = table.line_of_curves
        if line is not None:
            draw_curves(table, line, scores, folder / "figures" / f"{name}-curves.png")
            draw_samples(line, folder / "figures" / f"{name}-samples.png")
    print(f"{folder / 'README.md'}: the tables of {len(scores.records)} scores")


def page(scores):
    """The lines of all tables, and the time that they took."""
    lines = []
    for name, table in TABLES.items():
        title = f"**{name}: {table.title}.**"
        if not was_run(table, scores):
            lines += [f"{title} Not run.", ""]
            continue
        seeds = ", ".join(str(seed) for seed in table.seeds)
        about = f"Seeds {seeds}" if len(table.seeds) > 1 else f"Seed {seeds}"
        if any(line.network for line in table.lines):
            about += f"; {SAMPLES:,} samples"
        about += f"; {scores.core_hours([table]):.1f} core hours."
        about += speed_text(name, table, scores)
        header = ["score", "autoencoder", "ours", "change in each seed", "t-test", "paper"]
        rows = report.markdown_table(header, table_rows(table, scores))
        claims = [f"- {claim_text(table, claim, scores)}" for claim in table.claims]
        lines += [f"{title} {about}", "", *rows, "", *claims, *([""] if claims else [])]
    hours = scores.core_hours(TABLES.values())
    return [*lines, f"All tables: {hours:.1f} core hours. What they share counts once."]


def was_run(table, scores):
    """Whether some arm other than the first has a score. Tables share autoencoders, so with a
    generator its score alone counts."""
    for line in table.lines:
        for arm in line.arms[1:]:
            for steps in line.steps or [None]:
                column = "FD-EfficientNet" if steps else "PSNR"
                if scores.of(table, line, arm, column, steps):
                    return True
    return False


def table_rows(table, scores):
    """A row for each score of each arm: of the autoencoders, then of the generators."""
    rows = []
    titles = {"PSNR": "PSNR, dB", "rFD-EfficientNet": "FD-EfficientNet of reconstructions"}
    of_kinds = {line.kind: line for line in table.lines}  # lines of one kind have the same arms
    for line in of_kinds.values():
        for column in table.columns:
            found = {arm: scores.of(table, line, arm, column) for arm in line.arms}
            rows += score_rows(table, line, titles.get(column, column), column, found)
    for line in table.lines:
        for steps in line.steps:
            for column in ("FD-EfficientNet", "FD-thumbnails"):
                found = {arm: scores.of(table, line, arm, column, steps) for arm in line.arms}
                title = f"{column} of {GENERATORS[line.network].model}, {steps:,} steps"
                last = steps == line.steps[-1] and column == "FD-EfficientNet"
                rows += score_rows(table, line, title, "gFID" if last else None, found)
    return rows


def score_rows(table, line, title, paper_column, found):
    """The rows of one score. `found` is {arm: {seed: value}}, `paper_column` the name in the paper,
    or None."""
    several = len({other.kind for other in table.lines}) > 1
    base = found[line.arms[0]]
    rows = []
    for arm, ours in found.items():
        name = f"{KINDS[line.kind].title}, {ARMS[arm].title}" if several else ARMS[arm].title
        changes, p = "", ""
        if arm != line.arms[0]:
            changes = changes_text(base, ours, relative=not title.startswith("PSNR"))
            p = p_value(base, ours)
        numbers = show(list(ours.values()), len(table.seeds))
        rows.append([title, name, numbers, changes, p, paper_score(table, line, arm, paper_column)])
    return rows


def show(values, seeds):
    if not values:
        return "not run"
    text = f"{statistics.mean(values):.3g}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2g}"
    return text if seeds == 1 else f"{text} ({len(values)})"


def changes_of(base, other, relative=True):
    """The change from base to other in each seed that both have, in per cent or as a difference."""
    pairs = [(base[seed], other[seed]) for seed in base if seed in other]
    if relative:
        return [100 * (new / old - 1) for old, new in pairs]
    return [new - old for old, new in pairs]


def changes_text(base, other, relative=True):
    changes = [f"{change:+.1f}" for change in changes_of(base, other, relative)]
    if not changes:
        return ""
    return f"{', '.join(changes)} {'%' if relative else 'dB'}"


def p_value(base, other):
    """Of Student's paired t-test, two-sided. Two seeds or more are needed."""
    differences = changes_of(base, other, relative=False)
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return ""
    return f"p = {ttest_1samp(differences, 0).pvalue:.2g}"


def paper_score(table, line, arm, column):
    """What the paper has where we have an arm's score, or "". A column that is not in its table may
    be in Table 12, REPA's distances are in Table 10, and Table 2's autoencoders in Table 1."""
    family = KINDS[line.kind].paper
    ending = ARMS[arm].paper
    if family is None or ending is None or column is None:
        return ""
    if table.paper == "6" and arm == "standard":
        ending = " + Eq. 1"
    prefix = GENERATORS[line.network].paper if line.network else ""
    column = column.replace("FD-EfficientNet", "FID")
    places = [("10" if line.network == "repa" else table.paper, prefix), ("12", "")]
    if table.paper == "2" and column != "gFID":
        places.insert(0, ("1", "DiT-B/"))
    for number, beginning in places:
        _, rows = report.read_paper()[number]
        for row in rows:
            is_ours = row.get("generator", "").startswith(beginning)
            if row["autoencoder"] == family + ending and is_ours and column in row:
                return row[column]
    return ""


# --------------------------------------------------------------------------------------------------
# What holds


def claim_text(table, claim, scores):
    """What the paper says, whether it holds, and what was found."""
    line = claim.line
    steps = claim.steps or line.steps[-1]
    verdicts = {}
    changes = {}
    for column in ("FD-EfficientNet", "FD-thumbnails"):
        both = [scores.of(table, line, arm, column, steps) for arm in (claim.base, claim.other)]
        verdicts[column] = verdict(changes_of(*both), len(table.seeds), claim.gains)
        changes[column] = changes_text(*both) or "-"
    text = f"{claim.text[0].upper()}{claim.text[1:]}: **{verdicts['FD-EfficientNet']}** "
    text += f"({ARMS[claim.other].title} beside {ARMS[claim.base].title}, "
    text += f"{GENERATORS[line.network].model}, {steps:,} steps: FD-EfficientNet "
    text += f"{changes['FD-EfficientNet']}). "
    return f"{text}By FD-thumbnails: {verdicts['FD-thumbnails']} ({changes['FD-thumbnails']})."


def verdict(changes, seeds, gains=True):
    """plan.md's rule. `changes` are of the distance, in per cent, one of each seed.

    The distance falls if it is smaller in every seed and the mean change is larger than the
    deviation. It rises if it is larger in every seed. A claim of a gain holds if it falls, and does
    not hold if it rises. A claim of no gain (`gains` False) holds if it rises, and does not hold if
    it falls. All else cannot be told.
    """
    if len(changes) < seeds:
        return "not run in all seeds"
    if seeds == 1:
        return "cannot be told at this scale, with one seed"
    falls = max(changes) < 0 and -statistics.mean(changes) > statistics.stdev(changes)
    rises = min(changes) > 0
    if falls or rises:
        return "holds" if falls == gains else "does not hold"
    return "cannot be told at this scale"


def curves(table, line, scores):
    """{arm: [(step, distances of the seeds), ...]}; {} as long as a seed lacks a score."""
    found = {arm: [] for arm in line.arms}
    for arm in line.arms:
        for steps in line.steps:
            distances = scores.of(table, line, arm, "FD-EfficientNet", steps)
            if len(distances) < len(table.seeds):
                return {}
            found[arm].append((steps, list(distances.values())))
    return found


def mean_curve(curve):
    return [figures.summary(steps, distances) for steps, distances in curve]


def curve_of(k, curve):
    """The curve of the k-th seed: [(steps, distance), ...]."""
    return [(steps, distances[k]) for steps, distances in curve]


def speed_text(name, table, scores):
    """How many times as fast each arm is as the first one: by the means, and by each seed."""
    line = table.line_of_curves
    if line is None:
        return ""
    found = curves(table, line, scores)
    if not found:
        return " Not complete."
    texts = []
    base = found[line.arms[0]]
    for arm in line.arms[1:]:
        text = f"{ARMS[arm].title} is {ratio(mean_curve(base), mean_curve(found[arm]))} "
        text += "times as fast"
        if len(table.seeds) > 1:
            seeds = range(len(table.seeds))
            of_seeds = [ratio(curve_of(k, base), curve_of(k, found[arm])) for k in seeds]
            text += f" (by seed: {', '.join(of_seeds)})"
        texts.append(text[0].upper() + text[1:])
    return f" [{'; '.join(texts)}](figures/{name}-curves.png)."


def ratio(base, other):
    """How many times as many steps base needs as other, to the greater of their last distances.

    A curve that is below this distance at its first point may have been there before, so it gives
    only a bound.
    """
    steps, other_steps = figures.arrivals(base, other)
    if steps and other_steps:
        return f"{steps / other_steps:.2g}"
    if steps:
        return f"more than {steps / other[0][0]:.2g}"
    if other_steps:
        return f"less than {base[0][0] / other_steps:.2g}"
    return "an unknown number of"  # both are there from the start


def draw_curves(table, line, scores, path):
    """Fig. 1, right, once all seeds are there."""
    found = curves(table, line, scores)
    if not found:
        return
    count = len(table.seeds)
    seeds = f"mean ± deviation of {count} seeds" if count > 1 else f"seed {table.seeds[0]}"
    model = GENERATORS[line.network].model
    title = f"{table.title}: {seeds}"
    figure, axes = figures.new_plot(title, f"steps of {model}", "FD-EfficientNet of samples")
    means = {ARMS[arm].title: mean_curve(curve) for arm, curve in found.items()}
    figures.draw_curves(axes, means)
    figures.save(figure.savefig, path)


def draw_samples(line, path):
    """Fig. 4, where the samples of seed 0 are there. The photographs' licence allows no copies."""
    if KINDS[line.kind].data != "emoji":
        return
    rows = []
    for arm in line.arms:
        samples = sampled(line.kind, arm, line.network, 0, line.steps[-1])
        if not samples.is_made():
            return
        rows.append((ARMS[arm].title, figures.first_pictures(samples.file, 12)))
    model = GENERATORS[line.network].model
    title = f"{model} after {line.steps[-1]:,} steps, seed 0: samples of equal noise and labels"
    figures.save(figures.panel(title, rows).save, path)


def write_between(path, lines):
    """Replaces what a page has between <!-- records --> and <!-- /records -->."""
    first = "<!-- records -->"
    last = "<!-- /records -->"
    text = path.read_text() if path.exists() else f"{first}\n{last}\n"
    if text.count(first) != 1 or text.count(last) != 1:
        raise SystemExit(f"{path}: wanted: one line {first}, and one {last} below it")
    before = text.partition(first)[0]
    after = text.partition(last)[2]
    path.write_text("\n".join([before + first, "", *lines, "", last + after]))


# --------------------------------------------------------------------------------------------------
# The command line


def cores():
    """How many commands run side by side: $SMALL_JOBS, or the cores that this process may use."""
    if os.environ.get("SMALL_JOBS"):
        return int(os.environ["SMALL_JOBS"])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def check_pictures(wanted):
    """Says how to get the pictures of the tables, where they are not there."""
    for cell in closure(wanted):
        for word in cell.command.split():
            if word.startswith("data/") and not Path(word).is_dir():
                script = Path(word).with_name("prepare.py")
                raise SystemExit(f"{word} is not there: python {script}")


def main():
    os.chdir(RESULTS.parent)
    names = sys.argv[1:] or ["gain"]
    if names[0] == "report" and len(names) <= 2:
        write_report(Path(names[1]) if len(names) == 2 else OUT)
        return
    if names == ["all"]:
        names = list(TABLES)
    if not set(names) <= set(TABLES):
        raise SystemExit(__doc__)
    wanted = [goal for name in names for goal in goals(TABLES[name])]
    check_pictures(wanted)
    try:
        make(wanted, OUT, cores())
    finally:
        write_report(OUT)


if __name__ == "__main__":
    main()
