"""Slots of multicast calls are never used too early, however late a store comes back to its sender."""

from __future__ import annotations

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.multicast_model import Call, Model, Rules, StuckError, UnclearedError, WrongValueError

CALLS = st.lists(st.tuples(st.sampled_from(("one_shot", "two_shot")), st.integers(1, 9)), min_size=2, max_size=7)
Fault = type[AssertionError]


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 5), CALLS, st.integers(0, 1 << 32))
def test_no_order_of_arrivals_spoils_a_call(ranks: int, calls: list[Call], seed: int) -> None:
    Model(ranks).run(calls, random.Random(seed))


@functools.cache
def faults_of(rules: Rules, algorithm: str, enough: frozenset[Fault] = frozenset()) -> set[Fault]:
    """What comes of many runs of calls of changing size, or of as many as it takes to have seen ``enough``."""
    found: set[Fault] = set()
    for seed in range(400):
        generator = random.Random(seed)
        calls = [(algorithm, generator.randint(1, 9)) for _ in range(6)]
        try:
            Model(4, rules).run(calls, generator)
        except AssertionError as error:
            found.add(type(error))
            if enough and enough <= found:
                break
    return found


@pytest.mark.parametrize(
    ("rules", "algorithm", "expected"),
    [
        # Results lie where those of another owner lie in the next message: what comes back late is taken for theirs.
        (Rules(polls_own=False), "two_shot", {WrongValueError, UnclearedError}),
        (Rules(polls_own=False), "one_shot", {UnclearedError}),
        (Rules(absolute_places=False), "two_shot", {WrongValueError}),
        (Rules(absolute_places=False), "one_shot", {WrongValueError}),
        (Rules(clears_own_alone=False), "two_shot", {StuckError}),
        (Rules(clears_own_alone=False), "one_shot", {StuckError}),
        (Rules(generations=1), "one_shot", {WrongValueError}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),  # a set's text is in no order, and ids are compared
)
def test_a_broken_rule_shows(rules: Rules, algorithm: str, expected: set[Fault]) -> None:
    assert expected <= faults_of(rules, algorithm, frozenset(expected))
    assert faults_of(Rules(), algorithm) == set()
