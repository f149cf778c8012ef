// The operators inq_cpu::*, and the only file of the CPU library that knows torch: its stable ABI alone, so that one
// build serves every torch from 2.11 on. Everything here is checking, allocation and a call into cpu/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace inq::cpu {

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, const void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { function(first, last, context); });
}

}  // namespace inq::cpu

namespace {

using namespace inq::cpu;

std::string isa() { return name(current_isa()); }
std::string detected() { return name(detected_isa()); }
std::string missing() { return why_not_better(); }
std::string use_isa(std::string text) { return name(set_isa(isa_from_name(text))); }

}  // namespace

STABLE_TORCH_LIBRARY(inq_cpu, m) {
  m.def("isa() -> str");
  m.def("detected_isa() -> str");
  m.def("why_not_better() -> str");
  m.def("set_isa(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(inq_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("detected_isa", TORCH_BOX(&detected));
  m.impl("why_not_better", TORCH_BOX(&missing));
  m.impl("set_isa", TORCH_BOX(&use_isa));
}
