"""llm-allreduce bench as a user runs it, on CPU ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llm_allreduce_plugin.bench import worker
from llm_allreduce_plugin.bench.candidates import Bound, OurSettings
from llm_allreduce_plugin.bench.ranks import RankContext
from llm_allreduce_plugin.cli import app
from tests.conftest import PoolFor

RUNNER = CliRunner()


def test_bench_on_cpu_ranks(tmp_path: Path) -> None:
    record = tmp_path / "bench.json"
    flags = ["--cpu", "-g", "2", "-b", "1K", "-e", "64K", "-f", "8", "-n", "3", "-m", "2", "--json", str(record)]
    result = RUNNER.invoke(app, ["bench", *flags])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    for name in ("ONESHOT", "TWOSHOT", "MINLATENCY", "AUTO", "LOWPRECISION", "gloo"):
        assert f"# {name}" in lines
    assert "# Out of bounds values : 0 OK" in lines
    answer = json.loads(record.read_text())
    assert answer["environment"]["command"]
    assert len(answer["rows"]) == 6 * 3
    for row in answer["rows"]:
        assert row["eager_us"] > 0
        assert row["eager_wrong"] == 0
        assert row["graph_us"] is None


def _measure_with_a_fault(context: RankContext) -> worker.Measurement:
    """One element of one rank's answer off by a bit."""
    assert worker.open_all(context, ("ONESHOT",), OurSettings()) == {}
    candidate = worker._open["ONESHOT"]
    bind = candidate.bind

    def bad_bind(x: torch.Tensor) -> Bound:
        call = bind(x)

        def bad_call() -> torch.Tensor:
            output = call()
            if context.rank == 1:
                output.view(-1)[17] += 1
            return output

        return bad_call

    candidate.bind = bad_bind
    try:
        return worker.measure(context, "ONESHOT", 512, worker.Options("bfloat16", calls=2, replays=2))
    finally:
        worker.close_all(context)


def test_bench_sees_a_wrong_answer(cpu_pool: PoolFor) -> None:
    """A check that cannot fail would be none."""
    for row in cpu_pool(2).run(_measure_with_a_fault):
        assert row.eager_wrong == 1


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from llm_allreduce_plugin.bench.plot import draw

    rows = [worker.Measurement("A", 1 << power, 1 << power, graph_us=1.0 + power) for power in range(10, 20)]
    draw(rows, 2, "a test", tmp_path / "plot.svg")
    picture = (tmp_path / "plot.svg").read_text()
    assert "bytes per rank" in picture or "<svg" in picture
