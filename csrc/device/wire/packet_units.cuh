// What travels by flags in a wire format: packets, a warp to each.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_PACKET_UNITS_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_PACKET_UNITS_CUH_

#include "device/lane.cuh"
#include "device/wire/packets.cuh"
#include "protocol/pieces.h"

namespace lar {

template <typename T, typename Packet, typename Epilogue>
class PacketUnits {
 public:
  __device__ __forceinline__ static constexpr int unit_bytes() { return Packet::kBytes; }
  // As many as fit the registers of a thread.
  static constexpr int kOwnersAtOnce = 1;

  __device__ __forceinline__ explicit PacketUnits(const lar_message& message)
      : packets_(message.input, message.output, message.count) {}

  __device__ __forceinline__ int64_t total() const { return packets_.number(); }

  template <int kCount>
  __device__ __forceinline__ void pack(const Piece (&parts)[kCount], char* const (&slots)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      for_each(parts[k].span,
               [&](int64_t i) { Packet::store(slots[k] + i * Packet::kBytes, packets_.encoded(parts[k].first + i)); });
  }

  // The packets of some ranks are on their way together, and so are this rank's own values, where registers hold both.
  template <typename Sources, typename Targets>
  __device__ __forceinline__ void reduce(const Piece& part, int rank, int world_size, Sources source_of,
                                         Targets for_each_target) const {
    constexpr bool kIsLong = Packet::kThreadValues > 16;
    constexpr int kGroup = kIsLong ? 1 : World<0>::kRanksAtOnce;  // that fit the registers
    for_each(part.span, [&](int64_t i) {
      typename Message::Values sum;
      typename Message::Own own;
      Message::clear(sum);
      if (!kIsLong) packets_.take_own(part.first + i, own);
#pragma unroll 1
      for (int first = 0; first < world_size; first += kGroup) {
        typename Packet::Encoded others[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
          if (first + k < world_size && first + k != rank)
            others[k] = Packet::load(source_of(first + k) + i * Packet::kBytes);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          if (first + k == rank) {
            if constexpr (kIsLong)
              packets_.add_own(part.first + i, sum);
            else
              Message::add_own(own, sum);
          } else if (first + k < world_size) {
            Message::add(others[k], sum);
          }
        }
      }
      const typename Packet::Encoded result = packets_.encoded_sum(part.first + i, sum);
      for_each_target([&](char* slot) { Packet::store(slot + i * Packet::kBytes, result); });
      packets_.store(part.first + i, result);
    });
  }

  // All owners' packets of the same place are on their way together.
  template <int kCount>
  __device__ __forceinline__ void unpack(const Piece (&parts)[kCount], char* const (&slots)[kCount]) const {
    int64_t longest = parts[0].span;
#pragma unroll
    for (int k = 1; k < kCount; ++k) longest = max(longest, parts[k].span);
    for_each(longest, [&](int64_t i) {
      typename Packet::Encoded results[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (i < parts[k].span) results[k] = Packet::load(slots[k] + i * Packet::kBytes);
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (i < parts[k].span) packets_.store(parts[k].first + i, results[k]);
    });
  }

 private:
  using Message = Packets<T, Packet, Epilogue>;

  // Every warp of the workers takes every so many.
  template <typename Body>
  __device__ __forceinline__ static void for_each(int64_t span, Body body) {
    const int warps = Lane<Roles::kWorkersAndReleaser>::workers() / 32;
    for (int64_t i = threadIdx.x / 32; i < span; i += warps) body(i);
  }

  const Message packets_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_PACKET_UNITS_CUH_
