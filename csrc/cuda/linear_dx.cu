// linear_dx: the gradient in x, from the words that linear reads. linear.cuh has the kernel.
#include "linear.cuh"

namespace inq::cuda {

cudaError_t linear_dx(const LinearParams& p, const Choice& choice, cudaStream_t stream) {
  return product<true>(p, choice, stream);
}

}  // namespace inq::cuda
