// The blocked product of plan.h's Kernel::panels, for any left operand (rows, image patches) and any decoder.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "buffer.h"
#include "parallel.h"
#include "plan.h"

namespace inq::cpu {

// task(i, scratch) for i in [0, count), on up to `threads` threads that each take the next one: a thread that another
// process holds up delays one task, not its whole share. Which thread runs a task changes no result. Each thread makes
// its scratch once: malloc gives large blocks back to the system, and a task would pay for their pages again.
template <class Make, class F>
void parallel_tasks(int64_t count, int threads, const Make& make, const F& task) {
  if (count <= 0) return;
  if (threads <= 1 || count == 1) {
    auto scratch = make();
    for (int64_t i = 0; i < count; ++i) task(i, scratch);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min<int64_t>(threads, count), 1, [&](int64_t, int64_t) {
    auto scratch = make();
    for (int64_t i = next++; i < count; i = next++) task(i, scratch);
  });
}

template <class F>
void parallel_tasks(int64_t count, int threads, const F& task) {
  parallel_tasks(count, threads, [] { return 0; }, [&](int64_t i, int) { task(i); });
}

// A piece of the sums: steps [first, first + steps) of the packed left operand against as many rows of decoded weights,
// of which the decoder may write up to `decoded`.
struct Chunk {
  int64_t first, steps, decoded;
};

// The parts of a product that depend on what its operands are:
//   pack(row, rows, out)             rows [row, row + rows) of the left operand as out[step][rows], all steps;
//   decode(chunk, panel, panels, out)  columns of the right one as out[step][16·panels], a chunk's steps;
//   fetch(chunk, panel, panels, part, parts)  ask for the part/parts-th part of what that decode will read;
//   finish(row, rows, panel, panels, sums)    sums[rows][16·panels] are complete.
// Three loops: blocks of rows, packed once for all columns; blocks of columns, as wide as a micro-tile; chunks of K, whose
// weights are decoded into the first-level cache and used for all rows of the block. The sums of a block go on from
// chunk to chunk in memory, so their order is that of one long sum.
template <class Pack, class Decode, class Fetch, class Finish>
class PanelProduct {
 public:
  PanelProduct(const Plan& plan, int64_t m, int64_t n, const std::vector<Chunk>& chunks, const Pack& pack,
               const Decode& decode, const Fetch& fetch, const Finish& finish)
      : plan_(plan), kernels_(kernels_of(plan)), m_(m), panels_(panels_of(n)), chunks_(chunks), pack_(pack),
        decode_(decode), fetch_(fetch), finish_(finish), steps_(chunks.back().first + chunks.back().steps) {
    for (const Chunk& chunk : chunks) decoded_ = std::max(decoded_, std::max(chunk.decoded, chunk.steps));
  }

  void run() const {
    const int64_t m_blocks = ceil_div(m_, plan_.m_block), n_blocks = ceil_div(panels_, plan_.shape.panels);
    const int64_t most_rows = std::min(plan_.m_block, m_);
    if (plan_.by_rows) {
      struct ByRows {
        Buffer<uint32_t> left;
        Scratch scratch;
      };
      auto make = [&] { return ByRows{Buffer<uint32_t>(most_rows * steps_), scratch()}; };
      parallel_tasks(m_blocks, plan_.threads, make, [&](int64_t i, const ByRows& own) {
        const Rows rows = block(i);
        pack_tiles(rows, 0, rows.tiles, own.left.get());
        columns(rows, own.left.get(), 0, n_blocks, own.scratch);
      });
      return;
    }
    const Buffer<uint32_t> left(most_rows * steps_);
    for (int64_t i = 0; i < m_blocks; ++i) {
      const Rows rows = block(i);
      parallel_for(0, rows.tiles, ceil_div(rows.tiles, plan_.threads),
                   [&](int64_t first, int64_t last) { pack_tiles(rows, first, last, left.get()); });
      // A few blocks of columns a task: the next one's weights are asked for in time.
      const int64_t share = std::max<int64_t>(n_blocks / (plan_.threads * 8), 1);
      auto make = [&] { return scratch(); };
      parallel_tasks(ceil_div(n_blocks, share), plan_.threads, make, [&](int64_t task, const Scratch& own) {
        columns(rows, left.get(), task * share, std::min((task + 1) * share, n_blocks), own);
      });
    }
  }

 private:
  struct Scratch {
    Buffer<uint32_t> right;  // decoded weights of a chunk
    Buffer<float> sums;      // of a block of rows and columns
  };

  Scratch scratch() const {
    const int64_t columns = int64_t{kPanelRows} * plan_.shape.panels;
    return {Buffer<uint32_t>(decoded_ * columns), Buffer<float>(std::min(plan_.m_block, m_) * columns)};
  }

  // A block of rows as micro-tiles of nearly equal height: eight rows are 4 + 4, not 6 + 2.
  struct Rows {
    int64_t first, count, tiles;
    int64_t row(int64_t tile) const { return count * tile / tiles; }
    int height(int64_t tile) const { return static_cast<int>(row(tile + 1) - row(tile)); }
  };

  Rows block(int64_t i) const {
    const int64_t first = i * plan_.m_block, count = std::min(plan_.m_block, m_ - first);
    return {first, count, ceil_div(count, plan_.shape.rows)};
  }

  void pack_tiles(const Rows& rows, int64_t first, int64_t last, uint32_t* left) const {
    for (int64_t i = first; i < last; ++i) pack_(rows.first + rows.row(i), rows.height(i), left + rows.row(i) * steps_);
  }

  // What the kernels keep on a thread is given back at the end of its task, an exception's end too.
  struct Leave {
    const Kernels& kernels;
    ~Leave() {
      if (kernels.leave) kernels.leave();
    }
  };

  void columns(const Rows& rows, const uint32_t* left, int64_t first, int64_t last, const Scratch& own) const {
    const Leave leave{kernels_};
    const auto& [right, sums] = own;
    auto left_at = [&](int64_t tile, size_t c) {
      return left + rows.row(tile) * steps_ + chunks_[c].first * rows.height(tile);
    };
    for (int64_t block = first; block < last; ++block) {
      const int64_t panel = block * plan_.shape.panels;
      const int wide = width(panel);
      for (size_t c = 0; c < chunks_.size(); ++c) {
        const bool final = c + 1 == chunks_.size();
        const int64_t next_panel = final ? panel + plan_.shape.panels : panel;
        decode_(c, panel, wide, right.get());
        for (int64_t i = 0; i < rows.tiles; ++i) {
          if (!final || block + 1 < last) fetch_(final ? 0 : c + 1, next_panel, width(next_panel), i, rows.tiles);
          float* tile = sums.get() + rows.row(i) * wide * kPanelRows;
          kernels_.multiply({left_at(i, c), right.get(), chunks_[c].steps, tile, rows.height(i), wide, c > 0,
                             i + 1 < rows.tiles ? left_at(i + 1, c) : left_at(0, final ? 0 : c + 1)});
          if (final) finish_(rows.first + rows.row(i), rows.height(i), panel, wide, tile);
        }
      }
    }
  }

  int width(int64_t panel) const { return static_cast<int>(std::min<int64_t>(plan_.shape.panels, panels_ - panel)); }

  const Plan& plan_;
  const Kernels& kernels_;
  const int64_t m_, panels_;
  const std::vector<Chunk>& chunks_;
  const Pack& pack_;
  const Decode& decode_;
  const Fetch& fetch_;
  const Finish& finish_;
  const int64_t steps_;
  int64_t decoded_ = 0;
};

}  // namespace inq::cpu
