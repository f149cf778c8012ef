// The good kernels for a GPU, with a C name: tests/test_gpu_fragments.py compares what they give with the emulator's.
#include "kernels_good.cu"

extern "C" int run_good(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int n, int m) {
  const int status = inq::cuda::good(name, a, b, c, n, m);
  return status != 0 ? status : static_cast<int>(cudaDeviceSynchronize());
}
