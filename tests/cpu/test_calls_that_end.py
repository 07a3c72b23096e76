"""Calls of real CPU ranks that must end with a named error: threads, signals, closing meanwhile, different calls."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import PeerTimeoutError, RankMismatchError, TensorParallelCommunicator
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.runtime.norm_calls import shape_of
from tests.conftest import PoolFor
from tests.support.forked import forked, wait_until

STRATEGIES = ("ONESHOT", "TWOSHOT")


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """``function`` in a thread; what is returned waits for its result, or for what it raised."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # the caller looks at it
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end() -> Any:
        thread.join(60)
        assert results, "the call does not end"
        return results[0]

    return end


def _together(context: RankContext) -> None:
    context.gather(None)


def _text_of(function: Callable[[], Any], *kinds: type[Exception]) -> str:
    with pytest.raises(kinds) as raised:
        function()
    return str(raised.value)


# -- different calls ---------------------------------------------------------------------------------------------------


def _different(context: RankContext, strategy: str, inputs: list[tuple[int, str]]) -> tuple[str, float]:
    group = context.communicator(strategy, timeout_s=20.0)
    for size in (1, 1000):
        group.all_reduce(torch.ones(size))
    count, dtype = inputs[context.rank]
    mine = torch.ones(count, dtype=getattr(torch, dtype))
    started = time.monotonic()
    try:
        group.all_reduce(mine)
        text = _text_of(lambda: group.all_reduce(mine), RankMismatchError, PeerTimeoutError)
    except RankMismatchError as error:
        text = str(error)
    seconds = time.monotonic() - started
    _text_of(lambda: group.all_reduce(torch.ones(3)), RankMismatchError, PeerTimeoutError)  # for good
    group.close()  # whoever has heard of it need not again
    _together(context)
    return text, seconds


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "inputs",
    (
        [(100, "float32"), (200, "float32"), (100, "float32")],
        [(100, "float16"), (100, "bfloat16"), (100, "float16")],
        [(1 << 20, "float32"), (1 << 20, "float32"), (10, "float32")],
    ),
    ids=("sizes", "types", "large and small"),
)
def test_ranks_that_pass_different_tensors_all_hear_of_it(
    cpu_pool: PoolFor, strategy: str, inputs: list[tuple[int, str]]
) -> None:
    answers = cpu_pool(3).run(_different, strategy, inputs)
    for text, seconds in answers:
        assert "ranks make different calls" in text
        assert f"{inputs[0][0]} {inputs[0][1]}" in text or f"{inputs[1][0]} {inputs[1][1]}" in text
        assert seconds < 5


# -- threads -----------------------------------------------------------------------------------------------------------


def _two_threads(context: RankContext) -> tuple[int, int]:
    """Two threads of every rank call whenever they like; each of them is refused, or gets a right sum."""
    group = context.communicator("ONESHOT", timeout_s=20.0)
    refused, done = [0], [0]

    def work(value: float) -> None:
        mine = torch.full((1000,), value)
        for _ in range(200):
            try:
                output = group.all_reduce(mine)
            except RuntimeError as error:
                if not str(error).startswith("another thread is inside a call"):
                    raise
                refused[0] += 1
                time.sleep(0.0001)
                continue
            assert torch.equal(output, mine * context.world_size), "not the sum of what was passed"
            done[0] += 1

    # Of two threads only those of one rank can meet: the other ranks answer from one.
    if context.rank == 0:
        ends = [in_thread(lambda: work(1.0)), in_thread(lambda: work(1.0))]
        for end in ends:
            assert end() is None
        group.close()
    else:
        try:
            while True:
                group.all_reduce(torch.ones(1000))
        except PeerTimeoutError as error:
            assert "rank 0" in str(error)
        group.close()
    _together(context)
    return refused[0], done[0]


def test_threads_get_right_sums_or_an_error(cpu_pool: PoolFor) -> None:
    refused, done = cpu_pool(2).run(_two_threads)[0]
    assert done >= 200
    assert refused + done == 400


# -- closing -----------------------------------------------------------------------------------------------------------


def _close_beside_a_call(context: RankContext) -> str:
    group = context.communicator("TWOSHOT", timeout_s=60.0)
    group.all_reduce(torch.ones(1000))
    answer = ""
    if context.rank == 0:
        end = in_thread(lambda: group.all_reduce(torch.ones(1000)))
        time.sleep(0.3)
        started = time.monotonic()
        group.close()
        assert time.monotonic() - started < 3
        answer = str(end())
    _together(context)
    if context.rank != 0:
        group.close()
    return answer


def test_closing_ends_a_call_of_another_thread_with_an_error(cpu_pool: PoolFor) -> None:
    assert cpu_pool(2).run(_close_beside_a_call)[0] == "this communicator is closed"


