// How a workspace is laid out.
#include "host/layout.h"

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

SlotCounts in_band_counts(const lar_layout_sizes& sizes) {
  const int64_t peers = sizes.world_size - 1;
  if (sizes.shared) return {LAR_SHARED_SLOTS, LAR_SHARED_SLOTS * peers, LAR_SHARED_SLOTS};
  return {LAR_PUSH_SLOTS * peers, LAR_PUSH_SLOTS * peers, LAR_PUSH_SLOTS * peers};
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

bool holds_vectors(const lar_slots& slots) {
  return slots.one_shot_bytes >= LAR_VECTOR_BYTES && slots.two_shot_bytes >= LAR_VECTOR_BYTES;
}

}  // namespace
}  // namespace lar

extern "C" int lar_layout_init(lar_layout* layout, const lar_layout_sizes* sizes) {
  using namespace lar;
  if (!layout || !sizes) return LAR_ERROR_INVALID_ARGUMENT;
  const bool is_alone = sizes->world_size == 1 && sizes->in_band_bytes == 0;
  if (!supported_world_size(sizes->world_size) && !is_alone) return LAR_ERROR_INVALID_ARGUMENT;
  if (sizes->lanes < 1 || sizes->lanes > LAR_MAX_LANES) return LAR_ERROR_INVALID_ARGUMENT;
  if (sizes->in_band_bytes < 0 || sizes->flagged_bytes < 0) return LAR_ERROR_INVALID_ARGUMENT;

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

  // With two ranks one-shot sends no more than two-shot and serves large messages too; with more, only small ones (but
  // with flags, every lane has slots of its own, which must not become too small).
  const auto for_one_shot = [&](int64_t bytes, int64_t otherwise) {
    return sizes->world_size == 2 ? bytes / 4 * 3 : bytes / otherwise;
  };
  if (const int64_t bytes = sizes->in_band_bytes; bytes > 0) {
    // Shared, only small messages are sent in band, by either algorithm.
    const int64_t one_shot = sizes->shared ? bytes / 5 * 2 : for_one_shot(bytes, 8);
    out.in_band = split(bytes, one_shot, in_band_counts(*sizes), &offset);
    if (!holds_vectors(out.in_band)) return LAR_ERROR_INVALID_ARGUMENT;
  }
  if (const int64_t bytes = sizes->flagged_bytes; bytes > 0) {
    out.flagged = split(bytes, for_one_shot(bytes, 4), flagged_counts(*sizes), &offset);
    if (!holds_vectors(out.flagged)) return LAR_ERROR_INVALID_ARGUMENT;
    if (!sizes->shared) out.flagged.staged_bytes = LAR_SLOTS * sizes->lanes * out.flagged.two_shot_bytes;
  }
  out.total_bytes = offset;
  *layout = out;
  return LAR_OK;
}

extern "C" int64_t lar_sum_elements(int64_t count, int32_t parts) {
  return count > 0 && parts > 0 ? lar::part_elements(count, parts) : 0;
}

extern "C" int lar_abi_version(void) { return 11; }
