#include "../common/layer_norm.h"
#include "layer_norm_statistics.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// Below this many elements waking the other threads costs more than the work (about 10 us of one core).
constexpr int64_t kParallelElements = 1 << 16;

}  // namespace

void layer_norm_statistics(const float* x, int64_t rows, int64_t columns, int64_t row_stride, float eps,
                           float* mean, float* rstd) {
#pragma omp parallel for schedule(static) if (rows * columns > kParallelElements)
    for (int64_t r = 0; r < rows; ++r) {
        float variance;
        moments_of<1>(x + r * row_stride, 0, columns, mean + r, &variance);
        rstd[r] = 1.0f / __builtin_sqrtf(variance + eps);
    }
}

}  // namespace CROSSVIT_ISA
}  // namespace crossvit
