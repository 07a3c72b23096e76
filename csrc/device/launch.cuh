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
#include "device/kernel_address.cuh"

namespace lar {

// What a flagged kernel is given, by value: it travels in the constant bank, not through memory.
struct KernelArguments {
  lar_workspace workspace;
  lar_message message;
  int64_t chunk_vectors;
};

// Which of an algorithm's kernels runs. All in-band kernels store the same vectors in the same places. In the same
// call, ranks may run kInBand and kInBandShort: block b of the one waits only for block b of the other. kInBandSplit
// must run on all or none: its blocks wait for vectors in another order, and where a grid is not resident as a whole,
// ranks with different orders could wait for each other in a circle.
enum class Variant {
  kFlagged,
  kInBand,       // any message
  kInBandShort,  // whole aligned vectors, one to a thread: no loop and nothing to skip
  kInBandSplit,  // whole aligned vectors, many of them: lanes with one task each
  kPull,         // whole aligned vectors that peers read in place (TWOSHOT)
  kPublished,    // any message, in band in memory that all share (ONESHOT)
  kStaged,       // any message, one stream out and one in (TWOSHOT, 3 ranks or more)
};
constexpr Variant kVariants[] = {Variant::kFlagged, Variant::kInBand,    Variant::kInBandShort, Variant::kInBandSplit,
                                 Variant::kPull,    Variant::kPublished, Variant::kStaged};

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

// Has the driver load a kernel onto the current device now. Null is no kernel.
inline int load_kernel(const void* kernel) {
  cudaFuncAttributes attributes;
  return kernel ? cudaFuncGetAttributes(&attributes, kernel) : cudaSuccess;
}

// All kernels of an algorithm for `world_size`.
template <template <typename, int> class Instances>
int load_kernels(int world_size) {
  for (const lar_dtype dtype : {LAR_FLOAT32, LAR_FLOAT16, LAR_BFLOAT16})
    for (const Variant variant : kVariants)
      if (const int status = load_kernel(select_kernel<Instances>(dtype, world_size, variant)); status != LAR_OK)
        return status;
  return LAR_OK;
}

// Those of each kernels/*.cu.
int load_one_shot_kernels(int world_size);
int load_two_shot_kernels(int world_size);
int load_low_precision_kernels(int world_size);
int load_low_precision_ring_kernels(int world_size);
int load_low_precision_hierarchical_kernels(int world_size);

// Whether the current device can start a kernel before its predecessor in the stream has ended.
inline bool has_dependent_launch() {
  constexpr int kMaxDevices = 64;
  static int major[kMaxDevices];  // 0: not asked yet; a race writes the same value twice
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
  if (major[device] == 0) cudaDeviceGetAttribute(&major[device], cudaDevAttrComputeCapabilityMajor, device);
  return major[device] >= 9;
}

inline bool may_start_early(const lar_workspace& workspace) { return !workspace.starts_late && has_dependent_launch(); }

// Whether all blocks of a launch run at the same time on the current device, as those must that wait for each other.
inline int check_residency(const void* kernel, const lar_launch& shape) {
  int device = 0;
  int multiprocessors = 0;
  int blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads, 0);
  if (error != cudaSuccess) return error;
  return int64_t{multiprocessors} * blocks >= shape.lanes ? LAR_OK : LAR_ERROR_NOT_RESIDENT;
}

// The in-band slots that an algorithm's kernels use.
struct InBandSlots {
  lar_algorithm algorithm;  // what an expired wait names
  EpochPlane epochs;
  int parts;  // slots that a round fills at most
  int64_t offset;
  int64_t slot_bytes;
  int64_t gather_offset;  // TWOSHOT
};

inline InBandArguments in_band_arguments(const lar_workspace& workspace, const lar_message& message,
                                         const lar_launch& shape, const InBandSlots& slots) {
  const lar_layout& layout = workspace.layout;
  const int world_size = layout.world_size;
  const auto region = [&](int rank) { return static_cast<char*>(workspace.base[rank]) + slots.offset; };
  const auto vectors = [](int64_t bytes) { return static_cast<uint32_t>(bytes / LAR_VECTOR_BYTES); };
  InBandArguments out{};
  out.input = message.input;
  out.output = message.output;
  out.count = message.count;
  for (int step = 1; step < world_size; ++step)  // to that rank, I am the one world_size - step places on
    out.to[step] = region((workspace.rank + step) % world_size) + (world_size - step - 1) * slots.slot_bytes;
  out.own = region(workspace.rank);
  out.epochs = epoch_word(workspace.local, layout, slots.epochs, 0);
  out.lanes = static_cast<uint32_t>(layout.lanes);
  out.generation_stride = vectors((world_size - 1) * slots.slot_bytes);
  out.peer_stride = vectors(slots.slot_bytes);
  out.gather_stride = vectors(slots.gather_offset - slots.offset);
  out.part = static_cast<uint32_t>(shape.chunk_vectors);
  out.scatter_lanes = static_cast<uint32_t>(shape.scatter_lanes);
  out.drain_lanes = static_cast<uint32_t>(shape.drain_lanes);
  out.rank = workspace.rank;
  out.limit = wait_limit(workspace, slots.algorithm);
  return out;
}

