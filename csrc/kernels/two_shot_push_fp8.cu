// TWOSHOT in band with FP8 in the slots: half the bytes on the links, for an answer that is no longer exact, but still
// has the same bits on every rank: all decode the owner's encoded sum.
//
//     scatter  encode my values of the other ranks' parts, send each packet to its owner
//     reduce   poll the packets of my part, decode, add to my own values in rank order, encode, send to all peers
//     drain    poll the other owners' sums, decode, store them to the output
//
// In small messages every warp does all three for its packets, and stores straight to the peers. In large ones every
// lane has one task, and bulk copies carry the packets, as in the split kernels of exact messages.
#include "device/fp8_in_band.cuh"
#include "device/instances.cuh"

namespace lar {
namespace {

// Where this thread's vector of the sum at `tile` lies, of the owner `step` places on.
__device__ __forceinline__ char* gathered(const InBandArguments& arguments, uint32_t gather_slots, uint32_t tile,
                                          int step) {
  const uint32_t at = gather_slots + slot_of_step(step) * arguments.peer_stride + tile + warp_thread();
  return arguments.own + static_cast<int64_t>(at) * LAR_VECTOR_BYTES;
}

template <typename T, int kWorldSize, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_push_fp8_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  // More would be a lot of code: to encode takes most of the kernel's instructions.
  constexpr int kEncodedAtOnce = World<kWorldSize>::kPeersAtOnce < 3 ? World<kWorldSize>::kPeersAtOnce : 3;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  using Message = Fp8Message<T, Packet>;
  const Message packets(arguments.input, arguments.output, arguments.count);
  const Share share = tiles_of(0, gridDim.x, arguments.part);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const uint32_t gather_slots = slots + arguments.gather_stride;
  for (uint32_t tile = share.first; tile < share.end; tile += share.stride) {
#pragma unroll kEncodedAtOnce
    for (int step = 1; step < world_size; ++step) {
      const uint32_t packet = packet_of<kWorldSize>(arguments, step, tile);
      if (packet < packets.number())
        store_in_band(arguments.to[step], slots + tile + warp_thread(), encoded_own(packets, packet));
    }
  }
  advance_epoch(arguments, epoch);

  const auto drain = [&](uint32_t tile) {
    return drain_packets<Message, kWorldSize, true>(
        arguments, packets, tile, [&](int step) { return gathered(arguments, gather_slots, tile, step); });
  };
  // One packet behind: the sums of the last one are on their way meanwhile.
  uint32_t behind = share.end;
  for (uint32_t tile = share.first; tile < share.end; tile += share.stride) {
    const uint32_t packet = packet_of<kWorldSize>(arguments, 0, tile);
    if (packet < packets.number()) {
      uint4 result;
      if (!sum_packet<Message, kWorldSize, true>(arguments, packets, slots, packet, tile, result)) return;
#pragma unroll World < kWorldSize> ::kPeersAtOnce
      for (int step = 1; step < world_size; ++step)
        store_in_band(arguments.to[step], gather_slots + tile + warp_thread(), result);
      packets.store(packet, result);
    }
    if (behind < share.end && !drain(behind)) return;
    behind = tile;
  }
  if (behind < share.end) drain(behind);
}

template <typename T, int kWorldSize, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_split_fp8_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t part = arguments.part;  // wire vectors of the part of one rank
  const uint32_t scatterers = arguments.scatter_lanes;
  const uint32_t drainers = arguments.drain_lanes;
  const uint32_t reducers = gridDim.x - scatterers - drainers;
  using Message = Fp8Message<T, Packet>;
  const Message packets(arguments.input, arguments.output, arguments.count);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const uint32_t gather_slots = slots + arguments.gather_stride;
  advance_epoch(arguments, epoch);
  LAR_BULK_SENDER_MEMORY(memory);
  BulkSender sender(memory);
  if (blockIdx.x < scatterers) {
    const Share share = tiles_of(0, scatterers, part);
    for (uint32_t tile = share.first; tile < share.end; tile += share.stride) {
#pragma unroll 1
      for (int step = 1; step < world_size; ++step) {
        const uint32_t packet = packet_of<kWorldSize>(arguments, step, tile);
        if (packet >= packets.number()) continue;
        sender.fill(encoded_own(packets, packet));
        sender.send(arguments.to[step], slots + tile, kTileVectors);
        sender.close();
      }
    }
    sender.flush();
    return;
  }
  if (blockIdx.x < scatterers + reducers) {
    const Share share = tiles_of(scatterers, reducers, part);
    for (uint32_t tile = share.first; tile < share.end; tile += share.stride) {
      const uint32_t packet = packet_of<kWorldSize>(arguments, 0, tile);
      if (packet >= packets.number()) break;
      uint4 result;
      if (!sum_packet<Message, kWorldSize, true>(arguments, packets, slots, packet, tile, result)) return;
      sender.fill(result);
#pragma unroll World < kWorldSize> ::kPeersAtOnce
      for (int step = 1; step < world_size; ++step) sender.send(arguments.to[step], gather_slots + tile, kTileVectors);
      sender.close();
      packets.store(packet, result);
    }
    sender.flush();
    if (drainers > 0) return;
  }
  const Share share =
      drainers > 0 ? tiles_of(scatterers + reducers, drainers, part) : tiles_of(scatterers, reducers, part);
  for (uint32_t tile = share.first; tile < share.end; tile += share.stride) {
    const auto from = [&](int step) { return gathered(arguments, gather_slots, tile, step); };
    if (!drain_packets<Message, kWorldSize, true>(arguments, packets, tile, from)) return;
  }
}

template <typename Packet, typename Worlds>
void add_rows() {
  for_each_instance<Types<__half, __nv_bfloat16>, Worlds, Types<Store>>([](auto type, auto world, auto) {
    using T = typename decltype(type)::type;
    constexpr int kWorldSize = decltype(world)::value;
    const auto add = [](Form form, auto kernel) {
      add_row({kind_of(LAR_TWO_SHOT, LAR_PUSH, Packet::kWire), dtype_of<T>(), kWorldSize, form, kernel_address(kernel),
               LAR_MAX_THREADS, 0, false});
    };
    add(Form::kAny, two_shot_push_fp8_kernel<T, kWorldSize, Packet>);
    add(Form::kSplit, two_shot_split_fp8_kernel<T, kWorldSize, Packet>);
  });
}

const Registration rows([] {
  add_rows<Fp8Packet, Worlds<2, 4, 8, 0>>();
  add_rows<Fp8GroupPacket, Worlds<4, 0>>();  // two ranks take one step
});

}  // namespace
}  // namespace lar
