"""llm-allreduce report: what it makes of the files in a report_dir."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.runtime import reports

GROUP = "tp0.ranks0-1.node-4711-9f3a20-0"
FALLBACK = {"requested": "ONESHOT", "strategy": "TWOSHOT", "reason": "2 MiB do not fit a slot", "calls": 3}


def report_of(rank: int, **fields: Any) -> dict[str, Any]:
    return {
        "rank": rank,
        "group": GROUP,
        "host": "node",
        "pid": 4711 + rank,
        "transport": "symmetric",
        "allreduce_strategy": "ONESHOT",
        "sizes": "ONESHOT at every size",
        "closed": False,
        "calls": {"ONESHOT": 7, "TWOSHOT": 3},
        "captured": {"ONESHOT, then norm": 40},
        "fallback_calls": [FALLBACK],
        **fields,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "reports"
    for rank in (1, 0):
        reports.write(found, report_of(rank))
    return found


def said(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_groups_ranks_and_fallbacks(folder: Path) -> None:
    lines = said(folder).splitlines()
    assert lines[0] == f"group {GROUP}: peer memory, allreduce_strategy ONESHOT"
    assert lines[1] == "  ONESHOT at every size"
    for rank in (0, 1):
        assert lines[2 + rank].startswith(f"  rank {rank} on node (open, written 0 s ago): ")
        assert lines[2 + rank].endswith("ONESHOT 7, TWOSHOT 3, ONESHOT, then norm 40 in graphs")
    assert lines[4:] == ["  instead of ONESHOT: TWOSHOT, 3 calls: 2 MiB do not fit a slot"], "once, not for each rank"


def test_groups_are_told_apart_and_old_reports_are_old(folder: Path) -> None:
    other = "dp1.ranks2-3.node-4713-9f3a22-0"
    reports.write(folder, report_of(0, group=other, closed=True, fallback_calls=[]))
    old = time.time() - 3 * 3600
    os.utime(folder / reports.file_name(0, other), (old, old))
    first, second = said(folder).split("\n\n")
    assert first.startswith(f"group {GROUP}: "), "the youngest first"
    assert second.startswith(f"group {other}: ")
    assert "  rank 0 on node (ended, written 3 h ago): " in second
    assert "  no fallbacks" in second


def test_a_rank_that_is_behind_is_pointed_out(folder: Path) -> None:
    assert "counted differently" not in said(folder)
    reports.write(folder, report_of(1, calls={"ONESHOT": 6, "TWOSHOT": 3}))
    assert "ranks counted differently: look at the one with fewer calls" in said(folder)


def test_json_has_the_same(folder: Path) -> None:
    documents = json.loads(said(folder, "--json"))
    assert [document["rank"] for document in documents] == [0, 1]
    assert documents[0]["calls"] == {"ONESHOT": 7, "TWOSHOT": 3}
    assert documents[1]["fallback_calls"] == [FALLBACK]


def test_a_picture(folder: Path, tmp_path: Path) -> None:
    reports.write(folder, report_of(1, calls={"$x^$": 1, "_": 2}, captured={}))
    said(folder, "--plot", tmp_path / "calls.png")
    assert (tmp_path / "calls.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_report_is_named_and_left_out(folder: Path) -> None:
    (folder / "rank-7.json").write_text("{")
    (folder / "rank-8.json").write_text(json.dumps(report_of(8)))
    output = said(folder)
    assert "rank 0 on node" in output
    assert f"left out: {folder / 'rank-7.json'}" in output
    assert "of another rank or group than its name says" in output


def test_control_characters_reach_no_terminal(folder: Path) -> None:
    reports.write(folder, report_of(0, calls={"\x1b[31mONESHOT": 1}, sizes="\x1b]0;title\x07"))
    assert "\x1b" not in said(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"transport": "\x1b[31m"},
        {"allreduce_strategy": "AUTO\ngroup forged: peer memory"},
        {"host": "node\n  rank 7 on node"},
        {"fallback_calls": [{**FALLBACK, "requested": "\x1b[31m"}]},
        {"fallback_calls": [{**FALLBACK, "strategy": "TWOSHOT\nforged"}]},
        {"calls": {"ONESHOT\x1b": 1}},
    ],
    ids=str,
)
def test_names_that_a_terminal_would_obey_are_refused(folder: Path, fields: dict[str, Any]) -> None:
    reports.write(folder, report_of(0, **fields))
    output = said(folder)
    (line,) = [line for line in output.splitlines() if line.startswith("left out: ")]
    assert line.isprintable()
    assert "is no report: " in line
    assert "must be one line of printable characters" in line
    assert "\x1b" not in output
    assert not [line for line in output.splitlines() if line.startswith(("group forged", "  rank 7"))]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.mkdir(), "no reports there: give the folder that report_dir names"),
        (lambda path: path.touch(), "is not a folder: give the one that report_dir names"),
        (lambda _: None, "is not a folder"),
    ],
    ids=("empty", "a file", "missing"),
)
def test_folders_without_reports(tmp_path: Path, make: Any, text: str) -> None:
    path = tmp_path / "it"
    make(path)
    assert text in " ".join(said(path, code=2).replace("│", " ").split())
