// Tiles of bfloat16 on the matrix unit of newer Intel processors (AMX): 16 rows x 64 bytes each, eight of
// them.
//
//     left     [32 steps of channels ...][32 rows][32 channels]    rows as they come, no turning
//     right    [steps][32 columns]                                  as for vdpbf16ps
//     out      32 x 32 sums: 2 x 2 tiles, each 16 rows of 16 floats
//
// Four products of 16 x 32 x 16 for four loaded tiles. Sixteen steps, 32 channels, are multiplied at once.
#pragma once

#include <immintrin.h>

#include "vector.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

constexpr int kUnitRows = 32, kUnitSteps = 16, kUnitBytes = 64;

// The shapes of the tiles belong to a thread; while this lives, they are ours.
struct MatrixUnit {
    MatrixUnit() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; ++i) {
            shapes.bytes[i] = kUnitBytes;
            shapes.rows[i] = 16;
        }
        _tile_loadconfig(&shapes);
    }
    ~MatrixUnit() { _tile_release(); }
    MatrixUnit(const MatrixUnit&) = delete;
};

// `Vectors` 1 or 2: 16 or 32 columns, whose right operand has as many words a step. `ahead`: what is read
// next, of which `ahead_bytes` are asked for with every 16 steps.
template <int Vectors>
void multiply_on_unit(const int32_t* left, const int32_t* right, int64_t steps, float* out, int64_t out_row,
                      const char* ahead, int64_t ahead_bytes) {
    constexpr int64_t half = kUnitRows / 2 * kUnitSteps;  // words from the first 16 rows to the others
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; k += kUnitSteps) {
        _tile_loadd(6, right, Vectors * kUnitBytes);
        _tile_loadd(4, left, kUnitBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, left + half, kUnitBytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (Vectors == 2) {
            _tile_loadd(7, right + kUnitSteps, Vectors * kUnitBytes);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t line = 0; line < ahead_bytes; line += kUnitBytes) __builtin_prefetch(ahead + line, 0, 2);
        ahead += ahead_bytes;
        left += kUnitRows * kUnitSteps;
        right += Vectors * kUnitSteps * kUnitSteps;
    }
    const int64_t bytes = out_row * 4;
    _tile_stored(0, out, bytes);
    _tile_stored(2, out + kUnitRows / 2 * out_row, bytes);
    if constexpr (Vectors == 2) {
        _tile_stored(1, out + kLanes, bytes);
        _tile_stored(3, out + kUnitRows / 2 * out_row + kLanes, bytes);
    }
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
