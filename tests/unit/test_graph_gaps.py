"""What a trace says of the time between two replays of a graph."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import graph_gaps


def launch(correlation: int, ts: float, name: str = graph_gaps.LAUNCH) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "name": name, "ts": ts, "dur": 5.0, "args": {"correlation": correlation}}


def ran(correlation: int, ts: float, dur: float, name: str, cat: str = "kernel") -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


def step(number: int, at: float, logits: float = 20.0) -> list[dict[str, Any]]:
    """A replay of 100 us in two kernels that overlap, logits 10 us behind it, a copy at once; 200 us in all."""
    first = 10 * number
    return [
        launch(first, at - 30.0),
        ran(first, at, 60.0, "layer"),
        ran(first, at + 40.0, 60.0, "layer"),
        launch(first + 1, at + 50.0, "cudaLaunchKernel"),
        ran(first + 1, at + 110.0, logits, "logits"),
        ran(first + 2, at + 110.0 + logits, 5.0, "copy", "gpu_memcpy"),
    ]


def test_a_step(tmp_path: Path) -> None:
    events = [event for number in range(4) for event in step(number, 200.0 * number)]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events[::-1]}).encode()))
    found = graph_gaps.summary_of(graph_gaps.replays_in(graph_gaps.events_of(path)))
    assert found == {
        "steps": 3,
        "of": 3,
        "replay_us": 100.0,
        "gap_us": 100.0,
        "idle_us": 75.0,
        "idle_before_replay_us": 65.0,
        "launched_us": 70.0,
        "gap": [
            {"begins": 10.0, "takes": 20.0, "idle_before": 10.0, "name": "logits"},
            {"begins": 30.0, "takes": 5.0, "idle_before": 0.0, "name": "copy"},
        ],
    }


def test_steps_that_do_something_else_are_left_out() -> None:
    events = [event for number in range(5) for event in step(number, 200.0 * number)]
    events += [ran(25, 540.0, 30.0, "prefill")]
    found = graph_gaps.summary_of(graph_gaps.replays_in(events))
    assert (found["steps"], found["of"]) == (3, 4)
    assert [row["name"] for row in found["gap"]] == ["logits", "copy"]


def test_one_replay_has_no_gap() -> None:
    with pytest.raises(ValueError, match="no two replays"):
        graph_gaps.summary_of(graph_gaps.replays_in(step(1, 0.0)))
