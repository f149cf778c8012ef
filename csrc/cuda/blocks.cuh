// What the threads of a block, and blocks among themselves, do together.
#pragma once

#include "weights.cuh"

namespace inq::cuda {

// Counters of a histogram in shared memory lie in this many copies, by the lane: equal weights in a warp wait for one
// another's addition.
constexpr int kCopies = 4;
// Banks from one copy to the next, so that the copies of a counter are in different ones.
constexpr int kCopyShift = 8;

template <int kThreads>
struct SumShared {
  unsigned long long warps[kThreads / 32];
};

// The sum over the threads before this one, and over all.
struct Sums {
  unsigned long long before, all;
};
template <int kThreads>
INQ_DEVICE Sums block_sums(unsigned long long x, SumShared<kThreads>* shared) {
  const unsigned long long through = warp_sum_through(x);
  if (lane_of_thread() == 31) st_shared(&shared->warps[warp_of_thread()], through);
  sync_threads();
  Sums sums{through - x, 0};
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    const unsigned long long some = ld_shared(&shared->warps[warp]);
    if (warp < warp_of_thread()) sums.before += some;
    sums.all += some;
  }
  sync_threads();
  return sums;
}

// Whether this block is the last of `blocks` to come here: what all of them wrote before is then seen by all of it.
INQ_DEVICE bool is_last_block(int* arrivals, int64_t blocks, int* shared) {
  sync_threads();
  if (threadIdx.x == 0) {
    // What the barrier made known to this thread it passes on, and the other way round.
    thread_fence();
    st_shared(shared, atomic_add(arrivals, 1) == blocks - 1 ? 1 : 0);
    thread_fence();
  }
  sync_threads();
  return ld_shared(shared) != 0;
}

// Clears scratch: 16 bytes a thread, grid-wide.
struct ClearParams {
  Four* memory;
  int64_t count;
};
constexpr int kClearThreads = 256;

static __global__ void __launch_bounds__(kClearThreads) clear(const __grid_constant__ ClearParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kClearThreads + threadIdx.x;
  if (i < p.count) st_global(p.memory + i, Four{0, 0, 0, 0});
}

inline cudaError_t launch_clear(void* memory, int64_t bytes, cudaStream_t stream) {
  const ClearParams p{static_cast<Four*>(memory), bytes / 16};
  return launch(clear, dim3(static_cast<unsigned>((p.count + kClearThreads - 1) / kClearThreads)), kClearThreads, 0,
                stream, p);
}

}  // namespace inq::cuda
