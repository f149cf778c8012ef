// pack and unpack with AVX2. Both are bound by memory, so that AVX-512 machines use them as well.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "storage.h"

namespace inq::cpu::avx2 {
namespace {

// Eight weights as float32 bits.
template <DType dtype>
__m256i load8(const void* w, int64_t i) {
  if constexpr (dtype == DType::bfloat16) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(w) + i));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
  } else {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const float*>(w) + i));
  }
}

// The constants of one row, as vectors of eight.
struct RowLevels {
  __m256i least, lowest, highest, to_field;
  int sign_shift;

  RowLevels(Format f, int n1) {
    const int n2 = n2_of(f, n1);
    least = _mm256_set1_epi32(static_cast<int>(least_nonzero(n2)) - 1);
    lowest = _mm256_set1_epi32(n2 + 127);
    highest = _mm256_set1_epi32(n1 + 127);
    to_field = _mm256_set1_epi32(field_of(f, 0) - (n2 + 127));
    sign_shift = 32 - f.bits;
  }

  // Codes of eight weights, one a 32-bit lane: quantize_magnitude and field_of of inq_format.h.
  __m256i codes(__m256i w) const {
    const __m256i magnitude = _mm256_and_si256(w, _mm256_set1_epi32(0x7FFFFFFF));
    __m256i biased = _mm256_srli_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(kHalfOctave)), 23);
    biased = _mm256_min_epi32(_mm256_max_epi32(biased, lowest), highest);
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(w, 31), 31 - sign_shift);
    const __m256i code = _mm256_or_si256(_mm256_add_epi32(biased, to_field), sign);
    return _mm256_and_si256(code, _mm256_cmpgt_epi32(magnitude, least));
  }
};

// Bytes of weights from what is packed to what is asked for. Left to the processor, an Intel Xeon (Emerald Rapids) took
// a third to a half as long again.
constexpr int64_t kPackAhead = 2048;

template <DType dtype, int bits>
void pack_row(const PackParams& p, int64_t row, int64_t first, int64_t last) {
  const RowLevels levels(p.format, p.n1[row]);
  uint8_t* out = p.out + row * row_bytes(p.format, p.k);
  // Neighbours are joined by multiply-and-add: bytes to pairs of 2b bits, pairs to 4b bits, those to 8b bits a group.
  const __m256i join2 = _mm256_set1_epi16(static_cast<short>(1 << (8 + bits) | 1));
  const __m256i join4 = _mm256_set1_epi32(1 << (16 + 2 * bits) | 1);
  const __m128i join8 = _mm_cvtsi32_si128(32 - 4 * bits);
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
  // packs works in halves of 128 bits; this puts groups of eight back in order.
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t group = first;
  // Four groups at a time.
  for (; group + 4 <= last && (group + 4) * 8 <= p.k; group += 4) {
    const int64_t i = row * p.k + group * 8;
    const char* ahead = static_cast<const char*>(p.w) + i * size_of(dtype) + kPackAhead;
    for (int line = 0; line < 32 * size_of(dtype); line += 64) __builtin_prefetch(ahead + line);
    const __m256i a = levels.codes(load8<dtype>(p.w, i)), b = levels.codes(load8<dtype>(p.w, i + 8));
    const __m256i c = levels.codes(load8<dtype>(p.w, i + 16)), d = levels.codes(load8<dtype>(p.w, i + 24));
    __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    bytes = _mm256_permutevar8x32_epi32(bytes, in_order);
    const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, join2), join4);
    const __m256i eights = _mm256_or_si256(_mm256_and_si256(fours, low),
                                           _mm256_srl_epi64(_mm256_andnot_si256(low, fours), join8));
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), eights);
    for (int g = 0; g < 4; ++g) std::memcpy(out + (group + g) * bits, &words[g], bits);
  }
  portable::pack_groups(p, row, group, last);
}

// The number of bits as a constant: copies of b bytes are one or two instructions then.
template <DType dtype>
void pack_row_of(const PackParams& p, int64_t row, int64_t first, int64_t last) {
  switch (p.format.bits) {
    case 2: return pack_row<dtype, 2>(p, row, first, last);
    case 3: return pack_row<dtype, 3>(p, row, first, last);
    case 4: return pack_row<dtype, 4>(p, row, first, last);
    default: return pack_row<dtype, 5>(p, row, first, last);
  }
}

// table[code] for eight codes below 32, one a lane: eight entries at a time, chosen by the bits above the third.
struct Lookup {
  __m256 part[4];
  int bits;

  Lookup(const CodeTable& table, int b) : bits(b) {
    for (int i = 0; i < 4; ++i) part[i] = _mm256_loadu_ps(table.value + 8 * i);
  }

