"""Every command, ended at random moments: nothing of it lives on, nothing of it is left, nobody sees a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_allreduce_plugin.measure import record as bench_record
from tests.support.marks import slow

ATTACKS = int(os.environ.get("ALLREDUCE_TEST_ATTACKS", "1"))  # of each kind on each command
TOPOLOGY = Path(__file__).parents[2] / "configs" / "topologies" / "l40s_x8_two_numa.json"
MARKER = "MARKER_OF_A_TEST"
ENDED_WITHIN_S = 5.0  # of a command that is told to
GONE_WITHIN_S = 2.0  # of all that it started, after it

# Arguments, and the seconds in which the signal comes: about as long as the command takes, or its ranks need to start.
COMMANDS: dict[str, tuple[list[str], float]] = {
    "check": (["check"], 7.0),
    "topo": (["topo", "--topology", str(TOPOLOGY)], 0.8),
    "explain": (["explain", "--topology", str(TOPOLOGY), "--sweep", "--plot", "{folder}/sweep.png"], 2.5),
    "bench": (["bench", "--cpu", "-b", "1K", "-e", "1M", "--json", "{folder}/bench.json"], 7.0),
    "tune": (["tune", "--cpu", "--quick", "--output", "{folder}/profile.json"], 7.0),
    "accuracy": (["accuracy", "--no-model", "--json", "{folder}/accuracy.json"], 4.0),
    "breakeven": (["breakeven", "--cpu", "--bytes", "4M", "--plot", "{folder}/pays.png"], 4.0),
    "plot": (["plot", "{folder}/record.json", "--out", "{folder}/plot.png"], 3.0),
}

# These last long after their ranks have started: whatever is done to them meets them at work, on fast machines too.
LONG_COMMANDS = {
    "check": COMMANDS["check"][0],
    "bench": ["bench", "--cpu", "-b", "1K", "-e", "64M", "--json", "{folder}/bench.json"],
    "tune": ["tune", "--cpu", "--output", "{folder}/profile.json"],
}


def _marked(marker: str) -> dict[int, str]:
    """Processes that live and were started, however indirectly, with this marker, and what each is."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARKER}={marker}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = command
    return found


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _takes_signals(pid: int) -> bool:
    """Whether the command has come so far that it handles signals: before, Python's and the kernel's ways apply."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


class Started:
    """A command with folders of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.marker = secrets.token_hex(8)
        self.folder, self.temporary = folder, folder / "tmp"
        for made in (self.temporary, folder / "home", folder / "cwd"):
            made.mkdir(parents=True)
        row = {"candidate": "ONESHOT", "bytes": 4096, "count": 2048, "eager_us": 3.5}
        (folder / "record.json").write_text(json.dumps({"world_size": 2, "where": "a test", "rows": [row]}))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ALLREDUCE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llm_allreduce_plugin", *(text.format(folder=folder) for text in arguments)],
            env=environment | {"TMPDIR": str(self.temporary), "HOME": str(folder / "home"), MARKER: self.marker},
            cwd=folder / "cwd",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def others(self) -> dict[int, str]:
        return {pid: command for pid, command in _marked(self.marker).items() if pid != self.process.pid}

    def ranks(self) -> list[int]:
        """Those that are spawned; of check, those that are forked from what the command has started."""
        return [
            pid
            for pid, command in self.others().items()
            if "spawn_main" in command or ("proof_child" in command and _parent(pid) not in (None, self.process.pid))
        ]

    def check_nothing_is_left(self, what: str) -> None:
        assert _until(lambda: not self.others(), GONE_WITHIN_S), f"{what}: lives on: {self.others()}"
        assert list(self.temporary.iterdir()) == [], what
        assert [name for name in os.listdir("/dev/shm") if str(self.process.pid) in name.split("-")] == [], what


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], Started]]:
    started: list[Started] = []

    def start_(arguments: list[str]) -> Started:
        started.append(Started(arguments, tmp_path / str(len(started))))
        return started[-1]

    yield start_
    for command in started:
        for pid in _marked(command.marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        command.process.communicate()


TOLD, KILLED = (signal.SIGTERM, signal.SIGINT), (signal.SIGKILL,)
# Of commands without ranks, explain is ended for all: it writes a file, too.
LIKE_EXPLAIN = {"topo", "accuracy", "plot"}


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        pytest.param(name, numbers, id=f"{name}, {how}", marks=[pytest.mark.slow] if name in LIKE_EXPLAIN else [])
        for how, numbers in (("told to end", TOLD), ("killed", KILLED))
        for name in COMMANDS
    ],
)
def test_ended_at_a_random_moment(
    name: str, numbers: tuple[signal.Signals, ...], start: Callable[[list[str]], Started]
) -> None:
    arguments, span = COMMANDS[name]
    first = random.randrange(len(numbers))
    for attack in range(first, first + ATTACKS):
        number = numbers[attack % len(numbers)]
        command = start(arguments)
        if number is signal.SIGINT:
            _until(lambda: _takes_signals(command.process.pid) or command.process.poll() is not None, 20.0)  # noqa: B023
        after = random.uniform(0, span)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.process.wait(after)
        was_over, took_signals = command.process.poll() is not None, _takes_signals(command.process.pid)
        command.process.send_signal(number)
        output, errors = command.process.communicate(timeout=ENDED_WITHIN_S)
        what = f"{name}, {number.name} after {after:.2f} s: {output[-500:]}{errors}"
        command.check_nothing_is_left(what)
        if number is not signal.SIGKILL:
            assert "Traceback" not in errors, what
        if number is not signal.SIGKILL and took_signals and not was_over and command.process.returncode != 0:
            assert command.process.returncode == 128 + number, what
            assert errors.splitlines()[-1] == f"llm-allreduce {name}: ended by {number.name}", what


