// Which weights freeze next, and n1: a radix select over the bits of |w| (or random ranks), for all tensors of a list.
//
// The key of a weight is its |w| as the bits of a float32, 31 of them. Its first digit, 11 bits, is the exponent and
// the upper mantissa bits: counted with the sums of the bits below, it decides n1 too. The second pass over the weights
// counts the second digit of those that have the first one found, few, and lists their keys; the third digit is counted
// from the list. So fp32 weights are read twice, 16-bit ones too, which have no third digit. Where most weights have
// one first digit, the list has no room and the third digit is counted from the weights.
//
// Counters of a block are in shared memory, 32 bits wide, and are added to those of the tensor when the block is done;
// the last block of a tensor to be so selects the digit. Integers: the order of additions changes nothing.
#include "blocks.cuh"
#include "exponents.cuh"
#include "kernels.h"
#include "row_exponents.cuh"

namespace inq::cuda {
namespace {

// Threads of a block that counts first digits, and of one that counts those after: two and three blocks an SM.
constexpr int kFirstThreads = 512, kNextThreads = 256;
constexpr int kFirst = PartitionState::kFirst, kNext = PartitionState::kNext;
// Bits below the first digit.
constexpr int kRestBits = 20;
// A copy of the first digits' counters takes up to 2^14 weights (kPartitionChunk / kCopies): 15 bits of count above 17
// for the sum of the upper 3 bits below the digit. The lower 17 are summed in another counter.
constexpr int kLowBits = 17;
static_assert(kPartitionChunk / kCopies * ((1 << (kRestBits - kLowBits)) - 1) < 1 << kLowBits);
static_assert(kPartitionChunk / kCopies < 1 << (32 - kLowBits));
static_assert(kPartitionChunk / kCopies * ((int64_t{1} << kLowBits) - 1) < int64_t{1} << 32);

// Digits after the first. A widened bfloat16 or float16 ends in zeros.
template <DType kType, bool kRandom>
struct Digits {
  static constexpr bool kWhole = kRandom || kType == DType::float32;
  static constexpr int kSecondBits = kWhole ? 10 : kType == DType::bfloat16 ? 4 : 7;
  static constexpr int kSecondShift = kRestBits - kSecondBits;
  static constexpr bool kThird = kWhole;
};

// Which weights a pass counts, and where: candidates in part 0 of the counters, others in part 1.
enum class Which : int { candidates, held, kept };

// What each launch of a partition has beside its parameters.
struct PassParams {
  PartitionParams all;
  Which which;
  bool selects;    // the first digit
  bool exponents;  // decides n1, of what was counted up to now
  bool mse;
  int launch;  // its number
};

template <int kThreads>
struct SelectShared {
  SumShared<kThreads> sums;
  unsigned long long total, above, count;
  int digit, last;
  ExponentShared exponent;
};

// What a block works on.
struct Chunk {
  const WeightTensor* t;
  PartitionState* state;
  int64_t numel, begin, end;  // weights
  int64_t number, blocks;     // this one, and how many of the tensor's there are
};

INQ_DEVICE Chunk chunk_of_block(const PartitionParams& p) {
  Chunk c;
  c.t = tensor_of(p.tensors, p.tensor_count, &WeightTensor::first_chunk, blockIdx.x);
  c.state = p.states + (c.t - p.tensors);
  c.numel = ld_global(&c.t->numel);
  c.number = static_cast<int64_t>(blockIdx.x) - ld_global(&c.t->first_chunk);
  c.blocks = chunks_of(c.numel, p.chunk);
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

  INQ_DEVICE KeyReader(const Chunk& c, Which which)
      : w(static_cast<const T*>(ld_global(&c.t->w))),
        mask(ld_global(&c.t->mask)),
        keep(ld_global(&c.t->keep)),
        numel(c.numel),
        seed(ld_global(&c.t->seed)),
        aligned(is_aligned(w)),
        which(which) {}

  // Keys of weights that are not taken mean nothing. `held`: how many the mask holds back.
  INQ_DEVICE uint32_t read(int64_t tile, uint32_t (&keys)[8], int& held) const {
    const int64_t left = numel - tile;
    uint32_t taken = bits_inside<kRun>(0, left);
    if (keep != nullptr) taken &= load_bits<kRun>(keep + tile / 8, left);
    if (mask != nullptr && which != Which::kept) {
      const uint32_t frozen = load_bits<kRun>(mask + tile / 8, left);
      held += popc(taken & frozen);
      taken &= which == Which::held ? frozen : ~frozen;
    }
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

// Which of kBins digits the `wanted`-th of all that are counted has, from the largest down: left in `shared`, with how
// many are above and how many have it. More than there are means all of them. Returns how many are wanted then.
template <int kBins, int kThreads>
INQ_DEVICE unsigned long long find_digit(const unsigned long long* counters, unsigned long long wanted,
                                         SelectShared<kThreads>* shared) {
  constexpr int kEach = kBins / kThreads;
  const int uppermost = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  unsigned long long mine[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += mine[i] = ld_global(counters + uppermost - i);
  const Sums sums = block_sums<kThreads>(sum, &shared->sums);
  wanted = smaller(wanted, sums.all);
  unsigned long long above = sums.before;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (above < wanted && wanted <= above + mine[i]) {
      st_shared(&shared->digit, uppermost - i);
      st_shared(&shared->above, above);
      st_shared(&shared->count, mine[i]);
    }
    above += mine[i];
  }
  sync_threads();
  return wanted;
}

// One thread: the selection with one digit of `bits` more.
template <int kThreads>
INQ_DEVICE void add_digit(PartitionState* state, int bits, unsigned long long wanted,
                          const SelectShared<kThreads>* shared) {
  st_global(&state->key, ld_global(&state->key) << bits | static_cast<unsigned>(ld_shared(&shared->digit)));
  st_global(&state->wanted, wanted - ld_shared(&shared->above));
  st_global(&state->left, ld_shared(&shared->count));
}

// One thread: the result, once all digits are known (`wanted` is then the ties to take) or none is wanted.
template <DType kType, bool kRandom>
INQ_DEVICE void write_threshold(const PartitionParams& p, const Chunk& c, unsigned long long wanted) {
  int64_t key = 0x7FFFFFFFFFFFFFFF;
  if (wanted > 0) {
    const auto digits = static_cast<uint32_t>(ld_global(&c.state->key));
    if constexpr (kRandom || kType == DType::float32) {
      key = digits;
    } else {
      const uint32_t bits = digits << Digits<kType, false>::kSecondShift;
      key = narrowed<kType>(bits_to_float(bits));
    }
  }
  int64_t* const out = p.thresholds + 2 * (c.t - p.tensors);
  st_global(out, key);
  st_global(out + 1, static_cast<int64_t>(wanted));
}

// --- the first digit ------------------------------------------------------------------------------------------------------

template <bool kSums>
struct FirstShared {
  static constexpr int kStride = kFirst + kCopyShift;
  uint32_t counts[kCopies][kStride];
  uint32_t sums[kSums ? kCopies : 1][kSums ? kStride : 4];
  SelectShared<kFirstThreads> select;
};

// The octaves' halves from first digits: eight a binade, of both parts.
INQ_DEVICE void gather_slots(const PartitionState* state, Slot* slots) {
  for (int s = static_cast<int>(threadIdx.x); s <= kTiny; s += kFirstThreads) {
    // Subnormals: digits 4 to 7 are an octave with its leading bit in the digit, those below are tiny.
    const int first = s == kTiny ? 0 : s < 2 ? 4 + 2 * s : 4 * s;
    const int end = first + (s < 2 ? 2 : 4);
    Slot slot{0, 0};
#pragma unroll 1
    for (int d = first; d < end; ++d) {
      for (int part = 0; part < 2; ++part) {
        const unsigned long long count = ld_global(&state->count[part][d]), rest = ld_global(&state->rest[part][d]);
        if (s == kTiny) {
          slot.count += d == 0 ? (rest != 0 ? 1 : 0) : count;
        } else {
          const auto top = static_cast<unsigned long long>(d < 8 ? d : 8 + d % 8) << kRestBits;
          slot.count += count;
          slot.sum += (count * top + rest) << (d < 8 ? 1 : 0);
        }
      }
    }
    st_shared(slots + s, slot);
  }
  sync_threads();
}

// Tiles whose loads are in flight together.
constexpr int kAhead = 2;

template <DType kType, bool kRandom, bool kSums>
__global__ void __launch_bounds__(kFirstThreads) count_first(const __grid_constant__ PassParams p) {
  using Shared = FirstShared<kSums>;
  auto* const shared = reinterpret_cast<Shared*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), copy = thread % kCopies;
  const Chunk c = chunk_of_block(p.all);
  const int part = p.which == Which::candidates ? 0 : 1;
  // Mostly there is none: then n1 is decided already.
  if (p.which == Which::held && ld_global(&c.state->held) == 0) return;

  for (int i = thread; i < kCopies * Shared::kStride; i += kFirstThreads) {
    st_shared(&shared->counts[0][0] + i, 0u);
    if constexpr (kSums) st_shared(&shared->sums[0][0] + i, 0u);
  }
  sync_threads();
  const KeyReader<kType, kRandom> reader(c, p.which);
  int held = 0;
  for (int64_t tile = c.begin + warp_of_thread() * kTile; tile < c.end; tile += kAhead * kFirstThreads / 32 * kTile) {
    uint32_t keys[kAhead][8], taken[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t next = tile + a * kFirstThreads / 32 * kTile;
      taken[a] = next < c.end ? reader.read(next, keys[a], held) : 0;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if ((taken[a] >> j & 1) == 0) continue;
        const uint32_t digit = keys[a][j] >> kRestBits, rest = keys[a][j] & ((1u << kRestBits) - 1);
        if constexpr (kSums) {
          atomic_add(&shared->counts[copy][digit], (1u << kLowBits) + (rest >> kLowBits));
          atomic_add(&shared->sums[copy][digit], rest & ((1u << kLowBits) - 1));
        } else {
          atomic_add(&shared->counts[copy][digit], 1u);
        }
      }
    }
  }
  held = warp_sum(held);
  if (p.which == Which::candidates && held != 0 && lane_of_thread() == 0) {
    atomic_add(&c.state->held, static_cast<unsigned long long>(held));
  }
  sync_threads();
  for (int d = thread; d < kFirst; d += kFirstThreads) {
    unsigned long long count = 0, rest = 0;
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t packed = ld_shared(&shared->counts[i][d]);
      if constexpr (kSums) {
        count += packed >> kLowBits;
        rest += (static_cast<unsigned long long>(packed & ((1u << kLowBits) - 1)) << kLowBits) +
                ld_shared(&shared->sums[i][d]);
      } else {
        count += packed;
      }
    }
    if (count != 0) atomic_add(&c.state->count[part][d], count);
    if (rest != 0) atomic_add(&c.state->rest[part][d], rest);
  }

