// Typed addresses inside a workspace, and the few words that CUDA kernels and CPU ranks share; not part of the ABI.
#ifndef LLM_ALLREDUCE_HOST_LAYOUT_H_
#define LLM_ALLREDUCE_HOST_LAYOUT_H_

#include "llm_allreduce.h"

#if defined(__CUDACC__)
#define LAR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LAR_HOST_DEVICE inline
#endif

namespace lar {

// Planes of lar_layout::flags, and their number. kPlaceWhere: no rounds, but where an output lies, see
// protocol/place.h.
enum class FlagPlane : int {
  kOneShot,
  kTwoShotScatter,
  kTwoShotGather,
  kPull,
  kStageData,
  kStageGrant,
  kInSwitch,
  kPlaceOutput,
  kPlaceWhere,
  kPlaceDone,
  kNumber
};

// Planes of lar_layout::epochs. What uses slots or flags of its own counts by itself.
// Of kStaged only lane 0's word: stages of earlier calls. kStageOpen: the newest stage that this rank's lanes may
// begin. kExchangeBegun, kExchangeEnded: lane 0's words are what lar_failure says of exchanges between hosts.
// kPlace: calls that store into peers' outputs; their scatter slots are counted as those of the other pushed calls.
// kPushed: in-band calls of every algorithm that use pushed slots, which share two generations. kOneShotShared,
// kTwoShotShared: in-band calls through shared slots, of which each algorithm has generations of its own. kInSwitch:
// LAR_IN_SWITCH, which uses none.
enum class EpochPlane : int {
  kOneShot,
  kTwoShot,
  kPull,
  kPushed,
  kOneShotShared,
  kTwoShotShared,
  kInSwitch,
  kStaged,
  kStageOpen,
  kExchangeBegun,
  kExchangeEnded,
  kPlace,
  kNumber
};

// Planes of lar_layout::lengths.
enum class LengthPlane : int { kOneShot, kTwoShot, kNumber };

LAR_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

LAR_HOST_DEVICE int element_bytes(lar_dtype dtype) { return dtype == LAR_FLOAT32 ? 4 : 2; }

// The values of a packet as they are.
LAR_HOST_DEVICE int raw_packet_bytes(int packet_values, lar_dtype dtype) {
  return packet_values * element_bytes(dtype);
}

// Typed addresses inside a workspace, and inside lar_workspace.local.
LAR_HOST_DEVICE uint32_t* abort_word(void* local, const lar_layout& layout) {
  return reinterpret_cast<uint32_t*>(static_cast<char*>(local) + layout.abort_offset);
}

LAR_HOST_DEVICE uint32_t* arrivals_word(void* local, const lar_layout& layout) {
  return reinterpret_cast<uint32_t*>(static_cast<char*>(local) + layout.arrivals_offset);
}

// The word that counts how often what a call belongs to has begun; null where nobody counts.
inline uint32_t* begun_word(const lar_workspace& workspace) {
  if (workspace.begun < 0) return nullptr;
  return reinterpret_cast<uint32_t*>(static_cast<char*>(workspace.local) + workspace.layout.begun_offset) +
         workspace.begun;
}

// Written by the host when it learns that a rank has ended.
LAR_HOST_DEVICE bool is_gone(const lar_failure& failure, int rank) { return failure.gone[rank] != 0; }

inline uint32_t* calls_word(const lar_workspace& workspace) {
  return reinterpret_cast<uint32_t*>(static_cast<char*>(workspace.local) + workspace.layout.calls_offset);
}

inline lar_call_record* call_record(const lar_workspace& workspace, int rank, uint32_t call) {
  return reinterpret_cast<lar_call_record*>(static_cast<char*>(workspace.base[rank]) +
                                            workspace.layout.records_offset) +
         call % LAR_CALL_RECORDS;
}

LAR_HOST_DEVICE lar_stage_times* stage_times(void* local, const lar_layout& layout, uint32_t stage) {
  return reinterpret_cast<lar_stage_times*>(static_cast<char*>(local) + layout.stages_offset) + stage % LAR_STAGE_TIMES;
}

LAR_HOST_DEVICE uint32_t* epoch_word(void* local, const lar_layout& layout, EpochPlane plane, int lane) {
  return reinterpret_cast<uint32_t*>(static_cast<char*>(local) + layout.epochs_offset) +
         static_cast<int>(plane) * layout.lanes + lane;
}

// The row of flags of one lane: one word per publishing rank.
LAR_HOST_DEVICE uint32_t* flag_row(void* base, const lar_layout& layout, FlagPlane plane, int lane) {
  const int64_t row = static_cast<int64_t>(plane) * layout.lanes + lane;
  return reinterpret_cast<uint32_t*>(static_cast<char*>(base) + layout.flags_offset) + row * layout.flag_words;
}

LAR_HOST_DEVICE uint32_t* probe_words(void* base, const lar_layout& layout) {
  return reinterpret_cast<uint32_t*>(static_cast<char*>(base) + layout.probe_offset);
}

// What counts the in-band calls of an algorithm; LAR_IN_SWITCH has a plane of its own.
inline EpochPlane in_band_epochs(const lar_layout& layout, int algorithm) {
  if (!layout.shared) return EpochPlane::kPushed;
  return algorithm == LAR_ONE_SHOT ? EpochPlane::kOneShotShared : EpochPlane::kTwoShotShared;
}

// From a pushed slot of `bytes` to that of the same writer in the next generation. Shared, only scatter slots are
// pushed, and each generation of them follows the last.
inline int64_t pushed_generation_bytes(const lar_layout& layout, int64_t bytes) {
  return layout.shared ? (layout.world_size - 1) * bytes : layout.in_band.generation_bytes;
}

// How many vectors lie in each shared generation, as each lane knows it.
LAR_HOST_DEVICE uint32_t* length_words(void* local, const lar_layout& layout, LengthPlane plane) {
  return reinterpret_cast<uint32_t*>(static_cast<char*>(local) + layout.lengths_offset) +
         static_cast<int>(plane) * LAR_SHARED_SLOTS * layout.lanes;
}

// Byte offset of flagged slot [ring][rank][lane] in a region of equal slots for `ranks` ranks.
LAR_HOST_DEVICE int64_t slot_offset(const lar_layout& layout, int64_t region_offset, int64_t slot_bytes, int ring,
                                    int ranks, int rank, int lane) {
  const int64_t slot = (static_cast<int64_t>(ring) * ranks + rank) * layout.lanes + lane;
  return region_offset + slot * slot_bytes;
}

// The flagged slot in which what rank `source` stores is for rank `reader`. `shared`: all readers get the same, so that
// in a shared layout there is one slot for all of them.
LAR_HOST_DEVICE char* flagged_slot(const lar_workspace& workspace, int64_t region_offset, int64_t slot_bytes, int ring,
                                   int reader, int source, int lane, bool shared) {
  const lar_layout& layout = workspace.layout;
  const bool once = shared && layout.shared;
  return static_cast<char*>(workspace.base[once ? source : reader]) +
         slot_offset(layout, region_offset, slot_bytes, ring, once ? 1 : layout.world_size, once ? 0 : source, lane);
}

// Slots that a rank stores what all others are to read in.
LAR_HOST_DEVICE int shared_copies(const lar_layout& layout) { return layout.shared ? 1 : layout.world_size - 1; }

// True once a peer has published `round`. Rounds are 32-bit and wrap after about half a day of serving, so
// they are compared by distance, never by size. A peer is ahead by no more than the slots of a ring have generations,
// or the stages of a staged call peers; a flag that is further ahead was not written by a peer, and opens nothing.
constexpr uint32_t kMostRoundsAhead = 256;
static_assert(kMostRoundsAhead > LAR_SLOTS && kMostRoundsAhead > 2 * LAR_MAX_WORLD_SIZE,
              "no peer may look overwritten");
LAR_HOST_DEVICE bool reached(uint32_t seen, uint32_t round) { return seen - round < kMostRoundsAhead; }
LAR_HOST_DEVICE bool overwritten(uint32_t seen, uint32_t round) {
  return !reached(seen, round) && static_cast<int32_t>(seen - round) > 0;
}

// What a probe word must be: differs per writer, per reader and per run.
LAR_HOST_DEVICE uint32_t probe_pattern(uint32_t nonce, int writer, int reader) {
  return (nonce ^ 0x9e3779b9u) * 2654435761u + static_cast<uint32_t>(writer * LAR_MAX_WORLD_SIZE + reader + 1);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_HOST_LAYOUT_H_
