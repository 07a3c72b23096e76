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

#include "codec/e4m3.h"

namespace lar::codec {

struct Fp8 {
  static constexpr const char* kName = "fp8";
  static constexpr bool kSendsInfinity = false;
  static constexpr bool kOwnAsSent = false;  // a rank's own values count in a sum as they are
  static constexpr int kValues = 496;
  static constexpr int kBytes = 512;
  static constexpr int kScaleByte = 496;
  static constexpr float kLargest = kLargestE4m3;
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
    return e4m3_on_bits(scaled);
#endif
  }

  LAR_CODEC static float decode(uint8_t code, float scale) { return multiply(from_e4m3(code), scale); }

#if defined(__CUDACC__)
  // Four values, the first in the lowest byte: the same codes by fewer instructions.
  __device__ __forceinline__ static uint32_t encode(const float (&values)[4], float multiplier) {
#if __CUDA_ARCH__ >= 890
    // x - x is NaN where x is not finite, and otherwise +0, which adds nothing but makes a -0 +0.
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) scaled[i] = add(multiply(values[i], multiplier), add(values[i], -values[i]));
    const uint32_t low = __nv_cvt_float2_to_fp8x2({scaled[0], scaled[1]}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({scaled[2], scaled[3]}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t codes = low | high << 16;
    return with_signs(codes & 0x7f7f7f7fu, codes);
#else
    uint32_t magnitudes = 0;
    uint32_t signs = 0;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      const bool finite = is_finite(values[i]);
      const float scaled = finite ? multiply(values[i], multiplier) : nan();
      magnitudes = magnitudes << 8 | (finite ? e4m3_of_magnitude(scaled) : kE4m3Nan);
      signs = signs << 8 | bits_of(scaled) >> 24;
    }
    return with_signs(magnitudes, signs);
#endif
  }

  // Two codes, the first in the lower byte.
  __device__ __forceinline__ static void decode(uint16_t codes, float scale, float& first, float& second) {
#if __CUDA_ARCH__ >= 890
    const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3);  // fp16 has every e4m3 value
    first = multiply(from_half_bits(halves.x), scale);
    second = multiply(from_half_bits(halves.y), scale);
#else
    // As from_e4m3(), both at once: codes in the upper bytes, which NaN alone leaves when one is added.
    const uint32_t upper = (codes & 0xffu) << 8 | (codes & 0xff00u) << 16;
    const uint32_t size = upper & 0x7f007f00u;
    const uint32_t carry = (size + 0x01000100u) & 0x80008000u;
    const uint32_t bits = (upper & 0x80008000u) | size >> 1 | (carry - (carry >> 5));
    first = multiply(multiply(from_half_bits(static_cast<uint16_t>(bits)), 256.0f), scale);
    second = multiply(multiply(from_half_bits(static_cast<uint16_t>(bits >> 16)), 256.0f), scale);
#endif
  }

 private:
  // Four codes with the top bits of `signs`: but negative values that round to zero have none, else they would be -0.
  __device__ __forceinline__ static uint32_t with_signs(uint32_t magnitudes, uint32_t signs) {
    const uint32_t not_zero = (magnitudes + 0x7f7f7f7fu) & 0x80808080u;
    return magnitudes | (signs & not_zero);
  }
#endif
};

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_FP8_H_
