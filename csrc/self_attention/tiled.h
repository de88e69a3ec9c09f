// Exact softmax attention, with the queries in the lanes:
//
//     S^T [N, 32 queries] = K [N, d] Q^T         keys are rows of tiles, a panel of 32 queries the columns
//     P^T = exp2(S^T - largest)                  largest and sum of a query go down a lane: no shuffles
//     O^T [d, 32 queries] = V^T [d, N] P^T       P^T is the right operand as it lies, V the left one
//     out [32 queries, d] = (O^T / sum)^T        turned 16 x 16 while it is stored
//
// K and V of a head are packed once; S^T of 32 queries is 50 KB at 401 tokens and stays in the L2 cache.
// Limit: 4 N^2 d multiply-adds a head and N^2 exponentials, some 15 operations each.
#pragma once

#include "../common/team.h"
#include "../common/tiles.h"
#include "../linear/tiled.h"
#include "self_attention.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// 2^x for x <= 0; relative error 2e-7, or 1e-4 where the result is rounded to bfloat16. NaN stays.
CROSSVIT_INLINE Vec exp2_of_negative(Vec x, float) {
    x = maximum(x, broadcast(-126.0f));
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    Vec p = f * 1.33335581e-03f + 9.61812910e-03f;
    p = p * f + 5.55041087e-02f;
    p = p * f + 2.40226507e-01f;
    p = p * f + 6.93147182e-01f;
    p = p * f + 1.0f;
    return bits<Vec>(bits<UintVec>(p) + (bits<UintVec>(shifted) << 23));
}

CROSSVIT_INLINE Vec exp2_of_negative(Vec x, BFloat16) {
    x = maximum(x, broadcast(-126.0f));
    constexpr float magic = 12582912.0f;
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    Vec p = f * 5.51716691e-02f + 2.42611410e-01f;
    p = p * f + 6.93260993e-01f;
    p = p * f + 9.99928071e-01f;
    return bits<Vec>(bits<UintVec>(p) + (bits<UintVec>(shifted) << 23));
}

#if defined(__AVX512BF16__)
// Two rows as one of steps.
CROSSVIT_INLINE Vec interleaved(Vec even, Vec odd) {
    const __m512i both = bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(odd), bits<__m512>(even)));
    alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return bits<Vec>(_mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}
#endif

// Memory of a thread, in words.
struct AttentionMemory {
    int64_t keys, values, turned_values, queries, scores, weights, result, total;

    explicit AttentionMemory(const SelfAttentionStep& step) {
        // What a matrix unit reads and writes behind the end, too.
        const int64_t d = rounded_up(step.head_channels, 32), n = rounded_up(step.tokens, 32) + 32;
        int64_t at = 0;
        const auto take = [&](int64_t words) {
            const int64_t place = at;
            at += rounded_up(words, 16);
            return place;
        };
        with_operand(step.precision, [&](auto operand) {
            using Operand = decltype(operand);
            const int64_t steps = steps_of<Operand>(step.tokens);
            keys = take(RowBlocks<Operand>(step.tokens).count * packed_block<Operand>(steps_of<Operand>(d)));
            turned_values =
                take(kOnUnit<Operand> ? RowBlocks<Operand>(d).count * packed_block<Operand>(steps) : 0);
        });
        values = take(n * d);
        queries = take((d + kLanes) * kTileColumns);
        scores = take(n * kTileColumns);
        weights = take(n * kTileColumns);
        result = take(d * kTileColumns);
        total = at;
    }
};

template <class Operand, class T>
struct HeadAttention {
    const T *q, *k, *v;
    T* out;
    int64_t row, out_row;  // elements from one token to the next
    int64_t tokens, channels;
    float scale;
    int32_t* memory;
    AttentionMemory at;

    float* floats(int64_t place) const { return reinterpret_cast<float*>(memory + place); }

