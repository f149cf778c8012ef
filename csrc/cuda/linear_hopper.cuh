// linear and linear_fp8 for 64 < M < 2048 on Hopper: weights decoded into the A operand of wgmma.
//
// A block has two groups of consumers and one of producers. A producer warp loads boxes of x (128 bytes of k for all
// tokens of the tile) by TMA, another slots of packed weights (two blocks of k for all rows of the tile) by bulk copies;
// each fills its own ring in shared memory, so that a box need not hold as much k as a slot. Consumers read packed words
// from a slot, decode them into registers and multiply them by the box: A from registers, B from shared memory. Two sets
// of A registers let the decoding of one weight block run beside the products of the one before it. Each group of
// consumers owns half of the tile's rows and waits for nobody but the rings: while one stores its sums, the other has
// the tensor cores.
//
// yᵀ is computed: rows of a tile are output features n, columns are tokens m.
#pragma once

#include "decode.cuh"
#include "epilogue.cuh"
#include "linear_hopper.h"

#include <type_traits>

#include "tensor_map.h"

// Device code for sm_90a alone: other architectures get an empty kernel that is never launched.
#if defined(INQ_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define INQ_HOPPER_CODE 1
#else
#define INQ_HOPPER_CODE 0
#endif

namespace inq::cuda {
namespace hopper {

constexpr int kGroups = 2, kThreads = 128 * (kGroups + 1);
// 24 · 128 + 240 · 256 registers are all but 1024 of a processor's.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

struct Params {
  TensorMap x;
  const uint8_t* weight;
  const int8_t* weight_exp;
  const float* weight_scale;
  const void* bias;
  const int32_t* rows_exp;
  void* out;
  float* partials;
  int* arrivals;
  int m, n;
  int exponent;  // sums are in units of 2^(weight_exp + exponent)
  Float bias_type, out_type;
  int row_blocks, k_blocks;   // blocks of the weight, along N and K
  int slots, split_slots;     // slots along K, and of a split: a multiple of a period
  int m_tiles, items, splits; // items: tiles times splits
  bool whole_stores;          // four neighbours of a row of out may be stored at once
};

// What follows from a codec, the 64-row pieces of a group and the tokens of a tile.
template <class Codec_, int kPieces_, int kTokens_>
struct Shape {
  using Codec = Codec_;
  static constexpr int kPieces = kPieces_, kTokens = kTokens_;
  static constexpr Product kProduct = static_cast<Product>(Codec::kNumber);
  // Sums of e4m3 products keep 14 bits in the tensor core: they begin anew for each slot, 128 k, and are added here.
  static constexpr bool kPromote = kProduct == Product::e4m3;
  static constexpr int kElementBytes = kPromote ? 1 : 2;
  static constexpr int kRows = 64 * kPieces * kGroups;
  // A step is the k of one wgmma, 32 bytes; a box of x has four.
  static constexpr int kBoxSteps = 4, kBoxK = 128 / kElementBytes, kBoxBytes = kTokens * 128;
  static constexpr int kSlotSteps = 2 * Codec::kSteps;
  static constexpr int kRowBlockBytes = 2 * Codec::kBlockBytes, kSlotBytes = kRows / 16 * kRowBlockBytes;
  // A period is the fewest slots that are whole boxes: at 5 bits for 16-bit types two, of 96 k each, and three boxes.
  static constexpr int kPeriodSlots = kSlotSteps % kBoxSteps == 0 ? 1 : 2;
  // As much k in each ring as shared memory has room for.
  static constexpr int kSharedBytes = 227 * 1024, kBarrierBytes = 1024;
  static constexpr int kStepBytes = kBoxBytes / kBoxSteps + (kSlotBytes + kSlotSteps - 1) / kSlotSteps;
  static constexpr int kDepth = (kSharedBytes - kBarrierBytes) / kStepBytes;
  static constexpr int kBoxes = kDepth / kBoxSteps, kSlots = kDepth / kSlotSteps;
  static_assert(kBoxes >= 3 && kSlots >= 2);

