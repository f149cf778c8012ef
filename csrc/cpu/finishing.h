// How a stream ends. Included where loops are compiled, each with a copy of its own (gemm_kernels.h says why).
#pragma once

#include "kernels.h"

namespace {

// Not std::min: an inline function of the library, compiled here for more than the machine may have, could be the copy
// that the linker keeps for everyone.
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The arguments of `finish` for `columns` columns of sums from `panel` on, as many of them as y has.
inline inq::cpu::FinishArgs finish_of(const inq::cpu::StreamArgs& s, int64_t panel, const float* c, int columns) {
  const int column = static_cast<int>(panel * inq::cpu::kPanelRows);
  inq::cpu::FinishArgs f = s.finish;
  f.c = c;
  f.c_stride = columns;
  f.columns = static_cast<int>(least(columns, f.columns - column));
  f.power += column;
  if (f.scale) f.scale += column;
  if (f.bias) f.bias += column;
  f.out = static_cast<unsigned char*>(f.out) + int64_t{column} * size_of(f.type);
  return f;
}

}  // namespace
