// The steps of SGD and AdamW with the mask of frozen weights inside, for all tensors of a model at once.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace inq::cpu {

// One parameter; all of its memory is contiguous and in the same order. State is float32.
struct StepTensor {
  void* w;
  const void* grad;  // of w's dtype
  bool bfloat16;
  float* first;         // SGD: momentum, nullptr without; AdamW: exp_avg
  float* second;        // AdamW: exp_avg_sq
  const uint8_t* mask;  // one bit a weight, set: frozen, nothing of it changes; nullptr: all weights move
  int64_t numel;
};

// Numbers as the arithmetic uses them: float32, from doubles.
struct SgdNumbers {
  float lr, momentum, dampening_left, weight_decay;  // dampening_left: 1 − dampening
  bool nesterov, maximize, first_step;
};
struct AdamwNumbers {
  float beta1_left, beta1, beta2, beta2_left;  // beta1_left: 1 − beta1
  float decay;                                 // 1 − lr·weight_decay
  float step_size;                             // lr / (1 − beta1^step)
  float inverse_correction2;                   // 1 / sqrt(1 − beta2^step)
  float eps;
  bool maximize;
};
AdamwNumbers adamw_numbers(double lr, double beta1, double beta2, double weight_decay, double eps, int64_t step,
                           bool maximize);

// Weights [begin, end) of one tensor, begin a multiple of 64.
using SgdRange = void (*)(const StepTensor& t, const SgdNumbers& n, int64_t begin, int64_t end);
using AdamwRange = void (*)(const StepTensor& t, const AdamwNumbers& n, int64_t begin, int64_t end);

namespace portable {
void sgd_range(const StepTensor&, const SgdNumbers&, int64_t, int64_t);
void adamw_range(const StepTensor&, const AdamwNumbers&, int64_t, int64_t);
}  // namespace portable
namespace avx2 {
void sgd_range(const StepTensor&, const SgdNumbers&, int64_t, int64_t);
void adamw_range(const StepTensor&, const AdamwNumbers&, int64_t, int64_t);
}  // namespace avx2
namespace avx512 {
void sgd_range(const StepTensor&, const SgdNumbers&, int64_t, int64_t);
void adamw_range(const StepTensor&, const AdamwNumbers&, int64_t, int64_t);
}  // namespace avx512

// Every weight by itself, with the same roundings on every instruction set.
void masked_sgd(const std::vector<StepTensor>& tensors, const SgdNumbers& numbers);
void masked_adamw(const std::vector<StepTensor>& tensors, const AdamwNumbers& numbers);

}  // namespace inq::cpu
