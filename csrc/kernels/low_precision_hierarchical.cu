// LOWPRECISION over two domains: the steps of hierarchy.h, each lane alone (device/lane.cuh) on its share of every
// part, a warp to a packet. The number of ranks is a run-time value of at most kMostMembers in a domain.
#include "device/launch.cuh"
#include "device/packets.cuh"
#include "hierarchy.h"

namespace lar {
namespace {

struct HierarchicalArguments {
  KernelArguments call;
  Domains domains;
};

template <typename T, typename Packet>
class HierarchicalLane {
 public:
  __device__ __forceinline__ explicit HierarchicalLane(const HierarchicalArguments& arguments)
      : workspace_(arguments.call.workspace),
        slots_(workspace_.layout.flagged),
        domains_(arguments.domains),
        lane_(workspace_, EpochPlane::kTwoShot, LAR_LOW_PRECISION_HIERARCHICAL),
        packets_(arguments.call.message.input, arguments.call.message.output, arguments.call.message.count),
        chunk_(static_cast<int>(arguments.call.chunk_vectors * LAR_VECTOR_BYTES / Packet::kBytes)),
        chunks_(static_cast<int>(ceil_div(packets_.number(), int64_t{chunk_} * gridDim.x * domains_.members))),
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() const {
    lane_.start();
    if (!(lane_.is_courier() ? deliver() : work())) return;
    lane_.finish(epoch_ + chunks_);
  }

 private:
  using Cargo = Packets<T, Packet>;
  using Encoded = typename Packet::Encoded;

  __device__ __forceinline__ bool work() const {
#pragma unroll 1
    for (int step = 0; step < chunks_ + 3; ++step) {
      if (step < chunks_) scatter(step);
      if (step >= 1 && step <= chunks_ && !partial(step - 1)) return false;
      if (step >= 2 && step <= chunks_ + 1 && !combine(step - 2)) return false;
      if (step >= 3 && !drain(step - 3)) return false;
    }
    return true;
  }

  // What scatter(), partial() and combine() publish.
  __device__ __forceinline__ bool deliver() const {
#pragma unroll 1
    for (int step = 0; step < chunks_ + 2; ++step) {
      if (step < chunks_ && !lane_.deliver(FlagPlane::kTwoShotScatter, round(step), told(step))) return false;
      if (step >= 1 && step <= chunks_ && !lane_.deliver(FlagPlane::kTwoShotGather, round(step - 1), counterpart()))
        return false;
      if (step >= 2 && !lane_.deliver(FlagPlane::kTwoShotGather, round(step - 2), told(step - 2))) return false;
    }
    return true;
  }

  __device__ __forceinline__ uint32_t round(int chunk) const { return epoch_ + chunk + 1; }
  __device__ __forceinline__ SomePeers counterpart() const { return {1u << domains_.counterpart}; }
  __device__ __forceinline__ SomePeers members() const { return {domains_.bits}; }
  __device__ __forceinline__ SomePeers told(int chunk) const { return {chunk == chunks_ - 1 ? ~0u : domains_.bits}; }

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
    const int warps = Lane<Crew::kWorkersAndCourier>::workers() / 32;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < span; i += warps) body(first + i, i * Packet::kBytes);
  }

  // The other members of this rank's domain: this index, and its rank, for `step` from 1 to members - 1.
  __device__ __forceinline__ int other(int step) const {
    const int index = domains_.index + step;
    return index < domains_.members ? index : index - domains_.members;
  }

  __device__ __forceinline__ void scatter(int chunk) const {
#pragma unroll 1
    for (int step = 1; step < domains_.members; ++step) {
      char* slot = scatter_slot(domains_.member[other(step)], workspace_.rank, chunk);
      for_each(chunk, other(step), [&](int64_t packet, int at) { Packet::store(slot + at, packets_.encoded(packet)); });
    }
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk), told(chunk));
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
      typename Cargo::Values sum;
      Cargo::clear(sum);
