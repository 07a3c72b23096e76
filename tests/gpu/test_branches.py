"""Calls of one communicator on parallel branches of captured graphs: they must not overlap, and never wait for ever."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed
from tests.conftest import PoolFor
from tests.support import checks, norm_checks
from tests.support.local_group import LocalGroup
from tests.support.norm_group import Boundary, FusedCall, Shape, assert_same, poison, random_boundary
from tests.support.reference import assert_same_bits, fresh_seed, rank_input, rank_ordered_sum

pytestmark = pytest.mark.gpu(1)
Settings = dict[str, Any]
T = TypeVar("T")
SIZES = (8192 * 4, 1000, 1 << 20, 8)  # some take long, some hardly any time
ROWS = ((4, 8192), (1, 1000), (128, 8192), (1, 8))  # the same, normed
FEW_ROWS = ((4, 8192), (1, 1000), (16, 4096), (1, 8))  # all of them in band through host memory


def fork_and_join(reduce: Callable[[int], T], streams: list[torch.cuda.Stream]) -> list[T]:
    """Four calls: on the current stream, on one forked from it, on one forked from that, and on a third."""
    main = torch.cuda.current_stream()
    side, nested, third = streams
    results: dict[int, T] = {}
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


def captured(body: Callable[[list[torch.cuda.Stream]], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of ``body``, which has three streams for its branches."""
    graph = torch.cuda.CUDAGraph()
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.cuda.graph(graph, stream=stream):
        body(streams)
    return graph


