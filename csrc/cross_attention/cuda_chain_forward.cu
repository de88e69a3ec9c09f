// The chain of the CLS token forward: c = f(cls), the absorbed query, and, after the attention, its values,
// the output, the new CLS token. docs/cross_attention.md has the formulas.
#include <algorithm>

#include "cuda_chain.cuh"

namespace crossvit {
namespace {

// Columns of Linear(GELU(LayerNorm(x))), of rows x(row, k): f and g.
template <Product P, typename X, typename Store>
__device__ void norm_gelu_linear(const Rows& rows, const Projection& p, int width, int out, int column,
                                 float eps, X x, Store store) {
    __shared__ Tiles<P> tiles;
    __shared__ Norm norms[kRows];
    find_norms(norms, rows, width, eps, x);
    float sums[2][4];
    multiply_rows(
        sums, tiles, rows, width, column, WeightOperand<P, true>(p.weight, 0, out, width), [&](int k) {
            const float gamma = element(p.norm_weight, k), beta = element(p.norm_bias, k);
            return
                [&, k, gamma, beta](int row) { return gelu(fmaf(norms[row].hat(x(row, k)), gamma, beta)); };
        });
    rows.results(sums, column, out,
                 [&](int row, int c, float value) { store(row, c, value + element(p.bias, c)); });
}

// c = f(cls), own width to width; in cross-attention alone, cls as it is.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) project_kernel(const __grid_constant__ Call call) {
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(column_tiles(d.width));
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const int width = static_cast<int>(d.width), column = block.column * kColumns;
    const auto own = [&](int row, int k) {
        return load_element(d.cls.data, d.tokens,
                            rows.image(row) * d.cls.batch_stride + k * d.cls.channel_stride);
    };
    const auto store = [cls = rows.saved(d, Saved::Cls)](int row, int c, float value) {
        cls(row, c) = value;
    };
    const Projection& p = d.parameters.project;
    if (p.weight.data)
        norm_gelu_linear<P>(rows, p, static_cast<int>(d.own_width), width, column, call.eps, own, store);
    else
        rows.elements(column, width, [&](int row, int c, bool there) {
            if (there) store(row, c, own(row, c));
        });
}

// q_h = Wq_h LN(c) + bq_h, and key_h = Wk_h^T q_h log2(e) / sqrt(d). A block has a head. Where a batch is too
// small to fill the GPU, several blocks along z share the columns of key_h, and each computes q_h.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) absorb_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    __shared__ Norm norms[kRows];
    __shared__ float query[kRows][kColumns];  // of heads that fit
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(d.heads);
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const Parameters& w = d.parameters;
    const int width = static_cast<int>(d.width), of_head = width / static_cast<int>(d.heads);
    const int first = block.column * of_head;
    const bool fits = of_head <= kColumns;
    const Columns cls = rows.saved(d, Saved::Cls), saved = rows.saved(d, Saved::Query);
    const Columns key = rows.key(d, block.column);
    find_norms(norms, rows, width, call.eps, cls);
    float sums[2][4];
    for (int j = 0; j < of_head; j += kColumns) {
        multiply_rows(
            sums, tiles, rows, width, j, WeightOperand<P, true>(w.wq, first, of_head, width), [&](int k) {
                const float gamma = element(w.norm_weight, k), beta = element(w.norm_bias, k);
                return
                    [&, k, gamma, beta](int row) { return fmaf(norms[row].hat(cls(row, k)), gamma, beta); };
            });
        rows.results(sums, j, of_head, [&](int row, int c, float value) {
            value += element(w.bq, first + c);
            if (blockIdx.z == 0) saved(row, first + c) = value;
            if (fits) query[row][c] = value;
        });
    }
    const float scale = kLog2E * rsqrtf(static_cast<float>(of_head));
    for (int column = blockIdx.z * kColumns; column < width; column += gridDim.z * kColumns) {
        multiply_rows(
            sums, tiles, rows, of_head, column, WeightOperand<P, false>(w.wk, first, of_head, width),
            [&](int k) { return [&, k](int row) { return fits ? query[row][k] : saved(row, first + k); }; });
        rows.results(sums, column, width, [&](int row, int c, float value) { key(row, c) = value * scale; });
    }
}

// o_h = Wv_h (gamma z_h + t beta) + t bv_h, with z_h and its sums merged from their parts. A block has a
// head.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) values_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    __shared__ float log_sums[kRows], kept_sums[kRows];
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(d.heads);
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const Parameters& w = d.parameters;
    const int width = static_cast<int>(d.width), of_head = width / static_cast<int>(d.heads);
    const int head = block.column, first = head * of_head, parts = static_cast<int>(d.splits);
    if (threadIdx.x < kRows && rows.has(threadIdx.x)) {
        const int64_t image = rows.image(threadIdx.x);
        float& log_sum = log_sums[threadIdx.x];
        float& kept_sum = kept_sums[threadIdx.x];
        if (d.parts) {  // in a fixed order, with weights 2^(log_sum of a part - log_sum)
            float largest = -INFINITY, weights = 0.0f;
            kept_sum = 0.0f;
            for (int i = 0; i < parts; ++i) largest = fmaxf(largest, Parts::numbers(d, image, i, head)[0]);
            for (int i = 0; i < parts; ++i) {
                const float* numbers = Parts::numbers(d, image, i, head);
                const float weight = ptx::exp2(numbers[0] - largest);
                weights += weight;
                kept_sum = fmaf(weight, numbers[1], kept_sum);
            }
            kept_sum /= weights;
            log_sum = largest + log2f(weights);
            Saved::log_sum(d, image)[head] = log_sum;
            Saved::kept_sum(d, image)[head] = kept_sum;
        } else {
            kept_sum = Saved::kept_sum(d, image)[head];
        }
    }
    __syncthreads();
    const Columns of_z = rows.z(d, head), of_parts = rows.parts(d, head),
                  output = rows.saved(d, Saved::Output);
    const int to_next_part = static_cast<int>(d.heads * Parts::columns(d));
    float sums[2][4];
    for (int j = 0; j < of_head; j += kColumns) {
        multiply_rows(
            sums, tiles, rows, width, j, WeightOperand<P, true>(w.wv, first, of_head, width), [&](int k) {
                const float gamma = element(w.norm_weight, k), beta = element(w.norm_bias, k);
                return [&, k, gamma, beta](int row) {
                    float& z = of_z(row, k);
                    float merged = 0.0f;
                    if (d.parts)
                        for (int i = 0; i < parts; ++i) {
                            const float* of_part = &of_parts(row, i * to_next_part);
                            merged =
                                fmaf(ptx::exp2(of_part[padded(d.width)] - log_sums[row]), of_part[k], merged);
                        }
                    else
                        merged = z;
                    if (d.parts && j == 0) z = merged;
                    return fmaf(merged, gamma, kept_sums[row] * beta);
                };
            });
        rows.results(sums, j, of_head, [&](int row, int c, float value) {
            output(row, first + c) = fmaf(kept_sums[row], element(w.bv, first + c), value);
        });
    }
}

