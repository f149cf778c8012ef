// What a partition goes through: the chunk of a tensor that a block has, and the keys of its weights.
#pragma once

#include "weights.cuh"

namespace inq::cuda {

// Bits below a key's first digit.
constexpr int kRestBits = 20;

// Digits after the first. A widened bfloat16 or float16 ends in zeros.
template <DType kType, bool kRandom>
struct Digits {
  static constexpr bool kWhole = kRandom || kType == DType::float32;
  static constexpr int kSecondBits = kWhole ? 10 : kType == DType::bfloat16 ? 4 : 7;
  static constexpr int kSecondShift = kRestBits - kSecondBits;
  static constexpr bool kThird = kWhole;
};

// Which weights a pass reads: those that may freeze, those that the mask holds, or both; never pruned ones.
enum class Which : int { candidates, held, kept };

// What a block works on. What else is known of it is asked for when it is needed: registers are scarce while weights
// are read.
struct Chunk {
  int tensor, number;         // the tensor's place in the list, and this of its blocks: a grid has under 2^31
  int64_t numel, begin, end;  // weights

  INQ_DEVICE const WeightTensor* t(const PartitionParams& p) const { return p.tensors + tensor; }
  INQ_DEVICE PartitionState* state(const PartitionParams& p) const { return p.states + tensor; }
  // How many blocks the tensor has.
  INQ_DEVICE int blocks(const PartitionParams& p) const {
    return static_cast<int>(chunks_of(ld_global(&t(p)->numel), p.chunk));
  }
};

INQ_DEVICE Chunk chunk_of_block(const PartitionParams& p) {
  const WeightTensor* const t = tensor_of(p.tensors, p.tensor_count, &WeightTensor::first_chunk, blockIdx.x);
  Chunk c;
  c.tensor = static_cast<int>(t - p.tensors);
  c.number = static_cast<int>(blockIdx.x - ld_global(&t->first_chunk));
  c.numel = ld_global(&t->numel);
  c.begin = c.number * p.chunk;
  c.end = smaller(c.begin + p.chunk, c.numel);
  return c;
}

// The lane's keys of a tile, and which of its weights `which` names.
template <DType kType, bool kRandom>
struct KeyReader {
  using T = Raw<kType>;
  static constexpr int kRun = kVector<kType>;
  const T* w;
  const uint8_t *mask, *keep;
  int64_t numel;
  uint64_t seed;
  bool aligned;
  Which which;

  INQ_DEVICE KeyReader(const WeightTensor* t, const Chunk& c, Which which)
      : w(static_cast<const T*>(ld_global(&t->w))),
        mask(ld_global(&t->mask)),
        keep(ld_global(&t->keep)),
        numel(c.numel),
        seed(ld_global(&t->seed)),
        aligned(is_aligned(w)),
        which(which) {}

  // The weights of a tile that `which` names; the keys of others mean nothing. `frozen`: the kept ones that the mask holds.
  INQ_DEVICE uint32_t read(int64_t tile, uint32_t (&keys)[8], uint32_t& frozen) const {
    const int64_t left = numel - tile;
    uint32_t taken = bits_inside<kRun>(0, left);
    if (keep != nullptr) taken &= load_bits<kRun>(keep + tile / 8, left);
    frozen = mask == nullptr ? 0 : taken & load_bits<kRun>(mask + tile / 8, left);
    if (which == Which::candidates) taken &= ~frozen;
    if (which == Which::held) taken = frozen;
    if constexpr (kRandom) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        keys[j] = random_key(seed, static_cast<uint64_t>(tile + run_place<kRun>(j / kRun) + j % kRun));
      }
    } else {
      load_tile<T, kRun>(w + tile, aligned && left >= kTile, taken, keys);
#pragma unroll
      for (int j = 0; j < 8; ++j) keys[j] = widened<kType>(keys[j]) & kMagnitude;
    }
    return taken;
  }
};

}  // namespace inq::cuda
