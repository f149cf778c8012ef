// What a module of emulated kernels (bind_<family>.cpp) exports beside its operators: bind(m).
#pragma once

#include <cstdint>
#include <string>

#include "engine.h"

namespace inq::cuda::emulator {

extern std::vector<Fault> faults;
extern std::vector<Buffer> buffers;
void reset(uint64_t seed);
void add_buffer(const std::string& name, uintptr_t begin, int64_t bytes, bool writable, bool initialised, int granule);
void forget_buffers(uintptr_t begin, int64_t bytes);  // those that have some of these bytes
void clear_buffers();

}  // namespace inq::cuda::emulator

#if defined(PYBIND11_VERSION_MAJOR)

namespace inq::cuda::emulator {

// tests/support_emulator.py calls these.
inline void bind(pybind11::module_& m) {
  m.def("_reset", &reset);
  m.def("_add_buffer", &add_buffer);
  m.def("_clear_buffers", &clear_buffers);
  m.def("_option", [](const std::string& name, double value) {
    if (name == "processors") options.processors = static_cast<int>(value);
    else if (name == "capability") options.capability = static_cast<int>(value);
    else if (name == "resident") options.resident = static_cast<int>(value);
    else if (name == "capacity") options.capacity = static_cast<int>(value);
    else if (name == "short_accumulator") options.short_accumulator = value != 0;
    else if (name == "seconds") options.seconds = value;
    else throw std::invalid_argument("no such option: " + name);
  });
  m.def("_traffic", [] {
    pybind11::dict all;
    for (const Buffer& b : buffers) all[pybind11::str(b.name)] = pybind11::make_tuple(b.read, b.written);
    return all;
  });
  m.def("_faults", [] {
    pybind11::list list;
    for (const Fault& f : faults)
      list.append(pybind11::make_tuple(f.kind, f.file, f.line, f.block, f.thread, f.count, f.detail));
    return list;
  });
}

// A pointer to a tensor's data: torch.Tensor.data_ptr(), or 0.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace inq::cuda::emulator

#endif
