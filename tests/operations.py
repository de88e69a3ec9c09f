"""The operations under contract: their inputs, and oracles for them that others wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit_kernels import FusionWeights, cross_attention, cross_fusion

ATTENTION_WEIGHTS = ("norm_weight", "norm_bias", "wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo")
NAMES = ("cls", "patches", *ATTENTION_WEIGHTS)
KEY_BIAS = NAMES.index("bk")


@dataclass(frozen=True)
class Size:
    """B images; P patches of C channels read by H heads, and the same of the other branch in a fusion."""

    batch: int = 2
    patches: int = 17
    width: int = 48
    heads: int = 4
    other_patches: int = 9
    other_width: int = 24
    other_heads: int = 3


@dataclass(frozen=True)
class Spread:
    """How the inputs are drawn; `sharpness` scales the scores."""

    mean: float = 1.0
    deviation: float = 2.0
    sharpness: float = 1.0


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _norm(width: int) -> list[Tensor]:
    return [1 + 0.3 * _normal(width), 0.3 * _normal(width)]


def _linear(rows: int, columns: int, scale: float = 1.0) -> list[Tensor]:
    return [_normal(rows, columns) * scale / columns**0.5, _normal(rows)]


def _attention_weights(width: int, spread: Spread) -> list[Tensor]:
    sharp = partial(_linear, width, width, spread.sharpness)
    return [*_norm(width), *sharp(), *sharp(), *_linear(width, width), *_linear(width, width)]


def _tokens(batch: int, count: int, width: int, spread: Spread) -> Tensor:
    return _normal(batch, count, width) * spread.deviation + spread.mean


def _multi_head_attention(
    cls: Tensor, patches: Tensor, weights: Sequence[Tensor], num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The function by torch.nn.functional.multi_head_attention_forward: y [B, 1, C], attention [B, H, N]."""
    gamma, beta, wq, bq, wk, bk, wv, bv, wo, bo = weights
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


def _timm_attention(cls: Tensor, patches: Tensor, weights: Sequence[Tensor], num_heads: int) -> Tensor:
    from timm.models.crossvit import CrossAttentionBlock

    norm = partial(nn.LayerNorm, eps=1e-6)
    block = CrossAttentionBlock(cls.shape[-1], num_heads, qkv_bias=True, norm_layer=norm).to(weights[2].dtype)
    names = ["norm1.weight", "norm1.bias"]
    names += [f"attn.{name}.{kind}" for name in ("wq", "wk", "wv", "proj") for kind in ("weight", "bias")]
    return torch.func.functional_call(
        block, dict(zip(names, weights, strict=True)), (torch.cat((cls, patches), 1),)
    )


