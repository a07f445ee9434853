"""Draws the paper's figures, as far as what is given goes.

    python results/figures.py standard.pt eq.pt --data data/imagenet/val --records out/*.json
    python results/figures.py standard.jsonl eq.jsonl

Of the logs of runs (.jsonl): training-curves.png, a panel for each loss, R, S, PSNR and speed, with
all runs in each. results/recipes.md tells what each number means.

Of checkpoints: fig1-latents.png, the latents as colours (Fig. 1, left); fig2-scale.png and
fig2-rotation.png, what transformed latents decode to (Fig. 2 and 6). Of records of evaluate.py:
fig1-curves.png, the distance over the generators' steps (Fig. 1, right); fig3-transforms.png, under
transforms (Fig. 3, recon --transforms); fig4-samples.png (Fig. 4); fig5-fine-tuning.png, over the
autoencoder's steps (Fig. 5).
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from report import distance_of, made_alike, read_records, seeds_of  # noqa: E402

import vae  # noqa: E402
import vqgan  # noqa: E402
from eqloss import scale_transform  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Of checkpoints: Fig. 1 (left), 2 and 6


@torch.no_grad()
def latent_figures(args, device):
    """Draws what latents look like, and what they decode to when they are transformed."""
    data = vae.ImageFolder(args.data, args.image_size)
    x = torch.cat(list(vae.evenly_spaced(data, args.num_images, device)))  # (N, 3, H, W), shown
    many = list(vae.evenly_spaced(data, 256, device))  # what the principal components are fitted to
    latents = [("images", pictures_of(vae.to_uint8(x)))]
    scaled = []
    turned = []
    for path in args.checkpoints:
        model = vqgan.load_model(path, args.model, args.padding_mode).to(device)
        name = Path(path).stem
        grid = model.grid(args.image_size)
        z, _ = vqgan.encode_with(model, x)  # (N, c, h, w)
        sample = torch.cat([vqgan.encode_with(model, part)[0] for part in many])
        latents.append((f"{name}: latents", pictures_of(principal_colours(z, sample), x.shape[2])))
        for rows, tau in (
            (scaled, scale_transform(0.5, grid)),
            (turned, scale_transform(1, grid, quarter_turns=2)),
        ):
            of_image, _ = vqgan.encode_with(model, tau(x))
            if not rows:
                rows.append(("tau o x", pictures_of(vae.to_uint8(tau(x)))))
            for label, decoded in (
                ("D(E(tau o x))", vqgan.decode_with(model, of_image)),
                ("D(tau o E(x))", vqgan.decode_with(model, tau(z))),
            ):
                rows.append((f"{name}: {label}", pictures_of(vae.to_uint8(decoded))))

    panels = {
        "fig1-latents": ("Three principal components of the latents as colours (Fig. 1)", latents),
        "fig2-scale": ("Images and latents scaled to half the size (Fig. 2)", scaled),
        "fig2-rotation": ("Images and latents turned by 180 degrees (Fig. 2)", turned),
    }
    for name, (title, rows) in panels.items():
        save(panel(title, rows).save, args.out / f"{name}.png")
    return list(panels)


def principal_colours(z, sample):
    """Latents z (N, c, h, w) -> uint8 (N, 3, h, w): projections on `sample`'s principal axes.

    The 1st to 99th percentile of the sample's projections become 0 to 255. Axes and range are
    fitted to each autoencoder, so colours mean nothing from one autoencoder to another.
    """
    points = sample.transpose(0, 1).flatten(1).double()  # (c, N h w)
    centre = points.mean(dim=1, keepdim=True)
    axes = torch.linalg.eigh(torch.cov(points)).eigenvectors.flip(1)[:, :3].T  # (3, c)
    strongest = axes.abs().argmax(dim=1, keepdim=True)
    axes = axes * axes.gather(1, strongest).sign()  # an eigenvector's sign is not determined
    projections = (axes @ (points - centre)).cpu().numpy()
    low, high = np.percentile(projections, (1, 99), axis=1)[:, :, None, None]
    colours = torch.einsum("kc,nchw->nkhw", axes, z.double() - centre[..., None]).cpu().numpy()
    colours = ((colours - low) / (high - low) * 255).round().clip(0, 255)
    return torch.from_numpy(colours.astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# Of records: Fig. 1 (right), 3, 4 and 5


def record_figures(arms, runs, out):
    """Draws the figures that the records have something for; -> their names."""
    made = []

    def plot(name, title, x, rows, draw, data):
        if data:
            figure, axes = new_plot(title, x, distance_name(rows))
            draw(axes, data)
            save(figure.savefig, out / f"{name}.png")
            made.append(name)

    title = "Fig. 3: distance under transforms"
    plot("fig3-transforms", title, "", arms, draw_bars, transform_bars(arms))
    curves, measures = curves_of(runs)
    title = "Fig. 1: distance over the generator's steps" + speed_text(curves, measures)
    plot("fig1-curves", title, "generator's step", runs, draw_curves, curves)
    curves, _ = curves_of(runs, over_autoencoder=True)
    title = "Fig. 5: distance over the autoencoder's steps"
    plot("fig5-fine-tuning", title, "autoencoder's step", runs, draw_curves, curves)
    shown = samples_to_show(runs)
    if shown:
        title = "Samples of each generator (Fig. 4)"
        if are_comparable([run for run, _ in shown.values()]):
            title = "Samples of each generator, of equal noise and labels (Fig. 4)"
        rows = [(label, first_pictures(file)) for label, (_, file) in shown.items()]
        save(panel(title, rows).save, out / "fig4-samples.png")
        made.append("fig4-samples")
    return made


TRANSFORMS = {"S0.75": "s = .75", "S0.50": "s = .50", "S0.25": "s = .25", "R": "rotations"}


def transform_bars(arms):
    """{autoencoder: its four distances}, of those that were scored with --transforms."""
    bars = {}
    for arm in arms:
        keys = [f"{distance_of(arm['scores'])} {kind}" for kind in TRANSFORMS]
        if all(key in arm["scores"] for key in keys):
            bars[arm["stem"]] = [arm["scores"][key] for key in keys]
    return bars


def curves_of(runs, over_autoencoder=False):
    """-> {label: [(step, mean, standard deviation or 0), ...]}, sorted by step, and the curves'
    measures.

    A curve joins runs of one measure whose arguments differ in `steps` and `seed` alone. If its
    steps are the autoencoder's, those that made the autoencoder may differ, too.
    """
    passing = ("steps",)
    step_of = step_of_generator
    if over_autoencoder:
        passing = ("steps", "vae", "vqgan", "autoencoder")
        step_of = step_of_autoencoder
        runs = [run for run in runs if run["arm"] and step_of(run) is not None]
    families = {}
    for run in runs:
        key = (label_of(run), measure_of(run))
        if over_autoencoder:
            label = f"{run['arm']['of_any_length']}: {run['generator']}"
            key = (label, measure_of(run), made_alike(run["arm"], "steps"))
        families.setdefault(key, []).append(run)
    curves = {}
    measures = set()
    for (label, measure, *_), members in families.items():
        for group in seeds_of(members, *passing, x=step_of):
            points = {}
            for run in group:
                value = run["scores"][distance_of(run["scores"])]
                points.setdefault(step_of(run), []).append(value)
            if len(points) > 1:
                while label in curves:
                    label += "'"
                curves[label] = [summary(step, points[step]) for step in sorted(points)]
                measures.add(measure)
    return curves, measures


def label_of(run):
    """An autoencoder's and a generator's name, without the step."""
    name = run["arm"]["name"] if run["arm"] else run["stem"]
    guided = ", guided" if run["generator"].endswith("*") else ""
    return f"{name}: {run['generator'].rpartition(' ')[0]}{guided}"


def measure_of(run):
    """What must be equal where distances are compared: which distance it is and of what features,
    the numbers of samples and of references, and how the samples were guided."""
    scores = run["scores"]
    made = run["made"]
    guidance = (made.get("cfg_scale", 1), *made.get("guidance", ()))
    counts = (scores["N"], scores.get("N reference"))
    return (distance_of(scores), run["about"]["extractor"], *counts, *guidance)


def step_of_generator(run):
    return run["step"]


def step_of_autoencoder(run):
    return run["arm"]["made"].get("step")


def summary(x, values):
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return (x, float(np.mean(values)), float(spread))


def speed_text(curves, measures):
    """What Fig. 1's title says of two curves of one measure."""
    if len(curves) != 2 or len(measures) != 1:
        return ""
    steps = arrivals(*curves.values())
    if None in steps:
        return ""
    return f"\n{list(curves)[1]}: {steps[0] / steps[1]:.2g} times as fast"


