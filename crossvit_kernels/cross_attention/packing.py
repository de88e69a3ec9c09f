"""Directions as the compiled module reads them: struct Direction of csrc/cross_attention/cross_attention.h.

Tensors become addresses and strides, in the order of the struct; what a pass does not need is left out at the
end, where the module reads zeros.
"""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from .directions import Direction, ForwardOutputs, Gradients
from .operands import Weights

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/common/dtype.h numbers them
_ABSENT = (0, 0, 0, 0)
_NO_PROJECTION = (0,) * 11


def pack_forward(directions: list[tuple[Direction, ForwardOutputs]]) -> list[bytes]:
    """The directions of a forward pass."""
    return [_packed([*_inputs(d), *_outputs(out)]) for d, out in directions]


def pack_backward(directions: list[tuple[Direction, Gradients]]) -> list[bytes]:
    """The directions of a backward pass."""
    return [_packed([*_inputs(d), *_gradients(d, g)]) for d, g in directions]


@cache
def _struct(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def _packed(fields: list[int]) -> bytes:
    return _struct(len(fields)).pack(*fields)


def _inputs(direction: Direction) -> list[int]:
    """The part of the struct that forward and backward have in common."""
    batch, patches, width = direction.patches.shape
    weight = direction.weights[6 if direction.fuses else 2]
    return [
        *(batch, patches, width, direction.cls.shape[2], direction.num_heads),
        *(_DTYPES[direction.patches.dtype], _DTYPES[weight.dtype]),
        direction.stream,
        0 if direction.seed is None else direction.seed.data_ptr(),
        *_tokens(direction.cls),
        *_tokens(direction.patches),
        *_tokens(direction.scale),
        *_parameters(direction.weights),
    ]


def _outputs(outputs: ForwardOutputs) -> list[int]:
    attention = 0 if outputs.attention is None else outputs.attention.data_ptr()
    return [*_tokens(outputs.cls), *_tokens(outputs.patches), attention, outputs.saved.data_ptr()]


def _gradients(direction: Direction, gradients: Gradients) -> list[int]:
    g = gradients
    attention, grad_attention = g.attention or (None, None)
    none: tuple[None, ...] = (None,) * (18 if direction.fuses else 10)
    return [
        *_ABSENT,
        *_ABSENT,
        0 if attention is None else attention.data_ptr(),
        g.saved.data_ptr(),
        *_tokens(g.cls),
        *_tokens(g.patches),
        0 if grad_attention is None else grad_attention.data_ptr(),
        *_tokens(g.to_cls),
        *_tokens(g.to_patches),
        0 if g.to_scale is None else g.to_scale.data_ptr(),
        *_parameters(g.to_weights or none),
    ]


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
