// The storage layout: packing, unpacking, and turning it into the fragments that products read, and back.
//
// Eight codes of b bits are a *group*, b bytes. Rows follow one another without gaps, so groups have one number through
// the tensor, and the 32 of a warp are 32·b bytes side by side: a warp collects them in shared memory and moves them 16
// bytes a lane. Weights are rounded by bits alone; a row scale is multiplied in float32, which holds every level.
#include "decode.cuh"
#include "kernels.h"
#include "weights.cuh"

namespace inq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Bytes of a warp's groups, at 5 bits.
constexpr int kWarpBytes = 32 * 5;

unsigned blocks_for(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

// The groups of a warp, in shared memory, from or to `bytes` bytes at `global`.
INQ_DEVICE void load_groups(uint8_t* shared, const uint8_t* global, int bytes, int most) {
  const int lane = lane_of_thread();
  if (bytes == most && is_aligned(global)) {
    if (lane * 16 < bytes) {
      st_shared(reinterpret_cast<Four*>(shared) + lane, ld_global(reinterpret_cast<const Four*>(global) + lane));
    }
  } else {
    for (int i = lane; i < bytes; i += 32) st_shared(shared + i, ld_global(global + i));
  }
  sync_warp();
}
INQ_DEVICE void store_groups(const uint8_t* shared, uint8_t* global, int bytes, int most) {
  const int lane = lane_of_thread();
  sync_warp();
  if (bytes == most && is_aligned(global)) {
    if (lane * 16 < bytes) {
      st_global(reinterpret_cast<Four*>(global) + lane, ld_shared(reinterpret_cast<const Four*>(shared) + lane));
    }
  } else {
    for (int i = lane; i < bytes; i += 32) st_global(global + i, ld_shared(shared + i));
  }
}

// Eight codes as they lie in a group's bytes.
INQ_DEVICE uint64_t load_group(const uint8_t* shared, int bits) {
  uint64_t word = 0;
  for (int i = 0; i < bits; ++i) word |= static_cast<uint64_t>(ld_shared(shared + i)) << (8 * i);
  return word;
}
INQ_DEVICE void store_group(uint8_t* shared, int bits, uint64_t word) {
  for (int i = 0; i < bits; ++i) st_shared(shared + i, static_cast<uint8_t>(word >> (8 * i)));
}

// --- weights and codes ----------------------------------------------------------------------------------------------------

// What a lane works on: group `group` of row `row`, if there is one.
struct Group {
  bool there;
  int64_t row, first;  // and the first of its weights
  int count;           // of those that exist, eight but at the row's end
};

INQ_DEVICE Group group_of(int64_t number, int64_t n, int64_t k) {
  const int64_t groups = (k + 7) / 8;
  Group g{number < n * groups, number / groups, 0, 0};
  g.first = (number - g.row * groups) * 8;
  g.count = g.there ? static_cast<int>(smaller<int64_t>(k - g.first, 8)) : 0;
  return g;
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParams p) {
  using T = Raw<kType>;
  constexpr int kRun = kVector<kType>;
  const int bits = p.format.bits, warp = warp_of_thread(), lane = lane_of_thread();
  uint8_t* const shared = reinterpret_cast<uint8_t*>(dynamic_shared()) + warp * kWarpBytes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads + warp * 32;
  const int64_t groups = p.n * ((p.k + 7) / 8);
  const Group g = group_of(begin + lane, p.n, p.k);
  uint64_t word = 0;
  if (g.there) {
    const int n1 = ld_global(p.n1 + g.row), n2 = n2_of(p.format, n1);
    const Limits limits = limits_of(p.format, n1, kLowest<kType>);
    const T* const w = static_cast<const T*>(p.w) + g.row * p.k + g.first;
    const bool vector = p.k % 8 == 0 && is_aligned(static_cast<const T*>(p.w));
    const uint32_t wanted = (1u << g.count) - 1;
    uint32_t raw[8];
#pragma unroll
    for (int run = 0; run < 8 / kRun; ++run) {
      load_run<T, kRun>(w + run * kRun, vector, wanted >> (run * kRun), raw + run * kRun);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t x = widened<kType>(raw[j]);
      const uint32_t magnitude = quantized_magnitude(x & kMagnitude, limits);
      if (magnitude == 0) continue;
      const auto field = static_cast<uint32_t>(field_of(p.format, static_cast<int>(magnitude >> 23) - 127 - n2));
      word |= static_cast<uint64_t>(x >> 31 << (bits - 1) | field) << (bits * j);
    }
    store_group(shared + lane * bits, bits, word);
  }
  const auto here = static_cast<int>(clamped<int64_t>(groups - begin, 0, 32));
  store_groups(shared, p.out + begin * bits, here * bits, 32 * bits);
}

// The float32 of one code of a row: ±2^(n2 + index), subnormal ones too, or +0 for a code that names no value.
INQ_DEVICE float value_of(Format f, int n2, uint32_t code) {
  const int index = index_of(f, static_cast<int>(code & ((1u << (f.bits - 1)) - 1))), e = n2 + index;
  if (index < 0) return 0.0f;
  const uint32_t power = e >= kN1Min ? power_bits(e) : 1u << (e + 149);
  return bits_to_float(power | code >> (f.bits - 1) << 31);
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ UnpackParams p) {
  using T = Raw<kType>;
  constexpr int kRun = kVector<kType>;
  const int bits = p.format.bits, warp = warp_of_thread(), lane = lane_of_thread();
  uint8_t* const shared = reinterpret_cast<uint8_t*>(dynamic_shared()) + warp * kWarpBytes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads + warp * 32;
  const int64_t groups = p.n * ((p.k + 7) / 8);
  const auto here = static_cast<int>(clamped<int64_t>(groups - begin, 0, 32));
  load_groups(shared, p.codes + begin * bits, here * bits, 32 * bits);
  const Group g = group_of(begin + lane, p.n, p.k);
  if (!g.there) return;
  const int n2 = n2_of(p.format, ld_global(p.n1 + g.row));
  const float scale = p.scale == nullptr ? 1.0f : ld_global(p.scale + g.row);
  const uint64_t word = load_group(shared + lane * bits, bits);
  uint32_t raw[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float value = value_of(p.format, n2, static_cast<uint32_t>(word >> (bits * j)) & ((1u << bits) - 1));
    // Zeros are +0, those of a row scale 0 too; what underflows keeps its sign.
    raw[j] = narrowed<kType>(value == 0.0f || scale == 0.0f ? 0.0f : mul(value, scale));
  }
  T* const out = static_cast<T*>(p.out) + g.row * p.k + g.first;
  const bool vector = p.k % 8 == 0 && is_aligned(static_cast<const T*>(p.out));
  const uint32_t wanted = (1u << g.count) - 1;
#pragma unroll
  for (int run = 0; run < 8 / kRun; ++run) {
    store_run<T, kRun>(out + run * kRun, vector, wanted >> (run * kRun), raw + run * kRun);
  }
}

// --- fragments ------------------------------------------------------------------------------------------------------------

// The order of a codec's registers in the words of a lane, and of numbers in the registers (decode.cuh).
template <Number kNumber, Levels kLevels>
struct Fragments {
  using Codec = CodecOf<kNumber, kLevels>;
  static constexpr int kRows = 16;
  // Words that are decoded together, and the registers that they hold.
  static constexpr int kGroup = Codec::kWords == 5 ? 5 : 1;
  static constexpr int kRegisters = 4 * Codec::kSteps * kGroup / Codec::kWords;
  // Numbers of a register, and their bits.
  static constexpr int kNumbers = kNumber == Number::e4m3 ? 4 : 2;
  static constexpr int kWidth = 32 / kNumbers;
  // Layouts F and G have a register that is a product: what it shall be stands beside the word, which is solved for.
  static constexpr bool kF = kNumber == Number::f16 && kLevels == Levels::dense5;
  static constexpr bool kG = kNumber == Number::bf16 && kLevels == Levels::paper5;
  static constexpr int kTableWords = kGroup + (kF || kG ? 1 : 0);
  // Of the exponent field: its lowest bit, and the field of 2^0.
  static constexpr int kUnit = kNumber == Number::f16 ? 10 : kNumber == Number::bf16 ? 7 : 3;
  static constexpr int kBias = kNumber == Number::f16 ? 15 : kNumber == Number::bf16 ? 127 : 7;
  // A block of the storage layout in shared memory: rows of at most kBlockK codes of 5 bits.
  static constexpr int kPitch = Codec::kBlockK / 8 * 5;

  // The row and the k of a number of register r of all in a lane's block.
  static INQ_DEVICE int row_of(int lane, int r) { return lane / 4 + 8 * (r % 4 % 2); }
  static INQ_DEVICE int k_of(int lane, int r, int number) {
    return r / 4 * Codec::kStepK + Codec::kStepK / 2 * (r % 4 / 2) + kNumbers * (lane % 4) + number;
  }
};

// fragments._solve_f: q with its open bits such that q·1026 has `wanted` under layout F's mask.
INQ_DEVICE uint32_t solve_f(uint32_t q, uint32_t wanted) {
  q |= ((wanted >> 10) - (q * 1026u >> 10)) & 15;
  q ^= (((wanted >> 15) - (q * 1026u >> 15)) & 1) << 14;
  q |= (q >> 15 & 1) << 24;
  q |= (((wanted >> 26) - (q * 1026u >> 26)) & 15) << 16;
  return q ^ (((wanted >> 31) - (q * 1026u >> 31)) & 1) << 30;
}

// fragments._solve_g: the same for q·132 and layout G. Bits 16 to 18 carry into what they are found from.
INQ_DEVICE uint32_t solve_g(uint32_t q, uint32_t wanted) {
  q |= ((wanted >> 7) - (q * 132u >> 7)) & 7;
  q |= (((wanted >> 14) - (q * 132u >> 14)) & 3) << 12;
  uint32_t result = 0;
  bool found = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t carry = i % 2 == 0 ? 0 : 1, free = i / 2 == 0 ? 0 : 1;
    uint32_t trial = q | free << 22;
    trial |= (((wanted >> 23) - (trial * 132u >> 23) - carry) & 7) << 16;
    trial |= (((wanted >> 30) - (trial * 132u >> 30)) & 3) << 28;
    if (!found && (trial * 132u & 0xC380C380u) == wanted) {
      result = trial;
      found = true;
    }
  }
  return result;
}

