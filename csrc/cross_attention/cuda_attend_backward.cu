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
    const float p = there ? ptx::exp2(score - log_sum) : 0.0f;
    float kept_p = p;
    if (d.seed) {
        const float factor = kept(call, d, image, head, n);
        kept_p *= factor;
        d_p = (d_p + d_kept_sum) * factor;
    }
    if (d.grad_attention && there) d_p += d.grad_attention[(image * d.heads + head) * (d.patches + 1) + n];
    return {kLn2 * p * (d_p - softmax_sum), kept_p};
}

// E of a tile: ds and p of rows g and g + 8 and of heads 2 t and 2 t + 1, rounded as products see them.
template <Product P>
struct TileCoefficients {
    float d_scores[4], kept[4];
    uint32_t pairs[4];    // of 16 bits: the same, ds first
    const float* memory;  // of 32 bits: all of E, a row a token
    int stride;

    __device__ void round() {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(Operand<P>) == 2) {
                float* pair = i < 2 ? d_scores + 2 * i : kept + 2 * (i - 2);
                pairs[i] = pack<P>(pair[0], pair[1]);
                const float2 seen = unpack<P>(pairs[i]);
                pair[0] = seen.x, pair[1] = seen.y;
            } else {
                d_scores[i] = rounded<P>(d_scores[i]);
                kept[i] = rounded<P>(kept[i]);
            }
        }
    }
};

// sums [16 tokens, 16 channels] += E G
template <Product P>
__device__ void multiply_coefficients(float (&sums)[2][4], const TileCoefficients<P>& of,
                                      const OperandRows<P>& pairs, const Place& place, int c) {
    const int g = place.g, t = place.t;
    if constexpr (sizeof(Operand<P>) == 2) {
        uint32_t b[4];
        ptx::load_matrices_transposed(b, pairs.matrices(place, c));
        const uint32_t near[2] = {b[0], b[1]}, far[2] = {b[2], b[3]};
        multiply<P>(sums[0], of.pairs, near);
        multiply<P>(sums[1], of.pairs, far);
    } else if constexpr (P == Product::tf32) {
        // Heads 2 t and 2 t + 1 are in this lane: the sum over them may take them in any order.
        const uint32_t a[2][4] = {{__float_as_uint(of.d_scores[0]), __float_as_uint(of.d_scores[2]),
                                   __float_as_uint(of.d_scores[1]), __float_as_uint(of.d_scores[3])},
                                  {__float_as_uint(of.kept[0]), __float_as_uint(of.kept[2]),
                                   __float_as_uint(of.kept[1]), __float_as_uint(of.kept[3])}};
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
                const float x = of.memory[g * of.stride + k], y = of.memory[(g + 8) * of.stride + k];
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
    const float plain = warp_sum(coefficient * sum) * place.inverse_width,
                against = warp_sum(coefficient * product) * place.inverse_width;
    float* row = Scratch::column(d, image, Scratch::DRow);
    float coefficients[2 * kHeads];
#pragma unroll
    for (int k = 0; k < 2 * kHeads; ++k) coefficients[k] = __shfl_sync(kAll, coefficient, k);
    const int end = place.first + place.channels;
    for (int c = place.first + 2 * place.lane; c < end; c += 2 * kWarp) {
        float2 sums = {};
#pragma unroll
        for (int k = 0; k < 2 * kHeads; ++k) {
            const float2 x = load_pair<Operand<P>>(reinterpret_cast<const char*>(pairs.row(k) + c));
            sums = make_float2(fmaf(coefficients[k], x.x, sums.x), fmaf(coefficients[k], x.y, sums.y));
        }
        const float d_normed[2] = {sums.x, sums.y};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (c + i >= end) break;
            const float value = rstd * (d_normed[i] - plain - normed[c + i - place.first] * against);
            row[c + i] = adds ? row[c + i] + value : value;
        }
    }
}

// Channels `column` and the next of a token's incoming gradient, before `end`.
__device__ float2 pair_of_row(const TokenRows& rows, Dtype dtype, int64_t n, int column, int end) {
    if (rows.wide && column < end) return load_pair(rows.row(n) + column * rows.size, dtype);
    return make_float2(column < end ? load_element(rows.at(n, column), dtype, 0) : 0.0f,
                       column + 1 < end ? load_element(rows.at(n, column + 1), dtype, 0) : 0.0f);
}

// A barrier after which tiles that were written here may be loaded again.
__device__ void release_tiles() {
#if __CUDA_ARCH__ >= 900
    ptx::fence_copy_engine();
#endif
    __syncthreads();
}

