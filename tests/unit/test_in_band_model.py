"""Two generations of slots are enough where vectors are pushed, four where they are published; and no rule can go.

``IN_BAND_MODEL_EXAMPLES``: how many scenarios to try instead of a few hundred.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from tests.support.in_band_kernels import Published, Pushed
from tests.support.in_band_model import EPOCHS, Algorithm, Call, Exchange, Fault, Rules, ViolationError
from tests.support.weak_memory import Order

ALGORITHMS: dict[type[Exchange], tuple[Algorithm, ...]] = {
    Pushed: ("one_shot", "two_shot", "pull"),
    Published: ("one_shot", "two_shot"),
}
EXAMPLES = int(os.environ.get("IN_BAND_MODEL_EXAMPLES", "200"))
MOST_TRIES = 500  # until a broken rule must have been seen to matter

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Scenario:
    ranks: int
    lanes: int
    epoch: int
    calls: tuple[Call, ...]
    order: Order

    def run(self, exchange: type[Exchange], rules: Rules | None = None) -> Exchange:
        model = exchange(self.ranks, self.lanes, self.order, epoch=self.epoch, rules=rules)
        model.run(self.calls)
        return model

    def fault(self, exchange: type[Exchange], rules: Rules) -> Fault | None:
        try:
            self.run(exchange, rules)
        except ViolationError as error:
            return error.fault
        return None


@st.composite
def calls(draw: Draw, exchange: type[Exchange], algorithms: tuple[Algorithm, ...], lanes: int) -> Call:
    used = draw(st.integers(1, lanes))
    call = Call(
        draw(st.sampled_from(algorithms)),
        vectors=draw(st.integers(1, 8)),
        lanes=used,
        threads=draw(st.integers(1, 2)),
        spare=draw(st.integers(0, 2)),
    )
    if exchange is Published or call.algorithm == "pull" or used == 1 or draw(st.booleans()):
        return call
    scatter_lanes = draw(st.integers(1, used - 1))
    drain_lanes = draw(st.integers(0, used - scatter_lanes - 1)) if call.algorithm == "two_shot" else 0
    return dataclasses.replace(call, scatter_lanes=scatter_lanes, drain_lanes=drain_lanes)


@st.composite
def scenarios(draw: Draw, exchange: type[Exchange], algorithms: tuple[Algorithm, ...] = ()) -> Scenario:
    ranks, lanes = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    call = calls(exchange, algorithms or ALGORITHMS[exchange], lanes)
    paces = st.tuples(*[st.sampled_from((-1, 0, 0, 1))] * ranks)
    order = Order(
        seed=draw(st.integers(0, (1 << 32) - 1)),
        changes=draw(st.sampled_from((0.01, 0.1, 0.5))),
        threads=draw(paces),
        data=draw(paces),
        clears=draw(paces),
        early=draw(st.sampled_from((0.0, 0.5))),
        resident=draw(st.integers(1, lanes)),
    )
    epoch = draw(st.integers(0, 4) | st.integers(EPOCHS - 6, EPOCHS - 1) | st.integers(0, EPOCHS - 1))
    return Scenario(ranks, lanes, epoch, tuple(draw(st.lists(call, min_size=3, max_size=7))), order)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(scenarios(Pushed))
def test_two_generations_are_enough_where_vectors_are_pushed(scenario: Scenario) -> None:
    assert scenario.run(Pushed).machine.most_ahead <= 1, "no rank ends a call that another has not begun"


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(scenarios(Published))
def test_four_generations_are_enough_where_vectors_are_published(scenario: Scenario) -> None:
    assert scenario.run(Published).machine.most_ahead <= 1, "no rank ends a call that another has not begun"


def see(strategy: st.SearchStrategy[Scenario], exchange: type[Exchange], rules: Rules, fault: Fault) -> None:
    """Find a scenario that a broken rule makes fail in this way, and that is none without it.

    Raises:
        NoSuchExample: from hypothesis: there is none.
    """
    many = settings(max_examples=MOST_TRIES, phases=(Phase.generate,), derandomize=True, database=None, deadline=None)
    found = find(strategy, lambda scenario: scenario.fault(exchange, rules) == fault, settings=many)
    found.run(exchange)


BROKEN: list[tuple[type[Exchange], dict[str, Any], dict[Algorithm, tuple[Fault, ...]]]] = [
    # A generation used again at once. TWOSHOT never takes a wrong value from it: a peer that ends a call has results of
    # all owners, who have thus read all partials, and an owner's next results need this rank's next partials. But what
    # is stored there may be cleared with what was there before.
    (Pushed, {"generations": 1}, {"one_shot": ("wrong", "stuck"), "two_shot": ("stuck",)}),
    (Published, {"generations": 2}, {"one_shot": ("wrong",), "two_shot": ("wrong", "stuck")}),
    (Published, {"generations": 3}, {"one_shot": ("wrong",), "two_shot": ("wrong", "stuck")}),
    # A clear that is left out, and those of another call.
    (
        Pushed,
        {"skipped_clear": (0, 0)},
        {"one_shot": ("wrong", "uncleared"), "two_shot": ("wrong",), "pull": ("wrong",)},
    ),
    (Published, {"skipped_clear": (2, 0)}, {"one_shot": ("wrong", "uncleared"), "two_shot": ("wrong",)}),
    (Pushed, {"clears_after": 1}, {"one_shot": ("stuck",), "two_shot": ("stuck",)}),
    (Published, {"clears_after": 1}, {"one_shot": ("stuck",), "two_shot": ("stuck",)}),
    (Published, {"clears_after": 3}, {"one_shot": ("wrong",), "two_shot": ("wrong", "stuck")}),
    # What gives order.
    (Pushed, {"waits_before_sending": False}, {"one_shot": ("wrong",), "two_shot": ("stuck",)}),
    (Published, {"waits_before_sending": False}, {"one_shot": ("wrong",), "two_shot": ("stuck",)}),
    (Pushed, {"kernel_ends_after_clears": False}, {"one_shot": ("stuck",), "two_shot": ("wrong",), "pull": ("stuck",)}),
    (Published, {"releaser_waits": False}, {"one_shot": ("wrong",), "two_shot": ("wrong", "stuck")}),
    # Epochs and lengths.
    (Pushed, {"counts_absent_lanes": False}, {"one_shot": ("wrong", "stuck", "uncounted"), "two_shot": ("stuck",)}),
    (Published, {"counts_absent_lanes": False}, {"one_shot": ("wrong", "uncounted"), "two_shot": ("wrong",)}),
    (Pushed, {"counts_after_all_read": False}, {"one_shot": ("stuck",), "two_shot": ("stuck",)}),
    (Published, {"counts_after_all_read": False}, {"one_shot": ("stuck",), "two_shot": ("stuck",)}),
    (Published, {"keeps_lengths_of_absent_lanes": False}, {"one_shot": ("wrong",), "two_shot": ("wrong",)}),
    # Vectors that arrive in parts.
    (Pushed, {"checks_every_word": False}, {"one_shot": ("wrong",), "two_shot": ("wrong",)}),
    (Published, {"checks_every_word": False}, {"one_shot": ("wrong",), "two_shot": ("wrong",)}),
]


@pytest.mark.parametrize(
    ("exchange", "rules", "algorithm", "faults"),
    [
        pytest.param(exchange, rules, algorithm, faults, id=f"{exchange.__name__}, {algorithm}: {rules}")
        for exchange, rules, seen in BROKEN
        for algorithm, faults in seen.items()
    ],
)
def test_the_model_sees_what_each_rule_prevents(
    exchange: type[Exchange], rules: dict[str, Any], algorithm: Algorithm, faults: tuple[Fault, ...]
) -> None:
    for fault in faults:
        see(scenarios(exchange, (algorithm,)), exchange, Rules(**rules), fault)


@pytest.mark.parametrize("fault", ("wrong", "stuck"))
@pytest.mark.parametrize("rule", ("counts_together", "generations_alike"))
def test_the_model_sees_algorithms_that_do_not_share_generations(rule: str, fault: Fault) -> None:
    """Their slots are the same bytes."""
    see(scenarios(Pushed), Pushed, Rules(**{rule: False}), fault)


@pytest.mark.parametrize("algorithm", ALGORITHMS[Pushed])
def test_only_calls_of_several_algorithms_show_counts_apart(algorithm: Algorithm) -> None:
    @settings(max_examples=EXAMPLES // 4, deadline=None, derandomize=True)
    @given(scenarios(Pushed, (algorithm,)))
    def check(scenario: Scenario) -> None:
        scenario.run(Pushed, Rules(counts_together=False))

    check()


def test_the_model_sees_split_lanes_on_some_ranks_only() -> None:
    """Where few blocks run at once, ranks whose blocks wait in different orders wait for each other in a circle."""

    def split(scenario: Scenario) -> Scenario:
        one_by_one = dataclasses.replace(scenario.order, resident=1)
        calls = [dataclasses.replace(call, lanes=3, scatter_lanes=1, drain_lanes=1) for call in scenario.calls]
        return dataclasses.replace(scenario, lanes=3, calls=tuple(calls), order=one_by_one)

    strategy = scenarios(Pushed, ("two_shot",)).map(split)
    see(strategy, Pushed, Rules(splits_on_all_ranks=False), "stuck")


@settings(max_examples=EXAMPLES // 2, deadline=None, derandomize=True)
@given(scenarios(Pushed, ("pull",)))
def test_inputs_read_in_place_would_need_one_generation_only(scenario: Scenario) -> None:
    """Owners send results once all flags of the call are there, which ranks raise after all of their earlier kernels.

    The second generation is for TWOSHOT, which shares the slots.
    """
    scenario.run(Pushed, Rules(generations=1))
