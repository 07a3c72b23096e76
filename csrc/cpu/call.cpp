#include "cpu/call.h"

#include "host/registry.h"

namespace lar::cpu {

int Call::begin() {
  if (workspace_.failure->state != 0) return broken();
  uint32_t* calls = calls_word(workspace_);
  mine_.call = ++*calls;
  lar_call_record* record = call_record(workspace_, workspace_.rank, mine_.call);
  // A peer that reads meanwhile must not take the old number with the new values.
  __atomic_store_n(&record->call, mine_.call - 1, __ATOMIC_RELEASE);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  record->kind = mine_.kind;
  record->dtype = mine_.dtype;
  record->count = mine_.count;
  __atomic_store_n(&record->call, mine_.call, __ATOMIC_RELEASE);
  return LAR_OK;
}

bool Call::agrees_with(int peer) const {
  const lar_call_record* record = call_record(workspace_, peer, mine_.call);
  if (__atomic_load_n(&record->call, __ATOMIC_ACQUIRE) != mine_.call) return true;
  const lar_call_record theirs = *record;
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  if (__atomic_load_n(&record->call, __ATOMIC_RELAXED) != mine_.call) return true;  // it has gone on meanwhile
  if (theirs.kind == mine_.kind && theirs.dtype == mine_.dtype && theirs.count == mine_.count) return true;
  lar_failure& failure = *workspace_.failure;
  failure.mine = mine_;
  failure.theirs = theirs;
  return false;
}

bool Call::fail(lar_reason reason, lar_phase phase, int peer, uint32_t round, uint32_t seen, int64_t waited_ns) const {
  lar_failure& failure = *workspace_.failure;
  failure.reason = reason;
  failure.rank = workspace_.rank;
  failure.peer = peer;
  failure.kind = mine_.kind;
  failure.phase = phase;
  failure.lane = 0;
  failure.expected_round = round;
  failure.seen_round = seen;
  failure.waited_ns = waited_ns;
  __atomic_store_n(&failure.state, 1, __ATOMIC_RELEASE);
  return false;
}

int Call::broken() const {
  switch (static_cast<lar_reason>(workspace_.failure->reason)) {
    case LAR_REASON_MISMATCH:
      return LAR_ERROR_MISMATCH;
    case LAR_REASON_INTERRUPTED:
      return LAR_ERROR_INTERRUPTED;
    case LAR_REASON_EXPIRED:
    case LAR_REASON_OVERWRITTEN:
    case LAR_REASON_EXCHANGE:
      break;
  }
  return LAR_ERROR_TIMEOUT;
}

}  // namespace lar::cpu
