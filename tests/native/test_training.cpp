// The training kernels under the sanitizers: every instruction set, one to four threads, the smallest buffers that the
// arguments allow. What is right is decided here by sorting; tests/test_native_training.py compares with the reference.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "cpu/exponents.h"
#include "cpu/isa.h"
#include "cpu/masked_step.h"
#include "cpu/partition.h"
#include "cpu/quantize.h"
#include "random_key.h"
#include "threads.h"

using namespace inq::cpu;
using inq::Format;

namespace {

uint64_t state = 1;

uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

// Finite float32 bits: numbers near 1, few different ones, or any.
std::vector<uint32_t> random_weights(int64_t numel, int kind) {
  std::vector<uint32_t> w(static_cast<size_t>(numel));
  for (uint32_t& x : w) {
    const uint32_t r = random_bits();
    x = kind == 0 ? (r & 0x81FFFFFF) | 0x3C000000 : kind == 1 ? (r & 0x80C00000) | 0x3F000000 : r;
    if ((x & 0x7F800000) == 0x7F800000) x &= ~0x800000u;
  }
  return w;
}

std::vector<uint8_t> random_mask(int64_t numel) {
  std::vector<uint8_t> mask(static_cast<size_t>((numel + 7) / 8));
  for (uint8_t& byte : mask) byte = static_cast<uint8_t>(random_bits());
  return mask;
}

bool bit(const std::vector<uint8_t>& mask, int64_t i) { return (mask[i / 8] >> i % 8 & 1) != 0; }

// The weights as the kernels get them: exactly as many bytes as there are, so that a read beyond them is seen.
struct Stored {
  std::vector<uint32_t> wide;
  std::vector<uint16_t> narrow;
  bool bfloat16;