  __m256 operator()(__m256i code) const {
    __m256 value = _mm256_permutevar8x32_ps(part[0], code);
    if (bits < 4) return value;
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    value = _mm256_blendv_ps(value, _mm256_permutevar8x32_ps(part[1], code), bit3);
    if (bits < 5) return value;
    const __m256 upper = _mm256_blendv_ps(_mm256_permutevar8x32_ps(part[2], code),
                                          _mm256_permutevar8x32_ps(part[3], code), bit3);
    return _mm256_blendv_ps(value, upper, _mm256_castsi256_ps(_mm256_slli_epi32(code, 27)));
  }
};

// The eight values of one group.
class GroupReader {
 public:
  GroupReader(const UnpackParams& p, const CodeTable& table, int64_t row)
      : lookup_(table, p.format.bits),
        bits_(p.format.bits),
        second_(4 * bits_ / 8),
        codes_(p.codes + row * row_bytes(p.format, p.k)),
        // Lanes 0…3 look into the group's first word, lanes 4…7 into the word that starts where code 4 does.
        shift_(_mm256_add_epi32(_mm256_mullo_epi32(_mm256_set1_epi32(bits_), _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3)),
                                _mm256_setr_epi32(0, 0, 0, 0, 4 * bits_ % 8, 4 * bits_ % 8, 4 * bits_ % 8, 4 * bits_ % 8))),
        mask_(_mm256_set1_epi32((1 << bits_) - 1)) {}

  // How many groups there are whose two words lie inside the row and which are whole.
  int64_t whole_groups(const UnpackParams& p) const {
    const int64_t last_start = row_bytes(p.format, p.k) - second_ - 4;
    return last_start < 0 ? 0 : std::min(p.k / 8, last_start / bits_ + 1);
  }

  __m256 operator[](int64_t group) const {
    int32_t lower, upper;
    std::memcpy(&lower, codes_ + group * bits_, 4);
    std::memcpy(&upper, codes_ + group * bits_ + second_, 4);
    const __m256i words = _mm256_setr_m128i(_mm_set1_epi32(lower), _mm_set1_epi32(upper));
    return lookup_(_mm256_and_si256(_mm256_srlv_epi32(words, shift_), mask_));
  }

 private:
  Lookup lookup_;
  int bits_, second_;
  const uint8_t* codes_;
  __m256i shift_, mask_;
};

// Past the caches a plain store first reads the line that it overwrites; a streaming one does not, but must be aligned.
bool streams(const void* out, int64_t bytes) {
  constexpr int64_t kPastCaches = 8 << 20;
  return bytes > kPastCaches && reinterpret_cast<uintptr_t>(out) % 32 == 0;
}

int64_t unpack_f32(const UnpackParams& p, const CodeTable& table, int64_t row, int64_t first, int64_t last) {
  const GroupReader value(p, table, row);
  float* out = static_cast<float*>(p.out) + row * p.k;
  const int64_t end = std::min(last, value.whole_groups(p));
  if (streams(out, p.n * p.k * 4)) {
    for (int64_t group = first; group < end; ++group) _mm256_stream_ps(out + group * 8, value[group]);
    _mm_sfence();
  } else {
    for (int64_t group = first; group < end; ++group) _mm256_storeu_ps(out + group * 8, value[group]);
  }
  return std::max(first, end);
}

int64_t unpack_bf16(const UnpackParams& p, CodeTable table, int64_t row, int64_t first, int64_t last) {
  // Rounded here, once a row: below, the upper halves of the float32 are the result.
  for (float& entry : table.value) {
    const uint32_t bits = static_cast<uint32_t>(to_bf16(entry)) << 16;
    std::memcpy(&entry, &bits, 4);
  }
  const GroupReader value(p, table, row);
  uint16_t* out = static_cast<uint16_t*>(p.out) + row * p.k;
  const int64_t end = std::min(last, value.whole_groups(p));
  const bool stream = streams(out + first * 8, p.n * p.k * 2);
  const auto upper_half = [](__m256 v) { return _mm256_srli_epi32(_mm256_castps_si256(v), 16); };
  int64_t group = first;
  for (; group + 2 <= end; group += 2) {
    const __m256i mixed = _mm256_packus_epi32(upper_half(value[group]), upper_half(value[group + 1]));
    const __m256i halves = _mm256_permute4x64_epi64(mixed, 0b11011000);
    __m256i* to = reinterpret_cast<__m256i*>(out + group * 8);
    stream ? _mm256_stream_si256(to, halves) : _mm256_storeu_si256(to, halves);
  }
  if (stream) _mm_sfence();
  return group;
}

}  // namespace

void pack_groups(const PackParams& p, int64_t row, int64_t first, int64_t last) {
  p.dtype == DType::bfloat16 ? pack_row_of<DType::bfloat16>(p, row, first, last) : pack_row_of<DType::float32>(p, row, first, last);
}

void unpack_groups(const UnpackParams& p, const CodeTable& table, int64_t row, int64_t first, int64_t last) {
  first = p.dtype == DType::bfloat16 ? unpack_bf16(p, table, row, first, last) : unpack_f32(p, table, row, first, last);
  if (first < last) portable::unpack_groups(p, table, row, first, last);
}

}  // namespace inq::cpu::avx2
