"""From times to ranges: nothing slower than the margin allows, and no noise in the map."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from llm_allreduce_plugin.algorithms.ranges import Range
from llm_allreduce_plugin.profiles.crossover import MARGIN, Point, changes, eager_ranges_of, ranges_of, strategy_at

times = st.floats(0.5, 1e5)
any_points = st.lists(
    st.builds(
        Point,
        st.integers(64, 1 << 30),
        st.fixed_dictionaries({}, optional={"ONESHOT": times, "TWOSHOT": times}).filter(bool),
        st.sampled_from((0.0, 0.01, 0.1)),
    ),
    min_size=1,
    max_size=24,
    unique_by=lambda point: point.bytes,
).map(lambda points: sorted(points, key=lambda point: point.bytes))


@given(any_points)
def test_no_measured_size_loses_more_than_the_margin(points: list[Point]) -> None:
    ranges = ranges_of(points)
    limits = [found.max_bytes for found in ranges]
    assert limits[-1] is None
    assert limits[:-1] == sorted(set(limits[:-1]))  # type: ignore[type-var]
    for point in points:
        chosen = strategy_at(ranges, point.bytes)
        assert chosen in {name for other in points for name in other.us}
        assert point.excess(chosen) <= MARGIN + 1e-9
    assert len(changes(points, ranges)) == len(ranges) - 1
    # Those of eager calls keep the same promise, whatever graphs say.
    for in_graphs in ((Range(None, "ONESHOT"),), ranges):
        eager = eager_ranges_of(points, in_graphs)
        assert all(point.excess(strategy_at(eager, point.bytes)) <= MARGIN + 1e-9 for point in points)


def two_lines(size: int, noise: float, dice: random.Random) -> Point:
    """One step: 2 us and what 3 S takes; two steps: 3 us and what 1.5 S takes. They cross at 233 KB."""
    us = {"ONESHOT": 2 + 3 * size / 350e3, "TWOSHOT": 3 + 1.5 * size / 350e3}
    return Point(size, {name: time * (1 + dice.gauss(0, noise)) for name, time in us.items()}, noise)


def test_the_crossing_of_two_lines_is_found() -> None:
    points = [two_lines(1 << power, 0.0, random.Random(0)) for power in range(10, 28)]
    first, last = ranges_of(points)
    assert (first.strategy, last) == ("ONESHOT", Range(None, "TWOSHOT"))
    assert first.max_bytes is not None
    assert abs(first.max_bytes - 233_333) < 16_384
    assert first.max_bytes % 1024 == 0


def test_noise_does_not_alternate() -> None:
    """Two strategies as good as each other, measured with two percent of noise, make one range, or hardly more."""
    for seed in range(50):
        dice = random.Random(seed)
        points = [two_lines(1 << power, 0.02, dice) for power in range(10, 28)]
        assert len(ranges_of(points)) <= 3, seed
        level = [
            Point(1 << power, {name: 10 * (1 + dice.gauss(0, 0.005)) for name in ("ONESHOT", "TWOSHOT")}, 0.005)
            for power in range(10, 28)
        ]
        assert len(ranges_of(level)) <= 2, seed


def test_a_range_of_its_own_is_cut_out_only_for_what_it_saves() -> None:
    def points(saved: float) -> list[Point]:
        at = {20: 1 - saved}
        return [Point(1 << power, {"ONESHOT": 1.0, "TWOSHOT": at.get(power, 1.5)}, 0.0) for power in range(10, 28)]

    assert ranges_of(points(0.015)) == (Range(None, "ONESHOT"),)
    assert [found.strategy for found in ranges_of(points(0.05))] == ["ONESHOT", "TWOSHOT", "ONESHOT"]


def test_eager_calls_keep_the_ranges_of_graphs_unless_they_lose_by_them() -> None:
    in_graphs = (Range(1 << 18, "ONESHOT"), Range(None, "TWOSHOT"))
    host_bound = [Point(1 << power, {"ONESHOT": 10.0, "TWOSHOT": 10.1}, 0.005) for power in range(10, 21)]
    assert eager_ranges_of(host_bound, in_graphs) is in_graphs
    loses = [Point(1 << power, {"ONESHOT": 10.0, "TWOSHOT": 11.0}, 0.005) for power in range(10, 21)]
    assert eager_ranges_of(loses, in_graphs) == (Range(None, "ONESHOT"),)
