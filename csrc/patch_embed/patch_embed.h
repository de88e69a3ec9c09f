// Convolutions as matrix products: the windows of an image as rows of a matrix.
#pragma once

#include "../common/place.h"

namespace crossvit {

// out[(row, column)][(c, y, x)] = pixel c, (row * stride + y - padding, column * stride + x - padding), zero
// outside of the image; [(y, x, c)] where the pixels lie with their channels together, as rows of a matrix.
struct PatchStep {
    Place pixels, out;
    int64_t channels, height, width;        // of the pixels
    int64_t of_channel, of_line, of_pixel;  // bytes from one to the next
    int64_t channels_last;                  // else `of_pixel` is that of neighbours
    int64_t rows, columns;                  // of windows
    int64_t kernel, stride, padding;
    // The image as seen: resized where `taps` is there, to seen_height x seen_width. Line i is the sum of the
    // lines taps[t][i] times tap_weights[t][i], t < 4; those of columns follow those of lines.
    int64_t seen_height, seen_width;
    const int32_t* taps;
    const float* tap_weights;
    // Pixels are bytes where `levels` is there, whatever their dtype says: a byte of channel c stands for
    // byte * levels[0][c] + levels[1][c].
    const float* levels;
};

// Rows of channels from one place to another.
struct CopyStep {
    Place from, out;
    int64_t rows, channels;
};

}  // namespace crossvit
