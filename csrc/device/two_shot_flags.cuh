// TWOSHOT by flags, each lane alone, of vectors as they are and in every wire format: device/two_shot_lane.cuh.
#ifndef LLM_ALLREDUCE_DEVICE_TWO_SHOT_FLAGS_CUH_
#define LLM_ALLREDUCE_DEVICE_TWO_SHOT_FLAGS_CUH_

#include "device/two_shot_lane.cuh"
#include "device/wire/two_shot_units.cuh"

namespace lar {

template <typename Units>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, Units::kBlocksAtOnce)
    two_shot_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  const Units units(arguments.message);
  TwoShotLane<Units>(arguments, units).run();
}

// Adds the rows of these wires.
template <Wires kWires>
void add_two_shot_flags() {
  for_each_two_shot_units<kWires>([](auto units, lar_wire wire, lar_dtype dtype, lar_epilogue epilogue) {
    using Units = typename decltype(units)::type;
    add_row({kind_of(LAR_TWO_SHOT, LAR_FLAGS, wire, epilogue), dtype, 0, Form::kAny,
             kernel_address(two_shot_flags_kernel<Units>), LAR_MAX_FLAGGED_THREADS, kReleaserThreads, false});
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_TWO_SHOT_FLAGS_CUH_
