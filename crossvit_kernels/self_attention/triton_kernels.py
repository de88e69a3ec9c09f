"""Triton kernels of self-attention, forward and backward. `reference.py` has the definition.

A program is a head of an image and a tile of its queries (`attend`, `to_queries`) or of its keys (`to_keys`),
which stays in registers, while it runs over all tokens of the other kind:

    attend      S = q k^T;  P = exp2(scale S - max);  y = P v / sum(P), max and sum as they become known
    to_queries  P from the saved log-sum-exp;  dP = dy v^T;  dS = P (dP - D);  dq = scale dS k
    to_keys     the same transposed;  dv = P^T dy;  dk = scale dS^T q

D = sum(dy y) of a query is written by `to_queries` for `to_keys`. Queries, keys and values are read where the
layer before left them, side by side. Five products a pair of tokens are needed, seven are done: the two of S
and dP again, which takes less time than sums over programs, and results are the same bits in every run. The
aim is the rate of the tensor cores at d = 64, that of the exponentials at d = 32.

Scores are in base 2: `scale` has log2(e) in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_dependent import wait


@triton.jit
def _program(tokens, heads, TILE: tl.constexpr):
    """Image, head and first token of this program; tiles of one head run side by side and share its keys."""
    tiles = tl.cdiv(tokens, TILE)
    head_of_batch = tl.program_id(0) // tiles
    return (head_of_batch // heads).to(tl.int64), head_of_batch % heads, tl.program_id(0) % tiles * TILE


@triton.jit
def _rows(
    base, n, tokens, stride_token, stride_channel, D: tl.constexpr, D_TILE: tl.constexpr, dtype: tl.constexpr
):
    """Channels of one head of the tokens n, [len(n), D_TILE]; zeros beyond both."""
    d = tl.arange(0, D_TILE)
    there = (n < tokens)[:, None] & (d < D)[None, :]
    x = tl.load(base + n[:, None] * stride_token + d[None, :] * stride_channel, mask=there, other=0.0)
    return x.to(dtype)


@triton.jit
def _write(base, n, tokens, stride_token, x, D: tl.constexpr, D_TILE: tl.constexpr):
    """Into a contiguous result."""
    d = tl.arange(0, D_TILE)
    there = (n < tokens)[:, None] & (d < D)[None, :]
    tl.store(base + n[:, None] * stride_token + d[None, :], x.to(base.dtype.element_ty), mask=there)


@triton.jit
def _add_keys(
    q, keys, start, tokens, stride_token, stride_channel, values, scale, largest, total, y,
    D: tl.constexpr, D_TILE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys and values from `start` on, into the running maximum, sum and result."""
    n = start + tl.arange(0, TILE)
    k = _rows(keys, n, tokens, stride_token, stride_channel, D, D_TILE, q.dtype)
    v = _rows(values, n, tokens, stride_token, stride_channel, D, D_TILE, q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where((n < tokens)[None, :], scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    p = tl.exp2(scores * scale - (new * scale)[:, None])
    shrink = tl.exp2((largest - new) * scale)
    total = total * shrink + tl.sum(p, 1)
    y = tl.dot(p.to(q.dtype), v, y * shrink[:, None], input_precision=PRECISION)
    return new, total, y


@triton.jit(do_not_specialize=["tokens", "heads"])
def attend(
    qkv, y, lse, tokens, heads, stride_batch, stride_token, stride_channel, scale,
    D: tl.constexpr, D_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
    SAVES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """y, and with SAVES the log-sum-exp of the scores in base 2, [B, H, N].

    TAIL keys are left after whole tiles, rounded up to a power of two of at least 16; 0 for none. They come
    first: behind the loop their products would wait for its last, which runs beside the next step.
    """
    wait(DEPENDENT)
    image, head, first = _program(tokens, heads, QUERIES)
    width = heads * D
    n = first + tl.arange(0, QUERIES)
    queries = qkv + image * stride_batch + head * D * stride_channel
    keys = queries + width * stride_channel
    values = keys + width * stride_channel
    q = _rows(queries, n, tokens, stride_token, stride_channel, D, D_TILE, DTYPE)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, D_TILE], tl.float32)
    whole = tokens // KEYS * KEYS
    if TAIL > 0:
        largest, total, sums = _add_keys(
            q, keys, whole, tokens, stride_token, stride_channel, values, scale, largest, total, sums,
            D, D_TILE, TAIL, True, PRECISION,
        )  # fmt: skip
    for start in range(0, whole, KEYS):
        largest, total, sums = _add_keys(
            q, keys, start, tokens, stride_token, stride_channel, values, scale, largest, total, sums,
            D, D_TILE, KEYS, False, PRECISION,
        )  # fmt: skip
    result = y + image * tokens * width + head * D
    _write(result, n, tokens, width, sums * (1.0 / total)[:, None], D, D_TILE)
    if SAVES:
        tl.store(lse + (image * heads + head) * tokens + n, largest * scale + tl.log2(total), mask=n < tokens)


@triton.jit
def _gradient_of_scores(
    q, grad, keys, values, start, tokens, stride_token, stride_channel, scale, norm, product, dq,
    D: tl.constexpr, D_TILE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the keys from `start` on add to the gradient of the queries, without its factor."""
    n = start + tl.arange(0, TILE)
    k = _rows(keys, n, tokens, stride_token, stride_channel, D, D_TILE, q.dtype)
    v = _rows(values, n, tokens, stride_token, stride_channel, D, D_TILE, q.dtype)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - norm[:, None])
    if MASKED:  # where no key is, a score of 0 may be far above the log-sum-exp
        p = tl.where((n < tokens)[None, :], p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    return tl.dot((p * (dp - product[:, None])).to(q.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "heads"])
def to_queries(
    qkv, y, dy, lse, products, dqkv, tokens, heads, stride_batch, stride_token, stride_channel, scale, factor,
    D: tl.constexpr, D_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, and D into `products` [B, H, N]; `factor` is the scale of the scores."""
    image, head, first = _program(tokens, heads, QUERIES)
    width = heads * D
    n = first + tl.arange(0, QUERIES)
    queries = qkv + image * stride_batch + head * D * stride_channel
    keys = queries + width * stride_channel
    values = keys + width * stride_channel
    of_image = image * tokens * width + head * D
    of_head = (image * heads + head) * tokens
    q = _rows(queries, n, tokens, stride_token, stride_channel, D, D_TILE, DTYPE)
    grad = _rows(dy + of_image, n, tokens, width, 1, D, D_TILE, tl.float32)
    product = tl.sum(grad * _rows(y + of_image, n, tokens, width, 1, D, D_TILE, tl.float32), 1)
    tl.store(products + of_head + n, product, mask=n < tokens)
    grad = grad.to(DTYPE)
    norm = tl.load(lse + of_head + n, mask=n < tokens, other=float("inf"))  # p = 0 where no query is
    dq = tl.zeros([QUERIES, D_TILE], tl.float32)
    whole = tokens // KEYS * KEYS
    if TAIL > 0:
        dq = _gradient_of_scores(
            q, grad, keys, values, whole, tokens, stride_token, stride_channel, scale, norm, product, dq,
            D, D_TILE, TAIL, True, PRECISION,
        )  # fmt: skip
    for start in range(0, whole, KEYS):
        dq = _gradient_of_scores(
            q, grad, keys, values, start, tokens, stride_token, stride_channel, scale, norm, product, dq,
            D, D_TILE, KEYS, False, PRECISION,
        )  # fmt: skip
    _write(dqkv + 3 * image * tokens * width + head * D, n, tokens, 3 * width, dq * factor, D, D_TILE)


@triton.jit(do_not_specialize=["tokens", "heads"])
def to_keys(
    qkv, dy, lse, products, dqkv, tokens, heads, stride_batch, stride_token, stride_channel, scale, factor,
    D: tl.constexpr, D_TILE: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. Queries beyond the last have an infinite norm, so that p = 0."""
    image, head, first = _program(tokens, heads, KEYS)
    width = heads * D
    n = first + tl.arange(0, KEYS)
    queries = qkv + image * stride_batch + head * D * stride_channel
    keys = queries + width * stride_channel
    values = keys + width * stride_channel
    of_image = image * tokens * width + head * D
    of_head = (image * heads + head) * tokens
    k = _rows(keys, n, tokens, stride_token, stride_channel, D, D_TILE, DTYPE)
    v = _rows(values, n, tokens, stride_token, stride_channel, D, D_TILE, DTYPE)
    dk = tl.zeros([KEYS, D_TILE], tl.float32)
    dv = tl.zeros([KEYS, D_TILE], tl.float32)
    for start in range(0, tokens, QUERIES):
        m = start + tl.arange(0, QUERIES)
        q = _rows(queries, m, tokens, stride_token, stride_channel, D, D_TILE, DTYPE)
        grad = _rows(dy + of_image, m, tokens, width, 1, D, D_TILE, DTYPE)
        norm = tl.load(lse + of_head + m, mask=m < tokens, other=float("inf"))
        product = tl.load(products + of_head + m, mask=m < tokens, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - norm[None, :])
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dv = tl.dot(p.to(DTYPE), grad, dv, input_precision=PRECISION)
        dk = tl.dot((p * (dp - product[None, :])).to(DTYPE), q, dk, input_precision=PRECISION)
    result = dqkv + 3 * image * tokens * width + head * D
    _write(result + width, n, tokens, 3 * width, dk * factor, D, D_TILE)
    _write(result + 2 * width, n, tokens, 3 * width, dv, D, D_TILE)
