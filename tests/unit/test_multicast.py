"""Multicast memory: the order of the driver's calls, votes, deadlines, and that nothing is asked where it is off."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import TransportError
from llm_allreduce_plugin.group.multicast import refusal
from llm_allreduce_plugin.settings.choices import MulticastChoice
from llm_allreduce_plugin.transport import driver as drivers
from llm_allreduce_plugin.transport import multicast, multicast_driver
from llm_allreduce_plugin.transport.driver import DriverError
from llm_allreduce_plugin.transport.multicast import Multicast, Opening
from llm_allreduce_plugin.transport.multicast_driver import (
    ILLEGAL_STATE,
    MULTICAST_NAMES,
    NOT_READY,
    OUT_OF_MEMORY,
    MulticastDriver,
    ObjectProperties,
)
from llm_allreduce_plugin.transport.multicast_probe import REFUSED, probe
from tests.conftest import MULTICAST_SWITCHES
from tests.support.fake_fabric import UNKNOWN
from tests.support.fake_multicast import GRANULARITY, MINIMUM, OPENING, PROOF, RECOMMENDED, FakeMulticast, Switch
from tests.support.thread_ranks import on_thread_ranks

RANKS = 3
WAIT_S = 20.0
FIRST_ONLY = {"cuMulticastCreate", "cuMemExportToShareableHandle"}
OTHERS_ONLY = {"cuMemImportFromShareableHandle"}
Misbehave = Callable[[str], int]


def open_on_all(
    switch: Switch, entry_points: list[FakeMulticast], wait_s: float = WAIT_S, prove: bool = True
) -> list[Any]:
    """Each rank's memory, opened and proved, or why not."""

    def run(steps: Agreement) -> Multicast:
        opening = Opening(
            steps,
            lambda: MulticastDriver(steps.rank, entry_points[steps.rank]),
            GRANULARITY + 1,
            lambda _address: None,
            pause=lambda _seconds: None,
        )
        made = opening.open()
        try:
            if prove:
                probe(steps, made, 7, wait_s=0.2)
        except BaseException:
            made.close()
            raise
        return made

    return on_thread_ranks(len(entry_points), run, wait_s)


def drivers_of(switch: Switch, misbehaving: dict[int, Misbehave] | None = None, **others: Any) -> list[FakeMulticast]:
    found = misbehaving or {}
    return [FakeMulticast(switch, rank, found.get(rank, lambda _name: 0), **others) for rank in range(RANKS)]


def failing(call: str, status: int, times: int = 1 << 30) -> Misbehave:
    left = itertools.count(1)
    return lambda name: status if name == call and next(left) <= times else 0


def hanging(call: str, answer: threading.Event) -> Misbehave:
    """Does not come back from this call before ``answer``."""

    def hang(name: str) -> int:
        if name == call:
            answer.wait(30)
        return 0

    return hang


