// TWOSHOT in stages, of vectors as they are and in every wire format: device/staged_lane.cuh.
#ifndef LLM_ALLREDUCE_DEVICE_TWO_SHOT_STAGED_CUH_
#define LLM_ALLREDUCE_DEVICE_TWO_SHOT_STAGED_CUH_

#include "device/staged_lane.cuh"
#include "device/wire/two_shot_units.cuh"

namespace lar {

template <typename Units>
__global__ void __launch_bounds__(LAR_MAX_STAGED_THREADS + kReleaserThreads, 1)
    two_shot_staged_kernel(const __grid_constant__ FlagsArguments arguments) {
  const Units units(arguments.message);
  StagedLane<Units>(arguments, units).run();
}

// Adds the rows of these wires.
template <Wires kWires>
void add_two_shot_staged() {
  for_each_two_shot_units<kWires>([](auto units, lar_wire wire, lar_dtype dtype, lar_epilogue epilogue) {
    using Units = typename decltype(units)::type;
    add_row({kind_of(LAR_TWO_SHOT, LAR_STAGED, wire, epilogue), dtype, 0, Form::kAny,
             kernel_address(two_shot_staged_kernel<Units>), LAR_MAX_STAGED_THREADS, kReleaserThreads, true});
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_TWO_SHOT_STAGED_CUH_
