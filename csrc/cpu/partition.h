// The exact threshold of the partition, without a sort and without copying the weights. Of many weights, one pass counts the
// keys over a narrow bracket and copies out those inside, where a sample says that the threshold is. Where it is not, or
// weights are few, or their digits are counted for exponents in any case: a radix select on 31-bit keys.
#pragma once

#include <cstdint>
#include <optional>

#include "digits.h"
#include "keys.h"
#include "survey.h"

namespace inq::cpu {

// Those of the candidates with a larger key are frozen, and the first `ties` in flat order of those with this one.
struct Threshold {
  int64_t key;  // in the units of the weights' dtype: 16 bits for bfloat16 magnitudes
  int64_t ties;
};

struct Selection {
  Threshold threshold;
  uint32_t largest;  // of the candidates' keys
  bool masked;       // whether the mask holds weights, which are missing in `largest`
};

// By the one pass; nothing where the sample promises none, or was wrong, or there are fewer candidates than `count`.
std::optional<Selection> select_in_one_pass(const KeySource& source, int64_t count);

// Selects `count` ≥ 0 of the candidates; none with the largest int64 as key. std::invalid_argument if there are fewer.
Threshold partition_threshold(const KeySource& source, int64_t count);

// The same where the first digits are counted already.
Threshold partition_threshold(const KeySource& source, int64_t count, const DigitCounts& digits);

}  // namespace inq::cpu
