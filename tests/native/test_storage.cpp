// pack and unpack, every instruction set against the portable one, in buffers of exactly their size.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/storage.h"
#include "threads.h"

using namespace inq;
using namespace inq::cpu;

namespace {

struct Result {
  std::vector<uint8_t> codes;
  std::vector<float> values;
  std::vector<uint16_t> halves;
};

Result run(Format format, const std::vector<float>& w, const std::vector<int8_t>& n1, int64_t n, int64_t k) {
  Result r;
  r.codes.resize(n * row_bytes(format, k));
  pack({w.data(), n1.data(), r.codes.data(), n, k, format, DType::float32});
  r.values.resize(n * k);
  r.halves.resize(n * k);
  unpack({r.codes.data(), n1.data(), nullptr, r.values.data(), n, k, format, DType::float32});
  unpack({r.codes.data(), n1.data(), nullptr, r.halves.data(), n, k, format, DType::bfloat16});
  return r;
}

void check_shape(int64_t n, int64_t k, std::mt19937& random, int least_bits = 2) {
  for (int bits = least_bits; bits <= 5; ++bits) {
    for (const bool dense : {false, true}) {
      const Format format{bits, dense};
      std::vector<int8_t> n1(n);
      std::vector<float> w(n * k);
      for (int64_t row = 0; row < n; ++row) {
        n1[row] = static_cast<int8_t>(row == 0 ? 127 : static_cast<int>(random() % 8) - 4);
        for (int64_t i = 0; i < k; ++i) {
          const int index = static_cast<int>(random() % (magnitudes(format) + 1)) - 1;
          const float level = index < 0 ? 0.0f : std::ldexp(1.0f, n2_of(format, n1[row]) + index);
          w[row * k + i] = random() % 2 ? -level : level;
        }
      }
      set_isa(Isa::portable);
      set_thread_count(1);
      const Result expected = run(format, w, n1, n, k);
      for (int64_t i = 0; i < n * k; ++i) CHECK(expected.values[i] == w[i], "%d bits, value %ld", bits, (long)i);
      for (int isa = 0; isa <= static_cast<int>(detected_isa()); ++isa) {
        for (int threads = 1; threads <= 3; ++threads) {
          set_isa(static_cast<Isa>(isa));
          set_thread_count(threads);
          const Result got = run(format, w, n1, n, k);
          CHECK(got.codes == expected.codes, "%d bits, %ld × %ld, isa %d", bits, (long)n, (long)k, isa);
          CHECK(got.values == expected.values, "%d bits, %ld × %ld, isa %d", bits, (long)n, (long)k, isa);
          CHECK(got.halves == expected.halves, "%d bits, %ld × %ld, isa %d", bits, (long)n, (long)k, isa);
        }
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const int64_t n : {1, 3, 17}) {
    for (const int64_t k : {1, 7, 8, 9, 31, 32, 33, 64, 257}) check_shape(n, k, random);
  }
  // Large enough for several threads and for streaming stores.
  check_shape(2, 1100000, random, 5);
  return test::failures() != 0;
}
