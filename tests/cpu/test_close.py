"""The end of a communicator: every step is made, in bounded time, whatever is wrong; then it says what was."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin import PeerTimeoutError
from llm_allreduce_plugin import TensorParallelCommunicator as Communicator
from llm_allreduce_plugin.engines.vllm.communicator import _communicator_class
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.runtime.calls import plan_of
from llm_allreduce_plugin.topology.links import Transport
from llm_allreduce_plugin.transport.driver import Driver
from llm_allreduce_plugin.transport.mapped import Mapped, MappedMemory, let_go_of_dropped
from tests.support.fake_fabric import FakeEntryPoints, Truth
from tests.support.forked import Ended, forked, open_files, own_mappings
from tests.support.short_waits import TIMEOUT_S, communicator


class Lines(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("llm_allreduce_plugin")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def summaries(self) -> int:
        return sum(line.startswith("all-reduce summary: ") for line in self.lines)


def _call_unheard(group: Communicator) -> int:
    """A call whose error nobody hears, as one of a replayed graph: its status."""
    decision = group.explain((100,), torch.float32)
    assert group._held.workspace is not None and decision.launch is not None
    plan = plan_of(group._held.workspace, decision.launch, 100, torch.float32)
    data = torch.ones(200)
    return plan(data.data_ptr(), data[100:].data_ptr())


def _close_after(context: RankContext, heard: bool, peer: str) -> tuple[str, float, int, bool, bool]:
    lines = Lines()
    before = open_files()
    group = communicator(context)
    group.all_reduce(torch.ones(100))
    if context.rank == 1:
        if peer == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if peer == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        group.close()
        return "", 0.0, 0, False, False
    monitor = group._held.monitor
    assert monitor is not None
    if heard:
        with pytest.raises(PeerTimeoutError):
            group.all_reduce(torch.ones(100))
    else:
        assert _call_unheard(group) != 0
    began = time.monotonic()
    said = ""
    try:
        group.close()
    except PeerTimeoutError as error:
        said = str(error)
    seconds = time.monotonic() - began
    group.close()  # says it once
    left = bool(own_mappings()) or bool(open_files() - before)
    return said, seconds, lines.summaries(), monitor._thread.is_alive(), left


@pytest.mark.parametrize("heard", (True, False), ids=("heard", "unheard"))
@pytest.mark.parametrize(
    ("peer", "known"),
    [("killed", ", whose process has ended"), ("stopped", ""), ("closed", ", which has closed its communicator")],
)
def test_close_with_a_peer_that_is_no_more(peer: str, known: str, heard: bool) -> None:
    with forked(2, _close_after, heard, peer) as ranks:
        ended = ranks.ended(0, 30)
        assert ended.kind == "ok", ended
        said, seconds, summaries, monitor_lives, left = ended.value
        assert said == "" if heard else said.startswith("rank 0 waited 1") and said.endswith(f"ONESHOT/gather{known}")
        assert seconds < 1
        assert summaries == 1
        assert not monitor_lives
        assert not left


def _close_beside_a_call(context: RankContext) -> tuple[list[str], float]:
    group = communicator(context, timeout_s=30.0, first_timeout_s=30.0)
    if context.rank == 1:
        time.sleep(3)
        group.close()
        return [], 0.0
    errors: list[str] = []

    def call() -> None:
        try:
            group.all_reduce(torch.ones(100))
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    group.close()
    seconds = time.monotonic() - began
    thread.join(5)
    return errors, seconds


def test_close_beside_a_call_ends_both() -> None:
    with forked(2, _close_beside_a_call) as ranks:
        ended = ranks.ended(0, 30)
        assert ended.kind == "ok", ended
        errors, seconds = ended.value
        assert errors == ["this communicator is closed"]
        assert seconds < 1


def _call_after_the_end(context: RankContext) -> list[str]:
    said = []
    for closed in (True, False):
        group = communicator(context)
        call = group.call_of("ONESHOT", 100, torch.float32)
        call(torch.ones(100))
        if closed:
            group.close()
        del group
        gc.collect()
        context.gather(None)
        try:
            call(torch.ones(100))
            said.append("went well")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_what_can_still_be_called_has_its_memory() -> None:
    with forked(2, _call_after_the_end) as ranks:
        for rank in (0, 1):
            assert ranks.ended(rank, 30) == Ended("ok", ["this communicator is closed", "went well"])


def _every_step_fails(context: RankContext) -> tuple[str, list[str], int]:
    lines = Lines()
    group = communicator(context)
    group.all_reduce(torch.ones(100))
    monitor, memory, board = group._held.monitor, group._held.memory, group._held.board_memory
    assert monitor is not None and memory is not None and board is not None

    def failing(what: str) -> Any:
        def fail() -> None:
            message = f"{what} failed"
            raise OSError(message)

        return fail

    with (
        mock.patch.object(monitor, "close", failing("monitor")),
        mock.patch.object(memory, "close", failing("memory")),
        mock.patch.object(board, "close", failing("board")),
        pytest.raises(OSError, match="failed") as caught,
    ):
        group.close()
    assert group._held.memory is None and group._held.workspace is None
    group.close()
    monitor.close()
    return str(caught.value), [line for line in lines.lines if "failed" in line], lines.summaries()


def test_every_step_is_made_whatever_became_of_the_others() -> None:
    with forked(2, _every_step_fails) as ranks:
        ended = ranks.ended(0, 30)
        assert ended.kind == "ok", ended
        first, others, summaries = ended.value
        assert first == "monitor failed"
        assert others == [
            "another error at the end: OSError: memory failed",
            "another error at the end: OSError: board failed",
        ]
        assert summaries == 1


def _as_on_a_gpu(context: RankContext, hangs: bool) -> tuple[str, float, list[str], bool]:
    """The end with a device that hangs, or whose context has failed: of a CPU rank, but for the wait for a device."""
    lines = Lines()
    group = communicator(context)
    group.all_reduce(torch.ones(100))
    group._held.device = torch.device("cuda", 0)

    def synchronize(_device: object) -> None:
        if hangs:
            time.sleep(60)
        message = "CUDA error: unspecified launch failure"
        raise RuntimeError(message)

    began, said = time.monotonic(), ""
    with mock.patch.object(torch.cuda, "synchronize", synchronize):
        try:
            group.close()
        except RuntimeError as error:
            said = str(error)
    seconds = time.monotonic() - began
    gc.collect()
    return said, seconds, lines.lines, bool(own_mappings())


@pytest.mark.parametrize("hangs", (True, False), ids=("hangs", "failed"))
def test_a_device_that_does_not_answer_holds_nothing(hangs: bool) -> None:
    with forked(2, _as_on_a_gpu, hangs) as ranks:
        ended = ranks.ended(0, 30)
        assert ended.kind == "ok", ended
        said, seconds, lines, mapped = ended.value
        assert seconds < TIMEOUT_S + 2.5
        assert sum(line.startswith("all-reduce summary: ONESHOT 1 call") for line in lines) == 1
        assert mapped == hangs, "memory is kept only where something may still run on it"
        if hangs:
            assert said == ""
            assert "cannot wait for cuda:0: not done after 2 s" in lines
            assert any("may still be running: its memory is kept" in line for line in lines)
        else:
            assert said == "CUDA error: unspecified launch failure"


def _dropped_before(context: RankContext) -> list[bool]:
    """Whether memory that was dropped in a capture is still there before another communicator is closed, and after."""
    group, entry_points = communicator(context), FakeEntryPoints(Truth())
    whole = Mapped()
    whole.driver = Driver(0, entry_points)
    memory = MappedMemory(whole, mock.Mock(device=torch.device("cuda", 0)), Transport.SYMMETRIC)
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
        del memory
    found = [any(entry_points.left().values())]
    with mock.patch.object(torch.cuda, "synchronize"):
        group.close()
    return [*found, any(entry_points.left().values())]


def test_a_close_lets_go_of_what_was_dropped_in_a_capture() -> None:
    with forked(2, _dropped_before) as ranks:
        assert [ranks.value(rank, 30) for rank in range(2)] == [[True, False]] * 2


def test_memory_is_let_go_of_where_cuda_cannot_say_whether_a_graph_is_captured() -> None:
    """In the thread that may capture, that is: of others it is not known, so that they leave it to the next close."""
    for in_a_thread in (False, True):
        entry_points, whole = FakeEntryPoints(Truth()), Mapped()
        whole.driver = Driver(0, entry_points)
        held = [MappedMemory(whole, mock.Mock(device=torch.device("cuda", 0)), Transport.SYMMETRIC)]
        fault = RuntimeError("CUDA error: unspecified launch failure")
        with (
            mock.patch.object(torch.cuda, "is_current_stream_capturing", side_effect=fault),
            mock.patch.object(torch.cuda, "synchronize", side_effect=fault),
        ):
            if in_a_thread:
                thread = threading.Thread(target=held.clear)
                thread.start()
                thread.join()
                assert any(entry_points.left().values())
                let_go_of_dropped()
            else:
                held.clear()
            assert not any(entry_points.left().values())


class Stock:
    """An engine's communicator, as far as its end matters."""

    ended = 0

    def destroy(self) -> None:
        self.ended += 1


