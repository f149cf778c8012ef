// The products' loops in plain C++ for any machine: registers of four float32 by the compiler's vector extension.
#include "gemm_kernels.h"

namespace {

struct Portable {
  // A micro-tile's 8 sums, 4 columns of weights and one x fit the 16 registers of SSE2 and the 32 of NEON.
  static constexpr Shape kShape = kPortableShape;
  static constexpr int kLanes = 4, kSteps = 8;
  typedef float Vec __attribute__((vector_size(16)));
  typedef uint32_t Codes __attribute__((vector_size(16)));
  using Table = const float*;

  static Table table(const Codebook& book) { return book.value; }
  static Vec zero() { return Vec{}; }
  static Vec load(const void* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(void* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec broadcast(const uint32_t* p) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return Vec{x, x, x, x};
  }
  static Vec multiply_add(Vec sum, Vec x, Vec w) { return sum + x * w; }
  static Codes load_codes(const void* p) {
    Codes c;
    std::memcpy(&c, p, sizeof c);
    return c;
  }

  static void store_bfloat16(void* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) {
      const float x = v[i];
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      const uint32_t rounded = x != x ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
      const uint16_t word = static_cast<uint16_t>(rounded);
      std::memcpy(static_cast<unsigned char*>(p) + 2 * i, &word, sizeof word);
    }
  }

  template <bool kSigns>
  static Vec decode(Codes codes, int step, Codes signs, int unit, Table table) {
    const int pair = step / 2, odd = step % 2;
    const Codes index = codes >> (4 * pair + 16 * odd) & 15;
    const Vec w{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
    if constexpr (!kSigns) return w;
    const Codes sign = signs << (4 * unit + pair + (odd ? 0 : 16)) & 0x80000000u;
    Codes bits;
    std::memcpy(&bits, &w, sizeof bits);
    bits ^= sign;
    Vec flipped;
    std::memcpy(&flipped, &bits, sizeof flipped);
    return flipped;
  }

  static void transpose(Vec (&r)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float other = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = other;
      }
    }
  }

  static void pack(const PackArgs& p) {
    for (int r = 0; r < p.stride; ++r) {
      const unsigned char* from = r < p.rows ? static_cast<const unsigned char*>(p.row[r]) : nullptr;
      const int64_t count = from ? p.count : 0;
      for (int64_t step = 0; step < p.steps; ++step) {
        uint32_t bits = 0;
        if (step < count && p.type == DType::float32) {
          std::memcpy(&bits, from + step * 4, 4);
        } else if (step < count) {
          uint16_t word;
          std::memcpy(&word, from + step * 2, 2);
          bits = uint32_t{word} << 16;
        }
        p.out[step * p.stride + r] = bits;
      }
    }
  }
};

}  // namespace

namespace inq::cpu {

const Kernels& portable_kernels() {
  static constexpr Kernels table = kernels<Portable>();
  return table;
}

}  // namespace inq::cpu
