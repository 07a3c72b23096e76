"""The kernels that go by multicast, ranks on one GPU or on two behind a switch that other kernels play.

No multicast object is made: tests/support/soft_switch.py says how the real kernels run without one. Sums in the switch
are only emulated (tests/kernels/test_multishot.py): no ordinary address answers to them.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.transport import driver, multicast_driver
from tests.conftest import MULTICAST_SWITCHES, PoolFor
from tests.support.local_machine import LocalMachine, OneGpu, TwoGpus, peer_obstacle
from tests.support.multicast_checks import compare_exact
from tests.support.reference import (
    DTYPES,
    assert_same_bits,
    fresh_seed,
    poison,
    rank_input,
    rank_ordered_sum,
    special_inputs,
)
from tests.support.soft_switch import MulticastGroup

pytestmark = pytest.mark.gpu(1)

WORLD_SIZES = (2, 3, 4, 5, 8)
ALGORITHMS = ("ONESHOT", "TWOSHOT")
SIZES = (1, 8, 9, 1023, 8192, 40_000)
Kind = dict[str, Any]
KINDS: dict[str, Kind] = {
    "one round": {"multicast_kib": 2048},
    "rounds": {"multicast_kib": 64},
    "split": {"multicast_kib": 1024, "split": (1, 1), "lanes": 4},
    "split, reducers drain": {"multicast_kib": 64, "split": (1, 0), "lanes": 3},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_number_of_gpus = pytest.mark.parametrize(
    "gpus", (pytest.param(1, id="one GPU"), pytest.param(2, id="two GPUs", marks=pytest.mark.gpu(2)))
)


@pytest.fixture(autouse=True)
def _switches() -> None:
    """Whatever these tests do, no multicast object may come of it."""
    assert MULTICAST_SWITCHES.items() <= os.environ.items()


def group_of(world_size: int, kind: Kind, gpus: int = 1) -> MulticastGroup:
    """With two GPUs even ranks lie on one, odd ranks on the other, and each has a switch for what its ranks store."""
    if gpus == 2 and (reason := peer_obstacle()) is not None:
        pytest.skip(reason)
    machine: LocalMachine = TwoGpus() if gpus == 2 else OneGpu()
    settings = {"lanes": 3, "workspace_mib": 16} | kind
    return MulticastGroup(world_size, seed=fresh_seed() % (1 << 30), machine=machine, **settings)


@every_number_of_gpus
@every_kind
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(world_size: int, algorithm: str, kind: Kind, gpus: int) -> None:
    if "split" in kind and algorithm == "ONESHOT":
        pytest.skip("no lanes have one task")
    group = group_of(world_size, kind, gpus)
    for dtype in DTYPES:
        for size in SIZES:
            seed = fresh_seed()
            inputs = [rank_input(seed, rank, size, dtype) for rank in range(world_size)]
            compare_exact(group, algorithm, inputs, f"{dtype} x {size}, {seed=}, switch {group.seed}")


@every_number_of_gpus
@pytest.mark.parametrize("most_delay_ns", (1, 400, 20_000))
@every_kind
@pytest.mark.parametrize("world_size", (2, 4, 8))
def test_calls_that_follow_each_other(world_size: int, kind: Kind, most_delay_ns: int, gpus: int) -> None:
    """Without a stop between them, of sizes that change, among calls that push into the same slots."""
    group = group_of(world_size, kind | {"most_delay_ns": most_delay_ns}, gpus)
    generator = torch.Generator().manual_seed(fresh_seed())
    kinds = (*ALGORITHMS, "TWOSHOT", "PUSH ONESHOT", "PUSH TWOSHOT")
    for turn in range(4):
        made = []
        for call in range(12):
            size = (8, 64, 520, 2048, 4096)[int(torch.randint(5, (), generator=generator))]
            algorithm = kinds[int(torch.randint(len(kinds), (), generator=generator))]
            inputs = [rank_input(100 * turn + call, rank, size, torch.bfloat16) for rank in range(world_size)]
            moved = [part.to(group.device_of(rank)) for rank, part in enumerate(inputs)]
            made.append((algorithm, inputs, moved, [poison(torch.empty_like(part)) for part in moved]))
        group.machine.synchronize()
        for rank in range(world_size):
            for algorithm, _, moved, outputs in made:
                group.start(rank, algorithm, moved[rank], outputs[rank])
        group.finish()
        for call, (algorithm, inputs, _, outputs) in enumerate(made):
            for rank, output in enumerate(outputs):
                what = f"turn {turn}, call {call}, {algorithm} x {output.numel()}, rank {rank}, switch {group.seed}"
                assert_same_bits(output, rank_ordered_sum(inputs), what)


@every_number_of_gpus
@every_kind
@pytest.mark.parametrize("world_size", (2, 4, 8))
def test_the_bits_of_pushed_calls(world_size: int, kind: Kind, gpus: int) -> None:
    group = group_of(world_size, kind, gpus)
    for dtype in DTYPES:
        seed = fresh_seed()
        inputs = [rank_input(seed, rank, 20_000, dtype) for rank in range(world_size)]
        pushed = group.all_reduce("PUSH TWOSHOT", inputs)
        for rank, output in enumerate(group.all_reduce("TWOSHOT", inputs)):
            assert_same_bits(output, pushed[rank].cpu(), f"{dtype}, rank {rank}, {seed=}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, algorithm: str) -> None:
    inputs = special_inputs(5, dtype)
    for output in group_of(5, {}).all_reduce(algorithm, inputs):
        assert_same_bits(output, rank_ordered_sum(inputs), f"{algorithm} {dtype}")
        assert not torch.signbit(output[output == 0]).any(), "a zero result must be +0"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_marker_in_the_input(algorithm: str) -> None:
    marker = torch.full((4096,), _C.IN_BAND_MARKER - (1 << 32), dtype=torch.int32)
    ones = torch.full((4096,), 0x3F803F80, dtype=torch.int32)  # a pair of bf16 ones, or an fp32 just above one
    group = group_of(4, {"multicast_kib": 1024})
    for dtype in DTYPES:
        for words in ([marker] * 4, [marker, ones, marker, ones]):
            for _ in range(3):  # through every generation
                compare_exact(group, algorithm, [part.view(dtype) for part in words], str(dtype))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", (2, 4, 8))
def test_graph_replays_between_eager_calls(world_size: int, algorithm: str) -> None:
    group = group_of(world_size, {"multicast_kib": 512})
    seed, size, dtype = fresh_seed(), 5003, torch.bfloat16
    inputs = [rank_input(seed, rank, size, dtype).to(group.device) for rank in range(world_size)]
    outputs, again = ([torch.empty_like(part) for part in inputs] for _ in range(2))
    graphs = []
    for rank in range(world_size):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            group.start(rank, algorithm, inputs[rank], outputs[rank])
            group.start(rank, algorithm, outputs[rank], again[rank])
        graphs.append(graph)
    for turn in range(8):
        fresh = [rank_input(seed + turn + 1, rank, size, dtype) for rank in range(world_size)]
        for part, values in zip(inputs, fresh, strict=True):
            part.copy_(values)
        for output in (*outputs, *again):
            output.fill_(float("nan"))
        group.open()
        for rank in range(world_size):
            with torch.cuda.stream(group.streams[rank]):
                graphs[rank].replay()
        group.finish()
        total = rank_ordered_sum(fresh)
        for output in outputs:
            assert_same_bits(output, total, f"turn {turn}")
        for output in again:
            assert_same_bits(output, rank_ordered_sum([total] * world_size), f"turn {turn}, the sum of sums")
        other = [rank_input(seed - turn, rank, 777 * (turn % 3 + 1), dtype) for rank in range(world_size)]
        compare_exact(group, ALGORITHMS[turn % 2], other, f"eager, turn {turn}")


def check_tables(_context: RankContext | None = None) -> None:
    for table in (driver.load(), multicast_driver.load()):
        assert table.cuMemCreate is not None
        for name in multicast_driver.MULTICAST_NAMES:
            with pytest.raises(AttributeError):
                getattr(table, name)


def test_the_drivers_table_has_no_multicast() -> None:
    """Though the driver of this GPU may well have it."""
    check_tables()


@pytest.mark.gpu(2)
def test_no_rank_has_multicast_in_its_table(gpu_pool: PoolFor) -> None:
    """And what is asked for goes without, with the reason."""
    gpu_pool(2).run(check_tables)
    gpu_pool(2).run(check_without_multicast)


def check_without_multicast(context: RankContext) -> None:
    group = context.communicator("TWOSHOT", multicast="on", in_switch_sum=True)
    try:
        inputs = [rank_input(7, rank, 5000, torch.bfloat16) for rank in range(context.world_size)]
        output = group.all_reduce(inputs[context.rank].to(context.device))
        assert_same_bits(output, rank_ordered_sum(inputs), "without multicast")
        assert "switched off by" in group.facts.no_multicast_reason
        assert group.report()["calls"] == {"TWOSHOT": 1}
    finally:
        group.close()


def test_calls_are_refused_without_multicast_memory() -> None:
    """Which is how every workspace begins."""
    group = group_of(2, {})
    part = torch.ones(64, device=group.device)
    for workspace in group.workspaces:
        workspace.set_multicast(0, 0, group.multicast)
    for algorithm in (*ALGORITHMS, "IN_SWITCH"):
        plan = group.plan(0, algorithm, part)
        with pytest.raises(RuntimeError, match="invalid argument"):
            plan(part.data_ptr(), torch.empty_like(part).data_ptr(), group.streams[0].cuda_stream)