  if (!is_last_block(&c.state->arrivals[p.launch], c.blocks, &shared->select.last)) return;
  if (p.selects) {
    const auto count = static_cast<unsigned long long>(larger<int64_t>(ld_global(&c.t->count), 0));
    const unsigned long long wanted =
        find_digit<kFirst, kFirstThreads>(c.state->count[0], count, &shared->select);
    if (thread == 0) {
      if (wanted > 0) add_digit(c.state, 0, wanted, &shared->select);
      if (wanted == 0) write_threshold<kType, kRandom>(p.all, c, 0);
    }
  }
  if constexpr (kSums) {
    // The pass over what the mask holds decides where there is some.
    if (!p.exponents || (p.which == Which::candidates && ld_global(&c.state->held) != 0)) return;
    auto* const slots = reinterpret_cast<Slot*>(&shared->counts[0][0]);
    static_assert((kSlots + 1) * sizeof(Slot) <= sizeof(shared->counts));
    gather_slots(c.state, slots);
    const ExponentRule rule{p.all.format, p.mse, kLowest<kType>, kHighest<kType>};
    const int n1 = exponent_of<kFirstThreads>(slots, rule, &shared->select.exponent);
    const int64_t first = ld_global(&c.t->first_row), rows = ld_global(&c.t->rows);
#pragma unroll 1
    for (int64_t r = thread; r < rows; r += kFirstThreads) st_global(p.all.n1 + first + r, static_cast<int8_t>(n1));
  }
}

// --- the digits after it ----------------------------------------------------------------------------------------------------

// Keys that a warp keeps until there are enough to write: one addition to the tensor's counter for hundreds.
constexpr int kStage = 512;

struct NextShared {
  static constexpr int kStride = kNext + kCopyShift;
  uint32_t counts[kCopies][kStride];
  uint32_t stage[kNextThreads / 32][kStage];
  SelectShared<kNextThreads> select;
};

INQ_DEVICE void clear_counts(NextShared* shared) {
  for (int i = static_cast<int>(threadIdx.x); i < kCopies * NextShared::kStride; i += kNextThreads) {
    st_shared(&shared->counts[0][0] + i, 0u);
  }
  sync_threads();
}

INQ_DEVICE void add_counts(NextShared* shared, unsigned long long* counters) {
  sync_threads();
  for (int d = static_cast<int>(threadIdx.x); d < kNext; d += kNextThreads) {
    unsigned long long count = 0;
    for (int i = 0; i < kCopies; ++i) count += ld_shared(&shared->counts[i][d]);
    if (count != 0) atomic_add(counters + d, count);
  }
}

// The part of a tensor's list that one warp adds. Written rarely: what that takes is read then.
struct Lister {
  uint32_t* stage;
  const Chunk& c;
  int staged = 0;

