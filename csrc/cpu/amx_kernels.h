// The products' loops on AMX tiles, as templates over who carries out the tile instructions: the processor
// (linear_amx.cpp) or plain code for tests (linear_emulated_avx512.cpp). Included only by these two, each in its own
// anonymous namespace, as gemm_kernels.h is.
//
// `Tiles` has: configure(config), release(), and for tile registers by number zero<t>(), load<t>(p, bytes),
// load_once<t>(p, bytes), store<t>(p, bytes), multiply_add<sum, left, right>(); `bytes` from row to row.
//
// Only what tiles change is here: the left operand's blocks of 16 steps, and the products. Decoded weights are
// [step][16·panels] as everywhere, since a tile can be loaded with any distance between its rows: 16 steps of a panel
// are the tile of 16 pairs of k × 16 columns that TDPBF16PS takes. So decoding and finishing are AVX-512's.
#pragma once

#include <type_traits>
#include <utility>

#include "asking.h"
#include "finishing.h"
#include "kernels.h"
#include "pairs_avx512.h"

namespace {

using namespace inq::cpu;

// What LDTILECFG reads. Palette 1: eight tiles of up to 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

constexpr int kTileRows = 16;
constexpr int kBlockSteps = kAmxShape.block;  // steps a tile
constexpr int kBlockBytes = kBlockSteps * 4;  // a row of a tile
constexpr int kStreamTiles = 8;               // of `stream`'s ring: 8 KB of the first-level cache
constexpr int kStreamAhead = 2048;            // bytes of a panel from what is decoded to what is asked for
static_assert(kBlockSteps == kTileK / 2 && kBlockBytes == 64);

// Four tiles of sums: up to 16 rows × 4 panels, 32 rows × 2 or 64 rows × 1. Each weight tile is then used for all rows,
// and four products are under way, which hides most of a product's latency (52 cycles, one started every 16). The lowest
// row tile has registers of its own, since it may have fewer rows.
constexpr int sum_tile(int row_tiles, int row_tile, int panel) { return row_tiles > 2 ? row_tile : row_tile * 2 + panel; }
constexpr int left_tile(int row_tiles, int row_tile) {
  return row_tiles <= 2 ? 4 + row_tile : row_tile + 1 == row_tiles ? 6 : 4 + row_tile % 2;
}
constexpr int weight_tile(int row_tiles, int panel) {
  return row_tiles > 2 ? 7 : row_tiles == 2 ? 6 + panel : 5 + panel % 3;
}

constexpr int row_tiles_of(int rows) { return (rows + kTileRows - 1) / kTileRows; }

// f(0), …, f(count − 1), each with a constant: tile registers are numbers inside instructions.
template <class F, int... kIndex>
inline __attribute__((always_inline)) void each_of(const F& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class F>
inline __attribute__((always_inline)) void each(const F& f) {
  each_of(f, std::make_integer_sequence<int, kCount>{});
}

// --- configuration ---------------------------------------------------------------------------------------------------
//
// A configuration belongs to a thread, and torch's threads also run other libraries' tile code: each task configures
// what it needs and releases at its end. Configuring clears the tiles, so `multiply` does it only for a new row count.

template <class Tiles>
thread_local int configured_rows = 0;

template <class Tiles>
void configure(int rows) {
  if (configured_rows<Tiles> == rows) return;
  const int row_tiles = row_tiles_of(rows), last = row_tiles - 1;
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = kBlockBytes;
    config.rows[t] = kTileRows;
  }
  const uint8_t bottom = static_cast<uint8_t>(rows - last * kTileRows);
  for (int panel = 0; panel < kAmxShape.registers / row_tiles; ++panel) config.rows[sum_tile(row_tiles, last, panel)] = bottom;
  config.rows[left_tile(row_tiles, last)] = bottom;
  Tiles::configure(config);
  configured_rows<Tiles> = rows;
}

template <class Tiles>
void leave() {
  Tiles::release();
  configured_rows<Tiles> = 0;
}

// --- packing ---------------------------------------------------------------------------------------------------------

// Rows as they are, cut into blocks of 64 bytes: out[step / 16][row][step % 16].
inline void pack_blocks(const PackArgs& p) {
  for (int r = 0; r < p.stride; ++r) {
    const unsigned char* row = r < p.rows ? static_cast<const unsigned char*>(p.row[r]) : nullptr;
    for (int64_t step = 0; step < p.steps; step += kBlockSteps) {
      const int64_t left = row ? p.count - 2 * step : 0;
      const __mmask32 valid = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
      const __m512i x = valid ? _mm512_maskz_loadu_epi16(valid, row + step * 4) : _mm512_setzero_si512();
      _mm512_storeu_si512(p.out + step * p.stride + r * kBlockSteps, x);
    }
  }
}

// --- products --------------------------------------------------------------------------------------------------------

// One block of steps. Up to two row tiles are read once a pass and come from the second-level cache; they should not push
// the decoded weights out of the first. More are those of `stream_tall`: they stay in the first from panel to panel, and
// each is loaded when it is needed, for there are fewer registers.
template <class Tiles, int kRowTiles, int kPanels>
inline __attribute__((always_inline)) void add_products(const uint32_t* a, const uint32_t* b) {
  constexpr bool kStay = kRowTiles > 2;
  auto left = [&](auto r) {
    constexpr int kTile = left_tile(kRowTiles, r);
    const uint32_t* from = a + r * kTileRows * kBlockSteps;
    kStay ? Tiles::template load<kTile>(from, kBlockBytes) : Tiles::template load_once<kTile>(from, kBlockBytes);
  };
  if constexpr (!kStay) each<kRowTiles>(left);
  each<kPanels>([&](auto p) {
    constexpr int kPanel = p, kWeight = weight_tile(kRowTiles, kPanel);
    Tiles::template load<kWeight>(b + p * kPanelRows, kPanels * kPanelRows * 4);
    each<kRowTiles>([&](auto r) {
      if constexpr (kStay) left(r);
      Tiles::template multiply_add<sum_tile(kRowTiles, r, kPanel), left_tile(kRowTiles, r), kWeight>();
    });
  });
}

template <class Tiles, int kRowTiles, int kPanels, class F>
inline __attribute__((always_inline)) void each_sum(float* c, const F& f) {
  each<kRowTiles>([&](auto r) {
    constexpr int kRowTile = r;
    each<kPanels>([&](auto p) {
      f(std::integral_constant<int, sum_tile(kRowTiles, kRowTile, p)>{},
        c + (kRowTile * kTileRows * kPanels + p) * kPanelRows);
    });
  });
}

// What decodes a block of columns tile after tile: each panel's next one to out[16 steps][16·kPanels].
template <int kPanels, bool kSigns>
struct Decoding {
  static constexpr int64_t kTile = kCodeBytes + (kSigns ? kSignBytes : 0);
  const uint8_t* weight;
  int64_t panel_bytes, tiles;  // still to be decoded
  __m512i table;

