// From words of the "fragments" layouts to the registers of a tensor core's A operand: inq_kernels/fragments.py is the
// definition, and these are its expressions, an AND and at most a few shifts for each register.
//
// A codec has
//   kWords       words that a lane holds of a block, 4; at 5 bits for e4m3 5: the fifth at byte 512 + 4·lane
//   kSteps       steps of a block, each an A fragment: 4, 3 or 2
//   kStepK       k of a step: 16, or 32 for e4m3; kBlockK = kSteps·kStepK
//   kBlockBytes  bytes of a block of 16 rows
//   kBase        magnitude i of the format decodes to ±2^(kBase + i)
//   decode(words, step, a): registers a[0…3] of a step; `step` is a constant once its loop is unrolled.
//
// nvcc makes one LOP3 of each `(… ^ …) & mask`; left shifts become IMAD.SHL, on another pipe.
#pragma once

#include "host.h"
#include "ptx.cuh"

namespace inq::cuda {

namespace codec {

INQ_DEVICE uint32_t rotate_left(uint32_t q, int s) { return q << s | q >> (32 - s); }

// 4 bits for 16-bit products: a word of eight codes is the four registers of a step.
struct FourBits {
  static constexpr int kWords = 4, kSteps = 4, kStepK = 16, kBlockK = 64, kBlockBytes = 512;
};
// 5 bits for 16-bit products: six codes, three registers a word.
struct FiveBits {
  static constexpr int kWords = 4, kSteps = 3, kStepK = 16, kBlockK = 48, kBlockBytes = 512;

 protected:
  // `register_of(q, j)`: register j of three, of word q.
  template <class RegisterOf>
  static INQ_DEVICE void decode_by(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4], RegisterOf register_of) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = register_of(words[(4 * step + i) / 3], (4 * step + i) % 3);
  }
};

struct A : FourBits {  // paper, fp16
  static constexpr Number kNumber = Number::f16;
  static constexpr int kBase = 1;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0xCC00CC00u;
    const uint32_t q = words[step];
    a[0] = q & kMask;
    a[1] = q << 2 & kMask;
    a[2] = q << 8 & kMask;
    a[3] = q << 10 & kMask;
  }
};

struct B : FourBits {  // paper, bf16
  static constexpr Number kNumber = Number::bf16;
  static constexpr int kBase = 1;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0xC180C180u;
    const uint32_t q = words[step];
    a[0] = q & kMask;
    a[1] = q << 2 & kMask;
    a[2] = q << 4 & kMask;
    a[3] = (q << 6 ^ q << 14) & kMask;
  }
};

struct C : FourBits {  // dense, fp16
  static constexpr Number kNumber = Number::f16;
  static constexpr int kBase = -14;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0x9C009C00u;
    const uint32_t q = words[step], s = q << 2, t = rotate_left(q, 4);
    a[0] = q & kMask;
    a[1] = q << 8 & kMask;
    a[2] = xor_and(s, t, kMask);
    a[3] = xor_and(s, t, 0x009C009Cu) << 8;
  }
};

// Dense levels are 2^-126… in bf16, whose products would underflow float32: times 2^126, exactly.
constexpr uint32_t kLift = 0x7E807E80u;

struct J : FourBits {  // dense, bf16
  static constexpr Number kNumber = Number::bf16;
  static constexpr int kBase = 0;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0x83808380u;
    const uint32_t q = words[step], s = q << 4, t = rotate_left(q, 11);
    a[0] = mul_bf16x2(q & kMask, kLift);
    a[1] = mul_bf16x2(q << 3 & kMask, kLift);
    a[2] = mul_bf16x2(xor_and(s, t, kMask), kLift);
    a[3] = mul_bf16x2(xor_and(s, t, kMask >> 3) << 3, kLift);
  }
};

struct F : FiveBits {  // dense, fp16
  static constexpr Number kNumber = Number::f16;
  static constexpr int kBase = -14;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    decode_by(words, step, a, [](uint32_t q, int j) {
      return (j == 0 ? q : j == 1 ? q << 6 : q * 1026u) & 0xBC00BC00u;
    });
  }
};

struct G : FiveBits {  // paper, bf16
  static constexpr Number kNumber = Number::bf16;
  static constexpr int kBase = 1;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    decode_by(words, step, a, [](uint32_t q, int j) {
      return (j == 0 ? q : j == 1 ? q << 4 : q * 132u) & 0xC380C380u;
    });
  }
};

