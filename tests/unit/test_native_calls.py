"""Calls of the native library on CPU ranks that must end with an error, or not at all: one process, no torch group."""

from __future__ import annotations

import ctypes
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_allreduce_plugin import _C, GroupBrokenError, RankMismatchError
from llm_allreduce_plugin.runtime.failures import breakage_of, failure_of

ALGORITHMS = {"ONESHOT": _C.ONE_SHOT, "TWOSHOT": _C.TWO_SHOT}
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2


class Ranks:
    """``number`` ranks in this process, each with a buffer that is large enough for any test."""

    def __init__(self, number: int = 2, *, timeout_s: float = 20.0, first_timeout_s: float = 0.0) -> None:
        self.layout = _C.make_layout(number, 1, flagged_bytes=1 << 18, shared=True)
        self.memory = [ctypes.create_string_buffer(self.layout.total_bytes) for _ in range(number)]
        bases = [ctypes.addressof(buffer) for buffer in self.memory]
        self.workspaces = [
            _C.Workspace(rank, bases, self.layout, timeout_s, _C.CPU, first_timeout_s=first_timeout_s)
            for rank in range(number)
        ]
        self.data = [(ctypes.c_float * 4096)() for _ in range(2 * number)]

    def plan(self, rank: int, count: int = 100, *, algorithm: int = _C.ONE_SHOT, dtype: int = FLOAT32) -> _C.Plan:
        return _C.Plan(
            self.workspaces[rank],
            algorithm=algorithm,
            exchange=_C.FLAGS,
            count=count,
            dtype=dtype,
            lanes=1,
            threads=32,
            chunk_vectors=64,
        )

    def call(self, rank: int, plan: _C.Plan) -> int:
        source, target = (ctypes.addressof(self.data[2 * rank + which]) for which in (0, 1))
        return plan(source, target)

    def start(self, rank: int, plan: _C.Plan) -> Callable[[], int]:
        """The call in a thread of its own; what is returned waits for its status."""
        status: list[int] = []
        thread = threading.Thread(target=lambda: status.append(self.call(rank, plan)), daemon=True)
        thread.start()

        def end() -> int:
            thread.join(30)
            assert status, f"rank {rank} still waits"
            return status[0]

        return end


# -- different calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("first", "second", "texts"),
    [
        ({"count": 100}, {"count": 200}, ("100 float32", "200 float32")),
        ({"dtype": FLOAT16}, {"dtype": BFLOAT16}, ("100 float16", "100 bfloat16")),
        ({"count": 0}, {"count": 100}, ("0 float32", "100 float32")),
    ],
    ids=("sizes", "types", "nothing"),
)
def test_ranks_that_make_different_calls_hear_of_it(
    algorithm: str, first: dict[str, int], second: dict[str, int], texts: tuple[str, str]
) -> None:
    ranks = Ranks(timeout_s=5.0)
    for _ in range(3):  # that the first calls agree is not enough
        ends = [ranks.start(rank, ranks.plan(rank, algorithm=ALGORITHMS[algorithm])) for rank in (0, 1)]
        assert [end() for end in ends] == [0, 0]
    plans = [ranks.plan(rank, algorithm=ALGORITHMS[algorithm], **change) for rank, change in enumerate((first, second))]
    started = time.monotonic()
    ends = [ranks.start(rank, plan) for rank, plan in enumerate(plans)]
    statuses = [end() for end in ends]
    assert time.monotonic() - started < 2, "at once, not when time is up"
    told = [rank for rank, status in enumerate(statuses) if status != 0]
    assert told, "somebody must notice"
    assert 1 in told, "a rank that has something to sum never gets a sum"
    for rank in told:
        error = breakage_of(ranks.workspaces[rank])
        assert isinstance(error, RankMismatchError)
        mine, theirs = texts if rank == 0 else texts[::-1]
        assert f"rank {rank} passes {mine} ({algorithm}), rank {1 - rank} {theirs} ({algorithm})" in str(error)
        again = ranks.plan(rank)
        assert ranks.call(rank, again) == _C.STATUS_TIMEOUT, "for good"


def test_ranks_that_run_different_algorithms_hear_of_it_before_time_is_up() -> None:
    ranks = Ranks(timeout_s=20.0)
    started = time.monotonic()
    ends = [
        ranks.start(rank, ranks.plan(rank, algorithm=algorithm)) for rank, algorithm in enumerate(ALGORITHMS.values())
    ]
    assert all(end() != 0 for end in ends)
    assert time.monotonic() - started < 5
    assert "ONESHOT), rank 1 100 float32 (TWOSHOT)" in str(breakage_of(ranks.workspaces[0]))


