// The random partition's keys, many at once.
#pragma once

#include "../random_key.h"
#include "simd.h"

namespace inq::cpu::INQ_ISA {

// The keys of the 64 weights from `index` on. A plain loop: compilers vectorise it, 64-bit products included.
INQ_INLINE void random_keys(uint64_t seed, int64_t index, uint32_t* keys) {
  for (uint64_t i = 0; i < 64; ++i) keys[i] = random_key(seed, static_cast<uint64_t>(index) + i);
}

}  // namespace inq::cpu::INQ_ISA
