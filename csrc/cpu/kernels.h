// What an instruction set offers the products: a few loops over packed operands, behind function pointers, so that the
// drivers (linear.cpp, conv2d.cpp) are compiled once and for every machine. The loops are in gemm_kernels.h.
//
// A *step* is what one lane of a register multiplies at once: one k in float32, a pair (k, k + 1) in bfloat16. Left
// operands are packed as dwords [step][rows], decoded weights as [step][columns]; sums are float32. Each element of the
// output is the sum, in ascending order, of the sums of chunks of K, and that of a chunk the sum of the sums of 32 steps
// (bfloat16: of 128, which is a chunk of `linear`), each in ascending order from 0; on tiles it is the sum of the sums of
// 16 steps. It is the same for any blocking, number of rows and number of threads. (One chain over all of K would lose
// several times more than torch's product does.)
#pragma once

#include <cstdint>

#include "inq_format.h"
#include "isa.h"
#include "layout.h"

namespace inq::cpu {

// 128 steps of 64 decoded columns are 32 KB, two thirds of a 48 KB first-level cache.
constexpr int kChunkSteps = 128;

enum class DType : int { float32 = 0, bfloat16 = 1 };
constexpr int size_of(DType type) { return type == DType::float32 ? 4 : 2; }

// `count` elements from each of `rows` pointers → out[step][stride]; steps from ceil(count/pair) up to `steps`, and rows
// from `rows` up to `stride`, are zero. Where Shape::block is more than 1, `steps` is a multiple of it and out is
// [step / block][stride][step % block]: a range of whole blocks is where it would be in [step][stride].
struct PackArgs {
  const void* const* row;
  int rows, stride;
  int64_t count, steps;
  DType type;
  uint32_t* out;
};

// `tiles` tiles of `panels` panels → out[step][16·panels].
struct DecodeArgs {
  const Codebook* book;
  const uint8_t* weight;  // the first tile
  int64_t panel_bytes;    // from one panel to the next
  int64_t tiles;
  int panels;
  uint32_t* out;
};

// As DecodeArgs with k as columns, in float32: `panels` panels → out[16·panels steps][16·column_panels], from half tile
// `first_half` (0: k = 0…15 of the first tile, 1: k = 16…31, and so on).
struct DecodeTransposedArgs {
  const Codebook* book;
  const uint8_t* weight;  // the first panel
  int64_t panel_bytes;
  int panels;
  int64_t first_half;
  int column_panels;
  uint32_t* out;
};

// Rows of decoded weights in another order of k: out row i holds the k at[pair·i], at[pair·i + 1], counted from the
// first k of `in`; −1 is a row of zeros.
struct RegroupArgs {
  const uint32_t* in;
  const int32_t* at;
  int64_t steps;
  int columns;  // a multiple of 16
  uint32_t* out;
};

// c[pixels][16] = Σ_i x[pixel · pixel_stride + offset[i] + lane] · w[i][lane], float32 lane by lane.
struct DirectArgs {
  const float* x;
  const float* w;
  const int64_t* offset;
  int64_t terms, pixels, pixel_stride;
  float* c;
};

// Cache lines to ask for: `lines` of each of some runs that are `stride` bytes apart, numbered run after run;
// of these [first, last).
struct Ask {
  const uint8_t* from;
  int64_t stride, lines, first, last;
};

// c[rows][16·panels] = (accumulate ? c : 0) + a[steps][rows]ᵀ · b[steps][16·panels], summed as said above. b is aligned to
// 64 bytes where it is decoded over.
//
// Or, if taps > 0, without a packed left operand: the steps of row r are `taps` runs of equal length, wherever they are.
// Run t begins `offset` bytes after the address at[t][rows] that `a` then points to. Only where a step is a dword of the
// rows as they are: pair values of `DType`.
struct MultiplyArgs {
  const uint32_t* a;
  const uint32_t* b;
  int64_t steps;
  float* c;
  int rows, panels;
  bool accumulate;
  const uint32_t* next;  // the left operand of the call after this one, or any address: it is asked for, not read
  Ask ask;               // what a later decode will read
  int64_t taps = 0, offset = 0;
};

// y = (c · power) · scale + bias of a block of columns, rounded once to `type`; scale and bias may be null.
struct FinishArgs {
  const float* c;
  int64_t c_stride;
  int rows, columns;
  const float* power;
  const float* scale;
  const float* bias;
  DType type;
  void* out;
  int64_t out_stride;  // elements
};

// All of K for few rows: a[steps][rows], decoded weights only ever in registers or the nearest cache. Ends with `finish`.
// Tall streams take `tiles` of K at a time, and leave sums in sums[panels][rows, whole row tiles][16] for the next k.
struct StreamArgs {
  const Codebook* book;
  const uint8_t* weight;  // the first panel
  int64_t panel_bytes, tiles;
  int64_t panels;
  const uint32_t* a;
  int rows;           // of a; one of kStreamRows, or any where Shape::block is more than 1
  FinishArgs finish;  // rows, power, …, out of the first column; columns of all panels; c is not used
  bool first = true, last = true;  // k of all K; false only where tall
  float* sums = nullptr;           // only where tall, as the next
  Ask ask = {};                    // the rows that will be packed for the next k
};

// The row counts that `stream` is compiled for; others take the next one and zero rows.
constexpr int kStreamRows[] = {1, 2, 3, 4, 6, 8, 12, 16, 24};

// What a set of kernels is compiled for. Constants, so that a plan can be made on any machine.
struct Shape {
  int pair;         // k a step: 1 (float32) or 2 (bfloat16)
  int rows;         // of a micro-tile at most
  int panels;       // of a micro-tile at most
  int stream_rows;  // the largest entry of kStreamRows that is compiled
  int lanes;        // dwords a register
  int registers;    // that `stream` may fill with sums and codes, beside a weight, an x, and the table
  int block = 1;    // steps of a row side by side in the packed left operand; `steps` of `multiply` are a multiple
};
constexpr Shape kPortableShape{1, 2, 1, 2, 4, 12};
constexpr Shape kAvx2Shape{1, 6, 1, 4, 8, 12};
constexpr Shape kAvx512Shape{1, 6, 4, 12, 16, 28};
constexpr Shape kAvx512PairShape{2, 6, 4, 24, 16, 28};
constexpr Shape kAmxShape{2, 32, 2, 64, 16, 4, 16};  // registers: tiles of 16 rows of sums
// From three row tiles on (`tall`) its stream takes so many tiles of k at a time: 24 KB of 64 rows.
constexpr int kTallRows = 33, kTallTiles = 6;

// Panels that `stream` takes at once: eight streams from memory at most, as many as its registers hold.
constexpr int stream_panels(Shape s, int rows) {
  if (s.block > 1) return s.registers / ((rows + 15) / 16);
  const int fitting = s.registers / ((rows + 1) * (kPanelRows / s.lanes));
  return fitting < 1 ? 1 : fitting > 8 ? 8 : fitting;
}

struct Kernels {
  void (*pack)(const PackArgs&);
  void (*decode)(const DecodeArgs&);
  void (*multiply)(const MultiplyArgs&);
  void (*finish)(const FinishArgs&);
  void (*stream)(const StreamArgs&);
  void (*regroup)(const RegroupArgs&);
  // Only where pair is 1, else null.
  void (*decode_transposed)(const DecodeTransposedArgs&);
  void (*direct)(const DirectArgs&);
  // If not null: `multiply`, and then what it has used of b is decoded over. DecodeArgs::out is b, panels are the same.
  void (*multiply_decoding)(const MultiplyArgs&, const DecodeArgs&) = nullptr;
  void (*leave)() = nullptr;  // if not null, to be called on each thread after its last `multiply` of a task
};

const Kernels& portable_kernels();     // float32 and bfloat16 rows, float32 products
const Kernels& avx2_kernels();         // the same
const Kernels& avx512_kernels();       // float32 rows
const Kernels& avx512_pair_kernels();  // bfloat16 rows, products by vdpbf16ps
// Those on AMX tiles are chosen in amx.h.

}  // namespace inq::cpu
