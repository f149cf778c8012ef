// emulated_dense: decode_dense, finish_sums, upload.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "dense.h"
#include "upload.h"

namespace py = pybind11;
using namespace inq::cuda;
using inq::cuda::emulator::pointer;

PYBIND11_MODULE(emulated_dense, m) {
  emulator::bind(m);
  m.def("decode", [](uintptr_t weight, uintptr_t out, int64_t n, int64_t k, int number, int levels) {
    return static_cast<int>(decode_dense({pointer<const uint8_t>(weight), pointer<uint16_t>(out), n, k,
                                          static_cast<Number>(number), static_cast<Levels>(levels)},
                                         nullptr));
  });
  m.def("finish", [](uintptr_t sums, uintptr_t weight_exp, uintptr_t weight_scale, uintptr_t bias, uintptr_t out,
                     int64_t rows, int64_t n, int exponent, int bias_type, int out_type) {
    return static_cast<int>(finish_sums(
        {pointer<const float>(sums), pointer<const int8_t>(weight_exp), pointer<const float>(weight_scale),
         pointer<const void>(bias), pointer<void>(out), rows, n, exponent, static_cast<Float>(bias_type),
         static_cast<Float>(out_type)},
        nullptr));
  });
  m.def("upload", [](uintptr_t to, const std::string& bytes) {
    return static_cast<int>(upload(pointer<void>(to), bytes.data(), static_cast<int64_t>(bytes.size()), nullptr));
  });
}
