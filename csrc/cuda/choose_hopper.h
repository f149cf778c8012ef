// Whether linear_hopper takes a product, and with which tile: a pure function of sizes, for tests without a GPU.
#pragma once

#include <cstdint>

namespace inq::cuda {

// A tile of linear_hopper: `rows` output features by `tokens` rows of x, whose sum over K `splits` blocks share.
struct HopperChoice {
  bool use = false;
  int rows = 0, tokens = 0, splits = 1;
};

// What the choice depends on. x_bytes: of an element of x as the tensor cores read it, 2 or 1 (linear_fp8). x_aligned:
// the address of x and the bytes between its rows are multiples of 16, as a tensor map asks for.
struct HopperProblem {
  int64_t m, n, k;
  int x_bytes;
  int bits;
  bool x_aligned;
  int capability;  // 90 for sm_90
  int processors;
};

namespace hopper {

// Of 16-bit products. Fewer tokens are bound by the reading of weights, and mma.sync reads them faster; with more,
// decoding once and a dense product win. For e4m3 there is neither: mma.sync of it is emulated, a dense product is 16-bit.
constexpr int64_t kLeast = 65, kMost = 2047;
// Tiles that are compiled, the largest first: a tie goes to the fewer and larger blocks.
constexpr int kTiles[][2] = {{256, 128}, {128, 128}, {128, 64}};
constexpr int kMaxSplits = 8;
// Bytes from the second-level cache that a processor gets in a cycle when all read: about 5.5 TB/s of an H200, for 132
// processors at 1.6 GHz.
constexpr int64_t kCacheBytes = 26;
// And when few of them do.
constexpr int64_t kAloneBytes = 48;
// Cycles of a tile beside its products: filling the pipeline and the epilogue of 256 by 128.
constexpr int64_t kFill = 1500, kEpilogue = 3500;
// The fewest k of a split: below, filling the pipeline costs more than the products.
constexpr int64_t kLeastK = 512;
// Sizes are ints in the kernel, as in a tensor map; K is rounded up to whole periods of 192.
constexpr int64_t kLargest = (int64_t{1} << 31) - 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cycles that a product is estimated to take with a tile and so many splits.
constexpr int64_t cycles(const HopperProblem& p, int rows, int tokens, int splits) {
  const int64_t tiles = ceil_div(p.n, rows) * ceil_div(p.m, tokens);
  const int64_t waves = ceil_div(tiles * splits, p.processors);
  // 64 k at a time: products, 2048 of 16 bits or 4096 of 8 a cycle, or the bytes that come in for them.
  const int64_t steps = ceil_div(ceil_div(p.k, 64), splits);
  const int64_t products = int64_t{rows} * tokens * 64 / (4096 / p.x_bytes);
  const int64_t bytes = int64_t{tokens} * 64 * p.x_bytes + int64_t{rows} * (p.bits > 4 ? 43 : 32);
  const int64_t step = products > bytes / kCacheBytes ? products : bytes / kCacheBytes;
  const int64_t epilogue = kEpilogue * rows * tokens / (256 * 128);
  // Sums of splits are written to the cache by all, and read again by the last block of a tile alone.
  const int64_t sum_bytes = int64_t{rows} * tokens * 4;
  const int64_t sums = splits > 1 ? waves * sum_bytes / kCacheBytes + splits * sum_bytes / kAloneBytes : 0;
  return waves * (steps * step + kFill + epilogue) + sums;
}

}  // namespace hopper

constexpr HopperChoice choose_hopper(const HopperProblem& p) {
  HopperChoice best;
  const int64_t fewest = p.x_bytes == 2 ? hopper::kLeast : 1;
  const int64_t most = p.x_bytes == 2 ? hopper::kMost : hopper::kLargest;
  if (p.capability != 90 || !p.x_aligned || p.m < fewest || p.m > most || p.n < 1 || p.k < 1 ||
      p.n > hopper::kLargest || p.k > hopper::kLargest) {
    return best;
  }
  int64_t least = 0;
  for (const auto& tile : hopper::kTiles) {
    for (int splits = 1; splits <= hopper::kMaxSplits; splits *= 2) {
      if (splits > 1 && p.k < splits * hopper::kLeastK) break;
      const int64_t cost = hopper::cycles(p, tile[0], tile[1], splits);
      if (!best.use || cost < least) {
        least = cost;
        best = {true, tile[0], tile[1], splits};
      }
    }
  }
  return best;
}

}  // namespace inq::cuda
