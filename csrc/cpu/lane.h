// A CPU rank's side of the lane protocol of device/lane.cuh: one lane, one thread, the same flags and epochs.
#ifndef LLM_ALLREDUCE_CPU_LANE_H_
#define LLM_ALLREDUCE_CPU_LANE_H_

#include "cpu/call.h"

namespace lar::cpu {

class Lane {
 public:
  Lane(const Call& call, EpochPlane epochs) : call_(call), workspace_(call.workspace()), epochs_(epochs) {}

  uint32_t epoch() const { return *epoch_word(workspace_.local, workspace_.layout, epochs_, 0); }
  void finish(uint32_t epoch) const { *epoch_word(workspace_.local, workspace_.layout, epochs_, 0) = epoch; }

  static constexpr uint32_t kAllPeers = ~0u;

  // Tells the peers (bit r: rank r) that all that was stored so far belongs to `round` and may be read.
  void publish(FlagPlane plane, uint32_t round, uint32_t peers = kAllPeers) const;

  // Waits until each of the peers has published `round`. False, with the failure on record, when one did not in time,
  // makes another call, or the wait was interrupted.
  bool wait(FlagPlane plane, lar_phase phase, uint32_t round, uint32_t peers = kAllPeers) const;

  // The status of a call in which a wait has failed.
  int broken() const { return call_.broken(); }

  // The slot for what `source` has for `reader`; `shared`: for all readers alike.
  char* slot(int64_t region_offset, int64_t slot_bytes, int reader, int source, uint32_t round, bool shared) const {
    return flagged_slot(workspace_, region_offset, slot_bytes, round % LAR_SLOTS, reader, source, 0, shared);
  }

 private:
  bool is_meant(int peer, uint32_t peers) const { return peer != workspace_.rank && (peers >> peer & 1u) != 0; }
  void* own_base() const { return workspace_.base[workspace_.rank]; }
  bool wait_for(int peer, FlagPlane plane, lar_phase phase, uint32_t round, int64_t start_ns) const;
  int64_t patience_ns(int peer) const;

  const Call& call_;
  const lar_workspace& workspace_;
  const EpochPlane epochs_;
};

// output[i] = sources[0][i] + sources[1][i] + ..., in fp32 from +0, in that order, rounded once: the arithmetic of
// device/vector.cuh. `output` may lie in several places at once: it is written to each of `outputs`.
void reduce_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, void* const* outputs,
                          int num_outputs, int64_t count);

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_LANE_H_
