// emulated_storage: pack, unpack, prepack, unprepack.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;
using namespace inq::cuda;
using inq::cuda::emulator::pointer;

PYBIND11_MODULE(emulated_storage, m) {
  emulator::bind(m);
  m.def(
      "pack",
      [](uintptr_t w, uintptr_t n1, uintptr_t out, int64_t n, int64_t k, int bits, bool dense, int dtype) {
        const PackParams p{pointer<const void>(w), pointer<const int8_t>(n1), pointer<uint8_t>(out), n, k, {bits, dense}};
        return static_cast<int>(pack(p, {static_cast<DType>(dtype)}, nullptr));
      },
      py::kw_only(), py::arg("w"), py::arg("n1"), py::arg("out"), py::arg("n"), py::arg("k"), py::arg("bits"),
      py::arg("dense"), py::arg("dtype"));
  m.def(
      "unpack",
      [](uintptr_t codes, uintptr_t n1, uintptr_t scale, uintptr_t out, int64_t n, int64_t k, int bits, bool dense,
         int dtype) {
        const UnpackParams p{pointer<const uint8_t>(codes), pointer<const int8_t>(n1), pointer<const float>(scale),
                             pointer<void>(out), n, k, {bits, dense}};
        return static_cast<int>(unpack(p, {static_cast<DType>(dtype)}, nullptr));
      },
      py::kw_only(), py::arg("codes"), py::arg("n1"), py::arg("scale"), py::arg("out"), py::arg("n"), py::arg("k"),
      py::arg("bits"), py::arg("dense"), py::arg("dtype"));
  m.def(
      "prepack",
      [](uintptr_t codes, uintptr_t out, uintptr_t table, int64_t n, int64_t k, int bits, bool dense, int number,
         int levels) {
        const PrepackParams p{pointer<const uint8_t>(codes), pointer<uint8_t>(out), pointer<const uint32_t>(table), n, k,
                              {bits, dense}};
        return static_cast<int>(prepack(p, {static_cast<Number>(number), static_cast<Levels>(levels)}, nullptr));
      },
      py::kw_only(), py::arg("codes"), py::arg("out"), py::arg("table"), py::arg("n"), py::arg("k"), py::arg("bits"),
      py::arg("dense"), py::arg("number"), py::arg("levels"));
  m.def(
      "unprepack",
      [](uintptr_t fragments, uintptr_t codes, int64_t n, int64_t k, int bits, bool dense, int number, int levels) {
        const UnprepackParams p{pointer<const uint8_t>(fragments), pointer<uint8_t>(codes), n, k, {bits, dense}};
        return static_cast<int>(unprepack(p, {static_cast<Number>(number), static_cast<Levels>(levels)}, nullptr));
      },
      py::kw_only(), py::arg("fragments"), py::arg("codes"), py::arg("n"), py::arg("k"), py::arg("bits"),
      py::arg("dense"), py::arg("number"), py::arg("levels"));
}
