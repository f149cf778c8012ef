#include "linear.h"

#include <algorithm>

#include "epilogue.h"
#include "panels.h"

namespace inq::cpu {
namespace {

constexpr int kMostRowPointers = 64;  // the most rows of any Shape's micro-tile or stream

const uint8_t* at(const LinearArgs& args, int64_t row, int64_t k) {
  return static_cast<const uint8_t*>(args.x) + (row * args.weight.k + k) * size_of(args.type);
}

// Of x[m, k] the k of some whole tiles from `first` on as a[step][rows], zero from m on and from k to the last tile's end.
void pack_tiles(const LinearArgs& args, const Plan& plan, int64_t first, int64_t tiles, uint32_t* a) {
  const void* row[kMostRowPointers];
  for (int r = 0; r < args.m; ++r) row[r] = at(args, r, first);
  const int64_t length = tiles * kTileK;
  kernels_of(plan).pack({row, static_cast<int>(args.m), plan.stream_rows, std::min(length, args.weight.k - first),
                         length / plan.shape.pair, args.type, a});
}

// All of x.
void pack_stream(const LinearArgs& args, const Plan& plan, uint32_t* a) {
  const int64_t k = args.weight.k, row_bytes = k * size_of(args.type), tiles = tiles_of(k);
  if (plan.stream_rows == 1 && size_of(args.type) * plan.shape.pair == 4) {
    if (k > 0) std::memcpy(a, args.x, static_cast<size_t>(row_bytes));
    std::memset(reinterpret_cast<unsigned char*>(a) + row_bytes, 0,
                static_cast<size_t>(tiles * kTileK * size_of(args.type) - row_bytes));
    return;
  }
  // Pieces of K that are a few µs of copying.
  const int64_t piece = std::max<int64_t>(64 * 1024 / plan.stream_rows / kTileK, 1);
  parallel_tasks(ceil_div(tiles, piece), plan.threads, [&](int64_t i) {
    const int64_t tile = i * piece, first = tile * kTileK;
    pack_tiles(args, plan, first, std::min(piece, tiles - tile), a + first / plan.shape.pair * plan.stream_rows);
  });
}

// The lines of x that pack_tiles will read; none from the end of K on.
Ask rows_of(const LinearArgs& args, int64_t first, int64_t tiles) {
  const int64_t size = size_of(args.type), length = std::min(tiles * kTileK, args.weight.k - first);
  if (length <= 0) return {};
  const int64_t lines = ceil_div(length * size, kCacheLine) + 1;
  return {at(args, 0, first), args.weight.k * size, lines, 0, lines * args.m};
}

void run_stream(const LinearArgs& args, const Plan& plan) {
  const Weight& w = args.weight;
  const Kernels& kernels = kernels_of(plan);
  const Codebook book = codebook(w.format);
  const Buffer<float> power = powers(w);
  const int64_t tiles = tiles_of(w.k), panel_bytes = tiles * tile_bytes(w.format), panels = panels_of(w.n);
  // Some k at a time, if k_chunk says so: each thread then packs the rows' part by itself, into its nearest cache.
  const bool whole = plan.k_chunk == 0;
  const int64_t at_once = whole ? tiles : plan.k_chunk / kTileK;
  const int64_t a_size = at_once * kTileK / plan.shape.pair * plan.stream_rows;
  const int64_t sums_size = plan.group * round_up(plan.stream_rows, 16) * kPanelRows;
  const Buffer<uint32_t> all_k(whole ? a_size : 0);
  if (whole) pack_stream(args, plan, all_k.get());
  // Each thread makes its own: side by side in blocks that the caller made they cost a tenth of the time (Xeon, M = 64).
  struct Scratch {
    Buffer<uint32_t> a;
    Buffer<float> sums;
  };
  auto make = [&] { return Scratch{Buffer<uint32_t>(whole ? 0 : a_size), Buffer<float>(whole ? 0 : sums_size)}; };
  parallel_tasks(ceil_div(panels, plan.group), plan.threads, make, [&](int64_t task, const Scratch& own) {
    uint32_t* const a = whole ? all_k.get() : own.a.get();
    const int64_t panel = task * plan.group, column = panel * kPanelRows;
    const int64_t count = std::min(plan.group, panels - panel);
    StreamArgs s{};
    s.book = &book;
    s.panel_bytes = panel_bytes;
    s.panels = count;
    s.rows = plan.stream_rows;
    s.a = a;
    s.sums = own.sums.get();
    s.finish.rows = static_cast<int>(args.m);
    s.finish.columns = static_cast<int>(std::min(count * kPanelRows, w.n - column));
    s.finish.power = power.get() + column;
    s.finish.scale = w.scale ? w.scale + column : nullptr;
    s.finish.bias = args.bias ? args.bias + column : nullptr;
    s.finish.type = args.type;
    s.finish.out = static_cast<unsigned char*>(args.out) + column * size_of(args.type);
    s.finish.out_stride = w.n;
    int64_t tile = 0;
    do {
      s.weight = w.data + panel * panel_bytes + tile * tile_bytes(w.format);
      s.tiles = std::min(at_once, tiles - tile);
      s.first = tile == 0;
      if (!whole) {
        pack_tiles(args, plan, tile * kTileK, s.tiles, a);
        s.ask = rows_of(args, (tile + s.tiles) * kTileK, at_once);
      }
      tile += s.tiles;
      s.last = tile == tiles;
      kernels.stream(s);
    } while (tile < tiles);
  });
}

void run_panels(const LinearArgs& args, const Plan& plan) {
  const Weight& w = args.weight;
  const Kernels& kernels = kernels_of(plan);
  const Codebook book = codebook(w.format);
  const Buffer<float> power = powers(w);
  const int64_t panel_bytes = tiles_of(w.k) * tile_bytes(w.format);
  const int size = size_of(args.type);
  std::vector<Chunk> chunks;
  for (int64_t k = 0; k < w.k || k == 0; k += plan.k_chunk) {
    const int64_t length = std::min(plan.k_chunk, w.k - k);
    // A tile of weights holds whole blocks of steps.
    const int64_t steps = round_up(ceil_div(length, plan.shape.pair), plan.shape.block);
    chunks.push_back({k / plan.shape.pair, steps, tiles_of(length) * kTileK / plan.shape.pair});
  }
  auto pack = [&](int64_t first, int rows, uint32_t* out) {
    const void* row[kMostRowPointers];
    for (int r = 0; r < rows; ++r) row[r] = at(args, first + r, 0);
    const int64_t steps = round_up(ceil_div(w.k, plan.shape.pair), plan.shape.block);
    kernels.pack({row, rows, rows, w.k, steps, args.type, out});
  };
  // The tiles of a chunk, from panel to panel panel_bytes apart.
  auto weights = [&](size_t chunk, int64_t panel) {
    return w.data + panel * panel_bytes + chunk * plan.k_chunk / kTileK * tile_bytes(w.format);
  };
  auto tiles = [&](size_t chunk) { return chunks[chunk].decoded * plan.shape.pair / kTileK; };
  auto codes = [&](size_t chunk, int64_t panel, int panels, uint32_t* out) {
    return DecodeArgs{&book, weights(chunk, panel), panel_bytes, tiles(chunk), panels, out};
  };
  auto decode = [&](size_t chunk, int64_t panel, int panels, uint32_t* out) { kernels.decode(codes(chunk, panel, panels, out)); };
  auto reads = [&](size_t chunk, int64_t panel, int panels) {
    const int64_t lines = tiles(chunk) * tile_bytes(w.format) / kCacheLine;
    return Ask{weights(chunk, panel), panel_bytes, lines, 0, lines * panels};
  };
  auto finish = [&](int64_t row, int rows, int64_t panel, int panels, const float* sums) {
    const int64_t column = panel * kPanelRows;
    kernels.finish({sums, int64_t{panels} * kPanelRows, rows,
                    static_cast<int>(std::min<int64_t>(int64_t{panels} * kPanelRows, w.n - column)),
                    power.get() + column, w.scale ? w.scale + column : nullptr,
                    args.bias ? args.bias + column : nullptr, args.type,
                    static_cast<unsigned char*>(args.out) + (row * w.n + column) * size, w.n});
  };
  PanelProduct(plan, args.m, w.n, chunks, pack, decode, codes, reads, finish).run();
}

}  // namespace

void linear(const LinearArgs& args) {
  const Weight& w = args.weight;
  linear(args, plan({Op::linear, args.m, w.n, w.k, args.type, current_isa(), thread_count()}));
}

void linear(const LinearArgs& args, const Plan& chosen) {
  switch (chosen.kernel) {
    case Kernel::none: return;
    case Kernel::stream: return run_stream(args, chosen);
    default: return run_panels(args, chosen);
  }
}

}  // namespace inq::cpu