  // Offsets in shared memory. Boxes come first: a swizzle wants 1024-byte addresses.
  static constexpr int kSlotsAt = kBoxes * kBoxBytes, kBarriersAt = kSlotsAt + kSlots * kSlotBytes;
  static constexpr int kFlagsAt = kBarriersAt + 16 * (kBoxes + kSlots), kBytes = kFlagsAt + 4 * kGroups;
  static_assert(kBytes <= kSharedBytes);
};

#if INQ_HOPPER_CODE

// A ring of buffers between one producer warp and the consumers, as either side sees it: where it stands.
template <int kDepth>
struct Ring {
  Mbarrier* full;  // [kDepth], then `empty`
  int at = 0, parity = 0;

  INQ_DEVICE explicit Ring(Mbarrier* barriers) : full(barriers) {}
  INQ_DEVICE Mbarrier* filled() const { return full + at; }
  INQ_DEVICE Mbarrier* emptied() const { return full + kDepth + at; }
  INQ_DEVICE void wait_filled() const { mbarrier_wait(filled(), parity); }
  // The first round of a producer finds the phase before the first, which is over.
  INQ_DEVICE void wait_emptied() const { mbarrier_wait(emptied(), parity ^ 1); }
  // One arrival of each consumer warp, once all its lanes are done.
  INQ_DEVICE void release(int lane) const {
    if (lane == 0) mbarrier_arrive(emptied());
  }
  INQ_DEVICE void advance() {
    if (++at == kDepth) at = 0, parity ^= 1;
  }
};

template <class S>
INQ_DEVICE Ring<S::kBoxes> box_ring() {
  return Ring<S::kBoxes>(reinterpret_cast<Mbarrier*>(dynamic_shared() + S::kBarriersAt));
}
template <class S>
INQ_DEVICE Ring<S::kSlots> slot_ring() {
  return Ring<S::kSlots>(reinterpret_cast<Mbarrier*>(dynamic_shared() + S::kBarriersAt) + 2 * S::kBoxes);
}

// A block's next piece of work: a tile and the slots of its split.
struct Item {
  int tile, split, n, m, first, slots;
};
template <class S>
INQ_DEVICE Item item_of(const Params& p, int index) {
  Item item;
  item.tile = index / p.splits;
  item.split = index % p.splits;
  // Tiles of the same weights run next to each other and share them in the second-level cache.
  item.n = item.tile / p.m_tiles * S::kRows;
  item.m = item.tile % p.m_tiles * S::kTokens;
  item.first = item.split * p.split_slots;
  item.slots = max(min(p.slots - item.first, p.split_slots), 0);
  return item;
}

// --- producers ---------------------------------------------------------------------------------------------------------

// They have few registers: their loops are not unrolled.

template <class S>
INQ_DEVICE void load_boxes(const Params& p, int lane) {
  auto ring = box_ring<S>();
  if (lane != 0) return;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
    const Item item = item_of<S>(p, index);
    const int first = item.first * S::kSlotSteps / S::kBoxSteps;
    const int boxes = (item.slots * S::kSlotSteps + S::kBoxSteps - 1) / S::kBoxSteps;
#pragma unroll 1
    for (int box = first; box < first + boxes; ++box) {
      ring.wait_emptied();
      mbarrier_arrive_expect(ring.filled(), S::kBoxBytes);
      tma_load_2d(dynamic_shared() + ring.at * S::kBoxBytes, &p.x, box * S::kBoxK, item.m, ring.filled());
      ring.advance();
    }
  }
}

// Lane r loads row block r of a slot.
template <class S>
INQ_DEVICE void load_slots(const Params& p, int lane) {
  constexpr int kBlockBytes = S::Codec::kBlockBytes;
  auto ring = slot_ring<S>();
#pragma unroll 1
  for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
    const Item item = item_of<S>(p, index);
    // Past the end the last block comes again, so that all memory that is read holds numbers: rows past N are not
    // stored, and x is 0 past K.
    const int row_block = min(item.n / 16 + lane, p.row_blocks - 1);
    const uint8_t* row = p.weight + static_cast<int64_t>(row_block) * p.k_blocks * kBlockBytes;
#pragma unroll 1
    for (int slot = item.first; slot < item.first + item.slots; ++slot) {
      ring.wait_emptied();
      if (lane == 0) mbarrier_arrive_expect(ring.filled(), S::kSlotBytes);
      sync_warp();
      if (lane < S::kRows / 16) {
        char* to = dynamic_shared() + S::kSlotsAt + ring.at * S::kSlotBytes + lane * S::kRowBlockBytes;
        const uint8_t* from = row + static_cast<int64_t>(2 * slot) * kBlockBytes;
        if (2 * slot + 1 < p.k_blocks) {
          bulk_load(to, from, 2 * kBlockBytes, ring.filled());
        } else {
          bulk_load(to, from, kBlockBytes, ring.filled());
          bulk_load(to + kBlockBytes, from, kBlockBytes, ring.filled());
        }
      }
      ring.advance();
    }
  }
}

