// The exponent rules, decided by one block from a histogram with two bins an octave.
//
// *Slot* s is for weights m·2^e with e = s / 2 − 126, and 0.5 ≤ m < 0.75 (even s) or 0.75 ≤ m < 1 (odd s). Every
// candidate n1 quantizes all weights of a slot alike, so counts and exact sums of the m are all that the rules need.
#pragma once

#include "weights.cuh"

namespace inq::cuda {

// 2·255, without NaN and Inf.
constexpr int kSlots = 510;
// Counted apart: nonzero weights below 2^-127, which are 0 for all candidates.
constexpr int kTiny = kSlots;

struct Slot {
  unsigned long long count;
  unsigned long long sum;  // of the m, in 2^-24
};

// A score of the mse rule has at most 107 bits.
__extension__ typedef __int128 Wide;

struct ExponentShared {
  unsigned long long scores[kMseOctaves + 1][2];
  int largest;  // 0: no weight but 0; 1: tiny ones; s + 2: the uppermost slot that has some
};

struct ExponentRule {
  Format format;
  bool mse;
  int lowest, highest;  // of the dtype
};

// The power that a slot's weights become, or below `lowest` for 0.
INQ_DEVICE int slot_level(int slot, int n1, const ExponentRule& rule) {
  const int e = slot / 2 - 126, half = slot % 2, n2 = n2_of(rule.format, n1);
  const int level = smaller(e - 1 + half, n1);
  if (level >= n2) return level;
  return e == n2 && half == 0 ? n2 : rule.lowest - 1;
}

// n1 of the weights that `slots` counts ([kSlots + 1], in shared memory, the last for tiny ones), by all threads of a
// block. The `mse` rule: the n1 with the least Σ(|w| − q)² − Σw² = Σ(count·q² − 2q·Σ|w|), ties to the larger.
template <int kThreads>
INQ_DEVICE int exponent_of(const Slot* slots, const ExponentRule& rule, ExponentShared* shared) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread();
  if (thread == 0) st_shared(&shared->largest, 0);
  sync_threads();
#pragma unroll 1
  for (int s = thread; s <= kTiny; s += kThreads) {
    if (ld_shared(&slots[s].count) != 0) atomic_max(&shared->largest, s == kTiny ? 1 : s + 2);
  }
  sync_threads();
  const int largest = ld_shared(&shared->largest);
  if (largest == 0) return kN1ZeroRow;
  // Half an octave more rounds to the nearest power, ties up.
  const int top = clamped(larger(largest - 1, 0) / 2 - 127, rule.lowest, rule.highest);
  if (!rule.mse) return top;

  const int last = larger(top - kMseOctaves, rule.lowest);
  // Every weight below 2^(this − 1) is 0 for all candidates and adds the same to all their errors.
  const int floor = last - magnitudes(rule.format);
  // A warp for each candidate, its lanes for the slots. Loops here are rolled up: short, of wide numbers.
#pragma unroll 1
  for (int candidate = warp_of_thread(); candidate <= top - last; candidate += kThreads / 32) {
    const int n1 = top - candidate;
    Wide score = 0;
#pragma unroll 1
    for (int s = larger(2 * (floor + 126), 0) + lane; s <= smaller(2 * (top + 127) + 1, kSlots - 1); s += 32) {
      const int level = slot_level(s, n1, rule);
      if (level < rule.lowest) continue;
      score += static_cast<Wide>(ld_shared(&slots[s].count)) << (2 * (level - floor) + 24);
      score -= static_cast<Wide>(ld_shared(&slots[s].sum)) << (level - floor + s / 2 - 126 - floor + 1);
    }
#pragma unroll 1
    for (int mask = 16; mask > 0; mask /= 2) {
      const auto low = shuffle_xor(static_cast<unsigned long long>(score), mask);
      const auto high = shuffle_xor(static_cast<unsigned long long>(score >> 64), mask);
      score += static_cast<Wide>(high) << 64 | static_cast<Wide>(low);
    }
    if (lane == 0) {
      st_shared(&shared->scores[candidate][0], static_cast<unsigned long long>(score));
      st_shared(&shared->scores[candidate][1], static_cast<unsigned long long>(score >> 64));
    }
  }
  sync_threads();
  int best = top;
  Wide least = 0;
#pragma unroll 1
  for (int candidate = 0; candidate <= top - last; ++candidate) {
    const Wide score = static_cast<Wide>(ld_shared(&shared->scores[candidate][1])) << 64 |
                       static_cast<Wide>(ld_shared(&shared->scores[candidate][0]));
    if (candidate == 0 || score < least) {
      least = score;
      best = top - candidate;
    }
  }
  return best;
}

}  // namespace inq::cuda
