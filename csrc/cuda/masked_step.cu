// SGD and AdamW with the mask of frozen weights inside: one launch for all parameters of a dtype.
//
// Memory is what takes the time. Every operand is read and written once, 16 bytes a lane; four neighbours that are all
// frozen are not read or written at all, and of others a frozen weight and its state are written back bit for bit.
// Products and sums are rounded apart, as csrc/cpu/masked_step_kernel.h does: every backend gives the same bits.
#include "kernels.h"
#include "weights.cuh"

namespace inq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// State is float32: its runs of four decide where a lane's weights lie, and 16-bit weights move 8 bytes a lane.
constexpr int kRun = 4;
// Tiles of a warp. Their bits of the mask are read first, before what depends on them.
constexpr int kTiles = static_cast<int>(kStepChunk / (kWarps * kTile));

// How AdamW and SGD move one weight; w, and state in and out.
struct Sgd {
  SgdNumbers n;
  INQ_DEVICE bool reads_first() const { return !n.first_step; }
  template <bool kFirst>
  INQ_DEVICE void move(float& w, float g, float& buffer, float&) const {
    float d = mul(n.maximize ? -1.0f : 1.0f, g);
    if (n.weight_decay != 0) d = add(d, mul(n.weight_decay, w));
    if constexpr (kFirst) {
      buffer = n.first_step ? d : add(mul(buffer, n.momentum), mul(n.dampening_left, d));
      d = n.nesterov ? add(d, mul(n.momentum, buffer)) : buffer;
    }
    w = add(w, mul(-n.lr, d));
  }
};

struct Adamw {
  AdamwNumbers n;
  INQ_DEVICE bool reads_first() const { return true; }
  template <bool>
  INQ_DEVICE void move(float& w, float g, float& m, float& v) const {
    const float d = mul(n.maximize ? -1.0f : 1.0f, g);
    // torch.lerp, which is exact at both ends.
    const float way = add(d, -m);
    m = n.beta1_left >= 0.5f ? add(d, -mul(way, n.beta1)) : add(m, mul(n.beta1_left, way));
    v = add(mul(v, n.beta2), mul(mul(n.beta2_left, d), d));
    // One division: two would take longer.
    const float denominator = add(mul(square_root(v), n.inverse_correction2), n.eps);
    w = add(mul(w, n.decay), divide(mul(-n.step_size, m), denominator));
  }
};

template <class Step>
struct KernelParams {
  const StepTensor* tensors;
  int tensor_count;
  Step step;
};

// The lane's weights of one tile. `free`: those that move; `vector`: the whole tile is there, at multiples of 16 bytes.
template <DType kType, bool kFirst, bool kSecond, class Step>
INQ_DEVICE void step_tile(const Step& step, Raw<kType>* w, const Raw<kType>* grad, uint32_t* first, uint32_t* second,
                          bool vector, uint32_t free, uint32_t inside) {
  using T = Raw<kType>;
  // Runs of which some weight moves are moved whole.
  uint32_t runs = 0;
#pragma unroll
  for (int run = 0; run < 8 / kRun; ++run) {
    const uint32_t all = 0xFu << (run * kRun);
    if ((free & all) != 0) runs |= inside & all;
  }
  uint32_t old_w[8], g[8], old_first[8] = {}, old_second[8] = {};
  load_tile<T, kRun>(w, vector, runs, old_w);
  load_tile<T, kRun>(grad, vector, runs, g);
  if constexpr (kFirst) {
    // A first step overwrites its momentum: it is read for the frozen weights' sake alone.
    if (step.reads_first() || free != runs) load_tile<uint32_t, kRun>(first, vector, runs, old_first);
  }
  if constexpr (kSecond) load_tile<uint32_t, kRun>(second, vector, runs, old_second);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float x = bits_to_float(widened<kType>(old_w[j]));
    float m = bits_to_float(old_first[j]), v = bits_to_float(old_second[j]);
    step.template move<kFirst>(x, bits_to_float(widened<kType>(g[j])), m, v);
    if (free >> j & 1) {
      old_w[j] = narrowed<kType>(x);
      old_first[j] = float_to_bits(m);
      old_second[j] = float_to_bits(v);
    }
  }
  store_tile<T, kRun>(w, vector, runs, old_w);
  if constexpr (kFirst) store_tile<uint32_t, kRun>(first, vector, runs, old_first);
  if constexpr (kSecond) store_tile<uint32_t, kRun>(second, vector, runs, old_second);
}

