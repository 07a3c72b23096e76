// A CPU rank's side of the lane protocol of device/lane.cuh: one lane, one thread, the same flags and epochs.
#ifndef LLM_ALLREDUCE_CPU_LANE_H_
#define LLM_ALLREDUCE_CPU_LANE_H_

#include "cpu/wait.h"
#include "protocol/peers.h"

namespace lar::cpu {

class Lane {
 public:
  Lane(const Call& call, EpochPlane epochs) : call_(call), workspace_(call.workspace()), epochs_(epochs) {}

  uint32_t epoch() const { return *epoch_word(workspace_.local, workspace_.layout, epochs_, 0); }
  void finish(uint32_t epoch) const { *epoch_word(workspace_.local, workspace_.layout, epochs_, 0) = epoch; }

  // Tells the peers that all that was stored so far belongs to `round` and may be read.
  template <typename Peers = AllPeers>
  void publish(FlagPlane plane, uint32_t round, Peers peers = {}) const {
    for (int peer = 0; peer < workspace_.layout.world_size; ++peer)
      if (peer != workspace_.rank && peers.has(peer)) release(peer, plane, round);
  }

  // Waits until each of the peers has published `round`. False, with the failure on record, when one did not in time,
  // makes another call, or the wait was left.
  template <typename Peers = AllPeers>
  bool wait(FlagPlane plane, lar_phase phase, uint32_t round, Peers peers = {}) const {
    const int64_t start = now_ns();
    for (int peer = 0; peer < workspace_.layout.world_size; ++peer)
      if (peer != workspace_.rank && peers.has(peer) && !acquire(peer, plane, phase, round, start)) return false;
    return true;
  }

  // The status of a call in which a wait has failed.
  int broken() const { return call_.broken(); }

  // The slot for what `source` has for `reader`; `shared`: for all readers alike.
  char* slot(int64_t region_offset, int64_t slot_bytes, int reader, int source, uint32_t round, bool shared) const {
    return flagged_slot(workspace_, region_offset, slot_bytes, round % LAR_SLOTS, reader, source, 0, shared);
  }

 private:
  void release(int peer, FlagPlane plane, uint32_t round) const;
  bool acquire(int peer, FlagPlane plane, lar_phase phase, uint32_t round, int64_t start_ns) const;

  const Call& call_;
  const lar_workspace& workspace_;
  const EpochPlane epochs_;
};

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_LANE_H_
