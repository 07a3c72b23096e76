"""Counting by strategy and by reason, and what Prometheus sees of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_allreduce_plugin import AllReduceConfig
from llm_allreduce_plugin.engines.vllm.summary import tell
from llm_allreduce_plugin.metrics import ReportCollector, samples_of
from llm_allreduce_plugin.selection.facts import GroupFacts, Transport
from llm_allreduce_plugin.selection.policy import decide
from llm_allreduce_plugin.tally import CountedCall, Fallback, Tally, fallback_of

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
    assert (call.calls, call.captured) == (1, 2)


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
    path.write_text(json.dumps({**REPORT, "closed": True}))  # it has said so itself
    tell(tmp_path, 0.0)
    path.write_text(json.dumps({**REPORT, "closed": False}))
    tell(tmp_path, time.time() + 100)  # an earlier run's
    assert caplog.messages == []
    tell(tmp_path, 0.0)
    assert caplog.messages == [
        "all-reduce summary: ONESHOT 7 calls and 3 captured into graphs, NCCL 2 calls; "
        "fallbacks: ONESHOT -> NCCL 2 (no kernel) (rank 0's last report)"
    ]


def test_samples_of_a_report() -> None:
    assert list(samples_of(REPORT)) == [
        ("llm_allreduce_calls", ("1", "ONESHOT", "eager"), 7),
        ("llm_allreduce_calls", ("1", "NCCL", "eager"), 2),
        ("llm_allreduce_calls", ("1", "ONESHOT", "captured"), 3),
        ("llm_allreduce_fallbacks", ("1", "ONESHOT", "NCCL", "no kernel"), 2),
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
    assert 'llm_allreduce_calls_total{how="eager",rank="1",strategy="ONESHOT"} 7.0' in text
    reason = 'rank="1",reason="no kernel",requested="ONESHOT",strategy="NCCL"'
    assert f"llm_allreduce_fallbacks_total{{{reason}}} 2.0" in text
    assert 'rank="0"' not in text
    assert 'rank="2"' not in text


PUBLISHER = """
import sys
from llm_allreduce_plugin.metrics import RankCounters
rank = int(sys.argv[1])
counters = RankCounters.if_wanted()
for calls in (3, 10):
    counters.publish({"rank": rank, "calls": {"ONESHOT": calls}, "captured": {}})
"""


def test_ranks_are_added_up_in_multi_process_mode(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for rank in (0, 0, 1):  # two processes are rank 0, of two groups
        subprocess.run([sys.executable, "-c", PUBLISHER, str(rank)], env=environment, check=True, timeout=60)
    script = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    run = [sys.executable, "-c", script]
    text = subprocess.run(run, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout
    assert 'llm_allreduce_calls_total{how="eager",rank="0",strategy="ONESHOT"} 20.0' in text
    assert 'llm_allreduce_calls_total{how="eager",rank="1",strategy="ONESHOT"} 10.0' in text
