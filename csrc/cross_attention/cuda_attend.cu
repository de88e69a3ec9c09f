// z_h = sum_n softmax_n(query_h . x^_n) x^_n over an image's tokens, with an online softmax in base 2; copies
// the tokens on the way, where the fusion wants it. cuda_tokens.cuh has the picture. Each tile of 16 tokens
// is read once and gives both products, so that the kernel is bound by the memory. Where a batch is too small
// to fill the GPU, the tokens of an image are read in parts: by the blocks of a cluster, which merge (m, l,
// z) through each other's shared memory, or, before compute capability 9.0, through `parts`.
#include <algorithm>

#include "../common/cuda_launch.cuh"
#include "cuda_kernels.h"
#include "cuda_tokens.cuh"

namespace crossvit {
namespace {

// The online softmax of head g, in each of the four lanes that share it; sums are over this lane's tokens
// until they are reduced. `shift` is the part of z that all channels have in common, as tokens are not
// centred.
struct Softmax {
    float largest, total, kept_total, shift;

    // Of the CLS token, the first row of the first part.
    __device__ Softmax(bool leads, bool counts, float score, float kept)
        : largest(leads ? score : -INFINITY),
          total(leads && counts ? 1.0f : 0.0f),
          kept_total(total * kept),
          shift(0.0f) {}

    // Turns the scores of a tile into weights under the new maximum; returns what all before is multiplied
    // by.
    __device__ float advance(float (&scores)[4]) {
        float highest = largest;
#pragma unroll
        for (int i = 0; i < 4; ++i) highest = fmaxf(highest, scores[i]);
        highest = quad_max(highest);
        const float rescale = ptx::exp2(largest - highest);
        largest = highest;
        total *= rescale;
        kept_total *= rescale;
        shift *= rescale;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[i] = ptx::exp2(scores[i] - highest);
            total += scores[i];
        }
        return rescale;
    }

    __device__ void reduce() {
        total = quad_sum(total);
        kept_total = quad_sum(kept_total);
        shift = quad_sum(shift);
    }
};

// Lane 4 g + t has four tokens of head g in turn: the places of pairs in the right operand of a product.
__device__ constexpr int token_of(int i, int t) { return 2 * t + i % 2 + i / 2 * 8; }

// Scores pass from warp to warp as rows of heads, in which the four tokens of a lane are neighbours.
constexpr int kScoreStride = kTokens + 4;
static_assert(kHeads * kScoreStride <= kSliceScores);

// Leaves a slice's part of the scores.
__device__ void leave_scores(float* scores, const float (&sums)[4], const Place& place) {
    float* mine =
        scores + place.warp * kSliceScores + 2 * place.t * kScoreStride + place.g / 2 * 4 + place.g % 2;
    mine[0] = sums[0];
    mine[kScoreStride] = sums[1];
    mine[2] = sums[2];
    mine[kScoreStride + 2] = sums[3];
}

// Scores of this lane's tokens, summed over the slices.
__device__ void read_scores(const float* scores, const Place& place, float (&found)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) found[i] = 0.0f;
    place.each_warp([&](int w) {
        const float4 of_warp = *reinterpret_cast<const float4*>(scores + w * kSliceScores +
                                                                place.g * kScoreStride + 4 * place.t);
        found[0] += of_warp.x;
        found[1] += of_warp.y;
        found[2] += of_warp.z;
        found[3] += of_warp.w;
    });
}

// The weights of a tile's tokens, as the product with the tokens wants them, and rounds them. `memory` is for
// operands of 32 bits.
template <Product P>
__device__ TokenWeights<P> weights_of_lanes(float (&p)[4], char* memory, int stride, const Place& place) {
    TokenWeights<P> weights;
    if constexpr (sizeof(Operand<P>) == 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            weights.pairs[i] = pack<P>(p[2 * i], p[2 * i + 1]);
            const float2 seen = unpack<P>(weights.pairs[i]);
            p[2 * i] = seen.x, p[2 * i + 1] = seen.y;
        }
    } else {
        float* mine = reinterpret_cast<float*>(memory) + place.warp * kTokens * stride;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            p[i] = rounded<P>(p[i]);
            mine[token_of(i, place.t) * stride + place.g] = p[i];
        }
        weights.memory = mine;
        weights.stride = stride;
        __syncwarp();
    }
    return weights;
}

