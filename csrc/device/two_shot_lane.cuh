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
// The courier releases the flags in that order, so a flag never runs ahead of what it stands for.
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

// `Cargo` is what travels, in units that it knows the size of; every function is for the workers:
//   kOwnersAtOnce                               pieces that pack() and unpack() are given
//   units()                                     in the message
//   pack(Piece[], slots[])                      this rank's own, for their owners
//   reduce(Piece, rank, source_of, for_each_target)
//                                               sums the packed units of all ranks in rank order, of which this
//                                               rank's own come from its input, stores the result, and writes it,
//                                               packed, to every target
//   unpack(Piece[], slots[])                    stores the peers' results
template <int kWorldSize, typename Cargo>
class TwoShotLane {
 public:
  using FlaggedLane = Lane<Crew::kWorkersAndCourier>;

  __device__ __forceinline__ TwoShotLane(const lar_workspace& workspace, lar_algorithm algorithm, const Cargo& cargo,
                                         int64_t chunk)
      : workspace_(workspace),
        slots_(workspace.layout.flagged),
        lane_(workspace, EpochPlane::kTwoShot, algorithm),
        cargo_(cargo),
        chunk_(chunk),
        chunks_(ceil_div(cargo.units(), chunk * gridDim.x * kWorldSize)),
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() {
    lane_.start();
    if (!(lane_.is_courier() ? deliver() : work())) return;
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks_));
  }

 private:
  __device__ __forceinline__ bool work() const {
    for (int64_t step = 0; step < chunks_ + 2; ++step) {
      if (step < chunks_) scatter(step);
      if (step >= 1 && step <= chunks_ && !reduce(step - 1)) return false;
      if (step >= 2 && !drain(step - 2)) return false;
    }
    return true;
  }

  // What scatter() and reduce() publish.
  __device__ __forceinline__ bool deliver() const {
    for (int64_t step = 0; step <= chunks_; ++step) {
      if (step < chunks_ && !lane_.deliver(FlagPlane::kTwoShotScatter, round(step))) return false;
      if (step >= 1 && !lane_.deliver(FlagPlane::kTwoShotGather, round(step - 1))) return false;
    }
    return true;
  }

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

  // body(parts, slots) for the other ranks, some at a time: of a chunk, the part of each owner and slot_of(owner).
  template <typename SlotOf, typename Body>
  __device__ __forceinline__ void for_all_owners(int64_t chunk, SlotOf slot_of, Body body) const {
    constexpr int kAtOnce = Cargo::kOwnersAtOnce;
#pragma unroll 1
    for (int first = 1; first < kWorldSize; first += kAtOnce) {
      Piece parts[kAtOnce];
      char* slots[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const bool is_peer = (kWorldSize - 1) % kAtOnce == 0 || first + j < kWorldSize;
        const int owner = rotated<kWorldSize>(workspace_.rank, is_peer ? first + j : 0);
        parts[j] = piece(chunk, owner);
        if (!is_peer) parts[j].span = 0;
        slots[j] = slot_of(owner);
      }
      body(parts, slots);
    }
  }

  __device__ __forceinline__ void scatter(int64_t chunk) const {
    for_all_owners(
        chunk, [&](int owner) { return scatter_slot(owner, workspace_.rank, chunk); },
        [&](const auto& parts, const auto& slots) { cargo_.pack(parts, slots); });
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
  }

  __device__ __forceinline__ bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const int rank = workspace_.rank;
    const char* first_source = scatter_slot(rank, 0, chunk);
    const int64_t stride = workspace_.layout.lanes * slots_.two_shot_bytes;  // from source to source
    const int copies = shared_copies(workspace_.layout);
    constexpr int kTargetsAtOnce = kWorldSize > 4 ? 1 : kWorldSize - 1;  // whose addresses are kept in registers
    cargo_.reduce(
        piece(chunk, rank), rank, [&](int source) { return first_source + source * stride; },
        [&](auto store) {
#pragma unroll kTargetsAtOnce
          for (int step = 1; step < kWorldSize; ++step)
            if (step <= copies) store(gather_slot(rotated<kWorldSize>(rank, step), rank, chunk));
        });
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  __device__ __forceinline__ bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;
    for_all_owners(
        chunk, [&](int owner) { return gather_slot(workspace_.rank, owner, chunk); },
        [&](const auto& parts, const auto& slots) { cargo_.unpack(parts, slots); });
    return true;
  }

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const FlaggedLane lane_;
  const Cargo& cargo_;
  const int64_t chunk_;
  const int64_t chunks_;
  const uint32_t epoch_;
};

template <int kWorldSize, typename Cargo>
__device__ __forceinline__ void two_shot_lane(const lar_workspace& workspace, lar_algorithm algorithm,
                                              const Cargo& cargo, int64_t chunk) {
  TwoShotLane<kWorldSize, Cargo>(workspace, algorithm, cargo, chunk).run();
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_
