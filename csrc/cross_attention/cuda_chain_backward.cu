// The chain of the CLS token backward: from the new CLS token to the gradient of z, and, after the attention,
// from that of the absorbed query to the old CLS token. docs/cross_attention.md has the formulas; what the
// gradients of the parameters are made of stays in `scratch`.
#include "cuda_chain.cuh"

namespace crossvit {
namespace {

// From the gradient of GELU(LayerNorm(x)): that of the norm's output, its product with x^, and the
// activation.
struct ActivationGradient {
    float d_norm, d_gamma, activation;

    __device__ ActivationGradient(float gradient, float hat, float gamma, float beta) {
        const float normed = fmaf(hat, gamma, beta);
        d_norm = gradient * gelu_derivative(normed);
        d_gamma = d_norm * hat;
        activation = gelu(normed);
    }
};

// The incoming gradient of the new CLS token.
__device__ float incoming(const Direction& d, int64_t image, int k) {
    return load_element(d.grad_cls.data, d.tokens,
                        image * d.grad_cls.batch_stride + k * d.grad_cls.channel_stride);
}

// From the new CLS token through g to the output of its LayerNorm.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) back_backward_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    __shared__ Norm norms[kRows];
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(column_tiles(d.width));
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const Projection& g = d.parameters.back;
    const int width = static_cast<int>(d.width), own_width = static_cast<int>(d.own_width);
    const int column = block.column * kColumns;
    const Columns y = rows.saved(d, Saved::Y), d_new = rows.scratch(d, Scratch::DNew);
    const Columns d_norm = rows.scratch(d, Scratch::DBackNorm),
                  d_gamma = rows.scratch(d, Scratch::DBackGamma);
    const Columns activation = rows.scratch(d, Scratch::BackActivation);
    find_norms(norms, rows, width, call.eps, y);
    float sums[2][4];
    multiply_rows(sums, tiles, rows, own_width, column,
                  WeightOperand<P, false>(g.weight, 0, own_width, width), [&](int k) {
                      return [&, k](int row) {
                          const float value = incoming(d, rows.image(row), k);
                          if (block.column == 0) d_new(row, k) = value;
                          return value;
                      };
                  });
    rows.results(sums, column, width, [&](int row, int c, float value) {
        const ActivationGradient found(value, norms[row].hat(y(row, c)), element(g.norm_weight, c),
                                       element(g.norm_bias, c));
        d_norm(row, c) = found.d_norm;
        d_gamma(row, c) = found.d_gamma;
        activation(row, c) = found.activation;
    });
}

// dy, through the LayerNorm of g, and do = Wo^T (scale dy).
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) output_backward_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    __shared__ Norm norms[kRows];
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(column_tiles(d.width));
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const Projection& g = d.parameters.back;
    const int width = static_cast<int>(d.width), column = block.column * kColumns;
    const Columns y = rows.saved(d, Saved::Y), projected = rows.saved(d, Saved::Projected);
    const Columns d_norm = rows.scratch(d, Scratch::DBackNorm), d_y_of = rows.scratch(d, Scratch::DY);
    const Columns d_projected_of = rows.scratch(d, Scratch::DProjected);
    const Columns d_output = rows.scratch(d, Scratch::DOutput);
    const auto d_normed = [&](int row, int k) { return d_norm(row, k) * element(g.norm_weight, k); };
    if (g.weight.data) {
        find_norms(norms, rows, width, call.eps, y);
        find_means(norms, rows, width, y, d_normed);
    }
    float sums[2][4];
    multiply_rows(sums, tiles, rows, width, column, WeightOperand<P, false>(d.parameters.wo, 0, width, width),
                  [&](int k) {
                      return [&, k](int row) {
                          const int64_t image = rows.image(row);
                          const float d_y = g.weight.data ? norms[row].backward(d_normed(row, k), y(row, k))
                                                          : incoming(d, image, k);
                          float d_projected = d_y;
                          if (d.scale.data)
                              d_projected *=
                                  load_element(d.scale.data, d.tokens,
                                               image * d.scale.batch_stride + k * d.scale.channel_stride);
                          if (block.column == 0) {
                              d_y_of(row, k) = d_y;
                              d_projected_of(row, k) = d_projected;
                              if (d.scale_gradient)
                                  d.scale_gradient[image * d.width + k] = d_y * projected(row, k);
                          }
                          return d_projected;
                      };
                  });
    rows.results(sums, column, width, [&](int row, int c, float value) { d_output(row, c) = value; });
}

