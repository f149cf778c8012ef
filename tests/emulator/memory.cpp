// Every access of memory: where it may go, whether what it reads was written, and whether others are ordered before it.
#include <sys/mman.h>

#include "bind.h"
#include "clocks.h"
#include "engine.h"

namespace inq::cuda::emulator {

std::vector<Buffer> buffers;

namespace {

size_t latest = 0;

constexpr uint64_t kBefore = uint64_t{0xFFF} << 52;  // an epoch of a launch that never was, before all others
constexpr size_t kMostWords = 64 << 20;  // buffers of more are not watched for races

const char* verb(Do what) {
  return what == Do::read ? "read" : what == Do::write ? "write" : "atomic";
}

void race(Thread& thread, Place place, Do what, Place other, const char* before, uint32_t who) {
  const uint32_t t = who >> kClockBits;
  const bool agent = t >= static_cast<uint32_t>(thread.block->threads);
  fault("race", place,
        text("%s by thread %d of block %d is not ordered after the %s by %s %u at %s", verb(what), thread.index,
             thread.block->number, before, agent ? "asynchronous agent" : "thread", t, name_of(other).c_str()));
}

void record_read(Thread& thread, Cell& cell, Place place) {
  const uint32_t now = epoch(thread);
  int at = -1;
  for (int i = 0; i < 3; ++i) {
    // A reader that this one comes behind need not be kept.
    if (cell.read[i] == 0 || ordered(thread, cell.read[i])) {
      if (at < 0) {
        at = i;
      } else {
        cell.read[i] = 0;
      }
    }
  }
  if (at < 0) {
    const uint32_t warp = now >> (kClockBits + 5);
    for (int i = 0; i < 3; ++i)
      if (cell.read[i] >> (kClockBits + 5) == warp) at = i;
    if (at < 0) at = static_cast<int>(random_below(3));
  }
  cell.read[at] = now;
  cell.read_place[at] = place;
}

// Whether what the cell holds may be read or replaced.
bool check_cell(Thread& thread, const Cell& cell, uint8_t mask, Do what, Place place) {
  if (cell.flags & kPending) {
    fault("race", place,
          text("%s by thread %d of block %d of bytes that the asynchronous copy at %s may still write", verb(what),
               thread.index, thread.block->number, name_of(cell.write_place).c_str()));
    return false;
  }
  if (cell.flags & kMbarrier) {
    fault("mbarrier", place,
          text("%s by thread %d of block %d of the mbarrier made at %s", verb(what), thread.index,
               thread.block->number, name_of(cell.write_place).c_str()));
    return false;
  }
  const bool atomics = what == Do::atomic && (cell.flags & kAtomic);
  if (what != Do::write && (cell.written & mask) != mask)
    fault("uninitialised", place,
          text("%s of shared memory that nobody has written, thread %d of block %d", verb(what), thread.index,
               thread.block->number));
  if (cell.write != 0 && !atomics && !ordered(thread, cell.write))
    race(thread, place, what, cell.write_place, "write", cell.write);
  return true;
}

void touch_cell(Thread& thread, Cell& cell, uint8_t mask, Do what, Place place) {
  if (!check_cell(thread, cell, mask, what, place)) return;
  if (what == Do::read) return record_read(thread, cell, place);
  for (int i = 0; i < 3; ++i) {
    if (cell.read[i] == 0) continue;
    if (!ordered(thread, cell.read[i])) race(thread, place, what, cell.read_place[i], "read", cell.read[i]);
    cell.read[i] = 0;
  }
  cell.write = epoch(thread);
  cell.write_place = place;
  cell.written |= mask;
  cell.flags = static_cast<uint8_t>((cell.flags & kByBytes) | kGeneric | (what == Do::atomic ? kAtomic : 0));
}

Cell* bytes_of(Block& block, size_t word) {
  Cell& cell = block.cells[word];
  Cell* const bytes = &block.byte_cells[4 * word];
  if (!(cell.flags & kByBytes)) {
    cell.flags |= kByBytes;
    for (int i = 0; i < 4; ++i) {
      bytes[i] = cell;
      bytes[i].flags &= static_cast<uint8_t>(~kByBytes);
      bytes[i].written = cell.written >> i & 1 ? 0xF : 0;
    }
  }
  return bytes;
}

}  // namespace

template <class Touch>
void each_cell(Block& block, size_t offset, int bytes, Touch touch) {
  if (bytes >= 4) {
    for (size_t word = offset / 4, end = (offset + static_cast<size_t>(bytes) + 3) / 4; word < end; ++word) {
      if (block.cells[word].flags & kByBytes) {
        for (int i = 0; i < 4; ++i) touch(block.byte_cells[4 * word + static_cast<size_t>(i)]);
      } else {
        touch(block.cells[word]);
      }
    }
  } else {
    for (int i = 0; i < bytes; ++i) {
      const size_t at = offset + static_cast<size_t>(i);
      touch(bytes_of(block, at / 4)[at % 4]);
    }
  }
}

bool in_shared(const Block& block, const void* p) {
  const char* const at = static_cast<const char*>(p);
  return at >= block.memory && at < block.shared + (228 << 10);
}

void begin_block_memory(Block& block) {
  const size_t words = (static_cast<size_t>(block.shared_bytes) + 3) / 4;
  std::memset(block.shared, 0xFF, static_cast<size_t>(block.shared_bytes));  // not a number, in every format
  if (block.cells.size() < words) {
    block.cells.resize(words);
    block.byte_cells.resize(4 * words);
  }
  if (words > 0) std::memset(block.cells.data(), 0, words * sizeof(Cell));
}

namespace {

bool in_bounds_shared(Thread& thread, const void* p, int bytes, const char* what, Place place) {
  Block& block = *thread.block;
  const int64_t offset = static_cast<const char*>(p) - block.shared;
  if (offset >= 0 && offset + bytes <= block.shared_bytes) return true;
  if (in_shared(block, p))
    fault("shared bounds", place,
          text("%s of %d bytes at offset %lld of the block's %d bytes of shared memory, thread %d", what, bytes,
               static_cast<long long>(offset), block.shared_bytes, thread.index));
  else
    fault("shared bounds", place, text("%s of %d bytes: not an address of shared memory", what, bytes));
  return false;
}

}  // namespace

bool touch_shared(Thread& thread, const void* p, int bytes, Do what, Place place) {
  if (!in_bounds_shared(thread, p, bytes, verb(what), place)) return false;
  Block& block = *thread.block;
  each_cell(block, static_cast<size_t>(static_cast<const char*>(p) - block.shared), bytes,
            [&](Cell& cell) { touch_cell(thread, cell, 0xF, what, place); });
  return true;
}

bool issue_copy(Thread& thread, char* shared, int bytes, Place place) {
  if (!in_bounds_shared(thread, shared, bytes, "asynchronous write", place)) return false;
  Block& block = *thread.block;
  each_cell(block, static_cast<size_t>(shared - block.shared), bytes, [&](Cell& cell) {
    touch_cell(thread, cell, 0xF, Do::write, place);
    cell.flags |= kPending;
  });
  return true;
}

void land_copy(Thread& thread, char* shared, int bytes, Place) {
  Block& block = *thread.block;
  const uint32_t now = epoch(thread);
  each_cell(block, static_cast<size_t>(shared - block.shared), bytes, [&](Cell& cell) {
    cell.flags &= static_cast<uint8_t>(~kPending);
    cell.write = now;
  });
}

void mark_mbarrier(Block& block, const void* p) {
  each_cell(block, static_cast<size_t>(static_cast<const char*>(p) - block.shared), 8,
            [](Cell& cell) { cell.flags |= kMbarrier; });
}

namespace {

// Whether the async proxy sees what a thread wrote last: a fence by the writer, or by the thread that asks, between.
bool seen_by_async_proxy(const Thread& thread, const Cell& cell) {
  if (!(cell.flags & kGeneric) || cell.write == 0) return true;
  const uint32_t who = cell.write >> kClockBits, time = cell.write & ((1u << kClockBits) - 1);
  if (thread.at_proxy_fence != nullptr && thread.at_proxy_fence->time[who] >= time) return true;
  const Thread& writer = thread.block->thread[who];
  const auto fence = std::lower_bound(writer.proxy_fences.begin(), writer.proxy_fences.end(), time);
  return fence != writer.proxy_fences.end() && (&writer == &thread || thread.known->time[who] >= *fence);
}

void check_proxy(const Thread& thread, const Cell& cell, Place place) {
  if (!seen_by_async_proxy(thread, cell))
    fault("proxy fence", place,
          text("thread %u wrote these bytes at %s, and no proxy_fence came between", cell.write >> kClockBits,
               name_of(cell.write_place).c_str()));
}

}  // namespace

bool issue_bulk(Thread& thread, char* shared, int bytes, Place place) {
  if (!in_bounds_shared(thread, shared, bytes, "asynchronous write", place)) return false;
  Block& block = *thread.block;
  each_cell(block, static_cast<size_t>(shared - block.shared), bytes, [&](Cell& cell) {
    if (!(cell.flags & kPending)) check_proxy(thread, cell, place);
    touch_cell(thread, cell, 0xF, Do::write, place);
    cell.flags = static_cast<uint8_t>((cell.flags & ~kGeneric) | kPending);
  });
  return true;
}

void land_bulk(Block& block, char* shared, int bytes, uint32_t landed) {
  each_cell(block, static_cast<size_t>(shared - block.shared), bytes, [&](Cell& cell) {
    cell.flags &= static_cast<uint8_t>(~kPending);
    cell.write = landed;
  });
}

bool read_async(Thread& thread, int64_t offset, int bytes, int agent, uint32_t time, Place place) {
  Block& block = *thread.block;
  const char* const at = block.shared + offset;
  if (!in_bounds_shared(thread, at, bytes, "wgmma's read", place)) return false;
  const uint32_t mine = epoch(agent, time);
  each_cell(block, static_cast<size_t>(offset), bytes, [&](Cell& cell) {
    check_cell(thread, cell, 0xF, Do::read, place);
    check_proxy(thread, cell, place);
    // Before others' reads: it is the last to end.
    int to = 0;
    for (int i = 0; i < 3; ++i)
      if (cell.read[i] == 0 || cell.read[i] >> kClockBits == static_cast<uint32_t>(agent)) to = i;
    cell.read[to] = mine;
    cell.read_place[to] = place;
  });
  return true;
}

// --- global memory ------------------------------------------------------------------------------------------------------

Buffer* find_buffer(const void* p, int64_t bytes) {
  const char* const at = static_cast<const char*>(p);
  const auto holds = [&](const Buffer& b) { return at >= b.begin && at + bytes <= b.end; };
  if (latest < buffers.size() && holds(buffers[latest])) return &buffers[latest];
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (holds(buffers[i])) {
      latest = i;
      return &buffers[i];
    }
  }
  return nullptr;
}

