// Numbers of 16 and 8 bits, as the conversions of PTX round them: to nearest, ties to even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace inq::cuda {

inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline float from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} << 16 & 0x80000000u, magnitude = bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits_to_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // As the bits of a float the exponent is 112 too small; the product is exact, subnormal numbers included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
inline float from_bf16(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }
inline float from_e4m3(uint8_t bits) {
  const uint32_t sign = uint32_t{bits} << 24 & 0x80000000u, magnitude = bits & 0x7Fu;
  if (magnitude == 0x7Fu) return bits_to_float(sign | 0x7FFFFFFFu);
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 20) * 0x1p120f));
}

inline uint16_t to_f16(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u;
  uint32_t a = bits & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return 0x7FFF;
  if (a >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (a < 0x38800000u)  // 0.5 has steps of 2^-24, and so has a subnormal number
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3F000000u));
  a += 0xFFFu + (a >> 13 & 1);
  return static_cast<uint16_t>(sign | (a - (112u << 23)) >> 13);
}
inline uint16_t to_bf16(float x) {
  const uint32_t a = float_to_bits(x);
  if ((a & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((a + 0x7FFFu + (a >> 16 & 1)) >> 16);
}
// What is too large becomes ±448.
inline uint8_t to_e4m3(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 24 & 0x80u;
  uint32_t a = bits & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return 0x7F;
  if (a < 0x3C800000u)  // below 2^-6 steps are 2^-9: those of 2^14
    return static_cast<uint8_t>(sign | (float_to_bits(bits_to_float(a) + 0x1p14f) - float_to_bits(0x1p14f)));
  a += 0x7FFFFu + (a >> 20 & 1);
  a = (a >> 20) - (120u << 3);
  return static_cast<uint8_t>(sign | (a > 0x7E ? 0x7E : a));
}
inline uint32_t to_f16x2(float low, float high) { return to_f16(low) | uint32_t{to_f16(high)} << 16; }
inline uint32_t to_bf16x2(float low, float high) { return to_bf16(low) | uint32_t{to_bf16(high)} << 16; }
inline uint16_t to_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(to_e4m3(low) | to_e4m3(high) << 8);
}
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  const auto one = [](uint32_t x, uint32_t y) -> uint32_t {
    return to_bf16(from_bf16(static_cast<uint16_t>(x)) * from_bf16(static_cast<uint16_t>(y)));
  };
  return one(a, b) | one(a >> 16, b >> 16) << 16;
}

inline int popc(uint32_t x) { return std::popcount(x); }

// Compiled with -ffp-contract=off.
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float square_root(float a) { return std::sqrt(a); }
inline float divide(float a, float b) { return a / b; }

}  // namespace inq::cuda
