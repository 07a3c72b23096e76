"""Counting by strategy and by reason, and what Prometheus sees of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.algorithms.facts import GroupFacts
from llm_allreduce_plugin.engines.common.summary import tell
from llm_allreduce_plugin.runtime.metrics import ReportCollector, samples_of
from llm_allreduce_plugin.runtime.planner import Planner
from llm_allreduce_plugin.runtime.reports import Report
from llm_allreduce_plugin.runtime.tally import (
    FUSED,
    MOST_FALLBACKS,
    OTHER_REASONS,
    CountedCall,
    Fallback,
    Made,
    Tally,
    fallback_of,
    fallbacks_of,
    summary_of,
)
from llm_allreduce_plugin.selection.policy import decide, decide_fused
from llm_allreduce_plugin.topology.links import Transport
from tests.support.fused_decisions import facts
from tests.support.group_facts import config

NOBODY = GroupFacts(2, "cuda", Transport.NONE, no_transport_reason="a test says so")


@dataclasses.dataclass
class Plan:
    calls: int = 0
    captured: int = 0


def decision(strategy: str, facts: GroupFacts = NOBODY, dtype: str = "bfloat16"):  # noqa: ANN201
    return decide(AllReduceConfig(allreduce_strategy=strategy), facts, 8, dtype)


def test_what_counts_as_a_fallback() -> None:
    """Not NCCL where NCCL was asked for; but NCCL where AUTO should have found better."""
    assert fallback_of(decision("NCCL")) is None
    assert fallback_of(decision("AUTO")) == Fallback("AUTO", "NCCL", "a test says so")
    assert fallback_of(decision("ONESHOT")) == Fallback("ONESHOT", "NCCL", "a test says so")


def test_calls_add_up_by_strategy_and_by_reason() -> None:
    tally = Tally()
    assert str(tally.counts()) == "no calls; no fallbacks"
    first, second, third = Plan(calls=2), Plan(calls=1, captured=36), Plan(captured=4)
    tally.add(decision("ONESHOT"), first)
    tally.add(decision("ONESHOT"), second)
    tally.add(decision("NCCL"), third)
    counts = tally.counts()
    assert counts.calls == {"NCCL": 3}
    assert counts.captured == {"NCCL": 40}
    assert counts.fallbacks == {Fallback("ONESHOT", "NCCL", "a test says so"): 39}
    text = "NCCL 3 calls and 40 captured into graphs; fallbacks: ONESHOT -> NCCL 39 (a test says so)"
    assert str(counts) == text
    first.calls += 5
    assert tally.counts().calls == {"NCCL": 8}
    tally.end()
    first.calls += 5
    assert tally.counts().calls == {"NCCL": 8}, "what is over does not change"


def test_the_engines_own_calls_are_told_apart_too() -> None:
    in_graph = False
    call = CountedCall(lambda value: value + 1, lambda: in_graph)
    assert call(1) == 2
    in_graph = True
    assert call(2) == 3
    assert call(3) == 4
    assert (call.made.calls, call.made.captured) == (1, 2)


def test_what_can_be_called_no_more_is_folded_into_totals() -> None:
    """Exactly, and whoever lets it go; what can still be called is looked at."""
    tally = Tally()
    kept = CountedCall(lambda value: value, bool)
    tally.add(decision("ONESHOT"), kept.made, kept)
    for number in range(5000):
        call = CountedCall(lambda value: value, bool)
        tally.add(decision("ONESHOT"), call.made, call)
        call(number)
        kept(number)
        assert len(tally._parts) <= 3
    call(0)
    assert tally.counts().calls == {"NCCL": 10_001}
    del call
    kept(0)
    assert tally.counts().calls == {"NCCL": 10_002}
    assert tally.counts().fallbacks == {Fallback("ONESHOT", "NCCL", "a test says so"): 10_002}


def test_only_so_many_reasons_are_told_apart() -> None:
    tally = Tally()
    for number in range(1000):
        facts = dataclasses.replace(NOBODY, no_transport_reason=f"{number} bytes are too many")
        tally.add(decision("ONESHOT", facts), Plan(calls=1))
    fallbacks = tally.counts().fallbacks
    assert len(fallbacks) == MOST_FALLBACKS + 1
    assert fallbacks[Fallback("ONESHOT", "NCCL", OTHER_REASONS)] == 1000 - MOST_FALLBACKS
    assert fallbacks.total() == 1000


# -- a norm behind the sum ---------------------------------------------------------------------------------------------


def test_names_with_a_norm() -> None:
    group = facts(2)

    def name(strategy: str, rows: int = 8, **settings: Any) -> str:
        return decide_fused(config(strategy, **settings), group, rows, 8192, "bfloat16").counted_as

    assert name("AUTO") == "ONESHOT (fused norm)"
    assert name("AUTO", 256) == "ONESHOT (fused norm)", "its kernel, where the sum alone would be two-shot"
    assert name("TWOSHOT") == "ONESHOT (fused norm)"
    assert name("MINLATENCY") == "MINLATENCY (fused norm)"
    assert name("MINLATENCY", fuse_norm=False) == "MINLATENCY, then norm"
    assert name("NCCL") == "NCCL, then norm"


def test_what_is_not_fused_is_counted_with_the_reason() -> None:
    tally = Tally()
    fused = decide_fused(config("ONESHOT"), facts(2), 8, 8192, "bfloat16")
    other = decide_fused(config("ONESHOT"), facts(2), 8, 8192, "float32")
    tally.add(fused, Made(calls=3, captured=1))
    tally.add(other, Made(captured=2))
    counts = tally.counts()
    assert counts.calls == {"ONESHOT (fused norm)": 3, "ONESHOT, then norm": 0}
    assert counts.captured == {"ONESHOT (fused norm)": 1, "ONESHOT, then norm": 2}
    reason = "only 16-bit types are fused, not float32"
    assert counts.fallbacks == {Fallback(FUSED, "ONESHOT, then norm", reason): 2}
    assert counts.fields()["fallbacks"] == {"fused norm -> ONESHOT, then norm": reason}


def test_the_sums_own_fallback_comes_first_and_what_nobody_asked_for_is_none() -> None:
    to_engine = decide_fused(config("ONESHOT"), facts(2, Transport.NONE), 8, 8192, "bfloat16")
    assert fallbacks_of(to_engine) == (Fallback("ONESHOT", "NCCL", "a test says so"),)
    unwritten = decide_fused(config("UB", registered_pool=0), facts(4), 8, 8192, "float32")
    assert [found.requested for found in fallbacks_of(unwritten)] == ["UB", FUSED]
    for nothing in (
        decide_fused(config("NCCL"), facts(2), 8, 8192, "bfloat16"),
        decide_fused(config("ONESHOT", fuse_norm=False), facts(2), 8, 8192, "bfloat16"),
        decide_fused(config("ONESHOT"), facts(2), 0, 8192, "bfloat16"),
    ):
        assert fallbacks_of(nothing) == ()


# -- reports -----------------------------------------------------------------------------------------------------------
def test_where_further_fallbacks_are_not_told_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def fall_back(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    cpu = torch.device("cpu")
    planner = Planner(AllReduceConfig(), NOBODY, 0, cpu, fall_back, workspace=None, health=None, checker=None)
    for number in range(2 * MOST_FALLBACKS):
        planner._log_once(logging.WARNING, f"line {number}")
        planner._log_once(logging.WARNING, f"line {number}")
    lines = [*(f"line {number}" for number in range(MOST_FALLBACKS))]
    assert caplog.messages == [*lines, "64 lines like these were written; further ones are not, reports count them all"]


REPORT = {
    "rank": 1,
    "calls": {"ONESHOT": 7, "NCCL": 2},
    "captured": {"ONESHOT": 3},
    "fallback_calls": [{"requested": "ONESHOT", "strategy": "NCCL", "reason": "no kernel", "calls": 2}],
}


def test_the_summary_of_a_killed_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rank-0.json"
    caplog.set_level("INFO")
    tell(tmp_path, 0.0)
    path.write_text("{")
    tell(tmp_path, 0.0)
    path.write_text(json.dumps({**REPORT, "rank": 0, "closed": True}))  # it has said so itself
    tell(tmp_path, 0.0)
    path.write_text(json.dumps({**REPORT, "rank": 0, "closed": False}))
    tell(tmp_path, time.time() + 100)  # an earlier run's
    assert caplog.messages == []
    tell(tmp_path, 0.0)
    assert caplog.messages == [
        "all-reduce summary: ONESHOT 7 calls and 3 captured into graphs, NCCL 2 calls; "
        "fallbacks: ONESHOT -> NCCL 2 (no kernel) (rank 0's last report)"
    ]


@pytest.mark.parametrize(
    ("stayed", "copied_out", "outputs"),
    [
        (120, 8, "120 of 128 outputs stayed in it, 8 were copied out, because nothing was free"),
        (1, 0, "1 of 1 output stayed in it"),
        (0, 1, "0 of 1 output stayed in it, 1 was copied out, because nothing was free"),
    ],
)
def test_the_summary_of_a_killed_worker_with_registered_memory(stayed: int, copied_out: int, outputs: str) -> None:
    used = {"bytes": 4096, "stayed": stayed, "copied_out": copied_out}
    made = Report.model_validate({"rank": 0, "calls": {"UB": 128}, "registered_memory": used})
    assert summary_of(made) == f"UB 128 calls; no fallbacks; registered memory of 4096 bytes: {outputs}"


def test_samples_of_a_report() -> None:
    assert list(samples_of(Report.model_validate(REPORT | {"group": "g"}))) == [
        ("llm_allreduce_calls", ("g", "1", "ONESHOT", "eager"), 7),
        ("llm_allreduce_calls", ("g", "1", "NCCL", "eager"), 2),
        ("llm_allreduce_calls", ("g", "1", "ONESHOT", "captured"), 3),
        ("llm_allreduce_fallbacks", ("g", "1", "ONESHOT", "NCCL", "no kernel"), 2),
    ]


def test_a_registry_shows_the_reports_of_this_run(tmp_path: Path) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    (tmp_path / "rank-0.json").write_text(json.dumps({**REPORT, "rank": 0}))
    os.utime(tmp_path / "rank-0.json", (time.time() - 100,) * 2)  # an earlier run's
    registry = prometheus.CollectorRegistry()
    registry.register(ReportCollector(tmp_path))
    (tmp_path / "rank-1.json").write_text(json.dumps(REPORT))
    (tmp_path / "rank-2.json").write_text("{")  # half a file is no reason to fail a scrape
    (tmp_path / "rank-3.json").write_text("[]")
    for path in tmp_path.glob("rank-[123].json"):
        os.utime(path, (time.time() + 1,) * 2)
    text = prometheus.generate_latest(registry).decode()
    assert 'llm_allreduce_calls_total{group="",how="eager",rank="1",strategy="ONESHOT"} 7.0' in text
    reason = 'group="",rank="1",reason="no kernel",requested="ONESHOT",strategy="NCCL"'
    assert f"llm_allreduce_fallbacks_total{{{reason}}} 2.0" in text
    assert 'rank="0"' not in text
    assert 'rank="2"' not in text


PUBLISHER = """
import sys
from llm_allreduce_plugin.runtime.metrics import RankCounters
rank = int(sys.argv[1])
counters = RankCounters.if_wanted()
for calls in (3, 10):
    counters.publish({"rank": rank, "group": sys.argv[2], "calls": {"ONESHOT": calls}, "captured": {}})
"""


def test_ranks_are_added_up_in_multi_process_mode(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for rank, group in ((0, "a"), (0, "b"), (1, "a")):  # two processes are rank 0, of two groups
        subprocess.run([sys.executable, "-c", PUBLISHER, str(rank), group], env=environment, check=True, timeout=60)
    script = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    run = [sys.executable, "-c", script]
    text = subprocess.run(run, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout
    for group, rank in (("a", 0), ("b", 0), ("a", 1)):
        labels = f'group="{group}",how="eager",rank="{rank}",strategy="ONESHOT"'
        assert f"llm_allreduce_calls_total{{{labels}}} 10.0" in text
