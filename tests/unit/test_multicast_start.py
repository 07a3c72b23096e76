"""The start of multicast in a group: whatever fails, all ranks go on without, and say why.

No kernel runs here. Where whole calls are compared, made-up plans compute on the CPU what kernels would.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import threading
import time
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
from llm_allreduce_plugin.group.multicast_start import PROVED_COUNTS, WAITS_OF_A_PHASE, open_multicast
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport import multicast
from llm_allreduce_plugin.transport.multicast import Multicast
from llm_allreduce_plugin.transport.multicast_driver import ILLEGAL_STATE, NOT_READY, OUT_OF_MEMORY, MulticastDriver
from tests.support.fake_multicast import PROOF, FakeMulticast, Switch
from tests.support.group_facts import facts as facts_of
from tests.support.thread_ranks import on_thread_ranks
from tests.unit.test_multicast import CALLS, RANKS, assert_nothing_left, drivers_of, failing

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


@pytest.fixture
def start_all(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts all ranks, on these drivers. ``wait_s``: of a step."""
    monkeypatch.setattr(multicast_start, "_prepare", lambda _address, _size, _device: None)

    def run(entry_points: list[FakeMulticast], facts: GroupFacts = FACTS, wait_s: float = 20.0) -> Started:
        monkeypatch.setattr(
            multicast_start, "_open_driver", lambda device: MulticastDriver(device.index, entry_points[device.index])
        )
        started = Started()

        def one(agreement: Agreement) -> tuple[Multicast | None, GroupFacts]:
            rank = agreement.rank
            started.agreements.append(agreement)

            def another(timeout_s: float) -> Workspace:
                started.trials.append(Workspace(rank, timeout_s))
                return started.trials[-1]

            workspace: Any = started.workspaces[rank]
            trial: Any = another
            return open_multicast(agreement, torch.device("cuda", rank), CONFIG, facts, workspace, trial)

        started.found = on_thread_ranks(RANKS, one, wait_s)
        return started

    return run


@pytest.fixture
def start(start_all: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same; no kernel runs, so none is compared: what each has got, and its workspace."""
    monkeypatch.setattr(multicast_start, "_compare", lambda *_arguments: None)

    def run(*arguments: Any, **others: Any) -> tuple[list[Any], list[Workspace]]:
        started = start_all(*arguments, **others)
        return started.found, started.workspaces

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
    def refuse(workspace: Workspace, rank: int, wait_s: float = 60.0) -> None:
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

    def hang(name: str) -> int:
        if name == call:
            answer.wait(30)
        return 0

    entry_points = drivers_of(switch, {rank: hang})
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


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a plan has run, nothing is left to wait for."""
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compares calls on all ranks with these plans: what that raised on each."""
    on_the_cpu(monkeypatch)

    def run(plans: Plans, config: AllReduceConfig = CONFIG) -> list[Any]:
        monkeypatch.setattr(multicast_start, "_C", plans)

        def one(steps: Agreement) -> None:
            workspace: Any = Workspace(steps.rank)
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


def test_a_call_that_fails_on_all_ranks_is_told(compare: Any) -> None:
    found = compare(Plans(right, status=-2))
    assert all(type(error) is TransportError for error in found)
    assert str(found[0]) == f"rank 0 cannot use multicast: ONESHOT of {PROVED_COUNTS[0]} elements: error -2"


class Gpus:
    """The GPUs of all ranks behind plans that compute on the CPU, one call of which goes wrong on one rank.

    As on a GPU, a plan only begins a call. What comes of it is told where its end is waited for, and then always.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, call: int, *, hangs: bool) -> None:
        self.answer = threading.Event()
        self._begun = [0] * RANKS
        self._wrong: tuple[int, int] = (rank, call)
        self._hangs, self._dead = hangs, False
        self._here = threading.local()
        on_the_cpu(monkeypatch)
        stream = SimpleNamespace(cuda_stream=0, synchronize=self.synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.Tensor, "to", self._to(torch.Tensor.to))
        monkeypatch.setattr(multicast_start, "_C", self)
        self.IN_BAND_MARKER, self.error_string = _C.IN_BAND_MARKER, Plans.error_string
        self._plans = Plans(right)

    @staticmethod
    def _to(move: Any) -> Any:
        return lambda tensor, *to: tensor if isinstance(to[0], torch.device) else move(tensor, *to)

    def Plan(self, workspace: Any, **launch: int) -> Any:
        plan = self._plans.Plan(workspace, **launch)
        rank = self._here.rank = workspace.rank

        def run(*arguments: int) -> int:
            self._begun[rank] += 1
            if (rank, self._begun[rank]) == self._wrong:
                self._dead = True
                if not self._hangs:
                    workspace.expired = (rank + 1) % RANKS
                return 0
            return int(plan(*arguments))

        return run

    def synchronize(self, _device: object = None) -> None:
        if self._dead and self._here.rank == self._wrong[0]:
            if self._hangs:
                self.answer.wait(30)
            message = "CUDA error: unspecified launch failure\nand much more"
            raise RuntimeError(message)


