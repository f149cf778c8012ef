// The operators inq_cuda::* that multiply. See register_cuda.cpp.
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/choose.h"
#include "cuda/choose_hopper.h"
#include "cuda/dense.h"
#include "cuda/linear.h"
#include "cuda/linear_hopper.h"
#include "register_cuda.h"

namespace {

using namespace inq;
using namespace inq::cuda;
using namespace inq::registration;

// A checked weight in a layout of fragments.py.
struct Weight {
  const uint8_t* data;
  const int8_t* exponent;
  const float* scale;
  Number number;
  Levels levels;
  Format format;
  int64_t n, k;
};

// A decoded number times 2^(n1 + exponent) is the weight.
int exponent_of(Number number, Levels levels, Format f) {
  return 1 - magnitudes(f) - base_of(number, levels);
}

// `exponent` and `scale` are made contiguous by the caller: they stay alive in its tensors.
Weight weight_of(const std::string& op, const Tensor& like, const Tensor& weight, const Tensor& exponent,
                 const OptionalTensor& scale, int64_t k, Number number, Format f) {
  const int64_t n = check_weight(op, weight, exponent, scale,
                                 [&](int64_t rows) { return shape_of_weight(number, f, rows, k); });
  for (const Tensor* t : {&weight, &exponent}) check_same_device(op + ": weight", *t, like);
  if (scale) check_same_device(op + ": weight_scale", *scale, like);
  check_aligned(op + ": weight", weight);
  return {static_cast<const uint8_t*>(weight.const_data_ptr()),
          static_cast<const int8_t*>(exponent.const_data_ptr()),
          data_or_null<float>(scale),
          number,
          levels_of(f),
          f,
          n,
          k};
}

Number number_of(const std::string& where, ScalarType type) {
  if (type == ScalarType::Half) return Number::f16;
  if (type == ScalarType::BFloat16) return Number::bf16;
  fail(where, "float16 or bfloat16", name_of(type));
}

// The bias [n] in one piece, of a type that kernels read.
OptionalTensor bias_of(const std::string& op, const OptionalTensor& bias, int64_t n, const Tensor& like) {
  check_bias(op, bias, n);
  if (!bias) return std::nullopt;
  check_same_device(op + ": bias", *bias, like);
  const ScalarType type = bias->scalar_type();
  const bool known = type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
  return torch::stable::contiguous(known ? *bias : torch::stable::to(*bias, ScalarType::Float));
}

Float float_of(ScalarType type) {
  return type == ScalarType::Half ? Float::f16 : type == ScalarType::BFloat16 ? Float::bf16 : Float::f32;
}

// Any type where there is none.
Float type_of_bias(const OptionalTensor& bias) { return bias ? float_of(bias->scalar_type()) : Float::f32; }

// x [..., last] as rows: how many, their distance in elements, and x itself, or a copy where rows are not evenly spaced.
struct Rows {
  Tensor x;
  int64_t count, stride;
};
Rows rows_of(const std::string& where, const Tensor& x, int64_t last) {
  if (!x.is_cuda()) fail(where, kDevice, "one on another device");
  const int64_t count = count_rows(where, x, last);
  if (x.dim() == 2 && (x.stride(1) == 1 || last <= 1) && (x.stride(0) >= last || count <= 1)) {
    return {x, count, std::max<int64_t>(x.stride(0), last)};
  }
  return {torch::stable::contiguous(x), count, last};
}

bool is_aligned(const Tensor& x, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && stride * bytes % 16 == 0;
}

// What both kinds of kernels make [M, N] of; `x` has elements of `number`.
struct Product {
  const Rows& rows;
  const Weight& weight;
  const OptionalTensor& bias;
  const int32_t* rows_exp;
  Tensor& out;
};

void multiply_on_hopper(const char* op, const Product& product, const HopperChoice& choice, const Machine& machine,
                        const OnDevice& here) {
  const Weight& w = product.weight;
  const int64_t m = product.rows.count;
  Tensor partials =
      new_tensor({std::max<int64_t>(linear_hopper_partials(m, w.n, choice), 1)}, ScalarType::Float, here.index);
  const Tensor arrivals = counters(linear_hopper_arrivals(m, w.n, choice), here);
  LinearHopperParams p{};
  p.x = product.rows.x.const_data_ptr();
  p.x_stride = product.rows.stride;
  p.weight = w.data;
  p.weight_exp = w.exponent;
  p.weight_scale = w.scale;
  p.bias = data_or_null<void>(product.bias);
  p.rows_exp = product.rows_exp;
  p.out = product.out.mutable_data_ptr();
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.arrivals = static_cast<int*>(arrivals.mutable_data_ptr());
  p.m = m;
  p.n = w.n;
  p.k = w.k;
  p.magnitudes = magnitudes(w.format);
  p.number = w.number;
  p.levels = w.levels;
  p.bias_type = type_of_bias(product.bias);
  p.out_type = float_of(product.out.scalar_type());
  check_cuda(op, linear_hopper(p, choice, machine.processors, here.stream));
}

// linear, or by `op` linear_dx, by mma.sync.
void multiply_by_mma(Op op, const Product& product, const Machine& machine, const OnDevice& here) {
  const Weight& w = product.weight;
  const bool f16 = w.number == Number::f16;
  const Choice choice = choose(op, machine.processors, machine.capability, product.rows.count, w.n, w.k, f16, w.format.bits);
  Tensor partials = new_tensor({std::max<int64_t>(choice.partials, 1)}, ScalarType::Float, here.index);
  const Tensor flags = counters(choice.flags, here);
  LinearParams p{};
  p.x = product.rows.x.const_data_ptr();
  p.stride = product.rows.stride;
  p.weight = w.data;
  p.weight_exp = w.exponent;
  p.weight_scale = w.scale;
  p.bias = data_or_null<void>(product.bias);
  p.out = product.out.mutable_data_ptr();
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.flags = static_cast<int*>(flags.mutable_data_ptr());
  p.m = product.rows.count;
  p.n = w.n;
  p.k = w.k;
  p.number = w.number;
  p.levels = w.levels;
  p.magnitudes = magnitudes(w.format);
  p.bias_type = type_of_bias(product.bias);
  check_cuda(op == Op::linear ? "linear" : "linear_dx",
             op == Op::linear ? linear(p, choice, here.stream) : linear_dx(p, choice, here.stream));
}

HopperChoice hopper_choice(const Rows& rows, const Weight& w, const Machine& machine) {
  const int bytes = w.number == Number::e4m3 ? 1 : 2;
  return choose_hopper({rows.count, w.n, w.k, bytes, w.format.bits, is_aligned(rows.x, rows.stride, bytes),
                        machine.capability, machine.processors});
}

// Nothing else multiplies e4m3 here. K = 0, the bias alone, is no product to choose for.
HopperChoice fp8_choice(int64_t m, int64_t n, int64_t k, int bits, const Machine& machine) {
  return choose_hopper({m, n, std::max<int64_t>(k, 1), 1, bits, true, machine.capability, machine.processors});
}

Tensor linear_op(Tensor x, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, OptionalTensor bias,
                 int64_t bits, bool dense) {
  const Format format = format_of("linear", bits, dense);
  const Number number = number_of("linear: x", x.scalar_type());
  if (x.dim() == 0) fail("linear: x", "[..., K]", "a scalar");
  const int64_t k = x.size(x.dim() - 1);
  const Rows rows = rows_of("linear: x", x, k);
  const Weight w = weight_of("linear", x, weight, weight_exp, weight_scale, k, number, format);
  const OptionalTensor row_bias = bias_of("linear", bias, w.n, x);
  const OnDevice here(x);
  Tensor out = new_tensor(with_last(x, w.n), x.scalar_type(), here.index);
  if (out.numel() == 0) return out;
  const Machine machine = machine_of(here.index);
  const HopperChoice choice = hopper_choice(rows, w, machine);
  const Product product{rows, w, row_bias, nullptr, out};
  if (choice.use) {
    multiply_on_hopper("linear", product, choice, machine, here);
  } else {
    multiply_by_mma(Op::linear, product, machine, here);
  }
  return out;
}

Tensor linear_dx_op(Tensor grad, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, int64_t k, int64_t bits,
                    bool dense) {
  const Format format = format_of("linear_dx", bits, dense);
  const Number number = number_of("linear_dx: grad", grad.scalar_type());
  check_at_least("linear_dx: k", k, 0);
  const Weight w = weight_of("linear_dx", grad, weight, weight_exp, weight_scale, k, number, format);
  const Rows rows = rows_of("linear_dx: grad", grad, w.n);
  const OnDevice here(grad);
  Tensor out = new_tensor(with_last(grad, k), grad.scalar_type(), here.index);
  if (out.numel() == 0) return out;
  multiply_by_mma(Op::linear_dx, {rows, w, std::nullopt, nullptr, out}, machine_of(here.index), here);
  return out;
}

// Rows of x as e4m3 and a power of two each, then the product, scaled back. On Hopper alone.
Tensor linear_fp8_op(Tensor x, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, OptionalTensor bias,
                     int64_t bits, bool dense) {
  const Format format = format_of("linear_fp8", bits, dense);
  const ScalarType type = x.scalar_type();
  if (type != ScalarType::Half && type != ScalarType::BFloat16 && type != ScalarType::Float) {
    fail("linear_fp8: x", "float32, float16 or bfloat16", name_of(type));
  }
  if (x.dim() == 0) fail("linear_fp8: x", "[..., K]", "a scalar");
  const int64_t k = x.size(x.dim() - 1);
  const Rows rows = rows_of("linear_fp8: x", x, k);
  const Weight w = weight_of("linear_fp8", x, weight, weight_exp, weight_scale, k, Number::e4m3, format);
  const OptionalTensor row_bias = bias_of("linear_fp8", bias, w.n, x);
  const OnDevice here(x);
  const Machine machine = machine_of(here.index);
  if (machine.capability != 90) {
    fail("linear_fp8: x", "a device of compute capability 9.0", std::to_string(machine.capability));
  }
  Tensor out = new_tensor(with_last(x, w.n), type, here.index);
  if (out.numel() == 0) return out;
  // A tensor map wants rows of whole 16 bytes.
  const int64_t stride = (k + 15) / 16 * 16;
  Tensor values = new_tensor({rows.count, std::max<int64_t>(stride, 16)}, ScalarType::Byte, here.index);
  Tensor exponents = new_tensor({rows.count}, ScalarType::Int, here.index);
  QuantizeRowsParams q{};
  q.x = rows.x.const_data_ptr();
  q.x_stride = rows.stride;
  q.values = static_cast<uint8_t*>(values.mutable_data_ptr());
  q.values_stride = stride;
  q.exponents = static_cast<int32_t*>(exponents.mutable_data_ptr());
  q.m = rows.count;
  q.k = k;
  q.type = float_of(type);
  check_cuda("linear_fp8", quantize_rows(q, here.stream));
  const Rows quantized{values, rows.count, stride};
  const HopperChoice choice = fp8_choice(rows.count, w.n, k, format.bits, machine);
  multiply_on_hopper("linear_fp8", {quantized, w, row_bias, static_cast<const int32_t*>(exponents.const_data_ptr()), out},
                     choice, machine, here);
  return out;
}

// ±2^(kBase + i) as [N, K] of a 16-bit dtype, for the library's product.
Tensor decode_op(Tensor weight, int64_t n, int64_t k, int64_t bits, bool dense, ScalarType dtype) {
  const Format format = format_of("decode", bits, dense);
  const Number number = number_of("decode: dtype", dtype);
  check_at_least("decode: n", n, 0);
  check_at_least("decode: k", k, 0);
  check("decode: weight", weight, ScalarType::Byte, shape_of_weight(number, format, n, k));
  check_aligned("decode: weight", weight);
  const OnDevice here(weight);
  Tensor out = new_tensor({n, k}, dtype, here.index);
  check_cuda("decode", decode_dense({static_cast<const uint8_t*>(weight.const_data_ptr()),
                                     static_cast<uint16_t*>(out.mutable_data_ptr()), n, k, number, levels_of(format)},
                                    here.stream));
  return out;
}

// float32 sums [M, N] of products with decode's numbers, as linear's output.
Tensor finish_op(Tensor sums, Tensor weight_exp, OptionalTensor weight_scale, OptionalTensor bias, int64_t bits,
                 bool dense, ScalarType dtype) {
  const Format format = format_of("finish", bits, dense);
  const Number number = number_of("finish: dtype", dtype);
  if (sums.dim() != 2) fail("finish: sums", "[M, N]", shape_of(sums));
  const int64_t m = sums.size(0), n = sums.size(1);
  check("finish: sums", sums, ScalarType::Float, {m, n});
  check("finish: weight_exp", weight_exp, ScalarType::Char, {n, 1});
  check_same_device("finish: weight_exp", weight_exp, sums);
  if (weight_scale) {
    check("finish: weight_scale", *weight_scale, ScalarType::Float, {n, 1});
    check_same_device("finish: weight_scale", *weight_scale, sums);
  }
  const OptionalTensor row_bias = bias_of("finish", bias, n, sums);
  const OnDevice here(sums);
  Tensor out = new_tensor({m, n}, dtype, here.index);
  FinishParams p{};
  p.sums = static_cast<const float*>(sums.const_data_ptr());
  p.weight_exp = static_cast<const int8_t*>(weight_exp.const_data_ptr());
  p.weight_scale = data_or_null<float>(weight_scale);
  p.bias = data_or_null<void>(row_bias);
  p.out = out.mutable_data_ptr();
  p.m = m;
  p.n = n;
  p.exponent = exponent_of(number, levels_of(format), format);
  p.bias_type = type_of_bias(row_bias);
  p.out_type = float_of(dtype);
  check_cuda("finish", finish_sums(p, here.stream));
  return out;
}

// Which kernel a product takes on a machine, in words: a pure function, for `inq doctor --plan` and tests.
std::string plan_op(std::string op, int64_t m, int64_t n, int64_t k, int64_t bits, bool dense, bool f16, bool aligned,
                    int64_t capability, int64_t processors) {
  const Format format = format_of("plan", bits, dense);
  const bool fp8 = op == "linear_fp8";
  if (op != "linear" && op != "linear_dx" && !fp8) fail("plan: op", "linear, linear_dx or linear_fp8", op);
  const int sm = static_cast<int>(capability), count = static_cast<int>(processors);
  if (op != "linear_dx") {
    const HopperChoice h = choose_hopper({m, n, k, fp8 ? 1 : 2, format.bits, aligned || fp8, sm, count});
    if (h.use) {
      return "wgmma: tiles of " + std::to_string(h.rows) + " × " + std::to_string(h.tokens) + ", splits " +
             std::to_string(h.splits);
    }
    if (fp8) return sm == 90 ? "wgmma: tiles of another M" : "none: e4m3 products are Hopper's here";
  }
  const Choice c = choose(op == "linear" ? Op::linear : Op::linear_dx, count, sm, m, n, k, f16, format.bits);
  return "mma.sync: tiles of " + std::to_string(c.rows) + " × " + std::to_string(c.tokens) + ", blocks " +
         std::to_string(c.ctas * c.m_tiles) + ", stages " + std::to_string(c.stages);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(inq_cuda, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor weight_exp, Tensor? weight_scale, Tensor? bias, int bits, bool dense) "
      "-> Tensor");
  m.def(
      "linear_dx(Tensor grad, Tensor weight, Tensor weight_exp, Tensor? weight_scale, SymInt k, int bits, bool dense) "
      "-> Tensor");
  m.def(
      "linear_fp8(Tensor x, Tensor weight, Tensor weight_exp, Tensor? weight_scale, Tensor? bias, int bits, "
      "bool dense) -> Tensor");
  m.def("decode(Tensor weight, SymInt n, SymInt k, int bits, bool dense, ScalarType dtype) -> Tensor");
  m.def(
      "finish(Tensor sums, Tensor weight_exp, Tensor? weight_scale, Tensor? bias, int bits, bool dense, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "plan(str op, int m, int n, int k, int bits, bool dense, bool f16, bool aligned, int capability, "
      "int processors) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(inq_cuda, CompositeExplicitAutograd, m) { m.impl("plan", TORCH_BOX(&plan_op)); }

STABLE_TORCH_LIBRARY_IMPL(inq_cuda, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("linear_dx", TORCH_BOX(&linear_dx_op));
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8_op));
  m.impl("decode", TORCH_BOX(&decode_op));
  m.impl("finish", TORCH_BOX(&finish_op));
}
