// The operators inq_cpu::* of training: exponents, partition, quantization, optimizer steps. See register_cpu.cpp.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/exponents.h"
#include "cpu/masked_step.h"
#include "cpu/partition.h"
#include "cpu/quantize.h"
#include "register.h"

namespace {

using namespace inq;
using namespace inq::cpu;
using namespace inq::registration;

// One bit a weight. `where()` is asked for its text only where something is wrong.
template <class Where>
void check_bits(const Where& where, const Tensor& t, int64_t numel) {
  const int64_t bytes = (numel + 7) / 8;
  if (t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Byte && t.dim() == 1 && t.numel() == bytes) return;
  check_memory(where(), t);
  check_dtype(where(), t, ScalarType::Byte);
  fail(where(), "shape [" + std::to_string(bytes) + "], a bit for each of " + std::to_string(numel) + " weights",
       shape_of(t));
}

Weights weights(const std::string& where, const Tensor& w) {
  check_memory(where, w);
  const bool bfloat16 = w.scalar_type() == ScalarType::BFloat16;
  if (!bfloat16 && w.scalar_type() != ScalarType::Float) fail(where, "float32 or bfloat16", type_of(w));
  if (w.dim() == 0 || w.numel() == 0) fail(where, "rank ≥ 1 and at least one weight", "shape " + shape_of(w));
  return {w.data_ptr(), bfloat16, w.numel()};
}

const uint8_t* bits_of(const Tensor& t) { return data_of<uint8_t>(t); }

KeySource key_source(const std::string& op, const Tensor& w, const Tensor& mask, const std::optional<Tensor>& keep,
                     bool random, int64_t seed) {
  const Weights values = weights(op + ": w", w);
  check_bits([&] { return op + ": mask"; }, mask, values.numel);
  if (keep) check_bits([&] { return op + ": keep"; }, *keep, values.numel);
  return {values, random, static_cast<uint64_t>(seed), bits_of(mask), keep ? bits_of(*keep) : nullptr};
}

Tensor empty_n1(const Tensor& w) { return new_tensor({w.size(0), 1}, ScalarType::Char); }

Tensor filled_n1(const Tensor& w, int exponent) {
  Tensor n1 = empty_n1(w);
  std::fill_n(static_cast<int8_t*>(n1.mutable_data_ptr()), w.size(0), static_cast<int8_t>(exponent));
  return n1;
}

Tensor exponents_of(const Tensor& w, const Weights& values, const uint8_t* keep, ExponentRule rule, bool channel) {
  if (!channel) return filled_n1(w, tensor_exponent(values, keep, rule));
  Tensor n1 = empty_n1(w);
  row_exponents(values, keep, w.size(0), rule, static_cast<int8_t*>(n1.mutable_data_ptr()));
  return n1;
}

Tensor threshold_tensor(const Tensor& w, Threshold threshold) {
  Tensor result = new_tensor({2}, ScalarType::Long);
  auto* const values = static_cast<int64_t*>(result.mutable_data_ptr());
  values[0] = threshold.key;
  values[1] = threshold.ties;
  return result;
}

Tensor exponents(Tensor w, int64_t bits, bool dense, bool channel, bool mse) {
  const Weights values = weights("exponents: w", w);
  return exponents_of(w, values, nullptr, {format_of("exponents", bits, dense), mse}, channel);
}

Tensor threshold(Tensor w, Tensor mask, std::optional<Tensor> keep, int64_t count, bool random, int64_t seed) {
  return threshold_tensor(
      w, partition_threshold(key_source("partition_threshold", w, mask, keep, random, seed), count));
}

// Both in one: where they can share it, one pass over the weights counts for both.
std::tuple<Tensor, Tensor> exponents_and_threshold(Tensor w, Tensor mask, std::optional<Tensor> keep, int64_t count,
                                                   bool random, int64_t seed, int64_t bits, bool dense, bool channel,
                                                   bool mse) {
  const std::string op = "exponents_and_threshold";
  const KeySource source = key_source(op, w, mask, keep, random, seed);
  const ExponentRule rule{format_of(op, bits, dense), mse};
  if (channel || random) {
    Tensor n1 = exponents_of(w, source.w, source.keep, rule, channel);
    return {n1, threshold_tensor(w, partition_threshold(source, count))};
  }
  if (!mse) {
    if (const auto selected = select_in_one_pass(source, count)) {
      // Exponents are those of all kept weights, and what the mask holds was not looked at.
      const int n1 = selected->masked ? tensor_exponent(source.w, source.keep, rule) : exponent_of(selected->largest);
      return {filled_n1(w, n1), threshold_tensor(w, selected->threshold)};
    }
  }
  const DigitCounts digits = first_digits(source);
  const Threshold selected = partition_threshold(source, count, digits);
  const int n1 = digits.masked ? tensor_exponent(source.w, source.keep, rule) : exponent_of(digits, rule);
  return {filled_n1(w, n1), threshold_tensor(w, selected)};
}

void quantize_with_mask_(Tensor w, Tensor mask, Tensor n1, Tensor threshold, std::optional<Tensor> keep, int64_t bits,
                         bool dense, bool random, int64_t seed) {
  const std::string op = "quantize_with_mask_";
  const KeySource source = key_source(op, w, mask, keep, random, seed);
  const Format format = format_of(op, bits, dense);
  check_memory(op + ": n1", n1);
  check_dtype(op + ": n1", n1, ScalarType::Char);
  if (n1.dim() != 2 || n1.size(0) != w.size(0) || n1.size(1) != 1) {
    fail(op + ": n1", "shape [" + std::to_string(w.size(0)) + ", 1]", shape_of(n1));
  }
  check_memory(op + ": threshold", threshold);
  check_dtype(op + ": threshold", threshold, ScalarType::Long);
  if (threshold.dim() != 1 || threshold.size(0) != 2) fail(op + ": threshold", "shape [2]", shape_of(threshold));
  const auto* const selected = static_cast<const int64_t*>(threshold.data_ptr());
  if (selected[0] < 0) fail(op + ": threshold", "a key ≥ 0", std::to_string(selected[0]));
  quantize_with_mask(source, w.mutable_data_ptr(), static_cast<uint8_t*>(mask.mutable_data_ptr()),
                     static_cast<const int8_t*>(n1.data_ptr()), w.size(0), format, {selected[0], selected[1]});
}

void check_count(const std::string& where, const std::vector<Tensor>& list, size_t expected) {
  if (list.size() != expected) fail(where, std::to_string(expected) + " tensors", std::to_string(list.size()));
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// A tensor beside its parameter `w`: contiguous on the CPU, of this dtype and w's shape. What is right, and all is right
// at every step of a training run, costs no text.
const Tensor& beside(const std::string& op, const char* name, size_t i, const Tensor& t, const Tensor& w,
                     ScalarType dtype) {
  if (t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype && same_shape(t, w)) return t;
  const std::string where = op + ": " + name + "[" + std::to_string(i) + "]";
  check_memory(where, t);
  check_dtype(where, t, dtype);
  fail(where, "shape " + shape_of(w) + " of its parameter", shape_of(t));
}

// `first` and `second` are empty lists where a step has no such state.
std::vector<StepTensor> step_tensors(const std::string& op, const std::vector<Tensor>& params,
                                     const std::vector<Tensor>& grads, const std::vector<Tensor>& masks,
                                     const char* first_name, const std::vector<Tensor>& first,
                                     const char* second_name, const std::vector<Tensor>& second) {
  check_count(op + ": grads", grads, params.size());
  check_count(op + ": masks", masks, params.size());
  if (!first.empty()) check_count(op + ": " + first_name, first, params.size());
  if (!second.empty()) check_count(op + ": " + second_name, second, params.size());
  std::vector<StepTensor> result;
  result.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& w = params[i];
    const ScalarType dtype = w.scalar_type();
    if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Float) {
      fail(op + ": params[" + std::to_string(i) + "]", "float32 or bfloat16", type_of(w));
    }
    beside(op, "params", i, w, w, dtype);
    auto state = [&](const char* name, const std::vector<Tensor>& list) {
      return list.empty() ? nullptr
                          : static_cast<float*>(beside(op, name, i, list[i], w, ScalarType::Float).mutable_data_ptr());
    };
    const bool masked = masks[i].numel() != 0;
    if (masked) check_bits([&] { return op + ": masks[" + std::to_string(i) + "]"; }, masks[i], w.numel());
    result.push_back({w.mutable_data_ptr(), beside(op, "grads", i, grads[i], w, dtype).data_ptr(),
                      dtype == ScalarType::BFloat16, state(first_name, first), state(second_name, second),
                      masked ? bits_of(masks[i]) : nullptr, w.numel()});
  }
  return result;
}

