// How vectors are dealt out to threads: flat, every one for itself. Neighbouring threads take neighbouring vectors
// across the whole grid, so that at any time all blocks write next to each other: the links carry more that way than
// with a stretch of its own for each block.
#ifndef LLM_ALLREDUCE_DEVICE_SCHEDULE_FLAT_CUH_
#define LLM_ALLREDUCE_DEVICE_SCHEDULE_FLAT_CUH_

#include "device/ptx.cuh"

namespace lar {

// The place of this thread among all of the grid, and their number.
__device__ __forceinline__ uint32_t grid_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ uint32_t grid_threads() { return gridDim.x * blockDim.x; }

// The vectors that this thread handles in one step of an algorithm: every `stride`-th from `first` on, below `end`.
struct Share {
  uint32_t first;
  uint32_t stride;
  uint32_t end;
};

// The share of this thread when `lanes` blocks from `first_lane` on, of which this is one, do the step.
__device__ __forceinline__ Share share_of(uint32_t first_lane, uint32_t lanes, uint32_t vectors) {
  return {(blockIdx.x - first_lane) * blockDim.x + threadIdx.x, lanes * blockDim.x, vectors};
}

constexpr uint32_t kWarpThreads = 32;

// One vector of each thread of a warp: neighbours, sent together.
constexpr uint32_t kTileVectors = kWarpThreads;

__device__ __forceinline__ uint32_t warp_thread() { return threadIdx.x % kWarpThreads; }

// The same by whole tiles, of which `first` and those that follow are the first vectors: one to a warp of each lane
// before any lane has a second, so that few tiles are spread over all multiprocessors.
__device__ __forceinline__ Share tiles_of(uint32_t first_lane, uint32_t lanes, uint32_t vectors) {
  const uint32_t warp = threadIdx.x / kWarpThreads;
  const uint32_t tile = warp * lanes + blockIdx.x - first_lane;
  return {tile * kTileVectors, lanes * (blockDim.x / kWarpThreads) * kTileVectors, vectors};
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SCHEDULE_FLAT_CUH_
