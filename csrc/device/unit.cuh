// Units of 8 elements, in which rows are normed: one vector of 16-bit elements, two of fp32.
#ifndef LLM_ALLREDUCE_DEVICE_UNIT_CUH_
#define LLM_ALLREDUCE_DEVICE_UNIT_CUH_

#include <type_traits>

#include "codec/norm.h"
#include "device/vector.cuh"

namespace lar {

template <typename T>
struct Unit {
  static constexpr int kElements = codec::kUnitElements;
  static constexpr int kVectors = kElements / Vector<T>::kElements;
  uint4 raw[kVectors];

  // In program order: with dependent launch the tensor may still be written when this kernel starts.
  __device__ __forceinline__ static Unit load(const void* base, int64_t index) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      unit.raw[i] = load_in_order(static_cast<const uint4*>(base) + index * kVectors + i);
    return unit;
  }

  __device__ __forceinline__ void store(void* base, int64_t index) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) static_cast<uint4*>(base)[index * kVectors + i] = raw[i];
  }

  __device__ __forceinline__ void widened(float (&x)[kElements]) const {
    constexpr int kOfVector = kElements / kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float values[kOfVector];
      widen_vector<T>(raw[i], values);
#pragma unroll
      for (int j = 0; j < kOfVector; ++j) x[i * kOfVector + j] = values[j];
    }
  }

  // The sum, rounded. Of 16-bit elements in one step: fp32 has more than twice their bits, so that rounding to it first
  // would change nothing (Figueroa, "When is double rounding innocuous?", 1995).
  __device__ __forceinline__ Unit plus(const Unit& other) const {
    Unit unit;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        reinterpret_cast<float*>(unit.raw)[i] =
            codec::add(reinterpret_cast<const float*>(raw)[i], reinterpret_cast<const float*>(other.raw)[i]);
      } else if (i % 2 == 0) {
        using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        reinterpret_cast<Pair*>(unit.raw)[i / 2] =
            __hadd2_rn(reinterpret_cast<const Pair*>(raw)[i / 2], reinterpret_cast<const Pair*>(other.raw)[i / 2]);
      }
    }
    return unit;
  }

  __device__ __forceinline__ static Unit rounded(const float (&x)[kElements]) {
    Unit unit;
    T* values = reinterpret_cast<T*>(unit.raw);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = round_to<T>(x[i]);
    return unit;
  }
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_UNIT_CUH_
