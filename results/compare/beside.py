"""What the scripts of this folder share: the command line, weights that need no file, comparing,
training steps, timing, records.

Importing it puts the files of this project on Python's path.
"""

import argparse
import itertools
import json
import math
import os
import platform
import sys
import time
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import vae  # noqa: E402

CPU = torch.device("cpu")
GOLDEN = Path(__file__).with_name("golden.json")  # what the tests compare with


@torch.no_grad()
def formula(network):
    """Draws every parameter anew, from sines, so that no numbers here need a file of weights.

    A parameter with more than one dimension gets a width that keeps activations near 1.
    -> the network, in eval mode
    """
    state = network.state_dict()
    for k, name in enumerate(sorted(state)):
        p = state[name]
        places = torch.arange(p.numel(), dtype=torch.float64)
        wave = torch.sin(0.7 * places**1.1 + k).reshape(p.shape)
        width = 0.2
        if p.dim() > 1:
            width = 1.4 / p[0].numel() ** 0.5
        p.copy_(wave * width)
    return network.eval()


def same_weights(ours, theirs):
    """-> the two networks with the same redrawn weights, in eval mode."""
    formula(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


def waves(k, *shape, power=1.0):
    """sin(k n), or of a power of n: numbers that look random and need no file."""
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(k * places**power).reshape(shape).float()


# --------------------------------------------------------------------------------------------------
# Comparing


class Differences:
    """How far our numbers are from the official ones, under the names of what is compared.

    largest    of floating-point numbers: the largest difference, divided by the largest official
               value
    differing  of whole numbers, as codes and tokens: how many differ, and of how many
    """

    def __init__(self):
        self.largest = {}
        self.differing = {}

    def add(self, what, ours, official):
        """A tensor or several of them from either side."""
        ours = flat(ours)
        official = flat(official)
        assert ours.shape == official.shape, f"{what}: {len(ours)} and {len(official)} values"
        if official.is_floating_point():
            off = float((ours - official).abs().max() / official.abs().max())
            assert off >= 0, f"{what}: not a number"
            self.largest[what] = max(self.largest.get(what, 0.0), off)
            return
        counts = self.differing.setdefault(what, dict(differing=0, of=0))
        counts["differing"] += int((ours != official).sum())
        counts["of"] += len(official)


def flat(tensors):
    """One tensor or several -> one vector."""
    if torch.is_tensor(tensors):
        return tensors.flatten()
    return torch.cat([tensor.flatten() for tensor in tensors])


def print_golden(part, found):
    """Prints official numbers as golden.json has them, and how far they are from those in it.

    Another processor rounds otherwise, so a few millionths are no difference.
    """
    kept = json.loads(GOLDEN.read_text())[part]
    lines = []
    off = 0.0
    for name, values in found.items():
        numbers = [round(value, 6) for value in values.flatten().tolist()]
        lines.append(f'  "{name}": {numbers}')
        off = max(off, float(np.abs(np.subtract(numbers, kept[name])).max()))
    print(",\n".join(lines))
    print(f"{part}: within {off:.1e} of golden.json", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Training steps of the generators, from the latents or tokens on. loss: () -> a scalar


def our_step(network, loss, clip=False, average=True, **options):
    """-> a function that takes a step as our train() does; `options` are AdamW's."""
    parameters = vae.trainable_parameters(network)
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True, **options)
    ema = vae.start_ema(network, 0.9999 if average else 0, None, parameters[0].device)
    numbers = itertools.count()

    def step():
        loss().backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, grad_norm)
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad()
        vae.update_ema(ema, network, 0.9999, next(numbers))

    return step


def official_step(network, loss, clip=False, average=True, **options):
    """-> a function that takes a step as the official train.py does, whose average of the weights
    goes parameter by parameter."""
    parameters = vae.trainable_parameters(network)
    optimizer = torch.optim.AdamW(parameters, 1e-4, **options)
    ema = deepcopy(network).requires_grad_(False)

    def step():
        loss().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            for old, p in zip(ema.parameters(), network.parameters()):
                old.data.mul_(0.9999).add_(p.data, alpha=1e-4)

    return step


# --------------------------------------------------------------------------------------------------
# Timing


def best_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now(device):
    """Seconds on a clock. A CPU's clock stands still while others have the CPU, as long as this
    process has one thread; so what else the machine does hardly matters."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def in_turns(ours, official, rounds, device, clock=now, warm_up=True):
    """Times two functions, one after the other, in both orders by turns: -> compared_times()."""
    steps = (ours, official)
    if warm_up:
        for step in steps:
            step()
    times = np.zeros((rounds, 2))
    for k in range(rounds):
        order = (0, 1)
        if k % 2:
            order = (1, 0)
        for i in order:
            started = clock(device)
            steps[i]()
            times[k, i] = clock(device) - started
    return compared_times(times)


def compared_times(times):
    """Seconds (rounds, 2), ours and theirs in turns -> a record.

    ratio is the median of ours / theirs over the rounds. What slows the machine slows both of a
    round, so the ratio moves less than the seconds do.
    """
    medians = np.median(times, axis=0)
    return dict(
        seconds_ours=float(medians[0]),
        seconds_official=float(medians[1]),
        ratio=float(np.median(times[:, 0] / times[:, 1])),
        rounds=len(times),
    )


# --------------------------------------------------------------------------------------------------
# The command line and the records


def make_parser(description, parts, rounds=None):
    """The flags that the scripts share. `rounds` is None where nothing is timed by rounds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", default=",".join(parts), help="some of %(default)s")
    add("--record", help="JSON file to write; parts of it that are not measured stay")
    if rounds:
        add("--rounds", type=int, default=rounds, help="of timing")
    return parser


def compare_with_official(parser, load_official, parts, golden=None):
    """Measures the parts after load_official() has imported the official code from --official's
    folder. `golden` is what --golden calls instead."""
    add = parser.add_argument
    add("--official", default="official", type=Path, help="folder of the official repositories")
    if golden:
        add("--golden", action="store_true", help="only print the numbers that golden.json has")
    args = parser.parse_args()
    load_official(args.official)
    if golden and args.golden:
        golden()
    else:
        measure(args, parts)


def about(device, packages=("torch",)):
    """What it takes to measure a part of a record again."""
    name = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return dict(
        command=["results/compare/" + os.path.basename(sys.argv[0]), *words],
        device=name,
        threads=torch.get_num_threads(),  # with one the seconds are the process's own
        versions={package: version(package) for package in packages},
        date=time.strftime("%Y-%m-%d"),
    )


def measure(args, parts):
    """Measures the parts that --parts names, prints them, and writes them to --record, where the
    others stay as they are. parts: name -> a function of args."""
    record = {}
    if args.record and os.path.exists(args.record):
        record = json.loads(Path(args.record).read_text())
    for name in args.parts.split(","):
        record[name] = parts[name](args)
        print(name, json.dumps(record[name], indent=1))
        if args.record:
            Path(args.record).write_text(json.dumps(record, indent=1) + "\n")
