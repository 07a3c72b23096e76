// HADAMARD2: 32 values in 10 bytes, like TQ3, with less error: the block is rotated by a Hadamard matrix, which spreads
// outliers over all 32 values and makes them nearly normal, and each is sent as one of the four levels that are best
// for normal data (Lloyd-Max: +-0.4528 and +-1.5104 standard deviations, apart at +-0.9816; J. Max, "Quantizing for
// minimum distortion", 1960). First plane: signs; second plane: the larger level. The scale is the one with the least
// squared error for the levels chosen, in fp16.
//
//   NaN, infinity   the scale is NaN and so is the whole block, whose values the rotation mixes
//   > 2^20          taken for 2^20, beyond what the fp16 scale can say anyway: no finite value becomes NaN or infinite
//   < about 2^-25   the scale is 0, and so is the block
#ifndef LLM_ALLREDUCE_CODEC_HADAMARD2_H_
#define LLM_ALLREDUCE_CODEC_HADAMARD2_H_

#include "codec/block32.h"

namespace lar::codec {

struct Hadamard2 {
  static constexpr const char* kName = "hadamard2";
  static constexpr bool kSendsInfinity = false;
  static constexpr bool kOwnAsSent = false;
  static constexpr float kSmall = 0.4527800f;
  static constexpr float kLarge = 1.5104176f;
  static constexpr float kApart = 0.9815988f;
  static constexpr float kLargestInput = 0x1p20f;
  static constexpr float kInverseRoot32 = 0.17677669f;

  LAR_CODEC static Block32 encode(const float (&input)[Block32::kValues]) {
    float values[Block32::kValues];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < Block32::kValues; ++i) {
      values[i] = input[i];
      largest = larger(largest, magnitude(input[i]));
    }
    if (!is_finite(largest)) return {0u, 0u, kHalfNan};
    if (largest > kLargestInput) limit(values);
    rotate(values);
    if (is_nan(values[0])) return {0u, 0u, kHalfNan};  // the sum of all
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < Block32::kValues; ++i) squares = add(squares, multiply(values[i], values[i]));
    // The levels of the root mean square, then those of the best scale for them.
    float scale = square_root(multiply(squares, 1.0f / Block32::kValues));
    float apart = 0.0f;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      apart = multiply(scale, kApart);
      scale = best_scale(values, apart);
    }
    Block32 out{0u, 0u, half_bits(scale > kLargestHalf ? kLargestHalf : scale)};
#pragma unroll
    for (int i = Block32::kValues - 1; i >= 0; --i) {
      out.first = behind(out.first, values[i]);
      out.second = behind(out.second, add(apart, -magnitude(values[i])));
    }
    return out;
  }

  LAR_CODEC static void decode(const Block32& block, float (&values)[Block32::kValues]) {
    const float scale = from_half_bits(block.scale);
    const float small = multiply(scale, kSmall);
    const float large = multiply(scale, kLarge);
#pragma unroll
    for (int i = 0; i < Block32::kValues; ++i) {
      const float size = (block.second & 1u << i) != 0 ? large : small;
      values[i] = from_bits(bits_of(size) ^ (block.first << (31 - i) & 0x80000000u));
    }
    rotate(values);
  }

 private:
  // NaN stays.
  LAR_CODEC static void limit(float (&values)[Block32::kValues]) {
#pragma unroll
    for (int i = 0; i < Block32::kValues; ++i) {
      if (values[i] > kLargestInput) values[i] = kLargestInput;
      if (values[i] < -kLargestInput) values[i] = -kLargestInput;
    }
  }

  // The scale with the least squared error for the levels that `apart` sets apart.
  LAR_CODEC static float best_scale(const float (&values)[Block32::kValues], float apart) {
    float products = 0.0f;
    float weights = 0.0f;
#pragma unroll
    for (int i = 0; i < Block32::kValues; ++i) {
      const float level = magnitude(values[i]) > apart ? kLarge : kSmall;
      products = add(products, multiply(magnitude(values[i]), level));
      weights = add(weights, multiply(level, level));
    }
    return divide(products, weights);
  }

  // The Hadamard matrix of order 32, divided by the root of 32: its own inverse. Five steps of sums and differences.
  LAR_CODEC static void rotate(float (&values)[Block32::kValues]) {
#pragma unroll
    for (int half = 1; half < Block32::kValues; half *= 2)
#pragma unroll
      for (int i = 0; i < Block32::kValues; ++i)
        if ((i & half) == 0) {
          const float a = values[i];
          const float b = values[i + half];
          values[i] = add(a, b);
          values[i + half] = add(a, -b);
        }
#pragma unroll
    for (int i = 0; i < Block32::kValues; ++i) values[i] = multiply(values[i], kInverseRoot32);
  }
};

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_HADAMARD2_H_
