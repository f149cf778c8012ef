#include "conv2d.h"

#include <algorithm>
#include <cstring>

#include "epilogue.h"
#include "panels.h"

namespace inq::cpu {
namespace {

// Where an output pixel's patch begins in the image; negative in the padding.
struct Corner {
  int64_t image, row, column;
};

Corner corner_of(const Conv2dArgs& args, int64_t pixel) {
  const int64_t column = pixel % args.out_size[1], line = pixel / args.out_size[1];
  return {line / args.out_size[0], line % args.out_size[0] * args.stride[0] - args.padding[0],
          column * args.stride[1] - args.padding[1]};
}

// --- groups of whole panels: the blocked product ----------------------------------------------------------------------
//
// The image has its channels innermost and the weights their taps, so a chunk takes a range of channels with all taps:
// its k are contiguous in the weight, and are regrouped after decoding to (tap, channel), the order in which rows of the
// image are read.
class Gathered {
 public:
  Gathered(const Conv2dArgs& args, const Plan& plan, const float* power, const Codebook& book, int64_t group)
      : args_(args), plan_(plan), kernels_(kernels_of(plan)), power_(power), book_(book), group_(group),
        taps_(args.kernel[0] * args.kernel[1]), channels_(args.channels / args.groups), rows_(args.weight.n / args.groups),
        panel_bytes_(tiles_of(args.weight.k) * tile_bytes(args.weight.format)) {
    const int pair = plan.shape.pair;
    most_channels_ = std::max<int64_t>(plan.k_chunk / pair / taps_, 1) * pair;
    int64_t first = 0;
    for (int64_t c = 0; c < channels_ || c == 0; c += most_channels_) {
      const int64_t count = std::min(most_channels_, channels_ - c);
      const int64_t tile = c * taps_ / kTileK, tiles = ceil_div((c + count) * taps_, kTileK) - tile;
      const int64_t steps = round_up(ceil_div(count, pair) * taps_, plan.shape.block);
      chunks_.push_back({first, steps, tiles * kTileK / pair});
      pieces_.push_back({c, count, tile, tiles, order(c * taps_ - tile * kTileK, count)});
      first += steps;
    }
    zeros_.assign(static_cast<size_t>(most_channels_) * size_of(args.type), 0);
  }

  void run() const {
    auto pack = [&](int64_t first, int rows, uint32_t* out) { gather(first, rows, out); };
    auto decode = [&](size_t chunk, int64_t panel, int panels, uint32_t* out) {
      const Piece& piece = pieces_[chunk];
      const DecodeArgs natural{&book_, weights(chunk, panel), panel_bytes_, piece.tiles, panels, out};
      if (taps_ == 1) return kernels_.decode(natural);
      const int columns = panels * kPanelRows;
      const Buffer<uint32_t> decoded(chunks_[chunk].decoded * columns);
      DecodeArgs aside = natural;
      aside.out = decoded.get();
      kernels_.decode(aside);
      kernels_.regroup({decoded.get(), piece.at.data(), chunks_[chunk].steps, columns, out});
    };
    auto fetch = [&](size_t chunk, int64_t panel, int panels, int64_t part, int64_t parts) {
      const int64_t lines = pieces_[chunk].tiles * tile_bytes(args_.weight.format) / kCacheLine, all = lines * panels;
      for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) {
        __builtin_prefetch(weights(chunk, panel + i / lines) + i % lines * kCacheLine, 0, 2);
      }
    };
    auto finish = [&](int64_t pixel, int pixels, int64_t panel, int panels, const float* sums) {
      const int64_t column = panel * kPanelRows, row = group_ * rows_ + column, n = args_.weight.n;
      kernels_.finish({sums, int64_t{panels} * kPanelRows, pixels,
                       static_cast<int>(std::min<int64_t>(int64_t{panels} * kPanelRows, rows_ - column)), power_ + row,
                       args_.weight.scale ? args_.weight.scale + row : nullptr, args_.bias ? args_.bias + row : nullptr,
                       args_.type, static_cast<unsigned char*>(args_.out) + (pixel * n + row) * size_of(args_.type), n});
    };
    PanelProduct(plan_, args_.batch * args_.out_size[0] * args_.out_size[1], rows_, chunks_, pack, decode, fetch, finish)
        .run();
  }

 private:
  struct Piece {
    int64_t channel, count, tile, tiles;
    std::vector<int32_t> at;  // for RegroupArgs
  };

