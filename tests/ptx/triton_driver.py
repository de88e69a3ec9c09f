"""A Triton driver without a GPU: ordinary launches run through all of Triton and end in the interpreter.

    with interpreted(capability=90) as recorder:
        kernel[grid](x, y, n, BLOCK=128, num_warps=4)  # torch CPU tensors
    assert recorder.launches[0].name == "kernel"

Triton binds and specialises the arguments, compiles for the compute capability, and keeps its caches as on a
GPU; only the last step, the launch, is replaced. Kernels see the real memory of the tensors, so nothing is
copied.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import compile_cache

from .asynchronous import TensorMap
from .formats import PtxError
from .machine import run_kernel
from .memory import GlobalMemory
from .parser import Parameter, parse

Rewrite = Callable[[str, str], str]

# shared memory per block in bytes, multiprocessors
PROPERTIES = {80: (166912, 108), 86: (101376, 84), 89: (101376, 128), 90: (232448, 132)}
INTEGER_BYTES = {"i1": 1, "u1": 1, **{f"{s}{n}": n // 8 for s in "iu" for n in (8, 16, 32, 64)}}
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "f32": torch.float32}
FLOATS["fp64"] = torch.float64
# The names of Triton's pointer types where they are not "i" or "fp" and the size of the elements
POINTER_BYTES = {"bf16": 2, "fp8e5": 1, "fp8e4nv": 1, "fp8e4b8": 1, "fp8e4b15": 1, "fp8e5b16": 1}

# Bytes; a view that spans more is registered slice by slice, since what is between costs memory too.
FAR = 2**28

_lock = threading.RLock()
# Triton keeps compiled kernels by device: one for each capability, which all contexts share.
_DEVICES = {capability: number for number, capability in enumerate(PROPERTIES, 1)}


@dataclass
class Launch:
    """One kernel launch."""

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int  # bytes
    hash: str  # of the compiled kernel
    steps: int  # of the interpreter
    ptx: str
    dependent: bool  # it may begin before the launch before it has ended


@dataclass
class Recorder:
    """What happened inside `interpreted`, and the settings of its launches."""

    capability: int
    rewrite: Rewrite | None
    options: dict[str, Any]
    launches: list[Launch] = field(default_factory=list)
    _registered: list[torch.Tensor] = field(default_factory=list)

    @property
    def compilations(self) -> int:
        """How many variants of kernels were launched, each compiled here or before."""
        return len({launch.hash for launch in self.launches})

    def register(self, *tensors: torch.Tensor) -> None:
        """Let kernels touch tensors that are not arguments, for kernels that read addresses from memory."""
        self._registered.extend(tensors)


@dataclass
class LoadedKernel:
    """Takes the place of the handle of a loaded kernel."""

    name: str
    hash: str
    ptx: str


def add_tensor(memory: GlobalMemory, tensor: torch.Tensor) -> None:
    """Register the elements of a tensor view, and no other byte of its storage."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and span * tensor.element_size() > FAR:
        outermost = max(range(tensor.ndim), key=lambda dim: (tensor.shape[dim] > 1) * tensor.stride(dim))
        for part in tensor.unbind(outermost):
            add_tensor(memory, part)
        return
    if tensor.device.type != "cpu":
        raise ValueError(f"the interpreter runs on CPU tensors, not on {tensor.device}")
    storage = tensor.untyped_storage()
    if not tensor.numel():
        return
    # Not by torch's own view for NumPy, after which a storage can never be resized again.
    data = np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))
    size, at = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous():
        memory.add_region(tensor.data_ptr(), data[at : at + tensor.numel() * size])
        return
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    touched = np.zeros((last + 1, size), bool)
    strides = [s * size for s in tensor.stride()]
    np.lib.stride_tricks.as_strided(touched, (*tensor.shape, size), (*strides, 1))[...] = True
    memory.add_region(tensor.data_ptr(), data[at : at + touched.size], touched.reshape(-1))


def _flatten(signature: Any, arguments: Any) -> Iterator[tuple[str, Any]]:
    """(type, argument) of everything that is passed: tuples are taken apart, constants left out.

    Behind a tensor descriptor follow its shape and its strides.
    """
    for kind, argument in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten(kind, argument)
        elif kind.startswith("tensordesc"):
            yield kind, argument
            yield from (("i32", size) for size in argument.shape)
            yield from (("i64", stride) for stride in argument.strides)
        elif kind != "constexpr":
            yield kind, argument


