"""evaluate.py beside the tools in use: the same numbers; the time from disk to features; the memory
that 50,000 samples take.

    pip install --no-deps torch-fidelity==0.4.0 pytorch-fid==0.3.0
    pip install scikit-dimension
    python results/compare/evaluate_oracles.py --record results/evaluate_oracles.json

Nothing is downloaded. Weights, under the names of the official file, and pictures are drawn from
the seed, and all of it runs on the CPU. It has three parts (--parts):

parity  with torch-fidelity (ADM's preprocessing), pytorch-fid and scikit-dimension
speed   evaluate.py and torch-fidelity from the same PNG files, in turns; then the Frechet distance
        beside scipy's sqrtm
memory  of a fresh process: precision and recall alone; then the whole command on 50,000 pictures
        of 256 px (12 GB in --scratch, deleted afterwards), with a cheap stand-in for Inception's
        forward pass, since 60,000 true ones take hours on a CPU; then true ones of a few pictures
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from beside import CPU, about, in_turns, make_parser, measure  # also puts our files on the path
from PIL import Image

import evaluate
import vae

os.environ["CUDA_VISIBLE_DEVICES"] = ""
PACKAGES = (
    "torch", "torchvision", "numpy", "scipy", "pillow", "torch-fidelity", "pytorch-fid",
    "scikit-dimension",
)  # fmt: skip


def draw_weights(path, seed):
    """A file of FID-Inception's 472 tensors: He's convolutions, BatchNorms near one."""
    torch.manual_seed(seed)
    weights = evaluate.Inception(weights=None).state_dict()
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    for name, p in weights.items():
        if p.dim() > 1:
            p.normal_(0, (2 / p[0].numel()) ** 0.5)
        elif "running_var" in name:
            p.uniform_(0.5, 1.5)
        else:
            p.normal_(float("bn.weight" in name), 0.1)
    weights["fc.weight"] *= 10  # or no class would be told from another
    torch.save(weights, path)


def draw_pictures(folder, n, size, seed, noise):
    """Writes n PNG files: smooth pictures under noise of up to `noise` grey levels.

    -> the same as uint8 (n, 3, size, size)
    """
    os.mkdir(folder)
    rng = np.random.default_rng(seed)
    pictures = []
    for k in range(n):
        blobs = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        smooth = np.asarray(blobs.resize((size, size), Image.Resampling.BICUBIC), float)
        grain = rng.normal(0, noise * rng.random(), (size, size, 3))
        picture = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        pictures.append(picture)
        Image.fromarray(picture).save(f"{folder}/{k:06d}.png")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def off(ours, theirs):
    """The largest difference relative to the largest value; of two numbers, their difference
    relative to theirs."""
    ours = torch.as_tensor(ours, dtype=torch.float64)
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def moments(features):
    total = evaluate.Moments()
    total.add(features)
    return total.result()


# ==================================================================================================
# Parity


def parity(args, scratch, weights):
    counts = [args.images, args.images * 2 // 3]  # two lengths, so that a swap cannot hide
    folders = [f"{scratch}/samples", f"{scratch}/reference"]
    fake = draw_pictures(folders[0], counts[0], 64, args.seed, 30)
    real = draw_pictures(folders[1], counts[1], 64, args.seed + 1, 40)
    found = {}
    found |= beside_torch_fidelity(folders, fake, real, weights)
    found |= beside_pytorch_fid(folders, fake, real, weights)
    found |= beside_scikit_dimension(args.seed)
    return dict(found, n=counts)


def both(ours, theirs):
    return dict(ours=ours, theirs=float(theirs), relative_difference=off(ours, theirs))


def features_of(pictures, weights, preprocess):
    """-> (pooled, spatial, logits) of all pictures."""
    network = evaluate.Inception(torch.load(weights, weights_only=True), preprocess).fold()
    parts = [network(part) for part in pictures.split(32)]
    return [torch.cat(column) for column in zip(*parts)]


def beside_torch_fidelity(folders, fake, real, weights):
    import torch_fidelity

    kept = []

    class Kept(torch_fidelity.FeatureExtractorInceptionV3):
        """Keeps all of its features. A hook sees the map that sFID's are of."""

        def forward(self, x):
            maps = []
            layer = self.Mixed_6d.branch1x1
            with layer.register_forward_hook(lambda module, given, out: maps.append(out[:, :7])):
                result = super().forward(x)
            named = self.convert_features_tuple_to_dict(result)
            spatial = maps[0].permute(0, 2, 3, 1).flatten(1)
            kept.append((named["2048"], spatial, named["logits_unbiased"]))
            return result

    torch_fidelity.register_feature_extractor("kept", Kept)
    scores = torch_fidelity.calculate_metrics(
        input1=folders[0],  # the generated side
        input2=folders[1],
        cuda=False,
        isc=True,
        fid=True,
        prc=True,
        cache=False,
        batch_size=32,
        feature_extractor="kept",
        feature_extractor_weights_path=weights,
        verbose=False,
    )
    counts = [len(fake), len(real)]
    their_fake, their_real = zip(*[torch.cat(parts).split(counts) for parts in zip(*kept)])
    our_fake = features_of(fake, weights, "adm")
    our_real = features_of(real, weights, "adm")
    found = {}
    for k, name in enumerate(("pooled", "spatial", "logits")):
        worst = max(off(our_fake[k], their_fake[k]), off(our_real[k], their_real[k]))
        found[f"{name} beside torch-fidelity"] = worst

    distance = evaluate.frechet_distance(*moments(our_fake[0]), *moments(our_real[0]))
    found["FID"] = both(distance, scores["frechet_inception_distance"])
    plain = torch_fidelity.metric_isc.isc_features_to_metric(their_fake[2], splits=1, shuffle=False)
    logits = our_fake[2]
    found["IS"] = both(evaluate.inception_score(logits), plain["inception_score_mean"])
    order = np.random.RandomState(2020).permutation(len(logits))  # their default, and ten splits
    ours = evaluate.inception_score(logits[order], len(logits) // 10)
    found["IS of ten splits"] = both(ours, scores["inception_score_mean"])
    precision, recall = evaluate.precision_recall(our_real[0], our_fake[0])
    found["precision"] = both(precision, scores["precision"])
    found["recall"] = both(recall, scores["recall"])
    return found


def beside_pytorch_fid(folders, fake, real, weights):
    import pytorch_fid.fid_score

    kept = []
    activations = pytorch_fid.fid_score.get_activations

    def keep(*rest):
        kept.append(activations(*rest))
        return kept[-1]

    tensors = torch.load(weights, weights_only=True)
    with (
        mock.patch.object(
            pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: tensors
        ),
        mock.patch.object(pytorch_fid.fid_score, "get_activations", keep),
    ):
        theirs = pytorch_fid.fid_score.calculate_fid_given_paths(
            folders, 50, "cpu", 2048, num_workers=0
        )
    our_fake = features_of(fake, weights, "pytorch-fid")[0]
    our_real = features_of(real, weights, "pytorch-fid")[0]
    distance = evaluate.frechet_distance(*moments(our_fake), *moments(our_real))
    worst = max(off(our_fake, kept[0]), off(our_real, kept[1]))
    return {"pooled beside pytorch-fid": worst, "FID of pytorch-fid": both(distance, theirs)}


def beside_scikit_dimension(seed):
    import skdim

    x = np.random.default_rng(seed).normal(size=(1000, 8))
    curved = np.sin(x.sum(axis=1, keepdims=True) * np.arange(40))
    x = np.concatenate([curved, x], axis=1).astype(np.float32)
    theirs = skdim.id.TwoNN().fit(x).dimension_
    return {"TwoNN dimension": both(evaluate.two_nn(torch.from_numpy(x))[0], theirs)}


# ==================================================================================================
# Speed


def speed(args, scratch, weights):
    folders = [f"{scratch}/one", f"{scratch}/two"]
    for k, folder in enumerate(folders):
        draw_pictures(folder, args.speed_images, 256, args.seed + k, 30)

    def now(device):  # on the wall's clock: torch-fidelity reads in processes of its own
        return time.perf_counter()

    disk = in_turns(
        lambda: our_features(folders, weights),
        lambda: torch_fidelitys_features(folders, weights),
        args.rounds,
        CPU,
        clock=now,
        warm_up=False,
    )
    disk |= dict(
        pictures=2 * args.speed_images,
        pixels=256,
        ours="weights, hash, PNG, all features, moments",
        theirs="torch-fidelity, batch 64: weights, PNG in its own worker processes, pooled, logits",
    )
    statistics = like_features(args.seed)
    values = {}

    def ours():
        values["ours"] = evaluate.frechet_distance(*statistics)

    def theirs():
        values["theirs"] = distance_by_sqrtm(*[part.numpy() for part in statistics])

    distance = in_turns(ours, theirs, args.rounds, CPU, clock=now, warm_up=False)
    distance |= dict(d=2048, theirs="sqrtm", distance=values["ours"])
    distance |= dict(absolute_difference=abs(values["ours"] - values["theirs"]))
    return dict(disk_to_features=disk, frechet_distance=distance)


def our_features(folders, weights):
    """The command without its metrics."""
    scored = []
    forward = evaluate.Inception.forward

    def count(network, images):
        scored.append(len(images))
        return forward(network, images)

    with (
        mock.patch.object(sys, "argv", ["", "samples", *folders, "--inception", weights]),
        mock.patch.object(evaluate, "frechet_distance", lambda *_: 1.0),
        mock.patch.object(evaluate, "inception_score", lambda *_: 1.0),
        mock.patch.object(evaluate, "precision_recall", lambda *_: (1.0, 1.0)),
        mock.patch.object(evaluate.Inception, "forward", count),
    ):
        evaluate.main()
    pictures = sum(len(os.listdir(folder)) for folder in folders)
    assert sum(scored) == pictures, "nothing may come from a cache"


def torch_fidelitys_features(folders, weights):
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    options = dict(input1=folders[0], input2=folders[1], cuda=False)
    options["feature_extractor_weights_path"] = weights
    wanted = ["2048", "logits_unbiased"]
    extractor = create_feature_extractor("inception-v3-compat", wanted, **options)
    for k in (1, 2):
        extract_featuresdict_from_input_id(k, extractor, **options)


def like_features(seed):
    """Means and covariances of two sets of numbers like Inception's: positive, of low rank, with
    five features that are always 0."""
    torch.manual_seed(seed)
    mix = torch.randn(256, 2048) / 16
    alive = torch.arange(2048) > 4
    statistics = []
    for k in range(2):
        x = torch.randn(6000, 256) @ mix + 0.3 * torch.randn(6000, 2048) - 0.2 + 0.1 * k
        statistics += moments(0.5 * x.relu() * alive)
    return statistics


def distance_by_sqrtm(mean1, cov1, mean2, cov2):
    """As pytorch-fid and ADM compute it."""
    import scipy.linalg

    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root))


