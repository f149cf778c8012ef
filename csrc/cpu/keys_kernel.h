// keys.h's functions for one instruction set; see simd.h.
#pragma once

#include "hash.h"
#include "keys.h"
#include "simd.h"

namespace inq::cpu::INQ_ISA {

// One word: `count` weights (64, or fewer at the end) of which `candidates` says who takes part.
template <class T>
INQ_INLINE int64_t select_word(const T* values, uint64_t candidates, int shift, U prefix, uint32_t* out) {
  const U magnitude = set(0x7FFFFFFFu);
  uint32_t* const begin = out;
  for (int lane = 0; lane < kWord; lane += kLanes) {
    const U key = bit_and(load_bits(values + lane), magnitude);
    const uint32_t some = bits_of(equal(shift_right(key, shift), prefix));
    const uint32_t chosen = some & static_cast<uint32_t>(candidates >> lane) & kLaneBits;
    out += compress(out, mask_of(chosen), key);
  }
  return out - begin;
}

template <class T>
INQ_INLINE int64_t select_range(const KeySource& s, int64_t begin, int64_t end, int shift, uint32_t prefix,
                                uint32_t* out) {
  const T* const values = static_cast<const T*>(s.w.data);
  const U wanted = set(prefix);
  uint32_t* const first = out;
  for (int64_t i = begin; i < end; i += kWord) {
    const int64_t count = end - i < kWord ? end - i : kWord;
    uint64_t candidates = count < kWord ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
    if (s.mask != nullptr) candidates &= ~load_word(s.mask, i / kWord, count);
    if (s.keep != nullptr) candidates &= load_word(s.keep, i / kWord, count);
    if (candidates == 0) continue;
    if (s.random) {
      uint32_t keys[kWord];
      random_keys(s.seed, i, keys);
      out += select_word(keys, candidates, shift, wanted, out);
    } else if (count < kWord) {
      T padded[kWord] = {};
      std::memcpy(padded, values + i, static_cast<size_t>(count) * sizeof(T));
      out += select_word(padded, candidates, shift, wanted, out);
    } else {
      out += select_word(values + i, candidates, shift, wanted, out);
    }
  }
  return out - first;
}

int64_t select_keys(const KeySource& s, int64_t begin, int64_t end, int shift, uint32_t prefix, uint32_t* out) {
  return s.w.bfloat16 ? select_range<uint16_t>(s, begin, end, shift, prefix, out)
                      : select_range<uint32_t>(s, begin, end, shift, prefix, out);
}

template <class T>
INQ_INLINE uint32_t largest_of(const T* values, int64_t count) {
  const U magnitude = set(0x7FFFFFFFu);
  U largest[4] = {set(0u), set(0u), set(0u), set(0u)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      largest[j] = larger(largest[j], bit_and(load_bits(values + i + j * kLanes), magnitude));
    }
  }
  uint32_t lanes[kLanes];
  store_bits(lanes, larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
  uint32_t result = 0;
  for (uint32_t x : lanes) result = x > result ? x : result;
  for (; i < count; ++i) {
    const uint32_t x = (static_cast<uint32_t>(values[i]) << (32 - 8 * sizeof(T))) & 0x7FFFFFFFu;
    result = x > result ? x : result;
  }
  return result;
}

uint32_t largest_key(const Weights& w, int64_t begin, int64_t end) {
  return w.bfloat16 ? largest_of(static_cast<const uint16_t*>(w.data) + begin, end - begin)
                    : largest_of(static_cast<const uint32_t*>(w.data) + begin, end - begin);
}

}  // namespace inq::cpu::INQ_ISA
