// Multi-head self-attention of the tokens of an image.
#pragma once

#include "../common/place.h"

namespace crossvit {

// softmax(scale q k^T) v of each head, from qkv [tokens, (3, heads, head_channels)] to [tokens, (heads,
// head_channels)].
struct SelfAttentionStep {
    Place qkv, out;
    int64_t tokens, heads, head_channels;
    Precision precision;
    double scale;
};

}  // namespace crossvit
