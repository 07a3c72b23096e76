"""The norm behind an all-reduce in the same kernel: how that is launched."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import _C, AllReduceStrategy
from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.decision import Algorithm, Epilogue, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.quantization import QuantKind
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.topology.links import Transport
from tests.support.fused_decisions import facts, launch_of
from tests.support.group_facts import LANES, config
from tests.unit.test_command_files import ROOT

S = AllReduceStrategy
VECTOR_ELEMENTS = 8

any_facts = st.builds(
    lambda multiprocessors, **fields: dataclasses.replace(facts(**fields), multiprocessors=multiprocessors),
    multiprocessors=st.sampled_from((None, 78, 132)),
    world_size=st.sampled_from((2, 3, 4, 7, 8, 9, 16)),
    transport=st.sampled_from(list(Transport)),
    workspace=st.integers(32 << 20, 512 << 20),
    in_band=st.booleans(),
    architecture=st.sampled_from((None, 80, 90, 100, 120)),
)
any_hidden = st.sampled_from((8, 64, 896, 2880, 4096, 5120, 7168, 8192, 16384, 18432)) | st.integers(1, 2304).map(
    lambda units: units * VECTOR_ELEMENTS
)
any_rows = st.integers(0, 64) | st.integers(0, 65536)


def _is_sound(group: GroupFacts, rows: int, hidden: int, launch: Launch) -> None:
    """What the kernels rely on: rows stay whole, fit their slots, and a thread has at most so many vectors."""
    assert launch.epilogue is Epilogue.RMS_NORM
    assert launch.wire_format is None
    if group.transport is Transport.SHM:
        return
    assert launch.exchange is (Exchange.SHARED if group.transport is Transport.HOST else Exchange.PUSH)
    assert group.world_size <= 8
    assert hidden <= 16384
    vectors = hidden // VECTOR_ELEMENTS
    is_one_shot = launch.algorithm is Algorithm.ONE_SHOT
    parts = 1 if is_one_shot else group.world_size
    slot = group.in_band.one_shot if is_one_shot else group.in_band.two_shot
    assert launch.chunk_vectors % vectors == 0
    in_a_round = launch.chunk_vectors // vectors
    assert 1 <= in_a_round <= math.ceil(rows / parts)
    assert launch.chunk_vectors * 16 <= slot
    assert launch.rounds == math.ceil(rows / (in_a_round * parts))
    assert 1 <= launch.lanes <= group.lanes
    assert launch.threads % 32 == 0
    shape = measured.ROW_SHAPES[launch.exchange.name]
    if launch.threads > shape.most_threads:  # a wide block, which has a vector of a row to a thread
        assert (group.world_size, launch.algorithm, launch.cluster) == (2, Algorithm.ONE_SHOT, 1)
        assert vectors <= launch.threads <= min(shape.wide_threads, _C.MAX_WIDE_THREADS)
        assert launch.scatter_lanes == 0
    else:
        assert launch.threads <= _C.MAX_THREADS
    assert math.ceil(vectors / (launch.cluster * launch.threads)) <= max(shape.vectors)
    assert launch.lanes % launch.cluster == 0
    workers = launch.lanes - launch.scatter_lanes - launch.drain_lanes
    assert workers >= 1
    assert launch.cluster <= 8
    assert launch.cluster == 1 or (group.architecture or 0) >= 90
    if launch.scatter_lanes:
        assert launch.cluster == 1
        assert in_a_round >= workers
    else:
        assert launch.drain_lanes == 0
        assert launch.lanes - launch.idle_lanes <= in_a_round * launch.cluster
    if launch.idle_lanes:
        assert group.multiprocessors == measured.LEAVES.multiprocessors
        assert launch.exchange is Exchange.PUSH
        assert launch.idle_lanes % launch.cluster == 0
        assert launch.lanes > launch.idle_lanes > 0 == launch.scatter_lanes
    if launch.exchange is Exchange.SHARED:
        assert (launch.rounds, launch.scatter_lanes, launch.cluster) == (1, 0, 1)
        assert is_one_shot


@given(st.sampled_from(list(S)), any_facts, any_rows, any_hidden, st.sampled_from(("bfloat16", "float32", "int8")))
def test_total_deterministic_sound_and_reasoned(
    strategy: S, group: GroupFacts, rows: int, hidden: int, dtype: str
) -> None:
    decision = decide_fused(config(strategy), group, rows, hidden, dtype)
    assert decision == decide_fused(config(strategy), pickle.loads(pickle.dumps(group)), rows, hidden, dtype)
    assert decision.all_reduce == decide(config(strategy), group, rows * hidden, dtype)
    assert decision.reason
    assert decision.reason in str(decision)
    assert len(decision.counted_as) <= 64, "what a report may hold"
    if decision.launch is not None:
        assert rows > 0
        assert dtype == "bfloat16"
        assert decision.all_reduce.launch is not None
        assert not decision.by_design
        _is_sound(group, rows, hidden, decision.launch)
    if rows == 0:
        assert (decision.launch, decision.by_design) == (None, True)


@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
@pytest.mark.parametrize("hidden", (2880, 4096, 5120, 7168, 8192, 16384))
def test_every_usual_message_on_peers_memory_can_be_fused(world_size: int, hidden: int) -> None:
    group = facts(world_size)
    for rows in (1, 2, 7, 64, 512, 4096, 65536):
        launch = launch_of(group, rows, hidden)
        if world_size == 2 or (world_size == 4 and rows * hidden * 2 <= 256 << 10):
            assert launch.algorithm is Algorithm.ONE_SHOT
        else:
            alone = decide(config(), group, rows * hidden, "bfloat16").launch
            assert alone is not None
            assert launch.algorithm is alone.algorithm


def test_wide_blocks_take_what_is_not_large() -> None:
    """Of two ranks, a row to a block, a vector to a thread. Of more rows, each block takes two, or one in two waves."""
    group = facts(2)
    for hidden, rows in ((8192, 33), (8192, 132), (5120, 64), (7168, 100)):
        launch = launch_of(group, rows, hidden)
        assert (launch.lanes, launch.cluster, launch.threads) == (rows, 1, hidden // 8)
        assert (launch.scatter_lanes, launch.rounds) == (0, 1)
    for rows, lanes in ((133, 132), (264, 132), (265, 264)):
        launch = launch_of(group, rows, 8192)
        assert (launch.lanes, launch.threads, launch.scatter_lanes) == (lanes, 1024, 0)
    assert launch_of(group, 512, 8192).threads == 512, "a large message"
    assert launch_of(group, 64, 4096).threads == 512, "which is a vector to a thread, too"
    assert launch_of(group, 64, 8200).threads <= 512
    for other in (facts(3), facts(4), facts(2, architecture=80), facts(2, architecture=None)):
        assert launch_of(other, 64, 8192).threads <= 512


def test_few_rows_are_shared_by_a_cluster() -> None:
    """Smaller ones the more rows there are, none where rows are short or nothing has clusters."""
    group = facts(2)
    one = launch_of(group, 1, 8192)
    assert (one.lanes, one.cluster, one.threads) == (8, 8, 128)
    assert "(8 to a row)" in str(one)
    clusters = [launch_of(group, rows, 8192).cluster for rows in (4, 5, 16, 17, 32, 33, 256)]
    assert clusters == [8, 4, 4, 1, 1, 1, 1]
    assert [launch_of(group, rows, 8192).threads for rows in (17, 32)] == [1024, 1024]
    assert [launch_of(group, rows, 16384).cluster for rows in (4, 5, 64, 65, 128)] == [8, 4, 4, 2, 2]
    assert [launch_of(group, rows, 4096).cluster for rows in (1, 16, 17)] == [4, 4, 1]
    assert launch_of(group, 1, 2880).cluster == 1, "too short a row"
    assert launch_of(facts(2, architecture=80), 1, 8192).cluster == 1
    assert launch_of(facts(2, architecture=None), 1, 8192).cluster == 1
    assert launch_of(facts(2, Transport.HOST), 1, 8192).cluster == 1


def test_clusters_without_a_row_leave_the_gpu_as_it_was() -> None:
    """On GPUs on which that was measured. Of one cluster the next kernel's clusters would begin at another GPC."""
    for world_size, rows, cluster, lanes in (
        *((2, 1, 8, 56), (2, 4, 8, 56), (2, 5, 4, 28), (2, 8, 4, 32), (2, 9, 4, 60), (2, 16, 4, 64), (2, 17, 1, 17)),
        *((4, 1, 8, 56), (4, 16, 4, 64), (4, 32, 8, 64), (4, 128, 4, 152)),
    ):
        group = facts(world_size)
        known = launch_of(dataclasses.replace(group, multiprocessors=132), rows, 8192)
        assert (known.cluster, known.lanes) == (cluster, lanes)
        other = launch_of(dataclasses.replace(group, multiprocessors=114), rows, 8192)
        assert known == dataclasses.replace(other, lanes=lanes, idle_lanes=lanes - other.lanes)
    shared = dataclasses.replace(facts(2, Transport.HOST), multiprocessors=132)
    assert launch_of(shared, 9, 4096).lanes == 9
    two = dataclasses.replace(facts(2), multiprocessors=132)
    assert str(launch_of(two, 9, 2880)).startswith("15 blocks x 384 threads (6 without a row), ")
    assert str(launch_of(two, 4, 8192)).startswith("56 blocks x 128 threads (8 to a row, 24 without one), ")


