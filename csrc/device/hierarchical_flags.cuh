// LOWPRECISION over two domains: the steps of protocol/hierarchy.h, each lane alone (device/lane.cuh) on its share of
// every part, a warp to a packet. The number of ranks is a run-time value of at most kMostMembers in a domain.
#ifndef LLM_ALLREDUCE_DEVICE_HIERARCHICAL_FLAGS_CUH_
#define LLM_ALLREDUCE_DEVICE_HIERARCHICAL_FLAGS_CUH_

#include "device/lane.cuh"
#include "device/wire/formats.cuh"
#include "device/wire/packets.cuh"
#include "protocol/hierarchy.h"

namespace lar {

template <typename T, typename Packet>
class HierarchicalLane {
 public:
  __device__ __forceinline__ explicit HierarchicalLane(const FlagsArguments& arguments)
      : workspace_(arguments.workspace),
        slots_(workspace_.layout.flagged),
        domains_(arguments.domains),
        lane_(workspace_, arguments.limit, EpochPlane::kTwoShot),
        packets_(arguments.message.input, arguments.message.output, arguments.message.count),
        chunk_(static_cast<int>(arguments.chunk_vectors * LAR_VECTOR_BYTES / Packet::kBytes)),
        chunks_(static_cast<int>(ceil_div(packets_.number(), int64_t{chunk_} * gridDim.x * domains_.members))),
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() const {
    lane_.start();
    if (!(lane_.is_releaser() ? run_hierarchical(chunks_, Releases{*this}) : run_hierarchical(chunks_, *this))) return;
    lane_.finish(epoch_ + chunks_);
  }

  // The steps, for the workers.
  __device__ __forceinline__ bool scatter(int chunk) const {
#pragma unroll 1
    for (int step = 1; step < domains_.members; ++step) {
      char* slot = scatter_slot(domains_.member[other(step)], workspace_.rank, chunk);
      for_each(chunk, other(step), [&](int64_t packet, int at) { Packet::store(slot + at, packets_.encoded(packet)); });
    }
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk), receivers(chunk));
    return true;
  }

  __device__ __forceinline__ bool partial(int chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk), members())) return false;
    const int rank = workspace_.rank;
    const char* first_source = scatter_slot(rank, 0, chunk);
    const int64_t stride = workspace_.layout.lanes * slots_.two_shot_bytes;  // from source to source
    char* theirs = scatter_slot(domains_.counterpart, rank, chunk);
    char* kept = scatter_slot(rank, rank, chunk);
    for_each(chunk, domains_.index, [&](int64_t packet, int at) {
      Encoded others[kMostMembers];
#pragma unroll
      for (int i = 0; i < kMostMembers; ++i)
        if (i < domains_.members && i != domains_.index)
          others[i] = Packet::load(first_source + domains_.member[i] * stride + at);
      typename Message::Values sum;
      Message::clear(sum);
#pragma unroll
      for (int i = 0; i < kMostMembers; ++i) {
        if (i == domains_.index)
          packets_.add_own(packet, sum);
        else if (i < domains_.members)
          Message::add(others[i], sum);
      }
      const Encoded encoded = packets_.encoded_sum(packet, sum);
      Packet::store(theirs + at, encoded);
      Packet::store(kept + at, encoded);
    });
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk), counterpart());
    return true;
  }

  __device__ __forceinline__ bool combine(int chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_EXCHANGE, round(chunk), counterpart())) return false;
    const int rank = workspace_.rank;
    const char* kept = scatter_slot(rank, rank, chunk);
    const char* theirs = scatter_slot(rank, domains_.counterpart, chunk);
    const char* first = domains_.is_first ? kept : theirs;
    const char* second = domains_.is_first ? theirs : kept;
    const int readers = workspace_.layout.shared ? 1 : domains_.members - 1;
    for_each(chunk, domains_.index, [&](int64_t packet, int at) {
      const Encoded partials[2] = {Packet::load(first + at), Packet::load(second + at)};
      typename Message::Values sum;
      Message::clear(sum);
      Message::add(partials[0], sum);
      Message::add(partials[1], sum);
      const Encoded encoded = packets_.encoded_sum(packet, sum);
#pragma unroll 1
      for (int step = 1; step <= readers; ++step)
        Packet::store(gather_slot(domains_.member[other(step)], rank, chunk) + at, encoded);
      packets_.store(packet, encoded);
    });
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk), receivers(chunk));
    return true;
  }

  // The other owners' packets of the same place are on their way together.
  __device__ __forceinline__ bool drain(int chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk), members())) return false;
    const char* slots[kMostMembers - 1];
    int64_t packets[kMostMembers - 1];
