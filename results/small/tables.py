"""Writes the tables and figures of results/small/README.md that are made from history.jsonl.

    python results/small/tables.py

A line of history.jsonl holds a name and a record of evaluate.py. kl16-eq-s0-dit-2000-random is the
name of the samples of a DiT after 2,000 steps, on the latents of a KL autoencoder of 16 channels,
fine-tuned with EQ from seed 0, and scored on features of random convolutions. The name of the
autoencoder's own record, kl16-eq-s0-random, has no generator in it. results/reproduce.py formats
its tables with functions of this file.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent

# Part of a name -> what our tables call the autoencoder, and what the paper's Table 1 calls it
KINDS = {
    "kl16": ("KL, 16 channels", "SD-VAE-16"),
    "kl4": ("KL, 4 channels", "SD-VAE"),
    "vq": ("VQ-GAN", "VQ-GAN"),
    "photo": ("KL, 16 channels, photographs", None),
}
# Part of a name -> what our tables add to the autoencoder's name, and what the paper's add
ARMS = {
    "pretrained": (", pretrained", ""),
    "standard": (" + Eq. 1", ""),
    "eq": (" + EQ", " + EQ"),
    "r": (" + EQ, rotations", " + EQ (R)"),
    "s": (" + EQ, scales", " + EQ (S)"),
    "aniso": (" + EQ, a scale a side", " + EQ (R, sx sy)"),
    "bicubic": (" + EQ, bicubic, no antialias", None),
    "bilinear": (" + EQ, bilinear", None),
    "explicit": (" + explicit", " + explicit"),
    "stop": (" + explicit, stop-gradient", " + explicit (stop-gradient)"),
    "p3": (" + EQ, p_alpha .3", " + EQ (p_alpha 0.3)"),
    "p7": (" + EQ, p_alpha .7", " + EQ (p_alpha 0.7)"),
}
# Part of a name -> the generator's model, and the generator of the paper that it stands beside
NETWORKS = {
    "dit": ("DiT-Ti/2", "DiT-B/"),
    "sit": ("SiT-Ti/2", "SiT-B/"),
    "repa": ("REPA-Ti/2", "REPA-XL/2 400k"),
    "maskgit": ("MaskGIT-Ti", "MaskGIT-B 1.5M"),
}
# The steps after which samples of each generator are scored
STEPS = dict(dit=(1000, 2000), sit=(1000, 2000, 4000), repa=(1000, 2000), maskgit=(1000, 2000))
PAIR = ("standard", "eq")


# --------------------------------------------------------------------------------------------------
# What the tables are


class Row(NamedTuple):
    kind: str  # of autoencoder: a key of KINDS
    arm: str  # a key of ARMS
    network: str  # a key of NETWORKS
    steps: int  # of the generator
    last: bool  # whether these are its last


class Table(NamedTuple):
    title: str
    seeds: int  # 0 to seeds - 1
    columns: tuple
    rows: list


def make_tables():
    """{number in the paper: table}.

    rFD and gFD are Frechet distances: of reconstructions, and of a generator's samples.
    """

    def rows(arms, kind="kl16", network="dit", all_steps=False):
        found = []
        for count in STEPS[network]:
            last = count == STEPS[network][-1]
            if last or all_steps:
                found += [Row(kind, arm, network, count, last) for arm in arms]
        return found

    autoencoders = [*rows(PAIR), *rows(PAIR, "kl4"), *rows(PAIR, "vq", "maskgit")]
    generators = []
    for network in ("dit", "sit", "repa"):
        generators += rows(PAIR, "kl16", network, all_steps=True)
    masked = rows(PAIR, "vq", "maskgit", all_steps=True)
    columns = ("rFD", "gFD", "PSNR", "R", "S")
    return {
        "1": Table("reconstruction, generation, equivariance", 3, columns, autoencoders),
        "2": Table("generators", 3, ("gFD",), generators),
        "3": Table("masked generation", 1, ("gFD",), masked),
        "5": Table("kinds of tau", 1, ("gFD", "rFD", "ID"), rows((*PAIR, "r", "s", "aniso"))),
        "6": Table(
            "more training is not the cause", 1, ("gFD", "rFD"), rows(("pretrained", *PAIR))
        ),
        "7": Table(
            "explicit and implicit loss",
            1,
            ("gFD", "rFD", "R", "S"),
            rows((*PAIR, "explicit", "stop")),
        ),
        "8": Table("p_alpha", 1, ("gFD", "rFD"), rows(("p3", "eq", "p7"))),
    }


# --------------------------------------------------------------------------------------------------
# Scores, of our records and of the paper


class Scores:
    """Finds the scores of tables in records.

    records     {name: record of evaluate.py}
    extractors  the endings of their names: which features a Frechet distance is measured on
    """

    def __init__(self, records, extractors):
        self.records = records
        self.extractors = extractors

    def columns(self, names):
        """rFD and gFD become a column for each extractor: gFD-random, gFD-classifier."""
        columns = []
        for name in names:
            if name in ("rFD", "gFD"):
                columns += [f"{name}-{extractor}" for extractor in self.extractors]
            else:
                columns.append(name)
        return columns

    def record_name(self, row, column, seed):
        score, _, extractor = column.partition("-")
        name = f"{row.kind}-{row.arm}-s{seed}"
        if score == "gFD":
            name += f"-{row.network}-{row.steps}"
        extractor = extractor or self.extractors[0]  # all have the scores that are no distance
        return f"{name}-{extractor.lower()}"

    def find(self, row, column, seeds):
        """{seed: value}, of the seeds that there is a record of."""
        found = {}
        for seed in range(seeds):
            record = self.records.get(self.record_name(row, column, seed))
            if record is not None:
                found[seed] = value_of(record, column)
        return found

    def core_hours(self, *tables):
        """The time of all commands behind some tables. A command that rows share counts once."""
        seconds = {}
        for table in tables:
            for row in table.rows:
                for column in self.columns(table.columns):
                    names = [self.record_name(row, column, seed) for seed in range(table.seeds)]
                    for name in names:
                        seconds |= command_times(self.records.get(name))
        return sum(seconds.values()) / 3600


def value_of(record, column):
    scores = next(iter(record.values()))
    if column in scores:
        return scores[column]
    distances = [name for name in scores if name.startswith(("FD-", "rFD-"))]
    return scores[distances[0]]  # those that come after it are of transforms


def command_times(record):
    if record is None:
        return {}
    return {part["commands"][-1]: part["seconds"] for part in record["about"]["chain"]}


def read_paper():
    """{(number, autoencoder, generator): {column: text}} of all rows of results/paper.md."""
    rows = {}
    for part in (FOLDER.parent / "paper.md").read_text().split("\n## Table ")[1:]:
        number = part.partition(":")[0]
        header, _, *lines = [line for line in part.splitlines() if line.startswith("|")]
        for line in lines:
            entries = cells(line)
            rows[number, entries[0], entries[1]] = dict(zip(cells(header), entries))
    return rows


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def paper_score(paper, number, row, column):
    """What the paper has where we have a row of table `number`, or "-"."""
    family = KINDS[row.kind][1] if number == "1" or row.kind == "vq" else "SD-VAE"
    ending = ARMS[row.arm][1]
    if number == "6" and row.arm == "standard":
        ending = " + Eq. 1"  # elsewhere it stands beside the paper's SD-VAE
    if family is None or ending is None or not row.last:
        return "-"
    number = "10" if row.network == "repa" else number
    for (table, autoencoder, generator), scores in paper.items():
        if (table, autoencoder) == (number, family + ending):
            if generator.startswith(NETWORKS[row.network][1]):
                return scores.get(column.replace("FD", "FID"), "-")
    return "-"


# --------------------------------------------------------------------------------------------------
# The page


def page(tables, scores):
    """All tables as lines of Markdown."""
    lines = [
        "**What EQ changes** against the arm of Eq. 1 with the same seed: mean ± standard",
        "deviation (number of seeds). Less is better, except for PSNR.",
        "",
        *effect_tables(tables, scores),
    ]
    paper = read_paper()
    for number, table in tables.items():
        lines += table_lines(number, table, scores, paper)
    hours = scores.core_hours(*tables.values())
    return [*lines, f"All tables: {hours:.1f} core hours. What they share counts once."]


def effect_tables(tables, scores):
    """What EQ changes in every autoencoder, and in every generator."""
    rows = [*tables["2"].rows, *tables["3"].rows, *tables["1"].rows]
    rows = [row for row in dict.fromkeys(rows) if row.arm == "eq"]
    one_of_each_kind = {}
    for row in rows:
        one_of_each_kind.setdefault(row.kind, row)
    columns = scores.columns(("R", "S", "PSNR", "rFD"))
    body = []
    for row in one_of_each_kind.values():
        body.append([KINDS[row.kind][0], *[effect(scores, row, column) for column in columns]])
    lines = [*markdown(["autoencoder", *columns], body), ""]
    columns = scores.columns(("gFD",))
    body = []
    for row in rows:
        changes = [effect(scores, row, column) for column in columns]
        body.append([KINDS[row.kind][0], generator_name(row), *changes])
    return [*lines, *markdown(["autoencoder", "generator", *columns], body), ""]


def effect(scores, row, column):
    """How much a score of EQ's arm differs from that of Eq. 1's with the same seed."""
    equivariant = scores.find(row, column, 3)
    standard = scores.find(row._replace(arm="standard"), column, 3)
    changes = []
    for seed in sorted(equivariant.keys() & standard.keys()):
        if column == "PSNR":
            changes.append(equivariant[seed] - standard[seed])
        else:
            changes.append(100 * (equivariant[seed] / standard[seed] - 1))
    unit = "dB" if column == "PSNR" else "%"
    return f"{statistics.mean(changes):+.2g}{spread(changes)} {unit} ({len(changes)})"


def table_lines(number, table, scores, paper):
    """One of the paper's tables: our scores, and after each the paper's."""
    hours = scores.core_hours(table)
    header = ["autoencoder", "generator"]
    body = [[KINDS[row.kind][0] + ARMS[row.arm][0], generator_name(row)] for row in table.rows]
    for name in table.columns:
        for column in scores.columns([name]):
            header.append(column)
            for line, row in zip(body, table.rows):
                line.append(show(list(scores.find(row, column, table.seeds).values()), table.seeds))
        if name != "PSNR":  # the paper's Table 1 has none
            header.append(f"{name.replace('FD', 'FID')}, paper")
            for line, row in zip(body, table.rows):
                line.append(paper_score(paper, number, row, name))
    of = "Mean ± standard deviation (number of seeds)" if table.seeds > 1 else "One seed"
    title = f"**Table {number}: {table.title}.** {of}; {hours:.1f} core hours."
    return [title, "", *markdown(header, body), ""]


def generator_name(row):
    return f"{NETWORKS[row.network][0]}, {row.steps:,} steps"


def show(values, seeds):
    text = f"{statistics.mean(values):.3g}"
    return text if seeds == 1 else f"{text}{spread(values)} ({len(values)})"


def spread(values):
    return f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""


def markdown(header, body):
    lines = [header, ["---"] * len(header), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def write_between(path, marker, lines):
    """Replaces what a page has between <!-- MARKER --> and <!-- /MARKER -->."""
    first = f"<!-- {marker} -->"
    last = f"<!-- /{marker} -->"
    text = path.read_text() if path.exists() else f"{first}\n{last}\n"
    if text.count(first) != 1 or text.count(last) != 1:
        raise SystemExit(f"{path}: wanted: one line {first}, and one {last} below it")
    before = text.partition(first)[0]
    after = text.partition(last)[2]
    path.write_text("\n".join([before + first, "", *lines, "", last + after]))


# --------------------------------------------------------------------------------------------------
# The history: what was measured before evaluate.py had EfficientNet


def read_history():
    """{name: record}, and the tables with the rows that were run only then."""
    lines = [json.loads(line) for line in (FOLDER / "history.jsonl").read_text().splitlines()]
    tables = make_tables()
    for arm in PAIR:
        tables["1"].rows.append(Row("photo", arm, "dit", 2000, last=True))
    for arm in ("bicubic", "bilinear"):
        tables["5"].rows.append(Row("kl16", arm, "dit", 2000, last=True))
    return {line["name"]: line["record"] for line in lines}, tables


def draw_history(scores, folder):
    """Draws Fig. 1 (right), 3 and 5. The other figures there need files that are gone."""
    sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]
    from figures import TRANSFORMS, draw_bars, draw_curves, new_plot, save, speed_up, summary

    def draw(name, title, x, lines, drawing):
        figure, axes = new_plot(title, x, "FD-classifier")
        drawing(axes, lines)
        save(figure.savefig, folder / f"{name}.png")

    def point(x, arm, network, steps, seeds):
        row = Row("kl16", arm, network, steps, last=True)
        return summary(x, list(scores.find(row, "gFD-classifier", seeds).values()))

    curves = {}
    bars = {}
    transformed = scores.records["kl16-whole-s0-transforms-classifier"]
    for arm in PAIR:
        label = KINDS["kl16"][0] + ARMS[arm][0]
        curves[label] = [point(steps, arm, "sit", steps, 3) for steps in STEPS["sit"]]
        distances = transformed[f"kl16-{arm}-s0-whole"]
        bars[label] = [distances[f"FD-classifier {name}"] for name in TRANSFORMS]
    factor = speed_up(*curves.values())
    title = f"Fig. 1: samples of SiT-Ti/2; EQ is {factor:.2g} times as fast"
    draw("fig1-curves", title, "generator's step", curves, draw_curves)
    draw("fig3-transforms", "Fig. 3: distance under transforms", "", bars, draw_bars)
    tuned = ((0, "pretrained"), (500, "third"), (1500, "eq"))
    curves = {"DiT-Ti/2, 2,000 steps": [point(step, arm, "dit", 2000, 1) for step, arm in tuned]}
    title = "Fig. 5: distance over the fine-tune with EQ"
    draw("fig5-fine-tuning", title, "autoencoder's step", curves, draw_curves)


def main():
    records, tables = read_history()
    scores = Scores(records, ("random", "classifier"))
    write_between(FOLDER / "README.md", "history", page(tables, scores))
    draw_history(scores, FOLDER / "figures")
    print(FOLDER / "README.md")


if __name__ == "__main__":
    main()
