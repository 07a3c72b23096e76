"""Fused calls of several ranks on one GPU against the oracle: forms, hidden sizes, rows, quantizations, graphs."""

from __future__ import annotations

import itertools

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.norm import Normed, empty_outputs
from tests.support.local_group import LocalGroup
from tests.support.norm_group import (
    Boundary,
    FusedCall,
    Shape,
    assert_nothing_between_columns,
    assert_same,
    check,
    every_quant,
    poison,
    random_boundary,
    tensors_of,
)
from tests.support.reference import fresh_seed, rank_input, rank_ordered_sum, special_inputs

pytestmark = pytest.mark.gpu(1)

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
HIDDEN = (8, 512, 2880, 4096, 5120, 7168, 8192)
ONE, TWO = Algorithm.ONE_SHOT, Algorithm.TWO_SHOT


def threads_for(hidden: int, units: int, cluster: int = 1) -> int:
    return -(-hidden // 8 // units // cluster // 32) * 32 or 32


def inputs_of(seed: int, world_size: int, rows: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [rank_input(seed, rank, rows * hidden, dtype).view(rows, hidden) for rank in range(world_size)]


def shapes_for(algorithm: Algorithm, hidden: int, world_size: int) -> list[Shape]:
    """A thread has a unit, or two; clusters; lanes of one task; rounds."""
    lanes = 6 if world_size <= 4 else 3
    two = max(32, threads_for(hidden, 2))
    shapes = [
        Shape(lanes, two),
        Shape(lanes, two, rows_at_once=3),
        Shape(lanes, 512, scatter_lanes=1, drain_lanes=1 if algorithm is TWO and lanes > 2 else 0),
    ]
    wide = []
    if hidden <= 512 * 8:
        shapes.append(Shape(lanes, threads_for(hidden, 1)))
    elif hidden <= 1024 * 8 and algorithm is ONE and world_size == 2:
        wide.append(Shape(lanes, threads_for(hidden, 1)))
    shapes = [shape for shape in shapes if shape.threads <= 512] + wide
    return shapes + clusters_for(hidden, world_size) if hidden >= 512 else shapes


def clusters_for(hidden: int, world_size: int) -> list[Shape]:
    """Two clusters of each size, or one where the GPU has no room for two of all ranks."""
    found = []
    for cluster in (2, 4, 8):
        threads = threads_for(hidden, 1, cluster)
        found += [
            shape
            for clusters in (1, 2)
            if threads <= 512 and are_resident(shape := Shape(clusters * cluster, threads, cluster), world_size)
        ][-1:]
    return found


def are_resident(shape: Shape, world_size: int) -> bool:
    """Whether clusters of all ranks find room on one GPU together, beside those that wait for the end of these.

    A cluster must find it in one part of the GPU (GPC), which others may have filled: so only half of the room counts.
    A thread has 128 registers at most.
    """
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    blocks = min(16, 65536 // (128 * shape.threads)) * gpu.multi_processor_count
    return 2 * world_size * shape.lanes <= blocks // 2


@pytest.mark.parametrize("algorithm", (ONE, TWO), ids=("one-shot", "two-shot"))
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("world_size", (2, 3, 4, 5, 8))
def test_forms(world_size: int, dtype: torch.dtype, algorithm: Algorithm) -> None:
    group = LocalGroup(world_size, lanes=16, workspace_mib=24)
    for hidden in HIDDEN:
        for number, shape in enumerate(shapes_for(algorithm, hidden, world_size)):
            for rows in (1, 7, 13):
                seed = fresh_seed()
                inputs = inputs_of(seed, world_size, rows, hidden, dtype)
                quants = every_quant(hidden)
                boundary = random_boundary(
                    seed, rows, hidden, dtype, quants[(seed + number) % len(quants)], residual=seed % 5 > 0
                )
                what = f"{algorithm.name} {dtype} {rows} x {hidden}, {shape}, {boundary.quant}, seed {seed}"
                check(group, algorithm, _C.PUSH, shape, inputs, boundary, what)


@pytest.mark.parametrize("algorithm", (ONE, TWO), ids=("one-shot", "two-shot"))
@pytest.mark.parametrize("world_size", (5, 6, 7, 8))
def test_clusters_of_many_ranks(world_size: int, algorithm: Algorithm) -> None:
    """As the policy launches them over so many, with every quantization."""
    group = LocalGroup(world_size, lanes=16, workspace_mib=24)
    for hidden in (2880, 8192):
        shapes = clusters_for(hidden, world_size)
        assert {shape.cluster for shape in shapes} == {2, 4, 8}, "too small a GPU for clusters of all ranks"
        cases = itertools.product(shapes, every_quant(hidden))
        for rows, (shape, quant) in zip(itertools.cycle((1, 2, 5, 3)), cases, strict=False):
            seed = fresh_seed()
            inputs = inputs_of(seed, world_size, rows, hidden, SIXTEEN_BITS[seed % 2])
            boundary = random_boundary(seed, rows, hidden, inputs[0].dtype, quant, residual=seed % 5 > 0)
            what = f"{algorithm.name} {inputs[0].dtype} {rows} x {hidden}, {shape}, {quant}, seed {seed}"
            check(group, algorithm, _C.PUSH, shape, inputs, boundary, what)


@pytest.mark.parametrize("hidden", (128, 2880, 5120, 8192))
def test_every_quantization(hidden: int) -> None:
    group = LocalGroup(2, lanes=16, workspace_mib=24)
    for quant, dtype, algorithm in itertools.product(every_quant(hidden), SIXTEEN_BITS, (ONE, TWO)):
        for shape in shapes_for(algorithm, hidden, 2):
            seed = fresh_seed()
            inputs = inputs_of(seed, 2, 9, hidden, dtype)
            what = f"{algorithm.name} {dtype} x {hidden}, {shape}, {quant}, seed {seed}"
            check(group, algorithm, _C.PUSH, shape, inputs, random_boundary(seed, 9, hidden, dtype, quant), what)


@pytest.mark.parametrize("world_size", (2, 3, 8))
def test_through_host_memory(world_size: int) -> None:
    group = LocalGroup(world_size, lanes=8, workspace_mib=8, host=True)
    for hidden in HIDDEN:
        for rows, dtype in itertools.product((1, 7, 20), SIXTEEN_BITS):
            seed = fresh_seed()
            quants = every_quant(hidden)
            boundary = random_boundary(seed, rows, hidden, dtype, quants[seed % len(quants)])
            what = f"host {dtype} {rows} x {hidden}, {boundary.quant}, seed {seed}"
            shape = Shape(4, min(256, threads_for(hidden, 1)))
            check(group, ONE, _C.SHARED, shape, inputs_of(seed, world_size, rows, hidden, dtype), boundary, what)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    """NaN, infinity and what overflows stay in their rows; a row of zeros too."""
    hidden = 176  # 13 * 13 values, padded
    pieces = [torch.nn.functional.pad(part, (0, hidden - len(part))) for part in special_inputs(2, dtype)]
    inputs = [torch.stack([torch.zeros(hidden, dtype=dtype), part, torch.ones(hidden, dtype=dtype)]) for part in pieces]
    group = LocalGroup(2, lanes=8, workspace_mib=8)
    for quant, algorithm in itertools.product(every_quant(hidden), (ONE, TWO)):
        boundary = Boundary(
            torch.zeros(3, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype), quant=quant, return_norm=True
        )
        check(group, algorithm, _C.PUSH, Shape(3, 32), inputs, boundary, f"{algorithm.name} {quant}")


@pytest.mark.parametrize("dtype", (torch.float32, *SIXTEEN_BITS), ids=str)
def test_the_norm_alone(dtype: torch.dtype) -> None:
    """The same bits as fused, for any hidden size."""
    device = torch.device("cuda", torch.cuda.current_device())
    for hidden in (8, 2880, 4096, 8192, 8200, 16384, 16392, 65536, 262144):
        for quant in every_quant(hidden):
            seed = fresh_seed()
            rows = 130 if hidden <= 8192 else 3
            sums = rank_input(seed, 0, rows * hidden, dtype).view(rows, hidden)
            boundary = random_boundary(seed, rows, hidden, dtype, quant, residual=seed % 4 > 0)
            expected = boundary.expected(sums)
            there = boundary.on(device)
            moved = sums.to(device)
            outputs = poison(empty_outputs(moved, there.quant, return_norm=there.return_norm))
            number = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]
            _C.rms_norm(
                boundary.norm(rows), tensors_of(outputs, there), moved.data_ptr(), outputs.residual_out.data_ptr(),
                moved.numel(), number, device.index, torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
            torch.cuda.synchronize()
            assert_same(outputs, expected, f"{dtype} {rows} x {hidden}, {quant}, seed {seed}")
            assert_nothing_between_columns(outputs, f"{dtype} {rows} x {hidden}, {quant}, seed {seed}")


def test_a_row_is_the_same_in_every_batch() -> None:
    """Whatever the batch, the form and the launch: the row's bits are those of the row alone."""
    hidden, seed = 4096, fresh_seed()
    group = LocalGroup(2, lanes=64, workspace_mib=160)
    inputs = inputs_of(seed, 2, 4096, hidden, torch.bfloat16)
    boundary = random_boundary(seed, 4096, hidden, torch.bfloat16, every_quant(hidden)[2])
    expected = boundary.expected(rank_ordered_sum(inputs))
    for rows in (1, 2, 3, 16, 100, 1024, 4096):
        part = Boundary(
            boundary.residual[:rows] if boundary.residual is not None else None,
            boundary.weight, boundary.eps, boundary.weight_bias, boundary.quant, boundary.return_norm,
        )  # fmt: skip
        shapes = [Shape(min(rows, 32), 256), Shape(min(rows, 32), 512)]
        shapes += [Shape(8, 64, 8)] if rows < 4 else [Shape(32, 512, scatter_lanes=8, drain_lanes=0)]
        for shape in shapes:
            call = FusedCall(group, ONE, _C.PUSH, shape, inputs[0][:rows], part)
            outputs = call.run([data[:rows].contiguous() for data in inputs])
            for output in outputs:
                assert_same(
                    output, Normed(*(None if t is None else t[:rows] for t in expected)), f"{rows} rows, {shape}"
                )


def test_graph_replays_between_eager_calls() -> None:
    hidden = 8192
    group = LocalGroup(4, lanes=16, workspace_mib=24)
    calls, data = [], []
    for algorithm, rows, shape in ((ONE, 1, Shape(8, 128, 8)), (TWO, 9, Shape(3, 512)), (ONE, 5, Shape(5, 512))):
        seed = fresh_seed()
        inputs = inputs_of(seed, 4, rows, hidden, torch.bfloat16)
        boundary = random_boundary(seed, rows, hidden, torch.bfloat16, every_quant(hidden)[1])
        calls.append(FusedCall(group, algorithm, _C.PUSH, shape, inputs[0], boundary))
        moved = [part.to(group.device) for part in inputs]
        data.append((moved, [calls[-1].outputs(part) for part in moved], boundary.expected(rank_ordered_sum(inputs))))
    graphs = []
    for rank in range(4):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            for call, (moved, outputs, _) in zip(calls, data, strict=True):
                call.start(rank, moved[rank], outputs[rank])
        graphs.append(graph)
    for _ in range(3):
        for _, outputs, _ in data:
            for output in outputs:
                poison(output)
        torch.cuda.synchronize()
        for rank, graph in enumerate(graphs):
            with torch.cuda.stream(group.streams[rank]):
                graph.replay()
        torch.cuda.synchronize()
        for number, (_, outputs, expected) in enumerate(data):
            for rank, output in enumerate(outputs):
                assert_same(output, expected, f"replay, call {number}, rank {rank}")
        check(group, ONE, _C.PUSH, Shape(4, 512), inputs, boundary, "between")