// --- consumers ---------------------------------------------------------------------------------------------------------

template <class S>
using Sums = float[S::kPieces][S::kTokens / 2];
// The A operands of one weight block for one piece.
template <class S>
using Operands = uint32_t[S::Codec::kSteps][4];

struct Thread {
  int group, warp, lane;  // warp: of its group, 0 to 3
};

// Block number `half` of a slot, for rows 16·warp… of a piece.
template <class S>
INQ_DEVICE void decode_block(Operands<S>& a, const char* slot, const Thread& t, int piece, int half) {
  using Codec = typename S::Codec;
  const int row_block = 4 * (t.group * S::kPieces + piece) + t.warp;
  const char* block = slot + row_block * S::kRowBlockBytes + half * Codec::kBlockBytes;
  const Four four = ld_shared(reinterpret_cast<const Four*>(block) + t.lane);
  uint32_t words[Codec::kWords] = {four.x, four.y, four.z, four.w};
  if constexpr (Codec::kWords == 5) words[4] = ld_shared(reinterpret_cast<const uint32_t*>(block + 512) + t.lane);
#pragma unroll
  for (int step = 0; step < Codec::kSteps; ++step) {
    Codec::decode(words, step, a[step]);
#pragma unroll
    for (uint32_t& r : a[step]) settle(r);
  }
}

// 16-bit products. The state of a consumer's main loop and its pieces; a "quarter" is one weight block, and a period has
// up to four.
template <class S>
struct Multiplier {
  static constexpr int kSteps = S::Codec::kSteps, kQuarters = 2 * S::kPeriodSlots;

  const Thread& thread;
  Ring<S::kBoxes> boxes = box_ring<S>();     // the box of the next step
  Ring<S::kBoxes> finished = box_ring<S>();  // the oldest box that is not released
  Ring<S::kSlots> slots = slot_ring<S>();

  INQ_DEVICE explicit Multiplier(const Thread& thread) : thread(thread) {}

  // Whether a box ends in a quarter: none holds two ends.
  template <int kQuarter>
  static constexpr bool kEndsBox = (kQuarter + 1) * kSteps / S::kBoxSteps > kQuarter * kSteps / S::kBoxSteps;

  INQ_DEVICE void release_box() {
    finished.release(thread.lane);
    finished.advance();
  }

  // Decodes a weight block beside the products of the last one, issues its own and waits for the last one's.
  template <int kQuarter>
  INQ_DEVICE void quarter(Sums<S>& sums, Operands<S> (&a)[S::kPieces], bool first) {
    if (kQuarter % 2 == 0) slots.wait_filled();
    const char* slot = dynamic_shared() + S::kSlotsAt + slots.at * S::kSlotBytes;
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) decode_block<S>(a[piece], slot, thread, piece, kQuarter % 2);
    if (kQuarter % 2 == 1) {
      sync_warp();
      slots.release(thread.lane);
      slots.advance();
    }
    // Steps of the box at hand, and where they go over into the next one.
    constexpr int kFirst = kQuarter * kSteps % S::kBoxSteps;
    constexpr int kHere = S::kBoxSteps - kFirst < kSteps ? S::kBoxSteps - kFirst : kSteps;
    const uint64_t here = wgmma_descriptor(dynamic_shared() + boxes.at * S::kBoxBytes) + 2 * kFirst;
    if (kFirst == 0) boxes.wait_filled();
    if (kFirst + kSteps >= S::kBoxSteps) boxes.advance();
    if (kHere < kSteps) boxes.wait_filled();
    const uint64_t next = wgmma_descriptor(dynamic_shared() + boxes.at * S::kBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // A step is 32 bytes, 2 in a descriptor.
      const uint64_t box = step < kHere ? here + 2 * step : next + 2 * (step - kHere);
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        wgmma<S::kProduct, S::kTokens>(sums[piece], a[piece][step], box, true);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (kEndsBox<(kQuarter + kQuarters - 1) % kQuarters> && (kQuarter > 0 || !first)) release_box();
  }

