// The operators inq_cuda::*. Only the register_cuda*.cpp files, register_cuda.h and register.h know torch: its stable ABI
// alone, so that one build serves every torch from 2.11 on. Everything here is checking, allocation and a call into cuda/.
#include "register_cuda.h"

#include <map>
#include <mutex>
#include <utility>

namespace inq::registration {

Machine machine_of(int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, Machine> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int processors = 0, major = 0, minor = 0;
  check_cuda("machine", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_cuda("machine", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_cuda("machine", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return known[device] = {processors, 10 * major + minor};
}

Tensor counters(int64_t count, const OnDevice& here) {
  const int64_t size = std::max<int64_t>(count, 1);
  auto made = [&](int64_t length) {
    Tensor t = new_tensor({length}, ScalarType::Int, here.index);
    return torch::stable::zero_(t);
  };
  if (count == 0) return new_tensor({size}, ScalarType::Int, here.index);
  cudaStreamCaptureStatus status{};
  check_cuda("counters", cudaStreamIsCapturing(here.stream, &status));
  if (status != cudaStreamCaptureStatusNone) return made(size);
  static std::mutex mutex;
  // Never freed: the driver may be gone before static objects are.
  static auto& kept = *new std::map<std::pair<int32_t, cudaStream_t>, Tensor>();
  const std::lock_guard lock(mutex);
  const auto key = std::make_pair(here.index, here.stream);
  const auto found = kept.find(key);
  if (found != kept.end() && found->second.numel() >= size) return found->second;
  // The caching allocator keeps what is given up here for this stream's later kernels alone.
  kept.insert_or_assign(key, made(std::max<int64_t>(size, 4096)));
  return kept.at(key);
}

}  // namespace inq::registration
