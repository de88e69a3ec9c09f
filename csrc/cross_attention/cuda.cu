// The order of the launches, and what they need: products, stages, parts, memory.
#include <algorithm>

#include "../common/cuda_launch.cuh"
#include "cuda.h"
#include "cuda_buffers.cuh"
#include "cuda_kernels.h"
#include "cuda_tokens.cuh"

namespace crossvit {
namespace {

constexpr int64_t kLeastTiles = 2;   // of a part: less would be mostly the CLS token and the merging
constexpr int64_t kReserved = 1024;  // bytes of shared memory that each block takes besides its own

Product product_of(const Direction& d, bool tf32) {
    if (d.weights == Dtype::bfloat16) return Product::bfloat16;
    if (d.weights == Dtype::float16) return Product::float16;
    return tf32 ? Product::tf32 : Product::float32;
}

// In how many parts the tokens of an image are read: two blocks a multiprocessor if there are enough tokens.
// One number for both directions, as a cluster has one size; some parts of the shorter one may be empty.
int64_t parts_of(const Direction* directions, int64_t count, bool backward, const Gpu& gpu) {
    int64_t blocks = 0, parts = 1;
    for (int64_t i = 0; i < count; ++i)
        blocks += directions[i].batch * (backward ? 1 : (directions[i].heads + kHeads - 1) / kHeads);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t most = (directions[i].patches + kLeastTiles * kTokens - 1) / (kLeastTiles * kTokens);
        const int64_t wanted = std::max<int64_t>(
            1, std::min({2 * gpu.multiprocessors / std::max<int64_t>(blocks, 1), most, kMostParts}));
        const int64_t of_part = std::max<int64_t>(
            kTokens, (directions[i].patches + wanted * kTokens - 1) / (wanted * kTokens) * kTokens);
        parts = std::max(parts, (directions[i].patches + of_part - 1) / of_part);
    }
    return parts;
}

// How a call is laid out; the same from plan to run.
struct Layout {
    Product product;
    int64_t parts, stages, shared, floats;
    bool merges, brings_incoming;

    Layout(const Direction* directions, int64_t count, bool backward, bool tf32, const Gpu& gpu)
        : product(product_of(directions[0], tf32)),
          parts(parts_of(directions, count, backward, gpu)),
          floats(0),
          merges(!backward && parts > 1 && gpu.capability >= 90) {
        choose_stages(directions, count, backward, gpu);
        for (int64_t i = 0; i < count; ++i) floats += of_direction(directions[i], backward);
    }

    // As many stages as leave room for two blocks of a multiprocessor, if need be without the incoming
    // gradients in shared memory; else as many as fit one block.
    void choose_stages(const Direction* directions, int64_t count, bool backward, const Gpu& gpu) {
        struct Choice {
            int64_t blocks, least_stages;
            bool brings_incoming;
        };
        for (const Choice choice :
             {Choice{2, 2, true}, Choice{2, 2, false}, Choice{1, 1, true}, Choice{1, 1, false}})
            for (stages = kStages; stages >= choice.least_stages; --stages) {
                brings_incoming = backward && choice.brings_incoming;
                shared = shared_with(directions, count, backward);
                if (choice.blocks * (shared + kReserved) <= gpu.shared_of_block + kReserved) return;
            }
        stages = 1;
    }

    int64_t shared_with(const Direction* directions, int64_t count, bool backward) const {
        int64_t width = 0, bytes = 0;
        for (int64_t i = 0; i < count; ++i) width = std::max(width, directions[i].width);
        for (int64_t i = 0; i < count; ++i)
            bytes = std::max(bytes, backward ? attend_backward_shared(directions[i], product, width, stages,
                                                                      brings_incoming)
                                             : attend_shared(directions[i], product, width, stages));
        return bytes;
    }

