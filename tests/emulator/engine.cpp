// The scheduler: blocks, warps and threads in a seeded random order; barriers; what all lanes of a warp do together.
#include "engine.h"

#include <chrono>
#include <cstdarg>

#include "clocks.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if defined(INQ_SWITCH)
asm(R"(
.text
.globl inq_emulator_switch
.hidden inq_emulator_switch
.type inq_emulator_switch, @function
inq_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size inq_emulator_switch, .-inq_emulator_switch
)");
#endif

namespace inq::cuda::emulator {

Options options;
Thread* current = nullptr;
int until_switch = 1;
uint64_t progress = 0;
std::vector<Fault> faults;
cudaError_t (*submitting)(cudaStream_t, const char*, int) = nullptr;

namespace {

struct Launch {
  const void* kernel;
  const void* params;
  void (*invoke)(const void*, const void*);
};

uint64_t random_state = 1;
Fiber scheduler;
Stacks stacks;
Launch launched;
std::vector<Block*> resident;
std::vector<Warp*> ready;
std::vector<Block*> spare;  // blocks that have ended, for the next ones
int spinning = 0;           // threads that wait for a value
bool given_up = false;
uint64_t switches = 0;

}  // namespace

uint64_t random_bits() {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1Dull;
}

std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

// --- places and faults --------------------------------------------------------------------------------------------------

namespace {

struct Known {
  const char* file = nullptr;
  int line = 0;
  Place place = 0;
};
Known recent[1024];
std::vector<std::pair<std::string, int>> places = {{"", 0}};
std::unordered_map<std::string, Place> place_numbers;

}  // namespace

Place place_of(const char* file, int line) {
  Known& slot = recent[(reinterpret_cast<uintptr_t>(file) ^ static_cast<unsigned>(line) * 0x9E5u) & 1023];
  if (slot.file == file && slot.line == line) return slot.place;
  const auto [at, is_new] =
      place_numbers.try_emplace(std::string(file) + ':' + std::to_string(line), static_cast<Place>(places.size()));
  if (is_new) places.emplace_back(file, line);
  slot = {file, line, at->second};
  return at->second;
}

std::string name_of(Place place) {
  const auto& [file, line] = places[place];
  const size_t slash = file.rfind('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ':' + std::to_string(line);
}

void fault(const char* kind, Place place, std::string detail) {
  const auto& [file, line] = places[place];
  for (Fault& one : faults) {
    if (one.line == line && one.kind == kind && one.file == file) {
      ++one.count;
      return;
    }
  }
  faults.push_back({kind, file, std::move(detail), line, current ? current->block->number : -1,
                    current ? current->index : -1, 1});
}

// --- switching ----------------------------------------------------------------------------------------------------------

namespace {

void to_scheduler() {
  Thread* const self = current;
  char mark;
  if (&mark < self->stack + 4096 && &mark > self->stack - (1 << 20)) {
    std::fprintf(stderr, "emulator: a thread's stack of %zu KB is full\n", kStackBytes >> 10);
    std::abort();
  }
  self->fiber.switch_to(scheduler);
}

void run(Thread& thread) {
  current = &thread;
  const unsigned x = static_cast<unsigned>(thread.index);
  threadIdx = {x, 0, 0};
  blockIdx = {thread.block->at.x, thread.block->at.y, thread.block->at.z};
  ++switches;
  scheduler.switch_to(thread.fiber);
  current = nullptr;
}

void make_ready(Warp& warp) {
  if (warp.ready) return;
  warp.ready = true;
  ready.push_back(&warp);
}

void entry() {
  launched.invoke(launched.kernel, launched.params);
  Thread& self = *current;
  self.done = true;
  ++progress;
  end_thread(self);
  self.warp->live &= ~(1u << self.lane);
  --self.block->live;
  if (self.warp->arrived != 0) {
    fault("divergence", self.warp->place,
          text("thread %d ended, and %d lanes of its warp wait for it", self.index, __popc(self.warp->arrived)));
    given_up = true;
  }
  to_scheduler();
}

}  // namespace

void wait(Wait why, Place place) {
  current->wait = why;
  current->place = place;
  if (why == Wait::value) ++spinning;
  to_scheduler();
}

void wake(Thread& thread) {
  if (thread.wait == Wait::value) --spinning;
  thread.wait = Wait::nothing;
  thread.warp->runnable |= 1u << thread.lane;
  make_ready(*thread.warp);
}

void yield() {
  until_switch = 1 + static_cast<int>(random_below(512));
  if (current == nullptr) return;
  current->warp->runnable |= 1u << current->lane;
  make_ready(*current->warp);
  to_scheduler();
}

void give_up() {
  given_up = true;
  if (current != nullptr) {
    wait(Wait::warp, 0);  // never woken
  }
}

// --- warps ----------------------------------------------------------------------------------------------------------------

namespace {

const char* name_of(Op op) {
  constexpr const char* kNames[] = {"sync_warp", "shuffle",   "ballot", "any",        "match",
                                    "ldmatrix",  "movmatrix", "mma",    "setmaxnreg", "wgmma"};
  return kNames[static_cast<int>(op)];
}

}  // namespace

int lane() { return current->lane; }

void collective(Op op, void* argument, Operation operation, const char* file, int line) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  const Place place = place_of(file, line);
  if (warp.arrived == 0) {
    warp.op = op;
    warp.place = place;
  } else if (warp.op != op || warp.place != place) {
    fault("divergence", place,
          text("thread %d is in %s, and lanes of its warp are in %s at %s", self.index, name_of(op), name_of(warp.op),
               emulator::name_of(warp.place).c_str()));
    give_up();
  }
  warp.arguments[self.lane] = argument;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived != 0xFFFFFFFFu) {
    if (warp.live != 0xFFFFFFFFu) {
      fault("divergence", place, text("%d lanes of the warp have ended", 32 - __popc(warp.live)));
      give_up();
    }
    wait(Wait::warp, place);
    return;
  }
  warp.arrived = 0;
  if (operation != nullptr) operation(warp.arguments);
  if (op == Op::sync) meet(warp.threads, 32, nullptr);
  for (Thread* thread : warp.threads) thread->wait = Wait::nothing;
  warp.runnable |= 0xFFFFFFFFu & ~(1u << self.lane);
  make_ready(warp);
}