// One warp a block: its codes into shared memory, then each lane its words.
template <Number kNumber, Levels kLevels>
__global__ void __launch_bounds__(kThreads) prepack_kernel(const __grid_constant__ PrepackParams p) {
  using F = Fragments<kNumber, kLevels>;
  using Codec = typename F::Codec;
  const int bits = p.format.bits, lane = lane_of_thread();
  uint8_t* const shared = reinterpret_cast<uint8_t*>(dynamic_shared()) + warp_of_thread() * (F::kRows * F::kPitch);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  const int64_t across = (p.k + Codec::kBlockK - 1) / Codec::kBlockK, row_size = row_bytes(p.format, p.k);
  if (block >= (p.n + F::kRows - 1) / F::kRows * across) return;
  const int64_t first_row = block / across * F::kRows, first_k = block % across * Codec::kBlockK;
  const int length = Codec::kBlockK / 8 * bits;
  for (int i = lane; i < F::kRows * length; i += 32) {
    const int64_t row = first_row + i / length, byte = first_k / 8 * bits + i % length;
    const bool there = row < p.n && byte < row_size;
    st_shared(shared + i, there ? ld_global(p.codes + row * row_size + byte) : uint8_t{0});
  }
  sync_warp();

  uint32_t words[Codec::kWords];
#pragma unroll
  for (int group = 0; group < Codec::kWords / F::kGroup; ++group) {
    uint32_t some[F::kTableWords] = {};
#pragma unroll
    for (int register_ = 0; register_ < F::kRegisters; ++register_) {
      const int r = group * F::kRegisters + register_;
      const int row = F::row_of(lane, r);
#pragma unroll
      for (int number = 0; number < F::kNumbers; ++number) {
        const int k = F::k_of(lane, r, number), bit = k % 8 * bits;
        const uint8_t* const place = shared + row * length + k / 8 * bits + bit / 8;
        uint32_t code = ld_shared(place);
        // Eight codes are whole bytes: the next one is still theirs.
        if (bit % 8 + bits > 8) code |= static_cast<uint32_t>(ld_shared(place + 1)) << 8;
        code = code >> (bit % 8) & ((1u << bits) - 1);
        // Whatever the padding holds.
        if (first_k + k >= p.k) code = 0;
        const int entry = (register_ * F::kNumbers + number) << bits | static_cast<int>(code);
#pragma unroll
        for (int w = 0; w < F::kTableWords; ++w) some[w] ^= ld_global(p.table + entry * F::kTableWords + w);
      }
    }
    if constexpr (F::kF) some[0] = solve_f(some[0], some[1]);
    if constexpr (F::kG) some[0] = solve_g(some[0], some[1]);
#pragma unroll
    for (int w = 0; w < F::kGroup; ++w) words[group * F::kGroup + w] = some[w];
  }
  uint8_t* const out = p.out + block * Codec::kBlockBytes;
  st_global(reinterpret_cast<Four*>(out) + lane, Four{words[0], words[1], words[2], words[3]});
  if constexpr (Codec::kWords == 5) st_global(reinterpret_cast<uint32_t*>(out + 512) + lane, words[4]);
}

