// More kernels that are wrong, as in kernels_bad.cu.
#include "kernels_bad.h"

namespace inq::cuda {

// --- barriers -----------------------------------------------------------------------------------------------------------

// Both halves of a warp come to the barrier, from two lines: bar.sync is for whole warps.
__global__ void half_warp_barrier(const __grid_constant__ Params) {
  if (thread() % 32 < 16)
    sync_threads();  // caught: divergence, or
  else
    sync_threads();  // caught: divergence
}
// Four halves of warps are 64 threads, but no two warps.
__global__ void barrier_of_half_warps(const __grid_constant__ Params) {
  if (thread() % 32 < 16) bar_sync(1, 64);  // caught: divergence
}
// 64 of 128 threads make the barrier complete: the first two warps to come, whichever they are.
__global__ void barrier_of_too_few(const __grid_constant__ Params p) {
  st_shared(words() + thread(), ld_global(p.a + thread()));
  bar_sync(1, 64);  // caught: divergence, or
  st_global(p.c + thread(), ld_shared(words() + (thread() + 32) % 128));  // caught: race
}
// Two warps say that they have come, and nobody waits for them: the next kernel's barrier would be complete too early.
__global__ void arrivals_for_nobody(const __grid_constant__ Params) {
  if (thread() < 64) bar_arrive(1, 128);  // caught: barrier
}
// The data goes through lanes of the same warp by ldmatrix, which orders nothing.
__global__ void ldmatrix_without_warp_barrier(const __grid_constant__ Params p) {
  uint32_t* const row = words() + thread() * 4;
  for (int i = 0; i < 4; ++i) st_shared(row + i, ld_global(p.a + thread()));
  uint32_t d[4];
  ldmatrix_x4(d, row);  // caught: race
  st_global(p.c + thread(), d[0]);
}
// A lane that has ended is asked for its value.
__global__ void shuffle_with_an_ended_lane(const __grid_constant__ Params p) {
  if (thread() % 32 == 31) return;
  st_global(p.c + thread(), shuffle(static_cast<uint32_t>(thread()), 31));  // caught: divergence
}
__global__ void stores_an_unwritten_register(const __grid_constant__ Params p) {
  for (int i = 0; i < 8; ++i) st_shared(words() + thread() + i * 128, ld_global(p.a + thread()));
  sync_threads();
  uint32_t d[4];
  ldmatrix_x2(*reinterpret_cast<uint32_t(*)[2]>(d), words() + thread() % 16 * 4);
  for (int i = 0; i < 4; ++i) st_global(p.c + thread() * 4 + i, d[i]);  // caught: unwritten register
}

// --- cp.async -----------------------------------------------------------------------------------------------------------

__global__ void cp_async_not_committed(const __grid_constant__ Params p) {
  cp_async_4(words() + thread(), p.a + thread());
  cp_async_wait<0>();
  st_global(p.c + thread(), ld_shared(words() + thread()));  // caught: race
}
__global__ void cp_async_overrun(const __grid_constant__ Params p) {
  cp_async_16(dynamic_shared() + kBadShared - 16 * 127 + 16 * thread(), p.a);  // caught: shared bounds
  cp_async_commit();
  cp_async_wait<0>();
}
// Two copies to the same place are in flight.
__global__ void cp_async_twice(const __grid_constant__ Params p) {
  for (int i = 0; i < 2; ++i) {
    cp_async_4(words() + thread(), p.a + 128 * i + thread());  // caught: race
    cp_async_commit();
  }
  cp_async_wait<0>();
  st_global(p.c + thread(), ld_shared(words() + thread()));
}
// What is copied changes while the copy is under way.
__global__ void cp_async_of_what_changes(const __grid_constant__ Params p) {
  cp_async_4(words() + thread(), p.b + thread());  // caught: race
  cp_async_commit();
  st_global(p.b + thread(), 7);
  cp_async_wait<0>();
  st_global(p.c + thread(), ld_shared(words() + thread()));
}

// --- between blocks -----------------------------------------------------------------------------------------------------

// The writer's fence comes before what it is to publish.
__global__ void handshake_fenced_too_early(const __grid_constant__ Params p) {
  if (thread() != 0) return;
  if (blockIdx.x == 0) {
    thread_fence();
    st_global(p.c, 7u);
    atomic_add(p.b, 1);
    return;
  }
  while (atomic_add(p.b, 0) == 0) {
  }
  thread_fence();
  st_global(p.c + 1, ld_global(p.c));  // caught: race
}
// The reader has no fence.
__global__ void handshake_fenced_by_one(const __grid_constant__ Params p) {
  if (thread() != 0) return;
  if (blockIdx.x == 0) {
    st_global(p.c, 7u);
    thread_fence();
    atomic_add(p.b, 1);
    return;
  }
  while (atomic_add(p.b, 0) == 0) {
  }
  st_global(p.c + 1, ld_global(p.c));  // caught: race
}
// The flag is an ordinary store.
__global__ void handshake_by_a_store(const __grid_constant__ Params p) {
  if (thread() != 0) return;
  if (blockIdx.x == 0) {
    st_global(p.c, 7u);
    thread_fence();
    st_global(p.b, 1);
    return;
  }
  while (ld_acquire(p.b) == 0) {  // caught: race
  }
  st_global(p.c + 1, ld_global(p.c));  // caught: race
}
// The last block sets the counter back, and another still looks at it.
__global__ void same_output_as_counter(const __grid_constant__ Params p) {
  if (thread() != 0) return;
  if (atomic_add(p.b, 1) == 1) st_global(p.b, 0);  // caught: race, or
  st_global(p.c + blockIdx.x, static_cast<uint32_t>(ld_global(p.b)));  // caught: race
}
// All blocks wait for each other, and there are more than fit on the device.
__global__ void grid_barrier(const __grid_constant__ Params p) {
  sync_threads();
  if (thread() == 0) {
    red_release(p.b, 1);
    while (ld_acquire(p.b) < static_cast<int>(gridDim.x)) {  // caught: deadlock
    }
  }
  sync_threads();
}

// A right one, for how much memory a launch may have.
INQ_DEVICE void nothing(const __grid_constant__ Params) {}
int launch_with_shared(int bytes) { return launch(nothing, dim3(1), 128, bytes, nullptr, Params{}); }

int bad_more(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int blocks, int threads) {
  Params p;
  if (const cudaError_t made = make_params(&p, a, b, c); made != cudaSuccess) return made;
#define INQ_RUN(kernel) \
  if (std::strcmp(name, #kernel) == 0) return launch(kernel, dim3(blocks), threads, kBadShared, nullptr, p);
  INQ_RUN(half_warp_barrier)
  INQ_RUN(barrier_of_half_warps)
  INQ_RUN(barrier_of_too_few)
  INQ_RUN(arrivals_for_nobody)
  INQ_RUN(ldmatrix_without_warp_barrier)
  INQ_RUN(shuffle_with_an_ended_lane)
  INQ_RUN(stores_an_unwritten_register)
  INQ_RUN(cp_async_not_committed)
  INQ_RUN(cp_async_overrun)
  INQ_RUN(cp_async_twice)
  INQ_RUN(cp_async_of_what_changes)
  INQ_RUN(handshake_fenced_too_early)
  INQ_RUN(handshake_fenced_by_one)
  INQ_RUN(handshake_by_a_store)
  INQ_RUN(same_output_as_counter)
  INQ_RUN(grid_barrier)
#undef INQ_RUN
  return cudaErrorInvalidValue;
}

}  // namespace inq::cuda
