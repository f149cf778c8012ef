// The random partition's keys (reference.random_keys): 31 bits of splitmix64 of (seed, flat index).
#pragma once

#include "simd.h"

namespace inq::cpu::INQ_ISA {

// The keys of the 64 weights from `index` on. A plain loop: compilers vectorise it, 64-bit products included.
INQ_INLINE void random_keys(uint64_t seed, int64_t index, uint32_t* keys) {
  for (uint64_t i = 0; i < 64; ++i) {
    uint64_t z = (static_cast<uint64_t>(index) + i + 1) * 0x9E3779B97F4A7C15u + seed;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    keys[i] = static_cast<uint32_t>((z ^ z >> 31) >> 33);
  }
}

}  // namespace inq::cpu::INQ_ISA
