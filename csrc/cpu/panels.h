// The blocked product of plan.h's Kernel::panels, for any left operand (rows, image patches) and any decoder.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "buffer.h"
#include "parallel.h"
#include "plan.h"

namespace inq::cpu {

// task(i) for i in [0, count), on up to `threads` threads that each take the next one: a thread that another process
// holds up delays one task, not its whole share. Which thread runs a task changes no result.
template <class F>
void parallel_tasks(int64_t count, int threads, const F& task) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min<int64_t>(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// A piece of the sums: `steps` steps of the left operand against rows of decoded weights.
struct Chunk {
  int64_t steps;         // packed and multiplied
  int64_t decoded_rows;  // steps' worth of dwords a column that the decoder may write
};

// pack(chunk, row, rows, out): rows [row, row + rows) of the left operand as out[steps][rows];
// decode(chunk, panel, panels, out): columns of the right one as out[steps][16·panels];
// finish(row, rows, panel, panels, sums): sums[rows][16·panels] are complete.
// The sums of a task go on from chunk to chunk in memory, so their order is that of one long sum.
template <class Pack, class Decode, class Finish>
void multiply_panels(const Plan& plan, int64_t m, int64_t n, const std::vector<Chunk>& chunks, const Pack& pack,
                     const Decode& decode, const Finish& finish) {
  const Kernels& kernels = kernels_of(plan);
  const int64_t m_blocks = ceil_div(m, plan.m_block), n_groups = ceil_div(n, plan.n_group);
  int64_t most_steps = 0, most_decoded = 0;
  for (const Chunk& chunk : chunks) {
    most_steps = std::max(most_steps, chunk.steps);
    most_decoded = std::max(most_decoded, chunk.decoded_rows);
  }
  parallel_tasks(m_blocks * n_groups, plan.threads, [&](int64_t task) {
    const int64_t first_row = task % m_blocks * plan.m_block, rows = std::min(plan.m_block, m - first_row);
    const int64_t first_panel = task / m_blocks * plan.n_group / kPanelRows;
    const int64_t panels = std::min(plan.n_group / kPanelRows, panels_of(n) - first_panel);
    // Micro-tiles of nearly equal height: eight rows are 4 + 4, not 6 + 2.
    const int64_t tiles = ceil_div(rows, plan.shape.rows);
    auto tile_row = [&](int64_t i) { return rows * i / tiles; };
    const Buffer<uint32_t> left(rows * most_steps);
    const Buffer<uint32_t> right(most_decoded * kPanelRows * plan.shape.panels);
    const Buffer<float> sums(rows * panels * kPanelRows);
    for (size_t c = 0; c < chunks.size(); ++c) {
      const int64_t steps = chunks[c].steps;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t row = tile_row(i);
        pack(c, first_row + row, static_cast<int>(tile_row(i + 1) - row), left.get() + row * steps);
      }
      for (int64_t panel = 0; panel < panels; panel += plan.shape.panels) {
        const int wide = static_cast<int>(std::min<int64_t>(plan.shape.panels, panels - panel));
        decode(c, first_panel + panel, wide, right.get());
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t row = tile_row(i);
          const int height = static_cast<int>(tile_row(i + 1) - row);
          float* tile = sums.get() + (panel * rows + row * wide) * kPanelRows;
          kernels.multiply({left.get() + row * steps, right.get(), steps, tile, height, wide, c > 0});
          if (c + 1 == chunks.size()) finish(first_row + row, height, first_panel + panel, wide, tile);
        }
      }
    }
  });
}

}  // namespace inq::cpu
