"""The backend `cuda` without a GPU: its sources compiled by nvcc, their launches executed by tests/ptx.

The launchers of csrc/cross_attention/cuda*.cu run as they are, on a CUDA runtime that hands every launch to
the interpreter. What takes the place of the compiled module has the functions that cuda_launch.py calls.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from crossvit_kernels import native
from crossvit_kernels.cross_attention import cuda_launch
from crossvit_kernels.cross_attention.directions import Direction, ForwardOutputs, Gradients
from crossvit_kernels.cross_attention.gpu import Gpu
from tests.ptx.host_library import DEVICES, HostLibrary, Launched, compile_library, compile_ptx

CSRC = Path(__file__).parent.parent / "csrc"
# As setup.py builds for them.
ARCHITECTURES = {90: "compute_90a", 100: "compute_100a"}

# (kernel, its PTX) -> the PTX to execute
Rewrite = Callable[[str, str], str]


class _Plan(ctypes.Structure):
    """crossvit::CudaPlan."""

    _fields_ = (("floats", ctypes.c_int64), ("shared_of_block", ctypes.c_int64))


@dataclass
class Launch:
    """One kernel launch; the name is that of the kernel in its source."""

    name: str
    grid: tuple[int, ...]
    steps: int  # of the interpreter
    ptx: str
    launched: Launched


class _Host(HostLibrary):
    """Also keeps the steps of each launch."""

    def start(self, options: dict[str, Any]) -> None:
        self.launches, self.options, self.steps_of_launches = [], options, []

    def _launch(self, *args: Any) -> int:
        before = self.steps
        code = super()._launch(*args)
        self.steps_of_launches.append(self.steps - before)
        return code


@dataclass
class Recorder:
    """What happened inside `interpreted`."""

    launched: list[Launched]
    steps: list[int]
    ptx: dict[str, str]  # of each kernel

    @property
    def launches(self) -> list[Launch]:
        return [
            Launch(_name_of(x.kernel), x.grid, steps, self.ptx[x.kernel], x)
            for x, steps in zip(self.launched, self.steps, strict=True)
        ]


def _name_of(symbol: str) -> str:
    """Of a kernel in its source: the last part of a name with its namespaces, _ZN8crossvit13attend_kernel…"""
    found, rest = "", symbol.removeprefix("_Z").removeprefix("N")
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        found, rest = rest[match.end() : end], rest[end:]
    return found.removesuffix("_kernel")


_ENTRY = re.compile(r"^(?:\.visible )?\.entry (\w+)\(.*?^}\n", re.MULTILINE | re.DOTALL)


@cache
def _library(capability: int) -> tuple[Path, list[str], int]:
    """The launchers, the PTX of each source, and the bytes of a Direction."""
    architecture = ARCHITECTURES.get(capability, f"compute_{capability}")
    sources = sorted((CSRC / "cross_attention").glob("cuda*.cu"))
    options = ["-O3", "-std=c++17"]
    size = Path(__file__).with_name("direction_bytes.cu")
    library = compile_library([*sources, size], architecture, options, headers=CSRC)
    texts = compile_ptx(sources, architecture, options, headers=CSRC)
    count = ctypes.CDLL(str(library)).direction_bytes()
    return library, texts, count


@cache
def _host(capability: int) -> tuple[_Host, dict[str, str]]:
    """The library as it is, and the PTX of each kernel."""
    library, texts, _ = _library(capability)
    kernels = {match[1]: match[0] for text in texts for match in _ENTRY.finditer(text)}
    return _Host(library, texts, capability), kernels


@dataclass(eq=False)
class Module:
    """What cuda_launch.py calls of the compiled module. Kernels may touch `tensors` and nothing else."""

    host: HostLibrary
    capability: int
    local: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        library, _, self.bytes = _library(self.capability)
        self.library = ctypes.CDLL(str(library))
        self.library.crossvit_cuda_plan.restype = _Plan
        for name in ("cudaGetErrorName", "cudaGetErrorString"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def _arguments(self, packed: Sequence[bytes], *numbers: int) -> tuple[Any, ...]:
        """The directions, how many, backward, tf32, the GPU."""
        backward, tf32, *gpu = numbers
        directions = b"".join(one.ljust(self.bytes, b"\0") for one in packed)
        flags = (ctypes.c_int64(x) for x in (len(packed), backward, tf32))
        return ctypes.create_string_buffer(directions), *flags, (ctypes.c_int64 * 3)(*gpu)

    def cuda_usable(self) -> int:
        return self.host.call("crossvit_cuda_usable", check=False)

    def cuda_error(self, code: int) -> tuple[str, str]:
        found = self.library.cudaGetErrorName(code), self.library.cudaGetErrorString(code)
        return found[0].decode(), found[1].decode()

    def cuda_plan(self, packed: Sequence[bytes], *numbers: int) -> tuple[int, int]:
        plan = self.library.crossvit_cuda_plan(*self._arguments(packed, *numbers))
        self.local.floats = plan.floats
        return plan.floats, plan.shared_of_block

    def cuda_run(self, packed: Sequence[bytes], *numbers: Any) -> int:
        *some, eps, dropout_p, memory, stream = numbers
        assert stream == 0
        intermediates = np.empty(0, np.float32)
        if self.local.floats:
            intermediates = np.ctypeslib.as_array((ctypes.c_float * self.local.floats).from_address(memory))
        intermediates.fill(np.nan)  # nothing may be read that was not written
        arguments = (*self._arguments(packed, *some), eps, ctypes.c_double(dropout_p))
        return self.host.call(
            "crossvit_cuda_run", *arguments, intermediates, ctypes.c_void_p(0),
            memory=self.local.tensors, check=False,
        )  # fmt: skip


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All of them, in any depth."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _of(task: Direction, written: ForwardOutputs | Gradients) -> list[Tensor]:
    return list(_tensors((*vars(task).values(), *vars(written).values())))


@contextmanager
def interpreted(capability: int = 80, rewrite: Rewrite | None = None, **options: Any) -> Iterator[Recorder]:
    """Run the launches of cuda_launch.py on the interpreter, compiled for a compute capability.

    Options are those of `tests.ptx.machine.run_kernel`. Memory for results is NaN before a launch.
    """
    host, kernels = _host(capability)
    if rewrite is not None:
        library, texts, _ = _library(capability)
        changed = [_ENTRY.sub(lambda entry: rewrite(_name_of(entry[1]), entry[0]), text) for text in texts]
        host = _Host(library, changed, capability)
    host.start(options)
    module = Module(host, capability)
    shared, multiprocessors = DEVICES[capability]
    pack_forward, pack_backward = cuda_launch.pack_forward, cuda_launch.pack_backward

    def forward(directions: list[tuple[Direction, ForwardOutputs]]) -> list[bytes]:
        module.local.tensors = [x for pair in directions for x in _of(*pair)]
        for _, out in directions:
            for x in _tensors(vars(out).values()):
                x.fill_(float("nan"))
        return pack_forward(directions)

    def backward(directions: list[tuple[Direction, Gradients]]) -> list[bytes]:
        module.local.tensors = [x for pair in directions for x in _of(*pair)]
        for task, g in directions:
            bk = 9 if task.fuses else 5  # its zeros are not written
            weights = [w for i, w in enumerate(g.to_weights or ()) if i != bk]
            for x in _tensors((g.to_cls, g.to_patches, g.to_scale, weights)):
                x.fill_(float("nan"))
        return pack_backward(directions)

    with (
        mock.patch.object(native, "load_cuda", return_value=module),
        mock.patch.object(cuda_launch, "pack_forward", forward),
        mock.patch.object(cuda_launch, "pack_backward", backward),
        mock.patch.object(cuda_launch, "gpu_of", return_value=Gpu(capability, multiprocessors, shared)),
    ):
        yield Recorder(host.launches, host.steps_of_launches, kernels)
