"""Weights of linear layers as the CPU's kernels read them, LayerNorm folded in."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..program import DTYPES, NOWHERE, Activation, Place, Precision, bits

_PANEL = 64  # at least the columns of a panel, on any instruction set


class PackedLinear:
    """W [outputs, channels] and its bias, copied and laid out for the instruction set in use.

    Args:
        weight: [outputs, channels].
        bias: [outputs], or None.
        norm_weight, norm_bias: of a LayerNorm in front, folded into weight and bias: W (g * x^ + b) + c is
            (W * g) x^ + (W b + c).
        scale: multiplies weight and bias.
        precision: what they are multiplied in.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        scale: float = 1.0,
        precision: Precision = Precision.FLOAT32,
    ) -> None:
        self.outputs, self.channels = weight.shape
        self.precision = precision
        self.isa = native.load().isa()
        exact = weight.detach().double() * scale
        added = torch.zeros(self.outputs, dtype=torch.float64)
        if bias is not None:
            added += bias.detach().double() * scale
        if norm_bias is not None:
            added += exact @ norm_bias.detach().double()
        if norm_weight is not None:
            exact = exact * norm_weight.detach().double()
        self._pack(exact.to(torch.bfloat16 if precision == Precision.BFLOAT16 else torch.float32))
        padded = -(-self.outputs // _PANEL) * _PANEL
        self.bias = torch.zeros(padded)
        self.bias[: self.outputs] = added

    def _pack(self, weight: Tensor) -> None:
        module = native.load()
        shape = (self.outputs, self.channels, int(self.precision))
        words = module.packed_weight_words(self.isa, *shape)
        # Panels begin at whole cache lines; what is prefetched may lie behind the last one.
        memory = torch.empty(words + 32, dtype=torch.int32)
        self.words = memory[-memory.data_ptr() % 64 // 4 :][:words]
        module.pack_weight(
            self.isa, weight.data_ptr(), weight.stride(0), DTYPES[weight.dtype], *shape,
            torch.get_num_threads(), self.words.data_ptr(),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.bias.nbytes

    def step(
        self,
        x: Place,
        out: Place,
        rows: int,
        activation: Activation = Activation.NONE,
        eps: float | None = None,
        residual: Place | None = None,
    ) -> list[int]:
        """The words of struct LinearStep. `eps` of the LayerNorm in front, where there is one."""
        return [
            *(*x.words(), *(NOWHERE if residual is None else residual.words()), *out.words()),
            *(rows, self.channels, self.outputs, int(self.precision)),
            *(self.words.data_ptr(), self.bias.data_ptr(), int(activation)),
            *(int(eps is not None), bits(eps or 0.0)),
        ]
