"""Errors in the kernels that the emulator must show: one build has them all, and makes the one that it is told to."""

from __future__ import annotations

import functools
import importlib
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from tests.gpu.test_low_precision import compare
from tests.gpu.test_staged import check_streams
from tests.kernels import planted
from tests.kernels.planted import MUTATIONS
from tests.kernels.planted.kinds import (
    FLAGGED,
    FP8,
    GROUPS,
    HIERARCHICAL,
    HOST,
    HOST_ROWS,
    HOSTS,
    IN_BAND,
    LARGE_HOST,
    LARGE_HOST_IN_TWO_STEPS,
    LARGE_HOST_IN_TWO_STEPS_OF_FIVE,
    LARGE_HOST_IN_TWO_STEPS_OF_THREE,
    LARGE_HOST_OF_THREE,
    MANY,
    MIXED,
    MULTICAST,
    ONE_STEP,
    PLACES,
    PULLED_PLACES,
    REGISTRY,
    RING,
    ROWS,
    ROWS_OF_TWO,
    SPLIT,
    STAGED,
    UNSPLIT,
)
from tests.kernels.test_exact import inputs_of, reduce_and_compare
from tests.kernels.test_hosts import compare as compare_hosts
from tests.kernels.test_protocol import run_queued
from tests.kernels.test_registry import WORLD_SIZES, compare_rows
from tests.support import emulator
from tests.support.host_group import HostGroup
from tests.support.hosts import telling_inputs
from tests.support.in_band_rest import EPOCH_PLANES
from tests.support.local_group import LocalGroup, message_of
from tests.support.local_machine import EmulatedGpus
from tests.support.mixed_calls import run_mixed
from tests.support.multicast_checks import compare_exact, compare_in_switch
from tests.support.norm_group import Shape, check, every_quant, random_boundary
from tests.support.reference import assert_same_bits, rank_ordered_sum
from tests.support.soft_switch import MulticastGroup

pytestmark = emulator.needs_emulator

ROW = 384  # elements of a row that is normed
HOST_ROW = 2048  # the same through host memory: for every worker of four lanes
WHOLE_STRIDES = 65_536  # elements: of the last stride of vectors, and of those of half of them, no worker has none
# By the number of ranks: elements of which a rank's part is large as packets, with more of them and with fewer.
LARGE_PARTS = {2: (150_000, 132_000), 3: (210_000, 198_000), 5: (340_000, 328_000)}
SEEDS = 12  # in which an error must show at least once


@functools.cache
def mutated() -> emulator.Library:
    patches: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for number, (file, old, new, *_) in enumerate(MUTATIONS.values(), 1):
        patches[file].append((old, new.format(f"(::emulator::mutation == {number})")))
    return emulator.Library(emulator.build(patches))


def stress(seed: int, kind: dict[str, Any]) -> None:
    """Calls of which each kind of error must spoil some."""
    generator = random.Random(seed)
    if kind is REGISTRY:
        for world_size in WORLD_SIZES:
            compare_rows(mutated(), world_size)
        return
    for name, stress_of_its_own in STRESSES.items():
        if name in kind:
            stress_of_its_own(seed)
            return
    kind = dict(kind)
    ranks, compressed = kind.pop("ranks", 4), kind.pop("low_precision", "algorithm" in kind)
    machine = EmulatedGpus(seed, library=mutated())
    group = LocalGroup(ranks, machine=machine, **({"lanes": 3, "threads": 64} | kind))
    if compressed:
        for turn in range(3):
            size = generator.choice((512, 10_001))
            compare(group, inputs_of(seed + turn, ranks, size, torch.bfloat16), f"call {turn}, {seed=}")
        if "unsplit" in kind:
            run_queued(group, [("LOWPRECISION", generator.choice((512, 3001))) for _ in range(6)], f"queued, {seed=}")
        return
    if "staged" in kind:
        inputs = inputs_of(seed, ranks, 8192, torch.bfloat16)
        reduce_and_compare(group, "TWOSHOT", inputs, f"staged, {seed=}")
        check_streams(group, group.launch_of("TWOSHOT", message_of(inputs[0])).rounds)
    if ranks > 8:
        run_queued(group, [(algorithm, 1024) for algorithm in ("TWOSHOT", "ONESHOT", "TWOSHOT", "ONESHOT")], f"{seed=}")
        start_without_the_last(group)
        return
    sizes = (8, 1024, 8192) if "split" in kind else (8, 520, 1024, 8192)
    calls = []
    for algorithm in ("TWOSHOT", "ONESHOT", "TWOSHOT", "ONESHOT"):
        calls += [(algorithm, generator.choice(sizes)) for _ in range(1 + generator.randrange(5))]
    run_queued(group, calls, f"{seed=}")
    marker = torch.full((512,), _C.IN_BAND_MARKER - (1 << 32), dtype=torch.int32).view(torch.bfloat16)
    for output in group.all_reduce("TWOSHOT", [marker] * ranks):
        assert (output == 0).all()


