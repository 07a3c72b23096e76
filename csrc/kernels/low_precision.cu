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
// Published in host memory, FP8: every warp does all three for its packets, and sums are stored once
// (device/published.cuh).
//
// Flagged, any format: the lanes of device/two_shot_lane.cuh, a warp to a packet. Staged: device/staged_lane.cuh.
//
// The owner's own values are added as they are, which costs nothing and leaves one error fewer.
#include "device/in_band.cuh"
#include "device/launch.cuh"
#include "device/outbox.cuh"
#include "device/packets.cuh"
#include "device/published.cuh"
#include "device/staged_lane.cuh"
#include "device/two_shot_lane.cuh"

namespace lar {
namespace {

constexpr int kPacketVectors = Fp8Packet::kBytes / LAR_VECTOR_BYTES;
static_assert(kPacketVectors == kTileVectors, "a packet is a tile");
static_assert(LAR_IN_BAND_MARKER == 0x80000000u, "codes are never 0x80, and a scale is not negative");

// This thread's vectors of the wanted packets, polled and, if `kClears`, cleared. For the whole warp; false for all of
// it when a wait expired.
template <bool kClears, int kCount, typename RankOf>
__device__ __forceinline__ bool take(const InBandArguments& arguments, lar_phase phase, char* const (&from)[kCount],
                                     const bool (&wanted)[kCount], uint4 (&vectors)[kCount], RankOf rank_of) {
  const bool complete = poll_until_complete(arguments.limit, phase, from, wanted, vectors, rank_of);
  if (!__all_sync(kWholeWarp, complete)) return false;
  if (kClears) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) clear_in_band_if(wanted[i], from[i]);
  }
  return true;
}

// The encoded sum of a packet of my part, whose in-band slots begin at `slots`.
template <typename T, int kWorldSize, bool kClears>
__device__ __forceinline__ bool sum_packet(const InBandArguments& arguments, const Packets<T, Fp8Packet>& packets,
                                           uint32_t slots, uint32_t packet, uint32_t tile, uint4& result) {
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
  if (!take<kClears>(arguments, LAR_PHASE_SCATTER, from, wanted, vectors, [](int i) { return i; })) return false;
  result = packets.sum(packet, arguments.rank, vectors);
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
  const Packets<T, Fp8Packet> packets(arguments.input, arguments.output, arguments.count);
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
        outbox.fill(packets.encoded(packet));
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
      uint4 result;
      if (!sum_packet<T, kWorldSize, true>(arguments, packets, slots, packet, tile, result)) return;
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
      if (!take<true>(arguments, LAR_PHASE_GATHER, from, wanted, results,
                      [&](int j) { return rotated<kWorldSize>(arguments.rank, first + j); }))
        return;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (wanted[j]) packets.store(packet_of(first + j, tile), results[j]);
    }
  }
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kCourierThreads, 1)
    low_precision_published_kernel(const __grid_constant__ PublishedArguments published) {
  constexpr int kAtOnce = kPeersAtOnce<kWorldSize>;
  const InBandArguments& arguments = published.in_band;
  const uint32_t part = arguments.part;  // wire vectors of the part of one rank
  const Packets<T, Fp8Packet> packets(arguments.input, arguments.output, arguments.count);
  const auto packet_of = [&](int step, uint32_t tile) {
    return (rotated<kWorldSize>(arguments.rank, step) * part + tile) / kPacketVectors;
  };
  wait_for_previous_kernel();
  let_next_kernel_start();

  Publication publication(published);
  const uint32_t slots = publication.scatter_slots();
  const uint32_t start = publication.is_courier() ? part : publication.worker() - lane_of_warp();
  const uint32_t stride = publication.workers();
  for (uint32_t tile = start; tile < part; tile += stride)
#pragma unroll kAtOnce
    for (int step = 1; step < kWorldSize; ++step)
      if (packet_of(step, tile) < packets.number())
        store_in_band(arguments.to[step], slots + tile + lane_of_warp(), packets.encoded(packet_of(step, tile)));
  publication.count_call(part);
  if (publication.is_courier()) return publication.settle_clears();

  for (uint32_t tile = start; tile < part && packet_of(0, tile) < packets.number(); tile += stride) {
    uint4 result;
    if (!sum_packet<T, kWorldSize, false>(arguments, packets, slots, packet_of(0, tile), tile, result)) return;
    publication.store(tile + lane_of_warp(), result);
    packets.store(packet_of(0, tile), result);
  }
  publication.clear_old_generation<kWorldSize>(true);
  for (uint32_t tile = start; tile < part; tile += stride) {
    char* from[kAtOnce];
    bool wanted[kAtOnce];
    uint4 results[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      from[j] = publication.vector(rotated<kWorldSize>(arguments.rank, 1 + j), tile + lane_of_warp());
      wanted[j] = packet_of(1 + j, tile) < packets.number();
      results[j] = {0u, 0u, 0u, 0u};
    }
    if (!take<false>(arguments, LAR_PHASE_GATHER, from, wanted, results,
                     [&](int j) { return rotated<kWorldSize>(arguments.rank, 1 + j); }))
      return;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (wanted[j]) packets.store(packet_of(1 + j, tile), results[j]);
  }
}

