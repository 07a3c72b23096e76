// A lane: the block with the same index on every rank.
//
// Lanes of one group talk only to each other: lane 3 of rank 0 publishes rounds to lane 3 of every peer and
// waits for theirs, through slots that belong to lane 3 alone. Blocks of one rank never synchronize, so a grid
// need not be resident as a whole, and calls with different grids may follow each other freely: a lane that a
// call leaves out keeps its count of rounds on every rank alike. That count (the epoch) lives in device memory,
// so a captured graph may be replayed any number of times, between any other calls.
#ifndef LLM_ALLREDUCE_DEVICE_LANE_CUH_
#define LLM_ALLREDUCE_DEVICE_LANE_CUH_

#include "common.h"
#include "device/ptx.cuh"

namespace lar {

// Peers that a loop over peers handles at once. With 16 ranks the addresses of all would not fit into registers.
template <int kWorldSize>
constexpr int kPeersAtOnce = kWorldSize > 8 ? 3 : kWorldSize - 1;

// The rank `step` places after `rank`, without a division.
template <int kWorldSize>
__device__ __forceinline__ int rotated(int rank, int step) {
  return rank + step < kWorldSize ? rank + step : rank + step - kWorldSize;
}

// Payload in the workspace.
__device__ __forceinline__ uint4 load_slot(const char* slot, int64_t index) {
  return load_weak(reinterpret_cast<const uint4*>(slot) + index);
}

__device__ __forceinline__ void store_slot(char* slot, int64_t index, const uint4& raw) {
  store_weak(reinterpret_cast<uint4*>(slot) + index, raw);
}

// Where a wait that takes too long is reported, and how long that is.
struct WaitLimit {
  uint32_t* abort;  // set once any wait of this rank has expired
  lar_failure* failure;
  int64_t timeout_ns;
  int64_t first_timeout_ns;
  uint32_t* begun;  // see lar_workspace; null: not a first call
  int32_t rank;
  lar_algorithm algorithm;
};

__host__ __device__ inline WaitLimit wait_limit(const lar_workspace& workspace, lar_algorithm algorithm) {
  return {abort_word(workspace.local, workspace.layout),
          workspace.failure,
          workspace.timeout_ns,
          workspace.first_timeout_ns,
          begun_word(workspace),
          workspace.rank,
          algorithm};
}

// Counts a beginning of what the call belongs to. For one thread of the grid, before it waits. Nothing waits for it.
__device__ __forceinline__ void count_beginning(uint32_t* begun) {
  if (begun) increment_relaxed_gpu(begun);
}

// Ends a wait for `peer` that has expired. The first lane to give up leaves the record and traps: what depends on this
// call must not be read as if it had worked. Lanes that find the abort word set only return, so that none traps before
// the record is out.
__device__ __forceinline__ void give_up(const WaitLimit& limit, int lane, int peer, lar_phase phase, uint32_t round,
                                        uint32_t seen, int64_t waited_ns) {
  if (atomicCAS(limit.abort, 0u, 1u) != 0u) return;
  lar_failure* failure = limit.failure;
  failure->reason = LAR_REASON_EXPIRED;
  failure->rank = limit.rank;
  failure->peer = peer;
  failure->algorithm = limit.algorithm;
  failure->phase = phase;
  failure->lane = lane;
  failure->expected_round = round;
  failure->seen_round = seen;
  failure->waited_ns = waited_ns;
  __threadfence_system();
  failure->state = 1;
  __threadfence_system();
  __trap();
}

// Bounds a polling loop. To be asked once in kPollsPerCheck polls: the clock and the abort word are slower than what is
// polled.
constexpr uint32_t kPollsPerCheck = 256;

class Patience {
 public:
  __device__ __forceinline__ explicit Patience(const WaitLimit& limit) : limit_(limit) {}

  // True once the group is broken or the time is up.
  __device__ __forceinline__ bool is_over() {
    const int64_t now = global_timer_ns();
    if (start_ == 0) start_ = now;
    waited_ = now - start_;
    return expired() || *static_cast<volatile uint32_t*>(limit_.abort) != 0;
  }

  // After is_over(): true when this thread's own time is up, false when another has given up already.
  __device__ __forceinline__ bool expired() const {
    return waited_ > limit_.timeout_ns && (waited_ > limit_.first_timeout_ns || !is_first_call());
  }
  __device__ __forceinline__ int64_t waited_ns() const { return waited_; }

 private:
  // Whether peers may still be getting ready for it. Asked only after the usual time: the host's word lies far away.
  __device__ __forceinline__ bool is_first_call() const {
    return limit_.begun && *static_cast<volatile uint32_t*>(limit_.begun) <= 1 && limit_.failure->gone == 0;
  }

