"""Fused calls as the policy launches them, emulated: the library takes every launch, and the bits are the oracle's.

Without clusters, which are not emulated.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.selection.policy import decide_fused
from llm_allreduce_plugin.topology.links import Transport
from tests.support.emulator import needs_emulator
from tests.support.local_group import LocalGroup
from tests.support.local_machine import EmulatedGpus
from tests.support.norm_group import Shape, check, every_quant, random_boundary
from tests.support.reference import fresh_seed, rank_input

pytestmark = needs_emulator

LANES = 8
DTYPE = torch.bfloat16


def _launch(group: LocalGroup, rows: int, hidden: int, strategy: str, *, host: bool) -> Launch:
    transport = Transport.HOST if host else Transport.SYMMETRIC
    facts = GroupFacts(group.world_size, "cuda", Transport.NONE, architecture=80).with_layout(transport, group.layout)
    config = AllReduceConfig(allreduce_strategy=strategy)
    launch = decide_fused(config, facts, rows, hidden, "bfloat16", however_slow=True).launch
    assert launch is not None
    return launch


def _run(group: LocalGroup, launch: Launch, rows: int, hidden: int, seed: int) -> None:
    shape = Shape(
        launch.lanes,
        launch.threads,
        rows_at_once=launch.chunk_vectors * 8 // hidden,
        scatter_lanes=launch.scatter_lanes,
        drain_lanes=launch.drain_lanes,
    )
    quants = every_quant(hidden)
    boundary = random_boundary(seed, rows, hidden, DTYPE, quants[seed % len(quants)])
    inputs = [rank_input(seed, rank, rows * hidden, DTYPE).view(rows, hidden) for rank in range(group.world_size)]
    what = f"{rows} x {hidden}, {launch}, {boundary.quant}, seed {seed}"
    check(group, launch.algorithm, int(launch.exchange), shape, inputs, boundary, what)


@pytest.mark.parametrize("strategy", ("ONESHOT", "TWOSHOT"))
@pytest.mark.parametrize("world_size", (2, 3, 8))
def test_pushed(world_size: int, strategy: str) -> None:
    """Rows of part of a warp, of a vector to a thread and of two; as many as lanes and more; in several rounds."""
    for rows, hidden in ((1, 8), (3, 264), (11, 1024), (5, 4104), (40, 512)):
        seed = fresh_seed()
        group = LocalGroup(world_size, lanes=LANES, workspace_mib=1, machine=EmulatedGpus(seed))
        _run(group, _launch(group, rows, hidden, strategy, host=False), rows, hidden, seed)


@pytest.mark.parametrize("world_size", (2, 3))
def test_lanes_with_one_task_each(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PUSH", "PUSH_TWO_SHOT"):
        shape = dataclasses.replace(measured.ROW_SHAPES[name], split_bytes=1024)
        monkeypatch.setitem(measured.ROW_SHAPES, name, shape)
    seed = fresh_seed()
    group = LocalGroup(world_size, lanes=LANES, workspace_mib=1, machine=EmulatedGpus(seed))
    rows = 10 * world_size  # more of a rank than there are lanes
    launch = _launch(group, rows, 512, "TWOSHOT", host=False)
    assert 0 < launch.scatter_lanes < launch.lanes
    _run(group, launch, rows, 512, seed)


@pytest.mark.parametrize("world_size", (2, 3))
def test_through_host_memory(world_size: int) -> None:
    for rows, hidden in ((1, 8), (11, 1024), (3, 4104)):
        seed = fresh_seed()
        group = LocalGroup(world_size, lanes=LANES, workspace_mib=2, host=True, machine=EmulatedGpus(seed))
        _run(group, _launch(group, rows, hidden, "ONESHOT", host=True), rows, hidden, seed)
