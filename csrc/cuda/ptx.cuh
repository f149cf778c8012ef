// The PTX that kernels use, one small function for each instruction: device code has no other inline assembly. Names
// are PTX's; each comment has the instruction. tests/emulator/emulator.h has the same functions for the CPU.
//
// Numbers of 16 and 8 bits are raw bits (uint16_t, uint8_t); two or four of them in a register are a uint32_t, the
// lowest first. Pointers into shared memory are generic ones.
#pragma once

#include "platform.cuh"

#if defined(INQ_EMULATOR)

namespace inq::cuda {
INQ_DEVICE uint32_t xor_and(uint32_t a, uint32_t b, uint32_t mask) { return (a ^ b) & mask; }
INQ_DEVICE void settle(uint32_t&) {}
}  // namespace inq::cuda

#else

namespace inq::cuda {

// lop3.b32 …, 0x28: (a ^ b) & mask in one instruction, where the compiler would rather share a ^ b
INQ_DEVICE uint32_t xor_and(uint32_t a, uint32_t b, uint32_t mask) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}

INQ_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

struct alignas(8) Two {
  uint32_t x, y;
};
struct alignas(16) Four {
  uint32_t x, y, z, w;
};

// --- memory -----------------------------------------------------------------------------------------------------------

// ld.global, st.global; T has 1, 2, 4, 8 or 16 bytes, aligned to them.
// The assumption is for pointers that kernels read from memory, of which nvcc knows nothing.
template <class T>
INQ_DEVICE T ld_global(const T* p) {
  __builtin_assume(__isGlobal(p));
  return *p;
}
template <class T>
INQ_DEVICE void st_global(T* p, T value) {
  __builtin_assume(__isGlobal(p));
  *p = value;
}
// st.global.v2, .v4: as plain stores nvcc merges them with others of their branches, and then they are scalar ones.
INQ_DEVICE void st_global(Two* p, Two value) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(value.x), "r"(value.y) : "memory");
}
INQ_DEVICE void st_global(Four* p, Four value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
// ld.global.nc.L1::no_allocate.v4: read once, never written while the kernel runs.
INQ_DEVICE Four ld_global_once(const Four* p) {
  Four v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
template <class T>
INQ_DEVICE T ld_shared(const T* p) {
  return *p;
}
template <class T>
INQ_DEVICE void st_shared(T* p, T value) {
  *p = value;
}

// ld.acquire.gpu, red.release.gpu.add: what one block publishes for another.
INQ_DEVICE int ld_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
INQ_DEVICE void red_release(int* p, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
// fence.acq_rel.gpu
INQ_DEVICE void thread_fence() { __threadfence(); }

// atom.add / atom.or / atom.max / atom.min on global or shared memory; the value before. T: int, unsigned,
// unsigned long long (max and min: no float).
template <class T>
INQ_DEVICE T atomic_add(T* p, T value) {
  return atomicAdd(p, value);
}
template <class T>
INQ_DEVICE T atomic_or(T* p, T value) {
  return atomicOr(p, value);
}
template <class T>
INQ_DEVICE T atomic_max(T* p, T value) {
  return atomicMax(p, value);
}
template <class T>
INQ_DEVICE T atomic_min(T* p, T value) {
  return atomicMin(p, value);
}

// --- threads ----------------------------------------------------------------------------------------------------------

// bar.sync 0
INQ_DEVICE void sync_threads() { __syncthreads(); }
// bar.sync / bar.arrive of barrier 1…15 for so many threads (a multiple of 32)
INQ_DEVICE void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
INQ_DEVICE void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// bar.warp.sync of all 32
INQ_DEVICE void sync_warp() { __syncwarp(); }

// shfl.sync of all 32; T has 4 or 8 bytes.
template <class T>
INQ_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}
template <class T>
INQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
template <class T>
INQ_DEVICE T shuffle_up(T value, unsigned delta) {
  return __shfl_up_sync(0xFFFFFFFFu, value, delta);
}
// vote.sync.ballot, vote.sync.any, match.any.sync of all 32
INQ_DEVICE uint32_t ballot(bool truth) { return __ballot_sync(0xFFFFFFFFu, truth); }
INQ_DEVICE bool any(bool truth) { return __any_sync(0xFFFFFFFFu, truth); }
INQ_DEVICE uint32_t match(uint32_t value) { return __match_any_sync(0xFFFFFFFFu, value); }

// setmaxnreg.inc / .dec of a whole warpgroup; kRegisters is a multiple of 8 in 24…256. From sm_90a on.
template <int kRegisters>
INQ_DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
INQ_DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- numbers ----------------------------------------------------------------------------------------------------------

INQ_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
INQ_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
// popc.b32
INQ_DEVICE int popc(uint32_t x) { return __popc(x); }
// cvt.f32.f16, cvt.f32.bf16
INQ_DEVICE float from_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
INQ_DEVICE float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
// cvt.rn.f16.f32, cvt.rn.bf16.f32
INQ_DEVICE uint16_t to_f16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
INQ_DEVICE uint16_t to_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32: bits of `low` in the low half
INQ_DEVICE uint32_t to_f16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
INQ_DEVICE uint32_t to_bf16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
// cvt.rn.satfinite.e4m3x2.f32: bits of `low` in the low byte. From sm_89 on.
INQ_DEVICE uint16_t to_e4m3x2(float low, float high) {
  uint16_t bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
  return bits;
}
// mul.rn.bf16x2 by a power of two, exact (subnormal operands and results kept)
INQ_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 %0, %1, %2, zero; }" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// mul.rn.f32, add.rn.f32, fma.rn.f32, sqrt.rn.f32, div.rn.f32: rounded as written, never contracted
INQ_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
INQ_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
INQ_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
INQ_DEVICE float square_root(float a) { return __fsqrt_rn(a); }
INQ_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }

