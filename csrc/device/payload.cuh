// The caller's tensors as runs of 16-byte vectors.
#ifndef LLM_ALLREDUCE_DEVICE_PAYLOAD_CUH_
#define LLM_ALLREDUCE_DEVICE_PAYLOAD_CUH_

#include "device/vector.cuh"

namespace lar {

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

  // Those at index_of(0), index_of(1), ..., which rise. Whole ones leave together: behind a branch for each, the second
  // would wait for the first.
  template <int kCount, typename IndexOf>
  __device__ __forceinline__ void load_all(IndexOf index_of, uint4 (&raw)[kCount]) const {
    if (index_of(kCount - 1) < whole_vectors_) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) raw[j] = reinterpret_cast<const uint4*>(address_)[index_of(j)];
      return;
    }
    // Behind the last whole one: the code for one vector, which all of them pass through by turns.
#pragma unroll
    for (int j = 0; j < kCount; ++j) raw[j] = {0u, 0u, 0u, 0u};
#pragma unroll 1
    for (int turn = 0; turn < kCount; ++turn) {
#pragma unroll
      for (int j = 0; j + 1 < kCount; ++j) raw[j] = raw[j + 1];
      raw[kCount - 1] = load(index_of(turn));
    }
  }

  __device__ __forceinline__ void store(int64_t index, const uint4& raw) const {
    T* out = const_cast<T*>(address_);
    if (index < whole_vectors_) {
      reinterpret_cast<uint4*>(out)[index] = raw;
      return;
    }
    // Element by element in a loop, the lowest first: unrolled it would be much of every kernel's code.
    const int64_t first = index * kElements;
    const int here = static_cast<int>(min(int64_t{kElements}, count_ - first));
    uint4 rest = raw;
#pragma unroll 1
    for (int i = 0; i < here; ++i) {
      out[first + i] = *reinterpret_cast<const T*>(&rest);
      if (sizeof(T) == 4) {
        rest = {rest.y, rest.z, rest.w, 0u};
      } else {
        rest = {rest.x >> 16 | rest.y << 16, rest.y >> 16 | rest.z << 16, rest.z >> 16 | rest.w << 16, rest.w >> 16};
      }
    }
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

#endif  // LLM_ALLREDUCE_DEVICE_PAYLOAD_CUH_
