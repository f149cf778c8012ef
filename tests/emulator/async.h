// What is in flight in a block: bulk copies, mbarriers, wgmma.
#pragma once

#include "clocks.h"

namespace inq::cuda::emulator {

struct MbarrierState {
  uint32_t offset = 0;  // in shared memory
  int arrivals = 0;     // of each phase
  int missing = 0;      // of this phase
  int64_t bytes = 0;    // that this phase still waits for
  uint32_t phase = 0;   // how many are over
  uint32_t made = 0;    // epoch
  Clock* gathering = nullptr;  // of this phase
  Clock* complete = nullptr;   // of the last one
  Thread* maker = nullptr;
  bool fenced = false;
  Place place = 0;
  std::vector<Thread*> waiting;
};

// A copy to shared memory that an mbarrier waits for.
struct Bulk {
  char* shared = nullptr;
  int bytes = 0;
  const char* global = nullptr;  // or a box
  TensorMap map;
  bool box = false;
  int column = 0, row = 0;
  int mbarrier = 0;
  Place place = 0;
};

// wgmma of one warp: a quarter of its warpgroup's.
struct Issued {
  int product = 0, n = 0;
  uint64_t descriptor = 0;
  bool accumulate = false;
  const uint32_t* a[32];
  uint32_t values[32][4];
  int accumulator = 0;
  uint32_t group = 0;
  Place place = 0;
};
struct Accumulator {
  float* d[32] = {};
  int n = 0;
  int in_flight = 0;
  std::vector<float> values;  // [lane][n / 2]
};
struct WarpAsync {
  std::vector<Issued> issued;
  std::vector<Accumulator> accumulators;
  uint32_t committed = 0, done = 0, count = 0;
  bool open = false;  // a group that is not committed
  int registers = 0;
  size_t registers_count = 0;  // how often they have changed
  Place registers_place = 0;   // where the last time
};
// What the first warp of a warpgroup said, for the others to agree with.
struct Said {
  int product, n;
  uint64_t descriptor;
  bool accumulate;
  Place place;
};

struct Async {
  std::vector<MbarrierState> mbarriers;
  std::vector<Bulk> bulks;
  std::vector<WarpAsync> warp;
  std::vector<Said> said[kWarpgroups];
  std::vector<int> said_registers[kWarpgroups];
};

// wgmma.cpp
void begin_block_wgmma(Block& block);
void end_block_wgmma(Block& block);

// How an address in shared memory is swizzled; mode as in a matrix descriptor: 0 none, 1 128 bytes, 2 64, 3 32.
inline uint32_t swizzled(uint32_t address, int mode) {
  switch (mode) {
    case 1: return address ^ (address >> 3 & 0x70);
    case 2: return address ^ (address >> 3 & 0x30);
    case 3: return address ^ (address >> 3 & 0x10);
    default: return address;
  }
}

}  // namespace inq::cuda::emulator
