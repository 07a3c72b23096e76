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
constexpr int64_t kGoneNs = 1'000'000'000;

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

// How long a wait for `peer` may last. One that is gone has no time left but for what it stored last, on its way to
// here.
int64_t Lane::patience_ns(int peer) const {
  if (workspace_.failure->gone >> peer & 1u) return std::min(kGoneNs, workspace_.timeout_ns);
  return workspace_.begun >= 0 ? workspace_.first_timeout_ns : workspace_.timeout_ns;
}

bool Lane::wait_for(int peer, FlagPlane plane, lar_phase phase, uint32_t round, int64_t start_ns) const {
  const uint32_t* flag = flag_row(own_base(), workspace_.layout, plane, 0) + peer;
  const auto fail = [&](lar_reason reason, uint32_t seen) {
    return call_.fail(reason, phase, peer, round, seen, now_ns() - start_ns);
  };
  for (int64_t polls = 0;; ++polls) {
    const uint32_t seen = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    const bool arrived = reached(seen, round);
    if ((arrived || polls >= kPollsBeforeSleep) && !call_.agrees_with(peer)) return fail(LAR_REASON_MISMATCH, seen);
    if (arrived) return true;
    if (overwritten(seen, round)) return fail(LAR_REASON_OVERWRITTEN, seen);
    if (polls < kPollsBeforeSleep) continue;
    const int64_t left = patience_ns(peer) - (now_ns() - start_ns);
    if (left < 0) return fail(LAR_REASON_EXPIRED, seen);
    if (workspace_.should_leave && workspace_.should_leave(workspace_.should_leave_context) != 0)
      return fail(LAR_REASON_INTERRUPTED, seen);
    sleep_while_equal(flag, seen, left);
  }
}

bool Lane::wait(FlagPlane plane, lar_phase phase, uint32_t round, uint32_t peers) const {
  const int64_t start = now_ns();
  for (int peer = 0; peer < workspace_.layout.world_size; ++peer)
    if (is_meant(peer, peers) && !wait_for(peer, plane, phase, round, start)) return false;
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
