"""What a communicator has done: calls by strategy, and by reason where another one ran than was configured."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from llm_allreduce_plugin.config import AllReduceStrategy
from llm_allreduce_plugin.selection.decision import Decision


class Counted(Protocol):
    """Anything that counts the calls made of it: a plan of the native library, or a :class:`CountedCall`."""

    @property
    def calls(self) -> int:
        """Calls that ran at once."""

    @property
    def captured(self) -> int:
        """Calls that went into a CUDA graph, whose replays nobody counts."""


class CountedCall:
    """A function of the engine's, counted."""

    def __init__(self, run: Callable[[Any], Any], capturing: Callable[[], bool]) -> None:
        self.calls = 0
        self.captured = 0
        self._run = run
        self._capturing = capturing

    def __call__(self, input_: Any) -> Any:  # noqa: ANN401
        """Run it."""
        if self._capturing():
            self.captured += 1
        else:
            self.calls += 1
        return self._run(input_)


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


@dataclasses.dataclass
class Counts:
    """Calls so far: eager and captured ones by strategy, and both by fallback."""

    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    captured: Counter[str] = dataclasses.field(default_factory=Counter)
    fallbacks: Counter[Fallback] = dataclasses.field(default_factory=Counter)

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


def summary_of(report: dict[str, Any]) -> str:
    """The line of a communicator that can no longer write it, from its report."""
    counts = Counts(Counter(report.get("calls", {})), Counter(report.get("captured", {})))
    for found in report.get("fallback_calls", []):
        counts.fallbacks[Fallback(found["requested"], found["strategy"], found["reason"])] = found["calls"]
    return str(counts)


class Tally:
    """Adds up what was counted for each decision. May be read by another thread."""

    def __init__(self) -> None:
        self._parts: list[tuple[Decision, Counted]] = []
        self._final: Counts | None = None

    def add(self, decision: Decision, counted: Counted) -> None:
        """From now on the calls of ``counted`` are those of ``decision``."""
        self._parts.append((decision, counted))

    def counts(self) -> Counts:
        """All calls so far."""
        if self._final is not None:
            return self._final
        counts = Counts()
        for decision, counted in list(self._parts):
            name, calls, captured = str(decision.strategy), counted.calls, counted.captured
            counts.calls[name] += calls
            counts.captured[name] += captured
            if (fallback := fallback_of(decision)) is not None:
                counts.fallbacks[fallback] += calls + captured
        return counts

    def end(self) -> None:
        """Keep the numbers and let go of everything that was counted."""
        self._final = self.counts()
        self._parts.clear()
