// The memory of a call: what all threads share, then what each has for a tile.
#pragma once

#include "work.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// Floats that a thread needs for a tile.
int64_t tile_scratch(const Work& w, bool backward) {
    const int64_t rows = backward ? 2 * kTile : kTile;
    const int64_t products = backward ? larger(outer_scratch(w.width), outer_scratch(w.own)) : 0;
    return rows * larger(w.width, w.own) + (4 * w.heads + 8) * kTile + rounded_up(2 * w.heads, 16) + products;
}

// At most two directions run at once: both branches of a fusion.
constexpr int64_t kMaxDirections = 2;

int64_t plan(Work* works, const Direction* directions, int64_t count, const Options& options, Arena& arena,
             bool is_backward) {
    int64_t scratch = 0;
    for (int64_t i = 0; i < count; ++i) {
        works[i].plan(directions[i], options, arena, is_backward);
        scratch = larger(scratch, tile_scratch(works[i], is_backward));
    }
    return rounded_up(scratch, 16);
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