// Blocks of an SM that the registers are to suffice for. Of AdamW's two have 64 KB in flight, and three would spill.
template <bool kSecond>
constexpr int kBlocks = kSecond ? 2 : 3;

template <DType kType, bool kFirst, bool kSecond, class Step>
__global__ void __launch_bounds__(kThreads, kBlocks<kSecond>)
    masked_step(const __grid_constant__ KernelParams<Step> p) {
  using T = Raw<kType>;
  const StepTensor* const t = tensor_of(p.tensors, p.tensor_count, &StepTensor::first_chunk, blockIdx.x);
  const int64_t numel = ld_global(&t->numel);
  T* const w = static_cast<T*>(ld_global(&t->w));
  const T* const grad = static_cast<const T*>(ld_global(&t->grad));
  uint32_t* const first = kFirst ? reinterpret_cast<uint32_t*>(ld_global(&t->first)) : nullptr;
  uint32_t* const second = kSecond ? reinterpret_cast<uint32_t*>(ld_global(&t->second)) : nullptr;
  const uint8_t* const mask = ld_global(&t->mask);
  const bool aligned = is_aligned(w) && is_aligned(grad) && is_aligned(first) && is_aligned(second);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - ld_global(&t->first_chunk)) * kStepChunk +
                        warp_of_thread() * (kTiles * kTile);
  uint32_t frozen = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t tile = begin + i * kTile;
    if (mask != nullptr) frozen |= load_bits<kRun>(mask + tile / 8, numel - tile) << (8 * i);
  }
#pragma unroll 1
  for (int i = 0; i < kTiles; ++i) {
    const int64_t tile = begin + i * kTile;
    const uint32_t inside = bits_inside<kRun>(0, numel - tile), free = inside & ~(frozen >> (8 * i));
    if (free == 0) continue;
    step_tile<kType, kFirst, kSecond>(p.step, w + tile, grad + tile, first + tile, second + tile,
                                      aligned && tile + kTile <= numel, free, inside);
  }
}

template <bool kFirst, bool kSecond, class Step>
cudaError_t launch_step(const StepTensor* tensors, int tensor_count, int64_t chunks, const Step& step, DType dtype,
                        cudaStream_t stream) {
  if (tensor_count == 0) return cudaSuccess;
  const KernelParams<Step> p{tensors, tensor_count, step};
  const dim3 grid(static_cast<unsigned>(chunks));
  switch (dtype) {
    case DType::float32:
      return launch(masked_step<DType::float32, kFirst, kSecond, Step>, grid, kThreads, 0, stream, p);
    case DType::bfloat16:
      return launch(masked_step<DType::bfloat16, kFirst, kSecond, Step>, grid, kThreads, 0, stream, p);
    case DType::float16:
      return launch(masked_step<DType::float16, kFirst, kSecond, Step>, grid, kThreads, 0, stream, p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t masked_sgd(const SgdParams& p, SgdChoice choice, cudaStream_t stream) {
  const Sgd step{p.numbers};
  return choice.momentum ? launch_step<true, false>(p.tensors, p.tensor_count, p.chunks, step, choice.dtype, stream)
                         : launch_step<false, false>(p.tensors, p.tensor_count, p.chunks, step, choice.dtype, stream);
}

cudaError_t masked_adamw(const AdamwParams& p, AdamwChoice choice, cudaStream_t stream) {
  return launch_step<true, true>(p.tensors, p.tensor_count, p.chunks, Adamw{p.numbers}, choice.dtype, stream);
}

}  // namespace inq::cuda
