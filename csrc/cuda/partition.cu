// Which weights freeze next, and n1: a radix select over the bits of |w| (or random ranks), for all tensors of a list.
//
// The key of a weight is its |w| as the bits of a float32, 31 of them. Its first digit, 11 bits, is the exponent and
// the upper mantissa bits: counted with the sums of the bits below, it decides n1 too. The second pass over the weights
// counts the second digit of those that have the first one found, few, and lists their keys; the third digit is counted
// from the list. So fp32 weights are read twice, 16-bit ones too, which have no third digit.
//
// A third reading does what is left: n1 of rows, or what a mask holds, which n1 counts and a threshold does not; and, in
// the same pass, third digits where most weights have one first digit, so that the list has no room for them. With the
// freezing kernel that is four readings at most, whatever the weights are.
//
// Counters of a block are in shared memory, 32 bits wide, and are added to those of the tensor when the block is done;
// the last block of a tensor to be so selects the digit. Integers: the order of additions changes nothing.
#include "kernels.h"
#include "row_exponents.cuh"
#include "select.cuh"

namespace inq::cuda {
namespace {

// Threads of a block that counts first digits, and of one that counts those after: two and three blocks an SM.
constexpr int kFirstThreads = 512, kNextThreads = 256;
constexpr int kFirst = PartitionState::kFirst, kNext = PartitionState::kNext;
// A copy of the first digits' counters takes up to 2^14 weights (kPartitionChunk / kCopies): 15 bits of count above 17
// for the sum of the upper 3 bits below the digit. The lower 17 are summed in another counter.
constexpr int kLowBits = 17;
static_assert(kPartitionChunk / kCopies * ((1 << (kRestBits - kLowBits)) - 1) < 1 << kLowBits);
static_assert(kPartitionChunk / kCopies < 1 << (32 - kLowBits));
static_assert(kPartitionChunk / kCopies * ((int64_t{1} << kLowBits) - 1) < int64_t{1} << 32);

// What each launch of a partition has beside its parameters.
struct PassParams {
  PartitionParams all;
  Which which;
  bool selects;    // the first digit
  bool exponents;  // decides n1, of what was counted up to now
  bool mse;
  int launch;  // its number
};

// One thread: the result, once all digits are known (`wanted` is then the ties to take) or none is wanted.
template <DType kType, bool kRandom>
INQ_DEVICE void write_threshold(const PartitionParams& p, const Chunk& c, unsigned long long wanted) {
  int64_t key = 0x7FFFFFFFFFFFFFFF;
  if (wanted > 0) {
    const auto digits = static_cast<uint32_t>(ld_global(&c.state(p)->key));
    if constexpr (kRandom || kType == DType::float32) {
      key = digits;
    } else {
      const uint32_t bits = digits << Digits<kType, false>::kSecondShift;
      key = narrowed<kType>(bits_to_float(bits));
    }
  }
  int64_t* const out = p.thresholds + 2 * c.tensor;
  st_global(out, key);
  st_global(out + 1, static_cast<int64_t>(wanted));
}

// --- first digits ---------------------------------------------------------------------------------------------------------

template <bool kSums>
struct FirstCounts {
  static constexpr int kStride = kFirst + kCopyShift;
  uint32_t counts[kCopies][kStride];
  uint32_t sums[kSums ? kCopies : 1][kSums ? kStride : 4];

  INQ_DEVICE void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kCopies * kStride; i += kFirstThreads) {
      st_shared(&counts[0][0] + i, 0u);
      if constexpr (kSums) st_shared(&sums[0][0] + i, 0u);
    }
  }
  INQ_DEVICE void add(uint32_t key) {
    const uint32_t digit = key >> kRestBits, rest = key & ((1u << kRestBits) - 1);
    const int copy = static_cast<int>(threadIdx.x) % kCopies;
    if constexpr (kSums) {
      atomic_add(&counts[copy][digit], (1u << kLowBits) + (rest >> kLowBits));
      atomic_add(&sums[copy][digit], rest & ((1u << kLowBits) - 1));
    } else {
      atomic_add(&counts[copy][digit], 1u);
    }
  }
  // To those of the tensor, `part` 0 or 1, once all threads have counted.
  INQ_DEVICE void flush(PartitionState* state, int part) const {
    for (int d = static_cast<int>(threadIdx.x); d < kFirst; d += kFirstThreads) {
      unsigned long long count = 0, rest = 0;
      for (int i = 0; i < kCopies; ++i) {
        const uint32_t packed = ld_shared(&counts[i][d]);
        if constexpr (kSums) {
          count += packed >> kLowBits;
          rest += (static_cast<unsigned long long>(packed & ((1u << kLowBits) - 1)) << kLowBits) + ld_shared(&sums[i][d]);
        } else {
          count += packed;
        }
      }
      if (count != 0) atomic_add(&state->count[part][d], count);
      if (rest != 0) atomic_add(&state->rest[part][d], rest);
    }
  }
};

