// Small kernels that are right: the emulator must find nothing, and their results must be exact.
#include <cstring>

#include "tensor_map.h"

namespace inq::cuda {

struct Params {
  const void* a;
  const void* b;
  void* c;
  int n, m;
};

// c[block] = the sum of n numbers of a.
__global__ void reduction(const __grid_constant__ Params p) {
  int* const partial = reinterpret_cast<int*>(dynamic_shared());
  const int* a = static_cast<const int*>(p.a) + int64_t{blockIdx.x} * p.n;
  int sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.n; i += static_cast<int>(blockDim.x)) sum += ld_global(a + i);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (threadIdx.x % 32 == 0) st_shared(partial + threadIdx.x / 32, sum);
  sync_threads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? ld_shared(partial + threadIdx.x) : 0;
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (threadIdx.x == 0) st_global(static_cast<int*>(p.c) + blockIdx.x, sum);
  }
}

// c = the transpose of a [m][n] of 16 bits, by tiles of 32.
__global__ void transpose(const __grid_constant__ Params p) {
  uint16_t* const tile = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int x = static_cast<int>(threadIdx.x % 32), y = static_cast<int>(threadIdx.x / 32);
  const int column = static_cast<int>(blockIdx.x) * 32, row = static_cast<int>(blockIdx.y) * 32;
  const int rows = static_cast<int>(blockDim.x / 32);
  for (int i = y; i < 32; i += rows)
    if (row + i < p.m && column + x < p.n)
      st_shared(tile + i * 33 + x, ld_global(static_cast<const uint16_t*>(p.a) + int64_t{row + i} * p.n + column + x));
  sync_threads();
  for (int i = y; i < 32; i += rows)
    if (column + i < p.n && row + x < p.m)
      st_global(static_cast<uint16_t*>(p.c) + int64_t{column + i} * p.m + row + x, ld_shared(tile + x * 33 + i));
}

// c [16][8] fp32 = a [16][n] b [8][n]ᵀ of fp16, b through cp.async and ldmatrix, kStages tiles of 16 k in flight.
__global__ void mma_pipelined(const __grid_constant__ Params p) {
  constexpr int kStages = 3, kStage = 2 * 16 * 32;
  char* const shared = dynamic_shared();
  const int lane = static_cast<int>(threadIdx.x), tiles = p.n / 16;
  const auto load = [&](int tile) {
    // A tile of a, 16 rows of 32 bytes, then one of b; a lane copies 16 bytes of a, and half of them of b.
    char* const stage = shared + tile % kStages * kStage;
    const int row = lane / 2, half = lane % 2;
    const int64_t at = int64_t{row} * p.n * 2 + tile * 32 + half * 16;
    cp_async_16(stage + row * 32 + half * 16, static_cast<const char*>(p.a) + at, tile < tiles);
    if (row < 8) cp_async_16(stage + 512 + row * 32 + half * 16, static_cast<const char*>(p.b) + at, tile < tiles);
    cp_async_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
  float d[4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    sync_warp();
    const char* const stage = shared + tile % kStages * kStage;
    uint32_t a[4], b[2];
    ldmatrix_x4(a, stage + lane % 16 * 32 + lane / 16 * 16);
    ldmatrix_x2(b, stage + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
    mma_f16(d, a, b);
    load(tile + kStages - 1);
  }
  float* const c = static_cast<float*>(p.c);
  for (int i = 0; i < 4; ++i) st_global(c + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, d[i]);
}

// c [16][16] fp32 = a [16][16] b [16][16] of bf16, both row-major: b through ldmatrix.trans.
__global__ void mma_transposed(const __grid_constant__ Params p) {
  char* const shared = dynamic_shared();
  const int lane = static_cast<int>(threadIdx.x);
  Four* const words = reinterpret_cast<Four*>(shared);
  st_shared(words + lane, ld_global_once(static_cast<const Four*>(p.a) + lane));
  st_shared(words + 32 + lane, ld_global_once(static_cast<const Four*>(p.b) + lane));
  sync_warp();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, shared + lane % 16 * 32 + lane / 16 * 16);
  ldmatrix_x4_trans(b, shared + 512 + lane % 16 * 32 + lane / 16 * 16);
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    const uint32_t column[2] = {b[2 * half], b[2 * half + 1]};
    mma_bf16(d, a, column);
    float* const c = static_cast<float*>(p.c) + 8 * half;
    for (int i = 0; i < 4; ++i) st_global(c + (lane / 4 + i / 2 * 8) * 16 + lane % 4 * 2 + i % 2, d[i]);
  }
}

