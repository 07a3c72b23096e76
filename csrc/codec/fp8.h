// FP8: a packet of 496 values in 512 bytes, one 16-byte vector to each thread of a warp. Threads 0 to 30 carry 16 e4m3
// values each, thread 31 the scale, fp32, at byte 496 (12 bytes unused, zero). A value is its e4m3 code times the
// scale.
//
// The packet is that of TensorRT-LLM's low-precision all-reduce, which sends the inverse
// scale, 448 / max|x|; here it is max|x| / 448, so that decoding multiplies.
//
//   NaN, infinity   the code NaN: what was not finite stays visible, in that value alone
//   all zero        the smallest scale, codes 0; a -0 becomes +0
//   subnormal       the scale does not go below 2^-126, so bf16 subnormals keep at least one bit
// No finite value becomes NaN or infinite. No word of a packet is the in-band marker: no code is -0, so no byte is 0x80
// (the scale's top byte is at most 0x7f).
#ifndef LLM_ALLREDUCE_CODEC_FP8_H_
#define LLM_ALLREDUCE_CODEC_FP8_H_

#include "codec/scalar.h"

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

namespace lar::codec {

struct Fp8 {
  static constexpr bool kSendsInfinity = false;
  static constexpr int kValues = 496;
  static constexpr int kBytes = 512;
  static constexpr int kScaleByte = 496;
  static constexpr float kLargest = 448.0f;        // of e4m3
  static constexpr float kLeastScale = 0x1p-126f;  // a normal number, so that its inverse is finite

  // What a value adds to the maximum of its packet: values that are not finite add nothing.
  LAR_CODEC static float weight(float value) { return is_finite(value) ? magnitude(value) : 0.0f; }

  // The two factors of a packet whose largest weight is `largest`.
  LAR_CODEC static float scale(float largest) {
    const float wanted = divide(largest, kLargest);
    return wanted < kLeastScale ? kLeastScale : wanted;
  }
  LAR_CODEC static float multiplier(float scale) { return divide(1.0f, scale); }

  // e4m3 code of value * multiplier.
  LAR_CODEC static uint8_t encode(float value, float multiplier) {
    float scaled = is_finite(value) ? multiply(value, multiplier) : nan();
    if (magnitude(scaled) <= 0x1p-10f) return 0;  // half of the smallest code, a tie to even; -0 too
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);
#else
    return encode_on_bits(scaled);
#endif
  }

  LAR_CODEC static float decode(uint8_t code, float scale) { return multiply(widen(code), scale); }

 private:
  // One rounding to nearest even, of a value that does not round to zero.
  LAR_CODEC static uint8_t encode_on_bits(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 24) & 0x80u;
    const uint32_t absolute = bits & kMagnitudeMask;
    if (absolute > kInfinityBits) return 0x7f;
    if (absolute < 0x3c800000u) {  // below 2^-6: subnormal, multiples of 2^-9
      // Adding 2^14 aligns the last bit of the fp32 sum with 2^-9: the FPU rounds.
      const uint32_t multiple = bits_of(add(from_bits(absolute), 0x1p14f)) - bits_of(0x1p14f);
      return static_cast<uint8_t>(sign | multiple);
    }
    const uint32_t rounded = (absolute + 0x7ffffu + ((absolute >> 20) & 1u) - ((127u - 7u) << 23)) >> 20;
    return static_cast<uint8_t>(sign | (rounded > 0x7eu ? 0x7eu : rounded));
  }

  LAR_CODEC static float widen(uint8_t code) {
    const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
    const uint32_t absolute = code & 0x7fu;
    if (absolute == 0x7fu) return nan();
    const float normal = from_bits((absolute << 20) + ((127u - 7u) << 23));
    const float subnormal = multiply(static_cast<float>(static_cast<int>(absolute)), 0x1p-9f);
    return from_bits(sign | bits_of(absolute < 8 ? subnormal : normal));
  }
};

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_FP8_H_
