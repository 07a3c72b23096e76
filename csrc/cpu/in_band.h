// A CPU rank's side of the in-band exchange (protocol/generations.h): the slots, markers, clears and epochs of the
// default protocol of GPUs, with one lane.
#ifndef LLM_ALLREDUCE_CPU_IN_BAND_H_
#define LLM_ALLREDUCE_CPU_IN_BAND_H_

#include <vector>

#include "cpu/wait.h"
#include "protocol/generations.h"

namespace lar::cpu {

// Whole vectors on their way to a slot, or from one.
using Vectors = std::vector<uint32_t>;

// Enough for `bytes`; what lies behind them is zero.
Vectors vectors_for(int64_t bytes);
inline char* bytes_of(Vectors& vectors) { return reinterpret_cast<char*>(vectors.data()); }

// A slot, and who may write there.
struct Slot {
  char* address;
  int writer;
};

// One in-band call of an algorithm, which is one round.
class InBandCall {
 public:
  InBandCall(const Call& call, lar_algorithm algorithm);

  // Pushed: the slot with `holder` for what `writer` pushes; `region`: those of the first generation,
  // [peer][slot_bytes].
  Slot pushed(int64_t region, int64_t slot_bytes, int holder, int writer) const;
  // Shared: the slot for what `writer` stores once; regions of [generation][slot_bytes].
  Slot shared(int64_t region, int64_t slot_bytes, int writer) const;

  // Stores whole vectors, word by word. Markers among them become zeros.
  void store(const Slot& slot, const Vectors& vectors) const;

  // Waits until every vector has arrived. False, with the failure on record, as Lane::wait().
  bool take(const Slot& slot, lar_phase phase, Vectors& vectors) const;

  // Pushed: restores the markers behind what was taken.
  void clear(const Slot& slot, const Vectors& vectors) const;

  // Shared: notes that so many vectors lie in this rank's slots of this call, and says how many lay there two calls
  // ago, in cleared_generation().
  int64_t exchange_length(int64_t vectors) const;

  // Ends the call.
  void finish() const;

  uint32_t epoch() const { return epoch_; }
  const lar_workspace& workspace() const { return workspace_; }

 private:
  const Call& call_;
  const lar_workspace& workspace_;
  const EpochPlane epochs_;
  const LengthPlane lengths_;
  const uint32_t epoch_;
};

// Restores the markers of so many vectors.
void clear_vectors(char* address, int64_t vectors);

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_IN_BAND_H_
