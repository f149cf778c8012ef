// The operators inq_cuda::* of training and storage: exponents, partition, freezing, optimizer steps, codes. See
// register_cuda.cpp.
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/upload.h"
#include "register_cuda.h"

namespace {

using namespace inq;
using namespace inq::cuda;
using namespace inq::registration;

DType dtype_of(const std::string& where, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: fail(where, "float32, bfloat16 or float16", type_of(t));
  }
}

// Empty for an absent one: a bit for each of numel weights otherwise.
const uint8_t* bits_of(const std::string& where, const Tensor& t, int64_t numel, const Tensor& like) {
  if (t.numel() == 0) return nullptr;
  check(where, t, ScalarType::Byte, {(numel + 7) / 8});
  check_same_device(where, t, like);
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

Tensor or_empty(const OptionalTensor& t, int32_t device) {
  return t ? *t : new_tensor({0}, ScalarType::Byte, device);
}

Tensor bytes(int64_t count, int32_t device) {
  return new_tensor({std::max<int64_t>(count, 16)}, ScalarType::Byte, device);
}

// A table of structs in device memory.
template <class T>
Tensor uploaded(const char* op, const std::vector<T>& table, const OnDevice& here) {
  const int64_t size = static_cast<int64_t>(table.size() * sizeof(T)), whole = (size + 15) / 16 * 16;
  std::vector<char> host(static_cast<size_t>(whole));
  if (size > 0) std::memcpy(host.data(), table.data(), static_cast<size_t>(size));
  Tensor device = bytes(whole, here.index);
  check_cuda(op, upload(device.mutable_data_ptr(), host.data(), whole, here.stream));
  return device;
}

// --- partition and freezing -----------------------------------------------------------------------------------------------

// The weights of one call, in both of the kernels' tables, which differ in the size of a chunk.
struct Weights {
  std::string op;
  std::vector<WeightTensor> table;
  DType dtype{};
  int64_t rows = 0;

  explicit Weights(std::string op) : op(std::move(op)) {}

  void add(const Tensor& w, const Tensor& mask, const Tensor& keep, int64_t count, int64_t seed, const Tensor& like) {
    const std::string where = op + ": w";
    check_memory(where, w);
    check_same_device(where, w, like);
    const DType type = dtype_of(where, w);
    if (!table.empty() && type != dtype) fail(where, "one dtype", type_of(w));
    dtype = type;
    if (w.dim() == 0 || w.numel() == 0) fail(where, "rank ≥ 1 and at least one weight", "shape " + shape_of(w));
    const int64_t n = w.size(0), numel = w.numel();
    WeightTensor t{};
    t.w = const_cast<void*>(w.const_data_ptr());
    t.mask = const_cast<uint8_t*>(bits_of(op + ": mask", mask, numel, like));
    t.keep = bits_of(op + ": keep", keep, numel, like);
    t.numel = numel;
    t.rows = n;
    t.length = numel / n;
    t.first_row = rows;
    t.seed = static_cast<uint64_t>(seed);
    t.count = count;
    table.push_back(t);
    rows += n;
  }

  // The table with chunks of this many weights; how many there are in all.
  std::pair<Tensor, int64_t> chunked(int64_t chunk, const OnDevice& here) {
    int64_t chunks = 0;
    for (WeightTensor& t : table) {
      t.first_chunk = chunks;
      chunks += chunks_of(t.numel, chunk);
    }
    return {uploaded(op.c_str(), table, here), chunks};
  }

  // Thresholds and exponents of all tensors; null for what is not wanted.
  void partition(int64_t* thresholds, int8_t* n1, const PartitionChoice& choice, Format format, const OnDevice& here) {
    std::vector<Tensor> lists;
    if (thresholds != nullptr) {
      for (WeightTensor& t : table) {
        t.capacity = list_capacity(t.numel);
        lists.push_back(new_tensor({t.capacity}, ScalarType::Int, here.index));
        t.list = static_cast<uint32_t*>(lists.back().mutable_data_ptr());
      }
    }
    const auto [tensors, chunks] = chunked(kPartitionChunk, here);
    const int64_t count = static_cast<int64_t>(table.size());
    Tensor states = bytes(count * static_cast<int64_t>(sizeof(PartitionState)), here.index);
    PartitionParams p{};
    p.tensors = static_cast<const WeightTensor*>(tensors.const_data_ptr());
    p.tensor_count = static_cast<int>(count);
    p.chunk = kPartitionChunk;
    p.chunks = chunks;
    p.rows = rows;
    p.states = static_cast<PartitionState*>(states.mutable_data_ptr());
    p.thresholds = thresholds;
    p.n1 = n1;
    p.format = format;
    check_cuda(op.c_str(), inq::cuda::partition(p, choice, here.stream));
  }

  void freeze(const int64_t* thresholds, const int8_t* n1, bool random, Format format, const OnDevice& here) {
    const auto [tensors, chunks] = chunked(kFreezeChunk, here);
    const int64_t count = static_cast<int64_t>(table.size());
    Tensor scratch = bytes(freeze_scratch_bytes(count, chunks), here.index);
    FreezeParams p{};
    p.tensors = static_cast<const WeightTensor*>(tensors.const_data_ptr());
    p.tensor_count = static_cast<int>(count);
    p.chunks = chunks;
    p.thresholds = thresholds;
    p.n1 = n1;
    p.frozen = static_cast<unsigned long long*>(scratch.mutable_data_ptr());
    p.format = format;
    check_cuda(op.c_str(), quantize_with_mask(p, {dtype, random}, here.stream));
  }
};

Tensor new_n1(const Tensor& w, const OnDevice& here) { return new_tensor({w.size(0), 1}, ScalarType::Char, here.index); }

Tensor exponents(Tensor w, int64_t bits, bool dense, bool channel, bool mse) {
  const Format format = format_of("exponents", bits, dense);
  check_memory("exponents: w", w);
  const OnDevice here(w);
  const Tensor none = new_tensor({0}, ScalarType::Byte, here.index);
  Weights weights("exponents");
  weights.add(w, none, none, 0, 0, w);
  Tensor n1 = new_n1(w, here);
  weights.partition(nullptr, static_cast<int8_t*>(n1.mutable_data_ptr()), {weights.dtype, false, channel, mse}, format,
                    here);
  return n1;
}

Tensor threshold(Tensor w, Tensor mask, OptionalTensor keep, int64_t count, bool random, int64_t seed) {
  check_memory("partition_threshold: w", w);
  const OnDevice here(w);
  Weights weights("partition_threshold");
  weights.add(w, mask, or_empty(keep, here.index), count, seed, w);
  Tensor found = new_tensor({2}, ScalarType::Long, here.index);
  weights.partition(static_cast<int64_t*>(found.mutable_data_ptr()), nullptr, {weights.dtype, random, false, false}, {},
                    here);
  return found;
}

std::tuple<Tensor, Tensor> exponents_and_threshold(Tensor w, Tensor mask, OptionalTensor keep, int64_t count,
                                                   bool random, int64_t seed, int64_t bits, bool dense, bool channel,
                                                   bool mse) {
  const Format format = format_of("exponents_and_threshold", bits, dense);
  check_memory("exponents_and_threshold: w", w);
  const OnDevice here(w);
  Weights weights("exponents_and_threshold");
  weights.add(w, mask, or_empty(keep, here.index), count, seed, w);
  Tensor n1 = new_n1(w, here), found = new_tensor({2}, ScalarType::Long, here.index);
  weights.partition(static_cast<int64_t*>(found.mutable_data_ptr()), static_cast<int8_t*>(n1.mutable_data_ptr()),
                    {weights.dtype, random, channel, mse}, format, here);
  return {n1, found};
}

void quantize_with_mask_(Tensor w, Tensor mask, Tensor n1, Tensor threshold, OptionalTensor keep, int64_t bits,
                         bool dense, bool random, int64_t seed) {
  const std::string op = "quantize_with_mask_";
  const Format format = format_of(op, bits, dense);
  check_memory(op + ": w", w);
  const OnDevice here(w);
  Weights weights(op);
  weights.add(w, mask, or_empty(keep, here.index), 0, seed, w);
  check(op + ": mask", mask, ScalarType::Byte, {(w.numel() + 7) / 8});
  check(op + ": n1", n1, ScalarType::Char, {w.size(0), 1});
  check(op + ": threshold", threshold, ScalarType::Long, {2});
  check_same_device(op + ": n1", n1, w);
  check_same_device(op + ": threshold", threshold, w);
  weights.freeze(static_cast<const int64_t*>(threshold.const_data_ptr()),
                 static_cast<const int8_t*>(n1.const_data_ptr()), random, format, here);
}

void check_count(const std::string& where, size_t got, size_t expected) {
  if (got != expected) fail(where, std::to_string(expected) + " of them", std::to_string(got));
}

// A portion of many weights in the launches of one. `keeps`: empty tensors where nothing is pruned.
void freeze_portion_(std::vector<Tensor> ws, std::vector<Tensor> masks, std::vector<Tensor> n1s,
                     std::vector<Tensor> keeps, std::vector<int64_t> counts, bool derive, int64_t bits, bool dense,
                     bool channel, bool mse, bool random, std::vector<int64_t> seeds) {
  const std::string op = "freeze_portion_";
  const Format format = format_of(op, bits, dense);
  if (ws.empty()) return;
  check_count(op + ": masks", masks.size(), ws.size());
  check_count(op + ": n1s", n1s.size(), ws.size());
  check_count(op + ": keeps", keeps.size(), ws.size());
  check_count(op + ": counts", counts.size(), ws.size());
  check_count(op + ": seeds", seeds.size(), ws.size());
  check_memory(op + ": w", ws[0]);
  const OnDevice here(ws[0]);
  Weights weights(op);
  for (size_t i = 0; i < ws.size(); ++i) {
    weights.add(ws[i], masks[i], keeps[i], counts[i], seeds[i], ws[0]);
    check(op + ": masks", masks[i], ScalarType::Byte, {(ws[i].numel() + 7) / 8});
    check(op + ": n1s", n1s[i], ScalarType::Char, {ws[i].size(0), 1});
    check_same_device(op + ": n1s", n1s[i], ws[0]);
  }
  Tensor thresholds = new_tensor({static_cast<int64_t>(ws.size()), 2}, ScalarType::Long, here.index);
  Tensor n1 = new_tensor({weights.rows}, ScalarType::Char, here.index);
  auto* const found = static_cast<int64_t*>(thresholds.mutable_data_ptr());
  auto* const all = static_cast<int8_t*>(n1.mutable_data_ptr());
  const auto copy = [&](void* to, const void* from, int64_t rows) {
    check_cuda(op.c_str(), cudaMemcpyAsync(to, from, static_cast<size_t>(rows), cudaMemcpyDeviceToDevice, here.stream));
  };
  if (!derive) {
    for (size_t i = 0; i < ws.size(); ++i) copy(all + weights.table[i].first_row, n1s[i].const_data_ptr(), ws[i].size(0));
  }
  weights.partition(found, derive ? all : nullptr, {weights.dtype, random, channel, mse}, format, here);
  weights.freeze(found, all, random, format, here);
  if (derive) {
    for (size_t i = 0; i < ws.size(); ++i) {
      copy(n1s[i].mutable_data_ptr(), all + weights.table[i].first_row, ws[i].size(0));
    }
  }
}

// --- optimizer steps --------------------------------------------------------------------------------------------------------

// A tensor beside its parameter `w`: of this dtype and w's shape.
void* beside(const std::string& op, const char* name, size_t i, const Tensor& t, const Tensor& w, ScalarType dtype) {
  const auto x = t.sizes(), y = w.sizes();
  const bool same = x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
  if (!same || !t.is_cuda() || !t.is_contiguous() || t.scalar_type() != dtype || t.get_device() != w.get_device()) {
    const std::string where = op + ": " + name + "[" + std::to_string(i) + "]";
    check_same_device(where, t, w);
    check(where, t, dtype, sizes_of(w));
  }
  return const_cast<void*>(t.const_data_ptr());
}

struct Steps {
  Tensor table;
  int count;
  int64_t chunks;
  DType dtype;
};

Steps steps_of(const std::string& op, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
               const std::vector<Tensor>& masks, const char* first_name, const std::vector<Tensor>& first,
               const char* second_name, const std::vector<Tensor>& second, const OnDevice& here) {
  check_count(op + ": grads", grads.size(), params.size());
  check_count(op + ": masks", masks.size(), params.size());
  if (!first.empty()) check_count(op + ": " + first_name, first.size(), params.size());
  if (!second.empty()) check_count(op + ": " + second_name, second.size(), params.size());
  const DType dtype = dtype_of(op + ": params[0]", params[0]);
  std::vector<StepTensor> table;
  int64_t chunks = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& w = params[i];
    const ScalarType type = params[0].scalar_type();
    StepTensor t{};
    check_same_device(op + ": params[" + std::to_string(i) + "]", w, params[0]);
    t.w = beside(op, "params", i, w, w, type);
    t.grad = beside(op, "grads", i, grads[i], w, type);
    if (!first.empty()) t.first = static_cast<float*>(beside(op, first_name, i, first[i], w, ScalarType::Float));
    if (!second.empty()) t.second = static_cast<float*>(beside(op, second_name, i, second[i], w, ScalarType::Float));
    t.mask = bits_of(op + ": masks[" + std::to_string(i) + "]", masks[i], w.numel(), params[0]);
    t.numel = w.numel();
    t.first_chunk = chunks;
    chunks += chunks_of(t.numel, kStepChunk);
    table.push_back(t);
  }
  return {uploaded(op.c_str(), table, here), static_cast<int>(params.size()), chunks, dtype};
}

