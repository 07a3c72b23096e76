// TWOSHOT in band, results through memory of which one store reaches every rank (device/multicast.cuh): MultiShot.
//
//     scatter  store my partials into their owners' scatter slots, as two_shot_push.cu does
//     reduce   poll the partials of my part, clear them, sum ranks 0..N-1 in order, round once, hand the result to the
//              sink and store it once
//     drain    poll all results, mine as they come back, clear them, hand those of others to the sink
//
// Sums are those of two_shot_push.cu, bit for bit: the switch copies, and adds nothing.
#include "device/bulk_sender.cuh"
#include "device/instances.cuh"
#include "device/multicast.cuh"
#include "device/sink/store.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_multicast_short_kernel(const __grid_constant__ MulticastCall<kWorldSize> call) {
  if (!kKnowsMulticast) return;
  const PushArguments<kWorldSize>& arguments = call.in_band;
  constexpr int kAtOnce = World<kWorldSize>::kPeersAtOnce;
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t i = grid_thread();
  const auto index = [&](int step) {
    return i < arguments.part ? index_of<kWorldSize>(arguments, step, i) : total_vectors;
  };
  const auto load = [&](int step) { return load_vector(arguments.input, min(index(step), total_vectors - 1)); };
  const typename Epilogue::Whole sink(arguments.output);
  wait_for_previous_kernel();
  let_next_kernel_start();

  uint4 partials[kAtOnce];
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) partials[j] = load(1 + j);
  uint4 mine = load(0);
  const uint32_t epoch = epoch_of(arguments);
  mine = without_marker(mine);
  const uint32_t slots = slots_of_call(arguments, epoch);
  scatter_one<kWorldSize>(arguments, slots + i, total_vectors, partials, index, load);
  advance_epoch(arguments, epoch);
  if (i >= arguments.part) return;

  if (index(0) < total_vectors) {
    uint4 result;
    if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result)) return;
    send_to_all(call.multicast, index(0), result);
    sink(index(0), result);
  }
  drain_results<kWorldSize>(call.multicast, arguments, total_vectors, i, sink);
}

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_multicast_kernel(const __grid_constant__ MulticastCall<kWorldSize> call) {
  if (!kKnowsMulticast) return;
  const PushArguments<kWorldSize>& arguments = call.in_band;
  const Payload<T> input(arguments.input, arguments.count);
  const typename Epilogue::template Any<T> sink(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  const uint32_t part = arguments.part;
  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const uint32_t stride = grid_threads();
  scatter<kWorldSize>(arguments, input, slots, total_vectors);
  advance_epoch(arguments, epoch);

  for (uint32_t i = grid_thread(); i < part + stride; i += stride) {
    if (i < part && index(0, i) < total_vectors) {
      const uint4 mine = without_marker(input.load(index(0, i)));
      uint4 result;
      if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result)) return;
      send_to_all(call.multicast, index(0, i), result);
      sink(index(0, i), result);
    }
    if (i >= stride && !drain_results<kWorldSize>(call.multicast, arguments, total_vectors, i - stride, sink)) return;
  }
}

// Partials by bulk copies, results by stores: a bulk copy knows no address that stands for all.
template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_multicast_split_kernel(const __grid_constant__ MulticastCall<kWorldSize> call) {
  if (!kKnowsMulticast) return;
  const PushArguments<kWorldSize>& arguments = call.in_band;
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t part = arguments.part;
  const uint32_t scatterers = arguments.scatter_lanes;
  const uint32_t drainers = arguments.drain_lanes;
  const uint32_t reducers = gridDim.x - scatterers - drainers;
  const typename Epilogue::Streamed sink(arguments.output);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  advance_epoch(arguments, epoch);
  if (blockIdx.x < scatterers) {
    LAR_BULK_SENDER_MEMORY(memory);
    BulkSender sender(memory);
    scatter_in_bulk<kWorldSize>(arguments, sender, slots, total_vectors);
    return;
  }
  if (blockIdx.x < scatterers + reducers) {
    const uint32_t first = arguments.rank * part;
    const Share share = share_of(scatterers, reducers, first < total_vectors ? min(part, total_vectors - first) : 0);
    for (uint32_t i = share.first; i < share.end; i += share.stride) {
      const uint4 mine = without_marker(load_vector(arguments.input, first + i));
      uint4 result;
      if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result)) return;
      send_to_all(call.multicast, first + i, result);
      sink(first + i, result);
    }
    if (drainers > 0) return;
  }
  const Share share =
      drainers > 0 ? share_of(scatterers + reducers, drainers, part) : share_of(scatterers, reducers, part);
  for (uint32_t i = share.first; i < share.end; i += share.stride)
    if (!drain_results<kWorldSize>(call.multicast, arguments, total_vectors, i, sink)) return;
}

const Registration rows([] {
  add_exact_in_band(LAR_TWO_SHOT, LAR_MULTICAST, [](auto type, auto world, auto epilogue, auto add) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add(Form::kShort, two_shot_multicast_short_kernel<T, kWorldSize, Epilogue>);
    add(Form::kAny, two_shot_multicast_kernel<T, kWorldSize, Epilogue>);
    add(Form::kSplit, two_shot_multicast_split_kernel<T, kWorldSize, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