// du_h = Wv_h^T do_h, and what the softmax's gradient subtracts: dz . z plus, under dropout, that of the
// attention's sum. A block has a head, and all of its columns, for these sums.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) values_backward_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    __shared__ float2 of_warps[kWarps][kRows];
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(d.heads);
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const Parameters& w = d.parameters;
    const int width = static_cast<int>(d.width), of_head = width / static_cast<int>(d.heads);
    const int head = block.column, first = head * of_head;
    const Columns all_d_output = rows.scratch(d, Scratch::DOutput), of_z = rows.z(d, head);
    const Columns d_u_of = rows.scratch(d, Scratch::DU, head), u = rows.scratch(d, Scratch::U, head);
    const Columns d_gamma = rows.scratch(d, Scratch::DGammaPart, head);
    const Columns d_beta = rows.scratch(d, Scratch::DBetaPart, head);
    const auto d_output = [&](int row, int k) { return all_d_output(row, first + k); };
    float against[2] = {}, d_sum[2] = {}, kept_sums[2] = {};  // of rows g and g + 8, this lane's columns
    for (int half = 0; half < 2; ++half) {
        const int row = rows.g + 8 * half;
        if (rows.has(row)) kept_sums[half] = Saved::kept_sum(d, rows.image(row))[head];
    }
    float sums[2][4];
    for (int column = 0; column < width; column += kColumns) {
        multiply_rows(sums, tiles, rows, of_head, column,
                      WeightOperand<P, false>(w.wv, first, of_head, width),
                      [&](int k) { return [&, k](int row) { return d_output(row, k); }; });
        rows.results(sums, column, width, [&](int row, int c, float d_u) {
            const int half = row == rows.g ? 0 : 1;
            const float z = of_z(row, c), kept_sum = half ? kept_sums[1] : kept_sums[0];
            const float gamma = element(w.norm_weight, c), beta = element(w.norm_bias, c);
            // With dz as the products of attend_backward see it, so that the sum over the tokens cancels.
            const float found = fmaf(rounded<P>(d_u * gamma), z, half ? against[1] : against[0]);
            const float of_sum = fmaf(d_u, beta, half ? d_sum[1] : d_sum[0]);
            if (half)
                against[1] = found, d_sum[1] = of_sum;
            else
                against[0] = found, d_sum[0] = of_sum;
            d_u_of(row, c) = d_u;
            u(row, c) = fmaf(gamma, z, kept_sum * beta);
            d_gamma(row, c) = d_u * z;
            d_beta(row, c) = d_u * kept_sum;
        });
    }
    for (int half = 0; half < 2; ++half) {
        const float2 found =
            make_float2(quad_sum(half ? against[1] : against[0]), quad_sum(half ? d_sum[1] : d_sum[0]));
        if (rows.t == 0) of_warps[rows.warp][rows.g + 8 * half] = found;
    }
    __syncthreads();
    rows.each([&](int row) {
        const int64_t image = rows.image(row);
        const float kept_sum = Saved::kept_sum(d, image)[head];
        float of_bias = 0.0f;
        for (int k = rows.lane; k < of_head; k += kWarp) {
            of_bias = fmaf(d_output(row, k), element(w.bv, first + k), of_bias);
            Scratch::column(d, image, Scratch::DValueBias)[first + k] = d_output(row, k) * kept_sum;
        }
        float2 total = make_float2(0.0f, warp_sum(of_bias));
        for (int i = 0; i < kWarps; ++i) {
            total.x += of_warps[i][row].x;
            total.y += of_warps[i][row].y;
        }
        if (!d.seed) total.y = 0.0f;  // the sum of the attention is 1 unless some of it is dropped
        if (rows.lane == 0) {
            Scratch::softmax_sum(d, image)[head] = fmaf(total.y, kept_sum, total.x);
            Scratch::d_kept_sum(d, image)[head] = total.y;
        }
    });
}

