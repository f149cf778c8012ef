// A thread of a kernel is a fiber: a stack, and a switch that saves what the ABI says a function must keep.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__x86_64__) && !defined(INQ_UCONTEXT)
#define INQ_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace inq::cuda::emulator {

constexpr size_t kStackBytes = 128 << 10;  // of address space: only touched pages cost memory

// Stacks are handed out again and again; a launch of small blocks touches the same few megabytes.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) grow();
    char* const stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(char* stack) { free_.push_back(stack); }

 private:
  void grow() {
    constexpr int kCount = 64;
    void* const memory = mmap(nullptr, kCount * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulator: stacks");
      std::abort();
    }
    for (int i = kCount; i-- > 0;) free_.push_back(static_cast<char*>(memory) + i * kStackBytes);
  }
  std::vector<char*> free_;
};

#if defined(INQ_SWITCH)

// Pushes the six registers a function must keep, changes stacks, pops the other fiber's.
extern "C" __attribute__((visibility("hidden"))) void inq_emulator_switch(void** save, void* to);

struct Fiber {
  void* sp = nullptr;

  void prepare(char* stack, int colour, void (*entry)()) {
    // Tops at different offsets, so that the stacks of a warp do not share the sets of the cache.
    char* const top = stack + kStackBytes - 64 - (colour % 32) * 64;
    auto* slot = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
    *--slot = nullptr;  // so that entry() finds the alignment a call leaves
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    sp = slot;
  }
  void switch_to(Fiber& other) { inq_emulator_switch(&sp, other.sp); }
};

#else

struct Fiber {
  ucontext_t context;
  void prepare(char* stack, int, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Fiber& other) { swapcontext(&context, &other.context); }
};

#endif

}  // namespace inq::cuda::emulator
