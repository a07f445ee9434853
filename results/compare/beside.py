"""What the comparisons with official code share: weights that need no file, differences, records.

Importing it puts the files of this project on Python's path.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
        ours = flat(ours).detach()
        official = flat(official).detach()
        assert ours.shape == official.shape, f"{what}: {len(ours)} and {len(official)} values"
        if official.is_floating_point():
            off = float((ours - official).abs().max() / official.abs().max())
            assert off >= 0, f"{what}: not a number"
            self.largest[what] = max(self.largest.get(what, 0.0), off)
            return
        counts = self.differing.setdefault(what, dict(differing=0, of=0))
        counts["differing"] += int((ours != official).sum())
        counts["of"] += len(official)

    def record(self, **more):
        """What a parity record says. `more` is what a script found besides."""
        found = dict(n=len(self.largest), largest_relative_difference=self.largest)
        return found | dict(differing=self.differing) | more


def flat(tensors):
    """One tensor or several -> one vector."""
    if torch.is_tensor(tensors):
        return tensors.flatten()
    return torch.cat([tensor.flatten() for tensor in tensors])


# --------------------------------------------------------------------------------------------------
# The command line and the records


def compare(description, load_official, parity, name, golden, packages=("torch",)):
    """The command line of a comparison, from the import of the official code to the record.

    parity  () -> what goes into the record
    name    the part of golden.json that golden(), {name: official tensor}, computes again
    """
    parser = parser_of(description)
    add = parser.add_argument
    add("--official", default="official", type=Path, help="folder of the official repositories")
    add("--golden", action="store_true", help="only print the numbers that golden.json has")
    args = parser.parse_args()
    load_official(args.official)
    if args.golden:
        print_golden(name, golden())
    else:
        write_record(args.record, parity=parity() | dict(about=about(packages)))


def parser_of(description):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", help="JSON file to write; other parts of it stay")
    return parser


def print_golden(part, found):
    """Prints official numbers as golden.json has them, and how far they are from those in it.

    Another processor rounds otherwise, so a few millionths are no difference.
    """
    stored = json.loads(GOLDEN.read_text())[part]
    lines = []
    off = 0.0
    for name, values in found.items():
        numbers = [round(value, 6) for value in values.flatten().tolist()]
        lines.append(f'  "{name}": {numbers}')
        differences = [abs(a - b) for a, b in zip(numbers, stored[name], strict=True)]
        off = max(off, *differences)
    print(",\n".join(lines))
    print(f"{part}: within {off:.1e} of golden.json", file=sys.stderr)


def about(packages=("torch",)):
    """What it takes to measure a part of a record again."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return dict(
        command=["results/compare/" + os.path.basename(sys.argv[0]), *words],
        device=f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        threads=torch.get_num_threads(),
        versions={package: version(package) for package in packages},
        date=time.strftime("%Y-%m-%d"),
    )


def write_record(path, **parts):
    """Prints parts of a record, and writes them to `path` if there is one."""
    print(json.dumps(parts, indent=1))
    if path:
        path = Path(path)
        record = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(record | parts, indent=1) + "\n")