def arrivals(base, other):
    """Where two curves [(step, distance, ...), ...] first come to a distance that both reach, the
    greater one of their last ones. Between its points a curve is taken as straight."""
    goal = max(base[-1][1], other[-1][1])
    return [first_step(goal, curve) for curve in (base, other)]


def first_step(goal, curve):
    """Where a curve first comes to a distance, or None where it is there from its first point on.
    It may rise again afterwards."""
    if curve[0][1] <= goal:
        return None
    for (step, value, *_), (later, lower, *_) in zip(curve, curve[1:]):
        if lower <= goal:
            return step + (later - step) * (value - goal) / (value - lower)
    return None


def samples_to_show(runs):
    """{label: (run, its file)}, of each generator after its last step of which the file is still
    there."""
    families = {}
    for run in sorted(runs, key=step_of_generator, reverse=True):
        families.setdefault(label_of(run), []).append(run)
    shown = {}
    for label, members in families.items():
        there = [(run, samples_file(run)) for run in members if samples_file(run) is not None]
        if there:
            shown[label] = there[0]
        else:
            names = ", ".join(run["about"]["samples"] for run in members)
            print(f"Fig. 4: {label} is not shown, {names} is not here", file=sys.stderr)
    return shown


def are_comparable(runs):
    """Whether their samples began with equal noise and labels, and their generators are as old."""
    settings = set()
    for run in runs:
        settings.add(tuple(run["made"].get(name) for name in ("seed", "labels", "step")))
    return len(settings) == 1 and None not in settings.pop()


