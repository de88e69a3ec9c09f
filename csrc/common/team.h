// Threads. They are OpenMP's, whose pool torch shares when both use one library (crossvit_kernels/native.py).
#pragma once

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#include <sched.h>
#endif

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// Where the threads of a team meet. Not OpenMP's, which spins for milliseconds: where other programs have a
// core, the thread that is waited for gets it sooner when those that wait give theirs back.
struct Meeting {
    int64_t arrived = 0, round = 0;

    void wait(int64_t size) {
#ifdef _OPENMP
        constexpr int kSpins = 4000;  // some ten microseconds, longer than a step's threads are apart
        const int64_t now = __atomic_load_n(&round, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int i = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; ++i) {
            if (i < kSpins)
                pause();
            else
                sched_yield();
        }
#else
        (void)size;
#endif
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
};

// One thread's view of those that work on the same call.
struct Team {
    int64_t rank, size;
    Meeting* meeting = nullptr;  // of more than one

    // Until all are here.
    void wait() const {
        if (size > 1) meeting->wait(size);
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
        Meeting meeting;
#pragma omp parallel num_threads(static_cast<int>(threads))
        body(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
        return;
    }
#endif
    (void)threads;
    body(Team{0, 1});
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