  Decoding(const Codebook& book, const uint8_t* first, int64_t panel_distance, int64_t count)
      : weight(first), panel_bytes(panel_distance), tiles(count), table(pair_table(book)) {}

  // Asks for the codes kAhead bytes on: past a panel's end that is the next panel's beginning.
  template <int kAhead>
  __attribute__((always_inline)) void next(uint32_t* out) {
    next(out, [](const uint8_t* line) {
      if constexpr (kAhead > 0) __builtin_prefetch(line + kAhead);
    });
  }

  // `ask` is called with each line that is decoded.
  template <class Ask>
  __attribute__((always_inline)) void next(uint32_t* out, const Ask& ask) {
    each<kPanels>([&](auto p) {
      const uint8_t* tile = weight + p * panel_bytes;
      __m512i signs{};
      if constexpr (kSigns) signs = _mm512_loadu_si512(tile + kCodeBytes);
#pragma GCC unroll 4
      for (int unit = 0; unit < kUnits; ++unit) {
        const __m512i codes = _mm512_loadu_si512(tile + unit * kUnitBytes);
        ask(tile + unit * kUnitBytes);
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
          _mm512_store_si512(out + (unit * 4 + step) * kPanels * kPanelRows + p * kPanelRows,
                             decode_pair<kSigns>(codes, step, signs, unit, table));
        }
      }
      if constexpr (kSigns) ask(tile + kCodeBytes);
    });
    weight += kTile;
    --tiles;
  }
};

// Instead of a Decoding, for products without one.
struct NoDecoding {
  static constexpr int64_t tiles = 0;
  template <int kAhead>
  void next(uint32_t*) {}
};

