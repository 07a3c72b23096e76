// The arithmetic of LAR_RMS_NORM, the same bits on the host and on the device, and whoever splits the work: every
// operation is rounded by itself (codec/scalar.h), and the order in which squares are summed depends on the hidden size
// alone.
//
//   r = round(s + residual)                    round: to the element type
//   total = the sum of r^2 of the row          a tree over units of 8 elements, see below
//   y = round((r * inverse) * (weight + bias)) inverse = 1 / sqrt(total * (1 / hidden) + eps)
//
// The tree: a unit's squares are added in pairs, neighbours first. Units are the leaves of a balanced binary tree of
// 2^k leaves, at least 1024 and at least as many as there are units; those that there are not are +0, which changes no
// sum of squares. So 2^k may as well be larger.
#ifndef LLM_ALLREDUCE_CODEC_NORM_H_
#define LLM_ALLREDUCE_CODEC_NORM_H_

#include "codec/e4m3.h"
#include "llm_allreduce.h"

namespace lar::codec {

constexpr int kUnitElements = 8;
constexpr int kTileUnits = 32;   // a subtree that one warp adds up
constexpr int kLeastTiles = 32;  // 1024 leaves
constexpr int kGroupElements = 128;
constexpr int kFp4Elements = 16;  // that share a scale

LAR_CODEC float sum_of_squares(const float (&x)[kUnitElements]) {
  float q[kUnitElements];
  for (int i = 0; i < kUnitElements; ++i) q[i] = multiply(x[i], x[i]);
  return add(add(add(q[0], q[1]), add(q[2], q[3])), add(add(q[4], q[5]), add(q[6], q[7])));
}

// Where scales of rows lie in columns: scales (UE8M0: words) from the start of one column to that of the next.
LAR_CODEC int64_t scale_stride(const lar_norm& norm, int64_t rows) {
  if (norm.scales == LAR_SCALES_UE8M0) return (rows + 3) / 4 * 4;
  return norm.scale_stride > 0 ? norm.scale_stride : rows;
}

// What a row's elements are multiplied by.
LAR_CODEC float inverse_of_norm(float total, float inverse_hidden, float eps) {
  return divide(1.0f, square_root(add(multiply(total, inverse_hidden), eps)));
}

// y before it is rounded; `weight`: with its bias.
LAR_CODEC float normed(float r, float inverse, float weight) { return multiply(multiply(r, inverse), weight); }

// Scales, of the largest magnitude of what they are for. It is NaN where any is, and then so is the scale.
LAR_CODEC float token_scale(float largest) {
  const float scale = divide(largest, kLargestE4m3);
  constexpr float kLeast = 1.0f / (kLargestE4m3 * 512.0f);
  return scale < kLeast ? kLeast : scale;
}

LAR_CODEC float group_scale(float largest) { return divide(largest < 1e-10f ? 1e-10f : largest, kLargestE4m3); }

// The exponent of the least power of two that is not less than a scale; 255 where it is not finite.
LAR_CODEC uint32_t exponent_above(float scale) {
  const uint32_t bits = bits_of(scale);
  const uint32_t exponent = bits >> 23;
  return exponent < 255 && (bits & 0x7fffffu) != 0 ? exponent + 1 : exponent;
}
LAR_CODEC float power_of_two(uint32_t exponent) { return from_bits(exponent << 23); }

// NVFP4: `given` is the scale of the tensor.
LAR_CODEC uint8_t fp4_scale(float largest, float given) { return to_e4m3(multiply(given, divide(largest, 6.0f))); }
LAR_CODEC float fp4_multiplier(uint8_t scale, float given) {
  return scale == 0 ? 0.0f : divide(1.0f, multiply(from_e4m3(scale), divide(1.0f, given)));
}

// The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, a tie to the even code; NaN becomes 6.
LAR_CODEC uint32_t to_e2m1(float value) {
  if (is_nan(value)) return 7;
  const float a = magnitude(value);
  const uint32_t code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return code | (bits_of(value) >> 31 << 3);
}

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_NORM_H_
