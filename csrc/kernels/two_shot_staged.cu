// TWOSHOT in stages, of vectors as they are and in every wire format: device/staged_lane.cuh.
#include "device/instances.cuh"
#include "device/sink/store.cuh"
#include "device/staged_lane.cuh"
#include "device/wire/formats.cuh"
#include "device/wire/packet_units.cuh"
#include "device/wire/vector_units.cuh"

namespace lar {
namespace {

template <typename Units>
__global__ void __launch_bounds__(LAR_MAX_STAGED_THREADS + kReleaserThreads, 1)
    two_shot_staged_kernel(const __grid_constant__ FlagsArguments arguments) {
  const Units units(arguments.message);
  StagedLane<Units>(arguments, units).run();
}

template <typename Units>
void add(lar_wire wire, lar_dtype dtype, lar_epilogue epilogue) {
  add_row({kind_of(LAR_TWO_SHOT, LAR_STAGED, wire, epilogue), dtype, 0, Form::kAny,
           kernel_address(two_shot_staged_kernel<Units>), LAR_MAX_STAGED_THREADS, kReleaserThreads, true});
}

const Registration rows([] {
  for_each_instance<Types<float, __half, __nv_bfloat16>, Worlds<0>, Epilogues>([](auto type, auto, auto epilogue) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    add<VectorUnits<T, Epilogue>>(LAR_WIRE_RAW, dtype_of<T>(), Epilogue::kEpilogue);
  });
  for_each_packet<Types<__half, __nv_bfloat16>>([](auto type, auto packet) {
    using T = typename decltype(type)::type;
    using Packet = typename decltype(packet)::type;
    add<PacketUnits<T, Packet, Store>>(Packet::kWire, dtype_of<T>(), LAR_STORE);
  });
});

}  // namespace
}  // namespace lar
