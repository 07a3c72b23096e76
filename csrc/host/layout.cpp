// How a workspace is laid out.
#include "host/layout.h"

#include <algorithm>

#include "host/check.h"
#include "protocol/hosts.h"

namespace lar {
namespace {

constexpr int64_t kAlignment = 256;  // every region and every slot starts on its own cache lines

int64_t align_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Slots that start within a cache line make every packet on the links two, which
// large messages feel. Only workspaces of the smallest size cannot afford whole lines.
int64_t slot_bytes(int64_t bytes) {
  const int64_t unit = bytes < kAlignment ? int64_t{LAR_VECTOR_BYTES} : kAlignment;
  return bytes / unit * unit;
}

// How many slots there are of each kind, over all lanes.
struct SlotCounts {
  int64_t one_shot;
  int64_t scatter;
  int64_t gather;
};

SlotCounts shared_in_band_counts(const lar_layout_sizes& sizes) {
  return {LAR_SHARED_SLOTS, int64_t{LAR_SHARED_SLOTS} * (sizes.world_size - 1), LAR_SHARED_SLOTS};
}

SlotCounts flagged_counts(const lar_layout_sizes& sizes) {
  const int64_t once = LAR_SLOTS * int64_t{sizes.lanes};
  const int64_t pushed = once * sizes.world_size;
  return {sizes.shared ? once : pushed, pushed, sizes.shared ? once : pushed};
}

// Splits `bytes` among the slots, `one_shot_bytes` of them for ONESHOT. Offsets count from `offset`, which moves on.
lar_slots split(int64_t bytes, int64_t one_shot_bytes, const SlotCounts& counts, int64_t* offset) {
  const auto take = [offset](int64_t size) {
    const int64_t at = *offset;
    *offset += align_up(size);
    return at;
  };
  constexpr int kRegions = 3;
  lar_slots out{};
  out.one_shot_bytes = slot_bytes(one_shot_bytes / counts.one_shot);
  out.two_shot_bytes = slot_bytes((bytes - one_shot_bytes - kRegions * kAlignment) / (counts.scatter + counts.gather));
  out.one_shot_offset = take(counts.one_shot * out.one_shot_bytes);
  out.scatter_offset = take(counts.scatter * out.two_shot_bytes);
  out.gather_offset = take(counts.gather * out.two_shot_bytes);
  return out;
}

// Two generations of `bytes` together, in which the slots of both algorithms are the same bytes.
lar_slots pushed_slots(int64_t bytes, int64_t peers, int64_t* offset) {
  lar_slots out{};
  out.generation_bytes = bytes / LAR_PUSH_SLOTS / kAlignment * kAlignment;
  out.one_shot_bytes = slot_bytes(out.generation_bytes / peers);
  out.two_shot_bytes = slot_bytes(out.generation_bytes / (2 * peers));
  out.one_shot_offset = *offset;
  out.scatter_offset = *offset;
  out.gather_offset = *offset + peers * out.two_shot_bytes;
  *offset += LAR_PUSH_SLOTS * out.generation_bytes;
  return out;
}

bool holds_vectors(const lar_slots& slots) {
  return slots.one_shot_bytes >= LAR_VECTOR_BYTES && slots.two_shot_bytes >= LAR_VECTOR_BYTES;
}

}  // namespace
}  // namespace lar

