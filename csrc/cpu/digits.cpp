#include "digits.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "parallel.h"

namespace inq::cpu {
namespace {

uint64_t key_bits(uint32_t x) { return x; }
uint64_t key_bits(uint16_t x) { return static_cast<uint64_t>(x) << 16; }

// Whether mask and keep let all of [begin, end) take part; `masked` is set where the mask holds one back.
bool all_candidates(const KeySource& s, int64_t begin, int64_t end, bool& masked) {
  const int64_t first = begin / 8, bytes = (end + 7) / 8 - first;
  // The bits after the last weight are the caller's and mean nothing.
  const uint8_t last = end % 8 == 0 ? 0xFF : static_cast<uint8_t>((1 << end % 8) - 1);
  // A bit that is set in `some` is set in any of the bytes; flipped ones likewise, so that one loop serves both.
  auto any = [&](const uint8_t* bits, uint8_t flip) {
    uint64_t words = 0;
    uint8_t some = 0;
    int64_t i = 0;
    for (; i + 8 < bytes; i += 8) {
      uint64_t word;
      std::memcpy(&word, bits + first + i, 8);
      words |= word ^ flip * 0x0101010101010101u;
    }
    for (; i + 1 < bytes; ++i) some |= bits[first + i] ^ flip;
    some |= (bits[first + i] ^ flip) & last;
    return words != 0 || some != 0;
  };
  const bool held = s.mask != nullptr && any(s.mask, 0);
  masked |= held;
  return !held && !(s.keep != nullptr && any(s.keep, 0xFF));
}

// A mask is read in bursts too short for the processor to see a stream in them, and then every line is waited for.
void prefetch(const uint8_t* bits, int64_t begin, int64_t numel) {
#if defined(__GNUC__)
  if (bits == nullptr || begin + kBlock > numel) return;
  for (int64_t i = 0; i < kBlock / 8; i += 64) __builtin_prefetch(bits + begin / 8 + i);
#endif
}

}  // namespace

template <class T>
void DigitCounter::add_all(const T* values, int64_t count) {
  while (count > 0) {
    if (held_ == kMost) unpack();
    const int64_t now = std::min(count, kMost - held_);
    uint64_t* const packed = packed_.get();
    auto one = [&](T value, int copy) {
      const uint64_t bits = key_bits(value);
      packed[copy * kStride + (bits >> kRestBits & (kDigits - 1))] +=
          (uint64_t{1} << kCountShift) + (bits & ((1 << kRestBits) - 1));
    };
    int64_t i = 0;
    for (; i + kCopies <= now; i += kCopies) {
      for (int copy = 0; copy < kCopies; ++copy) one(values[i + copy], copy);
    }
    for (; i < now; ++i) one(values[i], 0);
    held_ += now;
    values += now;
    count -= now;
  }
}

void DigitCounter::add(const uint32_t* values, int64_t count) { add_all(values, count); }
void DigitCounter::add(const uint16_t* values, int64_t count) { add_all(values, count); }

void DigitCounter::unpack() {
  for (int copy = 0; copy < kCopies; ++copy) {
    uint64_t* const packed = packed_.get() + copy * kStride;
    for (int d = 0; d < kDigits; ++d) {
      counts_.count[d] += static_cast<int64_t>(packed[d] >> kCountShift);
      counts_.rest[d] += static_cast<int64_t>(packed[d] & ((uint64_t{1} << kCountShift) - 1));
    }
    std::fill(packed, packed + kDigits, 0);
  }
  held_ = 0;
}

void DigitCounter::flush(DigitCounts& to) {
  unpack();
  for (int d = 0; d < kDigits; ++d) {
    to.count[d] += counts_.count[d];
    to.rest[d] += counts_.rest[d];
    counts_.count[d] = counts_.rest[d] = 0;
  }
}

DigitCounts first_digits(const KeySource& source) {
  DigitCounts total;
  std::mutex merging;
  const SelectKeys select = select_keys();
  parallel_for(0, block_count(source.w.numel), kBlocksAThread, [&](int64_t first, int64_t last) {
    DigitCounter counter;
    uint32_t keys[kBlock + 16];
    bool masked = false;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, source.w.numel);
      prefetch(source.mask, begin + 4 * kBlock, source.w.numel);
      prefetch(source.keep, begin + 4 * kBlock, source.w.numel);
      const bool all = all_candidates(source, begin, end, masked);
      if (!all || source.random) {
        counter.add(keys, select(source, begin, end, kKeyBits, 0, keys));
      } else if (source.w.bfloat16) {
        counter.add(static_cast<const uint16_t*>(source.w.data) + begin, end - begin);
      } else {
        counter.add(static_cast<const uint32_t*>(source.w.data) + begin, end - begin);
      }
    }
    // Integers: the order in which threads come here changes nothing.
    const std::lock_guard<std::mutex> lock(merging);
    counter.flush(total);
    total.masked |= masked;
  });
  return total;
}

}  // namespace inq::cpu
