// The two small matrix products that everything here is made of. "Rows" lie in memory in their storage type
// (tokens of a tile, rows of a weight); "groups" are a few float vectors that read them (heads, or images of
// a batch):
//
//     dots         out[g][r] = sum_c rows[r][c] groups[g][c]        both run along the channels
//     accumulate   out[g][c] = keep[g] out[g][c] + sum_r weights[g][r] rows[r][c]
//
// A block of sums stays in registers: rows x groups for dots, groups x columns for accumulate. Both are
// limited by the two multiply-adds a cycle, and by memory where there is a single group.
#pragma once

#include "vector.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// Sums in registers, with what feeds them, are 7 x 4 + 4 or 7 x 3 + 4 of 32; 6 x 2 + 3 of 16.
constexpr int kMaxGroups = kManyRegisters ? 7 : 6;
constexpr int kDotRows = kManyRegisters ? 4 : 2;
constexpr int kVectors = kManyRegisters ? 3 : 2;

// Sizes of pieces that differ by one at most: n split into the fewest pieces of `most` or less.
CROSSVIT_INLINE int64_t balanced(int64_t n, int64_t most) {
    const int64_t pieces = (n + most - 1) / most;
    return (n + pieces - 1) / pieces;
}

template <class T>
struct Rows {
    const T* data;
    int64_t stride;  // elements from one row to the next; channels are contiguous
    int64_t count;
    int64_t columns;
};

template <int Groups, class T>
void dots_of(Rows<T> rows, const float* groups, int64_t group_stride, float* out, int64_t out_stride) {
    const int64_t whole = rows.columns / kLanes * kLanes;
    for (int64_t first = 0; first < rows.count; first += kDotRows) {
        // Past the end the last row is read again and its sums are not stored.
        const T* row[kDotRows];
        CROSSVIT_UNROLL
        for (int r = 0; r < kDotRows; ++r) {
            const int64_t index = first + r < rows.count ? first + r : rows.count - 1;
            row[r] = rows.data + index * rows.stride;
        }
        Vec sum[Groups * kDotRows] = {};
        for (int64_t c = 0; c < whole; c += kLanes) {
            Vec x[kDotRows];
            CROSSVIT_UNROLL
            for (int r = 0; r < kDotRows; ++r) x[r] = load(row[r] + c);
            CROSSVIT_UNROLL
            for (int g = 0; g < Groups; ++g) {
                const Vec y = load(groups + g * group_stride + c);
                CROSSVIT_UNROLL
                for (int r = 0; r < kDotRows; ++r) sum[g * kDotRows + r] += x[r] * y;
            }
        }
        if (whole < rows.columns) {
            const int64_t rest = rows.columns - whole;
            CROSSVIT_UNROLL
            for (int r = 0; r < kDotRows; ++r) {
                const Vec x = load(row[r] + whole, rest);
                CROSSVIT_UNROLL
                for (int g = 0; g < Groups; ++g)
                    sum[g * kDotRows + r] += x * load(groups + g * group_stride + whole, rest);
            }
        }
        float sums[rounded_up(Groups * kDotRows, kLanes)];
        sums_of_lanes(sum, sums);
        const int64_t valid = rows.count - first < kDotRows ? rows.count - first : kDotRows;
        for (int g = 0; g < Groups; ++g)
            for (int64_t r = 0; r < valid; ++r) out[g * out_stride + first + r] = sums[g * kDotRows + r];
    }
}

template <class T>
void dots(Rows<T> rows, int64_t count, const float* groups, int64_t group_stride, float* out,
          int64_t out_stride) {
    if (count == 0 || rows.count == 0) return;
    const int64_t size = balanced(count, kMaxGroups);
    for (int64_t g = 0; g < count; g += size) {
        const float* from = groups + g * group_stride;
        float* to = out + g * out_stride;
        switch (count - g < size ? count - g : size) {
            case 1:
                dots_of<1>(rows, from, group_stride, to, out_stride);
                break;
            case 2:
                dots_of<2>(rows, from, group_stride, to, out_stride);
                break;
            case 3:
                dots_of<3>(rows, from, group_stride, to, out_stride);
                break;
            case 4:
                dots_of<4>(rows, from, group_stride, to, out_stride);
                break;
            case 5:
                dots_of<5>(rows, from, group_stride, to, out_stride);
                break;
            case 6:
                dots_of<6>(rows, from, group_stride, to, out_stride);
                break;
            default:
                dots_of<kMaxGroups>(rows, from, group_stride, to, out_stride);
        }
    }
}

