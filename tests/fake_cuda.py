"""A pretended CUDA device with real values, on a machine that has none.

A `FakeCuda` tensor says that it lives on cuda:0, and computes on a CPU tensor within. Inside of
`Pretend` PyTorch finds a GPU: factory functions, `.to` and `.cpu` obey. An operation that mixes CPU
and CUDA tensors raises `Mixed`, as CUDA does, but for numbers (0-dim tensors) and indices.
Each operation after which the host has waited for the device is listed.

    with Pretend(library) as pretend, pretend.counting(Policy, "score") as waits:
        train_saei.main(config)
    print(pretend.waits, waits)  # all of them; a list of them for each call of Policy.score

What it cannot show: streams, CUDA graphs, memory, and kernels that exist on one device alone.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.utils._device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

ROOT = Path(__file__).resolve().parent.parent
HOOKS = ROOT / "tests/fake_cuda_hooks.cpp"
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,  # .item(), float(x), if x
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.bincount,
    aten.repeat_interleave,
    aten.equal,
    aten.is_nonzero,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPYING = {aten._to_copy, aten.copy_, aten.copy}
FUNCTIONS = dict(  # of torch.cuda
    _lazy_init=lambda: None,
    _is_in_bad_fork=lambda: False,
    is_available=lambda: True,
    is_initialized=lambda: True,
    is_bf16_supported=lambda *args, **options: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    set_device=lambda device: None,
    get_device_name=lambda *args: "pretended",
    get_device_capability=lambda *args: (8, 0),
    get_device_properties=lambda *args: SimpleNamespace(total_memory=2**36, name="pretended"),
    synchronize=lambda device=None: None,  # of the Clock: a phase is timed, no value is read
    empty_cache=lambda: None,
    memory_allocated=lambda *args: 0,
    max_memory_allocated=lambda *args: 0,
    reset_peak_memory_stats=lambda *args: None,
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
)


class Mixed(RuntimeError):
    """CUDA's "Expected all tensors to be on the same device"."""


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def compile_hooks(folder: Path) -> Path:
    """-> the library in this folder, compiled where it is not there yet"""
    base = Path(torch.__file__).parent
    digest = hashlib.sha256(HOOKS.read_bytes() + torch.__version__.encode()).hexdigest()
    library = folder / f"fake_cuda_hooks_{digest[:16]}.so"
    if not library.exists():
        includes = [f"-I{base}/include", f"-I{base}/include/torch/csrc/api/include"]
        command = [compiler(), "-std=c++20", "-shared", "-fPIC", str(HOOKS), "-o", str(library)]
        command += [*includes, f"-L{base}/lib", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)
    return library


def waits(func, args) -> bool:
    """Does the host wait for this operation's result? Indexing by a mask does, as it counts."""
    if func.overloadpacket in INDEXING:
        indices = [x for x in args[1] if x is not None]
        return any(x.dtype in (torch.bool, torch.uint8) for x in indices)
    return func.overloadpacket in WAITING


class FakeCuda(Tensor):
    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __tensor_flatten__(self):  # so that nn.Module.to swaps parameters
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return FakeCuda(inner["inner"])

    def __repr__(self, **options):
        return f"FakeCuda({self.inner!r})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:  # PyTorch takes over shape and dtype alone
        Tensor.data.__set__(self, new)
        self.inner = new.inner

    def tolist(self):
        Pretend.active.note("tolist")
        return self.inner.tolist()

    def numpy(self, *args, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Pretend.active.compute(func, args, kwargs or {})


def is_ours(file: str) -> bool:
    return file.startswith(f"{ROOT}/") and "site-packages" not in file and file != __file__


def inner(x):
    return x.inner if isinstance(x, FakeCuda) else x


def leaves_of(x) -> list:
    """Of nested lists, tuples and dictionaries. PyTorch's own is three times as slow here."""
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (list, tuple)):
        return [x]
    found = []
    for part in x:
        found += leaves_of(part)
    return found


def mapped(function, x):
    """The same nest, with function(leaf) for each leaf."""
    if isinstance(x, dict):
        return {name: mapped(function, part) for name, part in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)([mapped(function, part) for part in x])
    return function(x)


def on_device(x):
    return FakeCuda(x) if type(x) is Tensor and x.device.type == "cpu" else x


