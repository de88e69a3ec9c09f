// What the kernels over the tokens, attend and attend_backward, have in common. A block is one image, or one
// part of its tokens, and eight heads. Each warp has a slice of the channels; everything about it stays with
// the warp, so that only scores and statistics of the tokens pass from warp to warp, at one barrier a tile:
//
//                 warp 0    warp 1    warp 2    warp 3
//     16 tokens [ x       | x       | x       | x       ]  tile in shared memory, loaded some tiles ahead
//                   @         @         @         @
//       heads   [ query   | query   | query   | query   ]  in shared memory
//                   =         =         =         =
//                 part   +  part   +  part   +  part       scores [16, heads], summed by every warp
//
// bfloat16 tokens are multiplied as they are, and their mean is taken off the results, as sums over exactly
// the numbers that the tensor cores saw. Others are normalised first, because x - mean would be lost to
// rounding (float32) or coefficients to underflow (float16); this takes one more barrier a tile.
#pragma once

#include "../common/cuda_products.cuh"
#include "../common/philox.h"
#include "cuda_buffers.cuh"

namespace crossvit {

constexpr int kTokens = 16;  // of a tile: the rows of a product of the tensor cores
constexpr int kHeads = 8;    // of a block: its columns
constexpr int kChannels = kInner;
constexpr int kProducts = 8;   // of a warp's slice at most: sums of 128 channels and 8 heads are 32 registers
constexpr int kMostWarps = 8;  // so that 1024 channels fit
constexpr int kStages = 3;     // two tiles on their way cover the memory's latency

// Warps of a block: four, so that two blocks keep a multiprocessor's schedulers busy, if their slices
// suffice.
constexpr int warps_for(int64_t width) { return width <= 4 * kProducts * kChannels ? 4 : kMostWarps; }

// Where things are in a block's shared memory, in bytes. Rows are 16 bytes longer than their channels, so
// that the eight rows of a matrix lie in different banks.
struct SharedLayout {
    int token_stride, operand_stride;  // of a row of tokens, and of operands or queries
    int stage, incoming;               // of a stage: its size, and where the incoming gradients begin
    int operands, queries, normed_cls, scores, statistics, weights, barriers;
    int score_stride, bytes;  // score_stride counts floats

    // Operands of the tokens' size are written over them.
    static __host__ __device__ constexpr bool in_place(int token_size, int operand_size) {
        return token_size == operand_size;
    }

    // `rows`: of queries, and columns of scores, 8 forward and 16 backward.
    __host__ __device__ SharedLayout(int64_t width, int token_size, int operand_size, bool as_is, int rows,
                                     bool has_incoming, int warps, int stages) {
        const int channels = static_cast<int>(padded(width));
        token_stride = channels * token_size + 16;
        operand_stride = channels * operand_size + 16;
        score_stride = rows + rows / 2;  // the rows that lanes read together lie in different banks
        incoming = kTokens * token_stride;
        stage = has_incoming ? 2 * incoming : incoming;
        operands = stages * stage;
        const bool apart = !as_is && !in_place(token_size, operand_size);
        queries = operands + (apart ? kTokens * operand_stride : 0);
        normed_cls = queries + rows * operand_stride;
        scores = normed_cls + channels * 4;
        statistics = scores + 2 * warps * kTokens * score_stride * 4;
        weights = statistics + 2 * warps * kTokens * 2 * 4;
        // Only products in float32 pass their weights through memory.
        barriers = weights + (operand_size == 4 ? warps * kTokens * score_stride * 4 : 0);
        bytes = barriers + kStages * 8;
    }
};

inline bool multiplied_as_is(const Direction& d, Product product) {
    return product == Product::bfloat16 && d.tokens == Dtype::bfloat16;
}

// For a launch whose widest direction is `width`.
inline SharedLayout shared_layout(const Direction& d, Product product, int rows, bool has_incoming,
                                  int64_t width, int64_t stages) {
    const int operand_size = product == Product::bfloat16 || product == Product::float16 ? 2 : 4;
    return SharedLayout(d.width, static_cast<int>(size_of(d.tokens)), operand_size,
                        multiplied_as_is(d, product), rows, has_incoming, warps_for(width),
                        static_cast<int>(stages));
}

// Rows of the patches of one image. `wide`: 16 bytes at a time.
struct TokenRows {
    char* data;
    int64_t row_stride, channel_stride;  // elements
    int size;                            // bytes of an element
    Dtype dtype;
    bool wide;

