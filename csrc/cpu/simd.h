// The few vector operations that the training kernels are written in, so that each kernel exists once and is compiled
// three times: a file that includes this first defines INQ_ISA (a namespace of its own, or the linker would merge code
// for different instruction sets) and INQ_LANES (16: AVX-512, 8: AVX2, 1: plain C++).
//
// U: 32-bit integers, F: float32, M: one truth a lane. Magnitudes and keys are below 2^31, so comparisons are signed.
#pragma once

#if !defined(INQ_ISA) || !defined(INQ_LANES)
#error "define INQ_ISA and INQ_LANES first"
#endif

#include <cstdint>
#include <cstring>

#if INQ_LANES > 1
// gcc 12 takes the intrinsics' deliberately undefined registers for mistakes of ours (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define INQ_INLINE static inline __attribute__((always_inline))
// The same for a lambda, after its parameters.
#define INQ_INLINED __attribute__((always_inline))

namespace inq::cpu::INQ_ISA {

constexpr int kLanes = INQ_LANES;
constexpr uint32_t kLaneBits = kLanes == 16 ? 0xFFFFu : kLanes == 8 ? 0xFFu : 1u;

#if INQ_LANES == 16

using U = __m512i;
using F = __m512;
using M = __mmask16;

INQ_INLINE U set(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
INQ_INLINE F set(float x) { return _mm512_set1_ps(x); }
INQ_INLINE U load_bits(const uint32_t* p) { return _mm512_loadu_si512(p); }
INQ_INLINE U load_bits(const uint16_t* p) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
}
INQ_INLINE void store_bits(uint32_t* p, U x) { _mm512_storeu_si512(p, x); }
INQ_INLINE void store_bits(uint16_t* p, U x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}
INQ_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INQ_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INQ_INLINE F as_float(U x) { return _mm512_castsi512_ps(x); }
INQ_INLINE U as_bits(F x) { return _mm512_castps_si512(x); }
INQ_INLINE U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
INQ_INLINE U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
INQ_INLINE U plus(U a, U b) { return _mm512_add_epi32(a, b); }
INQ_INLINE U smaller(U a, U b) { return _mm512_min_epi32(a, b); }
INQ_INLINE U larger(U a, U b) { return _mm512_max_epi32(a, b); }
INQ_INLINE U shift_right(U a, int count) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(count)); }
INQ_INLINE M greater(U a, U b) { return _mm512_cmpgt_epi32_mask(a, b); }
INQ_INLINE M equal(U a, U b) { return _mm512_cmpeq_epi32_mask(a, b); }
INQ_INLINE M mask_of(uint32_t bits) { return static_cast<M>(bits); }
INQ_INLINE uint32_t bits_of(M m) { return m; }
INQ_INLINE U choose(M m, U yes, U no) { return _mm512_mask_blend_epi32(m, no, yes); }
INQ_INLINE F choose(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
INQ_INLINE F plus(F a, F b) { return _mm512_add_ps(a, b); }
INQ_INLINE F minus(F a, F b) { return _mm512_sub_ps(a, b); }
INQ_INLINE F times(F a, F b) { return _mm512_mul_ps(a, b); }
INQ_INLINE F over(F a, F b) { return _mm512_div_ps(a, b); }
INQ_INLINE F root(F a) { return _mm512_sqrt_ps(a); }
INQ_INLINE M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }

// The chosen lanes, in order, to `out`, which has room for all of them. In a register first: some processors take
// hundreds of cycles to compress into memory.
INQ_INLINE int compress(uint32_t* out, M m, U x) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, x));
  return __builtin_popcount(m);
}

#elif INQ_LANES == 8

using U = __m256i;
using F = __m256;
using M = __m256i;

INQ_INLINE U set(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
INQ_INLINE F set(float x) { return _mm256_set1_ps(x); }
INQ_INLINE U load_bits(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INQ_INLINE U load_bits(const uint16_t* p) {
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
}
INQ_INLINE void store_bits(uint32_t* p, U x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
INQ_INLINE void store_bits(uint16_t* p, U x) {
  const U high = _mm256_srli_epi32(x, 16);
  const U pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(pairs));
}
INQ_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INQ_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
INQ_INLINE F as_float(U x) { return _mm256_castsi256_ps(x); }
INQ_INLINE U as_bits(F x) { return _mm256_castps_si256(x); }
INQ_INLINE U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
INQ_INLINE U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
INQ_INLINE U plus(U a, U b) { return _mm256_add_epi32(a, b); }
INQ_INLINE U smaller(U a, U b) { return _mm256_min_epi32(a, b); }
INQ_INLINE U larger(U a, U b) { return _mm256_max_epi32(a, b); }
INQ_INLINE U shift_right(U a, int count) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(count)); }
INQ_INLINE M greater(U a, U b) { return _mm256_cmpgt_epi32(a, b); }
INQ_INLINE M equal(U a, U b) { return _mm256_cmpeq_epi32(a, b); }
INQ_INLINE M mask_of(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(set(bits), lane), lane);
}
INQ_INLINE uint32_t bits_of(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }
INQ_INLINE U choose(M m, U yes, U no) { return _mm256_blendv_epi8(no, yes, m); }
INQ_INLINE F choose(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }
INQ_INLINE F plus(F a, F b) { return _mm256_add_ps(a, b); }
INQ_INLINE F minus(F a, F b) { return _mm256_sub_ps(a, b); }
INQ_INLINE F times(F a, F b) { return _mm256_mul_ps(a, b); }
INQ_INLINE F over(F a, F b) { return _mm256_div_ps(a, b); }
INQ_INLINE F root(F a) { return _mm256_sqrt_ps(a); }
INQ_INLINE M is_nan(F a) { return _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }

