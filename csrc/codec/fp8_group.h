// FP8 in groups of 32 values: e4m3 codes, and a bf16 scale for each group. Groups are counted from the message's first
// value: where a row is a multiple of 32 values, none has values of two rows.
//
// A packet of 15 groups is 512 bytes, one 16-byte vector to each thread of a warp. Threads 0 to 29 carry 16 codes each,
// two threads to a group, threads 30 and 31 the scales; the last 2 bytes are zero.
//
// The scale is max|x| / 448 to the nearest bf16, so that the largest code still means the largest value, to 0.4 %.
//
// In a sum a rank's own values count as its peers see them. So the sum of a group depends on nothing but its values,
// whoever owns it.
//
//   NaN, infinity   the code NaN: what was not finite stays visible, in that value alone
//   all zero        the smallest scale, codes 0; a -0 becomes +0
//   subnormal       the scale does not go below 2^-126, so bf16 subnormals keep at least one bit
// No finite value becomes NaN or infinite: 448 times the largest scale, 0x1.24p119, is below 2^128. No word of a packet
// is the in-band marker: no code is 0x80, and no scale is negative.
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
  static constexpr int kScaleByte = kValues;

  // Of a group whose largest weight is `largest`; halves are rounded up.
  LAR_CODEC static float scale(float largest) {
    return from_bits((bits_of(Fp8::scale(largest)) + 0x8000u) & 0xffff0000u);
  }
  // Its 16 bits in a packet, and back.
  LAR_CODEC static uint16_t scale_bits(float scale) { return static_cast<uint16_t>(bits_of(scale) >> 16); }
  LAR_CODEC static float scale_of(uint16_t bits) { return from_bits(uint32_t{bits} << 16); }
};

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_FP8_GROUP_H_
