// ONESHOT in band in memory that all ranks share: every rank stores its vector once, and all poll it there
// (device/shared.cuh).
#include "device/instances.cuh"
#include "device/shared.cuh"
#include "device/sink/store.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    one_shot_shared_kernel(const __grid_constant__ SharedArguments shared) {
  const InBandArguments& arguments = shared.in_band;
  const Payload<T> input(arguments.input, arguments.count);
  const typename Epilogue::template Any<T> sink(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  wait_for_previous_kernel();
  let_next_kernel_start();

  SharedCall call(shared);
  const uint32_t first = call.is_releaser() ? total_vectors : call.worker();
  const uint32_t stride = call.workers();
  for (uint32_t i = first; i < total_vectors; i += stride) call.store(i, without_marker(input.load(i)));
  call.count_call(total_vectors);
  if (call.is_releaser()) return call.settle_clears();

  // A warp at a time: whether its last vectors have come is for all of its threads to say.
  const uint32_t first_tile = first - warp_thread();
  const bool is_large = call.is_large(total_vectors);
  if (!is_large || first_tile >= total_vectors) call.clear_old_generation<kWorldSize>(false);

  for (uint32_t tile = first_tile; tile < total_vectors; tile += stride) {
    const uint32_t i = tile + warp_thread();
    const auto address_of = [&](int peer) { return call.vector(peer, i); };
    const bool has_vector = i < total_vectors;
    const bool is_last = total_vectors - tile <= stride;
    const FirstPoll<kWorldSize> asked(arguments, address_of, is_large && has_vector);
    if (is_large) call.clear_on_the_way<kWorldSize>(false, i, is_last);
    if (!has_vector) continue;
    const uint4 mine = without_marker(input.load(i));
    uint4 result;
    if (!poll_and_sum_at<T, kWorldSize, false>(arguments, LAR_PHASE_GATHER, address_of, mine, result, &asked)) {
      if (is_large && !is_last) call.leave_clears();
      return;
    }
    sink(i, result);
  }
}

const Registration rows([] {
  add_exact_shared(LAR_ONE_SHOT, [](auto type, auto world, auto epilogue, auto add) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    add(one_shot_shared_kernel<T, decltype(world)::value, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
