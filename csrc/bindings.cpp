// The Python module crossvit_kernels._native. It includes no torch header: arguments are addresses, sizes and
// strides, so one binary works beside every torch. Python checks shapes and owns the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#ifdef _OPENMP
#include <pthread.h>
#endif

#include "common/cpu_isa.h"
#include "cross_attention/cross_attention.h"
#include "cross_attention/cuda.h"
#include "layer_norm_statistics/layer_norm_statistics.h"
#include "program/fingerprint.h"
#include "program/program.h"

namespace py = pybind11;

#ifdef CROSSVIT_CUDA
// Of the CUDA runtime, which is linked statically; its headers are not needed for this.
extern "C" const char* cudaGetErrorName(int error);
extern "C" const char* cudaGetErrorString(int error);
#endif

namespace crossvit {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.emplace_back(name(isa));
    return names;
}

Isa current_isa = supported_isas().front();

#ifdef _OPENMP
// The threads of an OpenMP pool do not survive a fork; a region that counts on them would wait for ever.
// Without OpenMP there is one thread in any case.
bool single_threaded = false;
#else
bool single_threaded = true;
#endif

// Directions as crossvit_kernels/cross_attention/packing.py packs them, each a prefix of the struct; what is
// not packed is absent.
struct Directions {
    Direction item[2] = {};
    int64_t count = 0;

    explicit Directions(const std::vector<py::bytes>& packed) {
        if (packed.size() > 2) throw std::invalid_argument("at most two directions");
        for (const py::bytes& one : packed) {
            const std::string_view view = one;
            if (view.size() > sizeof(Direction) || view.size() % 8)
                throw std::invalid_argument("a packed direction does not fit");
            std::memcpy(&item[count++], view.data(), view.size());
        }
    }

    // As many threads, up to `most`, as have some 100,000 operations each: waking one takes microseconds.
    int64_t threads(int64_t most) const {
        int64_t operations = 0;
        for (int64_t i = 0; i < count; ++i) {
            const Direction& d = item[i];
            operations += d.batch * d.width * (d.patches * d.heads + d.width) * 4;
        }
        return single_threaded ? 1 : std::clamp<int64_t>(operations / 100'000, 1, std::max<int64_t>(most, 1));
    }
};

// The instruction set, the number of threads and the floats of scratch memory that `run` is to be given.
std::tuple<int, int64_t, int64_t> plan(const std::vector<py::bytes>& packed, bool backward, int64_t most) {
    const Directions directions(packed);
    const Isa isa = current_isa;
    const int64_t threads = directions.threads(most);
    const auto scratch = CROSSVIT_SELECT(isa, cross_attention_scratch);
    return {static_cast<int>(isa), threads, scratch(directions.item, directions.count, threads, backward)};
}

void run(const std::vector<py::bytes>& packed, bool backward, uintptr_t scratch, int isa_number,
         int64_t threads, float eps, double dropout_p) {
    const Directions directions(packed);
    Options options{eps, 0, 1.0f, threads};
    if (dropout_p > 0) {
        options.drop_below = static_cast<uint64_t>(dropout_p * 4294967296.0);
        options.kept_factor = dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0.0f;
    }
    const Isa isa = static_cast<Isa>(isa_number);
    const auto forward_kernel = CROSSVIT_SELECT(isa, cross_attention_forward);
    const auto backward_kernel = CROSSVIT_SELECT(isa, cross_attention_backward);
    py::gil_scoped_release nogil;
    (backward ? backward_kernel : forward_kernel)(directions.item, directions.count, options,
                                                  pointer<float>(scratch));
}

// A program as crossvit_kernels/program.py writes it. Python keeps the bytes as long as it runs.
Program unpacked(const py::bytes& words, int64_t images, int64_t threads) {
    const std::string_view view = words;
    const auto count = static_cast<int64_t>(view.size() / sizeof(int64_t));
    return {reinterpret_cast<const int64_t*>(view.data()), count, images, threads, 0, 0};
}

// The instruction set, the number of threads and the words of scratch memory that `run_program` is to be
// given.
std::tuple<int, int64_t, int64_t> program_plan(const py::bytes& words, int64_t images, int64_t most) {
    const Program program = unpacked(words, images, 1);
    const Isa isa = current_isa;
    const int64_t threads = single_threaded ? 1 : std::max<int64_t>(most, 1);
    const auto scratch = CROSSVIT_SELECT(isa, program_scratch);
    return {static_cast<int>(isa), threads, threads * scratch(program)};
}

void run_program_of(const py::bytes& words, int64_t images, uintptr_t input, uintptr_t output,
                    uintptr_t scratch, int isa_number, int64_t threads) {
    Program program = unpacked(words, images, threads);
    program.input = static_cast<intptr_t>(input);
    program.output = static_cast<intptr_t>(output);
    const Isa isa = static_cast<Isa>(isa_number);
    const auto kernel = CROSSVIT_SELECT(isa, run_program);
    py::gil_scoped_release nogil;
    kernel(program, pointer<int32_t>(scratch));
}

PackedWeight weight_of(uintptr_t weight, int64_t of_row, int64_t dtype, int64_t outputs, int64_t channels,
                       int64_t precision) {
    return {pointer<void>(weight),
            of_row,
            static_cast<Dtype>(dtype),
            outputs,
            channels,
            static_cast<Precision>(precision)};
}

#ifdef CROSSVIT_CUDA
// Floats of memory for intermediates and bytes of shared memory that `cuda_run` needs; the GPU is as struct
// Gpu has it.
std::tuple<int64_t, int64_t> cuda_plan(const std::vector<py::bytes>& packed, bool backward, bool tf32,
                                       int64_t capability, int64_t multiprocessors, int64_t shared_of_block) {
    const Directions directions(packed);
    const Gpu gpu{capability, multiprocessors, shared_of_block};
    const CudaPlan plan = crossvit_cuda_plan(directions.item, directions.count, backward, tf32, &gpu);
    return {plan.floats, plan.shared_of_block};
}

int cuda_run(const std::vector<py::bytes>& packed, bool backward, bool tf32, int64_t capability,
             int64_t multiprocessors, int64_t shared_of_block, float eps, double dropout_p, uintptr_t memory,
             uintptr_t stream) {
    const Directions directions(packed);
    const Gpu gpu{capability, multiprocessors, shared_of_block};
    py::gil_scoped_release nogil;
    return crossvit_cuda_run(directions.item, directions.count, backward, tf32, &gpu, eps, dropout_p,
                             pointer<float>(memory), pointer<void>(stream));
}

std::tuple<std::string, std::string> cuda_error(int code) {
    return {cudaGetErrorName(code), cudaGetErrorString(code)};
}
#endif

}  // namespace
}  // namespace crossvit

