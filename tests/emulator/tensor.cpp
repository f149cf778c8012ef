// Tensor cores of one warp: ldmatrix, movmatrix, mma.sync, with the fragments of the PTX ISA.
#include "clocks.h"
#include "engine.h"

namespace inq::cuda {

using namespace emulator;

namespace {

// Where lane l holds an 8 by 8 matrix of 16 bits: row l / 4, columns 2 (l % 4) and the next, lower one first.
struct Matrix {
  uint16_t at[8][8];
  void from_lane(int lane, uint32_t pair) {
    at[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(pair);
    at[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(pair >> 16);
  }
  uint32_t of_lane(int lane) const { return at[lane / 4][lane % 4 * 2] | uint32_t{at[lane / 4][lane % 4 * 2 + 1]} << 16; }
  uint32_t of_lane_transposed(int lane) const {
    return at[lane % 4 * 2][lane / 4] | uint32_t{at[lane % 4 * 2 + 1][lane / 4]} << 16;
  }
};

struct Load {
  uint32_t* d;
  const void* row;
  int matrices;
  bool transposed;
  Place place;
};

struct Multiply {
  float* d;
  const uint32_t *a, *b;
  bool bf16;
  Place place;
};

float number(uint32_t half, bool bf16) {
  const auto bits = static_cast<uint16_t>(half);
  return bf16 ? from_bf16(bits) : from_f16(bits);
}

}  // namespace

namespace {

// Row r of a matrix is read by the lanes that get its numbers, a pair each, or transposed one each, whoever brought the
// address: as shuffles do, ldmatrix makes nothing known to others.
bool read_row(Warp& warp, const char* row, int r, bool transposed, Place place) {
  for (int word = 0; word < 4; ++word) {
    const int lane = transposed ? 8 * word + r / 2 : 4 * r + word;
    if (!touch_shared(*warp.threads[lane], row + 4 * word, 4, Do::read, place)) return false;
  }
  return true;
}

}  // namespace

void emulator::ldmatrix(uint32_t* d, const void* row, int matrices, bool transposed, const char* file, int line) {
  maybe_switch();
  Load mine{d, row, matrices, transposed, place_of(file, line)};
  collective(
      Op::ldmatrix, &mine,
      [](void* const(&all)[32]) {
        const Load& first = *static_cast<Load*>(all[0]);
        Warp& warp = *current->warp;
        for (int m = 0; m < first.matrices; ++m) {
          Matrix matrix;
          for (int r = 0; r < 8; ++r) {
            const int lane = 8 * m + r;
            const Load& one = *static_cast<Load*>(all[lane]);
            std::memset(matrix.at[r], 0xFF, 16);
            if (reinterpret_cast<uintptr_t>(one.row) % 16 != 0)
              fault("alignment", one.place, text("ldmatrix of a row at an address that is no multiple of 16, lane %d", lane));
            else if (read_row(warp, static_cast<const char*>(one.row), r, first.transposed, one.place))
              std::memcpy(matrix.at[r], one.row, 16);
          }
          for (int lane = 0; lane < 32; ++lane)
            static_cast<Load*>(all[lane])->d[m] =
                first.transposed ? matrix.of_lane_transposed(lane) : matrix.of_lane(lane);
        }
      },
      file, line);
}

uint32_t movmatrix_trans(uint32_t a, const char* file, int line) {
  collective(
      Op::movmatrix, &a,
      [](void* const(&all)[32]) {
        Matrix matrix;
        for (int lane = 0; lane < 32; ++lane) matrix.from_lane(lane, *static_cast<uint32_t*>(all[lane]));
        for (int lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(all[lane]) = matrix.of_lane_transposed(lane);
      },
      file, line);
  return a;
}

void emulator::mma(float* d, const uint32_t* a, const uint32_t* b, bool bf16, const char* file, int line) {
  Multiply mine{d, a, b, bf16, place_of(file, line)};
  collective(
      Op::mma, &mine,
      [](void* const(&all)[32]) {
        static float a[16][16], b[16][8];
        const bool bf16 = static_cast<Multiply*>(all[0])->bf16;
        for (int lane = 0; lane < 32; ++lane) {
          const Multiply& one = *static_cast<Multiply*>(all[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i)
            if (one.a[i] == kUnwritten || one.b[i % 2] == kUnwritten || float_to_bits(one.d[i]) == kUnwritten)
              fault("unwritten register", one.place, text("a[%d], b[%d] or d[%d] of lane %d", i, i % 2, i, lane));
          for (int i = 0; i < 4; ++i) {  // a0: row g, k 2t; a1: row g + 8; a2: k + 8; a3: both
            const int row = g + 8 * (i & 1), k = 2 * t + 8 * (i >> 1);
            a[row][k] = number(one.a[i] & 0xFFFF, bf16);
            a[row][k + 1] = number(one.a[i] >> 16, bf16);
          }
          for (int i = 0; i < 2; ++i) {  // b0: k 2t, column g; b1: k + 8
            const int k = 2 * t + 8 * i;
            b[k][g] = number(one.b[i] & 0xFFFF, bf16);
            b[k + 1][g] = number(one.b[i] >> 16, bf16);
          }
        }
        // Products are exact; sums of eight are rounded to fp32 with the accumulator.
        for (int lane = 0; lane < 32; ++lane) {
          float* const d = static_cast<Multiply*>(all[lane])->d;
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
            for (int half = 0; half < 16; half += 8) {
              double sum = d[i];
              for (int k = half; k < half + 8; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
              d[i] = static_cast<float>(sum);
            }
          }
        }
      },
      file, line);
}

}  // namespace inq::cuda
