// Elements of tensors on a GPU: every storage type is read as float32 and rounded when it is written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"

namespace crossvit {

// How two matrices are multiplied; sums are float32.
enum class Product { bfloat16, float16, float32, tf32 };

// In shared memory an operand of a product has this type; tf32 is rounded where it is read.
template <Product P>
struct OperandOf {
    using Type = float;
};
template <>
struct OperandOf<Product::bfloat16> {
    using Type = __nv_bfloat16;
};
template <>
struct OperandOf<Product::float16> {
    using Type = __half;
};
template <Product P>
using Operand = typename OperandOf<P>::Type;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x) {
    if constexpr (sizeof(T) == 4)
        return x;
    else if constexpr (__is_same(T, __half))
        return __float2half_rn(x);
    else
        return __float2bfloat16_rn(x);
}

// A pair of bfloat16 less another.
__device__ inline uint32_t subtract_bfloat16(uint32_t x, uint32_t y) {
    const __nv_bfloat162 difference =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&x), *reinterpret_cast<const __nv_bfloat162*>(&y));
    return *reinterpret_cast<const uint32_t*>(&difference);
}

// Element i of a tensor whose storage type is known only now.
__device__ inline float load_element(const void* data, Dtype dtype, int64_t i) {
    if (dtype == Dtype::float32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return dtype == Dtype::bfloat16 ? __uint_as_float(uint32_t{bits} << 16)
                                    : __half2float(__ushort_as_half(bits));
}

__device__ inline void store_element(void* data, Dtype dtype, int64_t i, float value) {
    if (dtype == Dtype::float32)
        static_cast<float*>(data)[i] = value;
    else if (dtype == Dtype::bfloat16)
        static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(value);
    else
        static_cast<__half*>(data)[i] = from_float<__half>(value);
}

}  // namespace crossvit
