"""What the Triton kernels have in common: where their intermediates are, and how they are read.

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
PAIRS = tl.constexpr(8)  # heads whose query and gradient of z are such a tile
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
def part_columns(width):
    """Columns of `parts`, which the programs of one image leave for a head: a row and two numbers."""
    return padded(width) + 16


@triton.constexpr_function
def head_block(head_width):
    """The channels of a head as a side of a matrix product: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(head_width))


@triton.constexpr_function
def blocks(width, block):
    """How many blocks cover the width."""
    return (width + block - 1) // block


@triton.jit
def sum_of_products(x, y, axis: tl.constexpr):
    """sum(x y), alike in all lanes that hold it. Compilers contract a product with the addition after it;
    where that adds the products of two lanes, each rounds only the other's. An explicit fma is left alone."""
    return tl.sum(tl.fma(x, y, 0.0), axis)


@triton.jit
def saved_rows(d, rows):
    """Addresses of images in `saved`."""
    return d.saved + rows.to(tl.int64) * saved_columns(d.width, d.heads)


@triton.jit
def scratch_rows(d, rows):
    """Addresses of images in `scratch`."""
    return d.scratch + rows.to(tl.int64) * scratch_columns(d.width, d.own_width, d.heads)


@triton.jit
def own_scratch_rows(d, rows):
    """Where in `scratch` the columns of the CLS token's own width begin."""
    before = (D_U + PER_HEAD * d.heads) * padded(d.width) + 2 * padded(d.heads)
    return scratch_rows(d, rows) + before


@triton.jit
def load(pointer, offsets, valid):
    """Elements in float32, zero where not valid."""
    return tl.load(pointer + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def vector(pointer, columns, valid):
    """Elements of a weight vector in float32, zero where there is none."""
    if pointer is None:
        return tl.zeros(columns.shape, tl.float32)
    else:
        return tl.load(pointer + columns, mask=valid, other=0.0).to(tl.float32)
