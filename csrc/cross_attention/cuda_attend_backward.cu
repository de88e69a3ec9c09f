// Gradients of the tokens and of the absorbed queries, in one pass over the tokens, with the softmax from its
// saved sum; cuda_tokens.cuh has the picture. The query of a head and the gradient of its z are two rows of
// one operand G [16, C], q of eight heads and then dz of eight heads:
//
//     scores, dz . x^  = tokens G^T       [16 tokens, 16], summed over the warps
//     ds, p            from them          [16 tokens, 16] = E
//     dx^              = E G              [16 tokens, C]
//     dq               += tokens^T ds     [C, 8 heads]
//
// All from one tile in shared memory, where the result takes the place of the tokens, so that memory is read
// and written 16 bytes a lane: bound by the memory, three tensors of the size of the tokens.
#include <algorithm>

#include "../common/cuda_launch.cuh"
#include "cuda_kernels.h"
#include "cuda_tokens.cuh"

namespace crossvit {
namespace {

// Of heads 2 t and 2 t + 1: what the softmax's gradient needs, and sums over the channels of their rows of G.
struct Heads {
    float log_sum[2], softmax_sum[2], d_kept_sum[2];
    float query_sum[2], d_z_sum[2];
};

// ds and the p that multiplies dz, of one head and token.
struct Coefficients {
    float d_score, kept_p;
};

__device__ Coefficients softmax_backward(const Call& call, const Direction& d, int64_t image, int64_t head,
                                         int64_t n, bool there, float score, float d_p, float log_sum,
                                         float softmax_sum, float d_kept_sum) {
    if (!there) return {0.0f, 0.0f};
    const float p = ptx::exp2(score - log_sum);
    float kept_p = p;
    if (d.seed) {
        const float factor = kept(call, d, image, head, n);
        kept_p *= factor;
        d_p = (d_p + d_kept_sum) * factor;
    }
    if (d.grad_attention) d_p += d.grad_attention[(image * d.heads + head) * (d.patches + 1) + n];
    return {kLn2 * p * (d_p - softmax_sum), kept_p};
}

// sums [16 tokens, 16 channels] = E G; `scores` and `kept` are E in this lane's places, `memory` all of it.
template <Product P>
__device__ void multiply_coefficients(float (&sums)[2][4], const float (&scores)[4], const float (&kept)[4],
                                      const float* memory, int stride, const OperandRows<P>& pairs,
                                      const Place& place, int c) {
    const int g = place.g, t = place.t;
    if constexpr (sizeof(Operand<P>) == 2) {
        const uint32_t a[4] = {pack<P>(scores[0], scores[1]), pack<P>(scores[2], scores[3]),
                               pack<P>(kept[0], kept[1]), pack<P>(kept[2], kept[3])};
        uint32_t b[4];
        ptx::load_matrices_transposed(b, pairs.matrices(place, c));
        const uint32_t near[2] = {b[0], b[1]}, far[2] = {b[2], b[3]};
        multiply<P>(sums[0], a, near);
        multiply<P>(sums[1], a, far);
    } else if constexpr (P == Product::tf32) {
        // Heads 2 t and 2 t + 1 are in this lane: the sum over them may take them in any order.
        const uint32_t a[2][4] = {{__float_as_uint(scores[0]), __float_as_uint(scores[2]),
                                   __float_as_uint(scores[1]), __float_as_uint(scores[3])},
                                  {__float_as_uint(kept[0]), __float_as_uint(kept[2]),
                                   __float_as_uint(kept[1]), __float_as_uint(kept[3])}};
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float *even = pairs.row(8 * i + 2 * t), *odd = pairs.row(8 * i + 2 * t + 1);
                const uint32_t b[2] = {__float_as_uint(even[c + 8 * e + g]),
                                       __float_as_uint(odd[c + 8 * e + g])};
                multiply<P>(sums[e], a[i], b);
            }
    } else {
#pragma unroll
        for (int k = 0; k < 2 * kHeads; ++k)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float2 pair = *reinterpret_cast<const float2*>(pairs.row(k) + c + 8 * e + 2 * t);
                const float x = memory[g * stride + k], y = memory[(g + 8) * stride + k];
                sums[e][0] = fmaf(x, pair.x, sums[e][0]);
                sums[e][1] = fmaf(x, pair.y, sums[e][1]);
                sums[e][2] = fmaf(y, pair.x, sums[e][2]);
                sums[e][3] = fmaf(y, pair.y, sums[e][3]);
            }
    }
}

