// Readiness inside the data ("Lamport" exchange): no flag, no barrier, no fence.
//
// A slot is filled with a marker word before it is used. The sender simply stores its vectors; the reader polls the
// vectors themselves until no word is the marker any more. Each 32-bit word is written and read in one piece, and every
// word is checked, so a vector that arrives in parts is never taken early. Words are compared as bits: as floats, -0
// would equal +0, and flush-to-zero would make subnormals equal to it too.
//
// The reader restores the marker, one call later and off the critical path: while this call's data is in flight, it
// clears what the lane read in its previous call. The kernel boundary (or griddepcontrol.wait, which includes it) puts
// those clears before anything that this rank sends in its next call; csrc/kernels/ argues from there how many
// generations are enough.
#ifndef LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_
#define LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_

#include "device/lane.cuh"
#include "device/vector.cuh"

namespace lar {

// Relaxed accesses of system scope: whole words, in no order with anything else.
__device__ __forceinline__ void store_in_band(char* slot, int64_t index, const uint4& raw) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4*>(slot) + index),
               "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_in_band(const char* slot, int64_t index) {
  uint4 raw;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(reinterpret_cast<const uint4*>(slot) + index)
               : "memory");
  return raw;
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

// A lane's place in its generations, kept in device memory like the epoch, and for the same reason.
//
// It is read before wait_for_previous_kernel(), so that the first thing after that wait is the payload. That is safe
// because hand_over() writes it, fenced, before it lets the next kernel start: whichever kernel wrote the state last
// has either ended or handed over.
class InBandLane {
 public:
  __device__ __forceinline__ InBandLane(const lar_workspace& workspace, lar_algorithm algorithm)
      : workspace_(workspace), algorithm_(algorithm), lane_(workspace, algorithm) {
    const volatile uint32_t* state = state_words();
    call_ = state[0];
    dirty_vectors_ = state[1];
  }

  __device__ __forceinline__ int index() const { return lane_.index(); }

  // Counts calls modulo the least common multiple of all numbers of generations.
  __device__ __forceinline__ int generation(int generations) const { return call_ % generations; }
  __device__ __forceinline__ int previous_generation(int generations) const {
    return (call_ + generations - 1) % generations;
  }

  __device__ __forceinline__ char* slot(int holder, int64_t region, int64_t chunk_bytes, int generation,
                                        int source) const {
    return static_cast<char*>(workspace_.base[holder]) +
           slot_offset(workspace_.layout, region, chunk_bytes, generation, source, lane_.index());
  }

  // Restores the marker in every slot of the previous call in one region.
  template <int kWorldSize>
  __device__ __forceinline__ void clear_previous(int64_t region, int64_t chunk_bytes, int generations) const {
    const int rank = workspace_.rank;
    const uint4 marker = {LAR_IN_BAND_MARKER, LAR_IN_BAND_MARKER, LAR_IN_BAND_MARKER, LAR_IN_BAND_MARKER};
    const int generation = previous_generation(generations);
    for (int source = 0; source < kWorldSize; ++source) {
      if (source == rank) continue;
      char* own = slot(rank, region, chunk_bytes, generation, source);
      for (uint32_t i = threadIdx.x; i < dirty_vectors_; i += blockDim.x) store_in_band(own, i, marker);
    }
  }

  // Counts this call, in which slots are used up to `vectors`, and lets the next kernel start.
  __device__ __forceinline__ void hand_over(int64_t vectors) const {
    __syncthreads();  // every thread has read the state by now
    if (threadIdx.x == 0) {
      volatile uint32_t* state = state_words();
      state[0] = (call_ + 1) % kCallModulus;
      state[1] = static_cast<uint32_t>(vectors);
      __threadfence();
    }
    __syncthreads();
    let_next_kernel_start();
  }

  __device__ __forceinline__ void give_up(int peer, lar_phase phase, int64_t waited_ns) const {
    lane_.give_up(peer, phase, call_, call_, waited_ns);
  }

 private:
  static constexpr uint32_t kCallModulus = 6;
  static_assert(kCallModulus % LAR_ONE_SHOT_IN_BAND_SLOTS == 0 && kCallModulus % LAR_SCATTER_IN_BAND_SLOTS == 0 &&
                    kCallModulus % LAR_GATHER_IN_BAND_SLOTS == 0,
                "a generation must follow its predecessor when the count wraps");

  __device__ __forceinline__ uint32_t* state_words() const {
    return in_band_state(workspace_.base[workspace_.rank], workspace_.layout, algorithm_, lane_.index());
  }

  const lar_workspace& workspace_;
  const lar_algorithm algorithm_;
  const Lane lane_;
  uint32_t call_;
  uint32_t dirty_vectors_;
};

// Polls load(0) .. load(kCount - 1), all in flight together, until each is complete. rank_of(i) names the rank behind
// the i-th. False when the wait expired or the group is broken; the caller must then return.
template <int kCount, typename LoadPart, typename RankOf>
__device__ __forceinline__ bool poll_until_complete(const InBandLane& lane, const lar_workspace& workspace,
                                                    lar_phase phase, uint4 (&vectors)[kCount], LoadPart load,
                                                    RankOf rank_of) {
  Patience patience(workspace);
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
      if (patience.expired()) lane.give_up(missing, phase, patience.waited_ns());
      return false;
    }
  }
}

// Waits for load(rank) of every rank and sums them in rank order: sum_in_rank_order() of device/vector.cuh, polling.
template <typename T, int kWorldSize, typename LoadPart>
__device__ __forceinline__ bool poll_and_sum(const InBandLane& lane, const lar_workspace& workspace, lar_phase phase,
                                             LoadPart load, uint4& result) {
  constexpr int kGroup = kWorldSize <= 8 ? kWorldSize : 4;  // with 16, addresses and vectors must share the registers
  Accumulator<T> sum;
#pragma unroll 1
  for (int first = 0; first < kWorldSize; first += kGroup) {
    uint4 parts[kGroup];
    if (!poll_until_complete(
            lane, workspace, phase, parts, [&](int i) { return load(first + i); }, [&](int i) { return first + i; }))
      return false;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sum.add(parts[i]);
  }
  result = sum.rounded();
  return true;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_IN_BAND_CUH_
