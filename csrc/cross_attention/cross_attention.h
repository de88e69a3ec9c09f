// Single-query cross-attention and the fusion around it, forward and backward: what is computed, and from
// what. cpu.cpp computes it on the CPU; cuda.h has what GPUs need beside it.
//
// The function, per image and head h, with x^ the normalised tokens of [c || patches]
// (docs/cross_attention.md derives it):
//
//     c   = f(cls)                          f = LayerNorm, GELU, linear; cross-attention alone has c = cls
//     q   = Wq (gamma x^_0 + beta) + bq
//     qt  = gamma (Wk_h^T q_h) / sqrt(d)    the absorbed query; bk cancels in the softmax
//     p_n = softmax_n(qt . x^_n),  z = sum_n m_n p_n x^_n,  t = sum_n m_n p_n      m: dropout, else t = 1
//     o_h = Wv_h (gamma z + t beta) + t bv
//     y   = c + scale (Wo o + bo)
//     cls' = g(y)                           g as f; cross-attention alone has cls' = y
//
// The CPU computes in float32 whatever the storage types. Its results are the same bits for any number of
// threads: the tokens of an image are cut into chunks that depend on their number alone.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"

namespace crossvit {

// Tensors as they lie in memory; strides count elements. A null `data` stands for an absent one.
struct Vector {
    void* data;
    int64_t stride;
    Dtype dtype;
};
struct Matrix {  // columns are contiguous
    void* data;
    int64_t row_stride;
};
struct Tokens {  // [B, rows, channels]
    void* data;
    int64_t batch_stride, row_stride, channel_stride;
};

// LayerNorm, GELU, linear: f and g.
struct Projection {
    Vector norm_weight, norm_bias;
    Matrix weight;
    Vector bias;
};

struct Parameters {
    Projection project;  // f; absent in cross-attention alone, as is `back`
    Vector norm_weight, norm_bias;
    Matrix wq;
    Vector bq;
    Matrix wk;
    Matrix wv;
    Vector bv;
    Matrix wo;
    Vector bo;
    Projection back;  // g
};

// One direction: the CLS token of one branch reads the patches of the other. Integers and pointers only, 8
// bytes each: crossvit_kernels/cross_attention/packing.py packs it in this order.
struct Direction {
    int64_t batch, patches, width, own_width, heads;  // width: of the patches; own_width: of the CLS token
    Dtype tokens, weights;                            // storage types of tokens and of matrices
    int64_t stream;                                   // tells the dropout of one direction from the other's
    const int64_t* seed;                              // of the dropout; null without
    Tokens cls, patch_tokens;
    Tokens scale;  // [B, 1, C] in the tokens' type, or absent
    Parameters parameters;

    // Forward. `patches_out`: a copy of the patches, or absent. `attention`: [B, H, 1 + P], or absent.
    Tokens cls_out, patches_out;
    float* attention;
    float* saved;  // [B, saved_floats(...)], read by backward

    // Backward. `grad_patches`: added to the gradient of the patches, or absent. Absent destinations are not
    // computed. Gradients of parameters are contiguous; that of bk is zero and not written.
    Tokens grad_cls, grad_patches;
    const float* grad_attention;
    Tokens cls_gradient, patches_gradient;
    float* scale_gradient;  // [B, C]
    Parameters gradients;

    // CUDA alone: room for intermediates, as cuda_buffers.cuh lays it out. `parts` is null where the tokens
    // of an image are not split.
    float* scratch;
    float* parts;
    int64_t splits;
};

struct Options {
    float eps;
    uint64_t drop_below;  // a random word below it drops; 2^32 drops all
    float kept_factor;    // what is kept is multiplied by
    int64_t threads;      // at most
};

// Floats that forward keeps for the backward of one image: c, q, o, y and z of each head as padded rows, the
// logarithm of the softmax's sum and t of each head. Static, because every instruction set's file has it;
// rows are padded alike for all of them, so that one may go on where another stopped.
static inline int64_t saved_row(int64_t width) { return (width + 15) / 16 * 16; }

static inline int64_t saved_floats(int64_t width, int64_t heads) {
    return (4 + heads) * saved_row(width) + (2 * heads + 15) / 16 * 16;
}

// Every instruction set's copy of: floats of scratch memory for these directions, and the functions.
using CrossAttentionScratch = int64_t(const Direction*, int64_t count, int64_t threads, bool backward);
using CrossAttentionRun = void(const Direction*, int64_t count, const Options&, float* scratch);

namespace baseline {
CrossAttentionScratch cross_attention_scratch;
CrossAttentionRun cross_attention_forward, cross_attention_backward;
}  // namespace baseline
namespace avx2 {
CrossAttentionScratch cross_attention_scratch;
CrossAttentionRun cross_attention_forward, cross_attention_backward;
}  // namespace avx2
namespace avx512 {
CrossAttentionScratch cross_attention_scratch;
CrossAttentionRun cross_attention_forward, cross_attention_backward;
}  // namespace avx512
namespace avx512bf16 {
CrossAttentionScratch cross_attention_scratch;
CrossAttentionRun cross_attention_forward, cross_attention_backward;
}  // namespace avx512bf16
namespace amx {
CrossAttentionScratch cross_attention_scratch;
CrossAttentionRun cross_attention_forward, cross_attention_backward;
}  // namespace amx

}  // namespace crossvit