def _project(x: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    gamma, beta, weight, bias = weights
    return F.linear(F.gelu(F.layer_norm(x, gamma.shape, gamma, beta, eps)), weight, bias)


class CrossAttention:
    """`cross_attention`. Tensors in the order of `names`; `tokens` are the positions of activations."""

    name = "cross_attention"
    names = NAMES
    outputs = ("y",)
    tokens = (0, 1)
    zero_gradients = (KEY_BIAS,)
    sizes = (
        Size(),
        Size(1, 1, 8, 8),
        Size(3, 2, 33, 1),
        Size(2, 0, 24, 3),
        Size(0, 5, 24, 3),
        Size(1, 400, 224, 7),
        Size(2, 196, 448, 7),
        Size(3, 129, 96, 3),
        Size(1, 31, 768, 12),
        Size(9, 300, 20, 5),
        Size(61, 5, 12, 3),
    )

    def inputs(self, size: Size, dtype: torch.dtype, spread: Spread = Spread()) -> list[Tensor]:
        drawn = [
            _tokens(size.batch, 1, size.width, spread),
            _tokens(size.batch, size.patches, size.width, spread),
            *_attention_weights(size.width, spread),
        ]
        return [x.to(dtype) for x in drawn]

    def run(self, x: Sequence[Tensor], size: Size, backend: str, **options: object) -> tuple[Tensor, ...]:
        y = cross_attention(*x, num_heads=size.heads, backend=backend, **options)
        return y if isinstance(y, tuple) else (y,)

    def oracle(self, x: Sequence[Tensor], size: Size, eps: float = 1e-6) -> tuple[Tensor, ...]:
        """y and the attention."""
        return _multi_head_attention(x[0], x[1], x[2:], size.heads, eps)

    def eager(self, x: Sequence[Tensor], size: Size) -> tuple[Tensor, ...]:
        """y as timm's modules compute it in the dtype of the tensors."""
        return (_timm_attention(x[0], x[1], x[2:], size.heads),)


class CrossFusion:
    """`cross_fusion`: S has the patches and width of a size, L the other ones."""

    name = "cross_fusion"
    names = (
        *("tokens_s", "tokens_l"),
        *(f"s.{name}" for name in FusionWeights.__dataclass_fields__),
        *(f"l.{name}" for name in FusionWeights.__dataclass_fields__),
    )
    outputs = ("tokens_s", "tokens_l")
    tokens = (0, 1)
    zero_gradients = (names.index("s.bk"), names.index("l.bk"))
    sizes = (
        Size(),
        Size(1, 1, 8, 8, 0, 6, 1),
        Size(0, 5, 24, 3),
        Size(2, 400, 224, 7, 196, 448, 7),
        Size(3, 2, 33, 11, 130, 20, 5),
        Size(61, 5, 12, 3, 4, 8, 2),
    )

    def inputs(self, size: Size, dtype: torch.dtype, spread: Spread = Spread()) -> list[Tensor]:
        drawn = [
            _tokens(size.batch, 1 + size.patches, size.width, spread),
            _tokens(size.batch, 1 + size.other_patches, size.other_width, spread),
        ]
        for own, other in ((size.width, size.other_width), (size.other_width, size.width)):
            drawn += [*_norm(own), *_linear(other, own), *_attention_weights(other, spread)]
            drawn += [*_norm(other), *_linear(own, other)]
        return [x.to(dtype) for x in drawn]

    def run(self, x: Sequence[Tensor], size: Size, backend: str, **options: object) -> tuple[Tensor, ...]:
        weights = FusionWeights(*x[2:20]), FusionWeights(*x[20:])
        heads = (size.other_heads, size.heads)
        return cross_fusion(x[0], x[1], *weights, num_heads=heads, backend=backend, **options)

    def _fuse(
        self, x: Sequence[Tensor], size: Size, attend: Callable, eps: float = 1e-6
    ) -> tuple[Tensor, ...]:
        tokens, attentions = [], []
        for b, heads in enumerate((size.other_heads, size.heads)):
            own, other, weights = x[b], x[1 - b], x[2 + 18 * b : 20 + 18 * b]
            y, attention = attend(_project(own[:, :1], weights[:4], eps), other[:, 1:], weights[4:14], heads)
            tokens.append(torch.cat((_project(y, weights[14:], eps), own[:, 1:]), 1))
            attentions.append(attention)
        return (*tokens, *attentions)

    def oracle(self, x: Sequence[Tensor], size: Size, eps: float = 1e-6) -> tuple[Tensor, ...]:
        """The new tokens of both branches, then both attentions."""
        return self._fuse(x, size, partial(_multi_head_attention, eps=eps), eps)

    def eager(self, x: Sequence[Tensor], size: Size) -> tuple[Tensor, ...]:
        """The new tokens as timm's modules compute them in the dtype of the tensors."""
        return self._fuse(x, size, lambda *args: (_timm_attention(*args), None))[:2]


OPERATIONS = (CrossAttention(), CrossFusion())


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value; fails on anything that is not finite."""
    assert torch.isfinite(got).all(), "not finite"
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().clamp_min(1e-30)
    return ((got.double() - expected.double()).abs().max() / scale).item()


# For tests of other things, which need some valid call.


def operands(
    batch: int = 2, patches: int = 17, width: int = 48, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Random arguments of cross_attention in the order of NAMES."""
    return OPERATIONS[0].inputs(Size(batch, patches, width), dtype)


def oracle(tensors: Sequence[Tensor], num_heads: int) -> tuple[Tensor, Tensor]:
    """`CrossAttention.oracle` without a size."""
    return _multi_head_attention(tensors[0], tensors[1], tensors[2:], num_heads, 1e-6)