// --- barriers -------------------------------------------------------------------------------------------------------------

void barrier(int index, int threads, bool wait_too, const char* file, int line) {
  Thread& self = *current;
  Block& block = *self.block;
  const Place place = place_of(file, line);
  const bool all = threads == 0;
  if (all) threads = block.threads;
  if (index < (all ? 0 : 1) || index > 15 || threads % 32 != 0 || threads > block.threads) {
    fault("barrier", place, text("barrier %d for %d threads in a block of %d", index, threads, block.threads));
    give_up();
  }
  Barrier& barrier = block.barriers[index];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.place = place;
  } else if (barrier.expected != threads) {
    fault("barrier", place,
          text("barrier %d for %d threads, and for %d at %s", index, threads, barrier.expected,
               name_of(barrier.place).c_str()));
    give_up();
  }
  uint32_t& came = barrier.came[self.warp->index];
  Place& from = barrier.from[self.warp->index];
  if (came == 0) from = place;
  if (from != place) {
    fault("divergence", place,
          text("thread %d comes to barrier %d, and lanes of its warp came to it at %s", self.index, index,
               name_of(from).c_str()));
    give_up();
  }
  if (came >> self.lane & 1) {
    fault("barrier", place, text("thread %d comes to barrier %d a second time, before all others have", self.index, index));
    give_up();
  }
  came |= 1u << self.lane;
  ++barrier.arrived;
  if (wait_too) {
    barrier.waiting.push_back(&self);
  } else {
    arrive(self, barrier.clock);
  }
  if (barrier.arrived < barrier.expected) {
    self.barrier = index;
    if (wait_too) wait(Wait::barrier, place);
    return;
  }
  for (const Warp& warp : block.warp) {
    const uint32_t lanes = barrier.came[warp.index];
    if (lanes == 0 || lanes == 0xFFFFFFFFu) continue;
    fault("divergence", place,
          text("barrier %d has its %d threads, and of warp %d lanes %08x alone", index, threads, warp.index, lanes));
    give_up();
  }
  meet(barrier.waiting.data(), static_cast<int>(barrier.waiting.size()), &barrier.clock);
  barrier.arrived = 0;
  std::fill_n(barrier.came, 32, 0u);
  ++progress;
  for (Thread* thread : barrier.waiting)
    if (thread != &self) wake(*thread);
  barrier.waiting.clear();
}

