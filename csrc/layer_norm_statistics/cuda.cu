// One warp per row; lanes stride over the columns, sums meet by warp shuffles. Limit: reading each row once
// from memory (the second pass hits the L1 cache).
#include <cuda_runtime.h>

#include "layer_norm_statistics.h"

namespace crossvit {
namespace {

constexpr int kWarp = 32;
// Eight rows a block: 256 threads keep a multiprocessor full at any number of registers this kernel takes.
constexpr int kWarpsPerBlock = 8;

__device__ float warp_sum(float value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

__global__ void layer_norm_statistics_kernel(const float* __restrict__ x, int64_t rows, int64_t columns,
                                             int64_t row_stride, float eps, float* __restrict__ mean,
                                             float* __restrict__ rstd) {
    const int lane = threadIdx.x % kWarp;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
    if (row >= rows) return;  // a whole warp leaves together
    x += row * row_stride;
    float sum = 0.0f;
    for (int64_t c = lane; c < columns; c += kWarp) sum += x[c];
    const float mu = warp_sum(sum) / static_cast<float>(columns);
    float squares = 0.0f;
    for (int64_t c = lane; c < columns; c += kWarp) squares += (x[c] - mu) * (x[c] - mu);
    squares = warp_sum(squares);
    if (lane == 0) {
        mean[row] = mu;
        rstd[row] = rsqrtf(squares / static_cast<float>(columns) + eps);
    }
}

}  // namespace

int layer_norm_statistics_cuda(const float* x, int64_t rows, int64_t columns, int64_t row_stride, float eps,
                               float* mean, float* rstd, void* stream) {
    if (rows == 0) return cudaSuccess;
    const unsigned blocks = static_cast<unsigned>((rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
    layer_norm_statistics_kernel<<<blocks, kWarp * kWarpsPerBlock, 0, static_cast<cudaStream_t>(stream)>>>(
        x, rows, columns, row_stride, eps, mean, rstd);
    return cudaGetLastError();
}

}  // namespace crossvit
