// How rows are dealt out: each to a cluster of blocks, of one block or more. A warp has 32 neighbouring units of a row
// at a time, a tile; a thread has a unit of up to kUnits tiles.
//
// What a row's threads have to tell each other are words in shared memory, of which every block has a copy. Blocks of a
// cluster store them there with a count of bytes, not behind a barrier of the cluster: its release would wait until all
// that was stored before has arrived, at peers too.
#ifndef LLM_ALLREDUCE_DEVICE_SCHEDULE_ROWS_CUH_
#define LLM_ALLREDUCE_DEVICE_SCHEDULE_ROWS_CUH_

#include "codec/norm.h"
#include "device/ptx.cuh"

namespace lar {

constexpr uint32_t kMostTiles = 64;      // of a row that is kept in registers: 16384 elements
constexpr uint32_t kMostRowsAtOnce = 4;  // whose threads meet once for all of them
constexpr uint32_t kMostRowWords = kMostRowsAtOnce * kMostTiles;

// What a row's threads tell each other: words of one exchange, and the bytes of it that have come. Two of each, used by
// turns. A block, or a warp, that is one exchange ahead stores for the next while others read this one's; it cannot be
// two ahead, because in each it waits for words of all.
struct RowMemory {
  uint64_t bytes[2];
  alignas(16) uint32_t words[2][kMostRowWords];
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

// When a row's threads do what does not depend on the others. kEarly: blocks of a cluster wait for each other before
// anything else, tiles are added four to a lane, and sinks do what they can while words travel. Of two ranks it is 1 to
// 3 % faster, a sum and then the norm alone up to 5 %, and of four up to 7 % slower, why is not known
// (benchmarks/h100/two_versions_fused_tp2.json, two_versions_fused_tp4.json).
enum class Overlap { kLate, kEarly };

template <int kUnits, Overlap kOverlap = Overlap::kLate>
class Rows {
 public:
  // `units`: of a row. `threads`: the first of each block, whole warps, that handle rows; for all of them, once, before
  // anything else.
  __device__ __forceinline__ Rows(uint32_t units, RowMemory& memory, uint32_t threads)
      : units_(units), threads_(threads), cluster_(cluster()), memory_(memory) {
    if (cluster_.size == 1) return;
    if (threadIdx.x == 0) {
      begin_byte_barrier(&memory.bytes[0]);
      begin_byte_barrier(&memory.bytes[1]);
    }
    let_cluster_in();
    if constexpr (kOverlap == Overlap::kEarly) wait_for_cluster();
  }

  // Which rows of a grid are this block's: every groups()-th from group() on.
  __device__ __forceinline__ uint32_t group() const { return cluster_.index; }
  __device__ __forceinline__ uint32_t groups() const { return cluster_.number; }

  // The k-th unit of this thread in its row, and whether there is one.
  __device__ __forceinline__ uint32_t unit(int k) const {
    return (k * cluster_.size + cluster_.block) * threads_ + threadIdx.x;
  }
  __device__ __forceinline__ bool has(int k) const { return unit(k) < units_; }

  __device__ __forceinline__ uint32_t threads() const { return threads_; }
  __device__ __forceinline__ bool is_first_block() const { return cluster_.block == 0; }
  __device__ __forceinline__ bool is_first_thread() const { return is_first_block() && threadIdx.x == 0; }

