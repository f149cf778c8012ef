// What happens later: cp.async, bulk copies and TMA with their mbarriers.
#include "async.h"

#include "tensor_map.h"

namespace inq::cuda {

using namespace emulator;

void emulator::cp_async(void* shared, const void* global, int bytes, bool valid, const char* file, int line) {
  maybe_switch();
  Thread& self = *current;
  const Place place = place_of(file, line);
  if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) %
          static_cast<unsigned>(bytes) !=
      0) {
    fault("alignment", place, text("cp.async of %d bytes between addresses that are no multiples of it", bytes));
    return;
  }
  if (valid && !touch_global(self, global, bytes, Do::read, place)) return;
  if (!issue_copy(self, static_cast<char*>(shared), bytes, place)) return;
  self.copies.push_back({static_cast<char*>(shared), global, bytes, valid, self.copy_groups, place,
                         valid ? fingerprint(global, bytes) : 0});
}

void cp_async_commit() { ++current->copy_groups; }

// As late as may be: here.
void emulator::cp_async_wait(int pending) {
  Thread& self = *current;
  size_t landed = 0;
  for (; landed < self.copies.size() && self.copies[landed].group < self.copy_groups - pending; ++landed) {
    const Copy& copy = self.copies[landed];
    if (copy.valid && fingerprint(copy.global, copy.bytes) != copy.source)
      fault("race", copy.place, "what this copy reads was written before it was waited for");
    if (copy.valid)
      std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    else
      std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
    land_copy(self, copy.shared, copy.bytes, copy.place);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

// --- mbarriers ----------------------------------------------------------------------------------------------------------

namespace {

bool eager = false;  // this launch's copies may land before anyone waits for them

int agent(const Block& block, int mbarrier) { return block.threads + mbarrier; }

// Its number in the block, or -1.
int find(const Mbarrier* b, Place place) {
  Thread& self = *current;
  Block& block = *self.block;
  const auto offset = static_cast<uint32_t>(reinterpret_cast<const char*>(b) - block.shared);
  auto& all = block.async->mbarriers;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].offset != offset) continue;
    if (!ordered(self, all[i].made))
      fault("race", place,
            text("the mbarrier is used by thread %d, which is not ordered after mbarrier_init at %s", self.index,
                 name_of(all[i].place).c_str()));
    return static_cast<int>(i);
  }
  fault("mbarrier", place, "there is no mbarrier: mbarrier_init was not called for this address");
  return -1;
}

void complete_if_done(Block& block, int number) {
  MbarrierState& b = block.async->mbarriers[static_cast<size_t>(number)];
  if (b.missing != 0 || b.bytes != 0) return;
  ++b.phase;
  ++progress;
  b.missing = b.arrivals;
  drop(b.complete);
  b.complete = b.gathering;
  b.gathering = nullptr;
  if (b.complete != nullptr) b.complete->time[static_cast<size_t>(agent(block, number))] = b.phase;
  std::vector<Thread*> waiting;
  for (Thread* thread : b.waiting) {
    if (static_cast<int>(b.phase & 1) == thread->barrier) {
      waiting.push_back(thread);
      continue;
    }
    wake(*thread);
  }
  b.waiting = std::move(waiting);
}

void arrived(int number, int64_t bytes, Place place) {
  Block& block = *current->block;
  MbarrierState& b = block.async->mbarriers[static_cast<size_t>(number)];
  b.bytes += bytes;
  if (b.missing == 0) {
    fault("mbarrier", place, text("more than the %d arrivals of a phase", b.arrivals));
    return;
  }
  --b.missing;
  arrive(*current, b.gathering);
  complete_if_done(block, number);
}

}  // namespace

void mbarrier_init(Mbarrier* b, int arrivals, const char* file, int line) {
  Thread& self = *current;
  Block& block = *self.block;
  const Place place = place_of(file, line);
  if (reinterpret_cast<uintptr_t>(b) % 8 != 0) return fault("alignment", place, "an mbarrier takes 8 bytes, aligned");
  if (options.capability < 90) fault("capability", place, text("no mbarrier on sm_%d here", options.capability));
  if (arrivals < 1) return fault("mbarrier", place, text("%d arrivals", arrivals));
  if (!touch_shared(self, b, 8, Do::write, place)) return;
  auto& all = block.async->mbarriers;
  const auto offset = static_cast<uint32_t>(reinterpret_cast<char*>(b) - block.shared);
  MbarrierState* state = nullptr;
  for (MbarrierState& one : all)
    if (one.offset == offset) state = &one;
  if (state == nullptr) {
    if (all.size() == kMbarriers) return fault("mbarrier", place, text("the emulator has %d a block", kMbarriers));
    state = &all.emplace_back();
    state->offset = offset;
  } else {
    fault("mbarrier", place, "initialised a second time");
  }
  mark_mbarrier(block, b);
  state->arrivals = state->missing = arrivals;
  state->made = epoch(self);
  state->maker = &self;
  state->place = place;
}