// y = c + scale (Wo o + bo), which in cross-attention alone is the result.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) output_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(column_tiles(d.width));
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const int width = static_cast<int>(d.width), column = block.column * kColumns;
    float sums[2][4];
    const Columns output = rows.saved(d, Saved::Output), cls = rows.saved(d, Saved::Cls);
    const Columns saved = rows.saved(d, Saved::Projected), saved_y = rows.saved(d, Saved::Y);
    multiply_rows(sums, tiles, rows, width, column, WeightOperand<P, true>(d.parameters.wo, 0, width, width),
                  [&](int k) { return [&, k](int row) { return output(row, k); }; });
    rows.results(sums, column, width, [&](int row, int c, float projected) {
        const int64_t image = rows.image(row);
        projected += element(d.parameters.bo, c);
        saved(row, c) = projected;
        const Tokens& scale = d.scale;
        if (scale.data)
            projected *=
                load_element(scale.data, d.tokens, image * scale.batch_stride + c * scale.channel_stride);
        const float y = projected + cls(row, c);
        saved_y(row, c) = y;
        if (!d.parameters.back.weight.data)
            store_element(d.cls_out.data, d.tokens,
                          image * d.cls_out.batch_stride + c * d.cls_out.channel_stride, y);
    });
}

// The new CLS token g(y), width to own width.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) back_kernel(const __grid_constant__ Call call) {
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(column_tiles(d.own_width));
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    norm_gelu_linear<P>(
        rows, d.parameters.back, static_cast<int>(d.width), static_cast<int>(d.own_width),
        block.column * kColumns, call.eps, rows.saved(d, Saved::Y), [&](int row, int c, float value) {
            store_element(d.cls_out.data, d.tokens,
                          rows.image(row) * d.cls_out.batch_stride + c * d.cls_out.channel_stride, value);
        });
}

constexpr Kernel kProject[] = {project_kernel<Product::bfloat16>, project_kernel<Product::float16>,
                               project_kernel<Product::float32>, project_kernel<Product::tf32>};
constexpr Kernel kAbsorb[] = {absorb_kernel<Product::bfloat16>, absorb_kernel<Product::float16>,
                              absorb_kernel<Product::float32>, absorb_kernel<Product::tf32>};
constexpr Kernel kValues[] = {values_kernel<Product::bfloat16>, values_kernel<Product::float16>,
                              values_kernel<Product::float32>, values_kernel<Product::tf32>};
constexpr Kernel kOutput[] = {output_kernel<Product::bfloat16>, output_kernel<Product::float16>,
                              output_kernel<Product::float32>, output_kernel<Product::tf32>};
constexpr Kernel kBack[] = {back_kernel<Product::bfloat16>, back_kernel<Product::float16>,
                            back_kernel<Product::float32>, back_kernel<Product::tf32>};

}  // namespace

cudaError_t project(const Call& call, const Target& target) {
    return launch_chain(kProject, call, target,
                        [](const Direction& d) { return row_tiles(d) * column_tiles(d.width); });
}

cudaError_t absorb(const Call& call, const Target& target) {
    int64_t blocks = 0, columns = 1;
    bool fits = true;  // a block that shares a head keeps all of its query
    for (int64_t i = 0; i < call.count; ++i) {
        const Direction& d = call.item[i];
        blocks += row_tiles(d) * d.heads;
        columns = std::max(columns, column_tiles(d.width));
        fits = fits && d.width / d.heads <= kColumns;
    }
    const int64_t wanted = target.gpu.multiprocessors / std::max<int64_t>(blocks, 1);
    const int64_t shares = fits ? std::clamp<int64_t>(wanted, 1, columns) : 1;
    return launch_chain(
        kAbsorb, call, target, [](const Direction& d) { return row_tiles(d) * d.heads; }, shares);
}

cudaError_t values(const Call& call, const Target& target) {
    return launch_chain(kValues, call, target, [](const Direction& d) { return row_tiles(d) * d.heads; });
}

cudaError_t output(const Call& call, const Target& target) {
    return launch_chain(kOutput, call, target,
                        [](const Direction& d) { return row_tiles(d) * column_tiles(d.width); });
}

cudaError_t back(const Call& call, const Target& target) {
    return launch_chain(kBack, call, target,
                        [](const Direction& d) { return row_tiles(d) * column_tiles(d.own_width); });
}

}  // namespace crossvit
