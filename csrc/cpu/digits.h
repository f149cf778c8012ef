// The first digit of keys, and one pass over the weights that counts it: the exponent and the five top mantissa bits of
// |w|. It is the radix select's first step (partition.cpp) and all that the exponent rules need (exponents.cpp).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "keys.h"

namespace inq::cpu {

constexpr int kDigitBits = 13;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kDigitsAnOctave = kDigits >> 8;
constexpr int kRestBits = kKeyBits - kDigitBits;

// How many keys have each digit, and the exact sum of the 18 bits below it.
struct DigitCounts {
  std::vector<int64_t> count = std::vector<int64_t>(kDigits);
  std::vector<int64_t> rest = std::vector<int64_t>(kDigits);
  // Whether the mask held any weight, which is then missing here.
  bool masked = false;
};

// Counts digits for one thread. One 64-bit addition a key does for count and sum: the count is in the upper bits.
class DigitCounter {
 public:
  DigitCounter() : packed_(new uint64_t[kCopies * kStride]()) {}
  // Float32 bits or keys, bfloat16 bits; signs are ignored.
  void add(const uint32_t* values, int64_t count);
  void add(const uint16_t* values, int64_t count);
  // Adds all that was counted to `to` and starts again from nothing.
  void flush(DigitCounts& to);

 private:
  template <class T>
  void add_all(const T* values, int64_t count);
  void unpack();

  // Equal keys in a row would wait for each other's addition: each of four neighbours has its own counters. The 8 more
  // keep the copies of one counter out of each other's cache sets.
  static constexpr int kCopies = 4;
  static constexpr int kStride = kDigits + 8;
  static constexpr int kCountShift = 42;
  // 2^21 sums of 18 bits stay under the count, and the count in its 22 bits.
  static constexpr int64_t kMost = int64_t{1} << 21;

  std::unique_ptr<uint64_t[]> packed_;
  int64_t held_ = 0;
  DigitCounts counts_;
};

// The digits of all candidates of `source`.
DigitCounts first_digits(const KeySource& source);

// Ranges of blocks are what threads share; and what is selected from one block fits the first-level cache.
constexpr int64_t kBlock = 2048;
constexpr int64_t kBlocksAThread = 16;
inline int64_t block_count(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

}  // namespace inq::cpu