    // The left operands: rows of K, and columns of V.
    void pack_head() const {
        const RowBlocks<Operand> blocks(tokens);
        const int64_t packed = packed_block<Operand>(steps_of<Operand>(channels));
        for (int64_t b = 0; b < blocks.count; ++b)
            pack_left<Operand>(Source<T>{k + blocks.first(b) * row, row, blocks.size(b), channels, nullptr},
                               memory + at.keys + b * packed);
        const int64_t width = rounded_up(channels, kLanes), each = kOfAStep<Operand>;
        for (int64_t n = 0; n < steps_of<Operand>(tokens) * each; n += each)
            for (int64_t c = 0; c < width; c += kLanes) {
                const int64_t rest = channels - c;
                const auto at_token = [&](int64_t i) {
                    if (i >= tokens) return Vec{};
                    return rest >= kLanes ? load(v + i * row + c) : load(v + i * row + c, rest);
                };
                store(step_of(at_token(n), n + 1, at_token), floats(at.values) + n / each * width + c);
            }
        if constexpr (kOnUnit<Operand>) turn_values();
    }

    // For a matrix unit, whose rows have their steps side by side.
    void turn_values() const {
        const RowBlocks<Operand> blocks(channels);
        const int64_t steps = steps_of<Operand>(tokens), width = rounded_up(channels, kLanes);
        for (int64_t b = 0; b < blocks.count; ++b)
            for (int64_t step = 0; step < steps; step += kLanes)
                for (int64_t r = 0; r < blocks.size(b); r += kLanes) {
                    Vec turned[kLanes];
                    const float* from = floats(at.values) + step * width + blocks.first(b) + r;
                    CROSSVIT_UNROLL
                    for (int i = 0; i < kLanes; ++i) turned[i] = load(from + i * width);
                    transpose(turned);
                    float* to = floats(at.turned_values) + (b * steps + step) * kUnitRows + r * kLanes;
                    CROSSVIT_UNROLL
                    for (int i = 0; i < kLanes; ++i) store(turned[i], to + i * kLanes);
                }
    }

    const Word* values_of(const RowBlocks<Operand>& blocks, int64_t block) const {
        if (kOnUnit<Operand>)
            return memory + at.turned_values + block * packed_block<Operand>(steps_of<Operand>(tokens));
        return memory + at.values + blocks.first(block);
    }

    // A row of steps: one row of numbers, or two next to each other.
    template <class Next>
    CROSSVIT_INLINE static Vec step_of(Vec first, int64_t second, Next next) {
#if defined(__AVX512BF16__)
        if constexpr (sizeof(Operand) == 2) return interleaved(first, next(second));
#endif
        (void)second;
        (void)next;
        return first;
    }

    // Turns scores into weights, and leaves one over the sum of each query.
    template <int Vectors>
    void softmax(const float* scores, float* weights, Vec (&inverse)[Vectors]) const {
        constexpr int64_t columns = Vectors * kLanes;
        const float by = scale * kLog2E;
        Vec largest[Vectors], sum[Vectors] = {};
        for (int j = 0; j < Vectors; ++j) largest[j] = load(scores + j * kLanes);
        for (int64_t n = 1; n < tokens; ++n) CROSSVIT_UNROLL
        for (int j = 0; j < Vectors; ++j)
            largest[j] = maximum(largest[j], load(scores + n * columns + j * kLanes));
        CROSSVIT_UNROLL
        for (int j = 0; j < Vectors; ++j) largest[j] *= by;
        constexpr int64_t each = kOfAStep<Operand>;
        for (int64_t n = 0; n < steps_of<Operand>(tokens) * each; n += each) CROSSVIT_UNROLL
        for (int j = 0; j < Vectors; ++j) {
            const auto weight = [&](int64_t i) {
                if (i >= tokens) return Vec{};
                const Vec p =
                    exp2_of_negative(load(scores + i * columns + j * kLanes) * by - largest[j], Operand{});
                sum[j] += p;
                return p;
            };
            store(step_of(weight(n), n + 1, weight), weights + n / each * columns + j * kLanes);
        }
        CROSSVIT_UNROLL
        for (int j = 0; j < Vectors; ++j) inverse[j] = 1.0f / sum[j];
    }

