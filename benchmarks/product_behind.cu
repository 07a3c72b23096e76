// Kernels for benchmarks/product_behind.py and clusters_leave.py: one that a matrix product stands behind, and one that
// says on which multiprocessors the blocks of a cluster run.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

struct Before {
  const uint4* input;
  uint4* output;
  uint32_t vectors;
  uint32_t writers;   // blocks that copy
  uint32_t least_ns;  // the kernel takes at least so long
  int32_t lets_in;    // whether it lets the next kernel start when it starts itself
};

__global__ void __launch_bounds__(1024, 1) before(const Before arguments) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (arguments.lets_in) asm volatile("griddepcontrol.launch_dependents;");
  uint64_t begin;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  const uint32_t stride = arguments.writers * blockDim.x;
  if (blockIdx.x < arguments.writers)
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < arguments.vectors; i += stride)
      arguments.output[i] = arguments.input[i];
  uint64_t now;
  do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  while (now - begin < arguments.least_ns);
}

__global__ void where(uint32_t* multiprocessors) {
  extern __shared__ char alone[];  // so much that a multiprocessor holds one block
  if (threadIdx.x != 0) return;
  alone[0] = 1;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessors[blockIdx.x]));
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  while (now - begin < 5000);
}

cudaLaunchConfig_t config_of(int blocks, int threads, int cluster, void* stream, cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (cluster > 0) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  return config;
}

}  // namespace

// `vectors`: of 16 bytes. `writers`: blocks that copy. `early`: the kernel may start while the one before it drains.
extern "C" int launch_before(const void* input, void* output, uint32_t vectors, uint32_t writers, uint32_t least_ns,
                             int lets_in, int early, int blocks, int threads, int cluster, void* stream) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config = config_of(blocks, threads, cluster, stream, attributes);
  if (early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  const Before arguments{
      static_cast<const uint4*>(input), static_cast<uint4*>(output), vectors, writers, least_ns, lets_in};
  return cudaLaunchKernelEx(&config, before, arguments);
}

// `multiprocessors`: uint32 [blocks], of clusters of two blocks, each of which has a multiprocessor to itself.
extern "C" int launch_where(uint32_t* multiprocessors, int blocks, void* stream) {
  constexpr int kAlone = 200 << 10;
  const cudaError_t error = cudaFuncSetAttribute(where, cudaFuncAttributeMaxDynamicSharedMemorySize, kAlone);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config = config_of(blocks, 128, 2, stream, &attribute);
  config.dynamicSmemBytes = kAlone;
  return cudaLaunchKernelEx(&config, where, multiprocessors);
}
