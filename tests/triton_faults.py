"""Faults for the Triton kernels, each of which some test of `test_gpu_kernels.py` has to catch."""

from __future__ import annotations

from tests.seeded_faults import Fault

_TOKENS = "crossvit_kernels/cross_attention/triton_tokens.py"
_ROWS = "crossvit_kernels/cross_attention/triton_rows.py"
_CHAIN = "crossvit_kernels/cross_attention/triton_chain.py"
_CHAIN_BACKWARD = "crossvit_kernels/cross_attention/triton_chain_backward.py"
_PARAMETERS = "crossvit_kernels/cross_attention/triton_parameters.py"
_LAUNCH = "crossvit_kernels/cross_attention/triton_launch.py"
_GPU = "crossvit_kernels/cross_attention/gpu.py"

# Each keeps the number of lines, so that kernels it does not touch need not be compiled again.
TRITON_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "the variance of c counts the padding of the last block",
            _ROWS,
            "centred = tl.where(valid, load(x, k * stride, valid) - mean, 0.0)",
            "centred = load(x, k * stride, valid) - mean",
        ),
        (
            "the variance of the tokens counts the padding of the last piece",
            _TOKENS,
            "x = tl.where(_columns(d, i)[1][:, None, :], x, 0.0)",
            "x = x + 0.0",
        ),
        (
            "LayerNorm's backward drops the product with x^",
            _ROWS,
            "rstd * (g - means[0] - hat * means[1])",
            "rstd * (g - means[0])",
        ),
        (
            "GELU's derivative lacks its second term",
            _ROWS,
            "return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density",
            "return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + 0.0 * density",
        ),
        (
            "a head reads channels of the next one",
            _CHAIN,
            "channel = tl.where(j < head_width, head * head_width + j, d.width)  # width is out",
            "channel = tl.minimum(head * head_width + j, d.width)  # width is out",
        ),
        (
            "the query has no bias",
            _CHAIN,
            "q += vector(d.bq, channel[None, :], channel[None, :] < d.width)",
            "q += 0.0 * vector(d.bq, channel[None, :], channel[None, :] < d.width)",
        ),
        (
            "the parts of an image are merged with equal weights",
            _CHAIN,
            "w = tl.exp2(load(part + i * step, padded(d.width), in_batch) - lse)",
            "w = tl.full([ROWS, 1], 1.0, tl.float32) / splits",
        ),
        (
            "the sum of the dropped attention is forgotten for beta",
            _CHAIN,
            "u = merged * vector(d.gamma, k[None, :], inside) + total * vector(d.beta, k[None, :], inside)",
            "u = merged * vector(d.gamma, k[None, :], inside) + vector(d.beta, k[None, :], inside)",
        ),
        (
            "the scale is left out of the residual",
            _CHAIN,
            "        y *= load(d.scale",
            "        load(d.scale",
        ),
        (
            "the residual is left out",
            _CHAIN,
            "y += load(saved, CLS * padded(d.width) + columns[None, :], valid)",
            "y += 0.0",
        ),
        (
            "tokens beyond the end take part in the softmax",
            _TOKENS,
            'scores = tl.where(valid[:, None], scores, float("-inf"))',
            "scores = tl.where(valid[:, None], scores, scores)",
        ),
        (
            "the online softmax does not rescale z",
            _TOKENS,
            "of_heads, operands[i], z[i] * rescales[None, :, None], input_precision=PRECISION",
            "of_heads, operands[i], z[i], input_precision=PRECISION",
        ),
        (
            "the means are not taken off the scores",
            _TOKENS,
            "scores = scale[:, None] * (scores - shift[:, None] * query_sums[None, :])",
            "scores = scale[:, None] * scores",
        ),
        (
            "the means are not taken off z",
            _TOKENS,
            "value = (z[i] - _doubled(shifts)[None, :, None]) / _doubled(total)[None, :, None]",
            "value = z[i] / _doubled(total)[None, :, None]",
        ),
        (
            "every part of an image starts with the CLS token",
            _TOKENS,
            'largest = tl.where(leads, first_score, float("-inf"))',
            "largest = first_score",
        ),
        (
            "dropout is forgotten for the CLS token",
            _TOKENS,
            "kept = _kept(d, image, h, tl.zeros_like(h), tokens, threshold, keep_scale)",
            "kept = tl.full([d.head_tile], 1.0, tl.float32)",
        ),
        (
            "both directions drop the same attention",
            _TOKENS,
            "stream = tl.full(low.shape, d.stream, tl.uint32)",
            "stream = tl.full(low.shape, 0, tl.uint32)",
        ),
        (
            "the copy of the tokens misses the last channels",
            _TOKENS,
            "tl.store(address, pieces[i], mask=valid[None, :, None] & inside[:, None, :])",
            "tl.store(address, pieces[i], mask=valid[None, :, None] & (c + 1 < d.width)[:, None, :])",
        ),
        (
            "the softmax's gradient does not subtract its sum",
            _TOKENS,
            "d_scores = LN2 * p * (d_p - sums[None, :])",
            "d_scores = LN2 * p * d_p",
        ),
        (
            "the gradient of the returned attention is dropped too",
            _TOKENS,
            "d_p += load(d.d_attention, address, valid[:, None] & present[None, :])",
            "d_p += 0.0 * load(d.d_attention, address, valid[:, None] & present[None, :])",
        ),
        (
            "the tokens' gradient is not centred",
            _TOKENS,
            "value = (d_hat - means[0][None, :, None]) * rstd[None, :, None] - along",
            "value = d_hat * rstd[None, :, None] - along",
        ),
        (
            "the gradient of the copied tokens is lost",
            _TOKENS,
            "value += load(_at(incoming",
            "load(_at(incoming",
        ),
        (
            "the gradient of the queries is stored for every second head",
            _TOKENS,
            "wanted = (row % 2 == 0) & (h < d.heads)",
            "wanted = (row % 4 == 0) & (h < d.heads)",
        ),
        (
            "more heads than a tile replace the tokens' gradient instead of adding to it",
            _TOKENS,
            "value += load(address, 0, mask)",
            "value += 0.0 * load(address, 0, mask)",
        ),
        (
            "what comes in for the copy is added for every tile of heads",
            _TOKENS,
            "    elif d.d_copy is not None:",
            "    if d.d_copy is not None:",
        ),
        (
            "rounding left of the sum of ds stays in the queries' gradient",
            _CHAIN_BACKWARD,
            "excess = tl.where(sums > 0, excess / sums, 0.0)",
            "excess = tl.where(sums > 0, 0.0, 0.0) + 0.0 * excess",
        ),
        (
            "the CLS token's gradient as a row of the attention is lost",
            _CHAIN_BACKWARD,
            " + load(scratch, D_ROW * width + k, valid) + through",
            " + through",
        ),
        (
            "gamma's gradient through the key is lost",
            _CHAIN_BACKWARD,
            "d_gamma += d_absorbed * load(key, k[None, :], valid)",
            "d_gamma += 0.0",
        ),
        (
            "only the first part of the queries' gradients is added",
            _CHAIN_BACKWARD,
            "d_absorbed += load(part + i * next_part, k[None, :], valid)",
            "d_absorbed += tl.where(i == 0, load(part + i * next_part, k[None, :], valid), 0.0)",
        ),
        (
            "the gradients of matrices take the first tile of images only",
            _PARAMETERS,
            "for start in range(0, batch, BLOCK):",
            "for start in range(0, min(batch, BLOCK), BLOCK):",
        ),
        (
            "sums over the batch take the first tile of images only",
            _PARAMETERS,
            "for start in range(0, batch, ROWS):",
            "for start in range(0, min(batch, ROWS), ROWS):",
        ),
        (
            "one program too few for the last channels",
            _LAUNCH,
            '"""Programs that cover a width."""\n        return -(-width // self.config.block)',
            '"""Programs that cover a width."""\n        return max(1, width // self.config.block)',
        ),
        (
            "the attention is returned before it is normalised",
            _GPU,
            "out.attention.sub_(out.saved[:, start : start + heads, None]).exp2_()",
            "out.attention.exp2_()",
        ),
    )
)


# Each of these some test of `test_triton_attention.py` has to catch.
