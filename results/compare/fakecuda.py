"""Runs a script of this project as if the machine had one GPU, and tells what would go wrong there.

    report = fakecuda.run_apart("dit.py", ["--vae", "tiny.pt", "--data", "photos", "--steps", "3"])

Whoever has no GPU can see with it two of the mistakes that only a GPU punishes:

- A mix: an operation that is given tensors of both devices, or a generator of the wrong one; a
  tensor of the GPU that is given to numpy. It raises here what it would raise there.
- A wait: a place where the host stands still until the GPU is done, as .item(), a copy to the host,
  or a mask as an index. It is right, but in a training step it is slow. All of them are counted by
  file and line, those in the TRAINING STEP of a train() apart.

What this cannot see: several GPUs, memory, speed, kernels, rounding, and torch.compile.

How it works: a tensor "on cuda:0" is a Cuda, a shell around a CPU tensor. PyTorch hands every
operation to dispatch() before it computes anything; dispatch() looks which of the arguments are
shells, complains or computes with what is in them, and puts the result in a shell again. The rest
of this file answers what scripts ask of torch.cuda.
"""

import functools
import importlib
import multiprocessing
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda", 0)
aten = torch.ops.aten


# ==================================================================================================
# What was found


@dataclass
class Report:
    """What a run has shown. A place reads "dit.py:487", or "vae.py:1234 < dit.py:487" where one
    line of the project has called the other."""

    code: int = 0  # the script's exit code
    error: str = ""  # the traceback of what it died of
    mixes: list = field(default_factory=list)  # (place, what was mixed)
    waits: Counter = field(default_factory=Counter)  # (place, why) -> how often
    step_waits: Counter = field(default_factory=Counter)  # those of them in a training step

    def __str__(self):
        lines = [f"mix at {place}: {text}" for place, text in self.mixes]
        for key, count in self.waits.most_common():
            mark = "in a step" if key in self.step_waits else "elsewhere"
            lines.append(f"{count:6d} waits, {mark}, at {key[0]}: {key[1]}")
        return "\n".join([*lines, self.error, f"exit code {self.code}"])


class Mix(RuntimeError):
    """The error that a GPU would have raised."""

    def __init__(self, text):
        super().__init__(text)
        place, _ = where()
        found.mixes.append((place, text))


def wait(why):
    """Notes that the host waits for the GPU at this place."""
    place, is_in_step = where()
    found.waits[place, why] += 1
    if is_in_step:
        found.step_waits[place, why] += 1


def where():
    """-> (the innermost place in the project and its caller, whether this is a training step)."""
    places = []
    is_in_step = False
    frame = sys._getframe(1)
    while frame is not None:
        file = project_file(frame.f_code.co_filename)
        if file is not None:
            places.append(f"{file.name}:{frame.f_lineno}")
            if frame.f_code.co_name == "train" and frame.f_lineno in step_lines(file):
                is_in_step = True
        frame = frame.f_back
    return " < ".join(places[:2]), is_in_step


@functools.cache
def project_file(name):
    """The path of a source file that is one of the project's; None of another or of this one."""
    path = Path(name).resolve()
    if path.parent in folders and path != Path(__file__).resolve():
        return path
    return None


@functools.cache
def step_lines(path):
    """The lines of a trainer's step: from the words TRAINING STEP to the rule that closes it."""
    lines = path.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if "# TRAINING STEP" in line]
    if not starts:
        return range(0)
    end = starts[0]
    while not lines[end].strip().startswith("# -----"):
        end += 1
    return range(starts[0] + 1, end + 1)  # lines are counted from 1


found = Report()
folders = {ROOT}  # whose files are the project


# ==================================================================================================
# The shell


