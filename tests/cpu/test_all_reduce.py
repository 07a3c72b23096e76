"""CPU ranks as processes: ONESHOT and TWOSHOT against the rank-ordered fp32 reference."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import re
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig, PeerTimeoutError, RankMismatchError, TensorParallelCommunicator
from llm_allreduce_plugin.group import facts
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.transport import nameless
from tests.conftest import PoolFor
from tests.support import checks
from tests.support.forked import forked, wait_until
from tests.support.hosts import on_host
from tests.support.reference import DTYPES, SIZES

WORLD_SIZES = (2, 3, 4, 8)
STRATEGIES = ("ONESHOT", "TWOSHOT")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sizes(cpu_pool: PoolFor, world_size: int, dtype: torch.dtype, strategy: str) -> None:
    cpu_pool(world_size).run(checks.check_sizes, strategy, dtype, SIZES, {})


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_special_values(cpu_pool: PoolFor, world_size: int) -> None:
    pool = cpu_pool(world_size)
    for dtype in DTYPES:
        answers = [pool.run(checks.check_specials, strategy, dtype, {}) for strategy in STRATEGIES]
        everyone = {digest for answer in answers for digests in answer for digest in digests}
        assert len(everyone) == 1, "ranks and strategies must agree to the bit, NaN included"


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_value(cpu_pool: PoolFor, dtype: torch.dtype) -> None:
    for strategy in STRATEGIES:
        cpu_pool(3).run(checks.check_every_value, strategy, dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", (2, 3, 8))
def test_views(cpu_pool: PoolFor, world_size: int, strategy: str) -> None:
    for dtype in DTYPES:
        cpu_pool(world_size).run(checks.check_views, strategy, dtype, {})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", (2, 8))
def test_messages_larger_than_the_workspace(cpu_pool: PoolFor, world_size: int, strategy: str) -> None:
    settings: dict[str, Any] = {"workspace_bytes": 2 << 20}
    cpu_pool(world_size).run(checks.check_sizes, strategy, torch.bfloat16, (2_345_677,), settings)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_strategies_and_batch_sizes_agree(cpu_pool: PoolFor, world_size: int) -> None:
    cpu_pool(world_size).run(checks.check_strategies_agree, torch.bfloat16, 1 << 16, {})


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_mixed_sequence(cpu_pool: PoolFor, world_size: int) -> None:
    cpu_pool(world_size).run(checks.check_sequence, 150, {"workspace_bytes": 2 << 20})


def _staged_is_for_gpus(context: RankContext) -> None:
    with checks.communicator(context, "TWOSHOT", staged="on") as group:
        launch = group.explain((100_000,), torch.float32).launch
        assert launch is not None
        assert not launch.staged


def test_staged_makes_no_difference_to_cpu_ranks(cpu_pool: PoolFor) -> None:
    cpu_pool(3).run(_staged_is_for_gpus)
    cpu_pool(3).run(checks.check_sizes, "TWOSHOT", torch.bfloat16, (100_001,), {"staged": "on"})


@pytest.mark.parametrize("world_size", (2, 3))
def test_other_inputs(cpu_pool: PoolFor, world_size: int) -> None:
    cpu_pool(world_size).run(checks.check_other_inputs)


# -- start -------------------------------------------------------------------------------------------------------------


def _mismatch(context: RankContext) -> str:
    try:
        with checks.communicator(context, "ONESHOT", timeout_s=10.0 + (context.rank == 2)):
            return "no error"
    except RankMismatchError as error:
        return str(error)


def test_ranks_with_different_settings_do_not_start(cpu_pool: PoolFor) -> None:
    answers = cpu_pool(3).run(_mismatch)
    assert answers == [answers[0]] * 3
    assert "ranks disagree about timeout_s: 10.0 on ranks 0, 1; 11.0 on rank 2" in answers[0]


def _log_lines(context: RankContext, strategy: str) -> list[tuple[str, str]]:
    """What a rank logs while it starts and makes three calls, two of which fall back for the same reason."""
    lines: list[tuple[str, str]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.levelname, record.getMessage()))

    handler = Handler()
    logger = logging.getLogger("llm_allreduce_plugin")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with checks.communicator(context, strategy, registered_pool=0) as group:
            group.all_reduce(torch.ones(3))
            group.all_reduce(torch.ones(3, dtype=torch.int32))
            group.all_reduce(torch.ones(4, dtype=torch.int32))
    finally:
        logger.removeHandler(handler)
    return lines


def test_one_line_says_what_runs_and_each_fallback_is_logged_once(cpu_pool: PoolFor) -> None:
    rank_0, rank_1 = cpu_pool(2).run(_log_lines, "UB")
    assert rank_1 == []
    assert rank_0 == [
        ("INFO", "all-reduce over 2 ranks (shm memory, allreduce_strategy UB, sizes per rank): TWOSHOT at every size"),
        ("WARNING", "UB falls back to TWOSHOT: registered_pool is 0: there is no registered memory"),
        (
            "WARNING",
            "UB falls back to NCCL: no kernel for dtype int32 (there are for float32, float16, bfloat16)",
        ),
        (
            "INFO",
            "all-reduce summary: TWOSHOT 1 call, NCCL 2 calls; fallbacks: "
            "UB -> TWOSHOT 1 (registered_pool is 0: there is no registered memory); "
            "UB -> NCCL 2 (no kernel for dtype int32 "
            "(there are for float32, float16, bfloat16))",
        ),
    ]


def _without_kernels(context: RankContext) -> tuple[str, str]:
    with checks.communicator(context, "AUTO") as group:
        ones = torch.ones(5, dtype=torch.bfloat16)
        assert torch.equal(group.all_reduce(ones), ones * context.world_size)
        assert torch.equal(ones, torch.ones_like(ones))
        return str(group.explain((5,), torch.bfloat16).strategy), group.explain((5,), torch.bfloat16).reason


def test_world_size_without_kernels(cpu_pool: PoolFor) -> None:
    for strategy, reason in cpu_pool(1).run(_without_kernels):
        assert strategy == "NCCL"
        assert reason == "no kernel for 1 rank (there are for 2 to 72)"


def _shm_entries(context: RankContext) -> list[str]:
    with checks.communicator(context, "ONESHOT") as group:
        group.all_reduce(torch.ones(3))
        return [name for name in os.listdir("/dev/shm") if name.startswith("llm-allreduce")]


def test_shared_memory_has_no_name_while_it_is_used(cpu_pool: PoolFor) -> None:
    assert cpu_pool(2).run(_shm_entries) == [[], []]


def _no_shared_memory(context: RankContext) -> tuple[str, str]:
    with (
        mock.patch.object(os, "memfd_create", side_effect=OSError(errno.ENOSYS, "no such call")),
        mock.patch.object(nameless, "SHM_FOLDER", Path("/nowhere")),
    ):
        return _without_kernels(context)


def test_no_shared_memory_falls_back_with_the_reason(cpu_pool: PoolFor) -> None:
    for strategy, reason in cpu_pool(2).run(_no_shared_memory):
        assert strategy == "NCCL"
        assert "rank 0 cannot create" in reason
        assert "/nowhere: No such file or directory" in reason


def _obstacle_on_one_rank(context: RankContext) -> tuple[str, str]:
    def obstacle(*_: object) -> str | None:
        return "rank 1 sees no peer access" if context.rank == 1 else None

    with mock.patch.object(facts, "transport_obstacle", obstacle):
        return _without_kernels(context)


def test_what_one_rank_cannot_do_no_rank_does(cpu_pool: PoolFor) -> None:
    assert cpu_pool(3).run(_obstacle_on_one_rank) == [("NCCL", "rank 1 sees no peer access")] * 3


def _abandon(context: RankContext, folder: str) -> bool:
    config = AllReduceConfig(allreduce_strategy="ONESHOT", report_dir=folder)
    made = TensorParallelCommunicator(context.group, context.device, config)
    made.all_reduce(torch.ones(3))
    assert made._held.monitor is not None
    thread = made._held.monitor._thread
    del made
    gc.collect()
    thread.join(10)
    return thread.is_alive()


def test_an_abandoned_communicator_leaves_no_thread(cpu_pool: PoolFor, tmp_path: Path) -> None:
    assert cpu_pool(2).run(_abandon, str(tmp_path)) == [False, False]


def _abandon_over_hosts(context: RankContext) -> tuple[bool, bool]:
    with on_host((0, 1), context):
        made = context.communicator("ONESHOT")
    made.all_reduce(torch.ones(3))
    between = made._held.between
    assert between is not None
    thread, watch, rail = between.watch._thread, weakref.ref(between.watch), weakref.ref(between.rail)
    context.gather(None)  # none leaves while others call
    del made, between
    gc.collect()
    thread.join(10)
    gc.collect()
    return thread.is_alive(), watch() is None and rail() is None


def test_an_abandoned_communicator_over_hosts_leaves_nothing(cpu_pool: PoolFor) -> None:
    assert cpu_pool(2).run(_abandon_over_hosts) == [(False, True)] * 2


def _report(context: RankContext, folder: str) -> None:
    with checks.communicator(context, "TWOSHOT", report_dir=folder) as group:
        for _ in range(3):
            group.all_reduce(torch.ones(8))


def _drop_without_collection(context: RankContext) -> None:
    gc.collect()
    gc.disable()
    try:
        for closed in (True, False):
            group = context.communicator("TWOSHOT")
            group.all_reduce(torch.ones(100))
            group.all_reduce(torch.arange(10))  # no kernel
            workspace, gone = group._held.workspace, weakref.ref(group)
            if closed:
                group.close()
            else:
                assert group._held.monitor is not None
                thread = group._held.monitor._thread
            del group
            assert gone() is None, "nothing refers back to the communicator"
            if not closed:
                thread.join(10)  # finds out within a second
            assert sys.getrefcount(workspace) == 2, "nobody else holds the workspace: here and in the call"
    finally:
        gc.enable()
    context.gather(None)


def test_communicators_end_without_garbage_collection(cpu_pool: PoolFor) -> None:
    """A collection may come at any time, in the middle of a graph capture too."""
    cpu_pool(2).run(_drop_without_collection)


def test_report_files(cpu_pool: PoolFor, tmp_path: Path) -> None:
    cpu_pool(2).run(_report, str(tmp_path / "reports"))
    paths = [path for rank in range(2) for path in (tmp_path / "reports").glob(f"rank-{rank}.ranks0-1.*.json")]
    reports = [json.loads(path.read_text()) for path in paths]
    assert [report["rank"] for report in reports] == [0, 1]
    assert len({report["group"] for report in reports}) == 1
    for report in reports:
        assert report["calls"] == {"TWOSHOT": 3}
        assert report["transport"] == "shm"
        assert report["fallbacks"] == {}


# -- failures ----------------------------------------------------------------------------------------------------------


def _wait_for_absent_rank(context: RankContext, strategy: str, timeout_s: float) -> tuple[float, str]:
    config = AllReduceConfig(allreduce_strategy=strategy, timeout_s=timeout_s)
    made = TensorParallelCommunicator(context.group, context.device, config)
    made.all_reduce(torch.ones(100))
    if context.rank == 1:
        return 0.0, ""
    started = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        made.all_reduce(torch.ones(100))
    seconds = time.monotonic() - started
    with pytest.raises(PeerTimeoutError):  # for good, and at once
        made.all_reduce(torch.ones(100))
    assert time.monotonic() - started < seconds + 1
    made.close()
    return seconds, str(caught.value)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rank_that_never_arrives(strategy: str) -> None:
    with forked(3, _wait_for_absent_rank, strategy, 2.0) as ranks:
        answers = [ranks.value(rank, 60) for rank in range(3)]
    phase = {"ONESHOT": "gather", "TWOSHOT": "scatter"}[strategy]
    for rank in (0, 2):
        seconds, text = answers[rank]
        assert 2.0 <= seconds < 2.0 + 5.0
        assert re.fullmatch(rf"rank {rank} waited [2-6](\.\d+)? s for rank 1 in {strategy}/{phase}", text)


def _reduce_for_ever(context: RankContext, folder: str) -> str:
    config = AllReduceConfig(allreduce_strategy="ONESHOT", timeout_s=2.0)
    made = TensorParallelCommunicator(context.group, context.device, config)
    made.all_reduce(torch.ones(1000))
    (Path(folder) / str(context.rank)).touch()
    while True:
        try:
            made.all_reduce(torch.ones(1000))
        except PeerTimeoutError as error:
            return str(error)


def test_killed_rank_leaves_no_shared_memory_and_stops_the_others(tmp_path: Path) -> None:
    with forked(2, _reduce_for_ever, str(tmp_path)) as ranks:
        assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
        time.sleep(0.5)
        ranks.send(1, signal.SIGKILL)
        text = ranks.value(0, 2.0 + 5.0)
    # Not for timeout_s: who has ended will not come.
    assert re.fullmatch(r"rank 0 waited [\d.]+ s for rank 1 in ONESHOT/gather, whose process has ended", text)
    assert [name for name in os.listdir("/dev/shm") if name.startswith("llm-allreduce")] == []


def _peer_visible(context: RankContext) -> None:
    """CPU ranks get an ordinary tensor: the same program runs everywhere."""
    with checks.communicator(context, "TWOSHOT") as group:
        tensor = group.peer_visible_empty((3, 40), torch.float32)
        assert tensor.shape == (3, 40)
        tensor.fill_(float(context.rank + 1))
        assert torch.equal(group.all_reduce(tensor), torch.full((3, 40), 3.0))


def test_peer_visible_memory_is_ordinary_on_cpu_ranks(cpu_pool: PoolFor) -> None:
    cpu_pool(2).run(_peer_visible)
