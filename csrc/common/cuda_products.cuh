// Products of small tiles by one warp, on tensor cores or, for float32 in IEEE arithmetic, by fma: the
// operands lie in shared memory, the sums in registers.
#pragma once

#include "cuda_elements.cuh"
#include "ptx.cuh"

namespace crossvit {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kInner = 16;  // elements of a row that one product takes
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Lane 4 g + t has rows g and g + 8 and columns 2 t and 2 t + 1 of a result [16, 8].
struct Lane {
    int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
};

__device__ inline float warp_sum(float x) {
    for (int distance = kWarp / 2; distance; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int distance = kWarp / 2; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, distance));
    return x;
}

// Over the four lanes that share a row of a product's result.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(kAll, x, 1);
    return x + __shfl_xor_sync(kAll, x, 2);
}

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}

// Over the eight lanes that share a column.
__device__ inline float column_sum(float x) {
    for (int distance = 4; distance < kWarp; distance *= 2) x += __shfl_xor_sync(kAll, x, distance);
    return x;
}

// Operands in shared memory: an address and the bytes between two rows.
template <Product P>
struct OperandRows {
    char* data;
    int stride;

    __device__ Operand<P>* row(int i) const { return reinterpret_cast<Operand<P>*>(data + i * stride); }
    __device__ OperandRows below(int i) const { return {data + i * stride, stride}; }
    __device__ uint32_t pair(int i, int c) const { return *reinterpret_cast<const uint32_t*>(row(i) + c); }
    // Where this lane's row of four matrices is: 16 rows, 16 columns from c on.
    __device__ uint32_t matrices(const Lane& at, int c) const {
        return address(at.lane % 16, at.lane / 16 * 8) + c * static_cast<int>(sizeof(Operand<P>));
    }
    // The same, matrices of the first 8 rows first: for operands that are transposed, and for right ones.
    __device__ uint32_t matrices_across(const Lane& at, int c) const {
        return address(at.lane % 8 + at.lane / 16 * 8, at.lane / 8 % 2 * 8) +
               c * static_cast<int>(sizeof(Operand<P>));
    }
    __device__ uint32_t address(int i, int c) const {
        return ptx::shared_address(data) + i * stride + c * static_cast<int>(sizeof(Operand<P>));
    }
};

template <Product P>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (P == Product::bfloat16)
        ptx::multiply_bfloat16(sum, a, b);
    else if constexpr (P == Product::float16)
        ptx::multiply_float16(sum, a, b);
    else
        ptx::multiply_tf32(sum, a, b);
}

template <Product P>
__device__ inline uint32_t pack(float first, float second) {
    return P == Product::bfloat16 ? ptx::pack_bfloat16(first, second) : ptx::pack_float16(first, second);
}

