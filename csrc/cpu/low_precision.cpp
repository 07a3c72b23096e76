// LOWPRECISION on CPU ranks: the steps of TWOSHOT with packets of a wire format in the slots.
#include <algorithm>

#include "codec/scalar.h"
#include "cpu/codec.h"
#include "cpu/two_shot.h"

namespace lar::cpu {
namespace {

class Packets {
 public:
  Packets(const lar_message& message, int world_size, lar_wire_format format, int packet_values, int packet_bytes)
      : message_(message),
        world_size_(world_size),
        format_(format),
        values_(packet_values),
        bytes_(packet_bytes),
        units_(ceil_div(message.count, packet_values)) {}

  int64_t units() const { return units_; }

  void pack(const Piece& part, char* slot) const {
    float values[kMostPacketValues];
    for (int64_t i = 0; i < part.count; ++i) {
      load(part.first + i, values);
      encode_packet(format_, values, slot + i * bytes_);
    }
  }

  void reduce(const Piece& part, const char* const* packed, char* const* outputs, int copies) const {
    char encoded[kMostPacketBytes];
    float sum[kMostPacketValues];
    for (int64_t i = 0; i < part.count; ++i) {
      sum_packet(part.first + i, packed, i, sum);
      encode_packet(format_, sum, encoded);
      for (int copy = 0; copy < copies; ++copy) std::copy_n(encoded, bytes_, outputs[copy] + i * bytes_);
      store(part.first + i, encoded);
    }
  }

  void unpack(const Piece& part, const char* slot) const {
    for (int64_t i = 0; i < part.count; ++i) store(part.first + i, slot + i * bytes_);
  }

 private:
  int64_t values_here(int64_t packet) const { return std::min<int64_t>(values_, message_.count - packet * values_); }
  int64_t offset(int64_t packet) const { return packet * values_ * element_bytes(message_.dtype); }

  // Values of this rank's input in a packet; the last packet is filled up with zeros.
  void load(int64_t packet, float* values) const {
    const int64_t here = values_here(packet);
    widen(message_.dtype, static_cast<const char*>(message_.input) + offset(packet), here, values);
    std::fill(values + here, values + values_, 0.0f);
  }

  void store(int64_t packet, const char* encoded) const {
    float values[kMostPacketValues];
    decode_packet(format_, encoded, values);
    for (int i = 0; i < values_; ++i) values[i] = codec::add(0.0f, values[i]);  // a zero is +0
    round(message_.dtype, values, values_here(packet), static_cast<char*>(message_.output) + offset(packet));
  }

  // The sum of one packet in rank order: this rank's own values as they are, the others' decoded.
  void sum_packet(int64_t packet, const char* const* packed, int64_t i, float* sum) const {
    const bool infinity_travels = sends_infinity(format_);
    std::fill_n(sum, values_, 0.0f);
    for (int source = 0; source < world_size_; ++source) {
      float values[kMostPacketValues];
      const bool own = packed[source] == nullptr;
      if (own)
        load(packet, values);
      else
        decode_packet(format_, packed[source] + i * bytes_, values);
      for (int j = 0; j < values_; ++j)
        sum[j] = codec::add(sum[j], own && !infinity_travels ? codec::infinity_as_nan(values[j]) : values[j]);
    }
    if (!infinity_travels)
      for (int j = 0; j < values_; ++j) sum[j] = codec::largest_for_infinity(sum[j]);
    // Behind the message's end a rotated block decodes to something, which must not count.
    std::fill(sum + values_here(packet), sum + values_, 0.0f);
  }

  const lar_message& message_;
  const int world_size_;
  const lar_wire_format format_;
  const int values_;  // of a packet
  const int bytes_;
  const int64_t units_;
};

}  // namespace
}  // namespace lar::cpu

extern "C" int lar_low_precision_cpu(const lar_workspace* workspace, const lar_message* message,
                                     const lar_launch* shape, lar_wire_format format) {
  using namespace lar;
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  if (const int status = check_call(workspace, message, shape, workspace->layout.flagged.two_shot_bytes);
      status != LAR_OK)
    return status;
  int32_t values = 0;
  int32_t bytes = 0;
  if (const int status = lar_packet_size(format, &values, &bytes); status != LAR_OK) return status;
  const int64_t chunk = shape->chunk_vectors * LAR_VECTOR_BYTES / bytes;
  if (chunk < 1) return LAR_ERROR_INVALID_ARGUMENT;
  if (workspace->failure->state != 0) return LAR_ERROR_TIMEOUT;  // the group is broken for good
  if (message->count == 0) return LAR_OK;
  const cpu::Packets packets(*message, workspace->layout.world_size, format, values, bytes);
  return cpu::TwoShotSteps(*workspace, LAR_LOW_PRECISION, packets, chunk).run();
}
