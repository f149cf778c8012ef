// The exponent rules: n1 of each row, from histograms with two bins an octave and exact integer sums.
#pragma once

#include <cstdint>

#include "digits.h"
#include "inq_format.h"
#include "keys.h"

namespace inq::cpu {

struct ExponentRule {
  Format format;
  bool mse;  // the least squared error; else from the largest |w|
};

// n1 for the weights that `digits` counts.
int exponent_of(const DigitCounts& digits, ExponentRule rule);

// n1 by the `max` rule from the largest key.
int exponent_of(uint32_t largest);

// n1 for all of w together. Weights whose bit in `keep` is clear count as 0; nullptr: there are none.
int tensor_exponent(const Weights& w, const uint8_t* keep, ExponentRule rule);

// n1 for each of the rows of w, which are of one length.
void row_exponents(const Weights& w, const uint8_t* keep, int64_t rows, ExponentRule rule, int8_t* n1);

}  // namespace inq::cpu
