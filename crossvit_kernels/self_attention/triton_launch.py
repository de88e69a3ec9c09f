"""The launches of the Triton kernels of self-attention: tiles, allocation, grids."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dependent_launch
from ..cross_attention.gpu import on_device_of, within_reach
from ..cross_attention.triton_launch import architecture_of_device
from ..cross_attention.triton_table import allows_tf32
from ..validation import precision_of_float32
from . import triton_kernels as kernels

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LOG2_E = 1 / log(2.0)


@dataclass(frozen=True)
class Tiles:
    """Of a kernel: tokens of its own, tokens a step, warps, and loads that are under way."""

    own: int
    step: int
    warps: int
    stages: int


def tiles(kernel: str, channels: int, dtype: torch.dtype) -> Tiles:
    """For heads of so many channels.

    64 rows are the least that four warps share. Forward, steps of 64 keys at 64 channels and of 128 at 32
    keep scores and results within 168 registers, so that three programs share a multiprocessor. Backward has
    two more products in registers and takes smaller steps; float32 operands take twice the room, and so do
    wide heads. All was chosen from what the kernels compile to, nothing was measured.
    """
    wide = channels > 64
    if dtype == torch.float32:
        return Tiles(32 if wide else 64, 16 if wide else 32, 4, 1)
    if kernel == "attend":
        return Tiles(64, 128 if channels <= 32 else 32 if wide else 64, 4, 3 if 32 < channels <= 64 else 2)
    return Tiles(64, 16 if wide else 32, 4, 2)


def tail(tokens: int, step: int) -> int:
    """Rows of the tile behind the whole steps, a power of two of at least 16; 0 for none."""
    rest = tokens % step
    return triton.next_power_of_2(max(16, rest)) if rest else 0


def forward(
    qkv: Tensor, num_heads: int, scale: float, dtype: torch.dtype, saves: bool, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y [B, N, C], and where it `saves` the log-sum-exp of the scores in base 2, [B, H, N], else nothing."""
    batch, tokens, columns = qkv.shape
    y = qkv.new_empty((batch, tokens, columns // 3)) if into is None else into
    lse = qkv.new_empty((batch, num_heads, tokens) if saves else (0,), dtype=torch.float32)
    if y.numel() == 0:
        return y, lse
    qkv = within_reach(qkv)
    found = tiles("attend", columns // 3 // num_heads, dtype)
    with on_device_of(qkv):
        kernels.attend[batch * num_heads * -(-tokens // found.own),](
            *(qkv, y, lse, tokens, num_heads, *qkv.stride(), scale * _LOG2_E),
            **_constants(qkv, num_heads, dtype, found),
            **{"QUERIES": found.own, "KEYS": found.step, "TAIL": tail(tokens, found.step), "SAVES": saves},
            **dependent_launch.options(architecture_of_device()),
        )
    return y, lse


def backward(
    grad: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, num_heads: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """The gradient of qkv, contiguous, in its dtype."""
    batch, tokens, columns = qkv.shape
    dqkv = qkv.new_empty((batch, tokens, columns))
    if dqkv.numel() == 0:
        return dqkv
    qkv, grad = within_reach(qkv), grad.contiguous()
    products = torch.empty_like(lse)
    channels = columns // 3 // num_heads
    shared = (tokens, num_heads, *qkv.stride(), scale * _LOG2_E, scale)
    with on_device_of(qkv):
        found = tiles("to_queries", channels, dtype)
        kernels.to_queries[batch * num_heads * -(-tokens // found.own),](
            *(qkv, y, grad, lse, products, dqkv, *shared),
            **_constants(qkv, num_heads, dtype, found),
            **{"QUERIES": found.own, "KEYS": found.step, "TAIL": tail(tokens, found.step)},
        )
        found = tiles("to_keys", channels, dtype)
        kernels.to_keys[batch * num_heads * -(-tokens // found.own),](
            *(qkv, grad, lse, products, dqkv, *shared),
            **_constants(qkv, num_heads, dtype, found),
            **{"KEYS": found.own, "QUERIES": found.step},
        )
    return dqkv


def _constants(qkv: Tensor, num_heads: int, dtype: torch.dtype, found: Tiles) -> dict[str, Any]:
    channels = qkv.shape[2] // 3 // num_heads
    precise = precision_of_float32() if allows_tf32(architecture_of_device()) else "ieee"
    return {
        **{"D": channels, "D_TILE": triton.next_power_of_2(channels), "DTYPE": _DTYPES[dtype]},
        **{"PRECISION": precise, "num_warps": found.warps, "num_stages": found.stages},
    }
