"""Triton kernels of the cross-attention and of the fusion, forward and backward.

`absorbed.py` has the formulas; here the same in few launches, each for both directions of a fusion at once
(program_id(1) picks one). There are two kinds of kernels:

- the attention over the tokens, `attend` and `attend_backward`: a program is an image and a part of its
  tokens. The channels are cut into slices, one for each warp, and these into one or two pieces of powers of
  two, the last filled in part (448 is 4 slices of 112 in pieces of 128), all of which stay in registers:
  operands are [slices, tokens, channels], the products of a slice belong to one warp, and only scores are
  summed over the slices. Each token is read once (by `attend_backward` once for every 8 heads, by `attend`
  for every `head_tile`): these kernels aim at the memory's bandwidth;
- the chain of the CLS token around it: B rows through a few linear layers, ROWS of them a program. LayerNorm,
  GELU and their derivatives are computed where a product reads or writes its operands. These are short: they
  aim at few launches.

Every intermediate is a float32 row of an image in one of two buffers, [B, columns]: `saved`, from forward to
backward, and `scratch`, within backward. The constants below name their columns in units of the padded
width. Sums of `scratch` over the batch are the gradients of biases and LayerNorms, products of two of its
columns over the batch those of the matrices: nothing is accumulated by atomics, and every sum has one order.

`d` is a direction, in the named tuple of triton_launch.py that has what the kernel needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

# `saved`: a width each.
CLS = tl.constexpr(0)  # c, the projected CLS token
QUERY = tl.constexpr(1)
OUTPUT = tl.constexpr(2)  # o, all heads side by side
Y = tl.constexpr(3)
PROJECTED = tl.constexpr(4)  # Wo o + bo
# A width a head: z, then key_h = Wk_h^T q_h log2(e) / sqrt(d), which gamma makes the absorbed query.
Z = tl.constexpr(5)
# Then, a number a head: log2 of the sum of the exponentials, and the sum of the attention after dropout.

# `scratch`: a width each.
D_Y = tl.constexpr(0)
D_PROJECTED = tl.constexpr(1)
BACK_ACTIVATION = tl.constexpr(2)
D_BACK_NORM = tl.constexpr(3)
D_BACK_GAMMA = tl.constexpr(4)
D_OUTPUT = tl.constexpr(5)
D_VALUE_BIAS = tl.constexpr(6)
D_QUERY = tl.constexpr(7)
NORMED = tl.constexpr(8)
D_NORM = tl.constexpr(9)
D_GAMMA = tl.constexpr(10)
D_ROW = tl.constexpr(11)  # of the CLS token as a row of the attention
D_CLS = tl.constexpr(12)
# PER_HEAD times a width a head: the gradient of u first, the others counted from there.
D_U = tl.constexpr(13)
U = tl.constexpr(1)
D_KEY = tl.constexpr(2)
D_GAMMA_PART = tl.constexpr(3)
D_BETA_PART = tl.constexpr(4)
PER_HEAD = tl.constexpr(5)
# Then, a number a head: sum_n p_n dp_n, and the gradient of the attention's sum. Then a width of the CLS
# token's own branch each:
D_NEW = tl.constexpr(0)
ACTIVATION = tl.constexpr(1)
D_PROJECT_NORM = tl.constexpr(2)
D_PROJECT_GAMMA = tl.constexpr(3)
OWN_COLUMNS = tl.constexpr(4)

ROWS = tl.constexpr(16)  # the smallest tile of a tensor core
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def padded(width):
    """Rows of the buffers start at multiples of 16 elements, so that they are read 16 bytes at a time."""
    return (width + 15) // 16 * 16


@triton.constexpr_function
def saved_columns(width, heads):
    """Columns of `saved`."""
    return (5 + 2 * heads) * padded(width) + 2 * padded(heads)


@triton.constexpr_function
def scratch_columns(width, own_width, heads):
    """Columns of `scratch`."""
    return (13 + 5 * heads) * padded(width) + 2 * padded(heads) + 4 * padded(own_width)


@triton.constexpr_function
def head_block(head_width):
    """The channels of a head as a side of a matrix product: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(head_width))


@triton.constexpr_function
def blocks(width, block):
    """How many blocks cover the width."""
    return (width + block - 1) // block


@triton.jit
def _sum_of_products(x, y, axis: tl.constexpr):
    """sum(x y), alike in all lanes that hold it. Compilers contract a product with the addition after it;
    where that adds the products of two lanes, each rounds only the other's. An explicit fma is left alone."""
    return tl.sum(tl.fma(x, y, 0.0), axis)


# The chain of the CLS token


@triton.jit
def _saved(d, rows):
    """Addresses of images in `saved`."""
    return d.saved + rows.to(tl.int64) * saved_columns(d.width, d.heads)


@triton.jit
def _scratch(d, rows):
    """Addresses of images in `scratch`."""
    return d.scratch + rows.to(tl.int64) * scratch_columns(d.width, d.own_width, d.heads)


@triton.jit
def _own_scratch(d, rows):
    """Where in `scratch` the columns of the CLS token's own width begin."""
    before = (D_U + PER_HEAD * d.heads) * padded(d.width) + 2 * padded(d.heads)
    return _scratch(d, rows) + before


