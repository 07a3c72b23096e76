// From run-time values to a kernel instance.
#ifndef LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_
#define LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common.h"
#include "device/in_band.cuh"

namespace lar {

// What a flagged kernel is given, by value: it travels in the constant bank, not through memory.
struct KernelArguments {
  lar_workspace workspace;
  lar_message message;
  int64_t chunk_vectors;
};

// World size and element type are template parameters of the kernels, so that the loop over ranks unrolls and
// the loads of all peers are in flight together. `Instances<T, N>::kernel(in_band)` names the kernel.
template <template <typename, int> class Instances, typename T>
const void* select_world_size(int world_size, bool in_band) {
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
const void* select_kernel(lar_dtype dtype, int world_size, bool in_band) {
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

// The slots that an algorithm's kernels use.
struct Slots {
  lar_algorithm algorithm;
  int parts;  // pieces that a lane handles per round
  int64_t chunk_bytes;
  int64_t in_band_offset;
  int64_t in_band_chunk_bytes;
  int64_t gather_stride_bytes;  // between the two in-band regions of TWOSHOT
};

inline InBandArguments in_band_arguments(const lar_workspace& workspace, const lar_message& message,
                                         const lar_launch& shape, const Slots& slots) {
  const lar_layout& layout = workspace.layout;
  const int64_t source_bytes = layout.in_band_lanes * slots.in_band_chunk_bytes;
  const auto region = [&](int rank) { return static_cast<char*>(workspace.base[rank]) + slots.in_band_offset; };
  const auto vectors = [](int64_t bytes) { return static_cast<uint32_t>(bytes / LAR_VECTOR_BYTES); };
  InBandArguments out{};
  out.input = message.input;
  out.output = message.output;
  out.count = message.count;
  for (int step = 0; step < layout.world_size; ++step)
    out.to[step] = region((workspace.rank + step) % layout.world_size) + workspace.rank * source_bytes;
  out.own = region(workspace.rank);
  out.generations = generation_words(workspace.base[workspace.rank], layout, slots.algorithm);
  out.generation_stride = vectors(layout.world_size * source_bytes);
  out.source_stride = vectors(source_bytes);
  out.lane_stride = vectors(slots.in_band_chunk_bytes);
  out.gather_stride = vectors(slots.gather_stride_bytes);
  out.chunk = static_cast<uint32_t>(shape.chunk_vectors);
  out.rank = workspace.rank;
  out.limit = wait_limit(workspace, slots.algorithm);
  return out;
}

// Starts the kernel, on workspaces with in-band slots with programmatic dependent launch: its blocks may then be
// scheduled while the previous kernel of the stream drains, and wait in wait_for_previous_kernel() before they touch
// memory.
template <template <typename, int> class Instances>
int launch(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape, const Slots& slots,
           void* stream) {
  const int status = check_call(workspace, message, shape, slots.parts, slots.chunk_bytes, slots.in_band_chunk_bytes);
  if (status != LAR_OK || message->count == 0) return status;
  const bool in_band = shape->in_band != 0;
  KernelArguments flagged;
  InBandArguments compact;
  void* parameters[1];
  if (in_band) {
    compact = in_band_arguments(*workspace, *message, *shape, slots);
    parameters[0] = &compact;
  } else {
    flagged = {*workspace, *message, shape->chunk_vectors};
    parameters[0] = &flagged;
  }

  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape->lanes);
  config.blockDim = dim3(shape->threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &dependent;
  config.numAttrs = workspace->layout.in_band_bytes > 0 && has_dependent_launch() ? 1 : 0;
  return cudaLaunchKernelExC(&config, select_kernel<Instances>(message->dtype, workspace->layout.world_size, in_band),
                             parameters);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_
