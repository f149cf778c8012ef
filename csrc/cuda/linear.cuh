// linear and linear_dx by mma.sync m16n8k16, from sm_80 on: the decoded weights are the 16-row operand A, tokens the
// eight columns of B, so that one token wastes little of a tensor core.
//
// Data flow of a block:
//
//   weights (fragments layout) ──cp.async 16 bytes a lane──► ring of stages ──ld.shared.v4──► decode ──► A ┐
//                                                                                                          mma ► acc
//   tokens ──cp.async──► ring of stages [──× row factors──► planes, linear_dx] ──ldmatrix────────────► B ┘
//
// A lane copies just the words that it will decode, so weights need no barrier; tokens do, one for each stage.
//
// The sum over the depth of a tile is cut into equal parts for blocks ("stream-K"): blocks own consecutive ranges of
// all tiles' stages. A block that has a part of a tile leaves it in the workspace and counts itself; the one that comes
// last adds up the parts in the order of the depth, whoever it is: the same bits in every run, and nobody waits.
#pragma once

#include "decode.cuh"
#include "epilogue.cuh"
#include "linear.h"

namespace inq::cuda {

// How `ctas` blocks share all tiles, `units` of depth each: block c has units begin(c) to begin(c + 1).
// 32-bit: a division of 64-bit numbers takes as long as a stage.
struct Ranges {
  uint32_t units;
  uint32_t parts;       // blocks of a tile where each has one tile's units alone, else 0 …
  uint32_t each, more;  // … and block c has `each` units, and one more for c < more

  Ranges() = default;
  Ranges(uint32_t tiles, uint32_t units, uint32_t ctas) : units(units) {
    parts = ctas % tiles == 0 ? ctas / tiles : 0;
    const uint64_t all = uint64_t{tiles} * units;
    each = static_cast<uint32_t>(all / ctas), more = static_cast<uint32_t>(all % ctas);
  }
  INQ_DEVICE uint32_t begin(uint32_t cta) const {
    if (parts > 0) return cta / parts * units + cta % parts * units / parts;
    return cta * each + (cta < more ? cta : more);
  }
  INQ_DEVICE uint32_t owner(uint32_t unit) const {
    if (parts > 0) return unit / units * parts + ((unit % units + 1) * parts - 1) / units;
    const uint32_t longer = more * (each + 1);
    return unit < longer ? unit / (each + 1) : more + (unit - longer) / each;
  }
};

struct LinearKernel {
  const char* x;
  const uint8_t* weight;
  const int8_t* weight_exp;
  const float* weight_scale;
  const void* bias;
  uint16_t* out;
  float* partials;
  int* flags;
  int64_t x_stride;  // bytes
  int64_t m, rows, depth;
  int64_t row_blocks, depth_blocks;  // blocks of weights along the rows and the depth …
  int64_t row_stride, depth_stride;  // … and the bytes from one to the next
  uint32_t m_tiles;
  Ranges ranges;
  int exponent;  // a decoded number times 2^(n1 + exponent) is the weight
  int access;    // bytes that x may be read by: 16, 4 or 2
  Float bias_type;
};

template <Number kNumber>
INQ_DEVICE float widened(uint16_t bits) {
  return kNumber == Number::f16 ? from_f16(bits) : from_bf16(bits);
}
template <Number kNumber>
INQ_DEVICE uint16_t rounded(float x) {
  return kNumber == Number::f16 ? to_f16(x) : to_bf16(x);
}

// Powers of two in fp16 as bf16: the exponent goes three bits down, times 2^112 for the difference of the biases.
INQ_DEVICE uint32_t f16x2_to_bf16x2(uint32_t a) {
  return mul_bf16x2((a >> 3 & 0x0F800F80u) | (a & 0x80008000u), 0x77807780u);
}

// Everything of a kernel that is known when it is compiled.
template <class CodecT, int kTokensT, bool kDx>
struct Plan {
  using Codec = CodecT;
  static constexpr int kTokens = kTokensT;
  static constexpr bool kGradient = kDx;
  static constexpr Number kNumber = Codec::kNumber;
  static constexpr Tiling kTiling =
      tiling(kDx ? Op::linear_dx : Op::linear, kNumber == Number::f16, Codec::kBlockK == 48 ? 5 : 4, kTokens);
  static constexpr int kStripes = kTiling.stripes;
  static constexpr int kGroups = kTiling.warp_rows / 16;  // mma row groups of a warp
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kDepthBlocks = kTiling.depth_blocks;
  static constexpr int kDepth = kTiling.depth;
  static constexpr int kPitch = kTiling.pitch;
  static constexpr int kStages = kTiling.stages;
  static constexpr uint32_t kUnitSteps = kTiling.unit_steps;
  static constexpr int kThreads = 32 * kTiling.most_warps;  // at most
  static constexpr int kPlanes = kTiling.planes;
  static constexpr int kTokenBytes = kTiling.token_bytes(kTokens), kWarpBytes = kTiling.warp_bytes();
  static constexpr int kPlanesAt = kTiling.planes_at(), kStagesAt = kTiling.stages_at(kTokens);
  // Eight tokens take two steps of 16 along the depth from one ldmatrix.
  static_assert(kDepth % 32 == 0);
  static_assert(kGroups == (kDx ? Codec::kSteps : kStripes));
};

struct Thread {
  int index, warp, lane, threads, warps;
};

// --- loads ------------------------------------------------------------------------------------------------------------

// The next stage to load: addresses move along with it, so that a stage costs few instructions beside its copies.
template <class P>
struct Loader {
  static constexpr int kPieces = 2 * P::kDepth / 16;  // of 16 bytes in a token's part of a stage …
  static constexpr int kSlots = kPieces > 16 ? 32 : kPieces > 8 ? 16 : 8;  // … and the threads for them
  static_assert(kPieces <= kSlots && kSlots <= 32);

