// The loops of kernels.h as templates over a set of instructions `S`. Included only by the files that define one, each
// in its own anonymous namespace: the same template compiled with two sets of flags must never be merged by the linker.
//
// S has: kShape (kernels.h), kSteps (steps a unit of 8 k), Vec, Codes, Table;
//   table(book), load_codes(p), decode<kSigns>(codes, step, signs, unit, table), zero(), load(p), store(p, v),
//   broadcast(p) of a dword, multiply_add(acc, x, weight), mul(a, b), add(a, b), store_bfloat16(p, v), pack(args).
#pragma once

#include <cstring>

#include "asking.h"
#include "finishing.h"
#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 does not see that Sums::joined guards Sums::chunk. To the end of the file that includes this: it warns where the
// memory is read, after everything has been inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace {

using namespace inq::cpu;

template <class S>
constexpr int kVectors = kPanelRows / S::kShape.lanes;  // a panel
template <class S>
constexpr int kTileSteps = kUnits * S::kSteps;

// Steps that are summed before their sum joins that of the chunk, which joins the total. In float32 a quarter of a chunk:
// where torch's product of few rows sums in many short parts, as on Intel, one of 64 terms loses more than twice what it
// does. Were the parts to join the total themselves, four times as many additions would follow one another: too many where
// K is long, beside torch's product on AMD.
template <class S>
constexpr int64_t kSumSteps = S::kShape.pair == 1 ? kChunkSteps / 4 : kChunkSteps;

// The sums of a micro-tile: parts of kSumSteps in registers, their sum in the first-level cache, the total in c.
template <class S, int kRows, int kVecs>
struct Sums {
  typename S::Vec part[kRows][kVecs];
  alignas(64) float chunk[kRows][kVecs * S::kShape.lanes];
  bool joined = false;

  __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) part[r][v] = S::zero();
    }
  }

  // A part that is not the last.
  __attribute__((always_inline)) void join() {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        float* to = &chunk[r][v * S::kShape.lanes];
        S::store(to, joined ? S::add(S::load(to), part[r][v]) : part[r][v]);
      }
    }
    joined = true;
    clear();
  }

  // The last part. From +0 as `stream` does: a sum of −0 is +0 for any number of rows.
  __attribute__((always_inline)) void finish(float* c, bool accumulate) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + (r * kVecs + v) * S::kShape.lanes;
        const typename S::Vec sum = joined ? S::add(S::load(&chunk[r][v * S::kShape.lanes]), part[r][v]) : part[r][v];
        S::store(to, S::add(accumulate ? S::load(to) : S::zero(), sum));
      }
    }
  }
};

// How far ahead of its reads a stream asks for its lines: about the memory latency at full bandwidth.
constexpr int64_t kPrefetchBytes = 2048;

// --- decode ----------------------------------------------------------------------------------------------------------

template <class S, bool kSigns>
void decode_tiles(const DecodeArgs& d) {
  constexpr int kTile = kCodeBytes + (kSigns ? kSignBytes : 0);
  const typename S::Table table = S::table(*d.book);
  const int64_t columns = d.panels * kPanelRows;
  for (int panel = 0; panel < d.panels; ++panel) {
    const uint8_t* tile = d.weight + panel * d.panel_bytes;
    uint32_t* out = d.out + panel * kPanelRows;
    for (int64_t t = 0; t < d.tiles; ++t, tile += kTile, out += kTileSteps<S> * columns) {
      for (int v = 0; v < kVectors<S>; ++v) {
        const int lane = v * S::kShape.lanes;
        typename S::Codes signs{};
        if constexpr (kSigns) signs = S::load_codes(tile + kCodeBytes + lane * 4);
#pragma GCC unroll 4
        for (int unit = 0; unit < kUnits; ++unit) {
          const typename S::Codes codes = S::load_codes(tile + unit * kUnitBytes + lane * 4);
#pragma GCC unroll 8
          for (int step = 0; step < S::kSteps; ++step) {
            S::store(out + (unit * S::kSteps + step) * columns + lane,
                     S::template decode<kSigns>(codes, step, signs, unit, table));
          }
        }
      }
    }
  }
}