// The gradient of c as the first row of the attention, as the others have it below. Lane k has coefficient k
// of 16, the sum over the channels of row k of G, and that of its product with x^_0.
template <Product P>
__device__ void store_cls_row(const Direction& d, int64_t image, bool adds, float coefficient, float sum,
                              float product, const OperandRows<P>& pairs, const float* normed, float rstd,
                              const Place& place) {
    const float width = static_cast<float>(d.width);
    const float plain = warp_sum(coefficient * sum) / width,
                against = warp_sum(coefficient * product) / width;
    float* row = Scratch::column(d, image, Scratch::DRow);
    for (int at = 0; at < place.channels; at += kWarp) {  // whole warps, for the shuffles
        const int c = place.first + min(at + place.lane, place.channels - 1);
        float d_normed = 0.0f;
        for (int k = 0; k < 2 * kHeads; ++k)
            d_normed = fmaf(__shfl_sync(kAll, coefficient, k), to_float(pairs.row(k)[c]), d_normed);
        if (at + place.lane < place.channels) {
            const float value = rstd * (d_normed - plain - normed[c] * against);
            row[c] = adds ? row[c] + value : value;
        }
    }
}

// A barrier after which tiles that were written here may be loaded again.
__device__ void release_tiles() {
#if __CUDA_ARCH__ >= 900
    ptx::fence_copy_engine();
#endif
    __syncthreads();
}

// Zeros in the slice of the rows from `first` on.
__device__ void clear_rows(char* tile, int stride, int first, const Place& place, int size) {
    for (int row = first; row < kTokens; ++row)
        for (int at = place.first * size + 4 * place.lane; at < (place.first + place.channels) * size;
             at += 4 * kWarp)
            *reinterpret_cast<uint32_t*>(tile + row * stride + at) = 0;
    __syncwarp();
}