def over_hosts(seed: int) -> None:
    """Three hosts of three: two hosts may be swapped, as two ranks, and the sum is the same."""
    for shared in (False, True):
        group = HostGroup(EmulatedGpus(seed, library=mutated()), 3, 3, shared=shared)
        for call, two_steps in enumerate((False, True, True, False)):
            inputs = telling_inputs(seed + call, group.world_size, 777, torch.bfloat16)
            compare_hosts(group, inputs, f"call {call}, {seed=}", two_steps=two_steps, chunk=2)


def large_through_host_memory(seed: int, ranks: int = 2, algorithm: Algorithm = Algorithm.ONE_SHOT) -> None:
    """Four generations are used once more, by calls of which some have more than others: several vectors to a worker,
    or workers without any."""
    machine = EmulatedGpus(seed, library=mutated())
    lanes = (4, 24 if algorithm is Algorithm.ONE_SHOT else 40)[seed % 2]
    group = LocalGroup(ranks, machine=machine, host=True, lanes=lanes, workspace_mib=8, unsplit=algorithm)
    if algorithm is Algorithm.ONE_SHOT:
        calls = [("ONESHOT", 41_000), ("LOWPRECISION", 82_000), ("ONESHOT", 33_000), ("LOWPRECISION", 66_000)] * 2
        calls.append(("ONESHOT", WHOLE_STRIDES))
    else:
        most, fewest = LARGE_PARTS[ranks]
        calls = [("TWOSHOT", 41_000), ("LOWPRECISION", most), ("TWOSHOT", 33_000), ("LOWPRECISION", fewest)]
        calls += calls if ranks < 5 else [("TWOSHOT", 41_000), ("LOWPRECISION", fewest)]
        calls.append(("TWOSHOT", WHOLE_STRIDES))
    run_queued(group, calls, f"large, {seed=}")


def norm_rows_through_host_memory(seed: int) -> None:
    """A row that one lane has, and sums on all lanes, which clear what it has left."""
    group = LocalGroup(3, machine=EmulatedGpus(seed, library=mutated()), host=True, lanes=4, workspace_mib=0.5)
    for call in range(9):
        inputs = inputs_of(seed + call, 3, HOST_ROW, torch.bfloat16)
        if call % 4:
            reduce_and_compare(group, "ONESHOT", inputs, f"call {call}, {seed=}")
            continue
        boundary = random_boundary(seed + call, 1, HOST_ROW, torch.bfloat16)
        rows = [part.view(1, HOST_ROW) for part in inputs]
        check(group, Algorithm.ONE_SHOT, _C.SHARED, Shape(1, 64), rows, boundary, f"call {call}, {seed=}")


