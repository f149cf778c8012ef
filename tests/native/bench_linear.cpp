// Times products by plans of one's own beside the plan that is chosen, without torch: `make bench-native`. The numbers of
// plan.cpp and the loops were found like this. Words are name=value; those before the first "/" are common to all, and each
// "/" begins a variant, whose words change the plan:
//
//   m=64 n=4096 k=14336 bits=4 dtype=bfloat16 isa=amx threads=2 seconds=2 cold=1 / n_group=32 n_share=32 / k_chunks=4
//
// The first line is plan()'s own; the variants take turns with it, run by run, each on the next of weights that together
// exceed the caches twice, and cold=1 reads 128 MB before each run, as another layer would.
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace inq::cpu {

int thread_count() { return omp_get_max_threads(); }

// As torch's, on the same runtime.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, const void* context) {
  if (begin >= end) return;
  const int64_t count = std::min<int64_t>(thread_count(), ceil_div(end - begin, std::max<int64_t>(grain, 1)));
#pragma omp parallel num_threads(static_cast<int>(count))
  {
    const int64_t share = ceil_div(end - begin, omp_get_num_threads());
    const int64_t first = begin + omp_get_thread_num() * share;
    if (first < end) function(first, std::min(first + share, end), context);
  }
}

}  // namespace inq::cpu

using namespace inq;
using namespace inq::cpu;

namespace {

using Words = std::map<std::string, std::string>;

int64_t number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end || value < 0) throw std::invalid_argument(name + ": expected a number, got \"" + text + "\"");
  return value;
}

void change(Plan& p, const std::string& name, const std::string& text) {
  const int64_t value = number(name, text);
  if (value == 0 && name != "by_rows") throw std::invalid_argument(name + ": expected at least 1, got 0");
  const std::map<std::string, int64_t*> numbers = {{"group", &p.group},     {"m_block", &p.m_block}, {"k_chunk", &p.k_chunk},
                                                   {"n_share", &p.n_share}, {"n_group", &p.n_group}, {"k_chunks", &p.k_chunks}};
  if (name == "by_rows") {
    p.by_rows = value != 0;
  } else if (const auto found = numbers.find(name); found != numbers.end()) {
    *found->second = value;
  } else {
    throw std::invalid_argument("expected one of group, m_block, k_chunk, n_share, n_group, k_chunks, by_rows; got " + name);
  }
}

// The longest a probe may take of the fastest one's time.
constexpr double kQuiet = 1.2;

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

