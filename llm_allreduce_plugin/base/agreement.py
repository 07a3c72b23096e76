"""Steps in which all ranks of a group take part: each with a deadline, and with an error that names who did not come.

torch's own collectives would do, but wait for half an hour and then name no rank. So values travel through the store
that the group was made with: every rank sets a key of its own and looks for those of its peers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from llm_allreduce_plugin.base.attempt import Attempt
from llm_allreduce_plugin.base.pickled import dump, load
from llm_allreduce_plugin.base.step import LONGEST_PAUSE_S, GivenUp, Own, Step, store_of
from llm_allreduce_plugin.errors import StartError, StartTimeoutError

_T = TypeVar("_T")

_PREFIX = "llm_allreduce"
# After a deadline: for the store to answer, and for ranks whose own deadline is a moment later.
_GRACE_S = 0.5


@dataclasses.dataclass
class _Series:
    """The agreements of one group, counted so that they never mix. All ranks make them in the same order."""

    made: int = 0
    # Keys of this rank in agreements that have ended. All peers have read them once a later one has had a full step.
    left: list[str] = dataclasses.field(default_factory=list)
    # Stores on a file that agreements have opened. They end with the group, see Agreement.open_store.
    opened: list[Store] = dataclasses.field(default_factory=list)


_series: weakref.WeakKeyDictionary[dist.ProcessGroup, _Series] = weakref.WeakKeyDictionary()


class Agreement:
    """One series of steps of a group. Every rank makes it and takes the same steps in the same order.

    Args and attributes:
        group: the process group; its store carries the values, whatever its backend.
        wait_s: how long a rank waits for the others in one step, in seconds.
        setting: where that number comes from, for errors.
        when: what is going on, for errors: ``"at the start"``.

    Attributes:
        abandoned: something that a step waited for was left to itself, and may still use whatever it was given.
    """

    def __init__(
        self, group: dist.ProcessGroup, wait_s: float, *, setting: str = "start_timeout_s", when: str = "at the start"
    ) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.wait_s = wait_s
        self._group = group
        self.setting = setting
        self.when = when
        self._series = _series.setdefault(group, _Series())
        self._number = self._series.made
        self._series.made += 1
        self._steps = 0
        self._store: Store | None = None
        self._keys: list[str] = []  # of this rank, set and not yet deleted
        self._over = False
        self.abandoned = False

    def nested(self, wait_s: float, setting: str, when: str) -> Agreement:
        """Another series of the same ranks, with a deadline of its own: what fails there ends nothing here."""
        return Agreement(self._group, wait_s, setting=setting, when=when)

    def name_of(self, rank: int) -> str:
        """For errors: a rank of these, as the whole group counts."""
        return f"rank {rank}"

    # -- steps ---------------------------------------------------------------------------------------------------------

    def gather(self, value: Any, step: str) -> list[Any]:  # noqa: ANN401
        """``value`` of every rank, in rank order. Collective.

        Args:
            value: see :mod:`llm_allreduce_plugin.base.pickled` for what it may be.
            step: what for, to follow "waited for rank 1": ``"to agree on the transport"``.

        Raises:
            StartTimeoutError: a rank did not come in time.
            StartError: a rank has failed and said so, or the store is gone.
        """
        data = dump(value)
        return self._exchange(lambda _expired, _seen: data, range(self.world_size), step)

    def barrier(self, step: str) -> None:
        """Every rank is here. Collective; raises as :meth:`gather` does."""
        self.gather(None, step)

    def first_fault(self, fault: str | None, step: str) -> str | None:
        """The fault of the lowest rank that has one, on every rank alike. Collective; raises as :meth:`gather` does.

        What only one rank can see must stop all of them: a rank that goes on alone waits for ever.
        """
        return next(filter(None, self.gather(fault, step)), None)

    def from_first_rank(self, make: Callable[[], _T], step: str, raising: type[Exception]) -> _T:
        """``make()`` of the group's first rank, on every rank. Collective.

        Raises:
            raising: on every rank alike, with the text of what that rank raised.
            StartTimeoutError, StartError: as of :meth:`gather`.
        """
        answer: tuple[Any, str | None] = (None, None)
        if self.rank == 0:
            try:
                answer = (make(), None)
            except Exception as error:  # noqa: BLE001  (whatever it is, the other ranks must hear of it)
                answer = (None, str(error) or type(error).__name__)
        data = dump(answer)
        made, fault = self._exchange(lambda _expired, _seen: data, range(1), step)[0]
        if fault is not None:
            raise raising(fault)
        result: _T = made
        return result

    def on_every_rank(
        self, make: Callable[[], _T], step: str, raising: type[Exception], failed: str = "", *, may_block: bool = False
    ) -> _T:
        """``make()``, if it works on every rank. Collective.

        ``may_block``: it waits for other ranks itself, or for a driver. It then runs in a daemon thread, under the
        deadline of the step, and is left to itself when a peer has failed or the deadline has passed.

        Raises:
            raising: on every rank alike, with ``failed`` and the first line of what the lowest failing rank raised.
            StartTimeoutError, StartError: as of :meth:`gather`.
        """
        made: list[_T] = []

        def fault_of_make() -> str | None:
            try:
                made.append(make())
            except Exception as error:  # noqa: BLE001  (whatever it is, the other ranks must hear of it)
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                return f"rank {self.rank} {failed}: {reason}" if failed else reason
            return None

        if not may_block:
            fault = self.first_fault(fault_of_make(), step)
        else:
            attempt = Attempt(fault_of_make, "start")

            def own(expired: bool, seen: dict[int, Any]) -> bytes | None:  # noqa: FBT001
                if attempt.ended:
                    return dump(attempt.result())
                if expired:
                    return dump(f"rank {self.rank} {failed or 'failed'}: not done after {self.wait_s:g} s")
                # What a peer could not do will not end here either.
                return dump(None) if any(seen.values()) else None

            # Where peers' own work ends at the deadline, their word of it comes a moment later.
            try:
                faults = self._exchange(own, range(self.world_size), step, _GRACE_S)
            finally:
                self.abandoned |= not attempt.ended
            fault = next(filter(None, faults), None)
        if fault is not None:
            raise raising(fault)
        return made[0]

    def give_up(self, error: BaseException) -> None:
        """Tell ranks that wait in a step what this one raised, so that they need not wait for their deadline."""
        if self.world_size > 1 and not isinstance(error, StartError):
            reason = (str(error).splitlines() or [""])[0]
            text = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
            self._leave_word(GivenUp(self.rank, "", 0.0, [], time.time(), text))

    def close(self) -> None:
        """No further steps. What is left in the store is deleted by the group's next agreement."""
        if not self._over:
            self._over = True
            self._series.left += self._keys
            self._store = None

    # -- the store -----------------------------------------------------------------------------------------------------

    def _exchange(self, own: Own, givers: range, step: str, grace_s: float = 0.0) -> list[Any]:
        """The values of ``givers``; ``own``: of this rank."""
        if self.world_size == 1:
            began = time.monotonic()
            while (data := own(time.monotonic() - began >= self.wait_s, {})) is None:
                time.sleep(LONGEST_PAUSE_S)
            return [load(data)]
        self._steps += 1
        run = Step(self, own, givers, step, f"{_PREFIX}/{self._number}/{self._steps}", grace_s)
        attempt = Attempt(run.values, "agreement")
        # The store's server may be stopped, or a file's lock be held by a process that is: the deadline still holds.
        if not attempt.wait(self.wait_s + grace_s + _GRACE_S):
            self._keys.clear()
            unheard = sorted(run.missing)
            raise StartTimeoutError(
                self.rank, unheard, step, time.monotonic() - run.began, self.when, self.setting, stuck_store=True
            )
        values = attempt.result()
        if len(givers) == self.world_size:
            self._delete_what_all_have_read(run.key(self.rank))
        else:
            self._keys += [run.key(self.rank)] if self.rank in givers else []
        return values

    def _delete_what_all_have_read(self, newest: str) -> None:
        """A full step says that all ranks have ended all steps before it."""
        old, self._keys, self._series.left = self._keys + self._series.left, [newest], []
        if old and (store := self._store) is not None:
            Attempt(lambda: _delete(store, old), "agreement").wait(_GRACE_S)

    def _leave_word(self, word: GivenUp) -> None:
        def leave() -> None:
            self.open_store().set(self.word_key, json.dumps(dataclasses.asdict(word)))

        Attempt(leave, "agreement").wait(_GRACE_S)

    @property
    def word_key(self) -> str:
        """Where a rank that stops says so."""
        return f"{_PREFIX}/{self._number}/given_up"

    def open_store(self) -> Store:
        """This agreement's own connection where torch makes one: calls that block in torch hold the group's.

        One to a file is shared by all agreements of the group, and ends with it: its end takes the lock of the file,
        holds the interpreter meanwhile, and never returns where a stopped rank has the lock. An agreement must end.
        """
        if self._store is None:
            store = store_of(self._group)
            on_file, opened = is_on_file(store), self._series.opened
            clone = getattr(store, "clone", None)  # torch from some release on, and not every store
            if on_file and opened:
                store = opened[-1]
            elif clone is not None:
                with contextlib.suppress(RuntimeError):
                    store = clone()
                    if on_file:
                        opened.append(store)
            self._store = store
        return self._store


