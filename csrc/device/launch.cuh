// From run-time values to a kernel instance.
#ifndef LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_
#define LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common.h"

namespace lar {

// Everything a kernel is given, by value: it travels in the constant bank, not through memory.
struct KernelArguments {
  lar_workspace workspace;
  lar_message message;
  int64_t chunk_vectors;
};

using Kernel = void (*)(KernelArguments);

// World size and element type are template parameters of the kernels, so that the loop over ranks unrolls and
// the loads of all peers are in flight together. `Instances` maps both to a kernel.
template <template <typename, int> class Instances, typename T>
Kernel select_world_size(int world_size) {
  switch (world_size) {
    case 2:
      return Instances<T, 2>::kernel();
    case 3:
      return Instances<T, 3>::kernel();
    case 4:
      return Instances<T, 4>::kernel();
    case 5:
      return Instances<T, 5>::kernel();
    case 6:
      return Instances<T, 6>::kernel();
    case 7:
      return Instances<T, 7>::kernel();
    case 8:
      return Instances<T, 8>::kernel();
    case 16:
      return Instances<T, 16>::kernel();
    default:
      return nullptr;
  }
}

template <template <typename, int> class Instances>
Kernel select_kernel(lar_dtype dtype, int world_size) {
  switch (dtype) {
    case LAR_FLOAT32:
      return select_world_size<Instances, float>(world_size);
    case LAR_FLOAT16:
      return select_world_size<Instances, __half>(world_size);
    case LAR_BFLOAT16:
      return select_world_size<Instances, __nv_bfloat16>(world_size);
  }
  return nullptr;
}

template <template <typename, int> class Instances>
int launch(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape,
           int64_t chunk_capacity_bytes, void* stream) {
  if (const int status = check_call(workspace, message, shape, chunk_capacity_bytes); status != LAR_OK) return status;
  if (message->count == 0) return LAR_OK;
  KernelArguments arguments{*workspace, *message, shape->chunk_vectors};
  void* parameters[] = {&arguments};
  const Kernel kernel = select_kernel<Instances>(message->dtype, workspace->layout.world_size);
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(shape->lanes), dim3(shape->threads), parameters,
                          0, static_cast<cudaStream_t>(stream));
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_
