"""The definition: Eq. 5 to 7 of the CrossViT paper around a cross-attention, in PyTorch operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_attention.operands import Operands as AttentionOperands
from ..cross_attention.operands import Weights
from .operands import Operands

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def fusion_with(cross_attention: Callable) -> Callable[[Operands], Results]:
    """The fusion on an implementation of the cross-attention."""

    def cross_fusion(operands: Operands) -> Results:
        o = operands

        def direction(stream: int) -> tuple[Tensor, Tensor]:
            own, other = (o.tokens_s, o.tokens_l) if stream == 0 else (o.tokens_l, o.tokens_s)
            weights = o.weights_s if stream == 0 else o.weights_l
            y, attention = cross_attention(
                AttentionOperands(
                    _project(own[:, :1], weights[:4], o.eps),
                    other[:, 1:],
                    weights[4:14],
                    o.num_heads[stream],
                    o.eps,
                    o.dropout_p,
                    o.seed,
                    stream,
                    o.residual_scales[stream],
                    o.return_attention,
                )
            )
            return torch.cat((_project(y, weights[14:], o.eps), own[:, 1:]), dim=1), attention

        (tokens_s, attention_s), (tokens_l, attention_l) = direction(0), direction(1)
        return tokens_s, tokens_l, attention_s, attention_l

    return cross_fusion


def _project(x: Tensor, weights: Weights, eps: float) -> Tensor:
    """f and g: LayerNorm, GELU, linear."""
    norm_weight, norm_bias, weight, bias = weights
    beta = None if norm_bias is None else norm_bias.to(x.dtype)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), beta, eps)
    return F.linear(F.gelu(normed).to(weight.dtype), weight, bias).to(x.dtype)
