"""In-band calls of every kind in one workspace, given to all ranks at once: their slots are the same bytes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.config import WireFormat
from tests.support.in_band_rest import assert_at_rest
from tests.support.local_group import LocalGroup, message_of
from tests.support.low_precision import expected_sum
from tests.support.norm_group import FusedCall, Shape, assert_same, every_quant, random_boundary
from tests.support.reference import assert_same_bits, poison, rank_input, rank_ordered_sum

ALGORITHMS = {"ONESHOT": Algorithm.ONE_SHOT, "TWOSHOT": Algorithm.TWO_SHOT}
PACKETS = tuple(f"{name} of {wire.value}" for name in ALGORITHMS for wire in (WireFormat.FP8, WireFormat.FP8_GROUP))
ROWS = tuple(f"rows by {name}" for name in ALGORITHMS)
KINDS = (*ALGORITHMS, "PULL", "PLACE", "PULLED PLACE", *PACKETS, *ROWS)
SIZES = (8, 16, 64, 520, 1024, 4096)  # elements of 16 bits; 8 are one vector, which one owner has
HIDDEN = 128
SHAPES = (Shape(3, 64), Shape(2, 32, rows_at_once=2), Shape(3, 64, scatter_lanes=1))


@dataclasses.dataclass(frozen=True)
class Made:
    """A call of all ranks."""

    what: str
    start: Callable[[int], None]
    check: Callable[[], None]


def _rows(group: LocalGroup, kind: str, draw: random.Random, what: str) -> Made:
    seed, rows, shape = draw.randrange(1 << 20), draw.choice((1, 2, 5)), draw.choice(SHAPES)
    inputs = [rank_input(seed, rank, rows * HIDDEN, torch.bfloat16) for rank in range(group.world_size)]
    moved = [part.view(rows, HIDDEN).to(group.device_of(rank)) for rank, part in enumerate(inputs)]
    boundary = random_boundary(seed, rows, HIDDEN, torch.bfloat16, draw.choice(every_quant(HIDDEN)))
    call = FusedCall(group, ALGORITHMS[kind.removeprefix("rows by ")], _C.PUSH, shape, moved[0], boundary)
    outputs = [call.outputs(part) for part in moved]

    def check() -> None:
        expected = boundary.expected(rank_ordered_sum(inputs).view(rows, HIDDEN))
        for rank, output in enumerate(outputs):
            assert_same(output, expected, f"{what}, rank {rank}")

    return Made(what, lambda rank: call.start(rank, moved[rank], outputs[rank]), check)


def _call(group: LocalGroup, kind: str, draw: random.Random, what: str) -> Made:
    seed, size = draw.randrange(1 << 20), draw.choice(SIZES)
    inputs = [rank_input(seed, rank, size, torch.bfloat16) for rank in range(group.world_size)]
    moved = [part.to(group.device_of(rank)) for rank, part in enumerate(inputs)]
    outputs = [poison(torch.empty_like(part)) for part in moved]
    split = draw.choice((None, (1, 1)))
    unsplit, wire_format = None, WireFormat.FP8
    algorithm = kind
    if kind in PACKETS:
        name, _, wire = kind.partition(" of ")
        algorithm, split, unsplit, wire_format = "LOWPRECISION", None, ALGORITHMS[name], WireFormat(wire)

    def settle() -> None:
        group.split, group.unsplit, group.wire_format = split, unsplit, wire_format
        group.use("two_shot")

    def start(rank: int) -> None:
        settle()
        if kind == "PULL":
            group.start_pull(rank, moved, outputs[rank])
        elif kind == "PLACE":
            group.start_place(rank, moved[rank], outputs)
        elif kind == "PULLED PLACE":
            group.split = None
            group.start_place(rank, moved[rank], outputs, inputs=moved)
        else:
            group.start(rank, algorithm, moved[rank], outputs[rank])

    def check() -> None:
        settle()
        expected = rank_ordered_sum(inputs)
        if kind in PACKETS:
            expected = expected_sum(group.launch_of(algorithm, message_of(inputs[0])), inputs)
        for rank, output in enumerate(outputs):
            assert_same_bits(output.cpu(), expected, f"{what}, rank {rank}")

    return Made(what, start, check)


def run_mixed(group: LocalGroup, seed: int, number: int, *, at_once: int) -> None:
    """So many calls of kinds that are drawn, ``at_once`` of them given to every rank before it has ended the first.

    Of a group of four lanes. Slots hold the marker whenever all ranks have ended.
    """
    draw = random.Random(seed)
    for first in range(0, number, at_once):
        made = []
        for call in range(first, min(first + at_once, number)):
            kind = draw.choice(KINDS)
            make = _rows if kind in ROWS else _call
            made.append(make(group, kind, draw, f"{seed=}, call {call}, {kind}"))
        group.machine.synchronize()
        for rank in range(group.world_size):
            for each in made:
                each.start(rank)
        group.finish()
        for each in made:
            each.check()
        assert_at_rest(group.buffers, group._locals(), group.layout)
