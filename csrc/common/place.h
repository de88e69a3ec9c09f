// Where the steps of a program (program/program.h) find their tensors.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace crossvit {

// Rows of channels, which are contiguous; distances count bytes. Each image has its own, or each worker.
struct Place {
    enum Base : int64_t { absent, fixed, input, output };
    Base base;     // `data` is an address, or an offset into the input or the output of the call
    int64_t data;  // that of the first image, or worker
    int64_t of_image, of_worker, of_row;
    Dtype dtype;
};

// What matrices are multiplied in: both sides are rounded to it, sums are float32.
enum class Precision : int64_t { float32, bfloat16 };

// Who runs a step: a team of threads with memory of its own.
struct Worker {
    int64_t number;
    const intptr_t* bases;  // of Place::Base
    int32_t* scratch;

    template <class T = char>
    T* at(const Place& place, int64_t image) const {
        if (place.base == Place::absent) return nullptr;
        return reinterpret_cast<T*>(bases[place.base] + place.data + image * place.of_image +
                                    number * place.of_worker);
    }
};

}  // namespace crossvit
