"""What the Triton kernels of the chain of the CLS token share: B rows, ROWS of them a program, through
LayerNorm, GELU and linear layers, and back."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_buffers import (
    LOG2E,
    ROWS,
    blocks,
    load,
    vector,
)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    density = 0.3989422804014327 * tl.exp2(-0.5 * LOG2E * x * x)
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def statistics(x, stride, in_batch, width: tl.constexpr, BLOCK: tl.constexpr, eps):
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
def norm_means(d_norm, x, stride, gamma, mean, rstd, in_batch, width: tl.constexpr, BLOCK: tl.constexpr):
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
def norm_backward(d_norm, x, stride, gamma, mean, rstd, means, k, in_batch, width: tl.constexpr):
    """Columns k of the gradient of x, from that of LayerNorm's output: r (g - mean(g) - x^ mean(g x^))."""
    valid = in_batch & (k < width)
    g = load(d_norm, k, valid) * vector(gamma, k, k < width)
    hat = (load(x, k * stride, valid) - mean) * rstd
    return tl.where(valid, rstd * (g - means[0] - hat * means[1]), 0.0)


@triton.jit
def norm_gelu_linear(
    x, stride, norm, linear, in_batch, columns, eps,
    width: tl.constexpr, out: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of Linear(GELU(LayerNorm(x))). `norm` is (gamma, beta), `linear` is (weight, stride, bias)."""
    mean, rstd = statistics(x, stride, in_batch, width, BLOCK, eps)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = (k < width)[None, :]
        hat = (load(x, k[None, :] * stride, in_batch & inside) - mean) * rstd
        normed = hat * vector(norm[0], k[None, :], inside) + vector(norm[1], k[None, :], inside)
        weight = transposed(linear[0], linear[1], columns, k, out, width)
        total = tl.dot(gelu(normed).to(weight.dtype), weight, total, input_precision=PRECISION)
    return total + vector(linear[2], columns[None, :], columns[None, :] < out)


@triton.jit
def transposed(weight, stride, rows, columns, out: tl.constexpr, width: tl.constexpr):
    """W^T [columns, rows] of a weight [out, width]."""
    valid = (columns[:, None] < width) & (rows[None, :] < out)
    return tl.load(weight + rows[None, :].to(tl.int64) * stride + columns[:, None], mask=valid, other=0.0)


@triton.jit
def matrix(weight, stride, rows, columns, out: tl.constexpr, width: tl.constexpr):
    """W [rows, columns] of a weight [out, width]."""
    valid = (rows[:, None] < out) & (columns[None, :] < width)
    return tl.load(weight + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=valid, other=0.0)


@triton.jit
def tile(width: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] and columns [BLOCK] of this program's tile of a result [batch, width]."""
    tiles = blocks(width, BLOCK)
    rows = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    return rows[:, None], tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def head_tile(heads: tl.constexpr):
    """Rows [ROWS, 1] and the head of this program."""
    rows = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    return rows[:, None], tl.program_id(0) % heads
