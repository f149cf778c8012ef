// Asking for an Ask's lines, some at a time. Included where loops are compiled, each with a copy of its own
// (gemm_kernels.h says why).
#pragma once

#include "kernels.h"

namespace {

class Asking {
 public:
  explicit Asking(const inq::cpu::Ask& ask) : left_(ask.last - ask.first), lines_(ask.lines), stride_(ask.stride) {
    if (left_ <= 0) return;
    line_ = ask.first % lines_;
    run_ = ask.from + ask.first / lines_ * stride_;
  }

  // The next `count`: kLocality is 3 for the first-level cache, 2 for the second.
  template <int kLocality>
  void next(int64_t count) {
    if (count > left_) count = left_;
    for (left_ -= count; count > 0; --count) {
      __builtin_prefetch(run_ + line_ * 64, 0, kLocality);
      if (++line_ == lines_) line_ = 0, run_ += stride_;
    }
  }

  int64_t left() const { return left_; }

 private:
  const uint8_t* run_ = nullptr;
  int64_t line_ = 0, left_, lines_, stride_;
};

}  // namespace
