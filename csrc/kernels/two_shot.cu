// TWOSHOT: reduce-scatter, then all-gather, both by pushing. Two communication steps whatever the world size.
//
// Every rank owns 1/N of the vectors. 2 (N-1)/N * payload bytes per link direction: the least that an
// all-reduce without in-network reduction can move. Each lane works alone (device/lane.cuh) on its share of
// every rank's part.
//
// In band (device/in_band.cuh), for messages that fit the slots at once:
//
//     scatter  store my partials into their owners' scatter slots
//     clear    what the lane read in its previous call, while the stores fly
//     reduce   poll the partials of my part, sum ranks 0..N-1 in order, round once, store to the output and to all
//     peers drain    poll the other owners' results, store them to the output
//
// Why three generations of scatter slots: as for one_shot.cu. Two of gather slots: a peer's result of call e+2 needs my
// partial of e+2, which I send after call e+1, in which I cleared the slot, has ended.
//
// Flagged, for any size, chunk by chunk with three chunks in flight:
//
//     step s:  scatter  chunk s      store my partials into their owners' scatter slots, publish
//              reduce   chunk s-1    wait, sum ranks 0..N-1 in order, round once, store to all, publish
//              drain    chunk s-2    wait, copy the other owners' results to the output
//
// Why a ring of four slots needs no barrier (three would do; four keeps the index a mask, which survives the
// wrap of the 32-bit epoch):
//   - scatter(s) overwrites chunk s-4 at its owner. The owner read that chunk before it published its result,
//     and this lane has drained the result of chunk s-3 already.
//   - reduce(s-1) overwrites chunk s-5 in the peers' gather slots. A peer drains chunk s-5 before it publishes
//     scatter(s-2), and this lane has just seen every peer publish scatter(s-1).
// A call ends with everything drained, so the first chunks of the next call are safe by the same argument.
#include "device/in_band.cuh"
#include "device/lane.cuh"
#include "device/launch.cuh"
#include "device/vector.cuh"

namespace lar {
namespace {

template <typename T, int kWorldSize>
class TwoShotLane {
 public:
  __device__ __forceinline__ TwoShotLane(const KernelArguments& arguments)
      : workspace_(arguments.workspace),
        lane_(workspace_, LAR_TWO_SHOT),
        input_(arguments.message.input, arguments.message.count),
        output_(arguments.message.output, arguments.message.count),
        total_vectors_(ceil_div(arguments.message.count, Vector<T>::kElements)),
        chunk_(arguments.chunk_vectors),
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() {
    const int64_t chunks = ceil_div(total_vectors_, chunk_ * gridDim.x * kWorldSize);
    for (int64_t step = 0; step < chunks + 2; ++step) {
      if (step < chunks) scatter(step);
      if (step >= 1 && step <= chunks && !reduce(step - 1)) return;
      if (step >= 2 && !drain(step - 2)) return;
    }
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
  }

 private:
  // The vectors of `chunk` that `owner` reduces in this lane: [first, first + span).
  struct Piece {
    int64_t first;
    int64_t span;  // not positive when the tensor ends before this piece
  };

  __device__ __forceinline__ Piece piece(int64_t chunk, int owner) const {
    const int64_t first = ((chunk * kWorldSize + owner) * gridDim.x + lane_.index()) * chunk_;
    return {first, min(chunk_, total_vectors_ - first)};
  }

  __device__ __forceinline__ uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  // Slot for the bytes of rank `source` at rank `holder`.
  __device__ __forceinline__ char* slot(int64_t region, int holder, int source, uint32_t round) const {
    return static_cast<char*>(workspace_.base[holder]) + slot_offset(workspace_.layout, region,
                                                                     workspace_.layout.two_shot_chunk_bytes,
                                                                     round % LAR_TWO_SHOT_SLOTS, source, lane_.index());
  }

  __device__ __forceinline__ void scatter(int64_t chunk) const {
    const int rank = workspace_.rank;
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) {
      const int owner = (rank + step) % kWorldSize;
      const Piece part = piece(chunk, owner);
      char* to = slot(workspace_.layout.scatter_offset, owner, rank, round(chunk));
      move_vectors(
          part.span, [&](int64_t i) { return input_.load(part.first + i); },
          [&](int64_t i, const uint4& raw) { store_slot(to, i, raw); });
    }
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
  }

