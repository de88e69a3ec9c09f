"""The definition, on any device and in any dtype, and the same in PyTorch's fused operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..linear.reference import linear
from ..self_attention import reference as attention_reference


def transformer_block(
    x: Tensor,
    weights: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    num_heads: int,
    attention_scale: float,
    eps: tuple[float, float],
    dtype: torch.dtype,
    attend: Callable[[Tensor, int, float, torch.dtype], Tensor] = attention_reference.output,
) -> Tensor:
    """x + MSA(LN(x)), then x + FFN(LN(x)); matrices are multiplied in `dtype`."""
    norm1, norm2 = weights[:2], weights[6:8]
    qkv, proj, fc1, fc2 = (_in(dtype, *weights[i : i + 2]) for i in (2, 4, 8, 10))
    packed = linear(x, *qkv, norm1[0], norm1[1], None, eps[0], None)
    heads = attend(packed, num_heads, attention_scale, dtype)
    x = linear(heads, *proj, None, None, x, eps[0], None, scales[0])
    hidden = linear(x, *fc1, norm2[0], norm2[1], None, eps[1], "gelu")
    return linear(hidden, *fc2, None, None, x, eps[1], None, scales[1])


def _in(dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert weight is not None
    return weight.to(dtype), None if bias is None else bias.to(dtype)


fused = partial(transformer_block, attend=attention_reference.fused)
