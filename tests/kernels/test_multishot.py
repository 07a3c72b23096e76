"""The kernels that go by multicast, emulated, behind a switch played by kernels (tests/support/soft_switch.py)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.kernels.test_exact import inputs_of
from tests.kernels.test_protocol import run_queued
from tests.support.emulator import BrokenContextError, needs_emulator, seeds
from tests.support.local_machine import EmulatedGpus
from tests.support.multicast_checks import compare_exact, compare_in_switch
from tests.support.reference import DTYPES, assert_same_bits, rank_ordered_sum, special_inputs
from tests.support.soft_switch import MulticastGroup

pytestmark = needs_emulator

ALGORITHMS = ("ONESHOT", "TWOSHOT")
SIZES = (1, 7, 8, 520, 1023, 4096, 9001)
Kind = dict[str, Any]
KINDS: dict[str, Kind] = {
    "one round": {"workspace_mib": 1, "multicast_kib": 128},
    "rounds": {"workspace_mib": 0.15, "multicast_kib": 24},
    "split": {"workspace_mib": 0.5, "split": (1, 1), "lanes": 4},
    "split, reducers drain": {"workspace_mib": 0.15, "split": (2, 0), "multicast_kib": 32},
}


def group_of(seed: int, world_size: int, kind: Kind, **settings: Any) -> MulticastGroup:
    return MulticastGroup(
        world_size,
        machine=EmulatedGpus(seed),
        seed=seed,
        **({"lanes": 3, "threads": 64, "multicast_kib": 64} | kind | settings),
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_sizes(world_size: int, algorithm: str, kind: Kind) -> None:
    if "split" in kind and algorithm == "ONESHOT":
        pytest.skip("no lanes have one task")
    for seed in seeds(2 if world_size < 8 else 1):
        group = group_of(seed, world_size, kind)
        for turn, size in enumerate(SIZES if world_size < 4 else SIZES[: 7 - world_size // 4]):
            dtype = DTYPES[(turn + seed) % len(DTYPES)]
            inputs = inputs_of(size, world_size, size, dtype)
            compare_exact(group, algorithm, inputs, f"{dtype} x {size}, {seed=}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", (5, 6, 7, 9, 16))
def test_other_world_sizes(world_size: int, algorithm: str) -> None:
    """World sizes that kernels learn at run time."""
    for seed in seeds(1):
        group = group_of(seed, world_size, {"workspace_mib": 1, "threads": 32})
        for size, dtype in ((7, torch.float32), (1032, torch.float16), (2001, torch.bfloat16)):
            inputs = inputs_of(seed, world_size, size, dtype)
            compare_exact(group, algorithm, inputs, f"{dtype} x {size}, {seed=}")


@pytest.mark.parametrize("kind", ({"workspace_mib": 0.25}, KINDS["split"]), ids=("every lane does all", "split"))
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_calls_that_follow_each_other(world_size: int, kind: Kind) -> None:
    """Without a stop between them, of sizes that change, among calls that push into the same slots."""
    for seed in seeds(3 if world_size < 8 else 1):
        generator = random.Random(seed)
        group = group_of(seed, world_size, kind, multicast_kib=32 if world_size < 8 else 64)
        kinds = (*ALGORITHMS, *ALGORITHMS, "PUSH ONESHOT", "PUSH TWOSHOT")
        calls = [(generator.choice(kinds), generator.choice((8, 64, 520, 1024, 8192 // world_size))) for _ in range(12)]
        run_queued(group, calls, f"{seed=}")


@pytest.mark.parametrize("world_size", (2, 5))
def test_two_switches(world_size: int) -> None:
    """As on two GPUs: each carries what every second rank stores."""
    for seed in seeds(2):
        group = group_of(seed, world_size, {"workspace_mib": 0.25}, multicast_kib=32, switches=2)
        calls = [(algorithm, size) for size in (8, 520, 1024) for algorithm in (*ALGORITHMS, "PUSH TWOSHOT")]
        run_queued(group, calls, f"{seed=}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, algorithm: str) -> None:
    inputs = special_inputs(5, dtype)
    for output in group_of(1, 5, {"workspace_mib": 1}).all_reduce(algorithm, inputs):
        assert_same_bits(output, rank_ordered_sum(inputs), f"{algorithm} {dtype}")
        assert not torch.signbit(output[output == 0]).any(), "a zero result must be +0"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_marker_in_the_input(algorithm: str) -> None:
    marker = torch.full((512,), _C.IN_BAND_MARKER - (1 << 32), dtype=torch.int32)
    ones = torch.full((512,), 0x3F803F80, dtype=torch.int32)  # a pair of bf16 ones, or an fp32 just above one
    group = group_of(3, 4, {"workspace_mib": 1})
    for dtype in DTYPES:
        for words in ([marker] * 4, [marker, ones, marker, ones]):
            for _ in range(3):  # through every generation
                compare_exact(group, algorithm, [part.view(dtype) for part in words], str(dtype))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensors_that_start_anywhere(algorithm: str) -> None:
    """Each rank's input and output at another distance from a vector: ranks run different forms in one call."""
    for seed in seeds(2):
        for size in (1000, 3003):
            group = group_of(seed, 4, {"workspace_mib": 0.25})
            parts = inputs_of(seed, 4, size, torch.float16)
            inputs, outputs = [], []
            for rank, part in enumerate(parts):
                for kept, first in ((inputs, rank), (outputs, 3 * rank % 4)):
                    kept.append(torch.full((size + 4,), 7.0, dtype=part.dtype)[first : first + size])
                inputs[rank].copy_(part)
            for rank in range(4):
                group.start(rank, algorithm, inputs[rank], outputs[rank])
            group.finish()
            for output in outputs:
                assert_same_bits(output, rank_ordered_sum(parts), f"{algorithm} x {size}, {seed=}")


