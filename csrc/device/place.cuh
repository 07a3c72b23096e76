// What a kernel is given that stores its results into its peers' outputs, and how it does.
#ifndef LLM_ALLREDUCE_DEVICE_PLACE_CUH_
#define LLM_ALLREDUCE_DEVICE_PLACE_CUH_

#include "device/in_band.cuh"
#include "device/lane.cuh"
#include "protocol/place.h"

namespace lar {

struct PlaceArguments {
  lar_workspace workspace;
  char* pools[LAR_MAX_WORLD_SIZE];  // by step: the registered memory of rank (rank + step) % world_size
  uint32_t where;                   // of this rank's output in its own, in vectors
  PushArguments<0> in_band;
};

// The same where inputs are read in place: of `in_band`, nothing that belongs to slots is used.
struct PlacePullArguments {
  PlaceArguments place;
  const void* inputs[LAR_MAX_WORLD_SIZE];  // by rank
};

// The flags of one lane in one call.
class PlaceFlags {
 public:
  __device__ __forceinline__ explicit PlaceFlags(const PlaceArguments& place)
      : place_(place), lane_(place.workspace, place.in_band.limit, EpochPlane::kPlace), call_(lane_.epoch() + 1) {}

  // For all threads of the block, each of them.
  __device__ __forceinline__ void announce() const {
    for (int peer = threadIdx.x; peer < place_.in_band.world_size; peer += blockDim.x)
      if (peer != place_.in_band.rank)
        store_weak(where_word(place_.workspace, peer, place_.in_band.rank, lane_.index()), place_.where);
    lane_.publish(FlagPlane::kPlaceOutput, call_);
  }

  __device__ __forceinline__ bool admit() const { return lane_.wait(FlagPlane::kPlaceOutput, LAR_PHASE_OUTPUT, call_); }

  // After admit(): the output of the rank `step` places on, 0 of this one.
  __device__ __forceinline__ char* output_of(int step) const {
    const int rank = rotated(place_.in_band.rank, step, place_.in_band.world_size);
    const uint32_t where =
        step == 0 ? place_.where : load_weak(where_word(place_.workspace, place_.in_band.rank, rank, lane_.index()));
    return place_.pools[step] + int64_t{where} * LAR_VECTOR_BYTES;
  }

  // `complete`: whether this thread has stored all its results. Peers hear nothing of a lane that has given up: then
  // false, for all threads.
  __device__ __forceinline__ bool tell(bool complete) const {
    if (!__syncthreads_and(complete)) return false;
    lane_.publish(FlagPlane::kPlaceDone, call_);
    return true;
  }

  __device__ __forceinline__ void settle() const {
    if (lane_.wait(FlagPlane::kPlaceDone, LAR_PHASE_GATHER, call_)) lane_.finish(call_);
  }

 private:
  const PlaceArguments& place_;
  const Lane<Roles::kWorkers> lane_;
  const uint32_t call_;
};

// The outputs of all ranks, of any count of elements: what is stored there belongs to the next flag.
template <typename T, int kWorldSize>
class AllOutputs {
 public:
  // For the whole block, after admit(). `outputs`: memory of the block.
  __device__ __forceinline__ AllOutputs(const PlaceFlags& flags, const InBandArguments& arguments, char** outputs)
      : world_size_(World<kWorldSize>::size(arguments.world_size)), count_(arguments.count), outputs_(outputs) {
    for (int step = threadIdx.x; step < world_size_; step += blockDim.x) outputs[step] = flags.output_of(step);
    __syncthreads();
  }

  // Vector `index` of the message.
  __device__ __forceinline__ void operator()(uint32_t index, const uint4& raw) const {
#pragma unroll World < kWorldSize> ::kRanksAtOnce
    for (int step = 0; step < world_size_; ++step) store(outputs_[step], index, raw);
  }

 private:
  __device__ __forceinline__ void store(char* output, uint32_t index, const uint4& raw) const {
    const int64_t first = int64_t{index} * Vector<T>::kElements;
    if (first + Vector<T>::kElements <= count_) {
      store_weak(reinterpret_cast<uint4*>(output) + index, raw);
      return;
    }
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < Vector<T>::kElements; ++i)
      if (first + i < count_) store_weak(reinterpret_cast<T*>(output) + first + i, values[i]);
  }

  const int world_size_;
  const int64_t count_;
  char* const* const outputs_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_PLACE_CUH_
