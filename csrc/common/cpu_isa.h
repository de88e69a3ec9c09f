// Run-time choice of the instruction set: one binary serves every x86-64 (or arm64) machine.
//
// A kernel is one always-inline body, instantiated in thin functions that carry a `target` attribute; the
// compiler vectorises each copy for its target. Bodies must not call std:: templates: the linker keeps one
// copy of those, and it may be the one compiled for the newest machine.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CROSSVIT_X86 1
#define CROSSVIT_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define CROSSVIT_TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,fma")))
#endif

#define CROSSVIT_ALWAYS_INLINE inline __attribute__((always_inline))

namespace crossvit {

enum class Isa { baseline, avx2, avx512 };

// What this machine and its operating system can run, best first.
inline std::vector<Isa> supported_isas() {
    std::vector<Isa> isas;
#ifdef CROSSVIT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        isas.push_back(Isa::avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::avx2);
#endif
    isas.push_back(Isa::baseline);
    return isas;
}

inline const char* name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        case Isa::baseline:
            break;
    }
    return "baseline";
}

// "auto" is the best one; a name that this machine cannot run is refused, never replaced.
inline Isa isa_from_name(const std::string& wanted) {
    const std::vector<Isa> isas = supported_isas();
    if (wanted == "auto") return isas.front();
    std::string known;
    for (Isa isa : isas) {
        if (wanted == name(isa)) return isa;
        known += std::string(known.empty() ? "" : ", ") + name(isa);
    }
    throw std::invalid_argument("isa must be auto or one that this machine runs (" + known + "), got " +
                                wanted);
}

}  // namespace crossvit
