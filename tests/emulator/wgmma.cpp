// wgmma: each warp does its quarter, at the latest moment that wgmma_wait allows. Until then its accumulators are not
// numbers, and neither they nor its A registers may change.
#include <cstdio>

#include "async.h"

namespace inq::cuda {

using namespace emulator;

namespace {

constexpr int kWarpsInGroup = 4;

WarpAsync& state_of(const Warp& warp) { return warp.block->async->warp[static_cast<size_t>(warp.index)]; }
int agent_of(const Warp& warp) { return warp.block->threads + kMbarriers + warp.index / kWarpsInGroup; }

// Whether `bytes` at p are what they were at this thread's last wgmma_fence.
bool same_as_at_fence(const Thread& thread, const void* p, size_t bytes) {
  const char* const at = static_cast<const char*>(p);
  if (at < thread.fenced_from || thread.fenced_from == nullptr) return false;
  const auto offset = static_cast<size_t>(at - thread.fenced_from);
  return offset + bytes <= thread.fenced.size() && std::memcmp(thread.fenced.data() + offset, at, bytes) == 0;
}

struct Request {
  int product, n;
  float* d;
  const uint32_t* a;
  uint64_t descriptor;
  bool accumulate;
  Place place;
};

const char* name(int product) { return product == 0 ? "f16" : product == 1 ? "bf16" : "e4m3"; }

// Where byte `k` of row n of B is: an offset in the block's shared memory.
uint32_t address_of(uint64_t descriptor, int n, int k) {
  const auto field = [&](int low) { return static_cast<uint32_t>(descriptor >> low & 0x3FFF) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const int mode = static_cast<int>(descriptor >> 62);
  const auto row = static_cast<uint32_t>(n), byte = static_cast<uint32_t>(k);
  if (mode == 0)  // 8 rows of 16 bytes at a time
    return start + row / 8 * stride + byte / 16 * leading + row % 8 * 16 + byte % 16;
  const uint32_t pitch = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  return swizzled(start + row / 8 * stride + row % 8 * pitch + byte, mode);
}

void check_same_as_other_warps(Warp& warp, const Request& one, uint32_t count) {
  auto& said = warp.block->async->said[warp.index / kWarpsInGroup];
  if (count >= said.size()) {
    said.push_back({one.product, one.n, one.descriptor, one.accumulate, one.place});
    return;
  }
  const Said& first = said[count];
  if (first.product != one.product || first.n != one.n || first.descriptor != one.descriptor ||
      first.accumulate != one.accumulate || first.place != one.place)
    fault("divergence", one.place,
          text("the warps of a warpgroup issue different wgmma: m64n%d %s of descriptor %llx, and n%d %s of %llx at %s",
               one.n, name(one.product), static_cast<unsigned long long>(one.descriptor), first.n, name(first.product),
               static_cast<unsigned long long>(first.descriptor), name_of(first.place).c_str()));
}

// Rows of a swizzled pattern are counted from an address that is a multiple of eight of them (base offset 0), and the
// 32 bytes of a step lie within a row.
void check_start(const Request& one) {
  const auto start = static_cast<uint32_t>(one.descriptor & 0x3FFF) << 4;
  const int mode = static_cast<int>(one.descriptor >> 62);
  if (mode == 0) return;
  const uint32_t pitch = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  if (start / pitch % 8 != 0 || start % pitch + 32 > pitch)
    fault("alignment", one.place,
          text("a descriptor of shared address %u: not within the first row of a pattern of 8 rows of %u bytes", start,
               pitch));
}

void issue(void* const (&all)[32]) {
  Warp& warp = *current->warp;
  Block& block = *warp.block;
  const Request& first = *static_cast<Request*>(all[0]);
  if (options.capability != 90)
    fault("capability", first.place, text("no wgmma on sm_%d", options.capability));
  if (block.threads % 128 != 0 || warp.index / kWarpsInGroup >= kWarpgroups) {
    fault("wgmma", first.place, text("a block of %d threads: needs whole warpgroups, at most 8", block.threads));
    give_up();
  }
  WarpAsync& state = state_of(warp);
  check_same_as_other_warps(warp, first, state.count++);

  check_start(first);
  // B: read by the warpgroup's agent from now until the group is waited for.
  const uint32_t group = state.committed + 1;
  bool fits = true;
  for (int n = 0; n < first.n && fits; ++n) {
    for (int k = 0; k < 32; k += 16) {
      const int64_t at = int64_t{address_of(first.descriptor, n, k)} - 1024;
      fits = fits && read_async(*warp.threads[0], at, 16, agent_of(warp), group, first.place);
    }
  }
  if (!fits) give_up();

  int which = -1;
  for (size_t i = 0; i < state.accumulators.size(); ++i)
    if (state.accumulators[i].d[0] == first.d) which = static_cast<int>(i);
  if (which < 0) {
    for (size_t i = 0; i < state.accumulators.size(); ++i)
      if (state.accumulators[i].in_flight == 0) which = static_cast<int>(i);
    if (which < 0) {
      which = static_cast<int>(state.accumulators.size());
      state.accumulators.emplace_back();
    }
  }
  Accumulator& accumulator = state.accumulators[static_cast<size_t>(which)];
  const int own = first.n / 2;
  const bool chained = accumulator.in_flight > 0;
  accumulator.values.resize(32 * 128);
  Issued& issued = state.issued.emplace_back();
  issued.product = first.product;
  issued.n = first.n;
  issued.descriptor = first.descriptor;
  issued.accumulate = first.accumulate;
  issued.accumulator = which;
  issued.group = group;
  issued.place = first.place;
  if (chained && accumulator.n != first.n)
    fault("wgmma fence", first.place, text("accumulators of n%d in flight are used as n%d", accumulator.n, first.n));
  accumulator.n = first.n;
  const size_t bytes = static_cast<size_t>(own) * 4;
  for (int lane = 0; lane < 32; ++lane) {
    const Request& one = *static_cast<Request*>(all[lane]);
    const Thread& thread = *warp.threads[lane];
    if (!same_as_at_fence(thread, one.a, 16))
      fault("wgmma fence", one.place, text("A registers of thread %d were written after the last wgmma_fence", thread.index));
    for (int i = 0; i < 4; ++i)
      if (one.a[i] == kUnwritten)
        fault("unwritten register", one.place, text("a[%d] of thread %d", i, thread.index));
    issued.a[lane] = one.a;
    std::memcpy(issued.values[lane], one.a, 16);
    if (!chained) {
      accumulator.d[lane] = one.d;
      float* const values = &accumulator.values[static_cast<size_t>(lane * own)];
      // Whether they are added to or overwritten.
      if (!same_as_at_fence(thread, one.d, bytes))
        fault("wgmma fence", one.place,
              text("accumulators of thread %d were written after the last wgmma_fence", thread.index));
      if (one.accumulate) {
        if (float_to_bits(one.d[0]) == kUnwritten)
          fault("unwritten register", one.place, text("accumulators of thread %d", thread.index));
        std::memcpy(values, one.d, bytes);
      }
      std::fill_n(reinterpret_cast<uint32_t*>(one.d), own, kInFlight);
    }
  }
  ++accumulator.in_flight;
  state.open = true;
}

// The tensor core's sum for e4m3: all terms cut to 14 bits at the largest exponent.
double short_sum(double accumulator, const float* a, const float (*b)[256], int n, int ks) {
  double most = std::fabs(accumulator);
  for (int k = 0; k < ks; ++k) most = std::max(most, std::fabs(static_cast<double>(a[k]) * b[k][n]));
  if (!(most > 0) || !std::isfinite(most)) {
    double sum = accumulator;
    for (int k = 0; k < ks; ++k) sum += static_cast<double>(a[k]) * b[k][n];
    return sum;
  }
  const double unit = std::ldexp(1.0, std::ilogb(most) - 13);
  double sum = std::trunc(accumulator / unit);
  for (int k = 0; k < ks; ++k) sum += std::trunc(static_cast<double>(a[k]) * b[k][n] / unit);
  return sum * unit;
}

void execute(Warp& warp, const Issued& one, Accumulator& accumulator) {
  static float a[16][32], b[32][256];
  static double sums[256];
  Block& block = *warp.block;
  const bool bytes = one.product == 2;
  const int ks = bytes ? 32 : 16, own = one.n / 2;
  const auto number = [&](uint32_t half) {
    return one.product == 0 ? from_f16(static_cast<uint16_t>(half)) : from_bf16(static_cast<uint16_t>(half));
  };
  for (int n = 0; n < one.n; ++n) {
    for (int half = 0; half < 2; ++half) {
      uint8_t row[16];
      std::memcpy(row, block.shared + (address_of(one.descriptor, n, 16 * half) - 1024), 16);
      if (bytes) {
        for (int i = 0; i < 16; ++i) b[16 * half + i][n] = from_e4m3(row[i]);
      } else {
        for (int i = 0; i < 8; ++i) b[8 * half + i][n] = number(row[2 * i] | uint32_t{row[2 * i + 1]} << 8);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1);
      const uint32_t word = one.values[lane][i];
      if (bytes) {
        for (int j = 0; j < 4; ++j) a[row][4 * t + 16 * (i >> 1) + j] = from_e4m3(static_cast<uint8_t>(word >> (8 * j)));
      } else {
        a[row][2 * t + 8 * (i >> 1)] = number(word & 0xFFFF);
        a[row][2 * t + 8 * (i >> 1) + 1] = number(word >> 16);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    // d[4 j + 2 h + c] of lane 4 g + t: row g + 8 h, column 8 j + 2 t + c.
    const auto at = [&](int n) -> float& {
      const int lane = row % 8 * 4 + n % 8 / 2;
      return accumulator.values[static_cast<size_t>(lane * own + n / 8 * 4 + row / 8 * 2 + n % 2)];
    };
    for (int n = 0; n < one.n; ++n) sums[n] = one.accumulate ? at(n) : 0.0;
    if (bytes && options.short_accumulator) {
      for (int n = 0; n < one.n; ++n) sums[n] = short_sum(sums[n], a[row], b, n, ks);
    } else {
      for (int k = 0; k < ks; ++k) {
        const double x = a[row][k];
        for (int n = 0; n < one.n; ++n) sums[n] += x * b[k][n];
      }
    }
    for (int n = 0; n < one.n; ++n) at(n) = static_cast<float>(sums[n]);
  }
}

// Does all groups up to `group`, for the whole warp.
void finish(Warp& warp, uint32_t group, Place place) {
  WarpAsync& state = state_of(warp);
  size_t done = 0;
  for (; done < state.issued.size() && state.issued[done].group <= group; ++done) {
    const Issued& one = state.issued[done];
    Accumulator& accumulator = state.accumulators[static_cast<size_t>(one.accumulator)];
    for (int lane = 0; lane < 32; ++lane)
      if (std::memcmp(one.a[lane], one.values[lane], 16) != 0)
        fault("wgmma registers", one.place,
              text("A registers of thread %d changed before the wgmma_wait at %s", warp.threads[lane]->index,
                   name_of(place).c_str()));
    execute(warp, one, accumulator);
    if (--accumulator.in_flight > 0) continue;
    const int own = accumulator.n / 2;
    for (int lane = 0; lane < 32; ++lane) {
      float* const d = accumulator.d[lane];
      for (int i = 0; i < own; ++i) {
        if (float_to_bits(d[i]) == kInFlight) continue;
        fault("wgmma registers", one.place,
              text("accumulators of thread %d were written before the wgmma_wait at %s", warp.threads[lane]->index,
                   name_of(place).c_str()));
        break;
      }
      std::memcpy(d, &accumulator.values[static_cast<size_t>(lane * own)], static_cast<size_t>(own) * 4);
    }
    accumulator.d[0] = nullptr;
  }
  state.issued.erase(state.issued.begin(), state.issued.begin() + static_cast<std::ptrdiff_t>(done));
  state.done = std::max(state.done, group);
}

}  // namespace

void wgmma_fence(const char* file, int line) {
  Thread& self = *current;
  const char* const from = static_cast<const char*>(__builtin_frame_address(0));
  self.fenced_from = from;
  self.fenced.assign(from, const_cast<const char*>(self.stack) + kStackBytes);
  collective(Op::wgmma, nullptr, nullptr, file, line);
}

void emulator::wgmma(int product, int n, float* d, const uint32_t* a, uint64_t descriptor, bool accumulate,
                     const char* file, int line) {
  maybe_switch();
  Request mine{product, n, d, a, descriptor, accumulate, place_of(file, line)};
  collective(Op::wgmma, &mine, issue, file, line);
}

void wgmma_commit(const char* file, int line) {
  collective(
      Op::wgmma, nullptr,
      [](void* const(&)[32]) {
        Warp& warp = *current->warp;
        if (warp.block->threads % 128 != 0) return;
        WarpAsync& state = state_of(warp);
        ++state.committed;
        state.open = false;
        ++progress;
        // Other warps may wait for this one's quarter.
        const int first = warp.index / kWarpsInGroup * kWarpsInGroup;
        for (int i = first; i < first + kWarpsInGroup; ++i)
          for (Thread* thread : warp.block->warp[static_cast<size_t>(i)].threads)
            if (thread->wait == Wait::wgmma) wake(*thread);
      },
      file, line);
}

void emulator::wgmma_wait(int pending, const char* file, int line) {
  maybe_switch();
  Thread& self = *current;
  Warp& warp = *self.warp;
  const Place place = place_of(file, line);
  collective(Op::wgmma, nullptr, nullptr, file, line);
  if (warp.block->threads % 128 != 0) return;
  WarpAsync& state = state_of(warp);
  const uint32_t group = state.committed > static_cast<uint32_t>(pending) ? state.committed - static_cast<uint32_t>(pending) : 0;
  const int first = warp.index / kWarpsInGroup * kWarpsInGroup;
  const auto all_issued = [&] {
    for (int i = first; i < first + kWarpsInGroup; ++i)
      if (warp.block->async->warp[static_cast<size_t>(i)].committed < group) return false;
    return true;
  };
  while (!all_issued()) wait(Wait::wgmma, place);
  if (state.done < group) finish(warp, group, place);
  learn(self, agent_of(warp), group);
}

void emulator::setmaxnreg(int registers, bool up, const char* file, int line) {
  struct Ask {
    int registers;
    bool up;
    Place place;
  } mine{registers, up, place_of(file, line)};
  collective(
      Op::setmaxnreg, &mine,
      [](void* const(&all)[32]) {
        const Ask& ask = *static_cast<Ask*>(all[0]);
        Warp& warp = *current->warp;
        Block& block = *warp.block;
        WarpAsync& state = state_of(warp);
        if (options.capability != 90)
          fault("capability", ask.place, text("no setmaxnreg on sm_%d", options.capability));
        if (ask.up ? ask.registers < state.registers : ask.registers > state.registers)
          fault("registers", ask.place,
                text("%s to %d, and the warp has %d a thread", ask.up ? "up" : "down", ask.registers, state.registers));
        if (block.threads % 128 == 0 && warp.index / kWarpsInGroup < kWarpgroups) {
          auto& said = block.async->said_registers[warp.index / kWarpsInGroup];
          const size_t count = state.registers_count++;
          if (count == said.size())
            said.push_back(ask.registers);
          else if (said[count] != ask.registers)
            fault("divergence", ask.place,
                  text("setmaxnreg to %d, and to %d in another warp of the warpgroup", ask.registers, said[count]));
        }
        const auto free = [&] {
          int used = 0;
          for (const WarpAsync& one : block.async->warp) used += one.registers * 32;
          return (64 << 10) - used;
        };
        while (free() < (ask.registers - state.registers) * 32) wait(Wait::registers, ask.place);
        state.registers = ask.registers;
        state.registers_place = ask.place;
        ++progress;
        for (Warp& other : block.warp)
          for (Thread* thread : other.threads)
            if (thread->wait == Wait::registers) wake(*thread);
      },
      file, line);
}

namespace emulator {

void begin_block_wgmma(Block& block) {
  auto& warps = block.async->warp;
  warps.resize(static_cast<size_t>(block.threads / 32));
  for (WarpAsync& state : warps) {
    state.issued.clear();
    for (Accumulator& accumulator : state.accumulators) {
      accumulator.in_flight = 0;
      accumulator.d[0] = nullptr;
    }
    state.committed = state.done = state.count = 0;
    state.open = false;
    state.registers_count = 0;
    state.registers_place = 0;
    state.registers = std::min(255, (64 << 10) / block.threads / 8 * 8);
  }
  for (auto& said : block.async->said) said.clear();
  for (auto& said : block.async->said_registers) said.clear();
  for (Thread& thread : block.thread) thread.fenced_from = nullptr;
}

void end_block_wgmma(Block& block) {
  if (block.live != 0) return;
  const auto& warps = block.async->warp;
  for (size_t i = 0; i < warps.size() && warps.size() % kWarpsInGroup == 0; ++i) {
    if (warps[i].registers_count == warps[i - i % kWarpsInGroup].registers_count) continue;
    fault("divergence", warps[i].registers_place ? warps[i].registers_place : warps[i - i % kWarpsInGroup].registers_place,
          text("setmaxnreg %zu times in warp %zu, and %zu times in the first of its warpgroup", warps[i].registers_count,
               i, warps[i - i % kWarpsInGroup].registers_count));
  }
  for (const WarpAsync& state : warps) {
    if (state.issued.empty()) continue;
    fault("in flight", state.issued.front().place, text("block %d ended and did not wait for this wgmma", block.number));
  }
}

}  // namespace emulator

}  // namespace inq::cuda
