"""Functions that are left to themselves, and the end of the process that has left them."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What is under way in torch's store when the interpreter ends would end the process by SIGABRT.
ASKED = """
import time, types
import torch.distributed as dist
store = dist.HashStore()
def asked_for_a_while():
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        store.check(["never"])
"""

LEFT_IN_A_STORE = f"""{ASKED}
from llm_allreduce_plugin.base.attempt import Attempt
def ask():
    asked_for_a_while()
    print("ended", flush=True)
assert not Attempt(ask, "store").wait(0.1)
"""

LEFT_FOR_EVER = """
import time
from llm_allreduce_plugin.base.attempt import Attempt
assert not Attempt(lambda: time.sleep(60), "sleep").wait(0.1)
"""

WATCHING = f"""{ASKED}
from llm_allreduce_plugin.group.places import Places
from llm_allreduce_plugin.runtime.host_watch import HostWatch

class Slow:
    def set(self, key, value):
        asked_for_a_while()
        print(value, flush=True)
    def check(self, keys):
        return False

workspace = types.SimpleNamespace(exchanges=lambda: (0, 0))
HostWatch(Slow(), "test", Places.of((0, 0, 1, 1), 0), workspace, types.SimpleNamespace(), 20.0, 20.0)
"""


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(("program", "said"), [(LEFT_IN_A_STORE, "ended"), (WATCHING, '"closed"')])
def test_a_process_waits_a_moment_for_what_it_has_left_in_a_store(program: str, said: str) -> None:
    result = _run(program)
    assert (result.returncode, result.stderr) == (0, "")
    assert said in result.stdout


def test_what_never_returns_does_not_hold_the_process() -> None:
    result = _run(LEFT_FOR_EVER)
    assert (result.returncode, result.stderr) == (0, "")