void masked_sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
                 std::vector<Tensor> masks, double lr, double momentum, double dampening, double weight_decay,
                 bool nesterov, bool maximize, bool is_first_step) {
  const std::string op = "masked_sgd_";
  if (params.empty()) return;
  check_count(op + ": momentum_buffers", momentum_buffers.size(), momentum != 0 ? params.size() : 0);
  check_memory(op + ": params[0]", params[0]);
  const OnDevice here(params[0]);
  const Steps steps = steps_of(op, params, grads, masks, "momentum_buffers", momentum_buffers, "", {}, here);
  SgdParams p{};
  p.tensors = static_cast<const StepTensor*>(steps.table.const_data_ptr());
  p.tensor_count = steps.count;
  p.chunks = steps.chunks;
  p.numbers = sgd_numbers(lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step);
  check_cuda("masked_sgd_", masked_sgd(p, {steps.dtype, momentum != 0}, here.stream));
}

void masked_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> masks, double lr, double beta1, double beta2,
                   double weight_decay, double eps, int64_t step, bool maximize) {
  const std::string op = "masked_adamw_";
  if (params.empty()) return;
  check_count(op + ": exp_avgs", exp_avgs.size(), params.size());
  check_count(op + ": exp_avg_sqs", exp_avg_sqs.size(), params.size());
  check_at_least(op + ": step", step, 1);
  check_memory(op + ": params[0]", params[0]);
  const OnDevice here(params[0]);
  const Steps steps = steps_of(op, params, grads, masks, "exp_avgs", exp_avgs, "exp_avg_sqs", exp_avg_sqs, here);
  AdamwParams p{};
  p.tensors = static_cast<const StepTensor*>(steps.table.const_data_ptr());
  p.tensor_count = steps.count;
  p.chunks = steps.chunks;
  p.numbers = adamw_numbers(lr, beta1, beta2, weight_decay, eps, step, maximize);
  check_cuda("masked_adamw_", masked_adamw(p, {steps.dtype}, here.stream));
}