@triton.jit
def _row(pointer, offsets, valid):
    """Elements in float32, zero where not valid."""
    return tl.load(pointer + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _vector(pointer, columns, valid):
    """Elements of a weight vector in float32, zero where there is none."""
    if pointer is None:
        return tl.zeros(columns.shape, tl.float32)
    else:
        return tl.load(pointer + columns, mask=valid, other=0.0).to(tl.float32)


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
        total += _row(x, k * stride, in_batch & (k < width))
    mean = tl.sum(total, 1, keep_dims=True) / width
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        valid = in_batch & (k < width)
        centred = tl.where(valid, _row(x, k * stride, valid) - mean, 0.0)
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
        g = _row(d_norm, k, valid) * _vector(gamma, k, k < width)
        plain += g
        against = tl.fma(g, (_row(x, k * stride, valid) - mean) * rstd, against)
    return tl.sum(plain, 1, keep_dims=True) / width, tl.sum(against, 1, keep_dims=True) / width


@triton.jit
def _norm_backward(d_norm, x, stride, gamma, mean, rstd, means, k, in_batch, width: tl.constexpr):
    """Columns k of the gradient of x, from that of LayerNorm's output: r (g - mean(g) - x^ mean(g x^))."""
    valid = in_batch & (k < width)
    g = _row(d_norm, k, valid) * _vector(gamma, k, k < width)
    hat = (_row(x, k * stride, valid) - mean) * rstd
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
        hat = (_row(x, k[None, :] * stride, in_batch & inside) - mean) * rstd
        normed = hat * _vector(norm[0], k[None, :], inside) + _vector(norm[1], k[None, :], inside)
        weight = _transposed(linear[0], linear[1], columns, k, out, width)
        total = tl.dot(_gelu(normed).to(weight.dtype), weight, total, input_precision=PRECISION)
    return total + _vector(linear[2], columns[None, :], columns[None, :] < out)


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
    out = _saved(d, rows) + CLS * padded(d.width) + columns[None, :]
    tl.store(out, c, mask=in_batch & (columns[None, :] < d.width))


@triton.jit
def _absorb(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = _head_tile(d.heads)
    in_batch = rows < batch
    dtype = d.dtype
    head_width: tl.constexpr = d.width // d.heads
    saved = _saved(d, rows)
    x = saved + CLS * padded(d.width)
    mean, rstd = _statistics(x, 1, in_batch, d.width, BLOCK, eps)
    j = tl.arange(0, head_block(head_width))
    channel = tl.where(j < head_width, head * head_width + j, d.width)  # width is out of bounds, and masked
    q = tl.zeros([ROWS, head_block(head_width)], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < d.width)[None, :]
        hat = (_row(x, k[None, :], in_batch & inside) - mean) * rstd
        normed = hat * _vector(d.gamma, k[None, :], inside) + _vector(d.beta, k[None, :], inside)
        weight = _transposed(d.wq, d.wq_stride, channel, k, d.width, d.width)
        q = tl.dot(normed.to(dtype), weight, q, input_precision=PRECISION)
    q += _vector(d.bq, channel[None, :], channel[None, :] < d.width)
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
    saved = _saved(d, rows)
    z = saved + (Z + head) * padded(d.width)
    numbers = saved + (Z + 2 * d.heads) * padded(d.width) + head
    if d.parts is None:
        total = tl.load(numbers + padded(d.heads), mask=in_batch, other=0.0)
    else:
        # Merge what the programs of one image found: weights 2^(lse_i - lse), in a fixed order.
        part = d.parts + (rows.to(tl.int64) * splits * d.heads + head) * (padded(d.width) + 16)
        step = d.heads * (padded(d.width) + 16)
        largest = tl.full([ROWS, 1], float("-inf"), tl.float32)
        for i in range(splits):
            largest = tl.maximum(largest, _row(part + i * step, padded(d.width), in_batch))
        weights = tl.zeros([ROWS, 1], tl.float32)
        total = tl.zeros([ROWS, 1], tl.float32)
        for i in range(splits):
            w = tl.exp2(_row(part + i * step, padded(d.width), in_batch) - largest)
            weights += w
            total += w * _row(part + i * step, padded(d.width) + 1, in_batch)
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
            merged = _row(z, k[None, :], valid)
        else:
            merged = tl.zeros([ROWS, BLOCK], tl.float32)
            for i in range(splits):
                w = tl.exp2(_row(part + i * step, padded(d.width), in_batch) - lse)
                merged += w * _row(part + i * step, k[None, :], valid)
            tl.store(z + k[None, :], merged, mask=valid)
        u = merged * _vector(d.gamma, k[None, :], inside) + total * _vector(d.beta, k[None, :], inside)
        weight = _transposed(d.wv, d.wv_stride, channel, k, d.width, d.width)
        o = tl.dot(u.to(dtype), weight, o, input_precision=PRECISION)
    o += total * _vector(d.bv, channel[None, :], channel[None, :] < d.width)
    out = saved + OUTPUT * padded(d.width) + channel[None, :]
    tl.store(out, o, mask=in_batch & (channel[None, :] < d.width))


@triton.jit
def _output(d, batch, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.width, BLOCK)
    in_batch = rows < batch
    saved = _saved(d, rows)
    projected = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        o = _row(saved, OUTPUT * padded(d.width) + k[None, :], in_batch & (k < d.width)[None, :])
        weight = _transposed(d.wo, d.wo_stride, columns, k, d.width, d.width)
        projected = tl.dot(o.to(weight.dtype), weight, projected, input_precision=PRECISION)
    valid = in_batch & (columns[None, :] < d.width)
    projected += _vector(d.bo, columns[None, :], columns[None, :] < d.width)
    tl.store(saved + PROJECTED * padded(d.width) + columns[None, :], projected, mask=valid)
    y = projected
    if d.scale is not None:
        y *= _row(d.scale + rows.to(tl.int64) * d.scale_batch, columns[None, :] * d.scale_channel, valid)
    y += _row(saved, CLS * padded(d.width) + columns[None, :], valid)
    tl.store(saved + Y * padded(d.width) + columns[None, :], y, mask=valid)
    if d.back_weight is None:
        new = d.new + rows.to(tl.int64) * d.new_batch + columns[None, :] * d.new_channel
        tl.store(new, y.to(d.new.dtype.element_ty), mask=valid)


@triton.jit
def _back(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.own_width, BLOCK)
    in_batch = rows < batch
    y = _norm_gelu_linear(
        _saved(d, rows) + Y * padded(d.width), 1, (d.back_gamma, d.back_beta),
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


# The attention over the tokens


@triton.jit
def _columns(d, piece: tl.constexpr):
    """The channels of a piece, [slices, channels of one], and which of them there are."""
    start = 0
    for i in tl.static_range(piece):
        start += d.widths[i]
    k = start + tl.arange(0, tl.constexpr(d.widths[piece]))[None, :]
    c = tl.arange(0, d.slices)[:, None] * d.slice + k
    if d.exact:
        return c, c >= 0
    elif d.slices * d.slice == d.width:
        return c, (k < d.slice) & (c >= 0)
    else:
        return c, (k < d.slice) & (c < d.width)


@triton.jit
def _over_channels(x):
    """Sums of [slices, rows, channels] over the channels, [rows]."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _at(base, n, token_stride, c, channel_stride):
    """Addresses [slices, tokens, channels]; strides may be such that offsets exceed 32 bits."""
    return base + n.to(tl.int64)[None, :, None] * token_stride + c.to(tl.int64)[:, None, :] * channel_stride


@triton.jit
def _load_tokens(d, image, start, n, valid):
    """The pieces of tokens start + n, [slices, tokens, channels]; zero where there is none."""
    base = d.patches + image * d.patches_batch + start.to(tl.int64) * d.patches_token
    pieces = ()
    for i in tl.static_range(len(d.widths)):
        c, inside = _columns(d, i)
        mask = valid[None, :, None] & inside[:, None, :]
        address = _at(base, n, d.patches_token, c, d.patches_channel)
        pieces = pieces + (tl.load(address, mask=mask, other=0.0),)
    return pieces


@triton.jit
def _centre(d, pieces, valid, eps):
    """Mean, 1 / sqrt(variance + eps), 0 where not valid, and the pieces minus the mean, in float32."""
    mean = _over_channels(pieces[0].to(tl.float32))
    for i in tl.static_range(1, len(d.widths)):
        mean += _over_channels(pieces[i].to(tl.float32))
    mean /= d.width
    variance = tl.zeros(mean.shape, tl.float32)
    centred = ()
    for i in tl.static_range(len(d.widths)):
        x = pieces[i].to(tl.float32) - mean[None, :, None]
        if not d.exact:
            x = tl.where(_columns(d, i)[1][:, None, :], x, 0.0)
        variance += tl.sum(_sum_of_products(x, x, 2), 0)
        centred = centred + (x,)
    return mean, tl.where(valid, tl.rsqrt(variance / d.width + eps), 0.0), centred


@triton.jit
def _operands(d, pieces, mean, rstd, centred):
    """What the tensor cores multiply, and `shift`, `scale` with x^ = scale (operand - shift).

    bfloat16 tokens as they are: exact, and they reach the tensor cores without passing through registers. But
    float32 would lose x - mean to rounding and float16 the coefficients, which the scale makes small, to
    underflow: these are normalised first.
    """
    if d.patches.dtype.element_ty == tl.bfloat16 and d.dtype == tl.bfloat16:
        return pieces, mean, rstd
    else:
        normed = ()
        for i in tl.static_range(len(d.widths)):
            normed = normed + ((centred[i] * rstd[None, :, None]).to(d.dtype),)
        return normed, tl.zeros_like(mean), tl.full(mean.shape, 1.0, tl.float32)


@triton.jit
def _normalised_cls(d, saved, eps):
    """The pieces of x^_0, [slices, channels] each, and its 1 / sqrt(variance + eps)."""
    pieces = ()
    mean = 0.0
    for i in tl.static_range(len(d.widths)):
        c, inside = _columns(d, i)
        x = _row(saved, CLS * padded(d.width) + c, inside)
        pieces = pieces + (x,)
        mean += tl.sum(tl.sum(x, 1), 0)
    mean /= d.width
    variance = 0.0
    centred = ()
    for i in tl.static_range(len(d.widths)):
        x = tl.where(_columns(d, i)[1], pieces[i] - mean, 0.0)
        variance += tl.sum(_sum_of_products(x, x, 1), 0)
        centred = centred + (x,)
    rstd = tl.rsqrt(variance / d.width + eps)
    normed = ()
    for i in tl.static_range(len(d.widths)):
        normed = normed + (centred[i] * rstd,)
    return normed, rstd


@triton.jit
def _kept(d, image, h, n, tokens, threshold, keep_scale):
    """What multiplies the attention: 0 where dropped, see dropout.dropout_mask. h and n are broadcast."""
    index = (image * d.heads + h) * tokens + n
    block = index >> 2
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    stream = tl.full(low.shape, d.stream, tl.uint32)
    a, b, e, f = tl.philox(tl.load(d.seed), low, high, stream, tl.zeros_like(low))
    word = index & 3
    chosen = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, e, f)))
    return tl.where(chosen.to(tl.int64) >= threshold, keep_scale, 0.0)


@triton.jit
def _part(patches, split, splits, TOKENS: tl.constexpr):
    """The first patch of a split and the one after its last: whole blocks of TOKENS."""
    size = tl.cdiv(tl.cdiv(patches, splits), TOKENS) * TOKENS
    return tl.minimum(split * size, patches), tl.minimum((split + 1) * size, patches)


@triton.jit
def _absorbed_queries(d, saved, hat, h, present):
    """Pieces of gamma key_h [slices, channels, heads] as the tensor cores see them, sums, scores of x^_0."""
    queries = ()
    sums = tl.zeros([d.head_tile], tl.float32)
    scores = tl.zeros([d.head_tile], tl.float32)
    for i in tl.static_range(len(d.widths)):
        c, inside = _columns(d, i)
        c = c[:, :, None]
        inside = inside[:, :, None]
        valid = inside & present[None, None, :]
        key = _row(saved, (Z + d.heads + h[None, None, :]) * padded(d.width) + c, valid)
        query = (key * _vector(d.gamma, c, inside)).to(d.dtype)
        queries = queries + (query,)
        sums += tl.sum(tl.sum(query.to(tl.float32), 1), 0)
        scores += tl.sum(_sum_of_products(query.to(tl.float32), hat[i][:, :, None], 1), 0)
    return queries, sums, scores


@triton.constexpr_function
def copies(head_tile):
    """How often each head stands in a tile of 16 rows, the smallest of the tensor cores."""
    return max(1, 16 // head_tile)


@triton.jit
def _doubled(x):
    """[.., heads] to [.., 16]: each head `copies` times in turn."""
    if x.shape[-1] >= 16:
        return x
    else:
        joined = tl.join(x, x)
        if len(x.shape) == 1:
            return tl.reshape(joined, (16,))
        else:
            return tl.reshape(joined, (x.shape[0], 16))


@triton.jit
def _attend(
    d, batch, patches, splits, eps, threshold, keep_scale, TOKENS: tl.constexpr, PRECISION: tl.constexpr
):
    tiles = blocks(d.heads, d.head_tile)
    image = (tl.program_id(0) // tiles // splits).to(tl.int64)
    split = tl.program_id(0) // tiles % splits
    if image < batch:
        dtype = d.dtype
        tokens = patches + 1
        h = tl.program_id(0) % tiles * d.head_tile + tl.arange(0, d.head_tile)
        present = h < d.heads
        saved = d.saved + image * saved_columns(d.width, d.heads)
        hat, _ = _normalised_cls(d, saved, eps)

        queries, query_sums, first_score = _absorbed_queries(d, saved, hat, h, present)

        # The CLS token is the first row of the first part.
        leads = split == 0
        first = tl.where(leads, 1.0, 0.0)
        kept = tl.full([d.head_tile], 1.0, tl.float32)
        if d.seed is not None:
            kept = _kept(d, image, h, tl.zeros_like(h), tokens, threshold, keep_scale)
        if d.attention is not None:
            tl.store(d.attention + (image * d.heads + h) * tokens, first_score, mask=present & leads)
        largest = tl.where(leads, first_score, float("-inf"))
        total = tl.zeros([d.head_tile], tl.float32) + first
        dropped_total = first * kept
        shifts = tl.zeros([d.head_tile], tl.float32)
        z = ()
        for i in tl.static_range(len(d.widths)):
            z = z + (hat[i][:, None, :] * _doubled(first * kept)[None, :, None],)

        begin, end = _part(patches, split, splits, TOKENS)
        for start in tl.range(begin, end, TOKENS):
            n = tl.arange(0, TOKENS)
            valid = start + n < end
            pieces = _load_tokens(d, image, start, n, valid)
            if d.copy is not None and tl.program_id(0) % tiles == 0:
                _copy(d, image, start, n, valid, pieces)
            mean, rstd, centred = _centre(d, pieces, valid, eps)
            operands, shift, scale = _operands(d, pieces, mean, rstd, centred)
            partial = tl.zeros([d.slices, TOKENS, d.head_tile], tl.float32)
            for i in tl.static_range(len(d.widths)):
                partial = tl.dot(operands[i], queries[i], partial, input_precision=PRECISION)
            scores = tl.sum(partial, 0)
            scores = scale[:, None] * (scores - shift[:, None] * query_sums[None, :])
            if d.attention is not None:
                address = d.attention + (image * d.heads + h)[None, :] * tokens + (1 + start + n)[:, None]
                tl.store(address, scores, mask=valid[:, None] & present[None, :])
            scores = tl.where(valid[:, None], scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 0))
            rescale = tl.exp2(largest - new)
            p = tl.exp2(scores - new[None, :])
            total = total * rescale + tl.sum(p, 0)
            if d.seed is not None:
                p *= _kept(d, image, h[None, :], (1 + start + n)[:, None], tokens, threshold, keep_scale)
                dropped_total = dropped_total * rescale + tl.sum(p, 0)
            weights = (p * scale[:, None]).to(dtype)
            shifts = shifts * rescale + _sum_of_products(weights.to(tl.float32), shift[:, None], 0)
            rescales = _doubled(rescale)
            rows: tl.constexpr = copies(d.head_tile) * d.head_tile
            of_heads = tl.broadcast_to(tl.trans(_doubled(weights))[None, :, :], [d.slices, rows, TOKENS])
            added = ()
            for i in tl.static_range(len(d.widths)):
                product = tl.dot(
                    of_heads, operands[i], z[i] * rescales[None, :, None], input_precision=PRECISION
                )
                added = added + (product,)
            z = added
            largest = new

        lse = largest + tl.log2(total)
        sums = dropped_total / total if d.seed is not None else tl.full([d.head_tile], 1.0, tl.float32)
        row = tl.arange(0, copies(d.head_tile) * d.head_tile)
        of_row = tl.program_id(0) % tiles * d.head_tile + row // copies(d.head_tile)
        wanted = (row % copies(d.head_tile) == 0) & (of_row < d.heads)
        if d.parts is None:
            out = saved + (Z + of_row) * padded(d.width)
            numbers = saved + (Z + 2 * d.heads) * padded(d.width) + h
            tl.store(numbers, lse, mask=present)
            tl.store(numbers + padded(d.heads), sums, mask=present)
        else:
            part = d.parts + (image * splits + split) * d.heads * (padded(d.width) + 16)
            out = part + of_row * (padded(d.width) + 16)
            numbers = part + h * (padded(d.width) + 16) + padded(d.width)
            tl.store(numbers, lse, mask=present)
            tl.store(numbers + 1, sums, mask=present)
        for i in tl.static_range(len(d.widths)):
            c, inside = _columns(d, i)
            value = (z[i] - _doubled(shifts)[None, :, None]) / _doubled(total)[None, :, None]
            mask = inside[:, None, :] & wanted[None, :, None]
            tl.store(out[None, :, None] + c[:, None, :], value, mask=mask)


@triton.jit
def _copy(d, image, start, n, valid, pieces):
    base = d.copy + image * d.copy_batch + start.to(tl.int64) * d.copy_token
    for i in tl.static_range(len(d.widths)):
        c, inside = _columns(d, i)
        address = _at(base, n, d.copy_token, c, d.copy_channel)
        tl.store(address, pieces[i], mask=valid[None, :, None] & inside[:, None, :])


@triton.jit(do_not_specialize=["batch", "patches_a", "patches_b", "splits_a", "splits_b", "threshold"])
def attend(
    a, b, batch, patches_a, patches_b, splits_a, splits_b, eps, threshold: tl.int64, keep_scale,
    BOTH: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z_h = sum_n softmax_n(query_h . x^_n) x^_n over an image's tokens, with an online softmax in base 2.

    A program: one image, one of `splits` parts of its tokens, `head_tile` heads; TOKENS tokens a step:
    scores [TOKENS, heads] = tokens [TOKENS, width] queries [width, heads], then z [width, heads] from the
    same tokens transposed. Copies the tokens to `copy` on the way, if there is one.
    """
    if BOTH and tl.program_id(1) == 1:
        _attend(b, batch, patches_b, splits_b, eps, threshold, keep_scale, TOKENS, PRECISION)
    else:
        _attend(a, batch, patches_a, splits_a, eps, threshold, keep_scale, TOKENS, PRECISION)


# Backward: the chain from the new CLS token to the attention


@triton.jit
def _activation_backward(
    d_activation, x, stride, norm, out, in_batch, columns, eps, width: tl.constexpr, BLOCK: tl.constexpr
):
    """From the gradient of GELU(LayerNorm(x)): stores that of the norm's output, its product with x^ and the
    activation itself at the three addresses `out`, [rows, columns] each."""
    mean, rstd = _statistics(x, stride, in_batch, width, BLOCK, eps)
    valid = in_batch & (columns[None, :] < width)
    hat = (_row(x, columns[None, :] * stride, valid) - mean) * rstd
    inside = (columns < width)[None, :]
    normed = hat * _vector(norm[0], columns[None, :], inside) + _vector(norm[1], columns[None, :], inside)
    d_norm = d_activation * _gelu_derivative(normed)
    tl.store(out[0], d_norm, mask=valid)
    tl.store(out[1], d_norm * hat, mask=valid)
    tl.store(out[2], _gelu(normed), mask=valid)


@triton.jit
def _back_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.width, BLOCK)
    in_batch = rows < batch
    scratch = _scratch(d, rows)
    kept = _own_scratch(d, rows) + D_NEW * padded(d.own_width)
    incoming = d.d_new + rows.to(tl.int64) * d.d_new_batch
    d_activation = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.own_width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        valid = in_batch & (k < d.own_width)[None, :]
        g = _row(incoming, k[None, :] * d.d_new_channel, valid)
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
    y = _saved(d, rows) + Y * padded(d.width)
    norm = (d.back_gamma, d.back_beta)
    _activation_backward(d_activation, y, 1, norm, out, in_batch, columns, eps, d.width, BLOCK)


@triton.jit
def _output_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.width, BLOCK)
    in_batch = rows < batch
    saved = _saved(d, rows)
    scratch = _scratch(d, rows)
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
            d_y = _row(d.d_new + rows.to(tl.int64) * d.d_new_batch, k[None, :] * d.d_new_channel, valid)
        d_projected = d_y
        if d.scale is not None:
            scale = d.scale + rows.to(tl.int64) * d.scale_batch + k[None, :] * d.scale_channel
            d_projected = d_y * _row(scale, 0, valid)
        if tl.program_id(0) % blocks(d.width, BLOCK) == 0:
            tl.store(scratch + D_Y * padded(d.width) + k[None, :], d_y, mask=valid)
            tl.store(scratch + D_PROJECTED * padded(d.width) + k[None, :], d_projected, mask=valid)
            if d.d_scale is not None:
                projected = _row(saved, PROJECTED * padded(d.width) + k[None, :], valid)
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
    saved = _saved(d, rows)
    scratch = _scratch(d, rows)
    sums = _row(saved + (Z + 2 * d.heads) * padded(d.width) + padded(d.heads), head, in_batch)
    j = tl.arange(0, head_block(head_width))
    channel = tl.where(j < head_width, head * head_width + j, d.width)
    own = in_batch & (channel[None, :] < d.width)
    d_output = _row(scratch, D_OUTPUT * padded(d.width) + channel[None, :], own)
    tl.store(scratch + D_VALUE_BIAS * padded(d.width) + channel[None, :], d_output * sums, mask=own)
    bias = _vector(d.bv, channel[None, :], channel[None, :] < d.width)
    d_sum = _sum_of_products(d_output, bias, 1)[:, None]
    against = tl.zeros([ROWS, 1], tl.float32)
    d_output = d_output.to(d.dtype)
    heads = scratch + D_U * padded(d.width)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < d.width)[None, :]
        valid = in_batch & inside
        weight = _matrix(d.wv, d.wv_stride, channel, k, d.width, d.width)
        d_u = tl.dot(d_output, weight, input_precision=PRECISION)
        z = _row(saved, (Z + head) * padded(d.width) + k[None, :], valid)
        gamma = _vector(d.gamma, k[None, :], inside)
        beta = _vector(d.beta, k[None, :], inside)
        # With dz as the tensor cores of attend_backward see it, so that the sum over the tokens cancels.
        d_z = (d_u * gamma).to(d.dtype).to(tl.float32)
        against += _sum_of_products(d_z, z, 1)[:, None]
        d_sum += _sum_of_products(d_u, beta, 1)[:, None]
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


