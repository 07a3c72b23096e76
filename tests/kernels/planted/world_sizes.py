"""Errors that some numbers of ranks alone show: kernels that learn it when they run, and the registry."""

from __future__ import annotations

from tests.kernels.planted.kinds import FLAGGED, HOST, IN_BAND, MANY, REGISTRY, STAGED, Mutation

ERRORS: dict[str, Mutation] = {
    "ranks behind the last are summed": (
        "device/in_band.cuh",
        "      if (kIsFixed || first + i < world_size) sum.add(parts[i]);",
        "      if (kIsFixed || {} || first + i < world_size) sum.add(parts[i]);",
        IN_BAND | {"ranks": 5},
    ),
    "ranks behind the last are waited for": (
        "device/in_band.cuh",
        "      wanted[i] = is_rank && ",
        "      wanted[i] = (is_rank || {}) && ",
        IN_BAND | {"ranks": 5},
    ),
    "ranks behind the first group are not summed": (
        "device/in_band.cuh",
        "for (int first = 0; first < world_size; first += kGroup) {",
        "for (int first = 0; first < ({} ? kGroup : world_size); first += kGroup) {{",
        IN_BAND | {"ranks": 5},
    ),
    "a rank's slot is taken for another's": (
        "device/in_band.cuh",
        "return slot_of_step(step_to(arguments.rank, peer, world_size)) * arguments.peer_stride;",
        "return slot_of_step(step_to(arguments.rank, {} && peer == 4 ? 3 : peer, world_size)) * arguments.peer_stride;",
        IN_BAND | {"ranks": 5},
    ),
    "owners behind the first group are not drained": (
        "device/two_shot_in_band.cuh",
        "for (int first = 1; first < world_size; first += kAtOnce) {\n    char* from",
        "for (int first = 1; first < ({} ? 2 : world_size); first += kAtOnce) {{\n    char* from",
        IN_BAND | {"ranks": 5},
    ),
    "all of a group's results are those of its first": (
        "device/two_shot_in_band.cuh",
        "if (wanted[j]) sink(index_of<kWorldSize>(arguments, first + j, i), results[j]);",
        "if (wanted[j]) sink(index_of<kWorldSize>(arguments, first + j, i), results[{} ? 0 : j]);",
        IN_BAND | {"ranks": 5},
    ),
    "the second group is sent what the first was": (
        "device/two_shot_in_band.cuh",
        "for (int j = 0; j < kAtOnce; ++j) partials[j] = load(first + j);",
        "for (int j = 0; j < kAtOnce; ++j) partials[j] = load({} ? 1 + j : first + j);",
        IN_BAND | {"ranks": 5},
    ),
    "one peer's shared scatter slot is not cleared": (
        "device/shared.cuh",
        "for (int peer = 0; peer < World<kWorldSize>::size(in_band.world_size) - 1; ++peer) {",
        "for (int peer = 0; peer < World<kWorldSize>::size(in_band.world_size) - ({} ? 2 : 1); ++peer) {{",
        HOST | {"ranks": 5},
    ),
    "owners behind the first group are not sent to": (
        "device/wire/vector_units.cuh",
        "for (int first = 0; first < pieces.count; first += kAtOnce) {",
        "for (int first = 0; first < ({} ? 2 : pieces.count); first += kAtOnce) {{",
        FLAGGED | {"ranks": 5},
    ),
    "only as many peers are waited for as there are workers": (
        "device/lane.cuh",
        "arrived && peer < workspace_.layout.world_size; peer += workers())",
        "arrived && peer < ({} ? workers() : workspace_.layout.world_size); peer += workers())",
        FLAGGED | MANY,
    ),
    "only as many peers are told as a warp has threads": (
        "device/lane.cuh",
        "for (int peer = thread; peer < workspace_.layout.world_size; peer += threads)",
        "for (int peer = thread; peer < ({} ? threads : workspace_.layout.world_size); peer += threads)",
        FLAGGED | MANY,
    ),
    "only as many peers are granted the first stage as a warp has threads": (
        "device/staged_lane.cuh",
        "for (int other = first; other < ranks_; other += 32)\n      if (other != workspace_.rank)\n",
        "for (int other = first; other < ({} ? 32 : ranks_); other += 32)\n      if (other != workspace_.rank)\n",
        STAGED | MANY,
    ),
    "a stage's count is that of a smaller group": (
        "device/staged_lane.cuh",
        "return static_cast<int>(stage % (ranks_ - 1)) + 1;",
        "return static_cast<int>(stage % (({} ? 32 : ranks_) - 1)) + 1;",
        STAGED | MANY,
    ),
    "a kernel of a fixed world size runs for another": (
        "host/registry.cu",
        "find(key(kind, dtype, world_size, form));\n  return",
        "find(key(kind, dtype, {} ? 4 : world_size, form));\n  return",
        REGISTRY,
    ),
    "kernels of any world size have no row": (
        "host/registry.cu",
        "return fixed ? fixed : find(key(kind, dtype, 0, form));",
        "return fixed ? fixed : {} ? nullptr : find(key(kind, dtype, 0, form));",
        REGISTRY,
    ),
}
