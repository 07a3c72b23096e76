// LOWPRECISION on CPU ranks: TWOSHOT (cpu/two_shot.cpp) with packets of a wire format in the slots.
#include <algorithm>

#include "codec/scalar.h"
#include "cpu/codec.h"
#include "cpu/lane.h"

namespace lar::cpu {
namespace {

class LowPrecisionLane {
 public:
  LowPrecisionLane(const lar_workspace& workspace, const lar_message& message, int64_t chunk_bytes,
                   lar_wire_format format, int packet_values, int packet_bytes)
      : workspace_(workspace),
        layout_(workspace.layout),
        message_(message),
        lane_(workspace, LAR_TWO_SHOT, LAR_LOW_PRECISION),
        format_(format),
        packet_values_(packet_values),
        packet_bytes_(packet_bytes),
        packets_(ceil_div(message.count, packet_values)),
        chunk_(chunk_bytes / packet_bytes),
        epoch_(lane_.epoch()) {}

  int run() const {
    const int64_t chunks = ceil_div(packets_, chunk_ * layout_.world_size);
    for (int64_t step = 0; step < chunks + 2; ++step) {
      if (step < chunks) scatter(step);
      if (step >= 1 && step <= chunks && !reduce(step - 1)) return LAR_ERROR_TIMEOUT;
      if (step >= 2 && !drain(step - 2)) return LAR_ERROR_TIMEOUT;
    }
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
    return LAR_OK;
  }

 private:
  // The packets of `chunk` that `owner` reduces.
  struct Piece {
    int64_t first;
    int64_t count;
  };

  Piece piece(int64_t chunk, int owner) const {
    const int64_t first = std::min((chunk * layout_.world_size + owner) * chunk_, packets_);
    return {first, std::min(chunk_, packets_ - first)};
  }

  uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  char* slot(int64_t region, int holder, int source, int64_t chunk) const {
    return lane_.slot(region, layout_.two_shot_chunk_bytes, holder, source, round(chunk) % LAR_SLOTS);
  }

  int peer(int step) const { return (workspace_.rank + step) % layout_.world_size; }

  // Values of this rank's input in a packet; the last packet is filled up with zeros.
  void load(int64_t packet, float* values) const {
    const int64_t first = packet * packet_values_;
    const int64_t here = std::min<int64_t>(packet_values_, message_.count - first);
    widen(message_.dtype, static_cast<const char*>(message_.input) + first * element_bytes(message_.dtype), here,
          values);
    std::fill(values + here, values + packet_values_, 0.0f);
  }

  void store(int64_t packet, const char* encoded) const {
    float values[kMostPacketValues];
    decode_packet(format_, encoded, values);
    for (int i = 0; i < packet_values_; ++i) values[i] = codec::add(0.0f, values[i]);  // a zero is +0
    const int64_t first = packet * packet_values_;
    cpu::round(message_.dtype, values, std::min<int64_t>(packet_values_, message_.count - first),
               static_cast<char*>(message_.output) + first * element_bytes(message_.dtype));
  }

  void scatter(int64_t chunk) const {
    float values[kMostPacketValues];
    for (int step = 1; step < layout_.world_size; ++step) {
      const Piece part = piece(chunk, peer(step));
      char* to = slot(layout_.scatter_offset, peer(step), workspace_.rank, chunk);
      for (int64_t i = 0; i < part.count; ++i) {
        load(part.first + i, values);
        encode_packet(format_, values, to + i * packet_bytes_);
      }
    }
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
  }

  // The sum of one packet in rank order: this rank's own values as they are, the others' decoded.
  void sum_packet(int64_t chunk, int64_t packet, int64_t i, float* sum) const {
    const bool infinity_travels = sends_infinity(format_);
    std::fill_n(sum, packet_values_, 0.0f);
    for (int source = 0; source < layout_.world_size; ++source) {
      float values[kMostPacketValues];
      const bool own = source == workspace_.rank;
      if (own)
        load(packet, values);
      else
        decode_packet(format_, slot(layout_.scatter_offset, workspace_.rank, source, chunk) + i * packet_bytes_,
                      values);
      for (int j = 0; j < packet_values_; ++j)
        sum[j] = codec::add(sum[j], own && !infinity_travels ? codec::infinity_as_nan(values[j]) : values[j]);
    }
    if (!infinity_travels)
      for (int j = 0; j < packet_values_; ++j) sum[j] = codec::largest_for_infinity(sum[j]);
    // Behind the message's end a rotated block decodes to something, which must not count.
    const int64_t here = message_.count - packet * packet_values_;
    if (here < packet_values_) std::fill(sum + here, sum + packet_values_, 0.0f);
  }

  bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const Piece part = piece(chunk, workspace_.rank);
    char encoded[kMostPacketBytes];
    float sum[kMostPacketValues];
    for (int64_t i = 0; i < part.count; ++i) {
      sum_packet(chunk, part.first + i, i, sum);
      encode_packet(format_, sum, encoded);
      for (int step = 1; step < layout_.world_size; ++step)
        std::copy_n(encoded, packet_bytes_,
                    slot(layout_.gather_offset, peer(step), workspace_.rank, chunk) + i * packet_bytes_);
      store(part.first + i, encoded);
    }
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;
    for (int step = 1; step < layout_.world_size; ++step) {
      const Piece part = piece(chunk, peer(step));
      const char* from = slot(layout_.gather_offset, workspace_.rank, peer(step), chunk);
      for (int64_t i = 0; i < part.count; ++i) store(part.first + i, from + i * packet_bytes_);
    }
    return true;
  }

  const lar_workspace& workspace_;
  const lar_layout& layout_;
  const lar_message& message_;
  const Lane lane_;
  const lar_wire_format format_;
  const int packet_values_;
  const int packet_bytes_;
  const int64_t packets_;
  const int64_t chunk_;  // packets of a slot
  const uint32_t epoch_;
};

}  // namespace
}  // namespace lar::cpu

extern "C" int lar_low_precision_cpu(const lar_workspace* workspace, const lar_message* message,
                                     const lar_launch* shape, lar_wire_format format) {
  using namespace lar;
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  if (const int status = check_call(workspace, message, shape, workspace->layout.two_shot_chunk_bytes);
      status != LAR_OK)
    return status;
  int32_t values = 0;
  int32_t bytes = 0;
  if (const int status = lar_packet_size(format, &values, &bytes); status != LAR_OK) return status;
  const int64_t chunk_bytes = shape->chunk_vectors * LAR_VECTOR_BYTES;
  if (chunk_bytes < bytes) return LAR_ERROR_INVALID_ARGUMENT;
  if (workspace->failure->state != 0) return LAR_ERROR_TIMEOUT;  // the group is broken for good
  if (message->count == 0) return LAR_OK;
  return cpu::LowPrecisionLane(*workspace, *message, chunk_bytes, format, values, bytes).run();
}