// One warp a block: each lane decodes its words as products do, and its codes' bits are gathered in shared memory.
template <Number kNumber, Levels kLevels>
__global__ void __launch_bounds__(kThreads) unprepack_kernel(const __grid_constant__ UnprepackParams p) {
  using F = Fragments<kNumber, kLevels>;
  using Codec = typename F::Codec;
  const int bits = p.format.bits, lane = lane_of_thread();
  // A byte a code.
  uint8_t* const shared = reinterpret_cast<uint8_t*>(dynamic_shared()) + warp_of_thread() * (F::kRows * Codec::kBlockK);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  const int64_t across = (p.k + Codec::kBlockK - 1) / Codec::kBlockK, row_size = row_bytes(p.format, p.k);
  if (block >= (p.n + F::kRows - 1) / F::kRows * across) return;
  const int64_t first_row = block / across * F::kRows, first_k = block % across * Codec::kBlockK;
  const uint8_t* const in = p.fragments + block * Codec::kBlockBytes;
  const Four four = ld_global(reinterpret_cast<const Four*>(in) + lane);
  uint32_t words[Codec::kWords] = {four.x, four.y, four.z, four.w};
  if constexpr (Codec::kWords == 5) words[4] = ld_global(reinterpret_cast<const uint32_t*>(in + 512) + lane);
#pragma unroll
  for (int step = 0; step < Codec::kSteps; ++step) {
    uint32_t a[4];
    Codec::decode(words, step, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * step + i;
#pragma unroll
      for (int number = 0; number < F::kNumbers; ++number) {
        const uint32_t x = a[i] >> (number * F::kWidth) & ((1u << F::kWidth) - 1);
        const uint32_t magnitude = x & ((1u << (F::kWidth - 1)) - 1);
        const int index = static_cast<int>(magnitude >> F::kUnit) - F::kBias - Codec::kBase;
        uint32_t code = x >> (F::kWidth - 1) << (bits - 1);
        if (magnitude != 0 && index >= 0) {
          code |= static_cast<uint32_t>(field_of(p.format, smaller(index, magnitudes(p.format) - 1)));
        }
        const int k = F::k_of(lane, r, number);
        // The storage layout is padded with zero codes, whatever fragments hold there.
        if (first_k + k >= p.k) code = 0;
        st_shared(shared + F::row_of(lane, r) * Codec::kBlockK + k, static_cast<uint8_t>(code));
      }
    }
  }
  sync_warp();
  const int length = Codec::kBlockK / 8 * bits;
  for (int i = lane; i < F::kRows * length; i += 32) {
    const int64_t row = first_row + i / length, byte = first_k / 8 * bits + i % length;
    if (row >= p.n || byte >= row_size) continue;
    // The codes that have a bit in this byte of their group.
    const int at = i % length % bits * 8, group = i % length / bits * 8;
    const uint8_t* const codes = shared + i / length * Codec::kBlockK + group;
    uint32_t sum = 0;
    for (int c = at / bits; c < 8 && c * bits < at + 8; ++c) {
      const int shift = c * bits - at;
      const uint32_t code = ld_shared(codes + c);
      sum |= shift >= 0 ? code << shift : code >> -shift;
    }
    st_global(p.codes + row * row_size + byte, static_cast<uint8_t>(sum));
  }
}

