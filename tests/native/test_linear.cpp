// The products without torch, for the sanitizers: every instruction set of the machine, 1 to 4 threads, ragged shapes,
// against sums in double of small integers, which float32 must give exactly. Arrays have exactly the promised sizes, so
// that one element too many is found. `main` returns the number of failures.
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/amx.h"
#include "cpu/conv2d.h"
#include "cpu/linear.h"
#include "cpu/prepack.h"
#include "threads.h"

using namespace inq;
using namespace inq::cpu;

namespace {

std::mt19937 random_bits(1);

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint32_t>(n)); }

struct Matrix {
  Format format;
  int64_t n, k;
  std::vector<uint8_t> storage, packed;
  std::vector<double> value;  // relative to 2^n1
  std::vector<int8_t> exponent;
  std::vector<float> scale, bias;

  Matrix(Format f, int64_t rows, int64_t columns) : format(f), n(rows), k(columns) {
    storage.assign(static_cast<size_t>(n * row_bytes(f, k)), 0);
    value.assign(static_cast<size_t>(n * k), 0.0);
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t i = 0; i < k; ++i) {
        const int64_t index = below(magnitudes(f) + 1) - 1;
        if (index < 0) continue;
        const bool negative = below(2) != 0;
        const uint32_t code = static_cast<uint32_t>(field_of(f, static_cast<int>(index)) | (negative ? 1 << (f.bits - 1) : 0));
        value[row * k + i] = std::ldexp(negative ? -1.0 : 1.0, static_cast<int>(index) + 1 - magnitudes(f));
        for (int b = 0; b < f.bits; ++b) {
          const int64_t bit = i * f.bits + b;
          storage[row * row_bytes(f, k) + bit / 8] |= static_cast<uint8_t>((code >> b & 1) << bit % 8);
        }
      }
      exponent.push_back(static_cast<int8_t>(below(9) - 4));
      scale.push_back(static_cast<float>(std::ldexp(1.0, static_cast<int>(below(5)) - 2)));
      bias.push_back(static_cast<float>(below(17) - 8));
    }
    packed.resize(static_cast<size_t>(panels_of(n) * tiles_of(k) * tile_bytes(f)));
    prepack(storage.data(), packed.data(), n, k, f);
  }

  Weight weight() const { return {packed.data(), exponent.data(), scale.data(), format, n, k}; }
  double factor(int64_t row) const { return std::ldexp(1.0, exponent[row]) * scale[row]; }
};

// Small integers: in float32 and, as its upper half, in bfloat16.
struct Rows {
  DType type;
  std::vector<unsigned char> bytes;
  std::vector<double> value;

  Rows(DType t, int64_t count, int64_t most) : type(t), bytes(static_cast<size_t>(count * size_of(t))) {
    for (int64_t i = 0; i < count; ++i) {
      value.push_back(static_cast<double>(below(2 * most + 1) - most));
      const float x = static_cast<float>(value.back());
      std::memcpy(&bytes[i * size_of(t)], reinterpret_cast<const unsigned char*>(&x) + 4 - size_of(t), size_of(t));
    }
  }
};

double read(const std::vector<unsigned char>& bytes, DType type, int64_t i) {
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<unsigned char*>(&bits) + 4 - size_of(type), &bytes[i * size_of(type)], size_of(type));
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

bool near(double got, double want, DType type) {
  return type == DType::float32 ? got == static_cast<float>(want) : std::fabs(got - want) <= std::fabs(want) / 256;
}

void check_prepack(const Matrix& w) {
  std::vector<uint8_t> back(w.storage.size());
  unprepack(w.packed.data(), back.data(), w.n, w.k, w.format);
  CHECK(back == w.storage, "bits %d, %ld x %ld", w.format.bits, static_cast<long>(w.n), static_cast<long>(w.k));
}

