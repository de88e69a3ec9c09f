"""The definition, on any device and in any dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """residual_scale * activation(LayerNorm(x) weight^T + bias) + residual, in the dtype of x."""
    y = x
    if norm_weight is not None:
        norm_bias = None if norm_bias is None else norm_bias.to(x.dtype)
        y = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias, eps)
    y = F.linear(y.to(weight.dtype), weight, bias)
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "relu":
        y = F.relu(y)
    y = y.to(x.dtype)
    if residual_scale is not None:
        y = y * residual_scale.to(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
    return y if residual is None else residual + y