// c = the OR, the largest, the smallest and the sum of a's n numbers (c begins as zeros).
__global__ void atomics(const __grid_constant__ Params p) {
  unsigned* const c = static_cast<unsigned*>(p.c);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.n) return;
  const unsigned x = ld_global(static_cast<const unsigned*>(p.a) + i);
  atomic_or(c, x);
  atomic_max(c + 1, x);
  atomic_min(reinterpret_cast<int*>(c) + 2, -static_cast<int>(x));
  atomic_add(reinterpret_cast<unsigned long long*>(c + 4), static_cast<unsigned long long>(x));
}

// c[0] = the sum of all blocks' sums; b [grid + 1] ints of zeros: partial sums, and how many are there.
__global__ void stream_k(const __grid_constant__ Params p) {
  int* const partial = static_cast<int*>(const_cast<void*>(p.b));
  int* const count = partial + gridDim.x;
  int sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.n; i += 32)
    sum += ld_global(static_cast<const int*>(p.a) + int64_t{blockIdx.x} * p.n + i);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (threadIdx.x != 0) return;
  if (blockIdx.x != 0) {
    st_global(partial + blockIdx.x, sum);
    red_release(count, 1);
    return;
  }
  while (ld_acquire(count) != static_cast<int>(gridDim.x) - 1) {
  }
  for (unsigned i = 1; i < gridDim.x; ++i) sum += ld_global(partial + i);
  st_global(static_cast<int*>(p.c), sum);
}

struct RingParams {
  TensorMap map;  // of b, in boxes of kN rows of 128 bytes
  const uint32_t* a;
  float* c;
  int k;
};

// c [64][kN] = a [64][k] b [kN][k]ᵀ: a producer fills a ring of tiles by TMA, a warpgroup gives its registers to the
// third, and that one multiplies, a in registers.
template <Product kProduct, int kN>
__global__ void __launch_bounds__(384, 1) wgmma_ring(const __grid_constant__ RingParams p) {
  constexpr int kStages = 3, kStage = kN * 128, kElements = kProduct == Product::e4m3 ? 128 : 64;
  char* const tiles = dynamic_shared();
  Mbarrier* const full = reinterpret_cast<Mbarrier*>(tiles + kStages * kStage);
  Mbarrier* const empty = full + kStages;
  const int thread = static_cast<int>(threadIdx.x) % 128, count = (p.k + kElements - 1) / kElements;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 128);
    }
    mbarrier_init_fence();
  }
  sync_threads();
  if (threadIdx.x < 256) {
    registers_down<40>();
    if (threadIdx.x != 0) return;
    for (int tile = 0; tile < count; ++tile) {
      const int stage = tile % kStages;
      mbarrier_wait(empty + stage, (tile / kStages & 1) ^ 1);
      mbarrier_arrive_expect(full + stage, kStage);
      tma_load_2d(tiles + stage * kStage, &p.map, tile * kElements, 0, full + stage);
    }
    return;
  }
  registers_up<232>();
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  float d[kN / 2] = {};
  for (int tile = 0; tile < count; ++tile) {
    const int stage = tile % kStages;
    // Registers of a are words of 4 bytes: word 8 s + t of row g is step s's first.
    uint32_t a[4][4];
    for (int s = 0; s < 4; ++s)
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + g + 8 * (i & 1), word = 32 * tile + 8 * s + t + 4 * (i >> 1);
        const int words = p.k * (kProduct == Product::e4m3 ? 1 : 2) / 4;
        a[s][i] = word < words ? ld_global(p.a + int64_t{row} * words + word) : 0;
      }
    mbarrier_wait(full + stage, tile / kStages & 1);
    wgmma_fence();
    for (int s = 0; s < 4; ++s)
      wgmma<kProduct, kN>(d, a[s], wgmma_descriptor(tiles + stage * kStage) + static_cast<uint64_t>(2 * s), true);
    wgmma_commit();
    wgmma_wait<0>();
    mbarrier_arrive(empty + stage);
  }
  for (int i = 0; i < kN / 2; ++i) {
    const int row = 16 * warp + g + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
    st_global(p.c + row * kN + column, d[i]);
  }
}

