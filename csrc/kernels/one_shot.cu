// ONESHOT: every rank stores its whole vector into a slot at every peer, then sums all slots itself.
//
// One communication step, (N-1) * payload bytes per link direction: the least latency, at a price in traffic
// that grows with the world size. Each lane works alone (device/lane.cuh).
//
// In band (device/in_band.cuh), for messages that fit the slots at once:
//
//     store my vectors into slot [generation][my rank] of every peer
//     clear what the lane read in its previous call, while the stores fly
//     poll the vectors of all ranks, sum them in rank order, round once, store to the output
//
// Why three generations: call e clears what was read in call e-1, and a peer next writes there in call e+2. That peer
// has then ended call e+1, so it has my vectors of e+1, which I sent after call e, clears included, had ended. With
// two, it would write in call e+1 already, knowing no more than that I had sent call e.
//
// Flagged, for any size, in rounds of at most one chunk:
//
//     store my chunk into slot [generation][my rank] of every peer
//     publish the round, wait until every peer has published it
//     sum the chunks of ranks 0..N-1 in that order, round once, store to the output
//
// Why two generations and no barrier at the end: a peer publishes round e only after all its threads have read the
// slots of round e-1 (program order and the barrier in publish()). So once the wait of round e returns, nobody reads
// generation e-1 any more, and round e+1 may overwrite it.
#include "device/in_band.cuh"
#include "device/lane.cuh"
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_kernel(const __grid_constant__ KernelArguments arguments) {
  const lar_workspace& workspace = arguments.workspace;
  const lar_layout& layout = workspace.layout;
  const int rank = workspace.rank;
  const Lane lane(workspace, LAR_ONE_SHOT);
  const Payload<T> input(arguments.message.input, arguments.message.count);
  const Payload<T> output(arguments.message.output, arguments.message.count);

  const int64_t total_vectors = ceil_div(arguments.message.count, Vector<T>::kElements);
  const int64_t chunk = arguments.chunk_vectors;
  const int64_t stride = chunk * gridDim.x;

  wait_for_previous_kernel();
  let_next_kernel_start();
  uint32_t round = lane.epoch();
  for (int64_t start = 0; start < total_vectors; start += stride) {
    ++round;
    const int generation = round % LAR_ONE_SHOT_SLOTS;
    const int64_t first = start + chunk * lane.index();
    const int64_t span = min(chunk, total_vectors - first);  // negative when this lane has no share

    // Peers in rotated order, so that no GPU is everyone's first target.
    char* slots[kWorldSize];
#pragma unroll
    for (int step = 1; step < kWorldSize; ++step) {
      const int peer = (rank + step) % kWorldSize;
      slots[step] =
          static_cast<char*>(workspace.base[peer]) +
          slot_offset(layout, layout.one_shot_offset, layout.one_shot_chunk_bytes, generation, rank, lane.index());
    }
    for (int64_t i = threadIdx.x; i < span; i += blockDim.x) {
      const uint4 mine = input.load(first + i);
#pragma unroll
      for (int step = 1; step < kWorldSize; ++step) store_slot(slots[step], i, mine);
    }

    lane.publish(FlagPlane::kOneShot, round);
    if (!lane.wait(FlagPlane::kOneShot, LAR_PHASE_GATHER, round)) return;

    const char* own = static_cast<const char*>(workspace.base[rank]);
    for (int64_t i = threadIdx.x; i < span; i += blockDim.x) {
      const uint4 result = sum_in_rank_order<T, kWorldSize>([&](int source) {
        const int64_t slot =
            slot_offset(layout, layout.one_shot_offset, layout.one_shot_chunk_bytes, generation, source, lane.index());
        return source == rank ? input.load(first + i) : load_slot(own + slot, i);
      });
      output.store(first + i, result);
    }
  }
  lane.finish(round);
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_in_band_kernel(const __grid_constant__ KernelArguments arguments) {
  const lar_workspace& workspace = arguments.workspace;
  const int64_t region = workspace.layout.one_shot_in_band_offset;
  const int64_t chunk_bytes = workspace.layout.one_shot_in_band_chunk_bytes;
  const int rank = workspace.rank;
  const Payload<T> input(arguments.message.input, arguments.message.count);
  const Payload<T> output(arguments.message.output, arguments.message.count);
  const int64_t total_vectors = ceil_div(arguments.message.count, Vector<T>::kElements);

  const InBandLane lane(workspace, LAR_ONE_SHOT);
  const int64_t first = arguments.chunk_vectors * lane.index();
  const int64_t span = min(arguments.chunk_vectors, total_vectors - first);
  const int generation = lane.generation(LAR_ONE_SHOT_IN_BAND_SLOTS);

  wait_for_previous_kernel();
  for (int64_t i = threadIdx.x; i < span; i += blockDim.x) {
    const uint4 mine = without_marker(input.load(first + i));
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step)
      store_in_band(lane.slot((rank + step) % kWorldSize, region, chunk_bytes, generation, rank), i, mine);
  }
  lane.clear_previous<kWorldSize>(region, chunk_bytes, LAR_ONE_SHOT_IN_BAND_SLOTS);
  lane.hand_over(arguments.chunk_vectors);
  for (int64_t i = threadIdx.x; i < span; i += blockDim.x) {
    const uint4 mine = without_marker(input.load(first + i));
    uint4 result;
    const auto part = [&](int source) {
      return source == rank ? mine : load_in_band(lane.slot(rank, region, chunk_bytes, generation, source), i);
    };
    if (!poll_and_sum<T, kWorldSize>(lane, workspace, LAR_PHASE_GATHER, part, result)) return;
    output.store(first + i, result);
  }
}

template <typename T, int kWorldSize>
struct OneShot {
  static Kernel kernel(bool in_band) {
    return in_band ? one_shot_in_band_kernel<T, kWorldSize> : one_shot_kernel<T, kWorldSize>;
  }
};

}  // namespace
}  // namespace lar

extern "C" int lar_one_shot_cuda(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape,
                                 void* stream) {
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  return lar::launch<lar::OneShot>(workspace, message, shape, 1, workspace->layout.one_shot_chunk_bytes,
                                   workspace->layout.one_shot_in_band_chunk_bytes, stream);
}