    __device__ TokenRows(const Tokens& x, int64_t image, Dtype type, int64_t width)
        : row_stride(x.row_stride),
          channel_stride(x.channel_stride),
          size(type == Dtype::float32 ? 4 : 2),
          dtype(type) {
        data = x.data ? static_cast<char*>(x.data) + image * x.batch_stride * size : nullptr;
        const int64_t bytes = reinterpret_cast<int64_t>(data) | row_stride * size | width * size;
        wide = data && channel_stride == 1 && bytes % 16 == 0;
    }

    __device__ char* row(int64_t n) const { return data + n * row_stride * size; }
    __device__ char* at(int64_t n, int64_t c) const { return row(n) + c * channel_stride * size; }
    // Channels c and c + 1 of a token, of those before `end`.
    __device__ float2 pair(int64_t n, int c, int end) const {
        return make_float2(c < end ? load_element(at(n, c), dtype, 0) : 0.0f,
                           c + 1 < end ? load_element(at(n, c + 1), dtype, 0) : 0.0f);
    }
};

// A warp's place: its lanes and its slice of the channels.
struct Place : Lane {
    int warps, warp, width,
        longest;  // channels of all slices, and of the longest of them
    int first, channels,
        products;  // of the slice; the last product may be filled up

    __device__ explicit Place(int64_t channels_of_all) {
        warps = blockDim.x / kWarp;
        warp = threadIdx.x / kWarp;
        width = static_cast<int>(channels_of_all);
        const int all = (width + kChannels - 1) / kChannels;
        longest = (all + warps - 1) / warps * kChannels;
        first = warp * longest;
        channels = channels_of(warp);
        products = (channels + kChannels - 1) / kChannels;
    }

    __device__ int channels_of(int w) const { return max(0, min(width - w * longest, longest)); }

    // f(row, byte) for every 16 bytes of `rows` rows of the slice, a lane each.
    template <typename F>
    __device__ void chunks(int rows, int size, F f) const {
        for (int row = lane / 16; row < rows; row += 2)
            for (int at = lane % 16 * 16; at < channels * size; at += 256) f(row, first * size + at);
    }

    // f(row, channel) for every element.
    template <typename F>
    __device__ void elements(int rows, F f) const {
        for (int row = 0; row < rows; ++row)
            for (int c = first + lane; c < first + channels; c += kWarp) f(row, c);
    }
};

// One element between memory and a tile, as it is.
__device__ inline void move_element(char* to, const char* from, int size) {
    if (size == 4)
        *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
    else
        *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
}

// A stage of shared memory in turn with the others, and how often all have been gone through, of which an
// mbarrier knows whether it is even.
struct Turn {
    int stage = 0, round = 0;

    __device__ void next(int stages) {
        if (++stage == stages) {
            stage = 0;
            round ^= 1;
        }
    }
};

// Tiles of tokens, and in backward of the gradients that come in for them, on their way into shared memory.
// Compute capability 9.0 copies whole rows, each warp some of them; before, each warp copies its slice.
class TileLoader {
  public:
    __device__ TileLoader(char* shared, const SharedLayout& layout, const Place& place,
                          const TokenRows& tokens, const TokenRows& incoming, int64_t width, int64_t begin,
                          int64_t end, int stages)
        : shared_(shared),
          layout_(layout),
          place_(place),
          tokens_(tokens),
          incoming_(incoming),
          row_bytes_(static_cast<int>(width) * tokens.size),
          next_(begin),
          first_(begin),
          end_(end),
          stages_(stages) {}

    // Zeros where nothing will be copied to: channels behind the last, rows behind the end. Then a barrier.
    __device__ void prepare() {
        uint4* all = reinterpret_cast<uint4*>(shared_);
        for (int i = threadIdx.x; i < stages_ * layout_.stage / 16; i += blockDim.x) all[i] = uint4{};
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0) {
            for (int i = 0; i < stages_; ++i) ptx::mbarrier_init(barrier(i), 1);
            ptx::mbarrier_fence();
        }
        ptx::fence_copy_engine();
#endif
    }

