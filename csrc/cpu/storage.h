// pack and unpack: quantized weights to the storage layout of files and back.
//
// Storage: uint8 [N, ceil(K/8)·bits], each row one little-endian bit stream, code i at bits [b·i, b·i + b), padded with
// zero codes. Eight codes are exactly b bytes, a *group*; groups are what threads divide among themselves.
#pragma once

#include <cstdint>

#include "../inq_format.h"
#include "kernels.h"

namespace inq::cpu {

struct PackParams {
  const void* w;    // [n, k] of `dtype`, contiguous, finite: 0 or ±2^k of the row's levels
  const int8_t* n1;  // [n]
  uint8_t* out;     // [n, row_bytes(k)]
  int64_t n, k;
  Format format;
  DType dtype;
};

struct UnpackParams {
  const uint8_t* codes;  // [n, row_bytes(k)]
  const int8_t* n1;      // [n]
  const float* scale;    // [n] or null
  void* out;             // [n, k] of `dtype`
  int64_t n, k;
  Format format;
  DType dtype;
};

void pack(const PackParams& p);
void unpack(const UnpackParams& p);

// The value of each of the 2^bits codes of one row, in float32: what decoding is a table look-up in. Entries of codes
// that name no value are +0, as in the reference.
struct CodeTable {
  float value[32];
};
CodeTable code_table(Format f, int n1, const float* scale);

// Groups [first, last) of one row; the vector forms leave what they do not do (the row's tail) to these.
namespace portable {
void pack_groups(const PackParams& p, int64_t row, int64_t first, int64_t last);
void unpack_groups(const UnpackParams& p, const CodeTable& table, int64_t row, int64_t first, int64_t last);
}  // namespace portable
namespace avx2 {
void pack_groups(const PackParams& p, int64_t row, int64_t first, int64_t last);
void unpack_groups(const UnpackParams& p, const CodeTable& table, int64_t row, int64_t first, int64_t last);
}  // namespace avx2

// float32 → bfloat16 bits, round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace inq::cpu
