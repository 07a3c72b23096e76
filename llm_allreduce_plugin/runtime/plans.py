"""The plans of a communicator: a bounded number of them, those that are in use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from llm_allreduce_plugin.algorithms.decision import Decision, FusedDecision
from llm_allreduce_plugin.runtime.tally import Counted

# Engines call with some hundred sizes: one for each batch that they have a graph of, and those of prefill. A plan takes
# some 6 KB.
MOST_PLANS = 512

_Key = TypeVar("_Key")
_Call = TypeVar("_Call", bound=Callable[..., Any])


class Planned(NamedTuple, Generic[_Call]):
    """What happens to one size and type.

    Attributes:
        decision: what and why.
        call: does it.
        counted: how often it was done.
        seen: calls that had been made when the plan's turn to go last came. At first the one that it is made for.
    """

    decision: Decision | FusedDecision
    call: _Call
    counted: Counted
    seen: int = 1

    @property
    def made(self) -> int:
        """Calls so far."""
        return self.counted.calls + self.counted.captured


class Plans(dict[_Key, Planned[_Call] | None], Generic[_Key, _Call]):
    """At most ``most`` entries. ``None`` is kept, too, for what has no plan.

    Looking one up is a dictionary's, and notes nothing down. What is in use shows in the counts that there are anyway:
    an entry whose turn to go has come, the oldest one first, stays and becomes the youngest if it was called since.

    ``gone`` is told the key of an entry that must go, before it does.
    """

    def __init__(self, most: int = MOST_PLANS, gone: Callable[[_Key], None] = lambda _key: None) -> None:
        super().__init__()
        self._most = most
        self._gone = gone
        self._lock = threading.Lock()

    def keep(self, key: _Key, planned: Planned[_Call] | None) -> None:
        """Add an entry; others go where there are too many."""
        with self._lock:
            while len(self) >= self._most and key not in self:
                self._let_one_go()
            self[key] = planned

    def _let_one_go(self) -> None:
        for _ in range(len(self)):
            key = next(iter(self))
            planned = self.pop(key)
            if planned is None or planned.made <= planned.seen:
                self._gone(key)
                return
            self[key] = planned._replace(seen=planned.made)
        key = next(iter(self))  # all are in use
        self._gone(key)
        del self[key]
