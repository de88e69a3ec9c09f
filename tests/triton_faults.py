"""Faults for the Triton kernels, each of which some test of `test_triton.py` has to catch."""

from __future__ import annotations

from tests.seeded_faults import Fault

_KERNELS = "crossvit_kernels/cross_attention/triton_kernels.py"
_LAUNCH = "crossvit_kernels/cross_attention/triton_launch.py"

# Each keeps the number of lines, so that kernels it does not touch need not be compiled again.
TRITON_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "the variance of c counts the padding of the last block",
            _KERNELS,
            "centred = tl.where(valid, _row(x, k * stride, valid) - mean, 0.0)",
            "centred = _row(x, k * stride, valid) - mean",
        ),
        (
            "the variance of the tokens counts the padding of the last piece",
            _KERNELS,
            "x = tl.where(_columns(d, i)[1][:, None, :], x, 0.0)",
            "x = x + 0.0",
        ),
        (
            "LayerNorm's backward drops the product with x^",
            _KERNELS,
            "rstd * (g - means[0] - hat * means[1])",
            "rstd * (g - means[0])",
        ),
        (
            "GELU's derivative lacks its second term",
            _KERNELS,
            "return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density",
            "return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + 0.0 * density",
        ),
        (
            "a head reads channels of the next one",
            _KERNELS,
            "channel = tl.where(j < head_width, head * head_width + j, d.width)  # width is out",
            "channel = tl.minimum(head * head_width + j, d.width)  # width is out",
        ),
        (
            "the query has no bias",
            _KERNELS,
            "q += _vector(d.bq, channel[None, :], channel[None, :] < d.width)",
            "q += 0.0 * _vector(d.bq, channel[None, :], channel[None, :] < d.width)",
        ),
        (
            "the parts of an image are merged with equal weights",
            _KERNELS,
            "w = tl.exp2(_row(part + i * step, padded(d.width), in_batch) - lse)",
            "w = tl.full([ROWS, 1], 1.0, tl.float32) / splits",
        ),
        (
            "the sum of the dropped attention is forgotten for beta",
            _KERNELS,
            "u = merged * _vector(d.gamma, k[None, :], inside) + total * _vector(d.beta, k[None, :], inside)",
            "u = merged * _vector(d.gamma, k[None, :], inside) + _vector(d.beta, k[None, :], inside)",
        ),
        (
            "the scale is left out of the residual",
            _KERNELS,
            "        y *= _row(d.scale",
            "        _row(d.scale",
        ),
        (
            "the residual is left out",
            _KERNELS,
            "y += _row(saved, CLS * padded(d.width) + columns[None, :], valid)",
            "y += 0.0",
        ),
        (
            "tokens beyond the end take part in the softmax",
            _KERNELS,
            'scores = tl.where(valid[:, None], scores, float("-inf"))',
            "scores = tl.where(valid[:, None], scores, scores)",
        ),
        (
            "the online softmax does not rescale z",
            _KERNELS,
            "of_heads, operands[i], z[i] * rescales[None, :, None], input_precision=PRECISION",
            "of_heads, operands[i], z[i], input_precision=PRECISION",
        ),
        (
            "the means are not taken off the scores",
            _KERNELS,
            "scores = scale[:, None] * (scores - shift[:, None] * query_sums[None, :])",
            "scores = scale[:, None] * scores",
        ),
        (
            "the means are not taken off z",
            _KERNELS,
            "value = (z[i] - _doubled(shifts)[None, :, None]) / _doubled(total)[None, :, None]",
            "value = z[i] / _doubled(total)[None, :, None]",
        ),
        (
            "every part of an image starts with the CLS token",
            _KERNELS,
            "first = tl.where(leads, 1.0, 0.0)",
            "first = tl.where(leads, 1.0, 1.0)",
        ),
        (
            "dropout is forgotten for the CLS token",
            _KERNELS,
            "kept = _kept(d, image, h, tl.zeros_like(h), tokens, threshold, keep_scale)",
            "kept = tl.full([d.head_tile], 1.0, tl.float32)",
        ),
        (
            "both directions drop the same attention",
            _KERNELS,
            "stream = tl.full(low.shape, d.stream, tl.uint32)",
            "stream = tl.full(low.shape, 0, tl.uint32)",
        ),
        (
            "the copy of the tokens misses the last channels",
            _KERNELS,
            "tl.store(address, pieces[i], mask=valid[None, :, None] & inside[:, None, :])",
            "tl.store(address, pieces[i], mask=valid[None, :, None] & (c + 1 < d.width)[:, None, :])",
        ),
        (
            "the softmax's gradient does not subtract its sum",
            _KERNELS,
            "d_scores = LN2 * p * (d_p - sums[None, :])",
            "d_scores = LN2 * p * d_p",
        ),
        (
            "the gradient of the returned attention is dropped too",
            _KERNELS,
            "d_p += _row(d.d_attention, address, valid[:, None] & present[None, :])",
            "d_p += 0.0 * _row(d.d_attention, address, valid[:, None] & present[None, :])",
        ),
        (
            "the tokens' gradient is not centred",
            _KERNELS,
            "value = (d_hat - means[0][None, :, None]) * rstd[None, :, None] - along",
            "value = d_hat * rstd[None, :, None] - along",
        ),
        (
            "the gradient of the copied tokens is lost",
            _KERNELS,
            "value += _row(_at(incoming",
            "_row(_at(incoming",
        ),
        (
            "the gradient of the queries is stored for every second head",
            _KERNELS,
            "wanted = (row % 2 == 0) & (h < d.heads)",
            "wanted = (row % 4 == 0) & (h < d.heads)",
        ),
        (
            "more heads than a tile replace the tokens' gradient instead of adding to it",
            _KERNELS,
            "value += _row(address, 0, mask & (tile > 0))",
            "value += 0.0 * _row(address, 0, mask & (tile > 0))",
        ),
        (
            "what comes in for the copy is added for every tile of heads",
            _KERNELS,
            "c, d.d_copy_channel), 0, mask & (tile == 0))",
            "c, d.d_copy_channel), 0, mask & (tile >= 0))",
        ),
        (
            "rounding left of the sum of ds stays in the queries' gradient",
            _KERNELS,
            "excess = tl.where(sums > 0, excess / sums, 0.0)",
            "excess = tl.where(sums > 0, 0.0, 0.0) + 0.0 * excess",
        ),
        (
            "the CLS token's gradient as a row of the attention is lost",
            _KERNELS,
            " + _row(scratch, D_ROW * width + k, valid) + through",
            " + through",
        ),
        (
            "gamma's gradient through the key is lost",
            _KERNELS,
            "d_gamma += d_absorbed * _row(key, k[None, :], valid)",
            "d_gamma += 0.0",
        ),
        (
            "only the first part of the queries' gradients is added",
            _KERNELS,
            "d_absorbed += _row(part + i * step, k[None, :], valid)",
            "d_absorbed += tl.where(i == 0, _row(part + i * step, k[None, :], valid), 0.0)",
        ),
        (
            "the gradients of matrices take the first tile of images only",
            _KERNELS,
            "for start in range(0, batch, BLOCK):",
            "for start in range(0, min(batch, BLOCK), BLOCK):",
        ),
        (
            "sums over the batch take the first tile of images only",
            _KERNELS,
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
            _LAUNCH,
            "out.attention.sub_(_log_sum_exp(out.saved, task)[..., None]).exp2_()",
            "out.attention.exp2_()",
        ),
    )
)