void check_linear(const Matrix& w, int64_t m, DType type) {
  const Rows x(type, m * w.k, 2);
  std::vector<unsigned char> out(static_cast<size_t>(m * w.n * size_of(type)), 0xFF);
  linear({x.bytes.data(), m, type, w.weight(), w.bias.data(), out.data()});
  int wrong = 0;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t n = 0; n < w.n; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < w.k; ++k) sum += x.value[row * w.k + k] * w.value[n * w.k + k];
      wrong += !near(read(out, type, row * w.n + n), sum * w.factor(n) + w.bias[n], type);
    }
  }
  CHECK(wrong == 0, "linear %s: %d of %ld x %ld x %ld, bits %d", name(current_isa()), wrong, static_cast<long>(m),
        static_cast<long>(w.n), static_cast<long>(w.k), w.format.bits);
}

void check_linear_dx(const Matrix& w, int64_t m, DType type) {
  const Rows grad(type, m * w.n, 2);
  std::vector<unsigned char> out(static_cast<size_t>(m * w.k * size_of(type)), 0xFF);
  linear_dx({grad.bytes.data(), m, type, w.weight(), out.data()});
  int wrong = 0;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t k = 0; k < w.k; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < w.n; ++n) sum += grad.value[row * w.n + n] * w.factor(n) * w.value[n * w.k + k];
      wrong += !near(read(out, type, row * w.k + k), sum, type);
    }
  }
  CHECK(wrong == 0, "linear_dx %s: %d of %ld x %ld x %ld", name(current_isa()), wrong, static_cast<long>(m),
        static_cast<long>(w.n), static_cast<long>(w.k));
}

void check_conv2d(Format format, int64_t channels, int64_t n, int64_t groups, int64_t kernel, int64_t stride, DType type) {
  const Matrix w(format, n, channels / groups * kernel * kernel);
  const int64_t batch = 2, height = 7, width = 6, padding = 1;
  const int64_t h = (height + 2 * padding - kernel) / stride + 1, v = (width + 2 * padding - kernel) / stride + 1;
  const Rows x(type, batch * height * width * channels, 2);
  std::vector<unsigned char> out(static_cast<size_t>(batch * h * v * n * size_of(type)), 0xFF);
  conv2d({x.bytes.data(), batch, height, width, channels, type, w.weight(), w.bias.data(), {kernel, kernel},
          {stride, stride}, {padding, padding}, {1, 1}, groups, out.data(), {h, v}});
  int wrong = 0;
  for (int64_t i = 0; i < batch * h * v * n; ++i) {
    const int64_t row = i % n, column = i / n % v, line = i / n / v % h, image = i / n / v / h;
    double sum = 0;
    for (int64_t k = 0; k < w.k; ++k) {
      const int64_t c = k / kernel / kernel, y = line * stride - padding + k / kernel % kernel;
      const int64_t z = column * stride - padding + k % kernel;
      if (y < 0 || y >= height || z < 0 || z >= width) continue;
      const int64_t channel = row / (n / groups) * (channels / groups) + c;
      sum += x.value[((image * height + y) * width + z) * channels + channel] * w.value[row * w.k + k];
    }
    wrong += !near(read(out, type, i), sum * w.factor(row) + w.bias[row], type);
  }
  CHECK(wrong == 0, "conv2d %s: %d wrong, %ld to %ld channels, %ld groups, kernel %ld", name(current_isa()), wrong,
        static_cast<long>(channels), static_cast<long>(n), static_cast<long>(groups), static_cast<long>(kernel));
}

