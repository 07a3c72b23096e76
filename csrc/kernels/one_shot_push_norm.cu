// ONESHOT in band with LAR_RMS_NORM: every rank stores its rows into slots of every peer, then sums, norms and
// quantizes all rows itself. The exchange is that of one_shot_push.cu.
//
//     push     store my row into my slot at every peer
//     prepare  load what the sink needs of the row beside the sums: it comes while the links are busy
//     reduce   poll the vectors of all ranks, clear them, sum in rank order, round once
//     sink     the row's threads meet once for the sum of squares, and once more for a scale of the whole row
//
// A row is a block's. While there are few rows, a cluster of blocks shares one (kShort): then all multiprocessors
// store, and meeting in a cluster costs less than what one block would wait for its own stores. In large messages some
// lanes only push, by bulk copies.
#include "device/bulk_sender.cuh"
#include "device/rows_in_band.cuh"

namespace lar {
namespace {

// Of two ranks what needs no total is done while that travels; 64 registers, as wide blocks have, hold no factors.
template <typename T, int kWorldSize, int kUnits, int kMostThreads = LAR_MAX_THREADS>
using Sink = RmsNorm<T, kUnits,
                     kWorldSize == 2 && kUnits == 1 && kMostThreads <= LAR_MAX_THREADS ? Ahead::kFactors
                     : kUnits == 1 || kWorldSize == 2                                  ? Ahead::kAll
                                                                                       : Ahead::kNothing,
                     kWorldSize == 2 ? Overlap::kEarly : Overlap::kLate>;

// kOwnFirst: see poll_and_sum_row(). In clusters it was 0.1 us slower (benchmarks/h100/fused_variants_tp2.json), why is
// not known.
template <typename T, int kWorldSize, bool kOwnFirst, int kUnits, typename RowSink>
__device__ __forceinline__ void reduce_rows(const RowsArguments<kWorldSize>& all, RowSink& sink, uint32_t slots,
                                            uint32_t first, uint32_t stride) {
  const PushArguments<kWorldSize>& arguments = all.in_band;
  const uint32_t units = all.norm.units;
#pragma unroll 1
  for (uint32_t row = first; row < all.norm.rows; row += stride) {
    uint4 mine[kUnits];
    load_row(arguments.input, row * units, sink.rows(), mine);
    sink.prepare(row);
    Unit<T> sums[kUnits];
    const PushedRow<kWorldSize> theirs{arguments, slots + row * units};
    if (!poll_and_sum_row<T, kWorldSize, true, kOwnFirst>(arguments, LAR_PHASE_GATHER, sink.rows(), theirs, mine, sums))
      return;
    sink(row, sums);
  }
}

template <typename T, int kWorldSize, int kUnits, int kMostThreads = LAR_MAX_THREADS>
__global__ void __launch_bounds__(kMostThreads, 1)
    one_shot_push_norm_kernel(const __grid_constant__ RowsArguments<kWorldSize> all) {
  const PushArguments<kWorldSize>& arguments = all.in_band;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  const uint32_t units = all.norm.units;
  LAR_BLOCK_VARIABLE(RowMemory, memory);
  Sink<T, kWorldSize, kUnits, kMostThreads> sink(all.norm, memory);
  const auto& rows = sink.rows();
  const uint32_t group = rows.group();
  const uint32_t groups = rows.groups();
  wait_for_previous_kernel();
  let_next_kernel_start();

  // The first row's vectors and the epoch leave together; one of the last row is loaded for nothing rather than branch.
  uint4 mine[kUnits];
  load_row(arguments.input, min(group, all.norm.rows - 1) * units, rows, mine);
  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  const auto push = [&](uint32_t row) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!rows.has(k)) continue;
#pragma unroll World < kWorldSize> ::kPeersAtOnce
      for (int step = 1; step < world_size; ++step)
        store_in_band(arguments.to[step], slots + row * units + rows.unit(k), mine[k]);
    }
  };
  if (group < all.norm.rows) push(group);
#pragma unroll 1
  for (uint32_t row = group + groups; row < all.norm.rows; row += groups) {
    load_row(arguments.input, row * units, rows, mine);
    push(row);
  }
  advance_epoch(arguments, epoch);
  constexpr bool kOwnFirst = kWorldSize == 2 && (kUnits > 1 || kMostThreads > LAR_MAX_THREADS);
  reduce_rows<T, kWorldSize, kOwnFirst, kUnits>(all, sink, slots, group, groups);
}

template <typename T, int kWorldSize, int kUnits>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    one_shot_split_norm_kernel(const __grid_constant__ RowsArguments<kWorldSize> all) {
  const PushArguments<kWorldSize>& arguments = all.in_band;
  const uint32_t pushers = arguments.scatter_lanes;
  wait_for_previous_kernel();
  let_next_kernel_start();

  const uint32_t epoch = epoch_of(arguments);
  const uint32_t slots = slots_of_call(arguments, epoch);
  advance_epoch(arguments, epoch);
  LAR_SENDER_OR_ROW_MEMORY(memory, row_memory);
  if (blockIdx.x < pushers) {
    push_in_bulk(arguments, memory, slots, all.norm.rows * all.norm.units);
    return;
  }
  Sink<T, kWorldSize, kUnits> sink(all.norm, row_memory);
  reduce_rows<T, kWorldSize, kWorldSize == 2, kUnits>(all, sink, slots, blockIdx.x - pushers, gridDim.x - pushers);
}

// More than a unit to a thread is for few ranks' large messages, and for GPUs without clusters. Wide blocks are for
// messages that no lanes only push, of which a multiprocessor holds one; of more ranks, 64 registers do not hold the
// vectors.
const Registration rows([] {
  add_rows_in_band<Worlds<2, 4, 8, 0>>(LAR_ONE_SHOT, LAR_PUSH, [](auto type, auto world, auto add) {
    using T = typename decltype(type)::type;
    constexpr int kWorldSize = decltype(world)::value;
    add(Form::kShort, one_shot_push_norm_kernel<T, kWorldSize, 1>);
    if constexpr (kWorldSize == 2)
      add(Form::kWide, one_shot_push_norm_kernel<T, kWorldSize, 1, LAR_MAX_WIDE_THREADS>, LAR_MAX_WIDE_THREADS);
    if constexpr (kWorldSize == 2 || kWorldSize == 0) {
      add(Form::kAny, one_shot_push_norm_kernel<T, kWorldSize, 2>);
      add(Form::kSplit, one_shot_split_norm_kernel<T, kWorldSize, 2>);
    }
  });
});

}  // namespace
}  // namespace lar
