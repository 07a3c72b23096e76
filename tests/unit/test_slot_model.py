"""Four slots are enough for every order of flagged calls, however far ranks race ahead or fall behind."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.low_precision import DOMAINS
from tests.support.slot_model import Model, OverwrittenError

CALLS = st.lists(
    st.tuples(st.sampled_from(("two_shot", "ring", "hierarchical")), st.integers(1, 6)), min_size=2, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(DOMAINS.values())), CALLS, st.integers(0, 1 << 32))
def test_four_slots_are_enough(domains: tuple[int, ...], calls: list[tuple[str, int]], seed: int) -> None:
    Model(domains).run(calls, random.Random(seed))


def test_the_model_sees_a_ring_that_does_not_wait_for_its_first_credit() -> None:
    """Its third hop may overwrite what the successor, as a counterpart, has not read of the call before."""
    generator = random.Random(0)

    def run_many() -> None:
        for _ in range(2000):
            Model(DOMAINS["3+3 around"], careful_ring=False).run([("hierarchical", 3), ("ring", 1)], generator)

    with pytest.raises(OverwrittenError, match=r"scatter of 1 from 0: round 6 over 2, unread by \{1\}"):
        run_many()