# Where the next turn begins, for each GPC at which it would have begun: there, or at the first. Such a turn is also
# seen to begin at the last: where two GPCs have as much free, or where the first has less than others.
AS_IT_WAS = {"01234567", "71234567", "70234567", "70000007"}


def test_what_leaves_the_gpu_as_it_was_is_what_was_measured() -> None:
    record = json.loads((ROOT / "benchmarks" / "h100" / "clusters_leave.json").read_text())
    assert record["multiprocessors"] == measured.LEAVES.multiprocessors
    for blocks, allowed in measured.LEAVES.clusters.items():
        lines = [row for row in record["rows"] if row["cluster"] == (0 if blocks == 1 else blocks)]
        assert [row["started_at"] for row in lines] == list(range(8))
        behind = ["".join(map(str, ends)) for ends in zip(*(row["begins_at"] for row in lines), strict=True)]
        assert allowed == tuple(number for number, ends in enumerate(behind, 1) if ends in AS_IT_WAS)


def test_a_block_has_as_few_vectors_to_a_thread_as_it_can() -> None:
    """By hidden size: threads through peers' memory, and through host memory."""
    for hidden, pushed, shared in (
        (64, 32, 32),
        (2880, 384, 192),
        (4096, 512, 256),
        (4104, 288, 160),
        (8192, 512, 256),
    ):
        assert launch_of(facts(2, architecture=80), 16, hidden).threads == pushed
        assert launch_of(facts(2, Transport.HOST), 4, hidden).threads == shared