  INQ_DEVICE void add(const uint32_t (&keys)[8], uint32_t chosen) {
    const int mine = popc(chosen), through = warp_sum_through(mine), all = shuffle(through, 31);
    if (staged + all > kStage) write();
    int at = staged + through - mine;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (chosen >> j & 1) st_shared(stage + at++, keys[j]);
    }
    staged += all;
  }

  INQ_DEVICE void write() {
    sync_warp();
    unsigned long long first = 0;
    if (lane_of_thread() == 0) first = atomic_add(&c.state->listed, static_cast<unsigned long long>(staged));
    first = shuffle(first, 0);
    uint32_t* const list = ld_global(&c.t->list);
    const int64_t capacity = ld_global(&c.t->capacity);
    for (int i = lane_of_thread(); i < staged; i += 32) {
      // There is room, unless somebody writes to the weights meanwhile.
      const auto at = static_cast<int64_t>(first) + i;
      if (at < capacity) st_global(list + at, ld_shared(stage + i));
    }
    sync_warp();
    staged = 0;
  }
};

template <DType kType, bool kRandom>
__global__ void __launch_bounds__(kNextThreads, 3) count_second(const __grid_constant__ PassParams p) {
  using D = Digits<kType, kRandom>;
  auto* const shared = reinterpret_cast<NextShared*>(dynamic_shared());
  const int copy = static_cast<int>(threadIdx.x) % kCopies;
  const Chunk c = chunk_of_block(p.all);
  if (ld_global(&c.state->wanted) == 0) return;
  clear_counts(shared);
  const auto prefix = static_cast<uint32_t>(ld_global(&c.state->key));
  Lister lister{shared->stage[warp_of_thread()], c};
  const bool lists = D::kThird && static_cast<int64_t>(ld_global(&c.state->left)) <= ld_global(&c.t->capacity);
  const KeyReader<kType, kRandom> reader(c, Which::candidates);
  int held = 0;
  for (int64_t tile = c.begin + warp_of_thread() * kTile; tile < c.end; tile += kAhead * kNextThreads / 32 * kTile) {
    uint32_t keys[kAhead][8], chosen[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t next = tile + a * kNextThreads / 32 * kTile;
      chosen[a] = next < c.end ? reader.read(next, keys[a], held) : 0;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (keys[a][j] >> kRestBits != prefix) chosen[a] &= ~(1u << j);
        if (chosen[a] >> j & 1) {
          atomic_add(&shared->counts[copy][keys[a][j] >> D::kSecondShift & ((1 << D::kSecondBits) - 1)], 1u);
        }
      }
      if (lists && any(chosen[a] != 0)) lister.add(keys[a], chosen[a]);
    }
  }
  if (lists && lister.staged > 0) lister.write();
  add_counts(shared, c.state->next[0]);

  if (!is_last_block(&c.state->arrivals[p.launch], c.blocks, &shared->select.last)) return;
  const unsigned long long wanted =
      find_digit<kNext, kNextThreads>(c.state->next[0], ld_global(&c.state->wanted), &shared->select);
  if (threadIdx.x == 0) {
    add_digit(c.state, D::kSecondBits, wanted, &shared->select);
    if (!D::kThird) write_threshold<kType, kRandom>(p.all, c, ld_global(&c.state->wanted));
  }
}

