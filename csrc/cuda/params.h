// What kernels are told: raw pointers, sizes and numbers. Free of torch and of CUDA's headers.
//
// All pointers are device memory unless a comment says otherwise. Lists of tensors are tables in device memory too, so
// that one launch serves a whole model; all tensors of a list have one dtype. Whoever calls allocates what is named
// here, scratch included (params say how much); kernels need none of it cleared.
#pragma once

#include <cstdint>

#include "../inq_format.h"
#include "../step_numbers.h"

namespace inq::cuda {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
constexpr int size_of(DType type) { return type == DType::float32 ? 4 : 2; }

// --- training: thresholds, exponents, freezing -------------------------------------------------------------------------

// One tensor of a list. Any alignment that its dtype has; multiples of 16 bytes are faster.
struct WeightTensor {
  void* w;               // contiguous
  uint8_t* mask;         // one bit a weight, set: frozen; null: none is (freezing needs one)
  const uint8_t* keep;   // one bit a weight, clear: pruned; null: all are kept
  int64_t numel;
  int64_t rows, length;  // and the weights of each: numel / rows
  int64_t first_row;     // rows of the tensors before it
  int64_t first_chunk;   // chunks (chunks_of) of the tensors before it
  uint64_t seed;         // of a random partition
  int64_t count;         // how many weights partition is to select
  // Room for the keys of `capacity` weights, whose first digit is that of the threshold (list_capacity).
  uint32_t* list;
  int64_t capacity;
};

// Every tensor has a chunk, an empty one too: somebody must write its results.
INQ_HD constexpr int64_t chunks_of(int64_t numel, int64_t chunk) {
  return numel > chunk ? (numel + chunk - 1) / chunk : 1;
}

// A chunk of partition's: as many weights as may be counted before a counter of 32 bits can overflow.
constexpr int64_t kPartitionChunk = int64_t{1} << 16;
// An eighth of the weights. Of a normal distribution's, 6 % at most have one first digit.
constexpr int64_t list_capacity(int64_t numel) {
  const int64_t most = numel / 8 > 4096 ? numel / 8 : 4096;
  return numel < most ? numel : most;
}

// The counters of one tensor's partition.
struct alignas(16) PartitionState {
  static constexpr int kFirst = 1 << 11, kNext = 1 << 10;
  // First digits, and the sums of the bits below them: of candidates (0), and of other weights that exponents count (1).
  unsigned long long count[2][kFirst], rest[2][kFirst];
  // The second and third digits of those that have the digits before.
  unsigned long long next[2][kNext];
  unsigned long long key;     // the digits found
  unsigned long long wanted;  // how many of those that begin with them are to be selected
  unsigned long long left;    // how many there are
  unsigned long long listed;  // how many of them `list` has
  unsigned long long held;    // how many weights the mask holds back
  int arrivals[6];            // blocks that are done, for each launch
};

struct PartitionParams {
  const WeightTensor* tensors;
  int tensor_count;
  int64_t chunk;   // weights of a block: a multiple of 256, at most kPartitionChunk
  int64_t chunks;  // of all tensors
  int64_t rows;    // of all tensors
  PartitionState* states;  // scratch: [tensor_count]
  int64_t* thresholds;     // [tensor_count, 2]: key and ties; null: not wanted
  int8_t* n1;              // [rows]; null: not wanted
  Format format;           // of the exponents
};

// `mse`: the exponent rule, else from the largest |w|. `channel`: an exponent for each row.
struct PartitionChoice {
  DType dtype;
  bool random, channel, mse;
};

// A chunk of the freezing kernel's: what its block holds in registers.
constexpr int64_t kFreezeChunk = 8192;

// How many ties a chunk has, for the chunks after it.
struct alignas(16) ChunkTies {
  int64_t through;  // in the tensor's chunks up to this one
  int here;
  int known;  // 0: nothing yet, 1: `here`, 2: `through` too
};

struct FreezeParams {
  const WeightTensor* tensors;
  int tensor_count;
  int64_t chunks;             // of kFreezeChunk weights, of all tensors
  const int64_t* thresholds;  // [tensor_count, 2]
  const int8_t* n1;           // [rows of all tensors]
  // Out, [tensor_count]: how many weights are frozen now. Scratch behind it: freeze_scratch_bytes in all, a multiple of
  // 16, and so is the address.
  unsigned long long* frozen;
  Format format;
};

// `frozen`, a ticket, and ChunkTies for each chunk.
constexpr int64_t freeze_ties_offset(int64_t tensors) { return (tensors * 8 + 8 + 15) / 16 * 16; }
constexpr int64_t freeze_scratch_bytes(int64_t tensors, int64_t chunks) {
  return freeze_ties_offset(tensors) + chunks * static_cast<int64_t>(sizeof(ChunkTies));
}

struct FreezeChoice {
  DType dtype;
  bool random;
};

// --- training: optimizer steps ------------------------------------------------------------------------------------------

constexpr int64_t kStepChunk = 8192;

// One parameter; all of its memory is contiguous and in the same order. State is float32.
struct StepTensor {
  void* w;
  const void* grad;     // of w's dtype
  float* first;         // SGD: momentum, null without; AdamW: exp_avg
  float* second;        // AdamW: exp_avg_sq
  const uint8_t* mask;  // one bit a weight, set: frozen, nothing of it changes; null: all weights move
  int64_t numel;
  int64_t first_chunk;  // chunks (chunks_of) of kStepChunk weights of the tensors before it
};

struct SgdParams {
  const StepTensor* tensors;
  int tensor_count;
  int64_t chunks;  // of all tensors
  SgdNumbers numbers;
};
struct AdamwParams {
  const StepTensor* tensors;
  int tensor_count;
  int64_t chunks;
  AdamwNumbers numbers;
};

struct SgdChoice {
  DType dtype;
  bool momentum;
};
struct AdamwChoice {
  DType dtype;
};

// --- storage --------------------------------------------------------------------------------------------------------------

struct PackParams {
  const void* w;     // [n, k], contiguous, finite: 0 or ±2^k of the row's levels
  const int8_t* n1;  // [n]
  uint8_t* out;      // [n, row_bytes(k)]
  int64_t n, k;
  Format format;
};

struct UnpackParams {
  const uint8_t* codes;  // [n, row_bytes(k)]
  const int8_t* n1;      // [n]
  const float* scale;    // [n], finite; null: none
  void* out;             // [n, k], contiguous
  int64_t n, k;
  Format format;
};

struct StorageChoice {
  DType dtype;
};

// The storage layout and a "fragments" layout (inq_kernels/fragments.py): [ceil(n/16), ceil(k/block)] blocks.
struct PrepackParams {
  const uint8_t* codes;   // [n, row_bytes(k)]
  uint8_t* out;           // aligned to 16 bytes
  const uint32_t* table;  // fragments.encode_table: [register, number, code, word]
  int64_t n, k;
  Format format;
};

struct UnprepackParams {
  const uint8_t* fragments;  // aligned to 16 bytes
  uint8_t* codes;            // [n, row_bytes(k)]
  int64_t n, k;
  Format format;
};

}  // namespace inq::cuda
