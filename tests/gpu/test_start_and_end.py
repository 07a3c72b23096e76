"""Start and end of groups on GPUs in which something is wrong: nobody hangs, and all hear the same reason."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig, PeerTimeoutError, TensorParallelCommunicator
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.forked import own_mappings

pytestmark = pytest.mark.gpu(2)

TRANSPORTS = pytest.mark.parametrize("transport", ("peer", "host"))


def _fill(device: torch.device) -> list[torch.Tensor]:
    """Take all memory of a GPU."""
    taken = []
    size = 1 << 30
    while size >= 1 << 20:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            size //= 2
    return taken


def _start_without_memory(context: RankContext, transport: str) -> tuple[str, str, list[str], float]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("llm_allreduce_plugin")
    logger.addHandler(handler)
    context.communicator("ONESHOT").close()  # contexts, kernels and torch's own are there
    taken = _fill(context.device) if context.rank == 1 else []
    context.gather(None)
    began = time.monotonic()
    try:
        with checks.communicator(context, "AUTO", transport=transport, start_timeout_s=60.0) as group:
            seconds = time.monotonic() - began
            context.gather(None)
            taken.clear()
            torch.cuda.empty_cache()
            ones = torch.ones(1000, device=context.device)
            assert torch.equal(group.all_reduce(ones), ones * context.world_size)
            return str(group.facts.transport), group.facts.no_transport_reason, lines, seconds
    finally:
        logger.removeHandler(handler)


def _how_mapped(context: RankContext) -> str:
    with checks.communicator(context, "AUTO", transport="peer") as group:
        checks.check_at_rest(context, group)
        return type(group._held.memory).__name__


def test_ranks_map_memory_by_files(gpu_pool: PoolFor) -> None:
    """And not by torch's symmetric memory, which is left for where ranks cannot send each other files."""
    assert gpu_pool(2).run(_how_mapped) == ["PeerMemory"] * 2


@pytest.mark.parametrize("transport", ("auto", "peer"))
def test_one_rank_without_memory_holds_nobody(gpu_pool: PoolFor, transport: str) -> None:
    answers = gpu_pool(2).run(_start_without_memory, transport)
    assert len({(used, reason) for used, reason, _, _ in answers}) == 1, "all ranks alike"
    for used, reason, lines, seconds in answers:
        assert seconds < 60
        why = reason if used == "none" else " ".join(lines + answers[0][2])
        assert "rank 1 cannot allocate" in why
        assert "out of memory" in why.lower().replace("_", " ")  # torch's words, or the driver's
        assert used in ({"none"} if transport == "peer" else {"host", "none"})


def _end_after_an_expired_wait(context: RankContext, transport: str) -> tuple[str, float, list[str], bool, bool]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("llm_allreduce_plugin")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    settings: dict[str, Any] = {"timeout_s": 3.0, "first_timeout_s": 3.0, "transport": transport}
    config = AllReduceConfig(allreduce_strategy="ONESHOT", **settings)  # type: ignore[arg-type]
    made = TensorParallelCommunicator(context.group, context.device, config, control_group=context.control_group)
    mine = torch.ones(4096, dtype=torch.bfloat16, device=context.device)
    made.all_reduce(mine)
    torch.cuda.synchronize()
    if context.rank == 1:
        time.sleep(8)  # its memory must outlive the other's wait
        began = time.monotonic()
        with contextlib.suppress(PeerTimeoutError):
            made.close()
        return "", time.monotonic() - began, lines, False, False
    made.all_reduce(mine)
    monitor = made._held.monitor
    assert monitor is not None
    began, said = time.monotonic(), ""
    try:
        made.close()
    except PeerTimeoutError as error:
        said = str(error)
    seconds = time.monotonic() - began
    made.close()
    return said, seconds, lines, monitor._thread.is_alive(), bool(own_mappings())


@TRANSPORTS
def test_the_end_after_an_expired_wait(transport: str) -> None:
    pool = RankPool(2, "cuda")
    try:
        waited, left = pool.run(_end_after_an_expired_wait, transport)
    finally:
        pool.kill()  # its CUDA context is gone
    said, seconds, lines, monitor_lives, mapped = waited
    assert said.startswith("rank 0 waited 3"), said
    assert "for rank 1 in ONESHOT/gather" in said
    assert seconds < 3 + 12, "the driver takes seconds to end a context"
    assert sum(line.startswith("all-reduce summary: ONESHOT 2 calls") for line in lines) == 1
    assert any(line.startswith("all-reduce failed: rank 0 waited 3") for line in lines), "the monitor lived long enough"
    assert not monitor_lives
    assert not mapped, "host memory is let go"
    assert left[1] < 3 + 5


def _compare(context: RankContext) -> str:
    from llm_allreduce_plugin import RankMismatchError

    with checks.communicator(context, "AUTO", check_calls=True) as group:
        for count in (10, 1 << 20):
            ones = torch.ones(count, device=context.device)
            assert torch.equal(group.all_reduce(ones), ones * context.world_size)
        mine = torch.ones(100 * (1 + context.rank), device=context.device)
        with pytest.raises(RankMismatchError) as caught:
            group.all_reduce(mine)
        assert float(group.all_reduce(torch.ones(1, device=context.device))) == context.world_size
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        static = torch.ones(1000, device=context.device)
        with torch.cuda.graph(graph, stream=stream):
            output = group.all_reduce(static)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, static * context.world_size)
        return str(caught.value)


def test_calls_are_compared_where_that_is_asked_for(gpu_pool: PoolFor) -> None:
    for text in gpu_pool(2).run(_compare):
        assert text.startswith("call 3: rank 0 passes 100 float32, rank 1 200 float32. ")