struct I : FiveBits {  // paper, fp16
  static constexpr Number kNumber = Number::f16;
  static constexpr int kBase = 1;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    decode_by(words, step, a, [](uint32_t q, int j) {
      return (j == 0 ? q : j == 1 ? q << 6 : q << 8 ^ q << 11) & 0xDC00DC00u;
    });
  }
};

struct K : FiveBits {  // dense, bf16
  static constexpr Number kNumber = Number::bf16;
  static constexpr int kBase = 0;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    decode_by(words, step, a, [](uint32_t q, int j) {
      return mul_bf16x2((j == 0 ? q : j == 1 ? q << 4 : q << 7 ^ rotate_left(q, 13)) & 0x87808780u, kLift);
    });
  }
};

struct D {  // 4 bits, e4m3: two registers a word
  static constexpr int kWords = 4, kSteps = 2, kStepK = 32, kBlockK = 64, kBlockBytes = 512;
  static constexpr Number kNumber = Number::e4m3;
  static constexpr int kBase = -6;
  static INQ_DEVICE void decode(const uint32_t (&words)[kWords], int step, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0xB8B8B8B8u;
    const uint32_t p = words[2 * step], q = words[2 * step + 1];
    a[0] = p & kMask;
    a[1] = (p << 1 ^ p << 3) & kMask;
    a[2] = q & kMask;
    a[3] = (q << 1 ^ q << 3) & kMask;
  }
};

struct H {  // 5 bits, e4m3: eight registers from five words
  static constexpr int kWords = 5, kSteps = 2, kStepK = 32, kBlockK = 64, kBlockBytes = 640;
  static constexpr Number kNumber = Number::e4m3;
  static constexpr int kBase = -6;
  static INQ_DEVICE void decode(const uint32_t (&w)[kWords], int step, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0xF8F8F8F8u;
    if (step == 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = w[i] & kMask;
    } else {
      a[0] = w[4] & kMask;
      a[1] = (w[0] << 5 ^ w[1] << 3) & kMask;
      a[2] = (w[2] << 5 ^ w[3] << 3) & kMask;
      a[3] = (w[1] << 2 ^ w[3] << 1 ^ w[4] << 5) & kMask;
    }
  }
};

}  // namespace codec

// The codec of a type of products and a format's levels.
template <Number kNumber, Levels kLevels>
struct CodecOf;
template <>
struct CodecOf<Number::f16, Levels::paper4> : codec::A {};
template <>
struct CodecOf<Number::f16, Levels::dense4> : codec::C {};
template <>
struct CodecOf<Number::f16, Levels::paper5> : codec::I {};
template <>
struct CodecOf<Number::f16, Levels::dense5> : codec::F {};
template <>
struct CodecOf<Number::bf16, Levels::paper4> : codec::B {};
template <>
struct CodecOf<Number::bf16, Levels::dense4> : codec::J {};
template <>
struct CodecOf<Number::bf16, Levels::paper5> : codec::G {};
template <>
struct CodecOf<Number::bf16, Levels::dense5> : codec::K {};
template <>
struct CodecOf<Number::e4m3, Levels::paper4> : codec::D {};
template <>
struct CodecOf<Number::e4m3, Levels::dense4> : codec::D {};
template <>
struct CodecOf<Number::e4m3, Levels::paper5> : codec::H {};
template <>
struct CodecOf<Number::e4m3, Levels::dense5> : codec::H {};

// host.h says the same to code that has no device code.
template <Number kNumber, Levels kLevels>
constexpr bool kAgrees = CodecOf<kNumber, kLevels>::kBase == base_of(kNumber, kLevels) &&
                         CodecOf<kNumber, kLevels>::kBlockK == block_k_of(kNumber, kLevels) &&
                         CodecOf<kNumber, kLevels>::kBlockBytes == block_bytes_of(kNumber, kLevels);
template <Number kNumber>
constexpr bool kAllAgree = kAgrees<kNumber, Levels::paper4> && kAgrees<kNumber, Levels::dense4> &&
                           kAgrees<kNumber, Levels::paper5> && kAgrees<kNumber, Levels::dense5>;
static_assert(kAllAgree<Number::f16> && kAllAgree<Number::bf16> && kAllAgree<Number::e4m3>);

}  // namespace inq::cuda