  __device__ __forceinline__ bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const int rank = workspace_.rank;
    const Piece part = piece(chunk, rank);
    for (int64_t i = threadIdx.x; i < part.span; i += blockDim.x) {
      const uint4 result = sum_in_rank_order<T, kWorldSize>([&](int source) {
        return source == rank ? input_.load(part.first + i)
                              : load_slot(slot(workspace_.layout.scatter_offset, rank, source, round(chunk)), i);
      });
      output_.store(part.first + i, result);
#pragma unroll kPeersAtOnce < kWorldSize>
      for (int step = 1; step < kWorldSize; ++step)
        store_slot(slot(workspace_.layout.gather_offset, (rank + step) % kWorldSize, rank, round(chunk)), i, result);
    }
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  __device__ __forceinline__ bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;
    const int rank = workspace_.rank;
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) {
      const int owner = (rank + step) % kWorldSize;
      const Piece part = piece(chunk, owner);
      const char* from = slot(workspace_.layout.gather_offset, rank, owner, round(chunk));
      move_vectors(
          part.span, [&](int64_t i) { return load_slot(from, i); },
          [&](int64_t i, const uint4& raw) { output_.store(part.first + i, raw); });
    }
    return true;
  }

  const lar_workspace& workspace_;
  const Lane lane_;
  const Payload<T> input_;
  const Payload<T> output_;
  const int64_t total_vectors_;
  const int64_t chunk_;
  const uint32_t epoch_;
};

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_kernel(const __grid_constant__ KernelArguments arguments) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  TwoShotLane<T, kWorldSize>(arguments).run();
}

template <typename T, int kWorldSize>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_in_band_kernel(const __grid_constant__ KernelArguments arguments) {
  const lar_workspace& workspace = arguments.workspace;
  const lar_layout& layout = workspace.layout;
  const int64_t chunk_bytes = layout.two_shot_in_band_chunk_bytes;
  const int64_t chunk = arguments.chunk_vectors;
  const int rank = workspace.rank;
  const Payload<T> input(arguments.message.input, arguments.message.count);
  const Payload<T> output(arguments.message.output, arguments.message.count);
  const int64_t total_vectors = ceil_div(arguments.message.count, Vector<T>::kElements);

  const InBandLane lane(workspace, LAR_TWO_SHOT);
  const int scatter_generation = lane.generation(LAR_SCATTER_IN_BAND_SLOTS);
  const int gather_generation = lane.generation(LAR_GATHER_IN_BAND_SLOTS);
  const auto first_of = [&](int owner) { return (static_cast<int64_t>(owner) * gridDim.x + lane.index()) * chunk; };
  const auto span_of = [&](int owner) { return min(chunk, total_vectors - first_of(owner)); };
  const auto scatter_slot = [&](int holder, int source) {
    return lane.slot(holder, layout.scatter_in_band_offset, chunk_bytes, scatter_generation, source);
  };
  const auto gather_slot = [&](int holder, int owner) {
    return lane.slot(holder, layout.gather_in_band_offset, chunk_bytes, gather_generation, owner);
  };

  wait_for_previous_kernel();
  for (int64_t i = threadIdx.x; i < chunk; i += blockDim.x) {
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) {
      const int owner = (rank + step) % kWorldSize;
      if (i < span_of(owner))
        store_in_band(scatter_slot(owner, rank), i, without_marker(input.load(first_of(owner) + i)));
    }
  }
  lane.clear_previous<kWorldSize>(layout.scatter_in_band_offset, chunk_bytes, LAR_SCATTER_IN_BAND_SLOTS);
  lane.clear_previous<kWorldSize>(layout.gather_in_band_offset, chunk_bytes, LAR_GATHER_IN_BAND_SLOTS);
  lane.hand_over(chunk);

  for (int64_t i = threadIdx.x; i < span_of(rank); i += blockDim.x) {
    const uint4 mine = without_marker(input.load(first_of(rank) + i));
    uint4 result;
    const auto part = [&](int source) { return source == rank ? mine : load_in_band(scatter_slot(rank, source), i); };
    if (!poll_and_sum<T, kWorldSize>(lane, workspace, LAR_PHASE_SCATTER, part, result)) return;
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step)
      store_in_band(gather_slot((rank + step) % kWorldSize, rank), i, result);
    output.store(first_of(rank) + i, result);
  }
  for (int64_t i = threadIdx.x; i < chunk; i += blockDim.x) {
#pragma unroll kPeersAtOnce < kWorldSize>
    for (int step = 1; step < kWorldSize; ++step) {
      const int owner = (rank + step) % kWorldSize;
      if (i >= span_of(owner)) continue;
      uint4 result[1];
      if (!poll_until_complete(
              lane, workspace, LAR_PHASE_GATHER, result, [&](int) { return load_in_band(gather_slot(rank, owner), i); },
              [&](int) { return owner; }))
        return;
      output.store(first_of(owner) + i, result[0]);
    }
  }
}

template <typename T, int kWorldSize>
struct TwoShot {
  static Kernel kernel(bool in_band) {
    return in_band ? two_shot_in_band_kernel<T, kWorldSize> : two_shot_kernel<T, kWorldSize>;
  }
};

}  // namespace
}  // namespace lar

extern "C" int lar_two_shot_cuda(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape,
                                 void* stream) {
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  return lar::launch<lar::TwoShot>(workspace, message, shape, layout.world_size, layout.two_shot_chunk_bytes,
                                   layout.two_shot_in_band_chunk_bytes, stream);
}
