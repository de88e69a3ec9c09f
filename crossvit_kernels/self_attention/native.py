"""The step of the compiled module that computes self-attention, and the call into csrc/self_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..program import Kind, Place, Precision, Program, bits, plain, precision_of, rows_of, run, threads_for


def self_attention(qkv: Tensor, num_heads: int, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale q k^T) v of each head, multiplied as tensors of `dtype` are; the scale is positive."""
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads) or scale <= 0:
        raise ValueError(
            f"qkv must be [B, N, 3 C] with {num_heads} heads and the scale positive, "
            f"got {list(qkv.shape)} and {scale}"
        )
    qkv = plain(qkv)
    batch, tokens, wide = qkv.shape
    channels = wide // 3
    out = torch.empty((batch, tokens, channels), dtype=qkv.dtype, device="cpu")
    if out.numel() == 0:
        return out
    program = Program()
    program.images()
    step = attention_step(
        *(rows_of(qkv), rows_of(out), tokens, num_heads, channels // num_heads),
        *(precision_of(dtype), scale),
    )
    program.add(Kind.SELF_ATTENTION, step)
    run(program.packed(), batch, threads=threads_for(4 * batch * tokens * tokens * channels))
    return out


def attention_step(
    qkv: Place, out: Place, tokens: int, heads: int, head_channels: int, precision: Precision, scale: float
) -> list[int]:
    """The words of struct SelfAttentionStep: qkv [tokens, 3 H d] to [tokens, H d]; the scale is positive."""
    return [*qkv.words(), *out.words(), tokens, heads, head_channels, int(precision), bits(scale)]
