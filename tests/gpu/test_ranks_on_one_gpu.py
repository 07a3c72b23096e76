"""Kernels of 2 to 16 ranks on one GPU, against the rank-ordered reference."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from tests.support.in_band_rest import EPOCH_PLANES, plane_of
from tests.support.local_group import CONTEXT_END_S, LocalGroup
from tests.support.mixed_calls import run_mixed
from tests.support.reference import DTYPES, assert_same_bits, fresh_seed, rank_input, rank_ordered_sum, special_inputs

pytestmark = pytest.mark.gpu(1)

WORLD_SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 12, 16)
ALGORITHMS = ("ONESHOT", "TWOSHOT")
SIZES = (1, 7, 8, 9, 1023, 40_000, (1 << 20) + 1)


READINESS = pytest.mark.parametrize(
    "kind",
    (
        {"in_band": True},
        {"in_band": True, "workspace_mib": 2},
        {"in_band": True, "split": (1, 1)},
        {"in_band": True, "split": (1, 0), "workspace_mib": 2},
        {"in_band": False, "workspace_mib": 2},
        {"host": True},
        {"host": True, "workspace_mib": 2},
    ),
    ids=("in band", "in band, rounds", "in band, split", "in band, split, rounds", "flagged", "host", "host, rounds"),
)
Kind = dict[str, Any]


@READINESS
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(world_size: int, dtype: torch.dtype, algorithm: str, kind: Kind) -> None:
    group = LocalGroup(world_size, lanes=3, **kind)
    for size in SIZES:
        seed = fresh_seed()
        inputs = [rank_input(seed, rank, size, dtype) for rank in range(world_size)]
        expected = rank_ordered_sum(inputs)
        for rank, output in enumerate(group.all_reduce(algorithm, inputs)):
            assert_same_bits(
                output, expected, f"{algorithm} {dtype} x {size}, rank {rank} of {world_size}, seed {seed}"
            )


@pytest.mark.parametrize("workspace_mib", (2, 64), ids=("rounds", "one round"))
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_inputs_read_in_place(world_size: int, workspace_mib: int) -> None:
    """PULL, mixed with calls that share its slots and generations."""
    group = LocalGroup(world_size, in_band=True, lanes=3, workspace_mib=workspace_mib)
    for size in (8, 16, 1024, 40_000, 1 << 20):
        for dtype in DTYPES:
            for algorithm in ("PULL", "TWOSHOT", "PULL", "PULL"):
                seed = fresh_seed()
                inputs = [rank_input(seed, rank, size, dtype) for rank in range(world_size)]
                for output in group.all_reduce(algorithm, inputs):
                    assert_same_bits(output, rank_ordered_sum(inputs), f"{algorithm} {dtype} x {size}, seed {seed}")


@READINESS
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, algorithm: str, kind: Kind) -> None:
    inputs = special_inputs(5, dtype)
    expected = rank_ordered_sum(inputs)
    for output in LocalGroup(5, **kind).all_reduce(algorithm, inputs):
        assert_same_bits(output, expected, f"{algorithm} {dtype}")
        zeros = output.cpu() == 0
        assert not torch.signbit(output.cpu()[zeros]).any()


def test_marker_in_the_input() -> None:
    """Words that look like the in-band marker are data like any other."""
    marker = torch.full((4096,), _C.IN_BAND_MARKER - (1 << 32), dtype=torch.int32)
    ones = torch.full((4096,), 0x3F803F80, dtype=torch.int32)  # a pair of bf16 ones, or an fp32 just above one
    for algorithm in ALGORITHMS:
        for dtype in DTYPES:
            group = LocalGroup(4, in_band=True)
            for inputs in ([marker] * 4, [marker, ones, marker, ones], [ones, marker, marker, marker]):
                parts = [words.view(dtype) for words in inputs]
                for _ in range(7):  # through every generation
                    for output in group.all_reduce(algorithm, parts):
                        assert_same_bits(output, rank_ordered_sum(parts), f"{algorithm} {dtype}")


@READINESS
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_changing_sizes(algorithm: str, kind: Kind) -> None:
    """Lanes come and go and leave slots of different lengths behind."""
    group = LocalGroup(3, **kind, lanes=8)
    generator = torch.Generator().manual_seed(fresh_seed())
    for call in range(200):
        size = int(torch.randint(1, 1 << int(torch.randint(1, 17, (), generator=generator)), (), generator=generator))
        dtype = DTYPES[int(torch.randint(0, 3, (), generator=generator))]
        inputs = [rank_input(call + generator.initial_seed(), rank, size, dtype) for rank in range(3)]
        for output in group.all_reduce(algorithm, inputs):
            assert_same_bits(output, rank_ordered_sum(inputs), f"call {call}: {size} x {dtype}")


@READINESS
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", (5, 8, 16))
def test_graph_replays_between_eager_calls(world_size: int, algorithm: str, kind: Kind) -> None:
    group = LocalGroup(world_size, **kind)
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
    for turn in range(20):
        fresh = [rank_input(seed + turn + 1, rank, size, dtype) for rank in range(world_size)]
        for part, values in zip(inputs, fresh, strict=True):
            part.copy_(values)
        for output in (*outputs, *again):
            output.fill_(float("nan"))
        torch.cuda.synchronize()
        for rank in range(world_size):
            with torch.cuda.stream(group.streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        total = rank_ordered_sum(fresh)
        for output in outputs:
            assert_same_bits(output, total, f"turn {turn}")
        for output in again:
            assert_same_bits(output, rank_ordered_sum([total] * world_size), f"turn {turn}, the sum of sums")
        other = [rank_input(seed - turn, rank, 777 * (turn % 3 + 1), dtype) for rank in range(world_size)]
        for output in group.all_reduce(ALGORITHMS[turn % 2], other):
            assert_same_bits(output, rank_ordered_sum(other), f"eager call after turn {turn}")


def test_epoch_wraps_around() -> None:
    """Rounds are counted in 32 bits; a server passes the end of that in half a day."""
    group = LocalGroup(4, in_band=False, workspace_mib=2)
    layout = group.layout
    for buffer in group.buffers:
        # From the epochs to the end of the flags, all that flagged calls look at is a round number.
        buffer[layout.epochs_offset : layout.probe_offset].view(torch.int32).fill_(-6)
    torch.cuda.synchronize()
    for call in range(12):
        for algorithm in ALGORITHMS:
            seed = fresh_seed()
            inputs = [rank_input(seed, rank, 30_000, torch.float16) for rank in range(4)]
            for output in group.all_reduce(algorithm, inputs):
                assert_same_bits(output, rank_ordered_sum(inputs), f"{algorithm}, call {call}")
    wrapped = group.buffers[0][layout.epochs_offset : layout.epochs_offset + 4].view(torch.int32).item()
    assert 0 <= wrapped < 1000, "the epochs should have passed zero"


@pytest.mark.parametrize("kind", ({}, {"split": (1, 1)}, {"host": True}), ids=("pushed", "split", "host"))
def test_in_band_epochs_wrap_around(kind: Kind) -> None:
    group = LocalGroup(4, **kind)
    for epochs in group.in_band_epochs():
        epochs.fill_(-5)
    torch.cuda.synchronize()
    for call in range(12):
        for algorithm in ALGORITHMS:
            seed, size = fresh_seed(), (3000, 8, 4096, 777)[call % 4]
            inputs = [rank_input(seed, rank, size, torch.float16) for rank in range(4)]
            for output in group.all_reduce(algorithm, inputs):
                assert_same_bits(output, rank_ordered_sum(inputs), f"{algorithm}, call {call}")
    calls = dict.fromkeys(EPOCH_PLANES, 0)
    for algorithm in ALGORITHMS * 12:  # each call is one round
        calls[plane_of(group.layout, algorithm)] += 1
    for epochs in group.in_band_epochs():
        assert epochs.tolist() == [[-5 + number] * group.lanes for number in calls.values()]


@pytest.mark.parametrize("at_once", (1, 12), ids=("one by one", "queued"))
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_calls_of_every_kind_share_slots(world_size: int, at_once: int) -> None:
    run_mixed(LocalGroup(world_size, lanes=4, workspace_mib=0.1), fresh_seed(), 120, at_once=at_once)


def test_missing_rank_stops_the_others_with_a_named_error() -> None:
    """The trap ends the CUDA context, so this needs a process of its own."""
    script = """
import sys, time, torch
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.support.local_group import LocalGroup
group = LocalGroup(4, in_band=sys.argv[2] != "flagged", host=sys.argv[2] == "host", timeout_s=2.0)
inputs = [torch.ones(1000, device="cuda") for _ in range(4)]
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
    for algorithm, phase in (("ONESHOT", "gather"), ("TWOSHOT", "scatter")):
        for readiness in ("in_band", "flagged", "host"):
            command = [sys.executable, "-c", script, algorithm, readiness]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
            _check_missing_rank(result, algorithm, phase)


def _check_missing_rank(result: subprocess.CompletedProcess[str], algorithm: str, phase: str) -> None:
    text = result.stdout
    assert "cuda: " in text, (text, result.stderr[-2000:])
    assert f"s for rank 2 in {algorithm}/{phase}" in text, (text, result.stderr[-2000:])
    seconds = float(text.split("seconds: ")[1].split()[0])
    assert 2.0 <= seconds < 2.0 + CONTEXT_END_S, text
