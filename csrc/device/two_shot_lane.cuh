// A two-shot by flags, each lane alone (device/lane.cuh) on its share of every part, with three chunks in flight:
//
//     step s:  scatter  chunk s      store my partials into their owners' scatter slots, publish
//              reduce   chunk s-1    wait, sum ranks 0..N-1 in order, round once, store to all, publish
//              drain    chunk s-2    wait, copy the other owners' results to the output
//
// Why a ring of four slots needs no barrier (three would do; four keeps the index a mask, which survives the
// wrap of the 32-bit epoch):
//   - scatter(s) overwrites chunk s-4 at its owner. The owner read that chunk before it published its result,
//     and this lane has drained the result of chunk s-3 already.
//   - reduce(s-1) overwrites chunk s-5 in the gather slots. A peer drains chunk s-5 before it publishes
//     scatter(s-2), and this lane has just seen every peer publish scatter(s-1).
// A call ends with everything drained, so the first chunks of the next call are safe by the same argument. It does not
// matter in whose workspace a slot lies: in a published layout an owner stores its results once, in its own.
#ifndef LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_
#define LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_

#include "device/lane.cuh"

namespace lar {

// The units of a chunk that one owner reduces in one lane: [first, first + span).
struct Piece {
  int64_t first;
  int64_t span;  // not positive when the message ends before this piece
};

// `Cargo` is what travels, in units that it knows the size of; every function is for the whole block:
//   units()                                     in the message
//   pack(Piece, slot)                           this rank's own, for their owner
//   reduce(Piece, rank, source_of, for_each_target)
//                                               sums the packed units of all ranks in rank order, of which this
//                                               rank's own come from its input, stores the result, and writes it,
//                                               packed, to every target
//   unpack(Piece, slot)                         stores a peer's result
template <int kWorldSize, typename Cargo>
class TwoShotLane {
 public:
  __device__ __forceinline__ TwoShotLane(const lar_workspace& workspace, lar_algorithm algorithm, const Cargo& cargo,
                                         int64_t chunk)
      : workspace_(workspace),
        slots_(workspace.layout.flagged),
        lane_(workspace, EpochPlane::kTwoShot, algorithm),
        cargo_(cargo),
        chunk_(chunk),
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() {
    const int64_t chunks = ceil_div(cargo_.units(), chunk_ * gridDim.x * kWorldSize);
    for (int64_t step = 0; step < chunks + 2; ++step) {
      if (step < chunks) scatter(step);
      if (step >= 1 && step <= chunks && !reduce(step - 1)) return;
      if (step >= 2 && !drain(step - 2)) return;
    }
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
  }

 private:
  __device__ __forceinline__ Piece piece(int64_t chunk, int owner) const {
    const int64_t first = ((chunk * kWorldSize + owner) * gridDim.x + lane_.index()) * chunk_;
    return {first, min(chunk_, cargo_.units() - first)};
  }

  __device__ __forceinline__ uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  __device__ __forceinline__ char* scatter_slot(int owner, int source, int64_t chunk) const {
    return flagged_slot(workspace_, slots_.scatter_offset, slots_.two_shot_bytes, round(chunk) % LAR_SLOTS, owner,
                        source, lane_.index(), false);
  }

  __device__ __forceinline__ char* gather_slot(int reader, int owner, int64_t chunk) const {
    return flagged_slot(workspace_, slots_.gather_offset, slots_.two_shot_bytes, round(chunk) % LAR_SLOTS, reader,
                        owner, lane_.index(), true);
  }

  __device__ __forceinline__ void scatter(int64_t chunk) const {
    const int rank = workspace_.rank;
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) {
      const int owner = rotated<kWorldSize>(rank, step);
      cargo_.pack(piece(chunk, owner), scatter_slot(owner, rank, chunk));
    }
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
  }

  __device__ __forceinline__ bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const int rank = workspace_.rank;
    const char* first_source = scatter_slot(rank, 0, chunk);
    const int64_t stride = workspace_.layout.lanes * slots_.two_shot_bytes;  // from source to source
    const int copies = shared_copies(workspace_.layout);
    cargo_.reduce(
        piece(chunk, rank), rank, [&](int source) { return first_source + source * stride; },
        [&](auto store) {
#pragma unroll kPeersAtOnce < kWorldSize>
          for (int step = 1; step < kWorldSize; ++step)
            if (step <= copies) store(gather_slot(rotated<kWorldSize>(rank, step), rank, chunk));
        });
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  __device__ __forceinline__ bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;
    const int rank = workspace_.rank;
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) {
      const int owner = rotated<kWorldSize>(rank, step);
      cargo_.unpack(piece(chunk, owner), gather_slot(rank, owner, chunk));
    }
    return true;
  }

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const Lane lane_;
  const Cargo& cargo_;
  const int64_t chunk_;
  const uint32_t epoch_;
};

template <int kWorldSize, typename Cargo>
__device__ __forceinline__ void two_shot_lane(const lar_workspace& workspace, lar_algorithm algorithm,
                                              const Cargo& cargo, int64_t chunk) {
  TwoShotLane<kWorldSize, Cargo>(workspace, algorithm, cargo, chunk).run();
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_