    // The tile in turn: whether there is one, its first token, how many there are, where it is.
    __device__ bool has_tile() const { return first_ < end_; }
    __device__ int64_t first() const { return first_; }
    __device__ int rows() const { return rows_from(first_); }
    __device__ char* tile() const { return shared_ + turn_.stage * layout_.stage; }

    // Starts loading the next tile, if there is one, after a barrier that follows the last use of its stage.
    __device__ void start_next() {
        const int there = rows_from(next_);
        if (there > 0) {
            char* to = shared_ + next_turn_.stage * layout_.stage;
#if __CUDA_ARCH__ >= 900
            const int tensors = tokens_.wide + incoming_.wide;
            if (threadIdx.x == 0 && tensors)
                ptx::mbarrier_expect(barrier(next_turn_.stage), there * row_bytes_ * tensors);
#endif
            start_rows(tokens_, to, there);
            if (incoming_.data) start_rows(incoming_, to + layout_.incoming, there);
        }
#if __CUDA_ARCH__ < 900
        ptx::commit_copies();  // an empty group too, so that waiting can count groups
#endif
        next_ += kTokens;
        next_turn_.next(stages_);
    }

    __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
        if (tokens_.wide || incoming_.wide) ptx::mbarrier_wait(barrier(turn_.stage), turn_.round);
#else
        // All but the tiles behind this one, of which stages_ - 2 are on their way.
        if (stages_ == kStages)
            ptx::wait_for_copies<kStages - 2>();
        else
            ptx::wait_for_copies<0>();
#endif
        __syncwarp();
    }

    // To the next tile, when this warp has done with this one.
    __device__ void advance() {
        first_ += kTokens;
        turn_.next(stages_);
        __syncwarp();
    }

  private:
    __device__ uint32_t barrier(int stage) const {
        return ptx::shared_address(shared_ + layout_.barriers + stage * 8);
    }

    __device__ int rows_from(int64_t n) const {
        return static_cast<int>(max(min(end_ - n, int64_t{kTokens}), int64_t{0}));
    }

    __device__ void start_rows(const TokenRows& x, char* to, int there) {
        const int64_t n = next_;
        if (!x.wide) {
            place_.elements(there, [&](int row, int c) {
                move_element(to + row * layout_.token_stride + c * x.size, x.at(n + row, c), x.size);
            });
            return;
        }
#if __CUDA_ARCH__ >= 900
        if (place_.lane == 0)
            for (int row = place_.warp; row < there; row += place_.warps)
                ptx::bulk_copy(ptx::shared_address(to + row * layout_.token_stride), x.row(n + row),
                               row_bytes_, barrier(next_turn_.stage));
        __syncwarp();
#else
        place_.chunks(kTokens, x.size, [&](int row, int byte) {
            const bool valid = row < there;
            ptx::copy_16(ptx::shared_address(to + row * layout_.token_stride + byte),
                         x.row(n + (valid ? row : 0)) + byte, valid);
        });
#endif
    }

    char* shared_;
    const SharedLayout& layout_;
    const Place& place_;
    const TokenRows& tokens_;
    const TokenRows& incoming_;
    int row_bytes_;
    int64_t next_, first_, end_;
    int stages_;
    Turn turn_, next_turn_;
};

// Rows of a tile to memory.
__device__ inline void store_rows(const TokenRows& to, int64_t n, const char* tile, int stride, int rows,
                                  const Place& place) {
    if (to.wide)
        place.chunks(rows, to.size,
                     [&, first = to.row(n), step = to.row_stride * to.size](int row, int byte) {
                         *reinterpret_cast<uint4*>(first + row * step + byte) =
                             *reinterpret_cast<const uint4*>(tile + row * stride + byte);
                     });
    else
        place.elements(rows, [&](int row, int c) {
            move_element(to.at(n + row, c), tile + row * stride + c * to.size, to.size);
        });
}

// A pair of neighbours in a tile.
template <typename T>
__device__ float2 load_pair(const char* at) {
    if constexpr (sizeof(T) == 4)
        return *reinterpret_cast<const float2*>(at);
    else if constexpr (__is_same(T, __half))
        return __half22float2(*reinterpret_cast<const __half2*>(at));
    else
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at));
}

template <typename T>
__device__ void store_pair(char* at, float x, float y) {
    if constexpr (sizeof(T) == 4)
        *reinterpret_cast<float2*>(at) = make_float2(x, y);
    else
        *reinterpret_cast<uint32_t*>(at) =
            __is_same(T, __half) ? ptx::pack_float16(x, y) : ptx::pack_bfloat16(x, y);
}