template <DType kType, bool kRandom>
__global__ void __launch_bounds__(kNextThreads) count_third(const __grid_constant__ PassParams p) {
  constexpr int kBits = 10;
  auto* const shared = reinterpret_cast<NextShared*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), copy = thread % kCopies;
  const Chunk c = chunk_of_block(p.all);
  if (ld_global(&c.state->wanted) == 0) return;
  clear_counts(shared);
  const auto prefix = static_cast<uint32_t>(ld_global(&c.state->key));
  const auto listed = static_cast<int64_t>(ld_global(&c.state->listed));
  if (listed > 0) {
    // The tensor's blocks share its list.
    const uint32_t* const list = ld_global(&c.t->list);
    for (int64_t i = listed * c.number / c.blocks + thread; i < listed * (c.number + 1) / c.blocks; i += kNextThreads) {
      const uint32_t key = ld_global(list + i);
      if (key >> kBits == prefix) atomic_add(&shared->counts[copy][key & (kNext - 1)], 1u);
    }
  } else {
    const KeyReader<kType, kRandom> reader(c, Which::candidates);
    int held = 0;
    for (int64_t tile = c.begin + warp_of_thread() * kTile; tile < c.end; tile += kNextThreads / 32 * kTile) {
      uint32_t keys[8];
      const uint32_t taken = reader.read(tile, keys, held);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if ((taken >> j & 1) != 0 && keys[j] >> kBits == prefix) {
          atomic_add(&shared->counts[copy][keys[j] & (kNext - 1)], 1u);
        }
      }
    }
  }
  add_counts(shared, c.state->next[1]);

  if (!is_last_block(&c.state->arrivals[p.launch], c.blocks, &shared->select.last)) return;
  const unsigned long long wanted =
      find_digit<kNext, kNextThreads>(c.state->next[1], ld_global(&c.state->wanted), &shared->select);
  if (thread == 0) {
    add_digit(c.state, kBits, wanted, &shared->select);
    write_threshold<kType, kRandom>(p.all, c, ld_global(&c.state->wanted));
  }
}

