// Threads for the kernels, which know nothing of torch: register_cpu.cpp implements these two functions with torch's
// parallel_for, and tests/native/threads.cpp with std::thread, which the thread sanitizer understands.
#pragma once

#include <cstdint>

namespace inq::cpu {

using RangeFunction = void (*)(int64_t begin, int64_t end, const void* context);

// Calls function(begin', end', context) for disjoint ranges that cover [begin, end), `grain` items a thread at least.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, const void* context);

// How many threads parallel_for uses at most.
int thread_count();

// f(begin', end') for disjoint ranges that cover [begin, end). No result of ours may depend on where they are cut.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_ranges(
      begin, end, grain,
      [](int64_t first, int64_t last, const void* context) { (*static_cast<const F*>(context))(first, last); }, &f);
}

}  // namespace inq::cpu
