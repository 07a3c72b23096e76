// What a rank has of its group: the workspaces, and what has broken them. Part of llm_allreduce.h.
#ifndef LLM_ALLREDUCE_WORKSPACE_H_
#define LLM_ALLREDUCE_WORKSPACE_H_

#include <stdint.h>

#include "llm_allreduce/kinds.h"
#include "llm_allreduce/layout.h"
#include "llm_allreduce/limits.h"

#ifdef __cplusplus
extern "C" {
#endif

// What a rank has of memory of which one store reaches every rank. A store to `all` reaches every rank's memory, its
// own included, at some time of each.
typedef struct lar_multicast {
  void* all;  // null: there is none, and calls of LAR_MULTICAST and LAR_IN_SWITCH are refused
  void* own;  // where this rank sees its own memory
  lar_multicast_layout layout;
} lar_multicast;

// What a CPU rank tells its peers of a call: ranks that make different calls must hear of it, not get a wrong sum.
typedef struct lar_call_record {
  uint32_t call;  // by number, from 1 on; written last
  lar_kind kind;
  int32_t dtype;
  int64_t count;
} lar_call_record;

// What a rank was waiting for when it gave up.
typedef enum lar_phase {
  LAR_PHASE_GATHER = 0,
  LAR_PHASE_SCATTER = 1,
  LAR_PHASE_EXCHANGE = 2,
  LAR_PHASE_OUTPUT = 3,  // LAR_PLACE: the peer's output may be written
} lar_phase;

// Why a group is broken.
typedef enum lar_reason {
  LAR_REASON_EXPIRED = 0,      // a wait has expired
  LAR_REASON_MISMATCH = 1,     // `peer` makes another call
  LAR_REASON_OVERWRITTEN = 2,  // a flag is far ahead of its round, where no peer can be: somebody else wrote there
  LAR_REASON_INTERRUPTED = 3,  // a wait was left before its end
  LAR_REASON_EXCHANGE = 4,     // an exchange between hosts has failed, says the host: what `state` 2 stands for
} lar_reason;

// Written by the device (or by a CPU rank) when a bounded wait expires, read by the host at any time. `any_gone` and
// `gone` are written by the host; `state`, too, when an exchange between hosts has failed, before a second half begins.
// The host leaves the other fields alone then: a wait that expires at the same time may be writing them.
typedef struct lar_failure {
  // 0: none, 1: the other fields are valid, 2: the host says that an exchange between hosts has failed. From 0, by
  // compare-exchange, to 2; from either to 1.
  volatile int32_t state;
  int32_t reason;        // lar_reason
  lar_call_record mine;  // of a mismatch
  lar_call_record theirs;
  volatile uint32_t exchanges_begun;          // first halves (lar_algorithm) that have ended, see LAR_REDUCE
  volatile uint32_t exchanges_ended;          // second halves that have begun
  volatile int32_t any_gone;                  // whether any of these is set
  volatile uint8_t gone[LAR_MAX_WORLD_SIZE];  // by rank: it will never come (again)
  int32_t rank;
  int32_t peer;
  lar_kind kind;
  int32_t phase;  // lar_phase
  int32_t lane;
  uint32_t expected_round;
  uint32_t seen_round;
  int64_t waited_ns;
} lar_failure;

// One rank's view of the group: its own workspace and, at base[peer], every peer's.
typedef struct lar_workspace {
  int32_t rank;
  int32_t device;  // its number, or LAR_CPU
  void* base[LAR_MAX_WORLD_SIZE];
  void*
      local;  // base[rank], or memory of this rank's own where workspaces are far away: lar_layout.local_bytes, zeroed
  lar_layout layout;
  lar_multicast multicast;
  lar_failure* failure;  // host memory; on CUDA the address at which the device sees it
  int64_t timeout_ns;    // no wait lasts longer
  // For the first eager call and the first run of each graph, before which ranks may compile for minutes: no wait lasts
  // longer than the longer of the two limits. Once a peer is gone, timeout_ns counts alone.
  int64_t first_timeout_ns;
  // Which word of `begun` (lar_layout) counts how often this graph, or this eager call, has begun: while that word is
  // at most 1, the call is a first one. -1: the call is no first one.
  int32_t begun;
  // The call must wait for the end of all that it depends on: its kernels may not start earlier.
  int32_t starts_late;
  // CPU ranks: asked about ten times a second while a call waits, and when a signal interrupts it; non-zero ends the
  // wait. May be null.
  int (*should_leave)(void* context);
  void* should_leave_context;
} lar_workspace;

#ifdef __cplusplus
}
#endif
#endif  // LLM_ALLREDUCE_WORKSPACE_H_
