"""UB on CPU ranks: results that peers store into registered outputs, against the sum in rank order."""

from __future__ import annotations

import logging
import random

import pytest
import torch

from llm_allreduce_plugin import _C, PeerTimeoutError
from llm_allreduce_plugin.algorithms.decision import Exchange
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.oracle.norm import residual_rms_norm
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.cpu_group import CpuGroup
from tests.support.reference import DTYPES, assert_same_bits, poison, rank_input, rank_ordered_sum, special_inputs

SIZES = (1, 3, 8, 1000, 4099, 300_001)


def _inputs(context: RankContext, seed: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [rank_input(seed, rank, size, dtype) for rank in range(context.world_size)]


def _sizes(context: RankContext) -> None:
    with checks.communicator(context, "UB", workspace_bytes="2MiB") as group:
        for turn, size in enumerate(SIZES):
            for dtype in DTYPES:
                out = poison(group.registered_empty((size,), dtype))
                launch = group.explain((size,), dtype, registered_output=True).launch
                assert launch is not None
                assert launch.exchange is Exchange.PLACE
                for call in range(2):
                    inputs = _inputs(context, turn + call, size, dtype)
                    kept = inputs[context.rank].clone()
                    assert group.all_reduce(inputs[context.rank], out) is out
                    assert_same_bits(out, rank_ordered_sum(inputs), f"{dtype} x {size}")
                    assert_same_bits(inputs[context.rank], kept, "the input")
        assert set(group.report()["calls"]) == {"UB"}


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_every_size_and_type(cpu_pool: PoolFor, world_size: int) -> None:
    cpu_pool(world_size).run(_sizes)


@pytest.mark.parametrize("world_size", (2, 3, 5))
def test_inputs_read_in_place(world_size: int) -> None:
    """Nothing is scattered; in one chunk and in several, which share the counts of calls that scatter."""
    group = CpuGroup(world_size)
    jitter = random.Random(world_size)
    for turn, size in enumerate((8, 24, 1000, 5000)):
        for dtype in DTYPES:
            inputs = [rank_input(turn, rank, size, dtype) for rank in range(world_size)]
            outputs = group.all_reduce(
                _C.TWO_SHOT, inputs, exchange=_C.PLACE, chunk=(64, 7)[turn % 2], jitter=jitter, in_place=True
            )
            for rank, output in enumerate(outputs):
                assert_same_bits(output, rank_ordered_sum(inputs), f"{dtype} x {size}, rank {rank}")
    assert 0 in group.two_shot_flags(), "no flag of the scatter has been set"
    for in_place in (False, True, False):
        inputs = [rank_input(7, rank, 3000, torch.float32) for rank in range(world_size)]
        outputs = group.all_reduce(_C.TWO_SHOT, inputs, exchange=_C.PLACE, chunk=16, jitter=jitter, in_place=in_place)
        for output in outputs:
            assert_same_bits(output, rank_ordered_sum(inputs), f"{in_place=}")


def _special(context: RankContext) -> None:
    with checks.communicator(context, "UB") as group:
        for dtype in DTYPES:
            inputs = special_inputs(context.world_size, dtype)
            out = poison(group.registered_empty(tuple(inputs[0].shape), dtype))
            group.all_reduce(inputs[context.rank], out)
            assert_same_bits(out, rank_ordered_sum(inputs), str(dtype))


def test_special_values(cpu_pool: PoolFor) -> None:
    cpu_pool(4).run(_special)


def _one_output(context: RankContext) -> None:
    """What a rank reads from its output between two calls is the sum of the first, however slow it reads."""
    generator = random.Random(context.rank)
    with checks.communicator(context, "UB") as group:
        out = poison(group.registered_empty((5000,), torch.float32))
        for call in range(30):
            inputs = _inputs(context, call, 5000, torch.float32)
            group.all_reduce(inputs[context.rank], out)
            if generator.random() < 0.3:
                torch.randn(200, 200).matmul(torch.randn(200, 200))
            assert_same_bits(out, rank_ordered_sum(inputs), f"call {call}")
            if call % 3 == 0:
                assert_same_bits(group.all_reduce(inputs[context.rank]), rank_ordered_sum(inputs), f"TWOSHOT {call}")


def test_one_output_for_all_calls_and_others_between(cpu_pool: PoolFor) -> None:
    cpu_pool(3).run(_one_output)


def _elsewhere(context: RankContext) -> dict[str, int]:
    """Outputs that peers cannot store into get the same bits by other ways."""
    with checks.communicator(context, "UB") as group:
        inputs = _inputs(context, 1, 1000, torch.bfloat16)
        pool = group.registered_empty((2048,), torch.bfloat16)
        for out in (torch.empty(1000, dtype=torch.bfloat16), pool[1:1001], pool[8:1008]):
            poison(out)
            assert group.all_reduce(inputs[context.rank], out) is out
            assert_same_bits(out, rank_ordered_sum(inputs), "out")
        whole = torch.ones(7, dtype=torch.int32)
        assert group.all_reduce(whole, torch.empty_like(whole)).tolist() == [context.world_size] * 7
        calls: dict[str, int] = group.report()["calls"]
        return calls


def test_other_outputs(cpu_pool: PoolFor) -> None:
    assert cpu_pool(2).run(_elsewhere) == [{"TWOSHOT": 2, "UB": 1, "NCCL": 1}] * 2


def _own_outputs(context: RankContext) -> tuple[int, int]:
    """Without ``out``: fresh tensors, of registered memory while some is free, which differs by rank."""
    generator = random.Random(context.rank)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with checks.communicator(context, "UB", registered_pool="64K") as group:
        for call in range(60):
            size = (1000, 2500, 4096, 17)[call % 4]
            inputs = _inputs(context, call, size, torch.float32)
            mine = inputs[context.rank]
            if call % 5 == 0:  # not contiguous
                mine = mine.view(-1, 1).expand(-1, 2)[:, 0].contiguous().as_strided((size,), (1,))
            output = group.all_reduce(mine)
            kept.append((output, rank_ordered_sum(inputs)))
            for number, (found, expected) in enumerate(kept):
                assert_same_bits(found, expected, f"call {call}, {number} of those that live")
            while len(kept) > generator.randrange(1, 9):
                kept.pop(generator.randrange(len(kept)))
        pool = group._held.pool
        assert pool is not None
        taken, lent = pool.taken, pool.lent
        assert taken + lent == 60
        kept.clear()
        del output, found
        assert pool.take((pool.size - pool.size // 4 - 512,), torch.uint8) is not None, "all is free again"
        large = group.explain((4097,), torch.float32)
        assert (large.strategy, "a quarter of registered_pool" in large.reason) == ("TWOSHOT", True)
    return taken, lent


@pytest.mark.parametrize("world_size", (2, 3))
def test_outputs_of_the_communicator(cpu_pool: PoolFor, world_size: int) -> None:
    found = cpu_pool(world_size).run(_own_outputs)
    assert all(taken > 0 for taken, _ in found)
    assert any(lent > 0 for _, lent in found), "registered memory was never full: the test shows less than it should"
    assert len(set(found)) > 1, "ranks all did the same"


def _lines_of_ub(context: RankContext, strategy: str) -> tuple[list[str], dict[str, int] | None]:
    """What is logged of a group with five outputs, of which three stay, and what its report says of them."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("llm_allreduce_plugin")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with checks.communicator(context, strategy, registered_pool="16K" if strategy == "UB" else None) as group:
            kept = [group.all_reduce(torch.ones(1000)) for _ in range(5)]  # 4096 bytes each, and 12 KiB to take from
            assert all(output.tolist() == [float(context.world_size)] * 1000 for output in kept)
            used: dict[str, int] | None = group.report()["registered_memory"]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines, used


def test_the_log_says_how_many_outputs_were_registered(cpu_pool: PoolFor) -> None:
    """At the start where they lie, at the end how many stayed there; the first rank alone."""
    (lines, used), (others, same) = cpu_pool(2).run(_lines_of_ub, "UB")
    assert others == []
    assert used == same == {"bytes": 16384, "stayed": 3, "copied_out": 2}
    assert lines == [
        "all-reduce over 2 ranks (shm memory, allreduce_strategy UB, sizes per rank): UB to 4 KiB, then TWOSHOT",
        "UB takes outputs from registered memory, 16384 bytes on each rank. Sums with their norm in the same kernel "
        "(fuse_norm) are no outputs, and run as TWOSHOT",
        "all-reduce summary: UB 5 calls; no fallbacks",
        "registered memory of 16384 bytes: 3 of 5 outputs stayed in it, 2 were copied out, because nothing was free",
    ]
    (lines, used), _ = cpu_pool(2).run(_lines_of_ub, "TWOSHOT")
    assert used is None
    assert not any("registered memory" in line for line in lines)


def _outlives(context: RankContext) -> torch.Tensor:
    with checks.communicator(context, "UB") as group:
        output = group.all_reduce(torch.ones(1000))
    output += 1  # its memory is still mapped
    return output.clone()


def test_an_output_outlives_the_communicator(cpu_pool: PoolFor) -> None:
    assert all(torch.equal(found, torch.full((1000,), 3.0)) for found in cpu_pool(2).run(_outlives))


def _wrong_outputs(context: RankContext) -> None:
    with checks.communicator(context, "UB") as group:
        x = torch.ones(8)
        for out, text in (
            (torch.empty(8, dtype=torch.float16), "out: its dtype is torch.float16, that of the input torch.float32"),
            (torch.empty(9), "out: its shape is"),
            (torch.empty(16)[::2], "out: has strides"),
            (x, "out: overlaps the input"),
        ):
            with pytest.raises(ValueError, match=text):
                group.all_reduce(x, out)


def test_outputs_that_cannot_take_the_sum(cpu_pool: PoolFor) -> None:
    cpu_pool(2).run(_wrong_outputs)


def _full(context: RankContext) -> None:
    with checks.communicator(context, "UB", registered_pool="16K") as group:
        first = group.registered_empty((2048,), torch.float32)
        with pytest.raises(
            RuntimeError, match=r"full: a tensor \(2048,\) of float32 does not fit into .* set registered_p"
        ):
            group.registered_empty((2048,), torch.float32)
        del first
        group.registered_empty((2048,), torch.float32)
    with (
        checks.communicator(context, "TWOSHOT") as group,
        pytest.raises(RuntimeError, match="no registered memory: registered_pool is 0"),
    ):
        group.registered_empty((8,), torch.float32)


def test_the_pool_does_not_grow(cpu_pool: PoolFor) -> None:
    cpu_pool(2).run(_full)


def _different_places(context: RankContext) -> None:
    """Every rank passes another part of another tensor: they tell each other where."""
    with checks.communicator(context, "UB") as group:
        for _ in range(context.rank):
            group.registered_empty((100,), torch.float32)
        pool = poison(group.registered_empty((6400,), torch.float32))
        for call in range(10):
            first = 4 * ((call * (context.rank + 3)) % 7)
            inputs = _inputs(context, call, 500, torch.float32)
            before = pool.clone()
            group.all_reduce(inputs[context.rank], pool[first : first + 500])
            before[first : first + 500] = rank_ordered_sum(inputs)
            assert_same_bits(pool, before, f"call {call}: the output, and what lies around it")


def test_outputs_at_different_places(cpu_pool: PoolFor) -> None:
    cpu_pool(3).run(_different_places)


def _normed(context: RankContext, fuse: bool) -> dict[str, int]:
    with checks.communicator(context, "UB", fuse_norm=fuse) as group:
        for call in range(3):
            inputs = [part.view(6, 512) for part in _inputs(context, call, 6 * 512, torch.bfloat16)]
            torch.manual_seed(call)  # on every rank alike
            residual, weight = torch.randn(6, 512).bfloat16(), torch.randn(512).bfloat16()
            found = group.all_reduce_residual_rms_norm(inputs[context.rank], residual, weight, 1e-5)
            expected = residual_rms_norm(rank_ordered_sum(inputs), residual, weight, 1e-5)
            assert found.norm_out is not None
            assert expected.norm_out is not None
            assert_same_bits(found.norm_out, expected.norm_out, f"norm {call}")
            assert_same_bits(found.residual_out, expected.residual_out, f"residual {call}")
        calls: dict[str, int] = group.report()["calls"]
        return calls


@pytest.mark.parametrize(("fuse", "counted"), [(False, "UB, then norm"), (True, "TWOSHOT (fused norm)")])
def test_a_norm_behind_the_sum(cpu_pool: PoolFor, fuse: bool, counted: str) -> None:
    assert cpu_pool(2).run(_normed, fuse) == [{counted: 3}] * 2


def _missing(context: RankContext) -> str:
    with checks.communicator(context, "UB", timeout_s=1.0, first_timeout_s=1.0) as group:
        out = group.registered_empty((8,), torch.float32)
        group.all_reduce(torch.ones(8), out)
        if context.rank == 1:
            return ""
        try:
            group.all_reduce(torch.ones(8), out)
        except PeerTimeoutError as error:
            return str(error)
    return "no error"


def test_a_rank_that_does_not_come(cpu_pool: PoolFor) -> None:
    """The first thing that is waited for is that its output may be written."""
    assert "waited" in (text := cpu_pool(2).run(_missing)[0])
    assert "for rank 1 in TWOSHOT/output" in text
