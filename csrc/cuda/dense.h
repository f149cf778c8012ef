// Many rows: weights as a dense matrix for the library's product, and what becomes of its sums.
#pragma once

#include <cstdint>

#include "host.h"

namespace inq::cuda {

// out[n, k] = what decode(weight) gives: ±2^(kBase + i) for magnitude i, in 16 bits.
struct DecodeParams {
  const uint8_t* weight;  // fragments of `number` (f16 or bf16) and `levels`
  uint16_t* out;          // [n, k], aligned to 16 bytes
  int64_t n, k;
  Number number;
  Levels levels;
};
cudaError_t decode_dense(const DecodeParams& params, cudaStream_t stream);

// out[m, n] = sums[m, n] · 2^(weight_exp[n] + exponent) · weight_scale[n] + bias[n]
struct FinishParams {
  const float* sums;          // [m, n]
  const int8_t* weight_exp;   // [n]
  const float* weight_scale;  // [n], or null
  const void* bias;           // [n] of bias_type, or null
  void* out;                  // [m, n] of out_type, f16 or bf16
  int64_t m, n;
  int exponent;
  Float bias_type, out_type;
};
cudaError_t finish_sums(const FinishParams& params, cudaStream_t stream);

}  // namespace inq::cuda