// What the flagged lanes move: packets, a warp to each.
template <typename T, int kWorldSize, typename Packet>
class PacketCargo {
 public:
  __device__ __forceinline__ static constexpr int unit_bytes() { return Packet::kBytes; }
  // As many as fit the registers of a thread.
  static constexpr int kOwnersAtOnce = kWorldSize < 5 ? kWorldSize - 1 : 2;

  __device__ __forceinline__ explicit PacketCargo(const lar_message& message)
      : packets_(message.input, message.output, message.count) {}

  __device__ __forceinline__ int64_t units() const { return packets_.number(); }

  template <int kCount>
  __device__ __forceinline__ void pack(const Piece (&parts)[kCount], char* const (&slots)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      for_each(parts[k].span,
               [&](int64_t i) { Packet::store(slots[k] + i * Packet::kBytes, packets_.encoded(parts[k].first + i)); });
  }

  template <typename Sources, typename Targets>
  __device__ __forceinline__ void reduce(const Piece& part, int rank, Sources source_of,
                                         Targets for_each_target) const {
    for_each(part.span, [&](int64_t i) {
      typename Packet::Encoded others[kWorldSize];
#pragma unroll
      for (int source = 0; source < kWorldSize; ++source)
        if (source != rank) others[source] = Packet::load(source_of(source) + i * Packet::kBytes);
      const typename Packet::Encoded result = packets_.sum(part.first + i, rank, others);
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
  // Every warp of the workers takes every so many.
  template <typename Body>
  __device__ __forceinline__ static void for_each(int64_t span, Body body) {
    const int warps = Lane<Crew::kWorkersAndCourier>::workers() / 32;
    for (int64_t i = threadIdx.x / 32; i < span; i += warps) body(i);
  }

  const Packets<T, Packet> packets_;
};

template <typename T, int kWorldSize, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kCourierThreads, 1)
    low_precision_kernel(const __grid_constant__ KernelArguments arguments) {
  const PacketCargo<T, kWorldSize, Packet> packets(arguments.message);
  const int64_t chunk = arguments.chunk_vectors * LAR_VECTOR_BYTES / Packet::kBytes;
  two_shot_lane<kWorldSize>(arguments.workspace, LAR_LOW_PRECISION, packets, chunk);
}

template <typename T, int kWorldSize, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_STAGED_THREADS + kCourierThreads, 1)
    low_precision_staged_kernel(const __grid_constant__ KernelArguments arguments) {
  const PacketCargo<T, kWorldSize, Packet> packets(arguments.message);
  const int64_t chunk = arguments.chunk_vectors * LAR_VECTOR_BYTES / Packet::kBytes;
  staged_lane(arguments.workspace, LAR_LOW_PRECISION, packets, chunk);
}

enum class Path { kFlagged, kStaged, kInBand, kPublished };

// Those that wait for flags.
template <typename T, int kWorldSize, typename Packet>
const void* flagged_kernel(Path path) {
  if (path == Path::kFlagged) return kernel_address(low_precision_kernel<T, kWorldSize, Packet>);
  if constexpr (kWorldSize > 2) return kernel_address(low_precision_staged_kernel<T, kWorldSize, Packet>);
  return nullptr;
}

template <typename T, int kWorldSize>
const void* kernel_of(lar_wire_format format, Path path) {
  static_assert(kPeersAtOnce<kWorldSize> == kWorldSize - 1, "all peers at once");
  if (path == Path::kInBand || path == Path::kPublished) {
    if (format != LAR_WIRE_FP8) return nullptr;  // their packets may have words like the marker
    return path == Path::kInBand ? kernel_address(low_precision_fp8_kernel<T, kWorldSize>)
                                 : kernel_address(low_precision_published_kernel<T, kWorldSize>);
  }
  switch (format) {
    case LAR_WIRE_FP8:
      return flagged_kernel<T, kWorldSize, Fp8Packet>(path);
    case LAR_WIRE_TQ3:
      return flagged_kernel<T, kWorldSize, Tq3Packet>(path);
    case LAR_WIRE_HADAMARD2:
      return flagged_kernel<T, kWorldSize, Hadamard2Packet>(path);
  }
  return nullptr;
}

template <typename T>
const void* kernel_of(int world_size, lar_wire_format format, Path path) {
  switch (world_size) {
    case 2:
      return kernel_of<T, 2>(format, path);
    case 3:
      return kernel_of<T, 3>(format, path);
    case 4:
      return kernel_of<T, 4>(format, path);
    case 5:
      return kernel_of<T, 5>(format, path);
    case 6:
      return kernel_of<T, 6>(format, path);
    case 7:
      return kernel_of<T, 7>(format, path);
    case 8:
      return kernel_of<T, 8>(format, path);
    default:
      return nullptr;
  }
}

const void* kernel_of(lar_dtype dtype, int world_size, lar_wire_format format, Path path) {
  if (dtype == LAR_BFLOAT16) return kernel_of<__nv_bfloat16>(world_size, format, path);
  if (dtype == LAR_FLOAT16) return kernel_of<__half>(world_size, format, path);
  return nullptr;
}

}  // namespace

