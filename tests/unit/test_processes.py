"""What ends with what: signals, children, and what a command still does when it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_allreduce_plugin.base import processes

HEAD = "import os, signal, subprocess, sys, time\nfrom llm_allreduce_plugin.base import processes\n"
ENDING = "processes.end_on_signals(lambda: 'the test')\n"
ONE_LINE = "the test: ended by {}\n"
LAST_S = 1.0  # that last things may take here


def python(script: str, hang_up: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[str]:
    """``hang_up``: what it has been told of SIGHUP, whatever whoever runs the tests was told: nohup ignores it."""
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),  # noqa: PLW1509  (no threads here)
    )


def ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()
    return line.strip()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), ids=lambda number: number.name)
def test_a_signal_ends_with_one_line_and_its_exit_code(number: signal.Signals) -> None:
    process = python(ENDING + "print('ready', flush=True)\ntime.sleep(60)")
    ready(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (128 + number, ONE_LINE.format(number.name))


def test_last_things_are_done_in_reverse_and_those_that_fail_hinder_nobody() -> None:
    script = """
def fail():
    raise ValueError
for name in ("a", "b", "c"):
    processes.at_last(lambda name=name: os.write(1, name.encode()))
processes.at_last(fail)
forget = processes.at_last(lambda: os.write(1, b"forgotten"))
forget()
forget()
print("ready", flush=True)
time.sleep(60)
"""
    process = python(ENDING + script)
    ready(process)
    process.terminate()
    output, errors = process.communicate(timeout=10)
    assert (output, errors) == ("cba", ONE_LINE.format("SIGTERM"))


def test_last_things_have_a_deadline() -> None:
    script = "processes.at_last(lambda: time.sleep(60))\nprint('ready', flush=True)\ntime.sleep(60)"
    process = python(f"processes.LAST_SECONDS = {LAST_S}\n" + ENDING + script)
    ready(process)
    started = time.monotonic()
    process.terminate()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGALRM
    assert LAST_S - 0.1 < time.monotonic() - started < LAST_S + 5


def test_a_signal_inside_a_destructor_ends_it_too() -> None:
    """Where Python prints exceptions as "ignored" and goes on."""
    script = """
class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(5)
Slow()
time.sleep(60)
"""
    process = python(ENDING + script)
    ready(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=3)
    assert (process.returncode, errors) == (130, ONE_LINE.format("SIGINT"))


def test_what_whoever_started_it_has_ignored_stays_ignored() -> None:
    process = python(ENDING + "print('ready', flush=True)\ntime.sleep(1)\nprint('done')", signal.SIG_IGN)
    ready(process)
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (0, "done\n", "")


@pytest.mark.parametrize("stopped", (False, True))
def test_a_child_ends_with_its_parent(stopped: bool) -> None:
    child = (
        "import sys, time; from llm_allreduce_plugin.base import processes as p; p.end_with_parent(int(sys.argv[1]));"
    )
    child += "print(1, flush=True); time.sleep(60)"
    script = f"""
child = subprocess.Popen([sys.executable, "-c", {child!r}, str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
    process = python(script)
    pid = int(ready(process))
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.communicate()
    assert within(2.0, lambda: gone(pid))


def test_a_child_whose_parent_was_faster_does_not_begin() -> None:
    nobody = 2**22 - 1  # beyond what pids reach
    process = python(f"processes.end_with_parent({nobody})\nprint('begun')")
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 1


def test_how_processes_end_in_words() -> None:
    assert processes.how_it_ended(-9) == "was killed by SIGKILL"
    assert processes.how_it_ended(-63) == "was killed by signal 63"
    assert processes.how_it_ended(3) == "ended with exit code 3"
    assert processes.how_it_ended(0) == "ended with exit code 0"


def test_interrupts_are_held_and_delivered_after() -> None:
    script = """
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
with processes.interrupts_held():
    os.kill(os.getpid(), signal.SIGINT)
    during = list(got)
print(during, got)
"""
    assert python(script).communicate(timeout=10)[0] == "[] [1]\n"


START = """
import multiprocessing
from llm_allreduce_plugin.base.processes import interrupts_held
looks = "import signal; raise SystemExit(0 if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []) else 3)"
children = [multiprocessing.get_context("spawn").Process(target=exec, args=(looks,)) for _ in range(2)]
with interrupts_held():
    for child in children:
        child.start()
for child in children:
    child.join()
print([child.exitcode for child in children])
"""


def test_the_first_child_of_a_process_gets_no_ctrl_c_either() -> None:
    """Beside it, multiprocessing starts a process of its own, and lets signals in again behind it."""
    result = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "[0, 0]\n", result.stdout + result.stderr
