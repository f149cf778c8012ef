// The products' loops with AVX-512: 16 dword lanes; float32 rows with FMA, bfloat16 rows with vdpbf16ps.

#include "gemm_kernels.h"
#include "pairs_avx512.h"

namespace {

// A micro-tile's 24 sums, 4 columns of weights and one x fill 29 of 32 registers.
struct Avx512 {
  using Vec = __m512;
  using Codes = __m512i;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec broadcast(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p))); }
  static Codes load_codes(const void* p) { return _mm512_loadu_si512(p); }

  // Nearest even in integers: vcvtneps2bf16 would flush subnormals. A NaN stays one (quiet, as torch makes it).
  static void store_bfloat16(void* p, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_set1_epi32(rounded, nan, 0x7FC00000);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }

  // Dwords of a row: one float32 or a pair of bfloat16; both are moved, not converted.
  static void pack(const PackArgs& p) {
    const int64_t words = p.count * size_of(p.type) / 2;
    for (int first = 0; first < p.stride; first += 8) {
      const int rows = static_cast<int>(least(8, p.rows - first));
      const __mmask8 stored = static_cast<__mmask8>((1u << least(8, p.stride - first)) - 1);
      for (int64_t step = 0; step < p.steps; step += 16) {
        const int64_t left = words - step * 2;
        const __mmask32 valid = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
        __m512i r[8];
        for (int i = 0; i < 8; ++i) {
          r[i] = i < rows && left > 0
                     ? _mm512_maskz_loadu_epi16(valid, static_cast<const unsigned char*>(p.row[first + i]) + step * 4)
                     : _mm512_setzero_si512();
        }
        transpose_store(r, p.out + step * p.stride + first, p.stride, static_cast<int>(least(16, p.steps - step)),
                        stored);
      }
    }
  }

  // out[step · stride + i] = lane `step` of r[i], for the rows of the mask and `steps` steps.
  static void transpose_store(const __m512i (&r)[8], uint32_t* out, int64_t stride, int steps, __mmask8 rows) {
    __m512i half[2][4];  // [rows 0…3 or 4…7][k modulo 4]: 128-bit lane L holds k = 4L + that
    for (int h = 0; h < 2; ++h) {
      const __m512i* q = r + 4 * h;
      const __m512i a = _mm512_unpacklo_epi32(q[0], q[1]), b = _mm512_unpackhi_epi32(q[0], q[1]);
      const __m512i c = _mm512_unpacklo_epi32(q[2], q[3]), d = _mm512_unpackhi_epi32(q[2], q[3]);
      half[h][0] = _mm512_unpacklo_epi64(a, c);
      half[h][1] = _mm512_unpackhi_epi64(a, c);
      half[h][2] = _mm512_unpacklo_epi64(b, d);
      half[h][3] = _mm512_unpackhi_epi64(b, d);
    }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    auto put = [&](int step, __m256i v) {
      if (step < steps) _mm256_mask_storeu_epi32(out + step * stride, rows, v);
    };
    for (int i = 0; i < 4; ++i) {
      const __m512i ab = _mm512_permutex2var_epi64(half[0][i], low, half[1][i]);
      const __m512i cd = _mm512_permutex2var_epi64(half[0][i], high, half[1][i]);
      put(i, _mm512_castsi512_si256(ab));
      put(4 + i, _mm512_extracti64x4_epi64(ab, 1));
      put(8 + i, _mm512_castsi512_si256(cd));
      put(12 + i, _mm512_extracti64x4_epi64(cd, 1));
    }
  }

  static void transpose(Vec (&r)[16]) {
    __m512 quads[4][4];  // [rows 4g … 4g + 3][column modulo 4]: 128-bit lane L holds column 4L + that
    for (int g = 0; g < 4; ++g) {
      const __m512* q = r + 4 * g;
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(q[0], q[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(q[0], q[1]));
      const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(q[2], q[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(q[2], q[3]));
      quads[g][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      quads[g][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      quads[g][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      quads[g][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512 ab = _mm512_shuffle_f32x4(quads[0][i], quads[1][i], 0x44), cd = _mm512_shuffle_f32x4(quads[2][i], quads[3][i], 0x44);
      const __m512 AB = _mm512_shuffle_f32x4(quads[0][i], quads[1][i], 0xEE), CD = _mm512_shuffle_f32x4(quads[2][i], quads[3][i], 0xEE);
      r[i] = _mm512_shuffle_f32x4(ab, cd, 0x88);
      r[4 + i] = _mm512_shuffle_f32x4(ab, cd, 0xDD);
      r[8 + i] = _mm512_shuffle_f32x4(AB, CD, 0x88);
      r[12 + i] = _mm512_shuffle_f32x4(AB, CD, 0xDD);
    }
  }
};

struct Float : Avx512 {
  static constexpr Shape kShape = kAvx512Shape;
  static constexpr int kSteps = 8;
  using Table = __m512;

  static Table table(const Codebook& book) { return _mm512_load_ps(book.value); }
  static Vec multiply_add(Vec sum, Vec x, Vec w) { return _mm512_fmadd_ps(x, w, sum); }

  // vpermps looks at four bits of a lane: no mask is needed.
  template <bool kSigns>
  static Vec decode(Codes codes, int step, Codes signs, int unit, Table table) {
    const int pair = step / 2, odd = step % 2;
    const Vec w = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * pair + 16 * odd), table);
    if constexpr (!kSigns) return w;
    const Codes moved = _mm512_slli_epi32(signs, 4 * unit + pair + (odd ? 0 : 16));
    return _mm512_castsi512_ps(flip(_mm512_castps_si512(w), moved, INT32_MIN));
  }
};

struct Pairs : Avx512 {
  static constexpr Shape kShape = kAvx512PairShape;
  static constexpr int kSteps = 4;
  using Table = __m512i;

  static Table table(const Codebook& book) { return pair_table(book); }
  static Vec multiply_add(Vec sum, Vec x, Vec w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }

  template <bool kSigns>
  static Vec decode(Codes codes, int step, Codes signs, int unit, Table table) {
    return _mm512_castsi512_ps(decode_pair<kSigns>(codes, step, signs, unit, table));
  }
};

}  // namespace

namespace inq::cpu {

const Kernels& avx512_kernels() {
  static constexpr Kernels table = kernels<Float>();
  return table;
}

const Kernels& avx512_pair_kernels() {
  static constexpr Kernels table = kernels<Pairs>();
  return table;
}

}  // namespace inq::cpu
