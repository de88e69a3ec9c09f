// What a call keeps for a direction, and how a team of threads goes through its images and heads.
#pragma once

#include "../common/linear.h"
#include "../common/philox.h"
#include "cross_attention.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

constexpr int64_t kTile = 32;       // tokens, 28 KB with C = 224
constexpr int64_t kChunk = 128;     // tokens that a thread takes at once, roughly
constexpr int64_t kMaxChunks = 16;  // an image, so that what they leave behind does not grow with the tokens

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t padded(int64_t n) { return rounded_up(n, kLanes); }

// Hands out pieces of the scratch memory; with a null base it only counts.
struct Arena {
    float* base;
    int64_t used = 0;

    float* take(int64_t floats) {
        float* piece = base ? base + used : nullptr;
        used += rounded_up(floats, 16);
        return piece;
    }
};

const char* address(const Tokens& x, int64_t b, int64_t n, Dtype dtype) {
    return static_cast<const char*>(x.data) + (b * x.batch_stride + n * x.row_stride) * size_of(dtype);
}

void load_token(const Tokens& x, int64_t b, int64_t n, Dtype dtype, int64_t columns, float* row) {
    load_row(dtype, address(x, b, n, dtype), x.channel_stride, columns, row, padded(columns));
}

void store_token(const float* row, const Tokens& x, int64_t b, int64_t n, Dtype dtype, int64_t columns) {
    store_row(row, columns, dtype, const_cast<char*>(address(x, b, n, dtype)), x.channel_stride);
}

void copy_floats(const float* from, int64_t count, float* to) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

template <class Body>
CROSSVIT_INLINE void columns_of(int64_t count, Body body) {
    for (int64_t c = 0; c < count; c += kLanes) body(c);
}

// f or g with its vectors as floats, and what its backward keeps of each image.
struct Norm {
    const float *weight, *bias;

    // to = weight * hat + bias
    void affine(const float* hat, int64_t columns, float* to) const {
        columns_of(columns,
                   [&](int64_t c) { store(load(hat + c) * load(weight + c) + load(bias + c), to + c); });
    }
};

// Everything that a call keeps for one direction. Rows are padded; [B, ...] unless said otherwise.
struct Work {
    const Direction* d;
    const Options* options;
    int64_t width, own;  // padded
    int64_t heads, head_width, tokens, chunk, chunks;
    float query_factor;

    Norm project, norm, back;
    const float *project_bias, *bq, *bv, *bo, *back_bias;

    float* key_query;  // [B, H, C]: Wk^T q
    float* pair;       // [B, 2, H, C]: qt * log2(e); in backward the gradient of z behind it
    float* part;       // [B, chunks, H, C]: z of each chunk, in backward the gradient of qt
    float* values;     // [B, H, C]: gamma z + t beta
    float* normed;     // gamma x^_0 + beta
    float* raw;        // Wo o + bo; then Wg input + bg, in backward any linear layer's gradient

    // Forward only: the input of f, then of g; m, l, t of each chunk [B, chunks, 3, H].
    float *input, *part_sums;

    // Backward only: the gradient of what the name says, and x^ and the input of the projections.
    float *hat, *grad_y, *grad_output, *grad_o, *grad_values, *grad_hat, *grad_query, *grad_key_query,
        *grad_q;
    float *grad_normed, *grad_c;
    float* scalars;  // [B, 4, H]: sum of the gradient of z, sum of qt * log2(e), D, gradient of t
    float *grad_back, *back_input, *back_hat, *grad_back_norm;
    float *project_input, *project_hat, *grad_project_norm;

    // Takes its memory from `arena`, and the vectors of parameters as floats unless the arena only counts.
    void plan(const Direction& direction, const Options& opts, Arena& arena, bool backward) {
        d = &direction;
        options = &opts;
        heads = d->heads;
        width = padded(d->width);
        own = padded(d->own_width);
        tokens = 1 + d->patches;
        head_width = d->width / heads;
        const int64_t pieces = smaller((tokens + kChunk - 1) / kChunk, kMaxChunks);
        chunk = rounded_up((tokens + pieces - 1) / pieces, kTile);
        chunks = (tokens + chunk - 1) / chunk;
        query_factor = 1.0f / __builtin_sqrtf(static_cast<float>(head_width));

        const Parameters& p = d->parameters;
        norm = {floats(p.norm_weight, d->width, arena), floats(p.norm_bias, d->width, arena)};
        bq = floats(p.bq, d->width, arena);
        bv = floats(p.bv, d->width, arena);
        bo = floats(p.bo, d->width, arena);
        project = {floats(p.project.norm_weight, d->own_width, arena),
                   floats(p.project.norm_bias, d->own_width, arena)};
        project_bias = floats(p.project.bias, d->width, arena);
        back = {floats(p.back.norm_weight, d->width, arena), floats(p.back.norm_bias, d->width, arena)};
        back_bias = floats(p.back.bias, d->own_width, arena);

        const int64_t row = d->batch * width, own_row = d->batch * own, longer = larger(row, own_row);
        key_query = arena.take(row * heads);
        pair = arena.take(2 * row * heads);
        part = arena.take(row * heads * chunks);
        values = arena.take(row * heads);
        normed = arena.take(row);
        raw = arena.take(longer);
        if (!backward) {
            input = arena.take(longer);
            part_sums = arena.take(3 * d->batch * chunks * heads);
            return;
        }
        hat = arena.take(row);
        grad_y = arena.take(row);
        grad_output = arena.take(row);
        grad_o = arena.take(row);
        grad_values = arena.take(row * heads);
        scalars = arena.take(4 * d->batch * heads);
        grad_hat = arena.take(row);
        grad_query = arena.take(row * heads);
        grad_key_query = arena.take(row * heads);
        grad_q = arena.take(row);
        grad_normed = arena.take(row);
        grad_c = arena.take(row);
        if (has_back()) {
            grad_back = arena.take(own_row);
            back_input = arena.take(row);
            back_hat = arena.take(row);
            grad_back_norm = arena.take(row);
        }
        if (has_project()) {
            project_input = arena.take(own_row);
            project_hat = arena.take(own_row);
            grad_project_norm = arena.take(own_row);
        }
    }

