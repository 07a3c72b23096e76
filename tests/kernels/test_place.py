"""Results that are stored into peers' outputs, emulated: every form, against the rank-ordered sum."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Exchange
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.kernels.test_exact import group_of, inputs_of, reduce_and_compare
from tests.kernels.test_protocol import run_queued
from tests.support.emulator import BrokenContextError, needs_emulator, seeds
from tests.support.local_group import message_of
from tests.support.local_machine import plan_on
from tests.support.reference import DTYPES, assert_same_bits, poison, rank_ordered_sum, special_inputs

pytestmark = needs_emulator

KINDS: dict[str, dict[str, Any]] = {
    "one form": {"workspace_mib": 1},
    "rounds": {"workspace_mib": 0.15},
    "split": {"split": (1, 0), "lanes": 4, "workspace_mib": 0.5},
    "split, rounds": {"split": (2, 0), "lanes": 3, "workspace_mib": 0.15},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@EVERY_KIND
@pytest.mark.parametrize("world_size", (2, 3, 4, 5, 8))
def test_sizes(world_size: int, kind: dict[str, Any]) -> None:
    for seed in seeds(2):
        group = group_of(seed, world_size, kind)
        for turn, size in enumerate((1, 7, 8, 520, 1023, 4096, 9001)):
            dtype = DTYPES[(turn + seed) % len(DTYPES)]
            inputs = inputs_of(size, world_size, size, dtype)
            reduce_and_compare(group, "PLACE", inputs, f"{dtype} x {size}, {seed=}")


@pytest.mark.parametrize("kind", (KINDS["one form"], KINDS["rounds"]), ids=("one round", "rounds"))
@pytest.mark.parametrize("world_size", (2, 3, 4, 5, 8))
def test_inputs_read_in_place(world_size: int, kind: dict[str, Any]) -> None:
    for seed in seeds(2):
        group = group_of(seed, world_size, kind)
        for turn, size in enumerate((8, 16, 520, 1024, 4096, 9008)):
            dtype = DTYPES[(turn + seed) % len(DTYPES)]
            inputs = inputs_of(size, world_size, size, dtype)
            reduce_and_compare(group, "PULLED PLACE", inputs, f"{dtype} x {size}, {seed=}")
        for inputs in ([part[:168] for part in special_inputs(world_size, dtype)] for dtype in DTYPES):
            for output in group.all_reduce("PULLED PLACE", inputs):
                assert_same_bits(output, rank_ordered_sum(inputs), f"special values, {seed=}")


@pytest.mark.parametrize("kind", (KINDS["one form"], KINDS["rounds"]), ids=("one round", "rounds"))
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_inputs_read_in_place_are_overwritten_behind_the_call(world_size: int, kind: dict[str, Any]) -> None:
    """Each call's input is what the kernel before has written, and the kernel behind writes it again."""
    size, calls = 2048, 6
    for seed in seeds(3):
        group = group_of(seed, world_size, kind)
        inputs = inputs_of(seed, world_size, size, torch.float32)
        moved = [part.clone() for part in inputs]
        outputs = [[poison(torch.empty_like(part)) for part in inputs] for _ in range(calls)]
        for rank in range(world_size):
            for call in range(calls):
                group.start_place(rank, moved[rank], outputs[call], inputs=moved)
                group.start(rank, "ONESHOT", outputs[call][rank], moved[rank])
        group.machine.synchronize()
        expected = rank_ordered_sum(inputs)
        for call in range(calls):
            for rank in range(world_size):
                assert_same_bits(outputs[call][rank], expected, f"call {call}, {seed=}, rank {rank}")
            expected = rank_ordered_sum([rank_ordered_sum([expected] * world_size)] * world_size)


