"""LOWPRECISION on CPU ranks against the oracle: the same bits on every rank, and those that the formats define."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import ConfigError
from llm_allreduce_plugin.algorithms.decision import Algorithm, Launch
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.low_precision import ANY_OWNER, DOMAINS, assert_same_numbers, expected_sum
from tests.support.reference import (
    assert_same_bits,
    digest,
    rank_input,
    rank_ordered_sum,
    special_inputs,
)
from tests.support.rows import HIDDEN, check_rows, rows_of

WORLD_SIZES = (2, 3, 4, 8)
DTYPES = (torch.bfloat16, torch.float16)
SIZES = (0, 1, 31, 495, 497, 1023, 1025, 40_000, 300_001)
FORMATS = pytest.mark.parametrize("wire", list(WireFormat), ids=str)
RING: dict[str, Any] = {"algorithm": "ring"}
# By world size. More of them in test_low_precision_forms.py, without processes.
OTHERS: list[tuple[int, dict[str, Any]]] = [
    (3, RING),
    (4, {"algorithm": "hierarchical", "domains": DOMAINS["2+2 in turns"]}),
    (8, RING),
    (8, {"algorithm": "hierarchical", "domains": DOMAINS["4+4"]}),
]
KERNELS = {"ring": Algorithm.RING, "hierarchical": Algorithm.HIERARCHICAL}


def _compare(context: RankContext, group: Any, inputs: list[torch.Tensor], what: str) -> str:
    """One call against the oracle; the digest of the output."""
    output, launch = _reduce(context, group, inputs[context.rank], what)
    assert_same_numbers(output, expected_sum(launch, inputs), what)
    return digest(output)


def _reduce(context: RankContext, group: Any, mine: torch.Tensor, what: str) -> tuple[torch.Tensor, Launch]:
    before = mine.clone()
    launch: Launch = group.explain(mine.shape, mine.dtype).launch
    asked = str(group.config.low_precision.algorithm)
    assert launch.algorithm is KERNELS.get(asked, Algorithm.TWO_SHOT)
    with checks.poisoned_outputs():
        output = group.all_reduce(mine)
    assert torch.equal(mine.view(torch.int16), before.view(torch.int16)), f"{what}: the input was written"
    return output, launch


def _check(
    context: RankContext, wire: WireFormat, sizes: tuple[int, ...], workspace: int, more: dict[str, Any] | None = None
) -> None:
    settings = {"low_precision": {"wire_format": wire, **(more or {})}, "workspace_bytes": workspace}
    with checks.communicator(context, "LOWPRECISION", **settings) as group:
        digests = []
        for turn, (size, dtype) in enumerate(itertools.product(sizes, DTYPES)):
            seed = context.shared_seed()
            what = f"{wire} {dtype} x {size}, seed {seed}"
            output, launch = _reduce(context, group, rank_input(seed, context.rank, size, dtype), what)
            if checks.judges(context, turn):
                inputs = [rank_input(seed, rank, size, dtype) for rank in range(context.world_size)]
                assert_same_numbers(output, expected_sum(launch, inputs), what)
            digests.append(digest(output))
        calls = group.report()["calls"]
        assert calls == {"LOWPRECISION": len(digests)}, calls
        everyone = context.gather(digests)
        assert all(other == everyone[0] for other in everyone), "ranks differ"


@FORMATS
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(cpu_pool: PoolFor, world_size: int, wire: WireFormat) -> None:
    cpu_pool(world_size).run(_check, wire, SIZES, 4 << 20)


@pytest.mark.parametrize("wire", ANY_OWNER, ids=str)
@pytest.mark.parametrize(("world_size", "more"), OTHERS)
def test_sizes_with_other_algorithms(
    cpu_pool: PoolFor, world_size: int, more: dict[str, Any], wire: WireFormat
) -> None:
    cpu_pool(world_size).run(_check, wire, (1, 497, 40_000), 4 << 20, more)
    cpu_pool(world_size).run(_check, wire, (100_001,), 2 << 20, more)


@FORMATS
def test_messages_larger_than_the_workspace(cpu_pool: PoolFor, wire: WireFormat) -> None:
    cpu_pool(4).run(_check, wire, (3_000_001,), 2 << 20)


def _falls_back(context: RankContext, more: dict[str, Any]) -> str:
    with checks.communicator(context, "LOWPRECISION", low_precision=more) as group:
        decision = group.explain((5000,), torch.bfloat16)
        assert str(decision.strategy) == "LOWPRECISION"
        assert decision.launch.algorithm is Algorithm.TWO_SHOT
        inputs = [rank_input(5, rank, 5000, torch.bfloat16) for rank in range(context.world_size)]
        assert_same_numbers(group.all_reduce(inputs[context.rank]), expected_sum(decision.launch, inputs), "two-shot")
        return str(decision.reason)


def test_what_cannot_be_hierarchical_is_two_shot(cpu_pool: PoolFor) -> None:
    uneven = cpu_pool(4).run(_falls_back, {"algorithm": "hierarchical", "domains": (0, 0, 0, 1)})
    assert set(uneven) == {
        "allreduce_strategy is LOWPRECISION; CPU ranks compress everything; "
        "hierarchical cannot run: ranks form 2 domains of 3, 1 ranks, not two of "
        "equal size with 2 to 4 ranks each"
    }
    unknown = cpu_pool(4).run(_falls_back, {"algorithm": "hierarchical"})
    assert "hierarchical cannot run: the NUMA node of every rank's GPU is not known" in unknown[0]


def _too_many_domains(context: RankContext) -> str:
    with pytest.raises(ConfigError) as caught:
        context.communicator("LOWPRECISION", low_precision={"domains": (0, 0, 1, 1, 1)})
    return str(caught.value)


def test_domains_of_another_world_size(cpu_pool: PoolFor) -> None:
    assert set(cpu_pool(4).run(_too_many_domains)) == {
        "low_precision.domains=[0, 0, 1, 1, 1]: has 5 numbers: must have one for each of the 4 ranks"
    }


def _specials(context: RankContext, wire: WireFormat, more: dict[str, Any]) -> list[str]:
    digests = []
    with checks.communicator(context, "LOWPRECISION", low_precision={"wire_format": wire, **more}) as group:
        for dtype in DTYPES:
            inputs = special_inputs(context.world_size, dtype)
            digests.append(_compare(context, group, inputs, f"{wire} {dtype} {more}"))
            finite = [part.nan_to_num(0.0, 1.0, -1.0) for part in inputs]
            output = group.all_reduce(finite[context.rank])
            assert not output.isnan().any(), "NaN out of finite input"
    return digests


@pytest.mark.parametrize(
    ("world_size", "more", "wire"),
    [
        *itertools.product((2, 5), ({},), WireFormat),
        *itertools.product((5,), (RING,), ANY_OWNER),
        *itertools.product((4,), ({"algorithm": "hierarchical", "domains": DOMAINS["2+2"]},), ANY_OWNER),
    ],
)
def test_special_values(cpu_pool: PoolFor, world_size: int, more: dict[str, Any], wire: WireFormat) -> None:
    everyone = cpu_pool(world_size).run(_specials, wire, more)
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
                _compare(context, group, inputs, f"turn {turn}")
        assert set(group.report()["calls"]) == {"LOWPRECISION", "MINLATENCY"}
        # What stays exact because it is small is as asked for; what is no 16-bit type is not.
        reason = "compression is for bfloat16 and float16, not float32"
        fallback = {"requested": "LOWPRECISION", "strategy": "MINLATENCY", "reason": reason}
        assert group.report()["fallback_calls"] == [{**fallback, "calls": 20}]


def test_small_messages_and_fp32_stay_exact(cpu_pool: PoolFor) -> None:
    cpu_pool(3).run(_mixed)


def _warnings(context: RankContext) -> list[str]:
    """What the first rank warns of, from start to end, when small and large messages go as they are meant to."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("llm_allreduce_plugin")
    logger.addHandler(handler)
    try:
        with checks.communicator(context, "LOWPRECISION", low_precision={"min_bytes": 2000}) as group:
            for size in (1, 100, 5000):
                group.all_reduce(torch.ones(size, dtype=torch.bfloat16))
            assert group.report()["calls"] == {"MINLATENCY": 2, "LOWPRECISION": 1}
            assert (group.report()["fallbacks"], group.report()["fallback_calls"]) == ({}, [])
            assert "messages below 1.953 KiB stay exact" in group.explain((1,), torch.bfloat16).reason
    finally:
        logger.removeHandler(handler)
    return lines


