// Small kernels that are wrong, each in one way. Where the emulator must say so there is a comment with the kind of
// fault behind the line: "caught: kind". test_emulator.py reads them.
#include "kernels_bad.h"

namespace inq::cuda {

// Threads read what their neighbours wrote, and no barrier came between.
__global__ void missing_barrier(const __grid_constant__ Params p) {
  st_shared(words() + thread(), ld_global(p.a + thread()));
  st_global(p.c + thread(), ld_shared(words() + (thread() ^ 32)));  // caught: race
}

// Within a warp, lanes do not run in step.
__global__ void missing_warp_barrier(const __grid_constant__ Params p) {
  st_shared(words() + thread(), ld_global(p.a + thread()));
  st_global(p.c + thread(), ld_shared(words() + (thread() ^ 1)));  // caught: race
}

// The second turn overwrites what others may still be reading.
__global__ void missing_second_barrier(const __grid_constant__ Params p) {
  uint32_t sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    st_shared(words() + thread(), ld_global(p.a + thread()));  // caught: race
    sync_threads();
    sum += ld_shared(words() + (thread() ^ 32));
  }
  st_global(p.c + thread(), sum);
}

// 16 and 8 bits: neighbours share a word, which is no race; the same byte is one.
__global__ void same_byte(const __grid_constant__ Params p) {
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(dynamic_shared());
  st_shared(bytes + thread(), uint8_t{1});  // caught: race, or
  if (thread() >= 64) st_shared(bytes + thread() - 63, uint8_t{2});  // caught: race
  sync_threads();
  st_global(p.c + thread(), uint32_t{ld_shared(bytes + thread())});
}

// Two groups are in flight, and the wait leaves one.
__global__ void cp_async_wait_off_by_one(const __grid_constant__ Params p) {
  cp_async_4(words() + thread(), p.a + thread());
  cp_async_commit();
  cp_async_4(words() + 128 + thread(), p.a + thread());
  cp_async_commit();
  cp_async_wait<1>();
  st_global(p.c + thread(), ld_shared(words() + 128 + thread()));  // caught: race
}

// Each thread waits for its own copies, and reads another's.
__global__ void cp_async_without_barrier(const __grid_constant__ Params p) {
  cp_async_4(words() + thread(), p.a + thread());
  cp_async_commit();
  cp_async_wait<0>();
  st_global(p.c + thread(), ld_shared(words() + (thread() ^ 32)));  // caught: race
}

__global__ void global_overrun(const __grid_constant__ Params p) {
  st_global(p.c + thread(), ld_global(p.a + 1024 - 127 + thread()));  // caught: global bounds
}
__global__ void global_underrun(const __grid_constant__ Params p) {
  st_global(p.c - 1 + thread(), 0u);  // caught: global bounds
}
__global__ void shared_overrun(const __grid_constant__ Params) {
  st_shared(words() + 4096 / 4 - 127 + thread(), 0u);  // caught: shared bounds
}
__global__ void shared_as_global(const __grid_constant__ Params p) {
  st_global(p.c + thread(), ld_global(words() + thread()));  // caught: global bounds
}
__global__ void misaligned(const __grid_constant__ Params p) {
  const Four v = ld_global(reinterpret_cast<const Four*>(p.a + 4 * (thread() % 16) + 2));  // caught: alignment
  st_global(p.c + thread(), v.x);
}
__global__ void misaligned_cp_async(const __grid_constant__ Params p) {
  cp_async_16(words() + 4 * thread(), p.a + 4 * thread() + 1);  // caught: alignment
  cp_async_commit();
  cp_async_wait<0>();
}
__global__ void uninitialised_shared(const __grid_constant__ Params p) {
  st_global(p.c + thread(), ld_shared(words() + thread()));  // caught: uninitialised
}
__global__ void uninitialised_global(const __grid_constant__ Params p) {
  st_global(p.c + thread(), ld_global(p.c + 128 + thread()));  // caught: uninitialised
}
__global__ void write_to_an_input(const __grid_constant__ Params p) {
  st_global(const_cast<uint32_t*>(p.a) + thread(), 0u);  // caught: read-only
}