// The two elements of 16 bits in a register.
template <Product P>
__device__ inline float2 unpack(uint32_t pair) {
    if constexpr (P == Product::bfloat16)
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    else
        return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// As the product sees it.
template <Product P>
__device__ inline float rounded(float x) {
    if constexpr (P == Product::tf32)
        return __uint_as_float(ptx::round_to_tf32(x));
    else
        return to_float(from_float<Operand<P>>(x));
}

// The right operands of products of 16 bits with rows 0 to 7 and with rows 8 to 15, from `matrices_across`.
__device__ inline void load_right(uint32_t (&b)[2][2], uint32_t row) {
    uint32_t found[4];
    ptx::load_matrices(found, row);
    b[0][0] = found[0], b[0][1] = found[1];
    b[1][0] = found[2], b[1][1] = found[3];
}

// sums [16, 8 Eights] += left [16, 16] right^T, of columns c to c + 15 of both.
template <Product P, int Eights>
__device__ void add_products(float (&sums)[Eights][4], const OperandRows<P>& left,
                             const OperandRows<P>& right, const Lane& at, int c) {
    const int g = at.g, t = at.t;
    if constexpr (sizeof(Operand<P>) == 2) {
        uint32_t a[4], b[2][2];
        ptx::load_matrices(a, left.matrices(at, c));
        if constexpr (Eights == 2) {
            load_right(b, right.matrices_across(at, c));
        } else {
            b[0][0] = right.pair(g, c + 2 * t);
            b[0][1] = right.pair(g, c + 8 + 2 * t);
        }
#pragma unroll
        for (int e = 0; e < Eights; ++e) multiply<P>(sums[e], a, b[e]);
    } else if constexpr (P == Product::tf32) {
#pragma unroll
        for (int k = c; k < c + kInner; k += 8) {
            const uint32_t a[4] = {
                ptx::round_to_tf32(left.row(g)[k + t]), ptx::round_to_tf32(left.row(g + 8)[k + t]),
                ptx::round_to_tf32(left.row(g)[k + t + 4]), ptx::round_to_tf32(left.row(g + 8)[k + t + 4])};
#pragma unroll
            for (int e = 0; e < Eights; ++e) {
                const float* row = right.row(8 * e + g);
                const uint32_t b[2] = {ptx::round_to_tf32(row[k + t]), ptx::round_to_tf32(row[k + t + 4])};
                multiply<P>(sums[e], a, b);
            }
        }
    } else {
#pragma unroll
        for (int k = c; k < c + kInner; k += 4) {
            const float4 x[2] = {*reinterpret_cast<const float4*>(left.row(g) + k),
                                 *reinterpret_cast<const float4*>(left.row(g + 8) + k)};
#pragma unroll
            for (int e = 0; e < Eights; ++e)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float4 q = *reinterpret_cast<const float4*>(right.row(8 * e + 2 * t + i % 2) + k);
                    const float4 y = x[i / 2];
                    sums[e][i] = fmaf(y.w, q.w, fmaf(y.z, q.z, fmaf(y.y, q.y, fmaf(y.x, q.x, sums[e][i]))));
                }
        }
    }
}

// sums [16, 16] += left [16, 16] right [16, 16], of columns k to k + 15 of left, rows k to k + 15 and columns
// c to c + 15 of right.
template <Product P>
__device__ void add_products_across(float (&sums)[2][4], const OperandRows<P>& left,
                                    const OperandRows<P>& right, const Lane& at, int k, int c) {
    const int g = at.g, t = at.t;
    if constexpr (sizeof(Operand<P>) == 2) {
        uint32_t a[4], b[4];
        ptx::load_matrices(a, left.matrices(at, k));
        ptx::load_matrices_transposed(b, right.below(k).matrices(at, c));
        const uint32_t near[2] = {b[0], b[1]}, far[2] = {b[2], b[3]};
        multiply<P>(sums[0], a, near);
        multiply<P>(sums[1], a, far);
    } else if constexpr (P == Product::tf32) {
#pragma unroll
        for (int i = k; i < k + kInner; i += 8) {
            const uint32_t a[4] = {
                ptx::round_to_tf32(left.row(g)[i + t]), ptx::round_to_tf32(left.row(g + 8)[i + t]),
                ptx::round_to_tf32(left.row(g)[i + t + 4]), ptx::round_to_tf32(left.row(g + 8)[i + t + 4])};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const uint32_t b[2] = {ptx::round_to_tf32(right.row(i + t)[c + 8 * e + g]),
                                       ptx::round_to_tf32(right.row(i + t + 4)[c + 8 * e + g])};
                multiply<P>(sums[e], a, b);
            }
        }
    } else {
#pragma unroll
        for (int i = k; i < k + kInner; ++i) {
            const float x = left.row(g)[i], y = left.row(g + 8)[i];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float2 b = *reinterpret_cast<const float2*>(right.row(i) + c + 8 * e + 2 * t);
                sums[e][0] = fmaf(x, b.x, sums[e][0]);
                sums[e][1] = fmaf(x, b.y, sums[e][1]);
                sums[e][2] = fmaf(y, b.x, sums[e][2]);
                sums[e][3] = fmaf(y, b.y, sums[e][3]);
            }
        }
    }
}

}  // namespace crossvit