PYBIND11_MODULE(_native, m) {
    using namespace crossvit;
#ifdef _OPENMP
    pthread_atfork(nullptr, nullptr, [] { single_threaded = true; });
#endif
    m.doc() = "Compiled kernels of crossvit_kernels; private, called through crossvit_kernels.native.";
    m.attr("direction_words") = sizeof(Direction) / sizeof(int64_t);
    m.def("isas", &isas, "Instruction sets that this machine runs, best first.");
    m.def("isa", [] { return std::string(name(current_isa)); }, "The instruction set in use.");
    m.def("use_isa", [](const std::string& wanted) { current_isa = isa_from_name(wanted); });
    m.def("cross_attention_saved_floats", &saved_floats, "Floats that forward keeps for one image.",
          py::arg("width"), py::arg("heads"));
    m.def("cross_attention_plan", &plan, py::arg("directions"), py::arg("backward"), py::arg("most_threads"));
    m.def("cross_attention", &run, py::arg("directions"), py::arg("backward"), py::arg("scratch"),
          py::arg("isa"), py::arg("threads"), py::arg("eps"), py::arg("dropout_p"));
    m.def("program_plan", &program_plan, py::arg("program"), py::arg("images"), py::arg("most_threads"));
    m.def("run_program", &run_program_of, py::arg("program"), py::arg("images"), py::arg("input"),
          py::arg("output"), py::arg("scratch"), py::arg("isa"), py::arg("threads"));
    m.def(
        "fingerprint",
        [](uintptr_t regions, int64_t count) { return fingerprint(pointer<Region>(regions), count); },
        "Of `count` regions of memory, pairs of address and bytes.", py::arg("regions"), py::arg("count"));
    m.def("packed_weight_words",
          [](const std::string& isa_name, int64_t outputs, int64_t channels, int64_t precision) {
              const Isa isa = isa_from_name(isa_name);
              const auto words = CROSSVIT_SELECT(isa, packed_weight_words);
              return words(weight_of(0, 0, 0, outputs, channels, precision));
          });
    m.def("pack_weight",
          [](const std::string& isa_name, uintptr_t weight, int64_t of_row, int64_t dtype, int64_t outputs,
             int64_t channels, int64_t precision, int64_t threads, uintptr_t out) {
              const Isa isa = isa_from_name(isa_name);
              const auto kernel = CROSSVIT_SELECT(isa, pack_weight_words);
              const PackedWeight packed = weight_of(weight, of_row, dtype, outputs, channels, precision);
              py::gil_scoped_release nogil;
              kernel(packed, single_threaded ? 1 : threads, pointer<int32_t>(out));
          });
    m.def(
        "layer_norm_statistics_cpu",
        [](uintptr_t x, int64_t rows, int64_t columns, int64_t row_stride, float eps, uintptr_t mean,
           uintptr_t rstd) {
            const auto kernel = CROSSVIT_SELECT(current_isa, layer_norm_statistics);
            py::gil_scoped_release nogil;
            kernel(pointer<const float>(x), rows, columns, row_stride, eps, pointer<float>(mean),
                   pointer<float>(rstd));
        },
        py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"), py::arg("eps"),
        py::arg("mean"), py::arg("rstd"));
#ifdef CROSSVIT_CUDA
    m.def("cuda_usable", &crossvit_cuda_usable, "0, or why the current GPU cannot load the CUDA kernels.");
    m.def("cuda_error", &cuda_error, "Name and text of a CUDA error.", py::arg("code"));
    m.def("cuda_plan", &cuda_plan, py::arg("directions"), py::arg("backward"), py::arg("tf32"),
          py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_of_block"));
    m.def("cuda_run", &cuda_run, py::arg("directions"), py::arg("backward"), py::arg("tf32"),
          py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_of_block"), py::arg("eps"),
          py::arg("dropout_p"), py::arg("memory"), py::arg("stream"));
    m.def("layer_norm_statistics_cuda", [](uintptr_t x, int64_t rows, int64_t columns, int64_t row_stride,
                                           float eps, uintptr_t mean, uintptr_t rstd, uintptr_t stream) {
        return layer_norm_statistics_cuda(pointer<const float>(x), rows, columns, row_stride, eps,
                                          pointer<float>(mean), pointer<float>(rstd), pointer<void>(stream));
    });
#endif
}