  // Of each of kRows rows, the sum of all units' `squares`, as codec/norm.h has it; 0 for units that there are not. For
  // all threads of the rows, which meet once: they tell each other their tiles, and then, when there is nothing else
  // left to do, add those of all.
  template <int kRows>
  __device__ __forceinline__ void tell_squares(const float (&squares)[kRows][kUnits]) {
    static_assert(kRows <= kMostRowsAtOnce);
    float sums[kRows][kUnits];
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int k = 0; k < kUnits; ++k) sums[j][k] = squares[j][k];
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2)
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int k = 0; k < kUnits; ++k) sums[j][k] = codec::add(sums[j][k], shuffle_xor(sums[j][k], mask));
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int k = 0; k < kUnits; ++k)
        if (unit(k) / 32 < tiles()) tell(j * tiles() + unit(k) / 32, __float_as_uint(sums[j][k]));
  }

  template <int kRows>
  __device__ __forceinline__ void total_squares(float (&totals)[kRows]) {
    const uint32_t number = tiles();
    const bool is_short = number <= 32;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t* words = exchanged(kRows * number);
    if constexpr (kOverlap == Overlap::kEarly && kRows == 1) {
      // Four tiles to a lane: two levels of the tree that need no shuffle.
      const uint32_t first = lane % (is_short ? 8 : 16) * 4;
      const uint4 four = *reinterpret_cast<const uint4*>(words + first);
      const auto tile = [&](uint32_t i, uint32_t word) { return first + i < number ? __uint_as_float(word) : 0.0f; };
      float total = codec::add(codec::add(tile(0, four.x), tile(1, four.y)),  //
                               codec::add(tile(2, four.z), tile(3, four.w)));
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2) total = codec::add(total, shuffle_xor(total, mask));
      totals[0] = is_short ? total : codec::add(total, shuffle_xor(total, 8));
      return;
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const auto tile = [&](uint32_t i) { return i < number ? __uint_as_float(words[j * number + i]) : 0.0f; };
      totals[j] = tree_of_warp(is_short ? tile(lane) : codec::add(tile(2 * lane), tile(2 * lane + 1)));
    }
  }

  // The largest of all threads' `peak`. For all threads of the row.
  __device__ __forceinline__ uint32_t largest(uint32_t peak) {
    const uint32_t warps = threads_ / 32;
    tell(cluster_.block * warps + threadIdx.x / 32, __reduce_max_sync(0xffffffffu, peak));
    const uint32_t number = warps * cluster_.size;
    const uint32_t* words = exchanged(number);
    uint32_t most = 0;
    for (uint32_t i = threadIdx.x % 32; i < number; i += 32) most = max(most, words[i]);
    return __reduce_max_sync(0xffffffffu, most);
  }

 private:
  __device__ __forceinline__ uint32_t tiles() const { return (units_ + 31) / 32; }

  // For a warp: a word of this exchange, for every block of the row.
  __device__ __forceinline__ void tell(uint32_t place, uint32_t word) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t turn = exchange_ % 2;
    if (cluster_.size == 1) {
      if (lane == 0) memory_.words[turn][place] = word;
      return;
    }
    // Not ahead of the sums, where there seems to be time: measured there, it cost 0.3 us
    // (benchmarks/h100/bench_fused_met_early_tp2.json; its acquire throws the first-level cache away while the row's
    // other loads are under way).
    if (kOverlap == Overlap::kLate && !is_let_in_) wait_for_cluster();
    is_let_in_ = true;
    if (lane < cluster_.size) store_in_cluster(&memory_.words[turn][place], &memory_.bytes[turn], lane, word);
  }

  // Ends an exchange of `number` words, once all are there.
  __device__ __forceinline__ const uint32_t* exchanged(uint32_t number) {
    constexpr int kBarrier = 2;  // 0 is that of __syncthreads(), 1 that of device/shared.cuh
    const uint32_t turn = exchange_ % 2;
    if (cluster_.size > 1) {
      if (threadIdx.x == 0) expect_bytes(&memory_.bytes[turn], number * sizeof(uint32_t));
      wait_for_bytes(&memory_.bytes[turn], exchange_ / 2 % 2);
    } else if (threads_ == blockDim.x) {
      __syncthreads();
    } else {
      barrier_sync<kBarrier>(threads_);
    }
    ++exchange_;
    return memory_.words[turn];
  }

  const uint32_t units_;
  const uint32_t threads_;
  const Cluster cluster_;
  RowMemory& memory_;
  uint32_t exchange_ = 0;
  bool is_let_in_ = false;  // all blocks of the cluster have begun
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SCHEDULE_ROWS_CUH_
