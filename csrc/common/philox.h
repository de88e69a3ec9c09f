// The counter-based generator Philox 4x32-10 (Salmon et al., SC 2011); crossvit_kernels/dropout.py is its
// definition. Static, because files for several instruction sets include this.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define CROSSVIT_EVERYWHERE __host__ __device__
#else
#define CROSSVIT_EVERYWHERE
#endif

namespace crossvit {

struct Words {
    uint32_t word[4];
};

CROSSVIT_EVERYWHERE static inline Words philox(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * counter.word[0];
        const uint64_t b = uint64_t{0xCD9E8D57u} * counter.word[2];
        counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                    static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

}  // namespace crossvit