def test_a_row_that_is_more_than_a_block_holds_is_shared() -> None:
    for world_size, rows, cluster in ((2, 16, 4), (2, 4096, 2), (4, 512, 2), (2, 1, 8)):
        launch = launch_of(facts(world_size), rows, 16384)
        own = rows if world_size == 2 else rows // 4
        assert (launch.cluster, launch.scatter_lanes) == (cluster, 0)
        assert launch.lanes == min(LANES, cluster * own)
        assert launch.threads == min(512, 2048 // cluster)
    assert launch_of(facts(2), 300, 8200).cluster == 2


def test_large_messages_give_lanes_one_task_each() -> None:
    assert launch_of(facts(2), 127, 8192).scatter_lanes == 0
    assert launch_of(facts(2), 511, 8192).scatter_lanes == 0
    # As many warps push whatever a block has, by GPU; a multiprocessor holds two small blocks.
    for hidden, threads, lanes, pushing in (
        (2880, 192, 264, {"H200": 74, "H100": 85}),
        (4096, 256, 264, {"H200": 56, "H100": 64}),
        (5120, 320, 132, {"H200": 44, "H100": 51}),
        (7168, 448, 132, {"H200": 32, "H100": 36}),
        (8192, 512, 132, {"H200": 28, "H100": 32}),
    ):
        for name, scatter in {"": pushing["H200"], **pushing}.items():
            group = dataclasses.replace(facts(2), gpu_name=f"NVIDIA {name} 80GB HBM3")
            pushed = launch_of(group, (8 << 20) // (2 * hidden) + 1, hidden)
            assert (pushed.threads, pushed.lanes, pushed.scatter_lanes) == (threads, lanes, scatter)
            assert pushed.drain_lanes == 0
    both = launch_of(facts(4), 4096, 8192)
    assert (both.threads, both.lanes, both.scatter_lanes, both.drain_lanes) == (512, 132, 16, 76)
    assert launch_of(facts(4), 128, 8192).scatter_lanes == 0, "fewer rows than lanes that would sum"
    assert launch_of(facts(2), 264, 4096).scatter_lanes == 0, "short rows, a lane for each"
    by_turns = launch_of(facts(2), 265, 4096)
    assert (by_turns.threads, by_turns.lanes, by_turns.scatter_lanes) == (256, 264, 0), "two vectors to a thread"


def test_rows_of_a_two_shot_belong_to_ranks() -> None:
    launch = launch_of(facts(4), 30, 8192, "TWOSHOT")
    assert launch.algorithm is Algorithm.TWO_SHOT
    assert (launch.chunk_vectors, launch.lanes, launch.rounds) == (8 * 1024, 8 * launch.cluster, 1)
    few = launch_of(facts(8), 3, 8192, "TWOSHOT")
    assert (few.chunk_vectors, few.lanes) == (1024, few.cluster)


def test_messages_beyond_a_slot_take_rounds_of_whole_rows() -> None:
    group = facts(2, workspace=32 << 20)
    launch = launch_of(group, 4096, 7168)
    assert launch.rounds > 1
    assert launch.chunk_vectors % 896 == 0


def test_quantization_makes_no_difference_to_the_launch() -> None:
    plain = decide_fused(config(), facts(2), 16, 8192, "bfloat16")
    assert all(decide_fused(config(), facts(2), 16, 8192, "bfloat16", quant) == plain for quant in QuantKind)


def test_cpu_ranks_fuse_what_they_run() -> None:
    for strategy in ("ONESHOT", "TWOSHOT"):
        launch = launch_of(facts(2, Transport.SHM), 16, 8192, strategy)
        alone = STRATEGIES[S(strategy)].plan(config(strategy), facts(2, Transport.SHM), _message(16 * 8192))
        assert alone is not None
        assert launch == dataclasses.replace(alone, epilogue=Epilogue.RMS_NORM)


def _message(count: int) -> Any:
    from llm_allreduce_plugin.algorithms.base import Message

    return Message(count, "bfloat16", 2)
