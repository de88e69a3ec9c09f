"""Triton kernels of the attention over the tokens, forward and backward, each for both directions of a fusion
at once (program_id(1) picks one). `absorbed.py` has the formulas.

A program is an image and a part of its tokens. The channels are cut into slices, one for each warp, and these
into pieces of powers of two (448 is 4 slices of 32 + 32 + 32 + 16), which all stay on the multiprocessor:
operands are [slices, tokens, channels], the products of a slice belong to one warp, and only scores are
summed over the slices. Each token is read once (by `attend_backward` once for every 8 heads, by `attend` for
every `head_tile`): these kernels aim at the memory's bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_dependent import wait
from .triton_buffers import (
    CLS,
    D_ROW,
    D_U,
    LN2,
    PAIRS,
    PER_HEAD,
    Z,
    blocks,
    load,
    padded,
    part_columns,
    saved_columns,
    scratch_columns,
    sum_of_products,
    vector,
)


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
        variance += tl.sum(sum_of_products(x, x, 2), 0)
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
        x = load(saved, CLS * padded(d.width) + c, inside)
        pieces = pieces + (x,)
        mean += tl.sum(tl.sum(x, 1), 0)
    mean /= d.width
    variance = 0.0
    centred = ()
    for i in tl.static_range(len(d.widths)):
        x = tl.where(_columns(d, i)[1], pieces[i] - mean, 0.0)
        variance += tl.sum(sum_of_products(x, x, 1), 0)
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
        key = load(saved, (Z + d.heads + h[None, None, :]) * padded(d.width) + c, valid)
        query = (key * vector(d.gamma, c, inside)).to(d.dtype)
        queries = queries + (query,)
        sums += tl.sum(tl.sum(query.to(tl.float32), 1), 0)
        scores += tl.sum(sum_of_products(query.to(tl.float32), hat[i][:, :, None], 1), 0)
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

        # The CLS token is the first row of the first part. In the others its score is -inf: their first step
        # rescales by 0 what is here.
        leads = split == 0
        kept = tl.full([d.head_tile], 1.0, tl.float32)
        if d.seed is not None:
            kept = _kept(d, image, h, tl.zeros_like(h), tokens, threshold, keep_scale)
        if d.attention is not None:
            tl.store(d.attention + (image * d.heads + h) * tokens, first_score, mask=present & leads)
        largest = tl.where(leads, first_score, float("-inf"))
        total = tl.full([d.head_tile], 1.0, tl.float32)
        dropped_total = kept
        shifts = tl.zeros([d.head_tile], tl.float32)
        z = ()
        for i in tl.static_range(len(d.widths)):
            z = z + (hat[i][:, None, :] * _doubled(kept)[None, :, None],)

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
            shifts = shifts * rescale + sum_of_products(weights.to(tl.float32), shift[:, None], 0)
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
            part = d.parts + (image * splits + split) * d.heads * part_columns(d.width)
            out = part + of_row * part_columns(d.width)
            numbers = part + h * part_columns(d.width) + padded(d.width)
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
    BOTH: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """z_h = sum_n softmax_n(query_h . x^_n) x^_n over an image's tokens, with an online softmax in base 2.

    A program: one image, one of `splits` parts of its tokens, `head_tile` heads; TOKENS tokens a step:
    scores [TOKENS, heads] = tokens [TOKENS, width] queries [width, heads], then z [width, heads] from the
    same tokens transposed. Copies the tokens to `copy` on the way, if there is one.
    """
    wait(DEPENDENT)
    if BOTH and tl.program_id(1) == 1:
        _attend(b, batch, patches_b, splits_b, eps, threshold, keep_scale, TOKENS, PRECISION)
    else:
        _attend(a, batch, patches_a, splits_a, eps, threshold, keep_scale, TOKENS, PRECISION)


# Backward


@triton.jit
def _pairs(d, saved, heads, tile, piece: tl.constexpr):
    """Rows of a head tile, [slices, 16, channels]: a head's query and the gradient of its z in turn."""
    c, inside = _columns(d, piece)
    row = tl.arange(0, 2 * PAIRS)
    h = tile * PAIRS + row // 2
    c = c[:, None, :]
    inside = inside[:, None, :]
    valid = (h < d.heads)[None, :, None] & inside
    is_query = (row % 2 == 0)[None, :, None]
    query = load(saved, (Z + d.heads + h)[None, :, None] * padded(d.width) + c, valid & is_query)
    d_z = load(heads, h[None, :, None] * padded(d.width) + c, valid & (row % 2 == 1)[None, :, None])
    return ((query + d_z) * vector(d.gamma, c, inside)).to(d.dtype)


