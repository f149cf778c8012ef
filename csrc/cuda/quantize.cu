// Freezing what a threshold selects: one read of the weights, one write of those that change, one launch.
//
// A block holds its chunk in registers. Weights whose key is the threshold's freeze in flat order until there are no
// more to take, so a block must know how many ties the chunks before it have: it publishes how many it has itself and,
// if it has any, looks back over those of the chunks before (Merrill and Garland's decoupled look-back). Blocks take
// their chunks by a ticket: those that one waits for have begun before it.
#include "blocks.cuh"
#include "kernels.h"

namespace inq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Tiles of a warp, side by side. With eight 32-bit weights a lane each, 32 registers.
constexpr int kTiles = 4;
static_assert(kWarps * kTiles * kTile == kFreezeChunk);

struct KernelParams {
  FreezeParams all;
  int* ticket;
  ChunkTies* ties;  // [chunks]
};

struct FreezeShared {
  int ties[kWarps], frozen[kWarps];
  unsigned long long before;
  int chunk, nearest;
};

// The ties of a tensor's chunks first … chunk − 1, by all threads. Every chunk before has begun; those near it may not
// have counted yet.
INQ_DEVICE int64_t ties_before(const ChunkTies* ties, int64_t first, int64_t chunk, FreezeShared* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) st_shared(&shared->before, 0ull);
  for (int64_t last = chunk - 1;; last -= kThreads) {
    if (thread == 0) st_shared(&shared->nearest, kThreads);
    sync_threads();
    const ChunkTies* const mine = ties + last - thread;
    int known = 0;
    if (last - thread >= first) {
      while ((known = ld_acquire(&mine->known)) == 0) {
      }
      if (known == 2) atomic_min(&shared->nearest, thread);
    }
    sync_threads();
    // The nearest that knows the sum up to itself, and those after it.
    const int nearest = ld_shared(&shared->nearest);
    int64_t some = 0;
    if (known != 0 && thread < nearest) some = ld_global(&mine->here);
    if (known != 0 && thread == nearest) some = ld_global(&mine->through);
    some = warp_sum(some);
    if (lane_of_thread() == 0 && some != 0) atomic_add(&shared->before, static_cast<unsigned long long>(some));
    sync_threads();
    if (nearest < kThreads) return static_cast<int64_t>(ld_shared(&shared->before));
  }
}

// Where in its tensor's rows a warp's part of a chunk begins. What follows is near: rows are counted on from there in
// 32 bits, with a division only where rows are shorter than the part.
struct RowPlace {
  static constexpr int kPart = kTiles * kTile;
  const int8_t* n1;  // of that row
  int64_t column, length;

  INQ_DEVICE int rows_on(int place) const {
    if (length >= kPart) return column + place >= length ? 1 : 0;
    return (static_cast<int>(column) + place) / static_cast<int>(length);
  }
};

// The new bits of the lane's `chosen` weights of the tile at `place`.
template <DType kType>
INQ_DEVICE void quantize_tile(Format format, const RowPlace& rows, int place, uint32_t chosen, uint32_t (&raw)[8]) {
  constexpr int kRun = kVector<kType>;
  const int first = rows.rows_on(place);
  const bool one = first == rows.rows_on(place + kTile - 1);
  Limits limits = limits_of(format, ld_global(rows.n1 + first), kLowest<kType>);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if ((chosen >> j & 1) == 0) continue;
    if (!one) {
      const int row = rows.rows_on(place + run_place<kRun>(j / kRun) + j % kRun);
      limits = limits_of(format, ld_global(rows.n1 + row), kLowest<kType>);
    }
    raw[j] = narrowed<kType>(bits_to_float(quantized(widened<kType>(raw[j]), limits)));
  }
}