// --- launches ---------------------------------------------------------------------------------------------------------------

template <DType kType, bool kRandom>
cudaError_t launch_next(PassParams pass, dim3 grid, cudaStream_t stream) {
  cudaError_t status = launch(count_second<kType, kRandom>, grid, kNextThreads, sizeof(NextShared), stream, pass);
  if constexpr (Digits<kType, kRandom>::kThird) {
    ++pass.launch;
    if (status == cudaSuccess) {
      status = launch(count_third<kType, kRandom>, grid, kNextThreads, sizeof(NextShared), stream, pass);
    }
  }
  return status;
}

template <DType kType>
cudaError_t partition_of(const PartitionParams& p, PartitionChoice choice, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.chunks));
  const bool selects = p.thresholds != nullptr;
  PassParams pass{p, Which::candidates, selects, p.n1 != nullptr, choice.mse, 0};
  cudaError_t status = cudaSuccess;
  if (pass.exponents && choice.channel) {
    const RowParams rows{p.tensors, p.tensor_count, p.n1, p.format, choice.mse};
    if (p.rows > 0) {
      status = launch(row_exponents<kType>, dim3(static_cast<unsigned>(p.rows)), kRowThreads, sizeof(RowShared), stream,
                      rows);
    }
    if (status != cudaSuccess || !selects) return status;
    pass.exponents = false;
  }
  status = launch_clear(p.states, p.tensor_count * static_cast<int64_t>(sizeof(PartitionState)), stream);
  if (status != cudaSuccess) return status;
  const auto first = [&](auto kernel, int shared_bytes) {
    if (status == cudaSuccess) status = launch(kernel, grid, kFirstThreads, shared_bytes, stream, pass);
    ++pass.launch;
  };
  if (pass.exponents && (choice.random || !selects)) {
    // n1 is that of all weights, and no digits are shared.
    pass.which = Which::kept;
    pass.selects = false;
    first(count_first<kType, false, true>, sizeof(FirstShared<true>));
    pass.exponents = false;
    pass.which = Which::candidates;
    pass.selects = selects;
  }
  if (!selects) return status;
  if (choice.random) {
    first(count_first<DType::float32, true, false>, sizeof(FirstShared<false>));
    return status == cudaSuccess ? launch_next<DType::float32, true>(pass, grid, stream) : status;
  }
  if (pass.exponents) {
    first(count_first<kType, false, true>, sizeof(FirstShared<true>));
    pass.which = Which::held;
    pass.selects = false;
    first(count_first<kType, false, true>, sizeof(FirstShared<true>));
    pass.which = Which::candidates;
  } else {
    first(count_first<kType, false, false>, sizeof(FirstShared<false>));
  }
  return status == cudaSuccess ? launch_next<kType, false>(pass, grid, stream) : status;
}

}  // namespace

cudaError_t partition(const PartitionParams& p, PartitionChoice choice, cudaStream_t stream) {
  if (p.tensor_count == 0) return cudaSuccess;
  switch (choice.dtype) {
    case DType::float32:
      return partition_of<DType::float32>(p, choice, stream);
    case DType::bfloat16:
      return partition_of<DType::bfloat16>(p, choice, stream);
    case DType::float16:
      return partition_of<DType::float16>(p, choice, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace inq::cuda
