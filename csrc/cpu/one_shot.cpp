// ONESHOT on CPU ranks: the algorithm of kernels/one_shot.cu with one lane per rank, over shared memory.
#include <algorithm>
#include <cstring>

#include "cpu/lane.h"

extern "C" int lar_one_shot_cpu(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape) {
  using namespace lar;
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  const lar_layout& layout = workspace->layout;
  if (const int status = check_call(workspace, message, shape, layout.flagged.one_shot_bytes); status != LAR_OK)
    return status;
  cpu::Call call(*workspace, LAR_ONE_SHOT, *message, -1);
  if (const int status = call.begin(); status != LAR_OK) return status;

  const int element = element_bytes(message->dtype);
  const int64_t chunk = shape->chunk_vectors * LAR_VECTOR_BYTES / element;
  const cpu::Lane lane(call, EpochPlane::kOneShot);
  const int rank = workspace->rank;
  const char* input = static_cast<const char*>(message->input);
  char* output = static_cast<char*>(message->output);

  uint32_t round = lane.epoch();
  for (int64_t start = 0; start < message->count; start += chunk) {
    ++round;
    const int64_t count = std::min(chunk, message->count - start);
    auto slot = [&](int reader, int source) {
      return lane.slot(layout.flagged.one_shot_offset, layout.flagged.one_shot_bytes, reader, source, round, true);
    };
    for (int step = 1; step <= shared_copies(layout); ++step)
      std::memcpy(slot((rank + step) % layout.world_size, rank), input + start * element, count * element);

    lane.publish(FlagPlane::kOneShot, round);
    if (!lane.wait(FlagPlane::kOneShot, LAR_PHASE_GATHER, round)) return lane.broken();

    const void* sources[LAR_MAX_WORLD_SIZE];
    for (int source = 0; source < layout.world_size; ++source)
      sources[source] = source == rank ? input + start * element : slot(rank, source);
    void* outputs[] = {output + start * element};
    cpu::reduce_in_rank_order(message->dtype, sources, layout.world_size, outputs, 1, count);
  }
  lane.finish(round);
  return LAR_OK;
}
