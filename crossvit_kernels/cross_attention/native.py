"""The call into csrc/cross_attention: tensors become addresses and strides.

Both the cross-attention and the fusion are made of `Direction`s.
"""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from .. import native
from .directions import Direction, ForwardOutputs, Gradients
from .operands import Weights

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/common/dtype.h numbers them
_ABSENT = (0, 0, 0, 0)
_NO_PROJECTION = (0,) * 11


def saved_floats(width: int, heads: int) -> int:
    """What forward leaves for backward, an image; csrc/cross_attention/cross_attention.h lays it out."""
    return (4 + heads) * ((width + 15) // 16 * 16) + (2 * heads + 15) // 16 * 16


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


def _outputs(outputs: ForwardOutputs) -> list[int]:
    attention = 0 if outputs.attention is None else outputs.attention.data_ptr()
    return [*_tokens(outputs.cls), *_tokens(outputs.patches), attention, outputs.saved.data_ptr()]


def forward(directions: list[tuple[Direction, ForwardOutputs]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their outputs. An empty batch has nothing to compute."""
    if directions[0][0].patches.shape[0] > 0:
        _run([[*_inputs(d), *_outputs(out)] for d, out in directions], False, eps, dropout_p)


def _gradients(direction: Direction, gradients: Gradients) -> list[int]:
    g = gradients
    attention, grad_attention = g.attention or (None, None)
    none: tuple[None, ...] = (None,) * (18 if direction.fuses else 10)
    return [
        *_inputs(direction),
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


def backward(directions: list[tuple[Direction, Gradients]], eps: float, dropout_p: float) -> None:
    """One or two directions, into their gradients."""
    if directions[0][0].patches.shape[0] > 0:
        _run([_gradients(d, g) for d, g in directions], True, eps, dropout_p)
