// Where everything lies in a workspace, and in memory of which one store reaches every rank. Part of llm_allreduce.h.
#ifndef LLM_ALLREDUCE_LAYOUT_H_
#define LLM_ALLREDUCE_LAYOUT_H_

#include <stdint.h>

// Where a kind of slots lies; offsets in bytes from the base of a rank's workspace. A slot of 0 bytes: there are none.
typedef struct lar_slots {
  int64_t one_shot_offset;
  int64_t one_shot_bytes;  // of one slot
  int64_t scatter_offset;
  int64_t gather_offset;
  int64_t two_shot_bytes;  // of one slot
  // Flagged, not shared: what all lanes' slots of all generations hold of one rank, scatter or gather. A staged call
  // takes them as one.
  int64_t staged_bytes;
  // In band, not shared: of one generation, in which ONESHOT's slots and TWOSHOT's take the same bytes.
  int64_t generation_bytes;
} lar_slots;

// When a stage of a staged call happened, in nanoseconds of this GPU's clock.
typedef struct lar_stage_times {
  int64_t began;     // before the first store to the stage's target
  int64_t sent;      // once all stores have arrived there
  int64_t received;  // once all that the stage's source stores here has arrived
} lar_stage_times;

// Where everything lies inside one rank's workspace. The same on every rank; offsets in bytes from its base.
//   local       what only this rank touches (lar_workspace.local):
//     abort     uint32                               set once a wait has expired
//     arrivals  uint32                               staged: lanes that have ended the stage; 0 between stages
//     begun     uint32 [16384]                       how often the graph, or eager call, of this word has begun
//     calls     uint32                               CPU ranks: calls that this rank has begun
//     epochs    uint32 [plane][lane]                 calls, or rounds that this lane has finished
//     lengths   uint32 [plane][generation 4][lane]   shared in band: vectors that lie in that generation
//     stages    lar_stage_times [stage % 128]        staged: what nothing depends on, for tests and measurements
//   flags       uint32 [plane][lane][flag_words]     written by peers, by rank: the newest round that it has published
//   records     lar_call_record [call % 8]           CPU ranks: what this rank's newest calls are, read by peers
//
// Flagged slots, where flags tell lane by lane when a slot may be read:
//   one_shot    [generation 4][source rank][lane][one_shot_bytes]
//   scatter     [generation 4][source rank][lane][two_shot_bytes]   partial sums on their way to their owner
//   gather      [generation 4][owner rank][lane][two_shot_bytes]    results on their way back
// Staged calls see scatter and gather as [rank][staged_bytes]; device/staged_lane.cuh says why they may.
// In-band slots, with readiness in the data, shared by all lanes, LAR_IN_BAND_MARKER everywhere before the first call
// (GPUs only). A generation is of one call, whose algorithm uses all of it. Peers are counted from the holder's next
// rank on; a generation is, of generation_bytes,
//   ONESHOT     one_shot [peer][one_shot_bytes]
//   TWOSHOT     scatter [peer][two_shot_bytes], gather [peer][two_shot_bytes]
// and the offsets are those in the first of [generation 2].
//
// Shared (1): all workspaces lie in one memory that is as near to every rank, host memory. What several ranks are to
// read is stored once, in the workspace of the rank that it comes from, and read there by all; only `scatter`, where
// every reader gets something else, lies with the readers. Then these regions have no dimension of peers:
//   flagged     one_shot, gather  [generation 4][lane][..bytes]
//   in band     one_shot, gather  [generation 4][..bytes]; scatter [generation 4][peer][..bytes]
typedef struct lar_layout {
  int32_t world_size;
  int32_t lanes;
  int32_t shared;
  int32_t flag_words;  // of a lane: at least one for each rank, in whole sectors of 64 bytes
  int64_t abort_offset;
  int64_t arrivals_offset;
  int64_t begun_offset;
  int64_t calls_offset;
  int64_t epochs_offset;
  int64_t lengths_offset;
  int64_t stages_offset;
  int64_t local_bytes;  // of the local part, which comes first
  int64_t flags_offset;
  int64_t probe_offset;
  int64_t records_offset;
  lar_slots in_band;
  lar_slots flagged;
  int64_t total_bytes;
} lar_layout;

// The 32-bit word that says "not yet written": -0 as fp32, or a 16-bit +0 and -0. Senders turn an input word that
// happens to be it into zeros, which no fp32 sum starting from +0 can tell apart; results never contain a -0.
#define LAR_IN_BAND_MARKER 0x80000000u

// Where everything lies in memory of which one store reaches every rank; offsets in bytes, the same on every rank.
//   one_shot  [generation 2][source rank][one_shot_bytes]
//   results   [vector of the message]                       what owners have summed, TWOSHOT
//   inputs    [vector of the message]                       what the switch sums, LAR_IN_SWITCH; 0 bytes: nothing
// Slots hold LAR_IN_BAND_MARKER everywhere before the first call; inputs need nothing.
typedef struct lar_multicast_layout {
  int64_t one_shot_offset;
  int64_t one_shot_bytes;  // of one slot
  int64_t results_offset;
  int64_t results_bytes;  // of all ranks' parts together
  int64_t inputs_offset;
  int64_t inputs_bytes;
  int64_t total_bytes;
} lar_multicast_layout;

// What a workspace is to hold.
typedef struct lar_layout_sizes {
  int32_t world_size;
  int32_t lanes;
  int32_t shared;         // see lar_layout
  int64_t in_band_bytes;  // for in-band slots; 0: none. What does not fit a layout is rounded down.
  int64_t flagged_bytes;  // for flagged slots; 0: none
} lar_layout_sizes;

#endif  // LLM_ALLREDUCE_LAYOUT_H_
