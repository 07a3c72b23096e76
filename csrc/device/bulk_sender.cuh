// Sending by bulk copies: a warp puts its vectors into shared memory, and the copy engine of the multiprocessor carries
// them to the peers.
//
// A store to a peer that waits for the links holds up every access behind it in its multiprocessor; a bulk copy waits
// in the engine, by itself. GPUs before sm_90 have no such engine: there the same calls store straight to the peers.
//
// PTX does not say in which pieces a bulk copy arrives. The readers do not care: they check each 32-bit word for itself
// (device/in_band.cuh).
#ifndef LLM_ALLREDUCE_DEVICE_BULK_SENDER_CUH_
#define LLM_ALLREDUCE_DEVICE_BULK_SENDER_CUH_

#include "device/in_band.cuh"
#include "device/ptx.cuh"

namespace lar {

// Tiles of a warp under way at once. Six of them for each warp are all the shared memory that needs no opting in.
constexpr uint32_t kTilesUnderWay = 6;

// Sends tiles. Every function is for the whole warp: fill(), send() to each receiver, close(); at the end
// flush(), and complete() before, where a release must cover what was sent.
class BulkSender {
 public:
#if LAR_HAS_BULK_COPIES
  // `memory`: of the block, see LAR_BULK_SENDER_MEMORY.
  __device__ __forceinline__ explicit BulkSender(uint4* memory)
      : tiles_(shared_address(memory) + threadIdx.x / kWarpThreads * kTilesUnderWay * kTileBytes) {}

  // Puts one vector of each thread into the next tile, once that has been sent.
  __device__ __forceinline__ void fill(const uint4& raw) {
    if (leads()) wait_for_bulk_reads<kTilesUnderWay - 1>();
    __syncwarp();
    store_shared(tile() + warp_thread() * LAR_VECTOR_BYTES, raw);
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

  // All tiles but the newest `kPending` have been written; a release behind the next barrier covers them.
  template <int kPending>
  __device__ __forceinline__ void complete() {
    if (leads()) {
      wait_for_bulk_writes<kPending>();
      fence_behind_bulk_copies();
    }
    __syncwarp();
  }

 private:
  static constexpr uint32_t kTileBytes = kTileVectors * LAR_VECTOR_BYTES;

  __device__ __forceinline__ static bool leads() { return warp_thread() == 0; }
  __device__ __forceinline__ uint32_t tile() const { return tiles_ + next_ * kTileBytes; }

  uint32_t tiles_;  // of this warp, in shared memory
  uint32_t next_ = 0;
#else
  __device__ __forceinline__ explicit BulkSender(uint4*) {}
  __device__ __forceinline__ void fill(const uint4& raw) { raw_ = raw; }
  __device__ __forceinline__ void send(char* slot, uint32_t index, uint32_t vectors) {
    if (warp_thread() < vectors) store_in_band(slot, index + warp_thread(), raw_);
  }
  __device__ __forceinline__ void close() {}
  __device__ __forceinline__ void flush() {}
  template <int kPending>
  __device__ __forceinline__ void complete() {}

 private:
  uint4 raw_;
#endif
};

// For the first `scatter_lanes` blocks: this rank's vectors, whole and aligned, into its slot at every peer, from
// `slots` on.
template <int kWorldSize>
__device__ __forceinline__ void push_in_bulk(const PushArguments<kWorldSize>& arguments, uint4* memory, uint32_t slots,
                                             uint32_t total_vectors) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t pushers = arguments.scatter_lanes;
  BulkSender sender(memory);
  const Share share = share_of(0, pushers, total_vectors);
  for (uint32_t tile = share.first - warp_thread(); tile < share.end; tile += share.stride) {
    const uint4 mine = load_vector(arguments.input, min(tile + warp_thread(), total_vectors - 1));
    sender.fill(without_marker(mine));
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step)
      sender.send(arguments.to[step], slots + tile, min(kTileVectors, share.end - tile));
    sender.close();
  }
  sender.flush();
}

#if LAR_HAS_BULK_COPIES
#define LAR_BULK_SENDER_MEMORY(name) \
  LAR_BLOCK_ARRAY(uint4, name, LAR_MAX_THREADS / kWarpThreads * kTilesUnderWay * kTileVectors)
#else
#define LAR_BULK_SENDER_MEMORY(name) uint4* const name = nullptr
#endif

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_BULK_SENDER_CUH_