  uint32_t tile, step;
  const uint8_t* weight;  // of this lane
  int depth_blocks;       // left from here on
  uint32_t stripes;       // a bit for each stripe with rows
  const char* x;          // of this thread's first token, at the start of the depth
  int x_to, tokens;       // where that goes in a stage; tokens left from it on
  int slot;               // its piece

  INQ_DEVICE Loader(const LinearKernel& p, const Thread& t, uint32_t tile, uint32_t step, int64_t m0)
      : tile(tile), step(step), slot(t.index % kSlots) {
    const int token = t.index / kSlots;
    const int64_t left = p.m - m0 - token;
    tokens = left > P::kTokens ? P::kTokens : static_cast<int>(left);
    x = p.x + (m0 + token) * p.x_stride + 16 * slot;
    x_to = token * P::kPitch + 16 * slot;
    enter_tile(p, t);
  }
  INQ_DEVICE void enter_tile(const LinearKernel& p, const Thread& t) {
    const int64_t row_block = (int64_t{tile} * t.warps + t.warp) * P::kStripes;
    const int64_t depth_block = int64_t{step} * P::kDepthBlocks;
    weight = p.weight + row_block * p.row_stride + depth_block * p.depth_stride + 16 * t.lane;
    depth_blocks = static_cast<int>(p.depth_blocks - depth_block);
    stripes = 0;
#pragma unroll
    for (int s = 0; s < P::kStripes; s++) stripes |= (row_block + s < p.row_blocks ? 1u : 0u) << s;
  }

  // Zeros outside of the tensors.
  INQ_DEVICE void load(const LinearKernel& p, const Thread& t, int64_t m0, char* stage) const {
    char* to = stage + P::kTokenBytes + t.warp * P::kWarpBytes + 16 * t.lane;
#pragma unroll
    for (int s = 0; s < P::kStripes; s++) {
#pragma unroll
      for (int b = 0; b < P::kDepthBlocks; b++) {
        cp_async_16(to + (s * P::kDepthBlocks + b) * 512, weight + s * p.row_stride + b * p.depth_stride,
                    b < depth_blocks && (stripes >> s & 1) != 0);
      }
    }
    if (p.access == 16) {
      const int64_t depth = int64_t{step} * P::kDepth;
      const bool inside = depth + 8 * slot < p.depth;
      if (slot < kPieces) {
        const char* from = x + 2 * depth;
        const int tokens_a_turn = t.threads / kSlots;
        const int64_t stride = tokens_a_turn * p.x_stride;
        char* place = stage + x_to;
#pragma unroll 1
        for (int i = t.index / kSlots, left = tokens; i < P::kTokens; i += tokens_a_turn, left -= tokens_a_turn) {
          cp_async_16(place, from, inside && left > 0);
          from += stride, place += tokens_a_turn * P::kPitch;
        }
      }
    } else if (p.access == 4) {
      load_tokens<4>(p, t, m0, stage);
    } else {
      load_tokens<2>(p, t, m0, stage);
    }
  }

