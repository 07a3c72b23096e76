#include "cpu/lane.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace lar::cpu {
namespace {

// In the kernel, until the peer's flag changes. The flags lie in shared memory: the futexes are not private.
void sleep_while_equal(const uint32_t* word, uint32_t value, int64_t at_most_ns) {
  const timespec limit{0, std::max<int64_t>(at_most_ns, 1)};
  syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, nullptr, 0);
}

void wake_sleepers(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

}  // namespace

void Lane::release(int peer, FlagPlane plane, uint32_t round) const {
  uint32_t* flag = flag_row(workspace_.base[peer], workspace_.layout, plane, 0) + workspace_.rank;
  __atomic_store_n(flag, round, __ATOMIC_RELEASE);
  wake_sleepers(flag);
}

bool Lane::acquire(int peer, FlagPlane plane, lar_phase phase, uint32_t round, int64_t start_ns) const {
  const uint32_t* flag = flag_row(workspace_.base[workspace_.rank], workspace_.layout, plane, 0) + peer;
  return wait_for(
      call_, peer, phase, round, start_ns,
      [&]() -> Seen {
        const uint32_t value = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
        return {reached(value, round), overwritten(value, round), value};
      },
      [&](uint32_t value, int64_t at_most_ns) { sleep_while_equal(flag, value, at_most_ns); });
}

}  // namespace lar::cpu
