// One pass over the weights that moves at the speed of memory: the largest key for the `max` rule, and for the partition the
// few keys among which its threshold is, if a sample has told where to look.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "keys.h"

namespace inq::cpu {

// Keys low ≤ key ≤ high, of which at most `room` are wanted.
struct Bracket {
  uint32_t low, high;
  int64_t room;
};

// Whether there are so many weights, and so many different keys, that a sample pays.
bool worth_a_sample(const KeySource& source);

// A bracket in which the `count`-th largest of the `candidates` keys of `source` very likely is, from a sample, always the
// same; none where 0.8·room keys or more would be in it, or the sample has too few.
std::optional<Bracket> guess(const KeySource& source, int64_t candidates, int64_t count, int64_t room);

struct Survey {
  uint32_t largest = 0;              // of the candidates' keys
  int64_t above = 0;                 // candidates with a key over the bracket
  int64_t inside = 0;                // candidates with a key in it …
  std::unique_ptr<uint32_t[]> keys;  // … and those keys in any order, if they are at most `room`
};

// Without a bracket nothing is above or inside.
Survey survey(const KeySource& source, const std::optional<Bracket>& bracket);

// How many weights the partition can choose from, and how many the mask holds.
CandidateCount count_candidates_of(const KeySource& source);

}  // namespace inq::cpu