def _tensor_map(descriptor: Any, layout: dict[str, Any], memory: GlobalMemory) -> TensorMap:
    """What Triton asks the driver for, with the layout that it chose when it compiled."""
    tensor = descriptor.base
    if descriptor.padding != "zero" or descriptor.round_f32_to_tf32 or layout["fp4_padded"]:
        raise PtxError(f"unsupported tensor descriptor: {descriptor}")
    add_tensor(memory, tensor.detach())
    return TensorMap.tiled(
        *(tensor.data_ptr(), layout["elem_type"], layout["swizzle"], layout["block_size"]),
        *(descriptor.shape, descriptor.strides),
    )


def _element_bytes(kind: str) -> int:
    kind = kind.lstrip("*").removeprefix("k")
    return INTEGER_BYTES.get(kind) or POINTER_BYTES.get(kind) or int(kind[2:]) // 8


def _pointer(kind: str, argument: Any, memory: GlobalMemory) -> bytes:
    tensor = getattr(argument, "base", argument) if not isinstance(argument, torch.Tensor) else argument
    if isinstance(tensor, torch.Tensor):
        if tensor.element_size() != _element_bytes(kind):
            raise PtxError(f"a tensor of {tensor.dtype} is passed as {kind}")
        add_tensor(memory, tensor.detach())
        return int(tensor.data_ptr()).to_bytes(8, "little")
    if isinstance(argument, int):
        return argument.to_bytes(8, "little")
    raise PtxError(f"{type(argument).__name__} is passed as {kind}")


def _parameter_bytes(kind: str, argument: Any, memory: GlobalMemory) -> bytes:
    """An argument as the bytes of its kernel parameter."""
    if kind.startswith("*"):
        return _pointer(kind, argument, memory)
    if kind in FLOATS:
        value = torch.tensor([float(argument)], dtype=torch.float64).to(FLOATS[kind])
        return value.view(torch.uint8).numpy().tobytes()
    if kind not in INTEGER_BYTES:
        raise PtxError(f"arguments of type {kind} are not supported")
    size = INTEGER_BYTES[kind]
    signed = kind[0] == "i" and kind != "i1"
    return int(argument).to_bytes(size, "little", signed=signed)


def _check_parameters(name: str, params: Sequence[Parameter], values: Sequence[bytes]) -> None:
    if len(params) != len(values):
        raise PtxError(f"{name} has {len(params)} parameters in its PTX, but {len(values)} are passed")
    for param, value in zip(params, values, strict=True):
        if param.size != len(value):
            raise PtxError(f"parameter {param.name} has {param.size} bytes, but {len(value)} are passed")


