// The launch of kernels that are no all-reduce.
#ifndef LLM_ALLREDUCE_DEVICE_KERNEL_CUH_
#define LLM_ALLREDUCE_DEVICE_KERNEL_CUH_

#include <cuda_runtime.h>

#include <type_traits>

#include "device/kernel_address.cuh"

namespace lar {

// Starts a kernel with its parameters one by one.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void* stream,
                   std::common_type_t<Parameters>... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  void* addresses[] = {&arguments...};
  return cudaLaunchKernelExC(&config, kernel_address(kernel), addresses);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_KERNEL_CUH_
