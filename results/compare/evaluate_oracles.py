"""evaluate.py beside the tools in use: the same numbers, the time from disk to features, the memory of 50,000 samples.

    pip install --no-deps torch-fidelity==0.4.0 pytorch-fid==0.3.0 && pip install scikit-dimension
    python results/compare/evaluate_oracles.py --record results/evaluate_oracles.json [--parts parity,speed,memory]

Nothing is downloaded: weights, under the names of the official file, and pictures are drawn from the seed. Parity is
with torch-fidelity (ADM's preprocessing), pytorch-fid and scikit-dimension. Speed takes both from the same PNG files in
turns, then the Frechet distance beside scipy's sqrtm. Memory is a fresh process's: precision and recall alone, then all
of the command on 50,000 pictures of 256 px (12 GB in --scratch, deleted afterwards) with a cheap stand-in of equal
widths for Inception's forward, as 60,000 true ones take hours on a CPU; and with true ones on a few pictures.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from subprocess import PIPE, Popen
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of it on the CPU

import evaluate  # noqa: E402
import vae  # noqa: E402


def moments(features):
    total = evaluate.Moments()
    total.add(features)
    return total.result()


def draw_weights(seed):
    """FID-Inception's 472 tensors: He's convolutions, BatchNorms near one."""
    torch.manual_seed(seed)
    with mock.patch.object(
        evaluate.Unit, "fold", lambda unit: None
    ):  # the file's names are those before it
        weights = evaluate.Inception().state_dict()
    for name, p in weights.items():
        if p.dim() > 1:
            p.normal_(0, (2 / p[0].numel()) ** 0.5)
        elif p.dim():
            p.uniform_(0.5, 1.5) if "running_var" in name else p.normal_(
                float("bn.weight" in name), 0.1
            )
    weights["fc.weight"] *= 10  # or no class would be told from another
    return {name: p for name, p in weights.items() if p.dim()}  # without num_batches_tracked


def draw_pictures(folder, n, size, seed, noise):
    """n PNG files, smooth ones under noise of up to `noise` grey levels -> their uint8 (n, 3, size, size)."""
    os.mkdir(folder)
    rng, pictures = np.random.default_rng(seed), []
    for k in range(n):
        smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
            (size, size), Image.BICUBIC
        )
        grain = rng.normal(0, noise * rng.random(), (size, size, 3))
        pictures.append(np.clip(np.asarray(smooth, float) + grain, 0, 255).astype(np.uint8))
        Image.fromarray(pictures[-1]).save(f"{folder}/{k:06d}.png")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def off(ours, theirs):
    """The largest difference relative to the largest value; of two numbers, their relative difference."""
    ours, theirs = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, theirs))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def parity(args, scratch, file):
    import pytorch_fid.fid_score
    import skdim
    import torch_fidelity

    weights, kept, pooled = torch.load(file, weights_only=True), [], []
    folders = [f"{scratch}/samples", f"{scratch}/reference"]
    counts = [args.images, args.images * 2 // 3]  # two lengths: a swap cannot hide
    sides = [draw_pictures(folders[k], counts[k], 64, args.seed + k, 30 + 10 * k) for k in range(2)]

    def features(preprocess):
        network = evaluate.Inception(weights, preprocess)
        fake, real = ([*map(torch.cat, zip(*map(network, side.split(32))))] for side in sides)
        return fake, real, evaluate.frechet_distance(*moments(fake[0]), *moments(real[0]))

    class Kept(torch_fidelity.FeatureExtractorInceptionV3):  # keeps all; a hook sees sFID's map
        def forward(self, x):
            with self.Mixed_6d.branch1x1.register_forward_hook(
                lambda *call: setattr(self, "map", call[2][:, :7])
            ):
                named = self.convert_features_tuple_to_dict(result := super().forward(x))
            kept.append(
                (named["2048"], self.map.permute(0, 2, 3, 1).flatten(1), named["logits_unbiased"])
            )
            return result

    torch_fidelity.register_feature_extractor("kept", Kept)
    scores = torch_fidelity.calculate_metrics(  # input1 is the generated side
        input1=folders[0],
        input2=folders[1],
        cuda=False,
        isc=True,
        fid=True,
        prc=True,
        cache=False,
        batch_size=32,
        feature_extractor="kept",
        feature_extractor_weights_path=file,
        verbose=False,
    )
    theirs = [torch.cat(parts).split(counts) for parts in zip(*kept)]
    fake, real, distance = features("adm")
    result = {
        f"{name} beside torch-fidelity": max(map(off, pair, other))
        for name, pair, other in zip(("pooled", "spatial", "logits"), zip(fake, real), theirs)
    }
    plain = torch_fidelity.metric_isc.isc_features_to_metric(theirs[2][0], splits=1, shuffle=False)
    mixed = fake[2][
        np.random.RandomState(2020).permutation(counts[0])
    ]  # their default: ten splits, shuffled
    ours = evaluate.precision_recall(real[0], fake[0])
    both = {
        "FID": (distance, scores["frechet_inception_distance"]),
        "IS": (evaluate.inception_score(fake[2]), plain["inception_score_mean"]),
        "IS of ten splits": (
            evaluate.inception_score(mixed, counts[0] // 10),
            scores["inception_score_mean"],
        ),
        "precision": (ours[0], scores["precision"]),
        "recall": (ours[1], scores["recall"]),
    }
    activations = pytorch_fid.fid_score.get_activations
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: weights
    pytorch_fid.fid_score.get_activations = lambda *rest: (
        pooled.append(activations(*rest)) or pooled[-1]
    )
    theirs = pytorch_fid.fid_score.calculate_fid_given_paths(
        folders, 50, "cpu", 2048, num_workers=0
    )
    fake, real, distance = features("pytorch-fid")
    result["pooled beside pytorch-fid"] = max(map(off, (fake[0], real[0]), pooled))
    x = np.random.default_rng(args.seed).normal(size=(1000, 8))
    x = np.concatenate([np.sin(x.sum(axis=1, keepdims=True) * np.arange(40)), x], axis=1).astype(
        np.float32
    )
    both |= {
        "FID of pytorch-fid": (distance, theirs),
        "MLE dimension": (
            evaluate.mle_dimension(torch.from_numpy(x)),
            skdim.id.MLE().fit(x).dimension_,
        ),
        "TwoNN dimension": (
            evaluate.two_nn(torch.from_numpy(x)),
            skdim.id.TwoNN().fit(x).dimension_,
        ),
    }
    return dict(
        result,
        n=counts,
        **{
            name: dict(ours=one, theirs=float(other), relative_difference=off(one, other))
            for name, (one, other) in both.items()
        },
    )


def speed(args, scratch, file):
    import scipy.linalg
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    def turns(*pair, **about):  # -> what both returned, medians over the rounds
        seconds, values = np.empty((args.rounds, 2)), [0, 0]
        for i, k in np.ndindex(seconds.shape):
            started = time.perf_counter()
            values[k] = pair[k]()
            seconds[i, k] = time.perf_counter() - started
        (ours, theirs), ratio = np.median(seconds, axis=0), np.median(seconds[:, 1] / seconds[:, 0])
        return values, dict(
            about, rounds=args.rounds, seconds_ours=ours, seconds_theirs=theirs, ratio=ratio
        )

    def ours():  # the command with its metrics left out
        sys.argv, forward = (
            ["", "samples", *folders, "--inception", file],
            evaluate.Inception.forward,
        )
        with (
            mock.patch.multiple(
                evaluate,
                frechet_distance=lambda *_: 1.0,
                inception_score=lambda *_: 1.0,
                precision_recall=lambda *_: (1.0, 1.0),
            ),
            mock.patch.object(
                evaluate.Inception, "forward", autospec=True, side_effect=forward
            ) as spy,
        ):
            evaluate.main()
        assert sum(len(call.args[1]) for call in spy.call_args_list) == n, (
            "nothing may come from a cache"
        )

    def torch_fidelity():
        options = dict(
            input1=folders[0], input2=folders[1], feature_extractor_weights_path=file, cuda=False
        )
        extractor = create_feature_extractor(
            "inception-v3-compat", ["2048", "logits_unbiased"], **options
        )
        return [extract_featuresdict_from_input_id(k, extractor, **options) for k in (1, 2)]

    folders, statistics, n = [f"{scratch}/one", f"{scratch}/two"], [], 2 * args.speed_images
    mix = torch.randn(256, 2048, generator=torch.manual_seed(args.seed)) / 16
    for k in range(2):
        draw_pictures(folders[k], args.speed_images, 256, args.seed + k, 30)
        x = (
            0.5
            * (torch.randn(6000, 256) @ mix + 0.3 * torch.randn(6000, 2048) - 0.2 + 0.1 * k).relu()
        )
        statistics += moments(x * (torch.arange(2048) > 4))  # five dead ones, as real ones have
    _, disk = turns(
        ours,
        torch_fidelity,
        pictures=n,
        pixels=256,
        ours="weights, hash, PNG, all features, moments",
        theirs="torch-fidelity, batch 64: weights, PNG in its own worker processes, pooled, logits",
    )
    m1, c1, m2, c2 = (part.numpy() for part in statistics)  # pytorch-fid's formula:
    (one, other), times = turns(
        lambda: evaluate.frechet_distance(*statistics),
        lambda: float(
            ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
        ),
        d=2048,
        theirs="sqrtm",
    )
    return dict(
        disk_to_features=disk,
        frechet_distance=dict(times, distance=one, absolute_difference=abs(one - other)),
    )


def write_pictures(path, n, seed, **statistics):
    """An npz as np.savez writes it, of n noisy pictures of 256 px, drawn five hundred at a time."""
    rng = np.random.default_rng(seed)
    np.savez(path, **statistics)
    with (
        zipfile.ZipFile(path, "a") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(
            member, dict(descr="|u1", fortran_order=False, shape=(n, 256, 256, 3))
        )
        for start in range(0, n, 500):
            grain = rng.integers(0, 128, (min(500, n - start), 256, 256, 3), dtype=np.uint8)
            member.write(grain + rng.integers(0, 128, (len(grain), 1, 1, 3), dtype=np.uint8))


def child(args):
    """What a fresh process runs; its last line says what that took."""
    project, n = (
        torch.randn(192, 2048, generator=torch.manual_seed(args.seed)) / 14,
        args.memory_images,
    )
    fake, real = (
        torch.rand(k if args.child == "precision_recall" else 0, 2048) for k in (n, n // 5)
    )

    def stand_in(network, images):
        pooled = (
            torch.nn.functional.adaptive_avg_pool2d(images.float() / 64 - 2, 8).flatten(1) @ project
        ).relu()
        return pooled, pooled[:, :2023].clone(), pooled @ network.fc.weight.T

    evaluate.Inception.forward = stand_in if args.child == "samples" else evaluate.Inception.forward
    sys.argv, started = (
        ["", "samples", "samples.npz", "reference.npz", "--inception", "weights.pth"],
        time.time(),
    )
    evaluate.precision_recall(real, fake) if len(real) else evaluate.main()
    print(
        json.dumps(
            dict(seconds=time.time() - started, ru_maxrss=getrusage(RUSAGE_SELF).ru_maxrss / 2**20)
        )
    )


def memory(args, scratch, file):
    def watch(what, n, **about):
        command = [
            sys.executable,
            __file__,
            f"--child={what}",
            f"--memory-images={n}",
            f"--seed={args.seed}",
        ]
        process, peaks = (
            Popen(command, stdout=PIPE, cwd=scratch),
            dict(VmHWM=0, RssAnon=0, RssFile=0),
        )
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text().split()
            for name in peaks.keys() & {
                word[:-1] for word in status
            }:  # after its end there is none
                peaks[name] = max(peaks[name], int(status[status.index(name + ":") + 1]) / 2**20)
            time.sleep(0.01)
        return dict(
            json.loads(process.stdout.read().splitlines()[-1]),
            **peaks,
            samples=n,
            reference=n // 5,
            **about,
        )

    n, statistics, result = (
        args.memory_images,
        {},
        dict(
            kinds=(
                "GiB, peaks; RssAnon: a process's own; RssFile: of mapped files, which the kernel takes back when it needs "
                "memory; VmHWM: the two together; ru_maxrss: the same, but never below that of the process that started it"
            )
        ),
    )
    result["precision_recall"] = watch("precision_recall", n, dimensions=2048)
    for names, d in ((("mu", "sigma"), 2048), (("mu_s", "sigma_s"), 2023)):
        statistics.update(zip(names, moments(torch.randn(4096, d).relu())))
    for what, k, forward in (
        ("samples", n, "stand-in of equal widths"),
        ("true_forward", 128, "Inception's own"),
    ):
        write_pictures(f"{scratch}/samples.npz", k, args.seed)
        write_pictures(f"{scratch}/reference.npz", k // 5, args.seed + 1, **statistics)
        result[what] = watch(what, k, pixels=256, forward=forward)
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("--images", 300, "parity: a multiple of 30; the reference has two thirds"),
        ("--speed-images", 96, "in each of two folders"),
        ("--rounds", 3, "of speed"),
        ("--memory-images", 50_000, "the reference has a fifth"),
        ("--seed", 0, ""),
    ):
        parser.add_argument(name, type=int, default=default, help=text)
    parser.add_argument(
        "--parts", default="parity,speed,memory", help="a record keeps its other parts"
    )
    parser.add_argument("--scratch", help="folder for temporary files")
    parser.add_argument("--record", help="JSON file to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args, command = parser.parse_args(), sys.argv[:]
    if args.child:
        return child(args)
    vae.load_lpips("random")  # mends torchvision beside a CPU torch, for the oracles
    names = (
        "torch torchvision numpy scipy pillow torch-fidelity pytorch-fid scikit-dimension".split()
    )
    about = dict(
        command=command,
        seed=args.seed,
        device=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        date=time.strftime("%Y-%m-%d"),
        versions=dict({name: version(name) for name in names}, python=platform.python_version()),
    )
    record = (
        json.loads(Path(args.record).read_text())
        if args.record and Path(args.record).exists()
        else {}
    )
    for part in [
        part for part in (parity, speed, memory) if part.__name__ in args.parts.split(",")
    ]:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            torch.save(draw_weights(args.seed), file := f"{scratch}/weights.pth")
            record[part.__name__] = part(args, scratch, file) | dict(about=about)
        print(part.__name__, json.dumps(record[part.__name__], indent=1))
        if args.record:
            Path(args.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
