// TWOSHOT in band on CPU ranks, pushed and shared: scattered partial sums lie with their owner in both, results with
// the reader or, shared, with the owner.
#include "cpu/in_band.h"
#include "cpu/units.h"
#include "host/launch.h"

namespace lar::cpu {
namespace {

class Round {
 public:
  Round(const Call& call, const lar_message& message, const lar_call& described)
      : workspace_(call.workspace()),
        slots_(workspace_.layout.in_band),
        world_size_(workspace_.layout.world_size),
        call_(call),
        round_(call, LAR_TWO_SHOT),
        elements_(message, world_size_),
        is_shared_(described.kind.exchange == LAR_SHARED),
        part_vectors_(described.launch.chunk_vectors),
        cut_{message.count, part_vectors_ * LAR_VECTOR_BYTES / elements_.bytes(), world_size_, 1, 0} {}

  int run() const {
    scatter();
    if (!reduce()) return call_.broken();
    if (is_shared_) clear_old_generation();
    if (!drain()) return call_.broken();
    round_.finish();
    return LAR_OK;
  }

 private:
  int peer(int step) const { return (workspace_.rank + step) % world_size_; }
  Piece part(int owner) const { return cut_.piece(0, owner); }
  int64_t bytes(const Piece& part) const { return std::max<int64_t>(part.span, 0) * elements_.bytes(); }

  Slot scatter_slot(int owner, int source) const {
    return round_.pushed(slots_.scatter_offset, slots_.two_shot_bytes, owner, source);
  }

  Slot gather_slot(int reader, int owner) const {
    return is_shared_ ? round_.shared(slots_.gather_offset, slots_.two_shot_bytes, owner)
                      : round_.pushed(slots_.gather_offset, slots_.two_shot_bytes, reader, owner);
  }

  void scatter() const {
    for (int step = 1; step < world_size_; ++step) {
      Vectors partials = vectors_for(bytes(part(peer(step))));
      elements_.pack(part(peer(step)), bytes_of(partials));
      round_.store(scatter_slot(peer(step), workspace_.rank), partials);
    }
  }

  bool reduce() const {
    const int rank = workspace_.rank;
    std::vector<Vectors> taken(world_size_);
    const char* sources[LAR_MAX_WORLD_SIZE] = {};
    for (int source = 0; source < world_size_; ++source) {
      if (source == rank) continue;
      taken[source] = vectors_for(bytes(part(rank)));
      const Slot slot = scatter_slot(rank, source);
      if (!round_.take(slot, LAR_PHASE_SCATTER, taken[source])) return false;
      if (!is_shared_) round_.clear(slot, taken[source]);
      sources[source] = bytes_of(taken[source]);
    }
    Vectors result = vectors_for(bytes(part(rank)));
    char* const outputs[] = {bytes_of(result)};
    elements_.reduce(part(rank), sources, outputs, 1);
    for (int step = 1; step <= shared_copies(workspace_.layout); ++step)
      round_.store(gather_slot(peer(step), rank), result);
    return true;
  }

  bool drain() const {
    for (int step = 1; step < world_size_; ++step) {
      const Piece theirs = part(peer(step));
      Vectors result = vectors_for(bytes(theirs));
      const Slot slot = gather_slot(workspace_.rank, peer(step));
      if (!round_.take(slot, LAR_PHASE_GATHER, result)) return false;
      if (!is_shared_) round_.clear(slot, result);
      elements_.unpack(theirs, bytes_of(result));
    }
    return true;
  }

  // What this rank shared, and what peers scattered to it, two calls ago.
  void clear_old_generation() const {
    const int64_t old = round_.exchange_length(part_vectors_);
    char* base = static_cast<char*>(workspace_.base[workspace_.rank]);
    const int64_t generation = cleared_generation(round_.epoch());
    clear_vectors(base + slots_.gather_offset + generation * slots_.two_shot_bytes, old);
    for (int slot = 0; slot < world_size_ - 1; ++slot)
      clear_vectors(base + slots_.scatter_offset + (generation * (world_size_ - 1) + slot) * slots_.two_shot_bytes,
                    old);
  }

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const int world_size_;
  const Call& call_;
  const InBandCall round_;
  const ElementUnits elements_;
  const bool is_shared_;
  const int64_t part_vectors_;
  const Cut cut_;
};

int two_shot_in_band(const lar_workspace& workspace, const lar_call& described) {
  Call call(workspace, described);
  if (const int status = call.begin(); status != LAR_OK) return status;
  return in_rounds(described, workspace.layout.world_size,
                   [&](const lar_message& round, int64_t) { return Round(call, round, described).run(); });
}

const Registration rows([] {
  add_cpu(kind_of(LAR_TWO_SHOT, LAR_PUSH), two_shot_in_band);
  add_cpu(kind_of(LAR_TWO_SHOT, LAR_SHARED), two_shot_in_band);
});

}  // namespace
}  // namespace lar::cpu
