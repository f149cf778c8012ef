// What kernels_bad*.cu share. All their kernels run as blocks of `threads` with the same params.
#pragma once

#include <cstring>

#include "tensor_map.h"

namespace inq::cuda {

// a, b and c are buffers of 4096 bytes, a and b to read (b has zeros and may be written), c to write.
struct Params {
  TensorMap map;  // of a, as 32 rows of 64 halves
  const uint32_t* a;
  int* b;
  uint32_t* c;
};

inline cudaError_t make_params(Params* p, uintptr_t a, uintptr_t b, uintptr_t c) {
  *p = {{}, reinterpret_cast<const uint32_t*>(a), reinterpret_cast<int*>(b), reinterpret_cast<uint32_t*>(c)};
  return make_tensor_map_2d(&p->map, TensorType::f16, p->a, 64, 32, 128, 64, 32, TensorSwizzle::bytes_128);
}

INQ_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
INQ_DEVICE uint32_t* words() { return reinterpret_cast<uint32_t*>(dynamic_shared()); }

constexpr int kTile = 32 * 128;
constexpr int kBadShared = 2 * kTile + 64;

INQ_DEVICE Mbarrier* mbarriers() { return reinterpret_cast<Mbarrier*>(dynamic_shared() + 2 * kTile); }

INQ_DEVICE void make_mbarriers(int arrivals) {
  if (thread() == 0) {
    for (int i = 0; i < 4; ++i) mbarrier_init(mbarriers() + i, arrivals);
    mbarrier_init_fence();
  }
  sync_threads();
}

// Two tiles of ones, for wgmma.
INQ_DEVICE void fill_tile() {
  for (int i = thread(); i < 2 * kTile / 4; i += 128) st_shared(words() + i, 0x3C003C00u);
}

}  // namespace inq::cuda
