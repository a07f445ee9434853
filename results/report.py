"""Writes a Markdown page from records of evaluate.py: all scores, then the paper's tables and ours.

    python results/report.py out/*.json --figures out/figures --out out/report.md

A record belongs to a row of the paper only where every field of its network's configuration is the
preset's, and where the arguments of its training are those that the row is about. Records of equal
networks (by the hash of their numbers) or of equal samples count once. Several records are seeds of
one row only if the arguments that made them differ in `seed` alone. All others stand in lines of
their own.
"""

import functools
import json
import os
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import vae  # noqa: E402
import vqgan  # noqa: E402

PAPER = Path(__file__).with_name("paper.md")
GENERATED = ("gFID", "sFID", "IS", "Precision", "Recall")  # columns of `samples`, not of `recon`
FAMILIES = {
    "sd": "SD-VAE",
    "sdxl": "SDXL-VAE",
    "sd3": "SD3-VAE",
    "sd-16": "SD-VAE-16",
    "f16-1024": "VQ-GAN",
}
KINDS = {"rs": "EQ", "r": "EQ (R)", "s": "EQ (S)", "rs-aniso": "EQ (R, sx sy)"}
# The fine-tuning of every row of the paper
RECIPE = dict(
    train="all",
    recipe="paper",
    perceptual="lpips",
    lpips_weight=1,
    l2_weight=0,
    ssim_weight=0,
    kl_weight=1e-6,
    steps=50_000,
    batch_size=160,
    image_size=[256, 256],
)
# Arguments that change where a run writes and how fast it is, but not what it computes
BOOKKEEPING = {
    "bench", "cache", "change", "compile", "given", "log_every", "micro_batch", "out",
    "sample_every", "sample_from", "samples", "save_every", "seed", "workers",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Records


def read_records(paths):
    """-> (arms, runs): the autoencoders and the generators' samples that the records score.

    paths  files of --record, or JSON-lines files with a record a line
    Both are dictionaries with stem, scores, about, made (what made it), record (its file), and of
    an arm `name`, the paper's or else its stem. A run has `arm`, the autoencoder that it was
    trained on or None; `generator`, as "DiT-XL/2 400k"; and its `step`.
    """
    arms = []
    runs = []
    for path in paths:
        try:
            text = Path(path).read_text()
            lines = text.splitlines() if str(path).endswith(".jsonl") else [text]
            for line in lines:
                read_record(path, json.loads(line), arms, runs)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise vae.InputError(f"{path}: no record of evaluate.py ({reason})") from None
    arms = merged(arms, lambda arm: arm["made"]["sha256"])
    runs = merged(runs, lambda run: run["about"]["hashes"].get(run["about"]["samples"]))
    of_hash = {arm["made"]["sha256"]: arm for arm in arms}
    for run in runs:
        run["arm"] = of_hash.get(run["made"].get("autoencoder"))
    return arms, runs


def read_record(path, record, arms, runs):
    about = record.pop("about")
    for stem, scores in record.items():
        row = dict(stem=stem, scores=scores, about=about, record=path)
        if "autoencoders" in about:
            made = about["autoencoders"][stem]
            row |= dict(made=made, name=paper_name(made) or stem)
            # For Fig. 5, which has fine-tunes of several lengths
            arms.append(row | dict(of_any_length=paper_name(made, any_length=True) or stem))
        else:
            made = about["drawn"]
            step = made.get("step") or 0  # an official checkpoint does not say it
            guided = "*" if made.get("cfg_scale", 1) != 1 else ""
            generator = f"{made.get('model', stem)} {thousands(step)}{guided}"
            runs.append(row | dict(made=made, generator=generator, step=step))


def merged(rows, key):
    """Rows of equal hashes as one, with the scores of all of them; the first one's win."""
    found = {}
    for number, row in enumerate(rows):
        first = found.setdefault(key(row) or number, row)
        first["scores"] = row["scores"] | first["scores"]
    return list(found.values())


def thousands(n):
    """400000 -> 400k, 1500000 -> 1.5M, of exactly that many."""
    if n >= 1_000_000 and n % 100_000 == 0:
        return f"{n / 1e6:g}M"
    if n and n % 1000 == 0:
        return f"{n // 1000}k"
    return str(n)


# --------------------------------------------------------------------------------------------------
# Which row of the paper is it, and which records are seeds of one another?


def paper_name(made, any_length=False):
    """An autoencoder's name in paper.md, or None where it is none of the paper's."""
    family = FAMILIES.get(preset_of(made.get("config"), made.get("model")))
    if family is None:
        return None
    args = made.get("args")
    if not args:  # somebody's file
        return family + "-FT-EMA" if "ft-ema" in made["file"] else family
    recipe = dict(RECIPE, gan_weight=0.8 if family == "VQ-GAN" else 0.5)
    differing = {name for name in recipe if plain(args.get(name, recipe[name])) != recipe[name]}
    if made.get("step", args["steps"]) < args["steps"]:
        differing.add("steps")
    if any_length:
        differing.discard("steps")
    if differing or args["init"] == "scratch":
        return None
    if args.get("explicit_weight"):
        return family + " + explicit" + (" (stop-gradient)" if args["stop_gradient"] else "")
    if args["p_alpha"] == 1:
        return f"{family} + Eq. 1"
    if args["p_alpha"] != 0.5:
        return f"{family} + {KINDS[args['tau']]} (p_alpha {args['p_alpha']:g})"
    return f"{family} + {KINDS[args['tau']]}"


def preset_of(config, given=None):
    """The name of the preset that has every field of a configuration, or None.

    Scale and shift of the latents may differ, because a fine-tune has its own. Presets that differ
    in nothing else (sd and sdxl) are then told apart only by `given`, the --model of the command.
    """
    if config is None:
        return None
    alike = []
    for name, full in full_presets().items():
        differing = {field for field in full if full[field] != plain(config.get(field))}
        differing |= set(config) - set(full)
        if not differing:
            return name
        if differing <= {"scaling_factor", "shift_factor"}:
            alike.append(name)
    if given in alike or len(alike) == 1:
        return given if given in alike else alike[0]
    return None


@functools.cache
def full_presets():
    """{name: configuration} of all presets; the constructors fill in what a preset leaves out."""
    full = {}
    with torch.device("meta"):
        for network, presets in ((vae.AutoencoderKL, vae.CONFIGS), (vqgan.VQGAN, vqgan.CONFIGS)):
            for name, arguments in presets.items():
                config = network(**arguments).config
                full.setdefault(name, {key: plain(value) for key, value in config.items()})
    return full


def plain(value):
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def made_alike(row, *passing):
    """A text that is equal for records that are seeds of one another; None where nobody knows.

    passing  names of further arguments that may differ (a curve's `steps`)
    """
    made = row["made"]
    if not made.get("args"):
        return None
    args = {k: v for k, v in made["args"].items() if k not in (*BOOKKEEPING, *passing)}
    sampling = {k: v for k, v in made.items() if k not in ("args", "file", "generator", "sha256")}
    for name in ("seed", "step", *passing):
        sampling.pop(name, None)
    measured = (row["about"]["extractor"], row["scores"]["N"])
    return json.dumps((args, sampling, measured), sort_keys=True, default=str)


def seeds_of(rows, *passing, x=None):
    """Rows -> lists of rows that are seeds of one another, in the order of their first ones.

    x  a function of a row; with it the lists are curves, and those of one x are seeds. Rows of
       which the arguments are unknown may then share a curve, but are never seeds
    """
    groups = {}
    for number, row in enumerate(rows):
        key = made_alike(row, *passing)
        seed = None
        if key is not None:
            seed = (row["made"].get("seed"), row["made"]["args"].get("seed"))
        elif x is None:
            key = number
        place = (seed, x(row) if x else None)
        repeated = 0  # the same seed once more is no other seed
        while place in groups.setdefault((key, repeated), {}):
            repeated += 1
        groups[(key, repeated)][place] = row
    return [list(group.values()) for group in groups.values() if group]


# --------------------------------------------------------------------------------------------------
# The page


def distance_of(scores):
    """The name of the Frechet distance among the scores: FID, or of other features."""
    for name in ("rFID", "FID", "rFD-EfficientNet", "FD-EfficientNet"):
        if name in scores:
            return name
    return next((name for name in scores if name.startswith(("rF", "FD"))), None)


def show(value):
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def markdown_table(header, rows):
    """Lines of texts -> lines of Markdown. A | inside of a text is no border of a cell."""
    rows = [[text.replace("|", "\\|") for text in row] for row in [header, *rows]]
    lines = [rows[0], ["---"] * len(header), *rows[1:]]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(rows, column):
    """One column of seeds of one another: the mean, with its spread and number if it has any."""
    key = column
    if column in ("gFID", "rFID"):
        key = distance_of(rows[0]["scores"])
    values = [row["scores"][key] for row in rows if key in row["scores"]]
    if not values:
        return "not run"
    text = show(float(statistics.mean(values)))
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2g} ({len(values)} seeds)"
    if "FD" in key:
        text += f" ({key})"
    return text


