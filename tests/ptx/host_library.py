"""CUDA launchers compiled by nvcc, whose launches run on the interpreter.

The launchers are real host code; `fake_cuda_runtime.c` takes the place of the CUDA runtime and hands every
launch to Python, with the grid, block and shared memory that the launcher computed.
"""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .formats import PtxError
from .machine import run_kernel
from .memory import GlobalMemory
from .parser import parse
from .triton_driver import add_tensor

_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)
LAUNCH_FAILURE = 719


def compile_ptx(source: Path, architecture: str = "compute_80", options: Sequence[str] = ()) -> str:
    """The PTX of a CUDA source, with source lines."""
    target = source.with_suffix(f".{architecture}.ptx")
    _run(["nvcc", "-ptx", "-lineinfo", f"-arch={architecture}", *options, str(source), "-o", str(target)])
    return target.read_text()


def compile_library(source: Path, architecture: str = "compute_80", options: Sequence[str] = ()) -> Path:
    """A shared library of the launchers in a CUDA source, linked with the fake runtime."""
    runtime, folder = Path(__file__).with_name("fake_cuda_runtime.c"), source.parent
    objects = [folder / f"{source.stem}.{architecture}.o", folder / "fake_cuda_runtime.o"]
    host = ["nvcc", "-cudart", "none", "-Xcompiler", "-fPIC", f"-arch={architecture}", *options, "-c"]
    _run([*host, str(source), "-o", str(objects[0])])
    _run(["gcc", "-O1", "-fPIC", "-c", str(runtime), "-o", str(objects[1])])
    library = folder / f"lib{source.stem}.{architecture}.so"
    # the fake runtime's symbols must not be those of a real one in the same process
    _run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


class HostLibrary:
    """Calls launchers of a library; defects of the kernels are raised as `PtxError`."""

    def __init__(self, library: Path, ptx: str, capability: int = 80, **options: Any) -> None:
        self.module, self.options = parse(ptx), options
        # kernel, grid, block, shared memory of every launch
        self.launches: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []
        self.steps = 0
        self._library = ctypes.CDLL(str(library))
        self._hook = _HOOK(self._launch)
        self._library.fake_cuda_start(self._hook, capability)
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def call(self, function: str, *args: Any) -> None:
        """Call a launcher that returns a CUDA error code. Tensors and arrays are passed as pointers."""
        with self._lock:
            self._memory, self._error = [a for a in args if isinstance(a, torch.Tensor | np.ndarray)], None
            code = getattr(self._library, function)(*map(_c_argument, args))
            if self._error:
                raise self._error
            if code:
                raise PtxError(f"{function} returned CUDA error {code}")

    def _launch(self, name: bytes, grid: Any, block: Any, args: Any, shared: int) -> int:
        if self._error:
            return LAUNCH_FAILURE
        try:
            memory = GlobalMemory()
            for data in self._memory:
                if isinstance(data, torch.Tensor):
                    add_tensor(memory, data.detach())
                else:
                    memory.add_array(data)
            kernel = self.module.kernels[name.decode()]
            values = [ctypes.string_at(args[i], p.size) for i, p in enumerate(kernel.params)]
            self.launches.append((kernel.name, tuple(grid[:3]), tuple(block[:3]), shared))
            steps = run_kernel(
                self.module, kernel.name, grid[:3], block[:3], shared, values, memory, **self.options
            )
            self.steps += steps
        except Exception as error:  # an exception cannot cross the C frames
            self._error = error
            return LAUNCH_FAILURE
        return 0


def _c_argument(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument
