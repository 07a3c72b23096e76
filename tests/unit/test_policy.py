"""The policy is total, deterministic and says why."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import _C, AllReduceConfig, AllReduceStrategy
from llm_allreduce_plugin.selection.facts import ELEMENT_BYTES, SUPPORTED_WORLD_SIZES, GroupFacts, Transport
from llm_allreduce_plugin.selection.policy import decide, describe
from llm_allreduce_plugin.selection.tables import one_shot_max_bytes
from llm_allreduce_plugin.strategies import STRATEGIES
from llm_allreduce_plugin.strategies.base import MAX_THREADS, VECTOR_BYTES, spread

S = AllReduceStrategy


def facts(
    world_size: int = 4,
    transport: Transport = Transport.SYMMETRIC,
    workspace: int = 64 << 20,
    in_band: bool = False,
) -> GroupFacts:
    if transport is Transport.NONE:
        return GroupFacts(
            world_size=world_size, device="cuda", transport=transport, no_transport_reason="a test says so"
        )
    lanes = 1 if transport is Transport.SHM else _C.MAX_LANES
    layout = _C.make_layout(world_size, lanes, workspace, in_band=in_band and lanes > 1)
    device = "cpu" if transport is Transport.SHM else "cuda"
    return GroupFacts(world_size=world_size, device=device, transport=Transport.NONE).with_layout(transport, layout)


def config(strategy: str, **settings: object) -> AllReduceConfig:
    return AllReduceConfig(allreduce_strategy=strategy, **settings)  # type: ignore[arg-type]


any_facts = st.builds(
    facts,
    world_size=st.sampled_from(SUPPORTED_WORLD_SIZES),
    transport=st.sampled_from(list(Transport)),
    workspace=st.integers(2 << 20, 1 << 28),
    in_band=st.booleans(),
)


@given(
    st.sampled_from(list(S)),
    any_facts,
    st.integers(0, 1 << 34),
    st.sampled_from([*ELEMENT_BYTES, "int32", "float8_e4m3fn"]),
)
def test_total_deterministic_and_reasoned(strategy: S, group: GroupFacts, count: int, dtype: str) -> None:
    decision = decide(config(strategy), group, count, dtype)
    assert decision == decide(config(strategy), dataclasses.replace(group), count, dtype)
    assert decision.requested is strategy
    assert decision.reason
    named = {other.strategy for other in decision.passed_over}
    assert named == set(STRATEGIES) - {decision.strategy}
    assert all(other.reason for other in decision.passed_over)
    if decision.strategy is S.NCCL:
        assert decision.launch is None
    else:
        assert STRATEGIES[decision.strategy].obstacle is not None
        assert dtype in ELEMENT_BYTES
        assert decision.launch is not None
    # AUTO and its relatives never choose a lossy format.
    if strategy is not S.LOWPRECISION:
        assert decision.strategy is not S.LOWPRECISION
    assert str(decision)


@given(st.integers(0, 1 << 31), st.integers(1, 1 << 20), st.integers(1, 128), st.sampled_from((1, 2, 3, 8, 16)))
def test_spread_covers_every_vector_exactly(vectors: int, chunk_vectors: int, lanes: int, parts: int) -> None:
    """The kernels give lane l of part p in round r the vectors from ((r * parts + p) * lanes + l) * chunk on."""
    launch = spread(vectors, chunk_vectors * VECTOR_BYTES, lanes, parts)
    assert 1 <= launch.lanes <= lanes
    assert 32 <= launch.threads <= MAX_THREADS
    assert launch.threads % 32 == 0
    assert 1 <= launch.chunk_vectors <= chunk_vectors
    per_round = launch.lanes * launch.chunk_vectors * parts
    assert launch.rounds * per_round >= vectors
    assert not launch.in_band
    assert vectors == 0 or (launch.rounds - 1) * per_round < vectors


@given(st.integers(0, 1 << 22), st.sampled_from(SUPPORTED_WORLD_SIZES), st.sampled_from(("ONESHOT", "TWOSHOT")))
def test_in_band_launches_fit_their_slots(count: int, world_size: int, strategy: str) -> None:
    group = facts(world_size, in_band=True)
    launch = decide(config(strategy), group, count, "bfloat16").launch
    assert launch is not None
    one_shot = strategy == "ONESHOT"
    capacity = group.one_shot_in_band_chunk_bytes if one_shot else group.two_shot_in_band_chunk_bytes
    parts = 1 if one_shot else world_size
    fits = count * 2 <= group.lanes * (capacity // VECTOR_BYTES) * VECTOR_BYTES * parts
    assert launch.in_band == fits
    if launch.in_band:
        assert launch.rounds <= 1
        assert launch.chunk_vectors * VECTOR_BYTES <= capacity
        assert launch.lanes * launch.chunk_vectors * parts * VECTOR_BYTES >= count * 2


@pytest.mark.parametrize("strategy", ("ONESHOT", "TWOSHOT"))
def test_asked_for_by_name_runs_at_every_size(strategy: str) -> None:
    for count in (0, 1, 8, 1 << 20, 1 << 29):
        decision = decide(config(strategy), facts(), count, "bfloat16")
        assert decision.strategy == strategy
        assert not decision.is_fallback
        assert decision.reason == f"allreduce_strategy is {strategy}"


@pytest.mark.parametrize("in_band", (False, True))
def test_auto_changes_over_at_the_threshold(in_band: bool) -> None:
    for world_size in SUPPORTED_WORLD_SIZES:
        threshold = one_shot_max_bytes(world_size, in_band=in_band)
        group = facts(world_size, in_band=in_band)
        assert decide(config("AUTO"), group, threshold // 2, "bfloat16").strategy is S.ONESHOT
        over = decide(config("AUTO"), group, threshold // 2 + 1, "bfloat16")
        assert over.strategy is S.TWOSHOT
        assert f"seed table for {world_size} ranks" in over.reason
    small = config("AUTO", one_shot_max_bytes="1KiB")
    assert decide(small, facts(), 513, "bfloat16").strategy is S.TWOSHOT
    assert "one_shot_max_bytes" in decide(small, facts(), 513, "bfloat16").reason


@given(st.integers(1, 1000), st.booleans())
def test_threshold_of_any_world_size(world_size: int, in_band: bool) -> None:
    assert one_shot_max_bytes(world_size, in_band=in_band) > 0
    assert one_shot_max_bytes(world_size + 1, in_band=in_band) <= one_shot_max_bytes(world_size, in_band=in_band)


@pytest.mark.parametrize(
    ("strategy", "runs"),
    [("MINLATENCY", "ONESHOT"), ("UB", "TWOSHOT"), ("LOWPRECISION", "ONESHOT"), ("MNNVL", "ONESHOT")],
)
def test_missing_kernels_fall_back_with_exactly_that_reason(strategy: str, runs: str) -> None:
    decision = decide(config(strategy), facts(), 64, "bfloat16")
    assert decision.strategy == runs
    assert decision.is_fallback
    reasons = [f"the {strategy} kernel does not exist yet"]
    if strategy in ("LOWPRECISION", "MNNVL"):
        reasons.append("the MINLATENCY kernel does not exist yet")
    assert decision.reason == "; ".join(reasons)


def test_what_no_kernel_can_do_goes_to_nccl_with_the_reason() -> None:
    integers = decide(config("ONESHOT"), facts(), 64, "int32")
    assert integers.strategy is S.NCCL
    assert integers.reason == "no kernel for dtype int32 (there are for float32, float16, bfloat16)"
    alone = decide(config("AUTO"), facts(transport=Transport.NONE), 64, "bfloat16")
    assert (alone.strategy, alone.reason) == (S.NCCL, "a test says so")


def test_description() -> None:
    assert describe(config("AUTO"), facts(4)) == "ONESHOT to 512 KiB, then TWOSHOT"
    assert describe(config("AUTO"), facts(4, in_band=True)) == "ONESHOT to 256 KiB, then TWOSHOT"
    assert describe(config("TWOSHOT"), facts(4)) == "TWOSHOT at every size"
    assert describe(config("AUTO", one_shot_max_bytes=3000), facts(4)) == "ONESHOT to 2.93 KiB, then TWOSHOT"
    assert describe(config("AUTO"), facts(transport=Transport.NONE)) == "NCCL at every size"