def test_calls_of_nothing_run_ahead_without_harm() -> None:
    """Nobody waits in a call without elements, so a rank may be many of them ahead of its peers."""
    ranks = Ranks(timeout_s=5.0)
    nothing = [ranks.plan(rank, 0) for rank in (0, 1)]
    for _ in range(50):
        assert ranks.call(0, nothing[0]) == 0
    end = ranks.start(0, ranks.plan(0))
    for _ in range(50):
        assert ranks.call(1, nothing[1]) == 0
    assert ranks.call(1, ranks.plan(1)) == 0
    assert end() == 0


# -- memory that somebody else has written to --------------------------------------------------------------------------


@pytest.mark.parametrize("distance", (256, 70_000, (1 << 31) - 1))
def test_a_flag_far_ahead_of_its_round_does_not_end_the_wait(distance: int) -> None:
    ranks = Ranks(timeout_s=5.0)
    flag = ctypes.c_uint32.from_buffer(ranks.memory[0], ranks.layout.flags_offset + 4)  # ONESHOT, lane 0, rank 1
    flag.value = 1 + distance
    started = time.monotonic()
    assert ranks.call(0, ranks.plan(0)) != 0
    assert time.monotonic() - started < 2
    error = breakage_of(ranks.workspaces[0])
    assert isinstance(error, GroupBrokenError)
    assert f"rank 0 read a count of rank 1 in ONESHOT/gather that is {distance} rounds too high" in str(error)


# -- patience ----------------------------------------------------------------------------------------------------------


def test_the_first_call_has_patience_of_its_own() -> None:
    ranks = Ranks(timeout_s=0.3, first_timeout_s=20.0)
    plans = [ranks.plan(rank) for rank in (0, 1)]
    end = ranks.start(0, plans[0])
    time.sleep(1.2)  # a rank compiles
    assert ranks.call(1, plans[1]) == 0
    assert end() == 0
    started = time.monotonic()
    assert ranks.call(0, ranks.plan(0, 7)) == _C.STATUS_TIMEOUT, "the second has the usual one, of whatever size"
    assert 0.3 <= time.monotonic() - started < 1
    assert re.match(r"rank 0 waited 0\.\d+ s for rank 1", str(failure_of(ranks.workspaces[0])))


def test_nobody_waits_long_for_a_peer_that_is_gone() -> None:
    ranks = Ranks(3, timeout_s=30.0, first_timeout_s=60.0)
    end = ranks.start(0, ranks.plan(0))
    time.sleep(0.2)
    started = time.monotonic()
    ranks.workspaces[0].mark_gone(2)
    ranks_1 = ranks.start(1, ranks.plan(1))
    assert end() == _C.STATUS_TIMEOUT
    assert time.monotonic() - started < 3
    assert ranks.workspaces[0].failure()[:2] == (0, 2)  # type: ignore[index]
    ranks.workspaces[1].mark_gone(2)
    assert ranks_1() == _C.STATUS_TIMEOUT


def test_what_a_peer_stored_before_it_went_is_still_taken() -> None:
    ranks = Ranks(timeout_s=5.0)
    end = ranks.start(1, ranks.plan(1))
    time.sleep(0.2)
    ranks.workspaces[0].mark_gone(1)
    assert (ranks.call(0, ranks.plan(0)), end()) == (0, 0)


@pytest.mark.parametrize("peer", (-1, 2))
def test_only_peers_can_be_gone(peer: int) -> None:
    with pytest.raises(ValueError, match="not in the group"):
        Ranks().workspaces[0].mark_gone(peer)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_a_second_thread_is_refused_while_one_is_in_a_call() -> None:
    ranks = Ranks()
    end = ranks.start(0, ranks.plan(0))
    time.sleep(0.2)
    assert ranks.call(0, ranks.plan(0, 50)) == _C.STATUS_BUSY
    assert ranks.call(1, ranks.plan(1)) == 0, "which does the first no harm"
    assert end() == 0
    ends = [ranks.start(rank, ranks.plan(rank, 50)) for rank in (0, 1)]
    assert [end() for end in ends] == [0, 0], "nor those that follow"


