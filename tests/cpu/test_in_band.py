"""CPU ranks that exchange in band: the default protocol of GPUs, against the sum in rank order.

Ranks are threads (``CpuGroup``), so that any rank can be late or absent; and processes over shared memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import random
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from llm_allreduce_plugin import _C, RankMismatchError
from llm_allreduce_plugin.base.agreement import Agreement
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.runtime.failures import breakage_of, failure_of
from llm_allreduce_plugin.transport.shm import ShmMemory
from llm_allreduce_plugin.transport.symmetric import initialize
from tests.support.cpu_group import CpuGroup
from tests.support.forked import forked
from tests.support.in_band_rest import EPOCH_PLANES, assert_at_rest, assert_shared_at_rest, in_band_epochs, plane_of
from tests.support.reference import (
    DTYPES,
    assert_same_bits,
    fresh_seed,
    poison,
    rank_input,
    rank_ordered_sum,
    special_inputs,
)

ALGORITHMS = {"ONESHOT": _C.ONE_SHOT, "TWOSHOT": _C.TWO_SHOT}
EXCHANGES = {"push": _C.PUSH, "shared": _C.SHARED}
SIZES = (1, 3, 7, 8, 9, 63, 65, 1000, 4099)
WRAP = 1 << 32
IN_BAND_BYTES = 1 << 17


def group_of(world_size: int, exchange: str, *, timeout_s: float = 20.0) -> CpuGroup:
    return CpuGroup(world_size, workspace_bytes=IN_BAND_BYTES, shared=exchange == "shared", timeout_s=timeout_s)


def largest_chunk(layout: _C.Layout, algorithm: str, exchange: int) -> int:
    """In vectors: what a slot holds."""
    slots = layout.flagged if exchange == _C.FLAGS else layout.in_band
    return (slots.one_shot_bytes if algorithm == "ONESHOT" else slots.two_shot_bytes) // _C.VECTOR_BYTES


def set_epochs(group: CpuGroup, value: int) -> None:
    """What so many in-band calls would have left, of slots that are at rest."""
    for buffer in buffers_of(group):
        in_band_epochs(buffer, group.layout).fill_((value % WRAP) - (WRAP if value % WRAP >= WRAP // 2 else 0))


def buffers_of(group: CpuGroup) -> list[torch.Tensor]:
    return [torch.frombuffer(buffer, dtype=torch.uint8) for buffer in group.buffers]


def assert_rest(group: CpuGroup) -> None:
    buffers = buffers_of(group)
    assert_at_rest(buffers, buffers, group.layout)
    assert_shared_at_rest(buffers, buffers, group.layout)


def compare(
    group: CpuGroup, algorithm: str, exchange: int, inputs: Sequence[torch.Tensor], what: str, **how: object
) -> None:
    before = [part.clone() for part in inputs]
    outputs = group.all_reduce(ALGORITHMS[algorithm], inputs, exchange=exchange, **how)
    expected = rank_ordered_sum(inputs)
    for rank, output in enumerate(outputs):
        assert_same_bits(output, expected, f"{what}, rank {rank}")
        assert_same_bits(inputs[rank], before[rank], f"{what}, input of rank {rank}")
    assert_rest(group)


# -- ranks as threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_every_size_and_type(world_size: int, algorithm: str, exchange: str) -> None:
    group, seed = group_of(world_size, exchange), fresh_seed()
    for dtype in DTYPES:
        for size in SIZES:
            inputs = [rank_input(seed + size, rank, size, dtype) for rank in range(world_size)]
            # Slots as large as they are, and so small that a message takes several rounds.
            for chunk in (largest_chunk(group.layout, algorithm, EXCHANGES[exchange]), 40):
                what = f"seed {seed}, {size} {dtype}, chunk {chunk}"
                compare(group, algorithm, EXCHANGES[exchange], inputs, what, chunk=chunk)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_special_values(algorithm: str, exchange: str) -> None:
    group = group_of(3, exchange)
    for dtype in DTYPES:
        compare(group, algorithm, EXCHANGES[exchange], special_inputs(3, dtype), str(dtype), chunk=100)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("value", (-0.0, float("inf")), ids=("minus zero", "infinity"))
def test_values_with_the_bits_of_the_marker(algorithm: str, exchange: str, value: float) -> None:
    """A word of fp32 that is -0.0 looks like a slot that nothing has come to; it must come over as a zero."""
    assert torch.tensor(-0.0).view(torch.int32).item() % WRAP == _C.IN_BAND_MARKER
    group = group_of(2, exchange, timeout_s=3.0)
    for dtype in DTYPES:
        inputs = [torch.full((37,), value, dtype=dtype) for _ in range(2)]
        if dtype is not torch.float32:
            inputs[1][::2] = 0.0  # pairs of elements that make the marker
        compare(group, algorithm, EXCHANGES[exchange], inputs, str(dtype), chunk=100)


@pytest.mark.parametrize("first", (0, WRAP - 7), ids=("from zero", "over the wrap of epochs"))
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world_size", (2, 3, 5))
def test_calls_of_any_kind_follow_each_other(world_size: int, exchange: str, first: int) -> None:
    """Algorithms, exchanges (in band and with flags), sizes and late ranks, on one workspace."""
    group, seed = group_of(world_size, exchange), fresh_seed()
    group.set_rounds(first)
    draw, in_band = random.Random(seed), dict.fromkeys(EPOCH_PLANES, 0)
    for number in range(60):
        algorithm = draw.choice(list(ALGORITHMS))
        via = draw.choice((EXCHANGES[exchange], EXCHANGES[exchange], _C.FLAGS))
        dtype, size = draw.choice(DTYPES), draw.choice(SIZES)
        inputs = [rank_input(seed + number, rank, size, dtype) for rank in range(world_size)]
        chunk = draw.choice((8, 40, largest_chunk(group.layout, algorithm, via)))
        compare(group, algorithm, via, inputs, f"seed {seed}, call {number}", chunk=chunk, jitter=draw)
        if via != _C.FLAGS:
            parts = 1 if algorithm == "ONESHOT" else world_size
            in_band[plane_of(group.layout, algorithm)] += -(-size * dtype.itemsize // (chunk * _C.VECTOR_BYTES * parts))
    epochs = in_band_epochs(buffers_of(group)[0], group.layout)[:, 0].tolist()
    assert [epoch % WRAP for epoch in epochs] == [(first + in_band[name]) % WRAP for name in EPOCH_PLANES]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_absent_rank_is_named_in_time(algorithm: str, exchange: str) -> None:
    group = group_of(3, exchange, timeout_s=0.5)
    inputs = [rank_input(1, rank, 1000, torch.float32) for rank in range(3)]
    compare(group, algorithm, EXCHANGES[exchange], inputs, "all are there", chunk=100)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        group.all_reduce(ALGORITHMS[algorithm], inputs, exchange=EXCHANGES[exchange], chunk=100, ranks=(0, 2))
    assert 0.4 < time.monotonic() - started < 3
    phase = "gather" if algorithm == "ONESHOT" else "scatter"
    named = [str(failure_of(group.workspaces[rank])) for rank in (0, 2)]
    assert any(f"for rank 1 in {algorithm}/{phase}" in text for text in named), named


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    ("kinds", "counts", "said"),
    [
        (("ONESHOT", "ONESHOT"), (100, 1000), "rank 1 passes 1000 float32 (ONESHOT), rank 0 100 float32 (ONESHOT)"),
        (("TWOSHOT", "TWOSHOT"), (100, 1000), "rank 1 passes 1000 float32 (TWOSHOT), rank 0 100 float32 (TWOSHOT)"),
        (("ONESHOT", "TWOSHOT"), (100, 100), "rank 1 passes 100 float32 (TWOSHOT), rank 0 100 float32 (ONESHOT)"),
    ],
)
def test_different_calls_are_named(kinds: tuple[str, str], counts: tuple[int, int], said: str, exchange: str) -> None:
    group = group_of(2, exchange, timeout_s=10.0)
    compare(group, "ONESHOT", EXCHANGES[exchange], [torch.ones(5), torch.ones(5)], "alike", chunk=100)
    statuses: dict[int, int] = {}

    def run(rank: int) -> None:
        mine = torch.ones(counts[rank])
        output = poison(torch.empty_like(mine))
        plan = plan_of(group.workspaces[rank], kinds[rank], EXCHANGES[exchange], mine, 100)
        statuses[rank] = plan(mine.data_ptr(), output.data_ptr())

    started = time.monotonic()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 5, "at once, not when time is up"
    assert statuses[1] != 0, "the rank that waits for more than comes must notice"
    error = breakage_of(group.workspaces[1])
    assert isinstance(error, RankMismatchError)
    assert said in str(error)


def plan_of(workspace: _C.Workspace, algorithm: str, exchange: int, mine: torch.Tensor, chunk: int) -> _C.Plan:
    return _C.Plan(
        workspace,
        algorithm=ALGORITHMS[algorithm],
        exchange=exchange,
        wire=_C.WIRE_RAW,
        count=mine.numel(),
        dtype=DTYPE_CODES[mine.dtype],
        lanes=1,
        threads=32,
        chunk_vectors=chunk,
    )


# -- ranks as processes ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Of calls that follow each other. ``first``: the epoch that they begin with."""

    exchange: str
    first: int
    calls: int
    seed: int