template <class S>
void decode(const DecodeArgs& d) {
  d.book->sign_plane ? decode_tiles<S, true>(d) : decode_tiles<S, false>(d);
}

// lanes × lanes dwords at a time: decoded with n in the lanes, transposed, stored with k in the lanes.
template <class S, bool kSigns, int kHalf>
void decode_half_tile(const uint8_t* tile, typename S::Table table, uint32_t* out, int64_t columns) {
  constexpr int kLanes = S::kShape.lanes;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors<S>; ++v) {
    const int lane = v * kLanes;
    typename S::Codes signs{};
    if constexpr (kSigns) signs = S::load_codes(tile + kCodeBytes + lane * 4);
#pragma GCC unroll 4
    for (int first = 0; first < kPanelRows; first += kLanes) {
      typename S::Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int k = kHalf * kPanelRows + first + i, unit = k / kUnitK;
        square[i] = S::template decode<kSigns>(S::load_codes(tile + unit * kUnitBytes + lane * 4), k % kUnitK, signs,
                                               unit, table);
      }
      S::transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) S::store(out + (lane + i) * columns + first, square[i]);
    }
  }
}

template <class S, bool kSigns>
void decode_transposed_tiles(const DecodeTransposedArgs& d) {
  constexpr int kTile = kCodeBytes + (kSigns ? kSignBytes : 0);
  const typename S::Table table = S::table(*d.book);
  const int64_t columns = int64_t{d.column_panels} * kPanelRows;
  for (int panel = 0; panel < d.panels; ++panel) {
    for (int i = 0; i < d.column_panels; ++i) {
      const int64_t half = d.first_half + i;
      const uint8_t* tile = d.weight + panel * d.panel_bytes + half / 2 * kTile;
      uint32_t* out = d.out + panel * kPanelRows * columns + i * kPanelRows;
      half % 2 ? decode_half_tile<S, kSigns, 1>(tile, table, out, columns)
               : decode_half_tile<S, kSigns, 0>(tile, table, out, columns);
    }
  }
}

template <class S>
void decode_transposed(const DecodeTransposedArgs& d) {
  d.book->sign_plane ? decode_transposed_tiles<S, true>(d) : decode_transposed_tiles<S, false>(d);
}

template <class S>
void regroup(const RegroupArgs& g) {
  for (int64_t step = 0; step < g.steps; ++step) {
    uint32_t* out = g.out + step * g.columns;
    if constexpr (S::kShape.pair == 1) {
      const uint32_t* row = g.in + int64_t{g.at[step]} * g.columns;
      for (int i = 0; i < g.columns; i += S::kShape.lanes) S::store(out + i, S::load(row + i));
    } else {
      // A half that is not there reads row 0 and keeps nothing of it.
      const int32_t low = g.at[2 * step], high = g.at[2 * step + 1];
      const uint32_t* low_row = g.in + int64_t{low < 0 ? 0 : low / 2} * g.columns;
      const uint32_t* high_row = g.in + int64_t{high < 0 ? 0 : high / 2} * g.columns;
      const uint32_t low_kept = low < 0 ? 0 : 0xFFFFu, high_kept = high < 0 ? 0 : 0xFFFF0000u;
      const int down = low % 2 ? 16 : 0, up = high % 2 ? 0 : 16;
      for (int i = 0; i < g.columns; ++i) {
        out[i] = (low_row[i] >> down & low_kept) | (high_row[i] << up & high_kept);
      }
    }
  }
}

// --- lane by lane -----------------------------------------------------------------------------------------------------

// Terms that are summed before their sum joins the total: chunks again, for the rounding errors' sake.
constexpr int64_t kDirectChunk = 64;

