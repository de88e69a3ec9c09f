// Linear layers on many rows, with what stands around them in a transformer block.
#pragma once

#include "../common/place.h"

namespace crossvit {

enum class Activation : int64_t { none, gelu, relu };

// out = activation(norm(x) W^T + bias) + residual, where norm is LayerNorm without weight and bias.
struct LinearStep {
    Place x, residual, out;  // the residual has the dtype of `out`, or is absent
    int64_t rows, channels, outputs;
    Precision precision;
    const int32_t* weight;  // packed for the instruction set that runs
    const float* bias;      // [outputs], zeros behind up to a whole panel
    Activation activation;
    int64_t normalises;
    double eps;
};

// W [outputs, channels], rows `of_row` elements apart, as LinearStep::weight wants it.
struct PackedWeight {
    const void* weight;
    int64_t of_row;
    Dtype dtype;
    int64_t outputs, channels;
    Precision precision;
};

}  // namespace crossvit
