"""all_reduce_residual_rms_norm on CPU ranks: the oracle's bits in one kernel and in two, counts, what is refused."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin import (
    _C,
    AllReduceConfig,
    GroupBrokenError,
    PeerTimeoutError,
    RankMismatchError,
    TensorParallelCommunicator,
)
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind
from llm_allreduce_plugin.runtime.plans import MOST_PLANS
from tests.conftest import PoolFor
from tests.support import norm_checks
from tests.support.checks import communicator
from tests.support.forked import forked
from tests.support.norm_group import Boundary, assert_same, random_boundary
from tests.support.reference import rank_input, rank_ordered_sum

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SHAPES = ((1, 8), (3, 64), (0, 128), (2, 2880), (5, 4096), (33, 512), (1, 8192), (130, 1024))
LARGE = ((300, 4096), (7, 16392))


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_one_kernel_and_two_give_the_bits_of_the_oracle(cpu_pool: PoolFor, world_size: int) -> None:
    """Whatever strategy sums, and in how many rounds: a small workspace takes many."""
    pool, shapes = cpu_pool(world_size), (*SHAPES, *LARGE)
    digests = [
        pool.run(norm_checks.check_shapes, strategy, torch.bfloat16, shapes, settings, name)[0]
        for strategy, settings, name in (
            ("ONESHOT", {"workspace_bytes": 2 << 20}, "ONESHOT (fused norm)"),
            ("TWOSHOT", {}, "TWOSHOT (fused norm)"),
            ("MINLATENCY", {"fuse_norm": False}, "MINLATENCY, then norm"),
        )
    ]
    assert digests == [digests[0]] * 3


@pytest.mark.parametrize("world_size", (6, 7))
def test_of_more_ranks(cpu_pool: PoolFor, world_size: int) -> None:
    pool, shapes = cpu_pool(world_size), ((1, 8), (5, 4096), (33, 512))
    digests = [
        pool.run(norm_checks.check_shapes, strategy, torch.bfloat16, shapes, {}, f"{strategy} (fused norm)")[0]
        for strategy in ("ONESHOT", "TWOSHOT")
    ]
    assert digests[0] == digests[1]


def test_as_many_rows_as_there_may_be(cpu_pool: PoolFor) -> None:
    digests = [
        cpu_pool(2).run(norm_checks.check_shapes, "TWOSHOT", torch.bfloat16, ((65536, 16),), settings, name)[0]
        for settings, name in (({}, "TWOSHOT (fused norm)"), ({"fuse_norm": False}, "TWOSHOT, then norm"))
    ]
    assert digests[0] == digests[1]


def test_other_types(cpu_pool: PoolFor) -> None:
    cpu_pool(2).run(norm_checks.check_shapes, "TWOSHOT", torch.float16, SHAPES, {}, "TWOSHOT (fused norm)")
    cpu_pool(2).run(norm_checks.check_shapes, "TWOSHOT", torch.float32, SHAPES, {}, "TWOSHOT, then norm")


def test_behind_the_engines_own_sum(cpu_pool: PoolFor) -> None:
    """Of two ranks in fp32, which is rounded once whoever adds."""
    name = "NCCL, then norm"
    answers = cpu_pool(2).run(norm_checks.check_shapes, "NCCL", torch.float32, SHAPES, {}, name)
    assert answers == cpu_pool(2).run(
        norm_checks.check_shapes, "ONESHOT", torch.float32, SHAPES, {}, "ONESHOT, then norm"
    )


def _without_the_kernel(context: RankContext, dtype: torch.dtype) -> tuple[str, str]:
    """Of one rank; all must decide alike."""

    def fails(*_given: object) -> None:
        message = "rms_norm: CUDA driver version is insufficient for CUDA runtime version"
        raise RuntimeError(message)

    with mock.patch.object(_C, "rms_norm", fails) if context.rank == 1 else contextlib.nullcontext():
        found = norm_checks.check_shapes(context, "NCCL", dtype, SHAPES, {}, "NCCL, then norm")
        with communicator(context, "NCCL") as group:
            return found, group.no_norm_reason


def test_without_a_kernel_norms_have_the_same_bits(cpu_pool: PoolFor) -> None:
    """A driver that is older than the library, or a GPU that nothing was compiled for: no kernel of it loads."""
    reason = "rank 1 cannot norm a row: rms_norm: CUDA driver version is insufficient for CUDA runtime version"
    for dtype in (torch.float32, torch.bfloat16):
        answers = cpu_pool(2).run(_without_the_kernel, dtype)
        digests = cpu_pool(2).run(norm_checks.check_shapes, "NCCL", dtype, SHAPES, {}, "NCCL, then norm")
        assert answers == [(digest, reason) for digest in digests]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_special_values(cpu_pool: PoolFor, dtype: torch.dtype) -> None:
    for settings in ({}, {"fuse_norm": False}):
        cpu_pool(3).run(norm_checks.check_specials, "TWOSHOT", dtype, settings)


@pytest.mark.parametrize("settings", ({}, {"fuse_norm": False}), ids=str)
def test_a_row_is_the_same_in_every_batch(cpu_pool: PoolFor, settings: dict[str, bool]) -> None:
    cpu_pool(3).run(norm_checks.check_batches, 1024, settings)


@pytest.mark.parametrize("dtype", (*SIXTEEN_BITS, torch.float32), ids=str)
def test_views(cpu_pool: PoolFor, dtype: torch.dtype) -> None:
    cpu_pool(2).run(norm_checks.check_views, dtype, {})


# -- what is counted and kept ------------------------------------------------------------------------------------------


def _call(group: TensorParallelCommunicator, rows: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> Normed:
    input_ = torch.ones(rows, hidden, dtype=dtype)
    return group.all_reduce_residual_rms_norm(input_, input_, torch.ones(hidden, dtype=dtype), 1e-6)


def _counts(context: RankContext) -> tuple[dict[str, int], list[dict[str, object]], list[str]]:
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    handler, logger = Handler(), logging.getLogger("llm_allreduce_plugin")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with communicator(context, "ONESHOT") as group:
            for _ in range(3):
                _call(group, 4, 64)
            _call(group, 4, 64, torch.float32)
            _call(group, 5, 64, torch.float32)
            _call(group, 0, 64)
            group.all_reduce(torch.ones(256, dtype=torch.bfloat16))
            report = group.report()
            fused = group.explain_fused((4, 64), torch.bfloat16)
            assert fused.launch is not None
            assert group.explain_fused((2, 2, 64), torch.bfloat16, QuantKind.FP8) == fused
    finally:
        logger.removeHandler(handler)
    return report["calls"], report["fallback_calls"], lines


def test_calls_are_counted_by_name_and_those_in_two_kernels_by_reason(cpu_pool: PoolFor) -> None:
    (calls, fallbacks, lines), (_, _, none) = cpu_pool(2).run(_counts)
    assert calls == {"ONESHOT (fused norm)": 3, "ONESHOT, then norm": 2, "ONESHOT": 1}
    reason = "only 16-bit types are fused, not float32"
    of = {"requested": "fused norm", "strategy": "ONESHOT, then norm", "reason": reason}
    assert fallbacks == [{**of, "calls": 2}]
    assert lines.count(f"INFO norms run in a kernel of their own: {reason}") == 1
    assert any(f"fallbacks: fused norm -> ONESHOT, then norm 2 ({reason})" in line for line in lines), lines
    assert none == [], "only the first rank logs"


def _many_shapes(context: RankContext) -> int:
    with communicator(context, "ONESHOT") as group:
        for rows in range(1, 2 * MOST_PLANS):
            _call(group, rows, 8)
        assert group.report()["calls"] == {"ONESHOT (fused norm)": 2 * MOST_PLANS - 1}
        return len(group._normed)


def test_plans_are_bounded(cpu_pool: PoolFor) -> None:
    assert all(plans <= MOST_PLANS for plans in cpu_pool(2).run(_many_shapes))


def _mixed(context: RankContext) -> None:
    """Plain and fused calls in turns on one workspace."""
    with communicator(context, "TWOSHOT", workspace_bytes=2 << 20) as group:
        for turn in range(60):
            rows = 1 + turn * 37 % 200
            world = range(context.world_size)
            inputs = [rank_input(turn, rank, rows * 512, torch.bfloat16).view(rows, 512) for rank in world]
            if turn % 3 == 0:
                expected = rank_ordered_sum(inputs)
                assert torch.equal(group.all_reduce(inputs[context.rank]), expected)
                continue
            boundary = random_boundary(turn, rows, 512, torch.bfloat16)
            norm_checks.norm_and_compare(context, group, inputs, boundary, f"turn {turn}")


def test_plain_and_fused_calls_follow_each_other(cpu_pool: PoolFor) -> None:
    cpu_pool(3).run(_mixed)


# -- what is refused, and what breaks ----------------------------------------------------------------------------------


def _refused(context: RankContext) -> None:
    half = torch.bfloat16
    x, w = torch.ones(4, 64, dtype=half), torch.ones(64, dtype=half)
    with communicator(context, "ONESHOT") as group:

        def refused(text: str, *args: object, **kwargs: object) -> None:
            with pytest.raises(ValueError, match=re.escape(text)):
                group.all_reduce_residual_rms_norm(*args, **kwargs)  # type: ignore[arg-type]

        refused("input is on meta, this communicator on cpu", x.to("meta"), None, w, 1e-6)
        refused("input has no dimensions", x[0, 0], None, w, 1e-6)
        refused("residual is [3, 64] torch.bfloat16 on cpu: must be [4, 64]", x, x[:3], w, 1e-6)
        refused("residual is [4, 64] torch.float32", x, x.float(), w, 1e-6)
        refused("weight is [63] torch.bfloat16 on cpu: must be [64] torch.bfloat16", x, None, w[:63], 1e-6)
        refused("weight is [64] torch.bfloat16 on meta", x, None, w.to("meta"), 1e-6)
        refused("rows of 12 elements", x[:, :12], None, w[:12], 1e-6)
        refused("needs a multiple of 128", x, None, w, 1e-6, quant=Quant(QuantKind.FP8_GROUP))
        refused("eps=nan: must be a finite number", x, None, w, float("nan"))
        refused("eps=-1: must be", x, None, w, -1)
        refused("weight_bias=inf: must be", x, None, w, 1e-6, weight_bias=float("inf"))
        refused("input is torch.int32: rows of float32, float16, bfloat16", x.int(), None, w.int(), 1e-6)
        scale = torch.ones(1, device="meta")
        refused("quant.scale is on meta", x, None, w, 1e-6, quant=Quant(QuantKind.FP8, scale))
        inputs = [x] * context.world_size
        norm_checks.norm_and_compare(context, group, inputs, Boundary(x.clone(), w), "after all these")
    with pytest.raises(RuntimeError, match="closed"):
        group.all_reduce_residual_rms_norm(x, None, w, 1e-6)


def test_wrong_arguments_are_named_and_break_nothing(cpu_pool: PoolFor) -> None:
    cpu_pool(2).run(_refused)


def _different(context: RankContext, check_calls: bool) -> str:
    with communicator(context, "ONESHOT", timeout_s=5.0, check_calls=check_calls) as group:
        try:
            if context.rank == 0:
                _call(group, 4, 64)
            elif check_calls:
                _call(group, 4, 64, torch.float16)
            else:
                group.all_reduce(torch.ones(256, dtype=torch.bfloat16))
        except (RankMismatchError, PeerTimeoutError, GroupBrokenError) as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def test_ranks_that_make_different_calls_hear_of_it() -> None:
    with forked(2, _different, False) as ranks:
        answers = [ranks.value(rank, 60) for rank in range(2)]
    made = "rank 0 passes 256 bfloat16 (ONESHOT, with a norm), rank 1 256 bfloat16 (ONESHOT)"
    assert any(f"ranks make different calls: {made}" in answer for answer in answers), answers
    assert all("ranks make different calls" in answer for answer in answers), answers


def test_check_calls_names_the_difference(cpu_pool: PoolFor) -> None:
    for answer in cpu_pool(2).run(_different, True):
        assert answer.startswith(
            "RankMismatchError: call 1: rank 0 passes 4 x 64 bfloat16 + residual, norm (eps 1e-06), "
            "rank 1 4 x 64 float16 + residual, norm (eps 1e-06)"
        ), answer


def _absent(context: RankContext) -> tuple[float, str]:
    config = AllReduceConfig(allreduce_strategy="TWOSHOT", timeout_s=2.0)
    made = TensorParallelCommunicator(context.group, context.device, config)
    _call(made, 4, 64)
    if context.rank == 1:
        return 0.0, ""
    started = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        _call(made, 4, 64)
    seconds = time.monotonic() - started
    with pytest.raises(PeerTimeoutError):  # for good, and at once
        _call(made, 4, 64)
    made.close()
    return seconds, str(caught.value)


def test_a_rank_that_never_arrives() -> None:
    with forked(2, _absent) as ranks:
        seconds, text = ranks.value(0, 60)
    assert 2.0 <= seconds < 7.0
    assert re.fullmatch(r"rank 0 waited [2-6](\.\d+)? s for rank 1 in TWOSHOT/scatter", text), text


def _no_rows(context: RankContext) -> None:
    """Nothing waits for anybody, and shapes are right."""
    with communicator(context, "ONESHOT") as group:
        if context.rank == 0:
            x = torch.ones(0, 256, dtype=torch.bfloat16)
            weight = torch.ones(256, dtype=torch.bfloat16)
            quant = Quant(QuantKind.FP8_GROUP)
            outputs = group.all_reduce_residual_rms_norm(x, x, weight, 1e-6, quant=quant)
            assert_same(outputs, Boundary(x, weight, 1e-6, quant=quant).expected(x), "no rows")
        context.gather(None)


def test_no_rows(cpu_pool: PoolFor) -> None:
    cpu_pool(2).run(_no_rows)
