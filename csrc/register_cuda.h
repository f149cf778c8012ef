// What the register_cuda*.cpp files share beside register.h: the device and stream of a call, and CUDA's errors.
#pragma once

#include <string>

#include "cuda/host.h"
#include "register.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace inq::registration {

// Sets the device of a tensor for a call; torch's current stream there.
struct __attribute__((visibility("hidden"))) OnDevice {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit OnDevice(const Tensor& t) : index(static_cast<int32_t>(t.get_device())), guard(index) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

inline void check_cuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) {
    // Or torch's next check would find it again.
    (void)cudaGetLastError();
    throw std::runtime_error(std::string(kNamespace) + op + ": CUDA: " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status));
  }
}

// What kernels are chosen by; asked of the driver once for each device.
struct Machine {
  int processors, capability;
};
Machine machine_of(int32_t device);

// int32 zeros in which blocks count each other. New ones for each call: kernels leave them zero again, but one tensor for
// all calls would be shared by streams, and by CUDA graphs with memory pools of their own.
Tensor counters(int64_t count, const OnDevice& here);

// Kernels read 16 bytes at a time.
inline void check_aligned(const std::string& where, const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) {
    fail(where, "an address that is a multiple of 16", "another");
  }
}

inline void check_same_device(const std::string& where, const Tensor& t, const Tensor& like) {
  if (!t.is_cuda() || t.get_device() != like.get_device()) {
    fail(where, "a tensor on cuda:" + std::to_string(like.get_device()),
         t.is_cuda() ? "one on cuda:" + std::to_string(t.get_device()) : "one that is not on CUDA");
  }
}

// --- weights in the layouts of fragments.py ---------------------------------------------------------------------------

// slices.kind: the magnitudes decide, so that dense levels of 2 and 3 bits (one and three) are held as the paper's four.
inline cuda::Levels levels_of(Format f) {
  using cuda::Levels;
  if (f.bits == 5) return magnitudes(f) <= 8 ? Levels::paper5 : Levels::dense5;
  return magnitudes(f) <= 4 ? Levels::paper4 : Levels::dense4;
}

// The shape of an [n, k] weight: fragments.shape.
inline std::vector<int64_t> shape_of_weight(cuda::Number number, Format f, int64_t n, int64_t k) {
  using cuda::Number;
  const int64_t last = number == Number::f16 ? 16 : number == Number::bf16 ? 8 : 4;
  const int64_t width = cuda::block_k_of(number, levels_of(f));
  return {(n + 15) / 16, (k + width - 1) / width, cuda::block_bytes_of(number, levels_of(f)) / last, last};
}

}  // namespace inq::registration
