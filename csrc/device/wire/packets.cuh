// A message as packets of a wire format. One warp to a packet; every function is for the whole warp.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_PACKETS_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_PACKETS_CUH_

#include "device/payload.cuh"
#include "device/wire/packet.cuh"

namespace lar {

// A thread's values are neighbours, its share of a packet. What it moves between the tensor and its registers are other
// vectors where that lets the warp move neighbours (device/wire/packet.cuh).
template <typename T, typename Packet, typename Epilogue>
class Packets {
 public:
  static constexpr int kThreadValues = Packet::kThreadValues;
  static constexpr int kThreadVectors = kThreadValues / Vector<T>::kElements;
  using Values = float[kThreadValues];
  using Encoded = typename Packet::Encoded;
  using Raw = uint4[kThreadVectors];  // as they are moved
  // This rank's own values as they are kept until they are added.
  using Own = std::conditional_t<Packet::Codec::kOwnAsSent, Encoded, Raw>;
  static constexpr int kRawBytes = Packet::kValues * sizeof(T);  // of a packet's values as they are

  __device__ __forceinline__ Packets(const void* input, const void* output, int64_t count)
      : input_(input, count),
        sink_(output, count),
        count_(count),
        total_vectors_(ceil_div(count, Vector<T>::kElements)),
        number_(ceil_div(count, Packet::kValues)) {}

  __device__ __forceinline__ int64_t number() const { return number_; }

  // This rank's own values, as they are: to be loaded before they are needed.
  __device__ __forceinline__ void load_own(int64_t packet, Raw& raw) const {
    input_.load_all([&](int j) { return vector(packet, j); }, raw);
  }

  __device__ __forceinline__ static Encoded encoded(const Raw& own) {
    Values values;
    widen_own(own, values);
    return Packet::encode(values);
  }

  __device__ __forceinline__ Encoded encoded(int64_t packet) const {
    Raw own;
    load_own(packet, own);
    return encoded(own);
  }

  // Decodes and stores to the output. A zero is +0.
  __device__ __forceinline__ void store(int64_t packet, const Encoded& encoded) const {
    Values values;
    Packet::decode(encoded, values);
    positive_zeros(values);
    store(packet, values);
  }

  // Values as they are, rounded.
  __device__ __forceinline__ void store(int64_t packet, const Values& values) const {
    Raw raw;
    round_own(values, raw);
    store(packet, raw);
  }

  // What add_own() takes, to be loaded before it is needed.
  __device__ __forceinline__ void take_own(int64_t packet, Own& own) const {
    if constexpr (Packet::Codec::kOwnAsSent)
      own = encoded(packet);
    else
      load_own(packet, own);
  }

  // A sum is made term by term, from +0: this rank's own values, as they are or as others see them
  // (Codec::kOwnAsSent), and what others sent.
  __device__ __forceinline__ static void clear(Values& sum) {
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) sum[i] = 0.0f;
  }

  __device__ __forceinline__ void add_own(int64_t packet, Values& sum) const {
    Own own;
    take_own(packet, own);
    add_own(own, sum);
  }

  __device__ __forceinline__ static void add_own(const Own& own, Values& sum) {
    if constexpr (Packet::Codec::kOwnAsSent)
      add(own, sum);
    else
      add_as_they_are(own, sum);
  }

  __device__ __forceinline__ static void add_as_they_are(const Raw& own, Values& sum) {
    Values values;
    widen_own(own, values);
    if (!Packet::Codec::kSendsInfinity) {
#pragma unroll
      for (int i = 0; i < kThreadValues; ++i) values[i] = codec::infinity_as_nan(values[i]);
    }
    add_to(sum, values);
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
    limit(sum);
    positive_zeros(sum);
    round_own(sum, raw);
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
      if (vector(packet, j) < total_vectors_) sink_(vector(packet, j), raw[j]);
  }

 private:
  __device__ __forceinline__ static bool has_values() { return threadIdx.x % 32 < Packet::kThreads; }

  // The j-th of the vectors that this thread moves.
  __device__ __forceinline__ static int64_t vector(int64_t packet, int j) {
    return packet * (Packet::kValues / Vector<T>::kElements) + Packet::template vector<T>(j);
  }

  __device__ __forceinline__ static void widen_own(const Raw& raw, Values& values) {
    Raw own;
#pragma unroll
    for (int j = 0; j < kThreadVectors; ++j) own[j] = raw[j];
    Packet::template exchange<T>(own);
    widen_values<T>(own, values);
  }

  __device__ __forceinline__ static void round_own(const Values& values, Raw& raw) {
    round_values<T>(values, raw);
    Packet::template exchange<T>(raw);
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
    const int64_t first = packet * Packet::kValues + Packet::first_value();
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
