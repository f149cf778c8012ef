#include "exponents.h"

#include <algorithm>
#include <array>
#include <vector>

#include "parallel.h"
#include "survey.h"

namespace inq::cpu {
namespace {

// The weights m·2^e with 0.5 ≤ m < 0.75 (half 0) or 0.75 ≤ m < 1 (half 1): how many, and the sum of the m in 2^-24.
// All of a bin are quantized alike by every candidate n1.
struct Bin {
  int e, half;
  int64_t count, sum;
};

// The `max` rule from the bits of the largest |w|: only the exponent and the top mantissa bit matter.
int max_rule(uint32_t largest) { return std::clamp(nearest_biased(largest) - 127, kN1Min, kN1Max); }

// The power that a bin quantizes to, or below kN1Min for 0.
int level_of(const Bin& bin, int n1, int n2) {
  const int level = std::min(bin.half ? bin.e : bin.e - 1, n1);
  if (level >= n2) return level;
  return bin.e == n2 && !bin.half ? n2 : kN1Min - 1;
}

int lowest_candidate(int top) { return std::max(top - kMseOctaves, kN1Min); }

// Every weight below 2^(this − 1) is 0 for all candidates and adds the same to all their errors.
int floor_of(int top, Format format) { return lowest_candidate(top) - magnitudes(format); }

// The n1 with the least Σ(|w| − q)² − Σw² = Σ(count·q² − 2q·Σ|w|), ties to the larger. Exact: with at most 2^35 weights
// and 26 octaves every term is below 2^112.
template <class Bins>
int mse_rule(const Bins& bins, int top, Format format) {
  const int floor = floor_of(top, format);
  int best = top;
  __int128 least = 0;
  for (int n1 = top; n1 >= lowest_candidate(top); --n1) {
    __int128 score = 0;
    for (const Bin& bin : bins) {
      if (bin.count == 0 || bin.e < floor) continue;
      const int level = level_of(bin, n1, n2_of(format, n1));
      if (level < kN1Min) continue;
      score += static_cast<__int128>(bin.count) << (2 * (level - floor) + 24);
      score -= static_cast<__int128>(bin.sum) << (level - floor + bin.e - floor + 1);
    }
    if (n1 == top || score < least) {
      least = score;
      best = n1;
    }
  }
  return best;
}

// Two bins an octave from many. The subnormals below 2^-127 are 0 for all candidates.
std::vector<Bin> bins_of(const DigitCounts& digits) {
  constexpr int kOctave = kDigitsAnOctave;
  std::vector<Bin> bins;
  for (int d = kOctave / 2; d < kDigits; ++d) {
    if (digits.count[d] == 0) continue;
    const bool subnormal = d < kOctave;
    const int e = subnormal ? kN1Min : d / kOctave - 126;
    const int half = (subnormal ? 4 : 2) * d / kOctave % 2;
    if (bins.empty() || bins.back().e != e || bins.back().half != half) bins.push_back({e, half, 0, 0});
    const int64_t top = static_cast<int64_t>(subnormal ? d : kOctave | d % kOctave) << kRestBits;
    const int64_t sum = digits.count[d] * top + digits.rest[d];
    bins.back().count += digits.count[d];
    bins.back().sum += subnormal ? 2 * sum : sum;
  }
  return bins;
}

uint32_t widened(uint32_t x) { return x & 0x7FFFFFFFu; }
uint32_t widened(uint16_t x) { return static_cast<uint32_t>(x & 0x7FFF) << 16; }

// The half octaves of one row from its floor up; everything under it in the first of `kMost`.
class RowBins {
 public:
  explicit RowBins(int floor) : floor_(floor), below_(static_cast<uint32_t>(2 * (floor + 126) - 1)) {}

  template <class T>
  void add(const T* values, int64_t count) {
    auto one = [&](T value, int copy) {
      const uint32_t bits = widened(value);
      const uint32_t half = std::max(bits >> 22, below_) - below_;
      packed_[copy][half] += (uint64_t{1} << kCountShift) + (bits & 0x3FFFFF);
    };
    int64_t i = 0;
    for (; i + kCopies <= count; i += kCopies) {
      for (int copy = 0; copy < kCopies; ++copy) one(values[i + copy], copy);
    }
    for (; i < count; ++i) one(values[i], 0);
    // At most 2^18 weights: 2^40 fits under the count.
    for (int copy = 0; copy < kCopies; ++copy) {
      for (int b = 1; b < kMost; ++b) {
        const int64_t number = static_cast<int64_t>(packed_[copy][b] >> kCountShift);
        const int64_t rest = static_cast<int64_t>(packed_[copy][b] & ((uint64_t{1} << kCountShift) - 1));
        bins_[b] = {floor_ + (b - 1) / 2, (b - 1) % 2, bins_[b].count + number,
                    bins_[b].sum + number * (2 + (b - 1) % 2) * (1 << 22) + rest};
      }
      packed_[copy] = {};
    }
  }