# Backward: the attention over the tokens


@triton.jit
def _pairs(d, saved, heads, tile, piece: tl.constexpr):
    """Rows of a head tile, [slices, 2 x 8, channels]: a head's query and the gradient of its z in turn."""
    c, inside = _columns(d, piece)
    row = tl.arange(0, 16)
    h = tile * 8 + row // 2
    c = c[:, None, :]
    inside = inside[:, None, :]
    valid = (h < d.heads)[None, :, None] & inside
    is_query = (row % 2 == 0)[None, :, None]
    query = _row(saved, (Z + d.heads + h)[None, :, None] * padded(d.width) + c, valid & is_query)
    d_z = _row(heads, h[None, :, None] * padded(d.width) + c, valid & (row % 2 == 1)[None, :, None])
    return ((query + d_z) * _vector(d.gamma, c, inside)).to(d.dtype)


@triton.jit
def _numbers_of_heads(d, saved, numbers, tile):
    """Of the heads of a tile: the log-sum-exp, sum_n p_n dp_n, the gradient of the attention's sum."""
    h = tile * 8 + tl.arange(0, 8)
    present = h < d.heads
    lse = _row(saved + (Z + 2 * d.heads) * padded(d.width), h, present)
    return lse, _row(numbers, h, present), _row(numbers + padded(d.heads), h, present)


