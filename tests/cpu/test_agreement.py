"""Steps that ranks take together: values arrive, and whoever does not come is named, whatever it does instead."""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from llm_allreduce_plugin import (
    AllReduceConfig,
    StartError,
    StartTimeoutError,
    TensorParallelCommunicator,
    TransportError,
)
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.base.step import store_of
from llm_allreduce_plugin.engines.common.reports import report_engines_own
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.conftest import PoolFor
from tests.support.forked import Ended, forked, wait_until

WAIT_S = 1.0
SLACK_S = 1.2
STORES = pytest.mark.parametrize("store", ("file", "tcp"))


def _values(context: RankContext) -> None:
    rank, everyone = context.rank, list(range(context.world_size))
    agreements = [Agreement(context.group, WAIT_S) for _ in range(3)]
    for turn in range(20):
        for number, agreement in enumerate(agreements):  # of one group, and never mixed up
            assert agreement.gather((rank, turn, number), "to count") == [(peer, turn, number) for peer in everyone]
    agreement = agreements[0]
    assert agreement.first_fault(None, "to be well") is None
    assert agreement.first_fault("I am 2" if rank == 2 else None, "to be well") == "I am 2"
    assert agreement.from_first_rank(lambda: rank + 40, "to choose", RuntimeError) == 40
    assert agreement.on_every_rank(lambda: rank, "to make", RuntimeError, may_block=True) == rank
    with pytest.raises(TransportError, match="^rank 1 cannot: not here$"):
        agreement.on_every_rank(_not_on_rank_1(rank), "to make", TransportError, "cannot")
    with pytest.raises(TransportError, match="^nothing to choose$"):
        agreement.from_first_rank(_no_choice, "to choose", TransportError)
    for agreement in agreements:
        agreement.close()


def _no_choice() -> None:
    message = "nothing to choose"
    raise ValueError(message)


def _not_on_rank_1(rank: int) -> Any:
    def make() -> int:
        if rank == 1:
            message = "not here\nwith details"
            raise ValueError(message)
        return rank

    return make


@STORES
def test_values_arrive(store: str) -> None:
    with forked(3, _values, store=store) as ranks:
        assert [ranks.ended(rank, 60) for rank in range(3)] == [Ended("ok", None)] * 3


def _keys(context: RankContext) -> tuple[int, int]:
    store = store_of(context.group)
    counts = []
    for _ in range(2):
        for _ in range(20):
            agreement = Agreement(context.group, 20.0)
            for _ in range(5):
                agreement.gather(None, "to count")
                agreement.from_first_rank(lambda: None, "to choose", RuntimeError)
            agreement.close()
        context.gather(None)
        counts.append(store.num_keys())
    return counts[0], counts[1]


def test_the_store_does_not_fill_up() -> None:
    with forked(2, _keys, store="tcp") as ranks:
        for rank in (0, 1):
            first, second = ranks.ended(rank, 60).value
            assert second <= first + 12, "keys of steps that all have taken are gone, but for the collectives of torch"


def _one_misses(context: RankContext, how: str) -> tuple[float, list[int], str]:
    agreement = Agreement(context.group, WAIT_S)
    agreement.gather(None, "to begin")
    if context.rank == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "is late":
            time.sleep(WAIT_S + 1)
    began = time.monotonic()
    with pytest.raises(StartTimeoutError) as caught:
        agreement.gather(None, "to agree on the transport")
    assert isinstance(caught.value, TimeoutError)
    return time.monotonic() - began, caught.value.missing, str(caught.value)


