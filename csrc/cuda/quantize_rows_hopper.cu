// Rows of x as e4m3 with a power of two each, for linear_fp8: reference.quantize_rows_e4m3. A block takes a row and reads
// it twice, the second time from the cache.
#include "linear_hopper.h"
#include "ptx.cuh"

// cvt to e4m3 begins with sm_89; other architectures get an empty kernel that is never launched.
#if defined(INQ_EMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define INQ_E4M3_CODE 1
#else
#define INQ_E4M3_CODE 0
#endif

namespace inq::cuda {
namespace {

constexpr int kThreads = 256;
// Elements that a thread takes at a time: 16 bytes of 16-bit numbers, 32 of float32.
constexpr int kVector = 8;
constexpr int kSharedBytes = 4 * (kThreads / 32);

template <Float kType>
struct Element {
  using Bits = uint16_t;
  static INQ_DEVICE float widen(Bits bits) { return kType == Float::f16 ? from_f16(bits) : from_bf16(bits); }
};
template <>
struct Element<Float::f32> {
  using Bits = uint32_t;
  static INQ_DEVICE float widen(Bits bits) { return bits_to_float(bits); }
};

template <Float kType>
INQ_DEVICE void load_vector(float (&v)[kVector], const typename Element<kType>::Bits* from) {
  using E = Element<kType>;
  const Four* four = reinterpret_cast<const Four*>(from);
  if constexpr (kType == Float::f32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Four q = ld_global(four + i);
      v[4 * i] = E::widen(q.x), v[4 * i + 1] = E::widen(q.y);
      v[4 * i + 2] = E::widen(q.z), v[4 * i + 3] = E::widen(q.w);
    }
  } else {
    const Four q = ld_global(four);
    const uint32_t pairs[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t pair = pairs[i / 2];
      v[i] = E::widen(static_cast<uint16_t>(i % 2 ? pair >> 16 : pair & 0xFFFF));
    }
  }
}

INQ_DEVICE uint32_t magnitude(float v) { return float_to_bits(v) & 0x7FFFFFFFu; }

// What is multiplied by 2^t and rounded; a row with NaN or infinity is NaN, 0x7F.
struct Rounding {
  float factor;
  bool finite;
  INQ_DEVICE uint32_t pair(float a, float b) const {
    return finite ? to_e4m3x2(mul(a, factor), mul(b, factor)) : 0x7F7Fu;
  }
};

template <Float kType>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p) {
#if INQ_E4M3_CODE
  using E = Element<kType>;
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const auto* x = static_cast<const typename E::Bits*>(p.x) + row * p.x_stride;
  uint8_t* values = p.values + row * p.values_stride;
  // Elements that are taken as vectors; the others one at a time.
  const bool whole = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(values)) % 16 == 0;
  const int64_t vectors = whole ? p.k / kVector : 0, rest = vectors * kVector;

  uint32_t largest = 0;
  for (int64_t i = thread; i < vectors; i += kThreads) {
    float v[kVector];
    load_vector<kType>(v, x + i * kVector);
#pragma unroll
    for (int j = 0; j < kVector; ++j) largest = max(largest, magnitude(v[j]));
  }
  for (int64_t i = rest + thread; i < p.k; i += kThreads) largest = max(largest, magnitude(E::widen(ld_global(x + i))));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) largest = max(largest, shuffle_xor(largest, mask));
  auto* of_warps = reinterpret_cast<uint32_t*>(dynamic_shared());
  if (thread % 32 == 0) st_shared(of_warps + thread / 32, largest);
  sync_threads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, ld_shared(of_warps + warp));

  // largest = f·2^e, 1 ≤ f < 2. 448 = 1.75·2^8 is the largest finite e4m3 value, so t = 8 − e, one less for f > 1.75.
  const bool finite = largest < 0x7F800000u;
  int t = 0;
  if (finite && largest > 0) {
    t = 8 - (static_cast<int>(largest >> 23) - 127) - ((largest & 0x7FFFFFu) > 0x600000u ? 1 : 0);
    t = min(max(t, -126), 126);
  }
  const Rounding rounding{bits_to_float(static_cast<uint32_t>(t + 127) << 23), finite};
  if (thread == 0) st_global(p.exponents + row, t);

  for (int64_t i = thread; i < vectors; i += kThreads) {
    float v[kVector];
    load_vector<kType>(v, x + i * kVector);
    st_global(reinterpret_cast<Two*>(values) + i,
              Two{rounding.pair(v[0], v[1]) | rounding.pair(v[2], v[3]) << 16,
                  rounding.pair(v[4], v[5]) | rounding.pair(v[6], v[7]) << 16});
  }
  for (int64_t i = rest + thread; i < p.k; i += kThreads) {
    st_global(values + i, static_cast<uint8_t>(rounding.pair(E::widen(ld_global(x + i)), 0.0f) & 0xFF));
  }
#endif
}

}  // namespace

cudaError_t quantize_rows(const QuantizeRowsParams& p, cudaStream_t stream) {
  if (p.m == 0) return cudaSuccess;
  if (p.m < 0 || p.k < 0 || p.m > hopper::kLargest) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(p.m));
  switch (p.type) {
    case Float::f16: return launch(quantize_rows_kernel<Float::f16>, grid, kThreads, kSharedBytes, stream, p);
    case Float::bf16: return launch(quantize_rows_kernel<Float::bf16>, grid, kThreads, kSharedBytes, stream, p);
    case Float::f32: return launch(quantize_rows_kernel<Float::f32>, grid, kThreads, kSharedBytes, stream, p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace inq::cuda