  INQ_DEVICE void run(Sums<S>& sums, int count) {
    // Named by the parity of a quarter: registers of products in flight stay as they are.
    Operands<S> even[S::kPieces], odd[S::kPieces];
    const int whole = count - count % S::kPeriodSlots;
    for (int slot = 0; slot < whole; slot += S::kPeriodSlots) {
      quarter<0>(sums, even, slot == 0);
      quarter<1>(sums, odd, slot == 0);
      if constexpr (kQuarters == 4) {
        quarter<2>(sums, even, slot == 0);
        quarter<3>(sums, odd, slot == 0);
      }
    }
    wgmma_wait<0>();
    if (whole > 0) release_box();
    // Half a period ends within a box.
    if (whole < count) {
      quarter<0>(sums, even, true);
      quarter<1>(sums, odd, true);
      wgmma_wait<0>();
      release_box();
      boxes.advance();
      release_box();
    }
  }
};

// e4m3 products: a slot is 128 k, a box, and as long as sums may stay in the tensor core.
template <class S>
struct PromotingMultiplier {
  const Thread& thread;
  Ring<S::kBoxes> boxes = box_ring<S>();
  Ring<S::kSlots> slots = slot_ring<S>();
  static_assert(!S::kPromote || S::kSlotSteps == S::kBoxSteps);

  INQ_DEVICE explicit PromotingMultiplier(const Thread& thread) : thread(thread) {}

  INQ_DEVICE void run(Sums<S>& sums, int count) {
    constexpr int kSteps = S::Codec::kSteps;
    Operands<S> a[2];
    float part[S::kTokens / 2] = {};
    for (int slot = 0; slot < count; ++slot) {
      slots.wait_filled();
      const char* packed = dynamic_shared() + S::kSlotsAt + slots.at * S::kSlotBytes;
      const uint64_t box = wgmma_descriptor(dynamic_shared() + boxes.at * S::kBoxBytes);
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          decode_block<S>(a[half], packed, thread, piece, half);
          if (piece == 0 && half == 0) boxes.wait_filled();
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            wgmma<S::kProduct, S::kTokens>(part, a[half][step], box + 2 * (half * kSteps + step), half + step > 0);
          }
          wgmma_commit();
        }
        if (piece == S::kPieces - 1) {
          sync_warp();
          slots.release(thread.lane);
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < S::kTokens / 2; ++i) sums[piece][i] = add(sums[piece][i], part[i]);
      }
      boxes.release(thread.lane);
      slots.advance();
      boxes.advance();
    }
  }
};

// --- epilogue ----------------------------------------------------------------------------------------------------------

// What a row of sums is multiplied by and gets added. Its power of two is two factors, bits of float32: one alone may be
// out of range.
struct Row {
  int first = exponent_bits(127), second = exponent_bits(127);
  float scale = 1, bias = 0;
};
// A token's part of both: bits to subtract.
struct Token {
  int first = 0, second = 0;
};

INQ_DEVICE Row load_row(const Params& p, int n) {
  Row row;
  if (n < p.n) {
    const int e = ld_global(p.weight_exp + n) + p.exponent;
    row.first = exponent_bits((e >> 1) + 127);
    row.second = exponent_bits(e - (e >> 1) + 127);
    if (p.weight_scale != nullptr) row.scale = ld_global(p.weight_scale + n);
    if (p.bias != nullptr) row.bias = load_float(p.bias, p.bias_type, n);
  }
  return row;
}

INQ_DEVICE Token load_token(const Params& p, int m) {
  if (m >= p.m) return {};
  const int t = ld_global(p.rows_exp + m);
  return {exponent_bits(t >> 1), exponent_bits(t - (t >> 1))};
}

template <class S>
INQ_DEVICE float finish(const Params& p, const Row& row, const Token& token, float sum) {
  int first = row.first, second = row.second;
  if constexpr (S::kPromote) {
    // Below 2^-126 is below 2^-252 together, which makes any sum 0, as less would.
    first = max(first - token.first, exponent_bits(1));
    second = max(second - token.second, exponent_bits(1));
  }
  float y = mul(mul(sum, bits_to_float(static_cast<uint32_t>(first))), bits_to_float(static_cast<uint32_t>(second)));
  if (p.weight_scale != nullptr) y = mul(y, row.scale);
  if (p.bias != nullptr) y = add(y, row.bias);
  return y;
}

