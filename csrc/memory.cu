// Host memory that GPUs see, and kernels that are there before they are needed.
#include <cuda_runtime.h>

#include "common.h"
#include "device/capture.h"
#include "device/launch.cuh"

extern "C" int lar_host_register(void* address, int64_t bytes, void** device_address) {
  if (!address || bytes <= 0 || !device_address) return LAR_ERROR_INVALID_ARGUMENT;
  const lar::OutsideCapture outside;
  const auto size = static_cast<size_t>(bytes);
  cudaError_t error = cudaHostRegister(address, size, cudaHostRegisterMapped | cudaHostRegisterPortable);
  if (error != cudaSuccess) return error;
  error = cudaHostGetDevicePointer(device_address, address, 0);
  if (error != cudaSuccess) cudaHostUnregister(address);
  return error;
}

extern "C" int lar_host_unregister(void* address) {
  if (!address) return LAR_ERROR_INVALID_ARGUMENT;
  const lar::OutsideCapture outside;
  return cudaHostUnregister(address);
}

extern "C" int lar_load_kernels_cuda(int32_t world_size) {
  using namespace lar;
  if (!supported_world_size(world_size)) return LAR_ERROR_INVALID_ARGUMENT;
  const OutsideCapture outside;
  for (const auto load : {load_one_shot_kernels, load_two_shot_kernels, load_low_precision_kernels,
                          load_low_precision_ring_kernels, load_low_precision_hierarchical_kernels})
    if (const int status = load(world_size); status != LAR_OK) return status;
  return LAR_OK;
}
