"""Ranks are killed and stopped at random moments: the others end in time, with an error that has a name.

``ALLREDUCE_TEST_ATTACKS=40`` makes so many attacks of each kind; few are made otherwise. Failures name their seed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig, TensorParallelCommunicator
from llm_allreduce_plugin.measure.ranks import RankContext
from tests.conftest import PoolFor
from tests.support import forked
from tests.support.forked import ForkedRanks

ATTACKS = int(os.environ.get("ALLREDUCE_TEST_ATTACKS", "4"))
CYCLES = int(os.environ.get("ALLREDUCE_TEST_CYCLES", "120"))
WORLD_SIZES = (2, 3, 4, 8)
TIMEOUT_S = 1.0
SLACK_S = 1.2  # beyond timeout_s
LAST_MOMENT_S = 0.4  # after some starts and closes


def _config(strategy: str) -> AllReduceConfig:
    return AllReduceConfig(
        allreduce_strategy=strategy,  # type: ignore[arg-type]
        timeout_s=TIMEOUT_S,
        first_timeout_s=TIMEOUT_S,
        start_timeout_s=TIMEOUT_S,
        tuning_profile="none",
    )


def _work(context: RankContext, strategy: str, calls: int) -> tuple[str, str, str, float, list[str]]:
    """Start, call and close, again and again. Where it ended, with which error, after how long; and what was left."""
    before = forked.open_files()
    config = _config(strategy)
    group = None
    while True:
        where, began = "start", time.monotonic()
        try:
            group = TensorParallelCommunicator(context.group, context.device, config)
            for _ in range(calls):
                where, began = "call", time.monotonic()
                group.all_reduce(torch.ones(1000))
            where, began = "close", time.monotonic()
            group.close()
            group = None
        except Exception as error:
            seconds = time.monotonic() - began
            kind, text = type(error).__name__, str(error)
            break
    if group is not None:
        with contextlib.suppress(Exception):  # as an engine's end would
            group.close()
    del group
    gc.collect()
    # Files of the agreement's last thread are let go a moment later.
    forked.wait_until(lambda: not forked.open_files() - before, 1.0)
    left = [*sorted(forked.open_files() - before), *forked.own_mappings()]
    left += [thread.name for thread in threading.enumerate() if thread.name == "llm-allreduce-monitor"]
    return where, kind, text, seconds, left


def _attack(kind: signal.Signals, seed: int) -> str:
    """One attack; where it met the survivors."""
    moments = random.Random(seed)
    world_size = WORLD_SIZES[seed % len(WORLD_SIZES)]
    victim = moments.randrange(world_size)
    calls = moments.choice((0, 3, 30))
    what = f"seed {seed}: rank {victim} of {world_size}"
    ranks = ForkedRanks(world_size, _work, moments.choice(("ONESHOT", "TWOSHOT")), calls)
    try:
        ranks.go()
        time.sleep(moments.uniform(0, LAST_MOMENT_S))
        ranks.send(victim, kind)
        places = []
        for rank in range(world_size):
            if rank == victim:
                continue
            # What was under way may go well; then the next wait is the one that expires.
            ended = ranks.ended(rank, 4 * (TIMEOUT_S + SLACK_S), what)
            assert ended.kind == "ok", f"{what}: {ended}"
            where, error, text, seconds, left = ended.value
            assert error in {"PeerTimeoutError", "StartTimeoutError", "StartError"}, f"{what}: {ended}"
            assert seconds < TIMEOUT_S + SLACK_S, f"{what}: {ended}"
            assert "rank" in text, f"{what}: {ended}"
            if "the store of the process group does not answer" in text:
                # A thread waits for the lock of its file, which a stopped rank holds.
                left = [line for line in left if not line.endswith("/store")]
            assert left == [], f"{what}: {ended}"
            places.append(where)
        assert forked.left_in_shm(ranks.pids) == [], what
    finally:
        ranks.close()
    assert forked.left_in_shm(ranks.pids) == [], what
    return ",".join(sorted(set(places)))


@pytest.mark.parametrize("kind", (signal.SIGKILL, signal.SIGSTOP), ids=("kill", "stop"))
@pytest.mark.timeout(1200)
def test_ranks_survive_attacks_on_others(kind: signal.Signals) -> None:
    first = random.SystemRandom().randrange(1 << 30)
    places = [_attack(kind, first + number) for number in range(ATTACKS)]
    assert "close" not in " ".join(places), "closing waits for nobody"


def _state() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
    }


def _cycles(context: RankContext, cycles: int) -> tuple[dict[str, int], dict[str, int]]:
    """Communicators one after the other in one group. What there was after a few, and after all."""
    config = AllReduceConfig(allreduce_strategy="AUTO", tuning_profile="none")  # type: ignore[arg-type]
    early: dict[str, int] = {}
    for cycle in range(cycles):
        group = TensorParallelCommunicator(context.group, context.device, config)
        group.all_reduce(torch.ones(1000))
        group.close()
        if cycle == 19:
            early = _state()
    context.gather(None)
    return early, _state()


def test_communicators_leave_nothing(cpu_pool: PoolFor) -> None:
    for early, late in cpu_pool(2).run(_cycles, CYCLES):
        assert late["files"] <= early["files"] + 2, (early, late)
        assert late["threads"] <= early["threads"] + 1, (early, late)
        assert late["maps"] <= early["maps"] + 20, (early, late)  # the allocator's
        assert late["rss_mib"] <= early["rss_mib"] + 16, (early, late)
