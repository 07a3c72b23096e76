"""llm-allreduce bench as a user runs it, on CPU ranks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llm_allreduce_plugin.bench import worker
from llm_allreduce_plugin.bench.candidates import Bound, OurSettings
from llm_allreduce_plugin.bench.norm_candidates import NormCase
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.measure import ranks as rank_pools
from llm_allreduce_plugin.measure.ranks import RankContext
from llm_allreduce_plugin.norm import Normed, QuantKind
from tests.conftest import PoolFor
from tests.support.pool import ForkedPool

RUNNER = CliRunner()


def test_bench_on_cpu_ranks(tmp_path: Path) -> None:
    record = tmp_path / "bench.json"
    flags = ["--cpu", "-g", "2", "-b", "1K", "-e", "64K", "-f", "8", "-n", "3", "-m", "2", "--json", str(record)]
    result = RUNNER.invoke(app, ["bench", *flags])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    for name in ("ONESHOT", "TWOSHOT", "MINLATENCY", "AUTO", "UB", "LOWPRECISION", "gloo"):
        assert f"# {name}" in lines
    assert "# Out of bounds values : 0 OK" in lines
    answer = json.loads(record.read_text())
    assert answer["environment"]["command"]
    assert len(answer["rows"]) == 7 * 3
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


def test_plot_of_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"candidate": "LOWPRECISION", "bytes": 4096, "count": 2048, "graph_us": 3.5}
    for name, wire, ranks in (("a", "fp8", 4), ("b", "tq3", 4), ("c", "fp8", 2)):
        record = {"world_size": ranks, "where": "a test", "options": {"wire_format": wire}, "rows": [row]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "d.json").write_text("[]")

    def run(*arguments: str) -> tuple[int, str]:
        result = RUNNER.invoke(app, ["plot", *arguments], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    a, b, c, d = (str(tmp_path / f"{name}.json") for name in "abcd")
    picture = tmp_path / "plot.svg"
    assert run(a, b, "--out", str(picture)) == (0, "")
    assert "<svg" in picture.read_text()
    for arguments, text in (
        ((a, c), "is of 2 ranks, the files before of 4"),
        ((d,), "is no record of `llm-allreduce bench --json`"),
        ((str(tmp_path / "none.json"),), "cannot be read"),
        ((a, b, "--with", "lowprecision tq3,x"), "--with x: must be one of LOWPRECISION, LOWPRECISION tq3"),
        ((a, "--out", str(tmp_path / "plot.xyz")), "xyz"),
    ):
        code, output = run("--out", str(picture), *arguments)
        assert code == 2
        assert text in " ".join(output.replace("│", " ").split()), output


# -- with a norm behind the sum ----------------------------------------------------------------------------------------


@pytest.fixture
def fast_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a command that start in a moment; :func:`test_bench_on_cpu_ranks` has those that users have."""

    def make(world_size: int, device_type: str) -> ForkedPool:
        assert device_type == "cpu"
        return ForkedPool(world_size, tmp_path / "cache")

    monkeypatch.setattr(rank_pools, "RankPool", make)


@pytest.mark.usefixtures("fast_ranks")
def test_fused_bench_on_cpu_ranks(tmp_path: Path) -> None:
    record = tmp_path / "bench.json"
    flags = [
        "--cpu",
        "-g",
        "2",
        "--fused",
        "--hidden",
        "512",
        "--quant",
        "fp8-group",
        "-b",
        "1K",
        "-e",
        "64K",
        "-f",
        "8",
    ]
    result = RUNNER.invoke(app, ["bench", *flags, "-n", "3", "-m", "2", "--json", str(record)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "# with residual and norm, hidden size 512, fp8-group" in lines
    for name in ("fused", "then-norm"):
        assert f"# {name}" in lines
    assert any(line.split()[:4] == ["65536", "64x512", "bfloat16", "norm"] for line in lines)
    assert "# Out of bounds values : 0 OK" in lines
    answer = json.loads(record.read_text())
    assert answer["options"]["hidden"] == 512
    assert answer["options"]["quant"] == "fp8-group"
    assert [(row["candidate"], row["count"] // 512) for row in answer["rows"]] == [
        (name, rows) for name in ("fused", "then-norm") for rows in (1, 8, 64)
    ]
    for row in answer["rows"]:
        assert row["eager_us"] > 0
        assert row["eager_wrong"] == 0


@pytest.mark.usefixtures("fast_ranks")
def test_what_takes_two_kernels_is_not_measured_as_one() -> None:
    flags = ["--cpu", "--fused", "--hidden", "64", "-d", "float", "-b", "1K", "-e", "1K", "-n", "2", "-m", "2"]
    result = RUNNER.invoke(app, ["bench", *flags])
    assert result.exit_code == 0, result.output
    assert "left out: only 16-bit types are fused, not float32" in result.output


def _measure_norm_with_a_fault(context: RankContext) -> list[int | None]:
    """One element of one rank's answer off by a bit: of each tensor in turn."""
    options = worker.Options("bfloat16", calls=2, replays=2, hidden=256, quant=QuantKind.FP8_TOKEN)
    assert worker.open_all(context, ("then-norm",), OurSettings(), options) == {}
    candidate = worker._open["then-norm"]
    bind = candidate.bind
    found = []

    def bad_bind(case: NormCase, field: str) -> Callable[[], Normed]:
        call = bind(case)

        def bad_call() -> Normed:
            output = call()
            if context.rank == 1:
                getattr(output, field).view(torch.uint8).view(-1)[9] ^= 1
            return output

        return bad_call

    try:
        for field in ("residual_out", "quant_out", "scale_out"):
            candidate.bind = functools.partial(bad_bind, field=field)
            found.append(worker.measure(context, "then-norm", 4 * 256, options).eager_wrong)
    finally:
        worker.close_all(context)
    return found


def test_fused_bench_sees_a_wrong_answer(cpu_pool: PoolFor) -> None:
    for found in cpu_pool(2).run(_measure_norm_with_a_fault):
        assert found == [1, 1, 1]
