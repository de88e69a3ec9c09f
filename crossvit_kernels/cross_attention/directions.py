"""What an engine computes: one or two directions, their outputs, their gradients.

An engine is a module with `saved_floats`, `forward` and `backward`: `native` and `triton_launch`. Everything
is checked before; what is here trusts its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .operands import Weights

_MATRICES = (2, 4, 6, 8)
_MATRICES_OF_FUSION = (2, 6, 8, 10, 12, 16)


@dataclass
class Direction:
    """The CLS token of one branch reads the patches of the other; both are [B, rows, channels].

    Attributes:
        weights: norm_weight to bo as the public function orders them, for a fusion between the four of f and
            the four of g (norm weight and bias, weight, bias).
        scale: [B, 1, C] in the dtype of the patches, or None.
    """

    cls: Tensor
    patches: Tensor
    weights: Weights
    num_heads: int
    scale: Tensor | None = None
    seed: Tensor | None = None
    stream: int = 0

    def __post_init__(self) -> None:
        weights = list(self.weights)
        for i, w in enumerate(weights):
            if w is not None and w.is_neg():  # a view that stands for -x and holds x
                weights[i] = w.resolve_neg()
        matrices = _MATRICES_OF_FUSION if self.fuses else _MATRICES
        first = weights[matrices[0]].dtype
        for i in matrices:
            if weights[i].dtype != first:
                raise TypeError(f"the matrices must share one dtype, got {first} and {weights[i].dtype}")
            if weights[i].stride(1) != 1:  # the engines' one condition on strides
                weights[i] = weights[i].contiguous()
        self.weights = tuple(weights)

    @property
    def fuses(self) -> bool:
        """Whether f and g are part of it."""
        return len(self.weights) == 18


@dataclass
class ForwardOutputs:
    """Where forward writes: cls [B, 1, C of the CLS token], a copy of the patches, the attention, `saved`."""

    cls: Tensor
    patches: Tensor | None
    attention: Tensor | None
    saved: Tensor


@dataclass
class Gradients:
    """What backward reads and where it writes; None for what is absent or not wanted.

    Attributes:
        cls, patches: incoming gradients of the new CLS token and of the copied patches.
        attention: the attention and its incoming gradient.
        saved: of forward.
        to_cls, to_patches: gradients of the inputs, the latter with the incoming one of the copy in it.
        to_scale: float32 [B, 1, C].
        to_weights: one tensor a weight; that of bk is left as it is.
    """

    cls: Tensor
    patches: Tensor | None
    attention: tuple[Tensor, Tensor] | None
    saved: Tensor
    to_cls: Tensor | None
    to_patches: Tensor | None
    to_scale: Tensor | None
    to_weights: Weights | None
