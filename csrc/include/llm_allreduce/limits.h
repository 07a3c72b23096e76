// How many and how large: limits of groups, calls and workspaces. Part of llm_allreduce.h.
#ifndef LLM_ALLREDUCE_LIMITS_H_
#define LLM_ALLREDUCE_LIMITS_H_

enum {
  LAR_CPU = -1,                 // lar_workspace.device of a CPU rank
  LAR_MAX_WORLD_SIZE = 72,      // an NVLink domain
  LAR_MAX_HOSTS = 1024,         // whose sums are summed
  LAR_VECTOR_BYTES = 16,        // the unit in which messages are split: one 128-bit access
  LAR_MAX_LANES = 1024,         // blocks that may take part in one call
  LAR_MAX_THREADS = 512,        // threads per block
  LAR_MAX_WIDE_THREADS = 1024,  // the same where a block takes a row, at a vector to a thread (LAR_RMS_NORM)
  // The same for kernels that wait for flags or go through host memory, which keep more in registers and have one more
  // warp (device/lane.cuh).
  LAR_MAX_FLAGGED_THREADS = 256,
  LAR_MAX_STAGED_THREADS = 224,  // the same for staged kernels, which keep more still
  // Generations of slots, used by turns; csrc/protocol/ and csrc/device/in_band.cuh say why they are enough.
  LAR_SLOTS = 4,
  LAR_PUSH_SLOTS = 2,
  LAR_SHARED_SLOTS = 4,
  LAR_STAGE_TIMES = 128,      // the newest stages whose times a rank keeps
  LAR_BEGUN_WORDS = 1 << 14,  // first calls of graphs that are told apart; see lar_workspace.begun
  LAR_CALL_RECORDS = 8,       // the newest calls that a CPU rank tells its peers of
};

#endif  // LLM_ALLREDUCE_LIMITS_H_
