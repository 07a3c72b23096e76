// TWOSHOT that stores results straight into the outputs of all ranks, which lie in memory that peers see. The steps and
// what their flags stand for: protocol/place.h. Partials travel in band as in two_shot_push.cu.
//
// In large messages each lane does one of two things, both by bulk copies: the first ones scatter, the others reduce.
// Flags cost two flights at the end: until the results have been written, and of the flag itself. So the last tile of
// each warp that reduces travels in band, through the gather slots of two_shot_push.cu, and fills that time.
#include "device/bulk_sender.cuh"
#include "device/instances.cuh"
#include "device/place.cuh"
#include "device/two_shot_in_band.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_place_kernel(const __grid_constant__ PlaceArguments place) {
  const PushArguments<0>& arguments = place.in_band;
  const Payload<T> input(arguments.input, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  const uint32_t part = arguments.part;
  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };
  wait_for_previous_kernel();
  let_next_kernel_start();

  const PlaceFlags flags(place);
  flags.announce();
  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const uint32_t stride = grid_threads();
  scatter<kWorldSize>(arguments, input, slots, total_vectors);
  advance_epoch(arguments, epoch);

  if (!flags.admit()) return;
  LAR_BLOCK_ARRAY(char*, addresses, LAR_MAX_WORLD_SIZE);
  const AllOutputs<T, kWorldSize> outputs(flags, arguments, addresses);
  bool complete = true;
  for (uint32_t i = grid_thread(); complete && i < part && index(0, i) < total_vectors; i += stride) {
    const uint4 mine = without_marker(input.load(index(0, i)));
    uint4 result;
    complete = poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result);
    if (complete) outputs(index(0, i), result);
  }
  if (flags.tell(complete)) flags.settle();
}

// The last tile of this warp, whose first one is `tile`, in a part of so many vectors; ~0: it has none.
__device__ __forceinline__ uint32_t last_tile(uint32_t tile, uint32_t stride, uint32_t vectors) {
  return tile < vectors ? tile + (vectors - 1 - tile) / stride * stride : ~0u;
}

// Takes in the last tile of each owner's lane of this number.
template <int kWorldSize>
__device__ __forceinline__ bool drain_last(const PushArguments<0>& arguments, uint32_t slots, uint32_t total_vectors,
                                           uint32_t tile, uint32_t stride, const Store::Streamed& output) {
  constexpr int kAtOnce = World<kWorldSize>::kPeersAtOnce;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
#pragma unroll 1
  for (int first = 1; first < world_size; first += kAtOnce) {
    char* from[kAtOnce];
    bool wanted[kAtOnce];
    uint32_t index[kAtOnce];
    uint4 results[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const uint32_t begin = index_of<kWorldSize>(arguments, first + j, 0);
      const uint32_t vectors = begin < total_vectors ? min(arguments.part, total_vectors - begin) : 0;
      const uint32_t last = last_tile(tile, stride, vectors);
      const uint32_t i = last + warp_thread();
      wanted[j] = last != ~0u && i < vectors;
      index[j] = begin + i;
      const uint32_t at = slots + slot_of_step(first + j) * arguments.peer_stride + (wanted[j] ? i : 0);
      from[j] = arguments.own + static_cast<int64_t>(at) * LAR_VECTOR_BYTES;
      results[j] = {0u, 0u, 0u, 0u};
    }
    if (!poll_until_complete(arguments.limit, LAR_PHASE_GATHER, from, wanted, results,
                             [&](int j) { return rotated(arguments.rank, first + j, world_size); }))
      return false;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      clear_in_band_if(wanted[j], from[j]);
      if (wanted[j]) output(index[j], results[j]);
    }
  }
  return true;
}

// Whole aligned vectors.
template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_place_split_kernel(const __grid_constant__ PlaceArguments place) {
  const PushArguments<0>& arguments = place.in_band;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t part = arguments.part;
  const uint32_t scatterers = arguments.scatter_lanes;
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
  const PlaceFlags flags(place);
  flags.announce();
  if (!flags.admit()) return;
  char* kept[World<kWorldSize>::kRanksAtOnce];  // of any number of ranks, those of the first
#pragma unroll
  for (int step = 0; step < World<kWorldSize>::kRanksAtOnce; ++step)
    kept[step] = flags.output_of(step < world_size ? step : 0);
  const Store::Streamed output(kept[0]);
  const uint32_t first = arguments.rank * part;
  const Share share =
      share_of(scatterers, gridDim.x - scatterers, first < total_vectors ? min(part, total_vectors - first) : 0);
  bool complete = true;
  for (uint32_t tile = share.first - warp_thread(); complete && tile < share.end; tile += share.stride) {
    const uint32_t i = tile + warp_thread();
    uint4 result = {0u, 0u, 0u, 0u};
    if (i < share.end) {
      const uint4 mine = without_marker(load_vector(arguments.input, first + i));
      complete = poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result);
      if (complete) output(first + i, result);
    }
    complete = __all_sync(0xffffffffu, complete);
    if (!complete) break;
    sender.fill(result);
    const uint32_t vectors = min(kTileVectors, share.end - tile);
    const bool is_last = share.end - tile <= share.stride;
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step) {
      if (is_last) {
        sender.send(arguments.to[step], gather_slots + tile, vectors);
      } else {
        sender.send(World<kWorldSize>::kIsFixed ? kept[step] : flags.output_of(step), first + tile, vectors);
      }
    }
    sender.close();
  }
  sender.complete<1>();
  if (!flags.tell(complete)) return;
  complete =
      drain_last<kWorldSize>(arguments, gather_slots, total_vectors, share.first - warp_thread(), share.stride, output);
  sender.flush();
  if (__syncthreads_and(complete)) flags.settle();
}

const Registration rows([] {
  add_exact_in_band(LAR_TWO_SHOT, LAR_PLACE, [](auto type, auto world, auto, auto add) {
    using T = typename decltype(type)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add(Form::kAny, two_shot_place_kernel<T, kWorldSize>);
    add(Form::kSplit, two_shot_place_split_kernel<T, kWorldSize>);
  });
});

}  // namespace
}  // namespace lar
