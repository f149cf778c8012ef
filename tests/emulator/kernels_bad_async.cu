// More kernels that are wrong, as in kernels_bad.cu.
#include "kernels_bad.h"

namespace inq::cuda {

// --- mbarriers, TMA -----------------------------------------------------------------------------------------------------

__global__ void mbarrier_without_its_fence(const __grid_constant__ Params p) {
  if (thread() == 0) mbarrier_init(mbarriers(), 1);
  sync_threads();
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), kTile);
    tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());  // caught: proxy fence
  }
  mbarrier_wait(mbarriers(), 0);
}
// Data grows into the place of the mbarriers.
__global__ void mbarrier_overwritten(const __grid_constant__ Params) {
  make_mbarriers(1);
  st_shared(words() + 2 * kTile / 4 - 120 + thread(), 0u);  // caught: mbarrier
}
// As many bytes as there are, less 16: the count goes below zero.
__global__ void too_few_bytes(const __grid_constant__ Params p) {
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), kTile - 16);
    tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());
  }
  mbarrier_wait(mbarriers(), 0);  // caught: deadlock
}
// The bytes of one of two tiles: the phase is over when either has landed.
__global__ void bytes_of_one_tile(const __grid_constant__ Params p) {
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), kTile);
    for (int i = 0; i < 2; ++i) tma_load_2d(dynamic_shared() + i * kTile, &p.map, 0, 0, mbarriers());
  }
  mbarrier_wait(mbarriers(), 0);
  st_global(p.c + thread(), ld_shared(words() + thread()) + ld_shared(words() + kTile / 4 + thread()));  // caught: race
}
// A phase that nobody has to wait for is followed by another: who comes late waits for a third.
__global__ void lapped(const __grid_constant__ Params) {
  make_mbarriers(1);
  if (thread() == 0)
    for (int i = 0; i < 2; ++i) mbarrier_arrive(mbarriers());
  mbarrier_wait(mbarriers(), 0);  // caught: deadlock
}
// Lane 0 gives the tile back before the other lanes have read it.
__global__ void released_by_one_lane(const __grid_constant__ Params p) {
  make_mbarriers(1);
  Mbarrier* const emptied = mbarriers() + 1;
  for (int turn = 0; turn < 2; ++turn) {
    if (thread() == 32) {
      if (turn > 0) mbarrier_wait(emptied, 0);
      mbarrier_arrive_expect(mbarriers(), kTile);
      tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());  // caught: race, or
    }
    if (thread() < 32) {
      mbarrier_wait(mbarriers(), turn);
      st_global(p.c + 32 * turn + thread(), ld_shared(words() + thread()));  // caught: race
      if (thread() == 0) mbarrier_arrive(emptied);
    }
  }
}
// The producer's parity stays as it was: its second wait ends before the tile is read, or never.
__global__ void producer_one_phase_early(const __grid_constant__ Params p) {
  make_mbarriers(1);
  Mbarrier* const emptied = mbarriers() + 1;
  for (int turn = 0; turn < 2; ++turn) {
    if (thread() == 32) {
      mbarrier_wait(emptied, 1);  // caught: deadlock, or
      mbarrier_arrive_expect(mbarriers(), kTile);
      tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());  // caught: race, or
    }
    if (thread() == 0) {
      mbarrier_wait(mbarriers(), turn);           // caught: deadlock, or
      st_global(p.c + turn, ld_shared(words()));  // caught: race
      mbarrier_arrive(emptied);
    }
  }
}
__global__ void tma_over_what_threads_wrote(const __grid_constant__ Params p) {
  st_shared(words() + thread(), 0u);
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), kTile);
    tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());  // caught: proxy fence
  }
  mbarrier_wait(mbarriers(), 0);
}
// The asynchronous proxy reads global memory that this kernel has written.
__global__ void bulk_load_of_an_output(const __grid_constant__ Params p) {
  st_global(p.c + thread(), 7u);
  proxy_fence();
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), 512);
    bulk_load(dynamic_shared(), p.c, 512, mbarriers());  // caught: proxy fence
  }
  mbarrier_wait(mbarriers(), 0);
}
__global__ void bulk_load_of_what_changes(const __grid_constant__ Params p) {
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), 512);
    bulk_load(dynamic_shared(), p.b, 512, mbarriers());
  }
  sync_threads();
  st_global(p.b + thread(), 7);  // caught: race
  mbarrier_wait(mbarriers(), 0);
}
__global__ void bulk_load_past_the_end(const __grid_constant__ Params p) {
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), 512);
    bulk_load(dynamic_shared(), p.a + 1024 - 124, 512, mbarriers());  // caught: global bounds
  }
}

// --- wgmma --------------------------------------------------------------------------------------------------------------

