// ONESHOT: every rank stores its whole vector into a slot at every peer, then sums all slots itself.
//
// One communication step, (N-1) * payload bytes per link direction: the least latency, at a price in traffic
// that grows with the world size. Each lane works alone (device/lane.cuh).
//
// In band (device/in_band.cuh). Each thread, for each of its vectors:
//
//     push    store it into slot [generation][my rank] of every peer
//     reduce  poll the vectors of all ranks, clear them, sum in rank order, round once, store to the output
//
// A thread pushes `lead` vectors ahead of the one it reduces, so that the links stay busy while it waits. Why four
// generations: number a thread's vectors m = 0, 1, .., with K to a round. Before a peer pushes m, it has reduced m-lead-1.
// I cleared the slot of m when I reduced m-4K; behind that round, at m-3K-1 or earlier, came my fence, and what I pushed
// after it began with m-3K+lead at the latest. So the peer has taken something sent after the fence if
// m-3K+lead <= m-lead-1, which is how the host bounds the lead.
//
// Flagged, chunk by chunk with two chunks in flight:
//
//     step s:  push    chunk s      store my chunk into slot [round][my rank] of every peer, publish
//              reduce  chunk s-1    wait, sum the chunks of ranks 0..N-1 in that order, round once, store to the output
//
// Why four generations and no barrier at the end: push(s) overwrites chunk s-4. A peer publishes s-2 only after all its
// threads have reduced s-4 (program order and the barrier in publish()), and this lane has seen every peer publish s-2
// before it reduced that chunk, one step ago.
#include "device/in_band.cuh"
#include "device/lane.cuh"
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace lar {
namespace {

#ifndef LAR_PAUSE
#define LAR_PAUSE 0
#endif
constexpr int kPauseNs = LAR_PAUSE;

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_short_kernel(const __grid_constant__ InBandArguments arguments) {
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t index = blockIdx.x * arguments.chunk + threadIdx.x;
  const bool has_vector = threadIdx.x < arguments.chunk && index < total_vectors;
  let_next_kernel_start();
  wait_for_previous_kernel();

  // The two loads leave together; a thread without a vector loads one for nothing rather than branch.
  uint4 mine = load_vector(arguments.input, min(index, total_vectors - 1));
  const uint32_t epoch = epoch_of(arguments);
  mine = without_marker(mine);
  const uint32_t slot = slot_of_round(arguments, epoch) + threadIdx.x;
  if (has_vector) {
#pragma unroll
    for (int step = 1; step < kWorldSize; ++step) store_in_band(arguments.to[step], slot, mine);
  }
  advance_epoch(arguments, epoch);
  if (!has_vector) return;
  uint4 result;
  if (!poll_and_sum<T, kWorldSize, 0>(arguments, LAR_PHASE_GATHER, slot, mine, result)) return;
  static_cast<uint4*>(arguments.output)[index] = result;
}

// The vectors of one thread, in the order in which it handles them: through its chunk, then on to the next round.
struct Walk {
  uint32_t round;
  uint32_t first;  // of this lane in this round
  uint32_t i;      // within the chunk

  __device__ __forceinline__ explicit Walk(const InBandArguments& arguments)
      : round(0), first(blockIdx.x * arguments.chunk), i(threadIdx.x) {}

  // True when a new round begins.
  __device__ __forceinline__ bool advance(const InBandArguments& arguments) {
    i += blockDim.x;
    if (i < arguments.chunk) return false;
    i = threadIdx.x;
    first += gridDim.x * arguments.chunk;
    ++round;
    return true;
  }
};

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, kWorldSize <= 4 ? LAR_BLOCKS : 1)
    one_shot_in_band_kernel(const __grid_constant__ InBandArguments arguments) {
  const Payload<T> input(arguments.input, arguments.count);
  const Payload<T> output(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  const auto exists = [&](const Walk& at) {
    return at.i < arguments.chunk && at.round < arguments.rounds && at.first + at.i < total_vectors;
  };
  let_next_kernel_start();
  wait_for_previous_kernel();

  const uint32_t epoch = epoch_of(arguments);
  Walk ahead(arguments);
  const auto push = [&] {
    if (!exists(ahead)) return;
    const uint4 mine = without_marker(input.load(ahead.first + ahead.i));
    const uint32_t slot = slot_of_round(arguments, epoch + ahead.round) + ahead.i;
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) store_in_band(arguments.to[step], slot, mine);
    ahead.advance(arguments);
  };
#pragma unroll 1
  for (uint32_t i = 0; i < arguments.lead; ++i) push();
  advance_epoch(arguments, epoch);
  for (Walk at(arguments); exists(at);) {
    push();
    const uint4 mine = without_marker(input.load(at.first + at.i));
    uint4 result;
    const uint32_t slot = slot_of_round(arguments, epoch + at.round) + at.i;
    if (!poll_and_sum<T, kWorldSize, kPauseNs>(arguments, LAR_PHASE_GATHER, slot, mine, result)) return;
    output.store(at.first + at.i, result);
    if (at.advance(arguments) && arguments.rounds > 1) fence_between_rounds();
  }
}

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
  const int64_t chunks = ceil_div(total_vectors, chunk * gridDim.x);
  const auto first_of = [&](int64_t step) { return (step * gridDim.x + lane.index()) * chunk; };
  const auto span_of = [&](int64_t step) { return min(chunk, total_vectors - first_of(step)); };  // may be negative

  let_next_kernel_start();
  wait_for_previous_kernel();
  const uint32_t epoch = lane.epoch();
  const auto round_of = [&](int64_t step) { return epoch + static_cast<uint32_t>(step) + 1; };
  const auto slot = [&](int holder, int source, int64_t step) {
    return static_cast<char*>(workspace.base[holder]) + slot_offset(layout, layout.one_shot_offset,
                                                                    layout.one_shot_chunk_bytes,
                                                                    round_of(step) % LAR_SLOTS, source,
                                                                    lane.index());
  };

  for (int64_t step = 0; step <= chunks; ++step) {
    if (step < chunks) {
      // Peers in rotated order, so that no GPU is everyone's first target.
      char* slots[kWorldSize];
#pragma unroll
      for (int i = 1; i < kWorldSize; ++i) slots[i] = slot(rotated<kWorldSize>(rank, i), rank, step);
      const int64_t first = first_of(step);
      move_vectors(
          span_of(step), [&](int64_t i) { return input.load(first + i); },
          [&](int64_t i, const uint4& mine) {
#pragma unroll
            for (int peer = 1; peer < kWorldSize; ++peer) store_slot(slots[peer], i, mine);
          });
      lane.publish(FlagPlane::kOneShot, round_of(step));
    }
    if (step == 0) continue;
    if (!lane.wait(FlagPlane::kOneShot, LAR_PHASE_GATHER, round_of(step - 1))) return;
    const int64_t first = first_of(step - 1);
    sum_vectors<T, kWorldSize>(
        span_of(step - 1),
        [&](int source, int64_t i) {
          return source == rank ? input.load(first + i) : load_slot(slot(rank, source, step - 1), i);
        },
        [&](int64_t i, const uint4& result) { output.store(first + i, result); });
  }
  lane.finish(epoch + static_cast<uint32_t>(chunks));
}

template <typename T, int kWorldSize>
struct OneShot {
  static const void* kernel(Variant variant) {
    switch (variant) {
      case Variant::kFlagged:
        return reinterpret_cast<const void*>(one_shot_kernel<T, kWorldSize>);
      case Variant::kInBand:
        return reinterpret_cast<const void*>(one_shot_in_band_kernel<T, kWorldSize>);
      case Variant::kInBandShort:
        return reinterpret_cast<const void*>(one_shot_short_kernel<T, kWorldSize>);
    }
    return nullptr;
  }
};

}  // namespace
}  // namespace lar

extern "C" int lar_one_shot_cuda(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape,
                                 void* stream) {
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  const lar::Slots slots{LAR_ONE_SHOT, 1, layout.one_shot_offset, layout.one_shot_chunk_bytes, 0};
  return lar::launch<lar::OneShot>(workspace, message, shape, slots, stream);
}