class Cuda(torch.Tensor):
    """A tensor that says cuda:0. `host` is the CPU tensor with its numbers.

    To torch's own code in C++ it is a CPU tensor, for which autograd and autocast work in a torch
    that was built without CUDA. Only Python hears of the GPU.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        shell = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="cpu",
        )
        shell.host = host
        return shell

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def to(self, *args, **options):
        options = read_to(*args, **options)
        device = options.pop("device", GPU)
        if is_gpu(device):
            return torch._C.TensorBase.to(self, **options)
        wait("a copy to the host")  # with non_blocking=True, at the latest where it is read
        assert not (self.requires_grad and torch.is_grad_enabled()), "not written for gradients"
        return self.host.clone().to(**options)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        wait("tolist()")
        return self.host.tolist()

    def numpy(self, *args, **options):
        raise Mix("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def pin_memory(self):
        raise Mix("only dense CPU tensors can be pinned")

    def __format__(self, spec):
        if self.dim():
            return object.__format__(self, spec)
        return format(self.item(), spec)

    def __repr__(self):
        return f"{self.host!r} on cuda:0"

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.host.__reduce_ex__(protocol)


def is_gpu(device):
    """Of all that torch takes for a device; None is none."""
    return device is not None and torch.device(device).type == "cuda"


def is_on_host(value):
    return isinstance(value, torch.Tensor) and not isinstance(value, Cuda)


# ==================================================================================================
# Every operation


class Dispatch(TorchDispatchMode):
    """Brings to dispatch() also the operations that have no Cuda among their arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Computes func(*args, **kwargs) as one GPU would."""
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    shells = [tensor for tensor in tensors if isinstance(tensor, Cuda)]
    # Zeros that the backward pass fills in are made without any argument that says where
    is_in_backward = torch._C._current_graph_task_id() != -1
    on_gpu = bool(shells) or is_gpu(kwargs.get("device")) or (is_in_backward and not tensors)
    check_generator(func, kwargs.get("generator"), on_gpu)
    if shells:
        if len(shells) < len(tensors):
            check_mix(func, args, kwargs)
        check_wait(func, args)
    if "device" in kwargs and is_gpu(kwargs["device"]):
        kwargs = dict(kwargs, device=torch.device("cpu"))
    plain_args, plain_kwargs = tree_map_only(Cuda, lambda shell: shell.host, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if not on_gpu:
        return result
    known = {id(shell.host): shell for shell in shells}

    def in_shell(tensor):
        """What was written in place comes back in the shell in which it came."""
        if id(tensor) in known:
            return known[id(tensor)]
        return Cuda(tensor)

    return tree_map_only(torch.Tensor, in_shell, result)


def check_generator(func, generator, on_gpu):
    if generator is None:
        return
    drawn = "cuda" if generator._cdata in gpu_generators else "cpu"
    expected = "cuda" if on_gpu else "cpu"
    if drawn != expected:
        raise Mix(f"{func}: expected a '{expected}' generator but found '{drawn}'")


COPYING = (aten.copy, aten.copy_)
FILLING = (aten.fill, aten.fill_)
INDEXING = (aten.index, aten._unsafe_index)
INDEXED_WRITING = (aten.index_put, aten.index_put_, aten._index_put_impl_)
# What torch says of operations whose result's shape or value the host must know
NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def check_mix(func, args, kwargs):
    """Of an operation with tensors of both devices: is it one of those that may have them?"""
    kind = func.overloadpacket
    if kind in COPYING:
        target, source, *non_blocking = args
        if is_on_host(target) or not (any(non_blocking) and is_pinned(source)):
            wait("copy_() from the other device")
        return
    if kind in INDEXING + INDEXED_WRITING and isinstance(args[0], Cuda):
        # The indices may be on the host, from where they are copied; so may be a number to write
        if all(is_number(value) for value in args[2:3] if is_on_host(value)):
            if any(is_on_host(index) for index in args[1]):
                wait("indices that come from the host")
            return
    # A number in a CPU tensor goes with an elementwise operation as a Python number would
    on_host = [value for value in tree_iter((args, kwargs)) if is_on_host(value)]
    takes_numbers = torch.Tag.pointwise in func.tags or kind in FILLING
    writes_on_host = func._schema.is_mutable and is_on_host(args[0])
    if takes_numbers and all(map(is_number, on_host)) and not writes_on_host:
        return
    shapes = [tuple(value.shape) for value in on_host]
    raise Mix(f"{func}: Expected all tensors to be on the same device, on the CPU are {shapes}")


def is_number(tensor):
    return tensor.dim() == 0


def check_wait(func, args):
    """Does the host need to see a number before it can go on?"""
    kind = func.overloadpacket
    if kind is aten._local_scalar_dense:
        wait("a number is read: item(), float(), int(), bool() or if")
    elif kind in INDEXING:
        if has_mask(args[1]):
            wait("a mask as an index")
    elif kind in INDEXED_WRITING:
        fills = is_on_host(args[2])  # with a number: no more than masked_fill()
        if has_mask(args[1]) and not fills:
            wait("a mask as an index")
    elif NEEDS_VALUES.intersection(func.tags):
        wait(f"{kind} depends on values")
    elif "_linalg_" in str(kind):
        wait(f"{kind} looks for errors")


def has_mask(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


# ==================================================================================================
# From the host to the GPU


def read_to(first=None, *rest, **options):
    """The three ways to call Tensor.to() -> its keyword arguments."""
    if isinstance(first, torch.Tensor):
        options |= dict(device=first.device, dtype=first.dtype)
        names = ("non_blocking", "copy")
    elif isinstance(first, torch.dtype):
        options["dtype"] = first
        names = ("non_blocking", "copy")
    else:
        if first is not None:
            options["device"] = first
        names = ("dtype", "non_blocking", "copy")
    return options | dict(zip(names, rest))


def to_gpu(tensor, non_blocking=False, **options):
    """What .to("cuda") does with a CPU tensor. Only a copy from pinned memory goes on beside the
    host's work, if it is told not to block."""
    if not (non_blocking and is_pinned(tensor)):
        wait("a copy to the GPU, without pinned memory and non_blocking=True")
    assert not (tensor.requires_grad and torch.is_grad_enabled()), "not written for gradients"
    options["copy"] = True
    return Cuda(torch._C.TensorBase.to(tensor.detach(), **options))


