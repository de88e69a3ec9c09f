// What the kernels over the tokens, attend and attend_backward, have in common. A block is one image, or one
// part of its tokens, and eight heads. Each warp has a slice of the channels; everything about it stays with
// the warp, so that only scores and statistics of the tokens pass from warp to warp, at one barrier a tile:
//
//                 warp 0    warp 1    warp 2    warp 3
//     16 tokens [ x       | x       | x       | x       ]  tile in shared memory, loaded some tiles ahead
//                   @         @         @         @
//       heads   [ query   | query   | query   | query   ]  in registers forward, else in shared memory
//                   =         =         =         =
//                 part   +  part   +  part   +  part       scores [16, heads], summed by every warp
//
// bfloat16 tokens are multiplied as they are, and their mean is taken off the results, as sums over exactly
// the numbers that the tensor cores saw; their statistics are products of the same registers. Others are
// normalised first, because x - mean would be lost to rounding (float32) or coefficients to underflow
// (float16); this takes one more barrier a tile.
#pragma once

#include "../common/cuda_products.cuh"
#include "../common/philox.h"
#include "cuda_buffers.cuh"

namespace crossvit {

constexpr int kTokens = 16;  // of a tile: the rows of a product of the tensor cores
constexpr int kHeads = 8;    // of a block: its columns
constexpr int kChannels = kInner;
constexpr int kProducts = 8;  // of a warp's slice at most: sums of 128 channels and 8 heads are 32 registers
// Floats that a slice leaves of a tile: scores, and before the first tile two numbers a channel.
constexpr int kSliceScores = 2 * kProducts * kChannels;
constexpr int kFewWarps = 4;       // so that two blocks keep a multiprocessor's schedulers busy
constexpr int kMostWarps = 8;      // so that 1024 channels fit
constexpr int kStages = 3;         // two tiles on their way cover the memory's latency
constexpr int64_t kMostParts = 8;  // of an image: blocks of a cluster that every GPU with clusters can run

// Warps of a block: few, if their slices suffice.
constexpr int warps_for(int64_t width) {
    return width <= kFewWarps * kProducts * kChannels ? kFewWarps : kMostWarps;
}

// Where things are in a block's shared memory, in bytes. Rows are 16 bytes longer than their channels, so
// that the eight rows of a matrix lie in different banks.
struct SharedLayout {
    int token_stride, operand_stride;  // of a row of tokens, and of operands or queries
    int stage, incoming;               // of a stage: its size, and where the incoming gradients begin
    int operands, queries, scores, statistics, weights, barriers;
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
        scores = queries + rows * operand_stride;
        statistics = scores + 2 * warps * kSliceScores * 4;
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
    int64_t row_bytes, channel_bytes;  // from one to the next
    int size;                          // bytes of an element
    bool wide;

    __device__ TokenRows(const Tokens& x, int64_t image, Dtype dtype, int64_t width)
        : size(dtype == Dtype::float32 ? 4 : 2) {
        row_bytes = x.row_stride * size;
        channel_bytes = x.channel_stride * size;
        data = x.data ? static_cast<char*>(x.data) + image * x.batch_stride * size : nullptr;
        const int64_t bytes = reinterpret_cast<int64_t>(data) | row_bytes | width * size;
        wide = data && x.channel_stride == 1 && bytes % 16 == 0;
    }

    __device__ char* row(int64_t n) const { return data + n * row_bytes; }
    __device__ char* at(int64_t n, int64_t c) const { return row(n) + c * channel_bytes; }
};

// x / n by 1 / n, rounded as a division: equal numbers have no variance.
__device__ inline float divide(float x, float n, float inverse) {
    const float quotient = x * inverse;
    return fmaf(fmaf(-quotient, n, x), inverse, quotient);
}

// A warp's place: its lanes and its slice of the channels.
struct Place : Lane {
    int warps, warp, width,
        longest;  // channels of all slices, and of the longest of them
    int first, channels,
        products;  // of the slice; the last product may be filled up
    float inverse_width, inverse_channels;

    __device__ explicit Place(int64_t channels_of_all) {
        const bool few = blockDim.x == kFewWarps * kWarp;
        warps = few ? kFewWarps : kMostWarps;
        warp = __shfl_sync(kAll, threadIdx.x / kWarp, 0);  // so that the compiler sees that lanes agree
        width = static_cast<int>(channels_of_all);
        const unsigned all = (width + kChannels - 1u) / kChannels;
        longest = (few ? (all + kFewWarps - 1) / kFewWarps : (all + kMostWarps - 1) / kMostWarps) * kChannels;
        first = warp * longest;
        channels = channels_of(warp);
        products = (channels + kChannels - 1u) / kChannels;
        inverse_width = __fdividef(1.0f, static_cast<float>(width));
        inverse_channels = __fdividef(1.0f, static_cast<float>(max(channels, 1)));
    }