@triton.jit
def _softmax_backward(d, image, tile, products, n, valid, tokens, of_heads, threshold, keep_scale):
    """From scores and dz . x^ in turn, [tokens, 16]: ds and the p that multiplies dz, in turn."""
    h = tile * 8 + tl.arange(0, 8)
    present = h < d.heads
    scores, d_p = tl.split(tl.reshape(products, (products.shape[0], 8, 2)))
    lse, sums, d_sums = of_heads
    p = tl.where(valid[:, None] & present[None, :], tl.exp2(scores - lse[None, :]), 0.0)
    dropped = p
    if d.seed is not None:
        kept = _kept(d, image, h[None, :], n[:, None], tokens, threshold, keep_scale)
        dropped = p * kept
        d_p = (d_p + d_sums[None, :]) * kept
    if d.d_attention is not None:
        address = (image * d.heads + h)[None, :] * tokens + n[:, None]
        d_p += _row(d.d_attention, address, valid[:, None] & present[None, :])
    d_scores = LN2 * p * (d_p - sums[None, :])
    return tl.reshape(tl.join(d_scores, dropped), (products.shape[0], 16))


@triton.jit
def _all_pairs(d, saved, heads, tile, hat):
    """The pairs of all pieces, their sums and their products with x^_0."""
    pairs = ()
    sums = tl.zeros([16], tl.float32)
    products = tl.zeros([16], tl.float32)
    for i in tl.static_range(len(d.widths)):
        pair = _pairs(d, saved, heads, tile, i)
        pairs = pairs + (pair,)
        sums += _over_channels(pair.to(tl.float32))
        products += tl.sum(_sum_of_products(pair.to(tl.float32), hat[i][:, None, :], 2), 0)
    return pairs, sums, products


