"""The start of multicast in a group: whatever fails, all ranks go on without, and say why.

No kernel runs here. Where whole calls are compared, made-up plans compute on the CPU what kernels would.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C, AllReduceConfig
from llm_allreduce_plugin.algorithms.decision import Algorithm, Exchange
from llm_allreduce_plugin.algorithms.facts import GroupFacts, MulticastBytes
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.errors import StartError, TransportError
from llm_allreduce_plugin.group import multicast_start
from llm_allreduce_plugin.group.multicast import layout_of
from llm_allreduce_plugin.group.multicast_start import PROVED_COUNTS, open_multicast
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.multicast import Multicast
from llm_allreduce_plugin.transport.multicast_driver import OUT_OF_MEMORY, MulticastDriver
from tests.support.fake_multicast import FakeMulticast, Switch
from tests.support.group_facts import facts as facts_of
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


# -- what is compared --------------------------------------------------------------------------------------------------

COMPARED = dataclasses.replace(
    facts_of(RANKS, in_band=True), multicast=MulticastBytes(1 << 20, 1 << 24, 1 << 24), no_multicast_reason=""
)
# What a call writes instead of its result: rank, (algorithm, exchange, count), result; None: nothing.
Write = Callable[[int, tuple[Algorithm, Exchange, int], torch.Tensor], torch.Tensor | None]


class Plans:
    """In place of the native library: plans that double their input. ``made``: of rank 0, in order."""

    IN_BAND_MARKER = _C.IN_BAND_MARKER

    def __init__(self, write: Write, status: int = 0) -> None:
        self._write, self._status = write, status
        self.made: list[tuple[Algorithm, Exchange, int]] = []

    @staticmethod
    def error_string(status: int) -> str:
        return f"error {status}"

    def Plan(self, workspace: Any, *, algorithm: int, exchange: int, count: int, **_launch: int) -> Any:
        rank, kind = workspace.rank, (Algorithm(algorithm), Exchange(exchange), count)
        if rank == 0:
            self.made.append(kind)

        def run(source: int, target: int, _stream: int) -> int:
            given, made = (
                torch.frombuffer((ctypes.c_ubyte * (2 * count)).from_address(address), dtype=torch.bfloat16)
                for address in (source, target)
            )
            assert not given.isnan().any()
            assert made.isnan().all(), "what a call leaves out must not look like its result"
            if (result := self._write(rank, kind, given * 2)) is not None:
                made.copy_(result)
            return self._status if kind[1] is Exchange.MULTICAST else 0

        return run


def right(_rank: int, _kind: tuple[Algorithm, Exchange, int], result: torch.Tensor) -> torch.Tensor:
    return result


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compares calls on all ranks with these plans: what that raised on each."""
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)

    def run(plans: Plans, config: AllReduceConfig = CONFIG) -> list[Any]:
        monkeypatch.setattr(multicast_start, "_C", plans)

        def one(steps: Agreement) -> None:
            workspace: Any = SimpleNamespace(rank=steps.rank)
            multicast_start._compare(steps, torch.device("cpu"), config, COMPARED, workspace)

        return on_thread_ranks(RANKS, one, 60.0)

    return run


@pytest.mark.parametrize("in_switch_sum", (False, True))
def test_calls_are_compared_that_push_and_that_go_by_multicast(compare: Any, in_switch_sum: bool) -> None:
    """Of one step and of two, in whole vectors and not; never sums in the switch, which have other bits."""
    plans = Plans(right)
    assert compare(plans, CONFIG.model_copy(update={"in_switch_sum": in_switch_sum})) == [None] * RANKS
    assert plans.made == [
        (algorithm, exchange, count)
        for algorithm in (Algorithm.ONE_SHOT, Algorithm.TWO_SHOT)
        for count in PROVED_COUNTS
        for exchange in (Exchange.PUSH, Exchange.MULTICAST)
    ]
    assert any(count * 2 % 16 for count in PROVED_COUNTS)


@pytest.mark.parametrize("place", (0, -1))
@pytest.mark.parametrize("count", PROVED_COUNTS)
@pytest.mark.parametrize(("algorithm", "name"), [(Algorithm.ONE_SHOT, "ONESHOT"), (Algorithm.TWO_SHOT, "TWOSHOT")])
def test_one_differing_bit_on_one_rank_is_found(
    compare: Any, algorithm: Algorithm, name: str, count: int, place: int
) -> None:
    def flip(rank: int, kind: tuple[Algorithm, Exchange, int], result: torch.Tensor) -> torch.Tensor:
        if (rank, kind) == (2, (algorithm, Exchange.MULTICAST, count)):
            result.view(torch.int16)[place] ^= 1
        return result

    found = compare(Plans(flip))
    assert [type(error) for error in found] == [TransportError] * RANKS
    words = f"rank 2 cannot use multicast: {name} by multicast differs in 1 of {count} elements"
    assert all(words in str(error) for error in found), found


def test_a_zero_of_the_other_sign_is_another_result(compare: Any) -> None:
    def turn(_rank: int, kind: tuple[Algorithm, Exchange, int], result: torch.Tensor) -> torch.Tensor:
        result[7] = -0.0 if kind[1] is Exchange.MULTICAST else 0.0
        return result

    assert "differs in 1 of" in str(compare(Plans(turn))[0])


def test_what_was_not_stored_is_found(compare: Any) -> None:
    """On one rank, whose part a store to all has not reached."""

    def leave(rank: int, kind: tuple[Algorithm, Exchange, int], result: torch.Tensor) -> torch.Tensor | None:
        return None if (rank, kind[1]) == (1, Exchange.MULTICAST) else result

    words = f"rank 1 cannot use multicast: ONESHOT by multicast differs in {PROVED_COUNTS[0]} of {PROVED_COUNTS[0]}"
    assert all(words in str(error) for error in compare(Plans(leave)))


def test_a_call_that_fails_is_told(compare: Any) -> None:
    found = compare(Plans(right, status=-2))
    assert all(isinstance(error, TransportError) for error in found)
    assert f"cannot use multicast: ONESHOT of {PROVED_COUNTS[0]} elements: error -2" in str(found[0])


def test_the_marker_is_in_every_word_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    memory = torch.zeros(1024, dtype=torch.uint8)
    multicast_start._prepare(memory.data_ptr(), 1000, torch.device("cpu"))
    words = memory.view(torch.uint32).tolist()
    assert words == [_C.IN_BAND_MARKER] * 250 + [0] * 6
