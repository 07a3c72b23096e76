// LOWPRECISION: the two-shot of two_shot.cu with a wire format in the slots. Half the bytes on the links, or less, for
// an answer that is no longer exact, but still has the same bits on every rank: all decode the owner's encoded sum.
//
// In band, FP8 (codec/fp8.h): a packet of 496 values is one vector of each thread of a warp, and no word of it is the
// in-band marker, so packets travel as any vectors do (device/in_band.cuh). Every lane has one task, as in the split
// kernels of large messages:
//
//     scatter  encode my values of the other ranks' parts, send each packet to its owner
//     reduce   poll the packets of my part, decode, add to my own values in rank order, encode, send to all peers
//     drain    poll the other owners' sums, decode, store them to the output
//
// The owner's own values are added as they are, which costs nothing and leaves one error fewer.
#include "device/in_band.cuh"
#include "device/launch.cuh"
#include "device/outbox.cuh"
#include "device/packet.cuh"

namespace lar {
namespace {

constexpr int kPacketVectors = Fp8Packet::kBytes / LAR_VECTOR_BYTES;
static_assert(kPacketVectors == kTileVectors, "a packet is a tile");
static_assert(LAR_IN_BAND_MARKER == 0x80000000u, "codes are never 0x80, and a scale is not negative");

// The message as packets. A thread's values are neighbours: `kThreadVectors` vectors of the tensor.
template <typename T>
class Packets {
 public:
  static constexpr int kThreadVectors = Fp8Packet::kThreadValues / Vector<T>::kElements;

  __device__ __forceinline__ explicit Packets(const InBandArguments& arguments)
      : input_(arguments.input, arguments.count),
        output_(arguments.output, arguments.count),
        count_(arguments.count),
        total_vectors_(ceil_div(arguments.count, Vector<T>::kElements)),
        number_(static_cast<uint32_t>(ceil_div(arguments.count, Fp8Packet::Codec::kValues))) {}

  __device__ __forceinline__ uint32_t number() const { return number_; }

  __device__ __forceinline__ void load(uint32_t packet, float (&values)[Fp8Packet::kThreadValues]) const {
    load_values(input_, first_vector(packet), values);
  }

  // Decodes what a packet's vectors say and stores it. A zero is +0.
  __device__ __forceinline__ void store(uint32_t packet, const uint4& raw) const {
    float values[Fp8Packet::kThreadValues];
    Fp8Packet::decode(raw, values);
#pragma unroll
    for (int i = 0; i < Fp8Packet::kThreadValues; ++i) values[i] = codec::add(0.0f, values[i]);
    if (lane_of_warp() < Fp8Packet::kThreads) store_values(output_, first_vector(packet), total_vectors_, values);
  }

  // Sums behind the message's end, which must not count.
  __device__ __forceinline__ void clear_behind_end(uint32_t packet, float (&values)[Fp8Packet::kThreadValues]) const {
    const int64_t first = first_vector(packet) * Vector<T>::kElements;
    if (first + Fp8Packet::kThreadValues <= count_) return;
#pragma unroll
    for (int i = 0; i < Fp8Packet::kThreadValues; ++i)
      if (first + i >= count_) values[i] = 0.0f;
  }

 private:
  __device__ __forceinline__ int64_t first_vector(uint32_t packet) const {
    return (int64_t{packet} * Fp8Packet::kThreads + lane_of_warp()) * kThreadVectors;
  }

