"""What watches exchanges between hosts: who is named, when, and what is ended in which order."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from llm_allreduce_plugin import PeerTimeoutError
from llm_allreduce_plugin.errors import AllReduceError, GroupBrokenError
from llm_allreduce_plugin.group.places import Places
from llm_allreduce_plugin.runtime.host_watch import HostWatch
from tests.support.forked import wait_until

TIMEOUT_S = 0.4
BEAT_S = TIMEOUT_S / 4


class Store:
    """A dictionary; ``answers``: False for one whose server is gone."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.answers = True

    def set(self, key: str, value: str) -> None:
        self._ask()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._ask()
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        self._ask()
        return all(key in self.values for key in keys)

    def _ask(self) -> None:
        if not self.answers:
            message = "connection reset"
            raise RuntimeError(message)


class Rank:
    """Rank 0 of two hosts of two, and what it is watched with."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.did: list[str] = []
        self.store = Store()
        self.failure: AllReduceError | None = None
        self._beats = itertools.count()
        self.tell()
        places = Places.of((0, 0, 1, 1), 0)
        self.watch = HostWatch(
            cast("Any", self.store), "test", places, cast("Any", self), cast("Any", self), TIMEOUT_S, 2.0,
            lambda: self.failure,
        )  # fmt: skip

    # -- the workspace and the rail ------------------------------------------------------------------------------------

    def exchanges(self) -> tuple[int, int]:
        return self.begun, self.ended

    def fail_exchange(self, _waited_s: float) -> None:
        self.did.append("failed")

    def abort(self) -> None:
        self.did.append("aborted")

    # -- the peer, rank 2 ----------------------------------------------------------------------------------------------

    def tell(self, begun: int = 0, state: str = "open", text: str = "") -> None:
        """What rank 2 says of itself."""
        self.store.values["test/alive/2"] = json.dumps([next(self._beats), begun, state, text]).encode()

    def wait_for_error(
        self, most_s: float, meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[PeerTimeoutError, float]:
        began = time.monotonic()
        while self.watch.error is None and time.monotonic() - began < most_s:
            meanwhile()
            self.watch.look()
            time.sleep(0.01)
        assert self.watch.error is not None, "nothing was found"
        return self.watch.error, time.monotonic() - began


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.watch.close()


def test_who_lives_but_does_not_come(rank: Rank) -> None:
    rank.begun, rank.ended = 6, 5
    error, took_s = rank.wait_for_error(3.0, lambda: rank.tell(begun=5))
    assert TIMEOUT_S <= took_s < 2.0
    assert (error.rank, error.peer, error.strategy, error.phase) == (0, 2, "HOSTS", "exchange")
    assert str(error).startswith("rank 0 on host 0 waited 0.4")
    assert "for rank 2 on host 1 in the exchange between hosts, which lives but has not come to this call" in str(error)
    assert rank.did == ["failed", "aborted"], "nothing may sum what an exchange has brought that was let go"
    with pytest.raises(PeerTimeoutError):
        rank.watch.raise_error()


def test_who_is_silent(rank: Rank) -> None:
    rank.begun, rank.ended = 6, 5
    error, _ = rank.wait_for_error(3.0)
    assert "of which nothing was heard for" in str(error)


def test_silence_between_calls_is_no_failure(rank: Rank) -> None:
    rank.begun = rank.ended = 5
    time.sleep(2 * TIMEOUT_S)
    rank.watch.look()
    assert rank.watch.error is None and rank.did == []


def test_each_exchange_has_its_own_time(rank: Rank) -> None:
    for turn in range(6):
        rank.begun, rank.ended = turn + 6, turn + 5
        rank.tell(begun=turn)
        rank.watch.look()
        time.sleep(TIMEOUT_S / 2)
    assert rank.watch.error is None


@pytest.mark.parametrize("captured", (False, True))
def test_the_first_may_take_longer(rank: Rank, captured: bool) -> None:
    rank.begun, rank.ended = (6, 5) if captured else (1, 0)
    if captured:
        rank.watch.note_capture()
    _, took_s = rank.wait_for_error(4.0, rank.tell)
    assert 2.0 <= took_s < 3.0


@pytest.mark.parametrize(
    ("state", "text", "known"),
    [
        ("broken", "rank 2 waited 3 s for rank 3", "could not go on: rank 2 waited 3 s for rank 3"),
        ("closed", "", "has closed"),
    ],
)
def test_who_has_said_so_is_not_waited_for(rank: Rank, state: str, text: str, known: str) -> None:
    rank.begun, rank.ended = 1, 0
    rank.tell(state=state, text=text)
    error, took_s = rank.wait_for_error(2.0)
    assert took_s < 1.5
    assert f"rank 2 on host 1 in the exchange between hosts, which {known}" in str(error)


def test_a_store_that_is_gone(rank: Rank) -> None:
    rank.begun, rank.ended = 6, 5
    rank.store.answers = False
    error, _ = rank.wait_for_error(3.0)
    assert "the store of the process group has not answered for" in str(error)


def test_an_exchange_that_fails_by_itself(rank: Rank) -> None:
    rank.begun, rank.ended = 6, 5
    began = time.monotonic()
    error = rank.watch.failed(began, "Connection closed by peer\nmore")
    assert time.monotonic() - began < 1.0, "silence is soon noticed"
    assert "of which nothing was heard" in str(error) and str(error).endswith("(Connection closed by peer)")
    assert rank.watch.failed(began, "again") is error, "the first error stays"
    assert rank.did == ["failed", "aborted"]


def test_peers_hear_what_becomes_of_this_rank(rank: Rank) -> None:
    def own() -> list[Any]:
        said: list[Any] = json.loads(rank.store.values["test/alive/0"])
        return said[1:]

    rank.begun = 7
    assert wait_until(lambda: own() == [7, "open", ""])
    rank.failure = GroupBrokenError("broken")
    assert wait_until(lambda: own() == [7, "broken", "broken"])
    rank.failure = None
    rank.watch.close()
    assert wait_until(lambda: own() == [7, "closed", ""])
