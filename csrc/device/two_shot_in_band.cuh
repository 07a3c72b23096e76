// What the in-band kernels of TWOSHOT share: whose vectors are where, and how results are taken in.
#ifndef LLM_ALLREDUCE_DEVICE_TWO_SHOT_IN_BAND_CUH_
#define LLM_ALLREDUCE_DEVICE_TWO_SHOT_IN_BAND_CUH_

#include "device/bulk_sender.cuh"
#include "device/in_band.cuh"

namespace lar {

// Vector `i` of the part of the rank `step` places on, in the tensor; not below total_vectors if there is none. Steps
// beyond the last rank have none.
template <int kWorldSize>
__device__ __forceinline__ uint32_t index_of(const InBandArguments& arguments, int step, uint32_t i) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  if (!World<kWorldSize>::kIsFixed && step >= world_size) return ~0u;
  return rotated(arguments.rank, step, world_size) * arguments.part + i;
}

// This rank's partials into their owners' slots (from `slots` on), some owners at a time; for all threads of the grid.
template <int kWorldSize, typename T, int kTableSize>
__device__ __forceinline__ void scatter(const PushArguments<kTableSize>& arguments, const Payload<T>& input,
                                        uint32_t slots, uint32_t total_vectors) {
  constexpr int kAtOnce = World<kWorldSize>::kPeersAtOnce;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };
  for (uint32_t i = grid_thread(); i < arguments.part; i += grid_threads()) {
#pragma unroll 1
    for (int first = 1; first < world_size; first += kAtOnce) {
      uint4 partials[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (index(first + j, i) < total_vectors) partials[j] = input.load(index(first + j, i));
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (index(first + j, i) < total_vectors)
          store_in_band(arguments.to[first + j], slots + i, without_marker(partials[j]));
    }
  }
}

// The same of a thread with a vector of each part, whose first partials it has loaded: into the slots at `slot`.
// index(step): the vector of the owner `step` places on; load(step): what it holds.
template <int kWorldSize, int kTableSize, int kAtOnce, typename Index, typename Load>
__device__ __forceinline__ void scatter_one(const PushArguments<kTableSize>& arguments, uint32_t slot,
                                            uint32_t total_vectors, uint4 (&partials)[kAtOnce], Index index,
                                            Load load) {
  static_assert(kAtOnce == World<kWorldSize>::kPeersAtOnce);
  const int world_size = World<kWorldSize>::size(arguments.world_size);
#pragma unroll 1
  for (int first = 1;;) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (index(first + j) < total_vectors) store_in_band(arguments.to[first + j], slot, without_marker(partials[j]));
    first += kAtOnce;
    if (first >= world_size) break;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) partials[j] = load(first + j);
  }
}

// Polls vector `i` of all results (slots: the gather slots of this call), clears them and hands them to the sink.
template <int kWorldSize, typename Sink>
__device__ __forceinline__ bool drain(const InBandArguments& arguments, uint32_t slots, uint32_t total_vectors,
                                      uint32_t i, const Sink& sink) {
  constexpr int kAtOnce = World<kWorldSize>::kPeersAtOnce;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
#pragma unroll 1
  for (int first = 1; first < world_size; first += kAtOnce) {
    char* from[kAtOnce];
    bool wanted[kAtOnce];
    uint4 results[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const uint32_t at = slots + slot_of_step(first + j) * arguments.peer_stride + i;
      from[j] = arguments.own + static_cast<int64_t>(at) * LAR_VECTOR_BYTES;
      wanted[j] = index_of<kWorldSize>(arguments, first + j, i) < total_vectors;
      results[j] = {0u, 0u, 0u, 0u};
    }
    if (!poll_until_complete(arguments.limit, LAR_PHASE_GATHER, from, wanted, results,
                             [&](int j) { return rotated(arguments.rank, first + j, world_size); }))
      return false;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      clear_in_band_if(wanted[j], from[j]);
      if (wanted[j]) sink(index_of<kWorldSize>(arguments, first + j, i), results[j]);
    }
  }
  return true;
}

// For the first `scatter_lanes` blocks: this rank's partials, whole aligned vectors, into their owners' slots (from
// `slots` on) by bulk copies.
template <int kWorldSize, int kTableSize>
__device__ __forceinline__ void scatter_in_bulk(const PushArguments<kTableSize>& arguments, BulkSender& sender,
                                                uint32_t slots, uint32_t total_vectors) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  constexpr int kAtOnce = World<kWorldSize>::kPeersAtOnce;
  const uint32_t part = arguments.part;
  const Share share = share_of(0, arguments.scatter_lanes, part);
  for (uint32_t tile = share.first - warp_thread(); tile < share.end; tile += share.stride) {
#pragma unroll 1
    for (int first = 1; first < world_size; first += kAtOnce) {
      uint4 partials[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t index = index_of<kWorldSize>(arguments, first + j, tile) + warp_thread();
        partials[j] = load_vector(arguments.input, min(index, total_vectors - 1));
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t index = index_of<kWorldSize>(arguments, first + j, tile);
        if (index >= total_vectors) continue;
        sender.fill(without_marker(partials[j]));
        sender.send(arguments.to[first + j], slots + tile, min(min(kTileVectors, part - tile), total_vectors - index));
        sender.close();
      }
    }
  }
  sender.flush();
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_TWO_SHOT_IN_BAND_CUH_
