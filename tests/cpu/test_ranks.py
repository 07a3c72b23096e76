"""A pool of ranks when something goes wrong on one of them: who is named, and who lives on."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin.bench import compare
from llm_allreduce_plugin.measure.ranks import (
    FAILURES,
    RankContext,
    RankEndedError,
    RankFailedError,
    RankPool,
    in_a_line,
)
from llm_allreduce_plugin.transport.multicast_driver import entry_names, switched_off_by
from tests.conftest import PoolFor
from tests.support.marks import slow
from tests.support.pool import ForkedPool
from tests.support.switched_off import Watch


def _behave(context: RankContext, behaviours: dict[int, str]) -> int:
    behaviour = behaviours.get(context.rank, "")
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "exits":
        os._exit(7)
    if behaviour == "raises":
        message = f"bad {context.rank}"
        raise ValueError(message)
    if behaviour == "hangs":
        time.sleep(600)
    return context.rank


def _interrupted(_context: RankContext) -> str:
    """What a rank that is sent SIGINT itself does, as any Python does."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        return "interrupted"
    return "nothing"


def _tell_at_the_end(context: RankContext, folder: str) -> None:
    """Leave in a file which threads of gloo there are when the interpreter ends."""
    compare.form_groups(context, (1, context.world_size))

    def tell() -> None:
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        (Path(folder) / str(context.rank)).write_text(" ".join(name for name in names if "gloo" in name))

    atexit.register(tell)


def _process_group(_context: RankContext) -> int:
    return os.getpgid(0)


def _all_ended(pool: RankPool) -> bool:
    return not any(process.is_alive() for process in pool.processes)


@pytest.mark.parametrize(
    ("behaviours", "kind", "text"),
    [
        ({1: "killed", 0: "hangs"}, RankEndedError, "rank 1 was killed by SIGKILL"),
        slow({2: "exits"}, RankEndedError, "rank 2 ended with exit code 7"),  # as one that is killed
        ({0: "hangs", 2: "hangs"}, TimeoutError, "ranks 0, 2 gave no answer within 2 s"),
        slow({1: "raises", 2: "raises"}, RankFailedError, "rank 1: ValueError: bad 1"),
        ({1: "raises", 2: "hangs"}, RankFailedError, "rank 1: ValueError: bad 1"),
    ],
)
def test_who_is_named(behaviours: dict[int, str], kind: type[Exception], text: str, tmp_path: Path) -> None:
    """Ranks are forked, but for those of which one is killed: new interpreters take seconds each."""
    before = set(multiprocessing.active_children())  # pools that other tests share
    with pytest.raises(kind) as caught:
        _use_three(behaviours, RankPool(3, "cpu") if "killed" in behaviours.values() else ForkedPool(3, tmp_path))
    assert isinstance(caught.value, FAILURES)
    assert in_a_line(caught.value) == text
    assert set(multiprocessing.active_children()) == before


def _use_three(behaviours: dict[int, str], made: RankPool) -> None:
    with made as pool:
        assert pool.run(_behave, {}) == [0, 1, 2]
        assert pool.run(_interrupted) == ["interrupted"] * 3
        groups = pool.run(_process_group)
        assert os.getpgid(0) not in groups, "a terminal's Ctrl-C does not reach ranks"
        started = time.monotonic()
        try:
            pool.run(_behave, behaviours, timeout_s=2.0)
        finally:
            assert time.monotonic() - started < 4.0


def test_a_failed_function_does_not_end_the_pool(tmp_path: Path) -> None:
    with ForkedPool(2, tmp_path) as pool:
        with pytest.raises(
            AssertionError, match=r"rank 0:\nTraceback(?s:.)*bad 0(?s:.)*rank 1:\nTraceback(?s:.)*bad 1"
        ):
            pool.run(_behave, {0: "raises", 1: "raises"})
        assert pool.run(_behave, {}, ranks=[1]) == [1]
        pool.processes[0].kill()
        pool.processes[0].join()
        assert pool.run(_behave, {}, ranks=[1]) == [1], "who is not asked may be gone"
        with pytest.raises(RankEndedError, match="rank 0 was killed by SIGKILL"):
            pool.run(_behave, {})
    assert _all_ended(pool)


def test_ranks_end_the_threads_of_their_groups_before_the_interpreter_ends(tmp_path: Path) -> None:
    with RankPool(2, "cpu") as pool:
        pool.run(_tell_at_the_end, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["", ""]
    assert [process.exitcode for process in pool.processes] == [0, 0]


def test_a_start_that_fails_leaves_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[RankPool] = []
    original = RankPool._collect

    def remember(self: RankPool, *arguments: Any) -> list[Any]:
        pools.append(self)
        self.processes[1].kill()
        return original(self, *arguments)

    monkeypatch.setattr(RankPool, "_collect", remember)
    with pytest.raises(RankEndedError, match="rank 1 was killed by SIGKILL"):
        RankPool(2, "cpu")
    assert _all_ended(pools[0])


def _listening() -> dict[str, str]:
    """Sockets that this process listens on, and the address of each as the kernel writes it."""
    mine = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:  # TCP_LISTEN
                found[fields[9]] = fields[1].partition(":")[0]
    return found


def test_nobody_outside_this_machine_reaches_what_ranks_meet_at(tmp_path: Path) -> None:
    before = _listening()
    with ForkedPool(2, tmp_path):
        during = _listening()
    assert [address for number, address in during.items() if number not in before] == ["0100007F"], "127.0.0.1"
    assert _listening().keys() <= before.keys()


def _pid(_context: RankContext) -> int:
    return os.getpid()


def _multicast_names(_context: RankContext) -> tuple[str | None, list[str]]:
    return switched_off_by(), [name for name in entry_names() if "ulticast" in name]


def test_no_rank_could_make_a_multicast_object(cpu_pool: PoolFor, switches: Watch) -> None:
    """What ranks of the suite may call of a driver has nothing of it, in processes that are forked or not.

    And all of them were started with both switches.
    """
    expected = [("TORCH_SYMM_MEM_DISABLE_MULTICAST=1", [])] * 4

    def look(pool: RankPool, world_size: int) -> None:
        assert pool.run(_multicast_names) == expected[:world_size]
        switches.look()
        assert set(pool.run(_pid)) <= switches.seen

    for world_size in (2, 4):
        look(cpu_pool(world_size), world_size)
    with RankPool(2, "cpu") as pool:
        look(pool, 2)