// ldmatrix.x2 writes half of the fragment.
__global__ void unwritten_register(const __grid_constant__ Params p) {
  for (int i = 0; i < 8; ++i) st_shared(words() + thread() + i * 128, ld_global(p.a + thread()));
  sync_threads();
  const int lane = thread() % 32;
  uint32_t a[4], b[2], half[2];
  float d[4] = {};
  ldmatrix_x2(half, words() + lane % 16 * 4);
  ldmatrix_x2(b, words() + lane % 16 * 4);
  a[0] = half[0];
  a[1] = half[1];
  mma_f16(d, a, b);  // caught: unwritten register
  st_global(p.c + thread(), float_to_bits(d[0]));
}

// Rows of 128 bytes are written plainly and read with a swizzle: a wrong result, which is no fault. c[lane] should be
// the 16-bit pair that lane holds of the 8 by 8 matrix in columns 8 to 15.
__global__ void wrong_swizzle(const __grid_constant__ Params p) {
  for (int i = thread(); i < 1024; i += 128) st_shared(words() + i, ld_global(p.a + i));
  sync_threads();
  const int lane = thread() % 32, row = lane % 8;
  uint32_t d[2];
  ldmatrix_x2(d, dynamic_shared() + row * 128 + ((1 ^ row) * 16));
  st_global(p.c + thread(), d[0]);
}

__global__ void divergent_shuffle(const __grid_constant__ Params p) {
  int x = thread();
  if (x % 32 < 16) x = shuffle_xor(x, 1);  // caught: divergence
  st_global(p.c + thread(), static_cast<uint32_t>(x));
}
__global__ void shuffle_in_two_places(const __grid_constant__ Params p) {
  int x = thread();
  if (x % 32 < 16)
    x = shuffle_xor(x, 1);  // caught: divergence, or
  else
    x = shuffle_xor(x, 2);  // caught: divergence
  st_global(p.c + thread(), static_cast<uint32_t>(x));
}
__global__ void divergent_barrier(const __grid_constant__ Params p) {
  if (thread() < 64) sync_threads();  // caught: divergence
  st_global(p.c + thread(), 0u);
}
// The other warps never come.
__global__ void barrier_of_too_many(const __grid_constant__ Params p) {
  if (thread() < 64) bar_sync(1, 96);  // caught: divergence
  st_global(p.c + thread(), 0u);
}
__global__ void crossed_barriers(const __grid_constant__ Params) {
  if (thread() < 64) {
    bar_sync(1, 128);  // caught: deadlock
    bar_sync(2, 128);
  } else {
    bar_sync(2, 128);  // caught: deadlock
    bar_sync(1, 128);
  }
}
// Nobody adds to b[0].
__global__ void endless_spin(const __grid_constant__ Params p) {
  if (thread() == 0)
    while (ld_acquire(p.b) == 0) {  // caught: deadlock
    }
}

// The same through a plain load: it would run for ever.
__global__ void endless_loop(const __grid_constant__ Params p) {
  if (thread() == 0)
    while (ld_global(p.b) == 0) {  // caught: deadlock
    }
}
// The second arrival may come before the first one has been waited for.
__global__ void arrives_twice(const __grid_constant__ Params) {
  if (thread() < 64) {
    for (int i = 0; i < 2; ++i) bar_arrive(1, 128);  // caught: barrier
  } else {
    for (int i = 0; i < 2; ++i) bar_sync(1, 128);
  }
}

// --- between blocks -----------------------------------------------------------------------------------------------------

// Block 1 reads what block 0 wrote; the counter is an atomic, and neither side has a fence.
__global__ void handshake_without_fence(const __grid_constant__ Params p) {
  if (thread() != 0) return;
  if (blockIdx.x == 0) {
    st_global(p.c, 7u);
    atomic_add(p.b, 1);
    return;
  }
  while (ld_acquire(p.b) == 0) {
  }
  st_global(p.c + 1, ld_global(p.c));  // caught: race
}
// Thread 0 publishes what the other threads may not have written yet.
__global__ void handshake_without_barrier(const __grid_constant__ Params p) {
  if (blockIdx.x == 0) {
    st_global(p.c + thread(), 7u);
    if (thread() == 0) red_release(p.b, 1);
    return;
  }
  if (thread() == 0) {
    while (ld_acquire(p.b) == 0) {
    }
    for (int i = 0; i < 128; ++i) st_global(p.c + 128 + i, ld_global(p.c + i));  // caught: race
  }
}
// Two blocks write the same output.
__global__ void same_output(const __grid_constant__ Params p) {
  st_global(p.c + thread(), blockIdx.x);  // caught: race
}

