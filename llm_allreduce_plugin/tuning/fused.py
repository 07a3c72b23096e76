"""Tuning sums with a norm behind them: up to which size one kernel is faster than two."""

from __future__ import annotations

import time
from collections.abc import Callable

from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES
from llm_allreduce_plugin.algorithms.fused import FUSED_BYTES
from llm_allreduce_plugin.algorithms.ranges import Range
from llm_allreduce_plugin.bench import norm_compare
from llm_allreduce_plugin.measure.ranks import Ranks
from llm_allreduce_plugin.profiles.entry import FusedEntry, FusedMeasured, FusedRange
from llm_allreduce_plugin.tuning.plan import Group, Plan, WrongAnswerError
from llm_allreduce_plugin.tuning.search import SizeSearch

HIDDEN = 8192  # elements of a row: what the numbers in algorithms/measured.py were measured with
MOST_BYTES = 64 << 20  # of a message: larger ones go the way of this one


class FusedTuner:
    """Measures one group on a pool of ranks whose kernels are open.

    Args:
        pool: the ranks.
        group: of them.
        plan: sizes and effort.
        strategy_at: the strategy that the group's profile chooses for the sum alone, by size.
        told: is given what is being done.

    Raises:
        WrongAnswerError: from every call that measures, when an answer is wrong.
    """

    def __init__(
        self, pool: Ranks, group: Group, plan: Plan, strategy_at: Callable[[int], str], told: Callable[[str], None]
    ) -> None:
        self._pool = pool
        self._group = group
        self._plan = plan
        self._strategy_at = strategy_at
        self._told = told
        self._row = HIDDEN * ELEMENT_BYTES[group.dtype]
        self._search = SizeSearch(self._row)
        self._strategies: dict[int, str] = {}

    def sweep(self) -> None:
        """Every other size of the plan that has a row, from the smallest on, and the last; of types that are fused."""
        sizes = [size // self._row * self._row for size in self._plan.sizes if self._row <= size <= MOST_BYTES]
        if ELEMENT_BYTES[self._group.dtype] == FUSED_BYTES and sizes:
            for size in dict.fromkeys((*sizes[::2], sizes[-1])):
                self._measure(size)

    def refine(self, until: float) -> None:
        """Halve the intervals in which the choice changes until they are small, time is up, or one is not fused."""
        while time.monotonic() < until and (size := self._search.next_size()) is not None:
            if not self._measure(size):
                return

    def _measure(self, size: int) -> bool:
        """Whether anything is fused at this size."""
        self._told(f"{self._group}: {size} bytes, then norm")
        strategy = self._strategy_at(size)
        found = self._pool.run(
            norm_compare.compare_norms,
            self._group.world_size,
            strategy,
            size // self._row,
            HIDDEN,
            self._group.dtype,
            self._plan.effort_at(size),
            ranks=list(range(self._group.world_size)),
        )[0]
        if isinstance(found, str):
            return False
        for name, wrong in found.wrong.items():
            if wrong:
                message = (
                    f"{strategy} ({name}) gave {wrong} wrong elements of {size} bytes, then norm ({self._group}): "
                    "no entry is written for them"
                )
                raise WrongAnswerError(message)
        self._search.add(found)
        self._strategies[found.bytes] = strategy
        return True

    def entry(self) -> FusedEntry | None:
        """What goes into the profile; None: nothing is fused for this group."""
        if not self._search.rows:
            return None
        graph, eager = self._search.ranges()
        return FusedEntry(
            hidden=HIDDEN,
            graph=tuple(map(_profile_range, graph)),
            eager=tuple(map(_profile_range, eager)),
            measured=tuple(
                FusedMeasured.model_validate(
                    {
                        "bytes": row.bytes,
                        "strategy": self._strategies[row.bytes],
                        "graph_us": row.graph_us,
                        "eager_us": row.eager_us,
                    }
                )
                for row in self._search.rows
            ),
        )


def _profile_range(found: Range) -> FusedRange:
    return FusedRange.model_validate({"max_bytes": found.max_bytes, "runs": found.strategy})