template <class S, int kPixels>
void direct_pixels(const DirectArgs& d, int64_t pixel) {
  typename S::Vec total[kPixels][kVectors<S>], sum[kPixels][kVectors<S>];
  for (int64_t first = 0; first < d.terms || first == 0; first += kDirectChunk) {
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors<S>; ++v) sum[p][v] = S::zero();
    }
    for (int64_t i = first; i < least(first + kDirectChunk, d.terms); ++i) {
      const float* x = d.x + pixel * d.pixel_stride + d.offset[i];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors<S>; ++v) {
        const typename S::Vec w = S::load(d.w + i * kPanelRows + v * S::kShape.lanes);
#pragma GCC unroll 4
        for (int p = 0; p < kPixels; ++p) {
          sum[p][v] = S::multiply_add(sum[p][v], S::load(x + p * d.pixel_stride + v * S::kShape.lanes), w);
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors<S>; ++v) total[p][v] = first ? S::add(total[p][v], sum[p][v]) : sum[p][v];
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors<S>; ++v) S::store(d.c + (pixel + p) * kPanelRows + v * S::kShape.lanes, total[p][v]);
  }
}

template <class S>
void direct(const DirectArgs& d) {
  constexpr int kPixels = S::kShape.lanes >= 8 ? 4 : 1;  // as many independent sums as hide an addition's latency
  int64_t pixel = 0;
  for (; pixel + kPixels <= d.pixels; pixel += kPixels) direct_pixels<S, kPixels>(d, pixel);
  for (; pixel < d.pixels; ++pixel) direct_pixels<S, 1>(d, pixel);
}

// --- micro-tile -------------------------------------------------------------------------------------------------------

template <class S, int kRows, int kPanels>
void multiply_tile(const MultiplyArgs& m) {
  constexpr int kVecs = kPanels * kVectors<S>, kColumns = kPanels * kPanelRows;
  const uint32_t* a = m.a;
  const uint32_t* b = m.b;
  const uint32_t* next = m.next;
  Asking ask(m.ask);
  ask.next<2>(ask.left());
  Sums<S, kRows, kVecs> sums;
  sums.clear();
  for (int64_t left = m.steps; left > 0;) {
    const int64_t steps = least(left, kSumSteps<S>);
    for (int64_t step = 0; step < steps; ++step, a += kRows, b += kColumns, next += kRows) {
      // It comes from the third-level cache, and the hardware's prefetcher notices only after some misses.
      __builtin_prefetch(next, 0, 3);
      typename S::Vec weight[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) weight[v] = S::load(b + v * S::kShape.lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename S::Vec x = S::broadcast(a + r);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sums.part[r][v] = S::multiply_add(sums.part[r][v], x, weight[v]);
      }
    }
    left -= steps;
    if (left > 0) sums.join();
  }
  sums.finish(m.c, m.accumulate);
}

// The same sums from rows that are not packed (MultiplyArgs::taps).
template <class S, int kRows, int kPanels>
void multiply_runs(const MultiplyArgs& m) {
  constexpr int kVecs = kPanels * kVectors<S>, kColumns = kPanels * kPanelRows;
  const unsigned char* const* at = reinterpret_cast<const unsigned char* const*>(m.a);
  const uint32_t* b = m.b;
  Asking ask(m.ask);
  ask.next<2>(ask.left());
  Sums<S, kRows, kVecs> sums;
  sums.clear();
  const int64_t run = m.steps / m.taps;
  int64_t left = least(m.steps, kSumSteps<S>), steps_left = m.steps;
  for (int64_t tap = 0; tap < m.taps; ++tap, at += kRows) {
    const uint32_t* x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = reinterpret_cast<const uint32_t*>(at[r] + m.offset);
    for (int64_t step = 0; step < run;) {
      const int64_t end = step + least(run - step, left);
      left -= end - step;
      for (; step < end; ++step, b += kColumns) {
        typename S::Vec weight[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) weight[v] = S::load(b + v * S::kShape.lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const typename S::Vec value = S::broadcast(x[r] + step);
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) sums.part[r][v] = S::multiply_add(sums.part[r][v], value, weight[v]);
        }
      }
      if (left == 0 && (steps_left -= kSumSteps<S>) > 0) {
        sums.join();
        left = least(steps_left, kSumSteps<S>);
      }
    }
  }
  sums.finish(m.c, m.accumulate);
}

