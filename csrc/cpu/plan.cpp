#include "plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "amx.h"

namespace inq::cpu {
namespace {

// Multiplications that are worth waking another thread for: some 5 µs of work.
constexpr int64_t kThreadWork = 1 << 18;
// Decoding a weight costs about as much as this many rows' use of it.
constexpr int64_t kRowsToDecode = 5;
// Rows of a block: decoding is 2 % of 256 rows' time, 1 % of 512's.
// Packed rows of a block, in bytes: they are read again for every 64 columns, from the third-level cache, which other
// processes share. All threads on one block of rows need less of it than each on its own, and it may be larger then.
constexpr int64_t kMostRows = 256, kMostPacked = 5 << 20;
constexpr int64_t kMostRowsShared = 512, kMostPackedShared = 15 << 20;
// Blocks of columns a thread that make its waiting for the others at the end of a block of rows small.
constexpr int64_t kColumnsToShare = 16;
// On AMX a product is so fast that rows and sums must come from the second-level cache (2 MB, of which pages that share
// its sets leave about half): those of some chunks, for some blocks of columns, are used before the next. 12 tiles of k
// of 32 decoded columns are 24 KB of the first-level cache, half of it: what is multiplied by them passes through the rest.
constexpr int64_t kMostPackedAmx = 8 << 20, kMostRowsCachedAmx = 192 << 10, kMostSumsAmx = 512 << 10;
// Panels of a task of a tall stream: their sums, 4 KB each, come from the second-level cache.
constexpr int64_t kMostTallPanels = 128;
// For fewer rows decoding takes longer than multiplying.
constexpr int64_t kLeastRowsAmx = 64;
constexpr int64_t kChunkAmx = 12 * kTileK;
// Tasks a thread when threads share out columns.
constexpr int64_t kTasksAmx = 4, kTasks = 8;

Shape shape_of(Isa isa, DType type) {
  switch (isa) {
    case Isa::portable: return kPortableShape;
    case Isa::avx2: return kAvx2Shape;
    case Isa::amx: return kAmxShape;
    default: return type == DType::bfloat16 ? kAvx512PairShape : kAvx512Shape;
  }
}

void split_panels(Plan& p, int64_t m, int64_t n, int64_t k) {
  const int64_t columns = int64_t{kPanelRows} * p.shape.panels, n_blocks = ceil_div(n, columns);
  const bool tiles = p.isa == Isa::amx;
  p.k_chunk = tiles ? kChunkAmx : int64_t{kChunkSteps} * p.shape.pair;
  const int64_t row_bytes = ceil_div(std::max<int64_t>(k, 1), p.shape.pair) * 4;
  const bool shared = !tiles && n_blocks >= kColumnsToShare * p.threads;
  const int64_t most_packed = tiles ? kMostPackedAmx : shared ? kMostPackedShared : kMostPacked;
  const int64_t most = std::clamp(most_packed / row_bytes / p.shape.rows, tiles ? kLeastRowsAmx / p.shape.rows : 1,
                                  (shared ? kMostRowsShared : kMostRows) / p.shape.rows);
  auto rows_in = [&](int64_t blocks) { return round_up(ceil_div(m, blocks), p.shape.rows); };
  int64_t blocks = ceil_div(m, most * p.shape.rows);
  if (shared) {
    p.m_block = rows_in(blocks);
    return;
  }
  // By rows where their blocks keep every thread busy: each thread reads all weights for rows of its own, and none waits
  // for another between blocks.
  p.by_rows = blocks >= 2 * p.threads || (blocks >= p.threads && blocks % p.threads == 0);
  if (!p.by_rows && n_blocks < 4 * p.threads) {
    // Few columns to share out, which may leave threads idle at the end: more and smaller blocks of rows instead, if that
    // is faster although each block decodes all weights. In rows of products that the busiest thread has to wait for:
    const int64_t finest = std::min(round_up(blocks, p.threads), ceil_div(m, p.shape.rows));
    const int64_t decoding = tiles ? kLeastRowsAmx : kRowsToDecode;
    const int64_t by_columns = ceil_div(n_blocks, p.threads) * (m + decoding);  // n_blocks times as many
    const int64_t by_rows = ceil_div(finest, p.threads) * (ceil_div(m, finest) + decoding) * n_blocks;
    if (by_rows < by_columns) {
      blocks = finest;
      p.by_rows = true;
    }
  }
  // As many for each thread, where a thread has few.
  if (p.by_rows && blocks < 16 * p.threads) blocks = round_up(blocks, p.threads);
  p.m_block = rows_in(blocks);
}

// What is used before the next: all of K for one block of columns, but on AMX what stays in the second-level cache.
void split_cached(Plan& p, int64_t m, int64_t n) {
  const int64_t rows = std::min(p.m_block, m), columns = int64_t{kPanelRows} * p.shape.panels;
  const int64_t n_blocks = ceil_div(n, columns), tasks = p.isa == Isa::amx ? kTasksAmx : kTasks;
  p.n_share = p.by_rows ? n_blocks : std::max<int64_t>(n_blocks / (p.threads * tasks), 1);
  p.n_group = 1;
  p.k_chunks = std::numeric_limits<int64_t>::max();
  if (p.isa != Isa::amx) return;
  p.k_chunks = std::max<int64_t>(kMostRowsCachedAmx / (rows * p.k_chunk * 2), 1);
  p.n_group = std::clamp<int64_t>(kMostSumsAmx / (rows * columns * 4), 1, p.n_share);
  if (!p.by_rows) p.n_share = p.n_group;
}

}  // namespace

Plan plan(const Description& d) {
  Plan p{};
  // The input gradient sums over the weight's rows, and its products are in float32: not for tiles.
  const bool transposed = d.op == Op::linear_dx;
  const DType products = transposed ? DType::float32 : d.type;
  p.isa = products == DType::bfloat16 ? d.isa : std::min(d.isa, Isa::avx512);
  p.shape = shape_of(p.isa, products);
  const int64_t columns = transposed ? d.k : d.n, length = transposed ? d.n : d.k;
  if (d.m == 0 || columns == 0) return p;
  const int64_t work = std::max<int64_t>(length, 1) * columns * d.m;
  p.threads = static_cast<int>(std::clamp<int64_t>(work / kThreadWork, 1, std::max(d.threads, 1)));
  if (d.op == Op::linear && d.m <= p.shape.stream_rows) {
    p.kernel = Kernel::stream;
    // Tiles are configured with any number of rows.
    p.stream_rows = p.isa == Isa::amx ? static_cast<int>(d.m)
                                      : *std::find_if(std::begin(kStreamRows), std::end(kStreamRows),
                                                      [&](int r) { return r >= d.m; });
    // A task is one pass, or less where that leaves threads without work.
    const int64_t at_once = stream_panels(p.shape, p.stream_rows);
    p.group = std::clamp<int64_t>(ceil_div(panels_of(d.n), p.threads), 1, at_once);
    if (p.isa == Isa::amx && d.m >= kTallRows) {
      p.k_chunk = kTallTiles * kTileK;
      const int64_t rounds = ceil_div(panels_of(d.n), p.threads * kMostTallPanels);
      p.group = ceil_div(panels_of(d.n), p.threads * rounds);
    }
    return p;
  }
  p.kernel = Kernel::panels;
  split_panels(p, d.m, columns, length);
  split_cached(p, d.m, columns);
  return p;
}

std::string to_string(const Plan& p) {
  if (p.kernel == Kernel::none) return "none";
  std::string text = p.kernel == Kernel::stream ? "stream" : "panels";
  text += std::string(" isa=") + name(p.isa) + (p.shape.pair == 2 ? " products=bfloat16" : " products=float32");
  if (p.kernel == Kernel::stream) {
    text += " rows=" + std::to_string(p.stream_rows) + " group=" + std::to_string(p.group);
    if (p.k_chunk > 0) text += " k_chunk=" + std::to_string(p.k_chunk);
  } else {
    text += " tile=" + std::to_string(p.shape.rows) + "x" + std::to_string(p.shape.panels * kPanelRows);
    text += " m_block=" + std::to_string(p.m_block) + " k_chunk=" + std::to_string(p.k_chunk);
    if (p.isa == Isa::amx) {
      text += " cached=" + std::to_string(p.n_group * p.shape.panels * kPanelRows) + "x" + std::to_string(p.k_chunks * p.k_chunk);
    }
    text += p.by_rows ? " by=rows" : " by=columns";
  }
  return text + " threads=" + std::to_string(p.threads);
}

Op op_from_name(const std::string& text) {
  if (text == "linear") return Op::linear;
  if (text == "linear_dx") return Op::linear_dx;
  if (text == "conv2d") return Op::conv2d;
  throw std::invalid_argument("plan: op: expected linear, linear_dx or conv2d, got \"" + text + "\"");
}

DType dtype_from_name(const std::string& text) {
  if (text == "float32") return DType::float32;
  if (text == "bfloat16") return DType::bfloat16;
  throw std::invalid_argument("plan: dtype: expected float32 or bfloat16, got \"" + text + "\"");
}

const Kernels& kernels_of(const Plan& p) {
#if defined(__x86_64__)
  if (p.isa == Isa::avx2) return avx2_kernels();
  if (p.isa == Isa::amx) return amx_kernels();
  if (p.isa == Isa::avx512) return p.shape.pair == 2 ? avx512_pair_kernels() : avx512_kernels();
#endif
  return portable_kernels();
}

}  // namespace inq::cpu
