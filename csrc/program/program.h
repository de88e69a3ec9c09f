// A program: steps on the tokens of a batch of images, run one after the other by one call. Operators of
// Python are programs of one step; a frozen model is one program.
//
// It is a list of records, [kind, words, words ...], which crossvit_kernels/program.py writes. A record
// `images` or `batch` says how the steps behind it run, up to the next one: all of them on one image before
// the next image, so that what passes between them stays in a cache, or each once for the whole batch.
//
// Threads share out the images where there are as many, and share each image that is left over.
#pragma once

#include "../cross_attention/cross_attention.h"
#include "../linear/linear.h"
#include "../patch_embed/patch_embed.h"
#include "../self_attention/self_attention.h"

namespace crossvit {

enum class Kind : int64_t { images, batch, linear, self_attention, patches, copy, fusion };

// Forward of both directions; addresses are those of the first image.
struct FusionStep {
    double eps;
    Direction directions[2];
};

struct Program {
    const int64_t* words;
    int64_t count, images, threads;
    intptr_t input, output;
};

// Every instruction set's copy of: words of scratch memory for each thread, running, and the packing of
// weights.
using ProgramScratch = int64_t(const Program&);
using ProgramRun = void(const Program&, int32_t* scratch);
using PackedWeightWords = int64_t(const PackedWeight&);
using PackWeight = void(const PackedWeight&, int64_t threads, int32_t* out);

#define CROSSVIT_PROGRAM_OF(isa)           \
    namespace isa {                        \
    ProgramScratch program_scratch;        \
    ProgramRun run_program;                \
    PackedWeightWords packed_weight_words; \
    PackWeight pack_weight_words;          \
    }
CROSSVIT_PROGRAM_OF(baseline)
CROSSVIT_PROGRAM_OF(avx2)
CROSSVIT_PROGRAM_OF(avx512)
CROSSVIT_PROGRAM_OF(avx512bf16)
CROSSVIT_PROGRAM_OF(amx)
#undef CROSSVIT_PROGRAM_OF

}  // namespace crossvit