template <class S, int kPanels, int kRows>
void multiply_rows(const MultiplyArgs& m) {
  if constexpr (kRows > 1) {
    if (m.rows < kRows) return multiply_rows<S, kPanels, kRows - 1>(m);
  }
  m.taps > 0 ? multiply_runs<S, kRows, kPanels>(m) : multiply_tile<S, kRows, kPanels>(m);
}

template <class S, int kPanels = S::kShape.panels>
void multiply(const MultiplyArgs& m) {
  if constexpr (kPanels > 1) {
    if (m.panels < kPanels) return multiply<S, kPanels - 1>(m);
  }
  multiply_rows<S, kPanels, S::kShape.rows>(m);
}

// --- epilogue ---------------------------------------------------------------------------------------------------------

// One register of columns, from and to whole registers of memory.
template <class S>
inline typename S::Vec finished(const float* c, const float* power, const float* scale, const float* bias) {
  typename S::Vec y = S::mul(S::load(c), S::load(power));
  if (scale) y = S::mul(y, S::load(scale));
  if (bias) y = S::add(y, S::load(bias));
  return y;
}

template <class S>
void finish(const FinishArgs& f) {
  const int whole = f.columns / S::kShape.lanes * S::kShape.lanes, rest = f.columns - whole;
  const int size = size_of(f.type);
  // The last columns through memory of full registers: neither read nor write beyond the caller's arrays.
  alignas(64) float power[S::kShape.lanes] = {}, scale[S::kShape.lanes] = {}, bias[S::kShape.lanes] = {}, last[S::kShape.lanes] = {};
  alignas(64) unsigned char rounded[S::kShape.lanes * 4];
  if (rest) {
    std::memcpy(power, f.power + whole, rest * sizeof(float));
    if (f.scale) std::memcpy(scale, f.scale + whole, rest * sizeof(float));
    if (f.bias) std::memcpy(bias, f.bias + whole, rest * sizeof(float));
  }
  for (int r = 0; r < f.rows; ++r) {
    const float* c = f.c + r * f.c_stride;
    unsigned char* out = static_cast<unsigned char*>(f.out) + r * f.out_stride * size;
    auto write = [&](void* to, typename S::Vec y) {
      if (f.type == DType::float32) {
        S::store(to, y);
      } else {
        S::store_bfloat16(to, y);
      }
    };
    for (int i = 0; i < whole; i += S::kShape.lanes) {
      write(out + i * size, finished<S>(c + i, f.power + i, f.scale ? f.scale + i : nullptr, f.bias ? f.bias + i : nullptr));
    }
    if (rest) {
      std::memcpy(last, c + whole, rest * sizeof(float));
      write(rounded, finished<S>(last, power, f.scale ? scale : nullptr, f.bias ? bias : nullptr));
      std::memcpy(out + whole * size, rounded, rest * size);
    }
  }
}

// --- few rows ---------------------------------------------------------------------------------------------------------

