// Codes to pairs (k, k + 1) of bfloat16 in AVX-512 registers, and signs to weights. Included only by files that are compiled for it, each with
// a copy of its own (gemm_kernels.h says why).
#pragma once

// gcc 12 calls the placeholder operands inside its own intrinsics uninitialized.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "layout.h"

namespace {

// The 16 values as bfloat16 (exact: powers of two), twice: the fifth bit of vpermw's index is a neighbour's.
inline __m512i pair_table(const inq::cpu::Codebook& book) {
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_load_si512(book.value), 16));
  return _mm512_broadcast_i64x4(half);
}

// w with the sign bits of `signs` that the mask selects flipped: one vpternlogd, a ^ (b & c).
inline __attribute__((always_inline)) __m512i flip(__m512i w, __m512i signs, int mask) {
  return _mm512_ternarylogic_epi32(w, signs, _mm512_set1_epi32(mask), 0x78);
}

// `step` of the four steps of a unit; `unit` of the four of a tile, whose `signs` are used where kSigns.
template <bool kSigns>
inline __attribute__((always_inline)) __m512i decode_pair(__m512i codes, int step, __m512i signs, int unit, __m512i table) {
  const __m512i w = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 4 * step), table);
  if constexpr (!kSigns) return w;
  return flip(w, _mm512_slli_epi32(signs, 4 * unit + step), static_cast<int>(0x80008000u));
}

}  // namespace