template <Product P, bool AsIs>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    attend_backward_kernel(const __grid_constant__ Call call) {
    extern __shared__ __align__(128) char shared[];
    const Direction& d = call.item[blockIdx.y];
    const unsigned splits = static_cast<unsigned>(d.splits), split = blockIdx.x % splits;
    const int64_t image = blockIdx.x / splits, head = call.tile * kHeads;
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
    float* scores = reinterpret_cast<float*>(shared + layout.scores);
    float2* moments = reinterpret_cast<float2*>(shared + layout.statistics);
    // The first tile has the first of two buffers: what is read before it may be in the second.
    float* other_scores = scores + place.warps * kSliceScores;
    float2* other_moments = moments + place.warps * kTokens;
    const OperandRows<P> pairs{shared + layout.queries, layout.operand_stride};
    const Part part(d.patches, split, splits);
    TileLoader loader(shared, layout, place, tokens, brought, d.width, part.begin, part.end, stages);

    loader.prepare();
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_begin();
    __syncthreads();
    for (int i = 0; i < stages - 1; ++i) loader.start_next();

    float* normed_cls = scores + place.warp * kSliceScores;
    float* gammas = normed_cls + kProducts * kChannels;
    const float cls_rstd = normalise_cls(d, image, call.eps, place, other_moments, normed_cls, gammas);
    float2* first_sums = reinterpret_cast<float2*>(other_scores);
    fill_queries<P, 2>(pairs, normed_cls, gammas, place, first_sums, [&](int row) -> const float* {
        const int h = row % kHeads;
        if (h >= heads) return nullptr;
        return row < kHeads ? Saved::key(d, image, head + h)
                            : Scratch::of_head(d, image, Scratch::DU, head + h);
    });
    __syncthreads();
    const float2 of_row = sums_of_row(first_sums, 2 * kHeads, place.lane % 16, place);
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
            const int c = k * kChannels + g + i / 2 * 8;
            d_queries[k][i] = k < place.products ? normed_cls[c] * of_columns[i % 2] : 0.0f;
        }

    int buffer = 0;  // of two, so that warps that are ahead write elsewhere
