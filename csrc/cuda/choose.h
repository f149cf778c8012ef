// Which tile, and how many blocks, a product takes: a pure function of sizes and the machine, usable without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace inq::cuda {

enum class Op : int { linear, linear_dx };

// How linear.cu and linear_dx.cu cut a product. "rows" are those of the mma's A operand, the decoded weights: output
// features of linear, input features of linear_dx. "depth" is what is summed over.
struct Choice {
  int tokens;        // rows of x (or of grad) in a tile: 8, 16, 32, 64
  int warps;         // of a block
  int rows;          // of a tile
  int stages;        // of the pipeline
  int shared_bytes;  // of a block
  int64_t tiles;     // of rows
  int64_t m_tiles;   // of tokens
  int64_t units;     // parts of a tile's depth between which the sum over it may be cut
  int64_t ctas;      // blocks that share the tiles · units of one tile of tokens equally
  int64_t partials;  // float32 numbers of workspace
  int64_t flags;     // int32 counters, zero before and after a launch
};

// A tile's fixed sizes. A block of 128 rows has (stages − 1) stages of weights in flight: 2 · 16 KB at 8 and 16 tokens,
// 3 · 8 KB at 32 and 2 · 8 KB at 64, which mma.sync bounds; for an SM, which has two blocks, 64, 48 and 32 KB. Two
// blocks fit in an A100's 164 KB, and one in the 99 KB that a block may have on sm_86, 89 and 120.
struct Tiling {
  int stripes;       // units of weights across the rows that a warp has: 16 output features (linear), a block (dx)
  int warp_rows;     // rows of a warp
  int depth_blocks;  // blocks of weights along the depth in a stage
  int depth;         // of a stage
  int unit_steps;    // stages in a unit (Choice::units), the same depth for any number of tokens
  int pitch;         // bytes between tokens in shared memory: 16 more than the depth's, an odd number of 16 bytes
                     // modulo 128, so that ldmatrix's eight rows are in different banks
  int planes;        // of 16-bit numbers that the staged tokens become: 0 where they are used as they come
  int stages;
  int most_warps;

  // A stage has the tokens, then the warps' weights.
  constexpr int token_bytes(int tokens) const { return tokens * pitch; }
  constexpr int warp_bytes() const { return stripes * depth_blocks * 512; }
  // Shared memory: a flag and padding, planes, stages.
  constexpr int planes_at() const { return 16; }
  constexpr int stages_at(int tokens) const { return 16 + planes * token_bytes(tokens); }
  constexpr int shared_bytes(int tokens, int warps) const {
    return stages_at(tokens) + stages * (token_bytes(tokens) + warps * warp_bytes());
  }
};

constexpr Tiling tiling(Op op, bool f16, int bits, int tokens) {
  const int block_k = bits == 5 ? 48 : 64;
  if (op == Op::linear) {
    // From 32 tokens on two stripes share what ldmatrix reads: 128 bytes a clock would bind before mma.sync. For few
    // tokens a stage is deep, since its barrier and addresses cost as much as the products of 64 k.
    if (tokens >= 32) return {2, 32, 2, 2 * block_k, 2, 4 * block_k + 16, 0, tokens == 32 ? 4 : 3, 4};
    return {1, 16, 4, 4 * block_k, 1, 8 * block_k + 16, 0, 3, 8};
  }
  // Gradients times row factors: bf16, or for fp16, whose range they leave, two bf16 numbers that are their sum.
  return {1, block_k, 4, 64, 1, 144, f16 ? 2 : 1, 4, 4};
}

// Blocks of a tile of tokens; the sum over a tile's depth is cut where their parts end.
// Up to 64 tokens neither `rows` nor `ctas` depends on m: a token's sum has the same order whatever the others are.
// Above, tiles are not cut, and the same holds.
inline Choice choose(Op op, int sm_count, int capability, int64_t m, int64_t n, int64_t k, bool f16, int bits) {
  Choice c{};
  c.tokens = m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 || op == Op::linear_dx ? 32 : 64;
  const Tiling t = tiling(op, f16, bits, c.tokens);
  const int64_t rows = op == Op::linear ? n : k, depth = op == Op::linear ? k : n;
  c.stages = t.stages;
  c.m_tiles = (m + c.tokens - 1) / c.tokens;
  const int64_t unit = int64_t{t.depth} * t.unit_steps;
  c.units = std::max<int64_t>((depth + unit - 1) / unit, 1);
  // 100 KB of shared memory hold one block on these; 164 KB and more hold two.
  const bool small = capability == 86 || capability == 89 || capability >= 120;
  const int64_t wanted = int64_t{sm_count} * (small ? 1 : 2);
  // The last block of a tile adds up the others' parts: no more than eight. Few rows make smaller tiles.
  constexpr int64_t kMostParts = 8;
  const bool cut = m <= 64;
  int parts = 1;
  for (c.warps = t.most_warps; true; c.warps /= 2, parts *= 2) {
    c.rows = c.warps * t.warp_rows;
    c.tiles = (rows + c.rows - 1) / c.rows;
    const int64_t most = cut ? c.tiles * std::min(kMostParts, c.units) : c.tiles * c.m_tiles;
    if (parts == 4 || c.warps == 1 || most >= wanted) break;
  }
  c.ctas = c.tiles;
  if (cut && c.tiles > 0) {
    c.ctas = std::min({wanted, c.tiles * c.units, c.tiles * kMostParts});
    // Whole fractions of a tile leave half of the parts to add; worth one block in 16.
    const int64_t even = c.ctas / c.tiles * c.tiles;
    if (even * 16 >= c.ctas * 15) c.ctas = even;
  }
  c.shared_bytes = t.shared_bytes(c.tokens, c.warps);
  if (c.ctas != c.tiles) {
    c.partials = 2 * c.ctas * c.m_tiles * c.rows * c.tokens;
    c.flags = c.tiles * c.m_tiles;
  }
  return c;
}

}  // namespace inq::cuda
