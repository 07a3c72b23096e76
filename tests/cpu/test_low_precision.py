"""LOWPRECISION on CPU ranks against the oracle: the same bits on every rank, and those that the formats define."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.bench.ranks import RankContext
from llm_allreduce_plugin.codecs import CODECS
from llm_allreduce_plugin.codecs.two_shot import compressed_sum
from llm_allreduce_plugin.config import WireFormat
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.reference import (
    assert_same_bits,
    digest,
    rank_input,
    rank_ordered_sum,
    special_inputs,
)

WORLD_SIZES = (2, 3, 4, 8)
DTYPES = (torch.bfloat16, torch.float16)
SIZES = (0, 1, 31, 495, 497, 1023, 1025, 40_000, 300_001)
FORMATS = pytest.mark.parametrize("wire", list(WireFormat), ids=str)


def _compare(context: RankContext, group: Any, inputs: list[torch.Tensor], wire: WireFormat, what: str) -> str:
    """One call against the oracle; the digest of the output."""
    mine = inputs[context.rank]
    before = mine.clone()
    launch = group.explain(mine.shape, mine.dtype).launch
    with checks.poisoned_outputs():
        output = group.all_reduce(mine)
    chunk = launch.chunk_vectors * 16 // CODECS[wire].packet_bytes
    expected = compressed_sum(inputs, wire, chunk)
    assert torch.equal(output.isnan(), expected.isnan()), what
    assert_same_bits(output[~output.isnan()], expected[~expected.isnan()], what)
    assert torch.equal(mine.view(torch.int16), before.view(torch.int16)), f"{what}: the input was written"
    return digest(output)


def _check(context: RankContext, wire: WireFormat, sizes: tuple[int, ...], workspace: int) -> None:
    settings = {"low_precision": {"wire_format": wire}, "workspace_bytes": workspace}
    with checks.communicator(context, "LOWPRECISION", **settings) as group:
        digests = []
        for size in sizes:
            for dtype in DTYPES:
                seed = context.shared_seed()
                inputs = [rank_input(seed, rank, size, dtype) for rank in range(context.world_size)]
                digests.append(_compare(context, group, inputs, wire, f"{wire} {dtype} x {size}, seed {seed}"))
        calls = group.report()["calls"]
        assert calls == {"LOWPRECISION": len(digests)}, calls
        everyone = context.gather(digests)
        assert all(other == everyone[0] for other in everyone), "ranks differ"


@FORMATS
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(cpu_pool: PoolFor, world_size: int, wire: WireFormat) -> None:
    cpu_pool(world_size).run(_check, wire, SIZES, 4 << 20)


@FORMATS
def test_messages_larger_than_the_workspace(cpu_pool: PoolFor, wire: WireFormat) -> None:
    cpu_pool(4).run(_check, wire, (3_000_001,), 2 << 20)


def _specials(context: RankContext, wire: WireFormat) -> list[str]:
    digests = []
    with checks.communicator(context, "LOWPRECISION", low_precision={"wire_format": wire}) as group:
        for dtype in DTYPES:
            inputs = special_inputs(context.world_size, dtype)
            digests.append(_compare(context, group, inputs, wire, f"{wire} {dtype}"))
            finite = [part.nan_to_num(0.0, 1.0, -1.0) for part in inputs]
            output = group.all_reduce(finite[context.rank])
            assert not output.isnan().any(), "NaN out of finite input"
    return digests


@FORMATS
@pytest.mark.parametrize("world_size", (2, 5))
def test_special_values(cpu_pool: PoolFor, world_size: int, wire: WireFormat) -> None:
    everyone = cpu_pool(world_size).run(_specials, wire)
    assert all(digests == everyone[0] for digests in everyone)


def _mixed(context: RankContext) -> None:
    """Compressed and exact calls, which share slots and counts, in one group and between groups."""
    with checks.communicator(context, "LOWPRECISION", low_precision={"min_bytes": 2000}) as group:
        for turn in range(60):
            seed, size = context.shared_seed(), (100, 5000, 999, 12_345)[turn % 4]
            dtype = (torch.bfloat16, torch.float32)[turn % 3 == 0]
            inputs = [rank_input(seed, rank, size, dtype) for rank in range(context.world_size)]
            if dtype is torch.float32 or size * 2 < 2000:
                assert_same_bits(group.all_reduce(inputs[context.rank]), rank_ordered_sum(inputs), f"turn {turn}")
            else:
                _compare(context, group, inputs, WireFormat.FP8, f"turn {turn}")
        assert set(group.report()["calls"]) == {"LOWPRECISION", "MINLATENCY"}
        assert "messages below 2000 bytes stay exact (low_precision.min_bytes)" in json.dumps(
            group.report()["fallbacks"]
        )


def test_small_messages_and_fp32_stay_exact(cpu_pool: PoolFor) -> None:
    cpu_pool(3).run(_mixed)


def _error(context: RankContext, wire: WireFormat) -> float:
    with checks.communicator(context, "LOWPRECISION", low_precision={"wire_format": wire}) as group:
        generator = torch.Generator().manual_seed(11)
        parts = [torch.randn(1 << 18, generator=generator).bfloat16() for _ in range(context.world_size)]
        exact = torch.stack(parts).double().sum(0)
        return float((group.all_reduce(parts[context.rank]).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("wire", "most"), [("fp8", 0.035), ("tq3", 1.0), ("hadamard2", 0.45)])
def test_relative_error_of_a_sum_over_four_ranks(cpu_pool: PoolFor, wire: str, most: float) -> None:
    errors = cpu_pool(4).run(_error, WireFormat(wire))
    assert len(set(errors)) == 1
    assert errors[0] < most
