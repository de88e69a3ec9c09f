"""Faults for the native kernels, each of which some test of the contract has to catch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """In `file`, from the project's root, `old` (which occurs once) becomes `new`.

    `memory` faults change no result: a build with AddressSanitizer has to stop at them.
    """

    what: str
    file: str
    old: str
    new: str
    memory: bool = False


_WORK = "csrc/cross_attention/work.h"
_FORWARD = "csrc/cross_attention/forward.h"
_BACKWARD = "csrc/cross_attention/backward.h"
_CPU = "csrc/cross_attention/cpu.cpp"

FAULTS = (
    Fault(
        "the columns behind the last whole vector are dropped from dot products",
        "csrc/common/products.h",
        "if (whole < rows.columns) {",
        "if (false) {",
    ),
    Fault(
        "the columns behind the last whole vector are dropped from sums of rows",
        "csrc/common/products.h",
        "    if (c < rows.columns)\n        accumulate_columns",
        "    if (false)\n        accumulate_columns",
    ),
    Fault(
        "a block of rows reads past its end instead of the last row again",
        "csrc/common/products.h",
        "first + r < rows.count ? first + r : rows.count - 1",
        "first + r",
        memory=True,
    ),
    Fault(
        "the variance is E[x^2] - E[x]^2",
        "csrc/common/layer_norm.h",
        "for (int r = 0; r < Count; ++r) variance[r] = sums[r] / static_cast<float>(columns);",
        "for (int r = 0; r < Count; ++r) {"
        "Vec x, e = {}; for (int64_t c = 0; c < columns; ++c) x = load(rows + r * stride + c, 1), e += x * x;"
        "variance[r] = e[0] / static_cast<float>(columns) - mean[r] * mean[r]; }",
    ),
    Fault(
        "the mean is taken over the padded row",
        "csrc/common/layer_norm.h",
        "mean[r] = sums[r] / static_cast<float>(columns);",
        "mean[r] = sums[r] / static_cast<float>(whole + (rest ? kLanes : 0));",
    ),
    Fault(
        "padding is left in the normalised rows",
        "csrc/common/layer_norm.h",
        "for (int64_t c = columns; c % kLanes; ++c) row[c] = 0.0f;",
        "",
    ),
    Fault(
        "eps is added after the root",
        "csrc/common/layer_norm.h",
        "1.0f / __builtin_sqrtf(variance[r] + eps)",
        "1.0f / (__builtin_sqrtf(variance[r]) + eps)",
    ),
    Fault(
        "the LayerNorm's gradient lacks the mean of the product",
        "csrc/common/layer_norm.h",
        "load(grad + c) - mean - load(hat + c) * mean_product",
        "load(grad + c) - mean",
    ),
    Fault(
        "bfloat16 is cut off instead of rounded",
        "csrc/common/vector.h",
        "u + 0x7fffu + ((u >> 16) & 1u)",
        "u",
    ),
    Fault(
        "float16 subnormals are read as normal numbers",
        "csrc/common/vector.h",
        "select(magnitude < UintVec{} + (1u << 23), subnormal, normal)",
        "normal",
    ),
    Fault(
        "the softmax does not subtract the new maximum",
        _FORWARD,
        "exp2(load(scores + i) - highest)",
        "exp2(load(scores + i) - m[0])",
    ),
    Fault(
        "what was summed under an older maximum is not rescaled",
        _FORWARD,
        "keep[h] = exp2(m[h] - highest);",
        "keep[h] = 1.0f;",
    ),
    Fault("chunks are added without their scale", _FORWARD, "exp2(sums[k * 3 * H] - m) / l", "1.0f / l"),
    Fault(
        "the last chunk of tokens is left out",
        _FORWARD,
        "k < w.chunks; ++k) {\n        const float scale = exp2(sums[k * 3 * H] - m);",
        "k < larger(1, w.chunks - 1); ++k) {\n        const float scale = exp2(sums[k * 3 * H] - m);",
    ),
    Fault(
        "lanes behind the last token count",
        _FORWARD,
        "const Vec e = select(valid, exp2(",
        "const Vec e = select(valid | ~valid, exp2(",
    ),
    Fault(
        "one head reads its neighbour's query",
        _WORK,
        "float* to = w.query(b) + h * w.width;",
        "float* to = w.query(b) + (h ^ 1) % w.heads * w.width;",
    ),
    Fault(
        "the query lacks 1 / sqrt(d)",
        _WORK,
        "query_factor = 1.0f / __builtin_sqrtf(static_cast<float>(head_width));",
        "query_factor = 1.0f;",
    ),
    Fault(
        "the query lacks gamma",
        _WORK,
        "load(from + c) * load(w.norm.weight + c) * (w.query_factor * kLog2E)",
        "load(from + c) * (w.query_factor * kLog2E)",
    ),
    Fault(
        "beta does not take the sum of the dropped attention",
        _FORWARD,
        "store(load(w.norm.weight + c) * load(z + c) + load(w.norm.bias + c) * total, values + c);",
        "store(load(w.norm.weight + c) * load(z + c) + load(w.norm.bias + c), values + c);",
    ),
    Fault(
        "the residual is left out",
        _FORWARD,
        "store(load(w.c(b) + c) + (w.d->scale.data",
        "store((w.d->scale.data",
    ),
    Fault(
        "the residual scale is left out",
        _FORWARD,
        "(w.d->scale.data ? output * load(scale + c) : output)",
        "(output + load(scale + c) * 0.0f)",
    ),
    Fault(
        "dropout keeps what it should drop",
        _WORK,
        "< options->drop_below ? 0.0f : options->kept_factor",
        ">= options->drop_below ? 0.0f : options->kept_factor",
    ),
    Fault("dropout does not tell the directions apart", _WORK, "static_cast<uint32_t>(d->stream), 0", "0, 0"),
    Fault(
        "the second word of the seed is not used",
        _WORK,
        "static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)",
        "static_cast<uint32_t>(seed), 0",
    ),
    Fault(
        "the attention is not normalised",
        _FORWARD,
        "store(exp2(load(attention + n, w.tokens - n) - log_sum)",
        "store(exp2(load(attention + n, w.tokens - n))",
    ),
    Fault(
        "D lacks the dropped attention's part", _BACKWARD, "        d += grad_total * w.total(b)[h];\n", ""
    ),
    Fault("D lacks the attention's own gradient", _BACKWARD, "        d += sum_of_lanes(sum);\n", ""),
    Fault(
        "the token's gradient lacks the mean of the product",
        _BACKWARD,
        "(load(row + c) - a - load(tile + i * width + c) * e) * factor[i]",
        "(load(row + c) - a) * factor[i]",
    ),
    Fault(
        "the token's gradient lacks 1 / sqrt(variance)",
        _BACKWARD,
        "(load(row + c) - a - load(tile + i * width + c) * e) * factor[i]",
        "(load(row + c) - a - load(tile + i * width + c) * e)",
    ),
    Fault(
        "the incoming gradient of the patches is lost",
        _BACKWARD,
        "store(load(row + c) + load(more + c), row + c)",
        "store(load(row + c), row + c)",
    ),
    Fault(
        "the CLS token's LayerNorm forgets the attention",
        _BACKWARD,
        " +\n                      load(w.grad_hat + b * w.width + c)",
        "",
    ),
    Fault(
        "the residual's gradient is lost",
        _BACKWARD,
        "store(load(grad + c) + load(w.grad_y + b * w.width + c), grad + c)",
        "store(load(grad + c), grad + c)",
    ),
    Fault(
        "gamma's gradient lacks the query's part",
        _BACKWARD,
        " +\n                   load(w.grad_query + at) * load(w.key_query + at)",
        "",
    ),
    Fault(
        "a chunk's gradient of the query is lost",
        _BACKWARD,
        "for (int64_t k = 1; k < w.chunks; ++k) sum += load(part + k * w.heads * w.width + c);",
        "",
    ),
    Fault(
        "the GELU's gradient is the identity",
        _BACKWARD,
        "gelu(load(hat + c) * weight + load(norm.bias + c)).derivative",
        "broadcast(1.0f)",
    ),
    Fault(
        "a thread does not wait for the others' chunks",
        _FORWARD,
        "    team.wait();\n    heads(team, works, count, merge);",
        "    heads(team, works, count, merge);",
    ),
    Fault(
        "scratch memory of two threads overlaps",
        _CPU,
        "first + team.rank * scratch",
        "first + team.rank * 16",
    ),
    Fault(
        "the last image of a panel is left out",
        "csrc/common/linear.h",
        "const int64_t images = batch - b < kPanel ? batch - b : kPanel;",
        "const int64_t images = batch - b < kPanel ? batch - b : kPanel - 1;",
    ),
    Fault(
        "the bias of a factor is not multiplied",
        "csrc/common/linear.h",
        "factor ? factor[b * factor_stride + s] : 1.0f",
        "1.0f",
    ),
)
