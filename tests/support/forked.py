"""Ranks that start fast, to be killed or stopped: forked from a server that has loaded everything before.

A group of its own for every use, so that nothing of an attack reaches the next test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin.demo.server import free_port
from llm_allreduce_plugin.measure.ranks import RankContext

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["llm_allreduce_plugin.runtime.communicator", "llm_allreduce_plugin.profiles.search", __name__]
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a rank's function ended.

    ``kind``: "ok", or the name of what it raised; ``value``: its result, or the text.
    """

    kind: str
    value: Any


def _run(
    rank: int,
    world_size: int,
    folder: Path,
    method: str,
    pipe: Connection,
    function: Callable[..., Any],
    rest: Any,
) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=(folder / f"{rank}.stacks").open("w"), all_threads=True)
    dist.init_process_group(
        "gloo", init_method=method, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    assert dist.group.WORLD is not None
    context = RankContext(rank, world_size, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    pipe.send("ready")
    pipe.recv()
    try:
        ended = Ended("ok", function(context, *rest))
    except BaseException as error:
        ended = Ended(type(error).__name__, str(error))
    pipe.send(ended)
    with contextlib.suppress(EOFError):
        pipe.recv()  # a store that it serves must not end before the others have
    os._exit(0)  # torch's own end waits for peers that are no more


class ForkedRanks:
    """``world_size`` ranks of one group, each to run one function. ``store``: "file", or "tcp", which rank 0 serves."""

    def __init__(self, world_size: int, function: Callable[..., Any], *rest: Any, store: str = "file") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        method = f"file://{Path(self._folder.name) / 'store'}"
        if store == "tcp":
            method = f"tcp://127.0.0.1:{free_port()}"
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = server.Pipe()
            process = server.Process(
                target=_run,
                args=(rank, world_size, Path(self._folder.name), method, theirs, function, rest),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.poll(120), "a rank did not start"
            assert pipe.recv() == "ready"

    @property
    def pids(self) -> list[int | None]:
        """Of the processes."""
        return [process.pid for process in self.processes]

    def go(self) -> None:
        """Let all ranks begin."""
        for pipe in self.pipes:
            pipe.send(None)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def ended(self, rank: int, timeout_s: float, what: str = "") -> Ended:
        """How a rank's function ended. ``what``: the case, for the error."""
        if not self.pipes[rank].poll(timeout_s):
            stacks = self._stacks(rank)
            message = f"{what or 'forked ranks'}: rank {rank} is still at it after {timeout_s:g} s:\n{stacks}"
            raise AssertionError(message)
        answer: Ended = self.pipes[rank].recv()
        return answer

    def value(self, rank: int, timeout_s: float) -> Any:
        """What a rank's function has returned."""
        ended = self.ended(rank, timeout_s)
        assert ended.kind == "ok", f"rank {rank}: {ended}"
        return ended.value

    def _stacks(self, rank: int) -> str:
        """Where its threads are: its handler writes that even if one of them holds the interpreter."""
        file = Path(self._folder.name) / f"{rank}.stacks"
        if not self.processes[rank].is_alive():
            return f"(it has ended: {self.processes[rank].exitcode})"
        self.send(rank, signal.SIGUSR1)
        wait_until(lambda: "Current thread" in file.read_text(), 2.0)
        return file.read_text() or "(it is stopped: it writes no stacks)"

    def close(self) -> None:
        """End all at once. Nothing of them is left."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(20)
            assert not process.is_alive()
        for pipe in self.pipes:
            pipe.close()
        self._folder.cleanup()


@contextlib.contextmanager
def forked(world_size: int, function: Callable[..., Any], *rest: Any, store: str = "file") -> Iterator[ForkedRanks]:
    """Ranks that have begun, and that end with the block."""
    ranks = ForkedRanks(world_size, function, *rest, store=store)
    try:
        ranks.go()
        yield ranks
    finally:
        ranks.close()


def left_in_shm(pids: Sequence[int | None] = ()) -> list[str]:
    """What is left of ours in the folder of shared memory, and of sockets.

    Names have this user's number in them; or that of one of ``pids``: others may run tests on this machine too. What
    these have is there for a moment only, so what is left is what stays. Sockets of another worker's tests are not
    ours.
    """
    numbers = "|".join(str(number) for number in (os.getuid(), os.getpid(), *pids) if number is not None)
    left: set[str] | None = None

    def nothing() -> bool:
        nonlocal left
        names = {name for name in os.listdir("/dev/shm") if re.match(rf"llm-allreduce-({numbers})-", name)}
        names |= _sockets()
        left = names if left is None else left & names
        return not left

    wait_until(nothing, 1.0)
    return sorted(left or ())


def _sockets() -> set[str]:
    """Names of ours in the kernel's list, but for those that only processes of other workers of pytest-xdist have."""
    fields = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    ours = {f"socket:[{field[6]}]": field[-1] for field in fields if field[-1].startswith("@llm-allreduce")}
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if not ours or worker is None:
        return set(ours.values())
    mine, others = f"PYTEST_XDIST_WORKER={worker}".encode(), set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            environment = (process / "environ").read_bytes().split(b"\0")
            if any(entry.startswith(b"PYTEST_XDIST_WORKER=") for entry in environment) and mine not in environment:
                others |= {os.readlink(file) for file in (process / "fd").iterdir()}
    return {name for socket_, name in ours.items() if socket_ not in others}


def open_files() -> set[str]:
    """What this process has open: number and target."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found


def own_mappings() -> list[str]:
    """Shared memory of ours that this process has mapped."""
    gc.collect()
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "llm-allreduce" in line]


def wait_until(true: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return now
