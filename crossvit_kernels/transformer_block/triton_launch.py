"""A transformer block as launches of the kernels of its layers, forward and backward.

    x ── LN ─ qkv ─ attend ─ proj ── + ── LN ─ fc1, GELU ─ fc2 ── + ── y
    └────────────────────────────────┘└────────────────────────────┘

Backward goes the same way back: eight products, each with all that is done to single elements between two of
them in its epilogue, and the attention's two kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear import triton_launch as linear
from ..linear.triton_launch import Statistics, rows_of
from ..self_attention import triton_launch as attention
from .saved import Saved, empty_saved

Layer = tuple[Tensor, Tensor | None]  # weight and bias


class Normed(NamedTuple):
    """Rows [M, C], as they are where the LayerNorm is deferred, else normalised; and what stands behind."""

    rows: Tensor
    norm: linear.Norm

    def product(self, y: Tensor, **options: Any) -> None:
        """LN(x) W^T + b into y, with what else `linear.product` takes."""
        norm = self.norm
        if norm.deferred:
            options |= {"colsum": norm.colsum, "statistics": norm.statistics, "eps": norm.eps}
        linear.product(self.rows, norm.weight, y, bias=norm.offset, **options)

    def input_gradient(self, dz: Tensor, sums: Tensor, dx: Tensor, **options: Any) -> None:
        """From dz, or dz' where that is deferred, into dx."""
        norm = self.norm
        linear.product(
            *(dz, norm.weight, dx),
            epilogue="norm_gradient",
            transposed=False,
            statistics=norm.statistics,
            eps=norm.eps,
            scaled=norm.deferred,
            z=self.rows,
            sums=sums,
            **options,
        )


def normed(
    x: Tensor,
    norm: Layer,
    layer: Layer,
    eps: float,
    dtype: torch.dtype,
    known: Statistics | None = None,
    normalised: bool = False,
) -> Normed:
    """x [M, C] before a LayerNorm and a layer, multiplied in `dtype`.

    known: statistics of x. normalised: x is what the LayerNorm made of what they are of.
    """
    folded, vectors = linear.fold(*layer, *norm, dtype)
    deferred = not normalised and linear.defers(x, folded)
    if known is None and deferred:
        known = Statistics(linear.statistics(x))
    elif known is None or not (deferred or normalised):
        x, found = linear.normalise(x, eps, dtype)
        known = Statistics(found)
    return Normed(x, linear.Norm(folded, vectors[0], vectors[1], known, eps, deferred))


def forward(
    x: Tensor,
    weights: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    num_heads: int,
    attention_scale: float,
    eps: Sequence[float],
    dtype: torch.dtype,
    saves: bool,
) -> tuple[Tensor, Saved]:
    """y as the definition, and what backward needs where it `saves`."""
    batch, tokens, channels = x.shape
    norm1, qkv_layer, proj, norm2, fc1, fc2 = layers_of(weights)
    hidden = fc1[0].shape[0]
    y = x.new_empty(x.shape)
    nothing = empty_saved(x, hidden, num_heads, dtype, False)
    if x.numel() == 0:
        return y, nothing
    rows = rows_of(x)
    count = len(rows)
    scale1, scale2 = map(_dense, scales)

    first = normed(rows, norm1, qkv_layer, eps[0], dtype)
    qkv = x.new_empty((batch, tokens, 3 * channels), dtype=dtype)
    first.product(qkv.view(count, -1))
    attended, lse = attention.forward(qkv, num_heads, attention_scale, dtype, saves)
    heads = attended.view(count, -1)
    between = x.new_empty((count, channels))
    left = linear.statistics_for(heads, channels) if first.norm.deferred else None
    linear.product(
        *(heads, _matrix(proj, dtype), between),
        bias=proj[1],
        scale=scale1,
        residual=rows,
        left=None if left is None else left.values,
    )
    second = normed(between, norm2, fc1, eps[1], dtype, left)
    h = x.new_empty((count, hidden), dtype=dtype)
    z = torch.empty_like(h) if saves else None
    second.product(h, activation="gelu", z=z)
    linear.product(h, _matrix(fc2, dtype), y.view(count, -1), bias=fc2[1], scale=scale2, residual=between)
    if z is None:
        return y, nothing
    mixed = x.dtype != dtype
    return y, Saved(
        *(qkv, attended, lse, z),
        *((first.rows, second.rows) if mixed else (nothing.rows1, between)),
        *(linear.merge(x.norm.statistics, channels) for x in (first, second)),
    )


