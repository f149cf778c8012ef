// csrc/register_cuda*.cpp on the emulator: the operators inq_cuda::* as torch sees them, with CPU tensors for CUDA's.
// tests/support_operators.py calls them.
//
// The files are compiled as they are. What they ask of torch's C functions about devices, streams and new memory finds
// the functions here before those of libtorch_cpu: every tensor is on the CUDA device whose number the test says.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"

namespace {

using namespace inq::cuda::emulator;

int32_t device = 0;                      // of all tensors …
std::map<uintptr_t, int32_t> elsewhere;  // … but of these, by address; −1: not on CUDA
std::vector<int32_t> guarded = {-1};     // the current devices: the thread's, and those of guards
int64_t submitted = 0, fails_at = -1;    // launches, copies and clears; the one that CUDA refuses
constexpr int32_t kNotCuda = 99;         // a type of device

cudaStream_t stream_of(int32_t index) {
  return reinterpret_cast<cudaStream_t>(uintptr_t{0x5000} + static_cast<unsigned>(index));
}

// libtorch's function of this name.
template <class Function>
Function* of_torch(const char* name, Function*) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const found = torch == nullptr ? nullptr : dlsym(torch, name);
  if (found == nullptr) throw std::runtime_error(std::string("libtorch_cpu.so has no ") + name);
  return reinterpret_cast<Function*>(found);
}
#define OF_TORCH(function) of_torch(#function, &function)

uintptr_t address_of(AtenTensorHandle t) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(t, &data);
  return reinterpret_cast<uintptr_t>(data);
}

int32_t device_of(AtenTensorHandle t) {
  const auto found = elsewhere.find(address_of(t));
  return found == elsewhere.end() ? device : found->second;
}

// Memory that torch has handed out just now: of what had it before nothing is left.
void new_buffer(const char* name, AtenTensorHandle t, bool initialised) {
  int64_t dimensions = 0, *sizes = nullptr, *strides = nullptr, elements = 1;
  int32_t dtype = 0;
  aoti_torch_get_dim(t, &dimensions);
  aoti_torch_get_sizes(t, &sizes);
  aoti_torch_get_strides(t, &strides);
  aoti_torch_get_dtype(t, &dtype);
  for (int64_t i = 0; i < dimensions; ++i) {
    if (sizes[i] == 0) return;
    elements += (sizes[i] - 1) * strides[i];
  }
  const auto size = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  forget_buffers(address_of(t), elements * size);
  if (!initialised) std::memset(reinterpret_cast<void*>(address_of(t)), 0xA5, static_cast<size_t>(elements * size));
  add_buffer(name, address_of(t), elements * size, true, initialised, static_cast<int>(std::min<int64_t>(size, 4)));
}

cudaError_t watch(cudaStream_t stream, const char* file, int line) {
  if (guarded.back() != device)
    fault("device", file, line, text("the device of the tensors is %d, and the current one is %d", device, guarded.back()));
  if (stream != stream_of(device)) fault("stream", file, line, text("not the current stream of device %d", device));
  return submitted++ == fails_at ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace

extern "C" {

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle t, int32_t* type) {
  *type = device_of(t) < 0 ? kNotCuda : aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle t, int32_t* index) {
  *index = device_of(t);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t, int32_t index, AtenTensorHandle* t) {
  if (index != device) fault("device", "aoti_torch_empty_strided", 0, text("memory of device %d for %d", index, device));
  const AOTITorchError error = OF_TORCH(aoti_torch_empty_strided)(dimensions, sizes, strides, dtype,
                                                                  aoti_torch_device_type_cpu(), 0, t);
  if (error == AOTI_TORCH_SUCCESS) new_buffer("new memory", *t, false);
  return error;
}

// contiguous() and to(): they may give back what they got.
AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  const uintptr_t given = address_of(reinterpret_cast<AtenTensorHandle>(stack[0]));
  const AOTITorchError error = OF_TORCH(torch_call_dispatcher)(name, overload, stack, version);
  if (error != AOTI_TORCH_SUCCESS) return error;
  const auto result = reinterpret_cast<AtenTensorHandle>(stack[0]);
  if (address_of(result) != given) new_buffer(name, result, true);
  return error;
}

AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  guarded.push_back(index);
  *guard = reinterpret_cast<DeviceGuardHandle>(&guarded);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  guarded.pop_back();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = stream_of(index);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

PYBIND11_MODULE(emulated_operators, m) {
  inq::cuda::emulator::bind(m);
  submitting = &watch;
  m.def("_forget_buffers", &forget_buffers);
  // The device of all tensors but of `others` (address: device), and which launch, copy or clear fails; −1: none.
  m.def("_devices", [](int32_t index, const std::map<uintptr_t, int32_t>& others, int64_t failing) {
    device = index;
    elsewhere = others;
    fails_at = failing;
    submitted = 0;
  });
  m.def("_submitted", [] { return submitted; });
  m.def("_guards", [] { return guarded.size() - 1; });
}
