// The products on emulated tiles, for tests on machines without AMX. As strict as the processor: what would be an
// invalid instruction there (no configuration, operands whose sizes do not fit) throws here.
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "amx.h"
#include "amx_kernels.h"

namespace {

std::atomic<int> threads_configured{0};
std::atomic<bool> wrong_products{false};

struct State {
  bool configured = false;
  TileConfig config;
  alignas(64) unsigned char tile[8][kTileRows][kBlockBytes];
};
thread_local State state;

void require(bool condition, const char* what) {
  if (!condition) throw std::logic_error(what);
}

// Subnormal numbers are zeros of their sign, as operands and as results.
float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

// The bfloat16 in the low or high half of a pair.
float half_of(uint32_t pair, bool high) {
  const uint32_t bits = high ? pair & 0xFFFF0000u : pair << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

struct EmulatedTiles {
  static void configure(const TileConfig& config) {
    require(config.palette == 1, "LDTILECFG: palette");
    for (int t = 0; t < 16; ++t) {
      require(config.rows[t] <= kTileRows && config.row_bytes[t] <= kBlockBytes && (t < 8 || config.rows[t] == 0),
              "LDTILECFG: size of a tile");
    }
    if (!state.configured) ++threads_configured;
    state.configured = true;
    state.config = config;
    std::memset(state.tile, 0, sizeof state.tile);
  }
  static void release() {
    if (state.configured) --threads_configured;
    state.configured = false;
    std::memset(state.tile, 0xFF, sizeof state.tile);  // NaN, where the processor has zeros: a use of it shows
  }

  static int rows(int t) {
    require(state.configured && state.config.rows[t] > 0, "a tile is used that is not configured");
    return state.config.rows[t];
  }
  template <int kTile>
  static void zero() {
    rows(kTile);
    std::memset(state.tile[kTile], 0, sizeof state.tile[kTile]);
  }
  template <int kTile>
  static void load(const void* p, int64_t bytes) {
    const int count = rows(kTile);
    std::memset(state.tile[kTile], 0, sizeof state.tile[kTile]);
    for (int r = 0; r < count; ++r) {
      const unsigned char* from = static_cast<const unsigned char*>(p) + r * bytes;
      std::memcpy(state.tile[kTile][r], from, state.config.row_bytes[kTile]);
    }
  }
  template <int kTile>
  static void load_once(const void* p, int64_t bytes) {
    load<kTile>(p, bytes);
  }
  template <int kTile>
  static void store(void* p, int64_t bytes) {
    const int count = rows(kTile);
    for (int r = 0; r < count; ++r) {
      std::memcpy(static_cast<unsigned char*>(p) + r * bytes, state.tile[kTile][r], state.config.row_bytes[kTile]);
    }
  }

  // TDPBF16PS of Intel's manual: for each element the even k and the odd k are two chains of fused multiply-adds from
  // 0; their sum is added to the element. Every result is rounded to nearest even and flushed.
  template <int kSum, int kLeft, int kRight>
  static void multiply_add() {
    const TileConfig& config = state.config;
    require(rows(kSum) == rows(kLeft) && config.row_bytes[kSum] == config.row_bytes[kRight] &&
                config.row_bytes[kLeft] == rows(kRight) * 4,
            "TDPBF16PS: sizes of the tiles");
    const int columns = config.row_bytes[kSum] / 4, pairs = config.row_bytes[kLeft] / 4;
    float right[2][kBlockSteps][kPanelRows] = {};
    for (int k = 0; k < pairs; ++k) {
      uint32_t row[kPanelRows];
      std::memcpy(row, state.tile[kRight][k], sizeof row);
      for (int n = 0; n < columns; ++n) {
        right[0][k][n] = half_of(row[n], false);
        right[1][k][n] = half_of(row[n], true);
      }
    }
    for (int m = 0; m < config.rows[kSum]; ++m) {
      uint32_t left[kBlockSteps];
      std::memcpy(left, state.tile[kLeft][m], sizeof left);
      float chain[2][kPanelRows] = {}, sum[kPanelRows];
      for (int k = 0; k < pairs; ++k) {
        for (int odd = 0; odd < 2; ++odd) {
          const float x = half_of(left[k], odd);
          for (int n = 0; n < columns; ++n) chain[odd][n] = flushed(__builtin_fmaf(x, right[odd][k][n], chain[odd][n]));
        }
      }
      std::memcpy(sum, state.tile[kSum][m], sizeof sum);
      for (int n = 0; n < columns; ++n) sum[n] = flushed(flushed(sum[n]) + flushed(chain[0][n] + chain[1][n]));
      if (wrong_products.load(std::memory_order_relaxed)) sum[columns - 1] += 1;
      std::memcpy(state.tile[kSum][m], sum, sizeof sum);
    }
  }
};

}  // namespace

namespace inq::cpu {

const Kernels& amx_emulated_kernels() {
  static const Kernels table = tile_kernels<EmulatedTiles>();
  return table;
}

void set_emulation_wrong(bool wrong) { wrong_products = wrong; }

int emulated_threads_configured() { return threads_configured; }

}  // namespace inq::cpu
