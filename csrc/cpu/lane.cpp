#include "cpu/lane.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "cpu/float_types.h"

namespace lar::cpu {
namespace {

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// Ranks often outnumber cores, and the engine's own processes want them too. So a waiting rank polls only briefly and
// then sleeps in the kernel until its peer's flag changes. The flags lie in shared memory: the futexes are not private.
constexpr int kPollsBeforeSleep = 64;
constexpr int64_t kLongestSleepNs = 100'000'000;

void sleep_while_equal(const uint32_t* word, uint32_t value, int64_t at_most_ns) {
  const int64_t sleep = std::min(at_most_ns, kLongestSleepNs);
  const timespec limit{0, std::max<int64_t>(sleep, 1)};
  syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, nullptr, 0);
}

void wake_sleepers(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

template <typename Type>
void reduce_typed(const void* const* sources, int num_sources, void* const* outputs, int num_outputs, int64_t count) {
  using Storage = typename Type::Storage;
  constexpr int64_t kBlock = 1024;  // sums that stay in L1
  float sum[kBlock];
  Storage rounded[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    std::fill_n(sum, size, 0.0f);
    for (int source = 0; source < num_sources; ++source) {
      // Callers' tensors need not be aligned, hence the copy into a block of our own.
      std::memcpy(rounded, static_cast<const Storage*>(sources[source]) + start, size * sizeof(Storage));
      for (int64_t i = 0; i < size; ++i) sum[i] += Type::widen(rounded[i]);
    }
    for (int64_t i = 0; i < size; ++i) rounded[i] = Type::round(sum[i]);
    for (int output = 0; output < num_outputs; ++output)
      std::memcpy(static_cast<Storage*>(outputs[output]) + start, rounded, size * sizeof(Storage));
  }
}

}  // namespace

void Lane::publish(FlagPlane plane, uint32_t round, uint32_t peers) const {
  for (int peer = 0; peer < workspace_.layout.world_size; ++peer)
    if (is_meant(peer, peers)) {
      uint32_t* flag = flag_row(workspace_.base[peer], workspace_.layout, plane, 0) + workspace_.rank;
      __atomic_store_n(flag, round, __ATOMIC_RELEASE);
      wake_sleepers(flag);
    }
}

bool Lane::wait(FlagPlane plane, lar_phase phase, uint32_t round, uint32_t peers) const {
  const uint32_t* row = flag_row(own_base(), workspace_.layout, plane, 0);
  const int64_t start = now_ns();
  for (int peer = 0; peer < workspace_.layout.world_size; ++peer) {
    if (!is_meant(peer, peers)) continue;
    for (int64_t polls = 0;; ++polls) {
      const uint32_t seen = __atomic_load_n(row + peer, __ATOMIC_ACQUIRE);
      if (reached(seen, round)) break;
      const int64_t waited = now_ns() - start;
      if (waited > workspace_.timeout_ns) {
        lar_failure& failure = *workspace_.failure;
        failure.rank = workspace_.rank;
        failure.peer = peer;
        failure.algorithm = algorithm_;
        failure.phase = phase;
        failure.lane = 0;
        failure.expected_round = round;
        failure.seen_round = seen;
        failure.waited_ns = waited;
        __atomic_store_n(&failure.state, 1, __ATOMIC_RELEASE);
        return false;
      }
      if (polls >= kPollsBeforeSleep) sleep_while_equal(row + peer, seen, workspace_.timeout_ns - waited);
    }
  }
  return true;
}

void reduce_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, void* const* outputs,
                          int num_outputs, int64_t count) {
  switch (dtype) {
    case LAR_FLOAT32:
      return reduce_typed<Float32>(sources, num_sources, outputs, num_outputs, count);
    case LAR_FLOAT16:
      return reduce_typed<Float16>(sources, num_sources, outputs, num_outputs, count);
    case LAR_BFLOAT16:
      return reduce_typed<BFloat16>(sources, num_sources, outputs, num_outputs, count);
  }
}

}  // namespace lar::cpu
