"""The policy is total, deterministic and says why."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceStrategy
from llm_allreduce_plugin.algorithms.base import Message, Numerics
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.selection.policy import decide, describe
from llm_allreduce_plugin.topology.links import Transport
from tests.support.group_facts import any_facts, config, facts

S = AllReduceStrategy


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


@pytest.mark.parametrize("strategy", ("ONESHOT", "TWOSHOT"))
def test_asked_for_by_name_runs_at_every_size(strategy: str) -> None:
    for count in (0, 1, 8, 1 << 20, 1 << 29):
        decision = decide(config(strategy), facts(), count, "bfloat16")
        assert decision.strategy == strategy
        assert not decision.is_fallback
        assert decision.reason == f"allreduce_strategy is {strategy}"


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


def test_what_no_kernel_can_do_goes_to_nccl_with_the_reason() -> None:
    integers = decide(config("ONESHOT"), facts(), 64, "int32")
    assert integers.strategy is S.NCCL
    assert integers.reason == "no kernel for dtype int32 (there are for float32, float16, bfloat16)"
    alone = decide(config("AUTO"), facts(transport=Transport.NONE), 64, "bfloat16")
    assert (alone.strategy, alone.reason) == (S.NCCL, "a test says so")


def test_description() -> None:
    assert describe(config("AUTO"), facts(4)) == "ONESHOT to 512 KiB, then TWOSHOT"
    assert describe(config("AUTO"), facts(4, in_band=True)) == "ONESHOT to 216 KiB, then TWOSHOT"
    assert describe(config("MINLATENCY"), facts(2, in_band=True)) == (
        "one-shot to 3.25 MiB, two-shot to 8.75 MiB, then one-shot"
    )
    assert describe(config("TWOSHOT"), facts(4)) == "TWOSHOT at every size"
    assert describe(config("AUTO", one_shot_max_bytes=3000), facts(4)) == "ONESHOT to 2.93 KiB, then TWOSHOT"
    assert describe(config("AUTO"), facts(transport=Transport.NONE)) == "NCCL at every size"
