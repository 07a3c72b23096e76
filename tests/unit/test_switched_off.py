"""What looks for processes without the switches against multicast: it finds them, at whatever depth."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.forked import wait_until
from tests.support.switched_off import SWITCHES, Watch, watching

# Sleeps until its input ends, below a process that does the same; its arguments are taken out of what that inherits.
_BELOW = """
import os, subprocess, sys
environment = {name: value for name, value in os.environ.items() if name not in sys.argv[1:]}
child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], env=environment)
child.wait()
"""


@contextmanager
def started(*lacking: str) -> Iterator[int]:
    """A process, and below it another that lacks these variables; both have begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", _BELOW, *lacking], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "1\n"
        yield process.pid
    finally:
        process.stdin.write("\n")
        process.communicate(timeout=60)


def test_processes_with_both_are_seen() -> None:
    with started() as pid, watching() as watch:
        watch.look()
        assert pid in watch.seen
        assert len(watch.seen) >= 2
    assert watch.wrong == {}


@pytest.mark.parametrize("lacking", [*SWITCHES, " ".join(SWITCHES)])
def test_a_process_below_that_lacks_one_is_found(lacking: str) -> None:
    with started(*lacking.split()) as pid:
        watch = Watch()
        watch.look()
        assert pid in watch.seen
        ((found, complaint),) = watch.wrong.items()
        assert found != pid
        assert complaint.startswith(
            f"runs without {' and '.join(f'{name}={SWITCHES[name]}' for name in lacking.split())}: {sys.executable}"
        )
        with pytest.raises(AssertionError, match=f"runs without {lacking.partition(' ')[0]}"), watching():
            pass


def test_another_value_switches_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "01")  # the other switch is as ever
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        watch = Watch()

        def found() -> bool:
            watch.look()
            return process.pid in watch.wrong

        wait_until(found)
        assert f"NCCL_NVLS_ENABLE=0: {sys.executable} -c input()" in watch.wrong[process.pid]
    finally:
        process.kill()
        process.wait()
    assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


def test_what_is_not_python_may_run_without_an_environment() -> None:
    """As ``ldconfig`` does, by which ctypes looks for libraries."""
    process = os.posix_spawn("/bin/sleep", ["sleep", "60"], {"LC_ALL": "C"})
    try:
        wait_until(lambda: Path(f"/proc/{process}/environ").read_bytes() == b"LC_ALL=C\0")
        watch = Watch()
        watch.look()
        assert process not in watch.wrong
        assert process not in watch.seen
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