#pragma unroll
    for (int j = 0; j < kMostMembers - 1; ++j) {
      const bool is_there = j + 1 < domains_.members;
      const int index = is_there ? other(j + 1) : domains_.index;
      slots[j] = gather_slot(workspace_.rank, domains_.member[index], chunk);
      packets[j] = is_there ? first_packet(chunk, index) : packets_.number();
    }
    const int warps = Lane<Roles::kWorkersAndReleaser>::workers() / 32;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < chunk_; i += warps) {
      Encoded results[kMostMembers - 1];
#pragma unroll
      for (int j = 0; j < kMostMembers - 1; ++j)
        if (packets[j] + i < packets_.number()) results[j] = Packet::load(slots[j] + i * Packet::kBytes);
#pragma unroll
      for (int j = 0; j < kMostMembers - 1; ++j)
        if (packets[j] + i < packets_.number()) packets_.store(packets[j] + i, results[j]);
    }
    return true;
  }

 private:
  using Message = Packets<T, Packet, Store>;
  using Encoded = typename Packet::Encoded;

  // What the releaser does in the same steps.
  struct Releases {
    const HierarchicalLane& of;
    __device__ __forceinline__ bool scatter(int chunk) const {
      return of.lane_.deliver(FlagPlane::kTwoShotScatter, of.round(chunk), of.receivers(chunk));
    }
    __device__ __forceinline__ bool partial(int chunk) const {
      return of.lane_.deliver(FlagPlane::kTwoShotGather, of.round(chunk), of.counterpart());
    }
    __device__ __forceinline__ bool combine(int chunk) const {
      return of.lane_.deliver(FlagPlane::kTwoShotGather, of.round(chunk), of.receivers(chunk));
    }
    __device__ __forceinline__ bool drain(int) const { return true; }
  };

  __device__ __forceinline__ uint32_t round(int chunk) const { return epoch_ + chunk + 1; }
  __device__ __forceinline__ SomePeers counterpart() const { return {1u << domains_.counterpart}; }
  __device__ __forceinline__ SomePeers members() const { return {domains_.bits}; }
  __device__ __forceinline__ SomePeers receivers(int chunk) const { return receivers_in(domains_, chunk, chunks_); }

  __device__ __forceinline__ char* scatter_slot(int reader, int source, int chunk) const {
    return flagged_slot(workspace_, slots_.scatter_offset, slots_.two_shot_bytes, round(chunk) % LAR_SLOTS, reader,
                        source, lane_.index(), false);
  }

  __device__ __forceinline__ char* gather_slot(int reader, int owner, int chunk) const {
    return flagged_slot(workspace_, slots_.gather_offset, slots_.two_shot_bytes, round(chunk) % LAR_SLOTS, reader,
                        owner, lane_.index(), true);
  }

  __device__ __forceinline__ int64_t first_packet(int chunk, int index) const {
    return ((int64_t{chunk} * domains_.members + index) * gridDim.x + lane_.index()) * chunk_;
  }

  // body(packet, its offset in the slot) for every packet of this warp in the part of the member with this index.
  template <typename Body>
  __device__ __forceinline__ void for_each(int chunk, int index, Body body) const {
    const int64_t first = first_packet(chunk, index);
    const int span = static_cast<int>(min(int64_t{chunk_}, packets_.number() - first));
    const int warps = Lane<Roles::kWorkersAndReleaser>::workers() / 32;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < span; i += warps) body(first + i, i * Packet::kBytes);
  }

  // The other members of this rank's domain: this index, and its rank, for `step` from 1 to members - 1.
  __device__ __forceinline__ int other(int step) const {
    const int index = domains_.index + step;
    return index < domains_.members ? index : index - domains_.members;
  }

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const Domains& domains_;
  const Lane<Roles::kWorkersAndReleaser> lane_;
  const Message packets_;
  const int chunk_;  // packets
  const int chunks_;
  const uint32_t epoch_;
};

template <typename T, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    hierarchical_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  HierarchicalLane<T, Packet>(arguments).run();
}

// Adds the rows of these wires.
template <Wires kWires>
void add_hierarchical_flags() {
  for_each_packet<kWires, Types<__half, __nv_bfloat16>>([](auto type, auto packet) {
    using T = typename decltype(type)::type;
    using Packet = typename decltype(packet)::type;
    if constexpr (!Packet::Codec::kOwnAsSent) {
      add_row({kind_of(LAR_HIERARCHICAL, LAR_FLAGS, Packet::kWire), dtype_of<T>(), 0, Form::kAny,
               kernel_address(hierarchical_flags_kernel<T, Packet>), LAR_MAX_FLAGGED_THREADS, kReleaserThreads, false});
    }
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_HIERARCHICAL_FLAGS_CUH_
