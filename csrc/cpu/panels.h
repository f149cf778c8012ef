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
// of which the decoder may write up to `decoded`. With taps, first is 0 and the rest as in MultiplyArgs.
struct Chunk {
  int64_t first, steps, decoded, taps = 0, offset = 0;
};

// The parts of a product that depend on what its operands are:
//   pack(row, rows, out)             rows [row, row + rows) of the left operand as out[step][rows], all steps; or, with taps,
//                                    where they are, out[tap][rows], two dwords each;
//   decode(chunk, panel, panels, out)  columns of the right one as out[step][16·panels], a chunk's steps;
//   codes(chunk, panel, panels, out)   the same as the kernels' arguments, or with no tiles where it is more than that;
//   reads(chunk, panel, panels)      the cache lines that this decode will read, all of them;
//   finish(row, rows, panel, panels, sums)    sums[rows][16·panels] are complete.
// Three loops: blocks of rows, packed once for all columns; blocks of columns, as wide as a micro-tile; chunks of K, whose
// weights are decoded into the first-level cache and used for all rows of the block (`Item`: in which order). The sums of
// a block go on from chunk to chunk in memory, so their order is that of one long sum.
template <class Pack, class Decode, class Codes, class Reads, class Finish>
class PanelProduct {
 public:
  PanelProduct(const Plan& plan, int64_t m, int64_t n, const std::vector<Chunk>& chunks, const Pack& pack,
               const Decode& decode, const Codes& codes, const Reads& reads, const Finish& finish)
      : plan_(plan), kernels_(kernels_of(plan)), m_(m), panels_(panels_of(n)), chunks_(chunks), pack_(pack),
        decode_(decode), codes_(codes), reads_(reads), finish_(finish),
        steps_(chunks[0].taps ? 2 * chunks[0].taps : chunks.back().first + chunks.back().steps) {
    for (const Chunk& chunk : chunks) decoded_ = std::max(decoded_, std::max(chunk.decoded, chunk.steps));
  }

