#define INQ_ISA portable
#define INQ_LANES 1
#include "keys_kernel.h"

namespace inq::cpu {
namespace {

// That of the instruction set in use.
template <class F>
F in_use(F plain, [[maybe_unused]] F with_avx2, [[maybe_unused]] F with_avx512) {
#if defined(__x86_64__)
  if (current_isa() >= Isa::avx512) return with_avx512;
  if (current_isa() >= Isa::avx2) return with_avx2;
#endif
  return plain;
}

}  // namespace

#if defined(__x86_64__)
#define INQ_IN_USE(name) in_use(&portable::name, &avx2::name, &avx512::name)
#else
#define INQ_IN_USE(name) (&portable::name)
#endif

SelectKeys select_keys() { return INQ_IN_USE(select_keys); }
SurveyKeys survey_keys() { return INQ_IN_USE(survey_keys); }
CountCandidates count_candidates() { return INQ_IN_USE(count_candidates); }
LargestKey largest_key() { return INQ_IN_USE(largest_key); }

#undef INQ_IN_USE

}  // namespace inq::cpu