@triton.jit
def _numbers_of_heads(d, saved, numbers, tile):
    """Of the heads of a tile: the log-sum-exp, sum_n p_n dp_n, the gradient of the attention's sum."""
    h = tile * PAIRS + tl.arange(0, PAIRS)
    present = h < d.heads
    lse = load(saved + (Z + 2 * d.heads) * padded(d.width), h, present)
    return lse, load(numbers, h, present), load(numbers + padded(d.heads), h, present)


@triton.jit
def _softmax_backward(d, image, tile, products, n, valid, tokens, of_heads, threshold, keep_scale):
    """From scores and dz . x^ in turn, [tokens, 16]: ds and the p that multiplies dz, in turn."""
    h = tile * PAIRS + tl.arange(0, PAIRS)
    present = h < d.heads
    scores, d_p = tl.split(tl.reshape(products, (products.shape[0], PAIRS, 2)))
    lse, sums, d_sums = of_heads
    p = tl.where(valid[:, None] & present[None, :], tl.exp2(scores - lse[None, :]), 0.0)
    dropped = p
    if d.seed is not None:
        kept = _kept(d, image, h[None, :], n[:, None], tokens, threshold, keep_scale)
        dropped = p * kept
        d_p = (d_p + d_sums[None, :]) * kept
    if d.d_attention is not None:
        address = (image * d.heads + h)[None, :] * tokens + n[:, None]
        d_p += load(d.d_attention, address, valid[:, None] & present[None, :])
    d_scores = LN2 * p * (d_p - sums[None, :])
    return tl.reshape(tl.join(d_scores, dropped), (products.shape[0], 2 * PAIRS))


@triton.jit
def _all_pairs(d, saved, heads, tile, hat):
    """The pairs of all pieces, their sums and their products with x^_0."""
    pairs = ()
    sums = tl.zeros([2 * PAIRS], tl.float32)
    products = tl.zeros([2 * PAIRS], tl.float32)
    for i in tl.static_range(len(d.widths)):
        pair = _pairs(d, saved, heads, tile, i)
        pairs = pairs + (pair,)
        sums += _over_channels(pair.to(tl.float32))
        products += tl.sum(sum_of_products(pair.to(tl.float32), hat[i][:, None, :], 2), 0)
    return pairs, sums, products


@triton.jit
def _add_d_cls_row(
    d, scratch, leads, pairs, pair_sums, products, coefficients, hat, rstd, ADDS: tl.constexpr
):
    """The gradient of c as the first row of the attention, as _add_d_patches has it of the others."""
    mean_plain = sum_of_products(coefficients, pair_sums, 0) / d.width
    mean_against = sum_of_products(coefficients, products, 0) / d.width
    for i in tl.static_range(len(d.widths)):
        c, inside = _columns(d, i)
        at = scratch + D_ROW * padded(d.width) + c
        d_hat = sum_of_products(coefficients[None, :, None], pairs[i].to(tl.float32), 1)
        value = rstd * (d_hat - mean_plain - hat[i] * mean_against)
        if ADDS:
            value += load(at, 0, inside & leads)
            tl.debug_barrier()  # lanes that share an element have all read it before one of them writes it
        tl.store(at, value, mask=inside & leads)


