// Scratch memory of one call: aligned to a cache line, freed at the end of its scope. Its size is bounded by the plan's
// blocks, and malloc hands the same pages out again call after call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace inq::cpu {

constexpr size_t kCacheLine = 64;

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + kCacheLine - 1) / kCacheLine;
    data_.reset(static_cast<T*>(std::aligned_alloc(kCacheLine, bytes * kCacheLine)));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace inq::cpu
