// TWOSHOT in band in memory that all ranks share: partial sums go to their owners as in two_shot_push.cu, results are
// stored once and polled by all where they are (device/shared.cuh).
#include "device/instances.cuh"
#include "device/shared.cuh"
#include "device/sink/store.cuh"
#include "device/two_shot_in_band.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    two_shot_shared_kernel(const __grid_constant__ SharedArguments shared) {
  constexpr int kAtOnce = World<kWorldSize>::kPeersAtOnce;
  const PushArguments<0>& arguments = shared.in_band;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const Payload<T> input(arguments.input, arguments.count);
  const typename Epilogue::template Any<T> sink(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  const uint32_t part = arguments.part;
  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };
  wait_for_previous_kernel();
  let_next_kernel_start();

  SharedCall call(shared);
  const uint32_t slots = call.scatter_slots();
  const uint32_t start = call.is_releaser() ? part : call.worker();
  const uint32_t stride = call.workers();
  for (uint32_t i = start; i < part; i += stride)
#pragma unroll kAtOnce
    for (int step = 1; step < world_size; ++step)
      if (index(step, i) < total_vectors)
        store_in_band(arguments.to[step], slots + i, without_marker(input.load(index(step, i))));
  call.count_call(part);
  if (call.is_releaser()) return call.settle_clears();

  for (uint32_t i = start; i < part && index(0, i) < total_vectors; i += stride) {
    const uint4 mine = without_marker(input.load(index(0, i)));
    uint4 result;
    const auto address_of = [&](int peer) {
      const uint32_t at = slots + i + slot_of_peer<kWorldSize>(arguments, peer);
      return arguments.own + int64_t{at} * LAR_VECTOR_BYTES;
    };
    if (!poll_and_sum_at<T, kWorldSize, false>(arguments, LAR_PHASE_SCATTER, address_of, mine, result))
      return call.leave_clears();
    call.store(i, result);
    sink(index(0, i), result);
  }
  // A warp at a time: whether its last vectors have come is for all of its threads to say.
  const uint32_t first_tile = start - warp_thread();
  const bool is_large = call.is_large(total_vectors);
  if (!is_large || first_tile >= part) call.clear_old_generation<kWorldSize>(true);
  for (uint32_t tile = first_tile; tile < part; tile += stride) {
    const uint32_t i = tile + warp_thread();
    const bool is_last = part - tile <= stride;
#pragma unroll 1
    for (int first = 1; first < world_size; first += kAtOnce) {
      char* from[kAtOnce];
      bool wanted[kAtOnce];
      uint4 results[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        wanted[j] = i < part && index(first + j, i) < total_vectors;
        from[j] = call.vector(rotated(arguments.rank, first + j < world_size ? first + j : 0, world_size), i);
        results[j] = {0u, 0u, 0u, 0u};
      }
      const bool asks = is_large && first == 1;
      if (asks) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) load_relaxed_system_if(wanted[j], from[j], results[j]);
        call.clear_on_the_way<kWorldSize>(true, i, is_last);
      }
      if (!(asks && are_complete(results)) &&
          !poll_until_complete(arguments.limit, LAR_PHASE_GATHER, from, wanted, results,
                               [&](int j) { return rotated(arguments.rank, first + j, world_size); })) {
        if (is_large && !is_last) call.leave_clears();
        return;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (wanted[j]) sink(index(first + j, i), results[j]);
    }
  }
}

const Registration rows([] {
  add_exact_shared(LAR_TWO_SHOT, [](auto type, auto world, auto epilogue, auto add) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    add(two_shot_shared_kernel<T, decltype(world)::value, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
