// In band in memory that all ranks share: host memory.
//
// Storing the same vectors to every peer would send them over PCIe several times. So a rank stores them once, in its
// own workspace, and all peers poll them there. A reader can then not clear what it has read (device/in_band.cuh).
// Instead, a rank clears in call e what was in its own workspace in call e-2, once everything that peers wait for is on
// its way. It may: it has ended call e-1, in which it took what depends on something that every peer sent in that call,
// and no peer sent anything of call e-1 before its own kernel of call e-2, reads included, had ended. Four generations
// are enough: a peer stores to or polls that one again in call e+2. It has then ended call e+1, in which it took what
// depends on something this rank sent after its kernel of call e, clears included, had ended. That the clears had also
// arrived in host memory by then is the courier's business: a warp that waits for it, over PCIe for a microsecond,
// while the others poll.
#ifndef LLM_ALLREDUCE_DEVICE_PUBLISHED_CUH_
#define LLM_ALLREDUCE_DEVICE_PUBLISHED_CUH_

#include "device/in_band.cuh"
#include "device/launch.cuh"

namespace lar {

struct PublishedArguments {
  InBandArguments in_band;
  char* slots[LAR_MAX_WORLD_SIZE];  // published by each rank, generation 0
  uint32_t published_stride;        // from generation to generation of them, in vectors
  uint32_t* extents;                // [generation][lane]
};

// One call, as a block sees it: the workers and, the last warp, the courier.
class Publication {
 public:
  __device__ __forceinline__ explicit Publication(const PublishedArguments& arguments)
      : arguments_(arguments), epoch_(epoch_of(arguments.in_band)) {}

  __device__ __forceinline__ static uint32_t block_workers() { return blockDim.x - kCourierThreads; }
  __device__ __forceinline__ static bool is_courier() { return threadIdx.x >= block_workers(); }

  // The place of this worker among those of the grid, and their number.
  __device__ __forceinline__ static uint32_t worker() { return blockIdx.x * block_workers() + threadIdx.x; }
  __device__ __forceinline__ static uint32_t workers() { return gridDim.x * block_workers(); }

  // Vector `index` of what `rank` publishes in this call.
  __device__ __forceinline__ char* vector(int rank, uint32_t index) const { return published(rank, epoch_, index); }

  __device__ __forceinline__ void store(uint32_t index, const uint4& raw) const {
    store_in_band(vector(arguments_.in_band.rank, index), 0, raw);
  }

  // Where the scatter slots of this call's generation begin, from `own` or from one of `to`.
  __device__ __forceinline__ uint32_t scatter_slots() const { return scatter_slots(epoch_); }

  // For all threads of the block, before the courier parts from the workers: counts the call, in which this rank fills
  // at most `vectors` of a slot.
  __device__ __forceinline__ void count_call(uint32_t vectors) {
    const uint32_t lanes = arguments_.in_band.lanes;
    old_vectors_ = arguments_.extents[(epoch_ - 2) % LAR_PUBLISHED_SLOTS * lanes + blockIdx.x];
    // As with the epochs, every lane has a copy of its own, and block 0 keeps those of lanes without a block.
    uint32_t* extents = arguments_.extents + epoch_ % LAR_PUBLISHED_SLOTS * lanes;
    if (threadIdx.x == 0) extents[blockIdx.x] = vectors;
    if (blockIdx.x == 0)
      for (uint32_t lane = gridDim.x + threadIdx.x; lane < lanes; lane += blockDim.x) extents[lane] = vectors;
    advance_epoch(arguments_.in_band, epoch_);
  }

  // For the workers, once: clears what was in this rank's workspace two calls ago; `scatters`: in scatter slots too.
  template <int kWorldSize>
  __device__ __forceinline__ void clear_old_generation(bool scatters) const {
    const InBandArguments& in_band = arguments_.in_band;
    for (uint32_t i = worker(); i < old_vectors_; i += workers()) {
      clear_in_band_if(true, published(in_band.rank, epoch_ - 2, i));
      if (!scatters) continue;
#pragma unroll kPeersAtOnce < kWorldSize>
      for (int peer = 0; peer < kWorldSize - 1; ++peer) {
        const uint32_t at = scatter_slots(epoch_ - 2) + peer * in_band.peer_stride + i;
        clear_in_band_if(true, in_band.own + int64_t{at} * LAR_VECTOR_BYTES);
      }
    }
    barrier<false>();
  }

  // For the courier: waits until the workers' clears have arrived.
  __device__ __forceinline__ void settle_clears() const {
    barrier<true>();
    __threadfence_system();
  }

 private:
  __device__ __forceinline__ char* published(int rank, uint32_t epoch, uint32_t index) const {
    const uint32_t at = epoch % LAR_PUBLISHED_SLOTS * arguments_.published_stride + index;
    return arguments_.slots[rank] + int64_t{at} * LAR_VECTOR_BYTES;
  }

  __device__ __forceinline__ uint32_t scatter_slots(uint32_t epoch) const {
    return epoch % LAR_PUBLISHED_SLOTS * arguments_.in_band.generation_stride;
  }

  // Workers arrive, the courier waits for them.
  template <bool kWaits>
  __device__ __forceinline__ static void barrier() {
    constexpr int kBarrier = 1;  // 0 is that of __syncthreads()
    if (kWaits)
      barrier_sync<kBarrier>(blockDim.x);
    else
      barrier_arrive<kBarrier>(blockDim.x);
  }

  const PublishedArguments& arguments_;
  const uint32_t epoch_;
  uint32_t old_vectors_ = 0;
};

// Starts the kernel once for every round. `published_offset`: of the region of generations, each `slots.slot_bytes`.
inline int launch_published(const void* kernel, const lar_workspace& workspace, const lar_message& message,
                            const lar_launch& shape, const InBandSlots& slots, int64_t published_offset,
                            ExtentPlane extents, int64_t round_elements, void* stream) {
  const int status = check_call(&workspace, &message, &shape, slots.slot_bytes);
  if (status != LAR_OK || message.count == 0) return status;
  if (!kernel || shape.scatter_lanes > 0 || shape.threads > LAR_MAX_FLAGGED_THREADS) return LAR_ERROR_INVALID_ARGUMENT;
  return in_rounds_of(round_elements, message, [&](const lar_message& round, int64_t) {
    PublishedArguments arguments{in_band_arguments(workspace, round, shape, slots), {}, 0, nullptr};
    for (int rank = 0; rank < workspace.layout.world_size; ++rank)
      arguments.slots[rank] = static_cast<char*>(workspace.base[rank]) + published_offset;
    arguments.published_stride = static_cast<uint32_t>(slots.slot_bytes / LAR_VECTOR_BYTES);
    arguments.extents = extent_words(workspace.local, workspace.layout, extents);
    lar_launch with_courier = shape;
    with_courier.threads += kCourierThreads;
    return launch_kernel(kernel, with_courier, may_start_early(workspace), &arguments, stream);
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_PUBLISHED_CUH_
