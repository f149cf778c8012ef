// The products of packed weights by mma.sync, torch-free: what register_cuda.cpp and the tests call.
#pragma once

#include "choose.h"
#include "host.h"

namespace inq::cuda {

// y = (x · decode(W)ᵀ) · row factors + bias, or dx = (grad · row factors) · decode(W). Every pointer is on the device.
struct LinearParams {
  const void* x;  // x [m, k], of linear_dx grad [m, n]: `number`, rows `stride` elements apart, elements adjacent
  int64_t stride;
  const uint8_t* weight;      // fragments_fp16 or fragments_bf16 as `number` says, aligned to 16 bytes
  const int8_t* weight_exp;   // [n]
  const float* weight_scale;  // [n], or null
  const void* bias;           // [n] of bias_type, of linear; or null
  void* out;                  // [m, n], of linear_dx [m, k]: `number`, dense
  // Workspace that no other launch uses at the same time: Choice::partials numbers, aligned to 16 bytes, of any value,
  // and Choice::flags counters, zero, and zero again when the kernel is done.
  float* partials;
  int* flags;
  int64_t m, n, k;
  Number number;
  Levels levels;
  int magnitudes;  // of the format: Format.magnitudes
  Float bias_type;
};

// choose() says what `Choice` and so how much workspace. Nothing is launched where the result is empty.
cudaError_t linear(const LinearParams& p, const Choice& choice, cudaStream_t stream);
cudaError_t linear_dx(const LinearParams& p, const Choice& choice, cudaStream_t stream);

}  // namespace inq::cuda
