// The element types on the CPU: bits in, fp32 out, and back with one rounding to nearest even.
//
// Written on bits rather than with compiler half types: it then needs no CPU feature beyond the baseline, and
// loops over it vectorize. NaN becomes the NaN that the CUDA conversions give, so CPU and GPU ranks agree.
#ifndef LLM_ALLREDUCE_CPU_FLOAT_TYPES_H_
#define LLM_ALLREDUCE_CPU_FLOAT_TYPES_H_

#include <cstdint>
#include <cstring>

namespace lar::cpu {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

constexpr uint32_t kSignMask = 0x80000000u;
constexpr uint32_t kInfinity = 0x7f800000u;

struct Float32 {
  using Storage = uint32_t;
  static float widen(Storage bits) { return float_from_bits(bits); }
  static Storage round(float value) {
    const uint32_t bits = bits_from_float(value);
    return (bits & ~kSignMask) > kInfinity ? 0x7fffffffu : bits;
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float widen(Storage bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
  static Storage round(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<Storage>((bits & ~kSignMask) > kInfinity ? 0x7fffu : rounded);
  }
};

struct Float16 {
  using Storage = uint16_t;

  static float widen(Storage half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    const uint32_t rebiased = (magnitude << 13) + ((127u - 15u) << 23);
    // Subnormals are multiples of 2^-24, which fp32 holds exactly.
    const uint32_t subnormal = bits_from_float(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t special = kInfinity | (magnitude << 13);
    return float_from_bits(sign | (magnitude >= 0x7c00u ? special : magnitude < 0x0400u ? subnormal : rebiased));
  }

  static Storage round(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & ~kSignMask;
    // Adding 0.5 aligns the last bit of a half subnormal (2^-24) with that of the fp32 sum: the FPU rounds.
    const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;              // 65520 and more round to infinity
    return static_cast<Storage>(magnitude > kInfinity ? 0x7fffu : (sign | half));
  }
};

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_FLOAT_TYPES_H_
