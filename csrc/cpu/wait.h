// Waits of a CPU rank: bounded, named, and left when the rank is told to.
#ifndef LLM_ALLREDUCE_CPU_WAIT_H_
#define LLM_ALLREDUCE_CPU_WAIT_H_

#include <algorithm>

#include "cpu/call.h"

namespace lar::cpu {

int64_t now_ns();

// Ranks often outnumber cores, and the engine's own processes want them too. So a waiting rank polls only briefly and
// then sleeps.
constexpr int kPollsBeforeSleep = 64;
constexpr int64_t kLongestSleepNs = 100'000'000;

// How long a wait for `peer` may last. One that is gone has no time left but for what it stored last, on its way to
// here.
int64_t time_for(const lar_workspace& workspace, int peer);

// True when the rank shall leave its call.
bool is_told_to_leave(const lar_workspace& workspace);

// What a look at the word that a rank waits for has shown.
struct Seen {
  bool arrived;
  bool overwritten;
  uint32_t value;
};

// Looks until what is waited for has arrived; sleep(value, at most so many ns) between looks. `phase`, `round`: what an
// expired wait names. False, with the failure on record, when `peer` did not arrive in time, makes another call, or the
// wait was left.
template <typename Look, typename Sleep>
bool wait_for(const Call& call, int peer, lar_phase phase, uint32_t round, int64_t start_ns, Look look, Sleep sleep) {
  for (int64_t polls = 0;; ++polls) {
    const Seen seen = look();
    const auto fail = [&](lar_reason reason) {
      return call.fail(reason, phase, peer, round, seen.value, now_ns() - start_ns);
    };
    if ((seen.arrived || polls >= kPollsBeforeSleep) && !call.agrees_with(peer)) return fail(LAR_REASON_MISMATCH);
    if (seen.arrived) return true;
    if (seen.overwritten) return fail(LAR_REASON_OVERWRITTEN);
    if (polls < kPollsBeforeSleep) continue;
    const int64_t left = time_for(call.workspace(), peer) - (now_ns() - start_ns);
    if (left < 0) return fail(LAR_REASON_EXPIRED);
    if (is_told_to_leave(call.workspace())) return fail(LAR_REASON_INTERRUPTED);
    sleep(seen.value, std::min(left, kLongestSleepNs));
  }
}

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_WAIT_H_
