// TWOSHOT without the scatter, when the input lies in memory that peers can see: each lane tells its peers by a flag
// that the input is there, and owners read their parts in place. Results travel in band as in two_shot_push.cu; once a
// rank has them all, all owners have read its input, which may then be overwritten.
#include "device/instances.cuh"
#include "device/lane.cuh"
#include "device/pull.cuh"
#include "device/sink/store.cuh"
#include "device/two_shot_in_band.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1) two_shot_pull_kernel(const __grid_constant__ PullArguments pull) {
  const PushArguments<0>& arguments = pull.in_band;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t part = arguments.part;
  const uint32_t stride = grid_threads();
  const typename Epilogue::Whole sink(arguments.output);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t gather_slots = slots_of_call(arguments, epoch) + arguments.gather_stride;
  // The kernels that wrote the input have ended: the release makes what they wrote visible with the flag.
  const Lane<Roles::kWorkers> lane(pull.workspace, arguments.limit, EpochPlane::kPull);
  const uint32_t round = lane.epoch() + 1;
  lane.publish(FlagPlane::kPull, round);
  advance_epoch(arguments, epoch);
  if (!lane.wait(FlagPlane::kPull, LAR_PHASE_SCATTER, round)) return;
  lane.finish(round);

  for (uint32_t i = grid_thread(); i < part + stride; i += stride) {
    const uint32_t index = index_of<kWorldSize>(arguments, 0, i);
    if (i < part && index < total_vectors) {
      // Past L1, which may hold what an earlier kernel read here.
      const uint4 result = sum_in_rank_order<T, kWorldSize>(
          world_size, [&](int source) { return load_weak(static_cast<const uint4*>(pull.inputs[source]) + index); });
#pragma unroll World < kWorldSize> ::kPeersAtOnce
      for (int step = 1; step < world_size; ++step) store_in_band(arguments.to[step], gather_slots + i, result);
      sink(index, result);
    }
    if (i >= stride && !drain<kWorldSize>(arguments, gather_slots, total_vectors, i - stride, sink)) return;
  }
}

const Registration rows([] {
  add_exact_in_band(LAR_TWO_SHOT, LAR_PULL, [](auto type, auto world, auto epilogue, auto add) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add(Form::kAny, two_shot_pull_kernel<T, kWorldSize, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
