// TWOSHOT: reduce-scatter, then all-gather, both by pushing. Two communication steps whatever the world size.
//
// Every rank owns 1/N of the vectors. 2 (N-1)/N * payload bytes per link direction: the least that an
// all-reduce without in-network reduction can move.
//
// In band (device/in_band.cuh). Each thread, on its vectors of every part:
//
//     scatter  store my partials into their owners' scatter slots
//     reduce   poll the partials of my part, clear them, sum ranks 0..N-1 in order, round once, store to the output and
//              to the gather slots of all peers
//     drain    one vector behind: poll the other owners' results, clear them, store them to the output
//
// A thread that does all three stores all its partials before it polls anything: when it comes to reduce its first
// vector, the links still have the last ones to carry. In large messages each lane does one of the three (one_shot.cu
// says why).
//
// Pulled, when the input lies in memory that peers can see: instead of the scatter, each lane tells its peers by a flag
// that the input is there, and owners read their parts in place. Results travel in band as above; once a rank has them
// all, all owners have read its input, which may then be overwritten.
//
// Published, where all workspaces lie in host memory: the scatter is as above, but results are stored once, and polled
// by all peers where they are (device/published.cuh).
//
// Flagged: device/two_shot_lane.cuh. Staged: device/staged_lane.cuh.
#include "device/in_band.cuh"
#include "device/lane.cuh"
#include "device/launch.cuh"
#include "device/outbox.cuh"
#include "device/published.cuh"
#include "device/staged_lane.cuh"
#include "device/two_shot_lane.cuh"
#include "device/vector.cuh"

namespace lar {
namespace {

// Vectors as they are.
template <typename T, int kWorldSize>
class Vectors {
 public:
  __device__ __forceinline__ static constexpr int unit_bytes() { return LAR_VECTOR_BYTES; }
  // As many as fit the registers of a thread.
  static constexpr int kOwnersAtOnce = kWorldSize < 5 ? kWorldSize - 1 : kWorldSize <= 8 ? 4 : 1;

  __device__ __forceinline__ explicit Vectors(const lar_message& message)
      : input_(message.input, message.count),
        output_(message.output, message.count),
        units_(ceil_div(message.count, Vector<T>::kElements)) {}

  __device__ __forceinline__ int64_t units() const { return units_; }

  template <int kCount>
  __device__ __forceinline__ void pack(const Piece (&parts)[kCount], char* const (&slots)[kCount]) const {
    move(
        parts, [&](int k, int64_t i) { return input_.load(parts[k].first + i); },
        [&](int k, int64_t i, const uint4& raw) { store_slot(slots[k], i, raw); });
  }

  template <typename Sources, typename Targets>
  __device__ __forceinline__ void reduce(const Piece& part, int rank, Sources source_of,
                                         Targets for_each_target) const {
    sum_vectors<T, kWorldSize>(
        part.span, Workers::workers(),
        [&](int source, int64_t i) {
          return source == rank ? input_.load(part.first + i) : load_slot(source_of(source), i);
        },
        [&](int64_t i, const uint4& result) {
          for_each_target([&](char* slot) { store_slot(slot, i, result); });
          output_.store(part.first + i, result);
        });
  }

  template <int kCount>
  __device__ __forceinline__ void unpack(const Piece (&parts)[kCount], char* const (&slots)[kCount]) const {
    move(
        parts, [&](int k, int64_t i) { return load_slot(slots[k], i); },
        [&](int k, int64_t i, const uint4& raw) { output_.store(parts[k].first + i, raw); });
  }

 private:
  using Workers = Lane<Crew::kWorkersAndCourier>;

  template <int kCount, typename Load, typename Store>
  __device__ __forceinline__ static void move(const Piece (&parts)[kCount], Load load, Store store) {
    int64_t spans[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) spans[k] = parts[k].span;
    move_vectors(spans, Workers::workers(), load, store);
  }