// --- blocks ---------------------------------------------------------------------------------------------------------------

namespace {

constexpr int kSharedMost = 227 << 10, kGuard = 4096;

// A block's, of architectures that kernels are compiled for.
int shared_most() {
  switch (options.capability) {
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: return 99 << 10;
    default: return kSharedMost;
  }
}

Block* begin_block(int number, dim3 grid, int threads, int shared_bytes) {
  Block* block;
  if (spare.empty()) {
    block = new Block;
    void* memory = mmap(nullptr, kSharedMost + 1024 + 2 * kGuard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    block->memory = static_cast<char*>(memory);
    block->shared = block->memory + kGuard;
  } else {
    block = spare.back();
    spare.pop_back();
  }
  block->number = number;
  block->at = dim3(static_cast<unsigned>(number) % grid.x, static_cast<unsigned>(number) / grid.x % grid.y,
                   static_cast<unsigned>(number) / grid.x / grid.y);
  block->shared_bytes = shared_bytes;
  if (block->threads != threads) {
    block->threads = threads;
    block->thread.clear();
    block->warp.clear();
    block->thread.resize(static_cast<size_t>(threads));
    block->warp.resize(static_cast<size_t>(threads / 32));
  }
  block->live = threads;
  for (Barrier& barrier : block->barriers) {
    barrier.arrived = 0;
    std::fill_n(barrier.came, 32, 0u);
    barrier.waiting.clear();
    barrier.clock = nullptr;
  }
  begin_block_memory(*block);
  begin_block_clocks(*block);
  begin_block_async(*block);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = block->thread[static_cast<size_t>(i)];
    Warp& warp = block->warp[static_cast<size_t>(i / 32)];
    warp.threads[i % 32] = &thread;
    thread.block = block;
    thread.warp = &warp;
    thread.index = i;
    thread.lane = i % 32;
    thread.done = false;
    thread.wait = Wait::nothing;
    thread.spins_on = nullptr;
    thread.copies.clear();
    thread.copy_groups = 0;
    thread.stack = stacks.take();
    thread.fiber.prepare(thread.stack, i, entry);
  }
  for (size_t i = 0; i < block->warp.size(); ++i) {
    Warp& warp = block->warp[i];
    warp.block = block;
    warp.index = static_cast<int>(i);
    warp.runnable = warp.live = 0xFFFFFFFFu;
    warp.arrived = 0;
    warp.ready = false;
    make_ready(warp);
  }
  resident.push_back(block);
  return block;
}

void end_block(Block* block) {
  for (const Barrier& barrier : block->barriers)
    if (block->live == 0 && barrier.arrived > 0)
      fault("barrier", barrier.place,
            text("block %d ended, and %d of %d threads have arrived at barrier %d, for nobody", block->number,
                 barrier.arrived, barrier.expected, static_cast<int>(&barrier - block->barriers)));
  end_block_async(*block);
  end_block_clocks(*block);
  for (Thread& thread : block->thread) {
    stacks.give(thread.stack);
    thread.stack = nullptr;
  }
  spare.push_back(block);
}

const char* describe(const Thread& thread) {
  switch (thread.wait) {
    case Wait::warp: return "the other lanes of its warp";
    case Wait::barrier: return "a barrier";
    case Wait::mbarrier: return "an mbarrier";
    case Wait::value: return "a value of another block";
    case Wait::registers: return "registers";
    case Wait::wgmma: return "the other warps' wgmma";
    default: return "nothing";
  }
}

// Nothing can go on: one fault for each line where threads wait.
void report_stuck(const char* kind_or_null, const char* why) {
  bool partial = false;
  for (Block* block : resident)
    for (Warp& warp : block->warp) partial |= warp.arrived != 0;
  for (Block* block : resident) {
    for (Thread& thread : block->thread) {
      if (thread.done) continue;
      if (kind_or_null != nullptr && thread.wait == Wait::nothing) {
        current = &thread;
        fault(kind_or_null, thread.place, text("%s, thread %d of block %d too", why, thread.index, block->number));
        current = nullptr;
        continue;
      }
      const Warp& warp = *thread.warp;
      std::string detail = text("%s: thread %d of block %d waits for %s", why, thread.index, block->number,
                                describe(thread));
      const char* kind = partial ? "divergence" : "deadlock";
      if (thread.wait == Wait::warp) {
        detail = text("lanes %08x of the warp are in %s, the others elsewhere", warp.arrived, name_of(warp.op));
      } else if (thread.wait == Wait::barrier) {
        const Barrier& barrier = block->barriers[thread.barrier];
        const int ended = block->threads - block->live;
        detail += text(" (barrier %d, %d of %d threads came", thread.barrier, barrier.arrived, barrier.expected);
        detail += ended > 0 ? text(", %d threads have ended)", ended) : ")";
        if (ended > 0) kind = "divergence";
      } else if (thread.wait == Wait::mbarrier) {
        detail += describe_mbarrier(thread);
      }
      current = &thread;
      fault(kind, thread.place, detail);
      current = nullptr;
    }
  }
}

// What the processors have room for: 2048 threads, 32 blocks and some shared memory each, of which a block takes 1 KB more
// than it asks for. Registers would allow fewer.
int blocks_at_once(int threads, int shared_bytes) {
  const int of_one = std::min({32, 2048 / threads, (shared_most() + 1024) / (shared_bytes + 1024)});
  return std::max(options.processors * of_one, 1);
}

void run_warp(Warp& warp) {
  // The lanes that can run now, from a random one on.
  const int first = static_cast<int>(random_below(32));
  uint32_t mask = warp.runnable;
  for (int i = 0; i < 32 && !given_up; ++i) {
    const int lane = (first + i) & 31;
    if (!(mask >> lane & 1)) continue;
    warp.runnable &= ~(1u << lane);
    run(*warp.threads[lane]);
  }
}

}  // namespace

