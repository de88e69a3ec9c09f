// Vectors of floats, as wide as the instruction set of the file that includes this (a cpu.cpp; see
// cpu_isa.h).
//
// Written with the vector extensions of GCC and clang: +, * and comparisons act on all lanes, a * b + c
// becomes one fused multiply-add. bfloat16 and float16 are storage only; arithmetic is float32.
#pragma once

#include <stdint.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "dtype.h"

#define CROSSVIT_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define CROSSVIT_UNROLL _Pragma("unroll")
#else
#define CROSSVIT_UNROLL _Pragma("GCC unroll 32")
#endif

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Whether 32 registers hold the accumulators of a block (AVX-512, arm64), or 16 (AVX2, SSE2).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

constexpr int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

CROSSVIT_INLINE Vec broadcast(float x) { return x - Vec{}; }

template <class To, class From>
CROSSVIT_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "only the type changes");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

CROSSVIT_INLINE Vec select(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }

CROSSVIT_INLINE UintVec select(IntVec mask, UintVec yes, UintVec no) { return mask ? yes : no; }

// NaN in `a` stays NaN. In this form each is one instruction.
CROSSVIT_INLINE Vec maximum(Vec a, Vec b) { return a < b ? b : a; }
CROSSVIT_INLINE Vec minimum(Vec a, Vec b) { return a > b ? b : a; }

// The lanes below `count` are true.
CROSSVIT_INLINE IntVec first_lanes(int64_t count) {
    IntVec lane;
    CROSSVIT_UNROLL
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane < IntVec{} + static_cast<int32_t>(count);
}

// Loads and stores. `count` lanes only, the others zero, where a count is given.

template <class To, class From>
CROSSVIT_INLINE To load_bits(const From* x) {
    To to;
    __builtin_memcpy(&to, x, sizeof to);
    return to;
}

CROSSVIT_INLINE Vec widen(HalfVec half, BFloat16) {
    return bits<Vec>(__builtin_convertvector(half, UintVec) << 16);
}

CROSSVIT_INLINE Vec widen(HalfVec half, Float16) {
    const UintVec wide = __builtin_convertvector(half, UintVec);
    const UintVec magnitude = (wide & 0x7fffu) << 13;
    constexpr uint32_t exponent_shift = 112u << 23;  // bias 127 instead of 15
    const Vec normal = bits<Vec>(magnitude + exponent_shift);
    // Exponent 0: the mantissa counts in steps of 2^-24; taken relative to 2^-14, the smallest normal number.
    const Vec subnormal = bits<Vec>(magnitude + exponent_shift + (1u << 23)) - 6.103515625e-05f;
    const UintVec infinite = magnitude | 0x7f800000u;
    const Vec finite = select(magnitude < UintVec{} + (1u << 23), subnormal, normal);
    const UintVec all = select(magnitude >= UintVec{} + (31u << 23), infinite, bits<UintVec>(finite));
    return bits<Vec>(all | ((wide & 0x8000u) << 16));
}

CROSSVIT_INLINE Vec load(const float* x) {
    Vec v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
}

template <class Half>
CROSSVIT_INLINE Vec load(const Half* x) {
    HalfVec half;
    __builtin_memcpy(&half, x, sizeof half);
    return widen(half, Half{});
}

template <class T>
CROSSVIT_INLINE Vec load(const T* x, int64_t count) {
    T padded[kLanes] = {};
    __builtin_memcpy(padded, x, static_cast<size_t>(count) * sizeof(T));
    return load(padded);
}

// To nearest, ties to even, as torch rounds.
CROSSVIT_INLINE HalfVec narrow(Vec x, BFloat16) {
#if defined(__AVX512BF16__)
    return bits<HalfVec>(_mm512_cvtneps_pbh(bits<__m512>(x)));
#else
    const UintVec u = bits<UintVec>(x);
    const UintVec rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return __builtin_convertvector(select(x == x, rounded, UintVec{} + 0x7fc00000u) >> 16, HalfVec);
#endif
}

