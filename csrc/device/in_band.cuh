// Readiness inside the data ("Lamport" exchange): no flag, no barrier, no fence on the way.
//
// A slot is filled with a marker word before it is used. The sender simply stores its vectors; the reader polls the
// vectors themselves until no word is the marker any more. Each 32-bit word is written and read in one piece, and every
// word is checked, so a vector that arrives in parts is never taken early. Words are compared as bits: as floats, -0
// would equal +0, and flush-to-zero would make subnormals equal to it too.
//
// Which generation of slots a call uses, and why so few are enough: protocol/generations.h, which says what is counted
// together. Launches in between that are not counted only add order. The argument is about whole kernels, so which
// block handles which vector may change from call to call.
#ifndef LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_
#define LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_

#include "device/payload.cuh"
#include "device/schedule/flat.cuh"
#include "device/wait.cuh"
#include "protocol/generations.h"

namespace lar {

// What an in-band kernel is given. Everything that the host can add up it has: the first store to a peer is what the
// whole call waits for. Strides and indices count 16-byte vectors and fit 32 bits.
struct InBandArguments {
  const void* input;
  void* output;
  int64_t count;
  char* own;         // the slots in my workspace: the next rank's, generation 0
  uint32_t* epochs;  // [lane]
  uint32_t lanes;    // entries of epochs
  uint32_t generation_stride;
  uint32_t peer_stride;
  uint32_t gather_stride;  // from a scatter slot to the gather slot of the same indices (TWOSHOT)
  uint32_t part;           // vectors in the part of one rank (TWOSHOT); the last parts may be shorter
  uint32_t scatter_lanes;  // see lar_launch
  uint32_t drain_lanes;
  int32_t rank;
  int32_t world_size;  // for kernels of any
  WaitLimit limit;
};

// The table comes last: kernels of a fixed world size have only as much of it as they need.
template <int kWorldSize>
struct PushArguments : InBandArguments {
  char* to[kTableEntries<kWorldSize>];  // by step: my slot at rank (rank + step) % world_size, generation 0
};

// Relaxed accesses of system scope: whole words, in no order with anything else.
__device__ __forceinline__ void store_in_band(char* slot, uint32_t index, const uint4& raw) {
  store_relaxed_system(reinterpret_cast<uint4*>(slot) + index, raw);
}

__device__ __forceinline__ void clear_in_band_if(bool wanted, char* address) {
  fill_relaxed_system_if(wanted, address, LAR_IN_BAND_MARKER);
}

// The marker is the smallest signed word: vectors are complete when the smallest of all their words is another one. One
// chain of minima takes one predicate; sixteen comparisons would take so many that ptxas holds back loads for them.
static_assert(LAR_IN_BAND_MARKER == 0x80000000u, "must be the smallest int");

__device__ __forceinline__ int smallest_word(const uint4& raw) {
  return min(min(static_cast<int>(raw.x), static_cast<int>(raw.y)),
             min(static_cast<int>(raw.z), static_cast<int>(raw.w)));
}

__device__ __forceinline__ bool is_marker(int word) { return word == static_cast<int>(LAR_IN_BAND_MARKER); }

// An input vector without marker words. The values stay equal: only a -0 becomes +0.
__device__ __forceinline__ uint4 without_marker(uint4 raw) {
  raw.x = raw.x == LAR_IN_BAND_MARKER ? 0u : raw.x;
  raw.y = raw.y == LAR_IN_BAND_MARKER ? 0u : raw.y;
  raw.z = raw.z == LAR_IN_BAND_MARKER ? 0u : raw.z;
  raw.w = raw.w == LAR_IN_BAND_MARKER ? 0u : raw.w;
  return raw;
}

// The number of calls so far, which says which generation is next. In device memory, so that a captured graph may be
// replayed between any other calls.
__device__ __forceinline__ uint32_t epoch_of(const InBandArguments& arguments) {
  return load_relaxed_gpu(arguments.epochs + blockIdx.x);
}

// Counts this call; for the whole block, once every thread has the epoch. Block 0 counts for the lanes without a block.
__device__ __forceinline__ void advance_epoch(const InBandArguments& arguments, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x == 0) arguments.epochs[blockIdx.x] = epoch + 1;
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) count_beginning(arguments.limit.begun);
    for (uint32_t lane = gridDim.x + threadIdx.x; lane < arguments.lanes; lane += blockDim.x)
      arguments.epochs[lane] = epoch + 1;
  }
}

// Where the slots of this call's generation begin, from `own` or from one of `to`.
__device__ __forceinline__ uint32_t slots_of_call(const InBandArguments& arguments, uint32_t epoch) {
  return pushed_generation(epoch) * arguments.generation_stride;
}

// From `own` to the slot of `peer`.
template <int kWorldSize>
__device__ __forceinline__ uint32_t slot_of_peer(const InBandArguments& arguments, int peer) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  return slot_of_step(step_to(arguments.rank, peer, world_size)) * arguments.peer_stride;
}

// Whether none of the vectors has a marker.
template <int kCount>
__device__ __forceinline__ bool are_complete(const uint4 (&vectors)[kCount]) {
  int smallest = smallest_word(vectors[0]);
#pragma unroll
  for (int i = 1; i < kCount; ++i) smallest = min(smallest, smallest_word(vectors[i]));
  return !is_marker(smallest);
}

