// Sending by bulk copies: a warp puts its vectors into shared memory, and the copy engine of the multiprocessor carries
// them to the peers.
//
// A store to a peer that waits for the links holds up every access behind it in its multiprocessor; a bulk copy waits
// in the engine, by itself. Before sm_90, which has no such
// engine, the same calls store straight to the peers.
//
// PTX does not say in which pieces a bulk copy arrives. The readers do not care: they check each 32-bit word for itself
// (device/in_band.cuh).
#ifndef LLM_ALLREDUCE_DEVICE_OUTBOX_CUH_
#define LLM_ALLREDUCE_DEVICE_OUTBOX_CUH_

#include "device/in_band.cuh"
#include "device/ptx.cuh"

namespace lar {

constexpr uint32_t kWarpThreads = 32;

// One vector of each thread of a warp: neighbours, sent together.
constexpr uint32_t kTileVectors = kWarpThreads;

// Tiles of a warp under way at once. Six of them for each warp are all the shared memory that needs no opting in.
constexpr uint32_t kTilesUnderWay = 6;

__device__ __forceinline__ uint32_t lane_of_warp() { return threadIdx.x % kWarpThreads; }

// Sends tiles. Every function is for the whole warp: fill(), send() to each receiver, close(); flush() at the end.
class Outbox {
 public:
#if LAR_HAS_BULK_COPIES
  // `memory`: of the block, see LAR_OUTBOX_MEMORY.
  __device__ __forceinline__ explicit Outbox(uint4* memory)
      : tiles_(shared_address(memory) + threadIdx.x / kWarpThreads * kTilesUnderWay * kTileBytes) {}

  // Puts one vector of each thread into the next tile, once that has been sent.
  __device__ __forceinline__ void fill(const uint4& raw) {
    if (leads()) wait_for_bulk_reads<kTilesUnderWay - 1>();
    __syncwarp();
    store_shared(tile() + lane_of_warp() * LAR_VECTOR_BYTES, raw);
    fence_before_bulk_copies();
    __syncwarp();
  }

  // The first `vectors` of the tile, to `slot` from vector `index` on.
  __device__ __forceinline__ void send(char* slot, uint32_t index, uint32_t vectors) {
    if (leads()) copy_bulk(reinterpret_cast<uint4*>(slot) + index, tile(), vectors * LAR_VECTOR_BYTES);
  }

  __device__ __forceinline__ void close() {
    if (leads()) commit_bulk_copies();
    next_ = next_ + 1 == kTilesUnderWay ? 0 : next_ + 1;
  }

  // Shared memory ends with the block, so everything must have been read. That it arrives, the readers see.
  __device__ __forceinline__ void flush() {
    if (leads()) wait_for_bulk_reads<0>();
  }

 private:
  static constexpr uint32_t kTileBytes = kTileVectors * LAR_VECTOR_BYTES;

  __device__ __forceinline__ static bool leads() { return lane_of_warp() == 0; }
  __device__ __forceinline__ uint32_t tile() const { return tiles_ + next_ * kTileBytes; }

  uint32_t tiles_;  // of this warp, in shared memory
  uint32_t next_ = 0;
#else
  __device__ __forceinline__ explicit Outbox(uint4*) {}
  __device__ __forceinline__ void fill(const uint4& raw) { raw_ = raw; }
  __device__ __forceinline__ void send(char* slot, uint32_t index, uint32_t vectors) {
    if (lane_of_warp() < vectors) store_in_band(slot, index + lane_of_warp(), raw_);
  }
  __device__ __forceinline__ void close() {}
  __device__ __forceinline__ void flush() {}

 private:
  uint4 raw_;
#endif
};

#if LAR_HAS_BULK_COPIES
#define LAR_OUTBOX_MEMORY(name) \
  LAR_SHARED_ARRAY(uint4, name, LAR_MAX_THREADS / kWarpThreads * kTilesUnderWay * kTileVectors)
#else
#define LAR_OUTBOX_MEMORY(name) uint4* const name = nullptr
#endif

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_OUTBOX_CUH_