extern "C" int lar_layout_init(lar_layout* layout, const lar_layout_sizes* sizes) {
  using namespace lar;
  if (!layout || !sizes) return refuse("layout, sizes: null");
  const bool is_alone = sizes->world_size == 1 && sizes->in_band_bytes == 0;
  if (!supported_world_size(sizes->world_size) && !is_alone) return refuse("world_size: not supported");
  if (sizes->lanes < 1 || sizes->lanes > LAR_MAX_LANES) return refuse("lanes: not from 1 to LAR_MAX_LANES");
  if (sizes->in_band_bytes < 0 || sizes->flagged_bytes < 0) return refuse("in_band_bytes, flagged_bytes: negative");

  lar_layout out{};
  out.world_size = sizes->world_size;
  out.lanes = sizes->lanes;
  out.shared = sizes->shared ? 1 : 0;
  constexpr int kSectorWords = 16;
  out.flag_words = (sizes->world_size + kSectorWords - 1) / kSectorWords * kSectorWords;
  int64_t offset = 0;
  auto take = [&offset](int64_t words) {
    const int64_t at = offset;
    offset += align_up(words * static_cast<int64_t>(sizeof(uint32_t)));
    return at;
  };
  out.abort_offset = take(1);
  out.arrivals_offset = take(1);
  out.begun_offset = take(LAR_BEGUN_WORDS);
  out.calls_offset = take(1);
  out.epochs_offset = take(static_cast<int64_t>(EpochPlane::kNumber) * sizes->lanes);
  out.lengths_offset = take(static_cast<int64_t>(LengthPlane::kNumber) * LAR_SHARED_SLOTS * sizes->lanes);
  out.stages_offset = take(LAR_STAGE_TIMES * static_cast<int64_t>(sizeof(lar_stage_times) / sizeof(uint32_t)));
  out.local_bytes = offset;
  out.flags_offset = take(static_cast<int64_t>(FlagPlane::kNumber) * sizes->lanes * out.flag_words);
  out.probe_offset = take(LAR_MAX_WORLD_SIZE);
  out.records_offset = take(LAR_CALL_RECORDS * static_cast<int64_t>(sizeof(lar_call_record) / sizeof(uint32_t)));

  if (const int64_t bytes = sizes->in_band_bytes; bytes > 0) {
    // Shared, only small messages are sent in band, by either algorithm.
    out.in_band = sizes->shared ? split(bytes, bytes / 5 * 2, shared_in_band_counts(*sizes), &offset)
                                : pushed_slots(bytes, sizes->world_size - 1, &offset);
    if (!holds_vectors(out.in_band)) return refuse("in_band_bytes: a slot would hold no vector");
  }
  if (const int64_t bytes = sizes->flagged_bytes; bytes > 0) {
    // With two ranks one-shot sends no more than two-shot and serves large messages too; with more, only small ones,
    // but every lane has slots of its own, which must not become too small.
    const int64_t one_shot = sizes->world_size == 2 ? bytes / 4 * 3 : bytes / 4;
    out.flagged = split(bytes, one_shot, flagged_counts(*sizes), &offset);
    if (!holds_vectors(out.flagged)) return refuse("flagged_bytes: a slot would hold no vector");
    if (!sizes->shared) out.flagged.staged_bytes = LAR_SLOTS * sizes->lanes * out.flagged.two_shot_bytes;
  }
  out.total_bytes = offset;
  *layout = out;
  return LAR_OK;
}

extern "C" int lar_multicast_layout_init(lar_multicast_layout* layout, int32_t world_size, int64_t bytes,
                                         int32_t in_switch) {
  using namespace lar;
  if (!layout || !supported_world_size(world_size) || bytes < 0)
    return refuse("layout, world_size, bytes: null, not supported, or negative");
  // Small messages alone take one step: every rank has a slot, and there are two generations.
  const int64_t one_shot_slots = int64_t{LAR_PUSH_SLOTS} * world_size;
  lar_multicast_layout out{};
  out.one_shot_bytes = slot_bytes(bytes / 8 / one_shot_slots);
  out.results_offset = align_up(one_shot_slots * out.one_shot_bytes);
  const int64_t rest = bytes - out.results_offset;
  out.results_bytes = slot_bytes((in_switch ? rest / 2 : rest) / world_size) * world_size;
  out.inputs_offset = align_up(out.results_offset + out.results_bytes);
  out.inputs_bytes =
      in_switch ? std::min(out.results_bytes, bytes - out.inputs_offset) / LAR_VECTOR_BYTES * LAR_VECTOR_BYTES : 0;
  out.total_bytes = bytes;
  if (out.one_shot_bytes < LAR_VECTOR_BYTES || out.results_bytes < int64_t{LAR_VECTOR_BYTES} * world_size ||
      (in_switch && out.inputs_bytes < int64_t{LAR_VECTOR_BYTES} * world_size))
    return refuse("bytes: a slot would hold no vector");
  *layout = out;
  return LAR_OK;
}

extern "C" int64_t lar_sum_elements(int64_t count, int32_t parts) {
  return count > 0 && parts > 0 ? lar::part_elements(count, parts) : 0;
}

extern "C" int lar_abi_version(void) { return 13; }