def test_what_works_as_asked_for_warns_of_nothing(cpu_pool: PoolFor) -> None:
    assert cpu_pool(2).run(_warnings) == [[], []]


def _error(context: RankContext, wire: WireFormat) -> float:
    with checks.communicator(context, "LOWPRECISION", low_precision={"wire_format": wire}) as group:
        generator = torch.Generator().manual_seed(11)
        parts = [torch.randn(1 << 18, generator=generator).bfloat16() for _ in range(context.world_size)]
        exact = torch.stack(parts).double().sum(0)
        return float((group.all_reduce(parts[context.rank]).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("wire", "most"), [("fp8", 0.035), ("fp8_group", 0.035), ("tq3", 1.0), ("hadamard2", 0.45)])
def test_relative_error_of_a_sum_over_four_ranks(cpu_pool: PoolFor, wire: str, most: float) -> None:
    errors = cpu_pool(4).run(_error, WireFormat(wire))
    assert len(set(errors)) == 1
    assert errors[0] < most


def _rows(context: RankContext, hidden: int, batches: tuple[int, ...], more: dict[str, Any]) -> None:
    settings = {"low_precision": {"wire_format": WireFormat.FP8_GROUP, **more}, "workspace_bytes": 4 << 20}
    seed = context.shared_seed()
    mine = rows_of(seed, context.rank, hidden)
    with checks.communicator(context, "LOWPRECISION", **settings) as group:
        check_rows(lambda index: group.all_reduce(mine[index]), batches, seed, f"{hidden} wide, {more}")
        assert set(group.report()["calls"]) == {"LOWPRECISION"}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_row_s_answer_does_not_depend_on_its_batch(cpu_pool: PoolFor, world_size: int, hidden: int) -> None:
    """Batches of one round and of several."""
    cpu_pool(world_size).run(_rows, hidden, (1, 2, 3, 7, 33, 257), {})


def test_nor_in_a_batch_of_thousands(cpu_pool: PoolFor) -> None:
    cpu_pool(2).run(_rows, 2880, (4096,), {})
    cpu_pool(3).run(_rows, 2880, (1031,), {})


def test_but_it_does_where_small_messages_stay_exact(cpu_pool: PoolFor) -> None:
    with pytest.raises(Exception, match="elements differ"):
        cpu_pool(2).run(_exact_when_small)


def _exact_when_small(context: RankContext) -> None:
    seed = context.shared_seed()
    mine = rows_of(seed, context.rank, 2880)
    more = {"wire_format": WireFormat.FP8_GROUP, "min_bytes": 64 << 10}
    with checks.communicator(context, "LOWPRECISION", low_precision=more) as group:
        check_rows(lambda index: group.all_reduce(mine[index]), (33,), seed, "exact when small")
