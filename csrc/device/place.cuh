// What a kernel is given that stores its results into its peers' outputs, and how it does.
#ifndef LLM_ALLREDUCE_DEVICE_PLACE_CUH_
#define LLM_ALLREDUCE_DEVICE_PLACE_CUH_

#include "device/in_band.cuh"

namespace lar {

struct PlaceArguments {
  lar_workspace workspace;
  void* outputs[LAR_MAX_WORLD_SIZE];  // by step: that of rank (rank + step) % world_size; they start on 16 bytes
  PushArguments<0> in_band;
};

// The outputs of all ranks, of any count of elements: what is stored there belongs to the next flag.
template <typename T, int kWorldSize>
class AllOutputs {
 public:
  __device__ __forceinline__ explicit AllOutputs(const PlaceArguments& place)
      : place_(place), whole_vectors_(static_cast<uint32_t>(place.in_band.count / Vector<T>::kElements)) {}

  // Vector `index` of the message.
  __device__ __forceinline__ void operator()(uint32_t index, const uint4& raw) const {
    const int world_size = World<kWorldSize>::size(place_.in_band.world_size);
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step) store(place_.outputs[step], index, raw);
    store(place_.outputs[0], index, raw);
  }

 private:
  __device__ __forceinline__ void store(void* output, uint32_t index, const uint4& raw) const {
    if (index < whole_vectors_) {
      store_weak(static_cast<uint4*>(output) + index, raw);
      return;
    }
    const T* values = reinterpret_cast<const T*>(&raw);
    const int64_t first = int64_t{index} * Vector<T>::kElements;
#pragma unroll
    for (int i = 0; i < Vector<T>::kElements; ++i)
      if (first + i < place_.in_band.count) store_weak(static_cast<T*>(output) + first + i, values[i]);
  }

  const PlaceArguments& place_;
  const uint32_t whole_vectors_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_PLACE_CUH_
