"""What follows from call to call, emulated: generations, counts, and waits that end."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.decision import Algorithm
from llm_allreduce_plugin.runtime.failures import failure_of
from tests.gpu.test_staged import check_streams
from tests.kernels.test_exact import group_of, inputs_of, reduce_and_compare
from tests.kernels.test_low_precision import compare
from tests.support.emulator import BrokenContextError, needs_emulator, seeds
from tests.support.in_band_rest import EPOCH_PLANES, assert_at_rest, plane_of
from tests.support.local_group import LocalGroup, message_of
from tests.support.local_machine import EmulatedGpus
from tests.support.low_precision import expected_sum
from tests.support.mixed_calls import run_mixed
from tests.support.reference import assert_same_bits, poison, rank_ordered_sum

pytestmark = needs_emulator

ALGORITHMS = ("ONESHOT", "TWOSHOT")
KINDS: dict[str, dict[str, Any]] = {
    "in band": {"workspace_mib": 0.25},
    "in band, split": {"split": (1, 1), "lanes": 4, "workspace_mib": 0.25},
    "flagged": {"in_band": False, "workspace_mib": 0.25},
    "host": {"host": True, "workspace_mib": 0.25},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
Call = tuple[str, int]  # algorithm, and elements of bf16


def run_queued(group: LocalGroup, calls: Sequence[Call], what: str) -> None:
    """Gives every rank all calls at once: a rank may be ahead of another by as many as the protocol lets it."""
    made = []
    for number, (algorithm, size) in enumerate(calls):
        inputs = inputs_of(number, group.world_size, size, torch.bfloat16)
        outputs = [poison(torch.empty_like(part)) for part in inputs]
        made.append((algorithm, inputs, outputs))
    for rank in range(group.world_size):
        for algorithm, inputs, outputs in made:
            if algorithm == "PULL":
                group.start_pull(rank, inputs, outputs[rank])
            elif algorithm == "PLACE":
                group.start_place(rank, inputs[rank], outputs)
            elif algorithm == "PULLED PLACE":
                group.start_place(rank, inputs[rank], outputs, inputs=inputs)
            else:
                group.start(rank, algorithm, inputs[rank], outputs[rank])
    group.finish()
    for number, (algorithm, inputs, outputs) in enumerate(made):
        lossy = algorithm == "LOWPRECISION"
        launch = group.launch_of(algorithm, message_of(inputs[0])) if lossy else None
        expected = rank_ordered_sum(inputs) if launch is None else expected_sum(launch, inputs)
        for rank, output in enumerate(outputs):
            assert_same_bits(output, expected, f"{what}, call {number}, {algorithm}, rank {rank}")
    assert_at_rest(group.buffers, group._locals(), group.layout)


@EVERY_KIND
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_calls_that_follow_each_other(world_size: int, kind: dict[str, Any]) -> None:
    """Without a stop between them: kernels start while those before them end."""
    for seed in seeds(4):
        generator = random.Random(seed)
        group = group_of(seed, world_size, kind)
        sizes = (8, 64, 520, 1024, 4096)
        run_queued(group, [(generator.choice(ALGORITHMS), generator.choice(sizes)) for _ in range(12)], f"{seed=}")


@pytest.mark.parametrize("world_size", (2, 4))
def test_inputs_read_in_place_among_other_calls(world_size: int) -> None:
    for seed in seeds(4):
        generator = random.Random(seed)
        group = group_of(seed, world_size, {"workspace_mib": 0.5})
        calls = [(generator.choice((*ALGORITHMS, "PULL")), generator.choice((8, 512, 4096))) for _ in range(12)]
        run_queued(group, calls, f"{seed=}")


@pytest.mark.parametrize("at_once", (1, 12), ids=("one by one", "queued"))
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_calls_of_every_kind_share_slots(world_size: int, at_once: int) -> None:
    for seed in seeds(2):
        machine = EmulatedGpus(seed)
        group = LocalGroup(world_size, machine=machine, lanes=4, threads=64, workspace_mib=0.1)
        run_mixed(group, seed, 12, at_once=at_once)


@pytest.mark.parametrize(
    ("exact", "unsplit", "world_size", "packed"),
    [
        ("ONESHOT", Algorithm.ONE_SHOT, 2, 70_001),
        ("ONESHOT", Algorithm.ONE_SHOT, 3, 70_001),
        ("TWOSHOT", Algorithm.TWO_SHOT, 2, 132_001),
        ("TWOSHOT", Algorithm.TWO_SHOT, 3, 198_001),
    ],
)
def test_large_calls_through_host_memory(exact: str, unsplit: Algorithm, world_size: int, packed: int) -> None:
    """They ask for what peers have stored, clear on the way what is two calls old, and poll for what has not come.

    ``packed``: elements. In two steps packets are many where those of a rank's part are, so it grows with the ranks.
    """
    for seed in seeds(2):
        generator = random.Random(seed)
        settings = {"host": True, "workspace_mib": 8, "unsplit": unsplit, "lanes": 4, "threads": 256}
        group = group_of(seed, world_size, settings)
        calls = [(exact, 40_009), ("LOWPRECISION", packed), (exact, 520), ("LOWPRECISION", 3000)] * 2
        generator.shuffle(calls)
        run_queued(group, calls, f"{seed=}")


@pytest.mark.parametrize("unsplit", (Algorithm.ONE_SHOT, Algorithm.TWO_SHOT), ids=("one step", "two steps"))
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_packets_among_other_calls(world_size: int, unsplit: Algorithm) -> None:
    """They share slots and counts with the exact calls of the same algorithm."""
    for seed in seeds(4):
        generator = random.Random(seed)
        group = group_of(seed, world_size, {"workspace_mib": 0.5, "unsplit": unsplit})
        algorithms = ("LOWPRECISION", "LOWPRECISION", *ALGORITHMS)
        calls = [(generator.choice(algorithms), generator.choice((8, 512, 5000))) for _ in range(12)]
        run_queued(group, calls, f"{seed=}")


@pytest.mark.parametrize("in_band", (True, False), ids=("in band", "flagged"))
@pytest.mark.parametrize("world_size", (3, 4, 8))
def test_all_on_one_workspace(world_size: int, in_band: bool) -> None:
    """Exact, compressed and staged calls in any order, with grids and rounds of all sizes."""
    for seed in seeds(1):
        generator = random.Random(seed)
        group = group_of(seed, world_size, {"in_band": in_band, "lanes": 5, "workspace_mib": 1, "staged": True})
        for call in range(24):
            what = f"call {call}, {seed=}"
            size = 1 + generator.randrange(1 << generator.randrange(4, 14))
            dtype = generator.choice((torch.bfloat16, torch.float16))
            inputs = inputs_of(seed + call, world_size, size, dtype)
            group.staged = generator.random() < 0.5
            algorithm = generator.choice(("ONESHOT", "TWOSHOT", "LOWPRECISION"))
            if algorithm == "LOWPRECISION":
                compare(group, inputs, what)
            else:
                reduce_and_compare(group, algorithm, inputs, what)


@pytest.mark.parametrize("host", (False, True), ids=("peer", "host"))
def test_forms_of_low_precision_share_slots(host: bool) -> None:
    domains = (0, 1, 0, 1)
    for seed in seeds(2):
        generator = random.Random(seed)
        group = group_of(seed, 4, {"host": True} if host else {"in_band": False}, workspace_mib=0.5, lanes=4)
        for call in range(16):
            what, size = f"call {call}, {seed=}", generator.choice((512, 5000, 20_001))
            inputs = inputs_of(seed + call, 4, size, torch.bfloat16)
            form = generator.choice(("TWOSHOT", "two_shot", "ring", "hierarchical"))
            if form == "TWOSHOT":
                reduce_and_compare(group, form, inputs, what)
                continue
            group.use(form, domains if form == "hierarchical" else None)
            compare(group, inputs, f"{what}, {form}")


def test_epoch_wraps_around() -> None:
    """Rounds are counted in 32 bits."""
    for seed in seeds(2):
        group = group_of(seed, 4, {"in_band": False, "workspace_mib": 0.25})
        layout = group.layout
        for buffer in group.buffers:
            # From the epochs to the end of the flags, all that flagged calls look at is a round number.
            buffer[layout.epochs_offset : layout.probe_offset].view(torch.int32).fill_(-6)
        for call in range(8):
            for algorithm in ALGORITHMS:
                reduce_and_compare(group, algorithm, inputs_of(call, 4, 3000, torch.float16), f"call {call}, {seed=}")
        wrapped = group.buffers[0][layout.epochs_offset : layout.epochs_offset + 4].view(torch.int32).item()
        assert 0 <= wrapped < 1000, "the epochs should have passed zero"


@pytest.mark.parametrize("kind", [KINDS[name] for name in ("in band", "in band, split", "host")])
def test_in_band_epochs_wrap_around(kind: dict[str, Any]) -> None:
    for seed in seeds(2):
        group = group_of(seed, 4, kind | {"workspace_mib": 1})
        for epochs in group.in_band_epochs():
            epochs.fill_(-5)
        run_queued(group, [(algorithm, size) for size in (1024, 8, 4096) * 4 for algorithm in ALGORITHMS], f"{seed=}")
        calls = dict.fromkeys(EPOCH_PLANES, 0)
        for algorithm in ALGORITHMS * 12:  # each call is one round
            calls[plane_of(group.layout, algorithm)] += 1
        for epochs in group.in_band_epochs():
            assert epochs.tolist() == [[-5 + number] * group.lanes for number in calls.values()]


@EVERY_KIND
def test_blocks_that_are_not_resident_together(kind: dict[str, Any]) -> None:
    """A GPU with room for one block at a time: no block waits for a later one of its grid."""
    for seed in seeds(3):
        machine = EmulatedGpus(seed, blocks=1)
        group = LocalGroup(3, machine=machine, **({"lanes": 4, "threads": 32} | kind))
        run_queued(group, [(algorithm, size) for size in (8, 4096, 1024) for algorithm in ALGORITHMS], f"{seed=}")


def test_staged_calls_need_all_their_blocks() -> None:
    group = LocalGroup(3, machine=EmulatedGpus(0, blocks=2), lanes=4, threads=32, workspace_mib=1, staged=True)
    data = torch.zeros(20_000, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot run all blocks of the call at the same time"):
        group.start(0, "TWOSHOT", data, torch.empty_like(data))


WAITS = [
    *(("ONESHOT", "gather", kind) for kind in KINDS.values()),
    *(("TWOSHOT", "scatter", kind) for kind in KINDS.values() if "split" not in kind),
    ("TWOSHOT", "scatter", {"staged": True, "workspace_mib": 0.5}),
    ("LOWPRECISION", "scatter", {"in_band": False, "workspace_mib": 0.5}),
    # Lanes that only drain wait for results from the start, and may be the first to give up.
    ("TWOSHOT", "(scatter|gather)", KINDS["in band, split"]),
    ("LOWPRECISION", "(scatter|gather)", KINDS["in band, split"] | {"workspace_mib": 0.5}),
]


@pytest.mark.parametrize("world_size", (3, 4, 5, 8))
def test_staged_calls_have_one_stream_out_and_one_in(world_size: int) -> None:
    held_back = 0
    for seed in seeds(3):
        group = group_of(seed, world_size, {"in_band": False, "staged": True, "workspace_mib": 0.25})
        inputs = inputs_of(seed, world_size, 8192, torch.bfloat16)
        reduce_and_compare(group, "TWOSHOT", inputs, f"{seed=}")
        held_back += check_streams(group, group.launch_of("TWOSHOT", message_of(inputs[0])).rounds)
    assert held_back > 0, "no stream ever had to wait for another: the test shows nothing"


@pytest.mark.parametrize(("algorithm", "phase", "kind"), WAITS)
def test_missing_rank_stops_the_others_with_a_named_error(algorithm: str, phase: str, kind: dict[str, Any]) -> None:
    for seed in seeds(2):
        group = group_of(seed, 4, kind, timeout_s=2.0)
        inputs = inputs_of(seed, 4, 1024, torch.bfloat16)
        for rank in (0, 1, 3):
            group.start(rank, algorithm, inputs[rank], torch.empty_like(inputs[rank]))
        with pytest.raises(BrokenContextError):
            group.machine.synchronize()
        failures = [str(failure) for rank in (0, 1, 3) if (failure := failure_of(group.workspaces[rank])) is not None]
        assert len(failures) == 3, failures
        named = re.compile(f"rank [013] waited 2[.0-9]* s for rank 2 in {algorithm}/{phase}")
        assert any(map(named.fullmatch, failures)), failures
        assert not group.machine.library.is_broken(2)
        with pytest.raises(RuntimeError, match="launch failure"):
            group.machine.native.encode(
                _C.WIRE_FP8, 2, inputs[0].data_ptr(), 8, inputs[1].data_ptr(), group.streams[0].cuda_stream
            )


def test_the_same_seed_is_the_same_run() -> None:
    """And another one another."""

    def steps(seed: int) -> int:
        group = group_of(seed, 3, {"workspace_mib": 0.25})
        before = group.machine.library.now_ns()
        reduce_and_compare(group, "TWOSHOT", inputs_of(1, 3, 1024, torch.bfloat16), f"{seed=}")
        return group.machine.library.now_ns() - before

    assert [steps(seed) for seed in range(4)] == [steps(seed) for seed in range(4)]
    assert len({steps(seed) for seed in range(4)}) > 1
