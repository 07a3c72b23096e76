// Formats of 10 bytes for 32 values: two bit planes and an fp16 scale.
//
// A packet is 32 blocks, 1024 values, one block to a thread of a warp: 128 bytes of first planes, 128 of second planes,
// 64 of scales. In runs rather than block by block, because a stride of 10 bytes would misalign every load.
#ifndef LLM_ALLREDUCE_CODEC_BLOCK32_H_
#define LLM_ALLREDUCE_CODEC_BLOCK32_H_

#include "codec/scalar.h"

namespace lar::codec {

struct Block32 {
  static constexpr int kValues = 32;
  static constexpr int kBytes = 10;
  uint32_t first;  // bit i: element i, the least significant first
  uint32_t second;
  uint16_t scale;  // fp16
};

struct Packet32 {
  static constexpr int kBlocks = 32;
  static constexpr int kValues = kBlocks * Block32::kValues;
  static constexpr int kBytes = kBlocks * Block32::kBytes;
  static constexpr int kSecondByte = kBlocks * 4;
  static constexpr int kScaleByte = kBlocks * 8;
};

LAR_CODEC Block32 load_block(const char* packet, int block) {
  Block32 out;
  memcpy(&out.first, packet + block * 4, 4);
  memcpy(&out.second, packet + Packet32::kSecondByte + block * 4, 4);
  memcpy(&out.scale, packet + Packet32::kScaleByte + block * 2, 2);
  return out;
}

LAR_CODEC void store_block(char* packet, int block, const Block32& from) {
  memcpy(packet + block * 4, &from.first, 4);
  memcpy(packet + Packet32::kSecondByte + block * 4, &from.second, 4);
  memcpy(packet + Packet32::kScaleByte + block * 2, &from.scale, 2);
}

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_BLOCK32_H_
