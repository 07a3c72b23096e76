// A CPU rank's side of the lane protocol of device/lane.cuh: one lane, one thread, the same flags and epochs.
#ifndef LLM_ALLREDUCE_CPU_LANE_H_
#define LLM_ALLREDUCE_CPU_LANE_H_

#include "common.h"

namespace lar::cpu {

class Lane {
 public:
  // `reported`: the algorithm that an expired wait names, where it is not the one whose rounds are counted.
  Lane(const lar_workspace& workspace, lar_algorithm algorithm, lar_algorithm reported)
      : workspace_(workspace), algorithm_(algorithm), reported_(reported) {}
  Lane(const lar_workspace& workspace, lar_algorithm algorithm) : Lane(workspace, algorithm, algorithm) {}

  uint32_t epoch() const { return *epoch_word(own_base(), workspace_.layout, algorithm_, 0); }
  void finish(uint32_t epoch) const { *epoch_word(own_base(), workspace_.layout, algorithm_, 0) = epoch; }

  // Tells every peer that all that was stored so far belongs to `round` and may be read.
  void publish(FlagPlane plane, uint32_t round) const;

  // Waits until every peer has published `round`; false, with the failure on record, when one did not in time.
  bool wait(FlagPlane plane, lar_phase phase, uint32_t round) const;

  // Slot for the bytes of rank `source` at rank `holder`.
  char* slot(int64_t region_offset, int64_t chunk_bytes, int holder, int source, int ring) const {
    return static_cast<char*>(workspace_.base[holder]) +
           slot_offset(workspace_.layout, region_offset, chunk_bytes, ring, source, 0);
  }

 private:
  void* own_base() const { return workspace_.base[workspace_.rank]; }

  const lar_workspace& workspace_;
  const lar_algorithm algorithm_;
  const lar_algorithm reported_;
};

// output[i] = sources[0][i] + sources[1][i] + ..., in fp32 from +0, in that order, rounded once: the arithmetic of
// device/vector.cuh. `output` may lie in several places at once: it is written to each of `outputs`.
void reduce_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, void* const* outputs,
                          int num_outputs, int64_t count);

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_LANE_H_
