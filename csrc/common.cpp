// What CUDA and CPU ranks share: the workspace layout and the argument checks.
#include "common.h"

#include <cstdio>

namespace lar {
namespace {

constexpr int64_t kAlignment = 256;  // every region starts on its own cache lines

int64_t align_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int64_t align_down(int64_t bytes) { return bytes / LAR_VECTOR_BYTES * LAR_VECTOR_BYTES; }

}  // namespace

bool supported_world_size(int32_t world_size) {
  return (world_size >= 2 && world_size <= 8) || world_size == LAR_MAX_WORLD_SIZE;
}

int check_call(const lar_workspace* workspace, const lar_message* message, const lar_launch* launch, int parts,
               int64_t chunk_bytes, int64_t in_band_chunk_bytes) {
  if (!workspace || !message || !launch) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  if (!supported_world_size(layout.world_size)) return LAR_ERROR_INVALID_ARGUMENT;
  if (workspace->rank < 0 || workspace->rank >= layout.world_size) return LAR_ERROR_INVALID_ARGUMENT;
  if (message->count < 0 || message->dtype < LAR_FLOAT32 || message->dtype > LAR_BFLOAT16)
    return LAR_ERROR_INVALID_ARGUMENT;
  if (message->count > 0 && (!message->input || !message->output)) return LAR_ERROR_INVALID_ARGUMENT;
  const int32_t lanes = launch->in_band ? layout.in_band_lanes : layout.lanes;
  if (launch->lanes < 1 || launch->lanes > lanes) return LAR_ERROR_INVALID_ARGUMENT;
  // Whole warps, and one thread per peer to publish and to poll.
  if (launch->threads < 32 || launch->threads > LAR_MAX_THREADS || launch->threads % 32 != 0)
    return LAR_ERROR_INVALID_ARGUMENT;
  const int64_t capacity = launch->in_band ? in_band_chunk_bytes : chunk_bytes;
  if (launch->chunk_vectors < 1 || launch->chunk_vectors > capacity / LAR_VECTOR_BYTES)
    return LAR_ERROR_INVALID_ARGUMENT;
  if (launch->in_band) {
    const int64_t vectors = ceil_div(message->count * element_bytes(message->dtype), LAR_VECTOR_BYTES);
    if (vectors > launch->lanes * launch->chunk_vectors * parts) return LAR_ERROR_INVALID_ARGUMENT;
  }
  return LAR_OK;
}

}  // namespace lar

extern "C" int lar_layout_init(lar_layout* layout, int32_t world_size, int32_t lanes, int32_t in_band_lanes,
                               int64_t bytes) {
  using namespace lar;
  if (!layout || !supported_world_size(world_size)) return LAR_ERROR_INVALID_ARGUMENT;
  if (lanes < 1 || lanes > LAR_MAX_LANES || in_band_lanes < 0 || in_band_lanes > LAR_MAX_LANES)
    return LAR_ERROR_INVALID_ARGUMENT;

  lar_layout out{};
  out.world_size = world_size;
  out.lanes = lanes;
  out.in_band_lanes = in_band_lanes;
  int64_t offset = 0;
  auto take = [&offset](int64_t size) {
    const int64_t at = offset;
    offset += align_up(size);
    return at;
  };
  out.abort_offset = take(sizeof(uint32_t));
  out.epochs_offset = take(int64_t{2} * lanes * sizeof(uint32_t));
  out.in_band_state_offset = take(int64_t{2} * in_band_lanes * sizeof(uint32_t));
  out.flags_offset = take(int64_t{3} * lanes * LAR_MAX_WORLD_SIZE * sizeof(uint32_t));
  out.probe_offset = take(LAR_MAX_WORLD_SIZE * sizeof(uint32_t));

  constexpr int kRegions = 6;
  const int64_t payload = bytes - offset - kRegions * kAlignment;
  const int64_t slots = int64_t{world_size} * lanes;
  const int64_t in_band_slots = int64_t{world_size} * in_band_lanes;
  // Sixteenths of the payload space.
  const int64_t sixteenth = payload / 16;
  out.one_shot_chunk_bytes = align_down((in_band_lanes ? 3 : 4) * sixteenth / (LAR_ONE_SHOT_SLOTS * slots));
  out.two_shot_chunk_bytes = align_down((in_band_lanes ? 5 : 12) * sixteenth / (2 * LAR_TWO_SHOT_SLOTS * slots));
  if (out.one_shot_chunk_bytes < LAR_VECTOR_BYTES || out.two_shot_chunk_bytes < LAR_VECTOR_BYTES)
    return LAR_ERROR_INVALID_ARGUMENT;
  if (in_band_lanes) {
    out.one_shot_in_band_chunk_bytes = align_down(4 * sixteenth / (LAR_IN_BAND_SLOTS * in_band_slots));
    out.two_shot_in_band_chunk_bytes = align_down(4 * sixteenth / (2 * LAR_IN_BAND_SLOTS * in_band_slots));
    if (out.one_shot_in_band_chunk_bytes < LAR_VECTOR_BYTES || out.two_shot_in_band_chunk_bytes < LAR_VECTOR_BYTES)
      return LAR_ERROR_INVALID_ARGUMENT;
  }
  out.one_shot_offset = take(LAR_ONE_SHOT_SLOTS * slots * out.one_shot_chunk_bytes);
  out.scatter_offset = take(LAR_TWO_SHOT_SLOTS * slots * out.two_shot_chunk_bytes);
  out.gather_offset = take(LAR_TWO_SHOT_SLOTS * slots * out.two_shot_chunk_bytes);
  out.in_band_offset = offset;
  out.one_shot_in_band_offset = take(LAR_IN_BAND_SLOTS * in_band_slots * out.one_shot_in_band_chunk_bytes);
  out.scatter_in_band_offset = take(LAR_IN_BAND_SLOTS * in_band_slots * out.two_shot_in_band_chunk_bytes);
  out.gather_in_band_offset = take(LAR_IN_BAND_SLOTS * in_band_slots * out.two_shot_in_band_chunk_bytes);
  out.in_band_bytes = offset - out.in_band_offset;
  out.total_bytes = offset;
  *layout = out;
  return LAR_OK;
}

extern "C" int lar_abi_version(void) { return 3; }