def _with_ranks(command: Started, count: int) -> list[int]:
    assert _until(lambda: len(command.ranks()) == count, 30.0), command.process.communicate(timeout=1)
    return command.ranks()


def test_ctrl_c_of_a_terminal(start: Callable[[list[str]], Started]) -> None:
    """It goes to the whole process group, at any moment of the start of ranks."""
    for _ in range(ATTACKS):
        command = start(LONG_COMMANDS["bench"])
        assert _until(lambda: bool(command.ranks()), 30.0)  # noqa: B023
        time.sleep(random.uniform(0, 4))
        os.killpg(command.process.pid, signal.SIGINT)
        _, errors = command.process.communicate(timeout=ENDED_WITHIN_S)
        assert (command.process.returncode, errors) == (130, "llm-allreduce bench: ended by SIGINT\n")
        command.check_nothing_is_left("Ctrl-C")


@pytest.mark.parametrize(
    ("name", "number"),
    (
        ("bench", signal.SIGTERM),
        ("check", signal.SIGKILL),
        slow("bench", signal.SIGKILL),
        slow("check", signal.SIGTERM),
    ),
)
def test_ranks_that_are_stuck_end_with_their_command(
    name: str, number: signal.Signals, start: Callable[[list[str]], Started]
) -> None:
    """Stopped ranks do nothing by themselves any more: neither answer nor look who has gone.

    They are bound to their command once their interpreter runs, and then get a process group of their own.
    """
    command = start(LONG_COMMANDS[name])
    ranks = _with_ranks(command, 2)
    assert _until(lambda: all(os.getpgid(rank) == rank for rank in ranks), 30.0)
    for rank in ranks:
        # The ranks of check end once both have done their work, so the first is stopped while they still start.
        if rank != ranks[0] or name != "check":
            time.sleep(random.uniform(0, 2))
        os.kill(rank, signal.SIGSTOP)
    time.sleep(1)
    command.process.send_signal(number)
    command.process.communicate(timeout=ENDED_WITHIN_S)
    command.check_nothing_is_left(f"{name}, {number.name}")


@pytest.mark.parametrize("name", ("bench", "tune"))
def test_a_rank_that_is_killed_is_named_at_once(name: str, start: Callable[[list[str]], Started]) -> None:
    for _ in range(ATTACKS):
        command = start(LONG_COMMANDS[name])
        victim = random.choice(_with_ranks(command, 2))
        time.sleep(random.uniform(0, 3))
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        _, errors = command.process.communicate(timeout=20)
        assert time.monotonic() - killed < 2.0 + ENDED_WITHIN_S / 2, errors
        assert command.process.returncode == 1, errors
        (line,) = errors.splitlines()
        assert line.startswith(("error: rank 0 was killed by SIGKILL", "error: rank 1 was killed by SIGKILL")), errors
        command.check_nothing_is_left(errors)


def test_a_rank_that_is_killed_is_what_check_finds(start: Callable[[list[str]], Started]) -> None:
    command = start(["check", "--json"])
    os.kill(_with_ranks(command, 2)[1], signal.SIGKILL)
    output, _ = command.process.communicate(timeout=30)
    (found,) = [row for row in json.loads(output)["findings"] if row["name"] == "CPU ranks"]
    assert found["verdict"] == "FAIL"
    assert found["text"].endswith("was killed by SIGKILL")
    assert command.process.returncode == 1
    command.check_nothing_is_left(output)


@pytest.mark.parametrize("number", (signal.SIGINT, slow(signal.SIGTERM)), ids=lambda number: number.name)
def test_what_was_measured_is_kept(number: signal.Signals, start: Callable[[list[str]], Started]) -> None:
    command = start(LONG_COMMANDS["bench"])
    assert command.process.stdout is not None
    rows = (line for line in command.process.stdout if line.strip() and not line.startswith("#"))
    for _ in range(2):
        assert next(rows)
    command.process.send_signal(number)
    _, errors = command.process.communicate(timeout=ENDED_WITHIN_S)
    assert command.process.returncode == 128 + number
    assert errors == f"llm-allreduce bench: ended by {number.name}\n"
    assert len(bench_record.read(command.folder / "bench.json").rows) >= 2
    command.check_nothing_is_left(errors)