@STORES
@pytest.mark.parametrize("how", ("dies", "is stopped", "is late"))
def test_a_rank_that_does_not_come_is_named_by_all_others(store: str, how: str) -> None:
    with forked(4, _one_misses, how, store=store) as ranks:
        for rank in (0, 2, 3):
            ended = ranks.ended(rank, 30)
            assert ended.kind == "ok", ended
            seconds, missing, text = ended.value
            assert missing == [1]
            assert WAIT_S - 0.3 < seconds < WAIT_S + SLACK_S
            assert text.startswith(f"rank {rank} waited ")
            assert " s at the start for rank 1 to agree on the transport; see its log (start_timeout_s)" in text
        if how == "is late":
            seconds, _, text = ranks.ended(1, 30).value
            assert seconds < 1, "there is nobody to wait for"
            assert text.startswith("rank 1 came too late at the start: rank ")
            assert "s for rank 1 to agree on the transport" in text


def _one_stands_aside(context: RankContext) -> tuple[float, str] | None:
    if context.rank == 1:
        report_engines_own("vLLM", context.group, 1, [0, 1, 2], AllReduceConfig(), "allreduce_strategy is NCCL", "dp0")
        context.gather(None)
        return None
    began = time.monotonic()
    with pytest.raises(StartError) as caught:
        TensorParallelCommunicator(context.group, "cpu", AllReduceConfig(start_timeout_s=60))
    seconds = time.monotonic() - began
    context.gather(None)
    return seconds, str(caught.value)


@STORES
def test_a_rank_that_stands_aside_tells_why(store: str) -> None:
    """Its settings are other ones: the others need not wait for their deadline to hear of it."""
    with forked(3, _one_stands_aside, store=store) as ranks:
        for rank in (0, 2):
            seconds, text = ranks.ended(rank, 30).value
            assert seconds < 10
            assert text == (
                "rank 1 takes no part at the start: vLLM's own all-reduce is left in place there: allreduce_strategy "
                "is NCCL. Give every rank the same configuration"
            )
        assert ranks.ended(1, 30) == Ended("ok", None)


def _two_miss(context: RankContext) -> list[int]:
    agreement = Agreement(context.group, WAIT_S)
    if context.rank in (1, 3):
        time.sleep(60)
    with pytest.raises(StartTimeoutError, match="for ranks 1, 3 to begin; see their logs") as caught:
        agreement.gather(None, "to begin")
    return caught.value.missing


def test_all_that_do_not_come_are_named() -> None:
    with forked(4, _two_miss) as ranks:
        assert [ranks.ended(rank, 30) for rank in (0, 2)] == [Ended("ok", [1, 3])] * 2


def _server_stops(context: RankContext, number: int) -> tuple[float, str, str]:
    agreement = Agreement(context.group, WAIT_S)
    agreement.gather(None, "to begin")
    if context.rank == 0:
        time.sleep(0.3)  # the others have begun too
        os.kill(os.getpid(), number)
    began = time.monotonic()
    with pytest.raises(StartError) as caught:
        agreement.gather(None, "to agree on the transport")
    return time.monotonic() - began, type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("number", (signal.SIGSTOP, signal.SIGKILL))
def test_a_store_that_does_not_answer_holds_nobody(number: signal.Signals) -> None:
    with forked(3, _server_stops, number, store="tcp") as ranks:
        for rank in (1, 2):
            ended = ranks.ended(rank, 30)
            assert ended.kind == "ok", ended
            seconds, kind, text = ended.value
            assert seconds < WAIT_S + SLACK_S
            if number == signal.SIGSTOP:
                assert kind == "StartTimeoutError"
                assert f"rank {rank} waited" in text and "the store of the process group does not answer" in text
            else:
                assert f"rank {rank} cannot reach the store of its process group to agree on the transport" in text


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _stopped_with_the_lock(context: RankContext) -> tuple[float, float, str]:
    """Rank 1 is stopped where it holds the lock of the store's file. How long an end and another step take rank 0."""
    agreement = Agreement(context.group, WAIT_S)
    pids = agreement.gather(os.getpid(), "to begin")
    path = store_of(context.group)._underlying_non_prefix_store.path  # type: ignore[attr-defined]
    ready = Path(f"{path}.ready")
    if context.rank == 1:
        assert wait_until(ready.exists, 20.0), "rank 0 reads from the store"
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.kill(os.getpid(), signal.SIGSTOP)
    ready.touch()
    assert wait_until(lambda: _is_stopped(pids[1]), 20.0)
    began = time.monotonic()
    agreement.close()
    del agreement
    gc.collect()
    closed_s = time.monotonic() - began
    began = time.monotonic()
    with pytest.raises(StartTimeoutError) as caught:
        Agreement(context.group, WAIT_S).gather(None, "to agree on the transport")
    return closed_s, time.monotonic() - began, str(caught.value)


