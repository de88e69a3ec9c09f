"""Triton kernels of the chain of the CLS token around the attention, forward, each for both directions of a
fusion at once (program_id(1) picks one). `absorbed.py` has the formulas.

B rows go through a few linear layers, ROWS of them a program. LayerNorm and GELU are computed where a product
reads its operands. These kernels are short: they aim at few launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_dependent import wait
from .triton_buffers import (
    CLS,
    LOG2E,
    OUTPUT,
    PROJECTED,
    QUERY,
    ROWS,
    Y,
    Z,
    head_block,
    load,
    padded,
    part_columns,
    saved_rows,
    vector,
)
from .triton_rows import (
    head_tile,
    matrix,
    norm_gelu_linear,
    statistics,
    tile,
    transposed,
)


@triton.jit
def _project(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tile(d.width, BLOCK)
    in_batch = rows < batch
    c = norm_gelu_linear(
        d.own + rows.to(tl.int64) * d.own_batch, d.own_channel, (d.project_gamma, d.project_beta),
        (d.project_weight, d.project_stride, d.project_bias), in_batch, columns, eps,
        d.own_width, d.width, BLOCK, PRECISION,
    )  # fmt: skip
    out = saved_rows(d, rows) + CLS * padded(d.width) + columns[None, :]
    tl.store(out, c, mask=in_batch & (columns[None, :] < d.width))


@triton.jit
def _absorb(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = head_tile(d.heads)
    in_batch = rows < batch
    dtype = d.dtype
    head_width: tl.constexpr = d.width // d.heads
    saved = saved_rows(d, rows)
    x = saved + CLS * padded(d.width)
    mean, rstd = statistics(x, 1, in_batch, d.width, BLOCK, eps)
    j = tl.arange(0, head_block(head_width))
    channel = tl.where(j < head_width, head * head_width + j, d.width)  # width is out of bounds, and masked
    q = tl.zeros([ROWS, head_block(head_width)], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < d.width)[None, :]
        hat = (load(x, k[None, :], in_batch & inside) - mean) * rstd
        normed = hat * vector(d.gamma, k[None, :], inside) + vector(d.beta, k[None, :], inside)
        weight = transposed(d.wq, d.wq_stride, channel, k, d.width, d.width)
        q = tl.dot(normed.to(dtype), weight, q, input_precision=PRECISION)
    q += vector(d.bq, channel[None, :], channel[None, :] < d.width)
    valid = in_batch & (channel[None, :] < d.width)
    tl.store(saved + QUERY * padded(d.width) + channel[None, :], q, mask=valid)
    q = q.to(dtype)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        weight = matrix(d.wk, d.wk_stride, channel, k, d.width, d.width)
        key = tl.dot(q, weight, input_precision=PRECISION) * (LOG2E * d.score_scale)
        out = saved + (Z + d.heads + head) * padded(d.width) + k[None, :]
        tl.store(out, key, mask=in_batch & (k < d.width)[None, :])


@triton.jit
def _values(d, batch, splits, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = head_tile(d.heads)
    in_batch = rows < batch
    dtype = d.dtype
    head_width: tl.constexpr = d.width // d.heads
    saved = saved_rows(d, rows)
    z = saved + (Z + head) * padded(d.width)
    numbers = saved + (Z + 2 * d.heads) * padded(d.width) + head
    if d.parts is None:
        total = tl.load(numbers + padded(d.heads), mask=in_batch, other=0.0)
    else:
        # Merge what the programs of one image found: weights 2^(lse_i - lse), in a fixed order.
        part = d.parts + (rows.to(tl.int64) * splits * d.heads + head) * part_columns(d.width)
        step = d.heads * part_columns(d.width)
        largest = tl.full([ROWS, 1], float("-inf"), tl.float32)
        for i in range(splits):
            largest = tl.maximum(largest, load(part + i * step, padded(d.width), in_batch))
        weights = tl.zeros([ROWS, 1], tl.float32)
        total = tl.zeros([ROWS, 1], tl.float32)
        for i in range(splits):
            w = tl.exp2(load(part + i * step, padded(d.width), in_batch) - largest)
            weights += w
            total += w * load(part + i * step, padded(d.width) + 1, in_batch)
        total /= weights
        lse = largest + tl.log2(weights)
        tl.store(numbers, lse, mask=in_batch)
        tl.store(numbers + padded(d.heads), total, mask=in_batch)
    j = tl.arange(0, head_block(head_width))
    channel = tl.where(j < head_width, head * head_width + j, d.width)
    o = tl.zeros([ROWS, head_block(head_width)], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < d.width)[None, :]
        valid = in_batch & inside
        if d.parts is None:
            merged = load(z, k[None, :], valid)
        else:
            merged = tl.zeros([ROWS, BLOCK], tl.float32)
            for i in range(splits):
                w = tl.exp2(load(part + i * step, padded(d.width), in_batch) - lse)
                merged += w * load(part + i * step, k[None, :], valid)
            tl.store(z + k[None, :], merged, mask=valid)
        u = merged * vector(d.gamma, k[None, :], inside) + total * vector(d.beta, k[None, :], inside)
        weight = transposed(d.wv, d.wv_stride, channel, k, d.width, d.width)
        o = tl.dot(u.to(dtype), weight, o, input_precision=PRECISION)
    o += total * vector(d.bv, channel[None, :], channel[None, :] < d.width)
    out = saved + OUTPUT * padded(d.width) + channel[None, :]
    tl.store(out, o, mask=in_batch & (channel[None, :] < d.width))


@triton.jit
def _output(d, batch, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tile(d.width, BLOCK)
    in_batch = rows < batch
    saved = saved_rows(d, rows)
    projected = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        o = load(saved, OUTPUT * padded(d.width) + k[None, :], in_batch & (k < d.width)[None, :])
        weight = transposed(d.wo, d.wo_stride, columns, k, d.width, d.width)
        projected = tl.dot(o.to(weight.dtype), weight, projected, input_precision=PRECISION)
    valid = in_batch & (columns[None, :] < d.width)
    projected += vector(d.bo, columns[None, :], columns[None, :] < d.width)
    tl.store(saved + PROJECTED * padded(d.width) + columns[None, :], projected, mask=valid)
    y = projected
    if d.scale is not None:
        y *= load(d.scale + rows.to(tl.int64) * d.scale_batch, columns[None, :] * d.scale_channel, valid)
    y += load(saved, CLS * padded(d.width) + columns[None, :], valid)
    tl.store(saved + Y * padded(d.width) + columns[None, :], y, mask=valid)
    if d.back_weight is None:
        new = d.new + rows.to(tl.int64) * d.new_batch + columns[None, :] * d.new_channel
        tl.store(new, y.to(d.new.dtype.element_ty), mask=valid)


@triton.jit
def _back(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tile(d.own_width, BLOCK)
    in_batch = rows < batch
    y = norm_gelu_linear(
        saved_rows(d, rows) + Y * padded(d.width), 1, (d.back_gamma, d.back_beta),
        (d.back_weight, d.back_stride, d.back_bias), in_batch, columns, eps,
        d.width, d.own_width, BLOCK, PRECISION,
    )  # fmt: skip
    new = d.new + rows.to(tl.int64) * d.new_batch + columns[None, :] * d.new_channel
    tl.store(new, y.to(d.new.dtype.element_ty), mask=in_batch & (columns[None, :] < d.own_width))


@triton.jit(do_not_specialize=["batch"])
def project(
    a,
    b,
    batch,
    eps,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """c = f(CLS): B rows, own width to width. A program: ROWS images, BLOCK channels."""
    wait(DEPENDENT)
    if BOTH and tl.program_id(1) == 1:
        _project(b, batch, eps, BLOCK, PRECISION)
    else:
        _project(a, batch, eps, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def absorb(
    a,
    b,
    batch,
    eps,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """q_h = Wq_h LN(c) + bq_h and key_h = Wk_h^T q_h. A program: ROWS images, one head."""
    wait(DEPENDENT)
    if BOTH and tl.program_id(1) == 1:
        _absorb(b, batch, eps, BLOCK, PRECISION)
    else:
        _absorb(a, batch, eps, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch", "splits_a", "splits_b"])
def values(
    a,
    b,
    batch,
    splits_a,
    splits_b,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """o_h = Wv_h (gamma z_h + t beta) + t bv_h, z_h merged from its parts. A program: ROWS images, a head."""
    wait(DEPENDENT)
    if BOTH and tl.program_id(1) == 1:
        _values(b, batch, splits_b, BLOCK, PRECISION)
    else:
        _values(a, batch, splits_a, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def output(
    a,
    b,
    batch,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """y = c + scale (Wo o + bo). A program: ROWS images, BLOCK channels."""
    wait(DEPENDENT)
    if BOTH and tl.program_id(1) == 1:
        _output(b, batch, BLOCK, PRECISION)
    else:
        _output(a, batch, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def back(
    a,
    b,
    batch,
    eps,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The new CLS token g(y): B rows, width to own width. A program: ROWS images, BLOCK channels."""
    wait(DEPENDENT)
    if BOTH and tl.program_id(1) == 1:
        _back(b, batch, eps, BLOCK, PRECISION)
    else:
        _back(a, batch, eps, BLOCK, PRECISION)
