// AMX without torch, for the sanitizers: the kernels' own machine code (tile_traps.h) against the emulated tiles, bit
// for bit, on arrays of exactly the promised sizes. test_linear.cpp multiplies with the emulated ones.
#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/amx.h"
#include "cpu/buffer.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "threads.h"
#include "tile_traps.h"

#if defined(__x86_64__)

using namespace inq;
using namespace inq::cpu;

namespace {

template <class T>
std::vector<T> random_values(size_t count, uint32_t seed) {
  std::mt19937 bits(seed);
  std::vector<T> values(count);
  for (T& v : values) v = static_cast<T>(bits());
  return values;
}

// Around 1, all signs and fractions: sums depend on the order of summation.
std::vector<uint16_t> random_bfloat16(size_t count, uint32_t seed) {
  std::vector<uint16_t> values = random_values<uint16_t>(count, seed);
  for (uint16_t& v : values) v = static_cast<uint16_t>((v & 0x81FF) | 0x3E00);
  return values;
}

// The packed rows with every block of steps where it belongs, and zeros to fill the last one and the last row.
void check_pack() {
  constexpr int kRowCount = 19, kStride = 20;
  constexpr int64_t kCount = 75, kSteps = 48;
  const std::vector<uint16_t> x = random_bfloat16(kRowCount * kCount, 1);
  const void* row[kRowCount];
  for (int r = 0; r < kRowCount; ++r) row[r] = &x[r * kCount];
  std::vector<uint32_t> packed(kSteps * kStride, ~0u);
  amx_hardware_kernels().pack({row, kRowCount, kStride, kCount, kSteps, DType::bfloat16, packed.data()});
  for (int64_t step = 0; step < kSteps; ++step) {
    for (int r = 0; r < kStride; ++r) {
      uint32_t want = 0;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t k = 2 * step + half;
        if (k < kCount && r < kRowCount) want |= uint32_t{x[r * kCount + k]} << (16 * half);
      }
      CHECK(packed[(step / 16 * kStride + r) * 16 + step % 16] == want, "step %d, row %d", static_cast<int>(step), r);
    }
  }
}

void check_multiply(int rows, int panels, int64_t steps) {
  const std::vector<uint16_t> x = random_bfloat16(steps * rows * 2, 2), w = random_bfloat16(steps * panels * 32, 3);
  const uint32_t* const a = reinterpret_cast<const uint32_t*>(x.data());
  const uint32_t* const b = reinterpret_cast<const uint32_t*>(w.data());
  std::vector<float> c[2] = {std::vector<float>(rows * panels * kPanelRows, 0.5f), {}};
  c[1] = c[0];
  for (const bool accumulate : {false, true, true}) {
    const Kernels* const sets[2] = {&amx_hardware_kernels(), &amx_emulated_kernels()};
    for (int i = 0; i < 2; ++i) sets[i]->multiply({a, b, steps, c[i].data(), rows, panels, accumulate, a, {}});
    CHECK(std::memcmp(c[0].data(), c[1].data(), c[0].size() * sizeof(float)) == 0, "%d rows, %d panels, %d steps", rows,
          panels, static_cast<int>(steps));
  }
}

// The same product and, in the place of what it used, the next weights: as many tiles, fewer, or more. Once asked for,
// codes need not exist.
void check_multiply_decoding(Format format, int rows, int panels, int64_t tiles, int64_t next_tiles) {
  const int64_t steps = tiles * kTileK / 2, columns = panels * kPanelRows, most = std::max(tiles, next_tiles);
  const std::vector<uint16_t> x = random_bfloat16(steps * rows * 2, 8);
  const std::vector<uint8_t> weight = random_values<uint8_t>(panels * next_tiles * tile_bytes(format), 9);
  const std::vector<uint16_t> values = random_bfloat16(most * kTileK * columns, 10);
  // Of exactly that size and alignment.
  auto copy = [&] {
    Buffer<uint32_t> to(most * kTileK / 2 * columns);
    if (!values.empty()) std::memcpy(to.get(), values.data(), values.size() * sizeof(uint16_t));
    return to;
  };
  auto same = [&](const Buffer<uint32_t>& p, const Buffer<uint32_t>& q) {
    return std::memcmp(p.get(), q.get(), values.size() * sizeof(uint16_t)) == 0;
  };
  const uint32_t* const a = reinterpret_cast<const uint32_t*>(x.data());
  const Codebook book = codebook(format);
  const Ask ask{weight.data(), 64, 3, 2, 30};
  std::vector<float> want(rows * columns);
  const Buffer<uint32_t> w = copy(), decoded = copy();
  amx_emulated_kernels().multiply({a, w.get(), steps, want.data(), rows, panels, false, a, {}});
  DecodeArgs next{&book, weight.data(), next_tiles * tile_bytes(format), next_tiles, panels, nullptr};
  next.out = decoded.get();
  amx_emulated_kernels().decode(next);
  for (const Kernels* const set : {&amx_hardware_kernels(), &amx_emulated_kernels()}) {
    const Buffer<uint32_t> right = copy();
    std::vector<float> c(rows * columns);
    next.out = right.get();
    set->multiply_decoding({a, next.out, steps, c.data(), rows, panels, false, a, ask}, next);
    CHECK(c == want && same(right, decoded), "%d rows, %d panels, %d tiles, then %d, bits %d", rows, panels,
          static_cast<int>(tiles), static_cast<int>(next_tiles), format.bits);
  }
}

