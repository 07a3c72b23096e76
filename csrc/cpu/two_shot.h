// The steps of a two-shot on a CPU rank: one lane, chunk by chunk with three chunks in flight, as in
// kernels/two_shot.cu, which says why that needs no barrier.
#ifndef LLM_ALLREDUCE_CPU_TWO_SHOT_H_
#define LLM_ALLREDUCE_CPU_TWO_SHOT_H_

#include <algorithm>

#include "cpu/lane.h"

namespace lar::cpu {

// The units of a message that `owner` reduces: [first, first + count).
struct Piece {
  int64_t first;
  int64_t count;
};

// `Cargo` is what travels, in units that it knows the size of:
//   int64_t units()                       in the message
//   void pack(Piece, char* slot)          this rank's own, for their owner
//   void reduce(Piece, sources, outputs, copies)
//                                         sums the packed units of all ranks, of which sources[rank] is null for this
//                                         rank's own, stores the result and writes it, packed, to so many outputs
//   void unpack(Piece, const char* slot)  stores a peer's result
template <typename Cargo>
class TwoShotSteps {
 public:
  // `chunk`: units that fit a slot.
  TwoShotSteps(const Call& call, const Cargo& cargo, int64_t chunk)
      : workspace_(call.workspace()),
        layout_(workspace_.layout),
        slots_(layout_.flagged),
        lane_(call, EpochPlane::kTwoShot),
        cargo_(cargo),
        chunk_(chunk),
        epoch_(lane_.epoch()) {}

  int run() const {
    const int64_t chunks = ceil_div(cargo_.units(), chunk_ * layout_.world_size);
    for (int64_t step = 0; step < chunks + 2; ++step) {
      if (step < chunks) scatter(step);
      if (step >= 1 && step <= chunks && !reduce(step - 1)) return lane_.broken();
      if (step >= 2 && !drain(step - 2)) return lane_.broken();
    }
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
    return LAR_OK;
  }

 private:
  Piece piece(int64_t chunk, int owner) const {
    const int64_t first = std::min((chunk * layout_.world_size + owner) * chunk_, cargo_.units());
    return {first, std::min(chunk_, cargo_.units() - first)};
  }

  uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  char* scatter_slot(int owner, int source, int64_t chunk) const {
    return lane_.slot(slots_.scatter_offset, slots_.two_shot_bytes, owner, source, round(chunk), false);
  }

  char* gather_slot(int reader, int owner, int64_t chunk) const {
    return lane_.slot(slots_.gather_offset, slots_.two_shot_bytes, reader, owner, round(chunk), true);
  }

  int peer(int step) const { return (workspace_.rank + step) % layout_.world_size; }

  void scatter(int64_t chunk) const {
    for (int step = 1; step < layout_.world_size; ++step)
      cargo_.pack(piece(chunk, peer(step)), scatter_slot(peer(step), workspace_.rank, chunk));
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
  }

  bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const int rank = workspace_.rank;
    const char* sources[LAR_MAX_WORLD_SIZE];
    char* outputs[LAR_MAX_WORLD_SIZE];
    for (int other = 0; other < layout_.world_size; ++other)
      sources[other] = other == rank ? nullptr : scatter_slot(rank, other, chunk);
    const int copies = shared_copies(layout_);
    for (int step = 1; step <= copies; ++step) outputs[step - 1] = gather_slot(peer(step), rank, chunk);
    cargo_.reduce(piece(chunk, rank), sources, outputs, copies);
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;
    for (int step = 1; step < layout_.world_size; ++step)
      cargo_.unpack(piece(chunk, peer(step)), gather_slot(workspace_.rank, peer(step), chunk));
    return true;
  }

  const lar_workspace& workspace_;
  const lar_layout& layout_;
  const lar_slots& slots_;
  const Lane lane_;
  const Cargo& cargo_;
  const int64_t chunk_;
  const uint32_t epoch_;
};

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_TWO_SHOT_H_
