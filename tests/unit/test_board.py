"""What ranks say of themselves, and what an expired wait makes of it."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin import _C, PeerTimeoutError
from llm_allreduce_plugin.group.board import ROW_BYTES, Board, Process, Row, State
from llm_allreduce_plugin.runtime.failures import failure_of
from llm_allreduce_plugin.runtime.health import Health
from llm_allreduce_plugin.runtime.monitor import Monitor


class Group:
    """Ranks in this process that share a board; the workspaces are real."""

    def __init__(self, world_size: int = 3, timeout_s: float = 0.3) -> None:
        memory = mmap.mmap(-1, world_size * ROW_BYTES)
        self.boards = [Board(memory, rank, world_size) for rank in range(world_size)]
        self.layout = _C.make_layout(world_size, 1, flagged_bytes=1 << 18, shared=True)
        self.buffers = [ctypes.create_string_buffer(self.layout.total_bytes) for _ in range(world_size)]
        bases = [ctypes.addressof(buffer) for buffer in self.buffers]
        self.workspaces = [
            _C.Workspace(rank, bases, self.layout, timeout_s, _C.CPU, first_timeout_s=timeout_s)
            for rank in range(world_size)
        ]
        self.health = [Health(w, b) for w, b in zip(self.workspaces, self.boards, strict=True)]

    def call(self, rank: int) -> int:
        """A call that waits for all peers."""
        data = (ctypes.c_float * 200)()
        plan = _C.Plan(
            self.workspaces[rank],
            algorithm=_C.ONE_SHOT,
            exchange=_C.FLAGS,
            count=100,
            dtype=0,
            lanes=1,
            threads=32,
            chunk_vectors=64,
        )
        return plan(ctypes.addressof(data), ctypes.addressof(data) + 400)


def process() -> tuple[subprocess.Popen[bytes], Process]:
    child = subprocess.Popen([sys.executable, "-c", "print('x', flush=True); input()"], stdin=-1, stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    return child, Process(child.pid, Process.current().namespace, started)


def test_a_process_that_has_ended_is_known_even_unreaped() -> None:
    child, known = process()
    here = Process.current()
    assert not known.has_ended(here)
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not known.has_ended(here) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert known.has_ended(here), "nobody has waited for it yet"
    child.communicate()
    assert known.has_ended(here)
    assert not here.has_ended(here)


def test_what_cannot_be_known_is_not_claimed() -> None:
    here = Process.current()
    gone = Process(here.pid, here.namespace, here.started - 1)  # the number was given to another process since
    assert gone.has_ended(here)
    assert not dataclasses.replace(gone, namespace=here.namespace + 1).has_ended(here), "a container's own number"
    assert not dataclasses.replace(gone, started=0).has_ended(here)
    assert not dataclasses.replace(gone, namespace=0).has_ended(here)


def test_rows() -> None:
    group = Group()
    assert group.boards[0].row(2) == group.boards[2].row(2)
    row = Row(Process(5, 6, 7), State.GAVE_UP, 1.5, 2.5, 1, 2, 3)
    group.boards[1].write(row)
    assert group.boards[0].row(1) == row
    group.boards[1].close()
    assert group.boards[0].row(1) == row, "what it left for is not overwritten"
    group.boards[2].close()
    closed = group.boards[0].row(2)
    assert closed is not None and closed.state is State.CLOSED
    assert group.boards[2].row(0) is None, "and nothing is read of memory that was let go"


@pytest.mark.parametrize(
    "junk",
    (b"\xff" * ROW_BYTES, bytes(ROW_BYTES), os.urandom(60) + b"\x07\0\0\0"),
    ids=("ones", "zeros", "random"),
)
def test_a_scribbled_board_says_nothing(junk: bytes) -> None:
    group = Group()
    buffer: Any = group.boards[0]._buffer
    buffer[ROW_BYTES : 2 * ROW_BYTES] = junk
    assert group.boards[0].row(1) is None
    group.health[0].look()
    assert group.call(0) == _C.STATUS_TIMEOUT
    assert str(failure_of(group.workspaces[0], group.boards[0])).endswith("for rank 1 in ONESHOT/gather")


def test_a_late_rank_is_told_that_it_is_late() -> None:
    group = Group(2)
    assert group.call(0) == _C.STATUS_TIMEOUT
    with pytest.raises(PeerTimeoutError, match=r"^rank 0 waited 0\.[34]\d* s for rank 1 in ONESHOT/gather$"):
        group.health[0].raise_error()
    time.sleep(0.5)
    assert group.call(1) == 0, "what rank 0 had sent before"
    assert group.call(1) == _C.STATUS_TIMEOUT
    error = failure_of(group.workspaces[1], group.boards[1])
    assert error is not None
    assert str(error).startswith("rank 1 came too late: rank 0 gave up ")
    assert " s ago, after it had waited 0.3" in str(error)
    assert str(error).endswith("s for rank 1 in ONESHOT/gather")
    assert (error.rank, error.peer, error.strategy, error.phase) == (1, 0, "ONESHOT", "gather")


def test_who_waits_for_one_that_gave_up_hears_for_whom_that_waited() -> None:
    group = Group(3, timeout_s=20.0)
    board = group.boards[0]
    board.write(Row(board.process, State.GAVE_UP, time.time() - 5, 60.0, 2, _C.TWO_SHOT, 1))
    began = time.monotonic()
    group.health[1].look()
    assert group.call(1) == _C.STATUS_TIMEOUT
    assert time.monotonic() - began < 3, "it will not come"
    text = str(failure_of(group.workspaces[1], group.boards[1]))
    assert "for rank 0 in ONESHOT/gather, which gave up " in text
    assert "s ago, after it had waited 60 s for rank 2 in TWOSHOT/scatter" in text


@pytest.mark.parametrize(
    ("state", "known"), [(State.CLOSED, "which has closed its communicator"), (State.OPEN, "whose process has ended")]
)
def test_nobody_waits_long_for_one_that_has_left(state: State, known: str) -> None:
    group = Group(2, timeout_s=20.0)
    child, there = process()
    group.boards[1].write(Row(there, state, time.time()))
    if state is State.OPEN:
        child.kill()
    child.communicate()
    monitor = Monitor(group.workspaces[0], None, dict, board=group.boards[0], watchers=[group.health[0].look])
    try:
        began = time.monotonic()
        assert group.call(0) == _C.STATUS_TIMEOUT
        assert time.monotonic() - began < 3
        assert str(failure_of(group.workspaces[0], group.boards[0])).endswith(f"for rank 1 in ONESHOT/gather, {known}")
        deadline = time.monotonic() + 5
        while (row := group.boards[1].row(0)) and row.state is State.OPEN and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        monitor.close()
    assert row is not None and row.state is State.GAVE_UP, "the monitor says it to the others"
    assert (row.peer, row.algorithm) == (1, _C.ONE_SHOT)


def test_a_watch_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    seen = threading.Event()
    times: list[int] = []

    def fails() -> None:
        times.append(1)
        message = "broken board"
        raise ValueError(message)

    monitor = Monitor(None, None, dict, watchers=[fails, lambda: seen.set() if len(times) > 2 else None])
    assert seen.wait(10)
    monitor.close()
    assert (
        sum("cannot check whether peers are alive: ValueError: broken board" in line for line in caplog.messages) == 1
    )
