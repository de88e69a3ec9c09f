// Products of large matrices: the inner loop of linear layers, patch embedding and self-attention.
//
//     left    [steps][rows]      a block of at most kTileRows rows, the steps outermost
//     right   [steps][columns]   a panel of kTileColumns columns, or of one vector of them
//     out     [rows][columns]    one tile of sums, float32
//
// A step is 32 bits of the inner dimension: a float, or two bfloat16, which vdpbf16ps multiplies and adds at
// once. With AVX-512 a tile is 14 rows x 2 vectors: 28 registers of sums, 2 of the right operand and 1 that
// has a number of the left one in all its lanes, of 32. A step is then 28 multiply-adds for 16 loads, so that
// the multiply-adds are what limits it.
#pragma once

#include "layer_norm.h"
#include "vector.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kTileColumns = kTileVectors * kLanes;

// What is multiplied. Where there is no instruction for bfloat16, it is widened while it is packed.
#if defined(__AVX512BF16__)
using HalfOperand = BFloat16;
#else
using HalfOperand = float;
#endif
template <class Operand>
constexpr int64_t kOfAStep = 4 / sizeof(Operand);

using Word = int32_t;  // a step of packed operands

// Whether a matrix unit multiplies them; then it is amx.h that says how the left operand lies.
#if defined(__AMX_BF16__)
template <class Operand>
constexpr bool kOnUnit = sizeof(Operand) == 2;
#else
template <class Operand>
constexpr bool kOnUnit = false;
constexpr int kUnitRows = 0, kUnitSteps = 1;
struct MatrixUnit {
    MatrixUnit() {}  // not trivial, so that nobody calls it unused
};
#endif

// Rows of a tile, the most.
template <class Operand>
constexpr int kRows = kOnUnit<Operand> ? kUnitRows : kTileRows;

template <class Operand>
constexpr int64_t steps_of(int64_t channels) {
    const int64_t steps = (channels + kOfAStep<Operand> - 1) / kOfAStep<Operand>;
    return kOnUnit<Operand> ? rounded_up(steps, kUnitSteps) : steps;
}

// Words that a block of rows takes when it is packed as the left operand.
template <class Operand>
constexpr int64_t packed_block(int64_t steps) {
    return kOnUnit<Operand> ? steps * kUnitRows : steps * kTileRows + kLanes;
}

CROSSVIT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum, float) { return sum + a * b; }

#if defined(__AVX512BF16__)
CROSSVIT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum, BFloat16) {
    return bits<Vec>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
}
#endif

// Else the compiler would read the number from memory again for each vector it is multiplied by.
CROSSVIT_INLINE void keep_in_register(Vec& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__SSE2__)
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

// Steps of the right operand that are asked for ahead: a panel streams from the L2 cache.
constexpr int64_t kAhead = 16;

struct Tile {
    const Word* left;
    int64_t left_step;  // steps lie this far apart
    const Word* right;  // likewise `Vectors` vectors
    int64_t steps;
    float* out;
    int64_t out_row;
    // What will be read next, from the L3 cache or from memory: `ahead_step` bytes are asked for with each
    // step.
    const char* ahead = nullptr;
    int64_t ahead_step = 0;
};

template <int Rows, int Vectors, class Operand>
void multiply_tile(const Tile& tile) {
    Vec sum[Rows * Vectors] = {};
    const Word *left = tile.left, *right = tile.right;
    const char* ahead = tile.ahead;
    for (int64_t k = 0; k < tile.steps; ++k) {
        Vec b[Vectors];
        CROSSVIT_UNROLL
        for (int j = 0; j < Vectors; ++j) {
            __builtin_memcpy(&b[j], right + j * kLanes, sizeof b[j]);
            __builtin_prefetch(right + (kAhead * Vectors + j) * kLanes);
        }
        CROSSVIT_UNROLL
        for (int i = 0; i < Rows; ++i) {
            Vec a = bits<Vec>(IntVec{} + left[i]);
            keep_in_register(a);
            CROSSVIT_UNROLL
            for (int j = 0; j < Vectors; ++j)
                sum[i * Vectors + j] = multiply_add(a, b[j], sum[i * Vectors + j], Operand{});
        }
        __builtin_prefetch(ahead, 0, 2);
        ahead += tile.ahead_step;
        left += tile.left_step;
        right += Vectors * kLanes;
    }
    CROSSVIT_UNROLL
    for (int i = 0; i < Rows; ++i) CROSSVIT_UNROLL
    for (int j = 0; j < Vectors; ++j) store(sum[i * Vectors + j], tile.out + i * tile.out_row + j * kLanes);
}

