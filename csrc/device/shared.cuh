// In band in memory that all ranks share: host memory.
//
// Storing the same vectors to every peer would send them over PCIe several times. So a rank stores them once, in its
// own workspace, and all peers poll them there. Which generation a call uses and which it clears:
// protocol/generations.h. That the clears have arrived in host memory by the end of the kernel is the releaser's
// business: a warp that waits for it, over PCIe for a microsecond, while the others poll. The end of the kernel is not
// relied on: it orders clears before what follows in the stream, but a peer that polls what the next kernel
// stores acquires nothing by it, and must not find the old vectors.
//
// Large calls are bound by what PCIe carries. In them a worker asks for its peers' vectors (in two steps: for their
// sums) before it clears its own. Reads do not pass writes, so the answers come while the clears go, one each way.
// In a small call, peers' vectors are not there so soon, and a poll that finds nothing costs a way to host memory and
// back. In a large call in one step, polls for a late peer must not take the links from data that is under way: of a
// warp's packets, only one vector of each peer is polled until it is there.
#ifndef LLM_ALLREDUCE_DEVICE_SHARED_CUH_
#define LLM_ALLREDUCE_DEVICE_SHARED_CUH_

#include "device/in_band.cuh"
#include "device/lane.cuh"

namespace lar {

struct SharedArguments {
  char* slots[LAR_MAX_WORLD_SIZE];  // what each rank shares, generation 0
  uint32_t slots_stride;            // from generation to generation of them, in vectors
  uint32_t* lengths;                // [generation][lane]
  PushArguments<0> in_band;
};

// Of a call with more, PCIe takes longer to carry the clears (64 KiB) than to confirm the last of them.
constexpr uint32_t kManyVectors = 4096;

// One call, as a block sees it: the workers and, the last warp, the releaser.
class SharedCall {
 public:
  __device__ __forceinline__ explicit SharedCall(const SharedArguments& arguments)
      : arguments_(arguments), epoch_(epoch_of(arguments.in_band)) {}

  __device__ __forceinline__ static uint32_t block_workers() { return blockDim.x - kReleaserThreads; }
  __device__ __forceinline__ static bool is_releaser() { return threadIdx.x >= block_workers(); }

  // The place of this worker among those of the grid, and their number.
  __device__ __forceinline__ static uint32_t worker() { return blockIdx.x * block_workers() + threadIdx.x; }
  __device__ __forceinline__ static uint32_t workers() { return gridDim.x * block_workers(); }

  // Vector `index` of what `rank` shares in this call.
  __device__ __forceinline__ char* vector(int rank, uint32_t index) const { return slot(rank, epoch_, index); }

  __device__ __forceinline__ void store(uint32_t index, const uint4& raw) const {
    store_in_band(vector(arguments_.in_band.rank, index), 0, raw);
  }

  __device__ __forceinline__ static bool is_large(uint32_t vectors) { return vectors > kManyVectors; }

  // For a whole warp, before it polls the vectors of the tile at `tile` of all ranks: waits for the first of each,
  // which is no more than a hint. False when a wait expired.
  __device__ __forceinline__ bool wait_for_tile(lar_phase phase, uint32_t tile) const {
    const InBandArguments& in_band = arguments_.in_band;
    bool complete = true;
#pragma unroll 1
    for (int peer = warp_thread(); complete && peer < in_band.world_size; peer += kWarpThreads) {
      if (peer == in_band.rank) continue;
      char* const from[] = {vector(peer, tile)};
      const bool wanted[] = {true};
      uint4 seen[1];
      complete = poll_until_complete(in_band.limit, phase, from, wanted, seen, [&](int) { return peer; });
    }
    return __all_sync(0xffffffffu, complete);
  }

  // Where the scatter slots of this call's generation begin, from `own` or from one of `to`.
  __device__ __forceinline__ uint32_t scatter_slots() const { return scatter_slots(epoch_); }

