"""From measured times to ranges of sizes: where one strategy takes over from another, without the noise."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from llm_allreduce_plugin.algorithms.ranges import Range

# What a strategy must save, relative to the fastest and summed over the sizes of a range, to cut that range out of
# another strategy's; half of it at the end, where there is one change instead of two. So no measured size is slower
# than its fastest strategy by more than this and the noise of the measurement.
MARGIN = 0.02
_NOT_MEASURED = 1.0  # a strategy is left out once it has become far slower: as bad as twice the time
_VECTOR = 16


@dataclasses.dataclass(frozen=True)
class Point:
    """Times of the strategies at one size.

    Attributes:
        bytes: per rank.
        us: microseconds by strategy; those left out are far slower.
        noise: how much a time differs from one measurement to the next, relative to it.
    """

    bytes: int
    us: Mapping[str, float]
    noise: float = 0.0

    def excess(self, strategy: str) -> float:
        """By how much the strategy is slower than the fastest, relative to that, beyond the noise."""
        if strategy not in self.us:
            return _NOT_MEASURED
        return max(0.0, self.us[strategy] / min(self.us.values()) - 1 - self.noise)


def ranges_of(points: Sequence[Point]) -> tuple[Range, ...]:
    """The ranges that cost the least: what sizes lose against their fastest strategy, and ``MARGIN / 2`` per change.

    Args:
        points: at least one, of rising size.
    """
    names = sorted({name for point in points for name in point.us})
    cost = {name: points[0].excess(name) for name in names}
    came_from: list[dict[str, str]] = []
    for point in points[1:]:
        before = cost
        best = min(names, key=lambda name: (before[name], name))
        step = {name: name if before[name] <= before[best] + MARGIN / 2 else best for name in names}
        cost = {
            name: before[step[name]] + (MARGIN / 2 if step[name] != name else 0.0) + point.excess(name)
            for name in names
        }
        came_from.append(step)
    chosen = [min(names, key=lambda name: (cost[name], name))]
    for step in reversed(came_from):
        chosen.append(step[chosen[-1]])
    chosen.reverse()
    ranges = [
        Range(_crossing(low, high, name, following), name)
        for (low, name), (high, following) in itertools.pairwise(zip(points, chosen, strict=True))
        if name != following
    ]
    return (*ranges, Range(None, chosen[-1]))


def eager_ranges_of(points: Sequence[Point], in_graphs: tuple[Range, ...]) -> tuple[Range, ...]:
    """The ranges for eager calls: those of graphs, unless they cost some size more than ``MARGIN`` beyond the noise.

    Eager calls are mostly the host's time, which does not depend on the strategy, so that graphs tell more about small
    sizes than they do; and a size that has one answer needs not be asked which of two it is.
    """
    if all(point.excess(strategy_at(in_graphs, point.bytes)) <= MARGIN for point in points):
        return in_graphs
    return ranges_of(points)


def strategy_at(ranges: Sequence[Range], size: int) -> str:
    """The strategy of a size."""
    return next(found.strategy for found in ranges if found.max_bytes is None or size <= found.max_bytes)


def changes(points: Sequence[Point], ranges: Sequence[Range]) -> list[tuple[int, int]]:
    """Between which two measured sizes the strategy changes."""
    return [
        (low.bytes, high.bytes)
        for low, high in itertools.pairwise(points)
        if strategy_at(ranges, low.bytes) != strategy_at(ranges, high.bytes)
    ]


def _crossing(low: Point, high: Point, name: str, following: str) -> int:
    """The size between two measured ones up to which ``name`` is used: where the lines of both cross, rounded down."""
    at = (low.bytes * high.bytes) ** 0.5
    if {name, following} <= low.us.keys() & high.us.keys():
        before, after = (point.us[name] - point.us[following] for point in (low, high))
        if before < 0 < after:
            at = low.bytes + (high.bytes - low.bytes) * before / (before - after)
    step = _VECTOR
    while step * 8 <= high.bytes - low.bytes:
        step *= 2
    return max(low.bytes, min(int(at) // step * step, high.bytes - 1))