class Rank:
    """One process's side of a group whose workspaces lie in shared memory."""

    def __init__(self, context: RankContext, exchange: str) -> None:
        self.context = context
        self.layout = _C.make_layout(
            context.world_size, 1, in_band_bytes=IN_BAND_BYTES, flagged_bytes=IN_BAND_BYTES, shared=exchange == "shared"
        )
        self.agreement = Agreement(context.group, 60.0)
        self.memory = ShmMemory.open(self.agreement, self.layout.total_bytes)
        self.buffers = [
            torch.frombuffer((ctypes.c_uint8 * self.layout.total_bytes).from_address(base), dtype=torch.uint8)
            for base in self.memory.bases
        ]
        initialize(self.buffers[context.rank], self.layout)
        self.barrier()  # before it, what a peer stores would be wiped out
        self.workspace = _C.Workspace(
            context.rank, self.memory.bases, self.layout, 20.0, _C.CPU, self.memory.local, 20.0, self.memory
        )

    def barrier(self) -> None:
        self.agreement.barrier("to compare what lies in workspaces")

    def assert_rest(self) -> None:
        """Of all ranks, when none is in a call."""
        self.barrier()
        assert_at_rest(self.buffers, self.buffers, self.layout)
        assert_shared_at_rest(self.buffers, self.buffers, self.layout)
        self.barrier()


