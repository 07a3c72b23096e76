"""Staged calls of 3 to 16 ranks on one GPU: the same bits as every other call, and one stream out and one in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat
from tests.gpu.test_low_precision import compare
from tests.gpu.test_low_precision import expected as oracle_of
from tests.support.local_group import CONTEXT_END_S, LocalGroup, message_of
from tests.support.reference import DTYPES, assert_same_bits, fresh_seed, rank_input, rank_ordered_sum, special_inputs

pytestmark = pytest.mark.gpu(1)

WORLD_SIZES = (3, 4, 5, 8, 16)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SIZES = (1, 7, 9, 1023, 40_000, (1 << 20) + 1)


def inputs_of(seed: int, world_size: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [rank_input(seed, rank, size, dtype) for rank in range(world_size)]


def reduce_and_compare(group: LocalGroup, inputs: list[torch.Tensor], what: str, algorithm: str = "TWOSHOT") -> None:
    expected = rank_ordered_sum(inputs)
    for rank, output in enumerate(group.all_reduce(algorithm, inputs)):
        assert_same_bits(output, expected, f"{what}, rank {rank} of {group.world_size}")


@pytest.mark.parametrize("workspace_mib", (64, 2), ids=("one round", "rounds"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(world_size: int, dtype: torch.dtype, workspace_mib: int) -> None:
    group = LocalGroup(world_size, lanes=3, workspace_mib=workspace_mib, staged=True)
    for size in SIZES:
        seed = fresh_seed()
        launch = group.launch_of("TWOSHOT", message_of(torch.empty(size, dtype=dtype)))
        assert launch.staged
        reduce_and_compare(group, inputs_of(seed, world_size, size, dtype), f"{dtype} x {size}, seed {seed}")
    assert (launch.rounds > 1) == (workspace_mib == 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    group = LocalGroup(5, staged=True)
    reduce_and_compare(group, special_inputs(5, dtype), f"{dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_start_anywhere(dtype: torch.dtype) -> None:
    """Each rank's input and output at another distance from a vector."""
    group = LocalGroup(4, workspace_mib=2, staged=True)
    seed, size = fresh_seed(), 100_003
    parts = inputs_of(seed, 4, size, dtype)
    inputs, outputs = [], []
    for rank, part in enumerate(parts):
        for kept, first in ((inputs, rank), (outputs, 3 - rank)):
            storage = torch.full((size + 4,), 7.0, dtype=dtype, device=group.device)
            kept.append(storage[first : first + size])
        inputs[rank].copy_(part)
    torch.cuda.synchronize()
    for rank in range(4):
        group.start(rank, "TWOSHOT", inputs[rank], outputs[rank])
    torch.cuda.synchronize()
    for output in outputs:
        assert_same_bits(output, rank_ordered_sum(parts), f"{dtype}, seed {seed}")


@pytest.mark.parametrize("wire", list(WireFormat), ids=str)
@pytest.mark.parametrize("workspace_mib", (64, 2), ids=("one round", "rounds"))
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("world_size", (3, 4, 5, 6, 7, 8))
def test_compressed(world_size: int, dtype: torch.dtype, workspace_mib: int, wire: WireFormat) -> None:
    group = LocalGroup(world_size, in_band=False, lanes=5, workspace_mib=workspace_mib, wire_format=wire, staged=True)
    for size in (1, 497, 15_000, 300_001):
        seed = fresh_seed()
        inputs = inputs_of(seed, world_size, size, dtype)
        assert group.launch_of("LOWPRECISION", message_of(inputs[0])).staged
        compare(group, inputs, f"{wire}, {dtype} x {size}, {world_size} ranks, seed {seed}")
    compare(group, special_inputs(world_size, dtype), f"{wire}, {dtype}, special values")


