#include "partition.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace inq::cpu {
namespace {

constexpr Threshold kNone{std::numeric_limits<int64_t>::max(), 0};

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

// The digit of the `count`-th largest; `count` becomes how many of that digit are still to be selected.
uint32_t digit_of(const std::vector<int64_t>& counts, int64_t& count) {
  uint32_t digit = static_cast<uint32_t>(counts.size()) - 1;
  while (counts[digit] < count) count -= counts[digit--];
  return digit;
}

}  // namespace

Threshold partition_threshold(const KeySource& source, int64_t count) {
  return count == 0 ? kNone : partition_threshold(source, count, first_digits(source));
}

Threshold partition_threshold(const KeySource& source, int64_t count, const DigitCounts& digits) {
  if (count == 0) return kNone;
  int64_t candidates = 0;
  for (int64_t c : digits.count) candidates += c;
  if (count < 0 || count > candidates) {
    throw std::invalid_argument("partition_threshold: count: expected 0 to " + std::to_string(candidates) +
                                " unfrozen weights, got " + std::to_string(count));
  }
  uint32_t key = digit_of(digits.count, count);
  // The lower half of a widened bfloat16 is zero.
  const int low = source.w.bfloat16 && !source.random ? 16 : 0;
  // All that is left as one digit saves a pass over the weights, if a thread's counters (4 MB for 19 bits) are little
  // beside them.
  const int left = kRestBits - low;
  const int64_t counters = static_cast<int64_t>(sizeof(int64_t)) << left;
  const int64_t weights = source.w.numel * (source.w.bfloat16 ? 2 : 4);
  const bool at_once = counters * (thread_count() + 1) <= weights / 32 || left <= 10;
  for (int shift = kRestBits; shift > low;) {
    const int bits = at_once ? left : std::min(shift - low, 10);
    shift -= bits;
    key = key << bits | digit_of(next_digits(source, key, bits, shift), count);
  }
  return {key, count};
}

}  // namespace inq::cpu
