// The random partition's ranks (reference.random_keys): 31 bits of splitmix64 of (seed, flat index).
#pragma once

#include "inq_format.h"

namespace inq {

INQ_HD constexpr uint32_t random_key(uint64_t seed, uint64_t index) {
  uint64_t z = (index + 1) * 0x9E3779B97F4A7C15u + seed;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>((z ^ z >> 31) >> 33);
}

}  // namespace inq
