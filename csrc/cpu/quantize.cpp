#include "quantize.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

#define INQ_ISA portable
#define INQ_LANES 1
#include "quantize_kernel.h"

namespace inq::cpu {
namespace {

LimitTable limit_table(Format format) {
  LimitTable table;
  for (int n1 = -128; n1 < 128; ++n1) {
    const int n2 = n2_of(format, n1);
    const int bottom = std::max(n2, kN1Min), top = std::max(n1, kN1Min);
    table[n1 + 128] = {least_nonzero(n2), static_cast<uint32_t>(bottom + 127) << 23,
                       static_cast<uint32_t>(top + 127) << 23};
  }
  return table;
}

// How many weights a thread takes at once, and the grain at which ties are counted.
constexpr int64_t kChunk = 1 << 15;

}  // namespace

void quantize_with_mask(const KeySource& source, void* w, uint8_t* mask, const int8_t* n1, int64_t rows, Format format,
                        Threshold threshold) {
  const int64_t numel = source.w.numel;
  const LimitTable limits = limit_table(format);
  const bool one_n1 = std::all_of(n1, n1 + rows, [&](int8_t n) { return n == n1[0]; });
  // A key beyond all keys selects nothing.
  constexpr int64_t kLargest = 0x7FFFFFFF;
  const int unit = source.w.bfloat16 && !source.random ? 16 : 0;
  const bool none = threshold.key > kLargest >> unit;
  const uint32_t key = static_cast<uint32_t>(none ? kLargest : threshold.key << unit);
  const int64_t ties = none ? 0 : threshold.ties;
  const QuantizeParams p{source, w, mask, n1, one_n1 ? numel : numel / rows, limits.data(), key};
  const FreezeRange freeze = INQ_IN_USE(freeze_range);

  // Which ties are the first in flat order is known once those of the chunks before are counted. In this pass only the
  // thread that starts at 0 knows; for the others' chunks there is a second one, where there are ties to take.
  const int64_t chunks = (numel + kChunk - 1) / kChunk;
  std::vector<int32_t> tied(static_cast<size_t>(chunks));
  std::vector<uint8_t> settled(static_cast<size_t>(chunks));
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    int64_t before = 0;
    for (int64_t c = first; c < last; ++c) {
      const int64_t take = first == 0 ? std::max<int64_t>(ties - before, 0) : 0;
      tied[c] = static_cast<int32_t>(freeze(p, c * kChunk, std::min((c + 1) * kChunk, numel), take));
      before += tied[c];
      settled[c] = first == 0;
    }
  });
  std::vector<int64_t> late;
  std::vector<int64_t> take;
  for (int64_t c = 0, before = 0; c < chunks && before < ties; before += tied[c++]) {
    if (settled[c] == 0 && tied[c] > 0) {
      late.push_back(c);
      take.push_back(ties - before);
    }
  }
  parallel_for(0, static_cast<int64_t>(late.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      freeze(p, late[i] * kChunk, std::min((late[i] + 1) * kChunk, numel), take[i]);
    }
  });
  // Bits after the last weight become 0, as the definition's do.
  if (const int64_t last = numel % 8; last != 0) mask[numel / 8] &= static_cast<uint8_t>((1 << last) - 1);
}

}  // namespace inq::cpu