template <bool kSums>
struct FirstShared {
  FirstCounts<kSums> first;
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

// n1 of all rows of a tensor, from its first digits, by all threads of a block. `shared`: counters that are done with.
template <DType kType>
INQ_DEVICE void write_exponents(const PassParams& p, const Chunk& c, FirstShared<true>* shared) {
  auto* const slots = reinterpret_cast<Slot*>(&shared->first);
  static_assert((kSlots + 1) * sizeof(Slot) <= sizeof(shared->first));
  gather_slots(c.state(p.all), slots);
  const ExponentRule rule{p.all.format, p.mse, kLowest<kType>, kHighest<kType>};
  const int n1 = exponent_of<kFirstThreads>(slots, rule, &shared->select.exponent);
  const int64_t first = ld_global(&c.t(p.all)->first_row), rows = ld_global(&c.t(p.all)->rows);
#pragma unroll 1
  for (int64_t r = threadIdx.x; r < rows; r += kFirstThreads) st_global(p.all.n1 + first + r, static_cast<int8_t>(n1));
}

// Tiles whose loads are in flight together.
constexpr int kAhead = 2;

// Counts candidates in part 0 of the tensor's counters, others in part 1.
template <DType kType, bool kRandom, bool kSums>
__global__ void __launch_bounds__(kFirstThreads, 2) count_first(const __grid_constant__ PassParams p) {
  auto* const shared = reinterpret_cast<FirstShared<kSums>*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  const Chunk c = chunk_of_block(p.all);

  shared->first.clear();
  sync_threads();
  const KeyReader<kType, kRandom> reader(c.t(p.all), c, p.which);
  int held = 0;
  for (int64_t tile = c.begin + warp_of_thread() * kTile; tile < c.end; tile += kAhead * kFirstThreads / 32 * kTile) {
    uint32_t keys[kAhead][8], taken[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t next = tile + a * kFirstThreads / 32 * kTile;
      uint32_t frozen = 0;
      taken[a] = next < c.end ? reader.read(next, keys[a], frozen) : 0;
      held += popc(frozen);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (taken[a] >> j & 1) shared->first.add(keys[a][j]);
      }
    }
  }
  held = warp_sum(held);
  if (p.which == Which::candidates && held != 0 && lane_of_thread() == 0) {
    atomic_add(&c.state(p.all)->held, static_cast<unsigned long long>(held));
  }
  sync_threads();
  shared->first.flush(c.state(p.all), p.which == Which::candidates ? 0 : 1);

  if (!is_last_block(&c.state(p.all)->arrivals[p.launch], c.blocks(p.all), &shared->select.last)) return;
  if (p.selects) {
    const auto count = static_cast<unsigned long long>(larger<int64_t>(ld_global(&c.t(p.all)->count), 0));
    const unsigned long long wanted =
        find_digit<kFirst, kFirstThreads>(c.state(p.all)->count[0], count, &shared->select);
    if (thread == 0) {
      if (wanted > 0) add_digit(c.state(p.all), 0, wanted, &shared->select);
      if (wanted == 0) write_threshold<kType, kRandom>(p.all, c, 0);
    }
  }
  if constexpr (kSums) {
    // Where the mask holds some, count_rest decides.
    if (p.exponents && (p.which != Which::candidates || ld_global(&c.state(p.all)->held) == 0)) {
      write_exponents<kType>(p, c, shared);
    }
  }
}

// --- the second digit -------------------------------------------------------------------------------------------------------

// Keys that a warp keeps until there are enough to write: one addition to the tensor's counter for hundreds.
constexpr int kStage = 512;

struct SecondShared {
  NextCounts next;
  uint32_t stage[kNextThreads / 32][kStage];
  SelectShared<kNextThreads> select;
};

