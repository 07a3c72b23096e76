// Packets of the wire formats on the device: one warp to a packet.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_PACKET_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_PACKET_CUH_

#include "codec/formats.h"
#include "device/payload.cuh"
#include "device/ptx.cuh"

namespace lar {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// Vectors of T to values and back. Rounding is to nearest even.
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

template <typename T, int kCount, int kVectors>
__device__ __forceinline__ void round_values(const float (&values)[kCount], uint4 (&raw)[kVectors]) {
  constexpr int kElements = Vector<T>::kElements;
  static_assert(kCount == kVectors * kElements, "a thread has whole vectors");
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    T* elements = reinterpret_cast<T*>(&raw[j]);
#pragma unroll
    for (int i = 0; i < kElements; ++i) elements[i] = round_to<T>(values[j * kElements + i]);
  }
}

// What a packet says of itself: which vectors of the message a thread moves, vector<T>(j) of its packet, and what it
// then has to do so that its values are those of its share, exchange<T>(raw), which is also the way back.

// What packets of codes of 8 bits share: a thread has 16 values, one vector, or what they are scaled by.
struct Fp8Codes {
  using Encoded = uint4;  // a thread's share of a packet
  static constexpr int kThreadValues = 16;
  static constexpr int kAtOnce = 4;  // of as many peers as fit a thread's registers beside a sum

  // The first of this thread's values in the packet: they are neighbours, and so are its vectors.
  __device__ __forceinline__ static int first_value() { return static_cast<int>(threadIdx.x % 32) * kThreadValues; }
  template <typename T>
  __device__ __forceinline__ static int vector(int j) {
    return first_value() / Vector<T>::kElements + j;
  }
  template <typename T, int kVectors>
  __device__ __forceinline__ static void exchange(uint4 (&)[kVectors]) {}

  __device__ __forceinline__ static void store(char* packet, const Encoded& encoded) {
    store_weak(reinterpret_cast<uint4*>(packet) + threadIdx.x % 32, encoded);
  }

  __device__ __forceinline__ static Encoded load(const char* packet) {
    return load_weak(reinterpret_cast<const uint4*>(packet) + threadIdx.x % 32);
  }

 protected:
  using Codec = codec::Fp8;

  __device__ __forceinline__ static void values_of(const uint4& raw, float scale, float (&values)[kThreadValues]) {
    const auto* pairs = reinterpret_cast<const uint16_t*>(&raw);
#pragma unroll
    for (int i = 0; i < kThreadValues; i += 2) Codec::decode(pairs[i / 2], scale, values[i], values[i + 1]);
  }

  __device__ __forceinline__ static uint4 words_of(const float (&values)[kThreadValues], float multiplier) {
    uint4 raw;
#if __CUDA_ARCH__ >= 890
    auto* words = reinterpret_cast<uint32_t*>(&raw);
#pragma unroll
    for (int i = 0; i < kThreadValues; i += 4) {
      const float four[] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
      words[i / 4] = Codec::encode(four, multiplier);
    }
#else
    // Once for all four words, which take turns: here a code takes more than ten instructions.
    float rest[kThreadValues];
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) rest[i] = values[i];
    raw = {0u, 0u, 0u, 0u};
#pragma unroll 1
    for (int turn = 0; turn < kThreadValues / 4; ++turn) {
      const float four[] = {rest[0], rest[1], rest[2], rest[3]};
      raw = {raw.y, raw.z, raw.w, Codec::encode(four, multiplier)};
#pragma unroll
      for (int i = 0; i + 4 < kThreadValues; ++i) rest[i] = rest[i + 4];
    }
#endif
    return raw;
  }
};

// FP8: threads 0 to 30 have 16 values each, thread 31 the scale.
struct Fp8Packet : Fp8Codes {
  using Codec = codec::Fp8;
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
    const uint4 raw = words_of(values, multiplier);
    return has_values ? raw : uint4{__float_as_uint(scale), 0u, 0u, 0u};
  }

  // For the whole warp.
  __device__ __forceinline__ static void decode(const uint4& raw, float (&values)[kThreadValues]) {
    values_of(raw, __uint_as_float(__shfl_sync(kWholeWarp, raw.x, kThreads)), values);
  }
};

// FP8 in groups: two neighbours of threads 0 to 29 have the values of a group, threads 30 and 31 the scales: a word of
// two, of which each of the four threads that have the groups' values makes a copy.
struct Fp8GroupPacket : Fp8Codes {
  using Codec = codec::Fp8Group;
  static constexpr int kThreads = 30;  // with values
  static constexpr lar_wire kWire = LAR_WIRE_FP8_GROUP;
  static constexpr int kValues = Codec::kValues;
  static constexpr int kBytes = Codec::kBytes;

