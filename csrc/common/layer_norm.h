// Rows of any storage type and stride as floats, and LayerNorm on them.
#pragma once

#include "vector.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

template <class T>
CROSSVIT_INLINE void load_row_of(const T* x, int64_t stride, int64_t columns, float* row) {
    int64_t c = 0;
    if (stride == 1)
        for (; c + kLanes <= columns; c += kLanes) store(load(x + c), row + c);
    for (; c < columns; ++c) row[c] = load(x + c * stride, 1)[0];
}

// row[c] = x[c * stride] as float, zeros behind up to a multiple of `pad`.
inline void load_row(Dtype dtype, const void* x, int64_t stride, int64_t columns, float* row,
                     int64_t padded) {
    if (dtype == Dtype::float32)
        load_row_of(static_cast<const float*>(x), stride, columns, row);
    else if (dtype == Dtype::bfloat16)
        load_row_of(static_cast<const BFloat16*>(x), stride, columns, row);
    else
        load_row_of(static_cast<const Float16*>(x), stride, columns, row);
    for (int64_t c = columns; c < padded; ++c) row[c] = 0.0f;
}

template <class T>
CROSSVIT_INLINE void store_row_of(const float* row, int64_t columns, T* x, int64_t stride) {
    int64_t c = 0;
    if (stride == 1)
        for (; c + kLanes <= columns; c += kLanes) store(load(row + c), x + c);
    for (; c < columns; ++c) store(broadcast(row[c]), x + c * stride, 1);
}

inline void store_row(const float* row, int64_t columns, Dtype dtype, void* x, int64_t stride) {
    if (dtype == Dtype::float32)
        store_row_of(row, columns, static_cast<float*>(x), stride);
    else if (dtype == Dtype::bfloat16)
        store_row_of(row, columns, static_cast<BFloat16*>(x), stride);
    else
        store_row_of(row, columns, static_cast<Float16*>(x), stride);
}

// Mean and variance of each of a few rows; together, because one row alone waits for its own sums most of the
// time. The variance is taken about the mean: E[x^2] - E[x]^2 loses every digit when the mean is large.
template <int Count, class T>
CROSSVIT_INLINE void moments_of(const T* rows, int64_t stride, int64_t columns, float* mean,
                                float* variance) {
    constexpr int room = (Count + kLanes - 1) / kLanes * kLanes;
    const int64_t whole = columns / kLanes * kLanes, rest = columns - whole;
    Vec sum[Count] = {};
    for (int64_t c = 0; c < whole; c += kLanes) {
        CROSSVIT_UNROLL
        for (int r = 0; r < Count; ++r) sum[r] += load(rows + r * stride + c);
    }
    if (rest) {
        CROSSVIT_UNROLL
        for (int r = 0; r < Count; ++r) sum[r] += load(rows + r * stride + whole, rest);
    }
    float sums[room];
    sums_of_lanes(sum, sums);
    for (int r = 0; r < Count; ++r) mean[r] = sums[r] / static_cast<float>(columns);
    Vec square[Count] = {};
    for (int64_t c = 0; c < whole; c += kLanes) {
        CROSSVIT_UNROLL
        for (int r = 0; r < Count; ++r) {
            const Vec x = load(rows + r * stride + c) - mean[r];
            square[r] += x * x;
        }
    }
    if (rest) {
        CROSSVIT_UNROLL
        for (int r = 0; r < Count; ++r) {
            const Vec x = load(rows + r * stride + whole, rest) - mean[r];
            square[r] += select(first_lanes(rest), x * x, Vec{});
        }
    }
    sums_of_lanes(square, sums);
    for (int r = 0; r < Count; ++r) variance[r] = sums[r] / static_cast<float>(columns);
}

template <int Count>
CROSSVIT_INLINE void normalise_of(float* rows, int64_t stride, int64_t columns, float eps, float* factor) {
    float mean[Count], variance[Count];
    moments_of<Count>(rows, stride, columns, mean, variance);
    for (int r = 0; r < Count; ++r) {
        factor[r] = 1.0f / __builtin_sqrtf(variance[r] + eps);
        float* row = rows + r * stride;
        for (int64_t c = 0; c < columns; c += kLanes) store((load(row + c) - mean[r]) * factor[r], row + c);
        // What the padding meets is zero, but 0 - mean may overflow, and infinity times zero is NaN.
        for (int64_t c = columns; c % kLanes; ++c) row[c] = 0.0f;
    }
}

// Padded rows become (row - mean) / sqrt(variance + eps), of which the factors are returned.
inline void normalise(float* rows, int64_t count, int64_t stride, int64_t columns, float eps, float* factor) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) normalise_of<4>(rows + r * stride, stride, columns, eps, factor + r);
    for (; r < count; ++r) normalise_of<1>(rows + r * stride, stride, columns, eps, factor + r);
}

inline float normalise(float* row, int64_t columns, float eps) {
    float factor;
    normalise_of<1>(row, 0, columns, eps, &factor);
    return factor;
}

// Gradient of normalise: from that of its result (in `grad`), the result and the factor. Written over `grad`.
inline void normalise_backward(float* grad, const float* hat, float factor, int64_t columns) {
    Vec sum = {}, product = {};
    for (int64_t c = 0; c < columns; c += kLanes) {
        sum += load(grad + c);
        product += load(grad + c) * load(hat + c);
    }
    const float mean = sum_of_lanes(sum) / static_cast<float>(columns);
    const float mean_product = sum_of_lanes(product) / static_cast<float>(columns);
    for (int64_t c = 0; c < columns; c += kLanes)
        store((load(grad + c) - mean - load(hat + c) * mean_product) * factor, grad + c);
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
