// A number that tells memory from what it was, from a few of its bytes: the first four of every 4 KiB, and
// the last four. One load a page, which do not wait for each other.
#pragma once

#include <stdint.h>
#include <string.h>

namespace crossvit {

struct Region {
    const char* data;
    int64_t bytes;
};

inline uint64_t fingerprint_of(const Region& region) {
    constexpr int64_t kStep = 4096, kWord = 4;
    constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;  // odd, so that no bits are lost
    uint64_t found = 0;
    const auto add = [&](int64_t at, int64_t size) {
        uint32_t word = 0;
        memcpy(&word, region.data + at, static_cast<size_t>(size));
        found = found * kFactor + word;
    };
    if (region.bytes < kWord) {
        add(0, region.bytes);
        return found;
    }
    for (int64_t at = 0; at + kWord <= region.bytes; at += kStep) add(at, kWord);
    add(region.bytes - kWord, kWord);
    return found;
}

// On one thread: waking others takes as long.
inline uint64_t fingerprint(const Region* regions, int64_t count) {
    uint64_t all = 0;
    for (int64_t i = 0; i < count; ++i) all = (all ^ fingerprint_of(regions[i])) * 0xd6e8feb86659fd93u;
    return all;
}

}  // namespace crossvit
