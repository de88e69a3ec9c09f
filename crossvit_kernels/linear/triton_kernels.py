"""Triton kernels of the products of a linear layer: forward, gradient of the input, gradient of the weight.

    product           y = epilogue(x Wᵀ), or epilogue(x W)             rows M, columns N, depth K
    weight_gradient   dzᵀ x, summed over parts of the rows
    add_parts         the parts' sum, in order, and what of it belongs to the LayerNorm

One program computes a tile of 128 x 128 numbers in registers, and hands it to the epilogue in slices of
columns, so that no more of it than a slice is ever there twice:

                 K, 32 or 64 a step
     rows 128  [ x -> ]  @  [ W -> ]ᵀ  columns 128  =  accumulators  ->  | slice | slice |  ->  y

With LayerNorm in front, x is multiplied as it is, by the weight with gamma folded into it, W' = W gamma:

     z = r (x W'ᵀ) - r mean colsum + b',  colsum = sums of the rows of W',  b' = b + W beta

and mean and r = 1 / deviation of each row come in after the product. They come as sums and sums of squares
about their own mean, of slices of the row: `product` leaves them of what it writes, for the LayerNorm that
follows. Their gradient needs two numbers of a row, again known before the product ends:

     dx = dz' W' - m1 / C - (x - mean) r m2 / C,  dz' = r dz,  m1 = sum(dz' colsum),  m2 = sum(dz' (z - b'))

On GPUs from compute capability 9.0 on, tiles are copied by the TMA unit, from descriptors that the host
makes; on others by every thread, from pointers. Both are here, `TMA` says which. The limit is the tensor
cores' rate at best; tiles of 128 x 128 read 64 FLOP a byte from the L2 cache, whose rate is the nearer limit
on an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_dependent import wait

# Phi(z) - 1/2 as z times a polynomial in 2 (z / 5.2)^2 - 1, least in the largest error of z Phi(z); beyond
# 5.2 it is constant. With float32 arithmetic z Phi(z) is right to 1e-7 of max(1, |z|).
_LIMIT = tl.constexpr(5.2)
_PHI = tl.constexpr(
    (
        *(0.0001940475333, -0.0005545433005, 0.0006242670596, -0.0009999474262, 0.002637057273),
        *(-0.005044835534, 0.008023254695, -0.01236457358, 0.01813056664, -0.02476078082),
        *(0.03196270564, -0.03992566437, 0.05002609515, -0.06774379813, 0.1359499783),
    )
)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _phi(z):
    """The normal distribution's cumulative function."""
    clipped = tl.minimum(tl.maximum(z, -_LIMIT), _LIMIT)
    t = clipped * clipped * (2.0 / (_LIMIT * _LIMIT)) - 1.0
    p = t * _PHI[0] + _PHI[1]
    for i in tl.static_range(2, len(_PHI)):
        p = p * t + _PHI[i]
    return p * clipped + 0.5


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """None, "gelu" (by the error function) or "relu" of z."""
    if ACTIVATION == "gelu":
        z = tl.where(z < -_LIMIT, 0.0, z * _phi(z))
    elif ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)  # which keeps NaN
    return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "gelu":
        return _phi(z) + z * (0.3989422804014327 * tl.exp2(z * z * (-0.5 * LOG2_E)))
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def merged(statistics, m, rows, channels, PARTS: tl.constexpr, PART: tl.constexpr):
    """Sum of the rows m, and squares about their mean, from [PARTS, 2, rows]: the same of parts of them.

    A part has PART channels, the last one what is left. (Chan, Golub, LeVeque, 1979.)
    """
    there = m < rows
    total = tl.zeros(m.shape, tl.float32)
    for i in range(PARTS):
        total += tl.load(statistics + 2 * i * rows + m, mask=there, other=0.0)
    mean = total / channels
    squares = tl.zeros(m.shape, tl.float32)
    for i in range(PARTS):
        count = tl.minimum(channels - i * PART, PART)
        away = tl.load(statistics + 2 * i * rows + m, mask=there, other=0.0) / count - mean
        squares += tl.load(statistics + (2 * i + 1) * rows + m, mask=there, other=0.0) + away * away * count
    return total, squares


