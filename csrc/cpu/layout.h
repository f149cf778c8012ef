// The layout "cpu16" of packed weights, one for every instruction set.
//
// A *panel* holds 16 rows n of W (columns of the product), contiguous along K. A *tile* is 32 k of a panel, four *units*
// of 8 k and 64 bytes. Dword lane n of a unit holds row n's eight nibbles: nibble j of the low 16-bit half is k = 2j, of
// the high half k = 2j + 1, so that one table look-up by 16-bit lanes of (unit >> 4j) gives the pair (k, k + 1) that a
// bfloat16 dot product wants. A nibble is sign << 3 | field up to 4 bits; at 5 bits it is the field, and 64 more bytes
// a tile hold the signs: in dword lane n, bit 15 − r is the sign of k = 2r and bit 31 − r that of k = 2r + 1.
// Rows and k beyond the weight's are zero codes.
#pragma once

#include <cstdint>

#include "inq_format.h"

namespace inq::cpu {

constexpr int kPanelRows = 16;
constexpr int kUnitK = 8;
constexpr int kUnitBytes = kPanelRows * 4;
constexpr int kUnits = 4;
constexpr int kTileK = kUnits * kUnitK;
constexpr int kCodeBytes = kUnits * kUnitBytes;   // of a tile, without its signs
constexpr int kSignBytes = kPanelRows * 4;        // of a tile, at 5 bits

constexpr bool has_sign_plane(Format f) { return f.bits == 5; }
constexpr int tile_bytes(Format f) { return kCodeBytes + (has_sign_plane(f) ? kSignBytes : 0); }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t panels_of(int64_t n) { return ceil_div(n, kPanelRows); }
constexpr int64_t tiles_of(int64_t k) { return ceil_div(k, kTileK); }

// What the 16 nibbles mean, relative to 2^n1 of the row: 0 or ±2^-j. A new format needs a new table and nothing else.
struct Codebook {
  alignas(64) float value[16];
  bool sign_plane;
};

inline Codebook codebook(Format f) {
  Codebook book{};
  book.sign_plane = has_sign_plane(f);
  const int field_bits = book.sign_plane ? 4 : 3;
  for (int nibble = 0; nibble < 16; ++nibble) {
    const int field = nibble & ((1 << field_bits) - 1);
    const int index = field < 1 << (f.bits - 1) ? index_of(f, field) : -1;
    if (index < 0) continue;
    const float size = 1.0f / static_cast<float>(1 << (magnitudes(f) - 1 - index));
    book.value[nibble] = nibble >> field_bits ? -size : size;
  }
  return book;
}

}  // namespace inq::cpu