def all_scores(arms, runs):
    """A column for each autoencoder, with the scores of the samples that were made on it; further
    ones for samples whose autoencoder has no record. A line for each score, then for each count."""
    columns = []
    names = []
    conventions = {}
    for arm in arms:
        columns.append(dict(arm["scores"], step=arm["made"].get("step")))
        names.append(arm["stem"])
        conventions |= arm["about"].get("conventions", {})
    for run in runs:
        if run["arm"] is None:
            columns.append({})
            names.append(run["stem"])
        column = columns[-1] if run["arm"] is None else columns[arms.index(run["arm"])]
        column |= {f"{run['generator']}: {key}": value for key, value in run["scores"].items()}
    rows = []
    for key in sorted(dict.fromkeys(key for column in columns for key in column), key=is_count):
        if all(column.get(key) is None or isinstance(column[key], list) for column in columns):
            continue
        values = [show(column.get(key)) for column in columns]
        rows.append([plain_name(key), *values, conventions.get(key, "")])
    return markdown_table(["", *names, "how"], rows)


# What records call a score -> what the page calls it
COUNTS = {
    "step": "steps of training",
    "N": "pictures scored",
    "N reference": "reference pictures",
    "N_ID": "pictures for ID",
    "equal images": "pictures that come back without any error",
    "unreadable": "pictures that could not be read",
}
PLAIN_NAMES = {
    **COUNTS,
    "PSNR": "PSNR, dB",
    "R": "R, equivariance error under rotation",
    "S": "S, equivariance error under scaling",
    "ID": "ID, intrinsic dimension of the latents",
}