  // For all threads of the block, before the releaser parts from the workers: counts the call, in which this rank fills
  // at most `vectors` of a slot.
  __device__ __forceinline__ void count_call(uint32_t vectors) {
    const uint32_t lanes = arguments_.in_band.lanes;
    old_vectors_ = arguments_.lengths[cleared_generation(epoch_) * lanes + blockIdx.x];
    // As with the epochs, every lane has a copy of its own, and block 0 keeps those of lanes without a block.
    uint32_t* lengths = arguments_.lengths + shared_generation(epoch_) * lanes;
    if (threadIdx.x == 0) lengths[blockIdx.x] = vectors;
    if (blockIdx.x == 0)
      for (uint32_t lane = gridDim.x + threadIdx.x; lane < lanes; lane += blockDim.x) lengths[lane] = vectors;
    advance_epoch(arguments_.in_band, epoch_);
  }

  // Clears vector `index` of what was in this rank's workspace two calls ago, if there was such.
  __device__ __forceinline__ void clear_old(uint32_t index) const {
    clear_in_band_if(index < old_vectors_, slot(arguments_.in_band.rank, epoch_ - 2, index));
  }

  // The same on the way, for a worker of a large call: at `index`, and with its last vector all that it has left, so
  // that the releaser waits for the clears while that one is polled. For all threads of a warp, with the same
  // `is_last`.
  template <int kWorldSize>
  __device__ __forceinline__ void clear_on_the_way(bool scatters, uint32_t index, bool is_last) const {
    if (index < old_vectors_) clear_all<kWorldSize>(scatters, index);
    if (is_last) clear_old_generation<kWorldSize>(scatters, index + workers());
  }

  // For the workers, once: clears what was in this rank's workspace two calls ago; `scatters`: in scatter slots too.
  // `first`: the first vector of this worker that it has not cleared yet.
  template <int kWorldSize>
  __device__ __forceinline__ void clear_old_generation(bool scatters) const {
    clear_old_generation<kWorldSize>(scatters, worker());
  }
  template <int kWorldSize>
  __device__ __forceinline__ void clear_old_generation(bool scatters, uint32_t first) const {
    for (uint32_t i = first; i < old_vectors_; i += workers()) clear_all<kWorldSize>(scatters, i);
    barrier<false>();
  }

  // For workers that end without clear_old_generation(): the releaser does not wait for them.
  __device__ __forceinline__ void leave_clears() const { barrier<false>(); }

  // For the releaser: waits until the workers' clears have arrived.
  __device__ __forceinline__ void settle_clears() const {
    barrier<true>();
    __threadfence_system();
  }

 private:
  template <int kWorldSize>
  __device__ __forceinline__ void clear_all(bool scatters, uint32_t index) const {
    const InBandArguments& in_band = arguments_.in_band;
    clear_old(index);
    if (!scatters) return;
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int peer = 0; peer < World<kWorldSize>::size(in_band.world_size) - 1; ++peer) {
      const uint32_t at = scatter_slots(epoch_ - 2) + peer * in_band.peer_stride + index;
      clear_in_band_if(true, in_band.own + int64_t{at} * LAR_VECTOR_BYTES);
    }
  }

  __device__ __forceinline__ char* slot(int rank, uint32_t epoch, uint32_t index) const {
    const uint32_t at = shared_generation(epoch) * arguments_.slots_stride + index;
    return arguments_.slots[rank] + int64_t{at} * LAR_VECTOR_BYTES;
  }

  __device__ __forceinline__ uint32_t scatter_slots(uint32_t epoch) const {
    return shared_generation(epoch) * arguments_.in_band.generation_stride;
  }

  // Workers arrive, the releaser waits for them.
  template <bool kWaits>
  __device__ __forceinline__ static void barrier() {
    constexpr int kBarrier = 1;  // 0 is that of __syncthreads()
    if (kWaits)
      barrier_sync<kBarrier>(blockDim.x);
    else
      barrier_arrive<kBarrier>(blockDim.x);
  }

  const SharedArguments& arguments_;
  const uint32_t epoch_;
  uint32_t old_vectors_ = 0;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SHARED_CUH_
