// What travels by flags in a wire format: packets, a warp to each.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_PACKET_UNITS_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_PACKET_UNITS_CUH_

#include "device/lane.cuh"
#include "device/wire/packets.cuh"
#include "protocol/pieces.h"

namespace lar {

template <typename T, typename Packet, typename Epilogue>
class PacketUnits {
  static constexpr bool kIsLong = Packet::kThreadValues > 16;

 public:
  __device__ __forceinline__ static constexpr int unit_bytes() { return Packet::kBytes; }
  static constexpr int kBlocksAtOnce = kIsLong ? 2 : 1;

  __device__ __forceinline__ explicit PacketUnits(const lar_message& message)
      : packets_(message.input, message.output, message.count) {}

  __device__ __forceinline__ int64_t total() const { return packets_.number(); }

  template <typename Pieces>
  __device__ __forceinline__ void pack(const Pieces& pieces) const {
    for_each_of(pieces, [&](const Piece& part, char* slot, int64_t i) {
      Packet::store(slot + i * Packet::kBytes, packets_.encoded(part.first + i));
    });
  }

  // The packets of some peers are on their way together, and so are this rank's own values, where registers hold both.
  // Peers are numbered without this rank, whose own values come before those of the peer of its number.
  template <typename Sources, typename Targets>
  __device__ __forceinline__ void reduce(const Piece& part, int rank, int world_size, Sources source_of,
                                         Targets for_each_target) const {
    constexpr int kGroup = Packet::kAtOnce;
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
          if (first + k < world_size - 1)
            others[k] = Packet::load(source_of(first + k + (first + k >= rank)) + i * Packet::kBytes);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          if (first + k == rank) {
            if constexpr (kIsLong)
              packets_.add_own(part.first + i, sum);
            else
              Message::add_own(own, sum);
          }
          if (first + k < world_size - 1) Message::add(others[k], sum);
        }
      }
      const typename Packet::Encoded result = packets_.encoded_sum(part.first + i, sum);
      for_each_target([&](char* slot) { Packet::store(slot + i * Packet::kBytes, result); });
      packets_.store(part.first + i, result);
    });
  }

  template <typename Pieces>
  __device__ __forceinline__ void unpack(const Pieces& pieces) const {
    for_each_of(pieces, [&](const Piece& part, const char* slot, int64_t i) {
      packets_.store(part.first + i, Packet::load(slot + i * Packet::kBytes));
    });
  }

 private:
  using Message = Packets<T, Packet, Epilogue>;

  __device__ __forceinline__ static int warps() { return Lane<Roles::kWorkersAndReleaser>::workers() / 32; }

  // Every warp of the workers takes every so many.
  template <typename Body>
  __device__ __forceinline__ static void for_each(int64_t span, Body body) {
    for (int64_t i = threadIdx.x / 32; i < span; i += warps()) body(i);
  }

  // body(piece, its slot, place in both) for all pieces, by turns: where a lane has fewer packets of a piece than it
  // has warps, others take those of the next one meanwhile.
  template <typename Pieces, typename Body>
  __device__ __forceinline__ static void for_each_of(const Pieces& pieces, Body body) {
    const int count = pieces.count;
    const int all = static_cast<int>(pieces.most) * count;
#pragma unroll 1
    for (int task = threadIdx.x / 32; task < all; task += warps()) {
      const int i = task / count;
      const int k = task - i * count;
      const Piece part = pieces.of(k);
      if (i < part.span) body(part, pieces.slot(k), i);
    }
  }

  const Message packets_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_PACKET_UNITS_CUH_
