// The gradient of linear in x: (grad · 2^n1 · scale) · decode(W), in float32. The blocked product of linear with n and k
// exchanged: the sums go over the weight's rows, and its tiles are transposed while they are decoded.
#include <algorithm>

#include "epilogue.h"
#include "panels.h"

namespace inq::cpu {
namespace {

// grad · factor, as the reference multiplies: first 2^n1, then the scale.
void scaled_row(const void* grad, DType type, const float* power, const float* scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    float g;
    if (type == DType::float32) {
      std::memcpy(&g, static_cast<const unsigned char*>(grad) + i * 4, 4);
    } else {
      uint16_t word;
      std::memcpy(&word, static_cast<const unsigned char*>(grad) + i * 2, 2);
      const uint32_t bits = uint32_t{word} << 16;
      std::memcpy(&g, &bits, 4);
    }
    g *= power[i];
    out[i] = scale ? g * scale[i] : g;
  }
}

}  // namespace

void linear_dx(const LinearDxArgs& args) {
  const Weight& w = args.weight;
  const Plan chosen = plan({Op::linear_dx, args.m, w.n, w.k, args.type, current_isa(), thread_count()});
  if (chosen.kernel == Kernel::none) return;
  const Kernels& kernels = kernels_of(chosen);
  const Codebook book = codebook(w.format);
  const Buffer<float> power = powers(w), ones(w.k);
  std::fill(ones.get(), ones.get() + w.k, 1.0f);
  const int64_t tile = tile_bytes(w.format), panel_bytes = tiles_of(w.k) * tile;
  const int size = size_of(args.type);
  constexpr int64_t kChunkPanels = kChunkSteps / kPanelRows;

  std::vector<Chunk> chunks;
  for (int64_t n = 0; n < w.n || n == 0; n += kChunkSteps) {
    const int64_t steps = std::min<int64_t>(kChunkSteps, w.n - n);
    chunks.push_back({n, steps, panels_of(steps) * kPanelRows});
  }
  auto pack = [&](int64_t first, int rows, uint32_t* out) {
    constexpr int kPiece = 512, kMostRows = 8;
    float scaled[kMostRows][kPiece];
    for (int64_t n = 0; n < w.n; n += kPiece) {
      const int64_t count = std::min<int64_t>(kPiece, w.n - n);
      const void* row[kMostRows];
      for (int r = 0; r < rows; ++r) {
        scaled_row(static_cast<const unsigned char*>(args.grad) + ((first + r) * w.n + n) * size, args.type,
                   power.get() + n, w.scale ? w.scale + n : nullptr, count, scaled[r]);
        row[r] = scaled[r];
      }
      kernels.pack({row, rows, rows, count, count, DType::float32, out + n * rows});
    }
  };
  auto panels_in = [&](size_t chunk) { return static_cast<int>(chunks[chunk].decoded / kPanelRows); };
  auto weights = [&](size_t chunk) { return w.data + static_cast<int64_t>(chunk) * kChunkPanels * panel_bytes; };
  auto decode = [&](size_t chunk, int64_t panel, int panels, uint32_t* out) {
    kernels.decode_transposed({&book, weights(chunk), panel_bytes, panels_in(chunk), panel, panels, out});
  };
  auto codes = [](size_t, int64_t, int, uint32_t*) { return DecodeArgs{}; };  // not as they are
  auto reads = [&](size_t chunk, int64_t panel, int panels) {
    // The tiles under these columns, in each of the chunk's panels.
    const int64_t begin = panel / 2 * tile, lines = (ceil_div(panel + panels, 2) * tile - begin) / kCacheLine;
    return Ask{weights(chunk) + begin, panel_bytes, lines, 0, lines * panels_in(chunk)};
  };
  auto finish = [&](int64_t row, int rows, int64_t panel, int panels, const float* sums) {
    const int64_t column = panel * kPanelRows;
    kernels.finish({sums, int64_t{panels} * kPanelRows, rows,
                    static_cast<int>(std::min<int64_t>(int64_t{panels} * kPanelRows, w.k - column)), ones.get(), nullptr,
                    nullptr, args.type, static_cast<unsigned char*>(args.out) + (row * w.k + column) * size, w.k});
  };
  PanelProduct(chosen, args.m, w.k, chunks, pack, decode, codes, reads, finish).run();
}

}  // namespace inq::cpu