void launch(dim3 grid, int threads, int shared_bytes, const void* kernel, const void* params,
            void (*invoke)(const void* kernel, const void* params), bool& valid, const char* file, int line) {
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  valid = threads > 0 && threads <= 1024 && shared_bytes >= 0 && shared_bytes <= shared_most() && blocks > 0 &&
          blocks <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535;
  if (!valid || threads % 32 != 0) {
    fault("launch", file, line,
          text("a grid of %u x %u x %u blocks of %d threads, %d bytes of shared memory: sm_%d has %d", grid.x, grid.y,
               grid.z, threads, shared_bytes, options.capability, shared_most()));
    valid = false;
    return;
  }
  launched = {kernel, params, invoke};
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  begin_launch_clocks();
  begin_launch_async();
  given_up = false;
  switches = 0;
  spinning = 0;
  int64_t begun = 0;
  const int at_once = 1 + static_cast<int>(random_below(static_cast<uint32_t>(options.resident)));
  // CUDA promises no order of blocks.
  const bool backwards = random_below(2) == 0;
  const int capacity = options.capacity > 0 ? options.capacity : blocks_at_once(threads, shared_bytes);
  const auto begin_next = [&] {
    const int64_t i = begun++;
    begin_block(static_cast<int>(backwards ? blocks - 1 - i : i), grid, threads, shared_bytes);
  };
  const auto start = std::chrono::steady_clock::now();
  uint64_t next_look = 4096;
  int fruitless = 0;
  uint64_t seen = progress;
  while (!given_up) {
    while (begun < blocks && static_cast<int>(resident.size()) < std::min(at_once, capacity))
      begin_next();
    if (ready.empty()) {
      if (resident.empty()) break;
      if (deliver_something(resident)) continue;
      if (begun < blocks && static_cast<int>(resident.size()) < capacity) {
        begin_next();  // as many blocks run at once as have to
        continue;
      }
      if (progress != seen) fruitless = 0;
      seen = progress;
      if (spinning > 0 && ++fruitless < 8) {  // perhaps no spin: it reads the same value twice, and goes on
        for (Block* block : resident)
          for (Thread& thread : block->thread)
            if (!thread.done && thread.wait == Wait::value) wake(thread);
        continue;
      }
      report_stuck(nullptr, "no thread can go on");
      break;
    }
    if (random_below(64) == 0) deliver_early(resident);
    const size_t pick = random_below(static_cast<uint32_t>(ready.size()));
    Warp& warp = *ready[pick];
    Block* const block = warp.block;
    run_warp(warp);
    if (warp.runnable == 0) {
      // The list may have grown; this warp's place in it has not changed.
      ready[pick] = ready.back();
      ready.pop_back();
      warp.ready = false;
    }
    if (block->live == 0) {
      resident.erase(std::find(resident.begin(), resident.end(), block));
      end_block(block);
    }
    if (switches > next_look) {
      next_look = switches + 4096;
      deliver_something(resident);  // some threads may be looking for it and never wait
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
      if (spent.count() > options.seconds) {
        report_stuck("deadlock", text("still running after %.0f seconds", options.seconds).c_str());
        break;
      }
    }
  }
  for (Block* block : resident) end_block(block);
  resident.clear();
  ready.clear();
  current = nullptr;
}

