// The factors of each column of the product as float32 arrays, one call long.
#pragma once

#include <cmath>
#include <cstring>

#include "buffer.h"
#include "linear.h"

namespace inq::cpu {

// 2^n1 of each row of the weight.
inline Buffer<float> powers(const Weight& w) {
  Buffer<float> power(w.n);
  for (int64_t i = 0; i < w.n; ++i) {
    // From its bits; below −126, which no quantizer writes, by the library.
    const int biased = w.exponent[i] + 127;
    const uint32_t bits = static_cast<uint32_t>(biased) << 23;
    if (biased > 0) {
      std::memcpy(&power[i], &bits, sizeof bits);
    } else {
      power[i] = std::ldexp(1.0f, w.exponent[i]);
    }
  }
  return power;
}

}  // namespace inq::cpu
