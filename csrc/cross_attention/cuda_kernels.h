// The launches that a fusion consists of, each for both directions at once; cuda.cu puts them in order.
#pragma once

#include <cuda_runtime.h>

#include "../common/cuda_elements.cuh"
#include "cuda.h"

namespace crossvit {

// Where a launch goes and how matrices are multiplied in it.
struct Target {
    Product product;
    Gpu gpu;
    cudaStream_t stream;

    // A kernel may begin before the one before it on the stream has ended.
    bool overlaps() const { return gpu.capability >= 90; }
};

using Step = cudaError_t(const Call&, const Target&);

// The chain of the CLS token, forward: cuda_chain_forward.cu.
Step project, absorb, values, output, back;
// The attention over the tokens: cuda_attend.cu, and cuda_attend_backward.cu, whose launch for eight heads
// adds to that of the eight before; add_attention_sums is for gradients of the attention itself.
Step attend, add_attention_sums, attend_backward;
// The chain backward: cuda_chain_backward.cu, and the gradients of the parameters: cuda_parameters.cu.
Step back_backward, output_backward, values_backward;
Step absorb_backward, query_backward, project_backward, cls_backward;
Step parameters_backward;

// Bytes of shared memory that a block takes for a direction, in a launch whose widest one is `width`.
int64_t attend_shared(const Direction&, Product, int64_t width, int64_t stages);
int64_t attend_backward_shared(const Direction&, Product, int64_t width, int64_t stages,
                               bool brings_incoming);

}  // namespace crossvit
