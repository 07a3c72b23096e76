// TWOSHOT in band with LAR_RMS_NORM. The part of a rank is whole rows, so that a row is complete where it is reduced
// and where it is drained: the exchange is that of two_shot_push.cu, with a row for a vector.
//
//     scatter  store my rows of the other ranks' parts into their scatter slots
//     reduce   poll the partial rows of my part, clear them, sum in rank order, round once, store the sums into the
//              gather slots of all peers, then hand them to the sink
//     drain    poll the other owners' rows, clear them, hand them to the sink
//
// In large messages each lane does one of the three.
#include "device/bulk_sender.cuh"
#include "device/rows_in_band.cuh"

namespace lar {
namespace {

// Rows of as many owners that a lane scatters, and takes in, together, as registers hold: to meet once for a row after
// the other is what a lane would spend most of its time with.
template <int kWorldSize, int kUnits>
struct RowsAtOnce {
  static constexpr int kPeers = World<kWorldSize>::kPeersAtOnce;
  static constexpr int kMost = kUnits > 1 ? 1 : World<kWorldSize>::kIsFixed ? kMostRowsAtOnce : 2;
  static constexpr int kValue = kPeers < kMost ? kPeers : kMost;
};

template <typename T, int kWorldSize, int kUnits>
using Sink = RmsNorm<T, kUnits, kUnits == 1 ? Ahead::kAll : Ahead::kNothing, Overlap::kLate,
                     RowsAtOnce<kWorldSize, kUnits>::kValue>;

// What a lane needs to know of the call.
template <typename T, int kWorldSize, int kUnits>
class TwoShotRows {
  static constexpr int kAtOnce = RowsAtOnce<kWorldSize, kUnits>::kValue;

 public:
  __device__ __forceinline__ TwoShotRows(const RowsArguments<kWorldSize>& all, Sink<T, kWorldSize, kUnits>& sink,
                                         uint32_t slots)
      : all_(all),
        arguments_(all.in_band),
        sink_(sink),
        rows_(sink.rows()),
        slots_(slots),
        gather_slots_(slots + all.in_band.gather_stride),
        units_(all.norm.units),
        part_rows_(all.in_band.part / all.norm.units) {}

  __device__ __forceinline__ uint32_t part_rows() const { return part_rows_; }

  // Row `i` of the part of the rank `step` places on; not below all_.norm.rows if there is none.
  __device__ __forceinline__ uint32_t row_of(int step, uint32_t i) const {
    return rotated(arguments_.rank, step, world_size()) * part_rows_ + i;
  }
  __device__ __forceinline__ bool has_row(int step, uint32_t i) const { return row_of(step, i) < all_.norm.rows; }

  __device__ __forceinline__ void scatter(uint32_t lane, uint32_t lanes) const {
#pragma unroll 1
    for (uint32_t i = lane; i < part_rows_; i += lanes) {
#pragma unroll 1
      for (int first = 1; first < world_size(); first += kAtOnce) {
        bool has[kAtOnce];
        uint4 mine[kAtOnce][kUnits];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          has[j] = is_step(first + j) && has_row(first + j, i);
          if (has[j]) load_row(arguments_.input, row_of(first + j, i) * units_, rows_, mine[j]);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
          for (int k = 0; k < kUnits; ++k)
            if (has[j] && rows_.has(k))
              store_in_band(arguments_.to[first + j], slots_ + i * units_ + rows_.unit(k), mine[j][k]);
      }
    }
  }

  // False, here and below, when a wait has expired.
  __device__ __forceinline__ bool reduce(uint32_t i) const {
    const uint32_t row = row_of(0, i);
    uint4 mine[kUnits];
    load_row(arguments_.input, row * units_, rows_, mine);
    sink_.prepare(row);
    Unit<T> sums[kUnits];
    const PushedRow<kWorldSize> theirs{arguments_, slots_ + i * units_};
    if (!poll_and_sum_row<T, kWorldSize, true>(arguments_, LAR_PHASE_SCATTER, rows_, theirs, mine, sums)) return false;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!rows_.has(k)) continue;
#pragma unroll World < kWorldSize> ::kPeersAtOnce
      for (int step = 1; step < world_size(); ++step)
        store_in_band(arguments_.to[step], gather_slots_ + i * units_ + rows_.unit(k), sums[k].raw[0]);
    }
    sink_(row, sums);
    return true;
  }