// A tile that threads write, with its swizzle, and wgmma reads; m64n16k16.
__global__ void wgmma_written_by_threads(const __grid_constant__ Params p) {
  constexpr int kN = 16;
  char* const tile = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), g = thread % 32 / 4, t = thread % 4;
  for (int i = thread; i < kN * 8; i += 128) {
    const int row = i / 8, column = i % 8;  // of 4 bytes
    const int at = row * 128 + ((column / 4 ^ row % 8) * 16) + column % 4 * 4;
    st_shared(reinterpret_cast<uint32_t*>(tile + at), ld_global(static_cast<const uint32_t*>(p.b) + i));
  }
  proxy_fence();
  sync_threads();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i)
    a[i] = ld_global(static_cast<const uint32_t*>(p.a) + (thread / 32 * 16 + g + 8 * (i & 1)) * 8 + t + 4 * (i >> 1));
  float d[kN / 2];
  wgmma_fence();
  wgmma<Product::f16, kN>(d, a, wgmma_descriptor(tile), false);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i)
    st_global(static_cast<float*>(p.c) + (thread / 32 * 16 + g + i / 2 % 2 * 8) * kN + i / 4 * 8 + 2 * t + i % 2, d[i]);
}

// c = a, n bytes, through bulk_load by chunks of 256 bytes.
__global__ void bulk(const __grid_constant__ Params p) {
  Mbarrier* const done = reinterpret_cast<Mbarrier*>(dynamic_shared() + 256);
  if (threadIdx.x == 0) {
    mbarrier_init(done, 1);
    mbarrier_init_fence();
  }
  sync_threads();
  for (int i = 0; i < p.n / 256; ++i) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(done, 256);
      bulk_load(dynamic_shared(), static_cast<const char*>(p.a) + 256 * i, 256, done);
    }
    mbarrier_wait(done, i & 1);
    const int* from = reinterpret_cast<const int*>(dynamic_shared()) + threadIdx.x;
    st_global(static_cast<int*>(p.c) + 64 * i + threadIdx.x, ld_shared(from));
    sync_threads();
  }
}

// c = the box of 8 rows of 64 bytes at (m, n) of a [20][48] of 16 bits, as it lies in shared memory.
__global__ void box(const __grid_constant__ RingParams p) {
  Mbarrier* const done = reinterpret_cast<Mbarrier*>(dynamic_shared() + 512);
  if (threadIdx.x == 0) {
    mbarrier_init(done, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(done, 512);
    tma_load_2d(dynamic_shared(), &p.map, p.k % 256 - 128, p.k / 256 - 128, done);
  }
  sync_threads();
  mbarrier_wait(done, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 128; i += 32)
    st_global(reinterpret_cast<int*>(p.c) + i, ld_shared(reinterpret_cast<const int*>(dynamic_shared()) + i));
}

// c[0..n) = how often each of the m numbers of a below n occurs: atomics in shared memory, then in global memory.
__global__ void histogram(const __grid_constant__ Params p) {
  int* const counts = reinterpret_cast<int*>(dynamic_shared());
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < p.n; i += threads) st_shared(counts + i, 0);
  sync_threads();
  for (int i = static_cast<int>(blockIdx.x) * threads + thread; i < p.m; i += static_cast<int>(gridDim.x) * threads)
    atomic_add(counts + ld_global(static_cast<const int*>(p.a) + i), 1);
  sync_threads();
  for (int i = thread; i < p.n; i += threads) atomic_add(static_cast<int*>(p.c) + i, ld_shared(counts + i));
}

// c[0] = the sum over all blocks, by the last block to finish (b: a counter, then a sum for each block).
__global__ void last_block(const __grid_constant__ Params p) {
  int* const counter = static_cast<int*>(const_cast<void*>(p.b));
  int* const flag = reinterpret_cast<int*>(dynamic_shared());
  int sum = ld_global(static_cast<const int*>(p.a) + blockIdx.x * 32 + threadIdx.x % 32);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (threadIdx.x == 0) {
    st_global(counter + 1 + blockIdx.x, sum);
    thread_fence();
    const int before = atomic_add(counter, 1);
    thread_fence();
    st_shared(flag, before == static_cast<int>(gridDim.x) - 1 ? 1 : 0);
  }
  sync_threads();
  if (ld_shared(flag) == 0 || threadIdx.x >= 32) return;
  sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) sum += ld_global(counter + 1 + i);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (threadIdx.x == 0) st_global(static_cast<int*>(p.c), sum);
}

