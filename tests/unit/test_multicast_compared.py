"""The start of multicast in a group compares whole calls: what differs is told, what does not end ends the start.

No kernel runs here: made-up plans compute on the CPU what kernels would.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
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
from llm_allreduce_plugin.group.multicast_start import PROVED_COUNTS, SUMMED, WAITS_OF_A_PHASE
from tests.support.fake_multicast import Switch
from tests.support.group_facts import facts as facts_of
from tests.support.thread_ranks import on_thread_ranks
from tests.unit.test_multicast import RANKS, assert_nothing_left, drivers_of
from tests.unit.test_multicast_start import CONFIG, Started, Workspace, starter


@pytest.fixture
def start_all(monkeypatch: pytest.MonkeyPatch) -> Any:
    """See :func:`starter`."""
    return starter(monkeypatch)


COMPARED = dataclasses.replace(
    facts_of(RANKS, in_band=True), multicast=MulticastBytes(1 << 20, 1 << 24, 1 << 24), no_multicast_reason=""
)
WITHOUT_SUMS = dataclasses.replace(COMPARED, multicast=MulticastBytes(1 << 20, 1 << 24))
SUMMING = CONFIG.model_copy(update={"in_switch_sum": True})
# What a call writes instead of its result: rank, (algorithm, exchange, count), result; None: nothing.
Write = Callable[[int, tuple[Algorithm, Exchange, int], torch.Tensor], torch.Tensor | None]


class Plans:
    """In place of the native library: plans that double their input.

    ``made``: of rank 0, in order; ``rounds``: of those that the switch sums; ``given``: values of inputs, by exchange.
    """

    IN_BAND_MARKER = _C.IN_BAND_MARKER

    def __init__(self, write: Write, status: int = 0) -> None:
        self._write, self._status = write, status
        self.made: list[tuple[Algorithm, Exchange, int]] = []
        self.rounds: list[int] = []
        self.given: dict[Exchange, list[float]] = {}

    @staticmethod
    def error_string(status: int) -> str:
        return f"error {status}"

    def Plan(
        self, workspace: Any, *, algorithm: int, exchange: int, count: int, chunk_vectors: int, **_launch: int
    ) -> Any:
        rank, kind = workspace.rank, (Algorithm(algorithm), Exchange(exchange), count)
        if rank == 0:
            self.made.append(kind)
            if kind[1] is Exchange.IN_SWITCH:
                self.rounds.append(-(-count // (chunk_vectors * 8 * RANKS)))

        def run(source: int, target: int, _stream: int) -> int:
            given, made = (
                torch.frombuffer((ctypes.c_ubyte * (2 * count)).from_address(address), dtype=torch.bfloat16)
                for address in (source, target)
            )
            assert not given.isnan().any()
            if rank == 0:
                self.given.setdefault(kind[1], []).extend(given[:10_000].tolist())
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

    def run(plans: Plans, config: AllReduceConfig = SUMMING, facts: GroupFacts = COMPARED) -> list[Any]:
        monkeypatch.setattr(multicast_start, "_C", plans)

        def one(steps: Agreement) -> None:
            workspace: Any = Workspace(steps.rank)
            multicast_start._compare(steps, torch.device("cpu"), config, facts, workspace)

        return on_thread_ranks(RANKS, one, 60.0)

    return run


EXACT = [
    (algorithm, exchange, count)
    for algorithm in (Algorithm.ONE_SHOT, Algorithm.TWO_SHOT)
    for count in PROVED_COUNTS
    for exchange in (Exchange.PUSH, Exchange.MULTICAST)
]


def test_calls_are_compared_that_push_and_that_go_by_multicast(compare: Any) -> None:
    """Of one step and of two, in whole vectors and not."""
    plans = Plans(right)
    assert compare(plans, CONFIG, WITHOUT_SUMS) == [None] * RANKS
    assert plans.made == EXACT
    assert any(count * 2 % 16 for count in PROVED_COUNTS)


def test_sums_in_the_switch_are_compared_too(compare: Any) -> None:
    """Where they are asked for: of values whose sum is exact in any order. Also one that takes several rounds."""
    plans = Plans(right)
    assert compare(plans) == [None] * RANKS
    assert plans.made == EXACT + [
        (Algorithm.TWO_SHOT, exchange, count) for count, _ in SUMMED for exchange in (Exchange.PUSH, Exchange.IN_SWITCH)
    ]
    assert plans.rounds == [rounds for _, rounds in SUMMED]
    assert any(count * 2 % 16 for count, _ in SUMMED)
    assert max(plans.rounds) > 1
    given = plans.given[Exchange.IN_SWITCH]
    assert set(given) == {-1.0, 0.0, 1.0}
    assert not set(plans.given[Exchange.MULTICAST]) <= set(given), "what differs by its order must, too"


@pytest.mark.parametrize(("count", "rounds"), SUMMED)
def test_a_switch_that_sums_wrong_is_found(compare: Any, count: int, rounds: int) -> None:
    """On one rank, in one element. The start then goes on without multicast."""

    def spoil(rank: int, kind: tuple[Algorithm, Exchange, int], result: torch.Tensor) -> torch.Tensor:
        if (rank, kind) == (2, (Algorithm.TWO_SHOT, Exchange.IN_SWITCH, count)):
            result[-1] += 1
        return result

    found = compare(Plans(spoil))
    assert [type(error) for error in found] == [TransportError] * RANKS
    words = f"rank 2 cannot use multicast: TWOSHOT summed in the switch differs in 1 of {count} elements"
    assert all(words in str(error) for error in found), (found, rounds)


def test_garbage_of_the_switch_leaves_all_ranks_without(start_all: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(_rank: int, kind: tuple[Algorithm, Exchange, int], result: torch.Tensor) -> torch.Tensor:
        return torch.full_like(result, 1e30) if kind[1] is Exchange.IN_SWITCH else result

    on_the_cpu(monkeypatch)
    monkeypatch.setattr(multicast_start, "_C", Plans(spoil))
    monkeypatch.setattr(torch.Tensor, "to", Gpus._to(torch.Tensor.to))
    switch = Switch()
    started = start_all(drivers_of(switch), COMPARED, config=SUMMING)
    for made, facts in started.found:
        assert made is None
        assert facts.multicast == MulticastBytes()
        assert "rank 0 cannot use multicast: TWOSHOT summed in the switch differs in" in facts.no_multicast_reason
    assert all(workspace.multicast == [] for workspace in started.workspaces)


def test_a_sum_in_the_switch_that_does_not_end_is_named(start_all: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, 1, len(EXACT) + 2, hangs=False)
    started = start_all(drivers_of(Switch()), COMPARED, config=SUMMING)
    assert_all_stop(started, f"rank 1 has lost its GPU in TWOSHOT of {SUMMED[0][0]} elements summed in the switch: ")


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
    assert (
        str(found[0]) == f"rank 0 cannot use multicast: ONESHOT of {PROVED_COUNTS[0]} elements by multicast: error -2"
    )


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
        rank = workspace.rank

        def run(*arguments: int) -> int:
            self._here.rank = rank
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


class MeetingGpus(Gpus):
    """The GPUs of all ranks, whose calls wait for each other as kernels do: in vain, where a rank makes none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch, -1, 0, hangs=False)
        self._meeting = threading.Barrier(RANKS, timeout=1.0)
        self._lost: set[int] = set()

    def Plan(self, workspace: Any, **launch: int) -> Any:
        plan = super().Plan(workspace, **launch)

        def run(*arguments: int) -> int:
            self._here.rank = workspace.rank
            try:
                self._meeting.wait()
            except threading.BrokenBarrierError:
                self._lost.add(workspace.rank)
                workspace.expired = (workspace.rank + 1) % RANKS
                return 0
            return int(plan(*arguments))

        return run

    def synchronize(self, _device: object = None) -> None:
        if getattr(self._here, "rank", None) in self._lost:
            message = "CUDA error: unspecified launch failure"
            raise RuntimeError(message)


