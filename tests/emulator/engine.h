// The emulator's own state: threads, warps, blocks, the shadow of memory, faults.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace inq::cuda::emulator {

// --- faults -----------------------------------------------------------------------------------------------------------

struct Fault {
  std::string kind, file, detail;
  int line, block, thread, count;
};

// Places are small numbers, so that the shadow of a word can hold several.
using Place = uint16_t;
Place place_of(const char* file, int line);
std::string name_of(Place place);

// Of the running thread, or of thread -1 outside kernels. Faults of one kind at one line are counted, not repeated.
void fault(const char* kind, Place place, std::string detail);
inline void fault(const char* kind, const char* file, int line, std::string detail) {
  fault(kind, place_of(file, line), std::move(detail));
}

// --- happens-before ---------------------------------------------------------------------------------------------------

// What a thread knows of the others: everything that thread u did before its clock time[u] came before what the owner
// does now. Threads that have just met share one. Beside the block's threads there are agents, which do what is
// asynchronous: one for each mbarrier (its time: phases), one for each warpgroup's wgmma (groups).
// Of other blocks: their clocks, by their number in the grid.
using Others = std::map<int, std::shared_ptr<const std::vector<uint32_t>>>;
struct Clock {
  int references = 0;
  uint32_t mark = 0;
  std::shared_ptr<const Others> others;
  std::vector<uint32_t> time;
};

// --- shared memory's shadow ---------------------------------------------------------------------------------------------

// Of four bytes, or of one where a word is used by bytes.
struct Cell {
  uint32_t write;  // thread << kClockBits | clock
  uint32_t read[3];
  Place write_place, read_place[3];
  uint8_t written;  // a bit for each byte
  uint8_t flags;
  uint16_t unused;
};
constexpr int kClockBits = 21;  // 2048 threads and agents, two million synchronisations
constexpr uint8_t kAtomic = 1, kPending = 2, kByBytes = 4, kGeneric = 8, kMbarrier = 16;

// --- threads ------------------------------------------------------------------------------------------------------------

enum class Wait : uint8_t { nothing, warp, barrier, mbarrier, value, registers, wgmma };

struct Copy {
  char* shared;
  const void* global;
  int bytes;
  bool valid;
  int group;
  Place place;
  uint64_t source;  // fingerprint
};

struct Block;
struct Warp;
struct Async;

struct Thread {
  Fiber fiber;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0, lane = 0;
  bool done = false;
  Wait wait = Wait::nothing;
  Place place = 0;  // of the last access or wait
  const int* spins_on = nullptr;  // ld_acquire: the last address, and what was there
  int spin_value = 0;
  int barrier = 0;  // or the parity
  uint32_t clock = 1;
  Clock* known = nullptr;
  std::shared_ptr<const std::vector<uint32_t>> at_fence;  // known at the last thread_fence
  std::shared_ptr<const Others> others_at_fence;
  Clock* at_proxy_fence = nullptr;
  std::shared_ptr<const Others> seen;  // read with atomics, not yet ordered by a fence
  std::vector<uint32_t> proxy_fences;  // its clocks at them
  const char* fenced_from = nullptr;   // wgmma_fence: what the stack held
  std::vector<char> fenced;
  std::vector<Copy> copies;
  int copy_groups = 0;
};

struct Warp {
  Thread* threads[32] = {};
  Block* block = nullptr;
  int index = 0;
  uint32_t runnable = 0, live = 0;
  bool ready = false;  // is in the scheduler's list
  // The collective that its lanes are in.
  uint32_t arrived = 0;
  Op op = Op::sync;
  Place place = 0;
  void* arguments[32] = {};
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  Clock* clock = nullptr;  // of those that have only arrived
  uint32_t came[32] = {};  // a bit for each thread, a word for each warp
  Place place = 0;
  Place from[32] = {};  // where each warp is: all lanes at one
};

struct Block {
  dim3 at;
  int number = 0;  // in the grid
  int threads = 0, live = 0;
  char* memory = nullptr;  // shared memory, with guards
  char* shared = nullptr;
  int shared_bytes = 0;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  Barrier barriers[16];
  std::vector<Cell> cells, byte_cells;
  Async* async = nullptr;
};

struct Options {
  uint64_t seed = 0;
  int processors = 4;    // multiprocessors that the device says it has
  int capability = 90;
  int resident = 8;      // blocks begun before any has to wait for one that is not begun
  int capacity = 0;      // blocks that can run at once; 0: as many as the processors have room for
  bool short_accumulator = false;  // e4m3 wgmma keeps 14 bits
  double seconds = 60;   // for one launch
};
extern Options options;

extern Thread* current;  // nullptr outside kernels
extern int until_switch;

uint64_t random_bits();
inline uint32_t random_below(uint32_t n) { return static_cast<uint32_t>((random_bits() >> 32) * n >> 32); }

// To the scheduler and back. wake() makes a thread run again.
void wait(Wait why, Place place);
void wake(Thread& thread);
void yield();
// Ends the launch; returns where no thread runs.
void give_up();
extern uint64_t progress;  // counts what may end another thread's wait

// Now and then another thread runs between two accesses.
inline void maybe_switch() {
  if (--until_switch <= 0) yield();
}

// --- memory -------------------------------------------------------------------------------------------------------------

// A buffer that kernels may reach.
struct Buffer {
  std::string name;
  char* begin;
  char* end;
  bool writable, initialised;
  int granule = 4;  // bytes that have a cell of their own
  struct Word {
    uint64_t write, read;
    Place write_place, read_place;
    uint8_t flags;
  };
  Word* words = nullptr;
  int64_t read = 0, written = 0;  // bytes, by kernels; an atomic does both
};

void begin_block_memory(Block& block);
Buffer* find_buffer(const void* p, int64_t bytes);

// Records and checks what `thread` does to bytes of its block's shared memory; false where it may not.
bool touch_shared(Thread& thread, const void* p, int bytes, Do what, Place place);
bool touch_global(Thread& thread, const void* p, int64_t bytes, Do what, Place place);
// The read is of what no thread may write while the kernel runs; `what` reads it.
void check_constant(Thread& thread, const void* p, int64_t bytes, Place place, const char* kind, const char* what);
bool in_shared(const Block& block, const void* p);

// cp.async: from its issue to its landing nothing may touch the bytes.
bool issue_copy(Thread& thread, char* shared, int bytes, Place place);
void land_copy(Thread& thread, char* shared, int bytes, Place place);
// From now on only the functions of mbarriers may touch these eight bytes.
void mark_mbarrier(Block& block, const void* p);

// Bulk copies: as above, but another proxy writes. `landed` is the epoch that mbarrier_wait lets others know of.
bool issue_bulk(Thread& thread, char* shared, int bytes, Place place);
void land_bulk(Block& block, char* shared, int bytes, uint32_t landed);
// What an agent reads from now until `time` of its clock.
void read_global_async(Thread& thread, const void* p, int64_t bytes, int agent, uint32_t time, Place place);
bool read_async(Thread& thread, int64_t offset, int bytes, int agent, uint32_t time, Place place);

// What an uninitialised variable holds: build.py lets the compiler fill them.
constexpr uint32_t kUnwritten = 0xFEFEFEFEu;
// In the accumulators of a wgmma that is not done: a signalling NaN, which arithmetic makes a quiet one.
constexpr uint32_t kInFlight = 0xFF80DEADu, kQuiet = 0x00400000u;

// Of bytes in a buffer that kernels may write, 0 of others: whether they change under cp.async.
uint64_t fingerprint(const void* p, int64_t bytes);

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace inq::cuda::emulator
