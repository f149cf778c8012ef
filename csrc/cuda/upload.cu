#include "upload.h"

#include <cstring>

#include "ptx.cuh"

namespace inq::cuda {
namespace {

// Arguments of a launch have 4 KB.
constexpr int kPieces = 252;

struct UploadParams {
  Four* to;
  int pieces;
  Four data[kPieces];
};

__global__ void __launch_bounds__(256) upload_kernel(const __grid_constant__ UploadParams p) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < p.pieces) st_global(p.to + i, p.data[i]);
}

}  // namespace

cudaError_t upload(void* device, const void* host, int64_t bytes, cudaStream_t stream) {
  UploadParams p{};
  p.to = static_cast<Four*>(device);
  for (int64_t done = 0; done < bytes; done += sizeof p.data) {
    const int64_t left = bytes - done, here = left < int64_t{sizeof p.data} ? left : int64_t{sizeof p.data};
    p.pieces = static_cast<int>(here / 16);
    std::memcpy(p.data, static_cast<const char*>(host) + done, static_cast<size_t>(here));
    const cudaError_t status = launch(upload_kernel, dim3(1), 256, 0, stream, p);
    if (status != cudaSuccess) return status;
    p.to += p.pieces;
  }
  return cudaSuccess;
}

}  // namespace inq::cuda
