#include "clocks.h"

namespace inq::cuda::emulator {

namespace {

std::vector<Clock*> pool;
size_t width = 0;
uint32_t stamp = 0;
uint64_t launches = 0;
std::unordered_map<const void*, std::shared_ptr<const Others>> published;

// The last two clocks that met in acquire() and what came of it: all threads that wait for one mbarrier share it.
struct {
  Clock *from = nullptr, *known = nullptr, *result = nullptr;
} last;

Clock* make(const Clock* like) {
  Clock* clock;
  if (pool.empty()) {
    clock = new Clock;
  } else {
    clock = pool.back();
    pool.pop_back();
  }
  clock->references = 0;
  clock->mark = 0;
  if (like == nullptr) {
    clock->time.assign(width, 0);
    clock->others = nullptr;
  } else {
    clock->time = like->time;
    clock->others = like->others;
  }
  return clock;
}

void set(Clock*& to, Clock* clock) {
  ++clock->references;
  drop(to);
  to = clock;
}

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  uint32_t* const a = into.data();
  const uint32_t* const b = from.data();
  for (size_t i = 0, n = into.size(); i < n; ++i) a[i] = std::max(a[i], b[i]);
}

std::shared_ptr<const Others> merged(const std::shared_ptr<const Others>& a, const std::shared_ptr<const Others>& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  auto both = std::make_shared<Others>(*a);
  for (const auto& [block, clock] : *b) {
    auto& mine = (*both)[block];
    if (mine == nullptr) {
      mine = clock;
    } else if (mine != clock) {
      auto joined = std::make_shared<std::vector<uint32_t>>(*mine);
      join(*joined, *clock);
      mine = joined;
    }
  }
  return both;
}

void join(Clock& into, const Clock& from) {
  join(into.time, from.time);
  into.others = merged(into.others, from.others);
}

// A clock that only this thread has, and may change.
Clock& own(Thread& thread) {
  if (thread.known->references > 1) set(thread.known, make(thread.known));
  return *thread.known;
}

void learn_of_others(Thread& thread, const std::shared_ptr<const Others>& others) {
  if (others == nullptr) return;
  Clock& clock = own(thread);
  clock.others = merged(clock.others, others);
  const auto same = others->find(thread.block->number);
  if (same != others->end()) join(clock.time, *same->second);
}

void publish_at(const void* p, int block, const std::shared_ptr<const std::vector<uint32_t>>& time,
                const std::shared_ptr<const Others>& others) {
  auto mine = std::make_shared<Others>();
  (*mine)[block] = time;
  auto& slot = published[p];
  slot = merged(merged(slot, others), mine);
}

std::shared_ptr<const std::vector<uint32_t>> snapshot(Thread& thread) {
  auto time = std::make_shared<std::vector<uint32_t>>(thread.known->time);
  (*time)[static_cast<size_t>(thread.index)] = thread.clock++;
  return time;
}

}  // namespace

void drop(Clock*& clock) {
  if (clock != nullptr && --clock->references == 0) {
    clock->others = nullptr;
    pool.push_back(clock);
  }
  clock = nullptr;
}

void begin_launch_clocks() {
  ++launches;
  published.clear();
}

void begin_block_clocks(Block& block) {
  const size_t wanted = static_cast<size_t>(block.threads) + kMbarriers + kWarpgroups;
  if (wanted != width) {
    drop(last.from), drop(last.known), drop(last.result);
    for (Clock* clock : pool) delete clock;
    pool.clear();
    width = wanted;
  }
  Clock* const nothing = make(nullptr);
  for (Thread& thread : block.thread) {
    thread.clock = 1;
    set(thread.known, nothing);
    thread.at_fence = nullptr;
    thread.others_at_fence = nullptr;
    thread.seen = nullptr;
    thread.proxy_fences.clear();
  }
}

