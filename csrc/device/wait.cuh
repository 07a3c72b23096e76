// Bounded waits: how long one may last, and what is left behind when it has expired.
#ifndef LLM_ALLREDUCE_DEVICE_WAIT_CUH_
#define LLM_ALLREDUCE_DEVICE_WAIT_CUH_

#include "device/ptx.cuh"
#include "host/layout.h"

namespace lar {

// Where a wait that takes too long is reported, and how long that is.
struct WaitLimit {
  uint32_t* abort;  // set once any wait of this rank has expired
  lar_failure* failure;
  int64_t timeout_ns;
  int64_t first_timeout_ns;
  uint32_t* begun;  // see lar_workspace; null: not a first call
  int32_t rank;
  lar_kind kind;  // of the call, for the record
};

// For the host, so that kernels find `begun` ready. In a kernel that chose between null and an address itself,
// CUDA 13.0 made code for sm_90 that took null for an address.
inline WaitLimit wait_limit(const lar_workspace& workspace, lar_kind kind) {
  return {abort_word(workspace.local, workspace.layout),
          workspace.failure,
          workspace.timeout_ns,
          workspace.first_timeout_ns,
          begun_word(workspace),
          workspace.rank,
          kind};
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
  failure->kind = limit.kind;
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

class WaitClock {
 public:
  __device__ __forceinline__ explicit WaitClock(const WaitLimit& limit) : limit_(limit) {}

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
    return limit_.begun && *static_cast<volatile uint32_t*>(limit_.begun) <= 1 && limit_.failure->any_gone == 0;
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
  WaitClock clock(limit);
  for (uint32_t polls = 1; !reached(seen, round); ++polls) {
    if (polls % kPollsPerCheck == 0 && clock.is_over()) {
      if (clock.expired()) give_up(limit, lane, peer, phase, round, seen, clock.waited_ns());
      return false;
    }
    seen = load_acquire_system(word);
  }
  return true;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WAIT_CUH_