def is_on_file(store: Store) -> bool:
    """Whether a store is a file."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return isinstance(store, FileStore)


def _delete(store: Store, keys: list[str]) -> None:
    for key in keys:
        with contextlib.suppress(RuntimeError):  # a kind of store that cannot
            store.delete_key(key)


def stand_aside(group: dist.ProcessGroup, reason: str) -> None:
    """Tell ranks that wait for this one in their first step that it takes none with them, and why. Waits for nobody.

    Whoever leaves an engine as it is must not harm it either: where the store does not answer, nothing is said.
    """
    with contextlib.suppress(Exception):
        agreement = Agreement(group, _GRACE_S)
        if agreement.world_size > 1:
            agreement._leave_word(GivenUp(agreement.rank, "", 0.0, [], time.time(), "", aside=reason))  # noqa: SLF001
        agreement.close()


def on_every_rank(
    make: Callable[[], _T], group: dist.ProcessGroup, raising: type[Exception], failed: str = "", wait_s: float = 1800.0
) -> _T:
    """One step of its own of :meth:`Agreement.on_every_rank`. Collective over ``group``."""
    agreement = Agreement(group, wait_s, setting="a fixed limit", when="between two steps")
    try:
        return agreement.on_every_rank(make, "to do the same", raising, failed)
    finally:
        agreement.close()