#pragma unroll 1
    for (bool begun = false; loader.has_tile(); loader.advance(), buffer ^= 1, begun = true) {
        float* tile_scores = buffer ? other_scores : scores;
        float2* tile_moments = buffer ? other_moments : moments;
        if (stages == 1) {
            if (begun) release_tiles();
            loader.start_next();
        }
        loader.wait();
        char* tile = loader.tile();
        const int rows = loader.rows();
        if (rows < kTokens) loader.clear_rows_behind();
        const OperandRows<P> operands{apart ? shared + layout.operands : tile,
                                      apart ? layout.operand_stride : layout.token_stride};

        float2 statistics[2];  // of rows g and g + 8
        float products[2][4] = {};
        if constexpr (AsIs) {
            multiply_as_is<2>(products, operands, place, tile_moments,
                              [&, begin = pairs.matrices_across(place, place.first)](
                                  int k, uint32_t (&b)[2][2]) { load_right(b, begin + k * kChannels * 2); });
        } else {
            leave_moments(tile, layout.token_stride, d.tokens, place, tile_moments);
            __syncthreads();
            row_statistics(tile_moments, rows, call.eps, place, statistics);
            normalise_tile<P>(tile, layout.token_stride, d.tokens, operands, statistics, place);
            place.each_product([&](int, int c) { add_products<P, 2>(products, operands, pairs, place, c); });
        }
        // Every warp needs of the others what it has itself, in the same lanes.
        const auto place_of = [&](int w, int e) {
            return reinterpret_cast<float4*>(tile_scores) + (2 * w + e) * kWarp + place.lane;
        };
#pragma unroll
        for (int e = 0; e < 2; ++e)
            *place_of(place.warp, e) =
                make_float4(products[e][0], products[e][1], products[e][2], products[e][3]);
        release_tiles();
        if (stages > 1) loader.start_next();
        if constexpr (AsIs) row_statistics(tile_moments, rows, call.eps, place, statistics);

        float sums[2][4] = {};
        place.each_warp([&](int w) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float4 of_warp = *place_of(w, e);
                sums[e][0] += of_warp.x;
                sums[e][1] += of_warp.y;
                sums[e][2] += of_warp.z;
                sums[e][3] += of_warp.w;
            }
        });

        // E, times 1 / sqrt(variance + eps) where tokens are multiplied as they are.
        TileCoefficients<P> of_tile;
        float scale[2], shift[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            shift[half] = AsIs ? statistics[half].x : 0.0f;
            scale[half] = AsIs ? statistics[half].y : 1.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = g + i / 2 * 8, h = 2 * t + i % 2;
            sums[0][i] = scale[i / 2] * (sums[0][i] - shift[i / 2] * of.query_sum[i % 2]);
            sums[1][i] = scale[i / 2] * (sums[1][i] - shift[i / 2] * of.d_z_sum[i % 2]);
            const Coefficients found = softmax_backward(
                call, d, image, head + h, 1 + loader.first() + n, n < rows && h < heads, sums[0][i],
                sums[1][i], of.log_sum[i % 2], of.softmax_sum[i % 2], of.d_kept_sum[i % 2]);
            of_tile.d_scores[i] = found.d_score * scale[i / 2];
            of_tile.kept[i] = found.kept_p * scale[i / 2];
        }
        of_tile.round();

        // The means that the gradient of LayerNorm takes off.
        float plain[2], against[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = scale[half] > 0.0f ? __fdividef(1.0f, scale[half]) : 0.0f;
            plain[half] = against[half] = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float ds = of_tile.d_scores[2 * half + i], p = of_tile.kept[2 * half + i];
                shifts[i] = fmaf(ds, shift[half], shifts[i]);
                excess[i] = fmaf(ds, inverse, excess[i]);
                plain[half] = fmaf(ds, of.query_sum[i], fmaf(p, of.d_z_sum[i], plain[half]));
                against[half] =
                    fmaf(ds, sums[0][2 * half + i], fmaf(p, sums[1][2 * half + i], against[half]));
            }
            plain[half] = quad_sum(plain[half]) * place.inverse_width;
            against[half] = quad_sum(against[half]) * place.inverse_width;
        }
        TokenWeights<P> of_tokens;
        if constexpr (sizeof(Operand<P>) == 2) {
            of_tokens.pairs[0] = ptx::transposed(of_tile.pairs[0]);
            of_tokens.pairs[1] = ptx::transposed(of_tile.pairs[1]);
        } else {
            float* memory = reinterpret_cast<float*>(shared + layout.weights) +
                            place.warp * kTokens * layout.score_stride;
            of_tile.memory = of_tokens.memory = memory;
            of_tile.stride = of_tokens.stride = layout.score_stride;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* row = memory + (g + 8 * half) * layout.score_stride + 2 * t;
                *reinterpret_cast<float2*>(row) =
                    make_float2(of_tile.d_scores[2 * half], of_tile.d_scores[2 * half + 1]);
                *reinterpret_cast<float2*>(row + kHeads) =
                    make_float2(of_tile.kept[2 * half], of_tile.kept[2 * half + 1]);
            }
            __syncwarp();
        }
        add_weighted_tokens<P>(d_queries, operands, of_tokens, place);
        __syncwarp();

        if (to.data) {
            // dx = outer (E G + constant - factor x), with x as the tile has it: normalised or not.
            const int end = place.first + place.channels;
            const Dtype tokens_type = AsIs ? Dtype::bfloat16 : d.tokens;
            float outer[2], constant[2], factor[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float rstd = statistics[half].y;
                outer[half] = AsIs ? 1.0f : rstd;
                factor[half] = in_place ? against[half] : against[half] * rstd;
                constant[half] = (in_place ? 0.0f : factor[half] * statistics[half].x) - plain[half];
            }
#pragma unroll 1
            for (int c = place.first; c < end; c += kChannels) {
                float sums[2][4];
                float2 x[2][2], found[2][2] = {};  // found[e][half]: what comes in, then the sum
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = constant[i % 4 / 2];
                multiply_coefficients<P>(sums, of_tile, pairs, place, c);
                load_pairs(x, tile, layout.token_stride, in_place ? kOperandDtype<P> : tokens_type, place, c);
                if (brought.data)
                    load_pairs(found, tile + layout.incoming, layout.token_stride, tokens_type, place, c);
                else if (incoming.data)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (g + i % 2 * 8 < rows)
                            found[i / 2][i % 2] =
                                pair_of_row(incoming, tokens_type, loader.first() + g + i % 2 * 8,
                                            c + i / 2 * 8 + 2 * t, end);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int e = i / 2, half = i % 2;
                    const float a = fmaf(-factor[half], x[e][half].x, sums[e][2 * half]);
                    const float b = fmaf(-factor[half], x[e][half].y, sums[e][2 * half + 1]);
                    found[e][half] = make_float2(fmaf(outer[half], a, found[e][half].x),
                                                 fmaf(outer[half], b, found[e][half].y));
                }
                if (c + kChannels > end)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int column = c + i / 2 * 8 + 2 * t;
                        if (column >= end) found[i / 2][i % 2].x = 0.0f;
                        if (column + 1 >= end) found[i / 2][i % 2].y = 0.0f;
                    }
                __syncwarp();
                store_pairs(found, tile, layout.token_stride, tokens_type, place, c);
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