  void run() const {
    const int64_t m_blocks = ceil_div(m_, plan_.m_block), n_blocks = ceil_div(panels_, plan_.shape.panels);
    const int64_t most_rows = std::min(plan_.m_block, m_);
    if (plan_.by_rows) {
      // Made here, for all: a thread that is not the caller's gets large blocks as new pages every time.
      const Buffer<uint32_t> lefts(std::min<int64_t>(plan_.threads, m_blocks) * most_rows * steps_);
      std::atomic<int64_t> taken{0};
      struct ByRows {
        uint32_t* left;
        Scratch scratch;
      };
      auto make = [&] { return ByRows{lefts.get() + taken++ * most_rows * steps_, scratch()}; };
      parallel_tasks(m_blocks, plan_.threads, make, [&](int64_t i, const ByRows& own) {
        const Rows rows = block(i);
        pack_tiles(rows, 0, rows.tiles, own.left);
        columns(rows, own.left, 0, n_blocks, own.scratch);
      });
      return;
    }
    const Buffer<uint32_t> left(most_rows * steps_);
    for (int64_t i = 0; i < m_blocks; ++i) {
      const Rows rows = block(i);
      parallel_for(0, rows.tiles, ceil_div(rows.tiles, plan_.threads),
                   [&](int64_t first, int64_t last) { pack_tiles(rows, first, last, left.get()); });
      // A few blocks of columns a task: the next one's weights are asked for in time.
      auto make = [&] { return scratch(); };
      parallel_tasks(ceil_div(n_blocks, plan_.n_share), plan_.threads, make, [&](int64_t task, const Scratch& own) {
        columns(rows, left.get(), task * plan_.n_share, std::min((task + 1) * plan_.n_share, n_blocks), own);
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
    return {Buffer<uint32_t>(decoded_ * columns), Buffer<float>(std::min(plan_.m_block, m_) * columns * plan_.n_group)};
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
    const int64_t sums_of_block = rows.count * plan_.shape.panels * kPanelRows;
    auto panel_of = [&](const Item& i) { return i.block * plan_.shape.panels; };
    auto wide_of = [&](const Item& i) { return width(panel_of(i)); };
    Item item{first, 0, first, 0}, next = after(item, last);
    decode_(item.chunk, panel_of(item), wide_of(item), right.get());
    while (item.block < last) {
      const Item third = next.block < last ? after(next, last) : next;
      const bool more = next.block < last, final = item.chunk + 1 == chunks_.size();
      const int64_t panel = panel_of(item);
      const int wide = width(panel);
      // The next weights take the place of these while the last rows are multiplied, if the kernels can do it and they
      // fit: then they must be there by now, and it is time to ask for those after them.
      const bool in_place = more && kernels_.multiply_decoding && wide_of(next) == wide;
      const DecodeArgs codes = in_place ? codes_(next.chunk, panel_of(next), wide, right.get()) : DecodeArgs{};
      const Item& asked = codes.tiles ? third : next;
      const Ask ask = asked.block < last ? reads_(asked.chunk, panel_of(asked), wide_of(asked)) : Ask{};
      for (int64_t i = 0; i < rows.tiles; ++i) {
        const bool bottom = i + 1 == rows.tiles;
        float* tile = sums.get() + (item.block - item.from) * sums_of_block + rows.row(i) * wide * kPanelRows;
        MultiplyArgs m{};
        m.a = left_at(i, item.chunk);
        m.b = right.get();
        m.steps = chunks_[item.chunk].steps;
        m.c = tile;
        m.rows = rows.height(i);
        m.panels = wide;
        m.accumulate = item.chunk > 0;
        m.next = bottom ? left_at(0, more ? next.chunk : 0) : left_at(i + 1, item.chunk);
        m.taps = chunks_[item.chunk].taps;
        m.offset = chunks_[item.chunk].offset;
        m.ask = {ask.from, ask.stride, ask.lines, ask.last * i / rows.tiles, ask.last * (i + 1) / rows.tiles};
        bottom && codes.tiles ? kernels_.multiply_decoding(m, codes) : kernels_.multiply(m);
        if (final) finish_(rows.first + rows.row(i), m.rows, panel, wide, tile);
      }
      if (more && !codes.tiles) decode_(next.chunk, panel_of(next), wide_of(next), right.get());
      item = next;
      next = third;
    }
  }

  // One chunk of one block of columns: what is decoded at once. They follow each other so that `n_group` blocks use the
  // rows of `k_chunks` chunks before the next chunks' turn: rows, and these blocks' sums, stay in the second-level cache.
  struct Item {
    int64_t from;  // the first of those blocks
    size_t begin;  // the first of those chunks
    int64_t block;
    size_t chunk;
  };

  // From `last` on there is none.
  Item after(Item i, int64_t last) const {
    ++i.chunk;
    const bool more = i.chunk < chunks_.size();
    if (more && static_cast<int64_t>(i.chunk - i.begin) < plan_.k_chunks) return i;
    ++i.block;
    if (i.block < std::min(i.from + plan_.n_group, last)) return {i.from, i.begin, i.block, i.begin};
    if (more) return {i.from, i.chunk, i.from, i.chunk};
    return {i.block, 0, i.block, 0};
  }

  int width(int64_t panel) const { return static_cast<int>(std::min<int64_t>(plan_.shape.panels, panels_ - panel)); }

  const Plan& plan_;
  const Kernels& kernels_;
  const int64_t m_, panels_;
  const std::vector<Chunk>& chunks_;
  const Pack& pack_;
  const Decode& decode_;
  const Codes& codes_;
  const Reads& reads_;
  const Finish& finish_;
  const int64_t steps_;  // dwords of a row of `left`
  int64_t decoded_ = 0;
};

}  // namespace inq::cpu