// The chosen lanes, in order, to `out`, which has room for all of them: PEXT picks their numbers from 0…7.
INQ_INLINE int compress(uint32_t* out, M m, U x) {
  const uint32_t bits = bits_of(m);
  const uint64_t bytes = _pdep_u64(bits, 0x0101010101010101u) * 0xFF;
  const uint64_t lanes = _pext_u64(0x0706050403020100u, bytes);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(x, index));
  return __builtin_popcount(bits);
}

#else

using U = uint32_t;
using F = float;
using M = bool;

INQ_INLINE U set(uint32_t x) { return x; }
INQ_INLINE F set(float x) { return x; }
INQ_INLINE U load_bits(const uint32_t* p) { return *p; }
INQ_INLINE U load_bits(const uint16_t* p) { return static_cast<uint32_t>(*p) << 16; }
INQ_INLINE void store_bits(uint32_t* p, U x) { *p = x; }
INQ_INLINE void store_bits(uint16_t* p, U x) { *p = static_cast<uint16_t>(x >> 16); }
INQ_INLINE F load(const float* p) { return *p; }
INQ_INLINE void store(float* p, F x) { *p = x; }
INQ_INLINE F as_float(U x) { return __builtin_bit_cast(float, x); }
INQ_INLINE U as_bits(F x) { return __builtin_bit_cast(uint32_t, x); }
INQ_INLINE U bit_and(U a, U b) { return a & b; }
INQ_INLINE U bit_or(U a, U b) { return a | b; }
INQ_INLINE U plus(U a, U b) { return a + b; }
INQ_INLINE U smaller(U a, U b) { return a < b ? a : b; }
INQ_INLINE U larger(U a, U b) { return a < b ? b : a; }
INQ_INLINE U shift_right(U a, int count) { return a >> count; }
INQ_INLINE M greater(U a, U b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b); }
INQ_INLINE M equal(U a, U b) { return a == b; }
INQ_INLINE M mask_of(uint32_t bits) { return (bits & 1) != 0; }
INQ_INLINE uint32_t bits_of(M m) { return m; }
INQ_INLINE U choose(M m, U yes, U no) { return m ? yes : no; }
INQ_INLINE F choose(M m, F yes, F no) { return m ? yes : no; }
INQ_INLINE F plus(F a, F b) { return a + b; }
INQ_INLINE F minus(F a, F b) { return a - b; }
INQ_INLINE F times(F a, F b) { return a * b; }
INQ_INLINE F over(F a, F b) { return a / b; }
INQ_INLINE F root(F a) { return __builtin_sqrtf(a); }
INQ_INLINE M is_nan(F a) { return a != a; }
INQ_INLINE int compress(uint32_t* out, M m, U x) {
  *out = x;
  return m;
}

#endif

// The bits that `x` is stored with by store_bits(T*), T by the pointer: float32 as it is.
INQ_INLINE U rounded(const uint32_t*, F x) { return as_bits(x); }

// To bfloat16: nearest, ties to even, subnormals kept (the processor's own instruction drops them); NaN stays NaN.
INQ_INLINE U rounded(const uint16_t*, F x) {
  const U bits = as_bits(x);
  const U odd = bit_and(shift_right(bits, 16), set(1u));
  return choose(is_nan(x), set(0x7FC00000u), plus(bits, plus(set(0x7FFFu), odd)));
}

// --- masks of one bit a weight ---------------------------------------------------------------------------------------

// The bits of weights 64·word … 64·word + 63, of which `count` exist; 0 for those that do not.
INQ_INLINE uint64_t load_word(const uint8_t* bits, int64_t word, int64_t count) {
  uint64_t value = 0;
  if (count >= 64) {
    std::memcpy(&value, bits + word * 8, 8);
    return value;
  }
  std::memcpy(&value, bits + word * 8, static_cast<size_t>((count + 7) / 8));
  return value & ((uint64_t{1} << count) - 1);
}

INQ_INLINE void store_word(uint8_t* bits, int64_t word, int64_t count, uint64_t value) {
  std::memcpy(bits + word * 8, &value, count >= 64 ? 8 : static_cast<size_t>((count + 7) / 8));
}

}  // namespace inq::cpu::INQ_ISA
