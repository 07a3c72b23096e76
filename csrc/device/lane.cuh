// A lane: the block with the same index on every rank.
//
// Lanes of one group talk only to each other: lane 3 of rank 0 publishes rounds to lane 3 of every peer and
// waits for theirs, through slots that belong to lane 3 alone. Blocks of one rank never synchronize, so a grid
// need not be resident as a whole, and calls with different grids may follow each other freely: a lane that a
// call leaves out keeps its count of rounds on every rank alike. That count (the epoch) lives in device memory,
// so a captured graph may be replayed any number of times, between any other calls.
#ifndef LLM_ALLREDUCE_DEVICE_LANE_CUH_
#define LLM_ALLREDUCE_DEVICE_LANE_CUH_

#include "device/wait.cuh"
#include "protocol/hierarchy.h"
#include "protocol/peers.h"

namespace lar {

// How a block shares out the protocol's work. With a releaser, the last warp does nothing but release flags: a release
// waits until all that the block stored before has arrived, over PCIe for a microsecond or two, in which the others,
// the workers, go on.
enum class Roles { kWorkers, kWorkersAndReleaser };

constexpr int kReleaserThreads = 32;

// What a kernel that waits for flags is given, by value: it travels in the constant bank, not through memory.
struct FlagsArguments {
  lar_workspace workspace;
  lar_message message;
  int64_t chunk_vectors;
  WaitLimit limit;
  Domains domains;  // hierarchical
  int32_t hosts;    // see lar_call
};

// Payload in the workspace.
__device__ __forceinline__ uint4 load_slot(const char* slot, int64_t index) {
  return load_weak(reinterpret_cast<const uint4*>(slot) + index);
}

__device__ __forceinline__ void store_slot(char* slot, int64_t index, const uint4& raw) {
  store_weak(reinterpret_cast<uint4*>(slot) + index, raw);
}

template <Roles kRoles>
class Lane {
 public:
  __device__ __forceinline__ Lane(const lar_workspace& workspace, const WaitLimit& limit, EpochPlane epochs)
      : workspace_(workspace), limit_(limit), epochs_(epochs) {}

  __device__ __forceinline__ int index() const { return blockIdx.x; }

  __device__ __forceinline__ static int workers() { return blockDim.x - (kHasReleaser ? kReleaserThreads : 0); }
  __device__ __forceinline__ static bool is_releaser() { return kHasReleaser && threadIdx.x >= workers(); }

  // The number of rounds this lane has finished in earlier calls.
  __device__ __forceinline__ uint32_t epoch() const {
    return *epoch_word(workspace_.local, workspace_.layout, epochs_, index());
  }

  // Ends the call: `epoch` rounds are finished. For all threads: the barrier keeps a slow one from reading the new
  // count as the old one.
  __device__ __forceinline__ void finish(uint32_t epoch) const {
    __syncthreads();
    if (threadIdx.x == 0) *epoch_word(workspace_.local, workspace_.layout, epochs_, index()) = epoch;
  }

  // For the workers: tells the peers that all that they stored so far belongs to `round` and may be read. With a
  // releaser, who must deliver() the same rounds in the same order, this waits for the release before, not for this
  // one. The barrier orders the block's stores before the releases, which are cumulative (PTX memory model, causality
  // order), so one thread per peer publishes for the whole block without a fence per thread.
  template <typename Peers = AllPeers>
  __device__ __forceinline__ void publish(FlagPlane plane, uint32_t round, Peers peers = {}) const {
    __syncthreads();
    if (!kHasReleaser) release(threadIdx.x, workers(), plane, round, peers);
  }

  // For the releaser. False once the workers have given up.
  template <typename Peers = AllPeers>
  __device__ __forceinline__ bool deliver(FlagPlane plane, uint32_t round, Peers peers = {}) const {
    __syncthreads();
    if (*given_up()) return false;
    release(threadIdx.x - workers(), kReleaserThreads, plane, round, peers);
    return true;
  }

  // For the workers: waits until each of the peers has published `round`. False for all of them when one did not arrive
  // in time; they must then return at once.
  template <typename Peers = AllPeers>
  __device__ __forceinline__ bool wait(FlagPlane plane, lar_phase phase, uint32_t round, Peers peers = {}) const {
    bool arrived = true;
    for (int peer = threadIdx.x; arrived && peer < workspace_.layout.world_size; peer += workers())
      if (is_meant(peer, peers)) arrived = wait_for(peer, plane, phase, round);
    return agree(arrived);
  }

  // For all threads, before anything else.
  __device__ __forceinline__ void start() const {
    if (index() == 0 && threadIdx.x == 0) count_beginning(limit_.begun);
    if (!kHasReleaser) return;
    if (threadIdx.x == 0) *given_up() = false;
    __syncthreads();
  }

 private:
  // Whether all workers say yes.
  __device__ __forceinline__ static bool agree(bool yes) {
    if (!kHasReleaser) return __syncthreads_and(yes);
    yes = barrier_all<kWorkerBarrier>(workers(), yes);
    if (!yes) *given_up() = true;  // threads that have returned count as arrived at the releaser's barrier
    return yes;
  }

  static constexpr bool kHasReleaser = kRoles == Roles::kWorkersAndReleaser;
  static constexpr int kWorkerBarrier = 1;  // 0 is that of __syncthreads()

  __device__ __forceinline__ static volatile bool* given_up() {
    LAR_BLOCK_VARIABLE(volatile bool, word);
    return &word;
  }

  template <typename Peers>
  __device__ __forceinline__ bool is_meant(int peer, Peers peers) const {
    return peer != workspace_.rank && peers.has(peer);
  }

  // One thread to a peer, as far as there are threads.
  template <typename Peers>
  __device__ __forceinline__ void release(int thread, int threads, FlagPlane plane, uint32_t round, Peers peers) const {
    for (int peer = thread; peer < workspace_.layout.world_size; peer += threads)
      if (is_meant(peer, peers))
        store_release_system(flag_row(workspace_.base[peer], workspace_.layout, plane, index()) + workspace_.rank,
                             round);
  }

  __device__ __forceinline__ bool wait_for(int peer, FlagPlane plane, lar_phase phase, uint32_t round) const {
    const uint32_t* flag = flag_row(workspace_.base[workspace_.rank], workspace_.layout, plane, index()) + peer;
    return wait_for_round(limit_, flag, round, index(), peer, phase);
  }

  const lar_workspace& workspace_;
  const WaitLimit& limit_;
  const EpochPlane epochs_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_LANE_CUH_