template <Product P, bool AsIs>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    attend_backward_kernel(const __grid_constant__ Call call) {
    extern __shared__ __align__(128) char shared[];
    const Direction& d = call.item[blockIdx.y];
    const int64_t image = blockIdx.x / d.splits, split = blockIdx.x % d.splits, head = call.tile * kHeads;
    if (image >= d.batch || head >= d.heads) return;
    const Place place(d.width);
    const int g = place.g, t = place.t, heads = static_cast<int>(min(d.heads - head, int64_t{kHeads}));
    const int stages = static_cast<int>(call.stages);
    const bool adds = call.tile > 0, leads = split == 0;
    const TokenRows tokens(d.patch_tokens, image, d.tokens, d.width);
    const TokenRows to(d.patches_gradient, image, d.tokens, d.width);
    const TokenRows incoming(!to.data ? Tokens{}
                             : adds   ? d.patches_gradient
                                      : d.grad_patches,
                             image, d.tokens, d.width);
    const bool brings = call.brings_incoming;  // else it is read where it is added
    const TokenRows brought(brings && incoming.data ? incoming : TokenRows(Tokens{}, 0, d.tokens, d.width));
    const SharedLayout layout(d.width, tokens.size, sizeof(Operand<P>), AsIs, 2 * kHeads, brings, place.warps,
                              stages);
    const bool in_place = !AsIs && SharedLayout::in_place(tokens.size, sizeof(Operand<P>));
    const bool apart = !AsIs && !in_place;
    float* normed_cls = reinterpret_cast<float*>(shared + layout.normed_cls);
    float2* first_sums = reinterpret_cast<float2*>(shared + layout.statistics);
    const OperandRows<P> pairs{shared + layout.queries, layout.operand_stride};
    const Part part(d.patches, split, d.splits);
    TileLoader loader(shared, layout, place, tokens, brought, d.width, part.begin, part.end, stages);

    loader.prepare();
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_begin();
    __syncthreads();
    for (int i = 0; i < stages - 1; ++i) loader.start_next();

    const float cls_rstd = normalise_cls(d, image, call.eps, place, normed_cls);
    __syncwarp();
    fill_queries<P, 2 * kHeads>(pairs, d, normed_cls, place, first_sums, [&](int row) -> const float* {
        const int h = row % kHeads;
        if (h >= heads) return nullptr;
        return row < kHeads ? Saved::key(d, image, head + h)
                            : Scratch::of_head(d, image, Scratch::DU, head + h);
    });
    __syncthreads();
    float2 of_row = {};  // of row lane % 16
    for (int w = 0; w < place.warps; ++w) {
        const float2 of_warp = first_sums[w * 2 * kHeads + place.lane % 16];
        of_row.x += of_warp.x;
        of_row.y += of_warp.y;
    }
    __syncthreads();  // the moments of the tokens go to the same place
    Heads of;
    const float *log_sums = Saved::log_sum(d, image) + head, *sums = Scratch::softmax_sum(d, image) + head;
    const float* d_sums = Scratch::d_kept_sum(d, image) + head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int h = 2 * t + i;
        of.log_sum[i] = h < heads ? log_sums[h] : 0.0f;
        of.softmax_sum[i] = h < heads ? sums[h] : 0.0f;
        of.d_kept_sum[i] = h < heads ? d_sums[h] : 0.0f;
        of.query_sum[i] = __shfl_sync(kAll, of_row.x, h);
        of.d_z_sum[i] = __shfl_sync(kAll, of_row.x, kHeads + h);
    }

    // The CLS token is the first row of the first part.
    const int h_of_lane = place.lane % kHeads;
    const bool is_head = h_of_lane < heads && leads;
    const Coefficients of_cls = softmax_backward(
        call, d, image, head + h_of_lane, 0, is_head, __shfl_sync(kAll, of_row.y, h_of_lane),
        __shfl_sync(kAll, of_row.y, kHeads + h_of_lane), is_head ? log_sums[h_of_lane] : 0.0f,
        is_head ? sums[h_of_lane] : 0.0f, is_head ? d_sums[h_of_lane] : 0.0f);
    const float coefficient = place.lane >= 2 * kHeads ? 0.0f
                              : place.lane < kHeads    ? of_cls.d_score
                                                       : of_cls.kept_p;
    if (leads) {
        store_cls_row<P>(d, image, adds, coefficient, of_row.x, of_row.y, pairs, normed_cls, cls_rstd, place);
    }
    float d_queries[kProducts][4], shifts[2] = {}, excess[2], of_columns[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        of_columns[i] = __shfl_sync(kAll, coefficient, 2 * t + i);
        excess[i] = g == 0 ? of_columns[i] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kProducts; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = place.first + k * kChannels + g + i / 2 * 8;
            d_queries[k][i] = k < place.products ? normed_cls[c] * of_columns[i % 2] : 0.0f;
        }

    float* scores = reinterpret_cast<float*>(shared + layout.scores);
    float2* moments = reinterpret_cast<float2*>(shared + layout.statistics);
    int buffer = 0;  // of two, so that warps that are ahead write elsewhere
