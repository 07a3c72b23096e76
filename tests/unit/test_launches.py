"""Launches cover a message, and fit the slots of their workspace."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin.algorithms.base import MAX_FLAGGED_THREADS, MAX_THREADS, VECTOR_BYTES, spread
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.topology.links import Transport
from tests.support.group_facts import any_facts, config
from tests.support.launches import owned_vectors


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
    any_facts.filter(lambda group: group.transport is Transport.HOST and not group.crosses_network),
    st.sampled_from(("ONESHOT", "TWOSHOT", "MINLATENCY")),
)
def test_launches_through_host_memory_fit_their_slots(count: int, group: GroupFacts, strategy: str) -> None:
    launch = decide(config(strategy), group, count, "bfloat16").launch
    assert launch is not None
    one_shot = launch.algorithm is Algorithm.ONE_SHOT
    parts = 1 if one_shot else group.world_size
    slots = group.in_band if launch.in_band else group.flagged
    assert 1 <= launch.chunk_vectors * VECTOR_BYTES <= (slots.one_shot if one_shot else slots.two_shot)
    assert owned_vectors(launch) * parts * VECTOR_BYTES * launch.rounds >= count * 2
    assert launch.rounds == 1 or not launch.in_band
    assert 1 <= launch.lanes <= group.lanes
    assert 32 <= launch.threads <= MAX_FLAGGED_THREADS