def test_vllm_s_communicator_ends_without_garbage_collection() -> None:
    """What runs vLLM's own all-reduce for ours does not hold vLLM's communicator, which holds ours."""

    class Sums:
        device_group = cpu_group = None
        device = torch.device("cpu")

        def __init__(self, unique_name: str) -> None:
            self.unique_name = unique_name

        def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
            return input_.mul_(2)

    with (
        mock.patch("llm_allreduce_plugin.runtime.communicator.TensorParallelCommunicator") as ours,
        mock.patch("llm_allreduce_plugin.engines.common.fusion_ops.serve"),
    ):
        made = _communicator_class(Sums)(unique_name="tp:0", llm_allreduce_settings=None, llm_allreduce_name="")
    fallback = ours.call_args.kwargs["fallback"]
    mine = torch.ones(3)
    assert fallback(mine).tolist() == [2.0] * 3
    assert mine.tolist() == [1.0] * 3, "never written"
    gone = weakref.ref(made)
    gc.collect()
    gc.disable()
    try:
        del made
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="vLLM has destroyed this group"):
        fallback(mine)


@pytest.mark.parametrize("error", (None, PeerTimeoutError(0, 1, "ONESHOT", "gather", 60.0), OSError(5, "I/O error")))
def test_the_engines_own_end_comes_in_any_case(error: Exception | None, caplog: pytest.LogCaptureFixture) -> None:
    made = object.__new__(_communicator_class(Stock))
    made.llm_allreduce = mock.Mock(close=mock.Mock(side_effect=error))
    made.destroy()
    assert made.ended == 1
    assert made.llm_allreduce.close.call_count == 1
    assert ("the end was not clean; what failed is below" in caplog.text) == (error is not None)