def refuse_mixed(func, args, kwargs, on_cuda: list[Tensor]) -> None:
    """Raises Mixed for operands, or a generator, of the CPU in an operation of the device."""
    leaves = leaves_of((args, kwargs))
    if any(isinstance(x, torch.Generator) for x in leaves):
        raise Mixed(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    if not on_cuda or func.overloadpacket in COPYING:
        return
    if func.overloadpacket in INDEXING and isinstance(args[0], FakeCuda):
        leaves = leaves_of((args[0], args[2:]))  # indices may come from the CPU
    tensors = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeCuda)]
    indexed = func.overloadpacket in INDEXING and not isinstance(args[0], FakeCuda)
    for x in tensors:
        if x.device.type == "cpu" and (x.dim() > 0 or indexed):
            raise Mixed(f"{func}: cuda:0 and cpu, a tensor of shape {tuple(x.shape)}")


class Pretend(TorchDispatchMode):
    """library: of compile_hooks. Once it is loaded, this process is for pretending only."""

    active = None

    def __init__(self, library: Path):
        super().__init__()
        self.waits = []  # "OPERATION at FILE:LINE" of the innermost line of this project
        self.patches = contextlib.ExitStack()
        ctypes.CDLL(str(library)).patch_hooks()
        torch._C._ensureCUDADeviceGuardSet()
        torch.utils._device._device_constructors()  # cached: of the real torch.tensor

    def __enter__(self):
        Pretend.active = self
        for name, function in FUNCTIONS.items():
            self.patches.enter_context(mock.patch.object(torch.cuda, name, function))
        for name in ("tensor", "as_tensor"):
            made = self.made(getattr(torch, name))
            self.patches.enter_context(mock.patch.object(torch, name, made))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def made(self, real):
        """torch.tensor or torch.as_tensor: C++ copies to the device where no mode sees it."""

        def make(data, *args, device=None, **options):
            if not isinstance(data, Tensor):
                data = self.as_numbers(data)
            x = real(data, *args, **options)
            return x if device is None else x.to(device)

        return make

    def as_numbers(self, data):
        """Nested lists, with a number for each tensor of the device. The host waits for each."""
        if isinstance(data, (list, tuple)):
            return [self.as_numbers(x) for x in data]
        return data.tolist() if isinstance(data, FakeCuda) else data

    def note(self, operation: str) -> None:
        frame = sys._getframe(1)
        while frame and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        if frame:
            file = os.path.relpath(frame.f_code.co_filename, ROOT)
            operation += f" at {file}:{frame.f_lineno}"
        self.waits.append(operation)

    @contextlib.contextmanager
    def counting(self, owner, name: str) -> Iterator[list[list[str]]]:
        """-> the waits of each call of owner.name"""
        calls, function = [], getattr(owner, name)

        def counted(*args, **options):
            start = len(self.waits)
            result = function(*args, **options)
            calls.append(self.waits[start:])
            return result

        with mock.patch.object(owner, name, counted):
            yield calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def compute(self, func, args, kwargs):
        """The operation on the tensors within, and its results on the device they belong to."""
        leaves = leaves_of((args, kwargs))
        on_cuda = [x for x in leaves if isinstance(x, FakeCuda)]
        device = kwargs.get("device")
        device = None if device is None else torch.device(device).type
        target = device or ("cuda" if on_cuda else "cpu")
        if not on_cuda and target != "cuda":
            return func(*args, **kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # attention by its formula
        if target == "cuda":
            refuse_mixed(func, args, kwargs, on_cuda)
        self.note_waits(func, args, target, on_cuda)
        plain_args, plain = mapped(inner, args), mapped(inner, kwargs)
        if device == "cuda":
            plain["device"] = torch.device("cpu")
        plain.pop("pin_memory", None)
        out = func(*plain_args, **plain)
        if target != "cuda":
            return out
        if func is aten._to_copy.default and not on_cuda and out.data_ptr() == args[0].data_ptr():
            out = out.clone()
        out = mapped(on_device, out)
        if not on_cuda or func is aten._to_copy.default:
            return out
        return return_and_correct_aliasing(func, args, kwargs, out)

    def note_waits(self, func, args, target: str, on_cuda: list[Tensor]) -> None:
        if on_cuda and waits(func, args):
            self.note(str(func))
        elif func is aten._to_copy.default and isinstance(args[0], FakeCuda) != (target == "cuda"):
            self.note(f"copy to {target}")
        elif func is aten.copy_.default and isinstance(args[0], FakeCuda) != isinstance(
            args[1], FakeCuda
        ):
            self.note("copy_")
