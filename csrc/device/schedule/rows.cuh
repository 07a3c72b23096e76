// How rows are dealt out: each to a block or, a row in few vectors per block, to a cluster of blocks. A warp has 32
// neighbouring units of a row at a time, a tile; a thread has a unit of up to kUnits tiles.
//
// What a row's threads have to tell each other goes through shared memory: every block of the cluster has a copy.
#ifndef LLM_ALLREDUCE_DEVICE_SCHEDULE_ROWS_CUH_
#define LLM_ALLREDUCE_DEVICE_SCHEDULE_ROWS_CUH_

#include "codec/norm.h"
#include "device/ptx.cuh"

namespace lar {

constexpr uint32_t kMostTiles = 64;  // of a row that is kept in registers: 16384 elements
constexpr uint32_t kMostRowWarps = 128;

// What the blocks of a row tell each other. Two of each, used by turns: a warp that is ahead writes for the next row
// while others read for this one. It cannot be two ahead, since all meet in every row.
struct RowMemory {
  float squares[2][kMostTiles];
  uint32_t peaks[2][kMostRowWarps];
};

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_sync(0xffffffffu, value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_sync(0xffffffffu, value, static_cast<int>(threadIdx.x % 32) ^ mask);
}

// The sum over a warp as a tree, neighbours first; every thread gets it.
__device__ __forceinline__ float tree_of_warp(float value) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) value = codec::add(value, shuffle_xor(value, mask));
  return value;
}

template <int kUnits>
class Rows {
 public:
  // `units`: of a row. `threads`: the first of each block, whole warps, that handle rows; for all of them, once, before
  // anything else.
  __device__ __forceinline__ Rows(uint32_t units, RowMemory& memory, uint32_t threads)
      : units_(units), threads_(threads), cluster_(cluster_size()), block_(cluster_rank()), memory_(memory) {
    if (cluster_ > 1) cluster_arrive();  // what tell() waits for: all blocks have begun
  }

  // Which rows are this block's: every groups()-th from group() on, of `lanes` lanes from `first_lane` on.
  __device__ __forceinline__ uint32_t group(uint32_t first_lane = 0) const {
    return (blockIdx.x - first_lane) / cluster_;
  }
  __device__ __forceinline__ uint32_t groups(uint32_t lanes) const { return lanes / cluster_; }

  // The k-th unit of this thread in its row, and whether there is one.
  __device__ __forceinline__ uint32_t unit(int k) const { return (k * cluster_ + block_) * threads_ + threadIdx.x; }
  __device__ __forceinline__ bool has(int k) const { return unit(k) < units_; }

  __device__ __forceinline__ uint32_t threads() const { return threads_; }
  __device__ __forceinline__ bool is_first_block() const { return block_ == 0; }
  __device__ __forceinline__ bool is_first_thread() const { return block_ == 0 && threadIdx.x == 0; }

  // Begins a row.
  __device__ __forceinline__ void next_row() { turn_ ^= 1; }

  // The sum of all units' `squares`, as codec/norm.h has it; 0 for units that there are not. For all threads of the
  // row.
  __device__ __forceinline__ float sum(const float (&squares)[kUnits]) {
    float tiles[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) tiles[k] = squares[k];
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2)
#pragma unroll
      for (int k = 0; k < kUnits; ++k) tiles[k] = codec::add(tiles[k], shuffle_xor(tiles[k], mask));
    const uint32_t number = (units_ + 31) / 32;
#pragma unroll
    for (int k = 0; k < kUnits; ++k)
      if (unit(k) / 32 < number) tell(&memory_.squares[turn_][unit(k) / 32], __float_as_uint(tiles[k]));
    meet();
    const uint32_t lane = threadIdx.x % 32;
    const float* row = memory_.squares[turn_];
    if (number <= 32) return tree_of_warp(lane < number ? row[lane] : 0.0f);
    const float first = 2 * lane < number ? row[2 * lane] : 0.0f;
    return tree_of_warp(codec::add(first, 2 * lane + 1 < number ? row[2 * lane + 1] : 0.0f));
  }

  // The largest of all threads' `peak`. After sum() of the same row, and for all threads.
  __device__ __forceinline__ uint32_t largest(uint32_t peak) {
    peak = __reduce_max_sync(0xffffffffu, peak);
    const uint32_t warps = threads_ / 32;
    tell(&memory_.peaks[turn_][block_ * warps + threadIdx.x / 32], peak);
    meet();
    uint32_t most = 0;
    for (uint32_t i = threadIdx.x % 32; i < warps * cluster_; i += 32) most = max(most, memory_.peaks[turn_][i]);
    return __reduce_max_sync(0xffffffffu, most);
  }

 private:
  // For a warp: stores a word to the same place in every block of the row.
  __device__ __forceinline__ void tell(void* place, uint32_t word) {
    const uint32_t lane = threadIdx.x % 32;
    if (cluster_ == 1) {
      if (lane == 0) *static_cast<uint32_t*>(place) = word;
      return;
    }
    if (!begun_) cluster_wait();
    begun_ = true;
    if (lane < cluster_) store_cluster(place, lane, word);
  }

  __device__ __forceinline__ void meet() {
    constexpr int kBarrier = 2;  // 0 is that of __syncthreads(), 1 that of device/shared.cuh
    if (cluster_ > 1) {
      cluster_arrive();
      cluster_wait();
    } else if (threads_ == blockDim.x) {
      __syncthreads();
    } else {
      barrier_sync<kBarrier>(threads_);
    }
  }

  const uint32_t units_;
  const uint32_t threads_;
  const uint32_t cluster_;
  const uint32_t block_;  // in the cluster
  RowMemory& memory_;
  uint32_t turn_ = 0;
  bool begun_ = false;  // all blocks of the cluster have
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SCHEDULE_ROWS_CUH_