def test_a_rank_that_is_stopped_with_the_lock_of_the_store_holds_nobody() -> None:
    with forked(2, _stopped_with_the_lock) as ranks:
        ended = ranks.ended(0, 30)
        assert ended.kind == "ok", ended
        closed_s, waited_s, text = ended.value
        assert closed_s < 3.0, "an end waits for nobody"
        assert waited_s < WAIT_S + SLACK_S
        assert "rank 0 waited" in text and "the store of the process group does not answer" in text


def _one_fails(context: RankContext) -> tuple[float, str]:
    agreement = Agreement(context.group, 60.0)
    began = time.monotonic()
    if context.rank == 1:
        agreement.give_up(ValueError("no such GPU\ndetails"))
        return 0.0, ""
    with pytest.raises(StartError) as caught:
        agreement.gather(None, "to begin")
    return time.monotonic() - began, str(caught.value)


@STORES
def test_a_rank_that_fails_tells_the_others_at_once(store: str) -> None:
    with forked(3, _one_fails, store=store) as ranks:
        for rank in (0, 2):
            seconds, text = ranks.ended(rank, 30).value
            assert seconds < 2
            assert text == "rank 1 failed at the start: ValueError: no such GPU"


def _blocks(context: RankContext, blocking: list[int], failing: list[int]) -> tuple[float, str]:
    agreement = Agreement(context.group, WAIT_S)

    def make() -> int:
        if context.rank in failing:
            message = "no memory"
            raise ValueError(message)
        if context.rank in blocking:
            time.sleep(60)
        return context.rank

    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        agreement.on_every_rank(make, "to map memory", TransportError, "cannot map memory", may_block=True)
    assert agreement.abandoned == (context.rank in blocking), "and nothing that it may still use is freed"
    assert agreement.gather(context.rank, "to go on") == [0, 1, 2], "ranks still agree"
    return time.monotonic() - began, str(caught.value)


@pytest.mark.parametrize(
    ("blocking", "failing", "least_s", "text"),
    [
        ([0, 2], [1], 0, "rank 1 cannot map memory: no memory"),
        ([1], [], WAIT_S, f"rank 1 cannot map memory: not done after {WAIT_S:g} s"),
        ([0, 1, 2], [], WAIT_S, f"rank 0 cannot map memory: not done after {WAIT_S:g} s"),
    ],
)
def test_what_blocks_on_one_rank_holds_nobody(
    blocking: list[int], failing: list[int], least_s: float, text: str
) -> None:
    with forked(3, _blocks, blocking, failing) as ranks:
        for rank in range(3):
            ended = ranks.ended(rank, 30)
            assert ended.kind == "ok", ended
            seconds, said = ended.value
            assert said == text
            assert least_s <= seconds < least_s + SLACK_S


def _dies_while_others_block(context: RankContext) -> tuple[float, list[int], str]:
    agreement = Agreement(context.group, WAIT_S)
    agreement.gather(None, "to begin")
    if context.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(StartTimeoutError) as caught:
        agreement.on_every_rank(lambda: time.sleep(60), "to map memory", TransportError, "cannot map", may_block=True)
    return time.monotonic() - began, caught.value.missing, str(caught.value)


