// Where the kernels leave what they compute for each other: float32 rows of an image in three buffers.
// `saved` goes from forward to backward, `scratch` lives within backward, `parts` between blocks of one
// image. The layout of `saved` is that of crossvit_kernels/cross_attention/triton_buffers.py too: one backend
// may go on where another stopped.
//
// The names below count padded widths. Sums of columns of `scratch` over the batch are the gradients of
// biases and LayerNorms, products of two of its columns over the batch those of the matrices: nothing is
// accumulated by atomics, and every sum has one order.
#pragma once

#include "cuda.h"

namespace crossvit {

// Rows start at multiples of 16 elements, so that they are read 16 bytes at a time.
__host__ __device__ constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

struct Saved {
    enum Column : int64_t { Cls, Query, Output, Y, Projected, Z };  // from Z on, z of each head, then its key
    // Then, a number a head: log2 of the sum of the exponentials, and the sum of the attention after dropout.

    static __host__ __device__ int64_t columns(const Direction& d) {
        return (Z + 2 * d.heads) * padded(d.width) + 2 * padded(d.heads);
    }
    static __device__ float* row(const Direction& d, int64_t image) { return d.saved + image * columns(d); }
    static __device__ float* column(const Direction& d, int64_t image, Column name) {
        return row(d, image) + name * padded(d.width);
    }
    static __device__ float* z(const Direction& d, int64_t image, int64_t head) {
        return row(d, image) + (Z + head) * padded(d.width);
    }
    // Wk_h^T q_h log2(e) / sqrt(d), which gamma makes the absorbed query.
    static __device__ float* key(const Direction& d, int64_t image, int64_t head) {
        return row(d, image) + (Z + d.heads + head) * padded(d.width);
    }
    static __device__ float* log_sum(const Direction& d, int64_t image) {
        return row(d, image) + (Z + 2 * d.heads) * padded(d.width);
    }
    static __device__ float* kept_sum(const Direction& d, int64_t image) {
        return log_sum(d, image) + padded(d.heads);
    }
};

struct Scratch {
    enum Column : int64_t {
        DY,
        DProjected,
        BackActivation,
        DBackNorm,
        DBackGamma,
        DOutput,
        DValueBias,
        DQuery,
        Normed,
        DNorm,
        DGamma,
        DRow,  // of the CLS token as a row of the attention
        DCls,
        PerHead  // from here on OfHead widths a head
    };
    // Each a width a head: first all heads' DU, then all heads' U, and so on.
    enum OfHead : int64_t { DU, U, DKey, DGammaPart, DBetaPart, OfHeads };
    // Then, a number a head: sum_n p_n dp_n, and the gradient of the attention's sum. Then widths of the CLS
    // token's own branch:
    enum Own : int64_t { DNew, Activation, DProjectNorm, DProjectGamma, Owns };

    static __host__ __device__ int64_t columns(const Direction& d) {
        return (PerHead + OfHeads * d.heads) * padded(d.width) + 2 * padded(d.heads) +
               Owns * padded(d.own_width);
    }
    static __device__ float* row(const Direction& d, int64_t image) { return d.scratch + image * columns(d); }
    static __device__ float* column(const Direction& d, int64_t image, Column name) {
        return row(d, image) + name * padded(d.width);
    }
    static __device__ float* of_head(const Direction& d, int64_t image, OfHead name, int64_t head) {
        return row(d, image) + (PerHead + name * d.heads + head) * padded(d.width);
    }
    static __device__ float* softmax_sum(const Direction& d, int64_t image) {
        return row(d, image) + (PerHead + OfHeads * d.heads) * padded(d.width);
    }
    static __device__ float* d_kept_sum(const Direction& d, int64_t image) {
        return softmax_sum(d, image) + padded(d.heads);
    }
    static __device__ float* own(const Direction& d, int64_t image, Own name) {
        return softmax_sum(d, image) + 2 * padded(d.heads) + name * padded(d.own_width);
    }
};

// Forward: z and, behind it, log2 of the sum of the exponentials and the sum after dropout. Backward: the
// gradient of the absorbed query and the two sums that absorb_backward takes off it.
struct Parts {
    static __host__ __device__ int64_t columns(const Direction& d) { return padded(d.width) + 16; }
    static __device__ float* row(const Direction& d, int64_t image, int64_t part, int64_t head) {
        return d.parts + ((image * d.splits + part) * d.heads + head) * columns(d);
    }
    static __device__ float* numbers(const Direction& d, int64_t image, int64_t part, int64_t head) {
        return row(d, image, part, head) + padded(d.width);
    }
};

}  // namespace crossvit