// Of the two heads whose columns this lane has in z, from the lanes that have the heads' softmax.
__device__ void of_columns(float of_head, int t, float (&found)[2]) {
    found[0] = __shfl_sync(kAll, of_head, 8 * t);
    found[1] = __shfl_sync(kAll, of_head, 8 * t + 4);
}

#if __CUDA_ARCH__ >= 900
// Merges what the blocks of a cluster found, each a share of the channels; all in one order. `numbers` is
// room for (m, l, t) of every block and head.
__device__ void merge_cluster(const Direction& d, int64_t image, int64_t head, int heads, float* shared,
                              float* numbers, const Place& place, int rank) {
    constexpr int kNumbers = 3 * kHeads;
    const int blocks = static_cast<int>(d.splits), channels = static_cast<int>(padded(place.width));
    const uint32_t here = ptx::shared_address(shared);
    ptx::cluster_barrier();
    for (int i = threadIdx.x; i < blocks * kNumbers; i += blockDim.x)
        numbers[i] = ptx::load_of_block(
            ptx::shared_of_block(here + 4 * (kHeads * channels + i % kNumbers), i / kNumbers));
    __syncthreads();
    const int share = (place.width + blocks - 1) / blocks, end = min((rank + 1) * share, place.width);
    for (int h = place.warp; h < heads; h += place.warps) {
        // A lane has a block.
        const float* of_block = numbers + place.lane * kNumbers + 3 * h;
        const bool there = place.lane < blocks;
        const float mine = there ? of_block[0] : -INFINITY, largest = warp_max(mine);
        const float weight = ptx::exp2(mine - largest);
        const float total = warp_sum(there ? weight * of_block[1] : 0.0f);
        const float kept_total = warp_sum(there ? weight * of_block[2] : 0.0f);
        const float inverse = __fdividef(1.0f, total);
        float weights[kMostParts];
#pragma unroll
        for (int i = 0; i < kMostParts; ++i) weights[i] = __shfl_sync(kAll, weight, i) * inverse;
        for (int c = rank * share + place.lane; c < end; c += kWarp) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kMostParts; ++i) {
                if (i >= blocks) break;
                const uint32_t from = ptx::shared_of_block(here + 4 * (h * channels + c), i);
                sum = fmaf(weights[i], ptx::load_of_block(from), sum);
            }
            Saved::z(d, image, head + h)[c] = sum;
        }
        if (rank == 0 && place.lane == 0) {
            Saved::log_sum(d, image)[head + h] = largest + log2f(total);
            Saved::kept_sum(d, image)[head + h] = d.seed ? kept_total * inverse : 1.0f;
        }
    }
    ptx::cluster_barrier();  // nobody leaves while others read its memory
}
#endif