// Codes are read once, decoded in registers and used for every row at once. All panels of a pass take a step together:
// their sums are independent, which hides the latency of the additions, and they share the loads of x.
template <class S, int kRows, int kPanels, bool kSigns>
void stream_pass(const StreamArgs& s, int64_t panel) {
  constexpr int kTile = kCodeBytes + (kSigns ? kSignBytes : 0), kVecs = kPanels * kVectors<S>;
  constexpr int kColumns = kPanels * kPanelRows, kSumTiles = kSumSteps<S> / kTileSteps<S>, kChunkTiles = kChunkSteps / kTileSteps<S>;
  // The total so far, and of this chunk where its parts do not join the total at once.
  alignas(64) float c[kRows][kColumns] = {}, chunk[kRows][kSumTiles < kChunkTiles ? kColumns : 1] = {};
  typename S::Vec sum[kVecs][kRows];          // of these kSumSteps
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) sum[v][r] = S::zero();
  }
  const typename S::Table table = S::table(*s.book);
  const uint8_t* weight = s.weight + panel * s.panel_bytes;
  const uint32_t* a = s.a;
  // Where register v of a tile's dwords begins.
  auto at = [&](int v) { return v / kVectors<S> * s.panel_bytes + v % kVectors<S> * S::kShape.lanes * 4; };
  for (int64_t t = 0; t < s.tiles; ++t, weight += kTile, a += kTileSteps<S> * kRows) {
    typename S::Codes signs[kVecs] = {};
    if constexpr (kSigns) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) signs[v] = S::load_codes(weight + at(v) + kCodeBytes);
    }
#pragma GCC unroll 4
    for (int unit = 0; unit < kUnits; ++unit) {
      typename S::Codes codes[kVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) {
        codes[v] = S::load_codes(weight + at(v) + unit * kUnitBytes);
        __builtin_prefetch(weight + at(v) + unit * kUnitBytes + kPrefetchBytes);
      }
#pragma GCC unroll 8
      for (int step = 0; step < S::kSteps; ++step) {
        const uint32_t* x = a + (unit * S::kSteps + step) * kRows;
        typename S::Vec w[kVecs];
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) w[v] = S::template decode<kSigns>(codes[v], step, signs[v], unit, table);
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r) {
          const typename S::Vec row = S::broadcast(x + r);
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) sum[v][r] = S::multiply_add(sum[v][r], row, w[v]);
        }
      }
    }
    if ((t + 1) % kSumTiles == 0 || t + 1 == s.tiles) {
      const bool whole = (t + 1) % kChunkTiles == 0 || t + 1 == s.tiles;
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r) {
          float* total = &c[r][v * S::kShape.lanes];
          typename S::Vec joined = sum[v][r];
          if constexpr (kSumTiles < kChunkTiles) {
            float* of_chunk = &chunk[r][v * S::kShape.lanes];
            joined = S::add(S::load(of_chunk), joined);
            S::store(of_chunk, whole ? S::zero() : joined);
          }
          if (whole) S::store(total, S::add(S::load(total), joined));
          sum[v][r] = S::zero();
        }
      }
    }
  }
  finish<S>(finish_of(s, panel, &c[0][0], kColumns));
}

template <class S, int kRows, int kPanels>
void stream_rest(const StreamArgs& s, int64_t panel) {
  for (; panel + kPanels <= s.panels; panel += kPanels) {
    s.book->sign_plane ? stream_pass<S, kRows, kPanels, true>(s, panel)
                       : stream_pass<S, kRows, kPanels, false>(s, panel);
  }
  if constexpr (kPanels > 1) {
    if (panel < s.panels) stream_rest<S, kRows, kPanels / 2>(s, panel);
  }
}

template <class S, int kIndex = 0>
void stream(const StreamArgs& s) {
  constexpr int kRows = kStreamRows[kIndex];
  if constexpr (kRows < S::kShape.stream_rows) {
    if (s.rows > kRows) return stream<S, kIndex + 1>(s);
  }
  constexpr int kPanels = stream_panels(S::kShape, kRows);
  stream_rest<S, kRows, kPanels>(s, 0);
}

template <class S>
constexpr Kernels kernels() {
  Kernels table{S::pack, decode<S>, multiply<S>, finish<S>, stream<S>, regroup<S>, nullptr, nullptr};
  if constexpr (S::kShape.pair == 1) {
    table.decode_transposed = decode_transposed<S>;
    table.direct = direct<S>;
  }
  return table;
}

}  // namespace
