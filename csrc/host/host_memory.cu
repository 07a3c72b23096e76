// Host memory that GPUs see.
#include <cuda_runtime.h>

#include "host/capture.h"
#include "host/refusal.h"
#include "llm_allreduce.h"

extern "C" int lar_host_register(void* address, int64_t bytes, void** device_address) {
  if (!address || bytes <= 0 || !device_address)
    return lar::refuse("address, bytes, device_address: null, or not positive");
  const lar::OutsideCapture outside;
  const auto size = static_cast<size_t>(bytes);
  cudaError_t error = cudaHostRegister(address, size, cudaHostRegisterMapped | cudaHostRegisterPortable);
  if (error != cudaSuccess) return error;
  error = cudaHostGetDevicePointer(device_address, address, 0);
  if (error != cudaSuccess) cudaHostUnregister(address);
  return error;
}

extern "C" int lar_host_unregister(void* address) {
  if (!address) return lar::refuse("address: null");
  const lar::OutsideCapture outside;
  return cudaHostUnregister(address);
}