def host_to(self, *args, **options):
    """In the place of Tensor.to(), for CPU tensors."""
    options = read_to(*args, **options)
    if is_gpu(options.get("device")):
        del options["device"]
        return to_gpu(self, **options)
    return torch._C.TensorBase.to(self, **options)


def pin(self):
    """In the place of Tensor.pin_memory()."""
    copy = self.clone()
    copy.pinned = True
    return copy


def is_pinned(tensor):
    """A view of pinned memory is pinned, too."""
    return hasattr(tensor, "pinned") or hasattr(tensor._base, "pinned")


def made_on_host_first(make):
    """torch.tensor() and torch.as_tensor() make a tensor on the host, then copy it. Of a tensor
    they make one on the same device."""

    def made(data, *, device=None, **options):
        if isinstance(data, Cuda):
            return make(data, **options).to(device or GPU)
        if is_gpu(device):
            return to_gpu(make(data, **options))
        return make(data, device=device, **options)

    return made


class DataLoader(torch.utils.data.DataLoader):
    """Loads in this process, and remembers what would be pinned."""

    def __init__(self, *args, pin_memory=False, num_workers=0, **options):
        super().__init__(*args, **options)
        self.pins = pin_memory

    def __iter__(self):
        for batch in super().__iter__():
            if self.pins:
                for tensor in tree_iter(batch):
                    tensor.pinned = True
            yield batch


# ==================================================================================================
# The rest of torch that knows of GPUs

gpu_generators = {}  # address in C++ -> Generator; kept, so that no address is used again


class Generator(torch._C.Generator):
    """Draws on the CPU, wherever it says it is."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.place = torch.device("cpu")
        if is_gpu(device):
            self.place = GPU
            gpu_generators[self._cdata] = self
        return self

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: self.place)


class Autocast(torch.autocast):
    def __init__(self, device_type, *args, **options):
        super().__init__("cpu", *args, **options)


group_on_host = torch._C._group_tensors_by_device_and_dtype


def group_tensors(lists, with_indices=False):
    """What optimisers and clipping sort their tensors with: C++ takes all of them for the CPU's."""
    groups = {}
    for (device, dtype), group in group_on_host(lists, with_indices).items():
        if isinstance(group[0][0][0], Cuda):
            device = GPU
        groups[device, dtype] = group
    return groups


ANSWERS = dict(
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    set_device=lambda device: None,
    get_device_name=lambda device=None: "no GPU, results/compare/fakecuda.py",
    is_bf16_supported=lambda including_emulation=True: True,
    is_current_stream_capturing=lambda: False,
    max_memory_allocated=lambda device=None: 0,
    reset_peak_memory_stats=lambda device=None: None,
    empty_cache=lambda: None,
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    synchronize=lambda device=None: wait("synchronize()"),
    _lazy_init=lambda: None,
)


def install():
    """Changes torch, for the rest of this process."""
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, answer)
    torch.Generator = Generator
    torch.autocast = Autocast
    torch.tensor = made_on_host_first(torch.tensor)
    torch.as_tensor = made_on_host_first(torch.as_tensor)
    torch.Tensor.to = host_to
    torch.Tensor.pin_memory = pin
    torch.utils.data.DataLoader = DataLoader
    torch._C._group_tensors_by_device_and_dtype = group_tensors
    torch.utils._foreach_utils._foreach_supported_types.append(Cuda)
    # Module.to() puts new parameters in the place of the old ones, whose class would stay
    torch.__future__.set_overwrite_module_params_on_conversion(True)


# ==================================================================================================
# Running


def run_apart(script, words):
    """Runs main() of a script with the words of its command line -> Report.

    It changes torch for good, so it happens in a fork of this process, which need not import torch
    again. RuntimeError if the fork dies without a word.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_report, args=(script, words, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{script} ended without a report") from None
    finally:
        process.join()


def send_report(script, words, sender):
    path = Path(script).resolve()
    folders.add(path.parent)
    sys.path[:0] = [str(path.parent), str(ROOT)]
    module = importlib.import_module(path.stem)
    install()
    with patch.object(sys, "argv", [path.name, *map(str, words)]), Dispatch():
        try:
            module.main()
        except SystemExit as end:
            found.code = end.code or 0
        except BaseException:
            found.error = traceback.format_exc()
            found.code = 1
    sender.send(found)
