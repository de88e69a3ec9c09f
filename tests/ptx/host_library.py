"""CUDA launchers compiled by nvcc, whose launches run on the interpreter.

The launchers are real host code; `fake_cuda_runtime.c` takes the place of the CUDA runtime and hands every
launch to Python, with the grid, block, cluster and shared memory that the launcher computed.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import compile_cache

from .formats import PtxError
from .machine import run_kernel
from .memory import GlobalMemory
from .parser import Module, parse
from .triton_driver import PROPERTIES, add_tensor

_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)
INVALID_VALUE, LAUNCH_FAILURE = 1, 719
# Compute capability: shared memory per block in bytes, multiprocessors
DEVICES = {**PROPERTIES, 100: (232448, 148), 120: (101376, 170)}
PROCESSES = 2  # of nvcc at a time
_RUNTIME = Path(__file__).with_name("fake_cuda_runtime.c")
_lock = threading.RLock()


def compile_ptx(
    sources: Sequence[Path],
    architecture: str = "compute_80",
    options: Sequence[str] = (),
    headers: Path | None = None,
) -> list[str]:
    """The PTX of each CUDA source, with source lines. What is compiled is kept until an input changes.

    headers: the folder whose files the sources may include, besides those of the toolkit.
    """
    return [x.with_suffix(".ptx").read_text() for x in _compiled(sources, architecture, options, headers)]


def compile_library(
    sources: Sequence[Path],
    architecture: str = "compute_80",
    options: Sequence[str] = (),
    headers: Path | None = None,
) -> Path:
    """A shared library of the launchers in CUDA sources, linked with the fake runtime."""
    objects = [x.with_suffix(".o") for x in _compiled(sources, architecture, options, headers)]
    name = compile_cache.key([_RUNTIME.read_bytes(), *(o.name for o in objects)])
    library = compile_cache.folder() / f"lib{name}.so"

    def link(scratch: Path) -> None:
        runtime = scratch / "runtime.o"
        compile_cache.run(["gcc", "-O1", "-fPIC", "-c", str(_RUNTIME), "-o", str(runtime)])
        # the fake runtime's symbols must not be those of a real one in the same process
        parts = [*map(str, objects), str(runtime)]
        compile_cache.run(["g++", "-shared", "-Wl,-Bsymbolic", *parts, "-o", str(scratch / library.name)])

    compile_cache.make([library], link)
    return library


def _compiled(
    sources: Sequence[Path], architecture: str, options: Sequence[str], headers: Path | None
) -> list[Path]:
    """For each source a path that ends in .ptx and in .o."""
    folders = [headers] if headers else []
    # Copies of a folder have the same results.
    common = [compile_cache.version("nvcc"), architecture]
    common += [x.replace(str(headers), "") if headers else x for x in options]

    def one(source: Path) -> Path:
        name = compile_cache.key([*common, *compile_cache.contents(source, folders)])
        stem = compile_cache.folder() / f"{source.stem}-{name}"

        def build(scratch: Path) -> None:
            kept, target = scratch / "kept", scratch / f"{stem.name}.o"
            kept.mkdir()
            code = f"arch={architecture},code={architecture}"
            command = ["nvcc", "-cudart", "none", "-Xcompiler", "-fPIC", "-lineinfo", "-gencode", code]
            files = ["--keep", "--keep-dir", str(kept), "-c", str(source), "-o", str(target)]
            compile_cache.run([*command, *options, *files])
            (ptx,) = kept.glob("*.ptx")
            ptx.rename(scratch / f"{stem.name}.ptx")

        compile_cache.make([stem.with_suffix(".ptx"), stem.with_suffix(".o")], build)
        return stem

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(one, sources))


@dataclass(frozen=True)
class Launched:
    """What a launcher asked for."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    cluster: tuple[int, ...] | None = None
    dependent: bool = False  # it may begin before the launch before it has ended


class HostLibrary:
    """Calls launchers of a library; defects of the kernels are raised as `PtxError`.

    ptx: one text for each source of the library. Kernels see the variables of their own text only.
    """

    def __init__(self, library: Path, ptx: str | Sequence[str], capability: int = 80, **options: Any) -> None:
        self.options, self.capability = options, capability
        self.modules: dict[str, Module] = {}  # of each kernel
        texts = [ptx] if isinstance(ptx, str) else ptx
        # what the code was compiled for, which may be older than the GPU
        self.code_version = min(int(x) for t in texts for x in re.findall(r"^\.target sm_(\d+)", t, re.M))
        for text in texts:
            module = parse(text, later=True)
            for name in module.names:
                first = self.modules.setdefault(name, module)
                if first is not module:
                    codes = ([i.line for i in x.kernel(name).code] for x in (first, module))
                    if next(codes) != next(codes):
                        raise PtxError(f"two sources have different kernels {name}")
        self.launches: list[Launched] = []
        self.steps = 0
        self._library = ctypes.CDLL(str(library))
        self._library.cudaGetErrorName.restype = ctypes.c_char_p
        self._hook = _HOOK(self._launch)
        self._error: Exception | None = None

    def call(
        self, function: str, *args: Any, memory: Sequence[torch.Tensor | np.ndarray] = (), check: bool = True
    ) -> int:
        """Call a launcher and return its CUDA error code, which must be 0 if `check`.

        Tensors and arrays are passed as pointers; kernels may touch them and those in `memory`.
        """
        with _lock:
            self._memory = [a for a in (*args, *memory) if isinstance(a, torch.Tensor | np.ndarray)]
            self._error = None
            shared, processors = DEVICES[self.capability]
            self._library.fake_cuda_start(
                self._hook, self.capability, ctypes.c_size_t(shared), processors, self.code_version
            )
            code = getattr(self._library, function)(*map(_c_argument, args))
            if self._error:
                raise self._error
            if code and check:
                name = self._library.cudaGetErrorName(code).decode()
                raise PtxError(f"{function} returned CUDA error {code} ({name})")
            return int(code)

    def _launch(
        self, name: bytes, grid: Any, block: Any, cluster: Any, dependent: int, args: Any, shared: int
    ) -> int:
        if self._error:
            return LAUNCH_FAILURE
        try:
            memory = GlobalMemory()
            for data in self._memory:
                if isinstance(data, torch.Tensor):
                    add_tensor(memory, data.detach())
                else:
                    memory.add_array(data)
            module = self.modules[name.decode()]
            kernel = module.kernel(name.decode())
            static = sum(kernel.shared.values())
            if static + shared > DEVICES[self.capability][0]:
                return INVALID_VALUE
            values = [ctypes.string_at(args[i], p.size) for i, p in enumerate(kernel.params)]
            shape = tuple(cluster[:3]) if cluster else None
            launched = Launched(
                kernel.name, tuple(grid[:3]), tuple(block[:3]), shared, shape, bool(dependent)
            )
            self.launches.append(launched)
            self.steps += run_kernel(
                module, kernel.name, launched.grid, launched.block, shared, values, memory,
                cluster=shape, dependent=bool(dependent), **self.options,
            )  # fmt: skip
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
