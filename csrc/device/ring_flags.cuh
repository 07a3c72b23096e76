// LOWPRECISION as a ring: the hops of protocol/ring.h, each lane alone (device/lane.cuh) on its share of every part, a
// warp to a packet. The number of ranks is a run-time value: a rank has two neighbours whatever it is.
#ifndef LLM_ALLREDUCE_DEVICE_RING_FLAGS_CUH_
#define LLM_ALLREDUCE_DEVICE_RING_FLAGS_CUH_

#include "device/lane.cuh"
#include "device/wire/formats.cuh"
#include "device/wire/packets.cuh"
#include "protocol/ring.h"

namespace lar {

template <typename T, typename Packet>
class RingLane {
 public:
  __device__ __forceinline__ explicit RingLane(const FlagsArguments& arguments)
      : workspace_(arguments.workspace),
        slots_(workspace_.layout.flagged),
        ring_{workspace_.rank, workspace_.layout.world_size},
        lane_(workspace_, arguments.limit, EpochPlane::kTwoShot),
        packets_(arguments.message.input, arguments.message.output, arguments.message.count),
        chunk_(static_cast<int>(arguments.chunk_vectors * LAR_VECTOR_BYTES / kRawBytes)),
        hops_(static_cast<int>(ceil_div(packets_.number(), int64_t{chunk_} * gridDim.x * ring_.world_size)) *
              ring_.hops_of_chunk()),
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() const {
    lane_.start();
    if (run_ring(ring_, hops_, *this)) lane_.finish(epoch_ + hops_);
  }

  __device__ __forceinline__ bool has_arrived(int hop) const {
    return lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(hop), OneOrAllPeers{ring_.predecessor()});
  }

  __device__ __forceinline__ bool has_credit(int hop) const {
    return lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(hop), OneOrAllPeers{ring_.successor()});
  }

  __device__ __forceinline__ void tell_data(int hop, OneOrAllPeers peers) const {
    lane_.publish(FlagPlane::kTwoShotScatter, round(hop), peers);
  }

  __device__ __forceinline__ void tell_credit(int hop, OneOrAllPeers peers) const {
    lane_.publish(FlagPlane::kTwoShotGather, round(hop), peers);
  }

  // This rank's own values, at the first hop of a chunk.
  __device__ __forceinline__ void begin(int hop) const {
    char* to = slot(ring_.successor(), ring_.rank, hop);
    for_each(hop, ring_.rank,
             [&](int64_t packet, int i) { Packet::store(to + i * Packet::kBytes, packets_.encoded(packet)); });
  }

  __device__ __forceinline__ void receive(int hop) const {
    const int hop_of_chunk = hop % ring_.hops_of_chunk();
    const int part = ring_.received_part(hop_of_chunk);
    const char* from = slot(ring_.rank, ring_.predecessor(), hop);
    char* to = slot(ring_.successor(), ring_.rank, hop + 1);
    if (ring_.is_sum(hop_of_chunk)) {
      const bool is_complete = ring_.is_complete(hop_of_chunk);
      for_each(hop, part, [&](int64_t packet, int i) {
        typename Message::Values sum;
        Message::clear(sum);
        Message::add(Packet::load(from + i * Packet::kBytes), sum);
        packets_.add_own(packet, sum);
        if (!is_complete) return Packet::store(to + i * Packet::kBytes, packets_.encoded_sum(packet, sum));
        typename Message::Raw raw;
        Message::round_sum(sum, raw);
        Message::store_raw(to + i * kRawBytes, raw);
        packets_.store(packet, raw);
      });
      return;
    }
    const bool goes_on = !ring_.is_last(hop_of_chunk);
    for_each(hop, part, [&](int64_t packet, int i) {
      typename Message::Raw raw;
      Message::load_raw(from + i * kRawBytes, raw);
      if (goes_on) Message::store_raw(to + i * kRawBytes, raw);
      packets_.store(packet, raw);
    });
  }

 private:
  using Message = Packets<T, Packet, Store>;
  static constexpr int kRawBytes = Message::kRawBytes;

  __device__ __forceinline__ uint32_t round(int hop) const { return epoch_ + hop + 1; }

  __device__ __forceinline__ char* slot(int reader, int source, int hop) const {
    return flagged_slot(workspace_, slots_.scatter_offset, slots_.two_shot_bytes, round(hop) % LAR_SLOTS, reader,
                        source, lane_.index(), false);
  }

  // body(packet, its place in the slot) for every packet of this warp in a part of the chunk that `hop` belongs to.
  template <typename Body>
  __device__ __forceinline__ void for_each(int hop, int part, Body body) const {
    const int64_t piece = int64_t{hop / ring_.hops_of_chunk()} * ring_.world_size + part;
    const int64_t first = (piece * gridDim.x + lane_.index()) * chunk_;
    const int span = static_cast<int>(min(int64_t{chunk_}, packets_.number() - first));
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < span; i += blockDim.x / 32) body(first + i, i);
  }

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const Ring ring_;
  const Lane<Roles::kWorkers> lane_;
  const Message packets_;
  const int chunk_;  // packets
  const int hops_;
  const uint32_t epoch_;
};

template <typename T, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS, 1)
    ring_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  RingLane<T, Packet>(arguments).run();
}

// Adds the rows of these wires.
template <Wires kWires>
void add_ring_flags() {
  for_each_packet<kWires, Types<__half, __nv_bfloat16>>([](auto type, auto packet) {
    using T = typename decltype(type)::type;
    using Packet = typename decltype(packet)::type;
    if constexpr (!Packet::Codec::kOwnAsSent) {
      add_row({kind_of(LAR_RING, LAR_FLAGS, Packet::kWire), dtype_of<T>(), 0, Form::kAny,
               kernel_address(ring_flags_kernel<T, Packet>), LAR_MAX_FLAGGED_THREADS, 0, false});
    }
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_RING_FLAGS_CUH_
