// Host entry points of linear_hopper.cuh, and its instances.
#include "linear_hopper.cuh"

namespace inq::cuda {
namespace hopper {

template <class Codec>
cudaError_t run_codec(const LinearHopperParams& p, const HopperChoice& choice, int processors, cudaStream_t stream) {
  if (choice.rows == 256 && choice.tokens == 128) return run<Shape<Codec, 2, 128>>(p, choice, processors, stream);
  if (choice.rows == 128 && choice.tokens == 128) return run<Shape<Codec, 1, 128>>(p, choice, processors, stream);
  if (choice.rows == 128 && choice.tokens == 64) return run<Shape<Codec, 1, 64>>(p, choice, processors, stream);
  return cudaErrorInvalidValue;
}

template <Number kNumber>
cudaError_t run_number(const LinearHopperParams& p, const HopperChoice& choice, int processors, cudaStream_t stream) {
  switch (p.levels) {
    case Levels::paper4: return run_codec<CodecOf<kNumber, Levels::paper4>>(p, choice, processors, stream);
    case Levels::dense4: return run_codec<CodecOf<kNumber, Levels::dense4>>(p, choice, processors, stream);
    case Levels::paper5: return run_codec<CodecOf<kNumber, Levels::paper5>>(p, choice, processors, stream);
    case Levels::dense5: return run_codec<CodecOf<kNumber, Levels::dense5>>(p, choice, processors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace hopper

int64_t linear_hopper_partials(int64_t m, int64_t n, const HopperChoice& choice) {
  if (choice.splits == 1) return 0;
  return hopper::ceil_div(m, choice.tokens) * choice.tokens * hopper::ceil_div(n, choice.rows) * choice.rows *
         choice.splits;
}

int64_t linear_hopper_arrivals(int64_t m, int64_t n, const HopperChoice& choice) {
  if (choice.splits == 1) return 0;
  return hopper::ceil_div(m, choice.tokens) * hopper::ceil_div(n, choice.rows) * hopper::kGroups;
}

cudaError_t linear_hopper(const LinearHopperParams& p, const HopperChoice& choice, int processors,
                          cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  const bool fp8 = p.number == Number::e4m3;
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride * (fp8 ? 1 : 2) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
  const auto in_range = [](int64_t size) { return size >= 0 && size <= hopper::kLargest; };
  if (!choice.use || choice.splits < 1 || processors < 1 || !aligned || !in_range(p.m) || !in_range(p.n) ||
      !in_range(p.k) || fp8 != (p.rows_exp != nullptr) ||
      (!fp8 && p.out_type != (p.number == Number::f16 ? Float::f16 : Float::bf16))) {
    return cudaErrorInvalidValue;
  }
  switch (p.number) {
    case Number::f16: return hopper::run_number<Number::f16>(p, choice, processors, stream);
    case Number::bf16: return hopper::run_number<Number::bf16>(p, choice, processors, stream);
    case Number::e4m3:
      // paper and dense levels have the same codes.
      if (p.levels == Levels::paper4 || p.levels == Levels::dense4) {
        return hopper::run_codec<codec::D>(p, choice, processors, stream);
      }
      return hopper::run_codec<codec::H>(p, choice, processors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace inq::cuda