def backward(
    grad: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    saved: Saved,
    num_heads: int,
    attention_scale: float,
    eps: Sequence[float],
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of x and of the weights, of these where they are wanted; `x` is None where rows1 is saved."""
    channels = grad.shape[2]
    norm1, qkv_layer, proj, norm2, fc1, fc2 = layers_of(weights)
    scale1, scale2 = map(_dense, scales)
    dy, mixed = rows_of(grad), x is None
    count = len(dy)
    found: list[Tensor | None] = [None] * 12

    def keep(at: int, of_layer: tuple, of_norm: int | None = None) -> None:
        found[at : at + 2] = of_layer[:2]
        if of_norm is not None:
            found[of_norm : of_norm + 2] = of_layer[2:]

    def before(rows: Tensor, statistics: Tensor, norm: Layer, layer: Layer, eps: float) -> Normed:
        return normed(rows, norm, layer, eps, dtype, Statistics(statistics), mixed)

    # fc2 and GELU, whose result is made once more
    scaled = dy
    if scale2 is not None or dy.dtype != dtype:
        scaled, _, _ = linear.gradient_of_rows(
            dy, dtype, activation=None, z=None, scale=scale2, norm=None, channels=channels
        )
    second = before(saved.rows2, saved.statistics2, norm2, fc1, eps[1])
    dz, h = torch.empty_like(saved.z), torch.empty_like(saved.z)
    sums = linear.sums_for(scaled, dz.shape[1])
    linear.product(
        *(scaled, _matrix(fc2, dtype), dz),
        epilogue="activation_gradient",
        activation="gelu",
        transposed=False,
        bias=second.norm.offset,
        colsum=second.norm.colsum,
        statistics=second.norm.statistics if second.norm.deferred else None,
        eps=eps[1],
        scaled=second.norm.deferred,
        z=saved.z,
        also=h,
        sums=sums,
    )
    if any(wanted[10:12]):
        keep(10, _plain_gradient(scaled, h, fc2))
    del h, scaled
    if any(wanted[6:10]):
        keep(8, _gradient(dz, second, norm2, fc1), 6)
    # fc1 and its LayerNorm; what goes on to proj is another matrix where it is scaled or rounded
    d_between = grad.new_empty((count, channels))
    also = None
    if scale1 is not None or dy.dtype != dtype:
        also = grad.new_empty((count, channels), dtype=dtype)
    second.input_gradient(dz, sums, d_between, residual=dy, also=also, scale=scale1)
    to_proj = d_between if also is None else also
    del dz, second
    # proj and the attention
    heads = saved.attended.view(count, -1)
    if any(wanted[4:6]):
        keep(4, _plain_gradient(to_proj, heads, proj))
    d_heads = torch.empty_like(saved.attended)
    linear.product(to_proj, _matrix(proj, dtype), d_heads.view(count, -1), transposed=False)
    del to_proj, also
    dqkv = attention.backward(
        d_heads, saved.qkv, saved.attended, saved.lse, num_heads, attention_scale, dtype
    ).view(count, -1)
    del d_heads
    # qkv and its LayerNorm
    first = before(saved.rows1 if x is None else rows_of(x), saved.statistics1, norm1, qkv_layer, eps[0])
    dqkv, of_qkv, beside = linear.gradient_of_rows(
        *(dqkv, dtype),
        activation=None,
        z=saved.qkv.view(count, -1),
        scale=None,
        norm=first.norm,
        channels=channels,
        into=dqkv,
    )
    if any(wanted[:4]):
        keep(2, _gradient(dqkv, first, norm1, qkv_layer, beside), 0)
    dx = torch.empty_like(grad, memory_format=torch.contiguous_format)
    assert of_qkv is not None
    first.input_gradient(dqkv, of_qkv, dx.view(count, -1), residual=d_between)
    return dx, [g if want else None for g, want in zip(found, wanted, strict=True)]


def _gradient(
    dz: Tensor, x: Normed, affine: Layer, layer: Layer, beside: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of weight and bias of a layer behind a LayerNorm, and of the LayerNorm's."""
    norm, (weight, bias) = x.norm, layer
    if beside is None:
        given = norm.statistics, x.rows.shape[1], norm.eps
        beside = linear.beside(*given) if norm.deferred else linear.ones_beside(dz)
    return linear.weight_gradient(
        *(dz, x.rows, beside),
        means=norm.deferred,
        weight=weight,
        gamma=affine[0],
        beta=affine[1],
        bias=bias is not None,
    )


def _plain_gradient(dz: Tensor, x: Tensor, layer: Layer) -> tuple[Tensor | None, ...]:
    weight, bias = layer
    ones = linear.ones_beside(dz)
    return linear.weight_gradient(
        dz, x, ones, means=False, weight=weight, gamma=None, beta=None, bias=bias is not None
    )


def layers_of(weights: Sequence[Tensor | None]) -> list[Layer]:
    """norm1, qkv, proj, norm2, fc1 and fc2, vectors contiguous."""
    pairs = [(weights[i], _dense(weights[i + 1])) for i in range(0, 12, 2)]
    return [
        (weight.contiguous() if weight.ndim == 1 else weight, bias)
        for weight, bias in pairs
        if weight is not None
    ]


def _matrix(layer: Layer, dtype: torch.dtype) -> Tensor:
    return rows_of(layer[0].to(dtype))


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
