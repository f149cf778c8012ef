// The entry points of the CUDA kernels: each launches what it needs on `stream` and waits for nothing.
#pragma once

#include "host.h"
#include "params.h"

namespace inq::cuda {

// The key of the `count`-th weight to freeze next and how many with just this key to take, and the exponents, of all
// tensors of a list; either or both. A count that is no number of candidates selects none, or all.
cudaError_t partition(const PartitionParams& params, PartitionChoice choice, cudaStream_t stream);

// Freezes what thresholds select: quantizes it in place, sets its bits in the masks; what is pruned becomes +0.
cudaError_t quantize_with_mask(const FreezeParams& params, FreezeChoice choice, cudaStream_t stream);

// The steps of SGD and AdamW on the weights that no mask holds.
cudaError_t masked_sgd(const SgdParams& params, SgdChoice choice, cudaStream_t stream);
cudaError_t masked_adamw(const AdamwParams& params, AdamwChoice choice, cudaStream_t stream);

// Quantized weights to the storage layout, and back.
cudaError_t pack(const PackParams& params, StorageChoice choice, cudaStream_t stream);
cudaError_t unpack(const UnpackParams& params, StorageChoice choice, cudaStream_t stream);

// The storage layout to what products read, and back.
struct FragmentsChoice {
  Number number;
  Levels levels;
};
cudaError_t prepack(const PrepackParams& params, FragmentsChoice choice, cudaStream_t stream);
cudaError_t unprepack(const UnprepackParams& params, FragmentsChoice choice, cudaStream_t stream);

}  // namespace inq::cuda