// Polls the wanted vectors, all in flight together, until each is complete. The others keep their values, which must
// not be incomplete. from[i]: the address of the i-th; rank_of(i) names the rank behind it. False when the wait expired
// or the group is broken; the caller must then return.
template <int kCount, typename From, typename RankOf>
__device__ __forceinline__ bool poll_until_complete(const WaitLimit& limit, lar_phase phase, const From& from,
                                                    const bool (&wanted)[kCount], uint4 (&vectors)[kCount],
                                                    RankOf rank_of) {
  WaitClock clock(limit);
  do {
#pragma unroll 1
    for (uint32_t polls = 0; polls < kPollsPerCheck; ++polls) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) load_relaxed_system_if(wanted[i], from[i], vectors[i]);
      if (are_complete(vectors)) return true;
    }
  } while (!clock.is_over());
  int missing = 0;
#pragma unroll
  for (int i = kCount - 1; i >= 0; --i)
    if (is_marker(smallest_word(vectors[i]))) missing = rank_of(i);
  if (clock.expired()) give_up(limit, blockIdx.x, missing, phase, 0, 0, clock.waited_ns());
  return false;
}

// A first poll of what peers send, ahead of the one that waits: of the vectors at address_of(peer), of as many ranks as
// poll_and_sum_at() has in flight. They travel while the caller does something else, and may come back incomplete, as
// they are if nothing is asked for.
template <int kWorldSize>
struct FirstPoll {
  static constexpr bool kIsPair = kWorldSize == 2;
  static constexpr int kRanks = kIsPair ? 1 : World<kWorldSize>::kRanksAtOnce;
  uint4 vectors[kRanks];

  template <typename AddressOf>
  __device__ __forceinline__ FirstPoll(const InBandArguments& arguments, AddressOf address_of, bool asks) {
    const int world_size = World<kWorldSize>::size(arguments.world_size);
    const uint32_t word = asks ? 0u : LAR_IN_BAND_MARKER;
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const int rank = kIsPair ? 1 - arguments.rank : i;
      const bool is_peer = rank != arguments.rank && (World<kWorldSize>::kIsFixed || rank < world_size);
      vectors[i] = {word, word, word, word};
      load_relaxed_system_if(asks && is_peer, address_of(is_peer ? rank : 0), vectors[i]);
    }
  }

  // That of a rank, one of the first that are in flight.
  __device__ __forceinline__ const uint4& of(int rank) const { return vectors[kIsPair ? 0 : rank]; }

  __device__ __forceinline__ bool is_complete() const { return are_complete(vectors); }
};

// The sum in rank order, rounded, of `mine` and of the vectors at address_of(peer), which are polled and, if `kClears`,
// cleared. `kPollsOwn`: this rank's own comes back to it, and is polled like the others instead of `mine`. `asked`:
// null, or the first poll. False as for poll_until_complete().
template <typename T, int kWorldSize, bool kClears, bool kPollsOwn = false, typename AddressOf>
__device__ __forceinline__ bool poll_and_sum_at(const InBandArguments& arguments, lar_phase phase, AddressOf address_of,
                                                const uint4& mine, uint4& result,
                                                const FirstPoll<kWorldSize>* asked = nullptr) {
  constexpr bool kIsFixed = World<kWorldSize>::kIsFixed;
  constexpr int kGroup = World<kWorldSize>::kRanksAtOnce;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  Accumulator<T> sum;
  if constexpr (kWorldSize == 2 && !kPollsOwn) {
    // Own values first, while the peer's travel: which of two is added first changes no bit.
    const int peer = 1 - arguments.rank;
    char* const from[] = {address_of(peer)};
    const bool wanted[] = {true};
    uint4 theirs[1];
    sum.add(mine);
    compute_here(sum.sum);
    if (asked) theirs[0] = asked->of(peer);
    if (!(asked && are_complete(theirs)) &&
        !poll_until_complete(arguments.limit, phase, from, wanted, theirs, [&](int) { return peer; }))
      return false;
    if (kClears) clear_in_band_if(true, from[0]);
    sum.add(theirs[0]);
    result = sum.rounded();
    return true;
  }
#pragma unroll 1
  for (int first = 0; first < world_size; first += kGroup) {
    char* from[kGroup];
    bool wanted[kGroup];
    uint4 parts[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool is_rank = kIsFixed || first + i < world_size;
      from[i] = address_of(is_rank ? first + i : first);
      wanted[i] = is_rank && (kPollsOwn || first + i != arguments.rank);
      parts[i] = asked && first == 0 && wanted[i] ? asked->of(i) : mine;
    }
    if (!(asked && first == 0 && are_complete(parts)) &&
        !poll_until_complete(arguments.limit, phase, from, wanted, parts, [&](int i) { return first + i; }))
      return false;
    if (kClears) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) clear_in_band_if(wanted[i], from[i]);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (kIsFixed || first + i < world_size) sum.add(parts[i]);
  }
  result = sum.rounded();
  return true;
}

// The same with the vector at `index` of every peer's slot in arguments.own, which is cleared.
template <typename T, int kWorldSize>
__device__ __forceinline__ bool poll_and_sum(const InBandArguments& arguments, lar_phase phase, uint32_t index,
                                             const uint4& mine, uint4& result) {
  const auto address_of = [&](int peer) {
    const uint32_t at = index + slot_of_peer<kWorldSize>(arguments, peer);
    return arguments.own + static_cast<int64_t>(at) * LAR_VECTOR_BYTES;
  };
  return poll_and_sum_at<T, kWorldSize, true>(arguments, phase, address_of, mine, result);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_
