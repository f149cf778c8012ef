// What a kernel is written against: CUDA, or tests/emulator, which runs the same .cu files on the CPU.
//
// Kernels are functions of one params struct by value. They reach memory, barriers and every PTX instruction through
// the functions of ptx.cuh alone, so that the emulator sees each access with its file and line. Shared memory is the
// dynamic one: dynamic_shared().
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(INQ_EMULATOR)

// Stand-ins for __global__, threadIdx, dim3, cudaStream_t …, and launch().
#include "emulator.h"

#else

#include <cuda_runtime.h>

#define INQ_DEVICE __device__ __forceinline__

namespace inq::cuda {

// Dynamic shared memory of the block, 1024-byte aligned: what a 128-byte swizzle asks for.
INQ_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// Launches `kernel` on `stream`; more than 48 KB of shared memory have to be asked for.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   const Params& params) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(threads)), arguments,
                          static_cast<size_t>(shared_bytes), stream);
}

}  // namespace inq::cuda

#endif
