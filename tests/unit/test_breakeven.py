"""The break-even model, and the command on CPU codecs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.compression.breakeven.model import (
    CodecSpeed,
    between_seconds,
    break_even,
    break_even_between,
    codec_seconds,
    ratio,
    seconds,
    traffic,
)
from llm_allreduce_plugin.config import WireFormat

RUNNER = CliRunner()
any_speed = st.builds(CodecSpeed, encode=st.floats(0.1, 1e5), decode=st.floats(0.1, 1e5))


def test_what_is_sent_and_coded() -> None:
    assert [traffic(ranks) for ranks in (2, 4, 8)] == [1.0, 1.5, 1.75]
    assert ratio(WireFormat.FP8) == pytest.approx(512 / 992)
    assert ratio(WireFormat.TQ3) == pytest.approx(10 / 64)
    # 4 ranks, 1 GB: encodes all of it once; decodes three quarters, three quarters and its own quarter.
    assert codec_seconds(1e9, 4, CodecSpeed(encode=1.0, decode=2.0)) == pytest.approx(1.0 + 1.75 / 2)
    assert seconds(1e9, 2, 10.0) == pytest.approx(0.1)


@given(st.integers(2, 8), st.sampled_from(list(WireFormat)), any_speed, st.floats(1, 1e10))
def test_break_even_is_where_the_lines_cross(ranks: int, wire: WireFormat, speed: CodecSpeed, size: float) -> None:
    bandwidth = break_even(ranks, wire, speed)
    assert seconds(size, ranks, bandwidth, wire, speed) == pytest.approx(seconds(size, ranks, bandwidth), rel=1e-6)
    assert seconds(size, ranks, bandwidth / 2, wire, speed) < seconds(size, ranks, bandwidth / 2)
    assert seconds(size, ranks, bandwidth * 2, wire, speed) > seconds(size, ranks, bandwidth * 2)


@given(st.integers(2, 9), st.integers(1, 8), st.sampled_from(list(WireFormat)), any_speed, st.floats(1, 1e10))
def test_and_so_between_hosts(hosts: int, ranks: int, wire: WireFormat, speed: CodecSpeed, size: float) -> None:
    bandwidth = break_even_between(hosts, wire, speed)

    def compressed(rate: float) -> float:
        return between_seconds(size, hosts, ranks, rate, wire, speed)

    def exact(rate: float) -> float:
        return between_seconds(size, hosts, ranks, rate)

    assert compressed(bandwidth) == pytest.approx(exact(bandwidth), rel=1e-6)
    assert compressed(bandwidth / 2) < exact(bandwidth / 2)
    assert compressed(bandwidth * 2) > exact(bandwidth * 2)


def test_what_is_sent_and_coded_between_hosts() -> None:
    # Two hosts of 8, 64 MiB, 46 GB/s: a rank sends 16 MiB of fp32 sums, and in FP8 a quarter and a bit.
    assert between_seconds(2**26, 2, 8, 46.0) == pytest.approx(2**24 / 46e9)
    free = CodecSpeed(encode=1e12, decode=1e12)
    assert between_seconds(2**26, 2, 8, 46.0, WireFormat.FP8, free) == pytest.approx(2**22 * 512 / 496 / 46e9)
    # One pass for what is sent, one for what comes of each host, its own sum, too.
    endless = between_seconds(1e9, 3, 1, 1e18, WireFormat.FP8, CodecSpeed(encode=1.0, decode=2.0))
    assert endless == pytest.approx(2 * (1 + 3 / 2))


def test_the_command(tmp_path: Path) -> None:
    record, picture = tmp_path / "b.json", tmp_path / "b.svg"
    flags = ["--cpu", "--bytes", "256K", "--ranks", "2", "--json", str(record), "--plot", str(picture)]
    result = RUNNER.invoke(app, ["breakeven", *flags])
    assert result.exit_code == 0, result.output
    assert "says nothing about a GPU" in result.output
    lines = result.output.splitlines()
    assert any(line.split()[:3] == ["PCIe", "4.0", "x16,"] for line in lines)
    rows = json.loads(record.read_text())["rows"]
    assert [row["wire_format"] for row in rows] == list(WireFormat)
    assert all(row["encode"] > 0 and row["decode"] > 0 and row["pays_below"] > 0 for row in rows)
    assert picture.stat().st_size > 0
    assert RUNNER.invoke(app, ["breakeven", "--bytes", "many"]).exit_code == 2


def test_recorded_speeds(tmp_path: Path) -> None:
    """With them no device is needed, and the answer is the recorded device's."""
    rows = [{"wire_format": str(wire), "encode": 1000.0, "decode": 1000.0, "pays_below": 0.0} for wire in WireFormat]
    record = tmp_path / "b.json"
    record.write_text(json.dumps({"where": "a test", "rows": rows}))
    result = RUNNER.invoke(app, ["breakeven", "--from", str(record), "--tp", "4"])
    assert result.exit_code == 0, result.output
    assert "# codecs measured on a test; 4 ranks" in result.output
    expected = break_even(4, WireFormat.TQ3, CodecSpeed(1000.0, 1000.0))
    assert result.output.splitlines()[-1].split()[-2] == f"{expected:.0f}"
    expected = break_even_between(3, WireFormat.TQ3, CodecSpeed(1000.0, 1000.0))
    result = RUNNER.invoke(app, ["breakeven", "--from", str(record), "--hosts", "3"])
    line = next(line for line in result.output.splitlines() if "between 3 hosts" in line)
    assert line.split()[-2] == f"{expected:.0f}"
    record.write_text("{}")
    assert RUNNER.invoke(app, ["breakeven", "--from", str(record)]).exit_code == 2
    assert RUNNER.invoke(app, ["breakeven", "--from", str(tmp_path / "none")]).exit_code == 2


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        ("1", "--bytes 1: less than an element of bfloat16, 2 bytes"),
        ("1T", "--bytes 1T: the CPU of this node has not that much memory: give less"),
    ],
)
def test_messages_that_cannot_be_measured_are_refused(size: str, complaint: str) -> None:
    result = RUNNER.invoke(app, ["breakeven", "--cpu", "--bytes", size], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.replace("│", " ").split())