def norm_rows(seed: int) -> None:
    """Fused calls in which a lane has several rows."""
    group = LocalGroup(3, machine=EmulatedGpus(seed, library=mutated()), lanes=3, workspace_mib=0.5)
    quants = every_quant(ROW)
    for call in range(6):
        algorithm, shape = ((Algorithm.ONE_SHOT, Shape(2, 64)), (Algorithm.TWO_SHOT, Shape(1, 64)))[call % 2]
        inputs = [part.view(7, ROW) for part in inputs_of(seed + call, 3, 7 * ROW, torch.bfloat16)]
        boundary = random_boundary(seed + call, 7, ROW, torch.bfloat16, (quants[2], quants[-1])[call // 2 % 2])
        check(group, algorithm, _C.PUSH, shape, inputs, boundary, f"rows, call {call}, {seed=}")


def norm_rows_of_two(seed: int) -> None:
    """Threads with two units of a row, which add their own first."""
    group = LocalGroup(2, machine=EmulatedGpus(seed, library=mutated()), lanes=3, workspace_mib=0.5)
    for call in range(5):
        inputs = [part.view(7, ROW) for part in inputs_of(seed + call, 2, 7 * ROW, torch.bfloat16)]
        boundary = random_boundary(seed + call, 7, ROW, torch.bfloat16, None)
        check(group, Algorithm.ONE_SHOT, _C.PUSH, Shape(2, 32), inputs, boundary, f"rows, call {call}, {seed=}")


def into_registered_memory(seed: int) -> None:
    """Results that peers store into outputs, of which each is read before the next one may come."""
    generator = random.Random(seed)
    # Of lanes with one task each warp has several tiles, the last of which travels in band.
    for size, kind in ((1024, {"workspace_mib": 0.25}), (12_288, {"split": (1, 0), "workspace_mib": 1})):
        group = LocalGroup(3, machine=EmulatedGpus(seed, library=mutated()), **({"lanes": 3, "threads": 64} | kind))
        pools = [torch.full((4 * size,), 7.0, dtype=torch.bfloat16) for _ in range(3)]
        calls = []
        for number in range(8):
            inputs = inputs_of(seed + number, 3, size, torch.bfloat16)
            outputs = [pool[8 * rank + size * generator.randrange(2) :][:size] for rank, pool in enumerate(pools)]
            calls.append((inputs, outputs, [torch.zeros_like(part) for part in inputs]))
        for rank in range(3):
            for inputs, outputs, read in calls:
                group.start_place(rank, inputs[rank], outputs, pools)
                group.start(rank, "ONESHOT", outputs[rank], read[rank])
        group.machine.synchronize()
        for inputs, _, read in calls:
            expected = rank_ordered_sum([rank_ordered_sum(inputs)] * 3)
            for found in read:
                assert_same_bits(found, expected, f"places, {seed=}")


def out_of_registered_memory(seed: int) -> None:
    """Inputs that owners read in place: what the kernel before has written, and the one behind writes again."""
    generator = random.Random(seed)
    group = LocalGroup(3, machine=EmulatedGpus(seed, library=mutated()), lanes=3, threads=64, workspace_mib=0.25)
    size, apart = 3072, 5200
    inputs = inputs_of(seed, 3, size, torch.float32)
    moved = [part.clone() for part in inputs]
    pools = [torch.full((6 * apart,), 7.0) for _ in range(3)]
    made = []
    for turn in range(6):
        places = [apart * turn + 4 * generator.randrange(500) for _ in pools]
        made.append([pool[place:][:size] for pool, place in zip(pools, places, strict=True)])
    for rank in range(3):
        for outputs in made:
            group.start_place(rank, moved[rank], outputs, pools, moved)
            group.start(rank, "ONESHOT", outputs[rank], moved[rank])
    group.machine.synchronize()
    expected = rank_ordered_sum(inputs)
    for outputs in made:
        for output in outputs:
            assert_same_bits(output, expected, f"pulled places, {seed=}")
        expected = rank_ordered_sum([rank_ordered_sum([expected] * 3)] * 3)


def start_without_the_last(group: LocalGroup) -> None:
    """All other ranks must wait for it until they give up."""
    inputs = inputs_of(1, group.world_size, 1024, torch.bfloat16)
    outputs = [torch.empty_like(part) for part in inputs]  # alive until all have ended
    for rank in range(group.world_size - 1):
        group.start(rank, "TWOSHOT", inputs[rank], outputs[rank])
    try:
        group.machine.synchronize()
    except emulator.BrokenContextError:
        return
    message = "nobody has waited for the last rank"
    raise AssertionError(message)


def by_multicast(seed: int) -> None:
    """Queued calls of changing size, and sums in the switch."""
    generator = random.Random(seed)
    machine = EmulatedGpus(seed, library=mutated())
    group = MulticastGroup(
        4, machine=machine, lanes=3, threads=64, workspace_mib=0.25, multicast_kib=48, seed=seed, in_switch=True,
        limit_ms=20_000, timeout_s=8.0,
    )  # fmt: skip
    for epochs in group.in_band_epochs():  # soon at zero: flags that were never written would seem to be ahead of it
        epochs[list(EPOCH_PLANES).index("pushed")] = -200
    kinds = ("ONESHOT", "TWOSHOT", "TWOSHOT", "PUSH TWOSHOT", "PUSH ONESHOT")
    calls = [(generator.choice(kinds), generator.choice((8, 64, 520, 1024, 3001))) for _ in range(12)]
    group.most_bytes = 3008 * 2
    run_queued(group, calls, f"{seed=}")
    group.most_bytes = 256 * 2
    run_queued(group, [("ONESHOT", generator.choice((8, 64, 256))) for _ in range(40)], f"one step, {seed=}")
    compare_exact(group, "ONESHOT", inputs_of(seed, 4, 520, torch.float32), f"in order, {seed=}")
    for turn in range(2):
        compare_in_switch(group, inputs_of(seed + turn, 4, (2048, 777)[turn], torch.bfloat16), f"{seed=}")


def mixed(seed: int) -> None:
    """Calls of every kind, whose slots are the same bytes."""
    machine = EmulatedGpus(seed, library=mutated())
    run_mixed(LocalGroup(3, machine=machine, lanes=4, threads=64, workspace_mib=0.1), seed, 16, at_once=8)


STRESSES: dict[str, Callable[[int], None]] = {
    "rows": norm_rows,
    "rows of two ranks": norm_rows_of_two,
    "places": into_registered_memory,
    "pulled": out_of_registered_memory,
    "large host": large_through_host_memory,
    "large host, three ranks": functools.partial(large_through_host_memory, ranks=3),
    "large host, two steps": functools.partial(large_through_host_memory, algorithm=Algorithm.TWO_SHOT),
    "large host, two steps, three ranks": functools.partial(
        large_through_host_memory, ranks=3, algorithm=Algorithm.TWO_SHOT
    ),
    "large host, two steps, five ranks": functools.partial(
        large_through_host_memory, ranks=5, algorithm=Algorithm.TWO_SHOT
    ),
    "rows through host memory": norm_rows_through_host_memory,
    "hosts": over_hosts,
    "multicast": by_multicast,
    "mixed": mixed,
}
KINDS = {
    "in band": IN_BAND,
    "split": SPLIT,
    "flagged": FLAGGED,
    "host": HOST,
    "staged": STAGED,
    "ring": RING,
    "hierarchical": HIERARCHICAL,
    "in band, two ranks": IN_BAND | {"ranks": 2},
    "in band, five ranks": IN_BAND | {"ranks": 5},
    "in band, eight ranks": IN_BAND | {"ranks": 8},
    "fp8, five ranks": FP8 | {"ranks": 5},
    "fp8, no split": UNSPLIT,
    "fp8, no split, two ranks": UNSPLIT | {"ranks": 2},
    "fp8, one step": ONE_STEP,
    "fp8, one step, host": ONE_STEP | {"host": True},
    "large, host": LARGE_HOST,
    "large, host, three ranks": LARGE_HOST_OF_THREE,
    "large, host, two steps": LARGE_HOST_IN_TWO_STEPS,
    "large, host, two steps, three ranks": LARGE_HOST_IN_TWO_STEPS_OF_THREE,
    "large, host, two steps, five ranks": LARGE_HOST_IN_TWO_STEPS_OF_FIVE,
    "rows, host": HOST_ROWS,
    "fp8, one step, two ranks": ONE_STEP | {"ranks": 2},
    "fp8_group": GROUPS,
    "fp8_group, two ranks": GROUPS | {"unsplit": Algorithm.ONE_SHOT, "ranks": 2},
    "fp8_group, host": GROUPS | {"host": True},
    "fp8_group, flagged": GROUPS | {"in_band": False},
    "host, two ranks": HOST | {"ranks": 2},
    "host, five ranks": HOST | {"ranks": 5},
    "flagged, many ranks": FLAGGED | MANY,
    "staged, many ranks": STAGED | MANY,
    "registry": REGISTRY,
    "hosts": HOSTS,
    "rows": ROWS,
    "rows, two ranks": ROWS_OF_TWO,
    "multicast": MULTICAST,
    "mixed": MIXED,
    "places": PLACES,
    "pulled places": PULLED_PLACES,
}


def test_every_planted_error_is_tried() -> None:
    """Those of all files, under a name each."""
    files = [path.stem for path in Path(planted.__file__).parent.glob("*.py") if path.stem not in ("__init__", "kinds")]
    errors = [importlib.import_module(f"{planted.__name__}.{name}").ERRORS for name in files]
    assert sum(map(len, errors)) == len(MUTATIONS)
    assert {name for found in errors for name in found} == set(MUTATIONS)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nothing_is_wrong_without_an_error(kind: dict[str, Any]) -> None:
    mutated().mutate(0)
    for seed in emulator.seeds(kind.get("seeds", 4 if kind.get("ranks", 4) == 4 else 1)):
        stress(seed, kind)


@pytest.mark.parametrize(
    ("name", "group"), [(name, group) for name, error in MUTATIONS.items() for group in range(len(error) - 3)]
)
def test_an_error_shows(name: str, group: int) -> None:
    """As wrong bits, slots or counts, or as a wait that expires."""
    mutated().mutate(1 + list(MUTATIONS).index(name))
    try:
        for seed in range(SEEDS):
            try:
                stress(seed, MUTATIONS[name][3 + group])
            except (AssertionError, emulator.BrokenContextError, emulator.EmulatorError):
                return
    finally:
        mutated().mutate(0)
    pytest.fail(f"{SEEDS} runs in which {name}, and nothing showed")