  const Payload<T> input_;
  const Payload<T> output_;
  const int64_t units_;
};

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kCourierThreads, 1)
    two_shot_kernel(const __grid_constant__ KernelArguments arguments) {
  const Vectors<T, kWorldSize> vectors(arguments.message);
  two_shot_lane<kWorldSize>(arguments.workspace, LAR_TWO_SHOT, vectors, arguments.chunk_vectors);
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_STAGED_THREADS + kCourierThreads, 1)
    two_shot_staged_kernel(const __grid_constant__ KernelArguments arguments) {
  const Vectors<T, kWorldSize> vectors(arguments.message);
  staged_lane(arguments.workspace, LAR_TWO_SHOT, vectors, arguments.chunk_vectors);
}

// Vector `i` of the part of the rank `step` places on, in the tensor; not below total_vectors if there is none.
template <int kWorldSize>
__device__ __forceinline__ uint32_t index_of(const InBandArguments& arguments, int step, uint32_t i) {
  return rotated<kWorldSize>(arguments.rank, step) * arguments.part + i;
}

// Polls vector `i` of all results (slots: the gather slots of this call), clears them and stores them to the output.
template <int kWorldSize, typename Store>
__device__ __forceinline__ bool drain(const InBandArguments& arguments, uint32_t slots, uint32_t total_vectors,
                                      uint32_t i, Store store) {
  constexpr int kAtOnce = kPeersAtOnce<kWorldSize>;
  static_assert((kWorldSize - 1) % kAtOnce == 0, "batches must tile the peers");
#pragma unroll 1
  for (int first = 1; first < kWorldSize; first += kAtOnce) {
    char* from[kAtOnce];
    bool wanted[kAtOnce];
    uint4 results[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const uint32_t at = slots + (first + j - 1) * arguments.peer_stride + i;
      from[j] = arguments.own + static_cast<int64_t>(at) * LAR_VECTOR_BYTES;
      wanted[j] = index_of<kWorldSize>(arguments, first + j, i) < total_vectors;
      results[j] = {0u, 0u, 0u, 0u};
    }
    if (!poll_until_complete(arguments.limit, LAR_PHASE_GATHER, from, wanted, results,
                             [&](int j) { return rotated<kWorldSize>(arguments.rank, first + j); }))
      return false;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      clear_in_band_if(wanted[j], from[j]);
      if (wanted[j]) store(index_of<kWorldSize>(arguments, first + j, i), results[j]);
    }
  }
  return true;
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_short_kernel(const __grid_constant__ InBandArguments arguments) {
  constexpr int kAtOnce = kPeersAtOnce<kWorldSize>;
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t i = grid_thread();
  const auto index = [&](int step) {
    return i < arguments.part ? index_of<kWorldSize>(arguments, step, i) : total_vectors;
  };
  const auto load = [&](int step) { return load_vector(arguments.input, min(index(step), total_vectors - 1)); };
  auto* output = static_cast<uint4*>(arguments.output);
  wait_for_previous_kernel();
  let_next_kernel_start();

  // All loads leave together; where there is no vector, one is loaded for nothing rather than branched around.
  uint4 partials[kAtOnce];
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) partials[j] = load(1 + j);
  uint4 mine = load(0);
  const uint32_t epoch = epoch_of(arguments);
  mine = without_marker(mine);
  const uint32_t slots = slots_of_call(arguments, epoch);
#pragma unroll 1
  for (int first = 1;;) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (index(first + j) < total_vectors)
        store_in_band(arguments.to[first + j], slots + i, without_marker(partials[j]));
    first += kAtOnce;
    if (first >= kWorldSize) break;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) partials[j] = load(first + j);
  }
  advance_epoch(arguments, epoch);
  if (i >= arguments.part) return;

  const uint32_t gather_slots = slots + arguments.gather_stride;
  if (index(0) < total_vectors) {
    uint4 result;
    if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result)) return;
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) store_in_band(arguments.to[step], gather_slots + i, result);
    output[index(0)] = result;
  }
  drain<kWorldSize>(arguments, gather_slots, total_vectors, i,
                    [&](uint32_t at, const uint4& result) { output[at] = result; });
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_in_band_kernel(const __grid_constant__ InBandArguments arguments) {
  constexpr int kAtOnce = kPeersAtOnce<kWorldSize>;
  const Payload<T> input(arguments.input, arguments.count);
  const Payload<T> output(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  const uint32_t part = arguments.part;
  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const uint32_t gather_slots = slots + arguments.gather_stride;
  const uint32_t stride = grid_threads();
  for (uint32_t i = grid_thread(); i < part; i += stride) {
#pragma unroll 1
    for (int first = 1; first < kWorldSize; first += kAtOnce) {
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

  for (uint32_t i = grid_thread(); i < part + stride; i += stride) {
    if (i < part && index(0, i) < total_vectors) {
      const uint4 mine = without_marker(input.load(index(0, i)));
      uint4 result;
      if (!poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result)) return;
#pragma unroll kPeersAtOnce < kWorldSize>
      for (int step = 1; step < kWorldSize; ++step) store_in_band(arguments.to[step], gather_slots + i, result);
      output.store(index(0, i), result);
    }
    if (i >= stride && !drain<kWorldSize>(arguments, gather_slots, total_vectors, i - stride,
                                          [&](uint32_t at, const uint4& result) { output.store(at, result); }))
      return;
  }
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_split_kernel(const __grid_constant__ InBandArguments arguments) {
  constexpr int kAtOnce = kPeersAtOnce<kWorldSize>;
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t part = arguments.part;
  const uint32_t scatterers = arguments.scatter_lanes;
  const uint32_t drainers = arguments.drain_lanes;
  const uint32_t reducers = gridDim.x - scatterers - drainers;
  auto* output = static_cast<uint4*>(arguments.output);  // stored as a stream: the caches are for the slots
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const uint32_t gather_slots = slots + arguments.gather_stride;
  advance_epoch(arguments, epoch);
  LAR_OUTBOX_MEMORY(memory);
  Outbox outbox(memory);
  if (blockIdx.x < scatterers) {
    const Share share = share_of(0, scatterers, part);
    for (uint32_t tile = share.first - lane_of_warp(); tile < share.end; tile += share.stride) {
#pragma unroll 1
      for (int first = 1; first < kWorldSize; first += kAtOnce) {
        uint4 partials[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const uint32_t index = index_of<kWorldSize>(arguments, first + j, tile) + lane_of_warp();
          partials[j] = load_vector(arguments.input, min(index, total_vectors - 1));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const uint32_t index = index_of<kWorldSize>(arguments, first + j, tile);
          if (index >= total_vectors) continue;
          outbox.fill(without_marker(partials[j]));
          outbox.send(arguments.to[first + j], slots + tile,
                      min(min(kTileVectors, part - tile), total_vectors - index));
          outbox.close();
        }
      }
    }
    outbox.flush();
    return;
  }
  if (blockIdx.x < scatterers + reducers) {
    const uint32_t first = arguments.rank * part;
    const Share share = share_of(scatterers, reducers, first < total_vectors ? min(part, total_vectors - first) : 0);
    for (uint32_t tile = share.first - lane_of_warp(); tile < share.end; tile += share.stride) {
      const uint32_t i = tile + lane_of_warp();
      uint4 result = {0u, 0u, 0u, 0u};
      bool complete = true;
      if (i < share.end) {
        const uint4 mine = without_marker(load_vector(arguments.input, first + i));
        complete = poll_and_sum<T, kWorldSize>(arguments, LAR_PHASE_SCATTER, slots + i, mine, result);
        if (complete) __stcs(&output[first + i], result);
      }
      if (!__all_sync(0xffffffffu, complete)) return;
      outbox.fill(result);
#pragma unroll kPeersAtOnce < kWorldSize>
      for (int step = 1; step < kWorldSize; ++step)
        outbox.send(arguments.to[step], gather_slots + tile, min(kTileVectors, share.end - tile));
      outbox.close();
    }
    outbox.flush();
    if (drainers > 0) return;
  }
  const Share share =
      drainers > 0 ? share_of(scatterers + reducers, drainers, part) : share_of(scatterers, reducers, part);
  for (uint32_t i = share.first; i < share.end; i += share.stride)
    if (!drain<kWorldSize>(arguments, gather_slots, total_vectors, i,
                           [&](uint32_t at, const uint4& result) { __stcs(&output[at], result); }))
      return;
}

struct PullArguments {
  InBandArguments in_band;
  lar_workspace workspace;
  const void* inputs[LAR_MAX_WORLD_SIZE];
};

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1) two_shot_pull_kernel(const __grid_constant__ PullArguments pull) {
  const InBandArguments& arguments = pull.in_band;
  const uint32_t total_vectors = static_cast<uint32_t>(arguments.count / Vector<T>::kElements);
  const uint32_t part = arguments.part;
  const uint32_t stride = grid_threads();
  auto* output = static_cast<uint4*>(arguments.output);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t gather_slots = slots_of_call(arguments, epoch) + arguments.gather_stride;
  // The kernels that wrote the input have ended: the release makes what they wrote visible with the flag.
  const Lane<Crew::kWorkers> lane(pull.workspace, EpochPlane::kPull, LAR_TWO_SHOT_PULL);
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
          [&](int source) { return load_weak(static_cast<const uint4*>(pull.inputs[source]) + index); });
#pragma unroll kPeersAtOnce < kWorldSize>
      for (int step = 1; step < kWorldSize; ++step) store_in_band(arguments.to[step], gather_slots + i, result);
      output[index] = result;
    }
    if (i >= stride && !drain<kWorldSize>(arguments, gather_slots, total_vectors, i - stride,
                                          [&](uint32_t at, const uint4& result) { output[at] = result; }))
      return;
  }
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kCourierThreads, 1)
    two_shot_published_kernel(const __grid_constant__ PublishedArguments published) {
  constexpr int kAtOnce = kPeersAtOnce<kWorldSize>;
  const InBandArguments& arguments = published.in_band;
  const Payload<T> input(arguments.input, arguments.count);
  const Payload<T> output(arguments.output, arguments.count);
  const uint32_t total_vectors = static_cast<uint32_t>(ceil_div(arguments.count, Vector<T>::kElements));
  const uint32_t part = arguments.part;
  const auto index = [&](int step, uint32_t i) { return index_of<kWorldSize>(arguments, step, i); };
  wait_for_previous_kernel();
  let_next_kernel_start();

  Publication publication(published);
  const uint32_t slots = publication.scatter_slots();
  const uint32_t start = publication.is_courier() ? part : publication.worker();
  const uint32_t stride = publication.workers();
  for (uint32_t i = start; i < part; i += stride)
#pragma unroll kAtOnce
    for (int step = 1; step < kWorldSize; ++step)
      if (index(step, i) < total_vectors)
        store_in_band(arguments.to[step], slots + i, without_marker(input.load(index(step, i))));
  publication.count_call(part);
  if (publication.is_courier()) return publication.settle_clears();

  for (uint32_t i = start; i < part && index(0, i) < total_vectors; i += stride) {
    const uint4 mine = without_marker(input.load(index(0, i)));
    uint4 result;
    const auto address_of = [&](int peer) {
      const uint32_t at = slots + i + slot_of_peer<kWorldSize>(arguments, peer);
      return arguments.own + int64_t{at} * LAR_VECTOR_BYTES;
    };
    if (!poll_and_sum_at<T, kWorldSize, false>(arguments, LAR_PHASE_SCATTER, address_of, mine, result)) return;
    publication.store(i, result);
    output.store(index(0, i), result);
  }
  publication.clear_old_generation<kWorldSize>(true);
  for (uint32_t i = start; i < part; i += stride) {
#pragma unroll 1
    for (int first = 1; first < kWorldSize; first += kAtOnce) {
      char* from[kAtOnce];
      bool wanted[kAtOnce];
      uint4 results[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        from[j] = publication.vector(rotated<kWorldSize>(arguments.rank, first + j), i);
        wanted[j] = index(first + j, i) < total_vectors;
        results[j] = {0u, 0u, 0u, 0u};
      }
      if (!poll_until_complete(arguments.limit, LAR_PHASE_GATHER, from, wanted, results,
                               [&](int j) { return rotated<kWorldSize>(arguments.rank, first + j); }))
        return;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (wanted[j]) output.store(index(first + j, i), results[j]);
    }
  }
}

