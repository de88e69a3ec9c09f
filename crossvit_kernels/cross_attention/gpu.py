"""What the engines of GPUs have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .directions import Direction, ForwardOutputs


class Gpu(NamedTuple):
    """A GPU as kernels are chosen for it."""

    capability: int  # 10 major + minor
    multiprocessors: int
    shared_of_block: int  # bytes that one block may have; 0 where PyTorch does not tell (ROCm)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that this device is."""
    if device.type != "cuda":  # compiled kernels executed without a GPU
        return Gpu(90, 132, 232_448)
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 0)
    return Gpu(10 * found.major + found.minor, found.multi_processor_count, shared)


@cache
def architecture_of(device: torch.device) -> str:
    """Its name, as triton_table.py has them: "sm_90", "gfx942"."""
    if device.type == "cuda" and torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return f"sm_{gpu_of(device).capability}"


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def within_reach(x: Tensor) -> Tensor:
    """As it is, or contiguous: offsets within an image are 32-bit numbers in Triton's kernels of layers."""
    farthest = sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if farthest < 2**31 else x.contiguous()


def scores_to_attention(directions: list[tuple[Direction, ForwardOutputs]]) -> None:
    """Turns the scores in base 2 that forward's kernels leave where the attention is asked for into it.

    What they have to be divided by is known only after the last token, and is then a part of `saved`.
    """
    for task, out in directions:
        if out.attention is not None:
            heads = task.num_heads
            start = out.saved.shape[1] - 2 * ((heads + 15) // 16 * 16)
            out.attention.sub_(out.saved[:, start : start + heads, None]).exp2_()
