// The operators inq_cpu::* that multiply, and their layout. See register_cpu.cpp.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/isa.h"
#include "cpu/layout.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/prepack.h"
#include "register.h"

namespace {

using namespace inq;
using namespace inq::cpu;
using namespace inq::registration;

// The arguments that every product has, checked; `scale` is kept alive by the caller's optional.
Weight weight_of(const std::string& op, const Tensor& weight, const Tensor& exponent, const OptionalTensor& scale,
                 int64_t k, Format format) {
  const int64_t n = check_weight(op, weight, exponent, scale, [&](int64_t rows) {
    return std::vector<int64_t>{panels_of(rows), tiles_of(k), tile_bytes(format)};
  });
  return {data_of<uint8_t>(weight), data_of<int8_t>(exponent), data_or_null<float>(scale), format, n, k};
}

// The bias as contiguous float32 [n].
OptionalTensor bias_of(const std::string& op, const OptionalTensor& bias, int64_t n) {
  check_bias(op, bias, n);
  if (!bias) return std::nullopt;
  if (bias->scalar_type() == ScalarType::Float) return torch::stable::contiguous(*bias);
  return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

Tensor prepack_op(Tensor weight, int64_t k, int64_t bits, bool dense) {
  const Format format = format_of("prepack", bits, dense);
  check_at_least("prepack: k", k, 0);
  if (weight.dim() != 2) fail("prepack: weight", "two dimensions", shape_of(weight));
  const int64_t n = weight.size(0);
  check("prepack: weight", weight, ScalarType::Byte, {n, row_bytes(format, k)});
  Tensor out = new_tensor({panels_of(n), tiles_of(k), tile_bytes(format)}, ScalarType::Byte);
  prepack(data_of<uint8_t>(weight), static_cast<uint8_t*>(out.data_ptr()), n, k, format);
  return out;
}

Tensor unprepack_op(Tensor weight, int64_t n, int64_t k, int64_t bits, bool dense) {
  const Format format = format_of("unprepack", bits, dense);
  check_at_least("unprepack: n", n, 0);
  check_at_least("unprepack: k", k, 0);
  check("unprepack: weight", weight, ScalarType::Byte, {panels_of(n), tiles_of(k), tile_bytes(format)});
  Tensor out = new_tensor({n, row_bytes(format, k)}, ScalarType::Byte);
  unprepack(data_of<uint8_t>(weight), static_cast<uint8_t*>(out.data_ptr()), n, k, format);
  return out;
}

Tensor linear_op(Tensor x, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, OptionalTensor bias,
                 int64_t bits, bool dense) {
  const Format format = format_of("linear", bits, dense);
  const DType type = dtype_of("linear: x", x.scalar_type());
  if (x.dim() == 0) fail("linear: x", "[..., K]", "a scalar");
  const int64_t k = x.size(x.dim() - 1);
  const Weight w = weight_of("linear", weight, weight_exp, weight_scale, k, format);
  const OptionalTensor row_bias = bias_of("linear", bias, w.n);
  const int64_t m = count_rows("linear: x", x, k);
  Tensor out = new_tensor(with_last(x, w.n), x.scalar_type());
  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  linear({rows.const_data_ptr(), m, type, w, row_bias ? static_cast<const float*>(row_bias->const_data_ptr()) : nullptr,
          out.mutable_data_ptr()});
  return out;
}

Tensor linear_dx_op(Tensor grad, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, int64_t k, int64_t bits,
                    bool dense) {
  const Format format = format_of("linear_dx", bits, dense);
  const DType type = dtype_of("linear_dx: grad", grad.scalar_type());
  check_at_least("linear_dx: k", k, 0);
  const Weight w = weight_of("linear_dx", weight, weight_exp, weight_scale, k, format);
  const int64_t m = count_rows("linear_dx: grad", grad, w.n);
  Tensor out = new_tensor(with_last(grad, k), grad.scalar_type());
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
  args.type = dtype_of("conv2d: x", x.scalar_type());
  if (x.dim() != 4) fail("conv2d: x", "[B, C, H, W]", shape_of(x));
  if (groups < 1 || x.size(1) % groups != 0) {
    fail("conv2d: groups", "a divisor of " + std::to_string(x.size(1)), std::to_string(groups));
  }
  // Below 2^31 no product or sum of two can overflow.
  auto two = [](const char* name, const std::vector<int64_t>& values, int64_t least, int64_t (&to)[2]) {
    auto outside = [&](int64_t value) { return value < least || value > INT32_MAX; };
    if (values.size() != 2 || outside(values[0]) || outside(values[1])) {
      fail(std::string("conv2d: ") + name, "two of at least " + std::to_string(least) + " and under 2^31",
           text_of(values));
    }
    std::copy(values.begin(), values.end(), to);
  };
  two("kernel_size", kernel_size, 1, args.kernel);
  two("stride", stride, 1, args.stride);
  two("padding", padding, 0, args.padding);
  two("dilation", dilation, 1, args.dilation);
  args.groups = groups;
  args.batch = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  const int64_t taps = args.kernel[0] * args.kernel[1], channels = args.channels / groups;
  if (channels > 0 && taps > INT64_MAX / channels) {
    fail("conv2d: kernel_size", "fewer than 2^63 weights a row", text_of(kernel_size) + " of " + std::to_string(channels));
  }
  const int64_t k = channels * taps;
  args.weight = weight_of("conv2d", weight, weight_exp, weight_scale, k, format);
  const int64_t n = args.weight.n;
  if (n % groups != 0) {
    fail("conv2d: weight_exp", "a multiple of groups = " + std::to_string(groups) + " rows", std::to_string(n));
  }
  for (int i = 0; i < 2; ++i) {
    const int64_t room = x.size(2 + i) + 2 * args.padding[i] - args.dilation[i] * (args.kernel[i] - 1) - 1;
    if (room < 0) fail("conv2d: x", "an image at least as large as the kernel", shape_of(x));
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
  Tensor out = new_tensor({args.batch, n, h, w}, {h * w * n, 1, w * n, n}, x.scalar_type());
  args.out = out.mutable_data_ptr();
  conv2d(args);
  return want_last ? out : torch::stable::contiguous(out);
}

std::string plan_op(std::string op, int64_t m, int64_t n, int64_t k, std::string dtype, std::string isa, int64_t threads) {
  check_at_least("plan: m", m, 0);
  check_at_least("plan: n", n, 0);
  check_at_least("plan: k", k, 0);
  return to_string(plan({op_from_name(op), m, n, k, dtype_from_name(dtype), isa_from_name(isa, "plan: isa"),
                         static_cast<int>(threads)}));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(inq_cpu, m) {
  m.def("prepack(Tensor weight, SymInt k, int bits, bool dense) -> Tensor");
  m.def("unprepack(Tensor weight, SymInt n, SymInt k, int bits, bool dense) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor weight_exp, Tensor? weight_scale, Tensor? bias, int bits, bool dense) "
      "-> Tensor");
  m.def(
      "linear_dx(Tensor grad, Tensor weight, Tensor weight_exp, Tensor? weight_scale, SymInt k, int bits, bool dense) "
      "-> Tensor");
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor weight_exp, Tensor? weight_scale, Tensor? bias, SymInt[2] kernel_size, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, int bits, bool dense) -> Tensor");
  m.def("plan(str op, int m, int n, int k, str dtype, str isa, int threads) -> str");
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
