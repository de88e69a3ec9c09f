"""The definition, on any device and in any dtype, and the same in PyTorch's fused operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def self_attention(
    qkv: Tensor, num_heads: int, scale: float, dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v of each head, and the attention before its dropout. `mask` multiplies it."""
    q, k, v = _heads(qkv.to(dtype), num_heads)
    scores = q @ k.transpose(-2, -1) * scale  # [B, H, N, N]
    attention = scores.softmax(-1, dtype=torch.promote_types(dtype, torch.float32))
    weights = attention if mask is None else attention * mask
    return _tokens(weights.to(dtype) @ v).to(qkv.dtype), attention


def output(qkv: Tensor, num_heads: int, scale: float, dtype: torch.dtype) -> Tensor:
    """`self_attention` without the attention."""
    return self_attention(qkv, num_heads, scale, dtype)[0]


def fused(qkv: Tensor, num_heads: int, scale: float, dtype: torch.dtype) -> Tensor:
    """`output` by F.scaled_dot_product_attention."""
    q, k, v = _heads(qkv.to(dtype), num_heads)
    return _tokens(F.scaled_dot_product_attention(q, k, v, scale=scale)).to(qkv.dtype)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Each [B, H, N, d]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _tokens(x: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, N, C]."""
    return x.transpose(1, 2).flatten(2)