BY_MULTICAST = range(2, 4 * len(PROVED_COUNTS) + 1, 2)  # of the calls that are made
WHAT_TO_DO = "Nothing more can run there, with multicast or without: set multicast to off and start again"


def assert_all_stop(started: Started, words: str) -> None:
    for error in started.found:
        assert type(error) is StartError
        assert words in str(error)
        assert str(error).endswith(WHAT_TO_DO)
    assert all(workspace.multicast == [] for workspace in started.workspaces)
    assert all(agreement.abandoned for agreement in started.agreements), "no rank frees what may still be stored to"


@pytest.mark.parametrize("call", BY_MULTICAST)
@pytest.mark.parametrize("rank", range(RANKS))
def test_an_expired_wait_ends_the_start_of_all_ranks(
    start_all: Any, monkeypatch: pytest.MonkeyPatch, rank: int, call: int
) -> None:
    """Its kernel has ended the context: all-reduces that push cannot run there either."""
    Gpus(monkeypatch, rank, call, hangs=False)
    switch = Switch()
    started = start_all(drivers_of(switch), COMPARED)
    strategy, count = divmod(call // 2 - 1, len(PROVED_COUNTS))
    what = f"{('ONESHOT', 'TWOSHOT')[strategy]} of {PROVED_COUNTS[count]} elements by multicast"
    peer = (rank + 1) % RANKS
    words = f"rank {rank} has lost its GPU in {what}: it waited 4 s in vain for what rank {peer} stores"
    assert_all_stop(started, words)
    assert {trial.wait_s for trial in started.trials} == {20.0 / WAITS_OF_A_PHASE}
    assert switch.broken == []


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_call_that_does_not_come_back_ends_the_start_of_all_ranks(
    start_all: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    gpus = Gpus(monkeypatch, rank, 4, hangs=True)
    monkeypatch.setattr(multicast_start, "PHASE_WAIT_S", 1.0)
    switch = Switch()
    began = time.monotonic()
    started = start_all(drivers_of(switch), COMPARED)
    assert time.monotonic() - began < 5
    assert_all_stop(started, f"rank {rank} has lost its GPU in ONESHOT of {PROVED_COUNTS[1]} elements")
    assert all("not done after 1 s" in str(error) for error in started.found)
    assert caplog.text.count("memory is kept until this process ends: a GPU does not answer") == RANKS
    gpus.answer.set()


def test_another_rank_that_finds_wrong_bits_meanwhile_changes_nothing(compare: Any) -> None:
    """A rank that is only later than one with wrong bits is waited for: it can go on."""

    def late(rank: int, kind: tuple[Algorithm, Exchange, int], result: torch.Tensor) -> torch.Tensor:
        if kind[1] is Exchange.MULTICAST:
            if rank == 0:
                result.view(torch.int16)[0] ^= 1
            else:
                time.sleep(0.5)
        return result

    found = compare(Plans(late))
    assert [type(error) for error in found] == [TransportError] * RANKS


def test_the_marker_is_in_every_word_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    memory = torch.zeros(1024, dtype=torch.uint8)
    multicast_start._prepare(memory.data_ptr(), 1000, torch.device("cpu"))
    words = memory.view(torch.uint32).tolist()
    assert words == [_C.IN_BAND_MARKER] * 250 + [0] * 6
