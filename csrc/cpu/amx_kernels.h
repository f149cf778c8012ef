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

// Four tiles of sums: up to 16 rows × 4 panels, or 32 rows × 2. Each weight tile is then used for all rows, and four
// products are under way, which hides most of a product's latency (52 cycles, one started every 16).
constexpr int sum_tile(int row_tile, int panel) { return row_tile * 2 + panel; }
constexpr int left_tile(int row_tile) { return 4 + row_tile; }
constexpr int weight_tile(int row_tiles, int panel) { return row_tiles == 2 ? 6 + panel : 5 + panel % 3; }

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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
  const uint8_t top = static_cast<uint8_t>(least(rows, kTileRows)), bottom = static_cast<uint8_t>(rows - top);
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = kBlockBytes;
    config.rows[t] = kTileRows;
  }
  for (int i = 0; i < 4; ++i) config.rows[i] = i < sum_tile(1, 0) || bottom == 0 ? top : bottom;
  config.rows[left_tile(0)] = top;
  if (bottom > 0) config.rows[left_tile(1)] = bottom;
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

// One block of steps. The left operand is read once a pass and comes from the second-level cache; it should not push
// the decoded weights out of the first.
template <class Tiles, int kRowTiles, int kPanels>
inline __attribute__((always_inline)) void add_products(const uint32_t* a, const uint32_t* b) {
  each<kRowTiles>([&](auto r) {
    Tiles::template load_once<left_tile(r)>(a + r * kTileRows * kBlockSteps, kBlockBytes);
  });
  each<kPanels>([&](auto p) {
    constexpr int kPanel = p, kWeight = weight_tile(kRowTiles, kPanel);
    Tiles::template load<kWeight>(b + p * kPanelRows, kPanels * kPanelRows * 4);
    each<kRowTiles>([&](auto r) { Tiles::template multiply_add<sum_tile(r, kPanel), left_tile(r), kWeight>(); });
  });
}

template <class Tiles, int kRowTiles, int kPanels, class F>
inline __attribute__((always_inline)) void each_sum(float* c, const F& f) {
  each<kRowTiles>([&](auto r) {
    constexpr int kRowTile = r;
    each<kPanels>([&](auto p) {
      f(std::integral_constant<int, sum_tile(kRowTile, p)>{}, c + (kRowTile * kTileRows * kPanels + p) * kPanelRows);
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
    each<kPanels>([&](auto p) {
      const uint8_t* tile = weight + p * panel_bytes;
      __m512i signs{};
      if constexpr (kSigns) signs = _mm512_loadu_si512(tile + kCodeBytes);
#pragma GCC unroll 4
      for (int unit = 0; unit < kUnits; ++unit) {
        const __m512i codes = _mm512_loadu_si512(tile + unit * kUnitBytes);
        if constexpr (kAhead > 0) __builtin_prefetch(tile + unit * kUnitBytes + kAhead);
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
          _mm512_store_si512(out + (unit * 4 + step) * kPanels * kPanelRows + p * kPanelRows,
                             decode_pair<kSigns>(codes, step, signs, unit, table));
        }
      }
      if constexpr (kSigns && kAhead > 0) __builtin_prefetch(tile + kCodeBytes + kAhead);
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

  const int column = static_cast<int>(panel * kPanelRows);
  FinishArgs f = s.finish;
  f.c = c;
  f.c_stride = kColumns;
  f.columns = static_cast<int>(least(kColumns, f.columns - column));
  f.power += column;
  if (f.scale) f.scale += column;
  if (f.bias) f.bias += column;
  f.out = static_cast<unsigned char*>(f.out) + int64_t{column} * size_of(f.type);
  avx512_pair_kernels().finish(f);
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

template <class Tiles>
void stream(const StreamArgs& s) {
  configure<Tiles>(s.rows);
  s.rows > kTileRows ? stream_from<Tiles, 2, stream_panels(kAmxShape, 2 * kTileRows)>(s, 0)
                     : stream_from<Tiles, 1, stream_panels(kAmxShape, kTileRows)>(s, 0);
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
