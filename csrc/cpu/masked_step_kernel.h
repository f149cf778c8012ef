// masked_step.h's ranges for one instruction set; see simd.h. Products and sums are rounded apart (no fused ones), so
// that every instruction set gives the same bits; memory is what takes the time.
#pragma once

#include "masked_step.h"
#include "simd.h"

namespace inq::cpu::INQ_ISA {

// Weights of one 64-bit word of the mask.
constexpr int64_t kStepWord = 64;

// Each step gives the new values of kLanes weights and their state; what is frozen is put back by step_word.
// What a step does is constant: asking in the loop took 5 % of the time.
template <bool kMomentum, bool kReads, bool kNesterov, bool kDecays>
struct Sgd {
  static constexpr bool kHasFirst = kMomentum, kReadsFirst = kReads, kHasSecond = false;
  F sign, step, momentum, dampening_left, weight_decay;

  explicit Sgd(const SgdNumbers& n)
      : sign(set(n.maximize ? -1.0f : 1.0f)),
        step(set(-n.lr)),
        momentum(set(n.momentum)),
        dampening_left(set(n.dampening_left)),
        weight_decay(set(n.weight_decay)) {}

  inline __attribute__((always_inline)) void operator()(F& w, F g, F& buffer, F&) const {
    F d = times(sign, g);
    if constexpr (kDecays) d = plus(d, times(weight_decay, w));
    if constexpr (kMomentum) {
      buffer = kReads ? plus(times(buffer, momentum), times(dampening_left, d)) : d;
      d = kNesterov ? plus(d, times(momentum, buffer)) : buffer;
    }
    w = plus(w, times(step, d));
  }
};

struct Adamw {
  static constexpr bool kHasFirst = true, kReadsFirst = true, kHasSecond = true;
  bool near_one;
  F sign, beta1, beta1_left, beta2, beta2_left, decay, step, inverse_correction2, eps;

  explicit Adamw(const AdamwNumbers& n)
      : near_one(n.beta1_left >= 0.5f),
        sign(set(n.maximize ? -1.0f : 1.0f)),
        beta1(set(n.beta1)),
        beta1_left(set(n.beta1_left)),
        beta2(set(n.beta2)),
        beta2_left(set(n.beta2_left)),
        decay(set(n.decay)),
        step(set(-n.step_size)),
        inverse_correction2(set(n.inverse_correction2)),
        eps(set(n.eps)) {}

  inline __attribute__((always_inline)) void operator()(F& w, F g, F& m, F& v) const {
    const F d = times(sign, g);
    // torch.lerp, which is exact at both ends.
    const F way = minus(d, m);
    m = near_one ? minus(d, times(way, beta1)) : plus(m, times(beta1_left, way));
    v = plus(times(v, beta2), times(times(beta2_left, d), d));
    // One division: two would take longer than the memory does.
    const F denominator = plus(times(root(v), inverse_correction2), eps);
    w = plus(times(w, decay), over(times(step, m), denominator));
  }
};

// One word of 64 weights, of which the `frozen` ones keep all their bits.
template <class T, class Step>
INQ_INLINE void step_word(T* w, const T* grad, float* first, float* second, uint64_t frozen, const Step& step) {
  for (int lane = 0; lane < kStepWord; lane += kLanes) {
    const M held = mask_of(static_cast<uint32_t>(frozen >> lane) & kLaneBits);
    const U bits = load_bits(w + lane);
    // A first step overwrites its momentum: it is read for the frozen weights' sake alone.
    const F old_first = Step::kReadsFirst || (Step::kHasFirst && frozen != 0) ? load(first + lane) : set(0.0f);
    const F old_second = Step::kHasSecond ? load(second + lane) : set(0.0f);
    F x = as_float(bits), m = old_first, v = old_second;
    step(x, as_float(load_bits(grad + lane)), m, v);
    store_bits(w + lane, choose(held, bits, rounded(w, x)));
    if (Step::kHasFirst) store(first + lane, choose(held, old_first, m));
    if (Step::kHasSecond) store(second + lane, choose(held, old_second, v));
  }
}

template <class T, class Step>
INQ_INLINE void step_range(const StepTensor& t, const Step& step, int64_t begin, int64_t end) {
  T* const w = static_cast<T*>(t.w);
  const T* const grad = static_cast<const T*>(t.grad);
  for (int64_t i = begin; i < end; i += kStepWord) {
    const int64_t count = end - i < kStepWord ? end - i : kStepWord;
    const uint64_t all = count < kStepWord ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
    const uint64_t frozen = t.mask == nullptr ? 0 : load_word(t.mask, i / kStepWord, count);
    if (frozen == all) continue;
    if (count == kStepWord) {
      step_word(w + i, grad + i, Step::kHasFirst ? t.first + i : nullptr, Step::kHasSecond ? t.second + i : nullptr,
                frozen, step);
      continue;
    }
    // The last weights, as a word with zeros behind them.
    T w_word[kStepWord] = {}, grad_word[kStepWord] = {};
    float first[kStepWord] = {}, second[kStepWord] = {};
    const size_t values = static_cast<size_t>(count) * sizeof(T), floats = static_cast<size_t>(count) * sizeof(float);
    std::memcpy(w_word, w + i, values);
    std::memcpy(grad_word, grad + i, values);
    if (Step::kHasFirst) std::memcpy(first, t.first + i, floats);
    if (Step::kHasSecond) std::memcpy(second, t.second + i, floats);
    step_word(w_word, grad_word, first, second, frozen, step);
    std::memcpy(w + i, w_word, values);
    if (Step::kHasFirst) std::memcpy(t.first + i, first, floats);
    if (Step::kHasSecond) std::memcpy(t.second + i, second, floats);
  }
}

template <class Step>
INQ_INLINE void step_range_of(const StepTensor& t, const Step& step, int64_t begin, int64_t end) {
  t.bfloat16 ? step_range<uint16_t>(t, step, begin, end) : step_range<uint32_t>(t, step, begin, end);
}

template <bool kDecays>
INQ_INLINE void sgd_range_of(const StepTensor& t, const SgdNumbers& n, int64_t begin, int64_t end) {
  if (t.first == nullptr) return step_range_of(t, Sgd<false, false, false, kDecays>(n), begin, end);
  if (n.first_step) {
    return n.nesterov ? step_range_of(t, Sgd<true, false, true, kDecays>(n), begin, end)
                      : step_range_of(t, Sgd<true, false, false, kDecays>(n), begin, end);
  }
  return n.nesterov ? step_range_of(t, Sgd<true, true, true, kDecays>(n), begin, end)
                    : step_range_of(t, Sgd<true, true, false, kDecays>(n), begin, end);
}

void sgd_range(const StepTensor& t, const SgdNumbers& n, int64_t begin, int64_t end) {
  n.weight_decay != 0 ? sgd_range_of<true>(t, n, begin, end) : sgd_range_of<false>(t, n, begin, end);
}

void adamw_range(const StepTensor& t, const AdamwNumbers& n, int64_t begin, int64_t end) {
  step_range_of(t, Adamw(n), begin, end);
}

}  // namespace inq::cpu::INQ_ISA
