// linear for up to 64 tokens, and for any number of them where there is no wgmma. linear.cuh has the kernel.
#include "linear.cuh"

namespace inq::cuda {

cudaError_t linear(const LinearParams& p, const Choice& choice, cudaStream_t stream) {
  return product<false>(p, choice, stream);
}

}  // namespace inq::cuda