  // Rows of any alignment, kBytes at a time.
  template <int kBytes>
  INQ_DEVICE void load_tokens(const LinearKernel& p, const Thread& t, int64_t m0, char* stage) const {
    constexpr int kParts = 2 * P::kDepth / kBytes;
#pragma unroll 1
    for (int i = t.index; i < P::kTokens * kParts; i += t.threads) {
      const int row = i / kParts, part = i % kParts;
      const int64_t token = m0 + row, depth = int64_t{step} * P::kDepth + part * (kBytes / 2);
      const bool inside = token < p.m && depth < p.depth;
      const char* from = inside ? p.x + token * p.x_stride + 2 * depth : p.x;
      char* place = stage + row * P::kPitch + part * kBytes;
      if constexpr (kBytes == 4) {
        cp_async_4(place, from, inside);
      } else {
        st_shared(reinterpret_cast<uint16_t*>(place),
                  inside ? ld_global(reinterpret_cast<const uint16_t*>(from)) : uint16_t{0});
      }
    }
  }

  INQ_DEVICE void next(const LinearKernel& p, const Thread& t) {
    if (++step == p.ranges.units * P::kUnitSteps) {
      step = 0, tile++;
      enter_tile(p, t);
    } else {
      weight += P::kDepthBlocks * p.depth_stride;
      depth_blocks -= P::kDepthBlocks;
    }
  }
};

// --- operands ---------------------------------------------------------------------------------------------------------

// B of all token tiles for a step of 16 along the depth. With eight tokens an even step also brings the next, in b[1].
template <class P>
using OperandB = uint32_t[P::kTokenTiles < 2 ? 2 : P::kTokenTiles][2];

template <class P>
INQ_DEVICE void load_b(const char* x, int lane, int step, OperandB<P>& b) {
  const int matrix = lane / 8, row = lane % 8;
  uint32_t d[4];
  if constexpr (P::kTokens == 8) {
    if (step % 2 != 0) {
      b[0][0] = b[1][0], b[0][1] = b[1][1];
      return;
    }
    ldmatrix_x4(d, x + row * P::kPitch + 16 * matrix + 32 * step);
    b[0][0] = d[0], b[0][1] = d[1], b[1][0] = d[2], b[1][1] = d[3];
  } else {
    const char* place = x + (8 * (matrix / 2) + row) * P::kPitch + 16 * (matrix % 2) + 32 * step;
#pragma unroll
    for (int j = 0; j < P::kTokenTiles; j += 2) {
      ldmatrix_x4(d, place + 8 * j * P::kPitch);
      b[j][0] = d[0], b[j][1] = d[1], b[j + 1][0] = d[2], b[j + 1][1] = d[3];
    }
  }
}

INQ_DEVICE void load_words(const char* weights, uint32_t (&words)[4]) {
  const Four four = ld_shared(reinterpret_cast<const Four*>(weights));
  words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
}

template <Number kNumber>
INQ_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kNumber == Number::f16) {
    mma_f16(d, a, b);
  } else {
    mma_bf16(d, a, b);
  }
}

template <class P>
using Accumulators = float[P::kGroups][P::kTokenTiles][4];

template <class P>
INQ_DEVICE void clear(Accumulators<P>& acc) {
#pragma unroll
  for (int i = 0; i < P::kGroups * P::kTokenTiles; i++) {
#pragma unroll
    for (int c = 0; c < 4; c++) acc[i / P::kTokenTiles][i % P::kTokenTiles][c] = 0;
  }
}

