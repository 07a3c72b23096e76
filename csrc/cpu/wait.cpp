#include "cpu/wait.h"

#include <time.h>

namespace lar::cpu {

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

int64_t time_for(const lar_workspace& workspace, int peer) {
  constexpr int64_t kGoneNs = 1'000'000'000;
  if (is_gone(*workspace.failure, peer)) return std::min(kGoneNs, workspace.timeout_ns);
  return workspace.begun >= 0 ? workspace.first_timeout_ns : workspace.timeout_ns;
}

bool is_told_to_leave(const lar_workspace& workspace) {
  return workspace.should_leave && workspace.should_leave(workspace.should_leave_context) != 0;
}

}  // namespace lar::cpu
