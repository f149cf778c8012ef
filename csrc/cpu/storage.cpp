#include "storage.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace inq::cpu {
namespace {

// Groups a thread at least: some 100 KB of float32 weights, so that a fork is worth it.
constexpr int64_t kGrain = 4096;

uint32_t float_bits(const void* w, DType dtype, int64_t i) {
  if (dtype == DType::bfloat16) return static_cast<uint32_t>(static_cast<const uint16_t*>(w)[i]) << 16;
  uint32_t bits;
  std::memcpy(&bits, static_cast<const uint32_t*>(w) + i, 4);
  return bits;
}

// f(row, first, last) for pieces of rows that cover all groups.
template <class F>
void for_groups(int64_t rows, int64_t groups, const F& f) {
  if (groups == 0) return;
  parallel_for(0, rows * groups, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / groups, first = begin % groups;
      const int64_t last = std::min(groups, first + (end - begin));
      f(row, first, last);
      begin += last - first;
    }
  });
}

}  // namespace

CodeTable code_table(Format f, int n1, const float* scale) {
  CodeTable table{};
  for (int code = 0; code < 1 << f.bits; ++code) {
    const int index = index_of(f, code & ((1 << (f.bits - 1)) - 1));
    if (index < 0) continue;
    // In double, where no level is out of range, and rounded once; the row scale rounds, powers of two do not.
    double value = std::ldexp(code >> (f.bits - 1) ? -1.0 : 1.0, n2_of(f, n1) + index);
    if (scale != nullptr) value *= static_cast<double>(*scale);
    table.value[code] = static_cast<float>(value + 0.0);
  }
  return table;
}

namespace portable {

void pack_groups(const PackParams& p, int64_t row, int64_t first, int64_t last) {
  const int bits = p.format.bits, n1 = p.n1[row], n2 = n2_of(p.format, n1);
  uint8_t* out = p.out + row * row_bytes(p.format, p.k);
  for (int64_t group = first; group < last; ++group) {
    uint64_t word = 0;
    for (int64_t i = group * 8; i < std::min(p.k, group * 8 + 8); ++i) {
      const uint32_t w = float_bits(p.w, p.dtype, row * p.k + i);
      const uint32_t magnitude = quantize_magnitude(w & 0x7FFFFFFFu, n1, n2);
      if (magnitude == 0) continue;
      const uint32_t field = field_of(p.format, static_cast<int>(magnitude >> 23) - 127 - n2);
      word |= static_cast<uint64_t>((w >> 31) << (bits - 1) | field) << (bits * (i % 8));
    }
    for (int b = 0; b < bits; ++b) out[group * bits + b] = static_cast<uint8_t>(word >> (8 * b));
  }
}

void unpack_groups(const UnpackParams& p, const CodeTable& table, int64_t row, int64_t first, int64_t last) {
  const int bits = p.format.bits;
  const uint8_t* codes = p.codes + row * row_bytes(p.format, p.k);
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t group = first; group < last; ++group) {
    uint64_t word = 0;
    for (int b = 0; b < bits; ++b) word |= static_cast<uint64_t>(codes[group * bits + b]) << (8 * b);
    for (int64_t i = group * 8; i < std::min(p.k, group * 8 + 8); ++i) {
      const float value = table.value[word >> (bits * (i % 8)) & mask];
      if (p.dtype == DType::bfloat16) {
        static_cast<uint16_t*>(p.out)[row * p.k + i] = to_bf16(value);
      } else {
        static_cast<float*>(p.out)[row * p.k + i] = value;
      }
    }
  }
}

}  // namespace portable

void pack(const PackParams& p) {
#if defined(__x86_64__)
  const auto kernel = current_isa() >= Isa::avx2 ? avx2::pack_groups : portable::pack_groups;
#else
  const auto kernel = portable::pack_groups;
#endif
  for_groups(p.n, (p.k + 7) / 8, [&](int64_t row, int64_t first, int64_t last) { kernel(p, row, first, last); });
}

void unpack(const UnpackParams& p) {
#if defined(__x86_64__)
  const auto kernel = current_isa() >= Isa::avx2 ? avx2::unpack_groups : portable::unpack_groups;
#else
  const auto kernel = portable::unpack_groups;
#endif
  for_groups(p.n, (p.k + 7) / 8, [&](int64_t row, int64_t first, int64_t last) {
    const float* scale = p.scale == nullptr ? nullptr : p.scale + row;
    kernel(p, code_table(p.format, p.n1[row], scale), row, first, last);
  });
}

}  // namespace inq::cpu
