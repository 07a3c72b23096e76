"""That NVLink multicast is switched off in every process below this one, as the kernel shows their environments."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# No test, and nothing that one starts, may make a multicast object, on whatever machine.
SWITCHES = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
EVERY_S = 0.2
# Tests of what refuses where one of the two is missing, or looks for it, begin so: they start such processes.
WITH_ONE_SWITCH = (
    "tests/unit/test_multicast_policy.py::test_validation_refuses_while_a_switch_is_set",
    "tests/unit/test_switched_off.py::",
)
_PROC = Path("/proc")


def _parents() -> dict[int, int]:
    """Of all processes of this machine."""
    found = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(errors="replace")
        except OSError:
            continue  # it has ended
        found[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])  # a name may have brackets and spaces
    return found


def descendants(pid: int) -> Iterator[int]:
    """Processes that ``pid`` has started, and those that they have, while their parents live."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        yield from below
        waiting += below


class Watch:
    """Looks at the descendants of this process that run Python.

    Nothing else that tests start has CUDA in it; and Python itself starts some of it without an environment, such as
    ``ldconfig``, by which ctypes looks for libraries.

    A process shows the environment with which its program was started. One between its fork from this process and its
    program still shows what this one was started with: it is looked at again, and a copy of this process has what
    tests/conftest.py has set.

    Attributes:
        seen: processes that had both switches when they were looked at.
        wrong: others, with what they lack and what they run.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.wrong: dict[int, str] = {}
        self._own = (_PROC / "self" / "environ").read_bytes()

    def look(self) -> None:
        for pid in descendants(os.getpid()):
            try:
                if not (_PROC / str(pid) / "exe").readlink().name.startswith("python"):
                    continue
                environment = (_PROC / str(pid) / "environ").read_bytes()
                command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has ended
            if environment in (b"", self._own):  # it is ending; or see above
                continue
            variables = environment.split(b"\0")
            lacks = [
                f"{name}={value}" for name, value in SWITCHES.items() if f"{name}={value}".encode() not in variables
            ]
            if lacks:
                self.wrong[pid] = f"runs without {' and '.join(lacks)}: {command[:200]}"
            else:
                self.seen.add(pid)


def refusal(environment: Mapping[str, str], test: str) -> str | None:
    """Why a test must not start a process with this environment; None: it may."""
    lacking = [f"{name}={value}" for name, value in SWITCHES.items() if environment.get(name) != value]
    may_lack = len(SWITCHES) - 1 if test.startswith(WITH_ONE_SWITCH) else 0
    return f"without {' and '.join(lacking)}" if len(lacking) > may_lack else None


def has_children() -> bool:
    """Whether this process has any, ended ones that nobody has asked for included. Takes a microsecond, a look many."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@contextmanager
def watching() -> Iterator[Watch]:
    """Look again and again while there are processes below this one, and once more at the end.

    Raises:
        AssertionError: at the end, when a process has been seen that lacks a switch.
    """
    watch, over = Watch(), threading.Event()

    def go_on() -> None:
        while not over.wait(EVERY_S):
            if has_children():
                watch.look()

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(go_on)
        try:
            yield watch
        finally:
            over.set()
        looking.result(60)  # raises what it has raised
    if has_children():
        watch.look()
    assert not watch.wrong, watch.wrong
