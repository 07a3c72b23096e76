// A kernel as the host names it. tests/emulator/ has a second version, which notes how to call it on a CPU.
#ifndef LLM_ALLREDUCE_DEVICE_KERNEL_ADDRESS_CUH_
#define LLM_ALLREDUCE_DEVICE_KERNEL_ADDRESS_CUH_

namespace lar {

template <typename... Parameters>
const void* kernel_address(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_KERNEL_ADDRESS_CUH_