def replay_on_every_rank(group: LocalGroup, graphs: list[torch.cuda.CUDAGraph]) -> None:
    """Each on the stream of its rank, between two moments at which the GPU has nothing to do."""
    torch.cuda.synchronize()
    for graph, stream in zip(graphs, group.streams, strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
    torch.cuda.synchronize()


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

        graphs = [captured(body, torch.cuda.Stream()) for _ in range(2)]
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

        def reduce(i: int, rank: int = rank) -> torch.Tensor:
            group.start(rank, algorithm, inputs[rank][i], outputs[rank][i], torch.cuda.current_stream())
            return outputs[rank][i]

        graphs.append(captured(functools.partial(fork_and_join, reduce), group.streams[rank]))
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
        replay_on_every_rank(group, graphs)
        for i in range(len(sizes)):
            for rank in range(world_size):
                assert_same_bits(outputs[rank][i], rank_ordered_sum(fresh[i]), f"turn {turn}, call {i}, rank {rank}")


# -- with a norm behind the sum ----------------------------------------------------------------------------------------


def _normed_branches(
    context: RankContext, strategy: str, shapes: tuple[tuple[int, int], ...], settings: Settings, name: str
) -> None:
    """The same of fused calls. ``name``: what they are counted as.

    Negated inputs and residuals have the negated residual and norm, exactly.
    """
    seed, device = context.shared_seed(), context.device
    world = range(context.world_size)
    cases: list[tuple[torch.Tensor, Boundary, Normed]] = []
    for number, (rows, hidden) in enumerate(shapes):
        parts = [rank_input(seed + number, rank, rows * hidden, torch.bfloat16).view(rows, hidden) for rank in world]
        boundary = random_boundary(seed + number, rows, hidden, torch.bfloat16)
        expected = Normed(
            *(None if part is None else part.to(device) for part in boundary.expected(rank_ordered_sum(parts)))
        )
        cases.append((parts[context.rank].to(device), boundary.on(device), expected))
    with norm_checks.wherever_it_can(), checks.communicator(context, strategy, **settings) as group:
        wrong = torch.zeros((), dtype=torch.int64, device=device)

        def call(number: int) -> Normed:
            mine, boundary, _ = cases[number]
            return norm_checks.run(group, mine, boundary)

        def count_wrong(output: Normed, right: Normed) -> None:
            for got, want in ((output.residual_out, right.residual_out), (output.norm_out, right.norm_out)):
                assert got is not None
                assert want is not None
                wrong.add_((got != want).sum())

        for number in range(len(cases)):
            call(number)
        torch.cuda.synchronize()

        def body(streams: list[torch.cuda.Stream]) -> None:
            for mine, boundary, expected in cases:
                for values in (mine, boundary.residual, expected.residual_out, expected.norm_out):
                    assert values is not None
                    values.mul_(-1)
            for output, (_, _, expected) in zip(fork_and_join(call, streams), cases, strict=True):
                count_wrong(output, expected)

        graphs = [captured(body, torch.cuda.Stream()) for _ in range(2)]
        for turn in range(1000):
            graphs[turn % 2].replay()
            if turn % 100 == 0:
                count_wrong(call(0), cases[0][2])
        torch.cuda.synchronize()
        assert int(wrong) == 0, f"{int(wrong)} wrong elements"
        assert group.report()["captured"] == {name: 8}
        context.gather(None)


@pytest.mark.gpu(2, per_rank=True)
@pytest.mark.parametrize(
    ("settings", "shapes", "ran"),
    (
        ({}, ROWS, "{} (fused norm)"),
        ({"fuse_norm": False}, ROWS, "{}, then norm"),
        ({"transport": "host"}, FEW_ROWS, "{} (fused norm)"),
    ),
    ids=("one kernel", "two kernels", "host"),
)
@pytest.mark.parametrize(("world_size", "strategy"), ((2, "ONESHOT"), (4, "TWOSHOT")))
def test_branches_of_graphs_with_norms(
    gpu_pool: PoolFor, world_size: int, strategy: str, settings: Settings, shapes: tuple[tuple[int, int], ...], ran: str
) -> None:
    if settings.get("transport") == "host":
        strategy = "ONESHOT"  # what has a norm in its kernel there
    gpu_pool(world_size).run(_normed_branches, strategy, shapes, settings, ran.format(strategy))


@pytest.mark.parametrize("algorithm", (Algorithm.ONE_SHOT, Algorithm.TWO_SHOT), ids=("one-shot", "two-shot"))
@pytest.mark.parametrize("world_size", (2, 4))
def test_branches_with_norms_of_ranks_on_one_gpu(world_size: int, algorithm: Algorithm) -> None:
    group = LocalGroup(world_size, lanes=8, workspace_mib=8)
    shapes = ((40, 512), (1, 1000), (3, 2880), (1, 8))
    boundaries = [random_boundary(number, rows, hidden, torch.bfloat16) for number, (rows, hidden) in enumerate(shapes)]
    likes = [torch.zeros(rows, hidden, dtype=torch.bfloat16, device=group.device) for rows, hidden in shapes]
    calls = [
        FusedCall(group, algorithm, _C.PUSH, Shape(4, -(-like.shape[1] // 256) * 32), like, boundary)  # a vector each
        for like, boundary in zip(likes, boundaries, strict=True)
    ]
    inputs = [[like.clone() for like in likes] for _ in range(world_size)]
    outputs = [[call.outputs(like) for call, like in zip(calls, likes, strict=True)] for _ in range(world_size)]
    graphs = []
    for rank in range(world_size):

        def start(i: int, rank: int = rank) -> None:
            calls[i].start(rank, inputs[rank][i], outputs[rank][i], torch.cuda.current_stream())

        graphs.append(captured(functools.partial(fork_and_join, start), group.streams[rank]))
    for turn in range(50):
        seed = fresh_seed()
        fresh = [
            [rank_input(seed + i, rank, rows * hidden, torch.bfloat16).view(rows, hidden) for rank in range(world_size)]
            for i, (rows, hidden) in enumerate(shapes)
        ]
        for rank in range(world_size):
            for i in range(len(shapes)):
                inputs[rank][i].copy_(fresh[i][rank])
                poison(outputs[rank][i])
        replay_on_every_rank(group, graphs)
        for i, boundary in enumerate(boundaries):
            expected = boundary.expected(rank_ordered_sum(fresh[i]))
            for rank in range(world_size):
                assert_same(outputs[rank][i], expected, f"turn {turn}, call {i}, rank {rank}, seed {seed}")
