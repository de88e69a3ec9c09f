// Mean and 1/sqrt(variance + eps) of every row: what a LayerNorm that is folded into another kernel needs.
//
// rows x columns floats; rows are row_stride elements apart, columns are contiguous. The variance is taken
// about the mean in a second pass over the row, which lies in the cache by then: E[x^2] - E[x]^2 would lose
// every digit when a row's mean is large beside its deviation.
#pragma once

#include <stdint.h>

namespace crossvit {

using LayerNormStatistics = void(const float* x, int64_t rows, int64_t columns, int64_t row_stride, float eps,
                                 float* mean, float* rstd);

namespace baseline {
LayerNormStatistics layer_norm_statistics;
}
namespace avx2 {
LayerNormStatistics layer_norm_statistics;
}
namespace avx512 {
LayerNormStatistics layer_norm_statistics;
}
namespace avx512bf16 {
LayerNormStatistics layer_norm_statistics;
}
namespace amx {
LayerNormStatistics layer_norm_statistics;
}

#ifdef CROSSVIT_CUDA
// Launches on `stream` (a cudaStream_t) and returns the launch's cudaError_t as an integer.
int layer_norm_statistics_cuda(const float* x, int64_t rows, int64_t columns, int64_t row_stride, float eps,
                               float* mean, float* rstd, void* stream);
#endif

}  // namespace crossvit
