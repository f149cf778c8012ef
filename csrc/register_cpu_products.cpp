// The operators inq_cpu::* that multiply, and their layout. See register_cpu.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/conv2d.h"
#include "cpu/layout.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/prepack.h"

namespace {

using namespace inq;
using namespace inq::cpu;


// --- products with packed weights: prepack, unprepack, linear, linear_dx, conv2d --------------------------------------

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::string text_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

#define INQ_CHECK(condition, op, argument, expected, got) \
  STD_TORCH_CHECK(condition, "inq_cpu.", op, ": ", argument, ": expected ", expected, ", got ", got)

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  AtenTensorHandle handle;
  int32_t code = 0;
  switch (type) {
    case ScalarType::Byte: code = aoti_torch_dtype_uint8(); break;
    case ScalarType::BFloat16: code = aoti_torch_dtype_bfloat16(); break;
    default: code = aoti_torch_dtype_float32(); break;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  return empty(sizes, strides, type);
}

Format format_of(const char* op, int64_t bits, bool dense) {
  INQ_CHECK(bits >= 2 && bits <= 5, op, "bits", "2, 3, 4 or 5", bits);
  return {static_cast<int>(bits), dense};
}

DType dtype_of(const char* op, const char* argument, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  INQ_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, argument, "float32 or bfloat16",
            torch::headeronly::toString(type));
  return type == ScalarType::Float ? DType::float32 : DType::bfloat16;
}

void check_bytes(const char* op, const Tensor& weight, const std::vector<int64_t>& sizes) {
  const auto got = weight.sizes();
  const bool fits = weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() && got.size() == sizes.size() &&
                    std::equal(sizes.begin(), sizes.end(), got.begin());
  INQ_CHECK(fits, op, "weight", "contiguous uint8 " + text_of({sizes.data(), sizes.size()}),
            torch::headeronly::toString(weight.scalar_type()) + std::string(" ") + text_of(got));
}

// The arguments that every product has, checked; `scale` is kept alive by the caller's optional.
Weight weight_of(const char* op, const Tensor& weight, const Tensor& exponent, const OptionalTensor& scale, int64_t k,
                 Format format) {
  INQ_CHECK(exponent.scalar_type() == ScalarType::Char && exponent.dim() == 2 && exponent.size(1) == 1 &&
                exponent.is_contiguous(),
            op, "weight_exp", "contiguous int8 [N, 1]",
            torch::headeronly::toString(exponent.scalar_type()) + std::string(" ") + text_of(exponent.sizes()));
  const int64_t n = exponent.size(0);
  check_bytes(op, weight, {panels_of(n), tiles_of(k), tile_bytes(format)});
  if (scale) {
    INQ_CHECK(scale->scalar_type() == ScalarType::Float && scale->numel() == n && scale->is_contiguous(), op,
              "weight_scale", "contiguous float32 [" + std::to_string(n) + ", 1]",
              torch::headeronly::toString(scale->scalar_type()) + std::string(" ") + text_of(scale->sizes()));
  }
  return {static_cast<const uint8_t*>(weight.const_data_ptr()), static_cast<const int8_t*>(exponent.const_data_ptr()),
          scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr, format, n, k};
}

