// What the kernels of the CLS token's chain have in common. Every one is B rows through a linear layer:
//
//     a block    16 images x 64 columns of the result, a warp 16 of these columns
//     left       [16, 64] a step: LayerNorm, GELU, a gradient ... computed where it is read
//     right      [64, 64] of the weight, copied one step ahead
//
// The kernels are short and few rows long: they aim at few launches and short waits, not at a ceiling.
#pragma once

#include "../common/cuda_launch.cuh"
#include "../common/cuda_products.cuh"
#include "cuda_buffers.cuh"
#include "cuda_kernels.h"

namespace crossvit {

constexpr int kRows = 16;     // images of a block: the rows of a product of the tensor cores
constexpr int kColumns = 64;  // of a block, and the length of a step: 128 bytes of bfloat16, a cache's line
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }

__device__ inline float gelu_derivative(float x) {
    const float density = 0.3989422804014327f * ptx::exp2(-0.5f * kLog2E * x * x);
    return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) + x * density;
}

// Element i of a vector, 0 where there is none.
__device__ inline float element(const Vector& x, int i) {
    return x.data ? load_element(x.data, x.dtype, i * x.stride) : 0.0f;
}

// Columns of a buffer that begin at one of its names, for 16 images.
struct Columns {
    float* first;
    int step;  // from image to image
    __device__ float& operator()(int row, int k) const { return first[row * step + k]; }
};

// The images of a block, and where a lane is. A row behind the last image stands for no image.
struct Rows : Lane {
    int warp = threadIdx.x / kWarp;
    int64_t first, images;

    __device__ Rows(int64_t tile, int64_t batch) : first(tile * kRows), images(batch) {}
    __device__ bool has(int row) const { return first + row < images; }
    __device__ int64_t image(int row) const { return first + row; }

    __device__ Columns saved(const Direction& d, Saved::Column name) const {
        return {Saved::column(d, first, name), static_cast<int>(Saved::columns(d))};
    }
    __device__ Columns z(const Direction& d, int head) const {
        return {Saved::z(d, first, head), static_cast<int>(Saved::columns(d))};
    }
    __device__ Columns key(const Direction& d, int head) const {
        return {Saved::key(d, first, head), static_cast<int>(Saved::columns(d))};
    }
    __device__ Columns scratch(const Direction& d, Scratch::Column name) const {
        return {Scratch::column(d, first, name), static_cast<int>(Scratch::columns(d))};
    }
    __device__ Columns scratch(const Direction& d, Scratch::OfHead name, int head) const {
        return {Scratch::of_head(d, first, name, head), static_cast<int>(Scratch::columns(d))};
    }
    __device__ Columns scratch(const Direction& d, Scratch::Own name) const {
        return {Scratch::own(d, first, name), static_cast<int>(Scratch::columns(d))};
    }

    // Of a head, in the first part.
    __device__ Columns parts(const Direction& d, int head) const {
        return {Parts::row(d, first, 0, head), static_cast<int>(d.splits * d.heads * Parts::columns(d))};
    }

    // f(row, column) for the elements of a tile [16, 64] from `begin` on, before `end`, 32 neighbours a warp.
    template <typename F>
    __device__ void elements(int begin, int end, F f) const {
#pragma unroll
        for (int i = 0; i < kRows / kWarps; ++i)
#pragma unroll
            for (int c = begin + lane; c < begin + kColumns; c += kWarp) {
                const int row = warp * (kRows / kWarps) + i;
                f(row, c, has(row) && c < end);
            }
    }

    // f(row) for those of this warp's rows that have an image, by all of its lanes.
    template <typename F>
    __device__ void each(F f) const {
#pragma unroll 1
        for (int row = warp * (kRows / kWarps); row < (warp + 1) * (kRows / kWarps) && has(row); ++row)
            f(row);
    }

    // Calls f(row, column, value) for what this lane has of a result whose columns begin at `begin`.
    template <typename F>
    __device__ void results(const float (&sums)[2][4], int begin, int end, F f) const {
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = g + i / 2 * 8, column = begin + warp * 16 + 8 * e + 2 * t + i % 2;
                if (has(row) && column < end) f(row, column, sums[e][i]);
            }
    }
};

// A row's mean and 1 / sqrt(variance + eps), and the means that its gradient takes off.
struct Norm {
    float mean, rstd, plain, against;

    __device__ float hat(float x) const { return (x - mean) * rstd; }
    // From the gradient of LayerNorm's output times gamma to that of its input.
    __device__ float backward(float g, float x) const { return rstd * (g - plain - hat(x) * against); }
};

