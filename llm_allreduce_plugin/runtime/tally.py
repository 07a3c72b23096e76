"""What a communicator has done: calls by strategy, and by reason where another one ran than was configured."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from llm_allreduce_plugin.algorithms.decision import Decision, FusedDecision
from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.runtime.reports import Report

MOST_FALLBACKS = 64  # kinds of them that are told apart
OTHER_REASONS = "other reasons"
FUSED = "fused norm"  # what is asked for where the norm behind an all-reduce is to be in its kernel


class Counted(Protocol):
    """Anything that counts the calls made of it: a plan of the native library, or a :class:`CountedCall`."""

    @property
    def calls(self) -> int:
        """Calls that ran at once."""

    @property
    def captured(self) -> int:
        """Calls that went into a CUDA graph, whose replays nobody counts."""


@dataclasses.dataclass
class Made:
    """How often something was called."""

    calls: int = 0
    captured: int = 0


class CountedCall:
    """A function of the engine's, counted.

    Attributes:
        made: the counts, which may outlive this.
    """

    def __init__(self, run: Callable[..., Any], capturing: Callable[[], bool]) -> None:
        self.made = Made()
        self._run = run
        self._capturing = capturing

    def __call__(self, *inputs: Any) -> Any:  # noqa: ANN401
        """Run it."""
        if self._capturing():
            self.made.captured += 1
        else:
            self.made.calls += 1
        return self._run(*inputs)


class Fallback(NamedTuple):
    """A strategy that ran in the place of the configured one, and why."""

    requested: str
    strategy: str
    reason: str


def fallback_of(decision: Decision) -> Fallback | None:
    """What is worth a warning: another strategy than the one asked for, or the engine's own where AUTO was."""
    to_engine = decision.strategy is AllReduceStrategy.NCCL and decision.requested is not AllReduceStrategy.NCCL
    if not (decision.is_fallback or to_engine):
        return None
    return Fallback(str(decision.requested), str(decision.strategy), decision.reason)


def fallbacks_of(decision: Decision | FusedDecision) -> tuple[Fallback, ...]:
    """All that ran otherwise than was asked for: the all-reduce, and the norm in a kernel of its own."""
    if isinstance(decision, Decision):
        found = fallback_of(decision)
        return () if found is None else (found,)
    of_sum = fallbacks_of(decision.all_reduce)
    if decision.launch is not None or decision.by_design or decision.all_reduce.launch is None:
        return of_sum
    return (*of_sum, Fallback(FUSED, decision.counted_as, decision.reason))


@dataclasses.dataclass
class Counts:
    """Calls so far: eager and captured ones by strategy, and both by fallback."""

    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    captured: Counter[str] = dataclasses.field(default_factory=Counter)
    fallbacks: Counter[Fallback] = dataclasses.field(default_factory=Counter)

    def add(self, strategy: str, fallbacks: Sequence[Fallback], calls: int, captured: int) -> None:
        """Count more calls of a strategy, and of fallbacks. Only so many reasons are told apart."""
        self.calls[strategy] += calls
        self.captured[strategy] += captured
        for fallback in fallbacks:
            is_kept = fallback in self.fallbacks or len(self.fallbacks) < MOST_FALLBACKS
            known = fallback if is_kept else fallback._replace(reason=OTHER_REASONS)
            self.fallbacks[known] += calls + captured

    def copy(self) -> Counts:
        """The same counts, to add to."""
        return Counts(self.calls.copy(), self.captured.copy(), self.fallbacks.copy())

    def fields(self) -> dict[str, Any]:
        """For a report."""
        reasons: dict[str, list[str]] = {}
        for fallback in self.fallbacks:
            reasons.setdefault(f"{fallback.requested} -> {fallback.strategy}", []).append(fallback.reason)
        return {
            "calls": dict(+self.calls),
            "captured": dict(+self.captured),
            "fallbacks": {what: "; ".join(known) for what, known in reasons.items()},
            "fallback_calls": [{**found._asdict(), "calls": calls} for found, calls in self.fallbacks.items()],
        }

    def __str__(self) -> str:
        """One line for a log."""
        parts = []
        for name in dict.fromkeys([*self.calls, *self.captured]):
            ways = [f"{self.calls[name]} call{'s' * (self.calls[name] != 1)}"] if self.calls[name] else []
            ways += [f"{self.captured[name]} captured into graphs"] if self.captured[name] else []
            parts += [f"{name} {' and '.join(ways)}"] if ways else []
        line = ", ".join(parts) or "no calls"
        fell = [
            f"{found.requested} -> {found.strategy} {times} ({found.reason})"
            for found, times in self.fallbacks.items()
            if times
        ]
        return f"{line}; {'fallbacks: ' + '; '.join(fell) if fell else 'no fallbacks'}"


def summary_of(report: Report) -> str:
    """The line of a communicator that can no longer write it, from its report."""
    counts = Counts(Counter(report.calls), Counter(report.captured))
    for found in report.fallback_calls:
        counts.fallbacks[Fallback(found.requested, found.strategy, found.reason)] += found.calls
    used = report.registered_memory
    return str(counts) if used is None else f"{counts}; {used}"


class _Part(NamedTuple):
    """Something that counts, and what its calls are counted as."""

    strategy: str
    fallbacks: tuple[Fallback, ...]
    counted: Counted
    ref: weakref.ref[Any] | None  # to what makes the calls, so that its end is heard of

    def add_to(self, counts: Counts) -> None:
        counts.add(self.strategy, self.fallbacks, self.counted.calls, self.counted.captured)


class Tally:
    """Adds up what was counted for each decision. May be read by another thread.

    What can be called no more is folded into totals, so that no more is kept, or looked at, than can be called.
    """

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}
        self._numbers = itertools.count()
        self._ended: deque[int] = deque()  # parts whose calls have ended: noted down by whatever thread let them go
        self._totals = Counts()
        self._lock = threading.Lock()
        self._over = False

    def add(self, decision: Decision | FusedDecision, counted: Counted, call: object = None) -> None:
        """From now on the calls of ``counted`` are those of ``decision``.

        ``call``: what makes them. As soon as nobody holds that, so that no more can be made, they are folded into
        totals. None: they are looked at until the end.
        """
        number, ended = next(self._numbers), self._ended
        ref = None if call is None else weakref.ref(call, lambda _: ended.append(number))
        part = _Part(decision.counted_as, fallbacks_of(decision), counted, ref)
        with self._lock:
            self._parts[number] = part
            self._fold()

    def _fold(self) -> None:
        while self._ended:
            self._parts.pop(self._ended.popleft()).add_to(self._totals)

    def counts(self) -> Counts:
        """All calls so far."""
        with self._lock:
            if self._over:
                return self._totals
            self._fold()
            counts, parts = self._totals.copy(), list(self._parts.values())
        for part in parts:
            part.add_to(counts)
        return counts

    def end(self) -> None:
        """Keep the numbers and let go of everything that was counted."""
        totals = self.counts()
        with self._lock:
            self._over, self._totals = True, totals
            self._parts.clear()
            self._ended.clear()
