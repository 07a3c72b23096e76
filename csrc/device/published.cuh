// In band in memory that all ranks share: host memory.
//
// Storing the same vectors to every peer would send them over PCIe several times. So a rank stores them once, in its
// own workspace, and all peers poll them there. A reader can then not clear what it has read (device/in_band.cuh); the
// rank that stored it does, in call e+2 what it stored in call e. It may: it has ended call e+1, in which every peer
// sent something, and no peer sent anything of call e+1 before its own kernel of call e, reads included, had ended.
// Four generations are enough: a peer polls that one again in call e+4. It has then ended call e+3, in which it took
// what the rank sent after its kernel of call e+2, the clears included, had ended; settle_clears() makes sure that they
// had also arrived in host memory by then.
#ifndef LLM_ALLREDUCE_DEVICE_PUBLISHED_CUH_
#define LLM_ALLREDUCE_DEVICE_PUBLISHED_CUH_

#include "device/in_band.cuh"
#include "device/launch.cuh"

namespace lar {

struct PublishedArguments {
  InBandArguments in_band;
  char* slots[LAR_MAX_WORLD_SIZE];  // published by each rank, generation 0
  uint32_t generation_stride;       // of them, in vectors
  uint32_t* extents;                // [generation][lane]
};

// What is published in one call.
class Publication {
 public:
  __device__ __forceinline__ Publication(const PublishedArguments& arguments, uint32_t epoch)
      : arguments_(arguments), epoch_(epoch) {}

  // Vector `index` of what `rank` publishes in this call.
  __device__ __forceinline__ char* vector(int rank, uint32_t index) const { return address(rank, epoch_, index); }

  __device__ __forceinline__ void store(uint32_t index, const uint4& raw) const {
    store_in_band(vector(arguments_.in_band.rank, 0), index, raw);
  }

  // Clears what this rank published two calls ago, and notes that it publishes `vectors` now. For the whole grid, once
  // everything that peers wait for has been stored.
  __device__ __forceinline__ void clear_old_generation(uint32_t vectors) const {
    const uint32_t lanes = arguments_.in_band.lanes;
    const uint32_t old = epoch_ - 2;
    const uint32_t old_vectors = arguments_.extents[old % LAR_PUBLISHED_SLOTS * lanes + blockIdx.x];
    for (uint32_t i = grid_thread(); i < old_vectors; i += grid_threads())
      clear_in_band_if(true, address(arguments_.in_band.rank, old, i));
    // As with the epochs, every lane has a copy of its own, and block 0 keeps those of lanes without a block.
    uint32_t* extents = arguments_.extents + epoch_ % LAR_PUBLISHED_SLOTS * lanes;
    if (threadIdx.x == 0) extents[blockIdx.x] = vectors;
    if (blockIdx.x == 0)
      for (uint32_t lane = gridDim.x + threadIdx.x; lane < lanes; lane += blockDim.x) extents[lane] = vectors;
  }

 private:
  __device__ __forceinline__ char* address(int rank, uint32_t epoch, uint32_t index) const {
    const uint32_t at = epoch % LAR_PUBLISHED_SLOTS * arguments_.generation_stride + index;
    return arguments_.slots[rank] + int64_t{at} * LAR_VECTOR_BYTES;
  }

  const PublishedArguments& arguments_;
  const uint32_t epoch_;
};

// The last thing that a thread does: its clears have arrived in host memory before the next kernel sends anything.
__device__ __forceinline__ void settle_clears() { __threadfence_system(); }

// Starts the kernel once for every round. `published_offset`: of the region of generations, each `slots.slot_bytes`.
inline int launch_published(const void* kernel, const lar_workspace& workspace, const lar_message& message,
                            const lar_launch& shape, const InBandSlots& slots, int64_t published_offset,
                            ExtentPlane extents, int64_t round_elements, void* stream) {
  const int status = check_call(&workspace, &message, &shape, slots.slot_bytes);
  if (status != LAR_OK || message.count == 0) return status;
  if (!kernel || shape.scatter_lanes > 0) return LAR_ERROR_INVALID_ARGUMENT;
  return in_rounds_of(round_elements, message, [&](const lar_message& round, int64_t) {
    PublishedArguments arguments{in_band_arguments(workspace, round, shape, slots), {}, 0, nullptr};
    for (int rank = 0; rank < workspace.layout.world_size; ++rank)
      arguments.slots[rank] = static_cast<char*>(workspace.base[rank]) + published_offset;
    arguments.generation_stride = static_cast<uint32_t>(slots.slot_bytes / LAR_VECTOR_BYTES);
    arguments.extents = extent_words(workspace.local, workspace.layout, extents);
    return launch_kernel(kernel, shape, has_dependent_launch(), &arguments, stream);
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_PUBLISHED_CUH_
