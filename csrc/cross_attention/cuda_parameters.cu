// The gradients of all parameters in one launch: each is a product of two columns of the buffers over the
// batch, or the sum of one, in one order. A block is a tile of one parameter, 16 x 64, or 64 numbers of a
// vector; blockIdx.z says which parameter.
#include <algorithm>

#include "cuda_chain.cuh"

namespace crossvit {
namespace {

constexpr int kJobs = 9;           // of cross-attention alone
constexpr int kJobsOfFusion = 17;  // with f and g

// One parameter. As a matrix: out [height, width] = sum over the images of left^T right; rows of `out` that
// belong to different heads meet different columns of `right`. As a vector: out [width] = sum of left, and of
// `right` over the heads.
struct Job {
    void* out = nullptr;
    Dtype dtype;
    bool is_matrix;
    const float *left, *right;
    int64_t left_step, right_step;  // from image to image
    int height, width, heads;
    int64_t head_step;  // of `right`, from head to head
};

// Where columns of the buffers begin, of the first image, and how far images are apart.
struct Column {
    const float* data;
    int64_t step;
};

__device__ Column of_saved(const Direction& d, Saved::Column name) {
    return {Saved::column(d, 0, name), Saved::columns(d)};
}
__device__ Column of_scratch(const Direction& d, Scratch::Column name) {
    return {Scratch::column(d, 0, name), Scratch::columns(d)};
}
__device__ Column of_heads(const Direction& d, Scratch::OfHead name) {
    return {Scratch::of_head(d, 0, name, 0), Scratch::columns(d)};
}
__device__ Column of_own(const Direction& d, Scratch::Own name) {
    return {Scratch::own(d, 0, name), Scratch::columns(d)};
}

__device__ Job matrix(const Direction& d, const Matrix& out, Column left, Column right, int64_t height,
                      int64_t width, int64_t heads = 1) {
    return {out.data,
            d.weights,
            true,
            left.data,
            right.data,
            left.step,
            right.step,
            static_cast<int>(height),
            static_cast<int>(width),
            static_cast<int>(heads),
            padded(d.width)};
}

__device__ Job vector(const Direction& d, const Vector& out, Column left, int64_t width, Column right = {},
                      int64_t heads = 0) {
    return {out.data,
            out.dtype,
            false,
            left.data,
            right.data,
            left.step,
            right.step,
            1,
            static_cast<int>(width),
            static_cast<int>(heads),
            padded(d.width)};
}

__device__ Job job_of(const Direction& d, int number) {
    const Parameters& to = d.gradients;
    const int64_t C = d.width, own = d.own_width, H = d.heads;
    switch (number) {
        case 0:
            return matrix(d, to.wq, of_scratch(d, Scratch::DQuery), of_scratch(d, Scratch::Normed), C, C);
        case 1:
            return matrix(d, to.wk, of_saved(d, Saved::Query), of_heads(d, Scratch::DKey), C, C, H);
        case 2:
            return matrix(d, to.wv, of_scratch(d, Scratch::DOutput), of_heads(d, Scratch::U), C, C, H);
        case 3:
            return matrix(d, to.wo, of_scratch(d, Scratch::DProjected), of_saved(d, Saved::Output), C, C);
        case 4:
            return vector(d, to.norm_weight, of_scratch(d, Scratch::DGamma), C,
                          of_heads(d, Scratch::DGammaPart), H);
        case 5:
            return vector(d, to.norm_bias, of_scratch(d, Scratch::DNorm), C, of_heads(d, Scratch::DBetaPart),
                          H);
        case 6:
            return vector(d, to.bq, of_scratch(d, Scratch::DQuery), C);
        case 7:
            return vector(d, to.bv, of_scratch(d, Scratch::DValueBias), C);
        case 8:
            return vector(d, to.bo, of_scratch(d, Scratch::DProjected), C);
        case 9:
            return matrix(d, to.project.weight, of_scratch(d, Scratch::DCls), of_own(d, Scratch::Activation),
                          C, own);
        case 10:
            return matrix(d, to.back.weight, of_own(d, Scratch::DNew), of_scratch(d, Scratch::BackActivation),
                          own, C);
        case 11:
            return vector(d, to.project.norm_weight, of_own(d, Scratch::DProjectGamma), own);
        case 12:
            return vector(d, to.project.norm_bias, of_own(d, Scratch::DProjectNorm), own);
        case 13:
            return vector(d, to.project.bias, of_scratch(d, Scratch::DCls), C);
        case 14:
            return vector(d, to.back.norm_weight, of_scratch(d, Scratch::DBackGamma), C);
        case 15:
            return vector(d, to.back.norm_bias, of_scratch(d, Scratch::DBackNorm), C);
        case 16:
            return vector(d, to.back.bias, of_own(d, Scratch::DNew), own);
    }
    return {};
}

// Says that memory is global: pointers that came out of a table could be anything to the compiler.
__device__ const float* global(const float* data) {
    __builtin_assume(__isGlobal(data));
    return data;
}

// A thread sums four columns of every eighth image; then eight sums in turn. Rows are padded to 16 columns,
// so that four are there where one is.
__device__ void sum_columns(const Job& job, int64_t batch) {
    constexpr int kFours = kColumns / 4, kSlices = kThreads / kFours;
    __shared__ alignas(16) float slices[kSlices][kColumns];
    const int at = threadIdx.x % kFours * 4, slice = threadIdx.x / kFours;
    const int column = blockIdx.x * kColumns + at;
    const float *left = global(job.left), *right = global(job.heads ? job.right : job.left);
    float4 sum = {};
    const auto add = [&](const float* from) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    };
    if (column < job.width) {
#pragma unroll 2
        for (int64_t image = slice; image < batch; image += kSlices) {
            add(left + image * job.left_step + column);
#pragma unroll 4
            for (int h = 0; h < job.heads; ++h)
                add(right + image * job.right_step + h * job.head_step + column);
        }
    }
    *reinterpret_cast<float4*>(&slices[slice][at]) = sum;
    __syncthreads();
    const int mine = blockIdx.x * kColumns + threadIdx.x;
    if (threadIdx.x >= kColumns || mine >= job.width) return;
    float total = 0.0f;
    for (int i = 0; i < kSlices; ++i) total += slices[i][threadIdx.x];
    store_element(job.out, job.dtype, mine, total);
}

template <Product P>
__device__ void multiply_columns(const Job& job, int64_t batch) {
    __shared__ Tiles<P> tiles;
    const int64_t across = column_tiles(job.width);
    const int height = job.height / job.heads, down = (height + kRows - 1) / kRows;
    const int row_tile = static_cast<int>(blockIdx.x / across), column = blockIdx.x % across * kColumns;
    const int head = row_tile / down;
    if (head >= job.heads) return;
    const Rows rows(row_tile % down, height);  // of the matrix, where other kernels have images
    const float* left = global(job.left) + head * height;
    const float* right = global(job.right) + head * job.head_step;
    const auto value = [&](int image, int c) { return right[image * job.right_step + c]; };
    float sums[2][4];
    multiply_rows(sums, tiles, rows, static_cast<int>(batch), column,
                  ComputedOperand<P, decltype(value)>{static_cast<int>(batch), job.width, value},
                  [&](int image) {
                      const float* of_image = left + image * job.left_step;
                      return [&, of_image](int row) { return of_image[rows.image(row)]; };
                  });
    rows.results(sums, column, job.width, [&](int row, int c, float found) {
        store_element(job.out, job.dtype, (head * height + rows.image(row)) * job.width + c, found);
    });
}

template <Product P>
__global__ void __launch_bounds__(kThreads, 1) parameters_backward_kernel(const __grid_constant__ Call call) {
    const Direction& d = call.item[blockIdx.y];
    begin_kernel();
    const Job job = job_of(d, blockIdx.z);
    if (!job.out) return;  // absent or not wanted
    if (job.is_matrix)
        multiply_columns<P>(job, d.batch);
    else
        sum_columns(job, d.batch);
}

constexpr Kernel kParametersBackward[] = {
    parameters_backward_kernel<Product::bfloat16>, parameters_backward_kernel<Product::float16>,
    parameters_backward_kernel<Product::float32>, parameters_backward_kernel<Product::tf32>};

}  // namespace

cudaError_t parameters_backward(const Call& call, const Target& target) {
    const bool fuses = call.item[0].parameters.project.weight.data;
    return launch_chain(
        kParametersBackward, call, target,
        [](const Direction& d) {
            const int64_t of_head = d.width / d.heads, down = (of_head + kRows - 1) / kRows;
            const int64_t widest = column_tiles(std::max(d.width, d.own_width));
            const int64_t highest = (std::max(d.width, d.own_width) + kRows - 1) / kRows;
            return std::max(d.heads * down * column_tiles(d.width), highest * widest);
        },
        fuses ? kJobsOfFusion : kJobs);
}

}  // namespace crossvit
