"""Records that commands read: whatever lies there, the answer is a picture or an error with file and field."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_allreduce_plugin.bench import worker
from llm_allreduce_plugin.compression.breakeven import record as breakeven_record
from llm_allreduce_plugin.errors import UnreadableFileError
from llm_allreduce_plugin.measure import record as bench_record
from tests.unit.test_command_files import ROOT, run
from tests.unit.test_topology_files import _sparse


def test_all_records_of_this_repository_can_be_read() -> None:
    read = {"bench": 0, "breakeven": 0}
    for path in (ROOT / "benchmarks").rglob("*.json"):
        if path.name.startswith(("bench", "host_bench", "curve")):
            assert bench_record.read(path).rows
            read["bench"] += 1
        elif path.name.startswith("breakeven"):
            assert breakeven_record.read(path).speeds()
            read["breakeven"] += 1
    assert min(read.values()) > 0


def test_every_record_is_named() -> None:
    """By a page, a script or a source file: what nobody names is nobody's evidence."""
    folders = ("docs", "benchmarks", "scripts", "llm_allreduce_plugin", "csrc", "configs")
    readable = {".md", ".py", ".sh", ".cu", ".cuh", ".cpp", ".h"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in readable]
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *files))
    records = [path.relative_to(ROOT / "benchmarks").with_suffix("") for path in (ROOT / "benchmarks").rglob("*.json")]
    assert len(records) > 100
    # As pages write it; those of a node also as tables and pictures take it.
    unnamed = [
        str(name)
        for name in records
        if f"benchmarks/{name}.json" not in text and not (name.parent.name and f'"{name}"' in text)
    ]
    assert unnamed == []


@pytest.mark.parametrize("name", ["soak_tp2", "soak_one_gpu"])
def test_pages_have_the_steps_of_the_soaks(name: str) -> None:
    """In prose, which no script writes: a new record must not leave an old number behind."""
    record = json.loads((ROOT / "benchmarks" / "h200" / f"{name}.json").read_text())
    assert record["wrong_elements"] == 0
    for page in ("README.md", "docs/performance.md"):
        text = (ROOT / page).read_text()
        assert f"benchmarks/h200/{name}.json" in text
        assert f"{record['steps']:,}" in text, f"{page} does not say {record['steps']:,} steps"


GOOD_ROW = {"candidate": "ONESHOT", "bytes": 4096, "count": 2048, "eager_us": 3.5, "graph_us": None}
GOOD = {"world_size": 4, "where": "a test", "rows": [GOOD_ROW]}
CODEC_ROW = {"wire_format": "fp8", "encode": 100.0, "decode": 100.0}
CODECS = {"where": "a test", "rows": [CODEC_ROW]}
DIGITS = "9" * 5000

POISON: dict[str, Callable[[Path], object]] = {
    "UTF-16": lambda path: path.write_text(json.dumps(GOOD), encoding="utf-16"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "a terabyte": _sparse,
    "deep": lambda path: path.write_text("[" * 100_000),
    "digits": lambda path: path.write_text('{"world_size": ' + DIGITS + "}"),
    "digits behind a point": lambda path: path.write_text('{"world_size": 1.' + DIGITS + "}"),
    "empty": lambda path: path.write_text(""),
    "list": lambda path: path.write_text("[]"),
    "nothing known": lambda path: path.write_text("{}"),
    "rows of text": lambda path: path.write_text(json.dumps(GOOD | {"rows": ["row"]})),
    "a number for rows": lambda path: path.write_text(json.dumps(GOOD | {"rows": 5})),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", list(POISON))
def test_poisoned_records_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    POISON[kind](path)
    for arguments in (["plot", str(path), "--out", str(tmp_path / "x.png")], ["breakeven", "--from", str(path)]):
        code, printed, said = run(*arguments)
        assert (code, printed) == (2, ""), said
        assert str(path) in said
    assert not (tmp_path / "x.png").exists()


NOT_A_TIME: list[Any] = ["3", True, -1.0, 0, float("nan"), float("inf"), 10**4000, 1e300, [], {}]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("candidate", ["", 5, None, "a\x1b[31m", "a\nb", "x" * 5000]),
        ("bytes", [0, -1, 1.0, "4096", True, None, 10**4000, 1 << 60]),
        ("count", [0, -1, 2.5, "1", None, 10**400]),
        ("eager_us", NOT_A_TIME),
        ("graph_us", NOT_A_TIME),
        ("eager_wrong", [-1, "0", 0.5, False]),
        ("speed", [1.0]),
    ],
)
def test_wrong_fields_of_rows_are_named(field: str, values: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for value in values:
        path.write_text(json.dumps(GOOD | {"rows": [GOOD_ROW, GOOD_ROW | {field: value}]}))
        code, _, said = run("plot", str(path), "--out", str(tmp_path / "x.png"))
        assert code == 2, value
        assert f"{path} is no record of `llm-allreduce bench --json`: rows.1.{field}: " in said, said[:500]
        assert "\x1b" not in said


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("world_size", [0, 1, -4, 4.0, "4", None, True, 10**4000]),
        ("where", [5, None, "\x1b]0;title\x07"]),
        ("options", [5, "fp8", {"wire_format": 3}, {"wire_format": "\x1b"}]),
        ("rows", [[], None, {}]),
    ],
)
def test_wrong_fields_of_records_are_named(field: str, values: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for value in values:
        path.write_text(json.dumps(GOOD | {field: value}))
        code, _, said = run("plot", str(path), "--out", str(tmp_path / "x.png"))
        assert code == 2, value
        assert f"is no record of `llm-allreduce bench --json`: {field}" in said, said[:500]
        assert "\x1b" not in said


@pytest.mark.parametrize(
    ("field", "values"),
    [("encode", NOT_A_TIME), ("decode", NOT_A_TIME), ("wire_format", ["fp9", None, 8, "\x1bfp8"])],
)
def test_wrong_fields_of_codec_records_are_named(field: str, values: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for value in values:
        path.write_text(json.dumps(CODECS | {"rows": [CODEC_ROW | {field: value}]}))
        code, printed, said = run("breakeven", "--from", str(path))
        assert (code, printed) == (2, ""), value
        assert f"{path} is no record of `llm-allreduce breakeven --json`: rows.0.{field}: " in said, said[:500]
    path.write_text(json.dumps(CODECS | {"rows": [CODEC_ROW, CODEC_ROW]}))
    assert "a wire format is there twice: fp8, fp8" in run("breakeven", "--from", str(path))[2]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(("world_size", "where", "options", "rows", "environment")), anything))
@settings(max_examples=200, deadline=None)
def test_any_document_is_read_or_named(fields: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        path.write_text(json.dumps(GOOD | fields))
        for read in (bench_record.read, breakeven_record.read):
            try:
                read(path)
            except UnreadableFileError as error:
                assert str(path) in str(error)
                assert str(error).isprintable()


def test_a_record_without_times_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(GOOD | {"rows": [GOOD_ROW | {"eager_us": None, "left_out": "too large"}]}))
    code, _, said = run("plot", str(path), "--out", str(tmp_path / "x.png"))
    assert code == 2
    assert "nothing was measured" in said


def test_rows_are_what_bench_writes() -> None:
    assert set(bench_record.Row.model_fields) == set(worker.Measurement.__dataclass_fields__)
