// The exact threshold of the partition: a radix select on 31-bit keys, without a sort and without copying the weights.
#pragma once

#include <cstdint>

#include "digits.h"
#include "keys.h"

namespace inq::cpu {

// Those of the candidates with a larger key are frozen, and the first `ties` in flat order of those with this one.
struct Threshold {
  int64_t key;  // in the units of the weights' dtype: 16 bits for bfloat16 magnitudes
  int64_t ties;
};

// Selects `count` ≥ 0 of the candidates; none with the largest int64 as key. std::invalid_argument if there are fewer.
Threshold partition_threshold(const KeySource& source, int64_t count);

// The same where the first pass is done already.
Threshold partition_threshold(const KeySource& source, int64_t count, const DigitCounts& digits);

}  // namespace inq::cpu
