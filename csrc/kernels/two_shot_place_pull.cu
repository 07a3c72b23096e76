// TWOSHOT of which inputs and outputs both lie in memory that peers see: owners read the inputs in place, and store the
// results straight into all outputs. No slot is used. The steps and what their flags stand for: protocol/place.h.
#include "device/bulk_sender.cuh"
#include "device/instances.cuh"
#include "device/place.cuh"
#include "device/two_shot_in_band.cuh"

namespace lar {
namespace {

// Tiles of a warp whose parts are on their way together: loads from peers take a microsecond or two.
constexpr int kTilesAtOnce = 2;

// Whole aligned vectors.
template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_place_pull_kernel(const __grid_constant__ PlacePullArguments pull) {
  const PushArguments<0>& arguments = pull.place.in_band;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t part = arguments.part;
  wait_for_previous_kernel();
  let_next_kernel_start();

  // The kernels that wrote the input have ended: the release makes what they wrote visible with the flag.
  const PlaceFlags flags(pull.place);
  flags.announce();
  if (blockIdx.x == 0 && threadIdx.x == 0) count_beginning(arguments.limit.begun);
  if (!flags.admit()) return;
  LAR_BULK_SENDER_MEMORY(memory);
  BulkSender sender(memory);
  char* kept[World<kWorldSize>::kRanksAtOnce];  // of any number of ranks, those of the first
#pragma unroll
  for (int step = 0; step < World<kWorldSize>::kRanksAtOnce; ++step)
    kept[step] = flags.output_of(step < world_size ? step : 0);
  const Store::Streamed output(kept[0]);
  const uint32_t first = arguments.rank * part;
  const Share share = share_of(0, gridDim.x, first < total_vectors ? min(part, total_vectors - first) : 0);
  for (uint32_t tile = share.first - warp_thread(); tile < share.end; tile += kTilesAtOnce * share.stride) {
    uint4 results[kTilesAtOnce];
#pragma unroll
    for (int j = 0; j < kTilesAtOnce; ++j) {
      const uint32_t i = min(tile + j * share.stride + warp_thread(), share.end - 1);
      // Past L1, which may hold what an earlier kernel read here.
      results[j] = sum_in_rank_order<T, kWorldSize>(world_size, [&](int source) {
        return load_weak(static_cast<const uint4*>(pull.inputs[source]) + first + i);
      });
    }
#pragma unroll
    for (int j = 0; j < kTilesAtOnce; ++j) {
      const uint32_t begin = tile + j * share.stride;
      if (begin >= share.end) continue;
      if (begin + warp_thread() < share.end) output(first + begin + warp_thread(), results[j]);
      sender.fill(results[j]);
#pragma unroll World < kWorldSize> ::kPeersAtOnce
      for (int step = 1; step < world_size; ++step)
        sender.send(World<kWorldSize>::kIsFixed ? kept[step] : flags.output_of(step), first + begin,
                    min(kTileVectors, share.end - begin));
      sender.close();
    }
  }
  sender.complete<0>();
  if (flags.tell(true)) flags.settle();
}

const Registration rows([] {
  add_exact_in_band(LAR_TWO_SHOT, LAR_PLACE, [](auto type, auto world, auto, auto add) {
    using T = typename decltype(type)::type;
    add(Form::kPull, two_shot_place_pull_kernel<T, decltype(world)::value>);
  });
});

}  // namespace
}  // namespace lar
