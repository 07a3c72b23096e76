// TQ3: 32 values in 10 bytes, each -s, 0 or +s (a pull request to ExLlamaV3 described it). First plane: signs, set only
// where the value is not zero; second plane: where it is not zero; scale s = max|x| in fp16. A value is not zero when
// |x| >= s / 2.
//
//   NaN        the scale is NaN and so is the whole block: it stays visible
//   infinity   s is infinite, the infinite values keep their sign, the finite ones of the block become 0
//   > 65504    s is 65504: no finite value becomes infinite
//   < 2^-25    s is 0, and so is the block
#ifndef LLM_ALLREDUCE_CODEC_TQ3_H_
#define LLM_ALLREDUCE_CODEC_TQ3_H_

#include "codec/block32.h"

namespace lar::codec {

struct Tq3 {
  static constexpr const char* kName = "tq3";
  static constexpr bool kSendsInfinity = true;
  static constexpr bool kOwnAsSent = false;
  LAR_CODEC static Block32 encode(const float (&values)[Block32::kValues]) {
    // Magnitudes are in the order of their bits, NaN the largest.
    uint32_t largest_bits = 0;
#pragma unroll
    for (int i = 0; i < Block32::kValues; ++i) {
      const uint32_t size = bits_of(values[i]) & kMagnitudeMask;
      largest_bits = size > largest_bits ? size : largest_bits;
    }
    float largest = from_bits(largest_bits);
    if (is_nan(largest)) return {0u, ~0u, kHalfNan};
    if (is_finite(largest) && largest > kLargestHalf) largest = kLargestHalf;
    Block32 out{0u, 0u, half_bits(largest)};
    const float threshold = multiply(from_half_bits(out.scale), 0.5f);
    if (threshold == 0.0f) return {0u, 0u, 0};
#pragma unroll
    for (int i = Block32::kValues - 1; i >= 0; --i) {
      out.first = behind(out.first, values[i]);
      if (magnitude(values[i]) >= threshold) out.second |= 1u << i;
    }
    out.first &= out.second;
    return out;
  }

  LAR_CODEC static void decode(const Block32& block, float (&values)[Block32::kValues]) {
    const float scale = from_half_bits(block.scale);
#pragma unroll
    for (int i = 0; i < Block32::kValues; ++i) {
      const float size = (block.second >> i) & 1u ? scale : 0.0f;
      values[i] = (block.first >> i) & 1u ? from_bits(bits_of(size) ^ 0x80000000u) : size;
    }
  }
};

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_TQ3_H_
