"""LOWPRECISION on GPUs of their own through the communicator, against the oracle; host memory when a rank is killed."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.ranks import RankContext, RankPool
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.low_precision import expected_sum
from tests.support.reference import assert_same_bits, digest, rank_input
from tests.support.rows import HIDDEN, check_rows, rows_of

pytestmark = pytest.mark.gpu(2, per_rank=True)

SIZES = (1, 497, 40_000, 300_001, 3_000_001)
TRANSPORTS = ("peer", "host")
BATCHES = (1, 2, 3, 7, 16, 33, 64, 129, 257, 515, 1031, 2048, 4096)


def _check(context: RankContext, wire: WireFormat, dtype: torch.dtype, transport: str) -> None:
    """Eager calls of every size, then replays of a graph on new data."""
    settings = {"low_precision": {"wire_format": wire, "min_bytes": 0}, "transport": transport}
    with checks.communicator(context, "LOWPRECISION", **settings) as group:

        def expected(inputs: list[torch.Tensor]) -> torch.Tensor:
            launch = group.explain(inputs[0].shape, dtype).launch
            assert launch is not None
            return expected_sum(launch, inputs)

        def inputs_of(size: int) -> list[torch.Tensor]:
            seed = context.shared_seed()
            return [rank_input(seed, rank, size, dtype) for rank in range(context.world_size)]

        digests = []
        for size in SIZES:
            inputs = inputs_of(size)
            mine = inputs[context.rank].to(context.device)
            with checks.poisoned_outputs():
                output = group.all_reduce(mine)
            assert_same_bits(output, expected(inputs), f"{wire} {dtype} x {size} through {transport}")
            assert torch.equal(mine.cpu(), inputs[context.rank]), "the input was written"
            digests.append(digest(output))
        assert group.report()["calls"] == {"LOWPRECISION": len(SIZES)}

        size = 300_001
        static = torch.zeros(size, dtype=dtype, device=context.device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            output = group.all_reduce(static)
        for _ in range(5):
            inputs = inputs_of(size)
            static.copy_(inputs[context.rank])
            output.fill_(float("nan"))
            graph.replay()
            assert_same_bits(output, expected(inputs), f"{wire} {dtype} replayed through {transport}")
            digests.append(digest(output))
        everyone = context.gather(digests)
        assert all(other == everyone[0] for other in everyone), "ranks differ"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("wire", list(WireFormat), ids=str)
@pytest.mark.parametrize("world_size", (2, 4))
def test_the_oracle_s_bits(gpu_pool: PoolFor, world_size: int, wire: WireFormat, transport: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        gpu_pool(world_size).run(_check, wire, dtype, transport)


def _rows(context: RankContext, hidden: int, transport: str) -> None:
    """Eager, and replayed from a graph of another batch."""
    settings = {"low_precision": {"wire_format": WireFormat.FP8_GROUP}, "transport": transport}
    seed = context.shared_seed()
    mine = rows_of(seed, context.rank, hidden).to(context.device)
    with checks.communicator(context, "LOWPRECISION", **settings) as group:

        def all_reduce(index: torch.Tensor) -> torch.Tensor:
            return group.all_reduce(mine[index.to(context.device)])

        what = f"{hidden} wide, {context.world_size} ranks, through {transport}"
        check_rows(all_reduce, BATCHES, seed, what)
        assert set(group.report()["calls"]) == {"LOWPRECISION"}

        graphs = {}
        for tokens in (1, 5, 64, 700):
            static = torch.zeros(tokens, hidden, dtype=mine.dtype, device=context.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                output = group.all_reduce(static)
            graphs[tokens] = (graph, static, output)

        def replay(index: torch.Tensor) -> torch.Tensor:
            graph, static, output = graphs[len(index)]
            static.copy_(mine[index.to(context.device)])
            output.fill_(float("nan"))
            graph.replay()
            return output.clone()

        check_rows(replay, (5, 64, 700), seed, f"{what}, replayed")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_a_row_s_answer_does_not_depend_on_its_batch(
    gpu_pool: PoolFor, world_size: int, hidden: int, transport: str
) -> None:
    """By fp8_group, in batches of 1 to 4096 tokens."""
    gpu_pool(world_size).run(_rows, hidden, transport)


def _reduce_for_ever(context: RankContext) -> None:
    made = context.communicator("ONESHOT", transport="host", timeout_s=3.0)
    mine = torch.ones(1000, device=context.device)
    try:
        while True:
            made.all_reduce(mine)
            torch.cuda.synchronize()
    except RuntimeError:
        made.check()  # the named error, if that is what broke the context
        raise


def test_a_killed_rank_leaves_no_shared_memory_and_no_process() -> None:
    before = set(os.listdir("/dev/shm"))
    pool = RankPool(2, "cuda")
    try:
        for pipe in pool._pipes:
            pipe.send((_reduce_for_ever, ()))
        time.sleep(15)
        pool.processes[1].kill()
        assert pool._pipes[0].poll(3.0 + 10.0), "rank 0 still waits"
        answer: tuple[str, Any] = pool._pipes[0].recv()
    finally:
        pool.kill()
    assert answer[0] != "ok"
    assert "rank 0 waited 3 s for rank 1 in ONESHOT/gather" in str(answer[1]), answer
    for process in pool.processes:
        process.join(20)
    assert not any(process.is_alive() for process in pool.processes)
    left = {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("cuda.shm")}
    assert left == set(), left
