"""The call into csrc/cross_attention: tensors become addresses and strides, outputs are allocated here.

Both the cross-attention and the fusion are made of `Direction`s. Everything is checked before; what is here
trusts its arguments.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import native
from .operands import Weights

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/common/dtype.h numbers them
_ABSENT = (0, 0, 0, 0)
_NO_PROJECTION = (0,) * 11
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
            if weights[i].stride(1) != 1:  # the kernels' one condition on strides
                weights[i] = weights[i].contiguous()
        self.weights = tuple(weights)

    @property
    def fuses(self) -> bool:
        """Whether f and g are part of it."""
        return len(self.weights) == 18

    def saved(self) -> Tensor:
        """Room for what forward leaves for backward, float32 [B, …]."""
        batch, _, width = self.patches.shape
        return torch.empty((batch, _saved_floats(width, self.num_heads)), dtype=torch.float32)

    def inputs(self) -> list[int]:
        """The part of the struct that forward and backward have in common."""
        batch, patches, width = self.patches.shape
        weight = self.weights[6 if self.fuses else 2]
        return [
            *(batch, patches, width, self.cls.shape[2], self.num_heads),
            *(_DTYPES[self.patches.dtype], _DTYPES[weight.dtype]),
            self.stream,
            0 if self.seed is None else self.seed.data_ptr(),
            *_tokens(self.cls),
            *_tokens(self.patches),
            *_tokens(self.scale),
            *_parameters(self.weights),
        ]


@cache
def _saved_floats(width: int, heads: int) -> int:
    return native.load().cross_attention_saved_floats(width, heads)


@cache
def _struct(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def _vector(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), _DTYPES[x.dtype])


def _matrix(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _tokens(x: Tensor | None) -> tuple[int, ...]:
    return _ABSENT if x is None else (x.data_ptr(), *x.stride())


def _projection(weights: Weights) -> tuple[int, ...]:
    norm_weight, norm_bias, weight, bias = weights
    return (*_vector(norm_weight), *_vector(norm_bias), *_matrix(weight), *_vector(bias))


def _parameters(weights: Weights) -> tuple[int, ...]:
    fuses = len(weights) == 18
    norm_weight, norm_bias, wq, bq, wk, _, wv, bv, wo, bo = weights[4:14] if fuses else weights
    return (
        *(_projection(weights[:4]) if fuses else _NO_PROJECTION),
        *_vector(norm_weight),
        *_vector(norm_bias),
        *_matrix(wq),
        *_vector(bq),
        *_matrix(wk),
        *_matrix(wv),
        *_vector(bv),
        *_matrix(wo),
        *_vector(bo),
        *(_projection(weights[14:]) if fuses else _NO_PROJECTION),
    )


def _run(fields: list[list[int]], backward: bool, eps: float, dropout_p: float) -> None:
    module = native.load()
    packed = [_struct(len(one)).pack(*one) for one in fields]
    # Asked of torch: OpenMP's own number is each thread's, and torch sets it when a thread first asks.
    isa, threads, floats = module.cross_attention_plan(packed, backward, torch.get_num_threads())
    scratch = torch.empty(floats, dtype=torch.float32)
    module.cross_attention(packed, backward, scratch.data_ptr(), isa, threads, eps, dropout_p)


@dataclass
class ForwardOutputs:
    """Where forward writes: cls [B, 1, C of the CLS token], a copy of the patches, the attention, `saved`."""

    cls: Tensor
    patches: Tensor | None
    attention: Tensor | None
    saved: Tensor

    def fields(self) -> list[int]:
        attention = 0 if self.attention is None else self.attention.data_ptr()
        return [*_tokens(self.cls), *_tokens(self.patches), attention, self.saved.data_ptr()]


def forward(directions: list[tuple[Direction, ForwardOutputs]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their outputs. An empty batch has nothing to compute."""
    if directions[0][0].patches.shape[0] > 0:
        _run([[*d.inputs(), *out.fields()] for d, out in directions], False, eps, dropout_p)


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

    def fields(self, inputs: list[int], fuses: bool) -> list[int]:
        attention, grad_attention = self.attention or (None, None)
        none: tuple[None, ...] = (None,) * (18 if fuses else 10)
        return [
            *inputs,
            *_ABSENT,
            *_ABSENT,
            0 if attention is None else attention.data_ptr(),
            self.saved.data_ptr(),
            *_tokens(self.cls),
            *_tokens(self.patches),
            0 if grad_attention is None else grad_attention.data_ptr(),
            *_tokens(self.to_cls),
            *_tokens(self.to_patches),
            0 if self.to_scale is None else self.to_scale.data_ptr(),
            *_parameters(self.to_weights or none),
        ]


def backward(directions: list[tuple[Direction, Gradients]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their gradients."""
    if directions[0][0].patches.shape[0] > 0:
        _run([g.fields(d.inputs(), d.fuses) for d, g in directions], True, eps, dropout_p)
