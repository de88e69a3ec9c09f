"""Triton kernels of the patch embedding.

    embed   tokens = patches Wᵀ, with bias, position and the CLS token
    place   tokens from what convolutions have made of patches, with position and the CLS token
    cut     the image resized, its bytes standardised, and cut into patches: what `embed` reads instead of an
            image that is not yet as the weight wants it, and what the weight's gradient is a product of

A token is a row: token 0 of each image is the CLS token, whose patch is all zeros, the others are patches of
p x p pixels. In `embed` they need not be written anywhere: a program finds the pixels of its 128 tokens by
themselves, row(token) + column(channel, line, pixel of the patch), in runs of p pixels.

                 3 p p, 32 a step
     tokens 128 [ pixels -> ]  @  [ W -> ]ᵀ  channels 128  =  accumulators  ->  | slice | slice |  ->  tokens

`embed` is bound by the bytes of image and tokens on all but the widest models. `cut` interpolates along lines
and across them one after the other, eight multiplications a pixel instead of sixteen, and is bound by its
instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..linear.triton_kernels import slices_of
from ..triton_dependent import wait


@triton.jit
def _row_of(
    token, tokens, patches_a_line, stride_image, stride_line, stride_pixel,
    SIDE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Where the patch of each token begins, a multiple of RUN; that of a CLS token is the first one's."""
    patch = tl.maximum(token % tokens - 1, 0)
    line, pixel = patch // patches_a_line * SIDE, patch % patches_a_line * SIDE
    at = (token // tokens).to(tl.int64) * stride_image + line.to(tl.int64) * stride_line
    return tl.multiple_of(at + pixel * stride_pixel, RUN)


@triton.jit
def _column_of(k, stride_plane, stride_line, stride_pixel, SIDE: tl.constexpr, RUN: tl.constexpr):
    """Where element k of a patch lies in it, channel by channel, line by line; RUN of them side by side."""
    plane, line, pixel = k // (SIDE * SIDE), k // SIDE % SIDE, k % SIDE
    at = plane * stride_plane + line * stride_line + pixel * stride_pixel
    return tl.max_contiguous(tl.multiple_of(at, RUN), RUN)


@triton.jit(do_not_specialize=["rows", "tokens", "patches_a_line"])
def embed(
    image, weight, bias, position, cls_token, y, rows, channels, depth, tokens, patches_a_line,
    stride_image, stride_plane, stride_line, stride_pixel, stride_weight, stride_position,
    SIDE: tl.constexpr, RUN: tl.constexpr, IS_CUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SLICE: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """y [rows, channels], contiguous; rows are tokens of all images, `tokens` of each.

    IS_CUT: `image` is [rows, depth] from `cut`, `stride_image` apart. RUN: pixels that lie side by side, at a
    multiple of their number, from wherever a patch's line is cut at such multiples. WHOLE: depth is a
    multiple of STEP.
    """
    wait(DEPENDENT)
    tiles = tl.cdiv(channels, COLUMNS)
    row, column = tl.program_id(0) // tiles * ROWS, tl.program_id(0) % tiles * COLUMNS
    m, n = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    is_patch = (m < rows) & (m % tokens > 0)
    first = tl.minimum(m, rows - 1)
    if IS_CUT:
        at_rows = first.to(tl.int64) * stride_image
    else:
        at_rows = _row_of(first, tokens, patches_a_line, stride_image, stride_line, stride_pixel, SIDE, RUN)
    steps = tl.arange(0, STEP)
    at_w = weight + tl.minimum(n, channels - 1).to(tl.int64)[:, None] * stride_weight + steps[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, depth, STEP, loop_unroll_factor=1):
        k = start + steps
        at = k if IS_CUT else _column_of(k, stride_plane, stride_line, stride_pixel, SIDE, RUN)
        inside = is_patch[:, None] if WHOLE else is_patch[:, None] & (k < depth)[None, :]
        pixels = tl.load(image + at_rows[:, None] + at[None, :], mask=inside, other=0.0)
        of_w = tl.load(at_w) if WHOLE else tl.load(at_w, mask=(k < depth)[None, :], other=0.0)
        total = tl.dot(pixels, of_w.T, total, input_precision=PRECISION)
        at_w += STEP
    slices = slices_of(total, ROWS, COLUMNS, SLICE)
    for i in tl.static_range(COLUMNS // SLICE):
        j = column + i * SLICE + tl.arange(0, SLICE)
        valid = (m < rows)[:, None] & (j < channels)[None, :]
        added = tl.load(cls_token + j, mask=j < channels, other=0.0).to(tl.float32)
        if bias is not None:
            of_patch = tl.load(bias + j, mask=j < channels, other=0.0).to(tl.float32)
        else:
            of_patch = tl.zeros([SLICE], tl.float32)
        # Not slices[i] of the CLS token: zeros times an infinite weight.
        value = tl.where(is_patch[:, None], slices[i] + of_patch[None, :], added[None, :])
        at = position + (m % tokens)[:, None] * stride_position + j[None, :]
        value += tl.load(at, mask=valid, other=0.0).to(tl.float32)
        tl.store(y + m.to(tl.int64)[:, None] * channels + j[None, :], value, mask=valid)


@triton.jit(do_not_specialize=["height", "width", "tokens", "patches_a_line"])
def cut(
    image, lines, line_weights, pixels, pixel_weights, levels, patches, planes, height, width, old_width,
    tokens, patches_a_line, stride_image, stride_plane, stride_line, stride_pixel, SIDE: tl.constexpr,
    RESIZED: tl.constexpr, LINES: tl.constexpr, PIXELS: tl.constexpr, WINDOW: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """[B * tokens, planes * SIDE * SIDE]; the rows of the CLS tokens are left as they are.

    height, width: of the whole patches. RESIZED: by the four `lines` and `pixels` [4, …] that each one is the
    sum of; those of PIXELS pixels side by side lie within WINDOW, which begins at a multiple of 8. levels:
    None, or [2, planes], what a byte is multiplied by, and what is added.
    """
    wait(DEPENDENT)
    of_height, of_width = tl.cdiv(height, LINES), tl.cdiv(width, PIXELS)
    tile, plane = tl.program_id(0) % (of_height * of_width), tl.program_id(0) // (of_height * of_width)
    b = (plane // planes).to(tl.int64)
    plane %= planes
    i = tile // of_width * LINES + tl.arange(0, LINES)
    j = tile % of_width * PIXELS + tl.arange(0, PIXELS)
    valid = (i < height)[:, None] & (j < width)[None, :]
    of_plane = image + b * stride_image + plane.to(tl.int64) * stride_plane
    if RESIZED:
        # All that these pixels are sums of, first over the lines, then over the pixels of a line.
        start = tl.load(pixels + tile % of_width * PIXELS) // 8 * 8
        window = start + tl.arange(0, WINDOW)
        of_lines = tl.zeros([LINES, WINDOW], tl.float32)
        for up in tl.static_range(4):
            line = tl.load(lines + up * height + i, mask=i < height, other=0).to(tl.int64)
            by = tl.load(line_weights + up * height + i, mask=i < height, other=0.0)
            at = of_plane + line[:, None] * stride_line + window[None, :] * stride_pixel
            of_lines += tl.load(at, mask=(window < old_width)[None, :], other=0).to(tl.float32) * by[:, None]
        value = tl.zeros([LINES, PIXELS], tl.float32)
        for left in tl.static_range(4):
            pixel = tl.load(pixels + left * width + j, mask=j < width, other=0) - start
            by = tl.load(pixel_weights + left * width + j, mask=j < width, other=0.0)
            index = tl.broadcast_to(tl.where(j < width, pixel, 0)[None, :], [LINES, PIXELS])
            value += tl.gather(of_lines, index, 1) * by[None, :]
    else:
        at = of_plane + i.to(tl.int64)[:, None] * stride_line + j[None, :] * stride_pixel
        value = tl.load(at, mask=valid, other=0).to(tl.float32)
    if levels is not None:
        value = value * tl.load(levels + plane) + tl.load(levels + planes + plane)
    patch = (i // SIDE * patches_a_line)[:, None] + (j // SIDE)[None, :]
    k = plane * SIDE * SIDE + (i % SIDE * SIDE)[:, None] + (j % SIDE)[None, :]
    row = b * tokens + 1 + patch
    tl.store(patches + row * (planes * SIDE * SIDE) + k, value, mask=valid)


@triton.jit(do_not_specialize=["tokens"])
def place(
    patches, position, cls_token, y, tokens, channels,
    stride_image, stride_token, stride_channel, stride_position,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """y [B, tokens, channels], contiguous: the CLS token in front of the patches, with position.

    Patches may lie channel by channel, as convolutions leave them: the tile changes its layout in between.
    """
    wait(DEPENDENT)
    tiles = tl.cdiv(channels, CHANNELS)
    of_image = tl.cdiv(tokens, TOKENS) * tiles
    b = (tl.program_id(0) // of_image).to(tl.int64)
    tile = tl.program_id(0) % of_image
    n = tile // tiles * TOKENS + tl.arange(0, TOKENS)
    c = tile % tiles * CHANNELS + tl.arange(0, CHANNELS)
    inside = (n < tokens)[:, None] & (c < channels)[None, :]
    at = b * stride_image + (n - 1).to(tl.int64)[:, None] * stride_token + c[None, :] * stride_channel
    value = tl.load(patches + at, mask=inside & (n > 0)[:, None], other=0.0).to(tl.float32)
    cls = tl.load(cls_token + c, mask=c < channels, other=0.0).to(tl.float32)
    value += tl.where((n == 0)[:, None], cls[None, :], 0.0)
    at = position + n[:, None] * stride_position + c[None, :]
    value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + (b * tokens + n[:, None]) * channels + c[None, :], value, mask=inside)
