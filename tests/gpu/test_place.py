"""UB on GPUs: results that peers store into registered outputs, with the bits of TWOSHOT, eager and in graphs."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin.algorithms import measured
from llm_allreduce_plugin.algorithms.decision import Exchange
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.local_group import LocalGroup
from tests.support.local_machine import OneGpu, TwoGpus, peer_obstacle
from tests.support.reference import (
    DTYPES,
    assert_same_bits,
    fresh_seed,
    poison,
    rank_input,
    rank_ordered_sum,
    special_inputs,
)

pytestmark = pytest.mark.gpu(1)
MIB = 1 << 20
KINDS: dict[str, dict[str, Any]] = {
    "one form": {"workspace_mib": 8},
    "rounds": {"workspace_mib": 0.5},
    "split": {"split": (1, 0), "lanes": 4, "workspace_mib": 4},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_ranks_on_one_gpu(world_size: int, kind: dict[str, Any]) -> None:
    group = LocalGroup(world_size, **kind)
    for turn, size in enumerate((1, 7, 8, 1023, 40_000, 40_001, 300_000)):
        for algorithm in ("PLACE", "TWOSHOT", "PLACE"):
            dtype, seed = DTYPES[turn % 3], fresh_seed()
            inputs = [rank_input(seed, rank, size, dtype) for rank in range(world_size)]
            expected = rank_ordered_sum(inputs)
            for rank, output in enumerate(group.all_reduce(algorithm, inputs)):
                assert_same_bits(output.cpu(), expected, f"{algorithm} {dtype} x {size}, {seed=}, rank {rank}")
    for dtype in DTYPES:
        inputs = special_inputs(world_size, dtype)
        for output in group.all_reduce("PLACE", inputs):
            assert_same_bits(output.cpu(), rank_ordered_sum(inputs), f"special values, {dtype}")


@pytest.mark.parametrize("gpus", (pytest.param(1, id="one GPU"), pytest.param(2, id="two", marks=pytest.mark.gpu(2))))
@pytest.mark.parametrize("kind", (KINDS["one form"], KINDS["rounds"]), ids=("one round", "rounds"))
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_inputs_read_in_place(world_size: int, kind: dict[str, Any], gpus: int) -> None:
    if gpus == 2 and (reason := peer_obstacle()) is not None:
        pytest.skip(reason)
    group = LocalGroup(world_size, machine=TwoGpus() if gpus == 2 else OneGpu(), **kind)
    for turn, size in enumerate((8, 1024, 40_000, 300_000)):
        for algorithm in ("PULLED PLACE", "PLACE", "PULLED PLACE"):
            dtype, seed = DTYPES[turn % 3], fresh_seed()
            inputs = [rank_input(seed, rank, size, dtype) for rank in range(world_size)]
            expected = rank_ordered_sum(inputs)
            for rank, output in enumerate(group.all_reduce(algorithm, inputs)):
                assert_same_bits(output.cpu(), expected, f"{algorithm} {dtype} x {size}, {seed=}, rank {rank}")


@pytest.mark.parametrize("gpus", (pytest.param(1, id="one GPU"), pytest.param(2, id="two", marks=pytest.mark.gpu(2))))
def test_inputs_read_in_place_are_overwritten_behind_the_call(gpus: int) -> None:
    """Each call's input is what the kernel before has written, and the kernel behind writes it again."""
    if gpus == 2 and (reason := peer_obstacle()) is not None:
        pytest.skip(reason)
    world_size, size, calls = 2, 1 << 18, 8
    group = LocalGroup(world_size, machine=TwoGpus() if gpus == 2 else OneGpu(), workspace_mib=32)
    for turn in range(5):
        inputs = [rank_input(turn, rank, size, torch.float32) for rank in range(world_size)]
        moved = [part.to(group.device_of(rank)) for rank, part in enumerate(inputs)]
        outputs = [[poison(torch.empty_like(part)) for part in moved] for _ in range(calls)]
        group.machine.synchronize()
        for call in range(calls):
            for rank in range(world_size):
                group.start_place(rank, moved[rank], outputs[call], inputs=moved)
                group.start(rank, "ONESHOT", outputs[call][rank], moved[rank])
        group.finish()
        expected = rank_ordered_sum(inputs)
        for call in range(calls):
            for rank in range(world_size):
                assert_same_bits(outputs[call][rank].cpu(), expected, f"turn {turn}, call {call}, rank {rank}")
            expected = rank_ordered_sum([rank_ordered_sum([expected] * world_size)] * world_size)


def test_an_output_that_is_still_read() -> None:
    """A slow kernel of one rank reads its output; peers may not store into it before that has ended."""
    world_size, size = 2, 1 << 20
    group = LocalGroup(world_size, workspace_mib=32)
    outputs = [torch.zeros(size, dtype=torch.float32, device=group.device) for _ in range(world_size)]
    for turn in range(5):
        inputs = [rank_input(turn, rank, size, torch.float32) for rank in range(world_size)]
        moved = [part.to(group.device) for part in inputs]
        before = [output.clone() for output in outputs]
        read = [torch.empty_like(output) for output in outputs]
        torch.cuda.synchronize()
        for rank in range(world_size):
            with torch.cuda.stream(group.streams[rank]):
                if rank == turn % world_size:
                    torch.cuda._sleep(20_000_000)  # some 10 ms
                read[rank].copy_(outputs[rank])
            group.start_place(rank, moved[rank], outputs)
        torch.cuda.synchronize()
        for rank in range(world_size):
            assert_same_bits(read[rank].cpu(), before[rank].cpu(), f"turn {turn}, rank {rank}: what came too early")
            assert_same_bits(outputs[rank].cpu(), rank_ordered_sum(inputs), f"turn {turn}, rank {rank}")