// --- tensor cores of one warp -------------------------------------------------------------------------------------------

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes.
INQ_DEVICE void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
INQ_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
// ldmatrix….x2: the addresses of lanes 0 to 15 count.
INQ_DEVICE void ldmatrix_x2(uint32_t (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}
// movmatrix.sync.aligned.m8n8.trans.b16: the transpose of a matrix of 8 by 8, a row in four neighbouring lanes
INQ_DEVICE uint32_t movmatrix_trans(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
// mma.sync.aligned.m16n8k16.row.col.f32.{f16,bf16}.{f16,bf16}.f32: d += a·b
INQ_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
INQ_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- asynchronous copies ------------------------------------------------------------------------------------------------

// cp.async.cg.shared.global 16: 16 bytes, aligned; zeros and no read of global memory where !valid.
INQ_DEVICE void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// cp.async.ca.shared.global 4
INQ_DEVICE void cp_async_4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
// cp.async.commit_group; cp.async.wait_group: all but the latest kPending groups of this thread have landed
INQ_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
INQ_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// mbarrier, in shared memory. From sm_90 on here.
using Mbarrier = uint64_t;
// mbarrier.init: one thread; then mbarrier_init_fence and a barrier of the block
INQ_DEVICE void mbarrier_init(Mbarrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// fence.mbarrier_init.release.cluster
INQ_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// mbarrier.arrive
INQ_DEVICE void mbarrier_arrive(Mbarrier* b) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(b)) : "memory");
}
// mbarrier.arrive.expect_tx: an arrival, and so many bytes more to come
INQ_DEVICE void mbarrier_arrive_expect(Mbarrier* b, int bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
                   shared_address(b)),
               "r"(bytes)
               : "memory");
}
// mbarrier.try_wait.parity until the phase of that parity is over
INQ_DEVICE void mbarrier_wait(Mbarrier* b, int parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// cp.async.bulk.shared::cluster.global.mbarrier: bytes, and both addresses, multiples of 16
INQ_DEVICE void bulk_load(void* shared, const void* global, int bytes, Mbarrier* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(b))
               : "memory");
}
// A CUtensorMap; tensor_map.h makes one. cp.async.bulk.tensor.2d: the box at (column, row), zeros outside the tensor
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
INQ_DEVICE void tma_load_2d(void* shared, const TensorMap* map, int column, int row, Mbarrier* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
               "[%4];" ::"r"(shared_address(shared)),
               "l"(map), "r"(column), "r"(row), "r"(shared_address(b))
               : "memory");
}
// fence.proxy.async: shared memory written by threads, read by wgmma or TMA
INQ_DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- wgmma, from sm_90a on ------------------------------------------------------------------------------------------------

