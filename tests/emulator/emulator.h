// CUDA for csrc/cuda/*.cu on the CPU: what platform.cuh and ptx.cuh give kernels, with the same signatures, checked.
//
// Each function that touches memory or other threads takes the place of its call as default arguments. docs/emulator.md
// says what is modelled.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "numbers.h"

#define INQ_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// --- the language -----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__
#define __align__(n) alignas(n)
#define INQ_DEVICE inline

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// Of the thread that runs; the scheduler sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 0xF;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (s & 7))) & 0xFF;
    if (s & 8) byte = byte & 0x80 ? 0xFF : 0;
    r |= byte << (8 * i);
  }
  return r;
}
inline float __uint_as_float(unsigned x) { return inq::cuda::bits_to_float(x); }
inline unsigned __float_as_uint(float x) { return inq::cuda::float_to_bits(x); }
inline float __int_as_float(int x) { return inq::cuda::bits_to_float(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) { return static_cast<int>(inq::cuda::float_to_bits(x)); }
inline void __nanosleep(unsigned) {}

// --- the runtime ------------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801, cudaErrorLaunchFailure = 719 };
using cudaError = cudaError_t;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline const char* cudaGetErrorName(cudaError_t e) { return e == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "an error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream = nullptr, INQ_PLACE);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, cudaStream_t stream = nullptr,
                            INQ_PLACE);
constexpr int cudaMemcpyDeviceToDevice = 3;

namespace inq::cuda {

struct alignas(8) Two {
  uint32_t x, y;
};
struct alignas(16) Four {
  uint32_t x, y, z, w;
};

// --- what the functions below are made of -----------------------------------------------------------------------------

namespace emulator {

enum class Space : uint8_t { global, shared };
enum class Do : uint8_t { read, write, atomic };

void load(Space space, void* to, const void* from, int bytes, const char* file, int line);
void store(Space space, void* to, const void* from, int bytes, const char* file, int line);
// Checks that `p` may be read and written atomically; false if not. The space is found by the address.
bool begin_atomic(void* p, int bytes, const char* file, int line);
void end_atomic(void* p, int bytes);

enum class Op : uint8_t { sync, shuffle, ballot, any, match, ldmatrix, movmatrix, mma, setmaxnreg, wgmma };
// All 32 lanes bring an argument; the last to come runs `operation` on those of all.
using Operation = void (*)(void* const (&arguments)[32]);
void collective(Op op, void* argument, Operation operation, const char* file, int line);

void barrier(int index, int threads, bool wait, const char* file, int line);
// What a test wants to see of launches, copies and clears before they are done: an error and they are not.
extern cudaError_t (*submitting)(cudaStream_t stream, const char* file, int line);
void launch(dim3 grid, int threads, int shared_bytes, const void* kernel, const void* params,
            void (*invoke)(const void* kernel, const void* params), bool& valid, const char* file, int line);

template <class T>
struct Shuffle {
  T value;
  int lane;
  T result;
};
template <class T>
T shuffle(T value, int source, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Shuffle<T> mine{value, source, value};
  collective(
      Op::shuffle, &mine,
      [](void* const(&all)[32]) {
        for (void* one : all) {
          auto& to = *static_cast<Shuffle<T>*>(one);
          if (to.lane >= 0) to.result = static_cast<Shuffle<T>*>(all[to.lane & 31])->value;
        }
      },
      file, line);
  return mine.result;
}
int lane();

void ldmatrix(uint32_t* d, const void* row, int matrices, bool transposed, const char* file, int line);
void mma(float* d, const uint32_t* a, const uint32_t* b, bool bf16, const char* file, int line);
void cp_async(void* shared, const void* global, int bytes, bool valid, const char* file, int line);
void cp_async_wait(int pending);
void setmaxnreg(int registers, bool up, const char* file, int line);
void wgmma(int product, int n, float* d, const uint32_t* a, uint64_t descriptor, bool accumulate, const char* file,
           int line);
void wgmma_wait(int pending, const char* file, int line);

}  // namespace emulator

// --- platform.cuh -----------------------------------------------------------------------------------------------------

char* dynamic_shared();

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   const Params& params, INQ_PLACE) {
  // Arguments of a launch have 4 KB.
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096);
  const cudaError_t refused = emulator::submitting == nullptr ? cudaSuccess : emulator::submitting(stream, file, line);
  if (refused != cudaSuccess) return refused;
  bool valid = true;
  emulator::launch(
      grid, threads, shared_bytes, reinterpret_cast<const void*>(kernel), &params,
      [](const void* kernel, const void* params) {
        reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
      },
      valid, file, line);
  return valid ? cudaSuccess : cudaErrorInvalidValue;
}

// --- ptx.cuh ----------------------------------------------------------------------------------------------------------

// As in the hardware, the first bytes of the window are not the block's.
uint32_t shared_address(const void* p);