#pragma unroll 1
    for (bool begun = false; loader.has_tile(); loader.advance(), buffer ^= 1, begun = true) {
        float* tile_scores = scores + buffer * place.warps * kTokens * layout.score_stride;
        float2* tile_moments = moments + buffer * place.warps * kTokens;
        if (stages == 1) {
            if (begun) release_tiles();
            loader.start_next();
        }
        loader.wait();
        char* tile = loader.tile();
        const int rows = loader.rows();
        // Else they hold gradients, of which one that is not finite would spread.
        if (rows < kTokens) clear_rows(tile, layout.token_stride, rows, place, tokens.size);
        const OperandRows<P> operands{apart ? shared + layout.operands : tile,
                                      apart ? layout.operand_stride : layout.token_stride};

        if constexpr (AsIs)
            leave_moments<__nv_bfloat16>(tile, layout.token_stride, place, tile_moments);
        else
            leave_moments(tile, layout.token_stride, d.tokens, place, tile_moments);
        float2 statistics[2];  // of rows g and g + 8
        if constexpr (!AsIs) {
            __syncthreads();
            row_statistics(tile_moments, rows, call.eps, place, statistics);
            normalise_tile<P>(tile, layout.token_stride, d.tokens, operands, statistics, place);
        }
        float products[2][4] = {};
#pragma unroll
        for (int k = 0; k < kProducts; ++k)
            if (k < place.products)
                add_products<P, 2>(products, operands, pairs, place, place.first + k * kChannels);
        float* mine = tile_scores + (place.warp * kTokens + g) * layout.score_stride + 2 * t;
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<float2*>(mine + 8 * half * layout.score_stride + 8 * e) =
                    make_float2(products[e][2 * half], products[e][2 * half + 1]);
        release_tiles();
        if (stages > 1) loader.start_next();
        if constexpr (AsIs) row_statistics(tile_moments, rows, call.eps, place, statistics);

        // E, rounded as products see it, and the means that the gradient of LayerNorm takes off.
        float d_scores[4], kept_p[4], weights[4], plain[2], against[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int n = g + 8 * half;
            const float shift = AsIs ? statistics[half].x : 0.0f, scale = AsIs ? statistics[half].y : 1.0f;
            const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            float2 query = {}, d_z = {};
            for (int w = 0; w < place.warps; ++w) {
                const float* from = tile_scores + (w * kTokens + n) * layout.score_stride + 2 * t;
                const float2 a = *reinterpret_cast<const float2*>(from);
                const float2 b = *reinterpret_cast<const float2*>(from + kHeads);
                query = make_float2(query.x + a.x, query.y + a.y);
                d_z = make_float2(d_z.x + b.x, d_z.y + b.y);
            }
            const float score[2] = {query.x, query.y}, d_p[2] = {d_z.x, d_z.y};
            plain[half] = against[half] = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x = scale * (score[i] - shift * of.query_sum[i]);
                const float y = scale * (d_p[i] - shift * of.d_z_sum[i]);
                const bool there = n < rows && 2 * t + i < heads;
                const Coefficients found =
                    softmax_backward(call, d, image, head + 2 * t + i, 1 + loader.first() + n, there, x, y,
                                     of.log_sum[i], of.softmax_sum[i], of.d_kept_sum[i]);
                const float seen = rounded<P>(found.d_score * scale);
                weights[2 * half + i] = seen;
                shifts[i] = fmaf(seen, shift, shifts[i]);
                excess[i] = fmaf(seen, inverse, excess[i]);
                const float ds = rounded<P>(found.d_score), p = rounded<P>(found.kept_p);
                d_scores[2 * half + i] = ds;
                kept_p[2 * half + i] = p;
                plain[half] = fmaf(ds, of.query_sum[i], fmaf(p, of.d_z_sum[i], plain[half]));
                against[half] = fmaf(ds, x, fmaf(p, y, against[half]));
            }
            plain[half] = quad_sum(plain[half]) / static_cast<float>(d.width);
            against[half] = quad_sum(against[half]) / static_cast<float>(d.width);
        }
        TokenWeights<P> of_tokens;
        float* memory =
            reinterpret_cast<float*>(shared + layout.weights) + place.warp * kTokens * layout.score_stride;
        if constexpr (sizeof(Operand<P>) == 2) {
            of_tokens.pairs[0] = ptx::transposed(pack<P>(weights[0], weights[1]));
            of_tokens.pairs[1] = ptx::transposed(pack<P>(weights[2], weights[3]));
        } else {
            of_tokens.memory = memory;
            of_tokens.stride = layout.score_stride;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* row = memory + (g + 8 * half) * layout.score_stride + 2 * t;
                *reinterpret_cast<float2*>(row) = make_float2(d_scores[2 * half], d_scores[2 * half + 1]);
                *reinterpret_cast<float2*>(row + kHeads) =
                    make_float2(kept_p[2 * half], kept_p[2 * half + 1]);
            }
            __syncwarp();
        }