void end_block_clocks(Block& block) {
  for (Thread& thread : block.thread) {
    drop(thread.known);
    drop(thread.at_proxy_fence);
  }
  for (Barrier& barrier : block.barriers) drop(barrier.clock);
}

void end_thread(Thread&) {}

void meet(Thread* const* threads, int count, Clock** extra) {
  if (count == 0) return drop(*extra);
  Clock* const first = threads[0]->known;
  bool same = extra == nullptr || *extra == nullptr;
  for (int i = 1; i < count; ++i) same &= threads[i]->known == first;
  Clock* all = first;
  if (!same || first->references != count) {
    all = make(first);
    const uint32_t mark = ++stamp;
    first->mark = mark;
    for (int i = 1; i < count; ++i) {
      Clock* const one = threads[i]->known;
      if (one->mark == mark) continue;
      one->mark = mark;
      join(*all, *one);
    }
    if (extra != nullptr && *extra != nullptr) {
      join(*all, **extra);
      drop(*extra);
    }
    for (int i = 0; i < count; ++i) set(threads[i]->known, all);
  }
  for (int i = 0; i < count; ++i) all->time[static_cast<size_t>(threads[i]->index)] = threads[i]->clock++;
}

void arrive(Thread& thread, Clock*& into) {
  if (into == nullptr) {
    set(into, make(thread.known));
  } else {
    join(*into, *thread.known);
  }
  into->time[static_cast<size_t>(thread.index)] = thread.clock++;
}

void acquire(Thread& thread, Clock* from) {
  if (from == nullptr || from == thread.known) return;
  if (from == last.from && thread.known == last.known) {
    set(thread.known, last.result);
    return;
  }
  Clock* const result = make(thread.known);
  join(*result, *from);
  set(last.from, from);
  set(last.known, thread.known);
  set(last.result, result);
  set(thread.known, result);
}

void learn(Thread& thread, int agent, uint32_t time) {
  uint32_t& known = thread.known->time[static_cast<size_t>(agent)];
  if (known < time) own(thread).time[static_cast<size_t>(agent)] = time;
}

// launch, block, thread, clock: 12, 20, 11 and 21 bits.
uint64_t wide_epoch(const Thread& thread) {
  return (launches & 0xFFF) << 52 | static_cast<uint64_t>(thread.block->number & 0xFFFFF) << 32 | epoch(thread);
}

bool wide_ordered(const Thread& thread, uint64_t before) {
  if (before >> 52 != (launches & 0xFFF)) return true;
  const int block = static_cast<int>(before >> 32 & 0xFFFFF);
  if (block == (thread.block->number & 0xFFFFF)) return ordered(thread, static_cast<uint32_t>(before));
  if (thread.known->others == nullptr) return false;
  const auto found = thread.known->others->find(block);
  if (found == thread.known->others->end()) return false;
  const uint32_t low = static_cast<uint32_t>(before);
  return (*found->second)[low >> kClockBits] >= (low & ((1u << kClockBits) - 1));
}

void publish(Thread& thread, const void* p) {
  const auto others = thread.known->others;
  publish_at(p, thread.block->number, snapshot(thread), others);
}

void observe(Thread& thread, const void* p) {
  const auto found = published.find(p);
  if (found != published.end()) learn_of_others(thread, found->second);
}

void publish_relaxed(Thread& thread, const void* p) {
  if (thread.at_fence != nullptr) publish_at(p, thread.block->number, thread.at_fence, thread.others_at_fence);
}

void observe_relaxed(Thread& thread, const void* p) {
  if (published.empty()) return;
  const auto found = published.find(p);
  if (found != published.end()) thread.seen = merged(thread.seen, found->second);
}

void fence(Thread& thread) {
  learn_of_others(thread, thread.seen);
  thread.seen = nullptr;
  thread.others_at_fence = thread.known->others;
  thread.at_fence = snapshot(thread);
}

void remember_proxy_fence(Thread& thread) { set(thread.at_proxy_fence, thread.known); }

}  // namespace inq::cuda::emulator
