"""Tuning: which sizes are compared, how closely, and what follows. Drives the ranks; runs in the process that asked."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES, GroupFacts
from llm_allreduce_plugin.algorithms.ranges import Range
from llm_allreduce_plugin.algorithms.user_buffer import sizes_placed
from llm_allreduce_plugin.bench import compare, worker
from llm_allreduce_plugin.bench.candidates import OurSettings
from llm_allreduce_plugin.bench.compare import Comparison
from llm_allreduce_plugin.config import NO_PROFILE, AllReduceConfig
from llm_allreduce_plugin.measure.ranks import Ranks
from llm_allreduce_plugin.profiles.entry import (
    Entry,
    FusedEntry,
    Measured,
    ProfileRange,
    RegisteredEntry,
    RegisteredRange,
)
from llm_allreduce_plugin.tuning.fused import FusedTuner
from llm_allreduce_plugin.tuning.plan import Group, Plan, WrongAnswerError
from llm_allreduce_plugin.tuning.search import SizeSearch

KERNELS = ("ONESHOT", "TWOSHOT")
AnyRange = TypeVar("AnyRange", ProfileRange, RegisteredRange)
PLACING = "UB"  # measured, too, where the group has registered memory
# A strategy that was this much slower than the fastest at two sizes running is not measured at larger ones.
HOPELESS = 2.0
ALIGNMENT = 64  # bytes: sizes that are tried between powers of two are multiples


class GroupTuner:
    """Measures one group on a pool of ranks.

    Args:
        pool: the ranks.
        group: of them.
        plan: sizes and effort.
        told: is given what is being done.
        places: the group has registered memory, and UB is one of the candidates.

    Raises:
        WrongAnswerError: from every call that measures, when a strategy's answer is wrong.
    """

    def __init__(
        self, pool: Ranks, group: Group, plan: Plan, told: Callable[[str], None], *, places: bool = False
    ) -> None:
        self._pool = pool
        self._group = group
        self._plan = plan
        self._told = told
        self._names = (*KERNELS, PLACING) if places else KERNELS
        self._search = SizeSearch(ALIGNMENT)  # of those that need no registered outputs
        self._with_registered = SizeSearch(ALIGNMENT)  # of all
        self._element = ELEMENT_BYTES[group.dtype]

    def sweep(self) -> None:
        """Every size of the plan, from the smallest on."""
        # Not UB: what it adds to small messages says nothing of large ones. Nor do the others go by it, for they are
        # what runs where outputs are not registered.
        behind: dict[str, int] = dict.fromkeys(KERNELS, 0)
        for size in self._plan.sizes:
            names = tuple(name for name in self._names if behind.get(name, 0) < 2)  # noqa: PLR2004
            found = self._measure(size, names).only(KERNELS)
            times = found.graph_us or found.eager_us
            for name, time_us in times.items():
                behind[name] = behind[name] + 1 if time_us > HOPELESS * min(times.values()) else 0

    def refine(self, until: float) -> None:
        """Halve the intervals in which the strategy changes, the widest first, until they are small or time is up."""
        while time.monotonic() < until:
            size = self._search.next_size() or self._with_registered.next_size()
            if size is None:
                return
            self._measure(size, self._names)

    def strategy_at(self, size: int) -> str:
        """The strategy that decides for a size without registered outputs, by what was measured so far."""
        return self._search.choice_at(size)

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
                message = (
                    f"{name} gave {wrong} wrong elements of {size} bytes ({self._group}): no entry is written for them"
                )
                raise WrongAnswerError(message)
        self._search.add(found.only(KERNELS))
        if PLACING in self._names:
            self._with_registered.add(found)
        return found

    def entry(self, facts: GroupFacts, environment: dict[str, str], fused: FusedEntry | None) -> Entry:
        """What goes into the profile."""
        graph, eager = self._search.ranges()
        effort = self._plan.effort
        return Entry(
            world_size=facts.world_size,
            hosts=facts.summed_hosts,
            transport=facts.transport,
            topology_class=facts.topology_class,
            in_band=facts.in_band.two_shot > 0,
            element_bytes=4 if self._element == 4 else 2,  # noqa: PLR2004
            dtype=self._group.dtype,
            date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            method=f"up to {effort.calls} calls, {effort.replays} times, in {effort.rounds} rounds in turns; median, "
            "slowest rank, microseconds per call",
            environment=environment,
            graph=_as(ProfileRange, graph),
            eager=_as(ProfileRange, eager),
            measured=tuple(
                Measured.model_validate({"bytes": row.bytes, "graph_us": row.graph_us, "eager_us": row.eager_us})
                for row in (self._with_registered.rows or self._search.rows)
            ),
            fused=fused,
            registered=self._registered(),
        )

    def _registered(self) -> RegisteredEntry | None:
        """What goes into the profile of registered outputs; None: UB took no size that was measured."""
        if not any(PLACING in row.eager_us for row in self._with_registered.rows):
            return None
        graph, eager = self._with_registered.ranges()
        return RegisteredEntry(graph=_as(RegisteredRange, graph), eager=_as(RegisteredRange, eager))


def _as(kind: type[AnyRange], ranges: Sequence[Range]) -> tuple[AnyRange, ...]:
    """Ranges as a profile has them."""
    return tuple(kind.model_validate({"max_bytes": found.max_bytes, "strategy": found.strategy}) for found in ranges)


def tune(
    pool: Ranks,
    groups: Sequence[Group],
    transport: str,
    plan: Plan,
    environment: dict[str, str],
    told: Callable[[str, float], None],
    kept: Callable[[Entry], None],
    *,
    registered_pool: int | None = None,
) -> dict[Group, str]:
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
        kept: is given the entry of each group when that has been measured, so that what ends the run later costs
            only the group that it meets.
        registered_pool: registered memory of each rank, in bytes, with which UB is measured, too, in groups in which it
            stores anything into it; the others have none. None: no group has.

    Returns:
        For groups that cannot run kernels, why.

    Raises:
        WrongAnswerError: a strategy's answer is wrong.
    """
    started = time.monotonic()
    refused: dict[Group, str] = {}
    pool.run(compare.form_groups, tuple(sorted({group.world_size for group in groups})))
    settings = OurSettings(transport=transport, tuning_profile=NO_PROFILE, registered_pool=registered_pool)
    config = AllReduceConfig(registered_pool=registered_pool)
    for done, group in enumerate(groups):
        members = list(range(group.world_size))
        names = (*KERNELS, PLACING)
        facts, obstacle = pool.run(compare.open_kernels, group.world_size, names, settings, ranks=members)[0]
        if obstacle:
            refused[group] = obstacle
        else:
            steps = 0

            def step(text: str, done: int = done) -> None:
                nonlocal steps
                steps += 1
                within = min(0.95, steps / (1.5 * len(plan.sizes) + 6))
                told(text, (done + within) / len(groups))

            tuner = GroupTuner(pool, group, plan, step, places=sizes_placed(config, facts) is not None)
            tuner.sweep()
            # What is left, shared among the groups to come, which have their sweeps to do first.
            now = time.monotonic()
            left = started + plan.seconds - now
            sweeps = (now - started) / (done + 1) * (len(groups) - done - 1)
            share = max(0.0, left - sweeps) / (len(groups) - done)
            tuner.refine(now + share / 2)
            # Of the kernels that were found to be the fastest.
            normed = FusedTuner(pool, group, plan, tuner.strategy_at, step)
            normed.sweep()
            normed.refine(now + share)
            kept(tuner.entry(facts, environment, normed.entry()))
        pool.run(worker.close_all, ranks=members)
    return refused
