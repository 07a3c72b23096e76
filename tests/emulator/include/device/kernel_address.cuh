// What csrc/device/kernel_address.cuh does, and a note of how the kernel is called.
#ifndef LLM_ALLREDUCE_DEVICE_KERNEL_ADDRESS_CUH_
#define LLM_ALLREDUCE_DEVICE_KERNEL_ADDRESS_CUH_

#include <tuple>
#include <utility>

#include "kernels.h"

namespace emulator {

template <typename... Parameters, size_t... kIndices>
std::function<void()> bind_parameters(void (*kernel)(Parameters...), void* const* parameters,
                                      std::index_sequence<kIndices...>) {
  const auto copies =
      std::make_shared<std::tuple<Parameters...>>(*static_cast<const Parameters*>(parameters[kIndices])...);
  return [kernel, copies] { std::apply(kernel, *copies); };
}

template <typename... Parameters>
std::function<void()> bind_kernel(const void* kernel, void* const* parameters) {
  return bind_parameters(reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(kernel)), parameters,
                         std::index_sequence_for<Parameters...>());
}

}  // namespace emulator

namespace lar {

template <typename... Parameters>
const void* kernel_address(void (*kernel)(Parameters...)) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  emulator::add_kernel(address, &emulator::bind_kernel<Parameters...>);
  return address;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_KERNEL_ADDRESS_CUH_
