// Windows of an image as rows, a line of the image after the other: it is resized where wanted, converted to
// the dtype of the rows, and cut into pieces of a window's width. Limit: memory, one write of each pixel for
// every window that sees it.
#pragma once

#include "../common/layer_norm.h"
#include "../common/team.h"
#include "patch_embed.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// Lines of a thread: as read, the sum of four, as seen, and as cut, with padding on both sides; in words.
struct Lines {
    int64_t read, down, seen, cut, total;
    explicit Lines(const PatchStep& s) {
        const int64_t pixel = s.channels_last ? s.channels : 1;
        read = 0;
        down = read + rounded_up(s.width * pixel, 16);
        seen = down + rounded_up(s.width * pixel, 16);
        cut = seen + rounded_up((s.seen_width > s.width ? s.seen_width : s.width) * pixel, 16);
        total = cut + rounded_up((s.seen_width + 2 * s.padding + s.kernel) * pixel, 16);
    }
};

inline int64_t patch_scratch(const PatchStep& step) { return Lines(step).total; }

// A line of `count` numbers, from one channel or of all.
inline void read_line(const PatchStep& s, const char* image, int64_t channel, int64_t y, float* line) {
    const int64_t size = size_of(s.pixels.dtype);
    const char* from = image + channel * s.of_channel + y * s.of_line;
    if (s.levels) {
        const float factor = s.levels[channel], shift = s.levels[s.channels + channel];
        for (int64_t x = 0; x < s.width; ++x)
            line[x] = static_cast<float>(static_cast<uint8_t>(from[x * s.of_pixel])) * factor + shift;
        return;
    }
    if (s.channels_last && s.of_pixel != s.channels * size) {
        for (int64_t x = 0; x < s.width; ++x) {
            float* to = line + x * s.channels;
            load_row(s.pixels.dtype, from + x * s.of_pixel, 1, s.channels, to, s.channels);
        }
        return;
    }
    const int64_t count = s.channels_last ? s.width * s.channels : s.width;
    load_row(s.pixels.dtype, from, s.channels_last ? 1 : s.of_pixel / size, count, line, count);
}

// Line y of the image as seen: bicubic, 4 lines and then 4 columns.
inline void resized_line(const PatchStep& s, const char* image, int64_t channel, int64_t y, float* read,
                         float* down, float* line) {
    for (int64_t x = 0; x < s.width; ++x) down[x] = 0.0f;
    for (int64_t t = 0; t < 4; ++t) {
        read_line(s, image, channel, s.taps[t * s.seen_height + y], read);
        const float by = s.tap_weights[t * s.seen_height + y];
        for (int64_t x = 0; x < s.width; ++x) down[x] += by * read[x];
    }
    const int32_t* taps = s.taps + 4 * s.seen_height;
    const float* weights = s.tap_weights + 4 * s.seen_height;
    const int64_t count = s.seen_width;
    for (int64_t x = 0; x < count; ++x)
        line[x] = weights[x] * down[taps[x]] + weights[count + x] * down[taps[count + x]] +
                  weights[2 * count + x] * down[taps[2 * count + x]] +
                  weights[3 * count + x] * down[taps[3 * count + x]];
}

template <class T>
void cut_windows(const Team& team, const Worker& worker, const PatchStep& s, int64_t image, float* memory) {
    const Lines lines(s);
    const char* pixels = worker.at(s.pixels, image);
    char* out = worker.at(s.out, image);
    const int64_t planes = s.channels_last ? 1 : s.channels, pixel = s.channels_last ? s.channels : 1;
    float* seen = memory + lines.seen;
    T* cut = reinterpret_cast<T*>(memory + lines.cut);
    const int64_t count = s.seen_width * pixel, margin = s.padding * pixel;
    for (int64_t i = 0; i < margin; ++i) cut[i] = T{};
    for (int64_t i = 0; i < (s.padding + s.kernel) * pixel; ++i) cut[margin + count + i] = T{};
    team.share(s.rows * planes, [&](int64_t task) {
        const int64_t row = task / planes, channel = task % planes;
        for (int64_t ky = 0; ky < s.kernel; ++ky) {
            const int64_t y = row * s.stride + ky - s.padding;
            const bool inside = y >= 0 && y < s.seen_height;
            if (inside && s.taps)
                resized_line(s, pixels, channel, y, memory + lines.read, memory + lines.down, seen);
            else if (inside)
                read_line(s, pixels, channel, y, seen);
            if (inside)
                store_row_of(seen, count, cut + margin, 1);
            else
                for (int64_t i = 0; i < count; ++i) cut[margin + i] = T{};
            for (int64_t column = 0; column < s.columns; ++column) {
                char* to = out + (row * s.columns + column) * s.out.of_row;
                const int64_t at = (channel * s.kernel + ky) * s.kernel * pixel;
                __builtin_memcpy(to + at * static_cast<int64_t>(sizeof(T)), cut + column * s.stride * pixel,
                                 static_cast<size_t>(s.kernel * pixel) * sizeof(T));
            }
        }
    });
    team.wait();
}

inline void run_step(const Team& team, const Worker& worker, const PatchStep& step, int64_t image) {
    float* memory = reinterpret_cast<float*>(worker.scratch + team.rank * patch_scratch(step));
    with_type(step.out.dtype,
              [&](auto type) { cut_windows<decltype(type)>(team, worker, step, image, memory); });
}

inline void run_step(const Team& team, const Worker& worker, const CopyStep& step, int64_t image) {
    const char* from = worker.at(step.from, image);
    char* out = worker.at(step.out, image);
    team.share(step.rows, [&](int64_t r) {
        with_type(step.from.dtype, [&](auto type) {
            using From = decltype(type);
            const From* x = reinterpret_cast<const From*>(from + r * step.from.of_row);
            char* to = out + r * step.out.of_row;
            for (int64_t c = 0; c < step.channels; c += kLanes) {
                const int64_t rest = step.channels - c < kLanes ? step.channels - c : kLanes;
                const Vec v = rest == kLanes ? load(x + c) : load(x + c, rest);
                with_type(step.out.dtype, [&](auto other) {
                    using To = decltype(other);
                    To* y = reinterpret_cast<To*>(to) + c;
                    rest == kLanes ? store(v, y) : store(v, y, rest);
                });
            }
        });
    });
    team.wait();
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