__device__ inline float2 load_pair(const char* at, Dtype dtype) {
    if (dtype == Dtype::float32) return load_pair<float>(at);
    return dtype == Dtype::bfloat16 ? load_pair<__nv_bfloat16>(at) : load_pair<__half>(at);
}

__device__ inline void store_pair(char* at, Dtype dtype, float x, float y) {
    if (dtype == Dtype::float32)
        store_pair<float>(at, x, y);
    else if (dtype == Dtype::bfloat16)
        store_pair<__nv_bfloat16>(at, x, y);
    else
        store_pair<__half>(at, x, y);
}

template <Product P>
constexpr Dtype kOperandDtype = P == Product::bfloat16  ? Dtype::bfloat16
                                : P == Product::float16 ? Dtype::float16
                                                        : Dtype::float32;

// Calls f(half, channel) for the pairs of neighbours of rows g and g + 8 (half 0 and 1) that belong to this
// lane; its four lanes together have the whole slice.
template <typename F>
__device__ void for_pairs(const Place& place, F f) {
#pragma unroll 4
    for (int c = place.first + 2 * place.t; c < place.first + place.products * kChannels; c += 8) {
        f(0, c);
        f(1, c);
    }
}

// 16 bytes of a row.
template <typename T>
__device__ void load_wide(const char* at, float (&x)[16 / sizeof(T)]) {
    const uint4 all = *reinterpret_cast<const uint4*>(at);
    const uint32_t words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            x[i] = __uint_as_float(words[i]);
        } else {
            const float2 pair = load_pair<T>(reinterpret_cast<const char*>(&words[i]));
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
}

// Leaves the moments of the warp's slice for all warps. A row belongs to two lanes, which take 16 bytes in
// turn; channels behind the last are zero and do not count.
template <typename T>
__device__ void leave_moments(const char* tile, int stride, const Place& place, float2* moments) {
    constexpr int kEach = 16 / sizeof(T);
    const int row = place.lane % kTokens, begin = place.lane / kTokens * kEach;
    const char* data = tile + row * stride + place.first * static_cast<int>(sizeof(T));
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 2
    for (int c = begin; c < place.channels; c += 2 * kEach) {
        float x[kEach];
        load_wide<T>(data + c * static_cast<int>(sizeof(T)), x);
#pragma unroll
        for (int i = 0; i < kEach; i += 2) sum += x[i] + x[i + 1];
    }
    const float mean =
        (sum + __shfl_xor_sync(kAll, sum, kTokens)) / static_cast<float>(max(place.channels, 1));
#pragma unroll 2
    for (int c = begin; c < place.channels; c += 2 * kEach) {
        float x[kEach];
        load_wide<T>(data + c * static_cast<int>(sizeof(T)), x);
        const bool whole = c + kEach <= place.channels;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const float centred = whole || c + i < place.channels ? x[i] - mean : 0.0f;
            squares = fmaf(centred, centred, squares);
        }
    }
    squares += __shfl_xor_sync(kAll, squares, kTokens);
    if (place.lane < kTokens) moments[place.warp * kTokens + row] = make_float2(mean, squares);
}

__device__ inline void leave_moments(const char* tile, int stride, Dtype dtype, const Place& place,
                                     float2* moments) {
    if (dtype == Dtype::float32)
        leave_moments<float>(tile, stride, place, moments);
    else if (dtype == Dtype::bfloat16)
        leave_moments<__nv_bfloat16>(tile, stride, place, moments);
    else
        leave_moments<__half>(tile, stride, place, moments);
}

// Mean and 1 / sqrt(variance + eps) of a token; the latter is 0 behind the last row. From the moments of all
// slices, a mean and a sum of squared deviations each (Chan, Golub and LeVeque, 1983: no digits are lost
// where the mean is large).
__device__ inline float2 token_statistics(const float2* moments, int rows, int token, float eps,
                                          const Place& place) {
    const float width = static_cast<float>(place.width);
    float mean = 0.0f, squares = 0.0f;
    for (int w = 0; w < place.warps; ++w)
        mean = fmaf(static_cast<float>(place.channels_of(w)), moments[w * kTokens + token].x, mean);
    mean /= width;
    for (int w = 0; w < place.warps; ++w) {
        const float2 of_slice = moments[w * kTokens + token];
        const float distance = of_slice.x - mean;
        squares += fmaf(static_cast<float>(place.channels_of(w)) * distance, distance, of_slice.y);
    }
    const float rstd = rsqrtf(squares / width + eps);
    return make_float2(mean, token < rows ? rstd : 0.0f);
}