@pytest.mark.parametrize("in_band", (True, False), ids=("in band", "flagged"))
@pytest.mark.parametrize("world_size", (3, 8))
def test_between_other_calls(world_size: int, in_band: bool) -> None:
    """All on one workspace, in any order, with grids and rounds of all sizes."""
    group = LocalGroup(world_size, in_band=in_band, lanes=5, workspace_mib=4, staged=True)
    generator = torch.Generator().manual_seed(fresh_seed())

    def draw(end: int) -> int:
        return int(torch.randint(0, end, (), generator=generator))

    for call in range(120):
        what = f"call {call}, seed {generator.initial_seed()}"
        size = 1 + draw(1 << (4 + draw(15)))
        inputs = inputs_of(generator.initial_seed() + call, world_size, size, SIXTEEN_BITS[draw(2)])
        group.staged = draw(2) == 0
        algorithm = ("ONESHOT", "TWOSHOT", "LOWPRECISION")[draw(3)]
        if algorithm == "LOWPRECISION":
            compare(group, inputs, what)
        else:
            reduce_and_compare(group, inputs, what, algorithm)


@pytest.mark.parametrize("algorithm", ("TWOSHOT", "LOWPRECISION"))
@pytest.mark.parametrize("world_size", (3, 8))
def test_graph_replays_between_eager_calls(world_size: int, algorithm: str) -> None:
    """Graphs of a staged call and one of another kind."""
    group = LocalGroup(world_size, in_band=False, workspace_mib=2, staged=True)
    seed, size = fresh_seed(), 150_003
    inputs = [torch.zeros(size, dtype=torch.bfloat16, device=group.device) for _ in range(world_size)]
    outputs = [torch.empty_like(part) for part in inputs]
    flagged = [torch.empty_like(part) for part in inputs]
    graphs = []
    torch.cuda.synchronize()
    for rank in range(world_size):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            for group.staged, to in ((True, outputs), (False, flagged)):
                group.start(rank, algorithm, inputs[rank], to[rank])
        graphs.append(graph)
    for turn in range(12):
        fresh = inputs_of(seed + turn, world_size, size, torch.bfloat16)
        for part, values, output, other in zip(inputs, fresh, outputs, flagged, strict=True):
            part.copy_(values)
            output.fill_(float("nan"))
            other.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, group.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for group.staged, results in ((True, outputs), (False, flagged)):
            expected = rank_ordered_sum(fresh) if algorithm == "TWOSHOT" else oracle_of(group, fresh)
            for output in results:
                assert_same_bits(output, expected, f"turn {turn}, staged {group.staged}, seed {seed}")
        group.staged = turn % 2 == 0
        eager = inputs_of(seed - turn, world_size, 7_777 * (turn % 3 + 1), torch.bfloat16)
        if algorithm == "TWOSHOT":
            reduce_and_compare(group, eager, f"eager call after turn {turn}, seed {seed}")
        else:
            compare(group, eager, f"eager call after turn {turn}, seed {seed}")


def test_counts_wrap_around() -> None:
    """Stages are counted in 32 bits."""
    group = LocalGroup(4, in_band=False, workspace_mib=2, staged=True)
    layout = group.layout
    for buffer in group.buffers:
        buffer[layout.epochs_offset : layout.probe_offset].view(torch.int32).fill_(-20)
    torch.cuda.synchronize()
    for call in range(12):
        group.staged = call % 3 != 0
        seed = fresh_seed()
        reduce_and_compare(group, inputs_of(seed, 4, 90_000, torch.float16), f"call {call}, seed {seed}")


def stage_times(group: LocalGroup, stages: int) -> list[list[tuple[int, int, int]]]:
    """[rank][stage]: when it began, when all was sent and when all was received, in ns; of a group's first call."""
    assert 0 < stages < _C.STAGE_TIMES, "older ones are overwritten"
    first = group.layout.stages_offset
    kept = [
        buffer[first : first + _C.STAGE_TIMES * 24].view(torch.int64).view(-1, 3).tolist() for buffer in group.buffers
    ]
    return [[tuple(times[stage + 1]) for stage in range(stages)] for times in kept]  # the first is stage 1


def check_streams(group: LocalGroup, rounds: int) -> int:
    """One stream out and one in, of a group's first call; returns how often one had to wait for another."""
    world_size = group.world_size
    stages = rounds * 2 * (world_size - 1)
    times = stage_times(group, stages)
    held_back = 0
    for rank in range(world_size):
        for stage in range(stages):
            began, sent, received = times[rank][stage]
            source = (rank - stage % (world_size - 1) - 1) % world_size
            assert 0 < began <= sent <= received
            assert received >= times[source][stage][1], "received before it was sent"
            if stage == 0:
                continue
            assert began >= times[rank][stage - 1][1], f"rank {rank} sends to two ranks in stage {stage}"
            before = (rank - (stage - 1) % (world_size - 1) - 1) % world_size
            complete = times[before][stage - 1][1]
            assert times[source][stage][0] >= complete, f"ranks {before} and {source} send to {rank} in stage {stage}"
            # The source had ended the stage before, in both directions, but this rank was still receiving.
            held_back += times[source][stage - 1][2] < complete
    return held_back


