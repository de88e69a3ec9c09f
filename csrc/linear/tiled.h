// out = activation(norm(x) W^T + bias) + residual, for rows by the hundred.
//
//     rows of x, packed           panels of W, packed once
//     [14 rows][channels]    @    [channels][32 outputs]     ->  tile [14, 32] in registers
//       as many as fit into         stream through the           -> bias, activation, residual -> out
//       half of the L2 cache        L1 cache, each once
//
// LayerNorm is applied while rows are packed. Limit: the multiply-adds, 2 channels outputs operations a row.
#pragma once

#include "../common/team.h"
#include "../common/tiles.h"
#include "linear.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

constexpr int64_t kChunkSteps = 100 * 1024;  // of packed rows that one thread keeps in its L2 cache: 400 KB

// Rows are cut into blocks of a tile that differ by one row at most.
template <class Operand>
struct RowBlocks {
    int64_t rows, count;
    explicit RowBlocks(int64_t rows) : rows(rows), count((rows + kRows<Operand> - 1) / kRows<Operand>) {}
    int64_t first(int64_t block) const { return rows * block / count; }
    int64_t size(int64_t block) const { return first(block + 1) - first(block); }
};

template <class Operand>
constexpr int64_t blocks_of_chunk(int64_t steps) {
    const int64_t blocks = kChunkSteps / packed_block<Operand>(steps);
    return blocks > 0 ? blocks : 1;
}

// body(Operand{}) for what a precision is multiplied in here.
template <class Body>
CROSSVIT_INLINE auto with_operand(Precision precision, Body body) {
    return precision == Precision::bfloat16 ? body(HalfOperand{}) : body(float{});
}

// Words of scratch memory that a thread of the team adds.
inline int64_t linear_scratch(const LinearStep& step) {
    return with_operand(step.precision, [&](auto operand) {
        using Operand = decltype(operand);
        const int64_t steps = steps_of<Operand>(step.channels);
        return blocks_of_chunk<Operand>(steps) * packed_block<Operand>(steps);
    });
}

// Statistics of LayerNorm, of `count` rows that lie `of_row` elements apart.
template <class T>
void normals_of(const T* x, int64_t of_row, int64_t count, int64_t channels, float eps, Normal* normals) {
    float mean[4], variance[4];
    int64_t r = 0;
    const auto keep = [&](int64_t rows) {
        for (int64_t i = 0; i < rows; ++i)
            normals[r + i] = {mean[i], 1.0f / __builtin_sqrtf(variance[i] + eps)};
        r += rows;
    };
    while (r + 4 <= count) {
        moments_of<4>(x + r * of_row, of_row, channels, mean, variance);
        keep(4);
    }
    while (r < count) {
        moments_of<1>(x + r * of_row, of_row, channels, mean, variance);
        keep(1);
    }
}

template <Activation A, bool Adds, class T>
void finish(const float* sums, int64_t rows, int64_t columns, const float* bias, const T* residual,
            int64_t of_residual, T* out, int64_t of_out) {
    const auto finished = [](Vec v) {
        if constexpr (A == Activation::gelu) v = sizeof(T) == 4 ? fast_gelu(v) : short_gelu(v);
        if constexpr (A == Activation::relu) v = maximum(v, Vec{});
        return v;
    };
    for (int64_t i = 0; i < rows; ++i) {
        const float* row = sums + i * kTileColumns;
        for (int64_t j = 0; j < columns; j += kLanes) {
            const int64_t rest = columns - j;
            Vec v = finished(load(row + j) + load(bias + j));
            if (rest >= kLanes) {
                if constexpr (Adds) v += load(residual + i * of_residual + j);
                store(v, out + i * of_out + j);
            } else {
                if constexpr (Adds) v += load(residual + i * of_residual + j, rest);
                store(v, out + i * of_out + j, rest);
            }
        }
    }
}

template <class T>
void finish_tile(const LinearStep& step, const float* sums, int64_t rows, int64_t columns, const float* bias,
                 const T* residual, int64_t of_residual, T* out, int64_t of_out) {
    const auto with = [&](auto function) {
        function(sums, rows, columns, bias, residual, of_residual, out, of_out);
    };
    switch (step.activation) {
        case Activation::none:
            return residual ? with(finish<Activation::none, true, T>)
                            : with(finish<Activation::none, false, T>);
        case Activation::gelu:
            return residual ? with(finish<Activation::gelu, true, T>)
                            : with(finish<Activation::gelu, false, T>);
        case Activation::relu:
            return residual ? with(finish<Activation::relu, true, T>)
                            : with(finish<Activation::relu, false, T>);
    }
}

