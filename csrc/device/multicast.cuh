// In band through memory of which one store reaches every rank: a switch copies it on its way.
//
// A store to `all` arrives in every rank's memory, the sender's included, in each at another time. PTX lets nothing but
// its multimem instructions go there (store_to_all). Up to sm_120 their machine code is that of a plain store, to which
// only the address is another; tests that play the switch on ordinary memory rely on it (tests/support/soft_switch.py).
//
// `all` and `own` are two addresses of the same memory, between which PTX asks for a fence.proxy.alias. Between what
// was stored through `all` and the polls of it through `own` there is none. Of an earlier call's, and of clears, the
// end of the kernel before is one. Within a call nothing is ordered by it: polls look at the data until it is there,
// word by word, and are strong, so that each goes past L1 to the memory where the switch stores. The fence would cost
// each poll a MEMBAR.SC and a CCTL.IVALL. Inputs that the switch sums are another matter: flags say that they are
// there.
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

// Store a vector where it reaches every rank, `index` vectors behind `all`.
__device__ __forceinline__ void send_to_all(const MulticastArguments& multicast, uint32_t index, const uint4& raw) {
  store_to_all(reinterpret_cast<uint4*>(multicast.all) + index, raw);
}

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
