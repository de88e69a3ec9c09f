"""Inputs of the cross-attention, and oracles for it that others wrote."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("cls", "patches", "norm_weight", "norm_bias", "wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo")
KEY_BIAS = NAMES.index("bk")


def operands(
    batch: int = 2,
    patches: int = 17,
    width: int = 48,
    dtype: torch.dtype = torch.float64,
    *,
    mean: float = 1.0,
    spread: float = 2.0,
    sharpness: float = 1.0,
) -> list[Tensor]:
    """Random arguments in the order of NAMES; `sharpness` scales the scores."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    tensors = [
        normal(batch, 1, width) * spread + mean,
        normal(batch, patches, width) * spread + mean,
        1 + 0.3 * normal(width),
        0.3 * normal(width),
    ]
    for scale in (sharpness, sharpness, 1.0, 1.0):
        tensors += [normal(width, width) * scale / width**0.5, normal(width)]
    return [x.to(dtype) for x in tensors]


def leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def oracle(tensors: list[Tensor], num_heads: int, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The function by torch.nn.functional.multi_head_attention_forward: y [B, 1, C], attention [B, H, N]."""
    cls, patches, gamma, beta, wq, bq, wk, bk, wv, bv, wo, bo = tensors
    tokens = F.layer_norm(torch.cat((cls, patches), 1), gamma.shape, gamma, beta, eps).transpose(0, 1)
    output, attention = F.multi_head_attention_forward(
        tokens[:1],
        tokens,
        tokens,
        gamma.numel(),
        num_heads,
        None,
        torch.cat((bq, bk, bv)),
        None,
        None,
        False,
        0.0,
        wo,
        bo,
        use_separate_proj_weight=True,
        q_proj_weight=wq,
        k_proj_weight=wk,
        v_proj_weight=wv,
        average_attn_weights=False,
    )
    return cls + output.transpose(0, 1), attention.squeeze(2)


def eager(tensors: list[Tensor], num_heads: int, eps: float = 1e-6) -> Tensor:
    """What timm's model computes, by timm's module, in the dtype of the tensors."""
    from timm.models.crossvit import CrossAttentionBlock

    cls, patches, *weights = tensors
    width = cls.shape[-1]
    block = CrossAttentionBlock(
        width, num_heads, qkv_bias=True, norm_layer=lambda dim, **kw: nn.LayerNorm(dim, eps=eps, **kw)
    ).to(cls.dtype)
    names = ["norm1.weight", "norm1.bias"]
    names += [f"attn.{name}.{kind}" for name in ("wq", "wk", "wv", "proj") for kind in ("weight", "bias")]
    state = dict(zip(names, weights, strict=True))
    return torch.func.functional_call(block, state, (torch.cat((cls, patches), 1),))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value; fails on anything that is not finite."""
    assert torch.isfinite(got).all(), "not finite"
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().clamp_min(1e-30)
    return ((got.double() - expected.double()).abs().max() / scale).item()
