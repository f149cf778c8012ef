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
  Tensor t = new_tensor({std::max<int64_t>(count, 1)}, ScalarType::Int, here.index);
  if (count > 0) {
    check_cuda("counters", cudaMemsetAsync(t.mutable_data_ptr(), 0, static_cast<size_t>(count) * 4, here.stream));
  }
  return t;
}

}  // namespace inq::registration
