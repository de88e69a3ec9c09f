// Linear layers on a few rows (one an image), forward and backward.
//
// A layer has a weight [segments * rows, columns]. Each segment has an input row of its own: one segment is a
// plain linear layer, a segment a head is what the projections of the absorbed query and of the values need.
// With i = (s, r) a row of the weight and b an image:
//
//     linear       out[b, i] = sum_c x[b, s, c] W[i, c] + factor[b, s] bias[i]
//     transposed   out[b, s, c] = sum_r a[b, i] W[i, c]              gradient of x from that of out
//     outer        dW[i, c] = sum_b a[b, i] x[b, s, c]               gradient of W
//
// The weight is read once for each panel of images and stays in its storage type in memory. Rows of floats
// are padded with zeros to whole vectors.
#pragma once

#include "layer_norm.h"
#include "products.h"
#include "team.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

struct Layer {
    const void* weight;
    int64_t row_stride;
    Dtype dtype;
    int64_t segments, rows, columns;
};

// Float rows of all images: [b, s] starts at data + b * batch_stride + s * segment_stride.
struct Inputs {
    const float* data;
    int64_t batch_stride, segment_stride;
};

constexpr int64_t kTaskRows = 4 * kDotRows;
constexpr int64_t kPanel = 4 * kMaxGroups;        // images whose rows fit in the L1 cache
constexpr int64_t kTaskColumns = 48;              // a multiple of kVectors * kLanes
constexpr int64_t kMaxTaskRows = 4 * kMaxGroups;  // of `outer`
static_assert(kTaskColumns % (kVectors * kLanes) == 0, "no remainder inside a layer");

inline void linear(const Team& team, const Layer& layer, int64_t batch, Inputs x, const float* bias,
                   const float* factor, int64_t factor_stride, float* out, int64_t out_stride) {
    const int64_t blocks = (layer.rows + kTaskRows - 1) / kTaskRows;
    with_type(layer.dtype, [&](auto type) {
        using T = decltype(type);
        team.share(layer.segments * blocks, [&](int64_t task) {
            const int64_t s = task / blocks, r = task % blocks * kTaskRows;
            const int64_t count = layer.rows - r < kTaskRows ? layer.rows - r : kTaskRows;
            const int64_t i = s * layer.rows + r;
            const Rows<T> rows = {static_cast<const T*>(layer.weight) + i * layer.row_stride,
                                  layer.row_stride, count, layer.columns};
            for (int64_t b = 0; b < batch; b += kPanel) {
                const int64_t images = batch - b < kPanel ? batch - b : kPanel;
                dots(rows, images, x.data + b * x.batch_stride + s * x.segment_stride, x.batch_stride,
                     out + b * out_stride + i, out_stride);
            }
            if (i + count == layer.segments * layer.rows)
                for (int64_t b = 0; b < batch; ++b)
                    for (int64_t j = i + count; j < rounded_up(i + count, kLanes); ++j)
                        out[b * out_stride + j] = 0.0f;
            if (!bias) return;
            for (int64_t b = 0; b < batch; ++b) {
                const float by = factor ? factor[b * factor_stride + s] : 1.0f;
                for (int64_t j = i; j < i + count; ++j) out[b * out_stride + j] += by * bias[j];
            }
        });
    });
}

inline void transposed(const Team& team, const Layer& layer, int64_t batch, const float* a, int64_t a_stride,
                       float* out, int64_t out_batch_stride, int64_t out_segment_stride) {
    const int64_t blocks = (layer.columns + kTaskColumns - 1) / kTaskColumns;
    with_type(layer.dtype, [&](auto type) {
        using T = decltype(type);
        team.share(layer.segments * blocks, [&](int64_t task) {
            const int64_t s = task / blocks, c = task % blocks * kTaskColumns;
            const int64_t count = layer.columns - c < kTaskColumns ? layer.columns - c : kTaskColumns;
            const int64_t i = s * layer.rows;
            const Rows<T> rows = {static_cast<const T*>(layer.weight) + i * layer.row_stride + c,
                                  layer.row_stride, layer.rows, count};
            accumulate(rows, batch, Weights{a + i, a_stride, 1}, nullptr, out + s * out_segment_stride + c,
                       out_batch_stride);
        });
    });
}

// Floats that `outer` needs for itself, a thread.
constexpr int64_t outer_scratch(int64_t columns) { return kMaxTaskRows * rounded_up(columns, 16); }

inline void outer(const Team& team, const Layer& layer, int64_t batch, const float* a, int64_t a_stride,
                  Inputs x, void* gradient, float* scratch) {
    const int64_t size = balanced(layer.rows, kMaxTaskRows);
    const int64_t blocks = (layer.rows + size - 1) / size;
    const int64_t padded = rounded_up(layer.columns, 16);
    team.share(layer.segments * blocks, [&](int64_t task) {
        const int64_t s = task / blocks, r = task % blocks * size;
        const int64_t count = layer.rows - r < size ? layer.rows - r : size;
        const int64_t i = s * layer.rows + r;
        const Rows<float> rows = {x.data + s * x.segment_stride, x.batch_stride, batch,
                                  rounded_up(layer.columns, kLanes)};
        char* to = static_cast<char*>(gradient) + i * layer.columns * size_of(layer.dtype);
        if (layer.dtype == Dtype::float32 && layer.columns % kLanes == 0) {
            accumulate(rows, count, Weights{a + i, 1, a_stride}, nullptr, reinterpret_cast<float*>(to),
                       layer.columns);
            return;
        }
        accumulate(rows, count, Weights{a + i, 1, a_stride}, nullptr, scratch, padded);
        for (int64_t j = 0; j < count; ++j)
            store_row(scratch + j * padded, layer.columns, layer.dtype,
                      to + j * layer.columns * size_of(layer.dtype), 1);
    });
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