    template <int Vectors>
    void attend(int64_t first, int64_t count) const {
        constexpr int64_t columns = Vectors * kLanes;
        const int64_t steps = steps_of<Operand>(channels), packed = packed_block<Operand>(steps);
        Word* queries = memory + at.queries;
        pack_right<Operand>(Source<T>{q + first * row, row, count, channels, nullptr}, queries, columns);
        float* scores = floats(at.scores);
        const RowBlocks<Operand> blocks(tokens), of_channels(channels);
        for (int64_t b = 0; b < blocks.count; ++b)
            multiply<Vectors, Operand>(blocks.size(b),
                                       Tile{memory + at.keys + b * packed, blocks.size(b), queries, steps,
                                            scores + blocks.first(b) * columns, columns});
        Vec inverse[Vectors];
        float* weights = sizeof(Operand) == 4 ? scores : floats(at.weights);
        softmax<Vectors>(scores, weights, inverse);
        float* result = floats(at.result);
        for (int64_t b = 0; b < of_channels.count; ++b)
            multiply<Vectors, Operand>(of_channels.size(b),
                                       Tile{values_of(of_channels, b), rounded_up(channels, kLanes),
                                            reinterpret_cast<const Word*>(weights), steps_of<Operand>(tokens),
                                            result + of_channels.first(b) * columns, columns});
        for (int j = 0; j < Vectors; ++j)
            for (int64_t c = 0; c < channels; c += kLanes) {
                Vec turned[kLanes];
                CROSSVIT_UNROLL
                for (int i = 0; i < kLanes; ++i)
                    turned[i] = load(result + (c + i) * columns + j * kLanes) * inverse[j];
                transpose(turned);
                const int64_t rest = channels - c;
                T* to = out + (first + j * kLanes) * out_row + c;
                CROSSVIT_UNROLL
                for (int i = 0; i < kLanes; ++i) {
                    if (j * kLanes + i >= count) break;
                    if (rest >= kLanes)
                        store(turned[i], to + i * out_row);
                    else
                        store(turned[i], to + i * out_row, rest);
                }
            }
    }
};

template <class Operand, class T>
void attention_in(const Team& team, const Worker& worker, const SelfAttentionStep& step, int64_t image,
                  int32_t* memory) {
    const int64_t d = step.head_channels, width = step.heads * d;
    const T* qkv = worker.at<const T>(step.qkv, image);
    const int64_t row = step.qkv.of_row / static_cast<int64_t>(sizeof(T));
    const int64_t out_row = step.out.of_row / static_cast<int64_t>(sizeof(T));
    const int64_t blocks = (step.tokens + kTileColumns - 1) / kTileColumns;
    int64_t packed = -1;
    team.share(step.heads * blocks, [&](int64_t task) {
        const int64_t head = task / blocks, first = task % blocks * kTileColumns;
        const T* q = qkv + head * d;
        const HeadAttention<Operand, T> of_head{q,
                                                q + width,
                                                q + 2 * width,
                                                worker.at<T>(step.out, image) + head * d,
                                                row,
                                                out_row,
                                                step.tokens,
                                                d,
                                                static_cast<float>(step.scale),
                                                memory,
                                                AttentionMemory(step)};
        if (head != packed) of_head.pack_head();
        packed = head;
        const int64_t count = step.tokens - first < kTileColumns ? step.tokens - first : kTileColumns;
        if (count <= kLanes)
            of_head.template attend<1>(first, count);
        else
            of_head.template attend<kTileVectors>(first, count);
    });
    team.wait();
}

inline int64_t self_attention_scratch(const SelfAttentionStep& step) { return AttentionMemory(step).total; }

inline void run_step(const Team& team, const Worker& worker, const SelfAttentionStep& step, int64_t image) {
    int32_t* memory = worker.scratch + team.rank * self_attention_scratch(step);
    with_type(step.qkv.dtype, [&](auto type) {
        using T = decltype(type);
        with_operand(step.precision, [&](auto operand) {
            attention_in<decltype(operand), T>(team, worker, step, image, memory);
        });
    });
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
