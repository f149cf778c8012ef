// What the entry points of kernels are declared with, for code that is not CUDA's: register_cuda*.cpp.
#pragma once

#if defined(INQ_EMULATOR)
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstdint>

namespace inq::cuda {

// The type of products: its layout is fragments_fp16 (…).
enum class Number : int { f16, bf16, e4m3 };
// slices.kind: which magnitudes a format has. 2 and 3 bits take the place of 4.
enum class Levels : int { paper4, dense4, paper5, dense5 };
// The type of a bias, of an output, of rows that are quantized.
enum class Float : int { f16, bf16, f32 };

constexpr bool five_bits(Levels levels) { return levels == Levels::paper5 || levels == Levels::dense5; }

// Magnitude i decodes to ±2^(base_of + i): fragments.Codec.base.
constexpr int base_of(Number number, Levels levels) {
  if (number == Number::e4m3) return -6;
  if (levels == Levels::paper4 || levels == Levels::paper5) return 1;
  return number == Number::f16 ? -14 : 0;
}

// Columns of a block of weights, and its bytes: fragments.Codec.k_block.
constexpr int block_k_of(Number number, Levels levels) {
  return number != Number::e4m3 && five_bits(levels) ? 48 : 64;
}
constexpr int block_bytes_of(Number number, Levels levels) {
  return number == Number::e4m3 && five_bits(levels) ? 640 : 512;
}

}  // namespace inq::cuda