// µs of the slowest thread for as many instructions as a core can start: about twice as long when another process, or
// another virtual machine, runs on the same core. Such neighbours slow products three to four times, each kind by another
// factor, so that not even a ratio of two runs in turn means anything then.
double probe() {
  double slowest = 0;
#pragma omp parallel reduction(max : slowest)
  {
    const auto start = std::chrono::steady_clock::now();
    uint64_t a = 1, b = 2, c = 3, d = 4, e = 5, f = 6;
    for (int i = 0; i < 10000; ++i) {
      __asm__ volatile(
          "add $1, %0\n\tadd $1, %1\n\tadd $1, %2\n\tadd $1, %3\n\tadd $1, %4\n\tadd $1, %5\n\t"
          "add $1, %0\n\tadd $1, %1\n\tadd $1, %2\n\tadd $1, %3\n\tadd $1, %4\n\tadd $1, %5"
          : "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f));
    }
    slowest = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
  }
  return slowest;
}

struct Run {
  double us, probe;
};

struct Variant {
  std::string text;
  Plan plan;
  std::vector<Run> runs;
};

int run(const std::vector<std::string>& arguments) {
  Words common = {{"m", "64"},     {"n", "4096"},   {"k", "14336"},   {"bits", "4"}, {"dtype", "bfloat16"},
                  {"isa", "best"}, {"threads", "2"}, {"seconds", "2"}, {"cold", "1"}};
  std::vector<Variant> variants(1);
  std::vector<std::pair<size_t, std::pair<std::string, std::string>>> changes;
  for (const std::string& word : arguments) {
    const size_t equals = word.find('=');
    if (word == "/") {
      variants.emplace_back();
      continue;
    }
    const std::string name = word.substr(0, equals), value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (variants.size() > 1) {
      changes.push_back({variants.size() - 1, {name, value}});
      variants.back().text += " " + word;
    } else if (common.count(name)) {
      common[name] = value;
    } else {
      throw std::invalid_argument("expected m, n, k, bits, dtype, isa, threads, seconds or cold; got " + name);
    }
  }
  auto common_number = [&](const char* name) { return number(name, common[name]); };
  const int64_t m = common_number("m"), n = common_number("n"), k = common_number("k");
  omp_set_num_threads(static_cast<int>(std::max<int64_t>(common_number("threads"), 1)));
  if (common["isa"] != "best") set_isa(isa_from_name(common["isa"], "isa"));
  const DType type = dtype_from_name(common["dtype"]);
  const Format format{static_cast<int>(std::clamp<int64_t>(common_number("bits"), 2, 5)), false};

  const Plan chosen = plan({Op::linear, m, n, k, type, current_isa(), thread_count()});
  for (Variant& v : variants) v.plan = chosen;
  for (const auto& [at, word] : changes) change(variants[at].plan, word.first, word.second);

  const int64_t bytes = panels_of(n) * tiles_of(k) * tile_bytes(format);
  const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 32 << 20);
  const int64_t copies = std::clamp<int64_t>(ceil_div(2 * cache, std::max<int64_t>(bytes, 1)), 2, 64);
  std::mt19937_64 random(1);
  const Buffer<uint64_t> weights(ceil_div(copies * bytes, 8));
  for (int64_t i = 0; i < ceil_div(copies * bytes, 8); ++i) weights[i] = random();
  const Buffer<uint32_t> x(ceil_div(m * k * size_of(type), 4));
  // Around 1, in either dtype.
  for (int64_t i = 0; i < ceil_div(m * k * size_of(type), 4); ++i) x[i] = (static_cast<uint32_t>(random()) & 0x81FF'81FF) | 0x3E00'3E00;
  const std::vector<int8_t> exponent(static_cast<size_t>(n), -2);
  const Buffer<uint8_t> y(m * n * size_of(type)), first(m * n * size_of(type));
  const Buffer<uint64_t> other(cache / 8 < (16 << 20) ? 16 << 20 : cache / 8);
  for (int64_t i = 0; i < 16 << 20; ++i) other[i] = static_cast<uint64_t>(i);

  volatile uint64_t sink = 0;
  auto once = [&](Variant& v, int64_t copy, uint8_t* out) -> Run {
    const Weight w{reinterpret_cast<const uint8_t*>(weights.get()) + copy * bytes, exponent.data(), nullptr, format, n, k};
    if (common["cold"] != "0") {
      uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum)
      for (int64_t i = 0; i < 16 << 20; ++i) sum += other[i];
      sink = sink + sum;
    }
    const double before = probe();
    const auto start = std::chrono::steady_clock::now();
    linear({x.get(), m, type, w, nullptr, out}, v.plan);
    const double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
    return {us, std::max(before, probe())};
  };

  std::printf("%s, %d bits, M %lld, N %lld, K %lld, %lld weights of %.1f MB in turn\n", to_string(chosen).c_str(), format.bits,
              static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(copies),
              static_cast<double>(bytes) / 1e6);
  int status = 0;
  for (Variant& v : variants) {
    once(v, 0, v.text.empty() ? first.get() : y.get());
    // A plan decides no bits, but k_chunk does where a chunk is what is summed first.
    if (!v.text.empty() && std::memcmp(first.get(), y.get(), static_cast<size_t>(m * n * size_of(type))) != 0) {
      std::printf("%s: other bits than the chosen plan's\n", v.text.c_str() + 1);
      status = v.plan.k_chunk == chosen.k_chunk ? 1 : status;
    }
  }
  const auto start = std::chrono::steady_clock::now();
  const double seconds = static_cast<double>(common_number("seconds")) * static_cast<double>(variants.size());
  for (int64_t turn = 0; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds || turn < 3; ++turn) {
    for (size_t i = 0; i < variants.size(); ++i) {
      Variant& v = variants[(i + static_cast<size_t>(turn)) % variants.size()];
      v.runs.push_back(once(v, turn % copies, y.get()));
    }
  }
  double fastest = variants[0].runs[0].probe;
  for (const Variant& v : variants) {
    for (const Run& r : v.runs) fastest = std::min(fastest, r.probe);
  }
  // Of the runs without neighbours, as far as the probes before and after saw.
  auto quiet = [&](const Variant& v) {
    std::vector<double> us;
    for (const Run& r : v.runs) {
      if (r.probe <= kQuiet * fastest) us.push_back(r.us);
    }
    return us;
  };
  std::printf("%10s %10s %10s %8s %10s %8s %12s\n", "median µs", "p10", "p90", "GB/s", "GFLOP/s", "faster", "quiet runs");
  double base = 0;
  for (const Variant& v : variants) {
    const std::vector<double> times = quiet(v);
    if (times.empty()) {
      std::printf("%s: none of %zu runs was quiet\n", v.text.c_str(), v.runs.size());
      continue;
    }
    const double us = quantile(times, 0.5);
    if (v.text.empty()) base = us;
    std::printf("%9.0f %10.0f %10.0f %8.1f %10.0f %7.3fx %5zu of %zu %s\n", us, quantile(times, 0.1), quantile(times, 0.9),
                static_cast<double>(bytes) / us / 1e3, 2.0 * static_cast<double>(m * n) * static_cast<double>(k) / us / 1e3,
                base / us, times.size(), v.runs.size(), v.text.empty() ? " as chosen" : v.text.c_str());
  }
  return status;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_linear: %s\n", error.what());
    return 2;
  }
}
