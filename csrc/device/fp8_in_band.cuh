// What the in-band kernels of FP8 share: packets that travel as vectors do.
//
// A packet is one vector of each thread of a warp, and no word of it is the in-band marker (codec/fp8.h,
// codec/fp8_group.h), so packets travel as any vectors do (device/in_band.cuh).
#ifndef LLM_ALLREDUCE_DEVICE_FP8_IN_BAND_CUH_
#define LLM_ALLREDUCE_DEVICE_FP8_IN_BAND_CUH_

#include "device/bulk_sender.cuh"
#include "device/sink/store.cuh"
#include "device/two_shot_in_band.cuh"
#include "device/wire/packets.cuh"

namespace lar {

constexpr int kPacketVectors = Fp8Packet::kBytes / LAR_VECTOR_BYTES;
static_assert(kPacketVectors == kTileVectors && Fp8GroupPacket::kBytes == Fp8Packet::kBytes, "a packet is a tile");
static_assert(LAR_IN_BAND_MARKER == 0x80000000u, "codes are never 0x80, and a scale is not negative");

// `Packet`: Fp8Packet or Fp8GroupPacket.
template <typename T, typename Packet>
using Fp8Message = Packets<T, Packet, Store>;

template <typename Message>
__device__ __forceinline__ uint4 encoded_own(const Message& packets, int64_t packet) {
  typename Message::Raw own;
  packets.load_own(packet, own);
  return Message::encoded(own);
}

// The packet at `tile`, in vectors, of the part of the rank `step` places on; behind the last if there is none.
template <int kWorldSize>
__device__ __forceinline__ uint32_t packet_of(const InBandArguments& arguments, int step, uint32_t tile) {
  return index_of<kWorldSize>(arguments, step, tile) / kPacketVectors;
}

// This thread's vectors of the wanted packets, polled, unless they `are_there`, and, if `kClears`, cleared. For the
// whole warp; false for all of it when a wait expired.
template <bool kClears, int kCount, typename RankOf>
__device__ __forceinline__ bool take(const InBandArguments& arguments, lar_phase phase, char* const (&from)[kCount],
                                     const bool (&wanted)[kCount], uint4 (&vectors)[kCount], RankOf rank_of,
                                     bool are_there = false) {
  const bool complete = are_there || poll_until_complete(arguments.limit, phase, from, wanted, vectors, rank_of);
  if (!__all_sync(kWholeWarp, complete)) return false;
  if (kClears) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) clear_in_band_if(wanted[i], from[i]);
  }
  return true;
}

// Adds what each rank has for a packet, in rank order: add_own(sum), and of the others what is polled at from_of(rank),
// some at a time. `asked`: null, or the first poll of the first of them. False when a wait expired.
template <typename Message, int kWorldSize, bool kClears, typename From, typename Own>
__device__ __forceinline__ bool add_in_rank_order(const InBandArguments& arguments, lar_phase phase, From from_of,
                                                  Own add_own, typename Message::Values& sum,
                                                  const FirstPoll<kWorldSize>* asked = nullptr) {
  constexpr bool kIsFixed = World<kWorldSize>::kIsFixed;
  constexpr int kGroup = World<kWorldSize>::kRanksAtOnce;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  Message::clear(sum);
#pragma unroll 1
  for (int first = 0; first < world_size; first += kGroup) {
    char* from[kGroup];
    bool wanted[kGroup];
    uint4 vectors[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool is_rank = kIsFixed || first + i < world_size;
      from[i] = from_of(is_rank ? first + i : first);
      wanted[i] = is_rank && first + i != arguments.rank;
      vectors[i] = {0u, 0u, 0u, 0u};
      if (asked && first == 0 && wanted[i]) vectors[i] = asked->of(i);
    }
    const bool are_there = asked && first == 0 && are_complete(vectors);
    if (!take<kClears>(arguments, phase, from, wanted, vectors, [&](int i) { return first + i; }, are_there))
      return false;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (first + i == arguments.rank)
        add_own(sum);
      else if (kIsFixed || first + i < world_size)
        Message::add(vectors[i], sum);
    }
  }
  return true;
}