// The norms of 16 rows. `x(row, k)` are their elements. Ends with a barrier.
template <typename X>
__device__ void find_norms(Norm* norms, const Rows& rows, int width, float eps, X x) {
    rows.each([&](int row) {
        float sum = 0.0f, squares = 0.0f;
        for (int k = rows.lane; k < width; k += kWarp) sum += x(row, k);
        const float mean = warp_sum(sum) / static_cast<float>(width);
        for (int k = rows.lane; k < width; k += kWarp) {
            const float centred = x(row, k) - mean;
            squares = fmaf(centred, centred, squares);
        }
        const float rstd = rsqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
        if (rows.lane == 0) norms[row] = {mean, rstd, 0.0f, 0.0f};
    });
    __syncthreads();
}

// The means of `g(row, k)`, the gradient of LayerNorm's output times gamma, and of g x^. Ends with a barrier.
template <typename X, typename G>
__device__ void find_means(Norm* norms, const Rows& rows, int width, X x, G g) {
    rows.each([&](int row) {
        float plain = 0.0f, against = 0.0f;
        const Norm norm = norms[row];
        for (int k = rows.lane; k < width; k += kWarp) {
            const float value = g(row, k);
            plain += value;
            against = fmaf(value, norm.hat(x(row, k)), against);
        }
        plain = warp_sum(plain) / static_cast<float>(width);
        against = warp_sum(against) / static_cast<float>(width);
        if (rows.lane == 0) norms[row].plain = plain, norms[row].against = against;
    });
    __syncthreads();
}

// Tiles in shared memory, two of each: one is filled while the other is multiplied. Rows are 16 bytes longer
// than they need to be, so that rows that are read together lie in different banks.
template <Product P>
struct Tiles {
    static constexpr int kLength = kColumns + 16 / static_cast<int>(sizeof(Operand<P>));
    alignas(16) Operand<P> left[2][kRows][kLength];
    alignas(16) Operand<P> right[2][kColumns][kLength];

    __device__ OperandRows<P> left_rows(int i) {
        return {reinterpret_cast<char*>(left[i]), static_cast<int>(sizeof left[i][0])};
    }
    __device__ OperandRows<P> right_rows(int i) {
        return {reinterpret_cast<char*>(right[i]), static_cast<int>(sizeof right[i][0])};
    }
};

// The right operand is a weight W, of which `rows` and `columns` are there: W^T where `Transposed`, so that
// the columns of the result are rows of W.
template <Product P, bool Transposed>
struct WeightOperand {
    static constexpr bool kTransposed = Transposed;
    const Operand<P>* data;
    int64_t stride;
    int rows, columns;
    bool wide;  // 16 bytes at a time

    // From row `first` on, `rows` of them.
    __device__ WeightOperand(const Matrix& w, int first, int rows, int columns)
        : data(static_cast<const Operand<P>*>(w.data) + first * w.row_stride),
          stride(w.row_stride),
          rows(rows),
          columns(columns) {
        const int64_t bytes = reinterpret_cast<int64_t>(data) |
                              stride * static_cast<int>(sizeof(Operand<P>)) |
                              columns * static_cast<int>(sizeof(Operand<P>));
        wide = bytes % 16 == 0;
    }

    // Starts copying what meets columns k of the left operand and makes columns `column` of the result.
    __device__ void start(const OperandRows<P>& to, int k, int column) const {
        const int row0 = Transposed ? column : k, column0 = Transposed ? k : column;
        constexpr int kEach = 16 / sizeof(Operand<P>), kChunks = kColumns / kEach;
        if (wide) {
            constexpr int kStep = kThreads / kChunks;  // rows that are copied at a time
            const int row = threadIdx.x / kChunks, c = threadIdx.x % kChunks * kEach;
            const bool has_column = column0 + c < columns;
            const Operand<P>* from = data + (row0 + row) * stride + column0 + c;
            const uint32_t at = to.address(row, c);
#pragma unroll
            for (int i = 0; i < kColumns; i += kStep, from += kStep * stride)
                ptx::copy_16(at + i * to.stride, from, has_column && row0 + row + i < rows);
        } else {
            for (int i = threadIdx.x; i < kColumns * kColumns; i += kThreads) {
                const int row = i / kColumns, c = i % kColumns;
                const bool there = row0 + row < rows && column0 + c < columns;
                to.row(row)[c] =
                    there ? data[(row0 + row) * stride + column0 + c] : from_float<Operand<P>>(0.0f);
            }
        }
        ptx::commit_copies();
    }
};

