"""The start of multicast in a group: whatever fails, all ranks go on without, and say why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.algorithms.facts import GroupFacts, MulticastBytes
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import StartError, TransportError
from llm_allreduce_plugin.group import multicast_start
from llm_allreduce_plugin.group.multicast import layout_of
from llm_allreduce_plugin.group.multicast_start import open_multicast
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.multicast import Multicast
from llm_allreduce_plugin.transport.multicast_driver import OUT_OF_MEMORY, MulticastDriver
from tests.support.fake_multicast import FakeMulticast, Switch
from tests.support.thread_ranks import on_thread_ranks
from tests.unit.test_multicast import RANKS, assert_nothing_left, drivers_of, failing

CONFIG = AllReduceConfig(allreduce_strategy="TWOSHOT", multicast="on")
FACTS = GroupFacts(RANKS, "cuda", Transport.SYMMETRIC, multicast=MulticastBytes(1 << 16, 1 << 20))


class Workspace:
    """Remembers what it may use."""

    def __init__(self) -> None:
        self.multicast: list[tuple[int, int]] = []

    def set_multicast(self, all_: int, own: int, _layout: object) -> None:
        self.multicast.append((all_, own))


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts all ranks, on these drivers: what each has got, and its workspace. No kernel runs, so none is compared."""
    monkeypatch.setattr(multicast_start, "_prepare", lambda _address, _size, _device: None)
    monkeypatch.setattr(multicast_start, "_compare", lambda *_arguments: None)

    def run(entry_points: list[FakeMulticast], facts: GroupFacts = FACTS) -> tuple[list[Any], list[Workspace]]:
        monkeypatch.setattr(
            multicast_start, "_open_driver", lambda device: MulticastDriver(device.index, entry_points[device.index])
        )
        workspaces = [Workspace() for _ in range(RANKS)]

        def one(agreement: Agreement) -> tuple[Multicast | None, GroupFacts]:
            device = torch.device("cuda", agreement.rank)
            return open_multicast(agreement, device, CONFIG, facts, workspaces[agreement.rank])  # type: ignore[arg-type]

        return on_thread_ranks(RANKS, one, 20.0), workspaces

    return run


def test_what_is_proved_is_used(start: Any) -> None:
    switch = Switch()
    entry_points = drivers_of(switch)
    found, workspaces = start(entry_points)
    for (made, facts), workspace in zip(found, workspaces, strict=True):
        assert facts is FACTS
        assert workspace.multicast == [(made.all, made.own)]
        assert made.size >= layout_of(CONFIG, RANKS).total_bytes
    for made, _ in found:
        made.close()
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
        assert workspace.multicast == [(0, 0)]
    assert caplog.text.count("all-reduces go without multicast: rank 0 cannot use multicast") == 1
    assert_nothing_left(switch, entry_points)


def test_other_bits_are_told_and_all_go_without(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the workspace uses it already."""

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
        assert workspace.multicast[-1] == (0, 0)
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
    assert all(workspace.multicast[-1] == (0, 0) for workspace in workspaces)
    assert_nothing_left(switch, entry_points)