def _over_two_gpus_too() -> AbstractContextManager[object]:
    """Results are stored into outputs also where one step is faster."""
    return mock.patch.object(measured, "PLACE_PAYS_FROM", {72: 4 * MIB})


def _large(context: RankContext) -> None:
    generator = random.Random(context.shared_seed())
    with _over_two_gpus_too(), checks.communicator(context, "UB", registered_pool="1GiB") as group:
        pool = group.registered_empty((192 * MIB,), torch.uint8)
        for size in (4 * MIB, 4 * MIB + 2, 16 * MIB, 16 * MIB + 48, 64 * MIB, 140 * MIB):
            dtype = generator.choice(DTYPES) if size % 4 == 0 else torch.bfloat16
            count = size // dtype.itemsize
            launch = group.explain((count,), dtype).launch
            assert launch is not None
            assert launch.exchange is Exchange.PLACE
            out = poison(pool[: count * dtype.itemsize].view(dtype))
            for _ in range(3 if size < 64 * MIB else 1):
                seed = context.shared_seed()
                inputs = [rank_input(seed, rank, count, dtype) for rank in range(context.world_size)]
                mine = inputs[context.rank].to(context.device)
                assert group.all_reduce(mine, out) is out
                assert_same_bits(out.cpu(), rank_ordered_sum(inputs), f"{dtype} x {count}, {seed=}")
                assert_same_bits(group.call_of("TWOSHOT", count, dtype)(mine).cpu(), out.cpu(), "TWOSHOT")
                kept = group.all_reduce(mine)  # of the same memory, at a place of its own
                assert_same_bits(kept.cpu(), out.cpu(), "an output of the communicator's")
                # A tensor that starts anywhere.
                whole = torch.zeros(count + 1, dtype=dtype, device=context.device)
                whole[1:].copy_(mine)
                assert_same_bits(group.all_reduce(whole[1:], poison(out)).cpu(), rank_ordered_sum(inputs), "unaligned")
        small = group.all_reduce(torch.ones(8, device=context.device), pool[:32].view(torch.float32))
        assert small.tolist() == [context.world_size] * 8


def _in_one_step(context: RankContext) -> None:
    """As UB is over two GPUs by default: outputs of its own and of the caller's, of any size."""
    with checks.communicator(context, "UB") as group:
        for count in (8, 2 * MIB, 8 * MIB + 1):
            seed = context.shared_seed()
            inputs = [rank_input(seed, rank, count, torch.bfloat16) for rank in range(context.world_size)]
            mine, expected = inputs[context.rank].to(context.device), rank_ordered_sum(inputs)
            out = poison(group.registered_empty((count,), torch.bfloat16))
            assert group.all_reduce(mine, out) is out
            assert_same_bits(out.cpu(), expected, f"{count}, {seed=}")
            assert_same_bits(group.all_reduce(mine).cpu(), expected, f"{count}, {seed=}")
        assert set(group.report()["calls"]) == {"ONESHOT"}
        assert group.report()["fallbacks"] == {}


def _graphs(context: RankContext) -> None:
    """Outputs of the caller's by turns, others of the communicator's, and eager ones that live while graphs run."""
    count = 8 * MIB
    with _over_two_gpus_too(), checks.communicator(context, "UB", registered_pool="512MiB") as group:
        sites = [poison(group.registered_empty((count,), torch.bfloat16)) for _ in range(2)]
        x = torch.zeros(count, dtype=torch.bfloat16, device=context.device)

        def body() -> list[torch.Tensor]:
            outs = (sites[0], None, sites[1], None, sites[0], None)
            return [group.all_reduce(x + turn, out).clone() for turn, out in enumerate(outs)]

        body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = body()
        eager: list[tuple[torch.Tensor, torch.Tensor]] = []
        for replay in range(12):
            seed = context.shared_seed()
            inputs = [rank_input(seed, rank, count, torch.bfloat16) for rank in range(context.world_size)]
            x.copy_(inputs[context.rank])
            eager.append((group.all_reduce(x), rank_ordered_sum(inputs)))
            graph.replay()
            for turn, result in enumerate(results):
                expected = rank_ordered_sum([part + turn for part in inputs])
                assert_same_bits(result.cpu(), expected, f"replay {replay}, call {turn}, {seed=}")
            for number, (found, expected) in enumerate(eager):
                assert_same_bits(found.cpu(), expected, f"replay {replay}: eager output {number}, which still lives")
            while len(eager) > 1 + (replay + context.rank) % 9:
                eager.pop(0)
        pool = group._held.pool
        assert pool is not None
        assert pool.taken > pool.lent >= 0


@pytest.mark.gpu(2)
def test_large_messages_of_two_gpus(gpu_pool: PoolFor) -> None:
    gpu_pool(2).run(_large)


@pytest.mark.gpu(4)
def test_large_messages_of_four_gpus(gpu_pool: PoolFor) -> None:
    gpu_pool(4).run(_large)


@pytest.mark.gpu(2)
def test_two_gpus_take_one_step(gpu_pool: PoolFor) -> None:
    gpu_pool(2).run(_in_one_step)


@pytest.mark.gpu(2)
def test_graphs_of_two_gpus(gpu_pool: PoolFor) -> None:
    gpu_pool(2).run(_graphs)