  // 8 octaves of candidates, 15 magnitudes, 2 more at the top and 1 below: 26 octaves at most.
  static constexpr int kMost = 56;
  const std::array<Bin, kMost>& bins() const { return bins_; }

 private:
  static constexpr int kCopies = 4;
  static constexpr int kCountShift = 42;
  int floor_;
  uint32_t below_;
  std::array<std::array<uint64_t, kMost>, kCopies> packed_ = {};
  std::array<Bin, kMost> bins_ = {};
};

// A row at a time, in pieces that stay in the cache; pruned weights are seen as 0.
class RowReader {
 public:
  RowReader(const Weights& w, const uint8_t* keep) : w_(w), keep_(keep), kept_(keep == nullptr ? 0 : kPiece) {}

  template <class F>
  void each_piece(int64_t begin, int64_t end, const F& f) {
    for (int64_t i = begin; i < end; i += kPiece) {
      const int64_t count = std::min(kPiece, end - i);
      if (keep_ != nullptr) {
        for (int64_t j = 0; j < count; ++j) {
          const bool kept = (keep_[(i + j) / 8] >> (i + j) % 8 & 1) != 0;
          kept_[j] = !kept ? 0
                     : w_.bfloat16 ? widened(static_cast<const uint16_t*>(w_.data)[i + j])
                                   : widened(static_cast<const uint32_t*>(w_.data)[i + j]);
        }
        f(kept_.data(), count);
      } else if (w_.bfloat16) {
        f(static_cast<const uint16_t*>(w_.data) + i, count);
      } else {
        f(static_cast<const uint32_t*>(w_.data) + i, count);
      }
    }
  }

 private:
  static constexpr int64_t kPiece = 1 << 16;
  Weights w_;
  const uint8_t* keep_;
  std::vector<uint32_t> kept_;
};

int row_exponent(RowReader& reader, LargestKey largest_of, int64_t begin, int64_t end, ExponentRule rule) {
  uint32_t largest = 0;
  reader.each_piece(begin, end, [&](const auto* values, int64_t count) {
    largest = std::max(largest, largest_of({values, sizeof(*values) == 2, count}, 0, count));
  });
  if (largest == 0) return kN1ZeroRow;
  const int top = max_rule(largest);
  if (!rule.mse) return top;
  const int floor = floor_of(top, rule.format);
  if (floor <= kN1Min + 1) {
    // Subnormals may take part, and their exponent is not in their upper bits.
    DigitCounter counter;
    DigitCounts digits;
    reader.each_piece(begin, end, [&](const auto* values, int64_t count) { counter.add(values, count); });
    counter.flush(digits);
    return mse_rule(bins_of(digits), top, rule.format);
  }
  RowBins bins(floor);
  reader.each_piece(begin, end, [&](const auto* values, int64_t count) { bins.add(values, count); });
  return mse_rule(bins.bins(), top, rule.format);
}

}  // namespace

int exponent_of(const DigitCounts& digits, ExponentRule rule) {
  int largest = kDigits - 1;
  while (largest > 0 && digits.count[largest] == 0) --largest;
  if (largest == 0 && digits.rest[0] == 0) return kN1ZeroRow;
  const int top = max_rule(static_cast<uint32_t>(largest) << kRestBits);
  return rule.mse ? mse_rule(bins_of(digits), top, rule.format) : top;
}

int exponent_of(uint32_t largest) { return largest == 0 ? kN1ZeroRow : max_rule(largest); }

int tensor_exponent(const Weights& w, const uint8_t* keep, ExponentRule rule) {
  const KeySource source{w, false, 0, nullptr, keep};
  return rule.mse ? exponent_of(first_digits(source), rule) : exponent_of(survey(source, std::nullopt).largest);
}

void row_exponents(const Weights& w, const uint8_t* keep, int64_t rows, ExponentRule rule, int8_t* n1) {
  const int64_t k = w.numel / rows;
  // Few long rows: threads share a row, not the rows. A keep mask is read by whole words, so then they do not.
  if (k >= int64_t{1} << 18 && keep == nullptr) {
    const int64_t size = w.bfloat16 ? 2 : 4;
    for (int64_t r = 0; r < rows; ++r) {
      const Weights row{static_cast<const char*>(w.data) + r * k * size, w.bfloat16, k};
      n1[r] = static_cast<int8_t>(tensor_exponent(row, nullptr, rule));
    }
    return;
  }
  const LargestKey largest_of = largest_key();
  const int64_t grain = std::max<int64_t>(kBlock * kBlocksAThread / k, 1);
  parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    RowReader reader(w, keep);
    for (int64_t r = first; r < last; ++r) {
      n1[r] = static_cast<int8_t>(row_exponent(reader, largest_of, r * k, (r + 1) * k, rule));
    }
  });
}

}  // namespace inq::cpu
