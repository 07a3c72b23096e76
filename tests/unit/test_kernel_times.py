"""Kernels of traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_times


def kernel(name: str, ts: float, dur: float, correlation: int) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three kernels of a graph, of which two overlap, and one that was launched by itself before."""
    events = [
        kernel("second", 110.0, 4.0, 7),
        kernel("first", 100.0, 5.0, 7),
        kernel("first", 112.0, 7.0, 7),
        kernel("alone", 10.0, 50.0, 3),
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 90.0, "dur": 1.0, "args": {"correlation": 7}},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 9.0, "dur": 1.0, "args": {"correlation": 3}},
        {"name": "process_name"},
    ]
    path = tmp_path / "default" / "rank0.1.pt.trace.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_all_kernels(trace: Path) -> None:
    together, *kernels = kernel_times.rows_of(trace, 2)
    assert together == {"trace": "default/rank0", "kernels": 4, "span_us": 109, "idle_us": 45}
    assert [(row["kernel"], row["calls"], row["all_us"]) for row in kernels] == [("alone", 1, 50), ("first", 2, 12)]
    assert (kernels[1]["median_us"], kernels[1]["slow_us"]) == (6.0, 7.0)


def test_kernels_of_graphs(trace: Path) -> None:
    together, *kernels = kernel_times.rows_of(trace, 5, graphs=True)
    assert together == {"trace": "default/rank0", "kernels": 3, "span_us": 19, "idle_us": 5}
    assert [row["kernel"] for row in kernels] == ["first", "second"]


def test_a_trace_without_kernels(tmp_path: Path) -> None:
    path = tmp_path / "rank1.json"
    path.write_text('{"traceEvents": []}')
    assert kernel_times.rows_of(path, 5) == [{"trace": f"{tmp_path.name}/rank1", "kernels": 0}]