template <class Tiles, int kRowTiles, int kPanels, class D>
void multiply_tiles(const MultiplyArgs& m, D decoding) {
  constexpr int kColumns = kPanels * kPanelRows, kBlock = kBlockSteps * kColumns;
  constexpr int64_t kRowBytes = kColumns * 4;
  configure<Tiles>(m.rows);
  // Loading sums is exact: TDPBF16PS adds up 32 k from 0 and then adds to the sum, whatever the chunks.
  each_sum<Tiles, kRowTiles, kPanels>(m.c, [&](auto t, float* c) {
    m.accumulate ? Tiles::template load<t>(c, kRowBytes) : Tiles::template zero<t>();
  });
  // Evenly: all at once would take every buffer that tile loads wait in too. The next tile's sums follow these, in the
  // second-level cache; they are loaded when no product is under way that would hide it.
  const int64_t blocks = m.steps > 0 ? m.steps / kBlockSteps : 1, sum_lines = m.rows * kPanels;
  Asking ask(m.ask), sums({reinterpret_cast<const uint8_t*>(m.c + sum_lines * kPanelRows), 0, sum_lines, 0, sum_lines});
  const int64_t asked_at_once = ceil_div(ask.left(), blocks), sums_at_once = ceil_div(sum_lines, blocks);
  const uint32_t* a = m.a;
  // A block is decoded over when it has been used, which costs next to nothing: decoding is not the tiles' work.
  uint32_t* b = const_cast<uint32_t*>(m.b);
  for (int64_t step = 0; step < m.steps; step += kBlockSteps, a += kBlockSteps * m.rows, b += kBlock) {
    ask.next<2>(asked_at_once);
    sums.next<3>(sums_at_once);
    add_products<Tiles, kRowTiles, kPanels>(a, b);
    if (decoding.tiles > 0) decoding.template next<0>(b);
  }
  for (; decoding.tiles > 0; b += kBlock) decoding.template next<0>(b);
  each_sum<Tiles, kRowTiles, kPanels>(m.c, [&](auto t, float* c) { Tiles::template store<t>(c, kRowBytes); });
}

template <class Tiles, int kPanels, class D>
void multiply_rows(const MultiplyArgs& m, const D& decoding) {
  static_assert(kAmxShape.rows == 2 * kTileRows);
  m.rows > kTileRows ? multiply_tiles<Tiles, 2, kPanels>(m, decoding) : multiply_tiles<Tiles, 1, kPanels>(m, decoding);
}

template <class Tiles>
void multiply(const MultiplyArgs& m) {
  static_assert(kAmxShape.panels == 2);
  m.panels > 1 ? multiply_rows<Tiles, 2>(m, NoDecoding{}) : multiply_rows<Tiles, 1>(m, NoDecoding{});
}

template <class Tiles, int kPanels>
void multiply_decoding_panels(const MultiplyArgs& m, const DecodeArgs& d) {
  d.book->sign_plane
      ? multiply_rows<Tiles, kPanels>(m, Decoding<kPanels, true>(*d.book, d.weight, d.panel_bytes, d.tiles))
      : multiply_rows<Tiles, kPanels>(m, Decoding<kPanels, false>(*d.book, d.weight, d.panel_bytes, d.tiles));
}

template <class Tiles>
void multiply_decoding(const MultiplyArgs& m, const DecodeArgs& d) {
  m.panels > 1 ? multiply_decoding_panels<Tiles, 2>(m, d) : multiply_decoding_panels<Tiles, 1>(m, d);
}

// --- few rows --------------------------------------------------------------------------------------------------------

// A ring of decoded tiles in the first-level cache: each is used, and decoded over for the round after. The distance in
// between is what lets the processor overlap the two, and stores reach the cache before they are loaded as tiles.
template <class Tiles, int kRowTiles, int kPanels, bool kSigns>
void stream_pass(const StreamArgs& s, int64_t panel) {
  constexpr int kColumns = kPanels * kPanelRows, kRing = kStreamTiles / kPanels, kBlock = kBlockSteps * kColumns;
  alignas(64) uint32_t b[kRing * kBlock];
  alignas(64) float c[kRowTiles * kTileRows * kColumns];
  Decoding<kPanels, kSigns> decoding(*s.book, s.weight + panel * s.panel_bytes, s.panel_bytes, s.tiles);
  for (int i = 0; i < kRing && decoding.tiles > 0; ++i) decoding.template next<kStreamAhead>(b + i * kBlock);
  each_sum<Tiles, kRowTiles, kPanels>(c, [](auto t, float*) { Tiles::template zero<t>(); });
  const uint32_t* a = s.a;
  for (int64_t tile = 0, at = 0; tile < s.tiles; ++tile, at = at + 1 < kRing ? at + 1 : 0) {
    add_products<Tiles, kRowTiles, kPanels>(a, b + at * kBlock);
    if (decoding.tiles > 0) decoding.template next<kStreamAhead>(b + at * kBlock);
    a += kBlockSteps * s.rows;
  }
  each_sum<Tiles, kRowTiles, kPanels>(c, [](auto t, float* to) { Tiles::template store<t>(to, kColumns * 4); });
  avx512_pair_kernels().finish(finish_of(s, panel, c, kColumns));
}

