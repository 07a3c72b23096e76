"""One step of an agreement: values of ranks, exchanged through a store, until a deadline."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import Store

from llm_allreduce_plugin.base.pickled import load
from llm_allreduce_plugin.errors import StartError, StartTimeoutError, ranks_text

# (deadline has passed, values seen of peers) -> this rank's value, pickled, or None as long as it has none.
Own = Callable[[bool, dict[int, Any]], bytes | None]

_SHORTEST_PAUSE_S = 0.0005
LONGEST_PAUSE_S = 0.02


@dataclasses.dataclass(frozen=True)
class GivenUp:
    """What a rank leaves for the others when it stops."""

    rank: int
    step: str
    waited_s: float
    missing: list[int]
    wall_s: float
    error: str  # that it raised itself; empty: it waited in vain
    aside: str = ""  # why it has never meant to come


def store_of(group: dist.ProcessGroup) -> Store:
    """The store that a process group was made with.

    Raises:
        StartError: it has none.
    """
    try:
        if hasattr(group, "get_group_store"):
            return group.get_group_store()
        return c10d._get_process_group_store(group)  # noqa: SLF001  (torch before it had the method)
    except (RuntimeError, KeyError) as error:
        message = f"the process group has no store, which ranks need to agree on their settings: {error}"
        raise StartError(message) from error


class Stepping(Protocol):
    """What a step must know of the agreement that it is of; see there."""

    rank: int
    wait_s: float
    setting: str
    when: str

    @property
    def word_key(self) -> str:
        """Where a rank that stops says so."""

    def open_store(self) -> Store:
        """The store that carries the values."""


class Step:
    """One exchange. Runs in a thread of its own, for a store may never answer.

    Attributes:
        began: when, by the monotonic clock.
        missing: ranks from which nothing has come yet.
    """

    def __init__(
        self,
        agreement: Stepping,
        own: Own,
        givers: range,
        step: str,
        prefix: str,
        grace_s: float,
    ) -> None:
        self._agreement = agreement
        self._own = own
        self._givers = givers
        self._step = step
        self._prefix = prefix
        self._patience_s = agreement.wait_s + grace_s
        self.began = time.monotonic()
        self.missing = {peer for peer in givers if peer != agreement.rank}

    def key(self, rank: int) -> str:
        """Under which a rank's value lies."""
        return f"{self._prefix}/{rank}"

    def values(self) -> list[Any]:
        """Set this rank's value and wait for those of the givers, in their order.

        Raises:
            StartTimeoutError: some did not come.
            StartError: a rank has failed, or the store is gone.
        """
        try:
            return self._values()
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, StartError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            message = (
                f"rank {self._agreement.rank} cannot reach the store of its process group {self._step}: {reason}. "
                "Has the process that serves it ended?"
            )
            raise StartError(message) from error

    def _values(self) -> list[Any]:
        agreement, rank = self._agreement, self._agreement.rank
        store = agreement.open_store()
        seen: dict[int, Any] = {}
        published = rank not in self._givers
        pause = _SHORTEST_PAUSE_S
        while True:
            waited = time.monotonic() - self.began
            expired = waited >= agreement.wait_s
            if not published and (data := self._own(expired, seen)) is not None:
                store.set(self.key(rank), data)  # type: ignore[arg-type]  # bytes are taken too
                seen[rank] = load(data)
                published = True
            self._take(store, seen)
            word = store.get(agreement.word_key).decode() if store.check([agreement.word_key]) else None
            if word is not None:
                # Whoever failed behind this step had all its values: they are here, though some were not a moment ago.
                self._take(store, seen)
            absent = sorted(self.missing)
            if published and not absent:
                # What peers had set before they gave up, waiting for this rank, leads nowhere.
                if word is not None and rank in GivenUp(**json.loads(word)).missing:
                    raise self._stopped(word, absent, waited)
                return [seen[giver] for giver in self._givers]
            if word is not None:
                raise self._stopped(word, absent, waited)
            if waited >= self._patience_s:
                own_word = GivenUp(rank, self._step, waited, absent, time.time(), "")
                store.set(agreement.word_key, json.dumps(dataclasses.asdict(own_word)))
                raise self._expired(absent, waited)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _take(self, store: Store, seen: dict[int, Any]) -> None:
        """What has come of peers since."""
        for peer in sorted(self.missing):
            if store.check([self.key(peer)]):
                seen[peer] = load(store.get(self.key(peer)))
                self.missing.discard(peer)

    def _expired(self, missing: list[int], waited_s: float, text: str = "") -> StartTimeoutError:
        agreement = self._agreement
        return StartTimeoutError(
            agreement.rank, missing, self._step, waited_s, agreement.when, agreement.setting, text=text
        )

    def _stopped(self, word: str, missing: list[int], waited_s: float) -> StartError:
        """The error of a step in which another rank has given up."""
        agreement, peer = self._agreement, GivenUp(**json.loads(word))
        if peer.error:
            return StartError(f"rank {peer.rank} failed {agreement.when}: {peer.error}")
        if peer.aside:
            message = (
                f"rank {peer.rank} takes no part {agreement.when}: {peer.aside}. Give every rank the same configuration"
            )
            return StartError(message)
        if agreement.rank not in peer.missing:
            return self._expired(missing, waited_s)
        ago = max(0.0, time.time() - peer.wall_s)
        text = (
            f"rank {agreement.rank} came too late {agreement.when}: rank {peer.rank} gave up {ago:.3g} s ago, after it "
            f"had waited {peer.waited_s:.3g} s for {ranks_text(peer.missing)} {peer.step} ({agreement.setting})"
        )
        return self._expired([peer.rank], waited_s, text)
