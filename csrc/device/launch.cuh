// From run-time values to a kernel instance.
#ifndef LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_
#define LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common.h"
#include "device/in_band.cuh"

namespace lar {

// What a flagged kernel is given, by value: it travels in the constant bank, not through memory.
struct KernelArguments {
  lar_workspace workspace;
  lar_message message;
  int64_t chunk_vectors;
};

// Which of an algorithm's kernels runs. Ranks may run different ones of the two in-band kernels in the same call: they
// differ only in what they can handle.
enum class Variant {
  kFlagged,
  kInBand,
  kInBandShort,  // whole aligned vectors, one to a thread: no loop and nothing to skip
};

// World size and element type are template parameters of the kernels, so that the loop over ranks unrolls and
// the loads of all peers are in flight together. `Instances<T, N>::kernel(variant)` names the kernel.
template <template <typename, int> class Instances, typename T>
const void* select_world_size(int world_size, Variant variant) {
  switch (world_size) {
    case 2:
      return Instances<T, 2>::kernel(variant);
    case 3:
      return Instances<T, 3>::kernel(variant);
    case 4:
      return Instances<T, 4>::kernel(variant);
    case 5:
      return Instances<T, 5>::kernel(variant);
    case 6:
      return Instances<T, 6>::kernel(variant);
    case 7:
      return Instances<T, 7>::kernel(variant);
    case 8:
      return Instances<T, 8>::kernel(variant);
    case 16:
      return Instances<T, 16>::kernel(variant);
    default:
      return nullptr;
  }
}

template <template <typename, int> class Instances>
const void* select_kernel(lar_dtype dtype, int world_size, Variant variant) {
  switch (dtype) {
    case LAR_FLOAT32:
      return select_world_size<Instances, float>(world_size, variant);
    case LAR_FLOAT16:
      return select_world_size<Instances, __half>(world_size, variant);
    case LAR_BFLOAT16:
      return select_world_size<Instances, __nv_bfloat16>(world_size, variant);
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

#ifndef LAR_LEAD
#define LAR_LEAD 2
#endif
constexpr uint32_t kLead = LAR_LEAD;

// The slots that an algorithm's kernels use.
struct Slots {
  lar_algorithm algorithm;
  int parts;  // chunks that a lane handles per round
  int64_t offset;
  int64_t chunk_bytes;
  int64_t gather_offset;  // TWOSHOT
};

inline InBandArguments in_band_arguments(const lar_workspace& workspace, const lar_message& message,
                                         const lar_launch& shape, const Slots& slots, int64_t total_vectors) {
  const lar_layout& layout = workspace.layout;
  const int64_t source_bytes = layout.lanes * slots.chunk_bytes;
  const auto region = [&](int rank) { return static_cast<char*>(workspace.base[rank]) + slots.offset; };
  const auto vectors = [](int64_t bytes) { return static_cast<uint32_t>(bytes / LAR_VECTOR_BYTES); };
  InBandArguments out{};
  out.input = message.input;
  out.output = message.output;
  out.count = message.count;
  for (int step = 0; step < layout.world_size; ++step)
    out.to[step] = region((workspace.rank + step) % layout.world_size) + workspace.rank * source_bytes;
  out.own = region(workspace.rank);
  out.epochs = epoch_word(workspace.base[workspace.rank], layout, slots.algorithm, 0);
  out.generation_stride = vectors(layout.world_size * source_bytes);
  out.source_stride = vectors(source_bytes);
  out.lane_stride = vectors(slots.chunk_bytes);
  out.gather_stride = vectors(slots.gather_offset - slots.offset);
  out.chunk = static_cast<uint32_t>(shape.chunk_vectors);
  out.rounds = static_cast<uint32_t>(ceil_div(total_vectors, shape.chunk_vectors * shape.lanes * slots.parts));
  const int64_t vectors_per_thread = std::max<int64_t>(1, shape.chunk_vectors / shape.threads);
  out.lead = out.rounds == 1 ? kLead : static_cast<uint32_t>(std::min<int64_t>(kLead, (3 * vectors_per_thread - 1) / 2));
  out.rank = workspace.rank;
  out.limit = wait_limit(workspace, slots.algorithm);
  return out;
}

inline bool starts_on_a_vector(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % LAR_VECTOR_BYTES == 0;
}

inline Variant choose_variant(const lar_workspace& workspace, const lar_message& message, const lar_launch& shape,
                              uint32_t rounds) {
  if (!workspace.layout.in_band) return Variant::kFlagged;
  const bool whole = message.count * element_bytes(message.dtype) % LAR_VECTOR_BYTES == 0 &&
                     starts_on_a_vector(message.input) && starts_on_a_vector(message.output);
  return whole && rounds == 1 && shape.chunk_vectors <= shape.threads ? Variant::kInBandShort : Variant::kInBand;
}

// Starts the kernel. In-band kernels start with programmatic dependent launch: their blocks may be scheduled while the
// previous kernel of the stream drains, and wait in wait_for_previous_kernel() before they touch memory.
template <template <typename, int> class Instances>
int launch(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape, const Slots& slots,
           void* stream) {
  const int status = check_call(workspace, message, shape, slots.chunk_bytes);
  if (status != LAR_OK || message->count == 0) return status;
  const int64_t total_vectors = ceil_div(message->count * element_bytes(message->dtype), LAR_VECTOR_BYTES);
  if (total_vectors > INT32_MAX) return LAR_ERROR_INVALID_ARGUMENT;
  KernelArguments flagged;
  InBandArguments in_band;
  Variant variant = Variant::kFlagged;
  void* parameters[1];
  if (workspace->layout.in_band) {
    in_band = in_band_arguments(*workspace, *message, *shape, slots, total_vectors);
    variant = choose_variant(*workspace, *message, *shape, in_band.rounds);
    parameters[0] = &in_band;
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
  config.numAttrs = workspace->layout.in_band && has_dependent_launch() ? 1 : 0;
  return cudaLaunchKernelExC(&config, select_kernel<Instances>(message->dtype, workspace->layout.world_size, variant),
                             parameters);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_