def _plan_after_the_end(context: RankContext) -> list[str]:
    group = context.communicator("ONESHOT")
    group.close()
    rows = torch.ones(4, 16, dtype=torch.bfloat16)
    shape = shape_of(rows, None, 1e-6, 0.0, None, return_norm=False)
    plans: list[Callable[[], object]] = [
        lambda: group.call_of("TWOSHOT", 1000, torch.float32),
        lambda: group.call_into_of("UB", 1000, torch.float32),
        lambda: group.norm_call_of("TWOSHOT", shape, fused=False),
        lambda: group.peer_visible_empty((4,), torch.float32),
    ]
    return [_text_of(plan, RuntimeError) for plan in plans]


def test_nothing_is_planned_after_the_end(cpu_pool: PoolFor) -> None:
    assert cpu_pool(2).run(_plan_after_the_end) == [["this communicator is closed"] * 4] * 2


def _calls_that_outlive(context: RankContext, closed: bool) -> str:
    group: TensorParallelCommunicator | None = context.communicator("ONESHOT", timeout_s=5.0)
    assert group is not None
    call = group.call_of("TWOSHOT", 1000, torch.float32)
    mine = torch.ones(1000)
    assert torch.equal(call(mine), mine * context.world_size)
    if closed:
        group.close()
        with pytest.raises(RuntimeError, match="this communicator is closed"):
            group.all_reduce(mine)
    del group
    if closed:
        return _text_of(lambda: call(mine), RuntimeError)
    # Dropped without a word: the memory is there as long as somebody can call.
    return str(float(call(mine)[0]))


@pytest.mark.parametrize("closed", (True, False), ids=("closed", "dropped"))
def test_calls_that_outlive_their_communicator(closed: bool) -> None:
    with forked(2, _calls_that_outlive, closed) as ranks:
        answers = [ranks.value(rank, 60) for rank in (0, 1)]
    assert answers == ["this communicator is closed" if closed else "2.0"] * 2


# -- signals -----------------------------------------------------------------------------------------------------------


def _signalled(context: RankContext, number: int, folder: str) -> None:
    """Rank 0 waits for a rank that never comes, and is told to stop meanwhile."""
    group = context.communicator("ONESHOT", timeout_s=60.0, first_timeout_s=60.0)
    group.all_reduce(torch.ones(10))
    if context.rank == 1:
        time.sleep(60)
        return

    def handler(*_: object) -> None:
        raise SystemExit(3)

    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, handler)
    with open(os.path.join(folder, "waits"), "w") as file:
        file.write(str(os.getpid()))
    try:
        group.all_reduce(torch.ones(10))
    except BaseException as error:
        with open(os.path.join(folder, "heard"), "w") as file:
            file.write(type(error).__name__)
        raise


@pytest.mark.parametrize(("number", "raised"), ((signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit")))
def test_signals_reach_a_rank_that_waits(tmp_path: Any, number: signal.Signals, raised: str) -> None:
    with forked(2, _signalled, number, str(tmp_path)) as ranks:
        assert wait_until((tmp_path / "waits").exists, 60)
        time.sleep(0.5)
        ranks.send(0, number)
        started = time.monotonic()
        assert wait_until(lambda: (tmp_path / "heard").exists() and bool((tmp_path / "heard").read_text()), 10)
        assert time.monotonic() - started < 2
        assert (tmp_path / "heard").read_text() == raised


# -- patience ----------------------------------------------------------------------------------------------------------


def _compiles(context: RankContext) -> tuple[bool, float]:
    group = context.communicator("TWOSHOT", timeout_s=1.0, first_timeout_s=30.0)
    mine = torch.ones(1000)
    if context.rank == 1:
        time.sleep(3)  # longer than timeout_s
    right = torch.equal(group.all_reduce(mine), mine * context.world_size)
    _together(context)
    seconds = 0.0
    if context.rank == 0:
        started = time.monotonic()
        _text_of(lambda: group.all_reduce(mine), PeerTimeoutError)
        seconds = time.monotonic() - started
    _together(context)
    group.close()
    return right, seconds


def test_a_rank_may_compile_before_its_first_call() -> None:
    with forked(2, _compiles) as ranks:
        answers = [ranks.value(rank, 60) for rank in (0, 1)]
    assert [right for right, _ in answers] == [True, True]
    assert 1.0 <= answers[0][1] < 2.2


def _late(context: RankContext) -> str:
    group = context.communicator("ONESHOT", timeout_s=1.0, first_timeout_s=1.0)
    group.all_reduce(torch.ones(10))
    if context.rank == 1:
        time.sleep(4)
    text = ""
    for _ in range(3):  # what rank 0 had sent before it gave up is still taken
        try:
            group.all_reduce(torch.ones(10))
        except PeerTimeoutError as error:
            text = str(error)
    _together(context)
    return text


def test_a_late_rank_is_told_that_its_peer_gave_up_and_when() -> None:
    with forked(2, _late) as ranks:
        waiting, late = (ranks.value(rank, 60) for rank in (0, 1))
    assert re.fullmatch(r"rank 0 waited 1(\.\d+)? s for rank 1 in ONESHOT/gather", waiting)
    assert "rank 0 gave up" in late
    assert "rank 1" in late