  __device__ __forceinline__ bool drain(uint32_t i) const {
#pragma unroll 1
    for (int first = 1; first < world_size(); first += kAtOnce) {
      uint32_t rows[kAtOnce];
      bool has[kAtOnce];
      bool has_any = false;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int step = is_step(first + j) ? first + j : first;
        rows[j] = row_of(step, i);
        has[j] = is_step(first + j) && has_row(step, i);
        has_any |= has[j];
      }
      if (!has_any) continue;
      sink_.prepare(rows, has);
      struct Own {
        char* own;
        __device__ __forceinline__ char* base(int) const { return own; }
      } const own{arguments_.own};
      Places<Own, kAtOnce * kUnits, kUnits> from{own, 0, {}};
      bool wanted[kAtOnce * kUnits];
      uint4 results[kAtOnce * kUnits];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int k = 0; k < kUnits; ++k) {
          const int v = j * kUnits + k;
          from.at[v] = gather_slots_ + slot_of_step(first + j) * arguments_.peer_stride + i * units_ + rows_.unit(k);
          wanted[v] = has[j] && rows_.has(k);
          results[v] = {0u, 0u, 0u, 0u};
        }
      if (!poll_until_complete(arguments_.limit, LAR_PHASE_GATHER, from, wanted, results,
                               [&](int v) { return rotated(arguments_.rank, first + v / kUnits, world_size()); }))
        return false;
      Unit<T> sums[kAtOnce][kUnits];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int k = 0; k < kUnits; ++k) {
          clear_in_band_if(wanted[j * kUnits + k], from[j * kUnits + k]);
          sums[j][k] = unit_of<T>(results[j * kUnits + k]);
        }
      sink_(rows, has, sums);
    }
    return true;
  }

 private:
  __device__ __forceinline__ int world_size() const { return World<kWorldSize>::size(arguments_.world_size); }
  // Whether there is a rank so many places on.
  __device__ __forceinline__ bool is_step(int step) const { return step < world_size(); }

  const RowsArguments<kWorldSize>& all_;
  const PushArguments<kWorldSize>& arguments_;
  Sink<T, kWorldSize, kUnits>& sink_;
  const Rows<kUnits>& rows_;
  const uint32_t slots_;
  const uint32_t gather_slots_;
  const uint32_t units_;
  const uint32_t part_rows_;
};

template <typename T, int kWorldSize, int kUnits>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_push_norm_kernel(const __grid_constant__ RowsArguments<kWorldSize> all) {
  const PushArguments<kWorldSize>& arguments = all.in_band;
  LAR_BLOCK_VARIABLE(RowMemory, memory);
  Sink<T, kWorldSize, kUnits> sink(all.norm, memory);
  const uint32_t group = sink.rows().group();
  const uint32_t groups = sink.rows().groups();
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const TwoShotRows<T, kWorldSize, kUnits> rows(all, sink, slots_of_call(arguments, epoch));
  rows.scatter(group, groups);
  advance_epoch(arguments, epoch);
  // All that peers wait for first, then what they have for me.
#pragma unroll 1
  for (uint32_t i = group; i < rows.part_rows(); i += groups)
    if (rows.has_row(0, i) && !rows.reduce(i)) return;
#pragma unroll 1
  for (uint32_t i = group; i < rows.part_rows(); i += groups)
    if (!rows.drain(i)) return;
}

template <typename T, int kWorldSize, int kUnits>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    two_shot_split_norm_kernel(const __grid_constant__ RowsArguments<kWorldSize> all) {
  const PushArguments<kWorldSize>& arguments = all.in_band;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t total_vectors = all.norm.rows * all.norm.units;
  const uint32_t part = arguments.part;
  const uint32_t scatterers = arguments.scatter_lanes;
  const uint32_t drainers = arguments.drain_lanes;
  const uint32_t reducers = gridDim.x - scatterers - drainers;
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  advance_epoch(arguments, epoch);
  LAR_SENDER_OR_ROW_MEMORY(memory, row_memory);
  if (blockIdx.x < scatterers) {
    BulkSender sender(memory);
    const Share share = share_of(0, scatterers, part);
    for (uint32_t tile = share.first - warp_thread(); tile < share.end; tile += share.stride) {
#pragma unroll 1
      for (int step = 1; step < world_size; ++step) {
        const uint32_t index = rotated(arguments.rank, step, world_size) * part + tile;
        if (index >= total_vectors) continue;
        const uint4 mine = load_vector(arguments.input, min(index + warp_thread(), total_vectors - 1));
        sender.fill(without_marker(mine));
        sender.send(arguments.to[step], slots + tile, min(min(kTileVectors, part - tile), total_vectors - index));
        sender.close();
      }
    }
    sender.flush();
    return;
  }
  Sink<T, kWorldSize, kUnits> sink(all.norm, row_memory);
  const TwoShotRows<T, kWorldSize, kUnits> rows(all, sink, slots);
  if (blockIdx.x < scatterers + reducers) {
#pragma unroll 1
    for (uint32_t i = blockIdx.x - scatterers; i < rows.part_rows(); i += reducers)
      if (rows.has_row(0, i) && !rows.reduce(i)) return;
    if (drainers > 0) return;
  }
  const uint32_t first_lane = drainers > 0 ? scatterers + reducers : scatterers;
  const uint32_t lanes = drainers > 0 ? drainers : reducers;
#pragma unroll 1
  for (uint32_t i = blockIdx.x - first_lane; i < rows.part_rows(); i += lanes)
    if (!rows.drain(i)) return;
}

// Two ranks sum by ONESHOT at every size.
const Registration rows([] {
  add_rows_in_band<Worlds<4, 8, 0>>(LAR_TWO_SHOT, LAR_PUSH, [](auto type, auto world, auto add) {
    using T = typename decltype(type)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add(Form::kShort, two_shot_push_norm_kernel<T, kWorldSize, 1>);
    if constexpr (kWorldSize == 0) {
      add(Form::kAny, two_shot_push_norm_kernel<T, kWorldSize, 2>);
      add(Form::kSplit, two_shot_split_norm_kernel<T, kWorldSize, 2>);
    }
  });
});

}  // namespace
}  // namespace lar