CROSSVIT_INLINE HalfVec narrow(Vec x, Float16) {
    const UintVec u = bits<UintVec>(x);
    const UintVec sign = (u >> 16) & 0x8000u;
    const UintVec magnitude = u & 0x7fffffffu;
    const UintVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 the addition of 0.5 rounds to the steps of 2^-24 and leaves them in the low bits.
    const UintVec subnormal = bits<UintVec>(bits<Vec>(magnitude) + 0.5f) - (126u << 23);
    UintVec half = select(magnitude < UintVec{} + (113u << 23), subnormal, normal);
    half = select(magnitude >= UintVec{} + 0x477ff000u, UintVec{} + 0x7c00u, half);  // 65520 and more
    half = select(x == x, half, UintVec{} + 0x7e00u);
    return __builtin_convertvector(half | sign, HalfVec);
}

CROSSVIT_INLINE void store(Vec v, float* x) { __builtin_memcpy(x, &v, sizeof v); }

template <class Half>
CROSSVIT_INLINE void store(Vec v, Half* x) {
    const HalfVec half = narrow(v, Half{});
    __builtin_memcpy(x, &half, sizeof half);
}

template <class T>
CROSSVIT_INLINE void store(Vec v, T* x, int64_t count) {
    T padded[kLanes];
    store(v, padded);
    __builtin_memcpy(x, padded, static_cast<size_t>(count) * sizeof(T));
}

// body(T{}) for the type that `dtype` says.
template <class Body>
CROSSVIT_INLINE void with_type(Dtype dtype, Body body) {
    if (dtype == Dtype::float32)
        body(float{});
    else if (dtype == Dtype::bfloat16)
        body(BFloat16{});
    else
        body(Float16{});
}

// Sums over lanes. `fold` adds neighbours: the lower half of the result comes from a, the upper from b.

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CROSSVIT_SHUFFLEVECTOR 1
#endif
#endif

template <int... Lane>
struct Lanes {};
template <int Count, int... Lane>
struct CountLanes : CountLanes<Count - 1, Count - 1, Lane...> {};
template <int... Lane>
struct CountLanes<0, Lane...> {
    using type = Lanes<Lane...>;
};

template <int... Lane>
CROSSVIT_INLINE Vec fold(Vec a, Vec b, Lanes<Lane...>) {
#ifdef CROSSVIT_SHUFFLEVECTOR
    return __builtin_shufflevector(a, b, 2 * Lane...) + __builtin_shufflevector(a, b, 2 * Lane + 1 ...);
#else
    return __builtin_shuffle(a, b, IntVec{2 * Lane...}) + __builtin_shuffle(a, b, IntVec{2 * Lane + 1 ...});
#endif
}

// sums[i] = the sum over the lanes of v[i], for Count vectors; `sums` has room for a multiple of kLanes.
template <int Count>
CROSSVIT_INLINE void sums_of_lanes(const Vec (&v)[Count], float* sums) {
    CROSSVIT_UNROLL
    for (int first = 0; first < Count; first += kLanes) {
        Vec part[kLanes];
        CROSSVIT_UNROLL
        for (int i = 0; i < kLanes; ++i) part[i] = first + i < Count ? v[first + i] : Vec{};
        CROSSVIT_UNROLL
        for (int size = kLanes; size > 1; size /= 2) {
            CROSSVIT_UNROLL
            for (int i = 0; i < size / 2; ++i)
                part[i] = fold(part[2 * i], part[2 * i + 1], typename CountLanes<kLanes>::type{});
        }
        store(part[0], sums + first);
    }
}

CROSSVIT_INLINE float sum_of_lanes(Vec v) {
    CROSSVIT_UNROLL
    for (int size = kLanes; size > 1; size /= 2) v = fold(v, v, typename CountLanes<kLanes>::type{});
    return v[0];
}

// Functions

