#include "cpu/codec.h"

#include <algorithm>
#include <cstring>

#include "codec/formats.h"
#include "cpu/float_types.h"
#include "host/check.h"
#include "host/refusal.h"

namespace lar::cpu {
namespace {

using codec::Block32;
using codec::Fp8;
using codec::Fp8Group;
using codec::Packet32;

static_assert(Fp8::kValues <= kMostPacketValues && Packet32::kValues <= kMostPacketValues);
static_assert(Fp8::kBytes <= kMostPacketBytes && Packet32::kBytes <= kMostPacketBytes);
static_assert(Fp8Group::kValues <= kMostPacketValues && Fp8Group::kBytes <= kMostPacketBytes);

void encode_packet_of(Fp8, const float* values, char* packet) {
  float largest = 0.0f;
  for (int i = 0; i < Fp8::kValues; ++i) largest = std::max(largest, Fp8::weight(values[i]));
  const float scale = Fp8::scale(largest);
  const float multiplier = Fp8::multiplier(scale);
  for (int i = 0; i < Fp8::kValues; ++i) packet[i] = static_cast<char>(Fp8::encode(values[i], multiplier));
  std::memset(packet + Fp8::kScaleByte, 0, Fp8::kBytes - Fp8::kScaleByte);
  std::memcpy(packet + Fp8::kScaleByte, &scale, sizeof(scale));
}

void decode_packet_of(Fp8, const char* packet, float* values) {
  float scale;
  std::memcpy(&scale, packet + Fp8::kScaleByte, sizeof(scale));
  for (int i = 0; i < Fp8::kValues; ++i) values[i] = Fp8::decode(static_cast<uint8_t>(packet[i]), scale);
}

void encode_packet_of(Fp8Group, const float* values, char* packet) {
  std::memset(packet + Fp8Group::kScaleByte, 0, Fp8Group::kBytes - Fp8Group::kScaleByte);
  for (int group = 0; group < Fp8Group::kGroups; ++group) {
    const int first = group * Fp8Group::kGroupValues;
    float largest = 0.0f;
    for (int i = 0; i < Fp8Group::kGroupValues; ++i) largest = std::max(largest, Fp8::weight(values[first + i]));
    const float scale = Fp8Group::scale(largest);
    const float multiplier = Fp8::multiplier(scale);
    for (int i = 0; i < Fp8Group::kGroupValues; ++i)
      packet[first + i] = static_cast<char>(Fp8::encode(values[first + i], multiplier));
    const uint16_t bits = Fp8Group::scale_bits(scale);
    std::memcpy(packet + Fp8Group::kScaleByte + group * sizeof(bits), &bits, sizeof(bits));
  }
}

void decode_packet_of(Fp8Group, const char* packet, float* values) {
  for (int i = 0; i < Fp8Group::kValues; ++i) {
    uint16_t bits;
    std::memcpy(&bits, packet + Fp8Group::kScaleByte + i / Fp8Group::kGroupValues * sizeof(bits), sizeof(bits));
    values[i] = Fp8::decode(static_cast<uint8_t>(packet[i]), Fp8Group::scale_of(bits));
  }
}

template <typename Codec>
void encode_blocks(const float* values, char* packet) {
  for (int block = 0; block < Packet32::kBlocks; ++block) {
    float part[Block32::kValues];
    std::copy_n(values + block * Block32::kValues, Block32::kValues, part);
    codec::store_block(packet, block, Codec::encode(part));
  }
}

template <typename Codec>
void decode_blocks(const char* packet, float* values) {
  for (int block = 0; block < Packet32::kBlocks; ++block) {
    float part[Block32::kValues];
    Codec::decode(codec::load_block(packet, block), part);
    std::copy_n(part, Block32::kValues, values + block * Block32::kValues);
  }
}

template <typename Type>
void widen_typed(const void* elements, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) {
    typename Type::Storage bits;
    std::memcpy(&bits, static_cast<const char*>(elements) + i * sizeof(bits), sizeof(bits));
    values[i] = Type::widen(bits);
  }
}

template <typename Type>
void round_typed(const float* values, int64_t count, void* elements) {
  for (int64_t i = 0; i < count; ++i) {
    const typename Type::Storage bits = Type::round(values[i]);
    std::memcpy(static_cast<char*>(elements) + i * sizeof(bits), &bits, sizeof(bits));
  }
}

}  // namespace

