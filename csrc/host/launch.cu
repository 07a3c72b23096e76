#include <cuda_runtime.h>

#include "host/launch.h"

namespace lar {
namespace {

// Whether the current device can start a kernel before its predecessor in the stream has ended.
bool has_dependent_launch() {
  constexpr int kMaxDevices = 64;
  static int major[kMaxDevices];  // 0: not asked yet; a race writes the same value twice
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
  if (major[device] == 0) cudaDeviceGetAttribute(&major[device], cudaDevAttrComputeCapabilityMajor, device);
  return major[device] >= 9;
}

// Whether all blocks of a launch run at the same time on the current device.
int check_residency(const void* kernel, int lanes, int threads) {
  int device = 0;
  int multiprocessors = 0;
  int blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  if (error != cudaSuccess) return error;
  return int64_t{multiprocessors} * blocks >= lanes ? LAR_OK : LAR_ERROR_NOT_RESIDENT;
}

}  // namespace

int launch_kernel(const void* kernel, int blocks, int threads, int cluster, bool early, void* argument, void* stream) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (early && has_dependent_launch()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    if (!has_dependent_launch()) return refuse("cluster: of sm_90 and newer");  // dependent launch came with clusters
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  return cudaLaunchKernelExC(&config, kernel, &argument);
}

bool knows_multicast() { return has_dependent_launch(); }  // which came with the same architecture

int launch(const Row* row, const lar_workspace& workspace, const lar_launch& shape, Start start, void* argument,
           void* stream) {
  if (!row) return refuse("kind: there is no kernel of it for this dtype, world size and form of message");
  if (shape.threads > row->most_threads) return refuse("threads: more than the kernel takes");
  const int threads = shape.threads + row->extra_threads;
  if (row->resident)
    if (const int status = check_residency(row->kernel, shape.lanes, threads); status != LAR_OK) return status;
  const bool early = start == Start::kEarly && !workspace.starts_late;
  return launch_kernel(row->kernel, shape.lanes, threads, lanes_of_a_row(shape), early, argument, stream);
}

}  // namespace lar

extern "C" int lar_cuda_release(void) {
#ifdef __CUDACC_VER_MAJOR__
  return __CUDACC_VER_MAJOR__ * 1000 + __CUDACC_VER_MINOR__ * 10;
#else
  return 0;  // emulated
#endif
}
