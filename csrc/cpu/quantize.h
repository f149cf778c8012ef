// Freezing: one pass that quantizes in place what the threshold selects and sets its mask bits.
#pragma once

#include <array>
#include <cstdint>

#include "inq_format.h"
#include "isa.h"
#include "partition.h"

namespace inq::cpu {

// Equation (4) for one n1, on the bits of a float32.
struct Limits {
  uint32_t least;   // magnitudes below become 0
  uint32_t bottom;  // the powers 2^n2 (at least 2^-126) and 2^n1
  uint32_t top;
};
// By n1 + 128, for every n1 that int8 holds.
using LimitTable = std::array<Limits, 256>;

struct QuantizeParams {
  KeySource source;  // its w and mask are written too
  void* w;
  uint8_t* mask;
  const int8_t* n1;  // one a row
  int64_t row;       // weights a row; the whole tensor where all rows have the same n1
  const Limits* limits;
  uint32_t key;  // 31 bits
};

// Freezes the candidates in [begin, end) with a larger key, and the first `ties` of those with this key. Returns how
// many have it. Doing a range again with more `ties` only adds these.
using FreezeRange = int64_t (*)(const QuantizeParams& p, int64_t begin, int64_t end, int64_t ties);

namespace portable {
int64_t freeze_range(const QuantizeParams&, int64_t, int64_t, int64_t);
}
namespace avx2 {
int64_t freeze_range(const QuantizeParams&, int64_t, int64_t, int64_t);
}
namespace avx512 {
int64_t freeze_range(const QuantizeParams&, int64_t, int64_t, int64_t);
}

// Weights that `source.mask` holds keep their bits, those that `source.keep` does not hold become +0, and what the
// threshold selects is quantized by its row's n1 in `w` and set in `mask` (the same memory as in `source`).
void quantize_with_mask(const KeySource& source, void* w, uint8_t* mask, const int8_t* n1, int64_t rows, Format format,
                        Threshold threshold);

}  // namespace inq::cpu
