// ONESHOT in band, through memory of which one store reaches every rank (device/multicast.cuh): one store for each
// vector instead of one for each peer.
//
//     push    store it into my slot, everywhere
//     reduce  poll the vectors of all ranks, mine as it comes back, clear them, sum in rank order, round once, hand the
//             result to the sink
#include "device/instances.cuh"
#include "device/multicast.cuh"
#include "device/sink/store.cuh"

namespace lar {
namespace {

// The slots of this call, in vectors from `all` or `own`.
__device__ __forceinline__ uint32_t slots_of(const MulticastArguments& multicast, uint32_t epoch) {
  return pushed_generation(epoch) * multicast.generation_stride;
}

template <typename T, int kWorldSize>
__device__ __forceinline__ bool take_and_sum(const MulticastCall<kWorldSize>& call, uint32_t slots, uint32_t i,
                                             const uint4& mine, uint4& result) {
  const auto address_of = [&](int rank) {
    const uint32_t at = slots + rank * call.multicast.rank_stride + i;
    return call.multicast.own + int64_t{at} * LAR_VECTOR_BYTES;
  };
  return poll_and_sum_at<T, kWorldSize, true, true>(call.in_band, LAR_PHASE_GATHER, address_of, mine, result);
}

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_multicast_short_kernel(const __grid_constant__ MulticastCall<kWorldSize> call) {
  if (!kKnowsMulticast) return;
  const PushArguments<kWorldSize>& arguments = call.in_band;
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t index = grid_thread();
  const bool has_vector = index < total_vectors;
  wait_for_previous_kernel();
  let_next_kernel_start();

  uint4 mine = load_vector(arguments.input, min(index, total_vectors - 1));
  const uint32_t epoch = epoch_of(arguments);
  mine = without_marker(mine);
  const uint32_t slots = slots_of(call.multicast, epoch);
  if (has_vector) send_to_all(call.multicast, slots + arguments.rank * call.multicast.rank_stride + index, mine);
  advance_epoch(arguments, epoch);
  if (!has_vector) return;
  uint4 result;
  if (!take_and_sum<T, kWorldSize>(call, slots, index, mine, result)) return;
  typename Epilogue::Whole(arguments.output)(index, result);
}

// Vectors on their way ahead of the one that a thread waits for.
constexpr int kLead = 2;

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_multicast_kernel(const __grid_constant__ MulticastCall<kWorldSize> call) {
  if (!kKnowsMulticast) return;
  const PushArguments<kWorldSize>& arguments = call.in_band;
  const Payload<T> input(arguments.input, arguments.count);
  const typename Epilogue::template Any<T> sink(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of(call.multicast, epoch);
  uint32_t ahead = grid_thread();
  const auto push = [&] {
    if (ahead >= total_vectors) return;
    send_to_all(call.multicast, slots + arguments.rank * call.multicast.rank_stride + ahead,
                without_marker(input.load(ahead)));
    ahead += grid_threads();
  };
#pragma unroll 1
  for (int i = 0; i < kLead; ++i) push();
  advance_epoch(arguments, epoch);
  for (uint32_t i = grid_thread(); i < total_vectors; i += grid_threads()) {
    push();
    constexpr uint4 kNothing = {0u, 0u, 0u, 0u};
    uint4 result;
    if (!take_and_sum<T, kWorldSize>(call, slots, i, kNothing, result)) return;
    sink(i, result);
  }
}

const Registration rows([] {
  add_exact_in_band(LAR_ONE_SHOT, LAR_MULTICAST, [](auto type, auto world, auto epilogue, auto add) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add(Form::kShort, one_shot_multicast_short_kernel<T, kWorldSize, Epilogue>);
    add(Form::kAny, one_shot_multicast_kernel<T, kWorldSize, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