@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_sums_in_the_switch(world_size: int) -> None:
    """The same on all ranks, whatever order the switch takes, and among calls that have the order of ranks."""
    for seed in seeds(2):
        group = group_of(seed, world_size, {"workspace_mib": 0.25, "multicast_kib": 48}, in_switch=True)
        for turn, size in enumerate((1, 8, 520, 1023, 9001)):
            inputs = inputs_of(seed, world_size, size, DTYPES[(turn + seed) % 3])
            compare_in_switch(group, inputs, f"x {size}, {seed=}")
            compare_exact(group, "TWOSHOT", inputs, f"x {size}, {seed=}")


@pytest.mark.parametrize("algorithm", (*ALGORITHMS, "IN_SWITCH"))
def test_a_rank_that_does_not_come_is_named(algorithm: str) -> None:
    group = group_of(1, 4, {"workspace_mib": 0.25}, in_switch=True, timeout_s=2.0, limit_ms=5000)
    inputs = inputs_of(1, 4, 1024, torch.bfloat16)
    outputs = [torch.empty_like(part) for part in inputs]  # alive until all have ended
    for rank in range(3):
        group.start(rank, algorithm, inputs[rank], outputs[rank])
    with pytest.raises(BrokenContextError):
        group.finish()
    failures = [failure_of(workspace) for workspace in group.workspaces[:3]]
    assert any(failure is not None and "rank 3" in str(failure) for failure in failures), failures


def test_calls_are_refused_without_multicast_memory() -> None:
    """Which is how every workspace begins; and again once it has been taken away."""
    group = group_of(1, 2, {"workspace_mib": 0.25}, in_switch=True)
    inputs = inputs_of(1, 2, 64, torch.bfloat16)
    for workspace in group.workspaces:
        workspace.set_multicast(0, 0, group.multicast)
    for algorithm in (*ALGORITHMS, "IN_SWITCH"):
        plan = group.plan(0, algorithm, inputs[0])
        with pytest.raises(RuntimeError, match="invalid argument"):
            plan(inputs[0].data_ptr(), torch.empty_like(inputs[0]).data_ptr(), group.streams[0].cuda_stream)
    with pytest.raises(ValueError, match="both addresses"):
        group.workspaces[0].set_multicast(1, 0, group.multicast)
    with pytest.raises(ValueError, match="no multicast layout"):
        group.machine.native.make_multicast_layout(8, 128)