  // For the whole warp. What threads 30 and 31 pass does not count.
  __device__ __forceinline__ static uint4 encode(const float (&values)[kThreadValues]) {
    const int thread = static_cast<int>(threadIdx.x % 32);
    const bool has_values = thread < kThreads;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) largest = fmaxf(largest, Codec::weight(values[i]));
    const float scale = Codec::scale(fmaxf(largest, __shfl_sync(kWholeWarp, largest, thread ^ 1)));
    const uint4 raw = words_of(values, Codec::multiplier(scale));
    const uint32_t bits = has_values ? Codec::scale_bits(scale) : 0u;
    uint32_t word = is_second() ? bits << 16 : bits;
    word |= __shfl_sync(kWholeWarp, word, thread ^ 2);
    uint4 scales;
    scales.x = __shfl_sync(kWholeWarp, word, thread % 2 * 16);
    scales.y = __shfl_sync(kWholeWarp, word, thread % 2 * 16 + 4);
    scales.z = __shfl_sync(kWholeWarp, word, thread % 2 * 16 + 8);
    scales.w = __shfl_sync(kWholeWarp, word, thread % 2 * 16 + 12);
    return has_values ? raw : scales;
  }

  // For the whole warp.
  __device__ __forceinline__ static void decode(const uint4& raw, float (&values)[kThreadValues]) {
    const int thread = static_cast<int>(threadIdx.x % 32);
    const int source = kThreads + thread / 16;
    const uint32_t first = __shfl_sync(kWholeWarp, raw.x, source);
    const uint32_t second = __shfl_sync(kWholeWarp, raw.y, source);
    const uint32_t third = __shfl_sync(kWholeWarp, raw.z, source);
    const uint32_t fourth = __shfl_sync(kWholeWarp, raw.w, source);
    const uint32_t upper = (thread & 4) != 0 ? fourth : third;
    const uint32_t lower = (thread & 4) != 0 ? second : first;
    const uint32_t word = (thread & 8) != 0 ? upper : lower;
    values_of(raw, Codec::scale_of(static_cast<uint16_t>(is_second() ? word >> 16 : word)), values);
  }

 private:
  // Whether this thread's group is the second of its word.
  __device__ __forceinline__ static bool is_second() { return (threadIdx.x & 2) != 0; }
};

// The formats of 10 bytes for 32 values: one block to a thread, because sums over a block have an order.
//
// A thread does not load its block: it would be 64 bytes behind that of the thread before it. The warp moves
// neighbours, units of 8 values, and four threads, which then have a quarter of each of four blocks, exchange them.
template <typename BlockCodec, lar_wire kWireFormat>
struct BlockPacket {
  using Codec = BlockCodec;
  using Encoded = codec::Block32;
  static constexpr int kThreadValues = codec::Block32::kValues;
  static constexpr int kAtOnce = std::is_same_v<BlockCodec, codec::Tq3> ? 3 : 1;
  static constexpr int kThreads = codec::Packet32::kBlocks;
  static constexpr lar_wire kWire = kWireFormat;
  static constexpr int kValues = codec::Packet32::kValues;
  static constexpr int kBytes = codec::Packet32::kBytes;

  __device__ __forceinline__ static int first_value() { return block() * kThreadValues; }

  // Unit j of thread t is the unit 32 j + t: quarter t % 4 of the block 8 j + t / 4.
  template <typename T>
  __device__ __forceinline__ static int vector(int j) {
    constexpr int kVectorsOfUnit = kUnitValues / Vector<T>::kElements;
    const int unit = j / kVectorsOfUnit * 32 + static_cast<int>(threadIdx.x % 32);
    return unit * kVectorsOfUnit + j % kVectorsOfUnit;
  }

  // For the whole warp. The matrix of four units of four threads is transposed: by halves, then by quarters.
  template <typename T, int kVectors>
  __device__ __forceinline__ static void exchange(uint4 (&raw)[kVectors]) {
    constexpr int kWords = kVectors / kQuarters * 4;  // of a unit
    auto* words = reinterpret_cast<uint32_t*>(&raw);
    const int thread = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int step = 1; step < kQuarters; step *= 2) {
      const bool gives_first = (thread & step) != 0;
#pragma unroll
      for (int i = 0; i < kQuarters * kWords; ++i) {
        if ((i / kWords & step) != 0) continue;
        uint32_t& first = words[i];
        uint32_t& second = words[i + step * kWords];
        const uint32_t taken = __shfl_sync(kWholeWarp, gives_first ? first : second, thread ^ step);
        (gives_first ? first : second) = taken;
      }
    }
  }

  __device__ __forceinline__ static Encoded encode(const float (&values)[kThreadValues]) {
    return BlockCodec::encode(values);
  }

  __device__ __forceinline__ static void decode(const Encoded& encoded, float (&values)[kThreadValues]) {
    BlockCodec::decode(encoded, values);
  }

  __device__ __forceinline__ static void store(char* packet, const Encoded& encoded) {
    store_weak(reinterpret_cast<uint32_t*>(packet) + block(), encoded.first);
    store_weak(reinterpret_cast<uint32_t*>(packet + codec::Packet32::kSecondByte) + block(), encoded.second);
    store_weak(reinterpret_cast<uint16_t*>(packet + codec::Packet32::kScaleByte) + block(), encoded.scale);
  }

  __device__ __forceinline__ static Encoded load(const char* packet) {
    codec::Block32 encoded;
    encoded.first = load_weak(reinterpret_cast<const uint32_t*>(packet) + block());
    encoded.second = load_weak(reinterpret_cast<const uint32_t*>(packet + codec::Packet32::kSecondByte) + block());
    encoded.scale = load_weak(reinterpret_cast<const uint16_t*>(packet + codec::Packet32::kScaleByte) + block());
    return encoded;
  }

 private:
  static constexpr int kQuarters = 4;
  static constexpr int kUnitValues = kThreadValues / kQuarters;

  // That of this thread, behind the exchange.
  __device__ __forceinline__ static int block() {
    const int thread = static_cast<int>(threadIdx.x % 32);
    return thread % kQuarters * (32 / kQuarters) + thread / kQuarters;
  }
};

// What a format's packets are on the device.
template <typename Format>
using PacketOf = std::conditional_t<Format::kHasBlocks, BlockPacket<typename Format::Codec, Format::kWire>,
                                    std::conditional_t<Format::kWire == LAR_WIRE_FP8, Fp8Packet, Fp8GroupPacket>>;

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_PACKET_CUH_
