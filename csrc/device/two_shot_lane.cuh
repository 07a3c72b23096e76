// A two-shot by flags, each lane alone (device/lane.cuh): the steps of protocol/two_shot.h.
#ifndef LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_
#define LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_

#include "device/lane.cuh"
#include "device/world.cuh"
#include "protocol/two_shot.h"

namespace lar {

// `Units` are what travels; it knows the size of a unit, and every function is for the workers:
//   kOwnersAtOnce                               pieces that pack() and unpack() are given
//   unit_bytes()                                in a slot
//   total()                                     in the message
//   pack(Piece[], slots[])                      this rank's own, for their owners
//   reduce(Piece, rank, world_size, source_of, for_each_target)
//                                               sums the packed units of all ranks in rank order, of which this
//                                               rank's own come from its input, stores the result, and writes it,
//                                               packed, to every target
//   unpack(Piece[], slots[])                    stores the peers' results
template <typename Units>
class TwoShotLane {
 public:
  using FlaggedLane = Lane<Roles::kWorkersAndReleaser>;

  __device__ __forceinline__ TwoShotLane(const FlagsArguments& arguments, const Units& units)
      : workspace_(arguments.workspace),
        slots_(workspace_.layout.flagged),
        lane_(workspace_, arguments.limit, EpochPlane::kTwoShot),
        units_(units),
        cut_{units.total(), arguments.chunk_vectors * LAR_VECTOR_BYTES / Units::unit_bytes(),
             workspace_.layout.world_size, static_cast<int>(gridDim.x), lane_.index()},
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() {
    lane_.start();
    const int64_t chunks = cut_.chunks();
    if (!(lane_.is_releaser() ? run_two_shot(chunks, Releases{*this}) : run_two_shot(chunks, *this))) return;
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
  }

  // The steps of protocol/two_shot.h, for the workers.
  __device__ __forceinline__ bool scatter(int64_t chunk) const {
    for_all_owners(
        chunk, [&](int owner) { return scatter_slot(owner, workspace_.rank, chunk); },
        [&](const auto& parts, const auto& slots) { units_.pack(parts, slots); });
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
    return true;
  }

  __device__ __forceinline__ bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const int rank = workspace_.rank;
    const int world_size = workspace_.layout.world_size;
    const char* first_source = scatter_slot(rank, 0, chunk);
    const int64_t stride = workspace_.layout.lanes * slots_.two_shot_bytes;  // from source to source
    const int copies = shared_copies(workspace_.layout);
    units_.reduce(
        cut_.piece(chunk, rank), rank, world_size, [&](int source) { return first_source + source * stride; },
        [&](auto store) {
#pragma unroll 1
          for (int step = 1; step <= copies; ++step) store(gather_slot(rotated(rank, step, world_size), rank, chunk));
        });
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  __device__ __forceinline__ bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;
    for_all_owners(
        chunk, [&](int owner) { return gather_slot(workspace_.rank, owner, chunk); },
        [&](const auto& parts, const auto& slots) { units_.unpack(parts, slots); });
    return true;
  }

 private:
  // What the releaser does in the same steps.
  struct Releases {
    const TwoShotLane& of;
    __device__ __forceinline__ bool scatter(int64_t chunk) const {
      return of.lane_.deliver(FlagPlane::kTwoShotScatter, of.round(chunk));
    }
    __device__ __forceinline__ bool reduce(int64_t chunk) const {
      return of.lane_.deliver(FlagPlane::kTwoShotGather, of.round(chunk));
    }
    __device__ __forceinline__ bool drain(int64_t) const { return true; }
  };

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
    constexpr int kAtOnce = Units::kOwnersAtOnce;
    const int world_size = workspace_.layout.world_size;
#pragma unroll 1
    for (int first = 1; first < world_size; first += kAtOnce) {
      Piece parts[kAtOnce];
      char* slots[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const bool is_peer = first + j < world_size;
        const int owner = rotated(workspace_.rank, is_peer ? first + j : 0, world_size);
        parts[j] = cut_.piece(chunk, owner);
        if (!is_peer) parts[j].span = 0;
        slots[j] = slot_of(owner);
      }
      body(parts, slots);
    }
  }

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const FlaggedLane lane_;
  const Units& units_;
  const Cut cut_;
  const uint32_t epoch_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_
