// ONESHOT: every rank stores its whole vector into a slot at every peer, then sums all slots itself.
//
// One communication step, (N-1) * payload bytes per link direction: the least latency, at a price in traffic
// that grows with the world size.
//
// In band (device/in_band.cuh). Each thread, for each of its vectors:
//
//     push    store it into my slot at every peer
//     reduce  poll the vectors of all ranks, clear them, sum in rank order, round once, store to the output
//
// Small messages have a vector to a thread. In larger ones, a thread pushes kLead vectors ahead of the one it reduces,
// so that the links stay busy while it waits. In the largest, some lanes only push, by bulk copies (device/outbox.cuh),
// and the others only reduce: few lanes are enough to fill the links, and those who poll had better be elsewhere.
//
// Published, where all workspaces lie in host memory: device/published.cuh.
//
// Flagged, each lane alone (device/lane.cuh), chunk by chunk with two chunks in flight:
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
#include "device/outbox.cuh"
#include "device/published.cuh"
#include "device/vector.cuh"

namespace lar {
namespace {

// Vectors on their way ahead of the one that a thread waits for.
constexpr int kLead = 2;

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_short_kernel(const __grid_constant__ InBandArguments arguments) {
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
    for (int step = 1; step < kWorldSize; ++step) store_in_band(arguments.to[step], slot, mine);
  }
  advance_epoch(arguments, epoch);
  if (!has_vector) return;
  uint4 result;
  if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_GATHER, slot, mine, result)) return;
  static_cast<uint4*>(arguments.output)[index] = result;
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_in_band_kernel(const __grid_constant__ InBandArguments arguments) {
  const Payload<T> input(arguments.input, arguments.count);
  const Payload<T> output(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  uint32_t ahead = grid_thread();
  const auto push = [&] {
    if (ahead >= total_vectors) return;
    const uint4 mine = without_marker(input.load(ahead));
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) store_in_band(arguments.to[step], slots + ahead, mine);
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
    output.store(i, result);
  }
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_split_kernel(const __grid_constant__ InBandArguments arguments) {
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t pushers = arguments.scatter_lanes;
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  advance_epoch(arguments, epoch);
  if (blockIdx.x < pushers) {
    LAR_OUTBOX_MEMORY(memory);
    Outbox outbox(memory);
    const Share share = share_of(0, pushers, total_vectors);
    for (uint32_t tile = share.first - lane_of_warp(); tile < share.end; tile += share.stride) {
      const uint4 mine = load_vector(arguments.input, min(tile + lane_of_warp(), total_vectors - 1));
      outbox.fill(without_marker(mine));
#pragma unroll kPeersAtOnce < kWorldSize>
      for (int step = 1; step < kWorldSize; ++step)
        outbox.send(arguments.to[step], slots + tile, min(kTileVectors, share.end - tile));
      outbox.close();
    }
    outbox.flush();
    return;
  }
  const Share share = share_of(pushers, gridDim.x - pushers, total_vectors);
  for (uint32_t i = share.first; i < share.end; i += share.stride) {
    const uint4 mine = without_marker(load_vector(arguments.input, i));
    uint4 result;
    if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_GATHER, slots + i, mine, result)) return;
    static_cast<uint4*>(arguments.output)[i] = result;
  }
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kCourierThreads, 1)
    one_shot_kernel(const __grid_constant__ KernelArguments arguments) {
  const lar_workspace& workspace = arguments.workspace;
  const lar_layout& layout = workspace.layout;
  const int rank = workspace.rank;
  const Lane<Crew::kWorkersAndCourier> lane(workspace, EpochPlane::kOneShot, LAR_ONE_SHOT);
  lane.start();
  const Payload<T> input(arguments.message.input, arguments.message.count);
  const Payload<T> output(arguments.message.output, arguments.message.count);

  const int64_t total_vectors = ceil_div(arguments.message.count, Vector<T>::kElements);
  const int64_t chunk = arguments.chunk_vectors;
  const int64_t chunks = ceil_div(total_vectors, chunk * gridDim.x);
  const auto first_of = [&](int64_t step) { return (step * gridDim.x + lane.index()) * chunk; };
  const auto span_of = [&](int64_t step) { return min(chunk, total_vectors - first_of(step)); };  // may be negative

  const uint32_t epoch = lane.epoch();
  const auto round_of = [&](int64_t step) { return epoch + static_cast<uint32_t>(step) + 1; };
  const auto slot = [&](int reader, int source, int64_t step) {
    return flagged_slot(workspace, layout.flagged.one_shot_offset, layout.flagged.one_shot_bytes,
                        round_of(step) % LAR_SLOTS, reader, source, lane.index(), true);
  };
  const int copies = shared_copies(layout);
  constexpr bool kKeepsAddresses = kWorldSize <= 8;  // of the slots; those of 16 would not fit the registers
  if (lane.is_courier()) {
    for (int64_t step = 0; step < chunks; ++step)
      if (!lane.deliver(FlagPlane::kOneShot, round_of(step))) return;
    lane.finish(epoch + static_cast<uint32_t>(chunks));
    return;
  }

  for (int64_t step = 0; step <= chunks; ++step) {
    if (step < chunks) {
      // Peers in rotated order, so that no GPU is everyone's first target.
      const auto slot_of_step = [&](int peer) { return slot(rotated<kWorldSize>(rank, peer), rank, step); };
      char* slots[kWorldSize];
      if (kKeepsAddresses) {
#pragma unroll
        for (int peer = 1; peer < kWorldSize; ++peer) slots[peer] = slot_of_step(peer);
      }
      const int64_t first = first_of(step);
      const int64_t spans[] = {span_of(step)};
      move_vectors(
          spans, lane.workers(), [&](int, int64_t i) { return input.load(first + i); },
          [&](int, int64_t i, const uint4& mine) {
#pragma unroll
            for (int peer = 1; peer < kWorldSize; ++peer)
              if (peer <= copies) store_slot(kKeepsAddresses ? slots[peer] : slot_of_step(peer), i, mine);
          });
      lane.publish(FlagPlane::kOneShot, round_of(step));
    }
    if (step == 0) continue;
    if (!lane.wait(FlagPlane::kOneShot, LAR_PHASE_GATHER, round_of(step - 1))) return;
    const int64_t first = first_of(step - 1);
    sum_vectors<T, kWorldSize>(
        span_of(step - 1), lane.workers(),
        [&](int source, int64_t i) {
          return source == rank ? input.load(first + i) : load_slot(slot(rank, source, step - 1), i);
        },
        [&](int64_t i, const uint4& result) { output.store(first + i, result); });
  }
  lane.finish(epoch + static_cast<uint32_t>(chunks));
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kCourierThreads, 1)
    one_shot_published_kernel(const __grid_constant__ PublishedArguments published) {
  const InBandArguments& arguments = published.in_band;
  const Payload<T> input(arguments.input, arguments.count);
  const Payload<T> output(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  wait_for_previous_kernel();
  let_next_kernel_start();

  Publication publication(published);
  const uint32_t first = publication.is_courier() ? total_vectors : publication.worker();
  const uint32_t stride = publication.workers();
  for (uint32_t i = first; i < total_vectors; i += stride) publication.store(i, without_marker(input.load(i)));
  publication.count_call(total_vectors);
  if (publication.is_courier()) return publication.settle_clears();
  publication.clear_old_generation<kWorldSize>(false);

  for (uint32_t i = first; i < total_vectors; i += stride) {
    const uint4 mine = without_marker(input.load(i));
    uint4 result;
    const auto address_of = [&](int peer) { return publication.vector(peer, i); };
    if (!poll_and_sum_at<T, kWorldSize, false>(arguments, LAR_PHASE_GATHER, address_of, mine, result)) return;
    output.store(i, result);
  }
}

template <typename T, int kWorldSize>
struct OneShot {
  static const void* kernel(Variant variant) {
    switch (variant) {
      case Variant::kFlagged:
        return kernel_address(one_shot_kernel<T, kWorldSize>);
      case Variant::kInBand:
        return kernel_address(one_shot_in_band_kernel<T, kWorldSize>);
      case Variant::kInBandShort:
        return kernel_address(one_shot_short_kernel<T, kWorldSize>);
      case Variant::kInBandSplit:
        return kernel_address(one_shot_split_kernel<T, kWorldSize>);
      case Variant::kPublished:
        return kernel_address(one_shot_published_kernel<T, kWorldSize>);
      case Variant::kPull:
        break;  // a step more than ONESHOT has: its readers must say when they have read
      case Variant::kStaged:
        break;  // it sends so much more than TWOSHOT that it is not for messages that large
    }
    return nullptr;
  }
};

}  // namespace

int load_one_shot_kernels(int world_size) { return load_kernels<OneShot>(world_size); }

}  // namespace lar

extern "C" int lar_one_shot_cuda(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape,
                                 void* stream) {
  using namespace lar;
  if (!workspace || !message || !shape || shape->staged) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  if (!shape->in_band) {
    const void* kernel = select_kernel<OneShot>(message->dtype, layout.world_size, Variant::kFlagged);
    return launch_flagged(kernel, *workspace, *message, *shape, layout.flagged.one_shot_bytes, stream);
  }
  const InBandSlots slots{
      LAR_ONE_SHOT, EpochPlane::kOneShotInBand, 1, layout.in_band.one_shot_offset, layout.in_band.one_shot_bytes, 0};
  if (!layout.published) return launch_in_band<OneShot>(*workspace, *message, *shape, slots, stream);
  const void* kernel = select_kernel<OneShot>(message->dtype, layout.world_size, Variant::kPublished);
  return launch_published(kernel, *workspace, *message, *shape, slots, slots.offset, ExtentPlane::kOneShot,
                          elements_of_round(*message, *shape, slots.parts), stream);
}