@triton.jit
def _add_d_cls_row(d, scratch, tile, leads, pairs, pair_sums, products, coefficients, hat, rstd):
    """The gradient of c as the first row of the attention, as _add_d_patches has it of the others."""
    mean_plain = _sum_of_products(coefficients, pair_sums, 0) / d.width
    mean_against = _sum_of_products(coefficients, products, 0) / d.width
    for i in tl.static_range(len(d.widths)):
        c, inside = _columns(d, i)
        at = scratch + D_ROW * padded(d.width) + c
        d_hat = _sum_of_products(coefficients[None, :, None], pairs[i].to(tl.float32), 1)
        value = rstd * (d_hat - mean_plain - hat[i] * mean_against)
        if d.heads > 8:
            value += _row(at, 0, inside & leads & (tile > 0))
        tl.store(at, value, mask=inside & leads)


@triton.jit
def _attend_backward(
    d, batch, patches, splits, eps, threshold, keep_scale, TOKENS: tl.constexpr, PRECISION: tl.constexpr
):
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if image < batch:
        tokens = patches + 1
        saved = d.saved + image * saved_columns(d.width, d.heads)
        scratch = d.scratch + image * scratch_columns(d.width, d.own_width, d.heads)
        heads = scratch + D_U * padded(d.width)
        numbers = heads + PER_HEAD * d.heads * padded(d.width)
        leads = split == 0
        hat, rstd_cls = _normalised_cls(d, saved, eps)
        begin, end = _part(patches, split, splits, TOKENS)

        # More heads than a tile read the tokens again, and add to their gradients: registers hold no more.
        for tile in tl.range(0, blocks(d.heads, 8)):
            of_heads = _numbers_of_heads(d, saved, numbers, tile)
            pairs, pair_sums, cls_products = _all_pairs(d, saved, heads, tile, hat)
            zero = tl.zeros([1], tl.int32)
            of_row = _softmax_backward(
                d,
                image,
                tile,
                cls_products[None, :],
                zero,
                zero == 0,
                tokens,
                of_heads,
                threshold,
                keep_scale,
            )
            # The CLS token is the first row of the first part.
            of_cls = tl.where(leads, tl.reshape(of_row, (16,)), 0.0)
            _add_d_cls_row(d, scratch, tile, leads, pairs, pair_sums, cls_products, of_cls, hat, rstd_cls)
            shifts = tl.zeros([16], tl.float32)
            excess = of_cls
            d_pairs = ()
            for i in tl.static_range(len(d.widths)):
                d_pairs = d_pairs + (of_cls[None, :, None] * hat[i][:, None, :],)

            for start in tl.range(begin, end, TOKENS):
                n = tl.arange(0, TOKENS)
                valid = start + n < end
                pieces = _load_tokens(d, image, start, n, valid)
                mean, rstd, centred = _centre(d, pieces, valid, eps)
                operands, shift, scale = _operands(d, pieces, mean, rstd, centred)
                partial = tl.zeros([d.slices, TOKENS, 16], tl.float32)
                for i in tl.static_range(len(d.widths)):
                    pair = tl.permute(pairs[i], (0, 2, 1))
                    partial = tl.dot(operands[i], pair, partial, input_precision=PRECISION)
                products = tl.sum(partial, 0)
                products = scale[:, None] * (products - shift[:, None] * pair_sums[None, :])
                coefficients = _softmax_backward(
                    d, image, tile, products, 1 + start + n, valid, tokens, of_heads, threshold, keep_scale
                )
                rounded = coefficients.to(d.dtype)
                means = (
                    _sum_of_products(rounded.to(tl.float32), pair_sums[None, :], 1) / d.width,
                    _sum_of_products(rounded.to(tl.float32), products, 1) / d.width,
                )
                scaled = (coefficients * scale[:, None]).to(d.dtype)
                seen = scaled.to(tl.float32)
                unscale = tl.where(scale > 0, 1 / scale, 0.0)
                shifts += _sum_of_products(seen, shift[:, None], 0)
                excess += _sum_of_products(seen, unscale[:, None], 0)
                of_tokens = tl.broadcast_to(rounded[None, :, :], [d.slices, TOKENS, 16])
                of_pairs = tl.broadcast_to(tl.trans(scaled)[None, :, :], [d.slices, 16, TOKENS])
                added = ()
                for i in tl.static_range(len(d.widths)):
                    product = tl.dot(of_pairs, operands[i], d_pairs[i], input_precision=PRECISION)
                    added = added + (product,)
                d_pairs = added
                if d.d_patches is not None:
                    for i in tl.static_range(len(d.widths)):
                        d_hat = tl.dot(of_tokens, pairs[i], input_precision=PRECISION)
                        _add_d_patches(
                            d, image, tile, start, n, valid, i, d_hat, pieces[i], mean, rstd, means
                        )

            _store_d_queries(d, image * splits + split, saved, tile, d_pairs, shifts, excess)