// Two groups of 64 threads hand a buffer to and fro with named barriers: c = a + 1 + 1 + …, m times each.
__global__ void named_barriers(const __grid_constant__ Params p) {
  int* const x = reinterpret_cast<int*>(dynamic_shared()) + threadIdx.x % 64;
  if (threadIdx.x < 64) {
    st_shared(x, ld_global(static_cast<const int*>(p.a) + threadIdx.x));
    for (int i = 0; i < p.m; ++i) {
      st_shared(x, ld_shared(x) + 1);
      bar_arrive(1, 128);
      bar_sync(2, 128);
    }
    st_global(static_cast<int*>(p.c) + threadIdx.x, ld_shared(x));
  } else {
    for (int i = 0; i < p.m; ++i) {
      bar_sync(1, 128);
      int* const other = reinterpret_cast<int*>(dynamic_shared()) + (threadIdx.x + 7) % 64;
      st_shared(other, ld_shared(other) + 1);
      bar_arrive(2, 128);
    }
  }
}

// What each lane gets from the votes, for the test to recompute; c [6][32].
__global__ void warp_functions(const __grid_constant__ Params p) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t x = ld_global(static_cast<const uint32_t*>(p.a) + lane);
  uint32_t* const c = static_cast<uint32_t*>(p.c) + lane;
  st_global(c, ballot(x % 2 != 0));
  st_global(c + 32, uint32_t{any(x == 77)});
  st_global(c + 64, match(x % 4));
  st_global(c + 96, shuffle(x, (lane + 5) % 32));
  st_global(c + 128, shuffle_up(x, 3));
  st_global(c + 160, movmatrix_trans(x));
}

int good(const char* name, uintptr_t a, uintptr_t b, uintptr_t c, int n, int m) {
  const Params p{reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), reinterpret_cast<void*>(c), n, m};
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("reduction")) return launch(reduction, dim3(static_cast<unsigned>(m)), 256, 64, nullptr, p);
  if (is("transpose")) return launch(transpose, dim3((n + 31) / 32, (m + 31) / 32), 128, 32 * 33 * 2, nullptr, p);
  if (is("mma_pipelined")) return launch(mma_pipelined, dim3(1), 32, 3 * 1024, nullptr, p);
  if (is("mma_transposed")) return launch(mma_transposed, dim3(1), 32, 1024, nullptr, p);
  if (is("atomics")) return launch(atomics, dim3(static_cast<unsigned>(n + 63) / 64), 64, 0, nullptr, p);
  if (is("stream_k")) return launch(stream_k, dim3(static_cast<unsigned>(m)), 32, 0, nullptr, p);
  if (is("bulk")) return launch(bulk, dim3(1), 64, 264, nullptr, p);
  if (is("histogram")) return launch(histogram, dim3(3), 96, n * 4, nullptr, p);
  if (is("last_block")) return launch(last_block, dim3(static_cast<unsigned>(m)), 64, 4, nullptr, p);
  if (is("named_barriers")) return launch(named_barriers, dim3(1), 128, 256, nullptr, p);
  if (is("warp_functions")) return launch(warp_functions, dim3(1), 32, 0, nullptr, p);
  if (is("wgmma_written_by_threads")) return launch(wgmma_written_by_threads, dim3(1), 128, 2048, nullptr, p);
  RingParams ring{{}, static_cast<const uint32_t*>(p.a), static_cast<float*>(p.c), m};
  if (std::strncmp(name, "box", 3) == 0) {
    constexpr TensorSwizzle kSwizzles[] = {TensorSwizzle::none, TensorSwizzle::bytes_64};
    const cudaError_t made =
        make_tensor_map_2d(&ring.map, TensorType::bf16, p.b, 48, 20, 112, 32, 8, kSwizzles[is("box swizzled")]);
    return made != cudaSuccess ? made : launch(box, dim3(1), 32, 1024, nullptr, ring);
  }
  ring.k = n;
  const auto run = [&](void (*kernel)(RingParams), TensorType type, int columns) -> int {
    const int64_t row = n * element_bytes(type);
    const cudaError_t made = make_tensor_map_2d(&ring.map, type, p.b, n, columns, row, static_cast<int>(128 / element_bytes(type)),
                                                columns, TensorSwizzle::bytes_128);
    return made != cudaSuccess ? made : launch(kernel, dim3(1), 384, 3 * columns * 128 + 64, nullptr, ring);
  };
  if (is("wgmma_f16")) return run(wgmma_ring<Product::f16, 64>, TensorType::f16, 64);
  if (is("wgmma_bf16")) return run(wgmma_ring<Product::bf16, 128>, TensorType::bf16, 128);
  if (is("wgmma_e4m3")) return run(wgmma_ring<Product::e4m3, 32>, TensorType::u8, 32);
  return cudaErrorInvalidValue;
}

}  // namespace inq::cuda