  const Payload<T> input_;
  const Payload<T> output_;
  const int64_t count_;
  const int64_t total_vectors_;
  const uint32_t number_;
};

// This thread's vector of the packets at `index` of every wanted slot of `own`, polled and cleared. For the whole warp;
// false for all of it when a wait expired.
template <int kCount, typename RankOf>
__device__ __forceinline__ bool take(const InBandArguments& arguments, lar_phase phase, char* const (&from)[kCount],
                                     const bool (&wanted)[kCount], uint4 (&vectors)[kCount], RankOf rank_of) {
  const bool complete = poll_until_complete(arguments.limit, phase, from, wanted, vectors, rank_of);
  if (!__all_sync(kWholeWarp, complete)) return false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) clear_in_band_if(wanted[i], from[i]);
  return true;
}

template <typename T, int kWorldSize>
__device__ __forceinline__ bool sum_packet(const InBandArguments& arguments, const Packets<T>& packets, uint32_t slots,
                                           uint32_t packet, uint32_t tile, float (&sum)[Fp8Packet::kThreadValues]) {
  char* from[kWorldSize];
  bool wanted[kWorldSize];
  uint4 vectors[kWorldSize];
#pragma unroll
  for (int source = 0; source < kWorldSize; ++source) {
    const uint32_t at = slots + slot_of_peer<kWorldSize>(arguments, source) + tile + lane_of_warp();
    from[source] = arguments.own + static_cast<int64_t>(at) * LAR_VECTOR_BYTES;
    wanted[source] = source != arguments.rank;
    vectors[source] = {0u, 0u, 0u, 0u};
  }
  if (!take(arguments, LAR_PHASE_SCATTER, from, wanted, vectors, [](int i) { return i; })) return false;
#pragma unroll
  for (int i = 0; i < Fp8Packet::kThreadValues; ++i) sum[i] = 0.0f;
#pragma unroll
  for (int source = 0; source < kWorldSize; ++source) {
    float values[Fp8Packet::kThreadValues];
    if (source == arguments.rank) {
      packets.load(packet, values);
#pragma unroll
      for (int i = 0; i < Fp8Packet::kThreadValues; ++i) values[i] = codec::infinity_as_nan(values[i]);
    } else {
      Fp8Packet::decode(vectors[source], values);
    }
#pragma unroll
    for (int i = 0; i < Fp8Packet::kThreadValues; ++i) sum[i] = codec::add(sum[i], values[i]);
  }
#pragma unroll
  for (int i = 0; i < Fp8Packet::kThreadValues; ++i) sum[i] = codec::largest_for_infinity(sum[i]);
  packets.clear_behind_end(packet, sum);
  return true;
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    low_precision_fp8_kernel(const __grid_constant__ InBandArguments arguments) {
  constexpr int kAtOnce = kPeersAtOnce<kWorldSize>;
  const uint32_t part = arguments.part;  // wire vectors of the part of one rank
  const uint32_t scatterers = arguments.scatter_lanes;
  const uint32_t drainers = arguments.drain_lanes;
  const uint32_t reducers = gridDim.x - scatterers - drainers;
  const Packets<T> packets(arguments);
  const auto packet_of = [&](int step, uint32_t tile) {
    return (rotated<kWorldSize>(arguments.rank, step) * part + tile) / kPacketVectors;
  };
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const uint32_t gather_slots = slots + arguments.gather_stride;
  advance_epoch(arguments, epoch);
  LAR_OUTBOX_MEMORY(memory);
  Outbox outbox(memory);
  if (blockIdx.x < scatterers) {
    const Share share = share_of(0, scatterers, part);
    for (uint32_t tile = share.first - lane_of_warp(); tile < share.end; tile += share.stride) {
#pragma unroll 1
      for (int step = 1; step < kWorldSize; ++step) {
        const uint32_t packet = packet_of(step, tile);
        if (packet >= packets.number()) continue;
        float values[Fp8Packet::kThreadValues];
        packets.load(packet, values);
        outbox.fill(Fp8Packet::encode(values));
        outbox.send(arguments.to[step], slots + tile, kTileVectors);
        outbox.close();
      }
    }
    outbox.flush();
    return;
  }
  if (blockIdx.x < scatterers + reducers) {
    const Share share = share_of(scatterers, reducers, part);
    for (uint32_t tile = share.first - lane_of_warp(); tile < share.end; tile += share.stride) {
      const uint32_t packet = packet_of(0, tile);
      if (packet >= packets.number()) break;
      float sum[Fp8Packet::kThreadValues];
      if (!sum_packet<T, kWorldSize>(arguments, packets, slots, packet, tile, sum)) return;
      const uint4 result = Fp8Packet::encode(sum);
      outbox.fill(result);
#pragma unroll kPeersAtOnce < kWorldSize>
      for (int step = 1; step < kWorldSize; ++step) outbox.send(arguments.to[step], gather_slots + tile, kTileVectors);
      outbox.close();
      packets.store(packet, result);
    }
    outbox.flush();
    if (drainers > 0) return;
  }
  const Share share =
      drainers > 0 ? share_of(scatterers + reducers, drainers, part) : share_of(scatterers, reducers, part);
  for (uint32_t tile = share.first - lane_of_warp(); tile < share.end; tile += share.stride) {
#pragma unroll 1
    for (int first = 1; first < kWorldSize; first += kAtOnce) {
      char* from[kAtOnce];
      bool wanted[kAtOnce];
      uint4 results[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t at = gather_slots + (first + j - 1) * arguments.peer_stride + tile + lane_of_warp();
        from[j] = arguments.own + static_cast<int64_t>(at) * LAR_VECTOR_BYTES;
        wanted[j] = packet_of(first + j, tile) < packets.number();
        results[j] = {0u, 0u, 0u, 0u};
      }
      if (!take(arguments, LAR_PHASE_GATHER, from, wanted, results,
                [&](int j) { return rotated<kWorldSize>(arguments.rank, first + j); }))
        return;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (wanted[j]) packets.store(packet_of(first + j, tile), results[j]);
    }
  }
}

template <typename T>
const void* select_kernel(int world_size) {
  switch (world_size) {
    case 2:
      return reinterpret_cast<const void*>(low_precision_fp8_kernel<T, 2>);
    case 3:
      return reinterpret_cast<const void*>(low_precision_fp8_kernel<T, 3>);
    case 4:
      return reinterpret_cast<const void*>(low_precision_fp8_kernel<T, 4>);
    case 5:
      return reinterpret_cast<const void*>(low_precision_fp8_kernel<T, 5>);
    case 6:
      return reinterpret_cast<const void*>(low_precision_fp8_kernel<T, 6>);
    case 7:
      return reinterpret_cast<const void*>(low_precision_fp8_kernel<T, 7>);
    case 8:
      return reinterpret_cast<const void*>(low_precision_fp8_kernel<T, 8>);
    default:
      return nullptr;
  }
}

}  // namespace
}  // namespace lar

