"""The start of multicast in a group: whatever fails, all ranks go on without, and say why.

No kernel runs here, and no whole call is compared: test_multicast_compared.py.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange
from llm_allreduce_plugin.algorithms.facts import GroupFacts, MulticastBytes
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import StartError, TransportError
from llm_allreduce_plugin.group import multicast_start
from llm_allreduce_plugin.group.capabilities import group_facts
from llm_allreduce_plugin.group.multicast import layout_of
from llm_allreduce_plugin.group.multicast_start import open_multicast
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.topology.model import NodeTopology
from llm_allreduce_plugin.transport import multicast
from llm_allreduce_plugin.transport.mapped import let_go_of_dropped
from llm_allreduce_plugin.transport.multicast import MulticastMemory
from llm_allreduce_plugin.transport.multicast_driver import ILLEGAL_STATE, NOT_READY, OUT_OF_MEMORY, MulticastDriver
from tests.conftest import MULTICAST_SWITCHES
from tests.support.fake_multicast import PROOF, FakeMulticast, Switch
from tests.support.thread_ranks import on_thread_ranks
from tests.unit.test_multicast import CALLS, RANKS, assert_nothing_left, drivers_of, failing, hanging

NODES = Path(__file__).parents[2] / "configs" / "topologies"
CONFIG = AllReduceConfig(allreduce_strategy="TWOSHOT", multicast="on")
FACTS = GroupFacts(RANKS, "cuda", Transport.SYMMETRIC, multicast=MulticastBytes(1 << 16, 1 << 20))


class Workspace:
    """Remembers what it may use. ``wait_s``: how long its waits last; ``expired``: for whom one was in vain."""

    def __init__(self, rank: int, wait_s: float = 60.0) -> None:
        self.rank, self.wait_s = rank, wait_s
        self.multicast: list[tuple[int, int]] = []
        self.expired: int | None = None

    def set_multicast(self, all_: int, own: int, _layout: object) -> None:
        self.multicast.append((all_, own))

    def failure(self) -> tuple[Any, ...] | None:
        kind = (int(Algorithm.ONE_SHOT), int(Exchange.MULTICAST), 0, 0)
        return None if self.expired is None else (self.rank, self.expired, kind, 0, 0, 1, 0, self.wait_s)


class Started:
    """What has come of all ranks: what each got or raised, its workspace, and those on which calls were tried."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.workspaces = [Workspace(rank) for rank in range(RANKS)]
        self.trials: list[Workspace] = []
        self.agreements: list[Agreement] = []


def starter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Started]:
    """Starts all ranks, on these drivers. ``wait_s``: of a step."""
    monkeypatch.setattr(multicast_start, "_prepare", lambda _address, _size, _device: None)

    def run(
        entry_points: list[FakeMulticast],
        facts: GroupFacts = FACTS,
        wait_s: float = 20.0,
        config: AllReduceConfig = CONFIG,
    ) -> Started:
        monkeypatch.setattr(
            multicast_start, "_open_driver", lambda device: MulticastDriver(device.index, entry_points[device.index])
        )
        started = Started()

        def one(agreement: Agreement) -> tuple[MulticastMemory | None, GroupFacts]:
            rank = agreement.rank
            started.agreements.append(agreement)

            def another(timeout_s: float) -> Workspace:
                started.trials.append(Workspace(rank, timeout_s))
                return started.trials[-1]

            workspace: Any = started.workspaces[rank]
            trial: Any = another
            return open_multicast(agreement, torch.device("cuda", rank), config, facts, workspace, trial)

        started.found = on_thread_ranks(RANKS, one, wait_s)
        return started

    return run


class Gpu:
    """What torch says of GPUs, on which a graph may be captured: then nobody may wait for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = False
        self.waited: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.captures)
        monkeypatch.setattr(torch.cuda, "synchronize", self._wait)

    def _wait(self, device: torch.device) -> None:
        assert not self.captures, "this would end the capture"
        self.waited.append(device)


@pytest.fixture
def start_all(monkeypatch: pytest.MonkeyPatch) -> Any:
    """See :func:`starter`."""
    return starter(monkeypatch)


@pytest.fixture
def start(start_all: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same; no kernel runs, so none is compared: what each has got, and its workspace."""
    monkeypatch.setattr(multicast_start, "_compare", lambda *_arguments: None)

    def run(*arguments: Any, **others: Any) -> tuple[list[Any], list[Workspace]]:
        started = start_all(*arguments, **others)
        return started.found, started.workspaces

    return run


