// What becomes of a reduced vector: it is stored. A sink takes vectors of the output by their index, in any order;
// kernels hand it all that they have reduced or received. Others are files beside this one, with the same three
// classes.
#ifndef LLM_ALLREDUCE_DEVICE_SINK_STORE_CUH_
#define LLM_ALLREDUCE_DEVICE_SINK_STORE_CUH_

#include "device/payload.cuh"

namespace lar {

struct Store {
  static constexpr lar_epilogue kEpilogue = LAR_STORE;

  // Any message.
  template <typename T>
  class Any {
   public:
    __device__ __forceinline__ Any(const void* output, int64_t count) : output_(output, count) {}
    __device__ __forceinline__ void operator()(int64_t index, const uint4& raw) const { output_.store(index, raw); }

   private:
    const Payload<T> output_;
  };

  // Whole aligned vectors.
  class Whole {
   public:
    __device__ __forceinline__ explicit Whole(void* output) : output_(static_cast<uint4*>(output)) {}
    __device__ __forceinline__ void operator()(int64_t index, const uint4& raw) const { output_[index] = raw; }

   private:
    uint4* const output_;
  };

  // The same of large messages, stored as a stream: the caches are for the slots.
  class Streamed {
   public:
    __device__ __forceinline__ explicit Streamed(void* output) : output_(static_cast<uint4*>(output)) {}
    __device__ __forceinline__ void operator()(int64_t index, const uint4& raw) const { __stcs(&output_[index], raw); }

   private:
    uint4* const output_;
  };
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SINK_STORE_CUH_
