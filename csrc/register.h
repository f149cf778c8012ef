// What the register_*.cpp files share, on the CPU and (where USE_CUDA is defined) on CUDA: checks with errors that name
// the operator, the argument, what was expected and what came (ValueError in Python), and new tensors. Torch's stable
// ABI alone.
#pragma once

#if defined(USE_CUDA)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__) && !defined(USE_CUDA)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(USE_CUDA)
#include "cpu/kernels.h"
#endif
#include "inq_format.h"

namespace inq::registration {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#if defined(USE_CUDA)
constexpr const char *kNamespace = "inq_cuda.", *kDevice = "a CUDA tensor";
inline bool is_here(const Tensor& t) { return t.is_cuda(); }
#else
constexpr const char *kNamespace = "inq_cpu.", *kDevice = "a CPU tensor";
inline bool is_here(const Tensor& t) { return t.is_cpu(); }
#endif

// `where` is "operator: argument".
[[noreturn]] inline void fail(const std::string& where, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(kNamespace + where + ": expected " + expected + ", got " + got);
}

inline std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::string shape_of(const Tensor& t) { return text_of(sizes_of(t)); }

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string type_of(const Tensor& t) { return name_of(t.scalar_type()); }

inline void check_memory(const std::string& where, const Tensor& t) {
  if (!is_here(t)) fail(where, kDevice, "one on another device");
  if (!t.is_contiguous()) fail(where, "a contiguous tensor", "one of shape " + shape_of(t) + " with other strides");
}

inline void check_dtype(const std::string& where, const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() != dtype) fail(where, name_of(dtype), type_of(t));
}

// A contiguous tensor here of just this dtype and shape.
inline void check(const std::string& where, const Tensor& t, ScalarType dtype, const std::vector<int64_t>& shape) {
  check_dtype(where, t, dtype);
  if (sizes_of(t) != shape) fail(where, "shape " + text_of(shape), shape_of(t));
  check_memory(where, t);
}

inline void check_at_least(const std::string& where, int64_t value, int64_t least) {
  if (value < least) fail(where, "at least " + std::to_string(least), std::to_string(value));
}

inline Format format_of(const std::string& op, int64_t bits, bool dense) {
  if (bits < 2 || bits > 5) fail(op + ": bits", "2 to 5", std::to_string(bits));
  return {static_cast<int>(bits), dense};
}

#if !defined(USE_CUDA)
inline cpu::DType dtype_of(const std::string& where, ScalarType type) {
  if (type != ScalarType::Float && type != ScalarType::BFloat16) fail(where, "float32 or bfloat16", name_of(type));
  return type == ScalarType::Float ? cpu::DType::float32 : cpu::DType::bfloat16;
}

#endif

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? data_of<T>(*t) : nullptr;
}

// --- packed weights, and the rows that they multiply --------------------------------------------------------------------

// N of a packed weight, its parts checked: codes of shape `shape(N)`, exponents [N, 1], and row scales [N, 1] or none.
template <class Shape>
int64_t check_weight(const std::string& op, const Tensor& weight, const Tensor& exponent, const OptionalTensor& scale,
                     const Shape& shape) {
  if (exponent.dim() != 2) fail(op + ": weight_exp", "[N, 1]", shape_of(exponent));
  const int64_t n = exponent.size(0);
  check(op + ": weight_exp", exponent, ScalarType::Char, {n, 1});
  check(op + ": weight", weight, ScalarType::Byte, shape(n));
  if (scale) check(op + ": weight_scale", *scale, ScalarType::Float, {n, 1});
  return n;
}

inline void check_bias(const std::string& op, const OptionalTensor& bias, int64_t n) {
  if (bias && sizes_of(*bias) != std::vector<int64_t>{n}) fail(op + ": bias", text_of({n}), shape_of(*bias));
}

// How many rows x [..., last] has.
inline int64_t count_rows(const std::string& where, const Tensor& x, int64_t last) {
  const std::vector<int64_t> sizes = sizes_of(x);
  if (sizes.empty() || sizes.back() != last) fail(where, "[..., " + std::to_string(last) + "]", text_of(sizes));
  int64_t count = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) count *= sizes[i];
  return count;
}

// The shape of x [..., K] with another last size.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = last;
  return sizes;
}

// --- new tensors ----------------------------------------------------------------------------------------------------------

inline int32_t code_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    case ScalarType::Char: return aoti_torch_dtype_int8();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float32();
  }
}

// A new tensor. The C function is a few µs faster than the operator that torch::stable::empty calls.
inline Tensor new_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                         [[maybe_unused]] int32_t device = 0) {
  AtenTensorHandle handle;
#if defined(USE_CUDA)
  const int32_t device_type = aoti_torch_device_type_cuda();
#else
  const int32_t device_type = aoti_torch_device_type_cpu();
#endif
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         code_of(type), device_type, device, &handle));
  Tensor out(handle);
#if defined(__linux__) && !defined(USE_CUDA)
  // Large ones ask for huge pages: half of the time of writing a fresh 200 MB is page faults. Advice only.
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(out.data_ptr());
  const uintptr_t end = start + static_cast<uintptr_t>(out.numel()) * out.element_size();
  const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (end > begin + kHugePage) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType type, int32_t device = 0) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return new_tensor(sizes, strides, type, device);
}

}  // namespace inq::registration
