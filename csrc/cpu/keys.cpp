#define INQ_ISA portable
#define INQ_LANES 1
#include "keys_kernel.h"

namespace inq::cpu {

SelectKeys select_keys() {
#if defined(__x86_64__)
  if (current_isa() >= Isa::avx512) return avx512::select_keys;
  if (current_isa() >= Isa::avx2) return avx2::select_keys;
#endif
  return portable::select_keys;
}

LargestKey largest_key() {
#if defined(__x86_64__)
  if (current_isa() >= Isa::avx512) return avx512::largest_key;
  if (current_isa() >= Isa::avx2) return avx2::largest_key;
#endif
  return portable::largest_key;
}

}  // namespace inq::cpu
