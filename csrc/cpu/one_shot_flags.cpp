// ONESHOT by flags on CPU ranks: the steps of protocol/one_shot.h with one lane per rank, over shared memory.
#include "cpu/lane.h"
#include "cpu/units.h"
#include "host/registry.h"
#include "protocol/one_shot.h"

namespace lar::cpu {
namespace {

class OneShotSteps {
 public:
  OneShotSteps(const Call& call, const lar_message& message, const Cut& cut)
      : workspace_(call.workspace()),
        layout_(workspace_.layout),
        lane_(call, EpochPlane::kOneShot),
        elements_(message, layout_.world_size),
        cut_(cut),
        epoch_(lane_.epoch()) {}

  bool push(int64_t chunk) const {
    for (int step = 1; step <= shared_copies(layout_); ++step)
      elements_.pack(cut_.piece(chunk, 0), slot((workspace_.rank + step) % layout_.world_size, workspace_.rank, chunk));
    lane_.publish(FlagPlane::kOneShot, round(chunk));
    return true;
  }

  bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kOneShot, LAR_PHASE_GATHER, round(chunk))) return false;
    const char* sources[LAR_MAX_WORLD_SIZE];
    for (int source = 0; source < layout_.world_size; ++source)
      sources[source] = source == workspace_.rank ? nullptr : slot(workspace_.rank, source, chunk);
    elements_.reduce(cut_.piece(chunk, 0), sources, nullptr, 0);
    return true;
  }

  int run() const {
    if (!run_one_shot(cut_.chunks(), *this)) return lane_.broken();
    lane_.finish(epoch_ + static_cast<uint32_t>(cut_.chunks()));
    return LAR_OK;
  }

 private:
  uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  char* slot(int reader, int source, int64_t chunk) const {
    const lar_slots& slots = layout_.flagged;
    return lane_.slot(slots.one_shot_offset, slots.one_shot_bytes, reader, source, round(chunk), true);
  }

  const lar_workspace& workspace_;
  const lar_layout& layout_;
  const Lane lane_;
  const ElementUnits elements_;
  const Cut cut_;
  const uint32_t epoch_;
};

int one_shot_flags(const lar_workspace& workspace, const lar_call& described) {
  const lar_message& message = described.message;
  Call call(workspace, described);
  if (const int status = call.begin(); status != LAR_OK) return status;
  const int64_t chunk = described.launch.chunk_vectors * LAR_VECTOR_BYTES / element_bytes(message.dtype);
  return OneShotSteps(call, message, {message.count, chunk, 1, 1, 0}).run();
}

const Registration rows([] { add_cpu(kind_of(LAR_ONE_SHOT, LAR_FLAGS), one_shot_flags); });

}  // namespace
}  // namespace lar::cpu
