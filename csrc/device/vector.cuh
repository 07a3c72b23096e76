// 16-byte vectors of the payload, and the arithmetic that makes every exact strategy give the same bits.
#ifndef LLM_ALLREDUCE_DEVICE_VECTOR_CUH_
#define LLM_ALLREDUCE_DEVICE_VECTOR_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"
#include "device/ptx.cuh"

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
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum[i] += widen(values[i]);
  }

  __device__ __forceinline__ uint4 rounded() const {
    uint4 raw;
    T* values = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = round_to<T>(sum[i]);
    return raw;
  }
};

// The sum of the vectors part(0) .. part(kWorldSize - 1), in that order. Loads run ahead of the additions: those
// of all ranks, or with 16, four at a time, to stay in registers.
template <typename T, int kWorldSize, typename LoadPart>
__device__ __forceinline__ uint4 sum_in_rank_order(LoadPart part) {
  constexpr int kGroup = kWorldSize <= 8 ? kWorldSize : 4;
  static_assert(kWorldSize % kGroup == 0, "groups must tile the ranks");
  Accumulator<T> sum;
#pragma unroll 1
  for (int first = 0; first < kWorldSize; first += kGroup) {
    uint4 loaded[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) loaded[i] = part(first + i);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sum.add(loaded[i]);
  }
  return sum.rounded();
}

// Sums vectors 0 .. span-1 by the first `threads` of the block: store(i, part(0, i) + .. + part(kWorldSize - 1, i)).
// About eight loads of each thread are in flight.
template <typename T, int kWorldSize, typename LoadPart, typename Store>
__device__ __forceinline__ void sum_vectors(int64_t span, int threads, LoadPart part, Store store) {
  constexpr int kAtOnce = kWorldSize > 4 ? 1 : 8 / kWorldSize;
  if constexpr (kAtOnce == 1) {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < span; i += threads)
      store(i, sum_in_rank_order<T, kWorldSize>([&](int source) { return part(source, i); }));
  } else {
    for (int64_t i = threadIdx.x; i < span; i += kAtOnce * threads) {
      uint4 loaded[kAtOnce][kWorldSize];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (const int64_t at = i + j * threads; at < span) {
#pragma unroll
          for (int source = 0; source < kWorldSize; ++source) loaded[j][source] = part(source, at);
        }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (const int64_t at = i + j * threads; at < span) {
          Accumulator<T> sum;
#pragma unroll
          for (int source = 0; source < kWorldSize; ++source) sum.add(loaded[j][source]);
          store(at, sum.rounded());
        }
    }
  }
}

// A whole aligned vector of the caller's tensor, loaded where the program says so. Not through the read-only path: with
// dependent launch the tensor may still be written when this kernel starts.
__device__ __forceinline__ uint4 load_vector(const void* address, uint32_t index) {
  return load_in_order(static_cast<const uint4*>(address) + index);
}

// The caller's tensor as a run of vectors: any count, any alignment. Only the last vector, or every vector of
// a tensor that does not start on 16 bytes, is moved element by element.
template <typename T>
class Payload {
 public:
  static constexpr int kElements = Vector<T>::kElements;

  __device__ __forceinline__ Payload(const void* address, int64_t count)
      : address_(static_cast<const T*>(address)),
        count_(count),
        whole_vectors_(reinterpret_cast<uintptr_t>(address) % LAR_VECTOR_BYTES == 0 ? count / kElements : 0) {}

  __device__ __forceinline__ uint4 load(int64_t index) const {
    if (index < whole_vectors_) return reinterpret_cast<const uint4*>(address_)[index];
    uint4 raw = {0u, 0u, 0u, 0u};
    T* values = reinterpret_cast<T*>(&raw);
    const int64_t first = index * kElements;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (first + i < count_) values[i] = address_[first + i];
    return raw;
  }

  __device__ __forceinline__ void store(int64_t index, const uint4& raw) const {
    T* out = const_cast<T*>(address_);
    if (index < whole_vectors_) {
      reinterpret_cast<uint4*>(out)[index] = raw;
      return;
    }
    const T* values = reinterpret_cast<const T*>(&raw);
    const int64_t first = index * kElements;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (first + i < count_) out[first + i] = values[i];
  }

 private:
  const T* address_;
  int64_t count_;
  int64_t whole_vectors_;
};

// Moves vectors 0 .. spans[k]-1 of each of kCount pieces by the first `threads` of the block: store(k, i, load(k, i)).
// At least four loads of each thread are in flight before the first store.
template <int kCount, typename Load, typename Store>
__device__ __forceinline__ void move_vectors(const int64_t (&spans)[kCount], int threads, Load load, Store store) {
  constexpr int kAtOnce = kCount >= 4 ? 1 : (4 + kCount - 1) / kCount;
  int64_t longest = spans[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) longest = max(longest, spans[k]);
  for (int64_t i = threadIdx.x; i < longest; i += kAtOnce * threads) {
    uint4 raw[kAtOnce][kCount];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (i + j * threads < spans[k]) raw[j][k] = load(k, i + j * threads);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (i + j * threads < spans[k]) store(k, i + j * threads, raw[j][k]);
  }
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_VECTOR_CUH_