// More than two row tiles, some k at a time (kTallTiles): these k of the rows stay in the first-level cache, panels and
// their sums pass by. The other way round, with sums in registers or decoded weights there, as many rows from the
// second-level cache would take all its buffers, in which reads from memory wait too. Each tile is decoded over when it
// has been used, for the next panel; the codes of the one after that are asked for.
template <class Tiles, int kRowTiles, bool kSigns>
void stream_tall(const StreamArgs& s) {
  constexpr int kBlock = kBlockSteps * kPanelRows, kSumLines = kRowTiles * kTileRows;
  alignas(64) uint32_t b[kTallTiles * kBlock];
  Decoding<1, kSigns> first(*s.book, s.weight, s.panel_bytes, s.tiles);
  for (int64_t tile = 0; tile < s.tiles; ++tile) first.template next<0>(b + tile * kBlock);
  Asking rows(s.ask);
  const int64_t tiles = s.tiles > 0 ? s.tiles : 1;
  const int64_t lines_at_once = ceil_div(kSumLines, tiles), rows_at_once = ceil_div(rows.left(), s.panels * tiles);
  for (int64_t panel = 0; panel < s.panels; ++panel) {
    float* c = s.sums + panel * kSumLines * kPanelRows;
    each_sum<Tiles, kRowTiles, 1>(c, [&](auto t, float* from) {
      s.first ? Tiles::template zero<t>() : Tiles::template load<t>(from, kPanelRows * 4);
    });
    const bool more = panel + 1 < s.panels;
    Decoding<1, kSigns> next(*s.book, s.weight + (more ? panel + 1 : 0) * s.panel_bytes, s.panel_bytes, s.tiles);
    // Past the last panel follow the next k of the first.
    const int64_t ahead = panel + 2 < s.panels ? s.panel_bytes : s.tiles * next.kTile - (s.panels - 1) * s.panel_bytes;
    const float* sums = more ? c + kSumLines * kPanelRows : s.sums;
    const uint32_t* a = s.a;
    for (int64_t tile = 0; tile < s.tiles; ++tile, a += kBlockSteps * s.rows) {
      add_products<Tiles, kRowTiles, 1>(a, b + tile * kBlock);
      if (more) next.next(b + tile * kBlock, [&](const uint8_t* line) { __builtin_prefetch(line + ahead, 0, 2); });
      for (int64_t i = 0; i < lines_at_once; ++i, sums += kPanelRows) __builtin_prefetch(sums, 0, 3);
      rows.next<2>(rows_at_once);
    }
    each_sum<Tiles, kRowTiles, 1>(c, [](auto t, float* to) { Tiles::template store<t>(to, kPanelRows * 4); });
    if (s.last) avx512_pair_kernels().finish(finish_of(s, panel, c, kPanelRows));
  }
}

template <class Tiles, int kRowTiles, int kPanels>
void stream_from(const StreamArgs& s, int64_t panel) {
  for (; panel + kPanels <= s.panels; panel += kPanels) {
    s.book->sign_plane ? stream_pass<Tiles, kRowTiles, kPanels, true>(s, panel)
                       : stream_pass<Tiles, kRowTiles, kPanels, false>(s, panel);
  }
  if constexpr (kPanels > 1) {
    if (panel < s.panels) stream_from<Tiles, kRowTiles, kPanels - 1>(s, panel);
  }
}

template <class Tiles, int kRowTiles>
void stream_rows(const StreamArgs& s) {
  if constexpr (kRowTiles < row_tiles_of(kTallRows)) {
    stream_from<Tiles, kRowTiles, stream_panels(kAmxShape, kRowTiles * kTileRows)>(s, 0);
  } else {
    s.book->sign_plane ? stream_tall<Tiles, kRowTiles, true>(s) : stream_tall<Tiles, kRowTiles, false>(s);
  }
}

template <class Tiles>
void stream(const StreamArgs& s) {
  static_assert(kAmxShape.stream_rows == 4 * kTileRows && kTallRows == 2 * kTileRows + 1);
  configure<Tiles>(s.rows);
  switch (row_tiles_of(s.rows)) {
    case 1: stream_rows<Tiles, 1>(s); break;
    case 2: stream_rows<Tiles, 2>(s); break;
    case 3: stream_rows<Tiles, 3>(s); break;
    default: stream_rows<Tiles, 4>(s);
  }
  leave<Tiles>();
}

template <class Tiles>
Kernels tile_kernels() {
  Kernels table = avx512_pair_kernels();
  table.pack = pack_blocks;
  table.multiply = multiply<Tiles>;
  table.multiply_decoding = multiply_decoding<Tiles>;
  table.stream = stream<Tiles>;
  table.leave = leave<Tiles>;
  return table;
}

}  // namespace