// Block 1 finds the counter at the right value, and neither side has a fence.
__global__ void last_block_without_fence(const __grid_constant__ Params p) {
  if (thread() != 0) return;
  st_global(p.c + blockIdx.x, 7u);
  if (atomic_add(p.b, 1) == 1) st_global(p.c + 2, ld_global(p.c) + ld_global(p.c + 1));  // caught: race
}
// The read-only path of the cache does not see what the kernel writes.
__global__ void read_once_of_an_output(const __grid_constant__ Params p) {
  st_global(p.c + thread(), 7u);
  sync_threads();
  const Four v = ld_global_once(reinterpret_cast<const Four*>(p.c) + thread() % 32);  // caught: race
  st_global(p.c + 128 + thread(), v.x);
}

// --- mbarriers and TMA --------------------------------------------------------------------------------------------------

__global__ void wrong_parity(const __grid_constant__ Params p) {
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), kTile);
    tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());
  }
  mbarrier_wait(mbarriers(), 1);
  st_global(p.c + thread(), ld_shared(words() + thread()));  // caught: race
  mbarrier_wait(mbarriers(), 0);
}
__global__ void wrong_bytes(const __grid_constant__ Params p) {
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), kTile + 16);
    tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());
  }
  mbarrier_wait(mbarriers(), 0);  // caught: deadlock
  st_global(p.c + thread(), ld_shared(words() + thread()));
}
__global__ void mbarrier_used_too_early(const __grid_constant__ Params) {
  if (thread() == 0) {
    mbarrier_init(mbarriers(), 128);
    mbarrier_init_fence();
  }
  mbarrier_arrive(mbarriers());  // caught: race or mbarrier
}
__global__ void too_many_arrivals(const __grid_constant__ Params) {
  make_mbarriers(2);
  if (thread() % 32 == 0) mbarrier_arrive(mbarriers() + 1);
  if (thread() == 0) mbarrier_arrive_expect(mbarriers(), 16);
  sync_threads();
  if (thread() < 2) mbarrier_arrive(mbarriers());  // caught: mbarrier
}
// The tile is loaded again before all have said that they read it.
__global__ void refilled_too_early(const __grid_constant__ Params p) {
  make_mbarriers(1);
  for (int turn = 0; turn < 2; ++turn) {
    if (thread() == 0) {
      mbarrier_arrive_expect(mbarriers(), kTile);
      tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());  // caught: race, or
    }
    mbarrier_wait(mbarriers(), turn);
    st_global(p.c + 128 * turn + thread(), ld_shared(words() + thread()));  // caught: race
  }
}
__global__ void tma_misaligned(const __grid_constant__ Params p) {
  make_mbarriers(1);
  if (thread() == 0) tma_load_2d(dynamic_shared() + 64, &p.map, 0, 0, mbarriers());  // caught: alignment
}
__global__ void block_ends_before_its_copy(const __grid_constant__ Params p) {
  make_mbarriers(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(mbarriers(), kTile);
    tma_load_2d(dynamic_shared(), &p.map, 0, 0, mbarriers());  // caught: in flight
  }
}

// --- wgmma --------------------------------------------------------------------------------------------------------------

