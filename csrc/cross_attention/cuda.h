// The fusion on NVIDIA GPUs: the same functions as cross_attention.h, in CUDA kernels. docs/cuda.md explains
// them; cuda.cu has the order of the launches.
#pragma once

#include "cross_attention.h"

namespace crossvit {

// What every kernel gets, by value: one or two directions, which a launch computes side by side
// (blockIdx.y), and what they have in common.
struct Call {
    Direction item[2];
    int64_t count;
    float eps;
    float kept_factor;        // what dropout keeps is multiplied by
    uint64_t drop_below;      // a random word below it drops; 2^32 drops all
    int64_t stages;           // tiles of tokens in shared memory, all but one of them on their way
    int64_t brings_incoming;  // attend_backward: the gradients that come in are there too
    int64_t merges;           // the blocks of an image are a cluster and merge what they found
    int64_t tile;             // attend_backward: which eight heads
};
static_assert(sizeof(Call) <= 4096, "arguments of a kernel have 4096 bytes");

// The GPU that is current, as the driver reports it.
struct Gpu {
    int64_t capability;  // 10 major + minor
    int64_t multiprocessors;
    int64_t shared_of_block;  // bytes that one block may have
};

// What a call needs before it is launched.
struct CudaPlan {
    int64_t floats;           // of memory for intermediates
    int64_t shared_of_block;  // bytes, which may be more than the GPU has: then the call cannot be computed
};

}  // namespace crossvit

// Plain functions, so that tests can call them without Python's module. Errors are those of the CUDA runtime.
extern "C" {
// 0 if this binary has kernels for the current GPU and its driver can load them.
int crossvit_cuda_usable();

crossvit::CudaPlan crossvit_cuda_plan(const crossvit::Direction* directions, int64_t count, int64_t backward,
                                      int64_t tf32, const crossvit::Gpu* gpu);

// Launches on `stream`. `memory`: as many floats as the plan says. The plan's shared memory must be there.
int crossvit_cuda_run(const crossvit::Direction* directions, int64_t count, int64_t backward, int64_t tf32,
                      const crossvit::Gpu* gpu, float eps, double dropout_p, float* memory, void* stream);
}
