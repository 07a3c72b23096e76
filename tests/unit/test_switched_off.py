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
from tests.support.switched_off import SWITCHES, WITH_ONE_SWITCH, Watch, refusal, watching

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


def test_who_may_start_a_process_with_one_switch() -> None:
    """Those that are named; and nobody may without both."""
    (torch_name, off), _ = SWITCHES.items()
    one = {torch_name: off, "HOME": "/"}
    assert refusal(SWITCHES, "tests/unit/test_docs.py::test_commands_run (call)") is None
    assert refusal(one, "tests/unit/test_docs.py::test_commands_run (call)") == "without NCCL_NVLS_ENABLE=0"
    assert refusal(one, "") == "without NCCL_NVLS_ENABLE=0"
    for begin in WITH_ONE_SWITCH:
        assert refusal(one, f"{begin}[some] (call)") is None
        assert refusal({}, f"{begin}[some] (call)") is not None


def test_names_of_exceptions_are_those_of_tests() -> None:
    for begin in WITH_ONE_SWITCH:
        file, _, name = begin.partition("::")
        assert f"def {name}" in (Path(__file__).parents[2] / file).read_text(), begin


_ALONE = """
import subprocess, sys
from tests.support.switched_off import Watch, has_children, watching
looks = []
Watch.look = lambda watch: looks.append(1)
assert not has_children()
with watching():
    pass
assert not looks, "without processes below there is nothing to look at"
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
assert has_children()
with watching():
    pass
assert len(looks) == 1
child.communicate()
assert child.returncode is not None
assert not has_children()
"""


def test_nobody_looks_where_there_is_no_process() -> None:
    subprocess.run([sys.executable, "-c", _ALONE], cwd=Path(__file__).parents[2], check=True, timeout=60)


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