def is_count(key):
    return key.rpartition(": ")[2] in COUNTS


def plain_name(key):
    """A score's name for readers, with the way that is good: ↓ less is better, ↑ more is.

    key  as in a record, or "DiT-XL/2 400k: FID", of a generator's samples
    """
    generator, _, score = key.rpartition(": ")
    name = PLAIN_NAMES.get(score, score)
    name = re.sub(r"^([RS])([\d.]+)$", r"\1 at \2", name).replace("at 0.", "at .")
    name = f"{name} {arrow(score)}".strip()
    if not generator:
        return name
    network, _, step = generator.partition(" ")
    guided = ", guided" if step.endswith("*") else ""
    return f"{network} after {step.removesuffix('*')} steps{guided}: {name}"


def arrow(score):
    """Which way of a score, or of a column of the paper's tables, is good."""
    if score in ("PSNR", "SSIM", "IS", "Precision", "Recall"):
        return "↑"
    distances = r"[rgs]?FID( .*)?|r?FD-\S+( .*)?|LPIPS|EfficientNet distance|[RS][\d.]*"
    return "↓" if re.fullmatch(distances, score) else ""


@functools.cache
def read_paper():
    """{number of a table: (title, rows as {column: text})} of paper.md."""
    tables = {}
    for part in PAPER.read_text().split("\n## ")[1:]:
        title, _, header, _, *rows = part.strip().splitlines()
        number = title.removeprefix("Table ").partition(":")[0]
        tables[number] = (title, [dict(zip(cells(header), cells(row))) for row in rows])
    return tables


