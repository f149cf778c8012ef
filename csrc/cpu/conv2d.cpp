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
    // All channels at once where that is not much over a chunk, else as many as fill one.
    const int64_t chunk = plan.k_chunk / pair, most_k = chunk * 3 / 2 * pair;
    const int64_t most = taps_ > 1 && channels_ * taps_ <= most_k
                             ? std::max<int64_t>(channels_, 1)
                             : std::max<int64_t>(chunk / taps_, 1) * pair;
    // Rows as they lie in the image are dwords of one product each, pixel by pixel.
    in_place_ = plan.shape.block == 1 && size_of(args.type) * pair == 4 && channels_ > 0 && channels_ % pair == 0 &&
                reinterpret_cast<uintptr_t>(args.x) % 4 == 0;
    if (in_place_) zeros_.resize(static_cast<size_t>(channels_ * size_of(args.type)));
    int64_t first = 0;
    for (int64_t c = 0; c < channels_ || c == 0; c += most) {
      const int64_t count = std::min(most, channels_ - c);
      const int64_t tile = c * taps_ / kTileK, tiles = ceil_div((c + count) * taps_, kTileK) - tile;
      const int64_t steps = round_up(ceil_div(count * taps_, pair), plan.shape.block);
      chunks_.push_back({in_place_ ? 0 : first, steps, tiles * kTileK / pair + (taps_ > 1 ? steps : 0),
                         in_place_ ? taps_ : 0, c * size_of(args.type)});
      pieces_.push_back({c, count, tile, tiles, order(c * taps_ - tile * kTileK, count)});
      first += steps;
    }
    row_bytes_ = (pieces_[0].count * taps_ + pair) * size_of(args.type);
  }

  void run() const {
    auto pack = [&](int64_t first, int rows, uint32_t* out) { in_place_ ? locate(first, rows, out) : gather(first, rows, out); };
    auto natural = [&](size_t chunk, int64_t panel, int panels, uint32_t* out) {
      return DecodeArgs{&book_, weights(chunk, panel), panel_bytes_, pieces_[chunk].tiles, panels, out};
    };
    auto codes = [&](size_t chunk, int64_t panel, int panels, uint32_t* out) {
      return taps_ == 1 ? natural(chunk, panel, panels, out) : DecodeArgs{};  // several taps are regrouped, too
    };
    auto decode = [&](size_t chunk, int64_t panel, int panels, uint32_t* out) {
      if (taps_ == 1) return kernels_.decode(natural(chunk, panel, panels, out));
      // First behind the place where they belong.
      const int columns = panels * kPanelRows;
      const DecodeArgs aside = natural(chunk, panel, panels, out + chunks_[chunk].steps * columns);
      kernels_.decode(aside);
      kernels_.regroup({aside.out, pieces_[chunk].at.data(), chunks_[chunk].steps, columns, out});
    };
    auto reads = [&](size_t chunk, int64_t panel, int panels) {
      const int64_t lines = pieces_[chunk].tiles * tile_bytes(args_.weight.format) / kCacheLine;
      return Ask{weights(chunk, panel), panel_bytes_, lines, 0, lines * panels};
    };
    auto finish = [&](int64_t pixel, int pixels, int64_t panel, int panels, const float* sums) {
      const int64_t column = panel * kPanelRows, row = group_ * rows_ + column, n = args_.weight.n;
      kernels_.finish({sums, int64_t{panels} * kPanelRows, pixels,
                       static_cast<int>(std::min<int64_t>(int64_t{panels} * kPanelRows, rows_ - column)), power_ + row,
                       args_.weight.scale ? args_.weight.scale + row : nullptr, args_.bias ? args_.bias + row : nullptr,
                       args_.type, static_cast<unsigned char*>(args_.out) + (pixel * n + row) * size_of(args_.type), n});
    };
    const int64_t pixels = args_.batch * args_.out_size[0] * args_.out_size[1];
    PanelProduct(plan_, pixels, rows_, chunks_, pack, decode, codes, reads, finish).run();
  }

 private:
  struct Piece {
    int64_t channel, count, tile, tiles;
    std::vector<int32_t> at;  // for RegroupArgs
  };

  // For (tap, channel) in order, and −1 to fill the last block of steps: which k, counted from the first decoded one.
  std::vector<int32_t> order(int64_t offset, int64_t count) const {
    std::vector<int32_t> at;
    if (taps_ == 1) return at;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      for (int64_t c = 0; c < count; ++c) at.push_back(static_cast<int32_t>(offset + c * taps_ + tap));
    }
    at.resize(static_cast<size_t>(round_up(taps_ * count, plan_.shape.pair * plan_.shape.block)), -1);
    return at;
  }

  const uint8_t* weights(size_t chunk, int64_t panel) const {
    return args_.weight.data + (group_ * rows_ / kPanelRows + panel) * panel_bytes_ +
           pieces_[chunk].tile * tile_bytes(args_.weight.format);
  }

  // Where the pixels of each tap are, of some output pixels; in the padding, zeros.
  void locate(int64_t first, int rows, uint32_t* out) const {
    const unsigned char** to = reinterpret_cast<const unsigned char**>(out);
    for (int r = 0; r < rows; ++r) {
      const Corner corner = corner_of(args_, first + r);
      for (int64_t i = 0, tap = 0; i < args_.kernel[0]; ++i) {
        for (int64_t j = 0; j < args_.kernel[1]; ++j, ++tap) {
          const int64_t row = i * args_.dilation[0], column = j * args_.dilation[1];
          const bool there = inside({corner.image, corner.row + row, corner.column + column});
          to[tap * rows + r] = there ? pixel(corner, row, column) : zeros_.data();
        }
      }
    }
  }

  // The patches of some output pixels as rows of the left operand.
  void gather(int64_t first, int rows, uint32_t* out) const {
    constexpr int kMostRows = 32;  // of any Shape's micro-tile
    Corner corner[kMostRows];
    for (int r = 0; r < rows; ++r) corner[r] = corner_of(args_, first + r);
    thread_local std::vector<unsigned char> copies;  // a few KB a thread
    if (copies.size() < static_cast<size_t>(rows * row_bytes_)) copies.resize(static_cast<size_t>(rows * row_bytes_));
    for (size_t c = 0; c < pieces_.size(); ++c) {
      const Piece& piece = pieces_[c];
      const void* row[kMostRows];
      for (int r = 0; r < rows; ++r) {
        row[r] = copies.data() + r * row_bytes_;
        if (taps_ == 1 && inside(corner[r])) {
          row[r] = pixel(corner[r], 0, 0) + piece.channel * size_of(args_.type);
        } else {
          patch(corner[r], piece, copies.data() + r * row_bytes_);
        }
      }
      kernels_.pack({row, rows, rows, piece.count * taps_, chunks_[c].steps, args_.type, out + chunks_[c].first * rows});
    }
  }

  bool inside(const Corner& at) const {
    return at.row >= 0 && at.row < args_.height && at.column >= 0 && at.column < args_.width;
  }

  const unsigned char* pixel(const Corner& at, int64_t row, int64_t column) const {
    const int64_t line = at.image * args_.height + at.row + row;
    return static_cast<const unsigned char*>(args_.x) +
           ((line * args_.width + at.column + column) * args_.channels + group_ * channels_) * size_of(args_.type);
  }

  // A patch's channels of `piece`, tap after tap; zeros in the padding.
  void patch(const Corner& corner, const Piece& piece, unsigned char* to) const {
    const int64_t run = piece.count * size_of(args_.type), kernel = args_.kernel[1], dilation = args_.dilation[1];
    // A line of taps is one piece of memory if its pixels are neighbours and all their channels are wanted.
    const bool whole_line = piece.count == args_.channels && dilation == 1 && corner.column >= 0 &&
                            corner.column + kernel <= args_.width;
    for (int64_t i = 0; i < args_.kernel[0]; ++i) {
      const int64_t row = corner.row + i * args_.dilation[0];
      if (row < 0 || row >= args_.height) {
        std::memset(to, 0, static_cast<size_t>(run * kernel));
        to += run * kernel;
      } else if (whole_line) {
        std::memcpy(to, pixel(corner, i * args_.dilation[0], 0), static_cast<size_t>(run * kernel));
        to += run * kernel;
      } else {
        for (int64_t j = 0; j < kernel; ++j, to += run) {
          const int64_t column = corner.column + j * dilation;
          if (column < 0 || column >= args_.width) {
            std::memset(to, 0, static_cast<size_t>(run));
          } else {
            const unsigned char* from = pixel(corner, i * args_.dilation[0], j * dilation);
            std::memcpy(to, from + piece.channel * size_of(args_.type), static_cast<size_t>(run));
          }
        }
      }
    }
  }

  const Conv2dArgs& args_;
  const Plan& plan_;
  const Kernels& kernels_;
  const float* power_;
  const Codebook& book_;
  const int64_t group_, taps_, channels_, rows_, panel_bytes_;
  std::vector<Chunk> chunks_;
  std::vector<Piece> pieces_;
  int64_t row_bytes_ = 0;  // of a patch's largest piece
  bool in_place_ = false;  // rows are multiplied where they are, not packed
  std::vector<unsigned char> zeros_;  // a pixel of padding
};

