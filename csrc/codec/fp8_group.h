// FP8 in groups of 32 values: e4m3 codes and, for each group, a power of two that they are multiplied by. Groups are
// counted from the message's first value: where a row is a multiple of 32 values, none has values of two rows. This is
// MXFP8 (OCP Microscaling formats 1.0: E4M3 elements, an E8M0 scale for 32 of them), but that a scale is rounded up:
// the smallest one at which no value of the group is larger than 448.
//
// A packet of 15 groups is 512 bytes, one 16-byte vector to each thread of a warp. Threads 0 to 29 carry 16 codes each,
// two threads to a group. Threads 30 and 31 carry the exponents of eight groups and of seven in their first 8 bytes;
// what is left of them is zero. An exponent is that of an fp32: 127 is a scale of 1.
//
// In a sum a rank's own values count as its peers see them. So the sum of a group depends on nothing but its values,
// whoever owns it.
//
//   NaN, infinity   the code NaN: what was not finite stays visible, in that value alone
//   all zero        the smallest scale, codes 0; a -0 becomes +0
//   subnormal       the scale does not go below 2^-126, so bf16 subnormals keep at least one bit
//   > 1.75 * 2^127  codes above 240 would be infinite at the scale of such a value: its group is multiplied by 31/32
// No finite value becomes NaN or infinite. No word of a packet is the in-band marker: no code is 0x80, no exponent is
// 0, and the byte behind the last one is.
#ifndef LLM_ALLREDUCE_CODEC_FP8_GROUP_H_
#define LLM_ALLREDUCE_CODEC_FP8_GROUP_H_

#include "codec/fp8.h"

namespace lar::codec {

struct Fp8Group : Fp8 {
  static constexpr const char* kName = "fp8_group";
  static constexpr bool kOwnAsSent = true;
  static constexpr int kGroupValues = 32;
  static constexpr int kGroups = 15;
  static constexpr int kValues = kGroups * kGroupValues;
  static constexpr int kBytes = 512;
  static constexpr uint32_t kLargestExponent = 254 - 7;

  // Where the exponent of a group lies in a packet.
  LAR_CODEC static int exponent_byte(int group) { return kValues + group + (group >= 8 ? 8 : 0); }

  // That of the scale of a group whose largest weight is `largest`: 448 has the exponent 8, and all mantissas up to its
  // own fit below it.
  LAR_CODEC static uint32_t exponent(float largest) {
    constexpr uint32_t kRoundsUp = 0x7fffffu - 0x600000u;
    const uint32_t of_largest = (bits_of(largest) + kRoundsUp) >> 23;
    return of_largest > 9 ? of_largest - 8 : 1;
  }

  // The two factors of a group.
  LAR_CODEC static float scale(uint32_t exponent) { return from_bits(exponent << 23); }
  LAR_CODEC static float multiplier(uint32_t exponent) {
    return exponent < kLargestExponent ? from_bits((254 - exponent) << 23) : 0x1.fp-121f;
  }
};

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_FP8_GROUP_H_
