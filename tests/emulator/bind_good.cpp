// Kernels that are right, for test_emulator.py.
#include <pybind11/pybind11.h>

#include "bind.h"

namespace inq::cuda {
int good(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int n, int m);
}

PYBIND11_MODULE(emulated_good, m) {
  inq::cuda::emulator::bind(m);
  m.def("run", &inq::cuda::good);
  m.def("_from_f16", &inq::cuda::from_f16);
  m.def("_from_bf16", &inq::cuda::from_bf16);
  m.def("_from_e4m3", &inq::cuda::from_e4m3);
  m.def("_to_f16", &inq::cuda::to_f16);
  m.def("_to_bf16", &inq::cuda::to_bf16);
  m.def("_to_e4m3", &inq::cuda::to_e4m3);
}
