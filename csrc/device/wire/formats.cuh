// The wire formats that kernels are compiled for.
#ifndef LLM_ALLREDUCE_DEVICE_WIRE_FORMATS_CUH_
#define LLM_ALLREDUCE_DEVICE_WIRE_FORMATS_CUH_

#include "device/instances.cuh"
#include "device/wire/packet.cuh"

namespace lar {

namespace detail {

template <typename T, typename... Format, typename Add>
void for_each_format(codec::FormatList<Format...>, Add add) {
  (add(Type<T>{}, Type<PacketOf<Format>>{}), ...);
}

template <typename... T, typename Add>
void for_each_packet(Types<T...>, Add add) {
  (for_each_format<T>(codec::Formats{}, add), ...);
}

}  // namespace detail

// Calls add(Type<T>, Type<Packet>) for each of the types and each format.
template <typename Types, typename Add>
void for_each_packet(Add add) {
  detail::for_each_packet(Types{}, add);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WIRE_FORMATS_CUH_
