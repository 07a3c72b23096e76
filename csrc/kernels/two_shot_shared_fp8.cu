// TWOSHOT in band with FP8 in memory that all ranks share: every warp scatters, reduces and drains its packets, and
// sums are stored once (device/shared.cuh).
#include "device/fp8_in_band.cuh"
#include "device/instances.cuh"
#include "device/shared.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize, typename Packet>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    two_shot_shared_fp8_kernel(const __grid_constant__ SharedArguments shared) {
  const PushArguments<0>& arguments = shared.in_band;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t part = arguments.part;  // wire vectors of the part of one rank
  using Message = Fp8Message<T, Packet>;
  const Message packets(arguments.input, arguments.output, arguments.count);
  const auto packet = [&](int step, uint32_t tile) { return packet_of<kWorldSize>(arguments, step, tile); };
  wait_for_previous_kernel();
  let_next_kernel_start();

  SharedCall call(shared);
  const uint32_t slots = call.scatter_slots();
  const uint32_t start = call.is_releaser() ? part : call.worker() - warp_thread();
  const uint32_t stride = call.workers();
  for (uint32_t tile = start; tile < part; tile += stride)
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step)
      if (packet(step, tile) < packets.number())
        store_in_band(arguments.to[step], slots + tile + warp_thread(), encoded_own(packets, packet(step, tile)));
  call.count_call(part);
  if (call.is_releaser()) return call.settle_clears();

  for (uint32_t tile = start; tile < part && packet(0, tile) < packets.number(); tile += stride) {
    uint4 result;
    if (!sum_packet<Message, kWorldSize, false>(arguments, packets, slots, packet(0, tile), tile, result))
      return call.leave_clears();
    call.store(tile + warp_thread(), result);
    packets.store(packet(0, tile), result);
  }
  // By a rank's part, and not by all of the message as in two_shot_shared.cu: at 128 KiB over two GPUs, where all of it
  // is large and a part is not, asking first cost 6 % (benchmarks/h200/host_asks_first_tp2.json).
  const bool is_large = call.is_large(part);
  if (!is_large || start >= part) call.clear_old_generation<kWorldSize>(true);
  for (uint32_t tile = start; tile < part; tile += stride) {
    const bool is_last = part - tile <= stride;
    const auto from = [&](int step) {
      return call.vector(rotated(arguments.rank, step, world_size), tile + warp_thread());
    };
    const auto clears = [&] { call.clear_on_the_way<kWorldSize>(true, tile + warp_thread(), is_last); };
    if (!drain_packets<Message, kWorldSize, false>(arguments, packets, tile, from, is_large, clears)) {
      if (is_large && !is_last) call.leave_clears();
      return;
    }
  }
}

template <typename Packet, typename Worlds>
void add_rows() {
  for_each_instance<Types<__half, __nv_bfloat16>, Worlds, Types<Store>>([](auto type, auto world, auto) {
    using T = typename decltype(type)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add_row({kind_of(LAR_TWO_SHOT, LAR_SHARED, Packet::kWire), dtype_of<T>(), kWorldSize, Form::kAny,
             kernel_address(two_shot_shared_fp8_kernel<T, kWorldSize, Packet>), LAR_MAX_FLAGGED_THREADS,
             kReleaserThreads, false});
  });
}

const Registration rows([] {
  add_rows<Fp8Packet, Worlds<2, 0>>();
  add_rows<Fp8GroupPacket, Worlds<0>>();
});

}  // namespace
}  // namespace lar
