// Readiness inside the data ("Lamport" exchange): no flag, no barrier, no fence.
//
// A slot is filled with a marker word before it is used. The sender simply stores its vectors; the reader polls the
// vectors themselves until no word is the marker any more. Each 32-bit word is written and read in one piece, and every
// word is checked, so a vector that arrives in parts is never taken early. Words are compared as bits: as floats, -0
// would equal +0, and flush-to-zero would make subnormals equal to it too.
//
// The thread that reads a vector restores the marker behind it. Two generations of slots, used by turns, are enough:
// what this rank cleared in call e is written next in call e+2. The peer that writes has ended call e+1, in which it
// took a value that depends on what this rank sent in call e+1, and this rank sent nothing of call e+1 before call e,
// clears included, had ended (the kernel boundary, or griddepcontrol.wait, which includes it). "Call" counts the in-band
// calls of one algorithm; others in between only add order.
#ifndef LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_
#define LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_

#include "device/lane.cuh"
#include "device/vector.cuh"

namespace lar {

// What an in-band kernel is given. Everything that the host can add up it has: the first store to a peer is what the
// whole call waits for. Strides and indices count 16-byte vectors and fit 32 bits.
struct InBandArguments {
  const void* input;
  void* output;
  int64_t count;
  char* to[LAR_MAX_WORLD_SIZE];  // my slot at rank (rank + i) % world_size, of lane 0 and generation 0
  char* own;                     // the slots in my workspace: source 0, lane 0, generation 0
  uint32_t* generations;         // [lane]
  uint32_t generation_stride;
  uint32_t source_stride;
  uint32_t lane_stride;
  uint32_t gather_stride;  // from a scatter slot to the gather slot of the same indices (TWOSHOT)
  uint32_t chunk;          // vectors that a lane moves to one peer
  int32_t rank;
  WaitLimit limit;
};

// Relaxed accesses of system scope: whole words, in no order with anything else.
__device__ __forceinline__ void store_in_band(char* slot, uint32_t index, const uint4& raw) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4*>(slot) + index),
               "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_in_band(const char* slot, uint32_t index) {
  uint4 raw;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(reinterpret_cast<const uint4*>(slot) + index)
               : "memory");
  return raw;
}

__device__ __forceinline__ void clear_in_band(char* slot, uint32_t index) {
  store_in_band(slot, index, {LAR_IN_BAND_MARKER, LAR_IN_BAND_MARKER, LAR_IN_BAND_MARKER, LAR_IN_BAND_MARKER});
}

__device__ __forceinline__ bool is_complete(const uint4& raw) {
  return raw.x != LAR_IN_BAND_MARKER && raw.y != LAR_IN_BAND_MARKER && raw.z != LAR_IN_BAND_MARKER &&
         raw.w != LAR_IN_BAND_MARKER;
}

// An input vector without marker words. The values stay equal: only a -0 becomes +0.
__device__ __forceinline__ uint4 without_marker(uint4 raw) {
  raw.x = raw.x == LAR_IN_BAND_MARKER ? 0u : raw.x;
  raw.y = raw.y == LAR_IN_BAND_MARKER ? 0u : raw.y;
  raw.z = raw.z == LAR_IN_BAND_MARKER ? 0u : raw.z;
  raw.w = raw.w == LAR_IN_BAND_MARKER ? 0u : raw.w;
  return raw;
}

// The generation that this call uses. It lives in device memory, per lane, so that a captured graph may be replayed
// between any other calls.
__device__ __forceinline__ uint32_t generation_of(const InBandArguments& arguments) {
  return *static_cast<volatile uint32_t*>(arguments.generations + blockIdx.x);
}

// Ends the use of `generation`; for the whole block, once every thread has it.
__device__ __forceinline__ void flip_generation(const InBandArguments& arguments, uint32_t generation) {
  __syncthreads();
  if (threadIdx.x == 0) arguments.generations[blockIdx.x] = generation ^ 1u;
}

// Polls load(0) .. load(kCount - 1), all in flight together, until each is complete. rank_of(i) names the rank behind
// the i-th. False when the wait expired or the group is broken; the caller must then return.
template <int kCount, typename LoadPart, typename RankOf>
__device__ __forceinline__ bool poll_until_complete(const WaitLimit& limit, lar_phase phase, uint4 (&vectors)[kCount],
                                                    LoadPart load, RankOf rank_of) {
  Patience patience(limit);
  while (true) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) vectors[i] = load(i);
    bool complete = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) complete &= is_complete(vectors[i]);
    if (complete) return true;
    if (patience.is_over()) {
      int missing = 0;
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i)
        if (!is_complete(vectors[i])) missing = rank_of(i);
      if (patience.expired()) give_up(limit, blockIdx.x, missing, phase, 0, 0, patience.waited_ns());
      return false;
    }
  }
}

// The sum in rank order, rounded, of `mine` and of the vector at `index` of every peer's slot in `slots` (source 0's;
// the others follow at source_stride), which are cleared. Polls; false as for poll_until_complete().
template <typename T, int kWorldSize>
__device__ __forceinline__ bool poll_and_sum(const InBandArguments& arguments, lar_phase phase, char* slots,
                                             uint32_t index, const uint4& mine, uint4& result) {
  constexpr int kGroup = kWorldSize <= 8 ? kWorldSize : 4;  // with 16, addresses and vectors must share the registers
  const int rank = arguments.rank;
  Accumulator<T> sum;
#pragma unroll 1
  for (int first = 0; first < kWorldSize; first += kGroup) {
    const auto load = [&](int i) {
      return first + i == rank ? mine : load_in_band(slots, index + (first + i) * arguments.source_stride);
    };
    uint4 parts[kGroup];
    if (!poll_until_complete(arguments.limit, phase, parts, load, [&](int i) { return first + i; })) return false;
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (first + i != rank) clear_in_band(slots, index + (first + i) * arguments.source_stride);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sum.add(parts[i]);
  }
  result = sum.rounded();
  return true;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_
