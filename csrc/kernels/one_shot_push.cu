// ONESHOT in band: every rank stores its whole vector into a slot at every peer, then sums all slots itself.
//
// One communication step, (N-1) * payload bytes per link direction: the least latency, at a price in traffic
// that grows with the world size. Each thread, for each of its vectors:
//
//     push    store it into my slot at every peer
//     reduce  poll the vectors of all ranks, clear them, sum in rank order, round once, hand the result to the sink
//
// Small messages have a vector to a thread. In larger ones, a thread pushes kLead vectors ahead of the one it reduces,
// so that the links stay busy while it waits; whole vectors by bulk copies (device/bulk_sender.cuh). In the largest,
// some lanes only push, by bulk copies too, and the others only reduce: few lanes are enough to fill the links, and
// those who poll had better be elsewhere.
#include "device/bulk_sender.cuh"
#include "device/in_band.cuh"
#include "device/instances.cuh"
#include "device/sink/store.cuh"

namespace lar {
namespace {

// Vectors on their way ahead of the one that a thread waits for.
constexpr int kLead = 2;

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_short_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t index = grid_thread();
  const bool has_vector = index < total_vectors;
  wait_for_previous_kernel();
  let_next_kernel_start();

  // The two loads leave together; a thread without a vector loads one for nothing rather than branch.
  uint4 mine = load_vector(arguments.input, min(index, total_vectors - 1));
  const uint32_t epoch = epoch_of(arguments);
  mine = without_marker(mine);
  const uint32_t slot = slots_of_call(arguments, epoch) + index;
  if (has_vector) {
#pragma unroll
    for (int step = 1; step < world_size; ++step) store_in_band(arguments.to[step], slot, mine);
  }
  advance_epoch(arguments, epoch);
  if (!has_vector) return;
  uint4 result;
  if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_GATHER, slot, mine, result)) return;
  typename Epilogue::Whole(arguments.output)(index, result);
}

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_push_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const Payload<T> input(arguments.input, arguments.count);
  const typename Epilogue::template Any<T> sink(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  uint32_t ahead = grid_thread();
  const auto push = [&] {
    if (ahead >= total_vectors) return;
    const uint4 mine = without_marker(input.load(ahead));
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step) store_in_band(arguments.to[step], slots + ahead, mine);
    ahead += grid_threads();
  };
#pragma unroll 1
  for (int i = 0; i < kLead; ++i) push();
  advance_epoch(arguments, epoch);
  for (uint32_t i = grid_thread(); i < total_vectors; i += grid_threads()) {
    push();
    const uint4 mine = without_marker(input.load(i));
    uint4 result;
    if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_GATHER, slots + i, mine, result)) return;
    sink(i, result);
  }
}

// Tiles that a warp has sent by bulk copies ahead of the one that it waits for; its own vectors of them stay in
// registers.
constexpr int kBulkLead = 4;
static_assert(kBulkLead < kTilesUnderWay, "so many must be in shared memory together with the next one");

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_bulk_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const typename Epilogue::Whole sink(arguments.output);
  // Vectors are dealt out as in one_shot_push_kernel: ranks whose tensors do not start on a vector run that one.
  const Share share = share_of(0, gridDim.x, total_vectors);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  LAR_BULK_SENDER_MEMORY(memory);
  BulkSender sender(memory);
  uint32_t ahead = share.first - warp_thread();
  const auto push = [&] {
    uint4 mine = {0u, 0u, 0u, 0u};
    if (ahead >= total_vectors) return mine;
    mine = without_marker(load_vector(arguments.input, min(ahead + warp_thread(), total_vectors - 1)));
    sender.fill(mine);
#pragma unroll World < kWorldSize> ::kPeersAtOnce
    for (int step = 1; step < world_size; ++step)
      sender.send(arguments.to[step], slots + ahead, min(kTileVectors, total_vectors - ahead));
    sender.close();
    ahead += share.stride;
    return mine;
  };
  uint4 sent[kBulkLead];
#pragma unroll
  for (int i = 0; i < kBulkLead; ++i) sent[i] = push();
  advance_epoch(arguments, epoch);
#pragma unroll 1
  for (uint32_t i = share.first; i - warp_thread() < total_vectors; i += share.stride) {
    const uint4 next = push();
    uint4 result;
    bool complete = true;
    if (i < total_vectors) {
      complete = poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_GATHER, slots + i, sent[0], result);
      if (complete) sink(i, result);
    }
    if (!__all_sync(0xffffffffu, complete)) return;
#pragma unroll
    for (int j = 0; j + 1 < kBulkLead; ++j) sent[j] = sent[j + 1];
    sent[kBulkLead - 1] = next;
  }
  sender.flush();
}

template <typename T, int kWorldSize, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_split_kernel(const __grid_constant__ PushArguments<kWorldSize> arguments) {
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t pushers = arguments.scatter_lanes;
  const typename Epilogue::Whole sink(arguments.output);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  advance_epoch(arguments, epoch);
  if (blockIdx.x < pushers) {
    LAR_BULK_SENDER_MEMORY(memory);
    push_in_bulk(arguments, memory, slots, total_vectors);
    return;
  }
  const Share share = share_of(pushers, gridDim.x - pushers, total_vectors);
  for (uint32_t i = share.first; i < share.end; i += share.stride) {
    const uint4 mine = without_marker(load_vector(arguments.input, i));
    uint4 result;
    if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_GATHER, slots + i, mine, result)) return;
    sink(i, result);
  }
}

const Registration rows([] {
  add_exact_in_band(LAR_ONE_SHOT, LAR_PUSH, [](auto type, auto world, auto epilogue, auto add) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add(Form::kShort, one_shot_short_kernel<T, kWorldSize, Epilogue>);
    add(Form::kAny, one_shot_push_kernel<T, kWorldSize, Epilogue>);
    add(Form::kBulk, one_shot_bulk_kernel<T, kWorldSize, Epilogue>);
    add(Form::kSplit, one_shot_split_kernel<T, kWorldSize, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
