#include "dense.h"

#include "decode.cuh"
#include "epilogue.cuh"

namespace inq::cuda {
namespace {

// A warp for each block of 16 rows × kBlockK, four along k.
constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Rows of a block lie 144 bytes apart in shared memory: the eight rows that a store of a register touches, 16 bytes of
// each, are in different banks.
constexpr int kPitch = 144, kTileBytes = 16 * kPitch;

template <class Codec>
__global__ void __launch_bounds__(kThreads) decode_dense_kernel(const __grid_constant__ DecodeParams p) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t k_blocks = (p.k + Codec::kBlockK - 1) / Codec::kBlockK;
  const int64_t block_k = int64_t{blockIdx.x} % ((k_blocks + kWarps - 1) / kWarps) * kWarps + warp;
  const int64_t block_n = int64_t{blockIdx.x} / ((k_blocks + kWarps - 1) / kWarps);
  if (block_k >= k_blocks) return;
  const uint8_t* block = p.weight + (block_n * k_blocks + block_k) * Codec::kBlockBytes;
  const Four four = ld_global_once(reinterpret_cast<const Four*>(block) + lane);
  const uint32_t words[Codec::kWords] = {four.x, four.y, four.z, four.w};
  // Through shared memory, so that global memory is written in pieces of 16 bytes.
  char* tile = dynamic_shared() + warp * kTileBytes;
#pragma unroll
  for (int step = 0; step < Codec::kSteps; ++step) {
    uint32_t a[4];
    Codec::decode(words, step, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i % 2), column = 16 * step + 8 * (i / 2) + 2 * (lane % 4);
      st_shared(reinterpret_cast<uint32_t*>(tile + row * kPitch + 2 * column), a[i]);
    }
  }
  sync_warp();
  constexpr int kPieces = Codec::kBlockK / 8;
  const bool aligned = p.k % 8 == 0;
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int64_t n = block_n * 16 + i / kPieces, k = block_k * Codec::kBlockK + i % kPieces * 8;
    if (n >= p.n || k >= p.k) continue;
    const char* from = tile + i / kPieces * kPitch + i % kPieces * 16;
    uint16_t* to = p.out + n * p.k + k;
    if (aligned) {
      st_global(reinterpret_cast<Four*>(to), ld_shared(reinterpret_cast<const Four*>(from)));
    } else {
      for (int j = 0; j < 8 && k + j < p.k; ++j) st_global(to + j, ld_shared(reinterpret_cast<const uint16_t*>(from) + j));
    }
  }
}

template <class Codec>
cudaError_t run(const DecodeParams& p, cudaStream_t stream) {
  const int64_t k_blocks = (p.k + Codec::kBlockK - 1) / Codec::kBlockK;
  const int64_t blocks = (k_blocks + kWarps - 1) / kWarps * ((p.n + 15) / 16);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(decode_dense_kernel<Codec>, dim3(static_cast<unsigned>(blocks)), kThreads, kWarps * kTileBytes, stream, p);
}

template <Number kNumber>
cudaError_t run_number(const DecodeParams& p, cudaStream_t stream) {
  switch (p.levels) {
    case Levels::paper4: return run<CodecOf<kNumber, Levels::paper4>>(p, stream);
    case Levels::dense4: return run<CodecOf<kNumber, Levels::dense4>>(p, stream);
    case Levels::paper5: return run<CodecOf<kNumber, Levels::paper5>>(p, stream);
    case Levels::dense5: return run<CodecOf<kNumber, Levels::dense5>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

// Rows of sums that a thread of finish_kernel goes through with one column's factors.
constexpr int kFinishRows = 8, kFinishThreads = 256;

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ FinishParams p) {
  const int64_t columns = (p.n + kFinishThreads - 1) / kFinishThreads;
  const int64_t n = int64_t{blockIdx.x} % columns * kFinishThreads + threadIdx.x;
  const int64_t first = int64_t{blockIdx.x} / columns * kFinishRows;
  if (n >= p.n) return;
  const int exponent = ld_global(p.weight_exp + n) + p.exponent;
  const float scale = p.weight_scale == nullptr ? 1.0f : ld_global(p.weight_scale + n);
  const float bias = p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_type, n);
  for (int64_t m = first; m < first + kFinishRows && m < p.m; ++m) {
    float y = scaled(ld_global(p.sums + m * p.n + n), exponent);
    if (p.weight_scale != nullptr) y = mul(y, scale);
    if (p.bias != nullptr) y = add(y, bias);
    st_global(static_cast<uint16_t*>(p.out) + m * p.n + n, p.out_type == Float::f16 ? to_f16(y) : to_bf16(y));
  }
}

}  // namespace

cudaError_t finish_sums(const FinishParams& p, cudaStream_t stream) {
  if (p.m < 0 || p.n < 0 || p.out_type == Float::f32) return cudaErrorInvalidValue;
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  const int64_t blocks =
      (p.n + kFinishThreads - 1) / kFinishThreads * ((p.m + kFinishRows - 1) / kFinishRows);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(finish_kernel, dim3(static_cast<unsigned>(blocks)), kFinishThreads, 0, stream, p);
}

cudaError_t decode_dense(const DecodeParams& p, cudaStream_t stream) {
  if (p.n < 0 || p.k < 0 || p.number == Number::e4m3) return cudaErrorInvalidValue;
  if (p.n == 0 || p.k == 0) return cudaSuccess;
  return p.number == Number::f16 ? run_number<Number::f16>(p, stream) : run_number<Number::bf16>(p, stream);
}

}  // namespace inq::cuda
