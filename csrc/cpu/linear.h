// y = (x · decode(W)ᵀ) · 2^n1 · scale + bias, and its gradient in x. Plain pointers; register_cpu.cpp checks and fills.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace inq::cpu {

struct Weight {
  const uint8_t* data;     // layout cpu16 (layout.h)
  const int8_t* exponent;  // n1 of each row
  const float* scale;      // of each row, or null
  Format format;
  int64_t n, k;
};

struct LinearArgs {
  const void* x;  // [m, k], contiguous
  int64_t m;
  DType type;  // of x and out
  Weight weight;
  const float* bias;  // [n], or null
  void* out;          // [m, n], contiguous
};

struct Plan;

void linear(const LinearArgs& args);
// By another plan than plan()'s, with the shape and the instruction set that this has: for measuring (bench_linear.cpp).
void linear(const LinearArgs& args, const Plan& chosen);

struct LinearDxArgs {
  const void* grad;  // [m, n], contiguous
  int64_t m;
  DType type;  // of grad and out
  Weight weight;
  void* out;  // [m, k], contiguous
};

void linear_dx(const LinearDxArgs& args);

}  // namespace inq::cpu
