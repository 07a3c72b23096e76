// Arithmetic that gives the same bits on the host and on the device: one IEEE rounding for every operation, nothing
// contracted into fused multiply-adds (the host is compiled with -ffp-contract=off), conversions to nearest even.
#ifndef LLM_ALLREDUCE_CODEC_SCALAR_H_
#define LLM_ALLREDUCE_CODEC_SCALAR_H_

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define LAR_CODEC __host__ __device__ __forceinline__
#else
#include "cpu/float_types.h"
#define LAR_CODEC inline
#endif

namespace lar::codec {

// larger, smaller: where one is NaN, the other.
#if defined(__CUDA_ARCH__)
LAR_CODEC float add(float a, float b) { return __fadd_rn(a, b); }
LAR_CODEC float multiply(float a, float b) { return __fmul_rn(a, b); }
LAR_CODEC float divide(float a, float b) { return __fdiv_rn(a, b); }
LAR_CODEC float square_root(float a) { return __fsqrt_rn(a); }
LAR_CODEC float larger(float a, float b) { return fmaxf(a, b); }
LAR_CODEC float smaller(float a, float b) { return fminf(a, b); }
LAR_CODEC uint32_t bits_of(float value) { return __float_as_uint(value); }
LAR_CODEC float from_bits(uint32_t bits) { return __uint_as_float(bits); }
#else
LAR_CODEC float add(float a, float b) { return a + b; }
LAR_CODEC float multiply(float a, float b) { return a * b; }
LAR_CODEC float divide(float a, float b) { return a / b; }
LAR_CODEC float square_root(float a) { return __builtin_sqrtf(a); }
LAR_CODEC float larger(float a, float b) { return a != a || b > a ? b : a; }
LAR_CODEC float smaller(float a, float b) { return a != a || b < a ? b : a; }
LAR_CODEC uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
LAR_CODEC float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
#endif

constexpr uint32_t kMagnitudeMask = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint16_t kHalfNan = 0x7fff;
constexpr float kLargestHalf = 65504.0f;

LAR_CODEC bool is_nan(float value) { return (bits_of(value) & kMagnitudeMask) > kInfinityBits; }
LAR_CODEC bool is_finite(float value) { return (bits_of(value) & kMagnitudeMask) < kInfinityBits; }
#if defined(__CUDA_ARCH__)
LAR_CODEC float magnitude(float value) { return fabsf(value); }  // most instructions take it on the way
#else
LAR_CODEC float magnitude(float value) { return from_bits(bits_of(value) & kMagnitudeMask); }
#endif
// The sign of `value` as the lowest bit, behind those of `signs`.
LAR_CODEC uint32_t behind(uint32_t signs, float value) { return signs << 1 | bits_of(value) >> 31; }
LAR_CODEC float nan() { return from_bits(0x7fffffffu); }

// For formats that send infinity as NaN: what a rank's own values must look like beside the decoded ones, and a sum
// that is infinite only because finite values were too large to add up.
LAR_CODEC float infinity_as_nan(float value) { return is_finite(value) ? value : nan(); }
LAR_CODEC float largest_for_infinity(float sum) {
  const bool is_infinite = (bits_of(sum) & kMagnitudeMask) == kInfinityBits;
  return is_infinite ? from_bits(bits_of(sum) - 1) : sum;
}

// fp32 -> fp16 bits; NaN becomes kHalfNan.
LAR_CODEC uint16_t half_bits(float value) {
#if defined(__CUDACC__)
  const __half half = __float2half_rn(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof(bits));
  return is_nan(value) ? kHalfNan : bits;
#else
  return cpu::Float16::round(value);
#endif
}

LAR_CODEC float from_half_bits(uint16_t bits) {
#if defined(__CUDACC__)
  __half half;
  memcpy(&half, &bits, sizeof(half));
  return __half2float(half);
#else
  return cpu::Float16::widen(bits);
#endif
}

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_SCALAR_H_
