// linear and linear_dx by mma.sync, and which tile they take, for test_cuda_linear.py.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "decode.cuh"
#include "linear.h"

namespace inq::cuda {
namespace {

Choice choose_for(bool dx, int sm_count, int capability, int64_t m, int64_t n, int64_t k, bool f16, int bits) {
  return choose(dx ? Op::linear_dx : Op::linear, sm_count, capability, m, n, k, f16, bits);
}

// Pointers are torch.Tensor.data_ptr().
int run(bool dx, const Choice& choice, uintptr_t x, int64_t stride, uintptr_t weight, uintptr_t weight_exp,
        uintptr_t weight_scale, uintptr_t bias, uintptr_t out, uintptr_t partials, uintptr_t flags, int64_t m, int64_t n,
        int64_t k, int number, int levels, int magnitudes, int bias_type) {
  using emulator::pointer;
  LinearParams p{};
  p.x = pointer<void>(x), p.stride = stride;
  p.weight = pointer<uint8_t>(weight), p.weight_exp = pointer<int8_t>(weight_exp);
  p.weight_scale = pointer<float>(weight_scale), p.bias = pointer<void>(bias);
  p.out = pointer<void>(out), p.partials = pointer<float>(partials), p.flags = pointer<int>(flags);
  p.m = m, p.n = n, p.k = k;
  p.number = static_cast<Number>(number), p.levels = static_cast<Levels>(levels), p.magnitudes = magnitudes;
  p.bias_type = static_cast<Float>(bias_type);
  return static_cast<int>((dx ? linear_dx : linear)(p, choice, nullptr));
}

// A block of weights decoded as a warp's lanes do: out [32, 4·kSteps]. What the codec says of itself.
template <Number kNumber, Levels kLevels>
pybind11::dict decode_block(const uint32_t* words, uint32_t* out) {
  using Codec = CodecOf<kNumber, kLevels>;
  for (int lane = 0; lane < 32; lane++) {
    uint32_t mine[Codec::kWords];
    for (int i = 0; i < Codec::kWords; i++) mine[i] = words[i < 4 ? 4 * lane + i : 128 + lane];
    for (int step = 0; step < Codec::kSteps; step++) {
      uint32_t a[4];
      Codec::decode(mine, step, a);
      std::copy(a, a + 4, out + (lane * Codec::kSteps + step) * 4);
    }
  }
  using namespace pybind11::literals;
  return pybind11::dict("k_block"_a = int{Codec::kBlockK}, "k_step"_a = int{Codec::kStepK}, "steps"_a = int{Codec::kSteps},
                        "bytes"_a = int{Codec::kBlockBytes}, "words"_a = int{Codec::kWords}, "base"_a = int{Codec::kBase},
                        "number"_a = static_cast<int>(Codec::kNumber));
}

template <Number kNumber>
pybind11::dict decode_number(int levels, const uint32_t* words, uint32_t* out) {
  switch (static_cast<Levels>(levels)) {
    case Levels::paper4:
      return decode_block<kNumber, Levels::paper4>(words, out);
    case Levels::dense4:
      return decode_block<kNumber, Levels::dense4>(words, out);
    case Levels::paper5:
      return decode_block<kNumber, Levels::paper5>(words, out);
    default:
      return decode_block<kNumber, Levels::dense5>(words, out);
  }
}

pybind11::dict decode(int number, int levels, uintptr_t block, uintptr_t out) {
  const auto* words = emulator::pointer<uint32_t>(block);
  auto* to = emulator::pointer<uint32_t>(out);
  if (number == 0) return decode_number<Number::f16>(levels, words, to);
  if (number == 1) return decode_number<Number::bf16>(levels, words, to);
  return decode_number<Number::e4m3>(levels, words, to);
}

}  // namespace
}  // namespace inq::cuda

PYBIND11_MODULE(emulated_linear, m) {
  using inq::cuda::Choice;
  inq::cuda::emulator::bind(m);
  pybind11::class_<Choice>(m, "Choice")
      .def_readonly("tokens", &Choice::tokens)
      .def_readonly("warps", &Choice::warps)
      .def_readonly("rows", &Choice::rows)
      .def_readonly("stages", &Choice::stages)
      .def_readonly("shared_bytes", &Choice::shared_bytes)
      .def_readonly("tiles", &Choice::tiles)
      .def_readonly("m_tiles", &Choice::m_tiles)
      .def_readonly("units", &Choice::units)
      .def_readonly("ctas", &Choice::ctas)
      .def_readonly("partials", &Choice::partials)
      .def_readonly("flags", &Choice::flags);
  m.def("choose", &inq::cuda::choose_for);
  m.def("run", &inq::cuda::run);
  m.def("decode", &inq::cuda::decode);
}
