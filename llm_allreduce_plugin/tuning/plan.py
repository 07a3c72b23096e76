"""What a tuning run measures, for what groups, and for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm_allreduce_plugin.bench.compare import Effort
from llm_allreduce_plugin.errors import AllReduceError
from llm_allreduce_plugin.measure import timing


class WrongAnswerError(AllReduceError, RuntimeError):
    """A strategy gave a wrong answer on this node: nothing may be decided by time then."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Attributes:
        sizes: bytes per rank that are measured in any case, rising.
        effort: of one comparison of small messages.
        seconds: after which the search for exact crossovers of all groups together ends.
    """

    sizes: tuple[int, ...]
    effort: Effort
    seconds: float

    def within(self, seconds: float) -> Plan:
        """The same in other time."""
        return dataclasses.replace(self, seconds=seconds)

    def effort_at(self, size: int) -> Effort:
        """Fewer calls of large messages: theirs take long enough to be told apart."""
        calls = max(3, min(self.effort.calls, self.effort.calls * (4 << 20) // size))
        return dataclasses.replace(self.effort, calls=calls)


@dataclasses.dataclass(frozen=True)
class Group:
    """One kind of group to tune for."""

    world_size: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.world_size} ranks, {self.dtype}"


def plan_of(sizes: Sequence[int], seconds: float, *, quick: bool) -> Plan:
    """For these sizes, in about this time."""
    effort = Effort(calls=10, replays=2, rounds=3, warmup=1) if quick else Effort(calls=timing.CALLS)
    return Plan(tuple(sizes), effort, seconds)