  Stored(const std::vector<uint32_t>& w, bool narrowed) : bfloat16(narrowed) {
    if (narrowed) {
      for (uint32_t x : w) narrow.push_back(static_cast<uint16_t>(x >> 16));
    } else {
      wide = w;
    }
  }
  void* data() { return bfloat16 ? static_cast<void*>(narrow.data()) : wide.data(); }
  uint32_t at(int64_t i) const { return bfloat16 ? static_cast<uint32_t>(narrow[i]) << 16 : wide[i]; }
};

void test_portion(int64_t rows, int64_t k, int kind, bool bfloat16, bool pruned) {
  const int64_t numel = rows * k;
  Stored w(random_weights(numel, kind), bfloat16);
  const Stored before = w;
  std::vector<uint8_t> mask = random_mask(numel);
  const std::vector<uint8_t> keep = random_mask(numel), held = mask;
  const uint8_t* const kept = pruned ? keep.data() : nullptr;
  const KeySource source{{w.data(), bfloat16, numel}, false, 0, mask.data(), kept};

  std::vector<int64_t> candidates;
  for (int64_t i = 0; i < numel; ++i) {
    if (!bit(mask, i) && (!pruned || bit(keep, i))) candidates.push_back(i);
  }
  auto key = [&](int64_t i) { return before.at(i) & 0x7FFFFFFF; };
  std::stable_sort(candidates.begin(), candidates.end(), [&](int64_t a, int64_t b) { return key(a) > key(b); });
  const int64_t count = static_cast<int64_t>(candidates.size()) / 3;

  const Threshold threshold = partition_threshold(source, count);
  if (count > 0) {
    const uint32_t last = key(candidates[count - 1]);
    CHECK(threshold.key == last >> (bfloat16 ? 16 : 0), "%ld weights", static_cast<long>(numel));
    int64_t ties = 0;
    for (int64_t i = 0; i < count; ++i) ties += key(candidates[i]) == last;
    CHECK(threshold.ties == ties, "%ld weights", static_cast<long>(numel));
  }
  bool thrown = false;
  try {
    partition_threshold(source, static_cast<int64_t>(candidates.size()) + 1);
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  CHECK(thrown, "more than there are");

  const ExponentRule rule{{4, kind == 1}, true};
  std::vector<int8_t> n1(static_cast<size_t>(rows));
  row_exponents(source.w, kept, rows, rule, n1.data());
  if (rows == 1) CHECK(n1[0] == tensor_exponent(source.w, kept, rule), "one row is the tensor");

  quantize_with_mask(source, w.data(), mask.data(), n1.data(), rows, rule.format, threshold);
  std::vector<bool> chosen(static_cast<size_t>(numel));
  for (int64_t i = 0; i < count; ++i) chosen[candidates[i]] = true;
  int64_t wrong = 0;
  for (int64_t i = 0; i < numel; ++i) {
    uint32_t expected = before.at(i);
    if (chosen[i]) {
      const int top = n1[i / k];
      const uint32_t power = inq::quantize_magnitude(key(i), top, inq::n2_of(rule.format, top));
      expected = power == 0 ? 0 : power | (expected & 0x80000000);
    }
    if (pruned && !bit(keep, i)) expected = 0;
    wrong += w.at(i) != expected || bit(mask, i) != (bit(held, i) || chosen[i]);
  }
  CHECK(wrong == 0, "%ld of %ld weights", static_cast<long>(wrong), static_cast<long>(numel));
}

// Enough weights for a sample. `kind` 0: all different; 1 and 2: those that a sample sees are all larger, or smaller, than
// the others, so that it misleads; 3: few values, mostly zero, which end with the sample; 4: each 64 weights alike.
void test_one_pass(int kind, bool random, bool bfloat16, bool masked, bool pruned) {
  // Of random keys of 2 bytes a weight half as many may be copied out.
  const int64_t numel = (int64_t{1} << (bfloat16 ? 23 : 21)) + 37;
  std::vector<uint32_t> w(static_cast<size_t>(numel));
  for (int64_t i = 0; i < numel; ++i) {
    const uint32_t r = random_bits();
    const uint32_t around = 0x3C000000u + (r & 0x01FFFFFFu);
    if (kind == 0) w[i] = around;
    if (kind == 1) w[i] = i % 64 < 16 ? around + 0x02000000u : around;
    if (kind == 2) w[i] = i % 64 < 16 ? around : around + 0x02000000u;
    if (kind == 3) w[i] = r % 3 == 0 ? 0x3F800000u : 0u;
    if (kind == 4) w[i] = i % 64 == 0 ? around : w[i - 1];
    w[i] |= r << 31;
  }
  // Keys at both ends.
  w[1000] = 0x80000000u;
  w[1001] = 0x7FFFFFFFu;
  Stored stored(w, bfloat16);
  std::vector<uint8_t> mask = masked ? random_mask(numel) : std::vector<uint8_t>(static_cast<size_t>((numel + 7) / 8));
  std::vector<uint8_t> keep = random_mask(numel);
  const KeySource source{{stored.data(), bfloat16, numel}, random, 7, mask.data(), pruned ? keep.data() : nullptr};
  std::vector<uint32_t> keys;
  uint32_t largest = 0;
  for (int64_t i = 0; i < numel; ++i) {
    if (bit(mask, i) || (pruned && !bit(keep, i))) continue;
    keys.push_back(random ? inq::random_key(7, static_cast<uint64_t>(i)) : w[i] & 0x7FFFFFFF);
    largest = std::max(largest, keys.back());
  }
  std::sort(keys.begin(), keys.end(), std::greater<>());
  const int64_t all = static_cast<int64_t>(keys.size());
  for (const int64_t count : {int64_t{1}, all / 2, all - 1, all}) {
    const uint32_t last = keys[count - 1];
    const auto first = std::lower_bound(keys.begin(), keys.end(), last, std::greater<>()) - keys.begin();
    const Threshold threshold = partition_threshold(source, count);
    CHECK(threshold.key == last && threshold.ties == count - first, "kind %d, %ld of %ld", kind,
          static_cast<long>(count), static_cast<long>(all));
    const auto selection = select_in_one_pass(source, count);
    if (kind == 0) CHECK(selection.has_value(), "different weights need no second pass");
    if ((kind == 1 || kind == 2) && count == all / 2) CHECK(!selection, "the sample does not see half of the weights");
    if (selection) {
      CHECK(selection->threshold.key == last && selection->threshold.ties == count - first, "kind %d", kind);
      CHECK(selection->largest == largest && selection->masked == masked, "kind %d", kind);
    }
  }
  CHECK(!select_in_one_pass(source, 0) && !select_in_one_pass(source, all + 1), "no such count");
}

void test_random_partition(int64_t numel) {
  std::vector<uint32_t> w = random_weights(numel, 0);
  std::vector<uint8_t> mask(static_cast<size_t>((numel + 7) / 8));
  const KeySource source{{w.data(), false, numel}, true, 99, mask.data(), nullptr};
  const std::vector<int8_t> n1{0};
  quantize_with_mask(source, w.data(), mask.data(), n1.data(), 1, {2, false}, partition_threshold(source, numel / 2));
  int64_t frozen = 0;
  for (int64_t i = 0; i < numel; ++i) frozen += bit(mask, i);
  CHECK(frozen == numel / 2, "%ld of %ld", static_cast<long>(frozen), static_cast<long>(numel));
}

std::vector<float> floats(int64_t numel) {
  std::vector<float> x(static_cast<size_t>(numel));
  for (float& v : x) v = static_cast<float>(random_bits() >> 8) / (1 << 24);
  return x;
}

// Several tensors at once; the same values as `expected`, or the first ones there.
void test_steps(std::vector<float>& expected) {
  state = 7;
  std::vector<std::vector<float>> w, grad, first, second;
  std::vector<std::vector<uint16_t>> narrow_w, narrow_grad;
  std::vector<std::vector<uint8_t>> masks;
  std::vector<StepTensor> tensors;
  for (int64_t numel : {1, 63, 64, 65, 1000, 40'000, 70'001}) {
    for (auto* list : {&w, &grad, &first, &second}) list->push_back(floats(numel));
    masks.push_back(random_mask(numel));
    narrow_w.emplace_back(numel, 0x3F80);
    narrow_grad.emplace_back(numel, 0x3E80);
  }
  for (size_t i = 0; i < w.size(); ++i) {
    const int64_t numel = static_cast<int64_t>(w[i].size());
    const bool bfloat16 = i % 2 == 1;
    tensors.push_back({bfloat16 ? static_cast<void*>(narrow_w[i].data()) : w[i].data(),
                       bfloat16 ? static_cast<void*>(narrow_grad[i].data()) : grad[i].data(), bfloat16,
                       first[i].data(), second[i].data(), i % 3 == 0 ? nullptr : masks[i].data(), numel});
  }
  const std::vector<std::vector<float>> before = w;
  masked_adamw(tensors, inq::adamw_numbers(0.1, 0.9, 0.999, 0.01, 1e-8, 3, false));
  masked_sgd(tensors, {0.1f, 0.9f, 1.0f, 0.01f, true, true, false});
  std::vector<float> got;
  for (size_t i = 0; i < w.size(); ++i) {
    int64_t wrong = 0;
    for (int64_t j = 0; j < tensors[i].numel; ++j) {
      const bool held = i % 3 != 0 && bit(masks[i], j);
      if (!tensors[i].bfloat16) wrong += (std::memcmp(&w[i][j], &before[i][j], sizeof(float)) == 0) != held;
    }
    CHECK(wrong == 0, "%ld in tensor %d", static_cast<long>(wrong), static_cast<int>(i));
    for (auto* list : {&w, &first, &second}) got.insert(got.end(), (*list)[i].begin(), (*list)[i].end());
  }
  if (expected.empty()) expected = got;
  CHECK(std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0, "on %s", name(current_isa()));
}

}  // namespace

int main() {
  const Isa best = std::min(detected_isa(), Isa::avx512);
  std::vector<float> steps;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (isa > best) continue;
    set_isa(isa);
    for (int threads = 1; threads <= 4; ++threads) {
      set_thread_count(threads);
      for (int kind = 0; kind < 3; ++kind) {
        for (bool bfloat16 : {false, true}) {
          test_portion(1, 1, kind, bfloat16, false);
          test_portion(5, 13, kind, bfloat16, true);
          test_portion(64, 2, kind, bfloat16, false);
          test_portion(3, 12'345, kind, bfloat16, kind == 1);
        }
      }
      // More than a thread's share of blocks, and chunks whose ties come in a second pass.
      test_portion(1, 140'001, 1, threads % 2 == 0, threads == 3);
      test_random_partition(70'001);
      // Each kind and choice with one number of threads or another: sorting millions of keys takes a while.
      if (threads == 1) test_one_pass(0, false, false, false, true);
      if (threads == 2) {
        for (int kind = 1; kind < 5; ++kind) test_one_pass(kind, false, false, kind % 2 == 0, false);
      }
      if (threads == 3) test_one_pass(0, true, isa == best, true, true);
      if (threads == 4) test_one_pass(0, false, false, true, false);
      test_steps(steps);
    }
  }
  return inq::test::failures();
}
