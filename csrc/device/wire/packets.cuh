// A message as packets of a wire format. One warp to a packet; every function is for the whole warp.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_PACKETS_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_PACKETS_CUH_

#include "device/payload.cuh"
#include "device/wire/packet.cuh"

namespace lar {

// A thread's values are neighbours: `kThreadVectors` vectors of the tensor.
template <typename T, typename Packet, typename Epilogue>
class Packets {
 public:
  static constexpr int kThreadValues = Packet::kThreadValues;
  static constexpr int kThreadVectors = kThreadValues / Vector<T>::kElements;
  using Values = float[kThreadValues];
  using Encoded = typename Packet::Encoded;
  using Raw = uint4[kThreadVectors];
  static constexpr int kRawBytes = Packet::kValues * sizeof(T);  // of a packet's values as they are

  __device__ __forceinline__ Packets(const void* input, const void* output, int64_t count)
      : input_(input, count),
        sink_(output, count),
        count_(count),
        total_vectors_(ceil_div(count, Vector<T>::kElements)),
        number_(ceil_div(count, Packet::kValues)) {}

  __device__ __forceinline__ int64_t number() const { return number_; }

  // This rank's own values, as they are: to be loaded before they are needed. Where a warp has little to do but to wait
  // for them, this and encoded(own) are faster than encoded(packet), and more code.
  __device__ __forceinline__ void load_own(int64_t packet, Raw& raw) const {
    input_.load_run(first_vector(packet), raw);
  }

  __device__ __forceinline__ static Encoded encoded(const Raw& own) {
    Values values;
    widen_values<T>(own, values);
    return Packet::encode(values);
  }

  __device__ __forceinline__ Encoded encoded(int64_t packet) const {
    Values values;
    load_values(input_, first_vector(packet), values);
    return Packet::encode(values);
  }

  // Decodes and stores to the output. A zero is +0.
  __device__ __forceinline__ void store(int64_t packet, const Encoded& encoded) const {
    Values values;
    Packet::decode(encoded, values);
    positive_zeros(values);
    if (has_values()) store_values<T>(sink_, first_vector(packet), total_vectors_, values);
  }

  // A sum is made term by term, from +0: this rank's own values, as they are, and what others sent.
  __device__ __forceinline__ static void clear(Values& sum) {
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) sum[i] = 0.0f;
  }

  __device__ __forceinline__ void add_own(int64_t packet, Values& sum) const {
    Values values;
    load_values(input_, first_vector(packet), values);
    add_own(values, sum);
  }

  __device__ __forceinline__ static void add_own(const Raw& own, Values& sum) {
    Values values;
    widen_values<T>(own, values);
    add_own(values, sum);
  }

  __device__ __forceinline__ static void add(const Encoded& encoded, Values& sum) {
    Values values;
    Packet::decode(encoded, values);
    add_to(sum, values);
  }

  // A sum as it travels on, encoded or rounded to T.
  __device__ __forceinline__ Encoded encoded_sum(int64_t packet, Values& sum) const {
    limit(sum);
    clear_behind_end(packet, sum);
    return Packet::encode(sum);
  }

  __device__ __forceinline__ static void round_sum(Values& sum, Raw& raw) {
    constexpr int kElements = Vector<T>::kElements;
    limit(sum);
    positive_zeros(sum);
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i)
      reinterpret_cast<T*>(&raw[i / kElements])[i % kElements] = round_to<T>(sum[i]);
  }

  // Rounded values in a slot: those vectors that the threads of a warp move together are neighbours.
  __device__ __forceinline__ static void load_raw(const char* slot, Raw& raw) {
    if (!has_values()) return;
#pragma unroll
    for (int j = 0; j < kThreadVectors; ++j) raw[j] = load_slot(slot, j * Packet::kThreads + threadIdx.x % 32);
  }

  __device__ __forceinline__ static void store_raw(char* slot, const Raw& raw) {
    if (!has_values()) return;
#pragma unroll
    for (int j = 0; j < kThreadVectors; ++j) store_slot(slot, j * Packet::kThreads + threadIdx.x % 32, raw[j]);
  }

  // Rounded values to the output.
  __device__ __forceinline__ void store(int64_t packet, const Raw& raw) const {
    if (!has_values()) return;
#pragma unroll
    for (int j = 0; j < kThreadVectors; ++j)
      if (first_vector(packet) + j < total_vectors_) sink_(first_vector(packet) + j, raw[j]);
  }

 private:
  __device__ __forceinline__ static bool has_values() { return threadIdx.x % 32 < Packet::kThreads; }

  __device__ __forceinline__ int64_t first_vector(int64_t packet) const {
    return (packet * Packet::kThreads + threadIdx.x % 32) * kThreadVectors;
  }

  __device__ __forceinline__ static void add_own(Values& values, Values& sum) {
    if (!Packet::Codec::kSendsInfinity) {
#pragma unroll
      for (int i = 0; i < kThreadValues; ++i) values[i] = codec::infinity_as_nan(values[i]);
    }
    add_to(sum, values);
  }

  __device__ __forceinline__ static void add_to(Values& sum, const Values& values) {
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) sum[i] = codec::add(sum[i], values[i]);
  }

  __device__ __forceinline__ static void positive_zeros(Values& values) {
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) values[i] = codec::add(0.0f, values[i]);
  }

  // Where the format sends infinities as NaN, a sum of finite values stays finite.
  __device__ __forceinline__ static void limit(Values& sum) {
    if (!Packet::Codec::kSendsInfinity) {
#pragma unroll
      for (int i = 0; i < kThreadValues; ++i) sum[i] = codec::largest_for_infinity(sum[i]);
    }
  }

  // Sums behind the message's end, which must not count.
  __device__ __forceinline__ void clear_behind_end(int64_t packet, Values& values) const {
    const int64_t first = first_vector(packet) * Vector<T>::kElements;
    if (first + kThreadValues <= count_) return;
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i)
      if (first + i >= count_) values[i] = 0.0f;
  }

  const Payload<T> input_;
  const typename Epilogue::template Any<T> sink_;
  const int64_t count_;
  const int64_t total_vectors_;
  const int64_t number_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_PACKETS_CUH_