  // For (tap, channel) in order, channels padded to a step: which k, counted from the first decoded one. Then as many
  // that are none as fill the last block of steps.
  std::vector<int32_t> order(int64_t offset, int64_t count) const {
    std::vector<int32_t> at;
    if (taps_ == 1) return at;
    const int64_t padded = ceil_div(count, plan_.shape.pair) * plan_.shape.pair;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      for (int64_t c = 0; c < padded; ++c) at.push_back(c < count ? static_cast<int32_t>(offset + c * taps_ + tap) : -1);
    }
    at.resize(static_cast<size_t>(round_up(taps_ * padded, plan_.shape.pair * plan_.shape.block)), -1);
    return at;
  }

  const uint8_t* weights(size_t chunk, int64_t panel) const {
    return args_.weight.data + (group_ * rows_ / kPanelRows + panel) * panel_bytes_ +
           pieces_[chunk].tile * tile_bytes(args_.weight.format);
  }

  // The patches of some output pixels as rows of the left operand.
  void gather(int64_t first, int rows, uint32_t* out) const {
    constexpr int kMostRows = 32;  // of any Shape's micro-tile
    const int size = size_of(args_.type), pair = plan_.shape.pair;
    Corner corner[kMostRows];
    for (int r = 0; r < rows; ++r) corner[r] = corner_of(args_, first + r);
    for (int64_t i = 0; i < args_.kernel[0]; ++i) {
      for (int64_t j = 0; j < args_.kernel[1]; ++j) {
        const unsigned char* pixel[kMostRows];
        for (int r = 0; r < rows; ++r) {
          const int64_t row = corner[r].row + i * args_.dilation[0], column = corner[r].column + j * args_.dilation[1];
          const bool inside = row >= 0 && row < args_.height && column >= 0 && column < args_.width;
          pixel[r] = inside ? static_cast<const unsigned char*>(args_.x) +
                                  (((corner[r].image * args_.height + row) * args_.width + column) * args_.channels +
                                   group_ * channels_) * size
                            : nullptr;
        }
        const int64_t tap = i * args_.kernel[1] + j;
        for (size_t c = 0; c < pieces_.size(); ++c) {
          const Piece& piece = pieces_[c];
          const void* from[kMostRows];
          for (int r = 0; r < rows; ++r) {
            from[r] = pixel[r] ? pixel[r] + piece.channel * size : zeros_.data();
          }
          const int64_t steps = ceil_div(piece.count, pair);
          kernels_.pack({from, rows, rows, piece.count, steps, args_.type, out, chunks_[c].first + tap * steps});
        }
      }
    }
    for (size_t c = 0; c < pieces_.size(); ++c) {
      const int64_t steps = ceil_div(pieces_[c].count, pair) * taps_;
      if (steps == chunks_[c].steps) continue;
      kernels_.pack({nullptr, 0, rows, 0, chunks_[c].steps - steps, args_.type, out, chunks_[c].first + steps});
    }
  }

  const Conv2dArgs& args_;
  const Plan& plan_;
  const Kernels& kernels_;
  const float* power_;
  const Codebook& book_;
  const int64_t group_, taps_, channels_, rows_, panel_bytes_;
  int64_t most_channels_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<Piece> pieces_;
  std::vector<unsigned char> zeros_;
};