// weights[g][r] lies at data + g * group_stride + r * row_stride. keep: null to overwrite `out`.
struct Weights {
    const float* data;
    int64_t group_stride, row_stride;
};

template <int Groups, int Vectors, class T>
CROSSVIT_INLINE void accumulate_columns(Rows<T> rows, Weights weights, const float* keep, float* out,
                                        int64_t out_stride, int64_t c, int64_t rest) {
    Vec sum[Groups][Vectors];
    CROSSVIT_UNROLL
    for (int g = 0; g < Groups; ++g) {
        CROSSVIT_UNROLL
        for (int v = 0; v < Vectors; ++v)
            sum[g][v] = keep ? keep[g] * load(out + g * out_stride + c + v * kLanes) : Vec{};
    }
    for (int64_t r = 0; r < rows.count; ++r) {
        const T* row = rows.data + r * rows.stride + c;
        Vec x[Vectors];
        CROSSVIT_UNROLL
        for (int v = 0; v < Vectors; ++v) x[v] = rest == 0 ? load(row + v * kLanes) : load(row, rest);
        CROSSVIT_UNROLL
        for (int g = 0; g < Groups; ++g) {
            const float weight = weights.data[g * weights.group_stride + r * weights.row_stride];
            CROSSVIT_UNROLL
            for (int v = 0; v < Vectors; ++v) sum[g][v] += x[v] * weight;
        }
    }
    CROSSVIT_UNROLL
    for (int g = 0; g < Groups; ++g) {
        CROSSVIT_UNROLL
        for (int v = 0; v < Vectors; ++v) store(sum[g][v], out + g * out_stride + c + v * kLanes);
    }
}

template <int Groups, class T>
void accumulate_of(Rows<T> rows, Weights weights, const float* keep, float* out, int64_t out_stride) {
    int64_t c = 0;
    for (; c + kVectors * kLanes <= rows.columns; c += kVectors * kLanes)
        accumulate_columns<Groups, kVectors>(rows, weights, keep, out, out_stride, c, 0);
    for (; c + kLanes <= rows.columns; c += kLanes)
        accumulate_columns<Groups, 1>(rows, weights, keep, out, out_stride, c, 0);
    if (c < rows.columns)
        accumulate_columns<Groups, 1>(rows, weights, keep, out, out_stride, c, rows.columns - c);
}

// Rows of `out` have room for columns rounded up to kLanes.
template <class T>
void accumulate(Rows<T> rows, int64_t count, Weights weights, const float* keep, float* out,
                int64_t out_stride) {
    if (count == 0) return;
    const int64_t size = balanced(count, kMaxGroups);
    for (int64_t g = 0; g < count; g += size) {
        const Weights from = {weights.data + g * weights.group_stride, weights.group_stride,
                              weights.row_stride};
        const float* kept = keep ? keep + g : nullptr;
        float* to = out + g * out_stride;
        switch (count - g < size ? count - g : size) {
            case 1:
                accumulate_of<1>(rows, from, kept, to, out_stride);
                break;
            case 2:
                accumulate_of<2>(rows, from, kept, to, out_stride);
                break;
            case 3:
                accumulate_of<3>(rows, from, kept, to, out_stride);
                break;
            case 4:
                accumulate_of<4>(rows, from, kept, to, out_stride);
                break;
            case 5:
                accumulate_of<5>(rows, from, kept, to, out_stride);
                break;
            case 6:
                accumulate_of<6>(rows, from, kept, to, out_stride);
                break;
            default:
                accumulate_of<kMaxGroups>(rows, from, kept, to, out_stride);
        }
    }
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