// linear: rows of A are rows of blocks.
template <class P>
INQ_DEVICE void multiply(const char* stage, const Thread& t, Accumulators<P>& acc) {
  const char* weights = stage + P::kTokenBytes + t.warp * P::kWarpBytes + 16 * t.lane;
  OperandB<P> b;
#pragma unroll
  for (int block = 0; block < P::kDepthBlocks; block++) {
    uint32_t words[P::kStripes][4];
#pragma unroll
    for (int s = 0; s < P::kStripes; s++) load_words(weights + (s * P::kDepthBlocks + block) * 512, words[s]);
#pragma unroll
    for (int step = 0; step < P::Codec::kSteps; step++) {
      load_b<P>(stage, t.lane, block * P::Codec::kSteps + step, b);
#pragma unroll
      for (int s = 0; s < P::kStripes; s++) {
        uint32_t a[4];
        P::Codec::decode(words[s], step, a);
#pragma unroll
        for (int j = 0; j < P::kTokenTiles; j++) mma<P::kNumber>(acc[s][j], a, b[j]);
      }
    }
  }
}

// linear_dx: rows of A are columns of blocks, so each step's fragment is transposed: 16 k in rows, 16 n along the depth.
template <class P>
INQ_DEVICE void multiply_transposed(const char* planes, const char* stage, const Thread& t, Accumulators<P>& acc) {
  const char* weights = stage + P::kTokenBytes + t.warp * P::kWarpBytes + 16 * t.lane;
  OperandB<P> b[P::kPlanes];
#pragma unroll
  for (int block = 0; block < P::kDepthBlocks; block++) {
    uint32_t words[4];
    load_words(weights + block * 512, words);
#pragma unroll
    for (int plane = 0; plane < P::kPlanes; plane++) {
      load_b<P>(planes + plane * P::kTokenBytes, t.lane, block, b[plane]);
    }
#pragma unroll
    for (int step = 0; step < P::Codec::kSteps; step++) {
      uint32_t w[4];
      P::Codec::decode(words, step, w);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if constexpr (P::kNumber == Number::f16) w[i] = f16x2_to_bf16x2(w[i]);
        w[i] = movmatrix_trans(w[i]);
      }
      const uint32_t a[4] = {w[0], w[2], w[1], w[3]};
#pragma unroll
      for (int plane = 0; plane < P::kPlanes; plane++) {
#pragma unroll
        for (int j = 0; j < P::kTokenTiles; j++) mma_bf16(acc[step][j], a, b[plane][j]);
      }
    }
  }
}

// A row's factors for two neighbours along the depth of linear_dx.
struct RowFactors {
  int exponent[2];
  float scale[2];
};

INQ_DEVICE RowFactors load_factors(const LinearKernel& p, int lane, int64_t depth0) {
  RowFactors f{{0, 0}, {1, 1}};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t n = depth0 + 2 * lane + i;
    if (n < p.depth) {
      f.exponent[i] = ld_global(p.weight_exp + n);
      if (p.weight_scale != nullptr) f.scale[i] = ld_global(p.weight_scale + n);
    }
  }
  return f;
}

// The staged gradients times their rows' factors 2^n1 · scale, rounded: to bf16, or where gradients are fp16 (whose
// range they leave) to the sum of two bf16 numbers, which holds fp16's eleven bits.
template <class P>
INQ_DEVICE void make_planes(const LinearKernel& p, const Thread& t, const RowFactors& f, const char* stage,
                            char* planes) {
  static_assert(P::kDepth == 64);
#pragma unroll 1
  for (int row = t.warp; row < P::kTokens; row += t.warps) {
    const int place = row * P::kPitch + 4 * t.lane;
    const uint32_t pair = ld_shared(reinterpret_cast<const uint32_t*>(stage + place));
    uint32_t high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float g = scaled(widened<P::kNumber>(static_cast<uint16_t>(pair >> 16 * i)), f.exponent[i]);
      if (p.weight_scale != nullptr) g = mul(g, f.scale[i]);
      const uint16_t rough = to_bf16(g);
      high |= static_cast<uint32_t>(rough) << 16 * i;
      if constexpr (P::kPlanes == 2) {
        // An infinity has no rest.
        const float rest = (rough & 0x7F80) == 0x7F80 ? 0.0f : add(g, -from_bf16(rough));
        low |= static_cast<uint32_t>(to_bf16(rest)) << 16 * i;
      }
    }
    st_shared(reinterpret_cast<uint32_t*>(planes + place), high);
    if constexpr (P::kPlanes == 2) {
      st_shared(reinterpret_cast<uint32_t*>(planes + P::kTokenBytes + place), low);
    }
  }
}

