"""Calls of one communicator on parallel branches of captured graphs: they must not overlap, and never wait for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.measure.ranks import RankContext
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.local_group import LocalGroup
from tests.support.reference import assert_same_bits, fresh_seed, rank_input, rank_ordered_sum

pytestmark = pytest.mark.gpu(1)
Settings = dict[str, Any]
SIZES = (8192 * 4, 1000, 1 << 20, 8)  # some take long, some hardly any time
Reduce = Callable[[int], torch.Tensor]


def fork_and_join(reduce: Reduce, streams: list[torch.cuda.Stream]) -> list[torch.Tensor]:
    """Four calls: on the current stream, on one forked from it, on one forked from that, and on a third."""
    main = torch.cuda.current_stream()
    side, nested, third = streams
    results: dict[int, torch.Tensor] = {}
    side.wait_stream(main)
    third.wait_stream(main)
    with torch.cuda.stream(side):
        results[1] = reduce(1)
        nested.wait_stream(side)
        with torch.cuda.stream(nested):
            results[2] = reduce(2)
    results[0] = reduce(0)
    with torch.cuda.stream(third):
        results[3] = reduce(3)
    side.wait_stream(nested)
    main.wait_stream(side)
    main.wait_stream(third)
    return [results[i] for i in range(4)]


def _branches(context: RankContext, strategy: str, replays: int, settings: Settings) -> None:
    """Two graphs with branches, replayed by turns with eager calls between, on data that changes on the device."""
    seed, device = context.shared_seed(), context.device
    inputs = [
        [rank_input(seed + i, r, size, torch.bfloat16) for r in range(context.world_size)]
        for i, size in enumerate(SIZES)
    ]
    with checks.communicator(context, strategy, **settings) as group:
        statics = [parts[context.rank].to(device) for parts in inputs]
        expected = [rank_ordered_sum(parts).to(device) for parts in inputs]
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for static in statics:
            group.all_reduce(static)
        torch.cuda.synchronize()

        def body(streams: list[torch.cuda.Stream]) -> None:
            for values in (*statics, *expected):  # negated inputs have the negated sum, exactly
                values.mul_(-1)
            outputs = fork_and_join(lambda i: group.all_reduce(statics[i]), streams)
            for output, right in zip(outputs, expected, strict=True):
                wrong.add_((output != right).sum())

        graphs = []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            streams = [torch.cuda.Stream() for _ in range(3)]
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                body(streams)
            graphs.append(graph)
        for turn in range(replays):
            graphs[turn % 2].replay()
            if turn % 1000 == 0:
                wrong.add_((group.all_reduce(statics[0]) != expected[0]).sum())
        torch.cuda.synchronize()
        assert int(wrong) == 0, f"{int(wrong)} wrong elements in {replays} replays"
        assert group.report()["captured"] == {strategy: 8}
        context.gather(None)


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    "settings", ({}, {"in_band": False}, {"transport": "host"}), ids=("in_band", "flagged", "host")
)
@pytest.mark.parametrize("strategy", ("ONESHOT", "TWOSHOT"))
def test_branches_of_two_graphs_replayed_10000_times(gpu_pool: PoolFor, strategy: str, settings: Settings) -> None:
    gpu_pool(2).run(_branches, strategy, 10_000 if settings.get("transport") != "host" else 1000, settings)


@pytest.mark.parametrize("kind", ({}, {"in_band": False}, {"host": True}), ids=("in_band", "flagged", "host"))
@pytest.mark.parametrize("algorithm", ("ONESHOT", "TWOSHOT"))
@pytest.mark.parametrize("world_size", (2, 4))
def test_branches_of_ranks_on_one_gpu(world_size: int, algorithm: str, kind: dict[str, bool]) -> None:
    group = LocalGroup(world_size, **kind)  # type: ignore[arg-type]
    sizes = (5003, 1000, 40_000, 8)
    inputs = [[torch.zeros(size, device=group.device) for size in sizes] for _ in range(world_size)]
    outputs = [[torch.zeros(size, device=group.device) for size in sizes] for _ in range(world_size)]
    graphs = []
    for rank in range(world_size):
        graph = torch.cuda.CUDAGraph()
        streams = [torch.cuda.Stream() for _ in range(3)]

        def reduce(i: int, rank: int = rank) -> torch.Tensor:
            group.start(rank, algorithm, inputs[rank][i], outputs[rank][i], torch.cuda.current_stream())
            return outputs[rank][i]

        with torch.cuda.graph(graph, stream=group.streams[rank]):
            fork_and_join(reduce, streams)
        graphs.append(graph)
    for turn in range(50):
        seed = fresh_seed()
        fresh = [
            [rank_input(seed + i, rank, size, torch.float32) for rank in range(world_size)]
            for i, size in enumerate(sizes)
        ]
        for rank in range(world_size):
            for i in range(len(sizes)):
                inputs[rank][i].copy_(fresh[i][rank])
                outputs[rank][i].fill_(float("nan"))
        torch.cuda.synchronize()
        for rank in range(world_size):
            with torch.cuda.stream(group.streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        for i in range(len(sizes)):
            for rank in range(world_size):
                assert_same_bits(outputs[rank][i], rank_ordered_sum(fresh[i]), f"turn {turn}, call {i}, rank {rank}")
