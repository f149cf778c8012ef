// linear_hopper.cu and quantize_rows_hopper.cu for test_cuda_linear_hopper.py; choose_hopper is a host function, and needs no
// emulator.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "linear_hopper.h"

namespace py = pybind11;
using namespace inq::cuda;
using emulator::pointer;

namespace {

HopperChoice choice_of(const py::tuple& t) { return {true, t[0].cast<int>(), t[1].cast<int>(), t[2].cast<int>()}; }

}  // namespace

PYBIND11_MODULE(emulated_linear_hopper, m) {
  emulator::bind(m);
  // (rows, tokens, splits), or None
  m.def("choose", [](int64_t m, int64_t n, int64_t k, int x_bytes, int bits, bool x_aligned, int capability,
                     int processors) -> py::object {
    const HopperChoice c = choose_hopper({m, n, k, x_bytes, bits, x_aligned, capability, processors});
    if (!c.use) return py::none();
    return py::make_tuple(c.rows, c.tokens, c.splits);
  });
  m.def("sizes", [](int64_t m, int64_t n, const py::tuple& choice) {
    const HopperChoice c = choice_of(choice);
    return py::make_tuple(linear_hopper_partials(m, n, c), linear_hopper_arrivals(m, n, c));
  });
  m.def("linear_hopper", [](uintptr_t x, int64_t x_stride, uintptr_t weight, uintptr_t weight_exp,
                            uintptr_t weight_scale, uintptr_t bias, uintptr_t rows_exp, uintptr_t out,
                            uintptr_t partials, uintptr_t arrivals, int64_t m, int64_t n, int64_t k, int magnitudes,
                            int number, int levels, int bias_type, int out_type, const py::tuple& choice,
                            int processors) {
    LinearHopperParams p{};
    p.x = pointer<const void>(x);
    p.x_stride = x_stride;
    p.weight = pointer<const uint8_t>(weight);
    p.weight_exp = pointer<const int8_t>(weight_exp);
    p.weight_scale = pointer<const float>(weight_scale);
    p.bias = pointer<const void>(bias);
    p.rows_exp = pointer<const int32_t>(rows_exp);
    p.out = pointer<void>(out);
    p.partials = pointer<float>(partials);
    p.arrivals = pointer<int>(arrivals);
    p.m = m;
    p.n = n;
    p.k = k;
    p.magnitudes = magnitudes;
    p.number = static_cast<Number>(number);
    p.levels = static_cast<Levels>(levels);
    p.bias_type = static_cast<Float>(bias_type);
    p.out_type = static_cast<Float>(out_type);
    return static_cast<int>(linear_hopper(p, choice_of(choice), processors, nullptr));
  });
  m.def("quantize_rows", [](uintptr_t x, int64_t x_stride, uintptr_t values, int64_t values_stride, uintptr_t exponents,
                            int64_t m, int64_t k, int type) {
    QuantizeRowsParams p{};
    p.x = pointer<const void>(x);
    p.x_stride = x_stride;
    p.values = pointer<uint8_t>(values);
    p.values_stride = values_stride;
    p.exponents = pointer<int32_t>(exponents);
    p.m = m;
    p.k = k;
    p.type = static_cast<Float>(type);
    return static_cast<int>(quantize_rows(p, nullptr));
  });
}