def paper_tables(arms, runs):
    """The tables of paper.md of which something was run, with our lines below the paper's."""
    lines = []
    for title, rows in read_paper().values():
        table = []
        for row in rows:
            first, *rest = row.values()
            table += [[f"paper: {first}", *rest], *our_lines(row, arms, runs)]
        if len(table) > len(rows):
            header = [f"{name} {arrow(name)}".strip() for name in rows[0]]
            lines += [f"## {title}", "", *markdown_table(header, table), ""]
    return lines


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def our_lines(row, arms, runs):
    """Our lines for one row of the paper's: of each group of seeds one."""
    lines = []
    for group in seeds_of([arm for arm in arms if arm["name"] == row["autoencoder"]]):
        on_them = [run for run in runs if run["arm"] in group]
        sampled = [run for run in on_them if run["generator"] == row.get("generator")]
        for seeds in seeds_of(sampled) or [[]]:
            line = [f"ours: {', '.join(arm['stem'] for arm in group)}"]
            for column in list(row)[1:]:
                if column == "generator":
                    line.append(", ".join(run["stem"] for run in seeds) or "not run")
                elif column in GENERATED:
                    line.append(cell(seeds, column) if seeds else "not run")
                else:
                    line.append(cell(group, column))
            if set(line[1:]) != {"not run"}:
                lines.append(line)
    return lines


def notes_of(rows):
    """What evaluate.py has warned of, a line each, with the records that it is about."""
    found = {}
    for row in rows:
        for note in row["about"].get("notes", []):
            found.setdefault(note, {})[Path(row["record"]).name] = True
    lines = [f"- {note} ({', '.join(names)})" for note, names in found.items()]
    return [*lines, ""] if lines else []


# Files of results/figures.py -> what they show
FIGURES = {
    "fig1-curves": "The samples' distance over the generator's steps",
    "fig1-latents": "The latents as colours",
    "fig2-rotation": "What turned latents decode to",
    "fig2-scale": "What shrunken latents decode to",
    "fig3-transforms": "The distance under transforms",
    "fig4-samples": "Samples of each generator",
    "fig5-fine-tuning": "The samples' distance over the autoencoder's steps",
    "training-curves": "Losses and measures over the steps of training",
}


def main():
    parser = vae.make_parser(__doc__)
    parser.add_argument("records", nargs="+", metavar="RECORD", help="JSON, or JSON-lines")
    parser.add_argument("--figures", help="folder of results/figures.py, to show them on the page")
    parser.add_argument("--out", default="report.md", help="file to write")
    args = parser.parse_args()
    try:
        arms, runs = read_records(args.records)
        lines = ["# EQ-VAE", "", "↓: less is better. ↑: more is better.", ""]
        lines += [*all_scores(arms, runs), "", *notes_of(arms + runs), *paper_tables(arms, runs)]
        folder = Path(args.out).parent
        for name, words in FIGURES.items():
            picture = Path(args.figures or "", f"{name}.png")
            if args.figures and picture.exists():
                lines += [f"![{words}]({os.path.relpath(picture, folder)})", ""]
        names = ", ".join(Path(path).name for path in args.records)
        lines.append(f"Commands, seeds, hashes, versions and devices are in {names}.")
        text = "\n".join(lines) + "\n"
        vae.write_file(args.out, lambda path: path.write_text(text))
    except vae.InputError as error:
        parser.error(error)
    print(args.out)


if __name__ == "__main__":
    main()
