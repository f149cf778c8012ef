#include "amx.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "buffer.h"
#include "layout.h"

namespace inq::cpu {
namespace {

// A product of small integers in units of the smallest level, exact in any order of summation. Its numbers: two row
// tiles (the second not full), or four where tall, an odd panel, and more k than `stream` decodes at once.
constexpr int kRows = 20, kTall = 50, kPanels = 5, kTiles = 11, kK = kTiles * kTileK;
static_assert(kTall >= kTallRows && kTiles > kTallTiles);
constexpr Format kFormat{4, false};

struct Sample {
  Buffer<uint16_t> x{kTall * kK};  // bfloat16
  Buffer<uint8_t> weight{int64_t{kPanels} * kTiles * tile_bytes(kFormat)};
  Codebook book = codebook(kFormat);

  Sample() {
    uint32_t state = 1;
    auto random = [&] { return (state = state * 1664525u + 1013904223u) >> 24; };
    for (int i = 0; i < kTall * kK; ++i) {
      const float value = static_cast<float>(static_cast<int>(random() % 17) - 8);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      x[i] = static_cast<uint16_t>(bits >> 16);
    }
    for (int i = 0; i < kPanels * kTiles * tile_bytes(kFormat); ++i) weight[i] = static_cast<uint8_t>(random());
  }

  int64_t panel_bytes() const { return int64_t{kTiles} * tile_bytes(kFormat); }

  Buffer<uint32_t> packed(const Kernels& kernels, int first, int rows, int stride) const {
    const void* row[kTall];
    for (int r = 0; r < rows; ++r) row[r] = x.get() + (first + r) * kK;
    Buffer<uint32_t> a(int64_t{stride} * kK / 2);
    kernels.pack({row, rows, stride, kK, kK / 2, DType::bfloat16, a.get()});
    return a;
  }

  // Rows [first, first + rows) of the product by `stream`, with a row count that it is compiled for.
  void stream(const Kernels& kernels, int first, int rows, int stride, float* y) const {
    float ones[kPanels * kPanelRows];
    for (float& one : ones) one = 1;
    const Buffer<uint32_t> a = packed(kernels, first, rows, stride);
    const Buffer<float> sums(round_up(stride, 16) * kPanels * kPanelRows);
    StreamArgs s{};
    s.book = &book;
    s.panel_bytes = panel_bytes();
    s.panels = kPanels;
    s.rows = stride;
    s.sums = sums.get();
    s.finish.rows = rows;
    s.finish.columns = kPanels * kPanelRows;
    s.finish.power = ones;
    s.finish.type = DType::float32;
    s.finish.out = y;
    s.finish.out_stride = kPanels * kPanelRows;
    const int at_once = stride >= kTallRows ? kTallTiles : kTiles;
    for (int tile = 0; tile < kTiles; tile += at_once) {
      s.weight = weight.get() + tile * tile_bytes(kFormat);
      s.tiles = std::min(at_once, kTiles - tile);
      s.a = a.get() + tile * kTileK / 2 * stride;
      s.first = tile == 0;
      s.last = tile + s.tiles == kTiles;
      kernels.stream(s);
    }
  }

  // The first `rows` rows, `at_once` of them at a time.
  Buffer<float> streamed(const Kernels& kernels, int rows, int at_once, int stride) const {
    Buffer<float> y(rows * kPanels * kPanelRows);
    for (int first = 0; first < rows; first += at_once) {
      stream(kernels, first, std::min(at_once, rows - first), stride, y.get() + first * kPanels * kPanelRows);
    }
    return y;
  }

  // Two panels by `multiply`, in two chunks: sums go to memory and back, and the second chunk's weights take the place of
  // the first's, which are fewer.
  Buffer<float> multiplied(const Kernels& kernels) const {
    constexpr int64_t kHalf = kTiles / 2, kHalfSteps = kHalf * kTileK / 2, kRestSteps = kK / 2 - kHalfSteps;
    const Buffer<uint32_t> a = packed(kernels, 0, kRows, kRows), b(kRestSteps * 2 * kPanelRows);
    const uint8_t* rest = weight.get() + kHalf * tile_bytes(kFormat);
    kernels.decode({&book, weight.get(), panel_bytes(), kHalf, 2, b.get()});
    Buffer<float> c(2 * kRows * 2 * kPanelRows);  // and as many that are asked for
    kernels.multiply_decoding({a.get(), b.get(), kHalfSteps, c.get(), kRows, 2, false, a.get(), {}},
                              {&book, rest, panel_bytes(), kTiles - kHalf, 2, b.get()});
    kernels.multiply({a.get() + kHalfSteps * kRows, b.get(), kRestSteps, c.get(), kRows, 2, true, a.get(), {}});
    kernels.leave();
    return c;
  }
};

void check_same(const char* what, const float* got, const float* expected, int rows, int columns, int expected_stride) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      if (got[r * columns + c] == expected[r * expected_stride + c]) continue;
      throw std::runtime_error(std::string("AMX: ") + what + ": expected " +
                               std::to_string(expected[r * expected_stride + c]) + " as AVX-512 gives, got " +
                               std::to_string(got[r * columns + c]) +
                               ". Set INQ_CPU_ISA=avx512 to go on without AMX, and please report this.");
    }
  }
}

}  // namespace

void check_tiles(const Kernels& tiles) {
  constexpr int kColumns = kPanels * kPanelRows;
  const Sample sample;
  const Buffer<float> expected = sample.streamed(avx512_pair_kernels(), kTall, 24, 24);
  const Buffer<float> many = sample.streamed(tiles, kRows, kRows, kRows), few = sample.streamed(tiles, 5, 5, 5);
  const Buffer<float> tall = sample.streamed(tiles, kTall, kTall, kTall);
  check_same("the product of 20 rows", many.get(), expected.get(), kRows, kColumns, kColumns);
  check_same("the product of 5 rows", few.get(), expected.get(), 5, kColumns, kColumns);
  check_same("the product of 50 rows", tall.get(), expected.get(), kTall, kColumns, kColumns);
  check_same("the blocked product", sample.multiplied(tiles).get(), expected.get(), kRows, 2 * kPanelRows, kColumns);
}

const Kernels& amx_kernels() {
  if (amx_emulated()) return amx_emulated_kernels();
  static const bool checked = (check_tiles(amx_hardware_kernels()), true);
  (void)checked;
  return amx_hardware_kernels();
}

void emulate_amx(bool on, bool wrong) {
  set_amx_emulated(on);
  set_emulation_wrong(wrong);
  if (!on) return;
  try {
    check_tiles(amx_emulated_kernels());
  } catch (...) {
    set_amx_emulated(false);
    throw;
  }
}

}  // namespace inq::cpu

#endif
