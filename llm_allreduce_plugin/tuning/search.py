"""What was measured at which sizes, what follows from it, and which size is worth measuring next. Pure."""

from __future__ import annotations

from llm_allreduce_plugin.algorithms.ranges import Range
from llm_allreduce_plugin.bench.compare import Comparison
from llm_allreduce_plugin.profiles import crossover
from llm_allreduce_plugin.profiles.crossover import Point

# Sizes between which the choice changes are halved (in their logarithms) until they are this close.
CLOSE_ENOUGH = 1.2
# How much longer than in a graph an eager call takes where its time is the host's and says nothing of the kernels.
HOST_BOUND = 1.5


def _is_host_bound(row: Comparison) -> bool:
    """Then what is fastest on the GPU is fastest, as far as anybody can tell."""
    return bool(row.graph_us) and min(row.eager_us.values()) > HOST_BOUND * min(row.graph_us.values())


class SizeSearch:
    """Comparisons of the same candidates, by size.

    Args:
        alignment: bytes of which sizes in between are multiples.
    """

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._found: dict[int, Comparison] = {}

    def add(self, found: Comparison) -> None:
        """Note what was measured; a size that comes again replaces what was noted."""
        self._found[found.bytes] = found

    @property
    def rows(self) -> list[Comparison]:
        """All of them, from the smallest size on."""
        return [self._found[size] for size in sorted(self._found)]

    def _points(self, kind: str) -> list[Point]:
        points = [
            Point(row.bytes, row.graph_us, row.graph_noise)
            if kind == "graph" or _is_host_bound(row)
            else Point(row.bytes, row.eager_us, row.eager_noise)
            for row in self.rows
        ]
        return [point for point in points if point.us]

    def next_size(self) -> int | None:
        """The middle of the widest interval in which the choice changes; None: all are small, or nothing changes."""
        # Where graphs were measured they decide, for eager calls too.
        points = self._points("graph") or self._points("eager")
        if not points:
            return None
        wide = [
            (low, high)
            for low, high in crossover.changes(points, crossover.ranges_of(points))
            if high > CLOSE_ENOUGH * low and self._between(low, high) not in (low, high)
        ]
        return self._between(*max(wide, key=lambda pair: pair[1] / pair[0])) if wide else None

    def _between(self, low: int, high: int) -> int:
        return max(low, int((low * high) ** 0.5) // self._alignment * self._alignment)

    def ranges(self) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
        """For graphs and for eager calls; at least one size was measured. CPU ranks have no graphs: both are alike."""
        eager = self._points("eager")
        graph = self._points("graph")
        if not graph:
            both = crossover.ranges_of(eager)
            return both, both
        in_graphs = crossover.ranges_of(graph)
        return in_graphs, crossover.eager_ranges_of(eager, in_graphs)

    def choice_at(self, size: int) -> str:
        """What decides says for a size: the times in graphs where there are any."""
        return crossover.strategy_at(self.ranges()[0], size)
