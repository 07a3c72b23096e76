// What two-shot kernels by flags are compiled for: vectors as they are, and packets of every wire format.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_TWO_SHOT_UNITS_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_TWO_SHOT_UNITS_CUH_

#include "device/wire/formats.cuh"
#include "device/wire/packet_units.cuh"
#include "device/wire/vector_units.cuh"

namespace lar {

// Calls add(Type<Units>, wire, dtype, epilogue) for each of these wires, of which kOthers has vectors as they are.
template <Wires kWires, typename Add>
void for_each_two_shot_units(Add add) {
  if constexpr (kWires == Wires::kOthers) {
    for_each_instance<Types<float, __half, __nv_bfloat16>, Worlds<0>, Epilogues>([&](auto type, auto, auto epilogue) {
      using T = typename decltype(type)::type;
      using Epilogue = typename decltype(epilogue)::type;
      add(Type<VectorUnits<T, Epilogue>>{}, LAR_WIRE_RAW, dtype_of<T>(), Epilogue::kEpilogue);
    });
  }
  for_each_packet<kWires, Types<__half, __nv_bfloat16>>([&](auto type, auto packet) {
    using T = typename decltype(type)::type;
    using Packet = typename decltype(packet)::type;
    add(Type<PacketUnits<T, Packet, Store>>{}, Packet::kWire, dtype_of<T>(), LAR_STORE);
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_TWO_SHOT_UNITS_CUH_
