// The products' loops with AVX2 and FMA: 8 float32 lanes; bfloat16 rows are widened when they are packed.
#include <immintrin.h>

#include "gemm_kernels.h"

namespace {

// A micro-tile's 12 sums, 2 columns of weights and one x fill 15 of 16 registers.
struct Avx2 {
  static constexpr Shape kShape = kAvx2Shape;
  static constexpr int kSteps = 8;
  using Vec = __m256;
  using Codes = __m256i;
  struct Table {
    __m256 low, high;  // entries 0…7 and 8…15
  };

  static Table table(const Codebook& book) { return {_mm256_load_ps(book.value), _mm256_load_ps(book.value + 8)}; }
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static void store(void* p, Vec v) { _mm256_storeu_ps(static_cast<float*>(p), v); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec broadcast(const uint32_t* p) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*p))); }
  static Vec multiply_add(Vec sum, Vec x, Vec w) { return _mm256_fmadd_ps(x, w, sum); }
  static Codes load_codes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  static void store_bfloat16(void* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(words));
  }

  // vpermps looks at three bits of a lane. Up to 4 bits the nibble's top bit is the sign, so one look-up of the field
  // is enough; at 5 bits it is the field's top bit, and selects between two look-ups.
  template <bool kSigns>
  static Vec decode(Codes codes, int step, Codes signs, int unit, Table table) {
    const int pair = step / 2, odd = step % 2, shift = 4 * pair + 16 * odd;
    const __m256 top_bit = _mm256_set1_ps(-0.0f);
    const __m256i index = _mm256_srli_epi32(codes, shift);
    const __m256 nibble_top = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - shift));
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    if constexpr (!kSigns) return _mm256_xor_ps(low, _mm256_and_ps(nibble_top, top_bit));
    const __m256 size = _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(table.high, index), nibble_top);
    const __m256i sign = _mm256_slli_epi32(signs, 4 * unit + pair + (odd ? 0 : 16));
    return _mm256_xor_ps(size, _mm256_and_ps(_mm256_castsi256_ps(sign), top_bit));
  }

  // Eight float32 of a row from element `at`; what lies beyond `count` is 0.
  static __m256 load_row(const void* row, int64_t at, int64_t count, DType type) {
    const int64_t left = count - at;
    if (left <= 0) return _mm256_setzero_ps();
    alignas(32) unsigned char rest[32] = {};
    const unsigned char* from = static_cast<const unsigned char*>(row) + at * size_of(type);
    if (left < 8) {
      std::memcpy(rest, from, static_cast<size_t>(left) * size_of(type));
      from = rest;
    }
    if (type == DType::float32) return load(from);
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }

  static void pack(const PackArgs& p) {
    for (int first = 0; first < p.stride; first += 8) {
      const int rows = static_cast<int>(least(8, p.rows - first));
      const __m256i stored =
          _mm256_cmpgt_epi32(_mm256_set1_epi32(p.stride - first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      for (int64_t step = 0; step < p.steps; step += 8) {
        __m256 r[8];
        for (int i = 0; i < 8; ++i) {
          r[i] = i < rows ? load_row(p.row[first + i], step, p.count, p.type) : _mm256_setzero_ps();
        }
        transpose(r);
        for (int i = 0; i < 8 && step + i < p.steps; ++i) {
          _mm256_maskstore_epi32(reinterpret_cast<int*>(p.out + (step + i) * p.stride + first), stored,
                                 _mm256_castps_si256(r[i]));
        }
      }
    }
  }

  static void transpose(__m256 (&r)[8]) {
    __m256 pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
      quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }
};

}  // namespace

namespace inq::cpu {

const Kernels& avx2_kernels() {
  static constexpr Kernels table = kernels<Avx2>();
  return table;
}

}  // namespace inq::cpu
