// What the training kernels share: which tensor a block works on, and how a warp reads weights and bits of masks.
//
// A warp works on *tiles* of 256 weights, eight a lane. A lane's eight are *runs* of kRun neighbours, and the lanes'
// runs lie side by side, so that one instruction moves 16 (or 8) bytes a lane without gaps. Its bits of a mask are one byte,
// bit j for its weight j. Weights are worked on as the bits of a float32.
#pragma once

#include "../random_key.h"
#include "params.h"
#include "ptx.cuh"

namespace inq::cuda {

constexpr int kTile = 256;
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;

INQ_DEVICE int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32; }
INQ_DEVICE int warp_of_thread() { return static_cast<int>(threadIdx.x) / 32; }

template <class T>
INQ_HD constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
INQ_HD constexpr T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
INQ_HD constexpr T clamped(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

template <class T>
INQ_DEVICE T warp_sum(T x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The sum over the lanes up to this one.
template <class T>
INQ_DEVICE T warp_sum_through(T x) {
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const T below = shuffle_up(x, delta);
    if (lane_of_thread() >= static_cast<int>(delta)) x += below;
  }
  return x;
}

// The tensor of a list that has this chunk (or row); `first` is the member that counts those before.
template <class Tensor>
INQ_DEVICE const Tensor* tensor_of(const Tensor* tensors, int count, int64_t Tensor::* first, int64_t chunk) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (ld_global(&(tensors[middle].*first)) <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return tensors + low;
}

// --- numbers ------------------------------------------------------------------------------------------------------------

// The raw bits of a weight.
template <DType kType>
struct RawOf {
  using type = uint16_t;
};
template <>
struct RawOf<DType::float32> {
  using type = uint32_t;
};
template <DType kType>
using Raw = typename RawOf<kType>::type;

// Neighbours that 16 bytes hold.
template <DType kType>
constexpr int kVector = 16 / size_of(kType);

// Raw bits as those of the same number in float32, and a float32 rounded to raw bits.
template <DType kType>
INQ_DEVICE uint32_t widened(uint32_t raw) {
  if constexpr (kType == DType::float32) {
    return raw;
  } else if constexpr (kType == DType::bfloat16) {
    return raw << 16;
  } else {
    return float_to_bits(from_f16(static_cast<uint16_t>(raw)));
  }
}
template <DType kType>
INQ_DEVICE uint32_t narrowed(float x) {
  if constexpr (kType == DType::float32) {
    return float_to_bits(x);
  } else if constexpr (kType == DType::bfloat16) {
    return to_bf16(x);
  } else {
    return to_f16(x);
  }
}

template <DType kType>
constexpr int kLowest = kType == DType::float16 ? kN1MinFloat16 : kN1Min;
template <DType kType>
constexpr int kHighest = kType == DType::float16 ? kN1MaxFloat16 : kN1Max;

// Equation (4) for one n1 on bits of float32: magnitudes under `least` become 0, the others a power of two in
// [bottom, top]. `lowest`: the dtype's least exponent.
struct Limits {
  uint32_t least, bottom, top;
};
INQ_HD constexpr uint32_t power_bits(int e) { return static_cast<uint32_t>(e + 127) << 23; }
INQ_HD constexpr Limits limits_of(Format f, int n1, int lowest) {
  const int n2 = n2_of(f, n1);
  // The smallest level's bin begins at half its value; where that level does not exist, the lowest's own at 0.75 of it.
  uint32_t least = n2 > kN1Min ? power_bits(n2 - 1) : 0x400000u;
  if (n2 < lowest) least = lowest > kN1Min ? power_bits(lowest - 1) + kHalfOctave : 0x600000u;
  if (n1 < lowest) least = 0xFFFFFFFFu;
  return {least, power_bits(larger(n2, lowest)), power_bits(larger(n1, lowest))};
}
// 0 or a power of two, the nearest with ties up.
INQ_HD constexpr uint32_t quantized_magnitude(uint32_t magnitude, Limits limits) {
  const uint32_t power = (magnitude + kHalfOctave) & 0x7F800000u;
  return magnitude < limits.least ? 0 : clamped(power, limits.bottom, limits.top);
}
// With its sign, and a zero that is +0.
INQ_HD constexpr uint32_t quantized(uint32_t x, Limits limits) {
  const uint32_t magnitude = quantized_magnitude(x & kMagnitude, limits);
  return magnitude == 0 ? 0 : magnitude | (x & ~kMagnitude);
}

// --- tiles --------------------------------------------------------------------------------------------------------------

// Where a run of a lane begins in its tile.
template <int kRun>
INQ_DEVICE int run_place(int run) {
  return run * 32 * kRun + lane_of_thread() * kRun;
}

// Those of the lane's eight weights that lie in [from, to) of the tile, as bits.
template <int kRun>
INQ_DEVICE uint32_t bits_inside(int64_t from, int64_t to) {
  uint32_t bits = 0;
#pragma unroll
  for (int run = 0; run < 8 / kRun; ++run) {
    const int64_t place = run_place<kRun>(run);
    const int low = static_cast<int>(clamped<int64_t>(from - place, 0, kRun));
    const int high = static_cast<int>(clamped<int64_t>(to - place, 0, kRun));
    bits |= (((1u << high) - 1) & ~((1u << low) - 1)) << (run * kRun);
  }
  return bits;
}

// The lane's bits of a mask, which has `left` bits from the tile on; bits that it does not have are clear, those behind
// the last in its byte whatever they are.
template <int kRun>
INQ_DEVICE uint32_t load_bits(const uint8_t* tile, int64_t left) {
  uint32_t bits = 0;
#pragma unroll
  for (int run = 0; run < 8 / kRun; ++run) {
    const int place = run_place<kRun>(run);
    if (place < left) {
      const uint32_t byte = ld_global(tile + place / 8);
      bits |= (byte >> (place % 8) & ((1u << kRun) - 1)) << (run * kRun);
    }
  }
  return bits;
}

// Writes all bytes that have one of the `left` bits.
template <int kRun>
INQ_DEVICE void store_bits(uint8_t* tile, int64_t left, uint32_t bits) {
  static_assert(kRun == 4 || kRun == 8);
  const int lane = lane_of_thread();
  int byte = lane;
  if constexpr (kRun == 4) {
    // Two neighbours share a byte of each run: the even lane writes that of the first, the odd one of the second.
    uint32_t both = ((bits & 0xF) | (bits & 0xF0) << 12) << (lane % 2 * 4);
    both |= shuffle_xor(both, 1);
    bits = lane % 2 == 0 ? both : both >> 16;
    byte = lane / 2 + lane % 2 * 16;
  }
  if (byte * 8 < left) st_global(tile + byte, static_cast<uint8_t>(bits));
}

template <class T>
INQ_DEVICE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A run of raw bits: of those that `wanted` has. Where `vector`, all are there and at a multiple of the run's size.
template <class T, int kRun>
INQ_DEVICE void load_run(const T* run, bool vector, uint32_t wanted, uint32_t* raw) {
  constexpr int kBytes = kRun * static_cast<int>(sizeof(T));
  static_assert(kBytes == 16 || kBytes == 8);
  if (vector) {
    uint32_t words[kBytes / 4];
    if constexpr (kBytes == 16) {
      const Four v = ld_global(reinterpret_cast<const Four*>(run));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
      const Two v = ld_global(reinterpret_cast<const Two*>(run));
      words[0] = v.x, words[1] = v.y;
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) raw[j] = sizeof(T) == 4 ? words[j] : words[j / 2] >> (j % 2 * 16) & 0xFFFF;
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) raw[j] = wanted >> j & 1 ? ld_global(run + j) : 0;
  }
}
template <class T, int kRun>
INQ_DEVICE void store_run(T* run, bool vector, uint32_t wanted, const uint32_t* raw) {
  constexpr int kBytes = kRun * static_cast<int>(sizeof(T));
  static_assert(kBytes == 16 || kBytes == 8);
  if (vector) {
    uint32_t words[kBytes / 4];
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) words[i] = sizeof(T) == 4 ? raw[i] : raw[2 * i] | raw[2 * i + 1] << 16;
    if constexpr (kBytes == 16) {
      st_global(reinterpret_cast<Four*>(run), Four{words[0], words[1], words[2], words[3]});
    } else {
      st_global(reinterpret_cast<Two*>(run), Two{words[0], words[1]});
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (wanted >> j & 1) st_global(run + j, static_cast<T>(raw[j]));
    }
  }
}

// The raw bits of a lane's weights of a tile, of those that `wanted` has; runs without one are not read.
template <class T, int kRun>
INQ_DEVICE void load_tile(const T* tile, bool vector, uint32_t wanted, uint32_t (&raw)[8]) {
#pragma unroll
  for (int run = 0; run < 8 / kRun; ++run) {
    const uint32_t some = wanted >> (run * kRun) & ((1u << kRun) - 1);
    if (some != 0) {
      load_run<T, kRun>(tile + run_place<kRun>(run), vector, some, raw + run * kRun);
    } else {
#pragma unroll
      for (int j = 0; j < kRun; ++j) raw[run * kRun + j] = 0;
    }
  }
}
// Writes them; where `vector`, whole runs.
template <class T, int kRun>
INQ_DEVICE void store_tile(T* tile, bool vector, uint32_t wanted, const uint32_t (&raw)[8]) {
#pragma unroll
  for (int run = 0; run < 8 / kRun; ++run) {
    const uint32_t some = wanted >> (run * kRun) & ((1u << kRun) - 1);
    if (some != 0) store_run<T, kRun>(tile + run_place<kRun>(run), vector, some, raw + run * kRun);
  }
}

}  // namespace inq::cuda