// 2^x, relative error 2e-7; x is clamped to the exponents of normal numbers, NaN stays.
CROSSVIT_INLINE Vec exp2(Vec x) {
    x = minimum(maximum(x, broadcast(-126.0f)), broadcast(127.0f));
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);  // in [-1/2, 1/2]
    // Minimax for 2^f, relative error 2e-9.
    Vec p = f * 1.53458116e-04f + 1.33999312e-03f;
    p = p * f + 9.61848896e-03f;
    p = p * f + 5.55032878e-02f;
    p = p * f + 2.40226469e-01f;
    p = p * f + 6.93147206e-01f;
    p = p * f + 1.0f;
    const UintVec exponent = (bits<UintVec>(shifted) - 0x4b400000u + 127u) << 23;
    return p * bits<Vec>(exponent);
}

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;

struct Gelu {
    Vec value, derivative;
};

// x Phi(x), exact (erf) form, and Phi(x) + x phi(x). With a = |x| the tail Phi(-a) is exp(-a^2 / 2) times a
// polynomial in t = 1 / (1 + 0.35 a), fitted on [0, 14] to 3e-8 relative.
CROSSVIT_INLINE Gelu gelu(Vec x) {
    const Vec a = maximum(x, -x);
    const Vec t = 1.0f / (a * 0.35f + 1.0f);
    Vec p = t * -0.02914600260555744f + 0.14397205412387848f;
    p = p * t + -0.2557149827480316f;
    p = p * t + 0.15917497873306274f;
    p = p * t + -0.023110389709472656f;
    p = p * t + 0.1055082380771637f;
    p = p * t + 0.11983280628919601f;
    p = p * t + 0.13986188173294067f;
    p = p * t + 0.13962140679359436f;
    const Vec bell = exp2(a * a * (-0.5f * kLog2E));
    const Vec tail = p * t * bell;
    const Vec cumulative = select(x > Vec{}, 1.0f - tail, tail);
    return {x * cumulative, x * bell * 0.3989422804f + cumulative};
}

// x Phi(x) where speed matters more: Phi - 1/2 is an odd polynomial up to `limit`, and constant beyond; below
// -limit the result is 0. Error at most 1e-6 of max(1, |x|), of the short one 5e-5, for bfloat16 results.
template <int Count>
CROSSVIT_INLINE Vec gelu_of(Vec x, float limit, const float (&coefficients)[Count]) {
    const Vec clipped = minimum(maximum(x, broadcast(-limit)), broadcast(limit));
    const Vec t = clipped * clipped * (2.0f / (limit * limit)) - 1.0f;
    const Vec square = t * t;
    // Even and odd coefficients apart, so that two chains of multiply-adds run side by side.
    Vec even = broadcast(coefficients[Count - 2]), odd = broadcast(coefficients[Count - 1]);
    CROSSVIT_UNROLL
    for (int i = Count - 4; i >= 0; i -= 2) {
        even = even * square + coefficients[i];
        odd = odd * square + coefficients[i + 1];
    }
    return select(x < broadcast(-limit), Vec{}, x * (clipped * (odd * t + even) + 0.5f));
}

CROSSVIT_INLINE Vec fast_gelu(Vec x) {
    return gelu_of(
        x, 5.2f,
        {1.359499848e-01f, -6.774361296e-02f, 5.002526221e-02f, -3.993188702e-02f, 3.197947498e-02f,
         -2.470231235e-02f, 1.800783963e-02f, -1.259599424e-02f, 8.440784043e-03f, -4.605797510e-03f,
         1.921730859e-03f, -1.395092123e-03f, 1.222544952e-03f, -4.191051678e-04f});
}

CROSSVIT_INLINE Vec short_gelu(Vec x) {
    return gelu_of(
        x, 4.5f,
        {1.569055368e-01f, -7.718328970e-02f, 5.465971576e-02f, -4.028790822e-02f, 2.871381170e-02f,
         -1.823406669e-02f, 9.939615358e-03f, -6.501107102e-03f, 4.789652744e-03f, -1.692064402e-03f});
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
