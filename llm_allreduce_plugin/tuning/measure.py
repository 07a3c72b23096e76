"""Tuning: which sizes are compared, how closely, and what follows. Drives the ranks; runs in the process that asked."""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from collections.abc import Callable, Sequence

from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.algorithms.ranges import Range
from llm_allreduce_plugin.bench import compare, worker
from llm_allreduce_plugin.bench.candidates import OurSettings
from llm_allreduce_plugin.bench.compare import Comparison, Effort
from llm_allreduce_plugin.config import NO_PROFILE
from llm_allreduce_plugin.errors import AllReduceError
from llm_allreduce_plugin.measure import timing
from llm_allreduce_plugin.measure.ranks import RankPool
from llm_allreduce_plugin.profiles import crossover
from llm_allreduce_plugin.profiles.crossover import Point
from llm_allreduce_plugin.profiles.file import Entry, Measured, ProfileRange

KERNELS = ("ONESHOT", "TWOSHOT")
# A strategy that was this much slower than the fastest at two sizes running is not measured at larger ones.
HOPELESS = 2.0
# Sizes between which the strategy changes are halved (in their logarithms) until they are this close.
CLOSE_ENOUGH = 1.2
ALIGNMENT = 64  # bytes: sizes that are tried between powers of two are multiples


# How much longer than in a graph an eager call takes where its time is the host's and says nothing of the kernels.
HOST_BOUND = 1.5


def _is_host_bound(row: Comparison) -> bool:
    """Then what is fastest on the GPU is fastest, as far as anybody can tell."""
    return bool(row.graph_us) and min(row.eager_us.values()) > HOST_BOUND * min(row.graph_us.values())


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


