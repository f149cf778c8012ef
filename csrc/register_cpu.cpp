// The operators inq_cpu::*, and the only file of the CPU library that knows torch: its stable ABI alone, so that one
// build serves every torch from 2.11 on. Everything here is checking, allocation and a call into cpu/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <vector>

#include "cpu/amx.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace inq::cpu {

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, const void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { function(first, last, context); });
}

}  // namespace inq::cpu

namespace {

using namespace inq::cpu;
using inq::Format;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- what every operator checks: errors name the operator, the argument, what was expected and what came --------------

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

void check_dtype(const char* what, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, what, ": expected ", dtype_name(expected), ", got ",
                  dtype_name(t.scalar_type()));
}

void check_contiguous(const char* what, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), what, ": expected a contiguous tensor, got strides of another kind for shape ",
                  shape_text(t));
}

// A contiguous tensor of just this dtype and shape.
void check(const char* what, const Tensor& t, ScalarType dtype, const std::vector<int64_t>& shape) {
  check_dtype(what, t, dtype);
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && t.size(static_cast<int64_t>(i)) == shape[i];
    expected += (i ? ", " : "") + std::to_string(shape[i]);
  }
  STD_TORCH_CHECK(same, what, ": expected shape ", expected, "], got ", shape_text(t));
  check_contiguous(what, t);
}

Float float_of(const char* what, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, what,
                  ": expected float32 or bfloat16, got ", dtype_name(dtype));
  return dtype == ScalarType::Float ? Float::f32 : Float::bf16;
}

Format format_of(const char* op, int64_t bits, bool dense) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 5, op, ": bits: expected 2 to 5, got ", bits);
  return Format{static_cast<int>(bits), dense};
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// A new tensor beside `like`. Large ones ask for huge pages: half of the time of writing a fresh 200 MB is page faults.
Tensor new_output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, shape, dtype);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(out.data_ptr()) + out.numel() * out.element_size();
  // Advice only: where the kernel does not take it, nothing is different.
  if (end > begin + kHugePage) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

// --- instruction sets -------------------------------------------------------------------------------------------------

std::string isa() { return name(current_isa()); }
std::string detected() { return name(detected_isa()); }
std::string missing() { return why_not_better(); }
std::string use_isa(std::string text) { return name(set_isa(isa_from_name(text))); }

// For tests alone: isa amx on emulated tiles (cpu/amx.h). Returns the isa in use.
std::string emulate_amx_op(bool on, bool wrong) {
#if defined(__x86_64__)
  emulate_amx(on, wrong);
#else
  STD_TORCH_CHECK(!on, "inq_cpu.emulate_amx: expected an x86-64 machine");
#endif
  return name(current_isa());
}

// --- formats: what tests compare with format.py -----------------------------------------------------------------------

// For each magnitude, smallest first, its field; then magnitudes, n2 of n1 = 0 and the bytes of a row of 11 codes.
std::vector<int64_t> format_facts(int64_t bits, bool dense) {
  const Format f = format_of("format_facts", bits, dense);
  std::vector<int64_t> facts;
  for (int i = 0; i < inq::magnitudes(f); ++i) {
    STD_TORCH_CHECK(inq::index_of(f, inq::field_of(f, i)) == i, "format_facts: index_of is not field_of's inverse");
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
  const Format f = format_of("inq_cpu.pack", bits, dense);
  const Float dtype = float_of("inq_cpu.pack: w", w.scalar_type());
  STD_TORCH_CHECK(w.dim() >= 1 && w.numel() > 0, "inq_cpu.pack: w: expected rank ≥ 1 and values, got shape ",
                  shape_text(w));
  check_contiguous("inq_cpu.pack: w", w);
  const int64_t n = w.size(0), k = w.numel() / n;
  check("inq_cpu.pack: n1", n1, ScalarType::Char, {n, 1});
  Tensor out = new_output(n1, {n, inq::row_bytes(f, k)}, ScalarType::Byte);
  pack({w.data_ptr(), static_cast<const int8_t*>(n1.data_ptr()), static_cast<uint8_t*>(out.data_ptr()), n, k,
                  f, dtype});
  return out;
}

Tensor unpack_op(Tensor weight, Tensor weight_exp, std::optional<Tensor> weight_scale, int64_t k, int64_t bits, bool dense,
              ScalarType dtype) {
  const Format f = format_of("inq_cpu.unpack", bits, dense);
  const Float to = float_of("inq_cpu.unpack: dtype", dtype);
  STD_TORCH_CHECK(k >= 0, "inq_cpu.unpack: k: expected at least 0, got ", k);
  STD_TORCH_CHECK(weight_exp.dim() == 2, "inq_cpu.unpack: weight_exp: expected [N, 1], got ", shape_text(weight_exp));
  const int64_t n = weight_exp.size(0);
  check("inq_cpu.unpack: weight", weight, ScalarType::Byte, {n, inq::row_bytes(f, k)});
  check("inq_cpu.unpack: weight_exp", weight_exp, ScalarType::Char, {n, 1});
  if (weight_scale) check("inq_cpu.unpack: weight_scale", *weight_scale, ScalarType::Float, {n, 1});
  Tensor out = new_output(weight, {n, k}, dtype);
  unpack({static_cast<const uint8_t*>(weight.data_ptr()), static_cast<const int8_t*>(weight_exp.data_ptr()),
                    data_or_null<float>(weight_scale), out.data_ptr(), n, k, f, to});
  return out;
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
}
