"""Triton kernels of the backward of `triton_chain.py`, in the order in which they run: from the new CLS token
to the attention, and from there to the old one. What gradients of parameters need is left in scratch memory
(`triton_parameters.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_buffers import (
    ACTIVATION,
    BACK_ACTIVATION,
    CLS,
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
    D_ROW,
    D_U,
    D_VALUE_BIAS,
    D_Y,
    LOG2E,
    NORMED,
    PER_HEAD,
    PROJECTED,
    ROWS,
    U,
    Y,
    Z,
    blocks,
    head_block,
    load,
    own_scratch_rows,
    padded,
    part_columns,
    saved_rows,
    scratch_rows,
    sum_of_products,
    vector,
)
from .triton_rows import (
    gelu,
    gelu_derivative,
    head_tile,
    matrix,
    norm_backward,
    norm_means,
    statistics,
    tile,
    transposed,
)


@triton.jit
def _activation_backward(
    d_activation, x, stride, norm, out, in_batch, columns, eps, width: tl.constexpr, BLOCK: tl.constexpr
):
    """From the gradient of GELU(LayerNorm(x)): stores that of the norm's output, its product with x^ and the
    activation itself at the three addresses `out`, [rows, columns] each."""
    mean, rstd = statistics(x, stride, in_batch, width, BLOCK, eps)
    valid = in_batch & (columns[None, :] < width)
    hat = (load(x, columns[None, :] * stride, valid) - mean) * rstd
    inside = (columns < width)[None, :]
    normed = hat * vector(norm[0], columns[None, :], inside) + vector(norm[1], columns[None, :], inside)
    d_norm = d_activation * gelu_derivative(normed)
    tl.store(out[0], d_norm, mask=valid)
    tl.store(out[1], d_norm * hat, mask=valid)
    tl.store(out[2], gelu(normed), mask=valid)


@triton.jit
def _back_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tile(d.width, BLOCK)
    in_batch = rows < batch
    scratch = scratch_rows(d, rows)
    kept = own_scratch_rows(d, rows) + D_NEW * padded(d.own_width)
    incoming = d.d_new + rows.to(tl.int64) * d.d_new_batch
    d_activation = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.own_width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = in_batch & (k < d.own_width)[None, :]
        g = load(incoming, k[None, :] * d.d_new_channel, valid)
        if tl.program_id(0) % blocks(d.width, BLOCK) == 0:
            tl.store(kept + k[None, :], g, mask=valid)
        weight = matrix(d.back_weight, d.back_stride, k, columns, d.own_width, d.width)
        d_activation = tl.dot(g.to(weight.dtype), weight, d_activation, input_precision=PRECISION)
    at = scratch + columns[None, :]
    out = (
        at + D_BACK_NORM * padded(d.width),
        at + D_BACK_GAMMA * padded(d.width),
        at + BACK_ACTIVATION * padded(d.width),
    )
    y = saved_rows(d, rows) + Y * padded(d.width)
    norm = (d.back_gamma, d.back_beta)
    _activation_backward(d_activation, y, 1, norm, out, in_batch, columns, eps, d.width, BLOCK)


@triton.jit
def _output_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tile(d.width, BLOCK)
    in_batch = rows < batch
    saved = saved_rows(d, rows)
    scratch = scratch_rows(d, rows)
    y = saved + Y * padded(d.width)
    if d.back_weight is not None:
        d_norm = scratch + D_BACK_NORM * padded(d.width)
        mean, rstd = statistics(y, 1, in_batch, d.width, BLOCK, eps)
        means = norm_means(d_norm, y, 1, d.back_gamma, mean, rstd, in_batch, d.width, BLOCK)
    d_output = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = in_batch & (k < d.width)[None, :]
        if d.back_weight is not None:
            d_y = norm_backward(d_norm, y, 1, d.back_gamma, mean, rstd, means, k[None, :], in_batch, d.width)
        else:
            d_y = load(d.d_new + rows.to(tl.int64) * d.d_new_batch, k[None, :] * d.d_new_channel, valid)
        d_projected = d_y
        if d.scale is not None:
            scale = d.scale + rows.to(tl.int64) * d.scale_batch + k[None, :] * d.scale_channel
            d_projected = d_y * load(scale, 0, valid)
        if tl.program_id(0) % blocks(d.width, BLOCK) == 0:
            tl.store(scratch + D_Y * padded(d.width) + k[None, :], d_y, mask=valid)
            tl.store(scratch + D_PROJECTED * padded(d.width) + k[None, :], d_projected, mask=valid)
            if d.d_scale is not None:
                projected = load(saved, PROJECTED * padded(d.width) + k[None, :], valid)
                tl.store(d.d_scale + rows.to(tl.int64) * d.width + k[None, :], d_y * projected, mask=valid)
        weight = matrix(d.wo, d.wo_stride, k, columns, d.width, d.width)
        d_output = tl.dot(d_projected.to(weight.dtype), weight, d_output, input_precision=PRECISION)
    out = scratch + D_OUTPUT * padded(d.width) + columns[None, :]
    tl.store(out, d_output, mask=in_batch & (columns[None, :] < d.width))


@triton.jit
def _values_backward(d, batch, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = head_tile(d.heads)
    in_batch = rows < batch
    head_width: tl.constexpr = d.width // d.heads
    saved = saved_rows(d, rows)
    scratch = scratch_rows(d, rows)
    sums = load(saved + (Z + 2 * d.heads) * padded(d.width) + padded(d.heads), head, in_batch)
    j = tl.arange(0, head_block(head_width))
    channel = tl.where(j < head_width, head * head_width + j, d.width)
    own = in_batch & (channel[None, :] < d.width)
    d_output = load(scratch, D_OUTPUT * padded(d.width) + channel[None, :], own)
    tl.store(scratch + D_VALUE_BIAS * padded(d.width) + channel[None, :], d_output * sums, mask=own)
    bias = vector(d.bv, channel[None, :], channel[None, :] < d.width)
    d_sum = sum_of_products(d_output, bias, 1)[:, None]
    against = tl.zeros([ROWS, 1], tl.float32)
    d_output = d_output.to(d.dtype)
    heads = scratch + D_U * padded(d.width)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < d.width)[None, :]
        valid = in_batch & inside
        weight = matrix(d.wv, d.wv_stride, channel, k, d.width, d.width)
        d_u = tl.dot(d_output, weight, input_precision=PRECISION)
        z = load(saved, (Z + head) * padded(d.width) + k[None, :], valid)
        gamma = vector(d.gamma, k[None, :], inside)
        beta = vector(d.beta, k[None, :], inside)
        # With dz as the tensor cores of attend_backward see it, so that the sum over the tokens cancels.
        d_z = (d_u * gamma).to(d.dtype).to(tl.float32)
        against += sum_of_products(d_z, z, 1)[:, None]
        d_sum += sum_of_products(d_u, beta, 1)[:, None]
        at = heads + head * padded(d.width) + k[None, :]
        step = d.heads * padded(d.width)
        tl.store(at, d_u, mask=valid)
        tl.store(at + U * step, gamma * z + sums * beta, mask=valid)
        tl.store(at + D_GAMMA_PART * step, d_u * z, mask=valid)
        tl.store(at + D_BETA_PART * step, d_u * sums, mask=valid)
    numbers = heads + PER_HEAD * d.heads * padded(d.width) + head
    # The sum of the attention is 1 unless some of it is dropped.
    if d.seed is None:
        d_sum = tl.zeros_like(d_sum)
    tl.store(numbers, against + d_sum * sums, mask=in_batch)
    tl.store(numbers + padded(d.heads), d_sum, mask=in_batch)


@triton.jit(do_not_specialize=["batch"])
def back_backward(a, b, batch, eps, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """From the new CLS token to the LayerNorm of g. A program: ROWS images, BLOCK channels."""
    if BOTH and tl.program_id(1) == 1:
        _back_backward(b, batch, eps, BLOCK, PRECISION)
    else:
        _back_backward(a, batch, eps, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def output_backward(a, b, batch, eps, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """dy, through the LayerNorm of g, and do = Wo^T (scale dy). A program: ROWS images, BLOCK channels."""
    if BOTH and tl.program_id(1) == 1:
        _output_backward(b, batch, eps, BLOCK, PRECISION)
    else:
        _output_backward(a, batch, eps, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def values_backward(a, b, batch, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """du_h = Wv_h^T do_h, and what the softmax's gradient subtracts. A program: ROWS images, one head."""
    if BOTH and tl.program_id(1) == 1:
        _values_backward(b, batch, BLOCK, PRECISION)
    else:
        _values_backward(a, batch, BLOCK, PRECISION)


