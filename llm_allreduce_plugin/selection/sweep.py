"""Decisions over all sizes: from which size to which the same thing runs. Pure, like the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Algorithm, Decision, Exchange, Launch
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.algorithms.ranges import BYTE_UNITS
from llm_allreduce_plugin.config import AllReduceConfig, AllReduceStrategy, WireFormat
from llm_allreduce_plugin.selection.policy import decide, kernel_in_words

SMALLEST_BYTES = 16
LARGEST_BYTES = 1 << 30
# What tells one range from the next: everything but the numbers of a launch.
_Kind = tuple[AllReduceStrategy, Algorithm | None, Exchange | None, bool, bool, WireFormat | None, bool]


def size_text(count: int) -> str:
    """Bytes, in the largest unit that leaves a whole number: 196608 is ``192 KiB``, 196609 itself."""
    for unit, size in BYTE_UNITS:
        if count and count % size == 0:
            return f"{count // size} {unit}"
    return str(count)


def name_of(decision: Decision) -> str:
    """The strategy, and what its name does not say of its kernel: ``MINLATENCY (one-shot)``, ``TWOSHOT (staged)``."""
    launch = decision.launch
    if launch is None:
        return str(decision.strategy)
    words = [
        kernel_in_words(decision),
        launch.wire_format,
        launch.algorithm.in_words if launch.wire_format and launch.algorithm is not Algorithm.TWO_SHOT else None,
        {Exchange.STAGED: "staged", Exchange.PULL: "pull"}.get(launch.exchange),
    ]
    said = ", ".join(word for word in words if word)
    return f"{decision.strategy} ({said})" if said else str(decision.strategy)


def _kind(decision: Decision) -> _Kind:
    launch = decision.launch
    if launch is None:
        return decision.strategy, None, None, False, False, None, decision.is_fallback
    return (
        decision.strategy,
        launch.algorithm,
        launch.exchange,
        launch.scatter_lanes > 0,
        launch.rounds > 1,
        launch.wire_format,
        decision.is_fallback,
    )


@dataclasses.dataclass(frozen=True)
class SizeRange:
    """Messages that the same thing happens to.

    Attributes:
        first_bytes: the smallest, in bytes per rank.
        last_bytes: the largest.
        decision: that of the smallest.
        launches: of the sizes looked at, in rising order; empty for NCCL.
    """

    first_bytes: int
    last_bytes: int
    decision: Decision
    launches: tuple[Launch, ...]

    @property
    def name(self) -> str:
        """See :func:`name_of`."""
        return name_of(self.decision)

    @property
    def launch_text(self) -> str:
        """The launches of all sizes in one phrase."""
        if not self.launches:
            return "the engine's own"
        first = self.launches[0]
        words = [f"{_span(self.launches, 'lanes')} blocks x {_span(self.launches, 'threads')} threads"]
        if first.scatter_lanes:
            words.append("a task to each block")
        words.append(first.exchange_in_words)
        if first.rounds > 1:
            words.append(f"{_span(self.launches, 'rounds')} rounds")
        return ", ".join(words)


def _span(launches: tuple[Launch, ...], field: str) -> str:
    values = [getattr(launch, field) for launch in launches]
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _counts(element_bytes: int) -> list[int]:
    """Four sizes to each power of two."""
    sizes = {SMALLEST_BYTES, LARGEST_BYTES}
    size = SMALLEST_BYTES
    while size < LARGEST_BYTES:
        sizes |= {size * quarters // 4 for quarters in (4, 5, 6, 7)}
        size *= 2
    return sorted({size // element_bytes for size in sizes})


def sweep(
    config: AllReduceConfig, facts: GroupFacts, dtype: str, *, readable_in_place: bool = False
) -> list[SizeRange]:
    """The ranges from 16 bytes to 1 GiB per rank, with no gap between them; borders are exact to an element.

    ``readable_in_place``: inputs lie in memory that peers see. Then only messages of whole 16-byte vectors count,
    and borders are exact to a vector: peers read no others in place.

    Raises:
        ValueError: no kernel handles ``dtype``, so that there is nothing to tell apart.
    """
    element = ELEMENT_BYTES.get(dtype)
    if element is None:
        message = f"dtype {dtype}: no kernel handles it (there are for {', '.join(ELEMENT_BYTES)})"
        raise ValueError(message)

    step = VECTOR_BYTES // element if readable_in_place else 1
    element *= step

    def decision_of(count: int) -> Decision:
        return decide(config, facts, count * step, dtype, readable_in_place=readable_in_place)

    points: list[tuple[int, Decision]] = []
    for count in _counts(element):
        decision = decision_of(count)
        if points and _kind(points[-1][1]) != _kind(decision):
            points += _border(decision_of, points[-1][0], count)
        points.append((count, decision))
    groups: list[list[tuple[int, Decision]]] = []
    for point in points:
        if groups and _kind(groups[-1][-1][1]) == _kind(point[1]):
            groups[-1].append(point)
        else:
            groups.append([point])
    return [
        SizeRange(
            group[0][0] * element,
            group[-1][0] * element,
            group[0][1],
            tuple(decision.launch for _, decision in group if decision.launch is not None),
        )
        for group in groups
    ]


def _border(decision_of: Callable[[int], Decision], low: int, high: int) -> list[tuple[int, Decision]]:
    """The counts on both sides of every border between two counts that lie close together."""
    found: list[tuple[int, Decision]] = []
    end = _kind(decision_of(high))
    while (start := _kind(decision_of(low))) != end:
        below, above = low, high
        while above - below > 1:
            middle = (below + above) // 2
            if _kind(decision_of(middle)) == start:
                below = middle
            else:
                above = middle
        found += [(below, decision_of(below)), (above, decision_of(above))]
        low = above
    return found


def whys(ranges: list[SizeRange]) -> list[str]:
    """Where another strategy runs than was asked for, or the engine's own under AUTO, why: each reason once."""
    found = (row.decision for row in ranges)
    others = (other for other in found if other.runs_another or other.launch is None)
    said = {(other.strategy, other.reason): None for other in others if other.strategy is not other.requested}
    return [f"{strategy}, because {reason}" for strategy, reason in said]


def table(ranges: list[SizeRange]) -> str:
    """The ranges for people."""
    rows = [("from", "to", "runs", "launch")]
    rows += [(size_text(row.first_bytes), size_text(row.last_bytes), row.name, row.launch_text) for row in ranges]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{first:>{widths[0]}}  {last:>{widths[1]}}  {name:<{widths[2]}}  {launch}"
        for first, last, name, launch in rows
    )
