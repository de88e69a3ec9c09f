"""Triton kernels of the chain of the CLS token around the attention, forward and backward, each for both
directions of a fusion at once (program_id(1) picks one). `absorbed.py` has the formulas.

B rows go through a few linear layers, ROWS of them a program. LayerNorm, GELU and their derivatives are
computed where a product reads or writes its operands. These kernels are short: they aim at few launches.
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
    OUTPUT,
    PER_HEAD,
    PROJECTED,
    QUERY,
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
    saved_columns,
    saved_rows,
    scratch_columns,
    scratch_rows,
    sum_of_products,
    vector,
)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_derivative(x):
    density = 0.3989422804014327 * tl.exp2(-0.5 * LOG2E * x * x)
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def _statistics(x, stride, in_batch, width: tl.constexpr, BLOCK: tl.constexpr, eps):
    """Mean and 1 / sqrt(variance + eps) of the rows at x, both [rows, 1]; in two passes."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        total += load(x, k * stride, in_batch & (k < width))
    mean = tl.sum(total, 1, keep_dims=True) / width
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        valid = in_batch & (k < width)
        centred = tl.where(valid, load(x, k * stride, valid) - mean, 0.0)
        squares = tl.fma(centred, centred, squares)
    return mean, tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / width + eps)


@triton.jit
def _norm_means(d_norm, x, stride, gamma, mean, rstd, in_batch, width: tl.constexpr, BLOCK: tl.constexpr):
    """Means over the channels of gamma dn and of gamma dn x^, both [rows, 1]."""
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    against = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        valid = in_batch & (k < width)
        g = load(d_norm, k, valid) * vector(gamma, k, k < width)
        plain += g
        against = tl.fma(g, (load(x, k * stride, valid) - mean) * rstd, against)
    return tl.sum(plain, 1, keep_dims=True) / width, tl.sum(against, 1, keep_dims=True) / width


@triton.jit
def _norm_backward(d_norm, x, stride, gamma, mean, rstd, means, k, in_batch, width: tl.constexpr):
    """Columns k of the gradient of x, from that of LayerNorm's output: r (g - mean(g) - x^ mean(g x^))."""
    valid = in_batch & (k < width)
    g = load(d_norm, k, valid) * vector(gamma, k, k < width)
    hat = (load(x, k * stride, valid) - mean) * rstd
    return tl.where(valid, rstd * (g - means[0] - hat * means[1]), 0.0)