  const WaitLimit& limit_;
  int64_t start_ = 0;
  int64_t waited_ = 0;
};

// Polls until `word` has reached `round`. `lane`, `peer`, `phase`: what an expired wait names. False when it has
// expired, or another has.
__device__ __forceinline__ bool wait_for_round(const WaitLimit& limit, const uint32_t* word, uint32_t round, int lane,
                                               int peer, lar_phase phase) {
  uint32_t seen = load_acquire_system(word);
  Patience patience(limit);
  for (uint32_t polls = 1; !reached(seen, round); ++polls) {
    if (polls % kPollsPerCheck == 0 && patience.is_over()) {
      if (patience.expired()) give_up(limit, lane, peer, phase, round, seen, patience.waited_ns());
      return false;
    }
    seen = load_acquire_system(word);
  }
  return true;
}

// How a block shares out the protocol's work. With a courier, the last warp does nothing but release flags: a release
// waits until all that the block stored before has arrived, over PCIe for a microsecond or two, in which the others,
// the workers, go on.
enum class Crew { kWorkers, kWorkersAndCourier };

constexpr int kCourierThreads = 32;

// Whom a lane publishes to and waits for. Never this rank itself.
struct AllPeers {
  __device__ __forceinline__ bool has(int) const { return true; }
};
struct SomePeers {
  uint32_t bits;  // bit r: rank r
  __device__ __forceinline__ bool has(int peer) const { return (bits >> peer & 1u) != 0; }
};

template <Crew kCrew>
class Lane {
 public:
  // `algorithm`: what an expired wait names.
  __device__ __forceinline__ Lane(const lar_workspace& workspace, EpochPlane epochs, lar_algorithm algorithm)
      : workspace_(workspace), epochs_(epochs), algorithm_(algorithm), index_(blockIdx.x) {}

  __device__ __forceinline__ int index() const { return index_; }

  __device__ __forceinline__ static int workers() { return blockDim.x - (kHasCourier ? kCourierThreads : 0); }
  __device__ __forceinline__ static bool is_courier() { return kHasCourier && threadIdx.x >= workers(); }

  // The number of rounds this lane has finished in earlier calls.
  __device__ __forceinline__ uint32_t epoch() const {
    return *epoch_word(workspace_.local, workspace_.layout, epochs_, index_);
  }

  // Ends the call: `epoch` rounds are finished. For all threads: the barrier keeps a slow one from reading the new
  // count as the old one.
  __device__ __forceinline__ void finish(uint32_t epoch) const {
    __syncthreads();
    if (threadIdx.x == 0) *epoch_word(workspace_.local, workspace_.layout, epochs_, index_) = epoch;
  }

  // For the workers: tells the peers that all that they stored so far belongs to `round` and may be read. With a
  // courier, who must deliver() the same rounds in the same order, this waits for the release before, not for this one.
  // The barrier orders the block's stores before the releases, which are cumulative (PTX memory model, causality
  // order), so one thread per peer publishes for the whole block without a fence per thread.
  template <typename Peers = AllPeers>
  __device__ __forceinline__ void publish(FlagPlane plane, uint32_t round, Peers peers = {}) const {
    __syncthreads();
    if (!kHasCourier) release(threadIdx.x, plane, round, peers);
  }

  // For the courier. False once the workers have given up.
  template <typename Peers = AllPeers>
  __device__ __forceinline__ bool deliver(FlagPlane plane, uint32_t round, Peers peers = {}) const {
    __syncthreads();
    if (*given_up()) return false;
    release(threadIdx.x - workers(), plane, round, peers);
    return true;
  }

  // For the workers: waits until each of the peers has published `round`. False for all of them when one did not arrive
  // in time; they must then return at once.
  template <typename Peers = AllPeers>
  __device__ __forceinline__ bool wait(FlagPlane plane, lar_phase phase, uint32_t round, Peers peers = {}) const {
    bool arrived = true;
    const int peer = threadIdx.x;
    if (is_meant(peer, peers)) arrived = wait_for(peer, plane, phase, round);
    if (!kHasCourier) return __syncthreads_and(arrived);
    arrived = barrier_all<kWorkerBarrier>(workers(), arrived);
    if (!arrived) *given_up() = true;  // threads that have returned count as arrived at the courier's barrier
    return arrived;
  }

  // For all threads, before anything else.
  __device__ __forceinline__ void start() const {
    if (index_ == 0 && threadIdx.x == 0) count_beginning(begun_word(workspace_));
    if (!kHasCourier) return;
    if (threadIdx.x == 0) *given_up() = false;
    __syncthreads();
  }

 private:
  static constexpr bool kHasCourier = kCrew == Crew::kWorkersAndCourier;
  static constexpr int kWorkerBarrier = 1;  // 0 is that of __syncthreads()

  __device__ __forceinline__ static volatile bool* given_up() {
    LAR_SHARED(volatile bool, word);
    return &word;
  }

  template <typename Peers>
  __device__ __forceinline__ bool is_meant(int peer, Peers peers) const {
    return peer < workspace_.layout.world_size && peer != workspace_.rank && peers.has(peer);
  }

  // One thread to a peer.
  template <typename Peers>
  __device__ __forceinline__ void release(int peer, FlagPlane plane, uint32_t round, Peers peers) const {
    if (is_meant(peer, peers))
      store_release_system(flag_row(workspace_.base[peer], workspace_.layout, plane, index_) + workspace_.rank, round);
  }

  __device__ __forceinline__ bool wait_for(int peer, FlagPlane plane, lar_phase phase, uint32_t round) const {
    const uint32_t* flag = flag_row(workspace_.base[workspace_.rank], workspace_.layout, plane, index_) + peer;
    return wait_for_round(wait_limit(workspace_, algorithm_), flag, round, index_, peer, phase);
  }

  const lar_workspace& workspace_;
  const EpochPlane epochs_;
  const lar_algorithm algorithm_;
  const int index_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_LANE_CUH_
