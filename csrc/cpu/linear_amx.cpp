// The products on the processor's own tiles. gcc 12 knows no tile registers, and its _tile_loadconfig crashed at -O3:
// each instruction is one line of assembly here, and keeps the compiler's own reads and writes of memory on their side.
#include "amx_kernels.h"

namespace {

struct HardwareTiles {
  static void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  static void release() { __asm__ volatile("tilerelease" ::: "memory"); }

  template <int kTile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void load(const void* p, int64_t bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(kTile) : "memory");
  }
  // As load, for data that is not used again soon.
  template <int kTile>
  static void load_once(const void* p, int64_t bytes) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* p, int64_t bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(bytes), "i"(kTile) : "memory");
  }
  // sum[m][n] += Σ_k left[m][k] · right[k][n] over pairs of bfloat16. In AT&T order: right, left, sum.
  template <int kSum, int kLeft, int kRight>
  static void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

}  // namespace

namespace inq::cpu {

const Kernels& amx_hardware_kernels() {
  static const Kernels table = tile_kernels<HardwareTiles>();
  return table;
}

}  // namespace inq::cpu
