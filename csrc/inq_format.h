// The number formats in C++: the same constants and the same code tables as inq_kernels/format.py, for host and device.
//
// tests/test_native_format.py compares everything here with format.py, value by value. Formats are `bits` b in 2…5 and
// `dense` (false: the paper's levels). A code is sign << (b − 1) | field; field 0 is the value 0.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define INQ_HD __host__ __device__
#else
#define INQ_HD
#endif

namespace inq {

// n1 is stored in int8 and every level must be a normal float32 (and bfloat16) number.
constexpr int kN1Min = -126;
constexpr int kN1Max = 127;
// float16 weights: 2^-24 is the smallest subnormal, 2^15 the largest power of two.
constexpr int kN1MinFloat16 = -24;
constexpr int kN1MaxFloat16 = 15;
// n1 of a row without a nonzero weight.
constexpr int kN1ZeroRow = 0;
// The "mse" rule looks this many octaves below the "max" rule.
constexpr int kMseOctaves = 8;

struct Format {
  int bits;    // 2, 3, 4 or 5
  bool dense;  // levels: false "paper", true "dense"
};

// How many powers of two a weight may take: 8/4/2/1 (paper) or 15/7/3/1 (dense) at 5/4/3/2 bits.
INQ_HD constexpr int magnitudes(Format f) { return f.dense ? (1 << (f.bits - 1)) - 1 : 1 << (f.bits - 2); }

// The smallest power of a row whose largest is n1 (equation 3 of the paper).
INQ_HD constexpr int n2_of(Format f, int n1) { return n1 + 1 - magnitudes(f); }

// The field of magnitude `index` (0: the smallest). Paper: the field's top bit says "nonzero".
INQ_HD constexpr int field_of(Format f, int index) { return f.dense ? index + 1 : (1 << (f.bits - 2)) + index; }

// The magnitude that `field` names, or -1 where it names none (0 itself, or a paper field without the nonzero flag).
INQ_HD constexpr int index_of(Format f, int field) {
  const int index = f.dense ? field - 1 : field - (1 << (f.bits - 2));
  return index >= 0 ? index : -1;
}

// Bytes of one row of k codes in the storage layout: codes padded with zero to a multiple of 8.
INQ_HD constexpr int64_t row_bytes(Format f, int64_t k) { return (k + 7) / 8 * f.bits; }

// --- equation (4) on the bits of a float32 ---------------------------------------------------------------------------
//
// The order of non-negative floats is that of their bits. Adding half an octave (0x400000) before taking the exponent
// field rounds to the nearest power of two with ties up; for subnormals too wherever the result is 2^-126.

constexpr uint32_t kHalfOctave = 0x400000u;

// The exponent (biased by 127) of the power of two nearest to a finite |w| with bits `magnitude`, ties up.
INQ_HD constexpr int nearest_biased(uint32_t magnitude) {
  return static_cast<int>((magnitude + kHalfOctave) >> 23);
}

// The bits of the least |w| that does not become 0: 2^(n2−1), the lower end of the smallest level's bin. Where n2 is
// under the least exponent, that of 2^-126: 0.75·2^-126.
INQ_HD constexpr uint32_t least_nonzero(int n2) {
  if (n2 < kN1Min) return 0x600000u;
  return n2 == kN1Min ? 0x400000u : static_cast<uint32_t>(n2 - 1 + 127) << 23;
}

// The bits of |ŵ| for a finite |w| with bits `magnitude`: 0 or 2^k, max(n2, −126) ≤ k ≤ n1; larger weights saturate.
INQ_HD constexpr uint32_t quantize_magnitude(uint32_t magnitude, int n1, int n2) {
  if (magnitude < least_nonzero(n2)) return 0;
  int biased = nearest_biased(magnitude);
  if (biased < n2 + 127) biased = n2 + 127;
  if (biased > n1 + 127) biased = n1 + 127;
  return static_cast<uint32_t>(biased) << 23;
}

}  // namespace inq
