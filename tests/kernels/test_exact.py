"""The exact CUDA kernels, emulated: every form, against the rank-ordered sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from tests.support.emulator import needs_emulator, seeds
from tests.support.local_group import LocalGroup
from tests.support.local_machine import EmulatedGpus
from tests.support.marks import slow
from tests.support.reference import DTYPES, assert_same_bits, rank_input, rank_ordered_sum, special_inputs

pytestmark = needs_emulator

WORLD_SIZES = (2, 3, 4, 8)
ALGORITHMS = ("ONESHOT", "TWOSHOT")
SIZES = (1, 7, 8, 520, 1023, 4096, 9001)
KINDS = {
    "in band": {"workspace_mib": 1},
    "in band, rounds": {"workspace_mib": 0.15},
    "in band, split": {"split": (1, 1), "lanes": 4, "workspace_mib": 0.5},
    "in band, split, reducers drain": {"split": (2, 0), "lanes": 3, "workspace_mib": 0.15},
    "flagged": {"in_band": False, "workspace_mib": 1},
    "flagged, rounds": {"in_band": False, "workspace_mib": 0.15},
    "host": {"host": True, "workspace_mib": 0.5},
    "host, rounds": {"host": True, "workspace_mib": 0.25},
    "staged": {"staged": True, "workspace_mib": 0.5},
}
Kind = dict[str, Any]


def group_of(seed: int, world_size: int, kind: Kind, **settings: Any) -> LocalGroup:
    return LocalGroup(world_size, machine=EmulatedGpus(seed), **({"lanes": 3, "threads": 64} | kind | settings))


def inputs_of(seed: int, world_size: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [rank_input(seed, rank, size, dtype) for rank in range(world_size)]


def reduce_and_compare(group: LocalGroup, algorithm: str, inputs: list[torch.Tensor], what: str) -> None:
    expected = rank_ordered_sum(inputs)
    for rank, output in enumerate(group.all_reduce(algorithm, inputs)):
        assert_same_bits(output, expected, f"{algorithm} {what}, rank {rank} of {group.world_size}")


def algorithms_of(kind: Kind, size: int) -> tuple[str, ...]:
    """All that this kind of group has; inputs are read in place where they are whole vectors."""
    if "staged" in kind:
        return ALGORITHMS[1:]
    return (*ALGORITHMS, "PULL") if kind is KINDS["in band"] and size % 8 == 0 else ALGORITHMS


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(world_size: int, algorithm: str, kind: Kind) -> None:
    if "staged" in kind and (world_size == 2 or algorithm == "ONESHOT"):
        pytest.skip("nothing is staged")
    for seed in seeds(3):
        group = group_of(seed, world_size, kind)
        for turn, size in enumerate(SIZES):
            dtype = DTYPES[(turn + seed) % len(DTYPES)]
            reduce_and_compare(group, algorithm, inputs_of(size, world_size, size, dtype), f"{dtype} x {size}, {seed=}")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("world_size", (5, 6, 7, 9, slow(12), 16, slow(24)))
def test_other_world_sizes(world_size: int, kind: Kind) -> None:
    """World sizes that kernels learn at run time."""
    cases = [(7, torch.float32), (1032, torch.float16), (4096 if world_size < 9 else 2001, torch.bfloat16)]
    for seed in seeds(1):
        group = group_of(
            seed, world_size, kind, workspace_mib=kind["workspace_mib"] * max(1, world_size / 8), threads=32
        )
        for size, dtype in cases[: 3 if world_size < 24 else 2]:
            for algorithm in algorithms_of(kind, size):
                inputs = inputs_of(size, world_size, size, dtype)
                reduce_and_compare(group, algorithm, inputs, f"{dtype} x {size}, {seed=}")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_as_many_ranks_as_an_nvlink_domain_has(kind: Kind) -> None:
    """More than twice as many as a block has threads; of two-shot parts, one is shorter and others are empty."""
    world_size = 72
    lanes = kind.get("lanes", 1)
    rest = 0 if "split" in kind else 3  # whole vectors have kernels of their own
    for seed in seeds(1):
        group = group_of(seed, world_size, kind, workspace_mib=kind["workspace_mib"] * 9, threads=32, lanes=lanes)
        for algorithm in algorithms_of(kind, 8):
            size = {"ONESHOT": 16 + rest, "TWOSHOT": 8 * 80 + rest, "PULL": 8 * 80}[algorithm]
            dtype = DTYPES[(size + seed) % len(DTYPES)]
            reduce_and_compare(group, algorithm, inputs_of(seed, world_size, size, dtype), f"{dtype} x {size}, {seed=}")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, kind: Kind) -> None:
    for seed in seeds(1):
        group = group_of(seed, 5, kind)
        inputs = special_inputs(5, dtype)
        for algorithm in ALGORITHMS:
            for output in group.all_reduce(algorithm, inputs):
                assert_same_bits(output, rank_ordered_sum(inputs), f"{algorithm} {dtype}")
                assert not torch.signbit(output[output == 0]).any(), "a zero result must be +0"


@pytest.mark.parametrize("kind", ({"workspace_mib": 1}, {"split": (1, 1), "lanes": 4, "workspace_mib": 1}))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_marker_in_the_input(algorithm: str, kind: Kind) -> None:
    """Words that look like the in-band marker are data like any other."""
    marker = torch.full((512,), _C.IN_BAND_MARKER - (1 << 32), dtype=torch.int32)
    ones = torch.full((512,), 0x3F803F80, dtype=torch.int32)  # a pair of bf16 ones, or an fp32 just above one
    for seed in seeds(2):
        group = group_of(seed, 4, kind)
        for dtype in DTYPES:
            for words in ([marker] * 4, [marker, ones, marker, ones], [ones, marker, marker, marker]):
                inputs = [part.view(dtype) for part in words]
                for _ in range(3):  # through every generation
                    reduce_and_compare(group, algorithm, inputs, f"{dtype}, {seed=}")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_inputs_read_in_place(world_size: int) -> None:
    """PULL, mixed with calls that share its slots and generations."""
    for seed in seeds(3):
        group = group_of(seed, world_size, {"workspace_mib": 0.25 if seed % 2 else 1})
        for size in (8, 1024, 8192):
            for turn, algorithm in enumerate(("PULL", "TWOSHOT", "PULL", "PULL")):
                inputs = inputs_of(seed + turn, world_size, size, DTYPES[turn % 3])
                reduce_and_compare(group, algorithm, inputs, f"x {size}, {seed=}")


@pytest.mark.parametrize("kind", ({"workspace_mib": 0.25}, {"staged": True, "workspace_mib": 0.5}))
def test_tensors_that_start_anywhere(kind: Kind) -> None:
    """Each rank's input and output at another distance from a vector."""
    size = 3003
    for seed in seeds(2):
        for dtype in DTYPES:
            group = group_of(seed, 4, kind)
            parts = inputs_of(seed, 4, size, dtype)
            inputs, outputs = [], []
            for rank, part in enumerate(parts):
                for kept, first in ((inputs, rank), (outputs, 3 - rank)):
                    kept.append(torch.full((size + 4,), 7.0, dtype=dtype)[first : first + size])
                inputs[rank].copy_(part)
            for rank in range(4):
                group.start(rank, "TWOSHOT", inputs[rank], outputs[rank])
            group.machine.synchronize()
            for output in outputs:
                assert_same_bits(output, rank_ordered_sum(parts), f"{dtype}, {seed=}")