template <class T>
T ld_global(const T* p, INQ_PLACE) {
  std::remove_cv_t<T> value;
  emulator::load(emulator::Space::global, &value, p, sizeof(T), file, line);
  return value;
}
template <class T>
void st_global(T* p, T value, INQ_PLACE) {
  emulator::store(emulator::Space::global, p, &value, sizeof(T), file, line);
}
Four ld_global_once(const Four* p, INQ_PLACE);
template <class T>
T ld_shared(const T* p, INQ_PLACE) {
  std::remove_cv_t<T> value;
  emulator::load(emulator::Space::shared, &value, p, sizeof(T), file, line);
  return value;
}
template <class T>
void st_shared(T* p, T value, INQ_PLACE) {
  emulator::store(emulator::Space::shared, p, &value, sizeof(T), file, line);
}
int ld_acquire(const int* p, INQ_PLACE);
void red_release(int* p, int value, INQ_PLACE);
void thread_fence();

#define INQ_ATOMIC(name, expression)                                      \
  template <class T>                                                      \
  T name(T* p, T value, INQ_PLACE) {                \
    if (!emulator::begin_atomic(p, sizeof(T), file, line)) return T{};    \
    const T old = *p;                                                     \
    *p = expression;                                                      \
    emulator::end_atomic(p, sizeof(T));                                   \
    return old;                                                           \
  }
INQ_ATOMIC(atomic_add, static_cast<T>(old + value))
INQ_ATOMIC(atomic_or, static_cast<T>(old | value))
INQ_ATOMIC(atomic_max, std::max<T>(old, value))
INQ_ATOMIC(atomic_min, std::min<T>(old, value))
#undef INQ_ATOMIC

inline void sync_threads(INQ_PLACE) { emulator::barrier(0, 0, true, file, line); }
inline void bar_sync(int barrier, int threads, INQ_PLACE) { emulator::barrier(barrier, threads, true, file, line); }
inline void bar_arrive(int barrier, int threads, INQ_PLACE) { emulator::barrier(barrier, threads, false, file, line); }
void sync_warp(INQ_PLACE);

template <class T>
T shuffle(T value, int lane, INQ_PLACE) {
  return emulator::shuffle(value, lane & 31, file, line);
}
template <class T>
T shuffle_xor(T value, int mask, INQ_PLACE) {
  return emulator::shuffle(value, (emulator::lane() ^ mask) & 31, file, line);
}
template <class T>
T shuffle_up(T value, unsigned delta, INQ_PLACE) {
  return emulator::shuffle(value, emulator::lane() - static_cast<int>(delta & 31), file, line);
}
uint32_t ballot(bool truth, INQ_PLACE);
bool any(bool truth, INQ_PLACE);
uint32_t match(uint32_t value, INQ_PLACE);

template <int kRegisters>
void registers_up(INQ_PLACE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::setmaxnreg(kRegisters, true, file, line);
}
template <int kRegisters>
void registers_down(INQ_PLACE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::setmaxnreg(kRegisters, false, file, line);
}

inline void ldmatrix_x4(uint32_t (&d)[4], const void* row, INQ_PLACE) { emulator::ldmatrix(d, row, 4, false, file, line); }
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, INQ_PLACE) {
  emulator::ldmatrix(d, row, 4, true, file, line);
}
inline void ldmatrix_x2(uint32_t (&d)[2], const void* row, INQ_PLACE) { emulator::ldmatrix(d, row, 2, false, file, line); }
uint32_t movmatrix_trans(uint32_t a, INQ_PLACE);
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], INQ_PLACE) {
  emulator::mma(d, a, b, false, file, line);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], INQ_PLACE) {
  emulator::mma(d, a, b, true, file, line);
}

inline void cp_async_16(void* shared, const void* global, bool valid = true, INQ_PLACE) {
  emulator::cp_async(shared, global, 16, valid, file, line);
}
inline void cp_async_4(void* shared, const void* global, bool valid = true, INQ_PLACE) {
  emulator::cp_async(shared, global, 4, valid, file, line);
}
void cp_async_commit();
template <int kPending>
void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}

using Mbarrier = uint64_t;
void mbarrier_init(Mbarrier* b, int arrivals, INQ_PLACE);
void mbarrier_init_fence();
void mbarrier_arrive(Mbarrier* b, INQ_PLACE);
void mbarrier_arrive_expect(Mbarrier* b, int bytes, INQ_PLACE);
void mbarrier_wait(Mbarrier* b, int parity, INQ_PLACE);

void bulk_load(void* shared, const void* global, int bytes, Mbarrier* b, INQ_PLACE);
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
void tma_load_2d(void* shared, const TensorMap* map, int column, int row, Mbarrier* b, INQ_PLACE);
void proxy_fence();

void wgmma_fence(INQ_PLACE);
void wgmma_commit(INQ_PLACE);
template <int kPending>
void wgmma_wait(INQ_PLACE) {
  emulator::wgmma_wait(kPending, file, line);
}
uint64_t wgmma_descriptor(const void* start, INQ_PLACE);
enum class Product { f16, bf16, e4m3 };
template <Product kProduct, int kN>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t descriptor, bool accumulate, INQ_PLACE) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  emulator::wgmma(static_cast<int>(kProduct), kN, d, a, descriptor, accumulate, file, line);
}

}  // namespace inq::cuda
