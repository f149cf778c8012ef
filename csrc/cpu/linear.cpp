#include "linear.h"

#include <algorithm>

#include "epilogue.h"
#include "panels.h"

namespace inq::cpu {
namespace {

constexpr int kMostRowPointers = 64;  // the most rows of any Shape's micro-tile or stream

// x[m, k] as a[step][rows], zero from m on and from k to the end of the last tile.
void pack_stream(const LinearArgs& args, const Plan& plan, uint32_t* a) {
  const int64_t k = args.weight.k, row_bytes = k * size_of(args.type);
  const Kernels& kernels = kernels_of(plan);
  if (plan.stream_rows == 1 && size_of(args.type) * plan.shape.pair == 4) {
    if (k > 0) std::memcpy(a, args.x, static_cast<size_t>(row_bytes));
    std::memset(reinterpret_cast<unsigned char*>(a) + row_bytes, 0,
                static_cast<size_t>(tiles_of(k) * kTileK * size_of(args.type) - row_bytes));
    return;
  }
  // Pieces of K that are a few µs of copying.
  const int64_t piece = std::max<int64_t>(64 * 1024 / plan.stream_rows / kTileK, 1) * kTileK;
  parallel_tasks(ceil_div(k, piece), plan.threads, [&](int64_t i) {
    const int64_t first = i * piece, last = std::min(first + piece, k);
    const void* row[kMostRowPointers];
    for (int r = 0; r < args.m; ++r) {
      row[r] = static_cast<const unsigned char*>(args.x) + r * row_bytes + first * size_of(args.type);
    }
    const int64_t steps = (std::min(first + piece, tiles_of(k) * kTileK) - first) / plan.shape.pair;
    kernels.pack({row, static_cast<int>(args.m), plan.stream_rows, last - first, steps, args.type,
                  a + first / plan.shape.pair * plan.stream_rows});
  });
}

// Of x the k of `s.tiles` tiles from first_k on, as pack_stream does; the next as many are what s then asks for.
void pack_part(const LinearArgs& args, const Plan& plan, int64_t first_k, StreamArgs& s, uint32_t* a) {
  const int64_t k = args.weight.k, size = size_of(args.type), count = s.tiles * kTileK;
  auto at = [&](int64_t row, int64_t i) { return static_cast<const uint8_t*>(args.x) + (row * k + i) * size; };
  const void* row[kMostRowPointers];
  for (int r = 0; r < args.m; ++r) row[r] = at(r, first_k);
  kernels_of(plan).pack({row, static_cast<int>(args.m), plan.stream_rows, std::min(count, k - first_k),
                         count / plan.shape.pair, args.type, a});
  if (s.last) return;
  const int64_t next = first_k + count, lines = ceil_div(std::min(count, k - next) * size, kCacheLine) + 1;
  s.ask = {at(0, next), k * size, lines, 0, lines * args.m};
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
  const int64_t a_steps = at_once * kTileK / plan.shape.pair * plan.stream_rows;
  const Buffer<uint32_t> all_k(whole ? a_steps : 0);
  if (whole) pack_stream(args, plan, all_k.get());
  struct Scratch {
    Buffer<float> sums;
    Buffer<uint32_t> a;
  };
  auto make = [&] {
    return Scratch{Buffer<float>(whole ? 0 : plan.group * round_up(plan.stream_rows, 16) * kPanelRows),
                   Buffer<uint32_t>(whole ? 0 : a_steps)};
  };
  parallel_tasks(ceil_div(panels, plan.group), plan.threads, make, [&](int64_t task, const Scratch& own) {
    const int64_t panel = task * plan.group, column = panel * kPanelRows;
    const int64_t count = std::min(plan.group, panels - panel);
    StreamArgs s{};
    s.book = &book;
    s.panel_bytes = panel_bytes;
    s.panels = count;
    s.rows = plan.stream_rows;
    s.sums = own.sums.get();
    s.a = whole ? all_k.get() : own.a.get();
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
      const int64_t first_k = tile * kTileK;
      tile += s.tiles;
      s.last = tile == tiles;
      if (!whole) pack_part(args, plan, first_k, s, own.a.get());
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
    for (int r = 0; r < rows; ++r) row[r] = static_cast<const unsigned char*>(args.x) + (first + r) * w.k * size;
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
