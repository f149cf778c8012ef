// linear and linear_fp8 on Hopper: host entry points of linear_hopper.cu and quantize_rows_hopper.cu.
#pragma once

#include "choose_hopper.h"
#include "host.h"

namespace inq::cuda {

// out[m, n] = 2^−rows_exp[m] · Σ_k x[m, k]·w[n, k] · weight_scale[n] + bias[n], with the weights w that `weight` and
// `weight_exp` stand for.
struct LinearHopperParams {
  // [M, K], rows x_stride elements apart: f16 or bf16, or bits of e4m3, as `number` says. Address and bytes of x_stride
  // are multiples of 16.
  const void* x;
  int64_t x_stride;
  const uint8_t* weight;      // fragments of `number` and `levels`, 16-byte aligned
  const int8_t* weight_exp;   // [N]
  const float* weight_scale;  // [N], or null
  const void* bias;           // [N] of bias_type, or null
  const int32_t* rows_exp;    // [M] for e4m3, else null
  void* out;                  // [M, N] of out_type, contiguous; x's type but for e4m3
  // Where splits > 1: floats of linear_hopper_partials, and ints of linear_hopper_arrivals that are 0 before the launch
  // and after it.
  float* partials;
  int* arrivals;
  int64_t m, n, k;
  int magnitudes;  // of the format: Format.magnitudes
  Number number;
  Levels levels;
  Float bias_type, out_type;
};

// Elements of `partials` and `arrivals`; 0 where splits is 1.
int64_t linear_hopper_partials(int64_t m, int64_t n, const HopperChoice& choice);
int64_t linear_hopper_arrivals(int64_t m, int64_t n, const HopperChoice& choice);

// `processors`: blocks to launch at most, of which each takes tiles in turn.
// cudaErrorInvalidValue: x or weight is not aligned, a size is out of range, types do not fit, or there is no such tile.
cudaError_t linear_hopper(const LinearHopperParams& params, const HopperChoice& choice, int processors,
                          cudaStream_t stream);

// Rows of x as e4m3 with a power of two each: reference.quantize_rows_e4m3.
struct QuantizeRowsParams {
  const void* x;  // [M, K] of type, rows x_stride elements apart
  int64_t x_stride;
  uint8_t* values;  // [M, K], rows values_stride bytes apart
  int64_t values_stride;
  int32_t* exponents;  // [M]
  int64_t m, k;
  Float type;
};
cudaError_t quantize_rows(const QuantizeRowsParams& params, cudaStream_t stream);

}  // namespace inq::cuda