// A store that others may be waiting for.
void value_changed(const int* p) {
  if (spinning == 0) return;
  for (Block* block : resident)
    for (Thread& thread : block->thread)
      if (!thread.done && thread.wait == Wait::value && thread.spins_on == p) wake(thread);
}

void reset(uint64_t seed) {
  faults.clear();
  options.seed = seed;
  random_state = (seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 8; ++i) random_bits();
  until_switch = 1;
}

}  // namespace inq::cuda::emulator

namespace inq::cuda {

using namespace emulator;

char* dynamic_shared() { return current->block->shared; }

uint64_t wgmma_descriptor(const void* start, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(start) % 16 != 0)
    fault("alignment", file, line, "a descriptor holds no address between multiples of 16");
  const uint64_t address = (shared_address(start) & 0x3FFFF) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - current->block->shared) + 1024;
}

void sync_warp(const char* file, int line) { collective(Op::sync, nullptr, nullptr, file, line); }

namespace {

template <Op kOp>
uint32_t vote(uint32_t value, Operation operation, const char* file, int line) {
  collective(kOp, &value, operation, file, line);
  return value;
}
uint32_t& number(void* p) { return *static_cast<uint32_t*>(p); }

}  // namespace

uint32_t ballot(bool truth, const char* file, int line) {
  return vote<Op::ballot>(
      truth,
      [](void* const(&all)[32]) {
        uint32_t mask = 0;
        for (int i = 0; i < 32; ++i) mask |= number(all[i]) << i;
        for (void* one : all) number(one) = mask;
      },
      file, line);
}
bool any(bool truth, const char* file, int line) {
  return vote<Op::any>(
      truth,
      [](void* const(&all)[32]) {
        uint32_t some = 0;
        for (void* one : all) some |= number(one);
        for (void* one : all) number(one) = some;
      },
      file, line);
}
uint32_t match(uint32_t value, const char* file, int line) {
  return vote<Op::match>(
      value,
      [](void* const(&all)[32]) {
        uint32_t values[32];
        for (int i = 0; i < 32; ++i) values[i] = number(all[i]);
        for (int i = 0; i < 32; ++i) {
          uint32_t mask = 0;
          for (int j = 0; j < 32; ++j) mask |= uint32_t{values[i] == values[j]} << j;
          number(all[i]) = mask;
        }
      },
      file, line);
}

}  // namespace inq::cuda

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using inq::cuda::emulator::options;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = options.processors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = options.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = options.capability % 10; break;
    default: *value = inq::cuda::emulator::shared_most();
  }
  return cudaSuccess;
}
