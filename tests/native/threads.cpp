// parallel.h with std::thread, for the native tests: sanitizers see every thread start and join.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/parallel.h"
#include "threads.h"

namespace inq::cpu {

static std::atomic<int> threads{2};

void set_thread_count(int count) { threads = count; }

int thread_count() { return threads; }

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, const void* context) {
  if (begin >= end) return;
  const int64_t most = (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t count = std::min<int64_t>(threads, most);
  const int64_t share = (end - begin + count - 1) / count;
  std::vector<std::thread> pool;
  for (int64_t first = begin; first < end; first += share) {
    pool.emplace_back(function, first, std::min(first + share, end), context);
  }
  for (std::thread& t : pool) t.join();
}

}  // namespace inq::cpu
