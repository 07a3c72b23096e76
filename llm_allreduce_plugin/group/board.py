"""The board: a row per rank in memory that the ranks of a host share, where each says what has become of it.

A wait that expires knows only which peer did not come. The board tells why: its process has ended, it had given up
before, and on whom, or it had closed. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import enum
import mmap
import os
import struct
import time
from pathlib import Path

# pid, number of its PID namespace, start time of the process, wall time, seconds waited, peer, algorithm, phase, wire
_ROW = struct.Struct("<qQQddiihh")
_STATE = struct.Struct("<i")
_STATE_OFFSET = 60
ROW_BYTES = 64
assert _ROW.size <= _STATE_OFFSET


class State(enum.IntEnum):
    """Of a rank."""

    STARTING = 0
    OPEN = 1
    GAVE_UP = 2
    CLOSED = 3
    BROKEN = 4  # given up, but not for a wait that has expired


@dataclasses.dataclass(frozen=True)
class Process:
    """A process as its host knows it: a number, the namespace that the number is from, and when it was started."""

    pid: int
    namespace: int
    started: int

    @classmethod
    def current(cls) -> Process:
        """The calling one; zeros for what ``/proc`` does not say."""
        try:
            namespace = Path("/proc/self/ns/pid").stat().st_ino
        except OSError:
            namespace = 0
        return cls(os.getpid(), namespace, _started(os.getpid()) or 0)

    def has_ended(self, here: Process) -> bool:
        """Whether it is certain that it has ended; ``here``: who asks."""
        if not self.started or not self.namespace or self.namespace != here.namespace:
            return False  # that number would be somebody else's
        return _started(self.pid) != self.started


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None when it has ended, even if nobody knows yet."""
    try:
        # After the name, which may hold anything: the state, and 19 fields later the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZXx" else int(fields[19])


@dataclasses.dataclass(frozen=True)
class Row:
    """What a rank says of itself.

    Attributes:
        process: its process.
        state: what it does.
        wall_s: since when, in seconds of the wall clock.
        waited_s: of GAVE_UP: how long it had waited.
        peer: of GAVE_UP: for whom.
        algorithm: of GAVE_UP: in which algorithm, a number of the library.
        phase: of GAVE_UP: and in which phase of it.
        wire: of GAVE_UP: and in which wire format, 0 for elements as they are.
    """

    process: Process
    state: State
    wall_s: float = 0.0
    waited_s: float = 0.0
    peer: int = -1
    algorithm: int = -1
    phase: int = -1
    wire: int = 0


class Board:
    """The rows of all ranks.

    Args:
        buffer: ``world_size * ROW_BYTES`` bytes that all ranks share, zeros at first.
        rank: this one.
        world_size: number of ranks.
    """

    def __init__(self, buffer: mmap.mmap, rank: int, world_size: int) -> None:
        self._buffer: mmap.mmap | None = buffer
        self.rank = rank
        self.world_size = world_size
        self._here = Process.current()
        self.write(Row(self._here, State.OPEN, time.time()))

    @property
    def process(self) -> Process:
        """Of this rank."""
        return self._here

    def write(self, row: Row) -> None:
        """Say something of this rank. The state is written last: who sees it sees what belongs to it."""
        buffer = self._buffer  # another thread may close it
        if buffer is None:
            return
        start, process = self.rank * ROW_BYTES, row.process
        _ROW.pack_into(
            buffer, start, process.pid, process.namespace, process.started, row.wall_s, row.waited_s, row.peer,
            row.algorithm, row.phase, row.wire,
        )  # fmt: skip
        _STATE.pack_into(buffer, start + _STATE_OFFSET, row.state)

    def row(self, rank: int) -> Row | None:
        """What a rank says; None when it has said nothing, or nothing that makes sense."""
        buffer = self._buffer
        if buffer is None:
            return None
        start = rank * ROW_BYTES
        (state,) = _STATE.unpack_from(buffer, start + _STATE_OFFSET)
        pid, namespace, started, wall_s, waited_s, peer, algorithm, phase, wire = _ROW.unpack_from(buffer, start)
        if pid <= 0 or state not in State.__members__.values():
            return None
        process = Process(pid, namespace, started)
        return Row(process, State(state), wall_s, waited_s, peer, algorithm, phase, wire)

    def has_ended(self, rank: int) -> bool:
        """Whether a rank's process has ended."""
        row = self.row(rank)
        return row is not None and row.process.has_ended(self._here)

    def close(self) -> None:
        """Say that this rank has closed, unless it had left before, and let go of the memory."""
        own = self.row(self.rank)
        if own is not None and own.state in {State.STARTING, State.OPEN}:
            self.write(Row(self._here, State.CLOSED, time.time()))
        self._buffer = None
