// Storage types of tensors. The numbers of `Dtype` are those of crossvit_kernels/cross_attention/packing.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace crossvit {

enum class Dtype : int64_t { float32, bfloat16, float16 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// Static, because files for several instruction sets include this.
static constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace crossvit
