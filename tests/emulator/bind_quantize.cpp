// emulated_quantize: freezing.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;
using namespace inq::cuda;
using inq::cuda::emulator::pointer;

PYBIND11_MODULE(emulated_quantize, m) {
  emulator::bind(m);
  m.attr("CHUNK") = kFreezeChunk;
  m.def("chunks", &chunks_of);
  m.def("scratch_bytes", &freeze_scratch_bytes);
  m.def(
      "quantize_with_mask",
      [](uintptr_t tensors, int tensor_count, int64_t chunks, uintptr_t thresholds, uintptr_t n1, uintptr_t frozen,
         int bits, bool dense, int dtype, bool random) {
        const FreezeParams p{pointer<const WeightTensor>(tensors), tensor_count, chunks,
                             pointer<const int64_t>(thresholds), pointer<const int8_t>(n1),
                             pointer<unsigned long long>(frozen), {bits, dense}};
        return static_cast<int>(quantize_with_mask(p, {static_cast<DType>(dtype), random}, nullptr));
      },
      py::kw_only(), py::arg("tensors"), py::arg("tensor_count"), py::arg("chunks"), py::arg("thresholds"),
      py::arg("n1"), py::arg("frozen"), py::arg("bits"), py::arg("dense"), py::arg("dtype"), py::arg("random"));
}