namespace {

void out_of_bounds(const void* p, int64_t bytes, const char* what, Place place) {
  const char* const at = static_cast<const char*>(p);
  const Buffer* near = nullptr;
  int64_t distance = INT64_MAX;
  for (const Buffer& b : buffers) {
    const int64_t d = at < b.begin ? b.begin - at : at + bytes - b.end;
    if (d < distance) {
      distance = d;
      near = &b;
    }
  }
  std::string where = "there is no buffer";
  if (p == nullptr) {
    where = "a null pointer";
  } else if (current != nullptr && in_shared(*current->block, p)) {
    where = "an address of shared memory";
  } else if (near != nullptr) {
    where = text("offset %lld of '%s', which has %lld bytes", static_cast<long long>(at - near->begin),
                 near->name.c_str(), static_cast<long long>(near->end - near->begin));
  }
  fault("global bounds", place, text("%s of %lld bytes: %s", what, static_cast<long long>(bytes), where.c_str()));
}

void wide_race(Thread& thread, Place place, Do what, Place other, const char* before, uint64_t who,
               const Buffer& buffer) {
  fault("race", place,
        text("%s of '%s' by thread %d of block %d is not ordered after the %s by thread %d of block %d at %s",
             verb(what), buffer.name.c_str(), thread.index, thread.block->number, before,
             static_cast<int>(static_cast<uint32_t>(who) >> kClockBits), static_cast<int>(who >> 32 & 0xFFFFF),
             name_of(other).c_str()));
}

void touch_word(Thread& thread, Buffer& buffer, Buffer::Word& word, Do what, Place place) {
  const bool atomics = what == Do::atomic && (word.flags & kAtomic);
  if (word.write == 0) {
    if (what != Do::write && !buffer.initialised)
      fault("uninitialised", place,
            text("%s of '%s' where nobody has written, thread %d of block %d", verb(what), buffer.name.c_str(),
                 thread.index, thread.block->number));
  } else if (!atomics && !wide_ordered(thread, word.write)) {
    wide_race(thread, place, what, word.write_place, "write", word.write, buffer);
  }
  if (what == Do::read) {
    // One reader is kept; it is replaced by one that comes behind it, or by chance.
    if (word.read == 0 || wide_ordered(thread, word.read) || random_below(2) == 0) {
      word.read = wide_epoch(thread);
      word.read_place = place;
    }
    return;
  }
  if (word.read != 0 && !wide_ordered(thread, word.read))
    wide_race(thread, place, what, word.read_place, "read", word.read, buffer);
  word.read = 0;
  word.write = wide_epoch(thread);
  word.write_place = place;
  word.flags = what == Do::atomic ? kAtomic : 0;
}

}  // namespace

