"""The only place that imports the compiled module; it survives a missing or broken one and says why.

Private. `python -m crossvit_kernels` prints what `build_report` and `load_error` hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# torch first: its OpenMP runtime is then the one that the module finds, and both share one thread pool.
import torch

_REPORT = Path(__file__).with_name("_build_report.json")


@cache
def build_report() -> dict[str, Any]:
    """What the build made and left out, and why; empty when the package was never built."""
    try:
        return json.loads(_REPORT.read_text())
    except (OSError, ValueError):
        return {}


@cache
def _import() -> tuple[ModuleType | None, str]:
    try:
        module = import_module("crossvit_kernels._native")
        module.use_isa(os.environ.get("CROSSVIT_ISA") or "auto")
        return module, ""
    except Exception as error:  # a broken binary may raise anything; the package works without it
        return None, f"{type(error).__name__}: {error}"


def load_error() -> str | None:
    """Why the compiled module is not available, in words; None when it is."""
    module, met = _import()
    if module is not None:
        return None
    report = build_report()
    if not report:
        return f"the package was not built (no {_REPORT.name}); import met {met}"
    built_for = f"built for {report['python']} on {report['platform']}"
    if report["cpu"] is None:
        return f"{built_for} without the native module: {report.get('cpu_left_out')}"
    return f"{built_for} by {report['cpu']['compiler']}; import met {met}"


def load() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is missing or broken; the message says what it was built for and what was met.
    """
    module, _ = _import()
    if module is None:
        raise RuntimeError(f"the native module of crossvit_kernels is not available: {load_error()}")
    return module


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block, the CPU's kernels use this instruction set, one of `load().isas()` or "auto".

    Raises:
        ValueError: this machine does not run it.
    """
    module = load()
    previous = module.isa()
    module.use_isa(name)
    try:
        yield
    finally:
        module.use_isa(previous)


def has_cuda() -> bool:
    """Whether the compiled module carries the CUDA kernels (says nothing of the GPUs present)."""
    return hasattr(_import()[0], "cuda_run")


def cuda_missing() -> str | None:
    """Why this process has no CUDA kernels, whatever its GPUs are; None when it has."""
    if load_error() is not None:
        return load_error()
    if not has_cuda():
        why = build_report().get("cuda_left_out") or "it is older than the package: build it again"
        return f"the native module has no CUDA kernels: {why}"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built {'for ROCm' if torch.version.hip else 'without CUDA'}"
    return None


def load_cuda() -> ModuleType:
    """The compiled module with its CUDA kernels.

    Raises:
        RuntimeError: there are none; the message says why.
    """
    if not has_cuda():
        raise RuntimeError(cuda_missing())
    return load()


def layer_norm_statistics(x: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1/sqrt(variance + eps) of every row of x [rows, columns], float32, on the CPU or a CUDA GPU.

    Rows may be any distance apart; columns are contiguous.

    Raises:
        ValueError: x is something else.
        RuntimeError: the module is missing, was built without CUDA, or the launch failed.
    """
    if x.ndim != 2 or x.dtype != torch.float32 or x.device.type not in ("cpu", "cuda"):
        raise ValueError(
            "x must be a float32 tensor [rows, columns] on a CPU or a CUDA GPU, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    rows, columns = x.shape
    if columns == 0:
        raise ValueError("x must have at least one column, got 0: a mean needs an element")
    if columns > 1 and x.stride(1) != 1:
        raise ValueError(f"columns of x must be contiguous, got stride {x.stride(1)}: call x.contiguous()")
    module = load_cuda() if x.is_cuda else load()
    mean, rstd = x.new_empty(rows), x.new_empty(rows)
    arguments = (x.data_ptr(), rows, columns, x.stride(0), eps, mean.data_ptr(), rstd.data_ptr())
    if not x.is_cuda:
        module.layer_norm_statistics_cpu(*arguments)
        return mean, rstd
    with torch.cuda.device(x.device):
        code = module.layer_norm_statistics_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    if code != 0:
        raise RuntimeError(
            f"layer_norm_statistics could not be launched on {x.device}: CUDA error {code}; "
            f"built for {build_report()['cuda']['targets']}"
        )
    return mean, rstd