// `AsIs`: bfloat16 tokens go to the products unchanged.
template <Product P, bool AsIs>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) attend_kernel(const __grid_constant__ Call call) {
    extern __shared__ __align__(128) char shared[];
    const Direction& d = call.item[blockIdx.y];
    const unsigned tiles = (static_cast<unsigned>(d.heads) + kHeads - 1) / kHeads;
    const unsigned splits = static_cast<unsigned>(d.splits), split = blockIdx.x % splits;
    const int64_t image = blockIdx.x / splits / tiles, head = blockIdx.x / splits % tiles * kHeads;
    if (image >= d.batch) return;  // the whole block, and the whole cluster
    const Place place(d.width);
    const int g = place.g, t = place.t, heads = static_cast<int>(min(d.heads - head, int64_t{kHeads}));
    const int stages = static_cast<int>(call.stages);
    const TokenRows tokens(d.patch_tokens, image, d.tokens, d.width);
    const TokenRows copy(d.patches_out, image, d.tokens, d.width), none(Tokens{}, 0, d.tokens, d.width);
    const SharedLayout layout(d.width, tokens.size, sizeof(Operand<P>), AsIs, kHeads, false, place.warps,
                              stages);
    const bool in_place = AsIs || SharedLayout::in_place(tokens.size, sizeof(Operand<P>));
    float* scores = reinterpret_cast<float*>(shared + layout.scores);
    float2* moments = reinterpret_cast<float2*>(shared + layout.statistics);
    // The first tile has the first of two buffers: what is read before it may be in the second.
    float* other_scores = scores + place.warps * kSliceScores;
    float2* other_moments = moments + place.warps * kTokens;
    const OperandRows<P> queries{shared + layout.queries, layout.operand_stride};
    const Part part(d.patches, split, splits);
    TileLoader loader(shared, layout, place, tokens, none, d.width, part.begin, part.end, stages);

    loader.prepare();
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_begin();
    __syncthreads();
    for (int i = 0; i < stages - 1; ++i) loader.start_next();

    float* normed_cls = scores + place.warp * kSliceScores;
    float* gammas = normed_cls + kProducts * kChannels;
    normalise_cls(d, image, call.eps, place, other_moments, normed_cls, gammas);
    float2* first_sums = reinterpret_cast<float2*>(other_scores);
    fill_queries<P, 1>(queries, normed_cls, gammas, place, first_sums,
                       [&](int h) { return h < heads ? Saved::key(d, image, head + h) : nullptr; });
    uint32_t held_queries[kProducts][2];  // of 16 bits: they stay in registers
    if constexpr (sizeof(Operand<P>) == 2)
        place.each_product([&](int k, int c) {
#pragma unroll
            for (int i = 0; i < 2; ++i) held_queries[k][i] = queries.pair(g, c + 8 * i + 2 * t);
        });
    __syncthreads();
    const float2 of_query = sums_of_row(first_sums, kHeads, g, place);
    const float query_sum = of_query.x, first_score = of_query.y;

    // The CLS token is the first row of the first part.
    const bool leads = split == 0;
    const int64_t positions = d.patches + 1;
    float* attention = d.attention && place.warp == 0 && g < heads
                           ? d.attention + (image * d.heads + head + g) * positions
                           : nullptr;
    float kept_cls = 1.0f;
    if (d.seed) kept_cls = kept(call, d, image, head + g, 0);
    if (attention && leads && t == 0) attention[0] = first_score;
    Softmax of(leads, t == 0, first_score, kept_cls);
    float z[kProducts][4], kept_columns[2];
    of_columns(leads ? kept_cls : 0.0f, t, kept_columns);
#pragma unroll
    for (int k = 0; k < kProducts; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = k * kChannels + g + i / 2 * 8;
            z[k][i] = k < place.products ? normed_cls[c] * kept_columns[i % 2] : 0.0f;
        }

    int buffer = 0;  // of two, so that warps that are ahead write elsewhere
#pragma unroll 1
    for (bool begun = false; loader.has_tile(); loader.advance(), buffer ^= 1, begun = true) {
        float* tile_scores = buffer ? other_scores : scores;
        float2* tile_moments = buffer ? other_moments : moments;
        if (stages == 1) {
            if (begun) __syncthreads();
            loader.start_next();
        }
        loader.wait();
        char* tile = loader.tile();
        const int rows = loader.rows();
        if (rows < kTokens) loader.clear_rows_behind();
        if (copy.data && head == 0) store_rows(copy, loader.first(), tile, layout.token_stride, rows, place);
        OperandRows<P> operands{in_place ? tile : shared + layout.operands,
                                in_place ? layout.token_stride : layout.operand_stride};

        float sums[1][4] = {};
        const auto query = [&](int k, uint32_t (&b)[1][2]) {
            b[0][0] = held_queries[k][0], b[0][1] = held_queries[k][1];
        };
        if constexpr (AsIs) {
            multiply_as_is<1>(sums, operands, place, tile_moments, query);
        } else {
            leave_moments(tile, layout.token_stride, d.tokens, place, tile_moments);
            __syncthreads();
            float2 of_rows[2];
            row_statistics(tile_moments, rows, call.eps, place, of_rows);
            normalise_tile<P>(tile, layout.token_stride, d.tokens, operands, of_rows, place);
            place.each_product([&](int, int c) { add_products<P, 1>(sums, operands, queries, place, c); });
        }
        leave_scores(tile_scores, sums[0], place);
#if __CUDA_ARCH__ >= 900
        if (!AsIs && in_place) ptx::fence_copy_engine();
#endif
        __syncthreads();
        if (stages > 1) loader.start_next();
        // Of token lane % 16. A score is `scale` (sum over the slices - `shift` query_sum).
        float2 statistics = {};
        if constexpr (AsIs)
            statistics = token_statistics(tile_moments, rows, place.lane % kTokens, call.eps, place);

        float p[4], shift[4], scale[4];
        read_scores(tile_scores, place, p);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = token_of(i, t);
            shift[i] = AsIs ? __shfl_sync(kAll, statistics.x, n) : 0.0f;
            scale[i] = AsIs ? __shfl_sync(kAll, statistics.y, n) : 1.0f;
            p[i] = scale[i] * (p[i] - shift[i] * query_sum);
            if (attention && n < rows) attention[1 + loader.first() + n] = p[i];
            if (n >= rows) p[i] = -INFINITY;
        }
        const float rescale = of.advance(p);
        if (d.seed)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                p[i] *= kept(call, d, image, head + g, 1 + loader.first() + token_of(i, t));
                of.kept_total += p[i];
            }
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] *= scale[i];
        const TokenWeights<P> weights =
            weights_of_lanes<P>(p, shared + layout.weights, layout.score_stride, place);
        if constexpr (AsIs)
