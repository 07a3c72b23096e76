// Launches of the kernels that wait for flags, staged or not: one launch for all rounds.
#include "device/lane.cuh"
#include "host/launch.h"

namespace lar {
namespace {

// Without dependent launch: blocks must be resident while they wait for each other's flags, and another kernel's that
// waits for this one's end may not take their place.
int flags(const lar_workspace& workspace, const lar_call& call, void* stream) {
  FlagsArguments arguments{workspace, call.message, call.launch.chunk_vectors, wait_limit(workspace, call.kind),
                           {},        call.hosts};
  if (call.kind.algorithm == LAR_HIERARCHICAL)
    make_domains(call.domains, workspace.layout.world_size, workspace.rank, &arguments.domains);
  if (call.launch.scatter_lanes > 0 || call.launch.drain_lanes > 0)
    return refuse("scatter_lanes, drain_lanes: by flags, every lane does everything");
  const Row* row = find_row(call.kind, call.message.dtype, workspace.layout.world_size, Form::kAny);
  return launch(row, workspace, call.launch, Start::kLate, &arguments, stream);
}

const Registration exchanges([] {
  add_exchange(LAR_FLAGS, flags);
  add_exchange(LAR_STAGED, flags);
});

}  // namespace
}  // namespace lar
