"""A short run of every kernel: ``compute-sanitizer --tool memcheck python -m tests.gpu.sanitizer_run``.

But not of those that go by multicast, nor of the halves of several hosts, which ``tests/gpu/test_hosts.py`` runs.
``tests/kernels/test_sanitizer_run.py`` compares what runs with the list of all kernels.

World sizes as arguments, to share the work out: ``python -m tests.gpu.sanitizer_run 2 5``. ``--parts norms`` runs one
part; ``--short`` takes one size and one output of each norm kernel, for racecheck, under which a launch takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.algorithms.facts import PAIR
from llm_allreduce_plugin.algorithms.fused import MOST_RANKS, WARP
from llm_allreduce_plugin.algorithms.low_precision import LARGEST_WORLD_SIZE
from llm_allreduce_plugin.algorithms.staging import FEWEST_RANKS
from llm_allreduce_plugin.config import WireFormat
from tests.support.local_group import LocalGroup, message_of
from tests.support.low_precision import ANY_OWNER, DOMAINS, expected_sum
from tests.support.norm_group import (
    Shape,
    assert_same,
    check,
    every_quant,
    outputs_for,
    random_boundary,
    tensors_of,
)
from tests.support.reference import assert_same_bits, rank_input, rank_ordered_sum

WORLD_SIZES = (2, 4, 16)
PARTS = ("exact", "compressed", "several", "norms")
EXACT: dict[str, dict[str, Any]] = {
    "in band": {},
    "split": {"split": (1, 1)},
    "flagged": {"in_band": False},
    "host": {"host": True},
}
# Beside ONESHOT and TWOSHOT: where ranks read each other's inputs in place, or store into each other's outputs.
IN_PLACE = {"in band": ("PULL", "PLACE", "PULLED PLACE"), "split": ("PLACE",)}
COMPRESSED: dict[str, dict[str, Any]] = {
    "split": {"split": (1, 1)},
    "not split": {"unsplit": Algorithm.TWO_SHOT},
    "one step": {"unsplit": Algorithm.ONE_SHOT},
    "one step, host": {"unsplit": Algorithm.ONE_SHOT, "host": True},
    "flagged": {"in_band": False},
    "host": {"host": True},
}
# Norms: threads of a block that only rows of more vectors than other blocks have threads need; blocks that share a row.
WIDE_THREADS, CLUSTER = 544, 4
MANY_ROWS = 264  # from which on a norm alone has several blocks to a multiprocessor
IN_CLUSTERS = "a cluster to a row"
Tell = Callable[[str], None]


def staged(world_size: int) -> None:
    for wire in WireFormat:
        group = LocalGroup(
            world_size, in_band=False, lanes=2, workspace_mib=2, timeout_s=30.0, wire_format=wire, staged=True
        )
        for size in (1, 1025, 40_001):
            inputs = [rank_input(size, rank, size, torch.bfloat16) for rank in range(world_size)]
            for output in group.all_reduce("TWOSHOT", inputs):
                assert_same_bits(output, rank_ordered_sum(inputs), f"staged x {size}")
            expected = expected_sum(group.launch_of("LOWPRECISION", message_of(inputs[0])), inputs)
            for output in group.all_reduce("LOWPRECISION", inputs):
                assert_same_bits(output, expected, f"staged {wire} x {size}")


def forms(world_size: int) -> None:
    """LOWPRECISION as a ring, and over domains where two of equal size are possible."""
    cases: list[tuple[str, tuple[int, ...] | None]] = [("ring", None)]
    if world_size == len(DOMAINS["2+2 in turns"]):
        cases.append(("hierarchical", DOMAINS["2+2 in turns"]))
    for (algorithm, domains), wire, host in itertools.product(cases, ANY_OWNER, (False, True)):
        group = LocalGroup(
            world_size, lanes=3, workspace_mib=2, timeout_s=30.0, wire_format=wire, in_band=False, host=host
        )
        group.use(algorithm, domains)
        for size in (1, 1025, 40_000):
            inputs = [rank_input(size, rank, size, torch.bfloat16) for rank in range(world_size)]
            expected = expected_sum(group.launch_of("LOWPRECISION", message_of(inputs[0])), inputs)
            for output in group.all_reduce("LOWPRECISION", inputs):
                assert_same_bits(output, expected, f"{algorithm} {wire} x {size}")


def exact_cases(kind: str) -> Iterator[tuple[str, torch.dtype, int]]:
    """Algorithm, type and elements of each call of a kind of group. Inputs that are read in place are whole vectors."""
    algorithms = ("ONESHOT", "TWOSHOT", *IN_PLACE.get(kind, ()))
    for algorithm, dtype in itertools.product(algorithms, (torch.bfloat16, torch.float32)):
        for size in (40_000, 8) if algorithm.startswith("PULL") else (1, 1023, 40_001, 40_000):
            yield algorithm, dtype, size


def exact(world_size: int, kind: str) -> None:
    """Calls that sum exactly, and the probe."""
    group = LocalGroup(world_size, lanes=3, workspace_mib=2, timeout_s=30.0, **EXACT[kind])
    for algorithm, dtype, size in exact_cases(kind):
        inputs = [rank_input(size, rank, size, dtype) for rank in range(world_size)]
        for output in group.all_reduce(algorithm, inputs):
            assert_same_bits(output, rank_ordered_sum(inputs), f"{algorithm} {dtype} x {size}")
    for workspace, stream in zip(group.workspaces, group.streams, strict=True):
        workspace.probe_write(7, stream.cuda_stream)
    group.finish()
    verdict = torch.zeros(world_size, dtype=torch.int32, device=group.device)
    group.workspaces[1].probe_check(7, verdict.data_ptr(), group.streams[1].cuda_stream)
    group.finish()
    assert verdict.tolist() == [3] * world_size


def compressed_kinds(wire: WireFormat) -> Iterator[str]:
    """The kinds of groups in which a format travels in two steps, or in one."""
    for kind, settings in COMPRESSED.items():
        one_step_of_rows = settings.get("unsplit") is Algorithm.ONE_SHOT and wire.keeps_rows
        if kind in ("flagged", "host") or (wire.goes_in_band and not (one_step_of_rows and "host" in settings)):
            yield kind


def compressed(world_size: int, wire: WireFormat, kind: str) -> None:
    """LOWPRECISION in two steps, or in one."""
    group = LocalGroup(world_size, lanes=3, workspace_mib=2, timeout_s=30.0, wire_format=wire, **COMPRESSED[kind])
    for size in (1, 1025, 40_000):
        inputs = [rank_input(size, rank, size, torch.bfloat16) for rank in range(world_size)]
        expected = expected_sum(group.launch_of("LOWPRECISION", message_of(inputs[0])), inputs)
        for output in group.all_reduce("LOWPRECISION", inputs):
            assert_same_bits(output, expected, f"{wire} x {size}")


@dataclasses.dataclass(frozen=True)
class NormedCall:
    """A kernel that norms, and how it is asked for. ``host``: in a group through host memory."""

    name: str
    algorithm: Algorithm
    shape: Shape
    hidden: int
    host: bool = False


def normed_calls(world_size: int, hidden: int) -> Iterator[NormedCall]:
    """All forms there are for so many ranks. ``hidden``: of a row, but for what only longer ones are for."""
    one, two = Algorithm.ONE_SHOT, Algorithm.TWO_SHOT
    single, double = (math.ceil(hidden / 8 / units / WARP) * WARP for units in (1, 2))
    yield NormedCall("a block to a row", one, Shape(4, single), hidden)
    yield NormedCall("two vectors to a thread", one, Shape(4, double), hidden)
    yield NormedCall("lanes that push", one, Shape(4, single, scatter_lanes=1), hidden)
    yield NormedCall("a block to a row", two, Shape(4, single, rows_at_once=3), hidden)
    yield NormedCall("two vectors to a thread", two, Shape(4, double), hidden)
    yield NormedCall("lanes that push or drain", two, Shape(4, single, scatter_lanes=1, drain_lanes=1), hidden)
    yield NormedCall("host memory", one, Shape(4, min(single, 256)), hidden, host=True)
    if world_size == PAIR:
        yield NormedCall("a wide block to a row", one, Shape(2, WIDE_THREADS), 8 * WIDE_THREADS)
    yield NormedCall(  # last: racecheck takes many minutes for it
        IN_CLUSTERS, one, Shape(4, 256, cluster=CLUSTER), hidden
    )


def normed(world_size: int, tell: Tell, *, short: bool, leave_out: Container[str] = ()) -> None:
    """The sum with a norm behind it. ``leave_out``: names of calls."""
    for hidden, rows in ((512, 3),) if short else ((512, 7), (2880, 3)):
        for index, call in enumerate(normed_calls(world_size, hidden)):
            if call.name in leave_out:
                continue
            lanes = 4 if call.host else 8
            group = LocalGroup(world_size, lanes=lanes, workspace_mib=8, timeout_s=30.0, host=call.host)
            quants = every_quant(call.hidden)
            for quant in (quants[index % len(quants)],) if short else quants:
                inputs = [
                    rank_input(rows, rank, rows * call.hidden, torch.bfloat16).view(rows, call.hidden)
                    for rank in range(world_size)
                ]
                boundary = random_boundary(rows, rows, call.hidden, torch.bfloat16, quant)
                exchange = _C.SHARED if call.host else _C.PUSH
                what = f"{call.algorithm.name} {call.shape} {quant}"
                check(group, call.algorithm, exchange, call.shape, inputs, boundary, what)
            tell(f"{world_size} ranks, {call.hidden} wide, with a norm: {call.algorithm.name}, {call.name}")


def alone(tell: Tell, *, short: bool) -> None:
    """The norm by itself: a vector to a thread, also in wide blocks, or two; many rows; rows longer than a block."""
    group = LocalGroup(2, workspace_mib=1)
    native = group.machine.native
    for dtype, (rows, hidden) in itertools.product(
        (torch.bfloat16, torch.float32), ((3, 512), (3, 8 * WIDE_THREADS), (MANY_ROWS, 512), (3, 16392))
    ):
        quants = every_quant(hidden)
        for quant in quants[-1:] if short else quants:
            boundary = random_boundary(rows, rows, hidden, dtype, quant)
            there = boundary.on(group.device)
            sums = rank_input(rows, 0, rows * hidden, dtype).view(rows, hidden)
            moved = sums.to(group.device)
            outputs = outputs_for(moved, there)
            group.machine.synchronize()
            native.rms_norm(
                boundary.norm(rows, native), tensors_of(outputs, there, native), moved.data_ptr(),
                outputs.residual_out.data_ptr(), moved.numel(), 0 if dtype is torch.float32 else 2,
                group.machine.index(0), group.streams[0].cuda_stream,
            )  # fmt: skip
            group.machine.synchronize()
            assert_same(outputs, boundary.expected(sums), f"alone, {dtype} {rows} x {hidden}, {quant}")
        tell(f"{rows} rows of {hidden} {dtype}, a norm alone")


def main(world_sizes: tuple[int, ...], parts: tuple[str, ...], *, short: bool) -> None:
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {what}", flush=True)  # noqa: T201

    if "norms" in parts:
        alone(tell, short=short)
    for world_size, part in itertools.product(world_sizes, parts):
        if part == "exact":
            for kind in EXACT:
                exact(world_size, kind)
                tell(f"{world_size} ranks, {kind}")
        elif part == "norms" and world_size <= MOST_RANKS:
            normed(world_size, tell, short=short)
        elif part == "compressed" and world_size <= LARGEST_WORLD_SIZE:
            for wire in WireFormat:
                for kind in compressed_kinds(wire):
                    compressed(world_size, wire, kind)
                    tell(f"{world_size} ranks, {wire}, {kind}")
        elif part == "several" and FEWEST_RANKS <= world_size <= LARGEST_WORLD_SIZE:
            staged(world_size)
            tell(f"{world_size} ranks, staged")
            forms(world_size)
            tell(f"{world_size} ranks, ring and hierarchical")
    tell(f"every kernel of {', '.join(parts)} ran")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world_sizes", nargs="*", type=int, default=WORLD_SIZES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--short", action="store_true", help="one size and one output of each norm kernel")
    arguments = parser.parse_args()
    main(tuple(arguments.world_sizes), tuple(arguments.parts), short=arguments.short)
