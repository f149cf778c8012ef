#include "prepack.h"

#include <algorithm>
#include <cstring>

#include "layout.h"
#include "parallel.h"

namespace inq::cpu {
namespace {

// Where k = 2j + i of a unit has its nibble.
constexpr int nibble_shift(int k) { return k / 2 * 4 + k % 2 * 16; }

// Where the sign of k = 8·unit + i of a tile is in the sign plane.
constexpr int sign_shift(int k) { return (k % 2 ? 31 : 15) - k / 2; }

// Eight codes of kBits bits → a unit's dword and, at 5 bits, their signs in the tile's plane.
template <int kBits>
inline uint32_t to_unit(uint64_t word, int unit, uint32_t& signs) {
  constexpr int kField = kBits - 1;
  uint32_t dword = 0;
  for (int i = 0; i < kUnitK; ++i) {
    const uint32_t code = static_cast<uint32_t>(word >> (kBits * i)) & ((1u << kBits) - 1);
    const uint32_t field = code & ((1u << kField) - 1), sign = code >> kField;
    if constexpr (kBits == 5) {
      dword |= field << nibble_shift(i);
      signs |= sign << sign_shift(kUnitK * unit + i);
    } else {
      dword |= (sign << 3 | field) << nibble_shift(i);
    }
  }
  return dword;
}

template <int kBits>
inline uint64_t from_unit(uint32_t dword, int unit, uint32_t signs) {
  constexpr int kField = kBits - 1;
  uint64_t word = 0;
  for (int i = 0; i < kUnitK; ++i) {
    const uint32_t nibble = dword >> nibble_shift(i) & 15;
    const uint32_t sign = kBits == 5 ? signs >> sign_shift(kUnitK * unit + i) & 1 : nibble >> 3;
    const uint64_t code = sign << kField | (nibble & ((1u << kField) - 1));
    word |= code << (kBits * i);
  }
  return word;
}

template <int kBits>
void prepack_bits(const uint8_t* storage, uint8_t* packed, int64_t n, int64_t k) {
  constexpr Format kFormat{kBits, false};
  constexpr int kTile = tile_bytes(kFormat);
  const int64_t stride = row_bytes(kFormat, k), groups = ceil_div(k, kUnitK), tiles = tiles_of(k);
  parallel_for(0, panels_of(n), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, n - panel * kPanelRows));
      for (int64_t tile = 0; tile < tiles; ++tile) {
        uint32_t out[kTile / 4] = {};
        const int units = static_cast<int>(std::min<int64_t>(kUnits, groups - tile * kUnits));
        for (int row = 0; row < rows; ++row) {
          const uint8_t* in = storage + (panel * kPanelRows + row) * stride + tile * kUnits * kBits;
          uint32_t signs = 0;
          for (int unit = 0; unit < units; ++unit) {
            uint64_t word = 0;
            std::memcpy(&word, in + unit * kBits, kBits);
            out[unit * kPanelRows + row] = to_unit<kBits>(word, unit, signs);
          }
          if constexpr (kBits == 5) out[kUnits * kPanelRows + row] = signs;
        }
        std::memcpy(packed + (panel * tiles + tile) * kTile, out, kTile);
      }
    }
  });
}

template <int kBits>
void unprepack_bits(const uint8_t* packed, uint8_t* storage, int64_t n, int64_t k) {
  constexpr Format kFormat{kBits, false};
  constexpr int kTile = tile_bytes(kFormat);
  const int64_t stride = row_bytes(kFormat, k), groups = ceil_div(k, kUnitK), tiles = tiles_of(k);
  parallel_for(0, panels_of(n), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, n - panel * kPanelRows));
      for (int64_t tile = 0; tile < tiles; ++tile) {
        uint32_t in[kTile / 4];
        std::memcpy(in, packed + (panel * tiles + tile) * kTile, kTile);
        const int units = static_cast<int>(std::min<int64_t>(kUnits, groups - tile * kUnits));
        for (int row = 0; row < rows; ++row) {
          uint8_t* out = storage + (panel * kPanelRows + row) * stride + tile * kUnits * kBits;
          const uint32_t signs = kBits == 5 ? in[kTile / 4 - kPanelRows + row] : 0;
          for (int unit = 0; unit < units; ++unit) {
            const uint64_t word = from_unit<kBits>(in[unit * kPanelRows + row], unit, signs);
            std::memcpy(out + unit * kBits, &word, kBits);
          }
        }
      }
    }
  });
}

}  // namespace

// The words are put together and taken apart with memcpy of their low bytes.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the codec is written for little-endian machines");

void prepack(const uint8_t* storage, uint8_t* packed, int64_t n, int64_t k, Format format) {
  switch (format.bits) {
    case 2: return prepack_bits<2>(storage, packed, n, k);
    case 3: return prepack_bits<3>(storage, packed, n, k);
    case 4: return prepack_bits<4>(storage, packed, n, k);
    default: return prepack_bits<5>(storage, packed, n, k);
  }
}

void unprepack(const uint8_t* packed, uint8_t* storage, int64_t n, int64_t k, Format format) {
  switch (format.bits) {
    case 2: return unprepack_bits<2>(packed, storage, n, k);
    case 3: return unprepack_bits<3>(packed, storage, n, k);
    case 4: return unprepack_bits<4>(packed, storage, n, k);
    default: return unprepack_bits<5>(packed, storage, n, k);
  }
}

}  // namespace inq::cpu
