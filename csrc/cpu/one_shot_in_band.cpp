// ONESHOT in band on CPU ranks, pushed and shared.
#include "cpu/in_band.h"
#include "cpu/units.h"
#include "host/launch.h"

namespace lar::cpu {
namespace {

int run_round(const Call& call, const lar_message& message, lar_exchange exchange) {
  const lar_workspace& workspace = call.workspace();
  const lar_slots& slots = workspace.layout.in_band;
  const int rank = workspace.rank;
  const int world_size = workspace.layout.world_size;
  const InBandCall round(call, LAR_ONE_SHOT);
  const ElementUnits elements(message, world_size);
  const Piece whole{0, message.count};
  const int64_t bytes = message.count * elements.bytes();
  const auto slot = [&](int reader, int writer) {
    return exchange == LAR_PUSH ? round.pushed(slots.one_shot_offset, slots.one_shot_bytes, reader, writer)
                                : round.shared(slots.one_shot_offset, slots.one_shot_bytes, writer);
  };

  Vectors mine = vectors_for(bytes);
  elements.pack(whole, bytes_of(mine));
  for (int step = 1; step <= shared_copies(workspace.layout); ++step)
    round.store(slot((rank + step) % world_size, rank), mine);
  if (exchange == LAR_SHARED) {
    const int64_t old = round.exchange_length(ceil_div(bytes, LAR_VECTOR_BYTES));
    char* region = static_cast<char*>(workspace.base[rank]) + slots.one_shot_offset;
    clear_vectors(region + int64_t{cleared_generation(round.epoch())} * slots.one_shot_bytes, old);
  }

  std::vector<Vectors> taken(world_size);
  const char* sources[LAR_MAX_WORLD_SIZE] = {};
  for (int source = 0; source < world_size; ++source) {
    if (source == rank) continue;
    taken[source] = vectors_for(bytes);
    if (!round.take(slot(rank, source), LAR_PHASE_GATHER, taken[source])) return call.broken();
    if (exchange == LAR_PUSH) round.clear(slot(rank, source), taken[source]);
    sources[source] = bytes_of(taken[source]);
  }
  elements.reduce(whole, sources, nullptr, 0);
  round.finish();
  return LAR_OK;
}

int one_shot_in_band(const lar_workspace& workspace, const lar_call& described) {
  Call call(workspace, described);
  if (const int status = call.begin(); status != LAR_OK) return status;
  const auto exchange = static_cast<lar_exchange>(described.kind.exchange);
  return in_rounds(described, 1, [&](const lar_message& round, int64_t) { return run_round(call, round, exchange); });
}

const Registration rows([] {
  add_cpu(kind_of(LAR_ONE_SHOT, LAR_PUSH), one_shot_in_band);
  add_cpu(kind_of(LAR_ONE_SHOT, LAR_SHARED), one_shot_in_band);
});

}  // namespace
}  // namespace lar::cpu
