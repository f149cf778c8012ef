// Who knows of what: the happens-before order as vector clocks (engine.h, Clock).
#pragma once

#include "engine.h"

namespace inq::cuda::emulator {

constexpr int kMbarriers = 64, kWarpgroups = 8;  // agents of a block, behind its threads

void begin_launch_clocks();
void begin_block_clocks(Block& block);
void end_block_clocks(Block& block);
void end_thread(Thread& thread);

// All of `threads`, and what `extra` holds of others (it is emptied), know of each other.
void meet(Thread* const* threads, int count, Clock** extra);
// What the thread has done is known to those that acquire `into`.
void arrive(Thread& thread, Clock*& into);
void acquire(Thread& thread, Clock* from);
// The thread knows all that `agent` did up to `time`.
void learn(Thread& thread, int agent, uint32_t time);
void drop(Clock*& clock);

inline uint32_t epoch(const Thread& thread) {
  return static_cast<uint32_t>(thread.index) << kClockBits | thread.clock;
}
inline uint32_t epoch(int agent, uint32_t time) { return static_cast<uint32_t>(agent) << kClockBits | time; }
inline bool ordered(const Thread& thread, uint32_t before) {
  const uint32_t who = before >> kClockBits, time = before & ((1u << kClockBits) - 1);
  return who == static_cast<uint32_t>(thread.index) || thread.known->time[who] >= time;
}

// The same across blocks, for global memory.
uint64_t wide_epoch(const Thread& thread);
bool wide_ordered(const Thread& thread, uint64_t before);
void publish(Thread& thread, const void* p);         // red.release
void observe(Thread& thread, const void* p);         // ld.acquire
void publish_relaxed(Thread& thread, const void* p);  // atomics: what a fence before them covers
void observe_relaxed(Thread& thread, const void* p);  // and what a fence behind them will order
void fence(Thread& thread);
void remember_proxy_fence(Thread& thread);

// Asynchronous things, async.cpp.
void begin_block_async(Block& block);
void end_block_async(Block& block);
void begin_launch_async();
// Nothing else can go on: one copy lands; false if there is none.
bool deliver_something(const std::vector<Block*>& blocks);
void deliver_early(const std::vector<Block*>& blocks);  // perhaps one lands now
std::string describe_mbarrier(const Thread& thread);
void value_changed(const int* p);

}  // namespace inq::cuda::emulator
