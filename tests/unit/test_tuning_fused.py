"""Tuning of fused calls without ranks: which sizes are asked for, and what goes into the profile."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_allreduce_plugin.algorithms.ranges import ONE_KERNEL, TWO_KERNELS, Range, Tuned, TunedRanges
from llm_allreduce_plugin.bench.compare import Comparison
from llm_allreduce_plugin.bench.norm_compare import compare_norms, strategy_in_one_kernel
from llm_allreduce_plugin.selection.policy import decide_fused
from llm_allreduce_plugin.tuning.fused import HIDDEN, MOST_BYTES, FusedTuner
from llm_allreduce_plugin.tuning.plan import Group, WrongAnswerError, plan_of
from tests.support.fused_decisions import facts
from tests.support.group_facts import config

ROW = 2 * HIDDEN
SIZES = tuple(1 << power for power in range(10, 29))  # 1 KiB to 256 MiB


class MadeUpPool:
    """Ranks that are asked for times, which ``answer`` makes up of the size."""

    def __init__(self, answer: Callable[[int], Comparison | str]) -> None:
        self._answer = answer
        self.asked: list[tuple[int, str]] = []

    def run(self, function: Any, *given: Any, ranks: list[int]) -> list[Comparison | str]:
        world_size, strategy, rows, hidden, dtype, effort = given
        assert function is compare_norms
        assert (ranks, hidden, dtype) == ([0, 1, 2, 3], HIDDEN, "bfloat16")
        assert (world_size, effort.calls >= 3) == (4, True)
        self.asked.append((rows * ROW, strategy))
        return [self._answer(rows * ROW)] * world_size


def tuner(pool: MadeUpPool, dtype: str = "bfloat16", sizes: tuple[int, ...] = SIZES) -> FusedTuner:
    def strategy_at(size: int) -> str:
        return "ONESHOT" if size <= 1 << 20 else "TWOSHOT"

    plan = plan_of(sizes, 10.0, quick=True)
    return FusedTuner(pool, Group(4, dtype), plan, strategy_at, lambda _: None)  # type: ignore[arg-type]


def meeting_at(crossing: int) -> Callable[[int], Comparison]:
    """One kernel is faster below ``crossing``, two are above."""

    def answer(size: int) -> Comparison:
        times = {ONE_KERNEL: 10 + size / crossing, TWO_KERNELS: 11.0}
        return Comparison(size, times, {name: 3 * time_us for name, time_us in times.items()}, 0.0, 0.0, {})

    return answer


def test_every_other_size_from_a_row_to_the_largest() -> None:
    pool = MadeUpPool(meeting_at(1 << 40))
    tuned = tuner(pool)
    tuned.sweep()
    sizes = [size for size, _ in pool.asked]
    assert sizes == [ROW << power for power in range(0, 14, 2)]
    assert (sizes[0], sizes[-1]) == (ROW, MOST_BYTES)
    tuned.refine(time.monotonic() + 60)
    assert len(pool.asked) == len(sizes), "nothing changes, so there is nothing to look for"
    made = tuned.entry()
    assert made is not None
    assert [(found.max_bytes, found.runs) for found in made.graph] == [(None, "fused")]


def test_the_crossover_is_found_and_kept_with_its_times() -> None:
    crossing = 300 * ROW
    pool = MadeUpPool(meeting_at(crossing))
    tuned = tuner(pool)
    tuned.sweep()
    tuned.refine(time.monotonic() + 60)
    made = tuned.entry()
    assert made is not None
    assert made.hidden == HIDDEN
    (first, last) = made.graph
    assert (first.runs, last.runs, last.max_bytes) == ("fused", "then-norm", None)
    assert first.max_bytes is not None
    assert crossing / 1.2 < first.max_bytes < crossing * 1.2
    assert made.eager == made.graph, "eager calls take the host's time here"
    assert [(row.bytes, row.strategy) for row in made.measured] == sorted(pool.asked)
    assert all(row.graph_us == meeting_at(crossing)(row.bytes).graph_us for row in made.measured)


def test_when_time_is_up_the_search_ends() -> None:
    pool = MadeUpPool(meeting_at(300 * ROW))
    tuned = tuner(pool)
    tuned.sweep()
    swept = len(pool.asked)
    tuned.refine(time.monotonic())
    assert len(pool.asked) == swept
    made = tuned.entry()
    assert made is not None
    assert len(made.graph) == 2


def test_what_is_not_fused_is_left_out() -> None:
    """Larger messages than are fused, as through host memory; or nothing at all."""
    pool = MadeUpPool(lambda size: meeting_at(1 << 40)(size) if size <= 4 * ROW else "flagged")
    tuned = tuner(pool)
    tuned.sweep()
    made = tuned.entry()
    assert made is not None
    assert [row.bytes for row in made.measured] == [ROW, 4 * ROW]
    nothing = tuner(MadeUpPool(lambda _: "more ranks than are fused"))
    nothing.sweep()
    nothing.refine(time.monotonic() + 60)
    assert nothing.entry() is None


@pytest.mark.parametrize(("dtype", "sizes"), [("float32", SIZES), ("bfloat16", SIZES[:4])])
def test_nothing_is_asked_for_other_types_or_less_than_a_row(dtype: str, sizes: tuple[int, ...]) -> None:
    pool = MadeUpPool(meeting_at(1 << 40))
    tuned = tuner(pool, dtype, sizes)
    tuned.sweep()
    assert (pool.asked, tuned.entry()) == ([], None)


def test_a_wrong_answer_ends_it() -> None:
    wrong = Comparison(ROW, {}, {}, 0.0, 0.0, {ONE_KERNEL: 7, TWO_KERNELS: 0})
    with pytest.raises(WrongAnswerError, match=r"ONESHOT \(fused\) gave 7 wrong elements of 16384 bytes, then norm"):
        tuner(MadeUpPool(lambda _: wrong)).sweep()


def test_one_kernel_is_measured_as_auto_runs_it() -> None:
    """A profile by which the sum alone takes two steps from 128 KiB on, and the norm is always in its kernel."""
    sums = (Range(128 << 10, "ONESHOT"), Range(None, "TWOSHOT"))
    ranges = TunedRanges(2, sums, (Range(None, ONE_KERNEL),))
    steps = set()
    for ranks in (2, 3, 4, 8):
        group = facts(ranks)
        tuned = dataclasses.replace(group, tuned=Tuned(source="a profile", ranges=(ranges,)))
        for rows in (1, 8, 9, 16, 17, 40, 256):
            strategy = next(
                found.strategy for found in sums if found.max_bytes is None or rows * ROW <= found.max_bytes
            )
            measured = strategy_in_one_kernel(group, strategy, rows * ROW)
            here = decide_fused(config(measured), group, rows, HIDDEN, "bfloat16", however_slow=True).launch
            auto = decide_fused(config(), tuned, rows, HIDDEN, "bfloat16").launch
            assert here == auto is not None, (ranks, rows)
            steps.add((ranks, strategy, measured))
    assert (4, "TWOSHOT", "ONESHOT") in steps
    assert (4, "TWOSHOT", "TWOSHOT") in steps
