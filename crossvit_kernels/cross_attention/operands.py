"""What every backend of the cross-attention computes from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The arguments of the public function, checked, in their dtypes, everything random already drawn.

    A backend takes these and returns y [B, 1, C] and the attention [B, H, 1 + P] before its dropout mask.

    Attributes:
        attention_mask: [B, H, 1 + P], multiplies the attention; None without dropout.
        residual_scale: [B, 1, 1 or C], multiplies the projected output; None for 1.
    """

    cls: Tensor
    patches: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    wq: Tensor
    bq: Tensor | None
    wk: Tensor
    bk: Tensor | None
    wv: Tensor
    bv: Tensor | None
    wo: Tensor
    bo: Tensor | None
    num_heads: int
    eps: float
    attention_mask: Tensor | None
    residual_scale: Tensor | None
