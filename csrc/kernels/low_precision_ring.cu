// LOWPRECISION as a ring: the hops of ring.h, each lane alone (device/lane.cuh) on its share of every part, a warp to a
// packet. The number of ranks is a run-time value: a rank has two neighbours whatever it is.
#include "device/launch.cuh"
#include "device/packets.cuh"
#include "ring.h"

namespace lar {
namespace {

template <typename T, typename Packet>
class RingLane {
 public:
  __device__ __forceinline__ explicit RingLane(const KernelArguments& arguments)
      : workspace_(arguments.workspace),
        slots_(workspace_.layout.flagged),
        ring_{workspace_.rank, workspace_.layout.world_size},
        lane_(workspace_, EpochPlane::kTwoShot, LAR_LOW_PRECISION_RING),
        packets_(arguments.message.input, arguments.message.output, arguments.message.count),
        chunk_(static_cast<int>(arguments.chunk_vectors * LAR_VECTOR_BYTES / kRawBytes)),
        hops_(static_cast<int>(ceil_div(packets_.number(), int64_t{chunk_} * gridDim.x * ring_.world_size)) *
              ring_.hops_of_chunk()),
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() const {
    lane_.start();
#pragma unroll 1
    for (int step = 0; step <= hops_; ++step) {
      if (step > 0 && !has_arrived(step - 1)) return;
      if (step < hops_ && Ring::credit_for(step) >= 0 && !has_credit(Ring::credit_for(step))) return;
      if (step > 0) receive(step - 1);
      if (step < hops_ && step % ring_.hops_of_chunk() == 0) begin(step);
      if (step < hops_)
        lane_.publish(FlagPlane::kTwoShotScatter, round(step),
                      SomePeers{step == hops_ - 1 ? Ring::everyone() : Ring::only(ring_.successor())});
      if (step > 0)
        lane_.publish(FlagPlane::kTwoShotGather, round(step - 1),
                      SomePeers{step == hops_ ? Ring::everyone() : Ring::only(ring_.predecessor())});
    }
    if (!has_credit(hops_ - 1)) return;
    lane_.finish(epoch_ + hops_);
  }

 private:
  using Cargo = Packets<T, Packet>;
  static constexpr int kRawBytes = Cargo::kRawBytes;

  __device__ __forceinline__ uint32_t round(int hop) const { return epoch_ + hop + 1; }

  __device__ __forceinline__ bool has_arrived(int hop) const {
    return lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(hop),
                      SomePeers{Ring::only(ring_.predecessor())});
  }

  __device__ __forceinline__ bool has_credit(int hop) const {
    return lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(hop),
                      SomePeers{Ring::only(ring_.successor())});
  }

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
        typename Cargo::Values sum;
        Cargo::clear(sum);
        Cargo::add(Packet::load(from + i * Packet::kBytes), sum);
        packets_.add_own(packet, sum);
        if (!is_complete) return Packet::store(to + i * Packet::kBytes, packets_.encoded_sum(packet, sum));
        typename Cargo::Raw raw;
        Cargo::round_sum(sum, raw);
        Cargo::store_raw(to + i * kRawBytes, raw);
        packets_.store(packet, raw);
      });
      return;
    }
    const bool goes_on = !ring_.is_last(hop_of_chunk);
    for_each(hop, part, [&](int64_t packet, int i) {
      typename Cargo::Raw raw;
      Cargo::load_raw(from + i * kRawBytes, raw);
      if (goes_on) Cargo::store_raw(to + i * kRawBytes, raw);
      packets_.store(packet, raw);
    });
  }

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const Ring ring_;
  const Lane<Crew::kWorkers> lane_;
  const Cargo packets_;
  const int chunk_;  // packets
  const int hops_;
  const uint32_t epoch_;
};

template <typename T, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS, 1)
    low_precision_ring_kernel(const __grid_constant__ KernelArguments arguments) {
  RingLane<T, Packet>(arguments).run();
}

template <typename T>
const void* kernel_of(lar_wire_format format) {
  switch (format) {
    case LAR_WIRE_FP8:
      return kernel_address(low_precision_ring_kernel<T, Fp8Packet>);
    case LAR_WIRE_TQ3:
      return kernel_address(low_precision_ring_kernel<T, Tq3Packet>);
    case LAR_WIRE_HADAMARD2:
      return kernel_address(low_precision_ring_kernel<T, Hadamard2Packet>);
  }
  return nullptr;
}

const void* kernel_of(lar_dtype dtype, lar_wire_format format) {
  if (dtype == LAR_BFLOAT16) return kernel_of<__nv_bfloat16>(format);
  if (dtype == LAR_FLOAT16) return kernel_of<__half>(format);
  return nullptr;
}

}  // namespace

int load_low_precision_ring_kernels(int world_size) {
  if (world_size > kMostCompressingRanks) return LAR_OK;
  for (const lar_dtype dtype : {LAR_FLOAT16, LAR_BFLOAT16})
    for (const lar_wire_format format : {LAR_WIRE_FP8, LAR_WIRE_TQ3, LAR_WIRE_HADAMARD2})
      if (const int status = load_kernel(kernel_of(dtype, format)); status != LAR_OK) return status;
  return LAR_OK;
}

}  // namespace lar

extern "C" int lar_low_precision_ring_cuda(const lar_workspace* workspace, const lar_message* message,
                                           const lar_launch* shape, lar_wire_format format, void* stream) {
  using namespace lar;
  if (!workspace || !message || !shape) return LAR_ERROR_INVALID_ARGUMENT;
  int32_t values = 0;
  int32_t bytes = 0;
  if (const int status = lar_packet_size(format, &values, &bytes); status != LAR_OK) return status;
  const void* kernel = kernel_of(message->dtype, format);
  if (!kernel || shape->in_band || workspace->layout.world_size > kMostCompressingRanks)
    return LAR_ERROR_INVALID_ARGUMENT;
  // Whole packets to a slot.
  if (shape->chunk_vectors * LAR_VECTOR_BYTES % raw_packet_bytes(values, message->dtype) != 0)
    return LAR_ERROR_INVALID_ARGUMENT;
  const int status = check_call(workspace, message, shape, workspace->layout.flagged.two_shot_bytes);
  if (status != LAR_OK || message->count == 0) return status;
  KernelArguments arguments{*workspace, *message, shape->chunk_vectors};
  // Without dependent launch, for the reason that launch_flagged() has.
  return launch_kernel(kernel, *shape, false, &arguments, stream);
}
