// Digits of keys: counters of a block in shared memory, and the digit that the wanted key has.
#pragma once

#include "blocks.cuh"
#include "exponents.cuh"
#include "keys.cuh"

namespace inq::cuda {

template <int kThreads>
struct SelectShared {
  SumShared<kThreads> sums;
  unsigned long long above, count;
  int digit, last;
  ExponentShared exponent;
};

// Which of kBins digits the `wanted`-th of all that are counted has, from the largest down: left in `shared`, with how
// many are above and how many have it. More than there are means all of them. Returns how many are wanted then.
template <int kBins, int kThreads>
INQ_DEVICE unsigned long long find_digit(const unsigned long long* counters, unsigned long long wanted,
                                         SelectShared<kThreads>* shared) {
  constexpr int kEach = kBins / kThreads;
  const int uppermost = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  unsigned long long mine[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += mine[i] = ld_global(counters + uppermost - i);
  const Sums sums = block_sums<kThreads>(sum, &shared->sums);
  wanted = smaller(wanted, sums.all);
  unsigned long long above = sums.before;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (above < wanted && wanted <= above + mine[i]) {
      st_shared(&shared->digit, uppermost - i);
      st_shared(&shared->above, above);
      st_shared(&shared->count, mine[i]);
    }
    above += mine[i];
  }
  sync_threads();
  return wanted;
}

// One thread: the selection with one digit of `bits` more.
template <int kThreads>
INQ_DEVICE void add_digit(PartitionState* state, int bits, unsigned long long wanted,
                          const SelectShared<kThreads>* shared) {
  st_global(&state->key, ld_global(&state->key) << bits | static_cast<unsigned>(ld_shared(&shared->digit)));
  st_global(&state->wanted, wanted - ld_shared(&shared->above));
  st_global(&state->left, ld_shared(&shared->count));
}

// Counters of a digit after the first.
struct NextCounts {
  static constexpr int kBins = PartitionState::kNext, kStride = kBins + kCopyShift;
  uint32_t counts[kCopies][kStride];

  template <int kThreads>
  INQ_DEVICE void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kCopies * kStride; i += kThreads) st_shared(&counts[0][0] + i, 0u);
  }
  INQ_DEVICE void add(uint32_t digit) { atomic_add(&counts[threadIdx.x % kCopies][digit], 1u); }
  // To the tensor's, once all threads have counted.
  template <int kThreads>
  INQ_DEVICE void flush(unsigned long long* counters) const {
    for (int d = static_cast<int>(threadIdx.x); d < kBins; d += kThreads) {
      unsigned long long count = 0;
      for (int i = 0; i < kCopies; ++i) count += ld_shared(&counts[i][d]);
      if (count != 0) atomic_add(counters + d, count);
    }
  }
};

constexpr int kThirdBits = 10;
static_assert(1 << kThirdBits == NextCounts::kBins);

// Whether third digits are counted from the weights: the list had no room for keys with the first one found.
INQ_DEVICE bool has_no_list(const PartitionState* state) {
  return ld_global(&state->wanted) != 0 && ld_global(&state->listed) == 0;
}

// Counts the third digit of a key that begins with the two digits found, `prefix`.
INQ_DEVICE void count_third_digit(NextCounts& counts, uint32_t key, uint32_t prefix) {
  if (key >> kThirdBits == prefix) counts.add(key & (NextCounts::kBins - 1));
}

}  // namespace inq::cuda