template <int Vectors, class Operand, int... Row>
CROSSVIT_INLINE void multiply_rows(int64_t rows, const Tile& tile, Lanes<Row...>) {
    static constexpr void (*of_rows[])(const Tile&) = {multiply_tile<Row + 1, Vectors, Operand>...};
    of_rows[rows - 1](tile);
}

// One tile of 1 to kRows rows; `out` has room for all of them.
template <int Vectors, class Operand>
CROSSVIT_INLINE void multiply(int64_t rows, const Tile& tile) {
#if defined(__AMX_BF16__)
    if constexpr (kOnUnit<Operand>) {
        return multiply_on_unit<Vectors>(tile.left, tile.right, tile.steps, tile.out, tile.out_row,
                                         tile.ahead, tile.ahead_step * kUnitSteps);
    }
#endif
    multiply_rows<Vectors, Operand>(rows, tile, typename CountLanes<kTileRows>::type{});
}

// Packing

template <int First, int... Lane>
CROSSVIT_INLINE Vec interleave(Vec a, Vec b, Lanes<Lane...>) {
#ifdef CROSSVIT_SHUFFLEVECTOR
    return __builtin_shufflevector(a, b, (First + Lane / 2 + Lane % 2 * kLanes)...);
#else
    return __builtin_shuffle(a, b, IntVec{(First + Lane / 2 + Lane % 2 * kLanes)...});
#endif
}

// Each round shuffles the bits of (row, lane) by one place; after as many as a lane has, they are exchanged.
CROSSVIT_INLINE void transpose(Vec (&row)[kLanes]) {
    using All = typename CountLanes<kLanes>::type;
    CROSSVIT_UNROLL
    for (int round = 1; round < kLanes; round *= 2) {
        Vec next[kLanes];
        CROSSVIT_UNROLL
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = interleave<0>(row[i], row[i + kLanes / 2], All{});
            next[2 * i + 1] = interleave<kLanes / 2>(row[i], row[i + kLanes / 2], All{});
        }
        CROSSVIT_UNROLL
        for (int i = 0; i < kLanes; ++i) row[i] = next[i];
    }
}

// How a row is normalised before it is packed: (x - mean) * factor.
struct Normal {
    float mean, factor;
};

// kLanes steps of a row from its channel `x` on, where so many exist.
template <bool Normalises, class T>
CROSSVIT_INLINE Vec pack_steps(const T* x, const Normal& normal, float) {
    return Normalises ? (load(x) - normal.mean) * normal.factor : load(x);
}

#if defined(__AVX512BF16__)
template <bool Normalises, class T>
CROSSVIT_INLINE Vec pack_steps(const T* x, const Normal& normal, BFloat16) {
    const Vec low = pack_steps<Normalises>(x, normal, 0.0f);
    const Vec high = pack_steps<Normalises>(x + kLanes, normal, 0.0f);
    return bits<Vec>(_mm512_cvtne2ps_pbh(bits<__m512>(high), bits<__m512>(low)));
}

template <bool Normalises>
CROSSVIT_INLINE Vec pack_steps(const BFloat16* x, const Normal& normal, BFloat16) {
    if constexpr (Normalises) return pack_steps<true, BFloat16>(x, normal, BFloat16{});
    return load_bits<Vec>(x);
}
#endif

