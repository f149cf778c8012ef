// emulated_partition: thresholds and exponents.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;
using namespace inq::cuda;
using inq::cuda::emulator::pointer;

PYBIND11_MODULE(emulated_partition, m) {
  emulator::bind(m);
  m.attr("STATE_BYTES") = sizeof(PartitionState);
  m.def("chunks", &chunks_of);
  m.def("list_capacity", &list_capacity);
  m.def(
      "partition",
      [](uintptr_t tensors, int tensor_count, int64_t chunk, int64_t chunks, int64_t rows, uintptr_t states,
         uintptr_t thresholds, uintptr_t n1, int bits, bool dense, int dtype, bool random, bool channel, bool mse) {
        const PartitionParams p{pointer<const WeightTensor>(tensors), tensor_count, chunk, chunks, rows,
                                pointer<PartitionState>(states), pointer<int64_t>(thresholds), pointer<int8_t>(n1),
                                {bits, dense}};
        return static_cast<int>(partition(p, {static_cast<DType>(dtype), random, channel, mse}, nullptr));
      },
      py::kw_only(), py::arg("tensors"), py::arg("tensor_count"), py::arg("chunk"), py::arg("chunks"), py::arg("rows"),
      py::arg("states"), py::arg("thresholds"), py::arg("n1"), py::arg("bits"), py::arg("dense"), py::arg("dtype"),
      py::arg("random"), py::arg("channel"), py::arg("mse"));
}