// The part of a tensor's list that one warp adds. Written rarely: what that takes is read then.
struct Lister {
  uint32_t* stage;
  PartitionState* state;
  const WeightTensor* t;
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
    if (lane_of_thread() == 0) first = atomic_add(&state->listed, static_cast<unsigned long long>(staged));
    first = shuffle(first, 0);
    uint32_t* const list = ld_global(&t->list);
    const int64_t capacity = ld_global(&t->capacity);
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
  auto* const shared = reinterpret_cast<SecondShared*>(dynamic_shared());
  const Chunk c = chunk_of_block(p.all);
  if (ld_global(&c.state(p.all)->wanted) == 0) return;
  shared->next.clear<kNextThreads>();
  sync_threads();
  const auto prefix = static_cast<uint32_t>(ld_global(&c.state(p.all)->key));
  Lister lister{shared->stage[warp_of_thread()], c.state(p.all), c.t(p.all)};
  const bool lists = D::kThird && static_cast<int64_t>(ld_global(&c.state(p.all)->left)) <= ld_global(&c.t(p.all)->capacity);
  const KeyReader<kType, kRandom> reader(c.t(p.all), c, Which::candidates);
  for (int64_t tile = c.begin + warp_of_thread() * kTile; tile < c.end; tile += kAhead * kNextThreads / 32 * kTile) {
    uint32_t keys[kAhead][8], chosen[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t next = tile + a * kNextThreads / 32 * kTile;
      uint32_t frozen;
      chosen[a] = next < c.end ? reader.read(next, keys[a], frozen) : 0;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (keys[a][j] >> kRestBits != prefix) chosen[a] &= ~(1u << j);
        if (chosen[a] >> j & 1) {
          shared->next.add(keys[a][j] >> D::kSecondShift & ((1 << D::kSecondBits) - 1));
        }
      }
      if (lists && any(chosen[a] != 0)) lister.add(keys[a], chosen[a]);
    }
  }
  if (lists && lister.staged > 0) lister.write();
  sync_threads();
  shared->next.flush<kNextThreads>(c.state(p.all)->next[0]);

  if (!is_last_block(&c.state(p.all)->arrivals[p.launch], c.blocks(p.all), &shared->select.last)) return;
  const unsigned long long wanted =
      find_digit<kNext, kNextThreads>(c.state(p.all)->next[0], ld_global(&c.state(p.all)->wanted), &shared->select);
  if (threadIdx.x == 0) {
    add_digit(c.state(p.all), D::kSecondBits, wanted, &shared->select);
    if (!D::kThird) write_threshold<kType, kRandom>(p.all, c, ld_global(&c.state(p.all)->wanted));
  }
}

// --- the rest, and the third digit ------------------------------------------------------------------------------------------

template <bool kSums>
struct RestShared {
  NextCounts third;
  FirstShared<true> held;
};
template <>
struct RestShared<false> {
  NextCounts third;
};

// One reading for what the passes before could not count: third digits where the list had no room and, for n1 (kSums),
// what the mask holds. Mostly there is neither.
template <DType kType, bool kRandom, bool kSums>
__global__ void __launch_bounds__(kFirstThreads, 2) count_rest(const __grid_constant__ PassParams p) {
  auto* const shared = reinterpret_cast<RestShared<kSums>*>(dynamic_shared());
  const Chunk c = chunk_of_block(p.all);
  const bool thirds = Digits<kType, kRandom>::kThird && has_no_list(c.state(p.all));
  const bool held = kSums && ld_global(&c.state(p.all)->held) != 0;
  if (!thirds && !held) return;
  shared->third.template clear<kFirstThreads>();
  if constexpr (kSums) shared->held.first.clear();
  sync_threads();
  const auto prefix = static_cast<uint32_t>(ld_global(&c.state(p.all)->key));
  const KeyReader<kType, kRandom> reader(c.t(p.all), c, !held ? Which::candidates : thirds ? Which::kept : Which::held);
  for (int64_t tile = c.begin + warp_of_thread() * kTile; tile < c.end; tile += kFirstThreads / 32 * kTile) {
    uint32_t keys[8], frozen;
    const uint32_t taken = reader.read(tile, keys, frozen);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if ((taken >> j & 1) == 0) continue;
      if ((frozen >> j & 1) == 0) {
        count_third_digit(shared->third, keys[j], prefix);
      } else if constexpr (kSums) {
        shared->held.first.add(keys[j]);
      }
    }
  }
  sync_threads();
  if (thirds) shared->third.template flush<kFirstThreads>(c.state(p.all)->next[1]);
  if constexpr (kSums) {
    if (!held) return;
    shared->held.first.flush(c.state(p.all), 1);
    if (!is_last_block(&c.state(p.all)->arrivals[p.launch], c.blocks(p.all), &shared->held.select.last)) return;
    write_exponents<kType>(p, c, &shared->held);
  }
}

struct ThirdShared {
  NextCounts third;
  SelectShared<kNextThreads> select;
};

