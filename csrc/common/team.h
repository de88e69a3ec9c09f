// Threads. They are OpenMP's, whose pool torch shares when both use one library (crossvit_kernels/native.py).
#pragma once

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// One thread's view of those that work on the same call.
struct Team {
    int64_t rank, size;

    // Until all are here.
    void wait() const {
#ifdef _OPENMP
        if (size > 1) {
#pragma omp barrier
        }
#endif
    }

    // body(i) for this thread's share of 0 .. count - 1: a contiguous piece.
    template <class Body>
    void share(int64_t count, Body body) const {
        const int64_t end = count * (rank + 1) / size;
        for (int64_t i = count * rank / size; i < end; ++i) body(i);
    }
};

template <class Body>
void run(int64_t threads, Body body) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        body(Team{omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
#endif
    (void)threads;
    body(Team{0, 1});
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
