"""What a transformer block keeps from forward for backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Saved(NamedTuple):
    """What forward leaves for backward beside x, the weights and the scales.

    Attributes:
        qkv, attended, lse: [B, N, 3 C], [B, N, C] and [B, H, N] (float32) of the attention.
        z: [M, hidden], what GELU is taken of.
        rows1, rows2: [M, C], what both LayerNorms gave, where the matrices have another dtype than x; else
            rows1 is empty, for it is x, and rows2 is what the second LayerNorm was given.
        statistics1, statistics2: [1, 2, M] of what the LayerNorms were given, float32.
    """

    qkv: Tensor
    attended: Tensor
    lse: Tensor
    z: Tensor
    rows1: Tensor
    rows2: Tensor
    statistics1: Tensor
    statistics2: Tensor


def empty_saved(x: Tensor, hidden: int, num_heads: int, dtype: torch.dtype, saves: bool) -> Saved:
    """Tensors of its shapes; empty ones where forward does not save."""
    batch, tokens, channels = x.shape
    count = batch * tokens
    saves = saves and x.numel() > 0

    def room(*shape: int, of: torch.dtype = dtype, wanted: bool = True) -> Tensor:
        return x.new_empty(shape if saves and wanted else (0,), dtype=of)

    return Saved(
        qkv=room(batch, tokens, 3 * channels),
        attended=room(batch, tokens, channels),
        lse=room(batch, num_heads, tokens, of=torch.float32),
        z=room(count, hidden),
        rows1=room(count, channels, wanted=x.dtype != dtype),
        rows2=room(count, channels),
        statistics1=room(1, 2, count, of=torch.float32),
        statistics2=room(1, 2, count, of=torch.float32),
    )