// The same of rows g and g + 8.
__device__ inline void row_statistics(const float2* moments, int rows, float eps, const Place& place,
                                      float2 (&found)[2]) {
    const float2 statistics = token_statistics(moments, rows, place.lane % kTokens, eps, place);
#pragma unroll
    for (int half = 0; half < 2; ++half)
        found[half] = make_float2(__shfl_sync(kAll, statistics.x, place.g + 8 * half),
                                  __shfl_sync(kAll, statistics.y, place.g + 8 * half));
}

// ---- products, a warp's slice each; `c` is a channel where 16 begin ----

// Weights [16 tokens, 8 heads] that multiply the tokens of a tile.
template <Product P>
struct TokenWeights {
    uint32_t pairs[2];    // 16 bits: tokens 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of head g
    const float* memory;  // 32 bits: a row a token
    int stride;
};

// sums [16 channels, 8 heads] += tokens^T weights
template <Product P>
__device__ void add_weighted_tokens(float (&sums)[4], const OperandRows<P>& tokens,
                                    const TokenWeights<P>& weights, const Place& place, int c) {
    const int g = place.g, t = place.t;
    if constexpr (sizeof(Operand<P>) == 2) {
        uint32_t a[4];
        ptx::load_matrices_transposed(a, tokens.matrices_across(place, c));
        multiply<P>(sums, a, weights.pairs);
    } else if constexpr (P == Product::tf32) {
#pragma unroll
        for (int n = 0; n < kTokens; n += 8) {
            const float *near = tokens.row(n + t) + c + g, *far = tokens.row(n + t + 4) + c + g;
            const uint32_t a[4] = {ptx::round_to_tf32(near[0]), ptx::round_to_tf32(near[8]),
                                   ptx::round_to_tf32(far[0]), ptx::round_to_tf32(far[8])};
            const uint32_t b[2] = {__float_as_uint(weights.memory[(n + t) * weights.stride + g]),
                                   __float_as_uint(weights.memory[(n + t + 4) * weights.stride + g])};
            multiply<P>(sums, a, b);
        }
    } else {
#pragma unroll
        for (int n = 0; n < kTokens; ++n) {
            const float2 w = *reinterpret_cast<const float2*>(weights.memory + n * weights.stride + 2 * t);
            const float x = tokens.row(n)[c + g], y = tokens.row(n)[c + g + 8];
            sums[0] = fmaf(x, w.x, sums[0]);
            sums[1] = fmaf(x, w.y, sums[1]);
            sums[2] = fmaf(y, w.x, sums[2]);
            sums[3] = fmaf(y, w.y, sums[3]);
        }
    }
}

// ---- the CLS token and the queries ----

// x^ of the projected CLS token into shared memory, the slice by its warp; returns 1 / sqrt(variance + eps).
__device__ inline float normalise_cls(const Direction& d, int64_t image, float eps, const Place& place,
                                      float* normed) {
    const float* row = Saved::column(d, image, Saved::Cls);
    const int width = place.width;
    float sum = 0.0f, squares = 0.0f;
    for (int c = place.lane; c < width; c += kWarp) sum += row[c];
    const float mean = warp_sum(sum) / static_cast<float>(width);
    for (int c = place.lane; c < width; c += kWarp) squares = fmaf(row[c] - mean, row[c] - mean, squares);
    const float rstd = rsqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
    const int end = place.first + place.products * kChannels;
    for (int c = place.first + place.lane; c < end; c += kWarp)
        normed[c] = c < width ? (row[c] - mean) * rstd : 0.0f;
    return rstd;
}