// Rows n and n + 8 of a warp's 16, tokens m and m + 1 of eight, as 16-bit numbers: transposed, so that a lane has four
// neighbours of one token, and a warp's store 32 bytes of each of eight tokens.
INQ_DEVICE void store_16(const Params& p, const float (&y)[4], int warp_n, int warp_m, int lane) {
  const bool f16 = p.out_type == Float::f16;
  const uint32_t upper = movmatrix_trans(f16 ? to_f16x2(y[0], y[1]) : to_bf16x2(y[0], y[1]));
  const uint32_t lower = movmatrix_trans(f16 ? to_f16x2(y[2], y[3]) : to_bf16x2(y[2], y[3]));
  // Lane 4g + t has rows 2t and 2t + 1, and those plus 8, of token g. Neighbours swap: an even t has the upper rows of
  // both, an odd one the lower.
  const bool odd = lane & 1;
  const uint32_t other = shuffle_xor(odd ? upper : lower, 1);
  const Two four = odd ? Two{other, lower} : Two{upper, other};
  const int n = warp_n + (odd ? 8 : 0) + (lane & 2) * 2, m = warp_m + lane / 4;
  if (m >= p.m || n >= p.n) return;
  uint16_t* out = static_cast<uint16_t*>(p.out) + static_cast<int64_t>(m) * p.n + n;
  if (p.whole_stores) {
    st_global(reinterpret_cast<Two*>(out), four);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = i < 2 ? four.x : four.y;
      if (n + i < p.n) st_global(out + i, static_cast<uint16_t>(i % 2 ? pair >> 16 : pair & 0xFFFF));
    }
  }
}

INQ_DEVICE void store_32(const Params& p, const float (&y)[4], int n, int m) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = n + i / 2 * 8, token = m + i % 2;
    if (row < p.n && token < p.m) st_global(static_cast<float*>(p.out) + static_cast<int64_t>(token) * p.n + row, y[i]);
  }
}

template <class S>
INQ_DEVICE void store(const Params& p, const Sums<S>& sums, const Item& item, const Thread& t) {
  const int n = item.n + 64 * t.group * S::kPieces + 16 * t.warp;
  Row rows[S::kPieces][2];
#pragma unroll
  for (int piece = 0; piece < S::kPieces; ++piece) {
    rows[piece][0] = load_row(p, n + 64 * piece + t.lane / 4);
    rows[piece][1] = load_row(p, n + 64 * piece + t.lane / 4 + 8);
  }
#pragma unroll
  for (int i = 0; i < S::kTokens / 8; ++i) {
    const int m = item.m + 8 * i, token = m + 2 * (t.lane % 4);
    if (m >= p.m) return;
    Token tokens[2];
    if constexpr (S::kPromote) tokens[0] = load_token(p, token), tokens[1] = load_token(p, token + 1);
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      float y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = finish<S>(p, rows[piece][j / 2], tokens[j % 2], sums[piece][4 * i + j]);
      if (S::kPromote && p.out_type == Float::f32) {
        store_32(p, y, n + 64 * piece + t.lane / 4, token);
      } else {
        store_16(p, y, n + 64 * piece, m, t.lane);
      }
    }
  }
}

// Publishes this split's sums of the group's rows. Whoever comes last adds those of all splits in ascending order, the
// same bits in every run, and returns true.
template <class S>
INQ_DEVICE bool add_splits(const Params& p, Sums<S>& sums, const Item& item, const Thread& t) {
  constexpr int kSums = S::kPieces * S::kTokens / 2;
  const int place = item.tile * kGroups + t.group, thread = 32 * t.warp + t.lane;
  float* parts = p.partials + static_cast<int64_t>(place) * p.splits * kSums * 128 + thread;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    st_global(parts + (static_cast<int64_t>(item.split) * kSums + i) * 128,
              sums[i / (S::kTokens / 2)][i % (S::kTokens / 2)]);
  }
  int* last = reinterpret_cast<int*>(dynamic_shared() + S::kFlagsAt) + t.group;
  bar_sync(1 + t.group, 128);
  if (thread == 0) {
    // Releases what the barrier brought together, and acquires what others released, for all of the group.
    thread_fence();
    const bool is_last = atomic_add(p.arrivals + place, 1) == p.splits - 1;
    if (is_last) atomic_add(p.arrivals + place, -p.splits);
    thread_fence();
    st_shared(last, static_cast<int>(is_last));
  }
  bar_sync(1 + t.group, 128);
  if (ld_shared(last) == 0) return false;
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i / (S::kTokens / 2)][i % (S::kTokens / 2)] = 0;
  for (int split = 0; split < p.splits; ++split) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float& sum = sums[i / (S::kTokens / 2)][i % (S::kTokens / 2)];
      sum = add(sum, ld_global(parts + (static_cast<int64_t>(split) * kSums + i) * 128));
    }
  }
  return true;
}