// The fence comes before the writes.
__global__ void proxy_fence_too_early(const __grid_constant__ Params) {
  proxy_fence();
  fill_tile();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);  // caught: proxy fence
  wgmma_commit();
  wgmma_wait<0>();
}
// cp.async writes as threads do.
__global__ void wgmma_of_cp_async(const __grid_constant__ Params p) {
  for (int i = 0; i < kTile / 2048; ++i) cp_async_16(dynamic_shared() + 2048 * i + 16 * thread(), p.a + 4 * thread());
  cp_async_commit();
  proxy_fence();
  cp_async_wait<0>();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);  // caught: proxy fence
  wgmma_commit();
  wgmma_wait<0>();
}
__global__ void accumulators_read_in_flight(const __grid_constant__ Params p) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);
  wgmma_commit();
  st_global(p.c + thread(), float_to_bits(2 * d[0]));  // caught: wgmma registers
  wgmma_wait<0>();
}
// The sums of the second group, of which the wait leaves one.
__global__ void accumulators_of_the_group_left(const __grid_constant__ Params p) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[2][16] = {};
  wgmma_fence();
  for (int i = 0; i < 2; ++i) {
    wgmma<Product::f16, 32>(d[i], a, wgmma_descriptor(words() + i * kTile / 4), true);
    wgmma_commit();
  }
  wgmma_wait<1>();
  for (int i = 0; i < 2; ++i) st_global(p.c + 128 * i + thread(), float_to_bits(d[i][0]));  // caught: wgmma registers
  wgmma_wait<0>();
}
// Sums that are overwritten are registers all the same: the clearing may come after the product.
__global__ void cleared_behind_the_fence(const __grid_constant__ Params p) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  for (float& x : d) x = 1;
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), false);  // caught: wgmma fence
  wgmma_commit();
  wgmma_wait<0>();
  st_global(p.c + thread(), float_to_bits(d[0]));
}
__global__ void wgmma_not_committed(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);  // caught: in flight
  wgmma_wait<0>();
}
__global__ void wgmma_of_three_warps(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  if (thread() >= 96) return;
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);
  wgmma_commit();
  wgmma_wait<0>();  // caught: deadlock
}
__global__ void descriptor_between_16_bytes(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  const uint64_t descriptor = wgmma_descriptor(words() + 2);  // caught: alignment
  wgmma<Product::f16, 32>(d, a, descriptor, true);
  wgmma_commit();
  wgmma_wait<0>();
}
// The tile begins with the second row of a pattern; or the step goes over a row's end.
__global__ void descriptor_within_a_pattern(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words() + 32), true);  // caught: alignment
  wgmma_commit();
  wgmma_wait<0>();
}
__global__ void descriptor_past_a_row(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()) + 7, true);  // caught: alignment
  wgmma_commit();
  wgmma_wait<0>();
}
// One warp of the group gives registers back, the others never say so.
__global__ void registers_of_one_warp(const __grid_constant__ Params) {
  if (thread() < 32) registers_down<40>();  // caught: divergence
}
// "up" to fewer than the warp has.
__global__ void registers_up_to_fewer(const __grid_constant__ Params) {
  registers_up<40>();  // caught: registers
}

int bad_async(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int blocks, int threads) {
  Params p;
  if (const cudaError_t made = make_params(&p, a, b, c); made != cudaSuccess) return made;
#define INQ_RUN(kernel) \
  if (std::strcmp(name, #kernel) == 0) return launch(kernel, dim3(blocks), threads, kBadShared, nullptr, p);
  INQ_RUN(mbarrier_without_its_fence)
  INQ_RUN(mbarrier_overwritten)
  INQ_RUN(too_few_bytes)
  INQ_RUN(bytes_of_one_tile)
  INQ_RUN(lapped)
  INQ_RUN(released_by_one_lane)
  INQ_RUN(producer_one_phase_early)
  INQ_RUN(tma_over_what_threads_wrote)
  INQ_RUN(bulk_load_of_an_output)
  INQ_RUN(bulk_load_of_what_changes)
  INQ_RUN(bulk_load_past_the_end)
  INQ_RUN(proxy_fence_too_early)
  INQ_RUN(wgmma_of_cp_async)
  INQ_RUN(accumulators_read_in_flight)
  INQ_RUN(accumulators_of_the_group_left)
  INQ_RUN(cleared_behind_the_fence)
  INQ_RUN(wgmma_not_committed)
  INQ_RUN(wgmma_of_three_warps)
  INQ_RUN(descriptor_between_16_bytes)
  INQ_RUN(descriptor_within_a_pattern)
  INQ_RUN(descriptor_past_a_row)
  INQ_RUN(registers_of_one_warp)
  INQ_RUN(registers_up_to_fewer)
#undef INQ_RUN
  return cudaErrorInvalidValue;
}

}  // namespace inq::cuda