def first_pictures(file, count=8):
    with np.load(file) as stored:
        return pictures_of(torch.from_numpy(stored["arr_0"][:count]).permute(0, 3, 1, 2))


def samples_file(run):
    """The npz of a run: where the command had it, or beside its record; None if it is not there."""
    file = Path(run["about"]["samples"])
    folder = Path(run["record"]).parent
    for place in (file, folder / file, folder / file.name):
        if place.is_file() and place.suffix == ".npz":
            return place
    return None


def distance_name(rows):
    """What the axis says: one name, or all where the records have several."""
    return ", ".join(sorted({distance_of(row["scores"]) for row in rows}))


# --------------------------------------------------------------------------------------------------
# Of the logs of runs: curves

# Number of a log -> its title, and which way is good. What is not here is no curve
CURVES = {
    "rec_loss": ("rec_loss: reconstruction loss per value", "less is better"),
    "l1": ("l1: absolute error", "less is better"),
    "l2": ("l2: squared error", "less is better"),
    "ssim": ("ssim: structural similarity", "more is better"),
    "lpips": ("lpips: perceptual distance", "less is better"),
    "R": ("R: equivariance error, rotations", "less is better, 0 is perfect"),
    "S": ("S: equivariance error, scales", "less is better, 0 is perfect"),
    "PSNR": ("PSNR of reconstructions, dB", "more is better"),
    "kl": ("kl: KL term of an image", "neither way is good"),
    "explicit": ("explicit: Eq. 4's loss", "less is better"),
    "codebook": ("codebook: the quantiser's loss", "less is better"),
    "usage": ("usage: share of codes in a batch", "more is better"),
    "perplexity": ("perplexity: codes as if used alike", "more is better"),
    "g_loss": ("g_loss: minus the logits on fakes", "neither way is good"),
    "d_loss": ("d_loss: the discriminator's", "1: it cannot tell, 0: it can"),
    "d_weight": ("d_weight: of the GAN term", "neither way is good"),
    "mse": ("mse: squared error of the prediction", "less is better"),
    "vb": ("vb: variational bound, bits", "less is better"),
    "alignment": ("alignment: cosine to the encoder", "more is better"),
    "loss": ("loss: cross entropy of tokens", "less is better"),
    "accuracy": ("accuracy: right among all tokens", "more is better"),
    "accuracy_masked": ("accuracy_masked: among masked ones", "more is better"),
    "grad_norm": ("grad_norm: length of the gradient", "should not grow"),
    "images_per_second": ("speed, images/s", "more is better"),
}


def run_figures(paths, out):
    """Draws the curves of the logs of runs, all runs in one figure; -> names of figures."""
    logs = {}
    for path in paths:
        label = Path(path).stem
        while label in logs:
            label += "'"
        logs[label] = read_log(path)
    panels = {}
    for name in CURVES:
        curves = {}
        for label, lines in logs.items():
            points = points_of(lines, name)
            if points:
                curves[label] = points
        if curves:
            panels[name] = curves
    if not panels:
        raise vae.InputError(f"{', '.join(map(str, paths))}: no numbers of a run in it")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure((4.5 * columns, 3.2 * rows))
    for place, (name, curves) in enumerate(panels.items()):
        title, good = CURVES[name]
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(f"{title}\n({good})", fontsize=10)
        axes.set_xlabel("step")
        draw_smoothed(axes, curves)
    save(figure.savefig, out / "training-curves.png")
    return ["training-curves"]


def read_log(path):
    """The lines of OUT.jsonl, as dictionaries. InputError if it is none."""
    try:
        lines = [line for line in Path(path).read_bytes().splitlines() if vae.is_log_line(line)]
    except OSError as error:
        raise vae.InputError(f"{path}: no log of a run ({error.strerror})") from None
    if not lines:
        raise vae.InputError(f"{path}: no log of a run")
    return [json.loads(line) for line in lines]


def points_of(lines, name):
    """[(step, value), ...] of one number; a NaN of a run is null in its log, and no point. Nor are
    a codebook's usage and perplexity over many images (they come with `dead`), beside a batch's."""
    points = []
    for line in lines:
        if isinstance(line.get(name), (int, float)) and "dead" not in line:
            points.append((line["step"], line[name]))
    return points


