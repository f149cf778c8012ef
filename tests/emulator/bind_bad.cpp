// Kernels that are wrong, for test_emulator.py.
#include <pybind11/pybind11.h>

#include "bind.h"

namespace inq::cuda {
int bad(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int blocks, int threads);
}

PYBIND11_MODULE(emulated_bad, m) {
  inq::cuda::emulator::bind(m);
  m.def("run", &inq::cuda::bad);
}
