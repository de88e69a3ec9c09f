// Run-time choice of the instruction set: one binary serves every x86-64 (or arm64) machine.
//
// Every file named cpu.cpp is compiled once for each instruction set (setup.py has the flags) and defines its
// functions in the namespace CROSSVIT_ISA, which is that set's name; CROSSVIT_SELECT picks one of the copies.
// Such a file and the headers it includes define nothing outside an anonymous namespace and use no function
// of std::, because the linker keeps one copy of an inline function and it may be the newest machine's.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#if defined(CROSSVIT_X86_NEWEST) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace crossvit {

enum class Isa { baseline, avx2, avx512, avx512bf16, amx };

#if defined(CROSSVIT_X86_NEWEST) && defined(__linux__)
// Linux gives the registers of AMX to processes that ask for them.
inline bool has_matrix_unit() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
inline bool has_matrix_unit() { return false; }
#endif

// What this machine and its operating system can run, best first.
inline std::vector<Isa> supported_isas() {
    std::vector<Isa> isas;
#ifdef CROSSVIT_X86_ISAS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
#ifdef CROSSVIT_X86_NEWEST
        if (__builtin_cpu_supports("avx512bf16")) {
            if (has_matrix_unit()) isas.push_back(Isa::amx);
            isas.push_back(Isa::avx512bf16);
        }
#endif
        isas.push_back(Isa::avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::avx2);
#endif
    isas.push_back(Isa::baseline);
    return isas;
}

inline const char* name(Isa isa) {
    switch (isa) {
        case Isa::amx:
            return "amx";
        case Isa::avx512bf16:
            return "avx512bf16";
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

// The copy of a function that was compiled for `isa`: CROSSVIT_SELECT(isa, f). Compilers older than g++ 11 do
// not know the newest sets.
#ifdef CROSSVIT_X86_NEWEST
#define CROSSVIT_NEWEST(isa, function)                            \
    (isa) == ::crossvit::Isa::amx          ? amx::function        \
    : (isa) == ::crossvit::Isa::avx512bf16 ? avx512bf16::function \
                                           :
#else
#define CROSSVIT_NEWEST(isa, function)
#endif
#ifdef CROSSVIT_X86_ISAS
#define CROSSVIT_SELECT(isa, function)                                                 \
    (CROSSVIT_NEWEST(isa, function)(isa) == ::crossvit::Isa::avx512 ? avx512::function \
     : (isa) == ::crossvit::Isa::avx2                               ? avx2::function   \
                                                                    : baseline::function)
#else
#define CROSSVIT_SELECT(isa, function) ((void)(isa), baseline::function)
#endif

}  // namespace crossvit