// --- any groups: lane by lane -----------------------------------------------------------------------------------------
//
// Sixteen output channels of a panel read sixteen channels of x that their groups name: a copy of a few image rows, padded
// and in float32, holds for each pixel and each channel of a group those sixteen side by side. Then every term of the sum
// is one multiplication of registers. Padding is zeros in that copy, as in the reference.
void conv2d_lanes(const Conv2dArgs& args, const Plan& plan, const float* power, const Codebook& book) {
  const Kernels& kernels = kernels_of(plan);
  const int64_t group_channels = args.channels / args.groups, group_rows = args.weight.n / args.groups;
  const int64_t k = args.weight.k, panels = panels_of(args.weight.n), tiles = tiles_of(k);
  const int size = size_of(args.type);
  const int64_t panel_bytes = tiles * tile_bytes(args.weight.format);
  const int64_t width = args.width + 2 * args.padding[1];
  const int64_t reach = (args.kernel[0] - 1) * args.dilation[0] + 1;
  const int64_t pixel_floats = group_channels * kPanelRows, line_floats = width * pixel_floats;
  // Output rows of a task: 1 MB of copied image, but at least one.
  const int64_t lines = std::clamp<int64_t>((1 << 18) / std::max<int64_t>(line_floats, 1) / args.stride[0], 1, 16);
  const int64_t line_blocks = ceil_div(args.out_size[0], lines);

  const Buffer<uint32_t> decoded(panels * tiles * kTileK * kPanelRows);
  for (int64_t p = 0; p < panels; ++p) {
    kernels.decode({&book, args.weight.data + p * panel_bytes, panel_bytes, tiles, 1,
                    decoded.get() + p * tiles * kTileK * kPanelRows});
  }
  std::vector<int64_t> offset;
  for (int64_t c = 0; c < group_channels; ++c) {
    for (int64_t i = 0; i < args.kernel[0]; ++i) {
      for (int64_t j = 0; j < args.kernel[1]; ++j) {
        offset.push_back(i * args.dilation[0] * line_floats + j * args.dilation[1] * pixel_floats + c * kPanelRows);
      }
    }
  }

  parallel_tasks(args.batch * panels * line_blocks, plan.threads, [&](int64_t task) {
    const int64_t block = task % line_blocks, panel = task / line_blocks % panels, image = task / line_blocks / panels;
    const int64_t first = block * lines, count = std::min(lines, args.out_size[0] - first);
    const int64_t top = first * args.stride[0] - args.padding[0], copied = (count - 1) * args.stride[0] + reach;
    const int64_t n = panel * kPanelRows;
    const int valid = static_cast<int>(std::min<int64_t>(kPanelRows, args.weight.n - n));
    const Buffer<float> copy(copied * line_floats);
    std::memset(copy.get(), 0, static_cast<size_t>(copied * line_floats) * sizeof(float));
    for (int64_t row = std::max<int64_t>(top, 0); row < std::min(top + copied, args.height); ++row) {
      float* to = copy.get() + (row - top) * line_floats + args.padding[1] * pixel_floats;
      const unsigned char* from = static_cast<const unsigned char*>(args.x) +
                                  (image * args.height + row) * args.width * args.channels * size;
      for (int64_t column = 0; column < args.width; ++column, to += pixel_floats, from += args.channels * size) {
        for (int64_t c = 0; c < group_channels; ++c) {
          for (int lane = 0; lane < valid; ++lane) {
            const unsigned char* x = from + ((n + lane) / group_rows * group_channels + c) * size;
            if (args.type == DType::float32) {
              std::memcpy(to + c * kPanelRows + lane, x, 4);
            } else {
              uint16_t word;
              std::memcpy(&word, x, 2);
              const uint32_t bits = uint32_t{word} << 16;
              std::memcpy(to + c * kPanelRows + lane, &bits, 4);
            }
          }
        }
      }
    }
    const Buffer<float> sums(args.out_size[1] * kPanelRows);
    for (int64_t line = 0; line < count; ++line) {
      kernels.direct({copy.get() + line * args.stride[0] * line_floats,
                      reinterpret_cast<const float*>(decoded.get() + panel * tiles * kTileK * kPanelRows), offset.data(), k,
                      args.out_size[1], args.stride[1] * pixel_floats, sums.get()});
      const int64_t pixel = (image * args.out_size[0] + first + line) * args.out_size[1];
      kernels.finish({sums.get(), kPanelRows, static_cast<int>(args.out_size[1]), valid, power + n,
                      args.weight.scale ? args.weight.scale + n : nullptr, args.bias ? args.bias + n : nullptr, args.type,
                      static_cast<unsigned char*>(args.out) + (pixel * args.weight.n + n) * size, args.weight.n});
    }
  });
}

}  // namespace

void conv2d(const Conv2dArgs& args) {
  const int64_t pixels = args.batch * args.out_size[0] * args.out_size[1], rows = args.weight.n / args.groups;
  // A panel must not hold rows of two groups, unless there is only one.
  const bool whole_panels = args.groups == 1 || rows % kPanelRows == 0;
  const Plan chosen = plan({Op::conv2d, pixels, whole_panels ? rows : args.weight.n, args.weight.k,
                            whole_panels ? args.type : DType::float32, args.weight.format.bits, current_isa(),
                            thread_count()});
  if (chosen.kernel == Kernel::none) return;
  const Codebook book = codebook(args.weight.format);
  const Buffer<float> power = powers(args.weight);
  if (!whole_panels) return conv2d_lanes(args, chosen, power.get(), book);
  for (int64_t group = 0; group < args.groups; ++group) Gathered(args, chosen, power.get(), book, group).run();
}

}  // namespace inq::cpu
