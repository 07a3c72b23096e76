// What CUDA and CPU ranks share: the workspace layout and the argument checks.
#include "common.h"

#include <cstdio>

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

}  // namespace

bool supported_world_size(int32_t world_size) {
  return (world_size >= 2 && world_size <= 8) || world_size == LAR_MAX_WORLD_SIZE;
}

int check_call(const lar_workspace* workspace, const lar_message* message, const lar_launch* launch,
               int64_t chunk_bytes) {
  if (!workspace || !message || !launch) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  if (!supported_world_size(layout.world_size)) return LAR_ERROR_INVALID_ARGUMENT;
  if (workspace->rank < 0 || workspace->rank >= layout.world_size) return LAR_ERROR_INVALID_ARGUMENT;
  if (message->count < 0 || message->dtype < LAR_FLOAT32 || message->dtype > LAR_BFLOAT16)
    return LAR_ERROR_INVALID_ARGUMENT;
  if (message->count > 0 && (!message->input || !message->output)) return LAR_ERROR_INVALID_ARGUMENT;
  if (launch->lanes < 1 || launch->lanes > layout.lanes) return LAR_ERROR_INVALID_ARGUMENT;
  // Whole warps, and one thread per peer to publish and to poll.
  const int most_threads = launch->in_band ? LAR_MAX_THREADS : LAR_MAX_FLAGGED_THREADS;
  if (launch->threads < 32 || launch->threads > most_threads || launch->threads % 32 != 0)
    return LAR_ERROR_INVALID_ARGUMENT;
  if (launch->chunk_vectors < 1 || launch->chunk_vectors > chunk_bytes / LAR_VECTOR_BYTES)
    return LAR_ERROR_INVALID_ARGUMENT;
  // Some lane must be left for what the specialized ones do not do.
  if (launch->scatter_lanes < 0 || launch->drain_lanes < 0 ||
      launch->scatter_lanes + launch->drain_lanes >= launch->lanes)
    return LAR_ERROR_INVALID_ARGUMENT;
  // Staging makes no difference between two ranks, and in memory that all share there are no streams between ranks.
  if (launch->staged && (launch->in_band || layout.published || layout.world_size < 3))
    return LAR_ERROR_INVALID_ARGUMENT;
  return LAR_OK;
}

int check_codec_call(lar_wire_format format, lar_dtype dtype, const void* values, int64_t count, const void* packets,
                     int32_t* packet_values, int32_t* packet_bytes) {
  if (dtype < LAR_FLOAT32 || dtype > LAR_BFLOAT16 || count < 0) return LAR_ERROR_INVALID_ARGUMENT;
  if (count > 0 && (!values || !packets)) return LAR_ERROR_INVALID_ARGUMENT;
  return lar_packet_size(format, packet_values, packet_bytes);
}

namespace {

// How many slots there are of each kind, over all lanes.
struct SlotCounts {
  int64_t one_shot;
  int64_t scatter;
  int64_t gather;
};

SlotCounts in_band_counts(const lar_layout_wish& wish) {
  const int64_t peers = wish.world_size - 1;
  if (wish.published) return {LAR_PUBLISHED_SLOTS, LAR_PUBLISHED_SLOTS * peers, LAR_PUBLISHED_SLOTS};
  return {LAR_IN_BAND_SLOTS * peers, LAR_IN_BAND_SLOTS * peers, LAR_IN_BAND_SLOTS * peers};
}

SlotCounts flagged_counts(const lar_layout_wish& wish) {
  const int64_t once = LAR_SLOTS * int64_t{wish.lanes};
  const int64_t pushed = once * wish.world_size;
  return {wish.published ? once : pushed, pushed, wish.published ? once : pushed};
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

extern "C" int lar_layout_init(lar_layout* layout, const lar_layout_wish* wish) {
  using namespace lar;
  if (!layout || !wish || !supported_world_size(wish->world_size)) return LAR_ERROR_INVALID_ARGUMENT;
  if (wish->lanes < 1 || wish->lanes > LAR_MAX_LANES) return LAR_ERROR_INVALID_ARGUMENT;
  if (wish->in_band_bytes < 0 || wish->flagged_bytes < 0) return LAR_ERROR_INVALID_ARGUMENT;

  lar_layout out{};
  out.world_size = wish->world_size;
  out.lanes = wish->lanes;
  out.published = wish->published ? 1 : 0;
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
  out.epochs_offset = take(static_cast<int64_t>(EpochPlane::kNumber) * wish->lanes);
  out.extents_offset = take(static_cast<int64_t>(ExtentPlane::kNumber) * LAR_PUBLISHED_SLOTS * wish->lanes);
  out.stages_offset = take(LAR_STAGE_TIMES * static_cast<int64_t>(sizeof(lar_stage_times) / sizeof(uint32_t)));
  out.local_bytes = offset;
  out.flags_offset = take(static_cast<int64_t>(FlagPlane::kNumber) * wish->lanes * LAR_MAX_WORLD_SIZE);
  out.probe_offset = take(LAR_MAX_WORLD_SIZE);
  out.records_offset = take(LAR_CALL_RECORDS * static_cast<int64_t>(sizeof(lar_call_record) / sizeof(uint32_t)));

  // With two ranks one-shot sends no more than two-shot and serves large messages too; with more, only small ones (but
  // with flags, every lane has slots of its own, which must not become too small).
  const auto for_one_shot = [&](int64_t bytes, int64_t otherwise) {
    return wish->world_size == 2 ? bytes / 4 * 3 : bytes / otherwise;
  };
  if (const int64_t bytes = wish->in_band_bytes; bytes > 0) {
    // Published, only small messages are sent in band, by either algorithm.
    const int64_t one_shot = wish->published ? bytes / 5 * 2 : for_one_shot(bytes, 8);
    out.in_band = split(bytes, one_shot, in_band_counts(*wish), &offset);
    if (!holds_vectors(out.in_band)) return LAR_ERROR_INVALID_ARGUMENT;
  }
  if (const int64_t bytes = wish->flagged_bytes; bytes > 0) {
    out.flagged = split(bytes, for_one_shot(bytes, 4), flagged_counts(*wish), &offset);
    if (!holds_vectors(out.flagged)) return LAR_ERROR_INVALID_ARGUMENT;
    if (!wish->published) out.flagged.staged_bytes = LAR_SLOTS * wish->lanes * out.flagged.two_shot_bytes;
  }
  out.total_bytes = offset;
  *layout = out;
  return LAR_OK;
}

extern "C" int lar_abi_version(void) { return 7; }