// --- storage ----------------------------------------------------------------------------------------------------------------

Tensor pack_op(Tensor w, Tensor n1, int64_t bits, bool dense) {
  const Format format = format_of("pack", bits, dense);
  check_memory("pack: w", w);
  const DType dtype = dtype_of("pack: w", w);
  if (w.dim() == 0 || w.numel() == 0) fail("pack: w", "rank ≥ 1 and at least one weight", "shape " + shape_of(w));
  const int64_t n = w.size(0), k = w.numel() / n;
  check("pack: n1", n1, ScalarType::Char, {n, 1});
  check_same_device("pack: n1", n1, w);
  const OnDevice here(w);
  Tensor out = new_tensor({n, row_bytes(format, k)}, ScalarType::Byte, here.index);
  check_cuda("pack", pack({w.const_data_ptr(), static_cast<const int8_t*>(n1.const_data_ptr()),
                           static_cast<uint8_t*>(out.mutable_data_ptr()), n, k, format},
                          {dtype}, here.stream));
  return out;
}

void unpack_into(const char* op, const Tensor& out, const Tensor& weight, const Tensor& exponent,
                 const OptionalTensor& scale, int64_t k, Format format, const OnDevice& here) {
  const std::string name(op);
  check_at_least(name + ": k", k, 0);
  const int64_t n = check_weight(name, weight, exponent, scale,
                                 [&](int64_t rows) { return std::vector<int64_t>{rows, row_bytes(format, k)}; });
  check_same_device(name + ": weight_exp", exponent, weight);
  check_same_device(name + ": out", out, weight);
  if (scale) check_same_device(name + ": weight_scale", *scale, weight);
  if (!out.is_contiguous() || out.numel() != n * k) {
    fail(name + ": out", "a contiguous tensor of " + std::to_string(n * k) + " numbers", shape_of(out));
  }
  if (n * k == 0) return;
  check_cuda(op, unpack({static_cast<const uint8_t*>(weight.const_data_ptr()),
                         static_cast<const int8_t*>(exponent.const_data_ptr()),
                         data_or_null<float>(scale),
                         const_cast<void*>(out.const_data_ptr()), n, k, format},
                        {dtype_of(name + ": out", out)}, here.stream));
}

