// e4m3fn, the 8-bit float of FP8: a sign, 4 bits of exponent, 3 of mantissa; the largest is 448, there is no infinity.
#ifndef LLM_ALLREDUCE_CODEC_E4M3_H_
#define LLM_ALLREDUCE_CODEC_E4M3_H_

#include "codec/scalar.h"

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

namespace lar::codec {

constexpr float kLargestE4m3 = 448.0f;
constexpr uint8_t kE4m3Nan = 0x7f;

// The code of |value|, one rounding to nearest even; what is larger than 448, infinity too, becomes 448, and so does
// NaN.
//
// Adding a power of two that is 20 binades above aligns the last bit of the fp32 sum with that of the code: the FPU
// rounds. Below 2^-6 codes are subnormal, multiples of 2^-9, as those of 2^-6 are. What the sum is above the power
// counts these multiples, from 8 on where the code is normal; a count of 16 is the next binade's 8.
LAR_CODEC uint32_t e4m3_of_magnitude(float value) {
  const float size = smaller(magnitude(value), kLargestE4m3);
  constexpr uint32_t kLeast = (127u - 6u) << 23;
  const uint32_t of_size = bits_of(size) & kInfinityBits;
  const uint32_t binade = of_size > kLeast ? of_size : kLeast;
  const uint32_t power = binade + (20u << 23);
  return bits_of(add(size, from_bits(power))) - power + ((binade - kLeast) >> 20);
}

// The sign of a zero stays.
LAR_CODEC uint8_t e4m3_on_bits(float value) {
  if (is_nan(value)) return kE4m3Nan;
  return static_cast<uint8_t>(e4m3_of_magnitude(value) | (bits_of(value) >> 24 & 0x80u));
}

LAR_CODEC uint8_t to_e4m3(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
#else
  return e4m3_on_bits(value);
#endif
}

// The bits of a code are those of an fp16 that is 2^8 smaller, subnormals and all.
LAR_CODEC float from_e4m3(uint8_t code) {
  const uint32_t half = (code & 0x80u) << 8 | (code & 0x7fu) << 7;
  return (code & 0x7fu) == kE4m3Nan ? nan() : multiply(from_half_bits(static_cast<uint16_t>(half)), 256.0f);
}

#if defined(__CUDACC__)
// Four values, the first in the lowest byte.
__device__ __forceinline__ uint32_t to_e4m3(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
#else
  return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | static_cast<uint32_t>(to_e4m3(d)) << 24;
#endif
}
#endif

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_E4M3_H_