@triton.jit
def _store_d_queries(d, part, saved, tile, d_pairs, shifts, excess):
    """Of the pairs' gradients only those of the queries are wanted.

    But for rounding, ds sums to zero over the tokens. What is left multiplies all that the tokens have in
    common, so it is taken off with z, their mean under the attention.
    """
    row = tl.arange(0, 16)
    h = tile * 8 + row // 2
    wanted = (row % 2 == 0) & (h < d.heads)
    sums = _row(saved + (Z + 2 * d.heads) * padded(d.width) + padded(d.heads), h, wanted)
    excess = tl.where(sums > 0, excess / sums, 0.0)
    for i in tl.static_range(len(d.widths)):
        c, inside = _columns(d, i)
        mask = wanted[None, :, None] & inside[:, None, :]
        z = _row(saved, (Z + h)[None, :, None] * padded(d.width) + c[:, None, :], mask)
        value = d_pairs[i] - shifts[None, :, None] - excess[None, :, None] * z
        out = d.parts + (part * d.heads + h[None, :, None]) * padded(d.width) + c[:, None, :]
        tl.store(out, value, mask=mask)


@triton.jit
def _add_d_patches(d, image, tile, start, n, valid, piece: tl.constexpr, d_hat, x, mean, rstd, means):
    """dx = r (dx^ - mean(dx^) - x^ mean(dx^ x^)), plus what comes in for the copy of the tokens.

    From the tokens as they were loaded: centred ones need not stay in registers until here. A sum over the
    heads: further tiles of them add to what is there.
    """
    c, inside = _columns(d, piece)
    mask = valid[None, :, None] & inside[:, None, :]
    along = (x.to(tl.float32) - mean[None, :, None]) * (rstd * rstd * means[1])[None, :, None]
    value = (d_hat - means[0][None, :, None]) * rstd[None, :, None] - along
    base = d.d_patches + image * d.d_patches_batch + start.to(tl.int64) * d.d_patches_token
    address = _at(base, n, d.d_patches_token, c, d.d_patches_channel)
    if d.heads > 8:
        value += _row(address, 0, mask & (tile > 0))
    if d.d_copy is not None:
        incoming = d.d_copy + image * d.d_copy_batch + start.to(tl.int64) * d.d_copy_token
        value += _row(_at(incoming, n, d.d_copy_token, c, d.d_copy_channel), 0, mask & (tile == 0))
    tl.store(address, value.to(d.d_patches.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "patches_a", "patches_b", "splits_a", "splits_b", "threshold"])
