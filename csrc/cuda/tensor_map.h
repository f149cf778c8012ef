// The TMA's description of a matrix in global memory and of the boxes that are copied from it, made on the host.
#pragma once

#include "ptx.cuh"

#if !defined(INQ_EMULATOR)
#include <cuda.h>  // types only: the one function of the driver is found at run time
#endif

namespace inq::cuda {

enum class TensorType { u8, f16, bf16 };
// Within 1024 (512, 256) bytes, the 16-byte columns of a row of 128 (64, 32) bytes are exchanged by its number.
enum class TensorSwizzle { none, bytes_32, bytes_64, bytes_128 };

inline int64_t element_bytes(TensorType type) { return type == TensorType::u8 ? 1 : 2; }

// What the hardware asks for; the driver's own error would not say which.
inline bool valid_tensor_map_2d(TensorType type, const void* base, int64_t columns, int64_t rows,
                                int64_t row_stride_bytes, int box_columns, int box_rows, TensorSwizzle swizzle) {
  constexpr int64_t kMostRowBytes[] = {256 * 2, 32, 64, 128};  // a box's, by swizzle
  const int64_t row_bytes = box_columns * element_bytes(type);
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && columns > 0 && rows > 0 && columns <= int64_t{1} << 32 &&
         rows <= int64_t{1} << 32 && row_stride_bytes % 16 == 0 && row_stride_bytes < int64_t{1} << 40 &&
         row_stride_bytes >= 0 && box_columns > 0 && box_columns <= 256 && box_rows > 0 && box_rows <= 256 &&
         row_bytes % 16 == 0 && row_bytes <= kMostRowBytes[static_cast<int>(swizzle)];
}

#if defined(INQ_EMULATOR)

// What the emulator keeps in a TensorMap.
struct TensorMap2d {
  uint64_t magic;
  uintptr_t base;
  int64_t columns, rows, row_stride_bytes;
  int64_t box_columns, box_rows;
  int32_t element_bytes;
  int32_t swizzle;  // as a matrix descriptor has it
};
constexpr uint64_t kTensorMapMagic = 0x70616D2D726F736Eull;
static_assert(sizeof(TensorMap2d) <= sizeof(TensorMap));

#endif

// A row-major matrix of `rows` by `columns`, rows `row_stride_bytes` apart, in boxes of `box_rows` by `box_columns`;
// a box lies row by row in shared memory, zeros where it is outside. Base and stride: multiples of 16 bytes.
inline cudaError_t make_tensor_map_2d(TensorMap* map, TensorType type, const void* base, int64_t columns, int64_t rows,
                                      int64_t row_stride_bytes, int box_columns, int box_rows, TensorSwizzle swizzle) {
  if (!valid_tensor_map_2d(type, base, columns, rows, row_stride_bytes, box_columns, box_rows, swizzle))
    return cudaErrorInvalidValue;
#if defined(INQ_EMULATOR)
  constexpr int32_t kModes[] = {0, 3, 2, 1};
  const TensorMap2d description{kTensorMapMagic,
                                reinterpret_cast<uintptr_t>(base),
                                columns,
                                rows,
                                row_stride_bytes,
                                box_columns,
                                box_rows,
                                static_cast<int32_t>(element_bytes(type)),
                                kModes[static_cast<int>(swizzle)]};
  std::memcpy(map, &description, sizeof description);
  return cudaSuccess;
#else
  static void* const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult answer;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &answer);
    return status == cudaSuccess && answer == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (found == nullptr) return cudaErrorNotSupported;
  constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16};
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      reinterpret_cast<CUtensorMap*>(map), kTypes[static_cast<int>(type)], 2, const_cast<void*>(base), sizes, strides,
      box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(swizzle)],
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

}  // namespace inq::cuda