class GroupTuner:
    """Measures one group on a pool of ranks.

    Raises:
        WrongAnswerError: from every call that measures, when a strategy's answer is wrong.
    """

    def __init__(self, pool: RankPool, group: Group, plan: Plan, told: Callable[[str], None]) -> None:
        self._pool = pool
        self._group = group
        self._plan = plan
        self._told = told
        self._found: dict[int, Comparison] = {}
        self._element = ELEMENT_BYTES[group.dtype]

    def sweep(self) -> None:
        """Every size of the plan, from the smallest on."""
        behind: dict[str, int] = dict.fromkeys(KERNELS, 0)
        for size in self._plan.sizes:
            found = self._measure(size, tuple(name for name in KERNELS if behind[name] < 2))  # noqa: PLR2004
            times = found.graph_us or found.eager_us
            for name, time_us in times.items():
                behind[name] = behind[name] + 1 if time_us > HOPELESS * min(times.values()) else 0

    def refine(self, until: float) -> None:
        """Halve the intervals in which the strategy changes, the widest first, until they are small or time is up."""
        while time.monotonic() < until:
            # Where graphs were measured they decide, for eager calls too.
            points = self._points("graph") or self._points("eager")
            wide = [
                (low, high)
                for low, high in crossover.changes(points, crossover.ranges_of(points))
                if high > CLOSE_ENOUGH * low and self._between(low, high) not in (low, high)
            ]
            if not wide:
                return
            low, high = max(wide, key=lambda pair: pair[1] / pair[0])
            self._measure(self._between(low, high), KERNELS)

    @staticmethod
    def _between(low: int, high: int) -> int:
        return max(low, int((low * high) ** 0.5) // ALIGNMENT * ALIGNMENT)

    def _measure(self, size: int, names: tuple[str, ...]) -> Comparison:
        self._told(f"{self._group}: {size} bytes")
        found: Comparison = self._pool.run(
            compare.compare,
            self._group.world_size,
            names,
            size // self._element,
            self._group.dtype,
            self._plan.effort_at(size),
            ranks=list(range(self._group.world_size)),
        )[0]
        for name, wrong in found.wrong.items():
            if wrong:
                message = f"{name} gave {wrong} wrong elements of {size} bytes ({self._group}): no profile is written"
                raise WrongAnswerError(message)
        self._found[found.bytes] = found
        return found

    def _points(self, kind: str) -> list[Point]:
        rows = [self._found[size] for size in sorted(self._found)]
        points = [
            Point(row.bytes, row.graph_us, row.graph_noise)
            if kind == "graph" or _is_host_bound(row)
            else Point(row.bytes, row.eager_us, row.eager_noise)
            for row in rows
        ]
        return [point for point in points if point.us]

    def ranges(self) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
        """For graphs and for eager calls. CPU ranks have no graphs: both are alike."""
        eager = self._points("eager")
        graph = self._points("graph")
        if not graph:
            both = crossover.ranges_of(eager)
            return both, both
        in_graphs = crossover.ranges_of(graph)
        return in_graphs, crossover.eager_ranges_of(eager, in_graphs)

    def entry(self, facts: GroupFacts, environment: dict[str, str]) -> Entry:
        """What goes into the profile."""
        graph, eager = self.ranges()
        effort = self._plan.effort
        return Entry(
            world_size=facts.world_size,
            transport=facts.transport,
            topology_class=facts.topology_class,
            in_band=facts.in_band.two_shot > 0,
            element_bytes=4 if self._element == 4 else 2,  # noqa: PLR2004
            dtype=self._group.dtype,
            date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            method=f"up to {effort.calls} calls, {effort.replays} times, in {effort.rounds} rounds in turns; median, "
            "slowest rank, microseconds per call",
            environment=environment,
            graph=_profile_ranges(graph),
            eager=_profile_ranges(eager),
            measured=tuple(
                Measured.model_validate(
                    {"bytes": size, "graph_us": self._found[size].graph_us, "eager_us": self._found[size].eager_us}
                )
                for size in sorted(self._found)
            ),
        )


def _profile_ranges(ranges: Sequence[Range]) -> tuple[ProfileRange, ...]:
    return tuple(
        ProfileRange.model_validate({"max_bytes": found.max_bytes, "strategy": found.strategy}) for found in ranges
    )


def tune(
    pool: RankPool,
    groups: Sequence[Group],
    transport: str,
    plan: Plan,
    environment: dict[str, str],
    told: Callable[[str, float], None],
) -> tuple[list[Entry], dict[Group, str]]:
    """Measure all ``groups`` on a pool that is as large as the largest of them.

    The times are the slowest rank's, and one process, this one, decides by them; at engine start the first rank reads
    the decision and tells the others.

    Args:
        pool: ranks.
        groups: what to tune for.
        transport: as the setting of that name.
        plan: sizes and time.
        environment: versions, for the record.
        told: is given what is being done, and how much of all is done (0 to 1).

    Returns:
        An entry per group; and for groups that cannot run kernels, why.

    Raises:
        WrongAnswerError: a strategy's answer is wrong.
    """
    started = time.monotonic()
    entries: list[Entry] = []
    refused: dict[Group, str] = {}
    pool.run(compare.form_groups, tuple(sorted({group.world_size for group in groups})))
    settings = OurSettings(transport=transport, tuning_profile=NO_PROFILE)
    for done, group in enumerate(groups):
        members = list(range(group.world_size))
        facts, obstacle = pool.run(compare.open_kernels, group.world_size, KERNELS, settings, ranks=members)[0]
        if obstacle:
            refused[group] = obstacle
        else:
            steps = 0

            def step(text: str, done: int = done) -> None:
                nonlocal steps
                steps += 1
                within = min(0.95, steps / (len(plan.sizes) + 4))
                told(text, (done + within) / len(groups))

            tuner = GroupTuner(pool, group, plan, step)
            tuner.sweep()
            # What is left, shared among the groups to come, which have their sweeps to do first.
            now = time.monotonic()
            left = started + plan.seconds - now
            sweeps = (now - started) / (done + 1) * (len(groups) - done - 1)
            tuner.refine(now + max(0.0, left - sweeps) / (len(groups) - done))
            entries.append(tuner.entry(facts, environment))
        pool.run(worker.close_all, ranks=members)
    return entries, refused


def plan_of(sizes: Sequence[int], seconds: float, *, quick: bool) -> Plan:
    """For these sizes, in about this time."""
    effort = Effort(calls=10, replays=2, rounds=3, warmup=1) if quick else Effort(calls=timing.CALLS)
    return Plan(tuple(sizes), effort, seconds)