// The bias as contiguous float32 [n].
OptionalTensor bias_of(const char* op, const OptionalTensor& bias, int64_t n) {
  if (!bias) return std::nullopt;
  INQ_CHECK(bias->dim() == 1 && bias->size(0) == n, op, "bias", "[" + std::to_string(n) + "]", text_of(bias->sizes()));
  if (bias->scalar_type() == ScalarType::Float) return torch::stable::contiguous(*bias);
  return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

Tensor prepack_op(Tensor weight, int64_t k, int64_t bits, bool dense) {
  const Format format = format_of("prepack", bits, dense);
  INQ_CHECK(k >= 0, "prepack", "k", "at least 0", k);
  INQ_CHECK(weight.dim() == 2, "prepack", "weight", "two dimensions", text_of(weight.sizes()));
  const int64_t n = weight.size(0);
  check_bytes("prepack", weight, {n, row_bytes(format, k)});
  Tensor out = empty({panels_of(n), tiles_of(k), tile_bytes(format)}, ScalarType::Byte);
  prepack(static_cast<const uint8_t*>(weight.const_data_ptr()), static_cast<uint8_t*>(out.mutable_data_ptr()), n, k,
          format);
  return out;
}

Tensor unprepack_op(Tensor weight, int64_t n, int64_t k, int64_t bits, bool dense) {
  const Format format = format_of("unprepack", bits, dense);
  INQ_CHECK(n >= 0 && k >= 0, "unprepack", "n, k", "at least 0", std::to_string(n) + ", " + std::to_string(k));
  check_bytes("unprepack", weight, {panels_of(n), tiles_of(k), tile_bytes(format)});
  Tensor out = empty({n, row_bytes(format, k)}, ScalarType::Byte);
  unprepack(static_cast<const uint8_t*>(weight.const_data_ptr()), static_cast<uint8_t*>(out.mutable_data_ptr()), n, k,
            format);
  return out;
}

// Everything but the last dimension, which must be `last`.
std::vector<int64_t> rows_of(const char* op, const char* argument, const Tensor& t, int64_t last) {
  INQ_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == last, op, argument, "[..., " + std::to_string(last) + "]",
            text_of(t.sizes()));
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

Tensor linear_op(Tensor x, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, OptionalTensor bias,
                 int64_t bits, bool dense) {
  const Format format = format_of("linear", bits, dense);
  const DType type = dtype_of("linear", "x", x);
  INQ_CHECK(x.dim() >= 1, "linear", "x", "[..., K]", "a scalar");
  const int64_t k = x.size(x.dim() - 1);
  const Weight w = weight_of("linear", weight, weight_exp, weight_scale, k, format);
  const OptionalTensor row_bias = bias_of("linear", bias, w.n);
  std::vector<int64_t> sizes = rows_of("linear", "x", x, k);
  const int64_t m = product(sizes);
  sizes.push_back(w.n);
  Tensor out = empty(sizes, x.scalar_type());
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  linear({rows.const_data_ptr(), m, type, w, row_bias ? static_cast<const float*>(row_bias->const_data_ptr()) : nullptr,
          out.mutable_data_ptr()});
  return out;
}

Tensor linear_dx_op(Tensor grad, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, int64_t k, int64_t bits,
                    bool dense) {
  const Format format = format_of("linear_dx", bits, dense);
  const DType type = dtype_of("linear_dx", "grad", grad);
  INQ_CHECK(k >= 0, "linear_dx", "k", "at least 0", k);
  const Weight w = weight_of("linear_dx", weight, weight_exp, weight_scale, k, format);
  std::vector<int64_t> sizes = rows_of("linear_dx", "grad", grad, w.n);
  const int64_t m = product(sizes);
  sizes.push_back(k);
  Tensor out = empty(sizes, grad.scalar_type());
  const Tensor rows = grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
  linear_dx({rows.const_data_ptr(), m, type, w, out.mutable_data_ptr()});
  return out;
}

// Channels innermost, whatever torch makes of strides of dimensions of size 1.
bool channels_last(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  int64_t expected = 1;
  for (const int i : {1, 3, 2, 0}) {
    if (size[i] != 1 && stride[i] != expected) return false;
    expected *= size[i];
  }
  return true;
}

Tensor conv2d_op(Tensor x, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, OptionalTensor bias,
                 std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                 std::vector<int64_t> dilation, int64_t groups, int64_t bits, bool dense) {
  const Format format = format_of("conv2d", bits, dense);
  Conv2dArgs args{};
  args.type = dtype_of("conv2d", "x", x);
  INQ_CHECK(x.dim() == 4, "conv2d", "x", "[B, C, H, W]", text_of(x.sizes()));
  INQ_CHECK(groups > 0 && x.size(1) % groups == 0, "conv2d", "groups", "a divisor of " + std::to_string(x.size(1)), groups);
  auto two = [](const char* name, const std::vector<int64_t>& values, int64_t least, int64_t (&to)[2]) {
    INQ_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, "conv2d", name,
              "two of at least " + std::to_string(least), text_of({values.data(), values.size()}));
    std::copy(values.begin(), values.end(), to);
  };
  two("kernel_size", kernel_size, 1, args.kernel);
  two("stride", stride, 1, args.stride);
  two("padding", padding, 0, args.padding);
  two("dilation", dilation, 1, args.dilation);
  args.groups = groups;
  args.batch = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  const int64_t k = args.channels / groups * args.kernel[0] * args.kernel[1];
  args.weight = weight_of("conv2d", weight, weight_exp, weight_scale, k, format);
  const int64_t n = args.weight.n;
  INQ_CHECK(n % groups == 0, "conv2d", "weight_exp", "a multiple of groups = " + std::to_string(groups) + " rows", n);
  for (int i = 0; i < 2; ++i) {
    const int64_t room = x.size(2 + i) + 2 * args.padding[i] - args.dilation[i] * (args.kernel[i] - 1) - 1;
    INQ_CHECK(room >= 0, "conv2d", "x", "an image at least as large as the kernel", text_of(x.sizes()));
    args.out_size[i] = room / args.stride[i] + 1;
  }
  const OptionalTensor row_bias = bias_of("conv2d", bias, n);
  args.bias = row_bias ? static_cast<const float*>(row_bias->const_data_ptr()) : nullptr;
  // The kernels want channels innermost; other images are brought into that order, and their output back.
  using torch::headeronly::MemoryFormat;
  const bool last = channels_last(x), want_last = last && !x.is_contiguous();
  const Tensor image = last ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  args.x = image.const_data_ptr();
  const int64_t h = args.out_size[0], w = args.out_size[1];
  Tensor out = empty({args.batch, n, h, w}, {h * w * n, 1, w * n, n}, x.scalar_type());
  args.out = out.mutable_data_ptr();
  conv2d(args);
  return want_last ? out : torch::stable::contiguous(out);
}

std::string plan_op(std::string op, int64_t m, int64_t n, int64_t k, std::string dtype, int64_t bits, std::string isa,
                    int64_t threads) {
  return to_string(plan({op_from_name(op), m, n, k, dtype_from_name(dtype), format_of("plan", bits, false).bits,
                         isa_from_name(isa), static_cast<int>(threads)}));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(inq_cpu, m) {
  m.def("prepack(Tensor weight, int k, int bits, bool dense) -> Tensor");
  m.def("unprepack(Tensor weight, int n, int k, int bits, bool dense) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor weight_exp, Tensor? weight_scale, Tensor? bias, int bits, bool dense) "
      "-> Tensor");
  m.def(
      "linear_dx(Tensor grad, Tensor weight, Tensor weight_exp, Tensor? weight_scale, int k, int bits, bool dense) "
      "-> Tensor");
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor weight_exp, Tensor? weight_scale, Tensor? bias, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, int bits, bool dense) -> Tensor");
  m.def("plan(str op, int m, int n, int k, str dtype, int bits, str isa, int threads) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(inq_cpu, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&plan_op));
}

STABLE_TORCH_LIBRARY_IMPL(inq_cpu, CPU, m) {
  m.impl("prepack", TORCH_BOX(&prepack_op));
  m.impl("unprepack", TORCH_BOX(&unprepack_op));
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("linear_dx", TORCH_BOX(&linear_dx_op));
  m.impl("conv2d", TORCH_BOX(&conv2d_op));
}