Tensor unpack_op(Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, int64_t k, int64_t bits, bool dense,
                 ScalarType dtype) {
  check_memory("unpack: weight", weight);
  const OnDevice here(weight);
  if (weight_exp.dim() != 2) fail("unpack: weight_exp", "[N, 1]", shape_of(weight_exp));
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    fail("unpack: dtype", "float32, bfloat16 or float16", name_of(dtype));
  }
  Tensor out = new_tensor({weight_exp.size(0), std::max<int64_t>(k, 0)}, dtype, here.index);
  unpack_into("unpack", out, weight, weight_exp, weight_scale, k, format_of("unpack", bits, dense), here);
  return out;
}

void unpack_in_place(Tensor out, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, int64_t k, int64_t bits,
                     bool dense) {
  check_memory("unpack_: weight", weight);
  const OnDevice here(weight);
  unpack_into("unpack_", out, weight, weight_exp, weight_scale, k, format_of("unpack_", bits, dense), here);
}

Number number_of(const std::string& where, int64_t number) {
  if (number < 0 || number > 2) fail(where, "0 (fp16), 1 (bf16) or 2 (e4m3)", std::to_string(number));
  return static_cast<Number>(number);
}

// The shape of fragments.encode_table: [registers, numbers, codes, words].
std::vector<int64_t> table_shape(Number number, Format f) {
  const int64_t codes = int64_t{1} << f.bits;
  const bool five = f.bits == 5;
  if (number == Number::e4m3) return five ? std::vector<int64_t>{8, 4, codes, 5} : std::vector<int64_t>{2, 4, codes, 1};
  // Layouts F and G multiply: their tables have a second word for what that must give.
  const bool sum = five && (number == Number::f16 ? f.dense : !f.dense);
  return {five ? 3 : 4, 2, codes, sum ? 2 : 1};
}