extern "C" int lar_low_precision_cuda(const lar_workspace* workspace, const lar_message* message,
                                      const lar_launch* shape, lar_wire_format format, void* stream) {
  using namespace lar;
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  const int status = check_call(workspace, message, shape, layout.two_shot_chunk_bytes);
  if (status != LAR_OK || message->count == 0) return status;
  const void* kernel = nullptr;
  if (message->dtype == LAR_BFLOAT16) kernel = select_kernel<__nv_bfloat16>(layout.world_size);
  if (message->dtype == LAR_FLOAT16) kernel = select_kernel<__half>(layout.world_size);
  // Whole packets to a part, and some lanes for each task.
  const bool fits = shape->chunk_vectors % kPacketVectors == 0 && shape->scatter_lanes > 0;
  if (!kernel || !layout.in_band || format != LAR_WIRE_FP8 || !fits) return LAR_ERROR_INVALID_ARGUMENT;
  const Slots slots{LAR_TWO_SHOT, layout.world_size, layout.scatter_offset, layout.two_shot_chunk_bytes,
                    layout.gather_offset};
  const int64_t round_elements =
      shape->chunk_vectors / kPacketVectors * layout.world_size * int64_t{Fp8Packet::Codec::kValues};
  return in_rounds_of(round_elements, *message, [&](const lar_message& round, int64_t) {
    InBandArguments arguments = in_band_arguments(*workspace, round, *shape, slots);
    arguments.limit.algorithm = LAR_LOW_PRECISION;
    return launch_kernel(kernel, *shape, has_dependent_launch(), &arguments, stream);
  });
}