    // The directions with their parts of `memory`.
    Call call(const Direction* directions, int64_t count, bool backward, float* memory) const {
        Call call = {};
        call.count = count;
        call.stages = stages;
        call.brings_incoming = brings_incoming;
        call.merges = merges;
        for (int64_t i = 0; i < count; ++i) {
            Direction& d = call.item[i] = directions[i];
            d.splits = parts;
            d.scratch = memory;
            d.parts = has_parts(backward) ? memory + scratch_floats(d, backward) : nullptr;
            memory += of_direction(d, backward);
        }
        return call;
    }

    bool has_parts(bool backward) const { return backward || (parts > 1 && !merges); }
    int64_t scratch_floats(const Direction& d, bool backward) const {
        return backward ? d.batch * Scratch::columns(d) : 0;
    }
    int64_t of_direction(const Direction& d, bool backward) const {
        return scratch_floats(d, backward) +
               (has_parts(backward) ? d.batch * parts * d.heads * Parts::columns(d) : 0);
    }
};

// Launches one step after another until one fails.
struct Sequence {
    const Call& call;
    const Target& target;
    cudaError_t error = cudaSuccess;

    Sequence& then(Step* step, bool wanted = true) {
        if (error == cudaSuccess && wanted) error = step(call, target);
        return *this;
    }
};

cudaError_t forward(const Call& call, const Target& target) {
    const bool fuses = call.item[0].parameters.project.weight.data;
    Sequence steps{call, target};
    steps.then(project).then(absorb).then(attend).then(values).then(output).then(back, fuses);
    return steps.error;
}

cudaError_t backward(Call& call, const Target& target) {
    const Direction& d = call.item[0];
    const bool fuses = d.parameters.project.weight.data;
    int64_t heads = 0;
    bool of_attention = false;  // of one direction, or of both
    for (int64_t i = 0; i < call.count; ++i) {
        heads = std::max(heads, call.item[i].heads);
        of_attention |= call.item[i].grad_attention != nullptr;
    }
    Sequence steps{call, target};
    steps.then(back_backward, fuses).then(output_backward).then(values_backward);
    steps.then(add_attention_sums, of_attention);
    for (call.tile = 0; call.tile * kHeads < heads; ++call.tile) steps.then(attend_backward);
    steps.then(absorb_backward).then(query_backward).then(project_backward, fuses);
    steps.then(cls_backward, d.cls_gradient.data).then(parameters_backward, d.gradients.norm_weight.data);
    return steps.error;
}

__global__ void usable_kernel() {}

// The GPU, as the code that it runs can use it: where the binary has machine code of an older one only, or
// PTX of an older one, clusters and dependent launches are not in it.
cudaError_t usable(Gpu& gpu) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, usable_kernel);
    if (error == cudaSuccess) gpu.capability = std::min<int64_t>(gpu.capability, attributes.ptxVersion);
    return error;
}

}  // namespace
}  // namespace crossvit

using namespace crossvit;

int crossvit_cuda_usable() {
    Gpu gpu = {};
    const cudaError_t error = usable(gpu);
    cudaGetLastError();  // the error is told here, not by the next call
    return error;
}

CudaPlan crossvit_cuda_plan(const Direction* directions, int64_t count, int64_t backward, int64_t tf32,
                            const Gpu* gpu) {
    Gpu usable_gpu = *gpu;
    usable(usable_gpu);
    const Layout layout(directions, count, backward, tf32, usable_gpu);
    return {layout.floats, layout.shared};
}

int crossvit_cuda_run(const Direction* directions, int64_t count, int64_t is_backward, int64_t tf32,
                      const Gpu* gpu, float eps, double dropout_p, float* memory, void* stream) {
    Target target{product_of(directions[0], tf32), *gpu, static_cast<cudaStream_t>(stream)};
    cudaError_t error = usable(target.gpu);
    if (error == cudaSuccess) {
        const Layout layout(directions, count, is_backward, tf32, target.gpu);
        Call call = layout.call(directions, count, is_backward, memory);
        call.eps = eps;
        call.kept_factor = dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0.0f;
        call.drop_below = dropout_p > 0 ? static_cast<uint64_t>(dropout_p * 4294967296.0) : 0;
        error = is_backward ? backward(call, target) : forward(call, target);
    }
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}
