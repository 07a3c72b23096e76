"""How a call is timed, and how its answer is judged. The same for every implementation that is compared."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from llm_allreduce_plugin.bench.ranks import RankContext

CALLS, REPLAYS = 20, 15


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call, the slowest rank's.

    Attributes:
        median: median over replays, then maximum over ranks.
        fastest: the same with the minimum over replays.
    """

    median: float
    fastest: float


def _slowest(context: RankContext, samples: list[float]) -> Timing:
    both = context.gather((statistics.median(samples), min(samples)))
    return Timing(max(median for median, _ in both), max(fastest for _, fastest in both))


def time_graph(
    context: RankContext, call: Callable[[], object], calls: int = CALLS, replays: int = REPLAYS
) -> Timing:
    """``calls`` calls in one CUDA graph, replayed ``replays`` times.

    The replays are queued without a pause. A rank's clock starts when its previous replay ends, so what is measured is
    the all-reduce; waiting for another host thread to start the first replay (tens of microseconds, which over 20 calls
    would add one to each) falls into one extra replay that is not counted.
    """
    stream = torch.cuda.Stream(context.device)
    stream.wait_stream(torch.cuda.current_stream(context.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    ticks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    dist.barrier(group=context.control_group)
    with torch.cuda.stream(stream):
        graph.replay()
        graph.replay()
        ticks[0].record()
        for tick in ticks[1:]:
            graph.replay()
            tick.record()
    stream.synchronize()
    samples = [start.elapsed_time(end) * 1000 / calls for start, end in zip(ticks, ticks[1:], strict=False)]
    return _slowest(context, samples)


def time_eager(
    context: RankContext, call: Callable[[], object], calls: int = CALLS, replays: int = REPLAYS
) -> Timing:
    """``calls`` calls from the host in a row, ``replays`` times: what a program without graphs sees."""
    samples = []
    on_gpu = context.device.type == "cuda"
    for _ in range(3):
        call()
    for _ in range(replays):
        if on_gpu:
            torch.cuda.synchronize(context.device)
        dist.barrier(group=context.control_group)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize(context.device)
        samples.append((time.perf_counter() - start) * 1e6 / calls)
    return _slowest(context, samples)


def make_input(seed: int, rank: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``rank``'s input: normal data that every rank can make for every rank. Kept as small as the message."""
    generator = torch.Generator(device).manual_seed(seed * 64 + rank)
    return torch.randn(count, generator=generator, device=device, dtype=torch.float32).to(dtype)


def rank_ordered_sum(
    seed: int, world_size: int, count: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What an exact all-reduce of :func:`make_input` gives: fp32, ranks in order, one rounding."""
    total = torch.zeros(count, dtype=torch.float32, device=device)
    for rank in range(world_size):
        total += make_input(seed, rank, count, dtype, device).float()
    return total.to(dtype)


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