int load_low_precision_kernels(int world_size) {
  for (const lar_dtype dtype : {LAR_FLOAT16, LAR_BFLOAT16})
    for (const lar_wire_format format : {LAR_WIRE_FP8, LAR_WIRE_TQ3, LAR_WIRE_HADAMARD2})
      for (const Path path : {Path::kFlagged, Path::kStaged, Path::kInBand, Path::kPublished})
        if (const int status = load_kernel(kernel_of(dtype, world_size, format, path)); status != LAR_OK) return status;
  return LAR_OK;
}

}  // namespace lar

extern "C" int lar_low_precision_cuda(const lar_workspace* workspace, const lar_message* message,
                                      const lar_launch* shape, lar_wire_format format, void* stream) {
  using namespace lar;
  if (!workspace || !message || !shape) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  int32_t packet_values = 0;
  int32_t packet_bytes = 0;
  if (const int status = lar_packet_size(format, &packet_values, &packet_bytes); status != LAR_OK) return status;
  Path path = shape->staged ? Path::kStaged : Path::kFlagged;
  if (shape->in_band) path = layout.published ? Path::kPublished : Path::kInBand;
  const void* kernel = kernel_of(message->dtype, layout.world_size, format, path);
  // Whole packets to a slot.
  if (!kernel || shape->chunk_vectors * LAR_VECTOR_BYTES % packet_bytes != 0) return LAR_ERROR_INVALID_ARGUMENT;
  if (path == Path::kStaged) return launch_staged(kernel, *workspace, *message, *shape, stream);
  if (path == Path::kFlagged)
    return launch_flagged(kernel, *workspace, *message, *shape, layout.flagged.two_shot_bytes, stream);

  const InBandSlots slots{LAR_LOW_PRECISION,
                          EpochPlane::kTwoShotInBand,
                          layout.world_size,
                          layout.in_band.scatter_offset,
                          layout.in_band.two_shot_bytes,
                          layout.in_band.gather_offset};
  const int64_t round_elements =
      shape->chunk_vectors / kPacketVectors * layout.world_size * int64_t{Fp8Packet::kValues};
  if (path == Path::kPublished)
    return launch_published(kernel, *workspace, *message, *shape, slots, slots.gather_offset, ExtentPlane::kTwoShot,
                            round_elements, stream);
  const int status = check_call(workspace, message, shape, slots.slot_bytes);
  if (status != LAR_OK || message->count == 0) return status;
  if (shape->scatter_lanes < 1) return LAR_ERROR_INVALID_ARGUMENT;
  return in_rounds_of(round_elements, *message, [&](const lar_message& round, int64_t) {
    InBandArguments arguments = in_band_arguments(*workspace, round, *shape, slots);
    return launch_kernel(kernel, *shape, may_start_early(*workspace), &arguments, stream);
  });
}