// This thread's vector of the tile at `index`, in the slot of `rank`, from `own` on.
template <int kWorldSize>
__device__ __forceinline__ char* tile_vector(const InBandArguments& arguments, uint32_t index, int rank) {
  const uint32_t at = index + slot_of_peer<kWorldSize>(arguments, rank) + warp_thread();
  return arguments.own + static_cast<int64_t>(at) * LAR_VECTOR_BYTES;
}

// The encoded sum of a packet of my part, whose in-band slots begin at `slots`. This rank's own values are added as
// they are, which costs nothing and leaves one error fewer, unless the format says otherwise; they are loaded before
// the others' are waited for.
template <typename Message, int kWorldSize, bool kClears>
__device__ __forceinline__ bool sum_packet(const InBandArguments& arguments, const Message& packets, uint32_t slots,
                                           uint32_t packet, uint32_t tile, uint4& result) {
  typename Message::Own own;
  packets.take_own(packet, own);
  typename Message::Values sum;
  if (!add_in_rank_order<Message, kWorldSize, kClears>(
          arguments, LAR_PHASE_SCATTER,
          [&](int rank) { return tile_vector<kWorldSize>(arguments, slots + tile, rank); },
          [&](typename Message::Values& to) { Message::add_own(own, to); }, sum))
    return false;
  result = packets.encoded_sum(packet, sum);
  return true;
}

// One-shot: the sum of a packet of which this rank has sent `mine`, to the output. It counts as the others see it, so
// that all ranks make the same sum; from_of(rank): where the others' vectors lie. `asked`: as above.
template <typename Message, int kWorldSize, bool kClears, typename From>
__device__ __forceinline__ bool store_sum(const InBandArguments& arguments, const Message& packets, uint32_t packet,
                                          const uint4& mine, From from_of,
                                          const FirstPoll<kWorldSize>* asked = nullptr) {
  typename Message::Values sum;
  const auto add_own = [&](typename Message::Values& to) { Message::add(mine, to); };
  if (!add_in_rank_order<Message, kWorldSize, kClears>(arguments, LAR_PHASE_GATHER, from_of, add_own, sum, asked))
    return false;
  typename Message::Raw raw;
  Message::round_sum(sum, raw);
  packets.store(packet, raw);
  return true;
}

// Polls the packets at `tile` of the other owners, some at a time, and stores them. from_of(step): where the packet of
// the rank `step` places on lies. `asks`: the first of them are loaded once before they are polled, and `meanwhile` is
// called while those loads are under way; it is called at no other time.
template <typename Message, int kWorldSize, bool kClears, typename From, typename Meanwhile>
__device__ __forceinline__ bool drain_packets(const InBandArguments& arguments, const Message& packets, uint32_t tile,
                                              From from_of, bool asks, Meanwhile meanwhile) {
  constexpr int kAtOnce = World<kWorldSize>::kPeersAtOnce;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
#pragma unroll 1
  for (int first = 1; first < world_size; first += kAtOnce) {
    char* from[kAtOnce];
    bool wanted[kAtOnce];
    uint4 results[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      wanted[j] = packet_of<kWorldSize>(arguments, first + j, tile) < packets.number();
      from[j] = from_of(World<kWorldSize>::kIsFixed || first + j < world_size ? first + j : first);
      results[j] = {0u, 0u, 0u, 0u};
    }
    const bool asks_first = asks && first == 1;
    if (asks_first) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) load_relaxed_system_if(wanted[j], from[j], results[j]);
      meanwhile();
    }
    if (!take<kClears>(
            arguments, LAR_PHASE_GATHER, from, wanted, results,
            [&](int j) { return rotated(arguments.rank, first + j, world_size); }, asks_first && are_complete(results)))
      return false;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (wanted[j]) packets.store(packet_of<kWorldSize>(arguments, first + j, tile), results[j]);
  }
  return true;
}

template <typename Message, int kWorldSize, bool kClears, typename From>
__device__ __forceinline__ bool drain_packets(const InBandArguments& arguments, const Message& packets, uint32_t tile,
                                              From from_of) {
  return drain_packets<Message, kWorldSize, kClears>(arguments, packets, tile, from_of, false, [] {});
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_FP8_IN_BAND_CUH_