@triton.jit
def _norm_gelu_linear(
    x, stride, norm, linear, in_batch, columns, eps,
    width: tl.constexpr, out: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of Linear(GELU(LayerNorm(x))). `norm` is (gamma, beta), `linear` is (weight, stride, bias)."""
    mean, rstd = _statistics(x, stride, in_batch, width, BLOCK, eps)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < width)[None, :]
        hat = (load(x, k[None, :] * stride, in_batch & inside) - mean) * rstd
        normed = hat * vector(norm[0], k[None, :], inside) + vector(norm[1], k[None, :], inside)
        weight = _transposed(linear[0], linear[1], columns, k, out, width)
        total = tl.dot(_gelu(normed).to(weight.dtype), weight, total, input_precision=PRECISION)
    return total + vector(linear[2], columns[None, :], columns[None, :] < out)


@triton.jit
def _transposed(weight, stride, rows, columns, out: tl.constexpr, width: tl.constexpr):
    """W^T [columns, rows] of a weight [out, width]."""
    valid = (columns[:, None] < width) & (rows[None, :] < out)
    return tl.load(weight + rows[None, :].to(tl.int64) * stride + columns[:, None], mask=valid, other=0.0)


@triton.jit
def _matrix(weight, stride, rows, columns, out: tl.constexpr, width: tl.constexpr):
    """W [rows, columns] of a weight [out, width]."""
    valid = (rows[:, None] < out) & (columns[None, :] < width)
    return tl.load(weight + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=valid, other=0.0)


@triton.jit
def _tile(width: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] and columns [BLOCK] of this program's tile of a result [batch, width]."""
    tiles = blocks(width, BLOCK)
    rows = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    return rows[:, None], tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _head_tile(heads: tl.constexpr):
    """Rows [ROWS, 1] and the head of this program."""
    rows = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    return rows[:, None], tl.program_id(0) % heads


@triton.jit
def _project(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.width, BLOCK)
    in_batch = rows < batch
    c = _norm_gelu_linear(
        d.own + rows.to(tl.int64) * d.own_batch, d.own_channel, (d.project_gamma, d.project_beta),
        (d.project_weight, d.project_stride, d.project_bias), in_batch, columns, eps,
        d.own_width, d.width, BLOCK, PRECISION,
    )  # fmt: skip
    out = saved_rows(d, rows) + CLS * padded(d.width) + columns[None, :]
    tl.store(out, c, mask=in_batch & (columns[None, :] < d.width))


@triton.jit
def _absorb(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = _head_tile(d.heads)
    in_batch = rows < batch
    dtype = d.dtype
    head_width: tl.constexpr = d.width // d.heads
    saved = saved_rows(d, rows)
    x = saved + CLS * padded(d.width)
    mean, rstd = _statistics(x, 1, in_batch, d.width, BLOCK, eps)
    j = tl.arange(0, head_block(head_width))
    channel = tl.where(j < head_width, head * head_width + j, d.width)  # width is out of bounds, and masked
    q = tl.zeros([ROWS, head_block(head_width)], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < d.width)[None, :]
        hat = (load(x, k[None, :], in_batch & inside) - mean) * rstd
        normed = hat * vector(d.gamma, k[None, :], inside) + vector(d.beta, k[None, :], inside)
        weight = _transposed(d.wq, d.wq_stride, channel, k, d.width, d.width)
        q = tl.dot(normed.to(dtype), weight, q, input_precision=PRECISION)
    q += vector(d.bq, channel[None, :], channel[None, :] < d.width)
    valid = in_batch & (channel[None, :] < d.width)
    tl.store(saved + QUERY * padded(d.width) + channel[None, :], q, mask=valid)
    q = q.to(dtype)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        weight = _matrix(d.wk, d.wk_stride, channel, k, d.width, d.width)
        key = tl.dot(q, weight, input_precision=PRECISION) * (LOG2E * d.score_scale)
        out = saved + (Z + d.heads + head) * padded(d.width) + k[None, :]
        tl.store(out, key, mask=in_batch & (k < d.width)[None, :])


@triton.jit
def _values(d, batch, splits, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = _head_tile(d.heads)
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
        weight = _transposed(d.wv, d.wv_stride, channel, k, d.width, d.width)
        o = tl.dot(u.to(dtype), weight, o, input_precision=PRECISION)
    o += total * vector(d.bv, channel[None, :], channel[None, :] < d.width)
    out = saved + OUTPUT * padded(d.width) + channel[None, :]
    tl.store(out, o, mask=in_batch & (channel[None, :] < d.width))


@triton.jit
def _output(d, batch, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.width, BLOCK)
    in_batch = rows < batch
    saved = saved_rows(d, rows)
    projected = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        o = load(saved, OUTPUT * padded(d.width) + k[None, :], in_batch & (k < d.width)[None, :])
        weight = _transposed(d.wo, d.wo_stride, columns, k, d.width, d.width)
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
    rows, columns = _tile(d.own_width, BLOCK)
    in_batch = rows < batch
    y = _norm_gelu_linear(
        saved_rows(d, rows) + Y * padded(d.width), 1, (d.back_gamma, d.back_beta),
        (d.back_weight, d.back_stride, d.back_bias), in_batch, columns, eps,
        d.width, d.own_width, BLOCK, PRECISION,
    )  # fmt: skip
    new = d.new + rows.to(tl.int64) * d.new_batch + columns[None, :] * d.new_channel
    tl.store(new, y.to(d.new.dtype.element_ty), mask=in_batch & (columns[None, :] < d.own_width))


@triton.jit(do_not_specialize=["batch"])
def project(a, b, batch, eps, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """c = f(CLS): B rows, own width to width. A program: ROWS images, BLOCK channels."""
    if BOTH and tl.program_id(1) == 1:
        _project(b, batch, eps, BLOCK, PRECISION)
    else:
        _project(a, batch, eps, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def absorb(a, b, batch, eps, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """q_h = Wq_h LN(c) + bq_h and key_h = Wk_h^T q_h. A program: ROWS images, one head."""
    if BOTH and tl.program_id(1) == 1:
        _absorb(b, batch, eps, BLOCK, PRECISION)
    else:
        _absorb(a, batch, eps, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch", "splits_a", "splits_b"])
def values(a, b, batch, splits_a, splits_b, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """o_h = Wv_h (gamma z_h + t beta) + t bv_h, z_h merged from its parts. A program: ROWS images, a head."""
    if BOTH and tl.program_id(1) == 1:
        _values(b, batch, splits_b, BLOCK, PRECISION)
    else:
        _values(a, batch, splits_a, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def output(a, b, batch, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """y = c + scale (Wo o + bo). A program: ROWS images, BLOCK channels."""
    if BOTH and tl.program_id(1) == 1:
        _output(b, batch, BLOCK, PRECISION)
    else:
        _output(a, batch, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["batch"])
def back(a, b, batch, eps, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """The new CLS token g(y): B rows, width to own width. A program: ROWS images, BLOCK channels."""
    if BOTH and tl.program_id(1) == 1:
        _back(b, batch, eps, BLOCK, PRECISION)
    else:
        _back(a, batch, eps, BLOCK, PRECISION)


# Backward: the chain from the new CLS token to the attention


@triton.jit
def _activation_backward(
    d_activation, x, stride, norm, out, in_batch, columns, eps, width: tl.constexpr, BLOCK: tl.constexpr
):
    """From the gradient of GELU(LayerNorm(x)): stores that of the norm's output, its product with x^ and the
    activation itself at the three addresses `out`, [rows, columns] each."""
    mean, rstd = _statistics(x, stride, in_batch, width, BLOCK, eps)
    valid = in_batch & (columns[None, :] < width)
    hat = (load(x, columns[None, :] * stride, valid) - mean) * rstd
    inside = (columns < width)[None, :]
    normed = hat * vector(norm[0], columns[None, :], inside) + vector(norm[1], columns[None, :], inside)
    d_norm = d_activation * _gelu_derivative(normed)
    tl.store(out[0], d_norm, mask=valid)
    tl.store(out[1], d_norm * hat, mask=valid)
    tl.store(out[2], _gelu(normed), mask=valid)


@triton.jit
def _back_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.width, BLOCK)
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
        weight = _matrix(d.back_weight, d.back_stride, k, columns, d.own_width, d.width)
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
    rows, columns = _tile(d.width, BLOCK)
    in_batch = rows < batch
    saved = saved_rows(d, rows)
    scratch = scratch_rows(d, rows)
    y = saved + Y * padded(d.width)
    if d.back_weight is not None:
        d_norm = scratch + D_BACK_NORM * padded(d.width)
        mean, rstd = _statistics(y, 1, in_batch, d.width, BLOCK, eps)
        means = _norm_means(d_norm, y, 1, d.back_gamma, mean, rstd, in_batch, d.width, BLOCK)
    d_output = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = in_batch & (k < d.width)[None, :]
        if d.back_weight is not None:
            d_y = _norm_backward(d_norm, y, 1, d.back_gamma, mean, rstd, means, k[None, :], in_batch, d.width)
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
        weight = _matrix(d.wo, d.wo_stride, k, columns, d.width, d.width)
        d_output = tl.dot(d_projected.to(weight.dtype), weight, d_output, input_precision=PRECISION)
    out = scratch + D_OUTPUT * padded(d.width) + columns[None, :]
    tl.store(out, d_output, mask=in_batch & (columns[None, :] < d.width))


@triton.jit
def _values_backward(d, batch, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = _head_tile(d.heads)
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
        weight = _matrix(d.wv, d.wv_stride, channel, k, d.width, d.width)
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


# Backward: the chain from the attention to the old CLS token


@triton.jit
def _absorb_backward(d, batch, splits, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = _head_tile(d.heads)
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
        weight = _transposed(d.wk, d.wk_stride, channel, k, d.width, d.width)
        d_query = tl.dot(d_key.to(dtype), weight, d_query, input_precision=PRECISION)
    out = scratch + D_QUERY * padded(d.width) + channel[None, :]
    tl.store(out, d_query, mask=in_batch & (channel[None, :] < d.width))


@triton.jit
def _query_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.width, BLOCK)
    in_batch = rows < batch
    scratch = scratch_rows(d, rows)
    x = saved_rows(d, rows) + CLS * padded(d.width)
    mean, rstd = _statistics(x, 1, in_batch, d.width, BLOCK, eps)
    d_norm = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        d_query = load(scratch, D_QUERY * padded(d.width) + k[None, :], in_batch & (k < d.width)[None, :])
        weight = _matrix(d.wq, d.wq_stride, k, columns, d.width, d.width)
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
    through = _norm_backward(scratch + D_NORM * width, x, 1, d.gamma, mean, rstd, means, k, in_batch, d.width)
    return load(scratch, D_Y * width + k, valid) + load(scratch, D_ROW * width + k, valid) + through


@triton.jit
def _project_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.own_width, BLOCK)
    in_batch = rows < batch
    scratch = scratch_rows(d, rows)
    x = saved_rows(d, rows) + CLS * padded(d.width)
    mean, rstd = _statistics(x, 1, in_batch, d.width, BLOCK, eps)
    means = _norm_means(
        scratch + D_NORM * padded(d.width), x, 1, d.gamma, mean, rstd, in_batch, d.width, BLOCK
    )
    d_activation = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = in_batch & (k < d.width)[None, :]
        d_cls = _d_cls(d, scratch, x, mean, rstd, means, k[None, :], in_batch)
        if tl.program_id(0) % blocks(d.own_width, BLOCK) == 0:
            tl.store(scratch + D_CLS * padded(d.width) + k[None, :], d_cls, mask=valid)
        weight = _matrix(d.project_weight, d.project_stride, k, columns, d.width, d.own_width)
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
    mean, rstd = _statistics(x, stride, in_batch, d.own_width, BLOCK, eps)
    means = _norm_means(d_norm, x, stride, gamma, mean, rstd, in_batch, d.own_width, BLOCK)
    for start in range(0, d.own_width, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        valid = in_batch & (k < d.own_width)
        if d.project_weight is not None:
            value = _norm_backward(d_norm, x, stride, gamma, mean, rstd, means, k, in_batch, d.own_width)
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


# Backward: the parameters


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
    x,
    STEP: tl.constexpr,
    out,
    parts,
    HEADS: tl.constexpr,
    HEAD_STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    batch,
    BLOCK: tl.constexpr,
):
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
    H: tl.constexpr = d.heads
    own = d.scratch + (D_U + PER_HEAD * H) * width + 2 * padded(H)
    heads = d.scratch + D_U * width
    s = d.scratch
    if job == 0:
        _product(
            s + D_QUERY * width,
            step,
            s + NORMED * width,
            step,
            d.d_wq,
            C,
            C,
            1,
            0,
            batch,
            dtype,
            BLOCK,
            PRECISION,
        )
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
        _sum(
            s + D_GAMMA * width, step, d.d_gamma, heads + D_GAMMA_PART * H * width, H, width, C, batch, BLOCK
        )
    elif job == 5:
        if d.d_beta is not None:
            _sum(
                s + D_NORM * width, step, d.d_beta, heads + D_BETA_PART * H * width, H, width, C, batch, BLOCK
            )
    elif job == 6:
        if d.d_bq is not None:
            _sum(s + D_QUERY * width, step, d.d_bq, s, 0, 0, C, batch, BLOCK)
    elif job == 7:
        if d.d_bv is not None:
            _sum(s + D_VALUE_BIAS * width, step, d.d_bv, s, 0, 0, C, batch, BLOCK)
    elif job == 8 and d.d_bo is not None:
        _sum(s + D_PROJECTED * width, step, d.d_bo, s, 0, 0, C, batch, BLOCK)
    if d.d_project_weight is not None:
        own_channels: tl.constexpr = d.own_width
        if job == 9:
            left, right = s + D_CLS * width, own + ACTIVATION * own_width
            _product(
                left,
                step,
                right,
                step,
                d.d_project_weight,
                C,
                own_channels,
                1,
                0,
                batch,
                dtype,
                BLOCK,
                PRECISION,
            )
        elif job == 10:
            left, right = own + D_NEW * own_width, s + BACK_ACTIVATION * width
            _product(
                left,
                step,
                right,
                step,
                d.d_back_weight,
                own_channels,
                C,
                1,
                0,
                batch,
                dtype,
                BLOCK,
                PRECISION,
            )
        elif job == 11:
            _sum(
                own + D_PROJECT_GAMMA * own_width,
                step,
                d.d_project_gamma,
                s,
                0,
                0,
                own_channels,
                batch,
                BLOCK,
            )
        elif job == 12:
            if d.d_project_beta is not None:
                _sum(
                    own + D_PROJECT_NORM * own_width,
                    step,
                    d.d_project_beta,
                    s,
                    0,
                    0,
                    own_channels,
                    batch,
                    BLOCK,
                )
        elif job == 13:
            if d.d_project_bias is not None:
                _sum(s + D_CLS * width, step, d.d_project_bias, s, 0, 0, C, batch, BLOCK)
        elif job == 14:
            _sum(s + D_BACK_GAMMA * width, step, d.d_back_gamma, s, 0, 0, C, batch, BLOCK)
        elif job == 15:
            if d.d_back_beta is not None:
                _sum(s + D_BACK_NORM * width, step, d.d_back_beta, s, 0, 0, C, batch, BLOCK)
        elif job == 16 and d.d_back_bias is not None:
            _sum(own + D_NEW * own_width, step, d.d_back_bias, s, 0, 0, own_channels, batch, BLOCK)


@triton.jit(do_not_specialize=["batch"])
def parameters_backward(
    a, b, batch, JOBS: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradients of all weights: products and sums over the batch. A program: a tile of one parameter."""
    if BOTH and tl.program_id(1) >= JOBS:
        _parameters_backward(b, tl.program_id(1) - JOBS, batch, BLOCK, PRECISION)
    else:
        _parameters_backward(a, tl.program_id(1), batch, BLOCK, PRECISION)
