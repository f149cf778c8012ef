// quantize.h's freeze_range for one instruction set; see simd.h.
#pragma once

#include "hash.h"
#include "quantize.h"
#include "simd.h"

namespace inq::cpu::INQ_ISA {

// Equation (4) on a vector of float32 bits. Adding half an octave rounds to the nearest power, ties up (inq_format.h).
INQ_INLINE U quantized(U bits, U least, U bottom, U top) {
  const U magnitude = bit_and(bits, set(0x7FFFFFFFu));
  U power = bit_and(plus(magnitude, set(kHalfOctave)), set(0x7F800000u));
  power = smaller(larger(power, bottom), top);
  const U value = bit_or(power, bit_and(bits, set(0x80000000u)));
  return choose(greater(least, magnitude), set(0u), value);
}

// The `count` lowest of the bits that are set.
INQ_INLINE uint64_t first_bits(uint64_t bits, int64_t count) {
  if (count >= __builtin_popcountll(bits)) return bits;
  uint64_t taken = 0;
  for (; count > 0; --count) {
    taken |= bits & -bits;
    bits &= bits - 1;
  }
  return taken;
}

// n1's limits along one word that holds parts of several rows.
struct WordLimits {
  uint32_t least[kWord], bottom[kWord], top[kWord];
};

INQ_INLINE void fill_limits(const QuantizeParams& p, int64_t index, int64_t row, int64_t row_end, int64_t numel,
                            WordLimits& out) {
  for (int64_t j = 0; j < kWord; ++j) {
    if (index + j == row_end && row_end < numel) {
      ++row;
      row_end += p.row;
    }
    const Limits& limits = p.limits[p.n1[row] + 128];
    out.least[j] = limits.least;
    out.bottom[j] = limits.bottom;
    out.top[j] = limits.top;
  }
}

struct Found {
  uint64_t chosen;
  int64_t ties;
};

// Which of a word's candidates are to be frozen.
template <class T>
INQ_INLINE Found select(const T* keys, uint64_t candidates, U key, int64_t ties) {
  const U magnitude = set(0x7FFFFFFFu);
  uint64_t above = 0, tied = 0;
  for (int lane = 0; lane < kWord; lane += kLanes) {
    const U x = bit_and(load_bits(keys + lane), magnitude);
    above |= static_cast<uint64_t>(bits_of(greater(x, key))) << lane;
    tied |= static_cast<uint64_t>(bits_of(equal(x, key))) << lane;
  }
  tied &= candidates;
  const int64_t found = __builtin_popcountll(tied);
  return {(above & candidates) | (found > 0 && ties > 0 ? first_bits(tied, ties) : 0), found};
}

// Writes one word: chosen weights quantized, pruned ones +0, the others as they are.
template <class T, class LimitsOf>
INQ_INLINE void write(T* w, uint64_t chosen, uint64_t kept, const LimitsOf& limits_of) {
  for (int lane = 0; lane < kWord; lane += kLanes) {
    U least, bottom, top;
    limits_of(lane, least, bottom, top);
    const U old = load_bits(w + lane);
    U x = choose(mask_of(static_cast<uint32_t>(chosen >> lane) & kLaneBits), quantized(old, least, bottom, top), old);
    x = choose(mask_of(static_cast<uint32_t>(kept >> lane) & kLaneBits), x, set(0u));
    store_bits(w + lane, x);
  }
}

template <class T>
INQ_INLINE int64_t freeze(const QuantizeParams& p, int64_t begin, int64_t end, int64_t ties) {
  T* const w = static_cast<T*>(p.w);
  const U key = set(p.key);
  int64_t found = 0;
  int64_t row = begin / p.row, row_end = (row + 1) * p.row;
  for (int64_t i = begin; i < end; i += kWord) {
    while (i >= row_end) {
      ++row;
      row_end += p.row;
    }
    const int64_t count = end - i < kWord ? end - i : kWord;
    const uint64_t all = count < kWord ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
    const uint64_t frozen = load_word(p.mask, i / kWord, count);
    const uint64_t kept = p.source.keep == nullptr ? all : load_word(p.source.keep, i / kWord, count);
    const uint64_t candidates = all & ~frozen & kept;
    if (candidates == 0 && kept == all) continue;

    T padded[kWord] = {};
    T* values = w + i;
    if (count < kWord) {
      std::memcpy(padded, values, static_cast<size_t>(count) * sizeof(T));
      values = padded;
    }
    Found word;
    if (p.source.random) {
      uint32_t keys[kWord];
      random_keys(p.source.seed, i, keys);
      word = select(keys, candidates, key, ties);
    } else {
      word = select(values, candidates, key, ties);
    }
    found += word.ties;
    ties -= word.ties;
    if (word.chosen == 0 && kept == all) continue;
    if (i + count <= row_end) {
      const Limits& one = p.limits[p.n1[row] + 128];
      const U least = set(one.least), bottom = set(one.bottom), top = set(one.top);
      write(values, word.chosen, kept, [&](int, U& a, U& b, U& c) {
        a = least;
        b = bottom;
        c = top;
      });
    } else {
      WordLimits limits;
      fill_limits(p, i, row, row_end, p.source.w.numel, limits);
      write(values, word.chosen, kept, [&](int lane, U& a, U& b, U& c) {
        a = load_bits(limits.least + lane);
        b = load_bits(limits.bottom + lane);
        c = load_bits(limits.top + lane);
      });
    }
    if (count < kWord) std::memcpy(w + i, padded, static_cast<size_t>(count) * sizeof(T));
    if (word.chosen != 0) store_word(p.mask, i / kWord, count, frozen | word.chosen);
  }
  return found;
}

int64_t freeze_range(const QuantizeParams& p, int64_t begin, int64_t end, int64_t ties) {
  return p.source.w.bfloat16 ? freeze<uint16_t>(p, begin, end, ties) : freeze<uint32_t>(p, begin, end, ties);
}

}  // namespace inq::cpu::INQ_ISA
