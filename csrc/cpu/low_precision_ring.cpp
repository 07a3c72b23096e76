// The ring of LOWPRECISION on CPU ranks: the hops of ring.h, one lane.
#include <algorithm>

#include "cpu/lane.h"
#include "cpu/packets.h"
#include "ring.h"

namespace lar::cpu {
namespace {

class RingSteps {
 public:
  // `chunk`: packets whose values fit a slot.
  RingSteps(const Call& call, const Packets& packets, int64_t chunk)
      : slots_(call.workspace().layout.flagged),
        ring_{call.workspace().rank, call.workspace().layout.world_size},
        lane_(call, EpochPlane::kTwoShot),
        packets_(packets),
        chunk_(chunk),
        hops_(ceil_div(packets.number(), chunk * ring_.world_size) * ring_.hops_of_chunk()),
        epoch_(lane_.epoch()) {}

  int run() const {
    for (int64_t step = 0; step <= hops_; ++step) {
      if (step > 0 && !has_arrived(step - 1)) return lane_.broken();
      if (step < hops_ && Ring::credit_for(step) >= 0 && !has_credit(Ring::credit_for(step))) return lane_.broken();
      if (step > 0) receive(step - 1);
      if (step < hops_ && step % ring_.hops_of_chunk() == 0) begin(step);
      const bool is_last_hop = step == hops_ - 1;
      if (step < hops_)
        lane_.publish(FlagPlane::kTwoShotScatter, round(step),
                      is_last_hop ? Ring::everyone() : Ring::only(ring_.successor()));
      if (step > 0)
        lane_.publish(FlagPlane::kTwoShotGather, round(step - 1),
                      step == hops_ ? Ring::everyone() : Ring::only(ring_.predecessor()));
    }
    if (!has_credit(hops_ - 1)) return lane_.broken();
    lane_.finish(epoch_ + static_cast<uint32_t>(hops_));
    return LAR_OK;
  }

 private:
  uint32_t round(int64_t hop) const { return epoch_ + static_cast<uint32_t>(hop) + 1; }

  bool has_arrived(int64_t hop) const {
    return lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(hop), Ring::only(ring_.predecessor()));
  }

  bool has_credit(int64_t hop) const {
    return lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(hop), Ring::only(ring_.successor()));
  }

  char* slot(int reader, int source, int64_t hop) const {
    return lane_.slot(slots_.scatter_offset, slots_.two_shot_bytes, reader, source, round(hop), false);
  }

  // body(packet, its place in the slot) for a part of the chunk that `hop` belongs to.
  template <typename Body>
  void for_each(int64_t hop, int part, Body body) const {
    const int64_t first = (hop / ring_.hops_of_chunk() * ring_.world_size + part) * chunk_;
    const int64_t end = std::min(first + chunk_, packets_.number());
    for (int64_t packet = first; packet < end; ++packet) body(packet, packet - first);
  }

  // This rank's own values, at the first hop of a chunk.
  void begin(int64_t hop) const {
    char* to = slot(ring_.successor(), ring_.rank, hop);
    for_each(hop, ring_.rank, [&](int64_t packet, int64_t i) { packets_.encode(packet, to + i * packets_.bytes()); });
  }

  void receive(int64_t hop) const {
    const int64_t raw_bytes = packets_.raw_bytes();
    const int64_t bytes = packets_.bytes();
    const int hop_of_chunk = static_cast<int>(hop % ring_.hops_of_chunk());
    const bool is_last = ring_.is_last(hop_of_chunk);
    const char* from = slot(ring_.rank, ring_.predecessor(), hop);
    char* to = slot(ring_.successor(), ring_.rank, hop + 1);
    const int part = ring_.received_part(hop_of_chunk);
    float sum[kMostPacketValues];
    for_each(hop, part, [&](int64_t packet, int64_t i) {
      if (!ring_.is_sum(hop_of_chunk)) {
        packets_.store_raw(packet, from + i * raw_bytes);
        if (!is_last) std::copy_n(from + i * raw_bytes, raw_bytes, to + i * raw_bytes);
        return;
      }
      packets_.clear(sum);
      packets_.add(from + i * bytes, sum);
      packets_.add_own(packet, sum);
      if (!ring_.is_complete(hop_of_chunk)) return packets_.encode_sum(packet, sum, to + i * bytes);
      packets_.round_sum(sum, to + i * raw_bytes);
      packets_.store_raw(packet, to + i * raw_bytes);
    });
  }

 private:
  const lar_slots& slots_;
  const Ring ring_;
  const Lane lane_;
  const Packets& packets_;
  const int64_t chunk_;
  const int64_t hops_;
  const uint32_t epoch_;
};

}  // namespace
}  // namespace lar::cpu

extern "C" int lar_low_precision_ring_cpu(const lar_workspace* workspace, const lar_message* message,
                                          const lar_launch* shape, lar_wire_format format) {
  using namespace lar;
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  if (const int status = check_call(workspace, message, shape, workspace->layout.flagged.two_shot_bytes);
      status != LAR_OK)
    return status;
  int32_t values = 0;
  int32_t bytes = 0;
  if (const int status = lar_packet_size(format, &values, &bytes); status != LAR_OK) return status;
  const int64_t chunk = shape->chunk_vectors * LAR_VECTOR_BYTES / raw_packet_bytes(values, message->dtype);
  if (chunk < 1 || workspace->layout.world_size > kMostCompressingRanks) return LAR_ERROR_INVALID_ARGUMENT;
  cpu::Call call(*workspace, LAR_LOW_PRECISION_RING, *message, format);
  if (const int status = call.begin(); status != LAR_OK) return status;
  if (message->count == 0) return LAR_OK;
  const cpu::Packets packets(*message, format, values, bytes);
  return cpu::RingSteps(call, packets, chunk).run();
}
