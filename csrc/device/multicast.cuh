// In band through memory of which one store reaches every rank: a switch copies it on its way.
//
// A store to `all` arrives in every rank's memory, the sender's included, in each at another time. Kernels do nothing
// special to make one: to the machine it is a store like any other, at another address.
//
// Places are absolute: the same on every rank. So what a rank has sent comes back to it, and late, perhaps after all
// that others have sent. It is polled and cleared like theirs: places of results belong to the owners of this message's
// vectors, and in the next message, of another size, to others, who would find there what came too late.
//
// Why slots may be used again: ONESHOT's have the generations of pushed slots (protocol/generations.h), counted with
// them, whose argument holds with every rank among its own peers, and whichever slots the call between two of a
// generation used. Results need none. An owner stores one of call e+1 only after it has taken
// what every rank sent in call e+1, partials or flags, and no rank sent any before its call e had ended, polls and
// clears of all places included. A rank stores the inputs of call e+1 (LAR_IN_SWITCH) once it has all results of call
// e, none of which was there before its owner had read that place of all inputs.
#ifndef LLM_ALLREDUCE_DEVICE_MULTICAST_CUH_
#define LLM_ALLREDUCE_DEVICE_MULTICAST_CUH_

#include "device/two_shot_in_band.cuh"

namespace lar {

// Switches that send a store to every rank came with sm_90: kernels of older GPUs are empty, and are never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kKnowsMulticast = false;
#else
constexpr bool kKnowsMulticast = true;
#endif

// Before the arguments of in-band kernels, whose table is cut to the world size.
struct MulticastArguments {
  char* all;                   // slots or results, where one store reaches every rank
  char* own;                   // where I see mine
  char* all_inputs;            // LAR_IN_SWITCH
  char* own_inputs;            // LAR_IN_SWITCH
  uint32_t generation_stride;  // ONESHOT, in vectors
  uint32_t rank_stride;        // ONESHOT, in vectors
  uint32_t* flags;             // LAR_IN_SWITCH: mine, [lane][flag_words]
  uint32_t flag_words;
};

template <int kWorldSize>
struct MulticastCall {
  MulticastArguments multicast;
  PushArguments<kWorldSize> in_band;
};

// A kernel of a fixed world size has as many entries of `peer_flags` as it needs.
template <int kWorldSize>
struct InSwitchCall {
  MulticastArguments multicast;
  InBandArguments in_band;
  uint32_t* peer_flags[kTableEntries<kWorldSize>];  // by rank: its flags, [lane][flag_words]
};

// Polls the results at `i` of every part, clears them and hands them to the sink: those of this rank, which come back
// to it, only until here, because the sink has them already.
template <int kWorldSize, typename Sink>
__device__ __forceinline__ bool drain_results(const MulticastArguments& multicast, const InBandArguments& arguments,
                                              uint32_t total_vectors, uint32_t i, const Sink& sink) {
  constexpr int kAtOnce = World<kWorldSize>::kRanksAtOnce;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
#pragma unroll 1
  for (int first = 0; first < world_size; first += kAtOnce) {
    char* from[kAtOnce];
    bool wanted[kAtOnce];
    uint4 results[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const uint32_t index = index_of<kWorldSize>(arguments, first + j, i);
      wanted[j] = index < total_vectors;
      from[j] = multicast.own + int64_t{wanted[j] ? index : 0} * LAR_VECTOR_BYTES;
      results[j] = {0u, 0u, 0u, 0u};
    }
    if (!poll_until_complete(arguments.limit, LAR_PHASE_GATHER, from, wanted, results,
                             [&](int j) { return rotated(arguments.rank, first + j, world_size); }))
      return false;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      clear_in_band_if(wanted[j], from[j]);
      if (wanted[j] && first + j > 0) sink(index_of<kWorldSize>(arguments, first + j, i), results[j]);
    }
  }
  return true;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_MULTICAST_CUH_