// dq_h = Wk_h dkey_h, from the parts of the absorbed queries' gradients. But for rounding, ds sums to zero
// over the tokens. What is left multiplies all that the tokens have in common, so it is taken off with z,
// their mean under the attention. A block has a head.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) absorb_backward_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    __shared__ float shifts[kRows], excesses[kRows];
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
        float shift = 0.0f, excess = 0.0f;
        for (int i = 0; i < parts; ++i) {
            const float* numbers = Parts::numbers(d, image, i, head);
            shift += numbers[0];
            excess += numbers[1];
        }
        const float kept_sum = Saved::kept_sum(d, image)[head];
        shifts[threadIdx.x] = shift;
        excesses[threadIdx.x] = kept_sum > 0.0f ? excess / kept_sum : 0.0f;
    }
    __syncthreads();
    const float scale = kLog2E * rsqrtf(static_cast<float>(of_head));
    const Columns z = rows.z(d, head), key = rows.key(d, head),
                  d_key_of = rows.scratch(d, Scratch::DKey, head);
    const Columns d_gamma_of = rows.scratch(d, Scratch::DGammaPart, head);
    const Columns d_query = rows.scratch(d, Scratch::DQuery), of_parts = rows.parts(d, head);
    const int to_next_part = static_cast<int>(d.heads * Parts::columns(d));
    float sums[2][4];
    for (int j = 0; j < of_head; j += kColumns) {
        multiply_rows(sums, tiles, rows, width, j, WeightOperand<P, true>(w.wk, first, of_head, width),
                      [&](int k) {
                          const float gamma = element(w.norm_weight, k);
                          return [&, k, gamma](int row) {
                              if (j) return d_key_of(row, k);
                              float d_absorbed = 0.0f;
                              const float* of_part = &of_parts(row, k);
                              for (int i = 0; i < parts; ++i, of_part += to_next_part) d_absorbed += *of_part;
                              d_absorbed -= fmaf(excesses[row], z(row, k), shifts[row]);
                              float& d_gamma = d_gamma_of(row, k);
                              d_gamma = fmaf(d_absorbed, key(row, k), d_gamma);
                              const float d_key = d_absorbed * gamma * scale;
                              d_key_of(row, k) = d_key;
                              return d_key;
                          };
                      });
        rows.results(sums, j, of_head, [&](int row, int c, float value) { d_query(row, first + c) = value; });
    }
}

// The gradient of LN(c) through the query, Wq^T dq.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) query_backward_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    __shared__ Norm norms[kRows];
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(column_tiles(d.width));
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const Parameters& w = d.parameters;
    const int width = static_cast<int>(d.width), column = block.column * kColumns;
    const Columns cls = rows.saved(d, Saved::Cls), d_query = rows.scratch(d, Scratch::DQuery);
    const Columns normed = rows.scratch(d, Scratch::Normed), d_norm_of = rows.scratch(d, Scratch::DNorm);
    const Columns d_gamma = rows.scratch(d, Scratch::DGamma);
    find_norms(norms, rows, width, call.eps, cls);
    float sums[2][4];
    multiply_rows(sums, tiles, rows, width, column, WeightOperand<P, false>(w.wq, 0, width, width),
                  [&](int k) { return [&, k](int row) { return d_query(row, k); }; });
    rows.results(sums, column, width, [&](int row, int c, float d_norm) {
        const float hat = norms[row].hat(cls(row, c));
        normed(row, c) = fmaf(hat, element(w.norm_weight, c), element(w.norm_bias, c));
        d_norm_of(row, c) = d_norm;
        d_gamma(row, c) = d_norm * hat;
    });
}