bool touch_global(Thread& thread, const void* p, int64_t bytes, Do what, Place place) {
  Buffer* const buffer = find_buffer(p, bytes);
  if (buffer == nullptr) {
    out_of_bounds(p, bytes, verb(what), place);
    return false;
  }
  if (what != Do::read) {
    if (!buffer->writable) {
      fault("read-only", place, text("%s to '%s', which is only read", verb(what), buffer->name.c_str()));
      return false;
    }
    ++progress;
    buffer->written += bytes;
  }
  if (what != Do::write) buffer->read += bytes;
  if (buffer->words == nullptr) return true;
  const int64_t first = (static_cast<const char*>(p) - buffer->begin) / buffer->granule;
  if (bytes < buffer->granule) {  // not watched for races: others may own the rest of the word
    Buffer::Word& word = buffer->words[first];
    if (what != Do::read)
      word = {kBefore, 0, place, 0, 0};
    else if (word.write == 0)
      touch_word(thread, *buffer, word, what, place);
  } else {
    const int64_t end = first + bytes / buffer->granule;
    for (int64_t i = first; i < end; ++i) touch_word(thread, *buffer, buffer->words[i], what, place);
  }
  return true;
}

void check_constant(Thread& thread, const void* p, int64_t bytes, Place place, const char* kind, const char* what) {
  Buffer* const buffer = find_buffer(p, bytes);
  if (buffer == nullptr || buffer->words == nullptr) return;
  const int64_t first = (static_cast<const char*>(p) - buffer->begin) / buffer->granule;
  for (int64_t i = first; i < first + bytes / buffer->granule; ++i) {
    const uint64_t write = buffer->words[i].write;
    if (write == 0 || write >> 52 != wide_epoch(thread) >> 52) continue;
    fault(kind, place,
          text("%s '%s', which this kernel has written at %s", what, buffer->name.c_str(),
               name_of(buffer->words[i].write_place).c_str()));
    return;
  }
}

