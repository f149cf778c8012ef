#include "masked_step.h"

#include <algorithm>

#include "parallel.h"

#define INQ_ISA portable
#define INQ_LANES 1
#include "masked_step_kernel.h"

namespace inq::cpu {
namespace {

// Threads share the chunks of all tensors together: one fork and join for a whole model. 64 KB of each float32 operand
// a chunk; fewer than four chunks are not worth another thread.
constexpr int64_t kChunk = 1 << 14;
constexpr int64_t kChunksAThread = 4;

template <class Numbers>
void for_all(const std::vector<StepTensor>& tensors, const Numbers& numbers,
             void (*range)(const StepTensor&, const Numbers&, int64_t, int64_t)) {
  // first[i]: the number of chunks before tensor i.
  std::vector<int64_t> first{0};
  for (const StepTensor& t : tensors) first.push_back(first.back() + (t.numel + kChunk - 1) / kChunk);
  parallel_for(0, first.back(), kChunksAThread, [&](int64_t chunk, int64_t last) {
    size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), chunk) - first.begin()) - 1;
    for (; chunk < last; chunk = first[++i]) {
      // All that is ours of this tensor, as one range.
      const int64_t begin = (chunk - first[i]) * kChunk;
      const int64_t end = std::min((std::min(last, first[i + 1]) - first[i]) * kChunk, tensors[i].numel);
      if (begin < end) range(tensors[i], numbers, begin, end);
    }
  });
}

}  // namespace

void masked_sgd(const std::vector<StepTensor>& tensors, const SgdNumbers& numbers) {
  for_all(tensors, numbers, INQ_IN_USE(sgd_range));
}

void masked_adamw(const std::vector<StepTensor>& tensors, const AdamwNumbers& numbers) {
  for_all(tensors, numbers, INQ_IN_USE(adamw_range));
}

}  // namespace inq::cpu
