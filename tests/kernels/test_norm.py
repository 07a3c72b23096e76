"""Kernels that norm rows, emulated: every form, kind of quantization and world size, interleaved at random."""

from __future__ import annotations

import itertools

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from tests.support.emulator import needs_emulator
from tests.support.local_group import LocalGroup
from tests.support.local_machine import EmulatedGpus
from tests.support.norm_group import Shape, check, every_quant, random_boundary
from tests.support.reference import fresh_seed, rank_input

pytestmark = needs_emulator

ONE, TWO = Algorithm.ONE_SHOT, Algorithm.TWO_SHOT
HIDDEN = 384  # 48 units: a warp and a half, or one warp with two units to some threads
# kShort and kAny, rounds, and lanes of one task each.
SHAPES = (Shape(3, 64), Shape(2, 32), Shape(2, 32, rows_at_once=2), Shape(3, 64, scatter_lanes=1))
WIDE = Shape(2, 544)  # of two ranks: more threads than other blocks have
DRAINS = Shape(4, 64, scatter_lanes=1, drain_lanes=1)


def inputs_of(seed: int, world_size: int, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [rank_input(seed, rank, rows * HIDDEN, dtype).view(rows, HIDDEN) for rank in range(world_size)]


@pytest.mark.parametrize("algorithm", (ONE, TWO), ids=("one-shot", "two-shot"))
@pytest.mark.parametrize("world_size", (2, 3, 4, 5, 6, 7, 8))
def test_pushed(world_size: int, algorithm: Algorithm) -> None:
    quants = every_quant(HIDDEN)
    shapes = (*SHAPES, *((DRAINS,) if algorithm is TWO else (WIDE,) if world_size == 2 else ()))
    for number, (shape, rows) in enumerate(itertools.product(shapes, (1, 5))):
        seed = fresh_seed()
        dtype = (torch.bfloat16, torch.float16)[seed % 2]
        group = LocalGroup(world_size, lanes=4, workspace_mib=1, machine=EmulatedGpus(seed))
        boundary = random_boundary(
            seed, rows, HIDDEN, dtype, quants[(number + world_size) % len(quants)], residual=seed % 4 > 0
        )
        for call in range(3):  # through both generations
            inputs = inputs_of(seed + call, world_size, rows, dtype)
            what = f"{algorithm.name} {dtype} {rows} rows, {shape}, {boundary.quant}, seed {seed}, call {call}"
            check(group, algorithm, _C.PUSH, shape, inputs, boundary, what)


@pytest.mark.parametrize("world_size", (2, 3))
def test_through_host_memory(world_size: int) -> None:
    for quant, rows in zip(every_quant(HIDDEN), itertools.cycle((1, 5)), strict=False):
        seed = fresh_seed()
        group = LocalGroup(world_size, lanes=4, workspace_mib=1, host=True, machine=EmulatedGpus(seed))
        boundary = random_boundary(seed, rows, HIDDEN, torch.bfloat16, quant)
        for call in range(5):  # through all generations
            inputs = inputs_of(seed + call, world_size, rows, torch.bfloat16)
            check(group, ONE, _C.SHARED, Shape(2, 32), inputs, boundary, f"{rows} rows, {quant}, seed {seed}")
