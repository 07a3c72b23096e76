// A two-shot by flags, each lane alone (device/lane.cuh): the steps of protocol/two_shot.h.
#ifndef LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_
#define LLM_ALLREDUCE_DEVICE_TWO_SHOT_LANE_CUH_

#include "device/lane.cuh"
#include "device/world.cuh"
#include "protocol/two_shot.h"

namespace lar {

// `Units` are what travels; it knows the size of a unit, and every function is for the workers:
//   kBlocksAtOnce                               blocks for which a multiprocessor must have registers
//   unit_bytes()                                in a slot
//   total()                                     in the message
//   pack(Pieces)                                this rank's own, for their owners
//   reduce(Piece, rank, world_size, source_of, for_each_target)
//                                               sums the packed units of all ranks in rank order, of which this
//                                               rank's own come from its input, stores the result, and writes it,
//                                               packed, to every target
//   unpack(Pieces)                              stores the peers' results
// Pieces of a chunk, one for each owner that is meant:
//   kIsOne                                      whether there is never more than one
//   count, most                                 how many, and the units of the longest
//   of(k), slot(k)                              the k-th, and where its units lie, packed
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
    units_.pack(peers_pieces(chunk, [&](int owner) { return scatter_slot(owner, workspace_.rank, chunk); }));
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
    units_.unpack(peers_pieces(chunk, [&](int owner) { return gather_slot(workspace_.rank, owner, chunk); }));
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

  template <typename SlotOf>
  struct PeersPieces {
    static constexpr bool kIsOne = false;
    const TwoShotLane& lane;
    const int64_t chunk;
    const SlotOf slot_of;  // an owner's
    const int count;
    const int64_t most;

    __device__ __forceinline__ int owner(int k) const { return rotated(lane.workspace_.rank, k + 1, count + 1); }
    __device__ __forceinline__ Piece of(int k) const { return lane.cut_.piece(chunk, owner(k)); }
    __device__ __forceinline__ char* slot(int k) const { return slot_of(owner(k)); }
  };

  // Of a chunk, the part of each of the other ranks, from the next one on.
  template <typename SlotOf>
  __device__ __forceinline__ PeersPieces<SlotOf> peers_pieces(int64_t chunk, SlotOf slot_of) const {
    return {*this, chunk, slot_of, workspace_.layout.world_size - 1, cut_.units};
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
