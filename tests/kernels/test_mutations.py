"""Errors in the kernels that the emulator must show: one build has them all, and makes the one that it is told to."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat
from tests.gpu.test_low_precision import compare
from tests.gpu.test_staged import check_streams
from tests.kernels.test_exact import inputs_of, reduce_and_compare
from tests.kernels.test_protocol import run_queued
from tests.support import emulator
from tests.support.local_group import LocalGroup, message_of
from tests.support.local_machine import EmulatedGpus

pytestmark = emulator.needs_emulator

SEEDS = 12  # in which an error must show at least once
IN_BAND = {"workspace_mib": 0.25}
SPLIT = {"split": (1, 1), "lanes": 4, "workspace_mib": 0.5}
FLAGGED = {"in_band": False, "workspace_mib": 0.25}
HOST = {"host": True, "workspace_mib": 0.25}
STAGED = {"staged": True, "workspace_mib": 0.5}
RING = {
    "in_band": False,
    "lanes": 1,
    "threads": 32,
    "workspace_mib": 0.25,
    "algorithm": "ring",
    "wire_format": WireFormat.TQ3,
}
HIERARCHICAL = {"in_band": False, "workspace_mib": 0.1, "algorithm": "hierarchical", "domains": (0, 0, 1, 1)}

# What is wrong: the file, what stands there, what stands there instead when this error is made (`{}`: whether it is),
# and the calls that must show it.
Mutation = tuple[str, str, str, dict[str, Any]]
MUTATIONS: dict[str, Mutation] = {
    "slots are not cleared": (
        "device/in_band.cuh",
        "    if (kClears) {\n",
        "    if (kClears && !{}) {{\n",
        IN_BAND,
    ),
    "one generation instead of two": (
        "device/in_band.cuh",
        "return epoch % LAR_IN_BAND_SLOTS * arguments.generation_stride;",
        "return epoch % ({} ? 1 : LAR_IN_BAND_SLOTS) * arguments.generation_stride;",
        IN_BAND,
    ),
    "lanes without a block do not count": (
        "device/in_band.cuh",
        "lane < arguments.lanes; lane += blockDim.x)\n      arguments.epochs[lane] = epoch + 1;",
        "lane < ({} ? 0 : arguments.lanes); lane += blockDim.x)\n      arguments.epochs[lane] = epoch + 1;",
        IN_BAND,
    ),
    "the count advances before all have read it": (
        "device/in_band.cuh",
        "  __syncthreads();\n  if (threadIdx.x == 0) arguments.epochs[blockIdx.x]",
        "  if (!{}) __syncthreads();\n  if (threadIdx.x == 0) arguments.epochs[blockIdx.x]",
        IN_BAND,
    ),
    "markers in the input are sent": (
        "device/in_band.cuh",
        "raw.x = raw.x == LAR_IN_BAND_MARKER ? 0u : raw.x;",
        "raw.x = raw.x == LAR_IN_BAND_MARKER && !{} ? 0u : raw.x;",
        IN_BAND,
    ),
    "one word of four is looked at": (
        "device/in_band.cuh",
        "  return min(min(static_cast<int>(raw.x), static_cast<int>(raw.y)),",
        "  if ({}) return static_cast<int>(raw.x);\n"
        "  return min(min(static_cast<int>(raw.x), static_cast<int>(raw.y)),",
        IN_BAND,
    ),
    "the kernel before is not waited for": (
        "kernels/one_shot.cu",
        "  const bool has_vector = index < total_vectors;\n  wait_for_previous_kernel();",
        "  const bool has_vector = index < total_vectors;\n  if (!{}) wait_for_previous_kernel();",
        IN_BAND,
    ),
    "a tile is filled before it has been read": (
        "device/outbox.cuh",
        "    if (leads()) wait_for_bulk_reads<kTilesUnderWay - 1>();",
        "    if (leads() && !{}) wait_for_bulk_reads<kTilesUnderWay - 1>();",
        SPLIT,
    ),
    "published slots are cleared a call too early": (
        "device/published.cuh",
        "clear_in_band_if(true, published(in_band.rank, epoch_ - 2, i));",
        "clear_in_band_if(true, published(in_band.rank, epoch_ - ({} ? 1 : 2), i));",
        HOST,
    ),
    "a flag does not wait for the stores before it": (
        "device/lane.cuh",
        "    if (is_meant(peer, peers))\n      store_release_system(",
        "    if ({} && is_meant(peer, peers))\n"
        "      store_weak(flag_row(workspace_.base[peer], workspace_.layout, plane, index_) + workspace_.rank,\n"
        "                 round);\n"
        "    else if (is_meant(peer, peers))\n      store_release_system(",
        FLAGGED,
    ),
    "workers do not meet the courier behind their stores": (
        "device/lane.cuh",
        "Peers peers = {}) const {\n    __syncthreads();\n    if (*given_up()) return false;\n",
        "Peers peers = {{}}) const {{\n    if ({}) release(threadIdx.x - workers(), plane, round, peers);\n"
        "    __syncthreads();\n    if (*given_up()) return false;\n",
        FLAGGED,
    ),
    "two slots instead of four": (
        "kernels/one_shot.cu",
        "round_of(step) % LAR_SLOTS, reader",
        "round_of(step) % ({} ? 2 : LAR_SLOTS), reader",
        FLAGGED | {"workspace_mib": 0.1},
    ),
    "a gather slot is not waited for": (
        "device/two_shot_lane.cuh",
        "    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;",
        "    if (!{} && !lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;",
        FLAGGED,
    ),
    "a stage is not granted": (
        "device/staged_lane.cuh",
        "    if (stage + 1 < number_ && !exchange_grants(stage + 1)) return false;",
        "    if (!{} && stage + 1 < number_ && !exchange_grants(stage + 1)) return false;",
        STAGED | {"workspace_mib": 0.15},
    ),
    "a stage's source is not waited for": (
        "device/staged_lane.cuh",
        "    if (!wait(FlagPlane::kStageData, source, stage)) return false;",
        "    if (!{} && !wait(FlagPlane::kStageData, source, stage)) return false;",
        STAGED,
    ),
    "a hop has no credit": (
        "kernels/low_precision_ring.cu",
        "if (step < hops_ && Ring::credit_for(step) >= 0 &&",
        "if (!{} && step < hops_ && Ring::credit_for(step) >= 0 &&",
        RING,
    ),
    "the counterpart is not waited for": (
        "kernels/low_precision_hierarchical.cu",
        "    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_EXCHANGE,",
        "    if (!{} && !lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_EXCHANGE,",
        HIERARCHICAL,
    ),
}


@functools.cache
def mutated() -> emulator.Library:
    patches: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for number, (file, old, new, _) in enumerate(MUTATIONS.values(), 1):
        patches[file].append((old, new.format(f"(::emulator::mutation == {number})")))
    return emulator.Library(emulator.build(patches))


def stress(seed: int, kind: dict[str, Any]) -> None:
    """Calls of which each kind of error must spoil some."""
    generator = random.Random(seed)
    # A ring of up to four ranks needs no credit: nobody can be four hops ahead of the successor.
    ranks = 8 if kind is RING else 4
    machine = EmulatedGpus(seed, library=mutated())
    group = LocalGroup(ranks, machine=machine, **({"lanes": 3, "threads": 64} | kind))
    if "algorithm" in kind:
        for turn in range(3):
            size = generator.choice((512, 10_001))
            compare(group, inputs_of(seed + turn, ranks, size, torch.bfloat16), f"call {turn}, {seed=}")
        return
    if "staged" in kind:
        inputs = inputs_of(seed, 4, 8192, torch.bfloat16)
        reduce_and_compare(group, "TWOSHOT", inputs, f"staged, {seed=}")
        check_streams(group, group.launch_of("TWOSHOT", message_of(inputs[0])).rounds)
    sizes = (8, 1024, 8192) if "split" in kind else (8, 520, 1024, 8192)
    calls = []
    for algorithm in ("TWOSHOT", "ONESHOT", "TWOSHOT", "ONESHOT"):
        calls += [(algorithm, generator.choice(sizes)) for _ in range(1 + generator.randrange(5))]
    run_queued(group, calls, f"{seed=}")
    marker = torch.full((512,), _C.IN_BAND_MARKER - (1 << 32), dtype=torch.int32).view(torch.bfloat16)
    for output in group.all_reduce("TWOSHOT", [marker] * 4):
        assert (output == 0).all()


KINDS = (IN_BAND, SPLIT, FLAGGED, HOST, STAGED, RING, HIERARCHICAL)


@pytest.mark.parametrize("kind", KINDS, ids=("in band", "split", "flagged", "host", "staged", "ring", "hierarchical"))
def test_nothing_is_wrong_without_an_error(kind: dict[str, Any]) -> None:
    mutated().mutate(0)
    for seed in emulator.seeds(4):
        stress(seed, kind)


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_error_shows(name: str) -> None:
    """As wrong bits, slots or counts, or as a wait that expires."""
    mutated().mutate(1 + list(MUTATIONS).index(name))
    try:
        for seed in range(SEEDS):
            try:
                stress(seed, MUTATIONS[name][3])
            except (AssertionError, emulator.BrokenContextError, emulator.EmulatorError):
                return
    finally:
        mutated().mutate(0)
    pytest.fail(f"{SEEDS} runs in which {name}, and nothing showed")
