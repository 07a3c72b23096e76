// LOWPRECISION over two domains on CPU ranks: the steps of protocol/hierarchy.h, one lane.
#include <algorithm>

#include "cpu/lane.h"
#include "cpu/packets.h"
#include "host/refusal.h"
#include "host/registry.h"
#include "protocol/hierarchy.h"

namespace lar::cpu {
namespace {

class HierarchicalSteps {
 public:
  // `chunk`: packets that fit a slot.
  HierarchicalSteps(const Call& call, const Domains& domains, const Packets& packets, int64_t chunk)
      : rank_(call.workspace().rank),
        layout_(call.workspace().layout),
        slots_(layout_.flagged),
        domains_(domains),
        lane_(call, EpochPlane::kTwoShot),
        packets_(packets),
        chunk_(chunk),
        chunks_(ceil_div(packets.number(), chunk * domains.members)),
        epoch_(lane_.epoch()) {}

  int run() const {
    if (!run_hierarchical(chunks_, *this)) return lane_.broken();
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks_));
    return LAR_OK;
  }

  bool scatter(int64_t chunk) const {
    for_others([&](int index, int owner) {
      char* slot = scatter_slot(owner, rank_, chunk);
      for_each(chunk, index, [&](int64_t packet, int64_t at) { packets_.encode(packet, slot + at); });
    });
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk), receivers_in(domains_, chunk, chunks_));
    return true;
  }

  bool partial(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk), members())) return false;
    char* theirs = scatter_slot(domains_.counterpart, rank_, chunk);
    char* kept = scatter_slot(rank_, rank_, chunk);
    float sum[kMostPacketValues];
    for_each(chunk, domains_.index, [&](int64_t packet, int64_t at) {
      packets_.clear(sum);
      for (int i = 0; i < domains_.members; ++i) {
        if (i == domains_.index)
          packets_.add_own(packet, sum);
        else
          packets_.add(scatter_slot(rank_, domains_.member[i], chunk) + at, sum);
      }
      packets_.encode_sum(packet, sum, kept + at);
      std::copy_n(kept + at, packets_.bytes(), theirs + at);
    });
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk), counterpart());
    return true;
  }

  bool combine(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_EXCHANGE, round(chunk), counterpart())) return false;
    const char* partials[2] = {scatter_slot(rank_, rank_, chunk), scatter_slot(rank_, domains_.counterpart, chunk)};
    if (!domains_.is_first) std::swap(partials[0], partials[1]);
    char encoded[kMostPacketBytes];
    float sum[kMostPacketValues];
    for_each(chunk, domains_.index, [&](int64_t packet, int64_t at) {
      packets_.clear(sum);
      for (const char* part : partials) packets_.add(part + at, sum);
      packets_.encode_sum(packet, sum, encoded);
      if (layout_.shared)
        std::copy_n(encoded, packets_.bytes(), gather_slot(rank_, rank_, chunk) + at);
      else
        for_others(
            [&](int, int reader) { std::copy_n(encoded, packets_.bytes(), gather_slot(reader, rank_, chunk) + at); });
      packets_.store(packet, encoded);
    });
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk), receivers_in(domains_, chunk, chunks_));
    return true;
  }

  bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk), members())) return false;
    for_others([&](int index, int owner) {
      const char* slot = gather_slot(rank_, owner, chunk);
      for_each(chunk, index, [&](int64_t packet, int64_t at) { packets_.store(packet, slot + at); });
    });
    return true;
  }

 private:
  uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }
  SomePeers counterpart() const { return {1u << domains_.counterpart}; }
  SomePeers members() const { return {domains_.bits}; }

  char* scatter_slot(int reader, int source, int64_t chunk) const {
    return lane_.slot(slots_.scatter_offset, slots_.two_shot_bytes, reader, source, round(chunk), false);
  }

  char* gather_slot(int reader, int owner, int64_t chunk) const {
    return lane_.slot(slots_.gather_offset, slots_.two_shot_bytes, reader, owner, round(chunk), true);
  }

  // body(packet, its offset in the slot) for the part of the member with this index.
  template <typename Body>
  void for_each(int64_t chunk, int index, Body body) const {
    const int64_t first = (chunk * domains_.members + index) * chunk_;
    const int64_t end = std::min(first + chunk_, packets_.number());
    for (int64_t packet = first; packet < end; ++packet) body(packet, (packet - first) * packets_.bytes());
  }

  // body(index, rank) for the other members of this rank's domain.
  template <typename Body>
  void for_others(Body body) const {
    for (int step = 1; step < domains_.members; ++step) {
      const int index = (domains_.index + step) % domains_.members;
      body(index, domains_.member[index]);
    }
  }

  const int rank_;
  const lar_layout& layout_;
  const lar_slots& slots_;
  const Domains& domains_;
  const Lane lane_;
  const Packets& packets_;
  const int64_t chunk_;
  const int64_t chunks_;
  const uint32_t epoch_;
};

int hierarchical_flags(const lar_workspace& workspace, const lar_call& described) {
  const lar_message& message = described.message;
  Domains domains;
  if (!make_domains(described.domains, workspace.layout.world_size, workspace.rank, &domains))
    return refuse("domains: not two of equal size, of 2 to 4 ranks each");
  Call call(workspace, described);
  if (const int status = call.begin(); status != LAR_OK) return status;
  if (message.count == 0) return LAR_OK;
  const Packets packets(message, static_cast<lar_wire>(described.kind.wire));
  const int64_t chunk = described.launch.chunk_vectors * LAR_VECTOR_BYTES / packets.bytes();
  return HierarchicalSteps(call, domains, packets, chunk).run();
}

const Registration rows([] {
  for (const lar_wire wire : wires_of_any_owner())
    add_cpu(kind_of(LAR_HIERARCHICAL, LAR_FLAGS, wire), hierarchical_flags);
});

}  // namespace
}  // namespace lar::cpu