@triton.jit
def row_statistics(statistics, m, rows, channels, eps, PARTS: tl.constexpr, PART: tl.constexpr):
    """Mean and 1 / deviation of the rows m, from what `merged` reads."""
    total, squares = merged(statistics, m, rows, channels, PARTS, PART)
    return total / channels, tl.rsqrt(squares / channels + eps)


@triton.jit
def _load(
    x, row, column, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr
):
    """A tile in float32, with zeros beyond the matrix."""
    if TMA:
        tile = x.load([row, column])
    else:
        m, n = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        there = (m < rows)[:, None] & (n < columns)[None, :]
        tile = tl.load(x + m.to(tl.int64)[:, None] * stride + n[None, :], mask=there, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _store(
    x, value, row, column, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr
):
    """Into a contiguous matrix of rows x columns."""
    if TMA:
        x.store([row, column], value)
    else:
        m, n = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        there = (m < rows)[:, None] & (n < columns)[None, :]
        tl.store(x + m.to(tl.int64)[:, None] * columns + n[None, :], value, mask=there)


@triton.jit
def _accumulate(
    x, w, row, column, rows, columns, depth, stride_x, stride_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [rows, depth] times W, which is [columns, depth] if TRANSPOSED, else [depth, columns].

    WHOLE: depth is a multiple of STEP.
    """
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if TMA:
        for start in range(0, depth, STEP):
            of_w = w.load([column, start]).T if TRANSPOSED else w.load([start, column])
            total = tl.dot(x.load([row, start]), of_w, total, input_precision=PRECISION)
    else:
        # Rows beyond the last read the last; what they give is written nowhere.
        m = tl.minimum(row + tl.arange(0, ROWS), rows - 1)
        n = column + tl.arange(0, COLUMNS)
        k = tl.arange(0, STEP)
        at_x = x + m.to(tl.int64)[:, None] * stride_x + k[None, :]
        if TRANSPOSED:
            at_w = w + tl.minimum(n, columns - 1).to(tl.int64)[:, None] * stride_w + k[None, :]
        else:
            at_w = w + k.to(tl.int64)[:, None] * stride_w + n[None, :]
        for start in tl.range(0, depth, STEP, loop_unroll_factor=1):
            left = depth - start
            of_x = tl.load(at_x) if WHOLE else tl.load(at_x, mask=(k < left)[None, :], other=0.0)
            if TRANSPOSED:
                of_w = tl.load(at_w) if WHOLE else tl.load(at_w, mask=(k < left)[None, :], other=0.0)
                of_w = of_w.T
                at_w += STEP
            else:
                there = (k < left)[:, None] & (n < columns)[None, :]
                of_w = tl.load(at_w, mask=there, other=0.0)
                at_w += STEP * stride_w
            total = tl.dot(of_x, of_w, total, input_precision=PRECISION)
            at_x += STEP
    return total


@triton.jit
def _sum_of_products(a, b, AXIS: tl.constexpr):
    """sum(a b) along an axis. Were a product contracted with the addition of another thread's, the copies of
    a sum that several threads have would differ in their last bits."""
    return tl.sum(tl.fma(a, b, tl.zeros(a.shape, tl.float32)), AXIS)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def slices_of(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr):
    """x in slices of SLICE columns: one, two or four."""
    if COLUMNS == SLICE:
        return (x,)
    elif COLUMNS == 2 * SLICE:
        return _halves(x, ROWS, COLUMNS)
    else:
        left, right = _halves(x, ROWS, COLUMNS)
        a, b = _halves(left, ROWS, COLUMNS // 2)
        c, d = _halves(right, ROWS, COLUMNS // 2)
        return (a, b, c, d)


@triton.jit
def _finish(
    total, row, column, mean, rstd, scale, means, y, z, residual, also, bias, colsum, left, rows, columns,
    stride_z, stride_residual,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    OUT: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One slice. Returns m1 and m2 of the rows, where the epilogue is "activation_gradient"."""
    m, n = row + tl.arange(0, ROWS), column + tl.arange(0, SLICE)
    inside = n < columns
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    if EPILOGUE == "activation_gradient":
        before = _load(z, row, column, rows, columns, stride_z, ROWS, SLICE, TMA)
        value = total * slope(before, ACTIVATION)
        if scale is not None:
            value *= scale[:, None]
        if also is not None:
            _store(also, activate(before, ACTIVATION), row, column, rows, columns, ROWS, SLICE, TMA)
        if SCALED:
            value *= rstd[:, None]
        if NORM:
            value = value.to(OUT)
            counted = tl.where(inside[None, :], value.to(tl.float32), 0.0)
            first = _sum_of_products(counted, tl.load(colsum + n, mask=inside, other=0.0)[None, :], 1)
            second = _sum_of_products(counted, before - tl.load(bias + n, mask=inside, other=0.0)[None, :], 1)
    elif EPILOGUE == "norm_gradient":
        value = total if SCALED else total * rstd[:, None]
        x = _load(z, row, column, rows, columns, stride_z, ROWS, SLICE, TMA)
        if SCALED:
            x -= mean[:, None]
        value = value - means[0][:, None] - x * means[1][:, None]
        if residual is not None:
            value += _load(residual, row, column, rows, columns, stride_residual, ROWS, SLICE, TMA)
        if also is not None:
            scaled = value if scale is None else value * scale[:, None]
            _store(also, scaled, row, column, rows, columns, ROWS, SLICE, TMA)
    else:
        value = total
        if NORM:
            by_column = tl.load(colsum + n, mask=inside, other=0.0)
            value = (value - mean[:, None] * by_column[None, :]) * rstd[:, None]
        if bias is not None:
            value += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if z is not None:
            _store(z, value, row, column, rows, columns, ROWS, SLICE, TMA)
        value = activate(value, ACTIVATION)
        if scale is not None:
            value *= scale[:, None]
        if residual is not None:
            value += _load(residual, row, column, rows, columns, stride_residual, ROWS, SLICE, TMA)
    rounded = value.to(OUT)
    _store(y, rounded, row, column, rows, columns, ROWS, SLICE, TMA)
    if left is not None:
        count = tl.maximum(tl.minimum(columns - column, SLICE), 1)
        counted = tl.where(inside[None, :], rounded.to(tl.float32), 0.0)
        sums = tl.sum(counted, 1)
        away = tl.where(inside[None, :], counted - (sums / count)[:, None], 0.0)
        there = (m < rows) & (column < columns)
        to = left + (column // SLICE).to(tl.int64) * 2 * rows + m
        tl.store(to, sums, mask=there)
        tl.store(to + rows, _sum_of_products(away, away, 1), mask=there)
    return first, second


@triton.jit
def _tile(
    x, w, y, z, residual, also, bias, colsum, statistics, scale, sums, left, row, column, rows, columns,
    depth, channels, of_scale, stride_x, stride_w, stride_z, stride_residual, eps,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    TRANSPOSED: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, SUMS: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDEST: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Product and epilogue of one tile, COLUMNS wide; other tiles of the launch are WIDEST."""
    total = _accumulate(
        x, w, row, column, rows, columns, depth, stride_x, stride_w,
        ROWS, COLUMNS, STEP, TRANSPOSED, WHOLE, TMA, PRECISION,
    )  # fmt: skip
    m = row + tl.arange(0, ROWS)
    there = m < rows
    mean = tl.zeros([ROWS], tl.float32)
    rstd = mean
    if PARTS > 0:
        mean, rstd = row_statistics(statistics, m, rows, channels, eps, PARTS, PART)
    of_row = scale
    if scale is not None:
        of_row = tl.load(scale + m // of_scale, mask=there, other=0.0).to(tl.float32)
    means = (mean, mean)
    if EPILOGUE == "norm_gradient":
        m1 = tl.zeros([ROWS], tl.float32)
        m2 = tl.zeros([ROWS], tl.float32)
        for i in range(SUMS):
            m1 += tl.load(sums + 2 * i * rows + m, mask=there, other=0.0)
            m2 += tl.load(sums + (2 * i + 1) * rows + m, mask=there, other=0.0)
        if SCALED:
            m2 *= rstd
        else:
            m1 *= rstd
            m2 *= rstd
        means = (m1 / columns, m2 / columns)
    slices = slices_of(total, ROWS, COLUMNS, SLICE)
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(COLUMNS // SLICE):
        of_first, of_second = _finish(
            slices[i], row, column + i * SLICE, mean, rstd, of_row, means, y, z, residual, also, bias, colsum,
            left, rows, columns, stride_z, stride_residual,
            EPILOGUE, ACTIVATION, NORM, SCALED, OUT, ROWS, SLICE, TMA,
        )  # fmt: skip
        first += of_first
        second += of_second
    if EPILOGUE == "activation_gradient" and NORM:
        to = sums + (column // WIDEST).to(tl.int64) * 2 * rows + m
        tl.store(to, first, mask=there)
        tl.store(to + rows, second, mask=there)


@triton.jit(do_not_specialize=["rows", "channels", "of_scale"])
def product(
    x, w, w_tail, y, z, residual, also, bias, colsum, statistics, scale, sums, left, rows, columns, depth,
    channels, of_scale, stride_x, stride_w, stride_z, stride_residual, eps,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    TRANSPOSED: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, SUMS: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """y [rows, columns], contiguous, of dtype OUT. What an epilogue does not use is None.

    "forward": y = scale act(z) + residual, z = x W^T + bias or, with NORM, r (x W^T - mean colsum) + bias. It
        leaves z, and in `left` the statistics of y for the next LayerNorm, parts of SLICE columns.
    "activation_gradient": y = scale act'(z) (x W), SCALED by the rows' r; with NORM it leaves m1 and m2 in
        `sums` [tiles of a row, 2, rows], with the colsum and b' (`bias`) of the layer that z comes from.
        `also` gets act(z).
    "norm_gradient": the gradient of a LayerNorm's input, plus residual, from dz' (SCALED) or dz, and their
        `sums` [SUMS, 2, rows]; `z` is that input, or, not SCALED, what the LayerNorm made of it. `also` gets
        it times scale.

    channels: of the LayerNorm. scale: [rows / of_scale], one number for so many rows. TAIL: columns of the
    last tile, where they are fewer, with descriptors `w_tail`; 0 for none.
    """
    wait(DEPENDENT)
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS
    column = tl.program_id(0) % tiles * COLUMNS
    if TAIL > 0:
        if column + COLUMNS > columns:
            _tile(
                x, w_tail, y, z, residual, also, bias, colsum, statistics, scale, sums, left, row, column,
                rows, columns, depth, channels, of_scale, stride_x, stride_w, stride_z, stride_residual, eps,
                EPILOGUE, ACTIVATION, NORM, SCALED, TRANSPOSED, PARTS, PART, SUMS, OUT,
                ROWS, TAIL, COLUMNS, SLICE, STEP, WHOLE, TMA, PRECISION,
            )  # fmt: skip
        else:
            _tile(
                x, w, y, z, residual, also, bias, colsum, statistics, scale, sums, left, row, column, rows,
                columns, depth, channels, of_scale, stride_x, stride_w, stride_z, stride_residual, eps,
                EPILOGUE, ACTIVATION, NORM, SCALED, TRANSPOSED, PARTS, PART, SUMS, OUT,
                ROWS, COLUMNS, COLUMNS, SLICE, STEP, WHOLE, TMA, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            x, w, y, z, residual, also, bias, colsum, statistics, scale, sums, left, row, column, rows,
            columns, depth, channels, of_scale, stride_x, stride_w, stride_z, stride_residual, eps,
            EPILOGUE, ACTIVATION, NORM, SCALED, TRANSPOSED, PARTS, PART, SUMS, OUT,
            ROWS, COLUMNS, COLUMNS, SLICE, STEP, WHOLE, TMA, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "of_part"])
def weight_gradient(
    dz, x, columns_of_row, products, totals, rows, of_part, outputs, channels, stride_dz, stride_x,
    OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz^T x of a part of the rows, into `products` [parts, outputs, channels].

    `columns_of_row` [rows, 16] is one more operand beside x, in `totals` [parts, outputs, 16] is its product.
    """
    tiles = tl.cdiv(channels, CHANNELS)
    output = tl.program_id(0) // tiles * OUTPUTS
    channel = tl.program_id(0) % tiles * CHANNELS
    part = tl.program_id(1).to(tl.int64)
    j, k = output + tl.arange(0, OUTPUTS), channel + tl.arange(0, CHANNELS)
    c = tl.arange(0, 16)
    total = tl.zeros([OUTPUTS, CHANNELS], tl.float32)
    beside = tl.zeros([OUTPUTS, 16], tl.float32)
    first = tl.program_id(1) * of_part
    for start in range(first, tl.minimum(first + of_part, rows), STEP):
        if TMA:
            of_dz = dz.load([start, output])
            of_x = x.load([start, channel])
            of_row = columns_of_row.load([start, 0])
        else:
            m = start + tl.arange(0, STEP)
            there = (m < rows)[:, None]
            m = m.to(tl.int64)[:, None]
            of_dz = tl.load(dz + m * stride_dz + j[None, :], mask=there & (j < outputs)[None, :], other=0.0)
            of_x = tl.load(x + m * stride_x + k[None, :], mask=there & (k < channels)[None, :], other=0.0)
            of_row = tl.load(columns_of_row + m * 16 + c[None, :], mask=there, other=0.0)
        total = tl.dot(of_dz.T, of_x, total, input_precision=PRECISION)
        beside = tl.dot(of_dz.T, of_row, beside, input_precision=PRECISION)
    inside = (j < outputs)[:, None] & (k < channels)[None, :]
    at = (part * outputs + j)[:, None]
    tl.store(products + at * channels + k[None, :], total, mask=inside)
    if channel == 0:
        tl.store(totals + at * 16 + c[None, :], beside, mask=(j < outputs)[:, None])


@triton.jit(do_not_specialize=["parts"])
def add_parts(
    products, totals, weight, gamma, beta, dw, db, of_norm, parts, outputs, channels,
    MEANS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias, and, for OUTPUTS rows of the weight, those of gamma and beta.

    From dz^T x (`products`) and dz^T of [mean in three numbers, 1 in three] (`totals`): with MEANS the mean
    is taken off here. With gamma, dW = dW' gamma + db beta, and `of_norm` [tiles, 2, channels] gets the sums
    over the rows of dW' W and db W.
    """
    tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0) // tiles
    j = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    c = tl.arange(0, 16)
    inside = (j < outputs)[:, None] & (k < channels)[None, :]
    total = tl.zeros([OUTPUTS, CHANNELS], tl.float32)
    beside = tl.zeros([OUTPUTS, 16], tl.float32)
    for part in range(parts):
        at = (part.to(tl.int64) * outputs + j)[:, None]
        total += tl.load(products + at * channels + k[None, :], mask=inside, other=0.0)
        beside += tl.load(totals + at * 16 + c[None, :], mask=(j < outputs)[:, None], other=0.0)
    of_bias = tl.sum(tl.where((c >= 3) & (c < 6), beside, 0.0), 1)
    if MEANS:
        total -= tl.sum(tl.where(c < 3, beside, 0.0), 1)[:, None]
    if gamma is not None:
        at = j.to(tl.int64)[:, None] * channels + k[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        to = of_norm + tile.to(tl.int64) * 2 * channels + k
        tl.store(to, _sum_of_products(total, w, 0), mask=k < channels)
        tl.store(to + channels, _sum_of_products(w, of_bias[:, None], 0), mask=k < channels)
        total *= tl.load(gamma + k, mask=k < channels, other=0.0).to(tl.float32)[None, :]
        if beta is not None:
            shift = tl.load(beta + k, mask=k < channels, other=0.0).to(tl.float32)
            total += of_bias[:, None] * shift[None, :]
    tl.store(dw + j.to(tl.int64)[:, None] * channels + k[None, :], total, mask=inside)
    if db is not None:
        tl.store(db + j, of_bias, mask=(j < outputs) & (tl.program_id(0) % tiles == 0))
