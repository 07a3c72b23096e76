"""CPU ranks that norm what they sum, by every algorithm and exchange, against the oracle."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import _C, RankMismatchError
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, ScaleLayout
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES
from llm_allreduce_plugin.runtime.failures import breakage_of, failure_of
from tests.support.cpu_group import CpuGroup
from tests.support.norm_group import (
    Boundary,
    assert_nothing_between_columns,
    assert_same,
    every_quant,
    outputs_for,
    random_boundary,
    tensors_of,
)
from tests.support.reference import DTYPES, assert_same_bits, bits, fresh_seed, rank_input, rank_ordered_sum

EXCHANGES = {"push": _C.PUSH, "shared": _C.SHARED, "flags": _C.FLAGS}
ALGORITHMS = {"ONESHOT": _C.ONE_SHOT, "TWOSHOT": _C.TWO_SHOT}


@dataclasses.dataclass(frozen=True)
class Way:
    """How a sum comes about."""

    algorithm: str
    exchange: str
    chunk: int

    def plan(self, workspace: _C.Workspace, like: torch.Tensor, norm: _C.Norm | None, **more: Any) -> _C.Plan:
        return _C.Plan(
            workspace,
            algorithm=ALGORITHMS[self.algorithm],
            exchange=EXCHANGES[self.exchange],
            count=like.numel(),
            dtype=DTYPE_CODES[like.dtype],
            lanes=1,
            threads=32,
            chunk_vectors=self.chunk,
            epilogue=_C.STORE if norm is None else _C.RMS_NORM,
            norm=norm,
            **more,
        )


class Ranks(CpuGroup):
    """Ranks that norm what they sum."""

    def largest_chunk(self, algorithm: str, exchange: str) -> int:
        slots = self.layout.flagged if exchange == "flags" else self.layout.in_band
        return (slots.one_shot_bytes if algorithm == "ONESHOT" else slots.two_shot_bytes) // _C.VECTOR_BYTES

    def normed(
        self, way: Way, inputs: Sequence[torch.Tensor], boundary: Boundary, jitter: random.Random | None = None
    ) -> list[Normed]:
        outputs = [outputs_for(part, boundary) for part in inputs]
        statuses = dict.fromkeys(range(self.world_size), -99)
        delays = [jitter.choice((0.0, 0.0, 0.001, 0.003)) if jitter else 0.0 for _ in inputs]

        def run(rank: int) -> None:
            plan = way.plan(self.workspaces[rank], inputs[rank], boundary.norm(len(inputs[rank])))
            time.sleep(delays[rank])
            tensors = tensors_of(outputs[rank], boundary)
            statuses[rank] = plan.normed(inputs[rank].data_ptr(), outputs[rank].residual_out.data_ptr(), 0, tensors)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses.values()) == {0}, [_C.error_string(status) for status in statuses.values()]
        return outputs


def ranks_for(world_size: int, exchange: str, **how: Any) -> Ranks:
    return Ranks(world_size, workspace_bytes=1 << 18, shared=exchange == "shared", **how)


def inputs_of(seed: int, world_size: int, rows: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [rank_input(seed, rank, rows * hidden, dtype).view(rows, hidden) for rank in range(world_size)]


def compare_ranks(
    group: Ranks, way: Way, inputs: Sequence[torch.Tensor], boundary: Boundary, what: str, **how: Any
) -> None:
    before = [part.clone() for part in inputs]
    expected = boundary.expected(rank_ordered_sum(before))
    for rank, outputs in enumerate(group.normed(way, inputs, boundary, **how)):
        assert_same(outputs, expected, f"{what}, rank {rank}")
        assert_nothing_between_columns(outputs, f"{what}, rank {rank}")
        assert torch.equal(bits(inputs[rank]), bits(before[rank])), f"{what}, input of rank {rank}"


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_ranks(world_size: int, algorithm: str, exchange: str) -> None:
    """Whole messages at once, and so little at a time that rows are cut in two."""
    group = ranks_for(world_size, exchange)
    largest = group.largest_chunk(algorithm, exchange)
    for hidden, rows in ((8, 3), (384, 0), (384, 1), (384, 5), (2880, 2)):
        for number, quant in enumerate(every_quant(hidden)):
            seed = fresh_seed()
            dtype = DTYPES[(seed + number) % 3]
            boundary = random_boundary(seed, rows, hidden, dtype, quant, residual=seed % 4 > 0)
            for chunk in (largest, 41):
                way = Way(algorithm, exchange, chunk)
                what = f"{way}, {rows} x {hidden} {dtype}, {quant}, seed {seed}"
                compare_ranks(group, way, inputs_of(seed, world_size, rows, hidden, dtype), boundary, what)


@pytest.mark.parametrize("exchange", ("push", "shared"))
def test_calls_of_any_kind_follow_each_other(exchange: str) -> None:
    """Normed and plain, by every algorithm and exchange, with late ranks, on one workspace."""
    seed, world_size = fresh_seed(), 3
    group, draw = ranks_for(world_size, exchange), random.Random(seed)
    for number in range(50):
        algorithm, via = draw.choice(list(ALGORITHMS)), draw.choice((exchange, "flags"))
        way = Way(algorithm, via, draw.choice((40, group.largest_chunk(algorithm, via))))
        dtype, hidden, rows = draw.choice(DTYPES), draw.choice((8, 128, 640)), draw.choice((1, 2, 7))
        inputs = inputs_of(seed + number, world_size, rows, hidden, dtype)
        what = f"seed {seed}, call {number}, {way}"
        if draw.random() < 0.5:
            boundary = random_boundary(seed + number, rows, hidden, dtype, draw.choice(every_quant(hidden)))
            compare_ranks(group, way, inputs, boundary, what, jitter=draw)
        else:
            sums = group.all_reduce(
                ALGORITHMS[algorithm], inputs, exchange=EXCHANGES[via], chunk=way.chunk, jitter=draw
            )
            for output in sums:
                assert_same_bits(output, rank_ordered_sum(inputs), what)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_rank_that_norms_and_one_that_does_not(exchange: str) -> None:
    group = ranks_for(2, exchange, timeout_s=10.0)
    inputs = inputs_of(1, 2, 4, 128, torch.float32)
    boundary = Boundary(None, torch.ones(128))
    outputs = [outputs_for(part, boundary) for part in inputs]
    way = Way("ONESHOT", exchange, 64)
    statuses = {}

    def run(rank: int) -> None:
        plan = way.plan(group.workspaces[rank], inputs[rank], boundary.norm(4) if rank == 0 else None)
        addresses = (inputs[rank].data_ptr(), outputs[rank].residual_out.data_ptr())
        tensors = tensors_of(outputs[rank], boundary)
        statuses[rank] = plan.normed(*addresses, 0, tensors) if rank == 0 else plan(*addresses)

    started = time.monotonic()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 5, "at once, not when time is up"
    broken = [rank for rank in (0, 1) if statuses[rank] != 0]
    assert broken, "one at least must notice"
    for rank in broken:
        assert isinstance(breakage_of(group.workspaces[rank]), RankMismatchError)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_without_a_peer_nothing_is_normed(exchange: str) -> None:
    group = ranks_for(2, exchange, timeout_s=0.3)
    rows = torch.ones(4, 128)
    boundary = Boundary(None, torch.ones(128), quant=Quant(QuantKind.FP8_TOKEN), return_norm=True)
    outputs = outputs_for(rows, boundary)
    plan = Way("ONESHOT", exchange, 64).plan(group.workspaces[0], rows, boundary.norm(4))
    assert plan.normed(rows.data_ptr(), outputs.residual_out.data_ptr(), 0, tensors_of(outputs, boundary)) != 0
    assert "for rank 1 in ONESHOT/gather" in str(failure_of(group.workspaces[0]))
    for output in (outputs.norm_out, outputs.quant_out, outputs.scale_out):
        assert output is not None
        assert bool((output.view(torch.uint8) == 0xA5).all())


def test_calls_that_do_not_fit_are_refused() -> None:
    """A norm of what is no whole number of rows, or of compressed sums; an epilogue without its norm."""
    group = ranks_for(2, "push", timeout_s=0.3)
    rows = torch.ones(4, 128)
    boundary = Boundary(None, torch.ones(128))
    outputs = outputs_for(rows, boundary)
    norm, way = boundary.norm(4), Way("TWOSHOT", "flags", 64)

    def status(plan: _C.Plan) -> int:
        addresses = (rows.data_ptr(), outputs.residual_out.data_ptr())
        return plan.normed(*addresses, 0, tensors_of(outputs, boundary))

    refused = {
        "part of a row": way.plan(group.workspaces[0], rows.flatten()[:200], norm),
        "a wire format": way.plan(group.workspaces[0], rows, norm, wire=_C.wire_codes()["fp8"]),
        "no epilogue": way.plan(group.workspaces[0], rows, None),
        "nvfp4 in columns": way.plan(
            group.workspaces[0],
            rows,
            _C.Norm(128, 1e-5, quant=QuantKind.NVFP4.code, scales=ScaleLayout.COLUMNS.code),
        ),
    }
    codes = {name: _C.error_string(status(plan)) for name, plan in refused.items()}
    assert all("invalid argument" in text for text in codes.values()), codes
    plain = way.plan(group.workspaces[0], rows, norm)(rows.data_ptr(), outputs.residual_out.data_ptr())
    assert "invalid argument" in _C.error_string(plain)
