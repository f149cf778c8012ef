#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace inq::cpu {
namespace {

// Multiplications that are worth waking another thread for: some 5 µs of work.
constexpr int64_t kThreadWork = 1 << 18;
// Rows of a block: decoding a weight costs about as much as ten rows' use of it, so 256 rows leave a few per cent.
constexpr int64_t kMostRows = 256;
// Partial sums of a task, in floats: half of a 1 MB second-level cache, beside the packed rows.
constexpr int64_t kMostSums = 128 * 1024;
// Decoded weights of a micro-tile's columns, in dwords: 32 KB, two thirds of a 48 KB first-level cache.
constexpr int64_t kMostDecoded = 8 * 1024;

Shape shape_of(Isa isa, DType type) {
  switch (isa) {
    case Isa::portable: return kPortableShape;
    case Isa::avx2: return kAvx2Shape;
    default: return type == DType::bfloat16 ? kAvx512PairShape : kAvx512Shape;
  }
}

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

void split_panels(Plan& p, int64_t m, int64_t n, int64_t k) {
  const int64_t columns = int64_t{kPanelRows} * p.shape.panels, blocks = ceil_div(n, columns);
  p.k_chunk = std::min(kMostDecoded / columns * p.shape.pair / kTileK * kTileK, round_up(std::max<int64_t>(k, 1), kTileK));
  int64_t rows = ceil_div(m, kMostRows), groups = 1;
  p.m_block = round_up(ceil_div(m, rows), p.shape.rows);
  const int64_t most = std::max<int64_t>(kMostSums / p.m_block / columns, 1);  // blocks of columns a task
  groups = ceil_div(blocks, most);
  // Every thread the same number of tasks: first by columns, which packs the rows again, then by rows.
  if (rows * groups < 4 * p.threads && rows * groups % p.threads != 0) {
    int64_t wanted = groups;
    while (rows * wanted % p.threads != 0 && wanted < blocks) ++wanted;
    if (rows * wanted % p.threads == 0) groups = wanted;
  }
  if (rows * groups < p.threads) {
    rows = std::min(ceil_div(int64_t{p.threads}, groups), ceil_div(m, p.shape.rows));
    p.m_block = round_up(ceil_div(m, rows), p.shape.rows);
  }
  p.n_group = ceil_div(blocks, groups) * columns;
}

}  // namespace

Plan plan(const Description& d) {
  Plan p{};
  p.isa = std::min(d.isa, Isa::avx512);
  // The input gradient sums over the weight's rows, and its products are in float32.
  const bool transposed = d.op == Op::linear_dx;
  p.shape = shape_of(p.isa, transposed ? DType::float32 : d.type);
  const int64_t columns = transposed ? d.k : d.n, length = transposed ? d.n : d.k;
  if (d.m == 0 || columns == 0) return p;
  const int64_t work = std::max<int64_t>(length, 1) * columns * d.m;
  p.threads = static_cast<int>(std::clamp<int64_t>(work / kThreadWork, 1, std::max(d.threads, 1)));
  if (d.op == Op::linear && d.m <= p.shape.stream_rows) {
    p.kernel = Kernel::stream;
    p.stream_rows = *std::find_if(std::begin(kStreamRows), std::end(kStreamRows), [&](int r) { return r >= d.m; });
    // A task is what one pass keeps in registers (24 sums), or less where that leaves threads without work.
    const int64_t at_once = std::clamp(24 / p.stream_rows, 1, 8);
    p.group = std::clamp<int64_t>(ceil_div(panels_of(d.n), p.threads), 1, at_once);
    return p;
  }
  p.kernel = Kernel::panels;
  split_panels(p, d.m, columns, length);
  return p;
}

std::string to_string(const Plan& p) {
  if (p.kernel == Kernel::none) return "none";
  std::string text = p.kernel == Kernel::stream ? "stream" : "panels";
  text += std::string(" isa=") + name(p.isa) + (p.shape.pair == 2 ? " products=bfloat16" : " products=float32");
  if (p.kernel == Kernel::stream) {
    text += " rows=" + std::to_string(p.stream_rows) + " group=" + std::to_string(p.group);
  } else {
    text += " tile=" + std::to_string(p.shape.rows) + "x" + std::to_string(p.shape.panels * kPanelRows);
    text += " m_block=" + std::to_string(p.m_block) + " n_group=" + std::to_string(p.n_group);
    text += " k_chunk=" + std::to_string(p.k_chunk);
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
  if (p.isa >= Isa::avx512) return p.shape.pair == 2 ? avx512_pair_kernels() : avx512_kernels();
#endif
  return portable_kernels();
}

}  // namespace inq::cpu
