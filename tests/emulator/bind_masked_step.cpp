// emulated_masked_step: SGD and AdamW.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;
using namespace inq::cuda;
using inq::cuda::emulator::pointer;

PYBIND11_MODULE(emulated_masked_step, m) {
  emulator::bind(m);
  m.attr("CHUNK") = kStepChunk;
  m.def("chunks", &chunks_of);
  m.def(
      "masked_sgd",
      [](uintptr_t tensors, int tensor_count, int64_t chunks, int dtype, bool has_momentum, double lr, double momentum,
         double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step) {
        const SgdParams p{pointer<const StepTensor>(tensors), tensor_count, chunks,
                          inq::sgd_numbers(lr, momentum, dampening, weight_decay, nesterov, maximize, first_step)};
        return static_cast<int>(masked_sgd(p, {static_cast<DType>(dtype), has_momentum}, nullptr));
      },
      py::kw_only(), py::arg("tensors"), py::arg("tensor_count"), py::arg("chunks"), py::arg("dtype"),
      py::arg("has_momentum"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"),
      py::arg("nesterov"), py::arg("maximize"), py::arg("first_step"));
  m.def(
      "masked_adamw",
      [](uintptr_t tensors, int tensor_count, int64_t chunks, int dtype, double lr, double beta1, double beta2,
         double weight_decay, double eps, int64_t step, bool maximize) {
        const AdamwParams p{pointer<const StepTensor>(tensors), tensor_count, chunks,
                            inq::adamw_numbers(lr, beta1, beta2, weight_decay, eps, step, maximize)};
        return static_cast<int>(masked_adamw(p, {static_cast<DType>(dtype)}, nullptr));
      },
      py::kw_only(), py::arg("tensors"), py::arg("tensor_count"), py::arg("chunks"), py::arg("dtype"), py::arg("lr"),
      py::arg("beta1"), py::arg("beta2"), py::arg("weight_decay"), py::arg("eps"), py::arg("step"),
      py::arg("maximize"));
}