void mbarrier_init_fence() {
  for (MbarrierState& b : current->block->async->mbarriers)
    if (b.maker == current) b.fenced = true;
}

void mbarrier_arrive(Mbarrier* b, const char* file, int line) {
  maybe_switch();
  const Place place = place_of(file, line);
  const int number = find(b, place);
  if (number >= 0) arrived(number, 0, place);
}

void mbarrier_arrive_expect(Mbarrier* b, int bytes, const char* file, int line) {
  maybe_switch();
  const Place place = place_of(file, line);
  const int number = find(b, place);
  if (number < 0) return;
  if (bytes < 0 || bytes >= 1 << 20) fault("mbarrier", place, text("%d bytes expected: at most 2^20 - 1", bytes));
  arrived(number, bytes, place);
}

void mbarrier_wait(Mbarrier* b, int parity, const char* file, int line) {
  maybe_switch();
  Thread& self = *current;
  const Place place = place_of(file, line);
  const int number = find(b, place);
  if (number < 0) return give_up();
  if (parity != 0 && parity != 1) return fault("mbarrier", place, text("a parity of %d", parity));
  const auto state = [&]() -> MbarrierState& { return self.block->async->mbarriers[static_cast<size_t>(number)]; };
  // Who is woken looks again: if the next phase is over too, the parity is that of one to come, and a lap is lost.
  while (static_cast<int>(state().phase & 1) == parity) {
    self.barrier = parity;
    state().waiting.push_back(&self);
    wait(Wait::mbarrier, place);
  }
  acquire(self, state().complete);
}

std::string emulator::describe_mbarrier(const Thread& thread) {
  for (const MbarrierState& b : thread.block->async->mbarriers)
    if (std::find(b.waiting.begin(), b.waiting.end(), &thread) != b.waiting.end())
      return text(" (made at %s; for parity %d in its phase %u, %d of %d arrivals and %lld bytes missing)",
                  name_of(b.place).c_str(), thread.barrier, b.phase, b.missing, b.arrivals,
                  static_cast<long long>(b.bytes));
  return "";
}

// --- bulk copies --------------------------------------------------------------------------------------------------------

namespace {

bool multiples_of_16(const void* shared, const void* global, int bytes, int shared_alignment, Place place) {
  const bool fits = reinterpret_cast<uintptr_t>(shared) % static_cast<unsigned>(shared_alignment) == 0 &&
                    reinterpret_cast<uintptr_t>(global) % 16 == 0 && bytes % 16 == 0 && bytes > 0;
  if (!fits)
    fault("alignment", place,
          text("a bulk copy of %d bytes to shared address %u: needs multiples of 16, and of %d there", bytes,
               shared_address(shared), shared_alignment));
  return fits;
}

TensorMap2d plain(const TensorMap& map) {
  TensorMap2d description;
  std::memcpy(&description, &map, sizeof description);
  return description;
}

// Calls `row(address, bytes)` for what a copy reads of each row of its box, or once.
template <class Row>
void each_row(const Bulk& bulk, Row row) {
  if (!bulk.box) return row(bulk.global, static_cast<int64_t>(bulk.bytes));
  const TensorMap2d m = plain(bulk.map);
  const int64_t first = std::max<int64_t>(bulk.column, 0);
  const int64_t end = std::min<int64_t>(bulk.column + m.box_columns, m.columns);
  if (first >= end) return;
  for (int64_t r = std::max<int64_t>(bulk.row, 0); r < std::min<int64_t>(bulk.row + m.box_rows, m.rows); ++r)
    row(reinterpret_cast<const char*>(m.base) + r * m.row_stride_bytes + first * m.element_bytes,
        (end - first) * m.element_bytes);
}

void issue(Bulk bulk, Mbarrier* b) {
  Thread& self = *current;
  bool there = true;
  each_row(bulk, [&](const char* p, int64_t bytes) {
    there = there && touch_global(self, p, bytes, Do::read, bulk.place);
    // proxy_fence is for shared memory.
    if (there) check_constant(self, p, bytes, bulk.place, "proxy fence", "a bulk copy of");
  });
  if (!there) return;
  const int number = find(b, bulk.place);
  if (number < 0 || !issue_bulk(self, bulk.shared, bulk.bytes, bulk.place)) return;
  const MbarrierState& state = self.block->async->mbarriers[static_cast<size_t>(number)];
  if (!state.fenced)
    fault("proxy fence", bulk.place,
          text("mbarrier_init at %s was not followed by mbarrier_init_fence", name_of(state.place).c_str()));
  // Who has not waited for the mbarrier may not write what is copied.
  each_row(bulk, [&](const char* p, int64_t bytes) {
    read_global_async(self, p, bytes, agent(*self.block, number), state.phase + 1, bulk.place);
  });
  bulk.mbarrier = number;
  self.block->async->bulks.push_back(bulk);
}

void land(Block& block, size_t which) {
  auto& bulks = block.async->bulks;
  const Bulk bulk = bulks[which];
  bulks.erase(bulks.begin() + static_cast<std::ptrdiff_t>(which));
  MbarrierState& b = block.async->mbarriers[static_cast<size_t>(bulk.mbarrier)];
  if (!bulk.box) {
    std::memcpy(bulk.shared, bulk.global, static_cast<size_t>(bulk.bytes));
  } else {
    const TensorMap2d map = plain(bulk.map);
    const int64_t size = map.element_bytes;
    const auto start = static_cast<uint32_t>(bulk.shared - block.shared);
    for (int64_t row = 0; row < map.box_rows; ++row) {
      for (int64_t column = 0; column < map.box_columns; ++column) {
        const auto at = static_cast<uint32_t>((row * map.box_columns + column) * size);
        // The window's first 1024 bytes are not the block's: a multiple of every pattern.
        char* const to = block.shared + swizzled(start + at, map.swizzle);
        const int64_t r = bulk.row + row, c = bulk.column + column;
        if (r >= 0 && r < map.rows && c >= 0 && c < map.columns)
          std::memcpy(to, reinterpret_cast<const char*>(map.base) + r * map.row_stride_bytes + c * size,
                      static_cast<size_t>(size));
        else
          std::memset(to, 0, static_cast<size_t>(size));
      }
    }
  }
  land_bulk(block, bulk.shared, bulk.bytes, epoch(agent(block, bulk.mbarrier), b.phase + 1));
  ++progress;
  b.bytes -= bulk.bytes;
  complete_if_done(block, bulk.mbarrier);
}

}  // namespace