void encode_packet(lar_wire wire, const float* values, char* packet) {
  codec::with_format(wire, [&](auto format) {
    using Format = decltype(format);
    if constexpr (Format::kHasBlocks)
      encode_blocks<typename Format::Codec>(values, packet);
    else
      encode_packet_of(typename Format::Codec{}, values, packet);
  });
}

void decode_packet(lar_wire wire, const char* packet, float* values) {
  codec::with_format(wire, [&](auto format) {
    using Format = decltype(format);
    if constexpr (Format::kHasBlocks)
      decode_blocks<typename Format::Codec>(packet, values);
    else
      decode_packet_of(typename Format::Codec{}, packet, values);
  });
}

namespace {

template <typename... Format>
std::vector<lar_wire> wires_of(codec::FormatList<Format...>) {
  return {Format::kWire...};
}

}  // namespace

std::vector<lar_wire> packet_wires() { return wires_of(codec::Formats{}); }

std::vector<lar_wire> wires_of_any_owner() {
  std::vector<lar_wire> wires = packet_wires();
  wires.erase(std::remove_if(wires.begin(), wires.end(), own_as_sent), wires.end());
  return wires;
}

bool sends_infinity(lar_wire wire) {
  bool sends = true;
  codec::with_format(wire, [&](auto format) { sends = decltype(format)::Codec::kSendsInfinity; });
  return sends;
}

bool own_as_sent(lar_wire wire) {
  bool is_so = false;
  codec::with_format(wire, [&](auto format) { is_so = decltype(format)::Codec::kOwnAsSent; });
  return is_so;
}

void widen(lar_dtype dtype, const void* elements, int64_t count, float* values) {
  switch (dtype) {
    case LAR_FLOAT32:
      return widen_typed<Float32>(elements, count, values);
    case LAR_FLOAT16:
      return widen_typed<Float16>(elements, count, values);
    case LAR_BFLOAT16:
      return widen_typed<BFloat16>(elements, count, values);
  }
}

void round(lar_dtype dtype, const float* values, int64_t count, void* elements) {
  switch (dtype) {
    case LAR_FLOAT32:
      return round_typed<Float32>(values, count, elements);
    case LAR_FLOAT16:
      return round_typed<Float16>(values, count, elements);
    case LAR_BFLOAT16:
      return round_typed<BFloat16>(values, count, elements);
  }
}

}  // namespace lar::cpu

extern "C" const char* lar_wire_name(lar_wire wire) {
  const char* name = wire == LAR_WIRE_RAW ? "raw" : nullptr;
  lar::codec::with_format(wire, [&](auto format) { name = decltype(format)::Codec::kName; });
  return name;
}

extern "C" int lar_packet_size(lar_wire wire, int32_t* values, int32_t* bytes) {
  const bool is_known = lar::codec::with_format(wire, [&](auto format) {
    *values = decltype(format)::kValues;
    *bytes = decltype(format)::kBytes;
  });
  return is_known ? LAR_OK : lar::refuse("wire: there is no format of this number");
}

extern "C" int lar_encode_cpu(lar_wire format, lar_dtype dtype, const void* values, int64_t count, void* packets) {
  int32_t size = 0;
  int32_t bytes = 0;
  if (const int status = lar::check_codec_call(format, dtype, values, count, packets, &size, &bytes); status != LAR_OK)
    return status;
  float widened[lar::cpu::kMostPacketValues];
  for (int64_t first = 0; first < count; first += size) {
    const int64_t here = std::min<int64_t>(size, count - first);
    lar::cpu::widen(dtype, static_cast<const char*>(values) + first * lar::element_bytes(dtype), here, widened);
    std::fill(widened + here, widened + size, 0.0f);
    lar::cpu::encode_packet(format, widened, static_cast<char*>(packets) + first / size * bytes);
  }
  return LAR_OK;
}

extern "C" int lar_decode_cpu(lar_wire format, lar_dtype dtype, const void* packets, int64_t count, void* values) {
  int32_t size = 0;
  int32_t bytes = 0;
  if (const int status = lar::check_codec_call(format, dtype, values, count, packets, &size, &bytes); status != LAR_OK)
    return status;
  float decoded[lar::cpu::kMostPacketValues];
  for (int64_t first = 0; first < count; first += size) {
    lar::cpu::decode_packet(format, static_cast<const char*>(packets) + first / size * bytes, decoded);
    lar::cpu::round(dtype, decoded, std::min<int64_t>(size, count - first),
                    static_cast<char*>(values) + first * lar::element_bytes(dtype));
  }
  return LAR_OK;
}