#pragma unroll
      for (int i = 0; i < kMostMembers; ++i) {
        if (i == domains_.index)
          packets_.add_own(packet, sum);
        else if (i < domains_.members)
          Cargo::add(others[i], sum);
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
    const int readers = workspace_.layout.published ? 1 : domains_.members - 1;
    for_each(chunk, domains_.index, [&](int64_t packet, int at) {
      const Encoded partials[2] = {Packet::load(first + at), Packet::load(second + at)};
      typename Cargo::Values sum;
      Cargo::clear(sum);
      Cargo::add(partials[0], sum);
      Cargo::add(partials[1], sum);
      const Encoded encoded = packets_.encoded_sum(packet, sum);
#pragma unroll 1
      for (int step = 1; step <= readers; ++step)
        Packet::store(gather_slot(domains_.member[other(step)], rank, chunk) + at, encoded);
      packets_.store(packet, encoded);
    });
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk), told(chunk));
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
    const int warps = Lane<Crew::kWorkersAndCourier>::workers() / 32;
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

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const Domains& domains_;
  const Lane<Crew::kWorkersAndCourier> lane_;
  const Cargo packets_;
  const int chunk_;  // packets
  const int chunks_;
  const uint32_t epoch_;
};

template <typename T, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kCourierThreads, 1)
    low_precision_hierarchical_kernel(const __grid_constant__ HierarchicalArguments arguments) {
  HierarchicalLane<T, Packet>(arguments).run();
}

template <typename T>
const void* kernel_of(lar_wire_format format) {
  switch (format) {
    case LAR_WIRE_FP8:
      return kernel_address(low_precision_hierarchical_kernel<T, Fp8Packet>);
    case LAR_WIRE_TQ3:
      return kernel_address(low_precision_hierarchical_kernel<T, Tq3Packet>);
    case LAR_WIRE_HADAMARD2:
      return kernel_address(low_precision_hierarchical_kernel<T, Hadamard2Packet>);
  }
  return nullptr;
}

const void* kernel_of(lar_dtype dtype, lar_wire_format format) {
  if (dtype == LAR_BFLOAT16) return kernel_of<__nv_bfloat16>(format);
  if (dtype == LAR_FLOAT16) return kernel_of<__half>(format);
  return nullptr;
}

}  // namespace

int load_low_precision_hierarchical_kernels(int world_size) {
  if (world_size > 2 * kMostMembers) return LAR_OK;
  for (const lar_dtype dtype : {LAR_FLOAT16, LAR_BFLOAT16})
    for (const lar_wire_format format : {LAR_WIRE_FP8, LAR_WIRE_TQ3, LAR_WIRE_HADAMARD2})
      if (const int status = load_kernel(kernel_of(dtype, format)); status != LAR_OK) return status;
  return LAR_OK;
}

}  // namespace lar

extern "C" int lar_low_precision_hierarchical_cuda(const lar_workspace* workspace, const lar_message* message,
                                                   const lar_launch* shape, lar_wire_format format,
                                                   const int32_t* domains, void* stream) {
  using namespace lar;
  if (!workspace || !message || !shape) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  int32_t values = 0;
  int32_t bytes = 0;
  if (const int status = lar_packet_size(format, &values, &bytes); status != LAR_OK) return status;
  const void* kernel = kernel_of(message->dtype, format);
  // Whole packets to a slot.
  if (!kernel || shape->in_band || shape->chunk_vectors * LAR_VECTOR_BYTES % bytes != 0)
    return LAR_ERROR_INVALID_ARGUMENT;
  HierarchicalArguments arguments{{*workspace, *message, shape->chunk_vectors}, {}};
  if (!make_domains(domains, layout.world_size, workspace->rank, &arguments.domains)) return LAR_ERROR_INVALID_ARGUMENT;
  const int status = check_call(workspace, message, shape, layout.flagged.two_shot_bytes);
  if (status != LAR_OK || message->count == 0) return status;
  lar_launch with_courier = *shape;
  with_courier.threads += kCourierThreads;
  // Without dependent launch, for the reason that launch_flagged() has.
  return launch_kernel(kernel, with_courier, false, &arguments, stream);
}