    __device__ int channels_of(int w) const { return max(0, min(width - w * longest, longest)); }
    __device__ float mean_of_slice(float sum) const {
        return divide(sum, static_cast<float>(channels), inverse_channels);
    }

    // f(w) for every warp of the block.
    template <typename F>
    __device__ void each_warp(F f) const {
#pragma unroll
        for (int w = 0; w < kFewWarps; ++w) f(w);
#pragma unroll 1
        for (int w = kFewWarps; w < warps; ++w) f(w);
    }

    // f(k, c) for the products of the slice, whose channels begin at c.
    template <typename F>
    __device__ void each_product(F f) const {
#pragma unroll
        for (int k = 0; k < kProducts; ++k) {
            if (k >= products) break;
            f(k, first + k * kChannels);
        }
    }

    // Every 16 bytes of a slice's rows, a lane each: begin(row, byte) makes a function that is called for
    // this row and for every second one after it, with whether there are so many.
    template <typename F>
    __device__ void chunks(int rows, int size, F begin) const {
        for (int at = lane % 16 * 16; at < channels * size; at += 256) {
            auto step = begin(lane / 16, first * size + at);
#pragma unroll 4
            for (int row = 0; row < kTokens; row += 2) step(lane / 16 + row < rows);
        }
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

    // Zeros where nothing will be copied to, in channels behind the last. Then a barrier.
    __device__ void prepare() {
        if (place_.width % kChannels) {
            uint4* all = reinterpret_cast<uint4*>(shared_);
            for (int i = threadIdx.x; i < stages_ * layout_.stage / 16; i += blockDim.x) all[i] = uint4{};
        }
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

    // Zeros in this warp's slice of the rows behind the end, of which one that is not finite would spread.
    __device__ void clear_rows_behind() const {
        const int begin = place_.first * tokens_.size, end = begin + place_.channels * tokens_.size;
        for (int row = rows(); row < kTokens; ++row)
            for (int at = begin + 4 * place_.lane; at < end; at += 4 * kWarp) {
                char* to = tile() + row * layout_.token_stride + at;
                *reinterpret_cast<uint32_t*>(to) = 0;
                if (incoming_.data) *reinterpret_cast<uint32_t*>(to + layout_.incoming) = 0;
            }
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
        const int row = place_.lane * place_.warps + place_.warp;
        if (row < there)
            ptx::bulk_copy(ptx::shared_address(to) + row * layout_.token_stride, x.row(n + row), row_bytes_,
                           barrier(next_turn_.stage));
        __syncwarp();
#else
        place_.chunks(there, x.size, [&](int row, int byte) {
            return [&, at = ptx::shared_address(to) + row * layout_.token_stride + byte,
                    from = x.row(n + row) + byte](bool valid) mutable {
                ptx::copy_16(at, from, valid);
                at += 2 * layout_.token_stride;
                from += 2 * x.row_bytes;
            };
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
        place.chunks(rows, to.size, [&](int row, int byte) {
            return [&, at = to.row(n + row) + byte, from = tile + row * stride + byte](bool valid) mutable {
                if (valid) *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
                at += 2 * to.row_bytes;
                from += 2 * stride;
            };
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

// The pairs 2 t and 8 + 2 t from `c` on of rows g and g + 8 of a tile: found[e][half].
__device__ inline void load_pairs(float2 (&found)[2][2], const char* tile, int stride, Dtype dtype,
                                  const Place& place, int c) {
    if (dtype == Dtype::float32) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            found[i / 2][i % 2] =
                load_pair<float>(tile + (place.g + i % 2 * 8) * stride + (c + i / 2 * 8 + 2 * place.t) * 4);
    } else {
        uint32_t pairs[4];
        ptx::load_matrices(
            pairs, ptx::shared_address(tile) + place.lane % 16 * stride + place.lane / 16 * 16 + 2 * c);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            found[i / 2][i % 2] = dtype == Dtype::bfloat16 ? unpack<Product::bfloat16>(pairs[i])
                                                           : unpack<Product::float16>(pairs[i]);
    }
}

// Writes them there.
__device__ inline void store_pairs(const float2 (&x)[2][2], char* tile, int stride, Dtype dtype,
                                   const Place& place, int c) {
    const int size = dtype == Dtype::float32 ? 4 : 2;
    char* at = tile + place.g * stride + (c + 2 * place.t) * size;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = x[i / 2][i % 2];
        store_pair(at + i % 2 * 8 * stride + i / 2 * 8 * size, dtype, pair.x, pair.y);
    }
}

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
    const float mean = place.mean_of_slice(sum + __shfl_xor_sync(kAll, sum, kTokens));
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
    float sum = 0.0f, squares = 0.0f;
    place.each_warp([&](int w) {
        sum = fmaf(static_cast<float>(place.channels_of(w)), moments[w * kTokens + token].x, sum);
    });
    const float mean = divide(sum, static_cast<float>(place.width), place.inverse_width);
    place.each_warp([&](int w) {
        const float2 of_slice = moments[w * kTokens + token];
        const float distance = of_slice.x - mean;
        squares += fmaf(static_cast<float>(place.channels_of(w)) * distance, distance, of_slice.y);
    });
    const float rstd = rsqrtf(fmaf(squares, place.inverse_width, eps));
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

// The products of a tile of bfloat16 with `right(k)`, and the moments of its slice, from the same registers:
// sums are products with ones, and x times x - mean the diagonals of x (x - mean)^T, with the slice's mean,
// so that no digits are lost where it is large.
template <int Eights, typename Right>
__device__ void multiply_as_is(float (&sums)[Eights][4], const OperandRows<Product::bfloat16>& tile,
                               const Place& place, float2* moments, Right right) {
    constexpr uint32_t kOnes[2] = {0x3f803f80, 0x3f803f80};
    float totals[4] = {}, squares[2][4] = {};
    const uint32_t begin = tile.matrices(place, place.first);
    place.each_product([&](int k, int) {
        uint32_t x[4], b[Eights][2];
        ptx::load_matrices(x, begin + k * kChannels * 2);
        right(k, b);
#pragma unroll
        for (int e = 0; e < Eights; ++e) ptx::multiply_bfloat16(sums[e], x, b[e]);
        ptx::multiply_bfloat16(totals, x, kOnes);
    });
    float means[2];
    uint32_t shifts[2];  // of rows g and g + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        means[half] = place.mean_of_slice(totals[2 * half]);
        shifts[half] = ptx::pack_bfloat16(means[half], means[half]);
    }
    place.each_product([&](int k, int) {
        uint32_t x[4];  // again: for all products they would take 32 registers
        ptx::load_matrices(x, begin + k * kChannels * 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t of_rows[2] = {subtract_bfloat16(x[half], shifts[half]),
                                         subtract_bfloat16(x[2 + half], shifts[half])};
            ptx::multiply_bfloat16(squares[half], x, of_rows);
        }
    });
    if (place.t != place.g / 2) return;  // the others have products of two tokens
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        // The mean was rounded to be taken off.
        const float distance = means[half] - unpack<Product::bfloat16>(shifts[half]).x;
        const float products = place.g % 2 ? squares[half][2 * half + 1] : squares[half][2 * half];
        const float sum = fmaf(-static_cast<float>(place.channels) * distance, means[half], products);
        moments[place.warp * kTokens + place.g + 8 * half] = make_float2(means[half], fmaxf(sum, 0.0f));
    }
}

// Weights [16 tokens, 8 heads] that multiply the tokens of a tile.
template <Product P>
struct TokenWeights {
    uint32_t pairs[2];    // 16 bits: tokens 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of head g
    const float* memory;  // 32 bits: a row a token
    int stride;
};

// sums [16 channels, 8 heads] += tokens^T weights, for operands of 32 bits
template <Product P>
__device__ void add_weighted_tokens(float (&sums)[4], const OperandRows<P>& tokens,
                                    const TokenWeights<P>& weights, const Place& place, int c) {
    const int g = place.g, t = place.t;
    if constexpr (P == Product::tf32) {
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

// The same of all channels of the slice.
template <Product P>
__device__ void add_weighted_tokens(float (&sums)[kProducts][4], const OperandRows<P>& tokens,
                                    const TokenWeights<P>& weights, const Place& place) {
    if constexpr (sizeof(Operand<P>) == 2) {
        const uint32_t begin = tokens.matrices_across(place, place.first);
        place.each_product([&](int k, int) {
            uint32_t a[4];
            ptx::load_matrices_transposed(a, begin + k * kChannels * 2);
            multiply<P>(sums[k], a, weights.pairs);
        });
    } else {
        place.each_product([&](int k, int c) { add_weighted_tokens(sums[k], tokens, weights, place, c); });
    }
}

// ---- the CLS token and the queries ----

// x^ of the projected CLS token and gamma of the slice into shared memory, by its warp. Returns 1 /
// sqrt(variance + eps). Has a barrier, for which `moments` has room for the slices'.
__device__ inline float normalise_cls(const Direction& d, int64_t image, float eps, const Place& place,
                                      float2* moments, float* normed, float* gammas) {
    constexpr int kEach = kProducts * kChannels / kWarp;
    const float* row = Saved::column(d, image, Saved::Cls) + place.first;
    const Vector& gamma = d.parameters.norm_weight;
    float x[kEach], factors[kEach], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int c = place.lane + i * kWarp;
        const bool there = c < place.channels;
        x[i] = there ? row[c] : 0.0f;
        factors[i] = there ? load_element(gamma.data, gamma.dtype, (place.first + c) * gamma.stride) : 0.0f;
        sum += x[i];
    }
    const float mean = place.mean_of_slice(warp_sum(sum));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const float centred = place.lane + i * kWarp < place.channels ? x[i] - mean : 0.0f;
        squares = fmaf(centred, centred, squares);
    }
    squares = warp_sum(squares);
    if (place.lane == 0) moments[place.warp * kTokens] = make_float2(mean, squares);
    __syncthreads();
    const float2 statistics = token_statistics(moments, 1, 0, eps, place);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int c = place.lane + i * kWarp;
        if (c >= place.products * kChannels) continue;
        normed[c] = c < place.channels ? (x[i] - statistics.x) * statistics.y : 0.0f;
        gammas[c] = factors[i];
    }
    __syncwarp();
    return statistics.y;
}

// The queries, gamma times the rows `from(row)` (null: zeros) in the dtype of the products, and in `sums` the
// slice's sum of each row and of its product with x^_0, as every warp leaves them for all. Four lanes have a
// row.
template <Product P, int Eights, typename From>
__device__ void fill_queries(const OperandRows<P>& queries, const float* normed, const float* gammas,
                             const Place& place, float2* sums, From from) {
    const int end = place.first + place.channels;
#pragma unroll
    for (int e = 0; e < Eights; ++e) {
        const int row = 8 * e + place.g;
        const float* data = from(row);
        float2 values[kProducts][2];  // all are read before one is used
        place.each_product([&](int k, int begin) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int c = begin + 8 * i + 2 * place.t;
                values[k][i] = {};
                if (data && c + 1 < end)
                    values[k][i] = *reinterpret_cast<const float2*>(data + c);
                else if (data && c < end)
                    values[k][i].x = data[c];
            }
        });
        float2 found = {};
        place.each_product([&](int k, int begin) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int c = begin + 8 * i + 2 * place.t;
                const float2 factor = *reinterpret_cast<const float2*>(gammas + c - place.first);
                const float2 of_cls = *reinterpret_cast<const float2*>(normed + c - place.first);
                const float2 value =
                    make_float2(rounded<P>(values[k][i].x * factor.x), rounded<P>(values[k][i].y * factor.y));
                store_pair<Operand<P>>(reinterpret_cast<char*>(queries.row(row) + c), value.x, value.y);
                found.x += value.x + value.y;
                found.y = fmaf(value.x, of_cls.x, fmaf(value.y, of_cls.y, found.y));
            }
        });
        found = make_float2(quad_sum(found.x), quad_sum(found.y));
        if (place.t == 0) sums[place.warp * 8 * Eights + row] = found;
    }
    __syncwarp();
}

// The sums that the warps left of a row.
__device__ inline float2 sums_of_row(const float2* sums, int rows, int row, const Place& place) {
    float2 found = {};
    place.each_warp([&](int w) {
        found.x += sums[w * rows + row].x;
        found.y += sums[w * rows + row].y;
    });
    return found;
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
    __device__ Part(int64_t patches, unsigned split, unsigned splits) {
        const int64_t tiles =
            (static_cast<unsigned>((patches + kTokens - 1) / kTokens) + splits - 1) / splits;
        begin = min(split * tiles * kTokens, patches);
        end = min((split + 1) * tiles * kTokens, patches);
    }
};

}  // namespace crossvit