class Launcher:
    """Takes the place of Triton's compiled launcher."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = tuple(source.signature.values())
        self.metadata = metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise PtxError("thread block clusters (num_ctas) are not supported")

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: Any,
        kernel: LoadedKernel,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *arguments: Any,
    ) -> None:
        grid = (int(grid_x), int(grid_y), int(grid_z))
        if min(grid) < 0:
            raise ValueError(f"negative grid {grid}")
        if min(grid) == 0:
            return
        if enter_hook:
            enter_hook(launch_metadata)
        with _lock:
            self._run(grid, kernel, arguments)
        if exit_hook:
            exit_hook(launch_metadata)

    def _run(self, grid: tuple[int, int, int], kernel: LoadedKernel, arguments: Sequence[Any]) -> None:
        recorder = _active_recorder()
        ptx = recorder.rewrite(kernel.name, kernel.ptx) if recorder.rewrite else kernel.ptx
        module = parse(ptx)
        entry = module.kernels[kernel.name]
        memory = GlobalMemory()
        for tensor in recorder._registered:
            add_tensor(memory, tensor)
        layouts = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        values = [
            _tensor_map(argument, next(layouts), memory)
            if kind.startswith("tensordesc")
            else _parameter_bytes(kind, argument, memory)
            for kind, argument in _flatten(self.signature, arguments)
        ]
        scratch = [
            _scratch(self.metadata.global_scratch_size, grid, memory),
            _scratch(self.metadata.profile_scratch_size, grid, memory),
        ]
        values += [(s.ctypes.data if s.size else 0).to_bytes(8, "little") for s in scratch]
        _check_parameters(kernel.name, entry.params, values)
        block = entry.threads or (32 * self.metadata.num_warps,)
        block = (*block, 1, 1)[:3]
        shared = self.metadata.shared
        try:
            dependent = bool(getattr(self.metadata, "launch_pdl", False))
            steps = run_kernel(
                *(module, kernel.name, grid, block, shared, values, memory),
                **{"dependent": dependent, **recorder.options},
            )
        except PtxError as error:
            place = f"kernel {kernel.name}, grid {grid}, compute capability {recorder.capability}"
            raise PtxError(f"{error} ({place})") from error
        launch = Launch(
            *(kernel.name, grid, self.metadata.num_warps, shared, kernel.hash, steps, ptx, dependent)
        )
        recorder.launches.append(launch)


def _scratch(size: int, grid: Sequence[int], memory: GlobalMemory) -> np.ndarray:
    """Scratch memory of a launch, with arbitrary content, aligned to 128 bytes as on a GPU."""
    total = size * int(np.prod(grid))
    data = np.full(total + 128 if total else 0, 0xA5, np.uint8)
    if not total:
        return data
    start = -data.ctypes.data % 128
    data = data[start : start + total]
    memory.add_array(data)
    return data


class _Utilities:
    """The functions that Triton expects of the driver library."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._loading = threading.local()

    def start_loading(self, module: Any, function: Any, name: str, metadata_group: Any, hash: str) -> None:
        """Triton's hook before a kernel is loaded: remember its PTX."""
        path = Path(next(p for file, p in metadata_group.items() if file.endswith(".ptx")))
        os.utime(path.parent)  # it is in use
        self._loading.kernel = LoadedKernel(name, hash, path.read_text())

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[object, LoadedKernel, int, int, int]:
        """(module, function, registers, spills, threads per block)."""
        return object(), self._loading.kernel, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing is held."""

    def get_device_properties(self, device: int) -> dict[str, Any]:
        shared, processors = PROPERTIES[self._recorder.capability]
        return {
            "max_shared_mem": shared,
            "max_num_regs": 65536,
            "multiprocessor_count": processors,
            "warpSize": 32,
            "sm_clock_rate": 1_410_000,
            "mem_clock_rate": 1_215_000,
            "mem_bus_width": 5120,
        }


class InterpreterDriver:
    """What Triton asks of a driver."""

    launcher_cls = Launcher

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.utils = _Utilities(recorder)
        self._device = _DEVICES[recorder.capability]

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.recorder.capability, 32)

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        """There is one device."""

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.recorder.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        raise NotImplementedError("the interpreter compiles no launchers")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the interpreter measures no time")

    def allocate_default_profile_scratch(self, size: int, alignment: int, stream: Any) -> None:
        return None


def _active_recorder() -> Recorder:
    from triton.runtime import driver

    active = driver._active
    if not isinstance(active, InterpreterDriver):
        raise RuntimeError("a kernel that was compiled inside interpreted() is launched outside of it")
    return active.recorder


def _no_machine_code(*stages: Any) -> tuple[str, str] | None:
    """Triton's hook: the interpreter needs no more than PTX, so ptxas does not run."""
    if not stages:
        return "PTX alone", "PTX alone"
    stages[1]["cubin"] = lambda source, metadata: b""
    return None


@contextmanager
def interpreted(
    capability: int = 80,
    rewrite: Rewrite | None = None,
    races: bool = True,
    machine_code: bool = False,
    **options: Any,
) -> Iterator[Recorder]:
    """Run Triton's launches on the interpreter, compiled for a compute capability (80, 86, 89 or 90).

    rewrite: a function (kernel name, PTX) that returns the PTX to execute; machine_code: compile that too,
    for whoever reads it. Other options are those of `Machine`. What is compiled is kept with what else the
    tests compile.
    """
    import triton
    from triton import knobs
    from triton.runtime import driver

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET must not be set: Triton's own interpreter compiles nothing")
    if capability not in PROPERTIES:
        raise ValueError(f"compute capability {capability} is not one of {sorted(PROPERTIES)}")
    # Triton often leaves out the fence between the initialisation of an mbarrier and its first use, and
    # before 3.7 also the one between cp.async and wgmma.
    options.setdefault("strict_mbarrier", False)
    options.setdefault("strict_proxy", not triton.__version__.startswith(("3.3.", "3.4.", "3.5.", "3.6.")))
    recorder = Recorder(capability, rewrite, {"races": races, **options})
    ours, previous = InterpreterDriver(recorder), driver._active
    knobs.runtime.kernel_load_start_hook.add(ours.utils.start_loading)
    driver.set_active(ours)
    try:
        with knobs.cache.scope(), knobs.runtime.scope():
            knobs.cache.dir = str(compile_cache.folder("triton"))
            if not machine_code:
                knobs.runtime.add_stages_inspection_hook = _no_machine_code
            yield recorder
    finally:
        driver.set_active(previous)
        knobs.runtime.kernel_load_start_hook.remove(ours.utils.start_loading)