template <DType kType, bool kRandom>
__global__ void __launch_bounds__(kThreads, 2) freeze(const __grid_constant__ KernelParams p) {
  using T = Raw<kType>;
  constexpr int kRun = kVector<kType>;
  auto* const shared = reinterpret_cast<FreezeShared*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread(), warp = warp_of_thread();
  if (thread == 0) st_shared(&shared->chunk, atomic_add(p.ticket, 1));
  sync_threads();
  const int64_t chunk = ld_shared(&shared->chunk);
  const WeightTensor* const t = tensor_of(p.all.tensors, p.all.tensor_count, &WeightTensor::first_chunk, chunk);
  const int64_t index = t - p.all.tensors;
  const int64_t numel = ld_global(&t->numel), first_chunk = ld_global(&t->first_chunk);
  T* const w = static_cast<T*>(ld_global(&t->w));
  uint8_t* const mask = ld_global(&t->mask);
  const uint8_t* const keep = ld_global(&t->keep);
  const uint64_t seed = kRandom ? ld_global(&t->seed) : 0;
  const bool aligned = is_aligned(w);
  const int64_t begin = (chunk - first_chunk) * kFreezeChunk + warp * (kTiles * kTile);
  // Here, where few registers are in use: a 64-bit division is a call.
  RowPlace rows{p.all.n1 + ld_global(&t->first_row), 0, ld_global(&t->length)};
  if (begin < numel) {
    const int64_t row = begin / rows.length;
    rows.n1 += row;
    rows.column = begin - row * rows.length;
  }
  // Keys have 31 bits: one beyond all of them selects nothing, and has no ties to take.
  const int key = static_cast<int>(clamped<int64_t>(ld_global(p.all.thresholds + 2 * index), -1, 0x7FFFFFFF));
  const int64_t take = ld_global(p.all.thresholds + 2 * index + 1);

  // A byte for each tile: the lane's weights that exist, are kept, are frozen, are at the key, are to be frozen.
  uint32_t inside = 0, kept = 0, held = 0, tied = 0, chosen = 0;
  uint32_t raw[kTiles][8];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t tile = begin + i * kTile, left = numel - tile;
    const uint32_t here = bits_inside<kRun>(0, left);
    inside |= here << (8 * i);
    kept |= (keep == nullptr ? here : here & load_bits<kRun>(keep + tile / 8, left)) << (8 * i);
    held |= (here & load_bits<kRun>(mask + tile / 8, left)) << (8 * i);
    load_tile<T, kRun>(w + tile, aligned && left >= kTile, here, raw[i]);
  }
  const auto compare = [&](int mine, int bit) {
    chosen |= static_cast<uint32_t>(mine > key) << bit;
    tied |= static_cast<uint32_t>(mine == key) << bit;
  };
  if constexpr (kRandom) {
    // Rolled up: side by side, their 64-bit products take more registers than there are.
#pragma unroll 1
    for (int bit = 0; bit < 8 * kTiles; ++bit) {
      const int run = bit % 8 / kRun;
      const int64_t place = begin + bit / 8 * kTile + run_place<kRun>(run) + bit % kRun;
      compare(static_cast<int>(random_key(seed, static_cast<uint64_t>(place))), bit);
    }
  } else {
#pragma unroll
    for (int bit = 0; bit < 8 * kTiles; ++bit) {
      compare(static_cast<int>(raw[bit / 8][bit % 8] & (sizeof(T) == 4 ? kMagnitude : 0x7FFFu)), bit);
    }
  }
  const uint32_t candidates = kept & ~held;
  chosen &= candidates;
  tied &= candidates;

  const int in_warp = warp_sum(popc(tied));
  if (lane == 0) st_shared(&shared->ties[warp], in_warp);
  sync_threads();
  if (take > 0) {
    int in_block = 0;
    for (int i = 0; i < kWarps; ++i) in_block += ld_shared(&shared->ties[i]);
    ChunkTies* const ties = p.ties + chunk;
    if (thread == 0 && chunk != first_chunk) {
      st_global(&ties->here, in_block);
      red_release(&ties->known, 1);
    }
    if (in_block > 0 || chunk == first_chunk) {
      const int64_t before = chunk == first_chunk ? 0 : ties_before(p.ties, first_chunk, chunk, shared);
      if (thread == 0) {
        st_global(&ties->through, before + in_block);
        red_release(&ties->known, chunk == first_chunk ? 2 : 1);
      }
      int mine = static_cast<int>(clamped<int64_t>(take - before, 0, in_block));
      if (mine == in_block) {
        chosen |= tied;
      } else if (mine > 0) {
        // One chunk of a tensor at most: its ties in flat order, which is that of warps, tiles, runs, lanes, bits.
        for (int i = 0; i < warp; ++i) mine -= ld_shared(&shared->ties[i]);
        for (int run = 0; run < kTiles * 8 / kRun; ++run) {
          const uint32_t some = tied >> (run * kRun) & ((1u << kRun) - 1);
          const int through = warp_sum_through(popc(some));
          int rank = through - popc(some);
          for (int j = 0; j < kRun; ++j) {
            if ((some >> j & 1) == 0) continue;
            if (rank < mine) chosen |= 1u << (run * kRun + j);
            ++rank;
          }
          mine -= shuffle(through, 31);
        }
      }
    }
  }

  const uint32_t pruned = inside & ~kept;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t tile = begin + i * kTile, left = numel - tile;
    const uint32_t some = chosen >> (8 * i) & 0xFF, gone = pruned >> (8 * i) & 0xFF;
    if (some != 0) quantize_tile<kType>(p.all.format, rows, i * kTile, some, raw[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (gone >> j & 1) raw[i][j] = 0;
    }
    // Runs without a change are not written.
    store_tile<T, kRun>(w + tile, aligned && left >= kTile, some | gone, raw[i]);
    store_bits<kRun>(mask + tile / 8, left, (held | chosen) >> (8 * i) & 0xFF);
  }

  const int frozen = warp_sum(popc(held | chosen));
  if (lane == 0) st_shared(&shared->frozen[warp], frozen);
  sync_threads();
  if (thread == 0) {
    unsigned long long sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += static_cast<unsigned long long>(ld_shared(&shared->frozen[i]));
    if (sum != 0) atomic_add(p.all.frozen + index, sum);
  }
}

template <bool kRandom>
cudaError_t freeze_of(const FreezeParams& p, DType dtype, cudaStream_t stream) {
  char* const scratch = reinterpret_cast<char*>(p.frozen);
  const KernelParams params{p, reinterpret_cast<int*>(p.frozen + p.tensor_count),
                            reinterpret_cast<ChunkTies*>(scratch + freeze_ties_offset(p.tensor_count))};
  const cudaError_t status = launch_clear(scratch, freeze_scratch_bytes(p.tensor_count, p.chunks), stream);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(p.chunks));
  constexpr int kShared = sizeof(FreezeShared);
  switch (dtype) {
    case DType::float32:
      return launch(freeze<DType::float32, kRandom>, grid, kThreads, kShared, stream, params);
    case DType::bfloat16:
      return launch(freeze<DType::bfloat16, kRandom>, grid, kThreads, kShared, stream, params);
    case DType::float16:
      return launch(freeze<DType::float16, kRandom>, grid, kThreads, kShared, stream, params);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t quantize_with_mask(const FreezeParams& p, FreezeChoice choice, cudaStream_t stream) {
  if (p.tensor_count == 0) return cudaSuccess;
  return choice.random ? freeze_of<true>(p, choice.dtype, stream) : freeze_of<false>(p, choice.dtype, stream);
}

}  // namespace inq::cuda