def test_what_is_proved_is_used(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    switch = Switch()
    entry_points = drivers_of(switch)
    with caplog.at_level(logging.INFO):
        found, workspaces = start(entry_points)
    assert caplog.text.count("multicast takes 64 MiB of each GPU") == 1
    for (made, facts), workspace in zip(found, workspaces, strict=True):
        assert facts is FACTS
        assert workspace.multicast == [(made.all, made.own)]
        assert made.size >= layout_of(CONFIG, RANKS).total_bytes
    for made, _ in found:
        made.close()
    assert_nothing_left(switch, entry_points)


@pytest.mark.parametrize("captures", (False, True))
def test_what_is_dropped_is_let_go_of(start: Any, monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    """As by a communicator that nobody closes: once nothing can run on it, and no graph is captured."""
    gpu = Gpu(monkeypatch)
    switch = Switch()
    entry_points = drivers_of(switch)
    found, _ = start(entry_points)
    assert all(made is not None for made, _ in found)
    gpu.captures, gpu.waited = captures, []
    with mock.patch.object(sys, "unraisablehook") as raised:
        found.clear()
        gc.collect()
    assert raised.call_args_list == []
    if captures:
        assert gpu.waited == []
        assert [each.left()["mapped"] for each in entry_points] == [2] * RANKS
        gpu.captures = False
        let_go_of_dropped()
    assert sorted(device.index for device in gpu.waited) == list(range(RANKS))
    assert_nothing_left(switch, entry_points)


def test_what_has_been_closed_is_not_waited_for_again(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    switch = Switch()
    entry_points = drivers_of(switch)
    found, _ = start(entry_points)
    for made, _ in found:
        made.close()
        made.close()
    gpu.waited = []
    del made
    found.clear()
    gc.collect()
    assert gpu.waited == []
    assert_nothing_left(switch, entry_points)


def test_what_the_driver_refuses_is_told_and_all_go_without(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    switch = Switch()
    entry_points = drivers_of(switch, {0: failing("cuMulticastCreate", OUT_OF_MEMORY)})
    with caplog.at_level(logging.WARNING):
        found, workspaces = start(entry_points)
    for (made, facts), workspace in zip(found, workspaces, strict=True):
        assert made is None
        assert facts.multicast == MulticastBytes()
        assert "cuMulticastCreate: CUDA_ERROR_OUT_OF_MEMORY (2)" in facts.no_multicast_reason
        assert workspace.multicast == [], "it is told only of what has been proved"
    assert caplog.text.count("all-reduces go without multicast: rank 0 cannot use multicast") == 1
    assert_nothing_left(switch, entry_points)


def test_what_only_one_rank_finds_stops_all(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    def differ(steps: Agreement, *_others: object) -> None:
        def fail() -> None:
            if steps.rank == 1:
                message = "TWOSHOT by multicast differs in 3 of 12345 elements"
                raise RuntimeError(message)

        steps.on_every_rank(fail, "to compare", TransportError, "cannot use multicast")

    monkeypatch.setattr(multicast_start, "_compare", differ)
    switch = Switch()
    entry_points = drivers_of(switch)
    found, workspaces = start(entry_points)
    for (made, facts), workspace in zip(found, workspaces, strict=True):
        assert made is None
        assert facts.no_multicast_reason.startswith("rank 1 cannot use multicast: TWOSHOT by multicast differs in 3")
        assert workspace.multicast == []
    assert_nothing_left(switch, entry_points)


def test_nothing_is_asked_where_there_is_none(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    switch = Switch()
    facts = FACTS.without_multicast("the GPU of rank 1 has no multicast")
    with caplog.at_level(logging.WARNING):
        found, workspaces = start(drivers_of(switch), facts)
    assert found == [(None, facts)] * RANKS
    assert switch.calls == []
    assert all(workspace.multicast == [] for workspace in workspaces)
    assert caplog.text.count("multicast is on, but not used: the GPU of rank 1 has no multicast") == 1


@pytest.mark.parametrize("strategy", ("AUTO", "MINLATENCY", "LOWPRECISION", "UB", "MNNVL"))
def test_nothing_is_asked_for_a_strategy_that_never_goes_by_multicast(
    start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strategy: str
) -> None:
    for name in MULTICAST_SWITCHES:
        monkeypatch.delenv(name)
    switch = Switch()
    config = AllReduceConfig(allreduce_strategy=strategy, multicast="on")
    node = NodeTopology.from_json(NODES / "h100_x8_nvswitch.json")
    with caplog.at_level(logging.WARNING):
        found, _ = start(drivers_of(switch), group_facts(node, RANKS, config))
    assert [made for made, _ in found] == [None] * RANKS
    assert switch.calls == []
    assert caplog.text.count(f"multicast is on, but not used: {strategy} does not go by multicast") == 1


def test_a_rank_that_is_gone_leaves_nothing_behind_on_the_others(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That ends the start, as everywhere."""

    def leave(steps: Agreement, *_others: object) -> None:
        if steps.rank == 2:
            steps.give_up(ValueError("no"))
            message = "no"
            raise ValueError(message)
        steps.barrier("to compare")

    monkeypatch.setattr(multicast_start, "_compare", leave)
    switch = Switch()
    entry_points = drivers_of(switch)
    found, workspaces = start(entry_points)
    assert [type(each) for each in found] == [StartError, StartError, ValueError]
    assert all(workspace.multicast == [] for workspace in workspaces)
    assert_nothing_left(switch, entry_points)


def test_a_workspace_to_try_calls_that_one_rank_cannot_make(start_all: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the others may take their time meanwhile: nothing is kept by them."""

    def refuse(workspace: Workspace, rank: int, wait_s: float = 60.0) -> None:
        if rank != 1 and wait_s < 60:
            time.sleep(0.3)
        if rank == 1 and wait_s < 60:
            message = "failure record: out of memory"
            raise RuntimeError(message)
        begin(workspace, rank, wait_s)

    begin = Workspace.__init__
    monkeypatch.setattr(Workspace, "__init__", refuse)
    switch = Switch()
    entry_points = drivers_of(switch)
    for _, facts in start_all(entry_points).found:
        assert facts.no_multicast_reason == "rank 1 cannot use multicast: failure record: out of memory"
    assert_nothing_left(switch, entry_points)


@pytest.mark.parametrize("status", (OUT_OF_MEMORY, ILLEGAL_STATE, NOT_READY))
@pytest.mark.parametrize(("rank", "call"), CALLS)
def test_what_fails_in_the_driver_leaves_all_ranks_without(
    start: Any, monkeypatch: pytest.MonkeyPatch, rank: int, call: str, status: int
) -> None:
    monkeypatch.setattr(multicast, "PAUSE_S", 0.0)
    switch = Switch()
    entry_points = drivers_of(switch, {rank: failing(call, status)})
    found, workspaces = start(entry_points)
    for (made, facts), workspace in zip(found, workspaces, strict=True):
        assert made is None
        assert facts.multicast == MulticastBytes()
        assert facts.no_multicast_reason.startswith(f"rank {rank} cannot use multicast: {call}: ")
        assert workspace.multicast == []
    assert_nothing_left(switch, entry_points)


@pytest.mark.parametrize(("rank", "call"), CALLS)
def test_a_driver_that_hangs_leaves_all_ranks_without(
    start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int, call: str
) -> None:
    """Within the deadline of a phase. What is mapped by then may still be used, and stays: that is told."""
    monkeypatch.setattr(multicast_start, "PHASE_WAIT_S", 0.5)
    switch, answer = Switch(), threading.Event()
    entry_points = drivers_of(switch, {rank: hanging(call, answer)})
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        found, workspaces = start(entry_points)
    assert time.monotonic() - began < 6 * 0.5 + 3
    for (made, facts), workspace in zip(found, workspaces, strict=True):
        assert made is None
        assert facts.multicast == MulticastBytes()
        assert facts.no_multicast_reason == f"rank {rank} cannot use multicast: not done after 0.5 s"
        assert workspace.multicast == []
    assert caplog.text.count("all-reduces go without multicast") == 1
    kept = caplog.text.count("memory is kept until this process ends")
    answer.set()
    if call in PROOF:
        assert kept == 1, "by the rank that hangs; the others let go"
        others = [each for at, each in enumerate(entry_points) if at != rank]
        wait_until(lambda: not any(any(each.left().values()) for each in others))
        assert entry_points[rank].left()["mapped"] == 2, "what is kept"
    else:
        assert kept == 0
        assert_nothing_left(switch, entry_points)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
