// 16-byte vectors of the payload, and the arithmetic that makes every exact strategy give the same bits.
#ifndef LLM_ALLREDUCE_DEVICE_VECTOR_CUH_
#define LLM_ALLREDUCE_DEVICE_VECTOR_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "device/ptx.cuh"
#include "device/world.cuh"

namespace lar {

template <typename T>
struct Vector {
  static constexpr int kElements = LAR_VECTOR_BYTES / sizeof(T);
};

// fp32 -> T, one rounding to nearest even. NaN becomes the canonical NaN of the type, so its bits do not
// depend on which kernel met it first.
template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half round_to<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// The values of a vector. A bf16 is the upper half of its fp32: an instruction each, where converting one by one takes
// two for every second.
template <typename T>
__device__ __forceinline__ void widen_vector(const uint4& raw, float (&x)[Vector<T>::kElements]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < Vector<T>::kElements; ++i) x[i] = widen(values[i]);
  }
}

// Sums vectors of T in fp32 in the order in which add() is called.
//
// The sum starts from +0, and x + y is -0 only when both are -0 (IEEE 754, round to nearest), so a zero
// result is always +0. The inputs of 16-bit types are multiples of the type's smallest subnormal, hence so is
// every partial sum: rounding cannot make a new -0 either.
template <typename T>
struct Accumulator {
  static constexpr int kElements = Vector<T>::kElements;
  float sum[kElements];

  __device__ __forceinline__ Accumulator() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum[i] = 0.0f;
  }

  __device__ __forceinline__ void add(const uint4& raw) {
    float x[kElements];
    widen_vector<T>(raw, x);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum[i] += x[i];
  }

  __device__ __forceinline__ uint4 rounded() const {
    uint4 raw;
    T* values = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = round_to<T>(sum[i]);
    return raw;
  }
};

// The fp32 sum of the vectors part(0) .. part(world_size - 1), in that order. Loads run ahead of the additions: those
// of all ranks, or where their number is not known, four at a time.
template <typename T, int kWorldSize, typename LoadPart>
__device__ __forceinline__ Accumulator<T> accumulate_in_rank_order(int world_size, LoadPart part) {
  constexpr int kGroup = World<kWorldSize>::kRanksAtOnce;
  const int ranks = World<kWorldSize>::size(world_size);
  Accumulator<T> sum;
#pragma unroll 1
  for (int first = 0; first < ranks; first += kGroup) {
    uint4 loaded[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (World<kWorldSize>::kIsFixed || first + i < ranks) loaded[i] = part(first + i);
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (World<kWorldSize>::kIsFixed || first + i < ranks) sum.add(loaded[i]);
  }
  return sum;
}

// The same, rounded.
template <typename T, int kWorldSize, typename LoadPart>
__device__ __forceinline__ uint4 sum_in_rank_order(int world_size, LoadPart part) {
  return accumulate_in_rank_order<T, kWorldSize>(world_size, part).rounded();
}

// Sums vectors 0 .. span-1 by the first `threads` of the block, ranks in order: store(i, part(0, i) + ...). More than
// one at a time would not fit the registers beside what a lane keeps.
template <typename T, typename LoadPart, typename Store>
__device__ __forceinline__ void sum_vectors(int64_t span, int threads, int world_size, LoadPart part, Store store) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < span; i += threads)
    store(i, sum_in_rank_order<T, 0>(world_size, [&](int source) { return part(source, i); }));
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_VECTOR_CUH_
