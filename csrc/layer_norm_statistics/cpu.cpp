#include <math.h>

#include "layer_norm_statistics.h"

namespace crossvit {
namespace {

CROSSVIT_ALWAYS_INLINE void row_statistics(const float* x, int64_t columns, float eps, float* mean,
                                           float* rstd) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < columns; ++c) sum += x[c];
    const float mu = sum / static_cast<float>(columns);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < columns; ++c) squares += (x[c] - mu) * (x[c] - mu);
    *mean = mu;
    *rstd = 1.0f / sqrtf(squares / static_cast<float>(columns) + eps);
}

void row_baseline(const float* x, int64_t columns, float eps, float* mean, float* rstd) {
    row_statistics(x, columns, eps, mean, rstd);
}

#ifdef CROSSVIT_X86
CROSSVIT_TARGET_AVX2 void row_avx2(const float* x, int64_t columns, float eps, float* mean, float* rstd) {
    row_statistics(x, columns, eps, mean, rstd);
}

CROSSVIT_TARGET_AVX512 void row_avx512(const float* x, int64_t columns, float eps, float* mean, float* rstd) {
    row_statistics(x, columns, eps, mean, rstd);
}
#endif

using Row = void (*)(const float*, int64_t, float, float*, float*);

Row row_for(Isa isa) {
#ifdef CROSSVIT_X86
    if (isa == Isa::avx512) return row_avx512;
    if (isa == Isa::avx2) return row_avx2;
#endif
    (void)isa;
    return row_baseline;
}

// Below this many elements waking the other threads costs more than the work (about 10 us of one core).
constexpr int64_t kParallelElements = 1 << 16;

}  // namespace

void layer_norm_statistics_cpu(const float* x, int64_t rows, int64_t columns, int64_t row_stride, float eps,
                               float* mean, float* rstd, Isa isa) {
    const Row row = row_for(isa);
#pragma omp parallel for schedule(static) if (rows * columns > kParallelElements)
    for (int64_t r = 0; r < rows; ++r) row(x + r * row_stride, columns, eps, mean + r, rstd + r);
}

}  // namespace crossvit
