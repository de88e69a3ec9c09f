"""The Triton kernel of the gradients of all parameters: products and sums over the batch, in a fixed order
and without atomics. One launch; a program has a tile of one parameter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_buffers import (
    ACTIVATION,
    BACK_ACTIVATION,
    D_BACK_GAMMA,
    D_BACK_NORM,
    D_BETA_PART,
    D_CLS,
    D_GAMMA,
    D_GAMMA_PART,
    D_KEY,
    D_NEW,
    D_NORM,
    D_OUTPUT,
    D_PROJECT_GAMMA,
    D_PROJECT_NORM,
    D_PROJECTED,
    D_QUERY,
    D_U,
    D_VALUE_BIAS,
    NORMED,
    OUTPUT,
    PER_HEAD,
    QUERY,
    ROWS,
    U,
    blocks,
    load,
    padded,
    saved_columns,
    scratch_columns,
)


@triton.jit
def _product(
    left, LEFT: tl.constexpr, right, RIGHT: tl.constexpr, out, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, HEAD_STEP: tl.constexpr, batch, dtype: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores a tile of out [HEIGHT, WIDTH] = sum_b left_b^T right_b.

    LEFT and RIGHT are the distances of two images. Where the rows of `out` belong to heads, each head has
    columns of its own in `right`, HEAD_STEP apart.
    """
    height: tl.constexpr = HEIGHT // HEADS
    tiles: tl.constexpr = blocks(height, ROWS)
    down = tl.program_id(0) // blocks(WIDTH, BLOCK)
    head = down // tiles
    if head < HEADS:
        j = down % tiles * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) % blocks(WIDTH, BLOCK) * BLOCK + tl.arange(0, BLOCK)
        row = head * height + j
        inside = column < WIDTH
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, batch, BLOCK):
            b = start + tl.arange(0, BLOCK)
            image = b.to(tl.int64)[:, None]
            in_batch = (b < batch)[:, None]
            x = load(left, image * LEFT + row[None, :], in_batch & (j < height)[None, :])
            y = load(right, image * RIGHT + head * HEAD_STEP + column[None, :], in_batch & inside[None, :])
            total = tl.dot(tl.trans(x).to(dtype), y.to(dtype), total, input_precision=PRECISION)
        address = out + row[:, None].to(tl.int64) * WIDTH + column[None, :]
        tl.store(address, total.to(out.dtype.element_ty), mask=(j < height)[:, None] & inside[None, :])


@triton.jit
def _sum(
    x, STEP: tl.constexpr, out, parts, HEADS: tl.constexpr, HEAD_STEP: tl.constexpr, WIDTH: tl.constexpr,
    batch, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a block of out [WIDTH] = sum_b x_b plus, over the heads, that of their parts."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < WIDTH)[None, :]
    if tl.program_id(0) * BLOCK < WIDTH:
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, batch, ROWS):
            b = (start + tl.arange(0, ROWS))[:, None]
            valid = (b < batch) & inside
            offsets = b.to(tl.int64) * STEP + column[None, :]
            total += load(x, offsets, valid)
            for head in range(HEADS):
                total += load(parts, offsets + head * HEAD_STEP, valid)
        tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < WIDTH)


# Of `parameters_backward`, without f and g and with them.
JOBS = tl.constexpr(9)
JOBS_OF_FUSION = tl.constexpr(17)


