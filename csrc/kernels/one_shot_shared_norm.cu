// ONESHOT in band with LAR_RMS_NORM in memory that all ranks share: every rank stores its rows once, all poll them
// there (device/shared.cuh), sum, norm and quantize.
#include "device/shared_rows.cuh"

namespace lar {
namespace {

// Where a row of each peer lies: in its own workspace.
struct SharedRow {
  const SharedCall& call;
  uint32_t first;
  __device__ __forceinline__ char* base(int peer) const { return call.vector(peer, 0); }
  __device__ __forceinline__ uint32_t place(int) const { return first; }
};

// The releaser takes no part in rows.
template <typename T>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    one_shot_shared_norm_kernel(const __grid_constant__ SharedRowsArguments all) {
  const InBandArguments& arguments = all.shared.in_band;
  const uint32_t units = all.norm.units;
  const uint32_t total_vectors = all.norm.rows * units;
  LAR_BLOCK_VARIABLE(RowMemory, memory);
  wait_for_previous_kernel();
  let_next_kernel_start();

  SharedCall call(all.shared);
  RmsNorm<T, kSharedUnits, Ahead::kNothing> sink(all.norm, memory, SharedCall::block_workers());
  const auto& rows = sink.rows();
  const uint32_t first = call.is_releaser() ? all.norm.rows : blockIdx.x;
#pragma unroll 1
  for (uint32_t row = first; row < all.norm.rows; row += gridDim.x) {
    uint4 mine[kSharedUnits];
    load_row(arguments.input, row * units, rows, mine);
#pragma unroll
    for (int k = 0; k < kSharedUnits; ++k)
      if (rows.has(k)) call.store(row * units + rows.unit(k), mine[k]);
  }
  call.count_call(total_vectors);
  if (call.is_releaser()) return call.settle_clears();
  call.template clear_old_generation<0>(false);

#pragma unroll 1
  for (uint32_t row = first; row < all.norm.rows; row += gridDim.x) {
    uint4 mine[kSharedUnits];
    load_row(arguments.input, row * units, rows, mine);
    sink.prepare(row);
    Unit<T> sums[kSharedUnits];
    if (!poll_and_sum_row<T, 0, false>(arguments, LAR_PHASE_GATHER, rows, SharedRow{call, row * units}, mine, sums))
      return;
    sink(row, sums);
  }
}

const Registration rows([] {
  for_each_instance<Types<__half, __nv_bfloat16>, Worlds<0>, Types<Store>>([](auto type, auto, auto) {
    using T = typename decltype(type)::type;
    add_row({kind_of(LAR_ONE_SHOT, LAR_SHARED, LAR_WIRE_RAW, LAR_RMS_NORM), dtype_of<T>(), 0, Form::kAny,
             kernel_address(one_shot_shared_norm_kernel<T>), LAR_MAX_FLAGGED_THREADS, kReleaserThreads, false});
  });
});

}  // namespace
}  // namespace lar
