"""What a communicator keeps of the calls that it has made: bounded, however many sizes there were."""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.runtime.plans import MOST_PLANS
from tests.conftest import PoolFor
from tests.support import checks

MANY = 16_384
HOT = 100  # a size that comes again and again


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _many_sizes(context: RankContext) -> tuple[int, int, float]:
    """Plans kept, bytes that memory grew by once their number was at its bound, and seconds for a report."""
    with checks.communicator(context, "ONESHOT") as group:
        made = 0
        for size in range(1, MANY + 1):
            group.all_reduce(torch.ones(size))
            made += 1
            if size % 50 == 0:
                group.all_reduce(torch.ones(HOT))
                made += 1
            if size == 2 * MOST_PLANS:
                hot = group._plans[HOT, torch.float32]
                gc.collect()
                before = _resident_bytes()
        assert group._plans[HOT, torch.float32][1] is hot[1], "a plan that is in use stays"
        integers = [group.all_reduce(torch.ones(size, dtype=torch.int32)) for size in (1, 2, 3)]  # no kernel
        assert torch.equal(integers[2], torch.full((3,), context.world_size, dtype=torch.int32))
        gc.collect()
        grown = _resident_bytes() - before
        seconds = []
        for _ in range(9):
            started = time.perf_counter()
            report = group.report()
            seconds.append(time.perf_counter() - started)
        assert report["calls"] == {"ONESHOT": made, "NCCL": 3}
        assert [(found["strategy"], found["calls"]) for found in report["fallback_calls"]] == [("NCCL", 3)]
        return len(group._plans), grown, min(seconds)


def test_plans_memory_and_reports_do_not_grow_with_the_number_of_sizes(cpu_pool: PoolFor) -> None:
    for plans, grown, seconds in cpu_pool(2).run(_many_sizes):
        assert plans <= MOST_PLANS
        assert grown < 8 << 20
        assert seconds < 2e-3


def _counts_while_reading(context: RankContext) -> None:
    """Plans come and go while another thread reads: no call is lost, none counted twice, and no total ever falls."""
    with checks.communicator(context, "TWOSHOT") as group:
        seen: list[int] = []
        over = threading.Event()

        def read() -> None:
            while not over.is_set():
                seen.append(sum(group.report()["calls"].values()))

        reader = threading.Thread(target=read)
        # Threads change places often, and no call waits long for the reader to let go of the interpreter.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        try:
            reader.start()
            for turn in range(3):
                for size in range(1, 2 * MOST_PLANS):
                    group.all_reduce(torch.ones(size + turn))
        finally:
            over.set()
            reader.join()
            sys.setswitchinterval(interval)
        assert seen == sorted(seen)
        assert group.report()["calls"] == {"TWOSHOT": 3 * (2 * MOST_PLANS - 1)}


def test_totals_are_exact_while_plans_come_and_go(cpu_pool: PoolFor) -> None:
    cpu_pool(2).run(_counts_while_reading)


def _no_reports(context: RankContext) -> int:
    """How often the totals were added up in a second in which nobody wants a report."""
    with checks.communicator(context, "TWOSHOT") as group:
        group.all_reduce(torch.ones(8))
        counts, asked = group._tally.counts, []

        def counted() -> object:
            asked.append(1)
            return counts()

        group._tally.counts = counted  # type: ignore[method-assign]
        time.sleep(1.6)
        return len(asked)


def test_nothing_is_added_up_where_nobody_wants_a_report(cpu_pool: PoolFor) -> None:
    assert cpu_pool(2).run(_no_reports) == [0, 0]


def _kept_for_eager_calls(context: RankContext) -> tuple[int, int, dict[str, int]]:
    """Plans that calls in one step have, of all that are kept; and what was counted."""
    with checks.communicator(context, "MINLATENCY") as group:
        for size in range(1, 2 * MOST_PLANS):
            whole = group.all_reduce(torch.ones(size, 2))
            assert torch.equal(whole, torch.full((size, 2), float(context.world_size)))
        group.all_reduce(torch.ones(3, dtype=torch.int32))  # no kernel
        eager: Any = group._eager_call
        kept = len(eager)
        assert eager(torch.ones(1, 2)) is None, "evicted with its plan"
        assert torch.equal(eager(torch.ones(size, 2)), whole)
        before = group.report()["calls"]["MINLATENCY"]
        assert torch.equal(group.all_reduce(torch.ones(2, size).t()), whole), "of another layout: in Python"
        assert group.report()["calls"]["MINLATENCY"] == before + 1
        ours = sum(entry is not None and entry.decision.launch is not None for entry in group._plans.values())
    with pytest.raises(RuntimeError, match="closed"):
        group.all_reduce(torch.ones(size, 2))
    assert len(eager) == 0
    return kept, ours, group.report()["calls"]


def test_calls_in_one_step_have_the_plans_that_are_kept(cpu_pool: PoolFor) -> None:
    for kept, ours, calls in cpu_pool(2).run(_kept_for_eager_calls):
        assert kept == ours <= MOST_PLANS
        assert calls == {"MINLATENCY": 2 * MOST_PLANS + 1, "NCCL": 1}


def _plans_of_eager_calls(context: RankContext, strategy: str, settings: dict[str, Any]) -> int:
    with checks.communicator(context, strategy, **settings) as group:
        mine = torch.full((1 << 20,), context.rank + 1.0)
        for _ in range(2):
            assert torch.equal(group.all_reduce(mine), torch.full((1 << 20,), 3.0))
        assert sum(group.report()["calls"].values()) == 2
        eager: Any = group._eager_call
        return len(eager)


@pytest.mark.parametrize(
    ("strategy", "settings", "kept"),
    [
        ("TWOSHOT", {}, 1),
        ("UB", {"registered_pool": 64 << 20}, 0),  # outputs are of that
        ("ONESHOT", {"check_calls": True}, 0),  # ranks compare first
        ("NCCL", {}, 0),
    ],
)
def test_what_more_than_one_step_is_needed_for(
    cpu_pool: PoolFor, strategy: str, settings: dict[str, Any], kept: int
) -> None:
    assert cpu_pool(2).run(_plans_of_eager_calls, strategy, settings) == [kept, kept]
