// The steps of SGD and AdamW with the mask of frozen weights inside, for all tensors of a model at once.
#pragma once

#include <cstdint>
#include <vector>

#include "../step_numbers.h"
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