// --- results ----------------------------------------------------------------------------------------------------------

template <class P>
INQ_DEVICE void store(const LinearKernel& p, const Thread& t, uint32_t tile, int64_t m0, const Accumulators<P>& acc) {
  const int64_t row0 = (int64_t{tile} * t.warps + t.warp) * (16 * P::kGroups) + t.lane / 4;
  const int64_t token0 = m0 + 2 * (t.lane % 4);
#pragma unroll
  for (int group = 0; group < P::kGroups; group++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = row0 + 16 * group + 8 * half;
      if (row >= p.rows) continue;
      int exponent = p.exponent;
      float scale = 1, bias = 0;
      if constexpr (!P::kGradient) {
        exponent += ld_global(p.weight_exp + row);
        if (p.weight_scale != nullptr) scale = ld_global(p.weight_scale + row);
        if (p.bias != nullptr) bias = load_float(p.bias, p.bias_type, row);
      }
      // One address moves along: all of them at once would not fit beside 128 sums.
      uint16_t* out = p.out + token0 * p.rows + row;
#pragma unroll
      for (int j = 0; j < P::kTokenTiles; j++, out += 8 * p.rows) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int64_t token = token0 + 8 * j + i;
          float y = scaled(acc[group][j][2 * half + i], exponent);
          if constexpr (!P::kGradient) {
            if (p.weight_scale != nullptr) y = mul(y, scale);
            if (p.bias != nullptr) y = add(y, bias);
          }
          if (token < p.m) st_global(out + i * p.rows, rounded<P::kNumber>(y));
        }
      }
    }
  }
}

// Leaves a part of a tile's sums in the workspace. The last block to do so for this tile gets them all, added up.
template <class P>
INQ_DEVICE bool exchange(const LinearKernel& p, const Thread& t, uint32_t cta, uint32_t tile, uint32_t m_tile,
                         bool first_range, int* flag, Accumulators<P>& acc) {
  constexpr int kFours = P::kGroups * P::kTokenTiles;
  const uint32_t begin = tile * p.ranges.units;
  const uint32_t first = p.ranges.owner(begin), last = p.ranges.owner(begin + p.ranges.units - 1);
  // A block leaves parts of two tiles at most: where its range begins, and where it ends.
  const auto part = [&](uint32_t block, bool at_begin) {
    const int64_t slot = (2 * int64_t{block} + (at_begin ? 0 : 1)) * p.m_tiles + m_tile;
    return reinterpret_cast<Four*>(p.partials) + slot * kFours * t.threads + t.index;
  };
  Four* mine = part(cta, first_range);
#pragma unroll
  for (int i = 0; i < kFours; i++) {
    const float(&a)[4] = acc[i / P::kTokenTiles][i % P::kTokenTiles];
    st_global(mine + i * t.threads,
              Four{float_to_bits(a[0]), float_to_bits(a[1]), float_to_bits(a[2]), float_to_bits(a[3])});
  }
  sync_threads();
  if (t.index == 0) {
    int* count = p.flags + int64_t{tile} * p.m_tiles + m_tile;
    thread_fence();
    const bool complete = atomic_add(count, 1) == static_cast<int>(last - first);
    thread_fence();
    if (complete) st_global(count, 0);
    st_shared(flag, complete ? 1 : 0);
  }
  sync_threads();
  if (ld_shared(flag) == 0) return false;
  clear<P>(acc);
  // Several parts at a time where they are small: one wait after another would take longer than the loads.
  constexpr int kChunk = kFours < 8 ? kFours : 4, kBatch = kFours < 8 ? 8 / kFours : 1;
  static_assert(kFours % kChunk == 0);
#pragma unroll 1
  for (uint32_t block = first; block <= last; block += kBatch) {
#pragma unroll
    for (int chunk = 0; chunk < kFours; chunk += kChunk) {
      Four v[kBatch][kChunk];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (block + b > last) break;
        const Four* from = part(block + b, p.ranges.begin(block + b) >= begin);
#pragma unroll
        for (int i = 0; i < kChunk; i++) v[b][i] = ld_global(from + (chunk + i) * t.threads);
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (block + b > last) break;
#pragma unroll
        for (int i = 0; i < kChunk; i++) {
          float(&a)[4] = acc[(chunk + i) / P::kTokenTiles][(chunk + i) % P::kTokenTiles];
          a[0] = add(a[0], bits_to_float(v[b][i].x)), a[1] = add(a[1], bits_to_float(v[b][i].y));
          a[2] = add(a[2], bits_to_float(v[b][i].z)), a[3] = add(a[3], bits_to_float(v[b][i].w));
        }
      }
    }
  }
  return true;
}

