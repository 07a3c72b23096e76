// TWOSHOT in band: reduce-scatter, then all-gather, both by pushing. Two communication steps whatever the world size.
//
// Every rank owns 1/N of the vectors. 2 (N-1)/N * payload bytes per link direction: the least that an
// all-reduce without in-network reduction can move. Each thread, on its vectors of every part:
//
//     scatter  store my partials into their owners' scatter slots
//     reduce   poll the partials of my part, clear them, sum ranks 0..N-1 in order, round once, hand the result to the
//              sink and to the gather slots of all peers
//     drain    one vector behind: poll the other owners' results, clear them, hand them to the sink
//
// A thread that does all three stores all its partials before it polls anything: when it comes to reduce its first
// vector, the links still have the last ones to carry. In large messages each lane does one of the three
// (one_shot_push.cu says why).
#include "device/bulk_sender.cuh"
#include "device/instances.cuh"
#include "device/sink/store.cuh"
#include "device/two_shot_in_band.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_short_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
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

  // All loads leave together; where there is no vector, one is loaded for nothing rather than branched around.
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

  const uint32_t gather_slots = slots + arguments.gather_stride;
  if (index(0) < total_vectors) {
    uint4 result;
    if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result)) return;
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step) store_in_band(arguments.to[step], gather_slots + i, result);
    sink(index(0), result);
  }
  drain<kWorldSize>(arguments, gather_slots, total_vectors, i, sink);
}

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_push_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const Payload<T> input(arguments.input, arguments.count);
  const typename Epilogue::template Any<T> sink(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  const uint32_t part = arguments.part;
  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const uint32_t gather_slots = slots + arguments.gather_stride;
  const uint32_t stride = grid_threads();
  scatter<kWorldSize>(arguments, input, slots, total_vectors);
  advance_epoch(arguments, epoch);

  for (uint32_t i = grid_thread(); i < part + stride; i += stride) {
    if (i < part && index(0, i) < total_vectors) {
      const uint4 mine = without_marker(input.load(index(0, i)));
      uint4 result;
      if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result)) return;
#pragma unroll World < kWorldSize> ::kPeersAtOnce
      for (int step = 1; step < world_size; ++step) store_in_band(arguments.to[step], gather_slots + i, result);
      sink(index(0, i), result);
    }
    if (i >= stride && !drain<kWorldSize>(arguments, gather_slots, total_vectors, i - stride, sink)) return;
  }
}

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_split_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
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
  const uint32_t gather_slots = slots + arguments.gather_stride;
  advance_epoch(arguments, epoch);
  LAR_BULK_SENDER_MEMORY(memory);
  BulkSender sender(memory);
  if (blockIdx.x < scatterers) {
    scatter_in_bulk<kWorldSize>(arguments, sender, slots, total_vectors);
    return;
  }
  if (blockIdx.x < scatterers + reducers) {
    const uint32_t first = arguments.rank * part;
    const Share share = share_of(scatterers, reducers, first < total_vectors ? min(part, total_vectors - first) : 0);
    for (uint32_t tile = share.first - warp_thread(); tile < share.end; tile += share.stride) {
      const uint32_t i = tile + warp_thread();
      uint4 result = {0u, 0u, 0u, 0u};
      bool complete = true;
      if (i < share.end) {
        const uint4 mine = without_marker(load_vector(arguments.input, first + i));
        complete = poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result);
        if (complete) sink(first + i, result);
      }
      if (!__all_sync(0xffffffffu, complete)) return;
      sender.fill(result);
#pragma unroll World < kWorldSize> ::kPeersAtOnce
      for (int step = 1; step < world_size; ++step)
        sender.send(arguments.to[step], gather_slots + tile, min(kTileVectors, share.end - tile));
      sender.close();
    }
    sender.flush();
    if (drainers > 0) return;
  }
  const Share share =
      drainers > 0 ? share_of(scatterers + reducers, drainers, part) : share_of(scatterers, reducers, part);
  for (uint32_t i = share.first; i < share.end; i += share.stride)
    if (!drain<kWorldSize>(arguments, gather_slots, total_vectors, i, sink)) return;
}

const Registration rows([] {
  add_exact_in_band(LAR_TWO_SHOT, LAR_PUSH, [](auto type, auto world, auto epilogue, auto add) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add(Form::kShort, two_shot_short_kernel<T, kWorldSize, Epilogue>);
    add(Form::kAny, two_shot_push_kernel<T, kWorldSize, Epilogue>);
    add(Form::kSplit, two_shot_split_kernel<T, kWorldSize, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
