// The ring of LOWPRECISION on CPU ranks: the hops of ring.h, one lane.
#include <algorithm>

#include "cpu/lane.h"
#include "cpu/packets.h"
#include "host/registry.h"
#include "protocol/ring.h"

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
    if (!run_ring(ring_, hops_, *this)) return lane_.broken();
    lane_.finish(epoch_ + static_cast<uint32_t>(hops_));
    return LAR_OK;
  }

  bool has_arrived(int64_t hop) const {
    return lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(hop), OneOrAllPeers{ring_.predecessor()});
  }

  bool has_credit(int64_t hop) const {
    return lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(hop), OneOrAllPeers{ring_.successor()});
  }

  void tell_data(int64_t hop, OneOrAllPeers peers) const {
    lane_.publish(FlagPlane::kTwoShotScatter, round(hop), peers);
  }

  void tell_credit(int64_t hop, OneOrAllPeers peers) const {
    lane_.publish(FlagPlane::kTwoShotGather, round(hop), peers);
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
  uint32_t round(int64_t hop) const { return epoch_ + static_cast<uint32_t>(hop) + 1; }

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

  const lar_slots& slots_;
  const Ring ring_;
  const Lane lane_;
  const Packets& packets_;
  const int64_t chunk_;
  const int64_t hops_;
  const uint32_t epoch_;
};

int ring_flags(const lar_workspace& workspace, const lar_call& described) {
  const lar_message& message = described.message;
  Call call(workspace, described);
  if (const int status = call.begin(); status != LAR_OK) return status;
  if (message.count == 0) return LAR_OK;
  const Packets packets(message, static_cast<lar_wire>(described.kind.wire));
  return RingSteps(call, packets, described.launch.chunk_vectors * LAR_VECTOR_BYTES / packets.raw_bytes()).run();
}

const Registration rows([] {
  for (const lar_wire wire : wires_of_any_owner()) add_cpu(kind_of(LAR_RING, LAR_FLAGS, wire), ring_flags);
});

}  // namespace
}  // namespace lar::cpu