// --- any groups: lane by lane -----------------------------------------------------------------------------------------
//
// Sixteen output channels of a panel read sixteen channels of x that their groups name: a copy of a few image rows, padded
// and in float32, holds for each pixel and each channel of a group those sixteen side by side. Then every term of the sum
// is one multiplication of registers. Padding is zeros in that copy, as in the reference.
inline float widened(float x) { return x; }
inline float widened(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// A line of `width` pixels: to[pixel][i][lane] = from[pixel][channel[lane] + i].
template <class T>
void spread(const T* from, int64_t width, int64_t channels, const int64_t* channel, int lanes, int64_t group_channels,
            float* to) {
  const bool neighbours = lanes == kPanelRows && group_channels == 1 && channel[lanes - 1] == channel[0] + lanes - 1;
  for (int64_t pixel = 0; pixel < width; ++pixel, from += channels) {
    if (neighbours) {  // depthwise
      for (int lane = 0; lane < kPanelRows; ++lane) to[lane] = widened(from[channel[0] + lane]);
      to += kPanelRows;
      continue;
    }
    for (int64_t i = 0; i < group_channels; ++i, to += kPanelRows) {
      for (int lane = 0; lane < lanes; ++lane) to[lane] = widened(from[channel[lane] + i]);
    }
  }
}

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

  struct Scratch {
    Buffer<float> copy, sums;
  };
  auto make = [&] {
    const int64_t most = (std::min(lines, args.out_size[0]) - 1) * args.stride[0] + reach;
    return Scratch{Buffer<float>(most * line_floats), Buffer<float>(args.out_size[1] * kPanelRows)};
  };
  parallel_tasks(args.batch * panels * line_blocks, plan.threads, make, [&](int64_t task, const Scratch& own) {
    const auto& [copy, sums] = own;
    const int64_t block = task % line_blocks, panel = task / line_blocks % panels, image = task / line_blocks / panels;
    const int64_t first = block * lines, count = std::min(lines, args.out_size[0] - first);
    const int64_t top = first * args.stride[0] - args.padding[0], copied = (count - 1) * args.stride[0] + reach;
    const int64_t n = panel * kPanelRows;
    const int valid = static_cast<int>(std::min<int64_t>(kPanelRows, args.weight.n - n));
    std::memset(copy.get(), 0, static_cast<size_t>(copied * line_floats) * sizeof(float));
    int64_t channel[kPanelRows];  // that each lane reads first
    for (int lane = 0; lane < valid; ++lane) channel[lane] = (n + lane) / group_rows * group_channels;
    for (int64_t row = std::max<int64_t>(top, 0); row < std::min(top + copied, args.height); ++row) {
      float* to = copy.get() + (row - top) * line_floats + args.padding[1] * pixel_floats;
      const int64_t from = (image * args.height + row) * args.width * args.channels;
      if (args.type == DType::float32) {
        spread<float>(static_cast<const float*>(args.x) + from, args.width, args.channels, channel, valid, group_channels, to);
      } else {
        spread<uint16_t>(static_cast<const uint16_t*>(args.x) + from, args.width, args.channels, channel, valid,
                         group_channels, to);
      }
    }
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
                            whole_panels ? args.type : DType::float32, current_isa(), thread_count()});
  if (chosen.kernel == Kernel::none) return;
  const Codebook book = codebook(args.weight.format);
  const Buffer<float> power = powers(args.weight);
  if (!whole_panels) return conv2d_lanes(args, chosen, power.get(), book);
  for (int64_t group = 0; group < args.groups; ++group) Gathered(args, chosen, power.get(), book, group).run();
}

}  // namespace inq::cpu