    static const float* floats(const Vector& vector, int64_t columns, Arena& arena) {
        float* to = arena.take(columns);
        if (to != nullptr)
            load_row(vector.dtype, vector.data, vector.stride, vector.data ? columns : 0, to,
                     padded(columns));
        return to;
    }

    bool has_project() const { return d->parameters.project.weight.data != nullptr; }
    bool has_back() const { return d->parameters.back.weight.data != nullptr; }

    // What forward leaves for backward, of image b.
    float* saved(int64_t b) const { return d->saved + b * saved_stride(); }
    float* c(int64_t b) const { return saved(b); }
    float* q(int64_t b) const { return saved(b) + saved_row(d->width); }
    float* o(int64_t b) const { return saved(b) + 2 * saved_row(d->width); }
    float* y(int64_t b) const { return saved(b) + 3 * saved_row(d->width); }
    float* z(int64_t b, int64_t h) const { return saved(b) + (4 + h) * saved_row(d->width); }
    float* log_sum(int64_t b) const { return saved(b) + (4 + heads) * saved_row(d->width); }  // [H], base 2
    float* total(int64_t b) const { return log_sum(b) + heads; }                              // [H], t

    int64_t saved_stride() const { return saved_floats(d->width, heads); }
    int64_t head(int64_t b, int64_t h) const { return (b * heads + h) * width; }
    float* query(int64_t b) const { return pair + 2 * head(b, 0); }

    Layer layer(const Matrix& m, int64_t segments, int64_t rows, int64_t columns) const {
        return {m.data, m.row_stride, d->weights, segments, rows, columns};
    }
    Layer wq() const { return layer(d->parameters.wq, 1, d->width, d->width); }
    Layer wk() const { return layer(d->parameters.wk, heads, head_width, d->width); }
    Layer wv() const { return layer(d->parameters.wv, heads, head_width, d->width); }
    Layer wo() const { return layer(d->parameters.wo, 1, d->width, d->width); }
    Layer wf() const { return layer(d->parameters.project.weight, 1, d->width, d->own_width); }
    Layer wg() const { return layer(d->parameters.back.weight, 1, d->own_width, d->width); }

    // Rows of the tokens n .. n + count - 1, normalised, and their factors 1 / sqrt(variance + eps).
    void load_tile(int64_t b, int64_t n, int64_t count, bool copy, float* tile, float* factor) const {
        for (int64_t i = 0; i < count; ++i) {
            float* row = tile + i * width;
            if (n + i == 0) {
                copy_floats(c(b), width, row);
                continue;
            }
            load_token(d->patch_tokens, b, n + i - 1, d->tokens, d->width, row);
            if (copy && d->patches_out.data)
                store_token(row, d->patches_out, b, n + i - 1, d->tokens, d->width);
        }
        normalise(tile, count, width, d->width, options->eps, factor);
    }

    bool drops() const { return d->seed != nullptr; }

    // m of tokens n .. n + count - 1 of head h: 0 or the factor of what is kept.
    void dropout(int64_t b, int64_t h, int64_t n, int64_t count, float* mask) const {
        const uint64_t seed = static_cast<uint64_t>(*d->seed);
        const uint64_t first = static_cast<uint64_t>((b * heads + h) * tokens + n);
        Words words{};
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t index = first + static_cast<uint64_t>(i), block = index / 4;
            if (i == 0 || index % 4 == 0)
                words = philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                 static_cast<uint32_t>(d->stream), 0}},
                               static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
            mask[i] = words.word[index % 4] < options->drop_below ? 0.0f : options->kept_factor;
        }
    }
};

float exp2(float x) { return exp2(broadcast(x))[0]; }

// to = GELU(LN(row)); row becomes x^. Returns the factor of the LayerNorm.
float norm_gelu(const Norm& norm, float* row, int64_t columns, float eps, float* to) {
    const float factor = normalise(row, columns, eps);
    norm.affine(row, padded(columns), to);
    columns_of(padded(columns), [&](int64_t c) { store(gelu(load(to + c)).value, to + c); });
    return factor;
}

// key_query and the absorbed query of head h of image b, the latter scaled for exp2.
void scale_query(const Work& w, int64_t b, int64_t h) {
    const float* from = w.key_query + w.head(b, h);
    float* to = w.query(b) + h * w.width;
    columns_of(w.width, [&](int64_t c) {
        store(load(from + c) * load(w.norm.weight + c) * (w.query_factor * kLog2E), to + c);
    });
}

template <class Body>
CROSSVIT_INLINE void each(Work* works, int64_t count, Body body) {
    for (int64_t i = 0; i < count; ++i) body(works[i]);
}

// body(w, b) for all images, shared by the team.
template <class Body>
CROSSVIT_INLINE void images(const Team& team, Work* works, int64_t count, Body body) {
    each(works, count, [&](Work& w) { team.share(w.d->batch, [&](int64_t b) { body(w, b); }); });
}

// body(w, b, h) for all heads of all images, shared by the team.
template <class Body>
CROSSVIT_INLINE void heads(const Team& team, Work* works, int64_t count, Body body) {
    each(works, count, [&](Work& w) {
        team.share(w.d->batch * w.heads, [&](int64_t i) { body(w, i / w.heads, i % w.heads); });
    });
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