template <class Operand, class In>
void pack_block(const LinearStep& step, const In* x, int64_t of_row, int64_t rows, Word* out) {
    Normal normals[kRows<Operand>];
    if (step.normalises) normals_of(x, of_row, rows, step.channels, static_cast<float>(step.eps), normals);
    pack_left<Operand>(Source<In>{x, of_row, rows, step.channels, step.normalises ? normals : nullptr}, out);
}

template <class Operand>
void linear_in(const Team& team, const Worker& worker, const LinearStep& step, int64_t image) {
    const RowBlocks<Operand> blocks(step.rows);
    const int64_t steps = steps_of<Operand>(step.channels), packed = packed_block<Operand>(steps);
    const int64_t panels = (step.outputs + kTileColumns - 1) / kTileColumns;
    const int64_t chunks_of = blocks_of_chunk<Operand>(steps) * team.size;
    const int64_t chunks = (blocks.count + chunks_of - 1) / chunks_of;
    const char *x = worker.at(step.x, image), *residual = worker.at(step.residual, image);
    char* out = worker.at(step.out, image);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = blocks.count * chunk / chunks;
        const int64_t count = blocks.count * (chunk + 1) / chunks - begin;
        team.share(count, [&](int64_t i) {
            const int64_t row = blocks.first(begin + i), rows = blocks.size(begin + i);
            const char* from = x + row * step.x.of_row;
            Word* to = worker.scratch + i * packed;
            with_type(step.x.dtype, [&](auto type) {
                using In = decltype(type);
                const int64_t of_row = step.x.of_row / static_cast<int64_t>(sizeof(In));
                pack_block<Operand>(step, reinterpret_cast<const In*>(from), of_row, rows, to);
            });
        });
        team.wait();
        team.share(panels * count, [&](int64_t task) {
            const int64_t panel = task / count, i = task % count, row = blocks.first(begin + i);
            const int64_t rows = blocks.size(begin + i), column = panel * kTileColumns;
            const int64_t columns =
                step.outputs - column < kTileColumns ? step.outputs - column : kTileColumns;
            alignas(64) float sums[kRows<Operand> * kTileColumns];
            // The blocks of this panel ask for the next one together, a piece each.
            const Word* right = step.weight + panel * steps * kTileColumns;
            const int64_t piece = (steps * kTileColumns + count - 1) / count;
            const Word* ahead = right + steps * kTileColumns + i * piece;
            const int64_t ahead_step = panel + 1 < panels ? kTileColumns * 4 / count + 1 : 0;
            multiply<kTileVectors, Operand>(
                rows, Tile{worker.scratch + i * packed, rows, right, steps, sums, kTileColumns,
                           reinterpret_cast<const char*>(ahead), ahead_step});
            with_type(step.out.dtype, [&](auto type) {
                using T = decltype(type);
                constexpr int64_t size = sizeof(T);
                const T* add = reinterpret_cast<const T*>(residual + row * step.residual.of_row);
                T* to = reinterpret_cast<T*>(out + row * step.out.of_row);
                finish_tile<T>(step, sums, rows, columns, step.bias + column,
                               residual ? add + column : nullptr, step.residual.of_row / size, to + column,
                               step.out.of_row / size);
            });
        });
        team.wait();
    }
}

inline void run_step(const Team& team, const Worker& worker, const LinearStep& step, int64_t image) {
    with_operand(step.precision,
                 [&](auto operand) { linear_in<decltype(operand)>(team, worker, step, image); });
}

// Words of a packed weight, and the packing of it.
inline int64_t packed_weight_steps(const PackedWeight& w) {
    return with_operand(w.precision, [&](auto operand) {
        return rounded_up(w.outputs, kTileColumns) * steps_of<decltype(operand)>(w.channels);
    });
}

template <class Operand>
void pack_panels(const Team& team, const PackedWeight& w, Word* out) {
    const int64_t steps = steps_of<Operand>(w.channels);
    team.share((w.outputs + kTileColumns - 1) / kTileColumns, [&](int64_t panel) {
        const int64_t first = panel * kTileColumns;
        const int64_t rows = w.outputs - first < kTileColumns ? w.outputs - first : kTileColumns;
        Word* to = out + first * steps;
        for (int64_t i = 0; i < steps * kTileColumns; ++i) to[i] = 0;
        with_type(w.dtype, [&](auto type) {
            using T = decltype(type);
            const T* from = static_cast<const T*>(w.weight) + first * w.of_row;
            pack_right<Operand>(Source<T>{from, w.of_row, rows, w.channels, nullptr}, to, kTileColumns);
        });
    });
}

inline void pack_weight(const Team& team, const PackedWeight& w, Word* out) {
    with_operand(w.precision, [&](auto operand) { pack_panels<decltype(operand)>(team, w, out); });
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
