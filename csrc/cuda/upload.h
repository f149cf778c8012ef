// Small tables from host to device memory, such as the list of a model's tensors.
#pragma once

#include <cstdint>

#include "host.h"

namespace inq::cuda {

// Copies `bytes`, a multiple of 16, to device memory aligned to 16. The bytes travel as arguments of launches: `host` may
// be changed on return, nothing waits, and a CUDA graph keeps them, none of which is so for a copy of pageable memory.
cudaError_t upload(void* device, const void* host, int64_t bytes, cudaStream_t stream);

}  // namespace inq::cuda
