// TWOSHOT by flags on CPU ranks, of elements as they are and in every wire format: the steps of protocol/two_shot.h
// with one lane per rank, over shared memory.
#include "cpu/lane.h"
#include "cpu/units.h"
#include "host/check.h"
#include "host/registry.h"
#include "protocol/two_shot.h"

namespace lar::cpu {
namespace {

template <typename Units>
class TwoShotSteps {
 public:
  // `chunk`: units that fit a slot.
  TwoShotSteps(const Call& call, const Units& units, int64_t chunk)
      : workspace_(call.workspace()),
        layout_(workspace_.layout),
        slots_(layout_.flagged),
        lane_(call, EpochPlane::kTwoShot),
        units_(units),
        cut_{units.total(), chunk, layout_.world_size, 1, 0},
        epoch_(lane_.epoch()) {}

  int run() const {
    if (!run_two_shot(cut_.chunks(), *this)) return lane_.broken();
    lane_.finish(epoch_ + static_cast<uint32_t>(cut_.chunks()));
    return LAR_OK;
  }

  bool scatter(int64_t chunk) const {
    for (int step = 1; step < layout_.world_size; ++step)
      units_.pack(cut_.piece(chunk, peer(step)), scatter_slot(peer(step), workspace_.rank, chunk));
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
    return true;
  }

  bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const int rank = workspace_.rank;
    const char* sources[LAR_MAX_WORLD_SIZE];
    char* outputs[LAR_MAX_WORLD_SIZE];
    for (int other = 0; other < layout_.world_size; ++other)
      sources[other] = other == rank ? nullptr : scatter_slot(rank, other, chunk);
    const int copies = shared_copies(layout_);
    for (int step = 1; step <= copies; ++step) outputs[step - 1] = gather_slot(peer(step), rank, chunk);
    units_.reduce(cut_.piece(chunk, rank), sources, outputs, copies);
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;
    for (int step = 1; step < layout_.world_size; ++step)
      units_.unpack(cut_.piece(chunk, peer(step)), gather_slot(workspace_.rank, peer(step), chunk));
    return true;
  }

 private:
  uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  char* scatter_slot(int owner, int source, int64_t chunk) const {
    return lane_.slot(slots_.scatter_offset, slots_.two_shot_bytes, owner, source, round(chunk), false);
  }

  char* gather_slot(int reader, int owner, int64_t chunk) const {
    return lane_.slot(slots_.gather_offset, slots_.two_shot_bytes, reader, owner, round(chunk), true);
  }

  int peer(int step) const { return (workspace_.rank + step) % layout_.world_size; }

  const lar_workspace& workspace_;
  const lar_layout& layout_;
  const lar_slots& slots_;
  const Lane lane_;
  const Units& units_;
  const Cut cut_;
  const uint32_t epoch_;
};

template <typename Units>
int run(const Call& call, const Units& units, const lar_launch& launch) {
  return TwoShotSteps(call, units, launch.chunk_vectors * LAR_VECTOR_BYTES / units.bytes()).run();
}

int two_shot_flags(const lar_workspace& workspace, const lar_call& described) {
  const lar_message& message = described.message;
  Call call(workspace, described);
  if (const int status = call.begin(); status != LAR_OK) return status;
  const int world_size = workspace.layout.world_size;
  if (described.kind.wire == LAR_WIRE_RAW) return run(call, ElementUnits(message, world_size), described.launch);
  const Packets packets(message, static_cast<lar_wire>(described.kind.wire));
  return run(call, PacketUnits(packets, world_size), described.launch);
}

const Registration rows([] {
  add_cpu(kind_of(LAR_TWO_SHOT, LAR_FLAGS), two_shot_flags);
  for (const lar_wire wire : packet_wires()) add_cpu(kind_of(LAR_TWO_SHOT, LAR_FLAGS, wire), two_shot_flags);
});

}  // namespace
}  // namespace lar::cpu
