// ONESHOT in band with FP8 in the slots: every rank sends its encoded values to all others, and all decode and sum the
// same packets in rank order, their own too, so all have the same bits. One step instead of two, and values are rounded
// to FP8 once: sums do not travel. Between two ranks that takes as many bytes as two steps do (two_shot_push_fp8.cu).
//
// Every warp does everything for its packets. Where each has one at most, it stores straight to the peers: nothing
// comes behind that would have to wait. Where there are more, bulk copies carry them (device/bulk_sender.cuh), and a
// warp has sent the next packets before it waits for those of its peers. What it has sent it keeps: that is its own
// term of the sum.
#include "device/fp8_in_band.cuh"
#include "device/instances.cuh"

namespace lar {
namespace {

// Packets on their way ahead of the one that a warp waits for.
constexpr int kLead = 2;

template <typename T, int kWorldSize, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_short_fp8_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  using Message = Fp8Message<T, Packet>;
  const Message packets(arguments.input, arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(packets.number()) * kPacketVectors;
  const Share share = tiles_of(0, gridDim.x, total_vectors);
  const uint32_t tile = share.first;
  const bool has_tile = tile < share.end;
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  uint4 mine = {0u, 0u, 0u, 0u};
  if (has_tile) {
    mine = encoded_own(packets, tile / kPacketVectors);
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step) store_in_band(arguments.to[step], slots + tile + warp_thread(), mine);
  }
  advance_epoch(arguments, epoch);
  if (!has_tile) return;
  store_sum<Message, kWorldSize, true>(arguments, packets, tile / kPacketVectors, mine, [&](int rank) {
    return tile_vector<kWorldSize>(arguments, slots + tile, rank);
  });
}

template <typename T, int kWorldSize, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_push_fp8_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  using Message = Fp8Message<T, Packet>;
  const Message packets(arguments.input, arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(packets.number()) * kPacketVectors;
  const Share share = tiles_of(0, gridDim.x, total_vectors);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  LAR_BULK_SENDER_MEMORY(memory);
  BulkSender sender(memory);
  uint32_t ahead = share.first;
  const auto push = [&] {
    uint4 mine = {0u, 0u, 0u, 0u};
    if (ahead >= share.end) return mine;
    mine = encoded_own(packets, ahead / kPacketVectors);
    sender.fill(mine);
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step) sender.send(arguments.to[step], slots + ahead, kTileVectors);
    sender.close();
    ahead += share.stride;
    return mine;
  };
  uint4 sent[kLead];
#pragma unroll
  for (int i = 0; i < kLead; ++i) sent[i] = push();
  advance_epoch(arguments, epoch);
#pragma unroll 1
  for (uint32_t tile = share.first; tile < share.end; tile += share.stride) {
    const uint4 next = push();
    const auto from = [&](int rank) { return tile_vector<kWorldSize>(arguments, slots + tile, rank); };
    if (!store_sum<Message, kWorldSize, true>(arguments, packets, tile / kPacketVectors, sent[0], from)) return;
#pragma unroll
    for (int i = 0; i + 1 < kLead; ++i) sent[i] = sent[i + 1];
    sent[kLead - 1] = next;
  }
  sender.flush();
}

template <typename Packet, typename Worlds>
void add_rows() {
  for_each_instance<Types<__half, __nv_bfloat16>, Worlds, Types<Store>>([](auto type, auto world, auto) {
    using T = typename decltype(type)::type;
    constexpr int kWorldSize = decltype(world)::value;
    const auto add = [](Form form, auto kernel) {
      add_row({kind_of(LAR_ONE_SHOT, LAR_PUSH, Packet::kWire), dtype_of<T>(), kWorldSize, form, kernel_address(kernel),
               LAR_MAX_THREADS, 0, false});
    };
    add(Form::kShort, one_shot_short_fp8_kernel<T, kWorldSize, Packet>);
    add(Form::kAny, one_shot_push_fp8_kernel<T, kWorldSize, Packet>);
  });
}

const Registration rows([] {
  add_rows<Fp8Packet, Worlds<2, 0>>();
  add_rows<Fp8GroupPacket, Worlds<2, 0>>();
});

}  // namespace
}  // namespace lar