@triton.jit
def _parameters_backward(d, job, batch, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    width: tl.constexpr = padded(d.width)
    own_width: tl.constexpr = padded(d.own_width)
    kept: tl.constexpr = saved_columns(d.width, d.heads)
    step: tl.constexpr = scratch_columns(d.width, d.own_width, d.heads)
    dtype: tl.constexpr = d.dtype
    C: tl.constexpr = d.width
    OWN: tl.constexpr = d.own_width
    H: tl.constexpr = d.heads
    own = d.scratch + (D_U + PER_HEAD * H) * width + 2 * padded(H)
    heads = d.scratch + D_U * width
    s = d.scratch
    if job == 0:
        left, right = s + D_QUERY * width, s + NORMED * width
        _product(left, step, right, step, d.d_wq, C, C, 1, 0, batch, dtype, BLOCK, PRECISION)
    elif job == 1:
        left, right = d.saved + QUERY * width, heads + D_KEY * H * width
        _product(left, kept, right, step, d.d_wk, C, C, H, width, batch, dtype, BLOCK, PRECISION)
    elif job == 2:
        left, right = s + D_OUTPUT * width, heads + U * H * width
        _product(left, step, right, step, d.d_wv, C, C, H, width, batch, dtype, BLOCK, PRECISION)
    elif job == 3:
        left, right = s + D_PROJECTED * width, d.saved + OUTPUT * width
        _product(left, step, right, kept, d.d_wo, C, C, 1, 0, batch, dtype, BLOCK, PRECISION)
    elif job == 4:
        parts = heads + D_GAMMA_PART * H * width
        _sum(s + D_GAMMA * width, step, d.d_gamma, parts, H, width, C, batch, BLOCK)
    elif job == 5:
        if d.d_beta is not None:
            parts = heads + D_BETA_PART * H * width
            _sum(s + D_NORM * width, step, d.d_beta, parts, H, width, C, batch, BLOCK)
    elif job == 6:
        if d.d_bq is not None:
            _sum(s + D_QUERY * width, step, d.d_bq, s, 0, 0, C, batch, BLOCK)
    elif job == 7:
        if d.d_bv is not None:
            _sum(s + D_VALUE_BIAS * width, step, d.d_bv, s, 0, 0, C, batch, BLOCK)
    elif job == 8 and d.d_bo is not None:
        _sum(s + D_PROJECTED * width, step, d.d_bo, s, 0, 0, C, batch, BLOCK)
    if d.d_project_weight is not None:
        if job == 9:
            out, left, right = d.d_project_weight, s + D_CLS * width, own + ACTIVATION * own_width
            _product(left, step, right, step, out, C, OWN, 1, 0, batch, dtype, BLOCK, PRECISION)
        elif job == 10:
            out, left, right = d.d_back_weight, own + D_NEW * own_width, s + BACK_ACTIVATION * width
            _product(left, step, right, step, out, OWN, C, 1, 0, batch, dtype, BLOCK, PRECISION)
        elif job == 11:
            _sum(own + D_PROJECT_GAMMA * own_width, step, d.d_project_gamma, s, 0, 0, OWN, batch, BLOCK)
        elif job == 12:
            if d.d_project_beta is not None:
                _sum(own + D_PROJECT_NORM * own_width, step, d.d_project_beta, s, 0, 0, OWN, batch, BLOCK)
        elif job == 13:
            if d.d_project_bias is not None:
                _sum(s + D_CLS * width, step, d.d_project_bias, s, 0, 0, C, batch, BLOCK)
        elif job == 14:
            _sum(s + D_BACK_GAMMA * width, step, d.d_back_gamma, s, 0, 0, C, batch, BLOCK)
        elif job == 15:
            if d.d_back_beta is not None:
                _sum(s + D_BACK_NORM * width, step, d.d_back_beta, s, 0, 0, C, batch, BLOCK)
        elif job == 16 and d.d_back_bias is not None:
            _sum(own + D_NEW * own_width, step, d.d_back_bias, s, 0, 0, OWN, batch, BLOCK)


@triton.jit(do_not_specialize=["batch"])
def parameters_backward(
    a, b, batch, JOBS: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradients of all weights: products and sums over the batch. A program: a tile of one parameter."""
    if BOTH and tl.program_id(1) >= JOBS:
        _parameters_backward(b, tl.program_id(1) - JOBS, batch, BLOCK, PRECISION)
    else:
        _parameters_backward(a, tl.program_id(1), batch, BLOCK, PRECISION)