def test_who_dies_while_others_wait_for_it_in_a_driver_is_named() -> None:
    with forked(3, _dies_while_others_block) as ranks:
        for rank in (0, 2):
            ended = ranks.ended(rank, 30)
            assert ended.kind == "ok", ended
            seconds, missing, text = ended.value
            assert WAIT_S <= seconds < WAIT_S + SLACK_S
            assert missing == [1]
            assert "at the start for rank 1 to map memory; see its log (start_timeout_s)" in text


class _Evil:
    def __reduce__(self) -> Any:
        return os.getenv, ("HOME",)


def _poisoned(context: RankContext) -> str:
    agreement = Agreement(context.group, WAIT_S)
    store = store_of(context.group)
    if context.rank == 1:
        store.set("llm_allreduce/0/1/1", pickle.dumps(_Evil()))  # type: ignore[arg-type]
        return ""
    with pytest.raises(pickle.UnpicklingError) as caught:
        agreement.gather(None, "to begin")
    return str(caught.value)


def test_values_cannot_run_code() -> None:
    with forked(2, _poisoned) as ranks:
        assert ranks.ended(0, 30) == Ended("ok", "os.getenv is not of this package")


def _share(context: RankContext, fails: str) -> tuple[str, int, float]:
    """What becomes of peers' memory where rank 1 has none left, or cannot map."""
    import torch

    from llm_allreduce_plugin.transport.symmetric import share

    entered = []

    def allocate(size: int, device: torch.device) -> torch.Tensor:
        if fails == "allocate" and context.rank == 1:
            message = "CUDA out of memory. Tried to allocate 384 MiB"
            raise torch.OutOfMemoryError(message)
        return torch.empty(size, dtype=torch.uint8, device=device)

    def rendezvous(_buffer: torch.Tensor, _group: object) -> tuple[object, list[int]]:
        entered.append(context.rank)
        if fails == "rendezvous" and context.rank == 1:
            message = "CUDA driver error: invalid device context"
            raise RuntimeError(message)
        if fails == "rendezvous":
            time.sleep(60)  # torch waits for its peers
        return None, [0] * context.world_size

    agreement = Agreement(context.group, 20.0)
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        share(agreement, context.group, context.device, 4096, allocate=allocate, rendezvous=rendezvous)
    return str(caught.value), len(entered), time.monotonic() - began


@pytest.mark.parametrize(
    ("fails", "text", "entered"),
    [
        ("allocate", "rank 1 cannot allocate 4096 bytes for peers to see: CUDA out of memory", 0),
        ("rendezvous", "rank 1 cannot map its peers' memory: CUDA driver error", 1),
    ],
)
def test_memory_that_one_rank_lacks_is_mapped_by_none(fails: str, text: str, entered: int) -> None:
    with forked(3, _share, fails) as ranks:
        for rank in range(3):
            said, count, seconds = ranks.ended(rank, 30).value
            assert said.startswith(text)
            assert count == entered, "nobody waits in a rendezvous to which a peer does not come"
            assert seconds < 5


def _group_goes_on(context: RankContext) -> None:
    with pytest.raises(TransportError):
        Agreement(context.group, 5.0).on_every_rank(_no_choice, "to fail", TransportError)
    assert context.gather(context.rank) == list(range(context.world_size))


def test_torch_collectives_are_not_disturbed(cpu_pool: PoolFor) -> None:
    cpu_pool(3).run(_group_goes_on)


def _alone_with_what_hangs(context: RankContext) -> tuple[str, float]:
    agreement = Agreement(context.group, WAIT_S)
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        agreement.on_every_rank(lambda: time.sleep(20), "to map", TransportError, "cannot map", may_block=True)
    agreement.close()
    return str(caught.value), time.monotonic() - began


def test_one_rank_has_a_deadline_too(cpu_pool: PoolFor) -> None:
    ((text, took_s),) = cpu_pool(1).run(_alone_with_what_hangs)
    assert text == "rank 0 cannot map: not done after 1 s"
    assert WAIT_S <= took_s < WAIT_S + SLACK_S