#pragma unroll
        for (int k = 0; k < kProducts; ++k)
            if (k < place.products)
                add_weighted_tokens<P>(d_queries[k], operands, of_tokens, place, place.first + k * kChannels);
        __syncwarp();

        if (to.data) {
            const int end = place.first + place.channels;
#pragma unroll 1
            for (int c = place.first; c < end; c += kChannels) {
                float d_normed[2][4] = {};
                multiply_coefficients<P>(d_normed, d_scores, kept_p, memory, layout.score_stride, pairs,
                                         place, c);
#pragma unroll
                for (int e = 0; e < 2; ++e)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int column = c + 8 * e + 2 * t;
                        char* at = tile + (g + 8 * half) * layout.token_stride + column * tokens.size;
                        float2 x = load_pair(at, in_place ? kOperandDtype<P> : d.tokens), more = {};
                        const float mean = statistics[half].x, rstd = statistics[half].y;
                        if (!in_place) x = make_float2((x.x - mean) * rstd, (x.y - mean) * rstd);
                        if (brought.data)
                            more = load_pair(at + layout.incoming, d.tokens);
                        else if (incoming.data && g + 8 * half < rows)
                            more = incoming.pair(loader.first() + g + 8 * half, column, end);
                        const float a = d_normed[e][2 * half] - plain[half] - x.x * against[half];
                        const float b = d_normed[e][2 * half + 1] - plain[half] - x.y * against[half];
                        store_pair(at, d.tokens, column < end ? fmaf(rstd, a, more.x) : 0.0f,
                                   column + 1 < end ? fmaf(rstd, b, more.y) : 0.0f);
                    }
            }
            __syncwarp();
            store_rows(to, loader.first(), tile, layout.token_stride, rows, place);
        }
    }

    const float ones[2] = {1.0f, 1.0f}, zeros[2] = {};
    store_z(d_queries, Parts::row(d, image, split, head), Parts::columns(d), ones, zeros, heads, place);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float shift = column_sum(shifts[i]), over = column_sum(excess[i]);
        if (place.warp == 0 && g == 0 && 2 * t + i < heads) {
            float* numbers = Parts::numbers(d, image, split, head + 2 * t + i);
            numbers[0] = shift;
            numbers[1] = over;
        }
    }
}

// Where the attention has a gradient of its own: sum_n attention_n d_attention_n joins what the softmax's
// gradient takes off. A warp a head.
__global__ void __launch_bounds__(4 * kWarp) add_attention_sums_kernel(const __grid_constant__ Call call) {
    const Direction& d = call.item[blockIdx.y];
    const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / kWarp;
    if (!d.grad_attention || row >= d.batch * d.heads) return;  // a whole warp leaves together
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_begin();
    const int64_t positions = d.patches + 1;
    const float *attention = d.attention + row * positions, *gradient = d.grad_attention + row * positions;
    float sum = 0.0f;
    for (int64_t n = threadIdx.x % kWarp; n < positions; n += kWarp)
        sum = fmaf(attention[n], gradient[n], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) Scratch::softmax_sum(d, row / d.heads)[row % d.heads] += sum;
}

}  // namespace

int64_t attend_backward_shared(const Direction& d, Product product, int64_t width, int64_t stages,
                               bool brings_incoming) {
    return shared_layout(d, product, 2 * kHeads, brings_incoming, width, stages).bytes;
}

cudaError_t add_attention_sums(const Call& call, const Target& target) {
    int64_t rows = 0;
    for (int64_t i = 0; i < call.count; ++i) rows = std::max(rows, call.item[i].batch * call.item[i].heads);
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>((rows + 3) / 4), static_cast<unsigned>(call.count));
    shape.threads = 4 * kWarp;
    shape.overlaps = target.overlaps();
    return launch(add_attention_sums_kernel, shape, target.stream, call);
}

cudaError_t attend_backward(const Call& call, const Target& target) {
    int64_t blocks = 0, width = 0, shared = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        blocks = std::max(blocks, call.item[i].batch * call.item[i].splits);
        width = std::max(width, call.item[i].width);
    }
    for (int64_t i = 0; i < call.count; ++i)
        shared = std::max(shared, attend_backward_shared(call.item[i], target.product, width, call.stages,
                                                         call.brings_incoming));
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(call.count));
    shape.threads = warps_for(width) * kWarp;
    shape.shared = shared;
    shape.most_shared = target.gpu.shared_of_block;
    shape.overlaps = target.overlaps();
    const bool as_is = multiplied_as_is(call.item[0], target.product);
    void (*kernel)(Call) = nullptr;
    switch (target.product) {
        case Product::bfloat16:
            kernel = as_is ? attend_backward_kernel<Product::bfloat16, true>
                           : attend_backward_kernel<Product::bfloat16, false>;
            break;
        case Product::float16:
            kernel = attend_backward_kernel<Product::float16, false>;
            break;
        case Product::float32:
            kernel = attend_backward_kernel<Product::float32, false>;
            break;
        case Product::tf32:
            kernel = attend_backward_kernel<Product::tf32, false>;
            break;
    }
    return launch(kernel, shape, target.stream, call);
}

}  // namespace crossvit
