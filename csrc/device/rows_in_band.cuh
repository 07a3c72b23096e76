// What the in-band kernels share whose sink takes whole rows (device/sink/rms_norm.cuh).
//
// A thread that gives up returns, while others of its block may wait for it at a barrier: there, threads that have
// ended count as arrived.
#ifndef LLM_ALLREDUCE_DEVICE_ROWS_IN_BAND_CUH_
#define LLM_ALLREDUCE_DEVICE_ROWS_IN_BAND_CUH_

#include "device/bulk_sender.cuh"
#include "device/in_band.cuh"
#include "device/instances.cuh"
#include "device/sink/rms_norm.cuh"

namespace lar {

// 16-bit elements, of which a vector is a unit.
template <int kWorldSize>
struct RowsArguments {
  NormArguments norm;
  PushArguments<kWorldSize> in_band;  // `count`: of the launch
};

template <typename T>
__device__ __forceinline__ Unit<T> unit_of(const uint4& raw) {
  static_assert(Unit<T>::kVectors == 1);
  return {{raw}};
}

// This rank's own vectors of a row, without markers.
template <int kUnits, Overlap kOverlap>
__device__ __forceinline__ void load_row(const void* input, uint32_t first, const Rows<kUnits, kOverlap>& rows,
                                         uint4 (&mine)[kUnits]) {
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    mine[k] = {0u, 0u, 0u, 0u};
    if (rows.has(k)) mine[k] = without_marker(load_vector(input, first + rows.unit(k)));
  }
}

// Where a row of each peer lies: vectors from place(peer) on, behind base(peer). Here, in this rank's pushed slots.
template <int kWorldSize>
struct PushedRow {
  const InBandArguments& arguments;
  uint32_t first;  // of the row, from the beginning of a slot and of the generation
  __device__ __forceinline__ char* base(int) const { return arguments.own; }
  __device__ __forceinline__ uint32_t place(int peer) const {
    return first + slot_of_peer<kWorldSize>(arguments, peer);
  }
};

// The addresses of kCount vectors, kUnits for each rank from `first` on, in half the registers.
template <typename Row, int kCount, int kUnits>
struct Places {
  const Row& row;
  int first;
  uint32_t at[kCount];
  __device__ __forceinline__ char* operator[](int i) const {
    return row.base(first + i / kUnits) + int64_t{at[i]} * LAR_VECTOR_BYTES;
  }
};

// Ranks whose vectors of kUnits are under way together: as many as the registers hold.
template <int kWorldSize, int kUnits>
struct RanksAtOnce {
  static constexpr int kRanks = World<kWorldSize>::kRanksAtOnce;
  static constexpr int kMost = kUnits == 1 ? kRanks : kUnits == 2 && World<kWorldSize>::kIsFixed ? 2 : 1;
  static constexpr int kValue = kRanks < kMost ? kRanks : kMost;
};

// The sums in rank order, rounded, of a row of `mine` and of all peers', polled and, if `kClears`, cleared; as many of
// a thread's vectors as fit are under way together. `kOwnFirst`: of two ranks, own values are added while the peer's
// travel. False as for poll_until_complete().
template <typename T, int kWorldSize, bool kClears, bool kOwnFirst = false, int kUnits, Overlap kOverlap, typename Row>
__device__ __forceinline__ bool poll_and_sum_row(const InBandArguments& arguments, lar_phase phase,
                                                 const Rows<kUnits, kOverlap>& rows, const Row& theirs,
                                                 const uint4 (&mine)[kUnits], Unit<T> (&sums)[kUnits]) {
  constexpr bool kIsFixed = World<kWorldSize>::kIsFixed;
  constexpr int kGroup = RanksAtOnce<kWorldSize, kUnits>::kValue;
  const int world_size = World<kWorldSize>::size(arguments.world_size);
  Accumulator<T> sum[kUnits];
  if constexpr (kOwnFirst) {
    static_assert(kWorldSize == 2, "of more the order of additions would be another");
    const int peer = 1 - arguments.rank;
    Places<Row, kUnits, kUnits> from{theirs, peer, {}};
    bool wanted[kUnits];
    uint4 parts[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      from.at[k] = theirs.place(peer) + rows.unit(k);
      wanted[k] = rows.has(k);
      parts[k] = mine[k];
      sum[k].add(mine[k]);
      compute_here(sum[k].sum);
    }
    if (!poll_until_complete(arguments.limit, phase, from, wanted, parts, [&](int) { return peer; })) return false;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (kClears) clear_in_band_if(wanted[k], from[k]);
      sum[k].add(parts[k]);
      sums[k] = unit_of<T>(sum[k].rounded());
    }
    return true;
  }
#pragma unroll 1
  for (int first = 0; first < world_size; first += kGroup) {
    Places<Row, kGroup * kUnits, kUnits> from{theirs, first, {}};
    bool wanted[kGroup * kUnits];
    uint4 parts[kGroup * kUnits];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool is_rank = kIsFixed || first + i < world_size;
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        from.at[i * kUnits + k] = theirs.place(is_rank ? first + i : first) + rows.unit(k);
        wanted[i * kUnits + k] = is_rank && first + i != arguments.rank && rows.has(k);
        parts[i * kUnits + k] = mine[k];
      }
    }
    if (!poll_until_complete(arguments.limit, phase, from, wanted, parts, [&](int i) { return first + i / kUnits; }))
      return false;
    if (kClears) {
#pragma unroll
      for (int i = 0; i < kGroup * kUnits; ++i) clear_in_band_if(wanted[i], from[i]);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
#pragma unroll
      for (int k = 0; k < kUnits; ++k)
        if (kIsFixed || first + i < world_size) sum[k].add(parts[i * kUnits + k]);
  }
#pragma unroll
  for (int k = 0; k < kUnits; ++k) sums[k] = unit_of<T>(sum[k].rounded());
  return true;
}

// The in-band kernels of an algorithm that take rows: calls body(Type<T>, integral_constant<world size>, add) for each
// type and each of `Worlds`, where add(form, kernel) adds a row of the registry. kShort: a unit of a row to a thread;
// kAny: two; kSplit: two, and lanes with one task each.
template <typename Worlds, typename Body>
void add_rows_in_band(lar_algorithm algorithm, lar_exchange exchange, Body body) {
  for_each_instance<Types<__half, __nv_bfloat16>, Worlds, Types<Store>>([&](auto type, auto world, auto) {
    using T = typename decltype(type)::type;
    body(type, world, [&](Form form, auto kernel, int most_threads = LAR_MAX_THREADS) {
      add_row({kind_of(algorithm, exchange, LAR_WIRE_RAW, LAR_RMS_NORM), dtype_of<T>(), decltype(world)::value, form,
               kernel_address(kernel), most_threads, 0, false});
    });
  });
}

// Shared memory of a block that either sends or takes rows: all that a sender has.
#if LAR_HAS_BULK_COPIES
static_assert(sizeof(RowMemory) <= LAR_MAX_THREADS * LAR_VECTOR_BYTES, "fits one tile of each warp");
#define LAR_SENDER_OR_ROW_MEMORY(sender, row) \
  LAR_BULK_SENDER_MEMORY(sender);             \
  RowMemory& row = *reinterpret_cast<RowMemory*>(sender)
#else
#define LAR_SENDER_OR_ROW_MEMORY(sender, row) \
  LAR_BULK_SENDER_MEMORY(sender);             \
  LAR_BLOCK_VARIABLE(RowMemory, row)
#endif

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_ROWS_IN_BAND_CUH_
