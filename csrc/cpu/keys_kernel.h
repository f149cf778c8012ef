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
INQ_INLINE int64_t survey_word(const T* values, uint64_t candidates, U below, U high, int64_t& above, U& largest,
                               uint32_t* out) {
  const U magnitude = set(0x7FFFFFFFu);
  uint32_t* const begin = out;
  for (int lane = 0; lane < kWord; lane += kLanes) {
    const U key = bit_and(load_bits(values + lane), magnitude);
    const uint32_t here = static_cast<uint32_t>(candidates >> lane) & kLaneBits;
    const uint32_t over = bits_of(greater(key, high)) & here;
    const uint32_t inside = bits_of(greater(key, below)) & here & ~over;
    above += __builtin_popcount(over);
    largest = larger(largest, candidates == ~uint64_t{0} ? key : choose(mask_of(here), key, set(0u)));
    out += compress(out, mask_of(inside), key);
  }
  return out - begin;
}

// The candidates of the word that begins at weight i, of which `count` exist.
INQ_INLINE uint64_t candidates_of(const KeySource& s, int64_t i, int64_t count) {
  uint64_t candidates = count < kWord ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
  if (s.mask != nullptr) candidates &= ~load_word(s.mask, i / kWord, count);
  if (s.keep != nullptr) candidates &= load_word(s.keep, i / kWord, count);
  return candidates;
}

// f(values, candidates) for each word of [begin, end) that has candidates: 64 keys or weights that may be read.
template <class T, class F>
INQ_INLINE void each_word(const KeySource& s, int64_t begin, int64_t end, const F& f) {
  const T* const values = static_cast<const T*>(s.w.data);
  for (int64_t i = begin; i < end; i += kWord) {
    const int64_t count = end - i < kWord ? end - i : kWord;
    const uint64_t candidates = candidates_of(s, i, count);
    if (candidates == 0) continue;
    if (s.random) {
      uint32_t keys[kWord];
      random_keys(s.seed, i, keys);
      f(keys, candidates);
    } else if (count < kWord) {
      T padded[kWord] = {};
      std::memcpy(padded, values + i, static_cast<size_t>(count) * sizeof(T));
      f(padded, candidates);
    } else {
      f(values + i, candidates);
    }
  }
}

template <class T>
INQ_INLINE int64_t select_range(const KeySource& s, int64_t begin, int64_t end, int shift, uint32_t prefix,
                                uint32_t* out) {
  const U wanted = set(prefix);
  uint32_t* const first = out;
  each_word<T>(s, begin, end, [&](const auto* values, uint64_t candidates) INQ_INLINED {
    out += select_word(values, candidates, shift, wanted, out);
  });
  return out - first;
}

template <class T>
INQ_INLINE int64_t survey_range(const KeySource& s, int64_t begin, int64_t end, uint32_t low, uint32_t high,
                                RangeFacts& facts, uint32_t* out) {
  // Comparisons are signed: −1 is below all keys.
  const U below = set(low - 1), top = set(high);
  U largest = set(0u);
  int64_t above = 0;
  uint32_t* const first = out;
  each_word<T>(s, begin, end, [&](const auto* values, uint64_t candidates) INQ_INLINED {
    // With constant bits the masking is gone.
    out += candidates == ~uint64_t{0} ? survey_word(values, ~uint64_t{0}, below, top, above, largest, out)
                                      : survey_word(values, candidates, below, top, above, largest, out);
  });
  uint32_t lanes[kLanes];
  store_bits(lanes, largest);
  for (uint32_t x : lanes) facts.largest = x > facts.largest ? x : facts.largest;
  facts.above += above;
  return out - first;
}

int64_t survey_keys(const KeySource& s, int64_t begin, int64_t end, uint32_t low, uint32_t high, RangeFacts& facts,
                    uint32_t* out) {
  return s.w.bfloat16 ? survey_range<uint16_t>(s, begin, end, low, high, facts, out)
                      : survey_range<uint32_t>(s, begin, end, low, high, facts, out);
}

CandidateCount count_candidates(const KeySource& s, int64_t begin, int64_t end) {
  CandidateCount total{0, 0};
  auto add = [&](int64_t i, int64_t count) INQ_INLINED {
    const uint64_t frozen = s.mask != nullptr ? load_word(s.mask, i / kWord, count) : 0;
    total.candidates += __builtin_popcountll(candidates_of(s, i, count));
    total.frozen += __builtin_popcountll(frozen);
  };
  int64_t i = begin;
  for (; i + kWord <= end; i += kWord) add(i, kWord);
  if (i < end) add(i, end - i);
  return total;
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
