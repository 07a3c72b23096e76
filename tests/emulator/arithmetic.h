// What nvcc has of its own for the arithmetic of csrc/codec/, for a C++ compiler.
#ifndef LLM_ALLREDUCE_EMULATOR_ARITHMETIC_H_
#define LLM_ALLREDUCE_EMULATOR_ARITHMETIC_H_

#include <cmath>
#include <cstdint>
#include <cstring>

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

#endif  // LLM_ALLREDUCE_EMULATOR_ARITHMETIC_H_