def smoothed(values):
    """Means over a tenth of the curve around each point; short curves stay as they are."""
    reach = len(values) // 20
    means = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)  # as far on both sides
        means.append(float(np.mean(values[place - near : place + near + 1])))
    return means


def draw_smoothed(axes, curves):
    """Each curve [(step, value), ...] pale, and smoothed in the same colour over it."""
    for number, (label, points) in enumerate(curves.items()):
        steps, values = zip(*points)
        colour = f"C{number}"
        axes.plot(steps, values, color=colour, alpha=0.3)
        marker = "." if len(steps) < 10 else ""  # else a single point would not be seen
        axes.plot(steps, smoothed(values), color=colour, label=label, marker=marker)
    axes.legend(fontsize=8)


# --------------------------------------------------------------------------------------------------
# Drawing


def new_plot(title, x, y):
    figure = new_figure((6, 4))
    return figure, figure.add_subplot(title=title, xlabel=x, ylabel=y)


def new_figure(size):
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise vae.InputError("curves and bars need a package: pip install matplotlib") from None
    return Figure(figsize=size, dpi=120, layout="constrained")


def draw_curves(axes, curves):
    for label, points in curves.items():
        x, mean, spread = zip(*points)
        axes.errorbar(x, mean, spread, fmt="o-", capsize=4, label=label)
    axes.legend()


def draw_bars(axes, bars):
    width = 0.8 / len(bars)
    for k, (label, values) in enumerate(bars.items()):
        places = [i + width * (k + 0.5) - 0.4 for i in range(len(values))]
        axes.bar(places, values, width, label=label)
    axes.set_xticks(range(len(TRANSFORMS)), TRANSFORMS.values())
    axes.legend()


def pictures_of(images, height=0):
    """uint8 (N, 3, h, w) -> PIL images, magnified by whole pixels to `height`, or to about 96."""
    factor = max(1, max(height, 96) // max(images.shape[-2:]))
    pictures = []
    for array in images.permute(0, 2, 3, 1).cpu().numpy():
        size = (array.shape[1] * factor, array.shape[0] * factor)
        pictures.append(Image.fromarray(array).resize(size, Image.Resampling.NEAREST))
    return pictures


def panel(title, rows, margin=4, left=190, top=34):
    """Rows of (label, PIL images) under a title, as one PIL image."""
    heights = [max(picture.height for picture in row) + margin for _, row in rows]
    widths = [sum(picture.width + margin for picture in row) for _, row in rows]
    canvas = Image.new("RGB", (left + max(widths), top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), title, "black", ImageFont.load_default(17))
    for (label, row), height in zip(rows, heights):
        words = label.replace(": ", ":\n")
        draw.text((8, top + height // 2 - 18), words, "black", ImageFont.load_default(15))
        x = left
        for picture in row:
            canvas.paste(picture, (x, top))
            x += picture.width + margin
        top += height
    return canvas


def save(write, path):
    """write(file, format="png") to a temporary name, which then becomes `path`."""
    vae.write_file(path, lambda part: write(part, format="png"))


def main():
    parser = vae.make_parser(__doc__)
    words = "for Fig. 1, 2 and 6; or RUN.jsonl, the log of a run, for its curves"
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help=words)
    parser.add_argument("--records", nargs="*", default=(), help="for Fig. 1, 3, 4 and 5")
    parser.add_argument("--data", help="folder of the images to show, with checkpoints")
    parser.add_argument("--image-size", type=vae.image_size, default=(256, 256), help="256, or HxW")
    parser.add_argument("--model", help="preset, for checkpoints without configuration")
    words = "of their convolutions (default: as their files tell, else zeros)"
    parser.add_argument("--padding-mode", choices=("zeros", "reflect"), help=words)
    parser.add_argument("--num-images", type=vae.positive_int, default=8, help="to show")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logs = [path for path in args.checkpoints if path.endswith(".jsonl")]
    args.checkpoints = [path for path in args.checkpoints if path not in logs]
    try:
        arms, runs = read_records(args.records)
        if args.checkpoints and not args.data:
            raise vae.InputError("--data: the folder of images to show")
        if not args.checkpoints and not args.records and not logs:
            raise vae.InputError(
                "nothing to draw: give logs of runs, checkpoints with --data, or --records"
            )
        args.out.mkdir(parents=True, exist_ok=True)
        made = record_figures(arms, runs, args.out)
        if logs:
            made += run_figures(logs, args.out)
        if args.checkpoints:
            made += latent_figures(args, device)
        if not made:
            raise vae.InputError("nothing to draw in these records")
    except (vae.InputError, OSError) as error:
        parser.error(error)
    print(f"{args.out}: {', '.join(made)}")


if __name__ == "__main__":
    main()
