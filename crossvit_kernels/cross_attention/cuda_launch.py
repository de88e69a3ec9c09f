"""The engine of the CUDA kernels: the call into csrc/cross_attention/cuda.cu."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from .. import native
from ..validation import precision_of_float32
from .directions import Direction, ForwardOutputs, Gradients
from .gpu import gpu_of, on_device_of, scores_to_attention
from .packing import pack_backward, pack_forward

_OLD_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorUnsupportedPtxVersion")
_NO_KERNELS = ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction")


def saved_floats(width: int, heads: int) -> int:
    """What forward leaves for backward, an image; Triton's kernels leave the same (cuda_buffers.cuh)."""
    return (5 + 2 * heads) * _padded(width) + 2 * _padded(heads)


def _padded(width: int) -> int:
    return (width + 15) // 16 * 16


def forward(directions: list[tuple[Direction, ForwardOutputs]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their outputs. An empty batch has nothing to compute.

    Raises:
        RuntimeError: the kernels do not run on this GPU, or do not fit, or could not be launched.
    """
    if directions[0][0].patches.shape[0] > 0:
        _run([task for task, _ in directions], pack_forward(directions), False, eps, dropout_p)
        scores_to_attention(directions)


def backward(directions: list[tuple[Direction, Gradients]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their gradients. Raises as forward does."""
    if directions[0][0].patches.shape[0] > 0:
        _run([task for task, _ in directions], pack_backward(directions), True, eps, dropout_p)


def _run(tasks: list[Direction], packed: list[bytes], backward: bool, eps: float, dropout_p: float) -> None:
    module, device = native.load_cuda(), tasks[0].patches.device
    with on_device_of(tasks[0].patches):
        _check_usable(module, device)
        gpu, tf32 = gpu_of(device), precision_of_float32() == "tf32"
        floats, shared = module.cuda_plan(packed, backward, tf32, *gpu)
        if shared > gpu.shared_of_block:
            raise RuntimeError(
                f"the CUDA kernels of {_words(tasks, backward)} need {shared} bytes of shared memory in a "
                f"block, and {device} has {gpu.shared_of_block}: take 16-bit matrices or the backend torch"
            )
        memory = torch.empty(floats, dtype=torch.float32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        code = module.cuda_run(
            packed, backward, tf32, *gpu, eps, dropout_p, memory.data_ptr(), stream
        )  # fmt: skip
    if code != 0:
        name, text = module.cuda_error(code)
        raise RuntimeError(
            f"the CUDA kernels of {_words(tasks, backward)} could not be launched on {device}: "
            f"{name} ({code}), {text}"
        )


def _words(tasks: list[Direction], backward: bool) -> str:
    """The call, for messages."""
    task = tasks[0]
    dtypes = f"{task.patches.dtype} tokens and {task.weights[6 if task.fuses else 2].dtype} matrices"
    widths = " and ".join(str(t.patches.shape[2]) for t in tasks)
    heads = " and ".join(str(t.num_heads) for t in tasks)
    operation = (
        f"{'cross_fusion' if task.fuses else 'cross_attention'}, {'backward' if backward else 'forward'},"
    )
    return f"{operation} of {widths} channels and {heads} heads with {dtypes}"


def unusable(device: torch.device) -> str | None:
    """Why the kernels do not run on this GPU, in words; None when they do. It initialises CUDA there."""
    missing = native.cuda_missing()
    if missing is not None:
        return missing
    try:
        with torch.cuda.device(device):
            _check_usable(native.load_cuda(), device)
    except RuntimeError as error:
        return str(error)
    return None


@cache
def _check_usable(module: ModuleType, device: torch.device) -> None:
    """Raises RuntimeError where `device`, the current one, cannot load the kernels. Asked once."""
    code = module.cuda_usable()
    if code == 0:
        return
    name, text = module.cuda_error(code)
    built = native.build_report().get("cuda") or {"targets": ["other GPUs"], "nvcc": "of another version"}
    if name in _NO_KERNELS:
        found = gpu_of(device).capability
        raise RuntimeError(
            f"the CUDA kernels were built for {', '.join(built['targets'])}, and {device} is sm_{found}: "
            f"build the package with TORCH_CUDA_ARCH_LIST={found // 10}.{found % 10}"
        )
    if name in _OLD_DRIVER:
        raise RuntimeError(
            f"the driver of {device} is older than the CUDA toolkit {built['nvcc']} that built the kernels "
            f"({name}): update the driver, or build the package with an older toolkit"
        )
    raise RuntimeError(f"the CUDA kernels cannot be loaded on {device}: {name} ({code}), {text}")