template <typename T, int kWorldSize>
struct TwoShot {
  static const void* kernel(Variant variant) {
    switch (variant) {
      case Variant::kFlagged:
        return kernel_address(two_shot_kernel<T, kWorldSize>);
      case Variant::kInBand:
        return kernel_address(two_shot_in_band_kernel<T, kWorldSize>);
      case Variant::kInBandShort:
        return kernel_address(two_shot_short_kernel<T, kWorldSize>);
      case Variant::kInBandSplit:
        return kernel_address(two_shot_split_kernel<T, kWorldSize>);
      case Variant::kPull:
        return kernel_address(two_shot_pull_kernel<T, kWorldSize>);
      case Variant::kPublished:
        return kernel_address(two_shot_published_kernel<T, kWorldSize>);
      case Variant::kStaged:
        if constexpr (kWorldSize > 2) return kernel_address(two_shot_staged_kernel<T, kWorldSize>);
        return nullptr;
    }
    return nullptr;
  }
};

InBandSlots in_band_slots(const lar_layout& layout) {
  return {LAR_TWO_SHOT,
          EpochPlane::kTwoShotInBand,
          layout.world_size,
          layout.in_band.scatter_offset,
          layout.in_band.two_shot_bytes,
          layout.in_band.gather_offset};
}

}  // namespace

