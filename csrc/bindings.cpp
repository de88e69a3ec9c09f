// The Python module crossvit_kernels._native. It includes no torch header: arguments are addresses, sizes and
// strides, so one binary works beside every torch. Python checks shapes and owns the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "layer_norm_statistics/layer_norm_statistics.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (crossvit::Isa isa : crossvit::supported_isas()) names.emplace_back(crossvit::name(isa));
    return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled kernels of crossvit_kernels; private, called through crossvit_kernels.native.";
    m.def("isas", &isas, "Instruction sets that this machine runs, best first.");
    m.def(
        "layer_norm_statistics_cpu",
        [](uintptr_t x, int64_t rows, int64_t columns, int64_t row_stride, float eps, uintptr_t mean,
           uintptr_t rstd, const std::string& isa) {
            const crossvit::Isa chosen = crossvit::isa_from_name(isa);
            py::gil_scoped_release nogil;
            crossvit::layer_norm_statistics_cpu(pointer<const float>(x), rows, columns, row_stride, eps,
                                                pointer<float>(mean), pointer<float>(rstd), chosen);
        },
        py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"), py::arg("eps"),
        py::arg("mean"), py::arg("rstd"), py::arg("isa") = "auto");
#ifdef CROSSVIT_CUDA
    m.def("layer_norm_statistics_cuda", [](uintptr_t x, int64_t rows, int64_t columns, int64_t row_stride,
                                           float eps, uintptr_t mean, uintptr_t rstd, uintptr_t stream) {
        return crossvit::layer_norm_statistics_cuda(pointer<const float>(x), rows, columns, row_stride, eps,
                                                    pointer<float>(mean), pointer<float>(rstd),
                                                    pointer<void>(stream));
    });
#endif
}