void masked_sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
                 std::vector<Tensor> masks, double lr, double momentum, double dampening, double weight_decay,
                 bool nesterov, bool maximize, bool is_first_step) {
  const std::string op = "masked_sgd_";
  check_count(op + ": momentum_buffers", momentum_buffers, momentum != 0 ? params.size() : 0);
  masked_sgd(step_tensors(op, params, grads, masks, "momentum_buffers", momentum_buffers, "", {}),
             sgd_numbers(lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step));
}

void masked_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> masks, double lr, double beta1, double beta2,
                   double weight_decay, double eps, int64_t step, bool maximize) {
  const std::string op = "masked_adamw_";
  check_count(op + ": exp_avgs", exp_avgs, params.size());
  check_count(op + ": exp_avg_sqs", exp_avg_sqs, params.size());
  if (step < 1) fail(op + ": step", "at least 1", std::to_string(step));
  masked_adamw(step_tensors(op, params, grads, masks, "exp_avgs", exp_avgs, "exp_avg_sqs", exp_avg_sqs),
               adamw_numbers(lr, beta1, beta2, weight_decay, eps, step, maximize));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(inq_cpu, m) {
  m.def("exponents(Tensor w, int bits, bool dense, bool channel, bool mse) -> Tensor");
  m.def(
      "partition_threshold(Tensor w, Tensor mask, Tensor? keep, int count, bool random, int seed) -> Tensor");
  m.def(
      "exponents_and_threshold(Tensor w, Tensor mask, Tensor? keep, int count, bool random, int seed, int bits, "
      "bool dense, bool channel, bool mse) -> (Tensor, Tensor)");
  m.def(
      "quantize_with_mask_(Tensor(a!) w, Tensor(b!) mask, Tensor n1, Tensor threshold, Tensor? keep, int bits, "
      "bool dense, bool random, int seed) -> ()");
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] masks, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool is_first_step) -> ()");
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor[] masks, float lr, float beta1, float beta2, float weight_decay, float eps, int step, bool maximize) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(inq_cpu, CPU, m) {
  m.impl("exponents", TORCH_BOX(&exponents));
  m.impl("partition_threshold", TORCH_BOX(&threshold));
  m.impl("exponents_and_threshold", TORCH_BOX(&exponents_and_threshold));
  m.impl("quantize_with_mask_", TORCH_BOX(&quantize_with_mask_));
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
}
