// The wire formats that kernels are compiled for.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_FORMATS_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_FORMATS_CUH_

#include "device/instances.cuh"
#include "device/wire/packet.cuh"

namespace lar {

// Kernels that send FP8, in groups or not, are in files of their own (kernels/*_fp8.cu): machine code of 89, which has
// instructions for FP8, is compiled of these alone. That of 80 does for the others.
enum class Wires { kFp8, kOthers };

namespace detail {

template <Wires kWires, typename T, typename... Format, typename Add>
void for_each_format(codec::FormatList<Format...>, Add add) {
  const auto add_format = [&](auto format) {
    using Packet = PacketOf<decltype(format)>;
    if constexpr (std::is_base_of_v<Fp8Codes, Packet> == (kWires == Wires::kFp8)) add(Type<T>{}, Type<Packet>{});
  };
  (add_format(Format{}), ...);
}

template <Wires kWires, typename... T, typename Add>
void for_each_packet(Types<T...>, Add add) {
  (for_each_format<kWires, T>(codec::Formats{}, add), ...);
}

}  // namespace detail

// Calls add(Type<T>, Type<Packet>) for each of the types and each of these formats.
template <Wires kWires, typename Types, typename Add>
void for_each_packet(Add add) {
  detail::for_each_packet<kWires>(Types{}, add);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_FORMATS_CUH_
