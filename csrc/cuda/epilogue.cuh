// What becomes of a sum of decoded products: y = sum · 2^(n1 + exponent) · weight_scale + bias.
#pragma once

#include "host.h"
#include "ptx.cuh"

namespace inq::cuda {

INQ_DEVICE float load_float(const void* p, Float type, int64_t i) {
  if (type == Float::f32) return ld_global(static_cast<const float*>(p) + i);
  const uint16_t bits = ld_global(static_cast<const uint16_t*>(p) + i);
  return type == Float::f16 ? from_f16(bits) : from_bf16(bits);
}

// An exponent in its place among float32's bits.
INQ_DEVICE int exponent_bits(int e) { return e * (1 << 23); }

// 2^e for −126 ≤ e ≤ 127
INQ_DEVICE float power_of_two(int e) { return bits_to_float(static_cast<uint32_t>(e + 127) << 23); }

// x · 2^e for e ≤ 254, as two exact factors: one alone may be out of range. 2^-252 makes any float32 0, as less would.
INQ_DEVICE float scaled(float x, int e) {
  e = e < -252 ? -252 : e;
  const int half = e >> 1;
  return mul(mul(x, power_of_two(half)), power_of_two(e - half));
}

}  // namespace inq::cuda