void leave() {
  amx_hardware_kernels().leave();
  amx_emulated_kernels().leave();
}

void check_stream(Format format, int rows, int panels, int64_t tiles) {
  const std::vector<uint8_t> weight = random_values<uint8_t>(panels * tiles * tile_bytes(format), 4);
  const std::vector<uint16_t> a = random_bfloat16(tiles * kTileK * rows, 5);
  const std::vector<float> power(panels * kPanelRows, 0.5f);
  const Codebook book = codebook(format);
  const int columns = panels * kPanelRows - 3;
  // Of exactly that alignment; where `stream` takes some k at a time.
  const Buffer<float> sums((rows + 15) / 16 * 16 * panels * kPanelRows);
  const int64_t at_once = rows >= kTallRows ? kTallTiles : tiles;
  std::vector<float> y[2];
  const Kernels* const sets[2] = {&amx_hardware_kernels(), &amx_emulated_kernels()};
  for (int i = 0; i < 2; ++i) {
    y[i].assign(rows * columns, -1);
    FinishArgs finish{};
    finish.rows = rows;
    finish.columns = columns;
    finish.power = power.data();
    finish.type = DType::float32;
    finish.out = y[i].data();
    finish.out_stride = columns;
    int64_t tile = 0;
    do {
      const int64_t count = std::min(at_once, tiles - tile);
      sets[i]->stream({&book, weight.data() + tile * tile_bytes(format), tiles * tile_bytes(format), count, panels,
                       reinterpret_cast<const uint32_t*>(a.data()) + tile * kTileK / 2 * rows, rows, finish, tile == 0,
                       tile + count == tiles, sums.get()});
      tile += count;
    } while (tile < tiles);
  }
  CHECK(std::memcmp(y[0].data(), y[1].data(), y[0].size() * sizeof(float)) == 0, "%d rows, %d panels, %d tiles, bits %d",
        rows, panels, static_cast<int>(tiles), format.bits);
}

void check_machine_code() {
  check_pack();
  for (const int rows : {1, 2, 15, 16, 17, 31, 32}) {
    for (int panels = 1; panels <= 2; ++panels) {
      for (const int64_t steps : {0, 16, 80}) check_multiply(rows, panels, steps);
      for (const int bits : {4, 5}) {
        for (const int64_t tiles : {0, 3, 5}) check_multiply_decoding({bits, false}, rows, panels, tiles, 4);
      }
    }
  }
  // In the middle of a task the number of rows may change, as above; `stream` is a task of its own.
  leave();
  for (const int rows : {1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64}) {
    for (int panels = 1; panels <= 5; ++panels) check_stream({panels % 2 ? 5 : 4, false}, rows, panels, 9 + panels);
    for (const int64_t tiles : {0, 6, 12}) check_stream({4, false}, rows, 3, tiles);
  }
}

}  // namespace

int main() {
  if (detected_isa() < Isa::avx512) return 0;
  inq::test::trap_tile_instructions();
  check_machine_code();
  check_tiles(amx_hardware_kernels());
  // Tiles and their configuration belong to a thread.
  set_thread_count(3);
  parallel_for(0, 3, 1, [](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) check_multiply(7 + 9 * static_cast<int>(i), 2, 80);
    leave();
  });
  if (detected_isa() < Isa::amx) CHECK(inq::test::trapped_tile_instructions() > 1000);

  emulate_amx(true);
  CHECK(current_isa() == Isa::amx && &amx_kernels() == &amx_emulated_kernels());
  const std::vector<uint16_t> x = random_bfloat16(200 * 64, 6);
  const std::vector<uint8_t> weight = random_values<uint8_t>(5 * 2 * tile_bytes({4, false}), 7);
  const std::vector<int8_t> exponent(70, 0);
  std::vector<uint16_t> y(200 * 70);
  for (const int64_t m : {3, 50, 200}) {
    const Weight w{weight.data(), exponent.data(), nullptr, {4, false}, 70, 64};
    linear({x.data(), m, DType::bfloat16, w, nullptr, y.data()});
    CHECK(emulated_threads_configured() == 0, "after %d rows", static_cast<int>(m));
  }
  emulate_amx(false);
  CHECK(current_isa() == detected_isa());

  std::string message;
  try {
    emulate_amx(true, true);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message.find("INQ_CPU_ISA=avx512") != std::string::npos, "%s", message.c_str());
  CHECK(!amx_emulated());
  return inq::test::failures();
}

#else

int main() { return 0; }

#endif
