// Compiled beside the kernels by tests/interpreted_cuda.py.
#include "../csrc/cross_attention/cuda.h"

extern "C" int direction_bytes() { return sizeof(crossvit::Direction); }