// --- launches ---------------------------------------------------------------------------------------------------------------

template <Number kNumber, Levels kLevels>
int64_t blocks_of(int64_t n, int64_t k) {
  using F = Fragments<kNumber, kLevels>;
  return (n + F::kRows - 1) / F::kRows * ((k + F::Codec::kBlockK - 1) / F::Codec::kBlockK);
}

template <Number kNumber, Levels kLevels>
cudaError_t fragments_of(const PrepackParams& p, cudaStream_t stream) {
  using F = Fragments<kNumber, kLevels>;
  return launch(prepack_kernel<kNumber, kLevels>, dim3(blocks_for(blocks_of<kNumber, kLevels>(p.n, p.k), kWarps)),
                kThreads, kWarps * F::kRows * F::kPitch, stream, p);
}
template <Number kNumber, Levels kLevels>
cudaError_t fragments_of(const UnprepackParams& p, cudaStream_t stream) {
  using F = Fragments<kNumber, kLevels>;
  return launch(unprepack_kernel<kNumber, kLevels>, dim3(blocks_for(blocks_of<kNumber, kLevels>(p.n, p.k), kWarps)),
                kThreads, kWarps * F::kRows * F::Codec::kBlockK, stream, p);
}

template <Number kNumber, class Params>
cudaError_t fragments_of(const Params& p, Levels levels, cudaStream_t stream) {
  switch (levels) {
    case Levels::paper4:
      return fragments_of<kNumber, Levels::paper4>(p, stream);
    case Levels::dense4:
      return fragments_of<kNumber, Levels::dense4>(p, stream);
    case Levels::paper5:
      return fragments_of<kNumber, Levels::paper5>(p, stream);
    case Levels::dense5:
      return fragments_of<kNumber, Levels::dense5>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <class Params>
cudaError_t fragments_of(const Params& p, FragmentsChoice choice, cudaStream_t stream) {
  if (p.n == 0 || p.k == 0) return cudaSuccess;
  switch (choice.number) {
    case Number::f16:
      return fragments_of<Number::f16>(p, choice.levels, stream);
    case Number::bf16:
      return fragments_of<Number::bf16>(p, choice.levels, stream);
    case Number::e4m3:
      return fragments_of<Number::e4m3>(p, choice.levels, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t pack(const PackParams& p, StorageChoice choice, cudaStream_t stream) {
  const dim3 grid(blocks_for(p.n * ((p.k + 7) / 8), kThreads));
  if (p.n == 0 || p.k == 0) return cudaSuccess;
  switch (choice.dtype) {
    case DType::float32:
      return launch(pack_kernel<DType::float32>, grid, kThreads, kWarps * kWarpBytes, stream, p);
    case DType::bfloat16:
      return launch(pack_kernel<DType::bfloat16>, grid, kThreads, kWarps * kWarpBytes, stream, p);
    case DType::float16:
      return launch(pack_kernel<DType::float16>, grid, kThreads, kWarps * kWarpBytes, stream, p);
  }
  return cudaErrorInvalidValue;
}

cudaError_t unpack(const UnpackParams& p, StorageChoice choice, cudaStream_t stream) {
  const dim3 grid(blocks_for(p.n * ((p.k + 7) / 8), kThreads));
  if (p.n == 0 || p.k == 0) return cudaSuccess;
  switch (choice.dtype) {
    case DType::float32:
      return launch(unpack_kernel<DType::float32>, grid, kThreads, kWarps * kWarpBytes, stream, p);
    case DType::bfloat16:
      return launch(unpack_kernel<DType::bfloat16>, grid, kThreads, kWarps * kWarpBytes, stream, p);
    case DType::float16:
      return launch(unpack_kernel<DType::float16>, grid, kThreads, kWarps * kWarpBytes, stream, p);
  }
  return cudaErrorInvalidValue;
}

cudaError_t prepack(const PrepackParams& p, FragmentsChoice choice, cudaStream_t stream) {
  return fragments_of(p, choice, stream);
}
cudaError_t unprepack(const UnprepackParams& p, FragmentsChoice choice, cudaStream_t stream) {
  return fragments_of(p, choice, stream);
}

}  // namespace inq::cuda
