"""Files that commands write: found wrong before any work, with the option, the file, and what to do. And numbers."""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin.cli import app

ROOT = Path(__file__).parents[2]
RUNNER = CliRunner()
H200 = str(ROOT / "configs" / "topologies" / "h200_x4_nvswitch.json")
BENCH_RECORD = str(ROOT / "benchmarks" / "h200" / "bench_tp4.json")
CODECS_RECORD = str(ROOT / "benchmarks" / "h100" / "breakeven.json")


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, what is printed, and both outputs with the frame of typer's errors taken off."""
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "2000", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.output.replace("│", " ").split())


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


def test_a_cache_that_cannot_be_written_is_said_before_tune_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    code, printed, said = run(*WRITERS["tune --output"][0])
    assert (code, printed) == (2, "")
    assert "error: --output (by default) /proc/nowhere/" in said
    assert "give a file in a folder that you can write to" in said


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


@pytest.mark.parametrize("command", [str(found.name) for found in app.registered_commands])
def test_help_tells_a_default_only_where_there_is_one(command: str) -> None:
    code, output, _ = run(command, "--help")
    assert code == 0
    assert not [word for word in ("<class", "inspect", "default: None") if word in output]
