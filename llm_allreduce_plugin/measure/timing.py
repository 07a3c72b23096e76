"""How a call is timed: the same for every implementation that is compared."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.measure.ranks import RankContext

CALLS, REPLAYS, WARMUP = 20, 15, 3
_POISON_BYTE = 0x5A

# What a call returns: a tensor, a named tuple of tensors, or nothing.
_Output = TypeVar("_Output")


@dataclasses.dataclass(frozen=True)
class Timing(Generic[_Output]):
    """Microseconds per call, the slowest rank's.

    Attributes:
        median: median over replays, then maximum over ranks.
        fastest: the same with the minimum over replays.
        output: what the last call returned, on this rank.
    """

    median: float
    fastest: float
    output: _Output | None


def _slowest(context: RankContext, samples: list[float], output: _Output | None) -> Timing[_Output]:
    both = context.gather((statistics.median(samples), min(samples)))
    return Timing(max(median for median, _ in both), max(fastest for _, fastest in both), output)


def _poison(output: object) -> None:
    """Fill with what no call computes."""
    if isinstance(output, tuple):
        for part in output:
            _poison(part)
    elif isinstance(output, torch.Tensor):
        if output.element_size() == 1:
            output.view(torch.uint8).fill_(_POISON_BYTE)
        else:
            output.fill_(float("nan") if output.is_floating_point() else _POISON_BYTE)


def _copy(output: Any) -> Any:  # noqa: ANN401
    """Of what a graph owns, in memory of its own."""
    if isinstance(output, tuple):
        return type(output)(*map(_copy, output))
    return output.clone() if isinstance(output, torch.Tensor) else output


class CapturedCalls(Generic[_Output]):
    """Calls of one implementation, one after another in one CUDA graph. Collective, like all it does.

    ``capturing``: what the implementation wants around a capture.
    """

    def __init__(
        self,
        context: RankContext,
        call: Callable[[], _Output],
        calls: int = CALLS,
        warmup: int = WARMUP,
        capturing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._context = context
        self._calls = calls
        self._stream = torch.cuda.Stream(context.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(context.device))
        with torch.cuda.stream(self._stream):
            for _ in range(warmup):
                call()
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._output: _Output | None = None
        with capturing(), torch.cuda.graph(self._graph, stream=self._stream):
            for _ in range(calls):
                self._output = call()

    def samples(self, replays: int) -> list[float]:
        """Microseconds per call in each of so many replays, on this rank.

        The replays are queued without a pause. A rank's clock starts when its previous replay ends, so what is measured
        is the all-reduce; waiting for another host thread to start the first replay (tens of microseconds, which over
        20 calls would add one to each) falls into replays that are not counted.
        """
        ticks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
        dist.barrier(group=self._context.control_group)
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            self._graph.replay()
            ticks[0].record()
            for tick in ticks[1:]:
                self._graph.replay()
                tick.record()
        self._stream.synchronize()
        return [start.elapsed_time(end) * 1000 / self._calls for start, end in itertools.pairwise(ticks)]

    def output(self) -> _Output | None:
        """What a replay computes into an output that was poisoned before."""
        with torch.cuda.stream(self._stream):
            _poison(self._output)
            self._graph.replay()
        self._stream.synchronize()
        return cast("_Output | None", _copy(self._output))


def time_graph(
    context: RankContext,
    call: Callable[[], _Output],
    calls: int = CALLS,
    replays: int = REPLAYS,
    warmup: int = WARMUP,
    capturing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Timing[_Output]:
    """``calls`` calls in one CUDA graph, replayed ``replays`` times; the output is that of one more replay."""
    captured = CapturedCalls(context, call, calls, warmup, capturing)
    samples = captured.samples(replays)
    return _slowest(context, samples, captured.output())


def time_eager(
    context: RankContext,
    call: Callable[[], _Output],
    calls: int = CALLS,
    replays: int = REPLAYS,
    warmup: int = WARMUP,
) -> Timing[_Output]:
    """``calls`` calls from the host in a row, ``replays`` times: what a program without graphs sees."""
    for _ in range(warmup):
        call()
    samples, output = eager_samples(context, call, calls, replays)
    return _slowest(context, samples, output)


def eager_samples(
    context: RankContext, call: Callable[[], _Output], calls: int, replays: int
) -> tuple[list[float], _Output | None]:
    """Microseconds per call of ``calls`` in a row, ``replays`` times, on this rank; and the last output."""
    samples = []
    on_gpu = context.device.type == "cuda"
    output: _Output | None = None
    for _ in range(replays):
        if on_gpu:
            torch.cuda.synchronize(context.device)
        dist.barrier(group=context.control_group)
        start = time.perf_counter()
        for _ in range(calls):
            output = call()
        if on_gpu:
            torch.cuda.synchronize(context.device)
        samples.append((time.perf_counter() - start) * 1e6 / calls)
    return samples, output


def call_of(plan: _C.Plan, mine: torch.Tensor, output: torch.Tensor) -> Callable[[], None]:
    """A call of ``plan`` on the current stream, to be timed."""

    def call() -> None:
        plan(mine.data_ptr(), output.data_ptr(), torch.cuda.current_stream().cuda_stream)

    return call
