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
// the loads of all peers are in flight together. `Instances<T, N>::kernel(in_band)` names the kernel.
template <template <typename, int> class Instances, typename T>
Kernel select_world_size(int world_size, bool in_band) {
  switch (world_size) {
    case 2:
      return Instances<T, 2>::kernel(in_band);
    case 3:
      return Instances<T, 3>::kernel(in_band);
    case 4:
      return Instances<T, 4>::kernel(in_band);
    case 5:
      return Instances<T, 5>::kernel(in_band);
    case 6:
      return Instances<T, 6>::kernel(in_band);
    case 7:
      return Instances<T, 7>::kernel(in_band);
    case 8:
      return Instances<T, 8>::kernel(in_band);
    case 16:
      return Instances<T, 16>::kernel(in_band);
    default:
      return nullptr;
  }
}

template <template <typename, int> class Instances>
Kernel select_kernel(lar_dtype dtype, int world_size, bool in_band) {
  switch (dtype) {
    case LAR_FLOAT32:
      return select_world_size<Instances, float>(world_size, in_band);
    case LAR_FLOAT16:
      return select_world_size<Instances, __half>(world_size, in_band);
    case LAR_BFLOAT16:
      return select_world_size<Instances, __nv_bfloat16>(world_size, in_band);
  }
  return nullptr;
}

// Whether the current device can start a kernel before its predecessor in the stream has ended.
inline bool has_dependent_launch() {
  constexpr int kMaxDevices = 64;
  static int major[kMaxDevices];  // 0: not asked yet; a race writes the same value twice
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
  if (major[device] == 0) cudaDeviceGetAttribute(&major[device], cudaDevAttrComputeCapabilityMajor, device);
  return major[device] >= 9;
}

// Starts the kernel, on workspaces with in-band slots with programmatic dependent launch: its blocks may then be
// scheduled while the previous kernel of the stream drains, and wait in wait_for_previous_kernel() before they touch
// memory.
template <template <typename, int> class Instances>
int launch(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape, int parts,
           int64_t chunk_bytes, int64_t in_band_chunk_bytes, void* stream) {
  const int status = check_call(workspace, message, shape, parts, chunk_bytes, in_band_chunk_bytes);
  if (status != LAR_OK || message->count == 0) return status;
  KernelArguments arguments{*workspace, *message, shape->chunk_vectors};
  void* parameters[] = {&arguments};
  const Kernel kernel = select_kernel<Instances>(message->dtype, workspace->layout.world_size, shape->in_band != 0);

  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape->lanes);
  config.blockDim = dim3(shape->threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &dependent;
  config.numAttrs = workspace->layout.in_band_bytes > 0 && has_dependent_launch() ? 1 : 0;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_
