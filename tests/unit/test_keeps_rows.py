"""FP8_GROUP: a row's answer does not depend on its batch, by the oracle and the policy, and faults that would show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_allreduce_plugin import AllReduceConfig, AllReduceStrategy, load_config
from llm_allreduce_plugin.algorithms.decision import Algorithm, Decision
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.algorithms.low_precision_algorithm import algorithm_of
from llm_allreduce_plugin.config import LowPrecisionAlgorithm, LowPrecisionConfig, WireFormat
from llm_allreduce_plugin.oracle import fp8_group, two_shot
from llm_allreduce_plugin.oracle.one_shot import one_step_sum
from llm_allreduce_plugin.oracle.two_shot import compressed_sum
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.topology.links import Transport
from tests.support.group_facts import any_facts, facts
from tests.support.low_precision import DOMAINS, expected_sum
from tests.support.rows import HIDDEN, check_rows, rows_of
from tests.unit.test_network import TWO_OF_EIGHT
from tests.unit.test_network import facts as network_facts

S, A, GROUP = AllReduceStrategy, LowPrecisionAlgorithm, WireFormat.FP8_GROUP
BATCHES = (1, 2, 17, 65)
Sum = Callable[[list[torch.Tensor]], torch.Tensor]


def config(**changes: Any) -> AllReduceConfig:
    return AllReduceConfig(
        allreduce_strategy=S.LOWPRECISION, low_precision=LowPrecisionConfig(**{"wire_format": GROUP, **changes})
    )


def decision(group: GroupFacts, count: int, dtype: str = "bfloat16", **changes: Any) -> Decision:
    return decide(config(**changes), group, count, dtype)


def check(summed: Sum, world_size: int, hidden: int, batches: tuple[int, ...] = BATCHES) -> None:
    parts = [rows_of(hidden, rank, hidden) for rank in range(world_size)]
    check_rows(lambda index: summed([part[index] for part in parts]), batches, 1, f"{world_size} ranks, {hidden} wide")


def by_policy(group: GroupFacts, **changes: Any) -> Sum:
    """What runs in a group, by the oracle."""

    def summed(inputs: list[torch.Tensor]) -> torch.Tensor:
        found = decision(group, inputs[0].numel(), **changes)
        assert found.strategy is S.LOWPRECISION
        assert found.launch is not None
        return expected_sum(found.launch, inputs)

    return summed


GROUPS = {
    "in band": lambda size: facts(size, in_band=True),
    "flagged": facts,
    "host": lambda size: facts(size, Transport.HOST),
    "cpu": lambda size: facts(size, Transport.SHM, workspace=4 << 20),
}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_a_row_s_answer_is_its_own(world_size: int, hidden: int) -> None:
    for make in GROUPS.values():
        check(by_policy(make(world_size)), world_size, hidden, BATCHES if world_size < 8 else BATCHES[:3])


@pytest.mark.parametrize("algorithm", ("one_shot", "two_shot", "ring", "hierarchical"))
def test_and_so_with_every_setting_of_the_algorithm(algorithm: str) -> None:
    for make in GROUPS.values():
        group = make(4)
        check(by_policy(group, algorithm=algorithm, domains=DOMAINS["2+2"]), 4, 2880, BATCHES[:3])
        choice = algorithm_of(config(algorithm=algorithm, domains=DOMAINS["2+2"]), group)
        assert choice.is_fallback == (algorithm not in ("two_shot", choice.algorithm)), choice


def test_a_batch_of_many() -> None:
    check(by_policy(facts(2, in_band=True)), 2, 2880, (4096,))
    check(by_policy(facts(3, in_band=True)), 3, 2880, (1031,))


@settings(max_examples=200)
@given(any_facts, st.sampled_from(list(A)), st.lists(st.integers(1, 1 << 26), min_size=2, max_size=6))
def test_one_algorithm_runs_at_every_size(group: GroupFacts, algorithm: A, counts: list[int]) -> None:
    """Whatever the size: the group alone says which, or that none can."""
    found = [decision(group, count, algorithm=algorithm) for count in (1, *counts)]
    kinds = {(each.strategy is S.LOWPRECISION, each.launch and each.launch.algorithm) for each in found}
    if found[0].strategy is S.LOWPRECISION:
        assert len(kinds) == 1
        assert next(iter(kinds))[1] in (Algorithm.ONE_SHOT, Algorithm.TWO_SHOT)
    else:
        assert {ran for ran, _ in kinds} == {False}


@pytest.mark.parametrize(
    ("group", "algorithm", "reason"),
    [
        (facts(2, in_band=True), Algorithm.ONE_SHOT, "one_shot, at every size alike: with 2 ranks, one step sends"),
        (
            facts(4, in_band=True),
            Algorithm.TWO_SHOT,
            "two_shot, at every size alike: with 4 ranks, one step sends more",
        ),
        (facts(2, Transport.HOST), Algorithm.TWO_SHOT, "two_shot, at every size alike: through host memory one step"),
        (facts(2, Transport.SHM), Algorithm.TWO_SHOT, "two_shot, at every size alike: one step is for GPUs"),
    ],
)
def test_reasons(group: GroupFacts, algorithm: Algorithm, reason: str) -> None:
    for count in (1, 2880, 1 << 24):
        found = decision(group, count)
        assert found.launch is not None
        assert found.launch.algorithm is algorithm
        assert reason in found.reason
        assert not found.is_fallback


def test_what_cannot_run_says_why() -> None:
    switched = facts(4, in_band=True)
    for algorithm in ("ring", "hierarchical"):
        found = decision(switched, 4096, algorithm=algorithm, domains=DOMAINS["2+2"])
        assert found.launch is not None
        assert found.launch.algorithm is Algorithm.TWO_SHOT
        assert f"{algorithm} cannot run: it makes the answer for a row depend on the rows beside it" in found.reason
    by_name = decision(switched, 4096, algorithm="one_shot")
    assert by_name.launch is not None
    assert by_name.launch.algorithm is Algorithm.ONE_SHOT
    host = decision(facts(2, Transport.HOST), 4096, algorithm="one_shot")
    assert "one_shot cannot run: through host memory one step is for small messages" in host.reason
    over_network = decision(network_facts(TWO_OF_EIGHT), 1 << 24)
    assert over_network.strategy is S.MINLATENCY
    assert over_network.is_fallback
    assert "fp8_group is not sent between hosts" in over_network.reason


def test_small_messages_are_compressed_unless_somebody_says_otherwise() -> None:
    switched = facts(4, in_band=True)
    assert decision(switched, 1).strategy is S.LOWPRECISION
    assert decision(switched, 1, min_bytes=0).strategy is S.LOWPRECISION
    small = decision(switched, 1, min_bytes=1000)
    assert (small.strategy, small.by_design) == (S.MINLATENCY, True)
    assert "messages below 1000 bytes stay exact (low_precision.min_bytes)" in small.reason
    assert "a row's answer then depends on its batch" in small.reason


@pytest.mark.parametrize("wire", list(WireFormat))
@pytest.mark.parametrize("algorithm", ("auto", "two_shot"))
def test_what_is_compressed_is_not_fused_with_a_norm(algorithm: str, wire: WireFormat) -> None:
    """In a fused kernel the sum would be exact: of small batches, and not of large ones."""
    wanted = config(wire_format=wire, algorithm=algorithm, min_bytes=0)
    for make in GROUPS.values():
        for rows in (1, 16, 4096):
            found = decide_fused(wanted, make(2), rows, 4096, "bfloat16")
            if not wire.goes_in_band and found.all_reduce.strategy is not S.LOWPRECISION:
                continue  # these slots are none of its
            assert found.all_reduce.strategy is S.LOWPRECISION
            assert found.launch is None
            assert found.reason == "only exact sums are fused, and this one is compressed on the wire"


@pytest.mark.parametrize("name", ("fp8_group", "FP8_GROUP", " Fp8_Group"))
def test_the_setting(name: str) -> None:
    assert load_config({"low_precision": {"wire_format": name}}).low_precision.wire_format is GROUP


# -- faults, each of which the checks above see ------------------------------------------------------------------------


def sees(summed: Sum, world_size: int, hidden: int = 2880) -> None:
    with pytest.raises(AssertionError, match="elements differ"):
        check(summed, world_size, hidden)


def test_owners_that_do_not_round_their_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_shot, "own_values", lambda values, _wire: values.float())
    for make in GROUPS.values():
        sees(by_policy(make(4)), 4)


def test_a_group_that_spans_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FP8's packets do; groups of 96 divide 2880, and not 4096."""
    sees(lambda inputs: one_step_sum(inputs, WireFormat.FP8), 2)
    monkeypatch.setattr(fp8_group, "GROUP_VALUES", 96)
    check(lambda inputs: compressed_sum(inputs, GROUP), 4, 2880)
    sees(lambda inputs: compressed_sum(inputs, GROUP), 4, 4096)


def test_an_algorithm_that_changes_with_the_size() -> None:
    def by_size(inputs: list[torch.Tensor]) -> torch.Tensor:
        small = inputs[0].shape[0] < 64
        return one_step_sum(inputs, GROUP) if small else compressed_sum(inputs, GROUP)

    sees(by_size, 4)


def test_exact_below_a_size() -> None:
    def exact_when_small(inputs: list[torch.Tensor]) -> torch.Tensor:
        if decision(facts(4), inputs[0].numel(), min_bytes=64 * 2880).strategy is S.LOWPRECISION:
            return compressed_sum(inputs, GROUP)
        return two_shot.exact_sum(inputs)

    sees(exact_when_small, 4)


def test_a_ring() -> None:
    """Why it is refused: each part is summed in another order."""
    from llm_allreduce_plugin.oracle.ring import ring_sum

    sees(lambda inputs: ring_sum(inputs, GROUP), 4)