# ==================================================================================================
# Memory


def memory(args, scratch, weights):
    """Peaks of fresh processes, in GiB, as the kernel tells them (VmHWM)."""
    n = args.memory_images
    result = dict(precision_recall=in_fresh_process(args, scratch, "precision_recall", n))
    statistics = {}
    for names, d in ((("mu", "sigma"), 2048), (("mu_s", "sigma_s"), 2023)):
        statistics.update(zip(names, moments(torch.randn(4096, d).relu())))
    cases = (
        ("samples", n, "stand-in of equal widths"),
        ("true_forward", min(n, 128), "Inception's own"),
    )
    for what, count, forward in cases:
        write_pictures(f"{scratch}/samples.npz", count, args.seed)
        write_pictures(f"{scratch}/reference.npz", count // 5, args.seed + 1, **statistics)
        found = in_fresh_process(args, scratch, what, count)
        result[what] = dict(found, pixels=256, forward=forward)
    return result


def in_fresh_process(args, scratch, what, n):
    """Starts this file with --child -> what it tells."""
    command = [sys.executable, __file__, f"--child={what}", f"--memory-images={n}"]
    command.append(f"--seed={args.seed}")
    told = subprocess.run(command, stdout=subprocess.PIPE, cwd=scratch, check=True).stdout
    return dict(json.loads(told.splitlines()[-1]), samples=n, reference=n // 5)


def child(args):
    """What the fresh process runs. Its last line says what that took."""
    n = args.memory_images
    torch.manual_seed(args.seed)
    started = time.time()
    if args.child == "precision_recall":
        evaluate.precision_recall(torch.rand(n // 5, 2048), torch.rand(n, 2048))
    else:
        if args.child == "samples":
            evaluate.Inception.forward = stand_in(torch.randn(192, 2048) / 14)
        files = ["samples.npz", "reference.npz", "--inception", "weights.pth"]
        with mock.patch.object(sys, "argv", ["", "samples", *files]):
            evaluate.main()
    status = Path("/proc/self/status").read_text()
    kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps(dict(seconds=time.time() - started, VmHWM=kilobytes / 2**20)))


def stand_in(project):
    """A forward pass that costs nothing, with features as wide as Inception's."""

    def forward(network, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 64 - 2, 8)
        pooled = (small.flatten(1) @ project).relu()
        return pooled, pooled[:, :2023].clone(), pooled @ network.fc.weight.T

    return forward


def write_pictures(path, n, seed, **statistics):
    """An npz as np.savez writes it, of n noisy pictures of 256 px, drawn five hundred at a time."""
    rng = np.random.default_rng(seed)
    np.savez(path, **statistics)
    header = dict(descr="|u1", fortran_order=False, shape=(n, 256, 256, 3))
    with (
        zipfile.ZipFile(path, "a") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for start in range(0, n, 500):
            count = min(500, n - start)
            grain = rng.integers(0, 128, (count, 256, 256, 3), dtype=np.uint8)
            colour = rng.integers(0, 128, (count, 1, 1, 3), dtype=np.uint8)
            member.write(grain + colour)


def main():
    parts = {part.__name__: in_scratch(part) for part in (parity, speed, memory)}
    parser = make_parser(__doc__, parts, rounds=3)
    add = parser.add_argument
    add("--images", type=int, default=300, help="of parity, a multiple of 30")
    add("--speed-images", type=int, default=96, help="of speed, in each of two folders")
    add("--memory-images", type=int, default=50_000, help="of memory; a fifth are references")
    add("--seed", type=int, default=0)
    add("--scratch", help="folder for temporary files")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    vae.import_lpips()  # mends torchvision beside a CPU torch, for the oracles
    measure(args, parts)


def in_scratch(part):
    """The part, given a folder for temporary files and a file of weights."""

    def measured(args):
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            weights = f"{scratch}/weights.pth"
            draw_weights(weights, args.seed)
            found = part(args, scratch, weights)
        return dict(found, seed=args.seed, about=about(CPU, PACKAGES))

    return measured


if __name__ == "__main__":
    main()