int load_two_shot_kernels(int world_size) { return load_kernels<TwoShot>(world_size); }

}  // namespace lar

extern "C" int lar_two_shot_cuda(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape,
                                 void* stream) {
  using namespace lar;
  if (!workspace || !message || !shape) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  if (shape->in_band && layout.published) {
    const void* kernel = select_kernel<TwoShot>(message->dtype, layout.world_size, Variant::kPublished);
    return launch_published(kernel, *workspace, *message, *shape, in_band_slots(layout), layout.in_band.gather_offset,
                            ExtentPlane::kTwoShot, elements_of_round(*message, *shape, layout.world_size), stream);
  }
  if (shape->in_band) return launch_in_band<TwoShot>(*workspace, *message, *shape, in_band_slots(layout), stream);
  const Variant variant = shape->staged ? Variant::kStaged : Variant::kFlagged;
  const void* kernel = select_kernel<TwoShot>(message->dtype, layout.world_size, variant);
  if (shape->staged) return launch_staged(kernel, *workspace, *message, *shape, stream);
  return launch_flagged(kernel, *workspace, *message, *shape, layout.flagged.two_shot_bytes, stream);
}

extern "C" int lar_two_shot_pull_cuda(const lar_workspace* workspace, const lar_message* message,
                                      const void* const* inputs, const lar_launch* shape, void* stream) {
  using namespace lar;
  if (!workspace || !inputs) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  const InBandSlots slots = in_band_slots(layout);
  const int status = check_call(workspace, message, shape, slots.slot_bytes);
  if (status != LAR_OK || message->count == 0) return status;
  bool whole = shape->in_band && ends_on_a_vector(*message) && starts_on_a_vector(message->output);
  for (int rank = 0; rank < layout.world_size; ++rank) whole &= inputs[rank] && starts_on_a_vector(inputs[rank]);
  if (!whole) return LAR_ERROR_INVALID_ARGUMENT;
  const void* kernel = select_kernel<TwoShot>(message->dtype, layout.world_size, Variant::kPull);
  return in_rounds(*message, *shape, slots.parts, [&](const lar_message& round, int64_t offset) {
    PullArguments arguments{in_band_arguments(*workspace, round, *shape, slots), *workspace, {}};
    for (int rank = 0; rank < layout.world_size; ++rank)
      arguments.inputs[rank] = static_cast<const char*>(inputs[rank]) + offset;
    return launch_kernel(kernel, *shape, may_start_early(*workspace), &arguments, stream);
  });
}