def attend_backward(
    a, b, batch, patches_a, patches_b, splits_a, splits_b, eps, threshold: tl.int64, keep_scale,
    BOTH: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens and of the absorbed queries, in one pass with the softmax from its saved sum.

    A program: one image, one of `splits` parts of its tokens, all heads in tiles of 8. Query and dz of a head
    are two rows of one operand G [16, width], so that each product is a full tile of the tensor cores:
    scores and dz . x^ = tokens G^T [TOKENS, 16]; their gradients E [TOKENS, 16]; dx^ = E G [TOKENS, width];
    dG = E^T tokens [16, width].
    """
    if BOTH and tl.program_id(1) == 1:
        _attend_backward(b, batch, patches_b, splits_b, eps, threshold, keep_scale, TOKENS, PRECISION)
    else:
        _attend_backward(a, batch, patches_a, splits_a, eps, threshold, keep_scale, TOKENS, PRECISION)


# Backward: the chain from the attention to the old CLS token


@triton.jit
def _absorb_backward(d, batch, splits, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, head = _head_tile(d.heads)
    in_batch = rows < batch
    head_width: tl.constexpr = d.width // d.heads
    dtype = d.dtype
    scratch = _scratch(d, rows)
    key = _saved(d, rows) + (Z + d.heads + head) * padded(d.width)
    part = d.parts + (rows.to(tl.int64) * splits * d.heads + head) * padded(d.width)
    step = d.heads * padded(d.width)
    at = scratch + (D_U + head) * padded(d.width)
    j = tl.arange(0, head_block(head_width))
    channel = tl.where(j < head_width, head * head_width + j, d.width)
    d_query = tl.zeros([ROWS, head_block(head_width)], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < d.width)[None, :]
        valid = in_batch & inside
        d_absorbed = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in range(splits):
            d_absorbed += _row(part + i * step, k[None, :], valid)
        d_gamma = _row(at, D_GAMMA_PART * step + k[None, :], valid)
        d_gamma += d_absorbed * _row(key, k[None, :], valid)
        tl.store(at + D_GAMMA_PART * step + k[None, :], d_gamma, mask=valid)
        d_key = d_absorbed * _vector(d.gamma, k[None, :], inside) * (LOG2E * d.score_scale)
        tl.store(at + D_KEY * step + k[None, :], d_key, mask=valid)
        weight = _transposed(d.wk, d.wk_stride, channel, k, d.width, d.width)
        d_query = tl.dot(d_key.to(dtype), weight, d_query, input_precision=PRECISION)
    out = scratch + D_QUERY * padded(d.width) + channel[None, :]
    tl.store(out, d_query, mask=in_batch & (channel[None, :] < d.width))


@triton.jit
def _query_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.width, BLOCK)
    in_batch = rows < batch
    scratch = _scratch(d, rows)
    x = _saved(d, rows) + CLS * padded(d.width)
    mean, rstd = _statistics(x, 1, in_batch, d.width, BLOCK, eps)
    d_norm = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d.width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        d_query = _row(scratch, D_QUERY * padded(d.width) + k[None, :], in_batch & (k < d.width)[None, :])
        weight = _matrix(d.wq, d.wq_stride, k, columns, d.width, d.width)
        d_norm = tl.dot(d_query.to(weight.dtype), weight, d_norm, input_precision=PRECISION)
    inside = (columns < d.width)[None, :]
    valid = in_batch & inside
    hat = (_row(x, columns[None, :], valid) - mean) * rstd
    normed = hat * _vector(d.gamma, columns[None, :], inside) + _vector(d.beta, columns[None, :], inside)
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
    return _row(scratch, D_Y * width + k, valid) + _row(scratch, D_ROW * width + k, valid) + through


@triton.jit
def _project_backward(d, batch, eps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = _tile(d.own_width, BLOCK)
    in_batch = rows < batch
    scratch = _scratch(d, rows)
    x = _saved(d, rows) + CLS * padded(d.width)
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
    at = _own_scratch(d, rows) + columns[None, :]
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
    scratch = _scratch(d, rows)
    if d.project_weight is not None:
        x = d.own + rows.to(tl.int64) * d.own_batch
        gamma = d.project_gamma
        stride = d.own_channel
        d_norm = _own_scratch(d, rows) + D_PROJECT_NORM * padded(d.own_width)
    else:
        x = _saved(d, rows) + CLS * padded(d.width)
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
            x = _row(left, image * LEFT + row[None, :], in_batch & (j < height)[None, :])
            y = _row(right, image * RIGHT + head * HEAD_STEP + column[None, :], in_batch & inside[None, :])
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
            total += _row(x, offsets, valid)
            for head in range(HEADS):
                total += _row(parts, offsets + head * HEAD_STEP, valid)
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