// The right operand is computed: `value(k, column)`, before `inner` and `columns`.
template <Product P, typename F>
struct ComputedOperand {
    static constexpr bool kTransposed = false;
    int inner, columns;
    F value;

    __device__ void start(const OperandRows<P>& to, int k, int column) const {
        constexpr int kAtOnce = 8;  // are read before one is written
        const int c = threadIdx.x % kColumns;
        for (int row = threadIdx.x / kColumns; row < kColumns; row += kAtOnce * kThreads / kColumns) {
            float values[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int at = k + row + i * kThreads / kColumns;
                values[i] = at < inner && column + c < columns ? value(at, column + c) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                to.row(row + i * kThreads / kColumns)[c] = from_float<Operand<P>>(values[i]);
        }
        ptx::commit_copies();
    }
};

// sums = left [16, inner] right [inner, 64 columns from `column` on]. `left(k)` is a function of the row,
// called once for every image: what a column has for all rows is read once. Begins and ends with a barrier.
template <Product P, typename Left, typename Right>
__device__ void multiply_rows(float (&sums)[2][4], Tiles<P>& tiles, const Rows& rows, int inner, int column,
                              const Right& right, Left left) {
    constexpr int kEach = kRows / kWarps, kTimes = kColumns / kWarp;  // rows and columns of a lane
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[e][i] = 0.0f;
    __syncthreads();
    right.start(tiles.right_rows(0), 0, column);
    int stage = 0;
    for (int k = 0; k < inner; k += kColumns, stage ^= 1) {
        const OperandRows<P> of_left = tiles.left_rows(stage), of_right = tiles.right_rows(stage);
        float values[kTimes][kEach] = {};  // all are read before one is written, so that they come together
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            const int c = k + rows.lane + i * kWarp;
            if (c >= inner) continue;
            const auto of_row = left(c);
#pragma unroll
            for (int r = 0; r < kEach; ++r) {
                const int row = rows.warp * kEach + r;
                if (rows.has(row)) values[i][r] = of_row(row);
            }
        }
#pragma unroll
        for (int i = 0; i < kTimes; ++i)
#pragma unroll
            for (int r = 0; r < kEach; ++r)
                of_left.row(rows.warp * kEach + r)[rows.lane + i * kWarp] =
                    from_float<Operand<P>>(values[i][r]);
        ptx::wait_for_copies<0>();
        __syncthreads();
        if (k + kColumns < inner) right.start(tiles.right_rows(stage ^ 1), k + kColumns, column);
#pragma unroll
        for (int i = 0; i < kColumns; i += kInner) {
            if constexpr (Right::kTransposed)
                add_products<P, 2>(sums, of_left, of_right.below(rows.warp * 16), rows, i);
            else
                add_products_across<P>(sums, of_left, of_right, rows, i, rows.warp * 16);
        }
    }
    __syncthreads();
}

// ---- launches ----

using Kernel = void (*)(Call);

__host__ __device__ inline int64_t row_tiles(const Direction& d) { return (d.batch + kRows - 1) / kRows; }
__host__ __device__ inline int64_t column_tiles(int64_t width) { return (width + kColumns - 1) / kColumns; }

// One of the kernels, by their products; `blocks(direction)` along x, of which the larger number counts.
template <typename F>
cudaError_t launch_chain(const Kernel* kernels, const Call& call, const Target& target, F blocks,
                         int64_t along_z = 1) {
    int64_t most = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        const int64_t wanted = blocks(call.item[i]);
        most = wanted > most ? wanted : most;
    }
    LaunchShape shape;
    shape.grid =
        dim3(static_cast<unsigned>(most), static_cast<unsigned>(call.count), static_cast<unsigned>(along_z));
    shape.threads = kThreads;
    shape.overlaps = target.overlaps();
    return launch(kernels[static_cast<int>(target.product)], shape, target.stream, call);
}

// A block's place in a grid of row tiles times `columns` blocks.
struct BlockOf {
    int64_t tile;
    int column;
    __device__ BlockOf(int64_t columns)
        : tile(blockIdx.x / columns), column(static_cast<int>(blockIdx.x % columns)) {}
};

// All of a kernel's first words: what the kernel before has written is there, and the next may begin.
__device__ inline void begin_kernel() {
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_begin();
}

}  // namespace crossvit
