"""Faults for the CUDA kernels; a test of `test_gpu_kernels.py` or `test_cuda.py` has to catch each."""

from __future__ import annotations

from tests.seeded_faults import Fault

_CSRC = "csrc/cross_attention/"
_TOKENS = _CSRC + "cuda_tokens.cuh"
_ATTEND = _CSRC + "cuda_attend.cu"
_ATTEND_BACKWARD = _CSRC + "cuda_attend_backward.cu"
_CHAIN = _CSRC + "cuda_chain.cuh"
_FORWARD = _CSRC + "cuda_chain_forward.cu"
_BACKWARD = _CSRC + "cuda_chain_backward.cu"
_PARAMETERS = _CSRC + "cuda_parameters.cu"
_PRODUCTS = "csrc/common/cuda_products.cuh"

CUDA_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "tokens behind the end take part in the softmax",
            _ATTEND,
            "if (n >= rows) p[i] = -INFINITY;",
            "",
        ),
        (
            "the variance of a slice counts the channels that fill it up",
            _TOKENS,
            "const float centred = whole || c + i < place.channels ? x[i] - mean : 0.0f;",
            "const float centred = x[i] - mean;",
        ),
        (
            "the slices' deviations are added without the distance of their means",
            _TOKENS,
            "squares += fmaf(static_cast<float>(place.channels_of(w)) * distance, distance, of_slice.y);",
            "squares += of_slice.y;",
        ),
        (
            "a part of an image has a tile too few",
            _TOKENS,
            "end = min((split + 1) * tiles * kTokens, patches);",
            "end = min((split + 1) * tiles * kTokens, patches - kTokens);",
        ),
        (
            "the seed's upper half is not used",
            _TOKENS,
            "static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));",
            "static_cast<uint32_t>(seed), 0);",
        ),
        (
            "both directions drop the same attention",
            _TOKENS,
            "static_cast<uint32_t>(d.stream), 0}};",
            "0, 0}};",
        ),
        (
            "the next tile is loaded into the one that is being read",
            _TOKENS,
            "if (++stage == stages) {",
            "if (++stage >= stages - 1) {",
        ),
        (
            "the mean is not taken off the scores",
            _ATTEND,
            "p[i] = scale[i] * (p[i] - shift[i] * query_sum);",
            "p[i] = scale[i] * p[i];",
        ),
        (
            "z is not rescaled to the new maximum",
            _ATTEND,
            "z[k][i] *= rescales[i % 2];",
            "z[k][i] *= 1.0f;",
        ),
        (
            "the shift is not rescaled to the new maximum",
            _ATTEND,
            "shift *= rescale;",
            "",
        ),
        (
            "every part of an image starts with the CLS token",
            _ATTEND,
            "const bool leads = split == 0;",
            "const bool leads = true;",
        ),
        (
            "dropout is forgotten for the CLS token",
            _ATTEND,
            "if (d.seed) kept_cls = kept(call, d, image, head + g, 0);",
            "",
        ),
        (
            "a cluster's parts are merged with equal weights",
            _ATTEND,
            "weights[i] = __shfl_sync(kAll, weight, i) * inverse;",
            "weights[i] = inverse;",
        ),
        (
            "a block leaves its cluster while others read its memory",
            _ATTEND,
            "ptx::cluster_barrier();  // nobody leaves while others read its memory",
            "",
        ),
        (
            "warps do not wait for each other's scores",
            _ATTEND,
            "        __syncthreads();\n        if (stages > 1) loader.start_next();",
            "        if (stages > 1) loader.start_next();",
        ),
        (
            "the softmax's gradient does not take off its sum",
            _ATTEND_BACKWARD,
            "return {kLn2 * p * (d_p - softmax_sum), kept_p};",
            "return {kLn2 * p * d_p, kept_p};",
        ),
        (
            "the attention's own gradient is lost",
            _ATTEND_BACKWARD,
            "if (d.grad_attention && there) d_p += ",
            "if (d.grad_attention && n < 0) d_p += ",
        ),
        (
            "the sum of the attention's own gradient is lost",
            _ATTEND_BACKWARD,
            "Scratch::softmax_sum(d, row / d.heads)[row % d.heads] += sum;",
            "Scratch::softmax_sum(d, row / d.heads)[row % d.heads] += 0.0f * sum;",
        ),
        (
            "the tokens' gradient is not centred",
            _ATTEND_BACKWARD,
            "constant[half] = (in_place ? 0.0f : factor[half] * statistics[half].x) - plain[half];",
            "constant[half] = in_place ? 0.0f : factor[half] * statistics[half].x;",
        ),
        (
            "more heads than eight replace the tokens' gradient",
            _ATTEND_BACKWARD,
            ": adds   ? d.patches_gradient\n",
            "",
        ),
        (
            "more heads than eight replace the gradient of the CLS token's row",
            _ATTEND_BACKWARD,
            "row[c + i] = adds ? row[c + i] + value : value;",
            "row[c + i] = value;",
        ),
        (
            "what rounding leaves of the sum of ds is not taken off",
            _BACKWARD,
            "excesses[threadIdx.x] = kept_sum > 0.0f ? excess / kept_sum : 0.0f;",
            "excesses[threadIdx.x] = 0.0f * excess;",
        ),
        (
            "tiles are loaded again while they are read",
            _ATTEND_BACKWARD,
            "        release_tiles();\n        if (stages > 1) loader.start_next();",
            "        if (stages > 1) loader.start_next();\n        release_tiles();",
        ),
        (
            "a kernel does not wait for the one before it",
            _CHAIN,
            "    ptx::wait_for_previous_kernel();\n",
            "",
        ),
        (
            "a tile of the weight is overwritten while it is multiplied",
            _CHAIN,
            "right.start(tiles.right_rows(stage ^ 1), k + kColumns, column);",
            "right.start(tiles.right_rows(stage), k + kColumns, column);",
        ),
        (
            "GELU's derivative lacks its second term",
            _CHAIN,
            "return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) + x * density;",
            "return 0.5f * (1.0f + erff(x * 0.7071067811865476f));",
        ),
        (
            "LayerNorm's backward drops the product with x^",
            _CHAIN,
            "return rstd * (g - plain - hat(x) * against);",
            "return rstd * (g - plain);",
        ),
        (
            "the query has no bias",
            _FORWARD,
            "value += element(w.bq, first + c);",
            "",
        ),
        (
            "the scale is left out of the residual",
            _FORWARD,
            "if (scale.data)",
            "if (false)",
        ),
        (
            "the sum of the dropped attention is forgotten for beta",
            _FORWARD,
            "return fmaf(merged, gamma, kept_sums[row] * beta);",
            "return fmaf(merged, gamma, beta);",
        ),
        (
            "the CLS token's gradient as a row of the attention is lost",
            _BACKWARD,
            "return d_y(row, k) + d_row(row, k) +",
            "return d_y(row, k) +",
        ),
        (
            "gamma's gradient through the key is lost",
            _BACKWARD,
            "d_gamma = fmaf(d_absorbed, key(row, k), d_gamma);",
            "d_gamma = d_gamma;",
        ),
        (
            "only the first part of the queries' gradients is added",
            _BACKWARD,
            "for (int i = 0; i < parts; ++i, of_part += to_next_part)",
            "for (int i = 0; i < 1; ++i, of_part += to_next_part)",
        ),
        (
            "sums over the batch take the first images only",
            _PARAMETERS,
            "for (int64_t image = slice; image < batch; image += kSlices) {",
            "for (int64_t image = slice; image < min(batch, int64_t{2}); image += kSlices) {",
        ),
        (
            "the CLS token's row lacks a mean of LayerNorm's gradient",
            _ATTEND_BACKWARD,
            "rstd * (d_normed[i] - plain - normed[c + i - place.first] * against);",
            "rstd * (d_normed[i] - normed[c + i - place.first] * against);",
        ),
        (
            "one column of heads takes the weights of the next in tf32",
            _PRODUCTS,
            "const uint32_t b[2] = {ptx::round_to_tf32(row[k + t]), ptx::round_to_tf32(row[k + t + 4])};",
            "const uint32_t b[2] = {ptx::round_to_tf32(row[k + t]), ptx::round_to_tf32(row[k + t])};",
        ),
        (
            "float32 loses a channel of four",
            _PRODUCTS,
            "fmaf(y.w, q.w, fmaf(y.z, q.z, fmaf(y.y, q.y, fmaf(y.x, q.x, sums[e][i]))));",
            "fmaf(y.z, q.z, fmaf(y.y, q.y, fmaf(y.x, q.x, sums[e][i])));",
        ),
    )
)