// The same bits from rows where they lie as from packed ones, in parts, chunks and runs that do not end together.
void check_runs(const Kernels& kernels, Shape shape, DType type) {
  constexpr int64_t kTaps = 5, kRun = 47, kSteps = kTaps * kRun;
  std::vector<uint32_t> x(static_cast<size_t>(2 + shape.rows * kSteps));
  for (uint32_t& v : x) v = (random_bits() & 0x81FF'81FF) | 0x3E00'3E00;  // around 1, in either dtype
  std::vector<uint32_t> b(static_cast<size_t>(kSteps * shape.panels * kPanelRows));
  for (uint32_t& v : b) v = (random_bits() & 0x81FF'81FF) | 0x3E00'3E00;
  for (int rows = 1; rows <= shape.rows; ++rows) {
    for (int panels = 1; panels <= shape.panels; ++panels) {
      const void* row[32];
      const unsigned char* at[kTaps * 32];
      for (int r = 0; r < rows; ++r) {
        row[r] = &x[2 + r * kSteps];
        // Eight bytes before, for the offset.
        for (int64_t t = 0; t < kTaps; ++t) {
          at[t * rows + r] = reinterpret_cast<const unsigned char*>(&x[r * kSteps + t * kRun]);
        }
      }
      std::vector<uint32_t> packed(static_cast<size_t>(rows * kSteps));
      kernels.pack({row, rows, rows, kSteps * shape.pair, kSteps, type, packed.data()});
      std::vector<float> c[2] = {std::vector<float>(static_cast<size_t>(rows * panels * kPanelRows), 0.5f), {}};
      c[1] = c[0];
      for (const bool accumulate : {false, true}) {
        MultiplyArgs m{packed.data(), b.data(), kSteps, c[0].data(), rows, panels, accumulate, packed.data(), {}};
        kernels.multiply(m);
        m.a = reinterpret_cast<const uint32_t*>(at);
        m.c = c[1].data();
        m.taps = kTaps;
        m.offset = 8;
        kernels.multiply(m);
        CHECK(std::memcmp(c[0].data(), c[1].data(), c[0].size() * sizeof(float)) == 0, "%d rows, %d panels, pair %d", rows,
              panels, shape.pair);
      }
    }
  }
}

void check_all() {
  int turn = 0;
  for (const int bits : {2, 3, 4, 5}) {
    for (const bool dense : {false, true}) {
      const Format format{bits, dense};
      for (const auto& [n, k] : std::initializer_list<std::pair<int64_t, int64_t>>{{1, 1}, {17, 33}, {70, 31}, {33, 800}}) {
        const Matrix w(format, n, k);
        check_prepack(w);
        for (const int64_t m : {1, 3, 5, 26, 70}) check_linear(w, m, ++turn % 2 ? DType::float32 : DType::bfloat16);
        // 15 octaves and 8 more of the factors do not fit 24 bits of a sum over rows.
        if (magnitudes(format) < 8) check_linear_dx(w, 9, ++turn % 2 ? DType::float32 : DType::bfloat16);
      }
    }
  }
  for (const DType type : {DType::float32, DType::bfloat16}) {
    check_conv2d({4, false}, 21, 18, 1, 3, 1, type);
    check_conv2d({5, false}, 40, 33, 1, 1, 2, type);
    check_conv2d({4, true}, 6, 32, 2, 3, 2, type);
    check_conv2d({3, false}, 18, 18, 18, 3, 1, type);
    check_conv2d({4, false}, 10, 15, 5, 2, 1, type);
  }
}

}  // namespace

int main() {
  check_runs(portable_kernels(), kPortableShape, DType::float32);
#if defined(__x86_64__)
  if (detected_isa() >= Isa::avx2) check_runs(avx2_kernels(), kAvx2Shape, DType::float32);
  if (detected_isa() >= Isa::avx512) {
    check_runs(avx512_kernels(), kAvx512Shape, DType::float32);
    check_runs(avx512_pair_kernels(), kAvx512PairShape, DType::bfloat16);
  }
#endif
  const bool emulate = detected_isa() == Isa::avx512;
  for (int isa = 0; isa <= static_cast<int>(detected_isa()) + emulate; ++isa) {
    if (isa > static_cast<int>(detected_isa())) emulate_amx(true);
    set_isa(static_cast<Isa>(isa));
    for (int threads = 1; threads <= 4; ++threads) {
      set_thread_count(threads);
      check_all();
    }
  }
  return inq::test::failures();
}
