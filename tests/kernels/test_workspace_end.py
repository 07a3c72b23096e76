"""Workspaces of GPUs when they are closed, refuse calls, and where their failure record lies: on emulated GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from llm_allreduce_plugin import _C
from tests.support import emulator
from tests.support.host_group import HostGroup
from tests.support.local_machine import EmulatedGpus

pytestmark = emulator.needs_emulator


@pytest.fixture
def library() -> Iterator[emulator.Library]:
    library = emulator.library()
    yield library
    library.hold_launches(False)


class OneCall:
    """A call of rank 0 that waits for no peer: the second half of one host."""

    def __init__(self, **wrong: int) -> None:
        self.group = HostGroup(EmulatedGpus(1), 1, 2)
        self.tensor = torch.zeros(1024)
        self.workspace = self.group.workspaces[0]
        what = {"algorithm": _C.HOST_SUM, "hosts": 1, "chunk_vectors": 1, "count": 8, "lanes": 1} | wrong
        self.plan = self.group.machine.native.Plan(self.workspace, exchange=_C.FLAGS, dtype=0, threads=32, **what)
        self.stream = self.group.streams[0].cuda_stream

    def __call__(self) -> int:
        address = self.tensor.data_ptr()
        return int(self.plan(address, address + 1024, self.stream))

    def time_launches(self) -> float:
        address = self.tensor.data_ptr()
        return float(self.plan.time_launches(address, address + 1024, self.stream, 1))


def in_thread(call: Callable[[], int], statuses: list[int]) -> threading.Thread:
    thread = threading.Thread(target=lambda: statuses.append(call()))
    thread.start()
    return thread


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_workspace_is_not_closed_while_another_thread_launches(library: emulator.Library) -> None:
    call = OneCall()
    assert call() == 0
    statuses: list[int] = []
    library.hold_launches(True)
    first = in_thread(call, statuses)
    wait_until(lambda: library.held_launches() == 1)
    assert not call.workspace.close(0.05), "a launch is under way"
    library.hold_launches(False)
    first.join()
    assert statuses == [0], "it had begun before"
    assert call.workspace.close(1.0)
    call.group.machine.synchronize()


def test_a_call_that_waits_for_another_thread_does_not_begin_on_a_closed_workspace(library: emulator.Library) -> None:
    call = OneCall()
    statuses: list[int] = []
    library.hold_launches(True)
    first = in_thread(call, statuses)
    wait_until(lambda: library.held_launches() == 1)
    second_began = threading.Event()
    second = in_thread(lambda: (second_began.set(), call())[1], statuses)
    second_began.wait()
    time.sleep(0.05)  # it has looked whether the workspace is closed, and waits for the first
    assert not call.workspace.close(0.0)
    library.hold_launches(False)
    first.join()
    second.join()
    assert sorted(statuses) == [_C.STATUS_CLOSED, 0]
    call.group.machine.synchronize()


def test_nothing_is_launched_on_a_closed_workspace(library: emulator.Library) -> None:
    call = OneCall()
    assert call.time_launches() >= 0
    call.group.machine.synchronize()
    assert call.workspace.close(0.0)
    assert call() == _C.STATUS_CLOSED
    for launch in (
        call.time_launches,
        lambda: call.workspace.probe_write(1, call.stream),
        lambda: call.workspace.probe_check(1, call.tensor.data_ptr(), call.stream),
    ):
        with pytest.raises(RuntimeError, match="the workspace is closed"):
            launch()


def test_the_failure_record_is_pinned_on_the_workspaces_device(library: emulator.Library) -> None:
    """Whatever device is current, which stays so."""
    group = HostGroup(EmulatedGpus(1), 1, 2)
    assert library.current_device() == 0
    assert library.device_that_pinned() == group.machine.index(1) == 1
    bases = [buffer.data_ptr() for buffer in group.buffers]
    workspace = group.machine.native.Workspace(1, bases, group.layout, 1.0, 5)
    assert (library.device_that_pinned(), library.current_device()) == (5, 0)
    group.machine.native.Workspace(1, bases, group.layout, 1.0, 6)
    del workspace
    assert (library.device_that_pinned(), library.current_device()) == (5, 0)


def test_a_record_of_a_failed_exchange_stays_when_a_wait_expires(library: emulator.Library) -> None:
    group = HostGroup(EmulatedGpus(1), 2, 2, timeout_s=0.01)
    plan = group.machine.native.Plan(
        group.workspaces[0], algorithm=_C.REDUCE, exchange=_C.FLAGS, count=64, dtype=0, lanes=2, threads=32,
        chunk_vectors=16,
    )  # fmt: skip
    inputs, sums = torch.ones(64), torch.zeros(256)
    assert plan(inputs.data_ptr(), sums.data_ptr(), group.streams[0].cuda_stream) == 0  # its peer never comes
    group.workspaces[0].fail_exchange(1.5)
    before = group.workspaces[0].failure()
    with pytest.raises(emulator.BrokenContextError):
        group.machine.synchronize()
    assert group.workspaces[0].failure() == before
    assert before is not None
    assert before[7] == 1.5
    assert group.workspaces[0].reason() == _C.REASON_EXCHANGE


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"scatter_lanes": 1, "lanes": 2}, "scatter_lanes, drain_lanes: by flags, every lane does everything"),
        ({"hosts": 0}, "hosts: less than 1, or more than LAR_MAX_HOSTS"),
        ({"lanes": 9}, "lanes: not from 1 to those of the workspace"),
        ({"chunk_vectors": 1 << 20}, "chunk_vectors: more than a slot holds"),
    ],
)
def test_a_refused_launch_says_what_is_wrong(library: emulator.Library, wrong: dict[str, int], text: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        OneCall(**wrong)()
    assert str(caught.value) == f"launch: invalid argument ({text})"
