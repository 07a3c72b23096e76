"""The policy is total, deterministic and says why."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import _C, AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.algorithms.base import (
    MAX_FLAGGED_THREADS,
    MAX_THREADS,
    VECTOR_BYTES,
    Message,
    Numerics,
    spread,
)
from llm_allreduce_plugin.algorithms.decision import Algorithm, Decision
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, SUPPORTED_WORLD_SIZES, GroupFacts
from llm_allreduce_plugin.algorithms.measured import LINK_SCALE
from llm_allreduce_plugin.algorithms.ranges import Range, Tuned, TunedRanges
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.algorithms.tables import fastest
from llm_allreduce_plugin.config import LowPrecisionConfig, WireFormat
from llm_allreduce_plugin.group.layouts import host_layout
from llm_allreduce_plugin.oracle import CODECS
from llm_allreduce_plugin.runtime.tally import fallback_of
from llm_allreduce_plugin.selection.policy import decide, describe
from llm_allreduce_plugin.topology.links import TopologyClass, Transport

S = AllReduceStrategy


def facts(
    world_size: int = 4,
    transport: Transport = Transport.SYMMETRIC,
    workspace: int = 64 << 20,
    in_band: bool = False,
    architecture: int | None = 90,
) -> GroupFacts:
    if transport is Transport.NONE:
        return GroupFacts(
            world_size=world_size, device="cuda", transport=transport, no_transport_reason="a test says so"
        )
    if transport is Transport.HOST:
        layout = host_layout(world_size, 64, workspace)
    elif transport is Transport.SHM:
        layout = _C.make_layout(world_size, 1, flagged_bytes=workspace, shared=True)
    else:
        share = workspace if in_band else 0
        layout = _C.make_layout(world_size, 264, in_band_bytes=share, flagged_bytes=workspace - share)  # an H200's
    device = "cpu" if transport is Transport.SHM else "cuda"
    group = GroupFacts(world_size=world_size, device=device, transport=Transport.NONE, architecture=architecture)
    return group.with_layout(transport, layout)


def config(strategy: str, **settings: object) -> AllReduceConfig:
    return AllReduceConfig(allreduce_strategy=strategy, **settings)  # type: ignore[arg-type]


any_ranges = st.lists(
    st.tuples(st.integers(0, 1 << 34), st.sampled_from(("ONESHOT", "TWOSHOT"))), max_size=8, unique_by=lambda x: x[0]
).flatmap(
    lambda steps: st.sampled_from(("ONESHOT", "TWOSHOT")).map(
        lambda last: (*(Range(*step) for step in sorted(steps)), Range(None, last))
    )
)
any_tuned = st.none() | st.builds(
    lambda ranges: Tuned("a profile", tuple(ranges)),
    st.lists(
        st.builds(TunedRanges, st.sampled_from((2, 4)), any_ranges),
        min_size=1,
        max_size=2,
        unique_by=lambda found: found.element_bytes,
    ),
)
any_facts = st.builds(
    lambda topology_class, tuned, workspace, world_size, **fields: dataclasses.replace(
        # Large groups need more for a vector to a slot.
        facts(world_size=world_size, workspace=workspace * max(1, world_size // 8), **fields),
        topology_class=topology_class,
        tuned=tuned,
    ),
    topology_class=st.sampled_from(list(TopologyClass)),
    tuned=any_tuned,
    world_size=st.sampled_from(SUPPORTED_WORLD_SIZES),
    transport=st.sampled_from(list(Transport)),
    workspace=st.integers(2 << 20, 1 << 28),
    in_band=st.booleans(),
    architecture=st.sampled_from((None, 75, 103, *LINK_SCALE)),
)


@given(
    st.sampled_from(list(S)),
    any_facts,
    st.integers(0, 1 << 34),
    st.sampled_from([*ELEMENT_BYTES, "int32", "float8_e4m3fn"]),
)
def test_total_deterministic_and_reasoned(strategy: S, group: GroupFacts, count: int, dtype: str) -> None:
    decision = decide(config(strategy), group, count, dtype)
    # What another rank decides, from facts that came to it over a wire.
    received = pickle.loads(pickle.dumps(group))
    assert decision == decide(config(strategy), received, count, dtype)
    assert decision.requested is strategy
    assert decision.reason
    named = {other.strategy for other in decision.passed_over}
    assert named == set(STRATEGIES) - {decision.strategy}
    assert all(other.reason for other in decision.passed_over)
    if decision.strategy is S.NCCL:
        assert decision.launch is None
    else:
        assert dtype in ELEMENT_BYTES
        message = Message(count, dtype, ELEMENT_BYTES[dtype])
        assert STRATEGIES[decision.strategy].obstacle(config(strategy), group, message) is None
        assert decision.launch is not None
    # AUTO and its relatives never choose a lossy format.
    if strategy is not S.LOWPRECISION:
        assert decision.strategy is not S.LOWPRECISION
    if strategy is S.AUTO:
        runs = group.transport is not Transport.NONE and dtype in ELEMENT_BYTES
        assert STRATEGIES[decision.strategy].numerics is (Numerics.EXACT if runs else Numerics.ENGINE)
    assert str(decision)


def test_every_strategy_has_a_numeric_class() -> None:
    classes = {name: strategy.numerics for name, strategy in STRATEGIES.items()}
    assert set(classes) == set(S) - {S.AUTO}
    assert {name for name, numerics in classes.items() if numerics is not Numerics.EXACT} == {S.NCCL, S.LOWPRECISION}


def test_flashinfers_limits_are_per_rank_where_kernels_wait_for_flags() -> None:
    """tokens * hidden * 2 * tp * itemsize <= 512 / 64 / 42 MiB: 128, 8 and 2.625 MiB of payload."""
    for world_size, payload in ((2, 128 << 20), (4, 8 << 20), (8, 2688 << 10)):
        for architecture in (100, 103):
            group = facts(world_size, architecture=architecture)
            largest = decide(config("AUTO"), group, payload // 2, "bfloat16")
            assert largest.strategy is S.ONESHOT
            assert "FlashInfer's limits for B200" in largest.reason
            assert "estimate" not in largest.reason
            assert decide(config("AUTO"), group, payload // 2 + 1, "bfloat16").strategy is S.TWOSHOT
        # In band two-shot has no barriers: their limit would be far too high.
        if world_size > 2:
            in_band = facts(world_size, in_band=True, architecture=100)
            assert decide(config("AUTO"), in_band, payload // 2, "bfloat16").strategy is S.TWOSHOT
    limits = [fastest(size, 100, in_band=False).ranges[0].max_bytes for size in range(2, 33)]
    assert limits == sorted(limits, reverse=True)  # type: ignore[type-var]
    assert "an estimate from FlashInfer" in fastest(6, 100, in_band=False).source


def test_without_nvlink_links_are_those_of_pcie() -> None:
    """An H100 on PCIe is no H100 with NVLink."""
    nvlink = dataclasses.replace(facts(4, in_band=True), topology_class=TopologyClass.NVSWITCH)
    pcie = dataclasses.replace(nvlink, topology_class=TopologyClass.PCIE_PEER)
    size = 100 << 10
    assert decide(config("AUTO"), nvlink, size // 2, "bfloat16").strategy is S.ONESHOT
    other = decide(config("AUTO"), pcie, size // 2, "bfloat16")
    assert other.strategy is S.TWOSHOT
    assert "the seed table for 4 ranks over PCIe peer access: scaled by 0.1 from H200 for PCIe" in other.reason


@given(st.integers(0, 1 << 31), st.integers(1, 1 << 20), st.integers(1, 128), st.sampled_from((1, 2, 3, 8, 16)))
def test_spread_covers_every_vector_exactly(vectors: int, chunk_vectors: int, lanes: int, parts: int) -> None:
    """The kernels give lane l of part p in round r the vectors from ((r * parts + p) * lanes + l) * chunk on."""
    launch = spread(vectors, Algorithm.ONE_SHOT, chunk_vectors * VECTOR_BYTES, lanes, parts)
    assert 1 <= launch.lanes <= lanes
    assert 32 <= launch.threads <= MAX_THREADS
    assert launch.threads % 32 == 0
    assert 1 <= launch.chunk_vectors <= chunk_vectors
    per_round = launch.lanes * launch.chunk_vectors * parts
    assert launch.rounds * per_round >= vectors
    assert not launch.in_band
    assert vectors == 0 or (launch.rounds - 1) * per_round < vectors


@given(
    st.integers(0, 1 << 28),
    any_facts.filter(lambda group: group.transport is Transport.SYMMETRIC and group.in_band.two_shot > 0),
    st.sampled_from(("ONESHOT", "TWOSHOT", "MINLATENCY")),
)
def test_in_band_launches_fit_their_slots(count: int, group: GroupFacts, strategy: str) -> None:
    launch = decide(config(strategy), group, count, "bfloat16").launch
    assert launch is not None
    assert launch.in_band
    one_shot = launch.algorithm is Algorithm.ONE_SHOT
    parts = 1 if one_shot else group.world_size
    capacity = group.in_band.one_shot if one_shot else group.in_band.two_shot
    assert 1 <= launch.chunk_vectors <= capacity // VECTOR_BYTES
    per_round = launch.chunk_vectors * parts * VECTOR_BYTES
    assert launch.rounds * per_round >= count * 2
    assert (launch.rounds - 1) * per_round < max(count * 2, 1)
    assert 1 <= launch.lanes <= group.lanes
    assert 32 <= launch.threads <= MAX_THREADS
    assert launch.scatter_lanes + launch.drain_lanes < launch.lanes


@given(
    st.integers(1, 1 << 28),
    any_facts.filter(lambda group: group.transport is Transport.HOST),
    st.sampled_from(("ONESHOT", "TWOSHOT", "MINLATENCY")),
)
def test_launches_through_host_memory_fit_their_slots(count: int, group: GroupFacts, strategy: str) -> None:
    launch = decide(config(strategy), group, count, "bfloat16").launch
    assert launch is not None
    one_shot = launch.algorithm is Algorithm.ONE_SHOT
    parts = 1 if one_shot else group.world_size
    slots = group.in_band if launch.in_band else group.flagged
    assert 1 <= launch.chunk_vectors * VECTOR_BYTES <= (slots.one_shot if one_shot else slots.two_shot)
    assert launch.owned_vectors * parts * VECTOR_BYTES * launch.rounds >= count * 2
    assert launch.rounds == 1 or not launch.in_band
    assert 1 <= launch.lanes <= group.lanes
    assert 32 <= launch.threads <= MAX_FLAGGED_THREADS


def test_small_messages_go_in_band_through_host_memory() -> None:
    group = facts(4, Transport.HOST, workspace=12 << 20)
    for size, algorithm, in_band in (
        (4 << 10, Algorithm.ONE_SHOT, True),
        (64 << 10, Algorithm.ONE_SHOT, True),
        (128 << 10, Algorithm.TWO_SHOT, True),
        (512 << 10, Algorithm.TWO_SHOT, True),
        (1 << 20, Algorithm.TWO_SHOT, False),
        (1 << 26, Algorithm.TWO_SHOT, False),
    ):
        launch = decide(config("MINLATENCY"), group, size // 2, "bfloat16").launch
        assert launch is not None
        assert (launch.algorithm, launch.in_band) == (algorithm, in_band), size


def test_compression_runs_where_it_is_faster() -> None:
    """From a measured size on for each kind of memory, scaled to what the links carry."""
    group = facts(4, in_band=True)
    assert low_precision(1 << 20, "bfloat16", group).strategy is S.LOWPRECISION
    small = low_precision((1 << 20) - 1, "bfloat16", group)
    assert small.strategy is S.MINLATENCY
    assert small.reason == "below 2097152 bytes the exact kernels are faster than fp8 (measured on H200)"
    pcie = low_precision(1 << 17, "bfloat16", facts(8, in_band=True, architecture=89))
    assert pcie.strategy is S.LOWPRECISION
    assert (
        "with 4 ranks, scaled by 0.1 for sm_89"
        in low_precision(100, "bfloat16", facts(8, in_band=True, architecture=89)).reason
    )
    host = facts(4, Transport.HOST, workspace=12 << 20)
    assert low_precision(48 << 10, "bfloat16", host).strategy is S.LOWPRECISION
    assert low_precision((48 << 10) - 1, "bfloat16", host).strategy is S.MINLATENCY
    assert low_precision(8, "bfloat16", host, min_bytes=0).strategy is S.LOWPRECISION


def test_min_latency_takes_the_kernel_of_the_table() -> None:
    """4 ranks change over between 128 and 256 KiB; 2 ranks come back to one step where the second no longer hides."""
    expected = {
        4: {1 << 17: Algorithm.ONE_SHOT, 1 << 18: Algorithm.TWO_SHOT, 1 << 28: Algorithm.TWO_SHOT},
        2: {1 << 21: Algorithm.ONE_SHOT, 1 << 22: Algorithm.TWO_SHOT, 1 << 23: Algorithm.ONE_SHOT},
    }
    for world_size, sizes in expected.items():
        for size, algorithm in sizes.items():
            decision = decide(config("MINLATENCY"), facts(world_size, in_band=True), size // 2, "bfloat16")
            assert decision.strategy is S.MINLATENCY
            assert decision.launch is not None
            assert decision.launch.algorithm is algorithm
            auto = decide(config("AUTO"), facts(world_size, in_band=True), size // 2, "bfloat16")
            assert auto.launch == decision.launch


@pytest.mark.parametrize("strategy", ("ONESHOT", "TWOSHOT"))
def test_asked_for_by_name_runs_at_every_size(strategy: str) -> None:
    for count in (0, 1, 8, 1 << 20, 1 << 29):
        decision = decide(config(strategy), facts(), count, "bfloat16")
        assert decision.strategy == strategy
        assert not decision.is_fallback
        assert decision.reason == f"allreduce_strategy is {strategy}"


@pytest.mark.parametrize("in_band", (False, True))
def test_auto_changes_over_where_the_table_does(in_band: bool) -> None:
    for world_size in SUPPORTED_WORLD_SIZES:
        group = facts(world_size, in_band=in_band)
        below = 0
        for found in fastest(world_size, 90, in_band=in_band).ranges:
            first = decide(config("AUTO"), group, below // 2 + 1, "bfloat16")
            assert first.strategy == found.strategy
            assert f"seed table for {world_size} ranks" in first.reason
            if found.max_bytes is not None:
                assert decide(config("AUTO"), group, found.max_bytes // 2, "bfloat16").strategy == found.strategy
                below = found.max_bytes
    small = config("AUTO", one_shot_max_bytes="1KiB")
    assert decide(small, facts(), 513, "bfloat16").strategy is S.TWOSHOT
    assert "one_shot_max_bytes" in decide(small, facts(), 513, "bfloat16").reason


@given(st.integers(1, 1000), st.sampled_from((None, 75, *LINK_SCALE)), st.booleans(), st.integers(0, 1 << 40))
def test_tables_know_every_group_and_size(world_size: int, architecture: int | None, in_band: bool, size: int) -> None:
    table = fastest(world_size, architecture, in_band=in_band)
    below, found = table.range_of(size)
    assert below <= size
    assert found.max_bytes is None or size <= found.max_bytes
    limits = [found.max_bytes for found in table.ranges[:-1]]
    assert None not in limits
    assert limits == sorted(limits)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("settings", "group", "reason"),
    [
        ({"registered_pool": 0}, facts(in_band=True), "registered_pool is 0: there is no registered memory"),
        ({}, facts(), "in_band is off, and results are stored into outputs only where inputs travel in band"),
        ({}, facts(transport=Transport.HOST), "ranks share host memory, and outputs lie with the GPUs"),
        ({}, dataclasses.replace(facts(in_band=True), no_pool_reason="it cannot be opened"), "it cannot be opened"),
    ],
)
def test_without_registered_memory_ub_falls_back_with_exactly_that_reason(
    settings: dict[str, Any], group: GroupFacts, reason: str
) -> None:
    decision = decide(config("UB", **settings), group, 64 << 20, "bfloat16")
    assert decision.strategy == "TWOSHOT"
    assert decision.is_fallback
    assert decision.reason == reason


def low_precision(count: int, dtype: str, group: GroupFacts, **settings: Any) -> Decision:
    agreed = AllReduceConfig(allreduce_strategy=S.LOWPRECISION, low_precision=LowPrecisionConfig(**settings))
    return decide(agreed, group, count, dtype)


def test_low_precision_runs_where_it_can_and_says_why_not() -> None:
    cpu = facts(transport=Transport.SHM, workspace=4 << 20)
    runs = low_precision(4096, "bfloat16", cpu, wire_format="TQ3")
    assert runs.strategy is S.LOWPRECISION
    assert runs.launch is not None
    assert runs.launch.wire_format is WireFormat.TQ3
    for decision, reason in (
        (low_precision(4096, "float32", cpu), "compression is for bfloat16 and float16, not float32"),
        (
            low_precision(4096, "bfloat16", cpu, min_bytes="1MiB"),
            "messages below 1048576 bytes stay exact (low_precision.min_bytes)",
        ),
        (low_precision(4096, "float16", dataclasses.replace(cpu, world_size=16)), "for 2 to 8 ranks, not 16"),
    ):
        assert decision.strategy is S.MINLATENCY
        assert reason in decision.reason


def test_what_works_as_documented_is_no_fallback() -> None:
    """Small messages stay exact under LOWPRECISION: as asked for. What cannot run is a fallback, as ever."""
    cpu = facts(transport=Transport.SHM, workspace=4 << 20)
    switched = facts(4, in_band=True)
    for decision in (
        low_precision(4096, "bfloat16", cpu, min_bytes="1MiB"),
        low_precision(4096, "bfloat16", switched),  # below the documented crossover
        low_precision(1, "float16", switched),
    ):
        assert (decision.strategy, decision.by_design, decision.is_fallback) == (S.MINLATENCY, True, False)
        assert decision.runs_another
        assert fallback_of(decision) is None
    large = low_precision(1 << 26, "bfloat16", switched)
    assert (large.strategy, large.by_design, large.runs_another) == (S.LOWPRECISION, False, False)
    for decision in (
        low_precision(4096, "float32", cpu),
        low_precision(4096, "float32", cpu, min_bytes="1MiB"),
        low_precision(4096, "float16", dataclasses.replace(cpu, world_size=16), min_bytes="1MiB"),
        low_precision(4096, "bfloat16", facts(transport=Transport.NONE), min_bytes="1MiB"),
    ):
        assert (decision.by_design, decision.is_fallback) == (False, True)
        assert fallback_of(decision) is not None


@given(st.integers(0, 1 << 26), st.sampled_from(list(WireFormat)), st.integers(2, 8), st.integers(1 << 19, 1 << 24))
def test_low_precision_launches_fit_their_slots(count: int, wire: WireFormat, world_size: int, workspace: int) -> None:
    group = facts(world_size, transport=Transport.SHM, workspace=workspace)
    launch = low_precision(count, "bfloat16", group, wire_format=wire).launch
    assert launch is not None
    codec = CODECS[wire]
    packet_vectors = codec.packet_bytes // VECTOR_BYTES
    assert launch.chunk_vectors % packet_vectors == 0
    chunk = launch.chunk_vectors // packet_vectors
    assert 1 <= chunk <= group.flagged.two_shot // codec.packet_bytes
    per_round = chunk * world_size * codec.packet_values
    assert launch.rounds * per_round >= count
    assert (launch.rounds - 1) * per_round < max(count, 1)


def test_what_no_kernel_can_do_goes_to_nccl_with_the_reason() -> None:
    integers = decide(config("ONESHOT"), facts(), 64, "int32")
    assert integers.strategy is S.NCCL
    assert integers.reason == "no kernel for dtype int32 (there are for float32, float16, bfloat16)"
    alone = decide(config("AUTO"), facts(transport=Transport.NONE), 64, "bfloat16")
    assert (alone.strategy, alone.reason) == (S.NCCL, "a test says so")


def test_description() -> None:
    assert describe(config("AUTO"), facts(4)) == "ONESHOT to 512 KiB, then TWOSHOT"
    assert describe(config("AUTO"), facts(4, in_band=True)) == "ONESHOT to 192 KiB, then TWOSHOT"
    assert describe(config("MINLATENCY"), facts(2, in_band=True)) == (
        "one-shot to 2 MiB, two-shot to 4 MiB, then one-shot"
    )
    assert describe(config("TWOSHOT"), facts(4)) == "TWOSHOT at every size"
    assert describe(config("AUTO", one_shot_max_bytes=3000), facts(4)) == "ONESHOT to 2.93 KiB, then TWOSHOT"
    assert describe(config("AUTO"), facts(transport=Transport.NONE)) == "NCCL at every size"
