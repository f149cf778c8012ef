// The keys by which the partition ranks weights, the largest first to be frozen: 31-bit numbers, either the bits of |w|
// as a float32 (bfloat16 widened), whose order is that of |w|, or the random partition's hash of (seed, flat index).
#pragma once

#include <cstdint>

#include "isa.h"

namespace inq::cpu {

constexpr int kKeyBits = 31;
// Ranges of weights begin at a multiple of this: one 64-bit word of a mask.
constexpr int64_t kWord = 64;

struct Weights {
  const void* data;  // contiguous float32 or bfloat16
  bool bfloat16;
  int64_t numel;
};

struct KeySource {
  Weights w;
  bool random;
  uint64_t seed;
  const uint8_t* mask;  // one bit a weight, set: frozen and no candidate; nullptr: none is
  const uint8_t* keep;  // clear: pruned and no candidate; nullptr: all are kept
};

// Writes the keys of the candidates in [begin, end) with key >> shift == prefix to `out`, in flat order; returns how
// many. `out` has room for end − begin + 16. Shift 31 and prefix 0 mean all candidates.
using SelectKeys = int64_t (*)(const KeySource& source, int64_t begin, int64_t end, int shift, uint32_t prefix,
                               uint32_t* out);

// What the keys of the candidates in a range say about a bracket of keys, low ≤ key ≤ high.
struct RangeFacts {
  int64_t above;     // candidates with key > high
  uint32_t largest;  // of the candidates' keys; 0 for none
};

// Adds the facts of [begin, end) to `facts`, and writes the candidates' keys inside the bracket to `out`, in flat order;
// returns how many. `out` has room for end − begin + 16.
using SurveyKeys = int64_t (*)(const KeySource& source, int64_t begin, int64_t end, uint32_t low, uint32_t high,
                               RangeFacts& facts, uint32_t* out);

// How many weights there are in [begin, end): those that mask and keep let take part, and those that the mask holds.
struct CandidateCount {
  int64_t candidates, frozen;
};
using CountCandidates = CandidateCount (*)(const KeySource& source, int64_t begin, int64_t end);

// The largest magnitude bits among w[begin, end), any begin; 0 for none.
using LargestKey = uint32_t (*)(const Weights& w, int64_t begin, int64_t end);

namespace portable {
int64_t select_keys(const KeySource&, int64_t, int64_t, int, uint32_t, uint32_t*);
int64_t survey_keys(const KeySource&, int64_t, int64_t, uint32_t, uint32_t, RangeFacts&, uint32_t*);
CandidateCount count_candidates(const KeySource&, int64_t, int64_t);
uint32_t largest_key(const Weights&, int64_t, int64_t);
}  // namespace portable
namespace avx2 {
int64_t select_keys(const KeySource&, int64_t, int64_t, int, uint32_t, uint32_t*);
int64_t survey_keys(const KeySource&, int64_t, int64_t, uint32_t, uint32_t, RangeFacts&, uint32_t*);
CandidateCount count_candidates(const KeySource&, int64_t, int64_t);
uint32_t largest_key(const Weights&, int64_t, int64_t);
}  // namespace avx2
namespace avx512 {
int64_t select_keys(const KeySource&, int64_t, int64_t, int, uint32_t, uint32_t*);
int64_t survey_keys(const KeySource&, int64_t, int64_t, uint32_t, uint32_t, RangeFacts&, uint32_t*);
CandidateCount count_candidates(const KeySource&, int64_t, int64_t);
uint32_t largest_key(const Weights&, int64_t, int64_t);
}  // namespace avx512

// Those of the instruction set in use.
SelectKeys select_keys();
SurveyKeys survey_keys();
CountCandidates count_candidates();
LargestKey largest_key();

}  // namespace inq::cpu
