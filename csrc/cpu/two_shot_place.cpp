// TWOSHOT on CPU ranks that stores results into the outputs of all ranks: the steps of protocol/place.h with one lane
// per rank. Partial sums travel by flags, in the slots of two_shot_flags.cpp and counted with them; or are read in
// place.
#include "cpu/lane.h"
#include "cpu/units.h"
#include "host/registry.h"
#include "protocol/place.h"

namespace lar::cpu {
namespace {

class PlaceSteps {
 public:
  // `chunk`: elements that fit a slot.
  PlaceSteps(const Call& call, const lar_call& described, int64_t chunk)
      : workspace_(call.workspace()),
        world_size_(workspace_.layout.world_size),
        pools_(described.pools),
        inputs_(described.inputs),
        where_(static_cast<uint32_t>(distance_in_vectors(pools_[workspace_.rank], described.message.output))),
        slots_(workspace_.layout.flagged),
        calls_(call, EpochPlane::kPlace),
        lane_(call, EpochPlane::kTwoShot),
        elements_(described.message, world_size_),
        cut_{elements_.total(), chunk, world_size_, 1, 0},
        call_number_(calls_.epoch() + 1),
        epoch_(lane_.epoch()) {}

  int run() const {
    if (!run_place(cut_.chunks(), *this)) return lane_.broken();
    lane_.finish(epoch_ + static_cast<uint32_t>(cut_.chunks()));
    calls_.finish(call_number_);
    return LAR_OK;
  }

  void announce() const {
    for (int step = 1; step < world_size_; ++step)
      __atomic_store_n(where_word(workspace_, peer(step), workspace_.rank, 0), where_, __ATOMIC_RELAXED);
    calls_.publish(FlagPlane::kPlaceOutput, call_number_);
  }

  bool admit() const { return calls_.wait(FlagPlane::kPlaceOutput, LAR_PHASE_OUTPUT, call_number_); }

  bool scatter(int64_t chunk) const {
    if (inputs_) return true;
    for (int step = 1; step < world_size_; ++step)
      elements_.pack(cut_.piece(chunk, peer(step)), scatter_slot(peer(step), workspace_.rank, chunk));
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
    return true;
  }

  bool reduce(int64_t chunk) const {
    if (!inputs_ && !lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const int rank = workspace_.rank;
    const Piece part = cut_.piece(chunk, rank);
    const char* sources[LAR_MAX_WORLD_SIZE];
    char* outputs[LAR_MAX_WORLD_SIZE];
    for (int other = 0; other < world_size_; ++other)
      sources[other] = other == rank ? nullptr
                       : inputs_     ? static_cast<const char*>(inputs_[other]) + part.first * elements_.bytes()
                                     : scatter_slot(rank, other, chunk);
    for (int step = 1; step < world_size_; ++step)
      outputs[step - 1] = output_of(peer(step)) + part.first * elements_.bytes();
    elements_.reduce(part, sources, outputs, world_size_ - 1);
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  bool settle(int64_t chunk) const { return lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk)); }

 private:
  uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  char* scatter_slot(int owner, int source, int64_t chunk) const {
    return lane_.slot(slots_.scatter_offset, slots_.two_shot_bytes, owner, source, round(chunk), false);
  }

  // After admit().
  char* output_of(int rank) const {
    const uint32_t where = __atomic_load_n(where_word(workspace_, workspace_.rank, rank, 0), __ATOMIC_RELAXED);
    return static_cast<char*>(pools_[rank]) + int64_t{where} * LAR_VECTOR_BYTES;
  }

  int peer(int step) const { return (workspace_.rank + step) % world_size_; }

  const lar_workspace& workspace_;
  const int world_size_;
  void* const* const pools_;
  const void* const* const inputs_;  // null: they are scattered
  const uint32_t where_;             // of this rank's output
  const lar_slots& slots_;
  const Lane calls_;
  const Lane lane_;
  const ElementUnits elements_;
  const Cut cut_;
  const uint32_t call_number_;
  const uint32_t epoch_;
};

int two_shot_place(const lar_workspace& workspace, const lar_call& described) {
  Call call(workspace, described);
  if (const int status = call.begin(); status != LAR_OK) return status;
  const int64_t chunk = described.launch.chunk_vectors * LAR_VECTOR_BYTES / element_bytes(described.message.dtype);
  return PlaceSteps(call, described, chunk).run();
}

const Registration rows([] { add_cpu(kind_of(LAR_TWO_SHOT, LAR_PLACE), two_shot_place); });

}  // namespace
}  // namespace lar::cpu