def assert_nothing_left(switch: Switch, entry_points: list[FakeMulticast], wait_s: float = 5.0) -> None:
    """Soon: ranks that have given up let go in threads."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and any(any(each.left().values()) for each in entry_points):
        time.sleep(0.01)
    assert [each.left() for each in entry_points] == [dict.fromkeys(each.left(), 0) for each in entry_points]
    assert not switch.buffers
    assert switch.broken == []


def test_one_store_reaches_every_rank() -> None:
    switch = Switch()
    entry_points = drivers_of(switch)
    made = open_on_all(switch, entry_points)
    assert all(isinstance(each, Multicast) for each in made), made
    assert {each.size for each in made} == {2 * GRANULARITY}
    assert switch.made == 1
    assert all(each.way is None for each in made), "the object is handed out no more"
    for rank, each in enumerate(made):
        assert each.driver is not None
        each.driver.write(each.all + 100 * rank, b"from %d" % rank)
    for each in made:
        assert [each.driver.read(each.own + 100 * rank, 6) for rank in range(RANKS)] == [
            b"from %d" % rank for rank in range(RANKS)
        ]
        assert each.driver.read(each.own + 16 * RANKS, 16) == bytes(16), "what lay where the proof stores is put back"
    began = len(switch.calls)
    for each in made:
        each.close()
        each.close()
    assert_nothing_left(switch, entry_points)
    for rank in range(RANKS):
        calls = [name for at, name in switch.calls[began:] if at == rank and name != "cuCtxSetCurrent"]
        assert calls == [
            "cuMemUnmap", "cuMemAddressFree", "cuMulticastUnbind", "cuMemRelease", "cuMemUnmap", "cuMemAddressFree",
            "cuMemRelease", "cuDevicePrimaryCtxRelease_v2",
        ]  # fmt: skip


def test_memory_is_as_large_as_must_be() -> None:
    """On an H100 the recommended granularity is 512 MiB, and the least one 2 MiB: memory of 64 MiB stays 64 MiB."""
    switch = Switch()
    switch.granularities = {MINIMUM: 2 << 20, RECOMMENDED: 512 << 20}
    one = MulticastDriver(0, FakeMulticast(switch, 0))
    assert one.multicast_rounded(64 << 20, 8) == 64 << 20
    assert one.multicast_rounded((64 << 20) + 1, 8) == 66 << 20
    one.close()


def test_phases_follow_each_other_on_all_ranks() -> None:
    """No rank binds before all are added, or adds before all have imported."""
    switch = Switch()
    made = open_on_all(switch, drivers_of(switch))
    order = [name for _, name in switch.calls]
    phases = ("cuMulticastGetGranularity", "cuMulticastCreate", "cuMemImportFromShareableHandle")
    phases += ("cuMulticastAddDevice", "cuMulticastBindMem", "cuMemMap")
    for before, after in itertools.pairwise(phases):
        last = max(i for i, name in enumerate(order) if name == before)
        assert last < order.index(after), f"{after} before every rank has done {before}"
    for each in made:
        each.close()


CALLS = [
    (rank, call)
    for call in (*OPENING, *PROOF)
    for rank in range(RANKS)
    if not (rank and call in FIRST_ONLY) and not (rank == 0 and call in OTHERS_ONLY)
]


@pytest.mark.parametrize("status", (OUT_OF_MEMORY, ILLEGAL_STATE, NOT_READY, UNKNOWN))
@pytest.mark.parametrize(("rank", "call"), CALLS)
def test_what_fails_on_one_rank_stops_all_alike(rank: int, call: str, status: int) -> None:
    switch = Switch()
    entry_points = drivers_of(switch, {rank: failing(call, status)})
    found = open_on_all(switch, entry_points)
    assert all(isinstance(each, TransportError) for each in found), found
    assert len({str(each) for each in found}) == 1, found
    assert str(found[0]).startswith(f"rank {rank} cannot use multicast: {call}: ")
    assert str(status) in str(found[0])
    assert_nothing_left(switch, entry_points)


@pytest.mark.parametrize(("status", "hint"), ((OUT_OF_MEMORY, "no room left"), (ILLEGAL_STATE, "fabric manager")))
def test_a_reason_says_what_it_may_mean(status: int, hint: str) -> None:
    switch = Switch()
    found = open_on_all(switch, drivers_of(switch, {0: failing("cuMulticastCreate", status)}))
    assert all(hint in str(each) for each in found)


@pytest.mark.parametrize("call", ("cuMemCreate", "cuMemMap", "cuMemExportToShareableHandle"))
def test_a_full_gpu_is_not_taken_for_a_full_switch(call: str) -> None:
    """Memory of the GPU's own is not in the switches."""
    switch = Switch()
    found = open_on_all(switch, drivers_of(switch, {0: failing(call, OUT_OF_MEMORY)}))
    assert all(f"{call}: CUDA_ERROR_OUT_OF_MEMORY (2)" in str(each) for each in found)
    assert not any("switches" in str(each) for each in found), found
    if call == "cuMemCreate":
        assert all(str(each).endswith("; this GPU has no room for 0.125 MiB more") for each in found)


@pytest.mark.parametrize(("rank", "call"), [pair for pair in CALLS if pair[1] in OPENING])
def test_a_fabric_that_is_not_ready_is_asked_again_by_all_in_step(rank: int, call: str) -> None:
    switch = Switch()
    entry_points = drivers_of(switch, {rank: failing(call, NOT_READY, multicast.TRIES - 1)})
    made = open_on_all(switch, entry_points)
    assert all(isinstance(each, Multicast) for each in made), made
    assert switch.made == 1, "what has been done is not done again"
    for each in made:
        each.close()
    assert_nothing_left(switch, entry_points)


@pytest.mark.parametrize(("rank", "call"), CALLS)
def test_a_driver_that_does_not_answer_stops_all_within_the_deadline(rank: int, call: str) -> None:
    """And when it does at last, what that rank has is let go of, too."""
    switch, answer = Switch(), threading.Event()
    entry_points = drivers_of(switch, {rank: hanging(call, answer)})
    began = time.monotonic()
    found = open_on_all(switch, entry_points, wait_s=0.5)
    assert time.monotonic() - began < 6 * 0.5 + 3
    assert all(isinstance(each, TransportError) for each in found), found
    assert all(f"rank {rank} cannot use multicast: not done after 0.5 s" in str(each) for each in found), found
    answer.set()
    assert_nothing_left(switch, entry_points)


def test_bytes_that_do_not_arrive_are_missed() -> None:
    switch = Switch()
    switch.unreached = {1}
    entry_points = drivers_of(switch)
    found = open_on_all(switch, entry_points)
    assert all("rank 1 cannot use multicast: what rank 0 stored to all did not arrive" in str(each) for each in found)
    assert_nothing_left(switch, entry_points)


