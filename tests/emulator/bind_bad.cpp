// Kernels that are wrong, for test_emulator.py.
#include <pybind11/pybind11.h>

#include "bind.h"

namespace inq::cuda {
int bad(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int blocks, int threads);
int bad_more(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int blocks, int threads);
int launch_with_shared(int bytes);
int bad_async(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int blocks, int threads);
}

PYBIND11_MODULE(emulated_bad, m) {
  inq::cuda::emulator::bind(m);
  m.def("run_kernels_bad", &inq::cuda::bad);
  m.def("run_kernels_bad_more", &inq::cuda::bad_more);
  m.def("launch_with_shared", &inq::cuda::launch_with_shared);
  m.def("run_kernels_bad_async", &inq::cuda::bad_async);
}