#pragma unroll
            for (int i = 0; i < 4; ++i) of.shift = fmaf(p[i], shift[i], of.shift);
        if (__any_sync(kAll, rescale != 1.0f)) {
            float rescales[2];
            of_columns(rescale, t, rescales);
            place.each_product([&](int k, int) {
#pragma unroll
                for (int i = 0; i < 4; ++i) z[k][i] *= rescales[i % 2];
            });
        }
        add_weighted_tokens<P>(z, operands, weights, place);
    }

    of.reduce();
    float shifts[2], scales[2] = {1.0f, 1.0f};
    of_columns(of.shift, t, shifts);
#if __CUDA_ARCH__ >= 900
    if (call.merges) {
        __syncthreads();  // nobody reads the tiles any more
        float* found = reinterpret_cast<float*>(shared);
        const int channels = static_cast<int>(padded(d.width));
        store_z(z, found, channels, scales, shifts, kHeads, place);
        if (place.warp == 0 && t == 0) {
            float* numbers = found + kHeads * channels + g * 3;
            numbers[0] = of.largest;
            numbers[1] = of.total;
            numbers[2] = of.kept_total;
        }
        merge_cluster(d, image, head, heads, found, scores, place, static_cast<int>(split));
        return;
    }
#endif
    // A part without tokens has no sum.
    const float inverse = of.total > 0.0f ? __fdividef(1.0f, of.total) : 0.0f;
    of_columns(inverse, t, scales);
    const bool alone = d.parts == nullptr;
    float* to = alone ? Saved::z(d, image, head) : Parts::row(d, image, split, head);
    store_z(z, to, alone ? padded(d.width) : Parts::columns(d), scales, shifts, heads, place);
    if (place.warp == 0 && t == 0 && g < heads) {
        const float log_sum = of.largest + log2f(of.total);
        const float kept_sum = d.seed ? of.kept_total * inverse : 1.0f;
        if (alone) {
            Saved::log_sum(d, image)[head + g] = log_sum;
            Saved::kept_sum(d, image)[head + g] = kept_sum;
        } else {
            float* numbers = Parts::numbers(d, image, split, head + g);
            numbers[0] = log_sum;
            numbers[1] = kept_sum;
        }
    }
}

}  // namespace

int64_t attend_shared(const Direction& d, Product product, int64_t width, int64_t stages) {
    return shared_layout(d, product, kHeads, false, width, stages).bytes;
}

cudaError_t attend(const Call& call, const Target& target) {
    int64_t blocks = 0, width = 0, shared = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        const Direction& d = call.item[i];
        blocks = std::max(blocks, d.batch * ((d.heads + kHeads - 1) / kHeads) * d.splits);
        width = std::max(width, d.width);
    }
    for (int64_t i = 0; i < call.count; ++i)
        shared = std::max(shared, attend_shared(call.item[i], target.product, width, call.stages));
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(call.count));
    shape.threads = warps_for(width) * kWarp;
    shape.shared = shared;
    shape.most_shared = target.gpu.shared_of_block;
    shape.cluster = call.merges ? static_cast<unsigned>(call.item[0].splits) : 1;
    shape.overlaps = target.overlaps();
    const bool as_is = multiplied_as_is(call.item[0], target.product);
    void (*kernel)(Call) = nullptr;
    switch (target.product) {
        case Product::bfloat16:
            kernel = as_is ? attend_kernel<Product::bfloat16, true> : attend_kernel<Product::bfloat16, false>;
            break;
        case Product::float16:
            kernel = attend_kernel<Product::float16, false>;
            break;
        case Product::float32:
            kernel = attend_kernel<Product::float32, false>;
            break;
        case Product::tf32:
            kernel = attend_kernel<Product::tf32, false>;
            break;
    }
    return launch(kernel, shape, target.stream, call);
}

}  // namespace crossvit