@pytest.mark.parametrize("broken", ("count", "input", "scatter_lanes"))
def test_inputs_that_cannot_be_read_in_place_are_refused(broken: str) -> None:
    group = group_of(1, 2, {"workspace_mib": 1} | ({"split": (1, 0)} if broken == "scatter_lanes" else {}))
    whole = [torch.ones(64, dtype=torch.bfloat16) for _ in range(2)]
    outputs = [torch.empty_like(part) for part in whole]
    inputs = [part[: 63 if broken == "count" else 56] for part in whole]
    if broken == "input":
        inputs = [whole[0][:56], whole[1][1:57]]
    plan = group.plan(
        0, "TWOSHOT", inputs[0], [part.data_ptr() - inputs[0].data_ptr() for part in inputs],
        [part.data_ptr() for part in outputs],
    )  # fmt: skip
    if broken == "scatter_lanes":
        launch = group.launch_of("TWOSHOT", message_of(inputs[0]))
        assert launch.scatter_lanes == 1
        plan = plan_on(
            group.machine, group.workspaces[0], dataclasses.replace(launch, exchange=Exchange.PLACE), 56,
            torch.bfloat16, [0, 0], [part.data_ptr() for part in outputs],
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="invalid argument"):
        plan(inputs[0].data_ptr(), outputs[0].data_ptr(), group.streams[0].cuda_stream)


@EVERY_KIND
def test_special_values(kind: dict[str, Any]) -> None:
    """Zeros are +0, and words that look like the marker are data like any other."""
    marker = torch.full((512,), _C.IN_BAND_MARKER - (1 << 32), dtype=torch.int32)
    for seed in seeds(1):
        for dtype in DTYPES:
            group = group_of(seed, 4, kind)
            for inputs in (special_inputs(4, dtype), [marker.view(dtype)] * 4):
                for output in group.all_reduce("PLACE", inputs):
                    assert_same_bits(output, rank_ordered_sum(inputs), f"{dtype}, {seed=}")


@EVERY_KIND
@pytest.mark.parametrize("world_size", (2, 4))
def test_among_other_calls(world_size: int, kind: dict[str, Any]) -> None:
    """Nobody waits for the host between them; scatter slots are shared with calls that push and that pull."""
    algorithms = ("PLACE", "PULLED PLACE", "PLACE", "TWOSHOT", "ONESHOT", "PULL")
    for seed in seeds(3):
        generator = random.Random(seed)
        group = group_of(seed, world_size, kind)
        calls = [(generator.choice(algorithms), generator.choice((8, 512, 4096))) for _ in range(12)]
        run_queued(group, calls, f"{seed=}")


@EVERY_KIND
def test_one_output_for_all_calls(kind: dict[str, Any]) -> None:
    """A call writes where an earlier kernel of a peer still reads: it waits until that has ended."""
    world_size, size = 3, 1024
    for seed in seeds(3):
        group = group_of(seed, world_size, kind)
        outputs = [poison(torch.empty(size, dtype=torch.bfloat16)) for _ in range(world_size)]
        made = []
        for number in range(4):
            inputs = inputs_of(number, world_size, size, torch.bfloat16)
            made.append((inputs, [poison(torch.empty_like(part)) for part in inputs]))
        for rank in range(world_size):
            for inputs, read in made:
                group.start_place(rank, inputs[rank], outputs)
                group.start(rank, "ONESHOT", outputs[rank], read[rank])  # reads what the next call overwrites
        group.machine.synchronize()
        for number, (inputs, read) in enumerate(made):
            expected = rank_ordered_sum([rank_ordered_sum(inputs)] * world_size)
            for rank, found in enumerate(read):
                assert_same_bits(found, expected, f"call {number}, {seed=}, rank {rank}")


@EVERY_KIND
@pytest.mark.parametrize("missing", (0, 2))
def test_a_rank_that_does_not_come(missing: int, kind: dict[str, Any]) -> None:
    """Every other rank's wait ends, names the rank, and no output is taken for whole."""
    group = group_of(1, 3, kind, timeout_s=0.001)
    inputs = inputs_of(1, 3, 4096, torch.bfloat16)
    outputs = [poison(torch.empty_like(part)) for part in inputs]
    for rank in range(3):
        if rank != missing:
            group.start_place(rank, inputs[rank], outputs)
    with pytest.raises(BrokenContextError):
        group.machine.synchronize()
    errors = [failure_of(group.workspaces[rank]) for rank in range(3) if rank != missing]
    found = [error for error in errors if error is not None]
    assert found
    assert all(error.peer == missing for error in found)
    assert all("TWOSHOT/output" in str(error) or "TWOSHOT/scatter" in str(error) for error in found), found
