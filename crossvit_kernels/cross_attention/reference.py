"""The definition: Eq. 6 and 7 of the CrossViT paper, line by line, on any device and in any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import Operands


def cross_attention(operands: Operands) -> tuple[Tensor, Tensor]:
    """y = cls + residual_scale * MCA(LN([cls || patches])), and the attention."""
    cls, patches = operands.cls, operands.patches
    norm_weight, norm_bias, wq, bq, wk, bk, wv, bv, wo, bo = operands.weights
    num_heads, eps = operands.num_heads, operands.eps
    attention_mask, residual_scale = operands.attention_mask(), operands.residual_scale

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, N, d]

    dtype = wq.dtype
    tokens = torch.cat((cls, patches), dim=1)
    normed = F.layer_norm(
        tokens, tokens.shape[-1:], norm_weight.to(tokens.dtype), _like(norm_bias, tokens), eps
    ).to(dtype)
    q = heads(F.linear(normed[:, :1], wq, bq))
    k = heads(F.linear(normed, wk, bk))
    v = heads(F.linear(normed, wv, bv))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, H, 1, N]
    attention = scores.softmax(-1, dtype=torch.promote_types(dtype, torch.float32))
    weights = attention if attention_mask is None else attention * attention_mask.unsqueeze(2)
    output = (weights.to(dtype) @ v).transpose(1, 2).flatten(2)  # [B, 1, C]
    output = F.linear(output, wo, bo)
    if residual_scale is not None:
        output = output * residual_scale
    return (cls + output).to(cls.dtype), attention.squeeze(2)


def _like(bias: Tensor | None, tokens: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(tokens.dtype)
