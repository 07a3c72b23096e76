// Packets of the wire formats on the CPU.
#ifndef LLM_ALLREDUCE_CPU_CODEC_H_
#define LLM_ALLREDUCE_CPU_CODEC_H_

#include <vector>

#include "host/layout.h"

namespace lar::cpu {

constexpr int kMostPacketValues = 1024;  // of any format
constexpr int kMostPacketBytes = 512;

// One packet from all its values, and back.
void encode_packet(lar_wire format, const float* values, char* packet);
void decode_packet(lar_wire format, const char* packet, float* values);

// All formats but raw.
std::vector<lar_wire> packet_wires();

// Those of them whose sums may depend on who owns what: rings and hierarchies have these alone.
std::vector<lar_wire> wires_of_any_owner();

bool sends_infinity(lar_wire format);

// Whether a rank's own values count in a sum as its peers see them.
bool own_as_sent(lar_wire format);

// fp32 from `count` elements of any alignment, and back with one rounding.
void widen(lar_dtype dtype, const void* elements, int64_t count, float* values);
void round(lar_dtype dtype, const float* values, int64_t count, void* elements);

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_CODEC_H_