@triton.jit
def _absorb_backward(d, batch, splits, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = head_tile(d.heads)
    in_batch = rows < batch
    head_width: tl.constexpr = d.width // d.heads
    dtype = d.dtype
    scratch = scratch_rows(d, rows)
    saved = saved_rows(d, rows)
    z = saved + (Z + head) * padded(d.width)
    key = saved + (Z + d.heads + head) * padded(d.width)
    part = d.parts + (rows.to(tl.int64) * splits * d.heads + head) * part_columns(d.width)
    next_part = d.heads * part_columns(d.width)
    step = d.heads * padded(d.width)
    at = scratch + (D_U + head) * padded(d.width)
    # But for rounding, ds sums to zero over the tokens. What is left multiplies all that the tokens have in
    # common, so it is taken off with z, their mean under the attention.
    shift = tl.zeros([ROWS, 1], tl.float32)
    excess = tl.zeros([ROWS, 1], tl.float32)
    for i in range(splits):
        shift += load(part + i * next_part, padded(d.width), in_batch)
        excess += load(part + i * next_part, padded(d.width) + 1, in_batch)
    sums = load(saved + (Z + 2 * d.heads) * padded(d.width) + padded(d.heads), head, in_batch)
    excess = tl.where(sums > 0, excess / sums, 0.0)
    j = tl.arange(0, head_block(head_width))
    channel = tl.where(j < head_width, head * head_width + j, d.width)
    d_query = tl.zeros([ROWS, head_block(head_width)], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < d.width)[None, :]
        valid = in_batch & inside
        d_absorbed = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in range(splits):
            d_absorbed += load(part + i * next_part, k[None, :], valid)
        d_absorbed -= shift + excess * load(z, k[None, :], valid)
        d_gamma = load(at, D_GAMMA_PART * step + k[None, :], valid)
        d_gamma += d_absorbed * load(key, k[None, :], valid)
        tl.store(at + D_GAMMA_PART * step + k[None, :], d_gamma, mask=valid)
        d_key = d_absorbed * vector(d.gamma, k[None, :], inside) * (LOG2E * d.score_scale)
        tl.store(at + D_KEY * step + k[None, :], d_key, mask=valid)
        weight = transposed(d.wk, d.wk_stride, channel, k, d.width, d.width)
        d_query = tl.dot(d_key.to(dtype), weight, d_query, input_precision=PRECISION)
    out = scratch + D_QUERY * padded(d.width) + channel[None, :]
    tl.store(out, d_query, mask=in_batch & (channel[None, :] < d.width))


@triton.jit
def _query_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tile(d.width, BLOCK)
    in_batch = rows < batch
    scratch = scratch_rows(d, rows)
    x = saved_rows(d, rows) + CLS * padded(d.width)
    mean, rstd = statistics(x, 1, in_batch, d.width, BLOCK, eps)
    d_norm = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        d_query = load(scratch, D_QUERY * padded(d.width) + k[None, :], in_batch & (k < d.width)[None, :])
        weight = matrix(d.wq, d.wq_stride, k, columns, d.width, d.width)
        d_norm = tl.dot(d_query.to(weight.dtype), weight, d_norm, input_precision=PRECISION)
    inside = (columns < d.width)[None, :]
    valid = in_batch & inside
    hat = (load(x, columns[None, :], valid) - mean) * rstd
    normed = hat * vector(d.gamma, columns[None, :], inside) + vector(d.beta, columns[None, :], inside)
    at = scratch + columns[None, :]
    tl.store(at + NORMED * padded(d.width), normed, mask=valid)
    tl.store(at + D_NORM * padded(d.width), d_norm, mask=valid)
    tl.store(at + D_GAMMA * padded(d.width), d_norm * hat, mask=valid)


@triton.jit
def _d_cls(d, scratch, x, mean, rstd, means, k, in_batch):
    """Columns k of the gradient of c: through the residual, as a row of the attention, and as its query."""
    width: tl.constexpr = padded(d.width)
    valid = in_batch & (k < d.width)
    through = norm_backward(scratch + D_NORM * width, x, 1, d.gamma, mean, rstd, means, k, in_batch, d.width)
    return load(scratch, D_Y * width + k, valid) + load(scratch, D_ROW * width + k, valid) + through


@triton.jit
def _project_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tile(d.own_width, BLOCK)
    in_batch = rows < batch
    scratch = scratch_rows(d, rows)
    x = saved_rows(d, rows) + CLS * padded(d.width)
    mean, rstd = statistics(x, 1, in_batch, d.width, BLOCK, eps)
    means = norm_means(
        scratch + D_NORM * padded(d.width), x, 1, d.gamma, mean, rstd, in_batch, d.width, BLOCK
    )
    d_activation = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = in_batch & (k < d.width)[None, :]
        d_cls = _d_cls(d, scratch, x, mean, rstd, means, k[None, :], in_batch)
        if tl.program_id(0) % blocks(d.own_width, BLOCK) == 0:
            tl.store(scratch + D_CLS * padded(d.width) + k[None, :], d_cls, mask=valid)
        weight = matrix(d.project_weight, d.project_stride, k, columns, d.width, d.own_width)
        d_activation = tl.dot(d_cls.to(weight.dtype), weight, d_activation, input_precision=PRECISION)
    at = own_scratch_rows(d, rows) + columns[None, :]
    out = (
        at + D_PROJECT_NORM * padded(d.own_width),
        at + D_PROJECT_GAMMA * padded(d.own_width),
        at + ACTIVATION * padded(d.own_width),
    )
    own = d.own + rows.to(tl.int64) * d.own_batch
    norm = (d.project_gamma, d.project_beta)
    _activation_backward(
        d_activation, own, d.own_channel, norm, out, in_batch, columns, eps, d.own_width, BLOCK
    )


@triton.jit
def _cls_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = rows < batch
    scratch = scratch_rows(d, rows)
    if d.project_weight is not None:
        x = d.own + rows.to(tl.int64) * d.own_batch
        gamma = d.project_gamma
        stride = d.own_channel
        d_norm = own_scratch_rows(d, rows) + D_PROJECT_NORM * padded(d.own_width)
    else:
        x = saved_rows(d, rows) + CLS * padded(d.width)
        gamma = d.gamma
        stride = 1
        d_norm = scratch + D_NORM * padded(d.width)
    mean, rstd = statistics(x, stride, in_batch, d.own_width, BLOCK, eps)
    means = norm_means(d_norm, x, stride, gamma, mean, rstd, in_batch, d.own_width, BLOCK)
    for start in range(0, d.own_width, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        valid = in_batch & (k < d.own_width)
        if d.project_weight is not None:
            value = norm_backward(d_norm, x, stride, gamma, mean, rstd, means, k, in_batch, d.own_width)
        else:
            value = _d_cls(d, scratch, x, mean, rstd, means, k, in_batch)
        out = d.d_cls + rows.to(tl.int64) * d.d_cls_batch + k * d.d_cls_channel
        tl.store(out, value.to(d.d_cls.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["batch", "splits_a", "splits_b"])
def absorb_backward(
    a, b, batch, splits_a, splits_b, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """dq_h = Wk_h dkey_h, from the parts of the queries' gradients. A program: ROWS images, one head."""
    if BOTH and tl.program_id(1) == 1:
        _absorb_backward(b, batch, splits_b, BLOCK, PRECISION)
    else:
        _absorb_backward(a, batch, splits_a, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def query_backward(a, b, batch, eps, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of LN(c) through the query, Wq^T dq. A program: ROWS images, BLOCK channels."""
    if BOTH and tl.program_id(1) == 1:
        _query_backward(b, batch, eps, BLOCK, PRECISION)
    else:
        _query_backward(a, batch, eps, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def project_backward(a, b, batch, eps, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """dc and, through f, the gradient of its LayerNorm's output. A program: ROWS images, BLOCK channels."""
    if BOTH and tl.program_id(1) == 1:
        _project_backward(b, batch, eps, BLOCK, PRECISION)
    else:
        _project_backward(a, batch, eps, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def cls_backward(a, b, batch, eps, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of the CLS token itself. A program: ROWS images."""
    if BOTH and tl.program_id(1) == 1:
        _cls_backward(b, batch, eps, BLOCK, PRECISION)
    else:
        _cls_backward(a, batch, eps, BLOCK, PRECISION)
