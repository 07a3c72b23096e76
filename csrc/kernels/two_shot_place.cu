// TWOSHOT that stores results straight into the outputs of all ranks, which lie in memory that peers see. The steps and
// what their flags stand for: protocol/place.h. Partials travel in band as in two_shot_push.cu.
//
// In large messages each lane does one of two things, both by bulk copies: the first ones scatter, the others reduce.
// Nobody takes results in, so that what two_shot_push.cu needs lanes for there, and slots, is free here.
#include "device/bulk_sender.cuh"
#include "device/instances.cuh"
#include "device/lane.cuh"
#include "device/place.cuh"
#include "device/two_shot_in_band.cuh"

namespace lar {
namespace {

// The flags of one lane in one call.
class PlaceFlags {
 public:
  __device__ __forceinline__ explicit PlaceFlags(const PlaceArguments& place)
      : lane_(place.workspace, place.in_band.limit, EpochPlane::kPlace), call_(lane_.epoch() + 1) {}

  // For all threads of the block, each of them.
  __device__ __forceinline__ void announce() const { lane_.publish(FlagPlane::kPlaceOutput, call_); }
  __device__ __forceinline__ bool admit() const { return lane_.wait(FlagPlane::kPlaceOutput, LAR_PHASE_OUTPUT, call_); }

  // `complete`: whether this thread has stored all its results. Peers hear nothing of a lane that has given up.
  __device__ __forceinline__ void settle(bool complete) const {
    if (!__syncthreads_and(complete)) return;
    lane_.publish(FlagPlane::kPlaceDone, call_);
    if (lane_.wait(FlagPlane::kPlaceDone, LAR_PHASE_GATHER, call_)) lane_.finish(call_);
  }

 private:
  const Lane<Roles::kWorkers> lane_;
  const uint32_t call_;
};

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_place_kernel(const __grid_constant__ PlaceArguments place) {
  const PushArguments<0>& arguments = place.in_band;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  constexpr int kAtOnce = World<kWorldSize>::kPeersAtOnce;
  const Payload<T> input(arguments.input, arguments.count);
  const AllOutputs<T, kWorldSize> outputs(place);
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
  for (uint32_t i = grid_thread(); i < part; i += stride) {
#pragma unroll 1
    for (int first = 1; first < world_size; first += kAtOnce) {
      uint4 partials[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (index(first + j, i) < total_vectors) partials[j] = input.load(index(first + j, i));
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (index(first + j, i) < total_vectors)
          store_in_band(arguments.to[first + j], slots + i, without_marker(partials[j]));
    }
  }
  advance_epoch(arguments, epoch);

  if (!flags.admit()) return;
  bool complete = true;
  for (uint32_t i = grid_thread(); complete && i < part && index(0, i) < total_vectors; i += stride) {
    const uint4 mine = without_marker(input.load(index(0, i)));
    uint4 result;
    complete = poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result);
    if (complete) outputs(index(0, i), result);
  }
  flags.settle(complete);
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
  const Store::Streamed output(place.outputs[0]);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
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
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step)
      sender.send(static_cast<char*>(place.outputs[step]), first + tile, min(kTileVectors, share.end - tile));
    sender.close();
  }
  sender.complete();
  flags.settle(complete);
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