template <class S>
INQ_DEVICE void consume(const Params& p, const Thread& t) {
  std::conditional_t<S::kPromote, PromotingMultiplier<S>, Multiplier<S>> multiplier(t);
  for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
    const Item item = item_of<S>(p, index);
    Sums<S> sums = {};
    multiplier.run(sums, item.slots);
    if (p.splits > 1 && !add_splits<S>(p, sums, item, t)) continue;
    store<S>(p, sums, item, t);
  }
}

#endif  // INQ_HOPPER_CODE

template <class S>
__global__ void __launch_bounds__(kThreads, 1) linear_hopper_kernel(const __grid_constant__ Params p) {
#if INQ_HOPPER_CODE
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    Mbarrier* barriers = box_ring<S>().full;
    for (int i = 0; i < 2 * (S::kBoxes + S::kSlots); ++i) {
      const bool emptied = i < 2 * S::kBoxes ? i >= S::kBoxes : i >= 2 * S::kBoxes + S::kSlots;
      mbarrier_init(barriers + i, emptied ? 4 * kGroups : 1);
    }
    mbarrier_init_fence();
  }
  sync_threads();
  if (warp < 4 * kGroups) {
    registers_up<kConsumerRegisters>();
    consume<S>(p, Thread{warp / 4, warp % 4, lane});
  } else {
    registers_down<kProducerRegisters>();
    if (warp == 4 * kGroups) load_boxes<S>(p, lane);
    if (warp == 4 * kGroups + 1) load_slots<S>(p, lane);
  }
#endif
}

template <class S>
cudaError_t run(const LinearHopperParams& p, const HopperChoice& choice, int processors, cudaStream_t stream) {
  using Codec = typename S::Codec;
  Params q{};
  q.weight = p.weight;
  q.weight_exp = p.weight_exp;
  q.weight_scale = p.weight_scale;
  q.bias = p.bias;
  q.rows_exp = p.rows_exp;
  q.out = p.out;
  q.partials = p.partials;
  q.arrivals = p.arrivals;
  q.m = static_cast<int>(p.m);
  q.n = static_cast<int>(p.n);
  q.exponent = 1 - p.magnitudes - Codec::kBase;
  q.bias_type = p.bias_type;
  q.out_type = p.out_type;
  q.row_blocks = static_cast<int>(ceil_div(p.n, 16));
  q.k_blocks = static_cast<int>(ceil_div(p.k, Codec::kBlockK));
  q.slots = static_cast<int>(ceil_div(q.k_blocks, 2));
  q.whole_stores = p.n % 4 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
  q.splits = choice.splits;
  q.split_slots = static_cast<int>(ceil_div(ceil_div(q.slots, S::kPeriodSlots), q.splits)) * S::kPeriodSlots;
  q.m_tiles = static_cast<int>(ceil_div(p.m, S::kTokens));
  const int64_t items = ceil_div(p.n, S::kRows) * q.m_tiles * q.splits;
  if (items > kLargest) return cudaErrorInvalidValue;
  q.items = static_cast<int>(items);
  // A tensor map has no empty matrix; with K = 0 nothing is loaded.
  if (p.k > 0) {
    constexpr TensorType kType = S::kPromote                    ? TensorType::u8
                                 : S::kProduct == Product::f16 ? TensorType::f16
                                                               : TensorType::bf16;
    const cudaError_t status =
        make_tensor_map_2d(&q.x, kType, p.x, p.k, p.m, p.x_stride * S::kElementBytes, S::kBoxK, S::kTokens,
                           TensorSwizzle::bytes_128);
    if (status != cudaSuccess) return status;
  }
  const dim3 grid(static_cast<unsigned>(min(items, static_cast<int64_t>(processors))));
  return launch(linear_hopper_kernel<S>, grid, kThreads, S::kBytes, stream, q);
}

}  // namespace hopper
}  // namespace inq::cuda