// --- the kernel -------------------------------------------------------------------------------------------------------

template <class P>
__global__ void __launch_bounds__(P::kThreads, 2) linear_kernel(const __grid_constant__ LinearKernel p) {
  Thread t{static_cast<int>(threadIdx.x), 0, 0, static_cast<int>(blockDim.x), 0};
  t.warp = t.index / 32, t.lane = t.index % 32, t.warps = t.threads / 32;
  char* shared = dynamic_shared();
  int* flag = reinterpret_cast<int*>(shared);
  char* planes = shared + P::kPlanesAt;
  char* ring = shared + P::kStagesAt;
  const int stage_bytes = P::kTokenBytes + t.warps * P::kWarpBytes;
  // Blocks of one range are neighbours: they share its weights in the second-level cache.
  const uint32_t m_tile = blockIdx.x % p.m_tiles, cta = blockIdx.x / p.m_tiles;
  const int64_t m0 = int64_t{m_tile} * P::kTokens;
  const uint32_t begin = p.ranges.begin(cta), steps = p.ranges.units * P::kUnitSteps;
  const int count = static_cast<int>((p.ranges.begin(cta + 1) - begin) * P::kUnitSteps);
  uint32_t tile = begin / p.ranges.units, step = begin % p.ranges.units * P::kUnitSteps;
  Loader<P> loader(p, t, tile, step, m0);
  int filling = 0, current = 0;

  Accumulators<P> acc;
  clear<P>(acc);
  bool first_range = true;
  uint32_t part_begin = step;
  for (int i = 1 - P::kStages; i < count; i++) {
    [[maybe_unused]] RowFactors factors;
    if (i >= 0) {
      if constexpr (P::kGradient) factors = load_factors(p, t.lane, int64_t{step} * P::kDepth);
      cp_async_wait<P::kStages - 2>();
      // Stage i is here for all, and all are done with the one before, whose place is filled next.
      sync_threads();
    }
    // One group of copies for each stage, empty past the end: so many groups later a stage has landed.
    if (i + P::kStages - 1 < count) {
      loader.load(p, t, m0, ring + filling * stage_bytes);
      loader.next(p, t);
      filling = filling + 1 == P::kStages ? 0 : filling + 1;
    }
    cp_async_commit();
    if (i < 0) continue;

    const char* stage = ring + current * stage_bytes;
    current = current + 1 == P::kStages ? 0 : current + 1;
    if constexpr (P::kGradient) {
      make_planes<P>(p, t, factors, stage, planes);
      sync_threads();
      multiply_transposed<P>(planes, stage, t, acc);
    } else {
      multiply<P>(stage, t, acc);
    }

    const bool tile_ends = step + 1 == steps;
    if (tile_ends || i + 1 == count) {
      const bool whole = tile_ends && part_begin == 0;
      if (whole || exchange<P>(p, t, cta, tile, m_tile, first_range, flag, acc)) store<P>(p, t, tile, m0, acc);
      clear<P>(acc);
      part_begin = 0, first_range = false;
    }
    if (++step == steps) step = 0, tile++;
  }
}

// --- launching --------------------------------------------------------------------------------------------------------

