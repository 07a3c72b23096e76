// ONESHOT in band with FP8 in memory that all ranks share: every rank stores its encoded values once, and all poll,
// decode and sum the same packets in rank order, their own too (one_shot_push_fp8.cu, device/shared.cuh).
#include "device/fp8_in_band.cuh"
#include "device/instances.cuh"
#include "device/shared.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    one_shot_shared_fp8_kernel(const __grid_constant__ SharedArguments shared) {
  const InBandArguments& arguments = shared.in_band;
  using Message = Fp8Message<T, Fp8Packet>;
  const Message packets(arguments.input, arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(packets.number()) * kPacketVectors;
  wait_for_previous_kernel();
  let_next_kernel_start();

  SharedCall call(shared);
  const uint32_t first = call.is_releaser() ? total_vectors : call.worker() - warp_thread();
  const uint32_t stride = call.workers();
  uint4 sent = {0u, 0u, 0u, 0u};  // of the first packet: most calls have one to a warp
  for (uint32_t tile = first; tile < total_vectors; tile += stride) {
    const uint4 mine = encoded_own(packets, tile / kPacketVectors);
    call.store(tile + warp_thread(), mine);
    if (tile == first) sent = mine;
  }
  call.count_call(total_vectors);
  if (call.is_releaser()) return call.settle_clears();
  const bool is_large = call.is_large(total_vectors);
  if (!is_large || first >= total_vectors) call.clear_old_generation<kWorldSize>(false);

  for (uint32_t tile = first; tile < total_vectors; tile += stride) {
    const auto from = [&](int rank) { return call.vector(rank, tile + warp_thread()); };
    const bool is_last = total_vectors - tile <= stride;
    const auto leave = [&] {
      if (is_large && !is_last) call.leave_clears();
    };
    const FirstPoll<kWorldSize> asked(arguments, from, is_large);
    if (is_large) {
      call.clear_on_the_way<kWorldSize>(false, tile + warp_thread(), is_last);
      if (!__all_sync(kWholeWarp, asked.is_complete()) && !call.wait_for_tile(LAR_PHASE_GATHER, tile)) return leave();
    }
    const uint4 mine = tile == first ? sent : encoded_own(packets, tile / kPacketVectors);
    if (!store_sum<Message, kWorldSize, false>(arguments, packets, tile / kPacketVectors, mine, from, &asked))
      return leave();
  }
}

const Registration rows([] {
  for_each_instance<Types<__half, __nv_bfloat16>, Worlds<2, 0>, Types<Store>>([](auto type, auto world, auto) {
    using T = typename decltype(type)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add_row({kind_of(LAR_ONE_SHOT, LAR_SHARED, LAR_WIRE_FP8), dtype_of<T>(), kWorldSize, Form::kAny,
             kernel_address(one_shot_shared_fp8_kernel<T, kWorldSize>), LAR_MAX_FLAGGED_THREADS, kReleaserThreads,
             false});
  });
});

}  // namespace
}  // namespace lar
