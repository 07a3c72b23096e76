"""How a call is timed, and how its answer is judged. The same for every implementation that is compared."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.bench.ranks import RankContext
from llm_allreduce_plugin.config import WireFormat

CALLS, REPLAYS, WARMUP = 20, 15, 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call, the slowest rank's.

    Attributes:
        median: median over replays, then maximum over ranks.
        fastest: the same with the minimum over replays.
        output: what the last call returned, on this rank.
    """

    median: float
    fastest: float
    output: torch.Tensor | None


def _slowest(context: RankContext, samples: list[float], output: object) -> Timing:
    both = context.gather((statistics.median(samples), min(samples)))
    tensor = output if isinstance(output, torch.Tensor) else None
    return Timing(max(median for median, _ in both), max(fastest for _, fastest in both), tensor)


class CapturedCalls:
    """Calls of one implementation, one after another in one CUDA graph. Collective, like all it does.

    ``capturing``: what the implementation wants around a capture.
    """

    def __init__(
        self,
        context: RankContext,
        call: Callable[[], object],
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
        self._output: object = None
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

    def output(self) -> torch.Tensor | None:
        """What a replay computes into an output that was poisoned before."""
        output = self._output if isinstance(self._output, torch.Tensor) else None
        with torch.cuda.stream(self._stream):
            if output is not None:
                output.fill_(float("nan"))
            self._graph.replay()
        self._stream.synchronize()
        return None if output is None else output.clone()  # the graph owns the memory


def time_graph(
    context: RankContext,
    call: Callable[[], object],
    calls: int = CALLS,
    replays: int = REPLAYS,
    warmup: int = WARMUP,
    capturing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Timing:
    """``calls`` calls in one CUDA graph, replayed ``replays`` times; the output is that of one more replay."""
    captured = CapturedCalls(context, call, calls, warmup, capturing)
    samples = captured.samples(replays)
    return _slowest(context, samples, captured.output())


def time_eager(
    context: RankContext,
    call: Callable[[], object],
    calls: int = CALLS,
    replays: int = REPLAYS,
    warmup: int = WARMUP,
) -> Timing:
    """``calls`` calls from the host in a row, ``replays`` times: what a program without graphs sees."""
    output: object = None
    for _ in range(warmup):
        output = call()
    samples, output = eager_samples(context, call, calls, replays)
    return _slowest(context, samples, output)


def eager_samples(
    context: RankContext, call: Callable[[], object], calls: int, replays: int
) -> tuple[list[float], object]:
    """Microseconds per call of ``calls`` in a row, ``replays`` times, on this rank; and the last output."""
    samples = []
    on_gpu = context.device.type == "cuda"
    output: object = None
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


def make_input(seed: int, rank: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``rank``'s input: normal data that every rank can make for every rank. Kept as small as the message."""
    generator = torch.Generator(device).manual_seed(seed * 64 + rank)
    return torch.randn(count, generator=generator, device=device, dtype=torch.float32).to(dtype)


def rank_ordered_sum(seed: int, world_size: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What an exact all-reduce of :func:`make_input` gives: fp32, ranks in order, one rounding."""
    total = torch.zeros(count, dtype=torch.float32, device=device)
    for rank in range(world_size):
        total += make_input(seed, rank, count, dtype, device).float()
    return total.to(dtype)


def make_case(context: RankContext, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's input from a fresh seed, and what an exact all-reduce gives. Collective."""
    seed = context.shared_seed()
    mine = make_input(seed, context.rank, count, dtype, context.device)
    return mine, rank_ordered_sum(seed, context.world_size, count, dtype, context.device)


def call_of(plan: _C.Plan, mine: torch.Tensor, output: torch.Tensor) -> Callable[[], None]:
    """A call of ``plan`` on the current stream, to be timed."""

    def call() -> None:
        plan(mine.data_ptr(), output.data_ptr(), torch.cuda.current_stream().cuda_stream)

    return call


def wrong_elements(output: torch.Tensor, expected: torch.Tensor, *, exact: bool, world_size: int) -> int:
    """Elements that are not what they must be.

    Exact implementations must give the very bits. Others (another order of additions, a sum kept in 16 bits) may be
    off by what rounding each of the ``world_size`` additions may cost.
    """
    output, expected = output.reshape(-1), expected.reshape(-1)
    if exact:
        word = {2: torch.int16, 4: torch.int32}[output.element_size()]
        return int((output.view(word) != expected.view(word)).sum())
    allowed = world_size * torch.finfo(expected.dtype).eps * (expected.float().abs() + world_size**0.5)
    return int(((output.float() - expected.float()).abs() > allowed).sum()) + int(output.isnan().sum())


# What each wire format may be off by on normal data; docs/accuracy.md has what it is.
MOST_ERROR = {WireFormat.FP8: 0.05, WireFormat.TQ3: 1.0, WireFormat.HADAMARD2: 0.5}
# Times that for the ring and over domains, which encode sums more often: with 8 ranks they have 1.2 to 1.5 times the
# error of the two-shot, by the oracles in codecs/.
MORE_ERROR = 1.7


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of ``expected``; infinite when the output is not finite."""
    difference = float((output.float() - expected.float()).norm() / expected.float().norm())
    return difference if difference == difference else float("inf")  # noqa: PLR0124


def digest(output: torch.Tensor) -> int:
    """A number that differs, in all likelihood, when the bits of two outputs do."""
    word = {2: torch.int16, 4: torch.int32}[output.element_size()]
    words = output.reshape(-1).view(word).to(torch.int64)
    places = torch.arange(1, words.numel() + 1, device=output.device) * 0x9E3779B97F4A7C1
    return int((words * places).sum())