// `table`: fragments.encode_table, int32 on the CPU, whence it travels as tables of tensors do: no copy to wait for, and a
// CUDA graph can hold it. `number`: the type of products.
Tensor prepack_op(Tensor weight, Tensor table, int64_t k, int64_t bits, bool dense, int64_t number) {
  const Format format = format_of("prepack", bits, dense);
  const Number type = number_of("prepack: number", number);
  check_at_least("prepack: k", k, 0);
  if (weight.dim() != 2) fail("prepack: weight", "two dimensions", shape_of(weight));
  const int64_t n = weight.size(0);
  check("prepack: weight", weight, ScalarType::Byte, {n, row_bytes(format, k)});
  check_dtype("prepack: table", table, ScalarType::Int);
  if (sizes_of(table) != table_shape(type, format)) {
    fail("prepack: table", "shape " + text_of(table_shape(type, format)), shape_of(table));
  }
  if (!table.is_cpu() || !table.is_contiguous()) fail("prepack: table", "a contiguous CPU tensor", "another");
  const OnDevice here(weight);
  Tensor out = new_tensor(shape_of_weight(type, format, n, k), ScalarType::Byte, here.index);
  if (out.numel() == 0) return out;
  const int64_t size = table.numel() * static_cast<int64_t>(sizeof(uint32_t));
  Tensor on_device = bytes(size, here.index);
  check_cuda("prepack", upload(on_device.mutable_data_ptr(), table.const_data_ptr(), size, here.stream));
  check_cuda("prepack", prepack({static_cast<const uint8_t*>(weight.const_data_ptr()),
                                 static_cast<uint8_t*>(out.mutable_data_ptr()),
                                 static_cast<const uint32_t*>(on_device.const_data_ptr()), n, k, format},
                                {type, levels_of(format)}, here.stream));
  return out;
}

