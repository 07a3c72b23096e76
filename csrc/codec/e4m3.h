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

// One rounding to nearest even; what is larger than 448, infinity too, becomes 448. The sign of a zero stays.
LAR_CODEC uint8_t e4m3_on_bits(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t absolute = bits & kMagnitudeMask;
  if (absolute > kInfinityBits) return kE4m3Nan;
  if (absolute < 0x3c800000u) {  // below 2^-6: subnormal, multiples of 2^-9
    // Adding 2^14 aligns the last bit of the fp32 sum with 2^-9: the FPU rounds.
    const uint32_t multiple = bits_of(add(from_bits(absolute), 0x1p14f)) - bits_of(0x1p14f);
    return static_cast<uint8_t>(sign | multiple);
  }
  const uint32_t rounded = (absolute + 0x7ffffu + ((absolute >> 20) & 1u) - ((127u - 7u) << 23)) >> 20;
  return static_cast<uint8_t>(sign | (rounded > 0x7eu ? 0x7eu : rounded));
}

LAR_CODEC uint8_t to_e4m3(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
#else
  return e4m3_on_bits(value);
#endif
}

LAR_CODEC float from_e4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t absolute = code & 0x7fu;
  if (absolute == kE4m3Nan) return nan();
  const float normal = from_bits((absolute << 20) + ((127u - 7u) << 23));
  const float subnormal = multiply(static_cast<float>(static_cast<int>(absolute)), 0x1p-9f);
  return from_bits(sign | bits_of(absolute < 8 ? subnormal : normal));
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
