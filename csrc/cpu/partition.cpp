#include "partition.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace inq::cpu {
namespace {

constexpr Threshold kNone{std::numeric_limits<int64_t>::max(), 0};

// Digits after the first.
constexpr int kNextBits = 9;
// The keys that the first digit or a bracket leaves are copied out if they take at most 1/17 of the weights' memory (with
// the counters 1/16 of a few million weights or more), or are at most this many. For normal weights they always do.
constexpr int64_t kWeightsPart = 17;
constexpr int64_t kAlways = 1 << 14;
constexpr int64_t kKeyBytes = sizeof(uint32_t);

// Counts, among the candidates whose key begins with `prefix`, the next `bits` bits, which end at bit `shift`.
std::vector<int64_t> next_digits(const KeySource& source, uint32_t prefix, int bits, int shift) {
  const uint32_t digits = 1u << bits;
  std::vector<int64_t> total(digits);
  std::mutex merging;
  const SelectKeys select = select_keys();
  parallel_for(0, block_count(source.w.numel), kBlocksAThread, [&](int64_t first, int64_t last) {
    std::vector<int64_t> counts(digits);
    uint32_t keys[kBlock + 16];
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, source.w.numel);
      const int64_t found = select(source, begin, end, shift + bits, prefix, keys);
      for (int64_t i = 0; i < found; ++i) ++counts[keys[i] >> shift & (digits - 1)];
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (uint32_t d = 0; d < digits; ++d) total[d] += counts[d];
  });
  return total;
}

// The `total` candidates' keys that begin with `prefix`, in any order.
std::vector<uint32_t> collect(const KeySource& source, uint32_t prefix, int shift, int64_t total) {
  std::vector<uint32_t> all(static_cast<size_t>(total));
  std::atomic<int64_t> next{0};
  const SelectKeys select = select_keys();
  parallel_for(0, block_count(source.w.numel), kBlocksAThread, [&](int64_t first, int64_t last) {
    uint32_t keys[kBlock + 16];
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, source.w.numel);
      const int64_t found = select(source, begin, end, shift, prefix, keys);
      const int64_t at = next.fetch_add(found, std::memory_order_relaxed);
      // Somebody who writes to the weights meanwhile gets a wrong threshold, but nothing is written out of bounds.
      if (at + found <= total) std::copy(keys, keys + found, all.begin() + at);
    }
  });
  return all;
}

// The digit of the `count`-th largest; `count` becomes how many of that digit are still to be selected.
uint32_t digit_of(const std::vector<int64_t>& counts, int64_t& count) {
  uint32_t digit = static_cast<uint32_t>(counts.size()) - 1;
  while (digit > 0 && counts[digit] < count) count -= counts[digit--];
  return digit;
}

// The `count`-th largest of `keys`, which are in a bracket and get another order: a digit of what distinguishes them, then
// those that share it.
Threshold among(uint32_t* keys, int64_t number, const Bracket& bracket, int64_t count) {
  constexpr uint32_t kMost = (1u << 12) - 1;
  int shift = 0;
  while ((bracket.high - bracket.low) >> shift > kMost) ++shift;
  // Somebody may write to the weights meanwhile: whatever a key has become, it is counted in bounds.
  auto digit_of_key = [&](uint32_t key) { return std::min((key - bracket.low) >> shift, kMost); };
  std::vector<int64_t> counts(size_t{kMost} + 1);
  for (int64_t i = 0; i < number; ++i) ++counts[digit_of_key(keys[i])];
  const uint32_t digit = digit_of(counts, count);
  uint32_t* const end = std::partition(keys, keys + number, [&](uint32_t k) { return digit_of_key(k) == digit; });
  std::nth_element(keys, keys + (count - 1), end, std::greater<>());
  const uint32_t key = keys[count - 1];
  return {key, count - std::count_if(keys, end, [&](uint32_t k) { return k > key; })};
}

// How many keys may be copied out.
int64_t room_of(const Weights& w) {
  return std::max(kAlways, w.numel * (w.bfloat16 ? 2 : 4) / kWeightsPart / kKeyBytes);
}

}  // namespace

std::optional<Selection> select_in_one_pass(const KeySource& source, int64_t count) {
  if (count < 1 || !worth_a_sample(source)) return std::nullopt;
  const CandidateCount all = count_candidates_of(source);
  if (count > all.candidates) return std::nullopt;
  const std::optional<Bracket> bracket = guess(source, all.candidates, count, room_of(source.w));
  if (!bracket) return std::nullopt;
  const Survey found = survey(source, bracket);
  if (count <= found.above || count > found.above + found.inside || found.inside > bracket->room) return std::nullopt;
  // Keys have all their bits here: bfloat16 magnitudes are not worth a sample.
  const Threshold threshold = among(found.keys.get(), found.inside, *bracket, count - found.above);
  return Selection{threshold, found.largest, all.frozen > 0};
}

Threshold partition_threshold(const KeySource& source, int64_t count) {
  if (count == 0) return kNone;
  if (const auto selection = select_in_one_pass(source, count)) return selection->threshold;
  return partition_threshold(source, count, first_digits(source));
}

Threshold partition_threshold(const KeySource& source, int64_t count, const DigitCounts& digits) {
  if (count == 0) return kNone;
  int64_t candidates = 0;
  for (int64_t c : digits.count) candidates += c;
  if (count < 0 || count > candidates) {
    throw std::invalid_argument("partition_threshold: count: expected 0 to " + std::to_string(candidates) +
                                " unfrozen weights, got " + std::to_string(count));
  }
  uint32_t key = 0;
  int64_t left = 0;  // candidates whose key begins with `key`
  auto narrow = [&](const std::vector<int64_t>& counts, int bits) {
    const uint32_t digit = digit_of(counts, count);
    key = key << bits | digit;
    left = counts[digit];
  };
  narrow(digits.count, kDigitBits);
  // The lower half of a widened bfloat16 is zero.
  const int low = source.w.bfloat16 && !source.random ? 16 : 0;
  int shift = kRestBits;
  // Equal weights, say, do not fit: those take a pass over the weights for each of the digits that are left.
  while (shift > low && left > room_of(source.w)) {
    const int bits = std::min(shift - low, kNextBits);
    shift -= bits;
    narrow(next_digits(source, key, bits, shift), bits);
  }
  if (shift > low) {
    const std::vector<uint32_t> keys = collect(source, key, shift, left);
    while (shift > low) {
      const int bits = std::min(shift - low, kNextBits);
      const uint32_t prefix = key;
      std::vector<int64_t> counts(size_t{1} << bits);
      for (uint32_t k : keys) {
        if (k >> shift == prefix) ++counts[k >> (shift - bits) & ((1u << bits) - 1)];
      }
      shift -= bits;
      narrow(counts, bits);
    }
  }
  return {key, count};
}

}  // namespace inq::cpu