void read_global_async(Thread& thread, const void* p, int64_t bytes, int agent, uint32_t time, Place place) {
  Buffer* const buffer = find_buffer(p, bytes);
  if (buffer == nullptr || buffer->words == nullptr) return;
  const uint64_t now = (wide_epoch(thread) & ~uint64_t{0xFFFFFFFF}) | epoch(agent, time);
  const int64_t first = (static_cast<const char*>(p) - buffer->begin) / buffer->granule;
  for (int64_t i = first; i < first + bytes / buffer->granule; ++i) {
    buffer->words[i].read = now;
    buffer->words[i].read_place = place;
  }
}

uint64_t fingerprint(const void* p, int64_t bytes) {
  const Buffer* const buffer = find_buffer(p, bytes);
  if (buffer == nullptr || !buffer->writable) return 0;
  uint64_t hash = 0xCBF29CE484222325ull;
  for (int64_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(p)[i]) * 0x100000001B3ull;
  return hash;
}

void add_buffer(const std::string& name, uintptr_t begin, int64_t bytes, bool writable, bool initialised,
                int granule) {
  Buffer buffer;
  buffer.name = name;
  buffer.begin = reinterpret_cast<char*>(begin);
  buffer.end = buffer.begin + bytes;
  buffer.writable = writable;
  buffer.initialised = initialised;
  buffer.granule = granule;
  const size_t words = static_cast<size_t>(bytes / granule) + 1;
  if (writable && words <= kMostWords) {
    void* const memory = std::calloc(words, sizeof(Buffer::Word));
    buffer.words = static_cast<Buffer::Word*>(memory);
  }
  buffers.push_back(buffer);
}

