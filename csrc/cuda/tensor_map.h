// CUtensorMaps of matrices, for tma_load_2d.
#pragma once

#include "ptx.cuh"

#if !defined(INQ_EMULATOR)

#include <cuda.h>

namespace inq::cuda {

// A matrix of `rows` by `columns` elements of 1 or 2 bytes, rows row_bytes apart, read in boxes of box_rows by 128 bytes
// that lie in shared memory with a 128-byte swizzle. The address and row_bytes are multiples of 16.
inline cudaError_t make_tensor_map(TensorMap* map, const void* matrix, int element_bytes, int64_t rows, int64_t columns,
                                   int64_t row_bytes, int box_rows) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  // The driver's function is looked up at run time: a library that links libcuda does not load where there is none.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / element_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  // Elements are only moved: 16-bit ones may as well be integers.
  const CUtensorMapDataType type = element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), type, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace inq::cuda

#endif
