// What the register_cuda*.cpp files share beside register.h: the device and stream of a call, and CUDA's errors.
#pragma once

#include <string>

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
    throw std::runtime_error(std::string(kNamespace) + op + ": CUDA: " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status));
  }
}

// What kernels are chosen by; asked of the driver once for each device.
struct Machine {
  int processors, capability;
};
Machine machine_of(int32_t device);

// int32 zeros for kernels that leave them zero again: blocks that wait for each other count in them. One tensor for each
// stream, since kernels of two streams may run at once; in a CUDA graph, which may be replayed on any, new ones.
Tensor counters(int64_t count, const OnDevice& here);

inline void check_same_device(const std::string& where, const Tensor& t, const Tensor& like) {
  if (!t.is_cuda() || t.get_device() != like.get_device()) {
    fail(where, "a tensor on cuda:" + std::to_string(like.get_device()),
         t.is_cuda() ? "one on cuda:" + std::to_string(t.get_device()) : "one that is not on CUDA");
  }
}

}  // namespace inq::registration