void bulk_load(void* shared, const void* global, int bytes, Mbarrier* b, const char* file, int line) {
  maybe_switch();
  const Place place = place_of(file, line);
  if (!multiples_of_16(shared, global, bytes, 16, place)) return;
  Bulk bulk;
  bulk.shared = static_cast<char*>(shared);
  bulk.bytes = bytes;
  bulk.global = static_cast<const char*>(global);
  bulk.place = place;
  issue(bulk, b);
}

void tma_load_2d(void* shared, const TensorMap* map, int column, int row, Mbarrier* b, const char* file, int line) {
  maybe_switch();
  const Place place = place_of(file, line);
  const TensorMap2d m = plain(*map);
  if (m.magic != kTensorMapMagic) return fault("tensor map", place, "make_tensor_map_2d has not made it");
  const int64_t bytes = m.box_rows * m.box_columns * m.element_bytes;
  if (!multiples_of_16(shared, nullptr, static_cast<int>(bytes), 128, place)) return;
  Bulk bulk;
  bulk.shared = static_cast<char*>(shared);
  bulk.bytes = static_cast<int>(bytes);
  bulk.map = *map;
  bulk.box = true;
  bulk.column = column;
  bulk.row = row;
  bulk.place = place;
  issue(bulk, b);
}

void proxy_fence() {
  Thread& self = *current;
  self.proxy_fences.push_back(self.clock++);
  remember_proxy_fence(self);
}

namespace emulator {

bool deliver(Block& block) {
  auto& bulks = block.async->bulks;
  if (bulks.empty()) return false;
  land(block, random_below(static_cast<uint32_t>(bulks.size())));
  return true;
}

bool deliver_something(const std::vector<Block*>& blocks) {
  if (blocks.empty()) return false;
  const size_t first = random_below(static_cast<uint32_t>(blocks.size()));
  for (size_t i = 0; i < blocks.size(); ++i)
    if (deliver(*blocks[(first + i) % blocks.size()])) return true;
  return false;
}

void deliver_early(const std::vector<Block*>& blocks) {
  if (eager) deliver(*blocks[random_below(static_cast<uint32_t>(blocks.size()))]);
}

void begin_launch_async() { eager = random_below(3) == 0; }

void begin_block_async(Block& block) {
  if (block.async == nullptr) block.async = new Async;
  block.async->mbarriers.clear();
  block.async->bulks.clear();
  begin_block_wgmma(block);
}

void end_block_async(Block& block) {
  if (block.live == 0 && !block.async->bulks.empty()) {
    const Place place = block.async->bulks.front().place;
    fault("in flight", place, text("block %d ended before this copy had landed", block.number));
  }
  for (MbarrierState& b : block.async->mbarriers) {
    drop(b.gathering);
    drop(b.complete);
  }
  end_block_wgmma(block);
}

}  // namespace emulator

}  // namespace inq::cuda
