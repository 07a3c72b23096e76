// TWOSHOT with sums in the switch: half the traffic of large messages, and not exact. The order in which the switch
// adds is not told, and may change with where memory lies; so this is asked for by name and never chosen.
//
//     copy     store my input into my memory, for the switch to read; tell every rank
//     reduce   wait for all ranks; read my part of all inputs at once, summed by the switch; hand it to the sink and
//              store it once
//     drain    poll all results, mine as they come back, clear them, hand those of others to the sink
//
// Lane by lane: what lane b reads, lanes b of all ranks have copied. A flag is the number of the call, as
// EpochPlane::kInSwitch counts them: were other calls counted with them, a flag that was last written before very many
// of those could seem to be one of this call when numbers wrap.
#include "device/instances.cuh"
#include "device/multicast.cuh"
#include "device/sink/store.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_in_switch_kernel(const __grid_constant__ InSwitchCall<kWorldSize> call) {
  if (!kKnowsMulticast) return;
  const InBandArguments& arguments = call.in_band;
  const MulticastArguments& multicast = call.multicast;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const Payload<T> input(arguments.input, arguments.count);
  const typename Epilogue::template Any<T> sink(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  const uint32_t part = arguments.part;
  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t stride = grid_threads();
  for (uint32_t i = grid_thread(); i < part; i += stride)
#pragma unroll 1
    for (int step = 0; step < world_size; ++step)
      if (index(step, i) < total_vectors)
        store_weak(reinterpret_cast<uint4*>(multicast.own_inputs) + index(step, i), input.load(index(step, i)));
  fence_between_addresses();
  advance_epoch(arguments, epoch);

  const uint32_t row = blockIdx.x * multicast.flag_words;
  for (int peer = threadIdx.x; peer < world_size; peer += blockDim.x)
    store_release_system(call.peer_flags[peer] + row + arguments.rank, epoch + 1);
  bool all_are_here = true;
  for (int peer = threadIdx.x; all_are_here && peer < world_size; peer += blockDim.x)
    all_are_here =
        wait_for_round(arguments.limit, multicast.flags + row + peer, epoch + 1, blockIdx.x, peer, LAR_PHASE_SCATTER);
  if (!__syncthreads_and(all_are_here)) return;
  fence_between_addresses();

  for (uint32_t i = grid_thread(); i < part + stride; i += stride) {
    if (i < part && index(0, i) < total_vectors) {
      const char* at = multicast.all_inputs + int64_t{index(0, i)} * LAR_VECTOR_BYTES;
      const uint4 result = without_marker(load_reduced_in_switch<T>(at));
      send_to_all(multicast, index(0, i), result);
      sink(index(0, i), result);
    }
    if (i >= stride && !drain_results<kWorldSize>(multicast, arguments, total_vectors, i - stride, sink)) return;
  }
}

const Registration rows([] {
  add_exact_in_band(LAR_TWO_SHOT, LAR_IN_SWITCH, [](auto type, auto world, auto epilogue, auto add) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    add(Form::kAny, two_shot_in_switch_kernel<T, decltype(world)::value, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
