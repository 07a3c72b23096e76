// Packets of the wire formats on the device: one warp to a packet.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_PACKET_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_PACKET_CUH_

#include "codec/formats.h"
#include "device/payload.cuh"
#include "device/ptx.cuh"

namespace lar {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// `count` values of a thread as neighbouring vectors of T, the first of them `index`.
template <typename T, int kCount>
__device__ __forceinline__ void load_values(const Payload<T>& from, int64_t index, float (&values)[kCount]) {
  constexpr int kElements = Vector<T>::kElements;
  static_assert(kCount % kElements == 0, "a thread has whole vectors");
#pragma unroll
  for (int j = 0; j < kCount / kElements; ++j) {
    const uint4 raw = from.load(index + j);
    const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[j * kElements + i] = widen(elements[i]);
  }
}

template <typename T, int kCount, int kVectors>
__device__ __forceinline__ void widen_values(const uint4 (&raw)[kVectors], float (&values)[kCount]) {
  constexpr int kElements = Vector<T>::kElements;
  static_assert(kCount == kVectors * kElements, "a thread has whole vectors");
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const T* elements = reinterpret_cast<const T*>(&raw[j]);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[j * kElements + i] = widen(elements[i]);
  }
}

template <typename T, int kCount, typename Sink>
__device__ __forceinline__ void store_values(const Sink& sink, int64_t index, int64_t total_vectors,
                                             const float (&values)[kCount]) {
  constexpr int kElements = Vector<T>::kElements;
#pragma unroll
  for (int j = 0; j < kCount / kElements; ++j) {
    uint4 raw;
    T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < kElements; ++i) elements[i] = round_to<T>(values[j * kElements + i]);
    if (index + j < total_vectors) sink(index + j, raw);
  }
}

// FP8: threads 0 to 30 have 16 values each, thread 31 the scale.
struct Fp8Packet {
  using Codec = codec::Fp8;
  using Encoded = uint4;  // a thread's share of a packet
  static constexpr int kThreadValues = 16;
  static constexpr int kThreads = 31;  // with values
  static constexpr lar_wire kWire = LAR_WIRE_FP8;
  static constexpr int kValues = Codec::kValues;
  static constexpr int kBytes = Codec::kBytes;

  // For the whole warp. What thread 31 passes does not count.
  __device__ __forceinline__ static uint4 encode(const float (&values)[kThreadValues]) {
    const bool has_values = threadIdx.x % 32 < kThreads;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) largest = fmaxf(largest, Codec::weight(values[i]));
    // Floats that are not negative are in the order of their bits.
    const uint32_t most = __reduce_max_sync(kWholeWarp, has_values ? __float_as_uint(largest) : 0u);
    const float scale = Codec::scale(__uint_as_float(most));
    const float multiplier = Codec::multiplier(scale);
    uint4 raw;
    auto* words = reinterpret_cast<uint32_t*>(&raw);
#pragma unroll
    for (int i = 0; i < kThreadValues; i += 4) {
      const float four[] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
      words[i / 4] = Codec::encode(four, multiplier);
    }
    return has_values ? raw : uint4{__float_as_uint(scale), 0u, 0u, 0u};
  }

  // For the whole warp.
  __device__ __forceinline__ static void decode(const uint4& raw, float (&values)[kThreadValues]) {
    const float scale = __uint_as_float(__shfl_sync(kWholeWarp, raw.x, kThreads));
    const auto* pairs = reinterpret_cast<const uint16_t*>(&raw);
#pragma unroll
    for (int i = 0; i < kThreadValues; i += 2) Codec::decode(pairs[i / 2], scale, values[i], values[i + 1]);
  }

  __device__ __forceinline__ static void store(char* packet, const Encoded& encoded) {
    store_weak(reinterpret_cast<uint4*>(packet) + threadIdx.x % 32, encoded);
  }

  __device__ __forceinline__ static Encoded load(const char* packet) {
    return load_weak(reinterpret_cast<const uint4*>(packet) + threadIdx.x % 32);
  }
};

// The formats of 10 bytes for 32 values: one block to a thread.
template <typename BlockCodec, lar_wire kWireFormat>
struct BlockPacket {
  using Codec = BlockCodec;
  using Encoded = codec::Block32;
  static constexpr int kThreadValues = codec::Block32::kValues;
  static constexpr int kThreads = codec::Packet32::kBlocks;
  static constexpr lar_wire kWire = kWireFormat;
  static constexpr int kValues = codec::Packet32::kValues;
  static constexpr int kBytes = codec::Packet32::kBytes;

  __device__ __forceinline__ static Encoded encode(const float (&values)[kThreadValues]) {
    return BlockCodec::encode(values);
  }

  __device__ __forceinline__ static void decode(const Encoded& encoded, float (&values)[kThreadValues]) {
    BlockCodec::decode(encoded, values);
  }

  __device__ __forceinline__ static void store(char* packet, const Encoded& encoded) {
    const int block = threadIdx.x % 32;
    store_weak(reinterpret_cast<uint32_t*>(packet) + block, encoded.first);
    store_weak(reinterpret_cast<uint32_t*>(packet + codec::Packet32::kSecondByte) + block, encoded.second);
    store_weak(reinterpret_cast<uint16_t*>(packet + codec::Packet32::kScaleByte) + block, encoded.scale);
  }

  __device__ __forceinline__ static Encoded load(const char* packet) {
    const int block = threadIdx.x % 32;
    codec::Block32 encoded;
    encoded.first = load_weak(reinterpret_cast<const uint32_t*>(packet) + block);
    encoded.second = load_weak(reinterpret_cast<const uint32_t*>(packet + codec::Packet32::kSecondByte) + block);
    encoded.scale = load_weak(reinterpret_cast<const uint16_t*>(packet + codec::Packet32::kScaleByte) + block);
    return encoded;
  }
};

// What a format's packets are on the device.
template <typename Format>
using PacketOf = std::conditional_t<Format::kHasBlocks, BlockPacket<typename Format::Codec, Format::kWire>, Fp8Packet>;

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_PACKET_CUH_