template <class T>
struct Source {
    const T* data;
    int64_t row;  // elements from one row to the next; channels are contiguous
    int64_t rows, channels;
    const Normal* normal;  // of each row, or null
};

// kLanes steps of row r; those behind its channels are zero.
template <class Operand, bool Normalises, class T>
CROSSVIT_INLINE Vec steps_of_row(const Source<T>& x, int64_t r, int64_t step) {
    constexpr int64_t whole = kLanes * kOfAStep<Operand>;
    const int64_t channel = step * kOfAStep<Operand>, rest = x.channels - channel;
    const Normal normal = Normalises ? x.normal[r] : Normal{};
    const T* from = x.data + r * x.row + channel;
    if (rest >= whole) return pack_steps<Normalises>(from, normal, Operand{});
    T padded[whole] = {};
    for (int64_t c = 0; c < rest; ++c) padded[c] = from[c];
    return pack_steps<Normalises>(padded, normal, Operand{});
}

// Up to kLanes rows from a step on, turned, to `out`, whose steps lie `out_step` apart. `Stored` lanes of
// each step are written, or as many as there are rows.
template <class Operand, bool Normalises, int Stored, class T>
CROSSVIT_INLINE void pack_lanes(const Source<T>& x, int64_t first, int64_t step, Word* out,
                                int64_t out_step) {
    const int64_t rows = x.rows - first < kLanes ? x.rows - first : kLanes;
    Vec turned[kLanes];
    CROSSVIT_UNROLL
    for (int i = 0; i < kLanes; ++i)  // the last row again where there is none
        turned[i] = steps_of_row<Operand, Normalises>(x, first + (i < rows ? i : rows - 1), step);
    transpose(turned);
    const int64_t left = steps_of<Operand>(x.channels) - step, count = left < kLanes ? left : kLanes;
    for (int64_t i = 0; i < count; ++i) {
        Word* to = out + (step + i) * out_step;
        __builtin_memcpy(to, &turned[i], Stored ? Stored * sizeof(Word) : rows * sizeof(Word));
    }
}

// Rows as [steps][out_step]: the left operand, where out_step is `rows`, or a panel of the right one. Up to
// kLanes words behind the end are written to.
template <class Operand, bool Normalises, class T>
void pack_turned(const Source<T>& x, Word* out, int64_t out_step) {
    const int64_t steps = steps_of<Operand>(x.channels);
    for (int64_t first = 0; first < x.rows; first += kLanes)
        for (int64_t step = 0; step < steps; step += kLanes) {
            // What is too much of a row, the next one overwrites.
            if (first == 0 || first + kLanes <= out_step)
                pack_lanes<Operand, Normalises, kLanes>(x, first, step, out + first, out_step);
            else
                pack_lanes<Operand, Normalises, 0>(x, first, step, out + first, out_step);
        }
}

// At most kRows rows as the left operand.
template <class Operand, bool Normalises, class T>
void pack_left_as(const Source<T>& x, Word* out) {
    if constexpr (!kOnUnit<Operand>) return pack_turned<Operand, Normalises>(x, out, x.rows);
    const int64_t steps = steps_of<Operand>(x.channels);
    for (int64_t r = 0; r < x.rows; ++r)
        for (int64_t step = 0; step < steps; step += kLanes) {
            const Vec packed = steps_of_row<Operand, Normalises>(x, r, step);
            __builtin_memcpy(out + step * kUnitRows + r * kLanes, &packed, sizeof packed);
        }
}

template <class Operand, class T>
void pack_left(const Source<T>& x, Word* out) {
    x.normal ? pack_left_as<Operand, true>(x, out) : pack_left_as<Operand, false>(x, out);
}

template <class Operand, class T>
void pack_right(const Source<T>& x, Word* out, int64_t columns) {
    pack_turned<Operand, false>(x, out, columns);
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