// The queries, gamma times the rows `from(row)` (null: zeros) in the dtype of the products, and in `sums` the
// slice's sum of each row and of its product with x^_0, as every warp leaves them for all.
template <Product P, int Count, typename From>
__device__ void fill_queries(const OperandRows<P>& queries, const Direction& d, const float* normed,
                             const Place& place, float2* sums, From from) {
    const Vector& gamma = d.parameters.norm_weight;
    float of_rows[Count] = {}, products[Count] = {};
    for (int c = place.first + place.lane; c < place.first + place.products * kChannels; c += kWarp) {
        const bool there = c < place.width;
        const float factor = there ? load_element(gamma.data, gamma.dtype, c * gamma.stride) : 0.0f;
        const float of_cls = normed[c];
        float values[Count];
#pragma unroll
        for (int row = 0; row < Count; ++row) {
            const float* data = from(row);
            values[row] = data && there ? data[c] : 0.0f;
        }
#pragma unroll
        for (int row = 0; row < Count; ++row) {
            const float value = rounded<P>(values[row] * factor);
            queries.row(row)[c] = from_float<Operand<P>>(value);
            of_rows[row] += value;
            products[row] = fmaf(value, of_cls, products[row]);
        }
    }
#pragma unroll
    for (int row = 0; row < Count; ++row) {
        const float2 found = make_float2(warp_sum(of_rows[row]), warp_sum(products[row]));
        if (place.lane == 0) sums[place.warp * Count + row] = found;
    }
}

// Writes x^ over the tile or beside it, in the dtype of the products; zero where there is no token.
template <Product P, typename T>
__device__ void normalise_tile(const char* tile, int stride, const OperandRows<P>& to,
                               const float2 (&statistics)[2], const Place& place) {
    const int end = place.first + place.channels;
    for_pairs(place, [&](int half, int c) {
        const int row = place.g + 8 * half;
        const float mean = statistics[half].x, rstd = statistics[half].y;
        const float2 x = load_pair<T>(tile + row * stride + c * static_cast<int>(sizeof(T)));
        store_pair<Operand<P>>(reinterpret_cast<char*>(to.row(row) + c), c < end ? (x.x - mean) * rstd : 0.0f,
                               c + 1 < end ? (x.y - mean) * rstd : 0.0f);
    });
}

template <Product P>
__device__ void normalise_tile(const char* tile, int stride, Dtype dtype, const OperandRows<P>& to,
                               const float2 (&statistics)[2], const Place& place) {
    if (dtype == Dtype::float32)
        normalise_tile<P, float>(tile, stride, to, statistics, place);
    else if (dtype == Dtype::bfloat16)
        normalise_tile<P, __nv_bfloat16>(tile, stride, to, statistics, place);
    else
        normalise_tile<P, __half>(tile, stride, to, statistics, place);
    __syncwarp();
}

// z [channels, heads] of the slice in `to`, one row a head; `scale` and `shift` are of heads 2 t and 2 t + 1.
__device__ inline void store_z(const float (&z)[kProducts][4], float* to, int64_t stride,
                               const float (&scale)[2], const float (&shift)[2], int heads,
                               const Place& place) {
    const int end = place.first + place.channels;
#pragma unroll
    for (int k = 0; k < kProducts; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = place.first + k * kChannels + place.g + i / 2 * 8, h = 2 * place.t + i % 2;
            if (c < end && h < heads) to[h * stride + c] = (z[k][i] - shift[i % 2]) * scale[i % 2];
        }
}

// What multiplies the attention of token n, 0 where it is dropped: crossvit_kernels/dropout.py.
__device__ inline float kept(const Call& call, const Direction& d, int64_t image, int64_t head, int64_t n) {
    const uint64_t seed = static_cast<uint64_t>(*d.seed);
    const uint64_t index = (image * d.heads + head) * (d.patches + 1) + n;
    const Words counter = {{static_cast<uint32_t>(index >> 2), static_cast<uint32_t>(index >> 34),
                            static_cast<uint32_t>(d.stream), 0}};
    const Words words = philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const int which = index & 3;  // no indexing: registers have no addresses
    const uint32_t word = which < 2 ? (which == 0 ? words.word[0] : words.word[1])
                                    : (which == 2 ? words.word[2] : words.word[3]);
    return word < call.drop_below ? 0.0f : call.kept_factor;
}

// The patches of a part: whole tiles, so that a part may have none.
struct Part {
    int64_t begin, end;
    __device__ Part(int64_t patches, int64_t split, int64_t splits) {
        const int64_t tiles = ((patches + splits - 1) / splits + kTokens - 1) / kTokens;
        begin = min(split * tiles * kTokens, patches);
        end = min((split + 1) * tiles * kTokens, patches);
    }
};

}  // namespace crossvit
