// Proof of peer access by real bytes: drivers advertise P2P that ACS or an IOMMU then drops.
#include <cuda_runtime.h>

#include "device/kernel.cuh"
#include "host/layout.h"
#include "host/refusal.h"

namespace lar {
namespace {

constexpr int kProbeThreads = (LAR_MAX_WORLD_SIZE + 31) / 32 * 32;  // one to a peer

__global__ void probe_write_kernel(const __grid_constant__ lar_workspace workspace, uint32_t nonce) {
  const int peer = threadIdx.x;
  if (peer >= workspace.layout.world_size) return;
  volatile uint32_t* words = probe_words(workspace.base[peer], workspace.layout);
  words[workspace.rank] = probe_pattern(nonce, workspace.rank, peer);
  __threadfence_system();
}

__global__ void probe_check_kernel(const __grid_constant__ lar_workspace workspace, uint32_t nonce, int32_t* verdict) {
  const int peer = threadIdx.x;
  if (peer >= workspace.layout.world_size) return;
  const int rank = workspace.rank;
  const volatile uint32_t* here = probe_words(workspace.base[rank], workspace.layout);
  const volatile uint32_t* there = probe_words(workspace.base[peer], workspace.layout);
  const bool arrived = here[peer] == probe_pattern(nonce, peer, rank);
  const bool reads = there[rank] == probe_pattern(nonce, rank, peer);
  verdict[peer] = (arrived ? 1 : 0) | (reads ? 2 : 0);
}

}  // namespace
}  // namespace lar

extern "C" int lar_probe_write_cuda(const lar_workspace* workspace, uint32_t nonce, void* stream) {
  if (!workspace) return lar::refuse("workspace: null");
  return lar::launch(lar::probe_write_kernel, 1, lar::kProbeThreads, stream, *workspace, nonce);
}

extern "C" int lar_probe_check_cuda(const lar_workspace* workspace, uint32_t nonce, int32_t* verdict, void* stream) {
  if (!workspace || !verdict) return lar::refuse("workspace, verdict: null");
  return lar::launch(lar::probe_check_kernel, 1, lar::kProbeThreads, stream, *workspace, nonce, verdict);
}
