// One pass over the tokens: a tile of them is normalised into the L1 cache, its scores update a running
// softmax (maximum m, sum l) and the tile is added to z of every head, then it is forgotten:
//
//     tile [32 tokens][C]  --dots with qt [H][C]-->  scores [H][32]  --exp2-->  p  --accumulate-->  z [H][C]
//
// Backward computes p again from the saved logarithm of the sum, and writes each token's gradient once. What
// surrounds the tokens (a row or H rows an image) runs as stages between barriers, whose weights are read
// once for the whole batch. Limit: 4 N C H operations an image forward, 10 N C H backward.
#include "backward.h"
#include "forward.h"
#include "planned.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

void run_planned(const Direction* directions, int64_t count, const Options& options, float* memory,
                 bool is_backward) {
    Work works[kMaxDirections];
    Arena arena{memory};
    const int64_t scratch = plan(works, directions, count, options, arena, is_backward);
    float* first = memory + arena.used;
    run(options.threads, [&](const Team& team) {
        const Arena own{first + team.rank * scratch};
        is_backward ? backward(team, works, count, own) : forward(team, works, count, own);
    });
}

}  // namespace

int64_t cross_attention_scratch(const Direction* directions, int64_t count, int64_t threads,
                                bool is_backward) {
    Work works[kMaxDirections];
    Arena arena{nullptr};
    const Options options{};
    const int64_t scratch = plan(works, directions, count, options, arena, is_backward);
    return arena.used + threads * scratch;
}

void cross_attention_forward(const Direction* directions, int64_t count, const Options& options,
                             float* scratch) {
    run_planned(directions, count, options, scratch, false);
}

void cross_attention_backward(const Direction* directions, int64_t count, const Options& options,
                              float* scratch) {
    run_planned(directions, count, options, scratch, true);
}

}  // namespace CROSSVIT_ISA
}  // namespace crossvit