void forget_buffers(uintptr_t begin, int64_t bytes) {
  const char* const from = reinterpret_cast<const char*>(begin);
  std::erase_if(buffers, [&](const Buffer& b) {
    const bool gone = b.begin < from + bytes && from < b.end;
    if (gone) std::free(b.words);
    return gone;
  });
}

void clear_buffers() {
  for (Buffer& buffer : buffers) std::free(buffer.words);
  buffers.clear();
}

// --- what kernels call --------------------------------------------------------------------------------------------------

namespace {

bool aligned(const void* p, int bytes, const char* file, int line) {
  const bool fits = bytes <= 16 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) == 0;
  if (!fits)
    fault("alignment", file, line,
          text("%d bytes at an address of which the last bits are %d", bytes,
               static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15)));
  return fits;
}

}  // namespace

// Registers that may not be read yet, as long as nothing has rounded them to fewer bits.
static void check_value(const void* from, int bytes, Place place) {
  for (int i = 0; i + 4 <= bytes; i += 4) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(from) + i, 4);
    if ((word | kQuiet) == (kInFlight | kQuiet))
      fault("wgmma registers", place, text("thread %d stores a sum that no wgmma_wait has waited for", current->index));
    if (word == kUnwritten)
      fault("unwritten register", place, text("thread %d stores what nothing has written", current->index));
  }
}

void load(Space space, void* to, const void* from, int bytes, const char* file, int line) {
  maybe_switch();
  const Place place = current->place = place_of(file, line);
  const bool fine = aligned(from, bytes, file, line) &&
                    (space == Space::shared ? touch_shared(*current, from, bytes, Do::read, place)
                                            : touch_global(*current, from, bytes, Do::read, place));
  if (fine)
    std::memcpy(to, from, static_cast<size_t>(bytes));
  else
    std::memset(to, 0xFF, static_cast<size_t>(bytes));
}

void store(Space space, void* to, const void* from, int bytes, const char* file, int line) {
  maybe_switch();
  const Place place = current->place = place_of(file, line);
  const bool fine = aligned(to, bytes, file, line) &&
                    (space == Space::shared ? touch_shared(*current, to, bytes, Do::write, place)
                                            : touch_global(*current, to, bytes, Do::write, place));
  if (!fine) return;
  check_value(from, bytes, place);
  std::memcpy(to, from, static_cast<size_t>(bytes));
  if (space == Space::global && bytes == 4) value_changed(static_cast<const int*>(to));
}