def test_two_threads_never_get_wrong_sums() -> None:
    """Two threads to a rank, without order between them: every call is right, or refused."""
    ranks = Ranks(timeout_s=10.0)
    outcomes: list[tuple[int, float]] = []

    def work(rank: int, which: int) -> None:
        count = 64
        source = (ctypes.c_float * count)(*([float(which + 1)] * count))
        target = (ctypes.c_float * count)()
        plan = ranks.plan(rank, count)
        for _ in range(300):
            status = plan(ctypes.addressof(source), ctypes.addressof(target))
            if status == 0:
                outcomes.append((which, target[0]))
            elif status == _C.STATUS_BUSY:
                time.sleep(0)

    # Only rank 0 has two threads; rank 1 answers whatever comes with zeros until both have ended.
    stop = threading.Event()

    def answer() -> None:
        plan = ranks.plan(1, 64)
        while not stop.is_set() and ranks.call(1, plan) == 0:
            pass

    threads = [threading.Thread(target=work, args=(0, which)) for which in (0, 1)]
    peer = threading.Thread(target=answer)
    for thread in (*threads, peer):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    ranks.workspaces[1].close(5.0)
    peer.join()
    assert len(outcomes) >= 300
    assert all(value == which + 1 for which, value in outcomes)


# -- the end -----------------------------------------------------------------------------------------------------------


class Owner:
    """Stands for memory: what is left of it is known by its ``ended``."""

    def __init__(self, ended: list[str]) -> None:
        self._ended = ended

    def __del__(self) -> None:
        self._ended.append("ended")


def test_memory_lives_as_long_as_a_plan_that_can_be_called() -> None:
    layout = _C.make_layout(2, 1, flagged_bytes=1 << 16)
    buffers = [ctypes.create_string_buffer(layout.total_bytes) for _ in range(2)]
    ended: list[str] = []
    workspace = _C.Workspace(0, [ctypes.addressof(b) for b in buffers], layout, 1.0, _C.CPU, owner=Owner(ended))
    plan = _C.Plan(
        workspace,
        algorithm=_C.ONE_SHOT,
        exchange=_C.FLAGS,
        count=4,
        dtype=FLOAT32,
        lanes=1,
        threads=32,
        chunk_vectors=1,
    )
    assert workspace.close(1.0)
    del workspace
    assert ended == []
    data = ctypes.create_string_buffer(64)
    assert plan(ctypes.addressof(data), ctypes.addressof(data)) == _C.STATUS_CLOSED
    del plan
    assert ended == ["ended"]


def test_close_ends_the_wait_of_another_thread() -> None:
    ranks = Ranks()
    end = ranks.start(0, ranks.plan(0))
    time.sleep(0.2)
    started = time.monotonic()
    assert ranks.workspaces[0].close(5.0)
    assert time.monotonic() - started < 1
    assert end() == _C.STATUS_CLOSED
    assert ranks.call(0, ranks.plan(0)) == _C.STATUS_CLOSED


# -- signals -----------------------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818  (as a handler's own)
    """What a handler raises."""


@pytest.fixture
def handler() -> Iterator[Callable[[Callable[..., Any]], None]]:
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda function: signal.signal(signal.SIGUSR1, function)  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_runs_while_a_rank_waits(handler: Callable[[Callable[..., Any]], None]) -> None:
    ranks = Ranks(timeout_s=20.0)
    heard: list[float] = []
    handler(lambda *_: heard.append(time.monotonic()))
    sent: list[float] = []

    def send() -> None:
        time.sleep(0.5)
        sent.append(time.monotonic())
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(0.5)
        ranks.call(1, ranks.plan(1))

    thread = threading.Thread(target=send)
    thread.start()
    assert ranks.call(0, ranks.plan(0)) == 0, "the wait goes on behind it"
    assert heard
    assert heard[0] - sent[0] < 0.4
    thread.join()


def test_a_handler_that_raises_ends_the_wait(handler: Callable[[Callable[..., Any]], None]) -> None:
    def stop(*_: object) -> None:
        raise Stop

    ranks = Ranks(timeout_s=20.0)
    handler(stop)
    timer = threading.Timer(0.5, signal.raise_signal, (signal.SIGUSR1,))
    timer.start()
    started = time.monotonic()
    with pytest.raises(Stop):
        ranks.call(0, ranks.plan(0))
    assert time.monotonic() - started < 2
    assert ranks.call(0, ranks.plan(0)) == _C.STATUS_TIMEOUT, "its peers no longer agree with it"
    assert "rank 0 left the call ONESHOT/gather before it had ended" in str(breakage_of(ranks.workspaces[0]))
