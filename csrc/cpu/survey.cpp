#include "survey.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

#include "digits.h"
#include "parallel.h"

namespace inq::cpu {
namespace {

// The sample: of so many words of 64 weights at most, one in so many weights, every third candidate among the first 16,
// which are a cache line; and no fewer keys than that.
constexpr int64_t kMostWords = 1 << 14;
constexpr int64_t kWeightsAWord = 512;
constexpr int64_t kKeysAWord = 16;
constexpr int64_t kEach = 3;
constexpr int kLeastSample = 1024;
// Fewer weights are counted by digits in the time that it takes.
constexpr int64_t kWorthASample = 1 << 21;

// The word of 64 weights that is the i-th of `taken`. Not at equal distances, which might be those of a matrix's rows:
// by multiples of the golden ratio.
int64_t sampled_word(int64_t i, int64_t taken, int64_t words) {
  const uint64_t jitter = static_cast<uint64_t>(i + 1) * 0x9E3779B97F4A7C15u >> 32;
  const int64_t first = i * words / taken, range = (i + 1) * words / taken - first;
  return first + static_cast<int64_t>(jitter * static_cast<uint64_t>(range) >> 32);
}

// Keys from all over the weights, the same at each call: some of the first in each of `taken` words. Where weights differ
// by their place in a word, that misleads, and the pass for which it does is lost.
std::vector<uint32_t> sample(const KeySource& source, int64_t taken) {
  const int64_t words = source.w.numel / kWord, size = source.w.bfloat16 ? 2 : 4;
  const SelectKeys select = select_keys();
  std::vector<uint32_t> result;
  int64_t next = 0;
  for (int64_t i = 0; i < taken; ++i) {
#if defined(__GNUC__)
    const int64_t ahead = sampled_word(std::min(i + 16, taken - 1), taken, words);
    __builtin_prefetch(static_cast<const char*>(source.w.data) + ahead * kWord * size);
    if (source.mask != nullptr) __builtin_prefetch(source.mask + ahead * kWord / 8);
#endif
    uint32_t keys[kWord + 16];
    const int64_t begin = sampled_word(i, taken, words) * kWord;
    const int64_t found = select(source, begin, begin + kKeysAWord, kKeyBits, 0, keys);
    // Each of all these candidates alike, wherever few are left.
    for (; next < found; next += kEach) result.push_back(keys[next]);
    next -= found;
  }
  return result;
}

}  // namespace

bool worth_a_sample(const KeySource& source) {
  // Of bfloat16 magnitudes each holds too many weights for a narrow bracket, and their digits are few.
  return source.w.numel >= kWorthASample && (source.random || !source.w.bfloat16);
}

std::optional<Bracket> guess(const KeySource& source, int64_t candidates, int64_t count, int64_t room) {
  const int64_t words_taken = std::min(kMostWords, source.w.numel / kWeightsAWord);
  std::vector<uint32_t> keys = sample(source, words_taken);
  const double size = static_cast<double>(keys.size());
  if (size < kLeastSample) return std::nullopt;
  // 2.5 standard deviations if all keys of a word were alike, and many more if they are not.
  const double margin = size * 1.25 / std::sqrt(std::min(size, static_cast<double>(words_taken)));
  const double rank = size * (1.0 - static_cast<double>(count) / static_cast<double>(candidates));
  auto at = [&](double place, uint32_t beyond) {
    if (place < 0.0 || place >= size) return beyond;
    const auto nth = keys.begin() + static_cast<int64_t>(place);
    std::nth_element(keys.begin(), nth, keys.end());
    return *nth;
  };
  const uint32_t low = at(rank - margin, 0), high = at(rank + margin, (1u << kKeyBits) - 1);
  const auto inside = std::count_if(keys.begin(), keys.end(), [&](uint32_t k) { return low <= k && k <= high; });
  // Of equal keys there are too many, which would not all fit.
  if (static_cast<double>(inside) / size * static_cast<double>(candidates) > 0.8 * static_cast<double>(room)) {
    return std::nullopt;
  }
  return Bracket{low, high, room};
}

Survey survey(const KeySource& source, const std::optional<Bracket>& bracket) {
  // No key is above or inside this one.
  const Bracket range = bracket.value_or(Bracket{1u << kKeyBits, (1u << kKeyBits) - 1, 0});
  Survey total;
  // Not vector: memory that stays unused is never touched.
  if (range.room > 0) total.keys.reset(new uint32_t[static_cast<size_t>(range.room)]);
  std::atomic<int64_t> inside{0};
  std::mutex merging;
  const SurveyKeys look = survey_keys();
  parallel_for(0, block_count(source.w.numel), kBlocksAThread, [&](int64_t first, int64_t last) {
    RangeFacts facts{0, 0};
    uint32_t keys[kBlock + 16];
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, source.w.numel);
      const int64_t found = look(source, begin, end, range.low, range.high, facts, keys);
      const int64_t at = inside.fetch_add(found, std::memory_order_relaxed);
      if (at + found <= range.room) std::copy(keys, keys + found, total.keys.get() + at);
    }
    // Integers: the order in which threads come here changes nothing.
    const std::lock_guard<std::mutex> lock(merging);
    total.above += facts.above;
    total.largest = std::max(total.largest, facts.largest);
  });
  total.inside = inside.load();
  return total;
}

CandidateCount count_candidates_of(const KeySource& source) {
  if (source.mask == nullptr && source.keep == nullptr) return {source.w.numel, 0};
  CandidateCount total{0, 0};
  std::mutex merging;
  const CountCandidates count = count_candidates();
  // A bit a weight: 32 times as many weights are as much memory.
  parallel_for(0, block_count(source.w.numel), 32 * kBlocksAThread, [&](int64_t first, int64_t last) {
    const CandidateCount part = count(source, first * kBlock, std::min(last * kBlock, source.w.numel));
    const std::lock_guard<std::mutex> lock(merging);
    total.candidates += part.candidates;
    total.frozen += part.frozen;
  });
  return total;
}

}  // namespace inq::cpu