@pytest.mark.parametrize("turn", (0, 1, 5))
@pytest.mark.parametrize("what", ("full_like", "Plan"))
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_that_cannot_begin_leaves_all_without(
    start_all: Any, monkeypatch: pytest.MonkeyPatch, rank: int, what: str, turn: int
) -> None:
    """Before any peer has launched what would wait for it."""
    gpus = MeetingGpus(monkeypatch)
    here, turns = threading.local(), itertools.count()
    find_input, find_plan, fill = multicast_start._input, gpus.Plan, torch.full_like

    def input_of(of_rank: int, call: Any) -> torch.Tensor:
        here.rank = of_rank
        return find_input(of_rank, call)

    def fail_in_turn(name: str) -> None:
        if name == what and here.rank == rank and next(turns) == turn:
            message = "CUDA out of memory. Tried to allocate 2.00 MiB"
            raise torch.OutOfMemoryError(message)

    def full_like(*arguments: Any) -> torch.Tensor:
        fail_in_turn("full_like")
        return fill(*arguments)

    def plan_of(*arguments: Any, **launch: int) -> Any:
        fail_in_turn("Plan")
        return find_plan(*arguments, **launch)

    monkeypatch.setattr(multicast_start, "_input", input_of)
    monkeypatch.setattr(torch, "full_like", full_like)
    monkeypatch.setattr(gpus, "Plan", plan_of)
    switch = Switch()
    entry_points = drivers_of(switch)
    for made, facts in start_all(entry_points, COMPARED).found:
        assert made is None
        assert facts.multicast == MulticastBytes()
        assert facts.no_multicast_reason.startswith(f"rank {rank} cannot use multicast: CUDA out of memory.")
    assert_nothing_left(switch, entry_points)


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