@triton.jit
def _attend_backward(
    d, batch, patches, splits, tile, eps, threshold, keep_scale,
    ADDS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if (image < batch) & (tile * PAIRS < d.heads):
        tokens = patches + 1
        saved = d.saved + image * saved_columns(d.width, d.heads)
        scratch = d.scratch + image * scratch_columns(d.width, d.own_width, d.heads)
        heads = scratch + D_U * padded(d.width)
        numbers = heads + PER_HEAD * d.heads * padded(d.width)
        leads = split == 0
        begin, end = _part(patches, split, splits, TOKENS)

        of_heads = _numbers_of_heads(d, saved, numbers, tile)
        hat, rstd_cls = _normalised_cls(d, saved, eps)
        pairs, pair_sums, cls_products = _all_pairs(d, saved, heads, tile, hat)
        zero = tl.zeros([1], tl.int32)
        of_row = _softmax_backward(
            d, image, tile, cls_products[None, :], zero, zero == 0, tokens, of_heads, threshold, keep_scale
        )
        # The CLS token is the first row of the first part.
        of_cls = tl.where(leads, tl.reshape(of_row, (2 * PAIRS,)), 0.0)
        _add_d_cls_row(d, scratch, leads, pairs, pair_sums, cls_products, of_cls, hat, rstd_cls, ADDS)
        shifts = tl.zeros([2 * PAIRS], tl.float32)
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
            partial = tl.zeros([d.slices, TOKENS, 2 * PAIRS], tl.float32)
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
                sum_of_products(rounded.to(tl.float32), pair_sums[None, :], 1) / d.width,
                sum_of_products(rounded.to(tl.float32), products, 1) / d.width,
            )
            scaled = (coefficients * scale[:, None]).to(d.dtype)
            seen = scaled.to(tl.float32)
            unscale = tl.where(scale > 0, 1 / scale, 0.0)
            shifts += sum_of_products(seen, shift[:, None], 0)
            excess += sum_of_products(seen, unscale[:, None], 0)
            of_tokens = tl.broadcast_to(rounded[None, :, :], [d.slices, TOKENS, 2 * PAIRS])
            of_pairs = tl.broadcast_to(tl.trans(scaled)[None, :, :], [d.slices, 2 * PAIRS, TOKENS])
            added = ()
            for i in tl.static_range(len(d.widths)):
                product = tl.dot(of_pairs, operands[i], d_pairs[i], input_precision=PRECISION)
                added = added + (product,)
            d_pairs = added
            if d.d_patches is not None:
                for i in tl.static_range(len(d.widths)):
                    d_hat = tl.dot(of_tokens, pairs[i], input_precision=PRECISION)
                    _add_d_patches(d, image, start, n, valid, i, d_hat, pieces[i], mean, rstd, means, ADDS)

        _store_d_queries(d, image * splits + split, tile, d_pairs, shifts, excess)


@triton.jit
def _store_d_queries(d, part, tile, d_pairs, shifts, excess):
    """Of the pairs' gradients those of the queries, and the sums that are still to be taken off them."""
    row = tl.arange(0, 2 * PAIRS)
    h = tile * PAIRS + row // 2
    wanted = (row % 2 == 0) & (h < d.heads)
    out = d.parts + (part * d.heads + h) * part_columns(d.width)
    tl.store(out + padded(d.width), shifts, mask=wanted)
    tl.store(out + padded(d.width) + 1, excess, mask=wanted)
    for i in tl.static_range(len(d.widths)):
        c, inside = _columns(d, i)
        mask = wanted[None, :, None] & inside[:, None, :]
        tl.store(out[None, :, None] + c[:, None, :], d_pairs[i], mask=mask)


@triton.jit
def _add_d_patches(
    d, image, start, n, valid, piece: tl.constexpr, d_hat, x, mean, rstd, means, ADDS: tl.constexpr
):
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
    if ADDS:
        value += load(address, 0, mask)
    elif d.d_copy is not None:
        incoming = d.d_copy + image * d.d_copy_batch + start.to(tl.int64) * d.d_copy_token
        value += load(_at(incoming, n, d.d_copy_token, c, d.d_copy_channel), 0, mask)
    tl.store(address, value.to(d.d_patches.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["batch", "patches_a", "patches_b", "splits_a", "splits_b", "tile", "threshold"]
)
def attend_backward(
    a, b, batch, patches_a, patches_b, splits_a, splits_b, tile, eps, threshold: tl.int64, keep_scale,
    BOTH: tl.constexpr, ADDS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens and of the absorbed queries, in one pass with the softmax from its saved sum.

    A program: one image, one of `splits` parts of its tokens, the 8 heads of `tile`; all tiles but the first
    are launched after it and add (ADDS) to the gradients of the tokens. Query and dz of a head are two rows
    of one operand G [16, width], so that each product is a full tile of the tensor cores: scores and dz . x^
    = tokens G^T [TOKENS, 16]; their gradients E [TOKENS, 16]; dx^ = E G [TOKENS, width]; dG = E^T tokens
    [16, width].
    """
    if BOTH and tl.program_id(1) == 1:
        _attend_backward(
            b, batch, patches_b, splits_b, tile, eps, threshold, keep_scale, ADDS, TOKENS, PRECISION
        )
    else:
        _attend_backward(
            a, batch, patches_a, splits_a, tile, eps, threshold, keep_scale, ADDS, TOKENS, PRECISION
        )
