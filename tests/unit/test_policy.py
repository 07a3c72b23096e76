"""The policy is total, deterministic and says why."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceStrategy
from llm_allreduce_plugin.algorithms.base import Message, Numerics
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.algorithms.strategies import STRATEGIES
from llm_allreduce_plugin.quantization import QuantKind
from llm_allreduce_plugin.selection.policy import decide, decide_fused, describe
from llm_allreduce_plugin.topology.links import Transport
from tests.support.group_facts import any_facts, config, facts, over_hosts

S = AllReduceStrategy


@tries(max_examples=400)  # many strategies, types and ways that hosts are joined
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


@pytest.mark.parametrize("hosts", (None, 2, 4))
@pytest.mark.parametrize("fabric", (False, True))
def test_a_type_without_a_kernel_runs_on_nccl_wherever_ranks_are(hosts: int | None, fabric: bool) -> None:
    for transport, world_size, strategy in itertools.product(Transport, (4, 8), S):
        group = over_hosts(facts(world_size, transport), hosts, 64 << 20, fabric=fabric)
        decision = decide(config(strategy), group, 64, "int32")
        assert decision.strategy is S.NCCL
        if strategy is not S.NCCL and transport is not Transport.NONE:
            assert "no kernel for dtype int32" in str(decision), (strategy, transport)


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


def test_under_auto_only_kernels_of_the_table_are_passed_over_for_its_size() -> None:
    fabric = dataclasses.replace(facts(in_band=True), hosts=(0, 0, 1, 1), fabric=True)
    decision = decide(config("AUTO", registered_pool="64MiB"), fabric, 4 << 20, "bfloat16")
    assert decision.strategy is S.TWOSHOT
    same = "it runs the same kernels as AUTO"
    reasons = {other.strategy: other.reason for other in decision.passed_over}
    seed = "the seed table for 4 ranks: measured on 4 H200"
    assert reasons == {
        S.ONESHOT: f"8 MiB are more than 216 KiB, where two steps beat one ({seed})",
        S.MINLATENCY: same,
        S.MNNVL: same,
        S.LOWPRECISION: "AUTO never compresses",
        S.UB: "ranks run on 2 hosts, and registered memory is that of one",
        S.NCCL: "a kernel of this package can run",
    }
    of = {"registered_pool": "64MiB"}
    for settings, reason in (
        (of, "results stored into registered outputs were not measured to be faster"),
        (of | {"one_shot_max_bytes": "1M"}, "one_shot_max_bytes chooses between one step and two"),
    ):
        decision = decide(config("AUTO", **settings), facts(in_band=True), 4 << 20, "bfloat16")
        assert {other.strategy: other.reason for other in decision.passed_over}[S.UB] == reason


def test_a_fused_decision_names_the_quantization_that_there_is() -> None:
    plain = decide_fused(config("ONESHOT"), facts(2, in_band=True), 8, 8192, "bfloat16")
    assert str(plain).startswith("ONESHOT (fused norm): one-shot; residual and norm in the same kernel\n")
    quantized = decide_fused(config("ONESHOT"), facts(2, in_band=True), 8, 8192, "bfloat16", QuantKind.FP8_TOKEN)
    assert "; residual, norm and quantization (fp8-token) in the same kernel\n" in str(quantized)


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