@pytest.mark.parametrize(("refused", "told"), ((1, True), (2, False)))
def test_a_refused_copy_is_told_from_one_that_does_not_arrive(refused: int, told: bool) -> None:
    """The first goes to all, where copies are nowhere promised; the second puts back what lay there."""
    calls = itertools.count(1)
    switch = Switch()
    entry_points = drivers_of(
        switch, {1: lambda name: UNKNOWN if name == "cuMemcpyHtoD_v2" and next(calls) == refused else 0}
    )
    found = open_on_all(switch, entry_points)
    assert all(
        str(each).startswith("rank 1 cannot use multicast: cuMemcpyHtoD_v2: CUDA_ERROR_UNKNOWN") for each in found
    )
    assert all(str(each).endswith(f"; {REFUSED}") == told for each in found), found
    assert_nothing_left(switch, entry_points)


def test_a_gpu_without_multicast_stops_all() -> None:
    switch = Switch()
    entry_points = [FakeMulticast(switch, rank, supported=rank != 2) for rank in range(RANKS)]
    found = open_on_all(switch, entry_points)
    assert all("rank 2 cannot use multicast: the driver says that this GPU has no multicast" in str(e) for e in found)
    assert switch.made == 0
    assert_nothing_left(switch, entry_points)


def test_structure_is_that_of_cuda_h() -> None:
    offsets = {name: getattr(ObjectProperties, name).offset for name, _ in ObjectProperties._fields_}
    assert offsets == {"devices": 0, "size": 8, "handle_types": 16, "flags": 24}
    assert ctypes.sizeof(ObjectProperties) == 32


@pytest.mark.parametrize("switch", MULTICAST_SWITCHES.items())
def test_a_switch_leaves_no_entry_point(switch: tuple[str, str]) -> None:
    """Not even the whole sequence, against a driver that has it all, comes to a call."""
    names = multicast_driver.entry_names(dict([switch]))
    assert not [name for name in names if "ulticast" in name]
    behind = Switch()
    found = open_on_all(behind, drivers_of(behind, names=names))
    assert all("no cuMulticastGetGranularity" in str(each) for each in found), found
    assert behind.made == 0
    assert set(MULTICAST_NAMES) <= set(multicast_driver.entry_names({}))
    assert set(MULTICAST_NAMES) <= set(multicast_driver.entry_names({"NCCL_NVLS_ENABLE": "1"}))


def test_the_table_of_this_process_has_no_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the library has: the suite runs under both switches."""
    assert MULTICAST_SWITCHES.items() <= os.environ.items()

    class Library:
        def __getattr__(self, name: str) -> str:
            return name

    monkeypatch.setattr(drivers.ctypes, "CDLL", lambda _name: Library())
    for table in (drivers.load(), multicast_driver.load()):
        assert table.cuMemCreate == "cuMemCreate"
        for name in MULTICAST_NAMES:
            with pytest.raises(AttributeError):
                getattr(table, name)


@pytest.mark.parametrize("lacking", [*MULTICAST_SWITCHES, " ".join(MULTICAST_SWITCHES)])
def test_no_process_is_started_without_both_switches(lacking: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in lacking.split()}
    words = " and ".join(f"{name}={MULTICAST_SWITCHES[name]}" for name in lacking.split())
    with pytest.raises(RuntimeError, match=f"a test starts .* without {words}"):
        subprocess.run([sys.executable, "-c", ""], env=environment, check=True)


def test_processes_that_the_suite_starts_inherit_both_switches() -> None:
    script = """
from llm_allreduce_plugin.transport.multicast_driver import entry_names, switched_off_by
assert switched_off_by() == "TORCH_SYMM_MEM_DISABLE_MULTICAST=1", switched_off_by()
assert not [name for name in entry_names() if "ulticast" in name]
import os
assert os.environ["NCCL_NVLS_ENABLE"] == "0"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_when_it_is_tried() -> None:
    on, auto, off = MulticastChoice.ON, MulticastChoice.AUTO, MulticastChoice.OFF
    known = (True, None, True)
    assert refusal(on, 3, known, None) is None
    assert refusal(auto, 3, known, None) is None
    assert refusal(off, 3, known, None) == "multicast is off"
    assert "NCCL_NVLS_ENABLE=0" in (refusal(on, 3, known, "NCCL_NVLS_ENABLE=0") or "")
    assert refusal(on, 3, (True, False, True), None) == "the GPU of rank 1 has no multicast"
    assert refusal(on, 2, (True, True), None) is None
    assert "two ranks" in (refusal(auto, 2, (True, True), None) or "")
    assert refusal(on, 3, known, None, "ranks run on 2 hosts") == "ranks run on 2 hosts"


def test_what_has_been_given_up_cannot_be_used() -> None:
    made = Multicast()
    made.close()
    with pytest.raises(RuntimeError, match="given up before"), made.in_use():
        pass
    with pytest.raises(DriverError, match="there is no CUDA driver"):
        MulticastDriver(0)
