// The exponents of rows: one block a row, one read of it, no scratch. In the same reading third digits are counted, where
// partition's list had no room for keys.
#pragma once

#include "select.cuh"

namespace inq::cuda {

constexpr int kRowThreads = 256;
// Weights that a histogram counts before its 32-bit counters are emptied: 8192 in each copy, in 14 bits above 18 for the
// sum of the upper 5 of the 22 bits below a half octave; the lower 17 are summed in another counter.
constexpr int kRowRound = 8192 * kCopies;
constexpr int kRowCountShift = 18, kRowLowBits = 17;

struct RowParams {
  const WeightTensor* tensors;
  int tensor_count;
  PartitionState* states;  // of a selection whose second digits are found; null: none is going on
  int8_t* n1;
  Format format;
  bool mse;
};

struct RowShared {
  static constexpr int kStride = 512 + kCopyShift;
  uint32_t high[kCopies][kStride], low[kCopies][kStride];
  Slot slots[kSlots + 2];
  ExponentShared exponent;
  NextCounts third;
};

template <DType kType>
__global__ void __launch_bounds__(kRowThreads) row_exponents(const __grid_constant__ RowParams p) {
  using T = Raw<kType>;
  constexpr int kRun = kVector<kType>;
  auto* const shared = reinterpret_cast<RowShared*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), copy = thread % kCopies;
  const WeightTensor* const t = tensor_of(p.tensors, p.tensor_count, &WeightTensor::first_row, blockIdx.x);
  const int64_t numel = ld_global(&t->numel), length = ld_global(&t->length);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - ld_global(&t->first_row)) * length, end = begin + length;
  const T* const w = static_cast<const T*>(ld_global(&t->w));
  const uint8_t *const keep = ld_global(&t->keep), *const mask = ld_global(&t->mask);
  const bool aligned = is_aligned(w);
  PartitionState* const state = p.states == nullptr ? nullptr : p.states + (t - p.tensors);
  const bool thirds = Digits<kType, false>::kThird && state != nullptr && has_no_list(state);
  const uint32_t prefix = thirds ? static_cast<uint32_t>(ld_global(&state->key)) : 0;

  if (thirds) shared->third.clear<kRowThreads>();
  for (int s = thread; s <= kTiny; s += kRowThreads) st_shared(&shared->slots[s], Slot{0, 0});
  // Tiles are those of the tensor, whose masks' bytes they begin with: a row's first and last ones are not all its own.
  for (int64_t round = begin / kTile * kTile; round < end; round += kRowRound) {
    for (int i = thread; i < kCopies * RowShared::kStride; i += kRowThreads) {
      st_shared(&shared->high[0][0] + i, 0u);
      st_shared(&shared->low[0][0] + i, 0u);
    }
    sync_threads();
    for (int64_t tile = round + warp_of_thread() * kTile; tile < end && tile < round + kRowRound;
         tile += kRowThreads / 32 * kTile) {
      uint32_t taken = bits_inside<kRun>(begin - tile, end - tile);
      if (keep != nullptr) taken &= load_bits<kRun>(keep + tile / 8, numel - tile);
      uint32_t raw[8];
      load_tile<T, kRun>(w + tile, aligned && tile + kTile <= numel, taken, raw);
      uint32_t candidates = thirds ? taken : 0;
      if (thirds && mask != nullptr) candidates &= ~load_bits<kRun>(mask + tile / 8, numel - tile);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t x = widened<kType>(raw[j]) & kMagnitude;
        if (candidates >> j & 1) count_third_digit(shared->third, x, prefix);
        if ((taken >> j & 1) == 0 || x == 0) continue;
        int slot = static_cast<int>(x >> 22);
        if (x < 0x800000u) {
          // Subnormals from 2^-127 on are one octave, whose leading bit is one lower.
          x <<= 1;
          slot = x < 0x800000u ? kTiny : static_cast<int>(x >> 22) - 2;
        }
        const uint32_t rest = x & 0x3FFFFFu;
        atomic_add(&shared->high[copy][slot], (1u << kRowCountShift) + (rest >> kRowLowBits));
        atomic_add(&shared->low[copy][slot], rest & ((1u << kRowLowBits) - 1));
      }
    }
    sync_threads();
    for (int s = thread; s <= kTiny; s += kRowThreads) {
      Slot slot = ld_shared(&shared->slots[s]);
      for (int c = 0; c < kCopies; ++c) {
        const uint32_t high = ld_shared(&shared->high[c][s]);
        const unsigned long long count = high >> kRowCountShift;
        slot.count += count;
        slot.sum += count * ((2u + s % 2) << 22) + ld_shared(&shared->low[c][s]) +
                    (static_cast<unsigned long long>(high & ((1u << kRowCountShift) - 1)) << kRowLowBits);
      }
      st_shared(&shared->slots[s], slot);
    }
    sync_threads();
  }
  sync_threads();
  if (thirds) shared->third.flush<kRowThreads>(state->next[1]);
  const ExponentRule rule{p.format, p.mse, kLowest<kType>, kHighest<kType>};
  const int n1 = exponent_of<kRowThreads>(shared->slots, rule, &shared->exponent);
  if (thread == 0) st_global(p.n1 + blockIdx.x, static_cast<int8_t>(n1));
}

}  // namespace inq::cuda
