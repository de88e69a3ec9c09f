// Forward: the pass over the tokens of a chunk, and the stages around it.
#pragma once

#include "work.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// The largest lane.
float max_of_lanes(Vec v) {
    float lanes[kLanes];
    store(v, lanes);
    float most = lanes[0];
    for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

// z, m, l and t of one chunk of tokens of image b.
void attend(const Work& w, int64_t b, int64_t chunk, Arena scratch) {
    const int64_t H = w.heads, width = w.width;
    float* tile = scratch.take(kTile * width);
    float* p = scratch.take(H * kTile);
    float* keep = scratch.take(H);
    float* mask = scratch.take(kTile);
    float* factor = scratch.take(kTile);
    float* z = w.part + (b * w.chunks + chunk) * H * width;
    float* m = w.part_sums + (b * w.chunks + chunk) * 3 * H;
    float *l = m + H, *t = l + H;
    for (int64_t h = 0; h < H; ++h) {
        m[h] = -__builtin_inff();
        l[h] = t[h] = 0.0f;
    }
    const int64_t begin = chunk * w.chunk, end = smaller(begin + w.chunk, w.tokens);
    for (int64_t n = begin; n < end; n += kTile) {
        const int64_t count = smaller(kTile, end - n);
        w.load_tile(b, n, count, true, tile, factor);
        dots(Rows<float>{tile, width, count, width}, H, w.query(b), width, p, kTile);
        for (int64_t h = 0; h < H; ++h) {
            float* scores = p + h * kTile;
            if (w.d->attention) copy_floats(scores, count, w.d->attention + (b * H + h) * w.tokens + n);
            Vec most = broadcast(m[h]);
            for (int64_t i = 0; i < count; i += kLanes)
                most = maximum(most, select(first_lanes(count - i), load(scores + i), most));
            const float highest = max_of_lanes(most);
            keep[h] = exp2(m[h] - highest);
            m[h] = highest;
            if (w.drops()) w.dropout(b, h, n, count, mask);
            Vec sum = {}, kept = {};
            for (int64_t i = 0; i < kTile; i += kLanes) {
                const IntVec valid = first_lanes(count - i);
                const Vec e = select(valid, exp2(load(scores + i) - highest), Vec{});
                const Vec weight = w.drops() ? select(valid, e * load(mask + i), Vec{}) : e;
                sum += e;
                kept += weight;
                store(weight, scores + i);
            }
            l[h] = l[h] * keep[h] + sum_of_lanes(sum);
            t[h] = t[h] * keep[h] + sum_of_lanes(kept);
        }
        accumulate(Rows<float>{tile, width, count, width}, H, Weights{p, kTile, 1},
                   n == begin ? nullptr : keep, z, width);
    }
}

// The chunks of image b and head h together: z, log l, t, the values' input, and the attention.
void merge(const Work& w, int64_t b, int64_t h) {
    const int64_t H = w.heads;
    const float* sums = w.part_sums + b * w.chunks * 3 * H + h;
    float m = sums[0], l = 0.0f, t = 0.0f;
    for (int64_t k = 1; k < w.chunks; ++k) m = sums[k * 3 * H] > m ? sums[k * 3 * H] : m;
    for (int64_t k = 0; k < w.chunks; ++k) {
        const float scale = exp2(sums[k * 3 * H] - m);
        l += sums[k * 3 * H + H] * scale;
        t += sums[k * 3 * H + 2 * H] * scale;
    }
    const float total = w.drops() ? t / l : 1.0f;
    const float log_sum = m + __builtin_log2f(l);
    w.log_sum(b)[h] = log_sum;
    w.total(b)[h] = total;
    float* z = w.z(b, h);
    float* values = w.values + w.head(b, h);
    const float* part = w.part + (b * w.chunks * H + h) * w.width;
    for (int64_t k = 0; k < w.chunks; ++k) {
        const float scale = exp2(sums[k * 3 * H] - m) / l;
        columns_of(w.width, [&](int64_t c) {
            const Vec more = load(part + k * H * w.width + c) * scale;
            store(k == 0 ? more : load(z + c) + more, z + c);
        });
    }
    columns_of(w.width, [&](int64_t c) {
        store(load(w.norm.weight + c) * load(z + c) + load(w.norm.bias + c) * total, values + c);
    });
    if (!w.d->attention) return;
    float* attention = w.d->attention + (b * H + h) * w.tokens;
    int64_t n = 0;
    for (; n + kLanes <= w.tokens; n += kLanes) store(exp2(load(attention + n) - log_sum), attention + n);
    if (n < w.tokens) store(exp2(load(attention + n, w.tokens - n) - log_sum), attention + n, w.tokens - n);
}

void forward(const Team& team, Work* works, int64_t count, Arena scratch) {
    images(team, works, count, [&](Work& w, int64_t b) {
        // Padding and all: what is handed out has no bits that nobody wrote.
        for (int64_t i = 0; i < w.saved_stride(); ++i) w.saved(b)[i] = 0.0f;
        if (!w.has_project()) return load_token(w.d->cls, b, 0, w.d->tokens, w.d->width, w.c(b));
        float* row = Arena(scratch).take(w.own);
        load_token(w.d->cls, b, 0, w.d->tokens, w.d->own_width, row);
        norm_gelu(w.project, row, w.d->own_width, w.options->eps, w.input + b * w.own);
    });
    team.wait();
    each(works, count, [&](Work& w) {
        if (w.has_project())
            linear(team, w.wf(), w.d->batch, {w.input, w.own, 0}, w.project_bias, nullptr, 0, w.c(0),
                   w.saved_stride());
    });
    team.wait();
    images(team, works, count, [&](Work& w, int64_t b) {
        float* row = w.normed + b * w.width;
        copy_floats(w.c(b), w.width, row);
        normalise(row, w.d->width, w.options->eps);
        w.norm.affine(row, w.width, row);
    });
    team.wait();
    each(works, count, [&](Work& w) {
        linear(team, w.wq(), w.d->batch, {w.normed, w.width, 0}, w.bq, nullptr, 0, w.q(0), w.saved_stride());
    });
    team.wait();
    each(works, count, [&](Work& w) {
        transposed(team, w.wk(), w.d->batch, w.q(0), w.saved_stride(), w.key_query, w.heads * w.width,
                   w.width);
    });
    team.wait();
    heads(team, works, count, scale_query);
    team.wait();
    each(works, count, [&](Work& w) {
        team.share(w.d->batch * w.chunks, [&](int64_t i) { attend(w, i / w.chunks, i % w.chunks, scratch); });
    });
    team.wait();
    heads(team, works, count, merge);
    team.wait();
    each(works, count, [&](Work& w) {
        linear(team, w.wv(), w.d->batch, {w.values, w.heads * w.width, w.width}, w.bv, w.total(0),
               w.saved_stride(), w.o(0), w.saved_stride());
    });
    team.wait();
    each(works, count, [&](Work& w) {
        linear(team, w.wo(), w.d->batch, {w.o(0), w.saved_stride(), 0}, w.bo, nullptr, 0, w.raw, w.width);
    });
    team.wait();
    bool any_back = false;
    each(works, count, [&](Work& w) { any_back = any_back || w.has_back(); });
    images(team, works, count, [&](Work& w, int64_t b) {
        Arena arena = scratch;
        float *scale = arena.take(w.width), *row = arena.take(w.width), *y = w.y(b);
        if (w.d->scale.data) load_token(w.d->scale, b, 0, w.d->tokens, w.d->width, scale);
        columns_of(w.width, [&](int64_t c) {
            const Vec output = load(w.raw + b * w.width + c);
            store(load(w.c(b) + c) + (w.d->scale.data ? output * load(scale + c) : output), y + c);
        });
        if (!w.has_back()) return store_token(y, w.d->cls_out, b, 0, w.d->tokens, w.d->width);
        copy_floats(y, w.width, row);
        norm_gelu(w.back, row, w.d->width, w.options->eps, w.input + b * w.width);
    });
    if (!any_back) return;
    team.wait();
    each(works, count, [&](Work& w) {
        linear(team, w.wg(), w.d->batch, {w.input, w.width, 0}, w.back_bias, nullptr, 0, w.raw, w.own);
    });
    team.wait();
    images(team, works, count, [&](Work& w, int64_t b) {
        store_token(w.raw + b * w.own, w.d->cls_out, b, 0, w.d->tokens, w.d->own_width);
    });
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
