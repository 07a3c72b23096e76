"""What a record or a tuning profile says of the commit that it is of, and what is measured for it by default."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_allreduce_plugin.cli import app
from llm_allreduce_plugin.cli.tune import versions
from llm_allreduce_plugin.measure import environment

ROOT = Path(__file__).parents[2]


def _git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(("git", "-C", str(folder), *who, *words), capture_output=True, text=True, check=True).stdout


def _repository(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    _git(folder, "init", "-q")
    _git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return _git(folder, "rev-parse", "HEAD").strip()


def test_the_commit_is_of_this_packages_own_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wherever the command was started, also inside of another repository."""
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    commit, elsewhere = _repository(tmp_path / "own"), _repository(tmp_path / "other")
    assert commit != "" != elsewhere
    monkeypatch.setattr(environment, "ROOT", tmp_path / "own")
    monkeypatch.chdir(tmp_path / "other")
    assert environment.commit() == commit
    assert environment.environment()["commit"] == commit
    assert versions()["commit"] == commit


def test_an_installed_package_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its folder may lie in somebody's repository, like an environment in a checkout of another project."""
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    _repository(tmp_path)
    packages = tmp_path / ".venv" / "site-packages"
    packages.mkdir(parents=True)
    monkeypatch.setattr(environment, "ROOT", packages)
    monkeypatch.chdir(tmp_path)
    assert environment.commit() == ""
    assert "commit" not in versions()


def test_a_checkout_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("BENCHMARK_COMMIT", "0123abc")
    assert environment.commit() == versions()["commit"] == "0123abc"


def test_versions_are_lines_of_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["llm-allreduce", "tune", "--output", "a\nb" + "x" * 2000])
    command = versions()["command"]
    assert command.isprintable()
    assert len(command) <= 1000


def test_the_package_of_the_tests_is_the_checkout() -> None:
    assert environment.ROOT == ROOT


def test_help_of_tune_tells_the_largest_message_by_default() -> None:
    result = CliRunner().invoke(app, ["tune", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert "Largest message; default: 256M, with --quick 64M, of CPU ranks 4M." in result.output