def _calls(context: RankContext, case: Case) -> int:
    """The same calls on every rank; every second time ranks meet after each one and look at each other's slots."""
    rank, draw = Rank(context, case.exchange), random.Random(case.seed)
    epochs = in_band_epochs(rank.buffers[context.rank], rank.layout)
    epochs.fill_(case.first - (WRAP if case.first >= WRAP // 2 else 0))
    rank.barrier()
    for number in range(case.calls):
        algorithm = draw.choice(list(ALGORITHMS))
        exchange = draw.choice((EXCHANGES[case.exchange], EXCHANGES[case.exchange], _C.FLAGS))
        dtype, size = draw.choice(DTYPES), draw.choice(SIZES)
        chunk = draw.choice((8, 40, largest_chunk(rank.layout, algorithm, exchange)))
        inputs = [rank_input(case.seed + number, peer, size, dtype) for peer in range(context.world_size)]
        mine, output = inputs[context.rank], poison(torch.empty(size, dtype=dtype))
        status = plan_of(rank.workspace, algorithm, exchange, mine, chunk)(mine.data_ptr(), output.data_ptr())
        what = f"{case}, call {number} on rank {context.rank}"
        assert status == 0, f"{what}: {breakage_of(rank.workspace) or failure_of(rank.workspace)}"
        assert_same_bits(output, rank_ordered_sum(inputs), what)
        if number < case.calls // 3:
            rank.assert_rest()
    rank.assert_rest()
    made = int(epochs.sum().item()) - len(EPOCH_PLANES) * (case.first - (WRAP if case.first >= WRAP // 2 else 0))
    rank.agreement.close()
    return made


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world_size", range(2, 9))
def test_processes(world_size: int, exchange: str) -> None:
    # Odd numbers of ranks pass the wrap of epochs.
    case = Case(exchange, WRAP - 9 if world_size % 2 else 0, 45, fresh_seed())
    with forked(world_size, _calls, case) as ranks:
        made = [ranks.value(rank, 100) for rank in range(world_size)]
    assert len(set(made)) == 1
    assert made[0] >= 10, "calls in band"


def _absent(context: RankContext, exchange: str) -> str:
    rank = Rank(context, exchange)
    mine, output = torch.ones(1000), torch.empty(1000)
    plan = plan_of(rank.workspace, "TWOSHOT", EXCHANGES[exchange], mine, 100)
    assert plan(mine.data_ptr(), output.data_ptr()) == 0
    rank.barrier()
    if context.rank == 1:
        return ""
    rank.workspace.mark_gone(1)
    started = time.monotonic()
    assert plan(mine.data_ptr(), output.data_ptr()) != 0
    assert time.monotonic() - started < 10, "less than what a rank waits for others"
    return str(failure_of(rank.workspace))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_process_that_is_gone_is_named_before_time_is_up(exchange: str) -> None:
    with forked(2, _absent, exchange) as ranks:
        said = [ranks.value(rank, 60) for rank in (0, 1)]
    assert "for rank 1 in TWOSHOT/scatter" in said[0]