// wgmma.fence, .commit_group, .wait_group
INQ_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// No instruction: the register's value is computed by here. What is left to compute behind wgmma_fence would make the
// compiler fence, and end a group of wgmma, anew.
INQ_DEVICE void settle(uint32_t& a) { asm volatile("" : "+r"(a)::"memory"); }
INQ_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
INQ_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The matrix descriptor of a K-major operand in shared memory with a 128-byte swizzle: rows of 128 bytes, groups of
// eight rows 1024 bytes apart, `start` in a tile aligned to 1024 bytes (PTX ISA, "Matrix descriptor").
INQ_DEVICE uint64_t wgmma_descriptor(const void* start) {
  const uint64_t address = (shared_address(start) & 0x3FFFF) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// wgmma.mma_async.sync.aligned.m64nNk16 (f16, bf16) or m64nNk32 (e4m3): d (+)= a·b, a in the registers of the four
// warps of a group (rows 16·warp…), as mma.sync has it; b [N][K] behind `descriptor`. d is written by the time that
// wgmma_wait says; until then neither a nor d may be touched.
enum class Product { f16, bf16, e4m3 };
template <Product kProduct, int kN>
INQ_DEVICE void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t descriptor, bool accumulate);

// Specialisations: the operands of d, as text and as constraints, then those of a, the descriptor and the predicate.
#define INQ_D4 "%0, %1, %2, %3"
#define INQ_D8 INQ_D4 ", %4, %5, %6, %7"
#define INQ_D16 INQ_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define INQ_D32 \
  INQ_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define INQ_D64                                                                                       \
  INQ_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, "   \
          "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define INQ_D128                                                                                      \
  INQ_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "   \
          "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, " \
          "%99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, "  \
          "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define INQ_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define INQ_R8(i) INQ_R4(i), INQ_R4(i + 4)
#define INQ_R16(i) INQ_R8(i), INQ_R8(i + 8)
#define INQ_R32(i) INQ_R16(i), INQ_R16(i + 16)
#define INQ_R64(i) INQ_R32(i), INQ_R32(i + 32)
#define INQ_R128(i) INQ_R64(i), INQ_R64(i + 64)
#define INQ_WGMMA(n, count, a0, a1, a2, a3, b, p, product, shape, types, last)                                       \
  template <>                                                                                                        \
  INQ_DEVICE void wgmma<Product::product, n>(float(&d)[count], const uint32_t(&a)[4], uint64_t descriptor,           \
                                             bool accumulate) {                                                      \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #n shape ".f32." types " {" INQ_D##count "}, {%" #a0 ", %" #a1  \
                 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1" last "; }"                                                \
                 : INQ_R##count(0)                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(int{accumulate}));               \
  }
#define INQ_WGMMA_OF(n, count, a0, a1, a2, a3, b, p)                                     \
  INQ_WGMMA(n, count, a0, a1, a2, a3, b, p, f16, "k16", "f16.f16", ", 0")                \
  INQ_WGMMA(n, count, a0, a1, a2, a3, b, p, bf16, "k16", "bf16.bf16", ", 0")             \
  INQ_WGMMA(n, count, a0, a1, a2, a3, b, p, e4m3, "k32", "e4m3.e4m3", "")
INQ_WGMMA_OF(8, 4, 4, 5, 6, 7, 8, 9)
INQ_WGMMA_OF(16, 8, 8, 9, 10, 11, 12, 13)
INQ_WGMMA_OF(32, 16, 16, 17, 18, 19, 20, 21)
INQ_WGMMA_OF(64, 32, 32, 33, 34, 35, 36, 37)
INQ_WGMMA_OF(128, 64, 64, 65, 66, 67, 68, 69)
INQ_WGMMA_OF(256, 128, 128, 129, 130, 131, 132, 133)
#undef INQ_WGMMA_OF
#undef INQ_WGMMA
#undef INQ_R128
#undef INQ_R64
#undef INQ_R32
#undef INQ_R16
#undef INQ_R8
#undef INQ_R4
#undef INQ_D128
#undef INQ_D64
#undef INQ_D32
#undef INQ_D16
#undef INQ_D8
#undef INQ_D4

}  // namespace inq::cuda

#endif