inline bool starts_on_a_vector(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % LAR_VECTOR_BYTES == 0;
}

inline bool ends_on_a_vector(const lar_message& message) {
  return message.count * element_bytes(message.dtype) % LAR_VECTOR_BYTES == 0;
}

// Among the in-band kernels. `aligned`: the message starts on a vector.
inline Variant choose_in_band(const lar_message& message, const lar_launch& shape, bool aligned) {
  if (!aligned || !ends_on_a_vector(message)) return Variant::kInBand;
  if (shape.scatter_lanes > 0) return Variant::kInBandSplit;
  return shape.chunk_vectors <= int64_t{shape.lanes} * shape.threads ? Variant::kInBandShort : Variant::kInBand;
}

inline cudaError_t launch_kernel(const void* kernel, const lar_launch& shape, bool dependent, void* argument,
                                 void* stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.lanes);
  config.blockDim = dim3(shape.threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, &argument);
}

// The rounds of an in-band call: run(message of the round, offset in bytes) until one fails.
template <typename Run>
int in_rounds_of(int64_t round_elements, const lar_message& message, Run run) {
  for (int64_t first = 0; first < message.count; first += round_elements) {
    const int64_t offset = first * element_bytes(message.dtype);
    const lar_message round{static_cast<const char*>(message.input) + offset,
                            static_cast<char*>(message.output) + offset,
                            std::min(round_elements, message.count - first), message.dtype};
    if (const cudaError_t error = run(round, offset); error != cudaSuccess) return error;
  }
  return LAR_OK;
}

// Elements of a round whose parts are vectors as they are.
inline int64_t elements_of_round(const lar_message& message, const lar_launch& shape, int parts) {
  return shape.chunk_vectors * parts * (LAR_VECTOR_BYTES / element_bytes(message.dtype));
}

template <typename Run>
int in_rounds(const lar_message& message, const lar_launch& shape, int parts, Run run) {
  return in_rounds_of(elements_of_round(message, shape, parts), message, run);
}

// Starts the flagged kernel, one launch for all rounds. Without dependent launch: its blocks must all be resident while
// they wait for each other's flags, and another kernel's that waits for this one's end may not take their place.
inline int launch_flagged(const void* kernel, const lar_workspace& workspace, const lar_message& message,
                          const lar_launch& shape, int64_t slot_bytes, void* stream) {
  const int status = check_call(&workspace, &message, &shape, slot_bytes);
  if (status != LAR_OK || message.count == 0) return status;
  KernelArguments arguments{workspace, message, shape.chunk_vectors};
  lar_launch with_courier = shape;
  with_courier.threads += kCourierThreads;
  return launch_kernel(kernel, with_courier, false, &arguments, stream);
}

// Starts a staged kernel, likewise. Its blocks meet at barriers of the whole grid.
inline int launch_staged(const void* kernel, const lar_workspace& workspace, const lar_message& message,
                         const lar_launch& shape, void* stream) {
  if (!kernel || shape.lanes < 1 || shape.threads > LAR_MAX_STAGED_THREADS) return LAR_ERROR_INVALID_ARGUMENT;
  lar_launch with_courier = shape;
  with_courier.threads += kCourierThreads;
  if (const int status = check_residency(kernel, with_courier); status != LAR_OK) return status;
  return launch_flagged(kernel, workspace, message, shape, workspace.layout.flagged.staged_bytes / shape.lanes, stream);
}

// Starts the in-band kernel once for every round, with programmatic dependent launch: blocks may be scheduled while the
// previous kernel of the stream drains, and wait in wait_for_previous_kernel() before they touch memory.
template <template <typename, int> class Instances>
int launch_in_band(const lar_workspace& workspace, const lar_message& message, const lar_launch& shape,
                   const InBandSlots& slots, void* stream) {
  const int status = check_call(&workspace, &message, &shape, slots.slot_bytes);
  if (status != LAR_OK || message.count == 0) return status;
  // Where the tensor starts differs from rank to rank, how long it is does not.
  const bool aligned = starts_on_a_vector(message.input) && starts_on_a_vector(message.output);
  if (shape.scatter_lanes > 0 && !aligned) return LAR_ERROR_INVALID_ARGUMENT;
  return in_rounds(message, shape, slots.parts, [&](const lar_message& round, int64_t) {
    InBandArguments arguments = in_band_arguments(workspace, round, shape, slots);
    const void* kernel =
        select_kernel<Instances>(message.dtype, workspace.layout.world_size, choose_in_band(round, shape, aligned));
    return launch_kernel(kernel, shape, may_start_early(workspace), &arguments, stream);
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_LAUNCH_CUH_
