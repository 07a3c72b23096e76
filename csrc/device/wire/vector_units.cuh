// What travels by flags, raw: the vectors of the message (device/two_shot_lane.cuh says what is asked of units).
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_VECTOR_UNITS_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_VECTOR_UNITS_CUH_

#include "device/lane.cuh"
#include "device/payload.cuh"
#include "protocol/pieces.h"

namespace lar {

template <typename T, typename Epilogue>
class VectorUnits {
 public:
  __device__ __forceinline__ static constexpr int unit_bytes() { return LAR_VECTOR_BYTES; }
  static constexpr int kBlocksAtOnce = 1;

  __device__ __forceinline__ explicit VectorUnits(const lar_message& message)
      : input_(message.input, message.count),
        sink_(message.output, message.count),
        total_(ceil_div(message.count, Vector<T>::kElements)) {}

  __device__ __forceinline__ int64_t total() const { return total_; }

  template <typename Pieces>
  __device__ __forceinline__ void pack(const Pieces& pieces) const {
    some_at_once(pieces, [&](const auto& parts, const auto& slots) {
      move(
          parts, [&](int k, int64_t i) { return input_.load(parts[k].first + i); },
          [&](int k, int64_t i, const uint4& raw) { store_slot(slots[k], i, raw); });
    });
  }

  template <typename Sources, typename Targets>
  __device__ __forceinline__ void reduce(const Piece& part, int rank, int world_size, Sources source_of,
                                         Targets for_each_target) const {
    sum_vectors<T>(
        part.span, Workers::workers(), world_size,
        [&](int source, int64_t i) {
          return source == rank ? input_.load(part.first + i) : load_slot(source_of(source), i);
        },
        [&](int64_t i, const uint4& result) {
          for_each_target([&](char* slot) { store_slot(slot, i, result); });
          sink_(part.first + i, result);
        });
  }

  template <typename Pieces>
  __device__ __forceinline__ void unpack(const Pieces& pieces) const {
    some_at_once(pieces, [&](const auto& parts, const auto& slots) {
      move(
          parts, [&](int k, int64_t i) { return load_slot(slots[k], i); },
          [&](int k, int64_t i, const uint4& raw) { sink_(parts[k].first + i, raw); });
    });
  }

 private:
  using Workers = Lane<Roles::kWorkersAndReleaser>;

  // body(parts, slots) for all pieces, as many at a time as fit the registers of a thread.
  template <typename Pieces, typename Body>
  __device__ __forceinline__ static void some_at_once(const Pieces& pieces, Body body) {
    constexpr int kAtOnce = Pieces::kIsOne ? 1 : 2;
#pragma unroll 1
    for (int first = 0; first < pieces.count; first += kAtOnce) {
      Piece parts[kAtOnce];
      char* slots[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const bool is_there = first + j < pieces.count;
        parts[j] = pieces.of(is_there ? first + j : 0);
        if (!is_there) parts[j].span = 0;
        slots[j] = pieces.slot(is_there ? first + j : 0);
      }
      body(parts, slots);
    }
  }

  template <int kCount, typename Load, typename Store>
  __device__ __forceinline__ static void move(const Piece (&parts)[kCount], Load load, Store store) {
    int64_t spans[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) spans[k] = parts[k].span;
    move_vectors(spans, Workers::workers(), load, store);
  }

  const Payload<T> input_;
  const typename Epilogue::template Any<T> sink_;
  const int64_t total_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_VECTOR_UNITS_CUH_