Tensor unprepack_op(Tensor weight, int64_t n, int64_t k, int64_t bits, bool dense, int64_t number) {
  const Format format = format_of("unprepack", bits, dense);
  const Number type = number_of("unprepack: number", number);
  check_at_least("unprepack: n", n, 0);
  check_at_least("unprepack: k", k, 0);
  check("unprepack: weight", weight, ScalarType::Byte, shape_of_weight(type, format, n, k));
  check_aligned("unprepack: weight", weight);
  const OnDevice here(weight);
  Tensor out = new_tensor({n, row_bytes(format, k)}, ScalarType::Byte, here.index);
  if (out.numel() == 0) return out;
  check_cuda("unprepack", unprepack({static_cast<const uint8_t*>(weight.const_data_ptr()),
                                     static_cast<uint8_t*>(out.mutable_data_ptr()), n, k, format},
                                    {type, levels_of(format)}, here.stream));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(inq_cuda, m) {
  m.def("exponents(Tensor w, int bits, bool dense, bool channel, bool mse) -> Tensor");
  m.def("partition_threshold(Tensor w, Tensor mask, Tensor? keep, int count, bool random, int seed) -> Tensor");
  m.def(
      "exponents_and_threshold(Tensor w, Tensor mask, Tensor? keep, int count, bool random, int seed, int bits, "
      "bool dense, bool channel, bool mse) -> (Tensor, Tensor)");
  m.def(
      "quantize_with_mask_(Tensor(a!) w, Tensor(b!) mask, Tensor n1, Tensor threshold, Tensor? keep, int bits, "
      "bool dense, bool random, int seed) -> ()");
  m.def(
      "freeze_portion_(Tensor(a!)[] ws, Tensor(b!)[] masks, Tensor(c!)[] n1s, Tensor[] keeps, int[] counts, "
      "bool derive, int bits, bool dense, bool channel, bool mse, bool random, int[] seeds) -> ()");
  m.def(
      "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] masks, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool is_first_step) -> ()");
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor[] masks, float lr, float beta1, float beta2, float weight_decay, float eps, int step, bool maximize) "
      "-> ()");
  m.def("pack(Tensor w, Tensor n1, int bits, bool dense) -> Tensor");
  m.def(
      "unpack(Tensor weight, Tensor weight_exp, Tensor? weight_scale, SymInt k, int bits, bool dense, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "unpack_(Tensor(a!) out, Tensor weight, Tensor weight_exp, Tensor? weight_scale, SymInt k, int bits, bool dense) "
      "-> ()");
  m.def("prepack(Tensor weight, Tensor table, SymInt k, int bits, bool dense, int number) -> Tensor");
  m.def("unprepack(Tensor weight, SymInt n, SymInt k, int bits, bool dense, int number) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(inq_cuda, CUDA, m) {
  m.impl("exponents", TORCH_BOX(&exponents));
  m.impl("partition_threshold", TORCH_BOX(&threshold));
  m.impl("exponents_and_threshold", TORCH_BOX(&exponents_and_threshold));
  m.impl("quantize_with_mask_", TORCH_BOX(&quantize_with_mask_));
  m.impl("freeze_portion_", TORCH_BOX(&freeze_portion_));
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
  m.impl("pack", TORCH_BOX(&pack_op));
  m.impl("unpack", TORCH_BOX(&unpack_op));
  m.impl("unpack_", TORCH_BOX(&unpack_in_place));
  m.impl("prepack", TORCH_BOX(&prepack_op));
  m.impl("unprepack", TORCH_BOX(&unprepack_op));
}
