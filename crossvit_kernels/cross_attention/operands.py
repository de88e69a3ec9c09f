"""What every backend of the cross-attention computes from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dropout import dropout_mask

# Tensors, or None for absent biases.
Weights = tuple[Any, ...]


class Operands(NamedTuple):
    """The arguments of the public function, checked, in their dtypes, everything random already drawn.

    A backend takes these and returns y [B, 1, C] and the attention [B, H, 1 + P] before its dropout.

    Attributes:
        weights: norm_weight, norm_bias, wq, bq, wk, bk, wv, bv, wo, bo.
        dropout_p: probability of dropout on the attention; `seed` and `stream` say which one is dropped.
        residual_scale: [B, 1, C], multiplies the projected output; None for 1.
        return_attention: whether the attention is wanted; a backend may compute it all the same.
    """

    cls: Tensor
    patches: Tensor
    weights: Weights
    num_heads: int
    eps: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    stream: int = 0
    residual_scale: Tensor | None = None
    return_attention: bool = False

    def attention_mask(self) -> Tensor | None:
        """What multiplies the attention, [B, H, 1 + P]; None without dropout."""
        if self.seed is None:
            return None
        shape = (self.cls.shape[0], self.num_heads, 1 + self.patches.shape[1])
        dtype = torch.promote_types(self.weights[2].dtype, torch.float32)
        return dropout_mask(self.seed, shape, self.dropout_p, self.stream, dtype)