// The third digit, counted here from the list, or before from the weights. Keys are whole now.
__global__ void __launch_bounds__(kNextThreads) count_third(const __grid_constant__ PassParams p) {
  auto* const shared = reinterpret_cast<ThirdShared*>(dynamic_shared());
  const Chunk c = chunk_of_block(p.all);
  if (ld_global(&c.state(p.all)->wanted) == 0) return;
  const auto listed = static_cast<int64_t>(ld_global(&c.state(p.all)->listed));
  if (listed > 0) {
    shared->third.clear<kNextThreads>();
    sync_threads();
    const auto prefix = static_cast<uint32_t>(ld_global(&c.state(p.all)->key));
    // The tensor's blocks share its list.
    const uint32_t* const list = ld_global(&c.t(p.all)->list);
    const int blocks = c.blocks(p.all);
    const int64_t end = listed * (c.number + 1) / blocks;
    for (int64_t i = listed * c.number / blocks + threadIdx.x; i < end; i += kNextThreads) {
      count_third_digit(shared->third, ld_global(list + i), prefix);
    }
    sync_threads();
    shared->third.flush<kNextThreads>(c.state(p.all)->next[1]);
  }
  if (!is_last_block(&c.state(p.all)->arrivals[p.launch], c.blocks(p.all), &shared->select.last)) return;
  const unsigned long long wanted =
      find_digit<kNext, kNextThreads>(c.state(p.all)->next[1], ld_global(&c.state(p.all)->wanted), &shared->select);
  if (threadIdx.x == 0) {
    add_digit(c.state(p.all), kThirdBits, wanted, &shared->select);
    write_threshold<DType::float32, false>(p.all, c, ld_global(&c.state(p.all)->wanted));
  }
}

// --- launches ---------------------------------------------------------------------------------------------------------------

template <DType kType>
cudaError_t partition_of(const PartitionParams& p, PartitionChoice choice, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.chunks));
  const bool selects = p.thresholds != nullptr, exponents = p.n1 != nullptr;
  PassParams pass{p, Which::candidates, selects, false, choice.mse, 0};
  cudaError_t status = cudaSuccess;
  // Each launch has a counter of arrivals of its own.
  const auto run = [&](auto kernel, int threads, int shared_bytes) {
    if (status == cudaSuccess) status = launch(kernel, grid, threads, shared_bytes, stream, pass);
    ++pass.launch;
  };
  const auto run_rows = [&](PartitionState* states) {
    const RowParams rows{p.tensors, p.tensor_count, states, p.n1, p.format, choice.mse};
    const dim3 blocks(static_cast<unsigned>(p.rows));
    if (status == cudaSuccess && p.rows > 0) {
      status = launch(row_exponents<kType>, blocks, kRowThreads, sizeof(RowShared), stream, rows);
    }
  };
  if (exponents && choice.channel && (!selects || choice.random)) {
    run_rows(nullptr);
    if (!selects) return status;
  }
  if (status == cudaSuccess) {
    status = launch_clear(p.states, p.tensor_count * static_cast<int64_t>(sizeof(PartitionState)), stream);
  }
  if (exponents && !choice.channel && (!selects || choice.random)) {
    // n1 is that of all weights, and no digits are shared.
    pass.which = Which::kept, pass.selects = false, pass.exponents = true;
    run(count_first<kType, false, true>, kFirstThreads, sizeof(FirstShared<true>));
    if (!selects) return status;
    pass.which = Which::candidates, pass.selects = true, pass.exponents = false;
  }
  if (choice.random) {
    // Ranks follow from places: no weight is read.
    constexpr DType kRank = DType::float32;
    run(count_first<kRank, true, false>, kFirstThreads, sizeof(FirstShared<false>));
    run(count_second<kRank, true>, kNextThreads, sizeof(SecondShared));
    run(count_rest<kRank, true, false>, kFirstThreads, sizeof(RestShared<false>));
    run(count_third, kNextThreads, sizeof(ThirdShared));
    return status;
  }
  constexpr bool kThird = Digits<kType, false>::kThird;
  pass.exponents = exponents && !choice.channel;
  if (pass.exponents) {
    run(count_first<kType, false, true>, kFirstThreads, sizeof(FirstShared<true>));
  } else {
    run(count_first<kType, false, false>, kFirstThreads, sizeof(FirstShared<false>));
  }
  run(count_second<kType, false>, kNextThreads, sizeof(SecondShared));
  if (pass.exponents) {
    run(count_rest<kType, false, true>, kFirstThreads, sizeof(RestShared<true>));
  } else if (exponents) {
    run_rows(p.states);
  } else if constexpr (kThird) {
    run(count_rest<kType, false, false>, kFirstThreads, sizeof(RestShared<false>));
  }
  if constexpr (kThird) run(count_third, kNextThreads, sizeof(ThirdShared));
  return status;
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
