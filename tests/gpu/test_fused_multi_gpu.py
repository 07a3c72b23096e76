"""all_reduce_residual_rms_norm on GPUs of their own, one process each: the oracle's bits, eager and in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed
from tests.conftest import PoolFor
from tests.support import norm_checks
from tests.support.checks import check_at_rest, communicator
from tests.support.norm_group import assert_same, every_quant, poison, random_boundary
from tests.support.reference import rank_input, rank_ordered_sum

pytestmark = pytest.mark.gpu(2, per_rank=True)

WORLD_SIZES = (2, 3, 4)
Settings = dict[str, Any]
FUSED, UNFUSED = "MINLATENCY (fused norm)", "MINLATENCY, then norm"
# Clusters, blocks, two of them to a row, lanes with one task each.
SHAPES = (
    (1, 8), (0, 64), (1, 8192), (4, 8192), (5, 8192), (3, 2880), (64, 5120), (33, 7168), (1, 16384), (40, 16384),
    (130, 8192), (600, 4096), (1024, 8192), (4096, 512),
)  # fmt: skip


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_kernel_and_two_give_the_same_bits(gpu_pool: PoolFor, world_size: int) -> None:
    pool = gpu_pool(world_size)
    for dtype in (torch.bfloat16, torch.float16):
        digests = [
            pool.run(norm_checks.check_shapes, "MINLATENCY", dtype, SHAPES, settings, name)[0]
            for settings, name in (
                ({}, FUSED),
                ({"workspace_bytes": 8 << 20}, FUSED),  # in rounds
                ({"fuse_norm": False}, UNFUSED),
                ({"in_band": False}, UNFUSED),
            )
        ]
        assert digests == [digests[0]] * len(digests)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_through_host_memory(gpu_pool: PoolFor, world_size: int) -> None:
    settings = {"transport": "host"}
    small, large = ((1, 8), (1, 8192), (3, 2880), (2, 4096)), ((1, 16384), (256, 8192))
    pool = gpu_pool(world_size)
    pool.run(norm_checks.check_shapes, "ONESHOT", torch.bfloat16, small, settings, "ONESHOT (fused norm)")
    pool.run(norm_checks.check_shapes, "ONESHOT", torch.bfloat16, large, settings, "ONESHOT, then norm")


@pytest.mark.parametrize("settings", ({}, {"fuse_norm": False}, {"allreduce": "NCCL"}), ids=str)
def test_other_forms(gpu_pool: PoolFor, settings: Settings) -> None:
    pool = gpu_pool(2)
    strategy = settings.pop("allreduce", "MINLATENCY")
    if strategy == "NCCL":  # of two ranks in fp32, which is rounded once whoever adds
        pool.run(norm_checks.check_shapes, strategy, torch.float32, SHAPES, settings, "NCCL, then norm")
        return
    pool.run(norm_checks.check_specials, strategy, torch.bfloat16, settings)
    pool.run(norm_checks.check_batches, 8192, settings)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pool.run(norm_checks.check_views, dtype, settings)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_row_is_the_same_in_every_batch(gpu_pool: PoolFor, world_size: int) -> None:
    """Over more than two GPUs small batches take one kernel, larger ones two, and the largest one again."""
    gpu_pool(world_size).run(norm_checks.check_batches, 8192, {})


def _in_graphs(context: RankContext, settings: Settings) -> None:
    """Calls of several shapes in one graph, replayed with eager calls between, outputs poisoned before."""
    with norm_checks.wherever_it_can(), communicator(context, "MINLATENCY", **settings) as group:
        cases = []
        for number, (rows, hidden) in enumerate(((1, 8192), (7, 4096), (256, 8192), (16, 16384))):
            quants = every_quant(hidden)
            boundary = random_boundary(number, rows, hidden, torch.bfloat16, quants[number])
            inputs = [
                rank_input(number, rank, rows * hidden, torch.bfloat16).view(rows, hidden)
                for rank in range(context.world_size)
            ]
            expected = boundary.expected(rank_ordered_sum(inputs))
            cases.append((inputs[context.rank].to(context.device), boundary.on(context.device), expected, inputs))
        for mine, boundary, _, _ in cases:
            norm_checks.run(group, mine, boundary)
        torch.cuda.synchronize(context.device)
        graph, outputs = torch.cuda.CUDAGraph(), list[Normed]()
        with torch.cuda.graph(graph):
            outputs += [norm_checks.run(group, mine, boundary) for mine, boundary, _, _ in cases]
        for replay in range(3):
            for output in outputs:
                poison(output)
            graph.replay()
            torch.cuda.synchronize(context.device)
            for number, output in enumerate(outputs):
                assert_same(output, cases[number][2], f"{settings}: replay {replay}, call {number}")
            mine, boundary, expected, _ = cases[replay]
            assert_same(norm_checks.run(group, mine, boundary), expected, f"{settings}: eager after replay {replay}")
        report = group.report()
        assert sum(report["captured"].values()) == len(cases)
        check_at_rest(context, group)


@pytest.mark.parametrize("settings", ({}, {"fuse_norm": False}, {"transport": "host"}), ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_in_graphs(gpu_pool: PoolFor, world_size: int, settings: Settings) -> None:
    gpu_pool(world_size).run(_in_graphs, settings)