@pytest.mark.parametrize("world_size", (3, 4, 5, 8))
def test_one_stream_out_and_one_in(world_size: int) -> None:
    """By the GPU's clock, which all ranks share here. Rank 0's input is not aligned, so that it sends more slowly."""
    group = LocalGroup(world_size, in_band=False, workspace_mib=64, staged=True)
    size, dtype = 8 << 20, torch.bfloat16
    parts = [torch.randn(size + 1, device=group.device).to(dtype) for _ in range(world_size)]
    inputs = [part[1:] if rank == 0 else part[:-1] for rank, part in enumerate(parts)]
    outputs = [torch.empty_like(part) for part in inputs]
    launch = group.launch_of("TWOSHOT", message_of(inputs[0]))
    torch.cuda.synchronize()
    for rank in range(world_size):
        group.start(rank, "TWOSHOT", inputs[rank], outputs[rank])
    torch.cuda.synchronize()
    for output in outputs:
        assert_same_bits(output, rank_ordered_sum([part.cpu() for part in inputs]), "with times")

    held_back = check_streams(group, launch.rounds)
    assert held_back > 0, "no stream ever had to wait for another: the test shows nothing"
    arrivals = [buffer[256:260].view(torch.int32).item() for buffer in group.buffers]
    assert arrivals == [0] * world_size, "lanes that arrived are counted to the end"


def test_missing_rank_stops_the_others_with_a_named_error() -> None:
    """Also lanes that wait for other lanes of their rank. The trap ends the CUDA context: a process of its own."""
    script = """
import sys, time, torch
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.support.local_group import LocalGroup
group = LocalGroup(4, in_band=False, lanes=4, timeout_s=2.0, staged=True)
inputs = [torch.ones(1 << 20, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
outputs = [torch.empty_like(part) for part in inputs]
torch.cuda.synchronize()
start = time.monotonic()
for rank in (0, 1, 3):
    group.start(rank, sys.argv[1], inputs[rank], outputs[rank])
try:
    torch.cuda.synchronize()
except Exception as error:
    print("cuda:", type(error).__name__)
print(f"seconds: {time.monotonic() - start:.2f}")
for rank in (0, 1, 3):
    failure = failure_of(group.workspaces[rank])
    if failure is not None:
        print("named:", failure)
"""
    for algorithm in ("TWOSHOT", "LOWPRECISION"):
        command = [sys.executable, "-c", script, algorithm]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        text = result.stdout
        assert "cuda: " in text, (text, result.stderr[-2000:])
        assert f"s for rank 2 in {algorithm}/scatter" in text, (text, result.stderr[-2000:])
        assert 2.0 <= float(text.split("seconds: ")[1].split()[0]) < 2.0 + CONTEXT_END_S, text


def test_calls_that_no_kernel_may_be_given() -> None:
    """In band, too long a piece, an algorithm without stages, two ranks."""
    for world_size, algorithm, change in (
        (4, _C.TWO_SHOT, {"exchange": _C.PUSH, "scatter_lanes": 1}),
        (4, _C.TWO_SHOT, {"chunk_vectors": 1 << 30}),
        (4, _C.TWO_SHOT, {"threads": _C.MAX_FLAGGED_THREADS}),
        (4, _C.ONE_SHOT, {}),
        (2, _C.TWO_SHOT, {}),
        (2, _C.TWO_SHOT, {"wire": _C.WIRE_FP8, "chunk_vectors": 32}),
    ):
        group = LocalGroup(world_size, workspace_mib=2, staged=True)
        data = torch.zeros(64, dtype=torch.bfloat16, device=group.device)
        settings = {"lanes": 1, "threads": 32, "chunk_vectors": 1, "exchange": _C.STAGED} | change
        plan = _C.Plan(group.workspaces[0], algorithm=algorithm, count=64, dtype=2, **settings)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="invalid argument"):
            plan(data.data_ptr(), data.data_ptr(), group.streams[0].cuda_stream)
