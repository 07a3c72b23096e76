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
  const int64_t unit = bytes < kAlignment ? LAR_VECTOR_BYTES : kAlignment;
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
  const int most_threads = layout.in_band ? LAR_MAX_THREADS : LAR_MAX_FLAGGED_THREADS;
  if (launch->threads < 32 || launch->threads > most_threads || launch->threads % 32 != 0)
    return LAR_ERROR_INVALID_ARGUMENT;
  if (launch->chunk_vectors < 1 || launch->chunk_vectors > chunk_bytes / LAR_VECTOR_BYTES)
    return LAR_ERROR_INVALID_ARGUMENT;
  // Some lane must be left for what the specialized ones do not do.
  if (launch->scatter_lanes < 0 || launch->drain_lanes < 0 ||
      launch->scatter_lanes + launch->drain_lanes >= launch->lanes)
    return LAR_ERROR_INVALID_ARGUMENT;
  return LAR_OK;
}

int check_codec_call(lar_wire_format format, lar_dtype dtype, const void* values, int64_t count, const void* packets,
                     int32_t* packet_values, int32_t* packet_bytes) {
  if (dtype < LAR_FLOAT32 || dtype > LAR_BFLOAT16 || count < 0) return LAR_ERROR_INVALID_ARGUMENT;
  if (count > 0 && (!values || !packets)) return LAR_ERROR_INVALID_ARGUMENT;
  return lar_packet_size(format, packet_values, packet_bytes);
}

}  // namespace lar

extern "C" int lar_layout_init(lar_layout* layout, int32_t world_size, int32_t lanes, int32_t in_band, int64_t bytes) {
  using namespace lar;
  if (!layout || !supported_world_size(world_size)) return LAR_ERROR_INVALID_ARGUMENT;
  if (lanes < 1 || lanes > LAR_MAX_LANES) return LAR_ERROR_INVALID_ARGUMENT;

  lar_layout out{};
  out.world_size = world_size;
  out.lanes = lanes;
  out.in_band = in_band ? 1 : 0;
  int64_t offset = 0;
  auto take = [&offset](int64_t size) {
    const int64_t at = offset;
    offset += align_up(size);
    return at;
  };
  out.abort_offset = take(sizeof(uint32_t));
  out.epochs_offset = take(int64_t{3} * lanes * sizeof(uint32_t));
  out.flags_offset = take(int64_t{3} * lanes * LAR_MAX_WORLD_SIZE * sizeof(uint32_t));
  out.probe_offset = take(LAR_MAX_WORLD_SIZE * sizeof(uint32_t));

  constexpr int kRegions = 3;
  const int64_t payload = bytes - offset - kRegions * kAlignment;
  const int64_t slots =
      out.in_band ? LAR_IN_BAND_SLOTS * int64_t{world_size - 1} : LAR_SLOTS * int64_t{world_size} * lanes;
  // With two ranks one-shot sends no more than two-shot and serves large messages too; with more, only small ones (but
  // with flags, every lane has slots of its own, which must not become too small).
  const int64_t one_shot = world_size == 2 ? payload / 4 * 3 : payload / (out.in_band ? 8 : 4);
  out.one_shot_chunk_bytes = slot_bytes(one_shot / slots);
  out.two_shot_chunk_bytes = slot_bytes((payload - one_shot) / (2 * slots));
  if (out.one_shot_chunk_bytes < LAR_VECTOR_BYTES || out.two_shot_chunk_bytes < LAR_VECTOR_BYTES)
    return LAR_ERROR_INVALID_ARGUMENT;
  out.one_shot_offset = take(slots * out.one_shot_chunk_bytes);
  out.scatter_offset = take(slots * out.two_shot_chunk_bytes);
  out.gather_offset = take(slots * out.two_shot_chunk_bytes);
  out.total_bytes = offset;
  *layout = out;
  return LAR_OK;
}

extern "C" int lar_abi_version(void) { return 4; }