template <class Codec, int kTokens, bool kDx>
cudaError_t launch_linear(const LinearKernel& k, const Choice& c, cudaStream_t stream) {
  using P = Plan<Codec, kTokens, kDx>;
  const dim3 grid(static_cast<unsigned>(c.ctas * c.m_tiles));
  return launch(&linear_kernel<P>, grid, 32 * c.warps, c.shared_bytes, stream, k);
}

template <Number kNumber, Levels kLevels, bool kDx>
cudaError_t by_tokens(const LinearKernel& k, const Choice& c, cudaStream_t stream) {
  using Codec = CodecOf<kNumber, kLevels>;
  if (c.tokens == 8) return launch_linear<Codec, 8, kDx>(k, c, stream);
  if (c.tokens == 16) return launch_linear<Codec, 16, kDx>(k, c, stream);
  if (c.tokens == 32) return launch_linear<Codec, 32, kDx>(k, c, stream);
  if constexpr (!kDx) {
    if (c.tokens == 64) return launch_linear<Codec, 64, kDx>(k, c, stream);
  }
  return cudaErrorInvalidValue;
}

template <Number kNumber, bool kDx>
cudaError_t by_levels(Levels levels, const LinearKernel& k, const Choice& c, cudaStream_t stream) {
  switch (levels) {
    case Levels::paper4:
      return by_tokens<kNumber, Levels::paper4, kDx>(k, c, stream);
    case Levels::dense4:
      return by_tokens<kNumber, Levels::dense4, kDx>(k, c, stream);
    case Levels::paper5:
      return by_tokens<kNumber, Levels::paper5, kDx>(k, c, stream);
    case Levels::dense5:
      return by_tokens<kNumber, Levels::dense5, kDx>(k, c, stream);
  }
  return cudaErrorInvalidValue;
}

// The largest piece that every row of x may be read by.
inline int access_of(const void* x, int64_t stride, int64_t depth, int64_t m) {
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x)) | 2 * depth | (m > 1 ? 2 * stride : 0);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 2;
}

template <bool kDx>
cudaError_t product(const LinearParams& p, const Choice& c, cudaStream_t stream) {
  LinearKernel k{};
  k.rows = kDx ? p.k : p.n, k.depth = kDx ? p.n : p.k;
  if (p.m == 0 || k.rows == 0) return cudaSuccess;
  // A grid has no more blocks, and 2^30 units of 32 rows by 64 are more weights than any memory holds.
  constexpr int64_t kMost = 0x7FFFFFFF;
  if (c.ctas * c.m_tiles > kMost || c.tiles * c.units > kMost / 2) return cudaErrorInvalidValue;
  const int64_t block_k = block_k_of(p.number, p.levels);
  const int64_t n_blocks = (p.n + 15) / 16, k_blocks = (p.k + block_k - 1) / block_k;
  k.x = static_cast<const char*>(p.x), k.x_stride = 2 * p.stride;
  k.weight = p.weight, k.weight_exp = p.weight_exp, k.weight_scale = p.weight_scale, k.bias = p.bias;
  k.out = static_cast<uint16_t*>(p.out), k.partials = p.partials, k.flags = p.flags;
  k.m = p.m;
  k.row_blocks = kDx ? k_blocks : n_blocks, k.depth_blocks = kDx ? n_blocks : k_blocks;
  k.row_stride = kDx ? 512 : 512 * k_blocks, k.depth_stride = kDx ? 512 * k_blocks : 512;
  k.m_tiles = static_cast<uint32_t>(c.m_tiles);
  k.ranges =
      Ranges(static_cast<uint32_t>(c.tiles), static_cast<uint32_t>(c.units), static_cast<uint32_t>(c.ctas));
  k.exponent = 1 - p.magnitudes - base_of(p.number, p.levels);
  k.access = access_of(p.x, p.stride, k.depth, p.m);
  k.bias_type = p.bias_type;
  return p.number == Number::f16 ? by_levels<Number::f16, kDx>(p.levels, k, c, stream)
                                 : by_levels<Number::bf16, kDx>(p.levels, k, c, stream);
}

}  // namespace inq::cuda
