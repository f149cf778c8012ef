// The operators inq_cpu::*. Only the register_cpu*.cpp files and register.h know torch: its stable ABI alone, so that one
// build serves every torch from 2.11 on. Everything here is checking, allocation and a call into cpu/.
#include <optional>
#include <string>
#include <vector>

#include "cpu/amx.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/storage.h"
#include "register.h"

namespace inq::cpu {

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, const void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { function(first, last, context); });
}

}  // namespace inq::cpu

namespace {

using namespace inq::cpu;
using namespace inq::registration;
using inq::Format;

// --- instruction sets -------------------------------------------------------------------------------------------------

std::string isa() { return name(current_isa()); }
std::string detected() { return name(detected_isa()); }
std::string missing() { return why_not_better(); }
std::string use_isa(std::string text) { return name(set_isa(isa_from_name(text, "set_isa"))); }

// For tests alone: isa amx on emulated tiles (cpu/amx.h). Returns the isa in use.
std::string emulate_amx_op(bool on, bool wrong) {
#if defined(__x86_64__)
  emulate_amx(on, wrong);
#else
  if (on) fail("emulate_amx: on", "an x86-64 machine", "another");
#endif
  return name(current_isa());
}

// --- formats: what tests compare with format.py -----------------------------------------------------------------------

// For each magnitude, smallest first, its field; then magnitudes, n2 of n1 = 0 and the bytes of a row of 11 codes.
std::vector<int64_t> format_facts(int64_t bits, bool dense) {
  const Format f = format_of("format_facts", bits, dense);
  std::vector<int64_t> facts;
  for (int i = 0; i < inq::magnitudes(f); ++i) {
    if (inq::index_of(f, inq::field_of(f, i)) != i) throw std::logic_error("index_of is not field_of's inverse");
    facts.push_back(inq::field_of(f, i));
  }
  facts.insert(facts.end(), {inq::magnitudes(f), inq::n2_of(f, 0), inq::row_bytes(f, 11)});
  return facts;
}

std::vector<int64_t> format_constants() {
  return {inq::kN1Min,     inq::kN1Max,      inq::kN1MinFloat16, inq::kN1MaxFloat16,
          inq::kN1ZeroRow, inq::kMseOctaves};
}

// The bits of |ŵ| for the bits of a finite |w|, by equation (4).
int64_t quantize_magnitude(int64_t magnitude, int64_t n1, int64_t bits, bool dense) {
  const Format f = format_of("quantize_magnitude", bits, dense);
  const int top = static_cast<int>(n1);
  return inq::quantize_magnitude(static_cast<uint32_t>(magnitude), top, inq::n2_of(f, top));
}

// --- storage ----------------------------------------------------------------------------------------------------------

Tensor pack_op(Tensor w, Tensor n1, int64_t bits, bool dense) {
  const Format f = format_of("pack", bits, dense);
  const DType type = dtype_of("pack: w", w.scalar_type());
  if (w.dim() == 0 || w.numel() == 0) fail("pack: w", "rank ≥ 1 and at least one weight", "shape " + shape_of(w));
  check_memory("pack: w", w);
  const int64_t n = w.size(0), k = w.numel() / n;
  check("pack: n1", n1, ScalarType::Char, {n, 1});
  Tensor out = new_tensor({n, inq::row_bytes(f, k)}, ScalarType::Byte);
  pack({w.data_ptr(), data_of<int8_t>(n1), static_cast<uint8_t*>(out.data_ptr()), n, k, f, type});
  return out;
}

// Checked arguments; `out` is where their n·k values go.
UnpackParams unpack_params(const std::string& op, const Tensor& weight, const Tensor& weight_exp,
                           const OptionalTensor& weight_scale, int64_t k, int64_t bits, bool dense, ScalarType dtype) {
  const Format f = format_of(op, bits, dense);
  const DType type = dtype_of(op + ": dtype", dtype);
  check_at_least(op + ": k", k, 0);
  const int64_t n = check_weight(op, weight, weight_exp, weight_scale,
                                 [&](int64_t rows) { return std::vector<int64_t>{rows, inq::row_bytes(f, k)}; });
  return {data_of<uint8_t>(weight), data_of<int8_t>(weight_exp), data_or_null<float>(weight_scale), nullptr, n, k, f, type};
}

Tensor unpack_op(Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, int64_t k, int64_t bits, bool dense,
                 ScalarType dtype) {
  UnpackParams p = unpack_params("unpack", weight, weight_exp, weight_scale, k, bits, dense, dtype);
  Tensor out = new_tensor({p.n, k}, dtype);
  p.out = out.mutable_data_ptr();
  unpack(p);
  return out;
}

void unpack_into(Tensor out, Tensor weight, Tensor weight_exp, OptionalTensor weight_scale, int64_t k, int64_t bits,
                 bool dense) {
  UnpackParams p = unpack_params("unpack_", weight, weight_exp, weight_scale, k, bits, dense, out.scalar_type());
  check_memory("unpack_: out", out);
  if (out.numel() != p.n * k) fail("unpack_: out", std::to_string(p.n * k) + " elements", shape_of(out));
  p.out = out.mutable_data_ptr();
  unpack(p);
}

}  // namespace

STABLE_TORCH_LIBRARY(inq_cpu, m) {
  m.def("isa() -> str");
  m.def("detected_isa() -> str");
  m.def("why_not_better() -> str");
  m.def("set_isa(str isa) -> str");
  m.def("emulate_amx(bool on, bool wrong=False) -> str");
  m.def("format_facts(int bits, bool dense) -> int[]");
  m.def("format_constants() -> int[]");
  m.def("quantize_magnitude(int magnitude, int n1, int bits, bool dense) -> int");
  m.def("pack(Tensor w, Tensor n1, int bits, bool dense) -> Tensor");
  m.def("unpack(Tensor weight, Tensor weight_exp, Tensor? weight_scale, SymInt k, int bits, bool dense, "
        "ScalarType dtype) -> Tensor");
  m.def("unpack_(Tensor(a!) out, Tensor weight, Tensor weight_exp, Tensor? weight_scale, SymInt k, int bits, "
        "bool dense) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(inq_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("detected_isa", TORCH_BOX(&detected));
  m.impl("why_not_better", TORCH_BOX(&missing));
  m.impl("set_isa", TORCH_BOX(&use_isa));
  m.impl("emulate_amx", TORCH_BOX(&emulate_amx_op));
  m.impl("format_facts", TORCH_BOX(&format_facts));
  m.impl("format_constants", TORCH_BOX(&format_constants));
  m.impl("quantize_magnitude", TORCH_BOX(&quantize_magnitude));
}

STABLE_TORCH_LIBRARY_IMPL(inq_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_op));
  m.impl("unpack", TORCH_BOX(&unpack_op));
  m.impl("unpack_", TORCH_BOX(&unpack_into));
}