// The gradient of c: through the residual, as a row of the attention, and as its query.
struct ClsGradient {
    const Direction& d;
    const Rows& rows;
    Norm* norms;
    Columns cls = rows.saved(d, Saved::Cls), d_norm = rows.scratch(d, Scratch::DNorm);
    Columns d_y = rows.scratch(d, Scratch::DY), d_row = rows.scratch(d, Scratch::DRow);

    __device__ float d_normed(int row, int k) const {
        return d_norm(row, k) * element(d.parameters.norm_weight, k);
    }
    __device__ void prepare(float eps) const {
        const int width = static_cast<int>(d.width);
        find_norms(norms, rows, width, eps, cls);
        find_means(norms, rows, width, cls, [&](int row, int k) { return d_normed(row, k); });
    }
    __device__ float operator()(int row, int k) const {
        return d_y(row, k) + d_row(row, k) + norms[row].backward(d_normed(row, k), cls(row, k));
    }
};

// dc and, through f, the gradient of its LayerNorm's output.
template <Product P>
__global__ void __launch_bounds__(kThreads, 1) project_backward_kernel(const __grid_constant__ Call call) {
    __shared__ Tiles<P> tiles;
    __shared__ Norm norms[kRows], own_norms[kRows];
    const Direction& d = call.item[blockIdx.y];
    const BlockOf block(column_tiles(d.own_width));
    if (block.tile >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(block.tile, d.batch);
    const Projection& f = d.parameters.project;
    const int width = static_cast<int>(d.width), own_width = static_cast<int>(d.own_width);
    const int column = block.column * kColumns;
    const auto own = [&](int row, int k) {
        return load_element(d.cls.data, d.tokens,
                            rows.image(row) * d.cls.batch_stride + k * d.cls.channel_stride);
    };
    const ClsGradient d_cls{d, rows, norms};
    const Columns d_cls_of = rows.scratch(d, Scratch::DCls);
    const Columns d_norm = rows.scratch(d, Scratch::DProjectNorm);
    const Columns d_gamma = rows.scratch(d, Scratch::DProjectGamma);
    const Columns activation = rows.scratch(d, Scratch::Activation);
    d_cls.prepare(call.eps);
    find_norms(own_norms, rows, own_width, call.eps, own);
    float sums[2][4];
    multiply_rows(sums, tiles, rows, width, column, WeightOperand<P, false>(f.weight, 0, width, own_width),
                  [&](int k) {
                      return [&, k](int row) {
                          const float value = d_cls(row, k);
                          if (block.column == 0) d_cls_of(row, k) = value;
                          return value;
                      };
                  });
    rows.results(sums, column, own_width, [&](int row, int c, float value) {
        const ActivationGradient found(value, own_norms[row].hat(own(row, c)), element(f.norm_weight, c),
                                       element(f.norm_bias, c));
        d_norm(row, c) = found.d_norm;
        d_gamma(row, c) = found.d_gamma;
        activation(row, c) = found.activation;
    });
}

// The gradient of the CLS token itself; a block has 16 images.
__global__ void __launch_bounds__(kThreads, 1) cls_backward_kernel(const __grid_constant__ Call call) {
    __shared__ Norm norms[kRows];
    const Direction& d = call.item[blockIdx.y];
    if (blockIdx.x >= row_tiles(d)) return;
    begin_kernel();
    const Rows rows(blockIdx.x, d.batch);
    const Projection& f = d.parameters.project;
    const int own_width = static_cast<int>(d.own_width);
    const auto own = [&](int row, int k) {
        return load_element(d.cls.data, d.tokens,
                            rows.image(row) * d.cls.batch_stride + k * d.cls.channel_stride);
    };
    const Columns d_norm = rows.scratch(d, Scratch::DProjectNorm);
    const auto d_normed = [&](int row, int k) { return d_norm(row, k) * element(f.norm_weight, k); };
    const ClsGradient d_cls{d, rows, norms};
    if (f.weight.data) {
        find_norms(norms, rows, own_width, call.eps, own);
        find_means(norms, rows, own_width, own, d_normed);
    } else {
        d_cls.prepare(call.eps);
    }
    for (int begin = 0; begin < own_width; begin += kColumns)
        rows.elements(begin, own_width, [&](int row, int k, bool there) {
            if (!there) return;
            const float value =
                f.weight.data ? norms[row].backward(d_normed(row, k), own(row, k)) : d_cls(row, k);
            const Tokens& to = d.cls_gradient;
            store_element(to.data, d.tokens, rows.image(row) * to.batch_stride + k * to.channel_stride,
                          value);
        });
}

constexpr Kernel kBackBackward[] = {
    back_backward_kernel<Product::bfloat16>, back_backward_kernel<Product::float16>,
    back_backward_kernel<Product::float32>, back_backward_kernel<Product::tf32>};
constexpr Kernel kOutputBackward[] = {
    output_backward_kernel<Product::bfloat16>, output_backward_kernel<Product::float16>,
    output_backward_kernel<Product::float32>, output_backward_kernel<Product::tf32>};
constexpr Kernel kValuesBackward[] = {
    values_backward_kernel<Product::bfloat16>, values_backward_kernel<Product::float16>,
    values_backward_kernel<Product::float32>, values_backward_kernel<Product::tf32>};
constexpr Kernel kAbsorbBackward[] = {
    absorb_backward_kernel<Product::bfloat16>, absorb_backward_kernel<Product::float16>,
    absorb_backward_kernel<Product::float32>, absorb_backward_kernel<Product::tf32>};
constexpr Kernel kQueryBackward[] = {
    query_backward_kernel<Product::bfloat16>, query_backward_kernel<Product::float16>,
    query_backward_kernel<Product::float32>, query_backward_kernel<Product::tf32>};
constexpr Kernel kProjectBackward[] = {
    project_backward_kernel<Product::bfloat16>, project_backward_kernel<Product::float16>,
    project_backward_kernel<Product::float32>, project_backward_kernel<Product::tf32>};
constexpr Kernel kClsBackward[] = {cls_backward_kernel, cls_backward_kernel, cls_backward_kernel,
                                   cls_backward_kernel};

int64_t over_width(const Direction& d) { return row_tiles(d) * column_tiles(d.width); }
int64_t over_own_width(const Direction& d) { return row_tiles(d) * column_tiles(d.own_width); }
int64_t over_heads(const Direction& d) { return row_tiles(d) * d.heads; }

}  // namespace

cudaError_t back_backward(const Call& call, const Target& target) {
    return launch_chain(kBackBackward, call, target, over_width);
}
cudaError_t output_backward(const Call& call, const Target& target) {
    return launch_chain(kOutputBackward, call, target, over_width);
}
cudaError_t values_backward(const Call& call, const Target& target) {
    return launch_chain(kValuesBackward, call, target, over_heads);
}
cudaError_t absorb_backward(const Call& call, const Target& target) {
    return launch_chain(kAbsorbBackward, call, target, over_heads);
}
cudaError_t query_backward(const Call& call, const Target& target) {
    return launch_chain(kQueryBackward, call, target, over_width);
}
cudaError_t project_backward(const Call& call, const Target& target) {
    return launch_chain(kProjectBackward, call, target, over_own_width);
}
cudaError_t cls_backward(const Call& call, const Target& target) {
    return launch_chain(kClsBackward, call, target, row_tiles);
}

}  // namespace crossvit
