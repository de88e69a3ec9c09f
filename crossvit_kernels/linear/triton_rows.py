"""Triton kernels that go through rows once, around the products of a linear layer.

    fold               the weight with gamma, its sums, and the bias with beta
    statistics         a row's sum, and squares about its mean
    normalise          (x - mean) / deviation too, in the dtype of the weight
    merge              statistics of parts of the rows, to those of the rows
    gradient_of_rows   dz = scale act'(z) dy, and what the gradients of the LayerNorm need of it
    beside             the mean and 1 / r of each row, as `weight_gradient` reads them

Each is bound by the bytes it reads and writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_dependent import wait
from .triton_kernels import merged, row_statistics, slope


@triton.jit
def _two_sums(x, rows, channels, stride, m, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of each row m, and the squares about its mean, read twice."""
    there = (m < rows)[:, None]
    at = m.to(tl.int64)[:, None] * stride
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        k = (start + tl.arange(0, BLOCK))[None, :]
        total += tl.load(x + at + k, mask=there & (k < channels), other=0.0).to(tl.float32)
    of_row = tl.sum(total, 1)
    mean = (of_row / channels)[:, None]
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        k = (start + tl.arange(0, BLOCK))[None, :]
        inside = there & (k < channels)
        away = tl.where(inside, tl.load(x + at + k, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
        squares += away * away
    return of_row, tl.sum(squares, 1)


@triton.jit(do_not_specialize=["rows"])
def statistics(
    x, to, rows, channels, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False
):
    """Into [1, 2, rows], as `row_statistics` reads them."""
    wait(DEPENDENT)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total, squares = _two_sums(x, rows, channels, stride, m, ROWS, BLOCK)
    tl.store(to + m, total, mask=m < rows)
    tl.store(to + rows + m, squares, mask=m < rows)


@triton.jit(do_not_specialize=["rows"])
def normalise(
    x, to, hat, rows, channels, stride, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """`statistics`, and the normalised rows into `hat` [rows, channels]."""
    wait(DEPENDENT)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total, squares = _two_sums(x, rows, channels, stride, m, ROWS, BLOCK)
    tl.store(to + m, total, mask=m < rows)
    tl.store(to + rows + m, squares, mask=m < rows)
    mean, rstd = (total / channels)[:, None], tl.rsqrt(squares / channels + eps)[:, None]
    there = (m < rows)[:, None]
    m = m.to(tl.int64)[:, None]
    for start in range(0, channels, BLOCK):
        k = (start + tl.arange(0, BLOCK))[None, :]
        inside = there & (k < channels)
        value = (tl.load(x + m * stride + k, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        tl.store(hat + m * channels + k, value, mask=inside)


@triton.jit
def fold(
    weight, bias, gamma, beta, folded, colsum, offset, outputs, channels, stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W gamma, the sums of its rows as they were rounded, and b + W beta; the last two in float32."""
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (j < outputs)[:, None]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    shift = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = there & (k < channels)[None, :]
        at = j.to(tl.int64)[:, None]
        w = tl.load(weight + at * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        by = tl.load(gamma + k, mask=k < channels, other=0.0).to(tl.float32)
        rounded = (w * by[None, :]).to(folded.dtype.element_ty)
        tl.store(folded + at * channels + k[None, :], rounded, mask=inside)
        sums += rounded.to(tl.float32)
        if beta is not None:
            shift += w * tl.load(beta + k, mask=k < channels, other=0.0).to(tl.float32)[None, :]
    moved = tl.sum(shift, 1)
    if bias is not None:
        moved += tl.load(bias + j, mask=j < outputs, other=0.0).to(tl.float32)
    tl.store(colsum + j, tl.sum(sums, 1), mask=j < outputs)
    tl.store(offset + j, moved, mask=j < outputs)


@triton.jit
def _in_three(x):
    """Numbers of bfloat16 whose sum is x to float32's precision."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["rows"])
def merge(statistics, to, rows, channels, PARTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr):
    """[PARTS, 2, rows] into [1, 2, rows]."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total, squares = merged(statistics, m, rows, channels, PARTS, PART)
    tl.store(to + m, total, mask=m < rows)
    tl.store(to + rows + m, squares, mask=m < rows)


@triton.jit
def _store_beside(to, mean, rstd, m, valid):
    c = tl.arange(0, 16)[None, :]
    first, second, third = _in_three(mean[:, None])
    of_row = tl.where(c == 0, first, tl.where(c == 1, second, tl.where(c == 2, third, 0.0)))
    first, second, third = _in_three((1.0 / rstd)[:, None])
    of_row = tl.where(c == 3, first, tl.where(c == 4, second, tl.where(c == 5, third, of_row)))
    tl.store(to + m.to(tl.int64)[:, None] * 16 + c, of_row, mask=valid[:, None])


@triton.jit(do_not_specialize=["rows"])
def beside(statistics, to, rows, channels, eps, PARTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr):
    """Into [rows, 16]: the mean and 1 / r, three numbers of bfloat16 each."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean, rstd = row_statistics(statistics, m, rows, channels, eps, PARTS, PART)
    _store_beside(to, mean, rstd, m, m < rows)


@triton.jit(do_not_specialize=["rows", "of_scale"])
def gradient_of_rows(
    dy, z, scale, colsum, offset, statistics, dz, sums, to_beside, rows, outputs, channels, of_scale, stride,
    eps, ACTIVATION: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = scale act'(z) dy [rows, outputs], SCALED by r of each row; dy has rows of `stride`.

    With NORM also m1 and m2 of the rows, into `sums` [1, 2, rows]; SCALED, `to_beside` gets what `beside`
    writes. dz may be dy.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = m < rows
    factor = tl.full([ROWS], 1.0, tl.float32)
    if scale is not None:
        factor = tl.load(scale + m // of_scale, mask=valid, other=0.0).to(tl.float32)
    if SCALED:
        mean, rstd = row_statistics(statistics, m, rows, channels, eps, PARTS, PART)
        factor *= rstd
        _store_beside(to_beside, mean, rstd, m, valid)
    m1 = tl.zeros([ROWS, BLOCK], tl.float32)
    m2 = tl.zeros([ROWS, BLOCK], tl.float32)
    at = m.to(tl.int64)[:, None]
    for start in range(0, outputs, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = valid[:, None] & (j < outputs)[None, :]
        value = tl.load(dy + at * stride + j[None, :], mask=inside, other=0.0).to(tl.float32)
        value *= factor[:, None]
        if z is not None:
            before = tl.load(z + at * outputs + j[None, :], mask=inside, other=0.0).to(tl.float32)
            value *= slope(before, ACTIVATION)
        rounded = value.to(dz.dtype.element_ty)
        tl.store(dz + at * outputs + j[None, :], rounded, mask=inside)
        if NORM:
            counted = rounded.to(tl.float32)
            m1 += counted * tl.load(colsum + j, mask=j < outputs, other=0.0)[None, :]
            away = before - tl.load(offset + j, mask=j < outputs, other=0.0)[None, :]
            m2 += tl.where(inside & (counted != 0.0), counted * away, 0.0)  # z may be infinite
    if NORM:
        tl.store(sums + m, tl.sum(m1, 1), mask=valid)
        tl.store(sums + rows + m, tl.sum(m2, 1), mask=valid)
