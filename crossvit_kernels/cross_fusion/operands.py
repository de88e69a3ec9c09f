"""What every backend of the fusion computes from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..cross_attention.operands import Weights


class Operands(NamedTuple):
    """The arguments of the public function, checked, in their dtypes, everything random already drawn.

    A backend takes these and returns the new tokens of S and of L and the attention of both directions.

    Attributes:
        weights_s, weights_l: the tensors of `FusionWeights` in their order.
        num_heads, residual_scales: of S's and of L's direction; scales are [B, 1, C] or None.
        dropout_p: probability of dropout on the attention; with `seed`, stream 0 is S's and stream 1 L's.
    """

    tokens_s: Tensor
    tokens_l: Tensor
    weights_s: Weights
    weights_l: Weights
    num_heads: tuple[int, int]
    eps: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    residual_scales: tuple[Tensor | None, Tensor | None] = (None, None)
    return_attention: bool = False