bool begin_atomic(void* p, int bytes, const char* file, int line) {
  maybe_switch();
  const Place place = current->place = place_of(file, line);
  if (!aligned(p, bytes, file, line)) return false;
  const bool shared = in_shared(*current->block, p);
  if (!(shared ? touch_shared(*current, p, bytes, Do::atomic, place)
               : touch_global(*current, p, bytes, Do::atomic, place)))
    return false;
  observe_relaxed(*current, p);
  publish_relaxed(*current, p);
  return true;
}

void end_atomic(void* p, int bytes) {
  if (bytes == 4) value_changed(static_cast<const int*>(p));
}

}  // namespace inq::cuda::emulator

namespace inq::cuda {

using namespace emulator;

Four ld_global_once(const Four* p, const char* file, int line) {
  const Four value = ld_global(p, file, line);
  check_constant(*current, p, sizeof value, place_of(file, line), "race", "ld_global_once of");
  return value;
}

int ld_acquire(const int* p, const char* file, int line) {
  Thread& self = *current;
  const Place place = place_of(file, line);
  if (!aligned(p, 4, file, line)) return 0;
  Buffer* const buffer = find_buffer(p, 4);
  if (buffer == nullptr) return touch_global(self, p, 4, Do::read, place), 0;
  // The same value twice: it waits for another one.
  if (self.spins_on == p && self.spin_value == *p)
    wait(Wait::value, place);
  else
    yield();
  // As an atomic that leaves the value.
  if (buffer->words != nullptr && buffer->granule == 4) {
    Buffer::Word& word = buffer->words[(reinterpret_cast<const char*>(p) - buffer->begin) / 4];
    if (word.write != 0 && !(word.flags & kAtomic) && !wide_ordered(self, word.write))
      wide_race(self, place, Do::atomic, word.write_place, "write", word.write, *buffer);
  }
  observe(self, p);
  self.spins_on = p;
  return self.spin_value = *p;
}

void red_release(int* p, int value, const char* file, int line) {
  if (!begin_atomic(p, 4, file, line)) return;
  publish(*current, p);
  *p += value;
  end_atomic(p, 4);
}

void thread_fence() { fence(*current); }

}  // namespace inq::cuda

using inq::cuda::emulator::submitting;

namespace {

bool whole(const void* p, size_t bytes, bool write, const char* file, int line) {
  using namespace inq::cuda::emulator;
  Buffer* const buffer = find_buffer(p, static_cast<int64_t>(bytes));
  if (buffer == nullptr) {
    fault("global bounds", file, line, text("%zu bytes that no buffer has", bytes));
    return false;
  }
  if (write && !buffer->writable) {
    fault("read-only", file, line, text("'%s' is only read", buffer->name.c_str()));
    return false;
  }
  if (write && buffer->words != nullptr) {
    const size_t granule = static_cast<size_t>(buffer->granule);
    const size_t first = static_cast<size_t>(static_cast<const char*>(p) - buffer->begin) / granule;
    for (size_t i = first; i < first + bytes / granule; ++i) buffer->words[i] = {uint64_t{0xFFF} << 52, 0, 0, 0, 0};
  }
  return true;
}

}  // namespace

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream, const char* file, int line) {
  if (submitting != nullptr && submitting(stream, file, line) != cudaSuccess) return cudaErrorLaunchFailure;
  if (bytes > 0 && whole(p, bytes, true, file, line)) std::memset(p, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t stream, const char* file,
                            int line) {
  if (submitting != nullptr && submitting(stream, file, line) != cudaSuccess) return cudaErrorLaunchFailure;
  if (bytes > 0 && whole(from, bytes, false, file, line) && whole(to, bytes, true, file, line))
    std::memcpy(to, from, bytes);
  return cudaSuccess;
}