__global__ void missing_proxy_fence(const __grid_constant__ Params) {
  fill_tile();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);  // caught: proxy fence
  wgmma_commit();
  wgmma_wait<0>();
}
__global__ void missing_wgmma_fence(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  for (int i = 0; i < 4; ++i) a[i] = 0x3C003C00u;
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);  // caught: wgmma fence
  wgmma_commit();
  wgmma_wait<0>();
}
__global__ void registers_changed(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);  // caught: wgmma registers
  wgmma_commit();
  for (int i = 0; i < 4; ++i) a[i] = 0x3C003C00u;
  wgmma_wait<0>();
}
__global__ void accumulators_changed(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);  // caught: wgmma registers
  wgmma_commit();
  for (float& x : d) x = 2 * x;
  wgmma_wait<0>();
}
// The tile is written again while the group that reads it may be under way.
__global__ void wgmma_wait_off_by_one(const __grid_constant__ Params) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[2][4] = {};
  float d[16] = {};
  wgmma_fence();
  for (int i = 0; i < 2; ++i) {
    wgmma<Product::f16, 32>(d, a[i], wgmma_descriptor(words() + i * kTile / 4), true);
    wgmma_commit();
  }
  wgmma_wait<1>();
  sync_threads();
  if (thread() < 32) st_shared(words() + kTile / 4 + thread(), 0u);  // caught: race
  wgmma_wait<0>();
}
__global__ void wgmma_not_waited_for(const __grid_constant__ Params p) {
  fill_tile();
  proxy_fence();
  sync_threads();
  uint32_t a[4] = {};
  float d[16] = {};
  wgmma_fence();
  wgmma<Product::f16, 32>(d, a, wgmma_descriptor(words()), true);  // caught: in flight
  wgmma_commit();
  st_global(p.c + thread(), float_to_bits(d[0]));
}
// Three warpgroups have 168 each: two can have 240 when the third has given some back.
__global__ void too_many_registers(const __grid_constant__ Params) {
  if (thread() < 256) registers_up<240>();  // caught: deadlock
}

// One warp of the group takes another number.
__global__ void registers_differ(const __grid_constant__ Params) {
  if (thread() < 96)
    registers_down<40>();  // caught: divergence, or
  else
    registers_down<48>();  // caught: divergence
}

int bad(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int blocks, int threads) {
  Params p;
  if (const cudaError_t made = make_params(&p, a, b, c); made != cudaSuccess) return made;
#define INQ_RUN(kernel) \
  if (std::strcmp(name, #kernel) == 0) return launch(kernel, dim3(blocks), threads, kBadShared, nullptr, p);
  if (std::strcmp(name, "shared_overrun") == 0) return launch(shared_overrun, dim3(1), 128, 4096, nullptr, p);
  INQ_RUN(missing_barrier)
  INQ_RUN(missing_warp_barrier)
  INQ_RUN(missing_second_barrier)
  INQ_RUN(same_byte)
  INQ_RUN(cp_async_wait_off_by_one)
  INQ_RUN(cp_async_without_barrier)
  INQ_RUN(global_overrun)
  INQ_RUN(global_underrun)
  INQ_RUN(shared_as_global)
  INQ_RUN(misaligned)
  INQ_RUN(misaligned_cp_async)
  INQ_RUN(uninitialised_shared)
  INQ_RUN(uninitialised_global)
  INQ_RUN(write_to_an_input)
  INQ_RUN(unwritten_register)
  INQ_RUN(wrong_swizzle)
  INQ_RUN(divergent_shuffle)
  INQ_RUN(shuffle_in_two_places)
  INQ_RUN(divergent_barrier)
  INQ_RUN(barrier_of_too_many)
  INQ_RUN(crossed_barriers)
  INQ_RUN(endless_spin)
  INQ_RUN(endless_loop)
  INQ_RUN(arrives_twice)
  INQ_RUN(handshake_without_fence)
  INQ_RUN(handshake_without_barrier)
  INQ_RUN(last_block_without_fence)
  INQ_RUN(read_once_of_an_output)
  INQ_RUN(registers_differ)
  INQ_RUN(same_output)
  INQ_RUN(wrong_parity)
  INQ_RUN(wrong_bytes)
  INQ_RUN(mbarrier_used_too_early)
  INQ_RUN(too_many_arrivals)
  INQ_RUN(refilled_too_early)
  INQ_RUN(tma_misaligned)
  INQ_RUN(block_ends_before_its_copy)
  INQ_RUN(missing_proxy_fence)
  INQ_RUN(missing_wgmma_fence)
  INQ_RUN(registers_changed)
  INQ_RUN(accumulators_changed)
  INQ_RUN(wgmma_wait_off_by_one)
  INQ_RUN(wgmma_not_waited_for)
  INQ_RUN(too_many_registers)
#undef INQ_RUN
  return cudaErrorInvalidValue;
}

}  // namespace inq::cuda
