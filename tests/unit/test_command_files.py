"""Files that commands read and write: found wrong before any work, with the option, the file, and what to do."""

from __future__ import annotations

import builtins
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llm_allreduce_plugin.bench import record as bench_record
from llm_allreduce_plugin.bench import worker
from llm_allreduce_plugin.breakeven import record as breakeven_record
from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.errors import UnreadableFileError
from tests.unit.test_topology_files import _sparse

ROOT = Path(__file__).parents[2]
RUNNER = CliRunner()
H200 = str(ROOT / "configs" / "topologies" / "h200_x4_nvswitch.json")
BENCH_RECORD = str(ROOT / "benchmarks" / "h200" / "bench_tp4.json")
CODECS_RECORD = str(ROOT / "benchmarks" / "h200" / "breakeven.json")


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, what is printed, and both outputs with the frame of typer's errors taken off."""
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "2000", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.output.replace("│", " ").split())


# -- what is written ---------------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[list[str], str]] = {
    "bench --json": (["bench", "--cpu", "-e", "1K", "-n", "1", "-m", "1"], "--json"),
    "tune --output": (["tune", "--cpu", "--quick", "-b", "1K", "-e", "1K"], "--output"),
    "accuracy --json": (["accuracy", "--no-model", "--tp", "2", "--wire-format", "fp8"], "--json"),
    "breakeven --json": (["breakeven", "--cpu", "--bytes", "64K"], "--json"),
}
PAINTERS: dict[str, tuple[list[str], str]] = {
    "bench --plot": (WRITERS["bench --json"][0], "--plot"),
    "accuracy --plot": (WRITERS["accuracy --json"][0], "--plot"),
    "breakeven --plot": (WRITERS["breakeven --json"][0], "--plot"),
    "explain --plot": (["explain", "--topology", H200], "--plot"),
    "plot --out": (["plot", BENCH_RECORD], "--out"),
}


def _folder(tmp: Path, suffix: str) -> Path:
    path = tmp / f"out{suffix}"
    path.mkdir()
    return path


def _below_a_file(tmp: Path, suffix: str) -> Path:
    (tmp / "file").write_text("")
    return tmp / "file" / f"out{suffix}"


def _pipe(tmp: Path, suffix: str) -> Path:
    path = tmp / f"out{suffix}"
    os.mkfifo(path)
    return path


BAD: dict[str, tuple[Callable[[Path, str], Path], str]] = {
    "folder": (_folder, "is a folder: give the name of a file in it"),
    "below a file": (_below_a_file, "is not a folder: give a file in a folder"),
    "pipe": (_pipe, "is not a regular file: give the name of another"),
    "where nobody writes": (lambda _tmp, suffix: Path(f"/proc/out{suffix}"), "cannot be written: "),
    "long name": (lambda tmp, suffix: tmp / f"{'x' * 300}{suffix}", "cannot be written: File name too long"),
    "link to itself": (lambda tmp, suffix: _loop(tmp / f"out{suffix}"), "cannot be written: "),
}


def _loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("writer", [*WRITERS, *PAINTERS])
def test_what_cannot_be_written_is_said_before_any_work(
    writer: str, bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if writer in PAINTERS:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    arguments, option = (WRITERS | PAINTERS)[writer]
    make, text = BAD[bad]
    path = make(tmp_path, ".png" if writer in PAINTERS else ".json")
    before = sorted(tmp_path.rglob("*"))
    code, printed, said = run(*arguments, option, str(path))
    assert code == 2, said
    assert f"{option} {path}: " in said
    assert text in said
    assert printed == "", "work was done first"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("painter", list(PAINTERS))
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("out", "the suffix '' is no kind of picture: use one of "),
        ("out.json", "the suffix '.json' is no kind of picture"),
    ],
)
def test_pictures_have_a_known_suffix(painter: str, name: str, text: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments, option = PAINTERS[painter]
    code, printed, said = run(*arguments, option, str(tmp_path / name))
    assert (code, printed) == (2, "")
    assert f"{option} {tmp_path / name}: {text}" in said
    assert list(tmp_path.iterdir()) == [], "nor is one added"


@pytest.mark.parametrize("painter", list(PAINTERS))
def test_without_matplotlib_nothing_is_begun(painter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *arguments, **options)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    arguments, option = PAINTERS[painter]
    code, printed, said = run(*arguments, option, str(tmp_path / "out.png"))
    assert (code, printed) == (2, "")
    assert "needs matplotlib, which is not installed: pip install matplotlib" in said


@pytest.mark.parametrize("writer", ("accuracy --json", "breakeven --json", "accuracy --plot", "plot --out"))
def test_a_disk_that_fills_up_meanwhile_is_an_error_and_no_traceback(writer: str, tmp_path: Path) -> None:
    """/dev/full is a device that can be opened and has no room."""
    if writer in PAINTERS:
        pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    path.symlink_to("/dev/full")
    arguments, option = (WRITERS | PAINTERS)[writer]
    code, _, said = run(*arguments, option, str(path))
    assert code == 2
    assert f"error: {option} {path}: cannot be written: No space left on device" in said


def test_missing_folders_are_made_by_who_writes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    json_file, picture = tmp_path / "a" / "b" / "out.json", tmp_path / "c" / "out.svg"
    code, _, said = run("breakeven", "--from", CODECS_RECORD, "--json", str(json_file), "--plot", str(picture))
    assert code == 0, said
    assert json.loads(json_file.read_text())["rows"]
    assert "<svg" in picture.read_text()
    assert [path.name for path in json_file.parent.iterdir()] == ["out.json"]


# -- what is read ------------------------------------------------------------------------------------------------------


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


# -- numbers on the command line ---------------------------------------------------------------------------------------

NUMBERS = {
    "bench": ["--tp", "-n", "-m", "-w", "-f"],
    "tune": ["--tp"],
    "accuracy": ["--tp"],
    "breakeven": ["--tp"],
    "explain": ["--tp", "--tokens", "--hidden"],
    "topo": ["--tp"],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("command", "option"), [(name, option) for name in NUMBERS for option in NUMBERS[name]])
def test_numbers_without_bound_are_refused(command: str, option: str) -> None:
    for digits in (5000, 400):
        cpu = ["--cpu"] if command in ("bench", "tune", "breakeven") else []
        code, printed, said = run(command, *cpu, option, "9" * digits)
        assert (code, printed) == (2, ""), said[:300]
        assert option.lstrip("-") in said
