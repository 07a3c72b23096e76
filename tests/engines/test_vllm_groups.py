"""Real vLLM with several tensor-parallel groups on one machine: each is counted, reported and summed up."""

from __future__ import annotations

import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm_allreduce_plugin.demo import serve as serve_demo

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

TOKENS = 6


def counters(url: str) -> dict[tuple[str, str], float]:
    """Calls by group and rank at the metrics endpoint."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("llm_allreduce_calls_total{"):
            labels, value = line.removeprefix("llm_allreduce_calls_total{").rsplit("} ", 1)
            of = dict(part.split("=", 1) for part in labels.split(","))
            key = (of["group"].strip('"'), of["rank"].strip('"'))
            found[key] = found.get(key, 0.0) + float(value)
    return found


def complete(port: int, text: str) -> None:
    body = {"model": "demo", "prompt": text, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    serve_demo.http(f"http://127.0.0.1:{port}/v1/completions", body)


# Four workers take two minutes. What they share is tested without them: tests/unit/test_reports.py, test_tally.py.
@pytest.mark.slow
def test_data_parallel_groups_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``vllm serve -tp 2 --data-parallel-size 2``: four workers, of which two are rank 0."""
    monkeypatch.setenv("DEMO_DEVICE", "cpu")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    model, folder, log = tmp_path / "model", tmp_path / "report", tmp_path / "server.log"
    serve_demo.make_model(model)
    port = serve_demo.free_port()
    command, environment = serve_demo.server_setup("ONESHOT", tmp_path, model, port)
    command += ["--data-parallel-size", "2", "--api-server-count", "1"]
    before: dict[tuple[str, str], float] = {}
    with serve_demo.server(command, environment, log) as process:
        serve_demo.wait_for_health(process, f"http://127.0.0.1:{port}/health", log)
        with ThreadPoolExecutor(8) as pool:
            for turn in range(4):
                list(pool.map(lambda number: complete(port, f"{number} words"), range(turn, turn + 8)))
                for _ in range(5):  # reports of the two groups come in turns
                    now = counters(f"http://127.0.0.1:{port}/metrics")
                    assert all(now.get(key, 0.0) >= value for key, value in before.items()), (before, now)
                    before = now
                    time.sleep(0.1)
        time.sleep(1.0)
        last = counters(f"http://127.0.0.1:{port}/metrics")
        complete(port, "once more, and then the end")
        time.sleep(0.6)  # a report is a quarter of a second old at most
    assert {rank for _, rank in last} == {"0", "1"}
    assert len({group for group, _ in last}) == 2
    assert len(last) == 4
    assert all(value > 0 for value in last.values())
    reports = serve_demo.read_reports(folder)
    assert len(reports) == 4
    total = {(report["group"], str(report["rank"])): sum(report["calls"].values()) for report in reports}
    assert total.keys() == last.keys()
    assert sum(total.values()) > sum(last.values()), "the last request is in the last reports"
    assert sorted(group.split(".")[0] for group in {group for group, _ in total}) == ["dp0", "dp1"]
    text = log.read_text(errors="replace")
    for group in {group for group, _ in total}:
        line = f"all-reduce summary of {group}: ONESHOT {total[group, '0']} calls; no fallbacks"
        assert line in text or f"all-reduce summary: ONESHOT {total[group, '0']} calls" in text, text[-3000:]
    assert os.environ.get("PROMETHEUS_MULTIPROC_DIR") is None
